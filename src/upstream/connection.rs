//! An open connection to Amazon.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};

use super::RequestBody;

/// An HTTP/2 connection, and the number of requests in flight on it.
#[derive(Clone, Debug)]
pub(super) struct H2Connection {
    pub(super) sender: http2::SendRequest<RequestBody>,
    pub(super) streams: Arc<AtomicUsize>,
    pub(super) opened: Instant,
    pub(super) activity: Arc<Activity>,
}

impl H2Connection {
    /// Whether the connection carries [`MAX_STREAMS`] requests.
    pub(super) fn is_full(&self) -> bool {
        self.streams.load(Relaxed) >= MAX_STREAMS
    }

    /// Whether requests wait for a server that has sent nothing for [`SILENT_AFTER`], not even an answer to a ping. The
    /// connection is probably dead, so new requests should not wait on it too.
    pub(super) fn is_silent(&self) -> bool {
        self.streams.load(Relaxed) > 0 && self.activity.elapsed() >= SILENT_AFTER
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

/// Interval of HTTP/2 pings while requests wait and nothing arrives. They detect a dead connection, which matters
/// because all requests share it.
pub(super) const PING_EVERY: Duration = Duration::from_secs(5);
/// Longest wait for the acknowledgement of a ping before the connection is closed.
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// After this silence new requests use another connection: a ping has been unanswered for three seconds.
const SILENT_AFTER: Duration = Duration::from_secs(8);

/// When a connection last received a byte, or began to wait for one.
#[derive(Debug)]
pub(super) struct Activity(AtomicU64);

/// What [`Activity`] counts from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Activity {
    pub(super) fn now() -> Arc<Self> {
        let activity = Self(AtomicU64::new(0));
        activity.touch();
        Arc::new(activity)
    }

    pub(super) fn touch(&self) {
        self.0.store(START.elapsed().as_millis() as u64, Relaxed);
    }

    fn elapsed(&self) -> Duration {
        START.elapsed().saturating_sub(Duration::from_millis(self.0.load(Relaxed)))
    }
}
