//! `[[account]]`: which user, which region, which context headers.

use figment::value::{Dict, Value};
use http::{HeaderName, HeaderValue};

use super::keys::{ACCOUNT, ACCOUNT_KEYS, Kind};
use super::names;
use super::reader::{Reader, scalar};
use crate::domain::account::{Account, Ids, Region, UserId, check_name};
use crate::domain::found_account::doubtful_id;
use crate::domain::policy::{Allow, Rules};
use crate::domain::throttle_mode::ThrottleMode;

/// Longest value of a header that an account always sends, in bytes. The longest one that Amazon documents is an id.
const MAX_HEADER: usize = 1024;

/// Headers that an account cannot set: ours, those of the connection, and those that never leave.
const MANAGED: [&str; 21] = [
    "authorization",
    "amazon-advertising-api-clientid",
    "amazon-ads-clientid",
    "host",
    "content-length",
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "expect",
    "cookie",
    "origin",
    "referer",
    "forwarded",
    "x-request-id",
];

/// What the names of further managed headers begin with.
const MANAGED_PREFIXES: [&str; 4] = ["x-ads-", "x-adsidecar-", "x-forwarded-", "sec-"];

/// All accounts. What is wrong with one is written down.
pub(super) fn accounts(read: &mut Reader<'_>) -> Vec<Account> {
    let Some(Value::Array(_, values)) = read.raw(ACCOUNT) else { return Vec::new() };
    let tables = values.iter().map(Value::as_dict).collect::<Option<Vec<_>>>();
    let Some(tables) = tables else {
        read.wrong(ACCOUNT, "is no list of tables: begin each account with [[account]]");
        return Vec::new();
    };
    let mut accounts: Vec<Account> = Vec::new();
    for (index, table) in tables.into_iter().enumerate() {
        let account = account(&mut Table { read, place: format!("[[account]] number {}", index + 1), dict: table });
        if accounts.iter().any(|earlier| earlier.name == account.name) && !account.name.is_empty() {
            let key = format!("[[account]] number {}: name", index + 1);
            read.wrong_at(ACCOUNT, &key, "is the name of an earlier account too: give each its own");
        }
        accounts.push(account);
    }
    accounts
}

/// One account's table, with how to call it in a problem.
struct Table<'t, 'a> {
    read: &'t mut Reader<'a>,
    place: String,
    dict: &'a Dict,
}

impl Table<'_, '_> {
    fn wrong(&mut self, key: &str, message: impl Into<String>) {
        let key = format!("{}: {key}", self.place);
        self.read.wrong_at(ACCOUNT, &key, message);
    }

    /// Notes a value that is accepted and probably not what is meant.
    fn doubt(&mut self, key: &str, message: &str) {
        let key = format!("{}: {key}", self.place);
        self.read.doubt_at(ACCOUNT, &key, message);
    }

    fn parsed<T>(&mut self, key: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        match scalar(self.dict.get(key)?).and_then(|text| parse(&text)) {
            Ok(value) => Some(value),
            Err(message) => {
                self.wrong(key, message);
                None
            }
        }
    }
}

fn account(table: &mut Table<'_, '_>) -> Account {
    for name in table.dict.keys().filter(|name| !ACCOUNT_KEYS.iter().any(|key| key.name == name.as_str())) {
        let cure = match names::likely_account_key(name) {
            Some(likely) => format!("is no key of an account: did you mean {likely}?"),
            None => "is no key of an account: remove it".to_owned(),
        };
        table.wrong(&names::printable(name), cure);
    }
    if !table.dict.contains_key("name") {
        table.wrong("name", "is missing: give the account the name by which callers select it");
    }
    Account {
        name: table
            .parsed("name", |text| check_name(text).map(str::to_owned).map_err(|error| format!("is refused: {error}")))
            .unwrap_or_default()
            .into(),
        user: table
            .parsed("user", |text| text.parse::<UserId>().map_err(|error| format!("is refused: {error}")))
            .unwrap_or_default(),
        region: table.parsed("region", |text| text.parse::<Region>().map_err(|error| format!("is refused: {error}"))),
        ids: ids(table),
        headers: headers(table),
        rules: rules(table),
        throttle: table
            .parsed("throttle", |text| text.parse::<ThrottleMode>().map_err(|error| format!("is refused: {error}"))),
    }
}

fn ids(table: &mut Table<'_, '_>) -> Ids {
    let mut ids = Ids::default();
    for key in ACCOUNT_KEYS {
        if let Kind::Id(context) = key.kind {
            let set = table.parsed(key.name, |id| {
                ids.set(context, id).map(|()| doubtful_id(context, id)).map_err(|error| format!("is refused: {error}"))
            });
            if let Some(Some(doubt)) = set {
                table.doubt(key.name, &format!("is probably another kind of id: {doubt}"));
            }
        }
    }
    ids
}

fn headers(table: &mut Table<'_, '_>) -> Vec<(HeaderName, HeaderValue)> {
    let given = match table.dict.get("headers") {
        None => return Vec::new(),
        Some(Value::Dict(_, given)) => given,
        Some(_) => {
            table.wrong("headers", "is no table: write headers = { Name = \"value\" }");
            return Vec::new();
        }
    };
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in given {
        let key = format!("headers.{}", names::printable(name));
        match header(name, value) {
            Err(message) => table.wrong(&key, message),
            Ok((name, _)) if headers.iter().any(|(earlier, _)| *earlier == name) => {
                table.wrong(&key, "stands there twice, in another letter case: keep one of the two");
            }
            Ok(header) => headers.push(header),
        }
    }
    headers
}

fn header(name: &str, value: &Value) -> Result<(HeaderName, HeaderValue), String> {
    let name = HeaderName::try_from(name).map_err(|_| "is no name of a header: use letters, digits and hyphens")?;
    // Some servers read `_` as `-`, so the twin of a managed name is managed too.
    let twin = name.as_str().replace('_', "-");
    if MANAGED.contains(&twin.as_str()) || MANAGED_PREFIXES.iter().any(|prefix| twin.starts_with(prefix)) {
        return Err("is managed by adsidecar or never leaves it: remove it".to_owned());
    }
    let text = scalar(value)?;
    let legal = (1..=MAX_HEADER).contains(&text.len())
        && text.trim() == text
        && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
    let mut value = legal
        .then(|| HeaderValue::from_str(&text).ok())
        .flatten()
        .ok_or("is no value of a header: write 1 to 1024 visible ASCII characters on one line")?;
    // Nobody knows what users put there, so it is printed nowhere.
    value.set_sensitive(true);
    Ok((name, value))
}

fn rules(table: &mut Table<'_, '_>) -> Rules {
    let read_only = match table.dict.get("read_only") {
        None => false,
        Some(Value::Bool(_, flag)) => *flag,
        Some(_) => {
            table.wrong("read_only", "is neither true nor false: write one of them, without quotes");
            false
        }
    };
    let mut allow = Vec::new();
    match table.dict.get("allow") {
        None => {}
        Some(Value::Array(_, list)) => {
            for entry in list {
                match entry.as_str().map(str::parse::<Allow>) {
                    Some(Ok(entry)) => allow.push(entry),
                    Some(Err(error)) => table.wrong("allow", format!("entry {error}")),
                    None => table.wrong("allow", "holds something that is not a text: put each entry in quotes"),
                }
            }
        }
        Some(_) => table.wrong("allow", "is no list: write allow = [\"GET /v2/profiles\"]"),
    }
    Rules::new(read_only, allow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_are_ours_or_would_split_the_head_are_refused() {
        let text = |text: &str| Value::from(text);
        for name in MANAGED.into_iter().chain(["X-Ads-Account", "X-Forwarded-For", "Sec-Fetch-Site", "X_Ads_User"]) {
            let message = header(name, &text("x")).unwrap_err();
            assert!(message.contains("managed"), "{name}: {message}");
        }
        for name in ["", "a b", "a:b", "a\r\nb", "ä"] {
            assert!(header(name, &text("x")).is_err(), "{name:?}");
        }
        for value in ["", " a", "a ", "a\r\nb: c", "a\0", "ä", &"x".repeat(MAX_HEADER + 1)] {
            assert!(header("x-mine", &text(value)).is_err(), "{value:?}");
        }
        assert!(header("x-mine", &Value::from(vec!["a"])).is_err());
        let (name, value) = header("Amazon-Ads-Extra", &Value::from(7u8)).unwrap();
        assert_eq!((name.as_str(), value.as_bytes()), ("amazon-ads-extra", &b"7"[..]));
        assert!(value.is_sensitive());
    }
}
