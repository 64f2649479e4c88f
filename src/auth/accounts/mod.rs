//! The directory of accounts: which accounts each user's grant reaches, found at Amazon and stored, so that a caller
//! can select one by its slug.
//!
//! Amazon is asked after a login, on request, and once a day (`accounts.sync`). What a source lists is taken; what it
//! does not list any more is marked as missing and stays selectable; a source that does not answer changes nothing.
//!
//! Accounts are read when a request names one. The store has an index of all slugs, and the accounts of the users that
//! were used last are in memory (`cache.rs`).
//!
//! The file is over 400 lines: what is read, searched for, stored and renamed shares one cache and one lock per user.

mod cache;
mod discovery;
mod listing;
mod merge;
mod outcome;
mod snapshot;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures_util::StreamExt;
use http::HeaderValue;
use jiff::SignedDuration;
use tokio::sync::{Notify, OwnedMutexGuard};

use crate::auth::tokens::{TokenError, TokenManager};
use crate::domain::account::{Account, AmazonHost, Region, UserId};
use crate::domain::clock::Clock;
use crate::domain::found_account::{FoundAccount, assign_slugs, candidate_slugs};
use crate::domain::grant::State;
use crate::store::{
    AccountsChanged, AccountsSaved, IndexedAccount, NewAccounts, StoreError, StoredAccounts, TokenStore,
};
use crate::throttle::Throttle;
use crate::upstream::Upstream;
use cache::Cache;
use discovery::Discovery;
pub use listing::{Filter, Listed, Page, list};
use merge::merge;
pub use outcome::{Outcome, Source, Status, UserAccounts};
pub use snapshot::{Entry, Snapshot};

/// `accounts.sync`: when Amazon is asked without a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Automatic {
    /// After a login, and once a day.
    #[default]
    Daily,
    /// Never.
    Off,
}

/// Interval of the automatic search.
const DAY: SignedDuration = SignedDuration::from_hours(24);
/// How often it is checked whose search is due.
const CHECK: Duration = Duration::from_secs(15);
const CHECK_SHARED: Duration = Duration::from_secs(60);
/// Most automatic searches at a time.
const CONCURRENCY: usize = 2;
/// Time limit of one search.
const TIMEOUT: Duration = Duration::from_secs(120);
/// After a search in which nothing answered, the next automatic one.
const RETRY: SignedDuration = SignedDuration::from_hours(1);
/// How long after a login another process searches, if the one that heard of it has ended: longer than its search.
const ORPHANED: SignedDuration = SignedDuration::from_mins(5);
/// Attempts to store accounts that other processes change at the same moment.
const MAX_ATTEMPTS: usize = 10;
/// Up to this many found accounts are named in metrics.
const NAMED_IN_METRICS: usize = 200;

/// The directory. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: TokenStore,
    tokens: TokenManager,
    clock: Clock,
    /// `None` until the configuration is in force.
    reach: ArcSwapOption<Reach>,
    cache: Mutex<Cache>,
    /// Whether there are too many accounts to name each in the metrics.
    is_large: AtomicBool,
    /// One search per user at a time.
    searching: Mutex<HashMap<UserId, Arc<tokio::sync::Mutex<()>>>>,
    /// Users who have just logged in.
    wanted: Mutex<HashSet<UserId>>,
    /// Whether a new configuration may give accounts names that found accounts have as slugs.
    renamed: AtomicBool,
    wake: Notify,
}

/// How Amazon is reached, and what the configuration says; a reload replaces it.
#[derive(Debug)]
pub struct Reach {
    /// The connections to Amazon.
    pub upstream: Arc<Upstream>,
    /// What Amazon's 429s have taught about this client.
    pub throttle: Arc<Throttle>,
    /// `amazon.client_id`.
    pub client_id: HeaderValue,
    /// `amazon.region`.
    pub home: Region,
    /// `accounts.sync`.
    pub automatic: Automatic,
    /// `store.cache`: users whose accounts are held in memory.
    pub cache: usize,
    /// The accounts of the configuration, whose names win.
    pub configured: Vec<Account>,
}

/// Why a search failed as a whole.
#[derive(Debug)]
pub enum SyncError {
    /// The user has no usable grant, or no access token.
    NoToken(TokenError),
    /// What was found could not be stored; it is in use until the process ends.
    Store(StoreError),
    /// No region answered; holds the reasons.
    NoRegion(String),
}

impl Directory {
    /// Creates the directory. Nothing is read yet.
    pub fn new(store: TokenStore, tokens: TokenManager, clock: Clock) -> Self {
        Self(Arc::new(Inner {
            store,
            tokens,
            clock,
            reach: ArcSwapOption::empty(),
            cache: Mutex::default(),
            is_large: AtomicBool::new(false),
            searching: Mutex::default(),
            wanted: Mutex::default(),
            renamed: AtomicBool::new(false),
            wake: Notify::new(),
        }))
    }

    /// Takes over a new configuration.
    pub fn reconfigure(&self, reach: Reach) {
        self.0.reach.store(Some(Arc::new(reach)));
        lock(&self.0.cache).clear();
        self.0.renamed.store(true, Relaxed);
        self.0.wake.notify_one();
    }

    /// The accounts of the configuration.
    pub fn configured(&self) -> Vec<Account> {
        self.0.reach.load().as_ref().map(|reach| reach.configured.clone()).unwrap_or_default()
    }

    /// `amazon.region`.
    fn home(&self) -> Region {
        self.0.reach.load().as_ref().map(|reach| reach.home).unwrap_or_default()
    }

    /// Whether there are too many accounts to name each in the metrics.
    pub fn is_large(&self) -> bool {
        self.0.is_large.load(Relaxed)
    }

    /// The found account with this slug, if it is in memory; `None` if the store has to be asked.
    pub fn account_in_memory(&self, slug: &str) -> Option<Option<Arc<Entry>>> {
        lock(&self.0.cache).account(slug)
    }

    /// The found account with this slug, if there is one.
    ///
    /// # Errors
    /// [`StoreError`] if the store cannot be read.
    pub async fn account(&self, slug: &str) -> Result<Option<Arc<Entry>>, StoreError> {
        if let Some(known) = self.account_in_memory(slug) {
            return Ok(known);
        }
        let user = match self.0.store.accounts_with(slug).await? {
            Some(stored) => self.take(stored).await?,
            None => None,
        };
        let found = user.as_ref().and_then(|user| user.accounts.iter().find(|found| found.slug == slug));
        if found.is_none() {
            lock(&self.0.cache).note_absent(slug, self.limit());
        }
        Ok(user.as_ref().and_then(|user| Some(Arc::new(Entry::of(found?, &user.user_id)))))
    }

    /// What is stored for `user`.
    ///
    /// # Errors
    /// [`StoreError`] if the store cannot be read.
    pub async fn of(&self, user: &UserId) -> Result<Option<Arc<UserAccounts>>, StoreError> {
        if let Some(known) = lock(&self.0.cache).user(user) {
            return Ok(Some(known));
        }
        match self.0.store.accounts_of(std::slice::from_ref(user)).await?.pop() {
            Some(stored) => self.take(stored).await,
            None => Ok(None),
        }
    }

    /// Prepares for the requests of a user who has just logged in: searches for their accounts soon, which leaves a
    /// connection to each region, or only opens the connections if searches are not automatic.
    pub fn logged_in(&self, user: &UserId) {
        if self.is_automatic() {
            lock(&self.0.wanted).insert(user.clone());
            self.0.wake.notify_one();
        } else {
            self.warm([user]);
        }
    }

    /// Prepares for the first requests: see [`warm`](Self::warm). Users whose grants were not read yet are left out.
    pub fn started(&self) {
        let configured = self.configured();
        let users: HashSet<_> = configured.iter().map(|account| &account.user).collect();
        let default = UserId::default();
        let usable = |user: &&UserId| {
            !matches!(self.0.tokens.status(user).state, State::None | State::LoginRequired | State::Idle)
        };
        self.warm(users.into_iter().chain([&default]).filter(usable));
    }

    /// Opens a connection to each region of `users` in the background, so that their next requests wait for no
    /// handshake.
    pub fn warm<'a>(&self, users: impl IntoIterator<Item = &'a UserId>) {
        let Some(reach) = self.0.reach.load_full() else { return };
        let mut regions = HashSet::new();
        for user in users {
            let known = lock(&self.0.cache).user(user);
            let found = known.iter().flat_map(|found| &found.accounts);
            let configured = reach.configured.iter().filter(|account| account.user == *user);
            let configured = configured.map(|account| account.region.unwrap_or(reach.home));
            let before = regions.len();
            regions.extend(configured.chain(found.map(|account| account.region)));
            if regions.len() == before {
                regions.insert(reach.home);
            }
        }
        regions.into_iter().for_each(|region| reach.upstream.warm(AmazonHost::ads(region)));
    }

    /// Drops the accounts of a user who was logged out; the store has deleted them.
    pub fn forget(&self, user: &UserId) {
        lock(&self.0.cache).changed(user, u64::MAX);
    }

    /// Asks Amazon for the accounts of `user`, and stores them. Concurrent calls for one user run one after the other.
    ///
    /// # Errors
    /// [`SyncError`] if there is no token, no region answers, or the store fails.
    pub async fn sync(&self, user: &UserId) -> Result<Arc<UserAccounts>, SyncError> {
        // A caller that hangs up leaves what was known before: everything changes at the end, at once.
        let turn = self.turn(user).lock_owned().await;
        let bearer = self.0.tokens.bearer(user).await.map_err(SyncError::NoToken)?;
        let Some(reach) = self.0.reach.load_full() else {
            return Err(SyncError::NoRegion("adsidecar is still starting".to_owned()));
        };
        let discovery = Discovery {
            upstream: reach.upstream.clone(),
            throttle: reach.throttle.clone(),
            client_id: reach.client_id.clone(),
            bearer: bearer.value,
            home: reach.home,
        };
        let found = tokio::time::timeout(TIMEOUT, Box::pin(discovery.run())).await;
        let found = found.map_err(|_| SyncError::NoRegion(format!("no answer within {TIMEOUT:?}")))?;
        let (owner, now) = (user.clone(), self.0.clock.now());
        let made = move |before: Option<&UserAccounts>| merge(&owner, before, &found, now);
        let merged = self.store_to_the_end(turn, user, made).await?;
        tracing::info!(%user, accounts = merged.accounts.len(), "accounts were looked for");
        if merged.any_region_answered() { Ok(merged) } else { Err(SyncError::NoRegion(merged.failures())) }
    }

    /// As [`store_accounts`](Self::store_accounts), under the lock `turn`, also if the caller hangs up: what is stored
    /// and what is in memory change together.
    async fn store_to_the_end(
        &self,
        turn: OwnedMutexGuard<()>,
        user: &UserId,
        make: impl Fn(Option<&UserAccounts>) -> UserAccounts + Send + Sync + 'static,
    ) -> Result<Arc<UserAccounts>, SyncError> {
        let (directory, user) = (self.clone(), user.clone());
        let store = async move {
            let stored = Box::pin(directory.store_accounts(&user, make)).await;
            drop(turn);
            stored
        };
        self.0.tokens.uninterrupted(store).await
    }

    /// Stores what `make` makes of the accounts that are stored for `user`, once they have slugs.
    async fn store_accounts(
        &self,
        user: &UserId,
        make: impl Fn(Option<&UserAccounts>) -> UserAccounts,
    ) -> Result<Arc<UserAccounts>, SyncError> {
        let no_grant = || SyncError::NoToken(TokenError::LoginRequired { reason: "no_grant" });
        let mut taken = HashSet::new();
        for _ in 0..MAX_ATTEMPTS {
            let read = self.0.store.accounts_of(std::slice::from_ref(user)).await;
            // What is in memory only, after a failure of the store, is better than nothing.
            let before = match &read {
                Ok(stored) => stored.first().and_then(parse),
                Err(_) => lock(&self.0.cache).user(user).as_deref().cloned(),
            };
            let seen = read.as_ref().map_or(0, |stored| stored.first().map_or(0, |stored| stored.version));
            let mut accounts = make(before.as_ref());
            self.assign(&mut accounts, &taken).await;
            // The user may have been logged out meanwhile: then nothing of theirs must come back.
            if self.0.tokens.status(user).state == State::None {
                return Err(no_grant());
            }
            let saved = match read {
                Ok(_) => self.0.store.save_accounts(user, stored_form(&accounts, seen)).await,
                Err(error) => Err(error),
            };
            match saved {
                Ok(AccountsSaved::Stored(version)) => {
                    // They are read when a request names one: most users are searched for and not used here.
                    lock(&self.0.cache).changed(user, version);
                    if !self.is_large() {
                        self.count().await;
                    }
                    return Ok(Arc::new(accounts));
                }
                Ok(AccountsSaved::Taken(slugs)) => taken.extend(slugs),
                Ok(AccountsSaved::Changed) => {}
                Ok(AccountsSaved::LoggedOut) => return Err(no_grant()),
                Err(error) => {
                    lock(&self.0.cache).put_read(&Arc::new(accounts), seen, self.limit());
                    return Err(SyncError::Store(error));
                }
            }
        }
        Err(SyncError::Store(StoreError::Conflict))
    }

    /// Gives a slug to each account that has none, or one that the configuration has as a name.
    async fn assign(&self, accounts: &mut UserAccounts, taken: &HashSet<String>) {
        let user = accounts.user_id.clone();
        // Without the store nobody knows; it refuses a slug that is taken.
        let owners = self.0.store.slug_owners(&candidate_slugs(&accounts.accounts, &user)).await.unwrap_or_default();
        let others: HashSet<String> =
            owners.into_iter().filter(|(_, owner)| *owner != user).map(|(slug, _)| slug).collect();
        let is_name = self.names();
        let is_taken = |slug: &str| is_name(slug) || others.contains(slug) || taken.contains(slug);
        assign_slugs(&mut accounts.accounts, &user, is_taken);
    }

    /// Takes accounts as they were read into memory. An account whose slug a new configuration has as a name gets
    /// another slug first.
    async fn take(&self, stored: StoredAccounts) -> Result<Option<Arc<UserAccounts>>, StoreError> {
        let Some(accounts) = parse(&stored) else { return Ok(None) };
        let is_name = self.names();
        if accounts.accounts.iter().any(|account| account.slug.is_empty() || is_name(&account.slug)) {
            return Box::pin(self.rename(&stored.user)).await;
        }
        let accounts = Arc::new(accounts);
        lock(&self.0.cache).put_read(&accounts, stored.version, self.limit());
        Ok(Some(accounts))
    }

    /// Gives new slugs to the accounts of `user` where that is necessary, and lists them in the index.
    async fn rename(&self, user: &UserId) -> Result<Option<Arc<UserAccounts>>, StoreError> {
        let turn = self.turn(user).lock_owned().await;
        if self.0.store.accounts_of(std::slice::from_ref(user)).await?.first().and_then(parse).is_none() {
            return Ok(None);
        }
        self.0.tokens.look(user).await?;
        let (owner, now) = (user.clone(), self.0.clock.now());
        let make =
            move |before: Option<&UserAccounts>| before.cloned().unwrap_or_else(|| UserAccounts::none(&owner, now));
        match self.store_to_the_end(turn, user, make).await {
            Ok(accounts) => Ok(Some(accounts)),
            Err(SyncError::Store(error)) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// Searches after logins and once a day, and follows what other processes store. Runs until dropped.
    pub async fn run(&self) {
        self.count().await;
        tokio::join!(self.follow(), self.search());
    }

    /// Drops what other processes have changed.
    async fn follow(&self) {
        loop {
            match self.0.store.accounts_changed().await {
                AccountsChanged::Users(users) => {
                    let mut cache = lock(&self.0.cache);
                    users.iter().for_each(|(user, version)| cache.changed(user, *version));
                }
                AccountsChanged::Unknown => lock(&self.0.cache).clear(),
            }
        }
    }

    async fn search(&self) {
        let pause = if self.0.store.shared().is_some() { CHECK_SHARED } else { CHECK };
        let mut next_check = tokio::time::Instant::now();
        loop {
            if self.0.renamed.swap(false, Relaxed) {
                self.heed_names().await;
            }
            let mut due = Vec::new();
            if tokio::time::Instant::now() >= next_check {
                self.index().await;
                self.count().await;
                let claimed = self.claim().await;
                // A full batch is followed by the next one.
                next_check = tokio::time::Instant::now() + if claimed.is_empty() { pause } else { Duration::ZERO };
                due.extend(claimed);
            }
            let wanted: Vec<_> = lock(&self.0.wanted).drain().filter(|user| !due.contains(user)).collect();
            for user in &wanted {
                self.note_wanted(user).await;
            }
            due.extend(wanted);
            let searches = futures_util::stream::iter(due).for_each_concurrent(CONCURRENCY, async |user| {
                if let Err(error) = Box::pin(self.sync(&user)).await {
                    tracing::warn!(%user, reason = %error.reason(), "accounts could not be looked for");
                }
            });
            searches.await;
            let _ = tokio::time::timeout_at(next_check, self.0.wake.notified()).await;
        }
    }

    /// Stores that the accounts of a user who has just logged in are still to be searched for, so that this is done
    /// later, or by another process, if this one ends before. If storing fails, only this process knows it.
    async fn note_wanted(&self, user: &UserId) {
        let Ok(stored) = self.0.store.accounts_of(std::slice::from_ref(user)).await else { return };
        let (stored, now) = (stored.first(), self.0.clock.now());
        let accounts = match stored.map(parse_any) {
            None => UserAccounts::none(user, now),
            Some(Some(accounts)) => accounts,
            // Nobody can read it, and it is not replaced before something is found.
            Some(None) => return,
        };
        let wait = if self.0.store.shared().is_some() { ORPHANED } else { SignedDuration::ZERO };
        let search_at = now.checked_add(wait).unwrap_or(now);
        let noted = NewAccounts { search_at, ..stored_form(&accounts, stored.map_or(0, |stored| stored.version)) };
        if let Ok(AccountsSaved::Stored(version)) = self.0.store.save_accounts(user, noted).await {
            lock(&self.0.cache).changed(user, version);
        }
    }

    /// Users whose last search is a day old, and who have a usable grant. Users who were never searched for are
    /// searched for after their next login, or on request. No other process has claimed them.
    async fn claim(&self) -> Vec<UserId> {
        if !self.is_automatic() {
            return Vec::new();
        }
        let now = self.0.clock.now();
        let claimed = self.0.store.claim_searches(now, now.checked_add(DAY).unwrap_or(now)).await;
        let mut due = Vec::new();
        for user in claimed.unwrap_or_default() {
            let is_known = self.0.tokens.look(&user).await.is_ok();
            let state = self.0.tokens.status(&user).state;
            if is_known && !matches!(state, State::None | State::LoginRequired | State::Idle) {
                due.push(user);
            }
        }
        due
    }

    /// Lists accounts in the index that are not in it: the previous version stored them, or the index was lost.
    async fn index(&self) {
        while let Ok(unindexed) = self.0.store.unindexed_accounts().await {
            let users: Vec<_> = unindexed.into_iter().map(|stored| stored.user).collect();
            let mut any = false;
            for user in &users {
                any |= matches!(self.rename(user).await, Ok(Some(_)));
            }
            if !any {
                return;
            }
        }
    }

    /// Gives new slugs to found accounts whose slugs the configuration has as names.
    async fn heed_names(&self) {
        let names: Vec<_> = self.configured().iter().map(|account| account.name.to_string()).collect();
        if names.is_empty() {
            return;
        }
        let Ok(owners) = self.0.store.slug_owners(&names).await else {
            self.0.renamed.store(true, Relaxed);
            return;
        };
        let users: HashSet<_> = owners.into_iter().map(|(_, user)| user).collect();
        for user in users {
            if let Err(error) = self.rename(&user).await {
                tracing::warn!(%user, %error, "an account whose slug is a configured name keeps it for now");
            }
        }
    }

    /// Looks whether there are too many accounts to name each in the metrics.
    async fn count(&self) {
        if let Ok(is_large) = self.0.store.has_more_accounts_than(NAMED_IN_METRICS).await {
            self.0.is_large.store(is_large, Relaxed);
        }
    }

    fn store(&self) -> &TokenStore {
        &self.0.store
    }

    /// Whether a text is the name of a configured account.
    fn names(&self) -> impl Fn(&str) -> bool + use<> {
        let reach = self.0.reach.load_full();
        move |slug| reach.as_ref().is_some_and(|reach| reach.configured.iter().any(|account| &*account.name == slug))
    }

    fn is_automatic(&self) -> bool {
        self.0.reach.load().as_ref().is_some_and(|reach| reach.automatic == Automatic::Daily)
    }

    fn limit(&self) -> usize {
        self.0.reach.load().as_ref().map_or(1, |reach| reach.cache.max(1))
    }

    /// The lock under which the accounts of `user` change. It is removed when nobody has it.
    fn turn(&self, user: &UserId) -> Arc<tokio::sync::Mutex<()>> {
        let mut searching = lock(&self.0.searching);
        searching.retain(|_, turn| Arc::strong_count(turn) > 1);
        searching.entry(user.clone()).or_default().clone()
    }
}

impl SyncError {
    /// The reason, for the log.
    pub fn reason(&self) -> String {
        match self {
            Self::NoToken(TokenError::LoginRequired { reason }) => format!("login_required: {reason}"),
            Self::NoToken(TokenError::Unavailable { code, .. }) => format!("no access token: {code}"),
            Self::Store(error) => error.to_string(),
            Self::NoRegion(failures) => failures.clone(),
        }
    }
}

/// The accounts as they were stored; `None` if nobody can read them, or if a search is to find them.
fn parse(stored: &StoredAccounts) -> Option<UserAccounts> {
    parse_any(stored).filter(|accounts| !accounts.was_only_wanted())
}

fn parse_any(stored: &StoredAccounts) -> Option<UserAccounts> {
    let accounts: UserAccounts = serde_json::from_str(stored.plain.as_deref()?).ok()?;
    (accounts.user_id == stored.user).then_some(accounts)
}

/// The accounts as they are to be stored.
fn stored_form(accounts: &UserAccounts, seen: u64) -> NewAccounts {
    let indexed = |account: &FoundAccount| IndexedAccount {
        slug: account.slug.clone(),
        name: account.name.to_lowercase(),
        country: account.country.as_ref().map(|country| country.to_ascii_uppercase()),
        kind: account.kind.as_str().to_owned(),
    };
    let interval = if accounts.any_region_answered() { DAY } else { RETRY };
    NewAccounts {
        plain: serde_json::to_string(accounts).expect("texts, numbers and times are JSON"),
        index: accounts.accounts.iter().map(indexed).collect(),
        seen,
        search_at: accounts.synced_at.checked_add(interval).unwrap_or(accounts.synced_at),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
