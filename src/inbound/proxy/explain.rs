//! Explains what adsidecar would do with a request, and why, without sending it: `adsidecar explain`.
//!
//! The headers are made by the code that makes those of real requests; the reasons are found by comparing the result
//! with its inputs.
//!
//! The file is a little over 400 lines: it says everything that is known of a request, in one place.

use http::header::{AUTHORIZATION, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use serde::Serialize;
use url::Url;

use super::Settings;
use crate::auth::accounts::Snapshot;
use crate::domain::account::{Account, AmazonHost, Context};
use crate::domain::found_account::{AccountType, doubtful_id};
use crate::domain::headers::{UpstreamHeaders, to_amazon};
use crate::domain::outgoing_proxy::OutgoingProxy;
use crate::domain::policy::{Denied, Mode};
use crate::inbound::admission;
use crate::inbound::destination::{BadTarget, Destination, Endpoint, Route, Target};
use crate::inbound::route::{Accounts, Found, RouteError, RoutedRequest, Selection};
use crate::throttle;

/// What adsidecar would do with a request.
#[derive(Debug, Serialize)]
#[serde(tag = "served_by", rename_all = "lowercase")]
pub enum Explanation {
    /// adsidecar answers it itself; nothing is sent to Amazon.
    Adsidecar {
        /// Which of its endpoints.
        why: String,
    },
    /// It is sent to Amazon, if the policy allows it.
    Amazon(Box<Forwarded>),
}

/// A request that is sent to Amazon.
#[derive(Debug, Serialize)]
pub struct Forwarded {
    /// The method.
    pub method: String,
    /// The URL that is requested.
    pub url: String,
    /// The outgoing proxy through which it is reached, and the key that names it; `None` without one.
    pub through: Option<String>,
    /// `na`, `eu` or `fe`.
    pub region: &'static str,
    /// Why this region.
    pub region_why: String,
    /// The account; `None` if the request has none.
    pub account: Option<String>,
    /// The user whose grant authorizes the request.
    pub user: String,
    /// Why this account and user.
    pub selected_by: String,
    /// The API family of the path.
    pub family: &'static str,
    /// The headers that Amazon receives, those about the body excepted.
    pub headers: Vec<Line>,
    /// Headers of the caller that are not sent, and ids of the account that are not attached.
    pub left_out: Vec<Line>,
    /// What the policy says.
    pub policy: PolicyVerdict,
    /// Which limit of Amazon's the request counts against.
    pub throttle: ThrottleBucket,
    /// What may be wrong. Nothing here blocks a request.
    pub hints: Vec<String>,
}

/// One header and the reason for it.
#[derive(Debug, Serialize)]
pub struct Line {
    /// The header, or the key of an id.
    pub name: String,
    /// Its value; `…` for a secret one.
    pub value: String,
    /// Why it is sent, or not.
    pub why: String,
}

/// What the policy says about a request.
#[derive(Debug, Serialize)]
pub struct PolicyVerdict {
    /// Whether the request is sent.
    pub allowed: bool,
    /// `policy.mode`.
    pub mode: &'static str,
    /// Why.
    pub why: String,
}

/// The requests that share a limit, and what the throttle does about it.
#[derive(Debug, Serialize)]
pub struct ThrottleBucket {
    /// Region, API family and kind of call.
    pub bucket: String,
    /// The mode that applies: that of the account, of the family, or `throttle.mode`.
    pub mode: &'static str,
}

/// What [`explain`] needs beside the request.
#[derive(Debug)]
pub struct Explained<'a> {
    /// The settings of the proxy listener.
    pub settings: &'a Settings,
    /// `upstream.na`, …, `upstream.mcp_fe`.
    pub origins: &'a [Url; AmazonHost::ALL.len()],
    /// `upstream.proxy`.
    pub outgoing_proxy: Option<&'a OutgoingProxy>,
    /// `[throttle]`.
    pub throttle: &'a throttle::Settings,
    /// The accounts that were found.
    pub found: &'a Snapshot,
}

/// Explains a request with these headers. `uri` is a path, or a URL as a client behind `HTTP_PROXY` sends it.
///
/// # Errors
/// A sentence that says why adsidecar would refuse the request before it selects anything.
pub fn explain(what: &Explained<'_>, method: &Method, uri: &Uri, caller: &HeaderMap) -> Result<Explanation, String> {
    let is_own = |authority: &str| {
        let name = authority.rsplit_once(':').map_or(authority, |(name, _)| name);
        ["localhost", "127.0.0.1", "[::1]"].contains(&name.to_ascii_lowercase().as_str())
    };
    if admission::method(method).is_err() {
        return Err(format!("{method} is no method that it serves; methods are upper-case (405 method_not_allowed)"));
    }
    let target = match Route::read(method, uri, None, is_own).map_err(no_target)? {
        Route::Own(endpoint) => return Ok(Explanation::Adsidecar { why: own(endpoint) }),
        Route::Upstream(target) => target,
    };
    let settings = what.settings.clone();
    let (mode, selection, default_region) = (settings.policy.mode, settings.selection, settings.region);
    let accounts = Accounts::new(settings.accounts, default_region, selection, settings.policy.rules);
    let other = accounts.other_name(&target, caller).and_then(|slug| what.found.get(slug));
    let other = other.map(|entry| Found { account: &entry.account, is_named: true });
    let call = accounts.select(&target, caller, other).map_err(|error| no_route(error).to_owned())?;
    let selected_by = selected_by(&call, &target, caller, selection);
    let configured = what.settings.accounts.iter().find(|account| *account.name == *call.account_name());
    let account = configured.or_else(|| what.found.get(call.account_name()).map(|entry| &entry.account));
    let region_why = match (&target.of, caller.get("x-ads-region")) {
        (Destination::Amazon(_), _) => "the host of the URL".to_owned(),
        (_, Some(_)) if selection == Selection::Header => "the header X-Ads-Region".to_owned(),
        _ if account.is_some_and(|account| account.region.is_some()) => "the account's region".to_owned(),
        _ => "amazon.region".to_owned(),
    };
    let origin = &what.origins[call.host().index()];
    let url = format!("{}{}", origin.as_str().trim_end_matches('/'), target.path_and_query);
    let host = origin.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let through = what.outgoing_proxy.filter(|proxy| proxy.is_for(host)).map(ToString::to_string);
    let sent = upstream_headers(what, &call, origin, caller);
    let headers = lines(&sent, &call, account, caller);
    let left_out = left_out(&sent, &call, account, caller);
    let policy = verdict(
        call.rules.check(method, target.path(), target.path_and_query.query(), caller),
        mode,
        call.rules.is_empty(),
    );
    let mut hints = hints(&call, account);
    hints.extend(account.into_iter().flat_map(|account| lint(account, &call, what)));
    Ok(Explanation::Amazon(Box::new(Forwarded {
        method: method.to_string(),
        url,
        through,
        region: call.region.as_str(),
        region_why,
        account: Some(call.account_name().to_owned()).filter(|name| !name.is_empty()),
        user: call.user.to_string(),
        selected_by,
        family: call.family.name,
        headers,
        left_out,
        policy,
        throttle: bucket(what, &call, method, target.path()),
        hints,
    })))
}

fn own(endpoint: Endpoint) -> String {
    match endpoint {
        Endpoint::Unknown => "the path is one of adsidecar's own, and has no endpoint: 404 not_found".to_owned(),
        Endpoint::StrayCallback => "the end of a login at a path that is not adsidecar's: 404 not_found".to_owned(),
        endpoint => format!("the endpoint {endpoint:?}, with {}; see config/README.md", endpoint.allow()),
    }
}

fn no_target(error: BadTarget) -> String {
    match error {
        BadTarget::Form(why) => format!("{why} (400 bad_request)"),
        BadTarget::Foreign => "adsidecar proxies to the Amazon Ads hosts only (403 host_not_allowed)".to_owned(),
        BadTarget::TooLong => "the target is longer than 8 KiB (414 uri_too_long)".to_owned(),
    }
}

fn no_route(error: RouteError) -> &'static str {
    match error {
        RouteError::Unknown => {
            "no account has this name (404 unknown_account): adsidecar accounts list shows the names"
        }
        RouteError::Bad(why) => why,
        RouteError::UnknownHeader(_) => {
            "a header begins with X-Ads- and is none of X-Ads-Account, X-Ads-User, X-Ads-Region and \
             X-Ads-Sidecar-Token (400 bad_request)"
        }
    }
}

fn selected_by(call: &RoutedRequest<'_>, target: &Target, caller: &HeaderMap, selection: Selection) -> String {
    let name = call.account_name();
    if selection == Selection::Fixed {
        return "proxy.selection = \"fixed\": whatever the caller says".to_owned();
    }
    if target.account.is_some() {
        return "the prefix of the path".to_owned();
    }
    for header in ["X-Ads-Account", "X-Ads-User"] {
        if caller.contains_key(header) {
            return format!("the header {header}");
        }
    }
    match name {
        "default" => "the account named default, as nothing else is selected".to_owned(),
        "" => "nothing selects an account or user, so the user default".to_owned(),
        _ => "the only account of the configuration, as nothing else is selected".to_owned(),
    }
}

fn upstream_headers(what: &Explained<'_>, call: &RoutedRequest<'_>, origin: &Url, caller: &HeaderMap) -> HeaderMap {
    let client_id = HeaderValue::from_str(&what.settings.client_id).unwrap_or(HeaderValue::from_static("-"));
    let mut headers = to_amazon(
        caller,
        UpstreamHeaders {
            family: call.family,
            bearer: &HeaderValue::from_static("Bearer"),
            client_id: &client_id,
            ids: call.ids(),
            fixed: call.fixed_headers(),
        },
    );
    let host = origin.as_str().trim_start_matches("https://").trim_end_matches('/');
    headers.extend(HeaderValue::from_str(host).map(|host| (HOST, host)));
    headers
}

fn lines(sent: &HeaderMap, call: &RoutedRequest<'_>, account: Option<&Account>, caller: &HeaderMap) -> Vec<Line> {
    let is_client_id = |name: &HeaderName| name.as_str().ends_with("clientid");
    let line = |(name, value): (&HeaderName, &HeaderValue)| {
        let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
        let family = call.family.name;
        let (value, why) = if *name == AUTHORIZATION {
            ("Bearer …".to_owned(), format!("the access token of the user {}", call.user))
        } else if *name == HOST {
            (text, format!("the host of the region {}", call.region))
        } else if is_client_id(name) {
            let spelling = if call.family.is_unknown() { "no known family" } else { family };
            (text, format!("amazon.client_id, in the spelling of {spelling}"))
        } else if call.fixed_headers().iter().any(|(fixed, _)| fixed == name) {
            ("…".to_owned(), format!("headers of the account {}", call.account_name()))
        } else if let Some(context) = attached(call, account, name, value, caller) {
            (text, format!("{} of the account {}, which {family} takes", context.key(), call.account_name()))
        } else {
            (text, "sent by the caller".to_owned())
        };
        Line { name: name.to_string(), value, why }
    };
    let mut lines: Vec<_> = sent.iter().map(line).collect();
    lines.sort_by(|one, other| one.name.cmp(&other.name));
    lines
}

/// The context whose id of the account the header holds; `None` if the caller sent it.
fn attached(
    call: &RoutedRequest<'_>,
    account: Option<&Account>,
    name: &HeaderName,
    value: &HeaderValue,
    caller: &HeaderMap,
) -> Option<Context> {
    let by_caller = caller.get(name).is_some_and(|theirs| !theirs.as_bytes().trim_ascii().is_empty());
    let header = call.family.context.iter().find(|header| header.name() == *name).filter(|_| !by_caller)?;
    account.filter(|account| account.ids.get(header.context()) == Some(value)).map(|_| header.context())
}

/// What the caller sent and Amazon does not get, and which ids of the account are not attached.
fn left_out(sent: &HeaderMap, call: &RoutedRequest<'_>, account: Option<&Account>, caller: &HeaderMap) -> Vec<Line> {
    let dropped = caller.keys().filter(|name| !sent.contains_key(*name) || **name == AUTHORIZATION);
    let mut lines: Vec<_> = dropped
        .map(|name| {
            let why = match name.as_str() {
                "authorization" => "replaced: the access token is always adsidecar's",
                name if name.starts_with("x-ads-") => "selects; it never leaves adsidecar",
                _ if caller[name].as_bytes().trim_ascii().is_empty() => "empty: counts as not sent",
                name if name.ends_with("clientid") => "replaced by amazon.client_id in the family's spelling",
                _ => "about the connection, of a browser, or managed by adsidecar: never forwarded",
            };
            Line { name: name.to_string(), value: "…".into(), why: why.to_owned() }
        })
        .collect();
    let Some(account) = account else { return lines };
    for context in Context::ALL {
        let Some(id) = account.ids.get(context) else { continue };
        let takes = call.family.context.iter().find(|header| header.context() == context);
        let why = match takes {
            _ if call.ids().is_none() => {
                format!("the request goes to {}, not to the account's own region", call.region)
            }
            None => format!("{} takes no such id", call.family.name),
            Some(header) if sent.get(header.name()) == Some(id) => continue,
            Some(header) if sent.contains_key(header.name()) => "the caller sent another one".to_owned(),
            Some(_) => "another id of the request excludes it".to_owned(),
        };
        let value = id.to_str().unwrap_or_default().to_owned();
        lines.push(Line { name: context.key().to_owned(), value, why });
    }
    lines
}

fn bucket(what: &Explained<'_>, call: &RoutedRequest<'_>, method: &Method, path: &str) -> ThrottleBucket {
    let bucket = throttle::Call::new(call.region, call.family, method, path, "").bucket().to_string();
    let of_family = what.throttle.families.iter().find(|own| own.family == call.family.name);
    let mode = call.throttle().unwrap_or_else(|| of_family.map_or(what.throttle.mode, |own| own.mode));
    ThrottleBucket { bucket, mode: mode.as_str() }
}

fn verdict(checked: Result<(), Denied>, mode: Mode, no_rules: bool) -> PolicyVerdict {
    let why = match checked {
        Ok(()) if no_rules => "there are no rules: policy.read_only is false, policy.allow is empty",
        Ok(()) => "it satisfies every rule",
        Err(Denied::Ambiguous) => "servers may read the path or method in two ways, so no rule applies",
        Err(Denied::Form) => "its body is a form, which could override the method",
        Err(Denied::Changes) => "it may change something, and the policy is read-only (read_only)",
        Err(Denied::NotAllowed) => "no entry of the allow list (allow) matches it",
    };
    let allowed = checked.is_ok() || mode == Mode::Observe;
    let note = if checked.is_err() && allowed { "; policy.mode = \"observe\" counts it and lets it pass" } else { "" };
    PolicyVerdict { allowed, mode: mode.as_str(), why: format!("{why}{note}") }
}

fn hints(call: &RoutedRequest<'_>, account: Option<&Account>) -> Vec<String> {
    let mut hints = Vec::new();
    if call.hint().is_some() {
        hints.push(format!(
            "the account {} belongs to another region, so none of its ids is attached (region_mismatch): leave \
             X-Ads-Region out, or select an account of the region {}",
            call.account_name(),
            call.region
        ));
    }
    if call.family.is_unknown() {
        hints.push("adsidecar knows no API family with this path: it attaches the profile id and nothing else".into());
    }
    let known = |context| account.is_some_and(|account| account.ids.get(context).is_some());
    let exclusive = |context| {
        call.family
            .exclusive
            .is_some_and(|(one, other)| (context == one && known(other)) || (context == other && known(one)))
    };
    let missing = call.family.context.iter().map(|header| header.context());
    let missing: Vec<_> =
        missing.filter(|context| !known(*context) && !exclusive(*context)).map(Context::key).collect();
    if !missing.is_empty() && call.ids().is_some() == account.is_some() {
        let whose = account.map_or("no account is selected".to_owned(), |account| {
            format!("the account {} does not define them", account.name)
        });
        hints.push(format!("{} also takes {}, and {whose}", call.family.name, missing.join(", ")));
    }
    hints
}

/// What is probably wrong with the ids of an account, by their form and by what was found at Amazon. Never a reason to
/// refuse a request.
fn lint(account: &Account, call: &RoutedRequest<'_>, what: &Explained<'_>) -> Vec<String> {
    let name = &account.name;
    let id = |account: &Account, context: Context| {
        account.ids.get(context).and_then(|id| id.to_str().ok()).map(str::to_owned)
    };
    let mut hints = Vec::new();
    for context in Context::ALL {
        let doubt = id(account, context).and_then(|id| doubtful_id(context, &id));
        hints.extend(
            doubt.map(|doubt| {
                format!("{} of the account {name} is probably another kind of id: {doubt}", context.key())
            }),
        );
    }
    let Some(profile) = id(account, Context::Scope) else { return hints };
    let found = what.found.entries().filter(|entry| entry.found.kind.is_profile());
    let found = found.into_iter().find(|entry| id(&entry.account, Context::Scope).as_ref() == Some(&profile));
    let Some(found) = found.map(|entry| &entry.found) else { return hints };
    let home = account.region.unwrap_or(what.settings.region);
    if found.region != home {
        hints.push(format!(
            "the profile {profile} belongs to the region {}, and the account {name} to {home}: set region = \"{}\"",
            found.region, found.region
        ));
    }
    let needs_campaigns = !matches!(call.family.name, "profiles" | "accounts") && !call.family.name.starts_with("dsp");
    if found.kind == AccountType::Agency && needs_campaigns {
        hints.push(format!(
            "the profile {profile} is an agency's, which has no campaigns: {} needs the profile of an advertiser \
             (adsidecar accounts list)",
            call.family.name
        ));
    }
    hints
}
