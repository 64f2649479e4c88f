//! The callback's result page, for a login without a frontend.

use bytes::Bytes;
use http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::Full;
use maud::{DOCTYPE, Markup, html};
use serde_json::{Value, json};

use super::FullResponse;
use crate::auth::login::{LoginFailure, LoginOutcome};
use crate::domain::headers::ERROR;

/// The page loads nothing, runs nothing, sends nothing, and may not be framed.
const POLICY: &str = "default-src 'none'; style-src 'sha256-H7ytAUeXHaxeOH3RhzkOxEc7LmDT22BPtpCAZkn8bj0='; base-uri \
    'none'; form-action 'none'; frame-ancestors 'none'";
/// In the colours that the browser has for light and dark, and readable on a phone.
const STYLE: &str = ":root{color-scheme:light dark}\
    body{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:15vh auto;padding:0 1rem;overflow-wrap:anywhere}\
    h1{font-size:1.4rem}";

/// The page with the result of a login. It contains nothing of the query except the checked user id.
pub(super) fn result(outcome: &Result<LoginOutcome, LoginFailure>) -> FullResponse {
    let (title, text) = match outcome {
        Ok(LoginOutcome::Stored(status)) => (
            "Connected to Amazon Ads",
            format!("The grant of user {} is stored. You can close this page.", status.user_id),
        ),
        Ok(LoginOutcome::Pending(_)) => {
            ("Almost there", "The app has to confirm the grant. You can close this page.".to_owned())
        }
        Err(failure) => ("Not connected", say(failure).to_owned()),
    };
    let mut response = page(title, html! { p { (text) } });
    if let Err(failure) = outcome {
        response.headers_mut().insert(ERROR, HeaderValue::from_static(failure.code()));
        *response.status_mut() = status(failure);
    }
    response
}

/// What a person sees who opens the proxy listener's address.
pub(super) fn root(login_url: Option<&str>) -> FullResponse {
    page(
        "adsidecar",
        html! {
            p { "Requests to this address go to the Amazon Ads API with the headers that each path needs." }
            p { "Users and their tokens: " code { "/api/auth/amazon/status" } }
            @match login_url {
                Some(login_url) => { p { "To log in: " a href=(login_url) { (login_url) } } }
                None => { p { "A caller token is set, which a browser cannot send: let your app request the login \
                    URL." } }
            }
        },
    )
}

fn page(title: &str, content: Markup) -> FullResponse {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (maud::PreEscaped(STYLE)) }
            }
            body { main { h1 { (title) } (content) } }
        }
    };
    let mut response: FullResponse = Response::new(Full::new(Bytes::from(page.into_string())));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// The same result for a program, as JSON.
pub(super) fn document(failure: &LoginFailure) -> Value {
    json!({ "status": "error", "error": failure.code(), "code": failure.code(), "detail": say(failure) })
}

/// The status of a failed login.
pub(super) fn status(failure: &LoginFailure) -> StatusCode {
    match failure {
        LoginFailure::Amazon(_) | LoginFailure::State | LoginFailure::Completed => StatusCode::BAD_REQUEST,
        LoginFailure::Identity => StatusCode::CONFLICT,
        LoginFailure::Exchange => StatusCode::BAD_GATEWAY,
    }
}

/// The failure in a sentence for a person, with the remedy.
pub(super) fn say(failure: &LoginFailure) -> &'static str {
    match failure {
        LoginFailure::Amazon("access_denied") => "Consent was not given. Start the login again to change that.",
        LoginFailure::Amazon("invalid_scope") => {
            "Amazon rejects the scope for this client: the app may not be approved for the Amazon Ads API yet."
        }
        LoginFailure::Amazon(_) => "Amazon could not finish the login. Start it again in a moment.",
        LoginFailure::State => {
            "This login has expired, was started in another browser, or its cookie is missing. Start it again; a page \
             that starts it with fetch() needs `credentials: \"include\"`."
        }
        LoginFailure::Completed => "This login was completed already.",
        LoginFailure::Identity => {
            "You signed in as another Amazon user than before: none of the profiles is the same. Your earlier \
             connection is unchanged."
        }
        LoginFailure::Exchange => {
            "Amazon did not exchange the code for tokens. Start the login again; the log says why."
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_policy_allows_the_one_style_by_its_hash() {
        let hash = BASE64_STANDARD.encode(Sha256::digest(STYLE));
        assert!(POLICY.contains(&format!("'sha256-{hash}'")), "the hash is {hash}");
    }
}
