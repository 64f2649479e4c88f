//! The audit log (`log.audit`): one line for each call to Amazon, answered or refused. No path, no query, no secret; what
//! a caller can invent stands in it only as far as it was checked (the request id, the names of account and user).

use std::time::Duration;

use super::select::Call;
use super::trip::Trip;
use crate::log::AUDIT_TARGET;
use crate::problem::Code;

/// What is known of a call so far.
#[derive(Debug, Default)]
pub(super) struct Record {
    account: String,
    user: String,
    region: &'static str,
    family: &'static str,
    amazon_took: Option<Duration>,
    code: &'static str,
    would_be_denied: bool,
}

impl Record {
    /// A record to be filled, where somebody wants one.
    pub(super) fn begin() -> Option<Box<Self>> {
        tracing::event_enabled!(target: AUDIT_TARGET, tracing::Level::INFO).then(Box::default)
    }

    pub(super) fn is_for(&mut self, call: &Call<'_>) {
        call.account_name().clone_into(&mut self.account);
        call.user.as_str().clone_into(&mut self.user);
        (self.region, self.family) = (call.region.as_str(), call.family.name);
    }

    pub(super) fn would_be_denied(&mut self) {
        self.would_be_denied = true;
    }

    pub(super) fn amazon_took(&mut self, time: Duration) {
        self.amazon_took = Some(self.amazon_took.unwrap_or_default() + time);
    }

    pub(super) fn answered_by_us(&mut self, code: Code) {
        self.code = code.as_str();
    }

    /// Writes the line.
    pub(super) fn end(&self, trip: &Trip<'_>, status: u16, took: Duration) {
        let milliseconds = |time: Duration| time.as_micros() as f64 / 1000.0;
        tracing::info!(
            target: AUDIT_TARGET,
            request_id = trip.request_id(),
            amazon_request_id = trip.amazon_id(),
            account = self.account,
            user = self.user,
            region = self.region,
            method = trip.method(),
            family = self.family,
            status,
            source = trip.source(),
            code = self.code,
            fault = fault(status, trip.source()),
            policy = if self.would_be_denied { "would_be_denied" } else { "" },
            took_ms = milliseconds(took),
            amazon_ms = milliseconds(self.amazon_took.unwrap_or_default()),
            "call"
        );
    }
}

/// On whose side the cause lies, as far as a status tells; empty where nothing went wrong.
fn fault(status: u16, source: &str) -> &'static str {
    match (source, status) {
        (_, ..400) => "",
        // A gateway's own 502 and 504 are about the server behind it (RFC 9110, sections 15.6.3 and 15.6.5); 503 is mostly a
        // token that Login with Amazon does not renew.
        ("sidecar", 502..=504) | ("amazon", 500..) => "amazon",
        (_, 400..500) => "caller",
        _ => "sidecar",
    }
}

#[cfg(test)]
mod tests {
    use super::fault;

    #[test]
    fn the_fault_is_on_the_side_that_the_status_names() {
        for (source, status, side) in [
            ("amazon", 200, ""),
            ("amazon", 307, ""),
            ("amazon", 404, "caller"),
            ("amazon", 429, "caller"),
            ("amazon", 503, "amazon"),
            ("sidecar", 403, "caller"),
            ("sidecar", 499, "caller"),
            ("sidecar", 500, "sidecar"),
            ("sidecar", 502, "amazon"),
            ("sidecar", 504, "amazon"),
        ] {
            assert_eq!(fault(status, source), side, "{source} {status}");
        }
    }
}
