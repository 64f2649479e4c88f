//! What each connection of one door is doing, and who has to go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use super::Limits;

/// All connections of one door.
#[derive(Debug, Default)]
pub(super) struct Connections {
    seats: Mutex<Seats>,
    leaving: AtomicBool,
    /// Connections that are not at rest.
    awake: AtomicUsize,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    taken: HashMap<u64, Arc<Activity>>,
}

/// One connection's place among them, for as long as it is open.
#[derive(Debug)]
pub(super) struct Slot {
    connections: Arc<Connections>,
    key: u64,
    activity: Arc<Activity>,
}

/// What one connection is doing, since when.
#[derive(Debug)]
pub(super) struct Activity {
    born: Instant,
    /// Microseconds since `born`, shifted by two, and a [`Doing`] in the low bits.
    state: AtomicU64,
    /// Microseconds since `born` at which its socket took no more of an answer, plus one; 0: it takes what there is.
    stuck: AtomicU64,
    /// Waits until it takes more.
    held_back: AtomicWaker,
    command: AtomicU8,
    commanded: Notify,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Idle = 0,
    Head = 1,
    Busy = 2,
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

/// What a connection is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Finish what is in flight, then close.
    Leave,
    /// Refuse the head that does not come to its end.
    HeadTimeout,
    /// Reset the connection, whose caller takes nothing of its answer.
    Abandon,
}

/// A request is being served, until this is dropped.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

/// A connection is awake, until this is dropped.
#[derive(Debug)]
pub(super) struct Active<'a>(&'a Connections);

/// So many connections stay awake between two requests, which holds 1 MiB and spares the work of waking them. What more
/// there are rest whenever they idle.
pub(super) const MOST_AWAKE: usize = 64;

/// While every connection at the cap is busy, the accept loop looks again this often.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Connections {
    /// Takes a place for a connection that was just accepted.
    pub(super) fn sit(self: &Arc<Self>) -> Slot {
        let activity = Arc::new(Activity {
            born: Instant::now(),
            state: AtomicU64::new(Doing::Idle as u64),
            stuck: AtomicU64::new(0),
            held_back: AtomicWaker::new(),
            command: AtomicU8::new(0),
            commanded: Notify::new(),
        });
        let mut seats = self.lock();
        let key = seats.next;
        seats.next += 1;
        seats.taken.insert(key, activity.clone());
        Slot { connections: self.clone(), key, activity }
    }

    pub(super) fn len(&self) -> usize {
        self.lock().taken.len()
    }

    /// From now on each answer says `Connection: close`.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Relaxed);
    }

    /// Closes what is idle and what becomes idle; returns when nobody is left.
    pub(super) async fn emptied(&self) {
        for activity in self.lock().taken.values() {
            activity.order(Command::Leave);
        }
        loop {
            let freed = self.freed.notified();
            if self.len() == 0 {
                return;
            }
            freed.await;
        }
    }

    /// Whether there is room for a connection that was accepted, at the latest at `until`: at the cap the one that has
    /// idled longest is closed for it.
    pub(super) async fn room(&self, limits: &ArcSwap<Limits>, until: Instant) -> bool {
        loop {
            let freed = self.freed.notified();
            if self.make_room(limits.load().max_connections) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, freed).await;
        }
    }

    fn make_room(&self, max: usize) -> bool {
        let seats = self.lock();
        if seats.taken.len() < max {
            return true;
        }
        let (mut staying, mut longest) = (0, None);
        for activity in seats.taken.values() {
            let (doing, since) = activity.doing();
            staying += usize::from(doing != Doing::Closing);
            if doing == Doing::Idle && longest.is_none_or(|(most, _)| since > most) {
                longest = Some((since, activity));
            }
        }
        if staying < max {
            // One is about to go already.
            return true;
        }
        longest.is_some_and(|(_, activity)| {
            activity.set(Doing::Closing);
            activity.order(Command::Leave);
            true
        })
    }

    /// Ends connections that exceed `limits`, for as long as it runs.
    pub(super) async fn watch(self: Arc<Self>, limits: Arc<ArcSwap<Limits>>) {
        loop {
            let limits = **limits.load();
            let shortest = limits.header_timeout.min(limits.idle_timeout).min(limits.write_timeout);
            let period = (shortest / 4).clamp(Duration::from_millis(20), Duration::from_secs(1));
            tokio::time::sleep(period).await;
            for activity in self.lock().taken.values() {
                match activity.doing() {
                    _ if activity.stuck_for() >= limits.write_timeout => activity.order(Command::Abandon),
                    (Doing::Head, since) if since >= limits.header_timeout => activity.order(Command::HeadTimeout),
                    (Doing::Idle, since) if since >= limits.idle_timeout => activity.order(Command::Leave),
                    _ => {}
                }
            }
        }
    }

    /// As if many others were awake.
    #[cfg(test)]
    pub(super) fn crowd(&self) {
        self.awake.fetch_add(MOST_AWAKE, Relaxed);
    }

    #[cfg(test)]
    pub(super) fn awake(&self) -> usize {
        self.awake.load(Relaxed)
    }

    /// Whether a head has begun and not come to its end.
    #[cfg(test)]
    pub(super) fn any_in_head(&self) -> bool {
        self.lock().taken.values().any(|activity| activity.doing().0 == Doing::Head)
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    pub(super) fn activity(&self) -> Arc<Activity> {
        self.activity.clone()
    }

    /// A request's head is here.
    pub(super) fn begin(&self) -> Busy {
        self.activity.set(Doing::Busy);
        Busy(self.activity.clone())
    }

    /// Whether a request's head has begun and not come to its end.
    pub(super) fn is_in_head(&self) -> bool {
        self.activity.doing().0 == Doing::Head
    }

    /// It is awake from now on.
    pub(super) fn wake(&self) -> Active<'_> {
        self.connections.awake.fetch_add(1, Relaxed);
        Active(&self.connections)
    }

    /// Whether it idles, its socket has taken all there was, and enough others are awake.
    pub(super) fn may_rest(&self) -> bool {
        self.connections.awake.load(Relaxed) > MOST_AWAKE
            && self.activity.doing().0 == Doing::Idle
            && self.activity.stuck.load(Relaxed) == 0
    }

    /// Whether answers say `Connection: close` by now.
    pub(super) fn leaving(&self) -> bool {
        self.connections.leaving.load(Relaxed)
    }

    /// The next command for this connection.
    pub(super) async fn command(&self) -> Command {
        loop {
            let commanded = self.activity.commanded.notified();
            match self.activity.command.swap(0, Relaxed) {
                1 => return Command::Leave,
                2 => return Command::HeadTimeout,
                3 => return Command::Abandon,
                _ => commanded.await,
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.lock().taken.remove(&self.key);
        self.connections.freed.notify_waiters();
    }
}

impl Activity {
    /// The first byte after idleness begins a head.
    pub(super) fn bytes_came(&self) {
        if Doing::of(self.state.load(Relaxed)) == Doing::Idle {
            self.set(Doing::Head);
        }
    }

    /// Its socket takes no more of an answer, or takes it again.
    pub(super) fn sticks(&self, sticks: bool) {
        self.stuck.store(if sticks { self.age() + 1 } else { 0 }, Relaxed);
        if !sticks {
            self.held_back.wake();
        }
    }

    /// For how long its socket has taken nothing of what there is.
    fn stuck_for(&self) -> Duration {
        match self.stuck.load(Relaxed) {
            0 => Duration::ZERO,
            since => self.born.elapsed().saturating_sub(Duration::from_micros(since - 1)),
        }
    }

    /// Microseconds since it was accepted.
    fn age(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn set(&self, doing: Doing) {
        self.state.store(self.age() << 2 | doing as u64, Relaxed);
    }

    /// What it does, and for how long already.
    fn doing(&self) -> (Doing, Duration) {
        let state = self.state.load(Relaxed);
        (Doing::of(state), self.born.elapsed().saturating_sub(Duration::from_micros(state >> 2)))
    }

    fn order(&self, command: Command) {
        let number = match command {
            Command::Leave => 1,
            Command::HeadTimeout => 2,
            Command::Abandon => 3,
        };
        self.command.store(number, Relaxed);
        self.commanded.notify_one();
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.awake.fetch_sub(1, Relaxed);
    }
}

impl Busy {
    /// Ready while the connection's socket takes what there is.
    pub(super) fn poll_takes(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.stuck.load(Relaxed) == 0 {
            return Poll::Ready(());
        }
        // The socket is written to by the task that asks here, so nothing changes in between.
        self.0.held_back.register(cx.waker());
        Poll::Pending
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set(Doing::Idle);
    }
}
