//! What rendering may cost: a storm of scrapes must not take the app's CPU away.

use std::time::{Duration, Instant};

/// The most that rendering takes of one core when scrapers storm: a tenth.
const SHARE: u32 = 10;
/// What may be saved up: ordinary scrapers, of which a pod has a few every 15 s, never come near it.
const SAVINGS: Duration = Duration::from_millis(500);

/// Time to render with, which comes by itself and is spent by rendering. Where a render took more than there was, the
/// debt is waited out.
#[derive(Debug)]
pub(super) struct Budget {
    /// Nanoseconds.
    credit: i64,
    seen: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { credit: nanoseconds(SAVINGS), seen: now }
    }

    /// Whether there is time to render at `now`.
    pub(super) fn allows(&mut self, now: Instant) -> bool {
        let earned = nanoseconds(now.saturating_duration_since(self.seen) / SHARE);
        self.seen = now;
        self.credit = self.credit.saturating_add(earned).min(nanoseconds(SAVINGS));
        self.credit > 0
    }

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
    fn in_a_storm_of_scrapes_rendering_takes_a_tenth_of_the_time() {
        let begun = Instant::now();
        let mut budget = Budget::new(begun);
        let (render, storm) = (Duration::from_millis(5), Duration::from_secs(60));
        let mut spent = Duration::ZERO;
        // A scrape each millisecond for a minute.
        for at in 0..storm.as_millis() as u64 {
            if budget.allows(begun + Duration::from_millis(at)) {
                budget.spend(render);
                spent += render;
            }
        }
        let most = storm / SHARE + SAVINGS + render;
        assert!(spent <= most, "{spent:?} of at most {most:?}");
        assert!(spent >= storm / SHARE, "the share is used: {spent:?}");
    }

    #[test]
    fn an_ordinary_scraper_always_gets_a_fresh_page() {
        let begun = Instant::now();
        let mut budget = Budget::new(begun);
        for scrape in 0..1000 {
            assert!(budget.allows(begun + Duration::from_secs(15) * scrape));
            budget.spend(Duration::from_millis(50));
        }
    }
}
