//! One new connection: DNS, TCP (happy eyeballs, RFC 8305), TLS, and the HTTP version that ALPN chose.

use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper::client::conn::{http1, http2};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;
use tower_service::Service;
use url::Url;

use super::connection::{Connection, H2Connection, MAX_SHARED};
use super::read_ahead::Ahead;
use super::{ErrorKind, Http2, Settings};

/// HTTP/2 flow-control windows of one call (RFC 9113, section 5.2), in bytes: for the first connection, and for those that
/// are added while one, two, three or more hundred calls are under way. A window bounds a download by the round-trip time
/// (who goes on calling among few has an HTTP/1.1 connection, without such a bound), and up to twice as much is held for a
/// caller who does not read. Hundreds of calls are as fast together with small ones. The smaller ones leave room for the
/// nine bytes of a frame's head: one, two or four frames then fill a buffer of h2's, which is held whole for as long as any
/// of them.
const WINDOWS: [u32; 4] = [64 << 10, (8 << 10) - 9, (4 << 10) - 9, (2 << 10) - 9];
/// A dead HTTP/2 connection, which all callers share, is noticed after this long without a sign of life.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// What rustls holds of a request until the socket takes it. Its default (64 KiB) is a body chunk without the TLS records'
/// own bytes, so that each chunk needed a second system call for its last 134 bytes.
const WRITE_BUFFER: usize = 128 << 10;

/// How long a TCP connection is silent before the kernel asks whether the peer is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Read buffer of one HTTP/1.1 connection, at most, and so the largest head of an answer. Amazon's are below 16 KiB;
/// hyper's own 400 KiB would be held for each caller who reads slowly.
const MAX_BUFFER: usize = 64 << 10;

pub(super) struct Connector {
    uri: Uri,
    name: ServerName<'static>,
    tcp: HttpConnector,
    tls: TlsConnector,
    /// The same, and HTTP/1.1 is all that it offers.
    http1: TlsConnector,
    http2: Http2,
    timeout: Duration,
}

/// What a new connection offers to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alpn {
    /// As `upstream.http2` says.
    Configured,
    /// As `upstream.http2` says, for a call that finds no place on another connection while so many hundred are under way.
    Crowd { hundreds: usize },
    /// HTTP/1.1 only.
    Http1,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connector({})", self.uri)
    }
}

impl Connector {
    /// `tls` holds the trust roots.
    pub(super) fn new(origin: &Url, settings: &Settings, tls: &ClientConfig) -> Result<Self, rustls::Error> {
        let alpn: &[&[u8]] = match settings.http2 {
            Http2::Auto => &[b"h2", b"http/1.1"],
            Http2::Never => &[b"http/1.1"],
            Http2::Always => &[b"h2"],
        };
        let bad = || rustls::Error::General(format!("{origin} is no origin"));
        let host = origin.host_str().ok_or_else(bad)?.trim_start_matches('[').trim_end_matches(']').to_owned();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // A peer that is gone without a word is noticed also where an answer may be silent for long.
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE));
        Ok(Self {
            uri: origin.as_str().parse().map_err(|_| bad())?,
            name: ServerName::try_from(host).map_err(|_| bad())?,
            tcp,
            tls: offering(tls, alpn),
            http1: offering(tls, &[b"http/1.1"]),
            http2: settings.http2,
            timeout: settings.connect_timeout,
        })
    }

    /// `upstream.connect_timeout`.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether a host that speaks HTTP/2 may be spoken to in HTTP/1.1, too.
    pub(super) fn may_speak_http1(&self) -> bool {
        self.http2 == Http2::Auto
    }

    pub(super) async fn connect(&self, offer: Alpn) -> Result<Connection, ErrorKind> {
        let connected = tokio::time::timeout(self.timeout, self.handshake(offer)).await;
        connected.unwrap_or(Err(ErrorKind::ConnectTimeout(self.timeout)))
    }

    async fn handshake(&self, offer: Alpn) -> Result<Connection, ErrorKind> {
        let tcp = self.tcp.clone().call(self.uri.clone()).await;
        let tcp = tcp.map_err(|error| ErrorKind::Unreachable(error.into()))?.into_inner();
        let tls = if offer == Alpn::Http1 { &self.http1 } else { &self.tls };
        let mut stream = tls.connect(self.name.clone(), Ahead::new(tcp)).await.map_err(ErrorKind::Tls)?;
        stream.get_mut().1.set_buffer_limit(Some(WRITE_BUFFER));
        let chosen = stream.get_ref().1.alpn_protocol();
        if chosen == Some(b"h2") || self.http2 == Http2::Always {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder.timer(TokioTimer::new()).keep_alive_interval(PING_EVERY).keep_alive_timeout(PING_TIMEOUT);
            let hundreds = if let Alpn::Crowd { hundreds } = offer { hundreds } else { 0 };
            let window = WINDOWS[hundreds.min(WINDOWS.len() - 1)];
            tracing::debug!(window, "connected to Amazon, HTTP/2");
            // A caller that does not read leaves its window full: all that share the connection may, and the rest still moves.
            builder.initial_stream_window_size(window).initial_connection_window_size((MAX_SHARED as u32 + 1) * window);
            let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(ErrorKind::Reset)?;
            drive(connection);
            Ok(Connection::Http2(H2Connection { sender, calls: Arc::default() }))
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

fn offering(tls: &ClientConfig, alpn: &[&[u8]]) -> TlsConnector {
    let mut tls = tls.clone();
    tls.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    TlsConnector::from(Arc::new(tls))
}

/// Runs a connection until it ends. Its end is told to those who wait on it, and is no event by itself.
fn drive(connection: impl Future<Output = Result<(), hyper::Error>> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "connection to Amazon ended");
        }
    });
}
