//! What the store's thread does: every operation on the database and its copies, one after the other.

mod attach;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use super::database::{Database, Stored};
use super::mirror::Mirror;
use super::{Health, Opened, Sealed, StoreError, Users, Waiting, files};
use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::store::keyring::{Fingerprint, Keyring};
use crate::store::stored_grant::{StoredGrant, StoredGrantError};

/// The database, its copies and its keys.
pub(super) struct Engine {
    path: PathBuf,
    keyring: Arc<Keyring>,
    /// `None` after a failure: the next operation opens it again.
    database: Option<Database>,
    /// Whether a write of this process has failed.
    failed: bool,
    /// What each record is sealed with.
    sealed: BTreeMap<UserId, Sealed>,
    health: Health,
    /// Last, so that it holds the lock until the database is closed.
    copies: Mirror,
}

/// What [`Engine::reseal`] did with one record.
pub(super) enum Resealed {
    /// It is under the first key now.
    Done,
    /// It was, or it is gone.
    NothingToDo,
    /// No key opens it, or its seal does not fit.
    Unreadable,
}

impl Engine {
    /// Takes the store's lock, checks the key, opens the database, and sets right what a crash or damage left.
    pub(super) fn open(path: PathBuf, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        let copies = Mirror::open(&path)?;
        let health = Health { up: true, last_error: None, recoveries: 0, records: BTreeMap::new() };
        let sealed = BTreeMap::new();
        let mut engine = Self { path, keyring, database: None, failed: false, sealed, health, copies };
        let opened = match engine.run(Self::attach) {
            Err(error) if files::is_full(&error) => engine.copies_alone(&error)?,
            other => other?,
        };
        Ok((engine, opened))
    }

    /// Does one operation. After a failure of the disk or of sled the database is closed, so that the next operation
    /// begins with what is on disk and not with what this process believes.
    pub(super) fn run<T>(&mut self, op: impl FnOnce(&mut Self) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let result = catch_unwind(AssertUnwindSafe(|| op(self))).unwrap_or_else(|_| Err(self.panicked()));
        let broken = result.as_ref().err().filter(|error| {
            matches!(error, StoreError::Io { .. } | StoreError::Damaged { .. } | StoreError::Engine { .. })
        });
        // What needs no database tells nothing about it.
        self.health.up = broken.is_none() && self.database.is_some();
        if let Some(error) = broken {
            self.health.last_error = Some(error.to_string());
            self.failed = true;
            let database = self.database.take();
            // sled asserts while it closes that the disk works.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(database)));
        }
        result
    }

    pub(super) fn health(&self) -> Health {
        let mut records = BTreeMap::new();
        for sealed in self.sealed.values() {
            *records.entry(*sealed).or_default() += 1;
        }
        Health { records, ..self.health.clone() }
    }

    pub(super) fn save(&mut self, user: &UserId, grant: &Grant, expected: Option<u64>) -> Result<(), StoreError> {
        let (database, copies, keyring) = self.parts()?;
        let stored = database.get(user)?;
        let generation = stored.as_ref().map(|stored| stored.as_ref().map(StoredGrant::generation));
        if let Some(expected) = expected
            && generation != Some(Ok(expected))
            && !stored.as_ref().is_some_and(|stored| holds(stored, user, grant, keyring))
        {
            return Err(StoreError::Conflict);
        }
        let record = StoredGrant::seal(grant, user, keyring);
        fail_point!("save_refused", |_| Err(files::io_error(
            &copies.path(user),
            std::io::ErrorKind::StorageFull.into()
        )));
        database.put(user, &record)?;
        fail_point!("save_unsynced", |_| std::process::abort());
        let sequence = database.commit()?;
        fail_point!("save_synced", |_| std::process::abort());
        copies.write(user, &record, sequence)?;
        self.sealed.insert(user.clone(), Sealed::By(self.keyring.first()));
        Ok(())
    }

    pub(super) fn erase(&mut self, user: &UserId) -> Result<bool, StoreError> {
        let (database, copies, keyring) = self.parts()?;
        for waiting in copies.waiting(keyring)?.into_iter().filter(|waiting| waiting.user == *user) {
            copies.drop_waiting(&waiting.id)?;
        }
        // The copy first: see the module's words on which of the two is right.
        let copy = copies.remove(user)?;
        let record = database.remove(user)?;
        if copy || record {
            let sequence = database.commit()?;
            copies.set_sequence(sequence)?;
        }
        self.sealed.remove(user);
        Ok(copy || record)
    }

    pub(super) fn load(&mut self, user: &UserId) -> Result<Option<Grant>, StoreError> {
        let (database, _, keyring) = self.parts()?;
        let record = database.get(user)?.transpose()?;
        Ok(record.map(|record| record.open(user, keyring)).transpose()?)
    }

    pub(super) fn scan(&mut self) -> Result<Users, StoreError> {
        let (database, _, keyring) = self.parts()?;
        let open = |(user, record): (UserId, Stored)| {
            let grant = record.and_then(|record| record.open(&user, keyring));
            (user, grant)
        };
        database.records().map(|entry| entry.map(open)).collect()
    }

    pub(super) fn dump(&mut self) -> Result<BTreeMap<UserId, serde_json::Value>, StoreError> {
        let (database, ..) = self.parts()?;
        let text = |json: &[u8]| serde_json::Value::String(String::from_utf8_lossy(json).into_owned());
        let value = |json: &[u8]| serde_json::from_slice(json).unwrap_or_else(|_| text(json));
        database.raw().map(|entry| entry.map(|(user, json)| (user, value(&json)))).collect()
    }

    pub(super) fn users(&mut self) -> Result<Vec<UserId>, StoreError> {
        let (database, ..) = self.parts()?;
        database.raw().map(|entry| entry.map(|(user, _)| user)).collect()
    }

    pub(super) fn reseal(&mut self, user: &UserId) -> Result<Resealed, StoreError> {
        let (database, copies, keyring) = self.parts()?;
        let Some(stored) = database.get(user)? else { return Ok(Resealed::NothingToDo) };
        let Ok(record) = stored else { return Ok(Resealed::Unreadable) };
        let Ok(grant) = record.open(user, keyring) else { return Ok(Resealed::Unreadable) };
        if record.key_index(keyring) == Some(0) {
            return Ok(Resealed::NothingToDo);
        }
        let record = StoredGrant::seal(&grant, user, keyring);
        database.put(user, &record)?;
        let sequence = database.commit()?;
        copies.write(user, &record, sequence)?;
        self.sealed.insert(user.clone(), Sealed::By(self.keyring.first()));
        Ok(Resealed::Done)
    }

    /// What waits is small and short-lived: all of it is sealed anew, whatever it was sealed with.
    pub(super) fn reseal_waiting(&mut self) -> Result<(), StoreError> {
        for waiting in self.copies.waiting(&self.keyring)? {
            self.copies.keep_waiting(&waiting, &self.keyring)?;
        }
        let logins = self.copies.logins(&self.keyring)?;
        logins.map_or(Ok(()), |logins| self.copies.keep_logins(&logins, &self.keyring))
    }

    pub(super) fn keep_waiting(&mut self, waiting: &Waiting) -> Result<(), StoreError> {
        self.copies.keep_waiting(waiting, &self.keyring)
    }

    pub(super) fn drop_waiting(&mut self, id: &str) -> Result<(), StoreError> {
        self.copies.drop_waiting(id)
    }

    pub(super) fn waiting(&mut self) -> Result<Vec<Waiting>, StoreError> {
        self.copies.waiting(&self.keyring)
    }

    pub(super) fn keep_logins(&mut self, plain: &str) -> Result<(), StoreError> {
        self.copies.keep_logins(plain, &self.keyring)
    }

    pub(super) fn logins(&mut self) -> Result<Option<String>, StoreError> {
        self.copies.logins(&self.keyring)
    }

    /// Takes other keys into use. The key that sealed last has to be among them.
    pub(super) fn rekey(&mut self, keyring: Arc<Keyring>) -> Result<(), StoreError> {
        let last = self.copies.key()?.unwrap_or(self.keyring.first());
        if !keyring.fingerprints().contains(&last) {
            return Err(StoreError::WrongKey { expected: Some(last), have: keyring.fingerprints() });
        }
        let sealed = |(user, record): (UserId, Stored)| {
            let (_, sealed) = open(&user, &record, &keyring);
            (user, sealed)
        };
        let sealed = self.parts()?.0.records().map(|entry| entry.map(sealed)).collect::<Result<_, _>>()?;
        self.copies.set_key(keyring.first())?;
        (self.keyring, self.sealed) = (keyring, sealed);
        Ok(())
    }

    pub(super) fn note(&mut self, key: &str) -> Result<Option<String>, StoreError> {
        let (database, ..) = self.parts()?;
        Ok(database.notes()?.remove(key))
    }

    pub(super) fn set_note(&mut self, key: &str, value: &str) -> Result<(), StoreError> {
        let (database, copies, _) = self.parts()?;
        database.put_note(key, value)?;
        let sequence = database.commit()?;
        copies.set_notes(&database.notes()?, sequence)
    }

    /// The open database, opened again where it has to be.
    fn parts(&mut self) -> Result<(&mut Database, &Mirror, &Keyring), StoreError> {
        if self.database.is_none() {
            self.attach()?;
        }
        let database = self.database.as_mut().expect("attached a moment ago");
        Ok((database, &self.copies, &self.keyring))
    }

    fn wrong_key(&self, expected: Option<Fingerprint>) -> StoreError {
        StoreError::WrongKey { expected, have: self.keyring.fingerprints() }
    }

    fn panicked(&self) -> StoreError {
        StoreError::Engine { path: self.path.clone(), reason: "it panicked".into() }
    }
}

/// The grant in a record, and what seals it.
pub(super) fn open(user: &UserId, record: &Stored, keyring: &Keyring) -> (Result<Grant, StoredGrantError>, Sealed) {
    let record = record.as_ref().map_err(|error| *error);
    let grant = record.and_then(|record| record.open(user, keyring));
    let sealed = match grant.as_ref().and(record.as_ref()).map(|record| record.key_index(keyring)) {
        Ok(Some(place)) => Sealed::By(keyring.fingerprints()[place]),
        Ok(None) | Err(StoredGrantError::Undecryptable) => Sealed::ByUnknownKey,
        Err(StoredGrantError::Tampered | StoredGrantError::Malformed(_)) => Sealed::Damaged,
    };
    (grant, sealed)
}

/// Whether `grant` is what is stored already: then a write that timed out was done after all, and is being repeated.
pub(super) fn holds(stored: &Stored, user: &UserId, grant: &Grant, keyring: &Keyring) -> bool {
    let access = |grant: &Grant| grant.access.as_ref().map(|access| access.token.clone());
    stored.clone().and_then(|record| record.open(user, keyring)).is_ok_and(|stored| {
        stored.generation == grant.generation
            && stored.refresh_token == grant.refresh_token
            && access(&stored) == access(grant)
    })
}
