//! Chooses whether a request uses the shared HTTP/2 connection or an HTTP/1.1 connection of its own.
//!
//! At high concurrency HTTP/2 is cheap, because the frames of several requests share one TLS record and one system
//! call. At low concurrency that advantage is missing, but framing, HPACK and two more tasks still cost CPU. Measured,
//! HTTP/2 takes 5 to 25 % more CPU than HTTP/1.1 for up to eight concurrent requests, and 5 to 10 % less for sixteen
//! and more.
//!
//! Only steady traffic justifies additional connections. The shared connection stays open for occasional requests and
//! for bursts.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::lock;

/// Below this concurrency HTTP/1.1 costs less CPU.
const LOW_CONCURRENCY: usize = 12;
/// After this many consecutive requests at low concurrency on the shared connection, HTTP/1.1 connections are opened. A
/// TLS handshake costs as much CPU as a few dozen requests.
const ADD_HTTP1_AFTER: u32 = 64;

/// The concurrency of requests to one origin, and how steady it is.
#[derive(Debug, Default)]
pub(super) struct ProtocolChoice {
    in_flight: Arc<AtomicUsize>,
    run: Mutex<Run>,
    /// Whether a task is opening HTTP/1.1 connections.
    pub(super) adding: AtomicBool,
}

/// A run of consecutive requests at low concurrency on the shared connection.
#[derive(Debug, Default)]
struct Run {
    since: Option<Instant>,
    requests: u32,
}

/// Keeps a counter incremented until it is dropped.
#[derive(Debug)]
pub(super) struct CountGuard(Arc<AtomicUsize>);

impl CountGuard {
    /// Increments `count`, and returns the guard and the value before.
    pub(super) fn increment(count: &Arc<AtomicUsize>) -> (Self, usize) {
        let others = count.fetch_add(1, Relaxed);
        (Self(count.clone()), others)
    }
}

impl Drop for CountGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl ProtocolChoice {
    /// Counts a request as in flight while the guard exists, and returns whether concurrency is low.
    pub(super) fn enter(&self) -> (CountGuard, bool) {
        let (guard, others) = CountGuard::increment(&self.in_flight);
        (guard, others < LOW_CONCURRENCY)
    }

    /// Returns the number of requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// Records a request on the shared connection. Returns `true` if it completes a run of [`ADD_HTTP1_AFTER`] requests
    /// at low concurrency within `period`, so that HTTP/1.1 connections should be opened.
    pub(super) fn should_add_http1(&self, low_concurrency: bool, period: Duration) -> bool {
        let mut run = lock(&self.run);
        if !low_concurrency {
            *run = Run::default();
            return false;
        }
        let now = Instant::now();
        let since = run.since.filter(|since| now.duration_since(*since) < period).unwrap_or_else(|| {
            run.requests = 0;
            now
        });
        *run = Run { since: Some(since), requests: run.requests + 1 };
        let complete = run.requests == ADD_HTTP1_AFTER;
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

    #[test]
    fn concurrency_is_low_until_more_requests_are_in_flight() {
        let choice = ProtocolChoice::default();
        let requests: Vec<_> = (0..=LOW_CONCURRENCY).map(|_| choice.enter()).collect();
        let low: Vec<_> = requests.iter().map(|(_, low)| *low).collect();
        assert!(low[..LOW_CONCURRENCY].iter().all(|low| *low) && !low[LOW_CONCURRENCY]);
        drop(requests);
        assert!(choice.enter().1, "completed requests do not count");
    }

    #[test]
    fn occasional_requests_complete_no_run() {
        let choice = ProtocolChoice::default();
        assert!((0..3 * ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, Duration::ZERO)));
    }

    #[test]
    fn each_run_at_low_concurrency_completes_once() {
        let choice = ProtocolChoice::default();
        let completed: Vec<_> = (1..=2 * ADD_HTTP1_AFTER).filter(|_| choice.should_add_http1(true, PERIOD)).collect();
        assert_eq!(completed, [ADD_HTTP1_AFTER, 2 * ADD_HTTP1_AFTER]);
    }

    #[test]
    fn high_concurrency_restarts_the_run() {
        let choice = ProtocolChoice::default();
        assert!((1..ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, PERIOD)));
        assert!(!choice.should_add_http1(false, PERIOD));
        assert!((1..ADD_HTTP1_AFTER).all(|_| !choice.should_add_http1(true, PERIOD)));
        assert!(choice.should_add_http1(true, PERIOD));
    }
}
