//! When a process polls a shared store, and when it claims the refreshes that are due there. Decisions alone, without a
//! clock or a database: `tests/bench/fleet_simulation.rs` makes them for a thousand processes.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::domain::grant::RefreshPolicy;

/// Interval for polling changes made by other processes, give or take a seventh. A logout is obeyed within a second by
/// processes that hear of it by a poll alone.
pub const POLL: Duration = Duration::from_millis(700);
/// Pause after a notification of a change, so that many at once cause one poll.
const NOTIFIED_PAUSE: Duration = Duration::from_millis(40);
/// Interval for reading the rows of users whose refresh was due.
const LOOK: Duration = Duration::from_secs(3);
/// How long after a refresh was due its row is read first.
const FIRST_LOOK: Duration = Duration::from_secs(30);
/// The pause after the first claim that found nothing.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A claim that finds this many refreshes could have come sooner.
const MANY: usize = 3;
/// So could one that finds a refresh that has been due for so long.
const LATE: SignedDuration = SignedDuration::from_secs(5);
/// A fleet stood still if what it found at its start had been due for longer than this, and than its longest pause.
const STOOD_STILL: Duration = Duration::from_secs(60);

/// The pause before the next poll. `jitter` is random, in `0.0..1.0`, here and below.
pub fn poll_pause(jitter: f64) -> Duration {
    POLL.mul_f64(0.86 + 0.28 * jitter)
}

/// The pause between a notification of a change and the poll that it causes.
pub fn notified_pause(jitter: f64) -> Duration {
    NOTIFIED_PAUSE.mul_f64(jitter)
}

/// How long after a refresh was due a process reads the row of a user that it holds, to take note of another process's
/// refresh; `last` is how long after it was due that it did so last. Most are made by the first time. Later ones are
/// ever further apart, as a refresh may not come at all.
pub fn next_look(last: Option<Duration>) -> Duration {
    last.map_or(FIRST_LOOK, |last| last * 2)
}

/// The pause between two times that a process looks which rows to read. `jitter` is random, in `0.0..1.0`.
pub fn look_pause(jitter: f64) -> Duration {
    LOOK.mul_f64(0.86 + 0.28 * jitter)
}

/// The longest pause before a claim: half of the time in which a background refresh helps. After it, callers cause the
/// refresh themselves.
pub fn longest_pause(policy: RefreshPolicy) -> Duration {
    policy.ahead.saturating_sub(policy.margin) / 2
}

/// Whether nobody can have looked for a while for what was due at `due_at`: a fleet claims what is due within
/// `longest`, and one that has stood still starts with a backlog.
pub fn is_backlog(due_at: Option<Timestamp>, wall: Timestamp, longest: Duration) -> bool {
    let late = due_at.and_then(|due| Duration::try_from(wall.duration_since(due)).ok());
    late.is_some_and(|late| late > longest.max(STOOD_STILL))
}

/// When this process claims due refreshes.
///
/// Every process hears from its polls when the next refresh is due. If all of them claimed it then, one would get it
/// and the others would ask in vain. So each waits for a random part of its pause, which it learns: a claim that finds
/// nothing doubles it, one that finds many, or one that is late, halves it. The more processes there are, and the less
/// there is to do, the longer are their pauses, without any of them knowing how many they are. A process that is alone
/// never waits.
///
/// Times called `now` are since any one instant, by the monotonic clock.
#[derive(Clone, Debug, Default)]
pub struct ClaimPace {
    /// When the next refresh is due, as of the last poll; `None` if none is, or until the next poll.
    due_at: Option<Timestamp>,
    /// When this process claims, if something is due by then.
    claim_at: Option<Duration>,
    pause: Duration,
}

impl ClaimPace {
    /// Takes over what a poll found: the next refresh is due at `due_at`.
    pub fn polled(&mut self, due_at: Option<Timestamp>, wall: Timestamp, now: Duration, jitter: f64) {
        self.due_at = due_at;
        let Some(due_at) = due_at else { return self.claim_at = None };
        let left = due_at.duration_since(wall);
        // Zero if it is past.
        let first = now.saturating_add(Duration::try_from(left).unwrap_or_default());
        // The plan stands if something is due by then. It does not if others have made what it was for, or if something
        // is due sooner than what was known.
        let is_past = !left.is_positive();
        let planned = self.claim_at.filter(|at| (is_past || *at >= first) && *at <= first.saturating_add(self.pause));
        self.claim_at = Some(planned.unwrap_or_else(|| first.saturating_add(self.pause.mul_f64(jitter))));
    }

    /// Whether to claim now.
    pub fn is_due(&self, wall: Timestamp, now: Duration) -> bool {
        self.claim_at.is_some_and(|at| at <= now) && self.due_at.is_some_and(|due| due <= wall)
    }

    /// How long nothing is to be claimed, unless a poll says otherwise; `None` if nothing is known to be due.
    pub fn wait(&self, wall: Timestamp, now: Duration) -> Option<Duration> {
        let until_due = Duration::try_from(self.due_at?.duration_since(wall)).unwrap_or_default();
        Some(self.claim_at?.saturating_sub(now).max(until_due))
    }

    /// Learns from a claim that found `found` of at most `limit` refreshes. Returns whether to claim again at once.
    pub fn claimed(&mut self, found: usize, limit: usize, wall: Timestamp, now: Duration, longest: Duration) -> bool {
        let is_late = self.due_at.is_some_and(|due| wall.duration_since(due) > LATE);
        let is_full = found >= limit;
        let shorter = Some(self.pause / 2).filter(|pause| *pause >= FIRST_PAUSE).unwrap_or_default();
        let pause = match found {
            0 => (self.pause * 2).max(FIRST_PAUSE),
            _ if found >= MANY || is_late || is_full => shorter,
            _ => self.pause,
        };
        self.pause = pause.min(longest);
        if is_full {
            self.claim_at = Some(now);
        } else {
            self.forget();
        }
        is_full
    }

    /// Forgets what is due, until the next poll says it.
    pub fn forget(&mut self) {
        (self.due_at, self.claim_at) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(300);

    /// The wall clock, milliseconds after the start.
    fn wall(millis: i64) -> Timestamp {
        Timestamp::from_millisecond(1_790_000_000_000 + millis).unwrap()
    }

    fn ms(millis: i64) -> Duration {
        Duration::from_millis(millis.unsigned_abs())
    }

    fn polled(pace: &mut ClaimPace, due: i64, now: i64, jitter: f64) {
        pace.polled(Some(wall(due)), wall(now), ms(now), jitter);
    }

    fn is_due(pace: &ClaimPace, now: i64) -> bool {
        pace.is_due(wall(now), ms(now))
    }

    fn claimed(pace: &mut ClaimPace, found: usize, now: i64) -> bool {
        pace.claimed(found, 8, wall(now), ms(now), LONGEST)
    }

    fn paused(seconds: u64) -> ClaimPace {
        ClaimPace { pause: Duration::from_secs(seconds), ..ClaimPace::default() }
    }

    #[test]
    fn nothing_is_claimed_before_it_is_due_or_without_a_poll() {
        let mut pace = ClaimPace::default();
        assert!(!is_due(&pace, 0) && pace.wait(wall(0), ms(0)).is_none());
        polled(&mut pace, 1000, 0, 0.9);
        assert!(!is_due(&pace, 999) && is_due(&pace, 1000));
        assert_eq!(pace.wait(wall(300), ms(300)), Some(ms(700)));
        pace.polled(None, wall(1000), ms(1000), 0.9);
        assert!(!is_due(&pace, 1000));
    }

    #[test]
    fn a_process_that_is_alone_never_waits() {
        let mut pace = ClaimPace::default();
        for now in (0..100_000).step_by(1000) {
            polled(&mut pace, now, now, 0.9);
            assert!(is_due(&pace, now));
            assert!(!claimed(&mut pace, 1, now));
        }
    }

    #[test]
    fn claims_in_vain_lengthen_the_pause_up_to_the_longest() {
        let mut pace = ClaimPace::default();
        let mut waits = Vec::new();
        for _ in 0..14 {
            claimed(&mut pace, 0, 0);
            polled(&mut pace, 0, 0, 1.0);
            waits.push(pace.wait(wall(0), ms(0)).unwrap().as_millis());
        }
        assert_eq!((waits[0], waits[1], waits[2], waits[13]), (500, 1000, 2000, 300_000));
    }

    #[test]
    fn many_or_late_refreshes_shorten_the_pause_again() {
        let learned = |found, due| {
            let mut pace = paused(8);
            polled(&mut pace, due, 0, 0.0);
            claimed(&mut pace, found, 0);
            pace.pause.as_secs()
        };
        assert_eq!((learned(3, 0), learned(1, -6000), learned(1, 0), learned(2, -4000)), (4, 4, 8, 8));
        let mut pace = ClaimPace { pause: FIRST_PAUSE, ..ClaimPace::default() };
        claimed(&mut pace, 3, 0);
        assert_eq!(pace.pause, Duration::ZERO);
    }

    #[test]
    fn a_full_claim_is_followed_by_another_at_once() {
        let mut pace = paused(60);
        polled(&mut pace, 0, 0, 0.5);
        assert!(!is_due(&pace, 29_999) && is_due(&pace, 30_000));
        assert!(claimed(&mut pace, 8, 30_000) && is_due(&pace, 30_000));
    }

    #[test]
    fn polls_do_not_put_off_a_plan_while_something_is_due_by_then() {
        let mut pace = paused(4);
        polled(&mut pace, 0, 0, 0.5);
        for now in [700, 1400] {
            polled(&mut pace, now, now, 0.99);
            assert!(!is_due(&pace, now));
        }
        polled(&mut pace, 1900, 2100, 0.99);
        assert!(is_due(&pace, 2100), "others made what was due, and there is more");
    }

    #[test]
    fn a_plan_follows_what_is_due_later_or_sooner() {
        let mut pace = paused(4);
        polled(&mut pace, 0, 0, 0.5);
        polled(&mut pace, 60_000, 700, 0.5);
        assert!(!is_due(&pace, 61_999) && is_due(&pace, 62_000), "others made what was due");
        polled(&mut pace, 10_000, 1400, 0.5);
        assert!(!is_due(&pace, 11_999) && is_due(&pace, 12_000), "somebody logged in");
    }

    #[test]
    fn a_step_of_the_wall_clock_is_followed_from_the_next_poll_on() {
        let mut pace = paused(4);
        polled(&mut pace, 3_000_000, 0, 0.5);
        // The wall clock jumps by an hour.
        pace.polled(Some(wall(3_000_000)), wall(3_600_000), ms(700), 0.5);
        assert!(!pace.is_due(wall(3_600_000), ms(2699)) && pace.is_due(wall(3_600_000), ms(2700)));
    }

    #[test]
    fn rows_are_read_ever_more_rarely_while_a_refresh_does_not_come() {
        let looks = std::iter::successors(Some(next_look(None)), |last| Some(next_look(Some(*last))));
        let seconds: Vec<_> = looks.map(|look| look.as_secs()).take_while(|seconds| *seconds < 600).collect();
        assert_eq!(seconds, [30, 60, 120, 240, 480], "in the ten minutes before requests read the row themselves");
    }

    #[test]
    fn a_backlog_is_what_a_living_fleet_would_have_claimed() {
        let is_backlog = |late: i64| is_backlog(Some(wall(0)), wall(late), LONGEST);
        assert_eq!([-1000, 0, 299_000, 301_000].map(is_backlog), [false, false, false, true]);
        assert!(!super::is_backlog(None, wall(0), LONGEST) && !super::is_backlog(Some(wall(0)), wall(59_000), ms(0)));
    }

    #[test]
    fn the_longest_pause_leaves_half_of_the_time_before_callers_wait() {
        let policy = |ahead, margin| RefreshPolicy {
            ahead: Duration::from_secs(ahead),
            margin: Duration::from_secs(margin),
            idle_after: Duration::from_secs(7 * 24 * 3600),
        };
        assert_eq!(longest_pause(policy(900, 300)), Duration::from_secs(300));
        assert_eq!(longest_pause(policy(60, 300)), Duration::ZERO);
    }
}
