//! Reloads the configuration: on request, and when one of its files has changed.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;

use super::rotation::Rotations;
use super::services::{ProcessState, Services};
use super::{adopt_configured, keyring, listener_limits};
use crate::auth::lwa::Lwa;
use crate::config::{self, Config, Sources};
use crate::inbound::admin::Asked;
use crate::server::Limits;
use crate::store::keyring::Fingerprint;
use crate::telemetry::log::{Dropped, LogHandle};

/// Interval for checking the files. A check is one `stat` per file, which follows the symlinks that the kubelet
/// replaces when a Secret changes; a directory watch would have to follow them itself.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Reloads the configuration and rotates keys while the listeners serve.
pub(super) struct ControlLoop {
    pub(super) watched: Option<Watched>,
    pub(super) asked: mpsc::Receiver<Asked>,
    pub(super) fixed: RestartOnly,
    pub(super) rotations: Rotations,
    pub(super) services: Arc<ArcSwap<Services>>,
    pub(super) limits: [Arc<ArcSwap<Limits>>; 3],
    pub(super) process: ProcessState,
    /// The keys in use. The first one seals, unless another process has rotated the keys of a shared store since.
    pub(super) keys: Vec<Fingerprint>,
    /// The first key of a configuration that was refused because that key does not encrypt yet.
    pub(super) awaited_key: Option<Fingerprint>,
    /// The number of dropped log lines that the log has reported.
    pub(super) told: Dropped,
}

impl ControlLoop {
    /// Returns when an operator asks the process to quit.
    pub(super) async fn run(&mut self) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = self.process.quit.cancelled() => return,
                // Sending the answer fails if the requester has gone.
                Some(asked) = self.asked.recv() => match asked {
                    Asked::Reload(answer) => drop(answer.send(self.reload().await)),
                    Asked::Rotate(key, answer) => drop(answer.send(self.rotate(&key).await)),
                },
                _ = look.tick() => {
                    self.tell_dropped();
                    self.process.page.hour.roll(self.process.clock.uptime(), &self.process.metrics);
                    let is_awaited = self.awaited_key.is_some_and(|key| key == self.first_key());
                    if is_awaited || self.watched.as_ref().is_some_and(Watched::changed) {
                        tracing::info!("a file of the configuration changed, or the keys were rotated");
                        // The result is logged and counted.
                        let _ = self.reload().await;
                    }
                }
            }
        }
    }

    /// Logs how many lines were dropped since it last did.
    fn tell_dropped(&mut self) {
        let dropped = self.process.log.as_ref().map(LogHandle::dropped).unwrap_or_default();
        if dropped != self.told {
            let (flood, sink) = (dropped.flood - self.told.flood, dropped.sink - self.told.sink);
            self.told = dropped;
            tracing::warn!(flood, sink, "log lines were dropped: there were too many of one kind, or nobody read them");
        }
    }

    async fn reload(&mut self) -> Result<(), String> {
        let reloaded = self.take_over().await;
        let now = self.process.clock.now().as_duration().as_secs_f64();
        self.process.metrics.reloaded(now, reloaded.is_ok());
        match &reloaded {
            Ok(()) => tracing::info!("the configuration was reloaded"),
            Err(error) => tracing::error!(%error, "the reload was refused; the previous configuration stays in use"),
        }
        reloaded
    }

    /// Loads the keys from the configuration, and begins to reseal every record with the first one. Its fingerprint
    /// must be `key`: the requester may read another configuration than this process.
    async fn rotate(&mut self, key: &str) -> Result<(), String> {
        let watched = self.watched.as_mut().ok_or("this process was started without configuration sources")?;
        let config = watched.read()?;
        let keyring = Arc::new(keyring(&config).map_err(|error| error.to_string())?);
        let first = keyring.first();
        if first.to_string() != key {
            return Err(format!(
                "the first key that this sidecar is configured with has the fingerprint {first}, not {key}: give both \
                 the same store.fernet_keys. Environment variables are read only at start: use a file, or restart it"
            ));
        }
        self.process.store.require_key(first).await.map_err(|error| error.to_string())?;
        let keys = keyring.fingerprints();
        self.process.store.rekey(keyring).await.map_err(|error| error.to_string())?;
        self.keys = keys;
        self.fixed.takes_keys_of(&config);
        self.rotations.begin(first).await.map_err(|error| error.to_string())?;
        // A reload was refused as long as this process had the old keys. The result is logged and counted.
        let _ = self.reload().await;
        Ok(())
    }

    async fn take_over(&mut self) -> Result<(), String> {
        let watched = self.watched.as_mut().ok_or("this process was started without configuration sources")?;
        let config = watched.read()?;
        self.take_added_keys(&config).await?;
        needs_restart(&self.fixed, &config)?;
        let lwa = Lwa::new(config.lwa.clone())?;
        let (tokens, metrics, limits, log) = (config.tokens.clone(), config.metrics, config.limits, config.log);
        let warnings = config.warnings.clone();
        let services = Services::new(config, lwa.clone(), &self.process).map_err(|error| error.to_string())?;
        // Nothing fails from here on.
        warnings.iter().for_each(|warning| tracing::warn!(%warning, "a value of the configuration needs attention"));
        self.services.store(Arc::new(services));
        for (current, limits) in self.limits.iter().zip(listener_limits(limits)) {
            current.store(Arc::new(limits));
        }
        if let Some(running) = &self.process.log {
            running.reconfigure(log);
        }
        self.process.metrics.reconfigure(metrics);
        self.process.tokens.reconfigure(tokens, lwa);
        tokio::spawn(adopt_configured(self.process.tokens.clone()));
        Ok(())
    }
}

impl ControlLoop {
    /// Takes keys of `config` into use that are added to the present ones: they open records from now on. Which key
    /// seals changes only by a rotation, because other processes may not have the new one yet: until then a
    /// configuration with another first key is refused.
    async fn take_added_keys(&mut self, config: &Config) -> Result<(), String> {
        let keyring = keyring(config).map_err(|error| error.to_string())?;
        let (new, first) = (keyring.fingerprints(), keyring.first());
        self.awaited_key = None;
        if !self.keys.iter().all(|key| new.contains(key)) {
            return Ok(());
        }
        if new.len() > self.keys.len() {
            let keyring = keyring.sealing_with(self.first_key());
            let keys = keyring.fingerprints();
            self.process.store.add_keys(Arc::new(keyring)).await.map_err(|error| error.to_string())?;
            self.keys = keys;
            tracing::info!("a Fernet key was added: it decrypts from now on");
        }
        if first != self.first_key() {
            self.awaited_key = Some(first);
            return Err(format!(
                "{KEYS}: every key decrypts, but the first one, {first}, does not encrypt yet: `adsidecar key rotate` \
                 takes it into use, and the rest of the new configuration with it"
            ));
        }
        self.fixed.takes_keys_of(config);
        Ok(())
    }

    /// The key that encrypts now. Another process may have rotated the keys of a shared store.
    fn first_key(&self) -> Fingerprint {
        self.process.store.shared().map_or(self.keys[0], |store| store.first_key())
    }
}

/// The files of a configuration, as they were when it was last read.
pub(super) struct Watched {
    sources: Sources,
    seen: Vec<(PathBuf, Option<FileVersion>)>,
}

/// Device, inode, modification time and size: they identify a file's content without reading it.
type FileVersion = (u64, u64, i64, i64, u64);

impl Watched {
    pub(super) fn new(sources: Sources) -> Self {
        let mut watched = Self { sources, seen: Vec::new() };
        watched.look();
        watched
    }

    /// Reads the configuration, and remembers the files as they are now.
    fn read(&mut self) -> Result<Config, String> {
        // Noted before reading: a change during the read counts as a change at the next check.
        self.look();
        config::load(&self.sources).map_err(|problems| problems.to_string())
    }

    /// Whether a file has changed since the configuration was last read.
    fn changed(&self) -> bool {
        self.seen.iter().any(|(path, stamp)| stamp_of(path) != *stamp)
    }

    fn look(&mut self) {
        let files = config::files(&self.sources).into_iter();
        self.seen = files.map(|path| (path.clone(), stamp_of(&path))).collect();
    }
}

fn stamp_of(path: &PathBuf) -> Option<FileVersion> {
    let stamp = |meta: Metadata| (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size());
    std::fs::metadata(path).ok().map(stamp)
}

/// Refuses a configuration that changes a key which needs a restart.
fn needs_restart(old: &RestartOnly, new: &Config) -> Result<(), String> {
    let new = RestartOnly::of(new);
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

/// The values that cannot change while the process runs, by key. Secrets are compared by a hash, so that no second copy
/// of them is kept.
pub(super) struct RestartOnly(Vec<(&'static str, String)>);

impl RestartOnly {
    pub(super) fn of(config: &Config) -> Self {
        Self(config.restart_only())
    }

    /// Notes after a rotation that the keys of `config` are in use.
    pub(super) fn takes_keys_of(&mut self, config: &Config) {
        for (own, new) in self.0.iter_mut().zip(config.restart_only()) {
            if own.0 == KEYS {
                *own = new;
            }
        }
    }
}
