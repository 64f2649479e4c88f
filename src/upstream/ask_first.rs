//! A TLS stream that is not read again while its socket is silent.
//!
//! hyper looks for data several times per request, mostly in vain. TLS then passes through all its layers to find out
//! what the socket alone can tell: once a read has found nothing, TLS holds nothing either, and the socket is asked
//! first.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::client::TlsStream;

/// Something that can tell cheaply whether a read may find anything.
pub(super) trait Readable {
    /// Ready unless a read would certainly find nothing; otherwise the task is woken once that changes.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<()>>;
}

impl<S: Readable> Readable for TlsStream<S> {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_ref().0.poll_readable(cx)
    }
}

/// A stream whose socket is asked before a read if the last one found nothing.
#[derive(Debug)]
pub(super) struct AskFirst<S> {
    stream: S,
    /// Whether the last read found nothing.
    silent: bool,
}

impl<S> AskFirst<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, silent: false }
    }
}

impl<S: AsyncRead + Readable + Unpin> AsyncRead for AskFirst<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        if self.silent {
            ready!(self.stream.poll_readable(cx))?;
        }
        let read = Pin::new(&mut self.stream).poll_read(cx, into);
        self.silent = read.is_pending();
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AskFirst<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::io::AsyncReadExt;

    use super::*;

    /// A stream that returns these pieces, one for each read, while its socket can be read; and the number of reads.
    struct Scripted {
        pieces: Vec<&'static [u8]>,
        readable: Cell<bool>,
        reads: usize,
    }

    impl AsyncRead for Scripted {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
            self.reads += 1;
            let Some(piece) = self.pieces.pop() else { return Poll::Pending };
            into.put_slice(piece);
            Poll::Ready(Ok(()))
        }
    }

    impl Readable for Scripted {
        fn poll_readable(&self, _: &mut Context<'_>) -> Poll<Result<()>> {
            if self.readable.get() { Poll::Ready(Ok(())) } else { Poll::Pending }
        }
    }

    async fn read(stream: &mut AskFirst<Scripted>) -> Option<Vec<u8>> {
        let mut space = [0; 8];
        match futures_util::poll!(std::pin::pin!(stream.read(&mut space))) {
            Poll::Ready(length) => Some(space[..length.unwrap()].to_vec()),
            Poll::Pending => None,
        }
    }

    #[tokio::test]
    async fn what_tls_still_holds_is_read_although_the_socket_is_silent() {
        let stream = Scripted { pieces: vec![b"two", b"one"], readable: Cell::new(false), reads: 0 };
        let mut stream = AskFirst::new(stream);
        assert_eq!(read(&mut stream).await.as_deref(), Some(&b"one"[..]));
        assert_eq!(read(&mut stream).await.as_deref(), Some(&b"two"[..]));
    }

    #[tokio::test]
    async fn a_silent_socket_is_asked_instead_of_tls_and_its_next_data_is_read() {
        let stream = Scripted { pieces: vec![b"one"], readable: Cell::new(false), reads: 0 };
        let mut stream = AskFirst::new(stream);
        assert!(read(&mut stream).await.is_some());
        for _ in 0..5 {
            assert!(read(&mut stream).await.is_none());
        }
        assert_eq!(stream.stream.reads, 2, "the data, and once in vain");
        stream.stream.pieces.push(b"two");
        stream.stream.readable.set(true);
        assert_eq!(read(&mut stream).await.as_deref(), Some(&b"two"[..]));
    }
}
