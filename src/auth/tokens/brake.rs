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
/// After an outage, calls begin this far apart, and twice as often after each period, until they are as close as the
/// last.
const FIRST_GAP: Duration = Duration::from_millis(100);
const GAP_PERIOD: Duration = Duration::from_secs(2);
const LAST_GAP: Duration = Duration::from_millis(3);
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
}

/// The rate after an outage.
#[derive(Clone, Copy, Debug, Default)]
struct Ramp {
    /// When the first call was made; `None` before it.
    since: Option<Duration>,
    /// When the next call may be made.
    next: Duration,
}

impl Brake {
    /// Whether the last answer about our client was a refusal.
    pub fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// When a call may begin that wants to at `now`, for the rate after an outage. Both are times since any one
    /// instant.
    pub fn turn(&mut self, now: Duration) -> Duration {
        let Some(ramp) = &mut self.ramp else { return now };
        let since = *ramp.since.get_or_insert(now);
        let periods = now.saturating_sub(since).as_secs_f64() / GAP_PERIOD.as_secs_f64();
        let gap = FIRST_GAP.div_f64(periods.min(30.0).exp2());
        if gap < LAST_GAP {
            self.ramp = None;
            return now;
        }
        let turn = ramp.next.max(now);
        ramp.next = turn + gap;
        turn
    }

    /// Why no call may be made, and how long until the next probe.
    pub fn holds(&self, now: ClockReading) -> Option<(&'static str, Duration)> {
        let refused = self.refused?;
        let wait = Duration::try_from(refused.retry_at.saturating_sub(now.uptime)).ok()?;
        (!wait.is_zero()).then_some((refused.code, wait))
    }

    /// How many due refreshes a process claims that has room for `free` of its `concurrency` refreshes: none while the
    /// brake holds, as each would cost statements and end without a call; and then one, as a probe.
    pub fn claimable(&self, now: ClockReading, free: usize, concurrency: usize) -> usize {
        match self.refused {
            Some(_) if self.holds(now).is_some() => 0,
            Some(_) => usize::from(free >= concurrency),
            None => free,
        }
    }

    /// Takes over what another process has heard: nobody calls LWA for the time `wait`.
    pub fn hold(&mut self, code: &'static str, wait: Duration, now: ClockReading) {
        let retry_at = now.uptime.saturating_add(SignedDuration::try_from(wait).unwrap_or_default());
        let attempts = self.refused.map_or(1, |refused| refused.attempts);
        if self.refused.is_none_or(|refused| refused.retry_at < retry_at) {
            self.refused = Some(Refused { code, attempts, rejected_at: now.uptime, retry_at });
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
                    self.ramp = Some(Ramp::default());
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
        self.refused = Some(Refused { code, attempts, rejected_at: now.uptime, retry_at });
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
        assert_eq!(brake.claimable(at(0), 5, 8), 5);
        brake.hold("unreachable", Duration::from_secs(5), at(0));
        assert_eq!(brake.claimable(at(4), 8, 8), 0);
        assert_eq!((brake.claimable(at(5), 8, 8), brake.claimable(at(5), 7, 8)), (1, 0), "a probe may be running");
        assert_eq!(brake.claimable(at(5), 1, 1), 1);
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
        let turns: Vec<_> = (0..3).map(|_| (brake.turn(100 * second) - 100 * second).as_millis()).collect();
        assert_eq!(turns, [0, 100, 200]);
        assert_eq!(brake.turn(112 * second), 112 * second);
        assert_eq!(brake.turn(112 * second), 112 * second, "no gap is left");
    }
}
