//! Lists accounts, found and configured, with the header and the URL that select each.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Snapshot;
use crate::domain::account::{Account, Context, Region, UserId};
use crate::domain::found_account::{AccountType, FoundAccount};

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
    /// Its region; absent for one of the configuration that leaves it to `amazon.region`.
    pub region: Option<Region>,
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

/// Every account that matches `filter`, by slug. An account of the configuration comes with what was found about it.
pub fn list(snapshot: &Snapshot, configured: &[Account], filter: &Filter, base_url: &str) -> Vec<Listed> {
    let of_configuration = configured.iter().map(|account| {
        let found = snapshot.entries().find(|entry| is_same(&entry.account, account)).map(|entry| &entry.found);
        configured_one(account, found, base_url)
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

fn configured_one(account: &Account, found: Option<&FoundAccount>, base_url: &str) -> Listed {
    let id = |context: Context| {
        let own = account.ids.get(context).and_then(|id| id.to_str().ok());
        own.map(|id| (context.key().to_owned(), id.to_owned()))
    };
    let (header, url) = selectors(&account.name, base_url);
    Listed {
        slug: account.name.to_string(),
        name: found.map_or_else(|| account.name.to_string(), |found| found.name.clone()),
        source: "configuration".to_owned(),
        kind: found.map(|found| found.kind),
        country: found.and_then(|found| found.country.clone()),
        currency: found.and_then(|found| found.currency.clone()),
        time_zone: found.and_then(|found| found.time_zone.clone()),
        user_id: account.user.clone(),
        region: account.region,
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
        region: Some(found.region),
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
