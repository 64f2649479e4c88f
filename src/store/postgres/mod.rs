//! Grants in a PostgreSQL database that several processes share.
//!
//! The database is authoritative. Each process keeps what it read in memory, follows the [changes](Changes) that others
//! make, and reads the row itself before it requests a token. No database lock is held during a request to Login with
//! Amazon; instead:
//!
//! - A user's row has a [`Version`] that rises with each change, logouts included (a logout keeps the row and removes
//!   its record). Each write says which generation it saw: one based on another generation changes nothing and fails
//!   with [`Conflict`](StoreError::Conflict). The rule is one function in `schema.sql`, `adsidecar_write`.
//! - A process takes the row's *lease* before it requests a token, for 15 s by the database's clock. If it dies while
//!   holding the lease, the other processes wait at most that long.
//!
//! Statements that somebody waits for and work on many rows have a connection each.
//!
//! This file is long because each operation stands beside its SQL statement, so that what is atomic can be seen in one
//! place.
//!
//! Write access to the database suffices to delete a record or to restore an older one, but not to forge one: see
//! [`StoredGrant`].

/// The columns that [`read_row`] reads, of a table with the alias `g`; the user id is the last one.
macro_rules! row_columns {
    () => {
        "g.record, g.generation, g.epoch, g.refused, g.failure, \
         extract(epoch FROM g.retry_at - clock_timestamp())::float8, g.attempts, g.user_id"
    };
}

mod accounts;
mod brake;
mod changes;
mod connection;
mod connection_url;
mod describe;
mod leases;
mod maintenance;
mod notices;
mod pending;
mod pods;
mod throttle;
mod tls;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, ToSql, Type};

use super::{AccountsChanged, Health, Opened, Sealed, StoreError, Users};
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, RefreshPolicy, Version};
use crate::store::keyring::{Fingerprint, Keyring};
use crate::store::stored_grant::{StoredGrant, StoredGrantError, is_same_grant, open_record};
pub use brake::SharedBrake;
pub use changes::{Changes, LOOKUP_ROWS, Poll, Position};
pub use connection::RECONNECT_PAUSE_MAX;
use connection::{OnDisconnect, Parameters, PgConnection, Purpose};
pub use connection_url::ConnectionUrl;
pub use describe::{UserOverview, due_at};
pub use leases::{Claimed, DUE_AGAIN, LEASE, Lease};
pub use pods::{PUBLISH, Pod};
pub use throttle::{SharedLimit, ThrottleReport, ThrottleRow};

const SCHEMA: &str = concat!(include_str!("schema.sql"), include_str!("throttle.sql"));

/// Maximum number of rows per statement, so that each completes well within its deadline.
const PAGE_ROWS: i64 = 500;
/// Number of rows by which a start without a note of the key checks it.
const FIRST_ROWS: i64 = 20;
/// When refreshes become due for records that a command stores: the defaults of the configuration.
const DEFAULT_POLICY: RefreshPolicy = RefreshPolicy {
    margin: Duration::from_mins(5),
    ahead: Duration::from_mins(15),
    idle_after: Duration::from_hours(7 * 24),
};
/// Number of attempts at a write that conflicts with writes of other processes.
const MAX_ATTEMPTS: usize = 10;
/// The note that holds the schema version of the tables, and the version that this program supports.
const SCHEMA_NOTE: &str = "schema";
const SCHEMA_VERSION: &str = "1";
/// The note that holds the number of the last migration, and the number of the last one in [`SCHEMA`]. A migration
/// only adds to the tables of a schema version, so that processes of the previous release keep working.
const MIGRATION_NOTE: &str = "migration";
const MIGRATION: u32 = 7;
/// The note that holds the fingerprint of the key that seals.
const KEY_NOTE: &str = "key";

/// A handle to the database. A clone is another handle to the same connection.
#[derive(Clone)]
pub struct Postgres(Arc<Inner>);

struct Inner {
    connection: PgConnection,
    /// For work on many rows, and for rows that another transaction has locked.
    bulk: PgConnection,
    keyring: ArcSwap<Keyring>,
    /// The name of this process as a lease owner: random, and new for each start.
    owner: String,
    /// When refreshes become due.
    policy: ArcSwap<RefreshPolicy>,
    /// The number of records by what they are sealed with, when they were last counted.
    records: Mutex<BTreeMap<Sealed, usize>>,
    position: Mutex<Option<Position>>,
    /// Whose accounts have changed, until somebody takes it; and notified of it.
    accounts_changed: Mutex<Option<AccountsChanged>>,
    accounts_told: Notify,
    /// Whether the last operation succeeded, and why the most recent failed one failed.
    health: Mutex<(bool, Option<String>)>,
}

/// What is stored for a user, as [`Postgres::lookup`] found it.
#[derive(Debug)]
pub struct Lookup {
    /// The version of the row.
    pub version: Version,
    /// What the row holds.
    pub content: Content,
    /// How the last refresh of this version failed, at whatever process; `None` if it did not.
    pub failed: Option<FailedRefresh>,
}

/// How a refresh failed, as the row says it to all processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedRefresh {
    /// Whether Login with Amazon refused the grant. Otherwise the next attempt may succeed.
    pub refused: bool,
    /// The error code.
    pub code: String,
    /// Number of refreshes that have failed one after the other.
    pub attempts: u32,
    /// How long no process may try again, by the database's clock.
    pub retry_in: Duration,
}

/// The content of a user's row.
#[derive(Debug)]
pub enum Content {
    /// The stored grant.
    Grant(Box<Grant>),
    /// No grant is stored.
    Absent,
    /// A record that yields no grant.
    Unreadable(StoredGrantError),
}

/// The epoch that a write gives to a row.
#[derive(Clone, Copy, Debug)]
enum Epoch {
    /// The stored one.
    Stored,
    /// This one.
    Exactly(u64),
    /// A new one: a person logged in or out so long ago.
    Age(Duration),
}

/// What a write did.
struct Written {
    done: bool,
    /// Whether there was a grant before.
    was_present: bool,
    /// The version of the row now.
    version: Version,
}

/// The notes that a start looks at.
struct StartNotes {
    migration: Option<String>,
    schema: Option<String>,
    key: Option<String>,
}

impl StartNotes {
    /// Whether the tables need no migration. A higher number is that of a newer release, whose tables this one can use:
    /// see [`SCHEMA_VERSION`].
    fn is_migrated(&self) -> bool {
        let number = self.migration.as_ref().and_then(|number| number.parse::<u32>().ok());
        number.is_some_and(|number| number >= MIGRATION)
    }
}

/// A row with a record.
struct StoredRow {
    user: UserId,
    json: String,
    generation: i64,
}

impl Postgres {
    /// Connects, creates missing tables, checks the key, and reads all records. Blocks until that is done.
    pub(super) fn open(url: ConnectionUrl, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        let open = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| StoreError::Postgres { reason: error.to_string() })?;
            runtime.block_on(async move {
                let store = Self::new(url, keyring);
                let users = store.prepare_and_read().await?;
                // The connection belongs to this runtime, which ends here. The first operation opens another.
                store.0.connection.disconnect().await;
                store.0.bulk.disconnect().await;
                Ok((store, Opened { users, ..Opened::default() }))
            })
        };
        // Use a separate thread: commands call this outside a runtime, doctor calls it inside one.
        let opening = std::thread::Builder::new().name("store".into()).spawn(open);
        let opened = opening.map_err(|error| StoreError::Postgres { reason: error.to_string() })?.join();
        opened.unwrap_or_else(|_| Err(StoreError::Postgres { reason: "the store panicked while it connected".into() }))
    }

    /// Connects, creates missing tables, checks the key, and says that this process is alive: one connection and three
    /// statements, if the tables are those of this version.
    pub(super) async fn open_to_serve(url: ConnectionUrl, keyring: Arc<Keyring>) -> Result<Self, StoreError> {
        let store = Self::new(url, keyring);
        let (ring, noted) = store.prepare().await?;
        if noted.as_ref().is_none_or(|key| key.parse::<Fingerprint>().is_err()) {
            let first = store.page("", FIRST_ROWS).await?.0;
            store.check_key(&first.into_iter().map(|row| (row.user.clone(), row.open(&ring).0)).collect())?;
        }
        store.set_key(noted.as_deref(), &ring).await?;
        store.publish_pod().await?;
        Ok(store)
    }

    fn new(url: ConnectionUrl, keyring: Arc<Keyring>) -> Self {
        // Two processes with the same owner name would mistake each other's leases for their own.
        let random = getrandom::u64().and_then(|high| Ok((high, getrandom::u64()?)));
        let (high, low) = random.expect("the operating system provides random bytes");
        Self(Arc::new(Inner {
            connection: PgConnection::new(url.clone(), Purpose::Requests),
            bulk: PgConnection::new(url, Purpose::Bulk),
            keyring: ArcSwap::new(keyring),
            owner: format!("{high:016x}{low:016x}"),
            policy: ArcSwap::from_pointee(DEFAULT_POLICY),
            records: Mutex::default(),
            position: Mutex::default(),
            accounts_changed: Mutex::default(),
            accounts_told: Notify::new(),
            health: Mutex::new((true, None)),
        }))
    }

    /// Creates missing tables, checks schema version and key, and reads all records.
    async fn prepare_and_read(&self) -> Result<Users, StoreError> {
        let (ring, noted) = self.prepare().await?;
        let users = self.scan().await?;
        match noted.as_deref().and_then(|key| key.parse().ok()) {
            // A command does not change which key seals; that is for a rotation, or for a process that serves.
            Some(key) => self.0.keyring.store(Arc::new(ring.sealing_with(key))),
            None => {
                self.check_key(&users)?;
                self.set_key(noted.as_deref(), &ring).await?;
            }
        }
        self.count_records().await?;
        Ok(users)
    }

    /// Creates missing tables, and checks schema version and key. Returns the keyring, and the key that was noted.
    async fn prepare(&self) -> Result<(Arc<Keyring>, Option<String>), StoreError> {
        let StartNotes { schema, key: noted, .. } = self.create_tables().await?;
        match schema {
            None => self.set_note(SCHEMA_NOTE, SCHEMA_VERSION).await?,
            Some(version) if version == SCHEMA_VERSION => {}
            Some(version) => return Err(StoreError::UnsupportedSchema { version }),
        }
        let ring = self.0.keyring.load_full();
        let key = noted.as_deref().and_then(|key| key.parse::<Fingerprint>().ok());
        if key.is_some_and(|key| !ring.fingerprints().contains(&key)) {
            return Err(self.wrong_key(key));
        }
        Ok((ring, noted))
    }

    /// Reads the notes that a start looks at, in one statement: many processes may start at once.
    async fn start_notes(&self) -> Result<StartNotes, StoreError> {
        const NOTES: &str = "SELECT (SELECT value FROM adsidecar_notes WHERE name = $1), \
                             (SELECT value FROM adsidecar_notes WHERE name = $2), \
                             (SELECT value FROM adsidecar_notes WHERE name = $3)";
        let parameters: &Parameters<'_> =
            &[(&MIGRATION_NOTE, Type::TEXT), (&SCHEMA_NOTE, Type::TEXT), (&KEY_NOTE, Type::TEXT)];
        let rows = self.query(NOTES, parameters, OnDisconnect::Resend).await?;
        Ok(StartNotes { migration: first_row(&rows, 0)?, schema: first_row(&rows, 1)?, key: first_row(&rows, 2)? })
    }

    /// Without a note of the key: fails if there are records and no key of the keyring opens any of them.
    fn check_key(&self, users: &Users) -> Result<(), StoreError> {
        let undecryptable =
            |(_, grant): &(UserId, Result<Grant, _>)| matches!(grant, Err(StoredGrantError::Undecryptable));
        if !users.is_empty() && users.iter().all(undecryptable) { Err(self.wrong_key(None)) } else { Ok(()) }
    }

    /// Creates the tables, and migrates those of an earlier release; but only if that is needed: PostgreSQL rejects
    /// `CREATE TABLE IF NOT EXISTS` from a role without the privilege even if the table exists. Returns the notes.
    async fn create_tables(&self) -> Result<StartNotes, StoreError> {
        const EXIST: &str = "SELECT to_regclass('adsidecar_grants') IS NOT NULL \
                             AND to_regclass('adsidecar_logins') IS NOT NULL \
                             AND to_regclass('adsidecar_waiting') IS NOT NULL \
                             AND to_regclass('adsidecar_notes') IS NOT NULL \
                             AND to_regclass('adsidecar_throttle') IS NOT NULL \
                             AND to_regclass('adsidecar_slugs') IS NOT NULL";
        for _ in 0..MAX_ATTEMPTS {
            let rows = self.query(EXIST, &[], OnDisconnect::Resend).await?;
            if first_row(&rows, 0)? {
                let notes = self.start_notes().await?;
                // Tables of another schema version are not ours to migrate.
                if notes.is_migrated() || notes.schema.as_ref().is_some_and(|version| version != SCHEMA_VERSION) {
                    return Ok(notes);
                }
            }
            self.0.bulk.create(SCHEMA).await?;
        }
        Err(StoreError::Postgres { reason: "the created tables are not in the search_path of the role".into() })
    }

    /// Records which key seals from now on. `found` is the note that was read before. Fails with
    /// [`StoreError::WrongKey`] if another process has since recorded a key that is not in our keyring.
    async fn set_key(&self, found: Option<&str>, ring: &Keyring) -> Result<(), StoreError> {
        const SET: &str = "INSERT INTO adsidecar_notes AS n (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE \
                           SET value = excluded.value WHERE n.value = $3 RETURNING value";
        let (first, found) = (ring.first().to_string(), found.unwrap_or_default());
        if first == found {
            return Ok(());
        }
        let parameters: &Parameters<'_> = &[(&KEY_NOTE, Type::TEXT), (&first, Type::TEXT), (&found, Type::TEXT)];
        if self.query(SET, parameters, OnDisconnect::Resend).await?.is_empty() {
            let key = self.note(KEY_NOTE).await?.and_then(|key| key.parse().ok());
            if key.is_some_and(|key| !ring.fingerprints().contains(&key)) {
                return Err(self.wrong_key(key));
            }
        }
        Ok(())
    }

    fn wrong_key(&self, expected: Option<Fingerprint>) -> StoreError {
        StoreError::WrongKey { expected, have: self.0.keyring.load().fingerprints() }
    }

    /// See [`TokenStore::save`](super::TokenStore::save).
    pub(super) async fn save(&self, user: &UserId, grant: &Grant, expected: Option<u64>) -> Result<u64, StoreError> {
        match expected {
            Some(expected) => self.compare_and_swap(user, grant, expected, Epoch::Stored, true).await,
            None => Ok(self.consent(user, grant, Duration::ZERO).await?.generation),
        }
    }

    /// Stores the result of a refresh of the version `of`. Its epoch is compared too: after a failover that lost
    /// commits, another grant may have the same generation, and this one is newer if its login was. One that came
    /// `early` is told to all processes: those that hold the grant look for a refresh once it is due.
    ///
    /// # Errors
    ///
    /// [`StoreError::Conflict`] if the stored generation is not that of `of`, or the stored epoch is higher; any other
    /// [`StoreError`] if the database cannot be read or written.
    pub async fn put_refreshed(
        &self,
        user: &UserId,
        grant: &Grant,
        of: Version,
        early: bool,
    ) -> Result<Version, StoreError> {
        let generation = self.compare_and_swap(user, grant, of.generation, Epoch::Exactly(of.epoch), early).await?;
        Ok(Version { generation, ..of })
    }

    /// Stores `grant` if the stored generation is `expected`.
    async fn compare_and_swap(
        &self,
        user: &UserId,
        grant: &Grant,
        expected: u64,
        epoch: Epoch,
        early: bool,
    ) -> Result<u64, StoreError> {
        let written = self.write(user, Some((grant, early)), grant.generation, epoch, Some(expected)).await?;
        if !written.done {
            let ring = self.0.keyring.load_full();
            let holds_grant = |row: StoredRow| is_same_grant(&row.record(), user, grant, &ring);
            if !self.row(user).await?.stored.is_some_and(holds_grant) {
                return Err(StoreError::Conflict);
            }
        }
        Ok(grant.generation)
    }

    /// Stores `grant`, to which a person consented `age` ago, over whatever is stored, under a version above every
    /// earlier one. Fails with [`StoreError::Conflict`] if somebody has logged in or out since.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the database cannot be read or written.
    pub async fn consent(&self, user: &UserId, grant: &Grant, age: Duration) -> Result<Version, StoreError> {
        let mut seen = self.row(user).await?.version.generation;
        for _ in 0..MAX_ATTEMPTS {
            let generation = seen.saturating_add(1).max(grant.generation);
            let raised = Grant { generation, ..grant.clone() };
            let written = self.write(user, Some((&raised, true)), generation, Epoch::Age(age), Some(seen)).await?;
            if written.done {
                return Ok(written.version);
            }
            if written.version.generation == seen && !age.is_zero() {
                // Somebody has logged in or out since.
                return Err(StoreError::Conflict);
            }
            // A refresh, or another login, at the same moment: this one comes after it.
            seen = self.row(user).await?.version.generation;
        }
        Err(StoreError::Conflict)
    }

    /// Stores a grant that no person just consented to, in place of the version `seen`, if that is still stored. Its
    /// epoch is only just above: each login or logout that the database may have lost is newer. Returns its version;
    /// `None` if there is another row now.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the database cannot be written.
    pub async fn put_new(&self, user: &UserId, grant: &Grant, seen: Version) -> Result<Option<Version>, StoreError> {
        let version = Version { epoch: seen.epoch + 1, generation: seen.generation + 1 };
        Ok(self.put_back(user, grant, version, seen.generation).await?.then_some(version))
    }

    /// Stores a grant that the database has lost again, under `version`, if the stored generation is still `seen`.
    /// Returns whether it is stored now.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the database cannot be written.
    pub async fn put_back(
        &self,
        user: &UserId,
        grant: &Grant,
        version: Version,
        seen: u64,
    ) -> Result<bool, StoreError> {
        let grant = Grant { generation: version.generation, ..grant.clone() };
        let epoch = Epoch::Exactly(version.epoch);
        Ok(self.write(user, Some((&grant, true)), version.generation, epoch, Some(seen)).await?.done)
    }

    /// Removes the grant of `user` again, under `version`, if the stored generation is still `seen`: the database has
    /// lost the logout. Returns whether it is removed now.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the database cannot be written.
    pub async fn repeat_logout(&self, user: &UserId, version: Version, seen: u64) -> Result<bool, StoreError> {
        let epoch = Epoch::Exactly(version.epoch);
        Ok(self.write(user, None, version.generation, epoch, Some(seen)).await?.done)
    }

    /// See [`TokenStore::erase`](super::TokenStore::erase).
    pub(super) async fn erase(&self, user: &UserId) -> Result<bool, StoreError> {
        Ok(self.log_out(user).await?.0)
    }

    /// Removes the grant of `user`, whatever its version. Returns whether there was one, and the version of the logout.
    /// It is recorded also if there was none: the database may have lost a login that a process is about to restore.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the database cannot be written.
    pub async fn log_out(&self, user: &UserId) -> Result<(bool, Version), StoreError> {
        let written = self.write(user, None, 0, Epoch::Age(Duration::ZERO), None).await?;
        Ok((written.was_present, written.version))
    }

    /// The only way in which a process changes what is stored for a user: see `adsidecar_write` in `schema.sql`.
    /// Without a grant it is a logout; beside the grant stands whether it comes before others look for it. A
    /// `generation` of 0 is the next one.
    async fn write(
        &self,
        user: &UserId,
        grant: Option<(&Grant, bool)>,
        generation: u64,
        epoch: Epoch,
        seen: Option<u64>,
    ) -> Result<Written, StoreError> {
        const WRITE: &str = "SELECT written, was_present, now_generation, now_epoch \
                             FROM adsidecar_write($1, $2, $3, $4, $5, $6, $7, $8)";
        let ring = self.0.keyring.load_full();
        let (name, json) = (user.as_str(), grant.map(|(grant, _)| sealed_json(grant, user, &ring)));
        let (epoch, age, seen) = match epoch {
            Epoch::Stored => (None, None, seen.map(to_bigint)),
            Epoch::Exactly(epoch) => (Some(to_bigint(epoch)), None, seen.map(to_bigint)),
            Epoch::Age(age) => (None, Some(age.as_secs_f64()), seen.map(to_bigint)),
        };
        let generation = (generation > 0).then(|| to_bigint(generation));
        let about = grant.map(|(grant, early)| {
            let mut about = self.describe(user, grant, Sealed::By(ring.first()));
            about["early"] = early.into();
            about.to_string()
        });
        let rows = self
            .patiently(WRITE, OnDisconnect::Resend, |patience| {
                [
                    (&name as &(dyn ToSql + Sync), Type::TEXT),
                    (&json, Type::TEXT),
                    (&generation, Type::INT8),
                    (&epoch, Type::INT8),
                    (&age, Type::FLOAT8),
                    (&seen, Type::INT8),
                    (&about, Type::TEXT),
                    (patience, Type::TEXT),
                ]
            })
            .await?;
        Ok(Written {
            done: first_row(&rows, 0)?,
            was_present: first_row(&rows, 1)?,
            version: Version { generation: unsigned(&rows, 2)?, epoch: unsigned(&rows, 3)? },
        })
    }

    /// Runs a statement that may meet a locked row: then it is repeated over the connection for bulk work, where nobody
    /// waits behind it. `parameters` gets the time that the statement may wait for the lock.
    async fn patiently<'a, const N: usize>(
        &self,
        statement: &str,
        on_disconnect: OnDisconnect,
        parameters: impl Fn(&'a &'static str) -> [(&'a (dyn ToSql + Sync), Type); N],
    ) -> Result<Vec<Row>, StoreError> {
        static HASTY: &str = Purpose::Requests.lock_timeout();
        static PATIENT: &str = Purpose::Bulk.lock_timeout();
        match self.query(statement, &parameters(&HASTY), on_disconnect).await {
            Err(StoreError::RowLocked) => {
                let parameters = parameters(&PATIENT);
                let over_bulk = self.0.bulk.query(statement, &parameters, on_disconnect);
                let limit = Purpose::Requests.deadline();
                tokio::time::timeout(limit, Box::pin(over_bulk)).await.unwrap_or(Err(StoreError::RowLocked))
            }
            result => result,
        }
    }

    /// See [`TokenStore::load`](super::TokenStore::load).
    pub(super) async fn load(&self, user: &UserId) -> Result<Option<Grant>, StoreError> {
        let ring = self.0.keyring.load_full();
        let row = self.row(user).await?.stored;
        Ok(row.map(|row| row.open(&ring).0).transpose()?)
    }

    /// Reads what is stored for `user` now.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn lookup(&self, user: &UserId) -> Result<Lookup, StoreError> {
        let row = self.row(user).await?;
        Ok(self.opened(user, row))
    }

    /// Opens the record of a row as it was read.
    fn opened(&self, user: &UserId, row: RowRead) -> Lookup {
        let ring = self.0.keyring.load_full();
        let RowRead { stored, version, failed } = row;
        let content = match stored {
            None => Content::Absent,
            Some(row) => {
                debug_assert_eq!(row.user, *user);
                row.open(&ring).0.map_or_else(Content::Unreadable, |grant| Content::Grant(Box::new(grant)))
            }
        };
        Lookup { version, content, failed }
    }

    pub(super) async fn note(&self, name: &str) -> Result<Option<String>, StoreError> {
        const NOTE: &str = "SELECT value FROM adsidecar_notes WHERE name = $1";
        let rows = self.query(NOTE, &[(&name, Type::TEXT)], OnDisconnect::Resend).await?;
        rows.first().map(|row| column(row, 0)).transpose()
    }

    pub(super) async fn set_note(&self, name: &str, value: &str) -> Result<(), StoreError> {
        const SET: &str = "INSERT INTO adsidecar_notes (name, value) VALUES ($1, $2) \
                           ON CONFLICT (name) DO UPDATE SET value = excluded.value RETURNING value";
        self.query(SET, &[(&name, Type::TEXT), (&value, Type::TEXT)], OnDisconnect::Resend).await.map(drop)
    }

    pub(super) fn health(&self) -> Health {
        let records = locked(&self.0.records).clone();
        let (up, last_error) = locked(&self.0.health).clone();
        Health { up, last_error, recoveries: 0, records }
    }

    pub(super) async fn close(&self) -> Result<(), StoreError> {
        // If this fails, the process counts as alive for half a minute more.
        let _ = self.withdraw_pod().await;
        self.0.connection.close().await;
        self.0.bulk.close().await;
        Ok(())
    }

    /// Runs one statement and records in the health whether it succeeded.
    async fn query(
        &self,
        statement: &str,
        parameters: &Parameters<'_>,
        on_disconnect: OnDisconnect,
    ) -> Result<Vec<Row>, StoreError> {
        // Boxed, to keep the futures of all callers small.
        let result = Box::pin(self.0.connection.query(statement, parameters, on_disconnect)).await;
        let mut health = locked(&self.0.health);
        // A locked row says nothing about the database.
        health.0 = result.is_ok() || matches!(result, Err(StoreError::RowLocked));
        if let Err(error) = &result {
            health.1 = Some(error.to_string());
        }
        result
    }

    /// As [`query`](Self::query), over the connection for bulk work. It says nothing about the health of the store,
    /// which requests depend on.
    async fn bulk_query(&self, statement: &str, parameters: &Parameters<'_>) -> Result<Vec<Row>, StoreError> {
        Box::pin(self.0.bulk.query(statement, parameters, OnDisconnect::Resend)).await
    }

    /// Calls `visit` with every row that has a record, ordered by user id.
    async fn for_each_row(&self, mut visit: impl FnMut(StoredRow)) -> Result<(), StoreError> {
        let mut after = Some(String::new());
        while let Some(last) = after {
            let (rows, next) = self.page(&last, PAGE_ROWS).await?;
            rows.into_iter().for_each(&mut visit);
            after = next;
        }
        Ok(())
    }

    /// Reads the next page of rows with a record after the user id `after`, and returns where the page after it starts.
    /// A row whose key is not a user id was not written by us and is skipped.
    async fn page(&self, after: &str, limit: i64) -> Result<(Vec<StoredRow>, Option<String>), StoreError> {
        const ROWS: &str = "SELECT user_id, record, generation FROM adsidecar_grants \
                            WHERE record IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT $2";
        let rows = self.bulk_query(ROWS, &[(&after, Type::TEXT), (&limit, Type::INT8)]).await?;
        let mut page = Vec::new();
        for row in &rows {
            if let Ok(user) = column::<String>(row, 0)?.parse() {
                page.push(StoredRow { user, json: column(row, 1)?, generation: column(row, 2)? });
            }
        }
        Ok((page, rows.last().map(|last| column(last, 0)).transpose()?))
    }

    /// Reads the row of `user`.
    async fn row(&self, user: &UserId) -> Result<RowRead, StoreError> {
        const ROW: &str = concat!("SELECT ", row_columns!(), " FROM adsidecar_grants AS g WHERE user_id = $1");
        let name = user.as_str();
        let rows = self.query(ROW, &[(&name, Type::TEXT)], OnDisconnect::Resend).await?;
        rows.first().map_or_else(|| Ok(RowRead::default()), |row| read_row(user, row))
    }
}

/// The index of the user id among [`row_columns`].
const USER_COLUMN: usize = 7;

/// A user's row as it was read; the default is no row.
#[derive(Default)]
struct RowRead {
    /// The row, if it has a record.
    stored: Option<StoredRow>,
    version: Version,
    failed: Option<FailedRefresh>,
}

/// Reads the [`row_columns`].
fn read_row(user: &UserId, row: &Row) -> Result<RowRead, StoreError> {
    let (generation, epoch): (i64, i64) = (column(row, 1)?, column(row, 2)?);
    let stored = column::<Option<String>>(row, 0)?.map(|json| StoredRow { user: user.clone(), json, generation });
    let seconds = |seconds: Option<f64>| Duration::try_from_secs_f64(seconds?.max(0.0)).ok();
    let (refused, failure): (Option<String>, Option<String>) = (column(row, 3)?, column(row, 4)?);
    let (is_refused, retry_in) = (refused.is_some(), seconds(column(row, 5)?).unwrap_or_default());
    let attempts = column::<Option<i32>>(row, 6)?.and_then(|attempts| u32::try_from(attempts).ok()).unwrap_or(1);
    let failed = refused.or(failure).map(|code| FailedRefresh { refused: is_refused, code, attempts, retry_in });
    let version = Version { epoch: epoch.unsigned_abs(), generation: generation.unsigned_abs() };
    Ok(RowRead { stored, version, failed })
}

impl StoredRow {
    /// Parses the record. Its own generation, which the seal authenticates, must be the row's.
    fn record(&self) -> Result<StoredGrant, StoredGrantError> {
        let record = StoredGrant::parse(self.json.as_bytes())?;
        if to_bigint(record.generation()) == self.generation { Ok(record) } else { Err(StoredGrantError::Tampered) }
    }

    /// Decrypts the record, and says what it is sealed with.
    fn open(&self, ring: &Keyring) -> (Result<Grant, StoredGrantError>, Sealed) {
        open_record(&self.user, &self.record(), ring)
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("health", &self.health()).finish_non_exhaustive()
    }
}

fn sealed_json(grant: &Grant, user: &UserId, ring: &Keyring) -> String {
    String::from_utf8(StoredGrant::seal(grant, user, ring).to_json()).expect("JSON is UTF-8")
}

/// Converts a generation to PostgreSQL's `bigint`, which is signed. No generation ever reaches its maximum.
fn to_bigint(generation: u64) -> i64 {
    i64::try_from(generation).unwrap_or(i64::MAX - 1)
}

/// Reads a column by its index.
fn column<'a, T: FromSql<'a>>(row: &'a Row, at: usize) -> Result<T, StoreError> {
    let other = |error: tokio_postgres::Error| StoreError::Postgres {
        reason: format!("the tables do not have the schema of this version: {error}"),
    };
    row.try_get(at).map_err(other)
}

/// Reads a column of the first row that is never negative.
fn unsigned(rows: &[Row], at: usize) -> Result<u64, StoreError> {
    first_row::<i64>(rows, at).map(i64::unsigned_abs)
}

/// Reads a column of the first row, for a statement that always returns one.
fn first_row<'a, T: FromSql<'a>>(rows: &'a [Row], at: usize) -> Result<T, StoreError> {
    let none = || StoreError::Postgres { reason: "a statement that always returns a row returned none".into() };
    column(rows.first().ok_or_else(none)?, at)
}

/// Locks the mutex and ignores poisoning: it guards plain data, which a panic leaves valid.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
