//! Pending grants and pending logins in the mirror's directory.

use std::fs;
use std::path::PathBuf;

use super::mirror::Mirror;
use crate::store::keyring::Keyring;
use crate::store::{PendingGrant, StoreError, files};

/// The file of the pending logins.
const LOGINS: &str = "logins";

impl Mirror {
    /// Writes a pending grant to its own file.
    pub(super) fn save_pending_grant(&self, pending: &PendingGrant, keyring: &Keyring) -> Result<(), StoreError> {
        files::replace(&self.pending_path(&pending.id), pending.seal(keyring).as_bytes())
    }

    /// Deletes a pending grant that is now in use or never will be.
    pub(super) fn delete_pending_grant(&self, id: &str) -> Result<(), StoreError> {
        files::remove(&self.pending_path(id)).map(drop)
    }

    /// Reads all pending grants. A file that cannot be opened is logged and kept.
    pub(super) fn pending_grants(&self, keyring: &Keyring) -> Result<Vec<PendingGrant>, StoreError> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(|error| files::io_error(&self.dir, error))? {
            let path = entry.map_err(|error| files::io_error(&self.dir, error))?.path();
            if path.extension().is_none_or(|kind| kind != "waiting") {
                continue;
            }
            let text = files::read(&path)?.and_then(|text| String::from_utf8(text).ok());
            match text.and_then(|text| PendingGrant::open(&text, keyring)) {
                Some(pending) if self.pending_path(&pending.id) == path => all.push(pending),
                _ => tracing::error!(file = %path.display(), "a pending grant cannot be opened and is kept"),
            }
        }
        Ok(all)
    }

    /// Writes all pending logins as one sealed text.
    pub(super) fn save_pending_logins(&self, plain: &str, keyring: &Keyring) -> Result<(), StoreError> {
        files::replace(&self.dir.join(LOGINS), keyring.seal(plain.as_bytes()).as_bytes())
    }

    /// Reads the pending logins. `None` if there are none or no key opens them: users can restart a login.
    pub(super) fn pending_logins(&self, keyring: &Keyring) -> Result<Option<String>, StoreError> {
        let text = files::read(&self.dir.join(LOGINS))?.and_then(|text| String::from_utf8(text).ok());
        let plain = text.and_then(|text| keyring.open(&text));
        Ok(plain.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok()))
    }

    fn pending_path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.waiting"))
    }
}
