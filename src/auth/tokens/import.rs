//! Takes grants that were made elsewhere: a refresh token, or the records of a backup.

use std::sync::Arc;

use super::TokenManager;
use super::user_state::UserState;
use crate::auth::lwa::LwaError;
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, GrantState, LiveGrant};
use crate::store::StoreError;

impl TokenManager {
    /// Returns `grant` after a refresh at Login with Amazon, which proves that it works.
    ///
    /// # Errors
    /// [`LwaError`] if Login with Amazon refuses it or cannot be reached.
    pub async fn verify(&self, grant: &Grant) -> Result<Grant, LwaError> {
        let sent_at = self.0.clock.now();
        let tokens = self.0.lwa.load_full().refresh(&grant.refresh_token).await?;
        Ok(grant.refreshed(tokens, sent_at))
    }

    /// Stores `grant` for `user` and uses it from then on. Returns `false`, and changes nothing, if `user` has a grant
    /// already and `replace` is not set; a record that cannot be read counts as one.
    ///
    /// # Errors
    /// [`StoreError`] if the store fails. Then nothing changes: unlike the grant of a login, this one exists elsewhere.
    pub async fn import(&self, user: &UserId, grant: Grant, replace: bool) -> Result<bool, StoreError> {
        let (manager, user) = (self.clone(), user.clone());
        self.uninterrupted(async move { Box::pin(manager.import_now(&user, grant, replace)).await }).await
    }

    async fn import_now(&self, user: &UserId, mut grant: Grant, replace: bool) -> Result<bool, StoreError> {
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        if !replace && self.has_grant(&entry).await? {
            return Ok(false);
        }
        grant.generation = write.next_generation();
        let version = self.save(&entry, &grant, None).await?;
        grant.generation = version.generation;
        write.note_stored(version);
        entry.set_unsaved(false);
        let now = self.0.clock.reading();
        entry.mark_used_at(now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
        self.publish(&entry, &write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
        entry.wake();
        tracing::info!(%user, "an imported grant is in use");
        Ok(true)
    }

    async fn has_grant(&self, entry: &UserState) -> Result<bool, StoreError> {
        if entry.held().grant().is_some() {
            return Ok(true);
        }
        match self.0.store.load(&entry.user).await {
            Ok(grant) => Ok(grant.is_some()),
            Err(StoreError::Unreadable(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
