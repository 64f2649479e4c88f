//! Takes over what is stored for a user in a shared store, and restores what the database has lost.

use std::sync::Arc;

use jiff::SignedDuration;
use tokio::time::Instant;

use super::TokenManager;
use super::brake::remedy_of;
use super::client_circuit::known_code;
use super::follower::Follower;
use super::user_state::{UserState, Writing};
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Grant, GrantState, LiveGrant, Stored, Verdict, Version};
use crate::store::{Content, FailedRefresh, Lookup, Postgres, StoreError};

/// Number of attempts to take over a row that other processes keep changing.
const MAX_ATTEMPTS: usize = 10;

impl TokenManager {
    /// Adopts the stored record. Returns `false` if the record is unusable, `true` if it is a grant or there is none.
    pub(super) async fn catch_up(&self, entry: &Arc<UserState>, write: &Writing<'_>) -> Result<bool, StoreError> {
        self.catch_up_unless(entry, write, false).await
    }

    /// As [`catch_up`](Self::catch_up). If a person asked for a refresh, another process's failure does not count,
    /// unless Login with Amazon asked all processes to wait.
    pub(super) async fn catch_up_unless(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        is_manual: bool,
    ) -> Result<bool, StoreError> {
        let Some(Follower { store, .. }) = self.0.coordination.follower() else { return Ok(true) };
        if entry.is_unsaved() {
            return Ok(true);
        }
        let mut lookup = self.timed("get", store.lookup(&entry.user)).await?;
        lookup.failed.take_if(|failed| is_manual && failed.code != "throttled");
        self.take_over(store, entry, write, lookup).await
    }

    /// Adopts the stored record as it was read under the write lock. If the database has lost what this process knows,
    /// restores that instead, unless the row changes meanwhile: then that change is adopted.
    pub(super) async fn take_over(
        &self,
        store: &Postgres,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        mut lookup: Lookup,
    ) -> Result<bool, StoreError> {
        if entry.is_unsaved() {
            return Ok(true);
        }
        let user = &entry.user;
        for _ in 0..MAX_ATTEMPTS {
            if let Some(follower) = self.0.coordination.follower() {
                entry.set_read_at(follower.milliseconds(Instant::now()));
            }
            let Lookup { version, content, failed, .. } = lookup;
            let held = entry.held().clone();
            let stored = match content {
                Content::Unreadable(error) => {
                    tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
                    return Ok(false);
                }
                Content::Grant(grant) => Some(*grant),
                Content::Absent => None,
            };
            let seen = seen_by(held.grant().map(|held| &***held), stored.as_ref());
            let restored = match entry.stored().reconcile(held.grant().is_some(), version, seen) {
                Verdict::TakeOver => {
                    write.note_stored(version);
                    self.adopt_stored(entry, write, &held, stored, failed.as_ref());
                    return Ok(true);
                }
                Verdict::PutBack(newer) => {
                    let Some(grant) = held.grant() else { return Ok(true) };
                    tracing::warn!(%user, "the database has an older version than this process: the grant is stored \
                        again");
                    let put = self.timed("put", store.put_back(user, grant, newer, version.generation)).await?;
                    put.then(|| (newer, Some(Grant { generation: newer.generation, ..Grant::clone(grant) })))
                }
                Verdict::RepeatLogout(newer) => {
                    tracing::warn!(%user, "the database has an older version than this process: logged out again");
                    let erased = self.timed("erase", store.repeat_logout(user, newer, version.generation)).await?;
                    erased.then_some((newer, None))
                }
            };
            if let Some((version, grant)) = restored {
                write.note_stored(version);
                if let Some(grant) = grant {
                    let now = self.0.clock.reading();
                    self.publish(entry, write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
                    entry.wake();
                }
                return Ok(true);
            }
            // Another process has changed the row since: what it stored counts.
            lookup = self.timed("get", store.lookup(user)).await?;
        }
        Err(StoreError::Conflict)
    }

    /// Makes what is stored the current state. `failed` is how a refresh of it failed, at whatever process: its answer
    /// counts for all.
    fn adopt_stored(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        held: &GrantState,
        stored: Option<Grant>,
        failed: Option<&FailedRefresh>,
    ) {
        let (user, now) = (&entry.user, self.0.clock.reading());
        match (held.grant(), stored) {
            (Some(grant), Some(stored)) if is_same(grant, &stored) => {
                if let Some(failed) = failed.filter(|failed| failed.attempts > held.attempts()) {
                    self.publish(entry, write, failed_state(grant.clone(), failed, now));
                    entry.wake();
                }
            }
            (None, None) => {}
            (_, Some(grant)) => {
                if held.grant().is_none_or(|held| held.refresh_token != grant.refresh_token) {
                    // What became of the grant before it does not matter any more.
                    self.0.interrupted.end(user);
                }
                entry.mark_used_at(now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
                let grant = Arc::new(LiveGrant::loaded(grant, now));
                let state = match failed {
                    Some(failed) => failed_state(grant, failed, now),
                    None => GrantState::Fresh(grant),
                };
                self.publish(entry, write, state);
                entry.wake();
                tracing::debug!(%user, "another process stored a grant");
            }
            (Some(_), None) => {
                self.0.interrupted.end(user);
                self.publish(entry, write, GrantState::Nothing);
                entry.wake();
                tracing::info!(%user, "another process logged the user out");
            }
        }
    }

    /// Adopts the stored record after it superseded a refresh of this process.
    pub(super) async fn overtaken(&self, entry: &Arc<UserState>, write: &Writing<'_>) {
        entry.set_unsaved(false);
        // If the store fails, the next read finds the same record.
        let _ = Box::pin(self.catch_up(entry, write)).await;
    }

    /// Stores the result of a refresh that the store refused because its generation is not the expected one, if that is
    /// so because the database has lost what the refresh was based on, or because another process has stored that
    /// again: its refresh token is used up. Returns whether the result is stored.
    pub(super) async fn store_over_loss(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
    ) -> Result<bool, StoreError> {
        let Some(Follower { store, .. }) = self.0.coordination.follower() else { return Ok(false) };
        let lookup = self.timed("get", store.lookup(&entry.user)).await?;
        let seen = match &lookup.content {
            Content::Absent => Stored::Nothing,
            Content::Unreadable(_) => Stored::Grant,
            Content::Grant(stored) => seen_by(Some(grant), Some(stored)),
        };
        let Verdict::PutBack(newer) = entry.stored().reconcile(true, lookup.version, seen) else { return Ok(false) };
        let newer = Version { generation: newer.generation.max(grant.generation), ..newer };
        let put = self.timed("put", store.put_back(&entry.user, grant, newer, lookup.version.generation)).await?;
        if put {
            grant.generation = newer.generation;
            write.note_stored(newer);
        }
        Ok(put)
    }

    /// Makes one more attempt to store a grant that is in memory only. Succeeds if the grant is stored, or if a later
    /// login, logout or refresh superseded it. `since` is when this process got the grant.
    pub(super) async fn store_again(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
        expected: Option<u64>,
        since: Instant,
    ) -> Result<(), StoreError> {
        let user = &entry.user;
        let saved = match (self.0.coordination.follower(), expected) {
            // By the database's clock and by how long ago it was here, and by no comparison of two clocks.
            (Some(Follower { store, .. }), None) => {
                self.timed("put", store.consent(user, grant, since.elapsed())).await
            }
            _ => self.save(entry, grant, expected).await,
        };
        match saved {
            Ok(version) => {
                entry.set_unsaved(false);
                write.note_stored(version);
                if version.generation != grant.generation {
                    grant.generation = version.generation;
                    let kept = LiveGrant::loaded(grant.clone(), self.0.clock.reading());
                    self.publish(entry, write, GrantState::Fresh(Arc::new(kept)));
                }
            }
            Err(StoreError::Conflict) => {
                if expected.is_some() && self.store_over_loss(entry, write, grant).await? {
                    entry.set_unsaved(false);
                    let kept = LiveGrant::loaded(grant.clone(), self.0.clock.reading());
                    self.publish(entry, write, GrantState::Fresh(Arc::new(kept)));
                    return Ok(());
                }
                tracing::info!(%user, "a later login or logout, or another process's refresh, superseded a grant that \
                    was not stored");
                self.overtaken(entry, write).await;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// The state of a grant whose last refresh failed at whatever process.
pub(super) fn failed_state(grant: Arc<LiveGrant>, failed: &FailedRefresh, now: ClockReading) -> GrantState {
    let retry_at = now.uptime.saturating_add(SignedDuration::try_from(failed.retry_in).unwrap_or_default());
    let code = known_code(&failed.code);
    if failed.refused {
        return GrantState::LoginRequired { grant, reason: code, retry_at };
    }
    let failure = Failure { code, remedy: remedy_of(code), detail: None };
    GrantState::Failing { grant, failure, attempts: failed.attempts, retry_at }
}

/// What is stored, as seen by a process that holds `held`.
fn seen_by(held: Option<&Grant>, stored: Option<&Grant>) -> Stored {
    let Some(stored) = stored else { return Stored::Nothing };
    let is_successor = |held: &Grant| held.previous.as_ref() == Some(&stored.refresh_token);
    // Login with Amazon may also have refused the later of two refresh tokens, and accepted the earlier one again.
    let is_replaced = |held: &Grant| stored.previous.as_ref() == Some(&held.refresh_token);
    let is_used_up = held.is_some_and(|held| is_successor(held) && !is_replaced(held));
    if is_used_up { Stored::UsedUp } else { Stored::Grant }
}

fn is_same(held: &Grant, stored: &Grant) -> bool {
    let access = |grant: &Grant| grant.access.as_ref().map(|access| access.token.clone());
    held.generation == stored.generation && held.refresh_token == stored.refresh_token && access(held) == access(stored)
}
