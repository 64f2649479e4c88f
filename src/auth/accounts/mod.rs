//! The directory of accounts: which accounts each user's grant reaches, found at Amazon and stored, so that a caller
//! can select one by its slug.
//!
//! Amazon is asked after a login, on request, and once a day (`accounts.sync`). What a source lists is taken; what it
//! does not list any more is marked as missing and stays selectable; a source that does not answer changes nothing.
//!
//! The file is a little over 400 lines: what is listed, stored and selected shares one lock and one snapshot.

mod discovery;
mod listing;
mod outcome;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use futures_util::StreamExt;
use http::HeaderValue;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;

use crate::auth::tokens::{TokenError, TokenManager};
use crate::domain::account::{Account, AmazonHost, Context, Region, UserId};
use crate::domain::clock::Clock;
use crate::domain::found_account::{FoundAccount, assign_slugs};
use crate::domain::grant::State;
use crate::store::{StoreError, TokenStore};
use crate::upstream::Upstream;
use discovery::{Discovery, Found};
pub use listing::{Filter, Listed, list};
pub use outcome::{Outcome, Source, Status, UserAccounts};

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
/// How often it is checked whose search is due, and with a shared store whether other processes changed something.
const CHECK: Duration = Duration::from_secs(15);
const CHECK_SHARED: Duration = Duration::from_secs(2);
/// How long an account that Amazon does not list any more stays.
const KEEP_MISSING: SignedDuration = SignedDuration::from_hours(30 * 24);
/// Most automatic searches at a time.
const CONCURRENCY: usize = 2;
/// Time limit of one search.
const TIMEOUT: Duration = Duration::from_secs(120);
/// After a search in which nothing answered, the next automatic one.
const RETRY: SignedDuration = SignedDuration::from_hours(1);

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
    snapshot: ArcSwap<Snapshot>,
    /// Serializes changes of the snapshot.
    changing: Mutex<()>,
    /// One search per user at a time.
    searching: Mutex<HashMap<UserId, Arc<tokio::sync::Mutex<()>>>>,
    /// Users who have just logged in.
    wanted: Mutex<HashSet<UserId>>,
    wake: Notify,
}

/// How Amazon is reached, and what the configuration says; a reload replaces it.
#[derive(Debug)]
pub struct Reach {
    /// The connections to Amazon.
    pub upstream: Arc<Upstream>,
    /// `amazon.client_id`.
    pub client_id: HeaderValue,
    /// `amazon.region`.
    pub home: Region,
    /// `accounts.sync`.
    pub automatic: Automatic,
    /// The accounts of the configuration, whose names win.
    pub configured: Vec<Account>,
}

/// All found accounts at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// What is stored for each user.
    pub users: BTreeMap<UserId, Arc<UserAccounts>>,
    by_slug: HashMap<String, Entry>,
    /// Whether there are too many accounts to name each in the metrics.
    many: bool,
}

/// A found account, ready for requests.
#[derive(Debug)]
pub struct Entry {
    /// What was found.
    pub found: FoundAccount,
    /// The account that requests get.
    pub account: Account,
}

/// Up to this many found accounts are named in metrics.
const NAMED_IN_METRICS: usize = 200;

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

impl Snapshot {
    /// Builds the snapshot of what is stored. Slugs that `configured` accounts have as names select those.
    pub fn of(stored: impl IntoIterator<Item = UserAccounts>, configured: &[Account]) -> Self {
        let mut snapshot = Self::default();
        let names: HashSet<&str> = configured.iter().map(|account| &*account.name).collect();
        let mut stored: Vec<_> = stored.into_iter().collect();
        stored.sort_by(|one, other| one.user_id.cmp(&other.user_id));
        // A slug that is stored belongs to its user, in whatever order the users come.
        let mut owners: HashMap<String, UserId> = HashMap::new();
        for user in &stored {
            for account in user.accounts.iter().filter(|account| !account.slug.is_empty()) {
                owners.entry(account.slug.clone()).or_insert_with(|| user.user_id.clone());
            }
        }
        for mut user in stored {
            let taken = |slug: &str| {
                names.contains(slug)
                    || snapshot.by_slug.contains_key(slug)
                    || owners.get(slug).is_some_and(|owner| *owner != user.user_id)
            };
            let mut accounts = std::mem::take(&mut user.accounts);
            assign_slugs(&mut accounts, &user.user_id, taken);
            user.accounts = accounts;
            for found in &user.accounts {
                let entry = Entry { found: found.clone(), account: found.to_account(&user.user_id) };
                snapshot.by_slug.insert(found.slug.clone(), entry);
            }
            snapshot.users.insert(user.user_id.clone(), Arc::new(user));
        }
        snapshot.many = snapshot.by_slug.len() > NAMED_IN_METRICS;
        snapshot
    }

    /// The account with this slug.
    pub fn get(&self, slug: &str) -> Option<&Entry> {
        self.by_slug.get(slug)
    }

    /// Every found account.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.by_slug.values()
    }

    /// Number of found accounts.
    pub fn len(&self) -> usize {
        self.by_slug.len()
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.by_slug.is_empty()
    }

    /// Whether there are too many accounts to name each in the metrics.
    pub fn is_large(&self) -> bool {
        self.many
    }
}

impl Directory {
    /// Loads what is stored.
    pub async fn open(store: TokenStore, tokens: TokenManager, clock: Clock) -> Self {
        let directory = Self(Arc::new(Inner {
            store,
            tokens,
            clock,
            reach: ArcSwapOption::empty(),
            snapshot: ArcSwap::default(),
            changing: Mutex::default(),
            searching: Mutex::default(),
            wanted: Mutex::default(),
            wake: Notify::new(),
        }));
        directory.load().await;
        directory
    }

    /// Takes over a new configuration.
    pub fn reconfigure(&self, reach: Reach) {
        self.0.reach.store(Some(Arc::new(reach)));
        self.change(|_| {});
    }

    /// The accounts as they are now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.snapshot.load_full()
    }

    /// The accounts of the configuration.
    pub fn configured(&self) -> Vec<Account> {
        self.0.reach.load().as_ref().map(|reach| reach.configured.clone()).unwrap_or_default()
    }

    fn is_automatic(&self) -> bool {
        self.0.reach.load().as_ref().is_some_and(|reach| reach.automatic == Automatic::Daily)
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
        let (configured, snapshot) = (self.configured(), self.snapshot());
        let users: HashSet<_> = configured.iter().map(|account| &account.user).chain(snapshot.users.keys()).collect();
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
        let snapshot = self.snapshot();
        let mut regions = HashSet::new();
        for user in users {
            let found = snapshot.users.get(user).into_iter().flat_map(|found| &found.accounts);
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
        self.change(|users| drop(users.remove(user)));
    }

    /// Asks Amazon for the accounts of `user`, and stores them. Concurrent calls for one user run one after the other.
    ///
    /// # Errors
    /// [`SyncError`] if there is no token, no region answers, or the store fails.
    pub async fn sync(&self, user: &UserId) -> Result<Arc<UserAccounts>, SyncError> {
        // A caller that hangs up leaves what was known before: everything changes at the end, at once.
        let turn = lock(&self.0.searching).entry(user.clone()).or_default().clone();
        let _turn = turn.lock().await;
        let bearer = self.0.tokens.bearer(user).await.map_err(SyncError::NoToken)?;
        let Some(reach) = self.0.reach.load_full() else {
            return Err(SyncError::NoRegion("adsidecar is still starting".to_owned()));
        };
        let discovery = Discovery {
            upstream: reach.upstream.clone(),
            client_id: reach.client_id.clone(),
            bearer: bearer.value,
            home: reach.home,
        };
        let found = tokio::time::timeout(TIMEOUT, Box::pin(discovery.run())).await;
        let found = found.map_err(|_| SyncError::NoRegion(format!("no answer within {TIMEOUT:?}")))?;
        let now = self.0.clock.now();
        let before = self.snapshot().users.get(user).cloned();
        let merged = merge(user, before.as_deref(), found, now);
        let (answered, failures) = (merged.any_region_answered(), merged.failures());
        // The user may have been logged out meanwhile: then nothing of theirs must come back.
        if self.0.tokens.status(user).state == State::None {
            return Err(SyncError::NoToken(TokenError::LoginRequired { reason: "no_grant" }));
        }
        self.change(|users| drop(users.insert(user.clone(), Arc::new(merged))));
        let snapshot = self.snapshot();
        let merged = snapshot.users.get(user).cloned().ok_or_else(|| SyncError::NoRegion(failures.clone()))?;
        let text = serde_json::to_string(&*merged).expect("texts, numbers and times are JSON");
        self.0.store.save_accounts(user, text).await.map_err(SyncError::Store)?;
        if self.0.tokens.status(user).state == State::None {
            self.forget(user);
            self.0.store.erase_accounts(user).await.map_err(SyncError::Store)?;
        }
        tracing::info!(%user, accounts = merged.accounts.len(), "accounts were looked for");
        if answered { Ok(merged) } else { Err(SyncError::NoRegion(failures)) }
    }

    /// Searches after logins and once a day, and follows what other processes store. Runs until dropped.
    pub async fn run(&self) {
        let mut version = self.0.store.accounts_version().await.unwrap_or_default();
        loop {
            let pause = if version.is_some() { CHECK_SHARED } else { CHECK };
            let _ = tokio::time::timeout(pause, self.0.wake.notified()).await;
            match self.0.store.accounts_version().await {
                Ok(now) if now != version => {
                    self.load().await;
                    version = now;
                }
                _ => {}
            }
            let searches = futures_util::stream::iter(self.due()).for_each_concurrent(CONCURRENCY, async |user| {
                if let Err(error) = Box::pin(self.sync(&user)).await {
                    tracing::warn!(%user, reason = %error.reason(), "accounts could not be looked for");
                }
            });
            searches.await;
        }
    }

    /// Users who have just logged in, and those whose last search is a day old. Users who were never searched for are
    /// searched for after their next login, or on request.
    fn due(&self) -> Vec<UserId> {
        let mut due: Vec<_> = lock(&self.0.wanted).drain().collect();
        if !self.is_automatic() {
            return due;
        }
        let now = self.0.clock.now();
        let snapshot = self.snapshot();
        for (user, accounts) in &snapshot.users {
            let interval = if accounts.any_region_answered() { DAY } else { RETRY };
            let usable = !matches!(self.0.tokens.status(user).state, State::None | State::LoginRequired | State::Idle);
            if usable && now.duration_since(accounts.synced_at) >= interval && !due.contains(user) {
                due.push(user.clone());
            }
        }
        due
    }

    async fn load(&self) {
        match self.0.store.accounts().await {
            Ok(texts) => {
                let parsed = texts.iter().filter_map(|text| serde_json::from_str::<UserAccounts>(text).ok());
                let loaded: BTreeMap<_, _> =
                    parsed.map(|accounts| (accounts.user_id.clone(), Arc::new(accounts))).collect();
                self.change(move |users| *users = loaded);
            }
            Err(error) => {
                tracing::warn!(%error, "the accounts that were found cannot be read; the next sync finds them")
            }
        }
    }

    /// Changes what is stored for users, and publishes a snapshot of it.
    fn change(&self, change: impl FnOnce(&mut BTreeMap<UserId, Arc<UserAccounts>>)) {
        let _changing = lock(&self.0.changing);
        let mut users = self.0.snapshot.load().users.clone();
        change(&mut users);
        let configured = self.configured();
        let stored = users.into_values().map(|user| UserAccounts::clone(&user));
        self.0.snapshot.store(Arc::new(Snapshot::of(stored, &configured)));
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

/// What is known of the accounts of `user` after a search.
fn merge(user: &UserId, before: Option<&UserAccounts>, found: Found, now: Timestamp) -> UserAccounts {
    let Found { mut accounts, outcomes } = found;
    let known = before.map(|before| before.accounts.as_slice()).unwrap_or_default();
    for account in &mut accounts {
        if let Some(earlier) = known.iter().find(|earlier| earlier.key() == account.key()) {
            account.slug.clone_from(&earlier.slug);
            account.clash.clone_from(&earlier.clash);
        }
    }
    if !is_another_identity(known, &accounts, &outcomes) {
        for earlier in known {
            let missing_since = earlier.missing_since.unwrap_or(now);
            let is_listed = accounts.iter().any(|account| account.key() == earlier.key());
            if !is_listed && now.duration_since(missing_since) < KEEP_MISSING {
                let answered = answered_for(earlier, &outcomes);
                let missing_since = if answered { Some(missing_since) } else { earlier.missing_since };
                accounts.push(FoundAccount { missing_since, ..earlier.clone() });
            }
        }
    }
    accounts.sort_by(|one, other| one.key().cmp(&other.key()));
    UserAccounts { user_id: user.clone(), synced_at: now, outcomes, accounts }
}

/// Whether the source that lists `account` answered.
fn answered_for(account: &FoundAccount, outcomes: &[Outcome]) -> bool {
    use crate::domain::found_account::AccountType;
    let (source, region) = match account.kind {
        AccountType::DspAdvertiser => (Source::DspAdvertisers, Some(account.region)),
        AccountType::Manager => (Source::ManagerAccounts, Some(account.region)),
        AccountType::Amc => (Source::Amc, None),
        _ => (Source::Profiles, Some(account.region)),
    };
    outcomes.iter().any(|outcome| {
        outcome.source == source && outcome.region == region && matches!(outcome.status, Status::Found | Status::Empty)
    })
}

/// Whether all regions answered and the profiles have none in common with those known before: then another person has
/// logged in as this user, and the earlier accounts are not theirs.
fn is_another_identity(known: &[FoundAccount], found: &[FoundAccount], outcomes: &[Outcome]) -> bool {
    let profiles = |accounts: &[FoundAccount]| -> HashSet<String> {
        let profiles = accounts.iter().filter(|account| account.kind.is_profile());
        profiles.filter_map(|account| account.id(Context::Scope).map(str::to_owned)).collect()
    };
    let (known, found) = (profiles(known), profiles(found));
    let of_profiles = || outcomes.iter().filter(|outcome| outcome.source == Source::Profiles);
    let all = of_profiles().count() == 3 && of_profiles().all(|outcome| outcome.status != Status::Failed);
    all && !known.is_empty() && !found.is_empty() && known.is_disjoint(&found)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::found_account::AccountType;

    fn profile(id: &str, region: Region) -> FoundAccount {
        FoundAccount {
            slug: String::new(),
            clash: None,
            name: format!("Shop {id}"),
            kind: AccountType::Seller,
            country: Some("DE".into()),
            currency: None,
            time_zone: None,
            region,
            ids: [("profile_id".to_owned(), id.to_owned())].into(),
            missing_since: None,
        }
    }

    fn answer(region: Region, status: Status) -> Outcome {
        Outcome { source: Source::Profiles, region: Some(region), status, count: 0, code: None, detail: None }
    }

    fn names(accounts: &UserAccounts) -> Vec<(&str, bool)> {
        let names = accounts.accounts.iter().map(|one| (one.id(Context::Scope).unwrap(), one.missing_since.is_some()));
        names.collect()
    }

    #[test]
    fn what_a_region_does_not_list_any_more_is_missing_and_a_region_that_fails_changes_nothing() {
        let now: Timestamp = "2026-08-01T12:00:00Z".parse().unwrap();
        let user = UserId::default();
        let all = |status| Region::ALL.map(|region| answer(region, status)).to_vec();
        let first = Found {
            accounts: vec![profile("1", Region::Na), profile("2", Region::Eu), profile("3", Region::Eu)],
            outcomes: all(Status::Found),
        };
        let first = merge(&user, None, first, now);
        let outcomes = vec![
            answer(Region::Na, Status::Failed),
            answer(Region::Eu, Status::Found),
            answer(Region::Fe, Status::Empty),
        ];
        let second = Found { accounts: vec![profile("2", Region::Eu)], outcomes };
        let second = merge(&user, Some(&first), second, now);
        assert_eq!(names(&second), [("1", false), ("2", false), ("3", true)]);
        let empty = || Found { accounts: Vec::new(), outcomes: all(Status::Empty) };
        let revoked = merge(&user, Some(&second), empty(), now);
        assert_eq!(names(&revoked), [("1", true), ("2", true), ("3", true)], "an empty answer deletes nothing");
        let later = merge(&user, Some(&revoked), empty(), now + KEEP_MISSING);
        assert_eq!(names(&later), []);
    }

    #[test]
    fn a_stored_slug_stays_with_its_user_whoever_comes_later() {
        let now: Timestamp = "2026-08-01T12:00:00Z".parse().unwrap();
        let of = |user: &str, slug: &str| UserAccounts {
            user_id: user.parse().unwrap(),
            synced_at: now,
            outcomes: Vec::new(),
            accounts: vec![FoundAccount { slug: slug.into(), ..profile("7", Region::Eu) }],
        };
        let snapshot = Snapshot::of([of("zoe", "shop-7-de"), of("anna", "")], &[]);
        assert_eq!(snapshot.get("shop-7-de").unwrap().account.user.as_str(), "zoe");
        assert_eq!(snapshot.users["anna"].accounts[0].slug, "shop-7-de-seller");
    }

    #[test]
    fn another_identity_inherits_no_accounts() {
        let now: Timestamp = "2026-08-01T12:00:00Z".parse().unwrap();
        let user = UserId::default();
        let found = |id: &str| Found {
            accounts: vec![profile(id, Region::Na)],
            outcomes: Region::ALL.map(|region| answer(region, Status::Found)).to_vec(),
        };
        let first = merge(&user, None, found("1"), now);
        assert_eq!(names(&merge(&user, Some(&first), found("2"), now)), [("2", false)]);
    }
}
