//! A configuration as TOML, its secrets left out: what `adsidecar check` shows.

use std::fmt::{Display, Write};
use std::time::Duration;

use super::accounts::IDS;
use super::{Config, Environment, FernetKeys};
use crate::domain::account::{Account, Region};
use crate::domain::policy::Rules;
use crate::domain::secret::Secret;
use crate::inbound::proxy::Selection;
use crate::server::Listen;
use crate::upstream::Http2;

/// Stands in the place of a secret.
const HIDDEN: &str = "\"…\"";

impl Config {
    /// The resolved configuration as TOML, each secret as `…`. With its secrets put back it means the same.
    pub fn redacted_toml(&self) -> String {
        let mut page = Page(String::new());
        page.pair("environment", quoted(self.environment.as_str()));
        self.print_amazon(&mut page);
        self.print_doors(&mut page);
        self.print_keeping(&mut page);
        self.print_upstream(&mut page);
        let policy = &self.proxy.policy;
        page.section("policy");
        print_rules(&mut page, &policy.rules);
        page.pair("mode", quoted(policy.mode.as_str()));
        page.section("metrics");
        page.pair("max_user_series", self.metrics.max_user_series);
        page.section("log");
        let format = match self.log.format {
            crate::telemetry::log::Format::Text => "text",
            crate::telemetry::log::Format::Json => "json",
        };
        page.pair("format", quoted(format));
        page.pair("level", quoted(self.log.level.as_str()));
        page.pair("audit", self.log.audit);
        page.section("shutdown");
        page.pair("accept", duration(self.shutdown.accept));
        page.pair("drain", duration(self.shutdown.drain));
        self.proxy.accounts.iter().for_each(|account| print_account(&mut page, account));
        page.0
    }

    fn print_amazon(&self, page: &mut Page) {
        let lwa = &self.lwa;
        page.section("amazon");
        page.pair("client_id", quoted(&lwa.client_id));
        page.secrets("client_secret", &lwa.client_secrets);
        page.pair("redirect_uri", quoted(&lwa.redirect_uri));
        page.pair("scope", quoted(&lwa.scope));
        page.pair("region", quoted(lwa.region.as_str()));
        if self.tokens.adopt.is_some() {
            page.pair("refresh_token", HIDDEN);
        }
        let own = |url: &Option<url::Url>, region: &str| quoted(url.as_ref().map_or(region, url::Url::as_str));
        page.pair("authorize_url", own(&lwa.authorize_url, lwa.region.authorize_url()));
        page.pair("token_url", own(&lwa.token_url, lwa.region.token_url()));
        page.roots(lwa.extra_roots.len());
    }

    fn print_doors(&self, page: &mut Page) {
        page.section("proxy");
        page.listen(&self.proxy_listen, self.proxy_listen_default);
        page.pair("allow_remote", self.allow_remote);
        page.pair("socket_mode", quoted(&format!("{:04o}", self.socket_mode)));
        page.pair("peer_uids", list(self.admission.peer_uids.iter().map(ToString::to_string)));
        page.pair("allowed_hosts", list(self.admission.allowed_hosts.iter().map(|host| quoted(host))));
        page.secrets("caller_token", &self.admission.caller_tokens);
        page.pair("token_shim", self.proxy.token_shim);
        let selection = match self.proxy.selection {
            Selection::Header => "header",
            Selection::Fixed => "fixed",
        };
        page.pair("selection", quoted(selection));
        page.pair("replay_limit", quoted(&format!("{}B", self.proxy.replay_limit)));
        let max_body = self.proxy.max_body.map_or_else(|| "none".to_owned(), |bytes| format!("{bytes}B"));
        page.pair("max_body", quoted(&max_body));
        page.pair("max_connections", self.limits.max_connections);
        page.pair("header_timeout", duration(self.limits.header_timeout));
        page.pair("idle_timeout", duration(self.limits.idle_timeout));
        page.pair("body_timeout", duration(self.proxy.body_timeout));
        page.pair("write_timeout", duration(self.limits.write_timeout));
        page.section("login");
        match self.login_listen.as_slice() {
            [] => page.pair("listen", quoted("off")),
            listen => page.listen(listen, false),
        }
        if let Some(url) = &self.login.frontend_url {
            page.pair("frontend_url", quoted(url.as_str()));
        }
        page.pair("confirm", self.login.confirm);
        page.section("admin");
        page.listen(&self.admin_listen, self.admin_listen_default);
        if let Some(url) = &self.admin.public_url {
            page.pair("public_url", quoted(url.as_str()));
        }
    }

    fn print_keeping(&self, page: &mut Page) {
        page.section("store");
        match &self.store.postgres {
            None => {
                page.pair("kind", quoted("sled"));
                page.pair("path", quoted(&self.store.path.to_string_lossy()));
            }
            Some(_) => {
                page.pair("kind", quoted("postgres"));
                page.pair("postgres_url", HIDDEN);
            }
        }
        match &self.fernet_keys {
            FernetKeys::Given(keys) => page.secrets("fernet_keys", keys),
            FernetKeys::MakeBesideStore => page.remark("fernet_keys: none given, one is kept beside the store"),
        }
        page.section("refresh");
        page.pair("margin", duration(self.tokens.policy.margin));
        page.pair("ahead", duration(self.tokens.policy.ahead));
        page.pair("sweep", duration(self.tokens.sweep));
        page.pair("idle_after", duration(self.tokens.policy.idle_after));
        page.pair("concurrency", self.tokens.concurrency);
    }

    fn print_upstream(&self, page: &mut Page) {
        page.section("upstream");
        for (region, origin) in Region::ALL.iter().zip(&self.upstream.origins) {
            page.pair(region.as_str(), quoted(origin.as_str().trim_end_matches('/')));
        }
        page.roots(self.upstream.extra_roots.len());
        let http2 = match self.upstream.http2 {
            Http2::Auto => "auto",
            Http2::Never => "never",
            Http2::Always => "always",
        };
        page.pair("http2", quoted(http2));
        page.pair("connect_timeout", duration(self.upstream.connect_timeout));
        page.pair("response_timeout", duration(self.upstream.response_timeout));
        page.pair("idle_timeout", duration(self.upstream.idle_timeout));
    }
}

impl Environment {
    fn as_str(self) -> &'static str {
        match self {
            Self::Production => "production",
            Self::Development => "development",
        }
    }
}

fn print_account(page: &mut Page, account: &Account) {
    page.0.push_str("\n[[account]]\n");
    page.pair("name", quoted(&account.name));
    page.pair("user", quoted(account.user.as_str()));
    if let Some(region) = account.region {
        page.pair("region", quoted(region.as_str()));
    }
    for (key, context) in IDS {
        if let Some(id) = account.ids.get(context) {
            page.pair(key, quoted(&String::from_utf8_lossy(id.as_bytes())));
        }
    }
    if !account.headers.is_empty() {
        let headers: Vec<_> =
            account.headers.iter().map(|(name, _)| format!("{} = {HIDDEN}", quoted(name.as_str()))).collect();
        page.pair("headers", format!("{{ {} }}", headers.join(", ")));
    }
    if !account.rules.is_empty() {
        print_rules(page, &account.rules);
    }
}

fn print_rules(page: &mut Page, rules: &Rules) {
    page.pair("read_only", rules.read_only());
    page.pair("allow", list(rules.allow().map(|entry| quoted(&entry.to_string()))));
}

struct Page(String);

impl Page {
    fn section(&mut self, name: &str) {
        self.line(format_args!("\n[{name}]"));
    }

    fn pair(&mut self, key: &str, value: impl Display) {
        self.line(format_args!("{key} = {value}"));
    }

    fn remark(&mut self, text: impl Display) {
        self.line(format_args!("# {text}"));
    }

    fn secrets(&mut self, key: &str, secrets: &[Secret]) {
        match secrets.len() {
            0 => {}
            1 => self.pair(key, HIDDEN),
            _ => self.pair(key, list(secrets.iter().map(|_| HIDDEN.to_owned()))),
        }
    }

    fn listen(&mut self, listen: &[Listen], default: bool) {
        let addresses = list(listen.iter().map(|listen| match listen {
            Listen::Tcp(address) => quoted(address),
            Listen::Unix(path) => quoted(&format!("unix:{}", path.display())),
        }));
        if default {
            self.remark(format_args!("listen = {addresses}, [::1] only where the machine has IPv6"));
        } else {
            self.pair("listen", addresses);
        }
    }

    fn roots(&mut self, count: usize) {
        if count > 0 {
            self.remark(format_args!("ca_file: {count} certificates read"));
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a String takes all that is written to it");
    }
}

fn duration(duration: Duration) -> String {
    quoted(&humantime::format_duration(duration).to_string())
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
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
