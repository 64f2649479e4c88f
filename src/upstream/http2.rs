//! One HTTP/2 connection, which many requests share.
//!
//! It is built on `h2` directly and not on hyper's client, because the pool needs what hyper hides: how many streams
//! the server allows, whether it is about to close, the round trip, and flow-control windows that change.
//!
//! The file is long because handle, request, body and the connection's task share one state. In this order: the handle
//! ([`Http2`]), a request ([`Slot`]), its upload, the body of its response ([`Incoming`]), the task ([`Driver`]).

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{Either, select};
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, Method, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Sleep, sleep};

use super::activity::Activity;
use super::send_error::{Broken, NoResponse, ResponseAborted};
use super::windows::{BodyKey, MAX_STREAMS, WindowBudget, Windows};
use super::{BodyError, RequestBody, lock};

/// The largest response head, in bytes. Amazon's heads are below 16 KiB.
const MAX_HEAD: u32 = 64 << 10;
/// A region that was used within this time always has an open connection.
pub(super) const KEPT_WARM_FOR: Duration = Duration::from_secs(300);

/// Interval of pings while requests wait and nothing arrives. They detect a dead connection, which matters because all
/// requests share it.
const PING_EVERY: Duration = Duration::from_secs(5);
/// Longest wait for the acknowledgement of a ping before the connection is closed.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// After this silence new requests use another connection: a ping has been unanswered for three seconds.
const SILENT_AFTER: Duration = Duration::from_secs(8);
/// Interval of pings while no request waits and the region is in use. They keep the next request from meeting a
/// connection that the network has forgotten.
const IDLE_PING_EVERY: Duration = Duration::from_secs(15);
/// A connection that was silent for longer has to answer a ping before it carries a request.
const DOUBTED_AFTER: Duration = Duration::from_secs(20);
/// Longest wait for that answer, on a path whose round trip is not known.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Shortest time between two looks at the clock.
const MIN_TIMER: Duration = Duration::from_secs(1);
/// A frame below this length may be a small part of the buffer that it was read into.
const SMALL: usize = 8 << 10;
/// How long the rest of an upload may take once its response is complete. Some servers respond early and read it.
const REST_TIMEOUT: Duration = Duration::from_secs(5);
/// After this time without a request the windows return to their first size.
const WINDOWS_KEPT: Duration = Duration::from_secs(10);
/// What h2 takes for the number of streams that the server allows until the server has said it. No server can say this.
const UNKNOWN: usize = usize::MAX - 1;

/// A handle to an HTTP/2 connection. The connection closes when all handles are gone and its requests have ended.
#[derive(Clone, Debug)]
pub(super) struct Http2 {
    sender: SendRequest<Bytes>,
    state: Arc<State>,
}

/// What the handles, the requests and the connection's task share.
#[derive(Debug)]
struct State {
    opened: Instant,
    /// Requests that hold a [`Slot`].
    streams: AtomicUsize,
    /// Milliseconds from `opened` to the end of the last request.
    idle_since: AtomicU64,
    activity: Arc<Activity>,
    link: Mutex<Link>,
    /// Notified whenever a ping is answered.
    answered: Notify,
}

/// What changes with the pings and with each read of a body, under one lock.
#[derive(Debug)]
struct Link {
    pings: PingPong,
    /// When the ping was sent that is not answered yet.
    pinged: Option<Instant>,
    /// The shortest round trip that was measured.
    round_trip: Option<Duration>,
    windows: Windows,
    /// Wakes the connection's task.
    task: Option<Waker>,
}

/// Opens the HTTP/2 connection on `socket`, whose reads `activity` records; `used` records the requests to its region.
/// Returns its handle, and the future that runs it.
///
/// # Errors
/// Fails if the connection breaks.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    socket: S,
    activity: Arc<Activity>,
    used: Arc<Activity>,
    budget: Arc<WindowBudget>,
    first_window: u32,
) -> Result<(Http2, Driver<S>), h2::Error> {
    let windows = Windows::new(budget, first_window);
    let (sender, mut connection) = Builder::new()
        .initial_window_size(first_window)
        .initial_connection_window_size(windows.connection())
        .initial_max_send_streams(UNKNOWN)
        .max_header_list_size(MAX_HEAD)
        .enable_push(false)
        .handshake(socket)
        .await?;
    let mut pings = connection.ping_pong().expect("it is taken once");
    // The first ping measures the round trip while nothing else is on the path.
    let pinged = pings.send_ping(Ping::opaque()).is_ok().then(Instant::now);
    let link = Mutex::new(Link { pings, pinged, round_trip: None, windows, task: None });
    let state = Arc::new(State {
        opened: Instant::now(),
        streams: AtomicUsize::new(0),
        idle_since: AtomicU64::new(0),
        activity,
        link,
        answered: Notify::new(),
    });
    let timer = Box::pin(sleep(PING_EVERY));
    Ok((Http2 { sender, state: state.clone() }, Driver { connection, state, used, timer, settled: None }))
}

impl Http2 {
    /// Reserves a stream for one request, if the connection has room. `pool` is told when the stream is free again.
    pub(super) fn reserve<P: SlotOwner>(&self, pool: &Arc<P>) -> Option<Slot> {
        let room = |streams: usize| (streams < self.max_streams()).then_some(streams + 1);
        let silence = self.state.activity.elapsed();
        if self.state.is_silent(silence) {
            return None;
        }
        // The one handle of this request: h2 takes its lock for each clone.
        let mut connection = self.clone();
        if connection.refuses() {
            return None;
        }
        let others = self.state.streams.fetch_update(Relaxed, Relaxed, room).ok()?;
        if !self.has_room() {
            self.state.streams.fetch_sub(1, Relaxed);
            return None;
        }
        if others == 0 {
            // Silence counts from the first request that waits.
            self.state.activity.touch();
        }
        let pool: Weak<P> = Arc::downgrade(pool);
        Some(Slot { connection, pool: Some(pool), silence, waits: AtomicBool::new(true) })
    }

    fn has_room(&self) -> bool {
        let mut link = lock(&self.state.link);
        let room = link.windows.reserve();
        if link.windows.changed().is_some() {
            link.wake();
        }
        room
    }

    /// The number of requests that the connection may carry at the same time: one until the server has said how many it
    /// allows, as h2 keeps what exceeds that until a stream is free, and never gives it back.
    pub(super) fn max_streams(&self) -> usize {
        self.allowed_streams().unwrap_or(1)
    }

    /// The number of streams that the server allows, once it has said it.
    pub(super) fn allowed_streams(&self) -> Option<usize> {
        let most = self.sender.current_max_send_streams();
        (most != UNKNOWN).then(|| most.clamp(1, MAX_STREAMS))
    }

    pub(super) fn opened(&self) -> Instant {
        self.state.opened
    }

    /// For how long no request has been on the connection; `None` while there is one.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        self.state.idle()
    }

    /// Whether the connection accepts no more requests: the server said so, or it broke.
    pub(super) fn is_closing(&self) -> bool {
        self.clone().refuses()
    }

    /// As [`is_closing`](Self::is_closing), for a handle of one's own.
    fn refuses(&mut self) -> bool {
        matches!(self.sender.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_)))
    }

    /// Whether a request has ended on the connection.
    pub(super) fn was_used(&self) -> bool {
        self.state.was_used()
    }

    /// Whether both are handles to the same connection.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.state, &other.state)
    }

    /// Returns a handle that does not keep the connection open.
    pub(super) fn downgrade(self) -> WeakHttp2 {
        WeakHttp2(self.state)
    }
}

/// A handle that does not keep the connection open.
#[derive(Debug)]
pub(super) struct WeakHttp2(Arc<State>);

impl WeakHttp2 {
    /// Whether `other` is a handle of the same connection.
    pub(super) fn is(&self, other: &Http2) -> bool {
        Arc::ptr_eq(&self.0, &other.state)
    }

    /// For how long no request has been on the connection; `None` while there is one.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        self.0.idle()
    }

    /// Whether a request has ended on the connection.
    pub(super) fn was_used(&self) -> bool {
        self.0.was_used()
    }
}

impl State {
    /// Whether requests wait for a server that has sent nothing for [`SILENT_AFTER`], not even an answer to a ping. The
    /// connection is probably dead, so new requests should not wait on it too.
    fn is_silent(&self, silence: Duration) -> bool {
        silence >= SILENT_AFTER && self.streams.load(Relaxed) > 0
    }

    fn was_used(&self) -> bool {
        self.idle_since.load(Relaxed) > 0
    }

    fn idle(&self) -> Option<Duration> {
        (self.streams.load(Relaxed) == 0).then(|| self.idle_for())
    }

    fn idle_for(&self) -> Duration {
        self.opened.elapsed().saturating_sub(Duration::from_millis(self.idle_since.load(Relaxed)))
    }

    /// Sends a ping, unless one is still unanswered.
    fn ping(&self) {
        let mut link = lock(&self.link);
        if link.pinged.is_none() && link.pings.send_ping(Ping::opaque()).is_ok() {
            link.pinged = Some(Instant::now());
            link.wake();
        }
    }
}

impl Link {
    fn wake(&mut self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

/// Is told when a stream is free again.
pub(super) trait SlotOwner: std::fmt::Debug + Send + Sync + 'static {
    /// A stream of one of its connections is free.
    fn slot_freed(self: Arc<Self>);
}

/// A stream of an HTTP/2 connection that is reserved for one request.
#[derive(Debug)]
pub(super) struct Slot {
    connection: Http2,
    /// Who is told when the stream is free.
    pool: Option<Weak<dyn SlotOwner>>,
    /// How long the server had been silent when the stream was reserved.
    silence: Duration,
    /// Whether the windows have to be told when it ends: no body of a response has begun.
    waits: AtomicBool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let state = &self.connection.state;
        if self.waits.load(Relaxed) {
            lock(&state.link).windows.abandon();
        }
        state.idle_since.store(state.opened.elapsed().as_millis() as u64, Relaxed);
        state.streams.fetch_sub(1, Relaxed);
        if let Some(pool) = self.pool.as_ref().and_then(Weak::upgrade) {
            pool.slot_freed();
        }
    }
}

impl Slot {
    /// Frees the stream without telling the pool.
    pub(super) fn release_unnoticed(mut self) {
        self.pool = None;
    }

    /// The number of other requests on the connection.
    pub(super) fn others(&self) -> usize {
        self.connection.state.streams.load(Relaxed).saturating_sub(1)
    }

    pub(super) fn connection(&self) -> &Http2 {
        &self.connection
    }

    /// Whether the server still answers, on a connection that has been silent for long. Waits for at most four round
    /// trips or a second.
    pub(super) async fn is_alive(&self) -> bool {
        let state = &self.connection.state;
        if self.silence < DOUBTED_AFTER {
            return true;
        }
        let answered = state.answered.notified();
        state.ping();
        let wait = lock(&state.link).round_trip.map_or(PROBE_TIMEOUT, |round_trip| PROBE_TIMEOUT.max(round_trip * 4));
        tokio::time::timeout(wait, answered).await.is_ok()
    }

    /// Sends `request`, and returns the response once its head has arrived.
    ///
    /// # Errors
    /// Fails if there is no response.
    pub(super) async fn send(mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, NoResponse> {
        let (mut parts, body) = request.into_parts();
        add_length(&mut parts.headers, &parts.method, &body);
        let ends = body.is_end_stream();
        let sent = self.connection.sender.send_request(Request::from_parts(parts, ()), ends);
        let (response, stream) = match sent {
            Ok(sent) => sent,
            Err(error) => return Err(NoResponse::Unsent(error, body)),
        };
        let slot = Arc::new(self);
        if ends {
            drop((body, stream));
            return Ok(Incoming::response(response.await.map_err(NoResponse::Broken)?, slot, None));
        }
        let upload = Box::pin(upload(body, stream));
        let response = match select(response, upload).await {
            Either::Left((response, upload)) => {
                let response = response.map_err(NoResponse::Broken)?;
                // The rest of the request is sent while the response is read.
                let slot_of_upload = slot.clone();
                let task = tokio::spawn(async move {
                    let _ = upload.await;
                    drop(slot_of_upload);
                });
                return Ok(Incoming::response(response, slot, Some(Upload(Some(task.abort_handle())))));
            }
            Either::Right((Err(UploadError::Body(error)), _)) => return Err(NoResponse::Body(error)),
            // A server may reset the upload and respond.
            Either::Right((Ok(()) | Err(UploadError::Stopped), response)) => response.await,
        };
        Ok(Incoming::response(response.map_err(NoResponse::Broken)?, slot, None))
    }
}

/// Says how long a body is, as hyper does for HTTP/1.1.
fn add_length(headers: &mut HeaderMap, method: &Method, body: &RequestBody) {
    let defined = !matches!(*method, Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT);
    if let Some(length) = body.size_hint().exact()
        && (length > 0 || defined)
    {
        headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
    }
}

/// Why an upload ended early.
enum UploadError {
    /// The caller's body failed.
    Body(BodyError),
    /// The server wants no more of it, or the connection broke.
    Stopped,
}

/// The largest part of an upload in one frame, in bytes: with its head of nine bytes, the frame fills one TLS record.
/// h2 alone would fill the frame, and the nine bytes would need a record of their own.
const FRAME: usize = (16 << 10) - 9;

/// Sends `body` as fast as the server's windows allow. Holds at most one piece of it.
async fn upload(mut body: RequestBody, mut stream: SendStream<Bytes>) -> Result<(), UploadError> {
    loop {
        let frame = poll_fn(|cx| match stream.poll_reset(cx) {
            Poll::Ready(_) => Poll::Ready(Err(UploadError::Stopped)),
            Poll::Pending => Pin::new(&mut body).poll_frame(cx).map(Ok),
        });
        let mut data = match frame.await? {
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            Some(Err(error)) => {
                stream.send_reset(Reason::CANCEL);
                return Err(UploadError::Body(error));
            }
            None => Bytes::new(),
        };
        let last = data.is_empty() || body.is_end_stream();
        if !data.is_empty() {
            // One byte is enough to be woken. More would take it from streams that can use it now.
            stream.reserve_capacity(1);
            poll_fn(|cx| poll_capacity(&mut stream, cx)).await?;
        }
        while data.len() > FRAME {
            stream.send_data(data.split_to(FRAME), false).map_err(|_| UploadError::Stopped)?;
        }
        stream.send_data(data, last).map_err(|_| UploadError::Stopped)?;
        if last {
            return Ok(());
        }
    }
}

fn poll_capacity(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<Result<(), UploadError>> {
    if stream.poll_reset(cx).is_ready() {
        return Poll::Ready(Err(UploadError::Stopped));
    }
    while stream.capacity() == 0 {
        match ready!(stream.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return Poll::Ready(Err(UploadError::Stopped)),
        }
    }
    Poll::Ready(Ok(()))
}

/// The task that sends the rest of a request. It ends when this is dropped.
#[derive(Debug)]
struct Upload(Option<AbortHandle>);

impl Upload {
    /// Lets the task run on for a while: the response is complete, and the server may still read the request. If it
    /// does not, its stream would be occupied for as long as the connection lasts.
    fn detach(mut self) {
        let Some(task) = self.0.take().filter(|task| !task.is_finished()) else { return };
        tokio::spawn(async move {
            sleep(REST_TIMEOUT).await;
            task.abort();
        });
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// The body of a response over HTTP/2.
#[derive(Debug)]
pub(super) struct Incoming {
    /// `None` after the end.
    open: Option<Open>,
    /// Bytes that will come, if the response has a length.
    left: Option<u64>,
}

/// The body of a response that has not ended.
#[derive(Debug)]
struct Open {
    stream: RecvStream,
    slot: Arc<Slot>,
    key: BodyKey,
    upload: Option<Upload>,
    /// Bytes that were handed out last. Once more is wanted, they were written to the caller, but for one frame of a
    /// response that is set aside.
    handed_out: usize,
    /// Whether small frames are copied out of the buffer that they were read into.
    copies: bool,
}

impl Open {
    fn link(&self) -> std::sync::MutexGuard<'_, Link> {
        lock(&self.slot.connection.state.link)
    }

    /// Gives the window back for the bytes that the caller has taken.
    fn release_taken(&mut self) {
        let bytes = std::mem::take(&mut self.handed_out);
        if bytes == 0 {
            return;
        }
        let _ = self.stream.flow_control().release_capacity(bytes);
        let mut link = self.link();
        let round_trip = link.round_trip;
        link.windows.read(&self.key, bytes, round_trip);
        if link.windows.changed().is_some() {
            link.wake();
        }
    }
}

/// The same bytes without the buffer that they were read into: one frame keeps all of it, beside the frames of others,
/// which costs a crowd that does not read several times its windows.
fn on_its_own(data: Bytes) -> Bytes {
    if data.len() < SMALL { Bytes::copy_from_slice(&data) } else { data }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut link = self.link();
        link.windows.end(&self.key);
        if link.windows.changed().is_some() {
            link.wake();
        }
    }
}

impl Incoming {
    fn response(response: Response<RecvStream>, slot: Arc<Slot>, upload: Option<Upload>) -> Response<Self> {
        let (parts, stream) = response.into_parts();
        let mut body = Self { open: None, left: Some(0) };
        if stream.is_end_stream() {
            upload.into_iter().for_each(Upload::detach);
        } else {
            let length = |value: &http::HeaderValue| value.to_str().ok()?.parse().ok();
            body.left = parts.headers.get(CONTENT_LENGTH).and_then(length);
            let mut link = lock(&slot.connection.state.link);
            let round_trip = link.round_trip;
            let key = link.windows.begin(body.left, round_trip);
            slot.waits.store(false, Relaxed);
            let copies = link.windows.is_for_a_crowd();
            if link.windows.changed().is_some() {
                link.wake();
            }
            drop(link);
            body.open = Some(Open { stream, slot, key, upload, handed_out: 0, copies });
        }
        Response::from_parts(parts, body)
    }

    fn finish(&mut self) {
        self.left = Some(0);
        self.open.take().and_then(|mut open| open.upload.take()).into_iter().for_each(Upload::detach);
    }

    /// Polls the next frame. A body that ends without END_STREAM is an error.
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        let Some(open) = &mut self.open else { return Poll::Ready(None) };
        open.release_taken();
        let next = match ready!(open.stream.poll_data(cx)) {
            Some(data) => data.map(|data| Some(Frame::data(if open.copies { on_its_own(data) } else { data }))),
            None => ready!(open.stream.poll_trailers(cx)).map(|trailers| trailers.map(Frame::trailers)),
        };
        Poll::Ready(match next {
            Ok(Some(frame)) => {
                if let Some(data) = frame.data_ref() {
                    open.handed_out = data.len();
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                }
                if open.stream.is_end_stream() {
                    self.finish();
                }
                Some(Ok(frame))
            }
            Ok(None) if open.stream.is_end_stream() => {
                self.finish();
                None
            }
            Ok(None) => {
                self.open = None;
                Some(Err(ResponseAborted::Truncated))
            }
            Err(error) => {
                self.open = None;
                Some(Err(ResponseAborted::Broken(Broken::Http2(error.into()))))
            }
        })
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.open.is_none()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Runs a connection. A request on a connection that breaks gets the error; the future only says when that is.
pub(super) struct Driver<S> {
    connection: Connection<S, Bytes>,
    state: Arc<State>,
    /// When the region was last used.
    used: Arc<Activity>,
    timer: Pin<Box<Sleep>>,
    /// Is told when the server has said how many streams it allows.
    settled: Option<oneshot::Sender<()>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Driver<S> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.poll_answer(cx);
        if this.poll_timer(cx) {
            tracing::debug!("a connection to Amazon does not answer, and is given up");
            return Poll::Ready(());
        }
        loop {
            this.announce_windows(cx);
            match Pin::new(&mut this.connection).poll(cx) {
                Poll::Ready(end) => {
                    // A server that drains says both at once.
                    this.tell_settled();
                    tracing::debug!(?end, "connection to Amazon ended");
                    return Poll::Ready(());
                }
                // The settings before may have been acknowledged just now.
                Poll::Pending if this.announce_windows(cx) => {}
                Poll::Pending => {
                    this.tell_settled();
                    return Poll::Pending;
                }
            }
        }
    }
}

impl<S> Driver<S> {
    /// Tells when the server has said how many streams it allows; an error if the connection ends before.
    pub(super) fn settled(&mut self) -> oneshot::Receiver<()> {
        let (settled, told) = oneshot::channel();
        self.settled = Some(settled);
        told
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    /// Tells that the server has said how many streams it allows, if it has.
    fn tell_settled(&mut self) {
        if self.settled.is_some() && self.connection.max_concurrent_send_streams() != UNKNOWN {
            self.settled.take().map(|settled| settled.send(()));
        }
    }

    /// Takes the answer to a ping.
    fn poll_answer(&mut self, cx: &mut Context<'_>) {
        let mut link = lock(&self.state.link);
        let Some(sent) = link.pinged else { return };
        if let Poll::Ready(Ok(_)) = link.pings.poll_pong(cx) {
            let took = sent.elapsed();
            link.pinged = None;
            link.round_trip = Some(link.round_trip.map_or(took, |shortest| shortest.min(took)));
            self.state.answered.notify_waiters();
        }
    }

    /// Announces the windows if they have changed. Returns whether it did.
    fn announce_windows(&mut self, cx: &Context<'_>) -> bool {
        let mut link = lock(&self.state.link);
        if !link.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            link.task = Some(cx.waker().clone());
        }
        let Some((stream, connection)) = link.windows.changed() else { return false };
        // It fails while the settings before are not acknowledged.
        if self.connection.set_initial_window_size(stream).is_err() {
            return false;
        }
        self.connection.set_target_window_size(connection);
        link.windows.set_announced((stream, connection));
        true
    }

    /// Sends a ping when it is time, and returns whether the connection is dead.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> bool {
        let state = &self.state;
        let busy = state.streams.load(Relaxed) > 0;
        let every = if busy { PING_EVERY } else { IDLE_PING_EVERY };
        let now = tokio::time::Instant::now();
        if busy && self.timer.deadline() > now + PING_EVERY {
            self.timer.as_mut().reset(now + PING_EVERY);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let silence = state.activity.elapsed();
            let pinged = lock(&state.link).pinged;
            if silence >= PING_EVERY + PING_TIMEOUT && pinged.is_some_and(|sent| sent.elapsed() >= PING_TIMEOUT) {
                return true;
            }
            if silence >= every && (busy || self.used.elapsed() < KEPT_WARM_FOR) {
                state.ping();
            }
            if !busy && state.idle_for() >= WINDOWS_KEPT {
                lock(&state.link).windows.reset();
            }
            let wait = match pinged {
                Some(_) => PING_EVERY.min(every),
                None if silence < every => every - silence,
                None => every,
            };
            self.timer.as_mut().reset(now + wait.max(MIN_TIMER));
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_frame_does_not_keep_the_frames_of_others_in_memory() {
        let read = Bytes::from((0..4 * SMALL).map(|byte| byte as u8).collect::<Vec<_>>());
        let small = on_its_own(read.slice(SMALL..2 * SMALL - 1));
        assert!(read.is_unique() && small == read[SMALL..2 * SMALL - 1]);
        let large = on_its_own(read.slice(SMALL..3 * SMALL));
        assert_eq!(large.as_ptr(), read[SMALL..].as_ptr(), "a large one is not copied");
    }
}
