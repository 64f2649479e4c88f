//! The headers that each API family requires, according to Amazon's OpenAPI documents.

use http::{HeaderMap, StatusCode};

use super::call::{ACCOUNT_ID, Refused};
use super::published::{self, Operation};

/// The client id header of the older families.
pub(super) const API_CLIENT_ID: &str = "amazon-advertising-api-clientid";
/// The client id header of the Ads API v1.
pub(super) const ADS_CLIENT_ID: &str = "amazon-ads-clientid";
/// The profile.
pub(super) const SCOPE: &str = "amazon-advertising-api-scope";
/// The AMC account, `ENTITY…`.
pub(super) const ADVERTISER_ID: &str = "amazon-advertising-api-advertiserid";
/// The marketplace of the AMC account.
pub(super) const MARKETPLACE_ID: &str = "amazon-advertising-api-marketplaceid";
const STREAM_ACCOUNT_ID: &str = "amazon-ads-account-id";
const MANAGER_ACCOUNT_ID: &str = "amazon-ads-manager-account-id";
const MANAGER_ACCOUNT: &str = "amazon-advertising-api-manager-account";
const ENTITY_ID: &str = "amazon-advertising-api-entityid";
const ENTITY_ID_HYPHEN: &str = "amazon-advertising-api-entity-id";
const DSP_ADVERTISER_ID: &str = "amazon-advertising-advertiser-id";
const AUDIENCE_INSTANCE_ID: &str = "amazon-marketing-cloud-audience-instanceid";

/// The requirements of one API family.
#[derive(Debug)]
pub(super) struct Requirements {
    /// Its name in the sandbox's messages.
    pub(super) name: &'static str,
    /// Path prefixes that end at a segment boundary; `*` matches any one segment.
    paths: &'static [&'static str],
    /// The allowed names of the client id header; a request contains exactly one.
    pub(super) client_id: &'static [&'static str],
    /// All of these are required, unless Amazon has published the operation: then its own list applies.
    required: &'static [&'static str],
    /// These are required in production, whatever was published.
    undocumented: &'static [&'static str],
    /// Exactly one of these is required.
    one_of: &'static [&'static str],
    /// At most one of these is allowed.
    exclusive: &'static [&'static str],
    /// None of these is allowed.
    forbidden: &'static [&'static str],
}

/// A family that requires the client id only.
const PLAIN: Requirements = Requirements {
    name: "",
    paths: &[],
    client_id: &[API_CLIENT_ID],
    required: &[],
    undocumented: &[],
    one_of: &[],
    exclusive: &[],
    forbidden: &[],
};

/// The families. The first match applies, so a specific family precedes its general one.
const REQUIREMENTS: &[Requirements] = &[
    Requirements { name: "profiles", paths: &["/v2/profiles"], ..PLAIN },
    Requirements {
        name: "accounts",
        paths: &["/managerAccounts", "/adsAccounts", "/testAccounts", "/amc/accounts"],
        ..PLAIN
    },
    Requirements {
        name: "AMC rule-based audiences",
        paths: &["/amc/audiences/query", "/amc/audiences/lookalike"],
        required: &[AUDIENCE_INSTANCE_ID],
        one_of: &[ENTITY_ID, ENTITY_ID_HYPHEN],
        forbidden: &[ADVERTISER_ID],
        ..PLAIN
    },
    Requirements { name: "AMC advertiser audiences", paths: &["/amc/audiences"], ..PLAIN },
    Requirements {
        name: "AMC advertiser data",
        paths: &["/amc/advertiserData"],
        // The documents list the first two only; production instances required the third.
        required: &[ADVERTISER_ID, MARKETPLACE_ID],
        undocumented: &[ACCOUNT_ID],
        ..PLAIN
    },
    Requirements {
        name: "AMC",
        paths: &["/amc/instances", "/amc/reporting"],
        required: &[ADVERTISER_ID, MARKETPLACE_ID],
        ..PLAIN
    },
    Requirements {
        name: "reporting",
        paths: &["/reporting/reports"],
        // Its get-started page names one, its OpenAPI document the other.
        client_id: &[API_CLIENT_ID, ADS_CLIENT_ID],
        exclusive: &[SCOPE, ACCOUNT_ID],
        ..PLAIN
    },
    Requirements { name: "Ads API v1", paths: &["/adsApi/v1"], client_id: &[ADS_CLIENT_ID], ..PLAIN },
    Requirements { name: "DSP streams", paths: &["/dsp/streams"], required: &[STREAM_ACCOUNT_ID], ..PLAIN },
    Requirements { name: "streams", paths: &["/streams"], one_of: &[SCOPE, ACCOUNT_ID], ..PLAIN },
    Requirements { name: "DSP measurement and conversions", paths: &["/dsp/measurement", "/measurement"], ..PLAIN },
    Requirements { name: "DSP reports", paths: &["/accounts/*/dsp"], ..PLAIN },
    Requirements { name: "DSP", paths: &["/dsp"], required: &[SCOPE], ..PLAIN },
    Requirements {
        name: "traffic events",
        paths: &["/avc"],
        required: &[MARKETPLACE_ID],
        one_of: &[DSP_ADVERTISER_ID, ENTITY_ID, ENTITY_ID_HYPHEN],
        ..PLAIN
    },
    Requirements { name: "ads data manager", paths: &["/adm"], required: &[MANAGER_ACCOUNT_ID], ..PLAIN },
    Requirements {
        name: "MMM, benchmarks and partner opportunities",
        paths: &["/mmm", "/insights/brandBenchmarks", "/partnerOpportunities"],
        required: &[MANAGER_ACCOUNT],
        ..PLAIN
    },
    Requirements { name: "data provider", paths: &["/v2/dp", "/dp/records"], ..PLAIN },
    Requirements {
        name: "sponsored ads and other profile-scoped APIs",
        paths: &[
            "/sp",
            "/sb",
            "/sd",
            "/v2/sp",
            "/v2/hsa",
            "/v2/reports",
            "/v2/portfolios",
            "/portfolios",
            "/attribution",
            "/insights/brandMetrics",
            "/assets",
            "/stores",
            "/exports",
            "/campaigns/export",
            "/adGroups/export",
            "/targets/export",
            "/ads/export",
        ],
        required: &[SCOPE],
        ..PLAIN
    },
    // The sandbox's test endpoints.
    Requirements { name: "sandbox", paths: &["/sandbox"], client_id: &[API_CLIENT_ID, ADS_CLIENT_ID], ..PLAIN },
];

/// The paths of the MCP server, which has hosts of its own.
pub(super) static MCP: Requirements =
    Requirements { name: "MCP", paths: &["/mcp"], client_id: &[ADS_CLIENT_ID], ..PLAIN };

/// The family of published operations that no other row covers.
static PUBLISHED: Requirements = Requirements { name: "published operations", ..PLAIN };

/// The family of a path that was split at its slashes; `None` for a path that Amazon does not know.
pub(super) fn of(path: &[&str]) -> Option<&'static Requirements> {
    let begins = |pattern: &str| {
        let wanted: Vec<&str> = pattern.split('/').skip(1).collect();
        wanted.len() <= path.len() && wanted.iter().zip(path).all(|(want, have)| *want == "*" || want == have)
    };
    let row = REQUIREMENTS.iter().find(|demand| demand.paths.iter().any(|pattern| begins(pattern)));
    row.or_else(|| published::has_path(path).then_some(&PUBLISHED))
}

impl Requirements {
    /// Checks that the client id and context headers are present in the right number. Other code checks their values.
    /// `operation` is the request's, if Amazon has published it.
    pub(super) fn check(&self, headers: &HeaderMap, operation: Option<&Operation>) -> Result<(), Refused> {
        let has = |name: &&&str| headers.contains_key(**name);
        if let Some(twice) =
            headers.keys().find(|name| managed(name.as_str()) && headers.get_all(*name).iter().count() > 1)
        {
            return Err(bad(format!("Header {twice} was sent more than once")));
        }
        let client_ids: Vec<&str> = [API_CLIENT_ID, ADS_CLIENT_ID].iter().filter(has).copied().collect();
        match client_ids[..] {
            [] => return Err(bad(format!("Required header {} is missing", self.client_id[0]))),
            [one] if self.client_id.contains(&one) => {}
            [one] => {
                return Err(bad(format!("Header {one} is not the one of {}: {}", self.name, self.client_id[0])));
            }
            _ => return Err(bad("The client id was sent under two names".to_owned())),
        }
        let family = self.required.iter().copied();
        let required: Vec<&str> = operation
            .map_or_else(|| family.collect(), |operation| operation.required.iter().map(String::as_str).collect());
        if let Some(missing) = required.iter().chain(self.undocumented).find(|name| !has(name)) {
            return Err(missing_header(missing));
        }
        let chosen: Vec<&str> = self.one_of.iter().filter(has).copied().collect();
        if chosen.is_empty()
            && let Some(first) = self.one_of.first()
        {
            return Err(missing_header(first));
        }
        let excluded: Vec<&str> = self.exclusive.iter().filter(has).copied().collect();
        for both in [chosen, excluded] {
            if both.len() > 1 {
                return Err(bad(format!("Headers {} exclude each other", both.join(" and "))));
            }
        }
        match self.forbidden.iter().find(has) {
            Some(name) => Err(bad(format!("Header {name} must not be sent to {}", self.name))),
            None => Ok(()),
        }
    }
}

fn missing_header(name: &str) -> Refused {
    if name == SCOPE {
        return Refused::coded(StatusCode::UNAUTHORIZED, "Scope header is missing");
    }
    let details = format!("Required header {name} is missing");
    // The headers about the account decide who is authorized; any other is part of a well-formed request.
    if managed(name) { Refused::Coded(StatusCode::FORBIDDEN, details) } else { bad(details) }
}

fn bad(details: String) -> Refused {
    Refused::Coded(StatusCode::BAD_REQUEST, details)
}

/// Whether a header (in lower case, with hyphens) identifies the client or the account that a request acts for.
fn managed(name: &str) -> bool {
    name.starts_with("amazon-") || name == "authorization" || name == "advertiserid" || name == "host"
}

/// A header that must not reach Amazon: it belongs to an earlier connection, to a browser, or to the sidecar itself.
/// Amazon would ignore most of them; the sandbox rejects them so that a leak is noticed.
pub(super) fn leak(headers: &HeaderMap) -> Option<String> {
    const NAMES: [&str; 15] = [
        "cookie",
        "expect",
        "forwarded",
        "keep-alive",
        "origin",
        "referer",
        "te",
        "trailer",
        "upgrade",
        "via",
        "x-real-ip",
        "client-ip",
        "true-client-ip",
        "x-client-ip",
        "x-original-url",
    ];
    const BEGINNINGS: [&str; 5] = ["proxy-", "sec-", "x-forwarded-", "x-ads-", "x-adsidecar-"];
    let foreign = headers.iter().find(|(name, value)| {
        let hyphened = name.as_str().replace('_', "-");
        let twin = hyphened != name.as_str() && managed(&hyphened);
        // Any client may say to its next hop whether it keeps the connection; any other value was meant for another
        // hop.
        let plain = |word: &[u8]| value.as_bytes().eq_ignore_ascii_case(word);
        let hop = hyphened == "connection" && !plain(b"close") && !plain(b"keep-alive");
        let framing = hyphened == "transfer-encoding" && !value.as_bytes().eq_ignore_ascii_case(b"chunked");
        let named = NAMES.contains(&hyphened.as_str()) || BEGINNINGS.iter().any(|begin| hyphened.starts_with(begin));
        twin || hop || framing || named
    });
    foreign.map(|(name, _)| name.to_string())
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    /// The status with which the sandbox rejects a request for `operation` with these headers; `None` if it passes.
    fn rejection(operation: &Operation, names: &[&str]) -> Option<(StatusCode, String)> {
        let family = of(&operation.path).expect("every published path belongs to a family");
        let mut headers = HeaderMap::new();
        for name in names.iter().chain(&family.client_id[..1]).chain(family.one_of.first()).chain(family.undocumented) {
            headers.insert(name.parse::<HeaderName>().unwrap(), HeaderValue::from_static("1"));
        }
        match family.check(&headers, published::find(operation.method, &operation.path)) {
            Ok(()) => None,
            Err(Refused::Coded(status, details)) => Some((status, details)),
            Err(_) => panic!("another check refused"),
        }
    }

    #[test]
    fn each_published_operation_requires_exactly_its_own_headers() {
        let operations = published::operations();
        assert_eq!(operations.len(), 907);
        let mut removed = 0;
        for operation in operations {
            let all: Vec<&str> = operation.required.iter().map(String::as_str).collect();
            assert_eq!(rejection(operation, &all), None, "{operation:?}");
            for missing in &all {
                let rest: Vec<&str> = all.iter().copied().filter(|name| name != missing).collect();
                let (status, details) = rejection(operation, &rest).expect("a required header is missing");
                let expected = match *missing {
                    SCOPE => StatusCode::UNAUTHORIZED,
                    "content-disposition" => StatusCode::BAD_REQUEST,
                    _ => StatusCode::FORBIDDEN,
                };
                assert_eq!(status, expected, "{operation:?} without {missing}: {details}");
                assert!(details.contains("missing"), "{details}");
                removed += 1;
            }
        }
        assert_eq!(removed, 648);
    }
}
