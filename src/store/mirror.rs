//! The second copy of each grant: one small file per user, which needs no database to be read.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{StoreError, files};
use crate::domain::account::UserId;
use crate::store::keyring::Fingerprint;
use crate::store::stored_grant::StoredGrant;

/// The directory `<path>.copies/`. While this lives, no other process has the store.
pub(super) struct Mirror {
    pub(super) dir: PathBuf,
    _lock: File,
}

/// What lies in the directory.
pub(super) struct Found {
    /// The copies that parse.
    pub(super) marks: BTreeMap<UserId, MirrorDigest>,
    /// The notes; empty where their file is missing or does not parse.
    pub(super) notes: BTreeMap<String, String>,
    /// The highest number of a commit that any file here knows of.
    pub(super) sequence: u64,
    /// Files that should be copies and are not.
    pub(super) unusable: Vec<PathBuf>,
}

/// What a record can be compared with its copy by, without either being kept: a twentieth of it.
pub(super) struct MirrorDigest {
    generation: u64,
    updated_at: Timestamp,
    digest: [u8; 32],
}

impl MirrorDigest {
    fn of(copy: &StoredGrant) -> Self {
        let digest = Sha256::digest(copy.to_json()).into();
        Self { generation: copy.generation(), updated_at: copy.updated_at(), digest }
    }

    /// Whether `record` is what was copied, to the letter.
    pub(super) fn is_of(&self, record: &StoredGrant) -> bool {
        self.digest == <[u8; 32]>::from(Sha256::digest(record.to_json()))
    }

    /// Whether `record` is older than its copy, which is written after it: then it was put there past this store. Both the
    /// number and the time, as a login after a logout counts generations anew.
    pub(super) fn is_newer_than(&self, record: &StoredGrant) -> bool {
        record.generation() < self.generation && record.updated_at() <= self.updated_at
    }
}

/// A copy as it lies on disk.
#[derive(Serialize, Deserialize)]
struct Copy {
    user: UserId,
    /// The number of the commit.
    sequence: u64,
    record: StoredGrant,
}

/// The copy of the notes as it lies on disk.
#[derive(Default, Serialize, Deserialize)]
struct Notes {
    sequence: u64,
    notes: BTreeMap<String, String>,
}

impl Mirror {
    /// Makes the directory where it is missing, and takes the lock of the whole store. sled has a lock of its own, but
    /// gives it up before a damaged database could be moved aside.
    pub(super) fn open(store: &Path) -> Result<Self, StoreError> {
        let dir = files::beside(store, ".copies");
        files::create_private_dir(&dir)?;
        let path = dir.join("lock");
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(&path).map_err(|error| files::io_error(&path, error))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(StoreError::Held { path: store.to_owned() }),
            Err(TryLockError::Error(error)) => Err(files::io_error(&path, error)),
        }
    }

    /// The key that sealed last; `None` for a new store, or where the file holds something else.
    pub(super) fn key(&self) -> Result<Option<Fingerprint>, StoreError> {
        let content = files::read(&self.dir.join("key"))?.and_then(|content| String::from_utf8(content).ok());
        let twice = content.as_deref().and_then(|text| text.trim_end().split_once(' '));
        Ok(twice.filter(|(one, other)| one == other).and_then(|(key, _)| key.parse().ok()))
    }

    /// Writes down which key seals: twice, because with a bit flipped it would be another key's fingerprint, and the right
    /// key would be refused.
    pub(super) fn set_key(&self, key: Fingerprint) -> Result<(), StoreError> {
        files::replace(&self.dir.join("key"), format!("{key} {key}\n").as_bytes())
    }

    /// Reads all of it, and shows each copy to `look` in passing: in no order, and none is kept.
    pub(super) fn read(&self, mut look: impl FnMut(&UserId, &StoredGrant)) -> Result<Found, StoreError> {
        let notes: Notes = self.parse("notes.json")?.unwrap_or_default();
        let alone: u64 = self.parse("sequence")?.unwrap_or(0);
        let sequence = notes.sequence.max(alone);
        let mut found = Found { marks: BTreeMap::new(), notes: notes.notes, sequence, unusable: Vec::new() };
        for entry in fs::read_dir(&self.dir).map_err(|error| files::io_error(&self.dir, error))? {
            let path = entry.map_err(|error| files::io_error(&self.dir, error))?.path();
            if !is_named_as_a_copy(&path) {
                continue;
            }
            match read_copy(&path) {
                Some(copy) if self.path(&copy.user) == path => {
                    found.sequence = found.sequence.max(copy.sequence);
                    look(&copy.user, &copy.record);
                    found.marks.insert(copy.user, MirrorDigest::of(&copy.record));
                }
                _ => found.unusable.push(path),
            }
        }
        Ok(found)
    }

    /// The copy of `user`, where there is one that parses.
    pub(super) fn get(&self, user: &UserId) -> Option<StoredGrant> {
        read_copy(&self.path(user)).filter(|copy| copy.user == *user).map(|copy| copy.record)
    }

    /// Writes the copy of `user`, as of the commit with the number `sequence`.
    pub(super) fn write(&self, user: &UserId, record: &StoredGrant, sequence: u64) -> Result<(), StoreError> {
        let copy = Copy { user: user.clone(), sequence, record: record.clone() };
        let json = serde_json::to_vec(&copy).expect("text, numbers and times are JSON");
        files::replace(&self.path(user), &json)
    }

    /// Deletes the copy of `user`; `false` where there was none.
    pub(super) fn remove(&self, user: &UserId) -> Result<bool, StoreError> {
        files::remove(&self.path(user))
    }

    /// Writes down a commit that no copy tells of, such as an erasure.
    pub(super) fn set_sequence(&self, sequence: u64) -> Result<(), StoreError> {
        files::replace(&self.dir.join("sequence"), sequence.to_string().as_bytes())
    }

    /// Writes the copy of all notes.
    pub(super) fn set_notes(&self, notes: &BTreeMap<String, String>, sequence: u64) -> Result<(), StoreError> {
        let notes = Notes { sequence, notes: notes.clone() };
        let json = serde_json::to_vec(&notes).expect("texts and a number are JSON");
        files::replace(&self.dir.join("notes.json"), &json)
    }

    fn parse<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let content = files::read(&self.dir.join(name))?;
        Ok(content.and_then(|json| serde_json::from_slice(&json).ok()))
    }

    /// The file of `user`, named by a hash: user ids hold characters that not every file system takes, and may be
    /// people's addresses.
    pub(super) fn path(&self, user: &UserId) -> PathBuf {
        self.dir.join(format!("{:x}.json", Sha256::digest(user.as_str())))
    }
}

fn read_copy(path: &Path) -> Option<Copy> {
    fs::read(path).ok().and_then(|json| serde_json::from_slice(&json).ok())
}

fn is_named_as_a_copy(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".json"));
    name.is_some_and(|name| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()))
}
