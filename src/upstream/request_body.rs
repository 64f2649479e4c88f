//! The body of a request on its way to Amazon.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Sleep, sleep};

use super::lock;

/// A request body: nothing, what was held of an earlier attempt, or the caller's bytes as they come. Trailers are
/// dropped (RFC 9110, section 6.5.1).
#[derive(Debug)]
pub struct RequestBody(Source);

#[derive(Debug)]
enum Source {
    Nothing,
    ReplayBuffer {
        chunks: VecDeque<Bytes>,
        left: u64,
    },
    Caller {
        incoming: Incoming,
        held: Arc<ReplayBuffer>,
        limit: u64,
        patience: Duration,
        stall: Option<Pin<Box<Sleep>>>,
    },
}

/// Why a caller's body did not come whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The caller broke off or framed it badly.
    #[error("the caller broke off")]
    Broken,
    /// More than `proxy.max_body`.
    #[error("larger than proxy.max_body")]
    TooLarge,
    /// Nothing came for `proxy.body_timeout`.
    #[error("nothing came for proxy.body_timeout")]
    Stalled,
}

impl BodyError {
    /// The body's error inside one of hyper's.
    pub fn within(error: &hyper::Error) -> Option<Self> {
        let mut source = std::error::Error::source(error);
        while let Some(error) = source {
            if let Some(body) = error.downcast_ref::<Self>() {
                return Some(*body);
            }
            source = error.source();
        }
        None
    }
}

/// What has passed of a caller's body: held for a repetition while it is small enough, and while not too much is held of
/// all bodies together.
#[derive(Debug)]
pub struct ReplayBuffer {
    limit: usize,
    room: Arc<ReplayBudget>,
    state: Mutex<State>,
}

/// How many bytes are held of all bodies together.
#[derive(Debug, Default)]
pub struct ReplayBudget(AtomicUsize);

/// The most that is held at once. Without it a thousand callers that upload slowly would hold `proxy.replay_limit` each,
/// which is more memory than a sidecar is given. A body that finds no room passes, and is not repeated after a 401.
const MOST_HELD: usize = 16 << 20;

impl ReplayBudget {
    fn take(&self, bytes: usize) -> bool {
        self.0.fetch_update(Relaxed, Relaxed, |held| Some(held + bytes).filter(|sum| *sum <= MOST_HELD)).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Relaxed);
    }
}

impl Drop for ReplayBuffer {
    fn drop(&mut self) {
        let reserved = lock(&self.state).reserved;
        self.room.give_back(reserved);
    }
}

/// What passed of a body, in its order. A large piece is held as it came. Small ones are copied together: each would pin the
/// whole buffer that it was read into, 4 KiB for a caller who sends a byte at a time.
#[derive(Debug, Default)]
struct Pieces {
    whole: VecDeque<Bytes>,
    small: BytesMut,
}

/// From here on a piece is large.
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
struct State {
    /// `None` once more than the limit has passed.
    pieces: Option<Pieces>,
    /// Bytes of the common room that they take.
    reserved: usize,
    taken: u64,
    ended: bool,
}

impl RequestBody {
    /// No body.
    pub fn nothing() -> Self {
        Self(Source::Nothing)
    }

    /// The caller's body as it comes, at most `max` bytes of it; the first `hold` bytes are held for a repetition. It is
    /// given up where nothing comes for as long as `patience`.
    pub fn caller(
        incoming: Incoming,
        hold: usize,
        room: &Arc<ReplayBudget>,
        max: Option<u64>,
        patience: Duration,
    ) -> Self {
        if incoming.is_end_stream() {
            return Self::nothing();
        }
        let state = State { pieces: Some(Pieces::default()), ..State::default() };
        let held = Arc::new(ReplayBuffer { limit: hold, room: room.clone(), state: Mutex::new(state) });
        Self(Source::Caller { incoming, held, limit: max.unwrap_or(u64::MAX), patience, stall: None })
    }

    /// What is being held of this body; `None` where there is no body to come.
    pub fn progress(&self) -> Option<Arc<ReplayBuffer>> {
        match &self.0 {
            Source::Caller { held, .. } => Some(held.clone()),
            Source::Nothing | Source::ReplayBuffer { .. } => None,
        }
    }
}

impl ReplayBuffer {
    /// The same body once more, if it passed whole and was small enough.
    pub fn again(&self) -> Option<RequestBody> {
        let state = lock(&self.state);
        let chunks = state.pieces.as_ref().filter(|_| state.ended)?.all();
        Some(RequestBody(Source::ReplayBuffer { chunks, left: state.taken }))
    }

    /// Whether the whole body was taken.
    pub(super) fn ended(&self) -> bool {
        lock(&self.state).ended
    }

    /// Bytes taken so far, and whether that was all.
    pub(super) fn taken(&self) -> (u64, bool) {
        let state = lock(&self.state);
        (state.taken, state.ended)
    }

    fn pass(&self, data: &Bytes, limit: u64, last: bool) -> Result<(), BodyError> {
        let mut state = lock(&self.state);
        state.taken += data.len() as u64;
        state.ended = last;
        if state.taken > limit {
            return Err(BodyError::TooLarge);
        }
        if state.pieces.is_some() {
            if state.taken <= self.limit as u64 && self.room.take(data.len()) {
                state.reserved += data.len();
                state.pieces.get_or_insert_default().push(data);
            } else {
                state.pieces = None;
                self.room.give_back(std::mem::take(&mut state.reserved));
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
            Source::ReplayBuffer { chunks, left } => {
                let chunk = chunks.pop_front();
                *left -= chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
                Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk))))
            }
            Source::Caller { incoming, held, limit, patience, stall } => {
                let Poll::Ready(frame) = Pin::new(&mut *incoming).poll_frame(cx) else {
                    ready!(stall.get_or_insert_with(|| Box::pin(sleep(*patience))).as_mut().poll(cx));
                    return Poll::Ready(Some(Err(BodyError::Stalled)));
                };
                *stall = None;
                let data = match frame {
                    Some(Err(_)) => return Poll::Ready(Some(Err(BodyError::Broken))),
                    // Anything but data is a trailer, and the last frame.
                    Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
                    None => Bytes::new(),
                };
                let last = data.is_empty() || incoming.is_end_stream();
                Poll::Ready(match held.pass(&data, *limit, last) {
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
            Source::Caller { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Nothing => SizeHint::with_exact(0),
            Source::ReplayBuffer { left, .. } => SizeHint::with_exact(*left),
            Source::Caller { incoming, .. } => incoming.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(limit: usize) -> ReplayBuffer {
        held_in(limit, &Arc::default())
    }

    fn held_in(limit: usize, room: &Arc<ReplayBudget>) -> ReplayBuffer {
        let state = State { pieces: Some(Pieces::default()), ..State::default() };
        ReplayBuffer { limit, room: room.clone(), state: Mutex::new(state) }
    }

    #[test]
    fn a_body_that_did_not_pass_whole_is_never_sent_again() {
        let held = held(100);
        held.pass(&Bytes::from_static(b"half"), u64::MAX, false).unwrap();
        assert!(held.again().is_none());
        held.pass(&Bytes::from_static(b" and half"), u64::MAX, true).unwrap();
        assert_eq!(held.again().unwrap().size_hint().exact(), Some(13));
    }

    #[test]
    // Covers: failure 101.
    fn together_no_more_is_held_than_there_is_room() {
        let room = Arc::<ReplayBudget>::default();
        let mebibyte = Bytes::from(vec![b'x'; 1 << 20]);
        let upload = || {
            let held = held_in(usize::MAX, &room);
            held.pass(&mebibyte, u64::MAX, true).unwrap();
            held
        };
        let uploads: Vec<_> = (0..20).map(|_| upload()).collect();
        assert_eq!(uploads.iter().filter(|held| held.again().is_some()).count(), MOST_HELD >> 20);
        assert_eq!(room.0.load(Relaxed), MOST_HELD);
        // What found no room passed all the same, and what is over gives its room back.
        assert!(uploads.iter().all(|held| held.taken() == (1 << 20, true)));
        drop(uploads);
        assert_eq!(room.0.load(Relaxed), 0);
        let too_large = held_in(3, &room);
        too_large.pass(&Bytes::from_static(b"abc"), u64::MAX, false).unwrap();
        assert_eq!(room.0.load(Relaxed), 3);
        too_large.pass(&Bytes::from_static(b"d"), u64::MAX, true).unwrap();
        assert_eq!((room.0.load(Relaxed), too_large.again().is_none()), (0, true));
    }

    #[test]
    // Covers: threat 25.
    fn a_small_piece_does_not_pin_the_buffer_that_it_was_read_into() {
        let held = held(usize::MAX);
        let pieces: Vec<_> =
            [3, 1, LARGE, 2, LARGE + 1, LARGE - 1, 5].map(|length| Bytes::from(vec![length as u8; length])).into();
        for (number, piece) in pieces.iter().enumerate() {
            held.pass(piece, u64::MAX, number + 1 == pieces.len()).unwrap();
        }
        assert!(pieces.iter().all(|piece| piece.is_unique() == (piece.len() < LARGE)));
        let Some(RequestBody(Source::ReplayBuffer { chunks, left })) = held.again() else { panic!("it passed whole") };
        let again: Vec<u8> = chunks.iter().flatten().copied().collect();
        assert_eq!((again.as_slice(), left), (pieces.concat().as_slice(), again.len() as u64));
        assert_eq!(chunks.len(), 5);
    }

    #[test]
    fn a_body_beyond_the_limit_is_not_held() {
        let held = held(3);
        held.pass(&Bytes::from_static(b"four"), u64::MAX, true).unwrap();
        assert!(held.again().is_none());
        assert_eq!(held.pass(&Bytes::from_static(b"x"), 4, true), Err(BodyError::TooLarge));
    }
}
