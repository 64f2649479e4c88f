//! The clock: wall time, and sleeping until a point of it. The one seam that tests replace.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;

/// Longest uninterrupted sleep. The wall clock can be stepped and a node suspended while a monotonic timer stands
/// still, so every wait for a point of wall time wakes at least this often and looks again.
const LONGEST_NAP: Duration = Duration::from_secs(20);

/// Tells the wall time. Cloning gives another handle to the same clock.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// `None`: the machine's clock runs underneath. `Some`: it stands still at this instant.
    frozen: Option<Timestamp>,
    shift: watch::Sender<SignedDuration>,
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::over(None)
    }

    /// A clock that stands still at `start` until it is moved by [`advance`](Self::advance): for tests.
    pub fn frozen(start: Timestamp) -> Self {
        Self::over(Some(start))
    }

    fn over(frozen: Option<Timestamp>) -> Self {
        Self(Arc::new(Inner { frozen, shift: watch::Sender::new(SignedDuration::ZERO) }))
    }

    /// The wall time now.
    pub fn now(&self) -> Timestamp {
        let base = self.0.frozen.unwrap_or_else(Timestamp::now);
        base.saturating_add(*self.0.shift.borrow()).unwrap_or(Timestamp::MAX)
    }

    /// Moves this clock and all its handles, forward or backward, and wakes those who sleep on it. The sandbox and the
    /// tests move time; nothing in production does.
    pub fn advance(&self, by: SignedDuration) {
        self.0.shift.send_modify(|shift| *shift = shift.saturating_add(by));
    }

    /// Returns once the wall time is at or past `deadline`, however the clock was stepped meanwhile.
    pub async fn sleep_until(&self, deadline: Timestamp) {
        let mut shifted = self.0.shift.subscribe();
        loop {
            let left = deadline.duration_since(self.now());
            if left <= SignedDuration::ZERO {
                return;
            }
            if self.0.frozen.is_some() {
                // The sender lives as long as `self`, so this cannot fail.
                let _ = shifted.changed().await;
            } else {
                let nap = Duration::try_from(left).unwrap_or(LONGEST_NAP).min(LONGEST_NAP);
                tokio::select! {
                    () = tokio::time::sleep(nap) => {}
                    _ = shifted.changed() => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frozen_clock_moves_only_when_told_and_wakes_its_sleepers() {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let clock = Clock::frozen(start);
        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep_until(start + SignedDuration::from_secs(3600)).await }
        });
        tokio::task::yield_now().await;
        clock.advance(SignedDuration::from_secs(3599));
        tokio::task::yield_now().await;
        assert!(!sleeper.is_finished());
        clock.advance(SignedDuration::from_secs(1));
        sleeper.await.unwrap();
        assert_eq!(clock.now(), start + SignedDuration::from_secs(3600));
    }

    #[tokio::test]
    async fn the_system_clock_returns_at_once_for_the_past() {
        let clock = Clock::system();
        clock.sleep_until(Timestamp::UNIX_EPOCH).await;
    }
}
