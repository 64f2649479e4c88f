//! Counts the calls that Amazon accepted: in total, and per second for the last seconds. Without locks, because every
//! response is counted.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::law::Seconds;

/// Slots in which the last seconds are counted.
const SLOTS: u64 = 16;
/// Slots per second. A burst may begin in the middle of one, so a second is counted as two neighbours.
const PER_SECOND: f64 = 2.0;
/// Bits of a slot that hold the count; those above hold the slot's number since the beginning.
const COUNT_BITS: u32 = 24;

/// The calls of one bucket that Amazon accepted.
#[derive(Debug, Default)]
pub(super) struct Counts {
    total: AtomicU64,
    slots: [AtomicU64; SLOTS as usize],
}

impl Counts {
    /// Counts a call that was accepted at `now`.
    pub(super) fn add(&self, now: Seconds) {
        self.total.fetch_add(1, Relaxed);
        let number = (now * PER_SECOND) as u64;
        let slot = &self.slots[(number % SLOTS) as usize];
        let seen = slot.load(Relaxed);
        if seen >> COUNT_BITS == number {
            slot.fetch_add(1, Relaxed);
        } else if slot.compare_exchange(seen, number << COUNT_BITS | 1, Relaxed, Relaxed).is_err() {
            // Another thread began this slot.
            slot.fetch_add(1, Relaxed);
        }
    }

    /// The number of accepted calls so far.
    pub(super) fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// The most calls that were accepted within one of the last seconds.
    pub(super) fn peak(&self, now: Seconds) -> f64 {
        let current = (now * PER_SECOND) as u64;
        let count = |number: u64| {
            let slot = self.slots[(number % SLOTS) as usize].load(Relaxed);
            if slot >> COUNT_BITS == number { slot & ((1 << COUNT_BITS) - 1) } else { 0 }
        };
        let seconds =
            (current.saturating_sub(SLOTS - 2)..=current).map(|slot| count(slot) + count(slot.wrapping_sub(1)));
        seconds.max().unwrap_or_default() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_busiest_of_the_last_seconds() {
        let counts = Counts::default();
        for (second, calls) in [(100.0, 5), (101.8, 4), (102.1, 5), (104.0, 2)] {
            (0..calls).for_each(|_| counts.add(second));
        }
        let peaks = [104.0, 109.4, 109.6, 110.1, 120.0].map(|now| counts.peak(now));
        assert_eq!(peaks, [9.0, 9.0, 5.0, 2.0, 0.0], "four and five calls came within a second");
        assert_eq!(counts.total(), 16);
    }

    #[test]
    fn threads_that_count_at_once_lose_no_call() {
        let counts = Counts::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| counts.add(7.5)));
            }
        });
        assert_eq!((counts.total(), counts.peak(7.5)), (4000, 4000.0));
    }
}
