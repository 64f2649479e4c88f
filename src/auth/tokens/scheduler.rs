//! Schedules the background refresh of each user.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, PoisonError};

use jiff::SignedDuration;
use tokio::sync::{Semaphore, mpsc};

use super::TokenManager;
use super::refresh_task::RefreshReason;
use super::user_state::UserState;
use crate::domain::clock_reading::ClockReading;

/// Interval for comparing wall clock and monotonic clock: a clock step or a suspend of the machine wakes no task by
/// itself.
const LOOK_EVERY: SignedDuration = SignedDuration::from_secs(20);

/// A heap of planned refreshes. A plan is void once its user has another; the sweep reschedules every user, so that a
/// lost plan is replaced.
#[derive(Debug)]
pub(super) struct Scheduler {
    changes: mpsc::UnboundedReceiver<Arc<UserState>>,
    plans: BinaryHeap<Reverse<Plan>>,
}

#[derive(Debug)]
struct Plan {
    /// The uptime at which the refresh is due.
    due: SignedDuration,
    entry: Arc<UserState>,
}

impl Scheduler {
    pub(super) fn new(changes: mpsc::UnboundedReceiver<Arc<UserState>>) -> Self {
        Self { changes, plans: BinaryHeap::new() }
    }

    /// The users whose schedule changed, for a schedule that the shared store keeps.
    pub(super) fn into_changes(self) -> mpsc::UnboundedReceiver<Arc<UserState>> {
        self.changes
    }

    /// Runs due refreshes, at most `refresh.concurrency` at once, until the background ends.
    pub(super) async fn run(mut self, manager: &TokenManager) {
        let mut concurrency = 0;
        let mut permits = Arc::new(Semaphore::new(concurrency));
        let clock = manager.0.clock.clone();
        let mut moves = clock.moves();
        let mut looked = clock.reading();
        let mut next_sweep = looked.uptime;
        loop {
            let settings = manager.0.settings.load_full();
            if settings.concurrency != concurrency {
                concurrency = settings.concurrency;
                permits = Arc::new(Semaphore::new(concurrency));
            }
            let now = clock.reading();
            let jumped = manager.look_for_jump(looked, now);
            looked = now;
            if jumped || now.uptime >= next_sweep {
                self.sweep(manager, now);
                next_sweep = now.uptime.saturating_add(SignedDuration::try_from(settings.sweep).unwrap_or_default());
            }
            let next = next_sweep.min(now.uptime + LOOK_EVERY);
            let wake = self.plans.peek().map_or(next, |Reverse(plan)| plan.due.min(next));
            tokio::select! {
                () = manager.0.ending.cancelled() => return,
                changed = self.changes.recv() => match changed {
                    Some(entry) => self.plan(manager, entry, clock.reading()),
                    None => return,
                },
                () = moves.next() => {}
                () = clock.sleep_until(wake) => {
                    let Some(entry) = self.pop(clock.uptime()) else { continue };
                    let permit = tokio::select! {
                        biased;
                        () = manager.0.ending.cancelled() => return,
                        permit = permits.clone().acquire_owned() => permit,
                    };
                    // The semaphore is never closed.
                    let Ok(permit) = permit else { return };
                    let manager = manager.clone();
                    manager.0.tasks.clone().spawn(async move {
                        manager.refresh_and_wait(&entry, RefreshReason::Due).await;
                        // If a refresh was already running or not needed, nothing else reschedules this user.
                        let _ = manager.0.scheduler.send(entry);
                        drop(permit);
                    });
                }
            }
        }
    }

    /// Reschedules every user, and logs consents that are about to expire.
    fn sweep(&mut self, manager: &TokenManager, now: ClockReading) {
        for entry in manager.entries() {
            manager.log_consent_end(&entry, now);
            self.plan(manager, entry, now);
        }
    }

    fn plan(&mut self, manager: &TokenManager, entry: Arc<UserState>, now: ClockReading) {
        let due = entry.due(manager.policy(), now);
        let mut planned = entry.planned.lock().unwrap_or_else(PoisonError::into_inner);
        if *planned != due {
            *planned = due;
            drop(planned);
            self.plans.extend(due.map(|due| Reverse(Plan { due, entry })));
        }
    }

    /// Removes the next plan if it is due, and returns its user if the plan is still valid.
    fn pop(&mut self, uptime: SignedDuration) -> Option<Arc<UserState>> {
        if self.plans.peek().is_none_or(|Reverse(plan)| plan.due > uptime) {
            return None;
        }
        let Reverse(Plan { due, entry }) = self.plans.pop()?;
        let mut planned = entry.planned.lock().unwrap_or_else(PoisonError::into_inner);
        let valid = *planned == Some(due);
        if valid {
            *planned = None;
        }
        drop(planned);
        valid.then_some(entry)
    }
}

impl PartialEq for Plan {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Plan {}

impl PartialOrd for Plan {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Plan {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}
