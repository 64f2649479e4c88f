//! The whole application: [`App::build`] opens the store and binds every listener, [`App::run`] starts, serves and
//! drains. `main`, the sandbox and the tests all use it.
//!
//! The file is a little over 400 lines: what a process does from its start to its end is read from top to bottom.

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
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::auth::accounts::Directory;
use crate::auth::login::PendingLogins;
use crate::auth::lwa::Lwa;
use crate::auth::tokens::{Background, Status, TokenManager, jitter};
use crate::config::{Config, Sources};
use crate::domain::account::UserId;
use crate::domain::clock::Clock;
use crate::domain::grant::State;
use crate::inbound::admin::{self, Asked, Count, Reloader, Stage};
use crate::inbound::early_responses::EarlyResponses;
use crate::inbound::request_id::RequestIds;
use crate::notify::{Events, Notifier};
use crate::server::{CallerBody, Inherited, Limits, Listener, OwnResponses, Peer, Phase};
use crate::store::keyring::{Fingerprint, KeyError};
use crate::store::{Opened, StoreError, TokenStore};
use crate::telemetry::log::{Dropped, LogHandle};
use crate::telemetry::metrics::Metrics;
use crate::throttle;
pub use keys::{existing_keyring, key_file, keyring};
use reload::{ControlLoop, RestartOnly, Watched};
use rotation::Rotations;
pub use services::local_authority;
use services::{ProcessState, Services};

/// Enough for the short requests of a kubelet, a scraper and an operator.
const ADMIN_CONNECTIONS: usize = 256;
/// The file mode of the Unix sockets of the login and admin listeners: for the user that adsidecar runs as.
const OWN_SOCKET: u32 = 0o600;
/// Share of `shutdown.drain` for which requests may still wait for their turn. The rest is for Amazon's response.
const QUEUE_SHARE_OF_DRAIN: f64 = 0.8;
/// How long a shutdown waits for token calls in flight: their own timeout, and a little more.
const SETTLE: Duration = Duration::from_secs(12);

/// The longest time after a start until the accounts, notifications and interrupted logins of a shared store are read.
const SETTLING_IN: Duration = Duration::from_secs(2);

/// At most this many users of a shared store are read for the first words at a terminal.
const SHOWN_AT_START: usize = 1000;

/// adsidecar with its listeners bound; it does not serve yet.
pub struct App {
    addresses: Addresses,
    listeners: [Listener; 3],
    limits: [Arc<ArcSwap<Limits>>; 3],
    services: Arc<ArcSwap<Services>>,
    process: ProcessState,
    background: Background,
    fixed: RestartOnly,
    keys: Vec<Fingerprint>,
    rotations: Rotations,
    watched: Option<Watched>,
    asked: mpsc::Receiver<Asked>,
}

/// The TCP addresses of the listeners. Empty for a listener that is off, or that uses Unix sockets only.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// The proxy listener.
    pub proxy: Vec<SocketAddr>,
    /// The login listener.
    pub login: Vec<SocketAddr>,
    /// The admin listener.
    pub admin: Vec<SocketAddr>,
}

/// Why adsidecar does not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A Fernet key is unusable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The key file for development cannot be created or read.
    #[error("{}: {source}; make the directory writable, or set FERNET_KEY", .path.display())]
    KeyFile {
        /// The key file.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A listener cannot be bound.
    #[error("{key}: {source}{}", bind_remedy(.key, .source))]
    Bind {
        /// The key that names its address.
        key: &'static str,
        /// What the system said, with the address.
        source: std::io::Error,
    },
    /// A setting that turns out to be unusable only when it is applied.
    #[error("{0}")]
    Setting(String),
}

impl App {
    /// Opens the store and binds every listener; [`run`](Self::run) serves them.
    ///
    /// # Errors
    /// [`BuildError`] if a key, the store, an address or a setting is unusable.
    pub async fn build(config: Config, clock: Clock, log: Option<LogHandle>) -> Result<Self, BuildError> {
        Box::pin(Self::build_on(Inherited::default(), config, clock, log)).await
    }

    /// As [`build`](Self::build), on sockets that the service manager has opened. Each needs a listener.
    ///
    /// # Errors
    /// [`BuildError`] if a key, the store, an address, a socket or a setting is unusable.
    pub async fn build_on(
        inherited: Inherited,
        config: Config,
        clock: Clock,
        log: Option<LogHandle>,
    ) -> Result<Self, BuildError> {
        let setting = |error: &dyn std::fmt::Display| BuildError::Setting(error.to_string());
        let keyring = Arc::new(keyring(&config)?);
        let keys = keyring.fingerprints();
        let (store, opened) = TokenStore::open_to_serve(&config.store, keyring).await?;
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
        let rotations = Rotations::new(store.clone(), keys[0]);
        let request_ids = Arc::<RequestIds>::default();
        let listeners = bind(&config, inherited, Arc::new(EarlyResponses::new(request_ids.clone()))).await?;
        let [proxy, login, admin] = &listeners;
        let addresses = Addresses { proxy: proxy.addresses(), login: login.addresses(), admin: admin.addresses() };
        let (reloader, asked) = Reloader::new();
        let directory = Directory::new(store.clone(), tokens.clone(), clock.clone());
        let process = ProcessState {
            throttle: Arc::new(throttle::Memory::new(clock.clone(), metrics.clone())),
            tokens,
            directory,
            store: store.clone(),
            rotation: rotations.watch(),
            metrics,
            clock,
            pending_logins: Arc::new(PendingLogins::open(store.clone()).await),
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
            request_ids,
            events: Events::default(),
            notify: Arc::default(),
            page: Arc::default(),
            proxy: addresses.proxy.first().copied(),
            admin: addresses.admin.first().copied(),
        };
        let (limits, fixed) = ([proxy.limits(), login.limits(), admin.limits()], RestartOnly::of(&config));
        let services = Arc::new(ArcSwap::from_pointee(Services::new(config, lwa, &process)?));
        let watched = None;
        Ok(Self { addresses, listeners, limits, services, process, background, fixed, keys, rotations, watched, asked })
    }

    /// Reloads the configuration from `sources` on request, and whenever one of their files changes.
    #[must_use]
    pub fn reloading(self, sources: Sources) -> Self {
        Self { watched: Some(Watched::new(sources)), ..self }
    }

    /// A handle that asks the running process to reload its configuration.
    pub fn reloader(&self) -> Reloader {
        self.process.reloader.clone()
    }

    /// Completes once the listeners serve; with `false` if that never happens.
    pub fn serving(&self) -> impl Future<Output = bool> + Send + 'static {
        let mut stage = self.process.stage.subscribe();
        async move { stage.wait_for(|stage| *stage == Stage::Serving).await.is_ok() }
    }

    /// Reads the status of the users whom a person at the terminal sees first: of all of them, or of 1,000 in a shared
    /// store.
    pub fn first_users(&self) -> impl Future<Output = Vec<Status>> + Send + 'static {
        let tokens = self.process.tokens.clone();
        async move {
            let mut users = tokens.most_urgent(SHOWN_AT_START).await;
            users.sort_by(|a, b| a.user_id.cmp(&b.user_id));
            users
        }
    }

    /// The TCP addresses of the listeners.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until `stop`, or until an operator asks the process to quit; then drains: it reports itself as not ready,
    /// accepts new connections for `shutdown.accept`, waits up to `shutdown.drain` for requests in flight, and then for
    /// token calls and writes.
    ///
    /// # Errors
    /// [`StoreError`] if the store cannot be closed cleanly.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), StoreError> {
        let (mut control, running) = Box::pin(self.start()).await;
        tokio::select! {
            () = stop => {}
            () = control.run() => {}
        }
        running.drain(control).await
    }

    /// Starts the background tasks and the listeners.
    async fn start(self) -> (ControlLoop, Running) {
        let Self { addresses, listeners: [proxy, login, admin], limits, services, process, background, .. } = self;
        let Self { fixed, keys, mut rotations, watched, asked, .. } = self;
        let mut tasks = JoinSet::new();

        // amazon.refresh_token is adopted before the first request. If there is a grant already, that one is tried
        // first, and requests use it meanwhile.
        let adopting = adopt_configured(process.tokens.clone());
        // In a shared store nobody has been read yet. If it fails, adopting fails too.
        let _ = Box::pin(process.tokens.look(&UserId::default())).await;
        match process.tokens.status(&UserId::default()).state {
            State::None => adopting.await,
            _ => drop(tasks.spawn(adopting)),
        }

        tasks.spawn(background.run());
        let pause = settling_in(&process.store);
        tasks.spawn(after(pause, finish_leftover_logins(services.clone())));
        let (pending_logins, clock) = (process.pending_logins.clone(), process.clock.clone());
        tasks.spawn(async move { pending_logins.keep(&clock).await });
        tasks.spawn(close_idle_connections(services.clone()));
        let notifier = Notifier {
            settings: process.notify.clone(),
            tokens: process.tokens.clone(),
            store: process.store.clone(),
            metrics: process.metrics.clone(),
            throttle: process.throttle.clone(),
            clock: process.clock.clone(),
            events: process.events.clone(),
        };
        tasks.spawn(after(pause, notifier.run()));
        let directory = process.directory.clone();
        tasks.spawn(after(pause, async move { directory.run().await }));
        tasks.spawn(throttle::fleet::keep(process.throttle.clone(), process.store.clone()));

        let (phase, admin_phase) = (watch::Sender::new(Phase::Open), watch::Sender::new(Phase::Open));
        let mut listeners = JoinSet::new();
        let current = services.clone();
        let serve_proxy = move |request, peer| current.load().proxy.clone().serve(request, peer);
        tasks.spawn(proxy.give_memory_back());
        listeners.spawn(proxy.run(serve_proxy, phase.subscribe()));
        let current = services.clone();
        let serve_login = move |request, peer| serve_login(current.load_full(), request, peer);
        listeners.spawn(login.run(serve_login, phase.subscribe()));
        let current = services.clone();
        let serve_admin = move |request, peer| serve_admin(current.load_full(), request, peer);
        tasks.spawn(admin.run(serve_admin, admin_phase.subscribe()));
        process.stage.send_replace(Stage::Serving);
        process.directory.started();
        let Addresses { proxy, login, admin } = &addresses;
        tracing::info!(?proxy, ?login, ?admin, version = env!("CARGO_PKG_VERSION"), "serving");

        rotations.resume().await;
        let running = Running { listeners, phase, tasks, _admin_phase: admin_phase, services: services.clone() };
        let told = Dropped::default();
        (
            ControlLoop { watched, asked, fixed, keys, rotations, services, limits, process, awaited_key: None, told },
            running,
        )
    }
}

/// What runs beside the [`ControlLoop`], and ends with a shutdown.
struct Running {
    /// The proxy and login listeners.
    listeners: JoinSet<()>,
    phase: watch::Sender<Phase>,
    /// Background tasks, and the admin listener, which serves until the end.
    tasks: JoinSet<()>,
    _admin_phase: watch::Sender<Phase>,
    services: Arc<ArcSwap<Services>>,
}

impl Running {
    async fn drain(mut self, control: ControlLoop) -> Result<(), StoreError> {
        let ControlLoop { process, mut asked, .. } = control;
        tracing::info!("draining");
        process.tokens.end_background();
        process.stage.send_replace(Stage::Draining);
        // Who asked for a reload hears that nobody does it any more.
        asked.close();
        while asked.try_recv().is_ok() {}
        self.phase.send_replace(Phase::Draining);
        process.events.end();
        let shutdown = self.services.load().shutdown;
        // Requests that wait for their turn get an answer before their connections are closed.
        process.throttle.drain(shutdown.accept + shutdown.drain.mul_f64(QUEUE_SHARE_OF_DRAIN));
        tokio::time::sleep(shutdown.accept).await;

        self.phase.send_replace(Phase::Closed);
        let requests = async { while self.listeners.join_next().await.is_some() {} };
        if tokio::time::timeout(shutdown.drain, requests).await.is_err() {
            tracing::warn!("requests were still in flight after shutdown.drain; their connections are closed");
        }
        // Now, because each of these requests could begin a token call that nobody waits for.
        self.listeners.shutdown().await;

        let settled = async {
            process.tokens.settle().await;
            self.tasks.shutdown().await;
            // What requests on the admin listener have begun meanwhile.
            process.tokens.settle().await;
        };
        if tokio::time::timeout(SETTLE, settled).await.is_err() {
            tracing::error!("a token call or a write was still in flight and is abandoned");
        }
        self.tasks.shutdown().await;
        process.pending_logins.write_logins().await;
        let closed = process.store.close().await;
        tracing::info!("stopped");
        closed
    }
}

/// What to do about a listener that cannot be bound.
fn bind_remedy(key: &str, error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => format!(
            "; the address is in use: stop the process that listens there, or choose another port (or socket), such as \
             with --set {key}=127.0.0.1:18001"
        ),
        std::io::ErrorKind::PermissionDenied => {
            format!("; this user may not listen there: choose a port from 1024 in {key}, or a directory it may write")
        }
        std::io::ErrorKind::AddrNotAvailable => format!("; this machine has no such address: correct {key}"),
        _ => String::new(),
    }
}

/// Binds the proxy, login and admin listeners.
async fn bind(
    config: &Config,
    mut inherited: Inherited,
    own: Arc<dyn OwnResponses>,
) -> Result<[Listener; 3], BuildError> {
    let limits = listener_limits(config.limits);
    let addresses = [
        ("proxy.listen", &config.proxy_listen, config.proxy_listen_default, config.socket_mode),
        ("login.listen", &config.login_listen, false, OWN_SOCKET),
        ("admin.listen", &config.admin_listen, config.admin_listen_default, OWN_SOCKET),
    ];
    let mut bound = Vec::with_capacity(addresses.len());
    for ((key, listen, ipv6_if_any, mode), limits) in addresses.into_iter().zip(limits) {
        let listener = Listener::bind(listen, ipv6_if_any, mode, limits, own.clone(), &mut inherited).await;
        bound.push(listener.map_err(|source| BuildError::Bind { key, source })?);
    }
    if let [address, ..] = &inherited.left()[..] {
        return Err(BuildError::Setting(format!(
            "the service manager passes a socket for {address}, where no listener is configured: write that address in \
             proxy.listen, login.listen or admin.listen, or take it out of the socket unit"
        )));
    }
    Ok(bound.try_into().unwrap_or_else(|_| unreachable!("there are as many listeners as addresses")))
}

fn listener_limits(limits: Limits) -> [Limits; 3] {
    [limits, limits, Limits { max_connections: ADMIN_CONNECTIONS, ..limits }]
}

/// The pause after a start before a shared store is read for what no request waits for. It is random, so that of many
/// processes that start at once each is ready before the others read.
fn settling_in(store: &TokenStore) -> Duration {
    if store.shared().is_some() { SETTLING_IN.mul_f64(jitter()) } else { Duration::ZERO }
}

async fn after(pause: Duration, work: impl Future<Output = ()>) {
    // A sleep of no time takes a millisecond.
    if !pause.is_zero() {
        tokio::time::sleep(pause).await;
    }
    work.await;
}

/// Closes connections to Amazon that have been idle for `upstream.idle_timeout`. Runs until dropped.
async fn close_idle_connections(services: Arc<ArcSwap<Services>>) {
    loop {
        let upstream = services.load().upstream.clone();
        tokio::time::sleep(upstream.prune()).await;
    }
}

/// Finishes logins that other processes left behind, with the login settings in force at that time. Runs until dropped.
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

async fn serve_login(services: Arc<Services>, request: Request<CallerBody>, peer: Peer) -> Response<Full<Bytes>> {
    services.login.serve_callback(request, peer).await
}

async fn serve_admin(services: Arc<Services>, request: Request<CallerBody>, peer: Peer) -> Response<admin::Body> {
    services.admin.serve(request, peer).await
}

/// Logs what was wrong with the store.
fn report(opened: &Opened) {
    if let Some(moved) = &opened.recovered {
        tracing::warn!(moved_to = %moved.display(), restored = opened.restored, "the store was damaged: it was moved \
            aside, and a new one was restored from the mirror");
    }
    if let Some(reason) = &opened.degraded {
        tracing::error!(reason, "the store cannot be written: grants are served from the mirror until there is space");
    }
    for file in &opened.unreadable_mirror_files {
        tracing::error!(file = %file.display(), "a mirror file cannot be read; it is kept");
    }
    for (user, grant) in &opened.users {
        if let Err(error) = grant {
            tracing::error!(%user, %error, "a stored grant is unusable; the record is kept");
        }
    }
}
