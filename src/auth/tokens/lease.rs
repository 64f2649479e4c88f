//! Before and after a refresh: who may make it. One process at a time has the lease of a user in a shared store; a
//! single process writes its journal instead.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use tokio::time::{Instant, timeout};

use super::FORCED_SPACING;
use super::coordination::Coordination;
use super::follower::Follower;
use super::refresh_task::{RefreshReason, RefreshTask};
use super::take_over::failed_state;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, GrantState, LiveGrant, Remedy, STORE_UNAVAILABLE};
use crate::store::{FailedRefresh, Lease};

/// First interval for checking whether another process has finished its refresh, which doubles up to the second, and
/// the maximum wait for its lease (`LEASE_WAIT`). A lease expires after 15 s, after which at most one other process may
/// take it first.
const LEASE_CHECK: Duration = Duration::from_millis(100);
const LEASE_CHECK_MAX: Duration = Duration::from_millis(800);
const LEASE_WAIT: Duration = Duration::from_secs(35);

const STORE_DOWN: Failure = Failure { code: STORE_UNAVAILABLE, remedy: Remedy::Time, detail: None };
const UNREADABLE: Failure = Failure { code: "record_unreadable", remedy: Remedy::Time, detail: None };
const BUSY: Failure = Failure { code: "renewed_elsewhere", remedy: Remedy::Time, detail: None };

impl RefreshTask {
    /// Waits for the lease and returns the grant to refresh; `None` if no refresh is needed any more.
    pub(super) async fn acquire(&self, why: &RefreshReason) -> Result<Option<Arc<LiveGrant>>, Failure> {
        let Self { manager, entry } = self;
        let Some(follower) = manager.0.coordination.follower() else {
            return Ok(self.wanted(why));
        };
        let shared = &follower.store;
        if let RefreshReason::Claimed { generation, interrupted } = why {
            let wanted = self.wanted(why).filter(|grant| grant.generation == *generation);
            match &wanted {
                Some(_) if *interrupted => self.report_lost(*generation),
                Some(_) => {}
                None => drop(self.release(*generation, None, false).await),
            }
            return Ok(wanted);
        }
        let (until, mut begun, mut pause) = (Instant::now() + LEASE_WAIT, None, LEASE_CHECK);
        loop {
            let write = entry.write().await;
            let is_manual = matches!(why, RefreshReason::Manual);
            let usable = manager.catch_up_unless(entry, &write, is_manual).await.map_err(|_| STORE_DOWN)?;
            drop(write);
            if !usable {
                return Err(UNREADABLE);
            }
            if follower.settle().await {
                continue;
            }
            let forced = matches!(why, RefreshReason::Rejected(_));
            let wanted = self.wanted(why).filter(|grant| !forced || !is_new(grant, manager.0.clock.reading()));
            let Some(grant) = wanted else { return Ok(None) };
            // Another process has refreshed the grant meanwhile: its result serves this process too.
            if *begun.get_or_insert(grant.generation) != grant.generation {
                return Ok(None);
            }
            match manager
                .timed("lease", shared.acquire_lease(&entry.user, grant.generation))
                .await
                .map_err(|_| STORE_DOWN)?
            {
                Lease::Acquired { interrupted } => {
                    if interrupted {
                        self.report_lost(grant.generation);
                    }
                    return Ok(Some(grant));
                }
                Lease::Denied if Instant::now() >= until => return Err(BUSY),
                Lease::Denied => {
                    // The row says what the other process has stored. Of a logout, or a login, this one hears sooner.
                    let _ = timeout(pause, entry.changed().wait()).await;
                    pause = (pause * 2).min(LEASE_CHECK_MAX);
                }
            }
        }
    }

    /// Notes that the response to a refresh of another process may be lost, and reports it once.
    fn report_lost(&self, generation: u64) {
        let user = &self.entry.user;
        if self.manager.0.interrupted.lost(user, generation) {
            tracing::warn!(%user, "another process ended during a refresh, or lost its response; adsidecar tries the \
                stored grant");
        }
    }

    /// Prepares a token call: extends this process's lease for its duration, or writes the refresh to the journal.
    ///
    /// # Errors
    /// The failure to record if another process holds the lease, or if the shared store fails.
    pub(super) async fn prepare(&self, generation: u64) -> Result<(), Failure> {
        let (manager, user) = (&self.manager, &self.entry.user);
        match &manager.0.coordination {
            Coordination::Local(journal) => manager.record_refresh(journal, user, generation).await,
            Coordination::Shared(Follower { store: shared, .. }) => {
                match manager.timed("lease", shared.acquire_lease(user, generation)).await {
                    // This process's lease may have expired, and another process's since.
                    Ok(Lease::Acquired { interrupted: true }) => self.report_lost(generation),
                    Ok(Lease::Acquired { interrupted: false }) => {}
                    Ok(Lease::Denied) => return Err(BUSY),
                    Err(_) => return Err(STORE_DOWN),
                }
            }
        }
        Ok(())
    }

    /// Releases the lease after a refresh of `generation` that stored no change, so that another process may try; not
    /// before the retry of `state`, if it failed. If a response `may_be_lost`, whoever takes the lease next hears that;
    /// or another process, which got the lease because the database had lost it, was refused meanwhile: returns that
    /// state.
    pub(super) async fn release(
        &self,
        generation: u64,
        state: Option<&GrantState>,
        may_be_lost: bool,
    ) -> Option<GrantState> {
        let Follower { store, .. } = self.manager.0.coordination.follower()?;
        let now = self.manager.0.clock.reading();
        let retry_in = |retry_at: SignedDuration| Duration::try_from(retry_at - now.uptime).unwrap_or_default();
        let failed = match state {
            // Without the store nobody can be told, and another process's refresh is no failure.
            Some(GrantState::Failing { failure, .. }) if [STORE_UNAVAILABLE, BUSY.code].contains(&failure.code) => None,
            Some(GrantState::Failing { failure, attempts, retry_at, .. }) => Some(FailedRefresh {
                refused: false,
                code: failure.code.to_owned(),
                attempts: *attempts,
                retry_in: retry_in(*retry_at),
            }),
            Some(GrantState::LoginRequired { reason, retry_at, .. }) => Some(FailedRefresh {
                refused: true,
                code: (*reason).to_owned(),
                attempts: 1,
                retry_in: retry_in(*retry_at),
            }),
            _ => None,
        };
        let due = self.entry.due(self.manager.policy(), now).map(|due| now.wall_at(due));
        let due = match (state, due) {
            (Some(state), Some(due)) => Some(state.retry_at().map_or(due, |retry_at| now.wall_at(retry_at))),
            (_, due) => due,
        };
        let user = &self.entry.user;
        let released = store.release_lease(user, generation, failed.as_ref(), due, may_be_lost);
        // If this fails, the lease expires by itself.
        let is_released = self.manager.timed("lease", released).await.unwrap_or(true);
        if is_released || !may_be_lost {
            return None;
        }
        let lookup = self.manager.timed("get", store.lookup(user)).await.ok()?;
        let refused = lookup.failed.filter(|failed| failed.refused && lookup.version.generation == generation)?;
        Some(failed_state(self.entry.held().grant()?.clone(), &refused, now))
    }
}

/// Whether another process obtained this token within the last `FORCED_SPACING`, which applies across all processes.
fn is_new(grant: &LiveGrant, now: ClockReading) -> bool {
    grant.age_if_foreign(now).is_some_and(|age| age < FORCED_SPACING)
}
