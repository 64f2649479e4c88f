//! `adsidecar key new` and `adsidecar key rotate`.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use clap::Subcommand;
use http::{Method, StatusCode};
use serde::Deserialize;

use super::{Exit, Failed, block_on, client, print};
use crate::app;
use crate::config::Config;
use crate::store::keyring::Keyring;
use crate::store::{StoreError, TokenStore};

/// How often the running sidecar is asked how far it is.
const PERIOD: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub(super) enum Key {
    /// Print a new Fernet key
    New,
    /// Start to use the configured Fernet keys, and encrypt every stored grant with the first
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
    let (resealed, unreadable) = match TokenStore::open(&config.store, keyring.clone()) {
        Err(StoreError::Locked { .. }) => block_on(rotate_running(config, &first.to_string()))??,
        opened => {
            let (store, _) = opened?;
            let done = block_on(async {
                let rotate = async {
                    store.require_key(first).await?;
                    store.rekey(keyring).await?;
                    store.reseal().await
                };
                let done = rotate.await;
                store.close().await?;
                done
            })??;
            (done.resealed, done.unreadable)
        }
    };
    print(format!(
        "{resealed} grants re-encrypted with key {first}; {unreadable} could not be decrypted and are kept\n"
    ))?;
    if unreadable > 0 {
        return Err(Failed::because(
            "some grants need a key that is not configured: add it to store.fernet_keys, and keep the old keys until \
             then",
        ));
    }
    Ok(())
}

/// The running sidecar's response about its rotation.
#[derive(Deserialize)]
struct Progress {
    running: bool,
    resealed: usize,
    left: usize,
    unreadable: usize,
    error: Option<String>,
}

/// Makes the running sidecar take its configured keys into use, and waits until every grant is encrypted with the
/// first. The rotation continues without this command.
async fn rotate_running(config: &Config, first: &str) -> Result<(usize, usize), Failed> {
    let mut progress = request_rotation(config, Method::POST, &format!("/rotate?key={first}")).await?;
    let mut told = None;
    while progress.running {
        let line = match &progress.error {
            Some(error) => {
                format!("{} re-encrypted, {} left; retrying after: {error}", progress.resealed, progress.left)
            }
            None => format!("{} re-encrypted, {} left", progress.resealed, progress.left),
        };
        if told.as_ref() != Some(&line) {
            let _ = writeln!(std::io::stderr(), "{line}");
            told = Some(line);
        }
        tokio::time::sleep(PERIOD).await;
        progress = request_rotation(config, Method::GET, "/rotate").await?;
    }
    Ok((progress.resealed, progress.unreadable))
}

async fn request_rotation(config: &Config, method: Method, path: &str) -> Result<Progress, Failed> {
    let (status, body) = client::request(&config.admin_listen, method, path, &client::caller_token(config)).await?;
    serde_json::from_slice(&body).map_err(|_| {
        let document: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let said = |member: &str| document[member].as_str().unwrap_or_default().to_owned();
        let message = format!("the running sidecar answered {status}: {} {}", said("detail"), said("next_step"));
        // The sidecar refused the keys, or another part of its configuration.
        let exit = if status == StatusCode::BAD_REQUEST { Exit::Config } else { Exit::Failed };
        Failed { exit, message }
    })
}
