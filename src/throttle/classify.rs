//! What a request and its response mean for the throttle: the kind of the call, and whether Amazon refused it.
//!
//! Amazon limits each endpoint on its own, so calls of different kinds share no bucket: a storm of polls never holds back
//! the creation of a report.

use http::header::RETRY_AFTER;
use http::{HeaderMap, Method, StatusCode};
use jiff::Timestamp;

use super::law::Seconds;
use crate::domain::api_families::Family;
use crate::domain::clock::date_of;

/// The kinds of calls of one API family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Reads or lists.
    Read,
    /// Changes something.
    Write,
    /// Starts an asynchronous job: a report, an export, an AMC workflow run. Amazon limits these most.
    Create,
    /// Asks for the state of such a job.
    Poll,
}

impl Kind {
    /// Every kind, in the order of the discriminants.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Create, Self::Poll];

    /// The kind as the metrics' label, and in `X-Adsidecar-Throttle`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Create => "create",
            Self::Poll => "poll",
        }
    }

    /// The kind of the call `method path`. An unexpected path gets a kind that is merely less precise: it decides which
    /// calls wait for each other, never whether one is allowed.
    pub fn of(method: &Method, path: &str) -> Self {
        let mut segments = path.split('/').filter(|segment| !segment.is_empty());
        let mut first = || segments.next().unwrap_or_default();
        let (a, b, c, d) = (first(), first(), first(), first());
        let last = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
        let job = match (a, b) {
            ("reporting", "reports") => job(reads, !c.is_empty()),
            ("exports", _) => job(reads, !b.is_empty()),
            (_, "export") if c.is_empty() => job(reads, false),
            ("accounts", _) if c == "dsp" && d == "reports" => job(reads, segments.next().is_some()),
            ("amc", "reporting") if d == "workflowExecutions" => job(reads, segments.next().is_some()),
            ("adsApi", "v1") if d == "reports" => match c {
                "create" => Some(Self::Create),
                "retrieve" => Some(Self::Poll),
                _ => None,
            },
            ("mmm", _) | ("insights", "brandMetrics") | ("attribution", _) if last == "report" || c == "reports" => {
                job(reads, !d.is_empty())
            }
            ("v2", "reports" | "snapshots") => job(reads, !c.is_empty()),
            ("v2", _) if matches!(last, "report" | "snapshot") => job(reads, false),
            _ => None,
        };
        let reading_post = || {
            *method == Method::POST
                && (matches!(last, "list" | "query" | "search" | "count" | "recommendations" | "forecasts")
                    || (a, b) == ("adsApi", "v1") && matches!(c, "query" | "retrieve"))
        };
        match job {
            Some(kind) => kind,
            None if reads || reading_post() => Self::Read,
            None => Self::Write,
        }
    }
}

/// The kind of a call to a collection of jobs, or to `one` of them. A job is not listed, and changing one is rare.
fn job(reads: bool, one: bool) -> Option<Kind> {
    match (reads, one) {
        (true, true) => Some(Kind::Poll),
        (false, false) => Some(Kind::Create),
        _ => None,
    }
}

/// What a call counts in its bucket: lists of the "extended" representation count five times (Amazon's rate-limiting
/// page).
pub(super) fn weight(path: &str) -> f64 {
    if path.split('/').any(|segment| segment == "extended") { 5.0 } else { 1.0 }
}

/// Default pause, in seconds, where `Retry-After` is absent. It doubles with each refusal in a row.
const DEFAULT_PAUSE: Seconds = 1.0;

/// Default pause for the creation of reports, exports and other jobs, in seconds. Amazon leaves out `Retry-After` there,
/// and its guide says to wait longer: the limit follows the length of the region's queue, which changes slowly.
const DEFAULT_PAUSE_OF_JOBS: Seconds = 5.0;

/// What a response says about the limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    /// Amazon served the call, well or not.
    Accepted,
    /// Amazon refused the call because there were too many.
    Refused {
        /// The wait that Amazon asks for.
        advised: Option<Seconds>,
        /// Whether it is certain that Amazon did not process the call, so that it may be sent again.
        unprocessed: bool,
    },
}

/// Reads a response to a call of `family`. A 429 is a refusal, as are a 503 with `Retry-After` and the 402 of traffic
/// events, which stands for more than five at a time. A 425 is none: it names a duplicate.
pub(super) fn read(status: StatusCode, headers: &HeaderMap, family: &Family, now: Timestamp) -> Verdict {
    match status {
        StatusCode::TOO_MANY_REQUESTS => Verdict::Refused { advised: retry_after(headers, now), unprocessed: true },
        StatusCode::PAYMENT_REQUIRED if family.name == "traffic_events" => {
            Verdict::Refused { advised: retry_after(headers, now), unprocessed: true }
        }
        StatusCode::SERVICE_UNAVAILABLE => match retry_after(headers, now) {
            None => Verdict::Accepted,
            advised => Verdict::Refused { advised, unprocessed: false },
        },
        _ => Verdict::Accepted,
    }
}

/// The pause of a call of this kind where there is no `Retry-After`.
pub(super) fn default_pause(kind: Kind) -> Seconds {
    if kind == Kind::Create { DEFAULT_PAUSE_OF_JOBS } else { DEFAULT_PAUSE }
}

/// `Retry-After` in seconds (RFC 9110, section 10.2.3): a number, also with a fraction, or a date, which is compared
/// with the response's own `Date` if it has one. `None` if it is absent, in the past, or neither.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Seconds> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let seconds = match text.bytes().next()? {
        b'0'..=b'9' => text.parse::<f64>().ok()?,
        _ => {
            let until = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
            until.duration_since(date_of(headers).unwrap_or(now)).as_secs_f64()
        }
    };
    (seconds.is_finite() && seconds >= 0.0).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::api_families::family;

    #[test]
    fn each_kind_is_told_by_method_and_path() {
        for (line, kind) in [
            ("GET /v2/profiles", Kind::Read),
            ("HEAD /v2/profiles", Kind::Read),
            ("POST /sp/campaigns/list", Kind::Read),
            ("POST /adsApi/v1/query/campaigns", Kind::Read),
            ("POST /sp/targets/bid/recommendations", Kind::Read),
            ("POST /sp/campaigns", Kind::Write),
            ("PUT /sp/campaigns", Kind::Write),
            ("DELETE /reporting/reports/r1", Kind::Write),
            ("POST /mcp", Kind::Write),
            ("POST /reporting/reports", Kind::Create),
            ("GET /reporting/reports/r1", Kind::Poll),
            ("POST /campaigns/export", Kind::Create),
            ("GET /exports/e1", Kind::Poll),
            ("POST /accounts/1/dsp/reports", Kind::Create),
            ("GET /accounts/1/dsp/reports/r1", Kind::Poll),
            ("POST /amc/reporting/amc1/workflowExecutions", Kind::Create),
            ("GET /amc/reporting/amc1/workflowExecutions/x1", Kind::Poll),
            ("GET /amc/reporting/amc1/workflowExecutions", Kind::Read),
            ("GET /amc/reporting/amc1/workflows/w1", Kind::Read),
            ("POST /adsApi/v1/create/reports", Kind::Create),
            ("POST /adsApi/v1/retrieve/reports", Kind::Poll),
            ("POST /v2/sp/campaigns/report", Kind::Create),
            ("GET /v2/reports/r1", Kind::Poll),
            ("GET /", Kind::Read),
            ("POST /", Kind::Write),
            ("GET //exports//e1/", Kind::Poll),
        ] {
            let (method, path) = line.split_once(' ').unwrap();
            assert_eq!(Kind::of(&method.parse().unwrap(), path), kind, "{line}");
        }
    }

    #[test]
    fn extended_lists_weigh_five_calls() {
        assert_eq!([weight("/v2/sp/campaigns/extended"), weight("/v2/sp/extendedness")], [5.0, 1.0]);
    }

    fn now() -> Timestamp {
        "2026-08-01T12:00:00Z".parse().unwrap()
    }

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn wait(text: &str) -> Option<Seconds> {
        retry_after(&headers(&[("retry-after", text)]), now())
    }

    #[test]
    fn retry_after_is_a_number_a_date_or_nothing() {
        for (text, seconds) in [("0", 0.0), ("30", 30.0), (" 7 ", 7.0), ("1.5", 1.5), ("86400", 86400.0)] {
            assert_eq!(wait(text), Some(seconds), "{text}");
        }
        assert_eq!(wait("Sat, 01 Aug 2026 12:00:42 GMT"), Some(42.0));
        for text in ["", "-5", "soon", "5s", "1e", "Sat, 01 Aug 2026 11:00:00 GMT", "1e999", "NaN", "inf"] {
            assert_eq!(wait(text), None, "{text}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now()), None);
        // The clocks differ by an hour: the response's own date is the one to compare with.
        let both = [("retry-after", "Sat, 01 Aug 2026 13:00:05 GMT"), ("date", "Sat, 01 Aug 2026 13:00:00 GMT")];
        assert_eq!(retry_after(&headers(&both), now()), Some(5.0));
    }

    #[test]
    fn only_what_says_too_many_calls_is_a_refusal() {
        let read = |status: u16, path: &str, lines: &[(&'static str, &str)]| {
            super::read(StatusCode::from_u16(status).unwrap(), &headers(lines), family(path), now())
        };
        let after = [("retry-after", "3")];
        let refused = |advised, unprocessed| Verdict::Refused { advised, unprocessed };
        assert_eq!(read(429, "/v2/profiles", &after), refused(Some(3.0), true));
        assert_eq!(read(429, "/v2/profiles", &[]), refused(None, true));
        assert_eq!(read(402, "/avc/trafficEvents", &[]), refused(None, true));
        assert_eq!(read(503, "/v2/profiles", &after), refused(Some(3.0), false));
        for (status, path) in [(402, "/v2/profiles"), (503, "/v2/profiles"), (200, "/v2/profiles")] {
            assert_eq!(read(status, path, &[]), Verdict::Accepted, "{status}");
        }
        assert_eq!(read(425, "/reporting/reports", &after), Verdict::Accepted);
    }

    proptest! {
        #[test]
        fn no_header_makes_a_wait_that_is_not_a_number(text in "[ -~]{0,40}") {
            if let Some(seconds) = wait(&text) {
                prop_assert!(seconds >= 0.0 && seconds.is_finite());
            }
        }
    }
}
