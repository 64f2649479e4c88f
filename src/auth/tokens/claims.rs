//! Background refreshes in a store that several processes share: the database says which are due, and each process
//! claims as many as it can make. None of them plans for the others, and none has to know all users.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::TokenManager;
use super::client_circuit::Brake;
use super::follower::Follower;
use super::refresh_task::RefreshReason;
use super::scheduler::Scheduler;
use crate::store::{Claimed, Content};

/// Interval for comparing wall clock and monotonic clock, as in the [`Scheduler`].
const LOOK_EVERY: Duration = Duration::from_secs(20);

impl TokenManager {
    /// Claims and makes refreshes that are due, at most `refresh.concurrency` at once. Runs until dropped, or until all
    /// senders of changes are gone.
    pub(super) async fn claim_refreshes(&self, follower: &Follower, scheduler: Scheduler) {
        let mut changes = scheduler.into_changes();
        let (mut concurrency, mut permits) = (0, Arc::new(Semaphore::new(0)));
        let mut looked = self.0.clock.reading();
        let mut next_sweep = looked.uptime;
        loop {
            let settings = self.0.settings.load_full();
            if settings.concurrency != concurrency {
                concurrency = settings.concurrency;
                permits = Arc::new(Semaphore::new(concurrency));
            }
            let now = self.0.clock.reading();
            self.look_for_jump(looked, now);
            looked = now;
            if now.uptime >= next_sweep {
                self.entries().iter().for_each(|entry| self.log_consent_end(entry, now));
                next_sweep = now.uptime.saturating_add(SignedDuration::try_from(settings.sweep).unwrap_or_default());
            }
            if self.claim_batch(follower, &permits).await {
                continue;
            }
            // A poll may bring the time nearer, and so may a change here: nothing is due before either, or before then.
            let due_at = *follower.due_at.lock().unwrap_or_else(PoisonError::into_inner);
            let until_due = due_at.and_then(|due| Duration::try_from(due.duration_since(now.wall)).ok());
            let wake = timeout(until_due.unwrap_or(LOOK_EVERY).min(LOOK_EVERY), follower.polled.notified());
            tokio::select! {
                _ = wake => {}
                change = changes.recv() => if change.is_none() { return },
            }
        }
    }

    /// Claims as many due refreshes as there are permits, and starts them. Returns whether more may be due at once.
    ///
    /// While the brake holds, none is claimed: each would fail without a call, and cost statements for every user that
    /// is due, again and again. Once it has ended, one is claimed, and the next poll tells what became of it.
    async fn claim_batch(&self, follower: &Follower, permits: &Arc<Semaphore>) -> bool {
        let now = self.0.clock.reading();
        let is_due = || {
            let due_at = *follower.due_at.lock().unwrap_or_else(PoisonError::into_inner);
            due_at.is_some_and(|due| due <= now.wall)
        };
        let most = match self.0.circuit.brake(now) {
            Brake::Released => usize::MAX,
            Brake::Ended => 1,
            Brake::Holds => 0,
        };
        if !is_due() || most == 0 {
            return false;
        }
        follower.settle().await;
        // The semaphore is never closed.
        let Ok(first) = permits.clone().acquire_owned().await else { return false };
        let more = std::iter::from_fn(|| permits.clone().try_acquire_owned().ok());
        let mut free: Vec<_> = std::iter::once(first).chain(more).take(most).collect();
        let claimed = self.timed("claim", follower.store.claim_due(now.wall, free.len())).await.unwrap_or_default();
        let is_full = claimed.len() == free.len();
        if !is_full {
            // The next poll says when the next one is due.
            *follower.due_at.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        for claimed in claimed {
            let (manager, permit) = (self.clone(), free.pop());
            let store = follower.store.clone();
            self.0.tasks.spawn(async move {
                manager.refresh_claimed(&store, claimed).await;
                drop(permit);
            });
        }
        is_full && most > 1
    }

    async fn refresh_claimed(&self, store: &crate::store::Postgres, claimed: Claimed) {
        let Claimed { user, lookup, interrupted } = claimed;
        let generation = lookup.version.generation;
        if !matches!(lookup.content, Content::Grant(_)) {
            // It cannot be refreshed here, and is not due again until somebody stores another record.
            let _ = self.timed("lease", store.release_lease(&user, generation, None, None, interrupted)).await;
            return;
        }
        let entry = self.entry_or_new(&user);
        let write = entry.write().await;
        let taken = self.take_over(store, &entry, &write, lookup).await;
        drop(write);
        if taken.is_ok() {
            self.refresh_and_wait(&entry, RefreshReason::Claimed { generation, interrupted }).await;
        }
    }
}
