//! The accounts that were found for each user, as the store keeps them: one sealed list per user, and an index of all
//! slugs, so that a request finds the account that it names, and a list is read page by page.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{StoreError, TokenStore};
use crate::domain::account::UserId;

/// At most this many accounts are counted for a list.
pub(super) const MAX_COUNTED: u64 = 100_000;

/// The accounts of one user, as they are stored.
#[derive(Clone, Debug)]
pub struct StoredAccounts {
    /// Whose grant reaches them.
    pub user: UserId,
    /// The text that was stored; `None` if no key opens it.
    pub plain: Option<String>,
    /// Rises with each change.
    pub version: u64,
}

/// One account in the index.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IndexedAccount {
    /// The slug that selects it.
    pub slug: String,
    /// Its name, in lower case.
    pub name: String,
    /// Its country, in upper case.
    pub country: Option<String>,
    /// Its type.
    pub kind: String,
}

/// The accounts of one user, to be stored.
#[derive(Clone, Debug)]
pub struct NewAccounts {
    /// The text, which is sealed.
    pub plain: String,
    /// All accounts in it, for the index.
    pub index: Vec<IndexedAccount>,
    /// The version that they are based on; 0 for none.
    pub seen: u64,
    /// When Amazon is to be asked again.
    pub search_at: Timestamp,
}

/// What became of [`TokenStore::save_accounts`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccountsSaved {
    /// They are stored, under this version.
    Stored(u64),
    /// Nothing is stored: these slugs belong to other users.
    Taken(Vec<String>),
    /// Nothing is stored: another process has stored others since.
    Changed,
    /// Nothing is stored: the user has no grant.
    LoggedOut,
}

/// Which accounts are listed.
#[derive(Clone, Debug, Default)]
pub struct AccountsQuery {
    /// Those whose slug is after this one.
    pub after: String,
    /// At most this many.
    pub limit: usize,
    /// Those whose name or slug contains this.
    pub name: Option<String>,
    /// Those of this country.
    pub country: Option<String>,
    /// Those of this type.
    pub kind: Option<&'static str>,
}

/// A page of the index.
#[derive(Clone, Debug, Default)]
pub struct AccountsPage {
    /// Slugs with their users, in order.
    pub slugs: Vec<(String, UserId)>,
    /// How many match, whatever page; at most 100,000.
    pub total: u64,
}

/// Whose accounts have changed.
#[derive(Debug)]
pub enum AccountsChanged {
    /// Those of these users, with their versions.
    Users(Vec<(UserId, u64)>),
    /// Those of anybody.
    Unknown,
}

impl AccountsQuery {
    /// Whether an account of the index matches.
    pub(super) fn matches(&self, account: &IndexedAccount) -> bool {
        let contains = |part: &str| account.name.contains(part) || account.slug.contains(part);
        self.name.as_ref().is_none_or(|name| contains(&name.to_lowercase()))
            && self
                .country
                .as_ref()
                .is_none_or(|country| account.country.as_ref().is_some_and(|known| known.eq_ignore_ascii_case(country)))
            && self.kind.is_none_or(|kind| account.kind == kind)
    }
}

impl TokenStore {
    /// Stores the accounts of `user`, sealed, in place of those that `accounts.seen` says, and lists them in the index.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn save_accounts(&self, user: &UserId, accounts: NewAccounts) -> Result<AccountsSaved, StoreError> {
        match self {
            Self::Sled(worker) => {
                let user = user.clone();
                worker.call(move |engine| engine.save_accounts(&user, &accounts)).await
            }
            Self::Postgres(store) => store.save_accounts(user, &accounts).await,
        }
    }

    /// Reads the accounts of each of `users` for whom any are stored.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn accounts_of(&self, users: &[UserId]) -> Result<Vec<StoredAccounts>, StoreError> {
        match self {
            Self::Sled(worker) => {
                let users = users.to_vec();
                worker.call(move |engine| engine.accounts_of(&users)).await
            }
            Self::Postgres(store) => store.accounts_of(users).await,
        }
    }

    /// Reads the accounts of the user to whom `slug` belongs; `None` if it belongs to nobody.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn accounts_with(&self, slug: &str) -> Result<Option<StoredAccounts>, StoreError> {
        match self {
            Self::Sled(worker) => {
                let slug = slug.to_owned();
                worker.call(move |engine| engine.accounts_with(&slug)).await
            }
            Self::Postgres(store) => store.accounts_with(slug).await,
        }
    }

    /// To whom each of `slugs` belongs that belongs to anybody.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn slug_owners(&self, slugs: &[String]) -> Result<Vec<(String, UserId)>, StoreError> {
        match self {
            Self::Sled(worker) => {
                let slugs = slugs.to_vec();
                worker.call(move |engine| engine.slug_owners(&slugs)).await
            }
            Self::Postgres(store) => store.slug_owners(slugs).await,
        }
    }

    /// Reads a page of the index.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn find_accounts(&self, query: &AccountsQuery) -> Result<AccountsPage, StoreError> {
        match self {
            Self::Sled(worker) => {
                let query = query.clone();
                worker.call(move |engine| engine.find_accounts(&query)).await
            }
            Self::Postgres(store) => store.find_accounts(query).await,
        }
    }

    /// Whether the index has more than `count` accounts.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn has_more_accounts_than(&self, count: usize) -> Result<bool, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.has_more_accounts_than(count)).await,
            Self::Postgres(store) => store.has_more_accounts_than(count).await,
        }
    }

    /// Users whose accounts are stored and not in the index: the previous version stored them, or the index was lost.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn unindexed_accounts(&self) -> Result<Vec<StoredAccounts>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.unindexed_accounts()).await,
            Self::Postgres(store) => store.unindexed_accounts().await,
        }
    }

    /// Users for whom Amazon is to be asked again at `now`; each of them once, at one process, and again at `next`
    /// unless [`save_accounts`](Self::save_accounts) says otherwise.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be written.
    pub async fn claim_searches(&self, now: Timestamp, next: Timestamp) -> Result<Vec<UserId>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(move |engine| engine.claim_searches(now, next)).await,
            Self::Postgres(store) => store.claim_searches(now, next).await,
        }
    }

    /// Returns when accounts have changed, perhaps by another process. Never returns if no other process uses the store.
    pub async fn accounts_changed(&self) -> AccountsChanged {
        match self {
            Self::Sled(_) => std::future::pending().await,
            Self::Postgres(store) => store.accounts_changed().await,
        }
    }

    /// Returns every text that [`save_accounts`](Self::save_accounts) stored last, for a command. One that no key opens
    /// is logged and left out: accounts can be found again.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be read.
    pub async fn accounts(&self) -> Result<Vec<String>, StoreError> {
        match self {
            Self::Sled(worker) => worker.call(|engine| engine.accounts()).await,
            Self::Postgres(store) => store.accounts().await,
        }
    }
}
