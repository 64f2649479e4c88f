//! The pages for people: the result of a login without a frontend, an error, and what listens at the address.

use bytes::Bytes;
use http::header::{HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use http_body_util::Full;
use maud::{Markup, html};
use serde_json::json;

use super::FullResponse;
use super::responses::json;
use crate::auth::login::{LoginFailure, LoginOutcome};
use crate::domain::account::{Region, UserId};
use crate::domain::headers::ERROR;
use crate::inbound::destination::LOGIN;
use crate::inbound::look::{self, Confined};
use crate::inbound::problem::Problem;

/// Most users whose login the start page offers.
const USERS: usize = 20;

/// Where the page of a login that failed leads on. Links name no host: the browser is where the login's cookie belongs.
#[derive(Debug)]
pub(super) enum WayOn {
    /// To a login of this user, at the consent page of this region if it is not the usual one.
    Login(UserId, Option<Region>),
    /// To the start page, where the person says whose login it is.
    Start,
    /// To the same callback once more: it consumed nothing.
    Reload,
}

/// The page with the result of a login. It contains nothing of the query except the checked user id.
pub(super) fn result(
    outcome: &Result<LoginOutcome, LoginFailure>,
    on: Option<WayOn>,
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
    let mut response = page(
        title,
        &html! {
            p { (text) }
            @if let Err(LoginFailure::Identity) = outcome {
                p { "Sign in as the same Amazon user, or replace the earlier connection by this one." }
            }
            @if let Err(failure) = outcome {
                (on_from(failure, on))
                (address_of(status_page))
                p class="soft" { "Code: " code { (failure.code()) } }
            } @else {
                (address_of(status_page))
            }
        },
    );
    if let Err(failure) = outcome {
        mark(&mut response, failure);
    }
    response
}

/// The links that lead on from a login that failed.
fn on_from(failure: &LoginFailure, on: Option<WayOn>) -> Markup {
    html! {
        @match on {
            Some(WayOn::Login(user, region)) => {
                p { "The login was for user " strong { (user) } "." }
                p class="line" {
                    a class="button" href=(login_path(&user, region)) { "Try again" }
                    @if let LoginFailure::Identity = failure {
                        a class="button second" href=(login_path(&user, region) + "&replace=true") { "Replace" }
                    }
                }
            }
            Some(WayOn::Start) => {
                p { "For whom it was is not known here: the next page asks." }
                p class="line" { a class="button" href="/" { "Try again" } }
            }
            // A link to nothing is one to this very URL, which is not written into the page.
            Some(WayOn::Reload) => { p class="line" { a class="button" href="" { "Try again" } } }
            None => { p { "You can close this page, and go on where you started the login." } }
        }
    }
}

fn login_path(user: &UserId, region: Option<Region>) -> String {
    let user: String = url::form_urlencoded::byte_serialize(user.as_str().as_bytes()).collect();
    let region = region.map(|region| format!("&region={region}")).unwrap_or_default();
    format!("{LOGIN}?user_id={user}{region}")
}

/// What the listener has to link to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    /// The start page.
    pub(super) start: bool,
    /// Logins that a browser can start here.
    pub(super) logins: bool,
}

/// The page with an error, for a person whose browser opened an endpoint.
pub(super) fn problem(problem: &Problem, request_id: &str, links: Links, status_page: Option<&str>) -> FullResponse {
    let shown = page(
        "That did not work",
        &html! {
            p { (problem.detail()) }
            p { (with_links(problem.next_step(), links)) }
            @if links.start || problem.is_retryable() {
                p class="line" {
                    @if problem.is_retryable() { a class="button" href="" { "Try again" } }
                    @if links.start { a class="button second" href="/" { "Start page" } }
                }
            }
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

/// The sentence, with the URLs of logins as links.
fn with_links(text: &str, links: Links) -> Markup {
    let login = |word: &str| links.logins && word.starts_with("http") && word.contains(LOGIN);
    html! {
        @for (index, word) in text.split(' ').enumerate() {
            @if index > 0 { " " }
            @if login(word) { a href=(word) { (word) } } @else { (word) }
        }
    }
}

/// The start page: what a person sees who opens the proxy listener's address. `users` are those whose login it offers,
/// or why there are no links.
pub(super) fn root(users: Result<&[&UserId], &str>, status_page: Option<&str>) -> FullResponse {
    page(
        "adsidecar",
        &html! {
            p { "Requests to this address go to the Amazon Ads API with the headers that each path needs." }
            p { "Users and their tokens: " code { "/api/auth/amazon/status" } }
            @match users {
                Ok(users) => {
                    p { "Log in, as the user:" }
                    p class="line" {
                        @for user in users.iter().take(USERS) {
                            a class="button second" href=(login_path(user, None)) { (user) }
                        }
                    }
                    p class="soft" { "Any other user: " code { (LOGIN) "?user_id=…" } }
                }
                Err(why) => { p { (why) } }
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
pub(super) fn document(failure: &LoginFailure) -> FullResponse {
    let told = json!({ "status": "error", "error": failure.code(), "code": failure.code(), "detail": say(failure) });
    let mut response = json(status(failure), &told);
    mark(&mut response, failure);
    response
}

/// Gives the response its status and the headers that programs read.
fn mark(response: &mut FullResponse, failure: &LoginFailure) {
    *response.status_mut() = status(failure);
    response.headers_mut().insert(ERROR, HeaderValue::from_static(failure.code()));
    if response.status() == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
}

/// The status of a failed login.
fn status(failure: &LoginFailure) -> StatusCode {
    match failure {
        LoginFailure::Amazon(_) | LoginFailure::Expired | LoginFailure::State | LoginFailure::Completed => {
            StatusCode::BAD_REQUEST
        }
        LoginFailure::Store => StatusCode::SERVICE_UNAVAILABLE,
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
        LoginFailure::Expired => {
            "This login has expired: it is valid for 10 minutes and for one callback. Or it never began here. Start it \
             again."
        }
        LoginFailure::State => {
            "This login was started in another browser, or its cookie is missing. Start it again in this one; a page \
             that starts it with fetch() needs `credentials: \"include\"`."
        }
        LoginFailure::Store => "adsidecar's store did not answer. Nothing was used up: try again in a moment.",
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
