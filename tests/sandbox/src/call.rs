//! A call to the Ads API, on its way through the sandbox, and the responses that every part of it gives.

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode};
use serde_json::{Value, json};

use super::Door;
use super::reply::{self, Body};

/// A DSP advertiser, a global account, or an AMC account.
pub(super) const ACCOUNT_ID: &str = "amazon-ads-accountid";

/// A call that passed every check.
pub(super) struct Passed<'a> {
    pub(super) door: Door,
    pub(super) method: &'a Method,
    /// The path's segments, empty ones left out: Amazon's own samples hold `//sp/campaigns/list`.
    pub(super) path: &'a [&'a str],
    pub(super) query: &'a str,
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a Bytes,
    /// On whose behalf: [`super::catalogue::Advertiser::id`].
    pub(super) advertiser: String,
    /// The profile named by the Scope header, where the family looks at it.
    pub(super) profile: Option<u64>,
}

/// What came to one of the API's doors.
pub(super) struct Arrived<'a> {
    pub(super) door: Door,
    /// The port that it came to.
    pub(super) port: u16,
    pub(super) head: &'a Parts,
    pub(super) target: &'a str,
    /// The kept part of the body.
    pub(super) body: &'a Bytes,
    pub(super) body_len: u64,
    pub(super) body_sha256: &'a str,
}

/// `{"code","details","requestId"}`, the most common of Amazon's shapes.
pub(super) fn coded(status: StatusCode, details: &str) -> Response<Body> {
    let body = json!({ "code": status.as_str(), "details": details, "requestId": super::request_id() });
    reply::json(status, &body)
}

/// What the gateway says of a token that is unknown or over.
pub(super) fn unauthorized() -> Response<Body> {
    reply::json(StatusCode::UNAUTHORIZED, &json!({ "message": "Unauthorized" }))
}

/// Why a call does not get in.
pub(super) enum Refused {
    /// The token is unknown or over.
    Unauthorized,
    /// The gateway could make nothing of it: 403 with this message.
    Gateway(String),
    /// A service refused it with this status and these details.
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

/// The value of the account header, for families that take one instead of a profile.
pub(super) fn account_id<'a>(call: &Passed<'a>) -> Option<&'a str> {
    call.headers.get(ACCOUNT_ID).and_then(|value| value.to_str().ok())
}

/// The body as JSON; an empty one as `{}`.
pub(super) fn body_of(call: &Passed<'_>) -> Option<Value> {
    if call.body.is_empty() { Some(json!({})) } else { serde_json::from_slice(call.body).ok() }
}

/// The answer to a body that is no JSON.
pub(super) fn malformed() -> Response<Body> {
    coded(StatusCode::BAD_REQUEST, "The request body is no valid JSON")
}

/// A link like those of S3: signed in the query, and not to be called with an `Authorization` header.
pub(super) fn presigned(id: &str) -> String {
    format!(
        "https://offline-report-storage-us-east-1-prod.s3.amazonaws.com/{id}/report-{id}.json.gz\
         ?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20261122T000000Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600\
         &X-Amz-Credential=SANDBOX%2F20261122%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Signature={}",
        "0f1e2d3c4b5a69788796a5b4c3d2e1f0".repeat(2),
    )
}
