//! One connection, from accept to close.
//!
//! hyper holds two buffers of 8 KiB for a connection, and more beside them. So where there are many, it is given one only while
//! that is used: at rest, a connection is a socket and a waker.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::Result;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::io::{Guarded, Watched};
use super::registry::{Command, Slot};
use super::{Host, Peer, head};

/// Largest head of a request, exact (the size of the read buffer alone is a soft bound).
const MAX_HEAD: usize = 32 << 10;
/// Read buffer of one connection, at most.
const MAX_BUFFER: usize = 64 << 10;
/// How long a caller may go on sending a body that was refused. A socket that is closed with bytes unread resets the
/// connection, and the caller would never see the answer (RFC 9112, section 9.6).
const LINGER: Duration = Duration::from_secs(2);

/// What a connection is made of.
pub(super) trait Socket: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static {
    /// Whether there is something to read, or an end, told without a buffer to read it into.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<()>>;
}

impl Socket for TcpStream {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.poll_read_ready(cx)
    }
}

impl Socket for UnixStream {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.poll_read_ready(cx)
    }
}

/// Where a conversation has come to.
enum Turn<S, V> {
    /// It pauses.
    Pause(Watched<S>, V),
    /// A head did not come to its end.
    Late(S),
    /// It is over.
    Over(S),
    /// There is nobody to say anything to.
    Reset,
}

pub(super) async fn converse<S, H, F, B>(stream: S, peer: Peer, seat: Slot, host: Host<H>)
where
    S: Socket,
    H: Fn(Request<Incoming>, Peer) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Host { handler, words, .. } = host;
    let uploads = AtomicBool::new(false);
    let mut service = service_fn(|request: Request<Incoming>| {
        let busy = seat.begin();
        uploads.store(!request.is_end_stream(), Relaxed);
        let request = head::copied(request);
        let (handler, seat) = (&handler, &seat);
        // Boxed, so that an idle connection does not hold the room of a busy one; and called in the box, as what is called
        // before it would be moved there, with all its room.
        Box::pin(async move {
            let mut response = handler(request, peer).await.map(|body| Guarded::new(body, busy));
            if seat.leaving() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        })
    });
    let mut socket = Watched::new(stream, seat.activity());
    let mut leaving = false;
    // Boxed for the same reason as the answer.
    let (socket, last_words) = loop {
        let turn = Box::pin(talk(socket, service, &seat, &uploads, &mut leaving)).await;
        (socket, service) = match turn {
            Turn::Pause(socket, service) => (socket, service),
            Turn::Late(socket) => break (socket, Some(words.late)),
            Turn::Over(socket) => break (socket, None),
            Turn::Reset => {
                tracing::debug!(?peer, "a caller takes nothing of its answer: its connection is reset");
                return;
            }
        };
        if !socket.has_unread() && !rest(&socket, &seat).await {
            break (socket.into_inner(), None);
        }
    };
    Box::pin(end(socket, last_words, uploads.into_inner() && !leaving)).await;
}

/// Has hyper serve the connection until that ends, or may rest. Long because it is one loop over what a connection can be told,
/// all of whose ends take the socket back out of hyper.
async fn talk<S, V, B>(
    socket: Watched<S>,
    service: V,
    seat: &Slot,
    uploads: &AtomicBool,
    leaving: &mut bool,
) -> Turn<S, V>
where
    S: Socket,
    V: HttpService<Incoming, ResBody = B> + Unpin,
    V::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let _awake = seat.wake();
    let mut builder = http1::Builder::new();
    builder.half_close(false).auto_date_header(false).max_header_size(MAX_HEAD).max_buf_size(MAX_BUFFER);
    let mut connection = builder.serve_connection(TokioIo::new(socket), service);
    let into_socket = |parts: http1::Parts<TokioIo<Watched<S>>, V>| parts.io.into_inner().into_inner();
    loop {
        let served = poll_fn(|cx| match connection.poll_without_shutdown(cx) {
            Poll::Ready(ended) => Poll::Ready(Some(ended)),
            // hyper has just been asked, so that what it was given is written. It may still be reading a body whose request
            // is answered already, and is not interrupted in that.
            Poll::Pending if seat.may_rest() && !uploads.load(Relaxed) && !*leaving => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        let command = tokio::select! {
            biased;
            served = served => match served {
                None => {
                    let parts = connection.into_parts();
                    let mut socket = parts.io.into_inner();
                    // The beginning of a head that came together with the one before it.
                    socket.unread(&parts.read_buf);
                    return Turn::Pause(socket, parts.service);
                }
                Some(ended) => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "connection ended");
                    }
                    return Turn::Over(into_socket(connection.into_parts()));
                }
            },
            command = seat.command() => command,
        };
        match command {
            // A head that has begun may still come to its end, in its time.
            Command::Leave => {
                *leaving = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            // hyper has written nothing yet for the head that did not come.
            Command::HeadTimeout if seat.is_in_head() => return Turn::Late(into_socket(connection.into_parts())),
            // It came to its end just now.
            Command::HeadTimeout => {}
            Command::Abandon => {
                // What it did not take is not kept for it, neither here nor by the kernel.
                let socket = into_socket(connection.into_parts());
                let _ = rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
                return Turn::Reset;
            }
        }
    }
}

/// Waits until there is something to read; `false` where the connection is told to go before that.
async fn rest<S: Socket>(socket: &Watched<S>, seat: &Slot) -> bool {
    loop {
        tokio::select! {
            biased;
            // Whatever is wrong with it is found when it is read.
            _ = poll_fn(|cx| socket.get_ref().poll_readable(cx)) => return true,
            command = seat.command() => match command {
                Command::Leave => return false,
                Command::HeadTimeout | Command::Abandon => {}
            },
        }
    }
}

/// Says the last words and closes; with `linger` after what still comes has been read for a moment.
pub(super) async fn end(mut socket: impl AsyncRead + AsyncWrite + Unpin, last_words: Option<Bytes>, linger: bool) {
    if let Some(last_words) = last_words {
        // Who reads nothing at all does not hear it.
        let _ = tokio::time::timeout(LINGER, socket.write_all(&last_words)).await;
    }
    let _ = socket.shutdown().await;
    if linger {
        let _ = tokio::time::timeout(LINGER, tokio::io::copy(&mut socket, &mut tokio::io::sink())).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::time::Instant;

    use http_body_util::{BodyExt, Full};
    use tokio::io::AsyncReadExt;

    use super::super::CannedResponses;
    use super::super::registry::{Connections, MOST_AWAKE};
    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";

    /// A conversation, and the caller's end of it.
    struct Scene {
        connections: Arc<Connections>,
        caller: UnixStream,
        calls: Arc<AtomicUsize>,
    }

    impl Scene {
        fn begin(crowded: bool) -> Self {
            let (stream, caller) = UnixStream::pair().unwrap();
            let (connections, calls) = (Arc::<Connections>::default(), Arc::<AtomicUsize>::default());
            if crowded {
                connections.crowd();
            }
            let counted = calls.clone();
            let handler = move |request: Request<Incoming>, _: Peer| {
                counted.fetch_add(1, Relaxed);
                // Read on behind the answer.
                tokio::spawn(request.into_body().collect());
                async { Response::new(Full::from("hi")) }
            };
            let words = CannedResponses { late: Bytes::from_static(b"late"), overloaded: Bytes::new() };
            let host = Host { handler, connections: connections.clone(), words };
            let conversation = converse(stream, Peer::Unix(None), connections.sit(), host);
            // Ten thousand of them are held beside an app.
            let size = std::mem::size_of_val(&conversation);
            assert!(size <= 800, "{size} bytes");
            tokio::spawn(conversation);
            Self { connections, caller, calls }
        }

        async fn say(&mut self, words: &[u8]) {
            self.caller.write_all(words).await.unwrap();
        }

        async fn hear(&mut self, words: &[u8]) {
            let mut heard = vec![0; words.len()];
            self.caller.read_exact(&mut heard).await.unwrap();
            assert_eq!(heard, words);
        }

        async fn hear_the_end(&mut self) {
            assert_eq!(self.caller.read(&mut [0]).await.unwrap(), 0);
        }

        async fn until(&self, what: &str, look: impl Fn(&Connections) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !look(&self.connections) {
                assert!(Instant::now() < deadline, "{what}: it did not come");
                tokio::task::yield_now().await;
            }
        }

        async fn comes_to_rest(&self) {
            self.until("rest", |connections| connections.awake() == MOST_AWAKE).await;
        }
    }

    #[tokio::test]
    async fn a_connection_at_rest_answers_the_next_request() {
        let mut scene = Scene::begin(true);
        for _ in 0..3 {
            scene.comes_to_rest().await;
            scene.say(REQUEST).await;
            scene.hear(ANSWER).await;
        }
    }

    #[tokio::test]
    async fn few_connections_stay_awake() {
        let mut scene = Scene::begin(false);
        scene.say(REQUEST).await;
        scene.hear(ANSWER).await;
        assert_eq!(scene.connections.awake(), 1);
    }

    #[tokio::test]
    async fn what_came_of_the_next_head_is_not_lost_to_a_rest() {
        let mut scene = Scene::begin(true);
        let (begun, rest) = REQUEST.split_at(9);
        scene.say(&[REQUEST, REQUEST, begun].concat()).await;
        scene.hear(ANSWER).await;
        scene.hear(ANSWER).await;
        scene.until("a head", Connections::any_in_head).await;
        scene.say(rest).await;
        scene.hear(ANSWER).await;
        scene.comes_to_rest().await;
    }

    #[tokio::test]
    async fn a_connection_whose_body_may_still_come_does_not_rest() {
        let mut scene = Scene::begin(true);
        scene.comes_to_rest().await;
        scene.say(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nGET").await;
        // It is answered before its body has come, whose end is no head.
        scene.hear(ANSWER).await;
        assert_eq!(scene.connections.awake(), MOST_AWAKE + 1);
        scene.say(b" ").await;
        scene.say(REQUEST).await;
        scene.hear(ANSWER).await;
        assert_eq!(scene.calls.load(Relaxed), 2);
    }

    #[tokio::test]
    async fn a_caller_that_goes_at_rest_is_let_go() {
        let mut scene = Scene::begin(true);
        scene.comes_to_rest().await;
        scene.caller.shutdown().await.unwrap();
        scene.until("the end", |connections| connections.len() == 0).await;
    }

    #[tokio::test]
    async fn a_connection_at_rest_is_closed_when_everybody_leaves() {
        let mut scene = Scene::begin(true);
        scene.comes_to_rest().await;
        let connections = scene.connections.clone();
        tokio::join!(connections.emptied(), scene.hear_the_end());
    }
}
