//! Samples repeated log lines: a failure that occurs a thousand times a second is reported, but not a thousand times.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::AUDIT_TARGET;

/// Most lines of one kind that are written within [`WINDOW`]: enough to see what happens and to whom, and too few to
/// matter for disk space or logging costs.
const BURST: u32 = 20;
/// Length of the window in which lines of one kind are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// A layer that samples lines by kind. A kind is one log statement in the code. `debug`, `trace` and the audit log are
/// never sampled, because their readers want every line. A clone is another handle to the same counts.
#[derive(Clone, Debug, Default)]
pub(super) struct FloodSampler(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    kinds: Mutex<HashMap<Identifier, Kind>>,
    suppressed: AtomicU64,
}

/// The current window of one kind: when it started, and the number of lines in it.
#[derive(Clone, Copy, Debug)]
struct Kind {
    since: Instant,
    lines: u32,
}

impl FloodSampler {
    /// Returns the number of lines suppressed since the start.
    pub(super) fn suppressed(&self) -> u64 {
        self.0.suppressed.load(Relaxed)
    }

    /// Counts a line of `kind` at `now`, and returns whether it is written.
    fn passes(&self, kind: Identifier, now: Instant) -> bool {
        let mut kinds = self.0.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = kinds.entry(kind).or_insert(Kind { since: now, lines: 0 });
        if now.duration_since(kind.since) >= WINDOW {
            *kind = Kind { since: now, lines: 0 };
        }
        kind.lines = kind.lines.saturating_add(1);
        kind.lines <= BURST
    }
}

impl<S: Subscriber> Layer<S> for FloodSampler {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let line = event.metadata();
        if *line.level() > Level::INFO || line.target() == AUDIT_TARGET || self.passes(line.callsite(), Instant::now())
        {
            return true;
        }
        self.0.suppressed.fetch_add(1, Relaxed);
        false
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// Returns how many of the lines that `lines` logs are suppressed.
    fn suppressed(lines: impl FnOnce()) -> u64 {
        let sampler = FloodSampler::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(sampler.clone()), lines);
        sampler.suppressed()
    }

    #[test]
    fn a_flood_of_one_line_is_sampled_and_other_lines_are_unaffected() {
        let count = suppressed(|| {
            for n in 0..1000 {
                tracing::warn!(n, "no response from Amazon");
            }
            tracing::warn!("the store failed");
        });
        assert_eq!(count, 1000 - u64::from(BURST));
    }

    #[test]
    fn the_audit_log_is_never_sampled() {
        let count = suppressed(|| (0..1000).for_each(|n| tracing::info!(target: AUDIT_TARGET, n, "call")));
        assert_eq!(count, 0);
    }

    #[test]
    fn debug_lines_are_never_sampled() {
        assert_eq!(suppressed(|| (0..1000).for_each(|n| tracing::debug!(n, "call"))), 0);
    }

    #[test]
    fn a_kind_is_written_again_in_the_next_window() {
        let sampler = FloodSampler::default();
        let kind = tracing::callsite::Identifier(&SITE);
        let start = Instant::now();
        let passed = |at: Duration| (0..100).filter(|_| sampler.passes(kind.clone(), start + at)).count();
        assert_eq!(passed(Duration::ZERO), BURST as usize);
        assert_eq!(passed(WINDOW - Duration::from_millis(1)), 0);
        assert_eq!(passed(WINDOW), BURST as usize);
    }

    struct Site;
    static SITE: Site = Site;

    impl tracing::Callsite for Site {
        fn set_interest(&self, _: tracing::subscriber::Interest) {}

        fn metadata(&self) -> &tracing::Metadata<'_> {
            unreachable!("only the address of the callsite is used")
        }
    }
}
