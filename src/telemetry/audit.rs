//! The audit log (`log.audit`): one line for each request to Amazon, whether it was sent or rejected. A line contains
//! no path, no query and no secret. Values that a caller chooses (the request id, the names of account and user) are
//! validated before they are written.
//!
//! The latest requests are also kept in memory ([`RecentCalls`]), with or without `log.audit`, for the status page.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::log::AUDIT_TARGET;

/// Who caused a request to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The caller: the request is invalid or forbidden, or the caller disconnected.
    Caller,
    /// The operator: configuration, credentials, database, network policy, or a missing login.
    Operator,
    /// adsidecar: a bug or an internal limit.
    Sidecar,
    /// Amazon: its hosts cannot be reached, or return errors.
    Amazon,
}

impl Fault {
    /// Returns the value of the field `fault`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::Operator => "operator",
            Self::Sidecar => "sidecar",
            Self::Amazon => "amazon",
        }
    }

    /// Returns who is at fault according to the status of Amazon's response (RFC 9110, sections 15.5 and 15.6), or
    /// `None` for success.
    pub fn of_amazons_response(status: u16) -> Option<Self> {
        match status {
            ..400 => None,
            400..500 => Some(Self::Caller),
            500.. => Some(Self::Amazon),
        }
    }
}

/// The audit record of one request. It is filled while the request is served, and written once.
#[derive(Debug, Default)]
pub struct AuditEvent {
    /// Account name; empty if the request names no account.
    pub account: String,
    /// The user whose grant authorizes the request.
    pub user: String,
    /// Region: `na`, `eu` or `fe`.
    pub region: &'static str,
    /// Name of the API family.
    pub family: &'static str,
    /// Time spent waiting for Amazon, summed over all attempts.
    pub upstream_time: Option<Duration>,
    /// Our error code; empty if the response came from Amazon.
    pub code: &'static str,
    /// Whether the policy would have denied the request if it did not only observe.
    pub would_be_denied: bool,
}

/// How a request ended.
#[derive(Debug)]
pub struct AuditOutcome<'a> {
    /// The id in `X-Request-Id`.
    pub request_id: &'a str,
    /// Amazon's id of the request (`x-amzn-requestid` or `x-amz-request-id`), if it sent one.
    pub amazon_request_id: Option<&'a str>,
    /// HTTP method, or `other`.
    pub method: &'static str,
    /// HTTP status that the caller received; 499 if the caller disconnected first.
    pub status: u16,
    /// Origin of the response: `amazon` or `sidecar`.
    pub source: &'static str,
    /// Who caused the failure; `None` if the request succeeded.
    pub fault: Option<Fault>,
    /// Time from the request head to the response head.
    pub took: Duration,
}

impl AuditEvent {
    /// Writes the audit line.
    pub fn write(&self, outcome: &AuditOutcome<'_>) {
        tracing::info!(
            target: AUDIT_TARGET,
            request_id = outcome.request_id,
            amazon_request_id = outcome.amazon_request_id,
            account = self.account,
            user = self.user,
            region = self.region,
            method = outcome.method,
            family = self.family,
            status = outcome.status,
            source = outcome.source,
            code = self.code,
            fault = outcome.fault.map_or("", Fault::as_str),
            policy = if self.would_be_denied { "would_be_denied" } else { "" },
            took_ms = milliseconds(outcome.took),
            amazon_ms = milliseconds(self.upstream_time.unwrap_or_default()),
            "call"
        );
    }
}

/// Number of requests that are remembered.
const REMEMBERED: u64 = 256;

/// The latest requests to Amazon, in a ring of fixed size. Each has a slot of its own, so that concurrent requests do
/// not wait for one another, and remembering one takes no clock reading. A request holds no path and no query.
#[derive(Debug, Default)]
pub struct RecentCalls {
    /// Number of the next request.
    next: AtomicU64,
    /// Allocated for the first request.
    slots: OnceLock<Box<[Mutex<Option<RecentCall>>]>>,
}

/// A request to Amazon that has ended, whether it was sent or rejected.
#[derive(Clone, Debug)]
pub struct RecentCall {
    /// When the head of its response was there.
    pub ended: Instant,
    /// Time from the request head to the response head.
    pub took: Duration,
    /// HTTP method, or `other`.
    pub method: &'static str,
    /// Name of the API family; empty if the request was rejected before it was known.
    pub family: &'static str,
    /// The account, as in the metrics; empty if the request names none.
    pub account: String,
    /// HTTP status that the caller received; 499 if the caller disconnected first.
    pub status: u16,
    /// Who caused the failure; `None` if the request succeeded.
    pub fault: Option<Fault>,
    /// The id in `X-Request-Id`.
    pub request_id: Box<str>,
}

impl RecentCalls {
    /// Remembers a request, in the place of the oldest one.
    pub fn remember(&self, call: RecentCall) {
        let slots = self.slots.get_or_init(|| (0..REMEMBERED).map(|_| Mutex::default()).collect());
        let number = self.next.fetch_add(1, Relaxed);
        // The remainder is below the number of slots.
        let slot = &slots[(number % REMEMBERED) as usize];
        let previous = slot.lock().unwrap_or_else(PoisonError::into_inner).replace(call);
        drop(previous);
    }

    /// The remembered requests, the latest first.
    pub fn latest(&self) -> impl Iterator<Item = RecentCall> {
        let (next, slots) = (self.next.load(Relaxed), self.slots.get());
        let numbers = (next.saturating_sub(REMEMBERED)..next).rev();
        numbers.filter_map(move |number| {
            let slot = slots?[(number % REMEMBERED) as usize].lock();
            slot.unwrap_or_else(PoisonError::into_inner).clone()
        })
    }
}

/// A duration as the fields of the log hold it: in milliseconds, with a resolution of one microsecond.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_requests_are_remembered_and_older_ones_are_not() {
        let calls = RecentCalls::default();
        assert_eq!(calls.latest().count(), 0);
        for number in 0..REMEMBERED + 10 {
            calls.remember(RecentCall {
                ended: Instant::now(),
                took: Duration::ZERO,
                method: "GET",
                family: "profiles",
                account: String::new(),
                status: 200,
                fault: None,
                request_id: number.to_string().into(),
            });
        }
        let ids: Vec<u64> = calls.latest().map(|call| call.request_id.parse().unwrap()).collect();
        assert_eq!(ids, (10..REMEMBERED + 10).rev().collect::<Vec<_>>());
    }

    #[test]
    fn the_status_of_amazons_response_decides_the_fault() {
        for (status, fault) in [
            (200, None),
            (307, None),
            (404, Some(Fault::Caller)),
            (429, Some(Fault::Caller)),
            (503, Some(Fault::Amazon)),
        ] {
            assert_eq!(Fault::of_amazons_response(status), fault, "{status}");
        }
    }
}
