//! HTTP/2 flow-control windows that follow the network path (RFC 9113, section 5.2).
//!
//! A window limits a download to one window per round trip: with 64 KiB and 50 ms that is 1.2 MB/s. A caller that does
//! not read, on the other hand, keeps a whole window in memory. So each connection begins with small windows, and they
//! grow eightfold whenever a caller has read a whole window within two round trips: such a response is limited by the
//! window. Bytes that callers do not read never make a window grow.
//!
//! All growth comes from one [`WindowBudget`]. The connection's window is a hard bound for what its callers have not
//! read yet, so the memory of all connections together is bounded by the budget and the first windows.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Most concurrent requests on one connection, if the server allows that number.
pub(super) const MAX_STREAMS: usize = 100;

/// Bytes by which all windows together may grow.
const BUDGET: usize = 32 << 20;
/// The window of a stream on a new connection, in bytes, while few requests are in flight.
const FIRST: u32 = 64 << 10;
/// The smallest window on a new connection.
const SMALLEST: u32 = 2 << 10;
/// How much a window grows at once. From 64 KiB it takes three steps to 32 MiB, each of one round trip.
const GROWTH: u32 = 8;
/// The speed that one stream may reach, in bytes per second: windows beyond it would only cost memory.
const SPEED: f64 = 1e9;
/// A window that takes longer than this many round trips to read is not what limits the response.
const ROUND_TRIPS: u32 = 2;

/// The bytes that the windows of all connections may still grow by.
#[derive(Debug)]
pub(super) struct WindowBudget(AtomicUsize);

impl Default for WindowBudget {
    fn default() -> Self {
        Self(AtomicUsize::new(BUDGET))
    }
}

impl WindowBudget {
    /// Takes at most `bytes`, and at most three quarters of what is left, so that other connections can grow too.
    fn take(&self, bytes: usize) -> usize {
        let share = |left: usize| bytes.min(left / 4 * 3);
        let before = self.0.fetch_update(Relaxed, Relaxed, |left| Some(left - share(left)));
        before.map_or(0, share)
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_add(bytes, Relaxed);
    }
}

/// The window of one stream on a connection that is opened while `in_flight` other requests are in flight. The windows
/// of a crowd that does not read add up to about twice those of its first hundred.
///
/// The smaller windows leave room for the nine bytes of a frame header: one, two or four frames then fill one buffer of
/// h2, which stays allocated as long as any of its frames is in use.
pub(super) fn first_window(in_flight: usize) -> u32 {
    let crowd = u32::try_from(in_flight / MAX_STREAMS + 1).unwrap_or(u32::MAX);
    if crowd == 1 { FIRST } else { (FIRST / crowd.saturating_mul(crowd)).max(SMALLEST) - 9 }
}

/// The windows of one connection, and the response bodies that its callers are reading.
#[derive(Debug)]
pub(super) struct Windows {
    budget: Arc<WindowBudget>,
    /// The window of a stream at the start.
    first: u32,
    /// The window of a stream.
    stream: u32,
    /// What the budget gave to the connection's window.
    granted: usize,
    /// What was last told to h2.
    announced: (u32, u32),
    bodies: Vec<Option<Body>>,
}

/// A response body that is being read.
#[derive(Debug)]
struct Body {
    /// Bytes that may still come, if the response has a length.
    left: Option<u64>,
    /// Bytes that the caller read since `since`.
    read: u64,
    since: Instant,
}

/// Names a response body in its [`Windows`].
#[derive(Debug)]
pub(super) struct BodyKey(usize);

impl Windows {
    pub(super) fn new(budget: Arc<WindowBudget>, first: u32) -> Self {
        let mut new = Self { budget, first, stream: first, granted: 0, announced: (0, 0), bodies: Vec::new() };
        new.announced = (first, new.connection());
        new
    }

    /// The window of the connection. At the start, even if all callers but one do not read, it has room for the other.
    pub(super) fn connection(&self) -> u32 {
        let bytes = (MAX_STREAMS + 1) * self.first as usize + self.granted;
        u32::try_from(bytes).expect("a hundred first windows and the budget are less than 2 GiB")
    }

    /// Returns the windows of a stream and of the connection if they changed since they were last announced.
    pub(super) fn changed(&self) -> Option<(u32, u32)> {
        Some((self.stream, self.connection())).filter(|now| *now != self.announced)
    }

    /// Records what h2 was told.
    pub(super) fn set_announced(&mut self, windows: (u32, u32)) {
        self.announced = windows;
    }

    /// Whether one more response fits into the connection's window, even if no caller reads. With first windows, that
    /// holds for as many responses as the connection has streams.
    pub(super) fn has_room(&self) -> bool {
        self.stream == self.first || self.unread() + u64::from(self.first) <= u64::from(self.connection())
    }

    /// The bytes that callers can have left unread at most.
    fn unread(&self) -> u64 {
        let stream = u64::from(self.stream);
        self.bodies.iter().flatten().map(|body| body.left.map_or(stream, |left| left.min(stream))).sum()
    }

    /// The number of responses that can fill more than a first window.
    fn large(&self) -> u32 {
        let large = |body: &&Body| body.left.is_none_or(|left| left > u64::from(self.first));
        self.bodies.iter().flatten().filter(large).count() as u32
    }

    /// Adds the body of a response whose head has arrived. `length` is its length, if that is known.
    pub(super) fn begin(&mut self, length: Option<u64>) -> BodyKey {
        let body = Some(Body { left: length, read: 0, since: Instant::now() });
        let key = self.bodies.iter().position(Option::is_none).unwrap_or(self.bodies.len());
        if key == self.bodies.len() {
            self.bodies.push(body);
        } else {
            self.bodies[key] = body;
        }
        if self.stream > self.first && self.unread() > u64::from(self.connection()) {
            self.stream = self.fair_share();
        }
        BodyKey(key)
    }

    /// An equal part of the connection's window for each large response, but for what is reserved.
    fn fair_share(&self) -> u32 {
        ((self.connection() - self.reserved()) / self.large().max(1)).max(self.first)
    }

    /// What grown windows leave for responses that begin later: half of the first windows, in bytes.
    fn reserved(&self) -> u32 {
        self.first * MAX_STREAMS as u32 / 2
    }

    /// Records that a caller read `bytes`. `round_trip` is that of the connection, once it is known.
    pub(super) fn read(&mut self, key: &BodyKey, bytes: usize, round_trip: Option<Duration>) {
        let Some(body) = &mut self.bodies[key.0] else { return };
        if body.read == 0 {
            body.since = Instant::now();
        }
        body.read += bytes as u64;
        body.left = body.left.map(|left| left.saturating_sub(bytes as u64));
        if body.read < u64::from(self.stream) {
            return;
        }
        let took = body.since.elapsed();
        body.read = 0;
        let more_to_come = body.left.is_none_or(|left| left > u64::from(self.stream));
        if let Some(round_trip) = round_trip
            && more_to_come
            && took <= round_trip * ROUND_TRIPS
        {
            self.grow(round_trip);
        }
    }

    fn grow(&mut self, round_trip: Duration) {
        fail_point!("window_fixed", |_| ());
        let useful = (round_trip.as_secs_f64() * SPEED).min(f64::from(u32::MAX)) as u32;
        let wanted = self.stream.saturating_mul(GROWTH).min(useful);
        if wanted <= self.stream {
            return;
        }
        let needed = wanted as usize * self.large().max(1) as usize + self.reserved() as usize;
        self.granted += self.budget.take(needed.saturating_sub(self.connection() as usize));
        let grown = wanted.min(self.fair_share());
        if grown <= self.stream {
            return;
        }
        tracing::debug!(window = grown, "the path to Amazon allows more");
        self.stream = grown;
        for body in self.bodies.iter_mut().flatten() {
            body.read = 0;
        }
    }

    /// Removes a body.
    pub(super) fn end(&mut self, key: &BodyKey) {
        self.bodies[key.0] = None;
    }

    /// Returns to the first windows, and what was granted to the budget.
    pub(super) fn reset(&mut self) {
        self.budget.give_back(std::mem::take(&mut self.granted));
        self.stream = self.first;
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.budget.give_back(self.granted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND_TRIP: Option<Duration> = Some(Duration::from_millis(50));

    fn windows(budget: &Arc<WindowBudget>) -> Windows {
        Windows::new(budget.clone(), FIRST)
    }

    #[test]
    fn a_caller_that_reads_gets_the_path_and_one_that_does_not_gets_the_first_window() {
        let budget = Arc::default();
        let mut windows = windows(&budget);
        let (reading, _still) = (windows.begin(None), windows.begin(None));
        assert_eq!((windows.stream, windows.changed()), (FIRST, None));
        for window in [FIRST, 8 * FIRST, 64 * FIRST] {
            assert_eq!(windows.stream, window);
            windows.read(&reading, window as usize / 2, ROUND_TRIP);
            assert_eq!(windows.stream, window, "half a window proves nothing");
            windows.read(&reading, window as usize / 2, ROUND_TRIP);
        }
        let (stream, connection) = windows.changed().unwrap();
        assert!(stream > 8 << 20 && connection >= 2 * stream, "{stream} of {connection}");
        assert!(windows.unread() <= u64::from(connection));
    }

    #[test]
    fn a_window_does_not_grow_beyond_what_the_round_trip_or_the_response_needs() {
        let budget = Arc::default();
        for (length, round_trip, most) in [
            (None, None, FIRST),
            (None, Some(Duration::from_micros(60)), FIRST),
            (None, Some(Duration::from_micros(200)), 200_000),
            (Some(2 * u64::from(FIRST)), ROUND_TRIP, FIRST),
        ] {
            let mut windows = windows(&budget);
            let body = windows.begin(length);
            for _ in 0..10 {
                windows.read(&body, FIRST as usize, round_trip);
            }
            assert!((FIRST..=most).contains(&windows.stream), "{length:?} {round_trip:?}: {}", windows.stream);
        }
    }

    #[test]
    fn all_windows_together_stay_within_the_budget_and_give_it_back() {
        let budget = Arc::<WindowBudget>::default();
        let mut all: Vec<_> = (0..40).map(|_| windows(&budget)).collect();
        for windows in &mut all {
            let bodies: Vec<_> = (0..MAX_STREAMS).map(|_| windows.begin(None)).collect();
            for _ in 0..5 {
                let window = windows.stream as usize;
                windows.read(&bodies[0], window, ROUND_TRIP);
            }
            assert!(windows.unread() <= u64::from(windows.connection()));
        }
        let granted: usize = all.iter().map(|windows| windows.granted).sum();
        assert!(granted > BUDGET / 2 && granted <= BUDGET, "{granted}");
        all.iter_mut().step_by(2).for_each(Windows::reset);
        drop(all);
        assert_eq!(budget.0.load(Relaxed), BUDGET);
    }

    #[test]
    fn responses_that_fill_a_grown_window_send_others_to_another_connection() {
        let budget = Arc::default();
        let mut windows = windows(&budget);
        let body = windows.begin(None);
        for _ in 0..5 {
            let window = windows.stream as usize;
            windows.read(&body, window, ROUND_TRIP);
        }
        let grown = windows.stream;
        assert!(windows.has_room(), "the others of a lone large response share the connection");
        let short: Vec<_> = (0..20).map(|_| windows.begin(Some(100_000))).collect();
        assert!(windows.has_room() && windows.stream == grown, "short responses take no more than their length");
        short.iter().for_each(|body| windows.end(body));
        let _more: Vec<_> = (0..3).map(|_| windows.begin(None)).collect();
        assert!(windows.stream < grown, "large ones share");
    }

    #[test]
    fn the_windows_of_a_crowd_are_small() {
        let total: u64 = (0..20).map(|hundred| u64::from(first_window(hundred * 100)) * 100).sum();
        assert!(total < 14 << 20, "{total}");
        assert!((0..20).all(|hundred| first_window(hundred * 100) >= SMALLEST - 9));
    }
}
