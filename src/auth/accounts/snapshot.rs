//! Found accounts in memory: all of some users, for a command or for a list.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::outcome::UserAccounts;
use crate::domain::account::{Account, UserId};
use crate::domain::found_account::{FoundAccount, assign_slugs};

/// The found accounts of some users at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// What is stored for each user.
    pub users: BTreeMap<UserId, Arc<UserAccounts>>,
    by_slug: HashMap<String, Entry>,
}

/// A found account, ready for requests.
#[derive(Debug)]
pub struct Entry {
    /// What was found.
    pub found: FoundAccount,
    /// The account that requests get.
    pub account: Account,
}

impl Entry {
    /// The account `found` of `user`.
    pub fn of(found: &FoundAccount, user: &UserId) -> Self {
        Self { found: found.clone(), account: found.to_account(user) }
    }
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
                let entry = Entry::of(found, &user.user_id);
                snapshot.by_slug.insert(found.slug.clone(), entry);
            }
            snapshot.users.insert(user.user_id.clone(), Arc::new(user));
        }
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
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::domain::account::Region;

    #[test]
    fn a_stored_slug_stays_with_its_user_whoever_comes_later() {
        let now: Timestamp = "2026-08-01T12:00:00Z".parse().unwrap();
        let of = |user: &str, slug: &str| UserAccounts {
            user_id: user.parse().unwrap(),
            synced_at: now,
            outcomes: Vec::new(),
            accounts: vec![FoundAccount { slug: slug.into(), ..FoundAccount::shop("7", Region::Eu) }],
        };
        let snapshot = Snapshot::of([of("zoe", "shop-7-de"), of("anna", "")], &[]);
        assert_eq!(snapshot.get("shop-7-de").unwrap().account.user.as_str(), "zoe");
        assert_eq!(snapshot.users["anna"].accounts[0].slug, "shop-7-de-seller");
    }
}
