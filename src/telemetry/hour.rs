//! The last hour, minute by minute, for the charts of the status page. The sums of a minute are differences of the
//! metrics, taken once a minute: no request pays for them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use jiff::SignedDuration;

use super::metrics::{Metrics, Totals};

/// Minutes that are shown, the current one included.
pub const MINUTES: usize = 60;

/// The sums of the last minutes.
#[derive(Debug, Default)]
pub struct Hour(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// The minutes that are over, the latest last.
    over: VecDeque<Totals>,
    /// The number of the current minute, since the start.
    current: i64,
    /// The counts when it began.
    before: Totals,
}

impl Hour {
    /// Ends the current minute if it is over at `uptime`. Call it more often than once a minute.
    pub fn roll(&self, uptime: SignedDuration, metrics: &Metrics) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).roll(uptime, || metrics.totals());
    }

    /// The sums of the last hour's minutes, the current one last.
    pub fn minutes(&self, uptime: SignedDuration, metrics: &Metrics) -> [Totals; MINUTES] {
        let totals = metrics.totals();
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.roll(uptime, || totals);
        let mut minutes = [Totals::default(); MINUTES];
        let known = inner.over.iter().copied().chain([since(totals, inner.before)]);
        let first = MINUTES - 1 - inner.over.len();
        minutes[first..].iter_mut().zip(known).for_each(|(minute, sums)| *minute = sums);
        minutes
    }
}

impl Inner {
    fn roll(&mut self, uptime: SignedDuration, totals: impl FnOnce() -> Totals) {
        let minute = uptime.as_secs() / 60;
        if minute <= self.current {
            return;
        }
        let totals = totals();
        self.over.push_back(since(totals, self.before));
        // Minutes in which nobody looked, such as those of a suspended machine.
        let skipped = usize::try_from(minute - self.current - 1).unwrap_or(MINUTES).min(MINUTES);
        self.over.extend(std::iter::repeat_n(Totals::default(), skipped));
        let surplus = self.over.len().saturating_sub(MINUTES - 1);
        self.over.drain(..surplus);
        (self.current, self.before) = (minute, totals);
    }
}

/// What was counted between `before` and `now`.
fn since(now: Totals, before: Totals) -> Totals {
    Totals {
        requests: now.requests.saturating_sub(before.requests),
        errors: now.errors.saturating_sub(before.errors),
        refreshes: now.refreshes.saturating_sub(before.refreshes),
        failed_refreshes: now.failed_refreshes.saturating_sub(before.failed_refreshes),
        waits: now.waits.saturating_sub(before.waits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Settings;

    #[test]
    fn a_minute_holds_what_happened_in_it_and_an_hour_has_sixty() {
        let metrics = Metrics::new(Settings { max_user_series: 1 }, 0.0).unwrap();
        let hour = Hour::default();
        let at = SignedDuration::from_secs;
        let requests = |seconds| hour.minutes(at(seconds), &metrics).map(|minute| minute.requests);
        let count = |status| metrics.requests.with_label_values(&["", "", "GET", status, "amazon"]).inc();
        count("200");
        count("404");
        assert_eq!(requests(59)[59], 2, "the current minute is the last one");
        hour.roll(at(61), &metrics);
        count("503");
        assert_eq!(requests(119)[58..], [2, 1]);
        assert_eq!(hour.minutes(at(119), &metrics).map(|minute| minute.errors)[58..], [1, 1]);
        assert_eq!(requests(300)[54..], [2, 1, 0, 0, 0, 0], "minutes in which nobody looked are empty");
        assert_eq!(requests(3600)[..2], [1, 0], "the first minute has left");
        assert_eq!(requests(100_000), [0; 60]);
    }
}
