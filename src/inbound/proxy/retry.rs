//! Decides whether a request is sent to Amazon again. Nothing else in adsidecar repeats a request.

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderValue, Method};

use crate::upstream::{ErrorKind, Processed, ReplayBuffer, RequestBody, Reuse, SendError};

/// Why it is safe, and useful, to send a request once more.
#[derive(Debug)]
pub(super) enum Retry {
    /// Amazon did not process the request, whatever its method is: no byte of it was written, or an HTTP/2 server said
    /// so. With `http1` it wants the request over HTTP/1.1.
    Unsent { http1: bool },
    /// The request is idempotent (RFC 9110, section 9.2.2), and a pooled connection broke before a byte of the response
    /// arrived: the server had probably closed the idle connection already.
    StaleIdempotent,
    /// Amazon rejected the access token, so it did not process the request; this is another token.
    NewToken(HeaderValue),
    /// Amazon refused the request because there were too many, so it did not process it. It waits for its turn first.
    Throttled,
}

/// Most attempts for a request that the server did not process. The connection of the second attempt may be closed too,
/// while a load balancer replaces its servers.
const MAX_ATTEMPTS: u32 = 3;

impl Retry {
    /// Decides after a failed attempt of a request with `method`. `sent` is what the attempt took of the caller's body,
    /// and `attempts` the number of attempts so far.
    ///
    /// # Errors
    /// Returns the error if the request must not be sent again.
    pub(super) async fn after_error(
        error: SendError,
        method: &Method,
        sent: &Option<Arc<ReplayBuffer>>,
        attempts: u32,
    ) -> Result<(Self, RequestBody), SendError> {
        // A host that does not accept connections gets one more attempt, as each may take the whole connect timeout.
        let connected = matches!(error.kind, ErrorKind::Reset(_));
        if attempts >= if connected { MAX_ATTEMPTS } else { 2 } {
            return Err(error);
        }
        let retry = match error.processed {
            Processed::Unsent(body) => return Ok((Self::Unsent { http1: false }, body)),
            Processed::Refused { http1 } => Self::Unsent { http1 },
            Processed::Stale if attempts == 1 && is_idempotent(method) => Self::StaleIdempotent,
            Processed::Stale | Processed::Unknown => return Err(error),
        };
        let body = match sent {
            None => Some(RequestBody::empty()),
            Some(buffer) => buffer.reclaim().await,
        };
        match body {
            Some(body) => Ok((retry, body)),
            None => Err(error),
        }
    }

    /// Returns which connection may carry the next attempt. Others in the pool may be stale too.
    pub(super) fn reuse(&self) -> Reuse {
        match self {
            Self::Unsent { http1: true } => Reuse::FreshHttp1,
            Self::Unsent { http1: false } | Self::StaleIdempotent => Reuse::Fresh(Instant::now()),
            Self::NewToken(_) | Self::Throttled => Reuse::Allowed,
        }
    }

    /// Decides after Amazon refused the request because there were too many. `sent` as in
    /// [`after_error`](Self::after_error).
    pub(super) fn after_refusal(sent: &Option<Arc<ReplayBuffer>>) -> Option<(Self, RequestBody)> {
        body_again(sent).map(|body| (Self::Throttled, body))
    }

    /// Decides after Amazon rejected the access token. `new_token` is a different one; `sent` as in
    /// [`after_error`](Self::after_error).
    pub(super) fn after_rejection(
        new_token: Option<HeaderValue>,
        sent: &Option<Arc<ReplayBuffer>>,
    ) -> Option<(Self, RequestBody)> {
        new_token.zip(body_again(sent)).map(|(token, body)| (Self::NewToken(token), body))
    }
}

/// The body for a second attempt, if it was empty or the replay buffer holds all that was sent of it.
fn body_again(sent: &Option<Arc<ReplayBuffer>>) -> Option<RequestBody> {
    match sent {
        None => Some(RequestBody::empty()),
        Some(buffer) => buffer.replay(),
    }
}

/// Which connection may carry the first attempt.
pub(super) fn first_reuse(method: &Method) -> Reuse {
    if is_idempotent(method) { Reuse::Allowed } else { Reuse::Unrepeatable }
}

/// RFC 9110, section 9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS)
}
