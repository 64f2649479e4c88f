//! Keeps each user's access token fresh.
//!
//! Each refresh runs in a task of its own (`RefreshTask` in the code), at most one per user, and callers wait for its
//! result. A caller that hangs up cancels nothing. What follows from a result is a pure function
//! ([`GrantState::next`]); a new grant is stored before it is published, and dropped if the user's grant changed
//! meanwhile (logout, a new login).
//!
//! One refresh, step by step: `start_refresh` (`refresh_task`) spawns `RefreshTask::run`; `acquire` (`lease`)
//! returns the grant, after waiting for the lease if processes share the store; `token_call` sends the request, if
//! `client_circuit` permits it, and `prepare` records it first (`refresh_journal`); `TokenManager::store` writes the
//! new grant; `publish` makes it current and reschedules the user (`scheduler`); dropping the task wakes the waiters.
//!
//! With a shared store the users that are not in memory are read when they are needed (`coordination`), and the
//! database says which refreshes are due (`claims`, `pace`).
//!
//! The hot path, [`TokenManager::bearer`] with a token that does not expire soon, takes no lock that a refresh holds.
//!
//! The file is a little over 400 lines: it is the public side of the whole folder, whose steps are files of their own.

mod scheduler;
mod claims;
pub mod pace;
mod adopt_forget;
mod clock_skew;
mod bootstrap;
mod user_state;
mod refresh_task;
mod refresh_journal;
mod client_circuit;
pub mod brake;
mod status;
mod coordination;
mod follower;
mod refreshed_elsewhere;
mod lease;
mod take_over;
mod import;
mod sync;

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderValue;
use jiff::SignedDuration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::lwa::Lwa;
use crate::domain::account::UserId;
use crate::domain::clock::Clock;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Grant, GrantState, RefreshPolicy, RefreshToken, Remedy};
use crate::store::{StoreError, TokenStore};
use crate::telemetry::metrics::Metrics;
use bootstrap::ADOPTED;
use client_circuit::ClientCircuit;
use coordination::Coordination;
pub use import::ImportError;
use refresh_journal::Interrupted;
use refresh_task::RefreshReason;
pub use refresh_task::jitter;
use scheduler::Scheduler;
pub use status::Status;
use user_state::{UserState, Writing};

/// When tokens are refreshed.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `refresh.margin`, `refresh.ahead`, `refresh.idle_after`.
    pub policy: RefreshPolicy,
    /// `refresh.sweep`: interval at which every user is rescheduled, so that none is missed.
    pub sweep: Duration,
    /// `refresh.concurrency`: maximum number of concurrent background refreshes of this process.
    pub concurrency: usize,
    /// `store.cache`: number of users of a shared store that are held in memory.
    pub cache: usize,
    /// `amazon.refresh_token`: adopted as the grant of user `default`.
    pub adopt: Option<RefreshToken>,
}

/// How long a caller waits for a refresh while the current token is still valid.
const WAIT_WITH_TOKEN: Duration = Duration::from_secs(1);
/// How long a caller waits without a valid token: the token call's own timeout of 10 s, and a little more.
const WAIT_WITHOUT_TOKEN: Duration = Duration::from_secs(12);
/// After a failed refresh a caller waits for the retry if it is at most this far away and at most this many attempts
/// have failed. Beyond that LWA counts as down, and callers get an error at once.
const WAIT_FOR_RETRY: Duration = Duration::from_millis(1500);
const WAIT_ATTEMPTS: u32 = 2;
/// Minimum time between two forced refreshes of one user.
const FORCED_SPACING: SignedDuration = SignedDuration::from_secs(30);
/// Interval between probes of a failed store.
const STORE_PERIOD: Duration = Duration::from_secs(1);
/// The first background refreshes after startup are spread over this time per user, at most over `SPREAD_MAX`.
const SPREAD_EACH: Duration = Duration::from_millis(60);
const SPREAD_MAX: Duration = Duration::from_secs(60);

/// Minimum time, in seconds, between two requests whose response's `Date` is compared with this machine's clock.
const CHECK_CLOCK_EVERY: i64 = 10;

/// The credential for one request to Amazon.
#[derive(Clone, Debug)]
pub struct Bearer {
    /// `Bearer <access token>`, the value of `Authorization`.
    pub value: HeaderValue,
    /// Whether the response's headers are to be passed to [`TokenManager::observe_amazons_clock`].
    pub check_clock: bool,
}

/// Keeps every user's access token fresh. Clones are handles to the same manager.
#[derive(Clone, Debug)]
pub struct TokenManager(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: ArcSwap<Settings>,
    store: TokenStore,
    lwa: ArcSwap<Lwa>,
    clock: Clock,
    metrics: Arc<Metrics>,
    users: RwLock<HashMap<UserId, Arc<UserState>>>,
    /// Sends users whose schedule changed to the background scheduler.
    scheduler: mpsc::UnboundedSender<Arc<UserState>>,
    /// Refresh tasks and other work that a shutdown waits for.
    tasks: TaskTracker,
    /// Cancelled when no further background refresh may begin.
    ending: CancellationToken,
    /// Number of grants that are newer in memory than in the store.
    unsaved: AtomicUsize,
    circuit: ClientCircuit,
    coordination: Coordination,
    interrupted: Interrupted,
    /// Uptime, in seconds, of the next comparison of Amazon's clock with this machine's.
    next_clock_check: AtomicI64,
}

/// Why there is no token for a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenError {
    /// The user has no usable grant.
    LoginRequired {
        /// `no_grant`, or LWA's error code.
        reason: &'static str,
    },
    /// There is a grant, but no valid access token could be obtained.
    Unavailable {
        /// Why the last refresh failed.
        code: &'static str,
        /// Whether time or the operator resolves it.
        remedy: Remedy,
        /// What happened, where the code does not say it all.
        detail: Option<Arc<str>>,
        /// How long until the next attempt.
        retry_after: Duration,
    },
}

/// The background scheduler: run it beside the listeners.
#[derive(Debug)]
pub struct Background {
    manager: TokenManager,
    scheduler: Scheduler,
}

impl TokenManager {
    /// Creates the manager from `grants` as loaded from the store, and its background scheduler.
    pub fn new(
        settings: Settings,
        store: TokenStore,
        grants: impl IntoIterator<Item = (UserId, Grant)>,
        lwa: Lwa,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> (Self, Background) {
        if let Some(shared) = store.shared() {
            shared.set_policy(settings.policy);
        }
        let (scheduler, changes) = mpsc::unbounded_channel();
        let grants: Vec<_> = grants.into_iter().collect();
        // A single user is refreshed at once; a thousand users must not all call Login with Amazon at the same time.
        let others = u32::try_from(grants.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let (now, spread) = (clock.reading(), SPREAD_EACH.saturating_mul(others).min(SPREAD_MAX));
        let entry =
            |(user, grant): (UserId, _)| (user.clone(), Arc::new(UserState::new(user, Some(grant), now, spread)));
        let manager = Self(Arc::new(Inner {
            users: RwLock::new(grants.into_iter().map(entry).collect()),
            settings: ArcSwap::from_pointee(settings),
            coordination: Coordination::new(&store),
            store,
            lwa: ArcSwap::from_pointee(lwa),
            clock,
            metrics,
            scheduler,
            tasks: TaskTracker::new(),
            ending: CancellationToken::new(),
            unsaved: AtomicUsize::new(0),
            circuit: ClientCircuit::new(),
            interrupted: Interrupted::default(),
            next_clock_check: AtomicI64::new(i64::MIN),
        }));
        let scheduler = Scheduler::new(changes);
        (manager.clone(), Background { manager, scheduler })
    }

    /// Returns the credential for a request on behalf of `user`, refreshing the token first if necessary.
    ///
    /// # Errors
    /// [`TokenError`] if the user has no usable grant, or no valid token could be obtained in time.
    pub async fn bearer(&self, user: &UserId) -> Result<Bearer, TokenError> {
        let entry = match self.entry(user) {
            Some(entry) => entry,
            None => self.find(user).await?,
        };
        if self.is_behind() {
            Box::pin(self.ask(&entry)).await;
        }
        let now = self.0.clock.reading();
        entry.mark_used(now);
        let held = entry.held();
        let value = match held.valid_token(now) {
            Some(access) if !held.expiring(self.policy(), now) => access.bearer().clone(),
            _ => Box::pin(self.refreshed_bearer(&entry)).await?,
        };
        Ok(Bearer { value, check_clock: self.check_clock(now) })
    }

    /// Whether a request at `now` is the first after [`CHECK_CLOCK_EVERY`].
    fn check_clock(&self, now: ClockReading) -> bool {
        let (uptime, next) = (now.uptime.as_secs(), self.0.next_clock_check.load(Relaxed));
        let due = uptime >= next;
        if due {
            self.0.next_clock_check.store(uptime.saturating_add(CHECK_CLOCK_EVERY), Relaxed);
        }
        due
    }

    /// The slow path of [`bearer`](Self::bearer): the token expires within the margin or has expired.
    async fn refreshed_bearer(&self, entry: &Arc<UserState>) -> Result<HeaderValue, TokenError> {
        let begun = Instant::now();
        let mut looked = false;
        loop {
            let changed = entry.changed();
            let held = entry.held().clone();
            let now = self.0.clock.reading();
            if let Some(access) = held.valid_token(now) {
                let enough = !held.expiring(self.policy(), now) || held.backs_off(now);
                if enough || begun.elapsed() >= WAIT_WITH_TOKEN {
                    return Ok(access.bearer().clone());
                }
                self.start_refresh(entry, RefreshReason::OnDemand);
                let _ = timeout_at(begun + WAIT_WITH_TOKEN, changed.wait()).await;
                continue;
            }
            match &*held {
                GrantState::Nothing | GrantState::LoginRequired { .. }
                    if !std::mem::replace(&mut looked, true) && self.logged_in_elsewhere(entry).await => {}
                GrantState::Nothing => return Err(TokenError::LoginRequired { reason: "no_grant" }),
                GrantState::LoginRequired { reason, retry_at, .. } if now.uptime < *retry_at => {
                    return Err(TokenError::LoginRequired { reason });
                }
                GrantState::Failing { failure, attempts, retry_at, .. } if now.uptime < *retry_at => {
                    let pause = Duration::try_from(*retry_at - now.uptime).unwrap_or_default();
                    if *attempts > WAIT_ATTEMPTS || pause > WAIT_FOR_RETRY || begun.elapsed() > WAIT_WITHOUT_TOKEN {
                        let Failure { code, remedy, detail } = failure.clone();
                        return Err(TokenError::Unavailable { code, remedy, detail, retry_after: pause });
                    }
                    tokio::select! {
                        _ = timeout(WAIT_FOR_RETRY, self.0.clock.sleep_until(*retry_at)) => {}
                        () = changed.wait() => {}
                    }
                }
                _ => {
                    self.start_refresh(entry, RefreshReason::OnDemand);
                    if timeout_at(begun + WAIT_WITHOUT_TOKEN, changed.wait()).await.is_err() {
                        return Err(TokenError::Unavailable {
                            code: "timeout",
                            remedy: Remedy::Time,
                            detail: None,
                            retry_after: Duration::from_secs(1),
                        });
                    }
                }
            }
        }
    }

    /// Handles Amazon's rejection of an unexpired `bearer`: returns a different token to retry with, or `None` if there
    /// is none; then the caller gets Amazon's rejection. One forced refresh serves all concurrent callers.
    pub async fn invalidate(&self, user: &UserId, bearer: &HeaderValue) -> Option<HeaderValue> {
        let entry = self.find(user).await.ok()?;
        let until = Instant::now() + WAIT_WITHOUT_TOKEN;
        loop {
            let changed = entry.changed();
            if let Some(other) = self.other_than(&entry, bearer) {
                return Some(other);
            }
            let start_refresh = || self.start_refresh(&entry, RefreshReason::Rejected(bearer.clone()));
            // A refresh task that was already running may end without a token call: then this caller forces one.
            fail_point!("rejection_seen");
            if !entry.force(self.0.clock.reading(), FORCED_SPACING, start_refresh) {
                // No refresh is running or may be forced, but one may have ended since the token was compared.
                return self.other_than(&entry, bearer);
            }
            if timeout_at(until, changed.wait()).await.is_err() {
                return None;
            }
        }
    }

    fn other_than(&self, entry: &UserState, bearer: &HeaderValue) -> Option<HeaderValue> {
        let held = entry.held();
        let access = held.valid_token(self.0.clock.reading())?;
        Some(access.bearer()).filter(|current| *current != bearer).cloned()
    }

    /// Whether the access token of `user` expires within the margin or has expired.
    pub fn near_expiry(&self, user: &UserId) -> bool {
        self.entry(user).is_some_and(|entry| entry.held().expiring(self.policy(), self.0.clock.reading()))
    }

    /// Whether every grant in memory is stored and the store works.
    pub fn stored(&self) -> bool {
        self.0.unsaved.load(Relaxed) == 0 && self.0.store.health().up
    }

    /// The number of users that this process holds in memory.
    pub fn held_users(&self) -> usize {
        self.0.users.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether the store fails, or this process does not know what others have changed in it.
    pub fn is_degraded(&self) -> bool {
        !self.stored() || self.is_behind()
    }

    /// Probes a failed store until it works; any operation makes it try to reopen.
    async fn watch_store(&self) {
        loop {
            tokio::time::sleep(STORE_PERIOD).await;
            if !self.0.store.health().up && self.0.store.note(ADOPTED).await.is_ok() {
                tracing::info!("the store works again");
            }
        }
    }

    /// Applies new settings and reschedules the refresh of every known user.
    pub fn reconfigure(&self, settings: Settings, lwa: Lwa) {
        if let Some(shared) = self.0.store.shared() {
            shared.set_policy(settings.policy);
        }
        self.0.settings.store(Arc::new(settings));
        self.0.lwa.store(Arc::new(lwa));
        // The new settings may have corrected the client secret.
        self.0.circuit.forget();
        for entry in self.entries() {
            entry.try_again(self.0.clock.reading());
            // Sending fails only during shutdown, when the scheduler is gone.
            let _ = self.0.scheduler.send(entry);
        }
    }

    /// Begins no further background refresh, because the process shuts down: a response from LWA that comes after the
    /// store was closed would be lost. Callers still get refreshes.
    pub fn end_background(&self) {
        self.0.ending.cancel();
    }

    /// Ends the background, and waits for in-flight token calls and writes, so that no response from LWA is lost.
    pub async fn settle(&self) {
        self.end_background();
        self.0.tasks.close();
        self.0.tasks.wait().await;
        self.settle_journal().await;
    }

    /// Publishes `held` and schedules the next refresh. Does not wake waiters: see [`Writing::publish`].
    fn publish(&self, entry: &Arc<UserState>, write: &Writing<'_>, held: GrantState) {
        write.publish(held);
        // Sending fails only during shutdown, when the scheduler is gone.
        let _ = self.0.scheduler.send(entry.clone());
    }

    async fn timed<T>(
        &self,
        op: &str,
        operation: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let begun = std::time::Instant::now();
        let result = operation.await;
        // A conflict is a valid result of compare-and-swap, not a failure of the store.
        let failed = result.as_ref().err().filter(|error| !matches!(error, StoreError::Conflict));
        self.0.metrics.store_operation(op, begun.elapsed(), failed.is_none());
        if let Some(error) = failed {
            tracing::error!(%error, op, "the store failed");
        }
        result
    }

    fn policy(&self) -> RefreshPolicy {
        self.0.settings.load().policy
    }

    fn entry(&self, user: &UserId) -> Option<Arc<UserState>> {
        self.0.users.read().unwrap_or_else(PoisonError::into_inner).get(user).cloned()
    }

    /// Entries are never removed: a refresh task that ends after a logout and a new login must find the same one.
    fn entry_or_new(&self, user: &UserId) -> Arc<UserState> {
        let mut users = self.0.users.write().unwrap_or_else(PoisonError::into_inner);
        users.entry(user.clone()).or_insert_with(|| Arc::new(self.blank(user))).clone()
    }

    /// An empty entry for an unknown user.
    fn blank(&self, user: &UserId) -> UserState {
        UserState::new(user.clone(), None, self.0.clock.reading(), Duration::ZERO)
    }

    fn entries(&self) -> Vec<Arc<UserState>> {
        self.0.users.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

impl Background {
    /// Refreshes tokens before callers need them, and notices when a failed store works again. Runs until dropped.
    pub async fn run(self) {
        self.manager.look_for_interrupted().await;
        tokio::join!(self.manager.schedule(self.scheduler), self.manager.follow_store());
    }
}
