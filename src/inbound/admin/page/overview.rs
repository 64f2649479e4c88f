//! The first page: what needs a person, then the last hour, then the users, those first who need attention.

use http::header::HOST;
use maud::{Markup, html};

use super::users::{LISTED, ROWS_OF_OVERVIEW, by_urgency};
use super::{Context, View, charts, pause_button};
use crate::auth::tokens::Status;
use crate::domain::grant::{ConsentAge, State};
use crate::inbound::admin::Stage;
use crate::inbound::admission::{is_loopback, without_port};

impl Context<'_> {
    pub(super) async fn overview(&self) -> Markup {
        html! {
            h1 { "Overview" }
            (self.live(&self.overview_part().await))
            p { (pause_button()) }
            (self.about_links())
        }
    }

    /// What the script refreshes.
    pub(super) async fn overview_part(&self) -> Markup {
        let admin = self.admin;
        let mut users = admin.tokens.most_urgent(LISTED).await;
        by_urgency(&mut users);
        let minutes = admin.page_state.hour.minutes(admin.clock.uptime(), &admin.metrics);
        html! {
            (self.attention(&users))
            h2 id="hour" { "The last hour" }
            (charts::charts(&minutes))
            h2 id="users" { "Users" }
            (self.user_summary(&users))
            @if users.len() > ROWS_OF_OVERVIEW {
                p { a href=(self.link(View::Users)) { "All users" } }
            }
        }
    }

    /// The state of the process, with its class in the style.
    fn process(&self) -> (&'static str, &'static str) {
        let admin = self.admin;
        match *admin.stage.borrow() {
            Stage::Starting => ("wait", "starting"),
            Stage::Draining => ("wait", "draining: it is about to stop"),
            Stage::Serving if admin.store.shared().is_some() && admin.tokens.is_degraded() => {
                ("bad", "degraded: the database fails, valid tokens are used from memory; see the log")
            }
            Stage::Serving if !admin.tokens.stored() => ("bad", "not ready: the store fails, see the log"),
            Stage::Serving => ("ok", "ready"),
        }
    }

    /// What needs a person, before anything that works. A process that is ready may serve users who are not.
    fn attention(&self, users: &[Status]) -> Markup {
        let of = |state| users.iter().filter(|user| user.state == state).count();
        let (logins, failing) = (of(State::LoginRequired), of(State::Failing));
        let ending = users.iter().filter(|user| user.consent == Some(ConsentAge::Ending)).count();
        let paused = self.admin.throttle.status().iter().filter(|bucket| bucket.paused > 0.0).count();
        let found = |state: State| self.link_with(View::Users, &[("state", state.as_str())]);
        let (class, process) = self.process();
        let refused_reloads = usize::from(!self.admin.metrics.reload_succeeded());
        html! {
            @if logins + failing + ending + paused + refused_reloads > 0 || class != "ok" {
                h2 { "What needs you" }
                ul {
                    @if class != "ok" { li class=(class) { "This process is " (process) "." } }
                    @if refused_reloads > 0 {
                        li class="bad" {
                            "The last reload of the configuration was refused; the previous configuration stays in "
                            "use. The log says what is wrong."
                        }
                    }
                    @if logins > 0 {
                        li class="bad" {
                            (people(logins)) " to log in again. " a href=(found(State::LoginRequired)) { "Who" }
                        }
                    }
                    @if failing > 0 {
                        li class="wait" {
                            "Refreshes fail for " (users_of(failing)) ". " a href=(found(State::Failing)) { "Why" }
                        }
                    }
                    @if ending > 0 { li class="wait" { "The consent of " (users_of(ending)) " ends within 30 days." } }
                    @if paused > 0 {
                        li class="wait" {
                            "Amazon refuses requests: there were too many. "
                            a href=(self.link(View::Throttle)) { "Which" }
                        }
                    }
                }
            }
            @if class == "ok" { p { "This process is " strong class="ok" { (process) } "." } }
        }
    }

    /// Explains why there are no login links, or where they work: a browser's login is bound to the host name under
    /// which it started.
    pub(super) fn about_links(&self) -> Markup {
        let admin = self.admin;
        let host = self.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let name = without_port(host).unwrap_or_default();
        let belongs = admin.login_base.as_deref().is_some_and(|base| base.starts_with(&format!("http://{name}:")));
        html! {
            @if admin.admission.needs_caller_token() {
                p { "A caller token is set, which a browser cannot send: let your app request the login URL." }
            } @else if admin.login_base.is_none() {
                p {
                    "A login belongs to the host of " code { "amazon.redirect_uri" }
                    ": let your app request the login URL."
                }
            } @else if !is_loopback(name) {
                p {
                    "The login links lead to this machine: they work in a browser on it, or through a forwarded port."
                }
            } @else if !belongs {
                p {
                    "The login links work if this page is opened under the host name in "
                    code { "amazon.redirect_uri" } "."
                }
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
