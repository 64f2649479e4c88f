//! `adsidecar notify test`.

use clap::Subcommand;
use jiff::Timestamp;

use super::{Failed, block_on, print};
use crate::config::Config;
use crate::domain::event::{Event, Happened};
use crate::notify;

#[derive(Debug, Subcommand)]
pub(super) enum Notify {
    /// Send a test event to notify.url, and say what its receiver answers
    Test,
}

pub(super) fn run(command: &Notify, config: Config) -> Result<(), Failed> {
    match command {
        Notify::Test => {
            let event = Event { at: Timestamp::now(), happened: Happened::Test, login_url: None };
            block_on(notify::send(&config.notify, &event))?.map_err(Failed::because)?;
            let signed = if config.notify.secret.is_some() { "signed with notify.secret" } else { "not signed" };
            print(format!("the receiver of notify.url accepted a test event, {signed}\n"))
        }
    }
}
