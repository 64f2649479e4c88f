//! Background refreshes in a store that several processes share: the database says which are due, and each process
//! claims as many as it can make. None of them plans for the others, and none has to know all users.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::TokenManager;
use super::follower::Follower;
use super::pace::{POLL, longest_pause};
use super::refresh_task::RefreshReason;
use super::scheduler::Scheduler;
use crate::domain::clock_reading::ClockReading;
use crate::store::{Claimed, Content};

/// Interval for comparing wall clock and monotonic clock, as in the [`Scheduler`].
const LOOK_EVERY: Duration = Duration::from_secs(20);

impl TokenManager {
    /// Claims and makes refreshes that are due, at most `refresh.concurrency` at once, until the background ends. A
    /// shutdown does not drop it before: what it had just claimed would wait for its lease, and count as interrupted.
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
            if self.claim_batch(follower, &permits, concurrency).await {
                continue;
            }
            // A poll may bring the time nearer, and so may a change here: nothing is due before either, or before then.
            let until_due =
                follower.pace().wait(now.wall, follower.elapsed()).unwrap_or(LOOK_EVERY).max(self.brake_wait(now));
            let wake = timeout(until_due.min(LOOK_EVERY), follower.polled.notified());
            tokio::select! {
                () = self.0.ending.cancelled() => return,
                _ = wake => {}
                change = changes.recv() => if change.is_none() { return },
            }
        }
    }

    /// Claims as many due refreshes as there are permits, and starts them. Returns whether more may be due at once.
    async fn claim_batch(&self, follower: &Follower, permits: &Arc<Semaphore>, concurrency: usize) -> bool {
        let now = self.0.clock.reading();
        if !follower.pace().is_due(now.wall, follower.elapsed()) {
            return false;
        }
        if permits.available_permits() == 0 {
            // What is due by then, and whether Login with Amazon works by then, is seen by then.
            return tokio::select! {
                () = self.0.ending.cancelled() => false,
                permit = permits.acquire() => permit.is_ok(),
            };
        }
        let elapsed = self.0.circuit.elapsed();
        let limit = self.0.circuit.brake().claimable(now, elapsed, permits.available_permits(), concurrency);
        let mut free: Vec<_> = std::iter::from_fn(|| permits.clone().try_acquire_owned().ok()).take(limit).collect();
        if free.is_empty() {
            return false;
        }
        follower.settle().await;
        if self.0.ending.is_cancelled() {
            return false;
        }
        let claimed = self.timed("claim", follower.store.claim_due(now.wall, free.len())).await;
        let Ok(claimed) = claimed else {
            // The next poll that succeeds says when the next one is due.
            follower.pace().forget();
            return false;
        };
        let (elapsed, longest) = (follower.elapsed(), longest_pause(self.policy()));
        let is_full = follower.pace().claimed(claimed.len(), free.len(), now.wall, elapsed, longest);
        for claimed in claimed {
            let (manager, permit) = (self.clone(), free.pop());
            let store = follower.store.clone();
            self.0.tasks.spawn(async move {
                manager.refresh_claimed(&store, claimed).await;
                drop(permit);
            });
        }
        is_full
    }

    /// How long at least nothing is to be claimed because of the brake. A probe that is running ends it or prolongs it.
    fn brake_wait(&self, now: ClockReading) -> Duration {
        let (elapsed, brake) = (self.0.circuit.elapsed(), self.0.circuit.brake());
        let held = brake.holds(now).map(|(_, wait)| wait);
        if brake.is_refused() { held.unwrap_or_default().max(POLL) } else { brake.turn_wait(elapsed) }
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
