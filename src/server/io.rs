//! What a connection reads and writes: its socket and response bodies, which record its activity in the registry, and
//! the request heads.

use std::io::{ErrorKind, IoSlice, Result};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Uri};
use http_body::{Body, Frame, SizeHint};
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::OwnResponses;
use super::registry::{Activity, Busy, Command};

/// A socket that records when data arrives and when it accepts no more data.
///
/// It also does what hyper leaves out: it notices that the caller has hung up while hyper does not read, because its
/// buffer still holds something; it adds the request id to the answers of hyper's parser; and it makes the kernel reset
/// the connection of a caller of HTTP/1.0 whose response breaks off.
#[derive(Debug)]
pub(super) struct MonitoredSocket<S> {
    socket: S,
    activity: Arc<Activity>,
    own: Arc<dyn OwnResponses>,
    /// Whether the last write was blocked.
    blocked: bool,
    /// Whether hyper has read since its last flush and found nothing, so that the next data, or the end of the
    /// connection, wakes the task.
    awaits_data: bool,
    /// Whether closing the socket resets the connection.
    resets: bool,
    /// Bytes that hyper read but did not use, or that arrived while it did not read; the next read returns them.
    unread: Bytes,
    /// How much of a request's body was read after the response was written.
    rest: usize,
    /// What hyper has written, held back: a refusal of its parser, because only its error says whether the caller can
    /// be told more; or what it had not written when it gave up the connection.
    held: Option<Box<Bytes>>,
}

/// Most bytes of a request's body that are read after the response was written.
const MAX_REST: usize = 1 << 20;

/// Most bytes that are read ahead while hyper does not read. Behind more of them, a hang-up is not noticed.
const READ_AHEAD: usize = 4 << 10;

impl<S> MonitoredSocket<S> {
    pub(super) fn new(socket: S, activity: Arc<Activity>, own: Arc<dyn OwnResponses>) -> Self {
        let (blocked, awaits_data, resets, unread, rest) = (false, false, false, Bytes::new(), 0);
        Self { socket, activity, own, blocked, awaits_data, resets, unread, rest, held: None }
    }

    /// Lets the next read return `bytes`, which were read before what is still unread. Line breaks before a request
    /// line mean nothing (RFC 9112, section 2.2).
    pub(super) fn unread(&mut self, bytes: &[u8]) {
        let start = bytes.iter().position(|byte| !is_line_break(byte)).unwrap_or(bytes.len());
        // Copied, because even an empty slice would keep hyper's buffer alive.
        self.unread = Bytes::from([&bytes[start..], &self.unread].concat());
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

    /// Takes what hyper has written and was held back.
    pub(super) fn take_held(&mut self) -> Bytes {
        self.held.take().map_or_else(Bytes::new, |held| *held)
    }

    /// Whether a refusal of hyper's parser was held back.
    pub(super) fn has_refusal(&self) -> bool {
        self.held.is_some()
    }

    /// Holds what hyper writes while it gives up the connection, and returns its length.
    fn hold(&mut self, parts: &[IoSlice<'_>]) -> Option<usize> {
        if !self.blocked || !self.activity.is_leaving() {
            return None;
        }
        let parts: Vec<&[u8]> = parts.iter().map(|part| &**part).collect();
        let written = parts.concat();
        let length = written.len();
        self.held = Some(Box::new([self.take_held(), written.into()].concat().into()));
        Some(length)
    }

    /// Records whether a write was blocked. It records changes only, so an uninterrupted response costs nothing.
    fn record(&mut self, written: Poll<Result<usize>>) -> Poll<Result<usize>> {
        if written.is_pending() != self.blocked {
            self.blocked = written.is_pending();
            self.activity.write_blocked(self.blocked);
        }
        written
    }

    /// Records data that hyper has read.
    fn received(&mut self, data: &[u8]) {
        self.activity.bytes_received(data);
        if self.activity.is_in_rest() {
            self.rest += data.len();
            if self.rest > MAX_REST {
                self.activity.send(Command::EndUpload);
            }
        } else {
            self.rest = 0;
        }
    }
}

fn is_line_break(byte: &u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

impl<S: AsyncRead + Unpin> MonitoredSocket<S> {
    /// Fails if the caller has hung up while its request waits for the response. hyper itself looks only while its
    /// buffer is empty, and a line break behind a body, which some clients send, stays in it.
    fn watch_for_hang_up(&mut self, cx: &mut Context<'_>) -> Result<()> {
        let hyper_reads = std::mem::take(&mut self.awaits_data);
        while !hyper_reads && self.unread.len() < READ_AHEAD && self.activity.watches() {
            let mut space = [0; 512];
            let mut buf = ReadBuf::new(&mut space);
            match Pin::new(&mut self.socket).poll_read(cx, &mut buf)? {
                Poll::Pending => break,
                Poll::Ready(()) if buf.filled().is_empty() => return Err(ErrorKind::ConnectionAborted.into()),
                Poll::Ready(()) => self.unread = Bytes::from([&self.unread, buf.filled()].concat()),
            }
        }
        Ok(())
    }
}

impl<S: AsFd> MonitoredSocket<S> {
    /// Before the first byte of a response to HTTP/1.0: lets the kernel reset the connection when it is closed, also if
    /// the process dies. Its caller would take any other end for the end of the body.
    pub(super) fn reset_when_closed(&mut self) {
        if !self.resets && self.activity.serves_http10() {
            self.resets = set_socket_linger(&self.socket, Some(Duration::ZERO)).is_ok();
        }
    }

    /// Resets the connection: a linger time of zero makes the kernel discard unsent data.
    pub(super) fn reset(self) {
        let _ = set_socket_linger(&self.socket, Some(Duration::ZERO));
    }

    /// Lets the socket be closed gracefully.
    pub(super) fn close_gracefully(&mut self) {
        if std::mem::take(&mut self.resets) {
            let _ = set_socket_linger(&self.socket, None);
        }
    }
}

/// The answer of hyper's parser, with a request id.
fn with_request_id(answer: &[u8], id: &HeaderValue) -> Option<Vec<u8>> {
    let head =
        answer.strip_suffix(b"\r\n").filter(|head| head.starts_with(b"HTTP/1.1 4") && head.ends_with(b"\r\n"))?;
    Some([head, b"x-request-id: ", id.as_bytes(), b"\r\n\r\n"].concat())
}

impl<S: AsyncWrite + AsFd + Unpin> MonitoredSocket<S> {
    /// Writes `bytes`. If they are the answer of hyper's parser, holds them back, with a request id.
    fn write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        if self.activity.is_rejecting_head()
            && let Some(answer) = with_request_id(bytes, &self.own.request_id())
        {
            self.held = Some(Box::new(answer.into()));
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.socket).poll_write(cx, bytes)
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
        self.awaits_data = read.is_pending();
        if buf.filled().len() > before {
            self.received(&buf.filled()[before..]);
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + AsFd + Unpin> AsyncWrite for MonitoredSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        if let Some(length) = self.hold(&[IoSlice::new(bytes)]) {
            return Poll::Ready(Ok(length));
        }
        self.reset_when_closed();
        let written = self.write(cx, bytes);
        self.record(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        // Otherwise hyper might end the response, and serve the next request.
        if self.blocked && self.activity.is_leaving() {
            return Poll::Pending;
        }
        self.watch_for_hang_up(cx)?;
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
        if let Some(length) = self.hold(parts) {
            return Poll::Ready(Ok(length));
        }
        self.reset_when_closed();
        let written = match parts {
            [only] => self.write(cx, only),
            _ => Pin::new(&mut self.socket).poll_write_vectored(cx, parts),
        };
        self.record(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

/// A response body that marks its connection as busy until it was sent. While the socket accepts no data, the body is
/// not polled; otherwise hyper would buffer 64 KiB for each caller that does not read. An error is held back until what
/// came before it is written: hyper forgets what it has not written when a body fails.
///
/// If hyper gives up the connection, the rest of the response stays with its [`Slot`](super::registry::Slot).
pub(super) struct BusyBody<B>(Option<Rest<B>>)
where
    B: Body<Error: Send> + Send + 'static;

/// What is left of a response.
pub(super) struct Rest<B: Body> {
    pub(super) body: B,
    /// The connection is busy with it.
    pub(super) busy: Busy,
    pub(super) error: Option<B::Error>,
    /// Bytes that are still to be written frame by frame.
    singly: usize,
    /// Whether hyper has not written the last frame yet.
    pauses: bool,
}

/// In a crowd, this many bytes of a response are written frame by frame: hyper would take 64 KiB before it writes
/// anything, and all of that would stay there where the caller reads nothing. The socket of such a caller accepts less
/// than this.
const SINGLY: usize = 256 << 10;

impl<B: Body<Error: Send> + Send + 'static> BusyBody<B> {
    pub(super) fn new(body: B, busy: Busy) -> Self {
        let singly = if busy.is_of_a_crowd() { SINGLY } else { 0 };
        Self(Some(Rest { body, busy, error: None, singly, pauses: false }))
    }
}

impl<B: Body<Error: Send> + Send + 'static> Drop for BusyBody<B> {
    fn drop(&mut self) {
        if let Some(rest) = self.0.take_if(|rest| rest.busy.is_leaving()) {
            let activity = rest.busy.activity();
            activity.keep_rest(Box::new(rest));
        }
    }
}

impl<B: Body<Data = Bytes, Error: Send + Unpin> + Send + Unpin + 'static> Body for BusyBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<B::Data>, B::Error>>> {
        // It is there until this is dropped.
        let Some(rest) = &mut self.0 else { return Poll::Ready(None) };
        ready!(rest.busy.poll_writable(cx));
        if let Some(error) = rest.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        // hyper writes what it holds whenever a body is pending.
        if std::mem::take(&mut rest.pauses) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match ready!(Pin::new(&mut rest.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if rest.singly > 0 {
                    rest.singly = rest.singly.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                    rest.pauses = true;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                rest.error = Some(error);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|rest| rest.error.is_none() && rest.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(SizeHint::default, |rest| rest.body.size_hint())
    }
}

/// Copies a request head out of the buffer that it was read into: the request stays the same, with its head in one
/// allocation that is exactly as large as needed.
///
/// hyper's header values and targets are slices of that buffer. They would keep its 8 KiB alive for as long as the
/// request takes, and hyper would allocate another 8 KiB for the next data on the connection.
pub(super) fn detach<B>(request: &mut Request<B>) {
    let target = origin_form(request.uri());
    let lengths = request.headers().values().map(HeaderValue::len).sum::<usize>();
    let mut text = BytesMut::with_capacity(lengths + target.map_or(0, str::len));
    for value in request.headers().values() {
        text.extend_from_slice(value.as_bytes());
    }
    text.extend_from_slice(target.unwrap_or_default().as_bytes());
    let has_target = target.is_some();
    let mut text = text.freeze();
    // A copy of a valid value is valid, so no value keeps its old slice.
    for value in request.headers_mut().values_mut() {
        if let Ok(copy) = HeaderValue::from_maybe_shared(text.split_to(value.len())) {
            *value = copy;
        }
    }
    if has_target && let Ok(copy) = Uri::from_maybe_shared::<Bytes>(text) {
        *request.uri_mut() = copy;
    }
}

/// Returns the target if it is in origin-form, the only form that `path_and_query` reproduces byte for byte.
fn origin_form(uri: &Uri) -> Option<&str> {
    let target = uri.path_and_query()?.as_str();
    (uri.authority().is_none() && target.starts_with('/')).then_some(target)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::stream;
    use futures_util::task::{ArcWake, waker};
    use http_body_util::{Full, StreamBody};

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
        let busy = slot.begin_request(false, false).0;
        let mut body = BusyBody::new(Full::new(Bytes::from_static(b"response")), busy);
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

    #[test]
    fn in_a_crowd_a_response_begins_frame_by_frame() {
        for crowded in [true, false] {
            let registry = Arc::<Registry>::default();
            if crowded {
                registry.parking().simulate_crowd();
            }
            let slot = registry.register();
            let _active = slot.activate();
            let frame = || Ok::<_, std::io::Error>(Frame::data(Bytes::from(vec![0; SINGLY / 2])));
            let frames = StreamBody::new(stream::iter(std::iter::repeat_with(frame).take(4)));
            let mut body = BusyBody::new(frames, slot.begin_request(false, false).0);
            let mut polls = Vec::new();
            while polls.last() != Some(&None) {
                let woken = Arc::new(Woken(false.into()));
                let waker = waker(woken.clone());
                let polled = Pin::new(&mut body).poll_frame(&mut Context::from_waker(&waker));
                // A pause is only for hyper to write what it has.
                assert_eq!(polled.is_pending(), woken.0.load(std::sync::atomic::Ordering::Relaxed));
                polls.push(match polled {
                    Poll::Ready(frame) => frame.map(|_| "frame"),
                    Poll::Pending => Some("pause"),
                });
            }
            let pause = crowded.then_some("pause");
            let expected = [Some("frame"), pause, Some("frame"), pause, Some("frame"), Some("frame")];
            assert_eq!(polls, expected.into_iter().flatten().map(Some).chain([None]).collect::<Vec<_>>());
        }
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
            let (buffer, mut copy) = read(target, values);
            detach(&mut copy);
            assert!(buffer.is_unique(), "{target}");
            assert_eq!(copy.uri().path_and_query().unwrap().as_str(), target);
            let copied: Vec<_> = copy.headers().get_all("x-any").iter().map(HeaderValue::as_bytes).collect();
            assert_eq!(copied, values);
        }
    }

    #[test]
    fn a_target_in_another_form_is_unchanged() {
        for target in ["*", "http://advertising-api.amazon.com?x=1", "http://advertising-api.amazon.com/v2/profiles"] {
            let (_buffer, mut request) = read(target, &[]);
            let before = request.uri().clone();
            detach(&mut request);
            assert_eq!(*request.uri(), before, "{target}");
        }
    }
}
