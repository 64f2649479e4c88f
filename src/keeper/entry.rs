//! One user's place in the keeper.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{MutexGuard, watch};

use crate::account::UserId;
use crate::token::{Grant, Held};

/// What is known about one user, and who works on it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) user: UserId,
    held: ArcSwap<Held>,
    /// Counts what waiters wait for: each change of `held` and each end of a flight.
    version: watch::Sender<u64>,
    /// Seconds since 1970.
    used_at: AtomicI64,
    flying: AtomicBool,
    forced_at: Mutex<Option<Timestamp>>,
    /// For when the agenda has this user planned; any other plan of it is void.
    pub(super) planned: Mutex<Option<Timestamp>>,
    /// The highest generation that was ever used, which outlives a logout.
    generation: Mutex<u64>,
    /// Held while the grant is changed on disk and in memory; never while LWA is asked.
    write: tokio::sync::Mutex<()>,
}

/// Waits for the next change after the instant it was made.
#[derive(Debug)]
pub(super) struct Changed(watch::Receiver<u64>);

impl Changed {
    pub(super) async fn wait(mut self) {
        // The sender is gone only with the entry itself.
        let _ = self.0.changed().await;
    }
}

impl Entry {
    pub(super) fn new(user: UserId, grant: Option<Grant>) -> Self {
        let used_at = grant.as_ref().map_or(Timestamp::UNIX_EPOCH, |grant| grant.used_at.unwrap_or(grant.updated_at));
        Self {
            user,
            version: watch::Sender::new(0),
            used_at: AtomicI64::new(used_at.as_second()),
            flying: AtomicBool::new(false),
            forced_at: Mutex::default(),
            planned: Mutex::default(),
            generation: Mutex::new(grant.as_ref().map_or(0, |grant| grant.generation)),
            write: tokio::sync::Mutex::default(),
            held: ArcSwap::from_pointee(grant.map_or(Held::Nothing, |grant| Held::Fresh(Arc::new(grant)))),
        }
    }

    pub(super) fn held(&self) -> arc_swap::Guard<Arc<Held>> {
        self.held.load()
    }

    /// Whoever sets it [wakes](Self::wake) those who wait, too: at once, or at the end of the flight.
    pub(super) fn set(&self, held: Held) {
        self.held.store(Arc::new(held));
    }

    pub(super) fn wake(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    /// Take this before looking at [`held`](Self::held), or a change in between is missed.
    pub(super) fn changed(&self) -> Changed {
        Changed(self.version.subscribe())
    }

    pub(super) fn mark_used(&self, now: Timestamp) {
        if self.used_at.load(SeqCst) != now.as_second() {
            self.used_at.store(now.as_second(), SeqCst);
        }
    }

    pub(super) fn used_at(&self) -> Timestamp {
        Timestamp::from_second(self.used_at.load(SeqCst)).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    pub(super) async fn write(&self) -> MutexGuard<'_, ()> {
        self.write.lock().await
    }

    /// One above any generation used before, also before a logout.
    pub(super) fn next_generation(&self) -> u64 {
        let mut generation = self.generation.lock().unwrap_or_else(PoisonError::into_inner);
        *generation = generation.max(self.held().grant().map_or(0, |grant| grant.generation)) + 1;
        *generation
    }

    /// Begins a flight, unless one is under way.
    pub(super) fn take_off(&self) -> bool {
        !self.flying.swap(true, SeqCst)
    }

    pub(super) fn land(&self) {
        self.flying.store(false, SeqCst);
        self.wake();
    }

    pub(super) fn is_flying(&self) -> bool {
        self.flying.load(SeqCst)
    }

    /// Begins a forced refresh by `fly`, unless one was made less than `spacing` ago. Returns whether a flight is under
    /// way now: looking, counting and beginning are one step, so that whoever comes beside it joins it.
    pub(super) fn force(&self, now: Timestamp, spacing: SignedDuration, fly: impl FnOnce()) -> bool {
        let mut forced_at = self.forced_at.lock().unwrap_or_else(PoisonError::into_inner);
        // A clock that was set back must not forbid it for long.
        let may = forced_at.is_none_or(|at| now < at || now >= at + spacing);
        if may && !self.is_flying() && !self.held().backs_off(now) {
            *forced_at = Some(now);
            fly();
        }
        self.is_flying()
    }

    /// Jitter that stays the same for one token of one user, so that a plan computed twice is the same plan.
    pub(super) fn dice(&self) -> f64 {
        let mut hasher = DefaultHasher::new();
        self.user.as_str().hash(&mut hasher);
        self.held().grant().map(|grant| grant.generation).hash(&mut hasher);
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }
}
