//! From the layers to a [`Config`]: each key of the table is read here once, into the field that uses it.
//!
//! The file is long because it reads each key of the table once, section by section.

use std::path::PathBuf;

use url::Url;

use super::accounts::accounts;
use super::checks;
use super::errors::{ConfigError, ConfigErrors};
use super::keys::{KEYS, Kind};
use super::names;
use super::print::quoted;
use super::reader::{Reader, no_word};
use super::sources::{Merged, WHOLE_FILE};
use super::{Config, Environment, FernetKeys, Shutdown};
use crate::auth::accounts::Automatic;
use crate::auth::{login, lwa, tokens};
use crate::domain::account::{Account, AmazonHost, Context, Ids, Region, UserId};
use crate::domain::credential::Credential;
use crate::domain::grant::{RefreshPolicy, RefreshToken};
use crate::domain::policy::{self, Allow, Mode, Rules};
use crate::domain::throttle_mode::ThrottleMode;
use crate::inbound::{admin, admission, proxy};
use crate::notify;
use crate::server::Listen;
use crate::store::keyring::{KeyError, Keyring};
use crate::telemetry::{log, metrics};
use crate::{server, store, throttle, upstream};

const FERNET_CURE: &str = "missing Fernet key: set store.fernet_keys or store.fernet_keys_file (environment: \
                           FERNET_KEY); `adsidecar key new` makes one";

/// The configuration that `merged` gives, or all that is wrong with it, on top of the `problems` of its sources.
pub(super) fn resolve(merged: &Merged, problems: Vec<ConfigError>) -> Result<Config, ConfigErrors> {
    let mut read = Reader::new(merged, problems);
    let read = &mut read;
    let environment = read
        .choice("environment", [("production", Environment::Production), ("development", Environment::Development)]);
    not_built_yet(read);

    let lwa = lwa(read, environment);
    let proxy = proxy(read, &lwa);
    let (proxy_listen, proxy_listen_default) = listener(read, "proxy.listen");
    let (login_listen, _) = listener(read, "login.listen");
    let (admin_listen, admin_listen_default) = listener(read, "admin.listen");
    let (login, frontend_origin) = login(read, environment, !login_listen.is_empty());
    let admission = admission_settings(read, frontend_origin);
    let allow_remote = read.flag("proxy.allow_remote").unwrap_or_default();
    remote_is_meant(read, &proxy_listen, allow_remote);
    listeners_are_apart(
        read,
        &[("proxy.listen", &proxy_listen), ("login.listen", &login_listen), ("admin.listen", &admin_listen)],
    );
    redirect_uri_arrives(read, &lwa.redirect_uri, &[&proxy_listen, &login_listen]);
    let config = Config {
        environment,
        proxy_listen,
        proxy_listen_default,
        allow_remote,
        socket_mode: socket_mode(read),
        limits: limits(read),
        login_listen,
        admin_listen,
        admin_listen_default,
        admin: admin::Settings { public_url: read.parsed("admin.public_url", checks::web_url) },
        proxy,
        accounts_sync: read.choice("accounts.sync", [("daily", Automatic::Daily), ("off", Automatic::Off)]),
        admission,
        login,
        lwa,
        upstream: upstream(read),
        throttle: throttle(read),
        tokens: tokens(read),
        store: store(read),
        fernet_keys: fernet_keys(read, environment),
        metrics: metrics::Settings { max_user_series: read.count("metrics.max_user_series") },
        log: log(read, environment),
        notify: notify(read),
        shutdown: Shutdown { accept: read.duration("shutdown.accept"), drain: read.duration("shutdown.drain") },
        warnings: read.take_warnings(),
        effective: read.take_effective(),
    };
    match read.take_problems() {
        problems if problems.is_empty() => Ok(config),
        problems => Err(ConfigErrors(problems)),
    }
}

/// The addresses of the admin listener, whatever else is wrong with the configuration.
pub(super) fn admin_listen(merged: &Merged, problems: Vec<ConfigError>) -> Result<Vec<Listen>, ConfigErrors> {
    let mut read = Reader::new(merged, problems);
    let (listen, _) = listener(&mut read, "admin.listen");
    let mut problems = read.take_problems();
    problems.retain(|problem| [WHOLE_FILE, "admin.listen"].contains(&problem.key.as_str()));
    if problems.is_empty() { Ok(listen) } else { Err(ConfigErrors(problems)) }
}

// The parts, in the order of the manual.

fn lwa(read: &mut Reader<'_>, environment: Environment) -> lwa::Settings {
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
    let settings = lwa::Settings {
        client_id: read.credential("amazon.client_id", Credential::ClientId, checks::client_id).unwrap_or_default(),
        client_secrets: read.secrets("amazon.client_secret", Credential::ClientSecret),
        redirect_uri: read
            .parsed("amazon.redirect_uri", |text| checks::redirect_uri(text, production))
            .unwrap_or_default(),
        scope: read.credential("amazon.scope", Credential::Scope, checks::scope).unwrap_or_default(),
        region: read
            .parsed("amazon.region", |text| text.parse::<Region>().map_err(|error| format!("is refused: {error}")))
            .unwrap_or_default(),
        authorize_url: read.parsed("amazon.authorize_url", checks::https_or_local_url),
        token_url: read.parsed("amazon.token_url", checks::https_url),
        proxy: read.proxy("amazon.proxy"),
        extra_roots: read.certificates("amazon.ca_file"),
    };
    if !settings.redirect_uri.is_empty() && !checks::is_callback(&settings.redirect_uri) {
        read.doubt(
            "amazon.redirect_uri",
            "does not have the path /api/auth/amazon/callback: a login ends there only if something in between \
             rewrites the path",
        );
    }
    if settings.authorize_url.is_none() {
        read.record("amazon.authorize_url", quoted(settings.region.authorize_url()));
    }
    if settings.token_url.is_none() {
        read.record("amazon.token_url", quoted(settings.region.token_url()));
    }
    settings
}

fn proxy(read: &mut Reader<'_>, lwa: &lwa::Settings) -> proxy::Settings {
    proxy::Settings {
        client_id: lwa.client_id.clone(),
        region: lwa.region,
        accounts: all_accounts(read),
        selection: read
            .choice("proxy.selection", [("header", proxy::Selection::Header), ("fixed", proxy::Selection::Fixed)]),
        replay_limit: usize::try_from(read.size("proxy.replay_limit"))
            .expect("the table bounds it at 64 MiB, which fit into the memory of any machine"),
        max_body: read.size_or_none("proxy.max_body"),
        body_timeout: read.duration("proxy.body_timeout"),
        token_shim: read.flag("proxy.token_shim").unwrap_or_default(),
        policy: policy(read),
    }
}

/// The accounts, with one named `default` that has `amazon.profile_id`, if that is given.
fn all_accounts(read: &mut Reader<'_>) -> Vec<Account> {
    let mut accounts = accounts(read);
    let profile = read.parsed("amazon.profile_id", |text| {
        let digits = (1..=20).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        let profile = digits.then(|| text.to_owned());
        profile.ok_or("is no profile id: write the number profileId of an entry of GET /v2/profiles")
    });
    let Some(profile) = profile else { return accounts };
    let mut ids = Ids::default();
    if ids.set(Context::Scope, &profile).is_err() {
        return accounts;
    }
    if accounts.iter().any(|account| &*account.name == UserId::DEFAULT) {
        read.wrong(
            "amazon.profile_id",
            "is the profile of requests that select no account, and so is the [[account]] named default: keep one of \
             the two",
        );
    }
    accounts.push(Account {
        name: UserId::DEFAULT.into(),
        user: UserId::default(),
        region: None,
        ids,
        headers: Vec::new(),
        rules: Rules::default(),
        throttle: None,
    });
    accounts
}

fn socket_mode(read: &mut Reader<'_>) -> u32 {
    let mode = read.parsed("proxy.socket_mode", checks::socket_mode).unwrap_or_default();
    read.record("proxy.socket_mode", quoted(&format!("{mode:04o}")));
    mode
}

fn policy(read: &mut Reader<'_>) -> policy::Settings {
    let allow = read.entries("policy.allow", |text| text.parse::<Allow>().map_err(|error| format!("entry {error}")));
    policy::Settings {
        mode: read.choice("policy.mode", [("enforce", Mode::Enforce), ("observe", Mode::Observe)]),
        rules: Rules::new(read.flag("policy.read_only").unwrap_or_default(), allow),
    }
}

fn limits(read: &mut Reader<'_>) -> server::Limits {
    server::Limits {
        max_connections: read.count("proxy.max_connections"),
        header_timeout: read.duration("proxy.header_timeout"),
        idle_timeout: read.duration("proxy.idle_timeout"),
        write_timeout: read.duration("proxy.write_timeout"),
    }
}

fn login(read: &mut Reader<'_>, environment: Environment, has_listener: bool) -> (login::Settings, Option<String>) {
    let frontend_url = read.parsed("login.frontend_url", checks::web_url);
    let origin = frontend_url.as_ref().map(|url| url.origin().ascii_serialization());
    let confirm = read.flag("login.confirm").unwrap_or(has_listener);
    read.record("login.confirm", confirm);
    (login::Settings { frontend_url, confirm, secure_cookies: environment == Environment::Production }, origin)
}

fn admission_settings(read: &mut Reader<'_>, frontend_origin: Option<String>) -> admission::Settings {
    admission::Settings {
        allowed_hosts: read.entries("proxy.allowed_hosts", checks::host),
        caller_tokens: read.secrets("proxy.caller_token", Credential::CallerToken),
        frontend_origin,
        peer_uids: read.numbers("proxy.peer_uids"),
    }
}

fn store(read: &mut Reader<'_>) -> store::Settings {
    let path = PathBuf::from(read.text("store.path").unwrap_or_default());
    let shared = read.choice("store.kind", [("sled", false), ("postgres", true)]);
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
    if shared {
        read.effective().hide("store.path");
    }
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
        read.effective().remark("store.fernet_keys", "fernet_keys: none given, one is kept beside the store");
        return FernetKeys::MakeBesideStore;
    }
    let keys = read.secrets("store.fernet_keys", Credential::FernetKey);
    if let Err(KeyError::Invalid { flaw, .. }) = Keyring::new(&keys) {
        read.wrong(
            "store.fernet_keys",
            format!(
                "is not a Fernet key: {flaw}; a key is 32 bytes in base64, 44 characters; `adsidecar key new` makes one"
            ),
        );
    }
    FernetKeys::Given(keys)
}

fn tokens(read: &mut Reader<'_>) -> tokens::Settings {
    let adopt = read
        .secret_credential("amazon.refresh_token", Credential::RefreshToken)
        .and_then(|secret| RefreshToken::new(secret).ok());
    // An access token of Amazon's lives for an hour, so `refresh.ahead` has to stay well below that.
    let policy = RefreshPolicy {
        margin: read.duration("refresh.margin"),
        ahead: read.duration("refresh.ahead"),
        idle_after: read.duration("refresh.idle_after"),
    };
    if policy.ahead < policy.margin {
        let key = if read.is_given("refresh.ahead") { "refresh.ahead" } else { "refresh.margin" };
        read.wrong(key, "makes callers wait for refreshes: make refresh.ahead at least refresh.margin");
    }
    tokens::Settings {
        policy,
        sweep: read.duration("refresh.sweep"),
        concurrency: read.count("refresh.concurrency"),
        cache: read.count("store.cache"),
        adopt,
    }
}

fn upstream(read: &mut Reader<'_>) -> upstream::Settings {
    use upstream::{Http2, IdleTimeout};
    upstream::Settings {
        origins: Box::new(AmazonHost::ALL.map(|host| origin(read, host.key()))),
        extra_roots: read.certificates("upstream.ca_file"),
        http2: read
            .choice("upstream.http2", [("auto", Http2::Auto), ("never", Http2::Never), ("always", Http2::Always)]),
        proxy: read.proxy("upstream.proxy"),
        connect_timeout: read.duration("upstream.connect_timeout"),
        response_timeout: read.duration("upstream.response_timeout"),
        idle_timeout: read.duration_or_auto("upstream.idle_timeout").map_or(IdleTimeout::Auto, IdleTimeout::AtMost),
    }
}

fn throttle(read: &mut Reader<'_>) -> throttle::Settings {
    let families = read.entries("throttle.families", str::parse::<throttle::FamilyMode>);
    for (index, family) in families.iter().enumerate() {
        if families[..index].iter().any(|earlier| earlier.family == family.family) {
            read.wrong("throttle.families", format!("names {} twice: keep one of the two", family.family));
        }
    }
    throttle::Settings {
        mode: read.choice("throttle.mode", ThrottleMode::ALL.map(|mode| (mode.as_str(), mode))),
        queue_timeout: read.duration("throttle.queue_timeout"),
        max_waiting: read.count("throttle.max_waiting"),
        max_waiting_bytes: usize::try_from(read.size("throttle.max_waiting_bytes"))
            .expect("the table bounds it at 1 GiB, which fits into the memory of any machine"),
        coalesce_polls: read.flag("throttle.coalesce_polls").unwrap_or_default(),
        families,
    }
}

fn origin(read: &mut Reader<'_>, key: &str) -> Url {
    let origin = read.parsed(key, checks::https_origin).expect("the table has an origin for each host");
    read.record(key, quoted(origin.as_str().trim_end_matches('/')));
    origin
}

fn log(read: &mut Reader<'_>, environment: Environment) -> log::Settings {
    let given = read.choice_or_none("log.format", [("text", log::Format::Text), ("json", log::Format::Json)]);
    let format = given.unwrap_or(match environment {
        Environment::Development => log::Format::Text,
        Environment::Production => log::Format::Json,
    });
    read.record("log.format", quoted(if format == log::Format::Text { "text" } else { "json" }));
    log::Settings {
        format,
        format_given: read.is_given("log.format"),
        level: read.choice("log.level", log::Level::ALL.map(|level| (level.as_str(), level))),
        audit: read.flag("log.audit").unwrap_or_default(),
    }
}

fn notify(read: &mut Reader<'_>) -> notify::Settings {
    let url = read.secret("notify.url").and_then(|url| match checks::web_url(url.expose()) {
        Ok(_) => Some(url),
        Err(flaw) => {
            read.wrong("notify.url", flaw);
            None
        }
    });
    let secret = read.secret("notify.secret");
    if secret.is_some() && url.is_none() && !read.is_given("notify.url") {
        read.wrong("notify.secret", "signs nothing: set notify.url too");
    }
    if secret.as_ref().is_some_and(|secret| !notify::is_secret(secret)) {
        read.wrong("notify.secret", "is not base64 behind whsec_: correct it, or remove that prefix");
    }
    notify::Settings {
        url,
        secret,
        failing_after: read.duration("notify.failing_after"),
        throttled_after: read.duration("notify.throttled_after"),
        login_base: None,
    }
}

// The listeners.

/// The addresses of a listener, and whether they are the default. None if it is off.
fn listener(read: &mut Reader<'_>, key: &str) -> (Vec<Listen>, bool) {
    if read.says(key, "off") {
        read.record(key, quoted("off"));
        return (Vec::new(), false);
    }
    let addresses = read.entries(key, checks::listen);
    let is_default = !read.is_given(key);
    if is_default {
        read.effective().comment_out(names::row(key).name, "[::1] only where the machine has IPv6");
    }
    (addresses, is_default)
}

/// Refuses a proxy listener that other machines reach, unless it is allowed to and callers need a token.
fn remote_is_meant(read: &mut Reader<'_>, listens: &[Listen], allowed: bool) {
    if !listens.iter().any(checks::is_remote) {
        return;
    }
    let cure = match (allowed, read.is_given("proxy.caller_token")) {
        (true, true) => return,
        (false, true) => "set proxy.allow_remote = true",
        (true, false) => "set proxy.caller_token or proxy.caller_token_file",
        (false, false) => {
            "set proxy.allow_remote = true, and proxy.caller_token or proxy.caller_token_file (a sidecar needs \
             neither: it listens on 127.0.0.1)"
        }
    };
    read.wrong("proxy.listen", format!("can be reached by other machines: {cure}"));
}

/// Names a redirect URI on this machine at whose port nobody listens. Something in between may forward it, as a
/// container's published port does, so it is not refused.
fn redirect_uri_arrives(read: &mut Reader<'_>, redirect_uri: &str, listens: &[&Vec<Listen>]) {
    let Some(url) = Url::parse(redirect_uri).ok().filter(checks::is_local) else { return };
    let ports: Option<Vec<u16>> = listens.iter().flat_map(|listens| listens.iter()).map(checks::port).collect();
    // Port 0 becomes any port, and behind a Unix socket there is something in between.
    let Some(ports) = ports.filter(|ports| !ports.is_empty() && !ports.contains(&0)) else { return };
    let Some(port) = url.port_or_known_default().filter(|port| !ports.contains(port)) else { return };
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    read.doubt(
        "amazon.redirect_uri",
        format!(
            "leads to port {port} of this machine, where adsidecar does not listen (it does at {}): a login ends there \
             only if something in between forwards the port",
            ports.join(", ")
        ),
    );
}

/// Refuses two listeners at one address.
fn listeners_are_apart(read: &mut Reader<'_>, listeners: &[(&str, &Vec<Listen>)]) {
    let all: Vec<_> =
        listeners.iter().flat_map(|(key, listens)| listens.iter().map(move |listen| (*key, listen))).collect();
    for (index, (key, listen)) in all.iter().enumerate() {
        let Some((other, _)) = all[..index].iter().find(|(_, earlier)| checks::clash(earlier, listen)) else {
            continue;
        };
        // The one that was given is the one to change.
        let (key, other) = if read.is_given(key) { (key, other) } else { (other, key) };
        read.wrong(key, format!("names an address that {other} has already: choose another port"));
    }
}

// What this version cannot do.

/// Refuses a value that needs a feature which does not exist yet, so that nobody relies on it.
fn not_built_yet(read: &mut Reader<'_>) {
    use figment::value::Value;
    for key in KEYS {
        let Some(reason) = key.not_built.filter(|_| read.is_given(key.name)) else { continue };
        let text = match read.raw(key.name) {
            Some(Value::Bool(_, flag)) => Some(flag.to_string()),
            Some(Value::String(_, text)) => Some(text.clone()),
            _ => None,
        };
        let is = |word: &str| text.as_deref().is_some_and(|text| text.eq_ignore_ascii_case(word));
        match key.kind {
            _ if key.default_text().is_some_and(is) => {}
            Kind::Word(words) if !words.iter().any(|word| is(word)) => read.wrong(key.name, no_word(words)),
            _ => read.wrong(key.name, reason),
        }
    }
}
