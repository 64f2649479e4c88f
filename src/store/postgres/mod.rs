//! Grants in a PostgreSQL database that several processes share.
//!
//! The database is authoritative. Each process caches it in memory, polls for changes every second, and reads the row
//! itself before it requests a token. No database lock is held during a request to Login with Amazon; instead:
//!
//! - A user's row has a *generation* that rises with each change, logouts included (a logout keeps the row and removes
//!   its record). Each write is a compare-and-swap: one based on an older generation matches no row and fails with
//!   [`Conflict`](StoreError::Conflict).
//! - A process takes the row's *lease* before it requests a token, for 15 s by the database's clock. If it dies while
//!   holding the lease, the other processes wait at most that long.
//!
//! This file is long because each operation stands beside its SQL statement, so that what is atomic can be seen in one
//! place.
//!
//! Write access to the database suffices to delete a record or to restore an older one, but not to forge one: see
//! [`StoredGrant`].

mod accounts;
mod changes;
mod connection;
mod connection_url;
mod maintenance;
mod pending;
mod tls;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};

use super::{Health, Opened, Sealed, StoreError, Users};
use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::store::keyring::{Fingerprint, Keyring};
use crate::store::stored_grant::{StoredGrant, StoredGrantError, is_same_grant, open_record};
use changes::ChangeCursor;
use connection::{OnDisconnect, Parameters, PgConnection};
pub use connection_url::ConnectionUrl;

const SCHEMA: &str = include_str!("schema.sql");

/// Maximum number of rows per statement, so that each completes well within its deadline.
const PAGE_ROWS: i64 = 500;
/// Number of attempts at a write that conflicts with writes of other processes.
const MAX_ATTEMPTS: usize = 10;
/// The note that holds the schema version of the tables, and the version that this program supports.
const SCHEMA_NOTE: &str = "schema";
const SCHEMA_VERSION: &str = "1";
/// The note that holds the fingerprint of the key that seals.
const KEY_NOTE: &str = "key";

/// A handle to the database. A clone is another handle to the same connection.
#[derive(Clone)]
pub struct Postgres(Arc<Inner>);

struct Inner {
    connection: PgConnection,
    keyring: ArcSwap<Keyring>,
    /// The name of this process as a lease owner: random, and new for each start.
    owner: String,
    /// The rows with a record, as this process last read or wrote them.
    known: Mutex<BTreeMap<UserId, KnownRow>>,
    cursor: Mutex<ChangeCursor>,
    /// Whether the last operation succeeded, and why the most recent failed one failed.
    health: Mutex<(bool, Option<String>)>,
}

/// What this process remembers of a row, to detect changes made by others.
#[derive(Clone, Debug, PartialEq, Eq)]
struct KnownRow {
    generation: i64,
    /// SHA-256 of the record's JSON.
    digest: Vec<u8>,
    sealed: Sealed,
}

/// What is stored for a user, as [`Postgres::lookup`] found it.
#[derive(Debug)]
pub enum Lookup {
    /// The stored grant.
    Grant(Box<Grant>),
    /// No grant is stored.
    Absent {
        /// The generation of the logout; 0 if the user never had a grant.
        generation: u64,
        /// When the user was logged out, by the database's clock.
        since: Option<Timestamp>,
    },
    /// A record that yields no grant.
    Unreadable(StoredGrantError),
}

/// The outcome of [`Postgres::acquire_lease`]: whether this process may request a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// This process holds the lease: no other process requests a token for this user.
    Acquired {
        /// Another process held the lease for the same generation and let it expire, so the result of its token request
        /// is unknown.
        interrupted: bool,
    },
    /// Another process holds the lease, or the stored generation has changed.
    Denied,
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
                let opened = store.prepare().await?;
                // The connection belongs to this runtime, which ends here. The first operation opens another.
                store.0.connection.disconnect().await;
                Ok((store, opened))
            })
        };
        // Use a separate thread: commands call this outside a runtime, `serve` calls it inside one.
        let opening = std::thread::Builder::new().name("store".into()).spawn(open);
        let opened = opening.map_err(|error| StoreError::Postgres { reason: error.to_string() })?.join();
        opened.unwrap_or_else(|_| Err(StoreError::Postgres { reason: "the store panicked while it connected".into() }))
    }

    fn new(url: ConnectionUrl, keyring: Arc<Keyring>) -> Self {
        // Two processes with the same owner name would mistake each other's leases for their own.
        let random = getrandom::u64().and_then(|high| Ok((high, getrandom::u64()?)));
        let (high, low) = random.expect("the operating system provides random bytes");
        Self(Arc::new(Inner {
            connection: PgConnection::new(url),
            keyring: ArcSwap::new(keyring),
            owner: format!("{high:016x}{low:016x}"),
            known: Mutex::default(),
            cursor: Mutex::default(),
            health: Mutex::new((true, None)),
        }))
    }

    /// Creates missing tables, checks schema version and key, and reads all records.
    async fn prepare(&self) -> Result<Opened, StoreError> {
        self.create_tables().await?;
        match self.note(SCHEMA_NOTE).await? {
            None => self.set_note(SCHEMA_NOTE, SCHEMA_VERSION).await?,
            Some(version) if version == SCHEMA_VERSION => {}
            Some(version) => return Err(StoreError::UnsupportedSchema { version }),
        }
        let found = self.note(KEY_NOTE).await?;
        let (ring, key) =
            (self.0.keyring.load_full(), found.as_deref().and_then(|key| key.parse::<Fingerprint>().ok()));
        if key.is_some_and(|key| !ring.fingerprints().contains(&key)) {
            return Err(self.wrong_key(key));
        }
        let users = self.read_all(&ring).await?;
        let undecryptable =
            |(_, grant): &(UserId, Result<Grant, _>)| matches!(grant, Err(StoredGrantError::Undecryptable));
        if key.is_none() && !users.is_empty() && users.iter().all(undecryptable) {
            return Err(self.wrong_key(None));
        }
        self.set_key(found.as_deref(), &ring).await?;
        Ok(Opened { users, ..Opened::default() })
    }

    /// Creates the tables, but only if one is missing: PostgreSQL rejects `CREATE TABLE IF NOT EXISTS` from a role
    /// without the privilege even if the table exists.
    async fn create_tables(&self) -> Result<(), StoreError> {
        const EXIST: &str = "SELECT to_regclass('adsidecar_grants') IS NOT NULL \
                             AND to_regclass('adsidecar_logins') IS NOT NULL \
                             AND to_regclass('adsidecar_waiting') IS NOT NULL \
                             AND to_regclass('adsidecar_notes') IS NOT NULL";
        for _ in 0..MAX_ATTEMPTS {
            let rows = self.query(EXIST, &[], OnDisconnect::Resend).await?;
            if first_row(&rows, 0)? {
                return Ok(());
            }
            self.0.connection.create(SCHEMA).await?;
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
            Some(expected) => self.compare_and_swap(user, grant, expected).await,
            None => self.overwrite(user, grant).await,
        }
    }

    /// Stores `grant` if the stored generation is `expected`.
    async fn compare_and_swap(&self, user: &UserId, grant: &Grant, expected: u64) -> Result<u64, StoreError> {
        const REPLACE: &str = "UPDATE adsidecar_grants SET record = $2, generation = $3, \
                               changed_at = clock_timestamp(), lease_owner = NULL, lease_until = NULL \
                               WHERE user_id = $1 AND generation = $4 AND record IS NOT NULL RETURNING generation";
        let ring = self.0.keyring.load_full();
        let (name, generation) = (user.as_str(), to_bigint(grant.generation));
        let (json, expected) = (sealed_json(grant, user, &ring), to_bigint(expected));
        let parameters: &Parameters<'_> =
            &[(&name, Type::TEXT), (&json, Type::TEXT), (&generation, Type::INT8), (&expected, Type::INT8)];
        let done = !self.query(REPLACE, parameters, OnDisconnect::Resend).await?.is_empty();
        let holds_grant = |row: StoredRow| is_same_grant(&row.record(), user, grant, &ring);
        if !done && !self.row(user).await?.0.is_some_and(holds_grant) {
            return Err(StoreError::Conflict);
        }
        self.remember(user, &json, generation, Sealed::By(ring.first()));
        Ok(grant.generation)
    }

    /// Stores `grant` over whatever is stored, under a generation above every earlier one.
    async fn overwrite(&self, user: &UserId, grant: &Grant) -> Result<u64, StoreError> {
        const PUT: &str = "INSERT INTO adsidecar_grants AS g (user_id, record, generation, changed_at) \
                           VALUES ($1, $2, $3, clock_timestamp()) ON CONFLICT (user_id) DO UPDATE \
                           SET record = excluded.record, generation = excluded.generation, \
                           changed_at = excluded.changed_at, lease_owner = NULL, lease_until = NULL \
                           WHERE g.generation = $4 RETURNING g.generation";
        let ring = self.0.keyring.load_full();
        let name = user.as_str();
        for _ in 0..MAX_ATTEMPTS {
            let stored = self.row(user).await?.1;
            let generation = stored.saturating_add(1).max(to_bigint(grant.generation));
            let raised = Grant { generation: generation.unsigned_abs(), ..grant.clone() };
            let json = sealed_json(&raised, user, &ring);
            let parameters: &Parameters<'_> =
                &[(&name, Type::TEXT), (&json, Type::TEXT), (&generation, Type::INT8), (&stored, Type::INT8)];
            if !self.query(PUT, parameters, OnDisconnect::Resend).await?.is_empty() {
                self.remember(user, &json, generation, Sealed::By(ring.first()));
                return Ok(raised.generation);
            }
        }
        Err(StoreError::Conflict)
    }

    /// See [`TokenStore::erase`](super::TokenStore::erase).
    pub(super) async fn erase(&self, user: &UserId) -> Result<bool, StoreError> {
        const ERASE: &str = "WITH waiting AS (DELETE FROM adsidecar_waiting WHERE user_id = $1) \
                             UPDATE adsidecar_grants SET record = NULL, generation = generation + 1, \
                             changed_at = clock_timestamp(), lease_owner = NULL, lease_until = NULL \
                             WHERE user_id = $1 AND record IS NOT NULL RETURNING generation";
        let name = user.as_str();
        let rows = self.query(ERASE, &[(&name, Type::TEXT)], OnDisconnect::Resend).await?;
        locked(&self.0.known).remove(user);
        Ok(!rows.is_empty())
    }

    /// See [`TokenStore::load`](super::TokenStore::load).
    pub(super) async fn load(&self, user: &UserId) -> Result<Option<Grant>, StoreError> {
        let ring = self.0.keyring.load_full();
        let row = self.row(user).await?.0;
        Ok(row.map(|row| row.open(&ring).0).transpose()?)
    }

    /// Reads what is stored for `user` now. [`changed_users`](Self::changed_users) then no longer reports this state.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn lookup(&self, user: &UserId) -> Result<Lookup, StoreError> {
        let ring = self.0.keyring.load_full();
        let (row, generation, since) = self.row(user).await?;
        let Some(row) = row else {
            locked(&self.0.known).remove(user);
            let since = since.and_then(|seconds| Timestamp::from_microsecond((seconds * 1e6) as i64).ok());
            return Ok(Lookup::Absent { generation: generation.unsigned_abs(), since });
        };
        let (grant, sealed) = row.open(&ring);
        self.remember(user, &row.json, generation, sealed);
        Ok(grant.map_or_else(Lookup::Unreadable, |grant| Lookup::Grant(Box::new(grant))))
    }

    /// Takes, or prolongs, the lease of `user` for 15 s, if the stored generation is `generation`.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn acquire_lease(&self, user: &UserId, generation: u64) -> Result<Lease, StoreError> {
        const LEASE: &str = "UPDATE adsidecar_grants AS g SET lease_owner = $2, \
                             lease_until = clock_timestamp() + interval '15 seconds' \
                             FROM (SELECT user_id, lease_owner FROM adsidecar_grants \
                             WHERE user_id = $1 FOR UPDATE) AS old \
                             WHERE g.user_id = old.user_id AND g.generation = $3 AND g.record IS NOT NULL \
                             AND (g.lease_until IS NULL OR g.lease_until < clock_timestamp() OR g.lease_owner = $2) \
                             RETURNING old.lease_owner IS NOT NULL AND old.lease_owner <> $2";
        let (name, owner, generation) = (user.as_str(), &self.0.owner, to_bigint(generation));
        let parameters: &Parameters<'_> = &[(&name, Type::TEXT), (owner, Type::TEXT), (&generation, Type::INT8)];
        let rows = self.query(LEASE, parameters, OnDisconnect::Resend).await?;
        if rows.is_empty() { Ok(Lease::Denied) } else { Ok(Lease::Acquired { interrupted: first_row(&rows, 0)? }) }
    }

    /// Releases the lease after a refresh that stored no change: a stored change releases it itself.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written. The lease then expires by itself.
    pub async fn release_lease(&self, user: &UserId) -> Result<(), StoreError> {
        const RELEASE: &str = "UPDATE adsidecar_grants SET lease_owner = NULL, lease_until = NULL \
                               WHERE user_id = $1 AND lease_owner = $2 RETURNING generation";
        let name = user.as_str();
        self.query(RELEASE, &[(&name, Type::TEXT), (&self.0.owner, Type::TEXT)], OnDisconnect::Resend).await.map(drop)
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
        let mut records = BTreeMap::new();
        for known in locked(&self.0.known).values() {
            *records.entry(known.sealed).or_default() += 1;
        }
        let (up, last_error) = locked(&self.0.health).clone();
        Health { up, last_error, recoveries: 0, records }
    }

    pub(super) async fn close(&self) -> Result<(), StoreError> {
        self.0.connection.close().await;
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
        health.0 = result.is_ok();
        if let Err(error) = &result {
            health.1 = Some(error.to_string());
        }
        result
    }

    /// Reads the grants of all users, and remembers each row.
    async fn read_all(&self, ring: &Keyring) -> Result<Users, StoreError> {
        let mut users = Users::new();
        self.for_each_row(|row| {
            let (grant, sealed) = row.open(ring);
            self.remember(&row.user, &row.json, row.generation, sealed);
            users.push((row.user, grant));
        })
        .await?;
        Ok(users)
    }

    /// Calls `visit` with every row that has a record, ordered by user id.
    async fn for_each_row(&self, mut visit: impl FnMut(StoredRow)) -> Result<(), StoreError> {
        let mut after = Some(String::new());
        while let Some(last) = after {
            let (rows, next) = self.page(&last).await?;
            rows.into_iter().for_each(&mut visit);
            after = next;
        }
        Ok(())
    }

    /// Reads the next page of rows with a record after the user id `after`, and returns where the page after it starts.
    /// A row whose key is not a user id was not written by us and is skipped.
    async fn page(&self, after: &str) -> Result<(Vec<StoredRow>, Option<String>), StoreError> {
        const ROWS: &str = "SELECT user_id, record, generation FROM adsidecar_grants \
                            WHERE record IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT $2";
        let rows = self.query(ROWS, &[(&after, Type::TEXT), (&PAGE_ROWS, Type::INT8)], OnDisconnect::Resend).await?;
        let mut page = Vec::new();
        for row in &rows {
            if let Ok(user) = column::<String>(row, 0)?.parse() {
                page.push(StoredRow { user, json: column(row, 1)?, generation: column(row, 2)? });
            }
        }
        Ok((page, rows.last().map(|last| column(last, 0)).transpose()?))
    }

    /// Reads the row of `user`: its record, its generation (0 if there is no row), and when it was changed, in seconds
    /// of the Unix epoch.
    async fn row(&self, user: &UserId) -> Result<(Option<StoredRow>, i64, Option<f64>), StoreError> {
        const ROW: &str = "SELECT record, generation, extract(epoch FROM changed_at)::float8 FROM adsidecar_grants \
                           WHERE user_id = $1";
        let name = user.as_str();
        let rows = self.query(ROW, &[(&name, Type::TEXT)], OnDisconnect::Resend).await?;
        let Some(row) = rows.first() else { return Ok((None, 0, None)) };
        let generation = column(row, 1)?;
        let stored = column::<Option<String>>(row, 0)?.map(|json| StoredRow { user: user.clone(), json, generation });
        Ok((stored, generation, Some(column(row, 2)?)))
    }

    /// Remembers a row as this process read or wrote it.
    fn remember(&self, user: &UserId, json: &str, generation: i64, sealed: Sealed) {
        locked(&self.0.known).insert(user.clone(), KnownRow { generation, digest: digest(json), sealed });
    }
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

fn digest(json: &str) -> Vec<u8> {
    Sha256::digest(json).to_vec()
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

/// Reads a column of the first row, for a statement that always returns one.
fn first_row<'a, T: FromSql<'a>>(rows: &'a [Row], at: usize) -> Result<T, StoreError> {
    let none = || StoreError::Postgres { reason: "a statement that always returns a row returned none".into() };
    column(rows.first().ok_or_else(none)?, at)
}

/// Locks the mutex and ignores poisoning: it guards plain data, which a panic leaves valid.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
