//! One connection, from accept to close: served by hyper, or idle and [parked](super::parking).

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::Result;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{HeaderMap, Request, Response, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::caller_body::CallerBody;
use super::io::{BusyBody, MonitoredSocket, detach};
use super::registry::{Command, Slot};
use super::set_aside::{SetAside, Written, has_length};
use super::tunnel::{Tunnel, TunnelState};
use super::{OwnResponses, Peer};

/// Largest request head, in bytes. The limit is exact; the size of the read buffer alone would be approximate.
const MAX_HEAD: usize = 32 << 10;
/// A line of a head that is longer is the request line, whose target is then longer than any that is served.
const MAX_LINE: usize = 16 << 10;
/// Largest read buffer of one connection, in bytes.
const MAX_BUFFER: usize = 64 << 10;
/// How long a caller may continue to send after its last response. Closing a socket with unread bytes resets the
/// connection, and the caller might never see the response (RFC 9112, section 9.6).
const LINGER: Duration = Duration::from_secs(2);

/// Tells a client how long the connection stays open without a request, so that it does not send one just as the
/// connection is closed (RFC 9112, section 9.3, leaves the parameters to the implementations; Node and others read it).
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
/// The media type of server-sent events, in lower case.
const EVENT_STREAM: &[u8] = b"text/event-stream";

/// The stream of a connection: TCP or Unix.
pub(super) trait Socket: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static {
    /// Ready when there is data to read or the peer closed the stream. It needs no read buffer.
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

/// Why [`serve_http`] returned.
enum Served<S, V, B: Body> {
    /// The connection is idle and may be parked.
    Idle(MonitoredSocket<S>, V),
    /// A request head was not complete in time.
    HeadTimeout(MonitoredSocket<S>),
    /// The parser rejected a request; its response was held back.
    Refused(MonitoredSocket<S>, Blame),
    /// HTTP on the connection has ended; the socket has to be closed.
    Ended(MonitoredSocket<S>),
    /// A response broke off.
    Broken(MonitoredSocket<S>),
    /// The caller reads slowly: the response is written without hyper from now on.
    SetAside(Box<SetAside<S, V, B>>),
    /// The caller does not read; the socket was reset.
    Reset,
}

/// Why the parser rejected a request, as far as that can be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blame {
    /// A character of the target.
    Target,
    /// The length of the request line.
    LongLine,
    Unknown,
}

/// Serves one connection until it is closed.
// The function is long because it lists every way in which a connection can end, and what the caller then sees.
pub(super) async fn run<S, H, F, B>(stream: S, peer: Peer, slot: Slot, context: Arc<super::ListenerContext<H>>)
where
    S: Socket,
    H: Fn(Request<CallerBody>, Peer) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + Unpin,
{
    // Boxed, as are the futures below: an idle connection has to be small.
    let tunnel = Box::new(TunnelState::default());
    let mut service = service_fn(|mut request: Request<Incoming>| {
        let version = request.version();
        let (busy, uploading) = slot.begin_request(version == Version::HTTP_10, !request.is_end_stream());
        detach(&mut request);
        tunnel.unwrap(&mut request);
        let wanted = Tunnel::wanted(&request);
        let (parts, incoming) = request.into_parts();
        let keeps_alive = version == Version::HTTP_11 && !asks_to_close(&parts.headers);
        // hyper closes the connection after some of these requests, and does not say which.
        let may_close = parts.headers.contains_key(TRANSFER_ENCODING);
        let (body, remainder) = CallerBody::new(incoming, uploading, &parts.headers);
        let request = Request::from_parts(parts, body);
        let (context, slot, tunnel) = (&context, &slot, &tunnel);
        // Boxed, so that an idle connection does not take the memory of a busy one. The handler is called inside the
        // box: a future created outside would first exist, at full size, in this one.
        Box::pin(async move {
            let mut response = (context.handler)(request, peer).await.map(|body| BusyBody::new(body, busy));
            if let Some(remainder) = remainder {
                remainder.answered(&mut response);
            }
            if let Some(wanted) = wanted.filter(|_| response.status().is_success()) {
                tunnel.open(wanted);
            }
            if is_event_stream(&response) {
                slot.streams_events();
            }
            if slot.draining() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            } else if keeps_alive && !response.headers().contains_key(CONNECTION) {
                response.headers_mut().insert(KEEP_ALIVE, context.keep_alive.of(&context.limits));
                if !may_close && has_length(&response) {
                    slot.ends_with_length();
                }
            }
            Ok::<_, Infallible>(response)
        })
    });
    let mut socket = MonitoredSocket::new(stream, slot.activity(), context.own.clone());
    let mut closing = false;
    // Alternate between serving and parking until the connection ends. The futures are boxed for the same reason.
    let (mut socket, response, served) = loop {
        let served = Box::pin(serve_http(socket, service, &slot, &tunnel, &mut closing)).await;
        (socket, service) = match served {
            Served::Idle(socket, service) => (socket, service),
            Served::HeadTimeout(socket) => break (socket, Some(context.own.head_timeout()), true),
            Served::Refused(mut socket, blame) => {
                let refusal = socket.take_held();
                break (socket, Some(told(refusal, blame, &*context.own)), true);
            }
            Served::Ended(socket) => break (socket, None, true),
            // Dropped as it is: a graceful end would look like the end of the body.
            Served::Broken(mut socket) if slot.serves_http10() => {
                socket.reset_when_closed();
                return;
            }
            Served::Broken(socket) => break (socket, None, true),
            Served::SetAside(response) => match Box::pin(response.write(&slot, &mut closing)).await {
                Written::Whole(socket, service) if !closing => (socket, service),
                Written::Whole(socket, _) | Written::Broken(socket) => break (socket, None, true),
                Written::Reset => return gave_up(peer),
            },
            Served::Reset => return gave_up(peer),
        };
        if !socket.has_unread() && !park(socket.get_ref(), &slot).await {
            break (socket, None, false);
        }
    };
    socket.close_gracefully();
    // An idle connection that has to make room makes it at once.
    let linger = slot.has_unread_upload() || response.is_some() || (served && !closing);
    let close = Box::pin(close(socket.into_inner(), response, linger));
    if slot.draining() {
        // A shutdown does not wait for the rest of an upload.
        drop(slot);
        close.await;
    } else {
        close.await;
    }
}

fn gave_up(peer: Peer) {
    tracing::warn!(
        ?peer,
        "gave up a caller that read nothing of its response for proxy.write_timeout, and reset its connection"
    );
}

/// What the caller is told instead of `refusal`, the answer of hyper's parser. Of most malformed requests nothing can
/// be said.
fn told(refusal: Bytes, blame: Blame, own: &dyn OwnResponses) -> Bytes {
    let is_too_large = refusal.starts_with(b"HTTP/1.1 431") || refusal.starts_with(b"HTTP/1.1 414");
    match blame {
        Blame::Target => own.bad_target(),
        Blame::LongLine if is_too_large => own.target_too_long(),
        _ if is_too_large => own.head_too_large(),
        _ => refusal,
    }
}

/// Whether the connection is to be closed after the response.
fn asks_to_close(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(CONNECTION).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|option| option.trim().eq_ignore_ascii_case("close"))
}

/// Whether `response` is a stream of server-sent events.
fn is_event_stream<B>(response: &Response<B>) -> bool {
    let kind = response.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    kind.get(..EVENT_STREAM.len()).is_some_and(|start| start.eq_ignore_ascii_case(EVENT_STREAM))
}

/// Lets hyper serve the connection until it ends or may be parked. `closing` is set once the connection was told to
/// close.
///
/// The function is long because it is one loop over every command that a connection can get, and each exit has to take
/// the socket back from hyper.
async fn serve_http<S, V, B>(
    socket: MonitoredSocket<S>,
    service: V,
    slot: &Slot,
    tunnel: &TunnelState,
    closing: &mut bool,
) -> Served<S, V, B>
where
    S: Socket,
    V: HttpService<Incoming, ResBody = BusyBody<B>> + Unpin,
    V::Future: Unpin,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + Unpin,
{
    let _active = slot.activate();
    let mut builder = http1::Builder::new();
    builder.half_close(false).auto_date_header(false).max_header_size(MAX_HEAD).max_buf_size(MAX_BUFFER);
    let mut connection = builder.serve_connection(TokioIo::new(socket), service);
    let into_socket = |parts: http1::Parts<TokioIo<MonitoredSocket<S>>, V>| parts.io.into_inner();
    // Whether hyper still has to be told to close.
    let mut untold = *closing;
    loop {
        // hyper, when told to close, may forget what it has not written yet.
        if untold && !slot.is_unwritten() {
            untold = false;
            Pin::new(&mut connection).graceful_shutdown();
        }
        // Drive hyper until the connection ends or may be parked, or until a command arrives. hyper was just polled
        // when it is pending, so it has written everything it was given and the socket accepts.
        let served = poll_fn(|cx| match connection.poll_without_shutdown(cx) {
            Poll::Ready(ended) => Poll::Ready(Step::Ended(ended)),
            Poll::Pending if slot.is_leaving() => Poll::Ready(Step::Left),
            Poll::Pending if *closing && slot.is_in_rest() => Poll::Ready(Step::Ended(Ok(()))),
            Poll::Pending if untold && !slot.is_unwritten() => Poll::Ready(Step::Written),
            Poll::Pending if slot.may_park() && !*closing => Poll::Ready(Step::Idle),
            Poll::Pending => Poll::Pending,
        });
        let command = tokio::select! {
            biased;
            step = served => match step {
                Step::Written => continue,
                Step::Idle => return idle(connection.into_parts()),
                Step::Left => {
                    let parts = connection.into_parts();
                    let mut socket = parts.io.into_inner();
                    socket.unread(&parts.read_buf);
                    return match slot.take_rest() {
                        Some(rest) => Served::SetAside(Box::new(SetAside::new(socket, parts.service, rest))),
                        None => Served::Broken(socket),
                    };
                }
                // HTTP begins anew inside the tunnel.
                Step::Ended(Ok(())) if tunnel.take_opened() && !*closing => return idle(connection.into_parts()),
                // hyper forgets what it has not written if the request's body ends meanwhile and the connection with
                // it.
                Step::Ended(Ok(())) if slot.is_unwritten() => {
                    return Served::Broken(into_socket(connection.into_parts()));
                }
                Step::Ended(Ok(())) => return Served::Ended(into_socket(connection.into_parts())),
                Step::Ended(Err(error)) => {
                    tracing::debug!(%error, "connection ended");
                    // After an error of its parser hyper has written a response, and it is whole.
                    let whole = error.is_parse();
                    let parts = connection.into_parts();
                    let blame = blame(&error, &parts.read_buf);
                    let socket = parts.io.into_inner();
                    return match whole {
                        true if socket.has_refusal() => Served::Refused(socket, blame),
                        true => Served::Ended(socket),
                        false => Served::Broken(socket),
                    };
                }
            },
            command = slot.command() => command,
        };
        match command {
            // A request head that has started may still be completed, within its timeout.
            Command::Close => (*closing, untold) = (true, true),
            // Nothing else is in progress, and hyper has written nothing for an incomplete head, so the canned response
            // can be sent.
            Command::HeadTimeout if slot.is_in_head() => {
                return Served::HeadTimeout(into_socket(connection.into_parts()));
            }
            Command::EndUpload if slot.is_in_rest() => return Served::Ended(into_socket(connection.into_parts())),
            Command::SetAside if !*closing => slot.leave_hyper(),
            // It was done in the meantime, or the connection closes after the response.
            Command::HeadTimeout | Command::EndUpload | Command::SetAside => {}
            Command::Abort => return Served::Broken(into_socket(connection.into_parts())),
            Command::Reset => {
                into_socket(connection.into_parts()).reset();
                return Served::Reset;
            }
        }
    }
}

/// What a poll of hyper led to.
enum Step {
    /// HTTP on the connection has ended.
    Ended(hyper::Result<()>),
    /// Everything is written, and the connection was told to close.
    Written,
    /// The connection may be parked.
    Idle,
    /// hyper has given up the connection.
    Left,
}

/// Why hyper could not read a request; `unread` is what it left.
fn blame(error: &hyper::Error, unread: &[u8]) -> Blame {
    match unread.iter().take(MAX_LINE).any(|byte| *byte == b'\n') {
        _ if is_bad_target(error, unread) => Blame::Target,
        false if unread.len() > MAX_LINE => Blame::LongLine,
        _ => Blame::Unknown,
    }
}

/// Whether hyper could not read a request because of a character that programs send and no URL can hold. Of other
/// malformed requests nothing can be said. `unread` is what hyper left: the request from its beginning, or, if its line
/// was well-formed but for such a character, what follows its head.
fn is_bad_target(error: &hyper::Error, unread: &[u8]) -> bool {
    const METHODS: [&[u8]; 9] =
        [b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE"];
    let line = unread.split(|byte| matches!(byte, b'\r' | b'\n')).find(|line| !line.is_empty()).unwrap_or_default();
    let words: Vec<_> = line.splitn(4, |byte| *byte == b' ').collect();
    let bad = match words.as_slice() {
        [method, target, b"HTTP/1.1" | b"HTTP/1.0"] => {
            let holds_none = |byte: &u8| b"\"<>`^{|}\\".contains(byte) || !byte.is_ascii();
            // A line without a fault was not refused: the request before it was, and is gone.
            let follows = METHODS.contains(method) && target.iter().all(u8::is_ascii_graphic);
            target.iter().any(holds_none) || follows
        }
        [method, ..] => !METHODS.contains(method),
        [] => true,
    };
    bad && error.is_parse() && error.to_string().contains("invalid URI")
}

/// Takes the socket and the service back from hyper.
fn idle<S: Socket, V, B: Body>(parts: http1::Parts<TokioIo<MonitoredSocket<S>>, V>) -> Served<S, V, B> {
    let mut socket = parts.io.into_inner();
    // hyper may have read the start of the next head together with the previous one.
    socket.unread(&parts.read_buf);
    Served::Idle(socket, parts.service)
}

/// Waits until there is data to read on a parked connection. Returns `false` if it is told to close before that.
async fn park(socket: &impl Socket, slot: &Slot) -> bool {
    loop {
        tokio::select! {
            biased;
            // A socket error is found by the next read.
            _ = poll_fn(|cx| socket.poll_readable(cx)) => return true,
            command = slot.command() => {
                if matches!(command, Command::Close | Command::Abort) {
                    return false;
                }
            }
        }
    }
}

/// Sends `response`, if any, and closes the socket. With `linger`, reads and discards what the caller still sends, for
/// at most [`LINGER`].
pub(super) async fn close(mut socket: impl AsyncRead + AsyncWrite + Unpin, response: Option<Bytes>, linger: bool) {
    if let Some(response) = response {
        // A caller that does not read at all does not get it.
        let _ = tokio::time::timeout(LINGER, socket.write_all(&response)).await;
    }
    let _ = socket.shutdown().await;
    if linger {
        let _ = tokio::time::timeout(LINGER, tokio::io::copy(&mut socket, &mut tokio::io::sink())).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::time::Instant;

    use arc_swap::ArcSwap;
    use http_body_util::{BodyExt, Full};
    use tokio::io::AsyncReadExt;

    use super::super::parking::MAX_ACTIVE;
    use super::super::registry::Registry;
    use super::super::test_responses::Own;
    use super::super::{Inherited, Limits, Listen, Listener, Phase};
    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nkeep-alive: timeout=60\r\ncontent-length: 2\r\n\r\nhi";

    /// A connection that is being served, and the caller's end of it.
    struct Scene {
        registry: Arc<Registry>,
        caller: UnixStream,
        requests: Arc<AtomicUsize>,
    }

    impl Scene {
        fn start(crowded: bool) -> Self {
            let (stream, caller) = UnixStream::pair().unwrap();
            let (registry, requests) = (Arc::<Registry>::default(), Arc::<AtomicUsize>::default());
            if crowded {
                registry.parking().simulate_crowd();
            }
            let counted = requests.clone();
            let handler = move |request: Request<CallerBody>, _: Peer| {
                counted.fetch_add(1, Relaxed);
                // Continue to read the body after the response.
                tokio::spawn(request.into_body().collect());
                async { Response::new(Full::from("hi")) }
            };
            let limits = Arc::new(ArcSwap::from_pointee(Limits {
                max_connections: usize::MAX,
                header_timeout: Duration::MAX,
                idle_timeout: Duration::from_secs(60),
                write_timeout: Duration::MAX,
            }));
            let context = super::super::ListenerContext {
                handler,
                registry: registry.clone(),
                own: Arc::new(Own),
                limits,
                share: 100,
                keep_alive: Default::default(),
            };
            let connection = run(stream, Peer::Unix(None), registry.register(), Arc::new(context));
            // An app may keep ten thousand idle connections open, so the future has to be small.
            let size = std::mem::size_of_val(&connection);
            assert!(size <= 800, "{size} bytes");
            tokio::spawn(connection);
            Self { registry, caller, requests }
        }

        async fn send(&mut self, bytes: &[u8]) {
            self.caller.write_all(bytes).await.unwrap();
        }

        async fn expect(&mut self, bytes: &[u8]) {
            let mut received = vec![0; bytes.len()];
            self.caller.read_exact(&mut received).await.unwrap();
            assert_eq!(received, bytes);
        }

        async fn expect_close(&mut self) {
            assert_eq!(self.caller.read(&mut [0]).await.unwrap(), 0);
        }

        async fn until(&self, what: &str, condition: impl Fn(&Registry) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !condition(&self.registry) {
                assert!(Instant::now() < deadline, "timed out waiting for: {what}");
                tokio::task::yield_now().await;
            }
        }

        async fn until_parked(&self) {
            self.until("parked", |registry| registry.parking().active() == MAX_ACTIVE).await;
        }
    }

    #[tokio::test]
    async fn a_parked_connection_serves_the_next_request() {
        let mut scene = Scene::start(true);
        for _ in 0..3 {
            scene.until_parked().await;
            scene.send(REQUEST).await;
            scene.expect(RESPONSE).await;
        }
    }

    #[tokio::test]
    async fn connections_are_not_parked_while_few_are_active() {
        let mut scene = Scene::start(false);
        scene.send(REQUEST).await;
        scene.expect(RESPONSE).await;
        assert_eq!(scene.registry.parking().active(), 1);
    }

    #[tokio::test]
    async fn a_partial_next_head_survives_parking() {
        let mut scene = Scene::start(true);
        let (start, rest) = REQUEST.split_at(9);
        scene.send(&[REQUEST, REQUEST, start].concat()).await;
        scene.expect(RESPONSE).await;
        scene.expect(RESPONSE).await;
        scene.until("a head", Registry::any_in_head).await;
        scene.send(rest).await;
        scene.expect(RESPONSE).await;
        scene.until_parked().await;
    }

    #[tokio::test]
    async fn a_connection_with_an_unread_request_body_is_not_parked() {
        let mut scene = Scene::start(true);
        scene.until_parked().await;
        scene.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nGET").await;
        // The response comes before the end of the body, and the rest of the body is not a request head.
        scene.expect(RESPONSE).await;
        assert_eq!(scene.registry.parking().active(), MAX_ACTIVE + 1);
        scene.send(b" ").await;
        scene.send(REQUEST).await;
        scene.expect(RESPONSE).await;
        assert_eq!(scene.requests.load(Relaxed), 2);
    }

    #[tokio::test]
    async fn a_parked_connection_ends_when_the_caller_disconnects() {
        let mut scene = Scene::start(true);
        scene.until_parked().await;
        scene.caller.shutdown().await.unwrap();
        scene.until("the end", |registry| registry.len() == 0).await;
    }

    #[tokio::test]
    async fn a_parked_connection_is_closed_at_shutdown() {
        let mut scene = Scene::start(true);
        scene.until_parked().await;
        let registry = scene.registry.clone();
        tokio::join!(registry.close_all(), scene.expect_close());
    }

    #[tokio::test]
    async fn a_shutdown_answers_the_first_request_of_a_connection_that_was_just_accepted() {
        let mut scene = Scene::start(false);
        let registry = scene.registry.clone();
        registry.drain();
        tokio::join!(registry.close_all(), async {
            // Whatever the shutdown does at once is done.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            scene.send(REQUEST).await;
            scene.expect(b"HTTP/1.1 200 OK\r\nconnection: close\r\n").await;
        });
    }

    #[tokio::test]
    async fn a_listener_that_is_dropped_leaves_no_task_behind() {
        let limits = Limits {
            max_connections: 10,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
        };
        let (listen, mut none) = ([Listen::Tcp("127.0.0.1:0".to_owned())], Inherited::default());
        let listener = Listener::bind(&listen, false, 0o600, limits, Arc::new(Own), &mut none).await.unwrap();
        let held = listener.limits();
        let (_open, phase) = tokio::sync::watch::channel(Phase::Open);
        let handler = async |_, _| Response::new(Full::from("hi"));
        let running = tokio::spawn(listener.run(move |request, peer| Box::pin(handler(request, peer)), phase));
        while Arc::strong_count(&held) < 3 {
            tokio::task::yield_now().await;
        }
        running.abort();
        let deadline = Instant::now() + Duration::from_secs(20);
        while Arc::strong_count(&held) > 1 {
            assert!(Instant::now() < deadline, "a task still holds the limits");
            tokio::task::yield_now().await;
        }
    }

    /// Connected before the listener runs, so that it waits at the moment of the shutdown.
    #[tokio::test]
    async fn a_shutdown_answers_a_connection_that_nobody_has_accepted_yet() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("proxy.sock");
        let limits = Limits {
            max_connections: 10,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
        };
        let listen = [Listen::Tcp("127.0.0.1:0".to_owned()), Listen::Unix(path.clone())];
        let mut none = Inherited::default();
        let listener = Listener::bind(&listen, false, 0o600, limits, Arc::new(Own), &mut none).await.unwrap();
        let mut tcp = TcpStream::connect(listener.addresses()[0]).await.unwrap();
        let mut unix = UnixStream::connect(&path).await.unwrap();
        tcp.write_all(REQUEST).await.unwrap();
        unix.write_all(REQUEST).await.unwrap();

        let (_closed, phase) = tokio::sync::watch::channel(Phase::Closed);
        let handler = async |_, _| Response::new(Full::from("hi"));
        tokio::spawn(listener.run(move |request, peer| Box::pin(handler(request, peer)), phase));

        for mut caller in [Box::new(tcp) as Box<dyn AsyncRead + Unpin>, Box::new(unix)] {
            let mut answer = String::new();
            caller.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("connection: close"), "{answer}");
        }
    }
}
