//! An open connection to Amazon.

use std::time::Instant;

use hyper::client::conn::http1;

use super::RequestBody;
use super::http2::Slot;

/// A connection that is ready for a request. `reused` is true if it carried an earlier request.
#[derive(Debug)]
pub(super) enum Connection {
    Http1 { sender: http1::SendRequest<RequestBody>, reused: bool, opened: Instant },
    Http2(Slot),
}
