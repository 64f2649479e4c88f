//! When something last happened: a connection received a byte, a request used a region.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// When something last happened: a connection received a byte, or began to wait for one; a request used a region.
#[derive(Debug)]
pub(super) struct Activity(AtomicU64);

/// What [`Activity`] counts from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Stands for "never".
const NEVER: u64 = u64::MAX;

impl Activity {
    pub(super) fn never() -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(NEVER)))
    }

    pub(super) fn now() -> Arc<Self> {
        let activity = Self(AtomicU64::new(0));
        activity.touch();
        Arc::new(activity)
    }

    pub(super) fn touch(&self) {
        self.0.store(START.elapsed().as_millis() as u64, Relaxed);
    }

    /// The time since; very long if it never happened.
    pub(super) fn elapsed(&self) -> Duration {
        match self.0.load(Relaxed) {
            NEVER => Duration::MAX,
            at => START.elapsed().saturating_sub(Duration::from_millis(at)),
        }
    }
}
