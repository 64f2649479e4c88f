//! Every operation on the database and its mirror, as the store's thread runs them.

mod accounts;
mod reconcile;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::database::Database;
use super::mirror::Mirror;
use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::store::backup::value;
use crate::store::keyring::{Fingerprint, Keyring};
use crate::store::stored_grant::{ParsedRecord, StoredGrant, is_same_grant, open_record};
use crate::store::{Health, Opened, PendingGrant, Sealed, StoreError, Users, files};
use accounts::Indexing;

/// Most records of one page of a dump: about 200 KiB.
const PAGE_RECORDS: usize = 100;

/// The database, its mirror and its keys.
pub(in crate::store) struct Engine {
    path: PathBuf,
    keyring: Arc<Keyring>,
    /// `None` after a failure; the next operation opens it again.
    database: Option<Database>,
    /// Whether a disk operation of this process has failed.
    has_failed: bool,
    /// What each record is sealed with.
    sealed: BTreeMap<UserId, Sealed>,
    health: Health,
    indexing: Indexing,
    /// Whether the journal of refreshes may end in the middle of a line, as one may that the previous process left.
    journal_torn: bool,
    /// The last field, and so dropped last: it holds the lock until the database is closed.
    mirror: Mirror,
}

/// What [`Engine::reseal`] did with one record.
pub(in crate::store) enum ResealOutcome {
    /// The record is now sealed with the first key.
    Resealed,
    /// The record was already sealed with the first key, or was deleted.
    NothingToDo,
    /// No key opens the record, or its seal does not match.
    Unreadable,
}

impl Engine {
    /// Takes the store's lock, checks the key, opens the database, and repairs what a crash or damage left. On a full
    /// volume it opens without the database.
    pub(super) fn open(path: PathBuf, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        let mirror = Mirror::open(&path)?;
        let health = Health { up: true, last_error: None, recoveries: 0, records: BTreeMap::new() };
        let sealed = BTreeMap::new();
        let indexing = Indexing::default();
        let mut engine = Self {
            path,
            keyring,
            database: None,
            has_failed: false,
            sealed,
            health,
            indexing,
            journal_torn: true,
            mirror,
        };
        let opened = match engine.run(Self::open_and_reconcile) {
            Err(error) if files::is_full(&error) => engine.read_mirror_only(&error)?,
            other => other?,
        };
        Ok((engine, opened))
    }

    /// Runs one operation. After a failure of the disk or of sled the database is closed, so that the next operation
    /// starts from what is on disk and not from what is in memory.
    pub(in crate::store) fn run<T>(
        &mut self,
        op: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let result = catch_unwind(AssertUnwindSafe(|| op(self))).unwrap_or_else(|_| Err(self.panicked()));
        let disk_failure = result.as_ref().err().filter(|error| {
            matches!(error, StoreError::Io { .. } | StoreError::Damaged { .. } | StoreError::UnusableDatabase { .. })
        });
        // An operation that needs no database can succeed while the database is closed.
        self.health.up = disk_failure.is_none() && self.database.is_some();
        if let Some(error) = disk_failure {
            self.health.last_error = Some(error.to_string());
            self.has_failed = true;
            let database = self.database.take();
            // Closing sled panics if the disk does not work.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(database)));
        }
        result
    }

    pub(in crate::store) fn health(&self) -> Health {
        let mut records = BTreeMap::new();
        for sealed in self.sealed.values() {
            *records.entry(*sealed).or_default() += 1;
        }
        Health { records, ..self.health.clone() }
    }

    /// See [`TokenStore::save`](crate::store::TokenStore::save).
    pub(in crate::store) fn save(
        &mut self,
        user: &UserId,
        grant: &Grant,
        expected: Option<u64>,
    ) -> Result<(), StoreError> {
        let (database, mirror, keyring) = self.components()?;
        let stored = database.get(user)?;
        let generation = stored.as_ref().map(|stored| stored.as_ref().map(StoredGrant::generation));
        if let Some(expected) = expected
            && generation != Some(Ok(expected))
            && !stored.as_ref().is_some_and(|stored| is_same_grant(stored, user, grant, keyring))
        {
            return Err(StoreError::Conflict);
        }
        let record = StoredGrant::seal(grant, user, keyring);
        fail_point!("save_refused", |_| Err(files::io_error(
            &mirror.path(user),
            std::io::ErrorKind::StorageFull.into()
        )));
        database.put(user, &record)?;
        fail_point!("save_unsynced", |_| std::process::abort());
        let sequence = database.commit()?;
        fail_point!("save_synced", |_| std::process::abort());
        mirror.write(user, &record, sequence)?;
        self.sealed.insert(user.clone(), Sealed::By(self.keyring.first()));
        Ok(())
    }

    /// See [`TokenStore::erase`](crate::store::TokenStore::erase).
    pub(in crate::store) fn erase(&mut self, user: &UserId) -> Result<bool, StoreError> {
        let (database, mirror, keyring) = self.components()?;
        for pending in mirror.pending_grants(keyring)?.into_iter().filter(|pending| pending.user == *user) {
            mirror.delete_pending_grant(&pending.id)?;
        }
        // The mirror file is deleted first: see "Which part is authoritative" in `sled/mod.rs`.
        let was_mirrored = mirror.remove(user)?;
        let was_stored = database.remove(user)?;
        if was_mirrored || was_stored {
            let sequence = database.commit()?;
            mirror.set_sequence(sequence)?;
        }
        self.sealed.remove(user);
        Ok(was_mirrored || was_stored)
    }

    pub(in crate::store) fn load(&mut self, user: &UserId) -> Result<Option<Grant>, StoreError> {
        let (database, _, keyring) = self.components()?;
        let record = database.get(user)?.transpose()?;
        Ok(record.map(|record| record.open(user, keyring)).transpose()?)
    }

    pub(in crate::store) fn scan(&mut self) -> Result<Users, StoreError> {
        let (database, _, keyring) = self.components()?;
        let open = |(user, record): (UserId, ParsedRecord)| {
            let grant = record.and_then(|record| record.open(&user, keyring));
            (user, grant)
        };
        database.records().map(|entry| entry.map(open)).collect()
    }

    pub(in crate::store) fn dump(&mut self) -> Result<BTreeMap<UserId, serde_json::Value>, StoreError> {
        let (database, ..) = self.components()?;
        database.raw().map(|entry| entry.map(|(user, json)| (user, value(&json)))).collect()
    }

    /// See [`TokenStore::records_after`](crate::store::TokenStore::records_after).
    pub(in crate::store) fn records_after(
        &mut self,
        after: Option<&UserId>,
    ) -> Result<Vec<(UserId, serde_json::Value)>, StoreError> {
        let (database, ..) = self.components()?;
        let page = database.raw_after(after).take(PAGE_RECORDS);
        page.map(|entry| entry.map(|(user, json)| (user, value(&json)))).collect()
    }

    /// See [`TokenStore::record`](crate::store::TokenStore::record).
    pub(in crate::store) fn record(&mut self, user: &UserId) -> Result<Option<serde_json::Value>, StoreError> {
        let (database, ..) = self.components()?;
        Ok(database.get_raw(user)?.map(|json| value(&json)))
    }

    /// The keys in use.
    pub(in crate::store) fn keyring(&self) -> Arc<Keyring> {
        self.keyring.clone()
    }

    pub(in crate::store) fn users(&mut self) -> Result<Vec<UserId>, StoreError> {
        let (database, ..) = self.components()?;
        database.raw().map(|entry| entry.map(|(user, _)| user)).collect()
    }

    /// Seals the record of `user` with the first key, in the database and in the mirror.
    pub(in crate::store) fn reseal(&mut self, user: &UserId) -> Result<ResealOutcome, StoreError> {
        let (database, mirror, keyring) = self.components()?;
        let Some(stored) = database.get(user)? else { return Ok(ResealOutcome::NothingToDo) };
        let Ok(record) = stored else { return Ok(ResealOutcome::Unreadable) };
        let Ok(grant) = record.open(user, keyring) else { return Ok(ResealOutcome::Unreadable) };
        if record.key_index(keyring) == Some(0) {
            return Ok(ResealOutcome::NothingToDo);
        }
        let record = StoredGrant::seal(&grant, user, keyring);
        database.put(user, &record)?;
        let sequence = database.commit()?;
        mirror.write(user, &record, sequence)?;
        self.sealed.insert(user.clone(), Sealed::By(self.keyring.first()));
        Ok(ResealOutcome::Resealed)
    }

    /// Seals pending grants, pending logins and found accounts again, whatever key sealed them: they are few.
    pub(in crate::store) fn reseal_pending(&mut self) -> Result<(), StoreError> {
        for pending in self.mirror.pending_grants(&self.keyring)? {
            self.mirror.save_pending_grant(&pending, &self.keyring)?;
        }
        let logins = self.mirror.pending_logins(&self.keyring)?;
        if let Some(logins) = logins {
            self.mirror.save_pending_logins(&logins, &self.keyring)?;
        }
        self.reseal_accounts()
    }

    pub(in crate::store) fn save_pending_grant(&mut self, pending: &PendingGrant) -> Result<(), StoreError> {
        self.mirror.save_pending_grant(pending, &self.keyring)
    }

    pub(in crate::store) fn delete_pending_grant(&mut self, id: &str) -> Result<(), StoreError> {
        self.mirror.delete_pending_grant(id)
    }

    pub(in crate::store) fn pending_grants(&mut self) -> Result<Vec<PendingGrant>, StoreError> {
        self.mirror.pending_grants(&self.keyring)
    }

    pub(in crate::store) fn save_pending_logins(&mut self, plain: &str) -> Result<(), StoreError> {
        self.mirror.save_pending_logins(plain, &self.keyring)
    }

    pub(in crate::store) fn pending_logins(&mut self) -> Result<Option<String>, StoreError> {
        self.mirror.pending_logins(&self.keyring)
    }

    /// Replaces the keyring, which must contain the key that sealed last.
    pub(in crate::store) fn rekey(&mut self, keyring: Arc<Keyring>) -> Result<(), StoreError> {
        let last = self.mirror.key()?.unwrap_or(self.keyring.first());
        if !keyring.fingerprints().contains(&last) {
            return Err(StoreError::WrongKey { expected: Some(last), have: keyring.fingerprints() });
        }
        let sealed = |(user, record): (UserId, ParsedRecord)| {
            let (_, sealed) = open_record(&user, &record, &keyring);
            (user, sealed)
        };
        let sealed = self.components()?.0.records().map(|entry| entry.map(sealed)).collect::<Result<_, _>>()?;
        self.mirror.set_key(keyring.first())?;
        (self.keyring, self.sealed) = (keyring, sealed);
        Ok(())
    }

    pub(in crate::store) fn note(&mut self, key: &str) -> Result<Option<String>, StoreError> {
        let (database, ..) = self.components()?;
        Ok(database.notes()?.remove(key))
    }

    pub(in crate::store) fn set_note(&mut self, key: &str, value: &str) -> Result<(), StoreError> {
        let (database, mirror, _) = self.components()?;
        database.put_note(key, value)?;
        let sequence = database.commit()?;
        mirror.set_notes(&database.notes()?, sequence)
    }

    pub(super) fn mirror_dir(&self) -> &Path {
        &self.mirror.dir
    }

    pub(super) fn is_journal_torn(&self) -> bool {
        self.journal_torn
    }

    pub(super) fn set_journal_torn(&mut self, torn: bool) {
        self.journal_torn = torn;
    }

    /// The database, the mirror and the keyring. Opens the database again if it was closed after a failure.
    fn components(&mut self) -> Result<(&mut Database, &Mirror, &Keyring), StoreError> {
        if self.database.is_none() {
            self.open_and_reconcile()?;
        }
        let database = self.database.as_mut().expect("opened just above");
        Ok((database, &self.mirror, &self.keyring))
    }

    fn wrong_key(&self, expected: Option<Fingerprint>) -> StoreError {
        StoreError::WrongKey { expected, have: self.keyring.fingerprints() }
    }

    fn panicked(&self) -> StoreError {
        StoreError::UnusableDatabase { path: self.path.clone(), reason: "sled panicked".into() }
    }
}
