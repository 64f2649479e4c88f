//! Coordination of refreshes: within one process, or with other processes that share the store
//! ([`Postgres`]).
//!
//! In a shared store the stored record is authoritative: a process reads it before each refresh, and polls for changes
//! every second. A lease lets one process at a time refresh a user's token; the others wait and use the token it
//! stored.
//!
//! Generations never decrease. If a stored generation is lower than the one this process knows, the database lost data
//! (for example, failover to a lagging standby), and this process restores what it knows.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::refresh_journal::RefreshJournal;
use super::refresh_task::{RefreshReason, RefreshTask};
use super::user_state::{UserState, Writing};
use super::{FORCED_SPACING, TokenError, TokenManager};
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Grant, GrantState, LiveGrant, Remedy, STORE_UNAVAILABLE};
use crate::store::{Lease, Lookup, Postgres, StoreError, TokenStore};

/// Interval for polling changes made by other processes.
const POLL: Duration = Duration::from_secs(1);
/// Interval for checking whether another process has finished its refresh, and the maximum wait for its lease
/// (`LEASE_WAIT`). A lease expires after 15 s, after which at most one other process may take it first.
const LEASE_CHECK: Duration = Duration::from_millis(100);
const LEASE_WAIT: Duration = Duration::from_secs(35);

const STORE_DOWN: Failure = Failure { code: STORE_UNAVAILABLE, remedy: Remedy::Time, detail: None };
const UNREADABLE: Failure = Failure { code: "record_unreadable", remedy: Remedy::Time, detail: None };
const BUSY: Failure = Failure { code: "renewed_elsewhere", remedy: Remedy::Time, detail: None };

/// Whether other processes refresh the same grants, and what prevents a lost or a duplicate refresh.
#[derive(Debug)]
pub(super) enum Coordination {
    /// One process. The journal lets the next process report a refresh that a crash interrupted.
    Local(RefreshJournal),
    /// Several processes on one database. A lease per user lets one of them refresh at a time.
    Shared(Postgres),
}

impl Coordination {
    pub(super) fn new(store: &TokenStore) -> Self {
        match store.shared() {
            Some(shared) => Self::Shared(shared.clone()),
            None => Self::Local(RefreshJournal::default()),
        }
    }

    /// The generation that a write must find in the store. A single process compares nothing: the stored record is
    /// either the previous one or the one it writes.
    pub(super) fn expected(&self, generation: Option<u64>) -> Option<u64> {
        match self {
            Self::Local(_) => None,
            Self::Shared(_) => generation,
        }
    }
}

impl TokenManager {
    /// Notices when a failed store works again; in a shared store, adopts changes made by other processes. Runs until
    /// dropped.
    pub(super) async fn follow_store(&self) {
        match &self.0.coordination {
            Coordination::Local(_) => self.watch_store().await,
            Coordination::Shared(shared) => self.follow(shared).await,
        }
    }

    /// At startup, reports refreshes that the end of the previous process interrupted.
    pub(super) async fn look_for_interrupted(&self) {
        if let Coordination::Local(journal) = &self.0.coordination {
            self.report_interrupted(journal).await;
        }
    }

    /// Writes down that no refresh is running.
    pub(super) async fn settle_journal(&self) {
        if let Coordination::Local(journal) = &self.0.coordination {
            self.clear_finished(journal).await;
        }
    }

    async fn follow(&self, shared: &Postgres) {
        loop {
            sleep(POLL).await;
            let was_up = self.0.store.health().up;
            let Ok(changed) = self.timed("poll", shared.changed_users()).await else { continue };
            if !was_up {
                tracing::info!("the store works again");
                for entry in self.entries() {
                    entry.try_again(self.0.clock.reading());
                    // Sending fails only during shutdown, when the scheduler is gone.
                    let _ = self.0.scheduler.send(entry);
                }
            }
            for user in changed {
                let _ = self.look(&user).await;
            }
        }
    }

    /// Adopts the stored record of `user` if other processes share the store.
    ///
    /// # Errors
    /// [`StoreError`] if the store cannot be read, or if a record that the database lost cannot be restored.
    pub async fn look(&self, user: &UserId) -> Result<(), StoreError> {
        let Coordination::Shared(shared) = &self.0.coordination else { return Ok(()) };
        if self.entry(user).is_none() {
            match self.timed("get", shared.lookup(user)).await? {
                Lookup::Absent { .. } => return Ok(()),
                Lookup::Unreadable(error) => {
                    tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
                    return Ok(());
                }
                // Read again below, under the write lock.
                Lookup::Grant(_) => {}
            }
        }
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        self.catch_up(&entry, &write).await.map(drop)
    }

    /// The entry of `user`; reads the store if this process does not know a user who may have logged in at another one.
    pub(super) async fn find(&self, user: &UserId) -> Result<Arc<UserState>, TokenError> {
        let entry = match self.entry(user) {
            Some(entry) => Some(entry),
            None => {
                Box::pin(self.look(user)).await.map_err(|_| unavailable())?;
                self.entry(user)
            }
        };
        entry.ok_or(TokenError::LoginRequired { reason: "no_grant" })
    }

    /// Reads the store for a user who needs to log in. Returns whether the user has done so at another process.
    pub(super) async fn logged_in_elsewhere(&self, entry: &Arc<UserState>) -> bool {
        let before = entry.held().grant().map(|grant| grant.generation);
        let looked = Box::pin(self.look(&entry.user)).await.is_ok();
        looked && entry.held().grant().map(|grant| grant.generation) != before
    }

    /// Adopts the stored record. Returns `false` if the record is unusable, `true` if it is a grant or there is none.
    async fn catch_up(&self, entry: &Arc<UserState>, write: &Writing<'_>) -> Result<bool, StoreError> {
        let Coordination::Shared(shared) = &self.0.coordination else { return Ok(true) };
        if entry.is_unsaved() {
            return Ok(true);
        }
        let user = &entry.user;
        let stored = self.timed("get", shared.lookup(user)).await?;
        let held = entry.held().clone();
        let (generation, grant) = match stored {
            Lookup::Unreadable(error) => {
                tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
                return Ok(false);
            }
            Lookup::Grant(grant) => (grant.generation, Some(*grant)),
            Lookup::Absent { generation, .. } => (generation, None),
        };
        match (held.grant(), grant) {
            (Some(held), Some(grant)) if is_same(held, &grant) => {}
            (None, None) => write.note_stored(generation),
            (Some(held), _) if generation < write.stored() => {
                tracing::warn!(%user, "the database has an older generation than this process: the grant is stored \
                    again");
                let mut grant = Grant::clone(held);
                grant.generation = self.timed("put", self.0.store.save(user, &grant, None)).await?;
                write.note_stored(grant.generation);
                let now = self.0.clock.reading();
                self.publish(entry, write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
            }
            (None, Some(_)) if generation < write.stored() => {
                tracing::warn!(%user, "the database has an older generation than this process: the logout is repeated");
                self.timed("erase", self.0.store.erase(user)).await?;
            }
            (_, Some(grant)) => {
                write.note_stored(generation);
                let now = self.0.clock.reading();
                entry.mark_used_at(now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
                self.publish(entry, write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
                entry.wake();
                tracing::debug!(%user, "another process stored a grant");
            }
            (Some(_), None) => {
                write.note_stored(generation);
                self.publish(entry, write, GrantState::Nothing);
                entry.wake();
                tracing::info!(%user, "another process logged the user out");
            }
        }
        Ok(true)
    }

    /// Adopts the stored record after it superseded a refresh of this process.
    pub(super) async fn overtaken(&self, entry: &Arc<UserState>, write: &Writing<'_>) {
        entry.set_unsaved(false);
        // If the store fails, the next read finds the same record.
        let _ = Box::pin(self.catch_up(entry, write)).await;
    }

    /// Makes one more attempt to store a grant that is in memory only. Succeeds if the grant is stored, or if a later
    /// login, logout or refresh superseded it.
    pub(super) async fn store_again(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
        expected: Option<u64>,
    ) -> Result<(), StoreError> {
        let (user, made) = (&entry.user, grant.consented_at.unwrap_or(grant.updated_at));
        let later = match (&self.0.coordination, expected) {
            (Coordination::Shared(shared), None) => match self.timed("get", shared.lookup(user)).await? {
                Lookup::Grant(stored) => stored.consented_at.unwrap_or(stored.updated_at) > made,
                Lookup::Absent { since, .. } => since.is_some_and(|since| since > made),
                Lookup::Unreadable(_) => false,
            },
            _ => false,
        };
        let saved = match later {
            true => Err(StoreError::Conflict),
            false => self.timed("put", self.0.store.save(user, grant, expected)).await,
        };
        match saved {
            Ok(generation) if generation == grant.generation => entry.set_unsaved(false),
            Ok(generation) => {
                entry.set_unsaved(false);
                write.note_stored(generation);
                grant.generation = generation;
                let kept = LiveGrant::loaded(grant.clone(), self.0.clock.reading());
                self.publish(entry, write, GrantState::Fresh(Arc::new(kept)));
            }
            Err(StoreError::Conflict) => {
                tracing::info!(%user, "a later login or logout, or another process's refresh, superseded a grant that \
                    was not stored");
                self.overtaken(entry, write).await;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl RefreshTask {
    /// Waits for the lease and returns the grant to refresh; `None` if no refresh is needed any more.
    pub(super) async fn acquire(&self, why: &RefreshReason) -> Result<Option<Arc<LiveGrant>>, Failure> {
        let Self { manager, entry } = self;
        let Coordination::Shared(shared) = &manager.0.coordination else { return Ok(self.wanted(why)) };
        let (until, mut begun) = (Instant::now() + LEASE_WAIT, None);
        loop {
            let write = entry.write().await;
            let usable = manager.catch_up(entry, &write).await.map_err(|_| STORE_DOWN)?;
            drop(write);
            if !usable {
                return Err(UNREADABLE);
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
                        tracing::warn!(user = %entry.user, "another process ended during a refresh; adsidecar tries \
                            the stored grant");
                        manager.0.interrupted.lost(&entry.user, grant.generation);
                    }
                    return Ok(Some(grant));
                }
                Lease::Denied if Instant::now() >= until => return Err(BUSY),
                Lease::Denied => sleep(LEASE_CHECK).await,
            }
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
            Coordination::Shared(shared) => {
                match manager.timed("lease", shared.acquire_lease(user, generation)).await {
                    Ok(Lease::Acquired { .. }) => {}
                    Ok(Lease::Denied) => return Err(BUSY),
                    Err(_) => return Err(STORE_DOWN),
                }
            }
        }
        Ok(())
    }

    /// Releases the lease after a failed refresh, so that another process may try.
    pub(super) async fn release(&self) {
        if let Coordination::Shared(shared) = &self.manager.0.coordination {
            // If this fails, the lease expires by itself.
            let _ = self.manager.timed("lease", shared.release_lease(&self.entry.user)).await;
        }
    }
}

/// The error for callers while the store is unavailable.
fn unavailable() -> TokenError {
    TokenError::Unavailable { code: STORE_UNAVAILABLE, remedy: Remedy::Time, detail: None, retry_after: POLL }
}

fn is_same(held: &Grant, stored: &Grant) -> bool {
    let access = |grant: &Grant| grant.access.as_ref().map(|access| access.token.clone());
    held.generation == stored.generation && held.refresh_token == stored.refresh_token && access(held) == access(stored)
}

/// Whether another process obtained this token within the last `FORCED_SPACING`, which applies across all processes.
fn is_new(grant: &LiveGrant, now: ClockReading) -> bool {
    grant.age_if_foreign(now).is_some_and(|age| age < FORCED_SPACING)
}
