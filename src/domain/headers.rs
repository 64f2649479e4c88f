//! The headers of a request to Amazon: which are dropped, which are forwarded, and which are attached. (Those of its
//! response: `inbound/proxy/response.rs`.)
//!
//! The upstream request's header map starts empty. Permitted caller headers are copied into it first, and the headers
//! that adsidecar manages are attached last. A caller therefore cannot strip a credential by naming it in `Connection`
//! (RFC 9110, section 7.6.1), and no duplicate of a managed header survives beside ours.

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHORIZATION,
    TRANSFER_ENCODING,
};

use crate::domain::account::{Context, Ids};
use crate::domain::api_families::{ClientId, Family, context_of};

/// The headers that adsidecar attaches to one upstream request.
#[derive(Clone, Copy, Debug)]
pub struct UpstreamHeaders<'a> {
    /// The API family of the request path.
    pub family: &'static Family,
    /// `Bearer <access token>`.
    pub bearer: &'a HeaderValue,
    /// The LWA client id.
    pub client_id: &'a HeaderValue,
    /// The account's ids; `None` where the request goes to a region other than the account's.
    pub ids: Option<&'a Ids>,
    /// Headers that the account's configuration adds to every request.
    pub fixed: &'a [(HeaderName, HeaderValue)],
}

/// Builds the headers of the upstream request from the headers that the caller sent and those in `attach`.
///
/// Ids and fixed headers come first, credentials last, so that a managed header has exactly one value. `Host` is
/// absent: [`upstream`](crate::upstream) sets it, or HTTP/2's `:authority`.
pub fn to_amazon(caller: &HeaderMap, attach: UpstreamHeaders<'_>) -> HeaderMap {
    let mut out = HeaderMap::with_capacity(caller.len() + 8);
    // 1. Copy what the caller may send, and note which contexts and which spelling of the client id it used.
    let options = ConnectionOptions::of(caller);
    let mut present = Contexts::default();
    let mut caller_spelling = None;
    for (name, value) in caller {
        match action_for(name.as_str()) {
            HeaderAction::Drop => continue,
            HeaderAction::ClientId(spelling) => caller_spelling = Some(spelling),
            _ if options.contains(name) => continue,
            // Tools send an optional header that was left empty; it counts as not sent.
            HeaderAction::Context(_) if value.as_bytes().trim_ascii().is_empty() => continue,
            HeaderAction::Context(context) => {
                present.insert(context);
                out.append(name, value.clone());
            }
            HeaderAction::Pass => {
                out.append(name, value.clone());
            }
        }
    }
    // 2. Keep `Content-Length` unless the body is chunked.
    if let Some(length) = caller.get(CONTENT_LENGTH).filter(|_| !caller.contains_key(TRANSFER_ENCODING)) {
        out.insert(CONTENT_LENGTH, length.clone());
    }
    // 3. Attach the account's headers and ids; a context that is already present wins.
    for (name, value) in attach.fixed {
        if let Some(context) = context_of(name.as_str()) {
            present.insert(context);
        }
        out.insert(name, value.clone());
    }
    if let Some(ids) = attach.ids {
        attach_ids(&mut out, attach.family, ids, present);
    }
    // 4. Attach the client id and the access token.
    let spelling = match caller_spelling {
        Some(used) if attach.family.is_unknown() => used,
        _ => attach.family.client_id,
    };
    out.insert(spelling.name(), attach.client_id.clone());
    out.insert(AUTHORIZATION, attach.bearer.clone());
    out
}

/// Marks a response that adsidecar itself generated. The value is the error code.
pub const ERROR: HeaderName = HeaderName::from_static("x-adsidecar-error");
/// Says how long a request waited for its turn. The value is `wait=<seconds>, expected=<seconds>, bucket=<bucket>`.
pub const THROTTLE: HeaderName = HeaderName::from_static("x-adsidecar-throttle");
/// Explains a response that came from Amazon. The value is a hint code.
pub const HINT: HeaderName = HeaderName::from_static("x-adsidecar-hint");

/// Whether a header is or may be meant for adsidecar itself: an `X-Ads-*` header, whatever separates its words, or the
/// credentials for the proxy.
pub fn is_for_sidecar(name: &str) -> bool {
    let letters = || name.bytes().filter(u8::is_ascii_alphanumeric);
    let begins = |start: &[u8]| letters().take(start.len()).eq(start.iter().copied());
    begins(b"xads") || begins(b"ads") || name == PROXY_AUTHORIZATION.as_str()
}

/// What [`to_amazon`] does with one header of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HeaderAction {
    /// Copies the header.
    Pass,
    /// Drops the header.
    Drop,
    /// Copies the header, which sets this context and so suppresses the account's own id.
    Context(Context),
    /// Replaces the header's value with our client id, in this spelling where the family is unknown.
    ClientId(ClientId),
}

/// Decides what happens to the caller's header `name`, given in lower case.
fn action_for(name: &str) -> HeaderAction {
    if name.contains('_') {
        // Some servers treat `_` as `-`, so the `_` spelling of a managed header could override it.
        return match action_for(&name.replace('_', "-")) {
            HeaderAction::Pass => HeaderAction::Pass,
            _ => HeaderAction::Drop,
        };
    }
    match name {
        "connection" | "keep-alive" | "te" | "trailer" | "transfer-encoding" | "upgrade" | "http2-settings" => {
            HeaderAction::Drop
        }
        // CGI turns the `Proxy` header into the environment variable HTTP_PROXY ("httpoxy").
        "proxy" | "host" | "content-length" | "expect" | "authorization" => HeaderAction::Drop,
        "cookie" | "origin" | "referer" | "forwarded" => HeaderAction::Drop,
        "amazon-advertising-api-clientid" => HeaderAction::ClientId(ClientId::Api),
        "amazon-ads-clientid" => HeaderAction::ClientId(ClientId::Ads),
        _ if ["proxy-", "sec-", "x-forwarded-", "x-ads-"].iter().any(|prefix| name.starts_with(prefix)) => {
            HeaderAction::Drop
        }
        _ => context_of(name).map_or(HeaderAction::Pass, HeaderAction::Context),
    }
}

/// Attaches the account's ids that `family` takes, except where the caller or a fixed header already sent that context
/// or one that excludes it.
fn attach_ids(out: &mut HeaderMap, family: &Family, ids: &Ids, mut present: Contexts) {
    for header in family.context {
        let context = header.context();
        let Some(id) = ids.get(context) else { continue };
        let sent = present.contains(context) || out.contains_key(header.name());
        if sent || present.excludes(context, family.exclusive) {
            continue;
        }
        present.insert(context);
        out.insert(header.name(), id.clone());
    }
}

/// The header names that any `Connection` line lists (connection options, RFC 9110, section 7.6.1).
#[derive(Debug)]
pub struct ConnectionOptions(Vec<HeaderName>);

impl ConnectionOptions {
    /// Reads every `Connection` line of `headers`.
    pub fn of(headers: &HeaderMap) -> Self {
        let lines = headers.get_all(CONNECTION).iter();
        let tokens = lines.filter_map(|line| line.to_str().ok()).flat_map(|line| line.split(','));
        let named = tokens
            .map(str::trim)
            .filter(|token| !token.eq_ignore_ascii_case("keep-alive") && !token.eq_ignore_ascii_case("close"));
        Self(named.filter_map(|token| token.parse().ok()).collect())
    }

    fn contains(&self, name: &HeaderName) -> bool {
        self.0.contains(name)
    }
}

impl IntoIterator for ConnectionOptions {
    type Item = HeaderName;
    type IntoIter = std::vec::IntoIter<HeaderName>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// A set of contexts, one bit for each.
#[derive(Clone, Copy, Default)]
struct Contexts(u8);

const _: () = assert!(Context::ALL.len() <= u8::BITS as usize, "widen `Contexts`");

impl Contexts {
    fn insert(&mut self, context: Context) {
        self.0 |= 1 << context as u8;
    }

    fn contains(self, context: Context) -> bool {
        self.0 & (1 << context as u8) != 0
    }

    /// Whether a member of the set rules out `context`, as the other one of an `exclusive` pair.
    fn excludes(self, context: Context, exclusive: Option<(Context, Context)>) -> bool {
        exclusive.is_some_and(|(one, other)| {
            (one == context && self.contains(other)) || (other == context && self.contains(one))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::api_families::{Header, family};
    use crate::domain::published::{Operation, operations};

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        headers
    }

    fn ids(pairs: &[(Context, &str)]) -> Ids {
        let mut ids = Ids::default();
        for (context, id) in pairs {
            ids.set(*context, id).unwrap();
        }
        ids
    }

    /// The upstream headers as sorted `name: value` lines, without the credentials.
    fn seen(path: &str, caller: &[(&str, &str)], account: &[(Context, &str)]) -> Vec<String> {
        let out = full(path, caller, account);
        let ours = ["authorization", "host"];
        let mut lines: Vec<_> = out
            .iter()
            .filter(|(name, _)| !ours.contains(&name.as_str()) && !name.as_str().ends_with("clientid"))
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        lines.sort();
        lines
    }

    fn full(path: &str, caller: &[(&str, &str)], account: &[(Context, &str)]) -> HeaderMap {
        let ids = ids(account);
        to_amazon(
            &map(caller),
            UpstreamHeaders {
                family: family(path),
                bearer: &HeaderValue::from_static("Bearer Atza|ours"),
                client_id: &HeaderValue::from_static("ours"),
                ids: Some(&ids),
                fixed: &[],
            },
        )
    }

    const ALL: &[(Context, &str)] = &[
        (Context::Scope, "1"),
        (Context::Marketplace, "M"),
        (Context::Advertiser, "ENTITYA"),
        (Context::Entity, "ENTITYE"),
        (Context::Account, "ACC"),
        (Context::DspAdvertiser, "DSP"),
        (Context::AmcInstance, "amc1"),
        (Context::Manager, "MGR"),
    ];

    /// How `family`, which requests for a published operation get, differs from its declaration; `None` if it does not.
    fn disagreement(operation: &Operation, family: &Family) -> Option<String> {
        /// Headers about the content, and a parameter that AMC's custom models take in the query.
        const NO_CONTEXT: [&str; 6] = [
            "accept-language",
            "content-disposition",
            "locale",
            "prefer",
            "accept",
            "amazon-marketing-cloud-instanceid",
        ];
        let ids = |name: &str| !name.ends_with("clientid") && !NO_CONTEXT.contains(&name);
        let names = |headers: &[Header]| headers.iter().map(|header| header.name().to_string()).collect::<Vec<_>>();
        let (attached, on_request) = (names(family.context), names(family.on_request));
        let known = [&attached[..], &on_request].concat();
        let declared: Vec<_> = operation.headers.iter().map(|(name, _)| name).filter(|name| ids(name)).collect();
        let foreign: Vec<_> = attached
            .iter()
            .filter(|name| !declared.contains(name) && !operation.authorized_by.contains(name))
            .collect();
        let absent: Vec<_> = declared.iter().filter(|name| !known.contains(name)).collect();
        (!foreign.is_empty() || !absent.is_empty()).then(|| {
            let Operation { path, method, .. } = operation;
            format!("{method} {path} ({}): not declared {foreign:?}, not known {absent:?}", family.name)
        })
    }

    /// What is wrong with the headers of the published operations.
    struct Compared {
        /// Required headers that are not attached.
        missing: Vec<String>,
        /// Operations with the client id under another name.
        client_id: Vec<String>,
        /// Operations of no family.
        unknown: Vec<String>,
        disagreements: Vec<String>,
    }

    /// Compares each published operation with what a request for `path_of` its path gets.
    fn compare(path_of: impl Fn(&'static str) -> &'static str) -> Compared {
        let operations = operations();
        assert_eq!(operations.len(), 907);
        let (mut missing, mut client_id, mut unknown, mut disagreements) = (vec![], vec![], vec![], vec![]);
        for operation in &operations {
            let Operation { path, method, headers, .. } = operation;
            let sent = full(path_of(path), &[], ALL);
            for (name, required) in headers {
                if name.ends_with("clientid") {
                    if !sent.contains_key(name) {
                        client_id.push(format!("{method} {path}: {name}"));
                    }
                } else if *required && name != "content-disposition" && !sent.contains_key(name) {
                    missing.push(format!("{method} {path}: {name}"));
                }
            }
            if family(path_of(path)).is_unknown() {
                unknown.push(format!("{method} {path}"));
            }
            disagreements.extend(disagreement(operation, family(path_of(path))));
        }
        Compared { missing, client_id, unknown, disagreements }
    }

    #[test]
    fn the_families_agree_with_every_operation_that_amazon_has_published() {
        let Compared { missing, client_id, unknown, disagreements } = compare(|path| path);
        let agreement = 907 - disagreements.len();
        assert!(missing.is_empty(), "required headers that are not attached: {missing:#?}");
        assert!(client_id.is_empty(), "operations with the client id under another name: {client_id:#?}");
        assert!(unknown.is_empty(), "operations of no family: {unknown:#?}");
        // The others declare too few headers: an operation of Sponsored Brands without its profile cannot be served.
        assert!(agreement >= 885, "{agreement} of 907 agree; these do not: {disagreements:#?}");
        assert!(disagreements.iter().all(|line| line.ends_with("not known []")), "{disagreements:#?}");
    }

    /// Known-bad: with one family for all paths, and with none, the comparison above finds each kind of fault.
    #[test]
    fn a_table_of_one_family_or_of_none_disagrees_with_the_published_operations() {
        let one = compare(|_| "/v2/profiles");
        assert!(
            one.missing.len() > 100 && one.disagreements.len() > 400,
            "{} {}",
            one.missing.len(),
            one.disagreements.len()
        );
        assert!(one.client_id.len() > 10 && one.unknown.is_empty(), "{}", one.client_id.len());
        let none = compare(|_| "/new");
        assert_eq!(none.unknown.len(), 907);
        assert!(907 - none.disagreements.len() < 885, "{}", none.disagreements.len());
    }

    #[test]
    fn hop_by_hop_browser_and_adsidecar_headers_are_not_forwarded() {
        let caller = [
            ("cookie", "a=b"),
            ("origin", "http://x"),
            ("referer", "http://x"),
            ("sec-fetch-mode", "cors"),
            ("forwarded", "for=1"),
            ("x-forwarded-for", "1"),
            ("expect", "100-continue"),
            ("x-ads-account", "a"),
            ("x-ads-sidecar-token", "t"),
            ("proxy-authorization", "Basic eA=="),
            ("proxy", "http://evil"),
            ("te", "trailers"),
            ("trailer", "x"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
            ("keep-alive", "timeout=5"),
            ("amazon_advertising_api_scope", "2"),
            ("x_ads_account", "b"),
        ];
        assert_eq!(seen("/v2/profiles", &caller, ALL), Vec::<String>::new());
    }

    #[test]
    fn credentials_are_ours_whatever_the_caller_sent() {
        let caller = [
            ("authorization", "Bearer theirs"),
            ("authorization", "Bearer theirs too"),
            ("amazon-ads-clientid", "theirs"),
            ("amazon-advertising-api-clientid", "theirs"),
            ("host", "localhost:8001"),
            ("connection", "authorization, amazon-advertising-api-clientid, amazon-advertising-api-scope, host"),
        ];
        let out = full("/sp/campaigns/list", &caller, ALL);
        let all = |name: &str| out.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!(all("authorization"), ["Bearer Atza|ours"]);
        assert_eq!(all("amazon-advertising-api-clientid"), ["ours"]);
        assert_eq!(all("amazon-ads-clientid"), Vec::<&str>::new());
        assert_eq!(all("amazon-advertising-api-scope"), ["1"]);
        assert_eq!(all("host"), Vec::<&str>::new());
    }

    #[test]
    fn an_unknown_family_keeps_the_callers_name_for_the_client_id() {
        let out = full("/new", &[("amazon-ads-clientid", "x")], &[]);
        assert_eq!(out["amazon-ads-clientid"], "ours");
        assert!(!out.contains_key("amazon-advertising-api-clientid"));
        assert_eq!(full("/new", &[], &[])["amazon-advertising-api-clientid"], "ours");
    }

    #[test]
    fn a_known_family_decides_the_client_ids_name_whatever_the_caller_used() {
        let out = full("/sp/campaigns/list", &[("amazon-ads-clientid", "x")], &[]);
        assert_eq!(out["amazon-advertising-api-clientid"], "ours");
        assert!(!out.contains_key("amazon-ads-clientid"));
    }

    #[test]
    fn an_underscore_alone_does_not_drop_a_header() {
        assert_eq!(seen("/v2/profiles", &[("x_own", "1")], &[]), ["x_own: 1"]);
    }

    #[test]
    fn close_and_keep_alive_in_connection_strip_no_header() {
        assert_eq!(seen("/v2/profiles", &[("connection", "close, keep-alive"), ("close", "1")], &[]), ["close: 1"]);
    }

    #[test]
    fn names_listed_in_any_connection_line_are_stripped() {
        let caller = [
            ("connection", ""),
            ("connection", "close, X-Private"),
            ("connection", "x-other"),
            ("x-private", "1"),
            ("x-other", "2"),
            ("x-kept", "3"),
        ];
        assert_eq!(seen("/v2/profiles", &caller, &[]), ["x-kept: 3"]);
    }

    #[test]
    fn a_context_header_of_the_caller_is_kept_and_decides_exclusions() {
        assert_eq!(
            seen("/reporting/reports", &[("amazon-ads-accountid", "theirs")], ALL),
            ["amazon-ads-accountid: theirs"]
        );
        assert_eq!(seen("/reporting/reports", &[], ALL), ["amazon-advertising-api-scope: 1"]);
        assert_eq!(
            seen("/avc/events", &[("amazon-advertising-advertiser-id", "theirs")], ALL),
            ["amazon-advertising-advertiser-id: theirs", "amazon-advertising-api-marketplaceid: M"]
        );
        assert_eq!(
            seen("/avc/events", &[], ALL),
            ["amazon-advertising-api-entityid: ENTITYE", "amazon-advertising-api-marketplaceid: M"]
        );
    }

    #[test]
    fn a_blank_context_header_counts_as_not_sent() {
        for blank in ["", " ", "\t"] {
            assert_eq!(
                seen("/sp/campaigns/list", &[("amazon-advertising-api-scope", blank)], ALL),
                ["amazon-advertising-api-scope: 1"]
            );
            assert_eq!(
                seen("/reporting/reports", &[("amazon-ads-accountid", blank)], ALL),
                ["amazon-advertising-api-scope: 1"],
                "a blank header excludes no id"
            );
            assert_eq!(seen("/sp/campaigns/list", &[("amazon-advertising-api-scope", blank)], &[]), [""; 0]);
        }
        let twice = [("amazon-advertising-api-scope", ""), ("amazon-advertising-api-scope", "theirs")];
        assert_eq!(seen("/sp/campaigns/list", &twice, ALL), ["amazon-advertising-api-scope: theirs"]);
    }

    #[test]
    fn scope_and_account_go_together_except_in_reporting_and_streams() {
        for path in ["/dsp/v1/guidance/campaigns/list", "/keywords/localize", "/sp/global/targets/keywords/x"] {
            let both = ["amazon-ads-accountid: theirs", "amazon-advertising-api-scope: 1"];
            let lines = seen(path, &[("amazon-ads-accountid", "theirs")], ALL);
            assert!(both.iter().all(|line| lines.contains(&(*line).to_owned())), "{path}: {lines:?}");
        }
        for path in ["/reporting/reports", "/streams/subscriptions"] {
            let lines = seen(path, &[("amazon-ads-accountid", "theirs")], ALL);
            assert_eq!(lines, ["amazon-ads-accountid: theirs"], "{path}");
            assert_eq!(seen(path, &[], ALL), ["amazon-advertising-api-scope: 1"], "{path}");
        }
    }

    #[test]
    fn only_the_caller_chooses_the_account_of_a_frequency_group() {
        let scope = "amazon-advertising-api-scope: 1";
        assert_eq!(seen("/frequencyGroups/v1/list", &[], ALL), [scope]);
        let chosen = seen("/frequencyGroups/v1/list", &[("amazon-ads-accountid", "theirs")], ALL);
        assert_eq!(chosen, ["amazon-ads-accountid: theirs", scope]);
    }

    #[test]
    fn amc_custom_models_get_the_amc_account_unless_the_caller_names_one() {
        assert_eq!(seen("/amc/models/v1/trainedModels", &[], ALL), ["amazon-ads-accountid: ENTITYA"]);
        let theirs = seen("/amc/models/v1/trainedModels", &[("amazon-ads-accountid", "theirs")], ALL);
        assert_eq!(theirs, ["amazon-ads-accountid: theirs"]);
    }

    #[test]
    fn another_spelling_of_the_same_id_counts_as_sent() {
        assert_eq!(
            seen("/dsp/streams/subscriptions", &[("amazon-advertising-api-account-id", "theirs")], ALL),
            ["amazon-advertising-api-account-id: theirs"]
        );
    }

    #[test]
    fn each_family_gets_its_own_headers() {
        let cases: &[(&str, &[&str])] = &[
            ("/v2/profiles", &[]),
            ("/sp/campaigns/list", &["amazon-advertising-api-scope: 1"]),
            ("/dsp/streams/subscriptions", &["amazon-ads-account-id: ACC"]),
            (
                "/amc/reporting/amc1/workflows",
                &[
                    "amazon-advertising-api-advertiserid: ENTITYA",
                    "amazon-advertising-api-marketplaceid: M",
                    "amazon-advertising-api-scope: 1",
                ],
            ),
            (
                "/amc/audiences/query",
                &["amazon-advertising-api-entityid: ENTITYE", "amazon-marketing-cloud-audience-instanceid: amc1"],
            ),
            ("/mmm/v1/x", &["amazon-advertising-api-manager-account: MGR"]),
            ("/adm/datarooms", &["amazon-ads-accountid: ACC", "amazon-ads-manager-account-id: MGR"]),
            ("/no/such/family", &["amazon-advertising-api-scope: 1"]),
        ];
        for (path, expected) in cases {
            assert_eq!(&seen(path, &[], ALL), expected, "{path}");
        }
    }

    #[test]
    fn without_the_accounts_ids_none_is_attached() {
        let out = to_amazon(
            &HeaderMap::new(),
            UpstreamHeaders {
                family: family("/sp/x"),
                bearer: &HeaderValue::from_static("Bearer x"),
                client_id: &HeaderValue::from_static("c"),
                ids: None,
                fixed: &[(HeaderName::from_static("x-fixed"), HeaderValue::from_static("1"))],
            },
        );
        assert_eq!(out.len(), 3, "{out:?}");
        assert_eq!(out["x-fixed"], "1");
    }

    #[test]
    fn content_length_beside_chunked_is_not_forwarded() {
        let framed = [("content-length", "3"), ("transfer-encoding", "chunked")];
        assert!(!full("/x", &framed, &[]).contains_key(CONTENT_LENGTH));
        assert_eq!(full("/x", &[("content-length", "3")], &[])[CONTENT_LENGTH], "3");
    }

    proptest! {
        /// Whatever the caller sends, the upstream request has one `Authorization` and one client id: ours.
        #[test]
        fn each_managed_header_has_exactly_one_value(
            spelled in proptest::collection::vec((0usize..6, any::<u32>(), any::<bool>()), 0..12)
        ) {
            let managed = ["authorization", "amazon-ads-clientid", "amazon-advertising-api-clientid", "host",
                "x-ads-user", "proxy-authorization"];
            let mut caller = HeaderMap::new();
            for (which, mask, underscore) in spelled {
                let name: String = managed[which].chars().enumerate().map(|(i, c)| match c {
                    '-' if underscore => '_',
                    c if mask >> (i % 32) & 1 == 1 => c.to_ascii_uppercase(),
                    c => c,
                }).collect();
                caller.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_static("theirs"));
            }
            let out = to_amazon(&caller, UpstreamHeaders {
                family: family("/v2/profiles"),
                bearer: &HeaderValue::from_static("ours"),
                client_id: &HeaderValue::from_static("ours"),
                ids: None,
                fixed: &[],
            });
            prop_assert_eq!(out.len(), 2);
            prop_assert!(out.values().all(|value| value == "ours"));
        }
    }
}
