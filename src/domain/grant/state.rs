//! The in-memory state of one user's grant, and its transitions.
//!
//! Every clock that says something about a token limits its lifetime ([`LiveGrant::remaining`]). All pacing (backoff,
//! spacing, idleness) uses the monotonic clock, so a step of the wall clock neither delays refreshes nor causes a burst
//! of them.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{Access, AccessToken, Grant};
use crate::domain::clock_reading::ClockReading;

/// Shortest time between two background refreshes of one user, however short a lifetime Amazon issues.
const REFRESH_SPACING: SignedDuration = SignedDuration::from_secs(30);

/// Time until a rejected grant is tried again. It is tried again at all because LWA has returned `invalid_grant` for
/// good grants during an outage.
const REJECTED_RETRY: SignedDuration = SignedDuration::from_hours(1);

/// Longest wait after the first failed refresh; it doubles with each further failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(500);
/// Longest wait while the user has no valid token: callers get errors in the meantime.
const BACKOFF_WITHOUT_TOKEN: Duration = Duration::from_secs(5);
/// Longest wait while the user has a valid token, and the longest `Retry-After` of LWA that is honored.
const BACKOFF_WITH_TOKEN: Duration = Duration::from_secs(60);

/// When tokens are refreshed.
#[derive(Clone, Copy, Debug)]
pub struct RefreshPolicy {
    /// `refresh.margin`: a request that finds less than this remaining triggers a refresh.
    pub margin: Duration,
    /// The background refreshes a token this long before it expires.
    pub ahead: Duration,
    /// `refresh.idle_after`: a user unused for this long is refreshed on demand only.
    pub idle_after: Duration,
}

/// A grant held in memory. Besides the wall-clock expiry that [`Grant`] has, it limits the token by the monotonic
/// clock.
#[derive(Clone, Debug)]
pub struct LiveGrant {
    grant: Grant,
    /// The uptime at which a token last changed.
    since: SignedDuration,
    /// The token is not sent at or after this uptime, whatever the wall clock says.
    until: SignedDuration,
    /// Whether the token was issued to this process. Any other token's expiry was computed by a clock that may have
    /// been wrong, or is read by one that is wrong now.
    ours: bool,
}

impl LiveGrant {
    /// Wraps a grant that came from the store or from a login.
    pub fn loaded(grant: Grant, now: ClockReading) -> Self {
        let life = |access: &Access| {
            // However wrong the clock is now, the remaining lifetime is at most the whole lifetime.
            let whole = access.expires_at.duration_since(grant.updated_at);
            now.uptime.saturating_add(access.expires_at.duration_since(now.wall).min(whole))
        };
        let until = grant.access.as_ref().map_or(now.uptime, life);
        Self { since: now.uptime.min(now.uptime_at(grant.updated_at)), until, ours: false, grant }
    }

    /// Wraps a grant whose token this process requested at `requested`.
    pub fn issued(grant: Grant, requested: ClockReading) -> Self {
        let until = grant.access.as_ref().map_or(requested.uptime, |access| requested.uptime_at(access.expires_at));
        Self { since: requested.uptime, until, ours: true, grant }
    }

    /// Returns the token's remaining lifetime by the clock that allows the least; negative once it has expired, `None`
    /// if the grant has no access token.
    ///
    /// Each clock covers what another misses: the wall clock advances while the machine sleeps, the monotonic clock
    /// advances when the wall clock is set back, and Amazon's clock is the one that decides.
    pub fn remaining(&self, now: ClockReading) -> Option<SignedDuration> {
        let expires_at = self.grant.access.as_ref()?.expires_at;
        fail_point!("clock_wall_alone", |_| Some(expires_at.duration_since(now.wall)));
        let left = expires_at.duration_since(now.wall).min(self.until.saturating_sub(now.uptime));
        let by_amazon = now.amazon.filter(|_| !self.ours).map(|amazon| expires_at.duration_since(amazon));
        Some(by_amazon.map_or(left, |by_amazon| by_amazon.min(left)))
    }

    /// Returns the age of the tokens, or `None` if they were issued to this process.
    pub fn age_if_foreign(&self, now: ClockReading) -> Option<SignedDuration> {
        (!self.ours).then(|| now.uptime.saturating_sub(self.since))
    }

    /// Returns the access token if it is still valid, and so may be sent.
    pub fn valid_token(&self, now: ClockReading) -> Option<&AccessToken> {
        self.remaining(now).filter(|remaining| remaining.is_positive())?;
        self.grant.access.as_ref().map(|access| &access.token)
    }

    /// Returns the wall-clock time at which the token expires, assuming that the clock is not stepped until then.
    pub fn expires_at(&self, now: ClockReading) -> Option<Timestamp> {
        let stored = self.grant.access.as_ref()?.expires_at;
        let computed = now.wall_at(now.uptime.saturating_add(self.remaining(now)?));
        // Prefer the stored time unless it has become wrong. The tolerance is needed because two clocks are never read
        // at exactly the same instant.
        let wrong = stored.duration_since(computed) > SignedDuration::from_secs(1);
        Some(if wrong { computed } else { stored })
    }
}

impl std::ops::Deref for LiveGrant {
    type Target = Grant;

    fn deref(&self) -> &Grant {
        &self.grant
    }
}

impl Grant {
    /// Returns the state of a grant that is in the store and that no running process holds.
    pub fn state(&self, policy: RefreshPolicy, now: Timestamp) -> State {
        let now = ClockReading { wall: now, uptime: SignedDuration::ZERO, amazon: None };
        let used = now.uptime_at(self.used_at.unwrap_or(self.updated_at));
        GrantState::Fresh(Arc::new(LiveGrant::loaded(self.clone(), now))).state(policy, used, now)
    }

    /// Returns when the background should refresh this grant next, by the wall clock, for a schedule that several
    /// processes share; `None` if the user is idle by then. `jitter`, random in `0.0..1.0`, spreads users whose tokens
    /// expire together.
    pub fn due_at(&self, policy: RefreshPolicy, jitter: f64) -> Option<Timestamp> {
        let due = match &self.access {
            Some(access) => {
                let ahead = signed(policy.ahead + policy.ahead.mul_f64(0.2 * jitter));
                let wanted = access.expires_at.checked_sub(ahead).unwrap_or(Timestamp::MIN);
                wanted.max(self.updated_at.checked_add(REFRESH_SPACING).unwrap_or(Timestamp::MAX))
            }
            None => self.updated_at,
        };
        let idle_at = self.used_at.unwrap_or(self.updated_at).checked_add(signed(policy.idle_after));
        idle_at.map_or(true, |idle_at| due <= idle_at).then_some(due)
    }
}

/// The current state of one user's grant.
#[derive(Clone, Debug)]
pub enum GrantState {
    /// The user has no grant.
    Nothing,
    /// The last refresh succeeded, or none was attempted yet.
    Fresh(Arc<LiveGrant>),
    /// The last refresh failed and will be retried. The previous token is used until it expires.
    Failing {
        /// The grant as before the failure.
        grant: Arc<LiveGrant>,
        /// Why the last refresh failed.
        failure: Failure,
        /// Number of consecutive failures.
        attempts: u32,
        /// The uptime of the next attempt, at the earliest.
        retry_at: SignedDuration,
    },
    /// LWA rejected the grant. The grant is kept and retried hourly, and the previous token is used until it expires.
    LoginRequired {
        /// The grant as before the rejection.
        grant: Arc<LiveGrant>,
        /// LWA's error code, from a fixed list.
        reason: &'static str,
        /// The uptime of the next attempt, at the earliest.
        retry_at: SignedDuration,
    },
}

/// Why a refresh failed for a reason other than the grant itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A code from a fixed list, such as `unreachable`, `server_error`, `bad_answer`, `invalid_client`. It is a metric
    /// label and the `last_error` of the status endpoint.
    pub code: &'static str,
    /// What has to happen before a refresh can succeed.
    pub remedy: Remedy,
    /// What happened, for the log and for people, where the code does not say it all. Never a secret.
    pub detail: Option<Arc<str>>,
}

/// The failure code for an unreachable shared store: without the store, no process can tell whether another one is
/// refreshing the same grant.
pub const STORE_UNAVAILABLE: &str = "store_unavailable";

/// What resolves a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// A later retry.
    Time,
    /// A change by the operator: the client id or secret is wrong.
    Operator,
}

/// The result of a refresh.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The refresh succeeded and produced this grant.
    Refreshed(Arc<LiveGrant>),
    /// The refresh failed for a reason that a retry or the operator resolves.
    Failed {
        /// Code and remedy of the failure.
        failure: Failure,
        /// LWA's `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// LWA rejected the grant with this error code.
    Rejected(&'static str),
}

/// The state of a user as reported by the status endpoint and the metric `users`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The token has more than `refresh.margin` of its lifetime remaining.
    Fresh,
    /// The token has less than that remaining or has expired, and a refresh is due or running.
    Expiring,
    /// The last refresh failed, whether or not the token is still valid.
    Failing,
    /// No request for `refresh.idle_after`: the grant is good, but no valid token is kept.
    Idle,
    /// The user has to consent again.
    LoginRequired,
    /// The user has no grant.
    None,
}

impl State {
    /// Every state of a user that has a grant.
    pub const KNOWN: [Self; 5] = [Self::Fresh, Self::Expiring, Self::Failing, Self::Idle, Self::LoginRequired];

    /// The state's name in JSON and metrics.
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

    /// The sort key for a person: users that have to log in come first, then those that may have to soon.
    pub fn urgency(self) -> u8 {
        match self {
            Self::LoginRequired => 0,
            Self::Failing => 1,
            Self::Expiring => 2,
            Self::Fresh => 3,
            Self::Idle => 4,
            Self::None => 5,
        }
    }
}

impl GrantState {
    /// Returns the grant, whatever its state.
    pub fn grant(&self) -> Option<&Arc<LiveGrant>> {
        match self {
            Self::Nothing => None,
            Self::Fresh(grant) | Self::Failing { grant, .. } | Self::LoginRequired { grant, .. } => Some(grant),
        }
    }

    /// Returns the access token if it is still valid, and so may be sent.
    pub fn valid_token(&self, now: ClockReading) -> Option<&AccessToken> {
        self.grant().and_then(|grant| grant.valid_token(now))
    }

    /// Returns the uptime before which no refresh may be tried, or `None` if the last one did not fail.
    pub fn retry_at(&self) -> Option<SignedDuration> {
        match self {
            Self::Nothing | Self::Fresh(_) => None,
            Self::Failing { retry_at, .. } | Self::LoginRequired { retry_at, .. } => Some(*retry_at),
        }
    }

    /// Whether a refresh is held back at `now` because the last one failed.
    pub fn backs_off(&self, now: ClockReading) -> bool {
        self.retry_at().is_some_and(|at| now.uptime < at)
    }

    /// Whether the state holds `generation` of the grant. A result computed for another generation is dropped, so a
    /// logout or a new login wins over a running refresh.
    pub fn is_of(&self, generation: u64) -> bool {
        self.grant().is_some_and(|grant| grant.generation == generation)
    }

    /// Returns the state after a refresh ended with `outcome`. `jitter` is random in `0.0..1.0`.
    pub fn next(&self, outcome: Outcome, now: ClockReading, jitter: f64) -> Self {
        let Some(grant) = self.grant().cloned() else { return Self::Nothing };
        match outcome {
            Outcome::Refreshed(grant) => Self::Fresh(grant),
            Outcome::Rejected(reason) => {
                Self::LoginRequired { grant, reason, retry_at: now.uptime.saturating_add(REJECTED_RETRY) }
            }
            Outcome::Failed { failure, retry_after } => {
                let attempts = self.attempts().saturating_add(1);
                // A `Retry-After` can lengthen our own backoff but not shorten it, so `Retry-After: 0` causes no burst.
                let own = backoff(attempts, grant.valid_token(now).is_some(), jitter);
                let wait = retry_after.map_or(own, |wanted| wanted.min(BACKOFF_WITH_TOKEN).max(own));
                Self::Failing { grant, failure, attempts, retry_at: now.uptime.saturating_add(signed(wait)) }
            }
        }
    }

    /// Returns the uptime at which the background should refresh next, or `None` if the user is idle and is refreshed
    /// on demand only. `used` is the uptime at which a caller last used the grant. `jitter`, random in `0.0..1.0`,
    /// spreads users whose tokens expire together.
    pub fn due(
        &self,
        policy: RefreshPolicy,
        used: SignedDuration,
        now: ClockReading,
        jitter: f64,
    ) -> Option<SignedDuration> {
        let grant = self.grant()?;
        let wanted = match grant.remaining(now) {
            // Refresh earlier than `ahead` by up to a fifth of it.
            Some(left) => {
                let ahead = policy.ahead + policy.ahead.mul_f64(0.2 * jitter);
                now.uptime.saturating_add(left).saturating_sub(signed(ahead))
            }
            None => grant.since,
        };
        let due = match self.retry_at() {
            // Also if its token is valid for long: a failed forced refresh must not be forgotten.
            Some(retry_at) => retry_at,
            None if grant.access.is_some() => wanted.max(grant.since.saturating_add(REFRESH_SPACING)),
            None => wanted,
        };
        (due <= used.saturating_add(signed(policy.idle_after))).then_some(due)
    }

    /// Returns the state to report. `used` is the uptime at which a caller last used the grant.
    pub fn state(&self, policy: RefreshPolicy, used: SignedDuration, now: ClockReading) -> State {
        match self {
            Self::Nothing => State::None,
            Self::LoginRequired { .. } => State::LoginRequired,
            Self::Failing { .. } => State::Failing,
            Self::Fresh(grant) => match grant.remaining(now).filter(|remaining| remaining.is_positive()) {
                Some(remaining) if remaining > signed(policy.margin) => State::Fresh,
                None if now.uptime > used.saturating_add(signed(policy.idle_after)) => State::Idle,
                _ => State::Expiring,
            },
        }
    }

    /// Whether a request should trigger a refresh: the token has expired, or at most `policy.margin` remains. A refresh
    /// is not repeated within 30 s of the previous one while its token is valid, however short the token's lifetime is.
    pub fn expiring(&self, policy: RefreshPolicy, now: ClockReading) -> bool {
        self.grant().is_some_and(|grant| match grant.remaining(now).filter(|remaining| remaining.is_positive()) {
            Some(remaining) => {
                remaining <= signed(policy.margin) && now.uptime >= grant.since.saturating_add(REFRESH_SPACING)
            }
            None => true,
        })
    }

    /// Returns the number of consecutive failed refreshes.
    pub fn attempts(&self) -> u32 {
        if let Self::Failing { attempts, .. } = self { *attempts } else { 0 }
    }
}

/// Exponential backoff with full jitter: `jitter`, random in `0.0..1.0`, scales the whole wait. `has_token` tells
/// whether a valid token can be used while waiting.
pub(crate) fn backoff(attempts: u32, has_token: bool, jitter: f64) -> Duration {
    let cap = if has_token { BACKOFF_WITH_TOKEN } else { BACKOFF_WITHOUT_TOKEN };
    let ceiling = BACKOFF_FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(cap);
    ceiling.mul_f64(jitter)
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::RefreshToken;
    use super::*;

    const POLICY: RefreshPolicy = RefreshPolicy {
        margin: Duration::from_secs(300),
        ahead: Duration::from_secs(900),
        idle_after: Duration::from_secs(7 * 24 * 3600),
    };

    fn secs(seconds: i64) -> SignedDuration {
        SignedDuration::from_secs(seconds)
    }

    fn wall(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_790_000_000 + seconds).unwrap()
    }

    /// A reading from clocks that agree.
    fn at(seconds: i64) -> ClockReading {
        ClockReading { wall: wall(seconds), uptime: secs(seconds), amazon: None }
    }

    fn stored(updated: i64, expires: i64) -> Grant {
        Grant {
            refresh_token: RefreshToken::new("Atzr|r".to_owned()).unwrap(),
            previous: None,
            access: Some(Access { token: AccessToken::new("Atza|a".to_owned()).unwrap(), expires_at: wall(expires) }),
            updated_at: wall(updated),
            consented_at: Some(wall(0)),
            used_at: None,
            scope: None,
            generation: 1,
        }
    }

    /// A grant that this process refreshed at 0.
    fn grant(expires: i64) -> Arc<LiveGrant> {
        Arc::new(LiveGrant::issued(stored(0, expires), at(0)))
    }

    fn failed(retry_after: Option<u64>) -> Outcome {
        let failure = Failure { code: "server_error", remedy: Remedy::Time, detail: None };
        Outcome::Failed { failure, retry_after: retry_after.map(Duration::from_secs) }
    }

    #[test]
    fn a_token_is_invalid_from_the_instant_of_its_expiry() {
        assert!(grant(100).valid_token(at(99)).is_some());
        assert!(grant(100).valid_token(at(100)).is_none());
    }

    #[test]
    fn the_clock_that_allows_the_least_lifetime_decides() {
        let fresh = grant(3600);
        let reading = |wall_: i64, uptime| ClockReading { wall: wall(wall_), uptime: secs(uptime), amazon: None };
        assert_eq!(fresh.remaining(reading(600, 600)), Some(secs(3000)));
        assert_eq!(
            fresh.remaining(reading(7200, 600)),
            Some(secs(-3600)),
            "the clock was stepped forward, or the machine slept"
        );
        assert_eq!(fresh.remaining(reading(-864_000, 3500)), Some(secs(100)), "the clock was set back by days");
        assert_eq!(fresh.expires_at(reading(-864_000, 3500)), Some(wall(-864_000 + 100)));
        assert_eq!(fresh.expires_at(at(600)), Some(wall(3600)));
    }

    #[test]
    fn a_stored_token_outlives_neither_its_lifetime_nor_amazons_clock() {
        // Stored under a clock that was ten days ahead, or loaded under one that is ten days behind.
        let loaded = LiveGrant::loaded(stored(864_000, 867_600), at(0));
        assert_eq!(loaded.remaining(at(0)), Some(secs(3600)));
        assert!(loaded.valid_token(at(3600)).is_none());
        // Loaded under a clock that is half an hour behind: the `Date` of Amazon's next response reveals it.
        let loaded = LiveGrant::loaded(stored(0, 3600), at(1800));
        let dated = |amazon| ClockReading { amazon: Some(wall(amazon)), ..at(1800) };
        assert_eq!(loaded.remaining(at(1800)), Some(secs(1800)));
        assert_eq!(loaded.remaining(dated(3600)), Some(secs(0)));
        assert_eq!(loaded.remaining(dated(0)), Some(secs(1800)), "Amazon's clock never extends a lifetime");
        // A token issued to this process is limited by its own clocks: a wrong `Date` causes no burst of refreshes.
        assert_eq!(grant(3600).remaining(dated(900_000)), Some(secs(1800)));
    }

    #[test]
    fn the_states_are_the_documented_ones() {
        let state = |state: &GrantState, now| state.state(POLICY, secs(0), at(now)).as_str();
        let fresh = GrantState::Fresh(grant(3600));
        assert_eq!(state(&GrantState::Nothing, 0), "none");
        assert_eq!(state(&fresh, 3299), "fresh");
        assert_eq!(state(&fresh, 3300), "expiring");
        assert_eq!(state(&fresh, 4000), "expiring");
        assert_eq!(state(&fresh, 8 * 24 * 3600), "idle");
        assert_eq!(state(&fresh.next(failed(None), at(10), 0.5), 10), "failing");
        assert_eq!(state(&fresh.next(Outcome::Rejected("invalid_grant"), at(10), 0.5), 10), "login_required");
    }

    #[test]
    fn a_rejected_grant_is_kept_and_retried_at_most_once_an_hour() {
        let rejected = GrantState::Fresh(grant(3600)).next(Outcome::Rejected("invalid_grant"), at(10), 0.0);
        assert!(rejected.grant().is_some() && rejected.valid_token(at(20)).is_some());
        assert_eq!(rejected.retry_at(), Some(secs(3610)));
        assert_eq!(rejected.due(POLICY, secs(0), at(10), 0.5), Some(secs(3610)));
    }

    #[test]
    fn failures_back_off_from_half_a_second_to_the_cap() {
        let wait = |state: &GrantState| state.retry_at().unwrap().as_secs_f64();
        let mut valid = GrantState::Fresh(grant(100_000));
        let mut expired = GrantState::Fresh(grant(-1));
        let mut waits = Vec::new();
        for _ in 0..12 {
            valid = valid.next(failed(None), at(0), 0.999_999);
            expired = expired.next(failed(None), at(0), 0.999_999);
            waits.push((wait(&valid).round(), wait(&expired).round()));
        }
        assert_eq!(waits[..5], [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (4.0, 4.0), (8.0, 5.0)]);
        assert_eq!(waits[11], (60.0, 5.0));
        assert_eq!(wait(&valid.next(failed(Some(40)), at(0), 0.0)), 40.0);
        assert_eq!(wait(&valid.next(failed(Some(9999)), at(0), 0.0)), 60.0);
    }

    #[test]
    fn a_retry_after_of_zero_does_not_shorten_the_backoff() {
        let expired = GrantState::Fresh(grant(-1));
        let wait = |seconds| expired.next(failed(Some(seconds)), at(0), 0.5).retry_at().unwrap();
        assert_eq!(wait(0), SignedDuration::from_millis(250));
        assert_eq!(wait(7), secs(7));
        assert_eq!(wait(3600), secs(60));
    }

    #[test]
    fn a_short_lifetime_causes_no_burst_of_refreshes() {
        let short = GrantState::Fresh(grant(20));
        assert_eq!(short.due(POLICY, secs(0), at(0), 0.9), Some(secs(30)));
        assert!(!short.expiring(POLICY, at(19)), "it is valid, and was refreshed within the spacing");
        assert!(short.expiring(POLICY, at(20)), "an expired token is refreshed on demand at once");
    }

    #[test]
    fn idle_users_are_not_refreshed_in_the_background() {
        let fresh = GrantState::Fresh(grant(3600));
        assert!(fresh.due(POLICY, secs(-7 * 24 * 3600 + 3600), at(0), 0.0).is_some());
        assert_eq!(fresh.due(POLICY, secs(-7 * 24 * 3600), at(0), 0.0), None);
    }

    #[test]
    fn jitter_moves_a_background_refresh_earlier_by_at_most_a_fifth_of_ahead() {
        let fresh = GrantState::Fresh(grant(3600));
        assert_eq!(fresh.due(POLICY, secs(0), at(0), 0.0), Some(secs(2700)));
        assert_eq!(fresh.due(POLICY, secs(0), at(0), 0.5), Some(secs(2610)));
        let bare = Grant { access: None, ..stored(0, 0) };
        let bare = GrantState::Fresh(Arc::new(LiveGrant::issued(bare, at(0))));
        assert_eq!(
            bare.due(POLICY, secs(0), at(0), 0.0),
            Some(secs(0)),
            "without a token, spacing does not delay the refresh"
        );
    }

    #[test]
    fn each_limit_takes_effect_at_its_exact_instant() {
        let fresh = GrantState::Fresh(grant(3600));
        assert!(!fresh.expiring(POLICY, at(3299)) && fresh.expiring(POLICY, at(3300)));
        let week = 7 * 24 * 3600;
        assert_eq!(fresh.state(POLICY, secs(0), at(week)), State::Expiring);
        assert_eq!(fresh.state(POLICY, secs(0), at(week + 1)), State::Idle);
        let a_second_apart = ClockReading { uptime: secs(601), ..at(600) };
        assert_eq!(
            grant(3600).expires_at(a_second_apart),
            Some(wall(3600)),
            "two clocks are never read at the same instant"
        );
    }

    #[test]
    fn a_failed_refresh_backs_off_until_retry_at() {
        let fresh = GrantState::Fresh(grant(3600));
        assert!(!fresh.backs_off(at(0)));
        let failing = fresh.next(failed(Some(40)), at(0), 0.0);
        assert!(failing.backs_off(at(39)) && !failing.backs_off(at(40)) && !failing.backs_off(at(41)));
    }

    #[test]
    fn a_result_computed_for_another_generation_is_dropped() {
        let fresh = GrantState::Fresh(grant(3600));
        assert!(fresh.is_of(1) && !fresh.is_of(2) && !GrantState::Nothing.is_of(1));
    }

    fn outcomes() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            (0u64..100_000).prop_map(|wait| failed(Some(wait))),
            Just(failed(None)),
            Just(Outcome::Rejected("invalid_grant")),
            (-10i64..200_000).prop_map(|expires| Outcome::Refreshed(grant(expires))),
        ]
    }

    /// A step of the wall clock, in seconds, of up to ten days in either direction.
    fn stepped() -> impl Strategy<Value = i64> {
        -864_000i64..864_000
    }

    proptest! {
        /// For any order of outcomes and any steps of the wall clock: no outcome loses the grant, none removes a valid
        /// token, and no wait exceeds one hour.
        #[test]
        fn no_outcome_loses_a_grant_or_a_valid_token(
            steps in proptest::collection::vec((outcomes(), 0i64..5_000, stepped(), 0.0f64..1.0), 1..40)
        ) {
            let mut state = GrantState::Fresh(grant(3600));
            let mut uptime = 0;
            for (outcome, pause, step, jitter) in steps {
                uptime += pause;
                let now = ClockReading { wall: wall(uptime + step), ..at(uptime) };
                let refreshed = matches!(outcome, Outcome::Refreshed(_));
                let valid = state.valid_token(now).is_some();
                let next = state.next(outcome, now, jitter);
                prop_assert!(next.grant().is_some());
                prop_assert!(refreshed || next.valid_token(now).is_some() == valid);
                if let Some(retry_at) = next.retry_at() {
                    let wait = retry_at - now.uptime;
                    prop_assert!(wait <= SignedDuration::from_hours(1) && !wait.is_negative());
                }
                state = next;
            }
        }

        /// For an active user a background refresh is always due, and before the margin begins wherever the token's
        /// lifetime allows it.
        #[test]
        fn a_background_refresh_is_due_before_the_margin(expires in 0i64..200_000, jitter in 0.0f64..1.0) {
            let due = GrantState::Fresh(grant(expires)).due(POLICY, secs(expires), at(0), jitter);
            let due = due.expect("an active user is refreshed in the background");
            prop_assert!(due <= secs((expires - 900).max(30)));
            prop_assert!(due >= secs(30));
        }

        /// No step of the wall clock extends a token beyond the lifetime that Amazon issued, and none delays the
        /// background refresh.
        #[test]
        fn no_step_of_the_wall_clock_extends_a_token_or_delays_its_refresh(
            life in 1i64..90_000, uptime in 0i64..100_000, step in stepped(), jitter in 0.0f64..1.0
        ) {
            let fresh = GrantState::Fresh(grant(life));
            let unstepped = at(uptime);
            let now = ClockReading { wall: wall(uptime + step), ..unstepped };
            prop_assert!(fresh.valid_token(now).is_none() || uptime < life);
            prop_assert!(
                step > 0 || fresh.valid_token(now).is_some() == (uptime < life),
                "setting the clock back does not shorten the lifetime"
            );
            let due = |now| fresh.due(POLICY, secs(uptime), now, jitter);
            prop_assert!(due(now).is_some() && due(now) <= due(unstepped));
        }

        /// Whatever the wall clock reads when a stored token is loaded, the token is used for at most its lifetime from
        /// then.
        #[test]
        fn no_clock_error_at_load_extends_a_stored_token(
            life in 1i64..90_000, updated in stepped(), loaded_at in stepped(), later in 0i64..100_000
        ) {
            let at_load = ClockReading { wall: wall(loaded_at), ..at(0) };
            let loaded = LiveGrant::loaded(stored(updated, updated + life), at_load);
            let now = ClockReading { wall: wall(loaded_at), ..at(later) };
            prop_assert!(loaded.valid_token(now).is_none() || later < life);
            prop_assert!(loaded.since <= secs(0));
        }

        #[test]
        fn without_a_grant_every_outcome_leaves_no_grant(outcome in outcomes()) {
            prop_assert!(matches!(GrantState::Nothing.next(outcome, at(0), 0.5), GrantState::Nothing));
        }
    }
}
