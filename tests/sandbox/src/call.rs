//! A call to the Ads API, and the responses that several modules share.

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Listener;
use super::reply::{self, Body};

/// A DSP advertiser, a global account, or an AMC account.
pub(super) const ACCOUNT_ID: &str = "amazon-ads-accountid";

/// A call that passed every check.
pub(super) struct Passed<'a> {
    pub(super) listener: Listener,
    pub(super) method: &'a Method,
    /// The path's segments without empty ones: Amazon's own samples contain `//sp/campaigns/list`.
    pub(super) path: &'a [&'a str],
    pub(super) query: &'a str,
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a Bytes,
    /// The advertiser that the request acts for: [`super::catalogue::Advertiser::id`].
    pub(super) advertiser: String,
    /// The profile in the Scope header, if the family uses it.
    pub(super) profile: Option<u64>,
    /// The time at which it arrived.
    pub(super) now: Timestamp,
}

/// A call that one of the Ads listeners received.
pub(super) struct Arrived<'a> {
    pub(super) listener: Listener,
    /// The port that received it.
    pub(super) port: u16,
    pub(super) head: &'a Parts,
    pub(super) target: &'a str,
    /// The kept part of the body.
    pub(super) body: &'a Bytes,
    pub(super) body_len: u64,
    pub(super) body_sha256: &'a str,
}

/// `{"code","details","requestId"}`, the most common of Amazon's error formats.
pub(super) fn coded(status: StatusCode, details: &str) -> Response<Body> {
    let body = json!({ "code": status.as_str(), "details": details, "requestId": super::request_id() });
    reply::json(status, &body)
}

/// The gateway's response to an unknown or expired token.
pub(super) fn unauthorized() -> Response<Body> {
    reply::json(StatusCode::UNAUTHORIZED, &json!({ "message": "Unauthorized" }))
}

/// Why a call is rejected.
pub(super) enum Refused {
    /// The token is unknown or expired.
    Unauthorized,
    /// The gateway could not parse the request: 403 with this message.
    Gateway(String),
    /// A service rejected it with this status and these details.
    Coded(StatusCode, String),
}

impl Refused {
    pub(super) fn coded(status: StatusCode, details: &str) -> Self {
        Self::Coded(status, details.to_owned())
    }

    pub(super) fn response(self) -> Response<Body> {
        match self {
            Self::Unauthorized => unauthorized(),
            Self::Gateway(message) => reply::json(StatusCode::FORBIDDEN, &json!({ "message": message })),
            Self::Coded(status, details) => coded(status, &details),
        }
    }
}

/// The value of the account header, for families that use one instead of a profile.
pub(super) fn account_id<'a>(call: &Passed<'a>) -> Option<&'a str> {
    call.headers.get(ACCOUNT_ID).and_then(|value| value.to_str().ok())
}

/// The body as JSON; an empty one is `{}`.
pub(super) fn body_of(call: &Passed<'_>) -> Option<Value> {
    if call.body.is_empty() { Some(json!({})) } else { serde_json::from_slice(call.body).ok() }
}

/// The response to a body that is not JSON.
pub(super) fn malformed() -> Response<Body> {
    coded(StatusCode::BAD_REQUEST, "The request body is no valid JSON")
}

/// A link in the format of S3: signed in the query, and to be requested without an `Authorization` header.
pub(super) fn presigned(id: &str) -> String {
    format!(
        "https://offline-report-storage-us-east-1-prod.s3.amazonaws.com/{id}/report-{id}.json.gz\
         ?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20261122T000000Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600\
         &X-Amz-Credential=SANDBOX%2F20261122%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Signature={}",
        "0f1e2d3c4b5a69788796a5b4c3d2e1f0".repeat(2),
    )
}
