//! Whether a call shares an HTTP/2 connection, or has an HTTP/1.1 connection to itself.
//!
//! Many calls at once make HTTP/2 cheap: their frames fill one TLS record and one system call. Few have none of that, and
//! pay for frames, HPACK and two tasks more: measured, 5 to 25 % more CPU than over HTTP/1.1 for up to eight at once, and
//! 5 to 10 % less for sixteen and more. Only callers who go on calling are worth more connections; the shared one stays for
//! everybody who comes rarely, and for the moment when many come.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::lock;

/// So many calls at once are few.
const FEW: usize = 12;
/// So many calls on the shared connection, one after the other, each among few, are worth HTTP/1.1 connections for all who
/// call: a handshake costs as much CPU as some dozens of calls.
const ROW: u32 = 64;

#[derive(Debug, Default)]
pub(super) struct Sharing {
    at_once: Arc<AtomicUsize>,
    row: Mutex<Row>,
    /// Whether HTTP/1.1 connections are being made.
    pub(super) adding: AtomicBool,
}

/// Calls that shared a connection with few others.
#[derive(Debug, Default)]
struct Row {
    since: Option<Instant>,
    calls: u32,
}

/// Something that is counted for as long as it lasts.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counted {
    /// Counts one more, and says how many there were before.
    pub(super) fn among(count: &Arc<AtomicUsize>) -> (Self, usize) {
        let others = count.fetch_add(1, Relaxed);
        (Self(count.clone()), others)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Sharing {
    /// Counts a call until its answer has passed, and says whether it is among few.
    pub(super) fn enter(&self) -> (Counted, bool) {
        let (call, others) = Counted::among(&self.at_once);
        (call, others < FEW)
    }

    /// How many calls are under way.
    pub(super) fn at_once(&self) -> usize {
        self.at_once.load(Relaxed)
    }

    /// A call is sent on the shared connection; `true` where it ends a row of [`ROW`] calls that were few, all within `period`.
    pub(super) fn ends_row(&self, few: bool, period: Duration) -> bool {
        let mut row = lock(&self.row);
        if !few {
            *row = Row::default();
            return false;
        }
        let now = Instant::now();
        let since = row.since.filter(|since| now.duration_since(*since) < period).unwrap_or_else(|| {
            row.calls = 0;
            now
        });
        *row = Row { since: Some(since), calls: row.calls + 1 };
        let ends = row.calls == ROW;
        if ends {
            *row = Row::default();
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(60);

    #[test]
    fn a_call_is_among_few_until_more_are_under_way() {
        let sharing = Sharing::default();
        let calls: Vec<_> = (0..=FEW).map(|_| sharing.enter()).collect();
        let few: Vec<_> = calls.iter().map(|(_, few)| *few).collect();
        assert!(few[..FEW].iter().all(|few| *few) && !few[FEW]);
        drop(calls);
        assert!(sharing.enter().1, "what is over does not count");
    }

    #[test]
    fn who_calls_rarely_ends_no_row() {
        let sharing = Sharing::default();
        assert!((0..3 * ROW).all(|_| !sharing.ends_row(true, Duration::ZERO)));
    }

    #[test]
    fn each_row_of_calls_that_were_few_ends_once() {
        let sharing = Sharing::default();
        let ends: Vec<_> = (1..=2 * ROW).filter(|_| sharing.ends_row(true, PERIOD)).collect();
        assert_eq!(ends, [ROW, 2 * ROW]);
    }

    #[test]
    fn a_call_among_many_makes_the_row_begin_anew() {
        let sharing = Sharing::default();
        assert!((1..ROW).all(|_| !sharing.ends_row(true, PERIOD)));
        assert!(!sharing.ends_row(false, PERIOD));
        assert!((1..ROW).all(|_| !sharing.ends_row(true, PERIOD)));
        assert!(sharing.ends_row(true, PERIOD));
    }
}
