//! `adsidecar store dump` and `adsidecar store restore`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Subcommand;

use super::{Failed, block_on, print, read, users};
use crate::app;
use crate::config::Config;
use crate::store::TokenStore;

#[derive(Debug, Subcommand)]
pub(super) enum Store {
    /// Print all records; the tokens stay encrypted
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
            users::take_records(&config, &records, replace, None)
        }
    }
}

fn dump(config: &Config) -> Result<(), Failed> {
    let (store, _) = TokenStore::open(&config.store, Arc::new(app::keyring(config)?))?;
    let records = block_on(async {
        let records = store.dump().await;
        store.close().await?;
        records
    })??;
    print(serde_json::to_string_pretty(&records).map_err(Failed::because)? + "\n")
}
