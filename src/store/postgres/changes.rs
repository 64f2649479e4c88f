//! Detects changes made by other processes: compares rows with what this process remembers of them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::OnDisconnect;
use super::{PAGE_ROWS, Postgres, column, first_row, locked};
use crate::domain::account::UserId;
use crate::store::StoreError;

/// Overlap of consecutive polls, in seconds: a row becomes visible shortly after its `changed_at`, when its transaction
/// commits.
const OVERLAP_SECONDS: f64 = 30.0;
/// Interval for comparing all rows, which also finds changes that did not update `changed_at`. All rows are compared
/// after each new connection too.
const FULL_COMPARISON_INTERVAL: Duration = Duration::from_secs(60);

/// Up to where changes have been read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ChangeCursor {
    /// The database's clock at the last poll, in seconds of the Unix epoch.
    at: f64,
    /// When all rows were last compared, and over which connection.
    full_comparison: Option<(Instant, u64)>,
}

impl Postgres {
    /// Returns the users whose row differs from what this process remembers.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn changed_users(&self) -> Result<Vec<UserId>, StoreError> {
        const SINCE: &str = "SELECT extract(epoch FROM clock_timestamp())::float8, g.user_id, g.generation, \
                             sha256(convert_to(g.record, 'UTF8')) \
                             FROM (SELECT 1) AS one LEFT JOIN adsidecar_grants AS g \
                             ON g.changed_at > to_timestamp($1)";
        let previous = *locked(&self.0.cursor);
        let rows = self.query(SINCE, &[(&(previous.at - OVERLAP_SECONDS), Type::FLOAT8)], OnDisconnect::Resend).await?;
        let mut changed = BTreeSet::new();
        for row in &rows {
            changed.extend(self.compare_row(row, 1)?.1);
        }
        // Compare all rows if the last full comparison is too old or used another connection.
        let connection = self.0.connection.connects();
        let is_recent = |(at, over): &(Instant, u64)| at.elapsed() < FULL_COMPARISON_INTERVAL && *over == connection;
        let full_comparison = match previous.full_comparison.filter(is_recent) {
            Some(recent) => recent,
            None => {
                changed.extend(self.compare_all().await?);
                (Instant::now(), connection)
            }
        };
        *locked(&self.0.cursor) = ChangeCursor { at: first_row(&rows, 0)?, full_comparison: Some(full_comparison) };
        Ok(changed.into_iter().collect())
    }

    /// Compares all rows with what this process remembers, and returns the users that differ or are gone.
    async fn compare_all(&self) -> Result<Vec<UserId>, StoreError> {
        const ALL: &str = "SELECT user_id, generation, sha256(convert_to(record, 'UTF8')) FROM adsidecar_grants \
                           WHERE record IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT $2";
        let (mut after, mut changed) = (String::new(), Vec::new());
        let mut gone: BTreeSet<UserId> = locked(&self.0.known).keys().cloned().collect();
        loop {
            let rows = self.query(ALL, &[(&after, Type::TEXT), (&PAGE_ROWS, Type::INT8)], OnDisconnect::Resend).await?;
            for row in &rows {
                let (user, differs) = self.compare_row(row, 0)?;
                changed.extend(differs);
                user.map(|user| gone.remove(&user));
            }
            match rows.last() {
                Some(last) => after = column(last, 0)?,
                None => break,
            }
        }
        changed.extend(gone);
        Ok(changed)
    }

    /// Compares a row of user id, generation and digest, which start at column `at`. Returns the row's user, and the
    /// user again if the row differs from what this process remembers.
    fn compare_row(&self, row: &Row, at: usize) -> Result<(Option<UserId>, Option<UserId>), StoreError> {
        let user = column::<Option<String>>(row, at)?.and_then(|name| name.parse::<UserId>().ok());
        let Some(user) = user else { return Ok((None, None)) };
        let (generation, digest): (i64, Option<Vec<u8>>) = (column(row, at + 1)?, column(row, at + 2)?);
        let known = locked(&self.0.known);
        let known = known.get(&user).map(|known| (known.generation, &known.digest));
        let differs = known != digest.as_ref().map(|digest| (generation, digest));
        Ok((Some(user.clone()), differs.then_some(user)))
    }
}
