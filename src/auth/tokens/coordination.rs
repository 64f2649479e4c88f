//! Coordination of refreshes: within one process, or with other processes that share the store
//! ([`Postgres`]).
//!
//! In a shared store the stored record is authoritative: a process reads it before each refresh, and follows the changes
//! of others ([`Follower`]). A lease lets one process at a time refresh a user's token; the others wait and use the token
//! it stored.
//!
//! A [`Version`] never decreases. If a stored version is lower than the one that this process knows, the database lost
//! data (for example, failover to a lagging standby), and this process restores what it knows: [`Version::reconcile`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::client_circuit::{known_code, remedy_of};
use super::refresh_journal::RefreshJournal;
use super::refresh_task::{RefreshReason, RefreshTask, jitter};
use super::scheduler::Scheduler;
use super::user_state::{UserState, Writing};
use super::{FORCED_SPACING, TokenError, TokenManager};
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Grant, GrantState, LiveGrant, Remedy, STORE_UNAVAILABLE, Verdict, Version};
use crate::store::{Changes, Content, FailedRefresh, Lease, Lookup, PUBLISH, Postgres, StoreError, TokenStore};

/// Interval for polling changes made by other processes, give or take a seventh. A logout is obeyed within a second by
/// processes that hear of it by a poll alone.
const POLL: Duration = Duration::from_millis(700);
/// Pause after a notification of a change, so that many at once cause one poll.
const NOTIFIED_PAUSE: Duration = Duration::from_millis(40);
/// What this process knows of changes counts as current for this long after a poll.
const CURRENT: Duration = Duration::from_secs(2);
/// How long a request waits for the row of its user, while this process does not know what others have changed.
const ASK_LIMIT: Duration = Duration::from_secs(1);
/// First interval for checking whether another process has finished its refresh, which doubles up to the second, and the
/// maximum wait for its lease (`LEASE_WAIT`). A lease expires after 15 s, after which at most one other process may take
/// it first.
const LEASE_CHECK: Duration = Duration::from_millis(100);
const LEASE_CHECK_MAX: Duration = Duration::from_millis(800);
const LEASE_WAIT: Duration = Duration::from_secs(35);
/// A user without a grant is read from the database at most this often per period, and otherwise remembered.
const ABSENT_READS: u32 = 4;
const ABSENT_PERIOD: Duration = Duration::from_secs(1);
/// Number of attempts to take over a row that other processes keep changing.
const MAX_ATTEMPTS: usize = 10;

const STORE_DOWN: Failure = Failure { code: STORE_UNAVAILABLE, remedy: Remedy::Time, detail: None };
const UNREADABLE: Failure = Failure { code: "record_unreadable", remedy: Remedy::Time, detail: None };
const BUSY: Failure = Failure { code: "renewed_elsewhere", remedy: Remedy::Time, detail: None };

/// Whether other processes refresh the same grants, and what prevents a lost or a duplicate refresh.
#[derive(Debug)]
pub(super) enum Coordination {
    /// One process. The journal lets the next process report a refresh that a crash interrupted.
    Local(RefreshJournal),
    /// Several processes on one database. A lease per user lets one of them refresh at a time.
    Shared(Follower),
}

/// Follows the changes that other processes make in a shared store, and knows how current its knowledge is.
#[derive(Debug)]
pub(super) struct Follower {
    pub(super) store: Postgres,
    begun: Instant,
    /// Every change that was stored before this is known here, in milliseconds since `begun`.
    current_at: AtomicI64,
    /// No request asks the database for its row before this, in milliseconds since `begun`: the last one got no answer.
    ask_at: AtomicI64,
    /// When the next background refresh is due, as of the last poll; `None` if none is, or until the next poll.
    pub(super) due_at: Mutex<Option<Timestamp>>,
    /// Notified after each poll.
    pub(super) polled: Notify,
    /// Notified if there are records to describe.
    undescribed: Notify,
    /// Users without a grant, and how often the database was asked for each of them since when.
    absent: Mutex<HashMap<UserId, (Instant, u32)>>,
}

impl Follower {
    fn new(store: Postgres) -> Self {
        Self {
            store,
            begun: Instant::now(),
            current_at: AtomicI64::new(0),
            ask_at: AtomicI64::new(0),
            due_at: Mutex::default(),
            polled: Notify::new(),
            undescribed: Notify::new(),
            absent: Mutex::default(),
        }
    }

    fn milliseconds(&self, at: Instant) -> i64 {
        i64::try_from(at.saturating_duration_since(self.begun).as_millis()).unwrap_or(i64::MAX)
    }

    /// Whether `user` is known to have no grant: the database has just said so several times, and has not reported a
    /// login since. So a user who does not exist costs a few reads per second, however many requests there are.
    fn is_absent(&self, user: &UserId) -> bool {
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        let known = absent.get(user).filter(|(since, _)| since.elapsed() < ABSENT_PERIOD);
        known.is_some_and(|(_, reads)| *reads >= ABSENT_READS) && self.lag() <= CURRENT
    }

    /// Records that the database has no grant of `user`. At most `limit` users are remembered.
    fn note_absent(&self, user: &UserId, limit: usize) {
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

impl Coordination {
    pub(super) fn new(store: &TokenStore) -> Self {
        match store.shared() {
            Some(shared) => Self::Shared(Follower::new(shared.clone())),
            None => Self::Local(RefreshJournal::default()),
        }
    }

    /// The generation that a write must find in the store. A single process compares nothing: the stored record is
    /// either the previous one or the one it writes.
    pub(super) fn expected(&self, generation: Option<u64>) -> Option<u64> {
        match self {
            Self::Local(_) => None,
            Self::Shared(_) => generation,
        }
    }
}

impl TokenManager {
    /// Notices when a failed store works again; in a shared store, adopts changes made by other processes. Runs until
    /// dropped.
    pub(super) async fn follow_store(&self) {
        match &self.0.coordination {
            Coordination::Local(_) => self.watch_store().await,
            Coordination::Shared(follower) => {
                tokio::join!(self.follow(follower), self.describe_records(follower), self.publish_pod(follower));
            }
        }
    }

    /// Refreshes tokens before callers need them. Runs until dropped.
    pub(super) async fn schedule(&self, scheduler: Scheduler) {
        match &self.0.coordination {
            Coordination::Local(_) => scheduler.run(self).await,
            Coordination::Shared(follower) => self.claim_refreshes(follower, scheduler).await,
        }
    }

    /// At startup, reports refreshes that the end of the previous process interrupted.
    pub(super) async fn look_for_interrupted(&self) {
        if let Coordination::Local(journal) = &self.0.coordination {
            self.report_interrupted(journal).await;
        }
    }

    /// Writes down that no refresh is running.
    pub(super) async fn settle_journal(&self) {
        if let Coordination::Local(journal) = &self.0.coordination {
            self.clear_finished(journal).await;
        }
    }

    async fn follow(&self, follower: &Follower) {
        let shared = &follower.store;
        loop {
            let pause = POLL.mul_f64(0.86 + 0.28 * jitter());
            tokio::select! {
                () = sleep(pause) => {}
                () = shared.notified() => sleep(NOTIFIED_PAUSE.mul_f64(jitter())).await,
            }
            let (was_up, begun) = (self.0.store.health().up, Instant::now());
            let Ok(poll) = self.timed("poll", shared.poll()).await else { continue };
            if !was_up {
                tracing::info!("the store works again");
                for entry in self.entries() {
                    entry.try_again(self.0.clock.reading());
                    // Sending fails only during shutdown, when the scheduler is gone.
                    let _ = self.0.scheduler.send(entry);
                }
            }
            *follower.due_at.lock().unwrap_or_else(PoisonError::into_inner) = poll.due_at;
            follower.polled.notify_waiters();
            if let Some((code, wait)) = &poll.brake {
                self.0.circuit.hold(known_code(code), *wait, self.0.clock.reading());
            }
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

    /// Says again and again that this process is alive, and which keys it has; and seals with the key that a rotation made
    /// the first one. Runs until dropped.
    async fn publish_pod(&self, follower: &Follower) {
        loop {
            sleep(PUBLISH).await;
            if self.timed("note", follower.store.publish_pod()).await.is_ok() {
                let _ = self.timed("note", follower.store.follow_rotation()).await;
            }
        }
    }

    /// Describes the records that nobody has described: those of a previous version, and those that a person changed.
    /// Runs until dropped.
    async fn describe_records(&self, follower: &Follower) {
        // Those that another process could not open, perhaps.
        let _ = self.timed("describe", follower.store.retry_unknown()).await;
        loop {
            follower.undescribed.notified().await;
            while self.timed("describe", follower.store.describe_page()).await.unwrap_or(false) {}
        }
    }

    /// Forgets the users that were not used for the longest time, beyond `store.cache`, unless something is going on for
    /// them. They are read again when they are needed.
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
            let Some(entry) = self.entry(&user) else { continue };
            // A row that was read before this process wrote it is no news, and must not count as data loss.
            let write = entry.write().await;
            let is_outdated = entry.stored() > lookup.version;
            let lookup = if is_outdated { self.timed("get", shared.lookup(&user)).await? } else { lookup };
            self.take_over(shared, &entry, &write, lookup).await?;
        }
        Ok(())
    }

    /// The time since which changes of other processes may be unknown here; zero if no process shares the store.
    pub fn store_lag(&self) -> Duration {
        match &self.0.coordination {
            Coordination::Local(_) => Duration::ZERO,
            Coordination::Shared(follower) => follower.lag(),
        }
    }

    /// Whether a change of another process may be unknown here for longer than ordinary.
    pub(super) fn is_behind(&self) -> bool {
        matches!(&self.0.coordination, Coordination::Shared(follower) if follower.lag() > CURRENT)
    }

    /// Reads the row of a user whose token is about to be used while this process does not know what others have
    /// changed. If the database does not respond, the token is used: nobody can tell this process that it may not be.
    pub(super) async fn ask(&self, entry: &Arc<UserState>) {
        let Coordination::Shared(follower) = &self.0.coordination else { return };
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

    /// Adopts the stored record of `user` if other processes share the store.
    ///
    /// # Errors
    /// [`StoreError`] if the store cannot be read, or if a record that the database lost cannot be restored.
    pub async fn look(&self, user: &UserId) -> Result<(), StoreError> {
        let Coordination::Shared(follower) = &self.0.coordination else { return Ok(()) };
        if follower.is_absent(user) {
            return Ok(());
        }
        let store = &follower.store;
        let mut read = None;
        if self.entry(user).is_none() {
            let lookup = self.timed("get", store.lookup(user)).await?;
            match &lookup.content {
                Content::Absent => {
                    follower.note_absent(user, self.0.settings.load().cache);
                    return Ok(());
                }
                Content::Unreadable(error) => {
                    tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
                    return Ok(());
                }
                Content::Grant(_) => read = Some(lookup),
            }
        }
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        if let Some(lookup) = read.filter(|lookup| lookup.version > entry.stored()) {
            return self.take_over(store, &entry, &write, lookup).await.map(drop);
        }
        self.catch_up(&entry, &write).await?;
        if entry.held().grant().is_none() {
            follower.note_absent(user, self.0.settings.load().cache);
        }
        Ok(())
    }

    /// The entry of `user`; reads the store if this process does not know a user who may have logged in at another one.
    pub(super) async fn find(&self, user: &UserId) -> Result<Arc<UserState>, TokenError> {
        let entry = match self.entry(user) {
            Some(entry) => Some(entry),
            None => {
                Box::pin(self.look(user)).await.map_err(|_| unavailable())?;
                self.entry(user)
            }
        };
        entry.ok_or(TokenError::LoginRequired { reason: "no_grant" })
    }

    /// Reads the store for a user who needs to log in. Returns whether the user has done so at another process.
    pub(super) async fn logged_in_elsewhere(&self, entry: &Arc<UserState>) -> bool {
        let before = entry.held().grant().map(|grant| grant.generation);
        let looked = Box::pin(self.look(&entry.user)).await.is_ok();
        looked && entry.held().grant().map(|grant| grant.generation) != before
    }

    /// Adopts the stored record. Returns `false` if the record is unusable, `true` if it is a grant or there is none.
    pub(super) async fn catch_up(&self, entry: &Arc<UserState>, write: &Writing<'_>) -> Result<bool, StoreError> {
        self.catch_up_unless(entry, write, false).await
    }

    /// As [`catch_up`](Self::catch_up). If a person asked for a refresh, another process's failure does not count, unless
    /// Login with Amazon asked all processes to wait.
    async fn catch_up_unless(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        is_manual: bool,
    ) -> Result<bool, StoreError> {
        let Coordination::Shared(Follower { store, .. }) = &self.0.coordination else { return Ok(true) };
        if entry.is_unsaved() {
            return Ok(true);
        }
        let mut lookup = self.timed("get", store.lookup(&entry.user)).await?;
        lookup.failed.take_if(|failed| is_manual && failed.code != "throttled");
        self.take_over(store, entry, write, lookup).await
    }

    /// Adopts the stored record as it was read under the write lock. If the database has lost what this process knows,
    /// restores that instead, unless the row changes meanwhile: then that change is adopted.
    pub(super) async fn take_over(
        &self,
        store: &Postgres,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        mut lookup: Lookup,
    ) -> Result<bool, StoreError> {
        if entry.is_unsaved() {
            return Ok(true);
        }
        let user = &entry.user;
        for _ in 0..MAX_ATTEMPTS {
            if let Coordination::Shared(follower) = &self.0.coordination {
                entry.set_read_at(follower.milliseconds(Instant::now()));
            }
            let Lookup { version, content, failed, .. } = lookup;
            let held = entry.held().clone();
            let stored = match content {
                Content::Unreadable(error) => {
                    tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
                    return Ok(false);
                }
                Content::Grant(grant) => Some(*grant),
                Content::Absent => None,
            };
            let restored = match entry.stored().reconcile(held.grant().is_some(), version, stored.is_some()) {
                Verdict::TakeOver => {
                    write.note_stored(version);
                    self.adopt_stored(entry, write, &held, stored, failed.as_ref());
                    return Ok(true);
                }
                Verdict::PutBack(newer) => {
                    let Some(grant) = held.grant() else { return Ok(true) };
                    tracing::warn!(%user, "the database has an older version than this process: the grant is stored \
                        again");
                    let put = self.timed("put", store.put_back(user, grant, newer, version.generation)).await?;
                    put.then(|| (newer, Some(Grant { generation: newer.generation, ..Grant::clone(grant) })))
                }
                Verdict::RepeatLogout(newer) => {
                    tracing::warn!(%user, "the database has an older version than this process: the logout is repeated");
                    let erased = self.timed("erase", store.repeat_logout(user, newer, version.generation)).await?;
                    erased.then_some((newer, None))
                }
            };
            if let Some((version, grant)) = restored {
                write.note_stored(version);
                if let Some(grant) = grant {
                    let now = self.0.clock.reading();
                    self.publish(entry, write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
                }
                return Ok(true);
            }
            // Another process has changed the row since: what it stored counts.
            lookup = self.timed("get", store.lookup(user)).await?;
        }
        Err(StoreError::Conflict)
    }

    /// Makes what is stored the current state. `failed` is how a refresh of it failed, at whatever process: its answer
    /// counts for all.
    fn adopt_stored(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        held: &GrantState,
        stored: Option<Grant>,
        failed: Option<&FailedRefresh>,
    ) {
        let (user, now) = (&entry.user, self.0.clock.reading());
        match (held.grant(), stored) {
            (Some(grant), Some(stored)) if is_same(grant, &stored) => {
                if let Some(failed) = failed.filter(|failed| failed.attempts > held.attempts()) {
                    self.publish(entry, write, failed_state(grant.clone(), failed, now));
                    entry.wake();
                }
            }
            (None, None) => {}
            (_, Some(grant)) => {
                entry.mark_used_at(now.uptime_at(grant.used_at.unwrap_or(grant.updated_at)));
                let grant = Arc::new(LiveGrant::loaded(grant, now));
                let state = match failed {
                    Some(failed) => failed_state(grant, failed, now),
                    None => GrantState::Fresh(grant),
                };
                self.publish(entry, write, state);
                entry.wake();
                tracing::debug!(%user, "another process stored a grant");
            }
            (Some(_), None) => {
                self.publish(entry, write, GrantState::Nothing);
                entry.wake();
                tracing::info!(%user, "another process logged the user out");
            }
        }
    }

    /// Adopts the stored record after it superseded a refresh of this process.
    pub(super) async fn overtaken(&self, entry: &Arc<UserState>, write: &Writing<'_>) {
        entry.set_unsaved(false);
        // If the store fails, the next read finds the same record.
        let _ = Box::pin(self.catch_up(entry, write)).await;
    }

    /// Stores the result of a refresh that the store refused because its generation is not the expected one, if that is
    /// so because the database has lost what the refresh was based on. Returns whether it is stored.
    pub(super) async fn store_over_loss(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
    ) -> Result<bool, StoreError> {
        let Coordination::Shared(Follower { store, .. }) = &self.0.coordination else { return Ok(false) };
        let lookup = self.timed("get", store.lookup(&entry.user)).await?;
        let stored_grant = !matches!(lookup.content, Content::Absent);
        let Verdict::PutBack(newer) = entry.stored().reconcile(true, lookup.version, stored_grant) else {
            return Ok(false);
        };
        let newer = Version { generation: newer.generation.max(grant.generation), ..newer };
        let put = self.timed("put", store.put_back(&entry.user, grant, newer, lookup.version.generation)).await?;
        if put {
            grant.generation = newer.generation;
            write.note_stored(newer);
        }
        Ok(put)
    }

    /// Makes one more attempt to store a grant that is in memory only. Succeeds if the grant is stored, or if a later
    /// login, logout or refresh superseded it. `since` is when this process got the grant.
    pub(super) async fn store_again(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
        expected: Option<u64>,
        since: Instant,
    ) -> Result<(), StoreError> {
        let user = &entry.user;
        let saved = match (&self.0.coordination, expected) {
            // By the database's clock and by how long ago it was here, and by no comparison of two clocks.
            (Coordination::Shared(Follower { store, .. }), None) => {
                self.timed("put", store.consent(user, grant, since.elapsed())).await
            }
            _ => {
                let saved = self.timed("put", self.0.store.save(user, grant, expected)).await;
                saved.map(|generation| Version { generation, ..entry.stored() })
            }
        };
        match saved {
            Ok(version) => {
                entry.set_unsaved(false);
                write.note_stored(version);
                if version.generation != grant.generation {
                    grant.generation = version.generation;
                    let kept = LiveGrant::loaded(grant.clone(), self.0.clock.reading());
                    self.publish(entry, write, GrantState::Fresh(Arc::new(kept)));
                }
            }
            Err(StoreError::Conflict) => {
                if expected.is_some() && self.store_over_loss(entry, write, grant).await? {
                    entry.set_unsaved(false);
                    let kept = LiveGrant::loaded(grant.clone(), self.0.clock.reading());
                    self.publish(entry, write, GrantState::Fresh(Arc::new(kept)));
                    return Ok(());
                }
                tracing::info!(%user, "a later login or logout, or another process's refresh, superseded a grant that \
                    was not stored");
                self.overtaken(entry, write).await;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl RefreshTask {
    /// Waits for the lease and returns the grant to refresh; `None` if no refresh is needed any more.
    pub(super) async fn acquire(&self, why: &RefreshReason) -> Result<Option<Arc<LiveGrant>>, Failure> {
        let Self { manager, entry } = self;
        let Coordination::Shared(Follower { store: shared, .. }) = &manager.0.coordination else {
            return Ok(self.wanted(why));
        };
        if let RefreshReason::Claimed { generation, interrupted } = why {
            let wanted = self.wanted(why).filter(|grant| grant.generation == *generation);
            match &wanted {
                Some(grant) if *interrupted => self.report_lost(grant.generation),
                Some(_) => {}
                None => self.release(*generation, None).await,
            }
            return Ok(wanted);
        }
        let (until, mut begun, mut pause) = (Instant::now() + LEASE_WAIT, None, LEASE_CHECK);
        loop {
            let write = entry.write().await;
            let is_manual = matches!(why, RefreshReason::Manual);
            let usable = manager.catch_up_unless(entry, &write, is_manual).await.map_err(|_| STORE_DOWN)?;
            drop(write);
            if !usable {
                return Err(UNREADABLE);
            }
            let forced = matches!(why, RefreshReason::Rejected(_));
            let wanted = self.wanted(why).filter(|grant| !forced || !is_new(grant, manager.0.clock.reading()));
            let Some(grant) = wanted else { return Ok(None) };
            // Another process has refreshed the grant meanwhile: its result serves this process too.
            if *begun.get_or_insert(grant.generation) != grant.generation {
                return Ok(None);
            }
            match manager
                .timed("lease", shared.acquire_lease(&entry.user, grant.generation))
                .await
                .map_err(|_| STORE_DOWN)?
            {
                Lease::Acquired { interrupted } => {
                    if interrupted {
                        self.report_lost(grant.generation);
                    }
                    return Ok(Some(grant));
                }
                Lease::Denied if Instant::now() >= until => return Err(BUSY),
                Lease::Denied => {
                    // What the other process stores is usually heard of before the pause ends.
                    let _ = timeout(pause, entry.changed().wait()).await;
                    pause = (pause * 2).min(LEASE_CHECK_MAX);
                }
            }
        }
    }

    /// Reports that the response to a refresh of another process may be lost, because that process ended.
    fn report_lost(&self, generation: u64) {
        let user = &self.entry.user;
        tracing::warn!(%user, "another process ended during a refresh; adsidecar tries the stored grant");
        self.manager.0.interrupted.lost(user, generation);
    }

    /// Prepares a token call: extends this process's lease for its duration, or writes the refresh to the journal.
    ///
    /// # Errors
    /// The failure to record if another process holds the lease, or if the shared store fails.
    pub(super) async fn prepare(&self, generation: u64) -> Result<(), Failure> {
        let (manager, user) = (&self.manager, &self.entry.user);
        match &manager.0.coordination {
            Coordination::Local(journal) => manager.record_refresh(journal, user, generation).await,
            Coordination::Shared(Follower { store: shared, .. }) => {
                match manager.timed("lease", shared.acquire_lease(user, generation)).await {
                    Ok(Lease::Acquired { .. }) => {}
                    Ok(Lease::Denied) => return Err(BUSY),
                    Err(_) => return Err(STORE_DOWN),
                }
            }
        }
        Ok(())
    }

    /// Releases the lease after a refresh of `generation` that stored no change, so that another process may try; not
    /// before the retry of `state`, if it failed.
    pub(super) async fn release(&self, generation: u64, state: Option<&GrantState>) {
        let Coordination::Shared(Follower { store, .. }) = &self.manager.0.coordination else { return };
        let now = self.manager.0.clock.reading();
        let retry_in = |retry_at: SignedDuration| Duration::try_from(retry_at - now.uptime).unwrap_or_default();
        let failed = match state {
            // Without the store nobody can be told, and another process's refresh is no failure.
            Some(GrantState::Failing { failure, .. }) if [STORE_UNAVAILABLE, BUSY.code].contains(&failure.code) => None,
            Some(GrantState::Failing { failure, attempts, retry_at, .. }) => Some(FailedRefresh {
                refused: false,
                code: failure.code.to_owned(),
                attempts: *attempts,
                retry_in: retry_in(*retry_at),
            }),
            Some(GrantState::LoginRequired { reason, retry_at, .. }) => Some(FailedRefresh {
                refused: true,
                code: (*reason).to_owned(),
                attempts: 1,
                retry_in: retry_in(*retry_at),
            }),
            _ => None,
        };
        let due = self.entry.due(self.manager.policy(), now).map(|due| now.wall_at(due));
        let due = match (state, due) {
            (Some(state), Some(due)) => Some(state.retry_at().map_or(due, |retry_at| now.wall_at(retry_at))),
            (_, due) => due,
        };
        // If this fails, the lease expires by itself.
        let released = store.release_lease(&self.entry.user, generation, failed.as_ref(), due);
        let _ = self.manager.timed("lease", released).await;
    }
}

/// The error for callers while the store is unavailable.
fn unavailable() -> TokenError {
    TokenError::Unavailable { code: STORE_UNAVAILABLE, remedy: Remedy::Time, detail: None, retry_after: POLL }
}

/// The state of a grant whose last refresh failed at whatever process.
pub(super) fn failed_state(grant: Arc<LiveGrant>, failed: &FailedRefresh, now: ClockReading) -> GrantState {
    let retry_at = now.uptime.saturating_add(SignedDuration::try_from(failed.retry_in).unwrap_or_default());
    let code = known_code(&failed.code);
    if failed.refused {
        return GrantState::LoginRequired { grant, reason: code, retry_at };
    }
    let failure = Failure { code, remedy: remedy_of(code), detail: None };
    GrantState::Failing { grant, failure, attempts: failed.attempts, retry_at }
}

fn is_same(held: &Grant, stored: &Grant) -> bool {
    let access = |grant: &Grant| grant.access.as_ref().map(|access| access.token.clone());
    held.generation == stored.generation && held.refresh_token == stored.refresh_token && access(held) == access(stored)
}

/// Whether another process obtained this token within the last `FORCED_SPACING`, which applies across all processes.
fn is_new(grant: &LiveGrant, now: ClockReading) -> bool {
    grant.age_if_foreign(now).is_some_and(|age| age < FORCED_SPACING)
}
