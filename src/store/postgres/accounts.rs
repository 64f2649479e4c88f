//! The accounts that were found for each user: one sealed row per user, and a row per account in `adsidecar_slugs`.

use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::connection::{OnDisconnect, Parameters};
use super::{Postgres, column, first_row, locked, to_bigint};
use crate::domain::account::UserId;
use crate::store::found_accounts::MAX_COUNTED;
use crate::store::keyring::Keyring;
use crate::store::{
    AccountsChanged, AccountsPage, AccountsQuery, AccountsSaved, NewAccounts, StoreError, StoredAccounts,
};
use jiff::Timestamp;

/// At most this many searches are claimed, and lists read for the index, at a time.
const BATCH: i64 = 20;
/// At most this many users' changes wait to be taken; beyond that nothing is certain.
const MAX_WAITING: usize = 10_000;

impl Postgres {
    /// See [`TokenStore::save_accounts`](crate::store::TokenStore::save_accounts).
    pub(in crate::store) async fn save_accounts(
        &self,
        user: &UserId,
        accounts: &NewAccounts,
    ) -> Result<AccountsSaved, StoreError> {
        const SAVE: &str =
            "SELECT stored_version, is_logged_out, taken FROM adsidecar_save_accounts($1, $2, $3, $4, $5)";
        let sealed = self.0.keyring.load().seal(accounts.plain.as_bytes());
        let index = serde_json::to_string(&accounts.index).expect("texts are JSON");
        let (seen, search_at) = (to_bigint(accounts.seen), accounts.search_at.as_duration().as_secs_f64());
        let parameters: [(&(dyn ToSql + Sync), Type); 5] = [
            (&user.as_str(), Type::TEXT),
            (&sealed, Type::TEXT),
            (&index, Type::TEXT),
            (&seen, Type::INT8),
            (&search_at, Type::FLOAT8),
        ];
        // If the response is lost and the statement is sent again, it reports a change, and the caller reads it.
        let rows = self.bulk_query(SAVE, &parameters).await?;
        if let Some(version) = first_row::<Option<i64>>(&rows, 0)? {
            return Ok(AccountsSaved::Stored(version.unsigned_abs()));
        }
        if first_row(&rows, 1)? {
            return Ok(AccountsSaved::LoggedOut);
        }
        Ok(first_row::<Option<Vec<String>>>(&rows, 2)?.map_or(AccountsSaved::Changed, AccountsSaved::Taken))
    }

    /// See [`TokenStore::accounts_of`](crate::store::TokenStore::accounts_of).
    pub(in crate::store) async fn accounts_of(&self, users: &[UserId]) -> Result<Vec<StoredAccounts>, StoreError> {
        const OF: &str = "SELECT user_id, sealed, version FROM adsidecar_accounts WHERE user_id = ANY ($1)";
        let names: Vec<&str> = users.iter().map(UserId::as_str).collect();
        let parameters: &Parameters<'_> = &[(&names, Type::TEXT_ARRAY)];
        let rows = match users {
            [_] => self.query(OF, parameters, OnDisconnect::Resend).await?,
            _ => self.bulk_query(OF, parameters).await?,
        };
        rows.iter().filter_map(|row| self.read_accounts(row).transpose()).collect()
    }

    /// See [`TokenStore::accounts_with`](crate::store::TokenStore::accounts_with).
    pub(in crate::store) async fn accounts_with(&self, slug: &str) -> Result<Option<StoredAccounts>, StoreError> {
        const WITH: &str = "SELECT a.user_id, a.sealed, a.version FROM adsidecar_slugs AS s \
                            JOIN adsidecar_accounts AS a USING (user_id) WHERE s.slug = $1";
        let rows = self.query(WITH, &[(&slug, Type::TEXT)], OnDisconnect::Resend).await?;
        rows.first().map_or(Ok(None), |row| self.read_accounts(row))
    }

    /// See [`TokenStore::slug_owners`](crate::store::TokenStore::slug_owners).
    pub(in crate::store) async fn slug_owners(&self, slugs: &[String]) -> Result<Vec<(String, UserId)>, StoreError> {
        const OWNERS: &str = "SELECT slug, user_id FROM adsidecar_slugs WHERE slug = ANY ($1)";
        owners(&self.bulk_query(OWNERS, &[(&slugs, Type::TEXT_ARRAY)]).await?)
    }

    /// See [`TokenStore::find_accounts`](crate::store::TokenStore::find_accounts).
    pub(in crate::store) async fn find_accounts(&self, query: &AccountsQuery) -> Result<AccountsPage, StoreError> {
        macro_rules! matching {
            () => {
                "FROM adsidecar_slugs WHERE ($1::text IS NULL OR strpos(name, $1) > 0 OR strpos(slug, $1) > 0) \
                 AND ($2::text IS NULL OR country = $2) AND ($3::text IS NULL OR kind = $3)"
            };
        }
        const PAGE: &str = concat!("SELECT slug, user_id ", matching!(), " AND slug > $4 ORDER BY slug LIMIT $5");
        const COUNT: &str = concat!("SELECT count(*) FROM (SELECT 1 ", matching!(), " LIMIT $4) AS counted");
        let name = query.name.as_ref().map(|name| name.to_lowercase());
        let country = query.country.as_ref().map(|country| country.to_ascii_uppercase());
        let (limit, counted) = (i64::try_from(query.limit).unwrap_or(i64::MAX), to_bigint(MAX_COUNTED));
        let which: [(&(dyn ToSql + Sync), Type); 3] =
            [(&name, Type::TEXT), (&country, Type::TEXT), (&query.kind, Type::TEXT)];
        let [name, country, kind] = which.clone();
        let rows =
            self.bulk_query(PAGE, &[name, country, kind, (&query.after, Type::TEXT), (&limit, Type::INT8)]).await?;
        let [name, country, kind] = which;
        let count = self.bulk_query(COUNT, &[name, country, kind, (&counted, Type::INT8)]).await?;
        Ok(AccountsPage { slugs: owners(&rows)?, total: first_row::<i64>(&count, 0)?.unsigned_abs() })
    }

    /// See [`TokenStore::has_more_accounts_than`](crate::store::TokenStore::has_more_accounts_than).
    pub(in crate::store) async fn has_more_accounts_than(&self, count: usize) -> Result<bool, StoreError> {
        const MORE: &str = "SELECT count(*) > $1 FROM (SELECT FROM adsidecar_slugs LIMIT $1 + 1) AS counted";
        let count = i64::try_from(count).unwrap_or(i64::MAX - 1);
        first_row(&self.query(MORE, &[(&count, Type::INT8)], OnDisconnect::Resend).await?, 0)
    }

    /// See [`TokenStore::unindexed_accounts`](crate::store::TokenStore::unindexed_accounts).
    pub(in crate::store) async fn unindexed_accounts(&self) -> Result<Vec<StoredAccounts>, StoreError> {
        const UNINDEXED: &str = "SELECT a.user_id, a.sealed, a.version FROM adsidecar_accounts AS a \
                                 JOIN adsidecar_grants AS g ON g.user_id = a.user_id AND g.record IS NOT NULL \
                                 WHERE a.indexed_at IS DISTINCT FROM a.changed_at ORDER BY a.user_id LIMIT $1";
        const GIVE_UP: &str = "UPDATE adsidecar_accounts SET indexed_at = changed_at \
                               WHERE user_id = $1 AND version = $2 RETURNING user_id";
        let rows = self.bulk_query(UNINDEXED, &[(&BATCH, Type::INT8)]).await?;
        let mut all = Vec::new();
        for row in &rows {
            let Some(stored) = self.read_accounts(row)? else { continue };
            if stored.plain.is_none() {
                // The next search replaces it, and until then nobody can index it.
                let (user, version) = (stored.user.as_str(), to_bigint(stored.version));
                self.bulk_query(GIVE_UP, &[(&user, Type::TEXT), (&version, Type::INT8)]).await?;
                continue;
            }
            all.push(stored);
        }
        Ok(all)
    }

    /// See [`TokenStore::claim_searches`](crate::store::TokenStore::claim_searches).
    pub(in crate::store) async fn claim_searches(
        &self,
        now: Timestamp,
        next: Timestamp,
    ) -> Result<Vec<UserId>, StoreError> {
        const CLAIM: &str = "UPDATE adsidecar_accounts AS a SET search_at = to_timestamp($2) \
                             FROM (SELECT user_id FROM adsidecar_accounts WHERE search_at <= to_timestamp($1) \
                             ORDER BY search_at LIMIT $3 FOR UPDATE SKIP LOCKED) AS due \
                             WHERE a.user_id = due.user_id RETURNING a.user_id";
        let (now, next) = (now.as_duration().as_secs_f64(), next.as_duration().as_secs_f64());
        let parameters: &Parameters<'_> = &[(&now, Type::FLOAT8), (&next, Type::FLOAT8), (&BATCH, Type::INT8)];
        let rows = self.bulk_query(CLAIM, parameters).await?;
        let names = rows.iter().map(|row| column::<String>(row, 0)).collect::<Result<Vec<_>, _>>()?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// See [`TokenStore::accounts_changed`](crate::store::TokenStore::accounts_changed).
    pub(in crate::store) async fn accounts_changed(&self) -> AccountsChanged {
        loop {
            if let Some(changed) = locked(&self.0.accounts_changed).take() {
                return changed;
            }
            self.0.accounts_told.notified().await;
        }
    }

    /// Passes on what a poll has found, to those that wait for [`accounts_changed`](Self::accounts_changed).
    pub(super) fn tell_accounts(&self, changed: AccountsChanged) {
        let mut waiting = locked(&self.0.accounts_changed);
        *waiting = Some(match (waiting.take(), changed) {
            (None, AccountsChanged::Users(users)) if users.is_empty() => return,
            (None, changed) => changed,
            (Some(AccountsChanged::Users(mut all)), AccountsChanged::Users(more)) if all.len() < MAX_WAITING => {
                all.extend(more);
                AccountsChanged::Users(all)
            }
            _ => AccountsChanged::Unknown,
        });
        drop(waiting);
        self.0.accounts_told.notify_one();
    }

    /// See [`TokenStore::accounts`](crate::store::TokenStore::accounts).
    pub(in crate::store) async fn accounts(&self) -> Result<Vec<String>, StoreError> {
        const PAGE: &str =
            "SELECT user_id, sealed, version FROM adsidecar_accounts WHERE user_id > $1 ORDER BY user_id LIMIT 50";
        let (mut all, mut after) = (Vec::new(), String::new());
        loop {
            let rows = self.bulk_query(PAGE, &[(&after, Type::TEXT)]).await?;
            let Some(last) = rows.last() else { return Ok(all) };
            after = column(last, 0)?;
            for row in &rows {
                all.extend(self.read_accounts(row)?.and_then(|stored| stored.plain));
            }
        }
    }

    /// Reads the columns `user_id`, `sealed` and `version`. A row whose key is not a user id was not written by us.
    fn read_accounts(&self, row: &Row) -> Result<Option<StoredAccounts>, StoreError> {
        let (name, sealed, version): (String, String, i64) = (column(row, 0)?, column(row, 1)?, column(row, 2)?);
        let Ok(user) = name.parse::<UserId>() else { return Ok(None) };
        let opened = self.0.keyring.load().open(&sealed);
        let plain = opened.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok());
        // The seal says who it is for: nobody can give one user the accounts of another.
        let plain = plain.filter(|plain| is_of(plain, &user));
        if plain.is_none() {
            tracing::warn!(%user, "a list of accounts cannot be opened; the next sync replaces it");
        }
        Ok(Some(StoredAccounts { user, plain, version: version.unsigned_abs() }))
    }

    /// Seals every list with the first key, a page at a time, unless another process has changed it.
    pub(super) async fn reseal_accounts(&self, ring: &Keyring) -> Result<(), StoreError> {
        const PAGE: &str =
            "SELECT user_id, sealed FROM adsidecar_accounts WHERE user_id > $1 ORDER BY user_id LIMIT 50";
        const RESEAL: &str =
            "UPDATE adsidecar_accounts SET sealed = $2 WHERE user_id = $1 AND sealed = $3 RETURNING user_id";
        let mut after = String::new();
        loop {
            let rows = self.bulk_query(PAGE, &[(&after, Type::TEXT)]).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            after = column(last, 0)?;
            for row in &rows {
                let (user, before): (String, String) = (column(row, 0)?, column(row, 1)?);
                let Some(opened) = ring.open(&before) else { continue };
                let sealed = ring.seal(&opened.plain);
                let parameters: &Parameters<'_> = &[(&user, Type::TEXT), (&sealed, Type::TEXT), (&before, Type::TEXT)];
                self.bulk_query(RESEAL, parameters).await?;
            }
        }
    }
}

/// Whether the stored text names `user`.
fn is_of(plain: &str, user: &UserId) -> bool {
    #[derive(serde::Deserialize)]
    struct Owner {
        user_id: Value,
    }
    serde_json::from_str::<Owner>(plain).is_ok_and(|owner| owner.user_id == user.as_str())
}

/// Reads slugs with their users. A row whose user is not a user id was not written by us.
fn owners(rows: &[Row]) -> Result<Vec<(String, UserId)>, StoreError> {
    let read = |row| Ok::<_, StoreError>((column::<String>(row, 0)?, column::<String>(row, 1)?));
    let all = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    Ok(all.into_iter().filter_map(|(slug, user)| Some((slug, user.parse().ok()?))).collect())
}
