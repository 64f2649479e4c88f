//! `adsidecar key new` and `adsidecar key rotate`.

use std::sync::Arc;

use clap::Subcommand;
use http::Method;
use serde_json::Value;

use super::{Failed, ask, block_on, print};
use crate::app;
use crate::config::Config;
use crate::keyring::Keyring;
use crate::store::{StoreError, TokenStore};

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

/// By the running sidecar where one holds the store.
fn rotate(config: &Config) -> Result<(), Failed> {
    let keyring = Arc::new(app::keyring(config)?);
    let first = keyring.first();
    let (resealed, unreadable) = match TokenStore::open(&config.store, keyring) {
        Err(StoreError::Held { .. }) => rotate_running(config, &first.to_string())?,
        opened => {
            let (store, _) = opened?;
            let done = block_on(async {
                let done = store.reseal().await;
                store.close().await?;
                done
            })??;
            (done.resealed as u64, done.unreadable as u64)
        }
    };
    print(format!("{resealed} grants sealed anew with key {first}; {unreadable} could not be opened and are kept\n"))?;
    if unreadable > 0 {
        return Err(Failed::because(
            "keep the old keys until every grant opens: add the missing key to store.fernet_keys and rotate again",
        ));
    }
    Ok(())
}

fn rotate_running(config: &Config, first: &str) -> Result<(u64, u64), Failed> {
    let path = format!("/rotate?key={first}");
    let headers = ask::caller_token(config);
    let (status, body) = block_on(ask::ask(&config.admin_listen, Method::POST, &path, &headers))??;
    let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
    match (answer["resealed"].as_u64(), answer["unreadable"].as_u64()) {
        (Some(resealed), Some(unreadable)) => Ok((resealed, unreadable)),
        _ => {
            let said = |member: &str| answer[member].as_str().unwrap_or_default().to_owned();
            Err(Failed::because(format!(
                "the running sidecar answered {status}: {} {}",
                said("detail"),
                said("next_step")
            )))
        }
    }
}
