//! `adsidecar key new` and `adsidecar key rotate`.

use std::sync::Arc;

use clap::Subcommand;

use super::{Failed, block_on, print};
use crate::app;
use crate::config::Config;
use crate::keyring::Keyring;
use crate::store::TokenStore;

#[derive(Debug, Subcommand)]
pub(super) enum Key {
    /// Print a new Fernet key
    New,
    /// Seal every stored grant with the first of store.fernet_keys
    Rotate,
}

pub(super) fn run(command: &Key, load: impl FnOnce() -> Result<Config, Failed>) -> Result<(), Failed> {
    match command {
        Key::New => print(format!("{}\n", Keyring::generate_key().expose())),
        Key::Rotate => rotate(&load()?),
    }
}

fn rotate(config: &Config) -> Result<(), Failed> {
    let keyring = Arc::new(app::keyring(config)?);
    let first = keyring.first();
    let (store, _) = TokenStore::open(&config.store, keyring)?;
    let done = block_on(async {
        let done = store.reseal().await;
        store.close().await?;
        done
    })??;
    print(format!(
        "{} grants sealed anew with key {first}; {} could not be opened and are kept\n",
        done.resealed, done.unreadable
    ))?;
    if done.unreadable > 0 {
        return Err(Failed::because(
            "keep the old keys until every grant opens: add the missing key to store.fernet_keys and rotate again",
        ));
    }
    Ok(())
}
