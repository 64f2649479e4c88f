//! How long an origin lets a connection idle, learned from the closes that are seen.
//!
//! A request that may not be repeated must not meet a close: over HTTP/1.1 nobody can tell whether a server that closes
//! a connection has read what just arrived there. A load balancer that is reloaded closes all its idle connections at
//! once, however young they are (measured with nginx and HAProxy, reloaded every five seconds: 17 of 100,000 POSTs were
//! lost that way). So such requests get only connections that have not carried a request yet, until the origin has kept
//! its connections for [`PROBATION`], and for twice as long as it ever did before it closed young ones.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::lock;

/// The limit until a close is seen: most load balancers close after 60 seconds.
const AT_FIRST: Duration = Duration::from_secs(55);
/// The largest limit: a NAT gateway of Amazon's forgets a connection after 350 seconds.
const MOST: Duration = Duration::from_secs(315);
/// A server that closes sooner than this after a response has another reason than idleness.
const LEAST: Duration = Duration::from_millis(500);
/// For how long a close that was seen is believed.
const BELIEVED: Duration = Duration::from_secs(600);
/// After this time without a close of a young connection, the origin is trusted to keep young connections.
const PROBATION: Duration = Duration::from_secs(60);
/// The longest such time, for an origin that was seen to close young connections now and then.
const LONGEST_PROBATION: Duration = Duration::from_secs(600);
/// Margin of time before a close, for requests that may not be repeated: the longest round trip.
const MARGIN: Duration = Duration::from_millis(100);

/// `upstream.idle_timeout`: how long an unused connection is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdleTimeout {
    /// As long as the server is seen to allow.
    #[default]
    Auto,
    /// The same, but at most this long.
    AtMost(Duration),
}

/// What is known about an origin's limit.
#[derive(Debug)]
pub(super) struct IdleLimit {
    most: Duration,
    learned: Mutex<Learned>,
}

#[derive(Debug)]
struct Learned {
    /// The current limit.
    limit: Duration,
    /// The shortest idle time after which the server closed a connection, and when that was.
    closed: Option<(Duration, Instant)>,
    /// When the first connection became idle, or the server last closed one within [`LEAST`].
    calm_since: Option<Instant>,
    /// How long it has to be calm.
    probation: Duration,
}

impl IdleLimit {
    pub(super) fn new(timeout: IdleTimeout) -> Self {
        let most = match timeout {
            IdleTimeout::Auto => MOST,
            IdleTimeout::AtMost(most) => most,
        };
        let learned = Learned { limit: AT_FIRST, closed: None, calm_since: None, probation: PROBATION };
        Self { most, learned: Mutex::new(learned) }
    }

    /// How long a connection may idle and still carry a request.
    pub(super) fn current(&self) -> Duration {
        lock(&self.learned).limit.min(self.most)
    }

    /// How long a connection that has carried a request may idle and still carry one that may not be repeated: the
    /// server is not closing it while the request is on its way.
    pub(super) fn safe(&self) -> Duration {
        let learned = lock(&self.learned);
        let limit = learned.limit.min(self.most);
        if learned.calm_since.is_none_or(|since| since.elapsed() < learned.probation) {
            return Duration::ZERO;
        }
        match learned.closed() {
            Some(closed) => limit.min((closed * 8 / 10).saturating_sub(MARGIN)),
            None => limit,
        }
    }

    /// A connection became idle.
    pub(super) fn released(&self) {
        lock(&self.learned).calm_since.get_or_insert_with(Instant::now);
    }

    /// The server closed a connection that had idled this long, or announced that it would.
    pub(super) fn closed_after(&self, idle: Duration) {
        let mut learned = lock(&self.learned);
        if idle < LEAST {
            let calm = learned.calm_since.replace(Instant::now()).map_or(Duration::ZERO, |since| since.elapsed());
            learned.probation = learned.probation.max((calm * 2).min(LONGEST_PROBATION));
            return;
        }
        let shortest = learned.closed().map_or(idle, |closed| closed.min(idle));
        learned.closed = Some((shortest, Instant::now()));
        learned.limit = learned.limit.min(idle * 9 / 10);
    }

    /// A connection idled up to the current limit, and the server had not closed it.
    pub(super) fn survived(&self) {
        let mut learned = lock(&self.learned);
        let ceiling = learned.closed().map_or(MOST, |closed| closed * 9 / 10);
        learned.limit = (learned.limit * 5 / 4).min(ceiling).max(learned.limit);
    }
}

impl Learned {
    fn closed(&self) -> Option<Duration> {
        self.closed.filter(|(_, at)| at.elapsed() < BELIEVED).map(|(idle, _)| idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A limit whose origin has been calm for as long as it takes.
    fn trusted(timeout: IdleTimeout) -> IdleLimit {
        let limit = IdleLimit::new(timeout);
        lock(&limit.learned).calm_since = Instant::now().checked_sub(PROBATION);
        limit
    }

    #[test]
    fn the_limit_follows_what_the_server_does() {
        let limit = trusted(IdleTimeout::Auto);
        assert_eq!((limit.current(), limit.safe()), (55 * SECOND, 55 * SECOND));
        limit.survived();
        assert!(limit.current() > 60 * SECOND);
        limit.closed_after(60 * SECOND);
        limit.survived();
        assert_eq!(limit.current(), 54 * SECOND, "it does not try again at once");
        limit.closed_after(5 * SECOND);
        assert_eq!(limit.current(), 5 * SECOND * 9 / 10);
        assert!(limit.safe() < limit.current());
        (0..100).for_each(|_| limit.survived());
        assert_eq!(limit.current(), 5 * SECOND * 9 / 10);
    }

    #[test]
    fn requests_that_may_not_be_repeated_get_new_connections_until_the_origin_has_kept_its_own() {
        let limit = IdleLimit::new(IdleTimeout::Auto);
        assert_eq!((limit.current(), limit.safe()), (55 * SECOND, Duration::ZERO), "nothing is known");
        limit.released();
        assert_eq!(limit.safe(), Duration::ZERO, "nor at once");
        let limit = trusted(IdleTimeout::Auto);
        limit.released();
        assert_eq!(limit.safe(), 55 * SECOND);
        // One reload of a load balancer is enough.
        limit.closed_after(Duration::from_millis(2));
        limit.released();
        assert_eq!((limit.current(), limit.safe()), (55 * SECOND, Duration::ZERO));
    }

    #[test]
    fn an_origin_that_closes_young_connections_now_and_then_is_trusted_only_after_twice_that_time() {
        let limit = IdleLimit::new(IdleTimeout::Auto);
        let calm_for = |seconds: u32| lock(&limit.learned).calm_since = Instant::now().checked_sub(seconds * SECOND);
        // For each reload of a load balancer: how long it was calm before, and then how long is not and is enough.
        for (before, short, enough) in [(5, 55, 61), (100, 195, 201), (20, 195, 201), (3000, 595, 601)] {
            calm_for(before);
            limit.closed_after(Duration::ZERO);
            calm_for(short);
            assert_eq!(limit.safe(), Duration::ZERO, "{short} s after {before} s");
            calm_for(enough);
            assert_eq!(limit.safe(), 55 * SECOND, "{enough} s after {before} s");
        }
    }

    #[test]
    fn a_configured_duration_bounds_the_limit() {
        let limit = trusted(IdleTimeout::AtMost(SECOND));
        (0..10).for_each(|_| limit.survived());
        assert_eq!((limit.current(), limit.safe()), (SECOND, SECOND));
    }
}
