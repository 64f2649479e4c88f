//! Pooled TLS connections to the Ads hosts.
//!
//! Each region has a stack of idle HTTP/1.1 connections, the one used last on top, and where the server offers HTTP/2 one
//! such connection that all share. HTTP/2 wins where many call at once; few who go on calling are given HTTP/1.1
//! connections beside the shared one (`sharing`). An HTTP/1.1 connection goes back when both its request and its answer have
//! passed whole; whatever else happens to it closes it. The pool never repeats a request by itself: it says whether a repetition would be safe
//! ([`SendError::unsent`], [`SendError::stale`]), and the spine, which still has the caller's request, repeats it on a
//! [`Reuse::Fresh`] connection.

mod read_ahead;
mod upstream_body;
mod connect;
mod connection;
mod request_body;
mod pool;
mod protocol_choice;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use rustls::pki_types::CertificateDer;
use url::Url;

pub use request_body::{BodyError, ReplayBudget, ReplayBuffer, RequestBody};
pub use upstream_body::UpstreamBody;

use crate::domain::account::Region;
use crate::domain::tls;
use connection::{Connection, H2Connection};
use pool::OriginPool;
use protocol_choice::Counted;

/// Where the Ads hosts are and how long they are waited for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `upstream.na`, `upstream.eu`, `upstream.fe`: `https` origins without a path, by [`Region`].
    pub origins: [Url; 3],
    /// `upstream.ca_file`: extra trust roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// `upstream.http2`.
    pub http2: Http2,
    /// `upstream.connect_timeout`: DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// `upstream.response_timeout`: from the end of the request to the first byte of the answer.
    pub response_timeout: Duration,
    /// `upstream.idle_timeout`: how long an unused connection stays in the pool. Below the server's own, or a request
    /// meets a connection that is just being closed.
    pub idle_timeout: Duration,
}

/// Whether HTTP/2 is spoken to Amazon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Http2 {
    /// Where the server offers it by ALPN.
    #[default]
    Auto,
    /// HTTP/1.1 only.
    Never,
    /// HTTP/2 or no connection.
    Always,
}

/// The way to the three Ads hosts.
#[derive(Debug)]
pub struct Upstream {
    hosts: [Arc<OriginPool>; 3],
    response_timeout: Duration,
    idle_timeout: Duration,
}

/// Whether a pooled connection may carry the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// One from the pool, if there is one.
    Allowed,
    /// A fresh one, for a repetition.
    Fresh,
}

/// Why no answer came.
#[derive(Debug)]
pub struct SendError {
    /// What happened.
    pub kind: ErrorKind,
    /// The body, where no byte of the request was written: it may be repeated whatever it is.
    pub unsent: Option<RequestBody>,
    /// It broke on a connection from the pool before any byte of an answer: the server may have been about to close it.
    pub stale: bool,
}

/// What can go wrong on the way to an answer's head.
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    /// No TCP connection: DNS, refused, no route.
    #[error("cannot connect: {0}")]
    Unreachable(Box<dyn std::error::Error + Send + Sync>),
    /// The TLS handshake failed.
    #[error("TLS handshake failed: {0}")]
    Tls(std::io::Error),
    /// The connection broke, or what came was no HTTP.
    #[error("connection broke: {0}")]
    Reset(hyper::Error),
    /// 101, which nobody asked for: what follows on the connection is no HTTP.
    #[error("the server switched protocols unasked")]
    Switched,
    /// No connection within `connect_timeout`.
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
    /// No answer within `response_timeout`.
    #[error("no answer within {0:?}")]
    ResponseTimeout(Duration),
    /// The caller's body did not come whole; Amazon is not to blame.
    #[error("request body: {0}")]
    Body(BodyError),
}

impl ErrorKind {
    /// The request that this kept from being sent keeps its body.
    pub fn unsent(self, body: RequestBody) -> SendError {
        SendError { kind: self, unsent: Some(body), stale: false }
    }
}

impl Upstream {
    /// Prepares the pools; connects to nothing yet.
    pub fn new(settings: &Settings) -> Result<Self, rustls::Error> {
        // One for all: the trust roots are large.
        let tls = tls::client_config(&settings.extra_roots, &[])?;
        let host = |region: Region| OriginPool::new(&settings.origins[region as usize], settings, &tls).map(Arc::new);
        Ok(Self {
            hosts: [host(Region::Na)?, host(Region::Eu)?, host(Region::Fe)?],
            response_timeout: settings.response_timeout,
            idle_timeout: settings.idle_timeout,
        })
    }

    /// The value of the `Host` header for a call to `region`.
    pub fn authority(&self, region: Region) -> &HeaderValue {
        &self.hosts[region as usize].authority
    }

    /// A connection for one call to `region`: one from the pool, or a new one.
    pub async fn checkout(&self, region: Region, reuse: Reuse) -> Result<Checkout, ErrorKind> {
        let host = &self.hosts[region as usize];
        let (call, few) = host.sharing.enter();
        let way = match host.connection(reuse, few, self.idle_timeout).await? {
            Connection::Http1 { sender, reused } => Transport::Http1 { sender, reused },
            Connection::Http2(H2Connection { sender, calls }) => {
                let (share, others) = Counted::among(&calls);
                if host.sharing.ends_row(few, self.idle_timeout) {
                    host.add_http1(others + 1);
                }
                Transport::Http2 { sender, share }
            }
        };
        Ok(Checkout { host: host.clone(), call, way, response_timeout: self.response_timeout })
    }

    /// Closes connections that have idled too long, and says when to do it again.
    pub fn prune(&self) -> Duration {
        for host in &self.hosts {
            host.prune(self.idle_timeout);
        }
        (self.idle_timeout / 2).max(Duration::from_millis(100))
    }
}

/// A connection that waits for its one request.
#[derive(Debug)]
pub struct Checkout {
    host: Arc<OriginPool>,
    call: Counted,
    way: Transport,
    response_timeout: Duration,
}

#[derive(Debug)]
enum Transport {
    Http1 { sender: http1::SendRequest<RequestBody>, reused: bool },
    Http2 { sender: http2::SendRequest<RequestBody>, share: Counted },
}

impl Checkout {
    /// Sends `request` (origin-form target, our headers) and returns the answer as soon as its head is here. `patient`
    /// calls wait for it without a limit, as an event stream may be silent for long.
    // Not `async`, and what hyper makes of the request in a box: it would be held four times over by every call that waits.
    pub fn send(
        self,
        mut request: Request<RequestBody>,
        patient: bool,
    ) -> impl Future<Output = Result<Response<UpstreamBody>, SendError>> + Send {
        let Self { host, call, mut way, response_timeout } = self;
        let progress = request.body().progress();
        let sent: Pin<Box<dyn Future<Output = Sent> + Send>> = match &mut way {
            Transport::Http1 { sender, .. } => {
                frame(&mut request);
                Box::pin(sender.try_send_request(request))
            }
            Transport::Http2 { sender, .. } => Box::pin(sender.try_send_request(host.with_authority(request))),
        };
        async move {
            let response = awaited(sent, &progress, (!patient).then_some(response_timeout)).await;
            let response = response.map_err(|error| error.on(way.reused()))?;
            match way {
                Transport::Http1 { .. } if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                    Err(SendError { kind: ErrorKind::Switched, unsent: None, stale: false })
                }
                Transport::Http1 { sender, .. } => {
                    Ok(response.map(|incoming| UpstreamBody::http1(incoming, call, host, sender, progress)))
                }
                Transport::Http2 { share, .. } => {
                    Ok(response.map(|incoming| UpstreamBody::http2(incoming, call, share)))
                }
            }
        }
    }
}

impl Transport {
    /// Whether it may have been used before.
    fn reused(&self) -> bool {
        match self {
            Self::Http1 { reused, .. } => *reused,
            Self::Http2 { .. } => true,
        }
    }
}

/// What hyper says of a request that it was given.
type Sent = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>;

/// Says how a body without a length is framed: hyper leaves the body of a GET or HEAD out where nothing does.
fn frame(request: &mut Request<RequestBody>) {
    if !request.body().is_end_stream() && !request.headers().contains_key(CONTENT_LENGTH) {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// What `sent` gives, within `wait` after the last byte of the request body was taken.
async fn awaited(
    mut sent: Pin<Box<dyn Future<Output = Sent> + Send>>,
    progress: &Option<Arc<ReplayBuffer>>,
    wait: Option<Duration>,
) -> Result<Response<Incoming>, Broken> {
    let Some(wait) = wait else { return sent.await.map_err(Broken::from) };
    loop {
        let before = progress.as_ref().map(|held| held.taken());
        match tokio::time::timeout(wait, &mut sent).await {
            Ok(result) => return result.map_err(Broken::from),
            // The body still moves: the time for the answer has not begun.
            Err(_) if progress.as_ref().map(|held| held.taken()) != before => {}
            Err(_) => return Err(Broken::Late(wait)),
        }
    }
}

/// A request that got no answer's head.
enum Broken {
    Error { error: hyper::Error, unsent: Option<RequestBody> },
    Late(Duration),
}

impl From<TrySendError<Request<RequestBody>>> for Broken {
    fn from(mut error: TrySendError<Request<RequestBody>>) -> Self {
        let unsent = error.take_message().map(Request::into_body);
        Self::Error { error: error.into_error(), unsent }
    }
}

impl Broken {
    fn on(self, reused: bool) -> SendError {
        match self {
            Self::Late(wait) => SendError { kind: ErrorKind::ResponseTimeout(wait), unsent: None, stale: false },
            Self::Error { error, unsent } => match BodyError::within(&error) {
                Some(body) => SendError { kind: ErrorKind::Body(body), unsent: None, stale: false },
                None => {
                    // Anything but a broken connection (an answer that is no HTTP, say) came from the server.
                    let stale = reused && (error.is_incomplete_message() || error.is_canceled() || is_io(&error));
                    SendError { kind: ErrorKind::Reset(error), unsent, stale }
                }
            },
        }
    }
}

fn is_io(error: &hyper::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<std::io::Error>())
}

/// A poisoned lock is taken all the same: the pools hold no invariant that a panic could have broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
