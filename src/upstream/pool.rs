//! The connection pool of one regional origin.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::{HeaderValue, Request, Uri};
use hyper::client::conn::http1;
use url::Url;

use super::connect::{Alpn, Connector};
use super::connection::{Connection, H2Connection, MAX_STREAMS};
use super::{ErrorKind, Http2, RequestBody, Reuse, Settings, lock};

/// The connections to one origin: idle HTTP/1.1 connections, and at most two HTTP/2 connections for new requests.
#[derive(Debug)]
pub(super) struct OriginPool {
    connector: Connector,
    /// The value of the `Host` header: the origin's authority.
    pub(super) authority: HeaderValue,
    /// The scheme and authority that HTTP/2 sends as `:scheme` and `:authority`.
    origin: http::uri::Parts,
    /// Idle HTTP/1.1 connections, oldest first.
    idle: Mutex<VecDeque<Idle>>,
    /// The HTTP/2 connection that requests share, and the one that takes requests while the first is full.
    shared: Mutex<[Option<H2Connection>; 2]>,
    pub(super) protocol_choice: ProtocolChoice,
    /// Whether the last new connection used HTTP/1.1, so that each request needs its own connection.
    http1_only: AtomicBool,
    /// Held while a connection that may become shared is opened, so that a burst of requests opens only one.
    connecting: tokio::sync::Mutex<()>,
}

/// An idle HTTP/1.1 connection, and when it became idle.
#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<RequestBody>,
    since: Instant,
}

/// Most idle connections; a connection released beyond that is closed, so that a burst does not hold file descriptors.
const MAX_IDLE: usize = 1024;
/// Longest wait for a pooled connection to become ready. If the server responded before it had read the whole request,
/// the connection becomes ready only after the server has read the rest, which may never happen. A usable connection is
/// ready within microseconds.
const READY: Duration = Duration::from_millis(100);

impl OriginPool {
    pub(super) fn new(origin: &Url, settings: &Settings, tls: &rustls::ClientConfig) -> Result<Self, rustls::Error> {
        let connector = Connector::new(origin, settings, tls)?;
        let text = match origin.port() {
            Some(port) => format!("{}:{port}", origin.host_str().unwrap_or_default()),
            None => origin.host_str().unwrap_or_default().to_owned(),
        };
        let bad = |_| rustls::Error::General(format!("{origin} is not an origin"));
        let authority = HeaderValue::from_str(&text).map_err(|error| bad(error.to_string()))?;
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(http::uri::Scheme::HTTPS);
        parts.authority = Some(text.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?);
        Ok(Self {
            connector,
            authority,
            origin: parts,
            idle: Mutex::default(),
            shared: Mutex::default(),
            protocol_choice: ProtocolChoice::default(),
            http1_only: AtomicBool::new(settings.http2 == Http2::Never),
            connecting: tokio::sync::Mutex::default(),
        })
    }

    /// Returns a connection for one request: from the pool if `reuse` allows it and one is available, else a new one.
    /// `low_concurrency` prefers an idle HTTP/1.1 connection to the shared one.
    pub(super) async fn connection(
        &self,
        reuse: Reuse,
        low_concurrency: bool,
        idle_timeout: Duration,
    ) -> Result<Connection, ErrorKind> {
        let pooled = async || match reuse {
            Reuse::Allowed => self.pooled(low_concurrency, idle_timeout).await,
            Reuse::Fresh(since) => self.shared(Some(since)).await,
            Reuse::FreshHttp1 => None,
        };
        if let Some(connection) = pooled().await {
            return Ok(connection);
        }
        if reuse == Reuse::FreshHttp1 && self.connector.may_speak_http1() {
            return Box::pin(self.connector.connect(Alpn::Http1)).await;
        }
        if self.http1_only.load(Relaxed) {
            return self.connect().await;
        }
        // Wait for a connection that another request is opening, for at most the connect timeout; after that this
        // request opens its own.
        let _one = tokio::time::timeout(self.connector.timeout(), self.connecting.lock()).await;
        match pooled().await {
            Some(connection) => Ok(connection),
            None => self.connect().await,
        }
    }

    /// Takes a connection from the pool, and drops expired and closed ones on the way.
    async fn pooled(&self, low_concurrency: bool, idle_timeout: Duration) -> Option<Connection> {
        if !low_concurrency && let Some(shared) = self.shared(None).await {
            return Some(shared);
        }
        while let Some(Idle { mut sender, since }) = self.pop() {
            // Usually the connection is ready at once, which needs no timer.
            if since.elapsed() < idle_timeout
                && (sender.is_ready() || matches!(tokio::time::timeout(READY, sender.ready()).await, Ok(Ok(()))))
            {
                return Some(Connection::Http1 { sender, reused: true });
            }
        }
        self.shared(None).await
    }

    /// Returns an HTTP/2 connection that has room for another request, and was opened after `since`.
    async fn shared(&self, since: Option<Instant>) -> Option<Connection> {
        let both = lock(&self.shared).clone();
        let usable = |shared: &H2Connection| {
            !shared.is_full() && !shared.is_silent() && since.is_none_or(|since| shared.opened >= since)
        };
        for mut shared in both.into_iter().flatten().filter(usable) {
            if shared.sender.ready().await.is_ok() {
                return Some(Connection::Http2(shared));
            }
        }
        None
    }

    /// Opens a connection. An HTTP/2 connection becomes the shared one, or the overflow if the shared one is full.
    async fn connect(&self) -> Result<Connection, ErrorKind> {
        let overflow = lock(&self.shared)[0]
            .as_ref()
            .is_some_and(|shared| shared.is_full() && !shared.is_silent() && !shared.sender.is_closed());
        let hundreds = self.protocol_choice.in_flight() / MAX_STREAMS;
        let alpn = if overflow { Alpn::Overflow { hundreds } } else { Alpn::Configured };
        // Boxed, because connecting is rare and its future is large.
        let connection = Box::pin(self.connector.connect(alpn)).await?;
        self.http1_only.store(matches!(connection, Connection::Http1 { .. }), Relaxed);
        if let Connection::Http2(shared) = &connection {
            // A full overflow connection that is replaced here closes after its last request.
            lock(&self.shared)[usize::from(overflow)] = Some(shared.clone());
        }
        Ok(connection)
    }

    /// Starts a task that opens `count` HTTP/1.1 connections, one after the other, and puts them into the pool. It does
    /// nothing if HTTP/1.1 is not allowed or such a task is already running.
    pub(super) fn add_http1(self: &Arc<Self>, count: usize) {
        if !self.connector.may_speak_http1() || self.protocol_choice.adding.swap(true, Relaxed) {
            return;
        }
        let pool = self.clone();
        tokio::spawn(async move {
            for _ in 0..count {
                // On failure requests continue to use the shared connection.
                let Ok(Connection::Http1 { sender, .. }) = pool.connector.connect(Alpn::Http1).await else { break };
                pool.release(sender);
            }
            pool.protocol_choice.adding.store(false, Relaxed);
        });
    }

    fn pop(&self) -> Option<Idle> {
        lock(&self.idle).pop_back()
    }

    /// Returns a connection to the pool, or closes it if the pool is full.
    pub(super) fn release(&self, sender: http1::SendRequest<RequestBody>) {
        let mut idle = lock(&self.idle);
        if idle.len() < MAX_IDLE && !sender.is_closed() {
            idle.push_back(Idle { sender, since: Instant::now() });
        }
    }

    /// Closes connections that have been idle for `idle_timeout` or were closed by the server.
    pub(super) fn prune(&self, idle_timeout: Duration) {
        let mut idle = lock(&self.idle);
        // The oldest connections come first.
        let old = idle.iter().take_while(|idle| idle.since.elapsed() >= idle_timeout).count();
        idle.drain(..old);
        idle.retain(|idle| !idle.sender.is_closed());
    }

    /// Puts the authority into the target, as HTTP/2 requires (RFC 9113, section 8.3.1).
    pub(super) fn with_authority(&self, mut request: Request<RequestBody>) -> Request<RequestBody> {
        let mut parts = http::uri::Parts::default();
        parts.scheme.clone_from(&self.origin.scheme);
        parts.authority.clone_from(&self.origin.authority);
        parts.path_and_query = request.uri().path_and_query().cloned();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
        *request.version_mut() = http::Version::HTTP_2;
        request
    }
}

/// Below this concurrency HTTP/1.1 costs less CPU.
const LOW_CONCURRENCY: usize = 12;
/// After this many consecutive requests at low concurrency on the shared connection, HTTP/1.1 connections are opened. A
/// TLS handshake costs as much CPU as a few dozen requests.
const ADD_HTTP1_AFTER: u32 = 64;

/// Chooses whether a request uses the shared HTTP/2 connection or an HTTP/1.1 connection of its own, from the
/// concurrency of requests to one origin and how steady it is.
///
/// At high concurrency HTTP/2 is cheap, because the frames of several requests share one TLS record and one system
/// call. At low concurrency that advantage is missing, but framing, HPACK and two more tasks still cost CPU. Measured,
/// HTTP/2 takes 5 to 25 % more CPU than HTTP/1.1 for up to eight concurrent requests, and 5 to 10 % less for sixteen
/// and more.
///
/// Only steady traffic justifies additional connections. The shared connection stays open for occasional requests and
/// for bursts.
#[derive(Debug, Default)]
pub(super) struct ProtocolChoice {
    in_flight: Arc<AtomicUsize>,
    run: Mutex<Run>,
    /// Whether a task is opening HTTP/1.1 connections.
    pub(super) adding: AtomicBool,
}

/// A run of consecutive requests at low concurrency on the shared connection.
#[derive(Debug, Default)]
struct Run {
    since: Option<Instant>,
    requests: u32,
}

/// Keeps a counter incremented until it is dropped.
#[derive(Debug)]
pub(super) struct CountGuard(Arc<AtomicUsize>);

impl CountGuard {
    /// Increments `count`, and returns the guard and the value before.
    pub(super) fn increment(count: &Arc<AtomicUsize>) -> (Self, usize) {
        let others = count.fetch_add(1, Relaxed);
        (Self(count.clone()), others)
    }
}

impl Drop for CountGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl ProtocolChoice {
    /// Counts a request as in flight while the guard exists, and returns whether concurrency is low.
    pub(super) fn enter(&self) -> (CountGuard, bool) {
        let (guard, others) = CountGuard::increment(&self.in_flight);
        (guard, others < LOW_CONCURRENCY)
    }

    /// Returns the number of requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// Records a request on the shared connection. Returns `true` if it completes a run of [`ADD_HTTP1_AFTER`] requests
    /// at low concurrency within `period`, so that HTTP/1.1 connections should be opened.
    pub(super) fn should_add_http1(&self, low_concurrency: bool, period: Duration) -> bool {
        let mut run = lock(&self.run);
        if !low_concurrency {
            *run = Run::default();
            return false;
        }
        let now = Instant::now();
        let since = run.since.filter(|since| now.duration_since(*since) < period).unwrap_or_else(|| {
            run.requests = 0;
            now
        });
        *run = Run { since: Some(since), requests: run.requests + 1 };
        let complete = run.requests == ADD_HTTP1_AFTER;
        if complete {
            *run = Run::default();
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use hyper_util::rt::TokioIo;

    use super::*;
    use crate::domain::tls;

    #[tokio::test]
    async fn a_connection_that_has_idled_for_idle_timeout_is_never_taken_from_the_pool() {
        let origin: Url = "https://localhost".parse().unwrap();
        let long = Duration::from_secs(60);
        let settings = Settings {
            origins: std::array::from_fn(|_| origin.clone()),
            extra_roots: Vec::new(),
            http2: Http2::Never,
            connect_timeout: long,
            response_timeout: long,
            idle_timeout: long,
        };
        let pool = OriginPool::new(&origin, &settings, &tls::client_config(&[], &[]).unwrap()).unwrap();
        for (idle_timeout, taken) in [(long, true), (Duration::ZERO, false)] {
            let (ours, _theirs) = tokio::io::duplex(1024);
            let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
            tokio::spawn(connection);
            pool.release(sender);
            assert_eq!(pool.pooled(true, idle_timeout).await.is_some(), taken, "{idle_timeout:?}");
            assert!(pool.pop().is_none(), "it is used, or closed");
        }
    }

    const PERIOD: Duration = Duration::from_secs(60);

    #[test]
    fn concurrency_is_low_until_more_requests_are_in_flight() {
        let choice = ProtocolChoice::default();
        let requests: Vec<_> = (0..=LOW_CONCURRENCY).map(|_| choice.enter()).collect();
        let low: Vec<_> = requests.iter().map(|(_, low)| *low).collect();
        assert!(low[..LOW_CONCURRENCY].iter().all(|low| *low) && !low[LOW_CONCURRENCY]);
        drop(requests);
        assert!(choice.enter().1, "completed requests do not count");
    }

    #[test]
    fn occasional_requests_complete_no_run() {
        let choice = ProtocolChoice::default();
        assert!((0..3 * ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, Duration::ZERO)));
    }

    #[test]
    fn each_run_at_low_concurrency_completes_once() {
        let choice = ProtocolChoice::default();
        let completed: Vec<_> = (1..=2 * ADD_HTTP1_AFTER).filter(|_| choice.should_add_http1(true, PERIOD)).collect();
        assert_eq!(completed, [ADD_HTTP1_AFTER, 2 * ADD_HTTP1_AFTER]);
    }

    #[test]
    fn high_concurrency_restarts_the_run() {
        let choice = ProtocolChoice::default();
        assert!((1..ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, PERIOD)));
        assert!(!choice.should_add_http1(false, PERIOD));
        assert!((1..ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, PERIOD)));
        assert!(choice.should_add_http1(true, PERIOD));
    }
}
