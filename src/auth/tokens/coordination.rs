//! Coordination of refreshes: within one process, or with other processes that share the store
//! ([`Postgres`]).
//!
//! In a shared store the stored record is authoritative: a process reads it before each refresh, and follows the
//! changes of others ([`Follower`]). A lease lets one process at a time refresh a user's token; the others wait and use
//! the token it stored.
//!
//! A [`Version`] never decreases. If a stored version is lower than the one that this process knows, the database lost
//! data (for example, failover to a lagging standby), and this process restores what it knows: [`Version::reconcile`].
//!
//! [`Postgres`]: crate::store::Postgres
//! [`Version`]: crate::domain::grant::Version
//! [`Version::reconcile`]: crate::domain::grant::Version::reconcile
//!
//! The steps are files of their own: `follower` hears of changes, `refreshed_elsewhere` takes note of refreshes,
//! `take_over` adopts or restores a row, `lease` decides who refreshes, `claims` finds what is due.

use std::sync::Arc;

use super::follower::Follower;
use super::pace::POLL;
use super::refresh_journal::RefreshJournal;
use super::scheduler::Scheduler;
use super::user_state::UserState;
use super::{TokenError, TokenManager};
use crate::domain::account::UserId;
use crate::domain::grant::{Remedy, STORE_UNAVAILABLE};
use crate::store::{Content, StoreError, TokenStore};

/// Whether other processes refresh the same grants, and what prevents a lost or a duplicate refresh.
#[derive(Debug)]
pub(super) enum Coordination {
    /// One process. The journal lets the next process report a refresh that a crash interrupted.
    Local(RefreshJournal),
    /// Several processes on one database. A lease per user lets one of them refresh at a time.
    Shared(Follower),
}

impl Coordination {
    pub(super) fn new(store: &TokenStore) -> Self {
        match store.shared() {
            Some(shared) => Self::Shared(Follower::new(shared.clone())),
            None => Self::Local(RefreshJournal::default()),
        }
    }

    /// What is known of other processes; `None` if there are none.
    pub(super) fn follower(&self) -> Option<&Follower> {
        match self {
            Self::Local(_) => None,
            Self::Shared(follower) => Some(follower),
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
            Coordination::Shared(follower) => {
                tokio::join!(
                    self.follow(follower),
                    self.note_refreshes(follower),
                    self.describe_records(follower),
                    self.publish_pod(follower)
                );
            }
        }
    }

    /// Refreshes tokens before callers need them, until the background ends. A shutdown waits for that: what was
    /// claimed from other processes is refreshed, too.
    pub(super) async fn schedule(&self, scheduler: Scheduler) {
        let schedule = async {
            match &self.0.coordination {
                Coordination::Local(_) => scheduler.run(self).await,
                Coordination::Shared(follower) => self.claim_refreshes(follower, scheduler).await,
            }
        };
        self.0.tasks.track_future(schedule).await;
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

    /// Adopts the stored record of `user` if other processes share the store.
    ///
    /// # Errors
    /// [`StoreError`] if the store cannot be read, or if a record that the database lost cannot be restored.
    pub async fn look(&self, user: &UserId) -> Result<(), StoreError> {
        let Coordination::Shared(follower) = &self.0.coordination else { return Ok(()) };
        if follower.is_absent(user) {
            return Ok(());
        }
        let store = &follower.store;
        let mut read = None;
        if self.entry(user).is_none() {
            let lookup = self.timed("get", store.lookup(user)).await?;
            match &lookup.content {
                Content::Absent => {
                    follower.note_absent(user, self.0.settings.load().cache);
                    return Ok(());
                }
                Content::Unreadable(error) => {
                    tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
                    return Ok(());
                }
                Content::Grant(_) => read = Some(lookup),
            }
        }
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        if let Some(lookup) = read.filter(|lookup| lookup.version > entry.stored()) {
            return self.take_over(store, &entry, &write, lookup).await.map(drop);
        }
        self.catch_up(&entry, &write).await?;
        if entry.held().grant().is_none() {
            follower.note_absent(user, self.0.settings.load().cache);
        }
        Ok(())
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
}

/// The error for callers while the store is unavailable.
fn unavailable() -> TokenError {
    TokenError::Unavailable { code: STORE_UNAVAILABLE, remedy: Remedy::Time, detail: None, retry_after: POLL }
}
