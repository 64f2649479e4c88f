//! Decides whether a request is sent to Amazon again. Nothing else in adsidecar repeats a request.

use std::sync::Arc;

use http::HeaderValue;

use super::upstream_request::UpstreamRequest;
use crate::upstream::{ReplayBuffer, RequestBody, SendError};

/// Why it is safe, and useful, to send a request once more.
#[derive(Debug)]
pub(super) enum Retry {
    /// No byte of the request was written, so Amazon cannot have processed it, whatever its method is.
    Unsent,
    /// The request is idempotent (RFC 9110, section 9.2.2), and a pooled connection broke before a byte of the response
    /// arrived: the server had probably closed the idle connection already.
    StaleIdempotent,
    /// Amazon rejected the access token, so it did not process the request; this is another token.
    NewToken(HeaderValue),
}

impl Retry {
    /// Decides after a failed attempt. `sent` is the replay buffer of the attempt's body; `None` if the body was empty.
    pub(super) fn after_error(
        error: &mut SendError,
        request: UpstreamRequest<'_>,
        sent: &Option<Arc<ReplayBuffer>>,
    ) -> Option<(Self, RequestBody)> {
        if let Some(body) = error.unsent.take() {
            return Some((Self::Unsent, body));
        }
        let stale = error.stale && request.is_idempotent();
        stale.then(|| body_again(sent)).flatten().map(|body| (Self::StaleIdempotent, body))
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
