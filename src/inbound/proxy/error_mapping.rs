//! Turns the spine's errors into problem documents for callers, and says whose fault they are.

use http::{HeaderName, HeaderValue};

use crate::auth::tokens::TokenError;
use crate::domain::account::UserId;
use crate::domain::grant::{Remedy, STORE_UNAVAILABLE};
use crate::domain::headers::THROTTLE;
use crate::domain::policy::Denied;
use crate::domain::tls;
use crate::inbound::admission::Refusal;
use crate::inbound::oauth::token_problem;
use crate::inbound::problem::{Code, Problem};
use crate::inbound::route::RouteError;
use crate::telemetry::audit::Fault;
use crate::throttle::{Reason, Throttled};
use crate::upstream::{BodyError, ErrorKind, SendError};

/// Why adsidecar responds with an error of its own instead of Amazon's response.
#[derive(Debug)]
pub enum ProxyError {
    /// The request failed a check of [`admission`](crate::inbound::admission).
    Refused(Refusal),
    /// The request selects an unknown account, or a header that selects is invalid.
    Unroutable(RouteError),
    /// The policy forbids it.
    Denied(Denied),
    /// There is no access token for the user.
    NoToken(TokenError, UserId),
    /// Amazon refuses requests like this one, and waiting is not allowed or would take too long.
    Throttled(Throttled),
    /// `Content-Length` is larger than `proxy.max_body`.
    TooLarge,
    /// Amazon could not be reached, or did not respond.
    Send(SendError),
    /// A step panicked, which is a bug in adsidecar; the process and the connection go on.
    Panicked,
}

impl ProxyError {
    /// The response to the caller. `login_step` says how a user logs in.
    pub(super) fn into_problem(self, login_step: impl FnOnce(&UserId) -> String) -> Problem {
        match self {
            Self::Refused(refusal) => refusal.into(),
            Self::Unroutable(error) => error.into(),
            Self::Denied(denied) => denied.into(),
            Self::NoToken(error, user) => token_problem(error, login_step(&user)),
            Self::Throttled(throttled) => throttled.into(),
            Self::TooLarge => too_large(),
            Self::Panicked => panicked(),
            Self::Send(error) => error.kind.into(),
        }
    }

    /// The label of the metric `guard_denied`; `None` if no guard rejected the request.
    pub(super) fn guard_reason(&self) -> Option<&'static str> {
        match self {
            Self::Refused(refusal) => Some(refusal.reason()),
            Self::Denied(_) => Some("policy"),
            _ => None,
        }
    }

    /// Whose fault it is.
    pub(super) fn fault(&self) -> Fault {
        match self {
            Self::Refused(_) | Self::Unroutable(_) | Self::Denied(_) | Self::TooLarge => Fault::Caller,
            Self::Throttled(_) => Fault::Amazon,
            // A person has to consent, or the operator has to correct the client's credentials or the database.
            Self::NoToken(TokenError::LoginRequired { .. }, _)
            | Self::NoToken(TokenError::Unavailable { remedy: Remedy::Operator, .. }, _)
            | Self::NoToken(TokenError::Unavailable { code: STORE_UNAVAILABLE, .. }, _) => Fault::Operator,
            Self::NoToken(TokenError::Unavailable { code: "internal", .. }, _) | Self::Panicked => Fault::Sidecar,
            Self::NoToken(TokenError::Unavailable { .. }, _) => Fault::Amazon,
            Self::Send(error) => match error.kind {
                ErrorKind::Body(_) => Fault::Caller,
                // Amazon's certificates are valid; a handshake fails where a proxy in the network intercepts TLS.
                ErrorKind::Tls(_) | ErrorKind::Proxy { .. } => Fault::Operator,
                _ => Fault::Amazon,
            },
        }
    }
}

impl From<Refusal> for ProxyError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<RouteError> for ProxyError {
    fn from(error: RouteError) -> Self {
        Self::Unroutable(error)
    }
}

impl From<RouteError> for Problem {
    fn from(error: RouteError) -> Self {
        match error {
            RouteError::Unknown => Self::new(
                Code::UnknownAccount,
                "No account of this name is configured.",
                "Check the name in X-Ads-Account or in the path, and the [[account]] sections of the configuration.",
            ),
            RouteError::UnknownHeader(meant) => Self::new(
                Code::BadRequest,
                format!("A header begins with X-Ads- and is not known; the nearest known one is {meant}."),
                "Correct the header's name: adsidecar does not guess whose account is meant.",
            ),
            RouteError::Bad(detail) => {
                Self::new(Code::BadRequest, detail, "Correct the X-Ads-* header, or leave it out.")
            }
        }
    }
}

impl From<Denied> for Problem {
    fn from(denied: Denied) -> Self {
        let (detail, next_step) = match denied {
            Denied::Ambiguous => (
                "A policy applies to this request, and its path or method is ambiguous.",
                "Send the path without dot segments, empty segments, `;` and encoded separators, and method and path \
                 in the request line only: no X-HTTP-Method-Override, X-Original-URL or the like, and no _method \
                 parameter.",
            ),
            Denied::Form => (
                "A policy applies to this request, and its body is a form, which could override the method.",
                "Send JSON, and name it in Content-Type: with curl, -H 'Content-Type: application/json'.",
            ),
            Denied::Changes => (
                "The policy is read-only, and this request may change something at Amazon.",
                "Use an account that may write, or ask the operator about read_only.",
            ),
            Denied::NotAllowed => (
                "The policy's allow list does not contain this method and path.",
                "Ask the operator to add it to policy.allow or to the account's allow.",
            ),
        };
        // The response does not wait for the request's body, which was not read.
        Self::new(Code::PolicyDenied, detail, next_step)
    }
}

impl From<Throttled> for Problem {
    fn from(throttled: Throttled) -> Self {
        let Throttled { bucket, wait, reason } = throttled;
        let (detail, next_step) = match reason {
            Reason::Paused => (
                "Amazon refuses requests like this one at the moment, so it was not sent.",
                "Repeat it after the time in Retry-After, or let requests wait: throttle.mode = queue.",
            ),
            Reason::AtOnce => (
                "As many exports, AMC workflow runs or traffic events run as Amazon allows at a time.",
                "Repeat it when one has ended, or let requests wait: throttle.mode = queue.",
            ),
            Reason::TooLate => (
                "Amazon limits requests like this one, and its turn does not come in time.",
                "Repeat it after the time in Retry-After, or raise throttle.queue_timeout.",
            ),
            Reason::Full => (
                "Amazon limits requests like this one, and too many wait for their turn already.",
                "Repeat it after the time in Retry-After, send fewer at once, or raise throttle.max_waiting.",
            ),
            Reason::Draining => (
                "Amazon limits requests like this one, and adsidecar stops before its turn.",
                "Repeat it after the time in Retry-After.",
            ),
        };
        let seconds = wait.as_secs_f64();
        let code = if reason == Reason::Draining { Code::Draining } else { Code::Throttled };
        let mut problem = Self::new(code, detail, next_step).retry_after(wait);
        // draft-ietf-httpapi-ratelimit-headers, section 4: nothing is left of this quota until the wait is over.
        for (name, value) in [
            (THROTTLE, format!("wait={seconds:.3}, bucket={bucket}")),
            (RATE_LIMIT, format!("\"{bucket}\";r=0;t={}", seconds.ceil())),
        ] {
            if let Ok(value) = HeaderValue::try_from(value) {
                problem = problem.header(name, value);
            }
        }
        problem
    }
}

/// `RateLimit`, draft-ietf-httpapi-ratelimit-headers.
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");

impl From<ErrorKind> for Problem {
    fn from(kind: ErrorKind) -> Self {
        let network = "Try again; if it persists, check DNS, egress rules and https://status.ads.amazon.com.";
        match kind {
            ErrorKind::Unreachable(_) => {
                Self::new(Code::UpstreamUnreachable, "Amazon's host could not be reached.", network)
            }
            ErrorKind::Proxy { proxy, problem } => Self::new(
                Code::UpstreamUnreachable,
                format!("Amazon's host could not be reached through {proxy}: {problem}."),
                "Ask the operator: the proxy has to be up, to accept these credentials, and to open tunnels to \
                 Amazon's hosts.",
            ),
            ErrorKind::Tls(error) => {
                let error = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
                let cause = error.map(|error| tls::explain(error, "Amazon's", "upstream.ca_file"));
                let cause = cause.unwrap_or_else(|| "the connection broke".to_owned());
                Self::new(
                    Code::UpstreamTls,
                    format!("The TLS handshake with Amazon's host failed: {cause}."),
                    "Ask the operator to set the clock if it is wrong, or to name the CA of a proxy that intercepts \
                     TLS in upstream.ca_file.",
                )
            }
            ErrorKind::Reset(_) | ErrorKind::TransferCoding(_) | ErrorKind::Switched => Self::new(
                Code::UpstreamReset,
                "The connection to Amazon broke before a response arrived.",
                "The request may have been processed: check before you repeat one that changes something.",
            ),
            ErrorKind::ConnectTimeout(_) => {
                Self::new(Code::UpstreamTimeout, "Amazon's host did not accept a connection in time.", network)
            }
            ErrorKind::ResponseTimeout(_) => Self::new(
                Code::UpstreamTimeout,
                "Amazon did not respond within upstream.response_timeout.",
                "The request may have been processed: check before you repeat one that changes something.",
            ),
            ErrorKind::Body(BodyError::TooLarge) => too_large(),
            ErrorKind::Body(BodyError::Stalled) => Self::new(
                Code::RequestTimeout,
                "No data of the request's body arrived for proxy.body_timeout.",
                "Send the body without pauses, or raise proxy.body_timeout.",
            )
            .close(),
            ErrorKind::Body(BodyError::Broken) => Self::new(
                Code::BadRequest,
                "The request's body is incomplete or incorrectly framed.",
                "Send the whole body.",
            )
            .close(),
        }
    }
}

fn too_large() -> Problem {
    Problem::new(Code::BodyTooLarge, "The body is larger than proxy.max_body.", "Send less, or raise proxy.max_body.")
        .close()
}

fn panicked() -> Problem {
    Problem::new(
        Code::Internal,
        "adsidecar failed because of a defect; the request may have been processed.",
        "Report it, with the log lines of that time.",
    )
    .close()
}
