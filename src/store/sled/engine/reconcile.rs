//! Opening the store: checks the key, then brings the database and its mirror to the same state, whatever a crash or
//! damage left of them.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::database::{self, Database};
use super::super::mirror::MirrorContents;
use super::Engine;
use super::accounts::Indexing;
use crate::domain::account::UserId;
use crate::store::stored_grant::{StoredGrantError, open_record};
use crate::store::{Opened, Sealed, StoreError, Users};

/// The number of damaged databases that one process moves aside at most. A disk that keeps damaging them would
/// otherwise fill up.
const MAX_RECOVERIES: u64 = 8;

/// The content of the database, and how it differs from the mirror. Records are compared one by one, so that they are
/// never all in memory.
#[derive(Default)]
struct Comparison {
    users: Users,
    sealed: BTreeMap<UserId, Sealed>,
    /// Users whose record is older than the mirrored one.
    older: BTreeSet<UserId>,
    /// Users whose record opens and differs from the mirrored one, or is not mirrored.
    to_mirror: Vec<UserId>,
}

impl Engine {
    /// Opens the database and brings it and the mirror to the same state.
    ///
    /// # Errors
    ///
    /// [`StoreError::WrongKey`] before anything is written, if the store was sealed with another key; any other
    /// [`StoreError`] if the disk or the database cannot be used.
    pub(super) fn open_and_reconcile(&mut self) -> Result<Opened, StoreError> {
        // Check the key before sled is opened, because opening sled writes to its directory.
        let known_key = self.mirror.key()?;
        if known_key.is_some_and(|key| !self.keyring.fingerprints().contains(&key)) {
            return Err(self.wrong_key(known_key));
        }
        let mut any_mirrored_opens = false;
        let mut mirrored = self.mirror.read(|user, record| {
            any_mirrored_opens = any_mirrored_opens || record.open(user, &self.keyring).is_ok();
        })?;
        if known_key.is_none() && !mirrored.digests.is_empty() && !any_mirrored_opens {
            return Err(self.wrong_key(None));
        }

        // Open the database, and replace it if it is beyond use.
        let is_ours = known_key.is_some() || !mirrored.digests.is_empty();
        let mut opened = Opened::default();
        let (mut database, mut comparison) = match self.read_database(&mirrored) {
            Err(error) if self.should_replace(&error, is_ours) => {
                let moved_to = database::move_aside(&self.path)?;
                self.health.recoveries += 1;
                tracing::warn!(%error, kept_in = %moved_to.display(), "the database is replaced from its mirror");
                opened.recovered = Some(moved_to);
                self.read_database(&mirrored)?
            }
            other => other?,
        };
        if known_key.is_none() && !any_mirrored_opens && comparison.is_sealed_with_another_key() {
            return Err(self.wrong_key(None));
        }

        // Restore from the mirror what the database has lost.
        opened.restored = self.restore(&mut database, &comparison, &mut mirrored)?;
        if opened.restored > 0 && opened.recovered.is_none() {
            // sled opens a truncated log without an error, as if it were new.
            self.health.recoveries += 1;
        }
        if opened.restored > 0 {
            comparison = self.compare(&database, &mirrored)?;
        }

        // Bring the mirror up to date with the database.
        self.update_mirror(&database, &comparison.to_mirror, &mut mirrored)?;
        if known_key != Some(self.keyring.first()) {
            self.mirror.set_key(self.keyring.first())?;
        }
        opened.unreadable_mirror_files = mirrored.unreadable;
        (opened.users, self.sealed) = (comparison.users, comparison.sealed);
        if opened.restored > 0 || opened.recovered.is_some() {
            database.distrust_index()?;
        }
        self.indexing = Indexing::default();
        self.database = Some(database);
        Ok(opened)
    }

    /// Whether the database is beyond use and may be replaced. `is_ours`: there is evidence that adsidecar created this
    /// store.
    fn should_replace(&self, error: &StoreError, is_ours: bool) -> bool {
        let beyond_use = match error {
            StoreError::Damaged { .. } => true,
            // A database that we created has our sled version: if sled reports another one, the header is damaged.
            StoreError::UnusableDatabase { .. } => is_ours,
            _ => false,
        };
        beyond_use && self.health.recoveries < MAX_RECOVERIES
    }

    /// Opens the database and reads all of it, because some damage shows only then.
    fn read_database(&self, mirrored: &MirrorContents) -> Result<(Database, Comparison), StoreError> {
        let damaged = |reason: &str| StoreError::Damaged { path: self.path.clone(), reason: reason.into() };
        let read = || {
            let database = Database::open(&self.path, self.has_failed)?;
            let comparison = self.compare(&database, mirrored)?;
            let notes = database.notes()?;
            // sled ends a log at the first damage in it, without an error. An empty database has nothing worth keeping,
            // so it is filled in place.
            let is_behind = database.sequence() < mirrored.sequence;
            if is_behind && !(comparison.users.is_empty() && notes.is_empty()) {
                return Err(damaged("it has lost its latest changes"));
            }
            Ok((database, comparison))
        };
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(damaged("sled panicked while it opened")))
    }

    /// Reads the whole database, and compares each record with the mirrored one.
    fn compare(&self, database: &Database, mirrored: &MirrorContents) -> Result<Comparison, StoreError> {
        let mut comparison = Comparison::default();
        for entry in database.records() {
            let (user, record) = entry?;
            let (grant, sealed) = open_record(&user, &record, &self.keyring);
            if let Ok(record) = &record {
                let digest = mirrored.digests.get(&user);
                if digest.is_some_and(|digest| digest.is_newer_than(record)) {
                    comparison.older.insert(user.clone());
                }
                if grant.is_ok() && !digest.is_some_and(|digest| digest.matches(record)) {
                    comparison.to_mirror.push(user.clone());
                }
            }
            comparison.sealed.insert(user.clone(), sealed);
            comparison.users.push((user, grant));
        }
        Ok(comparison)
    }

    /// Restores from the mirror the records and notes that the database lacks, and the records that it has only in an
    /// older state. Returns the number of restored users.
    fn restore(
        &self,
        database: &mut Database,
        comparison: &Comparison,
        mirrored: &mut MirrorContents,
    ) -> Result<usize, StoreError> {
        let mut restored = 0;
        for user in mirrored.digests.keys() {
            let is_stored = comparison.sealed.contains_key(user);
            if is_stored && !comparison.older.contains(user) {
                continue;
            }
            let Some(record) = self.mirror.get(user).filter(|record| record.open(user, &self.keyring).is_ok()) else {
                mirrored.unreadable.extend((!is_stored).then(|| self.mirror.path(user)));
                continue;
            };
            if is_stored {
                tracing::error!(
                    %user,
                    "the stored grant is older than its mirror: something other than adsidecar restored an old record; \
                     the mirrored grant is used"
                );
            }
            database.put(user, &record)?;
            restored += 1;
        }
        let stored = database.notes()?;
        let lost_notes = mirrored.notes.iter().filter(|(key, _)| !stored.contains_key(*key));
        for (key, value) in lost_notes.clone() {
            database.put_note(key, value)?;
        }
        if restored > 0 || lost_notes.count() > 0 || database.sequence() < mirrored.sequence {
            database.raise_sequence(mirrored.sequence);
            database.commit()?;
        }
        if restored > 0 {
            tracing::warn!(users = restored, "the database had lost grants: they were restored from the mirror");
        }
        Ok(restored)
    }

    /// Writes the mirror files that a crash left unwritten. `to_mirror` holds only users whose record opens, so that an
    /// unreadable record never replaces a good mirror file.
    fn update_mirror(
        &self,
        database: &Database,
        to_mirror: &[UserId],
        mirrored: &mut MirrorContents,
    ) -> Result<(), StoreError> {
        let sequence = database.sequence();
        for user in to_mirror {
            if let Some(Ok(record)) = database.get(user)? {
                self.mirror.write(user, &record, sequence)?;
                mirrored.unreadable.retain(|path| *path != self.mirror.path(user));
            }
        }
        let notes = database.notes()?;
        if notes != mirrored.notes {
            self.mirror.set_notes(&notes, sequence)?;
        }
        // Writing the sequence is the last step of an erasure. If only that step failed, repeating the erasure finds
        // nothing to do, so the sequence has to be written here.
        if sequence > mirrored.sequence { self.mirror.set_sequence(sequence) } else { Ok(()) }
    }

    /// Reads the users from the mirror alone, because `error` prevents the database from opening.
    pub(in crate::store) fn read_mirror_only(&self, error: &StoreError) -> Result<Opened, StoreError> {
        let mut users = Users::new();
        let mirrored = self.mirror.read(|user, record| users.push((user.clone(), record.open(user, &self.keyring))))?;
        users.sort_by(|(a, _), (b, _)| a.cmp(b));
        let degraded = Some(error.to_string());
        Ok(Opened { users, unreadable_mirror_files: mirrored.unreadable, degraded, ..Opened::default() })
    }
}

impl Comparison {
    /// Whether the database has records and no key of the keyring opens any of them.
    fn is_sealed_with_another_key(&self) -> bool {
        let undecryptable = |grant: &Result<_, _>| matches!(grant, Err(StoredGrantError::Undecryptable));
        !self.users.is_empty() && self.users.iter().all(|(_, grant)| undecryptable(grant))
    }
}
