//! `adsidecar store dump` and `adsidecar store restore`.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use clap::Subcommand;
use http::Method;
use http_body_util::BodyExt;

use super::users::Verify;
use super::{Failed, block_on, client, print, print_bytes, read, users};
use crate::app;
use crate::config::Config;
use crate::store::{StoreError, TokenStore};

#[derive(Debug, Subcommand)]
pub(super) enum Store {
    /// Print all records; the tokens stay encrypted
    ///
    /// A running sidecar that holds the store is asked for them
    Dump,
    /// Import a dump, from standard input if FILE is missing
    ///
    /// A user who already has a grant is refused without --replace
    Restore {
        /// The dump; - is standard input
        file: Option<PathBuf>,
        /// Replace the grants of users who already have one
        #[arg(long)]
        replace: bool,
    },
}

pub(super) fn run(command: Store, config: Config) -> Result<(), Failed> {
    match command {
        Store::Dump => dump(&config),
        Store::Restore { file, replace } => {
            let records = read(file.as_deref(), "the dump")?;
            users::take_records(&config, records, replace, Verify::Offline)
        }
    }
}

/// By the running sidecar where one holds the store.
fn dump(config: &Config) -> Result<(), Failed> {
    let store = match TokenStore::open(&config.store, Arc::new(app::keyring(config)?)) {
        Err(held @ StoreError::Locked { .. }) => return block_on(dump_of_running(config, &held))?,
        opened => opened?.0,
    };
    let records = block_on(async {
        let records = store.dump().await;
        store.close().await?;
        records
    })??;
    print(serde_json::to_string_pretty(&records).map_err(Failed::because)? + "\n")
}

/// Prints the dump as it arrives, so that its size does not matter.
async fn dump_of_running(config: &Config, held: &StoreError) -> Result<(), Failed> {
    let mut response = client::at_holder(config, held, Method::GET, "/dump", Bytes::new()).await?;
    if !response.status().is_success() {
        let status = response.status();
        return Err(client::refused(status, &client::collect(response).await?));
    }
    while let Some(frame) = response.body_mut().frame().await {
        let frame = frame.map_err(|error| Failed::because(format!("the dump broke off, and is not whole: {error}")))?;
        if let Ok(data) = frame.into_data() {
            print_bytes(&data)?;
        }
    }
    Ok(())
}
