//! Operators' tasks: listing and dumping all records, and rotating keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_postgres::types::Type;

use super::connection::Parameters;
use super::{KEY_NOTE, PAGE_ROWS, Postgres, StoredRow, column, sealed_json};
use crate::domain::account::UserId;
use crate::store::backup::value;
use crate::store::keyring::Keyring;
use crate::store::{Reseal, Sealed, StoreError, Users};

/// Number of records that are sealed again per statement.
const RESEAL_ROWS: i64 = 200;
/// Number of times that all records are looked at, because others still sealed some with their previous key.
const MAX_PASSES: usize = 4;

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
            let (rows, next) = self.page(&last, PAGE_ROWS).await?;
            match next {
                // A page of rows that we did not write.
                Some(next) if rows.is_empty() => last = next,
                _ => return Ok(rows.into_iter().map(|row| (row.user, value(row.json.as_bytes()))).collect()),
            }
        }
    }

    /// See [`TokenStore::record`](crate::store::TokenStore::record).
    pub(in crate::store) async fn record(&self, user: &UserId) -> Result<Option<serde_json::Value>, StoreError> {
        Ok(self.row(user).await?.stored.map(|row| value(row.json.as_bytes())))
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
        self.retry_unknown().await?;
        self.count_records().await
    }

    /// See [`TokenStore::reseal`](crate::store::TokenStore::reseal).
    pub(in crate::store) async fn reseal(&self) -> Result<Reseal, StoreError> {
        let ring = self.0.keyring.load_full();
        let mut done = Reseal::default();
        for _ in 0..MAX_PASSES {
            let resealed = self.reseal_all(&ring, &mut done).await?;
            done.resealed += resealed;
            // Another process may have stored a grant with its previous key behind this pass.
            if resealed == 0 {
                break;
            }
        }
        self.reseal_pending(&ring).await?;
        self.count_records().await?;
        Ok(done)
    }

    /// Seals every record with the first key that another key seals, in batches, and returns how many there were. What an
    /// interrupted pass has done is not done again, and several processes may do it at once.
    async fn reseal_all(&self, ring: &Keyring, done: &mut Reseal) -> Result<usize, StoreError> {
        const OTHERS: &str = "SELECT user_id, record, generation, hashtextextended(record, 0) FROM adsidecar_grants \
                              WHERE record IS NOT NULL AND user_id > $1 AND sealed_with IS DISTINCT FROM $2 \
                              ORDER BY user_id LIMIT $3";
        const RESEAL: &str = "UPDATE adsidecar_grants AS g SET record = d.record, \
                              described = hashtextextended(d.record, 0), sealed_with = d.sealed_with, \
                              expires_at = d.expires_at, updated_at = d.updated_at, consented_at = d.consented_at, \
                              used_at = d.used_at, due_at = coalesce(g.due_at, d.due_at) \
                              FROM jsonb_to_recordset($1::text::jsonb) AS d (user_id text, hash bigint, record text, \
                              sealed_with text, expires_at timestamptz, updated_at timestamptz, \
                              consented_at timestamptz, used_at timestamptz, due_at timestamptz) \
                              WHERE g.user_id = d.user_id AND hashtextextended(g.record, 0) = d.hash \
                              RETURNING g.user_id";
        let (first, mut after, mut resealed) = (ring.first().to_string(), String::new(), 0);
        done.unreadable = 0;
        loop {
            let parameters: &Parameters<'_> = &[(&after, Type::TEXT), (&first, Type::TEXT), (&RESEAL_ROWS, Type::INT8)];
            let rows = self.bulk_query(OTHERS, parameters).await?;
            let Some(last) = rows.last() else { return Ok(resealed) };
            after = column(last, 0)?;
            let mut batch = Vec::with_capacity(rows.len());
            for row in &rows {
                let Ok(user) = column::<String>(row, 0)?.parse::<UserId>() else { continue };
                let row_of = StoredRow { user, json: column(row, 1)?, generation: column(row, 2)? };
                let (Ok(record), (Ok(grant), _)) = (row_of.record(), row_of.open(ring)) else {
                    done.unreadable += 1;
                    continue;
                };
                if record.key_index(ring) == Some(0) {
                    // Nobody has described it yet.
                    continue;
                }
                let mut about = self.describe(&row_of.user, &grant, Sealed::By(ring.first()));
                about["user_id"] = row_of.user.as_str().into();
                about["hash"] = column::<i64>(row, 3)?.into();
                about["record"] = sealed_json(&grant, &row_of.user, ring).into();
                batch.push(about);
            }
            if !batch.is_empty() {
                let batch = serde_json::Value::from(batch).to_string();
                resealed += self.bulk_query(RESEAL, &[(&batch, Type::TEXT)]).await?.len();
            }
        }
    }
}
