//! The house as a whole: [`App::build`] opens the store and binds every door, [`App::run`] serves until it is told to
//! stop. `main`, the sandbox and the tests all come in through here.

mod services;
mod keys;
mod reload;
mod rotation;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::auth::login::PendingLogins;
use crate::auth::lwa::Lwa;
use crate::auth::tokens::{Background, TokenManager};
use crate::config::{Config, Sources};
use crate::domain::account::UserId;
use crate::domain::clock::Clock;
use crate::domain::grant::State;
use crate::inbound::admin::{Asked, Count, Reloader, Stage};
use crate::inbound::problem::{Code, Problem};
use crate::server::{CannedResponses, Door, Limits, Peer, Phase};
use crate::store::keyring::KeyError;
use crate::store::{Opened, StoreError, TokenStore};
use crate::telemetry::log::{Dropped, LogHandle};
use crate::telemetry::metrics::Metrics;
pub use keys::{key_file, keyring};
use reload::{ControlLoop, RestartOnly, Watched};
use rotation::Rotations;
use services::{ProcessState, Services};

/// The admin door serves a kubelet, a scraper and a person, and none of them for long.
const ADMIN_CONNECTIONS: usize = 256;
/// The file mode of a Unix socket of the login and the admin door: for the user that adsidecar runs as.
const OWN_SOCKET: u32 = 0o600;
/// How long a shutdown waits for token calls that are in flight: their own deadline and a little more.
const SETTLE: Duration = Duration::from_secs(12);

/// adsidecar, bound and not serving yet.
pub struct App {
    addresses: Addresses,
    doors: [Door; 3],
    limits: [Arc<ArcSwap<Limits>>; 3],
    services: Arc<ArcSwap<Services>>,
    process: ProcessState,
    background: Background,
    fixed: RestartOnly,
    rotations: Rotations,
    watched: Option<Watched>,
    asked: mpsc::Receiver<Asked>,
}

/// Where the doors listen. Empty for a door that is off, or listens at Unix sockets alone.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// The proxy door.
    pub proxy: Vec<SocketAddr>,
    /// The login door.
    pub login: Vec<SocketAddr>,
    /// The admin door.
    pub admin: Vec<SocketAddr>,
}

/// Why it does not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A Fernet key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The key file of development cannot be made or read.
    #[error("{}: {source}; make the directory writable, or set FERNET_KEY", .path.display())]
    KeyFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The store does not open.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A door cannot be bound.
    #[error("{0}")]
    Bind(#[from] std::io::Error),
    /// A setting that nothing could check before.
    #[error("{0}")]
    Setting(String),
}

impl App {
    /// Opens the store and binds every door. Nobody is served before [`run`](Self::run).
    pub async fn build(config: Config, clock: Clock, log: Option<LogHandle>) -> Result<Self, BuildError> {
        let setting = |error: &dyn std::fmt::Display| BuildError::Setting(error.to_string());
        let keyring = Arc::new(keyring(&config)?);
        let first = keyring.first();
        let (store, opened) = TokenStore::open(&config.store, keyring)?;
        report(&opened);
        let started_at = clock.now().as_duration().as_secs_f64();
        let metrics = Arc::new(Metrics::new(config.metrics, started_at).map_err(|error| setting(&error))?);
        let lwa = Lwa::new(config.lwa.clone()).map_err(|error| setting(&error))?;
        let grants = opened.users.into_iter().filter_map(|(user, grant)| Some((user, grant.ok()?)));
        let (tokens, background) = TokenManager::new(
            config.tokens.clone(),
            store.clone(),
            grants,
            lwa.clone(),
            clock.clone(),
            metrics.clone(),
        );
        let rotations = Rotations::new(store.clone(), first);
        let doors = bind(&config).await?;
        let [proxy, login, admin] = &doors;
        let addresses = Addresses { proxy: proxy.addresses(), login: login.addresses(), admin: admin.addresses() };
        let (reloader, asked) = Reloader::new();
        let process = ProcessState {
            tokens,
            store: store.clone(),
            rotation: rotations.watch(),
            metrics,
            clock,
            desk: Arc::new(PendingLogins::open(store.clone()).await),
            log,
            stage: watch::Sender::new(Stage::Starting),
            quit: CancellationToken::new(),
            reloader,
            connections: [
                ("proxy", Box::new(proxy.count()) as Count),
                ("login", Box::new(login.count())),
                ("admin", Box::new(admin.count())),
            ]
            .into(),
            request_ids: Arc::default(),
            proxy: addresses.proxy.first().copied(),
        };
        let (limits, fixed) = ([proxy.limits(), login.limits(), admin.limits()], RestartOnly::of(&config));
        let services = Arc::new(ArcSwap::from_pointee(Services::new(config, lwa, &process)?));
        Ok(Self { addresses, doors, limits, services, process, background, fixed, rotations, watched: None, asked })
    }

    /// Makes it read `sources` again when it is asked to, and when one of their files changes.
    #[must_use]
    pub fn reloading(self, sources: Sources) -> Self {
        Self { watched: Some(Watched::new(sources)), ..self }
    }

    /// Asks it, once it runs, to read its configuration again.
    pub fn reloader(&self) -> Reloader {
        self.process.reloader.clone()
    }

    /// Where the doors listen.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until `stop`, then drains: not ready at once, new connections for `shutdown.accept`, what is in flight for
    /// at most `shutdown.drain`; then every token call and every write comes to its end.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), StoreError> {
        let Self { addresses, doors: [proxy, login, admin], limits, services, process, background, .. } = self;
        let Self { fixed, mut rotations, watched, asked, .. } = self;
        let mut helpers = JoinSet::new();
        // Before anybody can ask for it; where there is a grant to be tried first, callers have that one meanwhile.
        let adopting = adopt_configured(process.tokens.clone());
        match process.tokens.status(&UserId::default()).state {
            State::None => adopting.await,
            _ => drop(helpers.spawn(adopting)),
        }
        helpers.spawn(background.run());
        helpers.spawn(finish_leftover_logins(services.clone()));
        let (desk, clock) = (process.desk.clone(), process.clock.clone());
        helpers.spawn(async move { desk.keep(&clock).await });
        helpers.spawn(tend(services.clone()));
        let (phase, admin_phase) = (watch::Sender::new(Phase::Open), watch::Sender::new(Phase::Open));
        let mut served = JoinSet::new();
        let inside = services.clone();
        served
            .spawn(proxy.run(move |request, peer| inside.load().proxy.clone().serve(request, peer), phase.subscribe()));
        let inside = services.clone();
        served.spawn(login.run(move |request, peer| serve_login(inside.load_full(), request, peer), phase.subscribe()));
        let inside = services.clone();
        helpers.spawn(
            admin.run(move |request, peer| serve_admin(inside.load_full(), request, peer), admin_phase.subscribe()),
        );
        process.stage.send_replace(Stage::Serving);
        let Addresses { proxy, login, admin } = &addresses;
        tracing::info!(?proxy, ?login, ?admin, version = env!("CARGO_PKG_VERSION"), "serving");

        rotations.resume().await;
        let (inside, told) = (services.clone(), Dropped::default());
        let mut reloads = ControlLoop { watched, asked, fixed, rotations, services: inside, limits, process, told };
        tokio::select! {
            () = stop => {}
            () = reloads.run() => {}
        }
        let process = reloads.process;
        tracing::info!("draining");
        process.stage.send_replace(Stage::Draining);
        phase.send_replace(Phase::Draining);
        let shutdown = services.load().shutdown;
        tokio::time::sleep(shutdown.accept).await;
        phase.send_replace(Phase::Closed);
        let drained = async { while served.join_next().await.is_some() {} };
        if tokio::time::timeout(shutdown.drain, drained).await.is_err() {
            tracing::warn!("calls were still in flight after shutdown.drain and are broken off");
        }
        if tokio::time::timeout(SETTLE, process.tokens.settle()).await.is_err() {
            tracing::error!("a token call or a write was still in flight and is given up");
        }
        helpers.shutdown().await;
        process.desk.write_begun().await;
        let closed = process.store.close().await;
        tracing::info!("stopped");
        closed
    }
}

/// The proxy door, the login door, the admin door.
async fn bind(config: &Config) -> Result<[Door; 3], BuildError> {
    let late =
        Problem::new(Code::RequestTimeout, "The head of the request did not come in time.", "Send it at once.").raw();
    let overloaded = Problem::new(
        Code::Overloaded,
        "Every connection that proxy.max_connections allows is busy.",
        "Try again after the time in Retry-After, keep connections open, or raise proxy.max_connections.",
    );
    let words = CannedResponses { late, overloaded: overloaded.retry_after(Duration::from_secs(1)).raw() };
    let [proxy, login, admin] = limits_of_doors(config.limits);
    Ok([
        Door::bind(&config.proxy_listen, config.proxy_listen_default, config.socket_mode, proxy, words.clone()).await?,
        Door::bind(&config.login_listen, false, OWN_SOCKET, login, words.clone()).await?,
        Door::bind(&config.admin_listen, config.admin_listen_default, OWN_SOCKET, admin, words).await?,
    ])
}

fn limits_of_doors(limits: Limits) -> [Limits; 3] {
    [limits, limits, Limits { max_connections: ADMIN_CONNECTIONS, ..limits }]
}

/// Closes connections to Amazon that have idled too long, for as long as it runs.
async fn tend(services: Arc<ArcSwap<Services>>) {
    loop {
        let upstream = services.load().upstream.clone();
        tokio::time::sleep(upstream.prune()).await;
    }
}

/// Finishes logins that other processes left, each time with the login settings that are in force then.
async fn finish_leftover_logins(services: Arc<ArcSwap<Services>>) {
    loop {
        let login = services.load().login.login.clone();
        let Some(interval) = login.finish_leftovers().await else { return };
        tokio::time::sleep(interval).await;
    }
}

async fn adopt_configured(tokens: TokenManager) {
    if let Err(error) = tokens.adopt_configured().await {
        tracing::error!(%error, "amazon.refresh_token could not be stored, and is tried again at the next start");
    }
}

async fn serve_login(services: Arc<Services>, request: Request<Incoming>, peer: Peer) -> Response<Full<Bytes>> {
    services.login.serve_callback(&services.login_guard, request, peer).await
}

async fn serve_admin(services: Arc<Services>, request: Request<Incoming>, peer: Peer) -> Response<Full<Bytes>> {
    services.admin.serve(request, peer).await
}

/// Says what was found in the store.
fn report(opened: &Opened) {
    if let Some(moved) = &opened.recovered {
        tracing::warn!(moved_to = %moved.display(), restored = opened.restored, "the store was damaged: it was moved aside and filled from its copies");
    }
    if let Some(reason) = &opened.degraded {
        tracing::error!(reason, "the store cannot be written: grants are served from its copies until there is space");
    }
    for copy in &opened.unreadable_mirror_files {
        tracing::error!(copy = %copy.display(), "a copy of a grant does not open and is kept");
    }
    for (user, grant) in &opened.users {
        if let Err(error) = grant {
            tracing::error!(%user, %error, "a stored grant cannot be used and is kept");
        }
    }
}
