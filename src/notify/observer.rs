//! Decides what has happened, from what the users' grants look like from one look to the next.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};

use crate::auth::tokens::Status;
use crate::domain::account::{Region, UserId};
use crate::domain::clock_reading::ClockReading;
use crate::domain::event::Happened;
use crate::domain::grant::State;

/// Days before the end of a consent at which it is told.
const CONSENT_DAYS: [i64; 3] = [1, 7, 30];
/// Without a 429 for this long, Amazon no longer throttles.
const THROTTLE_PAUSE: SignedDuration = SignedDuration::from_secs(60);

/// A grant that changed within this time is a new one, if its user was not known.
const RECENT: SignedDuration = SignedDuration::from_secs(60);

/// When a state is told that may pass by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// After how long refreshes count as failing.
    pub(super) failing: SignedDuration,
    /// After how long Amazon counts as throttling.
    pub(super) throttled: SignedDuration,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Observer {
    users: HashMap<UserId, Seen>,
    regions: [Throttle; 3],
    /// Whether this is not the first look, in which every user is new.
    looked: bool,
}

#[derive(Debug, Default)]
struct Seen {
    /// The look in which the user was last there, to forget those that have logged out.
    present: bool,
    /// When the tokens for which a login is needed last changed; `None` if none is needed.
    login_needed: Option<Option<Timestamp>>,
    consented_at: Option<Timestamp>,
    /// The uptime at which refreshes began to fail, and whether that was told.
    failing: Option<(SignedDuration, bool)>,
    /// The consent and the days that were told last.
    consent: Option<(Timestamp, i64)>,
}

#[derive(Debug, Default)]
struct Throttle {
    /// 429 responses so far; `None` before the first look.
    count: Option<u64>,
    /// When the throttling began, by both clocks, and the uptime of the last 429.
    lasting: Option<(Timestamp, SignedDuration, SignedDuration)>,
    told: bool,
}

impl Observer {
    /// What has happened since the last look at `statuses`: of all users, if `complete`, so that one who is missing has
    /// logged out. `throttled` counts, for each region, the 429 responses since the start and the looks at a pause.
    pub(super) fn look(
        &mut self,
        statuses: &[Status],
        complete: bool,
        throttled: [u64; 3],
        now: ClockReading,
        patience: Patience,
    ) -> Vec<Happened> {
        let mut happened = Vec::new();
        self.users.values_mut().for_each(|seen| seen.present = false);
        for status in statuses {
            let known = self.users.contains_key(&status.user_id);
            let seen = self.users.entry(status.user_id.clone()).or_default();
            // A user who comes back into memory is known without a login.
            let recent = |at: Timestamp| now.wall.duration_since(at) < RECENT;
            let new = !known && self.looked && status.updated_at.is_some_and(recent);
            seen.look(status, new, now, patience, &mut happened);
        }
        self.users.retain(|_, seen| seen.present || !complete);
        self.looked = true;
        for ((region, throttle), count) in Region::ALL.into_iter().zip(&mut self.regions).zip(throttled) {
            happened.extend(throttle.look(region, count, now, patience.throttled));
        }
        happened
    }
}

impl Seen {
    fn look(&mut self, status: &Status, new: bool, now: ClockReading, patience: Patience, out: &mut Vec<Happened>) {
        let user = || status.user_id.clone();
        let needed = status.state == State::LoginRequired;
        let first =
            !std::mem::replace(&mut self.present, true) && self.login_needed.is_none() && self.consented_at.is_none();
        let needed_since = needed.then_some(status.updated_at);
        // A login between two looks shows only in the time.
        if needed && self.login_needed != needed_since {
            let reason = status.last_error.unwrap_or("invalid_grant");
            out.push(Happened::LoginNeeded { user: user(), reason, since: status.updated_at });
        }
        let consented = !first && self.consented_at != status.consented_at && status.consented_at.is_some();
        if !needed && (new || self.login_needed.is_some() || consented) {
            let (consented_at, since) = (status.consented_at, status.updated_at);
            out.push(Happened::LoginDone { user: user(), consented_at, since });
        }
        (self.login_needed, self.consented_at) = (needed_since, status.consented_at);

        self.failing = (status.state == State::Failing).then(|| self.failing.unwrap_or((now.uptime, false)));
        if let Some((since, told)) = &mut self.failing {
            let lasting = now.uptime.saturating_sub(*since);
            if !*told && lasting >= patience.failing {
                *told = true;
                let reason = status.last_error.unwrap_or("unknown");
                out.push(Happened::RefreshFailing { user: user(), reason, lasting, since: status.updated_at });
            }
        }

        let Some(expires_at) = status.consent_expires_at else { return };
        let left = expires_at.duration_since(now.wall);
        // The user of a consent that has ended is told that a login is needed.
        let due = CONSENT_DAYS.into_iter().find(|days| left <= SignedDuration::from_hours(24 * days));
        if let Some(days) = due.filter(|_| left.is_positive())
            && self.consent != Some((expires_at, days))
        {
            self.consent = Some((expires_at, days));
            out.push(Happened::ConsentEnding { user: user(), days, expires_at });
        }
    }
}

impl Throttle {
    fn look(&mut self, region: Region, count: u64, now: ClockReading, patience: SignedDuration) -> Option<Happened> {
        let more = self.count.replace(count).is_some_and(|before| count > before);
        match &mut self.lasting {
            Some((.., last)) if more => *last = now.uptime,
            Some((.., last)) if now.uptime.saturating_sub(*last) > THROTTLE_PAUSE => {
                (self.lasting, self.told) = (None, false);
            }
            None if more => self.lasting = Some((now.wall, now.uptime, now.uptime)),
            _ => {}
        }
        let (since, begun, last) = self.lasting?;
        // From the first 429 to the last one: a single one lasts no time.
        let lasting = last.saturating_sub(begun);
        let due = !self.told && lasting >= patience && (more || patience.is_zero());
        self.told |= due;
        due.then_some(Happened::Throttled { region, lasting, since })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience =
        Patience { failing: SignedDuration::from_mins(15), throttled: SignedDuration::from_mins(5) };

    fn at(seconds: i64) -> ClockReading {
        let start: Timestamp = "2026-08-01T12:00:00Z".parse().unwrap();
        let uptime = SignedDuration::from_secs(seconds);
        ClockReading { wall: start + uptime, uptime, amazon: None }
    }

    fn status(state: State, consented_at: Option<&str>) -> Status {
        let consented_at: Option<Timestamp> = consented_at.map(|at| at.parse().unwrap());
        Status {
            user_id: "shop".parse().unwrap(),
            state,
            expires_at: None,
            updated_at: consented_at,
            consented_at,
            consent_expires_at: consented_at.map(|at| at + SignedDuration::from_hours(365 * 24)),
            consent: None,
            last_error: (state != State::Fresh).then_some("server_error"),
            next_refresh_at: None,
        }
    }

    fn kinds(happened: &[Happened]) -> Vec<&'static str> {
        let name = |happened: &Happened| match happened {
            Happened::LoginNeeded { .. } => "needed",
            Happened::LoginDone { .. } => "done",
            Happened::ConsentEnding { days: 1, .. } => "1 day",
            Happened::ConsentEnding { days: 7, .. } => "7 days",
            Happened::ConsentEnding { .. } => "30 days",
            Happened::RefreshFailing { .. } => "failing",
            Happened::Throttled { .. } => "throttled",
            Happened::Test => "test",
        };
        happened.iter().map(name).collect()
    }

    #[test]
    fn a_login_is_needed_once_and_done_once() {
        let mut observer = Observer::default();
        let mut look =
            |statuses: &[Status], second| kinds(&observer.look(statuses, true, [0; 3], at(second), PATIENCE));
        let old = Some("2026-08-01T11:00:00Z");
        assert_eq!(look(&[status(State::Fresh, old)], 0), Vec::<&str>::new(), "who is there at the start is no news");
        assert_eq!(look(&[status(State::LoginRequired, old)], 1), ["needed"]);
        assert_eq!(look(&[status(State::LoginRequired, old)], 2), Vec::<&str>::new());
        assert_eq!(look(&[status(State::Fresh, Some("2026-08-01T12:00:03Z"))], 3), ["done"]);
        assert_eq!(look(&[status(State::Fresh, Some("2026-08-01T12:00:04Z"))], 4), ["done"], "once more");
        assert_eq!(look(&[], 5), Vec::<&str>::new(), "a logout is no event");
        assert_eq!(look(&[status(State::Fresh, Some("2026-08-01T12:00:06Z"))], 6), ["done"]);
        let mut restarted = Observer::default();
        let needed = restarted.look(&[status(State::LoginRequired, old)], true, [0; 3], at(0), PATIENCE);
        assert_eq!(kinds(&needed), ["needed"], "a restart tells it again, under the same id");
    }

    #[test]
    fn the_end_of_a_consent_is_told_at_30_7_and_1_days() {
        let mut observer = Observer::default();
        let day = |days: i64| (365 - days) * 86_400;
        let user = [status(State::Fresh, Some("2026-08-01T12:00:00Z"))];
        let mut look = |second| kinds(&observer.look(&user, true, [0; 3], at(second), PATIENCE));
        assert_eq!(look(0), Vec::<&str>::new());
        assert_eq!(look(day(31)), Vec::<&str>::new());
        assert_eq!(look(day(30)), ["30 days"]);
        assert_eq!(look(day(29)), Vec::<&str>::new());
        assert_eq!(look(day(7)), ["7 days"]);
        assert_eq!(look(day(1)), ["1 day"]);
        assert_eq!(look(day(1) + 3600), Vec::<&str>::new());
        assert_eq!(look(day(0)), Vec::<&str>::new(), "what has ended does not end soon");
    }

    #[test]
    fn failing_refreshes_and_throttling_are_told_when_they_last() {
        let mut observer = Observer::default();
        let failing = [status(State::Failing, None)];
        let mut look = |statuses: &[Status], count, second| {
            kinds(&observer.look(statuses, true, [count, 0, 0], at(second), PATIENCE))
        };
        assert_eq!(look(&failing, 0, 0), Vec::<&str>::new());
        assert_eq!(look(&failing, 0, 899), Vec::<&str>::new());
        assert_eq!(look(&failing, 0, 900), ["failing"]);
        assert_eq!(look(&failing, 0, 5000), Vec::<&str>::new());
        assert_eq!(look(&[status(State::Fresh, None)], 0, 5001), Vec::<&str>::new());
        assert_eq!(look(&failing, 0, 5002), Vec::<&str>::new(), "the time begins anew");
        assert_eq!(look(&failing, 0, 5902), ["failing"]);

        let mut throttled: Vec<&str> = Vec::new();
        for minute in 0..=10 {
            throttled.extend(look(&[], 1 + minute, 6000 + 30 * i64::try_from(minute).unwrap()));
        }
        assert_eq!(throttled, ["throttled"], "after five minutes, once");
        assert_eq!(look(&[], 11, 6400), Vec::<&str>::new());
        assert_eq!(look(&[], 12, 9000), Vec::<&str>::new(), "a single 429 later is not a state");
    }
}
