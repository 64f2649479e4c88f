//! Metrics, log line and audit line of one request. They are written exactly once: when the response begins, or when
//! the caller disconnects before that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::HeaderName;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};

use super::{Body, ProxyError};
use crate::auth::tokens::TokenError;
use crate::domain::account::Region;
use crate::inbound::problem::Problem;
use crate::inbound::request_id::REQUEST_ID;
use crate::inbound::route::RoutedRequest;
use crate::telemetry::audit::{AuditEvent, AuditOutcome, Fault, milliseconds};
use crate::telemetry::log::AUDIT_TARGET;
use crate::telemetry::metrics::{Metrics, RecentCall, Source};

/// The status counted for a caller that disconnected before the response began, as nginx does.
const CLIENT_CLOSED: u16 = 499;

/// Amazon's request id, which its support asks for; the name depends on the service that responds.
const AMAZON_ID: [HeaderName; 3] = [
    HeaderName::from_static("x-amzn-requestid"),
    HeaderName::from_static("x-amz-request-id"),
    HeaderName::from_static("x-amz-rid"),
];

/// Collects what is recorded of one request. Dropping it records a caller that disconnected.
#[derive(Debug)]
pub(super) struct RequestTelemetry<'a> {
    metrics: &'a Metrics,
    begun: Instant,
    method: &'static str,
    account: String,
    region: &'static str,
    family: &'static str,
    source: Source,
    hint: Option<&'static str>,
    request_id: HeaderValue,
    amazon_id: Option<HeaderValue>,
    /// Why there is no response from Amazon, for the log.
    error: Option<String>,
    /// What an operator can do about it, for the log.
    remedy: Option<String>,
    /// Whose fault it is that there is no response from Amazon: the caller's until then, because it may disconnect.
    fault: Fault,
    in_flight: Option<InFlight>,
    /// `None` if `log.audit` is off.
    audit: Option<Box<AuditEvent>>,
    /// Whether adsidecar's own endpoint serves the request.
    is_own: bool,
    recorded: bool,
}

/// Counts a request as in flight until its response is complete.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Metrics>);

impl<'a> RequestTelemetry<'a> {
    pub(super) fn begin(metrics: &'a Arc<Metrics>, method: &Method, request_id: HeaderValue) -> Self {
        metrics.in_flight.inc();
        Self {
            begun: Instant::now(),
            method: label(method),
            account: String::new(),
            region: "",
            family: "",
            source: Source::Sidecar,
            hint: None,
            request_id,
            amazon_id: None,
            error: None,
            remedy: None,
            fault: Fault::Caller,
            in_flight: Some(InFlight(metrics.clone())),
            audit: tracing::event_enabled!(target: AUDIT_TARGET, tracing::Level::INFO).then(Box::default),
            is_own: false,
            recorded: false,
            metrics,
        }
    }

    pub(super) fn request_id(&self) -> &str {
        self.request_id.to_str().unwrap_or_default()
    }

    /// Records that adsidecar's own endpoint serves the request: it gets no audit line, and is no call to Amazon.
    pub(super) fn set_own_endpoint(&mut self) {
        (self.audit, self.is_own) = (None, true);
    }

    pub(super) fn set_route(&mut self, route: &RoutedRequest<'_>) {
        route.account_label().clone_into(&mut self.account);
        (self.region, self.family) = (route.region.as_str(), route.family.name);
        if let Some(audit) = &mut self.audit {
            route.account_name().clone_into(&mut audit.account);
            route.user.as_str().clone_into(&mut audit.user);
            (audit.region, audit.family) = (route.region.as_str(), route.family.name);
        }
    }

    /// Records that the policy would deny the request, but only observes.
    pub(super) fn set_would_be_denied(&mut self) {
        if let Some(audit) = &mut self.audit {
            audit.would_be_denied = true;
        }
    }

    /// Records the time from sending a request to Amazon to the head of the response, retry included.
    pub(super) fn record_upstream_time(&mut self, region: Region, time: Duration) {
        if let Some(audit) = &mut self.audit {
            audit.upstream_time = Some(audit.upstream_time.unwrap_or_default() + time);
        }
        self.metrics.upstream_duration[region as usize].observe(time.as_secs_f64());
    }

    /// Records a response from Amazon, including one that the caller never sees.
    pub(super) fn record_upstream_response(&mut self, region: Region, status: StatusCode, headers: &HeaderMap) {
        if status == StatusCode::TOO_MANY_REQUESTS {
            self.metrics.throttled.with_label_values(&[region.as_str(), Source::Amazon.as_str()]).inc();
        }
        if is_failure(status.as_u16()) || self.audit.is_some() || tracing::enabled!(tracing::Level::DEBUG) {
            self.amazon_id = AMAZON_ID.iter().find_map(|name| headers.get(name)).cloned();
        }
    }

    /// Records why adsidecar responds with an error of its own.
    pub(super) fn set_error(&mut self, error: &ProxyError) {
        self.fault = error.fault();
        self.error = match error {
            ProxyError::Send(error) => Some(error.kind.to_string()),
            ProxyError::NoToken(TokenError::Unavailable { code, .. }, _) => Some((*code).to_owned()),
            ProxyError::Throttled(throttled) => Some(format!("throttled: {}", throttled.bucket)),
            ProxyError::Panicked => Some("a step panicked".to_owned()),
            _ => None,
        };
    }

    pub(super) fn set_hint(&mut self, hint: &'static str) {
        self.hint = Some(hint);
    }

    pub(super) fn take_hint(&mut self) -> Option<&'static str> {
        self.hint.take()
    }

    /// Records that the caller gets Amazon's response.
    pub(super) fn set_response_from_amazon(&mut self) {
        self.source = Source::Amazon;
    }

    /// Records that the caller gets adsidecar's own error `problem`.
    pub(super) fn set_own_error(&mut self, problem: &Problem) {
        if is_failure(problem.code().status().as_u16()) {
            self.remedy = Some(problem.next_step().to_owned());
        }
        if let Some(audit) = &mut self.audit {
            audit.code = problem.code().as_str();
        }
    }

    /// Records the request and returns `response` with the request id. The request counts as in flight until the body
    /// is complete.
    pub(super) fn end(mut self, mut response: Response<Body>) -> Response<Body> {
        self.record(response.status().as_u16());
        let request_id = std::mem::replace(&mut self.request_id, HeaderValue::from_static(""));
        response.headers_mut().insert(REQUEST_ID, request_id);
        let in_flight = self.in_flight.take();
        response.map(|body| body.counted(in_flight))
    }

    fn record(&mut self, status: u16) {
        self.recorded = true;
        let took = self.begun.elapsed();
        let fault = self.fault_of(status);
        let mut text = [0u8; 3];
        let source = self.source.as_str();
        let labels = [self.account.as_str(), self.region, self.method, digits(status, &mut text), source];
        self.metrics.requests.with_label_values(&labels).inc();
        self.metrics.request_duration[self.source as usize].observe(took.as_secs_f64());
        if let Some(audit) = &self.audit {
            audit.write(&AuditOutcome {
                request_id: self.request_id(),
                amazon_request_id: self.amazon_id(),
                method: self.method,
                status,
                source,
                fault,
                took,
            });
        }
        // One line for each failure that an operator can do something about. The caller's own mistakes are in its
        // response.
        if is_failure(status) {
            self.warn(status, took);
        } else {
            tracing::debug!(
                request_id = self.request_id(),
                amazon_request_id = self.amazon_id(),
                account = self.account,
                method = self.method,
                status,
                source,
                took_ms = milliseconds(took),
                "request"
            );
        }
        if !self.is_own {
            self.metrics.recent_calls.remember(RecentCall {
                ended: self.begun + took,
                took,
                method: self.method,
                family: self.family,
                account: &self.account,
                status,
                fault,
                request_id: self.request_id(),
            });
        }
    }

    /// Whose fault a response with this status is; `None` if nothing failed.
    fn fault_of(&self, status: u16) -> Option<Fault> {
        match self.source {
            Source::Amazon if status < 400 => None,
            Source::Amazon => Fault::of_amazons_response(status),
            Source::Sidecar => Some(self.fault),
        }
    }

    #[cold]
    fn warn(&self, status: u16, took: Duration) {
        tracing::warn!(
            request_id = self.request_id(),
            amazon_request_id = self.amazon_id(),
            account = self.account,
            region = self.region,
            method = self.method,
            status,
            source = self.source.as_str(),
            error = self.error,
            hint = self.remedy.as_deref().or_else(|| amazons_failure(status)),
            took_ms = milliseconds(took),
            "request failed"
        );
    }

    fn amazon_id(&self) -> Option<&str> {
        self.amazon_id.as_ref().and_then(|id| id.to_str().ok())
    }
}

impl Drop for RequestTelemetry<'_> {
    fn drop(&mut self) {
        if !self.recorded {
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

/// What an operator can do about a failure that is Amazon's response.
fn amazons_failure(status: u16) -> Option<&'static str> {
    match status {
        429 => Some("Amazon throttles this client: send fewer requests, and wait for Retry-After"),
        500.. => Some("the failure is Amazon's: quote amazon_request_id to its support"),
        _ => None,
    }
}

/// The metric's label. Unknown methods are `other`, so that callers cannot create series.
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
