//! Storage of grants: on the local disk for one process (sled), or in a database that several processes share
//! ([`Postgres`]).
//!
//! [`TokenStore`] is the handle to either. A user's grant is stored as one encrypted JSON record ([`stored_grant`]);
//! [`keyring`] holds the Fernet keys. Pending grants, pending logins and notes are stored beside the grants. The two
//! backends live in `sled/` and `postgres/`; each describes there how it keeps its promises.
//!
//! This file is long because it documents every operation and every error that both backends share, in one place.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::domain::secret::Secret;
use crate::store::keyring::{Fingerprint, Keyring};
use crate::store::stored_grant::StoredGrantError;

mod backup;
mod files;
mod found_accounts;
pub mod imported_record;
pub mod keyring;
mod notices;
mod pending_grant;
mod postgres;
mod sled;
pub mod stored_grant;

pub use self::found_accounts::{
    AccountsChanged, AccountsPage, AccountsQuery, AccountsSaved, IndexedAccount, NewAccounts, StoredAccounts,
};
pub use self::notices::Notice;
pub use self::pending_grant::PendingGrant;
pub use self::postgres::{
    Changes, Claimed, ConnectionUrl, Content, DUE_AGAIN, FailedRefresh, LEASE, LOOKUP_ROWS, Lease, Lookup, PUBLISH,
    Pod, Poll, Position, Postgres, RECONNECT_PAUSE_MAX, SharedBrake, SharedLimit, ThrottleReport, ThrottleRow,
    UserOverview, due_at,
};
use self::sled::{ResealOutcome, Worker};
pub use self::stored_grant::Sealed;

/// Where grants are stored.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `store.path`: the directory of the sled database. The mirror, `<path>.copies/`, lies beside it.
    pub path: PathBuf,
    /// `store.postgres_url`, set if `store.kind` is `postgres`. Then everything is stored there and nothing at `path`.
    pub postgres: Option<ConnectionUrl>,
}

/// The store of all grants. A clone is another handle to the same store.
///
/// Each operation completes or fails within 2 s. Operations that read everything from PostgreSQL do so page by page,
/// and the limit holds for each page. A write that timed out may still be applied later; repeating the same
/// [`save`](Self::save) is always safe.
#[derive(Clone, Debug)]
pub enum TokenStore {
    /// A local directory, used by one process.
    Sled(Worker),
    /// A database that several processes share.
    Postgres(Postgres),
}

/// All users with their grants, ordered by user id. A record that yields no grant is kept as it is and is listed here
/// with its error.
pub type Users = Vec<(UserId, Result<Grant, StoredGrantError>)>;

/// What the store found when it was opened.
#[derive(Debug, Default)]
pub struct Opened {
    /// All known users.
    pub users: Users,
    /// Where the damaged database was moved to, if a new one had to be filled from the mirror.
    pub recovered: Option<PathBuf>,
    /// Number of users restored from the mirror because the database had lost them.
    pub restored: usize,
    /// Mirror files that were needed but cannot be opened. They are kept.
    pub unreadable_mirror_files: Vec<PathBuf>,
    /// Why sled could not be opened, if the volume is full. The users then come from the mirror, and nothing can be
    /// written until space is freed. Each operation tries again.
    pub degraded: Option<String>,
}

/// The state of the store, for `store_up` and the logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether the last operation reached the disk or the database server.
    pub up: bool,
    /// Why the most recent failed operation failed, even if later operations succeeded.
    pub last_error: Option<String>,
    /// How often a damaged database was replaced or refilled since the process started.
    pub recoveries: u64,
    /// Number of records, by what they are sealed with.
    pub records: BTreeMap<Sealed, usize>,
}

impl Health {
    /// Number of records sealed with a key of the keyring other than `first`.
    pub fn under_other_keys(&self, first: Fingerprint) -> usize {
        let others = self.records.iter().filter(|(sealed, _)| matches!(sealed, Sealed::By(key) if *key != first));
        others.map(|(_, count)| count).sum()
    }

    /// Number of records that yield no grant. They are kept.
    pub fn unreadable(&self) -> usize {
        self.records.iter().filter(|(sealed, _)| !matches!(sealed, Sealed::By(_))).map(|(_, count)| count).sum()
    }
}

/// What [`TokenStore::reseal`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reseal {
    /// Records that were sealed with another key and are now sealed with the first.
    pub resealed: usize,
    /// Records that no key opens. They are kept unchanged.
    pub unreadable: usize,
}

/// Why a store operation failed. The message names the remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has locked the store.
    #[error("another adsidecar uses {}: stop it, or set a different store.path for this one", .path.display())]
    Locked {
        /// `store.path`.
        path: PathBuf,
    },
    /// The store was sealed with a key that is not in the keyring. Nothing was written.
    #[error("{}", wrong_key(*.expected, .have))]
    WrongKey {
        /// The key that sealed last, if known.
        expected: Option<Fingerprint>,
        /// The keys of the keyring.
        have: Vec<Fingerprint>,
    },
    /// A running process could not open what a rotation seals. Nothing was changed.
    #[error(
        "these running adsidecars do not have the key {key}, and could not open what it encrypts: {pods}. Give all of \
         them the new key beside the old one (they take a key that is added to a file by themselves; one in the \
         environment needs a restart), then rotate again; nothing was changed"
    )]
    KeyMissing {
        /// The first key of the new keyring.
        key: Fingerprint,
        /// The processes, with the keys that they have.
        pods: String,
    },
    /// The stored generation is not the one that the change was based on, or no grant is stored.
    #[error("the stored grant has changed since it was read: read it again")]
    Conflict,
    /// The store's thread did not finish in time. A write may still be applied.
    #[error("the store did not answer in time: check its volume")]
    Timeout,
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
    /// A record is stored but yields no grant.
    #[error(transparent)]
    Unreadable(#[from] StoredGrantError),
    /// The operating system reported an error. A write is not stored, or not certain to be.
    #[error("store: {}: {source}; {}", .path.display(), files::remedy(.source, *.uid))]
    Io {
        /// The file or directory that was read or written.
        path: PathBuf,
        /// The effective user id of this process, if known.
        uid: Option<u32>,
        /// The operating system's error.
        source: io::Error,
    },
    /// The database is damaged. The next operation moves it aside and fills a new one from the mirror.
    #[error(
        "the database in {} is damaged ({reason}): the next operation replaces it from its mirror", .path.display()
    )]
    Damaged {
        /// `store.path`.
        path: PathBuf,
        /// sled's description of the damage.
        reason: String,
    },
    /// Another transaction holds the user's row in PostgreSQL for longer than a statement waits. Nothing was written.
    #[error(
        "PostgreSQL: another transaction holds a lock on the row: end it (pg_stat_activity shows it), then try again"
    )]
    RowLocked,
    /// PostgreSQL reported an error or did not answer in time. A write may still be applied.
    #[error("PostgreSQL: {reason}")]
    Postgres {
        /// What failed, and the remedy.
        reason: String,
    },
    /// The tables in PostgreSQL have a schema version that this program does not support. Nothing was written.
    #[error(
        "PostgreSQL: the tables have schema version {version}, which this adsidecar does not support: use the version \
         of adsidecar that created them, or a newer one"
    )]
    UnsupportedSchema {
        /// The schema version of the tables.
        version: String,
    },
    /// The directory holds a database that adsidecar did not create, or sled failed internally.
    #[error("the database in {} cannot be used: {reason}; give store.path a directory of its own", .path.display())]
    UnusableDatabase {
        /// `store.path`.
        path: PathBuf,
        /// sled's description of the failure.
        reason: String,
    },
}

fn wrong_key(expected: Option<Fingerprint>, have: &[Fingerprint]) -> String {
    let have: Vec<_> = have.iter().map(Fingerprint::to_string).collect();
    let wanted = match expected {
        Some(key) => format!("the key with fingerprint {key}"),
        None => "a key that is not configured".into(),
    };
    format!(
        "the store was sealed with {wanted}, but store.fernet_keys has {}: add the key it was sealed with, after the \
         new key if there is one; nothing was changed",
        have.join(", ")
    )
}

impl TokenStore {
    /// Opens the store, and creates it if it does not exist. Blocks until the store is open: call it before serving.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store is locked, was sealed with another key, or cannot be read or written.
    pub fn open(settings: &Settings, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        if let Some(url) = &settings.postgres {
            let (store, opened) = Postgres::open(url.clone(), keyring)?;
            return Ok((Self::Postgres(store), opened));
        }
        let (worker, opened) = Worker::start(settings.path.clone(), keyring)?;
        Ok((Self::Sled(worker), opened))
    }

    /// As [`open`](Self::open), but does not read the users of a shared store, which may be very many: they are read
    /// when they are needed. Its connection is used from then on. A store on the disk blocks until it is open.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub async fn open_to_serve(settings: &Settings, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        let Some(url) = &settings.postgres else { return Self::open(settings, keyring) };
        let store = Box::pin(Postgres::open_to_serve(url.clone(), keyring)).await?;
        Ok((Self::Postgres(store), Opened::default()))
    }

    /// The PostgreSQL store, which other processes may use too; `None` for sled.
    pub fn shared(&self) -> Option<&Postgres> {
        match self {
            Self::Sled(_) => None,
            Self::Postgres(store) => Some(store),
        }
    }

    /// Stores `grant` for `user` and returns the generation it is stored under. Returns once the grant is durable; with
    /// sled, once it is in the database and in the mirror.
    ///
    /// With `expected`, the grant is stored only if that generation is the stored one. Without it, whatever is stored
    /// is replaced; a shared store then raises the generation above every generation that the user ever had.
    ///
    /// # Errors
    ///
    /// [`StoreError::Conflict`] if the stored generation is not `expected`, unless `grant` itself is already stored;
    /// any other [`StoreError`] if the store cannot be read or written.
    pub async fn save(&self, user: &UserId, grant: &Grant, expected: Option<u64>) -> Result<u64, StoreError> {
        match self {
            Self::Sled(worker) => {
                let (user, grant, generation) = (user.clone(), grant.clone(), grant.generation);
                worker.call(move |engine| engine.save(&user, &grant, expected)).await.map(|()| generation)
            }
            Self::Postgres(store) => store.save(user, grant, expected).await,
        }
    }

    /// Deletes the grant of `user` together with its pending grants and found accounts, and returns once that is
    /// durable. Returns `false` if there was no grant.
    ///
    /// Old ciphertext remains in sled's log until it is overwritten, in databases that were moved aside, and in
    /// PostgreSQL's write-ahead log and backups. Only destroying the key makes it worthless.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written. Repeating the call is safe.
    pub async fn erase(&self, user: &UserId) -> Result<bool, StoreError> {
        match self {
            Self::Sled(worker) => {
                let user = user.clone();
                worker
                    .call(move |engine| {
                        let erased = engine.erase(&user)?;
                        engine.erase_accounts(&user).map(|()| erased)
                    })
                    .await
            }
            Self::Postgres(store) => store.erase(user).await,
        }
    }

    /// Reads the grant of `user`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unreadable`] if the record yields no grant; any other [`StoreError`] if the store cannot be read.
    pub async fn load(&self, user: &UserId) -> Result<Option<Grant>, StoreError> {
        match self {
            Self::Sled(worker) => {
                let user = user.clone();
                worker.call(move |engine| engine.load(&user)).await
            }
            Self::Postgres(store) => store.load(user).await,
        }
    }

    /// Reads all users with their grants.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read. A single unreadable record is no error: it is listed with its own.
    pub async fn scan(&self) -> Result<Users, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.scan()).await,
            Self::Postgres(store) => store.scan().await,
        }
    }

    /// Reads the records as they are stored. `store dump` prints them, and
    /// [`StoredGrant::import`](crate::store::stored_grant::StoredGrant::import) reads them.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn dump(&self) -> Result<BTreeMap<UserId, serde_json::Value>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.dump()).await,
            Self::Postgres(store) => store.dump().await,
        }
    }

    /// Stores a pending grant. Callers do this before anything else, because the authorization code is already spent.
    /// [`erase`](Self::erase) of the same user deletes it.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn save_pending_grant(&self, pending: &PendingGrant) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => {
                let pending = pending.clone();
                worker.call(move |engine| engine.save_pending_grant(&pending)).await
            }
            Self::Postgres(store) => store.save_pending_grant(pending).await,
        }
    }

    /// Deletes the pending grant with this id, if there is one.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn delete_pending_grant(&self, id: &str) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => {
                let id = id.to_owned();
                worker.call(move |engine| engine.delete_pending_grant(&id)).await
            }
            Self::Postgres(store) => store.delete_pending_grant(id).await,
        }
    }

    /// Returns the pending grants, those that the previous process left included. A shared store returns only those
    /// that no process has claimed, and claims each of them for this process for one minute.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read. A pending grant that cannot be opened is logged and kept.
    pub async fn claim_pending_grants(&self) -> Result<Vec<PendingGrant>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.pending_grants()).await,
            Self::Postgres(store) => store.claim_pending_grants().await,
        }
    }

    /// Stores all pending logins, sealed, as one text that replaces the previous one. A shared store ignores this and
    /// stores each login [on its own](Postgres::save_pending_login).
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn save_pending_logins(&self, plain: Secret) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.save_pending_logins(plain.expose())).await,
            Self::Postgres(_) => Ok(()),
        }
    }

    /// Returns the text that [`save_pending_logins`](Self::save_pending_logins) stored last; always `None` for a shared
    /// store.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn pending_logins(&self) -> Result<Option<Secret>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| Ok(engine.pending_logins()?.map(Secret::new))).await,
            Self::Postgres(_) => Ok(None),
        }
    }

    /// Reads a note: a small fact that outlives users and restarts.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn note(&self, key: &'static str) -> Result<Option<String>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.note(key)).await,
            Self::Postgres(store) => store.note(key).await,
        }
    }

    /// Writes a note. Notes are not encrypted: never store a secret in one.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn set_note(&self, key: &'static str, value: impl Into<String>) -> Result<(), StoreError> {
        let value = value.into();
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.set_note(key, &value)).await,
            Self::Postgres(store) => store.set_note(key, &value).await,
        }
    }

    /// Reads the journal of refreshes of a local directory: for each user the generation whose refresh began last and
    /// has not ended. `None` if there is none yet; a shared store has leases instead.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn journal(&self) -> Result<Option<BTreeMap<UserId, u64>>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.journal()).await,
            Self::Postgres(_) => Ok(None),
        }
    }

    /// Adds to the journal that refreshes of these generations have begun, or have ended (`None`). Returns its length
    /// in bytes.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn append_journal(&self, changes: Vec<(UserId, Option<u64>)>) -> Result<u64, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.append_journal(&changes)).await,
            Self::Postgres(_) => Ok(0),
        }
    }

    /// Makes this the whole journal.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn replace_journal(&self, journal: BTreeMap<UserId, u64>) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.replace_journal(&journal)).await,
            Self::Postgres(_) => Ok(()),
        }
    }

    /// Replaces the keyring: its first key seals from now on. Stored records keep their seal until
    /// [`reseal`](Self::reseal).
    ///
    /// # Errors
    ///
    /// [`StoreError::WrongKey`] if `keyring` lacks the key that sealed last; then nothing changes. Any other
    /// [`StoreError`] if the store cannot be read or written.
    pub async fn rekey(&self, keyring: Arc<Keyring>) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.rekey(keyring)).await,
            Self::Postgres(store) => store.rekey(keyring).await,
        }
    }

    /// Takes keys into use that are added to the present ones: they open records from now on, and the present first key
    /// goes on sealing.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read or written.
    pub async fn add_keys(&self, keyring: Arc<Keyring>) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.rekey(keyring)).await,
            Self::Postgres(store) => store.add_keys(&keyring).await,
        }
    }

    /// Fails if a running process could not open what the key `first` seals; ask before [`rekey`](Self::rekey) makes it
    /// the first one. A local directory has one process.
    ///
    /// # Errors
    ///
    /// [`StoreError::KeyMissing`], which names the processes; any other [`StoreError`] if the store cannot be read.
    pub async fn require_key(&self, first: Fingerprint) -> Result<(), StoreError> {
        match self {
            Self::Sled(_) => Ok(()),
            Self::Postgres(store) => store.require_key(first).await,
        }
    }

    /// Seals every record, and its mirror file, with the first key. After an interruption the next call continues with
    /// the records that are left. Other operations run in between.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read or written.
    pub async fn reseal(&self) -> Result<Reseal, StoreError> {
        let worker = match self {
            Self::Sled(worker) => worker,
            Self::Postgres(store) => return store.reseal().await,
        };
        let mut done = Reseal::default();
        for user in worker.call(|engine| engine.users()).await? {
            match worker.call(move |engine| engine.reseal(&user)).await? {
                ResealOutcome::Resealed => done.resealed += 1,
                ResealOutcome::Unreadable => done.unreadable += 1,
                ResealOutcome::NothingToDo => {}
            }
        }
        worker.call(|engine| engine.reseal_pending()).await?;
        Ok(done)
    }

    /// Counts the records of a shared store for [`health`](Self::health), which otherwise says what was counted last.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn count_records(&self) -> Result<(), StoreError> {
        match self {
            Self::Sled(_) => Ok(()),
            Self::Postgres(store) => store.count_records().await,
        }
    }

    /// Returns the state of the store without waiting for it.
    pub fn health(&self) -> Health {
        match self {
            Self::Sled(worker) => worker.health(),
            Self::Postgres(store) => store.health(),
        }
    }

    /// Finishes queued operations and releases the directory or the connection. Every handle fails with
    /// [`StoreError::Closed`] from then on; closing again does nothing.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] if the store's thread does not finish in time.
    pub async fn close(&self) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.close().await,
            Self::Postgres(store) => store.close().await,
        }
    }
}

#[cfg(test)]
mod tests;
