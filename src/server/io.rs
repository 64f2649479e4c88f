//! The two places where a connection tells what it is doing: its socket and its answers' bodies.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::registry::{Activity, Busy};

/// A socket that tells when bytes come, and when it takes none.
#[derive(Debug)]
pub(super) struct Watched<S> {
    socket: S,
    activity: Arc<Activity>,
    sticks: bool,
    /// What was read, given back, and is to be read again.
    unread: Bytes,
}

impl<S> Watched<S> {
    pub(super) fn new(socket: S, activity: Arc<Activity>) -> Self {
        Self { socket, activity, sticks: false, unread: Bytes::new() }
    }

    /// Makes `bytes` what is read next.
    pub(super) fn unread(&mut self, bytes: &[u8]) {
        // Copied, as even where there are none they lie in a buffer of hyper's.
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

    /// Tells only of changes, so that an answer that flows costs nothing.
    fn told(&mut self, written: Poll<Result<usize>>) -> Poll<Result<usize>> {
        if written.is_pending() != self.sticks {
            self.sticks = written.is_pending();
            self.activity.sticks(self.sticks);
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
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
            self.activity.bytes_came();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.told(written)
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
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, parts);
        self.told(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

/// An answer's body that keeps its connection marked busy until it has passed. Nothing more is taken of it while the socket
/// takes nothing: hyper would hold 64 KiB for each caller who does not read.
#[derive(Debug)]
pub(super) struct Guarded<B> {
    body: B,
    busy: Busy,
}

impl<B> Guarded<B> {
    pub(super) fn new(body: B, busy: Busy) -> Self {
        Self { body, busy }
    }
}

impl<B: Body + Unpin> Body for Guarded<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<B::Data>, B::Error>>> {
        ready!(self.busy.poll_takes(cx));
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::task::{ArcWake, waker};
    use http_body_util::Full;

    use super::super::registry::Connections;
    use super::*;

    struct Woken(std::sync::atomic::AtomicBool);

    impl ArcWake for Woken {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    #[test]
    // Covers: threat 25.
    fn nothing_more_is_taken_of_an_answer_whose_caller_takes_nothing() {
        let connections = Arc::<Connections>::default();
        let seat = connections.sit();
        let mut body = Guarded::new(Full::new(Bytes::from_static(b"answer")), seat.begin());
        let woken = Arc::new(Woken(false.into()));
        let waker = waker(woken.clone());
        let cx = &mut Context::from_waker(&waker);
        seat.activity().sticks(true);
        assert!(Pin::new(&mut body).poll_frame(cx).is_pending());
        assert!(!woken.0.load(std::sync::atomic::Ordering::Relaxed));
        seat.activity().sticks(false);
        assert!(woken.0.load(std::sync::atomic::Ordering::Relaxed), "whoever waits is told");
        assert!(matches!(Pin::new(&mut body).poll_frame(cx), Poll::Ready(Some(Ok(_)))));
    }
}
