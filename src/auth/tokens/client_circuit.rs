//! A brake for answers of Login with Amazon that are about our client, and so affect all users: it refuses our client,
//! asks us to wait, or is down. While it does, adsidecar probes with one user's grant from time to time instead of
//! retrying for every user, so that a wrong secret or an outage does not cause a storm of calls. Afterwards the rate
//! grows slowly; and so does that of the background in a fleet that starts with a backlog.
//!
//! `invalid_client` (RFC 6749, section 5.2) and 429 are about the client. Any other error may be about one grant: one
//! that an operator must resolve counts as the client's once two users have met it with no success in between, one that
//! passes by itself once five have. All that is decided is in `brake`.
//!
//! Processes that share a store share the brake too: see [`TokenManager::call_permit`].

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::TokenManager;
use super::brake::{Brake, PROBE, held_back};
use super::refresh_task::jitter;
use crate::domain::grant::Outcome;
use crate::store::Postgres;

/// Whether LWA currently serves our client.
#[derive(Debug)]
pub(super) struct ClientCircuit {
    brake: Mutex<Brake>,
    /// Held by the refresh task that probes, while LWA refuses our client.
    probe: tokio::sync::Mutex<()>,
    begun: Instant,
}

/// Permission to call LWA: a guard while our client is refused, otherwise `None`.
pub(super) type ProbePermit<'a> = Option<tokio::sync::MutexGuard<'a, ()>>;

impl ClientCircuit {
    pub(super) fn new() -> Self {
        Self { brake: Mutex::default(), probe: tokio::sync::Mutex::default(), begun: Instant::now() }
    }

    /// The decisions. Never locked across a wait.
    pub(super) fn brake(&self) -> MutexGuard<'_, Brake> {
        self.brake.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now, as the rate after an outage counts it.
    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Waits for permission to probe, or for the turn of a call. Returns at once unless LWA refuses our client, or did,
    /// or the call `is_background` and the fleet has just started with a backlog.
    async fn permit(&self, is_background: bool) -> ProbePermit<'_> {
        if self.brake().is_refused() {
            let permit = self.probe.lock().await;
            if self.brake().is_refused() {
                return Some(permit);
            }
            // LWA serves our client again, and so the waiters, at the rate that it takes.
        }
        let turn = self.brake().turn(self.elapsed(), is_background);
        sleep_until(self.begun + turn).await;
        None
    }

    /// Clears the cached rejection after a configuration change, so that the next refresh calls LWA.
    pub(super) fn forget(&self) {
        self.brake().forget();
    }
}

impl TokenManager {
    /// Waits for permission to call LWA; `is_background` if no caller waits. If processes share the store, one of them
    /// probes for all.
    ///
    /// # Errors
    /// The failure of the refresh while the brake holds.
    pub(super) async fn call_permit(&self, is_background: bool) -> Result<ProbePermit<'_>, Outcome> {
        let circuit = &self.0.circuit;
        let permit = circuit.permit(is_background).await;
        if permit.is_some()
            && circuit.brake().holds(self.0.clock.reading()).is_none()
            && let Some(shared) = self.0.store.shared()
            && let Ok(Some((code, wait))) = self.timed("brake", shared.claim_probe(PROBE)).await
        {
            circuit.brake().hold(known_code(&code), wait, self.0.clock.reading());
        }
        match circuit.brake().holds(self.0.clock.reading()) {
            None => Ok(permit),
            Some((code, wait)) => Err(held_back(code, wait, self.0.store.shared().is_some(), jitter())),
        }
    }

    /// Tells the other processes that the brake holds, or no longer does. If it fails, each of them finds out by
    /// itself.
    pub(super) async fn share_brake(&self) {
        let Some(shared) = self.0.store.shared() else { return };
        let held = self.0.circuit.brake().holds(self.0.clock.reading());
        let _ = match held {
            Some((code, wait)) => self.timed("brake", shared.set_brake(code, wait)).await,
            None => {
                let released = self.timed("brake", shared.release_brake()).await;
                self.share_rate(shared).await;
                released
            }
        };
    }

    /// The brake that all processes share is released: from now on they share the rate that grows after an outage.
    pub(super) async fn share_rate(&self, shared: &Postgres) {
        // If it fails, this process has the rate of one that is alone.
        let processes = self.timed("brake", shared.count_pods()).await.unwrap_or(1);
        let elapsed = self.0.circuit.elapsed();
        self.0.circuit.brake().share(processes, jitter(), elapsed);
    }

    /// All processes were away, and may start with very many refreshes to make: they share a rate that grows as after
    /// an outage, so that Login with Amazon can say in time that it is too high.
    pub(super) async fn work_off_backlog(&self, shared: &Postgres) {
        let processes = self.timed("brake", shared.count_pods()).await.unwrap_or(1);
        let elapsed = self.0.circuit.elapsed();
        self.0.circuit.brake().work_off(processes, jitter(), elapsed);
    }
}

/// The code of a failure as this process names it.
pub(super) fn known_code(code: &str) -> &'static str {
    crate::telemetry::metrics::REFRESH_FAILURES.into_iter().find(|known| *known == code).unwrap_or("server_error")
}
