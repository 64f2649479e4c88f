//! The doors: listeners, connections, and what happens to a call between its arrival and its answer.

use std::future::pending;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
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
use super::{Door, ads, call, control, http_date, lwa};

/// Where the bodies that [`Fault::CloseMidBody`] breaks are broken if they are longer than twice this.
const BROKEN_AFTER_BYTES: usize = 4096;
/// How long to wait after `accept` failed: it does so when the process is out of file descriptors, and would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// How slow a rough sandbox is: the shortest delay, and how much longer the longest is, in milliseconds.
const ROUGH_DELAY_MS: (u64, u8) = (5, 35);

/// Accepts connections until it is dropped, and drops them with itself.
pub(super) async fn serve(
    listener: TcpListener,
    door: Option<Door>,
    tls: Option<TlsAcceptor>,
    shared: Arc<SandboxState>,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Small answers go out at once; a socket that refuses the option still works.
        let _ = stream.set_nodelay(true);
        connections.spawn(connection(stream, door, tls.clone(), shared.clone()));
    }
}

/// One connection. Whatever ends it is the caller's business, or was asked for.
async fn connection(stream: TcpStream, door: Option<Door>, tls: Option<TlsAcceptor>, shared: Arc<SandboxState>) {
    let port = stream.local_addr().map_or(0, |address| address.port());
    let line = Arc::new(Line {
        id: shared.connections.fetch_add(1, Ordering::Relaxed) + 1,
        port,
        cut: AtomicBool::new(false),
    });
    let wire = Wire { stream, line: line.clone() };
    let service = service_fn(move |request| {
        let (shared, line) = (shared.clone(), line.clone());
        async move {
            match door {
                Some(door) => amazon(&shared, door, &line, request).await,
                None => Ok(ours(&shared, request).await),
            }
        }
    });
    let http1 = hyper::server::conn::http1::Builder::new();
    let Some(tls) = tls else {
        let _ = http1.serve_connection(TokioIo::new(wire), service).await;
        return;
    };
    let Ok(wire) = tls.accept(wire).await else { return };
    if wire.get_ref().1.alpn_protocol() == Some(b"h2") {
        let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = http2.serve_connection(TokioIo::new(wire), service).await;
    } else {
        let _ = http1.serve_connection(TokioIo::new(wire), service).await;
    }
}

/// A call to the control port. It leaves no trace in the history.
async fn ours(shared: &SandboxState, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let received = receive(body).await;
    control::answer(shared, &head, &received.kept)
}

/// The service gives up and the connection is dropped.
#[derive(Debug, thiserror::Error)]
#[error("the connection is cut, as asked")]
struct Cut;

/// A call to one of Amazon's doors: entered into the history, troubled, answered.
async fn amazon(
    shared: &SandboxState,
    door: Door,
    line: &Line,
    request: Request<Incoming>,
) -> Result<Response<Body>, Cut> {
    let (head, body) = request.into_parts();
    let target = raw_target(&head);
    let token_endpoint = door == Door::Lwa && head.method == http::Method::POST && head.uri.path() == lwa::TOKEN;
    let (id, drawn) = {
        let mut world = shared.world();
        let id = world.history.begin(shared.clock.now(), door, line.id, &head);
        let drawn = world.troubles.draw(door, head.uri.path(), token_endpoint);
        let name = drawn.as_ref().map(|(trouble, _)| trouble.name().to_owned());
        world.history.amend(id, |call| call.trouble = name);
        (id, drawn)
    };
    if let Some((Fault::Reset, armed)) = &drawn {
        line.cut.store(true, Ordering::Relaxed);
        armed.meet();
        return Err(Cut);
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
        return Err(Cut);
    }
    if shared.rough {
        tokio::time::sleep(rough_delay()).await;
    }
    let trouble = suffer(drawn).await;
    let call = Whole { door, port: line.port, head: &head, target: &target, received: &received };
    let mut response = instead(trouble.as_ref()).unwrap_or_else(|| really(shared, &call, trouble.as_ref()));
    // hyper would write the machine's time; clients that compare clocks must see the sandbox's.
    if !response.headers().contains_key(DATE) {
        reply::set(&mut response, DATE, &http_date(shared.clock.now()));
    }
    shared.world().history.amend(id, |call| call.status = Some(response.status().as_u16()));
    Ok(if trouble == Some(Fault::CloseMidBody) { broken(response).await } else { response })
}

/// A call that was read to its end.
struct Whole<'a> {
    door: Door,
    port: u16,
    head: &'a Parts,
    target: &'a str,
    received: &'a Received,
}

/// What the world says to a call. The clock is read only now: while the call was held, time may have been moved.
fn really(shared: &SandboxState, call: &Whole<'_>, trouble: Option<&Fault>) -> Response<Body> {
    let now = shared.clock.now();
    let mut world = shared.world();
    if call.door == Door::Lwa {
        return lwa::answer(&mut world, call.head, &call.received.kept, trouble, shared.auto_consent, now);
    }
    let arrived = call::Arrived {
        door: call.door,
        port: call.port,
        head: call.head,
        target: call.target,
        body: &call.received.kept,
        body_len: call.received.len,
        body_sha256: &call.received.sha256,
    };
    ads::answer(&mut world, &arrived, &shared.events, now)
}

/// Goes through what takes time, and returns what is still to happen.
async fn suffer(drawn: Option<(Fault, FaultHandle)>) -> Option<Fault> {
    let (trouble, armed) = drawn?;
    armed.meet();
    match trouble {
        Fault::Hang => pending().await,
        Fault::Gate => armed.opened().await,
        Fault::Delay { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
        _ => {}
    }
    Some(trouble)
}

/// The answer that takes the real one's place.
fn instead(trouble: Option<&Fault>) -> Option<Response<Body>> {
    match trouble? {
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
        Fault::BadJson => {
            Some(reply::answer(StatusCode::OK, "application/json", r#"{"access_token":"Atza|broken","expires_in":36"#))
        }
        Fault::Html => {
            let page = "<!doctype html><title>Sorry</title><p>Something went wrong on our end (adsidecar sandbox).";
            Some(reply::html(StatusCode::OK, page))
        }
        Fault::TokenUnauthorized => Some(call::unauthorized()),
        _ => None,
    }
}

/// The same answer with a body that breaks off. Its announced length stays.
async fn broken(response: Response<Body>) -> Response<Body> {
    let (mut head, mut body) = response.into_parts();
    let length = http_body::Body::size_hint(&body).exact();
    // Nothing can break in the middle of less than two bytes: more are announced than come.
    let announced = length.map(|length| length.max(2));
    let first = match body.frame().await {
        Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        _ => Bytes::from_static(b" "),
    };
    if let Some(announced) = announced {
        head.headers.insert(CONTENT_LENGTH, announced.into());
    }
    let half = first.len().div_ceil(2).min(BROKEN_AFTER_BYTES);
    let parts = BrokenBody { half: Some(first.slice(..half)), flushed: false, announced };
    Response::from_parts(head, parts.boxed_unsync())
}

struct BrokenBody {
    half: Option<Bytes>,
    flushed: bool,
    announced: Option<u64>,
}

impl http_body::Body for BrokenBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        if let Some(half) = this.half.take() {
            return Poll::Ready(Some(Ok(Frame::data(half))));
        }
        if !this.flushed {
            // hyper writes out what it has when a body is not ready; an error at once would swallow the first half.
            this.flushed = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Some(Err(io::Error::other("broken off, as asked"))))
    }

    fn size_hint(&self) -> SizeHint {
        self.announced.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn rough_delay() -> Duration {
    let mut random = [0];
    // Without randomness the shortest delay will do.
    let _ = getrandom::fill(&mut random);
    Duration::from_millis(ROUGH_DELAY_MS.0 + u64::from(random[0] % (ROUGH_DELAY_MS.1 + 1)))
}

/// What the calls of one connection share.
struct Line {
    id: u64,
    port: u16,
    cut: AtomicBool,
}

/// The socket. Dropped after it was cut, it resets the connection instead of closing it.
struct Wire {
    stream: TcpStream,
    line: Arc<Line>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.line.cut.load(Ordering::Relaxed) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
