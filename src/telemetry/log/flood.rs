//! A line that comes in a flood is sampled: a failure that happens a thousand times a second is told, not written a
//! thousand times.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::AUDIT_TARGET;

/// So many lines of one kind are written within [`WINDOW`]: enough to see what happens and to whom, few enough that a
/// disk or a bill does not notice.
const BURST: u32 = 20;
/// After this long a kind may be written again.
const WINDOW: Duration = Duration::from_secs(10);

/// Samples lines by their kind, which is the place in the code that says them. `debug`, `trace` and the audit log are not
/// sampled: who asks for each step gets each step. Cloning gives another handle to the same counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Floods(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    kinds: Mutex<HashMap<Identifier, Kind>>,
    held_back: AtomicU64,
}

/// One kind of line: when its window began, and how many came in it.
#[derive(Clone, Copy, Debug)]
struct Kind {
    since: Instant,
    lines: u32,
}

impl Floods {
    /// How many lines were left out since the start.
    pub(super) fn held_back(&self) -> u64 {
        self.0.held_back.load(Relaxed)
    }

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

impl<S: Subscriber> Layer<S> for Floods {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let line = event.metadata();
        if *line.level() > Level::INFO || line.target() == AUDIT_TARGET || self.passes(line.callsite(), Instant::now())
        {
            return true;
        }
        self.0.held_back.fetch_add(1, Relaxed);
        false
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// What `lines` has a log of this layer alone count as left out.
    fn held_back(lines: impl FnOnce()) -> u64 {
        let floods = Floods::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(floods.clone()), lines);
        floods.held_back()
    }

    #[test]
    fn a_flood_of_one_line_is_sampled_and_other_lines_are_not_its_victims() {
        let lost = held_back(|| {
            for n in 0..1000 {
                tracing::warn!(n, "no answer from Amazon");
            }
            tracing::warn!("the store failed");
        });
        assert_eq!(lost, 1000 - u64::from(BURST));
    }

    #[test]
    fn no_line_of_the_audit_log_is_left_out() {
        let lost = held_back(|| (0..1000).for_each(|n| tracing::info!(target: AUDIT_TARGET, n, "call")));
        assert_eq!(lost, 0);
    }

    #[test]
    fn who_asks_for_each_step_gets_each_step() {
        assert_eq!(held_back(|| (0..1000).for_each(|n| tracing::debug!(n, "call"))), 0);
    }

    #[test]
    fn a_kind_that_was_quiet_for_a_while_is_written_again() {
        let floods = Floods::default();
        let kind = tracing::callsite::Identifier(&SITE);
        let begun = Instant::now();
        let passed = |at: Duration| (0..100).filter(|_| floods.passes(kind.clone(), begun + at)).count();
        assert_eq!(passed(Duration::ZERO), BURST as usize);
        assert_eq!(passed(WINDOW - Duration::from_millis(1)), 0);
        assert_eq!(passed(WINDOW), BURST as usize);
    }

    struct Site;
    static SITE: Site = Site;

    impl tracing::Callsite for Site {
        fn set_interest(&self, _: tracing::subscriber::Interest) {}

        fn metadata(&self) -> &tracing::Metadata<'_> {
            unreachable!("only its address is asked for")
        }
    }
}
