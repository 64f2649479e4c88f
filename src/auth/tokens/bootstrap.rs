//! Adopts `amazon.refresh_token`, a grant given in the configuration.

use sha2::{Digest, Sha256};

use super::{TokenError, TokenManager};
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, RefreshToken};
use crate::store::StoreError;

/// The store note that holds the hash of the last adopted `amazon.refresh_token`.
pub(super) const ADOPTED: &str = "adopted_refresh_token";

impl TokenManager {
    /// Adopts `amazon.refresh_token` as the grant of user `default`, unless it is the last adopted one, or that user
    /// has a usable grant. If there is a grant, this makes a token call: the store does not record that LWA refuses a
    /// grant, so a newly started process has to try it.
    ///
    /// # Errors
    /// [`StoreError`] if the note cannot be read or written.
    pub async fn adopt_configured(&self) -> Result<(), StoreError> {
        self.adopt_configured_instead(None).await
    }

    /// As [`adopt_configured`](Self::adopt_configured). LWA has just refused the grant of the generation `refused`, so
    /// that it is not asked again.
    pub(super) async fn adopt_configured_instead(&self, refused: Option<u64>) -> Result<(), StoreError> {
        let settings = self.0.settings.load_full();
        let Some(token) = &settings.adopt else { return Ok(()) };
        let user = UserId::default();
        let hash = fingerprint(token);
        if self.0.store.note(ADOPTED).await?.as_ref() == Some(&hash) {
            return Ok(());
        }
        if let Err(StoreError::Unreadable(error)) = self.0.store.load(&user).await {
            tracing::error!(%user, %error, "amazon.refresh_token is not adopted: it would overwrite a stored grant \
                that cannot be read");
            return Ok(());
        }
        Box::pin(self.look(&user)).await?;
        // Read once: a background refresh may take over another grant at any moment.
        let held = self.entry(&user).map(|entry| entry.held().clone());
        let held = held.as_ref().and_then(|held| held.grant());
        if held.is_some_and(|grant| grant.refresh_token == *token) {
            // Another process has just adopted it, or this one did before it was stopped.
            return self.0.store.set_note(ADOPTED, hash).await;
        }
        let generation = held.map(|grant| grant.generation);
        match (generation, refused) {
            (None, _) => {}
            (Some(generation), Some(refused)) if generation == refused => {}
            // Somebody has logged in since. The refresh that was refused still runs, and waits for this.
            (Some(_), Some(_)) => return Ok(()),
            (Some(_), None) => {
                if !matches!(self.refresh(&user).await, Err(TokenError::LoginRequired { .. })) {
                    return Ok(());
                }
            }
        }
        let grant = Grant {
            refresh_token: token.clone(),
            previous: None,
            access: None,
            updated_at: self.0.clock.now(),
            consented_at: None,
            used_at: None,
            scope: None,
            generation: 0,
        };
        fail_point!("adoption_decided");
        // What it replaces: nothing, or the grant that was refused. A login that was stored meanwhile is kept; and if
        // that one is refused some day, the token is still there to be adopted.
        let manager = self.clone();
        let adopted = async move { Box::pin(manager.adopt_instead(&user, grant, generation)).await };
        if self.uninterrupted(adopted).await? { self.0.store.set_note(ADOPTED, hash).await } else { Ok(()) }
    }
}

/// The SHA-256 of a refresh token in hexadecimal, to recognize the token without storing it.
fn fingerprint(token: &RefreshToken) -> String {
    Sha256::digest(token.secret().expose().as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}
