//! The users: how each one's grant is, and what can be done about it.

use maud::{Markup, html};

use super::view::Action;
use super::{Context, View, bad_parameter, copy_button, time_and_distance};
use crate::auth::tokens::Status;
use crate::domain::account::UserId;
use crate::domain::grant::State;
use crate::inbound::problem::Problem;

/// Most users on the first page, since a person reads it.
pub(super) const ROWS_OF_OVERVIEW: usize = 50;
/// Most users on the page of users.
const ROWS: usize = 100;
/// Most users of a shared store that the first page reads, those first whose refresh failed. It reads them every few
/// seconds as long as it is open.
pub(super) const LISTED: usize = 500;
/// Most users of a shared store that a search reads.
const SEARCHED: usize = 5000;

/// Sorts by name, those first who need attention.
pub(super) fn by_urgency(users: &mut [Status]) {
    users.sort_by(|a, b| a.user_id.cmp(&b.user_id));
    users.sort_by_key(|user| user.state.urgency());
}

impl Context<'_> {
    pub(super) async fn users(&self) -> Result<Markup, Problem> {
        let state = match self.query.get("state") {
            Some(name) => Some(
                State::KNOWN
                    .into_iter()
                    .find(|state| state.as_str() == name)
                    .ok_or_else(|| bad_parameter("state", "fresh, expiring, failing, idle or login_required"))?,
            ),
            None => None,
        };
        let users = self.found_users(state).await;
        Ok(html! {
            h1 { "Users" }
            (self.notice()?)
            form class="filter" method="get" action=(self.link(View::Users)) role="search" {
                label { "Name contains" input type="search" name="q" value=(self.query.text("q")) maxlength="128"; }
                label {
                    "State"
                    select name="state" {
                        option value="" { "any" }
                        @for each in State::KNOWN {
                            option value=(each.as_str()) selected[state == Some(each)] { (each.as_str()) }
                        }
                    }
                }
                button { "Filter" }
                @if !self.query.text("q").is_empty() || state.is_some() {
                    a href=(self.link(View::Users)) { "All users" }
                }
            }
            p class="soft" { (self.count(users.len())) }
            @if !users.is_empty() { (self.user_table(&users)) }
            (self.login_form())
            (self.about_links())
        })
    }

    /// The users that match the filter. One whose whole name is searched for is found in a shared store of any size.
    async fn found_users(&self, state: Option<State>) -> Vec<Status> {
        let tokens = &self.admin.tokens;
        let text = self.query.text("q").to_lowercase();
        let mut users = tokens.most_urgent(SEARCHED).await;
        let named = self.query.get("q").and_then(|name| name.parse::<UserId>().ok());
        if let Some(user) = named.filter(|user| users.iter().all(|status| status.user_id != *user)) {
            // If the shared store fails, what this process knows counts.
            let _ = Box::pin(tokens.look(&user)).await;
            users.extend(Some(tokens.status(&user)).filter(|status| status.state != State::None));
        }
        users.retain(|user| {
            state.is_none_or(|state| user.state == state) && user.user_id.as_str().to_lowercase().contains(&text)
        });
        by_urgency(&mut users);
        users
    }

    fn count(&self, count: usize) -> String {
        match count {
            0 if self.query.0.iter().all(|(name, _)| name == "did" || name == "user_id") => {
                "Nobody has logged in yet.".to_owned()
            }
            0 => "No user matches.".to_owned(),
            1 => "One user.".to_owned(),
            _ if count > ROWS => format!("{count} users, of which {ROWS} are shown: search for the others."),
            _ => format!("{count} users."),
        }
    }

    fn user_table(&self, users: &[Status]) -> Markup {
        html! {
            div class="scroll" tabindex="0" role="region" aria-label="Users" { table class="cards" {
                (heads("Actions"))
                tbody { @for user in users.iter().take(ROWS) { tr {
                    th scope="row" {
                        (user.user_id) small { code { "X-Ads-User: " (user.user_id) } }
                        (copy_button(&format!("X-Ads-User: {}", user.user_id), "the header"))
                    }
                    (self.facts(user))
                    td class="actions" { (self.actions(user)) }
                } } }
            } }
        }
    }

    /// The cells about a user's grant.
    fn facts(&self, user: &Status) -> Markup {
        html! {
            td data-label="State" { span class=(class(user.state)) { (user.state.as_str()) } }
            td data-label="Token expires" { (time_and_distance(user.expires_at, self.now)) }
            td data-label="Next refresh" { (time_and_distance(user.next_refresh_at, self.now)) }
            td data-label="Consent expires" { (time_and_distance(user.consent_expires_at, self.now)) }
            td data-label="Last error" { (user.last_error.unwrap_or("–")) }
        }
    }

    fn actions(&self, user: &Status) -> Markup {
        let name = user.user_id.as_str();
        let fields = [("user_id", name)];
        let button = |text: &str| html! { button aria-label={ (text) " " (name) } { (text) } };
        html! {
            @if let Some(url) = self.login_url(&user.user_id) {
                a href=(url) aria-label={ "Log in " (name) } { "Log in" }
            }
            (self.action_form(Action::Refresh, &fields, &button("Refresh")))
            (self.action_form(Action::Sync, &fields, &button("Find accounts")))
            details {
                summary aria-label={ "Log out " (name) } { "Log out" }
                p { "Deletes the tokens of " (name) ": requests fail until somebody logs in again." }
                (self.action_form(Action::Logout, &fields, &html! {
                    button class="danger" aria-label={ "Delete the tokens of " (name) } { "Delete the tokens" }
                }))
            }
        }
    }

    /// The users of the first page, without actions.
    pub(super) fn user_summary(&self, users: &[Status]) -> Markup {
        html! {
            @if users.is_empty() {
                p { "Nobody has logged in yet. " (self.login_link(&UserId::default())) }
            } @else {
                div class="scroll" tabindex="0" role="region" aria-label="Users" { table class="cards" {
                    (heads("Log in"))
                    tbody { @for user in users.iter().take(ROWS_OF_OVERVIEW) { tr {
                        th scope="row" { (user.user_id) }
                        (self.facts(user))
                        td { (self.login_link(&user.user_id)) }
                    } } }
                } }
            }
        }
    }

    /// The form that begins the login of a user of any name.
    fn login_form(&self) -> Markup {
        html! {
            @if self.admin.login_base.is_some() {
                h2 { "Log in a user" }
                form class="filter" method="get" action=(self.link(View::Login)) {
                    label {
                        "User id"
                        input name="user_id" required placeholder="default" maxlength="128" autocomplete="off";
                    }
                    button { "Log in with Amazon" }
                }
            }
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

/// The heads of a table of users, of which `last` is what can be done there.
fn heads(last: &str) -> Markup {
    html! {
        thead { tr {
            th scope="col" { "User" } th scope="col" { "State" } th scope="col" { "Token expires" }
            th scope="col" { "Next refresh" } th scope="col" { "Consent expires" }
            th scope="col" { "Last error" } th scope="col" { (last) }
        } }
    }
}
