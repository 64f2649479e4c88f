//! adsidecar's own errors: their codes, statuses and bodies (RFC 9457). No other module knows a status of an error.
//!
//! The file is long because it is a table: one row for each code, from which the manual's table is made.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    REFERRER_POLICY, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::ext::ReasonPhrase;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use serde::Serialize;

use crate::domain::headers::ERROR;
use crate::inbound::admission::Refusal;
use crate::inbound::destination::BadTarget;
use crate::inbound::request_id::REQUEST_ID;

/// The code of an error that adsidecar itself responds with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the code of its name")]
pub enum Code {
    BadRequest,
    StateInvalid,
    LoginRequired,
    HostNotAllowed,
    CrossSite,
    PolicyDenied,
    UnknownAccount,
    NotFound,
    MethodNotAllowed,
    CallerUnauthorized,
    RequestTimeout,
    IdentityChanged,
    BodyTooLarge,
    UriTooLong,
    HeadersTooLarge,
    Throttled,
    Internal,
    UpstreamUnreachable,
    UpstreamReset,
    UpstreamTls,
    TokenUnavailable,
    Draining,
    Overloaded,
    StoreUnavailable,
    UpstreamTimeout,
}

impl Code {
    /// The code as in `X-Adsidecar-Error` and in the body.
    pub const fn as_str(self) -> &'static str {
        self.facts().1
    }

    /// The HTTP status of the response.
    pub const fn status(self) -> StatusCode {
        self.facts().0
    }

    /// Whether the same request may succeed later.
    const fn retryable(self) -> bool {
        self.facts().2
    }

    const fn facts(self) -> (StatusCode, &'static str, bool) {
        match self {
            Self::BadRequest => (StatusCode::BAD_REQUEST, "bad_request", false),
            Self::StateInvalid => (StatusCode::BAD_REQUEST, "state_invalid", false),
            Self::LoginRequired => (StatusCode::UNAUTHORIZED, "login_required", false),
            Self::HostNotAllowed => (StatusCode::FORBIDDEN, "host_not_allowed", false),
            Self::CrossSite => (StatusCode::FORBIDDEN, "cross_site", false),
            Self::PolicyDenied => (StatusCode::FORBIDDEN, "policy_denied", false),
            Self::UnknownAccount => (StatusCode::NOT_FOUND, "unknown_account", false),
            Self::NotFound => (StatusCode::NOT_FOUND, "not_found", false),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", false),
            Self::CallerUnauthorized => (StatusCode::PROXY_AUTHENTICATION_REQUIRED, "caller_unauthorized", false),
            Self::RequestTimeout => (StatusCode::REQUEST_TIMEOUT, "request_timeout", true),
            Self::IdentityChanged => (StatusCode::CONFLICT, "identity_changed", false),
            Self::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", false),
            Self::UriTooLong => (StatusCode::URI_TOO_LONG, "uri_too_long", false),
            Self::HeadersTooLarge => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", false),
            Self::Throttled => (StatusCode::TOO_MANY_REQUESTS, "throttled", true),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", false),
            Self::UpstreamUnreachable => (StatusCode::BAD_GATEWAY, "upstream_unreachable", true),
            Self::UpstreamReset => (StatusCode::BAD_GATEWAY, "upstream_reset", true),
            Self::UpstreamTls => (StatusCode::BAD_GATEWAY, "upstream_tls", false),
            Self::TokenUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "token_unavailable", true),
            Self::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining", true),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", true),
            Self::StoreUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", true),
            Self::UpstreamTimeout => (StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", true),
        }
    }

    /// All codes, by status.
    pub const ALL: [Self; 25] = [
        Self::BadRequest,
        Self::StateInvalid,
        Self::LoginRequired,
        Self::HostNotAllowed,
        Self::CrossSite,
        Self::PolicyDenied,
        Self::UnknownAccount,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::CallerUnauthorized,
        Self::RequestTimeout,
        Self::IdentityChanged,
        Self::BodyTooLarge,
        Self::UriTooLong,
        Self::HeadersTooLarge,
        Self::Throttled,
        Self::Internal,
        Self::UpstreamUnreachable,
        Self::UpstreamReset,
        Self::UpstreamTls,
        Self::TokenUnavailable,
        Self::Draining,
        Self::Overloaded,
        Self::StoreUnavailable,
        Self::UpstreamTimeout,
    ];

    /// The row of the table in `config/README.md`, in Markdown: the meaning of the code, and what to do.
    // The function is long because it is a table: one row per code.
    pub const fn reference(self) -> (&'static str, &'static str) {
        match self {
            Self::BadRequest => (
                "The request line, a header, a parameter or the framing of the body is invalid",
                "Correct what `detail` names",
            ),
            Self::StateInvalid => (
                "The login has expired, was started in another browser, or the pending grant no longer exists",
                "Start the login again",
            ),
            Self::LoginRequired => {
                ("The user has no grant, or Amazon rejects it", "Open the URL in `next_step` and consent")
            }
            Self::HostNotAllowed => (
                "`Host` is not loopback, or an absolute URL names a host that is not Amazon's",
                "Call `localhost`, or add the name to `proxy.allowed_hosts`",
            ),
            Self::CrossSite => (
                "A web page sent the request",
                "Call adsidecar from a server; only `login.frontend_url` may use the OAuth endpoints",
            ),
            Self::PolicyDenied => (
                "The [policy](#policy) forbids this request; nothing was sent",
                "Use an account that is allowed to, or change the policy",
            ),
            Self::UnknownAccount => ("No such account is configured", "Check the name and the `[[account]]` sections"),
            Self::NotFound => {
                ("No such endpoint under `/api/auth/` or `/auth/o2/`, or on the admin listener", "Check the path")
            }
            Self::MethodNotAllowed => (
                "`TRACE`, `CONNECT` to anything but port 80 of an Amazon host, or a method that the endpoint does not \
                 have",
                "See `Allow`; with a proxy setting use `http://` URLs",
            ),
            Self::CallerUnauthorized => {
                ("The caller token is missing or wrong", "Send `X-Ads-Sidecar-Token`, or `Proxy-Authorization: Bearer`")
            }
            Self::RequestTimeout => {
                ("The head or the body of the request did not arrive in time", "Send it without pauses")
            }
            Self::IdentityChanged => (
                "The person signed in to Amazon as a different user: no profile is the same. Your earlier connection \
                 is unchanged",
                "Sign in as the same user, or start the login with `replace=true`",
            ),
            Self::BodyTooLarge => ("The body is larger than `proxy.max_body`", "Send less, or raise the limit"),
            Self::UriTooLong => ("The target is longer than 8 KiB", "Send long lists in a body"),
            Self::HeadersTooLarge => (
                "The head of the request is larger than 32 KiB, or has more than 100 fields",
                "Send fewer and shorter headers; in a browser, clear the cookies of `localhost`",
            ),
            Self::Throttled => (
                "Amazon refuses requests like this one, and [throttle](#throttle) does not let it wait; or too many \
                 logins were started (2,000 at once, then 20 per second). A 429 from Amazon does not carry this header",
                "Wait for `Retry-After`. Start one login per person",
            ),
            Self::Internal => ("A defect in adsidecar", "Check its log, and report it"),
            Self::UpstreamUnreachable => ("No connection to Amazon's host", "Check DNS and egress rules, then retry"),
            Self::UpstreamReset => (
                "The connection broke before a response arrived",
                "The request may have been processed: check before you repeat one that changes something",
            ),
            Self::UpstreamTls => (
                "The TLS handshake with Amazon's host failed",
                "Set this machine's clock if it is wrong; if your network intercepts TLS, set its CA as \
                 `upstream.ca_file`",
            ),
            Self::TokenUnavailable => (
                "The access token has expired and cannot be refreshed now",
                "Wait for `Retry-After`; with `invalid_client` in `detail` check client id and secret",
            ),
            Self::Draining => (
                "adsidecar is about to stop: the request would have been served too late",
                "Wait for `Retry-After`; another replica, or the next process, serves it",
            ),
            Self::Overloaded => (
                "All `proxy.max_connections` connections have been busy for a second",
                "Wait for `Retry-After`; reuse connections; raise the limit",
            ),
            Self::StoreUnavailable => (
                "The store rejected the change; or PostgreSQL does not respond and the access token has expired",
                "Check the log and the volume of `store.path`, or PostgreSQL",
            ),
            Self::UpstreamTimeout => (
                "Amazon did not accept a connection or did not respond in time",
                "See `upstream_reset`; `upstream.response_timeout` is the limit",
            ),
        }
    }
}

const _: () = assert!(Code::ALL.len() == Code::UpstreamTimeout as usize + 1, "every code is listed");

/// An error response of adsidecar's own.
#[derive(Clone, Debug)]
pub struct Problem {
    code: Code,
    detail: Cow<'static, str>,
    next_step: Cow<'static, str>,
    retry_after: Option<Duration>,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// A member of the document beyond the usual ones.
    member: Option<Box<(&'static str, serde_json::Value)>>,
    /// Whether the caller is an MCP client, which reads JSON-RPC.
    for_mcp: bool,
}

/// Adds the headers that every response of adsidecar's own carries: for browsers and caches, and the time, which a
/// server with a clock tells (RFC 9110, section 6.6.1).
pub(super) fn add_private_headers(headers: &mut HeaderMap) {
    let fixed: [(HeaderName, &str); 3] =
        [(CACHE_CONTROL, "no-store"), (REFERRER_POLICY, "no-referrer"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
    for (name, value) in fixed {
        // The status page has a policy of its own.
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    let now = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now());
    headers.extend(now.ok().and_then(|now| HeaderValue::try_from(now).ok()).map(|now| (DATE, now)));
}

/// RFC 9457, section 3.1, and our own members.
#[derive(Serialize)]
struct Document<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    code: &'a str,
    next_step: &'a str,
    retryable: bool,
    request_id: &'a str,
    #[serde(flatten)]
    member: Option<HashMap<&'static str, &'a serde_json::Value>>,
    #[serde(flatten)]
    rpc: Option<RpcError>,
}

/// An error of JSON-RPC 2.0 (section 5.1), as further members of the document. The id is null: the request's body was
/// not read.
#[derive(Serialize)]
struct RpcError {
    jsonrpc: &'static str,
    id: Option<u64>,
    error: RpcErrorObject,
}

#[derive(Serialize)]
struct RpcErrorObject {
    code: i32,
    message: String,
}

/// Of the range that JSON-RPC 2.0 leaves to servers.
const RPC_SERVER_ERROR: i32 = -32_001;
/// Longest reason phrase in a status line.
const MAX_REASON: usize = 400;

impl Problem {
    /// Creates the error from what happened (`detail`) and what the caller can do about it (`next_step`). Neither may
    /// hold a secret.
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>, next_step: impl Into<Cow<'static, str>>) -> Self {
        let (detail, next_step) = (detail.into(), next_step.into());
        Self { code, detail, next_step, retry_after: None, headers: Vec::new(), member: None, for_mcp: false }
    }

    /// Adds `Retry-After`: `wait`, rounded up to whole seconds, at least 1.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Adds a member to the document (RFC 9457, section 3.2).
    #[must_use]
    pub fn member(mut self, name: &'static str, value: serde_json::Value) -> Self {
        self.member = Some(Box::new((name, value)));
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Closes the connection after the response, so that nothing that follows on it is served.
    #[must_use]
    pub fn close(self) -> Self {
        self.header(CONNECTION, HeaderValue::from_static("close"))
    }

    /// Puts the error into the forms that MCP clients show to a person: an error of JSON-RPC in the same document, and
    /// the reason phrase. Some show the one, some the other. Without the challenge: with it they would start an OAuth
    /// of their own, and wait for its end.
    #[must_use]
    pub fn for_mcp(mut self) -> Self {
        self.headers.retain(|(name, _)| name != WWW_AUTHENTICATE);
        Self { for_mcp: true, ..self }
    }

    /// The error code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Whether the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        self.code.retryable()
    }

    /// What happened.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// What the caller can do about it.
    pub fn next_step(&self) -> &str {
        &self.next_step
    }

    /// The HTTP response.
    pub fn respond(self, request_id: &str) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.document(request_id)));
        *response.status_mut() = self.code.status();
        let headers = response.headers_mut();
        headers.insert(ERROR, HeaderValue::from_static(self.code.as_str()));
        let kind = if self.for_mcp { "application/json" } else { "application/problem+json" };
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        add_private_headers(headers);
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds(wait)));
        }
        headers.extend(self.headers.iter().cloned());
        let reason = self.for_mcp.then(|| self.message()).filter(|reason| reason.len() <= MAX_REASON);
        if let Some(reason) = reason.and_then(|reason| ReasonPhrase::try_from(reason.into_bytes()).ok()) {
            response.extensions_mut().insert(reason);
        }
        response
    }

    /// The response as bytes of HTTP/1.1, for a connection that is closed before its request was read.
    pub fn raw(self, request_id: &HeaderValue) -> Bytes {
        let id = request_id.to_str().unwrap_or_default();
        let body = self.document(id);
        let (status, code) = (self.code.status(), self.code.as_str());
        let mut more = String::new();
        if let Some(wait) = self.retry_after {
            more += &format!("{RETRY_AFTER}: {}\r\n", seconds(wait));
        }
        let mut headers = HeaderMap::new();
        add_private_headers(&mut headers);
        for (name, value) in &headers {
            more += &format!("{name}: {}\r\n", value.to_str().unwrap_or_default());
        }
        let head = format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\n{ERROR}: {code}\r\n{REQUEST_ID}: {id}\r\n{more}content-type: \
             application/problem+json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), &body].concat().into()
    }

    /// What happened and what to do, as one text.
    fn message(&self) -> String {
        format!("{} {}", self.detail, self.next_step)
    }

    fn document(&self, request_id: &str) -> Bytes {
        let document = Document {
            r#type: format!("urn:adsidecar:problem:{}", self.code.as_str()),
            title: self.code.status().canonical_reason().unwrap_or_default(),
            status: self.code.status().as_u16(),
            detail: &self.detail,
            code: self.code.as_str(),
            next_step: &self.next_step,
            retryable: self.code.retryable(),
            request_id,
            rpc: self.for_mcp.then(|| RpcError {
                jsonrpc: "2.0",
                id: None,
                error: RpcErrorObject { code: RPC_SERVER_ERROR, message: self.message() },
            }),
            member: self.member.as_deref().map(|(name, value)| HashMap::from([(*name, value)])),
        };
        // Strings and numbers always serialize.
        serde_json::to_vec(&document).unwrap_or_default().into()
    }
}

/// Whole seconds, rounded up.
fn seconds(wait: Duration) -> u64 {
    wait.as_secs_f64().ceil().max(1.0) as u64
}

impl From<Refusal> for Problem {
    // The function is long because it is a table: one row per refusal.
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Framing => Self::new(
                Code::BadRequest,
                "The length of the body is ambiguous: Transfer-Encoding is allowed once, as chunked.",
                "Send either Content-Length or Transfer-Encoding: chunked.",
            )
            .close(),
            Refusal::NoHost => {
                Self::new(Code::BadRequest, "A request needs exactly one Host header.", "Send one.").close()
            }
            Refusal::Host => Self::new(
                Code::HostNotAllowed,
                "The Host header is neither localhost, 127.0.0.1 nor [::1].",
                "Call http://localhost, or add the name to proxy.allowed_hosts.",
            ),
            Refusal::Target(BadTarget::Form(detail)) => {
                Self::new(Code::BadRequest, detail, "Send a path, or the URL of an Amazon Ads host.")
            }
            Refusal::Target(BadTarget::Foreign) => Self::new(
                Code::HostNotAllowed,
                "adsidecar proxies to the Amazon Ads hosts only.",
                "Send other traffic directly: set NO_PROXY, or use the proxy for Amazon's hosts alone.",
            ),
            Refusal::Target(BadTarget::TooLong) => {
                Self::new(Code::UriTooLong, "The target is longer than 8 KiB.", "Send long lists in a body.")
            }
            Refusal::Method => Self::new(
                Code::MethodNotAllowed,
                "Neither TRACE nor unknown methods are served, and CONNECT only to port 80 of an Amazon Ads host.",
                "As a forward proxy adsidecar accepts http:// URLs: use http://advertising-api.amazon.com/. It speaks \
                 TLS to Amazon itself.",
            )
            .header(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"))
            .close(),
            Refusal::CrossSite => Self::new(
                Code::CrossSite,
                "A web page sent this request.",
                "Call adsidecar from a server; only pages of login.frontend_url's origin may use the OAuth endpoints. \
                 A person who was sent a login link pastes it into the browser's address bar.",
            ),
            Refusal::TypedAddress => Self::new(
                Code::CrossSite,
                "A browser opened this address by itself, as when a person types it; requests to Amazon are for \
                 programs.",
                "Use curl or another program. One that is built on a browser (Electron) needs proxy.caller_token, and \
                 sends it. Pages for a person: / and /api/auth/amazon/login.",
            ),
            Refusal::Caller => Self::new(
                Code::CallerUnauthorized,
                "The caller token is missing or wrong.",
                "Send it as X-Ads-Sidecar-Token, or as Proxy-Authorization: Bearer.",
            )
            .header(PROXY_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            Refusal::Peer => Self::new(
                Code::CallerUnauthorized,
                "The calling process runs as a user that is not in proxy.peer_uids.",
                "Run it as one of these users, or add its uid to proxy.peer_uids.",
            )
            .close(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_every_member_of_rfc_9457() {
        let problem = Problem::new(Code::TokenUnavailable, "why", "what to do");
        let document: serde_json::Value = serde_json::from_slice(&problem.document("r-1")).unwrap();
        assert_eq!(
            document,
            serde_json::json!({
                "type": "urn:adsidecar:problem:token_unavailable",
                "title": "Service Unavailable",
                "status": 503,
                "detail": "why",
                "code": "token_unavailable",
                "next_step": "what to do",
                "retryable": true,
                "request_id": "r-1",
            })
        );
    }

    #[test]
    fn a_wait_is_rounded_up_to_whole_seconds() {
        for (wait, header) in [(0, "1"), (1, "1"), (1001, "2"), (60_000, "60")] {
            let problem = Problem::new(Code::TokenUnavailable, "", "").retry_after(Duration::from_millis(wait));
            assert_eq!(problem.respond("").headers()[RETRY_AFTER], header);
        }
    }
}
