//! Chooses whether a request uses the shared HTTP/2 connection or an HTTP/1.1 connection of its own.
//!
//! HTTP/2 is cheap for many short responses at once, because the frames of several requests share one TLS record and
//! one system call. At low concurrency that advantage is missing, but framing, HPACK and two more tasks still cost CPU;
//! and the frames of long responses are copied once more. Measured, HTTP/2 takes 5 to 25 % more CPU than HTTP/1.1 for
//! up to eight concurrent requests, and 5 to 10 % less for sixteen and more; but for responses of 64 KiB 10 % more, and
//! of 256 KiB and above 15 to 30 % more, for 24 and for 64 requests at once.
//!
//! Only steady traffic justifies additional connections. The shared connection stays open for occasional requests and
//! for bursts.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::lock;
use super::windows::MAX_STREAMS;

/// Below this concurrency HTTP/1.1 costs less CPU, however short the responses are.
pub(super) const LOW_CONCURRENCY: usize = 12;
/// From this mean length on, in bytes, responses are long.
const LONG: usize = 64 << 10;
/// Below this concurrency HTTP/1.1 costs less CPU while responses are long. More requests would need more connections
/// than are worth their memory.
const LOW_CONCURRENCY_OF_LONG: usize = MAX_STREAMS;
/// The weight of the last response in the mean length: one in this many.
const LATEST: usize = 16;
/// After this many consecutive requests that suit HTTP/1.1 on the shared connection, HTTP/1.1 connections are opened. A
/// TLS handshake costs as much CPU as a few dozen requests.
const ADD_HTTP1_AFTER: usize = 64;
/// A request counts once more for each time that the mean response has this length: the longer it is, the sooner a
/// handshake is worth its cost.
const COUNTS_AS_ONE: usize = 256 << 10;

/// What the requests to one origin are like, and how steady they are.
#[derive(Debug, Default)]
pub(super) struct ProtocolChoice {
    traffic: Arc<Traffic>,
    run: Mutex<Run>,
    /// Whether a task is opening HTTP/1.1 connections.
    pub(super) adding: AtomicBool,
}

/// The concurrency of requests, and the length of their responses.
#[derive(Debug, Default)]
struct Traffic {
    in_flight: AtomicUsize,
    /// The mean length of the last responses, in bytes.
    mean_length: AtomicUsize,
}

/// A run of consecutive requests that suit HTTP/1.1, on the shared connection.
#[derive(Debug, Default)]
struct Run {
    since: Option<Instant>,
    requests: usize,
}

/// Counts a request as in flight until it is dropped, and then the length of its response.
#[derive(Debug)]
pub(super) struct InFlight {
    traffic: Arc<Traffic>,
    received: usize,
}

impl InFlight {
    /// Records that `bytes` of the response arrived.
    pub(super) fn received(&mut self, bytes: usize) {
        self.received += bytes;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Traffic { in_flight, mean_length } = &*self.traffic;
        in_flight.fetch_sub(1, Relaxed);
        // Two that end together may count as one: it is only an estimate.
        let mean = mean_length.load(Relaxed);
        mean_length.store(mean - mean / LATEST + self.received / LATEST, Relaxed);
    }
}

impl ProtocolChoice {
    /// Counts a request as in flight while the guard exists, and returns whether HTTP/1.1 suits it better.
    pub(super) fn enter(&self) -> (InFlight, bool) {
        let others = self.traffic.in_flight.fetch_add(1, Relaxed);
        let is_long = self.traffic.mean_length.load(Relaxed) >= LONG;
        let most = if is_long { LOW_CONCURRENCY_OF_LONG } else { LOW_CONCURRENCY };
        (InFlight { traffic: self.traffic.clone(), received: 0 }, others < most)
    }

    /// Returns the number of requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.traffic.in_flight.load(Relaxed)
    }

    /// Records a request on the shared connection. Returns `true` if it completes a run of [`ADD_HTTP1_AFTER`] requests
    /// that suit HTTP/1.1 within `period`, so that HTTP/1.1 connections should be opened.
    pub(super) fn should_add_http1(&self, suits_http1: bool, period: Duration) -> bool {
        let mut run = lock(&self.run);
        if !suits_http1 {
            *run = Run::default();
            return false;
        }
        let now = Instant::now();
        let since = run.since.filter(|since| now.duration_since(*since) < period).unwrap_or_else(|| {
            run.requests = 0;
            now
        });
        let counts = 1 + self.traffic.mean_length.load(Relaxed) / COUNTS_AS_ONE;
        *run = Run { since: Some(since), requests: run.requests + counts };
        let complete = run.requests >= ADD_HTTP1_AFTER;
        if complete {
            *run = Run::default();
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(60);

    /// How many concurrent requests suit HTTP/1.1, of a hundred and fifty.
    fn suiting(choice: &ProtocolChoice) -> usize {
        let requests: Vec<_> = (0..150).map(|_| choice.enter()).collect();
        requests.iter().filter(|(_, suits_http1)| *suits_http1).count()
    }

    /// Lets the next responses have this length.
    fn respond(choice: &ProtocolChoice, responses: usize, length: usize) {
        for _ in 0..responses {
            choice.enter().0.received(length);
        }
    }

    #[test]
    fn few_requests_suit_http1_until_their_responses_are_long() {
        let choice = ProtocolChoice::default();
        assert_eq!(suiting(&choice), LOW_CONCURRENCY);
        assert_eq!(suiting(&choice), LOW_CONCURRENCY, "completed requests do not count");
        respond(&choice, 100, LONG / 2);
        assert_eq!(suiting(&choice), LOW_CONCURRENCY);
        respond(&choice, 100, 2 * LONG);
        assert_eq!(suiting(&choice), LOW_CONCURRENCY_OF_LONG);
        respond(&choice, 100, LONG / 2);
        assert_eq!(suiting(&choice), LOW_CONCURRENCY, "short ones again");
    }

    #[test]
    fn occasional_requests_complete_no_run() {
        let choice = ProtocolChoice::default();
        assert!((0..3 * ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, Duration::ZERO)));
    }

    #[test]
    fn a_run_of_requests_for_long_responses_is_shorter() {
        let choice = ProtocolChoice::default();
        respond(&choice, 1000, 3 * COUNTS_AS_ONE + COUNTS_AS_ONE / 2);
        let completed: Vec<_> = (1..=ADD_HTTP1_AFTER).filter(|_| choice.should_add_http1(true, PERIOD)).collect();
        assert_eq!(completed[..2], [ADD_HTTP1_AFTER / 4, ADD_HTTP1_AFTER / 2]);
    }

    #[test]
    fn each_run_completes_once() {
        let choice = ProtocolChoice::default();
        let completed: Vec<_> = (1..=2 * ADD_HTTP1_AFTER).filter(|_| choice.should_add_http1(true, PERIOD)).collect();
        assert_eq!(completed, [ADD_HTTP1_AFTER, 2 * ADD_HTTP1_AFTER]);
    }

    #[test]
    fn a_request_that_does_not_suit_http1_restarts_the_run() {
        let choice = ProtocolChoice::default();
        assert!((1..ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, PERIOD)));
        assert!(!choice.should_add_http1(false, PERIOD));
        assert!((1..ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, PERIOD)));
        assert!(choice.should_add_http1(true, PERIOD));
    }
}
