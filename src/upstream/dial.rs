//! The first step of a connection: a TCP stream to Amazon, straight or through the tunnel of a proxy.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::{HeaderValue, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;
use url::Url;
use zeroize::Zeroizing;

use super::{ErrorKind, Settings, tcp};
use crate::domain::outgoing_proxy::{OutgoingProxy, ProxyProtocol};

/// How long a connection to a proxy is silent before the kernel sends a keepalive probe, as of one to Amazon.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Opens TCP streams to one origin.
pub(super) struct Dialer {
    host: String,
    port: u16,
    proxy: Option<Tunnels>,
}

/// A proxy that opens tunnels.
struct Tunnels {
    way: Way,
    /// Its name in messages.
    name: String,
    /// How long it may take: TLS needs the rest of the time, and the error can name the proxy.
    timeout: Duration,
}

enum Way {
    Connect(Tunnel<HttpConnector>),
    Socks5(SocksV5<HttpConnector>),
}

/// Opens a tunnel through `proxy` to the host of `url`, for a diagnosis.
///
/// # Errors
/// [`ErrorKind::Proxy`] if there is none within about `timeout`.
pub async fn tunnel(proxy: &OutgoingProxy, url: &Url, timeout: Duration) -> Result<TcpStream, ErrorKind> {
    let host = url.host_str().unwrap_or_default();
    Tunnels::new(proxy, timeout).open(host, url.port_or_known_default().unwrap_or(443)).await
}

impl Dialer {
    /// Streams to `host`, through `upstream.proxy` if that is for it.
    pub(super) fn new(host: &str, port: u16, settings: &Settings) -> Self {
        let proxy = settings.proxy.as_ref().filter(|proxy| proxy.is_for(host));
        let proxy = proxy.map(|proxy| Tunnels::new(proxy, settings.connect_timeout));
        Self { host: host.to_owned(), port, proxy }
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`], or [`ErrorKind::Proxy`] if the proxy cannot be reached or opens no tunnel.
    pub(super) async fn connect(&self) -> Result<TcpStream, ErrorKind> {
        match &self.proxy {
            Some(proxy) => proxy.open(&self.host, self.port).await,
            None => {
                let opened = tcp::connect(&self.host, self.port).await;
                opened.map_err(|error| {
                    // A search domain can lead a name elsewhere, so it stands beside the address that was tried.
                    let named = std::io::Error::new(error.kind(), format!("{}:{}: {error}", self.host, self.port));
                    ErrorKind::Unreachable(Arc::new(named))
                })
            }
        }
    }
}

impl Tunnels {
    /// Tunnels through `proxy`, each within nine tenths of `timeout`.
    fn new(proxy: &OutgoingProxy, timeout: Duration) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE));
        // Host and port were checked; a URI that could not be read would fail as a host that does not resolve.
        let uri: Uri = format!("http://{}:{}", proxy.host, proxy.port).parse().unwrap_or_default();
        let way = match (proxy.protocol, &proxy.credentials) {
            (ProxyProtocol::Http, None) => Way::Connect(Tunnel::new(uri, tcp)),
            (ProxyProtocol::Http, Some((user, password))) => {
                let pair = Zeroizing::new(format!("{user}:{}", password.expose()));
                let basic = Zeroizing::new(format!("Basic {}", BASE64_STANDARD.encode(pair.as_bytes())));
                let value = HeaderValue::from_str(&basic).unwrap_or(HeaderValue::from_static("Basic"));
                Way::Connect(Tunnel::new(uri, tcp).with_auth(value))
            }
            (ProxyProtocol::Socks5, None) => Way::Socks5(SocksV5::new(uri, tcp)),
            (ProxyProtocol::Socks5, Some((user, password))) => {
                Way::Socks5(SocksV5::new(uri, tcp).with_auth(user.clone(), password.expose().to_owned()))
            }
        };
        Self { way, name: proxy.to_string(), timeout: timeout * 9 / 10 }
    }

    async fn open(&self, host: &str, port: u16) -> Result<TcpStream, ErrorKind> {
        let failed = |problem| ErrorKind::Proxy { proxy: self.name.clone(), problem };
        match tokio::time::timeout(self.timeout, self.ask(host, port)).await {
            Ok(Ok(stream)) => Ok(stream.into_inner()),
            Ok(Err(error)) => Err(failed(explain(&*error))),
            Err(_) => Err(failed(format!("no tunnel within {:?}", self.timeout))),
        }
    }

    async fn ask(&self, host: &str, port: u16) -> Result<TokioIo<TcpStream>, Box<dyn Error + Send + Sync>> {
        let bare = host.trim_matches(['[', ']']);
        let host = if bare.contains(':') { format!("[{bare}]") } else { bare.to_owned() };
        let origin: Uri = format!("https://{host}:{port}/").parse()?;
        match &self.way {
            Way::Connect(tunnel) => Ok(tunnel.clone().call(origin).await?),
            Way::Socks5(socks) => Ok(socks.clone().call(origin).await?),
        }
    }
}

/// What went wrong between us and the proxy, and what to do where that is clear. hyper-util exports no types for these
/// errors.
fn explain(error: &(dyn Error + 'static)) -> String {
    let chain: Vec<_> =
        std::iter::successors(Some(error), |error| (*error).source()).map(ToString::to_string).collect();
    let text = chain.join(": ");
    let cure = match () {
        () if text.contains("authorization required") => "it wants credentials, or other ones: check user and password",
        () if text.contains("credentials not accepted") => "it refused the credentials: check user and password",
        () if text.contains("user/pass") => "it takes no user and password, or wants them",
        () if text.contains("unsuccessful") => "it refused a tunnel to Amazon's host: check its rules and its log",
        () => return text,
    };
    format!("{text}; {cure}")
}
