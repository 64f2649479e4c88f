//! A token endpoint for SDKs that insist on fetching a token. It returns a placeholder; the proxy replaces whatever
//! bearer token a request carries.

use std::time::Duration;

use http::header::{CONTENT_TYPE, HeaderMap};
use http::request::Parts;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::responses::json as answer_json;
use super::{FullResponse, LoginError};
use crate::inbound::admission::{Admission, Refusal};

/// A token request is a few hundred bytes.
const MAX_BODY: usize = 64 << 10;
/// Timeout of the request's body, which normally arrives together with its head.
const PATIENCE: Duration = Duration::from_secs(10);
/// The placeholder token, if no caller token is configured.
const PLACEHOLDER: &str = "adsidecar-attaches-the-real-token";

/// Answers as LWA does. Where caller tokens are set, the SDK's `client_secret` has to be one, unless its headers show
/// one as on every other call (HTTP Basic among them: its password is the client secret, RFC 6749, section 2.3.1). It
/// comes back as the placeholder, so that the SDK's next calls carry it as their bearer.
pub(super) async fn serve(admission: &Admission, parts: &Parts, body: Incoming) -> Result<FullResponse, LoginError> {
    let headers = &parts.headers;
    let body = tokio::time::timeout(PATIENCE, Limited::new(body, MAX_BODY).collect()).await;
    let body =
        body.map_err(|_| LoginError::Parameter("The token request's body did not arrive within 10 seconds.".into()))?;
    let body = body.map_err(|_| LoginError::Parameter("A token request is at most 64 KiB.".into()))?.to_bytes();
    let token = if admission.needs_caller_token() {
        let secrets = [client_secret(headers, &body), in_query(parts.uri.query())];
        let known = secrets.into_iter().flatten().find(|secret| admission.is_caller_token(secret.as_bytes()));
        let shown = || admission.shown_token(headers).and_then(|token| String::from_utf8(token).ok());
        known.or_else(shown).ok_or(LoginError::Refused(Refusal::Caller))?
    } else {
        PLACEHOLDER.to_owned()
    };
    Ok(answer_json(
        http::StatusCode::OK,
        &json!({ "access_token": token, "refresh_token": PLACEHOLDER, "token_type": "bearer", "expires_in": 3600 }),
    ))
}

fn in_query(query: Option<&str>) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query?.as_bytes());
    pairs.find(|(name, _)| name == "client_secret").map(|(_, value)| value.into_owned())
}

/// `client_secret` of a form or of a JSON object.
fn client_secret(headers: &HeaderMap, body: &[u8]) -> Option<String> {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind.to_ascii_lowercase().contains("json") {
        let value: Value = serde_json::from_slice(body).ok()?;
        return value["client_secret"].as_str().map(str::to_owned);
    }
    url::form_urlencoded::parse(body).find(|(name, _)| name == "client_secret").map(|(_, value)| value.into_owned())
}
