//! The API families of the Amazon Ads API: which paths take which client-id and context headers, as one table.
//!
//! The table restates, per path, the "Parameters" of Amazon's OpenAPI specifications (advertising.amazon.com/API/docs).
//! It lists a header for a family if the operations of the family require the header or accept it as optional. A test
//! in [`headers`](crate::domain::headers) compares it with every operation that Amazon has published.
//!
//! The file is long because it is a table: one row per family.

use http::HeaderName;

use crate::domain::account::{Context, Service};

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
    /// `amazon-ads-manageraccountid`
    UserManager,
    /// `amazon-advertising-accountid`
    AdvertisingAccount,
    /// `advertiserid`
    AudienceAdvertiser,
    /// `amazon-ads-accountid` with the AMC account (`ENTITY…`) as its value
    AmcAccount,
}

use Header::{
    Account, AdmManager, Advertiser, AdvertisingAccount, AmcAccount, AmcInstance, AudienceAdvertiser, DspAdvertiser,
    Entity, Manager, Marketplace, PartnerManager, Scope, StreamAccount, UserManager,
};

impl Header {
    /// Returns the header's name.
    pub const fn name(self) -> HeaderName {
        match self {
            Scope => HeaderName::from_static("amazon-advertising-api-scope"),
            Marketplace => HeaderName::from_static("amazon-advertising-api-marketplaceid"),
            Advertiser => HeaderName::from_static("amazon-advertising-api-advertiserid"),
            Entity => HeaderName::from_static("amazon-advertising-api-entityid"),
            Account | AmcAccount => HeaderName::from_static("amazon-ads-accountid"),
            StreamAccount => HeaderName::from_static("amazon-ads-account-id"),
            DspAdvertiser => HeaderName::from_static("amazon-advertising-advertiser-id"),
            AmcInstance => HeaderName::from_static("amazon-marketing-cloud-audience-instanceid"),
            Manager => HeaderName::from_static("amazon-ads-manager-accountid"),
            AdmManager => HeaderName::from_static("amazon-ads-manager-account-id"),
            PartnerManager => HeaderName::from_static("amazon-advertising-api-manager-account"),
            UserManager => HeaderName::from_static("amazon-ads-manageraccountid"),
            AdvertisingAccount => HeaderName::from_static("amazon-advertising-accountid"),
            AudienceAdvertiser => HeaderName::from_static("advertiserid"),
        }
    }

    /// Returns which id of an account the header carries.
    pub const fn context(self) -> Context {
        match self {
            Scope => Context::Scope,
            Marketplace => Context::Marketplace,
            Advertiser | AmcAccount => Context::Advertiser,
            Entity => Context::Entity,
            Account | StreamAccount | AdvertisingAccount => Context::Account,
            DspAdvertiser | AudienceAdvertiser => Context::DspAdvertiser,
            AmcInstance => Context::AmcInstance,
            Manager | AdmManager | PartnerManager | UserManager => Context::Manager,
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
    /// The service whose hosts serve the paths.
    pub service: Service,
    /// The header that carries the client id.
    pub client_id: ClientId,
    /// The context headers, each attached if the account defines its id.
    pub context: &'static [Header],
    /// Headers that the family accepts but that change what a call means. Only the caller can send them.
    pub on_request: &'static [Header],
    /// Two ids that Amazon does not accept together. If the caller sent neither, only the first is attached.
    pub exclusive: Option<(Context, Context)>,
}

/// The columns that most rows share.
const ROW: Family = Family {
    name: "",
    paths: &[],
    service: Service::Ads,
    client_id: ClientId::Api,
    context: &[],
    on_request: &[],
    exclusive: None,
};

/// The same for the Ads API v1 and the MCP server.
const ADS_ROW: Family = Family { client_id: ClientId::Ads, ..ROW };

/// The family of every path that no row of the table matches. Most operations outside the table's special cases take
/// the profile; no other id can be guessed.
static UNKNOWN: Family = Family { name: "unknown", context: &[Scope], ..ROW };

/// Every known family. The first row that matches a path applies, so narrower rows come before wider ones.
static TABLE: &[Family] = &[
    Family { name: "profiles", paths: &["/v2/profiles"], ..ROW },
    Family {
        name: "accounts",
        paths: &[
            "/managerAccounts",
            "/adsAccounts",
            "/testAccounts",
            "/advertisingAccounts",
            "/advertisingAccountsByAttributes",
            "/termsTokens",
            "/adRepository",
            "/amc/accounts",
        ],
        ..ROW
    },
    // Sponsored Products, Brands, Display and TV.
    Family {
        name: "sp_global_keyword_recommendations",
        paths: &["/sp/global/targets/keywords"],
        context: &[Scope, Account, Advertiser, Marketplace],
        ..ROW
    },
    Family { name: "sp_global", paths: &["/sp/global"], context: &[Account], ..ROW },
    Family {
        name: "sp_keyword_recommendations",
        paths: &["/sp/targets/keywords/recommendations"],
        context: &[Scope, Advertiser, Marketplace],
        ..ROW
    },
    Family {
        name: "sp_product_recommendations",
        paths: &["/sp/targets/products/recommendations"],
        context: &[Scope, Advertiser],
        ..ROW
    },
    Family {
        name: "sponsored_ads_with_account",
        paths: &[
            "/sp/targeting/recommendations",
            "/sp/campaigns/copy",
            "/sb/campaigns/budgetRecommendations",
            "/sb/campaigns/budgetRules/recommendations",
            "/sd/campaigns/budgetRecommendations",
            "/campaigns/copy",
        ],
        context: &[Scope, Account],
        ..ROW
    },
    Family { name: "sponsored_products", paths: &["/sp"], context: &[Scope], ..ROW },
    Family {
        name: "sponsored_brands_and_display",
        paths: &["/sb", "/sd", "/stores", "/media", "/brands", "/pageAsins"],
        context: &[Scope],
        ..ROW
    },
    Family { name: "sponsored_tv", paths: &["/st"], context: &[Scope], ..ROW },
    Family { name: "retail_ad_service", paths: &["/ras/v1"], context: &[Scope], ..ROW },
    // Reporting v3 for DSP takes "Scope or AccountId, not both" (DSP reporting migration guide).
    Family {
        name: "reporting",
        paths: &["/reporting"],
        context: &[Scope, Account],
        exclusive: Some((Context::Scope, Context::Account)),
        ..ROW
    },
    Family { name: "exports", paths: &["/*/export", "/exports"], context: &[Scope], ..ROW },
    // The Ads API v1 scopes each kind of resource differently.
    Family {
        name: "ads_api_v1_accounts",
        paths: &[
            "/adsApi/v1/*/accountCombinationInvitations",
            "/adsApi/v1/*/advertiserAccounts",
            "/adsApi/v1/*/brandAdvertiserAssociations",
            "/adsApi/v1/*/brands",
            "/adsApi/v1/*/commitments",
            "/adsApi/v1/*/commitmentSpends",
            "/adsApi/v1/*/linearTvDayparts",
            "/adsApi/v1/*/managerAccounts",
            "/adsApi/v1/*/publishers",
            "/adsApi/v1/*/reports",
            "/adsApi/v1/*/sellingAccounts",
            "/adsApi/v1/commitments",
        ],
        ..ADS_ROW
    },
    Family {
        name: "ads_api_v1_dsp",
        paths: &[
            "/adsApi/v1/*/adAssociations",
            "/adsApi/v1/*/advertiserProductGroupEligibilities",
            "/adsApi/v1/*/campaignForecasts",
            "/adsApi/v1/*/dealAvailses",
            "/adsApi/v1/*/dealPlanningMetricses",
            "/adsApi/v1/*/dealPreferences",
            "/adsApi/v1/*/events",
            "/adsApi/v1/*/inventoryGroups",
            "/adsApi/v1/*/linearTvIncrementalReachForecasts",
            "/adsApi/v1/*/linearTvReachForecasts",
            "/adsApi/v1/*/supplierTargetItems",
            "/adsApi/v1/dealPlanningMetricses",
            "/adsApi/v1/dealPreferences",
        ],
        context: &[Account],
        ..ADS_ROW
    },
    Family {
        name: "ads_api_v1_suppliers",
        paths: &[
            "/adsApi/v1/*/geoLocations",
            "/adsApi/v1/*/locationIndexes",
            "/adsApi/v1/*/supplierAdProductPrices",
            "/adsApi/v1/*/supplierAdProducts",
            "/adsApi/v1/*/supplierProposalDestinations",
            "/adsApi/v1/*/supplierProposals",
            "/adsApi/v1/*/supplierProposedDealForecasts",
            "/adsApi/v1/*/supplierProposedDealHistoricalVersions",
            "/adsApi/v1/*/supplierProposedDealRevisions",
            "/adsApi/v1/*/supplierProposedDeals",
            "/adsApi/v1/*/supplierPublishers",
            "/adsApi/v1/*/suppliers",
            "/adsApi/v1/locationIndexes",
        ],
        context: &[Account, Manager],
        ..ADS_ROW
    },
    Family {
        name: "ads_api_v1_brand_stores",
        paths: &[
            "/adsApi/v1/*/brandStoreEditions",
            "/adsApi/v1/*/brandStoreEditionPublishVersions",
            "/adsApi/v1/*/brandStorePages",
            "/adsApi/v1/brandStoreEditions",
        ],
        context: &[Scope],
        ..ADS_ROW
    },
    Family { name: "ads_api_v1", paths: &["/adsApi/v1"], context: &[Scope, Account], ..ADS_ROW },
    Family { name: "mcp", paths: &["/mcp"], service: Service::Mcp, ..ADS_ROW },
    // The DSP.
    Family { name: "dsp_streams", paths: &["/dsp/streams"], context: &[StreamAccount], ..ROW },
    Family {
        name: "dsp_account",
        paths: &["/dsp/v1/guidance", "/dsp/rules/bidmodifier", "/dsp/v1/campaigns/*/conversionTracking"],
        context: &[Scope, Account],
        ..ROW
    },
    Family {
        name: "dsp_measurement",
        paths: &["/dsp/measurement", "/measurement", "/dsp/adGroups/*/targetingTypes"],
        context: &[Scope, Account],
        ..ROW
    },
    Family {
        name: "dsp_quick_actions",
        paths: &["/dsp/v1/quickactions"],
        context: &[Advertiser, Marketplace, Account],
        ..ROW
    },
    Family {
        name: "dsp_insights",
        paths: &[
            "/dsp/v1/campaign/insights",
            "/dsp/v1/frequencyDistributionInsights",
            "/dsp/v1/frequencySavingsInsights",
            "/targetableEntities",
            "/textinput/targetableEntities",
        ],
        context: &[Scope, AdvertisingAccount],
        ..ROW
    },
    Family {
        name: "dsp_audience_changes",
        paths: &["/dsp/audiences/edit", "/dsp/audiences/delete"],
        context: &[Scope, AudienceAdvertiser],
        ..ROW
    },
    Family { name: "dsp", paths: &["/dsp"], context: &[Scope], ..ROW },
    // The path carries the account.
    Family { name: "dsp_reports", paths: &["/accounts/*/dsp/reports"], ..ROW },
    Family {
        name: "dsp_ad_tags",
        paths: &["/accounts/*/dsp/amazonAdTag", "/accounts/*/dsp/adTagEvents"],
        context: &[Scope, Account, AdmManager],
        ..ROW
    },
    Family { name: "dsp_conversions", paths: &["/accounts/*/dsp"], context: &[Scope, Account], ..ROW },
    // With an account the call concerns that advertiser, without one the manager: only the caller can choose.
    Family {
        name: "frequency_groups",
        paths: &["/frequencyGroups/v1"],
        context: &[Scope],
        on_request: &[Account, Manager],
        ..ROW
    },
    Family { name: "media_plan", paths: &["/mediaPlan/v1"], context: &[Scope, Account, Manager], ..ROW },
    // "Either the profile or the account" (Amazon Marketing Stream, managing subscriptions).
    Family {
        name: "streams",
        paths: &["/streams"],
        context: &[Scope, Account],
        exclusive: Some((Context::Scope, Context::Account)),
        ..ROW
    },
    Family { name: "data_provider", paths: &["/v2/dp", "/dp"], ..ROW },
    Family {
        name: "localization",
        paths: &["/currencies/localize", "/keywords/localize", "/products/localize", "/targetingExpression/localize"],
        context: &[Scope, Account],
        ..ROW
    },
    Family {
        name: "planning",
        paths: &["/mediaPlan", "/eligibility/programs", "/product/metadata", "/preModeration"],
        context: &[Scope, Account],
        ..ROW
    },
    Family {
        name: "partner",
        paths: &["/mmm", "/insights/brandBenchmarks", "/partnerOpportunities"],
        context: &[PartnerManager],
        ..ROW
    },
    Family {
        name: "profile_scoped",
        paths: &[
            "/attribution",
            "/portfolios",
            "/insights",
            "/assets",
            "/v2/portfolios",
            "/v2/reports",
            "/v2/sp",
            "/v2/hsa",
            "/v2/stores",
            "/bp/v2",
            "/benchmarks",
            "/locations",
            "/moderation",
            "/audiences",
            "/accountBudgets",
            "/recommendations",
            "/validationConfigurations",
            "/diagnostics",
            "/history",
            "/eligibility/product",
        ],
        context: &[Scope],
        ..ROW
    },
    // Billing and users.
    Family { name: "invoices", paths: &["/invoices", "/billing/statuses"], ..ROW },
    Family { name: "invoice_payments", paths: &["/billing/invoices"], context: &[Scope], ..ROW },
    Family {
        name: "billing_agreements",
        paths: &["/billing/paymentAgreements", "/billing/paymentMethods", "/billingStatements"],
        context: &[Account, PartnerManager, Scope],
        ..ROW
    },
    Family {
        name: "billing",
        paths: &[
            "/billing",
            "/billingProfiles",
            "/billingProfileUsages",
            "/billingProfileAgreementContents",
            "/invoiceSummaries",
        ],
        context: &[Account, PartnerManager],
        ..ROW
    },
    Family {
        name: "users",
        paths: &["/userPermissions", "/userRoles", "/users", "/user-invitations/list"],
        context: &[Account, UserManager, Scope],
        ..ROW
    },
    Family { name: "invitation", paths: &["/user-invitations/*"], ..ROW },
    Family { name: "invitations", paths: &["/user-invitations"], context: &[Account, UserManager, Scope], ..ROW },
    Family { name: "brand_stores", paths: &["/brand/stores/v1"], context: &[AdvertisingAccount], ..ROW },
    // Amazon Marketing Cloud.
    Family {
        name: "amc_advertiser_updates",
        paths: &["/amc/instances/*/advertisers/updates"],
        context: &[Advertiser, Marketplace],
        ..ROW
    },
    Family { name: "amc_admin", paths: &["/amc/instances"], context: &[Advertiser, Marketplace, Scope], ..ROW },
    Family {
        name: "amc_schedules",
        paths: &["/amc/reporting/*/schedules"],
        context: &[Advertiser, Marketplace, Scope, Account],
        ..ROW
    },
    Family { name: "amc_reporting", paths: &["/amc/reporting"], context: &[Advertiser, Marketplace, Scope], ..ROW },
    // Production instances require the account id, although the specification declares it as optional.
    Family {
        name: "amc_advertiser_data",
        paths: &["/amc/advertiserData"],
        context: &[Advertiser, Marketplace, Account, Scope],
        ..ROW
    },
    // The instance is a query parameter.
    Family { name: "amc_custom_models", paths: &["/amc/models/v1"], context: &[AmcAccount], ..ROW },
    Family {
        name: "amc_rule_audiences",
        paths: &["/amc/audiences/query", "/amc/audiences/lookalike"],
        context: &[AmcInstance, Entity],
        ..ROW
    },
    Family {
        name: "amc_advertiser_audiences",
        paths: &["/amc/audiences/connections", "/amc/audiences/metadata", "/amc/audiences/records"],
        ..ROW
    },
    // "Must not send the other" (Traffic events, getting started).
    Family {
        name: "traffic_events",
        paths: &["/avc"],
        context: &[Marketplace, Entity, DspAdvertiser],
        exclusive: Some((Context::Entity, Context::DspAdvertiser)),
        ..ROW
    },
    Family {
        name: "ads_data_manager",
        paths: &[
            "/adm/audiences/*/members",
            "/adm/datarooms",
            "/adm/datasets/list",
            "/adm/datasets/*/metrics",
            "/adm/sharingRules",
        ],
        context: &[AdmManager, Account],
        ..ROW
    },
    Family { name: "ads_data_manager_admin", paths: &["/adm"], context: &[AdmManager], ..ROW },
];

/// [`ROWS_BY_FIRST_LETTER`] has one bit for each row.
const _: () = assert!(TABLE.len() <= u64::BITS as usize, "widen the bit sets of the index");

/// The number of families, that of unmatched paths included.
pub const COUNT: usize = TABLE.len() + 1;

/// All families in the order in which they are tried, the family of unmatched paths last.
pub fn families() -> impl Iterator<Item = &'static Family> {
    TABLE.iter().chain([&UNKNOWN])
}

/// Returns the family of every path on the hosts of Amazon's MCP server.
pub fn mcp_family() -> &'static Family {
    family("/mcp")
}

/// Returns the family of `path`, which is the path sent upstream, without its query. If no row matches, returns the
/// unknown family. Empty segments are ignored, because Amazon's own samples contain `//sp/campaigns/list`.
pub fn family(path: &str) -> &'static Family {
    let path = path.trim_start_matches('/');
    let mut rows = ROWS.iter().zip(path.bytes()).fold(u64::MAX, |rows, (by_letter, letter)| {
        rows & by_letter.get(usize::from(letter)).copied().unwrap_or(WILDCARD_ROWS)
    });
    while rows != 0 {
        let Some(family) = TABLE.get(rows.trailing_zeros() as usize) else { break };
        if family.paths.iter().any(|pattern| covers(pattern, path)) {
            return family;
        }
        rows &= rows - 1;
    }
    &UNKNOWN
}

/// For the first and the second letter of a path, the rows that can match it, as a bit set for each letter; bit 0 is
/// the first row. [`family`] runs for every request, and without this index it would load most rows into the
/// processor's cache for nothing.
static ROWS: [[u64; 128]; 2] = [rows_by_letter(1), rows_by_letter(2)];

/// The rows with a pattern that starts with `*`, which can match any path.
const WILDCARD_ROWS: u64 = rows_with(1, b'*');

/// For each letter, the rows with a pattern that has it at the place `at`, or can have.
const fn rows_by_letter(at: usize) -> [u64; 128] {
    let mut rows = [WILDCARD_ROWS; 128];
    let mut letter = 0;
    while letter < rows.len() {
        rows[letter] |= rows_with(at, letter as u8);
        letter += 1;
    }
    rows
}

/// The rows with a pattern that has `letter` at the place `at`, as a bit set.
const fn rows_with(at: usize, letter: u8) -> u64 {
    let (mut rows, mut row) = (0, 0);
    while row < TABLE.len() {
        let mut path = 0;
        while path < TABLE[row].paths.len() {
            if TABLE[row].paths[path].as_bytes()[at] == letter {
                rows |= 1 << row;
            }
            path += 1;
        }
        row += 1;
    }
    rows
}

impl Family {
    /// The family's place in [`families`], below [`COUNT`].
    pub fn index(&self) -> usize {
        // Every family is a row of the table, or the one for unmatched paths.
        let bytes = std::ptr::from_ref(self).addr().wrapping_sub(TABLE.as_ptr().addr());
        (bytes / size_of::<Self>()).min(TABLE.len())
    }

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
        "amazon-ads-accountid"
        | "amazon-ads-account-id"
        | "amazon-advertising-api-account-id"
        | "amazon-advertising-accountid"
        | "amazon-advertising-globalaccountid" => Context::Account,
        "amazon-advertising-advertiser-id" | "advertiserid" => Context::DspAdvertiser,
        "amazon-marketing-cloud-audience-instanceid" => Context::AmcInstance,
        "amazon-ads-manager-accountid"
        | "amazon-ads-manager-account-id"
        | "amazon-ads-manageraccountid"
        | "amazon-advertising-api-manager-account" => Context::Manager,
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
        assert_eq!(headers("/small"), ["amazon-advertising-api-scope"]);
    }

    #[test]
    fn the_index_of_a_family_is_its_place() {
        let indexes: Vec<_> = families().map(Family::index).collect();
        assert_eq!(indexes, (0..COUNT).collect::<Vec<_>>());
    }

    #[test]
    fn every_row_matches_its_own_paths() {
        for row in TABLE {
            for pattern in row.paths {
                let path = pattern.replace('*', "id");
                assert_eq!(family(&path).name, row.name, "{path}");
                assert_eq!(family(&format!("/{path}")).name, row.name, "empty segments are ignored");
            }
        }
    }

    #[test]
    fn context_of_knows_every_header_of_the_table() {
        for row in TABLE {
            for header in row.context.iter().chain(row.on_request).filter(|header| **header != AmcAccount) {
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
