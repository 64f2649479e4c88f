//! Encrypts every grant with another key, in the background, while requests and refreshes continue.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::inbound::admin::Rotation;
use crate::store::keyring::Fingerprint;
use crate::store::{StoreError, TokenStore};

/// The store note with the fingerprint of the key of a running rotation, so that the next process continues it.
const UNDER_WAY: &str = "rotation";
/// Interval for retrying a rotation that failed, for example because the disk is full.
const RETRY: Duration = Duration::from_secs(1);

/// Runs at most one rotation.
pub(super) struct Rotations {
    store: TokenStore,
    state: watch::Sender<Rotation>,
    task: Option<JoinHandle<()>>,
}

impl Rotations {
    pub(super) fn new(store: TokenStore, first: Fingerprint) -> Self {
        let state = watch::Sender::new(Rotation { key: first, running: false, left_at_first: 0, error: None });
        Self { store, state, task: None }
    }

    pub(super) fn watch(&self) -> watch::Receiver<Rotation> {
        self.state.subscribe()
    }

    /// Continues a rotation that the previous process did not complete.
    pub(super) async fn resume(&mut self) {
        let first = self.state.borrow().key;
        if self.store.note(UNDER_WAY).await.is_ok_and(|left| left.is_some_and(|key| key == first.to_string())) {
            tracing::info!(key = %first, "the previous process did not complete a key rotation; it continues");
            self.run(first);
        }
    }

    /// Starts a rotation to the first key, and cancels a running one.
    pub(super) async fn begin(&mut self, first: Fingerprint) -> Result<(), StoreError> {
        self.store.set_note(UNDER_WAY, first.to_string()).await?;
        self.run(first);
        Ok(())
    }

    fn run(&mut self, first: Fingerprint) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        let left_at_first = self.store.health().under_other_keys(first);
        self.state.send_replace(Rotation { key: first, running: true, left_at_first, error: None });
        let (store, state) = (self.store.clone(), self.state.clone());
        self.task = Some(tokio::spawn(async move { rotate(&store, &state).await }));
    }
}

async fn rotate(store: &TokenStore, state: &watch::Sender<Rotation>) {
    loop {
        let ended = match store.reseal().await {
            Ok(done) => store.set_note(UNDER_WAY, "").await.map(|()| done),
            Err(error) => Err(error),
        };
        match ended {
            Ok(done) => {
                let key = state.borrow().key;
                tracing::info!(unreadable = done.unreadable, %key, "all grants are encrypted with the first key");
                state.send_modify(|rotation| (rotation.running, rotation.error) = (false, None));
                return;
            }
            // The process ends; the next one continues.
            Err(StoreError::Closed) => return,
            Err(error) => {
                tracing::error!(%error, "the key rotation failed, and will be retried");
                state.send_modify(|rotation| rotation.error = Some(error.to_string()));
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
