//! Sends requests to a listener of the running sidecar.

use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::Failed;
use crate::config::Config;
use crate::server::Listen;

/// Timeout of a request. A local process that works responds much faster.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of a connection attempt on this machine.
const CONNECT: Duration = Duration::from_secs(1);

/// Sends a request without a body to the first address in `addresses`.
///
/// # Errors
/// [`Failed`] if the listener is off, or there is no response within [`TIMEOUT`].
pub(super) async fn request(
    addresses: &[Listen],
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<(StatusCode, Bytes), Failed> {
    let (head, body) = exchange_within(addresses, method, path, headers, TIMEOUT).await?.into_parts();
    Ok((head.status, body))
}

/// As [`request`], with a timeout and the whole response.
///
/// # Errors
/// [`Failed`] if the listener is off, or there is no response within `timeout`.
pub(super) async fn exchange_within(
    addresses: &[Listen],
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    timeout: Duration,
) -> Result<Response<Bytes>, Failed> {
    let listen = addresses.first().ok_or_else(|| Failed::because("the listener is off in the configuration"))?;
    let exchange = async {
        match listen {
            Listen::Tcp(address) => exchange(TcpStream::connect(local(address)).await?, method, path, headers).await,
            Listen::Unix(socket) => exchange(UnixStream::connect(socket).await?, method, path, headers).await,
        }
    };
    let response = tokio::time::timeout(timeout, exchange).await;
    let response = response.map_err(|_| Failed::because(format!("no response from {listen} within {timeout:?}")))?;
    response.map_err(|error| Failed::because(format!("no sidecar responds at {listen}: {error}")))
}

/// The first of `addresses` that accepts a connection.
pub(super) async fn listening(addresses: &[Listen]) -> Option<&Listen> {
    for listen in addresses {
        let connected = async {
            match listen {
                Listen::Tcp(address) => TcpStream::connect(local(address)).await.map(drop),
                Listen::Unix(socket) => UnixStream::connect(socket).await.map(drop),
            }
        };
        if matches!(tokio::time::timeout(CONNECT, connected).await, Ok(Ok(()))) {
            return Some(listen);
        }
    }
    None
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

async fn exchange<S>(
    stream: S,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<Response<Bytes>, AnyError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    let (head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    driver.abort();
    Ok(Response::from_parts(head, body))
}

/// The caller token as a header, if one is configured.
pub(super) fn caller_token(config: &Config) -> Vec<(&'static str, &str)> {
    config.admission.caller_tokens.first().map(|token| ("x-ads-sidecar-token", token.expose())).into_iter().collect()
}

/// The loopback address of a listener that is bound to all addresses.
fn local(address: &str) -> String {
    address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
}
