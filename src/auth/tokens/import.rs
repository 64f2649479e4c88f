//! Takes grants that were made elsewhere: a refresh token, or the records of a backup.

use std::sync::Arc;

use super::TokenManager;
use crate::auth::lwa::LwaError;
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, GrantState, LiveGrant};
use crate::store::StoreError;

/// Why a grant was not imported.
#[derive(Debug)]
pub enum ImportError {
    /// Login with Amazon refuses it, or cannot be reached.
    Refused(LwaError),
    /// The store failed.
    Store(StoreError),
}

impl TokenManager {
    /// Stores `grant` for `user` and uses it from then on. With `verify`, a refresh at Login with Amazon proves first
    /// that it works. Returns `false`, and changes nothing, if `user` has a grant already and `replace` is not set; a
    /// record that cannot be read counts as one.
    ///
    /// # Errors
    /// [`ImportError`]. Then nothing changes: unlike the grant of a login, this one exists elsewhere. If Login with
    /// Amazon has rotated it, it does not: then it is used from memory, and storing it is retried, as after a login.
    pub async fn import(&self, user: &UserId, grant: Grant, replace: bool, verify: bool) -> Result<bool, ImportError> {
        let (manager, user) = (self.clone(), user.clone());
        // Login with Amazon may rotate the refresh token that it is shown: an operator who hangs up must not lose it,
        // and it is not shown one that would not be taken.
        let import = async move {
            if !verify {
                return Box::pin(manager.import_now(&user, grant, replace, false)).await.map_err(ImportError::Store);
            }
            if !replace && manager.has_grant(&user).await.map_err(ImportError::Store)? {
                return Ok(false);
            }
            let verified = manager.verified(&grant).await.map_err(ImportError::Refused)?;
            let is_rotated = verified.refresh_token != grant.refresh_token;
            Box::pin(manager.import_now(&user, verified, replace, is_rotated)).await.map_err(ImportError::Store)
        };
        self.uninterrupted(import).await
    }

    async fn verified(&self, grant: &Grant) -> Result<Grant, LwaError> {
        let sent_at = self.0.clock.now();
        let tokens = self.0.lwa.load_full().refresh(&grant.refresh_token).await?;
        Ok(grant.refreshed(tokens, sent_at))
    }

    /// Stores `grant` and uses it. One that `is_rotated` exists nowhere else any more.
    async fn import_now(
        &self,
        user: &UserId,
        mut grant: Grant,
        replace: bool,
        is_rotated: bool,
    ) -> Result<bool, StoreError> {
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        if !replace && self.has_grant(user).await? {
            return Ok(false);
        }
        if is_rotated {
            self.replace(&entry, &write, grant).await;
            tracing::info!(%user, "an imported grant is in use");
            return Ok(true);
        }
        grant.generation = write.next_generation();
        let version = self.save(&entry, &grant, None).await?;
        grant.generation = version.generation;
        write.note_stored(version);
        entry.set_unsaved(false);
        // What became of the grant before it does not matter any more.
        self.0.interrupted.end(user);
        let now = self.0.clock.reading();
        entry.mark_used_at(now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
        self.publish(&entry, &write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
        entry.wake();
        tracing::info!(%user, "an imported grant is in use");
        Ok(true)
    }

    async fn has_grant(&self, user: &UserId) -> Result<bool, StoreError> {
        if self.entry(user).is_some_and(|entry| entry.held().grant().is_some()) {
            return Ok(true);
        }
        match self.0.store.load(user).await {
            Ok(grant) => Ok(grant.is_some()),
            Err(StoreError::Unreadable(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
