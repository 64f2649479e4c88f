//! Who holds which token.
//!
//! Callers wait, workers work: a renewal is a task of its own, one per user at a time (a *flight*), and whoever wants its
//! result subscribes. A caller that hangs up takes nothing down. What a flight decides is pure ([`GrantState::next`]); what it
//! found is stored before it is published, and dropped where the grant changed meanwhile (logout, a new login).
//!
//! The hot path, [`TokenManager::bearer`] with a token that has enough of its life left, takes no lock that a renewal holds.

mod scheduler;
mod adopt_forget;
mod clock_skew;
mod bootstrap;
mod user_state;
mod refresh_task;
mod refresh_journal;
mod client_circuit;
mod status;
mod coordination;
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
use tokio_util::task::TaskTracker;

use crate::auth::lwa::Lwa;
use crate::domain::account::UserId;
use crate::domain::clock::Clock;
use crate::domain::grant::{Grant, GrantState, RefreshPolicy, RefreshToken, Remedy};
use crate::store::{StoreError, TokenStore};
use crate::telemetry::metrics::Metrics;
use bootstrap::ADOPTED;
use client_circuit::ClientCircuit;
use refresh_journal::RefreshJournal;
use refresh_task::RefreshReason;
use scheduler::Scheduler;
pub use status::Status;
use user_state::{UserState, Writing};

/// When tokens are renewed (contract, section 5).
#[derive(Clone, Debug)]
pub struct Settings {
    /// `refresh.margin`, `refresh.ahead`, `refresh.idle_after`.
    pub policy: RefreshPolicy,
    /// `refresh.sweep`: how often all users are looked at, so that none is missed.
    pub sweep: Duration,
    /// `refresh.concurrency`: background renewals at once.
    pub concurrency: usize,
    /// `amazon.refresh_token`: adopted as user `default`.
    pub adopt: Option<RefreshToken>,
}

/// While their token lives, callers wait no longer than this for its renewal.
const WAIT_LIVING: Duration = Duration::from_secs(1);
/// Without a living token they wait for the token call, which ends within 10 s by itself, and a little more.
const WAIT_DEAD: Duration = Duration::from_secs(12);
/// A caller waits out the pause behind a failed renewal if it is no longer than this, and this many failures long; then
/// LWA is taken to be down, and callers are told so at once.
const PATIENCE: Duration = Duration::from_millis(1500);
const PATIENT_ATTEMPTS: u32 = 2;
/// Two forced refreshes of one user are at least this far apart.
const FORCED_SPACING: SignedDuration = SignedDuration::from_secs(30);
/// How often a store that failed is asked again.
const STORE_PERIOD: Duration = Duration::from_secs(1);
/// At the start the background's first renewals are spread: over this long for each user, and over this long at most.
const SPREAD_EACH: Duration = Duration::from_millis(60);
const SPREAD_MAX: Duration = Duration::from_secs(60);

/// Keeps every user's tokens alive. Cloning gives another handle to the same keeper.
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
    /// Users whose schedule changed.
    scheduler: mpsc::UnboundedSender<Arc<UserState>>,
    /// Flights, so that a shutdown waits for them.
    flights: TaskTracker,
    /// Grants that are newer in memory than on disk.
    unsaved: AtomicUsize,
    circuit: ClientCircuit,
    journal: RefreshJournal,
    /// The uptime in seconds from which on the next answer of the Ads API is asked for its date.
    listen_at: AtomicI64,
}

/// RefreshReason there is no token for a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenError {
    /// The user has no usable grant.
    LoginRequired {
        /// `no_grant`, or LWA's error code.
        reason: &'static str,
    },
    /// There is a grant, and no living token could be had.
    Unavailable {
        /// RefreshReason the last renewal failed.
        code: &'static str,
        /// Whose turn it is.
        remedy: Remedy,
        /// When the next try is due.
        retry_after: Duration,
    },
}

/// The background's part: run it beside the doors.
#[derive(Debug)]
pub struct Background {
    keeper: TokenManager,
    scheduler: Scheduler,
}

impl TokenManager {
    /// Takes charge of `grants`, as the store held them.
    pub fn new(
        settings: Settings,
        store: TokenStore,
        grants: impl IntoIterator<Item = (UserId, Grant)>,
        lwa: Lwa,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> (Self, Background) {
        let (scheduler, changes) = mpsc::unbounded_channel();
        let grants: Vec<_> = grants.into_iter().collect();
        // One user is not kept waiting; a thousand do not ask Login with Amazon all at once.
        let others = u32::try_from(grants.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let (now, spread) = (clock.moment(), SPREAD_EACH.saturating_mul(others).min(SPREAD_MAX));
        let entry =
            |(user, grant): (UserId, _)| (user.clone(), Arc::new(UserState::new(user, Some(grant), now, spread)));
        let keeper = Self(Arc::new(Inner {
            users: RwLock::new(grants.into_iter().map(entry).collect()),
            settings: ArcSwap::from_pointee(settings),
            store,
            lwa: ArcSwap::from_pointee(lwa),
            clock,
            metrics,
            scheduler,
            flights: TaskTracker::new(),
            unsaved: AtomicUsize::new(0),
            circuit: ClientCircuit::default(),
            journal: RefreshJournal::default(),
            listen_at: AtomicI64::new(i64::MIN),
        }));
        let scheduler = Scheduler::new(changes);
        (keeper.clone(), Background { keeper, scheduler })
    }

    /// `Bearer <token>` for a call on behalf of `user`, renewed first if need be.
    pub async fn bearer(&self, user: &UserId) -> Result<HeaderValue, TokenError> {
        let entry = match self.entry(user) {
            Some(entry) => entry,
            None => self.find(user).await?,
        };
        let now = self.0.clock.moment();
        entry.mark_used(now);
        let held = entry.held();
        match held.living(now) {
            Some(access) if !held.expiring(self.policy(), now) => Ok(access.bearer().clone()),
            _ => Box::pin(self.renewed_bearer(&entry)).await,
        }
    }

    /// The slow half of [`bearer`](Self::bearer): little or nothing is left of the token's life.
    async fn renewed_bearer(&self, entry: &Arc<UserState>) -> Result<HeaderValue, TokenError> {
        let begun = Instant::now();
        let mut looked = false;
        loop {
            let changed = entry.changed();
            let held = entry.held().clone();
            let now = self.0.clock.moment();
            if let Some(access) = held.living(now) {
                let enough = !held.expiring(self.policy(), now) || held.backs_off(now);
                if enough || begun.elapsed() >= WAIT_LIVING {
                    return Ok(access.bearer().clone());
                }
                self.fly(entry, RefreshReason::OnDemand);
                let _ = timeout_at(begun + WAIT_LIVING, changed.wait()).await;
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
                    if *attempts > PATIENT_ATTEMPTS || pause > PATIENCE || begun.elapsed() > WAIT_DEAD {
                        let (code, remedy) = (failure.code, failure.remedy);
                        return Err(TokenError::Unavailable { code, remedy, retry_after: pause });
                    }
                    tokio::select! {
                        _ = timeout(PATIENCE, self.0.clock.sleep_until(*retry_at)) => {}
                        () = changed.wait() => {}
                    }
                }
                _ => {
                    self.fly(entry, RefreshReason::OnDemand);
                    if timeout_at(begun + WAIT_DEAD, changed.wait()).await.is_err() {
                        return Err(TokenError::Unavailable {
                            code: "timeout",
                            remedy: Remedy::Time,
                            retry_after: Duration::from_secs(1),
                        });
                    }
                }
            }
        }
    }

    /// Amazon refused `bearer` though it lives: a different token to try with, or `None` where there is none to be had,
    /// and Amazon's answer stands. One forced refresh serves all who ask while it runs.
    pub async fn invalidate(&self, user: &UserId, bearer: &HeaderValue) -> Option<HeaderValue> {
        let entry = self.entry(user)?;
        let until = Instant::now() + WAIT_DEAD;
        loop {
            let changed = entry.changed();
            if let Some(other) = self.other_than(&entry, bearer) {
                return Some(other);
            }
            let fly = || self.fly(&entry, RefreshReason::Distrusted(bearer.clone()));
            // A flight that was under way may end without a token call: then it is this caller's turn.
            if !entry.force(self.0.clock.moment(), FORCED_SPACING, fly)
                || timeout_at(until, changed.wait()).await.is_err()
            {
                return None;
            }
        }
    }

    fn other_than(&self, entry: &UserState, bearer: &HeaderValue) -> Option<HeaderValue> {
        let held = entry.held();
        let access = held.living(self.0.clock.moment())?;
        Some(access.bearer()).filter(|living| *living != bearer).cloned()
    }

    /// Whether the token of `user` ends within the margin, or has ended.
    pub fn near_expiry(&self, user: &UserId) -> bool {
        self.entry(user).is_some_and(|entry| entry.held().expiring(self.policy(), self.0.clock.moment()))
    }

    /// Refreshes `user` now, whatever is left of the token, or joins the refresh that is running.
    pub async fn refresh(&self, user: &UserId) -> Result<Status, TokenError> {
        let no_grant = TokenError::LoginRequired { reason: "no_grant" };
        let entry = self.find(user).await?;
        let held = entry.held().clone();
        if let GrantState::Failing { retry_at, .. } = &*held {
            let _ = timeout(PATIENCE, self.0.clock.sleep_until(*retry_at)).await;
        }
        let changed = entry.changed();
        if !entry.held().backs_off(self.0.clock.moment()) {
            self.fly(&entry, RefreshReason::Manual);
            let _ = timeout(WAIT_DEAD, changed.wait()).await;
        }
        match &**entry.held() {
            GrantState::Nothing => Err(no_grant),
            GrantState::LoginRequired { reason, .. } => Err(TokenError::LoginRequired { reason }),
            GrantState::Fresh(_) | GrantState::Failing { .. } => Ok(self.tell(&entry)),
        }
    }

    /// Whether everything in memory is on disk and the store works.
    pub fn stored(&self) -> bool {
        self.0.unsaved.load(Relaxed) == 0 && self.0.store.health().up
    }

    /// A store that failed is asked again until it answers; any operation makes it try to open anew.
    async fn watch_store(&self) {
        loop {
            tokio::time::sleep(STORE_PERIOD).await;
            if !self.0.store.health().up && self.0.store.note(ADOPTED).await.is_ok() {
                tracing::info!("the store works again");
            }
        }
    }

    /// Takes other settings into use, for everybody who is known: their renewals are planned anew.
    pub fn reconfigure(&self, settings: Settings, lwa: Lwa) {
        self.0.settings.store(Arc::new(settings));
        self.0.lwa.store(Arc::new(lwa));
        // Perhaps the client secret was wrong, and is right now.
        self.0.circuit.forget();
        for entry in self.entries() {
            entry.try_again(self.0.clock.moment());
            // The background is gone only when the process is about to be.
            let _ = self.0.scheduler.send(entry);
        }
    }

    /// Waits for what is in flight, so that no answer of LWA is lost, and for what is not on disk yet.
    pub async fn settle(&self) {
        self.0.flights.close();
        self.0.flights.wait().await;
        self.settle_intents().await;
    }

    /// Makes `held` what everybody sees, and plans its next renewal. Wakes nobody: see [`Writing::publish`].
    fn publish(&self, entry: &Arc<UserState>, write: &Writing<'_>, held: GrantState) {
        write.publish(held);
        // The background is gone only when the process is about to be.
        let _ = self.0.scheduler.send(entry.clone());
    }

    async fn timed<T>(
        &self,
        op: &str,
        operation: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let begun = std::time::Instant::now();
        let result = operation.await;
        // That somebody else was faster is an answer too.
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

    /// Entries are never removed: a flight that ends after a logout and a new login must find the same one.
    fn entry_or_new(&self, user: &UserId) -> Arc<UserState> {
        let mut users = self.0.users.write().unwrap_or_else(PoisonError::into_inner);
        users.entry(user.clone()).or_insert_with(|| Arc::new(self.blank(user))).clone()
    }

    /// The entry of a user of whom nothing is known.
    fn blank(&self, user: &UserId) -> UserState {
        UserState::new(user.clone(), None, self.0.clock.moment(), Duration::ZERO)
    }

    fn entries(&self) -> Vec<Arc<UserState>> {
        self.0.users.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

impl Background {
    /// Renews tokens before anybody needs them, for as long as it runs, and notices when a store that failed works again.
    pub async fn run(self) {
        if self.keeper.0.store.shared().is_some() {
            tokio::join!(self.scheduler.run(&self.keeper), self.keeper.follow());
        } else {
            self.keeper.look_for_interrupted().await;
            tokio::join!(self.scheduler.run(&self.keeper), self.keeper.watch_store());
        }
    }
}
