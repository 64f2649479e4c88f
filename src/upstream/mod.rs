//! Pooled TLS connections to the hosts of the Ads API and of the MCP server.
//!
//! Each host has a stack of idle HTTP/1.1 connections, most recently used on top. If the server offers HTTP/2, the
//! host also has one HTTP/2 connection that all requests share. HTTP/2 is cheaper at high concurrency; at low
//! concurrency, steady traffic moves to HTTP/1.1 connections that are opened beside the shared one (`pool`).
//!
//! An HTTP/1.1 connection returns to the pool only after both its request and its response have been transferred
//! completely. In every other case it is closed.
//!
//! The pool never retries a request. It reports whether Amazon may have processed it ([`Processed`]), and
//! `inbound::proxy`, which still has the caller's request, retries on a [`Reuse::Fresh`] connection.

mod read_ahead;
mod upstream_body;
mod connect;
mod connection;
mod request_body;
mod pool;
mod send_error;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::header::{ACCEPT, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use rustls::pki_types::CertificateDer;
use url::Url;

pub use request_body::{BodyError, ReplayBudget, ReplayBuffer, RequestBody};
pub use send_error::{ErrorKind, Processed, SendError};
pub use upstream_body::{ResponseAborted, UpstreamBody};

use crate::domain::account::AmazonHost;
use crate::domain::tls;
use connection::{Connection, H2Connection};
use pool::{CountGuard, OriginPool};

/// The addresses of Amazon's hosts, and the timeouts for requests to them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `upstream.na`, …, `upstream.mcp_fe`: `https` origins without a path, in the order of [`AmazonHost::ALL`].
    pub origins: [Url; AmazonHost::ALL.len()],
    /// `upstream.ca_file`: additional trust roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// `upstream.http2`: which HTTP versions are offered.
    pub http2: Http2,
    /// `upstream.connect_timeout`: limit for DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// `upstream.response_timeout`: from the end of the request to the end of the response's head.
    pub response_timeout: Duration,
    /// `upstream.idle_timeout`: how long an unused connection stays in the pool. It should be shorter than the server's
    /// own idle timeout; otherwise a request can meet a connection that the server is just closing.
    pub idle_timeout: Duration,
}

/// Which HTTP versions adsidecar offers to Amazon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Http2 {
    /// HTTP/2 if the server selects it by ALPN, else HTTP/1.1.
    #[default]
    Auto,
    /// Only HTTP/1.1.
    Never,
    /// Only HTTP/2. A server without it causes an error.
    Always,
}

/// The connection pools, one for each of Amazon's hosts.
#[derive(Debug)]
pub struct Upstream {
    pools: Vec<Arc<OriginPool>>,
    response_timeout: Duration,
    idle_timeout: Duration,
}

/// Whether a pooled connection may carry the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// Use a pooled connection if one is available.
    Allowed,
    /// Open a new connection, for a retry. Requests that failed together may share an HTTP/2 connection that was opened
    /// after this time.
    Fresh(Instant),
    /// Open a new HTTP/1.1 connection, if `upstream.http2` allows it.
    FreshHttp1,
}

impl Upstream {
    /// Creates the pools, without connecting.
    ///
    /// # Errors
    /// Fails if an origin has no usable host or a trust root is invalid.
    pub fn new(settings: &Settings) -> Result<Self, rustls::Error> {
        // One configuration for all pools, because the trust roots are large.
        let tls = tls::client_config(&settings.extra_roots, &[])?;
        let pool = |origin: &Url| OriginPool::new(origin, settings, &tls).map(Arc::new);
        Ok(Self {
            pools: settings.origins.iter().map(pool).collect::<Result<_, _>>()?,
            response_timeout: settings.response_timeout,
            idle_timeout: settings.idle_timeout,
        })
    }

    /// Sends `request`, which has an origin-form target and our headers without `Host`, to `host`: on a
    /// pooled connection if `reuse` allows it and one is available, else on a new one. Returns the response once its
    /// head has arrived.
    ///
    /// The response timeout does not apply to a request that accepts an event stream, which may stay silent for a long
    /// time.
    ///
    /// # Errors
    /// [`SendError`] if no connection can be opened within `connect_timeout`, or no response head arrives.
    // hyper's future is boxed: otherwise every waiting request would hold the request several times.
    pub async fn send(
        &self,
        host: AmazonHost,
        reuse: Reuse,
        mut request: Request<RequestBody>,
    ) -> Result<Response<UpstreamBody>, SendError> {
        let pool = &self.pools[host.index()];
        let (in_flight, low_concurrency) = pool.protocol_choice.enter();
        let mut transport = match pool.connection(reuse, low_concurrency, self.idle_timeout).await {
            Ok(connection) => self.transport(pool, connection, low_concurrency),
            Err(kind) => return Err(kind.unsent(request.into_body())),
        };
        let progress = request.body().progress();
        let wait = (!accepts_event_stream(request.headers())).then_some(self.response_timeout);
        let sent: Pin<Box<dyn Future<Output = Sent> + Send>> = match &mut transport {
            Transport::Http1 { sender, .. } => {
                frame(&mut request);
                request.headers_mut().insert(HOST, pool.authority.clone());
                Box::pin(sender.try_send_request(request))
            }
            Transport::Http2 { sender, .. } => Box::pin(sender.try_send_request(pool.with_authority(request))),
        };
        let response = response_head(sent, &progress, wait).await;
        let response = response.map_err(|error| error.into_send_error(transport.reused()))?;
        match transport {
            Transport::Http1 { .. } if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                Err(SendError { kind: ErrorKind::Switched, processed: Processed::Unknown })
            }
            Transport::Http1 { sender, .. } => {
                Ok(response.map(|incoming| UpstreamBody::http1(incoming, in_flight, pool.clone(), sender, progress)))
            }
            Transport::Http2 { share, .. } => {
                Ok(response.map(|incoming| UpstreamBody::http2(incoming, in_flight, share)))
            }
        }
    }

    /// Counts the request on a shared connection, and opens HTTP/1.1 connections beside it for steady traffic at low
    /// concurrency.
    fn transport(&self, pool: &Arc<OriginPool>, connection: Connection, low_concurrency: bool) -> Transport {
        match connection {
            Connection::Http1 { sender, reused } => Transport::Http1 { sender, reused },
            Connection::Http2(H2Connection { sender, streams, activity, .. }) => {
                let (share, others) = CountGuard::increment(&streams);
                if others == 0 {
                    // Silence counts from the first request that waits.
                    activity.touch();
                }
                // One connection for each request now in flight.
                if pool.protocol_choice.should_add_http1(low_concurrency, self.idle_timeout) {
                    pool.add_http1(others + 1);
                }
                Transport::Http2 { sender, share }
            }
        }
    }

    /// Closes connections that have been idle for too long. Returns the time until the next call should be made.
    pub fn prune(&self) -> Duration {
        for pool in &self.pools {
            pool.prune(self.idle_timeout);
        }
        (self.idle_timeout / 2).max(Duration::from_millis(100))
    }
}

/// A connection that carries one request.
#[derive(Debug)]
enum Transport {
    Http1 { sender: http1::SendRequest<RequestBody>, reused: bool },
    Http2 { sender: http2::SendRequest<RequestBody>, share: CountGuard },
}

impl Transport {
    /// Whether the connection may have carried an earlier request.
    fn reused(&self) -> bool {
        match self {
            Self::Http1 { reused, .. } => *reused,
            Self::Http2 { .. } => true,
        }
    }
}

/// hyper's result for one request.
type Sent = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>;

/// Whether the caller accepts an event stream, possibly beside other types: MCP clients list `application/json` first.
pub fn accepts_event_stream(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok());
    let mut kinds = lines.flat_map(|line| line.split(',')).map(|kind| kind.split(';').next().unwrap_or_default());
    kinds.any(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
}

/// Sets `Transfer-Encoding: chunked` for a body without a length. Without a framing header hyper drops the body of a
/// GET or HEAD.
fn frame(request: &mut Request<RequestBody>) {
    if !request.body().is_end_stream() && !request.headers().contains_key(CONTENT_LENGTH) {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// Waits for the response head, for at most `wait` after hyper took the last byte of the request body; without a limit
/// if `wait` is `None`.
async fn response_head(
    mut sent: Pin<Box<dyn Future<Output = Sent> + Send>>,
    progress: &Option<Arc<ReplayBuffer>>,
    wait: Option<Duration>,
) -> Result<Response<Incoming>, NoHead> {
    let Some(wait) = wait else { return sent.await.map_err(NoHead::from) };
    loop {
        let before = progress.as_ref().map(|buffer| buffer.taken());
        match tokio::time::timeout(wait, &mut sent).await {
            Ok(result) => return result.map_err(NoHead::from),
            // The request body is still being sent, so the response timeout has not started.
            Err(_) if progress.as_ref().map(|buffer| buffer.taken()) != before => {}
            Err(_) => return Err(NoHead::TimedOut(wait)),
        }
    }
}

/// Why no response head arrived.
enum NoHead {
    Error { error: hyper::Error, unsent: Option<RequestBody> },
    TimedOut(Duration),
}

impl From<TrySendError<Request<RequestBody>>> for NoHead {
    fn from(mut error: TrySendError<Request<RequestBody>>) -> Self {
        let unsent = error.take_message().map(Request::into_body);
        Self::Error { error: error.into_error(), unsent }
    }
}

impl NoHead {
    /// Adds whether a retry would be safe; `reused` tells whether the connection came from the pool.
    fn into_send_error(self, reused: bool) -> SendError {
        match self {
            Self::TimedOut(wait) => SendError { kind: ErrorKind::ResponseTimeout(wait), processed: Processed::Unknown },
            Self::Error { error, unsent } => SendError::from_hyper(error, unsent, reused),
        }
    }
}

/// Locks `mutex` even if it is poisoned: the pools have no invariant that a panic could have broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
