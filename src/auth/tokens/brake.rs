//! The decisions of the brake for answers of Login with Amazon that are about our client: see `client_circuit`. Without
//! a clock or a database: `tests/bench/fleet_simulation.rs` makes them for a thousand processes.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::SignedDuration;

use crate::auth::lwa::LwaError;
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Outcome, Remedy, Tokens, backoff};

/// Number of users whose refreshes failed with no success in between, from which on Login with Amazon counts as down.
const MANY: usize = 5;
/// Longest `Retry-After` that holds back all users.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// After an outage, calls of all processes begin this far apart, and twice as often after each period, until those of
/// each are as close as the last.
const FIRST_GAP: Duration = Duration::from_millis(100);
const GAP_PERIOD: Duration = Duration::from_secs(2);
const LAST_GAP: Duration = Duration::from_millis(3);
/// A process claims no refresh after an outage whose turn would come later than this: it would hold its lease for long.
const NEAR: Duration = Duration::from_secs(4);
/// How long a process that may probe for all has for its probe.
pub const PROBE: Duration = Duration::from_secs(12);

/// Whether Login with Amazon currently serves our client.
#[derive(Debug, Default)]
pub struct Brake {
    refused: Option<Refused>,
    /// The last user whose refresh failed with an error that may be about the client; `None` after a success.
    suspect: Option<UserId>,
    /// The users whose refreshes failed since the last answer that shows that LWA works. At most [`MANY`].
    failing: BTreeSet<UserId>,
    ramp: Option<Ramp>,
}

#[derive(Clone, Copy, Debug)]
struct Refused {
    code: &'static str,
    attempts: u32,
    /// Uptime (monotonic clock) of the last rejection.
    rejected_at: SignedDuration,
    /// Uptime of the next probe.
    retry_at: SignedDuration,
    /// Whether another process said so last.
    is_heard: bool,
}

/// The rate after an outage, of which each process has its part: turns at growing rate, each taken by one call.
#[derive(Clone, Copy, Debug)]
struct Ramp {
    /// When it began; `None` before the first call.
    since: Option<Duration>,
    processes: f64,
    /// Which part of the time between two of its turns this process waits for its first, in `0.0..1.0`: they would all
    /// begin at once.
    phase: f64,
    /// Number of turns that were taken, or passed.
    turns: f64,
    /// Whether it is for the backlog of a fleet that has just started: then callers do not wait for turns.
    is_of_start: bool,
}

impl Ramp {
    /// One that a process begins by itself.
    const OWN: Self = Self { since: None, processes: 1.0, phase: 0.0, turns: 0.0, is_of_start: false };

    /// The periods in which the gap between the turns of this process at the beginning would be filled.
    fn first_gap(&self) -> f64 {
        self.processes * FIRST_GAP.as_secs_f64() / GAP_PERIOD.as_secs_f64()
    }

    /// Whether calls at the time `after` its beginning need no turns any more.
    fn has_ended(&self, after: Duration) -> bool {
        let periods = after.as_secs_f64() / GAP_PERIOD.as_secs_f64();
        self.first_gap() / periods.min(60.0).exp2() < LAST_GAP.as_secs_f64() / GAP_PERIOD.as_secs_f64()
    }

    /// How long after its beginning the turn with this number comes: the integral of the rate says how many there were.
    fn turn_at(&self, number: f64) -> Duration {
        let grown = 1.0 + (number + self.phase) * self.first_gap() * std::f64::consts::LN_2;
        GAP_PERIOD.mul_f64(grown.log2())
    }

    /// The number of the first turn at the time `after` its beginning, or later, that nobody has taken.
    fn next(&self, after: Duration) -> f64 {
        let grown = (after.as_secs_f64() / GAP_PERIOD.as_secs_f64()).min(60.0).exp2();
        let passed = (grown - 1.0) / (self.first_gap() * std::f64::consts::LN_2) - self.phase;
        passed.ceil().max(self.turns)
    }
}

impl Brake {
    /// Whether the last answer about our client was a refusal.
    pub fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// When a call may begin that wants to at `now`, for the rate after an outage, or after a start if no caller waits
    /// for it. Both are times since any one instant.
    pub fn turn(&mut self, now: Duration, is_background: bool) -> Duration {
        let Some(ramp) = self.ramp.as_mut().filter(|ramp| is_background || !ramp.is_of_start) else { return now };
        let since = *ramp.since.get_or_insert(now);
        let after = now.saturating_sub(since);
        if ramp.has_ended(after) {
            self.ramp = None;
            return now;
        }
        let number = ramp.next(after);
        ramp.turns = number + 1.0;
        now.max(since + ramp.turn_at(number))
    }

    /// How long no refresh is to be claimed at `now`, because its call would have to wait for its turn.
    pub fn turn_wait(&self, now: Duration) -> Duration {
        let Some(ramp) = self.ramp else { return Duration::ZERO };
        let after = now.saturating_sub(ramp.since.unwrap_or(now));
        if ramp.has_ended(after) {
            return Duration::ZERO;
        }
        ramp.turn_at(ramp.next(after)).saturating_sub(after).saturating_sub(NEAR)
    }

    /// Whether this process calls nobody because another one said so.
    pub fn is_held_by_others(&self) -> bool {
        self.refused.is_some_and(|refused| refused.is_heard)
    }

    /// Starts the rate after an outage at `now`, as the brake that all share was released. This process gets one of
    /// `processes` equal parts of it.
    /// `phase` is random, in `0.0..1.0`.
    pub fn share(&mut self, processes: usize, phase: f64, now: Duration) {
        if self.is_held_by_others() {
            (self.refused, self.ramp) = (None, Some(Ramp::OWN));
        }
        if let Some(ramp) = &mut self.ramp {
            let phase = if processes > 1 { phase } else { 0.0 };
            let processes = processes.max(1) as f64;
            *ramp = Ramp { since: Some(now), processes, phase, turns: ramp.turns, is_of_start: false };
        }
    }

    /// Starts the rate of [`share`](Self::share) at `now` for background refreshes, because nobody has made any for
    /// long, and there may be very many: all processes were away. Those that callers wait for are made at once.
    pub fn work_off(&mut self, processes: usize, phase: f64, now: Duration) {
        if self.refused.is_none() && self.ramp.is_none() {
            let (phase, processes) = (if processes > 1 { phase } else { 0.0 }, processes.max(1) as f64);
            self.ramp = Some(Ramp { since: Some(now), processes, phase, turns: 0.0, is_of_start: true });
        }
    }

    /// Why no call may be made, and how long until the next probe.
    pub fn holds(&self, now: ClockReading) -> Option<(&'static str, Duration)> {
        let refused = self.refused?;
        let wait = Duration::try_from(refused.retry_at.saturating_sub(now.uptime)).ok()?;
        (!wait.is_zero()).then_some((refused.code, wait))
    }

    /// How many due refreshes a process claims that has room for `free` of its `concurrency` refreshes: none while the
    /// brake holds, as each would cost statements and end without a call; then one, as a probe; and after an outage
    /// those whose turn is near. `elapsed` is now, as for [`turn`](Self::turn).
    pub fn claimable(&self, now: ClockReading, elapsed: Duration, free: usize, concurrency: usize) -> usize {
        match (self.refused, self.ramp) {
            (Some(_), _) if self.holds(now).is_some() => 0,
            (Some(_), _) => usize::from(free >= concurrency),
            (None, Some(ramp)) => {
                let after = elapsed.saturating_sub(ramp.since.unwrap_or(elapsed));
                let near = |turn: &usize| ramp.turn_at(ramp.next(after) + *turn as f64) <= after + NEAR;
                if ramp.has_ended(after) { free } else { (0..free).take_while(near).count() }
            }
            (None, None) => free,
        }
    }

    /// Takes over what another process has heard: nobody calls LWA for the time `wait`.
    pub fn hold(&mut self, code: &'static str, wait: Duration, now: ClockReading) {
        let retry_at = now.uptime.saturating_add(SignedDuration::try_from(wait).unwrap_or_default());
        let attempts = self.refused.map_or(1, |refused| refused.attempts);
        if self.refused.is_none_or(|refused| refused.retry_at < retry_at) {
            self.refused = Some(Refused { code, attempts, rejected_at: now.uptime, retry_at, is_heard: true });
        }
    }

    /// Updates the state from the result of a token request for `user` sent at `sent_at`. `jitter` is random, in
    /// `0.0..1.0`. Returns whether the state of the client has changed.
    pub fn update(
        &mut self,
        user: &UserId,
        response: &Result<Tokens, LwaError>,
        sent_at: ClockReading,
        now: ClockReading,
        jitter: f64,
    ) -> bool {
        if !self.is_about_client(user, response) {
            return false;
        }
        let (code, retry_after) = match response {
            Err(LwaError::Operator { code }) => (*code, None),
            Err(LwaError::TryLater { code, retry_after, .. }) => (*code, *retry_after),
            // LWA served our client.
            Ok(_) | Err(LwaError::Refused { .. }) => {
                let was_refused = self.refused.take().is_some();
                if was_refused {
                    self.ramp = Some(Ramp::OWN);
                }
                return was_refused;
            }
        };
        // Calls that were in flight when the rejection began count as the same attempt.
        let attempts = match self.refused {
            Some(before) if sent_at.uptime < before.rejected_at => before.attempts,
            Some(before) => before.attempts.saturating_add(1),
            None => 1,
        };
        // The backoff of a user without a valid token, and at least half of it: some users may have none.
        let own = backoff(attempts, false, 0.5 + jitter / 2.0);
        let wait = retry_after.map_or(own, |wanted| wanted.min(MAX_WAIT).max(own));
        let retry_at = now.uptime.saturating_add(SignedDuration::try_from(wait).unwrap_or_default());
        self.refused = Some(Refused { code, attempts, rejected_at: now.uptime, retry_at, is_heard: false });
        true
    }

    /// Whether `response` says something about the client, and not about this user alone.
    fn is_about_client(&mut self, user: &UserId, response: &Result<Tokens, LwaError>) -> bool {
        match response {
            Err(LwaError::Operator { code, .. }) if *code != "invalid_client" => {
                let before = self.suspect.replace(user.clone());
                before.is_some_and(|before| before != *user) || self.is_refused()
            }
            Err(LwaError::TryLater { code: "throttled", .. } | LwaError::Operator { .. }) => true,
            Err(LwaError::TryLater { .. }) => {
                if self.failing.len() < MANY {
                    self.failing.insert(user.clone());
                }
                self.failing.len() >= MANY
            }
            Ok(_) => {
                self.suspect = None;
                self.failing.clear();
                true
            }
            Err(LwaError::Refused { .. }) => {
                self.failing.clear();
                true
            }
        }
    }

    /// Clears the refusal after a configuration change, so that the next refresh calls LWA.
    pub fn forget(&mut self) {
        self.refused = None;
    }
}

/// What comes of a refresh that the brake held back with `code` for `wait`.
pub fn held_back(code: &'static str, wait: Duration, is_shared: bool, jitter: f64) -> Outcome {
    let failure = Failure { code, remedy: remedy_of(code), detail: None };
    // During an outage each user keeps its own backoff, which spreads the users; the brake spares the calls. In a
    // shared store each attempt costs statements: it waits for the brake, and is spread behind it.
    let is_outage = failure.remedy == Remedy::Time && code != "throttled";
    let retry_after = match (is_outage, is_shared) {
        (true, false) => None,
        (true, true) => Some(wait.mul_f64(1.0 + jitter)),
        (false, _) => Some(wait),
    };
    Outcome::Failed { failure, retry_after }
}

/// What resolves a failure with this code.
pub(super) fn remedy_of(code: &str) -> Remedy {
    if matches!(code, "invalid_client" | "invalid_request") { Remedy::Operator } else { Remedy::Time }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn at(seconds: i64) -> ClockReading {
        let wall = Timestamp::from_second(1_790_000_000 + seconds).unwrap();
        ClockReading { wall, uptime: SignedDuration::from_secs(seconds), amazon: None }
    }

    fn down() -> Result<Tokens, LwaError> {
        Err(LwaError::TryLater { code: "unreachable", detail: String::new(), retry_after: None, taken: false })
    }

    #[test]
    fn a_process_claims_nothing_while_the_brake_holds_and_one_refresh_to_probe() {
        let mut brake = Brake::default();
        let claimable = |brake: &Brake, now, free, concurrency| {
            brake.claimable(at(now), Duration::from_secs(now.unsigned_abs()), free, concurrency)
        };
        assert_eq!(claimable(&brake, 0, 5, 8), 5);
        brake.hold("unreachable", Duration::from_secs(5), at(0));
        assert_eq!(claimable(&brake, 4, 8, 8), 0);
        assert_eq!((claimable(&brake, 5, 8, 8), claimable(&brake, 5, 7, 8)), (1, 0), "a probe may be running");
        assert_eq!(claimable(&brake, 5, 1, 1), 1);
    }

    /// The times of the calls of several processes, which hear at the same time that the brake is released, and each of
    /// which always has a call to make.
    fn turns(processes: usize, until: Duration) -> Vec<Duration> {
        let mut turns = Vec::new();
        for number in 0..processes {
            let mut brake = Brake::default();
            brake.hold("unreachable", Duration::from_secs(60), at(0));
            brake.share(processes, (number as f64 + 0.5) / processes as f64, Duration::ZERO);
            assert!(!brake.is_refused());
            let own = std::iter::repeat_with(|| brake.turn(Duration::ZERO, false));
            turns.extend(own.take_while(|turn| *turn <= until));
        }
        turns
    }

    #[test]
    fn all_processes_together_begin_as_slowly_as_one() {
        for processes in [1, 2, 30, 1000] {
            let counted = [1, 2, 4, 8].map(|seconds| turns(processes, Duration::from_secs(seconds)).len());
            // The rate doubles every two seconds from ten a second on.
            for (counted, expected) in counted.into_iter().zip([11.9, 28.9, 86.6, 432.8]) {
                assert!((counted as f64 - expected).abs() <= 1.5, "{processes}: {counted}, and not {expected}");
            }
        }
    }

    #[test]
    fn what_nobody_used_of_the_rate_is_not_made_up_for() {
        let mut brake = Brake::default();
        brake.hold("unreachable", Duration::from_secs(60), at(0));
        brake.share(100, 0.5, Duration::ZERO);
        let late = Duration::from_secs(8);
        let first = brake.turn(late, false);
        assert!(first > late && brake.turn(late, false) > first + Duration::from_millis(300), "{first:?}");
    }

    #[test]
    fn after_an_outage_a_process_claims_what_has_its_turn_soon_and_waits_for_the_rest() {
        let mut brake = Brake::default();
        brake.hold("unreachable", Duration::from_secs(60), at(0));
        brake.share(1000, 0.9, Duration::ZERO);
        assert_eq!(brake.claimable(at(0), Duration::ZERO, 8, 8), 0);
        let wait = brake.turn_wait(Duration::ZERO);
        assert!(wait > Duration::from_secs(5), "{wait:?}");
        let later = wait + Duration::from_millis(1);
        assert_eq!(brake.turn_wait(later), Duration::ZERO);
        let claimable = brake.claimable(at(0), later, 8, 8);
        assert!((1..8).contains(&claimable), "{claimable}");
        let turn = brake.turn(later, true);
        assert!(turn > later && turn <= later + NEAR, "{turn:?}");
        let end = Duration::from_secs(40);
        assert_eq!((brake.claimable(at(0), end, 8, 8), brake.turn(end, true)), (8, end));
    }

    #[test]
    fn a_fleet_that_starts_with_a_backlog_works_it_off_at_the_same_growing_rate_and_lets_no_caller_wait() {
        let mut turns = Vec::new();
        for number in 0..100 {
            let mut brake = Brake::default();
            brake.work_off(100, (f64::from(number) + 0.5) / 100.0, Duration::ZERO);
            assert_eq!(brake.turn(Duration::ZERO, false), Duration::ZERO, "a caller waits for it");
            assert!(brake.claimable(at(0), Duration::ZERO, 8, 8) < 8);
            let own = std::iter::repeat_with(|| brake.turn(Duration::ZERO, true));
            turns.extend(own.take_while(|turn| *turn <= Duration::from_secs(4)));
        }
        assert!((85..=89).contains(&turns.len()), "{}", turns.len());
    }

    #[test]
    fn the_rate_of_a_start_does_not_outlive_an_outage_and_does_not_end_one() {
        let mut brake = Brake::default();
        brake.hold("unreachable", Duration::from_secs(5), at(0));
        brake.work_off(1, 0.5, Duration::ZERO);
        assert!(brake.is_refused());
        let mut brake = Brake::default();
        brake.work_off(1000, 0.5, Duration::ZERO);
        brake.hold("unreachable", Duration::from_secs(5), at(0));
        brake.share(1, 0.5, Duration::from_secs(6));
        let six = Duration::from_secs(6);
        assert_eq!(brake.turn(six, false), six);
        assert!(brake.turn(six, false) > six, "after an outage callers wait, too");
    }

    #[test]
    fn what_a_process_has_seen_itself_is_not_released_by_others() {
        let mut brake = Brake::default();
        let (code, detail) = ("throttled", String::new());
        let refusal = Err(LwaError::TryLater { code, detail, retry_after: None, taken: false });
        assert!(brake.update(&"user".parse().unwrap(), &refusal, at(0), at(0), 0.5));
        brake.share(2, 0.5, Duration::ZERO);
        assert!(brake.is_refused());
    }

    #[test]
    fn one_failing_user_is_no_outage_and_many_are() {
        let mut brake = Brake::default();
        let user = |number: usize| format!("user-{number}").parse::<UserId>().unwrap();
        for _ in 0..20 {
            assert!(!brake.update(&user(0), &down(), at(0), at(0), 0.5));
        }
        let held: Vec<_> = (1..MANY).map(|number| brake.update(&user(number), &down(), at(0), at(0), 0.5)).collect();
        assert_eq!(held, [false, false, false, true]);
        assert!(brake.holds(at(0)).is_some());
    }

    #[test]
    fn after_an_outage_calls_begin_slowly_and_soon_at_will() {
        let mut brake = Brake::default();
        brake.hold("unreachable", Duration::from_secs(1), at(0));
        assert!(brake.update(
            &"user".parse().unwrap(),
            &Err(LwaError::Refused { code: "invalid_grant" }),
            at(2),
            at(2),
            0.5
        ));
        let second = Duration::from_secs(1);
        let turns: Vec<_> = (0..3).map(|_| (brake.turn(100 * second, false) - 100 * second).as_millis()).collect();
        assert_eq!(turns, [0, 98, 193]);
        assert_eq!(brake.turn(112 * second, false), 112 * second);
        assert_eq!(brake.turn(112 * second, false), 112 * second, "no gap is left");
    }
}
