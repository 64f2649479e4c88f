//! Opening the store: the key is checked, and the database and its copies are brought to the same state, whatever a crash or
//! damage left of them.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::database::{self, Database};
use super::super::mirror::Found;
use super::super::{Opened, Sealed, StoreError, Users};
use super::{Engine, open};
use crate::domain::account::UserId;
use crate::store::stored_grant::StoredGrantError;

/// A process moves this many damaged databases aside. A disk that damages more would fill itself with them.
const MAX_RECOVERIES: u64 = 8;

/// What the database holds, and how that stands to the copies: record by record, so that never all of them are in memory.
#[derive(Default)]
struct Survey {
    users: Users,
    sealed: BTreeMap<UserId, Sealed>,
    /// Whose record is older than its copy.
    older: BTreeSet<UserId>,
    /// Whose record opens and is not what was copied.
    uncopied: Vec<UserId>,
}

impl Engine {
    /// Opens the database and brings it and the copies to the same state.
    pub(super) fn attach(&mut self) -> Result<Opened, StoreError> {
        let known_key = self.copies.key()?;
        if known_key.is_some_and(|key| !self.keyring.fingerprints().contains(&key)) {
            return Err(self.wrong_key(known_key));
        }
        let mut any_copy_opens = false;
        let mut found = self.copies.read(|user, copy| {
            any_copy_opens = any_copy_opens || copy.open(user, &self.keyring).is_ok();
        })?;
        if known_key.is_none() && !found.marks.is_empty() && !any_copy_opens {
            return Err(self.wrong_key(None));
        }

        let ours = known_key.is_some() || !found.marks.is_empty();
        let mut opened = Opened::default();
        let (mut database, mut survey) = match self.read_database(&found) {
            Err(error) if self.is_to_be_replaced(&error, ours) => {
                let place = database::set_aside(&self.path)?;
                self.health.recoveries += 1;
                tracing::warn!(%error, kept_in = %place.display(), "the database is replaced from its copies");
                opened.recovered = Some(place);
                self.read_database(&found)?
            }
            other => other?,
        };
        if known_key.is_none() && !any_copy_opens && survey.is_of_another_key() {
            return Err(self.wrong_key(None));
        }

        opened.restored = self.restore(&mut database, &survey, &mut found)?;
        if opened.restored > 0 && opened.recovered.is_none() {
            // sled takes a log that is cut short for a new one.
            self.health.recoveries += 1;
        }
        if opened.restored > 0 {
            survey = self.survey(&database, &found)?;
        }
        self.renew_copies(&database, &survey.uncopied, &mut found)?;
        if known_key != Some(self.keyring.first()) {
            self.copies.set_key(self.keyring.first())?;
        }
        opened.unusable_copies = found.unusable;
        (opened.users, self.sealed) = (survey.users, survey.sealed);
        self.database = Some(database);
        Ok(opened)
    }

    /// Whether the database is beyond use. `ours`: whether there is a sign that this store was made by adsidecar.
    fn is_to_be_replaced(&self, error: &StoreError, ours: bool) -> bool {
        let beyond_use = match error {
            StoreError::Damaged { .. } => true,
            // What we made ourselves always fits, so a database "of another version" has a damaged header.
            StoreError::Engine { .. } => ours,
            _ => false,
        };
        beyond_use && self.health.recoveries < MAX_RECOVERIES
    }

    /// Opens the database and reads all of it, as damage may show only then.
    fn read_database(&self, found: &Found) -> Result<(Database, Survey), StoreError> {
        let damaged = |reason: &str| StoreError::Damaged { path: self.path.clone(), reason: reason.into() };
        let read = || {
            let database = Database::open(&self.path, self.failed)?;
            let survey = self.survey(&database, found)?;
            let notes = database.notes()?;
            // A log that is damaged in its middle ends there for sled, without a word. A database that was deleted has
            // nothing to keep.
            let behind = database.sequence() < found.sequence;
            if behind && !(survey.users.is_empty() && notes.is_empty()) {
                return Err(damaged("it has lost its latest changes"));
            }
            Ok((database, survey))
        };
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(damaged("sled panicked while it opened it")))
    }

    /// Reads all of the database, and compares each record with its copy.
    fn survey(&self, database: &Database, found: &Found) -> Result<Survey, StoreError> {
        let mut survey = Survey::default();
        for entry in database.records() {
            let (user, record) = entry?;
            let (grant, sealed) = open(&user, &record, &self.keyring);
            if let Ok(record) = &record {
                let mark = found.marks.get(&user);
                if mark.is_some_and(|mark| mark.is_newer_than(record)) {
                    survey.older.insert(user.clone());
                }
                if grant.is_ok() && !mark.is_some_and(|mark| mark.is_of(record)) {
                    survey.uncopied.push(user.clone());
                }
            }
            survey.sealed.insert(user.clone(), sealed);
            survey.users.push((user, grant));
        }
        Ok(survey)
    }

    /// Puts back what the copies have and the database has not, or has only older; returns how many users that were.
    fn restore(&self, database: &mut Database, survey: &Survey, found: &mut Found) -> Result<usize, StoreError> {
        let mut restored = 0;
        for user in found.marks.keys() {
            let is_stored = survey.sealed.contains_key(user);
            if is_stored && !survey.older.contains(user) {
                continue;
            }
            let Some(copy) = self.copies.get(user).filter(|copy| copy.open(user, &self.keyring).is_ok()) else {
                found.unusable.extend((!is_stored).then(|| self.copies.path(user)));
                continue;
            };
            if is_stored {
                tracing::error!(%user, "the stored grant is older than its copy: somebody put an old record back; the copy's is used");
            }
            database.put(user, &copy)?;
            restored += 1;
        }
        let stored = database.notes()?;
        let lost_notes = found.notes.iter().filter(|(key, _)| !stored.contains_key(*key));
        for (key, value) in lost_notes.clone() {
            database.put_note(key, value)?;
        }
        if restored > 0 || lost_notes.count() > 0 || database.sequence() < found.sequence {
            database.raise_sequence(found.sequence);
            database.commit()?;
        }
        if restored > 0 {
            tracing::warn!(users = restored, "grants that the database had lost were restored from their copies");
        }
        Ok(restored)
    }

    /// Writes the copies that a crash kept from being written. Only of what opens: a good copy is not given for a bad
    /// record.
    fn renew_copies(&self, database: &Database, uncopied: &[UserId], found: &mut Found) -> Result<(), StoreError> {
        let sequence = database.sequence();
        for user in uncopied {
            if let Some(Ok(record)) = database.get(user)? {
                self.copies.write(user, &record, sequence)?;
                found.unusable.retain(|path| *path != self.copies.path(user));
            }
        }
        let notes = database.notes()?;
        if notes != found.notes {
            self.copies.set_notes(&notes, sequence)?;
        }
        // An erasure may have failed at this last step, and does nothing when it is repeated.
        if sequence > found.sequence { self.copies.set_sequence(sequence) } else { Ok(()) }
    }

    /// The users as the copies know them, for as long as the database does not open because of `error`.
    pub(in crate::store) fn copies_alone(&self, error: &StoreError) -> Result<Opened, StoreError> {
        let mut users = Users::new();
        let found = self.copies.read(|user, copy| users.push((user.clone(), copy.open(user, &self.keyring))))?;
        users.sort_by(|(a, _), (b, _)| a.cmp(b));
        let degraded = Some(error.to_string());
        Ok(Opened { users, unusable_copies: found.unusable, degraded, ..Opened::default() })
    }
}

impl Survey {
    /// Whether there are records, and no key opens any of them.
    fn is_of_another_key(&self) -> bool {
        let undecryptable = |grant: &Result<_, _>| matches!(grant, Err(StoredGrantError::Undecryptable));
        !self.users.is_empty() && self.users.iter().all(|(_, grant)| undecryptable(grant))
    }
}
