//! The configuration: what a user writes becomes a [`Config`] that cannot be wrong.
//!
//! Defaults lie at the bottom, over them the TOML file, the environment and `--set`. figment lays the layers over each
//! other and remembers where a value came from; the walk from there to a [`Config`] is our own and not serde's, because
//! serde stops at the first thing it does not like and quotes it, and this has to report everything at once and quote
//! no value at all.
//!
//! Reading order: [`keys`] (the table of all keys), `sources` (the layers), `resolve` (each key into the field that
//! uses it), `reader` and `checks` (single values), `accounts`, `errors`, `print`. Paths are relative to the working
//! directory.

use std::path::PathBuf;
use std::time::Duration;

use crate::auth::accounts::Automatic;
use crate::auth::{login, lwa, tokens};
use crate::domain::secret::Secret;
use crate::inbound::{admin, admission, proxy};
use crate::notify;
use crate::server::Listen;
use crate::telemetry::{log, metrics};
use crate::{server, store, throttle, upstream};

mod accounts;
mod checks;
mod files;
pub mod keys;
mod names;
mod print;
mod errors;
mod reader;
mod resolve;
mod sources;

pub use errors::{ConfigError, ConfigErrors};
use print::Effective;
pub use sources::Sources;

/// The whole configuration, grouped by the part that uses it.
#[derive(Clone, Debug)]
pub struct Config {
    /// `environment`.
    pub environment: Environment,
    /// `proxy.listen`.
    pub proxy_listen: Vec<Listen>,
    /// Nobody set `proxy.listen`: `[::1]` is bound only where the machine has IPv6.
    pub proxy_listen_default: bool,
    /// `proxy.allow_remote`. Already obeyed: a remote `proxy_listen` is here only where this is true.
    pub allow_remote: bool,
    /// `proxy.socket_mode`: who may connect to a Unix socket of the proxy listener.
    pub socket_mode: u32,
    /// `proxy.max_connections`, `proxy.header_timeout`, `proxy.idle_timeout`, `proxy.write_timeout`.
    pub limits: server::Limits,
    /// `login.listen`; empty: the login listener is off.
    pub login_listen: Vec<Listen>,
    /// `admin.listen`.
    pub admin_listen: Vec<Listen>,
    /// Nobody set `admin.listen`: `[::1]` is bound only where the machine has IPv6.
    pub admin_listen_default: bool,
    /// Settings of the admin listener.
    pub admin: admin::Settings,
    /// For the spine, with the accounts.
    pub proxy: proxy::Settings,
    /// `accounts.sync`.
    pub accounts_sync: Automatic,
    /// The checks before a request is served.
    pub admission: admission::Settings,
    /// For logins.
    pub login: login::Settings,
    /// For Login with Amazon.
    pub lwa: lwa::Settings,
    /// For the connections to the Ads hosts.
    pub upstream: upstream::Settings,
    /// `[throttle]`.
    pub throttle: throttle::Settings,
    /// For the tokens.
    pub tokens: tokens::Settings,
    /// For the store.
    pub store: store::Settings,
    /// `store.fernet_keys`.
    pub fernet_keys: FernetKeys,
    /// For the metrics.
    pub metrics: metrics::Settings,
    /// For the log.
    pub log: log::Settings,
    /// `[notify]`.
    pub notify: notify::Settings,
    /// `[shutdown]`.
    pub shutdown: Shutdown,
    /// Values that were repaired, each with its key, source and remedy.
    pub warnings: Vec<ConfigError>,
    /// The value of each key, for `adsidecar check` and for [`restart_only`](Self::restart_only).
    effective: Effective,
}

/// The kind of deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Environment {
    /// JSON log, redirect URI by HTTPS or on this machine, `Secure` cookies, and a configured Fernet key.
    Production,
    /// Text log, and a Fernet key that is created if none is configured.
    Development,
}

/// The keys that encrypt the stored tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FernetKeys {
    /// The first encrypts, all decrypt. Each is a well-formed key, and there is at least one.
    Given(Vec<Secret>),
    /// None was given, in development: one is read from a file beside the store, and created there the first time.
    MakeBesideStore,
}

/// The time limits of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// `shutdown.accept`: how long new connections are still accepted.
    pub accept: Duration,
    /// `shutdown.drain`: the maximum wait for responses in flight.
    pub drain: Duration,
}

impl Config {
    /// Logs each value that was repaired, and each that is probably not what is meant.
    pub fn log_warnings(&self) {
        for warning in &self.warnings {
            tracing::warn!(%warning, "a value of the configuration needs attention");
        }
    }
}

/// Reads all sources.
///
/// # Errors
///
/// All problems at once, each with its key, source and remedy, without any configured value.
pub fn load(sources: &Sources) -> Result<Config, ConfigErrors> {
    let mut problems = Vec::new();
    let merged = sources::merge(sources, &mut problems);
    resolve::resolve(&merged, problems)
}

/// The addresses of the admin listener, for a probe: it needs no credentials, so their problems do not matter.
///
/// # Errors
///
/// The problems of the file as a whole and of `admin.listen`.
pub fn admin_listen(sources: &Sources) -> Result<Vec<Listen>, ConfigErrors> {
    let mut problems = Vec::new();
    let merged = sources::merge(sources, &mut problems);
    resolve::admin_listen(&merged, problems)
}

/// The files that `sources` refer to: the TOML file, and each file that a key names, readable or not. A TOML file that
/// cannot be read names no other.
pub fn files(sources: &Sources) -> Vec<PathBuf> {
    let merged = sources::merge(sources, &mut Vec::new());
    sources::toml_file(sources).into_iter().chain(merged.files()).collect()
}

#[cfg(test)]
mod tests;
