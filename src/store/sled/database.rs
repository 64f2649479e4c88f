//! The sled 0.34 database, with workarounds for its durability defects.
//!
//! - If the process dies while sled opens, sled leaves `snap.*.generating`, mistakes that file for a snapshot at the
//!   next open, and never opens again. An unrenamed snapshot is never in use, so it is deleted before each open.
//! - sled's `flush` does not reach the disk (`sync_file_range`): we sync `db` through our own file descriptor.
//! - sled writes values above a quarter of a segment to files under `blobs/`, and never syncs them: we do.
//! - After a failed sync the kernel may mark the pages clean, so that the next sync succeeds without writing anything:
//!   after a failure the file is overwritten with its own content.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Bound;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::domain::account::UserId;
use crate::store::stored_grant::{ParsedRecord, StoredGrant};
use crate::store::{StoreError, files};

/// Capacity of sled's page cache, whose default is 1 GB. Reading a leaf again costs less than syncing a write.
const CACHE_BYTES: u64 = 1 << 20;

/// Number of reads per record in a full scan. sled evicts from a cache shard (of 256) only at every 64th access to it,
/// so after a single read all of a database of 10,000 users would stay in memory. A leaf holds 8 to 16 records: with
/// this many reads of each, every leaf triggers an eviction.
const READS_PER_RECORD: usize = 8;

/// sled's default segment size. A leaf holds up to 16 records of up to 6.5 KB (both tokens at LWA's limit of 2,048
/// bytes) and is rewritten as one value, which stays below a quarter of a segment, so that no value becomes a separate
/// file. Every database stores this number and does not open with another.
const SEGMENT_BYTES: usize = 512 << 10;

/// Attempts to take sled's lock, which its threads release only shortly after the database is dropped. With
/// [`LOCK_PAUSE`] between them, one second in total.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The key of the last commit's number in sled's default tree.
const SEQUENCE: &str = "sequence";

/// The open database.
pub(super) struct Database {
    path: PathBuf,
    db: sled::Db,
    grants: sled::Tree,
    notes: sled::Tree,
    /// The index of found accounts: `accounts_index.rs`.
    pub(super) accounts: sled::Tree,
    /// Our own file descriptor of `db`, used to sync it.
    log: File,
    /// Number of the last commit.
    sequence: u64,
    /// Files under `blobs/` that have been synced. sled never reuses their names.
    synced_blobs: HashSet<OsString>,
}

impl Database {
    /// Opens the database in the directory `path`, and creates it if it does not exist. `after_failure`: an earlier
    /// write of this process has failed.
    pub(super) fn open(path: &Path, after_failure: bool) -> Result<Self, StoreError> {
        files::create_private_dir(path)?;
        remove_unfinished_snapshots(path)?;
        let db_path = path.join("db");
        if after_failure && db_path.exists() {
            overwrite_in_place(&db_path).map_err(|error| files::io_error(&db_path, error))?;
        }
        let db = open_sled(path)?;
        let tree = |name| db.open_tree(name).map_err(|error| sled_error(path, error));
        let (grants, notes, accounts) = (tree("grants")?, tree("notes")?, tree("accounts")?);
        let sequence = db.get(SEQUENCE).map_err(|error| sled_error(path, error))?;
        let sequence = sequence.and_then(|bytes| Some(u64::from_be_bytes(bytes.as_ref().try_into().ok()?)));
        let log = File::open(&db_path).map_err(|error| files::io_error(&db_path, error))?;
        let synced_blobs = HashSet::new();
        let sequence = sequence.unwrap_or(0);
        let mut database = Self { path: path.to_owned(), db, grants, notes, accounts, log, sequence, synced_blobs };
        database.sync()?;
        files::sync_file(&path.join("conf"))?;
        files::sync_dir(path)?;
        files::sync_dir(files::parent(path))?;
        Ok(database)
    }

    /// Reads the record of `user`.
    pub(super) fn get(&self, user: &UserId) -> Result<Option<ParsedRecord>, StoreError> {
        let found = self.grants.get(user.as_str()).map_err(|error| self.sled_error(error))?;
        Ok(found.map(|json| StoredGrant::parse(&json)))
    }

    /// Reads the record of `user` as bytes.
    pub(super) fn get_raw(&self, user: &UserId) -> Result<Option<sled::IVec>, StoreError> {
        self.grants.get(user.as_str()).map_err(|error| self.sled_error(error))
    }

    /// Replaces the record of `user`; durable after [`commit`](Self::commit).
    pub(super) fn put(&self, user: &UserId, record: &StoredGrant) -> Result<(), StoreError> {
        self.grants.insert(user.as_str(), record.to_json()).map(drop).map_err(|error| self.sled_error(error))
    }

    /// Deletes the record of `user`, durably after [`commit`](Self::commit). Returns `false` if there was none.
    pub(super) fn remove(&self, user: &UserId) -> Result<bool, StoreError> {
        self.grants.remove(user.as_str()).map(|old| old.is_some()).map_err(|error| self.sled_error(error))
    }

    /// Iterates over all records without collecting them: ten thousand take 20 MiB.
    pub(super) fn records(&self) -> impl Iterator<Item = Result<(UserId, ParsedRecord), StoreError>> {
        self.raw().map(|entry| entry.map(|(user, json)| (user, StoredGrant::parse(&json))))
    }

    /// Iterates over all records as bytes. A key that is not a user id was not written by us and is skipped.
    pub(super) fn raw(&self) -> impl Iterator<Item = Result<(UserId, sled::IVec), StoreError>> {
        self.raw_after(None)
    }

    /// As [`raw`](Self::raw), from the first record after that of `after`.
    pub(super) fn raw_after(
        &self,
        after: Option<&UserId>,
    ) -> impl Iterator<Item = Result<(UserId, sled::IVec), StoreError>> {
        let start = after.map_or(Bound::Unbounded, |user| Bound::Excluded(user.as_str().as_bytes().to_vec()));
        let entries = self.grants.range((start, Bound::<Vec<u8>>::Unbounded)).map(|entry| {
            let (key, json) = entry?;
            (0..READS_PER_RECORD).try_for_each(|_| self.grants.get(&key).map(drop))?;
            Ok((key, json))
        });
        entries.filter_map(|entry| match entry {
            Ok((key, json)) => std::str::from_utf8(&key).ok()?.parse().ok().map(|user| Ok((user, json))),
            Err(error) => Some(Err(self.sled_error(error))),
        })
    }

    /// Reads all notes.
    pub(super) fn notes(&self) -> Result<BTreeMap<String, String>, StoreError> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let pair = |entry: sled::Result<(sled::IVec, sled::IVec)>| entry.map(|(key, value)| (text(&key), text(&value)));
        self.notes.iter().map(pair).collect::<Result<_, _>>().map_err(|error| self.sled_error(error))
    }

    /// Writes a note; durable after [`commit`](Self::commit).
    pub(super) fn put_note(&self, key: &str, value: &str) -> Result<(), StoreError> {
        self.notes.insert(key, value).map(drop).map_err(|error| self.sled_error(error))
    }

    /// Returns the number of the last commit; 0 for a new database.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Raises the commit number to at least `sequence`, so that the next commit's is above it.
    pub(super) fn raise_sequence(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
    }

    /// Makes all earlier changes durable under a new commit number, and returns that number.
    pub(super) fn commit(&mut self) -> Result<u64, StoreError> {
        self.sequence = self.sequence.saturating_add(1);
        // The number follows the changes that it counts: a truncated log has lost the number too.
        self.db.insert(SEQUENCE, &self.sequence.to_be_bytes()).map_err(|error| self.sled_error(error))?;
        self.sync()?;
        Ok(self.sequence)
    }

    /// Makes all earlier changes durable without a new commit number.
    pub(super) fn sync(&mut self) -> Result<(), StoreError> {
        self.db.flush().map_err(|error| self.sled_error(error))?;
        self.sync_blobs()?;
        self.log.sync_all().map_err(|error| files::io_error(&self.path.join("db"), error))
    }

    /// Syncs the new files under `blobs/`, which has to happen before the log that refers to them is synced.
    fn sync_blobs(&mut self) -> Result<(), StoreError> {
        let dir = self.path.join("blobs");
        let entries = fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries.map_err(|error| files::io_error(&dir, error))?;
        let present: HashSet<_> = entries.into_iter().map(|entry| entry.file_name()).collect();
        if present == self.synced_blobs {
            return Ok(());
        }
        for name in present.difference(&self.synced_blobs) {
            let path = dir.join(name);
            match File::open(&path).and_then(|blob| blob.sync_all()) {
                // sled's own threads delete files that are no longer needed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => other.map_err(|error| files::io_error(&path, error))?,
            }
        }
        files::sync_dir(&dir)?;
        self.synced_blobs = present;
        Ok(())
    }

    pub(super) fn sled_error(&self, error: sled::Error) -> StoreError {
        sled_error(&self.path, error)
    }
}

/// Moves a damaged database aside without deleting anything, and returns its new path.
pub(super) fn move_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let names = (1..).map(|n| if n == 1 { format!(".corrupt-{time}") } else { format!(".corrupt-{time}-{n}") });
    let mut free = names.map(|name| files::sibling(path, &name)).filter(|target| !target.exists());
    let target = free.next().expect("one of infinitely many names is free");
    fs::rename(path, &target).map_err(|error| files::io_error(path, error))?;
    files::sync_dir(files::parent(path))?;
    Ok(target)
}

fn remove_unfinished_snapshots(path: &Path) -> Result<(), StoreError> {
    let remove = || {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("snap.") && name.ends_with(".generating") {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    };
    remove().map_err(|error| files::io_error(path, error))
}

fn open_sled(path: &Path) -> Result<sled::Db, StoreError> {
    let config = sled::Config::new()
        .path(path)
        .mode(sled::Mode::LowSpace)
        .cache_capacity(CACHE_BYTES)
        .segment_size(SEGMENT_BYTES)
        .flush_every_ms(None);
    for _ in 1..LOCK_ATTEMPTS {
        match config.open().map_err(|error| sled_error(path, error)) {
            Err(StoreError::Locked { .. }) => thread::sleep(LOCK_PAUSE),
            other => return other,
        }
    }
    config.open().map_err(|error| sled_error(path, error))
}

/// Overwrites a file with its own content, so that the kernel marks its pages dirty, and syncs it.
fn overwrite_in_place(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    for _ in 0..LOCK_ATTEMPTS {
        // Wait for sled's threads, which may still be writing.
        if file.try_lock().is_ok() {
            break;
        }
        thread::sleep(LOCK_PAUSE);
    }
    file.try_lock()?;
    let mut buffer = vec![0; SEGMENT_BYTES];
    let mut offset = 0;
    loop {
        let length = file.read_at(&mut buffer, offset)?;
        if length == 0 {
            return file.sync_all();
        }
        file.write_all_at(&buffer[..length], offset)?;
        offset += length as u64;
    }
}

fn sled_error(path: &Path, error: sled::Error) -> StoreError {
    let (path, reason) = (path.to_owned(), error.to_string());
    match error {
        sled::Error::Io(error) if reason.contains("could not acquire lock") => {
            drop(error);
            StoreError::Locked { path }
        }
        // A file is truncated or missing.
        sled::Error::Io(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::NotFound) => {
            StoreError::Damaged { path, reason }
        }
        sled::Error::Io(error) => files::io_error(&path, error),
        sled::Error::Unsupported(_) => StoreError::UnusableDatabase { path, reason },
        sled::Error::Corruption { .. } | sled::Error::ReportableBug(_) | sled::Error::CollectionNotFound(_) => {
            StoreError::Damaged { path, reason }
        }
    }
}
