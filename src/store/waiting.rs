//! Grants that wait: exchanged, and not in use yet. Their codes are spent, so they lie on disk like any grant, in a file
//! each beside the copies. All of it is sealed: whoever can write to the disk must not make one of them count.

use std::fs;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::mirror::Mirror;
use super::{StoreError, files};
use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::store::keyring::Keyring;
use crate::store::stored_grant::StoredGrant;

/// A grant that waits, for the comparison with the user's grant of before or for the app's confirmation.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// The hash of its one-time id, in hexadecimal digits.
    pub id: String,
    /// Whose it will be.
    pub user: UserId,
    /// Since when.
    pub since: Timestamp,
    /// Whether another Amazon identity may take the user's place.
    pub replace: bool,
    /// Whether the app has to confirm it.
    pub confirm: bool,
    /// The grant.
    pub grant: Grant,
}

/// The plaintext of a file.
#[derive(Serialize, Deserialize)]
struct Sealed {
    id: String,
    user: UserId,
    since: Timestamp,
    replace: bool,
    confirm: bool,
    record: StoredGrant,
}

impl Waiting {
    pub(super) fn seal(&self, keyring: &Keyring) -> String {
        let Self { id, user, since, replace, confirm, grant } = self.clone();
        let record = StoredGrant::seal(&grant, &user, keyring);
        let plain = serde_json::to_vec(&Sealed { id, user, since, replace, confirm, record });
        keyring.seal(&plain.expect("names, times and texts are JSON"))
    }

    pub(super) fn open(text: &str, keyring: &Keyring) -> Option<Self> {
        let Sealed { id, user, since, replace, confirm, record } =
            serde_json::from_slice(&keyring.open(text)?.plain).ok()?;
        let grant = record.open(&user, keyring).ok()?;
        Some(Self { id, user, since, replace, confirm, grant })
    }
}

impl Mirror {
    /// Puts a grant that waits on disk.
    pub(super) fn keep_waiting(&self, waiting: &Waiting, keyring: &Keyring) -> Result<(), StoreError> {
        files::replace(&self.waiting_path(&waiting.id), waiting.seal(keyring).as_bytes())
    }

    /// Deletes one, which is in use now or will never be.
    pub(super) fn drop_waiting(&self, id: &str) -> Result<(), StoreError> {
        files::remove(&self.waiting_path(id)).map(drop)
    }

    /// All of them. What does not open is kept, and said.
    pub(super) fn waiting(&self, keyring: &Keyring) -> Result<Vec<Waiting>, StoreError> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(|error| files::io_error(&self.dir, error))? {
            let path = entry.map_err(|error| files::io_error(&self.dir, error))?.path();
            if path.extension().is_none_or(|kind| kind != "waiting") {
                continue;
            }
            let text = files::read(&path)?.and_then(|text| String::from_utf8(text).ok());
            match text.and_then(|text| Waiting::open(&text, keyring)) {
                Some(waiting) if self.waiting_path(&waiting.id) == path => all.push(waiting),
                _ => tracing::error!(file = %path.display(), "a grant that waits does not open and is kept"),
            }
        }
        Ok(all)
    }

    /// Puts the logins that have begun on disk, as one text.
    pub(super) fn keep_logins(&self, plain: &str, keyring: &Keyring) -> Result<(), StoreError> {
        files::replace(&self.dir.join(LOGINS), keyring.seal(plain.as_bytes()).as_bytes())
    }

    /// What was put there last; `None` where there is nothing, or nothing that opens: a login can be begun again.
    pub(super) fn logins(&self, keyring: &Keyring) -> Result<Option<String>, StoreError> {
        let text = files::read(&self.dir.join(LOGINS))?.and_then(|text| String::from_utf8(text).ok());
        let plain = text.and_then(|text| keyring.open(&text));
        Ok(plain.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok()))
    }

    fn waiting_path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.waiting"))
    }
}

/// The file of the logins that have begun.
const LOGINS: &str = "logins";
