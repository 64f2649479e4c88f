//! The effective configuration: the value of each key after defaults and derived values are applied, its secrets left
//! out. `adsidecar check` prints it, the status page shows it with its sources, and a reload compares it.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::Config;
use super::keys::{ACCOUNT, ACCOUNT_KEYS, KEYS, Kind};
use crate::domain::account::Account;
use crate::domain::policy::Rules;
use crate::domain::secret::Secret;
use crate::inbound::admin::Setting;

/// Replaces a secret.
const HIDDEN: &str = "\"…\"";

/// The effective value of each key that was read.
#[derive(Clone, Debug, Default)]
pub(super) struct Effective(BTreeMap<&'static str, Shown>, Origins);

/// The source of each key that was given, in any layer. Not shown by `Debug`: the same values from other sources are
/// the same configuration.
#[derive(Clone, Default)]
struct Origins(BTreeMap<&'static str, String>);

impl fmt::Debug for Origins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

#[derive(Clone, Debug)]
struct Shown {
    /// The line that `adsidecar check` prints. `None`: the key has no effect, so it is not printed.
    line: Option<String>,
    /// Equal if and only if the values are: the value as TOML, or a hash of secrets.
    identity: String,
}

impl Effective {
    /// Records the value of `key`, written as TOML.
    pub(super) fn set(&mut self, key: &'static str, toml: impl Display) {
        self.0.insert(key, Shown { line: Some(format!("{} = {toml}", last_part(key))), identity: toml.to_string() });
    }

    /// Records secrets by their hash. They are printed as `…`.
    pub(super) fn set_secrets(&mut self, key: &'static str, secrets: &[Secret]) {
        let shown = match secrets.len() {
            0 => return,
            1 => HIDDEN.to_owned(),
            _ => list(secrets.iter().map(|_| HIDDEN.to_owned())),
        };
        let mut hash = Sha256::new();
        for secret in secrets {
            hash.update(secret.expose());
            hash.update(b"\n");
        }
        let line = format!("{} = {shown}", last_part(key));
        self.0.insert(key, Shown { line: Some(line), identity: format!("{:x}", hash.finalize()) });
    }

    /// Prints `text` as a comment in place of the value of `key`.
    pub(super) fn remark(&mut self, key: &'static str, text: impl Display) {
        let line = Some(format!("# {text}"));
        match self.0.get_mut(key) {
            Some(shown) => shown.line = line,
            None => drop(self.0.insert(key, Shown { line, identity: String::new() })),
        }
    }

    /// Prints the value of `key` as a comment, with a `remark`: written as a value it would mean something else.
    pub(super) fn comment_out(&mut self, key: &'static str, remark: &str) {
        if let Some(Shown { line: Some(line), .. }) = self.0.get_mut(key) {
            *line = format!("# {line}, {remark}");
        }
    }

    /// Records the source of each key; `source` returns `None` for a key that nobody gave.
    pub(super) fn set_sources(&mut self, source: impl Fn(&str) -> Option<String>) {
        let keys = KEYS.iter().map(|key| key.name).chain([ACCOUNT]);
        self.1 = Origins(keys.filter_map(|key| Some((key, source(key)?))).collect());
    }

    /// Does not print `key`, which has no effect beside the other values.
    pub(super) fn hide(&mut self, key: &'static str) {
        if let Some(shown) = self.0.get_mut(key) {
            shown.line = None;
        }
    }
}

impl Config {
    /// The effective configuration as TOML, each secret as `…`. With its secrets put back it means the same.
    pub fn redacted_toml(&self) -> String {
        let (mut page, mut section) = (String::new(), "");
        for key in KEYS {
            let Some(line) = self.effective.0.get(key.name).and_then(|shown| shown.line.as_ref()) else { continue };
            let of_key = key.name.split_once('.').map_or("", |(section, _)| section);
            if section != of_key {
                section = of_key;
                page.push_str(&format!("\n[{section}]\n"));
            }
            page.push_str(line);
            page.push('\n');
        }
        self.proxy.accounts.iter().for_each(|account| print_account(&mut page, account));
        page
    }

    /// The effective configuration for the status page: the same values as [`redacted_toml`](Self::redacted_toml), each
    /// with its source.
    pub fn settings(&self) -> Vec<Setting> {
        let source = |key: &str| self.effective.1.0.get(key).cloned();
        let of_key = |key: &super::keys::Key| {
            let line = self.effective.0.get(key.name)?.line.as_deref()?;
            let value = line.strip_prefix(last_part(key.name)).and_then(|rest| rest.strip_prefix(" = "));
            let value = value.unwrap_or(line).to_owned();
            Some(Setting { key: key.name, value, source: source(key.name), needs_restart: key.restart })
        };
        let of_account = |account: &Account| {
            let mut text = String::new();
            print_account(&mut text, account);
            let value = text.trim().lines().skip(1).collect::<Vec<_>>().join("\n");
            Setting { key: ACCOUNT, value, source: source(ACCOUNT), needs_restart: false }
        };
        KEYS.iter().filter_map(of_key).chain(self.proxy.accounts.iter().map(of_account)).collect()
    }

    /// The keys that only a restart can change, each with a text that is equal if and only if its value is. The text of
    /// a secret is a hash.
    pub fn restart_only(&self) -> Vec<(&'static str, String)> {
        let identity = |name| self.effective.0.get(name).map(|shown| shown.identity.clone()).unwrap_or_default();
        KEYS.iter().filter(|key| key.restart).map(|key| (key.name, identity(key.name))).collect()
    }
}

fn print_account(page: &mut String, account: &Account) {
    page.push_str("\n[[account]]\n");
    for key in ACCOUNT_KEYS {
        let value = match (key.name, &key.kind) {
            ("name", _) => Some(quoted(&account.name)),
            ("user", _) => Some(quoted(account.user.as_str())),
            ("region", _) => account.region.map(|region| quoted(region.as_str())),
            ("headers", _) => headers(account),
            ("read_only", _) => rules(account).map(|rules| rules.read_only().to_string()),
            ("allow", _) => rules(account).map(|rules| list(rules.allow().map(|entry| quoted(&entry.to_string())))),
            (_, Kind::Id(context)) => {
                account.ids.get(*context).map(|id| quoted(&String::from_utf8_lossy(id.as_bytes())))
            }
            _ => None,
        };
        if let Some(value) = value {
            page.push_str(&format!("{} = {value}\n", key.name));
        }
    }
}

/// The headers of an account, whose values may be secrets.
fn headers(account: &Account) -> Option<String> {
    let headers: Vec<_> =
        account.headers.iter().map(|(name, _)| format!("{} = {HIDDEN}", quoted(name.as_str()))).collect();
    (!headers.is_empty()).then(|| format!("{{ {} }}", headers.join(", ")))
}

/// The rules of an account that has any.
fn rules(account: &Account) -> Option<&Rules> {
    Some(&account.rules).filter(|rules| !rules.is_empty())
}

fn last_part(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// A duration as TOML: in the largest unit, up to days, of which it is a whole number.
pub(super) fn duration(duration: Duration) -> String {
    let (seconds, fraction) = (duration.as_secs(), duration.subsec_nanos());
    let unit = [(86_400, "d"), (3_600, "h"), (60, "m")].into_iter().find(|(unit, _)| seconds.is_multiple_of(*unit));
    match unit.filter(|_| seconds > 0 && fraction == 0) {
        Some((unit, name)) => quoted(&format!("{}{name}", seconds / unit)),
        None => quoted(&humantime::format_duration(duration).to_string()),
    }
}

/// A number of bytes as TOML: in the largest unit of which it is a whole number.
pub(super) fn size(bytes: u64) -> String {
    let unit = [(30, "GiB"), (20, "MiB"), (10, "KiB")].into_iter().find(|(bits, _)| bytes.is_multiple_of(1 << bits));
    let (bits, name) = unit.filter(|_| bytes > 0).unwrap_or((0, "B"));
    quoted(&format!("{}{name}", bytes >> bits))
}

/// An array of TOML values.
pub(super) fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// A basic string of TOML.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
