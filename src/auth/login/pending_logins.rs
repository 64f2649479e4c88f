//! What is under way: logins that have begun, and grants that wait. In memory for use, and in the store for the process
//! that starts next. Where several processes share the store, any of them may go on with it: then it is in the store alone.
//!
//! A grant that waits is on disk before anything else is done with it, for its code is spent. Logins that have begun are
//! written together and at most once a second, so that a flood of them does not occupy the disk: a kill costs who began in
//! the last second a new beginning. One that ends is written at once: its state must not be good a second time.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use super::BeginError;
use crate::domain::account::UserId;
use crate::domain::clock::Clock;
use crate::domain::secret::Secret;
use crate::store::{StoreError, TokenStore, Waiting};

/// How long a state and a pending grant live.
pub const TEN_MINUTES: Duration = Duration::from_secs(600);
/// ExpiringMap logins, and pending grants; the oldest makes room for the newest.
const MAX_OUTSTANDING: usize = 1000;
/// So many logins may begin at once, and so many more each second. Beyond it they are a flood: each pushes another one out.
const AT_ONCE: f64 = 2000.0;
const PER_SECOND: f64 = 20.0;
/// How often what is over is looked for, where nothing else happens.
const SWEEP: Duration = Duration::from_secs(60);
/// Between two writes of the logins that have begun.
const PAUSE: Duration = Duration::from_secs(1);

/// Logins that have begun, and grants that wait. It outlives the settings.
#[derive(Debug)]
pub struct PendingLogins {
    begun: Mutex<ExpiringMap<Begun>>,
    pace: Mutex<RateLimiter>,
    /// By the hash of their one-time id.
    waiting: Mutex<ExpiringMap<Waiting>>,
    store: TokenStore,
    changed: Notify,
    /// Held while what has begun is written, so that an older list does not come after a newer one.
    writing: tokio::sync::Mutex<()>,
}

/// A login that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begun {
    pub(super) user: UserId,
    /// PKCE's code verifier. The whole text that it is written in is sealed.
    #[serde(with = "exposed")]
    pub(super) verifier: Secret,
    pub(super) return_to: Option<String>,
    pub(super) replace: bool,
    /// The hash of the cookie that binds it to a browser.
    pub(super) cookie: Option<String>,
}

impl PendingLogins {
    /// Over `store`, with the logins that the last process left there. Its grants that wait are to be taken by
    /// `left`.
    pub async fn open(store: TokenStore) -> Self {
        let begun = match store.logins().await {
            Ok(text) => text.and_then(|text| serde_json::from_str(text.expose()).ok()).unwrap_or_default(),
            Err(error) => {
                tracing::error!(%error, "logins that had begun cannot be read: they have to begin again");
                ExpiringMap::default()
            }
        };
        Self {
            begun: Mutex::new(begun),
            pace: Mutex::default(),
            waiting: Mutex::default(),
            store,
            changed: Notify::new(),
            writing: tokio::sync::Mutex::default(),
        }
    }

    /// Takes a login in; where there are too many, says after what time there is room.
    pub(super) async fn begin(&self, state: &str, begun: Begun, clock: &Clock) -> Result<(), BeginError> {
        lock(&self.pace).take(clock.uptime()).map_err(BeginError::TooMany)?;
        let (state, now) = (hash(state), clock.now());
        if let Some(shared) = self.store.shared() {
            let text = serde_json::to_string(&(&state, now, begun)).expect("names, times and texts are JSON");
            return shared.begin_login(&state, &Secret::new(text)).await.map_err(BeginError::Store);
        }
        lock(&self.begun).insert(state, begun, now);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes a login out, so that its state is good for this once. Returns when that is on disk.
    pub(super) async fn take_begun(&self, state: &str, now: Timestamp) -> Result<Option<Begun>, StoreError> {
        let state = hash(state);
        if let Some(shared) = self.store.shared() {
            let text = shared.take_login(&state).await?;
            let login = text.and_then(|text| serde_json::from_str::<(String, Timestamp, Begun)>(text.expose()).ok());
            // Its own name is sealed with it, so that nobody puts one login in the place of another.
            let good = login.filter(|(name, since, _)| *name == state && lives(*since, now));
            return Ok(good.map(|(.., begun)| begun));
        }
        let begun = lock(&self.begun).take(&state, now);
        if begun.is_some() {
            self.write_begun().await;
        }
        Ok(begun)
    }

    /// Writes the logins that have begun, whenever that has changed, for as long as it runs; and takes down what is over.
    pub async fn keep(&self, clock: &Clock) {
        loop {
            // Woken without a change too, so that what nobody took does not lie on disk for ever.
            let changed = tokio::time::timeout(SWEEP, self.changed.notified()).await.is_ok();
            if self.sweep(clock.now()).await || changed {
                self.write_begun().await;
            }
            if let Some(shared) = self.store.shared() {
                // What is left over is looked for again.
                let _ = shared.sweep_logins().await;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Writes the logins that have begun.
    pub async fn write_begun(&self) {
        let _writing = self.writing.lock().await;
        let text = serde_json::to_string(&*lock(&self.begun)).expect("names, times and texts are JSON");
        if let Err(error) = self.store.keep_logins(Secret::new(text)).await {
            tracing::error!(%error, "logins that have begun are not on disk: after a restart they have to begin again");
        }
    }

    /// Puts a grant on disk before anything else is done with it. Where the disk does not take it, it is in memory alone.
    pub(super) async fn put_down(&self, waiting: &Waiting) {
        if let Err(error) = self.store.keep_waiting(waiting).await {
            tracing::error!(user = %waiting.user, %error, "a new grant is in memory only until it is in use");
            if self.store.shared().is_some() && waiting.confirm {
                // Until then it can be confirmed here alone.
                lock(&self.waiting).insert(waiting.id.clone(), waiting.clone(), waiting.since);
            }
        }
    }

    /// A grant that was put down is in use, or will never be.
    pub(super) async fn clear(&self, id: &str) {
        if let Err(error) = self.store.drop_waiting(id).await {
            tracing::error!(%error, "a grant that waited is over and still on disk");
        }
    }

    /// Has a grant wait for the app's confirmation.
    pub(super) async fn wait(&self, waiting: Waiting, now: Timestamp) {
        if self.store.shared().is_some() {
            return;
        }
        let pushed_out = lock(&self.waiting).insert(waiting.id.clone(), waiting, now);
        self.sweep(now).await;
        if let Some(oldest) = pushed_out {
            self.clear(&oldest.id).await;
        }
    }

    pub(super) async fn take_waiting(&self, id: &str, now: Timestamp) -> Result<Option<Waiting>, StoreError> {
        let id = hash(id);
        let here = lock(&self.waiting).take(&id, now);
        match self.store.shared() {
            Some(shared) if here.is_none() => shared.confirm_waiting(&id, |waiting| lives(waiting.since, now)).await,
            _ => Ok(here),
        }
    }

    /// Whether other processes may leave something behind, which is to be looked for again and again.
    pub(super) fn is_shared(&self) -> bool {
        self.store.shared().is_some()
    }

    /// Forgets the grants that wait for `user`; the store has forgotten them.
    pub(super) fn forget(&self, user: &UserId) {
        lock(&self.waiting).by_hash.retain(|_, (.., waiting)| waiting.user != *user);
    }

    /// The grants that the last process left, without those that the app had to confirm and whose time is over. The others
    /// only waited for their end: nobody else has them, however long ago that was.
    pub(super) async fn left(&self, now: Timestamp) -> Vec<Waiting> {
        let all = self.store.waiting().await.unwrap_or_else(|error| {
            tracing::error!(%error, "grants that wait cannot be read");
            Vec::new()
        });
        let (living, over): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|waiting| !waiting.confirm || lives(waiting.since, now));
        for waiting in over {
            self.clear(&waiting.id).await;
        }
        living
    }

    /// Takes out everything whose time is over; whether there were logins among it.
    async fn sweep(&self, now: Timestamp) -> bool {
        let begun = lock(&self.begun).sweep(now);
        let over = lock(&self.waiting).sweep(now);
        for waiting in over {
            self.clear(&waiting.id).await;
        }
        !begun.is_empty()
    }
}

/// A token bucket.
#[derive(Debug)]
struct RateLimiter {
    left: f64,
    /// The uptime at which so many were left.
    at: SignedDuration,
}

impl Default for RateLimiter {
    fn default() -> Self {
        Self { left: AT_ONCE, at: SignedDuration::ZERO }
    }
}

impl RateLimiter {
    fn take(&mut self, now: SignedDuration) -> Result<(), Duration> {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        *self = Self { left: (self.left + passed * PER_SECOND).min(AT_ONCE), at: now };
        if self.left < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - self.left) / PER_SECOND));
        }
        self.left -= 1.0;
        Ok(())
    }
}

/// The SHA-256 of `text` in hexadecimal digits: what is kept of a secret that only has to be known again.
pub(super) fn hash(text: &str) -> String {
    format!("{:x}", Sha256::digest(text.as_bytes()))
}

/// Things that can be taken out once, within ten minutes.
#[derive(Debug, Serialize, Deserialize)]
struct ExpiringMap<T> {
    taken_in: u64,
    by_hash: HashMap<String, (u64, Timestamp, T)>,
}

impl<T> Default for ExpiringMap<T> {
    fn default() -> Self {
        Self { taken_in: 0, by_hash: HashMap::new() }
    }
}

impl<T> ExpiringMap<T> {
    /// Gives back what had to make room.
    fn insert(&mut self, hash: String, thing: T, now: Timestamp) -> Option<T> {
        let full = self.by_hash.len() >= MAX_OUTSTANDING;
        let oldest = || self.by_hash.iter().min_by_key(|(_, (order, ..))| *order).map(|(hash, _)| hash.clone());
        let pushed_out = full.then(oldest).flatten().and_then(|oldest| self.by_hash.remove(&oldest));
        self.taken_in += 1;
        self.by_hash.insert(hash, (self.taken_in, now, thing));
        pushed_out.map(|(.., thing)| thing)
    }

    /// What is too old stays, to be swept.
    fn take(&mut self, hash: &str, now: Timestamp) -> Option<T> {
        self.by_hash.get(hash).filter(|(_, since, _)| lives(*since, now))?;
        self.by_hash.remove(hash).map(|(.., thing)| thing)
    }

    /// Takes out everything whose time is over.
    fn sweep(&mut self, now: Timestamp) -> Vec<T> {
        let over = self.by_hash.extract_if(|_, (_, since, _)| !lives(*since, now));
        over.map(|(_, (.., thing))| thing).collect()
    }
}

/// Whether what began at `since` is still good. A clock that was set back makes nothing live longer than ten minutes more.
fn lives(since: Timestamp, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(since)).unwrap_or_default() < TEN_MINUTES
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A secret inside a text that is sealed as a whole.
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
    fn what_was_taken_out_or_is_too_old_is_gone() {
        let now = Timestamp::UNIX_EPOCH;
        let mut outstanding = ExpiringMap::default();
        outstanding.insert(hash("1"), "a", now);
        assert_eq!(outstanding.take(&hash("2"), now), None);
        assert_eq!(outstanding.take(&hash("1"), now), Some("a"));
        assert_eq!(outstanding.take(&hash("1"), now), None);
        outstanding.insert(hash("1"), "a", now);
        assert_eq!(outstanding.take(&hash("1"), now + TEN_MINUTES), None);
        outstanding.insert(hash("1"), "a", now);
        outstanding.insert(hash("2"), "b", now + TEN_MINUTES);
        assert_eq!(outstanding.sweep(now + TEN_MINUTES), ["a"]);
        assert_eq!(outstanding.take(&hash("2"), now + TEN_MINUTES), Some("b"));
    }

    #[test]
    fn a_flood_is_told_to_wait_and_a_crowd_is_not() {
        let mut pace = RateLimiter::default();
        let at = SignedDuration::from_secs(100);
        assert!((0..AT_ONCE as usize).all(|_| pace.take(at).is_ok()));
        assert_eq!(pace.take(at), Err(Duration::from_millis(50)));
        let later = at + SignedDuration::from_secs(1);
        assert_eq!((0..100).filter(|_| pace.take(later).is_ok()).count(), PER_SECOND as usize);
    }

    #[test]
    fn the_oldest_makes_room_for_the_newest() {
        let now = Timestamp::UNIX_EPOCH;
        let mut outstanding = ExpiringMap::default();
        for number in 0..=MAX_OUTSTANDING {
            let pushed_out = outstanding.insert(hash(&number.to_string()), number, now);
            assert_eq!(pushed_out, (number == MAX_OUTSTANDING).then_some(0));
        }
        assert_eq!(outstanding.take(&hash("0"), now), None);
        assert_eq!(outstanding.take(&hash("1"), now), Some(1));
        assert_eq!(outstanding.take(&hash("1000"), now), Some(1000));
    }
}
