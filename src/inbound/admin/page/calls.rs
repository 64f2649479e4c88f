//! The latest calls to Amazon, as a live tail: from memory, bounded, without paths and queries.

use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};

use super::{Context, View, bad_parameter, pause_button};
use crate::inbound::problem::Problem;
use crate::telemetry::audit::{Fault, milliseconds};
use crate::telemetry::metrics::RecentCall;

/// Most calls on the page.
const ROWS: usize = 100;
/// The filters, with their labels.
const ONLY: [(&str, &str); 5] = [
    ("failures", "failures"),
    ("caller", "the caller's failures"),
    ("operator", "the operator's failures"),
    ("sidecar", "adsidecar's failures"),
    ("amazon", "Amazon's failures"),
];

impl Context<'_> {
    pub(super) fn calls(&self) -> Result<Markup, Problem> {
        let only = self.query.text("only");
        let part = self.link_with(View::Calls, &[("only", only), ("part", "true")]);
        Ok(html! {
            h1 { "Calls" }
            p class="soft" {
                "The latest calls to Amazon, newest first. They are kept in memory only, without path and query."
            }
            form class="filter" method="get" action=(self.link(View::Calls)) {
                label {
                    "Show"
                    select name="only" {
                        option value="" { "all calls" }
                        @for (value, text) in ONLY { option value=(value) selected[only == value] { (text) } }
                    }
                }
                button { "Filter" }
                (pause_button())
            }
            div class="scroll" tabindex="0" role="region" aria-label="Calls" { table class="cards packed" {
                thead { tr {
                    th scope="col" { "Time" } th scope="col" { "Method" } th scope="col" { "Family" }
                    th scope="col" { "Account" } th scope="col" { "Status" } th scope="col" { "Took" }
                    th scope="col" { "Whose fault" } th scope="col" { "Request id" }
                } }
                tbody data-live=(part) data-every="1" { (self.call_rows()?) }
            } }
        })
    }

    /// The rows, which the script refreshes.
    pub(super) fn call_rows(&self) -> Result<Markup, Problem> {
        let only = self.query.get("only");
        if only.is_some_and(|only| ONLY.iter().all(|(name, _)| *name != only)) {
            return Err(bad_parameter("only", "failures, caller, operator, sidecar or amazon"));
        }
        let shown = |call: &RecentCall| match only {
            None => true,
            Some("failures") => call.fault.is_some(),
            Some(whose) => call.fault.is_some_and(|fault| fault.as_str() == whose),
        };
        let calls: Vec<_> = self.admin.metrics.recent_calls.latest().filter(shown).take(ROWS).collect();
        let now = Instant::now();
        Ok(html! {
            @if calls.is_empty() { tr { td colspan="8" { "No call yet." } } }
            @for call in &calls { (row(call, self.ended_at(call, now))) }
        })
    }

    /// When the call ended, by the wall clock of now.
    fn ended_at(&self, call: &RecentCall, now: Instant) -> Timestamp {
        let ago = SignedDuration::try_from(now.saturating_duration_since(call.ended)).unwrap_or_default();
        self.now.checked_sub(ago).unwrap_or(self.now)
    }
}

/// An empty cell is shown as a dash.
fn row(call: &RecentCall, at: Timestamp) -> Markup {
    let class = match call.status {
        ..400 => "ok",
        400..500 => "wait",
        500.. => "bad",
    };
    html! {
        tr {
            td class="plain" { time datetime=(at) { (at.strftime("%H:%M:%S%.3f")) } }
            td { (call.method) }
            td { (call.family) }
            td { (call.account) }
            td { span class=(class) { (call.status) } }
            td class="plain" { (format!("{:.1} ms", milliseconds(call.took))) }
            td { (call.fault.map_or("", Fault::as_str)) }
            td class="id" { (call.request_id) }
        }
    }
}
