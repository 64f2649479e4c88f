//! The connection pool of one regional origin.
//!
//! A request takes an open connection, or waits for the first that becomes usable: a new one, one that another request
//! releases, or a free stream. Tasks open connections, not requests, so a caller that hangs up wastes none; a burst
//! opens as many connections as it needs at the same time. While an origin is in use, a connection that is given up is
//! replaced in the background.
//!
//! The file is long because all of this changes one state, under one lock.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use http::{HeaderValue, Request, Uri};
use tokio::sync::oneshot;
use url::Url;

use super::activity::Activity;
use super::connect::{Connector, Offer, Opened};
use super::connection::{Connection, Http1Connection};
use super::http2::{Http2 as Http2Connection, KEPT_WARM_FOR, SlotOwner, WeakHttp2};
use super::idle_limit::IdleLimit;
use super::protocol_choice::ProtocolChoice;
use super::windows::{MAX_STREAMS, WindowBudget, first_window};
use super::{ErrorKind, Http2, RequestBody, Reuse, Settings, lock};

/// The connections to one origin.
#[derive(Debug)]
pub(super) struct OriginPool {
    connector: Connector,
    /// The value of the `Host` header: the origin's authority.
    pub(super) authority: HeaderValue,
    /// The scheme and authority that HTTP/2 sends as `:scheme` and `:authority`.
    origin: http::uri::Parts,
    pub(super) protocol_choice: ProtocolChoice,
    pub(super) idle_limit: IdleLimit,
    /// When a request last used the origin.
    used: Arc<Activity>,
    /// When a request that may not be repeated last did.
    used_unrepeatably: Arc<Activity>,
    connections: Mutex<Connections>,
    /// The number of waiting requests, to know without a lock that there are none.
    waiting: AtomicUsize,
}

#[derive(Debug)]
struct Connections {
    /// Idle HTTP/1.1 connections, oldest first.
    idle: VecDeque<Idle>,
    /// HTTP/2 connections that take requests, oldest first.
    shared: Vec<Http2Connection>,
    waiters: VecDeque<Waiter>,
    /// Connections that are being opened.
    opening: usize,
    /// How many requests a new connection is expected to carry: one over HTTP/1.1.
    expected: usize,
    /// When a connection may be opened in the background again.
    background_at: Option<Instant>,
    /// The most requests that were lately in flight together.
    peak: usize,
}

/// An idle HTTP/1.1 connection, and when it became idle.
#[derive(Debug)]
struct Idle {
    connection: Http1Connection,
    since: Instant,
}

impl Idle {
    fn new(connection: Http1Connection) -> Self {
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

/// Most idle connections; a connection released beyond that is closed, so that a burst does not hold file descriptors.
const MAX_IDLE: usize = 1024;
/// Most connections that are opened in advance for requests that may not be repeated.
const MOST_UNUSED: usize = 8;
/// How long a connection that has not carried a request yet may be used for one that may not be repeated. Servers wait
/// for the first request for 60 seconds, most of them.
const UNUSED_LASTS: Duration = Duration::from_secs(45);
/// Longest wait for a pooled connection to become ready. If the server responded before it had read the whole request,
/// the connection becomes ready only after the server has read the rest, which may never happen. A usable connection is
/// ready within microseconds.
const READY: Duration = Duration::from_millis(100);
/// By which part [`Connections::peak`] becomes smaller with each look at all connections.
const PEAK_FADES: usize = 16;
/// The age from which a connection is replaced, so that changes in DNS are followed.
const MAX_AGE: Duration = Duration::from_secs(600);
/// A connection that had no request for this long did not end because of one.
const IDLED: Duration = Duration::from_millis(100);
/// Shortest time between connections that are opened in the background.
const PACE: Duration = Duration::from_secs(1);
/// The same after one could not be opened, or the server closed it unused.
const RETRY: Duration = Duration::from_secs(10);

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
        let expected = if settings.http2 == Http2::Never { 1 } else { MAX_STREAMS };
        Ok(Self {
            connector,
            authority,
            origin: parts,
            protocol_choice: ProtocolChoice::default(),
            idle_limit: IdleLimit::new(settings.idle_timeout),
            used: Activity::never(),
            used_unrepeatably: Activity::never(),
            connections: Mutex::new(Connections {
                idle: VecDeque::new(),
                shared: Vec::new(),
                waiters: VecDeque::new(),
                opening: 0,
                expected,
                background_at: None,
                peak: 0,
            }),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Returns a connection for one request: from the pool if `reuse` allows it and one is usable, else the first that
    /// becomes usable. `low_concurrency` prefers an idle HTTP/1.1 connection to a shared one.
    pub(super) async fn connection(
        self: &Arc<Self>,
        reuse: Reuse,
        low_concurrency: bool,
    ) -> Result<Connection, ErrorKind> {
        self.used.touch();
        if reuse == Reuse::Unrepeatable {
            self.used_unrepeatably.touch();
        }
        if reuse == Reuse::FreshHttp1 && self.connector.may_speak_http1() {
            return Box::pin(self.new_http1()).await.map(Connection::Http1);
        }
        loop {
            let taken = lock(&self.connections).take(self, reuse, low_concurrency);
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
        {
            let mut connections = self.lock();
            connections.waiters.push_back(Waiter { reuse, deliver });
            self.serve(&mut connections);
        }
        // The task that opens connections delivers one, or an error; it does not end before.
        delivery.await.unwrap_or_else(|_| Err(ErrorKind::Unreachable(Arc::new(std::io::Error::other("shutting down")))))
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        lock(&self.connections)
    }

    async fn new_http1(self: &Arc<Self>) -> Result<Http1Connection, ErrorKind> {
        match self.connector.connect(Offer::Http1).await? {
            Opened::Http1 { sender, look, driver } => {
                self.run_http1(driver);
                Ok(Http1Connection { sender, look, reused: false, opened: Instant::now() })
            }
            Opened::Http2 { .. } => unreachable!("only HTTP/1.1 was offered"),
        }
    }

    /// Gives waiting requests the connections that are usable now, and opens as many as the others need.
    fn serve(self: &Arc<Self>, connections: &mut Connections) {
        let mut still = VecDeque::new();
        while let Some(waiter) = connections.waiters.pop_front() {
            if waiter.deliver.is_closed() {
                continue;
            }
            match connections.take(self, waiter.reuse, false) {
                None => still.push_back(waiter),
                // A caller that hung up just now gives its connection back, which must not happen under the lock.
                Some(connection) => {
                    if let Err(Ok(connection)) = waiter.deliver.send(Ok(connection)) {
                        self.take_back(connections, connection);
                    }
                }
            }
        }
        connections.waiters = still;
        self.waiting.store(connections.waiters.len(), Relaxed);
        if let Some(oldest) = connections.shared.first() {
            // It has most probably been told how many streams the server allows.
            connections.expected = oldest.max_streams();
        }
        let needed = connections.waiters.len().div_ceil(connections.expected);
        for _ in connections.opening..needed {
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

    /// Starts a task that opens a connection: for the requests that wait, or in the background for the next request.
    fn open(self: &Arc<Self>, connections: &mut Connections, background: bool) {
        connections.opening += 1;
        let offer = Offer::Configured {
            first_window: first_window(self.protocol_choice.in_flight()),
            max_streams: connections.expected.max(2),
            used: self.used.clone(),
        };
        let pool = self.clone();
        tokio::spawn(async move {
            // Boxed, because connecting is rare and its future is large.
            let opened = Box::pin(pool.connector.connect(offer)).await;
            let mut connections = pool.lock();
            connections.opening -= 1;
            match opened {
                Ok(opened) => pool.add(&mut connections, opened),
                Err(error) => connections.fail(error, background),
            }
            pool.serve(&mut connections);
        });
    }

    /// Adds a new connection.
    fn add(self: &Arc<Self>, connections: &mut Connections, opened: Opened) {
        match opened {
            Opened::Http1 { sender, look, driver } => {
                connections.expected = 1;
                self.run_http1(driver);
                let connection = Http1Connection { sender, look, reused: false, opened: Instant::now() };
                connections.idle.push_back(Idle::new(connection));
            }
            Opened::Http2 { connection, driver } => {
                connections.shared.push(connection.clone());
                let pool = Arc::downgrade(self);
                tokio::spawn(async move {
                    // The handle must not keep an unused connection open.
                    let connection = connection.downgrade();
                    driver.await;
                    if let Some(pool) = pool.upgrade() {
                        pool.http2_ended(&connection);
                    }
                });
            }
        }
    }

    fn run_http1<D>(self: &Arc<Self>, driver: D)
    where
        D: Future<Output = Result<(), hyper::Error>> + Send + 'static,
    {
        let pool = Arc::downgrade(self);
        tokio::spawn(async move {
            // A request on the connection gets its error.
            if let Err(error) = driver.await {
                tracing::debug!(%error, "connection to Amazon ended");
            }
            if let Some(pool) = pool.upgrade() {
                pool.http1_ended();
            }
        });
    }

    /// An HTTP/1.1 connection has ended. If it was idle, the server closed it.
    fn http1_ended(self: &Arc<Self>) {
        let mut connections = self.lock();
        let (mut idled, mut unused) = (false, false);
        connections.idle.retain(|idle| {
            let closed = idle.is_closed();
            if closed && idle.connection.reused {
                self.idle_limit.closed_after(idle.since.elapsed());
                idled |= idle.since.elapsed() >= IDLED;
            }
            unused |= closed && !idle.connection.reused;
            !closed
        });
        self.ended(&mut connections, idled, unused);
    }

    /// An HTTP/2 connection has ended. If it was idle and still in the pool, the server closed it.
    fn http2_ended(self: &Arc<Self>, connection: &WeakHttp2) {
        let mut connections = self.lock();
        let before = connections.shared.len();
        connections.shared.retain(|other| !connection.is(other));
        let idle = connection.idle_for().filter(|idle| connections.shared.len() < before && *idle >= IDLED);
        if let (Some(idle), true) = (idle, connection.was_used()) {
            self.idle_limit.closed_after(idle);
        }
        self.ended(&mut connections, idle.is_some(), !connection.was_used());
    }

    /// Replaces a connection that the server closed while it idled. One that broke is replaced with the next look at
    /// all connections, because a request that is sent again opens one too.
    fn ended(self: &Arc<Self>, connections: &mut Connections, idled: bool, unused: bool) {
        if unused {
            connections.background_at = Some(Instant::now() + RETRY);
        }
        if idled {
            self.keep_warm(connections);
        }
    }

    /// Counts the origin as in use, and opens a connection if it has none.
    pub(super) fn warm(self: &Arc<Self>) {
        self.used.touch();
        self.keep_warm(&mut self.lock());
    }

    /// Opens a connection for the next request, if the origin was used lately and has none that will last. A request in
    /// flight will leave its own.
    fn keep_warm(self: &Arc<Self>, connections: &mut Connections) {
        let (limit, now) = (self.idle_limit.current() * 9 / 10, Instant::now());
        let unused = self.needs_unused(connections);
        let most = if unused { limit.min(UNUSED_LASTS * 9 / 10) } else { limit };
        let lasts =
            |idle: &Idle| !idle.is_closed() && idle.since.elapsed() < most && !(unused && idle.connection.reused);
        let ready = connections.idle.iter().any(lasts)
            || connections.shared.iter().any(|shared| !shared.is_closing() && !is_old(shared, limit));
        let may = connections.background_at.is_none_or(|at| at <= now);
        let quiet = connections.opening == 0 && self.protocol_choice.in_flight() == 0;
        if !ready && may && quiet && self.used.elapsed() < KEPT_WARM_FOR {
            connections.background_at = Some(now + PACE);
            self.open(connections, true);
        }
    }

    /// Whether requests that may not be repeated need HTTP/1.1 connections that have not carried a request yet.
    fn needs_unused(&self, connections: &Connections) -> bool {
        connections.expected == 1
            && self.used_unrepeatably.elapsed() < KEPT_WARM_FOR
            && self.idle_limit.safe() == Duration::ZERO
    }

    /// Opens a connection in place of an unused one that was just taken, so that the next request of its kind waits for
    /// no handshake.
    fn restock(self: &Arc<Self>, connections: &mut Connections) {
        let unused = connections.idle.iter().filter(|idle| !idle.connection.reused && !idle.is_closed()).count();
        let wanted = self.protocol_choice.in_flight().clamp(1, MOST_UNUSED);
        let may = connections.background_at.is_none_or(|at| at <= Instant::now());
        if may && unused + connections.opening < wanted && self.needs_unused(connections) {
            self.open(connections, true);
        }
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
                let Ok(connection) = pool.new_http1().await else { break };
                pool.release(connection);
            }
            pool.protocol_choice.adding.store(false, Relaxed);
        });
    }

    /// Returns a connection to the pool, or closes it if it is too old or the pool is full.
    pub(super) fn release(self: &Arc<Self>, connection: Http1Connection) {
        if connection.sender.is_closed() || connection.opened.elapsed() >= MAX_AGE {
            return;
        }
        self.idle_limit.released();
        let mut connections = self.lock();
        connections.peak = connections.peak.max(self.protocol_choice.in_flight());
        // Where each request that may not be repeated leaves a connection, only as many are kept as others can use.
        let most = if self.needs_unused(&connections) { connections.peak + 2 * MOST_UNUSED } else { MAX_IDLE };
        if connections.idle.len() < most {
            connections.idle.push_back(Idle::new(Http1Connection { reused: true, ..connection }));
        }
        if !connections.waiters.is_empty() {
            self.serve(&mut connections);
        }
    }

    /// Gives up connections that have idled for too long or are too old. While the origin is in use, the last one is
    /// replaced shortly before.
    pub(super) fn prune(self: &Arc<Self>) {
        let limit = self.idle_limit.current();
        let mut connections = self.lock();
        self.keep_warm(&mut connections);
        connections.peak -= connections.peak.div_ceil(PEAK_FADES);
        let mut survived = false;
        connections.idle.retain(|idle| {
            let over = idle.since.elapsed() >= limit;
            survived |= over && !idle.is_closed();
            !over && idle.connection.opened.elapsed() < MAX_AGE && !idle.is_closed()
        });
        connections.shared.retain(|shared| {
            survived |= !shared.is_closing() && shared.idle_for().is_some_and(|idle| idle >= limit);
            !shared.is_closing() && !is_old(shared, limit)
        });
        if survived {
            self.idle_limit.survived();
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

/// Whether a shared connection should be given up: it has idled for too long, or is so old that DNS may have changed.
fn is_old(connection: &Http2Connection, limit: Duration) -> bool {
    connection.opened().elapsed() >= MAX_AGE || connection.idle_for().is_some_and(|idle| idle >= limit)
}

/// Whether the connection can carry a request now.
async fn is_usable(connection: &mut Connection) -> bool {
    match connection {
        // Usually the connection is ready at once, which needs no timer.
        Connection::Http1(Http1Connection { sender, .. }) => {
            sender.is_ready() || matches!(tokio::time::timeout(READY, sender.ready()).await, Ok(Ok(())))
        }
        Connection::Http2(slot) => slot.is_alive().await,
    }
}

impl Connections {
    /// Takes a connection that `reuse` allows.
    fn take(&mut self, pool: &Arc<OriginPool>, reuse: Reuse, low_concurrency: bool) -> Option<Connection> {
        // Over HTTP/2 a server says what it did not process, so a request that may not be repeated is safe there.
        if low_concurrency && (reuse != Reuse::Unrepeatable || !pool.idle_limit.safe().is_zero()) {
            self.take_idle(pool, reuse).or_else(|| self.take_shared(pool, reuse))
        } else {
            self.take_shared(pool, reuse).or_else(|| self.take_idle(pool, reuse))
        }
    }

    fn take_shared(&self, pool: &Arc<OriginPool>, reuse: Reuse) -> Option<Connection> {
        let limit = pool.idle_limit.current();
        let usable = |shared: &&Http2Connection| {
            let new = if let Reuse::Fresh(since) = reuse { shared.opened() >= since } else { true };
            new && shared.idle_for().is_none_or(|idle| idle < limit)
        };
        self.shared.iter().filter(usable).find_map(|shared| shared.reserve(pool)).map(Connection::Http2)
    }

    fn take_idle(&mut self, pool: &Arc<OriginPool>, reuse: Reuse) -> Option<Connection> {
        let most = match reuse {
            Reuse::Allowed => pool.idle_limit.current(),
            Reuse::Unrepeatable => pool.idle_limit.safe(),
            Reuse::Fresh(_) | Reuse::FreshHttp1 => Duration::MAX,
        };
        let usable = |idle: &Idle| match reuse {
            Reuse::Fresh(since) => !idle.connection.reused && idle.connection.opened >= since,
            Reuse::FreshHttp1 => !idle.connection.reused,
            Reuse::Unrepeatable if !idle.connection.reused => idle.since.elapsed() < UNUSED_LASTS,
            Reuse::Allowed | Reuse::Unrepeatable => idle.since.elapsed() < most || is_new(idle),
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
            if idle.connection.reused {
                pool.idle_limit.closed_after(idle.since.elapsed());
            }
        }
    }

    /// Tells the requests that wait for a connection that it could not be opened.
    fn fail(&mut self, error: ErrorKind, background: bool) {
        if background {
            tracing::debug!(%error, "no connection could be opened in the background");
            self.background_at = Some(Instant::now() + RETRY);
        }
        let count = self.expected.min(self.waiters.len());
        for waiter in self.waiters.drain(..if background { 0 } else { count }) {
            let _ = waiter.deliver.send(Err(error.clone()));
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
    use crate::upstream::last_look::LastLook;

    #[tokio::test]
    async fn a_connection_that_has_idled_for_idle_timeout_is_never_taken_from_the_pool() {
        let origin: Url = "https://localhost".parse().unwrap();
        let long = Duration::from_secs(60);
        for (idle_timeout, taken) in [(long, true), (Duration::ZERO, false)] {
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
            let pool = Arc::new(OriginPool::new(&origin, &settings, &tls, &Arc::default()).unwrap());
            let (ours, _theirs) = tokio::io::duplex(1024);
            let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
            tokio::spawn(connection);
            let look = LastLook::default();
            pool.release(Http1Connection { sender, look, reused: false, opened: Instant::now() });
            let reuse = lock(&pool.connections).take(&pool, Reuse::Allowed, true);
            assert_eq!(reuse.is_some(), taken, "{idle_timeout:?}");
            pool.prune();
            assert!(lock(&pool.connections).idle.is_empty(), "it is used, or closed");
        }
    }
}
