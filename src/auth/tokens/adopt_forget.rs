//! A grant comes, or goes.

use std::sync::Arc;

use super::{Status, TokenManager};
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, GrantState, LiveGrant};
use crate::store::StoreError;

impl TokenManager {
    /// Does `work` in a task of its own, which a shutdown waits for, and gives its result: whoever asked for it may hang up
    /// meanwhile.
    pub async fn uninterrupted<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        match self.0.flights.spawn(work).await {
            Ok(done) => done,
            // Nobody aborts it, so it panicked: that goes on here, as if there were no task in between.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Takes `grant` into use for `user`, in place of whatever there was. Returns once it is stored, or the store said
    /// that it cannot be: then it is used all the same, since its code is spent and nobody else has it, and storing it
    /// is tried until it succeeds.
    pub async fn adopt(&self, user: &UserId, grant: Grant) -> Status {
        let (keeper, user) = (self.clone(), user.clone());
        self.uninterrupted(async move { keeper.adopt_now(&user, grant).await }).await
    }

    async fn adopt_now(&self, user: &UserId, mut grant: Grant) -> Status {
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        grant.generation = write.next_generation();
        grant.used_at = Some(self.0.clock.now());
        self.store(&entry, &write, &mut grant, None).await;
        let now = self.0.clock.moment();
        entry.mark_used(now);
        self.publish(&entry, &write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
        entry.wake();
        tracing::info!(%user, "new grant");
        self.tell(&entry)
    }

    /// Whether what is known of `user` is on disk.
    pub fn is_stored(&self, user: &UserId) -> bool {
        self.entry(user).is_none_or(|entry| !entry.is_unsaved())
    }

    /// Wipes the tokens of `user`. Returns once they are gone from the disk; `false` where there were none.
    pub async fn forget(&self, user: &UserId) -> Result<bool, StoreError> {
        let (keeper, user) = (self.clone(), user.clone());
        self.uninterrupted(async move { keeper.forget_now(&user).await }).await
    }

    async fn forget_now(&self, user: &UserId) -> Result<bool, StoreError> {
        let Some(entry) = self.entry(user) else {
            // A record that does not decrypt is no entry, and a logout means it too.
            return self.timed("erase", self.0.store.erase(user)).await;
        };
        let write = entry.write().await;
        let erased = self.timed("erase", self.0.store.erase(user)).await?;
        if erased && self.0.store.shared().is_some() {
            // There a logout has a generation of its own.
            write.note_stored(write.stored() + 1);
        }
        entry.set_unsaved(false);
        let held = entry.held().grant().is_some();
        self.publish(&entry, &write, GrantState::Nothing);
        entry.wake();
        tracing::info!(%user, "logged out");
        Ok(erased || held)
    }
}
