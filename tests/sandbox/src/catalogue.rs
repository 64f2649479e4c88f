//! The contents of the Ads API: advertisers, profiles, AMC accounts, campaigns, reports.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Listener;

/// The data of the Ads API.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    /// The advertisers that can sign in and consent.
    pub advertisers: Vec<Advertiser>,
    /// The profiles of all regions.
    pub profiles: Vec<Profile>,
    /// The manager accounts.
    pub managers: Vec<ManagerAccount>,
    /// The DSP advertisers.
    pub dsp_advertisers: Vec<DspAdvertiser>,
    /// The AMC accounts.
    pub amc_accounts: Vec<AmcAccount>,
    /// The Sponsored Products campaigns.
    pub campaigns: Vec<Campaign>,
    /// The requested reports, by id.
    pub reports: HashMap<String, Report>,
    /// The AMC workflows, as submitted.
    pub workflows: Vec<Workflow>,
    /// The AMC workflow executions.
    pub executions: Vec<Execution>,
    last_id: u64,
}

/// A user with an Amazon login.
#[derive(Clone, Debug, Serialize)]
pub struct Advertiser {
    /// The LWA `user_id`.
    pub id: String,
    /// The name on the consent page.
    pub name: String,
}

/// An advertising profile.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The profile id: a 64-bit number, larger than a JavaScript number can hold exactly.
    pub id: u64,
    /// The region that the profile belongs to.
    pub region: Listener,
    /// The owner: [`Advertiser::id`].
    pub advertiser: String,
    /// `US`, `UK` …
    pub country: &'static str,
    /// `USD` …
    pub currency: &'static str,
    /// `America/Los_Angeles` …
    pub timezone: &'static str,
    /// The marketplace id.
    pub marketplace: &'static str,
    /// `ENTITY…` of a vendor, or the seller id.
    pub account: String,
    /// `seller`, `vendor` or `agency`.
    pub kind: &'static str,
    /// Its name; by default that of its owner.
    pub name: Option<String>,
}

/// A manager account, which holds profiles.
#[derive(Clone, Debug)]
pub struct ManagerAccount {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The profiles that it holds.
    pub profiles: Vec<u64>,
    /// The owner: [`Advertiser::id`].
    pub advertiser: String,
}

/// A DSP advertiser of an agency profile.
#[derive(Clone, Debug)]
pub struct DspAdvertiser {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `DE` …
    pub country: &'static str,
    /// `EUR` …
    pub currency: &'static str,
    /// The agency profile that it belongs to.
    pub profile: u64,
}

/// An AMC account with its instance.
#[derive(Clone, Debug)]
pub struct AmcAccount {
    /// `ENTITY…`
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its marketplace.
    pub marketplace: &'static str,
    /// The id of its instance.
    pub instance: String,
    /// The owner: [`Advertiser::id`].
    pub advertiser: String,
}

/// A Sponsored Products campaign.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Campaign {
    /// The id, a string in version 3.
    #[serde(default)]
    pub campaign_id: String,
    /// Its profile; not part of the payload.
    #[serde(skip)]
    pub profile: u64,
    /// The name.
    pub name: String,
    /// `ENABLED`, `PAUSED` or `ARCHIVED`.
    pub state: String,
    /// `MANUAL` or `AUTO`.
    pub targeting_type: String,
    /// The first day.
    pub start_date: String,
    /// The daily budget.
    pub budget: Budget,
}

/// A campaign's budget.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// In the profile's currency.
    pub budget: f64,
    /// `DAILY`.
    pub budget_type: String,
}

/// A requested report.
#[derive(Clone, Debug)]
pub struct Report {
    /// The request, as submitted.
    pub request: Value,
    /// The profile or account that it is for.
    pub context: String,
    /// The number of status requests. The first response is PENDING, later ones COMPLETED.
    pub polls: u32,
}

/// An AMC workflow.
#[derive(Clone, Debug)]
pub struct Workflow {
    /// Its instance.
    pub instance: String,
    /// Its id, chosen by the client.
    pub id: String,
    /// The whole object.
    pub body: Value,
}

/// An AMC workflow execution.
#[derive(Clone, Debug)]
pub struct Execution {
    /// Its instance.
    pub instance: String,
    /// Its id, chosen by AMC.
    pub id: String,
    /// The whole object, as submitted.
    pub body: Value,
}

impl Catalogue {
    /// Two advertisers, a seller and a vendor, each with profiles in every region, an AMC account and campaigns.
    pub(super) fn seeded() -> Self {
        let tools = "amzn1.account.SANDBOXTOOLS";
        let books = "amzn1.account.SANDBOXBOOKS";
        let named = |id: &str, name: &str| Advertiser { id: id.into(), name: name.into() };
        let mut catalogue = Self {
            advertisers: vec![named(tools, "Meadow Tools"), named(books, "Harbour Books")],
            profiles: seeded_profiles(tools, books),
            amc_accounts: vec![
                amc_account("ENTITYSANDBOXTOOLS", "Meadow Tools AMC", "ATVPDKIKX0DER", "amcsandboxtools", tools),
                amc_account("ENTITYSANDBOXBOOKS", "Harbour Books AMC", "A1PA6795UKMFR9", "amcsandboxbooks", books),
            ],
            last_id: 281_474_976_710_656,
            ..Self::default()
        };
        let profiles: Vec<u64> = catalogue.profiles.iter().map(|profile| profile.id).collect();
        for profile in profiles {
            for (name, state) in [("Spring | exact", "ENABLED"), ("Café – broad", "ENABLED"), ("Clearance", "PAUSED")]
            {
                let campaign = Campaign {
                    campaign_id: catalogue.next_id().to_string(),
                    profile,
                    name: name.into(),
                    state: state.into(),
                    targeting_type: "MANUAL".into(),
                    start_date: "2026-01-05".into(),
                    budget: Budget { budget: 25.5, budget_type: "DAILY".into() },
                };
                catalogue.campaigns.push(campaign);
            }
        }
        catalogue
    }

    /// A new id, larger than all earlier ones.
    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// The profiles that a user sees in a region.
    pub fn profiles_of<'a>(&'a self, advertiser: &'a str, region: Listener) -> impl Iterator<Item = &'a Profile> {
        self.profiles.iter().filter(move |profile| profile.advertiser == advertiser && profile.region == region)
    }
}

impl Profile {
    /// The profile as the API returns it.
    pub(super) fn payload(&self) -> Value {
        json!({
            "profileId": self.id,
            "countryCode": self.country,
            "currencyCode": self.currency,
            "dailyBudget": 999_999_999.0,
            "timezone": self.timezone,
            "accountInfo": {
                "marketplaceStringId": self.marketplace,
                "id": self.account,
                "type": self.kind,
                "name": self.name(),
                "validPaymentMethod": true,
            },
        })
    }

    fn name(&self) -> String {
        if let Some(name) = &self.name {
            return name.clone();
        }
        format!("{} {}", if self.kind == "seller" { "Meadow Tools" } else { "Harbour Books" }, self.country)
    }
}

fn seeded_profiles(tools: &str, books: &str) -> Vec<Profile> {
    // The ids differ only in their last digits, beyond the precision of a double: a client that parses them as floating
    // point numbers confuses them.
    const FIRST: u64 = 3_012_345_678_901_234_561;
    let rows = [
        (Listener::Na, "US", "USD", "America/Los_Angeles", "ATVPDKIKX0DER"),
        (Listener::Na, "CA", "CAD", "America/Los_Angeles", "A2EUQ1WTGCTBG2"),
        (Listener::Eu, "UK", "GBP", "Europe/London", "A1F83G8C2ARO7P"),
        (Listener::Eu, "DE", "EUR", "Europe/Paris", "A1PA6795UKMFR9"),
        (Listener::Fe, "JP", "JPY", "Asia/Tokyo", "A1VC38T7YXB528"),
        (Listener::Fe, "AU", "AUD", "Australia/Sydney", "A39IBJ37TRP1C6"),
    ];
    let owners = [(tools, "seller", "A3SANDBOXTOOLS"), (books, "vendor", "ENTITYSANDBOXBOOKSADS")];
    let pairs = owners.into_iter().flat_map(|owner| rows.map(|row| (owner, row)));
    (FIRST..)
        .zip(pairs)
        .map(|(id, ((advertiser, kind, account), (region, country, currency, timezone, marketplace)))| Profile {
            id,
            region,
            advertiser: advertiser.into(),
            country,
            currency,
            timezone,
            marketplace,
            account: account.into(),
            kind,
            name: None,
        })
        .collect()
}

fn amc_account(id: &str, name: &str, marketplace: &'static str, instance: &str, advertiser: &str) -> AmcAccount {
    AmcAccount {
        id: id.into(),
        name: name.into(),
        marketplace,
        instance: instance.into(),
        advertiser: advertiser.into(),
    }
}
