//! Sealing every grant with another key, in the background, beside calls and renewals.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::inbound::admin::Rotation;
use crate::store::keyring::Fingerprint;
use crate::store::{StoreError, TokenStore};

/// The note that tells the next process which rotation was under way, by the key's fingerprint.
const UNDER_WAY: &str = "rotation";
/// How often a rotation that failed, because the disk is full say, is gone on with.
const RETRY: Duration = Duration::from_secs(1);

/// The one rotation that may be under way.
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

    /// Goes on with what the last process left unfinished.
    pub(super) async fn resume(&mut self) {
        let first = self.state.borrow().key;
        if self.store.note(UNDER_WAY).await.is_ok_and(|left| left.is_some_and(|key| key == first.to_string())) {
            tracing::info!(key = %first, "a rotation of keys was under way and goes on");
            self.run(first);
        }
    }

    /// Begins a rotation to the key that seals by now. One that is under way gives way to it.
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
                tracing::info!(unreadable = done.unreadable, key = %state.borrow().key, "all grants are sealed with the first key");
                state.send_modify(|rotation| (rotation.running, rotation.error) = (false, None));
                return;
            }
            // The process ends; the next one goes on.
            Err(StoreError::Closed) => return,
            Err(error) => {
                tracing::error!(%error, "the grants could not all be sealed anew, which is tried again");
                state.send_modify(|rotation| rotation.error = Some(error.to_string()));
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
