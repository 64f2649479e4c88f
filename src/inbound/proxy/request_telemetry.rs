//! The record of one call. It ends once, by its answer or by the caller hanging up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::HeaderName;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};

use super::route::RoutedRequest;
use super::{Body, ProxyError};
use crate::auth::tokens::TokenError;
use crate::domain::account::Region;
use crate::inbound::problem::Code;
use crate::inbound::request_id::REQUEST_ID;
use crate::telemetry::audit::{AuditEvent, AuditOutcome, Fault};
use crate::telemetry::metrics::Metrics;

/// Counted for a caller that hung up before its answer, as nginx does.
const CLIENT_CLOSED: u16 = 499;

/// How Amazon names a call, depending on the service that answers: its support asks for it.
const AMAZON_ID: [HeaderName; 3] = [
    HeaderName::from_static("x-amzn-requestid"),
    HeaderName::from_static("x-amz-request-id"),
    HeaderName::from_static("x-amz-rid"),
];

#[derive(Debug)]
pub(super) struct RequestTelemetry<'a> {
    metrics: &'a Metrics,
    begun: Instant,
    method: &'static str,
    account: &'a str,
    region: &'static str,
    source: &'static str,
    hint: Option<&'static str>,
    request_id: HeaderValue,
    amazon_id: Option<HeaderValue>,
    /// Why there is no answer of Amazon's, for the log.
    error: Option<String>,
    /// Whose fault it is; `None` where nothing failed.
    fault: Option<Fault>,
    in_flight: Option<InFlight>,
    /// `None` where nobody wants an audit log.
    audit: Option<Box<AuditEvent>>,
    ended: bool,
}

/// A call whose answer has not passed whole.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Metrics>);

impl<'a> RequestTelemetry<'a> {
    pub(super) fn begin(metrics: &'a Arc<Metrics>, method: &Method, request_id: HeaderValue) -> Self {
        metrics.in_flight.inc();
        Self {
            begun: Instant::now(),
            method: label(method),
            account: "",
            region: "",
            source: "sidecar",
            hint: None,
            request_id,
            amazon_id: None,
            error: None,
            // Until it ends in another way: a caller that hangs up.
            fault: Some(Fault::Caller),
            in_flight: Some(InFlight(metrics.clone())),
            audit: AuditEvent::begin(),
            ended: false,
            metrics,
        }
    }

    pub(super) fn request_id(&self) -> &str {
        self.request_id.to_str().unwrap_or_default()
    }

    /// It is for an endpoint of ours, and no call.
    pub(super) fn is_ours(&mut self) {
        self.audit = None;
    }

    pub(super) fn is_for(&mut self, call: &RoutedRequest<'a>) {
        self.account = call.account_name();
        self.region = call.region.as_str();
        if let Some(audit) = &mut self.audit {
            call.account_name().clone_into(&mut audit.account);
            call.user.as_str().clone_into(&mut audit.user);
            (audit.region, audit.family) = (call.region.as_str(), call.family.name);
        }
    }

    /// The policy would refuse it, and only observes.
    pub(super) fn would_be_denied(&mut self) {
        if let Some(audit) = &mut self.audit {
            audit.would_be_denied = true;
        }
    }

    pub(super) fn amazon_took(&mut self, region: Region, time: Duration) {
        if let Some(audit) = &mut self.audit {
            audit.upstream_time = Some(audit.upstream_time.unwrap_or_default() + time);
        }
        self.metrics.upstream_duration.with_label_values(&[region.as_str()]).observe(time.as_secs_f64());
    }

    /// Notes what there is to tell about an answer of Amazon's, also of one that the caller never sees.
    pub(super) fn amazon_said(&mut self, region: Region, status: StatusCode, headers: &HeaderMap) {
        if status == StatusCode::TOO_MANY_REQUESTS {
            self.metrics.throttled.with_label_values(&[region.as_str(), "amazon"]).inc();
        }
        if is_failure(status.as_u16()) || self.audit.is_some() || tracing::enabled!(tracing::Level::DEBUG) {
            self.amazon_id = AMAZON_ID.iter().find_map(|name| headers.get(name)).cloned();
        }
    }

    pub(super) fn fails(&mut self, error: &ProxyError) {
        self.fault = Some(error.fault());
        self.error = match error {
            ProxyError::Send(error) => Some(error.kind.to_string()),
            ProxyError::NoToken(TokenError::Unavailable { code, .. }, _) => Some((*code).to_owned()),
            ProxyError::Panicked => Some("a step panicked".to_owned()),
            _ => None,
        };
    }

    pub(super) fn hint(&mut self, hint: &'static str) {
        self.hint = Some(hint);
    }

    pub(super) fn take_hint(&mut self) -> Option<&'static str> {
        self.hint.take()
    }

    pub(super) fn answered_by_amazon(&mut self, status: StatusCode) {
        self.source = "amazon";
        self.fault = Fault::of_amazons_response(status);
    }

    pub(super) fn answered_by_us(&mut self, code: Code) {
        if let Some(audit) = &mut self.audit {
            audit.code = code.as_str();
        }
    }

    /// Ends with `answer`, which tells the request's id, and whose body counts as in flight until it has passed.
    pub(super) fn end(mut self, mut answer: Response<Body>) -> Response<Body> {
        self.record(answer.status().as_u16());
        let request_id = std::mem::replace(&mut self.request_id, HeaderValue::from_static(""));
        answer.headers_mut().insert(REQUEST_ID, request_id);
        let in_flight = self.in_flight.take();
        answer.map(|body| body.until_passed(in_flight))
    }

    fn record(&mut self, status: u16) {
        self.ended = true;
        let took = self.begun.elapsed();
        let mut text = [0u8; 3];
        let labels = [self.account, self.region, self.method, digits(status, &mut text), self.source];
        self.metrics.requests.with_label_values(&labels).inc();
        self.metrics.request_duration.with_label_values(&[self.source]).observe(took.as_secs_f64());
        if let Some(audit) = &self.audit {
            audit.write(&AuditOutcome {
                request_id: self.request_id(),
                amazon_request_id: self.amazon_id(),
                method: self.method,
                status,
                source: self.source,
                fault: self.fault,
                took,
            });
        }
        // One line per failure that an operator can do something about; what a caller did wrong it was told itself.
        if is_failure(status) {
            self.tell(status, took);
        } else {
            tracing::debug!(
                request_id = self.request_id(),
                amazon_request_id = self.amazon_id(),
                account = self.account,
                method = self.method,
                status,
                source = self.source,
                ?took,
                "call"
            );
        }
    }

    #[cold]
    fn tell(&self, status: u16, took: Duration) {
        tracing::warn!(
            request_id = self.request_id(),
            amazon_request_id = self.amazon_id(),
            account = self.account,
            region = self.region,
            method = self.method,
            status,
            source = self.source,
            error = self.error,
            ?took,
            "call failed"
        );
    }

    fn amazon_id(&self) -> Option<&str> {
        self.amazon_id.as_ref().and_then(|id| id.to_str().ok())
    }
}

impl Drop for RequestTelemetry<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.record(CLIENT_CLOSED);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}

fn is_failure(status: u16) -> bool {
    status == 429 || status >= 500
}

/// A closed set: whatever a caller invents is `other`.
fn label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// The three digits of a status.
fn digits(status: u16, text: &mut [u8; 3]) -> &str {
    for (place, power) in text.iter_mut().zip([100, 10, 1]) {
        *place = b'0' + u8::try_from(status / power % 10).unwrap_or_default();
    }
    std::str::from_utf8(text).unwrap_or_default()
}
