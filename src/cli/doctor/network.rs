//! The way to one of Amazon's hosts, step by step: name, connection, TLS, and the `Date` of a response.

use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, Response};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use url::Url;

use super::findings::{Finding, Group, Status};
use crate::domain::clock::date_of;
use crate::domain::outgoing_proxy::OutgoingProxy;
use crate::domain::tls;
use crate::upstream;

/// Time limit of each step.
const STEP: Duration = Duration::from_secs(4);
/// From this difference on the clock is worth a remark, and from the second on it breaks things.
const SKEW: SignedDuration = SignedDuration::from_secs(60);
const WRONG: SignedDuration = SignedDuration::from_secs(300);

/// A host to reach.
pub(super) struct Target<'a> {
    /// What it is, for a person.
    pub(super) name: String,
    pub(super) url: &'a Url,
    pub(super) roots: &'a [CertificateDer<'static>],
    /// `upstream.proxy` or `amazon.proxy`.
    pub(super) proxy: Option<&'a OutgoingProxy>,
    /// The key that names it.
    pub(super) key: String,
}

/// As [`probe`], for a host that only `/mcp` needs: what is wrong there is a warning.
pub(super) async fn probe_mcp(target: &Target<'_>) -> (Finding, Option<SignedDuration>) {
    match probe(target).await {
        (Finding { status: Status::Fail, code, cause, cure, .. }, skew) => {
            (Finding::wrong("mcp_unreachable", format!("{cause} ({code})"), cure.unwrap_or_default()), skew)
        }
        other => other,
    }
}

/// Goes the way to the host. Returns the difference of its clock from ours, if it told the time.
pub(super) async fn probe(target: &Target<'_>) -> (Finding, Option<SignedDuration>) {
    match way(target).await {
        Ok(response) => {
            let skew = date_of(response.headers()).map(|date| date.duration_since(Timestamp::now()));
            let host = host_of(target.url);
            let proxy = target.proxy.filter(|proxy| proxy.is_for(host.trim_matches(['[', ']'])));
            let by = proxy.map(|proxy| format!(" through {proxy}")).unwrap_or_default();
            (Finding::ok(Group::Network, "network", format!("{}: {host} answers{by}", target.name)), skew)
        }
        Err(finding) => (*finding, None),
    }
}

async fn way(target: &Target<'_>) -> Result<Response<hyper::body::Incoming>, Box<Finding>> {
    let (host, port) = (host_of(target.url), target.url.port_or_known_default().unwrap_or(443));
    let wrong =
        |code, told: String, cure: String| Box::new(Finding::wrong(code, format!("{}: {told}", target.name), cure));
    let bare = host.trim_matches(['[', ']']);
    let stream = match target.proxy.filter(|proxy| proxy.is_for(bare)) {
        Some(proxy) => upstream::tunnel(proxy, target.url, STEP).await.map_err(|error| {
            let told = format!("{proxy} opens no tunnel to {host}:{port}: {error}");
            wrong("outgoing_proxy", told, format!("{}, or the proxy's rules for {host}:{port}", proxy.named_by))
        })?,
        None => straight(target, &host, port).await?,
    };
    let late = || {
        let cure = format!("allow outgoing connections to {host}:{port}; {}", target.key);
        wrong("connect_timeout", format!("{host}:{port} accepts connections and does not answer"), cure)
    };
    let unusable = |error: String| wrong("tls", error, format!("the CA of {host} in {}", ca_key(&target.key)));
    let config = tls::client_config(target.roots, &[b"http/1.1"]).map_err(|error| unusable(error.to_string()))?;
    let name = ServerName::try_from(bare.to_owned()).map_err(|error| unusable(error.to_string()))?;
    let connector = TlsConnector::from(std::sync::Arc::new(config));
    let stream = match timeout(STEP, connector.connect(name, stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(unusable(format!("{host}: {error}"))),
        Err(_) => return Err(late()),
    };
    let authority = target.url.authority().to_owned();
    let exchange = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request = Request::builder().uri("/").header(HOST, authority).body(Empty::<Bytes>::new());
        let response = sender.send_request(request.expect("a path and a host are a request")).await;
        driver.abort();
        response
    };
    match timeout(STEP, exchange).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => {
            let cure = format!("allow outgoing connections to {host}:{port}; {}", target.key);
            Err(wrong("unreachable", format!("{host}:{port}: {error}"), cure))
        }
        Err(_) => Err(late()),
    }
}

/// Opens a connection to the host without a proxy.
async fn straight(target: &Target<'_>, host: &str, port: u16) -> Result<TcpStream, Box<Finding>> {
    let wrong =
        |code, told: String, cure: String| Box::new(Finding::wrong(code, format!("{}: {told}", target.name), cure));
    let bare = host.trim_matches(['[', ']']);
    let found = timeout(STEP, tokio::net::lookup_host((bare, port))).await;
    let addresses: Vec<_> = match found {
        Ok(Ok(addresses)) => addresses.collect(),
        _ => {
            return Err(wrong(
                "dns",
                format!("{host} does not resolve"),
                format!("getent hosts {host}; {}", target.key),
            ));
        }
    };
    match timeout(STEP, connect(&addresses)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => {
            let cure = format!("allow outgoing connections to {host}:{port}; {}", target.key);
            Err(wrong("unreachable", format!("{host}:{port}: {error}"), cure))
        }
        Err(_) => {
            let cure = format!("allow outgoing connections to {host}:{port}; {}", target.key);
            Err(wrong("connect_timeout", format!("{host}:{port} does not answer within {STEP:?}"), cure))
        }
    }
}

async fn connect(addresses: &[std::net::SocketAddr]) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::other("the name has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn ca_key(key: &str) -> &'static str {
    if key.starts_with("amazon.") { "amazon.ca_file" } else { "upstream.ca_file" }
}

fn host_of(url: &Url) -> String {
    url.host_str().unwrap_or_default().to_owned()
}

/// What the differences from the clocks of Amazon's hosts mean. The smallest counts: a cache may hold an old `Date`.
pub(super) fn clock(skews: &[SignedDuration]) -> Finding {
    let Some(skew) = skews.iter().min_by_key(|skew| skew.abs()) else {
        return Finding::skipped(Group::Clock, "clock", "no host of Amazon's told the time");
    };
    let direction = if skew.is_negative() { "ahead of" } else { "behind" };
    let cause = format!("this machine's clock is {} s {direction} Amazon's", skew.abs().as_secs());
    let cure = "timedatectl set-ntp true";
    match skew.abs() {
        skew if skew > WRONG => Finding::wrong("clock_wrong", cause, cure),
        skew if skew > SKEW => Finding::wrong("clock_skew", cause, cure),
        _ => Finding::ok(Group::Clock, "clock", "it agrees with Amazon's"),
    }
}
