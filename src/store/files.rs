//! Durable file operations: what they wrote survives a power failure.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::StoreError;

/// Converts an operating system error about `path`.
pub(super) fn io_error(path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { path: path.to_owned(), uid: uid(), source }
}

/// What an operator can do about `error`.
pub(super) fn remedy(error: &io::Error, uid: Option<u32>) -> String {
    let this_user = uid.map_or_else(|| "this user".into(), |uid| format!("uid {uid}"));
    match error.kind() {
        ErrorKind::PermissionDenied => format!("give {this_user} read and write access to it, or set store.path"),
        ErrorKind::ReadOnlyFilesystem => format!("mount the volume writable for {this_user}, or set store.path"),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free space on its volume".into(),
        _ => "check its volume".into(),
    }
}

/// Whether freeing space on the volume resolves `error`.
pub(super) fn is_full(error: &StoreError) -> bool {
    let StoreError::Io { source, .. } = error else { return false };
    matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// The path of the sibling of `path` whose name has `suffix` appended.
pub(super) fn sibling(path: &Path, suffix: &str) -> PathBuf {
    // `components` drops a trailing slash, which would put the result inside the directory.
    let mut name = OsString::from(path.components().as_path());
    name.push(suffix);
    name.into()
}

/// Creates a directory and its missing parents, accessible to the owner alone, and syncs each.
pub(super) fn create_private_dir(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = parent(path);
    create_private_dir(parent)?;
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if !path.is_dir() => Err(io_error(path, error)),
        _ => sync_dir(parent),
    }
}

/// The directory that contains `path`.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the entries of a directory durable.
pub(super) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    match File::open(path).and_then(|dir| dir.sync_all()) {
        // Some network file systems cannot sync a directory; they write its entries at once.
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        other => other.map_err(|error| io_error(path, error)),
    }
}

/// Makes the content of a file durable.
pub(super) fn sync_file(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| io_error(path, error))
}

/// Replaces a file atomically, readable by the owner alone: after a crash it has either the old content or the new.
pub(super) fn replace(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let temporary = temporary(path);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| io_error(path, error))?;
    sync_dir(parent(path))
}

/// Appends to a file, readable by the owner alone, and makes that durable. Returns its length.
pub(super) fn append(path: &Path, content: &[u8]) -> Result<u64, StoreError> {
    let is_new = !path.exists();
    let write = || {
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        file.write_all(content)?;
        file.sync_data()?;
        Ok(file.metadata()?.len())
    };
    let length = write().map_err(|error| io_error(path, error))?;
    if is_new {
        sync_dir(parent(path))?;
    }
    Ok(length)
}

/// Deletes a file, and the temporary file that a crash may have left. Returns `false` if there was no file.
pub(super) fn remove(path: &Path) -> Result<bool, StoreError> {
    let delete = |path: &Path| match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error(path, error)),
    };
    let had_temporary = delete(&temporary(path))?;
    let existed = delete(path)?;
    if had_temporary || existed {
        sync_dir(parent(path))?;
    }
    Ok(existed)
}

/// Reads a file; `None` if it does not exist.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path, error)),
    }
}

fn temporary(path: &Path) -> PathBuf {
    path.with_extension("tmp")
}

/// The effective user id. The standard library does not offer it, and calling libc would need `unsafe`.
fn uid() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}
