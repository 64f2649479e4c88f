//! The errors of the OAuth endpoints, as callers see them.

use std::time::Duration;

use http::HeaderValue;
use http::header::{ALLOW, WWW_AUTHENTICATE};

use super::pages;
use crate::auth::login::LoginFailure;
use crate::auth::tokens::TokenError;
use crate::domain::account::UserId;
use crate::domain::grant::{Remedy, STORE_UNAVAILABLE};
use crate::inbound::admission::Refusal;
use crate::inbound::destination::CALLBACK;
use crate::inbound::problem::{Code, Problem};
use crate::store::StoreError;

/// Why an endpoint responds with an error.
#[derive(Debug)]
pub enum LoginError {
    /// The caller token is missing or wrong.
    Refused(Refusal),
    /// No such endpoint; holds the path that was probably meant.
    NotFound(Option<String>),
    /// A client looks for an authorization server; holds the user whose login it probably needs.
    Discovery(UserId),
    /// A login's code and state at another path than the callback's, which it holds.
    StrayCallback(String),
    /// The endpoint has other methods.
    Method(&'static str),
    /// A parameter is invalid; holds the sentence for the caller.
    Parameter(String),
    /// The user has no grant, or its access token could not be refreshed.
    NoToken(TokenError, UserId),
    /// A forced refresh failed; with the user's status.
    NotRefreshed(TokenError, serde_json::Value),
    /// Too many logins began just now; says after what time there is room.
    TooMany(Duration),
    /// The store failed.
    Store(StoreError),
    /// No region answered when accounts were looked for; holds the reasons.
    NoRegion(String),
    /// The grant belongs to a different Amazon identity than the user's current one.
    Identity,
    /// The state or the pending grant is unknown or has expired; holds the sentence for the caller.
    State(&'static str),
}

impl From<Refusal> for LoginError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl LoginError {
    /// The response for the caller. `login_step` says how a user logs in.
    pub fn problem(self, login_step: impl Fn(&UserId) -> String) -> Problem {
        match self {
            Self::Refused(refusal) => refusal.into(),
            Self::NotFound(meant) => Problem::new(
                Code::NotFound,
                "adsidecar does not send this path to Amazon, and has no endpoint there.",
                meant.map_or_else(
                    || "See the endpoints in config/README.md.".to_owned(),
                    |path| format!("Did you mean {path}? See the endpoints in config/README.md."),
                ),
            ),
            Self::Discovery(user) => Problem::new(
                Code::NotFound,
                "No client registers or authorizes itself here: adsidecar does the OAuth with Amazon.",
                format!("If Amazon's login is missing: {} Then call again, without OAuth.", login_step(&user)),
            ),
            Self::StrayCallback(path) => Problem::new(
                Code::NotFound,
                "A login came back at a path that is not adsidecar's callback; its code was not sent anywhere.",
                format!(
                    "Set amazon.redirect_uri, and the allowed return URL at Amazon, to a URL with the path {CALLBACK} \
                     (configured is {path})."
                ),
            ),
            Self::Method(allow) => {
                Problem::new(Code::MethodNotAllowed, "The endpoint does not have this method.", format!("Use {allow}."))
                    .header(ALLOW, HeaderValue::from_static(allow))
            }
            Self::Parameter(detail) => Problem::new(Code::BadRequest, detail, "Send the parameter as described."),
            Self::NoToken(error, user) => token_problem(error, login_step(&user)),
            Self::NotRefreshed(error, status) => token_problem(error, String::new()).member("user", status),
            Self::TooMany(wait) => Problem::new(
                Code::Throttled,
                "Too many logins began just now, and were not finished.",
                "Start one login per person, and try again after the time in Retry-After.",
            )
            .retry_after(wait),
            Self::Store(_) => Problem::new(
                Code::StoreUnavailable,
                "The store rejected the change.",
                "Try again; if it persists, check adsidecar's log, and the volume of store.path or PostgreSQL.",
            )
            .retry_after(Duration::from_secs(1)),
            Self::NoRegion(failures) => Problem::new(
                Code::UpstreamUnreachable,
                format!("No region of the Amazon Ads API listed profiles ({failures}). What was found before is kept."),
                "Try again later; adsidecar doctor names the cause.",
            ),
            Self::Identity => Problem::new(
                Code::IdentityChanged,
                pages::say(&LoginFailure::Identity),
                "Sign in as the same Amazon user, or start the login with replace=true.",
            ),
            Self::State(detail) => Problem::new(Code::StateInvalid, detail, "Start the login again."),
        }
    }
}

/// The response for a caller whose user has no valid access token.
pub fn token_problem(error: TokenError, login_step: String) -> Problem {
    match error {
        TokenError::LoginRequired { reason } => {
            let detail = match reason {
                "no_grant" => "The user has no Amazon grant here.".to_owned(),
                reason => format!("Login with Amazon rejected the user's grant ({reason})."),
            };
            Problem::new(Code::LoginRequired, detail, login_step)
                .header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"adsidecar\""))
        }
        TokenError::Unavailable { code: STORE_UNAVAILABLE, retry_after, .. } => Problem::new(
            Code::StoreUnavailable,
            "The shared store does not respond, and without it no access token is refreshed.",
            "Try again after the time in Retry-After; if it persists, check adsidecar's log and PostgreSQL.",
        )
        .retry_after(retry_after),
        TokenError::Unavailable { code, remedy, detail, retry_after } => {
            let next_step = match remedy {
                Remedy::Time => "Try again after the time in Retry-After.",
                Remedy::Operator => {
                    "Login with Amazon rejects this client: check amazon.client_id and amazon.client_secret."
                }
            };
            let cause = detail.map(|detail| format!(": {detail}")).unwrap_or_default();
            let detail = format!("The access token could not be refreshed ({code}{cause}).");
            Problem::new(Code::TokenUnavailable, detail, next_step).retry_after(retry_after)
        }
    }
}

pub(super) fn parameter(name: &str, legal: &str) -> LoginError {
    LoginError::Parameter(format!("{name} must be {legal}."))
}
