//! Tokens and what is known about one user's grant. Everything that decides about time is pure: [`GrantState::next`],
//! [`GrantState::due`], [`GrantState::state`].

mod state;

use std::time::Duration;

use http::HeaderValue;
use jiff::{SignedDuration, Timestamp};

use crate::domain::secret::Secret;
pub(crate) use state::backoff;
pub use state::{Failure, GrantState, LiveGrant, Outcome, RefreshPolicy, Remedy, STORE_UNAVAILABLE, State};

/// Longest token accepted, in bytes. LWA's access tokens are at most 2,048 ("Access tokens", Login with Amazon).
const MAX_TOKEN: usize = 4096;

/// An access token, as the header value that carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessToken {
    bearer: HeaderValue,
}

/// A refresh token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefreshToken(Secret);

/// Text that cannot be a token: it is empty, too long, or would not survive a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token is 1 to {MAX_TOKEN} visible ASCII characters")]
pub struct BadToken;

impl AccessToken {
    /// Takes a token of 1 to 4,096 visible ASCII characters.
    pub fn new(text: impl Into<Secret>) -> Result<Self, BadToken> {
        let bearer = visible(text.into())?.header("Bearer").ok_or(BadToken)?;
        Ok(Self { bearer })
    }

    /// The token itself, for the store.
    pub fn expose(&self) -> &str {
        let line = self.bearer.to_str().expect("a token is ASCII");
        line.strip_prefix("Bearer ").expect("made so")
    }

    /// `Bearer <token>`, built once and cheap to clone.
    pub fn bearer(&self) -> &HeaderValue {
        &self.bearer
    }
}

impl RefreshToken {
    /// Takes a token of 1 to 4,096 visible ASCII characters.
    pub fn new(text: impl Into<Secret>) -> Result<Self, BadToken> {
        visible(text.into()).map(Self)
    }

    /// The token itself, for LWA and the store.
    pub fn secret(&self) -> &Secret {
        &self.0
    }
}

fn visible(text: Secret) -> Result<Secret, BadToken> {
    let bytes = text.expose().as_bytes();
    let legal = (1..=MAX_TOKEN).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
    if legal { Ok(text) } else { Err(BadToken) }
}

/// What LWA answered to an exchange or a refresh.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// The new access token.
    pub access: AccessToken,
    /// The refresh token, where the answer held one.
    pub refresh: Option<RefreshToken>,
    /// How long the access token lives.
    pub lifetime: Duration,
    /// What LWA's clock said, to the second.
    pub server_time: Option<Timestamp>,
    /// What was odd about the answer and was put up with: names of a fixed list, for a metric.
    pub oddities: Vec<&'static str>,
}

/// An access token and the wall time of its end.
#[derive(Clone, Debug)]
pub struct Access {
    /// The token.
    pub token: AccessToken,
    /// From this instant on it is never sent.
    pub expires_at: Timestamp,
}

/// All that is known of one Amazon grant; what the store keeps.
#[derive(Clone, Debug)]
pub struct Grant {
    /// What renews it.
    pub refresh_token: RefreshToken,
    /// The refresh token before, until the one that replaced it has renewed once.
    pub previous: Option<RefreshToken>,
    /// The latest access token; absent for a grant that was given to us as a refresh token alone.
    pub access: Option<Access>,
    /// When the tokens last changed.
    pub updated_at: Timestamp,
    /// When a person consented; unknown for grants not made here.
    pub consented_at: Option<Timestamp>,
    /// When a caller last used it, as far as it was written down.
    pub used_at: Option<Timestamp>,
    /// What was consented to, as the callback said; separated by spaces.
    pub scope: Option<String>,
    /// Rises with each stored change.
    pub generation: u64,
}

impl Grant {
    /// How long a consent lasts, and since when: grants made on or after 2026-07-30 end 365 days after it, and a refresh does
    /// not extend them ("Refresh tokens", Amazon Ads API).
    pub const CONSENT: SignedDuration = SignedDuration::from_hours(365 * 24);
    const CONSENT_ENDS_SINCE: Timestamp = Timestamp::constant(1_785_369_600, 0);
    /// This long before its end a consent is told to be ending: time enough to ask a person.
    pub const CONSENT_NOTICE: SignedDuration = SignedDuration::from_hours(30 * 24);

    /// This grant after a renewal. A missing refresh token keeps the old one (RFC 6749, section 6).
    pub fn renewed(&self, tokens: Tokens, now: Timestamp) -> Self {
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

    /// When the consent ends, where its date is known and it ends at all.
    pub fn consent_expires_at(&self) -> Option<Timestamp> {
        let ends = self.consented_at.filter(|at| *at >= Self::CONSENT_ENDS_SINCE);
        ends.and_then(|at| at.checked_add(Self::CONSENT).ok())
    }

    /// How old the consent is, where it ends at all.
    pub fn consent(&self, now: Timestamp) -> Option<ConsentAge> {
        let left = self.consent_expires_at()?.duration_since(now);
        Some(match () {
            () if left <= SignedDuration::ZERO => ConsentAge::Ended,
            () if left <= Self::CONSENT_NOTICE => ConsentAge::Ending,
            () => ConsentAge::Valid,
        })
    }
}

/// Whether a consent is about to end. What is left of it cannot be renewed: the person has to consent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsentAge {
    /// More than 30 days are left.
    Valid,
    /// Less is left: a new login now costs nobody an outage.
    Ending,
    /// The 365 days are over. Login with Amazon refuses the grant from its next renewal on.
    Ended,
}

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
    fn text_that_would_not_survive_a_header_is_no_token() {
        for bad in ["", "a b", "a\r\n", "é", &"x".repeat(MAX_TOKEN + 1)] {
            assert!(AccessToken::new(bad.to_owned()).is_err(), "{bad:?}");
            assert!(RefreshToken::new(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert_eq!(AccessToken::new("Atza|x".to_owned()).unwrap().bearer(), "Bearer Atza|x");
    }

    #[test]
    fn a_missing_refresh_token_keeps_the_old_one() {
        let before = grant(Some(at(0)));
        let kept = before.renewed(tokens(None), at(50));
        assert_eq!(kept.refresh_token, before.refresh_token);
        assert_eq!((kept.generation, kept.updated_at, kept.consented_at), (2, at(50), before.consented_at));
        assert_eq!(kept.access.unwrap().expires_at, at(3650));
    }

    #[test]
    fn a_replaced_refresh_token_is_kept_until_the_new_one_has_renewed_once() {
        let before = grant(Some(at(0)));
        let rotated = before.renewed(tokens(Some("Atzr|n")), at(50));
        assert_eq!(rotated.refresh_token.secret().expose(), "Atzr|n");
        assert_eq!(rotated.previous, Some(before.refresh_token));
        for same in [None, Some("Atzr|n")] {
            assert_eq!(rotated.renewed(tokens(same), at(60)).previous, None);
        }
    }

    #[test]
    fn a_consent_ends_after_a_year_and_says_so_a_month_before() {
        let day = SignedDuration::from_hours(24);
        let consented = at(0);
        let age = |days: i32| grant(Some(consented)).consent(consented + day * days);
        assert_eq!((age(0), age(334)), (Some(ConsentAge::Valid), Some(ConsentAge::Valid)));
        assert_eq!((age(335), age(364)), (Some(ConsentAge::Ending), Some(ConsentAge::Ending)));
        assert_eq!((age(365), age(900)), (Some(ConsentAge::Ended), Some(ConsentAge::Ended)));
        assert_eq!(grant(None).consent(consented), None);
    }

    #[test]
    fn a_consent_of_before_amazon_set_an_end_has_none() {
        let first: Timestamp = "2026-07-30T00:00:00Z".parse().unwrap();
        let ends = |at| grant(Some(at)).consent_expires_at().map(|at| at.to_string());
        assert_eq!(ends(first).as_deref(), Some("2027-07-30T00:00:00Z"));
        assert_eq!(ends(first - SignedDuration::from_secs(1)), None);
    }
}
