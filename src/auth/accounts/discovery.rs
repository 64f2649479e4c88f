//! Asks Amazon which accounts a grant reaches: profiles of the three regions, manager accounts, DSP advertisers, AMC
//! accounts and instances.
//!
//! The file is long because each of Amazon's four lists has a shape of its own, and they are read in one pass.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{HeaderName, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::outcome::{Outcome, Source, Status};
use crate::domain::account::{AmazonHost, Context, Ids, Region};
use crate::domain::api_families::family;
use crate::domain::found_account::{AccountType, FoundAccount, marketplace};
use crate::domain::headers::{UpstreamHeaders, to_amazon};
use crate::throttle::{Call, Entry, Pass, Throttle, Throttled};
use crate::upstream::{RequestBody, Reuse, Upstream};

/// Timeout of one request.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum response body. A profile takes half a kilobyte, and large agencies have thousands.
const MAX_BODY: usize = 16 << 20;
/// Most requests at a time. Amazon throttles bursts, and nobody waits for the last account.
const CONCURRENCY: usize = 4;
/// Most agency profiles and AMC accounts that are asked for what belongs to them.
const MAX_PARENTS: usize = 200;
/// DSP advertisers per page ("count", at most 100), and most pages.
const DSP_PAGE: usize = 100;
const MAX_PAGES: usize = 100;
/// The account of the search in the throttle's queue: it takes turns with the callers' accounts.
const SEARCH: &str = "accounts.sync";
/// Attempts at a request that Amazon throttles, and the longest wait between them.
const ATTEMPTS: u32 = 4;
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Amazon, as one grant sees it.
pub(super) struct Discovery {
    pub(super) upstream: Arc<Upstream>,
    pub(super) throttle: Arc<Throttle>,
    pub(super) client_id: HeaderValue,
    pub(super) bearer: HeaderValue,
    /// The region whose host answers questions about AMC, which is not regional.
    pub(super) home: Region,
}

/// What was found, and how each source answered.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) accounts: Vec<FoundAccount>,
    pub(super) outcomes: Vec<Outcome>,
}

/// Why a request has no usable response.
struct Unanswered {
    code: &'static str,
    detail: String,
}

impl Discovery {
    /// Asks every source. A source that fails leaves the others as they are.
    pub(super) async fn run(&self) -> Found {
        let mut found = Found { accounts: Vec::new(), outcomes: Vec::new() };
        let [na, eu, fe] = Region::ALL.map(|region| self.profiles(region));
        for (region, profiles) in Region::ALL.into_iter().zip(<[_; 3]>::from(tokio::join!(na, eu, fe))) {
            found.take(Source::Profiles, Some(region), profiles);
        }
        let [na, eu, fe] = Region::ALL.map(|region| self.managers(region));
        for (region, managers) in Region::ALL.into_iter().zip(<[_; 3]>::from(tokio::join!(na, eu, fe))) {
            let managers = managers.map(|managers| found.link_managers(region, managers));
            found.take(Source::ManagerAccounts, Some(region), managers);
        }
        self.dsp_advertisers(&mut found).await;
        let amc = self.amc().await.map(|amc| found.link_amc(amc));
        found.take(Source::Amc, None, amc);
        found
    }

    async fn profiles(&self, region: Region) -> Result<Vec<FoundAccount>, Unanswered> {
        let profiles: Vec<Profile> = self.get(region, "/v2/profiles", &Ids::default()).await?;
        Ok(profiles.into_iter().map(|profile| profile.account(region)).collect())
    }

    async fn managers(&self, region: Region) -> Result<Vec<Manager>, Unanswered> {
        Ok(self.get::<Managers>(region, "/managerAccounts", &Ids::default()).await?.manager_accounts)
    }

    /// The advertisers of every agency profile. Other profiles hold none.
    async fn dsp_advertisers(&self, found: &mut Found) {
        let agencies: Vec<_> = found
            .accounts
            .iter()
            .filter(|account| account.kind == AccountType::Agency)
            .take(MAX_PARENTS)
            .cloned()
            .collect();
        let answers = futures_util::stream::iter(agencies)
            .map(|agency| async move { (agency.region, self.advertisers_of(&agency).await) })
            .buffer_unordered(CONCURRENCY)
            .collect::<Vec<_>>()
            .await;
        for region in Region::ALL {
            let mut of_region = answers.iter().filter(|(answered, _)| *answered == region).peekable();
            if of_region.peek().is_none() {
                continue;
            }
            let mut failure = None;
            let mut advertisers = Vec::new();
            for (_, answer) in of_region {
                match answer {
                    Ok(some) => advertisers.extend(some.iter().cloned()),
                    Err(Unanswered { code, detail }) => failure = Some(Unanswered { code, detail: detail.clone() }),
                }
            }
            found.take_some(Source::DspAdvertisers, Some(region), advertisers, failure);
        }
    }

    async fn advertisers_of(&self, agency: &FoundAccount) -> Result<Vec<FoundAccount>, Unanswered> {
        let mut ids = Ids::default();
        let scope = agency.id(Context::Scope).unwrap_or_default();
        ids.set(Context::Scope, scope).map_err(|error| Unanswered { code: "bad_answer", detail: error.to_string() })?;
        let mut all = Vec::new();
        for page in 0..MAX_PAGES {
            let path = format!("/dsp/advertisers?startIndex={}&count={DSP_PAGE}", page * DSP_PAGE);
            let Advertisers { response, total_results } = self.get(agency.region, &path, &ids).await?;
            let full = response.len() == DSP_PAGE;
            all.extend(response.into_iter().map(|advertiser| advertiser.account(agency)));
            if !full || total_results.is_some_and(|total| all.len() >= total) {
                break;
            }
        }
        Ok(all)
    }

    async fn amc(&self) -> Result<Vec<FoundAccount>, Unanswered> {
        let AmcAccounts { amc_accounts } = self.get(self.home, "/amc/accounts", &Ids::default()).await?;
        let instances = futures_util::stream::iter(amc_accounts.into_iter().take(MAX_PARENTS))
            .map(|account| async move {
                let instances = self.instances_of(&account).await;
                (account, instances)
            })
            .buffered(CONCURRENCY)
            .collect::<Vec<_>>()
            .await;
        let mut all = Vec::new();
        for (account, instances) in instances {
            // Without its instances the account is still good for every call that names one in its path.
            let instances = instances.unwrap_or_default();
            if instances.is_empty() {
                all.push(account.account(None));
            }
            all.extend(instances.iter().map(|instance| account.account(Some(instance))));
        }
        Ok(all)
    }

    async fn instances_of(&self, account: &AmcAccount) -> Result<Vec<AmcInstance>, Unanswered> {
        let mut ids = Ids::default();
        let bad = |error: crate::domain::account::BadId| Unanswered { code: "bad_answer", detail: error.to_string() };
        ids.set(Context::Advertiser, &account.account_id).map_err(bad)?;
        ids.set(Context::Marketplace, &account.marketplace_id).map_err(bad)?;
        let (mut all, mut token) = (Vec::new(), None::<String>);
        for _ in 0..MAX_PAGES {
            let query = token.map(|token| {
                let token: String = url::form_urlencoded::byte_serialize(token.as_bytes()).collect();
                format!("?nextToken={token}")
            });
            let path = format!("/amc/instances{}", query.unwrap_or_default());
            let page: AmcInstances = self.get(self.home, &path, &ids).await?;
            all.extend(page.instances);
            token = page.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                break;
            }
        }
        Ok(all)
    }

    /// Sends a `GET`, and again while Amazon throttles it. It waits for its turn among the requests of callers, as
    /// Amazon limits all of them together.
    async fn get<T: DeserializeOwned>(&self, region: Region, path: &str, ids: &Ids) -> Result<T, Unanswered> {
        let mut attempt = 1;
        loop {
            let mut pass = self.turn(region, path).await?;
            let answer = tokio::time::timeout(TIMEOUT, Box::pin(self.once(region, path, ids))).await;
            let late = || Unanswered { code: "timeout", detail: format!("no response within {TIMEOUT:?}") };
            let (status, headers, body) = answer.map_err(|_| late())??;
            pass.responded(status, &headers);
            let retry = status == StatusCode::TOO_MANY_REQUESTS && attempt < ATTEMPTS;
            if retry {
                let told = headers.get(RETRY_AFTER).and_then(|wait| wait.to_str().ok()?.parse().ok());
                let wait = told.map_or(Duration::from_secs(attempt.into()), Duration::from_secs).min(MAX_WAIT);
                tokio::time::sleep(wait).await;
                attempt += 1;
                continue;
            }
            if status != StatusCode::OK {
                return Err(refused(status, &body));
            }
            return serde_json::from_slice(&body).map_err(|_| Unanswered {
                code: "bad_answer",
                detail: "the response is not what Amazon documents".to_owned(),
            });
        }
    }

    /// The turn of a request: at once, unless Amazon refuses others like it.
    async fn turn<'a>(&'a self, region: Region, path: &'a str) -> Result<Pass<'a>, Unanswered> {
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        let call = Call::new(region, family(path), &Method::GET, path, SEARCH);
        let throttled = |throttled: Throttled| Unanswered {
            code: "throttled",
            detail: format!("Amazon refuses requests like this one for about {:.0} s", throttled.wait.as_secs_f64()),
        };
        match self.throttle.enter_own(call) {
            Entry::Pass(pass) => Ok(pass),
            Entry::Wait(ticket) => Box::pin(ticket.turn()).await.map_err(throttled),
            Entry::Refuse(refused) => Err(throttled(refused)),
        }
    }

    async fn once(&self, region: Region, path: &str, ids: &Ids) -> Result<(StatusCode, HeaderMap, Bytes), Unanswered> {
        let uri: Uri = path.parse().map_err(|_| Unanswered { code: "bad_answer", detail: "no path".to_owned() })?;
        let attach = UpstreamHeaders {
            family: family(uri.path()),
            bearer: &self.bearer,
            client_id: &self.client_id,
            ids: Some(ids),
            fixed: &[] as &[(HeaderName, HeaderValue)],
        };
        let headers = to_amazon(&HeaderMap::new(), attach);
        let unreachable =
            || Unanswered { code: "unreachable", detail: format!("the host of {region} is not reachable") };
        let request = || {
            let mut request = Request::new(RequestBody::empty());
            *request.headers_mut() = headers.clone();
            *request.uri_mut() = uri.clone();
            request
        };
        let host = AmazonHost::ads(region);
        // With connections of its own a search would leave one for each request. A `GET` that met a connection that the
        // server was closing is sent again, on a new one.
        let response = match self.upstream.send(host, Reuse::Allowed, request()).await.ok() {
            Some(response) => response,
            None => {
                let again = self.upstream.send(host, Reuse::Fresh(Instant::now()), request()).await;
                again.map_err(|_| unreachable())?
            }
        };
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(|_| Unanswered {
            code: "too_large",
            detail: "the response broke off, or is longer than 16 MiB".to_owned(),
        })?;
        Ok((head.status, head.headers, body.to_bytes()))
    }
}

/// What an error response means. Amazon's text is quoted without anything that could be a token.
fn refused(status: StatusCode, body: &[u8]) -> Unanswered {
    let code = match status {
        StatusCode::UNAUTHORIZED => "unauthorized",
        StatusCode::FORBIDDEN => "forbidden",
        StatusCode::TOO_MANY_REQUESTS => "throttled",
        status if status.is_server_error() => "server_error",
        _ => "refused",
    };
    let document: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let text = ["details", "message", "detail"].into_iter().find_map(|name| document[name].as_str());
    let plain = |text: &&str| text.len() <= 200 && !text.contains("Atz") && !text.contains("Bearer");
    Unanswered { code, detail: format!("{status} {}", text.filter(plain).unwrap_or_default()).trim_end().to_owned() }
}

impl Found {
    fn take(&mut self, source: Source, region: Option<Region>, answer: Result<Vec<FoundAccount>, Unanswered>) {
        match answer {
            Ok(accounts) => self.take_some(source, region, accounts, None),
            Err(unanswered) => self.take_some(source, region, Vec::new(), Some(unanswered)),
        }
    }

    fn take_some(
        &mut self,
        source: Source,
        region: Option<Region>,
        accounts: Vec<FoundAccount>,
        failure: Option<Unanswered>,
    ) {
        let count = accounts.len();
        let (status, code, detail) = match failure {
            None if count == 0 => (Status::Empty, None, None),
            None => (Status::Found, None, None),
            // Most grants reach neither manager accounts nor DSP nor AMC, which is nothing to repair.
            Some(Unanswered { code: code @ ("unauthorized" | "forbidden" | "refused"), detail })
                if source != Source::Profiles =>
            {
                (Status::NoAccess, Some(code.to_owned()), Some(detail))
            }
            Some(Unanswered { code, detail }) => (Status::Failed, Some(code.to_owned()), Some(detail)),
        };
        self.outcomes.push(Outcome { source, region, status, count, code, detail });
        for account in accounts {
            // Hosts of several regions list the same manager account.
            if !self.accounts.iter().any(|known| known.kind == AccountType::Manager && known.key() == account.key()) {
                self.accounts.push(account);
            }
        }
    }

    /// Writes the manager into each profile that exactly one manager account holds.
    fn link_managers(&mut self, region: Region, managers: Vec<Manager>) -> Vec<FoundAccount> {
        for profile in self.accounts.iter_mut().filter(|account| account.kind.is_profile()) {
            let id = profile.id(Context::Scope).unwrap_or_default().to_owned();
            let holds = |manager: &&Manager| manager.linked_accounts.iter().any(|linked| linked.profile_id() == id);
            let mut holders = managers.iter().filter(holds);
            if let (Some(only), None) = (holders.next(), holders.next()) {
                let key = Context::Manager.key().to_owned();
                profile.ids.entry(key).or_insert_with(|| only.manager_account_id.clone());
            }
        }
        managers.into_iter().map(|manager| manager.account(region)).collect()
    }

    /// Writes the AMC account of a marketplace into the profiles of that marketplace, where there is only one.
    fn link_amc(&mut self, amc: Vec<FoundAccount>) -> Vec<FoundAccount> {
        for profile in self.accounts.iter_mut().filter(|account| account.kind.is_profile()) {
            let Some(place) = profile.id(Context::Marketplace).map(str::to_owned) else { continue };
            let mut here = amc.iter().filter(|account| account.id(Context::Marketplace) == Some(&place));
            let (Some(only), None) = (here.next(), here.next()) else { continue };
            for context in [Context::Advertiser, Context::Entity, Context::AmcInstance] {
                if let Some(id) = only.id(context) {
                    profile.ids.insert(context.key().to_owned(), id.to_owned());
                }
            }
        }
        amc
    }
}

// Amazon's objects, as far as they are used.

/// An entry of `GET /v2/profiles` ("Profiles", Amazon Ads API).
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    profile_id: serde_json::Number,
    country_code: Option<String>,
    currency_code: Option<String>,
    timezone: Option<String>,
    account_info: Option<AccountInfo>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AccountInfo {
    marketplace_string_id: Option<String>,
    id: Option<String>,
    r#type: Option<String>,
    name: Option<String>,
}

impl Profile {
    fn account(self, region: Region) -> FoundAccount {
        let info = self.account_info.unwrap_or_default();
        let kind = match info.r#type.as_deref() {
            Some("seller") => AccountType::Seller,
            Some("vendor") => AccountType::Vendor,
            Some("agency") => AccountType::Agency,
            _ => AccountType::Other,
        };
        let entity = info.id.filter(|id| id.starts_with("ENTITY"));
        let ids = [
            (Context::Scope, Some(self.profile_id.to_string())),
            (Context::Marketplace, info.marketplace_string_id),
            (Context::Advertiser, entity.clone()),
            (Context::Entity, entity),
        ];
        FoundAccount {
            country: self.country_code,
            currency: self.currency_code,
            time_zone: self.timezone,
            ..account(info.name.unwrap_or_default(), kind, region, ids)
        }
    }
}

/// `GET /managerAccounts` ("Manager accounts").
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Managers {
    #[serde(default)]
    manager_accounts: Vec<Manager>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manager {
    manager_account_id: String,
    manager_account_name: Option<String>,
    #[serde(default)]
    linked_accounts: Vec<Linked>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linked {
    profile_id: Option<serde_json::Value>,
}

impl Linked {
    /// The profile id, which is a number or a text.
    fn profile_id(&self) -> String {
        match &self.profile_id {
            Some(serde_json::Value::String(id)) => id.clone(),
            Some(id) => id.to_string(),
            None => String::new(),
        }
    }
}

impl Manager {
    fn account(self, region: Region) -> FoundAccount {
        let name = self.manager_account_name.unwrap_or_default();
        account(name, AccountType::Manager, region, [(Context::Manager, Some(self.manager_account_id))])
    }
}

/// `GET /dsp/advertisers` ("DSP advertisers").
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Advertisers {
    #[serde(default)]
    response: Vec<Advertiser>,
    total_results: Option<usize>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Advertiser {
    advertiser_id: String,
    name: Option<String>,
    currency: Option<String>,
    country: Option<String>,
    timezone: Option<String>,
}

impl Advertiser {
    fn account(self, agency: &FoundAccount) -> FoundAccount {
        let ids = [
            (Context::Account, Some(self.advertiser_id.clone())),
            (Context::DspAdvertiser, Some(self.advertiser_id)),
            (Context::Scope, agency.id(Context::Scope).map(str::to_owned)),
        ];
        FoundAccount {
            country: self.country.or_else(|| agency.country.clone()),
            currency: self.currency,
            time_zone: self.timezone,
            ..account(self.name.unwrap_or_default(), AccountType::DspAdvertiser, agency.region, ids)
        }
    }
}

/// `GET /amc/accounts` and `GET /amc/instances` ("AMC administration").
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AmcAccounts {
    #[serde(default)]
    amc_accounts: Vec<AmcAccount>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AmcAccount {
    account_id: String,
    account_name: Option<String>,
    marketplace_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AmcInstances {
    #[serde(default)]
    instances: Vec<AmcInstance>,
    next_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AmcInstance {
    instance_id: String,
    instance_name: Option<String>,
}

impl AmcAccount {
    fn account(&self, instance: Option<&AmcInstance>) -> FoundAccount {
        let (country, region) = marketplace(&self.marketplace_id).unzip();
        let ids = [
            (Context::Advertiser, Some(self.account_id.clone())),
            (Context::Entity, Some(self.account_id.clone())),
            (Context::Marketplace, Some(self.marketplace_id.clone())),
            (Context::AmcInstance, instance.map(|instance| instance.instance_id.clone())),
        ];
        let name = instance.and_then(|instance| instance.instance_name.clone()).or_else(|| self.account_name.clone());
        FoundAccount {
            country: country.map(str::to_owned),
            ..account(name.unwrap_or_default(), AccountType::Amc, region.unwrap_or_default(), ids)
        }
    }
}

fn account<const N: usize>(
    name: String,
    kind: AccountType,
    region: Region,
    ids: [(Context, Option<String>); N],
) -> FoundAccount {
    let ids = ids.into_iter().filter_map(|(context, id)| Some((context.key().to_owned(), id?)));
    FoundAccount {
        slug: String::new(),
        clash: None,
        name,
        kind,
        country: None,
        currency: None,
        time_zone: None,
        region,
        ids: ids.collect(),
        missing_since: None,
    }
}
