//! The journal of refreshes: a file in the mirror's directory, to which a line is appended when a refresh begins or
//! ends. It outlives the database, and a refresh costs one small write, however many others are in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::engine::Engine;
use crate::domain::account::UserId;
use crate::store::{StoreError, files};

const FILE: &str = "journal";

impl Engine {
    /// See [`TokenStore::journal`](crate::store::TokenStore::journal).
    pub(in crate::store) fn journal(&mut self) -> Result<Option<BTreeMap<UserId, u64>>, StoreError> {
        let Some(content) = files::read(&self.mirror_dir().join(FILE))? else { return Ok(None) };
        let mut journal = BTreeMap::new();
        // A last line without an end was being written when the process died: its refresh had not begun.
        let text = String::from_utf8_lossy(&content).into_owned();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let Some((generation, user)) = line.split_once(' ') else { continue };
            let Ok(user) = user.parse::<UserId>() else { continue };
            match generation.parse() {
                Ok(generation) => drop(journal.insert(user, generation)),
                Err(_) => drop(journal.remove(&user)),
            }
        }
        Ok(Some(journal))
    }

    /// See [`TokenStore::append_journal`](crate::store::TokenStore::append_journal).
    pub(in crate::store) fn append_journal(&mut self, changes: &[(UserId, Option<u64>)]) -> Result<u64, StoreError> {
        let path = self.mirror_dir().join(FILE);
        // A line that was cut off must not name another user: one whose name begins its own, or continues it. No user
        // has a `?` in the name, so it is passed over.
        let mut lines = String::new();
        if self.is_journal_torn() {
            lines.push_str("?\n");
        }
        lines.push_str(&text(changes.iter().map(|(user, generation)| (user, *generation))));
        self.set_journal_torn(true);
        let length = files::append(&path, lines.as_bytes())?;
        self.set_journal_torn(false);
        Ok(length)
    }

    /// See [`TokenStore::replace_journal`](crate::store::TokenStore::replace_journal).
    pub(in crate::store) fn replace_journal(&mut self, journal: &BTreeMap<UserId, u64>) -> Result<(), StoreError> {
        let lines = text(journal.iter().map(|(user, generation)| (user, Some(*generation))));
        files::replace(&self.mirror_dir().join(FILE), lines.as_bytes())?;
        self.set_journal_torn(false);
        Ok(())
    }
}

fn text<'a>(changes: impl Iterator<Item = (&'a UserId, Option<u64>)>) -> String {
    let mut lines = String::new();
    for (user, generation) in changes {
        let generation = generation.map_or_else(|| "-".to_owned(), |generation| generation.to_string());
        let _ = writeln!(lines, "{generation} {user}");
    }
    lines
}
