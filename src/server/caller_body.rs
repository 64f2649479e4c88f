//! The body of a caller's request, which records when it ends, and what becomes of the part that nobody read.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{CONNECTION, EXPECT, HeaderValue};
use http::{HeaderMap, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::registry::Uploading;

/// Largest rest of a refused body that is read, in bytes, so that the connection stays usable. Many clients send head
/// and body in two steps, so the body of a small request often arrives just after it was refused.
const MAX_REST: u64 = 64 << 10;

/// The body of a caller's request.
#[derive(Debug)]
pub struct CallerBody(Option<(Upload, Arc<Remainder>)>);

/// A body that is not empty.
#[derive(Debug)]
struct Upload {
    incoming: Incoming,
    /// `None` once the body has ended.
    uploading: Option<Uploading>,
    /// Whether anybody began to read it. hyper then sends the `100 Continue` that some callers wait for.
    begun: bool,
}

/// What its reader left of a body.
#[derive(Debug)]
pub(super) struct Remainder {
    state: Mutex<State>,
    /// Whether the caller waits for a `100 Continue` before it sends the body (RFC 9110, section 10.1.1).
    expects_continue: bool,
}

#[derive(Debug)]
enum State {
    /// The body is being read, and there is no response.
    Reading,
    /// The reader gave up before there was a response.
    Left(Upload),
    /// The response has begun.
    Answered,
}

impl CallerBody {
    /// Wraps `incoming`. `uploading` is `None` for an empty body.
    pub(super) fn new(
        incoming: Incoming,
        uploading: Option<Uploading>,
        headers: &HeaderMap,
    ) -> (Self, Option<Arc<Remainder>>) {
        let Some(uploading) = uploading else { return (Self(None), None) };
        let expects_continue = headers.contains_key(EXPECT);
        let remainder = Arc::new(Remainder { state: Mutex::new(State::Reading), expects_continue });
        let upload = Upload { incoming, uploading: Some(uploading), begun: false };
        (Self(Some((upload, remainder.clone()))), Some(remainder))
    }
}

impl Remainder {
    /// Decides what becomes of an unread rest of the body, now that there is a `response`: a small one is read in the
    /// background; otherwise the response announces that the connection will be closed.
    pub(super) fn answered<B>(&self, response: &mut Response<B>) {
        let state = std::mem::replace(&mut *self.lock(), State::Answered);
        let State::Left(upload) = state else { return };
        if response.headers().get(CONNECTION).is_some_and(|value| value == "close") {
            return;
        }
        // A caller that waits for a `100 Continue` may send its body or not.
        let certain = upload.begun || !self.expects_continue;
        if certain && upload.incoming.size_hint().exact().is_some_and(|left| left <= MAX_REST) {
            tokio::spawn(upload.discard());
        } else {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upload {
    /// Reads the rest and drops it. The registry limits how long that may take, and how much it may be.
    async fn discard(mut self) {
        while let Some(Ok(_)) = std::future::poll_fn(|cx| self.poll_frame(cx)).await {}
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.begun = true;
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        match &frame {
            // Trailers end a body, and whoever reads it may not ask for more.
            Some(Ok(frame)) if frame.is_data() && !self.incoming.is_end_stream() => {}
            Some(Ok(_)) | None => drop(self.uploading.take().map(Uploading::complete)),
            // The connection ends too.
            Some(Err(_)) => self.uploading = None,
        }
        Poll::Ready(frame)
    }
}

impl Drop for CallerBody {
    fn drop(&mut self) {
        let Some((upload, remainder)) = self.0.take_if(|(upload, _)| upload.uploading.is_some()) else { return };
        let mut state = remainder.lock();
        match *state {
            // Amazon responded early, and then closed its side. Without a runtime the process is ending.
            State::Answered => {
                if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                    runtime.spawn(upload.discard());
                }
            }
            State::Reading | State::Left(_) => *state = State::Left(upload),
        }
    }
}

impl Body for CallerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.0 {
            Some((upload, _)) => upload.poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|(upload, _)| upload.incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or(SizeHint::with_exact(0), |(upload, _)| upload.incoming.size_hint())
    }
}
