//! The audit log (`log.audit`): one line for each call to Amazon, answered or refused. It holds no path, no query and no
//! secret. What a caller can invent (the request id, the names of account and user) is in it only after it was checked.

use std::time::Duration;

use http::StatusCode;

use super::log::AUDIT_TARGET;

/// Whose fault it is that a call did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The caller's: the request is wrong, forbidden, or was abandoned.
    Caller,
    /// The operator's: configuration, credentials, database, network policy, or a user who has to log in.
    Operator,
    /// Ours: a bug or an internal limit.
    Sidecar,
    /// Amazon's: its hosts cannot be reached, or fail.
    Amazon,
}

impl Fault {
    /// As written in the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::Operator => "operator",
            Self::Sidecar => "sidecar",
            Self::Amazon => "amazon",
        }
    }

    /// Whose fault a response of Amazon's reports (RFC 9110, sections 15.5 and 15.6); `None` where nothing failed.
    pub fn of_amazons_response(status: StatusCode) -> Option<Self> {
        match status.as_u16() {
            ..400 => None,
            400..500 => Some(Self::Caller),
            500.. => Some(Self::Amazon),
        }
    }
}

/// What the audit log says about one call. Filled while the call is served, written once.
#[derive(Debug, Default)]
pub struct AuditEvent {
    /// Account name; empty where the call named none.
    pub account: String,
    /// User id of the grant that authorizes the call.
    pub user: String,
    /// `na`, `eu` or `fe`.
    pub region: &'static str,
    /// API family.
    pub family: &'static str,
    /// Time spent on Amazon, over all attempts.
    pub upstream_time: Option<Duration>,
    /// Our error code; empty for Amazon's responses.
    pub code: &'static str,
    /// The policy only observes, and would have denied the call.
    pub would_be_denied: bool,
}

/// How a call ended.
#[derive(Debug)]
pub struct Outcome<'a> {
    /// The id in `X-Request-Id`.
    pub request_id: &'a str,
    /// Amazon's own id of the request.
    pub amazon_request_id: Option<&'a str>,
    /// HTTP method, or `other`.
    pub method: &'static str,
    /// HTTP status that the caller got; 499 where the caller hung up first.
    pub status: u16,
    /// `amazon` or `sidecar`.
    pub source: &'static str,
    /// `None` where nothing failed.
    pub fault: Option<Fault>,
    /// From the request's head to the response's head.
    pub took: Duration,
}

impl AuditEvent {
    /// An event to be filled, or `None` where the audit log is off.
    pub fn begin() -> Option<Box<Self>> {
        tracing::event_enabled!(target: AUDIT_TARGET, tracing::Level::INFO).then(Box::default)
    }

    /// Writes the line.
    pub fn write(&self, outcome: &Outcome<'_>) {
        let milliseconds = |time: Duration| time.as_micros() as f64 / 1000.0;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fault_of_amazons_responses_follows_their_status() {
        for (status, fault) in [
            (200, None),
            (307, None),
            (404, Some(Fault::Caller)),
            (429, Some(Fault::Caller)),
            (503, Some(Fault::Amazon)),
        ] {
            assert_eq!(Fault::of_amazons_response(StatusCode::from_u16(status).unwrap()), fault, "{status}");
        }
    }
}
