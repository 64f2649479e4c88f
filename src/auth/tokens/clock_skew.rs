//! Clock checks: skew against the `Date` of Amazon's responses, and jumps against the monotonic clock.

use http::HeaderMap;
use jiff::{SignedDuration, Timestamp};

use super::TokenManager;
use crate::domain::clock::date_of;
use crate::domain::clock_reading::ClockReading;

/// The clocks drift apart by less than this between two checks, unless one was stepped or the machine was suspended.
const JUMP: SignedDuration = SignedDuration::from_secs(1);

/// A smaller change of what is known of Amazon's clock moves no refresh: margins are minutes.
const SHIFT: SignedDuration = SignedDuration::from_secs(30);

impl TokenManager {
    /// Measures the clock skew from the headers of an Ads API response.
    pub fn observe_amazons_clock(&self, headers: &HeaderMap) {
        if let Some(time) = date_of(headers) {
            self.observe_server_time(time);
        }
    }

    pub(super) fn observe_server_time(&self, time: Timestamp) {
        let before = self.0.clock.reading();
        let skew = self.0.clock.set_amazon_time(time);
        // A `Date` is truncated to the whole second.
        self.0.metrics.clock_skew.set(skew.as_secs_f64().floor());
        // Until the first response after a start, the wall clock was all that was known.
        let expected = before.amazon.unwrap_or(before.wall);
        if time.duration_since(expected).abs() > SHIFT {
            tracing::info!(
                seconds = skew.as_secs(),
                "Amazon's clock differs from what was known: refreshes are rescheduled"
            );
            for entry in self.entries() {
                // Sending fails only during shutdown, when the scheduler is gone.
                let _ = self.0.scheduler.send(entry);
            }
        }
    }

    /// Whether the wall clock was stepped, or the machine was suspended, between two clock readings.
    pub(super) fn look_for_jump(&self, before: ClockReading, now: ClockReading) -> bool {
        let passed = now.wall.duration_since(before.wall);
        let jump = passed.saturating_sub(now.uptime.saturating_sub(before.uptime));
        let jumped = jump.abs() > JUMP;
        if jumped {
            self.0.metrics.clock_jumps.inc();
            let seconds = jump.as_secs();
            tracing::warn!(seconds, "the clock was set, or the machine was suspended: all refreshes are rescheduled");
        }
        jumped
    }
}
