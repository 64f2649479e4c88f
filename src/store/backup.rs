//! What a running process needs to back up and restore its store: records page by page, so that they are never all in
//! memory, and records of others opened with its own keys.

use serde_json::Value;

use super::imported_record::{self, ImportError, Imported};
use super::{StoreError, TokenStore};
use crate::domain::account::UserId;

impl TokenStore {
    /// Reads the next records after the user id `after`, as they are stored. An empty page is the end.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn records_after(&self, after: Option<UserId>) -> Result<Vec<(UserId, Value)>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.records_after(after.as_ref())).await,
            Self::Postgres(store) => store.records_after(after.as_ref()).await,
        }
    }

    /// Reads the record of `user` as it is stored; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn record(&self, user: &UserId) -> Result<Option<Value>, StoreError> {
        match self {
            Self::Sled(worker) => {
                let user = user.clone();
                worker.call(move |engine| engine.record(&user)).await
            }
            Self::Postgres(store) => store.record(user).await,
        }
    }

    /// Reads a record that another process or program wrote, with the keys that are in use now.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store is closed. The inner error says why the record yields no grant.
    pub async fn open_foreign(
        &self,
        user: &UserId,
        record: Value,
    ) -> Result<Result<Imported, ImportError>, StoreError> {
        let keyring = match self {
            Self::Sled(worker) => worker.call(|engine| Ok(engine.keyring())).await?,
            Self::Postgres(store) => store.keyring(),
        };
        Ok(imported_record::read(record, user, &keyring))
    }
}

/// A record as JSON; what is no JSON is kept as text.
pub(super) fn value(json: &[u8]) -> Value {
    let text = || Value::String(String::from_utf8_lossy(json).into_owned());
    serde_json::from_slice(json).unwrap_or_else(|_| text())
}
