//! The pages for people: the result of a login without a frontend, an error, and what listens at the address.

use bytes::Bytes;
use http::header::HeaderValue;
use http::{Response, StatusCode};
use http_body_util::Full;
use maud::{Markup, html};
use serde_json::{Value, json};

use super::FullResponse;
use crate::auth::login::{LoginFailure, LoginOutcome};
use crate::domain::headers::ERROR;
use crate::inbound::look::{self, Confined};
use crate::inbound::problem::Problem;

/// The page with the result of a login. It contains nothing of the query except the checked user id. `again` is the URL
/// that starts the login again, if the browser that ended it is the one that started it.
pub(super) fn result(
    outcome: &Result<LoginOutcome, LoginFailure>,
    again: Option<String>,
    status_page: Option<&str>,
) -> FullResponse {
    let (title, text) = match outcome {
        Ok(LoginOutcome::Stored(status)) => (
            "Connected to Amazon Ads",
            html! { "The grant of user " strong { (status.user_id) } " is stored. You can close this page." },
        ),
        Ok(LoginOutcome::Pending(_)) => {
            ("Almost there", html! { "The app has to confirm the grant. You can close this page." })
        }
        Err(failure) => ("Not connected", html! { (say(failure)) }),
    };
    let again = again.filter(|_| outcome.is_err());
    let replace = again.as_ref().filter(|_| matches!(outcome, Err(LoginFailure::Identity)));
    let replace = replace.map(|url| format!("{url}&replace=true"));
    let mut response = page(
        title,
        &html! {
            p { (text) }
            @if let Err(LoginFailure::Identity) = outcome {
                p { "Try again and sign in as the same Amazon user, or replace the earlier connection by this one." }
            }
            @if let Some(url) = &again {
                p class="line" {
                    a class="button" href=(url) { "Try again" }
                    @if let Some(url) = &replace { a class="button second" href=(url) { "Replace" } }
                }
            }
            (address_of(status_page))
            @if let Err(failure) = outcome { p class="soft" { "Code: " code { (failure.code()) } } }
        },
    );
    if let Err(failure) = outcome {
        response.headers_mut().insert(ERROR, HeaderValue::from_static(failure.code()));
        *response.status_mut() = status(failure);
    }
    response
}

/// The page with an error, for a person whose browser opened an endpoint.
pub(super) fn problem(problem: &Problem, request_id: &str, status_page: Option<&str>) -> FullResponse {
    let shown = page(
        "That did not work",
        &html! {
            p { (problem.detail()) }
            p { (problem.next_step()) }
            (address_of(status_page))
            p class="soft" { "Code: " code { (problem.code().as_str()) } ", request id: " code { (request_id) } }
        },
    );
    let (page, body) = shown.into_parts();
    let mut response = problem.clone().respond(request_id);
    *response.body_mut() = body;
    response.headers_mut().extend(page.headers);
    response
}

/// What a person sees who opens the proxy listener's address.
pub(super) fn root(login_url: Option<&str>, status_page: Option<&str>) -> FullResponse {
    page(
        "adsidecar",
        &html! {
            p { "Requests to this address go to the Amazon Ads API with the headers that each path needs." }
            p { "Users and their tokens: " code { "/api/auth/amazon/status" } }
            @match login_url {
                Some(login_url) => { p { "To log in: " a href=(login_url) { (login_url) } } }
                None => {
                    p { "A caller token is set, which a browser cannot send: let your app request the login URL." }
                }
            }
            (address_of(status_page))
        },
    )
}

/// The address of the status page, to type or to copy: it refuses browsers that come from a page of another origin.
fn address_of(status_page: Option<&str>) -> Markup {
    html! { @if let Some(url) = status_page { p { "All users are on the status page: " code { (url) } } } }
}

fn page(title: &str, content: &Markup) -> FullResponse {
    let body = html! { main class="alone" { h1 { (title) } (content) } };
    let page = look::document(title, &html! {}, &body);
    let mut response: FullResponse = Response::new(Full::new(Bytes::from(page.into_string())));
    look::add_headers(response.headers_mut(), Confined::Still);
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
