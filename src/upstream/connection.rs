//! An open connection to Amazon.

use std::time::{Duration, Instant};

use hyper::client::conn::http1;

use super::RequestBody;
use super::http1_driver::Http1Driver;
use super::http2::Slot;
use super::last_look::LastLook;

/// A connection that is ready for a request.
#[derive(Debug)]
pub(super) enum Connection {
    /// Boxed, because it is moved often.
    Http1(Box<Http1Connection>),
    Http2(Slot),
}

/// An HTTP/1.1 connection, which carries one request at a time.
#[derive(Debug)]
pub(super) struct Http1Connection {
    pub(super) sender: http1::SendRequest<RequestBody>,
    pub(super) driver: Http1Driver,
    pub(super) look: LastLook,
    /// Whether it carried an earlier request.
    pub(super) reused: bool,
    pub(super) opened: Instant,
}

/// A new connection is still receiving what belongs to its TLS handshake.
const NEW: Duration = Duration::from_secs(1);

impl Http1Connection {
    /// Whether the server may be closing the connection just now, or has sent something without being asked.
    pub(super) fn may_be_closing(&self) -> bool {
        self.reused || self.opened.elapsed() >= NEW
    }
}
