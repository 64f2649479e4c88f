//! `users show`, `users export` and `users forget`: one user's grant.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Failed, open_unless_held};
use crate::app;
use crate::cli::client::refused;
use crate::cli::{block_on, client, print, print_bytes};
use crate::config::Config;
use crate::domain::account::UserId;
use crate::domain::clock::to_the_millisecond;
use crate::domain::grant::Grant;
use crate::store::{Opened, StoreError, TokenStore};

/// What is known about `user`, never a token; from the running sidecar where one holds the store.
pub(super) fn show(config: &Config, user: &UserId) -> Result<(), Failed> {
    let status = match open_unless_held(config)? {
        None => of_running(config, user)?.ok_or_else(|| unknown(user))?,
        Some((store, opened)) => {
            block_on(store.close())??;
            stored(config, user, opened)?
        }
    };
    print(serde_json::to_string_pretty(&status).map_err(Failed::because)? + "\n")
}

/// The refresh token of `user` in the clear, or with `records` the record as it is stored.
pub(super) fn export(config: &Config, user: &UserId, records: bool) -> Result<(), Failed> {
    let store = match TokenStore::open(&config.store, Arc::new(app::keyring(config)?)) {
        Err(held @ StoreError::Locked { .. }) => return block_on(export_of_running(config, &held, user, records))?,
        opened => opened?.0,
    };
    let (grant, mut dump) = block_on(async {
        let found = (store.load(user).await, store.dump().await);
        store.close().await?;
        Ok::<_, StoreError>((found.0?, found.1?))
    })??;
    let grant = grant.ok_or_else(|| unknown(user))?;
    if records {
        let record = BTreeMap::from([(user, dump.remove(user))]);
        return print(serde_json::to_string_pretty(&record).map_err(Failed::because)? + "\n");
    }
    print(format!("{}\n", grant.refresh_token.secret().expose()))
}

async fn export_of_running(config: &Config, held: &StoreError, user: &UserId, records: bool) -> Result<(), Failed> {
    let path = format!("/users/export?user_id={}&records={records}", encoded(user));
    let response = client::at_holder(config, held, Method::GET, &path, Bytes::new()).await?;
    let status = response.status();
    let body = client::collect(response).await?;
    match status {
        StatusCode::OK if records => {
            let record: Value = serde_json::from_slice(&body).map_err(Failed::because)?;
            print(serde_json::to_string_pretty(&record).map_err(Failed::because)? + "\n")
        }
        StatusCode::OK => print_bytes(&body),
        StatusCode::NOT_FOUND => Err(unknown(user)),
        _ => Err(client::refused(status, &body)),
    }
}

/// Deletes the tokens of `user`, through the running sidecar if one has the store open, and says whether there were
/// any.
pub(super) fn forget(config: &Config, user: &UserId) -> Result<(), Failed> {
    let known = match open_unless_held(config)? {
        None => {
            let known = of_running(config, user)?.is_some();
            let path = format!("/api/auth/amazon/logout?user_id={}", encoded(user));
            let (status, body) =
                block_on(client::request(&config.proxy_listen, Method::POST, &path, &client::caller_token(config)))??;
            if status != StatusCode::NO_CONTENT {
                return Err(refused(status, &body));
            }
            known
        }
        Some((store, _)) => block_on(async {
            let erased = store.erase(user).await;
            store.close().await?;
            erased
        })??,
    };
    print(if known {
        format!("deleted the tokens of {user}\n")
    } else {
        format!("there was nothing stored for {user}; adsidecar users list shows the users\n")
    })
}

/// The status of `user` at the running sidecar; `None` if it has no grant.
fn of_running(config: &Config, user: &UserId) -> Result<Option<Value>, Failed> {
    let path = format!("/api/auth/amazon/status?user_id={}", encoded(user));
    let (status, body) =
        block_on(client::request(&config.proxy_listen, Method::GET, &path, &client::caller_token(config)))??;
    let told: Value = serde_json::from_slice(&body).map_err(|_| refused(status, &body))?;
    match told["state"].as_str() {
        None => Err(refused(status, &body)),
        Some("none") => Ok(None),
        Some(_) => Ok(Some(told)),
    }
}

fn stored(config: &Config, user: &UserId, opened: Opened) -> Result<Value, Failed> {
    let found = opened.users.into_iter().find(|(name, _)| name == user);
    let grant: Grant =
        found.ok_or_else(|| unknown(user))?.1.map_err(|error| Failed::because(format!("{user}: {error}")))?;
    let now = Timestamp::now();
    Ok(json!({
        "user_id": user,
        "state": grant.state(config.tokens.policy, now),
        "expires_at": grant.access.as_ref().map(|access| to_the_millisecond(access.expires_at)),
        "updated_at": to_the_millisecond(grant.updated_at),
        "consented_at": grant.consented_at.map(to_the_millisecond),
        "consent_expires_at": grant.consent_expires_at().map(to_the_millisecond),
        "consent": grant.consent(now),
        "scope": grant.scope,
    }))
}

fn encoded(user: &UserId) -> String {
    url::form_urlencoded::byte_serialize(user.as_str().as_bytes()).collect()
}

fn unknown(user: &UserId) -> Failed {
    Failed::because(format!("{user} has no grant here; `adsidecar users list` names those who have"))
}
