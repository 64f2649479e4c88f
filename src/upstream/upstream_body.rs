//! The body of an answer on its way to the caller.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;

use super::protocol_choice::Counted;
use super::{OriginPool, ReplayBuffer, RequestBody};

/// Amazon's bytes as they come. When the last one has passed, the connection goes back to the pool; an answer that is
/// dropped earlier, or breaks off, closes it.
#[derive(Debug)]
pub struct UpstreamBody {
    incoming: Incoming,
    lease: Option<Lease>,
    _call: Counted,
    /// On an HTTP/2 connection: this call's part of it.
    _share: Option<Counted>,
}

/// An HTTP/1.1 connection that is busy with one exchange.
#[derive(Debug)]
struct Lease {
    host: Arc<OriginPool>,
    sender: http1::SendRequest<RequestBody>,
    request: Option<Arc<ReplayBuffer>>,
}

impl UpstreamBody {
    pub(super) fn http1(
        incoming: Incoming,
        call: Counted,
        host: Arc<OriginPool>,
        sender: http1::SendRequest<RequestBody>,
        request: Option<Arc<ReplayBuffer>>,
    ) -> Self {
        let lease = Some(Lease { host, sender, request });
        let mut answer = Self { incoming, lease, _call: call, _share: None };
        answer.give_back_at_end();
        answer
    }

    pub(super) fn http2(incoming: Incoming, call: Counted, share: Counted) -> Self {
        Self { incoming, lease: None, _call: call, _share: Some(share) }
    }

    fn give_back_at_end(&mut self) {
        if self.incoming.is_end_stream() {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        if let Some(Lease { host, sender, request }) = self.lease.take()
            // An answer before the end of its request leaves the connection in the middle of that request.
            && request.is_none_or(|request| request.ended())
        {
            host.release(sender);
        }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        match &frame {
            None => self.give_back(),
            Some(Ok(_)) => self.give_back_at_end(),
            Some(Err(_)) => self.lease = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
