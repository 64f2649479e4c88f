//! The state of one user in the token manager. Times called *uptime* are on the monotonic clock, since the process
//! started: see [`ClockReading::uptime`].

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use jiff::SignedDuration;

use super::sync::{AtomicBool, AtomicI64, Mutex, PoisonError, SeqCst, WriteGuard, WriteLock, watch};
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Grant, GrantState, LiveGrant, RefreshPolicy, Remedy, STORE_UNAVAILABLE, Version};

/// One user's grant state, schedule, and refresh task flag.
#[derive(Debug)]
pub(super) struct UserState {
    pub(super) user: UserId,
    held: ArcSwap<GrantState>,
    /// Incremented for waiters on each published change of `held` and at the end of each refresh task.
    version: watch::Sender<u64>,
    /// The uptime, in seconds, at which a caller last used the grant; negative if before this process started.
    used: AtomicI64,
    /// Whether a refresh task is running.
    refreshing: AtomicBool,
    /// The uptime of the last forced refresh.
    forced_at: Mutex<Option<SignedDuration>>,
    /// The uptime for which the scheduler has planned this user; any other plan for the user is void.
    pub(super) planned: Mutex<Option<SignedDuration>>,
    /// The scheduler does not refresh this user before this uptime.
    not_before: SignedDuration,
    /// Whether the end of the current consent has been logged.
    consent_end_logged: AtomicBool,
    /// The highest generation ever used; a logout does not reset it.
    generation: Mutex<u64>,
    /// The highest version known to be stored, including those of logouts.
    stored: Mutex<Version>,
    /// When the store was last read for this user, in milliseconds since the coordination began; for a shared store.
    read_at: AtomicI64,
    /// Whether the grant is in memory only, while a task retries to store it.
    unsaved: AtomicBool,
    write: WriteLock<()>,
}

/// The write lock on one user's grant, in the store and in memory. Never held during a call to LWA.
#[derive(Debug)]
pub(super) struct Writing<'a> {
    entry: &'a UserState,
    _lock: WriteGuard<'a, ()>,
}

/// Waits for the next change after its creation.
#[derive(Debug)]
pub(super) struct Changed(watch::Receiver<u64>);

impl Changed {
    pub(super) async fn wait(mut self) {
        // The sender lives as long as the entry.
        let _ = self.0.changed().await;
    }
}

impl UserState {
    /// `spread`: the time after startup over which the first background refreshes are spread.
    pub(super) fn new(user: UserId, grant: Option<Grant>, now: ClockReading, spread: Duration) -> Self {
        let used_at = grant.as_ref().map(|grant| now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
        let wait = SignedDuration::try_from(spread.mul_f64(jitter(&user, None))).unwrap_or_default();
        Self {
            user,
            version: watch::Sender::new(0),
            used: AtomicI64::new(used_at.unwrap_or(SignedDuration::MIN).as_secs()),
            refreshing: AtomicBool::new(false),
            forced_at: Mutex::new(None),
            planned: Mutex::new(None),
            not_before: if spread.is_zero() { SignedDuration::MIN } else { now.uptime.saturating_add(wait) },
            consent_end_logged: AtomicBool::new(false),
            generation: Mutex::new(grant.as_ref().map_or(0, |grant| grant.generation)),
            stored: Mutex::new(Version { epoch: 0, generation: grant.as_ref().map_or(0, |grant| grant.generation) }),
            read_at: AtomicI64::new(i64::MIN),
            unsaved: AtomicBool::new(false),
            write: WriteLock::new(()),
            held: ArcSwap::from_pointee(match grant {
                Some(grant) => GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))),
                None => GrantState::Nothing,
            }),
        }
    }

    /// The current state of the user's grant.
    pub(super) fn held(&self) -> arc_swap::Guard<Arc<GrantState>> {
        self.held.load()
    }

    /// Wakes all waiters, which then read [`held`](Self::held) again.
    pub(super) fn wake(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    /// Subscribes to changes. Call it before reading [`held`](Self::held), or a change in between is missed.
    pub(super) fn changed(&self) -> Changed {
        Changed(self.version.subscribe())
    }

    /// Records that a caller uses the grant now. Writes at most once a second, so that requests do not contend for it.
    pub(super) fn mark_used(&self, now: ClockReading) {
        if self.used.load(SeqCst) != now.uptime.as_secs() {
            self.used.store(now.uptime.as_secs(), SeqCst);
        }
    }

    /// Records a use reported by another process, if it is later than the known one.
    pub(super) fn mark_used_at(&self, uptime: SignedDuration) {
        if uptime > self.used() {
            self.used.store(uptime.as_secs(), SeqCst);
        }
    }

    /// The uptime at which a caller last used the grant, in whole seconds.
    pub(super) fn used(&self) -> SignedDuration {
        SignedDuration::from_secs(self.used.load(SeqCst))
    }

    /// The uptime at which the scheduler should refresh next.
    pub(super) fn due(&self, policy: RefreshPolicy, now: ClockReading) -> Option<SignedDuration> {
        let held = self.held();
        let jitter = jitter(&self.user, held.grant().map(|grant| grant.generation));
        let due = held.due(policy, self.used(), now, jitter)?;
        Some(due.max(self.not_before))
    }

    /// Acquires the write lock on the grant.
    pub(super) async fn write(&self) -> Writing<'_> {
        Writing { _lock: self.write.lock().await, entry: self }
    }

    /// Marks a refresh task as running. Returns `false` if one already is.
    pub(super) fn try_begin_refresh(&self) -> bool {
        fail_point!("refresh_duplicated", |_| true);
        !self.refreshing.swap(true, SeqCst)
    }

    /// Marks the refresh task as finished and wakes all waiters.
    pub(super) fn end_refresh(&self) {
        self.refreshing.store(false, SeqCst);
        self.wake();
    }

    pub(super) fn is_refreshing(&self) -> bool {
        self.refreshing.load(SeqCst)
    }

    /// Starts a forced refresh with `start_refresh` unless the last one was less than `spacing` ago. Returns whether a
    /// refresh task is running now. Check, timestamp and start happen under one lock, so that concurrent callers join
    /// the same task.
    pub(super) fn force(&self, now: ClockReading, spacing: SignedDuration, start_refresh: impl FnOnce()) -> bool {
        let mut forced_at = self.forced_at.lock().unwrap_or_else(PoisonError::into_inner);
        let may = forced_at.is_none_or(|at| now.uptime >= at.saturating_add(spacing));
        if may && !self.is_refreshing() && !self.held().backs_off(now) {
            *forced_at = Some(now.uptime);
            start_refresh();
        }
        self.is_refreshing()
    }

    /// The highest version known to be stored.
    pub(super) fn stored(&self) -> Version {
        *self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the store was last read for this user, in milliseconds since the coordination began.
    pub(super) fn read_at(&self) -> i64 {
        self.read_at.load(SeqCst)
    }

    pub(super) fn set_read_at(&self, milliseconds: i64) {
        self.read_at.store(milliseconds, SeqCst);
    }

    /// Whether the grant is in memory only.
    pub(super) fn is_unsaved(&self) -> bool {
        self.unsaved.load(SeqCst)
    }

    pub(super) fn set_unsaved(&self, unsaved: bool) {
        self.unsaved.store(unsaved, SeqCst);
    }

    /// Ends the backoff after a failure that the operator or the store resolves, since that may have happened.
    pub(super) fn try_again(&self, now: ClockReading) {
        self.held.rcu(|held| match &**held {
            GrantState::Failing { grant, failure, .. }
                if failure.remedy == Remedy::Operator || failure.code == STORE_UNAVAILABLE =>
            {
                let (grant, failure) = (grant.clone(), failure.clone());
                Arc::new(GrantState::Failing { grant, failure, attempts: 0, retry_at: now.uptime })
            }
            _ => held.clone(),
        });
    }

    /// Marks the end of the current consent as logged. Returns `true` once per consent: it was not marked before.
    pub(super) fn mark_consent_end_logged(&self) -> bool {
        !self.consent_end_logged.swap(true, SeqCst)
    }
}

impl Writing<'_> {
    /// The state that a refresh of `generation` may replace; `None` if the grant was replaced or logged out since the
    /// refresh began.
    pub(super) fn unchanged_since(&self, generation: u64) -> Option<Arc<GrantState>> {
        // Deliberately wrong: it proves that the model checker and the race tests detect this bug.
        fail_point!("refresh_blind", |_| Some(self.entry.held.load_full()));
        let held = self.entry.held.load_full();
        held.is_of(generation).then_some(held)
    }

    /// One more than any generation used before, including those before a logout.
    pub(super) fn next_generation(&self) -> u64 {
        let mut generation = self.entry.generation.lock().unwrap_or_else(PoisonError::into_inner);
        *generation = generation.max(self.entry.held().grant().map_or(0, |grant| grant.generation)) + 1;
        *generation
    }

    /// Records that this version is stored, by this process or another.
    pub(super) fn note_stored(&self, version: Version) {
        let mut stored = self.entry.stored.lock().unwrap_or_else(PoisonError::into_inner);
        *stored = version.max(*stored);
        let mut generation = self.entry.generation.lock().unwrap_or_else(PoisonError::into_inner);
        *generation = version.generation.max(*generation);
    }

    /// Makes `held` the current state. The caller must also [wake](UserState::wake) the waiters: at once, or at the end
    /// of the refresh task.
    pub(super) fn publish(&self, held: GrantState) {
        let consent = |held: &GrantState| held.grant().and_then(|grant| grant.consented_at);
        if consent(&held) != consent(&self.entry.held()) {
            self.entry.consent_end_logged.store(false, SeqCst);
        }
        self.entry.held.store(Arc::new(held));
    }
}

/// Jitter in `0.0..1.0`, deterministic per user and generation, so that computing a plan twice gives the same plan.
fn jitter(user: &UserId, generation: Option<u64>) -> f64 {
    let mut hasher = DefaultHasher::new();
    user.as_str().hash(&mut hasher);
    generation.hash(&mut hasher);
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}
