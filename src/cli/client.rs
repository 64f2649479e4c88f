//! Asking a running sidecar at one of its doors.

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

/// A local process answers at once or is in trouble.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a request without a body to the first of `doors`.
pub(super) async fn request(
    doors: &[Listen],
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<(StatusCode, Bytes), Failed> {
    let door = doors.first().ok_or_else(|| Failed::because("the door is switched off in the configuration"))?;
    let asked = async {
        match door {
            Listen::Tcp(address) => converse(TcpStream::connect(local(address)).await?, method, path, headers).await,
            Listen::Unix(socket) => converse(UnixStream::connect(socket).await?, method, path, headers).await,
        }
    };
    let answer = tokio::time::timeout(TIMEOUT, asked).await;
    let answer = answer.map_err(|_| Failed::because(format!("no answer from {door} within {TIMEOUT:?}")))?;
    answer.map_err(|error| Failed::because(format!("no sidecar answers at {door}: {error}")))
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

async fn converse<S>(
    stream: S,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<(StatusCode, Bytes), AnyError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok((status, body))
}

/// The caller token as a header, where callers have to show one.
pub(super) fn caller_token(config: &Config) -> Vec<(&'static str, &str)> {
    config.admission.caller_tokens.first().map(|token| ("x-ads-sidecar-token", token.expose())).into_iter().collect()
}

/// Where a door that listens everywhere is reached from here.
fn local(address: &str) -> String {
    address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
}
