//! The accounts that were found for each user: one sealed row per user, in a table of their own.
//!
//! The table is created when it is first needed, so that a role without the right to create tables loses nothing else.

use tokio_postgres::types::Type;

use super::connection::OnDisconnect;
use super::{Postgres, column};
use crate::domain::account::UserId;
use crate::store::StoreError;
use crate::store::keyring::Keyring;

const CREATE: &str = "CREATE TABLE IF NOT EXISTS adsidecar_accounts (\
                      user_id text COLLATE \"C\" PRIMARY KEY, \
                      sealed text NOT NULL, \
                      changed_at timestamptz NOT NULL)";

impl Postgres {
    /// See [`TokenStore::save_accounts`](crate::store::TokenStore::save_accounts).
    pub(in crate::store) async fn save_accounts(&self, user: &UserId, plain: &str) -> Result<(), StoreError> {
        const SAVE: &str = "INSERT INTO adsidecar_accounts (user_id, sealed, changed_at) \
                            VALUES ($1, $2, clock_timestamp()) ON CONFLICT (user_id) \
                            DO UPDATE SET sealed = excluded.sealed, changed_at = excluded.changed_at RETURNING user_id";
        if !self.has_accounts_table().await? {
            self.0.connection.create(CREATE).await?;
        }
        let sealed = self.0.keyring.load().seal(plain.as_bytes());
        self.query(SAVE, &[(&user.as_str(), Type::TEXT), (&sealed, Type::TEXT)], OnDisconnect::Resend).await.map(drop)
    }

    /// See [`TokenStore::accounts`](crate::store::TokenStore::accounts).
    pub(in crate::store) async fn accounts(&self) -> Result<Vec<String>, StoreError> {
        const PAGE: &str =
            "SELECT user_id, sealed FROM adsidecar_accounts WHERE user_id > $1 ORDER BY user_id LIMIT 50";
        if !self.has_accounts_table().await? {
            return Ok(Vec::new());
        }
        let (mut all, mut after) = (Vec::new(), String::new());
        loop {
            let rows = self.query(PAGE, &[(&after, Type::TEXT)], OnDisconnect::Resend).await?;
            let Some(last) = rows.last() else { return Ok(all) };
            after = column(last, 0)?;
            for row in &rows {
                let (user, sealed): (String, String) = (column(row, 0)?, column(row, 1)?);
                let opened = self.0.keyring.load().open(&sealed);
                match opened.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok()) {
                    Some(plain) => all.push(plain),
                    None => tracing::warn!(user, "a list of accounts cannot be opened; the next sync replaces it"),
                }
            }
        }
    }

    /// See [`TokenStore::erase_accounts`](crate::store::TokenStore::erase_accounts).
    pub(in crate::store) async fn erase_accounts(&self, user: &UserId) -> Result<(), StoreError> {
        const ERASE: &str = "DELETE FROM adsidecar_accounts WHERE user_id = $1";
        if !self.has_accounts_table().await? {
            return Ok(());
        }
        self.query(ERASE, &[(&user.as_str(), Type::TEXT)], OnDisconnect::Resend).await.map(drop)
    }

    /// A text that differs after each change of the accounts by any process.
    pub(in crate::store) async fn accounts_version(&self) -> Result<String, StoreError> {
        const VERSION: &str = "SELECT count(*)::text || ' ' || coalesce(max(changed_at)::text, '') \
                               FROM adsidecar_accounts";
        if !self.has_accounts_table().await? {
            return Ok(String::new());
        }
        let rows = self.query(VERSION, &[], OnDisconnect::Resend).await?;
        rows.first().map_or(Ok(String::new()), |row| column(row, 0))
    }

    /// Seals every list with the first key, unless another process has changed it.
    pub(super) async fn reseal_accounts(&self, ring: &Keyring) -> Result<(), StoreError> {
        const TABLE: [&str; 2] = [
            "SELECT user_id, sealed FROM adsidecar_accounts",
            "UPDATE adsidecar_accounts SET sealed = $2 WHERE user_id = $1 AND sealed = $3",
        ];
        if !self.has_accounts_table().await? {
            return Ok(());
        }
        self.reseal_table(TABLE, |text| ring.open(text).map(|opened| ring.seal(&opened.plain))).await
    }

    async fn has_accounts_table(&self) -> Result<bool, StoreError> {
        const EXISTS: &str = "SELECT to_regclass('adsidecar_accounts') IS NOT NULL";
        let rows = self.query(EXISTS, &[], OnDisconnect::Resend).await?;
        rows.first().map_or(Ok(false), |row| column(row, 0))
    }
}
