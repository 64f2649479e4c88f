//! The admin door: probes, metrics, and the few things an operator does to a running process.

mod page;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::auth::tokens::TokenManager;
use crate::domain::clock::Clock;
use crate::inbound::admission::{AdminAccess, Admission, Refusal};
use crate::inbound::problem::{Code, Problem};
use crate::inbound::request_id::{REQUEST_ID, RequestIds};
use crate::server::Peer;
use crate::store::TokenStore;
use crate::store::keyring::Fingerprint;
use crate::telemetry::log::LogHandle;
use crate::telemetry::metrics::Metrics;

/// What the admin door needs to know.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `admin.public_url`: how the status page is reached from outside, where a proxy stands before it. Its host is accepted
    /// in `Host`; who may see the page is another question, which the caller token answers.
    pub public_url: Option<Url>,
}

/// Longest body of `PUT /log`: a word.
const MAX_BODY: usize = 64;

/// How far the process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The doors are bound, nobody is served yet.
    Starting,
    /// Business as usual.
    Serving,
    /// The end was asked for.
    Draining,
}

/// Serves the admin door.
pub struct Admin {
    pub(crate) admission: Admission,
    pub(crate) tokens: TokenManager,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) stage: tokio::sync::watch::Receiver<Stage>,
    /// Open connections by door.
    pub(crate) connections: Arc<[(&'static str, Count)]>,
    pub(crate) log: Option<LogHandle>,
    pub(crate) store: TokenStore,
    /// The latest rotation of keys.
    pub(crate) rotation: tokio::sync::watch::Receiver<Rotation>,
    pub(crate) request_ids: Arc<RequestIds>,
    pub(crate) clock: Clock,
    pub(crate) public_url: Option<Url>,
    /// Where a login begins, up to the user's name; `None` where no browser reaches the proxy door.
    pub(crate) login_base: Option<String>,
    pub(crate) reloader: Reloader,
    /// Ends the process in good order.
    pub(crate) quit: CancellationToken,
}

/// The latest rotation of keys.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// The key that seals.
    pub key: Fingerprint,
    /// Whether it is under way.
    pub running: bool,
    /// How many grants other keys of the ring sealed when it began.
    pub left_at_first: usize,
    /// Why it does not get on. It is tried again each second.
    pub error: Option<String>,
}

/// Asks the running process to read its configuration again. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Reloader(mpsc::Sender<Asked>);

/// What somebody asked for, who waits for what comes of it.
#[derive(Debug)]
pub enum Asked {
    /// To read the configuration again and take it into use.
    Reload(oneshot::Sender<Result<(), String>>),
    /// To take its keys into use, and to seal everything with the first, which has this fingerprint.
    Rotate(String, oneshot::Sender<Result<(), String>>),
}

impl Reloader {
    /// A way to ask, and where the asking arrives.
    pub fn new() -> (Self, mpsc::Receiver<Asked>) {
        let (sender, receiver) = mpsc::channel(8);
        (Self(sender), receiver)
    }

    /// Reads the configuration again and takes it into use. Where something is wrong with it, all of the old stays, and
    /// the error says what to mend; it holds no secret.
    pub async fn reload(&self) -> Result<(), String> {
        self.ask(Asked::Reload).await
    }

    /// Reads the keys of the configuration again, takes them into use, and begins to seal every grant with the first.
    pub async fn rotate(&self, key: String) -> Result<(), String> {
        self.ask(|answer| Asked::Rotate(key, answer)).await
    }

    async fn ask(&self, what: impl FnOnce(oneshot::Sender<Result<(), String>>) -> Asked) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let gone = || "adsidecar is about to stop".to_owned();
        self.0.send(what(answer)).await.map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

/// Counts something when asked.
pub(crate) type Count = Box<dyn Fn() -> usize + Send + Sync>;

type Answer = Response<Full<Bytes>>;

impl Admin {
    /// One answer, whatever happens.
    pub async fn serve(&self, request: Request<Incoming>, peer: Peer) -> Answer {
        let (parts, body) = request.into_parts();
        let answer = self.answer(&parts, body, peer).await;
        let id = self.request_ids.of(&parts.headers);
        let mut answer = answer.unwrap_or_else(|problem| problem.respond(id.to_str().unwrap_or_default()));
        answer.headers_mut().insert(REQUEST_ID, id);
        answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        answer
    }

    async fn answer(&self, parts: &Parts, body: Incoming, peer: Peer) -> Result<Answer, Problem> {
        // A HEAD is a GET whose body the server leaves out (RFC 9110, section 9.3.2).
        let method = if parts.method == Method::HEAD { &Method::GET } else { &parts.method };
        let path = parts.uri.path();
        let access = match (path, method) {
            ("/livez" | "/readyz" | "/startupz" | "/metrics", &Method::GET) => AdminAccess::Probe,
            ("/", &Method::GET) => AdminAccess::Page,
            ("/quitquitquit" | "/reload" | "/rotate", &Method::POST) => AdminAccess::Operator,
            ("/log", &Method::PUT) | ("/rotate", &Method::GET) => AdminAccess::Operator,
            _ => AdminAccess::Anyone,
        };
        self.admission.admin(parts, peer, access).map_err(|refusal| self.refused(refusal))?;
        match (path, method) {
            ("/livez", &Method::GET) => Ok(say(StatusCode::OK, "alive\n")),
            ("/readyz", &Method::GET) => Ok(self.ready()),
            ("/startupz", &Method::GET) => Ok(self.started()),
            ("/metrics", &Method::GET) => self.metrics(),
            ("/", &Method::GET) => Ok(self.page(&parts.headers)),
            ("/quitquitquit", &Method::POST) => {
                self.quit.cancel();
                Ok(say(StatusCode::OK, "draining\n"))
            }
            ("/reload", &Method::POST) => {
                let refused =
                    |problems| Problem::new(Code::BadRequest, problems, "Mend the configuration, then reload again.");
                self.reloader.reload().await.map_err(refused)?;
                Ok(say(StatusCode::OK, "reloaded\n"))
            }
            ("/log", &Method::GET) => {
                Ok(say(StatusCode::OK, self.log.as_ref().map_or("off", |log| log.level().as_str())))
            }
            ("/log", &Method::PUT) => self.set_level(body).await,
            ("/rotate", &Method::GET) => Ok(self.rotation()),
            ("/rotate", &Method::POST) => self.rotate(parts.uri.query().unwrap_or_default()).await,
            ("/" | "/livez" | "/readyz" | "/startupz" | "/metrics", _) => Err(other_method("GET, HEAD")),
            ("/quitquitquit" | "/reload", _) => Err(other_method("POST")),
            ("/log", _) => Err(other_method("GET, HEAD, PUT")),
            ("/rotate", _) => Err(other_method("GET, HEAD, POST")),
            _ => Err(Problem::new(
                Code::NotFound,
                "The admin door has no such page.",
                "See the admin listener in deploy/README.md.",
            )),
        }
    }

    fn started(&self) -> Answer {
        match *self.stage.borrow() {
            Stage::Starting => say(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
            Stage::Serving | Stage::Draining => say(StatusCode::OK, "started\n"),
        }
    }

    /// Ready is about us: the store works, the doors are open, the end was not asked for. Neither Amazon nor a missing
    /// login makes a pod unready.
    fn ready(&self) -> Answer {
        match *self.stage.borrow() {
            Stage::Starting => say(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
            Stage::Draining => say(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            Stage::Serving if !self.tokens.stored() => say(StatusCode::SERVICE_UNAVAILABLE, "store unavailable\n"),
            Stage::Serving => say(StatusCode::OK, "ready\n"),
        }
    }

    fn metrics(&self) -> Result<Answer, Problem> {
        for (door, count) in self.connections.iter() {
            self.metrics.connections.with_label_values(&[door]).set(i64::try_from(count()).unwrap_or(i64::MAX));
        }
        self.metrics.store_up.set(i64::from(self.tokens.stored()));
        let store = self.store.health();
        let records = store.records.iter().map(|(sealed, count)| (sealed.to_string(), *count));
        self.metrics.set_store_contents(records, store.unreadable(), store.recoveries);
        if let Some(log) = &self.log {
            self.metrics.log_lines(log.dropped());
        }
        let page = self.metrics.page(|| self.tokens.health()).map_err(|error| {
            tracing::error!(%error, "the metrics cannot be rendered");
            Problem::new(Code::Internal, "The metrics cannot be rendered.", "The log says why; please report it.")
        })?;
        let mut answer = Response::new(Full::new(page));
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
        Ok(answer)
    }

    async fn set_level(&self, body: Incoming) -> Result<Answer, Problem> {
        let bad =
            || Problem::new(Code::BadRequest, "The body is a log level.", "Send error, warn, info, debug or trace.");
        let text = Limited::new(body, MAX_BODY).collect().await.map_err(|_| bad())?.to_bytes();
        let level = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok()).ok_or_else(bad)?;
        if let Some(log) = &self.log {
            log.set_level(level);
        }
        tracing::info!(%level, "log level changed");
        Ok(say(StatusCode::OK, "changed\n"))
    }

    /// Begins a rotation for `adsidecar key rotate`, whose own first key has to be the configuration's.
    async fn rotate(&self, query: &str) -> Result<Answer, Problem> {
        let Some(key) = query.strip_prefix("key=") else {
            return Err(Problem::new(
                Code::BadRequest,
                "The fingerprint of the key to seal with is missing.",
                "Use adsidecar key rotate.",
            ));
        };
        let refused = |problem| {
            Problem::new(Code::BadRequest, problem, "Mend that, then rotate again: it goes on where it stopped.")
        };
        self.reloader.rotate(key.to_owned()).await.map_err(refused)?;
        Ok(self.rotation())
    }

    /// How far it is. The error is the store's own, and holds no secret.
    fn rotation(&self) -> Answer {
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
        let mut answer = Response::new(Full::new(Bytes::from(text.to_string())));
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        answer
    }

    fn refused(&self, refusal: Refusal) -> Problem {
        self.metrics.guard_denied.with_label_values(&[refusal.reason()]).inc();
        refusal.into()
    }
}

fn say(status: StatusCode, text: &'static str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

fn other_method(allow: &'static str) -> Problem {
    Problem::new(Code::MethodNotAllowed, "The page has another method.", format!("Use {allow}."))
        .header(ALLOW, HeaderValue::from_static(allow))
}
