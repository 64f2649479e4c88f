//! Lists accounts, found and configured, with the header and the URL that select each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Directory, Snapshot, UserAccounts, parse};
use crate::domain::account::{Account, Context, Region, UserId};
use crate::domain::found_account::{AccountType, FoundAccount};
use crate::store::{AccountsQuery, StoreError};

/// Which accounts to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Those of this user.
    pub user: Option<UserId>,
    /// Those whose name or slug contains this, in any letter case.
    pub name: Option<String>,
    /// Those of this country, in any letter case.
    pub country: Option<String>,
    /// Those of this type.
    pub kind: Option<AccountType>,
}

/// One account, as the accounts endpoint and `adsidecar accounts` show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// The name by which callers select it.
    pub slug: String,
    /// Its name at Amazon, or in the configuration.
    pub name: String,
    /// `configuration`, or `amazon` for one that was found.
    pub source: String,
    /// Its type; absent where only the configuration knows the account.
    #[serde(rename = "type")]
    pub kind: Option<AccountType>,
    /// Its country.
    pub country: Option<String>,
    /// Its currency.
    pub currency: Option<String>,
    /// Its time zone.
    pub time_zone: Option<String>,
    /// The user whose grant reaches it.
    pub user_id: UserId,
    /// Its region; `amazon.region` for one of the configuration that names none.
    pub region: Region,
    /// Its ids, by the keys of `[[account]]`.
    pub ids: BTreeMap<String, String>,
    /// The header that selects it.
    pub header: String,
    /// The base URL that selects it.
    pub url: String,
    /// The shorter slug that it would have if no other account laid claim to it.
    pub clash: Option<String>,
    /// Since when Amazon does not list it any more.
    pub missing_since: Option<jiff::Timestamp>,
}

/// A page of accounts.
#[derive(Debug)]
pub struct Page {
    /// The accounts, by slug.
    pub accounts: Vec<Listed>,
    /// How many match, whatever page. Found accounts are counted up to 100,000.
    pub total: usize,
    /// The slug after which the next page begins; `None` if this is the last.
    pub next: Option<String>,
    /// What is stored for their users.
    pub users: Vec<Arc<UserAccounts>>,
}

impl Directory {
    /// The first `limit` accounts after the slug `after` that match. Reads what the page shows and what the
    /// configuration names, however many others there are.
    ///
    /// # Errors
    /// [`StoreError`] if the store cannot be read.
    pub async fn list(&self, filter: &Filter, after: &str, limit: usize, base_url: &str) -> Result<Page, StoreError> {
        let configured = self.configured();
        if let Some(user) = &filter.user {
            let of_user = self.of(user).await?;
            let snapshot = Snapshot::of(of_user.iter().map(|user| UserAccounts::clone(user)), &configured);
            let all = list(&snapshot, &configured, self.home(), filter, base_url);
            let total = all.len();
            let mut rest = all.into_iter().filter(|account| account.slug.as_str() > after);
            let accounts: Vec<_> = rest.by_ref().take(limit).collect();
            let next = rest.next().and(accounts.last()).map(|last| last.slug.clone());
            return Ok(Page { accounts, total, next, users: of_user.into_iter().collect() });
        }
        // What the configuration names is listed under its own name, with what was found about it.
        let mut named = Vec::new();
        for user in configured.iter().map(|account| &account.user).collect::<BTreeSet<_>>() {
            named.extend(self.of(user).await?);
        }
        let snapshot = Snapshot::of(named.iter().map(|user| UserAccounts::clone(user)), &configured);
        let is_configured = |account: &Account| configured.iter().any(|one| is_same(account, one));
        let hidden: BTreeMap<_, _> = snapshot
            .entries()
            .filter(|entry| is_configured(&entry.account))
            .map(|entry| (entry.found.slug.clone(), found_one(&entry.found, &entry.account.user, base_url)))
            .collect();
        let query = AccountsQuery {
            after: after.to_owned(),
            limit: limit + hidden.len() + 1,
            name: filter.name.clone(),
            country: filter.country.clone(),
            kind: filter.kind.map(AccountType::as_str),
        };
        let found = self.store().find_accounts(&query).await?;
        let hides = hidden.values().filter(|listed| filter.matches(listed)).count();
        let of_configuration: Vec<_> = list(&snapshot, &configured, self.home(), filter, base_url)
            .into_iter()
            .filter(|listed| listed.source == CONFIGURATION)
            .collect();
        let total = usize::try_from(found.total).unwrap_or(usize::MAX).saturating_sub(hides) + of_configuration.len();
        let mut slugs: Vec<_> = found.slugs.into_iter().filter(|(slug, _)| !hidden.contains_key(slug)).collect();
        slugs.truncate(limit + 1);
        let users = self.read(slugs.iter().map(|(_, user)| user)).await?;
        let account = |(slug, user): (String, UserId)| {
            let of_user = users.get(&user).and_then(|user| user.accounts.iter().find(|found| found.slug == slug));
            let listed = of_user.map(|found| found_one(found, &user, base_url));
            (slug, listed)
        };
        // An account that cannot be read has its place, so that the page after it is found.
        let mut all: Vec<_> = slugs.into_iter().map(account).collect();
        let of_configuration = of_configuration.into_iter().filter(|listed| listed.slug.as_str() > after);
        all.extend(of_configuration.map(|listed| (listed.slug.clone(), Some(listed))));
        all.sort_by(|(one, _), (other, _)| one.cmp(other));
        let has_more = all.len() > limit;
        all.truncate(limit);
        let next = all.last().filter(|_| has_more).map(|(slug, _)| slug.clone());
        let all: Vec<_> = all.into_iter().filter_map(|(_, listed)| listed).collect();
        let shown: BTreeSet<_> = all.iter().map(|listed| &listed.user_id).collect();
        let mut by_user: BTreeMap<_, _> = named.into_iter().map(|user| (user.user_id.clone(), user)).collect();
        by_user.extend(users);
        let users = by_user.into_iter().filter(|(user, _)| shown.contains(user)).map(|(_, user)| user).collect();
        Ok(Page { accounts: all, total, next, users })
    }

    /// What is stored for each of `users`, read at once. It does not displace what requests use from memory.
    async fn read(
        &self,
        users: impl Iterator<Item = &UserId>,
    ) -> Result<BTreeMap<UserId, Arc<UserAccounts>>, StoreError> {
        let users: BTreeSet<_> = users.cloned().collect();
        let users: Vec<_> = users.into_iter().collect();
        if users.is_empty() {
            return Ok(BTreeMap::new());
        }
        let stored = self.store().accounts_of(&users).await?;
        let parsed = stored.iter().filter_map(|stored| Some((stored.user.clone(), Arc::new(parse(stored)?))));
        Ok(parsed.collect())
    }
}

/// The source of an account of the configuration.
const CONFIGURATION: &str = "configuration";

/// Every account that matches `filter`, by slug. An account of the configuration comes with what was found about it.
/// `home` is `amazon.region`.
pub fn list(snapshot: &Snapshot, configured: &[Account], home: Region, filter: &Filter, base_url: &str) -> Vec<Listed> {
    let of_configuration = configured.iter().map(|account| {
        let found = snapshot.entries().find(|entry| is_same(&entry.account, account)).map(|entry| &entry.found);
        configured_one(account, home, found, base_url)
    });
    let is_configured = |account: &Account| configured.iter().any(|one| is_same(account, one));
    let found = snapshot.entries().filter(|entry| !is_configured(&entry.account));
    let found = found.map(|entry| found_one(&entry.found, &entry.account.user, base_url));
    let mut all: Vec<_> = of_configuration.chain(found).filter(|listed| filter.matches(listed)).collect();
    all.sort_by(|one, other| one.slug.cmp(&other.slug));
    all
}

/// Whether both are the same profile, or the same other thing if they have no profile.
fn is_same(found: &Account, configured: &Account) -> bool {
    let main = [Context::DspAdvertiser, Context::AmcInstance, Context::Manager];
    let contexts = match configured.ids.get(Context::Scope) {
        Some(_) => &[Context::Scope][..],
        None => &main,
    };
    let others = |account: &Account| main.map(|context| account.ids.get(context).is_some());
    found.user == configured.user
        && contexts
            .iter()
            .any(|context| found.ids.get(*context).is_some() && found.ids.get(*context) == configured.ids.get(*context))
        && (others(found)[0] == others(configured)[0])
}

fn configured_one(account: &Account, home: Region, found: Option<&FoundAccount>, base_url: &str) -> Listed {
    let id = |context: Context| {
        let own = account.ids.get(context).and_then(|id| id.to_str().ok());
        own.map(|id| (context.key().to_owned(), id.to_owned()))
    };
    let (header, url) = selectors(&account.name, base_url);
    Listed {
        slug: account.name.to_string(),
        name: found.map_or_else(|| account.name.to_string(), |found| found.name.clone()),
        source: CONFIGURATION.to_owned(),
        kind: found.map(|found| found.kind),
        country: found.and_then(|found| found.country.clone()),
        currency: found.and_then(|found| found.currency.clone()),
        time_zone: found.and_then(|found| found.time_zone.clone()),
        user_id: account.user.clone(),
        region: account.region.unwrap_or(home),
        ids: Context::ALL.into_iter().filter_map(id).collect(),
        header,
        url,
        clash: None,
        missing_since: found.and_then(|found| found.missing_since),
    }
}

fn found_one(found: &FoundAccount, user: &UserId, base_url: &str) -> Listed {
    let (header, url) = selectors(&found.slug, base_url);
    Listed {
        slug: found.slug.clone(),
        name: found.name.clone(),
        source: "amazon".to_owned(),
        kind: Some(found.kind),
        country: found.country.clone(),
        currency: found.currency.clone(),
        time_zone: found.time_zone.clone(),
        user_id: user.clone(),
        region: found.region,
        ids: found.ids.clone(),
        header,
        url,
        clash: found.clash.clone(),
        missing_since: found.missing_since,
    }
}

fn selectors(slug: &str, base_url: &str) -> (String, String) {
    let name = percent_encoding::utf8_percent_encode(slug, percent_encoding::NON_ALPHANUMERIC).to_string();
    let name =
        if slug.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) { slug } else { &name };
    (format!("X-Ads-Account: {slug}"), format!("{base_url}/a/{name}"))
}

impl Filter {
    fn matches(&self, listed: &Listed) -> bool {
        let contains = |text: &str, part: &str| text.to_lowercase().contains(&part.to_lowercase());
        self.user.as_ref().is_none_or(|user| *user == listed.user_id)
            && self.name.as_ref().is_none_or(|name| contains(&listed.name, name) || contains(&listed.slug, name))
            && self.country.as_ref().is_none_or(|wanted| {
                listed.country.as_ref().is_some_and(|country| country.eq_ignore_ascii_case(wanted))
            })
            && self.kind.is_none_or(|kind| listed.kind == Some(kind))
    }
}
