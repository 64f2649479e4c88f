//! The body of a response to the caller: adsidecar's own, or Amazon's, streamed.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderValue;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::Full;

use super::redaction::Redactor;
use super::request_telemetry::InFlight;
use crate::upstream::{ResponseAborted, UpstreamBody};

/// The body of a response of the proxy listener.
#[derive(Debug)]
pub struct Body {
    source: Source,
    /// Only for a refusal of Amazon's.
    redactor: Option<Box<Redactor>>,
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
        Self::from(Source::Own(body))
    }

    pub(super) fn amazon(answer: UpstreamBody) -> Self {
        Self::from(Source::Amazon(answer))
    }

    pub(super) fn read(read: Bytes, rest: Option<Result<UpstreamBody, ResponseAborted>>) -> Self {
        Self::from(Source::Read(Some(read).filter(|read| !read.is_empty()), rest))
    }

    /// Replaces the token of `bearer` wherever the body quotes it.
    pub(super) fn without_token(self, bearer: &HeaderValue) -> Self {
        Self { redactor: Some(Box::new(Redactor::new(bearer))), ..self }
    }

    /// Counts the request as in flight until the body is dropped.
    pub(super) fn counted(self, in_flight: Option<InFlight>) -> Self {
        Self { _in_flight: in_flight, ..self }
    }
}

impl From<Source> for Body {
    fn from(source: Source) -> Self {
        Self { source, redactor: None, _in_flight: None }
    }
}

impl Source {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        match self {
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
        match self {
            Source::Own(body) => body.is_end_stream(),
            Source::Amazon(answer) => answer.is_end_stream(),
            Source::Read(read, rest) => {
                let ended = rest.as_ref().is_none_or(|rest| rest.as_ref().is_ok_and(http_body::Body::is_end_stream));
                read.is_none() && ended
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Source::Own(body) => body.size_hint(),
            Source::Amazon(answer) => answer.size_hint(),
            Source::Read(read, None) => SizeHint::with_exact(read.as_ref().map_or(0, |read| read.len() as u64)),
            // The headers contain Amazon's own Content-Length.
            Source::Read(_, Some(_)) => SizeHint::default(),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = ResponseAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        let Self { source, redactor, .. } = &mut *self;
        let Some(redactor) = redactor else { return source.poll_frame(cx) };
        loop {
            let passed = match ready!(source.poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => redactor.chunk(&data),
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None if redactor.held() == 0 => return Poll::Ready(None),
                None => redactor.end(),
            };
            if !passed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(passed))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.source.is_end_stream() && self.redactor.as_ref().is_none_or(|redactor| redactor.held() == 0)
    }

    fn size_hint(&self) -> SizeHint {
        let hint = self.source.size_hint();
        // What is held back is still to come. A body of unknown length stays one.
        match (hint.exact(), &self.redactor) {
            (Some(length), Some(redactor)) => SizeHint::with_exact(length + redactor.held() as u64),
            _ => hint,
        }
    }
}

/// The caller sees its connection break; here it is said who broke off first.
fn log_upstream_abort(error: ResponseAborted) -> ResponseAborted {
    tracing::warn!(%error, "Amazon's answer broke off");
    error
}
