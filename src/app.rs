//! The house as a whole: [`App::build`] opens the store and binds every door, [`App::run`] serves until it is told to
//! stop. `main`, the sandbox and the tests all come in through here.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use http::Request;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin::{Admin, Stage};
use crate::clock::Clock;
use crate::config::{Config, FernetKeys, Shutdown};
use crate::guard::Guard;
use crate::keeper::{Background, Keeper};
use crate::keyring::{KeyError, Keyring};
use crate::log::LogHandle;
use crate::login::Login;
use crate::login_door::LoginDoor;
use crate::lwa::Lwa;
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::proxy::Proxy;
use crate::secret::Secret;
use crate::serve::{Door, Limits, Peer, Phase};
use crate::store::{Opened, StoreError, TokenStore};
use crate::upstream::Upstream;

/// The admin door serves a kubelet, a scraper and a person, and none of them for long.
const ADMIN_CONNECTIONS: usize = 256;
/// How long a shutdown waits for token calls that are in flight: their own deadline and a little more.
const SETTLE: Duration = Duration::from_secs(12);

/// adsidecar, bound and not serving yet.
pub struct App {
    addresses: Addresses,
    doors: Doors,
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

struct Doors {
    proxy: (Door, Arc<Proxy>),
    login: Option<(Door, Arc<LoginDoor>, Guard)>,
    admin: (Door, Arc<Admin>),
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
        let (store, opened) = tokio::task::block_in_place(|| TokenStore::open(&config.store, keyring))?;
        report(&opened);
        let started_at = clock.now().as_duration().as_secs_f64();
        let metrics = Arc::new(Metrics::new(config.metrics, started_at).map_err(|error| setting(&error))?);
        let lwa = Lwa::new(config.lwa).map_err(|error| setting(&error))?;
        let upstream = Arc::new(Upstream::new(&config.upstream).map_err(|error| setting(&error))?);
        let grants = opened.users.into_iter().filter_map(|(user, grant)| Some((user, grant.ok()?)));
        let (keeper, background) = Keeper::new(config.keeper, store.clone(), grants, lwa.clone(), clock.clone(), metrics.clone());

        let late = || Problem::new(Code::RequestTimeout, "The head of the request did not come in time.", "Send it at once.").raw();
        let limits = config.limits;
        let proxy_door = Door::bind(&config.proxy_listen, config.proxy_listen_default, limits, late()).await?;
        let admin_limits = Limits { max_connections: ADMIN_CONNECTIONS, ..limits };
        let admin_door = Door::bind(&config.admin_listen, config.admin_listen_default, admin_limits, late()).await?;
        let login_only = Door::bind(&config.login_listen, false, limits, late()).await?;
        let addresses =
            Addresses { proxy: proxy_door.addresses(), login: login_only.addresses(), admin: admin_door.addresses() };

        let guard = Guard::new(config.guard.clone());
        let port = addresses.proxy.first().map_or(8001, SocketAddr::port);
        let desk = Login::new(config.login, lwa, keeper.clone(), clock);
        let login_door = |guard| {
            let authority = format!("localhost:{port}");
            LoginDoor::new(desk.clone(), keeper.clone(), guard, config.proxy.region, config.proxy.token_shim, authority)
        };
        let proxy = Proxy::new(config.proxy.clone(), guard.clone(), keeper.clone(), upstream.clone(), login_door(guard.clone()), metrics.clone());
        let proxy = Arc::new(proxy.map_err(|error| setting(&error))?);
        let login = (!config.login_listen.is_empty()).then(|| {
            let guard = Guard::new(with_redirect_host(config.guard, &config.redirect_uri));
            (login_only, Arc::new(login_door(guard.clone())), guard)
        });
        let (stage, quit) = (watch::Sender::new(Stage::Starting), CancellationToken::new());
        let admin = Admin {
            guard,
            keeper: keeper.clone(),
            metrics,
            stage: stage.subscribe(),
            connections: connections(&proxy_door, login.as_ref().map(|(door, ..)| door), &admin_door),
            log,
            quit: quit.clone(),
        };
        let doors = Doors { proxy: (proxy_door, proxy), login, admin: (admin_door, Arc::new(admin)) };
        Ok(Self { addresses, doors, keeper, background, store, upstream, stage, quit, shutdown: config.shutdown })
    }

    /// Where the doors listen.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until `stop`, then drains: not ready at once, new connections for `shutdown.accept`, what is in flight for
    /// at most `shutdown.drain`; then every token call and every write comes to its end.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), StoreError> {
        let Self { addresses, doors, keeper, background, store, upstream, stage, quit, shutdown } = self;
        let mut helpers = JoinSet::new();
        helpers.spawn(background.run());
        helpers.spawn(async move { upstream.tend().await });
        let (phase, admin_phase) = (watch::Sender::new(Phase::Open), watch::Sender::new(Phase::Open));
        let mut served = doors.open(&phase);
        let admin = doors.open_admin(&admin_phase);
        keeper.adopt_configured().await?;
        stage.send_replace(Stage::Serving);
        tracing::info!(proxy = ?addresses.proxy, login = ?addresses.login, admin = ?addresses.admin, version = env!("CARGO_PKG_VERSION"), "serving");

        tokio::select! {
            () = stop => {}
            () = quit.cancelled() => {}
        }
        tracing::info!("draining");
        stage.send_replace(Stage::Draining);
        phase.send_replace(Phase::Leaving);
        tokio::time::sleep(shutdown.accept).await;
        phase.send_replace(Phase::Closed);
        if tokio::time::timeout(shutdown.drain, async { while served.join_next().await.is_some() {} }).await.is_err() {
            tracing::warn!("calls were still in flight after shutdown.drain and are broken off");
        }
        served.shutdown().await;
        if tokio::time::timeout(SETTLE, keeper.settle()).await.is_err() {
            tracing::error!("a token call or a write was still in flight and is given up");
        }
        helpers.shutdown().await;
        admin_phase.send_replace(Phase::Closed);
        admin.abort();
        let closed = store.close().await;
        tracing::info!("stopped");
        closed
    }
}

impl Doors {
    fn open(&self, phase: &watch::Sender<Phase>) -> JoinSet<()> {
        JoinSet::new()
    }
}

/// The ring that the configuration asks for. In development a missing key is made beside the store.
pub fn keyring(config: &Config) -> Result<Keyring, BuildError> {
    let keys = match &config.fernet_keys {
        FernetKeys::Given(keys) => keys.clone(),
        FernetKeys::MakeBesideStore => vec![development_key(config)?],
    };
    Ok(Keyring::new(&keys)?)
}

fn development_key(config: &Config) -> Result<Secret, BuildError> {
    let mut path = config.store.path.clone().into_os_string();
    path.push(".key");
    let path = PathBuf::from(path);
    let made = Keyring::read_or_make(&path);
    let (key, made) = made.map_err(|source| BuildError::KeyFile { path: path.clone(), source })?;
    if made {
        tracing::warn!(path = %path.display(), "no Fernet key is configured: one was made for development; keep it as long as the store");
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
