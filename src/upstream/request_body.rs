//! The body of an upstream request, and the replay buffer that allows one retry.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};

use super::lock;
use crate::server::CallerBody;

/// A request body: empty, replayed from an earlier attempt, or streamed from the caller. Trailers are dropped (RFC
/// 9110, section 6.5.1).
#[derive(Debug)]
pub struct RequestBody(Source);

#[derive(Debug)]
enum Source {
    Nothing,
    ReplayBuffer {
        chunks: VecDeque<Bytes>,
        left: u64,
        buffer: Arc<ReplayBuffer>,
    },
    Caller {
        /// What an earlier attempt took.
        replay: VecDeque<Bytes>,
        rest: Box<Rest>,
        buffer: Arc<ReplayBuffer>,
        stalled: Option<Pin<Box<Sleep>>>,
    },
}

/// The part of a caller's body that was not read yet.
#[derive(Debug)]
struct Rest {
    incoming: CallerBody,
    limit: u64,
    timeout: Duration,
}

/// Why a caller's body did not arrive completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The caller disconnected, or the body is not framed correctly.
    #[error("the caller disconnected or framed the body incorrectly")]
    Broken,
    /// The body is larger than `proxy.max_body`.
    #[error("larger than proxy.max_body")]
    TooLarge,
    /// No data arrived for `proxy.body_timeout`.
    #[error("no data arrived for proxy.body_timeout")]
    Stalled,
}

/// A copy of the part of a caller's body that was sent so far, kept for one retry. It is given up once the body exceeds
/// its own limit or all buffers together exceed the [`ReplayBudget`].
#[derive(Debug)]
pub struct ReplayBuffer {
    limit: usize,
    budget: Arc<ReplayBudget>,
    state: Mutex<Progress>,
    /// Notified when hyper drops the body.
    returned: Notify,
}

/// The number of bytes in all replay buffers together.
#[derive(Debug, Default)]
pub struct ReplayBudget(AtomicUsize);

/// Limit for all replay buffers together, in bytes. Without it a thousand slow uploads would each hold
/// `proxy.replay_limit`, more memory than a sidecar is given. A body that exceeds the budget is still sent, but is not
/// retried after a 401.
const REPLAY_BUDGET: usize = 16 << 20;

impl ReplayBudget {
    fn take(&self, bytes: usize) -> bool {
        self.0.fetch_update(Relaxed, Relaxed, |buffer| Some(buffer + bytes).filter(|sum| *sum <= REPLAY_BUDGET)).is_ok()
    }

    fn release(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Relaxed);
    }
}

impl Drop for ReplayBuffer {
    fn drop(&mut self) {
        let reserved = lock(&self.state).reserved;
        self.budget.release(reserved);
    }
}

/// The buffered pieces of a body, in order. A large piece is kept as received. Small pieces are copied together,
/// because each would keep alive the whole buffer it was read into: 4 KiB per byte for a caller that sends single
/// bytes.
#[derive(Debug, Default)]
struct Pieces {
    whole: VecDeque<Bytes>,
    small: BytesMut,
}

/// Smallest piece, in bytes, that is kept as received.
const LARGE: usize = 4 << 10;

impl Pieces {
    fn push(&mut self, data: &Bytes) {
        if data.len() < LARGE {
            self.small.extend_from_slice(data);
            return;
        }
        if !self.small.is_empty() {
            self.whole.push_back(self.small.split().freeze());
        }
        self.whole.push_back(data.clone());
    }

    fn all(&self) -> VecDeque<Bytes> {
        let mut all = self.whole.clone();
        if !self.small.is_empty() {
            all.push_back(Bytes::copy_from_slice(&self.small));
        }
        all
    }
}

#[derive(Debug, Default)]
struct Progress {
    /// `None` once a limit was exceeded.
    pieces: Option<Pieces>,
    /// Bytes of the budget that `pieces` uses.
    reserved: usize,
    /// Bytes of the body that hyper took so far.
    taken: u64,
    /// Bytes that it took again, in later attempts.
    retaken: u64,
    /// Whether hyper took the whole body.
    ended: bool,
    /// What hyper left of the body when it dropped it.
    rest: Option<Box<Rest>>,
    /// Whether there is a response, so that `rest` is not needed any more.
    responded: bool,
}

impl RequestBody {
    /// An empty body.
    pub fn empty() -> Self {
        Self(Source::Nothing)
    }

    /// Streams the caller's body, of at most `max` bytes. A body of at most `replay_limit` bytes is buffered for a
    /// retry if `budget` allows it. The body fails with [`BodyError::Stalled`] if no data arrives for `timeout`.
    pub fn caller(
        incoming: CallerBody,
        replay_limit: usize,
        budget: &Arc<ReplayBudget>,
        max: Option<u64>,
        timeout: Duration,
    ) -> Self {
        if incoming.is_end_stream() {
            return Self::empty();
        }
        let state = Progress { pieces: Some(Pieces::default()), ..Progress::default() };
        let (budget, state) = (budget.clone(), Mutex::new(state));
        let buffer = Arc::new(ReplayBuffer { limit: replay_limit, budget, state, returned: Notify::new() });
        let rest = Box::new(Rest { incoming, limit: max.unwrap_or(u64::MAX), timeout });
        Self(Source::Caller { replay: VecDeque::new(), rest, buffer, stalled: None })
    }

    /// Returns the replay buffer of this body, or `None` if the body does not come from a caller or is empty.
    pub fn progress(&self) -> Option<Arc<ReplayBuffer>> {
        match &self.0 {
            Source::Caller { buffer, .. } | Source::ReplayBuffer { buffer, .. } => Some(buffer.clone()),
            Source::Nothing => None,
        }
    }
}

impl Drop for RequestBody {
    /// Leaves the rest of the body in the replay buffer, for a retry.
    fn drop(&mut self) {
        if let Source::Caller { rest, buffer, .. } = std::mem::replace(&mut self.0, Source::Nothing) {
            let mut state = lock(&buffer.state);
            if state.pieces.is_some() && !state.ended && !state.responded {
                state.rest = Some(rest);
            }
            drop(state);
            buffer.returned.notify_one();
        }
    }
}

/// Longest wait until hyper drops the body of a failed request. It does so at once, but in another task.
const RETURN: Duration = Duration::from_millis(500);

impl ReplayBuffer {
    /// Returns the same body for a retry after a failed attempt, if no limit was exceeded. The part that the attempt
    /// did not take is streamed from the caller.
    pub async fn reclaim(self: &Arc<Self>) -> Option<RequestBody> {
        let settled = || {
            let state = lock(&self.state);
            state.ended || state.rest.is_some() || state.pieces.is_none()
        };
        let returned = async {
            while !settled() {
                self.returned.notified().await;
            }
        };
        tokio::time::timeout(RETURN, returned).await.ok()?;
        let mut state = lock(&self.state);
        let Some(rest) = state.rest.take() else {
            drop(state);
            return self.replay();
        };
        let replay = state.pieces.as_ref()?.all();
        Some(RequestBody(Source::Caller { replay, rest, buffer: self.clone(), stalled: None }))
    }

    /// Records that there is a response: the caller's body is not needed for a retry any more.
    pub fn responded(&self) {
        let mut state = lock(&self.state);
        state.responded = true;
        state.rest = None;
    }

    /// Returns the same body for a retry, if it was sent completely and no limit was exceeded.
    pub fn replay(self: &Arc<Self>) -> Option<RequestBody> {
        let state = lock(&self.state);
        let chunks = state.pieces.as_ref().filter(|_| state.ended)?.all();
        Some(RequestBody(Source::ReplayBuffer { chunks, left: state.taken, buffer: self.clone() }))
    }

    /// Returns the number of bytes that it holds.
    pub fn held(&self) -> usize {
        lock(&self.state).reserved
    }

    /// Whether hyper took the whole body.
    pub(super) fn ended(&self) -> bool {
        lock(&self.state).ended
    }

    /// Returns the number of bytes that hyper took so far, in all attempts together, and whether it took the whole
    /// body.
    pub(super) fn taken(&self) -> (u64, bool) {
        let state = lock(&self.state);
        (state.taken + state.retaken, state.ended)
    }

    /// Records that hyper took `chunk` once more.
    fn retake(&self, chunk: &Bytes) {
        lock(&self.state).retaken += chunk.len() as u64;
    }

    /// Records `data` as sent, and buffers it while the limits allow.
    fn record(&self, data: &Bytes, limit: u64, last: bool) -> Result<(), BodyError> {
        let mut state = lock(&self.state);
        state.taken += data.len() as u64;
        state.ended = last;
        if state.taken > limit {
            return Err(BodyError::TooLarge);
        }
        if state.pieces.is_some() {
            if state.taken <= self.limit as u64 && self.budget.take(data.len()) {
                state.reserved += data.len();
                state.pieces.get_or_insert_default().push(data);
            } else {
                state.pieces = None;
                self.budget.release(std::mem::take(&mut state.reserved));
            }
        }
        Ok(())
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Source::Nothing => Poll::Ready(None),
            Source::ReplayBuffer { chunks, left, buffer } => {
                let chunk = chunks.pop_front();
                chunk.iter().for_each(|chunk| buffer.retake(chunk));
                *left -= chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
                Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk))))
            }
            Source::Caller { replay, rest, buffer, stalled } => {
                let Rest { incoming, limit, timeout } = &mut **rest;
                if let Some(chunk) = replay.pop_front() {
                    buffer.retake(&chunk);
                    return Poll::Ready(Some(Ok(Frame::data(chunk))));
                }
                let Poll::Ready(frame) = Pin::new(&mut *incoming).poll_frame(cx) else {
                    ready!(stalled.get_or_insert_with(|| Box::pin(sleep(*timeout))).as_mut().poll(cx));
                    return Poll::Ready(Some(Err(BodyError::Stalled)));
                };
                *stalled = None;
                let data = match frame {
                    Some(Err(_)) => return Poll::Ready(Some(Err(BodyError::Broken))),
                    // A frame that is not data carries trailers and is the last one.
                    Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
                    None => Bytes::new(),
                };
                let last = data.is_empty() || incoming.is_end_stream();
                Poll::Ready(match buffer.record(&data, *limit, last) {
                    Err(error) => Some(Err(error)),
                    Ok(()) if data.is_empty() => None,
                    Ok(()) => Some(Ok(Frame::data(data))),
                })
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Nothing => true,
            Source::ReplayBuffer { chunks, .. } => chunks.is_empty(),
            Source::Caller { replay, rest, .. } => replay.is_empty() && rest.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Nothing => SizeHint::with_exact(0),
            Source::ReplayBuffer { left, .. } => SizeHint::with_exact(*left),
            Source::Caller { replay, rest, .. } => match rest.incoming.size_hint().exact() {
                Some(left) => SizeHint::with_exact(left + replay.iter().map(|chunk| chunk.len() as u64).sum::<u64>()),
                None => SizeHint::default(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(limit: usize) -> Arc<ReplayBuffer> {
        buffer_in(limit, &Arc::default())
    }

    fn buffer_in(limit: usize, budget: &Arc<ReplayBudget>) -> Arc<ReplayBuffer> {
        let state = Progress { pieces: Some(Pieces::default()), ..Progress::default() };
        Arc::new(ReplayBuffer { limit, budget: budget.clone(), state: Mutex::new(state), returned: Notify::new() })
    }

    #[test]
    fn a_body_that_was_not_sent_completely_is_not_replayed() {
        let buffer = buffer(100);
        buffer.record(&Bytes::from_static(b"half"), u64::MAX, false).unwrap();
        assert!(buffer.replay().is_none());
        buffer.record(&Bytes::from_static(b" and half"), u64::MAX, true).unwrap();
        assert_eq!(buffer.replay().unwrap().size_hint().exact(), Some(13));
    }

    /// The response timeout begins once nothing more of the body is taken.
    #[tokio::test]
    async fn a_body_that_is_sent_again_tells_how_much_of_it_was_taken_as_the_first_time() {
        let first = buffer(100);
        first.record(&Bytes::from(vec![b'x'; 10]), u64::MAX, true).unwrap();
        let mut again = first.replay().unwrap();
        let progress = again.progress().expect("it tells");
        assert_eq!(progress.taken(), (10, true));
        std::future::poll_fn(|cx| Pin::new(&mut again).poll_frame(cx)).await.unwrap().unwrap();
        assert_eq!(progress.taken(), (20, true));
    }

    #[test]
    // Covers: failure 101.
    fn all_replay_buffers_together_stay_within_the_budget() {
        let budget = Arc::<ReplayBudget>::default();
        let mebibyte = Bytes::from(vec![b'x'; 1 << 20]);
        let upload = || {
            let buffer = buffer_in(usize::MAX, &budget);
            buffer.record(&mebibyte, u64::MAX, true).unwrap();
            buffer
        };
        let uploads: Vec<_> = (0..20).map(|_| upload()).collect();
        assert_eq!(uploads.iter().filter(|buffer| buffer.replay().is_some()).count(), REPLAY_BUDGET >> 20);
        assert_eq!(budget.0.load(Relaxed), REPLAY_BUDGET);
        // Bodies beyond the budget were still sent, and a dropped buffer releases its share.
        assert!(uploads.iter().all(|buffer| buffer.taken() == (1 << 20, true)));
        drop(uploads);
        assert_eq!(budget.0.load(Relaxed), 0);
        let too_large = buffer_in(3, &budget);
        too_large.record(&Bytes::from_static(b"abc"), u64::MAX, false).unwrap();
        assert_eq!(budget.0.load(Relaxed), 3);
        too_large.record(&Bytes::from_static(b"d"), u64::MAX, true).unwrap();
        assert_eq!((budget.0.load(Relaxed), too_large.replay().is_none()), (0, true));
    }

    #[test]
    // Covers: threat 25.
    fn a_small_piece_does_not_keep_its_read_buffer_alive() {
        let buffer = buffer(usize::MAX);
        let pieces: Vec<_> =
            [3, 1, LARGE, 2, LARGE + 1, LARGE - 1, 5].map(|length| Bytes::from(vec![length as u8; length])).into();
        for (number, piece) in pieces.iter().enumerate() {
            buffer.record(piece, u64::MAX, number + 1 == pieces.len()).unwrap();
        }
        assert!(pieces.iter().all(|piece| piece.is_unique() == (piece.len() < LARGE)));
        let body = buffer.replay().unwrap();
        let Source::ReplayBuffer { chunks, left, .. } = &body.0 else { panic!("the body was sent completely") };
        let replayed: Vec<u8> = chunks.iter().flatten().copied().collect();
        assert_eq!((replayed.as_slice(), *left), (pieces.concat().as_slice(), replayed.len() as u64));
        assert_eq!(chunks.len(), 5);
    }

    #[test]
    fn a_body_beyond_the_limit_is_not_buffered() {
        let buffer = buffer(3);
        buffer.record(&Bytes::from_static(b"four"), u64::MAX, true).unwrap();
        assert!(buffer.replay().is_none());
        assert_eq!(buffer.record(&Bytes::from_static(b"x"), 4, true), Err(BodyError::TooLarge));
    }
}
