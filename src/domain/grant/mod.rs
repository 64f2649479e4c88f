//! Tokens, and the state of one user's grant. Every decision that depends on time is a pure function:
//! [`GrantState::next`], [`GrantState::due`], [`GrantState::state`].

mod state;
mod version;

use std::time::Duration;

use http::HeaderValue;
use jiff::{SignedDuration, Timestamp};

use crate::domain::secret::Secret;
pub(crate) use state::backoff;
pub use state::{Failure, GrantState, LiveGrant, Outcome, RefreshPolicy, Remedy, STORE_UNAVAILABLE, State};
pub use version::{Stored, Verdict, Version};

/// Longest accepted token, in bytes. LWA documents at most 2,048 bytes for an access token ("Access tokens", Login with
/// Amazon).
const MAX_TOKEN: usize = 4096;

/// An access token (RFC 6749, section 1.4), stored as the `Authorization` value that carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessToken {
    bearer: HeaderValue,
}

/// A refresh token (RFC 6749, section 1.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefreshToken(Secret);

/// The text cannot be a token: it is empty, too long, or has characters that a header value cannot carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token is 1 to {MAX_TOKEN} visible ASCII characters")]
pub struct BadToken;

impl AccessToken {
    /// Accepts a token of 1 to 4,096 visible ASCII characters.
    ///
    /// # Errors
    /// Returns [`BadToken`] for any other text.
    pub fn new(text: impl Into<Secret>) -> Result<Self, BadToken> {
        let bearer = visible(text.into())?.header("Bearer").ok_or(BadToken)?;
        Ok(Self { bearer })
    }

    /// Returns the token's text, for the store.
    pub fn expose(&self) -> &str {
        let line = self.bearer.to_str().expect("a token is ASCII");
        line.strip_prefix("Bearer ").expect("`new` put the scheme before the token")
    }

    /// Returns `Bearer <token>`, which is built once and cheap to clone.
    pub fn bearer(&self) -> &HeaderValue {
        &self.bearer
    }
}

impl RefreshToken {
    /// Accepts a token of 1 to 4,096 visible ASCII characters.
    ///
    /// # Errors
    /// Returns [`BadToken`] for any other text.
    pub fn new(text: impl Into<Secret>) -> Result<Self, BadToken> {
        visible(text.into()).map(Self)
    }

    /// Returns the token's text, for LWA and the store.
    pub fn secret(&self) -> &Secret {
        &self.0
    }
}

fn visible(text: Secret) -> Result<Secret, BadToken> {
    let bytes = text.expose().as_bytes();
    let legal = (1..=MAX_TOKEN).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
    if legal { Ok(text) } else { Err(BadToken) }
}

/// The tokens in LWA's response to a code exchange or a refresh.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// The new access token.
    pub access: AccessToken,
    /// The refresh token, if the response contains one.
    pub refresh: Option<RefreshToken>,
    /// Lifetime of the access token (`expires_in`).
    pub lifetime: Duration,
    /// LWA's time from the response's `Date` header, in whole seconds.
    pub server_time: Option<Timestamp>,
    /// Tolerated deviations in the token response, from a fixed list of names; a metric counts them.
    pub oddities: Vec<&'static str>,
}

/// An access token and the wall-clock time at which it expires.
#[derive(Clone, Debug)]
pub struct Access {
    /// The access token.
    pub token: AccessToken,
    /// The token is not sent at or after this time.
    pub expires_at: Timestamp,
}

/// One Amazon grant as the store keeps it: what one consent gave, and when.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The current refresh token.
    pub refresh_token: RefreshToken,
    /// The previous refresh token, kept until its replacement has completed one refresh.
    pub previous: Option<RefreshToken>,
    /// The latest access token; `None` for a grant that was imported as a refresh token only.
    pub access: Option<Access>,
    /// When a token last changed.
    pub updated_at: Timestamp,
    /// When the person consented; `None` for a grant that adsidecar did not obtain itself.
    pub consented_at: Option<Timestamp>,
    /// When a caller last used the grant, as of the last write to the store.
    pub used_at: Option<Timestamp>,
    /// The scopes that the person consented to, as reported by the callback; separated by spaces.
    pub scope: Option<String>,
    /// Incremented by each stored change.
    pub generation: u64,
}

impl Grant {
    /// Lifetime of a consent. A grant made on or after 2026-07-30 expires 365 days after the consent, and a refresh
    /// does not extend it ("Refresh tokens", Amazon Ads API).
    pub const CONSENT: SignedDuration = SignedDuration::from_hours(365 * 24);
    /// Consents given at or after this time (2026-07-30T00:00:00Z) expire; earlier ones do not.
    const CONSENT_EXPIRES_SINCE: Timestamp = Timestamp::constant(1_785_369_600, 0);
    /// How long before its expiry a consent is reported as ending: enough time to ask the person for a new one.
    pub const CONSENT_NOTICE: SignedDuration = SignedDuration::from_hours(30 * 24);

    /// Returns this grant after a refresh at `now` that returned `tokens`. If the response contains no refresh token,
    /// the current one stays in use (RFC 6749, section 6).
    pub fn refreshed(&self, tokens: Tokens, now: Timestamp) -> Self {
        let rotated = tokens.refresh.filter(|new| *new != self.refresh_token);
        Self {
            previous: rotated.is_some().then(|| self.refresh_token.clone()),
            refresh_token: rotated.unwrap_or_else(|| self.refresh_token.clone()),
            access: Some(Access { token: tokens.access, expires_at: later(now, tokens.lifetime) }),
            updated_at: now,
            generation: self.generation + 1,
            ..self.clone()
        }
    }

    /// Returns when the consent expires, or `None` if its date is unknown or it does not expire.
    pub fn consent_expires_at(&self) -> Option<Timestamp> {
        Self::consent_expires(self.consented_at)
    }

    /// Returns when a consent given at `consented_at` expires, or `None` if its date is unknown or it does not expire.
    pub fn consent_expires(consented_at: Option<Timestamp>) -> Option<Timestamp> {
        let expires = consented_at.filter(|at| *at >= Self::CONSENT_EXPIRES_SINCE);
        expires.and_then(|at| at.checked_add(Self::CONSENT).ok())
    }

    /// Returns how close the consent is to its expiry, or `None` if its date is unknown or it does not expire.
    pub fn consent(&self, now: Timestamp) -> Option<ConsentAge> {
        let left = self.consent_expires_at()?.duration_since(now);
        Some(match () {
            () if left <= SignedDuration::ZERO => ConsentAge::Ended,
            () if left <= Self::CONSENT_NOTICE => ConsentAge::Ending,
            () => ConsentAge::Valid,
        })
    }
}

/// How close a consent is to its expiry. A refresh does not extend a consent: the person has to consent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsentAge {
    /// More than 30 days remain.
    Valid,
    /// At most 30 days remain. A new login before the expiry causes no outage.
    Ending,
    /// The 365 days have passed. Login with Amazon rejects the grant at its next refresh.
    Ended,
}

/// `at + by`, or the latest representable time if that overflows.
fn later(at: Timestamp, by: Duration) -> Timestamp {
    at.saturating_add(by).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_790_000_000 + seconds).unwrap()
    }

    fn tokens(refresh: Option<&str>) -> Tokens {
        Tokens {
            access: AccessToken::new("Atza|new".to_owned()).unwrap(),
            refresh: refresh.map(|text| RefreshToken::new(text.to_owned()).unwrap()),
            lifetime: Duration::from_secs(3600),
            server_time: None,
            oddities: Vec::new(),
        }
    }

    fn grant(consented_at: Option<Timestamp>) -> Grant {
        Grant {
            refresh_token: RefreshToken::new("Atzr|r".to_owned()).unwrap(),
            previous: None,
            access: None,
            updated_at: at(0),
            consented_at,
            used_at: None,
            scope: None,
            generation: 1,
        }
    }

    #[test]
    fn text_that_a_header_cannot_carry_is_rejected_as_a_token() {
        for bad in ["", "a b", "a\r\n", "é", &"x".repeat(MAX_TOKEN + 1)] {
            assert!(AccessToken::new(bad.to_owned()).is_err(), "{bad:?}");
            assert!(RefreshToken::new(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert_eq!(AccessToken::new("Atza|x".to_owned()).unwrap().bearer(), "Bearer Atza|x");
    }

    #[test]
    fn a_missing_refresh_token_keeps_the_old_one() {
        let before = grant(Some(at(0)));
        let kept = before.refreshed(tokens(None), at(50));
        assert_eq!(kept.refresh_token, before.refresh_token);
        assert_eq!((kept.generation, kept.updated_at, kept.consented_at), (2, at(50), before.consented_at));
        assert_eq!(kept.access.unwrap().expires_at, at(3650));
    }

    #[test]
    fn a_replaced_refresh_token_is_kept_until_the_new_one_has_refreshed_once() {
        let before = grant(Some(at(0)));
        let rotated = before.refreshed(tokens(Some("Atzr|n")), at(50));
        assert_eq!(rotated.refresh_token.secret().expose(), "Atzr|n");
        assert_eq!(rotated.previous, Some(before.refresh_token));
        for same in [None, Some("Atzr|n")] {
            assert_eq!(rotated.refreshed(tokens(same), at(60)).previous, None);
        }
    }

    #[test]
    fn a_consent_expires_after_365_days_and_is_ending_30_days_earlier() {
        let day = SignedDuration::from_hours(24);
        let consented = at(0);
        let age = |days: i32| grant(Some(consented)).consent(consented + day * days);
        assert_eq!((age(0), age(334)), (Some(ConsentAge::Valid), Some(ConsentAge::Valid)));
        assert_eq!((age(335), age(364)), (Some(ConsentAge::Ending), Some(ConsentAge::Ending)));
        assert_eq!((age(365), age(900)), (Some(ConsentAge::Ended), Some(ConsentAge::Ended)));
        assert_eq!(grant(None).consent(consented), None);
    }

    #[test]
    fn a_consent_given_before_2026_07_30_does_not_expire() {
        let first: Timestamp = "2026-07-30T00:00:00Z".parse().unwrap();
        let ends = |at| grant(Some(at)).consent_expires_at().map(|at| at.to_string());
        assert_eq!(ends(first).as_deref(), Some("2027-07-30T00:00:00Z"));
        assert_eq!(ends(first - SignedDuration::from_secs(1)), None);
    }
}
