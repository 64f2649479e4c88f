//! One user's place in the keeper.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use jiff::SignedDuration;

use super::sync::{AtomicBool, AtomicI64, Mutex, PoisonError, SeqCst, WriteGuard, WriteLock, watch};
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Grant, GrantState, LiveGrant, RefreshPolicy, Remedy, STORE_UNAVAILABLE};

/// What is known about one user, and who works on it.
#[derive(Debug)]
pub(super) struct UserState {
    pub(super) user: UserId,
    held: ArcSwap<GrantState>,
    /// Counts what waiters wait for: each change of `held` and each end of a flight.
    version: watch::Sender<u64>,
    /// The uptime at which a caller last used it, in seconds; negative before the process began.
    used: AtomicI64,
    flying: AtomicBool,
    forced_at: Mutex<Option<SignedDuration>>,
    /// For when the scheduler has this user planned; any other plan of it is void.
    pub(super) planned: Mutex<Option<SignedDuration>>,
    /// The background does nothing before this uptime.
    not_before: SignedDuration,
    /// Whether the log has been told that the consent is ending.
    consent_told: AtomicBool,
    /// The highest generation that was ever used, which outlives a logout.
    generation: Mutex<u64>,
    /// The highest generation that is known to have been stored, a logout's among them.
    stored: Mutex<u64>,
    /// Whether the grant is in memory alone, and is still being stored.
    unsaved: AtomicBool,
    write: WriteLock<()>,
}

/// The right to change one user's grant, on disk and in memory. Never held while LWA is asked.
#[derive(Debug)]
pub(super) struct Writing<'a> {
    entry: &'a UserState,
    _lock: WriteGuard<'a, ()>,
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

impl UserState {
    /// `spread`: over how long after the start the background's first renewals are spread.
    pub(super) fn new(user: UserId, grant: Option<Grant>, now: ClockReading, spread: Duration) -> Self {
        let used_at = grant.as_ref().map(|grant| now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
        let wait = SignedDuration::try_from(spread.mul_f64(jitter(&user, None))).unwrap_or_default();
        Self {
            user,
            version: watch::Sender::new(0),
            used: AtomicI64::new(used_at.unwrap_or(SignedDuration::MIN).as_secs()),
            flying: AtomicBool::new(false),
            forced_at: Mutex::new(None),
            planned: Mutex::new(None),
            not_before: if spread.is_zero() { SignedDuration::MIN } else { now.uptime.saturating_add(wait) },
            consent_told: AtomicBool::new(false),
            generation: Mutex::new(grant.as_ref().map_or(0, |grant| grant.generation)),
            stored: Mutex::new(grant.as_ref().map_or(0, |grant| grant.generation)),
            unsaved: AtomicBool::new(false),
            write: WriteLock::new(()),
            held: ArcSwap::from_pointee(match grant {
                Some(grant) => GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))),
                None => GrantState::Nothing,
            }),
        }
    }

    pub(super) fn held(&self) -> arc_swap::Guard<Arc<GrantState>> {
        self.held.load()
    }

    pub(super) fn wake(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    /// Take this before looking at [`held`](Self::held), or a change in between is missed.
    pub(super) fn changed(&self) -> Changed {
        Changed(self.version.subscribe())
    }

    pub(super) fn mark_used(&self, now: ClockReading) {
        if self.used.load(SeqCst) != now.uptime.as_secs() {
            self.used.store(now.uptime.as_secs(), SeqCst);
        }
    }

    /// Another process knows of a later use than this one.
    pub(super) fn mark_used_at(&self, uptime: SignedDuration) {
        if uptime > self.used() {
            self.used.store(uptime.as_secs(), SeqCst);
        }
    }

    pub(super) fn used(&self) -> SignedDuration {
        SignedDuration::from_secs(self.used.load(SeqCst))
    }

    /// The uptime at which the background should renew next.
    pub(super) fn due(&self, policy: RefreshPolicy, now: ClockReading) -> Option<SignedDuration> {
        let held = self.held();
        let jitter = jitter(&self.user, held.grant().map(|grant| grant.generation));
        let due = held.due(policy, self.used(), now, jitter)?;
        Some(due.max(self.not_before))
    }

    /// Waits for its turn to change the grant.
    pub(super) async fn write(&self) -> Writing<'_> {
        Writing { _lock: self.write.lock().await, entry: self }
    }

    /// Begins a flight, unless one is under way.
    pub(super) fn take_off(&self) -> bool {
        fail_point!("flights_many", |_| true);
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
    pub(super) fn force(&self, now: ClockReading, spacing: SignedDuration, fly: impl FnOnce()) -> bool {
        let mut forced_at = self.forced_at.lock().unwrap_or_else(PoisonError::into_inner);
        let may = forced_at.is_none_or(|at| now.uptime >= at.saturating_add(spacing));
        if may && !self.is_flying() && !self.held().backs_off(now) {
            *forced_at = Some(now.uptime);
            fly();
        }
        self.is_flying()
    }

    pub(super) fn is_unsaved(&self) -> bool {
        self.unsaved.load(SeqCst)
    }

    pub(super) fn set_unsaved(&self, unsaved: bool) {
        self.unsaved.store(unsaved, SeqCst);
    }

    /// Ends the wait behind a failure that the operator or the store cures: perhaps that has happened.
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

    /// Whether this is the first time that the end of the present consent is to be told.
    pub(super) fn first_told(&self) -> bool {
        !self.consent_told.swap(true, SeqCst)
    }
}

impl Writing<'_> {
    /// What a renewal of `generation` may replace; `None` where the grant was replaced or logged out since it was asked for.
    pub(super) fn of(&self, generation: u64) -> Option<Arc<GrantState>> {
        // Wrong on purpose, so that the model and the races can show that they would see it.
        fail_point!("renewal_blind", |_| Some(self.entry.held.load_full()));
        let held = self.entry.held.load_full();
        held.is_of(generation).then_some(held)
    }

    /// One above any generation used before, also before a logout.
    pub(super) fn next_generation(&self) -> u64 {
        let mut generation = self.entry.generation.lock().unwrap_or_else(PoisonError::into_inner);
        *generation = generation.max(self.entry.held().grant().map_or(0, |grant| grant.generation)) + 1;
        *generation
    }

    /// The highest generation that is known to have been stored.
    pub(super) fn stored(&self) -> u64 {
        *self.entry.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This generation is stored, by whomever.
    pub(super) fn note_stored(&self, generation: u64) {
        for known in [&self.entry.stored, &self.entry.generation] {
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            *known = generation.max(*known);
        }
    }

    /// Makes `held` what everybody sees. Whoever does [wakes](UserState::wake) those who wait, too: at once, or at the end of the
    /// flight.
    pub(super) fn publish(&self, held: GrantState) {
        let consent = |held: &GrantState| held.grant().and_then(|grant| grant.consented_at);
        if consent(&held) != consent(&self.entry.held()) {
            self.entry.consent_told.store(false, SeqCst);
        }
        self.entry.held.store(Arc::new(held));
    }
}

/// Jitter in `0.0..1.0` that stays the same for one token of one user, so that a plan computed twice is the same plan.
fn jitter(user: &UserId, generation: Option<u64>) -> f64 {
    let mut hasher = DefaultHasher::new();
    user.as_str().hash(&mut hasher);
    generation.hash(&mut hasher);
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}
