//! Operators' tasks: listing and dumping all records, and rotating keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_postgres::types::Type;

use super::connection::{OnDisconnect, Parameters};
use super::{KEY_NOTE, Postgres, StoredRow, digest, locked, sealed_json};
use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::store::backup::value;
use crate::store::keyring::Keyring;
use crate::store::{Reseal, Sealed, StoreError, Users};

impl Postgres {
    /// See [`TokenStore::scan`](crate::store::TokenStore::scan).
    pub(in crate::store) async fn scan(&self) -> Result<Users, StoreError> {
        let ring = self.0.keyring.load_full();
        let mut users = Users::new();
        self.for_each_row(|row| users.push((row.user.clone(), row.open(&ring).0))).await?;
        Ok(users)
    }

    /// See [`TokenStore::dump`](crate::store::TokenStore::dump).
    pub(in crate::store) async fn dump(&self) -> Result<BTreeMap<UserId, serde_json::Value>, StoreError> {
        let mut all = BTreeMap::new();
        self.for_each_row(|row| all.extend([(row.user, value(row.json.as_bytes()))])).await?;
        Ok(all)
    }

    /// See [`TokenStore::records_after`](crate::store::TokenStore::records_after).
    pub(in crate::store) async fn records_after(
        &self,
        after: Option<&UserId>,
    ) -> Result<Vec<(UserId, serde_json::Value)>, StoreError> {
        let mut last = after.map_or_else(String::new, |user| user.as_str().to_owned());
        loop {
            let (rows, next) = self.page(&last).await?;
            match next {
                // A page of rows that we did not write.
                Some(next) if rows.is_empty() => last = next,
                _ => return Ok(rows.into_iter().map(|row| (row.user, value(row.json.as_bytes()))).collect()),
            }
        }
    }

    /// See [`TokenStore::record`](crate::store::TokenStore::record).
    pub(in crate::store) async fn record(&self, user: &UserId) -> Result<Option<serde_json::Value>, StoreError> {
        Ok(self.row(user).await?.0.map(|row| value(row.json.as_bytes())))
    }

    /// The keys in use.
    pub(in crate::store) fn keyring(&self) -> Arc<Keyring> {
        self.0.keyring.load_full()
    }

    /// See [`TokenStore::rekey`](crate::store::TokenStore::rekey).
    pub(in crate::store) async fn rekey(&self, keyring: Arc<Keyring>) -> Result<(), StoreError> {
        let found = self.note(KEY_NOTE).await?;
        let last = found.as_deref().and_then(|key| key.parse().ok()).unwrap_or(self.0.keyring.load().first());
        if !keyring.fingerprints().contains(&last) {
            return Err(StoreError::WrongKey { expected: Some(last), have: keyring.fingerprints() });
        }
        self.set_key(found.as_deref(), &keyring).await?;
        self.0.keyring.store(keyring.clone());
        self.for_each_row(|row| {
            let (_, sealed) = row.open(&keyring);
            // A row that has changed since it was remembered will be reported as changed, and read then.
            let mut known = locked(&self.0.known);
            let known = known.get_mut(&row.user).filter(|known| known.digest == digest(&row.json));
            if let Some(known) = known {
                known.sealed = sealed;
            }
        })
        .await
    }

    /// See [`TokenStore::reseal`](crate::store::TokenStore::reseal).
    pub(in crate::store) async fn reseal(&self) -> Result<Reseal, StoreError> {
        let ring = self.0.keyring.load_full();
        let mut done = Reseal::default();
        let mut after = Some(String::new());
        while let Some(last) = after {
            let (rows, next) = self.page(&last).await?;
            for row in rows {
                self.reseal_row(row, &ring, &mut done).await?;
            }
            after = next;
        }
        self.reseal_pending(&ring).await?;
        Ok(done)
    }

    /// Seals one row with the first key, unless it already is, and counts the result in `done`.
    async fn reseal_row(&self, row: StoredRow, ring: &Keyring, done: &mut Reseal) -> Result<(), StoreError> {
        let mut next = Some(row);
        // Try again if another process changed the row meanwhile.
        while let Some(row) = next {
            let (Ok(record), (Ok(grant), _)) = (row.record(), row.open(ring)) else {
                done.unreadable += 1;
                break;
            };
            if record.key_index(ring) == Some(0) {
                break;
            }
            if self.reseal_unchanged(&row, &grant, ring).await? {
                done.resealed += 1;
                break;
            }
            next = self.row(&row.user).await?.0;
        }
        Ok(())
    }

    /// Seals one row with the first key. Returns `false` if the row has changed since `row` was read.
    async fn reseal_unchanged(&self, row: &StoredRow, grant: &Grant, ring: &Keyring) -> Result<bool, StoreError> {
        const RESEAL: &str = "UPDATE adsidecar_grants SET record = $2, changed_at = clock_timestamp() \
                              WHERE user_id = $1 AND record = $3 RETURNING generation";
        let (name, json) = (row.user.as_str(), sealed_json(grant, &row.user, ring));
        let parameters: &Parameters<'_> = &[(&name, Type::TEXT), (&json, Type::TEXT), (&row.json, Type::TEXT)];
        let done = !self.query(RESEAL, parameters, OnDisconnect::Resend).await?.is_empty();
        if done {
            self.remember(&row.user, &json, row.generation, Sealed::By(ring.first()));
        }
        Ok(done)
    }
}
