//! Leases: which process may request a token for a user, and which refreshes are due.

use std::time::Duration;

use jiff::Timestamp;
use tokio_postgres::types::Type;

use super::connection::{OnDisconnect, Parameters};
use super::{FailedRefresh, Lookup, Postgres, USER_COLUMN, column, first_row, read_row, to_bigint};
use crate::domain::account::UserId;
use crate::store::StoreError;

/// The lifetime of a lease, in seconds. It is longer than a token call with its time limit of 10 s.
macro_rules! lease_seconds {
    () => {
        15
    };
}

/// The seconds after which a claimed refresh is due again.
macro_rules! due_again_seconds {
    () => {
        20
    };
}

/// The column `doubted` once the process whose owner is the parameter has taken the lease of the row `old`: an owner
/// who did not release it may have sent a token request for this generation, and not lived to store the response.
macro_rules! doubted {
    ($owner:literal) => {
        concat!("CASE WHEN old.lease_owner <> ", $owner, " THEN g.generation ELSE g.doubted END")
    };
}

/// The lifetime of a lease.
pub const LEASE: Duration = Duration::from_secs(lease_seconds!());
/// The time after which a claimed refresh is due again, if it was not made.
pub const DUE_AGAIN: Duration = Duration::from_secs(due_again_seconds!());

/// The outcome of [`Postgres::acquire_lease`]: whether this process may request a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// This process holds the lease: no other process requests a token for this user.
    Acquired {
        /// The response to an earlier token request with this refresh token may be lost: another process let its lease
        /// expire, or said so. The row says it to each process until a refresh is stored, or the grant is refused.
        interrupted: bool,
    },
    /// Another process holds the lease, or the stored generation has changed.
    Denied,
}

/// A refresh that is due, and whose lease this process has taken.
#[derive(Debug)]
pub struct Claimed {
    /// The user to refresh.
    pub user: UserId,
    /// The row as it was when the lease was taken.
    pub lookup: Lookup,
    /// As [`Lease::Acquired`] has it.
    pub interrupted: bool,
}

impl Postgres {
    /// Takes, or prolongs, the lease of `user` for 15 s, if the stored generation is `generation`. A row that is just
    /// being written counts as leased to another process.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn acquire_lease(&self, user: &UserId, generation: u64) -> Result<Lease, StoreError> {
        const TAKE: &str = concat!(
            "UPDATE adsidecar_grants AS g SET lease_owner = $2, lease_until = clock_timestamp() + interval '",
            lease_seconds!(),
            " seconds', doubted = ",
            doubted!("$2"),
            " FROM (SELECT user_id, lease_owner FROM adsidecar_grants \
             WHERE user_id = $1 FOR UPDATE SKIP LOCKED) AS old \
             WHERE g.user_id = old.user_id AND g.generation = $3 AND g.record IS NOT NULL \
             AND (g.lease_until IS NULL OR g.lease_until < clock_timestamp() OR g.lease_owner = $2) \
             RETURNING coalesce(g.doubted = g.generation, false)"
        );
        let (name, owner, generation) = (user.as_str(), &self.0.owner, to_bigint(generation));
        let parameters: &Parameters<'_> = &[(&name, Type::TEXT), (owner, Type::TEXT), (&generation, Type::INT8)];
        let rows = self.query(TAKE, parameters, OnDisconnect::Resend).await?;
        if rows.is_empty() { Ok(Lease::Denied) } else { Ok(Lease::Acquired { interrupted: first_row(&rows, 0)? }) }
    }

    /// Takes the leases of at most `limit` users whose background refresh is due at `now`. A claimed refresh is due
    /// again 20 s later, so that another process makes it if this one ends.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn claim_due(&self, now: Timestamp, limit: usize) -> Result<Vec<Claimed>, StoreError> {
        const CLAIM: &str = concat!(
            "UPDATE adsidecar_grants AS g SET lease_owner = $1, \
             lease_until = clock_timestamp() + interval '",
            lease_seconds!(),
            " seconds', due_at = to_timestamp($2) + interval '",
            due_again_seconds!(),
            " seconds', doubted = ",
            doubted!("$1"),
            " FROM (SELECT user_id, lease_owner FROM adsidecar_grants WHERE record IS NOT NULL \
             AND due_at <= to_timestamp($2) AND (lease_until IS NULL OR lease_until < clock_timestamp()) \
             AND (retry_at IS NULL OR retry_at <= clock_timestamp()) \
             ORDER BY due_at LIMIT $3 FOR UPDATE SKIP LOCKED) AS old WHERE g.user_id = old.user_id RETURNING ",
            row_columns!(),
            ", coalesce(g.doubted = g.generation, false)"
        );
        let (now, limit) = (now.as_duration().as_secs_f64(), i64::try_from(limit).unwrap_or(i64::MAX));
        let parameters: &Parameters<'_> = &[(&self.0.owner, Type::TEXT), (&now, Type::FLOAT8), (&limit, Type::INT8)];
        // If the response is lost, the leases of this process expire, and the refreshes are due again.
        let rows = self.query(CLAIM, parameters, OnDisconnect::Fail).await?;
        let mut claimed = Vec::with_capacity(rows.len());
        for row in &rows {
            let Ok(user) = column::<String>(row, USER_COLUMN)?.parse::<UserId>() else { continue };
            let lookup = self.opened(&user, read_row(&user, row)?);
            claimed.push(Claimed { user, lookup, interrupted: column(row, USER_COLUMN + 1)? });
        }
        Ok(claimed)
    }

    /// Releases the lease after a refresh that stored no change: a stored change releases it itself. Says to all
    /// processes how the refresh of `generation` failed, if it did, and when the background tries again: `due`, `None`
    /// if the user is idle by then. If a response `may_be_lost`, the next process that takes the lease hears that it
    /// was interrupted, as after the end of this one; also if the database has lost this process's lease, unless
    /// another one has it now or was refused. After a refusal nobody hears that any more. Returns whether the row says
    /// so now.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written. The lease then expires by itself.
    pub async fn release_lease(
        &self,
        user: &UserId,
        generation: u64,
        failed: Option<&FailedRefresh>,
        due: Option<Timestamp>,
        may_be_lost: bool,
    ) -> Result<bool, StoreError> {
        const RELEASE: &str = "UPDATE adsidecar_grants SET lease_owner = CASE WHEN $9 THEN $2 END, \
                               lease_until = CASE WHEN $9 THEN clock_timestamp() END, \
                               doubted = CASE WHEN $9 THEN generation WHEN $4 IS NULL THEN doubted END, \
                               refused = $4, failure = $5, attempts = $8, due_at = to_timestamp($7), \
                               retry_at = clock_timestamp() + make_interval(secs => $6) \
                               WHERE user_id = $1 AND generation = $3 AND record IS NOT NULL AND (lease_owner = $2 \
                               OR $9 AND refused IS NULL AND (lease_until IS NULL OR lease_until < clock_timestamp())) \
                               RETURNING generation";
        let (name, generation) = (user.as_str(), to_bigint(generation));
        let code = |refused| failed.filter(|failed| failed.refused == refused).map(|failed| failed.code.clone());
        let (refused, failure) = (code(true), code(false));
        let retry_in = failed.map(|failed| failed.retry_in.as_secs_f64());
        let attempts = failed.map(|failed| i32::try_from(failed.attempts).unwrap_or(i32::MAX));
        let due = due.map(|due| due.as_duration().as_secs_f64());
        let parameters: &Parameters<'_> = &[
            (&name, Type::TEXT),
            (&self.0.owner, Type::TEXT),
            (&generation, Type::INT8),
            (&refused, Type::TEXT),
            (&failure, Type::TEXT),
            (&retry_in, Type::FLOAT8),
            (&due, Type::FLOAT8),
            (&attempts, Type::INT4),
            (&may_be_lost, Type::BOOL),
        ];
        Ok(!self.query(RELEASE, parameters, OnDisconnect::Resend).await?.is_empty())
    }
}
