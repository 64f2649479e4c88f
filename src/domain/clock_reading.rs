//! One instant, as read from each of the clocks that limit a token's lifetime.

use jiff::{SignedDuration, Timestamp};

/// One instant by every available clock. No single clock can decide whether a token is valid: the wall clock can be
/// stepped, and the monotonic clock stops while the machine sleeps and does not cover the time before the process
/// started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    /// The wall-clock time.
    pub wall: Timestamp,
    /// The monotonic time since the process started. It is never stepped; all pacing uses it.
    pub uptime: SignedDuration,
    /// Amazon's time: the last `Date` that Amazon sent, plus the monotonic time since. `None` before the first response
    /// with a `Date`.
    pub amazon: Option<Timestamp>,
}

impl ClockReading {
    /// Converts the uptime `at` to wall-clock time, assuming that the clock is not stepped in between.
    pub fn wall_at(&self, at: SignedDuration) -> Timestamp {
        let away = at.saturating_sub(self.uptime);
        let end = if away.is_negative() { Timestamp::MIN } else { Timestamp::MAX };
        self.wall.checked_add(away).unwrap_or(end)
    }

    /// Converts the wall-clock time `at` to uptime, assuming that the clock is not stepped in between. The result is
    /// negative for a time before the process started.
    pub fn uptime_at(&self, at: Timestamp) -> SignedDuration {
        self.uptime.saturating_add(at.duration_since(self.wall))
    }
}
