//! Accounts that adsidecar found at Amazon: what they are, and the slugs by which callers select them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::account::{Account, Context, Ids, Region, UserId};
use crate::domain::policy::Rules;

/// What kind of account Amazon says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccountType {
    /// The profile of a seller.
    Seller,
    /// The profile of a vendor.
    Vendor,
    /// The profile of an agency, which holds DSP advertisers and no campaigns of its own.
    Agency,
    /// A DSP advertiser.
    DspAdvertiser,
    /// A manager account.
    Manager,
    /// An instance of Amazon Marketing Cloud, or an AMC account without one.
    Amc,
    /// A profile of a type that Amazon has added since.
    Other,
}

impl AccountType {
    /// Every type, as in `type` of the accounts endpoint.
    pub const ALL: [Self; 7] =
        [Self::Seller, Self::Vendor, Self::Agency, Self::DspAdvertiser, Self::Manager, Self::Amc, Self::Other];

    /// Returns the type's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Seller => "seller",
            Self::Vendor => "vendor",
            Self::Agency => "agency",
            Self::DspAdvertiser => "dsp_advertiser",
            Self::Manager => "manager",
            Self::Amc => "amc",
            Self::Other => "other",
        }
    }

    /// Whether the account is an advertising profile.
    pub fn is_profile(self) -> bool {
        matches!(self, Self::Seller | Self::Vendor | Self::Agency | Self::Other)
    }
}

impl FromStr for AccountType {
    type Err = BadType;

    fn from_str(text: &str) -> Result<Self, BadType> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or(BadType)
    }
}

/// The text is not the name of an account type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a type is seller, vendor, agency, dsp_advertiser, manager, amc or other")]
pub struct BadType;

/// Checks the code of a country, as Amazon writes it.
///
/// # Errors
/// What is wrong, if it is not two letters: then no account could match.
pub fn check_country(text: &str) -> Result<String, &'static str> {
    let is_code = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_alphabetic());
    if is_code { Ok(text.to_owned()) } else { Err("two letters, such as DE") }
}

impl fmt::Display for AccountType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One account that a user's grant reaches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundAccount {
    /// The name by which callers select it; empty until [`assign_slugs`] has run.
    #[serde(default)]
    pub slug: String,
    /// The plain slug, if other accounts lay claim to it too, so that it selects none of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clash: Option<String>,
    /// Its name at Amazon.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: AccountType,
    /// `DE`, if it belongs to one country.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub country: Option<String>,
    /// `EUR`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    /// `Europe/Paris`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// The region that holds its data.
    pub region: Region,
    /// Its ids, by the keys of `[[account]]`.
    pub ids: BTreeMap<String, String>,
    /// Since when Amazon does not list it any more. It stays selectable: only Amazon knows whether that lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_since: Option<Timestamp>,
}

impl FoundAccount {
    /// Returns the id for `context`.
    pub fn id(&self, context: Context) -> Option<&str> {
        self.ids.get(context.key()).map(String::as_str)
    }

    /// What identifies the account for one user, whatever its name becomes.
    pub fn key(&self) -> (AccountClass, Region, &str) {
        let (class, context) = match self.kind {
            AccountType::DspAdvertiser => (AccountClass::DspAdvertiser, Context::DspAdvertiser),
            AccountType::Manager => (AccountClass::Manager, Context::Manager),
            AccountType::Amc if self.id(Context::AmcInstance).is_some() => (AccountClass::Amc, Context::AmcInstance),
            AccountType::Amc => (AccountClass::Amc, Context::Advertiser),
            _ => (AccountClass::Profile, Context::Scope),
        };
        // Managers and AMC accounts belong to no region: the same one is listed by several hosts.
        let region = if class >= AccountClass::Manager { Region::Na } else { self.region };
        (class, region, self.id(context).unwrap_or_default())
    }

    /// The account as requests use it. An id that is no legal header value is left out.
    pub fn to_account(&self, user: &UserId) -> Account {
        let mut ids = Ids::default();
        for context in Context::ALL {
            if let Some(id) = self.id(context) {
                // Amazon's ids are legal; what is not would split a header.
                let _ = ids.set(context, id);
            }
        }
        Account {
            name: Arc::from(self.slug.as_str()),
            user: user.clone(),
            region: Some(self.region),
            ids,
            headers: Vec::new(),
            rules: Rules::default(),
            throttle: None,
        }
    }

    /// The slug of the name alone: `acme-de`.
    fn plain_slug(&self) -> String {
        let name = slug(&self.name);
        let name = if name.is_empty() { self.kind.as_str().replace('_', "-") } else { name };
        match &self.country {
            Some(country) => {
                let country = slug(country);
                // A name that ends with its country already needs no second one.
                if name.ends_with(&format!("-{country}")) { name } else { format!("{name}-{country}") }
            }
            None => name,
        }
    }

    /// Slugs to try, from the plain one to one that no other account can have.
    fn slugs(&self, user: &UserId) -> [String; 4] {
        let (plain, (.., id)) = (self.plain_slug(), self.key());
        let kind = self.kind.as_str().replace('_', "-");
        let (id, user) = (slug(id), slug(user.as_str()));
        let tail = id.get(id.len().saturating_sub(6)..).unwrap_or(&id);
        [
            plain.clone(),
            format!("{plain}-{kind}"),
            format!("{plain}-{kind}-{tail}"),
            format!("{plain}-{kind}-{id}-{user}"),
        ]
    }
}

/// Groups of types whose ids cannot be mistaken for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccountClass {
    /// Advertising profiles.
    Profile,
    /// DSP advertisers.
    DspAdvertiser,
    /// Manager accounts.
    Manager,
    /// AMC accounts and instances.
    Amc,
}

/// Longest part of a slug that comes from a name.
const MAX_NAME: usize = 48;

/// `text` as part of a slug: lower-case ASCII letters, digits and single hyphens. Other letters are spelled in ASCII
/// where that is usual, and dropped elsewhere.
pub fn slug(text: &str) -> String {
    let mut out = String::new();
    for letter in text.chars().flat_map(char::to_lowercase) {
        match letter {
            'a'..='z' | '0'..='9' => out.push(letter),
            'ä' | 'æ' => out.push_str("ae"),
            'ö' | 'œ' | 'ø' => out.push_str("oe"),
            'ü' => out.push_str("ue"),
            'ß' => out.push_str("ss"),
            'à' | 'á' | 'â' | 'ã' | 'å' | 'ą' => out.push('a'),
            'ç' | 'ć' | 'č' => out.push('c'),
            'è' | 'é' | 'ê' | 'ë' | 'ę' | 'ě' => out.push('e'),
            'ì' | 'í' | 'î' | 'ï' | 'ı' => out.push('i'),
            'ñ' | 'ń' => out.push('n'),
            'ò' | 'ó' | 'ô' | 'õ' => out.push('o'),
            'ś' | 'š' | 'ş' => out.push('s'),
            'ù' | 'ú' | 'û' => out.push('u'),
            'ý' | 'ÿ' => out.push('y'),
            'ź' | 'ż' | 'ž' => out.push('z'),
            'ł' => out.push('l'),
            'ğ' => out.push('g'),
            '\'' | '’' | '.' => {}
            _ if !out.ends_with('-') && !out.is_empty() => out.push('-'),
            _ => {}
        }
        if out.len() >= MAX_NAME {
            break;
        }
    }
    out.trim_end_matches('-').to_owned()
}

/// Every slug that [`assign_slugs`] may give to one of the accounts of `user`, and those that they have; but not those
/// that it numbers.
pub fn candidate_slugs(accounts: &[FoundAccount], user: &UserId) -> Vec<String> {
    let slugs: BTreeSet<String> = accounts
        .iter()
        .flat_map(|account| account.slugs(user).into_iter().chain([account.slug.clone()]))
        .filter(|slug| !slug.is_empty())
        .collect();
    slugs.into_iter().collect()
}

/// Gives a slug to each of the accounts of `user` that has none. `taken` tells which slugs others have: accounts of the
/// configuration, and those of other users.
///
/// An account keeps its slug as long as it is stored. New accounts that lay claim to the same slug all get a longer
/// one: none of them is what a caller means who knows only the short one.
pub fn assign_slugs(accounts: &mut [FoundAccount], user: &UserId, taken: impl Fn(&str) -> bool) {
    let mut used: BTreeSet<String> = BTreeSet::new();
    for account in accounts.iter_mut() {
        let free = !account.slug.is_empty() && !taken(&account.slug) && !used.contains(&account.slug);
        if free {
            used.insert(account.slug.clone());
        } else {
            account.slug.clear();
        }
    }
    for level in 0..4 {
        let mut claims: BTreeMap<String, usize> = BTreeMap::new();
        for account in accounts.iter().filter(|account| account.slug.is_empty()) {
            *claims.entry(account.slugs(user)[level].clone()).or_default() += 1;
        }
        for account in accounts.iter_mut().filter(|account| account.slug.is_empty()) {
            let slugs = account.slugs(user);
            let wanted = &slugs[level];
            if claims[wanted] == 1 && !taken(wanted) && !used.contains(wanted) {
                account.slug.clone_from(wanted);
                account.clash = (level > 0).then(|| slugs[0].clone());
                used.insert(wanted.clone());
            }
        }
    }
    // Two with the same id are one; the rest is numbered, should Amazon list one twice.
    for account in accounts.iter_mut().filter(|account| account.slug.is_empty()) {
        let [plain, .., last] = account.slugs(user);
        let mut free = (2..).map(|number| format!("{last}-{number}"));
        let slug = free.find(|slug| !taken(slug) && !used.contains(slug)).unwrap_or(last);
        used.insert(slug.clone());
        account.slug = slug;
        account.clash = Some(plain);
    }
}

/// Why an id is probably of another kind than `context`; `None` if its form fits.
///
/// A hint, never a reason to refuse: Amazon may give its ids other forms.
pub fn doubtful_id(context: Context, id: &str) -> Option<&'static str> {
    let digits = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit());
    let entity = id.starts_with("ENTITY");
    match context {
        Context::Scope if entity => Some("an ENTITY… is an entity_id or advertiser_id; a profile id is a number"),
        Context::Scope if id.starts_with("amzn1.ads-account.") => {
            Some("this is an account_id; a profile id is a number")
        }
        Context::Scope if !digits => Some("a profile id is a number: profileId of GET /v2/profiles"),
        Context::Marketplace if digits || entity || id.len() < 10 => {
            Some("a marketplace id looks like ATVPDKIKX0DER: accountInfo.marketplaceStringId of GET /v2/profiles")
        }
        Context::Advertiser | Context::Entity if digits => {
            Some("it begins with ENTITY; a number is a profile_id or a DSP id")
        }
        Context::DspAdvertiser if entity => Some("a DSP advertiser id is a number; an ENTITY… is an entity_id"),
        Context::AmcInstance if digits || entity => {
            Some("an AMC instance id begins with amc: instanceId of GET /amc/instances")
        }
        _ => None,
    }
}

/// The country and region of a marketplace ("Marketplace IDs", Selling Partner API); `None` for one that is not known.
pub fn marketplace(id: &str) -> Option<(&'static str, Region)> {
    use Region::{Eu, Fe, Na};
    Some(match id {
        "ATVPDKIKX0DER" => ("US", Na),
        "A2EUQ1WTGCTBG2" => ("CA", Na),
        "A1AM78C64UM0Y8" => ("MX", Na),
        "A2Q3Y263D00KWC" => ("BR", Na),
        "A1F83G8C2ARO7P" => ("UK", Eu),
        "A1PA6795UKMFR9" => ("DE", Eu),
        "A13V1IB3VIYZZH" => ("FR", Eu),
        "APJ6JRA9NG5V4" => ("IT", Eu),
        "A1RKKUPIHCS9HS" => ("ES", Eu),
        "A1805IZSGTT6HS" => ("NL", Eu),
        "A2VIGQ35RCS4UG" => ("AE", Eu),
        "A1C3SOZRARQ6R3" => ("PL", Eu),
        "A33AVAJ2PDY3EV" => ("TR", Eu),
        "ARBP9OOSHTCHU" => ("EG", Eu),
        "A17E79C6D8DWNP" => ("SA", Eu),
        "A2NODRKZP88ZB9" => ("SE", Eu),
        "AMEN7PMS3EDWL" => ("BE", Eu),
        "A21TJRUUN4KGV" => ("IN", Eu),
        "AE08WJ6YKNBMC" => ("ZA", Eu),
        "A28R8C7NBKEWEA" => ("IE", Eu),
        "A1VC38T7YXB528" => ("JP", Fe),
        "A39IBJ37TRP1C6" => ("AU", Fe),
        "A19VAU5U5O7RUS" => ("SG", Fe),
        _ => return None,
    })
}

#[cfg(test)]
impl FoundAccount {
    /// A German seller's profile, as it is found.
    pub(crate) fn shop(id: &str, region: Region) -> Self {
        Self {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(id: &str, name: &str, country: &str, kind: AccountType) -> FoundAccount {
        FoundAccount {
            slug: String::new(),
            clash: None,
            name: name.into(),
            kind,
            country: Some(country.into()),
            currency: None,
            time_zone: None,
            region: Region::Eu,
            ids: [("profile_id".to_owned(), id.to_owned())].into(),
            missing_since: None,
        }
    }

    fn slugs(accounts: &[FoundAccount]) -> Vec<&str> {
        accounts.iter().map(|account| account.slug.as_str()).collect()
    }

    #[test]
    fn a_slug_is_legal_whatever_the_name() {
        for (name, expected) in [
            ("Acme GmbH & Co. KG", "acme-gmbh-co-kg"),
            ("  Müller's Café – Ørsted ", "muellers-cafe-oersted"),
            ("株式会社", ""),
            ("--", ""),
        ] {
            assert_eq!(slug(name), expected, "{name}");
        }
        assert!(slug(&"long name ".repeat(40)).len() <= MAX_NAME + 2);
        let mut accounts = [profile("1", "株式会社", "JP", AccountType::Seller)];
        assign_slugs(&mut accounts, &UserId::default(), |_| false);
        assert_eq!(slugs(&accounts), ["seller-jp"]);
    }

    #[test]
    fn accounts_that_claim_one_slug_get_longer_ones_and_say_so() {
        let mut accounts = [
            profile("1001", "Acme", "DE", AccountType::Seller),
            profile("1002", "Acme", "DE", AccountType::Vendor),
            profile("1003", "Acme", "FR", AccountType::Seller),
            profile("1003001004", "Bolt", "DE", AccountType::Seller),
            profile("1003001005", "Bolt", "DE", AccountType::Seller),
        ];
        assign_slugs(&mut accounts, &UserId::default(), |_| false);
        let expected =
            ["acme-de-seller", "acme-de-vendor", "acme-fr", "bolt-de-seller-001004", "bolt-de-seller-001005"];
        assert_eq!(slugs(&accounts), expected);
        assert_eq!(accounts[0].clash.as_deref(), Some("acme-de"));
        assert_eq!(accounts[2].clash, None);
    }

    #[test]
    fn a_slug_stays_when_accounts_come_and_go_and_gives_way_to_the_configuration_alone() {
        let mut accounts = vec![profile("1", "Acme", "DE", AccountType::Seller)];
        assign_slugs(&mut accounts, &UserId::default(), |_| false);
        assert_eq!(slugs(&accounts), ["acme-de"]);
        accounts.push(profile("2", "Acme", "DE", AccountType::Vendor));
        accounts[0].name = "Acme Renamed".into();
        assign_slugs(&mut accounts, &UserId::default(), |_| false);
        assert_eq!(slugs(&accounts), ["acme-de", "acme-de-vendor"]);
        assign_slugs(&mut accounts, &UserId::default(), |slug| slug == "acme-de");
        assert_eq!(slugs(&accounts), ["acme-renamed-de", "acme-de-vendor"]);
    }

    #[test]
    fn accounts_of_several_users_differ_even_with_the_same_ids() {
        let mut accounts = [profile("123456789", "Acme", "DE", AccountType::Seller)];
        let user = "bob".parse().unwrap();
        let taken = ["acme-de", "acme-de-seller", "acme-de-seller-456789"];
        assign_slugs(&mut accounts, &user, |slug| taken.contains(&slug));
        assert_eq!(slugs(&accounts), ["acme-de-seller-123456789-bob"]);
        let mut twice = [accounts[0].clone(), accounts[0].clone()];
        assign_slugs(&mut twice, &user, |slug| taken.contains(&slug));
        assert_ne!(twice[0].slug, twice[1].slug);
    }
}
