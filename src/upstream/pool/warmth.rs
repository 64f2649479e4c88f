//! Keeps connections to an origin open while it is in use, so that no request waits for a handshake.
//!
//! A connection that the server closed, or that will soon be too old, is replaced in the background; one that is of no
//! use to the server is replaced ever more seldom.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{AGING, Connections, Idle, MAX_AGE, OriginPool};
use crate::upstream::http2::{KEPT_WARM_FOR, WeakHttp2};
use crate::upstream::idle_limit::IdleLimit;
use crate::upstream::protocol_choice::LOW_CONCURRENCY;

/// Most connections that are opened in advance for requests that may not be repeated.
pub(super) const MOST_UNUSED: usize = 8;
/// By which part [`Connections::peak`] becomes smaller with each look at all connections.
const PEAK_FADES: usize = 16;
/// A connection that had no request for this long did not end because of one.
const IDLED: Duration = Duration::from_millis(100);
/// A server that closes an unused connection sooner than this does not want it, or cannot serve it.
const FLEETING: Duration = Duration::from_millis(500);
/// Shortest time between connections that are opened in the background.
const PACE: Duration = Duration::from_secs(1);
/// The longest time until the next one after several could not be opened, or were closed at once.
const RETRY: Duration = Duration::from_secs(10);
/// How long before its end a connection is replaced: three round trips, and some time until somebody looks.
const LEAD: Duration = Duration::from_secs(1);
/// How long an HTTP/1.1 connection idles beside a shared one that could take its requests, if the next crowd of long
/// responses alone would need it.
const SPARE: Duration = Duration::from_secs(5);
/// The longest time between two looks at all connections.
const LOOK: Duration = Duration::from_secs(1);

/// When a connection may be opened in the background.
#[derive(Debug, Default)]
pub(super) struct Background {
    /// Not before this time.
    at: Option<Instant>,
    /// How many in a row could not be opened, or were closed unused and at once.
    failures: u32,
}

impl Background {
    /// The time that is left until a connection may be opened.
    fn wait(&self) -> Duration {
        self.at.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()))
    }

    fn opens(&mut self) {
        self.at = Some(Instant::now() + PACE);
    }

    /// The last one was of no use, so the next one waits for longer.
    pub(super) fn failed(&mut self) {
        self.at = Some(Instant::now() + RETRY.min(PACE * 2_u32.pow(self.failures.min(8))));
        self.failures += 1;
    }
}

impl OriginPool {
    /// An HTTP/1.1 connection has ended. If it was idle, the server closed it.
    pub(super) fn http1_ended(self: &Arc<Self>) {
        let mut connections = self.lock();
        let mut closed = Vec::new();
        connections.idle.retain(|idle| {
            let open = !idle.is_closed();
            if !open {
                closed.push((idle.connection.reused, idle.since.elapsed()));
            }
            open
        });
        self.closed_by_server(&mut connections, &closed);
    }

    /// An HTTP/2 connection has ended. If it was idle and still in the pool, the server closed it.
    pub(super) fn http2_ended(self: &Arc<Self>, connection: &WeakHttp2) {
        let mut connections = self.lock();
        let before = connections.shared.len();
        connections.shared.retain(|other| !connection.is(other));
        let idle = connection.idle_for().filter(|_| connections.shared.len() < before);
        let used = connection.was_used();
        // One that carried a request just now may have broken because of it.
        if let Some(idle) = idle.filter(|idle| !used || *idle >= IDLED) {
            self.closed_by_server(&mut connections, &[(used, idle)]);
        }
    }

    /// Learns from idle connections that the server has closed: whether each had carried a request, and how long it
    /// had idled. Replaces them. Connections that broke are replaced with the next look at all of them, because a
    /// request that is sent again opens one too.
    fn closed_by_server(self: &Arc<Self>, connections: &mut Connections, closed: &[(bool, Duration)]) {
        let mut idled = false;
        for (used, idle) in closed.iter().copied() {
            self.limit(used).closed_after(idle);
            idled |= idle >= if used { IDLED } else { FLEETING };
            if !used && idle < FLEETING {
                connections.background.failed();
            }
        }
        if idled {
            self.keep_warm(connections, false);
        }
    }

    /// How long the origin lets a connection idle that has carried a request, or that has not.
    pub(super) fn limit(&self, used: bool) -> &IdleLimit {
        if used { &self.idle_limit } else { &self.unused_limit }
    }

    /// Counts the origin as in use, and opens a connection if it has none.
    pub(in crate::upstream) fn warm(self: &Arc<Self>) {
        self.used.touch();
        self.keep_warm(&mut self.lock(), false);
    }

    /// Opens a connection for the next request, if the origin was used lately and has none that will last. A request in
    /// flight will leave its own, unless all are `aging`. Returns the time until it is worth another look.
    pub(super) fn keep_warm(self: &Arc<Self>, connections: &mut Connections, aging: bool) -> Duration {
        let unused = self.needs_unused(connections);
        let suits = |idle: &&Idle| !(idle.is_closed() || unused && idle.connection.reused);
        let http1 = connections.idle.iter().filter(suits);
        let http1 = http1.map(|idle| self.lasts(idle.connection.reused, idle.since.elapsed(), idle.connection.opened));
        let http2 = connections.shared.iter().filter(|shared| !shared.is_closing());
        let http2 = http2.map(|it| self.lasts(it.was_used(), it.idle_for().unwrap_or_default(), it.opened()));
        let lasts = http1.chain(http2).max().unwrap_or_default();
        let busy = connections.opening > 0 || self.protocol_choice.in_flight() > 0 && !aging;
        let never = self.unused_limit.current().is_zero();
        if self.used.elapsed() >= KEPT_WARM_FOR || busy || never {
            return LOOK;
        }
        let wait = lasts.max(connections.background.wait());
        if wait.is_zero() {
            connections.background.opens();
            self.open(connections, true);
            return LOOK;
        }
        wait
    }

    /// For how long a connection is good enough that none has to be opened in its place, after it idled for `idle`.
    fn lasts(&self, used: bool, idle: Duration, opened: Instant) -> Duration {
        let limit = self.limit(used).current();
        let lead = (limit / 10).max(LEAD).min(limit / 2);
        (limit - lead).saturating_sub(idle).min((MAX_AGE - AGING).saturating_sub(opened.elapsed()))
    }

    /// Whether requests that may not be repeated need HTTP/1.1 connections that have not carried a request yet.
    pub(super) fn needs_unused(&self, connections: &Connections) -> bool {
        connections.expected == 1
            && self.used_unrepeatably.elapsed() < KEPT_WARM_FOR
            && self.idle_limit.safe() == Duration::ZERO
    }

    /// Opens a connection in place of an unused one that was just taken, so that the next request of its kind waits for
    /// no handshake.
    pub(super) fn restock(self: &Arc<Self>, connections: &mut Connections) {
        let unused = connections.idle.iter().filter(|idle| !idle.connection.reused && !idle.is_closed()).count();
        let wanted = self.protocol_choice.in_flight().clamp(1, MOST_UNUSED);
        let may = connections.background.wait().is_zero();
        if may && unused + connections.opening < wanted && self.needs_unused(connections) {
            self.open(connections, true);
        }
    }

    /// Gives up connections that have idled for too long or are too old. While the origin is in use, the last one is
    /// replaced shortly before. Returns the time until the next call should be made.
    pub(in crate::upstream) fn prune(self: &Arc<Self>) -> Duration {
        let mut connections = self.lock();
        let aging = connections.shared.iter().any(|shared| shared.opened().elapsed() >= MAX_AGE - AGING);
        let next = self.keep_warm(&mut connections, aging);
        connections.peak -= connections.peak.div_ceil(PEAK_FADES);
        let (mut survived, mut lasted) = (false, false);
        let has_shared = !connections.shared.is_empty();
        let mut spare = if has_shared { connections.idle.len().saturating_sub(LOW_CONCURRENCY) } else { 0 };
        connections.idle.retain(|idle| {
            // The oldest come first.
            let is_spare = spare > 0 && idle.since.elapsed() >= SPARE;
            spare -= usize::from(is_spare);
            let over = idle.since.elapsed() >= self.limit(idle.connection.reused).current();
            let open = !idle.is_closed();
            survived |= over && open && idle.connection.reused;
            lasted |= open && idle.connection.opened.elapsed() >= FLEETING;
            !over && !is_spare && idle.connection.opened.elapsed() < MAX_AGE && open
        });
        connections.shared.retain(|shared| {
            let over = shared.idle_for().is_some_and(|idle| idle >= self.limit(shared.was_used()).current());
            let open = !shared.is_closing();
            survived |= over && open && shared.was_used();
            lasted |= open && shared.opened().elapsed() >= FLEETING;
            !over && shared.opened().elapsed() < MAX_AGE && open
        });
        if lasted {
            connections.background.failures = 0;
        }
        if survived {
            self.idle_limit.survived();
        }
        next.min(self.idle_limit.current() / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_are_of_no_use_are_opened_ever_more_seldom() {
        let mut background = Background::default();
        let waits: Vec<_> = (0..12)
            .map(|_| {
                background.failed();
                background.wait().as_secs_f64().round()
            })
            .collect();
        assert_eq!(waits, [1., 2., 4., 8., 10., 10., 10., 10., 10., 10., 10., 10.]);
    }
}
