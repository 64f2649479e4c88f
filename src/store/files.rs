//! Files that survive a power cut.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::StoreError;

/// Turns what the operating system says about `path` into our error.
pub(super) fn io_error(path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { path: path.to_owned(), uid: uid(), source }
}

/// What an operator can do about `error`.
pub(super) fn cure(error: &io::Error, uid: Option<u32>) -> String {
    let who = uid.map_or_else(|| "this user".into(), |uid| format!("uid {uid}"));
    match error.kind() {
        ErrorKind::PermissionDenied => format!("let {who} read and write it, or set store.path"),
        ErrorKind::ReadOnlyFilesystem => format!("mount the volume writable for {who}, or set store.path"),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free space on its volume".into(),
        _ => "check its volume".into(),
    }
}

/// Whether `error` ends as soon as somebody frees space.
pub(super) fn is_full(error: &StoreError) -> bool {
    let StoreError::Io { source, .. } = error else { return false };
    matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// The path beside `path` whose name ends in `suffix`.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    // Through the components, because a trailing slash would put it inside.
    let mut name = OsString::from(path.components().as_path());
    name.push(suffix);
    name.into()
}

/// Makes a directory and its missing parents, for the owner alone, and puts each on disk.
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

/// The directory that `path` lies in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Puts the names in a directory on disk.
pub(super) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    match File::open(path).and_then(|dir| dir.sync_all()) {
        // Some network file systems cannot do that for a directory, and write names at once instead.
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        other => other.map_err(|error| io_error(path, error)),
    }
}

/// Puts the content of a file on disk.
pub(super) fn sync_file(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| io_error(path, error))
}

/// Writes a file, for the owner alone, so that after a crash it holds either all of the new content or all of the old.
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

/// Deletes a file and what a crash may have left of writing it; `false` where there was none.
pub(super) fn remove(path: &Path) -> Result<bool, StoreError> {
    let delete = |path: &Path| match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error(path, error)),
    };
    let half_written = delete(&temporary(path))?;
    let existed = delete(path)?;
    if half_written || existed {
        sync_dir(parent(path))?;
    }
    Ok(existed)
}

/// A file's content; `None` where there is no such file.
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

/// The effective user id. The standard library does not tell it, and a call of our own would need `unsafe`.
fn uid() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}
