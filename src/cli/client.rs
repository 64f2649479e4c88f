//! Sends requests to a listener of the running sidecar.

use std::fmt::Display;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::{Exit, Failed};
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
            Listen::Tcp(address) => {
                // With its port: links in the response are built from it.
                let host =
                    address.rsplit_once(':').map_or("localhost".to_owned(), |(_, port)| format!("localhost:{port}"));
                exchange(TcpStream::connect(local(address)).await?, method, path, &host, headers).await
            }
            Listen::Unix(socket) => {
                exchange(UnixStream::connect(socket).await?, method, path, "localhost", headers).await
            }
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
    host: &str,
    headers: &[(&str, &str)],
) -> Result<Response<Bytes>, AnyError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header(HOST, host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    let (head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    driver.abort();
    Ok(Response::from_parts(head, body))
}

/// Sends a request to the admin listener of the sidecar that holds the store, which `held` says. An import may take
/// long, so only the connection has a timeout.
///
/// # Errors
/// [`Failed`] with the exit code 75 if the sidecar cannot be reached; it then has to be stopped.
pub(super) async fn at_holder(
    config: &Config,
    held: &impl Display,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<Response<Incoming>, Failed> {
    let sent = async {
        let listen = config.admin_listen.first().ok_or("the admin listener is off in the configuration")?;
        let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
        for (name, value) in caller_token(config) {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(body))?;
        match listen {
            Listen::Tcp(address) => {
                let connect = TcpStream::connect(local(address));
                send(tokio::time::timeout(TIMEOUT, connect).await??, request).await
            }
            Listen::Unix(socket) => send(UnixStream::connect(socket).await?, request).await,
        }
    };
    sent.await.map_err(|error: AnyError| Failed {
        exit: Exit::Held,
        message: format!("{held}; its admin listener (admin.listen) cannot be asked instead: {error}"),
    })
}

async fn send<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, AnyError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// The body of `response`, whole.
///
/// # Errors
/// [`Failed`] if it broke off.
pub(super) async fn collect(response: Response<Incoming>) -> Result<Bytes, Failed> {
    let body = response.into_body().collect().await;
    Ok(body.map_err(|error| Failed::because(format!("the running sidecar's response broke off: {error}")))?.to_bytes())
}

/// Why the running sidecar refused a request.
pub(super) fn refused(status: StatusCode, body: &[u8]) -> Failed {
    let document: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let said = |member: &str| document[member].as_str().unwrap_or_default().to_owned();
    let message = format!("the running sidecar answered {status}: {} {}", said("detail"), said("next_step"));
    Failed::because(message.trim_end())
}

/// The caller token as a header, if one is configured.
pub(super) fn caller_token(config: &Config) -> Vec<(&'static str, &str)> {
    config.admission.caller_tokens.first().map(|token| ("x-ads-sidecar-token", token.expose())).into_iter().collect()
}

/// The loopback address of a listener that is bound to all addresses.
fn local(address: &str) -> String {
    address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
}
