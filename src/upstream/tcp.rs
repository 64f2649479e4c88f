//! The first step of a connection: a TCP stream to Amazon, straight (Happy Eyeballs, RFC 8305) or through the tunnel of
//! a proxy.

use std::error::Error;
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

use super::ErrorKind;
use crate::domain::outgoing_proxy::{OutgoingProxy, ProxyProtocol};

/// Opens TCP streams to one origin.
pub(super) struct Dialer {
    way: Way,
    /// The proxy's name in messages, and how long it may take; `None` without one.
    proxy: Option<(String, Duration)>,
}

/// Opens a tunnel through `proxy` to the host of `url`, for a diagnosis.
///
/// # Errors
/// [`ErrorKind::Proxy`] if there is none within about `timeout`.
pub async fn tunnel(proxy: &OutgoingProxy, url: &Url, timeout: Duration) -> Result<TcpStream, ErrorKind> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    let origin = url.as_str().parse().unwrap_or_default();
    Dialer::new(tcp, Some(proxy), timeout).connect(origin).await
}

enum Way {
    Direct(HttpConnector),
    Connect(Tunnel<HttpConnector>),
    Socks5(SocksV5<HttpConnector>),
}

impl Dialer {
    /// Streams that `tcp` opens to the origin, or, if there is a `proxy`, to the proxy, which has nine tenths of
    /// `timeout` to open a tunnel: TLS needs the rest, and the error can name the proxy.
    pub(super) fn new(tcp: HttpConnector, proxy: Option<&OutgoingProxy>, timeout: Duration) -> Self {
        let Some(proxy) = proxy else { return Self { way: Way::Direct(tcp), proxy: None } };
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
        Self { way, proxy: Some((proxy.to_string(), timeout * 9 / 10)) }
    }

    /// Opens a stream to `origin`.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`], or [`ErrorKind::Proxy`] if the proxy cannot be reached or opens no tunnel.
    pub(super) async fn connect(&self, origin: Uri) -> Result<TcpStream, ErrorKind> {
        let Some((proxy, timeout)) = &self.proxy else {
            return self.open(origin).await.map(TokioIo::into_inner).map_err(ErrorKind::Unreachable);
        };
        let failed = |problem| ErrorKind::Proxy { proxy: proxy.clone(), problem };
        match tokio::time::timeout(*timeout, self.open(origin)).await {
            Ok(Ok(stream)) => Ok(stream.into_inner()),
            Ok(Err(error)) => Err(failed(explain(&*error))),
            Err(_) => Err(failed(format!("no tunnel within {timeout:?}"))),
        }
    }

    async fn open(&self, origin: Uri) -> Result<TokioIo<TcpStream>, Box<dyn Error + Send + Sync>> {
        match &self.way {
            Way::Direct(tcp) => Ok(tcp.clone().call(origin).await?),
            Way::Connect(tunnel) => Ok(tunnel.clone().call(with_port(origin)).await?),
            Way::Socks5(socks) => Ok(socks.clone().call(with_port(origin)).await?),
        }
    }
}

/// The origin with its port, which SOCKS5 needs.
fn with_port(origin: Uri) -> Uri {
    let authority = origin.authority().filter(|authority| authority.port().is_none());
    let with = authority.and_then(|authority| format!("https://{authority}:443/").parse().ok());
    with.unwrap_or(origin)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_leads_to_a_port() {
        for (origin, with) in [
            ("https://advertising-api.amazon.com/", "https://advertising-api.amazon.com:443/"),
            ("https://127.0.0.1:8443/", "https://127.0.0.1:8443/"),
            ("https://[::1]/", "https://[::1]:443/"),
        ] {
            assert_eq!(with_port(origin.parse().unwrap()).to_string(), with);
        }
    }
}
