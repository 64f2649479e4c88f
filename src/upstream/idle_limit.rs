//! How long an origin lets a connection idle, learned from the closes that are seen.
//!
//! A request that may not be repeated must not meet a close: over HTTP/1.1 nobody can tell whether a server that closes
//! a connection has read what just arrived there. A load balancer that is reloaded closes all its idle connections at
//! once, however young they are (measured with nginx and HAProxy, reloaded every five seconds: 17 of 100,000 POSTs were
//! lost that way). So such requests get only connections that have not carried a request yet, each of which costs a
//! handshake, until the origin has kept its connections for [`FIRST_PROBATION`], and again for [`PROBATION`] after it
//! closed one.

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
const FIRST_PROBATION: Duration = Duration::from_secs(60);
/// The same after it closed one: it may be one that does so every few minutes.
const PROBATION: Duration = Duration::from_secs(600);
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
    /// From when the origin is trusted to keep young connections; `None` until the first one becomes idle.
    trusted_from: Option<Instant>,
}

impl IdleLimit {
    pub(super) fn new(timeout: IdleTimeout) -> Self {
        let most = match timeout {
            IdleTimeout::Auto => MOST,
            IdleTimeout::AtMost(most) => most,
        };
        Self { most, learned: Mutex::new(Learned { limit: AT_FIRST, closed: None, trusted_from: None }) }
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
        if learned.trusted_from.is_none_or(|from| Instant::now() < from) {
            return Duration::ZERO;
        }
        match learned.closed() {
            Some(closed) => limit.min((closed * 8 / 10).saturating_sub(MARGIN)),
            None => limit,
        }
    }

    /// A connection became idle.
    pub(super) fn released(&self) {
        lock(&self.learned).trusted_from.get_or_insert_with(|| Instant::now() + FIRST_PROBATION);
    }

    /// The server closed a connection that had idled this long, or announced that it would.
    pub(super) fn closed_after(&self, idle: Duration) {
        let mut learned = lock(&self.learned);
        if idle < LEAST {
            learned.trusted_from = Some(Instant::now() + PROBATION);
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
        lock(&limit.learned).trusted_from = Some(Instant::now());
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
        let wait = |limit: &IdleLimit| lock(&limit.learned).trusted_from.unwrap() - Instant::now();
        assert!(wait(&limit) <= FIRST_PROBATION);
        let limit = trusted(IdleTimeout::Auto);
        limit.released();
        assert_eq!(limit.safe(), 55 * SECOND);
        // One reload of a load balancer is enough.
        limit.closed_after(Duration::from_millis(2));
        limit.released();
        assert_eq!((limit.current(), limit.safe()), (55 * SECOND, Duration::ZERO));
        assert!(wait(&limit) > FIRST_PROBATION, "an origin that did so once is watched for longer");
    }

    #[test]
    fn a_configured_duration_bounds_the_limit() {
        let limit = trusted(IdleTimeout::AtMost(SECOND));
        (0..10).for_each(|_| limit.survived());
        assert_eq!((limit.current(), limit.safe()), (SECOND, SECOND));
    }
}
