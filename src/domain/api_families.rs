//! Which path family of the Amazon Ads API takes which client-id and context headers: data, in this one place.
//!
//! The table restates the "Parameters" of Amazon's OpenAPI specifications (advertising.amazon.com/API/docs) per path.
//! A header stands here where an operation of the family requires it or lists it as optional.

use http::HeaderName;

use crate::domain::account::Context;

/// Under which name the client id goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientId {
    /// `Amazon-Advertising-API-ClientId`: the older APIs, and where nobody says otherwise.
    Api,
    /// `Amazon-Ads-ClientId`: the Ads API v1 and the MCP server.
    Ads,
}

impl ClientId {
    /// Its name on the wire.
    pub const fn name(self) -> HeaderName {
        match self {
            Self::Api => HeaderName::from_static("amazon-advertising-api-clientid"),
            Self::Ads => HeaderName::from_static("amazon-ads-clientid"),
        }
    }
}

/// A context header, in one of the spellings that Amazon's paths ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// `amazon-advertising-api-scope`
    Scope,
    /// `amazon-advertising-api-marketplaceid`
    Marketplace,
    /// `amazon-advertising-api-advertiserid`
    Advertiser,
    /// `amazon-advertising-api-entityid`
    Entity,
    /// `amazon-ads-accountid`
    Account,
    /// `amazon-ads-account-id`
    StreamAccount,
    /// `amazon-advertising-advertiser-id`
    DspAdvertiser,
    /// `amazon-marketing-cloud-audience-instanceid`
    AmcInstance,
    /// `amazon-ads-manager-accountid`
    Manager,
    /// `amazon-ads-manager-account-id`
    AdmManager,
    /// `amazon-advertising-api-manager-account`
    PartnerManager,
}

use Header::{
    Account, AdmManager, Advertiser, AmcInstance, DspAdvertiser, Entity, Manager, Marketplace, PartnerManager, Scope,
    StreamAccount,
};

impl Header {
    /// Its name on the wire.
    pub const fn name(self) -> HeaderName {
        match self {
            Scope => HeaderName::from_static("amazon-advertising-api-scope"),
            Marketplace => HeaderName::from_static("amazon-advertising-api-marketplaceid"),
            Advertiser => HeaderName::from_static("amazon-advertising-api-advertiserid"),
            Entity => HeaderName::from_static("amazon-advertising-api-entityid"),
            Account => HeaderName::from_static("amazon-ads-accountid"),
            StreamAccount => HeaderName::from_static("amazon-ads-account-id"),
            DspAdvertiser => HeaderName::from_static("amazon-advertising-advertiser-id"),
            AmcInstance => HeaderName::from_static("amazon-marketing-cloud-audience-instanceid"),
            Manager => HeaderName::from_static("amazon-ads-manager-accountid"),
            AdmManager => HeaderName::from_static("amazon-ads-manager-account-id"),
            PartnerManager => HeaderName::from_static("amazon-advertising-api-manager-account"),
        }
    }

    /// Which id of an account it carries.
    pub const fn context(self) -> Context {
        match self {
            Scope => Context::Scope,
            Marketplace => Context::Marketplace,
            Advertiser => Context::Advertiser,
            Entity => Context::Entity,
            Account | StreamAccount => Context::Account,
            DspAdvertiser => Context::DspAdvertiser,
            AmcInstance => Context::AmcInstance,
            Manager | AdmManager | PartnerManager => Context::Manager,
        }
    }
}

/// One row: these paths take these headers.
#[derive(Debug)]
pub struct Family {
    /// A short name, for metrics and the log.
    pub name: &'static str,
    /// `/a/*/b` matches that path and all below it; `*` is any one segment.
    pub paths: &'static [&'static str],
    /// Under which name the client id goes.
    pub client_id: ClientId,
    /// The context headers, those that win an exclusion first.
    pub context: &'static [Header],
}

/// Two ids that Amazon never takes together: the first wins where a caller sent neither. Reporting v3 for DSP: "Scope or
/// AccountId, not both" (DSP reporting migration guide); traffic events: the Advertiser-Id or the EntityId, not both
/// (Traffic events, getting started).
pub const EXCLUSIVE: [(Context, Context); 2] =
    [(Context::Scope, Context::Account), (Context::Entity, Context::DspAdvertiser)];

/// What a path of no known family gets.
static UNKNOWN: Family =
    Family { name: "unknown", paths: &[], client_id: ClientId::Api, context: &[Scope, Marketplace, Advertiser] };

/// All rows; the first that matches a path decides, so the narrower stand before the wider.
static TABLE: &[Family] = &[
    Family { name: "profiles", paths: &["/v2/profiles"], client_id: ClientId::Api, context: &[] },
    Family {
        name: "accounts",
        paths: &["/managerAccounts", "/adsAccounts", "/testAccounts", "/amc/accounts"],
        client_id: ClientId::Api,
        context: &[],
    },
    Family { name: "sp_global", paths: &["/sp/global"], client_id: ClientId::Api, context: &[Account, Marketplace] },
    Family {
        name: "sp_keyword_recommendations",
        paths: &["/sp/targets/keywords/recommendations"],
        client_id: ClientId::Api,
        context: &[Scope, Account, Advertiser, Marketplace],
    },
    Family { name: "sponsored_products", paths: &["/sp"], client_id: ClientId::Api, context: &[Scope, Account] },
    Family {
        name: "sponsored_brands_and_display",
        paths: &["/sb", "/sd", "/stores"],
        client_id: ClientId::Api,
        context: &[Scope],
    },
    Family { name: "reporting", paths: &["/reporting"], client_id: ClientId::Api, context: &[Scope, Account] },
    Family { name: "exports", paths: &["/*/export", "/exports"], client_id: ClientId::Api, context: &[Scope] },
    Family {
        name: "ads_api_v1",
        paths: &["/adsApi/v1"],
        client_id: ClientId::Ads,
        context: &[Scope, Account, Manager],
    },
    Family { name: "mcp", paths: &["/mcp"], client_id: ClientId::Ads, context: &[] },
    Family { name: "dsp_streams", paths: &["/dsp/streams"], client_id: ClientId::Api, context: &[StreamAccount] },
    Family {
        name: "dsp_measurement",
        paths: &["/dsp/measurement", "/measurement", "/conversions"],
        client_id: ClientId::Api,
        context: &[Scope, Account],
    },
    Family { name: "dsp", paths: &["/dsp"], client_id: ClientId::Api, context: &[Scope] },
    // The account stands in the path.
    Family { name: "dsp_reports", paths: &["/accounts/*/dsp/reports"], client_id: ClientId::Api, context: &[] },
    Family { name: "streams", paths: &["/streams"], client_id: ClientId::Api, context: &[Scope, Account] },
    Family { name: "data_provider", paths: &["/v2/dp", "/dp"], client_id: ClientId::Api, context: &[] },
    Family {
        name: "profile_scoped",
        paths: &[
            "/attribution",
            "/portfolios",
            "/insights/brandMetrics",
            "/brandMetrics",
            "/assets",
            "/creatives",
            "/v2/portfolios",
            "/v2/reports",
            "/v2/snapshots",
            "/v2/sp",
            "/v2/hsa",
            "/v2/stores",
        ],
        client_id: ClientId::Api,
        context: &[Scope],
    },
    Family {
        name: "partner",
        paths: &["/mmm", "/brandBenchmarks", "/insights/brandBenchmarks", "/partnerOpportunities"],
        client_id: ClientId::Api,
        context: &[PartnerManager],
    },
    Family {
        name: "amc_admin",
        paths: &["/amc/instances"],
        client_id: ClientId::Api,
        context: &[Advertiser, Marketplace, Scope],
    },
    Family {
        name: "amc_schedules",
        paths: &["/amc/reporting/*/schedules"],
        client_id: ClientId::Api,
        context: &[Advertiser, Marketplace, Scope, Account],
    },
    Family {
        name: "amc_reporting",
        paths: &["/amc/reporting"],
        client_id: ClientId::Api,
        context: &[Advertiser, Marketplace, Scope],
    },
    // Production instances demand the account id too, though the specification does not say so.
    Family {
        name: "amc_advertiser_data",
        paths: &["/amc/advertiserData"],
        client_id: ClientId::Api,
        context: &[Advertiser, Marketplace, Account],
    },
    Family {
        name: "amc_rule_audiences",
        paths: &["/amc/audiences/query", "/amc/audiences/lookalike"],
        client_id: ClientId::Api,
        context: &[AmcInstance, Entity],
    },
    Family {
        name: "amc_advertiser_audiences",
        paths: &["/amc/audiences/connections", "/amc/audiences/metadata", "/amc/audiences/records"],
        client_id: ClientId::Api,
        context: &[],
    },
    Family { name: "amc_invitations", paths: &["/user-invitations"], client_id: ClientId::Api, context: &[Account] },
    Family {
        name: "traffic_events",
        paths: &["/avc"],
        client_id: ClientId::Api,
        context: &[Marketplace, Entity, DspAdvertiser],
    },
    Family { name: "ads_data_manager", paths: &["/adm"], client_id: ClientId::Api, context: &[AdmManager, Account] },
];

/// All families, in the order in which they are tried; last the one of a path that no other matches.
pub fn families() -> impl Iterator<Item = &'static Family> {
    TABLE.iter().chain([&UNKNOWN])
}

/// The family of `path`, as it leaves for Amazon and without its query; the unknown family where no row matches. Empty segments
/// are overlooked, since Amazon's own samples hold `//sp/campaigns/list`.
pub fn family(path: &str) -> &'static Family {
    let path = path.trim_start_matches('/');
    let begins = path.bytes().next().map_or(0, usize::from);
    let mut rows = BEGIN_WITH.get(begins).copied().unwrap_or(ANY_BEGIN);
    while rows != 0 {
        let family = &TABLE[rows.trailing_zeros() as usize];
        if family.paths.iter().any(|pattern| covers(pattern, path)) {
            return family;
        }
        rows &= rows - 1;
    }
    &UNKNOWN
}

/// For each first letter of a path the rows that may match it, bit 0 for the first row. Every call passes by here, and most rows
/// would be read into the processor's cache for nothing.
static BEGIN_WITH: [u64; 128] = {
    let mut rows = [ANY_BEGIN; 128];
    let mut letter = 0;
    while letter < rows.len() {
        rows[letter] |= begin_with(letter as u8);
        letter += 1;
    }
    rows
};

/// The rows that match whatever the path begins with.
const ANY_BEGIN: u64 = begin_with(b'*');

const fn begin_with(letter: u8) -> u64 {
    let (mut rows, mut row) = (0, 0);
    while row < TABLE.len() {
        let mut path = 0;
        while path < TABLE[row].paths.len() {
            if TABLE[row].paths[path].as_bytes()[1] == letter {
                rows |= 1 << row;
            }
            path += 1;
        }
        row += 1;
    }
    rows
}

impl Family {
    /// Whether no row of the table knew the path.
    pub fn is_unknown(&self) -> bool {
        self.paths.is_empty()
    }
}

/// What a context header in any spelling in use says, or `None` for any other header. `name` is lower case.
pub fn context_of(name: &str) -> Option<Context> {
    Some(match name {
        "amazon-advertising-api-scope" => Context::Scope,
        "amazon-advertising-api-marketplaceid" => Context::Marketplace,
        "amazon-advertising-api-advertiserid" => Context::Advertiser,
        "amazon-advertising-api-entityid" | "amazon-advertising-api-entity-id" => Context::Entity,
        "amazon-ads-accountid" | "amazon-ads-account-id" | "amazon-advertising-api-account-id" => Context::Account,
        "amazon-advertising-advertiser-id" | "advertiserid" => Context::DspAdvertiser,
        "amazon-marketing-cloud-audience-instanceid" => Context::AmcInstance,
        "amazon-ads-manager-accountid" | "amazon-ads-manager-account-id" | "amazon-advertising-api-manager-account" => {
            Context::Manager
        }
        _ => return None,
    })
}

fn covers(pattern: &str, path: &str) -> bool {
    let mut segments = path.split('/').filter(|segment| !segment.is_empty());
    pattern[1..].split('/').all(|wanted| segments.next().is_some_and(|segment| wanted == "*" || wanted == segment))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(path: &str) -> Vec<String> {
        family(path).context.iter().map(|header| header.name().to_string()).collect()
    }

    #[test]
    fn a_path_of_no_row_is_unknown() {
        for path in ["/", "/small", "/spx", "/v2", "/amc", "/amc/audiences", "/sp2/x", "/profiles"] {
            assert!(family(path).is_unknown(), "{path}");
        }
        assert_eq!(
            headers("/small"),
            [
                "amazon-advertising-api-scope",
                "amazon-advertising-api-marketplaceid",
                "amazon-advertising-api-advertiserid"
            ]
        );
    }

    #[test]
    fn every_row_is_reached_by_its_own_paths() {
        for row in TABLE {
            for pattern in row.paths {
                let path = format!("{}/x", pattern.replace('*', "id"));
                assert_eq!(family(&path).name, row.name, "{path}");
                assert_eq!(family(&format!("/{path}")).name, row.name, "empty segments are overlooked");
            }
        }
    }

    #[test]
    fn every_header_of_the_table_is_known_by_its_meaning() {
        for row in TABLE {
            for header in row.context {
                assert_eq!(context_of(header.name().as_str()), Some(header.context()), "{}: {header:?}", row.name);
            }
        }
    }

    #[test]
    fn the_families_that_take_nothing_take_nothing() {
        for path in
            ["/v2/profiles", "/v2/profiles/1", "/amc/accounts", "/amc/audiences/records/1", "/dp/records/hashed"]
        {
            assert!(headers(path).is_empty(), "{path}");
        }
    }

    #[test]
    fn the_client_id_has_the_name_of_the_family() {
        assert_eq!(family("/adsApi/v1/query/campaigns").client_id, ClientId::Ads);
        assert_eq!(family("/mcp").client_id, ClientId::Ads);
        assert_eq!(family("/sp/campaigns/list").client_id, ClientId::Api);
    }

    #[test]
    fn dsp_streams_spell_the_account_with_a_hyphen() {
        assert_eq!(headers("/dsp/streams/subscriptions"), ["amazon-ads-account-id"]);
    }
}
