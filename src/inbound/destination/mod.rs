//! Reads the target of a request (the host, the account prefix and the path), and decides whether one of adsidecar's
//! own endpoints or Amazon serves it. Path and query are forwarded byte for byte; only the account prefix is removed.
//! (Which account, user and region a request to Amazon gets is decided later, in `route`.)

#[cfg(test)]
mod tests;

use http::uri::PathAndQuery;
use http::{Method, Uri};
use percent_encoding::percent_decode_str;

use crate::domain::account::{AmazonHost, Region, check_name};

pub(super) const LOGIN: &str = "/api/auth/amazon/login";
pub(super) const CALLBACK: &str = "/api/auth/amazon/callback";
/// On the login listener only.
pub(super) const HEALTH: &str = "/healthz";
/// The path of [`Endpoint::User`], without the user.
pub const USERS: &str = "/api/auth/amazon/users/";
/// The paths of the other endpoints of the proxy listener: an endpoint is served because it is listed here.
pub const PATHS: [(&str, Endpoint); 11] = [
    ("/", Endpoint::Root),
    (LOGIN, Endpoint::Login),
    (CALLBACK, Endpoint::Callback),
    ("/api/auth/amazon/status", Endpoint::Status),
    ("/api/auth/amazon/events", Endpoint::Events),
    ("/api/auth/amazon/accounts", Endpoint::Accounts),
    ("/api/auth/amazon/accounts/sync", Endpoint::AccountsSync),
    ("/api/auth/amazon/refresh", Endpoint::Refresh),
    ("/api/auth/amazon/logout", Endpoint::Logout),
    ("/api/auth/amazon/confirm", Endpoint::Confirm),
    ("/auth/o2/token", Endpoint::Shim),
];

/// Longest path and query, in bytes. Amazon's gateways accept no more either.
const MAX_TARGET: usize = 8 << 10;
/// `/a/<account>/…` selects an account, for clients that can change nothing but their base URL.
const PREFIX: &str = "/a/";

/// What serves a request on the proxy listener or the login listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// adsidecar itself.
    Own(Endpoint),
    /// Amazon.
    Upstream(Target),
}

/// adsidecar's own endpoints: everything under `/api/auth/` and `/auth/o2/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the endpoint of its name in the manual")]
pub enum Endpoint {
    Login,
    Callback,
    Status,
    /// The event stream, which the proxy listener alone serves.
    Events,
    Accounts,
    AccountsSync,
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
    /// Reads the target of a request and decides what serves it. `host` is the value of `Host` without its port, and
    /// `is_ours` tells whether an authority is our own.
    ///
    /// # Errors
    /// [`BadTarget`] as of [`Target::read`].
    pub fn read(
        method: &Method,
        uri: &Uri,
        host: Option<&str>,
        is_ours: impl Fn(&str) -> bool,
    ) -> Result<Self, BadTarget> {
        let mut target = Target::read(uri, is_ours)?;
        // `proxy.allowed_hosts` may hold one of Amazon's hosts (a hosts file, `curl --connect-to`): it names its
        // region.
        if target.of == Destination::Local
            && let Some(of) = host.and_then(amazon_host)
        {
            target.of = of;
        }
        Ok(Self::of(method, target))
    }

    /// Requests for adsidecar's own paths are never forwarded, even if they name one of Amazon's hosts or spell the
    /// path differently. Of the paths on Amazon's hosts and below an account's prefix, adsidecar serves the token
    /// endpoint alone.
    fn of(method: &Method, target: Target) -> Self {
        let endpoint = Endpoint::of(target.path());
        let shim = endpoint.filter(|endpoint| *endpoint == Endpoint::Shim);
        let own = match target.of {
            Destination::Local if target.account.is_some() => {
                let near = || may_read_like_ours(target.path()) && is_below(&fold(target.path()), TOKEN_ROOT);
                let is_document = |own: &Endpoint| *own == Endpoint::Discovery && is_document(&fold(target.path()));
                shim.or(endpoint.filter(is_document)).or_else(|| near().then_some(Endpoint::Unknown))
            }
            Destination::Local => endpoint,
            Destination::Amazon(_) => {
                endpoint.map(|own| if own == Endpoint::Discovery { own } else { Endpoint::Unknown })
            }
            Destination::Lwa => Some(shim.unwrap_or(Endpoint::Unknown)),
        };
        match own {
            None | Some(Endpoint::Root | Endpoint::Unknown) if is_stray_callback(method, &target) => {
                Self::Own(Endpoint::StrayCallback)
            }
            Some(own) => Self::Own(own),
            None => Self::Upstream(target),
        }
    }
}

/// The roots of adsidecar's own paths.
const LOGIN_ROOT: &str = "/api/auth";
const TOKEN_ROOT: &str = "/auth/o2";
/// The root of the account prefix, which [`Target::read`] knows in one spelling: in any other, the path names an
/// account and must not go to the default one.
const ACCOUNT_ROOT: &str = "/a";
/// The documents in which clients look for an OAuth of Amazon's (RFC 8414, RFC 9728, OpenID Connect Discovery), also
/// below the path of an MCP server. Amazon must not answer: the OAuth is adsidecar's.
pub const DISCOVERY: [&str; 2] = ["/.well-known/oauth-", "/.well-known/openid-configuration"];
/// Where clients register, consent and fetch tokens if they found no such document, or guess (RFC 7591, the MCP
/// specification of 2025-03-26). A request for a token holds secrets of the caller's.
pub const NOBODYS: [&str; 7] =
    ["/register", "/authorize", "/token", "/oauth/token", "/oauth2/token", "/o2/token", "/auth/token"];
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
        let ours = is_below(&folded, LOGIN_ROOT) || is_below(&folded, TOKEN_ROOT) || folded == "/" || folded == ICON;
        let discovery = is_document(&folded) || NOBODYS.contains(&folded.as_str());
        if discovery { Some(Self::Discovery) } else { ours.then_some(Self::Unknown) }
    }

    fn exact(path: &str) -> Option<Self> {
        let is_user = |user: &str| !user.is_empty() && !user.contains('/');
        let listed = PATHS.iter().find(|(listed, _)| *listed == path).map(|(_, endpoint)| *endpoint);
        listed.or_else(|| path.strip_prefix(USERS).is_some_and(is_user).then_some(Self::User))
    }

    /// The path that a caller probably meant: `path` without doubled slashes, dot segments and the like.
    pub fn meant(path: &str) -> Option<String> {
        Some(fold(path)).filter(|folded| folded != path && Self::exact(folded).is_some())
    }

    /// The names of the parameters that the endpoint accepts. `None`: any, because Amazon or an SDK chooses them.
    pub fn parameters(self) -> Option<&'static [&'static str]> {
        Some(match self {
            Self::Login => &["user_id", "region", "return_to", "replace", "redirect"],
            Self::Status => &["user_id", "state", "after", "limit"],
            Self::Accounts => &["user_id", "name", "country", "type", "after", "limit"],
            Self::Refresh | Self::Logout | Self::AccountsSync | Self::Events => &["user_id"],
            Self::Confirm => &["grant"],
            Self::User | Self::Root | Self::Health => &[],
            Self::Discovery | Self::StrayCallback | Self::Unknown => &[],
            Self::Callback | Self::Shim => return None,
        })
    }

    /// The only method that the endpoint accepts, besides `HEAD` in place of `GET`.
    pub fn method(self) -> Method {
        match self {
            Self::Login
            | Self::Callback
            | Self::Status
            | Self::Events
            | Self::Accounts
            | Self::Root
            | Self::Health
            | Self::Discovery
            | Self::StrayCallback
            | Self::Unknown => Method::GET,
            Self::Refresh | Self::Logout | Self::AccountsSync | Self::Confirm | Self::Shim => Method::POST,
            Self::User => Method::DELETE,
        }
    }

    /// Whether the endpoint accepts `method`. A `HEAD` is a `GET` whose body the server leaves out (RFC 9110, section
    /// 9.3.2).
    pub fn accepts(self, method: &Method) -> bool {
        *method == self.method() || *method == Method::HEAD && self.method() == Method::GET
    }

    /// The value of `Allow` in the response to any other method.
    pub fn allow(self) -> &'static str {
        match self.method() {
            Method::POST => "POST",
            Method::DELETE => "DELETE",
            _ => "GET, HEAD",
        }
    }

    /// The pages from which a browser may navigate here.
    pub fn navigable(self) -> Navigable {
        match self {
            // Amazon sends the browser here; to the second only to be told so.
            Self::Callback | Self::StrayCallback => Navigable::FromAnywhere,
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

/// Whether `path`, folded, is a document about an authorization server.
fn is_document(path: &str) -> bool {
    DISCOVERY.iter().any(|document| path.contains(document))
}

fn is_below(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The paths, apart from spellings that only [`fold`] reads, that begin like one of ours.
const STARTS: [&str; 4] = [LOGIN_ROOT, TOKEN_ROOT, ICON, "/A/"];

/// The letters with which these paths go on behind their slash, a bit for each.
const SECOND_LETTERS: u32 = second_letters(&STARTS) | second_letters(&NOBODYS);

const fn second_letters(paths: &[&str]) -> u32 {
    let (mut letters, mut path) = (0, 0);
    while path < paths.len() {
        letters |= letter(paths[path].as_bytes()[1]);
        path += 1;
    }
    letters
}

/// The bit of a letter in either case; none for any other character.
const fn letter(byte: u8) -> u32 {
    if byte.is_ascii_alphabetic() { 1 << (byte.to_ascii_lowercase() - b'a') } else { 0 }
}

/// Whether [`fold`] could turn `path` into one of ours. Every request pays for this check, and few for the folding: so
/// it looks at each byte once, and compares with our paths only what begins like one.
fn may_read_like_ours(path: &str) -> bool {
    let ours = |start: &&str| path.get(..start.len()).is_some_and(|head| head.eq_ignore_ascii_case(start));
    let may_begin = path.as_bytes().get(1).is_some_and(|second| SECOND_LETTERS & letter(*second) != 0);
    is_unusual(path) || may_begin && STARTS.iter().chain(&NOBODYS).any(ours)
}

/// Whether `path` holds a character that [`fold`] reads in another way, or an empty or dot segment.
fn is_unusual(path: &str) -> bool {
    let (mut before, mut seen) = (0, 0);
    // Without a branch for each byte.
    for byte in path.bytes() {
        let meaning = MEANINGS[usize::from(byte)];
        seen |= meaning & (UNUSUAL | before);
        before = (meaning & SLASH) << 1;
    }
    seen != 0
}

/// What a byte means in a path: a bit for each.
const UNUSUAL: u8 = 1;
const SLASH: u8 = 1 << 1;
/// Unusual behind a slash.
const AFTER_SLASH: u8 = SLASH << 1;

static MEANINGS: [u8; 256] = {
    let mut meanings = [0; 256];
    meanings[b'%' as usize] = UNUSUAL;
    meanings[b'\\' as usize] = UNUSUAL;
    meanings[b';' as usize] = UNUSUAL;
    meanings[b'/' as usize] = SLASH | AFTER_SLASH;
    meanings[b'.' as usize] = AFTER_SLASH;
    meanings
};

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
/// adsidecar creates (256 bits as base64url). Something on the way may ask with `HEAD` first.
fn is_stray_callback(method: &Method, target: &Target) -> bool {
    let query = target.path_and_query.query().filter(|_| matches!(*method, Method::GET | Method::HEAD));
    let is_state =
        |text: &str| text.len() == 43 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let (mut has_code, mut has_state) = (false, false);
    for (name, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        has_code |= name == "code";
        has_state |= name == "state" && is_state(&value);
    }
    has_code && has_state
}

/// A target that adsidecar can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The host that the target names.
    pub of: Destination,
    /// The account in the path's prefix.
    pub account: Option<String>,
    /// Path and query as they are sent to Amazon.
    pub path_and_query: PathAndQuery,
}

/// The host that a target names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// adsidecar: the origin form, or the absolute form with our own authority.
    Local,
    /// A host of the Ads API or of Amazon's MCP server.
    Amazon(AmazonHost),
    /// A host of Login with Amazon.
    Lwa,
}

/// Why a target is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadTarget {
    /// The target cannot be read; holds the reason.
    Form(&'static str),
    /// The absolute form with a host that is neither Amazon's nor ours.
    Foreign,
    /// Longer than 8 KiB.
    TooLong,
}

impl Target {
    /// Reads a request's target. `is_ours` tells whether an authority is our own.
    ///
    /// # Errors
    /// [`BadTarget`] if the target cannot be read, names another host, or is too long.
    pub fn read(uri: &Uri, is_ours: impl Fn(&str) -> bool) -> Result<Self, BadTarget> {
        let of = match (uri.scheme_str(), uri.authority()) {
            (None, None) => Destination::Local,
            (Some("http" | "https"), Some(authority)) => host_of(authority.as_str(), is_ours)?,
            (Some(_), _) => return Err(BadTarget::Form("the scheme of an absolute target is http or https")),
            (None, Some(_)) => return Err(BadTarget::Form("only CONNECT takes an authority as its target")),
        };
        let mut path_and_query = uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        // An empty path in the absolute form is `/` (RFC 9112, section 3.2.1).
        if uri.authority().is_some()
            && path_and_query.as_str().starts_with('?')
            && let Ok(rooted) = format!("/{}", path_and_query.as_str()).parse()
        {
            path_and_query = rooted;
        }
        let text = path_and_query.as_str();
        if text.len() > MAX_TARGET {
            return Err(BadTarget::TooLong);
        }
        if !text.starts_with('/') {
            return Err(BadTarget::Form("a target begins with /"));
        }
        let Some(prefixed) = text.strip_prefix(PREFIX).filter(|_| of == Destination::Local) else {
            let path = path_and_query.path();
            if of == Destination::Local && may_read_like_ours(path) && is_below(&fold(path), ACCOUNT_ROOT) {
                return Err(BadTarget::Form("an account's prefix is spelled /a/<account>/, and begins the path"));
            }
            return Ok(Self { of, account: None, path_and_query });
        };
        let end = prefixed.find(['/', '?']).unwrap_or(prefixed.len());
        let (account, rest) = prefixed.split_at(end);
        let account = percent_decode_str(account).decode_utf8().ok().filter(|name| check_name(name).is_ok());
        let account = account.ok_or(BadTarget::Form("the account in /a/<account>/ is no legal name"))?;
        let rest = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
        let path_and_query = rest.parse().map_err(|_| BadTarget::Form("the path behind the account cannot be read"))?;
        Ok(Self { of, account: Some(account.into_owned()), path_and_query })
    }

    /// The path, without its query.
    pub fn path(&self) -> &str {
        self.path_and_query.path()
    }
}

/// The host of an absolute target. Amazon's hosts are accepted without a port or with 80 or 443.
fn host_of(authority: &str, is_ours: impl Fn(&str) -> bool) -> Result<Destination, BadTarget> {
    if is_ours(authority) {
        return Ok(Destination::Local);
    }
    let host = authority.strip_suffix(":80").or_else(|| authority.strip_suffix(":443")).unwrap_or(authority);
    amazon_host(host).ok_or(BadTarget::Foreign)
}

/// Which of Amazon's hosts `host` is, ignoring case; `None` if it is none of them.
pub fn amazon_host(host: &str) -> Option<Destination> {
    let served = AmazonHost::ALL.into_iter().find(|served| host.eq_ignore_ascii_case(served.name()));
    served.map(Destination::Amazon).or_else(|| {
        let is_token_host = |region: &Region| host.eq_ignore_ascii_case(region.token_host());
        Region::ALL.iter().any(is_token_host).then_some(Destination::Lwa)
    })
}
