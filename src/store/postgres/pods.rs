//! Which processes use the database now, and which keys each of them can open records with.
//!
//! Each process says so every few seconds in a note of its own. A key must not seal before all of them have it.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_postgres::types::Type;

use super::connection::{OnDisconnect, Parameters};
use super::{KEY_NOTE, Postgres, column, first_row};
use crate::store::StoreError;
use crate::store::keyring::{Fingerprint, Keyring};

/// Interval at which a process says that it is alive, and after which it counts as gone, in seconds.
pub const PUBLISH: Duration = Duration::from_secs(10);
const LIVE_SECONDS: f64 = 35.0;
/// Notes of processes that ended without removing theirs are deleted after this many seconds.
const STALE_SECONDS: f64 = 3600.0;
/// The start of the name of each process's note.
const POD_NOTE: &str = "pod:";

/// A process that uses the database.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its host name, which in Kubernetes is the pod's, and its process id.
    pub name: String,
    /// The keys that it can open records with; the first one seals.
    pub keys: Vec<Fingerprint>,
    /// Its version.
    pub version: String,
    /// How long ago it was last heard of, in seconds.
    pub age: f64,
}

/// The content of a process's note.
#[derive(Serialize, Deserialize)]
struct PodNote {
    name: String,
    keys: Vec<String>,
    version: String,
}

impl Postgres {
    /// Says that this process is alive, and which keys it has. Returns the key that seals, as the last rotation noted
    /// it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn publish_pod(&self) -> Result<Option<Fingerprint>, StoreError> {
        const PUBLISH: &str = "INSERT INTO adsidecar_notes (name, value) \
                               VALUES ($1, extract(epoch FROM clock_timestamp())::bigint || ' ' || $2) \
                               ON CONFLICT (name) DO UPDATE SET value = excluded.value \
                               RETURNING (SELECT value FROM adsidecar_notes WHERE name = $3)";
        let keys = self.0.keyring.load().fingerprints().iter().map(Fingerprint::to_string).collect();
        let note = PodNote { name: pod_name(), keys, version: env!("CARGO_PKG_VERSION").to_owned() };
        let (name, value) = (self.note_name(), serde_json::to_string(&note).expect("texts are JSON"));
        let parameters: &Parameters<'_> = &[(&name, Type::TEXT), (&value, Type::TEXT), (&KEY_NOTE, Type::TEXT)];
        let rows = self.query(PUBLISH, parameters, OnDisconnect::Resend).await?;
        Ok(first_row::<Option<String>>(&rows, 0)?.and_then(|key| key.parse().ok()))
    }

    /// Says that this process is about to end.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written. The process then counts as gone half a minute later.
    pub async fn withdraw_pod(&self) -> Result<(), StoreError> {
        const WITHDRAW: &str = "DELETE FROM adsidecar_notes WHERE name = $1 RETURNING name";
        self.query(WITHDRAW, &[(&self.note_name(), Type::TEXT)], OnDisconnect::Resend).await.map(drop)
    }

    /// The processes that use the database now, and deletes the notes of those that ended long ago.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn pods(&self) -> Result<Vec<Pod>, StoreError> {
        const PODS: &str = "SELECT name, value, (extract(epoch FROM clock_timestamp()) \
                            - split_part(value, ' ', 1)::bigint)::float8 FROM adsidecar_notes \
                            WHERE starts_with(name, $1) ORDER BY name";
        const FORGET: &str = "DELETE FROM adsidecar_notes WHERE starts_with(name, $1) \
                              AND split_part(value, ' ', 1)::bigint < extract(epoch FROM clock_timestamp()) - $2 \
                              RETURNING name";
        self.query(FORGET, &[(&POD_NOTE, Type::TEXT), (&STALE_SECONDS, Type::FLOAT8)], OnDisconnect::Resend).await?;
        let mut pods = Vec::new();
        for row in self.query(PODS, &[(&POD_NOTE, Type::TEXT)], OnDisconnect::Resend).await? {
            let (value, age): (String, f64) = (column(&row, 1)?, column(&row, 2)?);
            let note = value.split_once(' ').and_then(|(_, json)| serde_json::from_str::<PodNote>(json).ok());
            let Some(note) = note.filter(|_| age < LIVE_SECONDS) else { continue };
            let keys = note.keys.iter().filter_map(|key| key.parse().ok()).collect();
            pods.push(Pod { name: note.name, keys, version: note.version, age });
        }
        Ok(pods)
    }

    /// The number of processes that use the database now.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn count_pods(&self) -> Result<usize, StoreError> {
        const COUNT: &str = "SELECT count(*) FROM adsidecar_notes WHERE starts_with(name, $1) \
                             AND split_part(value, ' ', 1)::bigint > extract(epoch FROM clock_timestamp()) - $2";
        let parameters: &Parameters<'_> = &[(&POD_NOTE, Type::TEXT), (&LIVE_SECONDS, Type::FLOAT8)];
        let rows = self.query(COUNT, parameters, OnDisconnect::Resend).await?;
        Ok(usize::try_from(first_row::<i64>(&rows, 0)?).unwrap_or(1))
    }

    /// Fails with [`StoreError::KeyMissing`] if a running process cannot open what the key `first` seals.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub(in crate::store) async fn require_key(&self, first: Fingerprint) -> Result<(), StoreError> {
        let lacking: Vec<_> = self.pods().await?.into_iter().filter(|pod| !pod.keys.contains(&first)).collect();
        if lacking.is_empty() {
            return Ok(());
        }
        let describe = |pod: &Pod| {
            let keys: Vec<_> = pod.keys.iter().map(Fingerprint::to_string).collect();
            format!("{} (has {}; seen {:.0} s ago)", pod.name, keys.join(", "), pod.age.max(0.0))
        };
        let pods = lacking.iter().map(describe).collect::<Vec<_>>().join("; ");
        Err(StoreError::KeyMissing { key: first, pods })
    }

    /// See [`TokenStore::add_keys`](crate::store::TokenStore::add_keys).
    pub(in crate::store) async fn add_keys(&self, keyring: &Keyring) -> Result<(), StoreError> {
        let first = self.0.keyring.load().first();
        self.0.keyring.store(Arc::new(keyring.sealing_with(first)));
        self.publish_pod().await?;
        self.retry_unknown().await
    }

    /// The key that seals now.
    pub fn first_key(&self) -> Fingerprint {
        self.0.keyring.load().first()
    }

    /// Says that this process is alive, and seals with the key that the last rotation made the first one, if this
    /// process has it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn publish_and_follow_rotation(&self) -> Result<(), StoreError> {
        let noted = self.publish_pod().await?;
        let ring = self.0.keyring.load_full();
        if let Some(first) = noted.filter(|key| *key != ring.first() && ring.fingerprints().contains(key)) {
            tracing::info!(key = %first, "the keys were rotated: this key encrypts from now on");
            self.0.keyring.store(Arc::new(ring.sealing_with(first)));
            self.publish_pod().await?;
        }
        Ok(())
    }

    fn note_name(&self) -> String {
        format!("{POD_NOTE}{}", self.0.owner)
    }
}

/// The host name, which in Kubernetes is the pod's name, and the process id.
fn pod_name() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}/{}", std::process::id())
}
