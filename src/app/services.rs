//! What a reload replaces ([`Services`]) and what lasts as long as the process ([`ProcessState`]).

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::HeaderValue;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::BuildError;
use crate::auth::accounts::{Directory, Reach};
use crate::auth::login::same_identity::Identity;
use crate::auth::login::{Login, PendingLogins};
use crate::auth::lwa::Lwa;
use crate::auth::tokens::TokenManager;
use crate::config::{Config, Shutdown};
use crate::domain::clock::Clock;
use crate::inbound::admin::{Admin, Count, PageState, Reloader, Rotation, Stage};
use crate::inbound::admission::{self, Admission};
use crate::inbound::oauth::OauthEndpoints;
use crate::inbound::proxy::Proxy;
use crate::inbound::request_id::RequestIds;
use crate::notify::{self, Events};
use crate::store::TokenStore;
use crate::telemetry::log::LogHandle;
use crate::telemetry::metrics::Metrics;
use crate::throttle::{self, Throttle};
use crate::upstream::Upstream;

/// The handlers of the listeners. A reload creates new ones; requests in flight keep theirs.
pub(super) struct Services {
    pub(super) proxy: Arc<Proxy>,
    pub(super) login: OauthEndpoints,
    pub(super) admin: Admin,
    pub(super) upstream: Arc<Upstream>,
    pub(super) shutdown: Shutdown,
}

/// What a reload keeps.
pub(super) struct ProcessState {
    pub(super) tokens: TokenManager,
    pub(super) directory: Directory,
    pub(super) store: TokenStore,
    pub(super) throttle: Arc<throttle::Memory>,
    pub(super) rotation: watch::Receiver<Rotation>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Clock,
    pub(super) pending_logins: Arc<PendingLogins>,
    pub(super) log: Option<LogHandle>,
    pub(super) stage: watch::Sender<Stage>,
    pub(super) quit: CancellationToken,
    pub(super) reloader: Reloader,
    pub(super) connections: Arc<[(&'static str, Count)]>,
    pub(super) request_ids: Arc<RequestIds>,
    pub(super) events: Events,
    pub(super) notify: Arc<ArcSwap<notify::Settings>>,
    pub(super) page: Arc<PageState>,
    /// The TCP addresses of the proxy and admin listeners.
    pub(super) proxy: Option<SocketAddr>,
    pub(super) admin: Option<SocketAddr>,
}

impl Services {
    /// Creates the handlers for `config`.
    ///
    /// # Errors
    /// [`BuildError::Setting`] if a setting turns out to be unusable.
    // More than 60 lines: a list of which handler gets what, which reads best whole.
    pub(super) fn new(config: Config, lwa: Lwa, process: &ProcessState) -> Result<Self, BuildError> {
        let setting = |error: &dyn std::fmt::Display| BuildError::Setting(error.to_string());
        let settings = config.settings();
        let upstream = Arc::new(Upstream::new(&config.upstream).map_err(|error| setting(&error))?);
        let client_id = HeaderValue::from_str(&config.proxy.client_id).map_err(|error| setting(&error))?;
        let ProcessState { tokens, metrics, request_ids, .. } = process;
        let throttle = Arc::new(Throttle::new(config.throttle, &config.proxy.client_id, &process.throttle));
        process.directory.reconfigure(Reach {
            upstream: upstream.clone(),
            throttle: throttle.clone(),
            client_id: client_id.clone(),
            home: config.proxy.region,
            automatic: config.accounts_sync,
            cache: config.tokens.cache,
            configured: config.proxy.accounts.clone(),
        });
        let login = Login::new(
            config.login,
            lwa,
            tokens.clone(),
            Identity::new(upstream.clone(), client_id.clone()),
            process.clock.clone(),
            process.pending_logins.clone(),
        );
        let proxy_admission = Admission::new(config.admission.clone());
        let public_url = config.admin.public_url.as_ref();
        let admin_admission = Admission::new(with_host_of(config.admission.clone(), public_url));
        // Amazon redirects browsers to the host of the redirect URI.
        let redirect_uri = config.lwa.redirect_uri.parse().ok();
        let login_admission = Admission::new(with_host_of(config.admission, redirect_uri.as_ref()));
        let authority = process.proxy.map_or_else(|| "localhost:8001".to_owned(), local_authority);
        // A browser can begin a login only where its cookie belongs, and cannot send a caller token.
        let login_origin = login.loopback_origin().filter(|_| process.proxy.is_some());
        let login_origin = login_origin.filter(|_| !proxy_admission.needs_caller_token());
        let users = config.proxy.users();
        let status_page =
            public_url.map(Url::to_string).or_else(|| Some(format!("http://{}/", local_authority(process.admin?))));
        let oauth = |admission: &Admission, has_all: bool| OauthEndpoints {
            login: login.clone(),
            tokens: tokens.clone(),
            directory: process.directory.clone(),
            admission: admission.clone(),
            metrics: metrics.clone(),
            region: config.proxy.region,
            token_shim: config.proxy.token_shim,
            users: users.clone(),
            has_all,
            authority: authority.clone(),
            request_ids: request_ids.clone(),
            events: process.events.clone(),
            status_page: status_page.clone(),
        };
        let admin = Admin {
            admission: admin_admission,
            tokens: tokens.clone(),
            directory: process.directory.clone(),
            metrics: metrics.clone(),
            stage: process.stage.subscribe(),
            connections: process.connections.clone(),
            log: process.log.clone(),
            store: process.store.clone(),
            throttle: process.throttle.clone(),
            rotation: process.rotation.clone(),
            request_ids: request_ids.clone(),
            clock: process.clock.clone(),
            public_url: config.admin.public_url,
            login_base: login_origin.map(|origin| OauthEndpoints::login_base_at(&origin)),
            proxy_url: format!("http://{authority}"),
            login: login.clone(),
            settings,
            page_state: process.page.clone(),
            reloader: process.reloader.clone(),
            quit: process.quit.clone(),
        };
        let login_of_proxy = oauth(&proxy_admission, true);
        process.notify.store(Arc::new(notify::Settings { login_base: admin.login_base.clone(), ..config.notify }));
        Ok(Self {
            login: oauth(&login_admission, false),
            admin,
            proxy: Arc::new(Proxy::new(
                config.proxy,
                client_id,
                proxy_admission,
                tokens.clone(),
                upstream.clone(),
                throttle,
                login_of_proxy,
                process.directory.clone(),
                metrics.clone(),
                request_ids.clone(),
            )),
            upstream,
            shutdown: config.shutdown,
        })
    }
}

/// The authority under which a browser on this machine reaches the listener at `address`. On loopback it is
/// `localhost`, not an address: that is the name in the redirect URI, and a login's cookie belongs to the name under
/// which the login began.
pub fn local_authority(address: SocketAddr) -> String {
    let ip = address.ip();
    if ip.is_loopback() || ip.is_unspecified() { format!("localhost:{}", address.port()) } else { address.to_string() }
}

/// `settings`, with the host of `url` allowed too.
fn with_host_of(mut settings: admission::Settings, url: Option<&Url>) -> admission::Settings {
    settings.allowed_hosts.extend(url.and_then(Url::host_str).map(str::to_lowercase));
    settings
}
