//! The body of an upstream response.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::connection::Http1Connection;
use super::protocol_choice::CountGuard;
use super::send_error::ResponseAborted;
use super::{OriginPool, ReplayBuffer, http2};

/// A response body, streamed from Amazon. After its last byte an HTTP/1.1 connection returns to the pool. If the body
/// fails or is dropped before that, the connection is closed, or the HTTP/2 stream is reset.
#[derive(Debug)]
pub struct UpstreamBody {
    source: Source,
    /// Counts the request as in flight to its origin.
    _in_flight: CountGuard,
}

#[derive(Debug)]
enum Source {
    /// The connection is there until it is released or closed.
    Http1(Incoming, Option<Exchange>),
    Http2(http2::Incoming),
}

/// An HTTP/1.1 connection that is in use for one request and its response.
#[derive(Debug)]
struct Exchange {
    pool: Arc<OriginPool>,
    connection: Http1Connection,
    /// Tells whether the request body was sent completely; `None` if there is none.
    request: Option<Arc<ReplayBuffer>>,
}

impl UpstreamBody {
    pub(super) fn http1(
        incoming: Incoming,
        in_flight: CountGuard,
        pool: Arc<OriginPool>,
        connection: Http1Connection,
        request: Option<Arc<ReplayBuffer>>,
    ) -> Self {
        let mut exchange = Some(Exchange { pool, connection, request });
        if incoming.is_end_stream() {
            release(&mut exchange);
        }
        Self { source: Source::Http1(incoming, exchange), _in_flight: in_flight }
    }

    pub(super) fn http2(incoming: http2::Incoming, in_flight: CountGuard) -> Self {
        Self { source: Source::Http2(incoming), _in_flight: in_flight }
    }
}

/// Returns the connection to the pool, or closes it if the request was not sent completely.
fn release(exchange: &mut Option<Exchange>) {
    if let Some(Exchange { pool, connection, request }) = exchange.take()
        // After an early response the connection is still in the middle of the request.
        && request.is_none_or(|request| request.ended())
    {
        pool.release(connection);
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = ResponseAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        let (incoming, exchange) = match &mut self.source {
            Source::Http1(incoming, exchange) => (incoming, exchange),
            Source::Http2(incoming) => return incoming.poll_frame(cx),
        };
        let frame = ready!(Pin::new(&mut *incoming).poll_frame(cx));
        match &frame {
            Some(Err(_)) => *exchange = None,
            Some(Ok(_)) if !incoming.is_end_stream() => {}
            Some(Ok(_)) | None => release(exchange),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|error| ResponseAborted::Broken(error.into()))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Http1(incoming, _) => incoming.is_end_stream(),
            Source::Http2(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Http1(incoming, _) => incoming.size_hint(),
            Source::Http2(incoming) => incoming.size_hint(),
        }
    }
}
