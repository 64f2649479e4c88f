//! Opens a connection: DNS, TCP (Happy Eyeballs, RFC 8305), TLS, and the HTTP version that ALPN selected.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Uri;
use hyper::client::conn::{http1, http2};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;
use tower_service::Service;
use url::Url;

use super::connection::{Connection, H2Connection, MAX_STREAMS, PING_EVERY, PING_TIMEOUT};
use super::read_ahead::ReadAhead;
use super::{ErrorKind, Http2, Settings};

/// HTTP/2 flow-control windows of one stream (RFC 9113, section 5.2), in bytes: for the first connection, and for the
/// connections that are added while one, two, and three or more hundred requests are in flight.
///
/// A window limits the speed of a download to one window per round trip. Steady traffic at low concurrency uses
/// HTTP/1.1 connections and is not limited. A caller that does not read keeps up to twice the window in memory, so
/// connections for many requests get small windows; hundreds of requests are as fast together with small windows.
///
/// The smaller windows leave room for the nine bytes of a frame header. One, two or four frames then fill one buffer of
/// h2, which stays allocated as long as any of its frames is in use.
const WINDOWS: [u32; 4] = [64 << 10, (8 << 10) - 9, (4 << 10) - 9, (2 << 10) - 9];

/// Limit of rustls's buffer for data that the socket has not taken yet, in bytes. The default of 64 KiB holds a body
/// chunk but not the overhead of its TLS records, so each chunk needed a second system call for its last 134 bytes.
const WRITE_BUFFER: usize = 128 << 10;

/// How long a TCP connection is silent before the kernel sends a keepalive probe, and the interval of further probes.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Largest read buffer of an HTTP/1.1 connection, in bytes, and so the largest response head. Amazon's heads are below
/// 16 KiB. hyper's default of 400 KiB would stay allocated for each caller that reads slowly.
const MAX_BUFFER: usize = 64 << 10;

/// Opens connections to one origin.
pub(super) struct Connector {
    uri: Uri,
    name: ServerName<'static>,
    tcp: HttpConnector,
    tls: TlsConnector,
    /// Like `tls`, but offers only HTTP/1.1.
    http1: TlsConnector,
    http2: Http2,
    timeout: Duration,
}

/// Which protocols a new connection offers by ALPN (RFC 7301).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alpn {
    /// The protocols that `upstream.http2` selects.
    Configured,
    /// The protocols that `upstream.http2` selects, for a connection that is added because the shared one is full.
    /// `hundreds` is the number of requests in flight, in hundreds.
    Overflow { hundreds: usize },
    /// Only HTTP/1.1.
    Http1,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connector({})", self.uri)
    }
}

impl Connector {
    /// Creates a connector for `origin`. `tls` holds the trust roots.
    ///
    /// # Errors
    /// Fails if `origin` has no host that can be verified by TLS.
    pub(super) fn new(origin: &Url, settings: &Settings, tls: &ClientConfig) -> Result<Self, rustls::Error> {
        let alpn: &[&[u8]] = match settings.http2 {
            Http2::Auto => &[b"h2", b"http/1.1"],
            Http2::Never => &[b"http/1.1"],
            Http2::Always => &[b"h2"],
        };
        let bad = || rustls::Error::General(format!("{origin} is not an origin"));
        let host = origin.host_str().ok_or_else(bad)?.trim_start_matches('[').trim_end_matches(']').to_owned();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // Keepalive detects a peer that vanished, also while a response may stay silent for a long time.
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE));
        Ok(Self {
            uri: origin.as_str().parse().map_err(|_| bad())?,
            name: ServerName::try_from(host).map_err(|_| bad())?,
            tcp,
            tls: with_alpn(tls, alpn),
            http1: with_alpn(tls, &[b"http/1.1"]),
            http2: settings.http2,
            timeout: settings.connect_timeout,
        })
    }

    /// Returns `upstream.connect_timeout`.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether HTTP/1.1 is allowed on a host that offers HTTP/2.
    pub(super) fn may_speak_http1(&self) -> bool {
        self.http2 == Http2::Auto
    }

    /// Opens a connection within `upstream.connect_timeout`.
    ///
    /// # Errors
    /// Fails if DNS, TCP, TLS or the HTTP/2 handshake fails, or takes too long.
    pub(super) async fn connect(&self, alpn: Alpn) -> Result<Connection, ErrorKind> {
        let connected = tokio::time::timeout(self.timeout, self.handshake(alpn)).await;
        connected.unwrap_or(Err(ErrorKind::ConnectTimeout(self.timeout)))
    }

    async fn handshake(&self, alpn: Alpn) -> Result<Connection, ErrorKind> {
        let tcp = match self.tcp.clone().call(self.uri.clone()).await {
            Ok(tcp) => tcp.into_inner(),
            Err(error) => {
                let causes = causes(&error);
                return Err(ErrorKind::Unreachable(self.tried(&causes).await.into()));
            }
        };
        let tls = if alpn == Alpn::Http1 { &self.http1 } else { &self.tls };
        let mut stream = tls.connect(self.name.clone(), ReadAhead::new(tcp)).await.map_err(ErrorKind::Tls)?;
        stream.get_mut().1.set_buffer_limit(Some(WRITE_BUFFER));
        let chosen = stream.get_ref().1.alpn_protocol();
        if chosen == Some(b"h2") || self.http2 == Http2::Always {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder.timer(TokioTimer::new()).keep_alive_interval(PING_EVERY).keep_alive_timeout(PING_TIMEOUT);
            let hundreds = if let Alpn::Overflow { hundreds } = alpn { hundreds } else { 0 };
            let window = WINDOWS[hundreds.min(WINDOWS.len() - 1)];
            tracing::debug!(window, "connected to Amazon, HTTP/2");
            // A caller that does not read leaves its stream's window full. Even if every stream does so, the
            // connection's window leaves room for the others.
            builder
                .initial_stream_window_size(window)
                .initial_connection_window_size((MAX_STREAMS as u32 + 1) * window);
            let activity = stream.get_ref().0.activity().clone();
            let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(ErrorKind::Reset)?;
            drive(connection);
            Ok(Connection::Http2(H2Connection { sender, streams: Arc::default(), opened: Instant::now(), activity }))
        } else {
            tracing::debug!("connected to Amazon, HTTP/1.1");
            let mut builder = http1::Builder::new();
            builder.max_buf_size(MAX_BUFFER);
            let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(ErrorKind::Reset)?;
            drive(connection);
            Ok(Connection::Http1 { sender, reused: false })
        }
    }
}

impl Connector {
    /// `causes` behind the host and the addresses that were tried: a search domain can lead a name elsewhere.
    async fn tried(&self, causes: &str) -> String {
        let (host, port) = (self.uri.host().unwrap_or_default(), self.uri.port_u16().unwrap_or(443));
        let bare = host.trim_matches(['[', ']']);
        let found = tokio::net::lookup_host((bare, port)).await;
        let addresses: Vec<_> = found.into_iter().flatten().map(|address| address.ip().to_string()).collect();
        match addresses.as_slice() {
            [] => format!("{host}:{port}, for which no address was found: {causes}"),
            [only] if only == bare => format!("{host}:{port}: {causes}"),
            addresses => format!("{host}:{port} ({}): {causes}", addresses.join(", ")),
        }
    }
}

/// An error and its sources in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

/// Returns a TLS connector that offers the protocols `alpn`.
fn with_alpn(tls: &ClientConfig, alpn: &[&[u8]]) -> TlsConnector {
    let mut tls = tls.clone();
    tls.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    TlsConnector::from(Arc::new(tls))
}

/// Spawns the task that runs a connection. Requests on the connection get its errors, so the task only traces them.
fn drive(connection: impl Future<Output = Result<(), hyper::Error>> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "connection to Amazon ended");
        }
    });
}
