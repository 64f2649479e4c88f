//! An open connection to Amazon.

use std::time::Instant;

use hyper::client::conn::http1;

use super::RequestBody;
use super::http2::Slot;

/// A connection that is ready for a request.
#[derive(Debug)]
pub(super) enum Connection {
    Http1(Http1Connection),
    Http2(Slot),
}

/// An HTTP/1.1 connection, which carries one request at a time.
#[derive(Debug)]
pub(super) struct Http1Connection {
    pub(super) sender: http1::SendRequest<RequestBody>,
    /// Whether it carried an earlier request.
    pub(super) reused: bool,
    pub(super) opened: Instant,
}
