//! Grants on disk, for one process (sled), or in a database that several share ([`Postgres`]). What follows is about sled.
//!
//! Two stores in one: a sled database, and beside it, in `<path>.copies/`, one small file per user. Every acknowledged
//! write is in both, on disk. sled 0.34 has lost and refused whole databases; the copies hold what cannot be had again,
//! the refresh tokens.
//!
//! # Which of the two is right
//!
//! Commits are numbered. A save commits to sled first and then writes the copy with the commit's number; an erasure
//! deletes the copy, commits to sled, and then writes the number down beside the copies. So whatever instant a process
//! dies at, sled's number is at least that of the copies, and each copy has its record: sled is right, and copies that
//! were not written any more are written at the next start.
//!
//! Where sled's number is *lower*, or sled does not open, it has lost something: a bit that flips in its log ends the
//! log there, without a word. Then it is moved aside, never deleted, and a new one is filled from the copies. A logout
//! that was acknowledged has deleted its copy, on disk, so nothing brings its grant back: not the copies, which do not
//! have it, and not an older state of sled, whose number is too low.
//!
//! A record that is older than its copy was put back past this store, and the copy's is used.
//!
//! # What is under way
//!
//! Grants that are exchanged and not in use yet lie beside the copies, in a file each; logins that have begun lie there
//! together, in one. Both are sealed as a whole, and neither is in the database: they are over within ten minutes.
//!
//! Long because every operation and every error that both kinds of store share has its meaning written down here, once.
//!
//! # The key
//!
//! `<path>.copies/key` holds the fingerprint of the key that sealed last, twice. It is compared before sled is opened, because
//! sled writes to its directory whenever it opens: with a wrong key nothing is touched. A fingerprint, and not a sealed
//! text, so that the error can name the key that is wanted.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::domain::secret::Secret;
use crate::store::keyring::{Fingerprint, Keyring};
use crate::store::stored_grant::StoredGrantError;

mod mirror;
pub mod keyring;
pub mod stored_grant;
mod database;
mod engine;
mod files;
mod postgres;
mod waiting;
mod worker;

use engine::Resealed;
pub use postgres::{Address, Lease, Postgres, Stored};
pub use waiting::Waiting;
use worker::Worker;

/// Where grants are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `store.path`: the directory of the sled database. Beside it lie `<path>.copies/`, the second copy per user.
    pub path: PathBuf,
    /// `store.postgres_url`, where `store.kind` is `postgres`: all is there, and nothing at the path.
    pub postgres: Option<Address>,
}

/// The store of all grants. Cloning gives another handle to the same store.
///
/// Each operation answers within 2 s or fails (what reads everything from PostgreSQL does so page by page, each of which
/// answers in that time). A write that timed out may still be done later; repeating the same [`save`](Self::save) is always right.
#[derive(Clone, Debug)]
pub enum TokenStore {
    /// A directory of its own, for one process.
    Sled(Worker),
    /// A database that several processes share.
    Postgres(Postgres),
}

/// All users, in the order of their names. A record that yields no grant is kept as it is, and said to be so here.
pub type Users = Vec<(UserId, Result<Grant, StoredGrantError>)>;

/// What was found when the store was opened.
#[derive(Debug, Default)]
pub struct Opened {
    /// Everybody who is known.
    pub users: Users,
    /// The database was damaged: it was moved here, and a new one was filled from the copies.
    pub recovered: Option<PathBuf>,
    /// How many users came from copies because the database did not have them.
    pub restored: usize,
    /// Mirror files that were needed and do not open. They are kept.
    pub unusable_copies: Vec<PathBuf>,
    /// The volume is full, so that sled does not open: the users come from the copies, and nothing can be written until
    /// there is space. Each operation tries again. Holds the reason.
    pub degraded: Option<String>,
}

/// How the store does, for `store_up` and the logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether the last operation reached the disk.
    pub up: bool,
    /// Why the last failing operation failed, even if others went well since.
    pub last_error: Option<String>,
    /// How often a damaged database was replaced, or filled again, since the start.
    pub recoveries: u64,
    /// How many records there are of each kind.
    pub records: BTreeMap<Sealed, usize>,
}

impl Health {
    /// Records that are sealed with another key of the ring than `first`.
    pub fn under_other_keys(&self, first: Fingerprint) -> usize {
        let others = self.records.iter().filter(|(sealed, _)| matches!(sealed, Sealed::By(key) if *key != first));
        others.map(|(_, count)| count).sum()
    }

    /// Records that yield no grant. They are kept.
    pub fn unreadable(&self) -> usize {
        self.records.iter().filter(|(sealed, _)| !matches!(sealed, Sealed::By(_))).map(|(_, count)| count).sum()
    }
}

/// What a record is sealed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sealed {
    /// This key of the ring.
    By(Fingerprint),
    /// A key that is not in the ring.
    ByUnknownKey,
    /// It is malformed, or its seal does not fit.
    Damaged,
}

impl std::fmt::Display for Sealed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::By(key) => key.fmt(f),
            Self::ByUnknownKey => f.write_str("unknown"),
            Self::Damaged => f.write_str("damaged"),
        }
    }
}

/// What [`TokenStore::reseal`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reseal {
    /// Records that were sealed with another key and are now sealed with the first.
    pub resealed: usize,
    /// Records that no key opens; they are kept as they are.
    pub unreadable: usize,
}

/// Why the store did not do as asked. Names the cure where there is one.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("another adsidecar holds {}: stop it, or give this one a store.path of its own", .path.display())]
    Held {
        /// `store.path`.
        path: PathBuf,
    },
    /// What is stored was sealed with a key that is not in the ring. Nothing was written.
    #[error("{}", wrong_key(*.expected, .have))]
    WrongKey {
        /// The key that sealed last, where that is known.
        expected: Option<Fingerprint>,
        /// The keys of the ring.
        have: Vec<Fingerprint>,
    },
    /// Another generation is stored than the caller based its change on, or none.
    #[error("the stored grant was changed meanwhile: read it again")]
    Conflict,
    /// No answer in time. A write may still be done.
    #[error("the store did not answer in time: check its volume")]
    Timeout,
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
    /// The record is there and yields no grant.
    #[error(transparent)]
    Record(#[from] StoredGrantError),
    /// The operating system refused. A write is not stored, or not for sure.
    #[error("store: {}: {source}; {}", .path.display(), files::cure(.source, *.uid))]
    Io {
        /// What was being read or written.
        path: PathBuf,
        /// Whom this process runs as, where that is known.
        uid: Option<u32>,
        /// What was said.
        source: io::Error,
    },
    /// The database is damaged. The next operation moves it aside and fills a new one from the copies.
    #[error("the database in {} is damaged ({reason}): it is replaced from its copies at the next operation", .path.display())]
    Damaged {
        /// `store.path`.
        path: PathBuf,
        /// What sled said.
        reason: String,
    },
    /// PostgreSQL did not do as asked, or did not say so in time. A write may still be done.
    #[error("PostgreSQL: {reason}")]
    Postgres {
        /// What was said, and its cure.
        reason: String,
    },
    /// The tables in PostgreSQL are those of another version of adsidecar. Nothing was written.
    #[error(
        "PostgreSQL: its tables are of version {version}, which this adsidecar does not know: use the adsidecar that made them, or a newer one"
    )]
    Schema {
        /// Which.
        version: String,
    },
    /// The directory holds a database that is not ours, or the engine failed in itself.
    #[error("the database in {} cannot be used: {reason}; give store.path a directory of its own", .path.display())]
    Engine {
        /// `store.path`.
        path: PathBuf,
        /// What sled said.
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
        "the store was sealed with {wanted}, and store.fernet_keys has {}: add the key it was sealed with, behind the \
         new one if there is a new one; nothing was changed",
        have.join(", ")
    )
}

impl TokenStore {
    /// Opens the store, or makes it. Blocks until that is done: call it before serving.
    pub fn open(settings: &Settings, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        if let Some(address) = &settings.postgres {
            let (store, opened) = Postgres::open(address.clone(), keyring)?;
            return Ok((Self::Postgres(store), opened));
        }
        let (worker, opened) = Worker::start(settings.path.clone(), keyring)?;
        Ok((Self::Sled(worker), opened))
    }

    /// The database that other processes work on too, where it is one.
    pub fn shared(&self) -> Option<&Postgres> {
        match self {
            Self::Sled(_) => None,
            Self::Postgres(store) => Some(store),
        }
    }

    /// Stores `grant` for `user`, and gives the generation under which it is stored. Returns once it is on disk, in sled's
    /// case twice.
    ///
    /// With `expected`, only where that generation is the stored one, or where `grant` itself is stored already;
    /// otherwise [`StoreError::Conflict`]. Without, over whatever is there; in a shared store the generation is then raised
    /// above all that the user ever had.
    pub async fn save(&self, user: &UserId, grant: &Grant, expected: Option<u64>) -> Result<u64, StoreError> {
        match self {
            Self::Sled(worker) => {
                let (user, grant, generation) = (user.clone(), grant.clone(), grant.generation);
                worker.call(move |engine| engine.save(&user, &grant, expected)).await.map(|()| generation)
            }
            Self::Postgres(store) => store.save(user, grant, expected).await,
        }
    }

    /// Deletes the grant of `user`, and returns once that is on disk; `false` where there was none. Old ciphertext stays
    /// in sled's log until that is overwritten, in databases that were moved aside, and in PostgreSQL's log and backups: only
    /// throwing the key away makes it worthless.
    pub async fn erase(&self, user: &UserId) -> Result<bool, StoreError> {
        match self {
            Self::Sled(worker) => {
                let user = user.clone();
                worker.call(move |engine| engine.erase(&user)).await
            }
            Self::Postgres(store) => store.erase(user).await,
        }
    }

    /// The grant of `user`.
    pub async fn load(&self, user: &UserId) -> Result<Option<Grant>, StoreError> {
        match self {
            Self::Sled(worker) => {
                let user = user.clone();
                worker.call(move |engine| engine.load(&user)).await
            }
            Self::Postgres(store) => store.load(user).await,
        }
    }

    /// All users and their grants.
    pub async fn scan(&self) -> Result<Users, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.scan()).await,
            Self::Postgres(store) => store.scan().await,
        }
    }

    /// The records as they are stored: what `store dump` prints and [`StoredGrant::import`](crate::store::stored_grant::StoredGrant::import)
    /// reads.
    pub async fn dump(&self) -> Result<BTreeMap<UserId, serde_json::Value>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.dump()).await,
            Self::Postgres(store) => store.dump().await,
        }
    }

    /// Puts a grant that waits on disk, before anything else is done with it. An erasure of its user deletes it.
    pub async fn keep_waiting(&self, waiting: &Waiting) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => {
                let waiting = waiting.clone();
                worker.call(move |engine| engine.keep_waiting(&waiting)).await
            }
            Self::Postgres(store) => store.keep_waiting(waiting).await,
        }
    }

    /// Deletes a grant that waits, by its id.
    pub async fn drop_waiting(&self, id: &str) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => {
                let id = id.to_owned();
                worker.call(move |engine| engine.drop_waiting(&id)).await
            }
            Self::Postgres(store) => store.drop_waiting(id).await,
        }
    }

    /// All grants that wait, with those that the last process left; in a shared store those that nobody works on, each of
    /// which is the caller's for a minute.
    pub async fn waiting(&self) -> Result<Vec<Waiting>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.waiting()).await,
            Self::Postgres(store) => store.claim_waiting().await,
        }
    }

    /// Puts the logins that have begun on disk, sealed: one text, which replaces the one of before. A shared store has
    /// [another way](Postgres::begin_login), and ignores this.
    pub async fn keep_logins(&self, plain: Secret) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.keep_logins(plain.expose())).await,
            Self::Postgres(_) => Ok(()),
        }
    }

    /// The logins that had begun when the last process ended.
    pub async fn logins(&self) -> Result<Option<Secret>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| Ok(engine.logins()?.map(Secret::new))).await,
            Self::Postgres(_) => Ok(None),
        }
    }

    /// A small fact that outlives users and restarts.
    pub async fn note(&self, key: &'static str) -> Result<Option<String>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.note(key)).await,
            Self::Postgres(store) => store.note(key).await,
        }
    }

    /// Writes a small fact down. It is not encrypted: never a secret.
    pub async fn set_note(&self, key: &'static str, value: impl Into<String>) -> Result<(), StoreError> {
        let value = value.into();
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.set_note(key, &value)).await,
            Self::Postgres(store) => store.set_note(key, &value).await,
        }
    }

    /// Takes other keys into use: the first seals from now on. They have to include the key that sealed last, or nothing
    /// changes and it is [`StoreError::WrongKey`].
    pub async fn rekey(&self, keyring: Arc<Keyring>) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.rekey(keyring)).await,
            Self::Postgres(store) => store.rekey(keyring).await,
        }
    }

    /// Seals every record, and its copy, with the first key. Where it is interrupted, the next call goes on; other
    /// operations are served in between.
    pub async fn reseal(&self) -> Result<Reseal, StoreError> {
        let worker = match self {
            Self::Sled(worker) => worker,
            Self::Postgres(store) => return store.reseal().await,
        };
        let mut done = Reseal::default();
        for user in worker.call(|engine| engine.users()).await? {
            match worker.call(move |engine| engine.reseal(&user)).await? {
                Resealed::Done => done.resealed += 1,
                Resealed::Unreadable => done.unreadable += 1,
                Resealed::NothingToDo => {}
            }
        }
        worker.call(|engine| engine.reseal_waiting()).await?;
        Ok(done)
    }

    /// How the store does. Never waits.
    pub fn health(&self) -> Health {
        match self {
            Self::Sled(worker) => worker.health(),
            Self::Postgres(store) => store.health(),
        }
    }

    /// Ends what was begun, and gives the directory, or the connection, free. All handles are dead from then on.
    pub async fn close(&self) -> Result<(), StoreError> {
        match self {
            Self::Sled(worker) => worker.close().await,
            Self::Postgres(store) => store.close().await,
        }
    }
}

#[cfg(test)]
mod tests;
