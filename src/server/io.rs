//! What a connection reads and writes: its socket and response bodies, which record its activity in the registry, and
//! the request heads.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Uri};
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::registry::{Activity, Busy};

/// A socket that records when data arrives and when it accepts no more data.
#[derive(Debug)]
pub(super) struct MonitoredSocket<S> {
    socket: S,
    activity: Arc<Activity>,
    /// Whether the last write was blocked.
    blocked: bool,
    /// Bytes that hyper read but did not use; the next read returns them.
    unread: Bytes,
    /// A refusal of hyper's parser that was held back.
    refusal: Option<Box<[u8]>>,
}

/// What every response of adsidecar's carries, and hyper's own refusals do not.
const REQUEST_ID: &[u8] = b"x-request-id";

impl<S> MonitoredSocket<S> {
    pub(super) fn new(socket: S, activity: Arc<Activity>) -> Self {
        Self { socket, activity, blocked: false, unread: Bytes::new(), refusal: None }
    }

    /// Lets the next read return `bytes`.
    pub(super) fn unread(&mut self, bytes: &[u8]) {
        // Copied, because even an empty slice would keep hyper's buffer alive.
        self.unread = Bytes::copy_from_slice(bytes);
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    pub(super) fn get_ref(&self) -> &S {
        &self.socket
    }

    pub(super) fn into_inner(self) -> S {
        self.socket
    }

    /// The refusal that hyper's parser wrote, which was held back.
    pub(super) fn take_refusal(&mut self) -> Option<Bytes> {
        self.refusal.take().map(Bytes::from)
    }

    /// Holds back a refusal of hyper's parser: only its error says whether the caller can be told more. Every other
    /// response has a request id.
    fn holds_back(&mut self, bytes: &[u8]) -> bool {
        let refusal = bytes.starts_with(b"HTTP/1.1 400 ")
            && bytes.ends_with(b"\r\n\r\n")
            && !bytes.windows(REQUEST_ID.len()).any(|name| name == REQUEST_ID);
        if refusal {
            self.refusal = Some(bytes.into());
        }
        refusal
    }

    /// Records whether a write was blocked. It records changes only, so an uninterrupted response costs nothing.
    fn record(&mut self, written: Poll<Result<usize>>) -> Poll<Result<usize>> {
        if written.is_pending() != self.blocked {
            self.blocked = written.is_pending();
            self.activity.write_blocked(self.blocked);
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MonitoredSocket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let before = buf.filled().len();
        let read = if self.unread.is_empty() {
            Pin::new(&mut self.socket).poll_read(cx, buf)
        } else {
            let length = self.unread.len().min(buf.remaining());
            buf.put_slice(&self.unread.split_to(length));
            Poll::Ready(Ok(()))
        };
        if buf.filled().len() > before {
            self.activity.bytes_received();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MonitoredSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        if self.holds_back(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.record(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        if let [only] = parts
            && self.holds_back(only)
        {
            return Poll::Ready(Ok(only.len()));
        }
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, parts);
        self.record(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

/// A response body that marks its connection as busy until it was sent. While the socket accepts no data, the body is
/// not polled; otherwise hyper would buffer 64 KiB for each caller that does not read.
#[derive(Debug)]
pub(super) struct BusyBody<B> {
    body: B,
    busy: Busy,
}

impl<B> BusyBody<B> {
    pub(super) fn new(body: B, busy: Busy) -> Self {
        Self { body, busy }
    }
}

impl<B: Body + Unpin> Body for BusyBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<B::Data>, B::Error>>> {
        ready!(self.busy.poll_writable(cx));
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Copies a request head out of the buffer that it was read into: returns the same request, with its head in one
/// allocation that is exactly as large as needed.
///
/// hyper's header values and targets are slices of that buffer. They would keep its 8 KiB alive for as long as the
/// request takes, and hyper would allocate another 8 KiB for the next data on the connection.
pub(super) fn detach<B>(request: Request<B>) -> Request<B> {
    let (mut parts, body) = request.into_parts();
    let target = origin_form(&parts.uri);
    let lengths = parts.headers.values().map(HeaderValue::len).sum::<usize>();
    let mut text = BytesMut::with_capacity(lengths + target.map_or(0, str::len));
    for value in parts.headers.values() {
        text.extend_from_slice(value.as_bytes());
    }
    text.extend_from_slice(target.unwrap_or_default().as_bytes());
    let has_target = target.is_some();
    let mut text = text.freeze();
    // A copy of a valid value is valid, so no value keeps its old slice.
    for value in parts.headers.values_mut() {
        if let Ok(copy) = HeaderValue::from_maybe_shared(text.split_to(value.len())) {
            *value = copy;
        }
    }
    if has_target && let Ok(copy) = Uri::from_maybe_shared::<Bytes>(text) {
        parts.uri = copy;
    }
    Request::from_parts(parts, body)
}

/// Returns the target if it is in origin-form, the only form that `path_and_query` reproduces byte for byte.
fn origin_form(uri: &Uri) -> Option<&str> {
    let target = uri.path_and_query()?.as_str();
    (uri.authority().is_none() && target.starts_with('/')).then_some(target)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::task::{ArcWake, waker};
    use http_body_util::Full;

    use super::super::registry::Registry;
    use super::*;

    struct Woken(std::sync::atomic::AtomicBool);

    impl ArcWake for Woken {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    #[test]
    // Covers: threat 25.
    fn a_response_body_is_not_polled_while_the_caller_does_not_read() {
        let registry = Arc::<Registry>::default();
        let slot = registry.register();
        let mut body = BusyBody::new(Full::new(Bytes::from_static(b"response")), slot.begin_request());
        let woken = Arc::new(Woken(false.into()));
        let waker = waker(woken.clone());
        let cx = &mut Context::from_waker(&waker);
        slot.activity().write_blocked(true);
        assert!(Pin::new(&mut body).poll_frame(cx).is_pending());
        assert!(!woken.0.load(std::sync::atomic::Ordering::Relaxed));
        slot.activity().write_blocked(false);
        assert!(woken.0.load(std::sync::atomic::Ordering::Relaxed), "the waiting task is woken");
        assert!(matches!(Pin::new(&mut body).poll_frame(cx), Poll::Ready(Some(Ok(_)))));
    }

    fn read(target: &'static str, values: &[&[u8]]) -> (Bytes, Request<()>) {
        let buffer = Bytes::from([target.as_bytes(), &values.concat()].concat());
        let mut rest = buffer.clone();
        let mut request = Request::new(());
        *request.uri_mut() = Uri::from_maybe_shared(rest.split_to(target.len())).unwrap();
        for value in values {
            let value = HeaderValue::from_maybe_shared(rest.split_to(value.len())).unwrap();
            request.headers_mut().append("x-any", value);
        }
        (buffer, request)
    }

    #[test]
    fn a_detached_head_is_equal_and_does_not_keep_the_buffer_alive() {
        for target in ["/", "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/a/%7Bid%7D?", "/x/../y"] {
            let values: &[&[u8]] = &[b"one", b"", b"caf\xe9\tau lait", b"one"];
            let (buffer, request) = read(target, values);
            let copy = detach(request);
            assert!(buffer.is_unique(), "{target}");
            assert_eq!(copy.uri().path_and_query().unwrap().as_str(), target);
            let copied: Vec<_> = copy.headers().get_all("x-any").iter().map(HeaderValue::as_bytes).collect();
            assert_eq!(copied, values);
        }
    }

    #[test]
    fn a_target_in_another_form_is_unchanged() {
        for target in ["*", "http://advertising-api.amazon.com?x=1", "http://advertising-api.amazon.com/v2/profiles"] {
            let (_buffer, request) = read(target, &[]);
            let before = request.uri().clone();
            assert_eq!(detach(request).into_parts().0.uri, before, "{target}");
        }
    }
}
