//! What is known of a user's accounts after a search: what Amazon lists, and what it listed before.

use std::collections::HashSet;

use jiff::{SignedDuration, Timestamp};

use super::discovery::Found;
use super::outcome::{Outcome, Source, Status, UserAccounts};
use crate::domain::account::{Context, UserId};
use crate::domain::found_account::{AccountType, FoundAccount};

/// How long an account that Amazon does not list any more stays.
const KEEP_MISSING: SignedDuration = SignedDuration::from_hours(30 * 24);

/// What is known of the accounts of `user` after a search.
pub(super) fn merge(user: &UserId, before: Option<&UserAccounts>, found: &Found, now: Timestamp) -> UserAccounts {
    let Found { mut accounts, outcomes } = found.clone();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::account::Region;

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
            accounts: vec![
                FoundAccount::shop("1", Region::Na),
                FoundAccount::shop("2", Region::Eu),
                FoundAccount::shop("3", Region::Eu),
            ],
            outcomes: all(Status::Found),
        };
        let first = merge(&user, None, &first, now);
        let outcomes = vec![
            answer(Region::Na, Status::Failed),
            answer(Region::Eu, Status::Found),
            answer(Region::Fe, Status::Empty),
        ];
        let second = Found { accounts: vec![FoundAccount::shop("2", Region::Eu)], outcomes };
        let second = merge(&user, Some(&first), &second, now);
        assert_eq!(names(&second), [("1", false), ("2", false), ("3", true)]);
        let empty = || Found { accounts: Vec::new(), outcomes: all(Status::Empty) };
        let revoked = merge(&user, Some(&second), &empty(), now);
        assert_eq!(names(&revoked), [("1", true), ("2", true), ("3", true)], "an empty answer deletes nothing");
        let later = merge(&user, Some(&revoked), &empty(), now + KEEP_MISSING);
        assert_eq!(names(&later), []);
    }

    #[test]
    fn another_identity_inherits_no_accounts() {
        let now: Timestamp = "2026-08-01T12:00:00Z".parse().unwrap();
        let user = UserId::default();
        let found = |id: &str| Found {
            accounts: vec![FoundAccount::shop(id, Region::Na)],
            outcomes: Region::ALL.map(|region| answer(region, Status::Found)).to_vec(),
        };
        let first = merge(&user, None, &found("1"), now);
        assert_eq!(names(&merge(&user, Some(&first), &found("2"), now)), [("2", false)]);
    }
}
