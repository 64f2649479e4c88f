//! What a row says about its record outside the seal, for schedules, lists and counts.
//!
//! A process describes each record that it stores. Records that the previous version stored, or a person changed, are
//! described by whichever process finds them, a page at a time.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_postgres::types::Type;

use super::connection::{OnDisconnect, Parameters};
use super::{FailedRefresh, Lookup, Postgres, USER_COLUMN, column, locked, read_row};
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, RefreshPolicy, Version};
use crate::store::keyring::{Fingerprint, Keyring};
use crate::store::{Sealed, StoreError};

/// Number of records that are described per statement.
const PAGE: i64 = 200;
/// At most this many records are counted when somebody asks. Larger tables are counted in the background.
const MAX_COUNTED: i64 = 10_000;

/// What a row says about a user, unauthenticated: for lists and counts.
#[derive(Clone, Debug)]
pub struct UserOverview {
    /// The user id.
    pub user: UserId,
    /// When the access token expires, if there is one.
    pub expires_at: Option<Timestamp>,
    /// When the tokens last changed.
    pub updated_at: Timestamp,
    /// When the person consented, if known.
    pub consented_at: Option<Timestamp>,
    /// When a caller last used the grant.
    pub used_at: Option<Timestamp>,
    /// How the last refresh failed.
    pub failed: Option<FailedRefresh>,
    /// The version of the row.
    pub version: Version,
}

impl Postgres {
    /// Sets when refreshes become due, for the records that this process stores from now on.
    pub fn set_policy(&self, policy: RefreshPolicy) {
        self.0.policy.store(std::sync::Arc::new(policy));
    }

    /// The columns that describe a record.
    pub(super) fn describe(&self, user: &UserId, grant: &Grant, sealed: Sealed) -> Value {
        let due_at = due_at(**self.0.policy.load(), user, grant);
        json!({
            "sealed_with": sealed.to_string(),
            "expires_at": grant.access.as_ref().map(|access| access.expires_at),
            "updated_at": grant.updated_at,
            "consented_at": grant.consented_at,
            "used_at": grant.used_at,
            "due_at": due_at,
        })
    }

    /// Describes up to a page of records that nobody has described. Returns whether there may be more.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read or written.
    pub async fn describe_page(&self) -> Result<bool, StoreError> {
        const UNDESCRIBED: &str = "SELECT user_id, record, generation, hashtextextended(record, 0) \
                                   FROM adsidecar_grants WHERE record IS NOT NULL AND described IS NULL \
                                   ORDER BY user_id LIMIT $1";
        const DESCRIBE: &str = "UPDATE adsidecar_grants AS g SET described = d.hash, sealed_with = d.sealed_with, \
                                expires_at = d.expires_at, updated_at = d.updated_at, \
                                consented_at = d.consented_at, used_at = d.used_at, due_at = d.due_at \
                                FROM jsonb_to_recordset($1::text::jsonb) AS d (user_id text, hash bigint, \
                                sealed_with text, expires_at timestamptz, updated_at timestamptz, \
                                consented_at timestamptz, used_at timestamptz, due_at timestamptz) \
                                WHERE g.user_id = d.user_id AND g.described IS NULL \
                                AND hashtextextended(g.record, 0) = d.hash RETURNING g.user_id";
        let rows = self.bulk_query(UNDESCRIBED, &[(&PAGE, Type::INT8)]).await?;
        let ring = self.0.keyring.load_full();
        let mut described = Vec::with_capacity(rows.len());
        for row in &rows {
            let (name, json): (String, String) = (column(row, 0)?, column(row, 1)?);
            let mut about = match name.parse() {
                Ok(user) => self.describe_record(&user, json, column(row, 2)?, &ring),
                // Not written by us.
                Err(_) => json!({ "sealed_with": Sealed::Damaged.to_string() }),
            };
            about["user_id"] = name.into();
            about["hash"] = column::<i64>(row, 3)?.into();
            described.push(about);
        }
        if described.is_empty() {
            return Ok(false);
        }
        let described = Value::from(described).to_string();
        let parameters: &Parameters<'_> = &[(&described, Type::TEXT)];
        let written = self.bulk_query(DESCRIBE, parameters).await?;
        // Rows that others have described or changed meanwhile are looked at again.
        Ok(!written.is_empty() && i64::try_from(rows.len()).unwrap_or(PAGE) >= PAGE)
    }

    fn describe_record(&self, user: &UserId, json: String, generation: i64, ring: &Keyring) -> Value {
        let row = super::StoredRow { user: user.clone(), json, generation };
        match row.open(ring) {
            (Ok(grant), sealed) => self.describe(user, &grant, sealed),
            (Err(error), sealed) => {
                tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
                json!({ "sealed_with": sealed.to_string() })
            }
        }
    }

    /// Lets the records be described again that no key of another process opened, since this one may open them.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn retry_unknown(&self) -> Result<(), StoreError> {
        const RETRY: &str = "UPDATE adsidecar_grants SET described = NULL \
                             WHERE record IS NOT NULL AND sealed_with = 'unknown' RETURNING user_id";
        self.bulk_query(RETRY, &[]).await.map(drop)
    }

    /// Counts the records by what they are sealed with, for `health`.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn count_records(&self) -> Result<(), StoreError> {
        // What nobody has described yet would not be counted.
        self.describe_page().await?;
        const COUNT: &str = "SELECT sealed_with, count(*) FROM (SELECT sealed_with FROM adsidecar_grants \
                             WHERE record IS NOT NULL LIMIT $1) AS counted WHERE sealed_with IS NOT NULL GROUP BY 1";
        let rows = self.query(COUNT, &[(&MAX_COUNTED, Type::INT8)], OnDisconnect::Resend).await?;
        let ring = self.0.keyring.load_full();
        let mut records = BTreeMap::new();
        for row in &rows {
            let (sealed, count): (String, i64) = (column(row, 0)?, column(row, 1)?);
            *records.entry(sealed_with(&sealed, &ring)).or_default() += usize::try_from(count).unwrap_or(0);
        }
        *locked(&self.0.records) = records;
        Ok(())
    }

    /// What the rows say about the first `limit` users.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn overview(&self, limit: usize) -> Result<Vec<UserOverview>, StoreError> {
        const ROWS: &str = "SELECT user_id, extract(epoch FROM expires_at)::float8, \
                            extract(epoch FROM updated_at)::float8, extract(epoch FROM consented_at)::float8, \
                            extract(epoch FROM used_at)::float8, refused, failure, generation, epoch \
                            FROM adsidecar_grants \
                            WHERE record IS NOT NULL AND updated_at IS NOT NULL \
                            AND sealed_with NOT IN ('unknown', 'damaged') ORDER BY user_id LIMIT $1";
        let most = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = self.query(ROWS, &[(&most, Type::INT8)], OnDisconnect::Resend).await?;
        let mut users = Vec::with_capacity(rows.len());
        for row in &rows {
            let Ok(user) = column::<String>(row, 0)?.parse() else { continue };
            let time = |at| Ok::<_, StoreError>(column::<Option<f64>>(row, at)?.and_then(from_seconds));
            let (refused, failure): (Option<String>, Option<String>) = (column(row, 5)?, column(row, 6)?);
            let (generation, epoch): (i64, i64) = (column(row, 7)?, column(row, 8)?);
            let is_refused = refused.is_some();
            let failed = refused.or(failure).map(|code| FailedRefresh {
                refused: is_refused,
                code,
                attempts: 1,
                retry_in: std::time::Duration::ZERO,
            });
            users.push(UserOverview {
                user,
                expires_at: time(1)?,
                updated_at: time(2)?.unwrap_or_default(),
                consented_at: time(3)?,
                used_at: time(4)?,
                failed,
                version: Version { epoch: epoch.unsigned_abs(), generation: generation.unsigned_abs() },
            });
        }
        Ok(users)
    }

    /// Reads a page of users with a record, ordered by user id, after the user id `after`. With `failing`, those alone
    /// whose last refresh failed.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn users(&self, after: &str, limit: usize, failing: bool) -> Result<Vec<(UserId, Lookup)>, StoreError> {
        const ROWS: &str = concat!(
            "SELECT ",
            row_columns!(),
            " FROM adsidecar_grants AS g WHERE record IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT $2"
        );
        const FAILING: &str = concat!(
            "SELECT ",
            row_columns!(),
            " FROM adsidecar_grants AS g WHERE record IS NOT NULL AND (refused IS NOT NULL OR failure IS NOT NULL) \
             AND user_id > $1 ORDER BY user_id LIMIT $2"
        );
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let statement = if failing { FAILING } else { ROWS };
        let rows = self.query(statement, &[(&after, Type::TEXT), (&limit, Type::INT8)], OnDisconnect::Resend).await?;
        let mut users = Vec::with_capacity(rows.len());
        for row in &rows {
            let Ok(user) = column::<String>(row, USER_COLUMN)?.parse::<UserId>() else { continue };
            let lookup = self.opened(&user, read_row(&user, row)?);
            users.push((user, lookup));
        }
        Ok(users)
    }
}

fn from_seconds(seconds: f64) -> Option<Timestamp> {
    // Microseconds: PostgreSQL stores no more.
    Timestamp::from_microsecond((seconds * 1e6).round() as i64).ok()
}

/// What the column `sealed_with` says to a process with this keyring.
fn sealed_with(text: &str, ring: &Keyring) -> Sealed {
    if text == Sealed::Damaged.to_string() {
        return Sealed::Damaged;
    }
    let key = text.parse::<Fingerprint>().ok().filter(|key| ring.fingerprints().contains(key));
    key.map_or(Sealed::ByUnknownKey, Sealed::By)
}

/// When the background refresh of a grant is due that is stored now; `None` if the user is idle by then.
pub fn due_at(policy: RefreshPolicy, user: &UserId, grant: &Grant) -> Option<Timestamp> {
    grant.due_at(policy, jitter(user, grant.generation))
}

/// Jitter in `0.0..1.0`, the same for each process that describes the record.
fn jitter(user: &UserId, generation: u64) -> f64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (user.as_str(), generation).hash(&mut hasher);
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}
