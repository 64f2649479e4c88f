//! From the layers to a [`Config`]: every key is read here once, with its default.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::accounts::accounts;
use super::checks;
use super::errors::{ConfigError, ConfigErrors};
use super::reader::Reader;
use super::sources::Merged;
use super::{Config, Environment, FernetKeys, Shutdown};
use crate::auth::{login, lwa, tokens};
use crate::domain::account::Region;
use crate::domain::grant::{RefreshPolicy, RefreshToken};
use crate::domain::policy::{self, Allow, Mode, Rules};
use crate::inbound::{admin, admission, proxy};
use crate::server::Listen;
use crate::telemetry::{log, metrics};
use crate::{server, store, upstream};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// What a timeout can be: below 10 ms nothing ever succeeds, and who waits longer than an hour waits for nothing.
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=HOUR;

/// Most bytes of a request body that are held for a replay: they are held for each request that is in flight.
const MAX_REPLAY: u64 = 64 * 1024 * 1024;

/// Where the proxy door listens unless told otherwise.
const PROXY_LISTEN: [&str; 2] = ["127.0.0.1:8001", "[::1]:8001"];

/// Where the admin door listens unless told otherwise.
const ADMIN_LISTEN: [&str; 2] = ["127.0.0.1:9464", "[::1]:9464"];

const FERNET_CURE: &str = "missing Fernet key: set store.fernet_keys or store.fernet_keys_file (environment: FERNET_KEY); \
                           `adsidecar key new` makes one";

/// The configuration that `merged` gives, or all that is wrong with it, on top of the `problems` of its sources.
pub(super) fn resolve(merged: &Merged, problems: Vec<ConfigError>) -> Result<Config, ConfigErrors> {
    let mut read = Reader::new(merged, problems);
    let read = &mut read;
    let words = [("production", Environment::Production), ("development", Environment::Development)];
    let environment = read.choice("environment", Environment::Production, &words);
    not_built_yet(read);

    let lwa = lwa(read, environment);
    let proxy = proxy(read, &lwa);
    let (proxy_listen, proxy_listen_default) = door(read, "proxy.listen", &PROXY_LISTEN);
    let login_listen = oauth(read);
    let (admin_listen, admin_listen_default) = door(read, "admin.listen", &ADMIN_LISTEN);
    let (login, frontend_origin) = login(read, environment, !login_listen.is_empty());
    let admission = admission_settings(read, frontend_origin);
    let allow_remote = read.flag("proxy.allow_remote", false);
    remote_is_meant(read, &proxy_listen, allow_remote);
    doors_are_apart(
        read,
        &[("proxy.listen", &proxy_listen), ("login.listen", &login_listen), ("admin.listen", &admin_listen)],
    );
    let config = Config {
        environment,
        proxy_listen,
        proxy_listen_default,
        allow_remote,
        socket_mode: read.parsed("proxy.socket_mode", checks::socket_mode).unwrap_or(0o600),
        limits: limits(read),
        login_listen,
        admin_listen,
        admin_listen_default,
        admin: admin::Settings { public_url: read.parsed("admin.public_url", checks::web_url) },
        proxy,
        admission,
        login,
        lwa,
        upstream: upstream(read),
        tokens: tokens(read),
        store: store(read),
        fernet_keys: fernet_keys(read, environment),
        metrics: metrics::Settings { max_user_series: read.count("metrics.max_user_series", 1000, 0..=1_000_000) },
        log: log(read, environment),
        shutdown: Shutdown {
            accept: read.duration("shutdown.accept", Duration::ZERO, Duration::ZERO..=HOUR),
            drain: read.duration("shutdown.drain", 25 * SECOND, Duration::ZERO..=HOUR),
        },
    };
    match read.take_problems() {
        problems if problems.is_empty() => Ok(config),
        problems => Err(ConfigErrors(problems)),
    }
}

// The parts, in the order of the manual.

fn lwa(read: &mut Reader<'_>, environment: Environment) -> lwa::Settings {
    const REDIRECT_URI: &str = "http://localhost:8001/api/auth/amazon/callback";
    const SCOPE: &str = "advertising::campaign_management";
    if !read.is_given("amazon.client_id") {
        read.missing("amazon.client_id", "missing client id: set amazon.client_id (environment: AMAZON_CLIENT_ID)");
    }
    if !read.is_given("amazon.client_secret") {
        read.missing(
            "amazon.client_secret",
            "missing client secret: set amazon.client_secret or amazon.client_secret_file (environment: \
             AMAZON_CLIENT_SECRET)",
        );
    }
    let production = environment == Environment::Production;
    let redirect_uri = read.parsed("amazon.redirect_uri", |text| checks::redirect_uri(text, production));
    lwa::Settings {
        client_id: read.parsed("amazon.client_id", checks::client_id).unwrap_or_default(),
        client_secrets: read.secrets("amazon.client_secret"),
        redirect_uri: redirect_uri.unwrap_or_else(|| REDIRECT_URI.to_owned()),
        scope: read.parsed("amazon.scope", checks::scope).unwrap_or_else(|| SCOPE.to_owned()),
        region: read
            .parsed("amazon.region", |text| text.parse::<Region>().map_err(|error| format!("is refused: {error}")))
            .unwrap_or_default(),
        authorize_url: read.parsed("amazon.authorize_url", checks::https_or_local_url),
        token_url: read.parsed("amazon.token_url", checks::https_url),
        extra_roots: read.certificates("amazon.ca_file"),
    }
}

fn proxy(read: &mut Reader<'_>, lwa: &lwa::Settings) -> proxy::Settings {
    let selections = [("header", proxy::Selection::Header), ("fixed", proxy::Selection::Fixed)];
    proxy::Settings {
        client_id: lwa.client_id.clone(),
        region: lwa.region,
        accounts: accounts(read),
        selection: read.choice("proxy.selection", proxy::Selection::Header, &selections),
        replay_limit: usize::try_from(read.size("proxy.replay_limit", 256 * 1024, MAX_REPLAY))
            .expect("64 MiB, the most that is read, fit into the memory of any machine that runs this"),
        max_body: unless(read, "proxy.max_body", "none").then(|| read.size("proxy.max_body", 0, u64::MAX)),
        body_timeout: read.duration("proxy.body_timeout", 30 * SECOND, TIMEOUT),
        token_shim: read.flag("proxy.token_shim", true),
        policy: policy(read),
    }
}

fn policy(read: &mut Reader<'_>) -> policy::Settings {
    let mut allow = Vec::new();
    for text in read.list("policy.allow").unwrap_or_default() {
        match text.parse::<Allow>() {
            Ok(entry) => allow.push(entry),
            Err(error) => read.wrong("policy.allow", format!("entry {error}")),
        }
    }
    let modes = [Mode::Enforce, Mode::Observe].map(|mode| (mode.as_str(), mode));
    policy::Settings {
        mode: read.choice("policy.mode", Mode::Enforce, &modes),
        rules: Rules::new(read.flag("policy.read_only", false), allow),
    }
}

/// Whether `key` is given, and as something else than the word that stands for nothing.
fn unless(read: &Reader<'_>, key: &str, nothing: &str) -> bool {
    read.is_given(key) && read.raw(key).and_then(figment::value::Value::as_str) != Some(nothing)
}

fn limits(read: &mut Reader<'_>) -> server::Limits {
    server::Limits {
        max_connections: read.count("proxy.max_connections", 4096, 1..=1_000_000),
        header_timeout: read.duration("proxy.header_timeout", 10 * SECOND, TIMEOUT),
        idle_timeout: read.duration("proxy.idle_timeout", 10 * MINUTE, *TIMEOUT.start()..=DAY),
        write_timeout: read.duration("proxy.write_timeout", 30 * SECOND, TIMEOUT),
    }
}

fn login(read: &mut Reader<'_>, environment: Environment, door: bool) -> (login::Settings, Option<String>) {
    let frontend_url = read.parsed("login.frontend_url", checks::web_url);
    let origin = frontend_url.as_ref().map(|url| url.origin().ascii_serialization());
    let settings = login::Settings {
        frontend_url,
        confirm: read.flag("login.confirm", door),
        secure_cookies: environment == Environment::Production,
    };
    (settings, origin)
}

fn admission_settings(read: &mut Reader<'_>, frontend_origin: Option<String>) -> admission::Settings {
    let mut allowed_hosts = Vec::new();
    for text in read.list("proxy.allowed_hosts").unwrap_or_default() {
        match checks::host(&text) {
            Ok(host) => allowed_hosts.push(host),
            Err(message) => read.wrong("proxy.allowed_hosts", message),
        }
    }
    admission::Settings {
        allowed_hosts,
        caller_tokens: read.secrets("proxy.caller_token"),
        frontend_origin,
        peer_uids: read.numbers("proxy.peer_uids"),
    }
}

fn store(read: &mut Reader<'_>) -> store::Settings {
    let path = PathBuf::from(read.text("store.path").unwrap_or_else(|| "data/adsidecar.sled".to_owned()));
    let shared = read.choice("store.kind", false, &[("sled", false), ("postgres", true)]);
    let url = match (shared, read.is_given("store.postgres_url")) {
        (true, true) => read.secret("store.postgres_url"),
        (true, false) => {
            read.wrong(
                "store.kind",
                "needs a database: set store.postgres_url or store.postgres_url_file, or write sled",
            );
            None
        }
        (false, true) => {
            read.wrong("store.postgres_url", "is of no use to sled: write store.kind = \"postgres\", or remove it");
            None
        }
        (false, false) => None,
    };
    let postgres = url.and_then(|url| {
        let address = store::ConnectionUrl::parse(url.expose());
        address.map_err(|message| read.wrong("store.postgres_url", message)).ok()
    });
    store::Settings { path, postgres }
}

fn fernet_keys(read: &mut Reader<'_>, environment: Environment) -> FernetKeys {
    if !read.is_given("store.fernet_keys") {
        // One that is made beside a store is made once; several processes need the same.
        if environment == Environment::Production || read.is_given("store.postgres_url") {
            read.missing("store.fernet_keys", FERNET_CURE);
        }
        return FernetKeys::MakeBesideStore;
    }
    let keys = read.secrets("store.fernet_keys");
    if keys.iter().any(|key| fernet::Fernet::new(key.expose()).is_none()) {
        read.wrong(
            "store.fernet_keys",
            "is no Fernet key: a key has 32 bytes in URL-safe base64, 44 characters without quotes; `adsidecar key \
             new` makes one",
        );
    }
    FernetKeys::Given(keys)
}

fn tokens(read: &mut Reader<'_>) -> tokens::Settings {
    let adopt = read.secret("amazon.refresh_token").and_then(|secret| RefreshToken::new(secret).ok());
    // Amazon's access tokens live for an hour: who renews them 50 minutes ahead already renews without a pause.
    let policy = RefreshPolicy {
        margin: read.duration("refresh.margin", 5 * MINUTE, 10 * SECOND..=30 * MINUTE),
        ahead: read.duration("refresh.ahead", 15 * MINUTE, 10 * SECOND..=50 * MINUTE),
        idle_after: read.duration("refresh.idle_after", 7 * DAY, MINUTE..=365 * DAY),
    };
    if policy.ahead < policy.margin {
        let key = if read.is_given("refresh.ahead") { "refresh.ahead" } else { "refresh.margin" };
        read.wrong(key, "leaves callers to wait for renewals: make refresh.ahead at least refresh.margin");
    }
    tokens::Settings {
        policy,
        sweep: read.duration("refresh.sweep", 10 * MINUTE, SECOND..=HOUR),
        concurrency: read.count("refresh.concurrency", 8, 1..=256),
        adopt,
    }
}

fn upstream(read: &mut Reader<'_>) -> upstream::Settings {
    use upstream::Http2;
    let words = [("auto", Http2::Auto), ("never", Http2::Never), ("always", Http2::Always)];
    let origins = Region::ALL.map(|region| {
        read.parsed(&format!("upstream.{region}"), checks::https_origin).unwrap_or_else(|| {
            Url::parse(&format!("https://{}", region.ads_host())).expect("Amazon's hosts are constants and parse")
        })
    });
    upstream::Settings {
        origins,
        extra_roots: read.certificates("upstream.ca_file"),
        http2: read.choice("upstream.http2", Http2::Auto, &words),
        connect_timeout: read.duration("upstream.connect_timeout", 5 * SECOND, TIMEOUT),
        response_timeout: read.duration("upstream.response_timeout", 120 * SECOND, TIMEOUT),
        idle_timeout: read.duration("upstream.idle_timeout", 4 * SECOND, TIMEOUT),
    }
}

fn log(read: &mut Reader<'_>, environment: Environment) -> log::Settings {
    let format = match environment {
        Environment::Production => log::Format::Json,
        Environment::Development => log::Format::Text,
    };
    let levels = log::Level::ALL.map(|level| (level.as_str(), level));
    log::Settings {
        format: read.choice("log.format", format, &[("text", log::Format::Text), ("json", log::Format::Json)]),
        level: read.choice("log.level", log::Level::Info, &levels),
        audit: read.flag("log.audit", false),
    }
}

// The doors.

/// Where a door listens, and whether that is the default.
fn door(read: &mut Reader<'_>, key: &str, default: &[&str]) -> (Vec<Listen>, bool) {
    let given = read.is_given(key);
    let texts = read.list(key).unwrap_or_else(|| default.iter().map(|&text| text.to_owned()).collect());
    if texts.is_empty() {
        read.wrong(key, "is empty: name an address, or remove it");
    }
    let mut listens = Vec::new();
    for text in texts {
        match checks::listen(&text) {
            Ok(listen) => listens.push(listen),
            Err(message) => read.wrong(key, message),
        }
    }
    (listens, !given)
}

fn oauth(read: &mut Reader<'_>) -> Vec<Listen> {
    if unless(read, "login.listen", "off") { door(read, "login.listen", &[]).0 } else { Vec::new() }
}

/// The proxy door hands out Amazon's data: another machine reaches it only where somebody meant that, with a token.
fn remote_is_meant(read: &mut Reader<'_>, listens: &[Listen], allowed: bool) {
    if !listens.iter().any(checks::is_remote) {
        return;
    }
    let cure = match (allowed, read.is_given("proxy.caller_token")) {
        (true, true) => return,
        (false, true) => "set proxy.allow_remote = true",
        (true, false) => "set proxy.caller_token or proxy.caller_token_file",
        (false, false) => {
            "set proxy.allow_remote = true, and proxy.caller_token or proxy.caller_token_file (a sidecar needs neither: \
             it listens on 127.0.0.1)"
        }
    };
    read.wrong("proxy.listen", format!("can be reached by other machines: {cure}"));
}

fn doors_are_apart(read: &mut Reader<'_>, doors: &[(&str, &Vec<Listen>)]) {
    let all: Vec<_> =
        doors.iter().flat_map(|(key, listens)| listens.iter().map(move |listen| (*key, listen))).collect();
    for (index, (key, listen)) in all.iter().enumerate() {
        let Some((other, _)) = all[..index].iter().find(|(_, earlier)| checks::clash(earlier, listen)) else {
            continue;
        };
        // The one that somebody gave is the one to change.
        let (key, other) = if read.is_given(key) { (key, other) } else { (other, key) };
        read.wrong(key, format!("names an address that {other} has already: choose another port"));
    }
}

// What this version cannot do.

/// Keys whose feature does not exist yet, with the one value that they may have until then.
const NOT_BUILT: [(&str, &[&str], &str); 3] = [
    ("throttle.mode", &["off", "observe", "enforce", "queue"], "the throttle is not built yet: write off"),
    ("throttle.queue_timeout", &["30s"], "the throttle is not built yet: remove it"),
    ("upstream.proxy", &["none"], "an outgoing proxy is not built yet: remove it"),
];

/// Refuses what this version cannot do, rather than letting somebody rely on it.
fn not_built_yet(read: &mut Reader<'_>) {
    use figment::value::Value;
    for (key, words, reason) in NOT_BUILT {
        let text = match read.raw(key) {
            None if !read.is_given(key) => continue,
            Some(Value::Bool(_, flag)) => Some(flag.to_string()),
            Some(Value::String(_, text)) => Some(text.clone()),
            _ => None,
        };
        let position =
            words.iter().position(|word| text.as_deref().is_some_and(|text| text.eq_ignore_ascii_case(word)));
        match position {
            Some(0) => {}
            None if words.len() > 1 => {
                let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
                read.wrong(key, format!("is none of its words: write {}", words.join(" or ")));
            }
            _ => read.wrong(key, reason),
        }
    }
}
