//! Why a request got no response, or only a part of one, and whether Amazon may have processed it.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use h2::Reason;

use super::last_look::ClosedBefore;
use super::{BodyError, RequestBody};

/// No response was received.
#[derive(Debug)]
pub struct SendError {
    /// The cause.
    pub kind: ErrorKind,
    /// Whether Amazon may have processed the request, which decides about a retry.
    pub processed: Processed,
}

/// Whether Amazon may have processed a request without a response.
#[derive(Debug)]
pub enum Processed {
    /// No byte of the request was written. Holds its body.
    Unsent(RequestBody),
    /// The server said that it did not process the request (RFC 9113, sections 6.8 and 8.7), or had closed its HTTP/1.1
    /// connection before the first byte. What was taken of the body is in its replay buffer.
    Refused {
        /// It wants the request over HTTP/1.1.
        http1: bool,
    },
    /// A connection from the pool broke before any byte of a response arrived. The server had probably just closed it,
    /// but it may have processed the request.
    Stale,
    /// Anything else: the server may have processed the request.
    Unknown,
}

/// Failures up to the head of the response.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ErrorKind {
    /// No TCP connection could be opened: DNS failed, the port refused, or there is no route.
    #[error("cannot connect: {0}")]
    Unreachable(Arc<dyn Error + Send + Sync>),
    /// The proxy could not be reached, or opened no tunnel.
    #[error("{proxy}: {problem}")]
    Proxy {
        /// The proxy without its credentials, and the key that names it.
        proxy: String,
        /// What happened.
        problem: String,
    },
    /// The TLS handshake failed.
    #[error("TLS handshake failed: {0}")]
    Tls(Arc<std::io::Error>),
    /// The connection broke, or the server did not send HTTP.
    #[error("connection broke: {0}")]
    Reset(Broken),
    /// The response has a transfer coding that was not asked for, so its body cannot be passed on.
    #[error("the server sent the transfer coding {0:?}")]
    TransferCoding(String),
    /// The server sent 101 although no upgrade was requested; the bytes that follow are not HTTP.
    #[error("the server switched protocols without being asked to")]
    Switched,
    /// No connection was established within `connect_timeout`.
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
    /// No response arrived within `response_timeout`.
    #[error("no response within {0:?}")]
    ResponseTimeout(Duration),
    /// The caller's body did not arrive completely; Amazon is not at fault.
    #[error("request body: {0}")]
    Body(BodyError),
}

/// A connection broke, or a stream of it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Broken {
    /// An HTTP/1.1 connection.
    #[error(transparent)]
    Http1(Arc<hyper::Error>),
    /// An HTTP/2 connection.
    #[error(transparent)]
    Http2(Arc<h2::Error>),
    /// An HTTP/2 connection, before the server had said how many streams it allows.
    #[error("the server closed an HTTP/2 connection before it sent its settings")]
    Unsettled,
}

/// A response body ended before its last byte.
#[derive(Debug, thiserror::Error)]
pub enum ResponseAborted {
    /// The connection or the HTTP/2 stream broke.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// The server ended the HTTP/2 stream without an error, but also without END_STREAM (RFC 9113, section 8.1).
    #[error("the HTTP/2 stream ended without END_STREAM")]
    Truncated,
    /// adsidecar withholds the rest of a compressed refusal that it could not search for the access token.
    #[error("the rest of a compressed refusal that could not be searched for the access token was withheld")]
    Withheld,
}

/// Why a request on an HTTP/2 connection got no response.
pub(super) enum NoResponse {
    /// Nothing of it was sent; here is its body.
    Unsent(h2::Error, RequestBody),
    /// The caller's body failed.
    Body(BodyError),
    /// The stream or the connection broke.
    Broken(h2::Error),
}

impl From<hyper::Error> for Broken {
    fn from(error: hyper::Error) -> Self {
        Self::Http1(error.into())
    }
}

impl From<h2::Error> for Broken {
    fn from(error: h2::Error) -> Self {
        Self::Http2(error.into())
    }
}

impl ErrorKind {
    /// Turns a failure that occurred before the request was sent into a [`SendError`] that returns its body.
    pub(super) fn unsent(self, body: RequestBody) -> SendError {
        SendError { kind: self, processed: Processed::Unsent(body) }
    }
}

impl SendError {
    /// Classifies an error of hyper's on an HTTP/1.1 connection. `unsent` is the body if hyper gave it back; `reused`
    /// tells whether the connection came from the pool.
    pub(super) fn over_http1(error: hyper::Error, unsent: Option<RequestBody>, reused: bool) -> Self {
        if let Some(body) = source::<BodyError>(&error) {
            return Self { kind: ErrorKind::Body(*body), processed: Processed::Unknown };
        }
        let processed = match unsent {
            Some(body) => Processed::Unsent(body),
            None if is_closed_before(&error) => Processed::Refused { http1: false },
            // Any other error, such as a response that is not HTTP, came from the server, so the connection was not
            // stale.
            None if reused && breaks(&error) => Processed::Stale,
            None => Processed::Unknown,
        };
        Self { kind: ErrorKind::Reset(error.into()), processed }
    }

    /// Classifies the end of an HTTP/2 stream or connection.
    pub(super) fn over_http2(failure: NoResponse) -> Self {
        match failure {
            NoResponse::Unsent(error, body) => ErrorKind::Reset(error.into()).unsent(body),
            NoResponse::Body(error) => Self { kind: ErrorKind::Body(error), processed: Processed::Unknown },
            NoResponse::Broken(error) => {
                let processed = processed_over_http2(&error);
                Self { kind: ErrorKind::Reset(error.into()), processed }
            }
        }
    }
}

/// What the end of an HTTP/2 stream or connection says about a request without a response.
fn processed_over_http2(error: &h2::Error) -> Processed {
    match error.reason() {
        // h2 ends only those streams with a GOAWAY that are above its last stream. A server has not processed them,
        // whatever its reason is (RFC 9113, section 6.8).
        _ if error.is_remote() && error.is_go_away() => Processed::Refused { http1: false },
        Some(Reason::REFUSED_STREAM) if error.is_remote() => Processed::Refused { http1: false },
        Some(Reason::HTTP_1_1_REQUIRED) if error.is_remote() => Processed::Refused { http1: true },
        _ if error.is_remote() || error.is_io() => Processed::Stale,
        // The server violated the protocol, or we did.
        _ => Processed::Unknown,
    }
}

/// Whether the connection broke, or was closed.
fn breaks(error: &hyper::Error) -> bool {
    error.is_incomplete_message()
        || error.is_canceled()
        || error.source().is_some_and(|source| source.is::<std::io::Error>())
}

/// Whether nothing was written.
fn is_closed_before(error: &hyper::Error) -> bool {
    source::<std::io::Error>(error).and_then(std::io::Error::get_ref).is_some_and(|inner| inner.is::<ClosedBefore>())
}

/// Finds an `E` among the sources of `error`.
fn source<E: Error + 'static>(error: &hyper::Error) -> Option<&E> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        source = error.source();
    }
    None
}
