//! Pending logins (started, not finished) and pending grants (received, not in use yet). They are kept in memory, and
//! in the store for the next process. If several processes share the store, any of them may continue a login: then the
//! store alone holds them.
//!
//! A pending grant is stored before anything else happens to it, because its code is spent. Pending logins are written
//! together and at most once a second, so that a flood of logins does not saturate the disk. (After a crash, logins
//! started in its last second must be restarted.) The end of a login is written at once: its state must not be accepted
//! a second time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, OnceCell};

use super::expiring_map::{ExpiringMap, hash, is_valid};
use super::outcome::{BeginError, LoginFailure, LoginOutcome};
use crate::domain::account::UserId;
use crate::domain::clock::Clock;
use crate::domain::secret::Secret;
use crate::store::{PendingGrant, Postgres, StoreError, TokenStore};

/// Rate limit for starting logins: burst size, and refill per second (`PER_SECOND`). Beyond it a flood would evict
/// pending logins.
const BURST: f64 = 2000.0;
const PER_SECOND: f64 = 20.0;
/// Interval for deleting expired entries when nothing else changes.
const SWEEP: Duration = Duration::from_secs(60);
/// Minimum time between two writes of the pending logins.
const PAUSE: Duration = Duration::from_secs(1);

/// Pending logins and pending grants. Survives a configuration reload.
#[derive(Debug)]
pub struct PendingLogins {
    coordination: Coordination,
    rate_limiter: Mutex<RateLimiter>,
    /// Grants that wait for confirmation, by the hash of their one-time id. In a shared store, only those that the
    /// store did not take.
    grants: Mutex<ExpiringMap<PendingGrant>>,
    /// The outcomes of finished logins, by the hash of their state.
    finished: Mutex<ExpiringMap<Arc<OnceCell<Finished>>>>,
    store: TokenStore,
}

/// Whether other processes may continue a login that this one started.
#[derive(Debug)]
enum Coordination {
    /// One process: pending logins are in its memory, and in the store for the next process.
    Local(LocalLogins),
    /// Several processes on one database, which alone holds the pending logins.
    Shared(Postgres),
}

/// The pending logins of the only process.
#[derive(Debug)]
struct LocalLogins {
    pending: Mutex<ExpiringMap<PendingLogin>>,
    changed: Notify,
    /// Held while pending logins are written, so that an older list never overwrites a newer one.
    writing: tokio::sync::Mutex<()>,
}

/// A pending login.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PendingLogin {
    pub(super) user: UserId,
    /// PKCE code verifier. The serialized text is encrypted as a whole.
    #[serde(with = "exposed")]
    pub(super) verifier: Secret,
    pub(super) return_to: Option<String>,
    pub(super) replace: bool,
    /// The hash of the cookie that binds it to a browser.
    pub(super) cookie: Option<String>,
}

/// How a login ended.
#[derive(Debug, Clone)]
pub(super) struct Finished {
    pub(super) outcome: Result<LoginOutcome, LoginFailure>,
    pub(super) return_to: Option<String>,
    /// The hash of the cookie that its callback carried; `None` for a login that a program started.
    pub(super) cookie: Option<String>,
}

impl Coordination {
    async fn open(store: &TokenStore) -> Self {
        if let Some(shared) = store.shared() {
            return Self::Shared(shared.clone());
        }
        let pending = match store.pending_logins().await {
            Ok(text) => text.and_then(|text| serde_json::from_str(text.expose()).ok()).unwrap_or_default(),
            Err(error) => {
                tracing::error!(%error, "pending logins cannot be read: users must restart them");
                ExpiringMap::default()
            }
        };
        Self::Local(LocalLogins {
            pending: Mutex::new(pending),
            changed: Notify::new(),
            writing: tokio::sync::Mutex::default(),
        })
    }
}

impl PendingLogins {
    /// Loads the pending logins of the previous process from `store`. `leftovers` returns its pending grants.
    pub async fn open(store: TokenStore) -> Self {
        Self {
            coordination: Coordination::open(&store).await,
            rate_limiter: Mutex::default(),
            grants: Mutex::default(),
            finished: Mutex::default(),
            store,
        }
    }

    /// Adds a pending login, or returns [`BeginError::TooMany`] with the time until the next one is allowed.
    pub(super) async fn begin(&self, state: &str, login: PendingLogin, clock: &Clock) -> Result<(), BeginError> {
        lock(&self.rate_limiter).take(clock.uptime()).map_err(BeginError::TooMany)?;
        let (state, now) = (hash(state), clock.now());
        match &self.coordination {
            Coordination::Local(logins) => {
                lock(&logins.pending).insert(state, login, now);
                logins.changed.notify_one();
                Ok(())
            }
            Coordination::Shared(shared) => {
                let text = serde_json::to_string(&(&state, now, login)).expect("names, times and texts are JSON");
                shared.save_pending_login(&state, &Secret::new(text)).await.map_err(BeginError::Store)
            }
        }
    }

    /// Returns the pending login with `state` without removing it.
    pub(super) async fn login_of(&self, state: &str, now: Timestamp) -> Result<Option<PendingLogin>, StoreError> {
        let state = hash(state);
        match &self.coordination {
            Coordination::Local(logins) => Ok(lock(&logins.pending).get(&state, now).cloned()),
            Coordination::Shared(shared) => Ok(read_login(shared.pending_login(&state).await?, &state, now)),
        }
    }

    /// Removes and returns a pending login, so that its state is accepted once. Returns after the removal is written.
    pub(super) async fn take_login(&self, state: &str, now: Timestamp) -> Result<Option<PendingLogin>, StoreError> {
        let state = hash(state);
        match &self.coordination {
            Coordination::Local(logins) => {
                let login = lock(&logins.pending).take(&state, now);
                if login.is_some() {
                    self.write_logins().await;
                }
                Ok(login)
            }
            Coordination::Shared(shared) => Ok(read_login(shared.take_pending_login(&state).await?, &state, now)),
        }
    }

    /// The place for the outcome of the login with `state`, shared by all deliveries of its callback. A callback that
    /// arrives again within ten minutes, at this process, gets the first outcome instead of an error.
    pub(super) fn outcome_of(&self, state: &str, now: Timestamp) -> Arc<OnceCell<Finished>> {
        let state = hash(state);
        let mut finished = lock(&self.finished);
        finished.sweep(now);
        if let Some(outcome) = finished.get(&state, now) {
            return outcome.clone();
        }
        let outcome = Arc::<OnceCell<Finished>>::default();
        finished.insert(state, outcome.clone(), now);
        outcome
    }

    /// Whether a callback with `state` has been delivered before.
    pub(super) fn is_finished(&self, state: &str, now: Timestamp) -> bool {
        lock(&self.finished).get(&hash(state), now).is_some()
    }

    /// How the login with `state` ended at this process, if it has.
    pub(super) fn finished(&self, state: &str, now: Timestamp) -> Option<Finished> {
        lock(&self.finished).get(&hash(state), now)?.get().cloned()
    }

    /// Writes the pending logins whenever they change, and deletes expired entries. Runs until dropped.
    pub async fn keep(&self, clock: &Clock) {
        loop {
            match &self.coordination {
                Coordination::Local(logins) => {
                    // The timeout also sweeps without a change, so that abandoned logins do not stay on disk forever.
                    let changed = tokio::time::timeout(SWEEP, logins.changed.notified()).await.is_ok();
                    let expired = lock(&logins.pending).sweep(clock.now());
                    if changed || !expired.is_empty() {
                        self.write_logins().await;
                    }
                }
                Coordination::Shared(shared) => {
                    tokio::time::sleep(SWEEP).await;
                    // If this fails, the next round deletes the expired logins.
                    let _ = shared.delete_expired_logins().await;
                }
            }
            self.sweep_grants(clock.now()).await;
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Writes the pending logins of the only process to the store; logs a failure.
    pub async fn write_logins(&self) {
        let Coordination::Local(logins) = &self.coordination else { return };
        let _writing = logins.writing.lock().await;
        let text = serde_json::to_string(&*lock(&logins.pending)).expect("names, times and texts are JSON");
        if let Err(error) = self.store.save_pending_logins(Secret::new(text)).await {
            tracing::error!(%error, "pending logins could not be stored: after a restart users must restart them");
        }
    }

    /// Stores a grant before anything else happens to it. If the store fails, the grant stays in memory only.
    pub(super) async fn save_grant(&self, pending: &PendingGrant) {
        if let Err(error) = self.store.save_pending_grant(pending).await {
            tracing::error!(user = %pending.user, %error, "a new grant could not be stored; it is in memory only until \
                it is in use");
            if self.is_shared() && pending.confirm {
                // Until then only this process can confirm it.
                lock(&self.grants).insert(pending.id.clone(), pending.clone(), pending.since);
            }
        }
    }

    /// Deletes a pending grant that is in use or will never be.
    pub(super) async fn delete_grant(&self, id: &str) {
        if let Err(error) = self.store.delete_pending_grant(id).await {
            tracing::error!(%error, "a pending grant that is no longer needed could not be deleted from the store");
        }
    }

    /// Keeps a pending grant until the app confirms it. With a shared store the stored copy is enough.
    pub(super) async fn keep_for_confirmation(&self, pending: PendingGrant, now: Timestamp) {
        if self.is_shared() {
            return;
        }
        let evicted = lock(&self.grants).insert(pending.id.clone(), pending, now);
        self.sweep_grants(now).await;
        if let Some(oldest) = evicted {
            self.delete_grant(&oldest.id).await;
        }
    }

    /// Removes and returns the pending grant with the one-time `id`, unless it has expired.
    pub(super) async fn take_grant(&self, id: &str, now: Timestamp) -> Result<Option<PendingGrant>, StoreError> {
        let id = hash(id);
        let here = lock(&self.grants).take(&id, now);
        match &self.coordination {
            Coordination::Shared(shared) if here.is_none() => {
                shared.confirm_pending_grant(&id, |pending| is_valid(pending.since, now)).await
            }
            _ => Ok(here),
        }
    }

    /// Whether other processes share the store, and may end without finishing a login.
    pub(super) fn is_shared(&self) -> bool {
        matches!(self.coordination, Coordination::Shared(_))
    }

    /// Removes the pending grants of `user` from memory; the store deletes its own copies.
    pub(super) fn forget(&self, user: &UserId) {
        lock(&self.grants).remove_if(|pending| pending.user == *user);
    }

    /// The pending grants of processes that have ended. Expired ones that needed confirmation are deleted; the others
    /// are returned whatever their age, because no other process finishes them.
    pub(super) async fn leftovers(&self, now: Timestamp) -> Vec<PendingGrant> {
        let all = self.store.claim_pending_grants().await.unwrap_or_else(|error| {
            tracing::error!(%error, "pending grants cannot be read");
            Vec::new()
        });
        let (valid, expired): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|pending| !pending.confirm || is_valid(pending.since, now));
        for pending in expired {
            self.delete_grant(&pending.id).await;
        }
        valid
    }

    /// Deletes expired pending grants.
    async fn sweep_grants(&self, now: Timestamp) {
        let expired = lock(&self.grants).sweep(now);
        for pending in expired {
            self.delete_grant(&pending.id).await;
        }
    }
}

/// A token bucket that limits how fast logins start.
#[derive(Debug)]
struct RateLimiter {
    tokens: f64,
    /// The uptime at which `tokens` was computed.
    at: SignedDuration,
}

impl Default for RateLimiter {
    fn default() -> Self {
        Self { tokens: BURST, at: SignedDuration::ZERO }
    }
}

impl RateLimiter {
    fn take(&mut self, now: SignedDuration) -> Result<(), Duration> {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        *self = Self { tokens: (self.tokens + passed * PER_SECOND).min(BURST), at: now };
        if self.tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - self.tokens) / PER_SECOND));
        }
        self.tokens -= 1.0;
        Ok(())
    }
}

/// A login as PostgreSQL holds it. The state's hash is encrypted with the login, so that nobody with database access
/// can swap two logins.
fn read_login(text: Option<Secret>, state: &str, now: Timestamp) -> Option<PendingLogin> {
    let login = text.and_then(|text| serde_json::from_str::<(String, Timestamp, PendingLogin)>(text.expose()).ok());
    login.filter(|(name, since, _)| name == state && is_valid(*since, now)).map(|(.., begun)| begun)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serializes a secret in clear, inside a text that is encrypted as a whole.
mod exposed {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::domain::secret::Secret;

    pub(super) fn serialize<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(secret.expose())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        String::deserialize(deserializer).map(Secret::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_a_flood_is_limited() {
        let mut rate_limiter = RateLimiter::default();
        let at = SignedDuration::from_secs(100);
        assert!((0..BURST as usize).all(|_| rate_limiter.take(at).is_ok()));
        assert_eq!(rate_limiter.take(at), Err(Duration::from_millis(50)));
        let later = at + SignedDuration::from_secs(1);
        assert_eq!((0..100).filter(|_| rate_limiter.take(later).is_ok()).count(), PER_SECOND as usize);
    }
}
