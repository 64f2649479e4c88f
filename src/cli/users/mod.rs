//! `adsidecar users`.

mod list;
mod single_user;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Subcommand;
use http::Method;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Failed, block_on, client, print, read, warn};
use crate::app;
use crate::auth::lwa::Lwa;
use crate::config::Config;
use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::domain::secret::Secret;
use crate::store::imported_record::{self, Imported};
use crate::store::keyring::Keyring;
use crate::store::stored_grant::StoredGrant;
use crate::store::{Opened, StoreError, TokenStore};

#[derive(Debug, Subcommand)]
pub(super) enum Users {
    /// List users, their state and when token and consent expire
    List {
        /// `table` with a header line, or `json`
        #[arg(short, long, default_value = "table")]
        output: list::Output,
    },
    /// Show the status of one user; never a token
    Show {
        /// User id, as shown by adsidecar users list
        user: UserId,
    },
    /// Print the refresh token of one user in clear text, to move it elsewhere
    ///
    /// With --records, print the encrypted record, for `users import --records`
    Export {
        /// User id, as shown by adsidecar users list
        user: UserId,
        /// Print the encrypted record instead, as it is stored
        #[arg(long)]
        records: bool,
    },
    /// Delete the tokens of one user
    Forget {
        /// User id, as shown by adsidecar users list
        user: UserId,
    },
    /// Read a refresh token from standard input and verify it with a refresh
    ///
    /// With --records, import the records of another service that follows Amazon's guide, or of a dump:
    /// `{"<user_id>": {…}}`, encrypted with one of the Fernet keys
    Import {
        /// User id, which you choose; not with --records
        #[arg(long, default_value = UserId::DEFAULT, conflicts_with = "records")]
        user: UserId,
        /// A JSON object of records by user id; - is standard input
        #[arg(long, value_name = "FILE")]
        records: Option<PathBuf>,
        /// Do not verify the grants; they are verified when they are first used
        #[arg(long)]
        offline: bool,
        /// Replace the grants of users who already have one
        #[arg(long)]
        replace: bool,
    },
}

pub(super) fn run(command: Users, config: Config) -> Result<(), Failed> {
    match command {
        Users::List { output } => list::run(&config, output),
        Users::Show { user } => single_user::show(&config, &user),
        Users::Export { user, records } => single_user::export(&config, &user, records),
        Users::Forget { user } => single_user::forget(&config, &user),
        Users::Import { user, records, offline, replace } => {
            let verify = if offline { Verify::Offline } else { Verify::ByRefresh };
            match records {
                Some(file) => take_records(&config, read(Some(&file), "the records")?, replace, verify),
                None => take_token(&config, user, replace, verify),
            }
        }
    }
}

/// Whether an imported grant is tried before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verify {
    /// By a refresh at Login with Amazon.
    ByRefresh,
    /// Only when it is first used.
    Offline,
}

impl Verify {
    fn lwa(self, config: &Config) -> Result<Option<Lwa>, Failed> {
        match self {
            Self::Offline => Ok(None),
            Self::ByRefresh => Lwa::new(config.lwa.clone()).map(Some).map_err(Failed::because),
        }
    }
}

/// The store and what is in it; `None` where a running sidecar holds it.
pub(super) fn open_unless_held(config: &Config) -> Result<Option<(TokenStore, Opened)>, Failed> {
    match TokenStore::open(&config.store, Arc::new(app::keyring(config)?)) {
        Err(StoreError::Locked { .. }) => Ok(None),
        opened => Ok(Some(opened?)),
    }
}

fn take_token(config: &Config, user: UserId, replace: bool, verify: Verify) -> Result<(), Failed> {
    let text = Secret::new(read(None, "the refresh token")?);
    let (grant, repairs) = imported_record::read_token(text.expose(), Timestamp::now())
        .map_err(|flaw| Failed::because(format!("what was read {flaw}")))?;
    repairs.iter().for_each(|repair| warn(format!("what was read {repair}")));
    let keyring = Arc::new(app::keyring(config)?);
    match TokenStore::open(&config.store, keyring.clone()) {
        Err(held @ StoreError::Locked { .. }) => {
            let name: String = url::form_urlencoded::byte_serialize(user.as_str().as_bytes()).collect();
            let offline = verify == Verify::Offline;
            let path = format!("/users/import?user_id={name}&offline={offline}&replace={replace}");
            let token = grant.refresh_token.secret().expose().to_owned();
            imported(&block_on(import_at_running(config, &held, &path, token.into()))??)
        }
        opened => {
            let (store, opened) = opened?;
            let known = opened.users.into_iter().map(|(user, _)| user).collect();
            take(store, known, vec![(user, grant)], replace, verify.lwa(config)?, &keyring)
        }
    }
}

/// Takes `{"<user_id>": <record>}`, sealed by a key of the ring. Nothing is stored unless all records can be read.
pub(super) fn take_records(config: &Config, json: String, replace: bool, verify: Verify) -> Result<(), Failed> {
    let keyring = Arc::new(app::keyring(config)?);
    let (store, opened) = match TokenStore::open(&config.store, keyring.clone()) {
        Err(held @ StoreError::Locked { .. }) => {
            let path = format!("/users/import?records=true&offline={}&replace={replace}", verify == Verify::Offline);
            let json = bytes::Bytes::from(json);
            block_on(import_at_running(config, &held, &format!("{path}&dry_run=true"), json.clone()))??;
            return imported(&block_on(import_at_running(config, &held, &path, json))??);
        }
        opened => opened?,
    };
    let records: BTreeMap<UserId, Value> = serde_json::from_str(&json)
        .map_err(|error| Failed::because(format!("this is no JSON object of records by user id: {error}")))?;
    let mut grants = Vec::new();
    let mut problems = String::new();
    for (user, record) in records {
        match imported_record::read(record, &user, &keyring) {
            Ok(Imported { grant, repairs }) => {
                for (field, repair) in repairs {
                    warn(format!("{user}: {field} {repair}"));
                }
                grants.push((user, grant));
            }
            Err(error) => problems += &format!("{user}: {error}\n"),
        }
    }
    if !problems.is_empty() {
        block_on(store.close())??;
        return Err(Failed::because(format!(
            "{problems}nothing was imported: correct these records, or take them out"
        )));
    }
    let known = opened.users.into_iter().map(|(user, _)| user).collect();
    take(store, known, grants, replace, verify.lwa(config)?, &keyring)
}

/// What the running sidecar says that it imported.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Outcome {
    imported: usize,
    refused: usize,
    problems: Vec<String>,
    repairs: Vec<String>,
}

/// Lets the running sidecar import `body`. Fails before anything is printed if it refuses the whole of it.
async fn import_at_running(
    config: &Config,
    held: &StoreError,
    path: &str,
    body: bytes::Bytes,
) -> Result<Outcome, Failed> {
    let response = client::at_holder(config, held, Method::POST, path, body).await?;
    let status = response.status();
    let body = client::collect(response).await?;
    let document: Value = serde_json::from_slice(&body).unwrap_or_default();
    let outcome = if status.is_success() { &document } else { &document["outcome"] };
    let outcome = Outcome::deserialize(outcome).map_err(|_| client::refused(status, &body))?;
    if path.ends_with("&dry_run=true") && outcome.refused > 0 {
        let problems = outcome.problems.join("\n");
        return Err(Failed::because(format!(
            "{problems}\nnothing was imported: correct these records, or take them out"
        )));
    }
    Ok(outcome)
}

fn imported(outcome: &Outcome) -> Result<(), Failed> {
    outcome.repairs.iter().for_each(warn);
    print(format!("{} grants imported\n", outcome.imported))?;
    if outcome.refused == 0 { Ok(()) } else { Err(Failed::because(outcome.problems.join("\n"))) }
}

/// Stores `grants`, each verified by a refresh first where `lwa` is given. Ends at the first that cannot be stored:
/// Login with Amazon may rotate each that it is shown. What it has rotated exists nowhere else, so that is printed,
/// sealed.
fn take(
    store: TokenStore,
    known: Vec<UserId>,
    grants: Vec<(UserId, Grant)>,
    replace: bool,
    lwa: Option<Lwa>,
    keyring: &Keyring,
) -> Result<(), Failed> {
    let mut problems = String::new();
    let (mut taken, mut unstored) = (0, None);
    block_on(async {
        for (user, grant) in grants {
            if known.contains(&user) && !replace {
                problems += &format!("{user}: has a grant already; say --replace to replace it\n");
                continue;
            }
            let shown = grant.refresh_token.clone();
            let grant = match &lwa {
                None => grant,
                Some(lwa) => match lwa.refresh(&shown).await {
                    Ok(tokens) => grant.refreshed(tokens, Timestamp::now()),
                    Err(error) => {
                        problems += &format!("{user}: {error}; say --offline to keep it unverified\n");
                        continue;
                    }
                },
            };
            match store.save(&user, &grant, None).await {
                Ok(_) => taken += 1,
                Err(error) => {
                    problems += &format!("{user}: {error}; no grant after this one was tried\n");
                    if grant.refresh_token != shown {
                        unstored = Some(json!({ (user.as_str()): StoredGrant::seal(&grant, &user, keyring) }));
                        problems += "Login with Amazon has replaced its refresh token. The new one is in the record on \
                                     standard output: once the store can be written, import that with --offline \
                                     --records\n";
                    }
                    break;
                }
            }
        }
        store.close().await
    })??;
    match unstored {
        None => print(format!("{taken} grants imported\n"))?,
        Some(record) => print(format!("{record}\n"))?,
    }
    if problems.is_empty() { Ok(()) } else { Err(Failed::because(problems.trim_end())) }
}
