//! Who may come in: framing, method, `Host`, browsers, the caller token. All before a byte of the body is read.
//!
//! The open local port is the asset. A web page cannot drive it: a page on another name fails at `Host` (DNS rebinding),
//! a page anywhere fails at `Origin` and `Sec-Fetch-Site`.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::{
    ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, HOST, HeaderMap, HeaderName, ORIGIN, PROXY_AUTHORIZATION,
    TRANSFER_ENCODING,
};
use http::request::Parts;
use http::{HeaderValue, Method};

use crate::domain::secret::Secret;
use crate::inbound::destination::{BadTarget, Target, amazon_host};
use crate::server::Peer;

/// What the doors accept.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `proxy.allowed_hosts`: beside the loopback names; lower case, without a port.
    pub allowed_hosts: Vec<String>,
    /// `proxy.caller_token`: where not empty, each caller has to know one of them.
    pub caller_tokens: Vec<Secret>,
    /// The origin of `login.frontend_url`, such as `https://app.example.com`: the one web origin that may `fetch` the
    /// OAuth endpoints.
    pub frontend_origin: Option<String>,
    /// `proxy.peer_uids`: where not empty, a caller at a Unix socket has to run as one of these users.
    pub peer_uids: Vec<u32>,
}

/// Carries the caller token, for callers that can set a header.
pub const CALLER_TOKEN: HeaderName = HeaderName::from_static("x-ads-sidecar-token");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The guard of all doors.
#[derive(Clone, Debug)]
pub struct Admission(Settings);

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Framing that can be read in two ways; the connection has to be closed.
    Framing,
    /// No `Host`, or more than one.
    NoHost,
    /// `Host` is none of ours.
    Host,
    /// The target cannot be served.
    Target(BadTarget),
    /// `CONNECT`, `TRACE`, or a method nobody knows.
    Method,
    /// A web page is at the other end.
    CrossSite,
    /// The caller token is missing or wrong.
    Caller,
    /// The process at the other end of a Unix socket runs as another user.
    Peer,
}

impl Refusal {
    /// The metric's label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Framing => "framing",
            Self::NoHost => "no_host",
            Self::Host => "host",
            Self::Target(_) => "target",
            Self::Method => "method",
            Self::CrossSite => "cross_site",
            Self::Caller => "caller_token",
            Self::Peer => "peer_uid",
        }
    }
}

impl Admission {
    /// A guard with these rules.
    pub fn new(settings: Settings) -> Self {
        Self(settings)
    }

    /// What holds at every door and for every request: sound framing, a known method, a `Host` that is ours (or, with
    /// the absolute form, Amazon's), a target that can be served.
    pub fn admit(&self, request: &Parts, peer: Peer) -> Result<Target, Refusal> {
        framing(&request.headers)?;
        method(&request.method)?;
        self.host(request, peer)?;
        Target::read(&request.uri, |authority| self.is_own_host(authority)).map_err(Refusal::Target)
    }

    /// What holds even for who may come under any `Host`: sound framing.
    pub fn admit_any_host(&self, request: &Parts) -> Result<(), Refusal> {
        framing(&request.headers)
    }

    /// Asks as whom the process at the other end of a Unix socket runs, where that is limited.
    pub fn peer(&self, peer: Peer) -> Result<(), Refusal> {
        match peer {
            Peer::Unix(uid) if !self.0.peer_uids.is_empty() => {
                let known = uid.is_some_and(|uid| self.0.peer_uids.contains(&uid));
                if known { Ok(()) } else { Err(Refusal::Peer) }
            }
            _ => Ok(()),
        }
    }

    /// Refuses browsers, and the question that one asks before it lets a page of another origin send something (CORS): no
    /// web page drives this door.
    pub fn no_browser(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let signs = [ORIGIN, SEC_FETCH_SITE, ACCESS_CONTROL_REQUEST_METHOD];
        let browser = signs.iter().any(|sign| headers.contains_key(sign));
        if browser { Err(Refusal::CrossSite) } else { Ok(()) }
    }

    /// Lets through who is no browser, a page of the frontend's origin, and where `navigable` says so a browser that
    /// was sent here. Returns the origin to answer with CORS headers.
    pub fn browser(&self, headers: &HeaderMap, navigable: Navigable) -> Result<Option<HeaderValue>, Refusal> {
        if let Some(origin) = headers.get(ORIGIN) {
            let allowed = self.0.frontend_origin.as_ref().filter(|_| self.0.caller_tokens.is_empty());
            return match allowed {
                Some(allowed) if origin == allowed.as_str() => Ok(Some(origin.clone())),
                _ => Err(Refusal::CrossSite),
            };
        }
        let site = headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes);
        let allowed = match site {
            None | Some(b"none" | b"same-origin") => true,
            Some(b"same-site") => navigable != Navigable::Never,
            Some(_) => navigable == Navigable::FromAnywhere,
        };
        if allowed { Ok(None) } else { Err(Refusal::CrossSite) }
    }

    /// Asks for the caller token, where one is set.
    pub fn caller(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let passes = self.0.caller_tokens.is_empty() || self.shown(headers).is_some();
        if passes { Ok(()) } else { Err(Refusal::Caller) }
    }

    /// The caller token that the headers show, if they show one of ours.
    pub fn shown(&self, headers: &HeaderMap) -> Option<Vec<u8>> {
        presented(headers).find(|token| self.knows(token))
    }

    /// Whether `token` is a caller token. Each of them is compared, in constant time.
    pub fn knows(&self, token: &[u8]) -> bool {
        self.0.caller_tokens.iter().fold(false, |known, secret| known | secret.matches(token))
    }

    /// Whether callers need a token at all.
    pub fn asks_for_token(&self) -> bool {
        !self.0.caller_tokens.is_empty()
    }

    /// Whether the peer is on this machine and says so: an exact loopback address and a loopback `Host`.
    pub fn is_local(&self, headers: &HeaderMap, peer: Peer) -> bool {
        let Peer::Tcp(address) = peer else { return true };
        let exact = [std::net::Ipv4Addr::LOCALHOST.into(), std::net::IpAddr::from(std::net::Ipv6Addr::LOCALHOST)];
        exact.contains(&address.ip()) && host_value(headers).ok().and_then(without_port).is_some_and(is_loopback)
    }

    /// The authority under which the caller reached us, for links in answers; `None` where it named Amazon.
    pub fn own_authority<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        host_value(headers).ok().filter(|host| self.is_own_host(host))
    }

    fn host(&self, request: &Parts, peer: Peer) -> Result<(), Refusal> {
        if let Peer::Unix(_) = peer {
            return Ok(());
        }
        let host = host_value(&request.headers)?;
        let amazon = || {
            let name = host.strip_suffix(":80").or_else(|| host.strip_suffix(":443")).unwrap_or(host);
            request.uri.authority().is_some() && amazon_host(name).is_some()
        };
        if self.is_own_host(host) || amazon() { Ok(()) } else { Err(Refusal::Host) }
    }

    fn is_own_host(&self, authority: &str) -> bool {
        without_port(authority).is_some_and(|name| {
            is_loopback(name) || self.0.allowed_hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
        })
    }
}

/// From where a browser may be sent to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Navigable {
    /// From nowhere: it changes something.
    Never,
    /// From a page of the same site, such as the frontend on another port of localhost.
    FromSite,
    /// From anywhere: Amazon sends browsers here.
    FromAnywhere,
}

/// Exactly one `Transfer-Encoding`, and that is `chunked` (RFC 9112, section 6.1). hyper has refused the rest.
fn framing(headers: &HeaderMap) -> Result<(), Refusal> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(only), None) if only.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(Refusal::Framing),
    }
}

fn method(method: &Method) -> Result<(), Refusal> {
    match *method {
        Method::GET | Method::HEAD | Method::POST | Method::PUT | Method::PATCH | Method::DELETE | Method::OPTIONS => {
            Ok(())
        }
        _ => Err(Refusal::Method),
    }
}

fn host_value(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if !host.is_empty() => host.to_str().map_err(|_| Refusal::Host),
        _ => Err(Refusal::NoHost),
    }
}

/// `localhost` in any letter case, `127.0.0.1`, `[::1]`; no other spelling.
fn is_loopback(name: &str) -> bool {
    name.eq_ignore_ascii_case("localhost") || name == "127.0.0.1" || name == "[::1]"
}

/// The host of `host` or `host:port`; `None` where what follows the colon is no port.
fn without_port(authority: &str) -> Option<&str> {
    let colon = match authority.rfind(']') {
        Some(bracket) => authority[bracket..].find(':').map(|at| bracket + at),
        None => authority.find(':'),
    };
    match colon {
        None => Some(authority),
        Some(at) => {
            let port = &authority[at + 1..];
            let legal = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok();
            legal.then(|| &authority[..at])
        }
    }
}

/// Every token that the caller shows, in whatever way it can.
fn presented(headers: &HeaderMap) -> impl Iterator<Item = Vec<u8>> {
    let own = headers.get_all(CALLER_TOKEN).iter().map(|value| value.as_bytes().to_vec());
    let schemes = [PROXY_AUTHORIZATION, AUTHORIZATION]
        .into_iter()
        .flat_map(|name| headers.get_all(&name).iter().filter_map(credential).collect::<Vec<_>>());
    own.chain(schemes)
}

/// The token of `Bearer <token>`, or the password of `Basic <credentials>` (RFC 7617).
fn credential(value: &HeaderValue) -> Option<Vec<u8>> {
    let (scheme, rest) = value.to_str().ok()?.split_once(' ')?;
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.as_bytes().to_vec());
    }
    let pair = scheme.eq_ignore_ascii_case("basic").then(|| BASE64_STANDARD.decode(rest).ok()).flatten()?;
    let colon = pair.iter().position(|byte| *byte == b':')?;
    Some(pair[colon + 1..].to_vec())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use http::Request;

    use super::*;

    fn tcp() -> Peer {
        Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 9)))
    }

    fn guard() -> Admission {
        Admission::new(Settings {
            allowed_hosts: vec!["ads.internal".into()],
            caller_tokens: Vec::new(),
            frontend_origin: Some("https://app.example.com".into()),
            peer_uids: vec![1000, 1001],
        })
    }

    fn parts(target: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::get(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn host(value: &str) -> Result<Target, Refusal> {
        guard().admit(&parts("/x", &[("host", value)]), tcp())
    }

    #[test]
    fn no_other_spelling_of_loopback_passes() {
        for evil in [
            "evil.test",
            "evil.test:8001",
            "localhost.",
            "localhost.:8001",
            "127.1",
            "127.0.0.2",
            "0x7f.1",
            "2130706433",
            "[::ffff:127.0.0.1]",
            "::1",
            "[::1",
            "localhost:80@evil",
            "evil#localhost",
            "localhost:",
            "localhost:x",
            "localhost:99999",
            "localhost:8001:1",
            "localhost evil",
            "http://localhost",
            "advertising-api.amazon.com",
            "ads.internal.evil.test",
            "0.0.0.0",
            "[0:0:0:0:0:0:0:1]",
            "localhost/",
            "user@localhost",
            "%6cocalhost",
        ] {
            assert_eq!(host(evil), Err(Refusal::Host), "{evil}");
        }
        for fine in [
            "localhost",
            "LOCALHOST:8001",
            "localhost:1",
            "127.0.0.1",
            "127.0.0.1:8001",
            "[::1]",
            "[::1]:8001",
            "ads.internal",
            "ADS.internal:80",
        ] {
            assert!(host(fine).is_ok(), "{fine}");
        }
    }

    #[test]
    fn one_host_and_no_more() {
        assert_eq!(guard().admit(&parts("/", &[]), tcp()), Err(Refusal::NoHost));
        assert_eq!(host(""), Err(Refusal::NoHost));
        assert_eq!(
            guard().admit(&parts("/", &[("host", "localhost"), ("host", "localhost")]), tcp()),
            Err(Refusal::NoHost)
        );
        assert!(guard().admit(&parts("/", &[]), Peer::Unix(None)).is_ok());
    }

    #[test]
    fn at_a_unix_socket_another_user_is_refused() {
        for other in [Peer::Unix(Some(0)), Peer::Unix(Some(1002)), Peer::Unix(None)] {
            assert_eq!(guard().peer(other), Err(Refusal::Peer), "{other:?}");
        }
        for fine in [Peer::Unix(Some(1000)), Peer::Unix(Some(1001)), tcp()] {
            assert_eq!(guard().peer(fine), Ok(()), "{fine:?}");
        }
        assert_eq!(Admission::new(Settings::default()).peer(Peer::Unix(None)), Ok(()), "nobody limits it");
    }

    #[test]
    fn amazons_host_passes_with_the_absolute_form_alone() {
        let amazon = [("host", "advertising-api-eu.amazon.com")];
        assert_eq!(guard().admit(&parts("/v2/profiles", &amazon), tcp()), Err(Refusal::Host));
        assert!(guard().admit(&parts("http://advertising-api-eu.amazon.com/v2/profiles", &amazon), tcp()).is_ok());
        let foreign = parts("http://evil.test/", &[("host", "localhost")]);
        assert_eq!(guard().admit(&foreign, tcp()), Err(Refusal::Target(BadTarget::Foreign)));
    }

    #[test]
    fn framing_that_can_be_read_in_two_ways_is_refused() {
        for codings in [
            &["gzip, chunked"][..],
            &[",chunked"],
            &["chunked, chunked"],
            &["chunked", "chunked"],
            &["identity"],
            &[""],
        ] {
            let mut headers = vec![("host", "localhost")];
            headers.extend(codings.iter().map(|coding| ("transfer-encoding", *coding)));
            assert_eq!(guard().admit(&parts("/", &headers), tcp()), Err(Refusal::Framing), "{codings:?}");
        }
        let chunked = [("host", "localhost"), ("transfer-encoding", "Chunked")];
        assert!(guard().admit(&parts("/", &chunked), tcp()).is_ok());
    }

    #[test]
    fn methods_that_tunnel_or_echo_are_refused() {
        for name in ["TRACE", "get", "PROPFIND"] {
            let mut parts = parts("/", &[("host", "localhost")]);
            parts.method = name.parse().unwrap();
            assert_eq!(guard().admit(&parts, tcp()), Err(Refusal::Method), "{name}");
        }
    }

    #[test]
    fn no_web_page_drives_the_proxy() {
        for headers in [
            &[("origin", "null")][..],
            &[("origin", "https://app.example.com")],
            &[("sec-fetch-site", "none")],
            &[("sec-fetch-site", "same-origin")],
            &[("access-control-request-method", "POST")],
        ] {
            assert_eq!(guard().no_browser(&parts("/", headers).headers), Err(Refusal::CrossSite), "{headers:?}");
        }
        // Node's fetch() sends this one alone.
        assert_eq!(guard().no_browser(&parts("/", &[("sec-fetch-mode", "cors")]).headers), Ok(()));
    }

    #[test]
    fn only_the_frontends_origin_may_fetch_the_oauth_endpoints() {
        let browser = |headers: &[(&str, &str)], navigable| guard().browser(&parts("/", headers).headers, navigable);
        for evil in ["null", "https://evil.test", "https://app.example.com.evil.test", "http://app.example.com"] {
            assert_eq!(browser(&[("origin", evil)], Navigable::FromAnywhere), Err(Refusal::CrossSite), "{evil}");
        }
        let origin = HeaderValue::from_static("https://app.example.com");
        assert_eq!(browser(&[("origin", "https://app.example.com")], Navigable::Never), Ok(Some(origin)));
        assert_eq!(browser(&[("sec-fetch-site", "cross-site")], Navigable::FromSite), Err(Refusal::CrossSite));
        assert_eq!(browser(&[("sec-fetch-site", "same-site")], Navigable::Never), Err(Refusal::CrossSite));
        assert_eq!(browser(&[("sec-fetch-site", "same-site")], Navigable::FromSite), Ok(None));
        assert_eq!(browser(&[("sec-fetch-site", "cross-site")], Navigable::FromAnywhere), Ok(None));
        assert_eq!(browser(&[], Navigable::Never), Ok(None));
    }

    #[test]
    fn the_caller_token_is_taken_in_four_ways_and_no_other() {
        let guard = Admission::new(Settings {
            caller_tokens: vec![Secret::new("one"), Secret::new("two")],
            ..Settings::default()
        });
        let ask = |headers: &[(&str, &str)]| guard.caller(&parts("/", headers).headers);
        let basic = format!("Basic {}", BASE64_STANDARD.encode("ads:two"));
        for bad in [
            &[][..],
            &[("x-ads-sidecar-token", "three")],
            &[("authorization", "one")],
            &[("proxy-authorization", "Bearer on")],
            &[("authorization", "Basic b25l")],
        ] {
            assert_eq!(ask(bad), Err(Refusal::Caller), "{bad:?}");
        }
        for good in [
            &[("x-ads-sidecar-token", "one")][..],
            &[("proxy-authorization", "Bearer two")],
            &[("proxy-authorization", basic.as_str())],
            &[("authorization", "bearer one")],
        ] {
            assert_eq!(ask(good), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn a_caller_token_is_known_shown_and_asked_for_only_where_it_is_one() {
        let none = Admission::new(Settings::default());
        assert!(!none.asks_for_token() && !none.knows(b"") && !none.knows(b"one"));
        let tokens = vec![Secret::new("one"), Secret::new("two"), Secret::new("one")];
        let guard = Admission::new(Settings { caller_tokens: tokens, ..Settings::default() });
        assert!(guard.asks_for_token() && guard.knows(b"one") && guard.knows(b"two"));
        assert!(!guard.knows(b"") && !guard.knows(b"three"));
        let shown = |headers: &[(&str, &str)]| guard.shown(&parts("/", headers).headers);
        let basic = format!("Basic {}", BASE64_STANDARD.encode("ads:t:wo"));
        assert_eq!(
            shown(&[("x-ads-sidecar-token", "three"), ("proxy-authorization", "Bearer two")]),
            Some(b"two".to_vec())
        );
        assert_eq!(
            shown(&[("proxy-authorization", basic.as_str())]),
            None,
            "the password begins behind the first colon"
        );
        assert_eq!(shown(&[("x-ads-sidecar-token", "three")]), None);
    }

    #[test]
    fn local_is_who_comes_from_loopback_and_says_so() {
        let local = |peer: &str, host: &str| {
            guard().is_local(&parts("/", &[("host", host)]).headers, Peer::Tcp(peer.parse().unwrap()))
        };
        assert!(local("127.0.0.1:9", "localhost") && local("[::1]:9", "[::1]:9464"));
        assert!(!local("127.0.0.1:9", "ads.internal"), "a name of ours that is not loopback");
        assert!(!local("127.0.0.2:9", "localhost") && !local("10.0.0.1:9", "localhost"));
    }

    #[test]
    fn our_own_authority_is_the_one_that_the_caller_knows_us_by() {
        let own = |host: &str| guard().own_authority(&parts("/", &[("host", host)]).headers).map(str::to_owned);
        assert_eq!(own("ads.internal:80").as_deref(), Some("ads.internal:80"));
        assert_eq!(own("advertising-api.amazon.com"), None);
    }

    #[test]
    fn under_any_host_framing_counts_all_the_same() {
        let any = |headers: &[(&str, &str)]| guard().admit_any_host(&parts("/livez", headers));
        assert_eq!(any(&[("host", "10.1.2.3")]), Ok(()));
        assert_eq!(any(&[("host", "localhost"), ("transfer-encoding", "gzip, chunked")]), Err(Refusal::Framing));
    }

    #[test]
    fn each_refusal_has_a_label_of_its_own() {
        let target = Refusal::Target(BadTarget::Foreign);
        let all = [
            Refusal::Framing,
            Refusal::NoHost,
            Refusal::Host,
            target,
            Refusal::Method,
            Refusal::CrossSite,
            Refusal::Caller,
        ];
        let labels = all.map(Refusal::reason);
        assert_eq!(labels, ["framing", "no_host", "host", "target", "method", "cross_site", "caller_token"]);
    }

    #[test]
    fn the_known_methods_pass() {
        for name in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let mut parts = parts("/", &[("host", "localhost")]);
            parts.method = name.parse().unwrap();
            assert!(guard().admit(&parts, tcp()).is_ok(), "{name}");
        }
    }
}
