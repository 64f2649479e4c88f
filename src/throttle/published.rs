//! The few limits that Amazon has published, as rates and as counts. They are where the throttle starts once Amazon has
//! refused a call; before that no call is delayed for them.
//!
//! An endpoint with a published rate has a bucket of its own, under its own name instead of the family's.

use super::gate::Counted;
use super::{BucketName, Call, Kind};
use crate::domain::api_families::{self, Family};

/// An endpoint with a published rate.
#[derive(Debug)]
struct Endpoint {
    /// Its name in place of the family's.
    name: &'static str,
    family: &'static str,
    /// The path, and all paths below it.
    path: &'static str,
    /// The last segment of the path; any if empty.
    last: &'static str,
    /// Calls per second for one client.
    per_second: f64,
}

/// The published rates (the pages of each API, as of 2026-11). The first that matches applies.
const ENDPOINTS: [Endpoint; 5] = [
    Endpoint { name: "data_provider", family: "data_provider", path: "", last: "", per_second: 100.0 },
    Endpoint {
        name: "reach_forecasts",
        family: "media_plan",
        path: "/mediaPlan/v1/reachForecasts",
        last: "",
        per_second: 1.0,
    },
    Endpoint {
        name: "sd_creatives",
        family: "sponsored_brands_and_display",
        path: "/sd/creatives",
        last: "",
        per_second: 1.0,
    },
    Endpoint {
        name: "dsp_bid_modifier_lists",
        family: "dsp_account",
        path: "/dsp/rules/bidmodifier",
        last: "list",
        per_second: 5.0,
    },
    Endpoint {
        name: "dsp_bid_modifiers",
        family: "dsp_account",
        path: "/dsp/rules/bidmodifier",
        last: "",
        per_second: 10.0,
    },
];

/// The number of groups of buckets: the families, and the endpoints with a bucket of their own.
pub(super) const GROUPS: usize = api_families::COUNT + ENDPOINTS.len();

/// The groups of buckets, each with its place.
pub(super) fn groups() -> impl Iterator<Item = (usize, &'static str)> {
    let families = api_families::families().map(|family| family.name);
    families.chain(ENDPOINTS.iter().map(|endpoint| endpoint.name)).enumerate()
}

/// Exports that Amazon runs at once, for each endpoint (Exports, overview).
const EXPORTS: usize = 5;
/// AMC workflow runs that Amazon runs at once, for each instance and for each account (AMC reporting, limits).
const RUNS_OF_INSTANCE: usize = 10;
const RUNS_OF_ACCOUNT: usize = 200;
/// Calls with traffic events that Amazon takes at once; the excess is a 402 (Traffic events, getting started).
const TRAFFIC_EVENTS: usize = 5;

/// The families with a published count.
pub(super) const COUNTED: [&str; 3] = ["exports", "amc_reporting", "traffic_events"];

/// Whether Amazon publishes a rate or a count for some calls of `family`.
pub(super) fn concerns(family: &Family) -> bool {
    COUNTED.contains(&family.name) || ENDPOINTS.iter().any(|endpoint| endpoint.family == family.name)
}

/// The bucket of a call.
pub(super) fn bucket(call: &Call<'_>) -> BucketName {
    let matches = |endpoint: &&Endpoint| {
        let below = call.path.strip_prefix(endpoint.path);
        endpoint.family == call.family.name
            && below.is_some_and(|below| endpoint.path.is_empty() || below.is_empty() || below.starts_with('/'))
            && (endpoint.last.is_empty() || call.path.trim_end_matches('/').ends_with(endpoint.last))
    };
    match ENDPOINTS.iter().find(matches) {
        None => BucketName::of(call),
        Some(endpoint) => {
            let place = ENDPOINTS.iter().position(|other| other.name == endpoint.name).unwrap_or_default();
            BucketName { group: endpoint.name, place: api_families::COUNT + place, ..BucketName::of(call) }
        }
    }
}

/// The published rate of a bucket, in calls per second.
pub(super) fn rate(bucket: &BucketName) -> Option<f64> {
    let place = bucket.place.checked_sub(api_families::COUNT)?;
    ENDPOINTS.get(place).map(|endpoint| endpoint.per_second)
}

/// What counts a call, the narrowest first: nothing, for most calls.
pub(super) fn counted(call: &Call<'_>) -> Vec<Counted> {
    let mut segments = call.path.split('/').filter(|segment| !segment.is_empty());
    let (region, family) = (call.region, call.family.name);
    let counted = |of: &str, limit| Counted { region, family, of: of.to_owned(), of_account: false, limit };
    match (call.family.name, call.kind) {
        ("exports", Kind::Create) => vec![counted(&format!("exports of {}", call.path.trim_end_matches('/')), EXPORTS)],
        ("amc_reporting", Kind::Create) => {
            let instance = segments.nth(2).unwrap_or_default();
            let of_account = format!("AMC workflow runs of the account {}", call.account);
            vec![
                counted(&format!("AMC workflow runs of {instance}"), RUNS_OF_INSTANCE),
                Counted { of_account: true, ..counted(&of_account, RUNS_OF_ACCOUNT) },
            ]
        }
        ("traffic_events", _) => vec![counted("traffic events", TRAFFIC_EVENTS)],
        _ => Vec::new(),
    }
}

/// The job whose state a call asks for, by its id.
pub(super) fn polled<'a>(call: &Call<'a>) -> Option<&'a str> {
    let mut segments = call.path.split('/').filter(|segment| !segment.is_empty());
    match (call.family.name, call.kind) {
        ("exports", Kind::Poll) => segments.nth(1),
        ("amc_reporting", Kind::Poll) => segments.nth(4),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;
    use crate::domain::account::Region;

    fn call(line: &'static str) -> Call<'static> {
        let (method, path) = line.split_once(' ').unwrap();
        Call::new(Region::Na, api_families::family(path), &method.parse::<Method>().unwrap(), path, "acme")
    }

    #[test]
    fn endpoints_with_a_published_rate_have_a_bucket_of_their_own() {
        for (line, name, per_second) in [
            ("POST /sp/campaigns", "na/sponsored_products/write", None),
            ("POST /sd/creativesque", "na/sponsored_brands_and_display/write", None),
            ("POST /sd/campaigns", "na/sponsored_brands_and_display/write", None),
            ("POST /sd/creatives", "na/sd_creatives/write", Some(1.0)),
            ("GET /sd/creatives", "na/sd_creatives/read", Some(1.0)),
            ("POST /mediaPlan/v1/reachForecasts", "na/reach_forecasts/write", Some(1.0)),
            ("POST /dsp/rules/bidmodifier", "na/dsp_bid_modifiers/write", Some(10.0)),
            ("POST /dsp/rules/bidmodifier/list", "na/dsp_bid_modifier_lists/read", Some(5.0)),
            ("PATCH /v2/dp/audience", "na/data_provider/write", Some(100.0)),
        ] {
            let bucket = bucket(&call(line));
            assert_eq!((bucket.to_string().as_str(), rate(&bucket)), (name, per_second), "{line}");
            assert_eq!(per_second.is_some(), concerns(call(line).family) && rate(&bucket).is_some(), "{line}");
        }
        assert!(COUNTED.iter().all(|name| api_families::families().any(|family| family.name == *name)));
        let known = |endpoint: &Endpoint| api_families::families().any(|family| family.name == endpoint.family);
        assert!(ENDPOINTS.iter().all(known));
    }

    #[test]
    fn what_runs_at_amazon_is_counted_by_endpoint_instance_and_account() {
        for (line, expected) in [
            ("POST /sp/campaigns", &[][..]),
            ("GET /exports/e1", &[]),
            ("POST /campaigns/export", &[("exports of /campaigns/export", 5)]),
            (
                "POST /amc/reporting/amc1/workflowExecutions",
                &[("AMC workflow runs of amc1", 10), ("AMC workflow runs of the account acme", 200)],
            ),
            ("GET /amc/reporting/amc1/workflowExecutions/x", &[]),
            ("POST /avc/trafficEvents", &[("traffic events", 5)]),
        ] {
            let counted = counted(&call(line));
            let counted: Vec<_> = counted.iter().map(|counted| (&*counted.of, counted.limit)).collect();
            assert_eq!(counted, expected, "{line}");
        }
        let polled = |line| polled(&call(line));
        assert_eq!(polled("GET /exports/e1"), Some("e1"));
        assert_eq!(polled("GET /amc/reporting/amc1/workflowExecutions/x1"), Some("x1"));
        assert_eq!((polled("GET /reporting/reports/r1"), polled("POST /campaigns/export")), (None, None));
    }
}
