//! The response to the caller: Amazon's without the headers that end here, and the body, adsidecar's own or Amazon's,
//! streamed.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderValue, TRANSFER_ENCODING};
use http::{Response, Version};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, Full};

use super::inflation::Inflater;
use super::jobs::JobListener;
use super::redaction::Redactor;
use super::request_telemetry::InFlight;
use crate::domain::headers::{ConnectionOptions, ERROR, HINT, THROTTLE};
use crate::inbound::oauth::EventStream;
use crate::throttle::Waited;
use crate::upstream::{ResponseAborted, UpstreamBody};

/// Amazon's response as the caller gets it: without the headers that [`strip_response`] removes, with
/// `X-Adsidecar-Hint` if there is a hint, and with `X-Adsidecar-Throttle` if the request waited for its turn.
pub(super) fn to_caller(
    mut response: Response<Body>,
    hint: Option<&'static str>,
    waited: Option<Waited>,
) -> Response<Body> {
    *response.version_mut() = Version::HTTP_11;
    strip_response(response.headers_mut());
    if let Some(hint) = hint {
        response.headers_mut().insert(HINT, HeaderValue::from_static(hint));
    }
    if let Some(waited) = waited.and_then(|waited| HeaderValue::try_from(waited.to_string()).ok()) {
        response.headers_mut().insert(THROTTLE, waited);
    }
    response
}

/// Removes from Amazon's response headers those that apply only to the connection between adsidecar and Amazon, and
/// those that only adsidecar may set ([`ERROR`], [`HINT`], [`THROTTLE`]).
pub fn strip_response(headers: &mut HeaderMap) {
    // One pass over the names present: most responses carry none of these headers.
    let mut dropped: Vec<_> = headers.keys().filter(|name| is_dropped_from_response(name.as_str())).cloned().collect();
    if dropped.contains(&CONNECTION) {
        dropped.extend(ConnectionOptions::of(headers));
    }
    if dropped.contains(&TRANSFER_ENCODING) {
        // The body is chunked, so `Content-Length` does not describe it (RFC 9112, section 6.3).
        dropped.push(CONTENT_LENGTH);
    }
    for name in dropped {
        headers.remove(name);
    }
}

/// Whether a response header is withheld from the caller: hop-by-hop headers (RFC 9110, section 7.6.1, and older names
/// that proxies commonly treat the same way) and the headers that only adsidecar sets.
fn is_dropped_from_response(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    ) || name == ERROR.as_str()
        || name == HINT.as_str()
        || name == THROTTLE.as_str()
}

/// The body of a response of the proxy listener.
#[derive(Debug)]
pub struct Body {
    source: Source,
    /// Only for a refusal of Amazon's.
    redactor: Option<Box<Redactor>>,
    /// Only for a compressed one that is too long to be read before it is passed on.
    inflater: Option<Box<Inflater>>,
    /// Only for a response that tells of a job which the throttle counts.
    listener: Option<Box<JobListener>>,
    _in_flight: Option<InFlight>,
}

#[derive(Debug)]
enum Source {
    Own(Full<Bytes>),
    Events(EventStream),
    Amazon(UpstreamBody),
    /// What was read of Amazon's response to understand it, then the rest, or the error that ended it.
    Read(Option<Bytes>, Option<Result<UpstreamBody, ResponseAborted>>),
}

impl Body {
    pub(super) fn own(body: Full<Bytes>) -> Self {
        Self::from(Source::Own(body))
    }

    pub(super) fn events(stream: EventStream) -> Self {
        Self::from(Source::Events(stream))
    }

    pub(super) fn amazon(response: UpstreamBody) -> Self {
        Self::from(Source::Amazon(response))
    }

    pub(super) fn read(read: Bytes, rest: Option<Result<UpstreamBody, ResponseAborted>>) -> Self {
        Self::from(Source::Read(Some(read).filter(|read| !read.is_empty()), rest))
    }

    /// Replaces the token of `bearer` wherever the body quotes it.
    pub(super) fn without_token(self, bearer: &HeaderValue) -> Self {
        Self { redactor: Some(Box::new(Redactor::new(bearer))), ..self }
    }

    /// As [`without_token`](Self::without_token), for a body that is passed on inflated.
    pub(super) fn inflated_without_token(self, inflater: Inflater, bearer: &HeaderValue) -> Self {
        Self { inflater: Some(Box::new(inflater)), ..self.without_token(bearer) }
    }

    /// Lets `listener`, if there is one, hear the body.
    pub(super) fn heard_by(self, listener: Option<JobListener>) -> Self {
        Self { listener: listener.map(Box::new), ..self }
    }

    /// What was read of a body, and what follows.
    pub(super) fn read_then(read: Bytes, rest: Option<Self>) -> Self {
        match rest.map(|rest| rest.source) {
            None => Self::read(read, None),
            Some(Source::Amazon(rest)) => Self::read(read, Some(Ok(rest))),
            Some(Source::Read(None, rest)) => Self::read(read, rest),
            // Only Amazon's bodies are read in parts.
            Some(_) => Self::read(read, Some(Err(ResponseAborted::Truncated))),
        }
    }

    /// Reads the body up to about `limit` bytes. Returns the rest if it did not end by then, or ended with an error.
    pub(super) async fn read_up_to(mut self, limit: usize) -> (Bytes, Option<Self>) {
        let mut read = BytesMut::new();
        while read.len() < limit {
            match self.frame().await {
                Some(Ok(frame)) => read.extend(frame.into_data().ok()),
                Some(Err(error)) => {
                    let rest = Self::from(Source::Read(None, Some(Err(error))));
                    return (read.freeze(), Some(rest));
                }
                None => return (read.freeze(), None),
            }
        }
        (read.freeze(), Some(self))
    }

    /// Counts the request as in flight until the body is dropped.
    pub(super) fn counted(self, in_flight: Option<InFlight>) -> Self {
        Self { _in_flight: in_flight, ..self }
    }
}

impl From<Source> for Body {
    fn from(source: Source) -> Self {
        Self { source, redactor: None, inflater: None, listener: None, _in_flight: None }
    }
}

impl Source {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        match self {
            Source::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Source::Events(stream) => Pin::new(stream).poll_frame(cx).map_err(|never| match never {}),
            Source::Amazon(response) => Pin::new(response).poll_frame(cx).map_err(log_upstream_abort),
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
            Source::Events(_) => false,
            Source::Amazon(response) => response.is_end_stream(),
            Source::Read(read, rest) => {
                let complete = rest.as_ref().is_none_or(|rest| rest.as_ref().is_ok_and(http_body::Body::is_end_stream));
                read.is_none() && complete
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Source::Own(body) => body.size_hint(),
            Source::Events(_) => SizeHint::default(),
            Source::Amazon(response) => response.size_hint(),
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
        let Self { source, redactor, inflater, listener, .. } = &mut *self;
        let Some(redactor) = redactor else {
            let frame = ready!(source.poll_frame(cx));
            if let (Some(listener), Some(data)) =
                (listener, frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()))
            {
                listener.hear(data);
            }
            return Poll::Ready(frame);
        };
        loop {
            // What cannot be inflated cannot be searched.
            if let Some(inflating) = inflater {
                match inflating.piece() {
                    Ok(Some(text)) => match redactor.chunk(&text) {
                        passed if passed.is_empty() => continue,
                        passed => return Poll::Ready(Some(Ok(Frame::data(passed)))),
                    },
                    Ok(None) => {}
                    Err(_) => return Poll::Ready(Some(Err(ResponseAborted::Withheld))),
                }
            }
            let passed = match ready!(source.poll_frame(cx)) {
                Some(Ok(frame)) => match (frame.into_data(), inflater.as_mut()) {
                    (Ok(data), Some(inflating)) => {
                        inflating.push(data);
                        continue;
                    }
                    (Ok(data), None) => redactor.chunk(&data),
                    (Err(trailers), _) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None if inflater.is_some() => match inflater.take().map(|inflating| inflating.end()) {
                    Some(Ok(text)) => redactor.chunk(&text),
                    _ => return Poll::Ready(Some(Err(ResponseAborted::Withheld))),
                },
                None if redactor.held() == 0 => return Poll::Ready(None),
                None => redactor.end(),
            };
            if !passed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(passed))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let searched = self.redactor.as_ref().is_none_or(|redactor| redactor.held() == 0);
        self.source.is_end_stream() && searched && self.inflater.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.inflater.is_some() {
            return SizeHint::default();
        }
        let hint = self.source.size_hint();
        // What is held back is still to come. A body of unknown length stays one.
        match (hint.exact(), &self.redactor) {
            (Some(length), Some(redactor)) => SizeHint::with_exact(length + redactor.held() as u64),
            _ => hint,
        }
    }
}

/// Logs that Amazon ended the response early: the caller only sees its own connection break.
fn log_upstream_abort(error: ResponseAborted) -> ResponseAborted {
    tracing::warn!(%error, "Amazon's response ended before its last byte");
    error
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).fold(
            HeaderMap::new(),
            |mut headers, (name, value)| {
                headers.append(name, value);
                headers
            },
        )
    }

    #[test]
    fn a_response_loses_hop_by_hop_headers_and_forged_adsidecar_headers() {
        let mut headers = map(&[
            ("connection", "x-private, close"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("keep-alive", "timeout=5"),
            ("x-adsidecar-error", "forged"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("x-amzn-requestid", "r"),
        ]);
        strip_response(&mut headers);
        assert_eq!(headers, map(&[("set-cookie", "a=1"), ("set-cookie", "b=2"), ("x-amzn-requestid", "r")]));
    }

    #[test]
    fn content_length_beside_chunked_is_not_returned() {
        let mut headers = map(&[("content-length", "2"), ("transfer-encoding", "chunked")]);
        strip_response(&mut headers);
        assert_eq!(headers, map(&[]));
    }
}
