//! The status page: what an operator sees and does in a browser. It is rendered on the server; the one script, which
//! adsidecar serves too, only refreshes a part of a page and copies texts, and without it everything else works.
//!
//! Each page is a file. `actions` holds the forms, which another origin can neither read nor send.

mod accounts;
mod actions;
mod calls;
mod charts;
mod overview;
mod settings;
mod throttle;
mod users;
mod view;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Response, StatusCode};
use jiff::Timestamp;
use maud::{Markup, html};
use url::{Url, form_urlencoded};

use self::actions::{Form, FormKey};
pub(super) use self::view::View;
use self::view::{Action, FOLDER, PAGES};
use super::{Admin, AdminResponse, other_method};
use crate::domain::account::UserId;
use crate::inbound::admission::without_port;
use crate::inbound::look::{self, Confined};
use crate::inbound::oauth::prefers_html;
use crate::inbound::problem::{Code, Problem};
use crate::server::CallerBody;
use crate::telemetry::hour::Hour;

/// What all pages need for as long as the process lives.
#[derive(Debug, Default)]
pub struct PageState {
    /// Proves that a form comes from one of our pages.
    pub key: FormKey,
    /// For the charts.
    pub hour: Hour,
}

/// A configuration key with its effective value, as the page shows it. A secret's value is `…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// `section.key`, or `account` for an account.
    pub key: &'static str,
    /// The value as TOML; for an account its keys, one in each line.
    pub value: String,
    /// Where the value was given; `None` for a default.
    pub source: Option<String>,
    /// Whether only a restart can change it.
    pub needs_restart: bool,
}

const SCRIPT: &str = include_str!("script.js");
/// The parameters of a page. A browser's form sends empty fields too, which count as absent.
struct Query(Vec<(String, String)>);

impl Query {
    fn read(query: Option<&str>) -> Self {
        let pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        let pairs = pairs.map(|(name, value)| (name.into_owned(), value.into_owned()));
        Self(pairs.filter(|(_, value)| !value.is_empty()).collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(each, _)| each == name).map(|(_, value)| value.as_str())
    }

    fn text(&self, name: &str) -> &str {
        self.get(name).unwrap_or_default()
    }

    fn user(&self) -> Result<Option<UserId>, Problem> {
        self.get("user_id").map(parse_user).transpose()
    }
}

fn parse_user(name: &str) -> Result<UserId, Problem> {
    name.parse().map_err(|_| {
        Problem::new(
            Code::BadRequest,
            format!("A user id is {}.", UserId::LEGAL),
            "Correct the user id, then send it again.",
        )
    })
}

/// The request that a page answers.
struct Context<'a> {
    admin: &'a Admin,
    view: View,
    query: Query,
    headers: &'a HeaderMap,
    now: Timestamp,
}

impl Admin {
    /// Serves an admitted request to the page, whose input was checked.
    pub(super) async fn serve_page(
        &self,
        view: View,
        parts: &Parts,
        body: CallerBody,
    ) -> Result<AdminResponse, Problem> {
        if let View::OtherMethod(allow) = view {
            return Err(other_method(allow));
        }
        if view == View::Script {
            return Ok(script());
        }
        let query = Query::read(parts.uri.query());
        let context = Context { admin: self, view, query, headers: &parts.headers, now: self.clock.now() };
        let served = match view {
            View::Act(action) => Box::pin(context.act(action, body)).await,
            _ => context.show().await,
        };
        match served {
            Err(problem) if prefers_html(&parts.headers) => Ok(context.failure(&problem)),
            served => served,
        }
    }
}

impl Context<'_> {
    async fn show(&self) -> Result<AdminResponse, Problem> {
        let is_part = self.query.get("part").is_some();
        let content = match self.view {
            View::Overview if is_part => return Ok(part(&self.overview_part().await)),
            View::Calls if is_part => return Ok(part(&self.call_rows()?)),
            View::Throttle if is_part => return Ok(part(&self.throttle_part())),
            View::Overview => self.overview().await,
            View::Users => self.users().await?,
            View::Accounts => self.accounts().await?,
            View::Calls => self.calls()?,
            View::Throttle => self.throttle(),
            View::Settings => self.settings()?,
            View::Login => return self.to_consent(),
            View::Script | View::Act(_) | View::OtherMethod(_) => html! {},
        };
        Ok(self.page(StatusCode::OK, &content))
    }

    /// A whole page with `content` as its main part.
    fn page(&self, status: StatusCode, content: &Markup) -> AdminResponse {
        let title = PAGES.iter().find(|(view, _)| *view == self.view).map_or("Status", |(_, name)| name);
        let head = html! { script src=(self.link(View::Script)) defer {} };
        let body = html! {
            a class="skip" href="#main" { "Skip to the content" }
            header class="top" {
                strong { "adsidecar" }
                small { (env!("CARGO_PKG_VERSION")) }
                nav aria-label="Pages" {
                    @for (view, name) in PAGES {
                        a href=(self.link(view)) aria-current=[(view == self.view).then_some("page")] { (name) }
                    }
                }
            }
            main id="main" tabindex="-1" {
                (content)
                footer {
                    span data-as-of="" { "As of " (time(self.now)) "." } " " a href=(self.link(self.view)) { "Refresh" }
                    " " span data-say="" role="status" {}
                }
            }
        };
        let page = look::document(&format!("{title} · adsidecar"), &head, &body);
        html_response(status, &page, Confined::Live)
    }

    /// The page for an action or a search that failed.
    fn failure(&self, problem: &Problem) -> AdminResponse {
        let id = self.admin.request_ids.of(self.headers);
        let content = html! {
            h1 { "That did not work" }
            p class="notice bad" { (problem.detail()) }
            p { (problem.next_step()) }
            p { a class="button" href=(self.link(self.back())) { "Back" } }
            p class="soft" { "Code: " code { (problem.code().as_str()) } }
        };
        let mut response = self.page(problem.code().status(), &content);
        let mut headers = problem.clone().respond(id.to_str().unwrap_or_default()).headers().clone();
        headers.remove(CONTENT_TYPE);
        response.headers_mut().extend(headers);
        response
    }

    /// The page from which the request came.
    fn back(&self) -> View {
        match self.view {
            View::Act(action) => action.page(),
            View::Login => View::Users,
            view => view,
        }
    }

    /// Where the pages lie: below `/`, or below the public URL for who uses that.
    fn base(&self) -> &str {
        let host = self.headers.get(HOST).and_then(|host| without_port(host.to_str().ok()?)).unwrap_or_default();
        let public = self.admin.public_url.as_ref();
        let public = public.filter(|url| url.host_str().is_some_and(|name| name.eq_ignore_ascii_case(host)));
        public.map_or("/", Url::as_str)
    }

    fn link(&self, view: View) -> String {
        self.link_with(view, &[])
    }

    /// The link to a page with these parameters; empty ones are left out.
    fn link_with(&self, view: View, parameters: &[(&str, &str)]) -> String {
        let base = self.base();
        let slash = if base.ends_with('/') { "" } else { "/" };
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(parameters.iter().filter(|(_, value)| !value.is_empty()));
        let (query, path) = (query.finish(), view.path());
        let mark = if query.is_empty() { "" } else { "?" };
        format!("{base}{slash}{path}{mark}{query}")
    }

    /// A button that sends an action at once.
    fn action_form(&self, action: Action, fields: &[(&str, &str)], button: &Markup) -> Markup {
        html! {
            form method="post" action=(self.action_link(action)) {
                (self.key_field())
                @for (name, value) in fields { input type="hidden" name=(name) value=(value); }
                (button)
            }
        }
    }

    fn action_link(&self, action: Action) -> String {
        let base = self.base();
        let slash = if base.ends_with('/') { "" } else { "/" };
        format!("{base}{slash}{}{}", FOLDER.trim_start_matches('/'), action.name())
    }

    fn key_field(&self) -> Markup {
        html! { input type="hidden" name=(Form::KEY) value=(self.admin.page_state.key.text()); }
    }

    /// What an action that ended well says on the page to which it leads.
    fn notice(&self) -> Result<Markup, Problem> {
        let Some(did) = self.query.get("did") else { return Ok(html! {}) };
        let user = self.query.user()?;
        let text = Action::named(did).map(|action| action.done(user.as_ref()));
        let text = text.ok_or_else(|| bad_parameter("did", "the name of an action"))?;
        Ok(html! { p class="notice" role="status" { (text) } })
    }

    /// The link that starts a user's login, where a browser can begin one.
    fn login_url(&self, user: &UserId) -> Option<String> {
        let name: String = form_urlencoded::byte_serialize(user.as_str().as_bytes()).collect();
        self.admin.login_base.as_ref().map(|base| format!("{base}{name}"))
    }

    fn login_link(&self, user: &UserId) -> Markup {
        html! {
            @match self.login_url(user) {
                Some(url) => { a href=(url) { "Log in " span class="soft" { (user) } } }
                None => { "–" }
            }
        }
    }

    /// Leads to the consent page: a redirect in response to a form would be one that its policy refuses.
    fn to_consent(&self) -> Result<AdminResponse, Problem> {
        // Nobody is logged in by default who was not named.
        let user = self.query.user()?.ok_or_else(|| bad_parameter("user_id", "the name of a user"))?;
        let url = self.login_url(&user).ok_or_else(|| {
            Problem::new(
                Code::BadRequest,
                "A browser cannot begin a login here.",
                "Let your app request the login URL.",
            )
        })?;
        let head = html! { meta http-equiv="refresh" content={ "0;url=" (url) }; };
        let body = html! {
            main class="alone" {
                h1 { "To Amazon" }
                p { "You are sent to Login with Amazon, to log in user " strong { (user) } "." }
                p { a class="button" href=(url) { "Continue" } }
            }
        };
        Ok(html_response(StatusCode::OK, &look::document("To Amazon", &head, &body), Confined::Live))
    }

    /// A part of the page that the script refreshes, and the button that stops that.
    fn live(&self, content: &Markup) -> Markup {
        html! { div data-live=(self.link_with(self.view, &[("part", "true")])) data-every="5" { (content) } }
    }
}

fn bad_parameter(name: &str, legal: &str) -> Problem {
    Problem::new(Code::BadRequest, format!("{name} must be {legal}."), "Send the parameter as described.")
}

/// The button that stops and continues the live part of a page. Without the script there is none.
fn pause_button() -> Markup {
    html! { button type="button" class="scripted" data-pause="" { "Pause" } }
}

/// A button that copies `text`.
fn copy_button(text: &str, what: &str) -> Markup {
    html! {
        button type="button" class="scripted" data-copy=(text) aria-label={ "Copy " (what) ": " (text) } { "Copy" }
    }
}

/// A time, and how far away it is.
fn time_and_distance(at: Option<Timestamp>, now: Timestamp) -> Markup {
    html! {
        @match at {
            None => { "–" }
            Some(at) => { (distance(at.duration_since(now).as_secs())) " " small class="plain" { (time(at)) } }
        }
    }
}

fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// `in 42 min`, `3 d ago`.
fn distance(seconds: i64) -> String {
    let (size, unit) = match seconds.unsigned_abs() {
        s @ 0..120 => (s, "s"),
        s @ 120..7200 => (s / 60, "min"),
        s @ 7200..172_800 => (s / 3600, "h"),
        s => (s / 86_400, "d"),
    };
    if seconds < 0 { format!("{size} {unit} ago") } else { format!("in {size} {unit}") }
}

fn html_response(status: StatusCode, page: &Markup, confined: Confined) -> AdminResponse {
    let mut response = Response::new(super::bytes(page.0.clone()));
    *response.status_mut() = status;
    look::add_headers(response.headers_mut(), confined);
    response
}

/// A part of a page, which the script puts into it.
fn part(content: &Markup) -> AdminResponse {
    html_response(StatusCode::OK, content, Confined::Still)
}

fn script() -> AdminResponse {
    let mut response = Response::new(super::bytes(Bytes::from_static(SCRIPT.as_bytes())));
    look::add_headers(response.headers_mut(), Confined::Still);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/javascript; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distance_is_shown_in_a_readable_unit() {
        for (seconds, shown) in [
            (0, "in 0 s"),
            (119, "in 119 s"),
            (3600, "in 60 min"),
            (-7200, "2 h ago"),
            (365 * 86_400, "in 365 d"),
            (-3 * 86_400, "3 d ago"),
        ] {
            assert_eq!(distance(seconds), shown);
        }
    }
}
