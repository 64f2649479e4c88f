//! What Amazon was seen to allow.

use maud::{Markup, html};

use super::{Context, pause_button};

/// Most buckets on the page.
const ROWS: usize = 500;

impl Context<'_> {
    pub(super) fn throttle(&self) -> Markup {
        let mode = self.admin.settings.iter().find(|setting| setting.key == "throttle.mode");
        html! {
            h1 { "Throttle" }
            p {
                "Amazon's limits, learned from its refusals."
                @if let Some(mode) = mode { " The mode is " code { (mode.value.trim_matches('"')) } "." }
            }
            (self.live(&self.throttle_part()))
            p { (pause_button()) }
        }
    }

    /// What the script refreshes.
    pub(super) fn throttle_part(&self) -> Markup {
        html! { (self.limits()) (self.at_once()) }
    }

    /// What Amazon allows at a time: exports, AMC workflow runs, requests with traffic events.
    fn at_once(&self) -> Markup {
        let gates = self.admin.throttle.gates();
        html! {
            h2 { "At a time" }
            @if gates.is_empty() {
                p { "No export, AMC run or request with traffic events that passed here runs at Amazon." }
            } @else {
                div class="scroll" tabindex="0" role="region" aria-label="At a time" { table class="cards" {
                    thead { tr {
                        th scope="col" { "What" } th scope="col" { "Region" } th scope="col" { "Running" }
                        th scope="col" { "Amazon allows" } th scope="col" { "Waiting" } th scope="col" { "State" }
                    } }
                    tbody { @for gate in gates.iter().take(ROWS) {
                        @let full = gate.running + gate.elsewhere >= gate.limit;
                        tr {
                            th scope="row" { (gate.of) }
                            td data-label="Region" { (gate.region.as_str()) }
                            td data-label="Running" {
                                (gate.running)
                                @if gate.elsewhere > 0 { " and " (gate.elsewhere) " by other adsidecars" }
                            }
                            td data-label="Amazon allows" { (gate.limit) }
                            td data-label="Waiting" { (gate.waiting) }
                            td data-label="State" {
                                @if gate.holds && full { span class="wait" { "full" } }
                                @else if gate.holds { "Amazon has refused one in the last hour" }
                                @else { "Amazon has refused none" }
                            }
                        }
                    } }
                } }
            }
        }
    }

    /// The learned rates.
    fn limits(&self) -> Markup {
        let buckets = self.admin.throttle.status();
        html! {
            @if buckets.is_empty() {
                p { "Amazon has refused no request since the start, so that no limit is known." }
            } @else {
                div class="scroll" tabindex="0" role="region" aria-label="Limits" { table class="cards" {
                    thead { tr {
                        th scope="col" { "API family" } th scope="col" { "Region" } th scope="col" { "Kind" }
                        th scope="col" { "Learned rate" } th scope="col" { "Paused for" } th scope="col" { "Waiting" }
                        th scope="col" { "Refused so far" }
                    } }
                    tbody { @for bucket in buckets.iter().take(ROWS) { tr {
                        th scope="row" { (bucket.name.group) }
                        td data-label="Region" { (bucket.name.region.as_str()) }
                        td data-label="Kind" { (bucket.name.kind.as_str()) }
                        td data-label="Learned rate" { (format!("{:.1} per second", bucket.rate)) }
                        td data-label="Paused for" {
                            @if bucket.paused > 0.0 { span class="wait" { (format!("{:.0} s", bucket.paused.ceil())) } }
                            @else { "–" }
                        }
                        td data-label="Waiting" { (bucket.waiting) }
                        td data-label="Refused so far" { (bucket.refusals) }
                    } } }
                } }
            }
        }
    }
}
