//! The buckets. Each has the calls that share a limit of Amazon's, what was learned about it, and the queue before it.
//!
//! A little over 400 lines: what the atomics and the lock of a bucket guard has to be seen in one place.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use jiff::SignedDuration;
use tokio::sync::{Notify, oneshot};

use super::gate::Gates;
use super::law::{Law, Learned, Refusal, Seconds};
use super::queue::Queue;
use super::{Call, Kind, published};
use crate::domain::account::Region;
use crate::domain::clock::Clock;

/// What a bucket is about.
#[derive(Clone, Copy, Debug)]
pub struct BucketName {
    /// The region whose host serves the calls.
    pub region: Region,
    /// The API family of the calls, or an endpoint whose limit Amazon publishes.
    pub group: &'static str,
    /// The kind of the calls.
    pub kind: Kind,
    /// The place of the group among all groups.
    pub(super) place: usize,
}

impl BucketName {
    /// The bucket of the call's family.
    pub(super) fn of(call: &Call<'_>) -> Self {
        Self { region: call.region, group: call.family.name, kind: call.kind, place: call.family.index() }
    }
}

impl std::fmt::Display for BucketName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.region.as_str(), self.group, self.kind.as_str())
    }
}

/// The buckets of one client, by group, region and kind, and its gates.
#[derive(Debug)]
pub(super) struct Buckets {
    buckets: Box<[OnceLock<Arc<Bucket>>]>,
    pub(super) gates: Gates,
}

impl Buckets {
    pub(super) fn new(clock: Clock) -> Self {
        let count = published::GROUPS * Region::ALL.len() * Kind::ALL.len();
        Self { buckets: (0..count).map(|_| OnceLock::new()).collect(), gates: Gates::new(clock) }
    }

    pub(super) fn of(&self, name: BucketName) -> &Arc<Bucket> {
        let region = Region::ALL.len() * name.place + name.region as usize;
        self.buckets[Kind::ALL.len() * region + name.kind as usize].get_or_init(|| Arc::new(Bucket::new(name)))
    }

    /// The names of all buckets, used or not.
    pub(super) fn names() -> impl Iterator<Item = BucketName> {
        published::groups().flat_map(|(place, group)| {
            let kinds = move |region| Kind::ALL.map(|kind| BucketName { region, group, kind, place });
            Region::ALL.into_iter().flat_map(kinds)
        })
    }

    /// The buckets that were used.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Bucket>> {
        self.buckets.iter().filter_map(OnceLock::get)
    }
}

/// The calls that share one limit. Requests read it without a lock until Amazon refuses one of them.
#[derive(Debug)]
pub(super) struct Bucket {
    pub(super) name: BucketName,
    counts: Counts,
    /// Responses that were refusals.
    refusals: AtomicU64,
    /// The law's epoch; 0 until the first refusal.
    epoch: AtomicU32,
    /// Whether a refusal arrived since the last accepted call.
    refusing: AtomicBool,
    state: Mutex<State>,
    /// Notified when the law or the queue changed.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    law: Option<Law>,
    queue: Queue<u32>,
    waiting: usize,
    /// The calls per second that other processes send.
    others: f64,
    /// What was last told to other processes, or heard from them.
    told: Option<Learned>,
    /// Whether a task gives the waiting calls their turns.
    dispatching: bool,
}

/// What a bucket says to a call.
#[derive(Debug)]
pub(super) enum Turn {
    /// It may be sent now, in this epoch.
    Now(u32),
    /// It may be sent later, in about this many seconds.
    Later(Seconds),
}

/// What a process tells the others about a bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    pub(super) bucket: BucketName,
    /// What it has learned; `None` if the others know it.
    pub(super) learned: Option<Learned>,
    /// The calls per second that it could send.
    pub(super) want: f64,
    /// The calls per second that it sends.
    pub(super) sent: f64,
    /// The most calls that it sent within a second, lately.
    pub(super) peak: f64,
}

/// What the other processes send together, in calls per second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Others {
    pub(super) sent: f64,
    /// The most that each of them sent within a second, lately.
    pub(super) peak: f64,
}

/// What is known about a bucket, for people.
#[derive(Clone, Debug)]
pub struct BucketStatus {
    /// The bucket.
    pub name: BucketName,
    /// The learned rate, in calls per second.
    pub rate: f64,
    /// The rest of the pause, in seconds; 0 if there is none.
    pub paused: Seconds,
    /// Calls that wait.
    pub waiting: usize,
    /// Refusals so far.
    pub refusals: u64,
}

impl Bucket {
    pub(super) fn new(name: BucketName) -> Self {
        Self {
            name,
            counts: Counts::default(),
            refusals: AtomicU64::new(0),
            epoch: AtomicU32::new(0),
            refusing: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// The current epoch; 0 as long as nothing was refused.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch.load(Relaxed)
    }

    /// Counts a call that Amazon accepted.
    pub(super) fn accepted(&self, now: Seconds) {
        self.counts.add(now);
        if self.refusing.load(Relaxed)
            && self.refusing.swap(false, Relaxed)
            && let Some(law) = &mut self.lock().law
        {
            law.accepted();
        }
    }

    /// Learns from a refusal, whose counts are filled in here.
    pub(super) fn refused(&self, refusal: Refusal) {
        self.refusals.fetch_add(1, Relaxed);
        self.refusing.store(true, Relaxed);
        let mut state = self.lock();
        let refusal = Refusal { peak: self.counts.peak(refusal.at) + state.others, ..refusal };
        match &mut state.law {
            Some(law) => law.refused(&refusal),
            None => state.law = Some(Law::begin(&refusal, published::rate(&self.name))),
        }
        self.epoch.store(state.law.as_ref().map_or(0, Law::epoch), Relaxed);
        drop(state);
        self.changed.notify_one();
    }

    /// Counts a refusal that says nothing about the rate.
    pub(super) fn refused_for_a_count(&self) {
        self.refusals.fetch_add(1, Relaxed);
    }

    /// The rest of the pause, in seconds; 0 if calls are not paused.
    pub(super) fn paused(&self, now: Seconds) -> Seconds {
        self.lock().law.as_ref().map_or(0.0, |law| (law.paused_until() - now).max(0.0))
    }

    /// Whether a call of this weight may be sent now, behind those that wait already.
    pub(super) fn turn(&self, now: Seconds, weight: f64) -> Turn {
        let mut state = self.lock();
        let State { law: Some(law), queue, waiting, .. } = &mut *state else { return Turn::Now(0) };
        if queue.is_empty() && law.wait(now) <= 0.0 {
            law.take(now, weight);
            return Turn::Now(law.epoch());
        }
        Turn::Later(law.expected(now, *waiting as f64 + weight))
    }

    /// Puts a call of `account` into the queue; `first`: before the account's other calls.
    pub(super) fn wait(self: &Arc<Self>, account: &str, first: bool, clock: &Clock) -> Place {
        let mut state = self.lock();
        let turn = state.queue.push(account, first);
        state.waiting += 1;
        let begin = !std::mem::replace(&mut state.dispatching, true);
        drop(state);
        if begin {
            tokio::spawn(dispatch(self.clone(), clock.clone()));
        }
        Place { bucket: self.clone(), turn }
    }

    /// Counts the weight of a call beyond 1, once it had its turn.
    pub(super) fn take_more(&self, now: Seconds, weight: f64) {
        if let Some(law) = self.lock().law.as_mut().filter(|_| weight > 0.0) {
            law.take(now, weight);
        }
    }

    /// What was learned; `None` as long as nothing was refused.
    pub(super) fn status(&self, now: Seconds) -> Option<BucketStatus> {
        let state = self.lock();
        let law = state.law.as_ref()?;
        Some(BucketStatus {
            name: self.name,
            rate: law.rate(now),
            paused: (law.paused_until() - now).max(0.0),
            waiting: state.waiting,
            refusals: self.refusals.load(Relaxed),
        })
    }

    /// For other processes: what this one knows and does. `None` if nothing was refused, or the bucket is not in use.
    pub(super) fn report(&self, now: Seconds) -> Option<Report> {
        let sent = self.counts.rate(now);
        let state = self.lock();
        let learned = state.law.as_ref()?.learned;
        let changed = state.told.is_none_or(|told| learned.is_news_to(told));
        (changed || sent > 0.0 || state.waiting > 0).then(|| Report {
            bucket: self.name,
            learned: changed.then_some(learned),
            want: sent + state.waiting as f64,
            sent,
            peak: self.counts.peak(now),
        })
    }

    /// Whether a call was accepted lately.
    pub(super) fn is_used(&self, now: Seconds) -> bool {
        self.counts.peak(now) > 0.0
    }

    /// Learns what other processes know: `share` of the rate is this one's, and `others` is what they send.
    pub(super) fn hear(&self, learned: Learned, others: Others, share: impl FnOnce(f64) -> f64, now: Seconds) {
        let mut state = self.lock();
        let law = match &mut state.law {
            Some(law) => {
                law.learned.hear(learned);
                law
            }
            law => law.insert(Law::knowing(learned, published::rate(&self.name), now)),
        };
        law.guess(self.counts.peak(now) + others.peak);
        law.share = share(law.rate(now));
        let known = law.learned;
        self.epoch.store(known.epoch, Relaxed);
        state.others = others.sent;
        // What this process knows beyond `learned` is still to be told.
        state.told = Some(if known.is_news_to(learned) { learned } else { known });
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call's place in the queue. Dropping it leaves the queue.
#[derive(Debug)]
pub(super) struct Place {
    bucket: Arc<Bucket>,
    turn: oneshot::Receiver<u32>,
}

impl Place {
    /// Waits for the call's turn, at most until the uptime `deadline`. Returns the epoch, or `None` if the time is up.
    pub(super) async fn turn(&mut self, clock: &Clock, deadline: SignedDuration) -> Option<u32> {
        tokio::select! {
            biased;
            epoch = &mut self.turn => epoch.ok(),
            () = clock.sleep_until(deadline) => {
                // The turn may have come in this very moment.
                self.turn.close();
                self.turn.try_recv().ok()
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.turn.close();
        let mut state = self.bucket.lock();
        state.waiting -= 1;
        let waiting = state.waiting;
        state.queue.sweep(waiting);
    }
}

/// Gives the waiting calls of a bucket their turns, as the law allows, until none waits.
async fn dispatch(bucket: Arc<Bucket>, clock: Clock) {
    loop {
        let changed = bucket.changed.notified();
        let now = clock.uptime();
        let Some(wait) = bucket.next_turns(now.as_secs_f64()) else { return };
        let until = now.saturating_add(SignedDuration::try_from_secs_f64(wait).unwrap_or(SignedDuration::MAX));
        tokio::select! {
            () = clock.sleep_until(until) => {}
            () = changed => {}
        }
    }
}

impl Bucket {
    /// Gives their turns to the calls that may be sent now. Returns the time until the next turn, or `None` if no call
    /// waits.
    fn next_turns(&self, now: Seconds) -> Option<Seconds> {
        let mut state = self.lock();
        let State { law, queue, dispatching, .. } = &mut *state;
        loop {
            if queue.is_empty() {
                *dispatching = false;
                return None;
            }
            let wait = law.as_ref().map_or(0.0, |law| law.wait(now));
            if wait > 0.0 {
                return Some(wait);
            }
            let epoch = law.as_ref().map_or(0, Law::epoch);
            // A call that gave up takes no turn.
            if queue.pop().is_some_and(|call| call.send(epoch).is_ok())
                && let Some(law) = law
            {
                law.take(now, 1.0);
            }
        }
    }
}

// The counts: without locks, because every response is counted.

/// Slots in which the last seconds are counted.
const SLOTS: u64 = 16;
/// Slots per second. A burst may begin in the middle of one, so a second is counted as two neighbours.
const PER_SECOND: f64 = 2.0;
/// Bits of a slot that hold the count; those above hold the slot's number since the beginning.
const COUNT_BITS: u32 = 24;

/// The calls of one bucket that Amazon accepted.
#[derive(Debug, Default)]
struct Counts {
    slots: [AtomicU64; SLOTS as usize],
}

impl Counts {
    /// Counts a call that was accepted at `now`.
    fn add(&self, now: Seconds) {
        let number = (now * PER_SECOND) as u64;
        let slot = &self.slots[(number % SLOTS) as usize];
        let seen = slot.load(Relaxed);
        if seen >> COUNT_BITS == number {
            slot.fetch_add(1, Relaxed);
        } else if slot.compare_exchange(seen, number << COUNT_BITS | 1, Relaxed, Relaxed).is_err() {
            // Another thread began this slot.
            slot.fetch_add(1, Relaxed);
        }
    }

    /// The most calls that were accepted within one of the last seconds.
    fn peak(&self, now: Seconds) -> f64 {
        let current = (now * PER_SECOND) as u64;
        let seconds = (current.saturating_sub(SLOTS - 2)..=current)
            .map(|slot| self.count(slot) + self.count(slot.wrapping_sub(1)));
        seconds.max().unwrap_or_default() as f64
    }

    /// The calls per second that were accepted in the last two seconds, the current half second aside.
    fn rate(&self, now: Seconds) -> f64 {
        let current = (now * PER_SECOND) as u64;
        let counted: u64 = (current.saturating_sub(4)..current).map(|slot| self.count(slot)).sum();
        // Within the first moments after a break the slot under way is all there is.
        counted.max(self.count(current)) as f64 / 2.0
    }

    fn count(&self, number: u64) -> u64 {
        let slot = self.slots[(number % SLOTS) as usize].load(Relaxed);
        if slot >> COUNT_BITS == number { slot & ((1 << COUNT_BITS) - 1) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_busiest_of_the_last_seconds() {
        let counts = Counts::default();
        for (second, calls) in [(100.0, 5), (101.8, 4), (102.1, 5), (104.0, 2)] {
            (0..calls).for_each(|_| counts.add(second));
        }
        let peaks = [104.0, 109.4, 109.6, 110.1, 120.0].map(|now| counts.peak(now));
        assert_eq!(peaks, [9.0, 9.0, 5.0, 2.0, 0.0], "four and five calls came within a second");
    }

    #[test]
    fn threads_that_count_at_once_lose_no_call() {
        let counts = Counts::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| counts.add(7.5)));
            }
        });
        assert_eq!(counts.peak(7.5), 4000.0);
    }
}
