//! Users, accounts and regions: what a request is sent on behalf of.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::domain::policy::Rules;
use crate::domain::throttle_mode::ThrottleMode;

/// The key of one Amazon grant: 1 to 128 of `A-Z a-z 0-9 . _ @ : | + -`, but not `.` or `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId(Arc<str>);

/// The text is not a legal [`UserId`] or account name. The message states which names are legal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a name is 1 to 128 of A-Z a-z 0-9 . _ @ : | + - and not . or ..")]
pub struct BadName;

impl UserId {
    /// The user of a request that names neither user nor account.
    pub const DEFAULT: &'static str = "default";
    /// The rule for legal names, for use in messages.
    pub const LEGAL: &'static str = "1 to 128 of A-Z a-z 0-9 . _ @ : | + - and not . or ..";

    /// Returns the user id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for UserId {
    fn default() -> Self {
        Self(Self::DEFAULT.into())
    }
}

impl FromStr for UserId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        check_name(text).map(|text| Self(text.into()))
    }
}

/// Checks `text` against the rule that user ids and account names share ([`UserId::LEGAL`]).
///
/// # Errors
/// Returns [`BadName`] if `text` is not a legal name.
pub fn check_name(text: &str) -> Result<&str, BadName> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"._@:|+-".contains(&b);
    if (1..=128).contains(&text.len()) && text.bytes().all(legal) && text != "." && text != ".." {
        Ok(text)
    } else {
        Err(BadName)
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl std::borrow::Borrow<str> for UserId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl Serialize for UserId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for UserId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One of the three regions of the Amazon Ads API. Tokens are global, data is regional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Region {
    /// North America: US, CA, MX, BR.
    #[default]
    Na,
    /// Europe, the Middle East, Africa and India.
    Eu,
    /// The Far East: JP, AU, SG.
    Fe,
}

impl Region {
    /// Every region, in the order of the discriminants.
    pub const ALL: [Self; 3] = [Self::Na, Self::Eu, Self::Fe];

    /// Returns `na`, `eu` or `fe`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Na => "na",
            Self::Eu => "eu",
            Self::Fe => "fe",
        }
    }

    /// Returns the host of the Ads API ("API endpoints", Amazon Ads API overview).
    pub fn ads_host(self) -> &'static str {
        match self {
            Self::Na => "advertising-api.amazon.com",
            Self::Eu => "advertising-api-eu.amazon.com",
            Self::Fe => "advertising-api-fe.amazon.com",
        }
    }

    /// Returns the host of Amazon's MCP server ("Get started with the Amazon Ads MCP server").
    pub fn mcp_host(self) -> &'static str {
        match self {
            Self::Na => "advertising-ai.amazon.com",
            Self::Eu => "advertising-ai-eu.amazon.com",
            Self::Fe => "advertising-ai-fe.amazon.com",
        }
    }

    /// Returns the authorization endpoint, to which a browser is sent for consent ("Authorization grants", Amazon Ads
    /// API).
    pub fn authorize_url(self) -> &'static str {
        match self {
            Self::Na => "https://www.amazon.com/ap/oa",
            Self::Eu => "https://eu.account.amazon.com/ap/oa",
            Self::Fe => "https://apac.account.amazon.com/ap/oa",
        }
    }

    /// Returns the token endpoint ("Access tokens", Amazon Ads API).
    pub fn token_url(self) -> &'static str {
        match self {
            Self::Na => "https://api.amazon.com/auth/o2/token",
            Self::Eu => "https://api.amazon.co.uk/auth/o2/token",
            Self::Fe => "https://api.amazon.co.jp/auth/o2/token",
        }
    }

    /// Returns the host of the token endpoint.
    pub fn token_host(self) -> &'static str {
        match self {
            Self::Na => "api.amazon.com",
            Self::Eu => "api.amazon.co.uk",
            Self::Fe => "api.amazon.co.jp",
        }
    }
}

impl FromStr for Region {
    type Err = BadRegion;

    fn from_str(text: &str) -> Result<Self, BadRegion> {
        Self::ALL.into_iter().find(|region| text.eq_ignore_ascii_case(region.as_str())).ok_or(BadRegion)
    }
}

/// The text is not the name of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a region is na, eu or fe")]
pub struct BadRegion;

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An Amazon service with a host of its own in each region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Service {
    /// The Amazon Ads API.
    #[default]
    Ads,
    /// The Amazon Ads MCP server.
    Mcp,
}

/// One of the hosts to which requests are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmazonHost {
    /// The service at the host.
    pub service: Service,
    /// The region whose data it serves.
    pub region: Region,
}

impl AmazonHost {
    /// Every host, in the order of [`index`](Self::index).
    pub const ALL: [Self; 6] = [
        Self::ads(Region::Na),
        Self::ads(Region::Eu),
        Self::ads(Region::Fe),
        Self::mcp(Region::Na),
        Self::mcp(Region::Eu),
        Self::mcp(Region::Fe),
    ];

    /// The Ads API of `region`.
    pub const fn ads(region: Region) -> Self {
        Self { service: Service::Ads, region }
    }

    /// The MCP server of `region`.
    pub const fn mcp(region: Region) -> Self {
        Self { service: Service::Mcp, region }
    }

    /// Its place in [`ALL`](Self::ALL).
    pub const fn index(self) -> usize {
        self.region as usize + if matches!(self.service, Service::Mcp) { Region::ALL.len() } else { 0 }
    }

    /// Returns the host's name at Amazon.
    pub fn name(self) -> &'static str {
        match self.service {
            Service::Ads => self.region.ads_host(),
            Service::Mcp => self.region.mcp_host(),
        }
    }

    /// Returns the configuration key of the host's origin, such as `upstream.na`.
    pub fn key(self) -> &'static str {
        match (self.service, self.region) {
            (Service::Ads, Region::Na) => "upstream.na",
            (Service::Ads, Region::Eu) => "upstream.eu",
            (Service::Ads, Region::Fe) => "upstream.fe",
            (Service::Mcp, Region::Na) => "upstream.mcp_na",
            (Service::Mcp, Region::Eu) => "upstream.mcp_eu",
            (Service::Mcp, Region::Fe) => "upstream.mcp_fe",
        }
    }
}

/// The meaning of an account's id. Each has one configuration key and, depending on the API family, one of several
/// header spellings (the table in [`api_families`](crate::domain::api_families)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Context {
    /// `profile_id`: the advertising profile, a number.
    Scope,
    /// `marketplace_id`, such as `ATVPDKIKX0DER`.
    Marketplace,
    /// `advertiser_id`: `ENTITY…`, the AMC account, the sponsored-ads entity, or for DSP quick actions the DSP entity.
    Advertiser,
    /// `entity_id`: `ENTITY…`, for AMC rule-based audiences and traffic events.
    Entity,
    /// `account_id`: a DSP advertiser, a global ads account or an AMC account.
    Account,
    /// `dsp_advertiser_id`, for traffic events and for changes of DSP audiences.
    DspAdvertiser,
    /// `amc_instance_id`, for AMC rule-based audiences.
    AmcInstance,
    /// `manager_account_id`: a manager account or a Partner Network id.
    Manager,
}

impl Context {
    /// Every context, in the order of the discriminants.
    pub const ALL: [Self; 8] = [
        Self::Scope,
        Self::Marketplace,
        Self::Advertiser,
        Self::Entity,
        Self::Account,
        Self::DspAdvertiser,
        Self::AmcInstance,
        Self::Manager,
    ];

    /// The configuration key of the id in `[[account]]`.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Scope => "profile_id",
            Self::Marketplace => "marketplace_id",
            Self::Advertiser => "advertiser_id",
            Self::Entity => "entity_id",
            Self::Account => "account_id",
            Self::DspAdvertiser => "dsp_advertiser_id",
            Self::AmcInstance => "amc_instance_id",
            Self::Manager => "manager_account_id",
        }
    }
}

/// A configured account: a name for one combination of user, region and ids.
#[derive(Clone, Debug)]
pub struct Account {
    /// The name by which callers select the account; the rule for legal names is that of a user id.
    pub name: Arc<str>,
    /// The user whose grant authorizes the account's requests.
    pub user: UserId,
    /// The region that holds the account's data; `None` stands for `amazon.region`.
    pub region: Option<Region>,
    /// The ids that the account defines.
    pub ids: Ids,
    /// Headers that are sent with every request, whatever its path.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Policy rules for the account's requests, in addition to `[policy]`.
    pub rules: Rules,
    /// The account's own mode of the throttle; `None` stands for that of the API family.
    pub throttle: Option<ThrottleMode>,
}

/// The ids of one account by [`Context`], as header values.
#[derive(Clone, Debug, Default)]
pub struct Ids([Option<HeaderValue>; 8]);

impl Ids {
    /// Returns the id for `context`, or `None` if the account does not define it.
    pub fn get(&self, context: Context) -> Option<&HeaderValue> {
        self.0[context as usize].as_ref()
    }

    /// Sets the id for `context`: 1 to 64 of `A-Z a-z 0-9 . _ : -`, so that an id cannot split a header.
    ///
    /// # Errors
    /// Returns [`BadId`] if `id` is not legal.
    pub fn set(&mut self, context: Context, id: &str) -> Result<(), BadId> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
        if !(1..=64).contains(&id.len()) || !id.bytes().all(legal) {
            return Err(BadId);
        }
        self.0[context as usize] = Some(HeaderValue::from_str(id).map_err(|_| BadId)?);
        Ok(())
    }
}

/// The text cannot be an id of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an id is 1 to 64 of A-Z a-z 0-9 . _ : -")]
pub struct BadId;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_the_alphabet_are_refused() {
        for bad in ["", ".", "..", "a b", "a/b", "a%2f", "ü", "a\n", &"x".repeat(129)] {
            assert_eq!(bad.parse::<UserId>(), Err(BadName), "{bad:?}");
        }
        for good in ["default", "a.b_c@d:e|f+g-h", "...", &"x".repeat(128)] {
            assert_eq!(good.parse::<UserId>().unwrap().as_str(), good);
        }
    }

    #[test]
    // Covers: threat 21.
    fn an_id_that_would_split_a_header_is_refused() {
        let mut ids = Ids::default();
        for bad in ["", "a b", "a\r\nx: y", "é", &"1".repeat(65)] {
            assert_eq!(ids.set(Context::Scope, bad), Err(BadId), "{bad:?}");
        }
        ids.set(Context::Account, "amzn1.ads-account.g.abc_1").unwrap();
        assert_eq!(ids.get(Context::Account).unwrap(), "amzn1.ads-account.g.abc_1");
        assert!(ids.get(Context::Scope).is_none());
    }

    #[test]
    fn each_host_stands_at_its_index() {
        for (index, host) in AmazonHost::ALL.into_iter().enumerate() {
            assert_eq!(host.index(), index);
        }
    }

    #[test]
    fn each_token_host_is_that_of_the_token_endpoint() {
        for region in Region::ALL {
            assert_eq!(region.token_url(), format!("https://{}/auth/o2/token", region.token_host()));
        }
    }

    #[test]
    fn regions_parse_in_any_case() {
        assert_eq!("EU".parse(), Ok(Region::Eu));
        assert_eq!("uk".parse::<Region>(), Err(BadRegion));
    }
}
