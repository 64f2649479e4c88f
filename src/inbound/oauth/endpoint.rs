//! Which endpoint a path names, and what its query says.

use std::collections::HashMap;

use http::Method;
use percent_encoding::percent_decode_str;

use super::{LoginError, parameter};
use crate::domain::account::UserId;
use crate::inbound::admission::Navigable;

pub(super) const LOGIN: &str = "/api/auth/amazon/login";
pub(super) const CALLBACK: &str = "/api/auth/amazon/callback";
const USERS: &str = "/api/auth/amazon/users/";

/// Everything under `/api/auth/` and `/auth/o2/`.
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

impl Endpoint {
    /// The endpoint of `path`; `None` where the path is not adsidecar's own.
    pub fn of(path: &str) -> Option<Self> {
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

    /// The one method it has.
    pub(super) fn method(self) -> Method {
        match self {
            Self::Login | Self::Callback | Self::Status | Self::Unknown => Method::GET,
            Self::Refresh | Self::Logout | Self::Confirm | Self::Shim => Method::POST,
            Self::User => Method::DELETE,
        }
    }

    pub(super) fn allow(self) -> &'static str {
        match self {
            Self::Login | Self::Callback | Self::Status | Self::Unknown => "GET",
            Self::Refresh | Self::Logout | Self::Confirm | Self::Shim => "POST",
            Self::User => "DELETE",
        }
    }

    /// From where a browser may be sent here.
    pub(super) fn navigable(self) -> Navigable {
        match self {
            Self::Callback => Navigable::FromAnywhere,
            Self::Login => Navigable::FromSite,
            _ => Navigable::Never,
        }
    }
}

/// The user in `/api/auth/amazon/users/{user_id}`.
pub(super) fn user_in(path: &str) -> Result<UserId, LoginError> {
    let name = percent_decode_str(path.strip_prefix(USERS).unwrap_or_default()).decode_utf8();
    name.ok().and_then(|name| name.parse().ok()).ok_or_else(|| parameter("user_id", UserId::LEGAL))
}

/// A query in which nothing stands twice.
#[derive(Debug)]
pub(super) struct Query(HashMap<String, String>);

/// Which users to list.
#[derive(Debug)]
pub(super) struct Users {
    pub(super) after: String,
    pub(super) limit: usize,
}

impl Query {
    pub(super) fn read(text: &str) -> Result<Self, LoginError> {
        let mut pairs = HashMap::new();
        for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
            if pairs.insert(name.into_owned(), value.into_owned()).is_some() {
                return Err(LoginError::Parameter("A parameter stands twice in the query.".into()));
            }
        }
        Ok(Self(pairs))
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// `user_id`, or the default user.
    pub(super) fn user(&self) -> Result<UserId, LoginError> {
        match self.get("user_id") {
            Some(name) => name.parse().map_err(|_| parameter("user_id", UserId::LEGAL)),
            None => Ok(UserId::default()),
        }
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool, LoginError> {
        match self.get(name) {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(_) => Err(parameter(name, "true or false")),
        }
    }

    pub(super) fn page(&self, most: usize) -> Result<Users, LoginError> {
        let limit = match self.get("limit") {
            Some(limit) => limit.parse().ok().filter(|limit| (1..=most).contains(limit)),
            None => Some(most),
        };
        let limit = limit.ok_or_else(|| parameter("limit", &format!("a number from 1 to {most}")))?;
        Ok(Users { after: self.get("after").unwrap_or_default().to_owned(), limit })
    }
}
