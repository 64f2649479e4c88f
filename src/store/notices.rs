//! Which notifications were delivered, so that a restart repeats none and several processes deliver one once.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use super::{StoreError, TokenStore};

/// The note with the delivered notifications of a store that one process uses.
const NOTICES: &str = "notices";
/// How long it is remembered that a notification was delivered.
pub(super) const KEPT: SignedDuration = SignedDuration::from_hours(90 * 24);

/// Who delivers a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The caller, within the next minute.
    Mine,
    /// Another process has claimed it.
    Theirs,
    /// It was delivered.
    Done,
}

impl TokenStore {
    /// Claims the delivery of the notification `id`.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read or written.
    pub async fn claim_notice(&self, id: &str, _now: Timestamp) -> Result<Notice, StoreError> {
        match self {
            Self::Sled(_) => {
                let done = self.delivered().await?.contains_key(id);
                Ok(if done { Notice::Done } else { Notice::Mine })
            }
            Self::Postgres(store) => store.claim_notice(id).await,
        }
    }

    /// Gives a claim up, for the next process to try.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn release_notice(&self, id: &str) -> Result<(), StoreError> {
        match self {
            Self::Sled(_) => Ok(()),
            Self::Postgres(store) => store.release_notice(id).await,
        }
    }

    /// Notes that the notification `id` was delivered.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn notice_done(&self, id: &str, now: Timestamp) -> Result<(), StoreError> {
        match self {
            Self::Sled(_) => {
                let mut delivered = self.delivered().await?;
                delivered.insert(id.to_owned(), now);
                delivered.retain(|_, at| now.duration_since(*at) < KEPT);
                self.set_note(NOTICES, serde_json::to_string(&delivered).unwrap_or_default()).await
            }
            Self::Postgres(store) => store.notice_done(id).await,
        }
    }

    async fn delivered(&self) -> Result<BTreeMap<String, Timestamp>, StoreError> {
        let note = self.note(NOTICES).await?;
        // What does not parse was not written by this version: then a notification may be repeated.
        Ok(note.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
    }
}
