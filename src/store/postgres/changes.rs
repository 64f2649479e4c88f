//! Follows the changes that other processes make.
//!
//! The database numbers every change (`schema.sql`), and a process reads those above the number that it has reached, in
//! pages of bounded size: all but the refreshes that were due, which are nearly all. Of those it takes note by the rows
//! of the users that it holds (`auth/tokens/refreshed_elsewhere.rs`). It never reads the table: what it has to compare
//! after a failure are the users that it holds.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_postgres::types::Type;

use super::brake::SharedBrake;
use super::connection::{OnDisconnect, Parameters};
use super::{Lookup, Postgres, USER_COLUMN, column, first_row, locked, read_row};
use crate::domain::account::UserId;
use crate::domain::grant::Version;
use crate::store::{AccountsChanged, StoreError};

/// Maximum number of changes per poll. Whoever is further behind compares what it holds instead.
const PAGE: i64 = 5000;
/// For how long each change is read again: what a person changes, and accounts that were found, become visible when
/// their transaction commits, and others with higher numbers may have done so before. Logins, logouts and what else
/// `adsidecar_write` tells become visible in the order of their numbers.
const OVERLAP: Duration = Duration::from_secs(2);
/// Maximum number of rows per statement that reads the rows of given users.
pub const LOOKUP_ROWS: usize = 500;

/// Up to where changes have been read.
#[derive(Clone, Debug)]
pub struct Position {
    /// The highest number of news at each poll of the last [`OVERLAP`], and before it. Never empty.
    heads: VecDeque<(Instant, i64)>,
    /// The connection over which it was read. Another one may lead to another server, which may have lost commits.
    connection: u64,
}

impl Position {
    /// The number of the news above which a poll reads, and the number of changes that it reads at most. Whoever stands
    /// nowhere reads none.
    pub fn range(previous: Option<&Self>) -> (i64, i64) {
        (previous.and_then(|position| position.heads.front()).map_or(i64::MAX, |(_, change)| *change), PAGE)
    }

    /// Where a poll at `now` stands that read `rows` rows when the last news had the number `head`; and whether it
    /// continues where `previous` stood, so that it read everything since.
    pub fn after(previous: Option<Self>, rows: usize, head: i64, connection: u64, now: Instant) -> (Self, bool) {
        let is_full = i64::try_from(rows).unwrap_or(PAGE) >= PAGE;
        let continued = previous.filter(|previous| previous.connection == connection && previous.head() <= head);
        match continued.filter(|_| !is_full) {
            Some(mut position) => {
                position.reach(head, now);
                (position, true)
            }
            None => (Self { heads: [(now, head)].into(), connection }, false),
        }
    }

    fn head(&self) -> i64 {
        self.heads.back().map_or(0, |(_, change)| *change)
    }

    fn reach(&mut self, change: i64, now: Instant) {
        self.heads.push_back((now, change));
        while self.heads.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= OVERLAP) {
            self.heads.pop_front();
        }
    }
}

/// What other processes have changed.
#[derive(Debug)]
pub enum Changes {
    /// These rows have a new version, and no others, but for refreshes that were due.
    Rows(Vec<(UserId, Version)>),
    /// Nothing is certain: compare every user that you hold with the database.
    Unknown,
}

/// What a poll found.
#[derive(Debug)]
pub struct Poll {
    /// What other processes have changed since the last poll.
    pub changes: Changes,
    /// When the next background refresh is due; `None` if there is none.
    pub due_at: Option<Timestamp>,
    /// The brake that all processes share.
    pub brake: SharedBrake,
    /// Whether there are records that nobody has [described](Postgres::describe_page).
    pub has_undescribed: bool,
}

impl Postgres {
    /// Returns the changes since the last poll, but for refreshes that were due. Costs a few reads of indexes when
    /// nothing has changed.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read. The next call then returns the same changes.
    pub async fn poll(&self) -> Result<Poll, StoreError> {
        const SINCE: &str = "SELECT head.news, g.user_id, g.generation, g.epoch, head.due_at, head.undescribed, \
                             head.brake, extract(epoch FROM clock_timestamp())::float8, g.accounts \
                             FROM (SELECT (SELECT coalesce(max(news), 0) FROM adsidecar_grants WHERE news > 0) \
                             AS news, \
                             (SELECT extract(epoch FROM min(due_at))::float8 FROM adsidecar_grants \
                             WHERE record IS NOT NULL) AS due_at, \
                             (SELECT value FROM adsidecar_notes WHERE name = 'brake') AS brake, \
                             EXISTS (SELECT FROM adsidecar_grants WHERE record IS NOT NULL AND described IS NULL) \
                             AS undescribed) AS head \
                             LEFT JOIN LATERAL (SELECT user_id, generation, epoch, news, accounts \
                             FROM adsidecar_grants WHERE news > 0 AND news > $1 ORDER BY news LIMIT $2) AS g \
                             ON true ORDER BY g.news";
        let previous = locked(&self.0.position).clone();
        let (from, limit) = Position::range(previous.as_ref());
        let parameters: &Parameters<'_> = &[(&from, Type::INT8), (&limit, Type::INT8)];
        let rows = self.query(SINCE, parameters, OnDisconnect::Resend).await?;
        let (head, connection): (i64, _) = (first_row(&rows, 0)?, self.0.connection.connects());
        let due_at = first_row::<Option<f64>>(&rows, 4)?
            .and_then(|seconds| Timestamp::from_microsecond((seconds * 1e6) as i64).ok());
        let has_undescribed = first_row(&rows, 5)?;
        let brake = SharedBrake::noted(first_row(&rows, 6)?, first_row(&rows, 7)?);
        let (position, is_continued) = Position::after(previous, rows.len(), head, connection, Instant::now());
        *locked(&self.0.position) = Some(position);
        if !is_continued {
            self.tell_accounts(AccountsChanged::Unknown);
            return Ok(Poll { changes: Changes::Unknown, due_at, brake, has_undescribed });
        }
        let (mut changed, mut accounts) = (Vec::new(), Vec::new());
        for row in &rows {
            // A row whose key is not a user id was not written by us.
            let user = column::<Option<String>>(row, 1)?.and_then(|name| name.parse::<UserId>().ok());
            if let Some(user) = user {
                let (generation, epoch): (i64, i64) = (column(row, 2)?, column(row, 3)?);
                let version = Version { epoch: epoch.unsigned_abs(), generation: generation.unsigned_abs() };
                if let found @ 1.. = column::<i64>(row, 8)?.unsigned_abs() {
                    accounts.push((user.clone(), found));
                }
                changed.push((user, version));
            }
        }
        self.tell_accounts(AccountsChanged::Users(accounts));
        Ok(Poll { changes: Changes::Rows(changed), due_at, brake, has_undescribed })
    }

    /// Forgets up to where changes were read, because what was read could not be used: the next call of
    /// [`poll`](Self::poll) says so.
    pub fn lose_position(&self) {
        *locked(&self.0.position) = None;
    }

    /// Identifies the connection to the database: another one may lead to another server.
    pub fn connection(&self) -> u64 {
        self.0.connection.connects()
    }

    /// Returns when another process has stored a login or logout. Never returns behind a pooler, and may miss one: poll
    /// as well.
    pub async fn notified(&self) {
        self.0.connection.notified().await;
    }

    /// Reads what is stored for each of `users`, over the connection for bulk work, a page at a time.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn lookup_all(&self, users: &[UserId]) -> Result<Vec<(UserId, Lookup)>, StoreError> {
        const ROWS: &str = concat!("SELECT ", row_columns!(), " FROM adsidecar_grants AS g WHERE user_id = ANY ($1)");
        let mut all = Vec::with_capacity(users.len());
        for users in users.chunks(LOOKUP_ROWS) {
            let names: Vec<&str> = users.iter().map(UserId::as_str).collect();
            let rows = self.bulk_query(ROWS, &[(&names, Type::TEXT_ARRAY)]).await?;
            let mut found = BTreeMap::new();
            for row in &rows {
                found.insert(column::<String>(row, USER_COLUMN)?, row);
            }
            for user in users {
                let read = found.get(user.as_str()).map(|row| read_row(user, row)).transpose()?;
                all.push((user.clone(), self.opened(user, read.unwrap_or_default())));
            }
        }
        Ok(all)
    }
}
