//! sled 0.34, behind what it needs to be trusted with a refresh token.
//!
//! - It leaves `snap.*.generating` when it dies while it opens, takes that file for a snapshot the next time, and never
//!   opens again. The file has never been renamed, so it is never the live one: it is deleted before each open.
//! - Its `flush` does not reach the disk (`sync_file_range`): `db` is synced through a descriptor of our own.
//! - Values above a quarter of a segment become files under `blobs/`, which it never syncs at all: we do.
//! - A sync that failed once may succeed the next time without having written anything, because the kernel then takes
//!   the pages for clean: after a failure the file is written over with its own content.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::{StoreError, files};
use crate::domain::account::UserId;
use crate::store::stored_grant::{StoredGrant, StoredGrantError};

/// sled's page cache. Its default is 1 GB. To read a leaf again costs less than the sync of a write.
const CACHE_BYTES: u64 = 1 << 20;

/// sled looks at what is in its cache at each 64th access to one of the 256 parts of it, and not before: what is read once
/// stays in memory, which would be all of a database of 10,000 users. A leaf holds 8 to 16 records, so that with this many
/// accesses to each its part is looked at.
const ACCESSES: usize = 8;

/// sled's default. A leaf holds up to 16 records of up to 6.5 KB (both tokens at LWA's limit of 2,048 bytes) and is
/// rewritten as one value, which this keeps below a quarter of a segment: no value becomes a file of its own. Written
/// into each database; another number does not open it.
const SEGMENT_BYTES: usize = 512 << 10;

/// sled's threads give its lock up a moment after the database was dropped: 100 tries of 10 ms.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Where the number of the last commit lies, in sled's default tree.
const SEQUENCE: &str = "sequence";

/// The open database.
pub(super) struct Database {
    path: PathBuf,
    db: sled::Db,
    grants: sled::Tree,
    notes: sled::Tree,
    /// Our own descriptor of `db`, to sync it.
    log: File,
    /// Rises with each commit.
    sequence: u64,
    /// Files under `blobs/` that are on disk. Their names are never used twice.
    synced_blobs: HashSet<OsString>,
}

/// A record as it lies in the database, or why it does not parse.
pub(super) type Stored = Result<StoredGrant, StoredGrantError>;

impl Database {
    /// Opens the database in the directory `path`, or makes it. `after_failure`: a write of this process failed before.
    pub(super) fn open(path: &Path, after_failure: bool) -> Result<Self, StoreError> {
        files::create_private_dir(path)?;
        remove_unfinished_snapshots(path)?;
        let db_path = path.join("db");
        if after_failure && db_path.exists() {
            write_over(&db_path).map_err(|error| files::io_error(&db_path, error))?;
        }
        let db = open_sled(path)?;
        let tree = |name| db.open_tree(name).map_err(|error| fault(path, error));
        let (grants, notes) = (tree("grants")?, tree("notes")?);
        let sequence = db.get(SEQUENCE).map_err(|error| fault(path, error))?;
        let sequence = sequence.and_then(|bytes| Some(u64::from_be_bytes(bytes.as_ref().try_into().ok()?)));
        let log = File::open(&db_path).map_err(|error| files::io_error(&db_path, error))?;
        let synced_blobs = HashSet::new();
        let sequence = sequence.unwrap_or(0);
        let mut database = Self { path: path.to_owned(), db, grants, notes, log, sequence, synced_blobs };
        database.sync()?;
        files::sync_file(&path.join("conf"))?;
        files::sync_dir(path)?;
        files::sync_dir(files::parent(path))?;
        Ok(database)
    }

    /// The record of `user`.
    pub(super) fn get(&self, user: &UserId) -> Result<Option<Stored>, StoreError> {
        let found = self.grants.get(user.as_str()).map_err(|error| self.fault(error))?;
        Ok(found.map(|json| StoredGrant::parse(&json)))
    }

    /// Puts `record` in the place of what is stored for `user`; on disk after [`commit`](Self::commit).
    pub(super) fn put(&self, user: &UserId, record: &StoredGrant) -> Result<(), StoreError> {
        self.grants.insert(user.as_str(), record.to_json()).map(drop).map_err(|error| self.fault(error))
    }

    /// Takes the record of `user` out; off the disk after [`commit`](Self::commit).
    pub(super) fn remove(&self, user: &UserId) -> Result<bool, StoreError> {
        self.grants.remove(user.as_str()).map(|old| old.is_some()).map_err(|error| self.fault(error))
    }

    /// All records by user, one after the other: ten thousand of them at once are 20 MiB.
    pub(super) fn records(&self) -> impl Iterator<Item = Result<(UserId, Stored), StoreError>> {
        self.raw().map(|entry| entry.map(|(user, json)| (user, StoredGrant::parse(&json))))
    }

    /// The same as bytes. A key that is no user id was not written by us, and is left alone.
    pub(super) fn raw(&self) -> impl Iterator<Item = Result<(UserId, sled::IVec), StoreError>> {
        let entries = self.grants.iter().map(|entry| {
            let (key, json) = entry?;
            (0..ACCESSES).try_for_each(|_| self.grants.get(&key).map(drop))?;
            Ok((key, json))
        });
        entries.filter_map(|entry| match entry {
            Ok((key, json)) => std::str::from_utf8(&key).ok()?.parse().ok().map(|user| Ok((user, json))),
            Err(error) => Some(Err(self.fault(error))),
        })
    }

    /// All notes.
    pub(super) fn notes(&self) -> Result<BTreeMap<String, String>, StoreError> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let pair = |entry: sled::Result<(sled::IVec, sled::IVec)>| entry.map(|(key, value)| (text(&key), text(&value)));
        self.notes.iter().map(pair).collect::<Result<_, _>>().map_err(|error| self.fault(error))
    }

    /// Puts a note; on disk after [`commit`](Self::commit).
    pub(super) fn put_note(&self, key: &str, value: &str) -> Result<(), StoreError> {
        self.notes.insert(key, value).map(drop).map_err(|error| self.fault(error))
    }

    /// The number of the last commit; 0 for a new database.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The next commit's number will be above `sequence`.
    pub(super) fn raise_sequence(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
    }

    /// Puts everything before this call on disk, under a new number, which it returns.
    pub(super) fn commit(&mut self) -> Result<u64, StoreError> {
        self.sequence = self.sequence.saturating_add(1);
        // Written after what it numbers: a log that ends early has lost the number too.
        self.db.insert(SEQUENCE, &self.sequence.to_be_bytes()).map_err(|error| self.fault(error))?;
        self.sync()?;
        Ok(self.sequence)
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.db.flush().map_err(|error| self.fault(error))?;
        self.sync_blobs()?;
        self.log.sync_all().map_err(|error| files::io_error(&self.path.join("db"), error))
    }

    /// Syncs the files under `blobs/` that are new, before the log that names them.
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
                // sled's own threads delete those that are no longer needed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => other.map_err(|error| files::io_error(&path, error))?,
            }
        }
        files::sync_dir(&dir)?;
        self.synced_blobs = present;
        Ok(())
    }

    fn fault(&self, error: sled::Error) -> StoreError {
        fault(&self.path, error)
    }
}

/// Moves a damaged database out of the way, and says where it is. Nothing is deleted.
pub(super) fn set_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let names = (1..).map(|n| if n == 1 { format!(".corrupt-{time}") } else { format!(".corrupt-{time}-{n}") });
    let mut places = names.map(|name| files::beside(path, &name)).filter(|place| !place.exists());
    let place = places.next().expect("an endless row of names has a free one");
    fs::rename(path, &place).map_err(|error| files::io_error(path, error))?;
    files::sync_dir(files::parent(path))?;
    Ok(place)
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
    for _ in 1..LOCK_TRIES {
        match config.open().map_err(|error| fault(path, error)) {
            Err(StoreError::Held { .. }) => thread::sleep(LOCK_PAUSE),
            other => return other,
        }
    }
    config.open().map_err(|error| fault(path, error))
}

/// Writes each byte of a file over itself, so that the kernel takes its pages for changed, and syncs it.
fn write_over(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    for _ in 0..LOCK_TRIES {
        // Not beside threads of sled that still write.
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

fn fault(path: &Path, error: sled::Error) -> StoreError {
    let (path, reason) = (path.to_owned(), error.to_string());
    match error {
        sled::Error::Io(error) if reason.contains("could not acquire lock") => {
            drop(error);
            StoreError::Held { path }
        }
        // Files that are shorter than they should be, or gone.
        sled::Error::Io(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::NotFound) => {
            StoreError::Damaged { path, reason }
        }
        sled::Error::Io(error) => files::io_error(&path, error),
        sled::Error::Unsupported(_) => StoreError::Engine { path, reason },
        sled::Error::Corruption { .. } | sled::Error::ReportableBug(_) | sled::Error::CollectionNotFound(_) => {
            StoreError::Damaged { path, reason }
        }
    }
}
