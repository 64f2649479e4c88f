//! The house as a whole: [`App::build`] opens the store and binds every door, [`App::run`] serves until it is told to
//! stop. `main`, the sandbox and the tests all come in through here.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::account::UserId;
use crate::admin::{Admin, Stage};
use crate::clock::Clock;
use crate::config::{Config, FernetKeys, Shutdown};
use crate::guard::{self, Guard};
use crate::identity::Identity;
use crate::keeper::{Background, Keeper};
use crate::keyring::{KeyError, Keyring};
use crate::log::LogHandle;
use crate::login::Login;
use crate::login_door::LoginDoor;
use crate::lwa::Lwa;
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::proxy::{Body, Proxy};
use crate::request_id::RequestIds;
use crate::secret::Secret;
use crate::serve::{Door, Limits, Peer, Phase};
use crate::store::{Opened, StoreError, TokenStore};
use crate::token::State;
use crate::upstream::Upstream;

/// The admin door serves a kubelet, a scraper and a person, and none of them for long.
const ADMIN_CONNECTIONS: usize = 256;
/// How long a shutdown waits for token calls that are in flight: their own deadline and a little more.
const SETTLE: Duration = Duration::from_secs(12);

/// adsidecar, bound and not serving yet.
pub struct App {
    addresses: Addresses,
    proxy: (Door, Arc<Proxy>),
    login: (Door, Arc<LoginDoor>, Guard),
    admin: (Door, Arc<Admin>),
    keeper: Keeper,
    background: Background,
    store: TokenStore,
    upstream: Arc<Upstream>,
    stage: watch::Sender<Stage>,
    quit: CancellationToken,
    shutdown: Shutdown,
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
        let first_key = keyring.first();
        let (store, opened) = TokenStore::open(&config.store, keyring)?;
        report(&opened);
        let started_at = clock.now().as_duration().as_secs_f64();
        let metrics = Arc::new(Metrics::new(config.metrics, started_at).map_err(|error| setting(&error))?);
        let redirect_uri = config.lwa.redirect_uri.clone();
        let lwa = Lwa::new(config.lwa).map_err(|error| setting(&error))?;
        let upstream = Arc::new(Upstream::new(&config.upstream).map_err(|error| setting(&error))?);
        let grants = opened.users.into_iter().filter_map(|(user, grant)| Some((user, grant.ok()?)));
        let (keeper, background) =
            Keeper::new(config.keeper, store.clone(), grants, lwa.clone(), clock.clone(), metrics.clone());

        let late = || {
            Problem::new(Code::RequestTimeout, "The head of the request did not come in time.", "Send it at once.")
                .raw()
        };
        let limits = config.limits;
        let proxy_door = Door::bind(&config.proxy_listen, config.proxy_listen_default, limits, late()).await?;
        let admin_limits = Limits { max_connections: ADMIN_CONNECTIONS, ..limits };
        let admin_door = Door::bind(&config.admin_listen, config.admin_listen_default, admin_limits, late()).await?;
        let login_only = Door::bind(&config.login_listen, false, limits, late()).await?;
        let addresses =
            Addresses { proxy: proxy_door.addresses(), login: login_only.addresses(), admin: admin_door.addresses() };

        let guard = Guard::new(config.guard.clone());
        let login_guard = Guard::new(with_redirect_host(config.guard, &redirect_uri));
        let authority = format!("localhost:{}", addresses.proxy.first().map_or(8001, SocketAddr::port));
        let client_id = HeaderValue::from_str(&config.proxy.client_id).map_err(|error| setting(&error))?;
        let desk = Login::new(config.login, lwa, keeper.clone(), Identity::new(upstream.clone(), client_id), clock);
        let (region, token_shim) = (config.proxy.region, config.proxy.token_shim);
        let login_door = |guard: &Guard| {
            LoginDoor::new(desk.clone(), keeper.clone(), guard.clone(), region, token_shim, authority.clone())
        };
        let login = Arc::new(login_door(&login_guard));
        let proxy = Proxy::new(
            config.proxy,
            guard.clone(),
            keeper.clone(),
            upstream.clone(),
            login_door(&guard),
            metrics.clone(),
        );
        let proxy = Arc::new(proxy.map_err(|error| setting(&error))?);
        let (stage, quit) = (watch::Sender::new(Stage::Starting), CancellationToken::new());
        let admin = Arc::new(Admin {
            guard,
            keeper: keeper.clone(),
            metrics,
            stage: stage.subscribe(),
            connections: vec![
                ("proxy", Box::new(proxy_door.count())),
                ("login", Box::new(login_only.count())),
                ("admin", Box::new(admin_door.count())),
            ],
            log,
            store: store.clone(),
            first_key,
            request_ids: RequestIds::default(),
            quit: quit.clone(),
        });
        Ok(Self {
            addresses,
            proxy: (proxy_door, proxy),
            login: (login_only, login, login_guard),
            admin: (admin_door, admin),
            keeper,
            background,
            store,
            upstream,
            stage,
            quit,
            shutdown: config.shutdown,
        })
    }

    /// Where the doors listen.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until `stop`, then drains: not ready at once, new connections for `shutdown.accept`, what is in flight for
    /// at most `shutdown.drain`; then every token call and every write comes to its end.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), StoreError> {
        // Before anybody is served, or the first callers would be sent to log in.
        let mut helpers = JoinSet::new();
        // Before anybody can ask for it; where there is a grant to be tried first, callers have that one meanwhile.
        let adopting = adopt_configured(self.keeper.clone());
        match self.keeper.status(&UserId::default()).state {
            State::None => adopting.await,
            _ => drop(helpers.spawn(adopting)),
        }
        helpers.spawn(self.background.run());
        let upstream = self.upstream;
        helpers.spawn(async move { upstream.tend().await });
        let (phase, admin_phase) = (watch::Sender::new(Phase::Open), watch::Sender::new(Phase::Open));
        let mut served = JoinSet::new();
        let (door, proxy) = self.proxy;
        served.spawn(door.run(move |request, peer| serve_proxy(proxy.clone(), request, peer), phase.subscribe()));
        let (door, login, guard) = self.login;
        served.spawn(
            door.run(move |request, peer| serve_login(login.clone(), guard.clone(), request, peer), phase.subscribe()),
        );
        let (door, admin) = self.admin;
        helpers
            .spawn(door.run(move |request, peer| serve_admin(admin.clone(), request, peer), admin_phase.subscribe()));
        self.stage.send_replace(Stage::Serving);
        let Addresses { proxy, login, admin } = &self.addresses;
        tracing::info!(?proxy, ?login, ?admin, version = env!("CARGO_PKG_VERSION"), "serving");

        tokio::select! {
            () = stop => {}
            () = self.quit.cancelled() => {}
        }
        tracing::info!("draining");
        self.stage.send_replace(Stage::Draining);
        phase.send_replace(Phase::Leaving);
        tokio::time::sleep(self.shutdown.accept).await;
        phase.send_replace(Phase::Closed);
        let drained = async { while served.join_next().await.is_some() {} };
        if tokio::time::timeout(self.shutdown.drain, drained).await.is_err() {
            tracing::warn!("calls were still in flight after shutdown.drain and are broken off");
        }
        if tokio::time::timeout(SETTLE, self.keeper.settle()).await.is_err() {
            tracing::error!("a token call or a write was still in flight and is given up");
        }
        helpers.shutdown().await;
        let closed = self.store.close().await;
        tracing::info!("stopped");
        closed
    }
}

async fn adopt_configured(keeper: Keeper) {
    if let Err(error) = keeper.adopt_configured().await {
        tracing::error!(%error, "amazon.refresh_token could not be stored, and is tried again at the next start");
    }
}

async fn serve_proxy(proxy: Arc<Proxy>, request: Request<Incoming>, peer: Peer) -> Response<Body> {
    proxy.serve(request, peer).await
}

async fn serve_login(
    door: Arc<LoginDoor>,
    guard: Guard,
    request: Request<Incoming>,
    peer: Peer,
) -> Response<Full<Bytes>> {
    door.serve_callback(&guard, request, peer).await
}

async fn serve_admin(admin: Arc<Admin>, request: Request<Incoming>, peer: Peer) -> Response<Full<Bytes>> {
    admin.serve(request, peer).await
}

/// As `guard`, and the authority of `amazon.redirect_uri` is allowed: browsers come by it.
fn with_redirect_host(mut guard: guard::Settings, redirect_uri: &str) -> guard::Settings {
    let url = redirect_uri.parse::<Url>().ok();
    guard.allowed_hosts.extend(url.and_then(|url| url.host_str().map(str::to_lowercase)));
    guard
}

/// The ring that the configuration asks for. In development a missing key is made beside the store.
pub fn keyring(config: &Config) -> Result<Keyring, BuildError> {
    let keys = match &config.fernet_keys {
        FernetKeys::Given(keys) => keys.clone(),
        FernetKeys::MakeBesideStore => vec![development_key(config)?],
    };
    Ok(Keyring::new(&keys)?)
}

/// Where the key of development lies: beside the store.
pub fn key_file(config: &Config) -> PathBuf {
    let mut path = config.store.path.clone().into_os_string();
    path.push(".key");
    path.into()
}

fn development_key(config: &Config) -> Result<Secret, BuildError> {
    let path = key_file(config);
    let made = Keyring::read_or_make(&path);
    let (key, made) = made.map_err(|source| BuildError::KeyFile { path: path.clone(), source })?;
    if made {
        let path = path.display();
        tracing::warn!(%path, "no Fernet key is configured: one was made for development; keep it as long as the store");
    }
    Ok(key)
}

/// Says what was found in the store.
fn report(opened: &Opened) {
    if let Some(moved) = &opened.recovered {
        tracing::warn!(moved_to = %moved.display(), restored = opened.restored, "the store was damaged: it was moved aside and filled from its copies");
    }
    if let Some(reason) = &opened.degraded {
        tracing::error!(reason, "the store cannot be written: grants are served from its copies until there is space");
    }
    for copy in &opened.unusable_copies {
        tracing::error!(copy = %copy.display(), "a copy of a grant does not open and is kept");
    }
    for (user, grant) in &opened.users {
        if let Err(error) = grant {
            tracing::error!(%user, %error, "a stored grant cannot be used and is kept");
        }
    }
}
