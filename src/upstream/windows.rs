//! HTTP/2 flow-control windows that follow the network path (RFC 9113, section 5.2).
//!
//! A window limits a download to one window per round trip: with 64 KiB and 50 ms that is 1.2 MB/s. A caller that does
//! not read, on the other hand, keeps a whole window in memory. So each connection begins with small windows. They grow
//! at once, to what its length and the round trip make useful, when a long response begins. They grow eightfold
//! whenever a caller has read a whole window within two round trips: such a response is limited by the window. Of a
//! short response the sockets' buffers may take everything, and nothing shows whether its caller reads; a crowd of such
//! callers therefore makes windows grow by little altogether, and on a connection that was opened in a crowd only once
//! a caller has read.
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
/// From this length on, in bytes, a response makes windows grow by as much as the budget has. The kernel and the socket
/// of a caller that reads nothing take less than that.
const LONG: u64 = 1 << 20;
/// Bytes by which all windows together may grow for shorter responses.
const BUDGET_OF_SHORT: usize = 2 << 20;
/// How much a window grows at once. From 64 KiB it takes three steps to 32 MiB, each of one round trip.
const GROWTH: u32 = 8;
/// The least by which it grows: less is not worth a frame.
const STEP: u32 = 16 << 10;
/// The speed that one stream may reach, in bytes per second: windows beyond it would only cost memory.
const SPEED: f64 = 1e9;
/// The part of a large window that is measured: the window has to have grown before the server has filled it.
const PART: u32 = 4;
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
    /// Takes at most `bytes`, and at most seven eighths of what is left of the first `most` bytes of the budget, so
    /// that other connections can grow too. With three quarters, a lone download of 64 MiB waited longer for the server
    /// after its first window.
    fn take(&self, bytes: usize, most: usize) -> usize {
        let share = |left: usize| bytes.min((left + most).saturating_sub(BUDGET) / 8 * 7);
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
///
/// What all responses on the connection can fill together never exceeds its own window: a caller that does not read
/// delays no other.
#[derive(Debug)]
pub(super) struct Windows {
    budget: Arc<WindowBudget>,
    /// The window of a stream at the start.
    first: u32,
    /// The window of a stream.
    stream: u32,
    /// Requests on the way to their response.
    waiting: usize,
    /// The largest window that one of them has.
    sent_with: u32,
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
    /// The largest window that it had.
    window: u32,
    /// Bytes that the caller read since `since`.
    read: u64,
    since: Instant,
    /// Bytes that the caller read.
    total: u64,
}

impl Body {
    /// The bytes that its caller can leave unread at most, with a window of `window` from now on.
    fn unread(&self, window: u32) -> u64 {
        let window = u64::from(window.max(self.window));
        self.left.map_or(window, |left| left.min(window))
    }
}

/// Names a response body in its [`Windows`].
#[derive(Debug)]
pub(super) struct BodyKey(usize);

impl Windows {
    pub(super) fn new(budget: Arc<WindowBudget>, first: u32) -> Self {
        let (announced, bodies) = ((0, 0), Vec::new());
        let mut new = Self { budget, first, stream: first, waiting: 0, sent_with: 0, granted: 0, announced, bodies };
        new.announced = (first, new.connection());
        new
    }

    /// Whether the connection was opened while many requests were in flight.
    pub(super) fn is_for_a_crowd(&self) -> bool {
        self.first < FIRST
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

    pub(super) fn set_announced(&mut self, windows: (u32, u32)) {
        self.announced = windows;
    }

    /// Adds a request if its response fits into the connection's window even if no caller reads; returns whether it
    /// did. If only a first window fits, that is what those that follow get.
    pub(super) fn reserve(&mut self) -> bool {
        let window = self.stream.max(self.announced.0);
        let most = u64::from(self.connection());
        // The first windows of all streams fit.
        let small = window == self.first && self.bodies.is_empty() && self.sent_with <= self.first;
        let others = if window > self.first { self.reserved() } else { 0 };
        if !small && self.unread(0) + u64::from(window) + others > most {
            self.stream = self.first;
            return false;
        }
        self.waiting += 1;
        self.sent_with = self.sent_with.max(window);
        true
    }

    /// Removes a request that got no response with a body.
    pub(super) fn abandon(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0 {
            self.sent_with = 0;
        }
    }

    /// The bytes that callers can leave unread at most, if the window of a stream becomes `window`.
    fn unread(&self, window: u32) -> u64 {
        let bodies: u64 = self.bodies.iter().flatten().map(|body| body.unread(window)).sum();
        bodies + self.waiting as u64 * u64::from(window.max(self.sent_with))
    }

    /// Adds the body of a response whose head has arrived. `length` is its length, if that is known, and `round_trip`
    /// that of the connection.
    pub(super) fn begin(&mut self, length: Option<u64>, round_trip: Option<Duration>) -> BodyKey {
        let window = self.sent_with.max(self.first);
        self.abandon();
        let body = Some(Body { left: length, window, read: 0, since: Instant::now(), total: 0 });
        let key = self.bodies.iter().position(Option::is_none).unwrap_or(self.bodies.len());
        if key == self.bodies.len() {
            self.bodies.push(body);
        } else {
            self.bodies[key] = body;
        }
        // On a connection for a crowd, only what its callers read shows that more is of use.
        let may_grow = |length| !self.is_for_a_crowd() || length >= LONG;
        if let (Some(length), Some(round_trip)) = (length, round_trip)
            && length > u64::from(self.stream)
            && may_grow(length)
        {
            let most = if length >= LONG { BUDGET } else { BUDGET_OF_SHORT };
            self.grow(u32::try_from(length).unwrap_or(u32::MAX), round_trip, most);
        }
        BodyKey(key)
    }

    /// Records that a caller read `bytes`. `round_trip` is that of the connection, once it is known.
    pub(super) fn read(&mut self, key: &BodyKey, bytes: usize, round_trip: Option<Duration>) {
        let Some(body) = &mut self.bodies[key.0] else { return };
        if body.read == 0 {
            body.since = Instant::now();
        }
        body.read += bytes as u64;
        body.total += bytes as u64;
        body.left = body.left.map(|left| left.saturating_sub(bytes as u64));
        // More than sockets take shows that the caller reads, so that the part of a large window is enough.
        let part = if self.stream / PART >= LONG as u32 { PART } else { 1 };
        if body.read < u64::from(self.stream / part) {
            return;
        }
        let took = body.since.elapsed() * part;
        body.read = 0;
        let most = if body.total >= LONG / 2 { BUDGET } else { BUDGET_OF_SHORT };
        let more_to_come = body.left.is_none_or(|left| left > u64::from(self.stream));
        if let Some(round_trip) = round_trip
            && more_to_come
            && took <= round_trip * ROUND_TRIPS
        {
            let wanted = self.stream.saturating_mul(GROWTH).max(self.stream.saturating_add(STEP));
            self.grow(wanted, round_trip, most);
        }
    }

    /// What is kept for first windows: half of those of all streams.
    fn reserved(&self) -> u64 {
        u64::from(self.first) * MAX_STREAMS as u64 / 2
    }

    /// Lets the windows of the streams grow to `wanted`, or as far as is useful and the first `most` bytes of the
    /// budget allow.
    fn grow(&mut self, wanted: u32, round_trip: Duration, most: usize) {
        fail_point!("window_fixed", |_| ());
        let useful = (round_trip.as_secs_f64() * SPEED).min(f64::from(u32::MAX)) as u32;
        let wanted = wanted.min(useful);
        if wanted <= self.stream {
            return;
        }
        let needed = self.unread(wanted) + self.reserved();
        let missing = needed.saturating_sub(u64::from(self.connection()));
        self.granted += self.budget.take(usize::try_from(missing).unwrap_or(usize::MAX), most);
        let wanted = self.largest_that_fits(wanted);
        if wanted < self.stream.saturating_add(STEP) {
            return;
        }
        tracing::debug!(window = wanted, "the path to Amazon allows more");
        self.stream = wanted;
        if self.waiting > 0 {
            self.sent_with = self.sent_with.max(wanted);
        }
        for body in self.bodies.iter_mut().flatten() {
            (body.read, body.window) = (0, body.window.max(wanted));
        }
    }

    /// The largest window up to `wanted` that the connection has room for, to within [`STEP`].
    fn largest_that_fits(&self, wanted: u32) -> u32 {
        let room = u64::from(self.connection()).saturating_sub(self.reserved());
        let fits = |window: u32| self.unread(window) <= room;
        let (mut least, mut most) = (self.stream, wanted);
        while most - least >= STEP {
            let middle = most - (most - least) / 2;
            if fits(middle) { least = middle } else { most = middle - 1 }
        }
        if fits(most) { most } else { least }
    }

    /// Removes a body. After the last one the windows are small enough for several requests at once.
    pub(super) fn end(&mut self, key: &BodyKey) {
        self.bodies[key.0] = None;
        while self.bodies.pop_if(|last| last.is_none()).is_some() {}
        if self.bodies.is_empty() {
            self.stream = self.stream.min(self.first.max(LONG as u32));
        }
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

    /// What the driver of the connection does.
    fn announce(windows: &mut Windows) {
        if let Some(changed) = windows.changed() {
            windows.set_announced(changed);
        }
    }

    /// The bytes that callers who read nothing can leave unread.
    fn unread(windows: &Windows) -> u64 {
        windows.unread(0)
    }

    #[test]
    fn a_caller_that_reads_gets_the_path_and_one_that_does_not_gets_the_first_window() {
        let budget = Arc::default();
        let mut windows = windows(&budget);
        let (reading, _still) = (windows.begin(None, None), windows.begin(None, None));
        assert_eq!((windows.stream, windows.changed()), (FIRST, None));
        windows.read(&reading, FIRST as usize / 2, ROUND_TRIP);
        assert_eq!(windows.stream, FIRST, "half a window proves nothing");
        windows.read(&reading, FIRST as usize / 2, ROUND_TRIP);
        assert_eq!(windows.stream, 8 * FIRST);
        windows.read(&reading, 8 * FIRST as usize, ROUND_TRIP);
        let (stream, connection) = windows.changed().unwrap();
        assert!(stream > 3 << 20 && connection >= 2 * stream, "{stream} of {connection}");
        assert!(unread(&windows) <= u64::from(connection));
    }

    #[test]
    fn a_long_response_gets_its_window_at_once_and_a_crowd_of_them_stays_within_the_budget() {
        let budget = Arc::<WindowBudget>::default();
        let mut all: Vec<_> = (0..40).map(|_| windows(&budget)).collect();
        assert!(all[0].reserve());
        let lone = all[0].begin(Some(64 << 20), ROUND_TRIP);
        assert!(all[0].stream > 16 << 20, "{}", all[0].stream);
        assert!(unread(&all[0]) <= u64::from(all[0].connection()));
        all[0].end(&lone);
        for (length, round_trip) in [(1 << 20, Some(Duration::from_micros(60))), (1 << 20, None), (1000, ROUND_TRIP)] {
            let mut other = windows(&budget);
            other.begin(Some(length), round_trip);
            assert_eq!(other.changed(), None, "{length} {round_trip:?}");
        }
        for windows in &mut all {
            announce(windows);
            for _ in 0..MAX_STREAMS {
                if windows.reserve() {
                    windows.begin(Some(64 << 20), ROUND_TRIP);
                    announce(windows);
                }
            }
            assert!(unread(windows) <= u64::from(windows.connection()));
        }
        let granted: usize = all.iter().map(|windows| windows.granted).sum();
        assert!(granted <= BUDGET, "{granted}");
    }

    #[test]
    fn a_long_response_whose_caller_reads_gets_more_before_its_window_is_full() {
        let budget = Arc::default();
        let mut windows = windows(&budget);
        assert!(windows.reserve());
        let body = windows.begin(Some(64 << 20), ROUND_TRIP);
        let first = windows.stream;
        assert!(first > 31 << 20, "all that seven eighths of the budget allow: {first}");
        windows.read(&body, first as usize / 8, ROUND_TRIP);
        assert_eq!(windows.stream, first);
        windows.read(&body, first as usize / 8 + 1, ROUND_TRIP);
        assert!(windows.stream > first + (3 << 20), "{} after {first}", windows.stream);
        assert!(unread(&windows) <= u64::from(windows.connection()));
    }

    #[test]
    fn a_crowd_of_short_responses_makes_the_windows_grow_by_little() {
        let budget = Arc::<WindowBudget>::default();
        let mut all: Vec<_> = (0..20).map(|_| windows(&budget)).collect();
        for windows in &mut all {
            for _ in 1..=MAX_STREAMS {
                let body = windows.begin(Some(200_000), ROUND_TRIP);
                windows.read(&body, FIRST as usize, ROUND_TRIP);
                let unknown = windows.begin(None, ROUND_TRIP);
                windows.read(&unknown, 256 << 10, ROUND_TRIP);
            }
        }
        let granted: usize = all.iter().map(|windows| windows.granted).sum();
        assert!(granted <= BUDGET_OF_SHORT, "{granted}");
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
            let body = windows.begin(length, None);
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
            let bodies: Vec<_> = (0..10).map(|_| windows.begin(None, None)).collect();
            for _ in 0..5 {
                let window = (windows.stream as usize).max(LONG as usize / 2);
                windows.read(&bodies[0], window, ROUND_TRIP);
            }
            assert!(unread(windows) <= u64::from(windows.connection()));
        }
        let granted: usize = all.iter().map(|windows| windows.granted).sum();
        assert!(granted > BUDGET / 2 && granted <= BUDGET, "{granted}");
        all.iter_mut().step_by(2).for_each(Windows::reset);
        drop(all);
        assert_eq!(budget.0.load(Relaxed), BUDGET);
    }

    #[test]
    fn callers_that_read_nothing_of_long_responses_leave_room_for_others_or_send_them_elsewhere() {
        let budget = Arc::default();
        let mut windows = windows(&budget);
        assert!(windows.reserve());
        windows.begin(Some(64 << 20), ROUND_TRIP);
        announce(&mut windows);
        let grown = windows.stream;
        // The next goes elsewhere, and those after it share what is left, in small windows.
        assert!(!windows.reserve());
        announce(&mut windows);
        let mut requests = 1;
        for _ in 0..MAX_STREAMS {
            if windows.reserve() {
                windows.begin(Some(64 << 20), ROUND_TRIP);
                requests += 1;
            }
            announce(&mut windows);
            assert!(unread(&windows) <= u64::from(windows.connection()), "{requests}");
        }
        assert!(grown > FIRST && requests > 20, "{requests} {grown}");
    }

    #[test]
    fn after_a_long_response_many_requests_fit_at_once() {
        let budget = Arc::default();
        let mut windows = windows(&budget);
        let body = windows.begin(Some(64 << 20), ROUND_TRIP);
        announce(&mut windows);
        windows.end(&body);
        announce(&mut windows);
        assert!((0..24).all(|_| windows.reserve()));
        assert_eq!(u64::from(windows.stream), LONG);
    }

    #[test]
    fn a_short_response_on_a_connection_for_a_crowd_makes_no_window_grow_before_its_caller_has_read() {
        let budget = Arc::default();
        let mut windows = Windows::new(Arc::clone(&budget), first_window(5 * MAX_STREAMS));
        let (first, connection) = (windows.stream, windows.connection());
        let body = windows.begin(Some(200_000), ROUND_TRIP);
        assert_eq!((windows.stream, windows.connection()), (first, connection));
        windows.read(&body, first as usize, ROUND_TRIP);
        assert!(windows.stream > first, "a caller that reads gets more");
        let mut windows = Windows::new(budget, first_window(5 * MAX_STREAMS));
        windows.begin(Some(LONG), ROUND_TRIP);
        assert!(windows.stream > first, "and so does a long response");
    }

    #[test]
    fn the_windows_of_a_crowd_are_small() {
        let total: u64 = (0..20).map(|hundred| u64::from(first_window(hundred * 100)) * 100).sum();
        assert!(total < 14 << 20, "{total}");
        assert!((0..20).all(|hundred| first_window(hundred * 100) >= SMALLEST - 9));
    }
}
