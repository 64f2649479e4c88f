//! The accounts that were found for each user: one sealed file per user in the mirror's directory, and an index in
//! sled. They can be found again, so there is one copy of the files, and the index is made from them if it was lost.

use std::fs;
use std::path::PathBuf;

use jiff::Timestamp;

use super::Engine;
use crate::domain::account::UserId;
use crate::store::found_accounts::MAX_COUNTED;
use crate::store::{AccountsPage, AccountsQuery, AccountsSaved, NewAccounts, StoreError, StoredAccounts, files};

/// The extension of the files.
const EXTENSION: &str = "accounts";
/// At most this many searches are claimed, and files read for the index, at a time.
const BATCH: usize = 20;

/// Where the making of the index stands.
#[derive(Debug, Default)]
pub(super) enum Indexing {
    /// It is not known whether the index is there.
    #[default]
    Unknown,
    /// These files are still to be read.
    Files(Vec<PathBuf>),
    /// It is complete.
    Done,
}

impl Engine {
    /// See [`TokenStore::save_accounts`](crate::store::TokenStore::save_accounts).
    pub(in crate::store) fn save_accounts(
        &mut self,
        user: &UserId,
        accounts: &NewAccounts,
    ) -> Result<AccountsSaved, StoreError> {
        let (sealed, path) = (self.keyring.seal(accounts.plain.as_bytes()), self.accounts_path(user));
        let (database, ..) = self.components()?;
        if database.get_raw(user)?.is_none() {
            return Ok(AccountsSaved::LoggedOut);
        }
        let version = database.accounts_version(user)?;
        if version != accounts.seen {
            return Ok(AccountsSaved::Changed);
        }
        let mut taken = Vec::new();
        for account in &accounts.index {
            if database.slug_owner(&account.slug)?.is_some_and(|owner| owner != *user) {
                taken.push(account.slug.clone());
            }
        }
        if !taken.is_empty() {
            return Ok(AccountsSaved::Taken(taken));
        }
        files::replace(&path, sealed.as_bytes())?;
        database.index_accounts(user, version + 1, accounts)?;
        fail_point!("accounts_saved");
        Ok(AccountsSaved::Stored(version + 1))
    }

    /// See [`TokenStore::accounts_of`](crate::store::TokenStore::accounts_of).
    pub(in crate::store) fn accounts_of(&mut self, users: &[UserId]) -> Result<Vec<StoredAccounts>, StoreError> {
        let mut all = Vec::new();
        for user in users {
            if let Some(sealed) = files::read(&self.accounts_path(user))? {
                let plain = self.open_accounts(sealed);
                let version = self.components()?.0.accounts_version(user)?;
                all.push(StoredAccounts { user: user.clone(), plain, version });
            }
        }
        Ok(all)
    }

    /// See [`TokenStore::accounts_with`](crate::store::TokenStore::accounts_with).
    pub(in crate::store) fn accounts_with(&mut self, slug: &str) -> Result<Option<StoredAccounts>, StoreError> {
        let Some(user) = self.components()?.0.slug_owner(slug)? else { return Ok(None) };
        Ok(self.accounts_of(&[user])?.pop())
    }

    /// See [`TokenStore::slug_owners`](crate::store::TokenStore::slug_owners).
    pub(in crate::store) fn slug_owners(&mut self, slugs: &[String]) -> Result<Vec<(String, UserId)>, StoreError> {
        let (database, ..) = self.components()?;
        let owner = |slug: &String| Ok(database.slug_owner(slug)?.map(|user| (slug.clone(), user)));
        slugs.iter().filter_map(|slug| owner(slug).transpose()).collect()
    }

    /// See [`TokenStore::find_accounts`](crate::store::TokenStore::find_accounts).
    pub(in crate::store) fn find_accounts(&mut self, query: &AccountsQuery) -> Result<AccountsPage, StoreError> {
        let (database, ..) = self.components()?;
        let mut page = AccountsPage::default();
        for entry in database.indexed() {
            let (account, user) = entry?;
            if !query.matches(&account) {
                continue;
            }
            page.total += 1;
            if page.slugs.len() < query.limit && account.slug > query.after {
                page.slugs.push((account.slug, user));
            }
            if page.total >= MAX_COUNTED && page.slugs.len() >= query.limit {
                break;
            }
        }
        page.total = page.total.min(MAX_COUNTED);
        Ok(page)
    }

    /// See [`TokenStore::has_more_accounts_than`](crate::store::TokenStore::has_more_accounts_than).
    pub(in crate::store) fn has_more_accounts_than(&mut self, count: usize) -> Result<bool, StoreError> {
        let (database, ..) = self.components()?;
        Ok(database.indexed().nth(count).transpose()?.is_some())
    }

    /// See [`TokenStore::unindexed_accounts`](crate::store::TokenStore::unindexed_accounts).
    pub(in crate::store) fn unindexed_accounts(&mut self) -> Result<Vec<StoredAccounts>, StoreError> {
        if let Indexing::Unknown = self.indexing {
            let is_complete = self.components()?.0.is_index_complete()?;
            self.indexing = if is_complete { Indexing::Done } else { Indexing::Files(self.accounts_files()?) };
        }
        let mut unindexed = Vec::new();
        loop {
            let next = match &mut self.indexing {
                Indexing::Files(paths) if unindexed.len() < BATCH => paths.pop(),
                _ => return Ok(unindexed),
            };
            let Some(path) = next else { break };
            let plain = files::read(&path)?.and_then(|sealed| self.open_accounts(sealed));
            let user = plain.as_deref().and_then(owner_of);
            if let Some(user) = user.filter(|user| self.accounts_path(user) == path)
                && self.components()?.0.accounts_version(&user)? == 0
            {
                unindexed.push(StoredAccounts { user, plain, version: 0 });
            }
        }
        if unindexed.is_empty() {
            // What the last batch listed is stored by now.
            self.components()?.0.set_index_complete()?;
            self.indexing = Indexing::Done;
        }
        Ok(unindexed)
    }

    /// See [`TokenStore::claim_searches`](crate::store::TokenStore::claim_searches).
    pub(in crate::store) fn claim_searches(
        &mut self,
        now: Timestamp,
        next: Timestamp,
    ) -> Result<Vec<UserId>, StoreError> {
        self.components()?.0.claim_searches(now, next, BATCH)
    }

    /// See [`TokenStore::accounts`](crate::store::TokenStore::accounts).
    pub(in crate::store) fn accounts(&mut self) -> Result<Vec<String>, StoreError> {
        let mut all = Vec::new();
        for path in self.accounts_files()? {
            all.extend(files::read(&path)?.and_then(|sealed| self.open_accounts(sealed)));
        }
        Ok(all)
    }

    pub(in crate::store) fn erase_accounts(&mut self, user: &UserId) -> Result<(), StoreError> {
        files::remove(&self.accounts_path(user))?;
        self.components()?.0.unindex_accounts(user)
    }

    /// Seals every list with the first key.
    pub(super) fn reseal_accounts(&mut self) -> Result<(), StoreError> {
        for path in self.accounts_files()? {
            let text = files::read(&path)?.and_then(|text| String::from_utf8(text).ok());
            if let Some(opened) = text.and_then(|text| self.keyring.open(&text)) {
                files::replace(&path, self.keyring.seal(&opened.plain).as_bytes())?;
            }
        }
        Ok(())
    }

    fn open_accounts(&self, sealed: Vec<u8>) -> Option<String> {
        let opened = String::from_utf8(sealed).ok().and_then(|text| self.keyring.open(&text));
        let plain = opened.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok());
        if plain.is_none() {
            tracing::warn!("a list of accounts cannot be opened; the next sync replaces it");
        }
        plain
    }

    fn accounts_files(&self) -> Result<Vec<PathBuf>, StoreError> {
        let dir = &self.mirror.dir;
        let mut paths = Vec::new();
        for entry in fs::read_dir(dir).map_err(|error| files::io_error(dir, error))? {
            let path = entry.map_err(|error| files::io_error(dir, error))?.path();
            if path.extension().is_some_and(|kind| kind == EXTENSION) {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    fn accounts_path(&self, user: &UserId) -> PathBuf {
        self.mirror.path(user).with_extension(EXTENSION)
    }
}

/// The user whom the stored text names.
fn owner_of(plain: &str) -> Option<UserId> {
    #[derive(serde::Deserialize)]
    struct Owner {
        user_id: UserId,
    }
    serde_json::from_str::<Owner>(plain).ok().map(|owner| owner.user_id)
}
