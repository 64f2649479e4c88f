//! Who shares an HTTP/2 connection, and who is alone on it.
//!
//! Many calls at once make HTTP/2 cheap: their frames fill one TLS record and one system call. A call that is alone has
//! none of that, and pays for frames, HPACK and two tasks more: measured, 10 to 15 % more CPU than over HTTP/1.1. Only a
//! caller who goes on calling alone is worth another connection; the shared one stays for everybody who comes rarely.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::lock;

/// So many calls one after the other, none beside another, make a lone caller: a handshake costs as much CPU as some
/// dozens of calls.
const LONE: u32 = 128;

#[derive(Debug, Default)]
pub(super) struct Sharing {
    lone: Mutex<Lone>,
}

/// A row of calls that were alone.
#[derive(Debug, Default)]
struct Lone {
    since: Option<Instant>,
    calls: u32,
}

/// One call on the shared connection, until its answer has passed.
#[derive(Debug)]
pub(super) struct Share(Arc<AtomicUsize>);

impl Sharing {
    /// Counts a call among the `calls` of its connection; `true` where it ends a row of [`LONE`] calls that were alone, all within `period`.
    pub(super) fn begin(&self, calls: &Arc<AtomicUsize>, period: Duration) -> (Share, bool) {
        let others = calls.fetch_add(1, Relaxed);
        let share = Share(calls.clone());
        let mut lone = lock(&self.lone);
        if others > 0 {
            *lone = Lone::default();
            return (share, false);
        }
        let now = Instant::now();
        let since = lone.since.filter(|since| now.duration_since(*since) < period).unwrap_or_else(|| {
            lone.calls = 0;
            now
        });
        *lone = Lone { since: Some(since), calls: lone.calls + 1 };
        let ends = lone.calls == LONE;
        if ends {
            *lone = Lone::default();
        }
        (share, ends)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(60);

    #[test]
    fn callers_beside_others_are_never_lone() {
        let sharing = Sharing::default();
        let calls = Arc::default();
        let (_other, _) = sharing.begin(&calls, PERIOD);
        assert!((0..3 * LONE).all(|_| !sharing.begin(&calls, PERIOD).1));
    }

    #[test]
    fn who_calls_rarely_is_never_lone() {
        let sharing = Sharing::default();
        let calls = Arc::default();
        assert!((0..3 * LONE).all(|_| !sharing.begin(&calls, Duration::ZERO).1));
    }

    #[test]
    fn a_row_of_calls_that_were_alone_makes_a_lone_caller_once() {
        let sharing = Sharing::default();
        let calls = Arc::default();
        let ends: Vec<_> = (1..=2 * LONE).filter(|_| sharing.begin(&calls, PERIOD).1).collect();
        assert_eq!(ends, [LONE, 2 * LONE]);
        let (_other, _) = sharing.begin(&calls, PERIOD);
        let (_beside, _) = sharing.begin(&calls, PERIOD);
        drop((_other, _beside));
        assert!((1..LONE).all(|_| !sharing.begin(&calls, PERIOD).1), "the row begins anew");
        assert!(sharing.begin(&calls, PERIOD).1);
    }
}
