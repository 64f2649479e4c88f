//! A CPU budget for rendering metrics, so that very frequent scrapes do not take CPU from the app.

use std::time::{Duration, Instant};

/// Rendering takes at most one part in this many of one core's time: a tenth.
const SHARE: u32 = 10;
/// Largest credit that accumulates. A few ordinary scrapers, each every 15 s, never use it up.
const MAX_CREDIT: Duration = Duration::from_millis(500);

/// A credit of rendering time, which grows with time and is spent by rendering. If a render takes longer than the
/// credit, the credit becomes negative, and no render is allowed until it is positive again.
#[derive(Debug)]
pub(super) struct Budget {
    /// Credit in nanoseconds.
    credit: i64,
    /// When `credit` was last updated.
    updated: Instant,
}

impl Budget {
    /// Creates a budget with the largest credit.
    pub(super) fn new(now: Instant) -> Self {
        Self { credit: nanoseconds(MAX_CREDIT), updated: now }
    }

    /// Whether a render is allowed at `now`.
    pub(super) fn allows(&mut self, now: Instant) -> bool {
        let earned = nanoseconds(now.saturating_duration_since(self.updated) / SHARE);
        self.updated = now;
        self.credit = self.credit.saturating_add(earned).min(nanoseconds(MAX_CREDIT));
        self.credit > 0
    }

    /// Deducts the duration of a render.
    pub(super) fn spend(&mut self, took: Duration) {
        self.credit = self.credit.saturating_sub(nanoseconds(took));
    }
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // Covers: failure 109.
    fn frequent_scrapes_cost_at_most_a_tenth_of_the_time() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let (render, duration) = (Duration::from_millis(5), Duration::from_secs(60));
        let mut spent = Duration::ZERO;
        // One scrape per millisecond for a minute.
        for at in 0..duration.as_millis() as u64 {
            if budget.allows(start + Duration::from_millis(at)) {
                budget.spend(render);
                spent += render;
            }
        }
        let most = duration / SHARE + MAX_CREDIT + render;
        assert!(spent <= most, "{spent:?} of at most {most:?}");
        assert!(spent >= duration / SHARE, "the whole share is used: {spent:?}");
    }

    #[test]
    fn an_ordinary_scraper_always_gets_a_fresh_page() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        for scrape in 0..1000 {
            assert!(budget.allows(start + Duration::from_secs(15) * scrape));
            budget.spend(Duration::from_millis(50));
        }
    }
}
