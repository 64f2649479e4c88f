//! What kind of call a request is. Amazon limits each endpoint on its own, so calls of different kinds share no bucket:
//! a storm of polls never holds back the creation of a report.

use http::Method;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
