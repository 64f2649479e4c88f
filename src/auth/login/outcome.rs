//! How the start and the end of a login can turn out.

use std::time::Duration;

use crate::auth::tokens::Status;
use crate::domain::account::{Region, UserId};
use crate::domain::secret::Secret;
use crate::store::StoreError;

/// Why a login could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The URL of the consent page is invalid.
    #[error(transparent)]
    Page(#[from] url::ParseError),
    /// Rate limit exceeded; holds the time until the next login is allowed.
    #[error("too many logins were started in a short time")]
    TooMany(Duration),
    /// The shared store failed.
    #[error(transparent)]
    Store(StoreError),
}

/// How the callback of a login ended.
#[derive(Clone, Debug)]
pub struct LoginEnded {
    /// The result.
    pub outcome: Result<LoginOutcome, LoginFailure>,
    /// The login's `return_to`, if the state was valid.
    pub return_to: Option<String>,
    /// How the person goes on, if the login failed.
    pub again: Again,
}

/// How the person whose login failed can try again. No user is guessed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Again {
    /// Start a login of this user, at the consent page of this region: the browser that ended the login started it.
    As(UserId, Region),
    /// Start a login. Whose is not known.
    Unknown,
    /// Send the same callback again: it consumed nothing.
    Callback,
    /// Go back to the program that started the login, or nothing is left to do.
    Elsewhere,
}

impl LoginEnded {
    /// The end of a callback that consumed no login. `begun` is what the browser's cookie for this state says, if the
    /// login is not pending any more.
    pub(super) fn without_login(failure: LoginFailure, begun: Option<(UserId, Region)>) -> Self {
        let again = match (&failure, begun) {
            (LoginFailure::Store, _) => Again::Callback,
            (LoginFailure::Expired, Some((user, region))) => Again::As(user, region),
            _ => Again::Unknown,
        };
        Self { outcome: Err(failure), return_to: None, again }
    }
}

impl From<LoginFailure> for LoginEnded {
    fn from(failure: LoginFailure) -> Self {
        Self::without_login(failure, None)
    }
}

/// The result of a successful login.
#[derive(Clone, Debug)]
pub enum LoginOutcome {
    /// The grant is in use.
    Stored(Box<Status>),
    /// The grant is pending: the app has to confirm it, with this one-time id.
    Pending(Secret),
}

/// Why a login failed; [`LoginFailure::code`] is the callback's `error`.
#[derive(Clone, Debug)]
pub enum LoginFailure {
    /// Amazon's own error, mapped to the fixed list of codes.
    Amazon(&'static str),
    /// The state is missing, unknown or expired.
    Expired,
    /// The login was started in another browser, or its cookie is missing.
    State,
    /// The store failed before anything was consumed.
    Store,
    /// A program's login whose callback was delivered before.
    Completed,
    /// LWA returned no grant for the code.
    Exchange,
    /// The grant belongs to a different Amazon identity than the user's current one.
    Identity,
}

impl LoginFailure {
    /// The failure for the callback's `error`.
    pub(super) fn of_amazon(error: &str) -> Self {
        Self::Amazon(known_error(error))
    }

    /// The failure for an error of the store, which it logs.
    pub(super) fn of_store(error: StoreError) -> Self {
        tracing::error!(%error, "the store failed during a login callback: the user has to try again");
        Self::Store
    }

    /// The callback's `error` code: one of a fixed list.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Amazon(code) => code,
            Self::Expired | Self::State | Self::Completed => "state_invalid",
            Self::Store => "temporarily_unavailable",
            Self::Exchange => "exchange_failed",
            Self::Identity => "identity_changed",
        }
    }
}

/// Amazon's `error`, if it is on the list of codes we pass on, else `other`.
fn known_error(error: &str) -> &'static str {
    let known = ["access_denied", "invalid_scope", "server_error", "temporarily_unavailable"];
    known.into_iter().find(|known| *known == error).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_outside_the_list_are_other() {
        assert_eq!(known_error("<script>"), "other");
        assert_eq!(known_error("unauthorized_client"), "other");
        assert_eq!(known_error("access_denied"), "access_denied");
    }
}
