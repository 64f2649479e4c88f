//! The accounts, found and configured, each with the header and the URL that select it.

use maud::{Markup, html};

use super::view::Action;
use super::{Context, Query, View, bad_parameter, copy_button, distance};
use crate::auth::accounts::{Filter, Listed, Page, Status, UserAccounts};
use crate::domain::account::Region;
use crate::domain::found_account::AccountType;
use crate::inbound::problem::{Code, Problem};
use crate::store::StoreError;

/// Most accounts on the page, and most users above them.
const ROWS: usize = 100;
const USERS: usize = 20;

impl Context<'_> {
    pub(super) async fn accounts(&self) -> Result<Markup, Problem> {
        let filter = filter(&self.query)?;
        let failed = |error: StoreError| {
            Problem::new(Code::StoreUnavailable, error.to_string(), "Check the log and the store, then try again.")
        };
        let (after, base_url) = (self.query.text("after"), &self.admin.proxy_url);
        let listed = self.admin.directory.list(&filter, after, ROWS, base_url).await.map_err(failed)?;
        let Page { accounts: page, total, next, users: searched } = listed;
        let next = next.as_deref();
        Ok(html! {
            h1 { "Accounts" }
            (self.notice()?)
            (self.account_filter(&filter))
            p class="soft" { (count(total, page.len())) }
            @if !page.is_empty() { (account_table(&page)) }
            @if let Some(next) = next { p { a href=(self.next_link(next)) { "Next accounts" } } }
            h2 { "Found for" }
            @if searched.is_empty() {
                p { "Amazon was not asked yet. " a href=(self.link(View::Users)) { "Find the accounts of a user" } }
            }
            ul { @for user in searched.iter().take(USERS) { li { (self.searched(user)) } } }
        })
    }

    fn account_filter(&self, filter: &Filter) -> Markup {
        let is_filtered =
            ["q", "country", "type", "user_id", "after"].iter().any(|name| self.query.get(name).is_some());
        html! {
            form class="filter" method="get" action=(self.link(View::Accounts)) role="search" {
                label { "Name contains" input type="search" name="q" value=(self.query.text("q")) maxlength="128"; }
                label { "Country" input name="country" value=(self.query.text("country")) size="4" maxlength="2"; }
                label {
                    "Type"
                    select name="type" {
                        option value="" { "any" }
                        @for kind in AccountType::ALL {
                            option value=(kind.as_str()) selected[filter.kind == Some(kind)] { (kind.as_str()) }
                        }
                    }
                }
                label { "User" input name="user_id" value=(self.query.text("user_id")) maxlength="128"; }
                button { "Filter" }
                @if is_filtered { a href=(self.link(View::Accounts)) { "All accounts" } }
            }
        }
    }

    /// The link to the accounts behind `last`, with the same filter.
    fn next_link(&self, last: &str) -> String {
        let same = ["q", "country", "type", "user_id"].map(|name| (name, self.query.text(name)));
        let parameters: Vec<_> = same.into_iter().chain([("after", last)]).collect();
        self.link_with(View::Accounts, &parameters)
    }

    /// How the last search for a user's accounts ended.
    fn searched(&self, user: &UserAccounts) -> Markup {
        let failed = user.outcomes.iter().filter(|outcome| outcome.status == Status::Failed);
        let name = user.user_id.as_str();
        html! {
            strong { (name) } ": " (user.accounts.len()) " accounts, "
            (distance(user.synced_at.duration_since(self.now).as_secs().min(-1))) " "
            (self.action_form(Action::Sync, &[("user_id", name)], &html! {
                button aria-label={ "Find again: the accounts of " (name) } { "Find again" }
            }))
            @for outcome in failed {
                br;
                span class="wait" {
                    (outcome.region.map_or("amc", Region::as_str)) " did not answer: "
                    (outcome.detail.as_deref().or(outcome.code.as_deref()).unwrap_or("no reason"))
                }
            }
        }
    }
}

fn filter(query: &Query) -> Result<Filter, Problem> {
    let kind = query.get("type").map(str::parse).transpose();
    let kind =
        kind.map_err(|_| bad_parameter("type", "seller, vendor, agency, dsp_advertiser, manager, amc or other"))?;
    let text = |name: &str| query.get(name).map(str::to_owned);
    Ok(Filter { user: query.user()?, name: text("q"), country: text("country"), kind })
}

fn count(total: usize, shown: usize) -> String {
    match total {
        0 => "No account matches.".to_owned(),
        1 => "One account.".to_owned(),
        _ if shown < total => format!("{total} accounts, of which {shown} are shown."),
        _ => format!("{total} accounts."),
    }
}

fn account_table(accounts: &[Listed]) -> Markup {
    let or_dash = |text: Option<&str>| text.unwrap_or("–").to_owned();
    html! {
        div class="scroll" tabindex="0" role="region" aria-label="Accounts" { table class="cards" {
            thead { tr {
                th scope="col" { "Account" } th scope="col" { "Type" } th scope="col" { "Country" }
                th scope="col" { "Region" } th scope="col" { "User" } th scope="col" { "Header" }
                th scope="col" { "Base URL" }
            } }
            tbody { @for account in accounts { tr {
                th scope="row" {
                    (account.name)
                    @if account.missing_since.is_some() { small class="wait" { "Amazon does not list it any more" } }
                    @if let Some(clash) = &account.clash { small { "another account is called " (clash) " too" } }
                }
                td data-label="Type" { (or_dash(account.kind.map(AccountType::as_str))) }
                td data-label="Country" { (or_dash(account.country.as_deref())) }
                td data-label="Region" { (account.region) }
                td data-label="User" { (account.user_id) }
                td data-label="Header" { code { (account.header) } " " (copy_button(&account.header, "the header")) }
                td data-label="Base URL" { code { (account.url) } " " (copy_button(&account.url, "the URL")) }
            } } }
        } }
    }
}
