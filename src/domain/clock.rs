//! The clock: wall-clock time, monotonic time, and Amazon's time as far as its responses reveal it. Tests replace only
//! this type to control time.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use http::HeaderMap;
use http::header::{AGE, DATE};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;

use crate::domain::clock_reading::ClockReading;

/// Stands for Amazon's time before the first response with a `Date`.
const UNKNOWN: i64 = i64::MIN;

/// A source of time. A clone is another handle to the same clock.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// `None`: the time comes from the machine's clocks. `Some`: both clocks stand still, the wall clock at this time.
    frozen: Option<Timestamp>,
    started: Instant,
    /// Offset of the wall clock in nanoseconds, from `advance` and `step`.
    wall_moved: AtomicI64,
    /// Offset of the monotonic clock in nanoseconds, from `advance`.
    uptime_moved: AtomicI64,
    /// Amazon's time in milliseconds since 1970, minus the uptime at which it was received. It is based on uptime so
    /// that a step of our wall clock does not change it.
    amazon: AtomicI64,
    moves: watch::Sender<()>,
}

/// A subscription to changes of the time by [`Clock::advance`] or [`Clock::step`].
#[derive(Debug)]
pub struct Moves(watch::Receiver<()>);

impl Moves {
    /// Waits for the next change. Changes between two calls count as one, and none is missed.
    pub async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            // The clock was dropped, so no change can follow.
            std::future::pending().await
        }
    }
}

impl Clock {
    /// A clock that reads the machine's clocks.
    pub fn system() -> Self {
        Self::over(None)
    }

    /// A clock that stands still at `start` until `advance` or `step` moves it; for tests.
    pub fn frozen(start: Timestamp) -> Self {
        Self::over(Some(start))
    }

    fn over(frozen: Option<Timestamp>) -> Self {
        Self(Arc::new(Inner {
            frozen,
            started: Instant::now(),
            wall_moved: AtomicI64::new(0),
            uptime_moved: AtomicI64::new(0),
            amazon: AtomicI64::new(UNKNOWN),
            moves: watch::Sender::new(()),
        }))
    }

    /// Returns the current wall-clock time.
    pub fn now(&self) -> Timestamp {
        let base = self.0.frozen.unwrap_or_else(Timestamp::now);
        let moved = self.0.wall_moved.load(Relaxed);
        // Nothing has moved outside tests, and each request asks several times.
        if moved == 0 {
            return base;
        }
        let moved = SignedDuration::from_nanos(moved);
        let end = if moved.is_negative() { Timestamp::MIN } else { Timestamp::MAX };
        base.checked_add(moved).unwrap_or(end)
    }

    /// Returns the monotonic time since this clock was created. It does not advance while the machine is suspended.
    pub fn uptime(&self) -> SignedDuration {
        let moved = self.0.uptime_moved.load(Relaxed);
        let base = match self.0.frozen {
            Some(_) => SignedDuration::ZERO,
            None => SignedDuration::try_from(self.0.started.elapsed()).unwrap_or(SignedDuration::MAX),
        };
        // As in `now`: nothing has moved outside tests.
        if moved == 0 { base } else { base.saturating_add(SignedDuration::from_nanos(moved)) }
    }

    /// Reads every clock.
    pub fn reading(&self) -> ClockReading {
        let uptime = self.uptime();
        let amazon = match self.0.amazon.load(Relaxed) {
            UNKNOWN => None,
            base => {
                let millis = i64::try_from(uptime.as_millis()).unwrap_or(i64::MAX);
                Timestamp::from_millisecond(base.saturating_add(millis)).ok()
            }
        };
        ClockReading { wall: self.now(), uptime, amazon }
    }

    /// Records Amazon's time as of now, and returns how far the wall clock is ahead of it (negative: behind).
    pub fn set_amazon_time(&self, time: Timestamp) -> SignedDuration {
        let uptime = i64::try_from(self.uptime().as_millis()).unwrap_or(i64::MAX);
        self.0.amazon.store(time.as_millisecond().saturating_sub(uptime), Relaxed);
        self.now().duration_since(time)
    }

    /// Moves this clock for all its handles and wakes everything that sleeps on it. A positive `by` moves both clocks;
    /// a negative one sets back only the wall clock, because the monotonic clock cannot go backward. Only the sandbox
    /// and the tests move time.
    pub fn advance(&self, by: SignedDuration) {
        if by.is_positive() {
            add(&self.0.uptime_moved, by);
        }
        self.step(by);
    }

    /// Moves only the wall clock, as when an operator sets it or (forward) when the machine slept.
    pub fn step(&self, by: SignedDuration) {
        add(&self.0.wall_moved, by);
        self.0.moves.send_replace(());
    }

    /// Subscribes to changes from now on.
    pub fn moves(&self) -> Moves {
        Moves(self.0.moves.subscribe())
    }

    /// Waits until the uptime reaches `deadline`.
    pub async fn sleep_until(&self, deadline: SignedDuration) {
        let mut moves = self.moves();
        loop {
            let left = deadline.saturating_sub(self.uptime());
            if left <= SignedDuration::ZERO {
                return;
            }
            if self.0.frozen.is_some() {
                moves.next().await;
            } else {
                let nap = Duration::try_from(left).unwrap_or_default();
                tokio::select! {
                    () = tokio::time::sleep(nap) => {}
                    () = moves.next() => {}
                }
            }
        }
    }
}

/// Returns the time in a response's `Date` header (RFC 9110, section 6.6.1), or `None` if it is missing or invalid, or
/// if the response came from a cache (`Age`) and so carries an old date.
pub fn date_of(headers: &HeaderMap) -> Option<Timestamp> {
    if headers.contains_key(AGE) {
        return None;
    }
    let date = headers.get(DATE)?.to_str().ok()?;
    jiff::fmt::rfc2822::parse(date).ok().map(|date| date.timestamp())
}

/// Adds `by` to an offset, saturating.
fn add(moved: &AtomicI64, by: SignedDuration) {
    let nanos = i64::try_from(by.as_nanos()).unwrap_or(if by.is_negative() { i64::MIN } else { i64::MAX });
    let _ = moved.fetch_update(Relaxed, Relaxed, |moved| Some(moved.saturating_add(nanos)));
}

/// A time as people and programs read it: RFC 3339 in UTC, to the second.
pub fn to_the_second(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `at` without what is below its milliseconds, for JSON.
pub fn to_the_millisecond(at: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(at.as_millisecond()).unwrap_or(at)
}

/// Serializes a time [to the millisecond](to_the_millisecond).
///
/// # Errors
/// Those of `serializer`.
pub fn serialize_to_the_millisecond<S: serde::Serializer>(
    at: &Option<Timestamp>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&at.map(to_the_millisecond), serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    #[tokio::test]
    async fn a_frozen_clock_moves_only_by_advance_and_wakes_its_sleepers() {
        let clock = Clock::frozen(start());
        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep_until(SignedDuration::from_secs(3600)).await }
        });
        tokio::task::yield_now().await;
        clock.advance(SignedDuration::from_secs(3599));
        tokio::task::yield_now().await;
        assert!(!sleeper.is_finished());
        clock.advance(SignedDuration::from_secs(1));
        sleeper.await.unwrap();
        assert_eq!(clock.now(), start() + SignedDuration::from_secs(3600));
    }

    #[test]
    fn a_step_moves_only_the_wall_clock_and_uptime_never_goes_back() {
        let clock = Clock::frozen(start());
        clock.step(SignedDuration::from_hours(48));
        clock.advance(SignedDuration::from_hours(-1));
        assert_eq!((clock.now(), clock.uptime()), (start() + SignedDuration::from_hours(47), SignedDuration::ZERO));
    }

    #[test]
    fn amazons_time_advances_with_uptime_whatever_the_wall_clock_does() {
        let clock = Clock::frozen(start());
        assert_eq!(clock.reading().amazon, None);
        let theirs = start() - SignedDuration::from_secs(90);
        assert_eq!(clock.set_amazon_time(theirs), SignedDuration::from_secs(90));
        clock.step(SignedDuration::from_hours(-240));
        clock.advance(SignedDuration::from_secs(60));
        assert_eq!(clock.reading().amazon, Some(theirs + SignedDuration::from_secs(60)));
    }

    #[test]
    fn a_cached_response_gives_no_time() {
        let mut headers = HeaderMap::new();
        assert_eq!(date_of(&headers), None);
        headers.insert(DATE, "Thu, 01 Jan 2026 00:00:00 GMT".parse().unwrap());
        assert_eq!(date_of(&headers), Some(start()));
        headers.insert(AGE, "0".parse().unwrap());
        assert_eq!(date_of(&headers), None);
        headers.remove(AGE);
        headers.insert(DATE, "yesterday".parse().unwrap());
        assert_eq!(date_of(&headers), None);
    }

    #[tokio::test]
    async fn the_system_clock_returns_at_once_for_the_past() {
        let clock = Clock::system();
        clock.sleep_until(SignedDuration::ZERO).await;
    }
}
