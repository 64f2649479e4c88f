//! The admin door: probes, metrics, and the few things an operator does to a running process.

mod page;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue, ORIGIN};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::clock::Clock;
use crate::guard::{Guard, Navigable, Refusal};
use crate::keeper::Keeper;
use crate::keyring::Fingerprint;
use crate::log::LogHandle;
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::request_id::{REQUEST_ID, RequestIds};
use crate::serve::Peer;
use crate::store::TokenStore;

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
    pub(crate) guard: Guard,
    pub(crate) keeper: Keeper,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) stage: tokio::sync::watch::Receiver<Stage>,
    /// Open connections by door.
    pub(crate) connections: Arc<[(&'static str, Count)]>,
    pub(crate) log: Option<LogHandle>,
    pub(crate) store: TokenStore,
    /// The key that seals.
    pub(crate) first_key: Fingerprint,
    pub(crate) request_ids: Arc<RequestIds>,
    pub(crate) clock: Clock,
    pub(crate) public_url: Option<Url>,
    /// Where a login begins, up to the user's name; `None` where no browser reaches the proxy door.
    pub(crate) login_base: Option<String>,
    pub(crate) reloader: Reloader,
    /// Ends the process in good order.
    pub(crate) quit: CancellationToken,
}

/// Asks the running process to read its configuration again. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Reloader(mpsc::Sender<Asked>);

/// Somebody asked, and waits for what comes of it.
pub type Asked = oneshot::Sender<Result<(), String>>;

impl Reloader {
    /// A way to ask, and where the asking arrives.
    pub fn new() -> (Self, mpsc::Receiver<Asked>) {
        let (sender, receiver) = mpsc::channel(8);
        (Self(sender), receiver)
    }

    /// Reads the configuration again and takes it into use. Where something is wrong with it, all of the old stays, and
    /// the error says what to mend; it holds no secret.
    pub async fn reload(&self) -> Result<(), String> {
        let (asked, answer) = oneshot::channel();
        let gone = || "adsidecar is about to stop".to_owned();
        self.0.send(asked).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
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
        let path = parts.uri.path();
        let page = path == "/" && parts.method == Method::GET;
        self.no_web_page(&parts.headers, page).map_err(|refusal| self.refused(refusal))?;
        // Probes and scrapers come by the pod's address, and learn nothing that a label does not say.
        let open = matches!(path, "/livez" | "/readyz" | "/startupz" | "/metrics");
        let admitted = if open && parts.method == Method::GET {
            self.guard.admit_any_host(parts)
        } else {
            self.guard.admit(parts, peer).map(drop)
        };
        admitted.map_err(|refusal| self.refused(refusal))?;
        match (path, &parts.method) {
            ("/livez", &Method::GET) => Ok(say(StatusCode::OK, "alive\n")),
            ("/readyz", &Method::GET) => Ok(self.ready()),
            ("/startupz", &Method::GET) if *self.stage.borrow() == Stage::Starting => {
                Ok(say(StatusCode::SERVICE_UNAVAILABLE, "starting\n"))
            }
            ("/startupz", &Method::GET) => Ok(say(StatusCode::OK, "started\n")),
            ("/metrics", &Method::GET) => self.metrics(),
            ("/", &Method::GET) => {
                self.operator(parts, peer)?;
                Ok(self.page(&parts.headers))
            }
            ("/quitquitquit", &Method::POST) => {
                self.operator(parts, peer)?;
                self.quit.cancel();
                Ok(say(StatusCode::OK, "draining\n"))
            }
            ("/reload", &Method::POST) => {
                self.operator(parts, peer)?;
                let refused =
                    |problems| Problem::new(Code::BadRequest, problems, "Mend the configuration, then reload again.");
                self.reloader.reload().await.map_err(refused)?;
                Ok(say(StatusCode::OK, "reloaded\n"))
            }
            ("/log", &Method::GET) => {
                Ok(say(StatusCode::OK, self.log.as_ref().map_or("off", |log| log.level().as_str())))
            }
            ("/log", &Method::PUT) => {
                self.operator(parts, peer)?;
                self.set_level(body).await
            }
            ("/rotate", &Method::POST) => {
                self.operator(parts, peer)?;
                self.rotate(parts.uri.query().unwrap_or_default()).await
            }
            ("/" | "/livez" | "/readyz" | "/startupz" | "/metrics", _) => Err(method("GET")),
            ("/quitquitquit" | "/reload" | "/rotate", _) => Err(method("POST")),
            ("/log", _) => Err(method("GET, PUT")),
            _ => Err(Problem::new(
                Code::NotFound,
                "The admin door has no such page.",
                "See the admin door in adsidecar's README.",
            )),
        }
    }

    /// Ready is about us: the store works, the doors are open, the end was not asked for. Neither Amazon nor a missing
    /// login makes a pod unready.
    fn ready(&self) -> Answer {
        match *self.stage.borrow() {
            Stage::Starting => say(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
            Stage::Draining => say(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            Stage::Serving if !self.keeper.stored() => say(StatusCode::SERVICE_UNAVAILABLE, "store unavailable\n"),
            Stage::Serving => say(StatusCode::OK, "ready\n"),
        }
    }

    fn metrics(&self) -> Result<Answer, Problem> {
        for (door, count) in self.connections.iter() {
            self.metrics.connections.with_label_values(&[door]).set(i64::try_from(count()).unwrap_or(i64::MAX));
        }
        self.metrics.store_up.set(i64::from(self.keeper.stored()));
        if let Some(log) = &self.log {
            self.metrics.log_lines(log.dropped());
        }
        let page = self.metrics.page(|| self.keeper.health()).map_err(|error| {
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

    /// Seals every grant anew with the first key, for `adsidecar key rotate`, whose own first key has to be the same.
    async fn rotate(&self, query: &str) -> Result<Answer, Problem> {
        let key = self.first_key.to_string();
        if query != format!("key={key}") {
            return Err(Problem::new(
                Code::BadRequest,
                format!("This sidecar seals with key {key}, which is not the one that was asked for."),
                "Restart it with the new key first in store.fernet_keys, then rotate.",
            ));
        }
        let done = self.store.reseal().await.map_err(|error| {
            tracing::error!(%error, "the grants could not be sealed anew");
            Problem::new(
                Code::StoreUnavailable,
                "The store did not take the change.",
                "Look at the log and at the volume of store.path, then rotate again: it goes on where it stopped.",
            )
        })?;
        tracing::info!(resealed = done.resealed, unreadable = done.unreadable, key, "grants sealed anew");
        let text = serde_json::json!({ "resealed": done.resealed, "unreadable": done.unreadable }).to_string();
        let mut answer = Response::new(Full::new(Bytes::from(text)));
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(answer)
    }

    /// No web page drives this door. A person's browser may open the status page: by its address or a bookmark (`none`),
    /// or once more from the page itself.
    fn no_web_page(&self, headers: &HeaderMap, page: bool) -> Result<(), Refusal> {
        if page && !headers.contains_key(ORIGIN) {
            self.guard.browser(headers, Navigable::Never).map(drop)
        } else {
            self.guard.no_browser(headers)
        }
    }

    /// Lets through who is on this machine, or knows the caller token.
    fn operator(&self, parts: &Parts, peer: Peer) -> Result<(), Problem> {
        let known = self.guard.asks_for_token() && self.guard.caller(&parts.headers).is_ok();
        if known || self.guard.is_local(&parts.headers, peer) { Ok(()) } else { Err(self.refused(Refusal::Caller)) }
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

fn method(allow: &'static str) -> Problem {
    Problem::new(Code::MethodNotAllowed, "The page has another method.", format!("Use {allow}."))
        .header(ALLOW, HeaderValue::from_static(allow))
}
