//! Sends requests to a listener of the running sidecar.

use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Method, Request, StatusCode};
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
    let response = tokio::time::timeout(TIMEOUT, exchange).await;
    let response = response.map_err(|_| Failed::because(format!("no response from {listen} within {TIMEOUT:?}")))?;
    response.map_err(|error| Failed::because(format!("no sidecar responds at {listen}: {error}")))
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

async fn exchange<S>(
    stream: S,
    method: Method,
    path: &str,
    host: &str,
    headers: &[(&str, &str)],
) -> Result<(StatusCode, Bytes), AnyError>
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
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok((status, body))
}

/// The caller token as a header, if one is configured.
pub(super) fn caller_token(config: &Config) -> Vec<(&'static str, &str)> {
    config.admission.caller_tokens.first().map(|token| ("x-ads-sidecar-token", token.expose())).into_iter().collect()
}

/// The loopback address of a listener that is bound to all addresses.
fn local(address: &str) -> String {
    address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
}
