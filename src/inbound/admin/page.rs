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
use crate::domain::grant::State;
use crate::inbound::admission::is_loopback;
use crate::throttle::BucketStatus;

/// The page loads nothing, runs nothing, sends nothing, and may not be framed.
const POLICY: &str = "default-src 'none'; style-src 'sha256-teTQxtI+4pqNDyTh0fy86uW97eAew2RUI7Iq/W2DD3I='; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b1f24}\
h1{font-size:1.4rem}h1 small{color:#57606a;font-weight:400}\
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.4rem .7rem;border-bottom:1px solid #d0d7de;vertical-align:top}\
th{color:#57606a;font-weight:600}td small{color:#57606a;display:block}\
.ok{color:#116329}.wait{color:#7d4e00}.bad{color:#b3261e;font-weight:600}footer{color:#57606a;margin-top:1.5rem}";
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
                    meta name="viewport" content="width=device-width";
                    title { "adsidecar" }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    h1 { "adsidecar " small { (env!("CARGO_PKG_VERSION")) } }
                    (self.process())
                    (table(&users, now, self.login_base.as_deref()))
                    @if users.len() > MAX_ROWS {
                        p { "There are more: see " code { "adsidecar users list" } "." }
                    }
                    (limits(&self.throttle.status()))
                    (self.about_links(headers))
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

    /// Explains why there are no login links, or where they work: a browser's login is bound to the host name under which it
    /// started.
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

fn table(users: &[Status], now: Timestamp, login_base: Option<&str>) -> Markup {
    html! {
        table {
            tr {
                th { "User" } th { "State" } th { "Token expires" } th { "Next refresh" } th { "Consent expires" }
                th { "Last error" } th { "Log in" }
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
        }
    }
}

/// What Amazon was seen to allow. Nothing as long as it has refused no request.
fn limits(buckets: &[BucketStatus]) -> Markup {
    html! {
        @if !buckets.is_empty() {
            h1 { "Limits of Amazon's" }
            table {
                tr {
                    th { "Region" } th { "API family" } th { "Kind" } th { "Learned rate" } th { "Paused for" }
                    th { "Waiting" } th { "Refused so far" }
                }
                @for bucket in buckets.iter().take(MAX_ROWS) {
                    tr {
                        td { (bucket.name.region.as_str()) }
                        td { (bucket.name.family.name) }
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
