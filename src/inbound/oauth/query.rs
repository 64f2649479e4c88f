//! The parameters of a request to an OAuth endpoint.

use std::collections::HashMap;

use percent_encoding::percent_decode_str;

use super::{LoginError, parameter};
use crate::domain::account::UserId;
use crate::inbound::endpoint::USERS;

/// The user in `/api/auth/amazon/users/{user_id}`.
pub(super) fn user_in(path: &str) -> Result<UserId, LoginError> {
    let name = percent_decode_str(path.strip_prefix(USERS).unwrap_or_default()).decode_utf8();
    name.ok().and_then(|name| name.parse().ok()).ok_or_else(|| parameter("user_id", UserId::LEGAL))
}

/// A query without repeated parameters.
#[derive(Debug)]
pub(super) struct Query(HashMap<String, String>);

/// The page of users to list.
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
                return Err(LoginError::Parameter("A parameter occurs twice in the query.".into()));
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
