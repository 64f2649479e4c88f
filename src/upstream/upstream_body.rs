//! The body of an upstream response.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;

use super::pool::CountGuard;
use super::{OriginPool, ReplayBuffer, RequestBody};

/// A response body ended before its last byte.
#[derive(Debug, thiserror::Error)]
pub enum ResponseAborted {
    /// The connection or the HTTP/2 stream broke.
    #[error(transparent)]
    Broken(#[from] hyper::Error),
    /// The server ended the HTTP/2 stream without an error, but also without END_STREAM (RFC 9113, section 8.1).
    #[error("the HTTP/2 stream ended without END_STREAM")]
    Truncated,
    /// adsidecar withholds the rest of a refusal that quotes the access token, because it could not be searched.
    #[error("the rest of a compressed refusal that quotes the access token was withheld")]
    Withheld,
}

/// A response body, streamed from Amazon. After its last byte the connection returns to the pool. If the body fails or
/// is dropped before that, the connection is closed.
#[derive(Debug)]
pub struct UpstreamBody {
    incoming: Incoming,
    /// The HTTP/1.1 connection, until it is released or closed.
    exchange: Option<Exchange>,
    /// Counts the request as in flight to its origin.
    _in_flight: CountGuard,
    /// Counts the request on its HTTP/2 connection.
    share: Option<CountGuard>,
}

/// An HTTP/1.1 connection that is in use for one request and its response.
#[derive(Debug)]
struct Exchange {
    pool: Arc<OriginPool>,
    sender: http1::SendRequest<RequestBody>,
    /// Tells whether the request body was sent completely; `None` if there is none.
    request: Option<Arc<ReplayBuffer>>,
}

impl UpstreamBody {
    pub(super) fn http1(
        incoming: Incoming,
        in_flight: CountGuard,
        pool: Arc<OriginPool>,
        sender: http1::SendRequest<RequestBody>,
        request: Option<Arc<ReplayBuffer>>,
    ) -> Self {
        let exchange = Some(Exchange { pool, sender, request });
        let mut body = Self { incoming, exchange, _in_flight: in_flight, share: None };
        body.release_at_end();
        body
    }

    pub(super) fn http2(incoming: Incoming, in_flight: CountGuard, share: CountGuard) -> Self {
        Self { incoming, exchange: None, _in_flight: in_flight, share: Some(share) }
    }

    /// Releases the connection if the body has ended.
    fn release_at_end(&mut self) {
        if self.incoming.is_end_stream() {
            self.release();
        }
    }

    /// Returns the connection to the pool, or closes it if the request was not sent completely.
    fn release(&mut self) {
        if let Some(Exchange { pool, sender, request }) = self.exchange.take()
            // After an early response the connection is still in the middle of the request.
            && request.is_none_or(|request| request.ended())
        {
            pool.release(sender);
        }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = ResponseAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        // hyper ends a body cleanly if its stream is reset with NO_ERROR, which is right only after END_STREAM.
        if frame.is_none() && self.share.is_some() && !self.incoming.is_end_stream() {
            return Poll::Ready(Some(Err(ResponseAborted::Truncated)));
        }
        match &frame {
            None => self.release(),
            Some(Ok(_)) => self.release_at_end(),
            Some(Err(_)) => self.exchange = None,
        }
        Poll::Ready(frame.map(|frame| frame.map_err(ResponseAborted::from)))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
