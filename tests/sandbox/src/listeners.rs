//! Listeners, connections, and the handling of a call from its arrival to its response.

use std::future::pending;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, DATE};
use http::request::Parts;
use http::{Request, Response, StatusCode};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::fault::{Fault, FaultHandle};
use super::history::{Received, raw_target, receive};
use super::reply::{self, Body};

use super::state::SandboxState;
use super::{Listener, ads, call, control, http_date, lwa, mcp};

/// Where [`Fault::CloseMidBody`] truncates bodies longer than twice this.
const BROKEN_AFTER_BYTES: usize = 4096;
/// The pause after a failed `accept`: it fails when the process is out of file descriptors, and would otherwise spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// The latency of a rough sandbox, in milliseconds: the minimum, and the range above it.
const ROUGH_DELAY_MS: (u64, u8) = (5, 35);

/// Accepts connections until the task is dropped, which also drops the connections.
pub(super) async fn serve(
    socket: TcpListener,
    listener: Option<Listener>,
    tls: Option<TlsAcceptor>,
    shared: Arc<SandboxState>,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Send small responses immediately; a socket that rejects the option still works.
        let _ = stream.set_nodelay(true);
        connections.spawn(serve_connection(stream, listener, tls.clone(), shared.clone()));
    }
}

/// Serves one connection. Errors are ignored: the caller or a fault caused them.
async fn serve_connection(
    stream: TcpStream,
    listener: Option<Listener>,
    tls: Option<TlsAcceptor>,
    shared: Arc<SandboxState>,
) {
    let port = stream.local_addr().map_or(0, |address| address.port());
    let connection = Arc::new(Connection {
        id: shared.connections.fetch_add(1, Ordering::Relaxed) + 1,
        port,
        reset: AtomicBool::new(false),
        written: AtomicUsize::new(0),
        writes: Mutex::default(),
    });
    let socket = Socket { stream, connection: connection.clone() };
    let service = service_fn(move |request| {
        let (shared, connection) = (shared.clone(), connection.clone());
        async move {
            match listener {
                Some(listener) => serve_amazon(&shared, listener, &connection, request).await,
                None => Ok(serve_control(&shared, request).await),
            }
        }
    });
    let http1 = hyper::server::conn::http1::Builder::new();
    let Some(tls) = tls else {
        let _ = http1.serve_connection(TokioIo::new(socket), service).await;
        return;
    };
    let Ok(socket) = tls.accept(socket).await else { return };
    if socket.get_ref().1.alpn_protocol() == Some(b"h2") {
        let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = http2.serve_connection(TokioIo::new(socket), service).await;
    } else {
        let _ = http1.serve_connection(TokioIo::new(socket), service).await;
    }
}

/// Serves a call to the control port. The history does not record it.
async fn serve_control(shared: &SandboxState, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let received = receive(body).await;
    let response = control::answer(shared, &head, &received.kept);
    if head.method == http::Method::POST {
        shared.keep_grants();
    }
    response
}

/// Returned by the service to make hyper drop the connection.
#[derive(Debug, thiserror::Error)]
#[error("the connection was reset by a fault rule")]
struct ConnectionReset;

/// Serves a call to an Amazon listener: records it, applies a fault, and responds.
async fn serve_amazon(
    shared: &SandboxState,
    listener: Listener,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<Body>, ConnectionReset> {
    let (head, body) = request.into_parts();
    let target = raw_target(&head);
    let token_endpoint =
        listener == Listener::Lwa && head.method == http::Method::POST && head.uri.path() == lwa::TOKEN;
    let (id, chosen) = {
        let mut world = shared.world();
        let id = world.history.begin(shared.clock.now(), listener, connection.id, &head);
        let chosen = world.faults.choose(listener, head.uri.path(), token_endpoint);
        let name = chosen.as_ref().map(|(fault, _)| fault.name().to_owned());
        world.history.amend(id, |call| call.fault = name);
        (id, chosen)
    };
    if let Some((Fault::Reset, handle)) = &chosen {
        connection.reset.store(true, Ordering::Relaxed);
        handle.count();
        return Err(ConnectionReset);
    }
    let received = receive(body).await;
    {
        let mut world = shared.world();
        world.history.body(id, &received);
        if token_endpoint {
            let grant_type = lwa::grant_type(&head, &received.kept);
            world.history.token_call(id, grant_type.as_deref());
        }
    }
    if !received.complete {
        return Err(ConnectionReset);
    }
    if shared.rough {
        tokio::time::sleep(rough_delay()).await;
    }
    let fault = hold_or_delay(chosen).await;
    let call = CompleteCall { listener, port: connection.port, head: &head, target: &target, received: &received };
    let mut response = substitute(fault.as_ref()).unwrap_or_else(|| real_response(shared, &call, fault.as_ref()));
    if listener == Listener::Lwa {
        shared.keep_grants();
    }
    if listener.is_mcp() && response.status() == StatusCode::UNAUTHORIZED {
        mcp::challenge(&mut response);
    }
    // hyper would send the system time; clients that compare clocks must see the sandbox's time.
    if !response.headers().contains_key(DATE) {
        reply::set(&mut response, DATE, &http_date(shared.clock.now()));
    }
    shared.world().history.amend(id, |call| call.status = Some(response.status().as_u16()));
    Ok(if fault == Some(Fault::CloseMidBody) { truncated(response, connection).await } else { response })
}

/// A call whose body was received completely.
struct CompleteCall<'a> {
    listener: Listener,
    port: u16,
    head: &'a Parts,
    target: &'a str,
    received: &'a Received,
}

/// The real response to a call. Reads the clock only now, because time may have moved while a fault held the call.
fn real_response(shared: &SandboxState, call: &CompleteCall<'_>, fault: Option<&Fault>) -> Response<Body> {
    let now = shared.clock.now();
    let mut world = shared.world();
    if call.listener == Listener::Lwa {
        return lwa::answer(&mut world, call.head, &call.received.kept, fault, shared.auto_consent, now);
    }
    if let Some(refusal) = world.limits.refuse(call.listener, call.head.uri.path(), &call.head.headers, now) {
        return refusal;
    }
    let arrived = call::Arrived {
        listener: call.listener,
        port: call.port,
        head: call.head,
        target: call.target,
        body: &call.received.kept,
        body_len: call.received.len,
        body_sha256: &call.received.sha256,
    };
    if call.listener.is_mcp() {
        return mcp::answer(&world, &arrived, &shared.events, now);
    }
    ads::answer(&mut world, &arrived, &shared.events, now)
}

/// Applies the faults that hold or delay a call, and returns the fault for the response.
async fn hold_or_delay(chosen: Option<(Fault, FaultHandle)>) -> Option<Fault> {
    let (fault, handle) = chosen?;
    handle.count();
    match fault {
        Fault::Hang => pending().await,
        Fault::Gate => handle.wait_until_open().await,
        Fault::Delay { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
        _ => {}
    }
    Some(fault)
}

/// The response that a fault substitutes for the real one.
fn substitute(fault: Option<&Fault>) -> Option<Response<Body>> {
    match fault? {
        Fault::Status { code, headers, body } => {
            let code = StatusCode::from_u16(*code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let mut response = reply::empty(code);
            *response.body_mut() = reply::full(body.clone());
            for (name, value) in headers {
                if let Ok(name) = name.parse() {
                    reply::add(&mut response, name, value);
                }
            }
            Some(response)
        }
        Fault::BadJson => Some(reply::answer(
            StatusCode::OK,
            "application/json",
            r#"{"access_token":"Atza|truncated","expires_in":36"#,
        )),
        Fault::Html => {
            let page = "<!doctype html><title>Sorry</title><p>Something went wrong on our end (adsidecar sandbox).";
            Some(reply::html(StatusCode::OK, page))
        }
        Fault::TokenUnauthorized => Some(call::unauthorized()),
        _ => None,
    }
}

/// Truncates the body of a response but keeps the announced length.
async fn truncated(response: Response<Body>, connection: &Arc<Connection>) -> Response<Body> {
    let (mut head, mut body) = response.into_parts();
    let length = http_body::Body::size_hint(&body).exact();
    // A body of less than two bytes cannot be truncated, so more bytes are announced than sent.
    let announced = length.map(|length| length.max(2));
    let first = match body.frame().await {
        Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        _ => Bytes::from_static(b" "),
    };
    if let Some(announced) = announced {
        head.headers.insert(CONTENT_LENGTH, announced.into());
    }
    let half = first.len().div_ceil(2).min(BROKEN_AFTER_BYTES);
    let parts = TruncatedBody { half: Some(first.slice(..half)), until: 0, announced, connection: connection.clone() };
    Response::from_parts(head, parts.boxed_unsync())
}

struct TruncatedBody {
    half: Option<Bytes>,
    /// How much the connection has written once the half is.
    until: usize,
    announced: Option<u64>,
    connection: Arc<Connection>,
}

impl http_body::Body for TruncatedBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(half) = self.half.take() {
            self.until = self.connection.written.load(Ordering::SeqCst) + half.len();
            return Poll::Ready(Some(Ok(Frame::data(half))));
        }
        // hyper and h2 discard what they have not written when a body fails.
        let connection = self.connection.clone();
        let mut writes = connection.writes();
        if connection.written.load(Ordering::SeqCst) < self.until {
            writes.push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Some(Err(io::Error::other("truncated by a fault rule"))))
    }

    fn size_hint(&self) -> SizeHint {
        self.announced.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn rough_delay() -> Duration {
    let mut random = [0];
    // Without randomness the shortest delay is used.
    let _ = getrandom::fill(&mut random);
    Duration::from_millis(ROUGH_DELAY_MS.0 + u64::from(random[0] % (ROUGH_DELAY_MS.1 + 1)))
}

/// The state that the calls of one connection share.
struct Connection {
    id: u64,
    port: u16,
    reset: AtomicBool,
    /// The bytes that were written to the socket.
    written: AtomicUsize,
    /// Woken by the next write.
    writes: Mutex<Vec<Waker>>,
}

impl Connection {
    fn writes(&self) -> std::sync::MutexGuard<'_, Vec<Waker>> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The socket. If `reset` is set when it is dropped, it resets the connection instead of closing it.
struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.connection.reset.load(Ordering::Relaxed) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = written {
            let mut writes = self.connection.writes();
            self.connection.written.fetch_add(count, Ordering::SeqCst);
            writes.drain(..).for_each(Waker::wake);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
