//! The last look at a reused HTTP/1.1 connection, just before a request that may not be repeated is written to it.
//!
//! A server may close a connection at any time, and HTTP/1.1 has no word for "I did not process this" (RFC 9112,
//! section 9.3.1). What it sent on an idle connection (its end, a TLS alert, a `408`) is known to the kernel at once,
//! but to the task that runs the connection only after a while if the machine is busy: milliseconds in which requests
//! would be lost. So the socket itself is asked, in the moment of the first write, and a request that then stays
//! unwritten may be repeated whatever its method is.
//!
//! What remains is the time that the request is under way. Over HTTP/2 nothing remains: there the server says what it
//! did not process.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::ask_first::Readable;

/// Asks for a look at the socket before the next write.
#[derive(Clone, Debug, Default)]
pub(super) struct LastLook(Arc<AtomicBool>);

impl LastLook {
    /// The next write begins a request that may not be repeated.
    pub(super) fn ask(&self) {
        self.0.store(true, Relaxed);
    }
}

/// Nothing was written, because the server had closed the connection or sent something that nobody asked for.
#[derive(Debug, thiserror::Error)]
#[error("the server had closed the connection before the request was written")]
pub(super) struct ClosedBefore;

/// A socket that is looked at before a write if [`LastLook`] asks for it.
#[derive(Debug)]
pub(super) struct LookedAt {
    socket: TcpStream,
    look: LastLook,
}

impl LookedAt {
    pub(super) fn new(socket: TcpStream) -> Self {
        Self { socket, look: LastLook::default() }
    }

    pub(super) fn look(&self) -> &LastLook {
        &self.look
    }

    /// # Errors
    /// [`ClosedBefore`] if a look was asked for, and the server has sent something or closed the connection.
    fn look_if_asked(&self) -> Result<()> {
        // A swap would cost every write of an upload more than this.
        if !self.look.0.load(Relaxed) {
            return Ok(());
        }
        self.look.0.store(false, Relaxed);
        match recv(&self.socket, &mut [0_u8][..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => Ok(()),
            Ok(_) | Err(_) => Err(Error::new(ErrorKind::ConnectionAborted, ClosedBefore)),
        }
    }
}

impl Readable for LookedAt {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.socket.poll_read_ready(cx)
    }
}

impl AsyncRead for LookedAt {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, into)
    }
}

impl AsyncWrite for LookedAt {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.look_if_asked()?;
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
        self.look_if_asked()?;
        Pin::new(&mut self.socket).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (LookedAt, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (LookedAt::new(ours), listener.accept().await.unwrap().0)
    }

    /// Writes without giving the runtime a chance to notice what the other end did.
    fn write_now(socket: &mut LookedAt, bytes: &[u8]) -> Result<usize> {
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        match Pin::new(socket).poll_write(cx, bytes) {
            Poll::Ready(written) => written,
            Poll::Pending => panic!("a new socket accepts a few bytes"),
        }
    }

    #[tokio::test]
    async fn a_request_is_not_written_to_a_connection_on_which_the_server_has_spoken_or_that_it_has_closed() {
        for speaks in [true, false] {
            let (mut ours, mut theirs) = pair().await;
            // tokio learns now that the socket can be written to.
            ours.write_all(b"first").await.unwrap();
            theirs.read_exact(&mut [0; 5]).await.unwrap();
            if speaks {
                theirs.write_all(b"HTTP/1.1 408 ").await.unwrap();
            } else {
                theirs.shutdown().await.unwrap();
            }
            ours.look().ask();
            let error = write_now(&mut ours, b"request").unwrap_err();
            assert!(error.get_ref().unwrap().is::<ClosedBefore>(), "{error:?}");
            drop(ours);
            let mut arrived = Vec::new();
            // A reset, if something was left unread, is fine too.
            let _ = theirs.read_to_end(&mut arrived).await;
            assert!(arrived.is_empty(), "nothing of it was written: {arrived:?}");
        }
    }

    #[tokio::test]
    async fn a_silent_connection_is_written_to_and_only_the_first_write_looks() {
        let (mut ours, mut theirs) = pair().await;
        ours.write_all(b"first").await.unwrap();
        ours.look().ask();
        assert_eq!(write_now(&mut ours, b"request").unwrap(), 7);
        // An early response does not stop the rest of the request.
        theirs.write_all(b"HTTP/1.1 200 ").await.unwrap();
        assert_eq!(write_now(&mut ours, b" body").unwrap(), 5);
        let mut arrived = [0; 17];
        theirs.read_exact(&mut arrived).await.unwrap();
        assert_eq!(&arrived, b"firstrequest body");
    }
}
