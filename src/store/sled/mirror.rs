//! The mirror: a second copy of each grant in one small file per user, readable without the database.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::domain::account::UserId;
use crate::store::keyring::Fingerprint;
use crate::store::stored_grant::StoredGrant;
use crate::store::{StoreError, files};

/// The directory `<path>.copies/`. This value holds the lock of the whole store.
pub(super) struct Mirror {
    pub(super) dir: PathBuf,
    _lock: File,
}

/// The content of the mirror, without the records themselves.
pub(super) struct MirrorContents {
    /// A digest of each mirrored record that parses.
    pub(super) digests: BTreeMap<UserId, MirrorDigest>,
    /// The notes; empty if their file is missing or does not parse.
    pub(super) notes: BTreeMap<String, String>,
    /// The highest commit number that any file of the mirror contains.
    pub(super) sequence: u64,
    /// Files that are named like mirrored records but do not parse.
    pub(super) unreadable: Vec<PathBuf>,
}

/// Identifies a mirrored record, at a twentieth of its size, so that the database can be compared with it.
pub(super) struct MirrorDigest {
    generation: u64,
    updated_at: Timestamp,
    digest: [u8; 32],
}

impl MirrorDigest {
    fn of(record: &StoredGrant) -> Self {
        let digest = Sha256::digest(record.to_json()).into();
        Self { generation: record.generation(), updated_at: record.updated_at(), digest }
    }

    /// Whether `record` is byte for byte the mirrored one.
    pub(super) fn matches(&self, record: &StoredGrant) -> bool {
        self.digest == <[u8; 32]>::from(Sha256::digest(record.to_json()))
    }

    /// Whether `record` is older than the mirrored one. Mirror files are written after the database, so something other
    /// than adsidecar put such a record there. Generation and time are both compared, because a login after a logout
    /// restarts the generations.
    pub(super) fn is_newer_than(&self, record: &StoredGrant) -> bool {
        record.generation() < self.generation && record.updated_at() <= self.updated_at
    }
}

/// The content of one user's mirror file.
#[derive(Serialize, Deserialize)]
struct MirrorFile {
    user: UserId,
    /// The number of the commit that stored the record.
    sequence: u64,
    record: StoredGrant,
}

/// The content of the notes' mirror file.
#[derive(Default, Serialize, Deserialize)]
struct Notes {
    sequence: u64,
    notes: BTreeMap<String, String>,
}

impl Mirror {
    /// Creates the directory if it is missing, and takes the lock of the whole store. sled's own lock is not enough: it
    /// is released before a damaged database can be moved aside.
    pub(super) fn open(store: &Path) -> Result<Self, StoreError> {
        let dir = files::sibling(store, ".copies");
        files::create_private_dir(&dir)?;
        let path = dir.join("lock");
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(&path).map_err(|error| files::io_error(&path, error))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(StoreError::Locked { path: store.to_owned() }),
            Err(TryLockError::Error(error)) => Err(files::io_error(&path, error)),
        }
    }

    /// Reads which key sealed last; `None` for a new store, or if the file's content is damaged.
    pub(super) fn key(&self) -> Result<Option<Fingerprint>, StoreError> {
        let content = files::read(&self.dir.join("key"))?.and_then(|content| String::from_utf8(content).ok());
        let twice = content.as_deref().and_then(|text| text.trim_end().split_once(' '));
        Ok(twice.filter(|(one, other)| one == other).and_then(|(key, _)| key.parse().ok()))
    }

    /// Records which key seals from now on. The fingerprint is written twice: a flipped bit in a single one would name
    /// another key, and the right key would be refused.
    pub(super) fn set_key(&self, key: Fingerprint) -> Result<(), StoreError> {
        files::replace(&self.dir.join("key"), format!("{key} {key}\n").as_bytes())
    }

    /// Reads the whole mirror. Calls `visit` with each record, in no particular order, and keeps only its digest.
    pub(super) fn read(&self, mut visit: impl FnMut(&UserId, &StoredGrant)) -> Result<MirrorContents, StoreError> {
        let notes: Notes = self.parse("notes.json")?.unwrap_or_default();
        let last_erasure: u64 = self.parse("sequence")?.unwrap_or(0);
        let sequence = notes.sequence.max(last_erasure);
        let mut contents =
            MirrorContents { digests: BTreeMap::new(), notes: notes.notes, sequence, unreadable: Vec::new() };
        for entry in fs::read_dir(&self.dir).map_err(|error| files::io_error(&self.dir, error))? {
            let path = entry.map_err(|error| files::io_error(&self.dir, error))?.path();
            if !has_mirror_file_name(&path) {
                continue;
            }
            match read_file(&path) {
                Some(file) if self.path(&file.user) == path => {
                    contents.sequence = contents.sequence.max(file.sequence);
                    visit(&file.user, &file.record);
                    contents.digests.insert(file.user, MirrorDigest::of(&file.record));
                }
                _ => contents.unreadable.push(path),
            }
        }
        Ok(contents)
    }

    /// Reads the mirrored record of `user`; `None` if there is none or it does not parse.
    pub(super) fn get(&self, user: &UserId) -> Option<StoredGrant> {
        read_file(&self.path(user)).filter(|file| file.user == *user).map(|file| file.record)
    }

    /// Writes the mirror file of `user` for the commit with the number `sequence`.
    pub(super) fn write(&self, user: &UserId, record: &StoredGrant, sequence: u64) -> Result<(), StoreError> {
        let file = MirrorFile { user: user.clone(), sequence, record: record.clone() };
        let json = serde_json::to_vec(&file).expect("text, numbers and times are JSON");
        files::replace(&self.path(user), &json)
    }

    /// Deletes the mirror file of `user`. Returns `false` if there was none.
    pub(super) fn remove(&self, user: &UserId) -> Result<bool, StoreError> {
        files::remove(&self.path(user))
    }

    /// Records the number of a commit that no mirror file contains, such as that of an erasure.
    pub(super) fn set_sequence(&self, sequence: u64) -> Result<(), StoreError> {
        files::replace(&self.dir.join("sequence"), sequence.to_string().as_bytes())
    }

    /// Writes all notes to the mirror.
    pub(super) fn set_notes(&self, notes: &BTreeMap<String, String>, sequence: u64) -> Result<(), StoreError> {
        let notes = Notes { sequence, notes: notes.clone() };
        let json = serde_json::to_vec(&notes).expect("texts and a number are JSON");
        files::replace(&self.dir.join("notes.json"), &json)
    }

    fn parse<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let content = files::read(&self.dir.join(name))?;
        Ok(content.and_then(|json| serde_json::from_slice(&json).ok()))
    }

    /// The path of the mirror file of `user`. The name is a hash, because user ids may be e-mail addresses and may
    /// contain characters that some file systems reject.
    pub(super) fn path(&self, user: &UserId) -> PathBuf {
        self.dir.join(format!("{:x}.json", Sha256::digest(user.as_str())))
    }
}

fn read_file(path: &Path) -> Option<MirrorFile> {
    fs::read(path).ok().and_then(|json| serde_json::from_slice(&json).ok())
}

fn has_mirror_file_name(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".json"));
    name.is_some_and(|name| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()))
}
