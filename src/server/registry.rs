//! The registry of a listener's connections: what each is doing, and which have to be closed.
//!
//! The file is long because every state of a connection, and what each limit does to it, stand in one place.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use super::Limits;
use super::heap::Heap;
use super::parking::{Active, Parking};

/// All connections of one listener.
#[derive(Debug, Default)]
pub(super) struct Registry {
    slots: Mutex<Slots>,
    draining: AtomicBool,
    /// Counts the connections that are not parked.
    parking: Parking,
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
    /// The [flags](flag) in the low bits; above them, since when it has been [doing](Doing) what they mean, in
    /// microseconds since `accepted`, where that has a limit.
    state: AtomicU64,
    /// The number of the latest request.
    request: AtomicU32,
    /// When the socket stopped accepting response data, in microseconds since `accepted`, plus one; 0 while it accepts
    /// data.
    blocked_since: AtomicU64,
    /// Wakes the response body once the socket accepts data again.
    writable: AtomicWaker,
    /// The rest of the response, if hyper has given up the connection.
    rest: Mutex<Option<Box<dyn Any + Send>>>,
    /// The latest command that was not executed yet; 0 for none.
    command: AtomicU8,
    /// Notified whenever `command` is set.
    commanded: Notify,
}

/// The facts about a connection from which [`Doing`] follows. A request and its response end independently of each
/// other, so one connection may have several of them.
mod flag {
    /// Part of a request head was received.
    pub(super) const HEAD: u64 = 1;
    /// A request has no response yet, or one whose body has not ended.
    pub(super) const RESPONSE: u64 = 1 << 1;
    /// The body of the latest request has not ended.
    pub(super) const UPLOAD: u64 = 1 << 2;
    /// The socket does not accept response data that is ready to be written.
    pub(super) const UNWRITTEN: u64 = 1 << 3;
    /// It was told to close to make room.
    pub(super) const CLOSING: u64 = 1 << 4;
    /// The response is an event stream.
    pub(super) const EVENTS: u64 = 1 << 5;
    /// The body of the latest request was not read to its end.
    pub(super) const UNREAD: u64 = 1 << 6;
    /// The latest request is of HTTP/1.0, whose callers take the end of the connection for the end of a body.
    pub(super) const HTTP10: u64 = 1 << 7;
    /// A request head is being parsed, and everything before it was answered and written.
    pub(super) const PARSING: u64 = 1 << 8;
    /// Whoever writes the response looks for a hang-up once the request's body has ended.
    pub(super) const WATCHED: u64 = 1 << 9;
    /// The response ends with its length, and the connection stays open after it.
    pub(super) const BY_LENGTH: u64 = 1 << 10;
    /// hyper gives up the connection in the middle of such a response.
    pub(super) const LEAVING: u64 = 1 << 11;
    /// Many connections were active when the request began.
    pub(super) const CROWD: u64 = 1 << 12;
    /// The number of flags.
    pub(super) const BITS: u32 = 13;
    pub(super) const ALL: u64 = (1 << BITS) - 1;
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It waits for a request.
    Idle,
    /// It receives a request head.
    Head,
    /// It serves a request, or writes its response.
    Busy,
    /// The response was written, and the request's body is still arriving.
    Rest,
    /// It was told to close to make room.
    Closing,
}

impl Doing {
    fn of(state: u64) -> Self {
        match state {
            _ if state & flag::CLOSING != 0 => Self::Closing,
            _ if state & (flag::RESPONSE | flag::UNWRITTEN) != 0 => Self::Busy,
            _ if state & flag::UPLOAD != 0 => Self::Rest,
            _ if state & flag::HEAD != 0 => Self::Head,
            _ => Self::Idle,
        }
    }
}

/// A command to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Command {
    /// Complete the request in flight, then close.
    Close = 1,
    /// Reject the request head that was not complete in time.
    HeadTimeout,
    /// Reset the connection, because the caller does not read its response.
    Reset,
    /// Close the connection, whose response was written, although the request's body is still arriving.
    EndUpload,
    /// Break the response off, if there is one, and close.
    Abort,
    /// Set the response aside, because the caller reads slowly.
    SetAside,
}

/// Marks the connection as busy with a response until it is dropped.
#[derive(Debug)]
pub(super) struct Busy {
    activity: Arc<Activity>,
    request: u32,
}

/// Marks the body of the connection's request as unfinished until it is dropped.
#[derive(Debug)]
pub(super) struct Uploading {
    activity: Arc<Activity>,
    complete: bool,
}

/// How long a request's body may continue to arrive after the response was written. Some servers respond early and read
/// the rest, so it is read, but it must not keep the connection for ever.
const REST_TIMEOUT: Duration = Duration::from_secs(5);

/// In a crowd a response is set aside if the socket has accepted nothing for this time. Of a caller that is only busy,
/// or far away, it accepts something sooner.
const SLOW: Duration = Duration::from_millis(250);

/// How often to check whether nothing is in progress.
const QUIET_CHECK: Duration = Duration::from_secs(1);

/// How often a shutdown looks whether only event streams are left.
const DRAIN_CHECK: Duration = Duration::from_millis(50);

/// A shutdown leaves a connection open that was accepted so shortly before: its first request is under way, and its
/// caller would not repeat it, as it would on a connection that it has used before.
const FIRST_REQUEST: Duration = Duration::from_millis(250);

/// Interval at which a new connection checks for room while the listener is at its limit and every connection is busy.
const ROOM_CHECK: Duration = Duration::from_millis(50);

impl Registry {
    /// Registers a connection that was just accepted.
    pub(super) fn register(self: &Arc<Self>) -> Slot {
        let activity = Arc::new(Activity {
            accepted: Instant::now(),
            state: AtomicU64::new(0),
            request: AtomicU32::new(0),
            blocked_since: AtomicU64::new(0),
            writable: AtomicWaker::new(),
            rest: Mutex::new(None),
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

    /// Closes idle connections now, but for those that were just accepted, and busy ones after their request. Returns
    /// when every connection is closed. Event streams, which may never end, are broken off once nothing else is in
    /// flight.
    pub(super) async fn close_all(&self) {
        let begun = Instant::now();
        let is_spared = |activity: &&Arc<Activity>| {
            begun.duration_since(activity.accepted) < FIRST_REQUEST && activity.doing().0 == Doing::Idle
        };
        let closed = |activity: &&Arc<Activity>| !is_spared(activity);
        self.lock().open.values().filter(closed).for_each(|activity| activity.send(Command::Close));
        let mut are_all_told = false;
        loop {
            if !are_all_told && begun.elapsed() >= FIRST_REQUEST {
                are_all_told = true;
                self.lock().open.values().filter(is_spared).for_each(|activity| activity.send(Command::Close));
            }
            let freed = self.freed.notified();
            if self.len() == 0 {
                return;
            }
            self.end_events();
            let _ = tokio::time::timeout(DRAIN_CHECK, freed).await;
        }
    }

    /// Breaks event streams off if no connection does anything else.
    fn end_events(&self) {
        let slots = self.lock();
        if slots.open.values().all(|activity| activity.has(flag::EVENTS)) {
            slots.open.values().for_each(|activity| activity.send(Command::Abort));
        }
    }

    /// Breaks every response off.
    pub(super) fn abort_all(&self) {
        self.lock().open.values().for_each(|activity| activity.send(Command::Abort));
    }

    /// Waits until there is room for an accepted connection: at most `share` may be open, and as many as `limits`
    /// allow. At the limit, closes the connection that has been idle longest. Returns `false` if there is still no room
    /// at `until`.
    pub(super) async fn wait_for_room(&self, limits: &ArcSwap<Limits>, share: usize, until: Instant) -> bool {
        loop {
            let freed = self.freed.notified();
            if self.make_room(limits.load().max_connections.min(share)) {
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
    pub(super) fn make_room(&self, max: usize) -> bool {
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
            activity.change(flag::CLOSING, 0);
            activity.send(Command::Close);
            true
        })
    }

    /// The reaper: periodically ends connections that exceed `limits`. It never returns.
    pub(super) async fn enforce(self: Arc<Self>, limits: Arc<ArcSwap<Limits>>) {
        loop {
            let limits = **limits.load();
            let shortest = limits.header_timeout.min(limits.idle_timeout).min(limits.write_timeout);
            let is_crowd = self.parking.is_full() && !self.draining.load(Relaxed);
            let longest = if is_crowd { SLOW / 2 } else { Duration::from_secs(1) };
            tokio::time::sleep((shortest / 4).clamp(Duration::from_millis(20), longest)).await;
            for activity in self.lock().open.values() {
                match activity.doing() {
                    _ if activity.blocked_for() >= limits.write_timeout => activity.send(Command::Reset),
                    (Doing::Head, since) if since >= limits.header_timeout => activity.send(Command::HeadTimeout),
                    (Doing::Idle, since) if since >= limits.idle_timeout => activity.send(Command::Close),
                    (Doing::Rest, since) if since >= REST_TIMEOUT => activity.send(Command::EndUpload),
                    (Doing::Busy, _) if is_crowd && activity.may_be_set_aside() => activity.set_aside(),
                    _ => {}
                }
            }
        }
    }

    /// Gives memory back to the system whenever nothing is in progress: usually at once if the last connection ended,
    /// else within a second. It never returns.
    pub(super) async fn give_memory_back(self: Arc<Self>) {
        let mut heap = Heap::at_rest();
        let mut check_at = tokio::time::Instant::now() + QUIET_CHECK;
        loop {
            let freed = self.freed.notified();
            let is_time = tokio::time::timeout_at(check_at, freed).await.is_err();
            if is_time {
                check_at = tokio::time::Instant::now() + QUIET_CHECK;
            }
            let open = self.len();
            if open == 0 || is_time && self.is_quiet() {
                // A caller that opens a connection for each request does not cause a check for each.
                let pause = if heap.give_back(open) { QUIET_CHECK } else { QUIET_CHECK / 10 };
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// Whether no connection does anything but stream events, which may never end.
    fn is_quiet(&self) -> bool {
        let is_quiet = |activity: &Arc<Activity>| {
            let state = activity.state.load(Relaxed);
            Doing::of(state) == Doing::Idle || state & flag::EVENTS != 0
        };
        self.lock().open.values().all(is_quiet)
    }

    #[cfg(test)]
    pub(super) fn parking(&self) -> &Parking {
        &self.parking
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

    /// Records that a request head is complete. The connection is busy until the guards are dropped: that of the
    /// response, and that of the request's body, if it has one.
    pub(super) fn begin_request(&self, http10: bool, body: bool) -> (Busy, Option<Uploading>) {
        let mut begun = flag::RESPONSE;
        if body {
            begun |= flag::UPLOAD;
        }
        if http10 {
            begun |= flag::HTTP10;
        }
        if self.registry.parking.is_full() {
            begun |= flag::CROWD;
        }
        self.activity.change(begun, flag::ALL & !flag::UNWRITTEN);
        let request = self.activity.request.fetch_add(1, Relaxed).wrapping_add(1);
        let uploading = body.then(|| Uploading { activity: self.activity.clone(), complete: false });
        (Busy { activity: self.activity.clone(), request }, uploading)
    }

    /// Records that the response in progress is an event stream.
    pub(super) fn streams_events(&self) {
        self.activity.change(flag::EVENTS, 0);
    }

    /// Records that the response in progress ends with its length, and that the connection stays open after it.
    pub(super) fn ends_with_length(&self) {
        self.activity.change(flag::BY_LENGTH, 0);
    }

    /// Makes hyper give up the connection, if the response can still be set aside: the socket holds what hyper writes,
    /// and the rest of the response stays in the [`Activity`].
    pub(super) fn leave_hyper(&self) {
        if self.activity.may_be_set_aside() {
            self.activity.change(flag::LEAVING, flag::BY_LENGTH);
        }
    }

    /// Whether hyper gives up the connection.
    pub(super) fn is_leaving(&self) -> bool {
        self.activity.is_leaving()
    }

    /// Takes the rest of the response, once hyper has given up the connection.
    pub(super) fn take_rest<R: 'static>(&self) -> Option<R> {
        self.activity.change(0, flag::LEAVING);
        self.activity.rest().take()?.downcast().ok().map(|rest| *rest)
    }

    /// Whether part of a request head was received, nothing else is in progress, and nothing is unwritten.
    pub(super) fn is_in_head(&self) -> bool {
        self.activity.doing().0 == Doing::Head
    }

    /// Whether the response was written while the request's body is still arriving.
    pub(super) fn is_in_rest(&self) -> bool {
        self.activity.doing().0 == Doing::Rest
    }

    /// Whether response data waits for the socket.
    pub(super) fn is_unwritten(&self) -> bool {
        self.activity.has(flag::UNWRITTEN)
    }

    /// Whether the body of the latest request was not read to its end.
    pub(super) fn has_unread_upload(&self) -> bool {
        self.activity.has(flag::UPLOAD) || self.activity.has(flag::UNREAD)
    }

    /// Whether the latest request is of HTTP/1.0.
    pub(super) fn serves_http10(&self) -> bool {
        self.activity.has(flag::HTTP10)
    }

    /// Counts the connection as active until the guard is dropped.
    pub(super) fn activate(&self) -> Active<'_> {
        self.registry.parking.activate()
    }

    /// Whether the connection may be parked: it is idle, everything was written, and enough others are active.
    pub(super) fn may_park(&self) -> bool {
        self.registry.parking.is_full()
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
                4 => return Command::EndUpload,
                5 => return Command::Abort,
                6 => return Command::SetAside,
                _ => commanded.await,
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // If the connection ended just as hyper gave it up, the rest is still there, and it refers to the activity.
        let rest = self.activity.rest().take();
        drop(rest);
        self.registry.lock().open.remove(&self.key);
        self.registry.freed.notify_waiters();
    }
}

impl Activity {
    /// Records that data arrived. Unless it belongs to the body of a request, it starts a request head; line breaks
    /// alone do not (RFC 9112, section 2.2).
    pub(super) fn bytes_received(&self, data: &[u8]) {
        let flags = self.state.load(Relaxed);
        let heard = flag::HEAD | flag::PARSING;
        if flags & flag::UPLOAD != 0 || flags & heard == heard || data.iter().all(|byte| matches!(byte, b'\r' | b'\n'))
        {
            return;
        }
        // Data that arrives during a response may wait in hyper's buffer until that was written.
        let before = flags & (flag::RESPONSE | flag::UNWRITTEN) == 0;
        self.change(if before { heard } else { flag::HEAD }, 0);
    }

    /// Records that the socket stopped (`true`) or resumed (`false`) accepting response data.
    pub(super) fn write_blocked(&self, blocked: bool) {
        self.blocked_since.store(if blocked { self.age() + 1 } else { 0 }, Relaxed);
        if blocked {
            self.change(flag::UNWRITTEN, 0);
        } else {
            self.change(0, flag::UNWRITTEN);
            self.writable.wake();
        }
    }

    /// Whether what is written now is the answer of hyper's parser to a head that it rejects.
    pub(super) fn is_rejecting_head(&self) -> bool {
        let flags = self.state.load(Relaxed);
        flags & flag::PARSING != 0 && flags & (flag::RESPONSE | flag::UPLOAD | flag::UNWRITTEN) == 0
    }

    /// Whether a request of HTTP/1.0 is being answered.
    pub(super) fn serves_http10(&self) -> bool {
        self.has(flag::HTTP10)
    }

    /// Whether a response is in progress to a request that was read to its end. If its body is still being read, the
    /// connection's task is woken at the end of the body.
    pub(super) fn watches(&self) -> bool {
        let flags = self.state.load(Relaxed) & flag::ALL;
        if flags & (flag::RESPONSE | flag::UPLOAD | flag::WATCHED) == flag::RESPONSE | flag::UPLOAD {
            self.change(flag::WATCHED, 0);
        }
        self.state.load(Relaxed) & (flag::RESPONSE | flag::UPLOAD) == flag::RESPONSE
    }

    /// Whether the response was written while the request's body is still arriving.
    pub(super) fn is_in_rest(&self) -> bool {
        Doing::of(self.state.load(Relaxed)) == Doing::Rest
    }

    /// Whether the response can be set aside: the socket has accepted nothing for [`SLOW`], and hyper has nothing to do
    /// but to write the rest.
    fn may_be_set_aside(&self) -> bool {
        let needed = flag::RESPONSE | flag::UNWRITTEN | flag::BY_LENGTH;
        let flags = self.state.load(Relaxed);
        flags & (needed | flag::UPLOAD | flag::UNREAD | flag::CLOSING) == needed && self.blocked_for() >= SLOW
    }

    /// Whether hyper gives up the connection.
    pub(super) fn is_leaving(&self) -> bool {
        self.has(flag::LEAVING)
    }

    /// Keeps the rest of the response until [`Slot::take_rest`].
    pub(super) fn keep_rest(&self, rest: Box<dyn Any + Send>) {
        *self.rest() = Some(rest);
    }

    fn rest(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, flag: u64) -> bool {
        self.state.load(Relaxed) & flag != 0
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

    /// Removes the flags `cleared`, then adds the flags `set`. If the connection does something else from now on that
    /// has a limit, it begins now. The guard of a body may be dropped in another task, so this is one atomic step.
    fn change(&self, set: u64, cleared: u64) {
        let mut now = None;
        let changed = |state: u64| {
            let next = state & flag::ALL & !cleared | set;
            let since = match Doing::of(next) {
                same if same == Doing::of(state) => state >> flag::BITS,
                // Nobody asks since when, and each request begins one: no look at the clock.
                Doing::Busy | Doing::Closing => state >> flag::BITS,
                Doing::Idle | Doing::Head | Doing::Rest => *now.get_or_insert_with(|| self.age()),
            };
            Some(since << flag::BITS | next)
        };
        // The closure never refuses.
        let _ = self.state.fetch_update(Relaxed, Relaxed, changed);
    }

    /// Returns what the connection is doing, and for how long if that has a limit.
    fn doing(&self) -> (Doing, Duration) {
        let state = self.state.load(Relaxed);
        (Doing::of(state), self.accepted.elapsed().saturating_sub(Duration::from_micros(state >> flag::BITS)))
    }

    /// Sends a command to the connection, in place of one that was not executed yet.
    pub(super) fn send(&self, command: Command) {
        self.command.store(command as u8, Relaxed);
        self.commanded.notify_one();
    }

    /// Tells the connection to set its response aside, unless it was told something else: that counts for longer.
    fn set_aside(&self) {
        if self.command.compare_exchange(0, Command::SetAside as u8, Relaxed, Relaxed).is_ok() {
            self.commanded.notify_one();
        }
    }
}

impl Busy {
    /// Ready while the connection's socket accepts data.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.activity.blocked_since.load(Relaxed) == 0 {
            return Poll::Ready(());
        }
        // The task that polls here also writes to the socket, so the state cannot change before the waker is
        // registered.
        self.activity.writable.register(cx.waker());
        Poll::Pending
    }

    /// Whether many connections were active when the request began.
    pub(super) fn is_of_a_crowd(&self) -> bool {
        self.activity.has(flag::CROWD)
    }

    /// Whether hyper gives up the connection.
    pub(super) fn is_leaving(&self) -> bool {
        self.activity.is_leaving()
    }

    pub(super) fn activity(&self) -> Arc<Activity> {
        self.activity.clone()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // hyper may begin the next request while the end of a response still waits to be written.
        if self.activity.request.load(Relaxed) == self.request {
            self.activity.change(0, flag::RESPONSE | flag::EVENTS);
        }
    }
}

impl Uploading {
    /// Records that the body was read to its end.
    pub(super) fn complete(mut self) {
        self.complete = true;
    }
}

impl Drop for Uploading {
    fn drop(&mut self) {
        self.activity.change(if self.complete { 0 } else { flag::UNREAD }, flag::UPLOAD);
        if self.activity.has(flag::WATCHED) {
            self.activity.commanded.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::heap;

    #[test]
    fn only_idle_connections_and_event_streams_are_quiet() {
        let registry = Arc::<Registry>::default();
        let (_idle, slot) = (registry.register(), registry.register());
        assert!(registry.is_quiet());
        let (busy, _) = slot.begin_request(false, false);
        assert!(!registry.is_quiet(), "a request is in progress");
        slot.streams_events();
        assert!(registry.is_quiet(), "an event stream may never end");
        drop(busy);
        assert!(registry.is_quiet());
        slot.activity().write_blocked(true);
        assert!(!registry.is_quiet(), "a response is not written");
    }

    #[test]
    fn the_late_end_of_a_response_leaves_the_connection_busy_with_the_next_one() {
        let slot = Arc::<Registry>::default().register();
        let (first, _) = slot.begin_request(false, false);
        let (second, _) = slot.begin_request(false, false);
        drop(first);
        assert_eq!(slot.activity().doing().0, Doing::Busy);
        drop(second);
        assert_eq!(slot.activity().doing().0, Doing::Idle);
    }

    #[tokio::test]
    async fn a_connection_that_was_told_to_close_is_not_told_otherwise() {
        let slot = Arc::<Registry>::default().register();
        slot.activity().send(Command::Close);
        slot.activity().set_aside();
        assert_eq!(slot.command().await, Command::Close);
        slot.activity().set_aside();
        assert_eq!(slot.command().await, Command::SetAside);
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[tokio::test]
    async fn memory_is_given_back_although_other_connections_come_and_go() {
        let registry = Arc::<Registry>::default();
        let _idle = registry.register();
        let task = tokio::spawn(registry.clone().give_memory_back());
        tokio::task::yield_now().await;
        let mut burst: Vec<_> = (0..4096).map(|_| vec![1_u8; 16 << 10]).collect();
        let last = burst.pop();
        drop(burst);
        let before = heap::anonymous_kib().unwrap();
        let begun = Instant::now();
        while heap::anonymous_kib().unwrap() + (48 << 10) > before {
            assert!(begun.elapsed() < 10 * QUIET_CHECK, "nothing of {before} KiB was given back");
            drop(registry.register());
            tokio::time::sleep(QUIET_CHECK / 100).await;
        }
        drop(last);
        task.abort();
    }
}
