//! `users list`: all users, from the running sidecar where one holds the store.

use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Failed, open_unless_held};
use crate::cli::{block_on, client, hint, print};
use crate::config::Config;
use crate::domain::account::UserId;
use crate::domain::clock::to_the_second;
use crate::domain::grant::Grant;
use crate::store::stored_grant::StoredGrantError;

/// How the list is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::cli) enum Output {
    /// Columns under a header, for people.
    Table,
    /// A JSON array of objects, for programs.
    Json,
}

/// The columns of the table, with the members of the JSON that they show.
const COLUMNS: [(&str, &str); 5] = [
    ("USER", "user_id"),
    ("STATE", "state"),
    ("TOKEN EXPIRES", "expires_at"),
    ("CONSENT EXPIRES", "consent_expires_at"),
    ("LAST ERROR", "last_error"),
];

/// Prints every user.
pub(super) fn run(config: &Config, output: Output) -> Result<(), Failed> {
    let users = match open_unless_held(config)? {
        None => of_running(config)?,
        Some((store, opened)) => {
            block_on(store.close())??;
            let now = Timestamp::now();
            let row = |(user, grant): (UserId, Result<Grant, StoredGrantError>)| match grant {
                Ok(grant) => json!({
                    "user_id": user,
                    "state": grant.state(config.tokens.policy, now),
                    "expires_at": grant.access.as_ref().map(|access| to_the_second(access.expires_at)),
                    "consent_expires_at": grant.consent_expires_at().map(to_the_second),
                    "last_error": null,
                }),
                Err(error) => json!({ "user_id": user, "state": "unreadable", "last_error": error.to_string() }),
            };
            opened.users.into_iter().map(row).collect()
        }
    };
    match output {
        Output::Json => print(serde_json::to_string_pretty(&users).map_err(Failed::because)? + "\n"),
        Output::Table => {
            print(table(&users))?;
            if users.is_empty() {
                hint("nobody is logged in; start adsidecar, and it says where to log in");
            }
            Ok(())
        }
    }
}

/// Every user of the running sidecar, page by page.
fn of_running(config: &Config) -> Result<Vec<Value>, Failed> {
    let headers = client::caller_token(config);
    let mut users: Vec<Value> = Vec::new();
    loop {
        let last = users.last().and_then(|user| user["user_id"].as_str()).unwrap_or_default();
        let after: String = url::form_urlencoded::byte_serialize(last.as_bytes()).collect();
        let path = format!("/api/auth/amazon/status?after={after}");
        let (status, body) = block_on(client::request(&config.proxy_listen, Method::GET, &path, &headers))??;
        let mut answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        let Some(page) = answer["users"].as_array_mut() else {
            return Err(Failed::because(format!("the running sidecar answered {status} to the status request")));
        };
        if page.is_empty() {
            return Ok(users);
        }
        let shown = |mut user: Value| {
            let members = COLUMNS.map(|(_, member)| (member.to_owned(), in_seconds(user[member].take())));
            Value::Object(members.into_iter().collect())
        };
        users.extend(page.drain(..).map(shown));
    }
}

/// A time to the second; any other value as it is.
fn in_seconds(value: Value) -> Value {
    match value.as_str().and_then(|text| text.parse::<Timestamp>().ok()) {
        Some(at) => to_the_second(at).into(),
        None => value,
    }
}

/// Columns as wide as their widest cell, two spaces apart, and no trailing spaces.
fn table(users: &[Value]) -> String {
    let header = COLUMNS.map(|(title, _)| title.to_owned());
    let cells = |user: &Value| COLUMNS.map(|(_, member)| user[member].as_str().unwrap_or("-").to_owned());
    let rows: Vec<_> = std::iter::once(header).chain(users.iter().map(cells)).collect();
    let mut widths = [0; COLUMNS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; COLUMNS.len()]| {
        let padded: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        format!("{}\n", padded.trim_end())
    };
    rows.iter().map(line).collect()
}
