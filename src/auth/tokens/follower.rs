//! Follows the changes that other processes make in a shared store, and knows how current its knowledge is.
//!
//! Each poll reads the changes since the last one, and this process takes over those of the users that it holds. While
//! polls fail, what is known grows old; then a request reads the row of its user before it uses a token. Refreshes are
//! not among these changes: see `refreshed_elsewhere`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::TokenManager;
use super::client_circuit::known_code;
use super::pace::{ClaimPace, is_backlog, longest_pause, notified_pause, poll_pause};
use super::refresh_task::{STORE_RETRY, jitter};
use super::user_state::UserState;
use crate::domain::account::UserId;
use crate::domain::grant::Version;
use crate::store::{Changes, Lookup, PUBLISH, Postgres, RECONNECT_PAUSE_MAX, SharedBrake, StoreError};

/// What this process knows of changes counts as current for this long after a poll.
const CURRENT: Duration = Duration::from_secs(2);
/// How long a request waits for the row of its user, while this process does not know what others have changed.
const ASK_LIMIT: Duration = Duration::from_secs(1);
/// After a new connection no refresh begins for this long: the database may have been away, or be another server that
/// lost commits, and the others store again what they know within this time: they connect again after a pause, try once
/// a second, and the rest is for the statements.
const SETTLING: Duration = RECONNECT_PAUSE_MAX.saturating_add(STORE_RETRY).saturating_add(Duration::from_millis(1500));
/// A user without a grant is read from the database at most this often per period, and otherwise remembered.
const ABSENT_READS: u32 = 4;
const ABSENT_PERIOD: Duration = Duration::from_secs(1);

/// What this process knows of the changes that others make in a shared store.
#[derive(Debug)]
pub(super) struct Follower {
    pub(super) store: Postgres,
    begun: Instant,
    /// Every change that was stored before this is known here, in milliseconds since `begun`.
    current_at: AtomicI64,
    /// No request asks the database for its row before this, in milliseconds since `begun`: the last one got no answer.
    ask_at: AtomicI64,
    /// When this process claims background refreshes.
    pace: Mutex<ClaimPace>,
    /// Notified after each poll.
    pub(super) polled: Notify,
    /// Notified if there are records to describe.
    undescribed: Notify,
    /// Users without a grant, and how often the database was asked for each of them since when.
    absent: Mutex<HashMap<UserId, (Instant, u32)>>,
    /// The last connection that was noted, and until when refreshes over it wait for others.
    settling: Mutex<(u64, Instant)>,
}

impl Follower {
    /// For a store that has just been opened to serve.
    pub(super) fn new(store: Postgres) -> Self {
        let begun = Instant::now();
        // Over the first connection nothing can have been lost yet. Any other one counts, also if no poll came before.
        let first = store.connection();
        Self {
            store,
            begun,
            current_at: AtomicI64::new(0),
            ask_at: AtomicI64::new(0),
            pace: Mutex::default(),
            polled: Notify::new(),
            undescribed: Notify::new(),
            absent: Mutex::default(),
            settling: Mutex::new((first, begun)),
        }
    }

    /// When this process claims background refreshes. Never locked across a wait.
    pub(super) fn pace(&self) -> MutexGuard<'_, ClaimPace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time since this process began to follow.
    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(super) fn milliseconds(&self, at: Instant) -> i64 {
        i64::try_from(at.saturating_duration_since(self.begun).as_millis()).unwrap_or(i64::MAX)
    }

    /// Whether `user` is known to have no grant: the database has just said so several times, and has not reported a
    /// login since. So a user who does not exist costs a few reads per second, however many requests there are.
    pub(super) fn is_absent(&self, user: &UserId) -> bool {
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        let known = absent.get(user).filter(|(since, _)| since.elapsed() < ABSENT_PERIOD);
        known.is_some_and(|(_, reads)| *reads >= ABSENT_READS) && self.lag() <= CURRENT
    }

    /// Records that the database has no grant of `user`. At most `limit` users are remembered.
    pub(super) fn note_absent(&self, user: &UserId, limit: usize) {
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        if absent.len() >= limit {
            absent.clear();
        }
        let (since, reads) = absent.entry(user.clone()).or_insert((Instant::now(), 0));
        if since.elapsed() >= ABSENT_PERIOD {
            (*since, *reads) = (Instant::now(), 0);
        }
        *reads += 1;
    }

    /// Lets others settle from now on if the connection is another one than before. Returns until when.
    fn note_connection(&self) -> Instant {
        let mut settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = self.store.connection();
        if connection > settling.0 {
            *settling = (connection, Instant::now() + SETTLING);
        }
        settling.1
    }

    /// Returns once others have had the time to store again what a database has lost or could not take, if the
    /// connection is another one than before. Returns whether that took time: then the row has to be read again.
    pub(super) async fn settle(&self) -> bool {
        let until = self.note_connection();
        let waits = until > Instant::now();
        if waits {
            sleep_until(until).await;
        }
        waits
    }

    fn forget_absent(&self, changes: &Changes) {
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        match changes {
            Changes::Rows(rows) => rows.iter().for_each(|(user, _)| {
                absent.remove(user);
            }),
            Changes::Unknown => absent.clear(),
        }
    }

    /// Records that every change that was stored before `at` is known here.
    fn is_current_at(&self, at: Instant) {
        self.current_at.store(self.milliseconds(at), Relaxed);
    }

    /// The time since which changes of other processes may be unknown here.
    fn lag(&self) -> Duration {
        let behind = self.milliseconds(Instant::now()).saturating_sub(self.current_at.load(Relaxed));
        Duration::from_millis(behind.unsigned_abs())
    }
}

impl TokenManager {
    /// Adopts what other processes change, poll by poll. Runs until dropped.
    pub(super) async fn follow(&self, follower: &Follower) {
        let shared = &follower.store;
        let mut has_polled = false;
        loop {
            tokio::select! {
                () = sleep(poll_pause(jitter())) => {}
                () = shared.notified() => sleep(notified_pause(jitter())).await,
            }
            let (was_up, begun) = (self.0.store.health().up, Instant::now());
            let Ok(poll) = self.timed("poll", shared.poll()).await else { continue };
            follower.note_connection();
            if !was_up {
                tracing::info!("the store works again");
                for entry in self.entries() {
                    entry.try_again(self.0.clock.reading());
                    // Sending fails only during shutdown, when the scheduler is gone.
                    let _ = self.0.scheduler.send(entry);
                }
            }
            match &poll.brake {
                SharedBrake::Held { code, wait } => {
                    self.0.circuit.brake().hold(known_code(code), *wait, self.0.clock.reading());
                }
                SharedBrake::Released => {
                    let is_held = self.0.circuit.brake().is_held_by_others();
                    if is_held {
                        self.share_rate(shared).await;
                    }
                }
                SharedBrake::Ended => {}
            }
            let longest = longest_pause(self.policy());
            if !std::mem::replace(&mut has_polled, true) && is_backlog(poll.due_at, self.0.clock.now(), longest) {
                self.work_off_backlog(shared).await;
            }
            follower.pace().polled(poll.due_at, self.0.clock.now(), follower.elapsed(), jitter());
            follower.polled.notify_waiters();
            if poll.has_undescribed {
                follower.undescribed.notify_one();
            }
            follower.forget_absent(&poll.changes);
            match self.take_over_changes(shared, poll.changes).await {
                Ok(()) => follower.is_current_at(begun),
                Err(_) => shared.lose_position(),
            }
            self.trim();
        }
    }

    /// Says again and again that this process is alive, and which keys it has; and seals with the key that a rotation
    /// made the first one. Runs until dropped.
    pub(super) async fn publish_pod(&self, follower: &Follower) {
        loop {
            sleep(PUBLISH).await;
            // If this fails, the next one says so.
            let _ = self.timed("note", follower.store.publish_and_follow_rotation()).await;
        }
    }

    /// Describes the records that nobody has described: those of a previous version, and those that a person changed.
    /// Runs until dropped.
    pub(super) async fn describe_records(&self, follower: &Follower) {
        // Of many processes that start at once, each is to be ready before the others look.
        sleep(poll_pause(jitter())).await;
        // Those that another process could not open, perhaps.
        let _ = self.timed("describe", follower.store.retry_unknown()).await;
        loop {
            follower.undescribed.notified().await;
            while self.timed("describe", follower.store.describe_page()).await.unwrap_or(false) {}
        }
    }

    /// Forgets the users that were not used for the longest time, beyond `store.cache`, unless something is going on
    /// for them. They are read again when they are needed.
    fn trim(&self) {
        let cache = self.0.settings.load().cache;
        let mut users = self.0.users.write().unwrap_or_else(PoisonError::into_inner);
        let Some(surplus) = users.len().checked_sub(cache).filter(|surplus| *surplus > 0) else { return };
        // While the map is locked, nobody can get hold of an entry that only the map holds.
        let idle =
            |entry: &&Arc<UserState>| Arc::strong_count(entry) == 1 && !entry.is_unsaved() && !entry.is_refreshing();
        let rank = |entry: &Arc<UserState>| (entry.held().grant().is_some(), entry.used(), entry.user.clone());
        let mut ranked: Vec<_> = users.values().filter(idle).map(rank).collect();
        ranked.sort_unstable();
        for (.., user) in ranked.into_iter().take(surplus) {
            users.remove(&user);
        }
    }

    /// Takes over what other processes have changed, for the users that this process holds.
    async fn take_over_changes(&self, shared: &Postgres, changes: Changes) -> Result<(), StoreError> {
        let held: Vec<UserId> = match changes {
            Changes::Rows(rows) => {
                let is_news = |(user, version): &(UserId, Version)| {
                    self.entry(user).is_some_and(|entry| entry.stored() != *version)
                };
                rows.into_iter().filter(is_news).map(|(user, _)| user).collect()
            }
            Changes::Unknown => self.entries().into_iter().map(|entry| entry.user.clone()).collect(),
        };
        if held.is_empty() {
            return Ok(());
        }
        for (user, lookup) in self.timed("get", shared.lookup_all(&held)).await? {
            self.take_over_row(shared, &user, lookup).await?;
        }
        Ok(())
    }

    /// Takes over a row that was read some time ago, if this process holds its user.
    pub(super) async fn take_over_row(
        &self,
        shared: &Postgres,
        user: &UserId,
        lookup: Lookup,
    ) -> Result<(), StoreError> {
        let Some(entry) = self.entry(user) else { return Ok(()) };
        // A row that was read before this process wrote it is no news, and must not count as data loss.
        let write = entry.write().await;
        let is_outdated = entry.stored() > lookup.version;
        let lookup = if is_outdated { self.timed("get", shared.lookup(user)).await? } else { lookup };
        self.take_over(shared, &entry, &write, lookup).await.map(drop)
    }

    /// The time since which changes of other processes may be unknown here; zero if no process shares the store.
    pub fn store_lag(&self) -> Duration {
        self.0.coordination.follower().map_or(Duration::ZERO, Follower::lag)
    }

    /// Whether a change of another process may be unknown here for longer than ordinary.
    pub(super) fn is_behind(&self) -> bool {
        self.store_lag() > CURRENT
    }

    /// Reads the row of a user whose token is about to be used while this process does not know what others have
    /// changed. If the database does not respond, the token is used: nobody can tell this process that it may not be.
    pub(super) async fn ask(&self, entry: &Arc<UserState>) {
        let Some(follower) = self.0.coordination.follower() else { return };
        let now = follower.milliseconds(Instant::now());
        let current = i64::try_from(CURRENT.as_millis()).unwrap_or(i64::MAX);
        if now < entry.read_at().saturating_add(current) || now < follower.ask_at.load(Relaxed) {
            return;
        }
        let asked = timeout(ASK_LIMIT, Box::pin(self.look(&entry.user))).await;
        if !matches!(asked, Ok(Ok(()))) {
            follower.ask_at.store(follower.milliseconds(Instant::now() + ASK_LIMIT), Relaxed);
        }
    }
}
