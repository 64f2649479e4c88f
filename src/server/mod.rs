//! Accept loop, connection limits and graceful drain, used by every listener.
//!
//! hyper's own header timeout starts when a connection becomes idle, and costs a timer per request. Instead, each
//! connection records its activity in the listener's registry, and one task per listener, the reaper, enforces the
//! limits:
//!
//! - A request head that is not complete in time gets a 408.
//! - A connection that is idle for too long is closed. It is idle when both directions are over: the response was
//!   written, and the request's body has ended.
//! - A connection whose caller does not read its response is reset.
//! - A request's body that is still arriving when the response was written may continue for a while only.
//!
//! Nothing of the server's own is written while anything of a response is unwritten or a request's body is under way.
//!
//! When a listener is at its connection limit, or descriptors run short, the connection that has been idle longest is
//! closed for a new one.

mod registry;
mod caller_body;
mod connection;
mod descriptors;
mod heap;
mod inherited;
mod io;
mod parking;
mod set_aside;
mod socket;
#[cfg(test)]
mod test_responses;
mod tunnel;

use std::io::{ErrorKind, Result};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub use caller_body::CallerBody;
pub use inherited::Inherited;

use connection::close;
use registry::Registry;
use socket::{BoundSocket, Stream};

/// An address that a listener binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `host:port`, where the host is an IP address or `localhost`.
    Tcp(String),
    /// `unix:/path`: a Unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The limits of one listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `proxy.max_connections`: most open connections. At the limit the connection that has been idle longest is
    /// closed.
    pub max_connections: usize,
    /// `proxy.header_timeout`: longest time from the first byte of a request head to its end.
    pub header_timeout: Duration,
    /// `proxy.idle_timeout`: longest time that a keep-alive connection stays open without a request.
    pub idle_timeout: Duration,
    /// `proxy.write_timeout`: longest time that a caller may read nothing of its response.
    pub write_timeout: Duration,
}

/// Pause of the accept loop after an error, such as too many open file descriptors. Requests in progress continue and
/// free some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait of a new connection while the listener is at its limit and every connection is busy.
const ADMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP peer's address.
    Tcp(SocketAddr),
    /// A local process on a Unix socket, with its user id if the operating system reports it.
    Unix(Option<u32>),
}

/// HTTP/1.1 responses, as bytes, for connections that are rejected before a request was read.
pub trait OwnResponses: std::fmt::Debug + Send + Sync {
    /// The request head was not complete in time.
    fn head_timeout(&self) -> Bytes;
    /// The listener is at its connection limit.
    fn overloaded(&self) -> Bytes;
    /// The target contains a character that no URL can.
    fn bad_target(&self) -> Bytes;
    /// The request head is too large.
    fn head_too_large(&self) -> Bytes;
    /// The target is too long for the parser.
    fn target_too_long(&self) -> Bytes;
    /// A new id for the response to a request that could not be parsed.
    fn request_id(&self) -> HeaderValue;
}

/// A listener (proxy, login or admin) whose sockets are bound. It serves once [`run`](Self::run) is called.
#[derive(Debug)]
pub struct Listener {
    sockets: Vec<BoundSocket>,
    limits: Arc<ArcSwap<Limits>>,
    own: Arc<dyn OwnResponses>,
    registry: Arc<Registry>,
}

/// The phases of a listener's life, in order. Shutdown first drains the listener and then closes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The listener serves normally.
    #[default]
    Open,
    /// New connections are still accepted, but each response carries `Connection: close`.
    Draining,
    /// No new connections are accepted. Requests in flight complete, and idle connections are closed.
    Closed,
}

impl Listener {
    /// Binds every address of `listen`, but for those whose socket is in `inherited`. With `ipv6_if_any`, an IPv6
    /// address that cannot be bound is skipped, unless it is in use. Port 0 selects a free port; see
    /// [`addresses`](Self::addresses). A Unix socket that is bound here gets the file mode `socket_mode`.
    ///
    /// # Errors
    /// Fails if an address cannot be bound. The message names the address.
    pub async fn bind(
        listen: &[Listen],
        ipv6_if_any: bool,
        socket_mode: u32,
        limits: Limits,
        own: Arc<dyn OwnResponses>,
        inherited: &mut Inherited,
    ) -> Result<Self> {
        let mut sockets = Vec::new();
        for address in listen {
            match address {
                Listen::Unix(path) => sockets.push(BoundSocket::unix(path, socket_mode, inherited)?),
                Listen::Tcp(address) => match BoundSocket::tcp(address, inherited).await {
                    Ok(socket) => sockets.push(socket),
                    Err(error) if ipv6_if_any && address.starts_with('[') && error.kind() != ErrorKind::AddrInUse => {}
                    Err(error) => return Err(error),
                },
            }
        }
        let limits = Arc::new(ArcSwap::from_pointee(limits));
        Ok(Self { sockets, limits, own, registry: Arc::default() })
    }

    /// Returns the bound TCP addresses, in the order of `listen`.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(BoundSocket::address).collect()
    }

    /// Returns the limits, which may be replaced while the listener serves.
    pub fn limits(&self) -> Arc<ArcSwap<Limits>> {
        self.limits.clone()
    }

    /// Returns a function that counts the open connections, for a metric.
    pub fn count(&self) -> impl Fn() -> usize + Send + Sync + use<> {
        let registry = self.registry.clone();
        move || registry.len()
    }

    /// Returns a future that gives the memory that a burst took back to the system, within about a second after nothing
    /// is in progress on this listener any more. It never ends.
    pub fn give_memory_back(&self) -> impl Future<Output = ()> + Send + use<> {
        self.registry.clone().give_memory_back()
    }

    /// Serves until `phase` is [`Phase::Closed`] and every connection is closed. A dropped sender counts as
    /// [`Phase::Closed`].
    pub async fn run<H, F, B>(self, handler: H, mut phase: watch::Receiver<Phase>)
    where
        H: Fn(Request<CallerBody>, Peer) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + Unpin,
    {
        let Self { sockets, limits, own, registry } = self;
        let share = descriptors::share();
        let context = Arc::new(ListenerContext {
            handler,
            registry: registry.clone(),
            own,
            limits: limits.clone(),
            share,
            keep_alive: KeepAlive::default(),
        });
        let reaper = tokio::spawn(registry.clone().enforce(limits.clone()));
        let _abort = AbortOnDrop(registry.clone(), reaper.abort_handle());
        let mut tasks = tokio::task::JoinSet::new();
        for socket in sockets {
            tasks.spawn(accept(socket, context.clone(), phase.clone()));
        }
        // `wait_for` also returns when the sender is dropped, which counts as `Closed`.
        let _ = phase.wait_for(|phase| *phase >= Phase::Draining).await;
        registry.drain();
        let _ = phase.wait_for(|phase| *phase == Phase::Closed).await;
        while tasks.join_next().await.is_some() {}
        registry.close_all().await;
    }
}

/// Breaks off what is still in flight when the listener is dropped, and ends the reaper.
struct AbortOnDrop(Arc<Registry>, AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort_all();
        self.1.abort();
    }
}

/// Accepts connections until `phase` is [`Phase::Closed`], and spawns a task for each. Whoever was connected by then is
/// served too: closing the socket would reset a connection that waits, and with it a request that was sent already.
async fn accept<H, F, B>(socket: BoundSocket, context: Arc<ListenerContext<H>>, mut phase: watch::Receiver<Phase>)
where
    H: Fn(Request<CallerBody>, Peer) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + Unpin,
{
    // When the first of the connections that found no room arrived.
    let mut full_since = None;
    loop {
        // 1. Accept a connection.
        let accepted = tokio::select! {
            biased;
            _ = phase.wait_for(|phase| *phase == Phase::Closed) => match socket.accept_waiting() {
                Some(waiting) => Ok(waiting),
                None => return,
            },
            accepted = socket.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // The caller that has been idle longest makes room, if that helps.
                let closing = descriptors::are_used_up(&error) && context.registry.make_room(0);
                tracing::warn!(%error, closing, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // 2. Make room for it. This happens only after a connection was accepted, so that no idle connection is closed
        // without need. A shutdown does not interrupt it, for the connection would be lost.
        let until = *full_since.get_or_insert_with(Instant::now) + ADMIT_TIMEOUT;
        if !context.registry.wait_for_room(&context.limits, context.share, until).await {
            tracing::warn!("overloaded: every connection that proxy.max_connections allows is busy");
            let response = context.own.overloaded();
            match stream {
                Stream::Tcp(stream, _) => drop(tokio::spawn(close(stream, Some(response), true))),
                Stream::Unix(stream) => drop(tokio::spawn(close(stream, Some(response), true))),
            }
            continue;
        }
        full_since = None;
        // 3. Register it before its task starts, so that neither the limit nor the shutdown misses it.
        let slot = context.registry.register();
        match stream {
            Stream::Tcp(stream, peer) => {
                let _ = stream.set_nodelay(true);
                tokio::spawn(connection::run(stream, Peer::Tcp(peer), slot, context.clone()));
            }
            Stream::Unix(stream) => {
                let uid = stream.peer_cred().ok().map(|peer| peer.uid());
                tokio::spawn(connection::run(stream, Peer::Unix(uid), slot, context.clone()));
            }
        }
    }
}

/// What all connections of a listener share.
struct ListenerContext<H> {
    handler: H,
    registry: Arc<Registry>,
    own: Arc<dyn OwnResponses>,
    limits: Arc<ArcSwap<Limits>>,
    /// Most open connections for want of file descriptors.
    share: usize,
    keep_alive: KeepAlive,
}

/// The value of `Keep-Alive`, which tells how long a connection stays open without a request, beside the limit for
/// which it was made: nearly every response carries it.
#[derive(Debug, Default)]
struct KeepAlive(ArcSwapOption<(Duration, HeaderValue)>);

impl KeepAlive {
    fn of(&self, limits: &ArcSwap<Limits>) -> HeaderValue {
        let limit = limits.load().idle_timeout;
        if let Some(made) = self.0.load().as_deref().filter(|made| made.0 == limit) {
            return made.1.clone();
        }
        let text = Bytes::from(format!("timeout={}", limit.as_secs()));
        let value = HeaderValue::from_maybe_shared(text).unwrap_or(HeaderValue::from_static("timeout=0"));
        self.0.store(Some(Arc::new((limit, value.clone()))));
        value
    }
}
