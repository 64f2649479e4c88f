//! The API families of the Amazon Ads API: which paths take which client-id and context headers, as one table.
//!
//! The table restates, per path, the "Parameters" of Amazon's OpenAPI specifications (advertising.amazon.com/API/docs).
//! It lists a header for a family if an operation of the family requires the header or accepts it as optional.

use http::HeaderName;

use crate::domain::account::Context;

/// The header that carries the client id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientId {
    /// `Amazon-Advertising-API-ClientId`: the older APIs, and the default.
    Api,
    /// `Amazon-Ads-ClientId`: the Ads API v1 and the MCP server.
    Ads,
}

impl ClientId {
    /// Returns the header's name.
    pub const fn name(self) -> HeaderName {
        match self {
            Self::Api => HeaderName::from_static("amazon-advertising-api-clientid"),
            Self::Ads => HeaderName::from_static("amazon-ads-clientid"),
        }
    }
}

/// A context header in one of the spellings that Amazon's APIs use.
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
    /// Returns the header's name.
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

    /// Returns which id of an account the header carries.
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

/// One row of the table: a group of paths that take the same headers.
#[derive(Debug)]
pub struct Family {
    /// The family's name in metrics and the log.
    pub name: &'static str,
    /// Path prefixes: `/a/*/b` matches that path and every path below it; `*` matches any one segment.
    pub paths: &'static [&'static str],
    /// The header that carries the client id.
    pub client_id: ClientId,
    /// The context headers; of two that exclude each other, the preferred one comes first.
    pub context: &'static [Header],
}

/// Pairs of ids that Amazon does not accept together. If the caller sent neither, the first is attached.
///
/// Reporting v3 for DSP: "Scope or AccountId, not both" (DSP reporting migration guide). Traffic events: the
/// Advertiser-Id or the EntityId, not both (Traffic events, getting started).
pub const EXCLUSIVE: [(Context, Context); 2] =
    [(Context::Scope, Context::Account), (Context::Entity, Context::DspAdvertiser)];

/// The family of every path that no row of the table matches.
static UNKNOWN: Family =
    Family { name: "unknown", paths: &[], client_id: ClientId::Api, context: &[Scope, Marketplace, Advertiser] };

/// Every known family. The first row that matches a path applies, so narrower rows come before wider ones.
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
    // The path carries the account.
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
    // Production instances also require the account id, although the specification does not list it.
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

/// All families in the order in which they are tried, the family of unmatched paths last.
pub fn families() -> impl Iterator<Item = &'static Family> {
    TABLE.iter().chain([&UNKNOWN])
}

/// Returns the family of `path`, which is the path sent upstream, without its query. If no row matches, returns the
/// unknown family. Empty segments are ignored, because Amazon's own samples contain `//sp/campaigns/list`.
pub fn family(path: &str) -> &'static Family {
    let path = path.trim_start_matches('/');
    let first = path.bytes().next().map_or(0, usize::from);
    let mut rows = ROWS_BY_FIRST_LETTER.get(first).copied().unwrap_or(WILDCARD_ROWS);
    while rows != 0 {
        let family = &TABLE[rows.trailing_zeros() as usize];
        if family.paths.iter().any(|pattern| covers(pattern, path)) {
            return family;
        }
        rows &= rows - 1;
    }
    &UNKNOWN
}

/// For each first letter of a path, the rows that can match it as a bit set; bit 0 is the first row. [`family`] runs
/// for every request, and without this index it would load most rows into the processor's cache for nothing.
static ROWS_BY_FIRST_LETTER: [u64; 128] = {
    let mut rows = [WILDCARD_ROWS; 128];
    let mut letter = 0;
    while letter < rows.len() {
        rows[letter] |= rows_with_first(letter as u8);
        letter += 1;
    }
    rows
};

/// The rows with a pattern that starts with `*`, which can match any first letter.
const WILDCARD_ROWS: u64 = rows_with_first(b'*');

/// The rows with a pattern whose first segment starts with `letter`, as a bit set.
const fn rows_with_first(letter: u8) -> u64 {
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
    /// Whether this is the family of paths that no row matches.
    pub fn is_unknown(&self) -> bool {
        self.paths.is_empty()
    }
}

/// Returns the context that the header `name` (in lower case) carries in any known spelling, or `None` if it is not a
/// context header.
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

/// Whether `pattern` matches `path` or a path above it.
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
    fn a_path_that_no_row_matches_is_unknown() {
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
    fn every_row_matches_its_own_paths() {
        for row in TABLE {
            for pattern in row.paths {
                let path = format!("{}/x", pattern.replace('*', "id"));
                assert_eq!(family(&path).name, row.name, "{path}");
                assert_eq!(family(&format!("/{path}")).name, row.name, "empty segments are ignored");
            }
        }
    }

    #[test]
    fn context_of_knows_every_header_of_the_table() {
        for row in TABLE {
            for header in row.context {
                assert_eq!(context_of(header.name().as_str()), Some(header.context()), "{}: {header:?}", row.name);
            }
        }
    }

    #[test]
    fn families_without_context_headers_get_none() {
        for path in
            ["/v2/profiles", "/v2/profiles/1", "/amc/accounts", "/amc/audiences/records/1", "/dp/records/hashed"]
        {
            assert!(headers(path).is_empty(), "{path}");
        }
    }

    #[test]
    fn the_family_decides_the_client_id_header() {
        assert_eq!(family("/adsApi/v1/query/campaigns").client_id, ClientId::Ads);
        assert_eq!(family("/mcp").client_id, ClientId::Ads);
        assert_eq!(family("/sp/campaigns/list").client_id, ClientId::Api);
    }

    #[test]
    fn dsp_streams_use_the_account_id_header_with_a_hyphen() {
        assert_eq!(headers("/dsp/streams/subscriptions"), ["amazon-ads-account-id"]);
    }
}
