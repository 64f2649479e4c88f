//! Which calls may leave for Amazon. Amazon's scope is all or nothing: who may read may also spend. This is the one
//! switch that gives less.
//!
//! A call that a rule speaks about is judged by the path that leaves, byte for byte. So a path that a server behind us
//! could read as another one (dot segments, encoded slashes …) passes no rule. Where no rule is set nothing is judged.

use std::borrow::Cow;

use http::{HeaderMap, Method};

/// `[policy]`: what holds for every call.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `policy.mode`.
    pub mode: Mode,
    /// `policy.read_only` and `policy.allow`.
    pub rules: Rules,
}

/// What happens to a call that may not leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is refused.
    #[default]
    Enforce,
    /// It is counted, and leaves.
    Observe,
}

impl Mode {
    /// The mode as configured.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Observe => "observe",
        }
    }
}

/// What a call has to keep to; nothing by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    read_only: bool,
    /// Each list has to hold an entry that fits.
    allow: Vec<Vec<Allow>>,
}

/// `METHOD /path/glob`: one kind of call that may leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allow {
    /// `None`: any.
    method: Option<Method>,
    glob: String,
}

/// Why a call may not leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Its path can be read in two ways, so no rule can speak about it.
    Ambiguous,
    /// It may change something, and the policy is read-only.
    Changes,
    /// It is not on the list.
    NotAllowed,
}

/// Text that is no entry of an allow-list; says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadAllow(&'static str);

/// The POST paths that only read; `*` is one segment, `**` any number of them. Amazon's OpenAPI specifications
/// (advertising.amazon.com/API/docs, as of 2026-11) and the guides of Reporting v3, Exports and AMC reporting: their
/// operations that list, search, count, estimate, recommend, preview or forecast, and those that make a report, an export
/// or a snapshot of what there is. An operation that the table does not know counts as one that changes something, and
/// so does MCP, where one path carries both kinds.
const READING_POSTS: &[&str] = &[
    // "List …" of Sponsored Products v3, Sponsored Brands v4, portfolios, product metadata, accounts, DSP and AMC.
    "/*/**/list",
    // Ads API v1 names the kind of operation in its path.
    "/adsApi/v1/query/**",
    "/adsApi/v1/retrieve/**",
    "/adsApi/v1/create/reports",
    // Reports, exports and snapshots.
    "/reporting/reports",
    "/*/export",
    "/accounts/*/dsp/reports",
    "/attribution/report",
    "/insights/brandMetrics/report",
    "/v2/*/report",
    "/v2/*/*/report",
    "/v2/*/*/snapshot",
    "/sd/*/report",
    "/sd/*/snapshot",
    // Recommendations, suggestions, forecasts and the like.
    "/*/campaigns/budgetRecommendations",
    "/*/campaigns/budgetRules/recommendations",
    "/*/campaigns/budget/usage",
    "/*/campaigns/insights",
    "/portfolios/budget/usage",
    "/sp/campaigns/initialBudgetRecommendation",
    "/sp/v1/events",
    "/sp/targets/bid/recommendations",
    "/sp/targets/categories/recommendations",
    "/sp/targets/keywords/recommendations",
    "/sp/targets/products/count",
    "/sp/targets/products/recommendations",
    "/sp/targeting/recommendations/*",
    "/sp/global/targets/bid/recommendations",
    "/sp/negativeTargets/brands/search",
    "/sp/targetPromotionGroups/recommendations",
    "/sp/rules/campaignOptimization/eligibility",
    "/sp/rules/campaignOptimization/state",
    "/sp/rules/optimization/search",
    "/sb/forecasts",
    "/sb/campaign/shopperSegments/forecast",
    "/sb/recommendations/**",
    "/sd/creatives/preview",
    "/sd/forecasts",
    "/sd/recommendations/**",
    "/sd/targets/recommendations",
    "/sd/targets/bid/recommendations",
    "/benchmarks/brandsAndCategories",
    "/benchmarks/brands/*/categories/*",
    // AMC reporting: a run of a workflow is a query, and its result a report.
    "/amc/reporting/*/workflowExecutions",
];

/// Headers by which some frameworks take another method than the request line's, in lower case and with `-`.
const METHOD_OVERRIDES: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];

impl Rules {
    /// `read_only` and `allow` as configured; an empty list allows everything.
    pub fn new(read_only: bool, allow: Vec<Allow>) -> Self {
        Self { read_only, allow: Some(allow).filter(|list| !list.is_empty()).into_iter().collect() }
    }

    /// These rules and those of `other`: what either forbids is forbidden.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self { read_only: self.read_only || other.read_only, allow: [&self.allow[..], &other.allow].concat() }
    }

    /// Whether nothing is set, so that nothing is judged.
    pub fn is_empty(&self) -> bool {
        !self.read_only && self.allow.is_empty()
    }

    /// Whether only what reads may leave.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The entries of the lists, as configured.
    pub fn allow(&self) -> impl Iterator<Item = &Allow> {
        self.allow.iter().flatten()
    }

    /// Whether a call may leave. `path` is the one that leaves, without its query.
    pub fn judge(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Denied> {
        if self.is_empty() {
            return Ok(());
        }
        let path = &one_slash_each(path);
        if is_ambiguous(path) || headers.keys().any(|name| overrides_method(name.as_str())) {
            return Err(Denied::Ambiguous);
        }
        if self.read_only && !reads(method, path) {
            return Err(Denied::Changes);
        }
        let listed = |list: &Vec<Allow>| list.iter().any(|allow| allow.fits(method, path));
        if self.allow.iter().all(listed) { Ok(()) } else { Err(Denied::NotAllowed) }
    }
}

impl Allow {
    fn fits(&self, method: &Method, path: &str) -> bool {
        self.method.as_ref().is_none_or(|allowed| allowed == method) && fits(&self.glob, path)
    }
}

impl std::str::FromStr for Allow {
    type Err = BadAllow;

    fn from_str(text: &str) -> Result<Self, BadAllow> {
        const METHODS: [Method; 7] =
            [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
        let mut words = text.split_ascii_whitespace();
        let (Some(method), Some(glob), None) = (words.next(), words.next(), words.next()) else {
            return Err(BadAllow("is no METHOD and a path: write such as \"POST /sp/campaigns/list\""));
        };
        let method = METHODS.into_iter().find(|known| known == method);
        if method.is_none() && !text.trim_start().starts_with("* ") {
            return Err(BadAllow(
                "begins with no method: write GET, HEAD, POST, PUT, PATCH, DELETE or OPTIONS in capitals, or * for any",
            ));
        }
        if !glob.starts_with('/') {
            return Err(BadAllow("holds a path that does not begin with /: write such as \"GET /v2/profiles\""));
        }
        if glob.contains('?') || is_ambiguous(glob) {
            return Err(BadAllow(
                "holds a path that no call is judged by: write it without query, //, dot segments, `;` and encoded \
                 slashes",
            ));
        }
        if glob.split('/').any(|segment| segment.contains("**") && segment != "**") {
            return Err(BadAllow("has ** beside other letters: ** stands for whole segments, * for a part of one"));
        }
        Ok(Self { method, glob: glob.to_owned() })
    }
}

impl std::fmt::Display for Allow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.method.as_ref().map_or("*", Method::as_str), self.glob)
    }
}

/// Safe methods (RFC 9110, section 9.2.1), and the POSTs of the table.
fn reads(method: &Method, path: &str) -> bool {
    method.is_safe() || (method == Method::POST && READING_POSTS.iter().any(|glob| fits(glob, path)))
}

/// Whether `path` is one that `glob` stands for: `*` is any part of one segment, `**` any number of segments.
fn fits(glob: &str, path: &str) -> bool {
    let (glob, path): (Vec<_>, Vec<_>) = (glob.split('/').collect(), path.split('/').collect());
    wildcard(&glob, &path, |part| *part == "**", |part, segment| segment_fits(part, segment))
}

fn segment_fits(glob: &str, segment: &str) -> bool {
    wildcard(glob.as_bytes(), segment.as_bytes(), |part| *part == b'*', |part, byte| part == byte)
}

/// The usual wildcard match: a star takes as little as it can, and where that leads nowhere the last star takes one more.
/// So no path, however long, takes more than its length times the pattern's.
fn wildcard<P, T>(pattern: &[P], text: &[T], star: impl Fn(&P) -> bool, fits: impl Fn(&P, &T) -> bool) -> bool {
    let (mut at, mut next, mut last_star) = (0, 0, None);
    while next < text.len() {
        match pattern.get(at) {
            Some(part) if star(part) => {
                at += 1;
                last_star = Some((at, next));
            }
            Some(part) if fits(part, &text[next]) => (at, next) = (at + 1, next + 1),
            _ => {
                let Some((behind, taken)) = last_star else { return false };
                (at, next, last_star) = (behind, taken + 1, Some((behind, taken + 1)));
            }
        }
    }
    pattern[at..].iter().all(star)
}

/// `//` counts as `/`, as Amazon's own samples have it (`//sp/campaigns/list`): who reads it so is judged rightly, and to
/// who does not it is a path that does not exist.
fn one_slash_each(path: &str) -> Cow<'_, str> {
    if !path.contains("//") {
        return path.into();
    }
    let mut once = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !once.ends_with('/') {
            once.push(c);
        }
    }
    once.into()
}

/// Whether some server reads `path` as another one than is written there: a dot segment, an empty one, a separator or a
/// control character behind up to two rounds of percent-encoding, a backslash, a path parameter.
fn is_ambiguous(path: &str) -> bool {
    let twice = decoded(&decoded(path.as_bytes()));
    let separates = |byte: &u8| matches!(byte, b'/' | b'\\' | b'?' | b'#' | b';') || byte.is_ascii_control();
    let segments: Vec<_> = path.split('/').skip(1).collect();
    let last = segments.len().saturating_sub(1);
    segments.iter().enumerate().any(|(index, segment)| {
        let dots = decoded(&decoded(segment.as_bytes()));
        (segment.is_empty() && index != last) || dots == b"." || dots == b".."
    }) || twice.iter().filter(|byte| separates(byte)).count() != path.bytes().filter(|byte| *byte == b'/').count()
}

/// One round of percent-decoding; what is no escape stays.
fn decoded(bytes: &[u8]) -> Vec<u8> {
    percent_encoding::percent_decode(bytes).collect()
}

fn overrides_method(name: &str) -> bool {
    METHOD_OVERRIDES.contains(&name.replace('_', "-").as_str())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allow(list: &[&str]) -> Rules {
        Rules::new(false, list.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn judge(rules: &Rules, line: &str) -> Result<(), Denied> {
        let (method, path) = line.split_once(' ').unwrap();
        rules.judge(&method.parse().unwrap(), path, &HeaderMap::new())
    }

    #[test]
    fn read_only_lets_nothing_pass_that_changes_something() {
        let rules = Rules::new(true, Vec::new());
        for line in [
            "POST /sp/campaigns",
            "PUT /sp/campaigns",
            "PATCH /x",
            "DELETE /reporting/reports/1",
            "PUT /sp/campaigns/list",
            "DELETE /sp/campaigns/list",
            "POST /sp/campaigns/delete",
            "POST /list",
            "POST /sp/list/campaigns",
            "POST /sp/campaigns/List",
            "POST /sp/campaigns/list/",
            "POST /sp/campaigns/listen",
            "POST /mcp",
            "POST /adsApi/v1/create/campaigns",
            "POST /adsApi/v1/delete/reports",
            "POST /sd/locations/delete",
            "POST /amc/audiences/query",
            "POST /amc/reporting/i/workflows",
            "POST /new",
            "POST /",
        ] {
            assert_eq!(judge(&rules, line), Err(Denied::Changes), "{line}");
        }
        for line in [
            "GET /v2/profiles",
            "HEAD /anything",
            "OPTIONS /x",
            "POST /sp/campaigns/list",
            "POST /sb/v4/adGroups/list",
            "POST /portfolios/list",
            "POST /adsApi/v1/query/campaigns",
            "POST /adsApi/v1/query/advertisingDeals/sb",
            "POST /reporting/reports",
            "POST /campaigns/export",
            "POST /v2/sp/keywords/report",
            "POST /sd/campaigns/report",
            "POST /sb/recommendations/targets/category",
            "POST /amc/reporting/amc1/workflowExecutions",
        ] {
            assert_eq!(judge(&rules, line), Ok(()), "{line}");
        }
    }

    #[test]
    fn what_is_not_on_the_list_does_not_leave() {
        let rules = allow(&["GET /v2/*", "POST /sp/**", "* /x", "GET /y/**/z", "PUT /sb/v*/ads"]);
        for line in [
            "GET /v2",
            "GET /v2/a/b",
            "GET /v2/a/",
            "POST /v2/profiles",
            "HEAD /v2/profiles",
            "POST /spx",
            "GET /X",
            "GET /x/y",
            "GET /y/z/a",
            "PUT /sb/4/ads",
            "PUT /sb/v4/ads/1",
            "GET /",
        ] {
            assert_eq!(judge(&rules, line), Err(Denied::NotAllowed), "{line}");
        }
        for line in [
            "GET /v2/profiles",
            "POST /sp/campaigns",
            "POST /sp/campaigns/list",
            "DELETE /x",
            "GET /y/z",
            "GET /y/a/b/z",
            "PUT /sb/v4/ads",
        ] {
            assert_eq!(judge(&rules, line), Ok(()), "{line}");
        }
    }

    #[test]
    fn what_a_server_could_read_as_another_path_passes_no_rule() {
        for rules in [Rules::new(true, Vec::new()), allow(&["* /**"])] {
            for path in [
                "/sp/campaigns/../x/list",
                "/sp/./list",
                "/sp/..",
                "/.",
                "/sp/%2e%2e/list",
                "/sp/.%2E/list",
                "/sp/%252e%252e/list",
                "/sp%2flist",
                "/sp%2Fcampaigns/list",
                "/sp%252fcampaigns/list",
                "/sp%5ccampaigns/list",
                "/sp\\campaigns/list",
                "/sp/campaigns%00/list",
                "/sp/campaigns%0a/list",
                "/sp/campaigns%3f/list",
                "/sp/campaigns%23/list",
                "/sp/campaigns;x=1/list",
                "/sp/..;/list",
                "/sp/campaigns%3b/list",
            ] {
                for method in ["GET", "POST"] {
                    assert_eq!(judge(&rules, &format!("{method} {path}")), Err(Denied::Ambiguous), "{method} {path}");
                }
            }
            for path in ["/", "/x/", "/a.b/...", "/x%20y/%41", "/caf\u{e9}", "/x:y/{z}", "/100%"] {
                assert_eq!(judge(&rules, &format!("GET {path}")), Ok(()), "{path}");
            }
        }
    }

    #[test]
    fn slashes_in_a_row_count_as_one() {
        let reading = Rules::new(true, Vec::new());
        assert_eq!(judge(&reading, "POST //sp/campaigns/list"), Ok(()));
        assert_eq!(judge(&reading, "POST //sp//campaigns"), Err(Denied::Changes));
        assert_eq!(judge(&reading, "POST //list"), Err(Denied::Changes), "no segment is before it");
        let one = allow(&["GET /*/profiles"]);
        assert_eq!(judge(&one, "GET //v2/profiles"), Ok(()));
        assert_eq!(judge(&one, "GET //profiles"), Err(Denied::NotAllowed));
        assert_eq!(judge(&one, "GET /v2/%2f/profiles"), Err(Denied::Ambiguous));
    }

    #[test]
    fn no_header_changes_the_method_behind_the_rule() {
        for name in ["X-HTTP-Method-Override", "x-http-method", "X_Method_Override", "x-http_method-override"] {
            let mut headers = HeaderMap::new();
            headers.insert(name.parse::<http::HeaderName>().unwrap(), "DELETE".parse().unwrap());
            let rules = Rules::new(true, Vec::new());
            assert_eq!(rules.judge(&Method::GET, "/x", &headers), Err(Denied::Ambiguous), "{name}");
            assert_eq!(Rules::default().judge(&Method::GET, "/x", &headers), Ok(()), "nothing is set");
        }
    }

    #[test]
    fn without_rules_nothing_is_judged() {
        for line in ["DELETE /../%2f//", "POST /sp/campaigns"] {
            assert_eq!(judge(&Rules::default(), line), Ok(()), "{line}");
            assert_eq!(judge(&Rules::new(false, Vec::new()), line), Ok(()), "{line}");
        }
    }

    #[test]
    fn what_either_forbids_is_forbidden() {
        let both = Rules::new(true, Vec::new()).and(&allow(&["POST /sp/**"])).and(&allow(&["POST /*/campaigns/**"]));
        assert_eq!(judge(&both, "POST /sp/campaigns"), Err(Denied::Changes));
        assert_eq!(judge(&both, "GET /v2/profiles"), Err(Denied::NotAllowed));
        assert_eq!(judge(&both, "POST /sp/keywords/list"), Err(Denied::NotAllowed));
        assert_eq!(judge(&both, "POST /sp/campaigns/list"), Ok(()));
    }

    #[test]
    fn an_entry_that_says_nothing_clear_is_refused_with_its_cure() {
        for (text, cure) in [
            ("", "METHOD and a path"),
            ("GET", "METHOD and a path"),
            ("/v2/profiles", "METHOD and a path"),
            ("GET /a /b", "METHOD and a path"),
            ("get /v2/profiles", "in capitals"),
            ("TRACE /x", "begins with no method"),
            ("** /x", "begins with no method"),
            ("GET v2/profiles", "begin with /"),
            ("GET https://x/y", "begin with /"),
            ("GET /x?y=1", "without query"),
            ("GET //x", "without query, //"),
            ("GET /x/../y", "dot segments"),
            ("GET /x%2fy", "encoded slashes"),
            ("GET /x/a**", "** beside other letters"),
        ] {
            let error = text.parse::<Allow>().unwrap_err();
            assert!(error.0.contains(cure), "{text:?}: {error}");
        }
        for text in ["GET /v2/profiles", "* /**", "POST /sp/*/list", "DELETE /"] {
            assert_eq!(text.parse::<Allow>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn the_table_holds_no_path_that_a_policy_would_refuse() {
        for glob in READING_POSTS {
            assert!(!is_ambiguous(glob), "{glob}");
            assert!(format!("POST {glob}").parse::<Allow>().is_ok(), "{glob}");
        }
    }

    proptest! {
        /// Whatever comes, a read-only policy lets no method pass that changes something.
        #[test]
        fn no_path_makes_a_changing_method_pass(path in "/[ -~]{0,40}") {
            for method in [Method::PUT, Method::PATCH, Method::DELETE] {
                prop_assert!(Rules::new(true, Vec::new()).judge(&method, &path, &HeaderMap::new()).is_err());
            }
        }

        #[test]
        fn a_path_without_stars_fits_itself_alone(path in "(/[a-z0-9.:]{1,8}){1,6}", other in "(/[a-z0-9.:]{1,8}){1,6}") {
            prop_assert!(fits(&path, &path));
            prop_assert_eq!(fits(&path, &other), path == other);
        }
    }
}
