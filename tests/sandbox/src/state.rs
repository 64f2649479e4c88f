//! What all listeners of the sandbox share.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};

use adsidecar::domain::clock::Clock;

use super::world::World;
use super::{Addresses, grants_file, test_endpoints};

/// State behind every listener.
pub(super) struct SandboxState {
    pub(super) world: Mutex<World>,
    pub(super) clock: Clock,
    pub(super) ca_pem: String,
    pub(super) addresses: Addresses,
    pub(super) auto_consent: bool,
    pub(super) rough: bool,
    pub(super) grants_file: Option<(PathBuf, Mutex<File>)>,
    pub(super) events: test_endpoints::Events,
    pub(super) connections: AtomicU64,
}

impl SandboxState {
    /// The world, locked. A poisoned lock is ignored, so that the panic of one test does not hide behind it.
    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what has changed to disk, if the grants are to be kept.
    pub(super) fn keep_grants(&self) {
        let Some((path, file)) = &self.grants_file else { return };
        // Locked first, so that the changes are written in the order in which they are taken.
        let file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = self.world().take_changes();
        if let Err(error) = grants_file::append(&file, &changes) {
            // A standard error that is gone is no reason to fail.
            let _ = writeln!(std::io::stderr(), "{}: {error}; the grants end with this process", path.display());
        }
    }
}
