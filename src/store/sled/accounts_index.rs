//! The index of found accounts in sled: a tree of its own, which is made anew if it is lost.
//!
//! Keys: `s` and a slug, with the user and what a list filters by; `u` and a user, with the version, the slugs and the
//! time of the next search; `t`, that time and the user; and `complete`, once every stored list is in it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::database::Database;
use crate::domain::account::UserId;
use crate::store::{IndexedAccount, NewAccounts, StoreError};

const COMPLETE: &[u8] = b"complete";

/// What the index knows of a slug.
#[derive(Serialize, Deserialize)]
struct SlugEntry {
    user: UserId,
    #[serde(flatten)]
    account: IndexedAccount,
}

/// What the index knows of a user.
#[derive(Serialize, Deserialize)]
struct UserEntry {
    version: u64,
    slugs: Vec<String>,
    search_at: Timestamp,
}

impl Database {
    /// The version of the accounts of `user`; 0 if there are none, or if the index lacks them.
    pub(super) fn accounts_version(&self, user: &UserId) -> Result<u64, StoreError> {
        Ok(self.accounts_entry(user)?.map_or(0, |entry| entry.version))
    }

    /// The user to whom `slug` belongs.
    pub(super) fn slug_owner(&self, slug: &str) -> Result<Option<UserId>, StoreError> {
        let found = self.accounts.get(slug_key(slug)).map_err(|error| self.sled_error(error))?;
        Ok(found.and_then(|json| serde_json::from_slice::<SlugEntry>(&json).ok()).map(|entry| entry.user))
    }

    /// Every account of the index with its user, by slug.
    pub(super) fn indexed(&self) -> impl Iterator<Item = Result<(IndexedAccount, UserId), StoreError>> {
        self.accounts.scan_prefix(b"s").filter_map(|entry| match entry {
            Ok((_, json)) => {
                serde_json::from_slice::<SlugEntry>(&json).ok().map(|entry| Ok((entry.account, entry.user)))
            }
            Err(error) => Some(Err(self.sled_error(error))),
        })
    }

    /// Lists the accounts of `user` under this version, durably.
    pub(super) fn index_accounts(
        &mut self,
        user: &UserId,
        version: u64,
        accounts: &NewAccounts,
    ) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        self.unlist(user, &mut batch)?;
        for account in &accounts.index {
            let entry = SlugEntry { user: user.clone(), account: account.clone() };
            batch.insert(slug_key(&account.slug), json(&entry));
        }
        let slugs = accounts.index.iter().map(|account| account.slug.clone()).collect();
        let entry = UserEntry { version, slugs, search_at: accounts.search_at };
        batch.insert(search_key(entry.search_at, user), user.as_str());
        batch.insert(user_key(user), json(&entry));
        self.apply_accounts(batch)
    }

    /// Removes the accounts of `user` from the index, durably.
    pub(super) fn unindex_accounts(&mut self, user: &UserId) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        match self.unlist(user, &mut batch)? {
            true => self.apply_accounts(batch),
            false => Ok(()),
        }
    }

    pub(super) fn is_index_complete(&self) -> Result<bool, StoreError> {
        self.accounts.contains_key(COMPLETE).map_err(|error| self.sled_error(error))
    }

    pub(super) fn set_index_complete(&mut self) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        batch.insert(COMPLETE, "");
        self.apply_accounts(batch)
    }

    /// Makes the index incomplete: the database has lost something, and perhaps a part of it.
    pub(super) fn distrust_index(&mut self) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        batch.remove(COMPLETE);
        self.apply_accounts(batch)
    }

    /// At most `limit` users whose next search is due at `now`; it is due again at `next`.
    pub(super) fn claim_searches(
        &mut self,
        now: Timestamp,
        next: Timestamp,
        limit: usize,
    ) -> Result<Vec<UserId>, StoreError> {
        let (mut batch, mut due) = (sled::Batch::default(), Vec::new());
        for entry in self.accounts.range(b"t".to_vec()..=time_key(now)).take(limit) {
            let (key, name) = entry.map_err(|error| self.sled_error(error))?;
            batch.remove(&key);
            let user = std::str::from_utf8(&name).ok().and_then(|name| name.parse::<UserId>().ok());
            let Some(user) = user else { continue };
            let Some(mut entry) = self.accounts_entry(&user)? else { continue };
            entry.search_at = next;
            batch.insert(search_key(next, &user), user.as_str());
            batch.insert(user_key(&user), json(&entry));
            due.push(user);
        }
        if !due.is_empty() {
            self.apply_accounts(batch)?;
        }
        Ok(due)
    }

    fn accounts_entry(&self, user: &UserId) -> Result<Option<UserEntry>, StoreError> {
        let found = self.accounts.get(user_key(user)).map_err(|error| self.sled_error(error))?;
        Ok(found.and_then(|json| serde_json::from_slice(&json).ok()))
    }

    /// Removes what the index has of `user`. Returns whether it has anything.
    fn unlist(&self, user: &UserId, batch: &mut sled::Batch) -> Result<bool, StoreError> {
        let Some(entry) = self.accounts_entry(user)? else { return Ok(false) };
        entry.slugs.iter().for_each(|slug| batch.remove(slug_key(slug)));
        batch.remove(search_key(entry.search_at, user));
        batch.remove(user_key(user));
        Ok(true)
    }

    fn apply_accounts(&mut self, batch: sled::Batch) -> Result<(), StoreError> {
        self.accounts.apply_batch(batch).map_err(|error| self.sled_error(error))?;
        self.sync()
    }
}

fn json(entry: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(entry).expect("texts, numbers and times are JSON")
}

fn slug_key(slug: &str) -> Vec<u8> {
    [b"s", slug.as_bytes()].concat()
}

fn user_key(user: &UserId) -> Vec<u8> {
    [b"u", user.as_str().as_bytes()].concat()
}

/// Everything due at `at`, or before, is at most this. Times before 1970 count as 1970.
fn time_key(at: Timestamp) -> Vec<u8> {
    let milliseconds = u64::try_from(at.as_millisecond()).unwrap_or(0);
    [&b"t"[..], &milliseconds.saturating_add(1).to_be_bytes()].concat()
}

fn search_key(at: Timestamp, user: &UserId) -> Vec<u8> {
    let milliseconds = u64::try_from(at.as_millisecond()).unwrap_or(0);
    [&b"t"[..], &milliseconds.to_be_bytes(), user.as_str().as_bytes()].concat()
}
