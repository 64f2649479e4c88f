//! The body of a response to the caller: adsidecar's own, or Amazon's, streamed.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::Full;

use super::request_telemetry::InFlight;
use crate::upstream::{ResponseAborted, UpstreamBody};

/// The body of a response of the proxy listener.
#[derive(Debug)]
pub struct Body {
    source: Source,
    _in_flight: Option<InFlight>,
}

#[derive(Debug)]
enum Source {
    Own(Full<Bytes>),
    Amazon(UpstreamBody),
    /// What was read of Amazon's answer to understand it, then the rest, or how it broke off.
    Read(Option<Bytes>, Option<Result<UpstreamBody, ResponseAborted>>),
}

impl Body {
    pub(super) fn own(body: Full<Bytes>) -> Self {
        Self { source: Source::Own(body), _in_flight: None }
    }

    pub(super) fn amazon(answer: UpstreamBody) -> Self {
        Self { source: Source::Amazon(answer), _in_flight: None }
    }

    pub(super) fn read(read: Bytes, rest: Option<Result<UpstreamBody, ResponseAborted>>) -> Self {
        Self { source: Source::Read(Some(read).filter(|read| !read.is_empty()), rest), _in_flight: None }
    }

    /// Counts the request as in flight until the body is dropped.
    pub(super) fn counted(self, in_flight: Option<InFlight>) -> Self {
        Self { _in_flight: in_flight, ..self }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = ResponseAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        match &mut self.source {
            Source::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Source::Amazon(answer) => Pin::new(answer).poll_frame(cx).map_err(log_upstream_abort),
            Source::Read(read, rest) => match (read.take(), rest) {
                (Some(read), _) => Poll::Ready(Some(Ok(Frame::data(read)))),
                (None, Some(Ok(rest))) => Pin::new(rest).poll_frame(cx).map_err(log_upstream_abort),
                (None, rest) => Poll::Ready(rest.take().and_then(Result::err).map(Err)),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Own(body) => body.is_end_stream(),
            Source::Amazon(answer) => answer.is_end_stream(),
            Source::Read(read, rest) => {
                let ended = rest.as_ref().is_none_or(|rest| rest.as_ref().is_ok_and(http_body::Body::is_end_stream));
                read.is_none() && ended
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Own(body) => body.size_hint(),
            Source::Amazon(answer) => answer.size_hint(),
            Source::Read(read, None) => SizeHint::with_exact(read.as_ref().map_or(0, |read| read.len() as u64)),
            // The headers contain Amazon's own Content-Length.
            Source::Read(_, Some(_)) => SizeHint::default(),
        }
    }
}

/// The caller sees its connection break; here it is said who broke off first.
fn log_upstream_abort(error: ResponseAborted) -> ResponseAborted {
    tracing::warn!(%error, "Amazon's answer broke off");
    error
}
