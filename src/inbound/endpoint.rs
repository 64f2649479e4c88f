//! Decides whether one of adsidecar's own endpoints or Amazon serves a request. (Which account, user and region a
//! request to Amazon gets is decided later, in `proxy/route.rs`.)

use http::Method;
use percent_encoding::percent_decode_str;

use super::destination::{Destination, Target};

pub(super) const LOGIN: &str = "/api/auth/amazon/login";
pub(super) const CALLBACK: &str = "/api/auth/amazon/callback";
/// On the login listener only.
pub(super) const HEALTH: &str = "/healthz";
const STATUS: &str = "/api/auth/amazon/status";
pub(super) const USERS: &str = "/api/auth/amazon/users/";

/// What serves a request on the proxy listener or the login listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// adsidecar itself.
    Own(Endpoint),
    /// Amazon.
    Upstream,
}

/// adsidecar's own endpoints: everything under `/api/auth/` and `/auth/o2/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the endpoint of its name in the manual")]
pub enum Endpoint {
    Login,
    Callback,
    Status,
    Refresh,
    Logout,
    User,
    Confirm,
    Shim,
    Root,
    /// The health check of the login listener.
    Health,
    /// Where an OAuth client looks for an authorization server: adsidecar is none, and Amazon must not answer.
    Discovery,
    /// A login callback at a path that is not the callback's: its code must not leave.
    StrayCallback,
    Unknown,
}

/// The pages from which a browser may navigate to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Navigable {
    /// None: the endpoint changes something.
    Never,
    /// A page of the same site, such as the frontend on another port of localhost.
    FromSite,
    /// Any page: Amazon redirects browsers here.
    FromAnywhere,
}

impl Route {
    /// Requests for adsidecar's own paths are never forwarded, even if they name one of Amazon's hosts or spell the path
    /// differently. Of the paths on Amazon's hosts and below an account's prefix, adsidecar serves the token endpoint
    /// alone.
    pub fn of(method: &Method, target: &Target) -> Self {
        let endpoint = Endpoint::of(target.path());
        let shim = endpoint.filter(|endpoint| *endpoint == Endpoint::Shim);
        let own = match target.of {
            Destination::Local if target.account.is_some() => {
                let near = || may_read_like_ours(target.path()) && is_below(&fold(target.path()), TOKEN_ROOT);
                let discovery =
                    endpoint.filter(|own| *own == Endpoint::Discovery && fold(target.path()).contains("/.well-known"));
                shim.or(discovery).or_else(|| near().then_some(Endpoint::Unknown))
            }
            Destination::Local => {
                endpoint.or_else(|| is_stray_callback(method, target).then_some(Endpoint::StrayCallback))
            }
            Destination::Amazon(_) => {
                endpoint.map(|own| if own == Endpoint::Discovery { own } else { Endpoint::Unknown })
            }
            Destination::Lwa => Some(shim.unwrap_or(Endpoint::Unknown)),
        };
        own.map_or(Self::Upstream, Self::Own)
    }
}

/// The roots of adsidecar's own paths.
const LOGIN_ROOT: &str = "/api/auth";
const TOKEN_ROOT: &str = "/auth/o2";
/// What MCP clients ask for to start an OAuth of their own (RFC 7591, RFC 6749). Amazon must not answer: the OAuth is
/// adsidecar's.
const DISCOVERY: [&str; 2] = ["/register", "/authorize"];
/// The documents about an authorization server, at the root or below another path (RFC 8414, RFC 9728, OpenID Connect
/// Discovery).
const DISCOVERY_DOCUMENTS: [&str; 2] = ["/.well-known/oauth-", "/.well-known/openid-configuration"];
/// What browsers ask for on their own.
const ICON: &str = "/favicon.ico";

impl Endpoint {
    fn of(path: &str) -> Option<Self> {
        if let Some(endpoint) = Self::exact(path) {
            return Some(endpoint);
        }
        if !may_read_like_ours(path) {
            return None;
        }
        let folded = fold(path);
        let discovery = DISCOVERY.contains(&folded.as_str())
            || DISCOVERY_DOCUMENTS.iter().any(|document| folded.contains(document));
        let ours = is_below(&folded, LOGIN_ROOT) || is_below(&folded, TOKEN_ROOT) || folded == "/" || folded == ICON;
        if discovery { Some(Self::Discovery) } else { ours.then_some(Self::Unknown) }
    }

    fn exact(path: &str) -> Option<Self> {
        Some(match path {
            "/" => Self::Root,
            LOGIN => Self::Login,
            CALLBACK => Self::Callback,
            STATUS => Self::Status,
            "/api/auth/amazon/refresh" => Self::Refresh,
            "/api/auth/amazon/logout" => Self::Logout,
            "/api/auth/amazon/confirm" => Self::Confirm,
            "/auth/o2/token" => Self::Shim,
            _ if path.strip_prefix(USERS).is_some_and(|user| !user.is_empty() && !user.contains('/')) => Self::User,
            _ => return None,
        })
    }

    /// The path that a caller probably meant: `path` without doubled slashes, dot segments and the like.
    pub fn meant(path: &str) -> Option<String> {
        Some(fold(path)).filter(|folded| folded != path && Self::exact(folded).is_some())
    }

    /// The names of the parameters that the endpoint accepts. `None`: any, because Amazon or an SDK chooses them.
    pub fn parameters(self) -> Option<&'static [&'static str]> {
        Some(match self {
            Self::Login => &["user_id", "region", "return_to", "replace", "redirect"],
            Self::Status => &["user_id", "after", "limit"],
            Self::Refresh | Self::Logout => &["user_id"],
            Self::Confirm => &["grant"],
            Self::User | Self::Root | Self::Health => &[],
            Self::Discovery | Self::StrayCallback | Self::Unknown => &[],
            Self::Callback | Self::Shim => return None,
        })
    }

    /// The only method that the endpoint accepts.
    pub fn method(self) -> Method {
        match self {
            Self::Login
            | Self::Callback
            | Self::Status
            | Self::Root
            | Self::Health
            | Self::Discovery
            | Self::StrayCallback
            | Self::Unknown => Method::GET,
            Self::Refresh | Self::Logout | Self::Confirm | Self::Shim => Method::POST,
            Self::User => Method::DELETE,
        }
    }

    /// The value of `Allow` in the response to any other method.
    pub fn allow(self) -> &'static str {
        match self.method() {
            Method::POST => "POST",
            Method::DELETE => "DELETE",
            _ => "GET",
        }
    }

    /// The pages from which a browser may navigate here.
    pub fn navigable(self) -> Navigable {
        match self {
            Self::Callback => Navigable::FromAnywhere,
            Self::Login => Navigable::FromSite,
            _ => Navigable::Never,
        }
    }

    /// Whether a caller needs the caller token here. The callback is authenticated by its state, and the token endpoint
    /// checks the token itself, because SDKs send it in the body.
    pub fn needs_caller_token(self) -> bool {
        !matches!(self, Self::Callback | Self::Shim)
    }
}

fn is_below(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether [`fold`] could turn `path` into one of ours. Every request pays for this check, and few for the folding.
fn may_read_like_ours(path: &str) -> bool {
    let starts = [LOGIN_ROOT, TOKEN_ROOT, ICON].into_iter().chain(DISCOVERY);
    let ours = |start: &str| path.get(..start.len()).is_some_and(|head| head.eq_ignore_ascii_case(start));
    path.bytes().any(|byte| matches!(byte, b'%' | b'\\' | b';'))
        || path.contains("//")
        || path.contains("/.")
        || starts.into_iter().any(ours)
}

/// `path` as a lenient server reads it: percent-decoded, in lower case, with backslashes as slashes, and without empty
/// segments, dot segments, path parameters and a final slash.
fn fold(path: &str) -> String {
    // Decoded twice: a proxy on the way may have encoded it once more.
    let decoded = percent_decode_str(path).decode_utf8_lossy().into_owned();
    let decoded = percent_decode_str(&decoded).decode_utf8_lossy().to_lowercase().replace('\\', "/");
    let mut segments = Vec::new();
    for segment in decoded.split('/').map(|segment| segment.split(';').next().unwrap_or_default().trim()) {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment),
        }
    }
    format!("/{}", segments.join("/"))
}

/// Whether this is the end of one of our logins at a path that is not ours: a `code`, and a `state` of the shape that
/// adsidecar creates (256 bits as base64url).
fn is_stray_callback(method: &Method, target: &Target) -> bool {
    let Some(query) = target.path_and_query.query().filter(|_| *method == Method::GET) else { return false };
    let parameter = |name: &str| url::form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name);
    let is_state =
        |text: &str| text.len() == 43 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    parameter("code").is_some() && parameter("state").is_some_and(|(_, state)| is_state(&state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(target: &str) -> Route {
        Route::of(&Method::GET, &Target::read(&target.parse().unwrap(), |_| false).unwrap())
    }

    #[test]
    fn no_path_that_reads_like_ours_is_forwarded() {
        for path in [
            "//api/auth/amazon/status",
            "/API/auth/amazon/status",
            "/api//auth/amazon/logout",
            "/./api/auth/amazon/status",
            "/x/../api/auth/amazon/status",
            "/%61pi/auth/amazon/status",
            "/api%2fauth/amazon/status",
            "/api/auth;x=1/amazon/status",
            "/auth/O2/token",
            "//auth/o2/token",
            "/auth/o2/token/",
            "/%2561uth/o2/token",
            "/a/acme//auth/o2/token",
            "/a/acme/auth/O2/token",
            "/favicon.ico",
            "//",
        ] {
            assert_eq!(route(path), Route::Own(Endpoint::Unknown), "{path}");
        }
        for path in [
            "/.well-known/oauth-authorization-server",
            "/.well-known/oauth-protected-resource/mcp",
            "/.well-known/openid-configuration",
            "/mcp/.well-known/openid-configuration",
            "/mcp/%2ewell-known/oauth-protected-resource",
            "/a/acme/mcp/.well-known/openid-configuration",
            "http://advertising-ai.amazon.com/.well-known/oauth-protected-resource/mcp",
            "/register",
            "//Register/",
            "/authorize",
        ] {
            assert_eq!(route(path), Route::Own(Endpoint::Discovery), "{path}");
        }
        for path in
            ["/v2/profiles", "/api/authors", "/a/acme/api/auth/x", "/a/acme/", "/registers", "/sp/auth/o2/token"]
        {
            assert_eq!(route(path), Route::Upstream, "{path}");
        }
        assert_eq!(route("/"), Route::Own(Endpoint::Root));
    }

    #[test]
    fn a_code_with_a_state_of_ours_never_leaves() {
        let state = "x".repeat(43);
        assert_eq!(route(&format!("/callback?code=c&state={state}")), Route::Own(Endpoint::StrayCallback));
        assert_eq!(route(&format!("/callback?state={state}")), Route::Upstream);
        assert_eq!(route("/sp/x?code=c&state=enabled"), Route::Upstream);
    }
}
