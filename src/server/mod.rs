//! Accept loop, limits, graceful drain: used by all doors.
//!
//! hyper's own header timeout starts when a connection turns idle, and costs a timer per request. So each connection
//! tells here what it is doing, and one watchman per door looks at all of them: a head that does not
//! come to its end is answered with 408, a connection that has idled too long is closed, one whose caller takes nothing of
//! its answer is reset, and at the cap on connections the one that has idled longest makes room.

mod registry;
mod connection;
mod head;
mod io;

use std::fs::Permissions;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::net::{TcpListener, UnixListener, UnixSocket};
use tokio::sync::watch;

use connection::{converse, end};
use registry::Connections;

/// Where a door listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `host:port`; the host is an address or `localhost`.
    Tcp(String),
    /// `unix:/path`.
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

/// What one door allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `proxy.max_connections`; at the cap the connection that has idled longest is closed first.
    pub max_connections: usize,
    /// `proxy.header_timeout`: a request's head, from its first byte.
    pub header_timeout: Duration,
    /// `proxy.idle_timeout`: a keep-alive connection without a request.
    pub idle_timeout: Duration,
    /// `proxy.write_timeout`: a caller that takes nothing of its answer.
    pub write_timeout: Duration,
}

/// Connections that wait to be accepted at a Unix socket; tokio's own number for TCP.
const BACKLOG: u32 = 1024;
/// How long the accept loop rests when the process is out of descriptors: existing work goes on and frees some.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// How long somebody waits for room while every connection at the cap is busy.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP peer's address.
    Tcp(SocketAddr),
    /// A local process at a Unix socket, and the user that it runs as, where the system tells.
    Unix(Option<u32>),
}

/// What is said to who gets no answer of a request's own, as HTTP/1.1.
#[derive(Clone, Debug)]
pub struct CannedResponses {
    /// The head did not come to its end in time.
    pub late: Bytes,
    /// There is no room for one more connection.
    pub overloaded: Bytes,
}

/// A door whose sockets are bound and that serves nobody yet.
#[derive(Debug)]
pub struct Door {
    listeners: Vec<Listener>,
    limits: Arc<ArcSwap<Limits>>,
    words: CannedResponses,
    connections: Arc<Connections>,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// What a door is told at the end: first to drain, which lets what is in flight come to its end and takes no new request
/// on idle connections, then to stop accepting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Business as usual.
    #[default]
    Open,
    /// New connections are still taken, but each answer says `Connection: close`.
    Draining,
    /// No new connections.
    Closed,
}

impl Door {
    /// Binds every address of `listen`; with `ipv6_if_any`, one of IPv6 only where the machine has it. Port 0 takes any
    /// free port; see [`addresses`](Self::addresses). A Unix socket gets the file mode `socket_mode`.
    pub async fn bind(
        listen: &[Listen],
        ipv6_if_any: bool,
        socket_mode: u32,
        limits: Limits,
        words: CannedResponses,
    ) -> Result<Self> {
        let mut listeners = Vec::new();
        for address in listen {
            match address {
                Listen::Unix(path) => listeners.push(unix(path, socket_mode)?),
                Listen::Tcp(address) => match tcp(address).await {
                    Ok(listener) => listeners.push(Listener::Tcp(listener)),
                    Err(error) if ipv6_if_any && address.starts_with('[') && error.kind() != ErrorKind::AddrInUse => {}
                    Err(error) => return Err(error),
                },
            }
        }
        let limits = Arc::new(ArcSwap::from_pointee(limits));
        Ok(Self { listeners, limits, words, connections: Arc::default() })
    }

    /// The TCP addresses bound, in the order asked for.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let tcp = self.listeners.iter().filter_map(|listener| match listener {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(..) => None,
        });
        tcp.collect()
    }

    /// The limits, which may be replaced while the door serves.
    pub fn limits(&self) -> Arc<ArcSwap<Limits>> {
        self.limits.clone()
    }

    /// How many connections are open, for a metric.
    pub fn count(&self) -> impl Fn() -> usize + Send + Sync + use<> {
        let connections = self.connections.clone();
        move || connections.len()
    }

    /// Serves until `phase` says [`Phase::Closed`] and nothing is in flight any more.
    pub async fn run<H, F, B>(self, handler: H, mut phase: watch::Receiver<Phase>)
    where
        H: Fn(Request<Incoming>, Peer) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Self { listeners, limits, words, connections } = self;
        let host = Host { handler, connections: connections.clone(), words };
        let watchman = tokio::spawn(connections.clone().watch(limits.clone()));
        let mut tasks = tokio::task::JoinSet::new();
        for listener in listeners {
            tasks.spawn(accept(listener, limits.clone(), host.clone(), phase.clone()));
        }
        // The sender going away means the same as being told to close.
        let _ = phase.wait_for(|phase| *phase >= Phase::Draining).await;
        connections.leave();
        let _ = phase.wait_for(|phase| *phase == Phase::Closed).await;
        while tasks.join_next().await.is_some() {}
        connections.emptied().await;
        watchman.abort();
    }
}

async fn tcp(address: &str) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

/// A socket file left over from a process that is gone is replaced; one that answers is somebody else's.
fn unix(path: &PathBuf, mode: u32) -> Result<Listener> {
    let say = |error: Error| Error::new(error.kind(), format!("cannot listen on unix:{}: {error}", path.display()));
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(say(ErrorKind::AddrInUse.into()));
    }
    if std::fs::symlink_metadata(path).is_ok_and(|meta| std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type())) {
        std::fs::remove_file(path).map_err(say)?;
    }
    // Nobody can connect before it listens, and by then the mode is set.
    let socket = UnixSocket::new_stream().map_err(say)?;
    socket.bind(path).map_err(say)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(say)?;
    Ok(Listener::Unix(socket.listen(BACKLOG).map_err(say)?, path.clone()))
}

async fn accept<H, F, B>(
    listener: Listener,
    limits: Arc<ArcSwap<Limits>>,
    host: Host<H>,
    mut phase: watch::Receiver<Phase>,
) where
    H: Fn(Request<Incoming>, Peer) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    // Since when nobody who came has found room.
    let mut full_since = None;
    loop {
        let taken = tokio::select! {
            biased;
            _ = phase.wait_for(|phase| *phase == Phase::Closed) => return,
            taken = listener.accept() => taken,
        };
        let stream = match taken {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_REST).await;
                continue;
            }
        };
        // Not before somebody came: an idle connection is closed for another one, and not for nobody.
        let until = *full_since.get_or_insert_with(Instant::now) + PATIENCE;
        let room = tokio::select! {
            biased;
            _ = phase.wait_for(|phase| *phase == Phase::Closed) => return,
            room = host.connections.room(&limits, until) => room,
        };
        if !room {
            tracing::warn!("overloaded: every connection that proxy.max_connections allows is busy");
            let words = host.words.overloaded.clone();
            match stream {
                Stream::Tcp(stream, _) => drop(tokio::spawn(end(stream, Some(words), true))),
                Stream::Unix(stream) => drop(tokio::spawn(end(stream, Some(words), true))),
            }
            continue;
        }
        full_since = None;
        // Taken here and not in the task, so that neither the cap nor the end overlooks it.
        let seat = host.connections.sit();
        match stream {
            Stream::Tcp(stream, peer) => {
                let _ = stream.set_nodelay(true);
                tokio::spawn(converse(stream, Peer::Tcp(peer), seat, host.clone()));
            }
            Stream::Unix(stream) => {
                let uid = stream.peer_cred().ok().map(|peer| peer.uid());
                tokio::spawn(converse(stream, Peer::Unix(uid), seat, host.clone()));
            }
        }
    }
}

/// What every connection of a door shares.
#[derive(Clone)]
struct Host<H> {
    handler: H,
    connections: Arc<Connections>,
    words: CannedResponses,
}

enum Stream {
    Tcp(tokio::net::TcpStream, SocketAddr),
    Unix(tokio::net::UnixStream),
}

impl Listener {
    async fn accept(&self) -> Result<Stream> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, peer)| Stream::Tcp(stream, peer)),
            Self::Unix(listener, _) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}
