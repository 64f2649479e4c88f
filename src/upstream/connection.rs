//! An open connection to Amazon.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use hyper::client::conn::{http1, http2};

use super::RequestBody;

/// An HTTP/2 connection, and the number of requests in flight on it.
#[derive(Clone, Debug)]
pub(super) struct H2Connection {
    pub(super) sender: http2::SendRequest<RequestBody>,
    pub(super) streams: Arc<AtomicUsize>,
}

impl H2Connection {
    /// Whether the connection carries [`MAX_STREAMS`] requests.
    pub(super) fn is_full(&self) -> bool {
        self.streams.load(Relaxed) >= MAX_STREAMS
    }
}

/// A connection that is ready for a request. `reused` is true if it carried an earlier request.
pub(super) enum Connection {
    Http1 { sender: http1::SendRequest<RequestBody>, reused: bool },
    Http2(H2Connection),
}

/// Most concurrent requests on one HTTP/2 connection. Servers should allow at least 100 concurrent streams (RFC 9113,
/// section 6.5.2). A request beyond the server's limit would wait for another to end, so a hundred slow uploads would
/// delay every other request.
pub(super) const MAX_STREAMS: usize = 100;
