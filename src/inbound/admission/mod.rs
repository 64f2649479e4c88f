//! The checks before a request is served: framing, method, `Host`, browsers, the caller token. All of them come before
//! a byte of the body is read. There is one method per listener: [`Admission::proxy`], [`Admission::login`] and
//! [`Admission::admin`].
//!
//! The open local port is the asset. A web page must not drive it: a page under another name fails at `Host` (DNS
//! rebinding), a page on any other origin fails at `Origin` and `Sec-Fetch-Site`.

#[cfg(test)]
mod tests;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::{
    ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, ORIGIN,
    PROXY_AUTHORIZATION, TRANSFER_ENCODING,
};
use http::request::Parts;
use http::{HeaderValue, Method};

use crate::domain::secret::Secret;
use crate::inbound::destination::{BadTarget, Endpoint, HEALTH, Navigable, Route, Target, amazon_host};
use crate::server::Peer;

/// What the listeners accept.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `proxy.allowed_hosts`: legal values of `Host` besides the loopback names; lower case, without a port.
    pub allowed_hosts: Vec<String>,
    /// `proxy.caller_token`: if not empty, each caller must send one of them.
    pub caller_tokens: Vec<Secret>,
    /// The origin of `login.frontend_url`, such as `https://app.example.com`: the one web origin that may `fetch` the
    /// OAuth endpoints.
    pub frontend_origin: Option<String>,
    /// `proxy.peer_uids`: if not empty, a caller at a Unix socket must run as one of these users.
    pub peer_uids: Vec<u32>,
}

/// The header that carries the caller token.
pub const CALLER_TOKEN: HeaderName = HeaderName::from_static("x-ads-sidecar-token");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The checks of one listener.
#[derive(Clone, Debug)]
pub struct Admission(Settings);

/// The check that a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Ambiguous framing (request smuggling); the connection must be closed.
    Framing,
    /// No `Host`, or more than one.
    NoHost,
    /// `Host` is not one of ours.
    Host,
    /// adsidecar cannot serve the target.
    Target(BadTarget),
    /// `CONNECT`, `TRACE`, or an unknown method.
    Method,
    /// The caller is a web page.
    CrossSite,
    /// A browser opened an address of Amazon's on its own: a person typed it, or opened a bookmark.
    TypedAddress,
    /// The caller token is missing or wrong.
    Caller,
    /// The process at the other end of a Unix socket runs as another user.
    Peer,
}

/// A request that passed the checks.
#[derive(Clone, Debug)]
pub enum Admitted {
    /// For adsidecar's own endpoint. If `cors` is present, its pages may read the response.
    Own {
        /// The endpoint.
        endpoint: Endpoint,
        /// The web origin that fetches it.
        cors: Option<HeaderValue>,
    },
    /// For Amazon.
    Upstream(Target),
    /// A tunnel to one of Amazon's hosts, inside which plain HTTP is served as its absolute form.
    Tunnel,
}

/// A request that failed a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The check.
    pub refusal: Refusal,
    /// adsidecar's own endpoint that the request was for, if it got that far.
    pub endpoint: Option<Endpoint>,
}

/// Who may see or do something on the admin listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminAccess {
    /// Kubelets and scrapers, which use the pod's address as `Host`: the probes and the metrics, whose content is no
    /// secret.
    Probe,
    /// Any caller that is not a browser.
    Anyone,
    /// An operator's browser, which opens the status page itself: by its address, a bookmark, or a reload.
    Page,
    /// A form that the status page itself sends, in an operator's browser.
    Form,
    /// An operator: a caller on this machine, or one that shows a caller token.
    Operator,
}

impl From<Refusal> for Rejected {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, endpoint: None }
    }
}

impl Refusal {
    fn at(self, endpoint: Endpoint) -> Rejected {
        Rejected { refusal: self, endpoint: Some(endpoint) }
    }

    /// The metric's label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Framing => "framing",
            Self::NoHost => "no_host",
            Self::Host => "host",
            Self::Target(_) => "target",
            Self::Method => "method",
            Self::CrossSite | Self::TypedAddress => "cross_site",
            Self::Caller => "caller_token",
            Self::Peer => "peer_uid",
        }
    }
}

impl Admission {
    /// Checks that follow `settings`.
    pub fn new(settings: Settings) -> Self {
        Self(settings)
    }

    /// Checks a request on the proxy listener. A web page can drive none of the paths that lead to Amazon, and of
    /// adsidecar's own endpoints only those that the frontend's origin may fetch, or that a browser may navigate to.
    ///
    /// # Errors
    /// The first check that the request fails, and the endpoint that it was for, if that is known by then.
    pub fn proxy(&self, request: &Parts, peer: Peer) -> Result<Admitted, Rejected> {
        self.peer(peer)?;
        let headers = &request.headers;
        if request.method == Method::CONNECT {
            return Ok(self.tunnel(request, peer)?);
        }
        match self.route(request, peer)? {
            Route::Own(endpoint) => {
                let cors = self.own_endpoint(endpoint, headers).map_err(|refusal| refusal.at(endpoint))?;
                Ok(Admitted::Own { endpoint, cors })
            }
            Route::Upstream(target) => {
                self.no_page(headers)?;
                self.caller(headers)?;
                Ok(Admitted::Upstream(target))
            }
        }
    }

    /// Checks a request on the login listener, which serves Amazon's redirects to the callback and the health check
    /// of load balancers, and nothing else ([`Endpoint::Unknown`]).
    ///
    /// # Errors
    /// The first check that the request fails.
    pub fn login(&self, request: &Parts, peer: Peer) -> Result<Admitted, Rejected> {
        // Load balancers use the pod's address as Host.
        if request.uri.path() == HEALTH {
            framing(&request.headers)?;
            method(&request.method)?;
            return Ok(Admitted::Own { endpoint: Endpoint::Health, cors: None });
        }
        match self.route(request, peer)? {
            Route::Own(endpoint @ Endpoint::Callback) => {
                let cors = self.own_endpoint(endpoint, &request.headers)?;
                Ok(Admitted::Own { endpoint, cors })
            }
            _ => Ok(Admitted::Own { endpoint: Endpoint::Unknown, cors: None }),
        }
    }

    /// Checks a request on the admin listener.
    ///
    /// # Errors
    /// The first check that the request fails.
    pub fn admin(&self, request: &Parts, peer: Peer, access: AdminAccess) -> Result<(), Refusal> {
        let headers = &request.headers;
        match access {
            AdminAccess::Page if !headers.contains_key(ORIGIN) => drop(self.browser(headers, Navigable::Never)?),
            AdminAccess::Form => own_page(headers)?,
            _ => self.no_browser(headers)?,
        }
        if access == AdminAccess::Probe {
            return framing(headers);
        }
        self.route(request, peer)?;
        match access {
            AdminAccess::Page | AdminAccess::Form | AdminAccess::Operator => self.operator(headers, peer),
            AdminAccess::Probe | AdminAccess::Anyone => Ok(()),
        }
    }

    /// A tunnel is opened only to port 80 of one of Amazon's hosts: adsidecar cannot see into TLS, and is no open
    /// proxy.
    fn tunnel(&self, request: &Parts, peer: Peer) -> Result<Admitted, Refusal> {
        let headers = &request.headers;
        framing(headers)?;
        let host = request.uri.authority().and_then(|authority| authority.as_str().strip_suffix(":80"));
        if host.and_then(amazon_host).is_none() {
            return Err(Refusal::Method);
        }
        // The bytes behind the head belong to the tunnel, not to a body (RFC 9110, section 9.3.6).
        if headers.contains_key(TRANSFER_ENCODING) || headers.contains_key(CONTENT_LENGTH) {
            return Err(Refusal::Framing);
        }
        self.host(request, peer)?;
        self.no_page(headers)?;
        self.caller(headers)?;
        Ok(Admitted::Tunnel)
    }

    /// Sound framing, a known method, a `Host` that is ours (or Amazon's, in the absolute form), a target that
    /// adsidecar can serve.
    fn route(&self, request: &Parts, peer: Peer) -> Result<Route, Refusal> {
        framing(&request.headers)?;
        method(&request.method)?;
        let host = self.host(request, peer)?;
        Route::read(&request.method, &request.uri, host, |authority| self.is_own_host(authority))
            .map_err(Refusal::Target)
    }

    /// Returns the origin to allow in the response's CORS headers.
    fn own_endpoint(&self, endpoint: Endpoint, headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
        let cors = self.browser(headers, endpoint.navigable())?;
        if endpoint.needs_caller_token() {
            self.caller(headers)?;
        }
        Ok(cors)
    }

    /// A caller on this machine, or one that shows a caller token.
    fn operator(&self, headers: &HeaderMap, peer: Peer) -> Result<(), Refusal> {
        let shown = self.needs_caller_token() && self.caller(headers).is_ok();
        if shown || is_on_this_machine(headers, peer) { Ok(()) } else { Err(Refusal::Caller) }
    }

    /// Checks the user id of the process at the other end of a Unix socket, if `proxy.peer_uids` limits it.
    fn peer(&self, peer: Peer) -> Result<(), Refusal> {
        match peer {
            Peer::Unix(uid) if !self.0.peer_uids.is_empty() => {
                let known = uid.is_some_and(|uid| self.0.peer_uids.contains(&uid));
                if known { Ok(()) } else { Err(Refusal::Peer) }
            }
            _ => Ok(()),
        }
    }

    /// Refuses browsers, and the preflight request (CORS) with which one asks whether a page may send something.
    fn no_browser(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        // One pass over the names: every request is asked, and looking up three names costs more.
        let signs = [ORIGIN, SEC_FETCH_SITE, ACCESS_CONTROL_REQUEST_METHOD];
        let browser = headers.keys().any(|name| signs.contains(name));
        if browser { Err(Refusal::CrossSite) } else { Ok(()) }
    }

    /// As [`no_browser`](Self::no_browser), but admits a program that is built on a browser (an Electron app sends
    /// `Sec-Fetch-Site: none` and cannot help it), if it shows a caller token: no web page has that.
    fn no_page(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let on_its_own = || {
            headers.get(SEC_FETCH_SITE).is_some_and(|site| site == "none")
                && !headers.contains_key(ORIGIN)
                && !headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
        };
        match self.no_browser(headers) {
            Err(_) if on_its_own() && self.shown_token(headers).is_some() => Ok(()),
            Err(_) if on_its_own() => Err(Refusal::TypedAddress),
            checked => checked,
        }
    }

    /// Admits callers that are not browsers, pages of the frontend's origin, and browsers that navigate from a page
    /// that `navigable` allows. Returns the origin to allow in the response's CORS headers.
    fn browser(&self, headers: &HeaderMap, navigable: Navigable) -> Result<Option<HeaderValue>, Refusal> {
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

    /// Checks the caller token, if one is configured.
    fn caller(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let passes = !self.needs_caller_token() || self.shown_token(headers).is_some();
        if passes { Ok(()) } else { Err(Refusal::Caller) }
    }

    /// The caller token in the headers, if it is a configured one.
    pub fn shown_token(&self, headers: &HeaderMap) -> Option<Vec<u8>> {
        presented(headers).find(|token| self.is_caller_token(token))
    }

    /// Whether `token` is a configured caller token. Compares it with each of them in constant time.
    pub fn is_caller_token(&self, token: &[u8]) -> bool {
        self.0.caller_tokens.iter().fold(false, |known, secret| known | secret.matches(token))
    }

    /// Whether `proxy.caller_token` is set.
    pub fn needs_caller_token(&self) -> bool {
        !self.0.caller_tokens.is_empty()
    }

    /// The authority that the caller used for adsidecar, for links in responses; `None` if it named Amazon.
    pub fn own_authority<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        host_value(headers).ok().filter(|host| self.is_own_host(host))
    }

    /// Checks `Host`, and returns it without its port.
    fn host<'r>(&self, request: &'r Parts, peer: Peer) -> Result<Option<&'r str>, Refusal> {
        if let Peer::Unix(_) = peer {
            return Ok(host_value(&request.headers).ok().and_then(without_port));
        }
        let host = host_value(&request.headers)?;
        let own = without_port(host);
        let amazon = || {
            let name = host.strip_suffix(":80").or_else(|| host.strip_suffix(":443")).unwrap_or(host);
            request.uri.authority().is_some() && amazon_host(name).is_some()
        };
        if own.is_some_and(|own| self.is_own_name(own)) || amazon() { Ok(own) } else { Err(Refusal::Host) }
    }

    fn is_own_host(&self, authority: &str) -> bool {
        without_port(authority).is_some_and(|name| self.is_own_name(name))
    }

    fn is_own_name(&self, name: &str) -> bool {
        is_loopback(name) || self.0.allowed_hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
    }
}

/// Admits a page of the origin that the request is sent to, and callers that are not browsers. That the authority in
/// `Host` is ours is checked later.
fn own_page(headers: &HeaderMap) -> Result<(), Refusal> {
    let host = host_value(headers)?;
    let is_ours = |origin: &HeaderValue| {
        let origin = origin.to_str().unwrap_or_default();
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
    };
    let same_origin = headers.get_all(ORIGIN).iter().all(is_ours)
        && headers.get_all(SEC_FETCH_SITE).iter().all(|site| site == "same-origin")
        && !headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    if same_origin { Ok(()) } else { Err(Refusal::CrossSite) }
}

/// An exact loopback address and a loopback `Host`, or a Unix socket.
fn is_on_this_machine(headers: &HeaderMap, peer: Peer) -> bool {
    let Peer::Tcp(address) = peer else { return true };
    let exact = [std::net::Ipv4Addr::LOCALHOST.into(), std::net::IpAddr::from(std::net::Ipv6Addr::LOCALHOST)];
    exact.contains(&address.ip()) && host_value(headers).ok().and_then(without_port).is_some_and(is_loopback)
}

/// Exactly one `Transfer-Encoding`, and that is `chunked` (RFC 9112, section 6.1). hyper has rejected other
/// ambiguities.
fn framing(headers: &HeaderMap) -> Result<(), Refusal> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(only), None) if only.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(Refusal::Framing),
    }
}

/// The methods that are served, on every listener.
pub(super) fn method(method: &Method) -> Result<(), Refusal> {
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
pub(super) fn is_loopback(name: &str) -> bool {
    name.eq_ignore_ascii_case("localhost") || name == "127.0.0.1" || name == "[::1]"
}

/// The host of `host` or `host:port`; `None` if the text after the colon is not a port.
pub(super) fn without_port(authority: &str) -> Option<&str> {
    // Byte by byte: a search for characters costs every request more than the few bytes do.
    let bytes = authority.as_bytes();
    let start = bytes.iter().rposition(|byte| *byte == b']').unwrap_or(0);
    match bytes[start..].iter().position(|byte| *byte == b':').map(|at| start + at) {
        None => Some(authority),
        Some(at) => {
            let port = &authority[at + 1..];
            let legal = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok();
            legal.then(|| &authority[..at])
        }
    }
}

/// The tokens in all headers that may carry one.
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
