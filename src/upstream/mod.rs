//! Pooled TLS connections to the hosts of the Ads API and of the MCP server.
//!
//! Each host has a pool (`pool`) of HTTP/2 connections, which many requests share (`http2`), and of idle HTTP/1.1
//! connections. HTTP/2 is cheaper for many short responses at once; at low concurrency, or while responses are long,
//! steady traffic moves to HTTP/1.1 connections that are opened beside the shared one (`protocol_choice`).
//!
//! A request drives its HTTP/1.1 connection itself (`http1_driver`), which returns to the pool only after both its
//! request and its response have been transferred completely. In every other case it is closed.
//!
//! The pool never retries a request. It reports whether Amazon may have processed it ([`Processed`]), and
//! `inbound::proxy`, which still has the caller's request, retries on a [`Reuse::Fresh`] connection.

mod activity;
mod ask_first;
mod read_ahead;
mod connect;
mod connection;
mod http1_driver;
mod http2;
mod idle_limit;
mod last_look;
mod request_body;
mod pool;
mod protocol_choice;
mod send_error;
mod settings;
mod tcp;
mod dial;
mod windows;

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_LENGTH, HOST, HeaderName, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use url::Url;

pub use dial::tunnel;
pub use idle_limit::IdleTimeout;
pub use request_body::{BodyError, ReplayBudget, ReplayBuffer, RequestBody};
pub use send_error::{Broken, ErrorKind, Processed, ResponseAborted, SendError};
pub use settings::{Http2, Settings};

use crate::domain::account::AmazonHost;
use crate::domain::tls;
use connection::{Connection, Http1Connection};
use pool::OriginPool;
use protocol_choice::InFlight;
use windows::WindowBudget;

/// The connection pools, one for each of Amazon's hosts.
#[derive(Debug)]
pub struct Upstream {
    pools: Vec<Arc<OriginPool>>,
    response_timeout: Duration,
}

/// Whether a pooled connection may carry the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// Use a pooled connection if one is available.
    Allowed,
    /// The same, for a request that may not be repeated: not one that the server may be closing right now.
    Unrepeatable,
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
        let budget = Arc::<WindowBudget>::default();
        let pool = |origin: &Url| OriginPool::new(origin, settings, &tls, &budget).map(Arc::new);
        Ok(Self {
            pools: settings.origins.iter().map(pool).collect::<Result<_, _>>()?,
            response_timeout: settings.response_timeout,
        })
    }

    /// Sends `request`, which has an origin-form target and our headers without `Host`, to `host`, on a
    /// connection that `reuse` allows. Returns the response once its head has arrived.
    ///
    /// The response timeout does not apply to a request that accepts an event stream, which may stay silent for a long
    /// time.
    ///
    /// # Errors
    /// [`SendError`] if no connection can be opened within `connect_timeout`, or no response head arrives.
    // Neither an `async fn` nor one future: every waiting request would hold the request several times, and move it as
    // often.
    pub fn send(
        &self,
        host: AmazonHost,
        reuse: Reuse,
        mut request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<UpstreamBody>, SendError>> + Send {
        let pool = &self.pools[host.index()];
        async move {
            let (in_flight, suits_http1) = pool.protocol_choice.enter();
            let connection = match pool.connection(reuse, suits_http1).await {
                Ok(connection) => connection,
                Err(kind) => return Err(kind.unsent(request.into_body())),
            };
            let progress = request.body().progress();
            let wait = (!accepts_event_stream(request.headers())).then_some(self.response_timeout);
            let sent: Sent = match connection {
                Connection::Http1(connection) => {
                    frame(&mut request);
                    request.headers_mut().insert(HOST, pool.authority.clone());
                    if reuse == Reuse::Unrepeatable && connection.may_be_closing() {
                        connection.look.ask();
                    }
                    over_http1(connection, request, pool.clone(), in_flight, progress.clone())
                }
                Connection::Http2(slot) => {
                    // Steady traffic that suits HTTP/1.1: one connection for each request now in flight. Those that
                    // would not use one say nothing about it.
                    let counts = !suits_http1 || pool.prefers_http1(reuse, suits_http1);
                    if counts && pool.protocol_choice.should_add_http1(suits_http1, pool.idle_limit.current()) {
                        pool.add_http1(slot.others() + 1);
                    }
                    let request = pool.with_authority(request);
                    Box::pin(async move {
                        let response = slot.send(request).await.map_err(SendError::over_http2)?;
                        Ok(response.map(|incoming| UpstreamBody::http2(incoming, in_flight)))
                    })
                }
            };
            response_head(sent, progress, wait).await
        }
    }

    /// Opens a connection to `host` in the background if it has none, because requests are likely soon.
    pub fn warm(&self, host: AmazonHost) {
        self.pools[host.index()].warm();
    }

    /// Closes connections that have been idle for too long, and replaces them where they are in use. Returns the time
    /// until the next call should be made.
    pub fn prune(&self) -> Duration {
        let shortest = self.pools.iter().map(OriginPool::prune).min().unwrap_or_default();
        shortest.clamp(Duration::from_millis(100), Duration::from_secs(1))
    }
}

/// Sends a request on an HTTP/1.1 connection. The connection's task has it before the future is polled, which holds
/// nothing of it.
fn over_http1(
    mut connection: Box<Http1Connection>,
    request: Request<RequestBody>,
    pool: Arc<OriginPool>,
    in_flight: InFlight,
    progress: Option<Arc<ReplayBuffer>>,
) -> Sent {
    connection.driver.lend();
    let sent = connection.sender.try_send_request(request);
    Box::pin(async move {
        let mut sent = pin!(sent);
        let mut arrived = None;
        poll_fn(|cx| {
            connection.driver.poll(cx, |cx| {
                arrived = Some(ready!(sent.as_mut().poll(cx)));
                Poll::Ready(())
            })
        })
        .await;
        let response = match arrived.expect("it is polled until it has arrived") {
            Ok(response) => response,
            Err(error) => return Err(not_sent(error, &pool, connection.reused)),
        };
        let unusable = |kind| Err(SendError { kind, processed: Processed::Unknown });
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return unusable(ErrorKind::Switched);
        }
        if let Some(coding) = other_coding(response.headers()) {
            return unusable(ErrorKind::TransferCoding(coding));
        }
        if let Some(limit) = announced_limit(response.headers()) {
            pool.idle_limit.closed_after(limit);
        }
        // After an early response the rest of the request must not wait for a caller that does not read.
        if progress.as_ref().is_some_and(|request| !request.ended()) {
            connection.driver.give_back();
        }
        Ok(response.map(|incoming| UpstreamBody::http1(incoming, in_flight, pool, connection, progress)))
    })
}

/// The error of a request whose HTTP/1.1 connection failed.
fn not_sent(mut error: TrySendError<Request<RequestBody>>, pool: &OriginPool, reused: bool) -> SendError {
    let unsent = error.take_message().map(Request::into_body);
    let error = SendError::over_http1(error.into_error(), unsent, reused);
    if matches!(error.processed, Processed::Stale | Processed::Refused { .. }) {
        // The server closed it at this very moment.
        pool.idle_limit.closed_after(Duration::ZERO);
    }
    error
}

/// Returns a transfer coding other than `chunked`, which hyper undoes. We ask for none (RFC 9112, section 7).
fn other_coding(headers: &HeaderMap) -> Option<String> {
    let lines = headers.get_all(TRANSFER_ENCODING).iter();
    let codings = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    let mut others = codings.filter(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"chunked"));
    others.next().map(|coding| String::from_utf8_lossy(coding).into_owned())
}

/// The header by which a server announces how long it lets a connection idle.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// The longest announced limit that is believed: no connection lives as long.
const MAX_ANNOUNCED: u64 = 3600;

/// The idle limit that the server announced (`Keep-Alive: timeout=5`).
fn announced_limit(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(KEEP_ALIVE)?.to_str().ok()?;
    let seconds = text.split([',', ' ']).find_map(|part| part.strip_prefix("timeout="))?;
    seconds.parse().ok().map(|seconds: u64| Duration::from_secs(seconds.min(MAX_ANNOUNCED)))
}

/// The request on its way, until the head of its response.
type Sent = Pin<Box<dyn Future<Output = Result<Response<UpstreamBody>, SendError>> + Send>>;

/// Whether the caller accepts an event stream, possibly beside other types: MCP clients list `application/json` first.
pub fn accepts_event_stream(headers: &HeaderMap) -> bool {
    const WANTED: &str = "text/event-stream";
    // Most lines are too short to name it.
    let lines = headers.get_all(ACCEPT).iter().filter(|line| line.len() >= WANTED.len());
    let lines = lines.filter_map(|line| line.to_str().ok());
    let mut kinds = lines.flat_map(|line| line.split(',')).map(|kind| kind.split(';').next().unwrap_or_default());
    kinds.any(|kind| kind.trim().eq_ignore_ascii_case(WANTED))
}

/// Sets `Transfer-Encoding: chunked` for a body without a length. Without a framing header hyper drops the body of a
/// GET or HEAD.
fn frame(request: &mut Request<RequestBody>) {
    if !request.body().is_end_stream() && !request.headers().contains_key(CONTENT_LENGTH) {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// Waits for the response head, for at most `wait` after the last byte of the request body was taken; without a limit
/// if `wait` is `None`.
async fn response_head(
    mut sent: Sent,
    progress: Option<Arc<ReplayBuffer>>,
    wait: Option<Duration>,
) -> Result<Response<UpstreamBody>, SendError> {
    let Some(wait) = wait else { return sent.await };
    loop {
        let before = progress.as_ref().map(|buffer| buffer.taken());
        match tokio::time::timeout(wait, &mut sent).await {
            Ok(result) => return result,
            // The request body is still being sent, so the response timeout has not started.
            Err(_) if progress.as_ref().map(|buffer| buffer.taken()) != before => {}
            Err(_) => {
                return Err(SendError { kind: ErrorKind::ResponseTimeout(wait), processed: Processed::Unknown });
            }
        }
    }
}

/// A response body, streamed from Amazon. After its last byte an HTTP/1.1 connection returns to the pool. If the body
/// fails or is dropped before that, the connection is closed, or the HTTP/2 stream is reset.
///
/// It is boxed, because a response is moved many times on its way to the caller.
#[derive(Debug)]
pub struct UpstreamBody(Box<Arriving>);

#[derive(Debug)]
struct Arriving {
    source: Source,
    /// Counts the request as in flight to its origin, and what arrives.
    in_flight: InFlight,
}

#[derive(Debug)]
enum Source {
    /// The connection is there until it is released or closed.
    Http1(Incoming, Option<Exchange>),
    Http2(http2::Incoming),
}

/// An HTTP/1.1 connection that is in use for one request and its response.
#[derive(Debug)]
struct Exchange {
    pool: Arc<OriginPool>,
    connection: Box<Http1Connection>,
    /// Tells whether the request body was sent completely; `None` if there is none.
    request: Option<Arc<ReplayBuffer>>,
}

impl UpstreamBody {
    fn http1(
        incoming: Incoming,
        in_flight: InFlight,
        pool: Arc<OriginPool>,
        connection: Box<Http1Connection>,
        request: Option<Arc<ReplayBuffer>>,
    ) -> Self {
        let mut exchange = Some(Exchange { pool, connection, request });
        if incoming.is_end_stream() {
            release(&mut exchange);
        }
        Self(Box::new(Arriving { source: Source::Http1(incoming, exchange), in_flight }))
    }

    fn http2(incoming: http2::Incoming, in_flight: InFlight) -> Self {
        Self(Box::new(Arriving { source: Source::Http2(incoming), in_flight }))
    }
}

/// Returns the connection to the pool, or closes it if the request was not sent completely.
fn release(exchange: &mut Option<Exchange>) {
    if let Some(Exchange { pool, connection, request }) = exchange.take()
        // After an early response the connection is still in the middle of the request.
        && request.is_none_or(|request| request.ended())
    {
        connection.driver.give_back();
        pool.release(connection);
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = ResponseAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        let Arriving { source, in_flight } = &mut *self.0;
        let (incoming, exchange) = match source {
            Source::Http1(incoming, exchange) => (incoming, exchange),
            Source::Http2(incoming) => {
                let frame = ready!(incoming.poll_frame(cx));
                in_flight.received(length(&frame));
                return Poll::Ready(frame);
            }
        };
        let mut frame = None;
        let mut poll = |cx: &mut Context<'_>| {
            frame = ready!(Pin::new(&mut *incoming).poll_frame(cx));
            Poll::Ready(())
        };
        ready!(match exchange {
            Some(exchange) => exchange.connection.driver.poll(cx, poll),
            None => poll(cx),
        });
        in_flight.received(length(&frame));
        match &frame {
            Some(Err(_)) => *exchange = None,
            Some(Ok(_)) if !incoming.is_end_stream() => {}
            Some(Ok(_)) | None => release(exchange),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|error| ResponseAborted::Broken(error.into()))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.0.source {
            Source::Http1(incoming, _) => incoming.is_end_stream(),
            Source::Http2(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0.source {
            Source::Http1(incoming, _) => incoming.size_hint(),
            Source::Http2(incoming) => incoming.size_hint(),
        }
    }
}

/// The bytes of data in a frame of a body, in which there may be none.
fn length<E>(frame: &Option<Result<Frame<Bytes>, E>>) -> usize {
    let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
    data.map_or(0, Bytes::len)
}

/// Locks `mutex` even if it is poisoned: the pools have no invariant that a panic could have broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
