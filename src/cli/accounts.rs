//! `adsidecar accounts list|show|sync`: the accounts that requests can select, each with its header and its URL.

use std::collections::BTreeMap;
use std::fmt::Write;

use clap::{Args, Subcommand};
use http::{Method, StatusCode};
use jiff::Timestamp;
use serde_json::Value;

use super::sidecar::{AMAZON, Sidecar, encoded};
use super::{Exit, Failed, Output, block_on, print, table, users};
use crate::auth::accounts::{Filter, Listed, Snapshot, UserAccounts, list};
use crate::config::Config;
use crate::domain::account::UserId;
use crate::domain::found_account::{AccountType, FoundAccount, check_country};
use crate::server::Listen;

#[derive(Debug, Subcommand)]
pub(super) enum Accounts {
    /// List the accounts, configured and found, with the header that selects each
    List(List),
    /// Show one account: its ids, and the header and the URL that select it
    Show {
        /// The name or slug, as shown by adsidecar accounts list
        name: String,
        /// How to print it
        #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t)]
        output: Output,
    },
    /// Ask Amazon now which accounts the grants reach
    ///
    /// Profiles of the three regions, manager accounts, DSP advertisers, AMC accounts and instances
    Sync {
        /// Only the accounts of this user; of every user by default
        #[arg(long, value_name = "ID")]
        user: Option<UserId>,
        /// How to print the result
        #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t)]
        output: Output,
    },
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Those of one user
    #[arg(long, value_name = "ID")]
    user: Option<UserId>,
    /// Those whose name contains this text
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Those of one country, such as DE
    #[arg(long, value_name = "CODE", value_parser = check_country)]
    country: Option<String>,
    /// Those of one type: seller, vendor, agency, dsp_advertiser, manager, amc or other
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<AccountType>,
    /// How to print it
    #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Output,
}

pub(super) fn run(command: Accounts, config: Config) -> Result<(), Failed> {
    match command {
        Accounts::List(command) => print_list(&command, &config),
        Accounts::Show { name, output } => show(&name, output, &config),
        Accounts::Sync { user, output } => block_on(sync(user, output, config))?,
    }
}

fn print_list(command: &List, config: &Config) -> Result<(), Failed> {
    let filter = Filter {
        user: command.user.clone(),
        name: command.name.clone(),
        country: command.country.clone(),
        kind: command.kind,
    };
    let listed = block_on(listed(config, &filter))??;
    if command.output == Output::Json {
        return print(serde_json::to_string_pretty(&listed).map_err(Failed::because)? + "\n");
    }
    if listed.is_empty() {
        return print("no account matches; adsidecar accounts sync asks Amazon which there are\n");
    }
    let optional = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let rows = listed.iter().map(|account| {
        [
            account.slug.clone(),
            optional(account.kind.map(AccountType::as_str)),
            optional(account.country.as_deref()),
            account.region.to_string(),
            account.user_id.to_string(),
            match (&account.clash, account.missing_since) {
                (_, Some(_)) => format!("{} (missing at Amazon)", account.name),
                (Some(clash), _) => format!("{} (not the only {clash})", account.name),
                _ => account.name.clone(),
            },
        ]
    });
    let text = table(["ACCOUNT", "TYPE", "COUNTRY", "REGION", "USER", "NAME"], rows);
    print(format!("{text}\nselect one with the header X-Ads-Account: {}\n", listed[0].slug))
}

fn show(name: &str, output: Output, config: &Config) -> Result<(), Failed> {
    let all = block_on(listed(config, &Filter::default()))??;
    let Some(account) = all.iter().find(|account| account.slug == name) else {
        let near: Vec<_> =
            all.iter().filter(|one| one.clash.as_deref() == Some(name)).map(|one| one.slug.as_str()).collect();
        return Err(Failed::because(match near.is_empty() {
            true => format!("no account is called {name}: adsidecar accounts list shows them, sync looks for new ones"),
            false => format!("several accounts lay claim to {name}, so it selects none: use {}", near.join(" or ")),
        }));
    };
    if output == Output::Json {
        return print(serde_json::to_string_pretty(account).map_err(Failed::because)? + "\n");
    }
    let mut text = format!("{}\n", account.slug);
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<20} {value}");
    };
    line("name", &account.name);
    line("source", &account.source);
    let facts = [
        ("type", account.kind.map(|kind| kind.to_string())),
        ("country", account.country.clone()),
        ("currency", account.currency.clone()),
        ("time zone", account.time_zone.clone()),
        ("region", Some(account.region.to_string())),
        ("user", Some(account.user_id.to_string())),
        ("missing since", account.missing_since.map(|at| at.to_string())),
    ];
    for (name, value) in facts {
        if let Some(value) = value {
            line(name, &value);
        }
    }
    for (name, value) in &account.ids {
        line(name, value);
    }
    line("header to send", &account.header);
    line("or base URL", &account.url);
    print(text)
}

async fn sync(user: Option<UserId>, output: Output, config: Config) -> Result<(), Failed> {
    let sidecar = Box::pin(Sidecar::running_or_own(config)).await?;
    let ended = sync_through(&sidecar, user, output).await;
    let closed = sidecar.close().await;
    ended.and(closed)
}

async fn sync_through(sidecar: &Sidecar, user: Option<UserId>, output: Output) -> Result<(), Failed> {
    let users = match user {
        Some(user) => vec![user.to_string()],
        None => sidecar.users().await?,
    };
    if users.is_empty() {
        return Err(Failed::because("nobody is logged in: adsidecar login"));
    }
    let (mut results, mut problems) = (Vec::new(), Vec::new());
    for user in users {
        let path = format!("/api/auth/amazon/accounts/sync?user_id={}", encoded(&user));
        let reply = sidecar.request(Method::POST, &path, &[], AMAZON).await?;
        match reply.status {
            StatusCode::OK => results.push(reply.json()),
            _ => problems.push(format!("{user}: {}", reply.refused("the search").message)),
        }
    }
    match output {
        Output::Json => print(serde_json::to_string_pretty(&results).map_err(Failed::because)? + "\n")?,
        Output::Text => print(results.iter().map(sync_text).collect::<String>())?,
    }
    if problems.is_empty() { Ok(()) } else { Err(Failed::because(problems.join("\n"))) }
}

/// How one user's search ended, source by source.
fn sync_text(result: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut out = format!("{}: {} accounts", text(&result["user_id"]), result["accounts"]);
    if result["missing"].as_u64().is_some_and(|missing| missing > 0) {
        let _ = write!(out, ", {} of them missing at Amazon now", result["missing"]);
    }
    out.push('\n');
    for outcome in result["outcomes"].as_array().into_iter().flatten() {
        let place = outcome["region"].as_str().unwrap_or("--");
        let source = text(&outcome["source"]).replace('_', " ");
        let told = match outcome["status"].as_str() {
            Some("found") => format!("{} found", outcome["count"]),
            Some("empty") => "none: Amazon answered with an empty list".to_owned(),
            Some("no_access") => format!("the grant does not reach them ({})", text(&outcome["detail"])),
            _ => format!("failed: {}; what was found before is kept", text(&outcome["detail"])),
        };
        let _ = writeln!(out, "  {place}  {source:<16} {told}");
    }
    out
}

/// The accounts that match, from the running sidecar or from the store.
async fn listed(config: &Config, filter: &Filter) -> Result<Vec<Listed>, Failed> {
    match Sidecar::running(config).await? {
        Some(sidecar) => of_running(&sidecar, filter).await,
        None => {
            let base_url = match config.proxy_listen.first() {
                Some(Listen::Tcp(address)) => {
                    format!("http://localhost:{}", address.rsplit(':').next().unwrap_or_default())
                }
                _ => "http://localhost".to_owned(),
            };
            Ok(list(&of_store(config).await?, &config.proxy.accounts, config.proxy.region, filter, &base_url))
        }
    }
}

async fn of_running(sidecar: &Sidecar, filter: &Filter) -> Result<Vec<Listed>, Failed> {
    let mut query = String::new();
    let parameters = [
        ("user_id", filter.user.as_ref().map(ToString::to_string)),
        ("name", filter.name.clone()),
        ("country", filter.country.clone()),
        ("type", filter.kind.map(|kind| kind.to_string())),
    ];
    for (name, value) in parameters.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        let _ = write!(query, "&{name}={}", encoded(&value));
    }
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let reply = sidecar.get(&format!("/api/auth/amazon/accounts?after={}{query}", encoded(&after))).await?;
        let mut page = reply.json();
        let accounts = serde_json::from_value::<Vec<Listed>>(page["accounts"].take());
        all.extend(accounts.map_err(|_| reply.refused("the list of accounts"))?);
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut after),
            None => return Ok(all),
        }
    }
}

async fn of_store(config: &Config) -> Result<Snapshot, Failed> {
    if config.store.postgres.is_none() && !config.store.path.exists() {
        return Ok(Snapshot::default());
    }
    let Some((store, _)) = users::open_unless_held(config)? else {
        return Err(Failed {
            exit: Exit::Held,
            message: "another process holds the store, and nothing answers at proxy.listen: give this command the \
                      configuration of that process"
                .to_owned(),
        });
    };
    let texts = store.accounts().await;
    store.close().await?;
    let stored = texts?.into_iter().filter_map(|text| serde_json::from_str::<UserAccounts>(&text).ok());
    Ok(Snapshot::of(stored, &config.proxy.accounts))
}

/// The accounts that were found, from the running sidecar or from the store.
pub(super) async fn found(config: &Config) -> Result<Snapshot, Failed> {
    let Some(sidecar) = Sidecar::running(config).await? else { return of_store(config).await };
    let mut users: BTreeMap<UserId, UserAccounts> = BTreeMap::new();
    for account in of_running(&sidecar, &Filter::default()).await? {
        let (Some(kind), "amazon") = (account.kind, account.source.as_str()) else { continue };
        let of_user = users.entry(account.user_id.clone()).or_insert_with(|| UserAccounts {
            user_id: account.user_id.clone(),
            synced_at: Timestamp::now(),
            outcomes: Vec::new(),
            accounts: Vec::new(),
        });
        of_user.accounts.push(FoundAccount {
            slug: account.slug,
            clash: account.clash,
            name: account.name,
            kind,
            country: account.country,
            currency: account.currency,
            time_zone: account.time_zone,
            region: account.region,
            ids: account.ids,
            missing_since: account.missing_since,
        });
    }
    Ok(Snapshot::of(users.into_values(), &config.proxy.accounts))
}
