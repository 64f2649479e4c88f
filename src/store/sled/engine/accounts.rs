//! The accounts that were found for each user: one sealed file per user in the mirror's directory. They can be found
//! again, so there is one copy.

use std::fs;
use std::path::PathBuf;

use super::Engine;
use crate::domain::account::UserId;
use crate::store::{StoreError, files};

/// The extension of the files.
const EXTENSION: &str = "accounts";

impl Engine {
    /// See [`TokenStore::save_accounts`](crate::store::TokenStore::save_accounts).
    pub(in crate::store) fn save_accounts(&mut self, user: &UserId, plain: &str) -> Result<(), StoreError> {
        let sealed = self.keyring.seal(plain.as_bytes());
        files::replace(&self.accounts_path(user), sealed.as_bytes())
    }

    /// See [`TokenStore::accounts`](crate::store::TokenStore::accounts).
    pub(in crate::store) fn accounts(&mut self) -> Result<Vec<String>, StoreError> {
        let mut all = Vec::new();
        for path in self.accounts_files()? {
            let text = files::read(&path)?.and_then(|text| String::from_utf8(text).ok());
            let opened = text.and_then(|text| self.keyring.open(&text));
            match opened.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok()) {
                Some(plain) => all.push(plain),
                None => tracing::warn!(file = %path.display(), "a list of accounts cannot be opened; the next sync \
                    replaces it"),
            }
        }
        Ok(all)
    }

    /// See [`TokenStore::erase_accounts`](crate::store::TokenStore::erase_accounts).
    pub(in crate::store) fn erase_accounts(&mut self, user: &UserId) -> Result<(), StoreError> {
        files::remove(&self.accounts_path(user)).map(drop)
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
