//! Opens a connection: TCP, TLS, and the HTTP version that ALPN selected.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use url::Url;

use super::activity::Activity;
use super::ask_first::AskFirst;
use super::connection::Http1Connection;
use super::dial::Dialer;
use super::http1_driver::Http1Driver;
use super::http2::{self, Driver, Http2 as Http2Connection};
use super::last_look::LookedAt;
use super::read_ahead::ReadAhead;
use super::windows::WindowBudget;
use super::{Broken, ErrorKind, Http2, Settings};

/// Limit of rustls's buffer for data that the socket has not taken yet, in bytes. The default of 64 KiB holds a body
/// chunk but not the overhead of its TLS records, so each chunk needed a second system call for its last 134 bytes.
const WRITE_BUFFER: usize = 128 << 10;

/// Largest read buffer of an HTTP/1.1 connection, in bytes, and so the largest response head. Amazon's heads are below
/// 16 KiB. hyper's default of 400 KiB would stay allocated for each caller that reads slowly.
const MAX_BUFFER: usize = 64 << 10;

/// Opens connections to one origin.
pub(super) struct Connector {
    host: String,
    dialer: Dialer,
    name: ServerName<'static>,
    tls: TlsConnector,
    /// Like `tls`, but offers only HTTP/1.1.
    http1: TlsConnector,
    http2: Http2,
    timeout: Duration,
    budget: Arc<WindowBudget>,
}

/// A connection that was just opened. Its future has to be run.
pub(super) enum Opened {
    Http1(Box<Http1Connection>),
    Http2 { connection: Http2Connection, driver: Box<Driver<Stream>> },
}

type Stream = AskFirst<TlsStream<ReadAhead<LookedAt>>>;

/// What a new connection is for.
#[derive(Clone, Debug)]
pub(super) enum Offer {
    /// Only HTTP/1.1.
    Http1,
    /// The protocols that `upstream.http2` selects.
    Configured {
        /// The window of a stream over HTTP/2.
        first_window: u32,
        /// When the region was last used.
        used: Arc<Activity>,
    },
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connector({})", self.host)
    }
}

impl Connector {
    /// Creates a connector for `origin`. `tls` holds the trust roots.
    ///
    /// # Errors
    /// Fails if `origin` has no host that can be verified by TLS.
    pub(super) fn new(
        origin: &Url,
        settings: &Settings,
        tls: &ClientConfig,
        budget: &Arc<WindowBudget>,
    ) -> Result<Self, rustls::Error> {
        let alpn: &[&[u8]] = match settings.http2 {
            Http2::Auto => &[b"h2", b"http/1.1"],
            Http2::Never => &[b"http/1.1"],
            Http2::Always => &[b"h2"],
        };
        let bad = || rustls::Error::General(format!("{origin} is not an origin"));
        let host = origin.host_str().ok_or_else(bad)?.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self {
            name: ServerName::try_from(host.clone()).map_err(|_| bad())?,
            dialer: Dialer::new(&host, origin.port_or_known_default().ok_or_else(bad)?, settings),
            host,
            tls: with_alpn(tls, alpn),
            http1: with_alpn(tls, &[b"http/1.1"]),
            http2: settings.http2,
            timeout: settings.connect_timeout,
            budget: budget.clone(),
        })
    }

    /// Whether HTTP/1.1 is allowed on a host that offers HTTP/2.
    pub(super) fn may_speak_http1(&self) -> bool {
        self.http2 == Http2::Auto
    }

    /// Opens a connection within `upstream.connect_timeout`.
    ///
    /// # Errors
    /// Fails if DNS, TCP, TLS or the HTTP/2 handshake fails, or takes too long.
    pub(super) async fn connect(&self, offer: Offer) -> Result<Opened, ErrorKind> {
        let connected = tokio::time::timeout(self.timeout, self.handshake(offer)).await;
        connected.unwrap_or(Err(ErrorKind::ConnectTimeout(self.timeout)))
    }

    /// Waits until an HTTP/2 server has said what it allows, for at most `upstream.connect_timeout`.
    ///
    /// # Errors
    /// Fails if it does not, or if the connection ends before.
    pub(super) async fn settle(&self, settled: oneshot::Receiver<()>) -> Result<(), ErrorKind> {
        match tokio::time::timeout(self.timeout, settled).await {
            Ok(told) => told.map_err(|_| ErrorKind::Reset(Broken::Unsettled)),
            Err(_) => Err(ErrorKind::ConnectTimeout(self.timeout)),
        }
    }

    async fn handshake(&self, offer: Offer) -> Result<Opened, ErrorKind> {
        let tcp = self.dialer.connect().await?;
        let tls = if matches!(offer, Offer::Http1) { &self.http1 } else { &self.tls };
        let stream = tls.connect(self.name.clone(), ReadAhead::new(LookedAt::new(tcp))).await;
        let mut stream = stream.map_err(|error| ErrorKind::Tls(Arc::new(error)))?;
        stream.get_mut().1.set_buffer_limit(Some(WRITE_BUFFER));
        let chosen = stream.get_ref().1.alpn_protocol();
        match offer {
            Offer::Configured { first_window, used } if chosen == Some(b"h2") || self.http2 == Http2::Always => {
                tracing::debug!(window = first_window, "connected to Amazon, HTTP/2");
                let activity = stream.get_mut().0.activity();
                let budget = self.budget.clone();
                let stream = AskFirst::new(stream);
                let opened = http2::handshake(stream, activity, used, budget, first_window).await;
                let (connection, driver) = opened.map_err(|error| ErrorKind::Reset(error.into()))?;
                Ok(Opened::Http2 { connection, driver: Box::new(driver) })
            }
            _ => {
                tracing::debug!("connected to Amazon, HTTP/1.1");
                let mut builder = http1::Builder::new();
                builder.max_buf_size(MAX_BUFFER);
                let look = stream.get_ref().0.get_ref().look().clone();
                let opened = builder.handshake(TokioIo::new(AskFirst::new(stream))).await;
                let (sender, driver) = opened.map_err(|error| ErrorKind::Reset(error.into()))?;
                let driver = Http1Driver::new(Box::new(driver));
                let (reused, opened) = (false, Instant::now());
                Ok(Opened::Http1(Box::new(Http1Connection { sender, driver, look, reused, opened })))
            }
        }
    }
}

/// Returns a TLS connector that offers the protocols `alpn`. All of them resume their sessions (RFC 8446, section 2.2).
fn with_alpn(tls: &ClientConfig, alpn: &[&[u8]]) -> TlsConnector {
    let mut tls = tls.clone();
    tls.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    TlsConnector::from(Arc::new(tls))
}
