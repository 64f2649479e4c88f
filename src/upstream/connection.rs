//! An open connection to Amazon.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use hyper::client::conn::{http1, http2};

use super::RequestBody;

/// An HTTP/2 connection and the number of calls on it.
#[derive(Clone, Debug)]
pub(super) struct H2Connection {
    pub(super) sender: http2::SendRequest<RequestBody>,
    pub(super) calls: Arc<AtomicUsize>,
}

impl H2Connection {
    pub(super) fn is_full(&self) -> bool {
        self.calls.load(Relaxed) >= MAX_SHARED
    }
}

/// A connection that is ready for a request.
pub(super) enum Connection {
    Http1 { sender: http1::SendRequest<RequestBody>, reused: bool },
    Http2(H2Connection),
}

/// Calls that share one HTTP/2 connection, at most. Servers accept at least 100 at once (RFC 9113, section 6.5.2); a call
/// beyond that waits for another to end, so a hundred slow uploads would delay every other call.
pub(super) const MAX_SHARED: usize = 100;
