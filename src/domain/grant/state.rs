//! What a running process knows about one user's grant, and what becomes of it.
//!
//! A token's life is bounded by every clock that says something about it ([`LiveGrant::left`]); all pacing (backoff, spacing,
//! idleness) goes by the monotonic one, so that no step of the wall clock stalls or floods anything.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{Access, AccessToken, Grant};
use crate::domain::clock_reading::ClockReading;

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

/// When tokens are renewed.
#[derive(Clone, Copy, Debug)]
pub struct RefreshPolicy {
    /// A token with less than this left is renewed at once, when somebody asks for it.
    pub margin: Duration,
    /// In the background a token is renewed this long before its end.
    pub ahead: Duration,
    /// Users not used for this long are renewed on demand only.
    pub idle_after: Duration,
}

/// A grant in the hands of a running process, which knows more of its token's life than the wall time of its end.
#[derive(Clone, Debug)]
pub struct LiveGrant {
    grant: Grant,
    /// The uptime at which the tokens last changed.
    since: SignedDuration,
    /// From this uptime on the token is never sent, whatever the wall clock says.
    until: SignedDuration,
    /// Whether the token was issued to this process. The end of any other was written down by a clock that may have been
    /// wrong, or is wrong now.
    ours: bool,
}

impl LiveGrant {
    /// A grant as the store or a login gave it.
    pub fn loaded(grant: Grant, now: ClockReading) -> Self {
        let life = |access: &Access| {
            // However wrong the clock is now, the token does not live longer from now on than it ever did.
            let whole = access.expires_at.duration_since(grant.updated_at);
            now.uptime.saturating_add(access.expires_at.duration_since(now.wall).min(whole))
        };
        let until = grant.access.as_ref().map_or(now.uptime, life);
        Self { since: now.uptime.min(now.uptime_at(grant.updated_at)), until, ours: false, grant }
    }

    /// A grant with a token that this process asked for at `asked`.
    pub fn issued(grant: Grant, asked: ClockReading) -> Self {
        let until = grant.access.as_ref().map_or(asked.uptime, |access| asked.uptime_at(access.expires_at));
        Self { since: asked.uptime, until, ours: true, grant }
    }

    /// What is left of the token's life by the clock that gives it the least. The wall clock goes on while the machine
    /// sleeps, the monotonic one when the wall clock is set back, and Amazon's is right.
    pub fn left(&self, now: ClockReading) -> Option<SignedDuration> {
        let expires_at = self.grant.access.as_ref()?.expires_at;
        fail_point!("clock_wall_alone", |_| Some(expires_at.duration_since(now.wall)));
        let left = expires_at.duration_since(now.wall).min(self.until.saturating_sub(now.uptime));
        let by_amazon = now.amazon.filter(|_| !self.ours).map(|amazon| expires_at.duration_since(amazon));
        Some(by_amazon.map_or(left, |by_amazon| by_amazon.min(left)))
    }

    /// How old the tokens are, where another process had them made.
    pub fn age_elsewhere(&self, now: ClockReading) -> Option<SignedDuration> {
        (!self.ours).then(|| now.uptime.saturating_sub(self.since))
    }

    /// The access token, while it lives: what may be sent.
    pub fn living(&self, now: ClockReading) -> Option<&AccessToken> {
        self.left(now).filter(|left| left.is_positive())?;
        self.grant.access.as_ref().map(|access| &access.token)
    }

    /// The wall time of the token's end, as long as the clock is not stepped.
    pub fn expires_at(&self, now: ClockReading) -> Option<Timestamp> {
        let stored = self.grant.access.as_ref()?.expires_at;
        let reckoned = now.wall_at(now.uptime.saturating_add(self.left(now)?));
        // What is written down, unless it has become wrong: two clocks are never read at quite the same instant.
        let wrong = stored.duration_since(reckoned) > SignedDuration::from_secs(1);
        Some(if wrong { reckoned } else { stored })
    }
}

impl std::ops::Deref for LiveGrant {
    type Target = Grant;

    fn deref(&self) -> &Grant {
        &self.grant
    }
}

impl Grant {
    /// The state of a grant that lies in the store and that nobody works on.
    pub fn state(&self, policy: RefreshPolicy, now: Timestamp) -> State {
        let now = ClockReading { wall: now, uptime: SignedDuration::ZERO, amazon: None };
        let used = now.uptime_at(self.used_at.unwrap_or(self.updated_at));
        GrantState::Fresh(Arc::new(LiveGrant::loaded(self.clone(), now))).state(policy, used, now)
    }
}

/// What is known about one user's grant right now.
#[derive(Clone, Debug)]
pub enum GrantState {
    /// No grant.
    Nothing,
    /// The last renewal, if there was one, went well.
    Fresh(Arc<LiveGrant>),
    /// The last renewal failed and is tried again. The token of before is served while it lives.
    Failing {
        /// The grant, kept.
        grant: Arc<LiveGrant>,
        /// Why the last renewal failed.
        failure: Failure,
        /// Failures in a row.
        attempts: u32,
        /// Not before this uptime is it tried again.
        retry_at: SignedDuration,
    },
    /// LWA refused the grant. It is kept, tried again rarely, and the token of before is served while it lives.
    LoginRequired {
        /// The grant, kept.
        grant: Arc<LiveGrant>,
        /// LWA's error code, from a fixed list.
        reason: &'static str,
        /// Not before this uptime is it tried again.
        retry_at: SignedDuration,
    },
}

/// Why a renewal failed, when the grant itself is not to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A code of a fixed list, such as `unreachable`, `server_error`, `bad_answer`, `invalid_client`: a metric's label
    /// and the status's `last_error`.
    pub code: &'static str,
    /// Whose turn it is.
    pub remedy: Remedy,
}

/// The code of a failure that a store causes which several processes share: without it nobody knows who else renews.
pub const STORE_UNAVAILABLE: &str = "store_unavailable";

/// What ends a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Trying again.
    Time,
    /// The operator: the client id or secret is wrong.
    Operator,
}

/// How a renewal ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// With this grant.
    Renewed(Arc<LiveGrant>),
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

impl GrantState {
    /// The grant, in whatever state it is.
    pub fn grant(&self) -> Option<&Arc<LiveGrant>> {
        match self {
            Self::Nothing => None,
            Self::Fresh(grant) | Self::Failing { grant, .. } | Self::LoginRequired { grant, .. } => Some(grant),
        }
    }

    /// The access token, while it lives: what may be sent.
    pub fn living(&self, now: ClockReading) -> Option<&AccessToken> {
        self.grant().and_then(|grant| grant.living(now))
    }

    /// Not before this uptime may a renewal be tried, because the last one failed.
    pub fn retry_at(&self) -> Option<SignedDuration> {
        match self {
            Self::Nothing | Self::Fresh(_) => None,
            Self::Failing { retry_at, .. } | Self::LoginRequired { retry_at, .. } => Some(*retry_at),
        }
    }

    /// Whether a renewal that a caller asks for has to wait still.
    pub fn backs_off(&self, now: ClockReading) -> bool {
        self.retry_at().is_some_and(|at| now.uptime < at)
    }

    /// Whether what was computed for `generation` of the grant still counts: a logout or a new login beats it.
    pub fn is_of(&self, generation: u64) -> bool {
        self.grant().is_some_and(|grant| grant.generation == generation)
    }

    /// The state after a renewal ended with `outcome`. `dice` in `0.0..1.0` is the jitter.
    pub fn next(&self, outcome: Outcome, now: ClockReading, dice: f64) -> Self {
        let Some(grant) = self.grant().cloned() else { return Self::Nothing };
        match outcome {
            Outcome::Renewed(grant) => Self::Fresh(grant),
            Outcome::Refused(reason) => {
                Self::LoginRequired { grant, reason, retry_at: now.uptime.saturating_add(REFUSED_RETRY) }
            }
            Outcome::Failed { failure, retry_after } => {
                let attempts = self.attempts().saturating_add(1);
                // Who asks for no wait at all is not asked again at once.
                let own = backoff(attempts, grant.living(now).is_some(), dice);
                let wait = retry_after.map_or(own, |asked| asked.min(BACKOFF_LIVING).max(own));
                Self::Failing { grant, failure, attempts, retry_at: now.uptime.saturating_add(signed(wait)) }
            }
        }
    }

    /// The uptime at which the background should renew next; `None`: only when somebody asks. `used` is the uptime at which
    /// a caller last used the grant; `dice` in `0.0..1.0` spreads users whose tokens end together.
    pub fn due(
        &self,
        policy: RefreshPolicy,
        used: SignedDuration,
        now: ClockReading,
        dice: f64,
    ) -> Option<SignedDuration> {
        let grant = self.grant()?;
        let wanted = match grant.left(now) {
            // Spread over a fifth of the time between `ahead` and the token's end, on the early side.
            Some(left) => {
                let ahead = policy.ahead + policy.ahead.mul_f64(0.2 * dice);
                now.uptime.saturating_add(left).saturating_sub(signed(ahead))
            }
            None => grant.since,
        };
        let due = match self.retry_at() {
            Some(retry_at) => retry_at.max(wanted),
            None if grant.access.is_some() => wanted.max(grant.since.saturating_add(RENEWAL_SPACING)),
            None => wanted,
        };
        (due <= used.saturating_add(signed(policy.idle_after))).then_some(due)
    }

    /// The state as told to users. `used` is the uptime at which a caller last used the grant.
    pub fn state(&self, policy: RefreshPolicy, used: SignedDuration, now: ClockReading) -> State {
        match self {
            Self::Nothing => State::None,
            Self::LoginRequired { .. } => State::LoginRequired,
            Self::Failing { .. } => State::Failing,
            Self::Fresh(grant) => match grant.left(now).filter(|left| left.is_positive()) {
                Some(left) if left > signed(policy.margin) => State::Fresh,
                None if now.uptime > used.saturating_add(signed(policy.idle_after)) => State::Idle,
                _ => State::Expiring,
            },
        }
    }

    /// Whether the living token should be replaced because little of its life is left. A renewal that ended a moment
    /// ago is not repeated while its token lives, however short that life is.
    pub fn expiring(&self, policy: RefreshPolicy, now: ClockReading) -> bool {
        self.grant().is_some_and(|grant| match grant.left(now).filter(|left| left.is_positive()) {
            Some(left) => left <= signed(policy.margin) && now.uptime >= grant.since.saturating_add(RENEWAL_SPACING),
            None => true,
        })
    }

    /// How often in a row renewal failed.
    fn attempts(&self) -> u32 {
        if let Self::Failing { attempts, .. } = self { *attempts } else { 0 }
    }
}

/// Exponential backoff with full jitter.
pub(crate) fn backoff(attempts: u32, living: bool, dice: f64) -> Duration {
    let cap = if living { BACKOFF_LIVING } else { BACKOFF_DEAD };
    let ceiling = BACKOFF_FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(cap);
    ceiling.mul_f64(dice)
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

    /// Where both clocks run as they should.
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

    /// One that was renewed at 0.
    fn grant(expires: i64) -> Arc<LiveGrant> {
        Arc::new(LiveGrant::issued(stored(0, expires), at(0)))
    }

    fn failed(retry_after: Option<u64>) -> Outcome {
        let failure = Failure { code: "server_error", remedy: Remedy::Time };
        Outcome::Failed { failure, retry_after: retry_after.map(Duration::from_secs) }
    }

    #[test]
    fn a_token_is_dead_from_the_instant_of_its_end() {
        assert!(grant(100).living(at(99)).is_some());
        assert!(grant(100).living(at(100)).is_none());
    }

    #[test]
    fn the_clock_that_gives_the_least_life_decides() {
        let fresh = grant(3600);
        let moment = |wall_: i64, uptime| ClockReading { wall: wall(wall_), uptime: secs(uptime), amazon: None };
        assert_eq!(fresh.left(moment(600, 600)), Some(secs(3000)));
        assert_eq!(fresh.left(moment(7200, 600)), Some(secs(-3600)), "stepped forward, or slept");
        assert_eq!(fresh.left(moment(-864_000, 3500)), Some(secs(100)), "set back by days");
        assert_eq!(fresh.expires_at(moment(-864_000, 3500)), Some(wall(-864_000 + 100)));
        assert_eq!(fresh.expires_at(at(600)), Some(wall(3600)));
    }

    #[test]
    fn a_stored_token_lives_no_longer_than_ever_and_no_longer_than_amazon_says() {
        // Stored under a clock that was ten days ahead, or loaded under one that is ten days behind.
        let kept = LiveGrant::loaded(stored(864_000, 867_600), at(0));
        assert_eq!(kept.left(at(0)), Some(secs(3600)));
        assert!(kept.living(at(3600)).is_none());
        // Loaded under a clock that is half an hour behind: Amazon's next answer shows it.
        let kept = LiveGrant::loaded(stored(0, 3600), at(1800));
        let told = |amazon| ClockReading { amazon: Some(wall(amazon)), ..at(1800) };
        assert_eq!(kept.left(at(1800)), Some(secs(1800)));
        assert_eq!(kept.left(told(3600)), Some(secs(0)));
        assert_eq!(kept.left(told(0)), Some(secs(1800)), "Amazon's word never makes a life longer");
        // What this process was given is bounded by its own clocks: a wrong Date makes no storm.
        assert_eq!(grant(3600).left(told(900_000)), Some(secs(1800)));
    }

    #[test]
    fn the_states_are_the_documented_ones() {
        let state = |held: &GrantState, now| held.state(POLICY, secs(0), at(now)).as_str();
        let fresh = GrantState::Fresh(grant(3600));
        assert_eq!(state(&GrantState::Nothing, 0), "none");
        assert_eq!(state(&fresh, 3299), "fresh");
        assert_eq!(state(&fresh, 3300), "expiring");
        assert_eq!(state(&fresh, 4000), "expiring");
        assert_eq!(state(&fresh, 8 * 24 * 3600), "idle");
        assert_eq!(state(&fresh.next(failed(None), at(10), 0.5), 10), "failing");
        assert_eq!(state(&fresh.next(Outcome::Refused("invalid_grant"), at(10), 0.5), 10), "login_required");
    }

    #[test]
    fn a_refused_grant_is_kept_and_tried_again_after_an_hour_at_most_once() {
        let refused = GrantState::Fresh(grant(3600)).next(Outcome::Refused("invalid_grant"), at(10), 0.0);
        assert!(refused.grant().is_some() && refused.living(at(20)).is_some());
        assert_eq!(refused.retry_at(), Some(secs(3610)));
        assert_eq!(refused.due(POLICY, secs(0), at(10), 0.5), Some(secs(3610)));
    }

    #[test]
    fn failures_back_off_from_half_a_second_to_the_cap() {
        let wait = |held: &GrantState| held.retry_at().unwrap().as_secs_f64();
        let mut living = GrantState::Fresh(grant(100_000));
        let mut dead = GrantState::Fresh(grant(-1));
        let mut waits = Vec::new();
        for _ in 0..12 {
            living = living.next(failed(None), at(0), 0.999_999);
            dead = dead.next(failed(None), at(0), 0.999_999);
            waits.push((wait(&living).round(), wait(&dead).round()));
        }
        assert_eq!(waits[..5], [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (4.0, 4.0), (8.0, 5.0)]);
        assert_eq!(waits[11], (60.0, 5.0));
        assert_eq!(wait(&living.next(failed(Some(40)), at(0), 0.0)), 40.0);
        assert_eq!(wait(&living.next(failed(Some(9999)), at(0), 0.0)), 60.0);
    }

    #[test]
    fn a_retry_after_of_nothing_is_no_leave_to_hammer() {
        let held = GrantState::Fresh(grant(-1));
        let wait = |seconds| held.next(failed(Some(seconds)), at(0), 0.5).retry_at().unwrap();
        assert_eq!(wait(0), SignedDuration::from_millis(250));
        assert_eq!(wait(7), secs(7));
        assert_eq!(wait(3600), secs(60));
    }

    #[test]
    fn a_short_life_makes_no_storm() {
        let short = GrantState::Fresh(grant(20));
        assert_eq!(short.due(POLICY, secs(0), at(0), 0.9), Some(secs(30)));
        assert!(!short.expiring(POLICY, at(19)), "it lives, and was renewed a moment ago");
        assert!(short.expiring(POLICY, at(20)), "an expired one is renewed on demand at once");
    }

    #[test]
    fn users_who_do_not_come_are_not_renewed_in_the_background() {
        let held = GrantState::Fresh(grant(3600));
        assert!(held.due(POLICY, secs(-7 * 24 * 3600 + 3600), at(0), 0.0).is_some());
        assert_eq!(held.due(POLICY, secs(-7 * 24 * 3600), at(0), 0.0), None);
    }

    #[test]
    fn the_background_plans_a_fifth_of_its_lead_earlier_at_most() {
        let fresh = GrantState::Fresh(grant(3600));
        assert_eq!(fresh.due(POLICY, secs(0), at(0), 0.0), Some(secs(2700)));
        assert_eq!(fresh.due(POLICY, secs(0), at(0), 0.5), Some(secs(2610)));
        let bare = Grant { access: None, ..stored(0, 0) };
        let bare = GrantState::Fresh(Arc::new(LiveGrant::issued(bare, at(0))));
        assert_eq!(
            bare.due(POLICY, secs(0), at(0), 0.0),
            Some(secs(0)),
            "there is no token that a spacing could spare"
        );
    }

    #[test]
    fn each_limit_holds_at_its_instant() {
        let fresh = GrantState::Fresh(grant(3600));
        assert!(!fresh.expiring(POLICY, at(3299)) && fresh.expiring(POLICY, at(3300)));
        let week = 7 * 24 * 3600;
        assert_eq!(fresh.state(POLICY, secs(0), at(week)), State::Expiring);
        assert_eq!(fresh.state(POLICY, secs(0), at(week + 1)), State::Idle);
        let a_second_apart = ClockReading { uptime: secs(601), ..at(600) };
        assert_eq!(grant(3600).expires_at(a_second_apart), Some(wall(3600)), "clocks are never read at one instant");
    }

    #[test]
    fn a_failed_renewal_backs_off_until_its_instant() {
        let fresh = GrantState::Fresh(grant(3600));
        assert!(!fresh.backs_off(at(0)));
        let failing = fresh.next(failed(Some(40)), at(0), 0.0);
        assert!(failing.backs_off(at(39)) && !failing.backs_off(at(40)) && !failing.backs_off(at(41)));
    }

    #[test]
    fn what_was_computed_for_another_generation_does_not_count() {
        let held = GrantState::Fresh(grant(3600));
        assert!(held.is_of(1) && !held.is_of(2) && !GrantState::Nothing.is_of(1));
    }

    fn outcomes() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            (0u64..100_000).prop_map(|wait| failed(Some(wait))),
            Just(failed(None)),
            Just(Outcome::Refused("invalid_grant")),
            (-10i64..200_000).prop_map(|expires| Outcome::Renewed(grant(expires))),
        ]
    }

    /// A wall clock that was stepped by anything up to ten days either way.
    fn stepped() -> impl Strategy<Value = i64> {
        -864_000i64..864_000
    }

    proptest! {
        /// Whatever happens in whatever order, and however the wall clock is stepped: no outcome loses the grant, none takes
        /// away a living token, and a wait is never longer than an hour.
        #[test]
        fn no_outcome_loses_a_grant_or_a_living_token(
            steps in proptest::collection::vec((outcomes(), 0i64..5_000, stepped(), 0.0f64..1.0), 1..40)
        ) {
            let mut held = GrantState::Fresh(grant(3600));
            let mut uptime = 0;
            for (outcome, pause, step, dice) in steps {
                uptime += pause;
                let now = ClockReading { wall: wall(uptime + step), ..at(uptime) };
                let renewed = matches!(outcome, Outcome::Renewed(_));
                let living = held.living(now).is_some();
                let next = held.next(outcome, now, dice);
                prop_assert!(next.grant().is_some());
                prop_assert!(renewed || next.living(now).is_some() == living);
                if let Some(retry_at) = next.retry_at() {
                    let wait = retry_at - now.uptime;
                    prop_assert!(wait <= SignedDuration::from_hours(1) && !wait.is_negative());
                }
                held = next;
            }
        }

        /// The background acts before the margin begins, wherever the token's life allows it, and for a user in use
        /// never forgets to.
        #[test]
        fn the_background_is_always_ahead_of_the_margin(expires in 0i64..200_000, dice in 0.0f64..1.0) {
            let due = GrantState::Fresh(grant(expires)).due(POLICY, secs(expires), at(0), dice);
            let due = due.expect("a user in use has a plan");
            prop_assert!(due <= secs((expires - 900).max(30)));
            prop_assert!(due >= secs(30));
        }

        /// However the wall clock is stepped, a token is never believed to live longer than Amazon gave it, and the background
        /// is never later than it would have been without the step.
        #[test]
        fn no_step_of_the_clock_lets_a_token_live_longer_or_renewal_wait(
            life in 1i64..90_000, uptime in 0i64..100_000, step in stepped(), dice in 0.0f64..1.0
        ) {
            let held = GrantState::Fresh(grant(life));
            let calm = at(uptime);
            let now = ClockReading { wall: wall(uptime + step), ..calm };
            prop_assert!(held.living(now).is_none() || uptime < life);
            prop_assert!(step > 0 || held.living(now).is_some() == (uptime < life), "set back, it lives its whole life");
            let due = |moment| held.due(POLICY, secs(uptime), moment, dice);
            prop_assert!(due(now).is_some() && due(now) <= due(calm));
        }

        /// Loaded at any wall time whatever, a stored token is sent no longer than its own life from then on.
        #[test]
        fn no_clock_at_the_start_makes_a_stored_token_outlive_itself(
            life in 1i64..90_000, updated in stepped(), loaded in stepped(), later in 0i64..100_000
        ) {
            let kept = LiveGrant::loaded(stored(updated, updated + life), ClockReading { wall: wall(loaded), ..at(0) });
            let now = ClockReading { wall: wall(loaded), ..at(later) };
            prop_assert!(kept.living(now).is_none() || later < life);
            prop_assert!(kept.since <= secs(0));
        }

        #[test]
        fn nothing_becomes_of_nothing(outcome in outcomes()) {
            prop_assert!(matches!(GrantState::Nothing.next(outcome, at(0), 0.5), GrantState::Nothing));
        }
    }
}
