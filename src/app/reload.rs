//! Reading the configuration again: when somebody asks, and when one of its files changed.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::{self, Config, Sources};

/// How often the files are looked at. A look is one `stat` per file, which follows the links that the kubelet swaps when a
/// Secret changes; watching directories instead would have to follow them by itself.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The files of a configuration, as they were when it was last read.
pub(super) struct Watched {
    sources: Sources,
    seen: Vec<(PathBuf, Option<Stamp>)>,
}

/// Which file a path leads to, and which content, without reading it.
type Stamp = (u64, u64, i64, i64, u64);

impl Watched {
    pub(super) fn new(sources: Sources) -> Self {
        let mut watched = Self { sources, seen: Vec::new() };
        watched.look();
        watched
    }

    /// Reads the configuration, and remembers the files as they are now.
    pub(super) fn read(&mut self) -> Result<Config, String> {
        // Looked at first: what changes while it is read is a change the next time.
        self.look();
        config::load(&self.sources).map_err(|problems| problems.to_string())
    }

    /// Whether a file is another than when the configuration was last read.
    pub(super) fn changed(&self) -> bool {
        self.seen.iter().any(|(path, stamp)| stamp_of(path) != *stamp)
    }

    fn look(&mut self) {
        let files = config::files(&self.sources).into_iter();
        self.seen = files.map(|path| (path.clone(), stamp_of(&path))).collect();
    }
}

fn stamp_of(path: &PathBuf) -> Option<Stamp> {
    let stamp = |meta: Metadata| (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size());
    std::fs::metadata(path).ok().map(stamp)
}

/// The keys of `new` that need a restart to differ from those of `old`.
pub(super) fn needs_restart(old: &Fixed, new: &Config) -> Result<(), String> {
    let new = Fixed::of(new);
    let differing: Vec<_> =
        old.0.iter().zip(&new.0).filter(|(old, new)| old != new).map(|((key, _), _)| *key).collect();
    if differing.is_empty() {
        return Ok(());
    }
    let keys = if differing == [KEYS] { "; `adsidecar key rotate` takes new keys into use without one" } else { "" };
    Err(format!(
        "{}: changed, which needs a restart{keys}; nothing of the new configuration was taken",
        differing.join(", ")
    ))
}

const KEYS: &str = "store.fernet_keys";

/// What cannot change while the process runs. The keys are compared by a hash, so that no second copy of them is kept.
pub(super) struct Fixed([(&'static str, String); 6]);

impl Fixed {
    pub(super) fn of(config: &Config) -> Self {
        Self([
            ("proxy.listen", format!("{:?}", config.proxy_listen)),
            ("proxy.socket_mode", format!("{:o}", config.socket_mode)),
            ("login.listen", format!("{:?}", config.login_listen)),
            ("admin.listen", format!("{:?}", config.admin_listen)),
            ("store.path", config.store.path.display().to_string()),
            (KEYS, config.fernet_keys.fingerprint()),
        ])
    }

    /// After a rotation: the keys of `config` are those in use.
    pub(super) fn takes_keys_of(&mut self, config: &Config) {
        let keys = self.0.iter_mut().find(|(key, _)| *key == KEYS).expect("it is in the list");
        keys.1 = config.fernet_keys.fingerprint();
    }
}
