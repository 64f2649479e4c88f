//! A response that is set aside: while many connections are active, one whose caller reads slowly is written without
//! hyper.
//!
//! hyper holds two buffers of 8 KiB for each connection, and other state, even while the socket accepts nothing. Two
//! thousand callers that read a few bytes a second would take 32 MiB for that. So hyper gives up their connections, as
//! it does when they are [parked](super::parking), but in the middle of a response: what it has not written and the
//! rest of the body are written here. hyper has encoded the head, and the body ends with its length (RFC 9112, section
//! 6.3), so nothing is left to do but to copy bytes.
//!
//! The reaper finds the callers ([`Command::SetAside`]). The socket then holds what hyper writes, instead of sending
//! it, and the body of the response stays with the connection's slot when hyper drops it.

use std::io::{ErrorKind, Result};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::Response;
use http::header::CONTENT_LENGTH;
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite};

use super::io::{MonitoredSocket, Rest};
use super::registry::{Busy, Command, Slot};

/// A response that is set aside, and its connection.
pub(super) struct SetAside<S, V, B: Body> {
    socket: MonitoredSocket<S>,
    /// What serves the requests after it.
    service: V,
    /// What the socket has not accepted yet.
    unwritten: Bytes,
    /// The frame that follows. It is taken before it can be written: over HTTP/2 a small frame is copied when it is
    /// taken, and until then keeps the whole buffer into which the frames of several callers were read.
    next: Option<Bytes>,
    /// `None` once nothing more is expected of it: then its connection to Amazon is free.
    body: Option<B>,
    /// The connection is busy until the response is written.
    _busy: Busy,
    /// Bytes of the body that are not yet taken; `None` once the body has failed.
    left: Option<u64>,
}

/// What became of the response.
pub(super) enum Written<S, V> {
    Whole(MonitoredSocket<S>, V),
    /// It broke off.
    Broken(MonitoredSocket<S>),
    /// The caller does not read; the socket was reset.
    Reset,
}

/// Whether the length of the response's body is known, and its `Content-Length`, if it has one, is that length.
pub(super) fn has_length<B: Body>(response: &Response<B>) -> bool {
    let said = response.headers().get(CONTENT_LENGTH).map(|said| said.to_str().ok()?.parse::<u64>().ok());
    let length = response.body().size_hint().exact();
    length.is_some() && said.is_none_or(|said| said == length)
}

impl<S, V, B> SetAside<S, V, B>
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin,
    B: Body<Data = Bytes> + Unpin,
{
    pub(super) fn new(mut socket: MonitoredSocket<S>, service: V, rest: Rest<B>) -> Self {
        let Rest { body, busy, error, .. } = rest;
        let (unwritten, length) = (socket.take_held(), body.size_hint().exact());
        let left = length.filter(|_| error.is_none());
        let body = Some(body).filter(|_| left.is_some_and(|left| left > 0));
        Self { socket, service, unwritten, next: None, body, _busy: busy, left }
    }

    /// Writes the response. `closing` is set if the connection is to be closed after it.
    pub(super) async fn write(mut self: Box<Self>, slot: &Slot, closing: &mut bool) -> Written<S, V> {
        loop {
            let command = tokio::select! {
                biased;
                written = std::future::poll_fn(|cx| self.poll_write(cx)) => return match written {
                    Ok(()) => Written::Whole(self.socket, self.service),
                    Err(error) => {
                        tracing::debug!(%error, "a response that was set aside broke off");
                        Written::Broken(self.socket)
                    }
                },
                command = slot.command() => command,
            };
            match command {
                Command::Close => *closing = true,
                Command::Abort => return Written::Broken(self.socket),
                Command::Reset => {
                    self.socket.reset();
                    return Written::Reset;
                }
                // No request is being received, so there is nothing to end.
                Command::HeadTimeout | Command::EndUpload | Command::SetAside => {}
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        loop {
            while !self.unwritten.is_empty() {
                match Pin::new(&mut self.socket).poll_write(cx, &self.unwritten)? {
                    Poll::Ready(0) => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                    Poll::Ready(written) => self.unwritten.advance(written),
                    Poll::Pending => {
                        // If it breaks off, what came before is written first.
                        if self.next.is_none()
                            && let Poll::Ready(Ok(next)) = self.poll_next(cx)
                        {
                            self.next = next;
                        }
                        return self.poll_hang_up(cx);
                    }
                }
            }
            match self.next.take() {
                Some(next) => self.unwritten = next,
                None => match self.poll_next(cx)? {
                    Poll::Ready(Some(next)) => self.unwritten = next,
                    Poll::Ready(None) => return Pin::new(&mut self.socket).poll_flush(cx),
                    Poll::Pending => return self.poll_hang_up(cx),
                },
            }
        }
    }

    /// The next bytes of the body; `None` at its end.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        loop {
            let Some(left) = self.left else { return Poll::Ready(Err(ErrorKind::UnexpectedEof.into())) };
            let Some(body) = &mut self.body else { return Poll::Ready(Ok(None)) };
            let mut data = match ready!(Pin::new(body).poll_frame(cx)) {
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
                Some(Err(_)) | None => {
                    (self.body, self.left) = (None, None);
                    continue;
                }
            };
            // Excess bytes must not be taken for the next response.
            data.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            let left = left - data.len() as u64;
            self.left = Some(left);
            if left == 0 {
                self.body = None;
            }
            if !data.is_empty() {
                return Poll::Ready(Ok(Some(data)));
            }
        }
    }

    /// Fails if the caller hangs up.
    fn poll_hang_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use arc_swap::ArcSwap;
    use http::{HeaderValue, Request};
    use http_body::{Frame, SizeHint};
    use http_body_util::{BodyExt, Full};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
    use tokio::time::timeout;

    use super::super::connection::run;
    use super::super::parking::MAX_ACTIVE;
    use super::super::registry::Registry;
    use super::super::test_responses::Own;
    use super::super::{CallerBody, Limits, ListenerContext, Peer};
    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    /// More than both ends of a socket hold.
    const LENGTH: usize = 2 << 20;
    const FRAME: usize = 10_000;
    const LONG: Duration = Duration::from_secs(20);

    /// A response body whose frames the test sends.
    struct Sent {
        frames: UnboundedReceiver<Result<Bytes>>,
        left: Option<u64>,
    }

    impl Body for Sent {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>>>> {
            let frame = ready!(self.frames.poll_recv(cx));
            if let (Some(Ok(data)), Some(left)) = (&frame, &mut self.left) {
                *left = left.saturating_sub(data.len() as u64);
            }
            Poll::Ready(frame.map(|frame| frame.map(Frame::data)))
        }

        fn size_hint(&self) -> SizeHint {
            self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
        }
    }

    /// A connection of a crowd that is being served, and the caller's end of it. The first response is `LENGTH` bytes
    /// long, and those after it are empty.
    struct Scene {
        registry: Arc<Registry>,
        caller: UnixStream,
        frames: Option<UnboundedSender<Result<Bytes>>>,
        sent: usize,
    }

    impl Scene {
        async fn start(length: Option<u64>, write_timeout: Duration) -> Self {
            Self::among(true, length, write_timeout).await
        }

        async fn among(crowded: bool, length: Option<u64>, write_timeout: Duration) -> Self {
            let (stream, caller) = UnixStream::pair().unwrap();
            let registry = Arc::<Registry>::default();
            if crowded {
                registry.parking().simulate_crowd();
            }
            let (frames, receives) = unbounded_channel();
            let first = Mutex::new(Some(Sent { frames: receives, left: length }));
            let handler = move |request: Request<CallerBody>, _: Peer| {
                tokio::spawn(request.into_body().collect());
                let empty = || Sent { frames: unbounded_channel().1, left: Some(0) };
                let body = first.lock().unwrap().take().unwrap_or_else(empty);
                // Pending once, because a request that waits for its response is what a parked connection would lose.
                async {
                    tokio::task::yield_now().await;
                    Response::new(body)
                }
            };
            let handler = Arc::new(handler);
            // The registry looks every 20 ms.
            let limits = Limits {
                max_connections: usize::MAX,
                header_timeout: Duration::from_millis(80),
                idle_timeout: Duration::from_secs(60),
                write_timeout,
            };
            let limits = Arc::new(ArcSwap::from_pointee(limits));
            let context = ListenerContext {
                handler: move |request, peer| handler(request, peer),
                registry: registry.clone(),
                own: Arc::new(Own),
                limits: limits.clone(),
                share: 100,
                keep_alive: Default::default(),
            };
            tokio::spawn(registry.clone().enforce(limits));
            tokio::spawn(run(stream, Peer::Unix(None), registry.register(), Arc::new(context)));
            Self { registry, caller, frames: Some(frames), sent: 0 }
        }

        /// Sends the next `length` bytes of the response.
        fn send(&mut self, length: usize) {
            let end = self.sent + length;
            while self.sent < end {
                let next = end.min(self.sent + FRAME);
                let data: Vec<u8> = (self.sent..next).map(byte).collect();
                self.frames.as_ref().unwrap().send(Ok(data.into())).unwrap();
                self.sent = next;
            }
        }

        async fn until_active(&self, wanted: usize) {
            let is_so = async {
                while self.registry.parking().active() != wanted {
                    tokio::task::yield_now().await;
                }
            };
            timeout(LONG, is_so).await.unwrap_or_else(|_| panic!("{} active", self.registry.parking().active()));
        }

        /// Waits until hyper has given up the connection, whose response is under way.
        async fn until_set_aside(&self) {
            self.until_active(MAX_ACTIVE + 1).await;
            self.until_active(MAX_ACTIVE).await;
        }

        async fn read_head(&mut self) -> String {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(timeout(LONG, self.caller.read_u8()).await.unwrap().unwrap());
            }
            String::from_utf8(head).unwrap()
        }

        /// Reads what follows of the first response until the connection is closed.
        async fn read_to_the_end(&mut self) -> usize {
            let mut body = Vec::new();
            // A reset is an end too.
            let _ = timeout(LONG, self.caller.read_to_end(&mut body)).await.expect("the connection stays open");
            assert!(body.iter().enumerate().all(|(position, read)| *read == byte(position)));
            body.len()
        }

        async fn until_nothing_is_open(&self) {
            let is_so = async {
                while self.registry.len() > 0 {
                    tokio::task::yield_now().await;
                }
            };
            timeout(LONG, is_so).await.expect("the connection stays open");
        }
    }

    fn byte(position: usize) -> u8 {
        (position % 251) as u8
    }

    #[tokio::test]
    async fn a_caller_that_pauses_gets_every_byte_and_the_responses_after_it() {
        let mut scene = Scene::start(Some(LENGTH as u64), LONG).await;
        scene.caller.write_all(&[REQUEST, REQUEST].concat()).await.unwrap();
        scene.send(LENGTH / 2);
        scene.until_set_aside().await;
        // Each time there is room, it is written at once.
        let mut body = vec![0; LENGTH / 2];
        assert!(scene.read_head().await.contains("content-length: 2097152\r\n"));
        scene.caller.read_exact(&mut body).await.unwrap();
        scene.send(LENGTH - LENGTH / 2);
        let mut rest = vec![0; LENGTH - LENGTH / 2];
        scene.caller.read_exact(&mut rest).await.unwrap();
        assert!(body.iter().chain(&rest).enumerate().all(|(position, read)| *read == byte(position)));
        assert!(scene.read_head().await.contains("content-length: 0\r\n"));
        scene.caller.write_all(REQUEST).await.unwrap();
        assert!(scene.read_head().await.contains("content-length: 0\r\n"));
    }

    #[tokio::test]
    async fn a_response_whose_end_is_still_to_come_is_not_left_out_for_the_next_one() {
        let mut scene = Scene::start(Some(LENGTH as u64), LONG).await;
        scene.caller.write_all(&[REQUEST, REQUEST].concat()).await.unwrap();
        // All of it at once, and nothing says that it was all.
        let all: Vec<u8> = (0..LENGTH).map(byte).collect();
        scene.frames.as_ref().unwrap().send(Ok(all.clone().into())).unwrap();
        scene.until_set_aside().await;
        scene.read_head().await;
        let mut body = vec![0; LENGTH];
        scene.caller.read_exact(&mut body).await.unwrap();
        assert!(body == all);
        assert!(scene.read_head().await.contains("content-length: 0\r\n"));
        assert!(scene.frames.unwrap().is_closed(), "nothing more of it is waited for");
    }

    #[tokio::test]
    async fn a_request_is_answered_that_begins_before_the_response_to_the_upload_before_it_was_written() {
        let mut scene = Scene::start(Some(LENGTH as u64), LONG).await;
        scene.caller.write_all(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nha").await.unwrap();
        // All of it at once, and nothing says that it was all.
        let all: Vec<u8> = (0..LENGTH).map(byte).collect();
        scene.frames.take().unwrap().send(Ok(all.clone().into())).unwrap();
        scene.read_head().await;
        // hyper reads this before it can write more.
        scene.caller.write_all(&[b"lf", REQUEST].concat()).await.unwrap();
        let mut body = vec![0; LENGTH];
        scene.caller.read_exact(&mut body).await.unwrap();
        assert!(body == all);
        assert!(scene.read_head().await.contains("content-length: 0\r\n"));
    }

    #[tokio::test]
    async fn a_caller_that_hangs_up_when_it_has_read_everything_so_far_is_noticed() {
        let mut scene = Scene::start(Some(LENGTH as u64), LONG).await;
        scene.caller.write_all(REQUEST).await.unwrap();
        scene.send(LENGTH / 2);
        scene.until_set_aside().await;
        scene.read_head().await;
        scene.caller.read_exact(&mut vec![0; LENGTH / 2]).await.unwrap();
        let frames = scene.frames.take().unwrap();
        drop(scene.caller);
        timeout(LONG, frames.closed()).await.expect("the body is held");
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_broken_off_after_what_came_before() {
        for breaks in [Some(Err(ErrorKind::Other.into())), None] {
            let mut scene = Scene::start(Some(LENGTH as u64), LONG).await;
            scene.caller.write_all(&[REQUEST, REQUEST].concat()).await.unwrap();
            scene.send(LENGTH / 2);
            scene.until_set_aside().await;
            breaks.into_iter().for_each(|error| scene.frames.as_ref().unwrap().send(error).unwrap());
            scene.frames = None;
            scene.read_head().await;
            assert_eq!(scene.read_to_the_end().await, LENGTH / 2);
        }
    }

    #[tokio::test]
    async fn nothing_of_a_body_that_is_too_long_is_taken_for_the_next_response() {
        let mut scene = Scene::start(Some(LENGTH as u64 / 2 + 1), LONG).await;
        scene.caller.write_all(REQUEST).await.unwrap();
        scene.send(LENGTH / 2);
        scene.until_set_aside().await;
        scene.send(FRAME);
        scene.read_head().await;
        let mut body = vec![0; LENGTH / 2 + 1];
        scene.caller.read_exact(&mut body).await.unwrap();
        scene.caller.write_all(REQUEST).await.unwrap();
        assert!(scene.read_head().await.starts_with("HTTP/1.1 200 OK\r\n"));
    }

    #[tokio::test]
    async fn at_a_shutdown_the_response_is_written_before_the_connection_is_closed() {
        let mut scene = Scene::start(Some(LENGTH as u64), LONG).await;
        scene.caller.write_all(REQUEST).await.unwrap();
        scene.send(LENGTH);
        scene.until_set_aside().await;
        let registry = scene.registry.clone();
        registry.drain();
        tokio::join!(registry.close_all(), async {
            scene.read_head().await;
            assert_eq!(scene.read_to_the_end().await, LENGTH);
            scene.caller.shutdown().await.unwrap();
        });
    }

    #[tokio::test]
    async fn a_response_is_broken_off_when_the_shutdown_has_no_more_time() {
        let mut scene = Scene::start(Some(LENGTH as u64), LONG).await;
        scene.caller.write_all(REQUEST).await.unwrap();
        scene.send(LENGTH);
        scene.until_set_aside().await;
        scene.registry.abort_all();
        scene.until_nothing_is_open().await;
        scene.read_head().await;
        assert!(scene.read_to_the_end().await < LENGTH);
    }

    #[tokio::test]
    async fn a_caller_that_hangs_up_or_reads_nothing_for_write_timeout_is_given_up() {
        for hangs_up in [true, false] {
            let write_timeout = if hangs_up { LONG } else { Duration::from_secs(1) };
            let mut scene = Scene::start(Some(LENGTH as u64), write_timeout).await;
            scene.caller.write_all(REQUEST).await.unwrap();
            scene.send(LENGTH / 2);
            scene.until_set_aside().await;
            let frames = scene.frames.take().unwrap();
            if hangs_up {
                scene.caller.shutdown().await.unwrap();
            }
            timeout(LONG, frames.closed()).await.expect("the body is held");
            if !hangs_up {
                scene.until_nothing_is_open().await;
            }
        }
    }

    #[tokio::test]
    async fn hyper_keeps_a_response_without_a_crowd_or_a_length_or_after_which_the_connection_is_closed() {
        let length = Some(LENGTH as u64);
        for (crowded, length, request) in [
            (false, length, REQUEST),
            (true, None, REQUEST),
            (true, length, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"),
            (true, length, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
            (true, length, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf"),
            (true, length, b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ] {
            let mut scene = Scene::among(crowded, length, Duration::from_secs(2)).await;
            scene.caller.write_all(request).await.unwrap();
            scene.send(LENGTH / 2);
            let active = if crowded { MAX_ACTIVE + 1 } else { 1 };
            scene.until_active(active).await;
            let frames = scene.frames.take().unwrap();
            // Until the caller is given up, which is long after others would have been set aside.
            while !frames.is_closed() {
                assert_eq!(scene.registry.parking().active(), active, "{}", String::from_utf8_lossy(request));
                tokio::task::yield_now().await;
            }
        }
    }

    #[test]
    fn a_response_has_a_length_if_its_head_says_no_other() {
        let response = |said: &'static str| {
            let mut response = Response::new(Full::new(Bytes::from_static(b"hello")));
            if !said.is_empty() {
                response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static(said));
            }
            has_length(&response)
        };
        assert_eq!(["", "5", "4", "6", "five"].map(response), [true, true, false, false, false]);
    }
}
