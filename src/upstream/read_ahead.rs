//! A socket wrapper that reads ahead during large transfers.
//!
//! rustls reads 4 KiB at a time, which costs four system calls per TLS record of a download. After a read that filled
//! its buffer, the next one therefore reads everything that the kernel has, up to [`READ_AHEAD`]. Small responses are
//! not buffered, and an idle connection holds no buffer.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop::poll_proceed;
use tokio_util::io::poll_read_buf;

use super::activity::Activity;
use super::ask_first::Readable;

/// Largest read, in bytes: four TLS records. Larger reads save few system calls and evict other data from the
/// processor's cache.
const READ_AHEAD: usize = 64 << 10;

/// A socket that is read ahead of its consumer during large transfers.
#[derive(Debug)]
pub(super) struct ReadAhead<S> {
    socket: S,
    /// Bytes that were read but not requested yet.
    ahead: BytesMut,
    /// Whether the last read filled its buffer, so that a large transfer is likely.
    bulk: bool,
    /// Whether this task yielded to others since the last large read.
    yielded: bool,
    /// When the socket was last read, once somebody wants to know.
    activity: Option<Arc<Activity>>,
}

impl<S> ReadAhead<S> {
    pub(super) fn new(socket: S) -> Self {
        Self { socket, ahead: BytesMut::new(), bulk: false, yielded: false, activity: None }
    }

    pub(super) fn get_ref(&self) -> &S {
        &self.socket
    }

    /// When the socket was last read, from now on.
    pub(super) fn activity(&mut self) -> Arc<Activity> {
        self.activity.get_or_insert_with(Activity::now).clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let Self { socket, ahead, bulk, yielded, activity } = &mut *self;
        let mut socket = Pin::new(socket);
        if ahead.is_empty() {
            if !*bulk {
                ready!(socket.as_mut().poll_read(cx, into))?;
                activity.iter().for_each(|activity| activity.touch());
                *bulk = into.remaining() == 0;
                return Poll::Ready(Ok(()));
            }
            // Yield first, so that the previous piece is forwarded while it is still in the processor's cache.
            if !std::mem::replace(yielded, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            *yielded = false;
            ahead.reserve(READ_AHEAD);
            let read = poll_read_buf(socket, cx, ahead);
            if read.is_pending() {
                *ahead = BytesMut::new();
                *bulk = false;
            }
            ready!(read)?;
            activity.iter().for_each(|activity| activity.touch());
        }
        // Count data from memory against tokio's budget like a read; otherwise a host that sends without pause would
        // occupy the thread.
        ready!(poll_proceed(cx)).made_progress();
        let part = ahead.len().min(into.remaining());
        into.put_slice(&ahead[..part]);
        ahead.advance(part);
        Poll::Ready(Ok(()))
    }
}

impl<S: Readable> Readable for ReadAhead<S> {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        // What was read ahead is there; and a large transfer pauses by itself, without waiting for the socket.
        if self.bulk || !self.ahead.is_empty() { Poll::Ready(Ok(())) } else { self.socket.poll_readable(cx) }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
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
        Pin::new(&mut self.socket).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    /// A socket with these bytes available, and the number of reads so far.
    struct Available(Vec<u8>, usize);

    impl AsyncRead for Available {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
            self.1 += 1;
            if self.0.is_empty() {
                return Poll::Pending;
            }
            let part = self.0.len().min(into.remaining());
            into.put_slice(&self.0.drain(..part).collect::<Vec<_>>());
            Poll::Ready(Ok(()))
        }
    }

    impl Readable for Available {
        fn poll_readable(&self, _: &mut Context<'_>) -> Poll<Result<()>> {
            if self.0.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) }
        }
    }

    fn available(bytes: usize) -> (Vec<u8>, ReadAhead<Available>) {
        let bytes: Vec<u8> = (0..bytes).map(|at| (at / 7) as u8).collect();
        (bytes.clone(), ReadAhead::new(Available(bytes, 0)))
    }

    /// Reads pieces of 4 KiB until two consecutive polls return nothing.
    async fn drained(socket: &mut ReadAhead<Available>) -> Vec<u8> {
        let (mut all, mut piece, mut pauses) = (Vec::new(), [0; 4096], 0);
        while pauses < 2 {
            match futures_util::poll!(std::pin::pin!(socket.read(&mut piece))) {
                Poll::Ready(read) => {
                    all.extend(&piece[..read.unwrap()]);
                    pauses = 0;
                }
                Poll::Pending => pauses += 1,
            }
        }
        all
    }

    #[tokio::test]
    async fn a_download_is_read_in_few_large_reads_and_completely() {
        let (sent, mut socket) = available(4096 + READ_AHEAD + 5000);
        assert_eq!(drained(&mut socket).await, sent);
        assert_eq!(socket.socket.1, 4, "the first piece, a full buffer, the rest, and a read that finds nothing");
        assert_eq!(socket.ahead.capacity(), 0, "an idle connection holds no buffer");
    }

    #[tokio::test]
    async fn what_was_read_ahead_can_be_read_although_the_socket_is_empty() {
        let (_, mut socket) = available(4096 + 5000);
        let (mut piece, mut whole) = ([0; 4096], 0);
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        while whole < 4096 + 5000 {
            assert!(socket.poll_readable(cx).is_ready(), "{whole}");
            if let Poll::Ready(read) = futures_util::poll!(std::pin::pin!(socket.read(&mut piece))) {
                whole += read.unwrap();
            }
        }
        // It pauses once, and then finds nothing.
        for _ in 0..2 {
            assert!(futures_util::poll!(std::pin::pin!(socket.read(&mut piece))).is_pending());
        }
        assert!(socket.poll_readable(cx).is_pending());
    }

    #[tokio::test]
    async fn a_continuous_download_yields_to_other_tasks() {
        let (_, mut socket) = available(4 << 20);
        let (mut read, mut piece) = (0, [0; 4096]);
        while let Poll::Ready(part) = futures_util::poll!(std::pin::pin!(socket.read(&mut piece))) {
            read += part.unwrap();
        }
        assert!(read < 1 << 20, "{read} bytes in one turn");
    }

    #[tokio::test]
    async fn a_small_response_is_not_buffered() {
        let (sent, mut socket) = available(1500);
        assert_eq!(drained(&mut socket).await, sent);
        assert_eq!(socket.socket.1, 3, "the response, and two reads that find nothing");
        assert_eq!(socket.ahead.capacity(), 0);
    }
}
