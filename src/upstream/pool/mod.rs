//! The connection pool of one regional origin.
//!
//! A request takes an open connection, or waits for the first that becomes usable: a new one, one that another request
//! releases, or a free stream. Tasks open connections, not requests, so a caller that hangs up wastes none; a burst
//! opens as many connections as it needs at the same time (`opening`). While an origin is in use, a connection that is
//! given up is replaced in the background (`warmth`).

mod opening;
mod warmth;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use http::{HeaderValue, Request, Uri};
use tokio::sync::oneshot;
use url::Url;

use super::activity::Activity;
use super::connect::Connector;
use super::connection::{Connection, Http1Connection};
use super::http2::{Http2 as Http2Connection, SlotOwner};
use super::idle_limit::{IdleLimit, IdleTimeout};
use super::protocol_choice::ProtocolChoice;
use super::windows::{MAX_STREAMS, WindowBudget};
use super::{ErrorKind, Http2, RequestBody, Reuse, Settings, lock};
use warmth::{Background, MOST_UNUSED};

/// The connections to one origin.
#[derive(Debug)]
pub(super) struct OriginPool {
    connector: Connector,
    /// The value of the `Host` header: the origin's authority.
    pub(super) authority: HeaderValue,
    /// The scheme and authority that HTTP/2 sends as `:scheme` and `:authority`.
    origin: http::uri::Parts,
    pub(super) protocol_choice: ProtocolChoice,
    /// How long the origin lets a connection idle after a response.
    pub(super) idle_limit: IdleLimit,
    /// How long it waits for the first request of a connection.
    unused_limit: IdleLimit,
    /// When a request last used the origin.
    used: Arc<Activity>,
    /// When a request that may not be repeated last did.
    used_unrepeatably: Arc<Activity>,
    connections: Mutex<Connections>,
    /// The number of waiting requests.
    waiting: AtomicUsize,
}

#[derive(Debug)]
struct Connections {
    /// Idle HTTP/1.1 connections, oldest first.
    idle: VecDeque<Idle>,
    /// HTTP/2 connections that take requests, oldest first.
    shared: Vec<Http2Connection>,
    /// Requests that wait, oldest first, and some that hung up.
    waiters: VecDeque<Waiter>,
    /// Connections that are being opened.
    opening: usize,
    /// How many requests a new connection is expected to carry: one over HTTP/1.1.
    expected: usize,
    background: Background,
    /// The most requests that were lately in flight together.
    peak: usize,
}

/// An idle HTTP/1.1 connection, and when it became idle.
#[derive(Debug)]
struct Idle {
    connection: Box<Http1Connection>,
    since: Instant,
}

impl Idle {
    fn new(connection: Box<Http1Connection>) -> Self {
        Self { connection, since: Instant::now() }
    }

    fn is_closed(&self) -> bool {
        self.connection.sender.is_closed()
    }
}

/// A request that waits for a connection.
#[derive(Debug)]
struct Waiter {
    reuse: Reuse,
    deliver: oneshot::Sender<Result<Connection, ErrorKind>>,
}

/// Counts a request as waiting until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(pool: &'a OriginPool) -> Self {
        pool.waiting.fetch_add(1, Relaxed);
        Self(&pool.waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The queue is not searched for requests that hung up while it holds fewer of them than this.
const FEW: usize = 16;

/// Most idle connections; a connection released beyond that is closed, so that a burst does not hold file descriptors.
const MAX_IDLE: usize = 1024;
/// The longest time for which a connection waits for its first request. Most servers wait for 60 seconds.
const UNUSED_LASTS: Duration = Duration::from_secs(45);
/// Longest wait for a pooled connection to become ready. If the server responded before it had read the whole request,
/// the connection becomes ready only after the server has read the rest, which may never happen. A usable connection is
/// ready within microseconds.
const READY: Duration = Duration::from_millis(100);
/// The age from which a connection is replaced, so that changes in DNS are followed.
const MAX_AGE: Duration = Duration::from_secs(600);
/// A connection that will be too old within this time is replaced.
const AGING: Duration = Duration::from_secs(15);

impl OriginPool {
    pub(super) fn new(
        origin: &Url,
        settings: &Settings,
        tls: &rustls::ClientConfig,
        budget: &Arc<WindowBudget>,
    ) -> Result<Self, rustls::Error> {
        let connector = Connector::new(origin, settings, tls, budget)?;
        let text = match origin.port() {
            Some(port) => format!("{}:{port}", origin.host_str().unwrap_or_default()),
            None => origin.host_str().unwrap_or_default().to_owned(),
        };
        let bad = |_| rustls::Error::General(format!("{origin} is not an origin"));
        let authority = HeaderValue::from_str(&text).map_err(|error| bad(error.to_string()))?;
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(http::uri::Scheme::HTTPS);
        parts.authority = Some(text.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?);
        let unused = match settings.idle_timeout {
            IdleTimeout::Auto => UNUSED_LASTS,
            IdleTimeout::AtMost(most) => most.min(UNUSED_LASTS),
        };
        let expected = if settings.http2 == Http2::Never { 1 } else { MAX_STREAMS };
        Ok(Self {
            connector,
            authority,
            origin: parts,
            protocol_choice: ProtocolChoice::default(),
            idle_limit: IdleLimit::new(settings.idle_timeout),
            unused_limit: IdleLimit::new(IdleTimeout::AtMost(unused)),
            used: Activity::never(),
            used_unrepeatably: Activity::never(),
            connections: Mutex::new(Connections {
                idle: VecDeque::new(),
                shared: Vec::new(),
                waiters: VecDeque::new(),
                opening: 0,
                expected,
                background: Background::default(),
                peak: 0,
            }),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Returns a connection for one request: from the pool if `reuse` allows it and one is usable, else the first that
    /// becomes usable. `suits_http1` prefers an idle HTTP/1.1 connection to a shared one.
    pub(super) async fn connection(self: &Arc<Self>, reuse: Reuse, suits_http1: bool) -> Result<Connection, ErrorKind> {
        self.used.touch();
        if reuse == Reuse::Unrepeatable {
            self.used_unrepeatably.touch();
        }
        if reuse == Reuse::FreshHttp1 && self.connector.may_speak_http1() {
            return Box::pin(self.new_http1()).await.map(Connection::Http1);
        }
        loop {
            let taken = lock(&self.connections).take(self, reuse, suits_http1);
            match taken {
                None => break,
                Some(mut connection) => {
                    if is_usable(&mut connection).await {
                        return Ok(connection);
                    }
                    if let Connection::Http2(slot) = &connection {
                        let dead = slot.connection().clone();
                        self.lock().shared.retain(|other| !other.is(&dead));
                    }
                }
            }
        }
        let (deliver, delivery) = oneshot::channel();
        let _waiting = Waiting::new(self);
        {
            let mut connections = self.lock();
            connections.waiters.push_back(Waiter { reuse, deliver });
            // Only once half of the queue has hung up, so that the cost per request does not grow with the queue.
            if connections.waiters.len() > 2 * self.waiting.load(Relaxed) + FEW {
                connections.waiters.retain(|waiter| !waiter.deliver.is_closed());
            }
            self.serve(&mut connections);
        }
        // The task that opens connections delivers one, or an error; it does not end before.
        delivery.await.unwrap_or_else(|_| Err(ErrorKind::Unreachable(Arc::new(std::io::Error::other("shutting down")))))
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        lock(&self.connections)
    }

    /// Gives waiting requests the connections that are usable now, and opens as many as the others need. It looks at no
    /// more of those that wait than it has to, because it is called for each that comes and for each response.
    fn serve(self: &Arc<Self>, connections: &mut Connections) {
        let (mut still, mut is_unrepeatable_refused) = (Vec::new(), false);
        while let Some(waiter) = connections.waiters.pop_front() {
            if waiter.deliver.is_closed() {
                continue;
            }
            let is_refused = is_unrepeatable_refused && waiter.reuse == Reuse::Unrepeatable;
            let taken = if is_refused { None } else { connections.take(self, waiter.reuse, false) };
            let Some(connection) = taken else {
                is_unrepeatable_refused |= waiter.reuse == Reuse::Unrepeatable;
                // What is not for it is for nobody else either.
                let is_over = match waiter.reuse {
                    Reuse::Allowed => true,
                    Reuse::Unrepeatable => connections.idle.is_empty(),
                    Reuse::Fresh(_) | Reuse::FreshHttp1 => false,
                };
                still.push(waiter);
                if is_over {
                    break;
                }
                continue;
            };
            // A caller that hung up just now gives its connection back, which must not happen under the lock.
            if let Err(Ok(connection)) = waiter.deliver.send(Ok(connection)) {
                self.take_back(connections, connection);
            }
        }
        for waiter in still.into_iter().rev() {
            connections.waiters.push_front(waiter);
        }
        if let Some(allowed) = connections.shared.iter().find_map(Http2Connection::allowed_streams) {
            connections.expected = allowed;
        }
        // Some in the queue may have hung up, and some may not know yet that they have their connection.
        let waiting = self.waiting.load(Relaxed).min(connections.waiters.len());
        for _ in connections.opening..waiting.div_ceil(connections.expected) {
            self.open(connections, false);
        }
    }

    /// Keeps a connection that a caller did not take.
    fn take_back(&self, connections: &mut Connections, connection: Connection) {
        match connection {
            Connection::Http1(connection) => connections.idle.push_back(Idle::new(connection)),
            Connection::Http2(slot) => slot.release_unnoticed(),
        }
    }

    /// Whether a request takes an idle HTTP/1.1 connection before a shared one. Over HTTP/2 a server says what it did
    /// not process, so a request that may not be repeated is safe there.
    pub(super) fn prefers_http1(&self, reuse: Reuse, suits_http1: bool) -> bool {
        suits_http1 && (reuse != Reuse::Unrepeatable || !self.idle_limit.safe().is_zero())
    }

    /// Returns a connection to the pool, or closes it if it is too old or the pool is full.
    pub(super) fn release(self: &Arc<Self>, mut connection: Box<Http1Connection>) {
        let since = Instant::now();
        let age = since.duration_since(connection.opened);
        if connection.sender.is_closed() || age >= MAX_AGE {
            return;
        }
        self.idle_limit.released();
        let mut connections = self.lock();
        connections.peak = connections.peak.max(self.protocol_choice.in_flight());
        // Where each request that may not be repeated leaves a connection, only as many are kept as others can use.
        let most = if self.needs_unused(&connections) { connections.peak + 2 * MOST_UNUSED } else { MAX_IDLE };
        if connections.idle.len() < most {
            connection.reused = true;
            connections.idle.push_back(Idle { connection, since });
        }
        if self.waiting.load(Relaxed) > 0 {
            self.serve(&mut connections);
        }
        if age >= MAX_AGE - AGING {
            self.keep_warm(&mut connections, true);
        }
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

impl SlotOwner for OriginPool {
    fn slot_freed(self: Arc<Self>) {
        if self.waiting.load(Relaxed) > 0 {
            self.serve(&mut self.lock());
        }
    }
}

/// Whether the connection can carry a request now.
async fn is_usable(connection: &mut Connection) -> bool {
    match connection {
        // Usually the connection is ready at once, which needs no timer.
        Connection::Http1(connection) => {
            let sender = &mut connection.sender;
            sender.is_ready() || matches!(tokio::time::timeout(READY, sender.ready()).await, Ok(Ok(())))
        }
        Connection::Http2(slot) => slot.is_alive().await,
    }
}

impl Connections {
    /// Takes a connection that `reuse` allows.
    fn take(&mut self, pool: &Arc<OriginPool>, reuse: Reuse, suits_http1: bool) -> Option<Connection> {
        if pool.prefers_http1(reuse, suits_http1) {
            self.take_idle(pool, reuse).or_else(|| self.take_shared(pool, reuse))
        } else {
            self.take_shared(pool, reuse).or_else(|| self.take_idle(pool, reuse))
        }
    }

    fn take_shared(&self, pool: &Arc<OriginPool>, reuse: Reuse) -> Option<Connection> {
        let usable = |shared: &&Http2Connection| {
            let new = if let Reuse::Fresh(since) = reuse { shared.opened() >= since } else { true };
            new && shared.idle_for().is_none_or(|idle| idle < pool.limit(shared.was_used()).current())
        };
        self.shared.iter().filter(usable).find_map(|shared| shared.reserve(pool)).map(Connection::Http2)
    }

    fn take_idle(&mut self, pool: &Arc<OriginPool>, reuse: Reuse) -> Option<Connection> {
        let unused = pool.unused_limit.current();
        let most = match reuse {
            Reuse::Allowed => pool.idle_limit.current(),
            Reuse::Unrepeatable => pool.idle_limit.safe(),
            Reuse::Fresh(_) | Reuse::FreshHttp1 => Duration::ZERO,
        };
        let usable = |idle: &Idle| match reuse {
            Reuse::Fresh(since) => !idle.connection.reused && idle.connection.opened >= since,
            Reuse::FreshHttp1 => !idle.connection.reused,
            _ if idle.connection.reused => idle.since.elapsed() < most,
            Reuse::Allowed | Reuse::Unrepeatable => idle.since.elapsed() < unused || is_new(idle),
        };
        loop {
            // Those that have carried a request are good for fewer requests, so they come first.
            let used = self.idle.iter().rposition(|idle| idle.connection.reused && usable(idle));
            let found = used.or_else(|| self.idle.iter().rposition(usable))?;
            let idle = self.idle.remove(found)?;
            if !idle.is_closed() {
                if reuse == Reuse::Unrepeatable && !idle.connection.reused {
                    pool.restock(self);
                }
                return Some(Connection::Http1(idle.connection));
            }
            pool.limit(idle.connection.reused).closed_after(idle.since.elapsed());
        }
    }

    /// Tells the requests that wait for a connection that it could not be opened.
    fn fail(&mut self, error: ErrorKind, background: bool) {
        if background {
            tracing::debug!(%error, "no connection could be opened in the background");
            self.background.failed();
        }
        let mut left = if background { 0 } else { self.expected };
        while left > 0 {
            let Some(waiter) = self.waiters.pop_front() else { return };
            // One that hung up needed no connection.
            left -= usize::from(waiter.deliver.send(Err(error.clone())).is_ok());
        }
    }
}

/// Whether a connection was opened just now, for a request that waited for it.
fn is_new(idle: &Idle) -> bool {
    !idle.connection.reused && idle.since.elapsed() < READY
}

#[cfg(test)]
mod tests {
    use hyper::client::conn::http1;
    use hyper_util::rt::TokioIo;

    use super::*;
    use crate::domain::tls;
    use crate::upstream::IdleTimeout;
    use crate::upstream::http1_driver::Http1Driver;
    use crate::upstream::last_look::LastLook;

    /// With a look at every waiting request for each that comes, this takes minutes.
    #[tokio::test]
    async fn a_crowd_that_waits_for_a_connection_costs_each_request_the_same() {
        let pool = pool(Duration::from_secs(60));
        // As if connections for all were being opened.
        pool.lock().opening = usize::MAX;
        let mut crowd = Vec::new();
        let begun = Instant::now();
        for _ in 0..20_000 {
            let mut waiting = Box::pin(pool.connection(Reuse::Allowed, false));
            assert!(futures_util::poll!(&mut waiting).is_pending());
            crowd.push(waiting);
        }
        for _ in 0..20_000 {
            pool.clone().slot_freed();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_failure_to_connect_is_told_to_requests_that_still_wait() {
        let pool = pool(Duration::from_secs(60));
        // A connection would be for two requests.
        (pool.lock().opening, pool.lock().expected) = (usize::MAX, 2);
        let mut crowd: Vec<_> = (0..3).map(|_| Box::pin(pool.connection(Reuse::Allowed, false))).collect();
        for waiting in &mut crowd {
            assert!(futures_util::poll!(waiting).is_pending());
        }
        drop(crowd.remove(1));
        pool.lock().fail(ErrorKind::Unreachable(Arc::new(std::io::Error::other("refused"))), false);
        for waiting in &mut crowd {
            assert!(matches!(futures_util::poll!(waiting), std::task::Poll::Ready(Err(_))));
        }
    }

    #[tokio::test]
    async fn a_request_gets_a_connection_that_one_before_it_may_not_use() {
        let pool = pool(Duration::from_secs(60));
        pool.lock().opening = usize::MAX;
        let mut new_only = Box::pin(pool.connection(Reuse::Fresh(Instant::now()), false));
        let mut unrepeatable = Box::pin(pool.connection(Reuse::Unrepeatable, false));
        let mut any = Box::pin(pool.connection(Reuse::Allowed, false));
        assert!(futures_util::poll!(&mut new_only).is_pending());
        assert!(futures_util::poll!(&mut unrepeatable).is_pending());
        assert!(futures_util::poll!(&mut any).is_pending());
        let (mut connection, _server) = connection(Duration::ZERO).await;
        connection.reused = true;
        // Idle for longer than is safe for what may not be repeated.
        pool.lock()
            .idle
            .push_back(Idle { connection, since: Instant::now().checked_sub(pool.idle_limit.safe()).unwrap() });
        pool.serve(&mut pool.lock());
        assert!(matches!(futures_util::poll!(&mut any), std::task::Poll::Ready(Ok(_))));
        assert!(futures_util::poll!(&mut unrepeatable).is_pending());
        assert!(futures_util::poll!(&mut new_only).is_pending());
    }

    #[tokio::test]
    async fn a_request_that_hung_up_is_waited_for_by_no_connection() {
        let pool = pool(Duration::from_secs(60));
        pool.lock().opening = usize::MAX;
        let mut first = Box::pin(pool.connection(Reuse::Allowed, false));
        assert!(futures_util::poll!(&mut first).is_pending());
        for _ in 0..1000 {
            let mut hung_up = Box::pin(pool.connection(Reuse::Allowed, false));
            assert!(futures_util::poll!(&mut hung_up).is_pending());
        }
        assert_eq!(pool.waiting.load(Relaxed), 1);
        assert!(pool.lock().waiters.len() < 100, "{}", pool.lock().waiters.len());
        // The next connection is for the one that waits.
        pool.lock().opening = 1;
        let (connection, _server) = connection(Duration::ZERO).await;
        pool.release(connection);
        assert!(matches!(first.await, Ok(Connection::Http1(_))));
        assert_eq!(pool.lock().opening, 1, "a connection was opened for a request that hung up");
    }

    fn pool(idle_timeout: Duration) -> Arc<OriginPool> {
        let origin: Url = "https://localhost".parse().unwrap();
        let long = Duration::from_secs(60);
        let settings = Settings {
            origins: Box::new(std::array::from_fn(|_| origin.clone())),
            extra_roots: Vec::new(),
            proxy: None,
            http2: Http2::Never,
            connect_timeout: long,
            response_timeout: long,
            idle_timeout: IdleTimeout::AtMost(idle_timeout),
        };
        let tls = tls::client_config(&[], &[]).unwrap();
        Arc::new(OriginPool::new(&origin, &settings, &tls, &Arc::default()).unwrap())
    }

    /// A connection of this age, and the end that its server holds.
    async fn connection(age: Duration) -> (Box<Http1Connection>, tokio::io::DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(1024);
        let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        let driver = Http1Driver::new(Box::new(connection));
        tokio::spawn(driver.run());
        let opened = Instant::now().checked_sub(age).unwrap();
        (Box::new(Http1Connection { sender, driver, look: LastLook::default(), reused: false, opened }), theirs)
    }

    #[tokio::test]
    async fn a_connection_that_has_idled_for_idle_timeout_is_never_taken_from_the_pool() {
        for (idle_timeout, taken) in [(Duration::from_secs(60), true), (Duration::ZERO, false)] {
            let pool = pool(idle_timeout);
            let (connection, _theirs) = connection(Duration::ZERO).await;
            pool.release(connection);
            let reuse = lock(&pool.connections).take(&pool, Reuse::Allowed, true);
            assert_eq!(reuse.is_some(), taken, "{idle_timeout:?}");
            pool.prune();
            assert!(lock(&pool.connections).idle.is_empty(), "it is used, or closed");
        }
    }

    #[tokio::test]
    async fn a_connection_is_replaced_before_it_is_too_old_although_its_origin_is_never_without_a_request() {
        for (left, replaced) in [(2 * AGING, 0), (AGING / 2, 1)] {
            let pool = pool(Duration::from_secs(60));
            pool.used.touch();
            let _other_request = pool.protocol_choice.enter();
            let (connection, _theirs) = connection(MAX_AGE - left).await;
            pool.release(connection);
            let connections = lock(&pool.connections);
            assert_eq!((connections.idle.len(), connections.opening), (1, replaced), "{left:?}");
        }
    }
}
