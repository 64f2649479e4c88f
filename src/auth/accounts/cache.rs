//! The accounts of the users that were used last, in memory. Those of the others are in the store alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::outcome::UserAccounts;
use super::snapshot::Entry;
use crate::domain::account::UserId;

/// A user counts as this many accounts. One who has more takes the room of several.
const ACCOUNTS_EACH: usize = 20;
/// A slug that belongs to nobody is not looked for again for this long, unless accounts change.
const ABSENT: Duration = Duration::from_secs(1);
/// Longer than any read: one that began before a change was heard of has ended by then.
const LONGEST_READ: Duration = Duration::from_secs(12);

/// A bounded number of users with their accounts, by user and by slug.
#[derive(Debug, Default)]
pub(super) struct Cache {
    users: HashMap<UserId, Cached>,
    by_slug: HashMap<String, Arc<Entry>>,
    absent: HashMap<String, Instant>,
    /// The versions that were heard of lately, so that a read that began before is not taken for the current state.
    news: HashMap<UserId, (u64, Instant)>,
    /// Counts uses.
    uses: u64,
}

#[derive(Debug)]
struct Cached {
    accounts: Arc<UserAccounts>,
    version: u64,
    /// The number of the last use.
    used: u64,
}

impl Cache {
    /// The account with this slug; `Some(None)` if it is known that there is none, `None` if it is not known.
    pub(super) fn account(&mut self, slug: &str) -> Option<Option<Arc<Entry>>> {
        let Some(entry) = self.by_slug.get(slug) else {
            return self.absent.get(slug).filter(|since| since.elapsed() < ABSENT).map(|_| None);
        };
        self.uses += 1;
        if let Some(cached) = self.users.get_mut(&entry.account.user) {
            cached.used = self.uses;
        }
        Some(Some(entry.clone()))
    }

    pub(super) fn user(&mut self, user: &UserId) -> Option<Arc<UserAccounts>> {
        self.uses += 1;
        let cached = self.users.get_mut(user)?;
        cached.used = self.uses;
        Some(cached.accounts.clone())
    }

    /// Records that `slug` belongs to nobody. At most `limit` are remembered.
    pub(super) fn note_absent(&mut self, slug: &str, limit: usize) {
        if self.absent.len() >= limit {
            self.absent.clear();
        }
        self.absent.insert(slug.to_owned(), Instant::now());
    }

    /// Takes what was read from the store, unless something newer is known. At most `limit` users stay.
    pub(super) fn put_read(&mut self, accounts: &Arc<UserAccounts>, version: u64, limit: usize) {
        let user = &accounts.user_id;
        let heard = self.news.get(user).filter(|(_, at)| at.elapsed() < LONGEST_READ).map_or(0, |(news, _)| *news);
        if version >= heard && self.users.get(user).is_none_or(|cached| cached.version <= version) {
            self.insert(accounts.clone(), version, limit);
        }
    }

    /// Takes what this process has just stored.
    pub(super) fn put_stored(&mut self, accounts: Arc<UserAccounts>, version: u64, limit: usize) {
        self.hear(&accounts.user_id, version);
        self.insert(accounts, version, limit);
    }

    fn insert(&mut self, accounts: Arc<UserAccounts>, version: u64, limit: usize) {
        self.remove(&accounts.user_id);
        for found in &accounts.accounts {
            let entry = Arc::new(Entry::of(found, &accounts.user_id));
            self.absent.remove(&found.slug);
            self.by_slug.insert(found.slug.clone(), entry);
        }
        self.uses += 1;
        self.users.insert(accounts.user_id.clone(), Cached { accounts, version, used: self.uses });
        self.trim(limit);
    }

    /// Forgets those that were not used for the longest time. The one that was just used stays.
    fn trim(&mut self, limit: usize) {
        if self.users.len() <= limit && self.by_slug.len() <= limit.saturating_mul(ACCOUNTS_EACH) {
            return;
        }
        // Down to nine tenths, so that not every insertion sorts.
        let (users, accounts) = (limit - limit / 10, limit.saturating_mul(ACCOUNTS_EACH - ACCOUNTS_EACH / 10));
        let by_use: BTreeMap<u64, UserId> =
            self.users.iter().map(|(user, cached)| (cached.used, user.clone())).collect();
        for user in by_use.into_values() {
            if self.users.len() <= 1 || (self.users.len() <= users && self.by_slug.len() <= accounts) {
                break;
            }
            self.remove(&user);
        }
    }

    fn remove(&mut self, user: &UserId) {
        let Some(cached) = self.users.remove(user) else { return };
        for found in &cached.accounts.accounts {
            if self.by_slug.get(&found.slug).is_some_and(|entry| entry.account.user == *user) {
                self.by_slug.remove(&found.slug);
            }
        }
    }

    /// Drops the accounts of `user`, unless they have this version or a later one.
    pub(super) fn changed(&mut self, user: &UserId, version: u64) {
        self.hear(user, version);
        self.absent.clear();
        if self.users.get(user).is_some_and(|cached| cached.version < version) {
            self.remove(user);
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        let news = std::mem::take(&mut self.news);
        *self = Self { news, uses: self.uses, ..Self::default() };
    }

    fn hear(&mut self, user: &UserId, version: u64) {
        let now = Instant::now();
        self.news.retain(|_, (_, at)| now.duration_since(*at) < LONGEST_READ);
        self.news.insert(user.clone(), (version, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(user: &str, slugs: &[&str]) -> Arc<UserAccounts> {
        let account = |slug: &&str| {
            let json = serde_json::json!({
                "slug": slug, "name": "Shop", "type": "seller", "region": "eu", "ids": { "profile_id": "1" },
            });
            serde_json::from_value(json).unwrap()
        };
        Arc::new(UserAccounts {
            user_id: user.parse().unwrap(),
            synced_at: "2026-08-01T12:00:00Z".parse().unwrap(),
            outcomes: Vec::new(),
            accounts: slugs.iter().map(account).collect(),
        })
    }

    #[test]
    fn a_read_that_began_before_a_change_is_not_taken_for_the_current_state() {
        let mut cache = Cache::default();
        let anna: UserId = "anna".parse().unwrap();
        cache.changed(&anna, 7);
        cache.put_read(&accounts("anna", &["old"]), 6, 10);
        assert!(cache.account("old").is_none());
        cache.put_read(&accounts("anna", &["new"]), 7, 10);
        assert!(cache.account("new").unwrap().is_some());
        cache.put_read(&accounts("anna", &["old"]), 6, 10);
        assert!(cache.account("old").is_none(), "nor does it replace what is newer");
        cache.changed(&anna, 8);
        assert!(cache.account("new").is_none());
    }

    #[test]
    fn the_users_that_were_used_last_stay() {
        let mut cache = Cache::default();
        for number in 0..10 {
            cache.put_read(&accounts(&format!("user-{number}"), &[&format!("shop-{number}")]), 1, 10);
        }
        assert!(cache.account("shop-0").unwrap().is_some());
        cache.put_read(&accounts("user-10", &["shop-10"]), 1, 10);
        assert!(cache.account("shop-1").is_none(), "the one that was not used for the longest time goes");
        assert!(cache.account("shop-0").is_some() && cache.account("shop-10").is_some());
        let many: Vec<_> = (0..1000).map(|number| format!("client-{number}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        cache.put_read(&accounts("agency", &many), 1, 10);
        assert!(cache.account("client-999").is_some(), "one with very many accounts stays alone");
        assert_eq!(cache.users.len(), 1);
    }
}
