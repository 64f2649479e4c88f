//! The audit log (`log.audit`): one line for each request to Amazon, whether it was sent or rejected. A line contains
//! no path, no query and no secret. Values that a caller chooses (the request id, the names of account and user) are
//! validated before they are written.

use std::time::Duration;

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

/// A duration as the fields of the log hold it: in milliseconds, with a resolution of one microsecond.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

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
