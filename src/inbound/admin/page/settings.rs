//! The effective configuration with its sources, no secret among it; and the log level.

use maud::{Markup, html};

use super::view::Action;
use super::{Context, Setting};
use crate::inbound::problem::Problem;
use crate::telemetry::log::Level;

impl Context<'_> {
    pub(super) fn settings(&self) -> Result<Markup, Problem> {
        Ok(html! {
            h1 { "Configuration" }
            (self.notice()?)
            (self.log_level())
            h2 { "Reload" }
            p { "Reads the files of the configuration again. One that is wrong is refused, and changes nothing." }
            (self.action_form(Action::Reload, &[], &html! { button { "Reload the configuration" } }))
            h2 id="keys" { "Values in force" }
            p class="soft" { "Secrets are shown as …. A key without a source has its default." }
            (table(&self.admin.settings))
        })
    }

    fn log_level(&self) -> Markup {
        html! {
            h2 { "Log level" }
            @match &self.admin.log {
                None => { p { "This process writes no log." } }
                Some(log) => {
                    form class="filter" method="post" action=(self.action_link(Action::Level)) {
                        (self.key_field())
                        label {
                            "Level"
                            select name="level" {
                                @for level in Level::ALL {
                                    option value=(level) selected[level == log.level()] { (level) }
                                }
                            }
                        }
                        button { "Set the level" }
                    }
                }
            }
        }
    }
}

fn table(settings: &[Setting]) -> Markup {
    html! {
        div class="scroll" tabindex="0" role="region" aria-labelledby="keys" { table class="cards" {
            thead { tr { th scope="col" { "Key" } th scope="col" { "Value" } th scope="col" { "Source" } } }
            tbody { @for setting in settings { tr {
                th scope="row" {
                    code { (setting.key) }
                    @if setting.needs_restart { small { "restart" } }
                }
                td { pre { (setting.value) } }
                td data-label="Source" { (setting.source.as_deref().unwrap_or("default")) }
            } } }
        } }
    }
}
