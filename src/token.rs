//! Tokens and what is known about one user's grant. Everything that decides about time is pure: [`Held::next`],
//! [`Held::due`], [`Held::state`].

use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use jiff::{SignedDuration, Timestamp};

use crate::secret::Secret;

/// Longest token accepted, in bytes. LWA's access tokens are at most 2,048 ("Access tokens", Login with Amazon).
const MAX_TOKEN: usize = 4096;

/// Two background renewals of one user are at least this far apart, however short the life that Amazon gives.
const RENEWAL_SPACING: SignedDuration = SignedDuration::from_secs(30);

/// A refused grant is tried again this rarely: an outage of LWA has answered `invalid_grant` for good grants.
const REFUSED_RETRY: SignedDuration = SignedDuration::from_hours(1);

/// First wait after a failed renewal; it doubles with each further failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(500);
/// Longest wait while no living token is held: callers are failing meanwhile.
const BACKOFF_DEAD: Duration = Duration::from_secs(5);
/// Longest wait while a living token is held, and the most that a `Retry-After` of LWA is obeyed.
const BACKOFF_LIVING: Duration = Duration::from_secs(60);

/// An access token, with the header value that carries it.
#[derive(Clone, Debug)]
pub struct AccessToken {
    text: Secret,
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
        let text = visible(text.into())?;
        let bearer = text.header("Bearer").ok_or(BadToken)?;
        Ok(Self { text, bearer })
    }

    /// The token itself, for the store.
    pub fn secret(&self) -> &Secret {
        &self.text
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
    /// How long a consent lasts: grants made on or after 2026-07-30 end 365 days after it, and a refresh does not extend
    /// them ("Refresh tokens", Amazon Ads API).
    pub const CONSENT: SignedDuration = SignedDuration::from_hours(365 * 24);

    /// This grant after a renewal. A missing refresh token keeps the old one (RFC 6749, section 6).
    pub fn renewed(&self, tokens: Tokens, now: Timestamp) -> Self {
        Self {
            refresh_token: tokens.refresh.unwrap_or_else(|| self.refresh_token.clone()),
            access: Some(Access { token: tokens.access, expires_at: later(now, tokens.lifetime) }),
            updated_at: now,
            generation: self.generation + 1,
            ..self.clone()
        }
    }

    /// The access token, while it lives.
    pub fn living(&self, now: Timestamp) -> Option<&Access> {
        self.access.as_ref().filter(|access| now < access.expires_at)
    }

    /// When the consent ends, where its date is known.
    pub fn consent_expires_at(&self) -> Option<Timestamp> {
        self.consented_at.and_then(|at| at.checked_add(Self::CONSENT).ok())
    }
}

/// When tokens are renewed.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// A token with less than this left is renewed at once, when somebody asks for it.
    pub margin: Duration,
    /// In the background a token is renewed this long before its end.
    pub ahead: Duration,
    /// Users not used for this long are renewed on demand only.
    pub idle_after: Duration,
}

/// What is known about one user's grant right now.
#[derive(Clone, Debug)]
pub enum Held {
    /// No grant.
    Nothing,
    /// The last renewal, if there was one, went well.
    Fresh(Arc<Grant>),
    /// The last renewal failed and is tried again. The token of before is served while it lives.
    Failing {
        /// The grant, kept.
        grant: Arc<Grant>,
        /// Why the last renewal failed.
        failure: Failure,
        /// Failures in a row.
        attempts: u32,
        /// Not before this instant is it tried again.
        retry_at: Timestamp,
    },
    /// LWA refused the grant. It is kept, tried again rarely, and the token of before is served while it lives.
    LoginRequired {
        /// The grant, kept.
        grant: Arc<Grant>,
        /// LWA's error code, from a fixed list.
        reason: &'static str,
        /// Not before this instant is it tried again.
        retry_at: Timestamp,
    },
}

/// Why a renewal failed, when the grant itself is not to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A code of a fixed list, such as `unreachable`, `server_error`, `bad_answer`, `invalid_client`: a metric's label
    /// and the status's `last_error`.
    pub code: &'static str,
    /// Whose turn it is.
    pub cure: Cure,
}

/// What ends a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cure {
    /// Trying again.
    Time,
    /// The operator: the client id or secret is wrong.
    Operator,
}

/// How a renewal ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// With this grant.
    Renewed(Arc<Grant>),
    /// With a failure that time or the operator cures.
    Failed {
        /// Which.
        failure: Failure,
        /// How long LWA asked us to wait.
        retry_after: Option<Duration>,
    },
    /// With LWA's refusal of the grant, by its error code.
    Refused(&'static str),
}

/// The states that the status endpoint and the metric `users` tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// More than `refresh.margin` left.
    Fresh,
    /// Less left, renewal under way.
    Expiring,
    /// The last renewal failed, whether the token lives or not.
    Failing,
    /// Not used for `refresh.idle_after`: the grant is good, no living token is kept.
    Idle,
    /// The user has to consent again.
    LoginRequired,
    /// No grant.
    None,
}

impl State {
    /// All states a known user can be in.
    pub const KNOWN: [Self; 5] = [Self::Fresh, Self::Expiring, Self::Failing, Self::Idle, Self::LoginRequired];

    /// The name in JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Expiring => "expiring",
            Self::Failing => "failing",
            Self::Idle => "idle",
            Self::LoginRequired => "login_required",
            Self::None => "none",
        }
    }
}

impl Held {
    /// The grant, in whatever state it is.
    pub fn grant(&self) -> Option<&Arc<Grant>> {
        match self {
            Self::Nothing => None,
            Self::Fresh(grant) | Self::Failing { grant, .. } | Self::LoginRequired { grant, .. } => Some(grant),
        }
    }

    /// The access token, while it lives: what may be sent.
    pub fn living(&self, now: Timestamp) -> Option<&Access> {
        self.grant().and_then(|grant| grant.living(now))
    }

    /// Not before this instant may a renewal be tried, because the last one failed.
    pub fn retry_at(&self) -> Option<Timestamp> {
        match self {
            Self::Nothing | Self::Fresh(_) => None,
            Self::Failing { retry_at, .. } | Self::LoginRequired { retry_at, .. } => Some(*retry_at),
        }
    }

    /// Whether a renewal that a caller asks for has to wait still.
    pub fn backs_off(&self, now: Timestamp) -> bool {
        self.retry_at().is_some_and(|at| now < at)
    }

    /// The state after a renewal ended with `outcome`. `dice` in `0.0..1.0` is the jitter.
    pub fn next(&self, outcome: Outcome, now: Timestamp, dice: f64) -> Self {
        let Some(grant) = self.grant().cloned() else { return Self::Nothing };
        match outcome {
            Outcome::Renewed(grant) => Self::Fresh(grant),
            Outcome::Refused(reason) => Self::LoginRequired { grant, reason, retry_at: now + REFUSED_RETRY },
            Outcome::Failed { failure, retry_after } => {
                let attempts = self.attempts().saturating_add(1);
                // Who asks for no wait at all is not asked again at once.
                let own = backoff(attempts, grant.living(now).is_some(), dice);
                let wait = retry_after.map_or(own, |asked| asked.min(BACKOFF_LIVING).max(own));
                Self::Failing { grant, failure, attempts, retry_at: later(now, wait) }
            }
        }
    }

    /// When the background should renew next; `None`: only when somebody asks. `dice` in `0.0..1.0` spreads users whose
    /// tokens end together.
    pub fn due(&self, policy: Policy, used_at: Timestamp, dice: f64) -> Option<Timestamp> {
        let grant = self.grant()?;
        let wanted = match &grant.access {
            // Spread over a fifth of the time between `ahead` and the token's end, on the early side.
            Some(access) => earlier(access.expires_at, policy.ahead + policy.ahead.mul_f64(0.2 * dice)),
            None => grant.updated_at,
        };
        let due = match self.retry_at() {
            Some(retry_at) => retry_at.max(wanted),
            None if grant.access.is_some() => wanted.max(grant.updated_at + RENEWAL_SPACING),
            None => wanted,
        };
        (due <= later(used_at, policy.idle_after)).then_some(due)
    }

    /// The state as told to users. `used_at` is when a caller last used the grant.
    pub fn state(&self, policy: Policy, used_at: Timestamp, now: Timestamp) -> State {
        match self {
            Self::Nothing => State::None,
            Self::LoginRequired { .. } => State::LoginRequired,
            Self::Failing { .. } => State::Failing,
            Self::Fresh(grant) => match grant.living(now) {
                Some(access) if now < earlier(access.expires_at, policy.margin) => State::Fresh,
                None if now > later(used_at, policy.idle_after) => State::Idle,
                _ => State::Expiring,
            },
        }
    }

    /// Whether the living token should be replaced because little of its life is left. A renewal that ended a moment
    /// ago is not repeated while its token lives, however short that life is.
    pub fn expiring(&self, policy: Policy, now: Timestamp) -> bool {
        self.grant().is_some_and(|grant| match grant.living(now) {
            Some(access) => {
                now >= earlier(access.expires_at, policy.margin) && now >= grant.updated_at + RENEWAL_SPACING
            }
            None => true,
        })
    }

    /// How often in a row renewal failed.
    fn attempts(&self) -> u32 {
        if let Self::Failing { attempts, .. } = self { *attempts } else { 0 }
    }
}

/// Exponential backoff with full jitter.
fn backoff(attempts: u32, living: bool, dice: f64) -> Duration {
    let cap = if living { BACKOFF_LIVING } else { BACKOFF_DEAD };
    let ceiling = BACKOFF_FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(cap);
    ceiling.mul_f64(dice)
}

fn later(at: Timestamp, by: Duration) -> Timestamp {
    at.saturating_add(by).unwrap_or(Timestamp::MAX)
}

fn earlier(at: Timestamp, by: Duration) -> Timestamp {
    at.saturating_sub(by).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy {
        margin: Duration::from_secs(300),
        ahead: Duration::from_secs(900),
        idle_after: Duration::from_secs(7 * 24 * 3600),
    };

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_780_000_000 + seconds).unwrap()
    }

    fn grant(expires: i64) -> Arc<Grant> {
        Arc::new(Grant {
            refresh_token: RefreshToken::new("Atzr|r".to_owned()).unwrap(),
            access: Some(Access { token: AccessToken::new("Atza|a".to_owned()).unwrap(), expires_at: at(expires) }),
            updated_at: at(0),
            consented_at: Some(at(0)),
            used_at: None,
            scope: None,
            generation: 1,
        })
    }

    fn failed(retry_after: Option<u64>) -> Outcome {
        let failure = Failure { code: "server_error", cure: Cure::Time };
        Outcome::Failed { failure, retry_after: retry_after.map(Duration::from_secs) }
    }

    fn tokens(refresh: Option<&str>) -> Tokens {
        Tokens {
            access: AccessToken::new("Atza|new".to_owned()).unwrap(),
            refresh: refresh.map(|text| RefreshToken::new(text.to_owned()).unwrap()),
            lifetime: Duration::from_secs(3600),
            server_time: None,
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
        let before = grant(100);
        let kept = before.renewed(tokens(None), at(50));
        assert_eq!(kept.refresh_token, before.refresh_token);
        assert_eq!((kept.generation, kept.updated_at, kept.consented_at), (2, at(50), before.consented_at));
        assert_eq!(kept.access.unwrap().expires_at, at(3650));
        assert_eq!(before.renewed(tokens(Some("Atzr|n")), at(50)).refresh_token.secret().expose(), "Atzr|n");
    }

    #[test]
    fn a_token_is_dead_from_the_instant_of_its_end() {
        assert!(grant(100).living(at(99)).is_some());
        assert!(grant(100).living(at(100)).is_none());
    }

    #[test]
    fn the_states_are_those_of_the_contract() {
        let state = |held: &Held, now| held.state(POLICY, at(0), at(now)).as_str();
        let fresh = Held::Fresh(grant(3600));
        assert_eq!(state(&Held::Nothing, 0), "none");
        assert_eq!(state(&fresh, 3299), "fresh");
        assert_eq!(state(&fresh, 3300), "expiring");
        assert_eq!(state(&fresh, 4000), "expiring");
        assert_eq!(state(&fresh, 8 * 24 * 3600), "idle");
        assert_eq!(state(&fresh.next(failed(None), at(10), 0.5), 10), "failing");
        assert_eq!(state(&fresh.next(Outcome::Refused("invalid_grant"), at(10), 0.5), 10), "login_required");
    }

    #[test]
    fn a_refused_grant_is_kept_and_tried_again_after_an_hour_at_most_once() {
        let refused = Held::Fresh(grant(3600)).next(Outcome::Refused("invalid_grant"), at(10), 0.0);
        assert!(refused.grant().is_some() && refused.living(at(20)).is_some());
        assert_eq!(refused.retry_at(), Some(at(3610)));
        assert_eq!(refused.due(POLICY, at(0), 0.5), Some(at(3610)));
    }

    #[test]
    fn failures_back_off_as_the_contract_says() {
        let wait = |held: &Held, now: i64| held.retry_at().unwrap().duration_since(at(now)).as_secs_f64();
        let mut living = Held::Fresh(grant(100_000));
        let mut dead = Held::Fresh(grant(-1));
        let mut waits = Vec::new();
        for _ in 0..12 {
            living = living.next(failed(None), at(0), 0.999_999);
            dead = dead.next(failed(None), at(0), 0.999_999);
            waits.push((wait(&living, 0).round(), wait(&dead, 0).round()));
        }
        assert_eq!(waits[..5], [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (4.0, 4.0), (8.0, 5.0)]);
        assert_eq!(waits[11], (60.0, 5.0));
        assert_eq!(wait(&living.next(failed(Some(40)), at(0), 0.0), 0), 40.0);
        assert_eq!(wait(&living.next(failed(Some(9999)), at(0), 0.0), 0), 60.0);
    }

    #[test]
    fn a_retry_after_of_nothing_is_no_leave_to_hammer() {
        let held = Held::Fresh(grant(-1));
        let wait = |seconds| held.next(failed(Some(seconds)), at(0), 0.5).retry_at().unwrap().duration_since(at(0));
        assert_eq!(wait(0), SignedDuration::from_millis(250));
        assert_eq!(wait(7), SignedDuration::from_secs(7));
        assert_eq!(wait(3600), SignedDuration::from_secs(60));
    }

    #[test]
    fn a_short_life_makes_no_storm() {
        let short = Held::Fresh(grant(20));
        assert_eq!(short.due(POLICY, at(0), 0.9), Some(at(30)));
        assert!(!short.expiring(POLICY, at(19)), "it lives, and was renewed a moment ago");
        assert!(short.expiring(POLICY, at(20)), "an expired one is renewed on demand at once");
    }

    #[test]
    fn users_who_do_not_come_are_not_renewed_in_the_background() {
        let held = Held::Fresh(grant(3600));
        assert!(held.due(POLICY, at(-7 * 24 * 3600 + 3600), 0.0).is_some());
        assert_eq!(held.due(POLICY, at(-7 * 24 * 3600), 0.0), None);
    }

    fn outcomes() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            (0u64..100_000).prop_map(|wait| failed(Some(wait))),
            Just(failed(None)),
            Just(Outcome::Refused("invalid_grant")),
            (-10i64..200_000).prop_map(|expires| Outcome::Renewed(grant(expires))),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order: no outcome loses the grant, none takes away a living token, and a wait is
        /// never longer than an hour.
        #[test]
        fn no_outcome_loses_a_grant_or_a_living_token(
            steps in proptest::collection::vec((outcomes(), 0i64..5_000, 0.0f64..1.0), 1..40)
        ) {
            let mut held = Held::Fresh(grant(3600));
            let mut now = 0;
            for (outcome, pause, dice) in steps {
                now += pause;
                let renewed = matches!(outcome, Outcome::Renewed(_));
                let living = held.living(at(now)).is_some();
                let next = held.next(outcome, at(now), dice);
                prop_assert!(next.grant().is_some());
                prop_assert!(renewed || next.living(at(now)).is_some() == living);
                if let Some(retry_at) = next.retry_at() {
                    let wait = retry_at.duration_since(at(now));
                    prop_assert!(wait <= SignedDuration::from_hours(1) && !wait.is_negative());
                }
                held = next;
            }
        }

        /// The background acts before the margin begins, wherever the token's life allows it, and for a user in use
        /// never forgets to.
        #[test]
        fn the_background_is_always_ahead_of_the_margin(expires in 0i64..200_000, dice in 0.0f64..1.0) {
            let due = Held::Fresh(grant(expires)).due(POLICY, at(expires), dice);
            let due = due.expect("a user in use has a plan");
            prop_assert!(due <= at((expires - 900).max(30)));
            prop_assert!(due >= at(30));
        }

        #[test]
        fn nothing_becomes_of_nothing(outcome in outcomes()) {
            prop_assert!(matches!(Held::Nothing.next(outcome, at(0), 0.5), Held::Nothing));
        }
    }
}
