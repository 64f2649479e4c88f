//! Beside other processes, on a store that all of them share ([`Postgres`](crate::store::Postgres)).
//!
//! What is stored counts, for everybody: it is looked at before a renewal begins, and what changed is looked for every second.
//! Of all processes one at a time asks for a user's token; the others wait, and use what it stored.
//!
//! Generations never go back. Where a stored one is lower than one that this process knows, the database lost something (a
//! standby took over that was behind, say), and what is known here is put back.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::refresh_task::{Flight, RefreshReason};
use super::user_state::{UserState, Writing};
use super::{FORCED_SPACING, TokenError, TokenManager};
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Grant, GrantState, LiveGrant, Remedy, STORE_UNAVAILABLE};
use crate::store::{Lease, StoreError, Stored};

/// How often it is looked for what others changed.
const POLL: Duration = Duration::from_secs(1);
/// How often it is looked whether another process has come to the end of its renewal, and for how long. Its lease ends after
/// 15 s, and after that it is somebody else's turn at most once more.
const LOOK: Duration = Duration::from_millis(100);
const TURN: Duration = Duration::from_secs(35);

const STORE_DOWN: Failure = Failure { code: STORE_UNAVAILABLE, remedy: Remedy::Time };
const UNREADABLE: Failure = Failure { code: "record_unreadable", remedy: Remedy::Time };
const BUSY: Failure = Failure { code: "renewed_elsewhere", remedy: Remedy::Time };

impl TokenManager {
    /// Takes over what others changed, for as long as it runs, and notices when a store that failed works again.
    pub(super) async fn follow(&self) {
        let Some(shared) = self.0.store.shared() else { return };
        loop {
            sleep(POLL).await;
            let was_up = self.0.store.health().up;
            let Ok(changed) = self.timed("poll", shared.changes()).await else { continue };
            if !was_up {
                tracing::info!("the store works again");
                for entry in self.entries() {
                    entry.try_again(self.0.clock.moment());
                    // The background is gone only when the process is about to be.
                    let _ = self.0.scheduler.send(entry);
                }
            }
            for user in changed {
                let _ = self.look(&user).await;
            }
        }
    }

    /// Takes over what is stored for `user`, where others may have changed it.
    pub async fn look(&self, user: &UserId) -> Result<(), StoreError> {
        let Some(shared) = self.0.store.shared() else { return Ok(()) };
        if self.entry(user).is_none() {
            match self.timed("get", shared.look(user)).await? {
                Stored::Gone { .. } => return Ok(()),
                Stored::Unusable(error) => {
                    tracing::error!(%user, %error, "a stored grant cannot be used and is kept");
                    return Ok(());
                }
                // Looked at once more, with the right to change what is known.
                Stored::Grant(_) => {}
            }
        }
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        self.catch_up(&entry, &write).await.map(drop)
    }

    /// The entry of `user`, who may have logged in elsewhere a moment ago.
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

    /// Looks whether a user who would have to log in did so elsewhere. Says whether that is so.
    pub(super) async fn logged_in_elsewhere(&self, entry: &Arc<UserState>) -> bool {
        let before = entry.held().grant().map(|grant| grant.generation);
        let looked = Box::pin(self.look(&entry.user)).await.is_ok();
        looked && self.0.store.shared().is_some() && entry.held().grant().map(|grant| grant.generation) != before
    }

    /// Takes over what is stored. Says whether that is a grant or nothing, and not a record that cannot be used.
    async fn catch_up(&self, entry: &Arc<UserState>, write: &Writing<'_>) -> Result<bool, StoreError> {
        let Some(shared) = self.0.store.shared().filter(|_| !entry.is_unsaved()) else { return Ok(true) };
        let user = &entry.user;
        let stored = self.timed("get", shared.look(user)).await?;
        let held = entry.held().clone();
        let (generation, grant) = match stored {
            Stored::Unusable(error) => {
                tracing::error!(%user, %error, "a stored grant cannot be used and is kept");
                return Ok(false);
            }
            Stored::Grant(grant) => (grant.generation, Some(*grant)),
            Stored::Gone { generation, .. } => (generation, None),
        };
        match (held.grant(), grant) {
            (Some(held), Some(grant)) if is_same(held, &grant) => {}
            (None, None) => write.note_stored(generation),
            (Some(held), _) if generation < write.stored() => {
                tracing::warn!(%user, "the database is behind what is known here: the grant is put back");
                let mut grant = Grant::clone(held);
                grant.generation = self.timed("put", self.0.store.save(user, &grant, None)).await?;
                write.note_stored(grant.generation);
                let now = self.0.clock.moment();
                self.publish(entry, write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
            }
            (None, Some(_)) if generation < write.stored() => {
                tracing::warn!(%user, "the database is behind what is known here: the logout is repeated");
                self.timed("erase", self.0.store.erase(user)).await?;
            }
            (_, Some(grant)) => {
                write.note_stored(generation);
                let now = self.0.clock.moment();
                entry.mark_used_at(now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
                self.publish(entry, write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
                entry.wake();
                tracing::debug!(%user, "another process stored a grant");
            }
            (Some(_), None) => {
                write.note_stored(generation);
                self.publish(entry, write, GrantState::Nothing);
                entry.wake();
                tracing::info!(%user, "logged out elsewhere");
            }
        }
        Ok(true)
    }

    /// A renewal was overtaken: what overtook it is taken over.
    pub(super) async fn overtaken(&self, entry: &Arc<UserState>, write: &Writing<'_>) {
        entry.set_unsaved(false);
        // Where the store does not answer, the next look finds the same.
        let _ = Box::pin(self.catch_up(entry, write)).await;
    }

    /// Tries once more to store a grant that is in memory alone. It comes to an end where it is stored, and where a later login
    /// or logout has taken its place.
    pub(super) async fn store_again(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
        expected: Option<u64>,
    ) -> Result<(), StoreError> {
        let (user, made) = (&entry.user, grant.consented_at.unwrap_or(grant.updated_at));
        let later = match (self.0.store.shared(), expected) {
            (Some(shared), None) => match self.timed("get", shared.look(user)).await? {
                Stored::Grant(stored) => stored.consented_at.unwrap_or(stored.updated_at) > made,
                Stored::Gone { since, .. } => since.is_some_and(|since| since > made),
                Stored::Unusable(_) => false,
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
                let kept = LiveGrant::loaded(grant.clone(), self.0.clock.moment());
                self.publish(entry, write, GrantState::Fresh(Arc::new(kept)));
            }
            Err(StoreError::Conflict) if self.0.store.shared().is_some() => {
                tracing::info!(%user, "a later login or logout, or another process's renewal, has taken the place of a grant that was not stored");
                self.overtaken(entry, write).await;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl Flight {
    /// The grant to renew, once it is this process's turn; `None` where nothing is left to be done.
    pub(super) async fn turn(&self, why: &RefreshReason) -> Result<Option<Arc<LiveGrant>>, Failure> {
        let Self { keeper, entry } = self;
        let Some(shared) = keeper.0.store.shared() else { return Ok(self.wanted(why)) };
        let (until, mut begun) = (Instant::now() + TURN, None);
        loop {
            let write = entry.write().await;
            let usable = keeper.catch_up(entry, &write).await.map_err(|_| STORE_DOWN)?;
            drop(write);
            if !usable {
                return Err(UNREADABLE);
            }
            let forced = matches!(why, RefreshReason::Distrusted(_));
            let wanted = self.wanted(why).filter(|grant| !forced || !is_new(grant, keeper.0.clock.moment()));
            let Some(grant) = wanted else { return Ok(None) };
            // What another process renewed meanwhile, it renewed for us too.
            if *begun.get_or_insert(grant.generation) != grant.generation {
                return Ok(None);
            }
            match keeper.timed("lease", shared.lease(&entry.user, grant.generation)).await.map_err(|_| STORE_DOWN)? {
                Lease::Ours { interrupted } => {
                    if interrupted {
                        tracing::warn!(user = %entry.user, "a renewal was interrupted by the end of another process; the stored grant is tried");
                        keeper.0.journal.lost(&entry.user, grant.generation);
                    }
                    return Ok(Some(grant));
                }
                Lease::Refused if Instant::now() >= until => return Err(BUSY),
                Lease::Refused => sleep(LOOK).await,
            }
        }
    }

    /// Makes sure that it is still this process's turn, for as long as a token call takes.
    pub(super) async fn may_ask(&self, generation: u64) -> Result<(), Failure> {
        let (keeper, user) = (&self.keeper, &self.entry.user);
        let Some(shared) = keeper.0.store.shared() else {
            keeper.intend(user, generation).await;
            return Ok(());
        };
        match keeper.timed("lease", shared.lease(user, generation)).await {
            Ok(Lease::Ours { .. }) => Ok(()),
            Ok(Lease::Refused) => Err(BUSY),
            Err(_) => Err(STORE_DOWN),
        }
    }

    /// Nothing was renewed: it is somebody else's turn.
    pub(super) async fn give_way(&self) {
        if let Some(shared) = self.keeper.0.store.shared() {
            // Where this fails, the lease ends by itself.
            let _ = self.keeper.timed("lease", shared.release(&self.entry.user)).await;
        }
    }
}

/// What callers are told while the store cannot be asked.
fn unavailable() -> TokenError {
    TokenError::Unavailable { code: STORE_UNAVAILABLE, remedy: Remedy::Time, retry_after: POLL }
}

fn is_same(held: &Grant, stored: &Grant) -> bool {
    let access = |grant: &Grant| grant.access.as_ref().map(|access| access.token.clone());
    held.generation == stored.generation && held.refresh_token == stored.refresh_token && access(held) == access(stored)
}

/// Whether another process had this token made a moment ago: forced refreshes are that far apart over all of them.
fn is_new(grant: &LiveGrant, now: ClockReading) -> bool {
    grant.age_elsewhere(now).is_some_and(|age| age < FORCED_SPACING)
}
