//! The parameters of a request to an OAuth endpoint.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, Method};
use http_body::Body as _;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{LoginError, parameter};
use crate::domain::account::UserId;
use crate::inbound::destination::{Endpoint, USERS};
use crate::inbound::route::is_selecting;

/// The user in `/api/auth/amazon/users/{user_id}`.
pub(super) fn user_in(path: &str) -> Result<UserId, LoginError> {
    let name = percent_decode_str(path.strip_prefix(USERS).unwrap_or_default()).decode_utf8();
    name.ok().and_then(|name| name.parse().ok()).ok_or_else(|| parameter("user_id", UserId::LEGAL))
}

/// The parameters of a request: each one known to the endpoint, and none repeated.
#[derive(Debug)]
pub(super) struct Query(HashMap<String, String>);

/// Maximum size of a request body with parameters, in bytes: a user id and some punctuation.
const MAX_BODY: usize = 4 << 10;
/// How long to wait for such a body: it arrives with its head.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The page of users to list.
#[derive(Debug)]
pub(super) struct Users {
    pub(super) after: String,
    pub(super) limit: usize,
}

impl Query {
    /// Reads the query of a request to `endpoint`, and the body if it is a `POST`: a form or a JSON object, as people
    /// send them. What names no parameter of the endpoint is refused: it may name the user that the caller means.
    pub(super) async fn read(endpoint: Endpoint, parts: &Parts, body: Incoming) -> Result<Self, LoginError> {
        let known = endpoint.parameters();
        let mut query = Self::parse(parts.uri.query().unwrap_or_default(), known)?;
        // Amazon chooses what it sends to the callback, and SDKs what they send to the token endpoint.
        let Some(known) = known else { return Ok(query) };
        Self::check_headers(&parts.headers)?;
        let in_body = Self::read_body(endpoint, known, &parts.headers, body).await?;
        for (name, value) in in_body.0 {
            if query.get(&name).is_some_and(|in_query| in_query != value) {
                return Err(LoginError::Parameter(format!("{name} differs between the query and the body.")));
            }
            query.0.insert(name, value);
        }
        Ok(query)
    }

    /// Reads a query or a form. `known` are the legal names; `None`: any.
    pub(super) fn parse(text: &str, known: Option<&[&str]>) -> Result<Self, LoginError> {
        let mut query = Self(HashMap::new());
        for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
            query.add(known, &name, value.into_owned())?;
        }
        Ok(query)
    }

    fn add(&mut self, known: Option<&[&str]>, name: &str, value: String) -> Result<(), LoginError> {
        if known.is_some_and(|known| !known.contains(&name)) {
            return Err(unknown_parameter(name, known.unwrap_or_default()));
        }
        if self.0.insert(name.to_owned(), value).is_some() {
            return Err(LoginError::Parameter(format!("The parameter {} is repeated.", shown(name))));
        }
        Ok(())
    }

    /// Refuses the headers that select an account or a user on requests to Amazon: here `user_id` does that.
    fn check_headers(headers: &HeaderMap) -> Result<(), LoginError> {
        let selecting = headers.keys().find(|name| is_selecting(name.as_str()));
        selecting.map_or(Ok(()), |name| {
            Err(LoginError::Parameter(format!("The header {name} means nothing here; name the user in user_id.")))
        })
    }

    async fn read_body(
        endpoint: Endpoint,
        known: &[&str],
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<Self, LoginError> {
        let mut query = Self(HashMap::new());
        let refused = |text: &str| LoginError::Parameter(text.to_owned());
        if body.is_end_stream() {
            return Ok(query);
        }
        let body = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
        let body = body.map_err(|_| refused("The body did not arrive within 10 seconds."))?;
        let body = body.map_err(|_| refused("The body is longer than 4 KiB, or broke off."))?.to_bytes();
        if body.is_empty() {
            return Ok(query);
        }
        if endpoint.method() != Method::POST {
            return Err(refused("This endpoint takes no body; send its parameters in the query."));
        }
        let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            "application/x-www-form-urlencoded" => {
                let text = std::str::from_utf8(&body).map_err(|_| refused("The body is not UTF-8."))?;
                query = Self::parse(text, Some(known))?;
            }
            "application/json" => {
                let object: JsonObject =
                    serde_json::from_slice(&body).map_err(|_| refused("The body is not a JSON object of strings."))?;
                for (name, value) in object.0 {
                    query.add(Some(known), &name, value)?;
                }
            }
            _ => return Err(refused("The body is neither a form (application/x-www-form-urlencoded) nor JSON.")),
        }
        Ok(query)
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

/// A JSON object of strings, with its repeated members.
struct JsonObject(Vec<(String, String)>);

impl<'de> Deserialize<'de> for JsonObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = JsonObject;

            fn expecting(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
                text.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<JsonObject, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(JsonObject(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

fn unknown_parameter(name: &str, known: &[&str]) -> LoginError {
    let takes = match known {
        [] => "takes no parameters".to_owned(),
        known => format!("takes {}", known.join(", ")),
    };
    LoginError::Parameter(format!("Unknown parameter {}; this endpoint {takes}.", shown(name)))
}

/// A name as it may stand in an error: nothing that a caller could use to write into a log or a page.
fn shown(name: &str) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || "_-.".contains(*c);
    let text: String = name.chars().filter(plain).take(40).collect();
    if text.is_empty() { "without a name".to_owned() } else { text }
}
