//! Decides whether one of adsidecar's own endpoints or Amazon serves a request. (Which account, user and region a
//! request to Amazon gets is decided later, in `proxy/route.rs`.)

use http::Method;

use super::destination::{Destination, Target};

pub(super) const LOGIN: &str = "/api/auth/amazon/login";
pub(super) const CALLBACK: &str = "/api/auth/amazon/callback";
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
    /// Requests for adsidecar's own paths are never forwarded, even if they name one of Amazon's hosts. Below an
    /// account's prefix, and on the hosts of Login with Amazon, adsidecar serves only the token endpoint for SDKs
    /// (`Shim`).
    pub fn of(target: &Target) -> Self {
        let endpoint = Endpoint::of(target.path());
        let shim = endpoint.filter(|endpoint| *endpoint == Endpoint::Shim);
        let own = match target.of {
            Destination::Local if target.account.is_some() => shim,
            Destination::Local => endpoint,
            Destination::Ads(_) => endpoint.map(|_| Endpoint::Unknown),
            Destination::Lwa => Some(shim.unwrap_or(Endpoint::Unknown)),
        };
        own.map_or(Self::Upstream, Self::Own)
    }
}

impl Endpoint {
    fn of(path: &str) -> Option<Self> {
        let ours = |root: &str| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        Some(match path {
            LOGIN => Self::Login,
            CALLBACK => Self::Callback,
            "/api/auth/amazon/status" => Self::Status,
            "/api/auth/amazon/refresh" => Self::Refresh,
            "/api/auth/amazon/logout" => Self::Logout,
            "/api/auth/amazon/confirm" => Self::Confirm,
            "/auth/o2/token" => Self::Shim,
            _ if path.starts_with(USERS) => Self::User,
            _ if ours("/api/auth") || ours("/auth/o2") => Self::Unknown,
            _ => return None,
        })
    }

    /// The only method that the endpoint accepts.
    pub fn method(self) -> Method {
        match self {
            Self::Login | Self::Callback | Self::Status | Self::Unknown => Method::GET,
            Self::Refresh | Self::Logout | Self::Confirm | Self::Shim => Method::POST,
            Self::User => Method::DELETE,
        }
    }

    /// The value of `Allow` in the response to any other method.
    pub fn allow(self) -> &'static str {
        match self {
            Self::Login | Self::Callback | Self::Status | Self::Unknown => "GET",
            Self::Refresh | Self::Logout | Self::Confirm | Self::Shim => "POST",
            Self::User => "DELETE",
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
