//! A socket that is read far ahead while much comes.
//!
//! rustls asks for 4 KiB at a time: four system calls for one TLS record of a download. So where a read came back full the
//! next one takes all that the kernel has, up to [`AHEAD`]. Small answers pass straight through, and an idle connection
//! holds no buffer.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop::poll_proceed;
use tokio_util::io::poll_read_buf;

/// Four TLS records: more saves few system calls, and pushes other things out of the processor's cache.
const AHEAD: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Ahead<S> {
    socket: S,
    /// Was read and not asked for yet.
    ahead: BytesMut,
    much: bool,
    /// Whether others had their turn since the last piece.
    yielded: bool,
}

impl<S> Ahead<S> {
    pub(super) fn new(socket: S) -> Self {
        Self { socket, ahead: BytesMut::new(), much: false, yielded: false }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Ahead<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let Self { socket, ahead, much, yielded } = &mut *self;
        let mut socket = Pin::new(socket);
        if ahead.is_empty() {
            if !*much {
                ready!(socket.as_mut().poll_read(cx, into))?;
                *much = into.remaining() == 0;
                return Poll::Ready(Ok(()));
            }
            // Whoever waits for the piece before passes it on while it is still in the processor's cache.
            if !std::mem::replace(yielded, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            *yielded = false;
            ahead.reserve(AHEAD);
            let read = poll_read_buf(socket, cx, ahead);
            if read.is_pending() {
                *ahead = BytesMut::new();
                *much = false;
            }
            ready!(read)?;
        }
        // What is handed out from memory counts like a read: a host that floods us would hold the thread otherwise.
        ready!(poll_proceed(cx)).made_progress();
        let part = ahead.len().min(into.remaining());
        into.put_slice(&ahead[..part]);
        ahead.advance(part);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Ahead<S> {
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

    /// A socket in which so many bytes lie, and that counts how often it is read.
    struct Lying(Vec<u8>, usize);

    impl AsyncRead for Lying {
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

    fn lying(bytes: usize) -> (Vec<u8>, Ahead<Lying>) {
        let bytes: Vec<u8> = (0..bytes).map(|at| (at / 7) as u8).collect();
        (bytes.clone(), Ahead::new(Lying(bytes, 0)))
    }

    /// What comes in pieces of 4 KiB until nothing does, not even at the next turn.
    async fn drained(socket: &mut Ahead<Lying>) -> Vec<u8> {
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
    async fn a_download_is_read_in_few_pieces_and_comes_whole() {
        let (sent, mut socket) = lying(4096 + AHEAD + 5000);
        assert_eq!(drained(&mut socket).await, sent);
        assert_eq!(socket.socket.1, 4, "the first piece, all that fits, the rest, and nothing");
        assert_eq!(socket.ahead.capacity(), 0, "an idle connection holds no buffer");
    }

    #[tokio::test]
    async fn who_reads_without_end_is_made_to_yield() {
        let (_, mut socket) = lying(4 << 20);
        let (mut read, mut piece) = (0, [0; 4096]);
        while let Poll::Ready(part) = futures_util::poll!(std::pin::pin!(socket.read(&mut piece))) {
            read += part.unwrap();
        }
        assert!(read < 1 << 20, "{read} bytes in one turn");
    }

    #[tokio::test]
    async fn a_small_answer_passes_straight_through() {
        let (sent, mut socket) = lying(1500);
        assert_eq!(drained(&mut socket).await, sent);
        assert_eq!(socket.socket.1, 3, "the answer, and nothing, twice");
        assert_eq!(socket.ahead.capacity(), 0);
    }
}
