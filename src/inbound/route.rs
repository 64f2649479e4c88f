//! Routes a request: which account, user, region and API family it gets.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::sync::Arc;

use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::domain::account::{Account, AmazonHost, BadName, BadRegion, Ids, Region, Service, UserId, check_name};
use crate::domain::api_families::{Family, family, mcp_family};
use crate::domain::policy::Rules;
use crate::domain::throttle_mode::ThrottleMode;
use crate::inbound::destination::{Destination, Target};

const X_ADS_ACCOUNT: HeaderName = HeaderName::from_static("x-ads-account");
const X_ADS_USER: HeaderName = HeaderName::from_static("x-ads-user");
const X_ADS_REGION: HeaderName = HeaderName::from_static("x-ads-region");

/// The configured accounts, and the defaults for requests that select none.
#[derive(Debug)]
pub(super) struct Accounts {
    by_name: HashMap<String, Arc<Account>>,
    /// The account named `default`, or the only one.
    fallback: Option<Arc<Account>>,
    region: Region,
    selection: Selection,
    /// `[policy]`: the rules for requests without an account.
    rules: Rules,
    /// The rules for a request that names a user and no account: those of all accounts of that user together. Otherwise
    /// a caller could avoid an account's rules by naming its user.
    rules_by_user: HashMap<UserId, Rules>,
}

/// A request with its route.
#[derive(Debug)]
pub(super) struct RoutedRequest<'a> {
    account: Option<&'a Account>,
    /// The account's name in metrics.
    label: &'a str,
    /// The user whose grant authorizes the request.
    pub(super) user: UserId,
    /// The region whose host gets the request.
    pub(super) region: Region,
    /// Whether `region` is the account's own.
    at_home: bool,
    /// The API family of the path that is sent.
    pub(super) family: &'static Family,
    /// The policy that the request must satisfy.
    pub(super) rules: &'a Rules,
}

/// A found account that a request selects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    pub(super) account: &'a Account,
    /// Whether metrics name it.
    pub(super) is_named: bool,
}

/// `proxy.selection`: whether callers select their account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// By path prefix or header.
    #[default]
    Header,
    /// Always the default account; the callers' selection is ignored.
    Fixed,
}

/// Why no account could be selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteError {
    /// No account of this name is configured or found.
    Unknown,
    /// An `X-Ads-*` header is invalid; holds the reason.
    Bad(&'static str),
    /// A header looks like a selecting one but is none; holds the name that was probably meant.
    UnknownHeader(&'static str),
}

impl Accounts {
    pub(super) fn new(mut accounts: Vec<Account>, region: Region, selection: Selection, rules: Rules) -> Self {
        let mut rules_by_user = HashMap::<UserId, Rules>::new();
        for account in accounts.iter_mut().filter(|account| !account.rules.is_empty()) {
            let of_user = rules_by_user.entry(account.user.clone()).or_insert_with(|| rules.clone());
            *of_user = of_user.and(&account.rules);
        }
        for account in &mut accounts {
            account.rules = rules.and(&account.rules);
        }
        let accounts: Vec<_> = accounts.into_iter().map(Arc::new).collect();
        let fallback = fallback(&accounts).cloned();
        let by_name = accounts.into_iter().map(|account| (account.name.to_string(), account)).collect();
        Self { by_name, fallback, region, selection, rules, rules_by_user }
    }

    /// Routes a request. The first that applies selects the account or user: the path's prefix, `X-Ads-Account`,
    /// `X-Ads-User`, the account named `default`, the only account, the user `default`.
    ///
    /// A name of the configuration wins over the slug of a found account. `found` is the found account whose slug is
    /// [`other_name`](Self::other_name), if there is one.
    pub(super) fn select<'a>(
        &'a self,
        target: &Target,
        headers: &HeaderMap,
        found: Option<Found<'a>>,
    ) -> Result<RoutedRequest<'a>, RouteError> {
        let host_region = if let Destination::Amazon(host) = target.of { Some(host.region) } else { None };
        let mut selects = target.account.is_some();
        for name in headers.keys().filter(|name| is_selecting(name.as_str())) {
            if !is_selector(name) {
                return Err(RouteError::UnknownHeader(nearest(name.as_str())));
            }
            selects = true;
        }
        // Most requests select nothing, and pay for no look at each of the headers that could.
        if !selects || self.selection == Selection::Fixed {
            return Ok(self.routed(target, self.fallback(), None, host_region));
        }
        let header_region = single(headers, &X_ADS_REGION)?.map(str::parse).transpose();
        let region =
            host_region.or(header_region.map_err(|BadRegion| RouteError::Bad("X-Ads-Region is na, eu or fe."))?);
        if let Some(name) = named(target, headers)? {
            let Some(account) = self.by_name.get(name) else {
                return Ok(self.route_found(target, found.ok_or(RouteError::Unknown)?, region));
            };
            return Ok(self.routed(target, Some(account), None, region));
        }
        if let Some(user) = single(headers, &X_ADS_USER)? {
            let user = user
                .parse()
                .map_err(|BadName| RouteError::Bad("X-Ads-User is 1 to 128 of A-Z a-z 0-9 . _ @ : | + -."))?;
            return Ok(self.routed(target, None, Some(user), region));
        }
        Ok(self.routed(target, self.fallback(), None, region))
    }

    /// The account that the request names, if no account of the configuration has that name.
    pub(super) fn other_name<'r>(&self, target: &'r Target, headers: &'r HeaderMap) -> Option<&'r str> {
        // A look at the names costs most requests less than a search in the map.
        if target.account.is_none() && !headers.keys().any(|name| *name == X_ADS_ACCOUNT) {
            return None;
        }
        let name = named(target, headers).ok()??;
        let is_other = self.selection == Selection::Header && !self.by_name.contains_key(name);
        (is_other && check_name(name).is_ok()).then_some(name)
    }

    fn fallback(&self) -> Option<&Account> {
        self.fallback.as_deref()
    }

    /// A found account has no rules of its own: those of all accounts of its user together hold.
    fn route_found<'a>(
        &'a self,
        target: &Target,
        Found { account, is_named }: Found<'a>,
        asked: Option<Region>,
    ) -> RoutedRequest<'a> {
        let rules = self.rules_by_user.get(&account.user).unwrap_or(&self.rules);
        // Thousands of accounts must not become thousands of series.
        let label = if is_named { &*account.name } else { "found" };
        RoutedRequest { rules, label, ..self.routed(target, Some(account), None, asked) }
    }

    fn routed<'a>(
        &'a self,
        target: &Target,
        account: Option<&'a Account>,
        user: Option<UserId>,
        requested: Option<Region>,
    ) -> RoutedRequest<'a> {
        let home = account.and_then(|account| account.region).unwrap_or(self.region);
        let region = requested.unwrap_or(home);
        let user = user.or_else(|| account.map(|account| account.user.clone())).unwrap_or_default();
        let rules = match account {
            Some(account) => &account.rules,
            None => self.rules_by_user.get(&user).unwrap_or(&self.rules),
        };
        let label = account.map_or("", |account| &account.name);
        let family = match target.of {
            Destination::Amazon(AmazonHost { service: Service::Mcp, .. }) => mcp_family(),
            _ => family(target.path()),
        };
        RoutedRequest { account, label, user, region, at_home: region == home, family, rules }
    }
}

impl<'a> RoutedRequest<'a> {
    /// The host that gets the request.
    pub(super) fn host(&self) -> AmazonHost {
        AmazonHost { service: self.family.service, region: self.region }
    }

    /// The account's name; empty if there is none.
    pub(super) fn account_name(&self) -> &'a str {
        self.account.map_or("", |account| &account.name)
    }

    /// The account's name in metrics; empty if there is none.
    pub(super) fn account_label(&self) -> &'a str {
        self.label
    }

    /// The account's ids; `None` in any other region than the account's own, where they are invalid.
    pub(super) fn ids(&self) -> Option<&'a Ids> {
        self.account.filter(|_| self.at_home).map(|account| &account.ids)
    }

    pub(super) fn fixed_headers(&self) -> &'a [(HeaderName, HeaderValue)] {
        self.account.map_or(&[], |account| &account.headers)
    }

    /// For the throttle: the account's name, or the user if there is none. Waiting requests of several take turns.
    pub(super) fn fair_share(&self) -> &str {
        self.account.map_or(self.user.as_str(), |account| &account.name)
    }

    /// The account's own mode of the throttle.
    pub(super) fn throttle(&self) -> Option<ThrottleMode> {
        self.account.and_then(|account| account.throttle)
    }

    /// The value of `X-Adsidecar-Hint`, if the selected region is not the account's own.
    pub(super) fn hint(&self) -> Option<&'static str> {
        (self.account.is_some() && !self.at_home).then_some("region_mismatch")
    }
}

/// The account of requests that select none: the one named `default`, or the only one.
pub(super) fn fallback<A: Borrow<Account>>(accounts: &[A]) -> Option<&A> {
    let only = if let [only] = accounts { Some(only) } else { None };
    accounts.iter().find(|account| &*(*account).borrow().name == "default").or(only)
}

/// The headers that select an account, a user and a region.
const SELECTORS: [&str; 3] = ["x-ads-account", "x-ads-user", "x-ads-region"];

/// Whether a header is, or could be meant as, one that selects: any `X-Ads-*` whatever separates its words, and what is
/// one letter away from a selecting header; but not the caller token.
pub(super) fn is_selecting(name: &str) -> bool {
    let mut letters = name.bytes().filter(u8::is_ascii_alphanumeric);
    // Every header of every request is asked, so a look at three letters comes before anything that allocates.
    let start = [letters.next(), letters.next(), letters.next()];
    if !matches!(start, [Some(b'x'), Some(b'a'), Some(b'd')] | [Some(b'a'), Some(b'd'), Some(b's')])
        || name == "x-ads-sidecar-token"
    {
        return false;
    }
    let mut words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    if (words.next(), words.next()) == (Some("x"), Some("ads")) {
        return true;
    }
    let plain = |name: &str| name.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
    SELECTORS.iter().any(|selector| strsim::levenshtein(&plain(selector), &plain(name)) <= 1)
}

fn is_selector(name: &HeaderName) -> bool {
    SELECTORS.contains(&name.as_str())
}

/// The selecting header whose name is nearest to `name`.
fn nearest(name: &str) -> &'static str {
    let name = name.replace('_', "-");
    let known = ["X-Ads-Account", "X-Ads-User", "X-Ads-Region", "X-Ads-Sidecar-Token"];
    let distance = |known: &&str| strsim::osa_distance(&known.to_ascii_lowercase(), &name);
    known.into_iter().min_by_key(distance).unwrap_or("X-Ads-Account")
}

/// The name of the account that the path or the header selects.
fn named<'r>(target: &'r Target, headers: &'r HeaderMap) -> Result<Option<&'r str>, RouteError> {
    target.account.as_deref().map_or_else(|| single(headers, &X_ADS_ACCOUNT), |name| Ok(Some(name)))
}

/// The value of a header that selects; more than one would leave the choice to chance.
fn single<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, RouteError> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => {
            value.to_str().map(|text| Some(text.trim())).map_err(|_| RouteError::Bad("An X-Ads-* header is not ASCII."))
        }
        (Some(_), Some(_)) => Err(RouteError::Bad("An X-Ads-* header occurs twice.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str, region: Option<Region>) -> Account {
        Account {
            name: name.into(),
            user: format!("user-of-{name}").parse().unwrap(),
            region,
            ids: Ids::default(),
            headers: Vec::new(),
            rules: Rules::default(),
            throttle: None,
        }
    }

    fn select(
        names: &[&str],
        selection: Selection,
        target: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<(String, String, Region), RouteError> {
        let accounts = names.iter().map(|name| account(name, (*name == "eu").then_some(Region::Eu))).collect();
        let accounts = Accounts::new(accounts, Region::Na, selection, Rules::default());
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        let target = Target::read(&target.parse().unwrap(), |_| false).unwrap();
        accounts
            .select(&target, &map, None)
            .map(|route| (route.account_name().to_owned(), route.user.to_string(), route.region))
    }

    #[test]
    fn a_name_that_is_not_configured_selects_nothing_at_all() {
        assert_eq!(select(&["a"], Selection::Header, "/a/b/x", &[]), Err(RouteError::Unknown));
        assert_eq!(select(&["a"], Selection::Header, "/x", &[("x-ads-account", "b")]), Err(RouteError::Unknown));
        assert_eq!(select(&["a"], Selection::Header, "/x", &[("x-ads-account", "")]), Err(RouteError::Unknown));
        for (name, value) in [("x-ads-user", "a b"), ("x-ads-region", "uk")] {
            assert!(matches!(select(&["a"], Selection::Header, "/x", &[(name, value)]), Err(RouteError::Bad(_))));
        }
        let twice = [("x-ads-account", "a"), ("x-ads-account", "b")];
        assert!(matches!(select(&["a", "b"], Selection::Header, "/x", &twice), Err(RouteError::Bad(_))));
    }

    #[test]
    fn the_first_that_applies_decides() {
        let all = [("x-ads-account", "b"), ("x-ads-user", "u")];
        let name = |names: &[&str], target: &str, headers: &[(&'static str, &str)]| {
            select(names, Selection::Header, target, headers).unwrap()
        };
        assert_eq!(name(&["a", "b"], "/a/a/x", &all).0, "a");
        assert_eq!(name(&["a", "b"], "/x", &all).0, "b");
        assert_eq!(name(&["a", "b"], "/x", &all[1..]), (String::new(), "u".into(), Region::Na));
        assert_eq!(name(&["a", "default"], "/x", &[]).0, "default");
        assert_eq!(name(&["a"], "/x", &[]), ("a".into(), "user-of-a".into(), Region::Na));
        assert_eq!(name(&["a", "b"], "/x", &[]), (String::new(), "default".into(), Region::Na));
    }

    #[test]
    fn the_region_is_the_hosts_then_the_callers_then_the_accounts() {
        let region = |target: &str, headers: &[(&'static str, &str)]| {
            select(&["eu"], Selection::Header, target, headers).unwrap().2
        };
        assert_eq!(region("http://advertising-api-fe.amazon.com/x", &[("x-ads-region", "na")]), Region::Fe);
        assert_eq!(region("/x", &[("x-ads-region", "na")]), Region::Na);
        assert_eq!(region("/x", &[]), Region::Eu);
    }

    #[test]
    fn naming_a_user_is_no_way_round_the_rules_of_its_accounts() {
        let read_only = || Rules::new(true, Vec::new());
        let with = |name: &str, user: &str, rules: Rules| Account {
            user: user.parse().unwrap(),
            rules,
            ..account(name, None)
        };
        let all = vec![
            with("free", "ann", Rules::default()),
            with("bound", "ann", read_only()),
            with("other", "bob", Rules::default()),
        ];
        let rules_of = |rules: Rules, name: &'static str, value: &str| {
            let accounts = Accounts::new(all.clone(), Region::Na, Selection::Header, rules);
            let headers = HeaderMap::from_iter([(HeaderName::from_static(name), value.parse().unwrap())]);
            let target = Target::read(&"/x".parse().unwrap(), |_| false).unwrap();
            accounts.select(&target, &headers, None).unwrap().rules.clone()
        };
        let of = |name, value| rules_of(Rules::default(), name, value).read_only();
        assert_eq!(
            [of("x-ads-account", "free"), of("x-ads-account", "bound"), of("x-ads-account", "other")],
            [false, true, false]
        );
        assert_eq!([of("x-ads-user", "ann"), of("x-ads-user", "bob"), of("x-ads-user", "eve")], [true, false, false]);
        for (name, value) in [("x-ads-account", "free"), ("x-ads-user", "ann"), ("x-ads-user", "eve")] {
            assert!(rules_of(read_only(), name, value).read_only(), "[policy] holds for all: {value}");
        }
    }

    #[test]
    fn fixed_selection_ignores_what_callers_say() {
        let sent = [("x-ads-account", "b"), ("x-ads-user", "u"), ("x-ads-region", "eu")];
        let route = select(&["default", "b"], Selection::Fixed, "/a/b/x", &sent).unwrap();
        assert_eq!(route, ("default".into(), "user-of-default".into(), Region::Na));
    }
}
