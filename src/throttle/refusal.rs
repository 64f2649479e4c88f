//! Whether a response says that Amazon refused a call because there were too many, and how long to wait then.

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;

use super::Kind;
use super::law::Seconds;
use crate::domain::api_families::Family;
use crate::domain::clock::date_of;

/// Default pause, in seconds, where `Retry-After` is absent. It doubles with each refusal in a row.
const DEFAULT_PAUSE: Seconds = 1.0;

/// Default pause for the creation of reports, exports and other jobs, in seconds. Amazon omits `Retry-After` there, and
/// its guide says to wait longer: the limit follows the length of the region's queue, which changes slowly.
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
