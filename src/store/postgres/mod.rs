//! Grants in a PostgreSQL that several processes share.
//!
//! The database is what counts: each process has a picture of it in memory, which it compares every second, and looks
//! at the row itself before it asks for a token. Nothing is locked while Login with Amazon is asked; instead:
//!
//! - A user's row carries a *generation*, which rises with each change, over logouts too (the row stays, without its
//!   record). A write that was based on an older one finds no row and is [`Conflict`](StoreError::Conflict).
//! - Who is about to ask for a token takes the row's *lease* first, for 15 s by the database's clock. Whoever dies with
//!   it delays the others by that.
//!
//! Long because each operation stands beside its statement: what is atomic is seen in one place.
//!
//! Whoever can write to the database can delete, and can put back older records, but cannot make one: see
//! [`StoredGrant`](crate::store::stored_grant::StoredGrant).

mod connection_url;
mod changes;
mod connection;
mod tls;
mod maintenance;
mod pending;

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
use changes::Compared;
use connection::{Again, Parameters, PgConnection};
pub use connection_url::ConnectionUrl;

const SCHEMA: &str = include_str!("schema.sql");

/// Rows that one statement reads, so that each answers well within its deadline.
const PAGE: i64 = 500;
/// How often a write is tried that others overtake.
const TRIES: usize = 10;
/// The note that holds the version of the tables, and the version that this code knows.
const SCHEMA_NOTE: &str = "schema";
const SCHEMA_VERSION: &str = "1";
/// The note that holds the fingerprint of the key that seals.
const KEY: &str = "key";

/// A handle to the database. Cloning gives another one.
#[derive(Clone)]
pub struct Postgres(Arc<Inner>);

struct Inner {
    line: PgConnection,
    keyring: ArcSwap<Keyring>,
    /// Who we are in leases.
    owner: String,
    /// Rows with a record, as this process knows them.
    known: Mutex<BTreeMap<UserId, Known>>,
    compared: Mutex<Compared>,
    /// Whether the last operation went well, and why the last failing one did not.
    health: Mutex<(bool, Option<String>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    generation: i64,
    digest: Vec<u8>,
    sealed: Sealed,
}

/// What is stored for a user.
#[derive(Debug)]
pub enum Lookup {
    /// A grant.
    Grant(Box<Grant>),
    /// None: logged out under this generation, or never there (0).
    Absent {
        /// The generation of the logout.
        generation: u64,
        /// When that was, by the database's clock.
        since: Option<Timestamp>,
    },
    /// A record that yields no grant.
    Unreadable(StoredGrantError),
}

/// Whether this process may ask for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// It may, and nobody else does.
    Acquired {
        /// Somebody had asked for the same generation before, and never said what came of it.
        interrupted: bool,
    },
    /// Somebody else asks, or the grant is another by now.
    Denied,
}

/// A row with a record.
struct StoredRow {
    user: UserId,
    json: String,
    generation: i64,
}

impl Postgres {
    /// Connects, makes the tables where they are missing, checks the key, and reads everything. Blocks until that is
    /// done.
    pub(super) fn open(address: ConnectionUrl, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        let open = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| StoreError::Postgres { reason: error.to_string() })?;
            runtime.block_on(async move {
                let store = Self::new(address, keyring);
                let opened = store.attach().await?;
                // The connection belongs to this runtime, which ends; the first operation makes another.
                store.0.line.rest().await;
                Ok((store, opened))
            })
        };
        // On a thread of its own: commands call this without a runtime, and serve within one.
        let opening = std::thread::Builder::new().name("store".into()).spawn(open);
        let opened = opening.map_err(|error| StoreError::Postgres { reason: error.to_string() })?.join();
        opened.unwrap_or_else(|_| Err(StoreError::Postgres { reason: "it panicked while it opened".into() }))
    }

    fn new(address: ConnectionUrl, keyring: Arc<Keyring>) -> Self {
        // Two processes with the same name would take each other's leases for their own.
        let random = getrandom::u64().and_then(|one| Ok((one, getrandom::u64()?)));
        let (one, other) = random.expect("the operating system gives random bytes");
        Self(Arc::new(Inner {
            line: PgConnection::new(address),
            keyring: ArcSwap::new(keyring),
            owner: format!("{one:016x}{other:016x}"),
            known: Mutex::default(),
            compared: Mutex::default(),
            health: Mutex::new((true, None)),
        }))
    }

    async fn attach(&self) -> Result<Opened, StoreError> {
        self.make_tables().await?;
        match self.note(SCHEMA_NOTE).await? {
            None => self.set_note(SCHEMA_NOTE, SCHEMA_VERSION).await?,
            Some(version) if version == SCHEMA_VERSION => {}
            Some(version) => return Err(StoreError::UnsupportedSchema { version }),
        }
        let found = self.note(KEY).await?;
        let (ring, key) =
            (self.0.keyring.load_full(), found.as_deref().and_then(|key| key.parse::<Fingerprint>().ok()));
        if key.is_some_and(|key| !ring.fingerprints().contains(&key)) {
            return Err(self.wrong_key(key));
        }
        let users = self.read_all(&ring).await?;
        let strange = |(_, grant): &(UserId, Result<Grant, _>)| matches!(grant, Err(StoredGrantError::Undecryptable));
        if key.is_none() && !users.is_empty() && users.iter().all(strange) {
            return Err(self.wrong_key(None));
        }
        self.set_key(found.as_deref(), &ring).await?;
        Ok(Opened { users, ..Opened::default() })
    }

    /// Only where one is missing: a role that may not make tables is refused even where there is nothing to make.
    async fn make_tables(&self) -> Result<(), StoreError> {
        const THERE: &str = "SELECT to_regclass('adsidecar_grants') IS NOT NULL AND to_regclass('adsidecar_logins') IS NOT NULL \
                             AND to_regclass('adsidecar_waiting') IS NOT NULL AND to_regclass('adsidecar_notes') IS NOT NULL";
        for _ in 0..TRIES {
            let rows = self.ask(THERE, &[], Again::Yes).await?;
            if first(&rows, 0)? {
                return Ok(());
            }
            self.0.line.make(SCHEMA).await?;
        }
        Err(StoreError::Postgres { reason: "its tables are not where its search_path leads".into() })
    }

    /// Writes down which key seals from now on, unless somebody else did so since `found` was read, with a key that is
    /// not ours.
    async fn set_key(&self, found: Option<&str>, ring: &Keyring) -> Result<(), StoreError> {
        const SET: &str = "INSERT INTO adsidecar_notes AS n (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE \
                           SET value = excluded.value WHERE n.value = $3 RETURNING value";
        let (first, found) = (ring.first().to_string(), found.unwrap_or_default());
        if first == found {
            return Ok(());
        }
        let parameters: &Parameters<'_> = &[(&KEY, Type::TEXT), (&first, Type::TEXT), (&found, Type::TEXT)];
        if self.ask(SET, parameters, Again::Yes).await?.is_empty() {
            let key = self.note(KEY).await?.and_then(|key| key.parse().ok());
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
            Some(expected) => self.replace(user, grant, expected).await,
            None => self.put(user, grant).await,
        }
    }

    async fn replace(&self, user: &UserId, grant: &Grant, expected: u64) -> Result<u64, StoreError> {
        const REPLACE: &str = "UPDATE adsidecar_grants SET record = $2, generation = $3, changed_at = clock_timestamp(), \
                               lease_owner = NULL, lease_until = NULL \
                               WHERE user_id = $1 AND generation = $4 AND record IS NOT NULL RETURNING generation";
        let ring = self.0.keyring.load_full();
        let (name, generation) = (user.as_str(), number(grant.generation));
        let (json, expected) = (json(grant, user, &ring), number(expected));
        let parameters: &Parameters<'_> =
            &[(&name, Type::TEXT), (&json, Type::TEXT), (&generation, Type::INT8), (&expected, Type::INT8)];
        let done = !self.ask(REPLACE, parameters, Again::Yes).await?.is_empty();
        let is_there = |held: StoredRow| is_same_grant(&held.record(), user, grant, &ring);
        if !done && !self.row(user).await?.0.is_some_and(is_there) {
            return Err(StoreError::Conflict);
        }
        self.learn(user, &json, generation, Sealed::By(ring.first()));
        Ok(grant.generation)
    }

    async fn put(&self, user: &UserId, grant: &Grant) -> Result<u64, StoreError> {
        const PUT: &str = "INSERT INTO adsidecar_grants AS g (user_id, record, generation, changed_at) \
                           VALUES ($1, $2, $3, clock_timestamp()) ON CONFLICT (user_id) DO UPDATE \
                           SET record = excluded.record, generation = excluded.generation, \
                           changed_at = excluded.changed_at, lease_owner = NULL, lease_until = NULL \
                           WHERE g.generation = $4 RETURNING g.generation";
        let ring = self.0.keyring.load_full();
        let name = user.as_str();
        for _ in 0..TRIES {
            let stored = self.row(user).await?.1;
            let generation = stored.saturating_add(1).max(number(grant.generation));
            let raised = Grant { generation: generation.unsigned_abs(), ..grant.clone() };
            let json = json(&raised, user, &ring);
            let parameters: &Parameters<'_> =
                &[(&name, Type::TEXT), (&json, Type::TEXT), (&generation, Type::INT8), (&stored, Type::INT8)];
            if !self.ask(PUT, parameters, Again::Yes).await?.is_empty() {
                self.learn(user, &json, generation, Sealed::By(ring.first()));
                return Ok(raised.generation);
            }
        }
        Err(StoreError::Conflict)
    }

    pub(super) async fn erase(&self, user: &UserId) -> Result<bool, StoreError> {
        const ERASE: &str = "WITH waiting AS (DELETE FROM adsidecar_waiting WHERE user_id = $1) \
                             UPDATE adsidecar_grants SET record = NULL, generation = generation + 1, \
                             changed_at = clock_timestamp(), lease_owner = NULL, lease_until = NULL \
                             WHERE user_id = $1 AND record IS NOT NULL RETURNING generation";
        let name = user.as_str();
        let rows = self.ask(ERASE, &[(&name, Type::TEXT)], Again::Yes).await?;
        locked(&self.0.known).remove(user);
        Ok(!rows.is_empty())
    }

    pub(super) async fn load(&self, user: &UserId) -> Result<Option<Grant>, StoreError> {
        let ring = self.0.keyring.load_full();
        let held = self.row(user).await?.0;
        Ok(held.map(|held| held.open(&ring).0).transpose()?)
    }

    /// What is stored for `user` right now. From then on it is known, and no [change](Self::changes).
    pub async fn lookup(&self, user: &UserId) -> Result<Lookup, StoreError> {
        let ring = self.0.keyring.load_full();
        let (held, generation, since) = self.row(user).await?;
        let Some(held) = held else {
            locked(&self.0.known).remove(user);
            let since = since.and_then(|seconds| Timestamp::from_microsecond((seconds * 1e6) as i64).ok());
            return Ok(Lookup::Absent { generation: generation.unsigned_abs(), since });
        };
        let (grant, sealed) = held.open(&ring);
        self.learn(user, &held.json, generation, sealed);
        Ok(grant.map_or_else(Lookup::Unreadable, |grant| Lookup::Grant(Box::new(grant))))
    }

    /// Takes the right to ask for a token with the grant of this generation, or prolongs it.
    pub async fn acquire_lease(&self, user: &UserId, generation: u64) -> Result<Lease, StoreError> {
        const LEASE: &str = "UPDATE adsidecar_grants AS g SET lease_owner = $2, \
                             lease_until = clock_timestamp() + interval '15 seconds' \
                             FROM (SELECT user_id, lease_owner FROM adsidecar_grants WHERE user_id = $1 FOR UPDATE) AS old \
                             WHERE g.user_id = old.user_id AND g.generation = $3 AND g.record IS NOT NULL \
                             AND (g.lease_until IS NULL OR g.lease_until < clock_timestamp() OR g.lease_owner = $2) \
                             RETURNING old.lease_owner IS NOT NULL AND old.lease_owner <> $2";
        let (name, owner, generation) = (user.as_str(), &self.0.owner, number(generation));
        let parameters: &Parameters<'_> = &[(&name, Type::TEXT), (owner, Type::TEXT), (&generation, Type::INT8)];
        let rows = self.ask(LEASE, parameters, Again::Yes).await?;
        if rows.is_empty() { Ok(Lease::Denied) } else { Ok(Lease::Acquired { interrupted: first(&rows, 0)? }) }
    }

    /// Gives the right back, where no change was stored.
    pub async fn release_lease(&self, user: &UserId) -> Result<(), StoreError> {
        const RELEASE: &str = "UPDATE adsidecar_grants SET lease_owner = NULL, lease_until = NULL \
                               WHERE user_id = $1 AND lease_owner = $2 RETURNING generation";
        let name = user.as_str();
        self.ask(RELEASE, &[(&name, Type::TEXT), (&self.0.owner, Type::TEXT)], Again::Yes).await.map(drop)
    }

    pub(super) async fn note(&self, name: &str) -> Result<Option<String>, StoreError> {
        const NOTE: &str = "SELECT value FROM adsidecar_notes WHERE name = $1";
        let rows = self.ask(NOTE, &[(&name, Type::TEXT)], Again::Yes).await?;
        rows.first().map(|row| column(row, 0)).transpose()
    }

    pub(super) async fn set_note(&self, name: &str, value: &str) -> Result<(), StoreError> {
        const SET: &str = "INSERT INTO adsidecar_notes (name, value) VALUES ($1, $2) \
                           ON CONFLICT (name) DO UPDATE SET value = excluded.value RETURNING value";
        self.ask(SET, &[(&name, Type::TEXT), (&value, Type::TEXT)], Again::Yes).await.map(drop)
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
        self.0.line.close().await;
        Ok(())
    }

    async fn ask(&self, statement: &str, parameters: &Parameters<'_>, again: Again) -> Result<Vec<Row>, StoreError> {
        // Boxed, so that whoever may ask stays small.
        let result = Box::pin(self.0.line.ask(statement, parameters, again)).await;
        let mut health = locked(&self.0.health);
        health.0 = result.is_ok();
        if let Err(error) = &result {
            health.1 = Some(error.to_string());
        }
        result
    }

    /// All users' grants, each of which is known from then on.
    async fn read_all(&self, ring: &Keyring) -> Result<Users, StoreError> {
        let mut users = Users::new();
        self.each(|held| {
            let (grant, sealed) = held.open(ring);
            self.learn(&held.user, &held.json, held.generation, sealed);
            users.push((held.user, grant));
        })
        .await?;
        Ok(users)
    }

    /// Gives every row with a record away, one after the other.
    async fn each(&self, mut take: impl FnMut(StoredRow)) -> Result<(), StoreError> {
        let mut after = Some(String::new());
        while let Some(last) = after {
            let (rows, next) = self.page(&last).await?;
            rows.into_iter().for_each(&mut take);
            after = next;
        }
        Ok(())
    }

    /// Some rows with a record, and where the next ones begin. A row whose name is no user id was not written by us,
    /// and is left alone.
    async fn page(&self, after: &str) -> Result<(Vec<StoredRow>, Option<String>), StoreError> {
        const ROWS: &str = "SELECT user_id, record, generation FROM adsidecar_grants \
                            WHERE record IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT $2";
        let rows = self.ask(ROWS, &[(&after, Type::TEXT), (&PAGE, Type::INT8)], Again::Yes).await?;
        let mut page = Vec::new();
        for row in &rows {
            if let Ok(user) = column::<String>(row, 0)?.parse() {
                page.push(StoredRow { user, json: column(row, 1)?, generation: column(row, 2)? });
            }
        }
        Ok((page, rows.last().map(|last| column(last, 0)).transpose()?))
    }

    /// The row of `user`, its generation (0: there is none), and when it was changed.
    async fn row(&self, user: &UserId) -> Result<(Option<StoredRow>, i64, Option<f64>), StoreError> {
        const ROW: &str = "SELECT record, generation, extract(epoch FROM changed_at)::float8 FROM adsidecar_grants \
                           WHERE user_id = $1";
        let name = user.as_str();
        let rows = self.ask(ROW, &[(&name, Type::TEXT)], Again::Yes).await?;
        let Some(row) = rows.first() else { return Ok((None, 0, None)) };
        let generation = column(row, 1)?;
        let held = column::<Option<String>>(row, 0)?.map(|json| StoredRow { user: user.clone(), json, generation });
        Ok((held, generation, Some(column(row, 2)?)))
    }

    fn learn(&self, user: &UserId, json: &str, generation: i64, sealed: Sealed) {
        locked(&self.0.known).insert(user.clone(), Known { generation, digest: digest(json), sealed });
    }
}

impl StoredRow {
    /// The record, whose own generation, which is under its seal, has to be the row's.
    fn record(&self) -> Result<StoredGrant, StoredGrantError> {
        let record = StoredGrant::parse(self.json.as_bytes())?;
        if number(record.generation()) == self.generation { Ok(record) } else { Err(StoredGrantError::Tampered) }
    }

    /// The grant in it, and what seals it.
    fn open(&self, ring: &Keyring) -> (Result<Grant, StoredGrantError>, Sealed) {
        open_record(&self.user, &self.record(), ring)
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("health", &self.health()).finish_non_exhaustive()
    }
}

fn json(grant: &Grant, user: &UserId, ring: &Keyring) -> String {
    String::from_utf8(StoredGrant::seal(grant, user, ring).to_json()).expect("JSON is UTF-8")
}

fn digest(json: &str) -> Vec<u8> {
    Sha256::digest(json).to_vec()
}

/// PostgreSQL has no unsigned numbers; what it has lasts for ever.
fn number(generation: u64) -> i64 {
    i64::try_from(generation).unwrap_or(i64::MAX - 1)
}

fn column<'a, T: FromSql<'a>>(row: &'a Row, at: usize) -> Result<T, StoreError> {
    let other = |error: tokio_postgres::Error| StoreError::Postgres {
        reason: format!("its tables are not those of this version: {error}"),
    };
    row.try_get(at).map_err(other)
}

/// A column of the first of rows that a statement always returns.
fn first<'a, T: FromSql<'a>>(rows: &'a [Row], at: usize) -> Result<T, StoreError> {
    let none = || StoreError::Postgres { reason: "it returned no row where there is always one".into() };
    column(rows.first().ok_or_else(none)?, at)
}

/// A panic while it was held left plain data, so a poisoned lock is as good as any.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
