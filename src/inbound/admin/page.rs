//! The status page. It is rendered on the server, and contains no script.

use http::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, Response};
use jiff::Timestamp;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{Admin, AdminResponse, Stage};
use crate::auth::tokens::Status;
use crate::domain::account::UserId;
use crate::domain::grant::{ConsentAge, State};
use crate::inbound::admission::is_loopback;
use crate::throttle::BucketStatus;

/// The page loads nothing, runs nothing, sends nothing, and may not be framed.
const POLICY: &str = "default-src 'none'; style-src 'sha256-+xXR/ACr3cPdWJjzxgz7mddJFRJos9rCa/ZGozkrFRc='; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// For light and dark, and from a phone to a wall: tables scroll by themselves.
const STYLE: &str = include_str!("style.css");
/// Seconds after which the browser reloads the page.
const RELOAD_AFTER: &str = "30";
/// Most users on the page, since a person reads it. Those who need attention come first.
const MAX_ROWS: usize = 500;
const FRAME_OPTIONS: HeaderName = HeaderName::from_static("x-frame-options");

impl Admin {
    /// Renders the page, for a request with these headers.
    pub(super) async fn page(&self, headers: &HeaderMap) -> AdminResponse {
        let now = self.clock.now();
        let mut users = self.tokens.most_urgent(MAX_ROWS + 1).await;
        users.sort_by(|a, b| a.user_id.cmp(&b.user_id));
        users.sort_by_key(|user| user.state.urgency());
        let here = self.public_url.as_ref().map_or("/", url::Url::as_str);
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="refresh" content=(RELOAD_AFTER);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { "adsidecar" }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    main {
                        h1 { "adsidecar " small { (env!("CARGO_PKG_VERSION")) } }
                        (self.process())
                        (self.attention(&users))
                        h2 id="users" { "Users" }
                        (table(&users, now, self.login_base.as_deref()))
                        @if users.len() > MAX_ROWS {
                            p { "There are more: see " code { "adsidecar users list" } "." }
                        }
                        (limits(&self.throttle.status()))
                        (self.about_links(headers))
                    }
                    footer { "As of " (time(now)) ". " a href=(here) { "Refresh" } }
                }
            }
        };
        page_response(page)
    }

    /// The state of the process.
    fn process(&self) -> Markup {
        let (class, text) = match *self.stage.borrow() {
            Stage::Starting => ("wait", "starting"),
            Stage::Draining => ("wait", "draining: it is about to stop"),
            Stage::Serving if self.store.shared().is_some() && self.tokens.is_degraded() => {
                ("bad", "degraded: the database fails, valid tokens are used from memory; see the log")
            }
            Stage::Serving if !self.tokens.stored() => ("bad", "not ready: the store fails, see the log"),
            Stage::Serving => ("ok", "ready"),
        };
        html! {
            p class=(class) { (text) }
            @if !self.metrics.reload_succeeded() {
                p class="bad" {
                    "The last reload of the configuration was refused; the previous configuration stays in use. The log says what is wrong."
                }
            }
        }
    }

    /// What needs a person, before anything that works. A process that is ready may serve users who are not.
    fn attention(&self, users: &[Status]) -> Markup {
        let of = |state| users.iter().filter(|user| user.state == state).count();
        let (logins, failing) = (of(State::LoginRequired), of(State::Failing));
        let ending = users.iter().filter(|user| user.consent == Some(ConsentAge::Ending)).count();
        html! {
            @if logins + failing + ending > 0 {
                h2 { "What needs you" }
                ul {
                    @if logins > 0 { li class="bad" { (people(logins)) " to log in again." } }
                    @if failing > 0 { li class="wait" { "Refreshes fail for " (users_of(failing)) ": see the last error." } }
                    @if ending > 0 { li class="wait" { "The consent of " (users_of(ending)) " ends within 30 days." } }
                }
            }
        }
    }

    /// Explains why there are no login links, or where they work: a browser's login is bound to the host name under
    /// which it started.
    fn about_links(&self, headers: &HeaderMap) -> Markup {
        let host = headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        html! {
            @if self.admission.needs_caller_token() {
                p { "A caller token is set, which a browser cannot send: let your app request the login URL." }
            } @else if self.login_base.is_none() {
                p { "A login belongs to the host of " code { "amazon.redirect_uri" } ": let your app request the login URL." }
            } @else if !is_loopback(name) {
                p { "The login links lead to this machine: they work in a browser on it, or through a forwarded port." }
            }
        }
    }
}

fn people(count: usize) -> String {
    if count == 1 { "One user has".to_owned() } else { format!("{count} users have") }
}

fn users_of(count: usize) -> String {
    if count == 1 { "one user".to_owned() } else { format!("{count} users") }
}

fn table(users: &[Status], now: Timestamp, login_base: Option<&str>) -> Markup {
    html! {
        div class="scroll" tabindex="0" role="region" aria-labelledby="users" { table {
            tr {
                th scope="col" { "User" } th scope="col" { "State" } th scope="col" { "Token expires" } th scope="col" { "Next refresh" } th scope="col" { "Consent expires" }
                th scope="col" { "Last error" } th scope="col" { "Log in" }
            }
            @if users.is_empty() {
                tr {
                    td colspan="6" { "Nobody has logged in yet." }
                    td { (login_link(&UserId::default(), login_base)) }
                }
            }
            @for user in users.iter().take(MAX_ROWS) {
                tr {
                    td { (user.user_id) }
                    td class=(class(user.state)) { (user.state.as_str()) }
                    td { (time_and_distance(user.expires_at, now)) }
                    td { (time_and_distance(user.next_refresh_at, now)) }
                    td { (time_and_distance(user.consent_expires_at, now)) }
                    td { (user.last_error.unwrap_or("–")) }
                    td { (login_link(&user.user_id, login_base)) }
                }
            }
        } }
    }
}

/// What Amazon was seen to allow. Nothing as long as it has refused no request.
fn limits(buckets: &[BucketStatus]) -> Markup {
    html! {
        @if !buckets.is_empty() {
            h2 id="limits" { "Limits of Amazon's" }
            table {
                tr {
                    th scope="col" { "Region" } th scope="col" { "API family" } th scope="col" { "Kind" } th scope="col" { "Learned rate" } th scope="col" { "Paused for" }
                    th scope="col" { "Waiting" } th scope="col" { "Refused so far" }
                }
                @for bucket in buckets.iter().take(MAX_ROWS) {
                    tr {
                        td { (bucket.name.region.as_str()) }
                        td { (bucket.name.group) }
                        td { (bucket.name.kind.as_str()) }
                        td { (format!("{:.1} per second", bucket.rate)) }
                        @if bucket.paused > 0.0 {
                            td class="wait" { (format!("{:.0} s", bucket.paused.ceil())) }
                        } @else {
                            td class="ok" { "–" }
                        }
                        td { (bucket.waiting) }
                        td { (bucket.refusals) }
                    }
                }
            }
        }
    }
}

fn login_link(user: &UserId, base: Option<&str>) -> Markup {
    let name: String = url::form_urlencoded::byte_serialize(user.as_str().as_bytes()).collect();
    html! {
        // Where a browser cannot begin a login there is no link.
        @match base {
            Some(base) => { a href={ (base) (name) } { "log in" } }
            None => { "–" }
        }
    }
}

fn class(state: State) -> &'static str {
    match state {
        State::LoginRequired => "bad",
        State::Failing | State::Expiring => "wait",
        State::Fresh | State::Idle | State::None => "ok",
    }
}

/// A time, and how far away it is.
fn time_and_distance(at: Option<Timestamp>, now: Timestamp) -> Markup {
    html! {
        @match at {
            None => { "–" }
            Some(at) => { (distance(at.duration_since(now).as_secs())) small { (time(at)) } }
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

fn page_response(page: Markup) -> AdminResponse {
    let mut response = Response::new(super::bytes(page.into_string()));
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
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
