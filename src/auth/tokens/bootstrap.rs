//! `amazon.refresh_token`: a grant that the configuration brings.

use sha2::{Digest, Sha256};

use super::{TokenError, TokenManager};
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, RefreshToken};
use crate::store::StoreError;

/// The note under which the hash of the `amazon.refresh_token` adopted last is stored.
pub(super) const ADOPTED: &str = "adopted_refresh_token";

impl TokenManager {
    /// Adopts `amazon.refresh_token` as user `default`, unless it is the one adopted last, or that user has a usable
    /// grant. Where there is a grant this takes a token call: whether LWA refuses a grant is written down nowhere, so a
    /// process that has just started has to ask.
    pub async fn adopt_configured(&self) -> Result<(), StoreError> {
        let settings = self.0.settings.load_full();
        let Some(token) = &settings.adopt else { return Ok(()) };
        let user = UserId::default();
        let hash = fingerprint(token);
        if self.0.store.note(ADOPTED).await?.as_ref() == Some(&hash) {
            return Ok(());
        }
        if let Err(StoreError::Record(error)) = self.0.store.load(&user).await {
            tracing::error!(%user, %error, "amazon.refresh_token is not adopted: a stored grant that cannot be read would be lost");
            return Ok(());
        }
        let has_grant = self.entry(&user).is_some_and(|entry| entry.held().grant().is_some());
        if has_grant && !matches!(self.refresh(&user).await, Err(TokenError::LoginRequired { .. })) {
            return Ok(());
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
        self.adopt(&user, grant).await;
        self.0.store.set_note(ADOPTED, hash).await
    }
}

/// Tells refresh tokens apart without holding one.
fn fingerprint(token: &RefreshToken) -> String {
    Sha256::digest(token.secret().expose().as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}
