//! The registry of a listener's connections: what each is doing, and which have to be closed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use super::Limits;

/// All connections of one listener.
#[derive(Debug, Default)]
pub(super) struct Registry {
    slots: Mutex<Slots>,
    draining: AtomicBool,
    /// The number of connections that are not parked.
    active: AtomicUsize,
    /// Notified whenever a connection ends.
    freed: Notify,
}

/// The activity of each open connection, by a number that is never reused.
#[derive(Debug, Default)]
struct Slots {
    next: u64,
    open: HashMap<u64, Arc<Activity>>,
}

/// The registration of one connection; dropping it removes the connection.
#[derive(Debug)]
pub(super) struct Slot {
    registry: Arc<Registry>,
    key: u64,
    activity: Arc<Activity>,
}

/// What one connection is doing, and since when.
#[derive(Debug)]
pub(super) struct Activity {
    accepted: Instant,
    /// A [`Doing`] in the two low bits; above them, when it started, in microseconds since `accepted`.
    state: AtomicU64,
    /// When the socket stopped accepting response data, in microseconds since `accepted`, plus one; 0 while it accepts
    /// data.
    blocked_since: AtomicU64,
    /// Wakes the response body once the socket accepts data again.
    writable: AtomicWaker,
    /// The latest command that was not executed yet; 0 for none.
    command: AtomicU8,
    /// Notified whenever `command` is set.
    commanded: Notify,
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It waits for a request.
    Idle = 0,
    /// It receives a request head.
    Head = 1,
    /// It serves a request.
    Busy = 2,
    /// It was told to close to make room.
    Closing = 3,
}

impl Doing {
    fn of(state: u64) -> Self {
        match state & 3 {
            0 => Self::Idle,
            1 => Self::Head,
            2 => Self::Busy,
            _ => Self::Closing,
        }
    }
}

/// A command to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Complete the request in flight, then close.
    Close,
    /// Reject the request head that was not complete in time.
    HeadTimeout,
    /// Reset the connection, because the caller does not read its response.
    Reset,
}

/// Marks the connection as busy with a request until it is dropped.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

/// Counts a connection as active, that is, not parked, until it is dropped.
#[derive(Debug)]
pub(super) struct Active<'a>(&'a Registry);

/// Up to this number of connections stay active between two requests, which takes 1 MiB of memory and saves the cost of
/// resuming them. Further connections are parked whenever they are idle.
pub(super) const MAX_ACTIVE: usize = 64;

/// Interval at which a new connection checks for room while the listener is at its limit and every connection is busy.
const ROOM_CHECK: Duration = Duration::from_millis(50);

impl Registry {
    /// Registers a connection that was just accepted.
    pub(super) fn register(self: &Arc<Self>) -> Slot {
        let activity = Arc::new(Activity {
            accepted: Instant::now(),
            state: AtomicU64::new(Doing::Idle as u64),
            blocked_since: AtomicU64::new(0),
            writable: AtomicWaker::new(),
            command: AtomicU8::new(0),
            commanded: Notify::new(),
        });
        let mut slots = self.lock();
        let key = slots.next;
        slots.next += 1;
        slots.open.insert(key, activity.clone());
        Slot { registry: self.clone(), key, activity }
    }

    /// Returns the number of open connections.
    pub(super) fn len(&self) -> usize {
        self.lock().open.len()
    }

    /// Starts draining: from now on each response carries `Connection: close`.
    pub(super) fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    /// Closes idle connections now and busy ones after their request. Returns when every connection is closed.
    pub(super) async fn close_all(&self) {
        for activity in self.lock().open.values() {
            activity.send(Command::Close);
        }
        loop {
            let freed = self.freed.notified();
            if self.len() == 0 {
                return;
            }
            freed.await;
        }
    }

    /// Waits until there is room for an accepted connection; at the limit, closes the connection that has been idle
    /// longest. Returns `false` if there is still no room at `until`.
    pub(super) async fn wait_for_room(&self, limits: &ArcSwap<Limits>, until: Instant) -> bool {
        loop {
            let freed = self.freed.notified();
            if self.make_room(limits.load().max_connections) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            let _ = tokio::time::timeout(ROOM_CHECK, freed).await;
        }
    }

    /// Whether fewer than `max` connections are open or remain after those that are closing. If not, tells the
    /// connection that has been idle longest to close; `false` if none is idle.
    fn make_room(&self, max: usize) -> bool {
        let slots = self.lock();
        if slots.open.len() < max {
            return true;
        }
        let (mut staying, mut longest) = (0, None);
        for activity in slots.open.values() {
            let (doing, since) = activity.doing();
            staying += usize::from(doing != Doing::Closing);
            if doing == Doing::Idle && longest.is_none_or(|(most, _)| since > most) {
                longest = Some((since, activity));
            }
        }
        if staying < max {
            // A connection is closing already.
            return true;
        }
        longest.is_some_and(|(_, activity)| {
            activity.set(Doing::Closing);
            activity.send(Command::Close);
            true
        })
    }

    /// The reaper: periodically ends connections that exceed `limits`. It never returns.
    pub(super) async fn enforce(self: Arc<Self>, limits: Arc<ArcSwap<Limits>>) {
        loop {
            let limits = **limits.load();
            let shortest = limits.header_timeout.min(limits.idle_timeout).min(limits.write_timeout);
            let period = (shortest / 4).clamp(Duration::from_millis(20), Duration::from_secs(1));
            tokio::time::sleep(period).await;
            for activity in self.lock().open.values() {
                match activity.doing() {
                    _ if activity.blocked_for() >= limits.write_timeout => activity.send(Command::Reset),
                    (Doing::Head, since) if since >= limits.header_timeout => activity.send(Command::HeadTimeout),
                    (Doing::Idle, since) if since >= limits.idle_timeout => activity.send(Command::Close),
                    _ => {}
                }
            }
        }
    }

    /// Counts as many other connections as active as may be, so that idle ones are parked.
    #[cfg(test)]
    pub(super) fn simulate_crowd(&self) {
        self.active.fetch_add(MAX_ACTIVE, Relaxed);
    }

    #[cfg(test)]
    pub(super) fn active(&self) -> usize {
        self.active.load(Relaxed)
    }

    /// Whether any connection has received part of a request head.
    #[cfg(test)]
    pub(super) fn any_in_head(&self) -> bool {
        self.lock().open.values().any(|activity| activity.doing().0 == Doing::Head)
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Returns the connection's activity record.
    pub(super) fn activity(&self) -> Arc<Activity> {
        self.activity.clone()
    }

    /// Records that a request head is complete. The connection is busy until the guard is dropped.
    pub(super) fn begin_request(&self) -> Busy {
        self.activity.set(Doing::Busy);
        Busy(self.activity.clone())
    }

    /// Whether part of a request head was received.
    pub(super) fn is_in_head(&self) -> bool {
        self.activity.doing().0 == Doing::Head
    }

    /// Counts the connection as active until the guard is dropped.
    pub(super) fn activate(&self) -> Active<'_> {
        self.registry.active.fetch_add(1, Relaxed);
        Active(&self.registry)
    }

    /// Whether the connection may be parked: it is idle, everything was written, and more than [`MAX_ACTIVE`]
    /// connections are active.
    pub(super) fn may_park(&self) -> bool {
        self.registry.active.load(Relaxed) > MAX_ACTIVE
            && self.activity.doing().0 == Doing::Idle
            && self.activity.blocked_since.load(Relaxed) == 0
    }

    /// Whether the listener is draining, so that responses carry `Connection: close`.
    pub(super) fn draining(&self) -> bool {
        self.registry.draining.load(Relaxed)
    }

    /// Waits for the next command to this connection.
    pub(super) async fn command(&self) -> Command {
        loop {
            let commanded = self.activity.commanded.notified();
            match self.activity.command.swap(0, Relaxed) {
                1 => return Command::Close,
                2 => return Command::HeadTimeout,
                3 => return Command::Reset,
                _ => commanded.await,
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.registry.lock().open.remove(&self.key);
        self.registry.freed.notify_waiters();
    }
}

impl Activity {
    /// Records that data arrived: on an idle connection it starts a request head.
    pub(super) fn bytes_received(&self) {
        if Doing::of(self.state.load(Relaxed)) == Doing::Idle {
            self.set(Doing::Head);
        }
    }

    /// Records that the socket stopped (`true`) or resumed (`false`) accepting response data.
    pub(super) fn write_blocked(&self, blocked: bool) {
        self.blocked_since.store(if blocked { self.age() + 1 } else { 0 }, Relaxed);
        if !blocked {
            self.writable.wake();
        }
    }

    /// Returns for how long the socket has accepted no response data.
    fn blocked_for(&self) -> Duration {
        match self.blocked_since.load(Relaxed) {
            0 => Duration::ZERO,
            since => self.accepted.elapsed().saturating_sub(Duration::from_micros(since - 1)),
        }
    }

    /// Returns the microseconds since the connection was accepted.
    fn age(&self) -> u64 {
        u64::try_from(self.accepted.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Records what the connection does from now on.
    fn set(&self, doing: Doing) {
        self.state.store(self.age() << 2 | doing as u64, Relaxed);
    }

    /// Returns what the connection is doing, and for how long.
    fn doing(&self) -> (Doing, Duration) {
        let state = self.state.load(Relaxed);
        (Doing::of(state), self.accepted.elapsed().saturating_sub(Duration::from_micros(state >> 2)))
    }

    /// Sends a command to the connection, in place of one that was not executed yet.
    fn send(&self, command: Command) {
        let number = match command {
            Command::Close => 1,
            Command::HeadTimeout => 2,
            Command::Reset => 3,
        };
        self.command.store(number, Relaxed);
        self.commanded.notify_one();
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

impl Busy {
    /// Ready while the connection's socket accepts data.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.blocked_since.load(Relaxed) == 0 {
            return Poll::Ready(());
        }
        // The task that polls here also writes to the socket, so the state cannot change before the waker is
        // registered.
        self.0.writable.register(cx.waker());
        Poll::Pending
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set(Doing::Idle);
    }
}
