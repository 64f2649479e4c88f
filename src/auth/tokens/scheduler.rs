//! When which user is renewed in the background.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, PoisonError};

use jiff::SignedDuration;
use tokio::sync::{Semaphore, mpsc};

use super::TokenManager;
use super::refresh_task::RefreshReason;
use super::user_state::UserState;
use crate::domain::clock_reading::ClockReading;

/// How often the clocks are compared. A step of the wall clock and a sleep of the machine wake nobody by themselves.
const LOOK_EVERY: SignedDuration = SignedDuration::from_secs(20);

/// A heap of plans. A plan is void once its user has another; the sweep plans everybody anew, so that a lost one is
/// found again.
#[derive(Debug)]
pub(super) struct Scheduler {
    changes: mpsc::UnboundedReceiver<Arc<UserState>>,
    plans: BinaryHeap<Reverse<Plan>>,
}

#[derive(Debug)]
struct Plan {
    /// Uptime.
    due: SignedDuration,
    entry: Arc<UserState>,
}

impl Scheduler {
    pub(super) fn new(changes: mpsc::UnboundedReceiver<Arc<UserState>>) -> Self {
        Self { changes, plans: BinaryHeap::new() }
    }

    pub(super) async fn run(mut self, keeper: &TokenManager) {
        let mut concurrency = 0;
        let mut permits = Arc::new(Semaphore::new(concurrency));
        let clock = keeper.0.clock.clone();
        let mut moves = clock.moves();
        let mut looked = clock.moment();
        let mut next_sweep = looked.uptime;
        loop {
            let settings = keeper.0.settings.load_full();
            if settings.concurrency != concurrency {
                concurrency = settings.concurrency;
                permits = Arc::new(Semaphore::new(concurrency));
            }
            let now = clock.moment();
            let jumped = keeper.look_for_jump(looked, now);
            looked = now;
            if jumped || now.uptime >= next_sweep {
                self.sweep(keeper, now);
                next_sweep = now.uptime.saturating_add(SignedDuration::try_from(settings.sweep).unwrap_or_default());
            }
            let next = next_sweep.min(now.uptime + LOOK_EVERY);
            let wake = self.plans.peek().map_or(next, |Reverse(plan)| plan.due.min(next));
            tokio::select! {
                changed = self.changes.recv() => match changed {
                    Some(entry) => self.plan(keeper, entry, clock.moment()),
                    None => return,
                },
                () = moves.next() => {}
                () = clock.sleep_until(wake) => {
                    let Some(entry) = self.pop(clock.uptime()) else { continue };
                    // Closed never.
                    let Ok(permit) = permits.clone().acquire_owned().await else { return };
                    let keeper = keeper.clone();
                    keeper.0.flights.clone().spawn(async move {
                        keeper.fly_and_wait(&entry, RefreshReason::Due).await;
                        // Where it flew already, or was not wanted, nothing else plans it again.
                        let _ = keeper.0.scheduler.send(entry);
                        drop(permit);
                    });
                }
            }
        }
    }

    /// Plans everybody anew, and tells of consents that are about to end.
    fn sweep(&mut self, keeper: &TokenManager, now: ClockReading) {
        for entry in keeper.entries() {
            keeper.tell_of_consent(&entry, now);
            self.plan(keeper, entry, now);
        }
    }

    fn plan(&mut self, keeper: &TokenManager, entry: Arc<UserState>, now: ClockReading) {
        let due = entry.due(keeper.policy(), now);
        let mut planned = entry.planned.lock().unwrap_or_else(PoisonError::into_inner);
        if *planned != due {
            *planned = due;
            drop(planned);
            self.plans.extend(due.map(|due| Reverse(Plan { due, entry })));
        }
    }

    /// The user whose plan is due, if it still is one.
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
