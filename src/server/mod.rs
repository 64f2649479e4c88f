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
mod inherited;
mod io;
mod parking;
mod tunnel;

use std::fs::Permissions;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use tokio::net::{TcpListener, UnixListener, UnixSocket};
use tokio::sync::watch;

pub use caller_body::CallerBody;
pub use inherited::Inherited;

use connection::close;
use registry::Registry;

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

/// How much response data the kernel takes of a connection that cannot be sent yet, in bytes. Once a caller reads
/// slowly, data that it has not read is also data that the kernel does not take, so that a caller that reads anything
/// is told from one that reads nothing: by default the kernel takes 4 MiB, and takes no more until a third of them was
/// read. What is on the way to the caller is not limited, so a fast caller notices nothing.
#[cfg(target_os = "linux")]
const MAX_UNSENT: u32 = 128 << 10;

/// Backlog of a Unix socket: connections that wait to be accepted. tokio uses the same number for TCP.
const BACKLOG: u32 = 1024;
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

/// A socket that accepts connections. The file of a Unix socket that was bound here is removed on drop.
#[derive(Debug)]
enum BoundSocket {
    Tcp(TcpListener),
    Unix(UnixListener, Option<PathBuf>),
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
                Listen::Unix(path) => sockets.push(match inherited.unix(path) {
                    Some(socket) => BoundSocket::Unix(UnixListener::from_std(socket)?, None),
                    None => unix(path, socket_mode)?,
                }),
                Listen::Tcp(address) => match tcp(address, inherited).await {
                    Ok(socket) => sockets.push(BoundSocket::Tcp(socket)),
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
        let tcp = self.sockets.iter().filter_map(|socket| match socket {
            BoundSocket::Tcp(socket) => socket.local_addr().ok(),
            BoundSocket::Unix(..) => None,
        });
        tcp.collect()
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
        let _abort = AbortOnDrop(registry.clone());
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
        reaper.abort();
    }
}

/// Breaks off what is still in flight when the listener is dropped.
struct AbortOnDrop(Arc<Registry>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort_all();
    }
}

/// Binds a TCP address, if its socket was not passed on.
async fn tcp(address: &str, inherited: &mut Inherited) -> Result<TcpListener> {
    let resolved: Vec<_> = tokio::net::lookup_host(address).await.map(Iterator::collect).unwrap_or_default();
    let bound = match inherited.tcp(&resolved) {
        Some(socket) => TcpListener::from_std(socket),
        None => TcpListener::bind(address).await,
    };
    let bound = bound.and_then(|socket| {
        // Accepted connections inherit it.
        #[cfg(target_os = "linux")]
        socket2::SockRef::from(&socket).set_tcp_notsent_lowat(MAX_UNSENT)?;
        Ok(socket)
    });
    bound.map_err(|error| Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

/// Binds a Unix socket with the file mode `mode`. A socket file that a dead process left behind is replaced; one that
/// accepts connections belongs to a running process and is an error.
fn unix(path: &PathBuf, mode: u32) -> Result<BoundSocket> {
    let context = |error: Error| Error::new(error.kind(), format!("cannot listen on unix:{}: {error}", path.display()));
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(context(ErrorKind::AddrInUse.into()));
    }
    if std::fs::symlink_metadata(path).is_ok_and(|meta| std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type())) {
        std::fs::remove_file(path).map_err(context)?;
    }
    // Set the mode before `listen`: until then no process can connect.
    let socket = UnixSocket::new_stream().map_err(context)?;
    socket.bind(path).map_err(context)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(context)?;
    Ok(BoundSocket::Unix(socket.listen(BACKLOG).map_err(context)?, Some(path.clone())))
}

/// Accepts connections until `phase` is [`Phase::Closed`], and spawns a task for each.
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
            _ = phase.wait_for(|phase| *phase == Phase::Closed) => return,
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
        // without need.
        let until = *full_since.get_or_insert_with(Instant::now) + ADMIT_TIMEOUT;
        let room = tokio::select! {
            biased;
            _ = phase.wait_for(|phase| *phase == Phase::Closed) => return,
            room = context.registry.wait_for_room(&context.limits, context.share, until) => room,
        };
        if !room {
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

/// An accepted connection.
enum Stream {
    Tcp(tokio::net::TcpStream, SocketAddr),
    Unix(tokio::net::UnixStream),
}

impl BoundSocket {
    async fn accept(&self) -> Result<Stream> {
        match self {
            Self::Tcp(socket) => socket.accept().await.map(|(stream, peer)| Stream::Tcp(stream, peer)),
            Self::Unix(socket, _) => socket.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if let Self::Unix(_, Some(path)) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}
