//! Clock checks: skew against the `Date` of Amazon's responses, and jumps against the monotonic clock.

use http::HeaderMap;
use jiff::{SignedDuration, Timestamp};

use super::TokenManager;
use crate::domain::clock::date_of;
use crate::domain::clock_reading::ClockReading;

/// The clocks drift apart by less than this between two checks, unless one was stepped or the machine was suspended.
const JUMP: SignedDuration = SignedDuration::from_secs(1);

impl TokenManager {
    /// Measures the clock skew from the headers of an Ads API response.
    pub fn observe_amazons_clock(&self, headers: &HeaderMap) {
        if let Some(time) = date_of(headers) {
            self.observe_server_time(time);
        }
    }

    pub(super) fn observe_server_time(&self, time: Timestamp) {
        let skew = self.0.clock.set_amazon_time(time).as_secs_f64();
        // A `Date` is truncated to the whole second.
        self.0.metrics.clock_skew.set(skew.floor());
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
