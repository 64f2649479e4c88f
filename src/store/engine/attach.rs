//! Opening the store: the key is checked, and the database and its copies are brought to the same state, whatever a crash or
//! damage left of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::copies::Found;
use super::super::database::{self, Database, Records};
use super::super::{Opened, StoreError};
use super::{Engine, is_older, open_all};
use crate::record::RecordError;

/// A process moves this many damaged databases aside. A disk that damages more would fill itself with them.
const MAX_RECOVERIES: u64 = 8;

impl Engine {
    /// Opens the database and brings it and the copies to the same state.
    pub(super) fn attach(&mut self) -> Result<Opened, StoreError> {
        let known_key = self.copies.key()?;
        if known_key.is_some_and(|key| !self.keyring.fingerprints().contains(&key)) {
            return Err(self.wrong_key(known_key));
        }
        let mut found = self.copies.read()?;
        let any_copy_opens = found.records.iter().any(|(user, copy)| copy.open(user, &self.keyring).is_ok());
        if known_key.is_none() && !found.records.is_empty() && !any_copy_opens {
            return Err(self.wrong_key(None));
        }

        let ours = known_key.is_some() || !found.records.is_empty();
        let mut opened = Opened::default();
        let (mut database, records) = match self.read_database(found.sequence) {
            Err(error) if self.is_to_be_replaced(&error, ours) => {
                let place = database::set_aside(&self.path)?;
                self.health.recoveries += 1;
                tracing::warn!(%error, kept_in = %place.display(), "the database is replaced from its copies");
                opened.recovered = Some(place);
                self.read_database(found.sequence)?
            }
            other => other?,
        };
        if known_key.is_none() && !any_copy_opens && !records.is_empty() && self.opens_none(&records) {
            return Err(self.wrong_key(None));
        }

        opened.restored = self.restore(&mut database, &records, &mut found)?;
        if opened.restored > 0 && opened.recovered.is_none() {
            // sled takes a log that is cut short for a new one.
            self.health.recoveries += 1;
        }
        let records = if opened.restored > 0 { database.records()? } else { records };
        self.renew_copies(&database, &records, &mut found)?;
        if known_key != Some(self.keyring.first()) {
            self.copies.set_key(self.keyring.first())?;
        }
        opened.unusable_copies = found.unusable;
        self.count_keys(&records);
        opened.users = open_all(records, &self.keyring);
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

    /// Opens the database and reads all of it, as damage may show only then. `sequence`: the commit that the copies know
    /// of.
    fn read_database(&self, sequence: u64) -> Result<(Database, Records), StoreError> {
        let damaged = |reason: &str| StoreError::Damaged { path: self.path.clone(), reason: reason.into() };
        let read = || {
            let database = Database::open(&self.path, self.failed)?;
            let records = database.records()?;
            let notes = database.notes()?;
            // A log that is damaged in its middle ends there for sled, without a word. A database that was deleted has
            // nothing to keep.
            let behind = database.sequence() < sequence;
            if behind && !(records.is_empty() && notes.is_empty()) {
                return Err(damaged("it has lost its latest changes"));
            }
            Ok((database, records))
        };
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(damaged("sled panicked while it opened it")))
    }

    /// Puts back what the copies have and the database has not, or has only older; returns how many users that were.
    fn restore(&self, database: &mut Database, records: &Records, found: &mut Found) -> Result<usize, StoreError> {
        let mut restored = 0;
        for (user, copy) in &found.records {
            let stored = records.get(user);
            if stored.is_some_and(|stored| !is_older(stored, copy)) {
                continue;
            }
            if copy.open(user, &self.keyring).is_err() {
                found.unusable.extend(stored.is_none().then(|| self.copies.path(user)));
                continue;
            }
            if stored.is_some() {
                tracing::error!(%user, "the stored grant is older than its copy: somebody put an old record back; the copy's is used");
            }
            database.put(user, copy)?;
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
    fn renew_copies(&self, database: &Database, records: &Records, found: &mut Found) -> Result<(), StoreError> {
        let sequence = database.sequence();
        for (user, record) in records {
            if let Ok(record) = record
                && found.records.get(user) != Some(record)
                && record.open(user, &self.keyring).is_ok()
            {
                self.copies.write(user, record, sequence)?;
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
        let found = self.copies.read()?;
        let records = found.records.into_iter().map(|(user, copy)| (user, Ok(copy))).collect();
        let (users, degraded) = (open_all(records, &self.keyring), Some(error.to_string()));
        Ok(Opened { users, unusable_copies: found.unusable, degraded, ..Opened::default() })
    }

    fn opens_none(&self, records: &Records) -> bool {
        records.iter().all(|(user, record)| {
            let opened = record.clone().and_then(|record| record.open(user, &self.keyring));
            matches!(opened, Err(RecordError::Undecryptable))
        })
    }
}
