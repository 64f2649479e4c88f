//! The admin listener: probes, metrics, the status page, and the operations on a running process.
//!
//! The file is a little over 400 lines: who may call an endpoint, what it takes and what serves it stand side by side.

mod backup;
mod page;
mod records;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use url::{Url, form_urlencoded};

use self::backup::Parameters;
use self::page::View;
pub use self::page::{PageState, Setting};
use crate::auth::accounts::Directory;
use crate::auth::login::Login;
use crate::auth::tokens::TokenManager;
use crate::domain::clock::Clock;
use crate::domain::headers::ERROR;
use crate::inbound::admission::{AdminAccess, Admission, Refusal};
use crate::inbound::problem::{Code, Problem, add_private_headers};
use crate::inbound::request_id::{REQUEST_ID, RequestIds};
use crate::inbound::route::is_selecting;
use crate::server::{CallerBody, Peer};
use crate::store::TokenStore;
use crate::store::keyring::Fingerprint;
use crate::telemetry::log::LogHandle;
use crate::telemetry::metrics::Metrics;
use crate::throttle::Memory;

/// Settings of the admin listener.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `admin.public_url`: the external URL of the status page, if a reverse proxy stands in front of it. Its host is
    /// accepted in `Host`; the page itself then requires the caller token.
    pub public_url: Option<Url>,
}

/// Largest body of `PUT /log`, in bytes; a log level is one word.
const MAX_BODY: usize = 64;
/// How long a small body may take: it arrives with its head.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The stages of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The listeners are bound, but do not serve yet.
    Starting,
    /// The listeners serve.
    Serving,
    /// A shutdown was requested.
    Draining,
}

/// Serves the admin listener.
pub struct Admin {
    pub(crate) admission: Admission,
    pub(crate) tokens: TokenManager,
    pub(crate) directory: Directory,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) stage: tokio::sync::watch::Receiver<Stage>,
    /// Counts the open connections of each listener.
    pub(crate) connections: Arc<[(&'static str, Count)]>,
    pub(crate) log: Option<LogHandle>,
    pub(crate) store: TokenStore,
    /// What the throttle has learned.
    pub(crate) throttle: Arc<Memory>,
    /// The latest rotation of keys.
    pub(crate) rotation: tokio::sync::watch::Receiver<Rotation>,
    pub(crate) request_ids: Arc<RequestIds>,
    pub(crate) clock: Clock,
    pub(crate) public_url: Option<Url>,
    /// The URL that starts a login, up to the user id; `None` if the proxy listener has no TCP address.
    pub(crate) login_base: Option<String>,
    /// The proxy listener's URL, for callers on this machine.
    pub(crate) proxy_url: String,
    pub(crate) login: Login,
    /// The configuration in force.
    pub(crate) settings: Vec<Setting>,
    pub(crate) page_state: Arc<PageState>,
    pub(crate) reloader: Reloader,
    /// Requests a shutdown.
    pub(crate) quit: CancellationToken,
}

/// The progress of the latest rotation of keys.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// The key that encrypts.
    pub key: Fingerprint,
    /// Whether the rotation is running.
    pub running: bool,
    /// The number of grants that other configured keys encrypted when the rotation started.
    pub left_at_first: usize,
    /// Why the last attempt failed. The rotation is retried every second.
    pub error: Option<String>,
}

/// Requests a reload or a rotation from the running process. Clones are handles to the same process.
#[derive(Clone, Debug)]
pub struct Reloader(mpsc::Sender<Asked>);

/// A request to the process, with the channel for its result.
#[derive(Debug)]
pub enum Asked {
    /// Read the configuration again and take it into use.
    Reload(oneshot::Sender<Result<(), String>>),
    /// Take the configured keys into use, and encrypt every grant with the first, which must have this fingerprint.
    Rotate(String, oneshot::Sender<Result<(), String>>),
}

impl Reloader {
    /// Creates a handle, and the receiver of its requests.
    pub fn new() -> (Self, mpsc::Receiver<Asked>) {
        let (sender, receiver) = mpsc::channel(8);
        (Self(sender), receiver)
    }

    /// Reads the configuration again and takes it into use.
    ///
    /// # Errors
    /// A text without secrets that names each problem, if the configuration is invalid or needs a restart. The previous
    /// configuration then stays in use.
    pub async fn reload(&self) -> Result<(), String> {
        self.request(Asked::Reload).await
    }

    /// Reads the keys of the configuration again, takes them into use, and starts to encrypt every grant with the
    /// first, whose fingerprint is `key`.
    ///
    /// # Errors
    /// A text without secrets, if the configuration is invalid, `key` is not its first key, or the store fails.
    pub async fn rotate(&self, key: String) -> Result<(), String> {
        self.request(|result| Asked::Rotate(key, result)).await
    }

    async fn request(&self, what: impl FnOnce(oneshot::Sender<Result<(), String>>) -> Asked) -> Result<(), String> {
        let (sender, result) = oneshot::channel();
        let gone = || "adsidecar is about to stop".to_owned();
        self.0.send(what(sender)).await.map_err(|_| gone())?;
        result.await.unwrap_or_else(|_| Err(gone()))
    }
}

/// Returns the current number of open connections.
pub(crate) type Count = Box<dyn Fn() -> usize + Send + Sync>;

type AdminResponse = Response<Body>;

/// The body of a response of the admin listener: in memory, or streamed.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

impl Admin {
    /// Serves a request on the admin listener. Always returns a response.
    pub async fn serve(&self, request: Request<CallerBody>, peer: Peer) -> AdminResponse {
        let (parts, body) = request.into_parts();
        let served = self.dispatch(&parts, body, peer).await;
        let id = self.request_ids.of(&parts.headers);
        let mut response =
            served.unwrap_or_else(|problem| problem.respond(id.to_str().unwrap_or_default()).map(bytes_of));
        response.headers_mut().insert(REQUEST_ID, id);
        add_private_headers(response.headers_mut());
        response
    }

    async fn dispatch(&self, parts: &Parts, body: CallerBody, peer: Peer) -> Result<AdminResponse, Problem> {
        // A HEAD is a GET whose body the server leaves out (RFC 9110, section 9.3.2).
        let method = if parts.method == Method::HEAD { &Method::GET } else { &parts.method };
        let path = parts.uri.path();
        let page = View::at(path, method);
        let access = match (path, method) {
            ("/livez" | "/readyz" | "/startupz" | "/metrics", &Method::GET) => AdminAccess::Probe,
            ("/quitquitquit" | "/reload" | "/rotate" | "/users/import" | "/restore", &Method::POST) => {
                AdminAccess::Operator
            }
            ("/dump" | "/users/export", &Method::GET) => AdminAccess::Operator,
            ("/log", &Method::PUT) | ("/rotate", &Method::GET) => AdminAccess::Operator,
            _ => page.map_or(AdminAccess::Anyone, View::access),
        };
        self.admission.admin(parts, peer, access).map_err(|refusal| self.refused(refusal))?;
        if access != AdminAccess::Anyone || (path, method) == ("/log", &Method::GET) {
            check_input(parts, method, &body, page)?;
        }
        if let Some(view) = page {
            return Box::pin(self.serve_page(view, parts, body)).await;
        }
        match (path, method) {
            ("/livez", &Method::GET) => Ok(say(StatusCode::OK, "alive\n")),
            ("/readyz", &Method::GET) => Ok(self.ready()),
            ("/startupz", &Method::GET) => Ok(self.started()),
            ("/metrics", &Method::GET) => self.metrics().await,
            ("/quitquitquit", &Method::POST) => {
                self.quit.cancel();
                Ok(say(StatusCode::OK, "draining\n"))
            }
            ("/reload", &Method::POST) => {
                self.reload().await?;
                Ok(say(StatusCode::OK, "reloaded\n"))
            }
            ("/log", &Method::GET) => {
                Ok(say(StatusCode::OK, self.log.as_ref().map_or("off", |log| log.level().as_str())))
            }
            ("/log", &Method::PUT) => self.set_level(body).await,
            ("/rotate", &Method::GET) => Ok(self.rotation().await),
            ("/rotate", &Method::POST) => self.rotate(parts.uri.query().unwrap_or_default()).await,
            ("/dump", &Method::GET) => Ok(self.dump()),
            ("/restore", &Method::POST) => self.restore(&Parameters::read(parts.uri.query()), body).await,
            ("/users/import", &Method::POST) => self.import(&Parameters::read(parts.uri.query()), body).await,
            ("/users/export", &Method::GET) => self.export(&Parameters::read(parts.uri.query())).await,
            ("/dump" | "/users/export" | "/livez" | "/readyz" | "/startupz" | "/metrics", _) => {
                Err(other_method("GET, HEAD"))
            }
            ("/quitquitquit" | "/reload" | "/restore" | "/users/import", _) => Err(other_method("POST")),
            ("/log", _) => Err(other_method("GET, HEAD, PUT")),
            ("/rotate", _) => Err(other_method("GET, HEAD, POST")),
            _ => Err(Problem::new(
                Code::NotFound,
                "The admin listener has no such endpoint.",
                "See the admin listener in deploy/README.md.",
            )),
        }
    }

    fn started(&self) -> AdminResponse {
        match *self.stage.borrow() {
            Stage::Starting => say(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
            Stage::Serving | Stage::Draining => say(StatusCode::OK, "started\n"),
        }
    }

    /// Ready while the listeners serve, the store works and no shutdown was requested. Neither Amazon nor a missing
    /// login makes a pod unready, and nor does a shared store that fails: all pods lose it at once, and each still
    /// serves from memory.
    fn ready(&self) -> AdminResponse {
        match *self.stage.borrow() {
            Stage::Starting => say(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
            Stage::Draining => unready(Code::Draining, "draining\n"),
            Stage::Serving if self.store.shared().is_some() && self.tokens.is_degraded() => {
                say(StatusCode::OK, "ready, but degraded: valid tokens are used from memory, and none is refreshed\n")
            }
            Stage::Serving if !self.tokens.stored() => unready(Code::StoreUnavailable, "store unavailable\n"),
            Stage::Serving => say(StatusCode::OK, "ready\n"),
        }
    }

    async fn metrics(&self) -> Result<AdminResponse, Problem> {
        for (listener, count) in self.connections.iter() {
            self.metrics.connections.with_label_values(&[listener]).set(i64::try_from(count()).unwrap_or(i64::MAX));
        }
        self.metrics.store_up.set(i64::from(self.tokens.stored()));
        self.metrics.store_lag.set(self.tokens.store_lag().as_secs_f64());
        self.metrics.store_cached_users.set(i64::try_from(self.tokens.held_users()).unwrap_or(i64::MAX));
        // If this fails, the last count is shown.
        let _ = self.store.count_records().await;
        let store = self.store.health();
        let records = store.records.iter().map(|(sealed, count)| (sealed.to_string(), *count));
        self.metrics.set_store_contents(records, store.unreadable(), store.recoveries);
        self.throttle.show();
        if let Some(log) = &self.log {
            self.metrics.log_lines(log.dropped());
        }
        let users = self.tokens.health().await;
        let page = self.metrics.page(|| users).map_err(|error| {
            tracing::error!(%error, "the metrics cannot be rendered");
            Problem::new(
                Code::Internal,
                "The metrics cannot be rendered.",
                "See the log for the reason, and report it.",
            )
        })?;
        let mut response = Response::new(bytes(page));
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
        Ok(response)
    }

    /// Reads the configuration again and takes it into use.
    async fn reload(&self) -> Result<(), Problem> {
        self.serving()?;
        self.reloader.reload().await.map_err(|problems| {
            // The shutdown may have come first.
            self.serving().err().unwrap_or_else(|| {
                Problem::new(Code::BadRequest, problems, "Correct the configuration, then reload again.")
            })
        })
    }

    /// Refuses what nobody does any more once a shutdown has begun.
    fn serving(&self) -> Result<(), Problem> {
        if *self.stage.borrow() != Stage::Draining {
            return Ok(());
        }
        let (detail, next_step) = (
            "adsidecar is about to stop, and reads its configuration no more.",
            "The next process reads it when it starts.",
        );
        Err(Problem::new(Code::Draining, detail, next_step).retry_after(Duration::from_secs(1)))
    }

    async fn set_level(&self, body: CallerBody) -> Result<AdminResponse, Problem> {
        let bad = || {
            Problem::new(Code::BadRequest, "The body is not a log level.", "Send error, warn, info, debug or trace.")
        };
        let text = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
        let text = text.ok().and_then(Result::ok).ok_or_else(bad)?.to_bytes();
        let level = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok()).ok_or_else(bad)?;
        if let Some(log) = &self.log {
            log.set_level(level);
        }
        tracing::info!(%level, "log level changed");
        Ok(say(StatusCode::OK, "changed\n"))
    }

    /// Starts a rotation for `adsidecar key rotate`, whose first key must be the first one of this process.
    async fn rotate(&self, query: &str) -> Result<AdminResponse, Problem> {
        self.serving()?;
        let Some(key) = query.strip_prefix("key=") else {
            return Err(Problem::new(
                Code::BadRequest,
                "The parameter `key`, the fingerprint of the new key, is missing.",
                "Use adsidecar key rotate.",
            ));
        };
        let refused = |problem| {
            let next_step = "Correct that, then rotate again: the rotation continues.";
            self.serving().err().unwrap_or_else(|| Problem::new(Code::BadRequest, problem, next_step))
        };
        self.reloader.rotate(key.to_owned()).await.map_err(refused)?;
        Ok(self.rotation().await)
    }

    /// The progress of the rotation. The error is the store's, and holds no secret.
    async fn rotation(&self) -> AdminResponse {
        // If this fails, the last count is shown.
        let _ = self.store.count_records().await;
        let (rotation, store) = (self.rotation.borrow().clone(), self.store.health());
        let left = store.under_other_keys(rotation.key);
        let text = serde_json::json!({
            "key": rotation.key.to_string(),
            "running": rotation.running,
            "resealed": rotation.left_at_first.saturating_sub(left),
            "left": left,
            "unreadable": store.unreadable(),
            "error": rotation.error,
        });
        let mut response = Response::new(bytes(text.to_string()));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    fn refused(&self, refusal: Refusal) -> Problem {
        self.metrics.guard_denied.with_label_values(&[refusal.reason()]).inc();
        refusal.into()
    }
}

fn bytes(bytes: impl Into<Bytes>) -> Body {
    bytes_of(Full::new(bytes.into()))
}

fn bytes_of(body: Full<Bytes>) -> Body {
    body.map_err(backup::never).boxed_unsync()
}

/// Refuses a parameter, a body or a selecting header that the endpoint does not take: a request that says more than
/// adsidecar understands must not be served as if it said less.
fn check_input(parts: &Parts, method: &Method, body: &CallerBody, page: Option<View>) -> Result<(), Problem> {
    let path = parts.uri.path();
    let known: &[&str] = match (path, method) {
        ("/rotate", &Method::POST) => &["key"],
        ("/restore", &Method::POST) => &["replace", "dry_run"],
        ("/users/import", &Method::POST) => &["user_id", "records", "offline", "replace", "dry_run"],
        ("/users/export", &Method::GET) => &["user_id", "records"],
        _ => page.map_or(&[], View::parameters),
    };
    let names = form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes());
    let names = names.map(|(name, _)| name.into_owned()).collect::<Vec<_>>();
    let refused = |detail: String| Err(Problem::new(Code::BadRequest, detail, "Send the request without it."));
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || "_-.".contains(*c)).take(40).collect();
        return refused(format!("{path} takes no parameter {name}."));
    }
    if let Some(name) = names.iter().enumerate().find_map(|(at, name)| names[..at].contains(name).then_some(name)) {
        return refused(format!("The parameter {name} is repeated."));
    }
    if let Some(name) = parts.headers.keys().find(|name| is_selecting(name.as_str())) {
        return refused(format!("The header {name} means nothing on the admin listener."));
    }
    let takes_body = [("/log", &Method::PUT), ("/restore", &Method::POST), ("/users/import", &Method::POST)];
    let takes_body = takes_body.contains(&(path, method)) || matches!(page, Some(View::Act(_)));
    if !body.is_end_stream() && !takes_body {
        return refused(format!("{path} takes no body."));
    }
    Ok(())
}

fn say(status: StatusCode, text: &'static str) -> AdminResponse {
    let mut response = Response::new(bytes(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// What a probe is told while requests are better sent elsewhere.
fn unready(code: Code, text: &'static str) -> AdminResponse {
    let mut response = say(code.status(), text);
    response.headers_mut().insert(ERROR, HeaderValue::from_static(code.as_str()));
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn other_method(allow: &'static str) -> Problem {
    Problem::new(Code::MethodNotAllowed, "The endpoint does not have this method.", format!("Use {allow}."))
        .header(ALLOW, HeaderValue::from_static(allow))
}
