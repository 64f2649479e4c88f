//! One instant, as each of the clocks tells it that bound a token's life.

use jiff::{SignedDuration, Timestamp};

/// An instant. No clock alone is good for deciding whether a token lives: the wall clock can be stepped, the monotonic one
/// stands still while the machine sleeps and knows nothing of the time before the process began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    /// The wall time.
    pub wall: Timestamp,
    /// The monotonic time since the process began. It is never stepped; all pacing goes by it.
    pub uptime: SignedDuration,
    /// What Amazon's clock says, reckoned by the monotonic time from the last answer that told. `None` before the first.
    pub amazon: Option<Timestamp>,
}

impl ClockReading {
    /// The wall time at the uptime `at`, as far as the clock is not stepped in between.
    pub fn wall_at(&self, at: SignedDuration) -> Timestamp {
        let away = at.saturating_sub(self.uptime);
        let end = if away.is_negative() { Timestamp::MIN } else { Timestamp::MAX };
        self.wall.checked_add(away).unwrap_or(end)
    }

    /// The uptime at the wall time `at`, as far as the clock is not stepped in between; negative before the process began.
    pub fn uptime_at(&self, at: Timestamp) -> SignedDuration {
        self.uptime.saturating_add(at.duration_since(self.wall))
    }
}
