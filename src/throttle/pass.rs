//! One call's way through the throttle: the pass with which it is sent, and the ticket with which it waits.

use std::fmt;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use jiff::SignedDuration;

use super::bucket::{Place, Turn};
use super::gate::{GatePlace, Job};
use super::law::{self, Refusal, Seconds};
use super::memory::Memory;
use super::refusal::{self, Verdict};
use super::room::Held;
use super::{BucketName, Entry, Kind, Observed, Pass, Reason, Throttled, published};
use crate::domain::throttle_mode::ThrottleMode;

/// Most times that a call is sent although Amazon refused it, apart from the first. Each of them had its turn, so more
/// refusals mean that waiting does not help this call.
const MAX_AGAIN: u32 = 8;

/// The status of a duplicate: `425 Too Early`.
const TOO_EARLY: u16 = 425;

/// How long a call waited.
#[derive(Clone, Copy, Debug)]
pub struct Waited {
    /// The bucket.
    pub bucket: BucketName,
    /// The time in the queue, in seconds.
    pub wait: Seconds,
    /// The time that was expected when it entered the queue, in seconds.
    pub expected: Seconds,
}

impl fmt::Display for Waited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bucket, wait, expected } = self;
        write!(f, "wait={wait:.3}, expected={expected:.3}, bucket={bucket}")
    }
}

/// A waiting call. Dropping it leaves the queue.
#[derive(Debug)]
pub struct Ticket<'a> {
    place: Waits,
    observed: Observed<'a>,
    timer: Timer<'a>,
    deadline: SignedDuration,
    _room: Held,
}

/// Measures how long a call waits. Dropped with the ticket, so that a wait counts whose caller hangs up.
#[derive(Debug)]
struct Timer<'a> {
    memory: &'a Memory,
    since: Seconds,
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.memory.metrics.throttle_wait.observe(self.memory.now() - self.since);
    }
}

/// What a call waits for.
#[derive(Debug)]
enum Waits {
    /// Its turn in the bucket.
    Turn(Place),
    /// That something ends of which Amazon runs a limited number at once.
    End(GatePlace),
}

impl<'a> Pass<'a> {
    /// Decides about a call of a family of which Amazon publishes limits: counts it, if a gate does.
    pub(super) fn enter_gates(mut self) -> Entry<'a> {
        if let Some(observed) = &mut self.0 {
            let gates = &observed.throttle.buckets.gates;
            observed.gates =
                published::counted(&observed.call).iter().filter_map(|counted| gates.of(counted)).collect();
        }
        self.enter(false)
    }

    /// Decides about the call as the mode says; `first`: it had its turn before, and Amazon refused it.
    pub(super) fn enter(self, first: bool) -> Entry<'a> {
        match self.0 {
            Some(observed) => observed.enter(first),
            None => Entry::Pass(self),
        }
    }

    /// The job of which the response tells, if a gate counts it: its body has to be told.
    pub fn job(&mut self) -> Option<Job> {
        let observed = self.0.as_mut()?;
        let success = (200..300).contains(&observed.status);
        if observed.call.kind == Kind::Create && success && !observed.slots.is_empty() {
            return Some(Job::begun(std::mem::take(&mut observed.slots)));
        }
        if observed.call.kind != Kind::Poll || !observed.throttle.families[observed.call.family.index()].published {
            return None;
        }
        let id = published::polled(&observed.call)?;
        let gates = observed.throttle.buckets.gates.counting(observed.call.region, id);
        let job = (!gates.is_empty()).then(|| Job::polled(gates, id))?;
        match observed.status {
            200..300 => return Some(job),
            404 | 410 => job.unknown(),
            _ => {}
        }
        None
    }

    /// Whether the call may wait for another turn: Amazon refused it, and the mode is `queue`.
    pub fn may_go_again(&self) -> bool {
        self.0.as_ref().is_some_and(|observed| {
            observed.refused && observed.mode == ThrottleMode::Queue && observed.again < MAX_AGAIN
        })
    }

    /// Asks for another turn after a refusal. `bytes` is what the call holds meanwhile. Changes nothing if there is
    /// none in time.
    pub fn again(&mut self, bytes: usize) -> Option<Entry<'a>> {
        let mut observed = self.0.take()?;
        let kept = Observed { gates: Vec::new(), slots: Vec::new(), ..observed };
        observed.call.bytes = observed.call.bytes.saturating_add(bytes);
        observed.again += 1;
        match Pass(Some(observed)).enter(true) {
            Entry::Refuse(_) => {
                self.0 = Some(kept);
                None
            }
            entry => Some(entry),
        }
    }

    /// The hint for the caller: Amazon's 425 to the creation of a report says that the same report is running already.
    pub fn hint(&self) -> Option<&'static str> {
        let observed = self.0.as_ref()?;
        (observed.status == TOO_EARLY && observed.call.kind == Kind::Create).then_some("duplicate_report")
    }

    /// How long the call waited, if it did.
    pub fn waited(&self) -> Option<Waited> {
        self.0.as_ref()?.waited
    }
}

impl<'a> Observed<'a> {
    /// Learns from a response that may be a refusal. Returns whether it is one.
    pub(super) fn is_refusal(&mut self, status: StatusCode, headers: &HeaderMap) -> bool {
        let memory = &self.throttle.memory;
        let verdict = refusal::read(status, headers, self.call.family, memory.clock.now());
        let Verdict::Refused { advised, unprocessed } = verdict else { return false };
        self.refused = unprocessed;
        let mut explained = false;
        for gate in self.gates.iter().filter(|_| unprocessed) {
            explained |= gate.refused(advised);
        }
        self.slots.clear();
        if explained {
            self.bucket.refused_for_a_count();
            memory.news.notify_one();
            return true;
        }
        self.bucket.refused(Refusal {
            at: memory.now(),
            epoch: self.epoch,
            advised,
            default: refusal::default_pause(self.call.kind),
            dice: dice(),
            peak: 0.0,
        });
        memory.news.notify_one();
        true
    }

    /// Passes the gates, then the bucket.
    fn enter(mut self, first: bool) -> Entry<'a> {
        let holds = matches!(self.mode, ThrottleMode::Enforce | ThrottleMode::Queue);
        while let Some(gate) = self.gates.get(self.slots.len()).cloned() {
            match gate.enter(holds) {
                Ok(slot) => self.slots.push(slot),
                Err(expected) if self.mode == ThrottleMode::Queue => {
                    return self.wait(expected, |own| Waits::End(gate.wait(own.call.account, first)));
                }
                Err(expected) => return Entry::Refuse(refuse(self.bucket.name, expected, Reason::AtOnce)),
            }
        }
        match self.mode {
            ThrottleMode::Queue => self.queue(first),
            ThrottleMode::Enforce => self.enforce(),
            ThrottleMode::Off | ThrottleMode::Observe => Entry::Pass(Pass(Some(self))),
        }
    }

    fn enforce(self) -> Entry<'a> {
        let paused = self.bucket.paused(self.throttle.memory.now());
        if paused > 0.0 {
            return Entry::Refuse(refuse(self.bucket.name, paused, Reason::Paused));
        }
        Entry::Pass(Pass(Some(self)))
    }

    fn queue(mut self, first: bool) -> Entry<'a> {
        let bucket = self.bucket;
        let now = self.throttle.memory.now();
        let expected = match bucket.turn(now, self.call.weight) {
            Turn::Now(epoch) => {
                self.epoch = epoch;
                return Entry::Pass(Pass(Some(self)));
            }
            // A call that had its turn goes before the others of its account.
            Turn::Later(expected) if !first => expected,
            Turn::Later(expected) => expected.min(bucket.paused(now)),
        };
        let clock = &self.throttle.memory.clock;
        self.wait(expected, |own| Waits::Turn(bucket.wait(own.call.account, first, clock)))
    }

    /// Lets the call wait, as long as it may and there is room.
    fn wait(mut self, expected: Seconds, place: impl FnOnce(&Self) -> Waits) -> Entry<'a> {
        let (throttle, name) = (self.throttle, self.bucket.name);
        let memory = &throttle.memory;
        let now = memory.now();
        let refuse = |reason| Entry::Refuse(refuse(name, expected, reason));
        let own = self.arrived + throttle.settings.queue_timeout.as_secs_f64();
        let drain = (*memory.drain.borrow()).map_or(f64::INFINITY, |drain| drain.as_secs_f64());
        if now + expected > own.min(drain) {
            return refuse(if own < drain { Reason::TooLate } else { Reason::Draining });
        }
        let (calls, bytes) = (throttle.settings.max_waiting, throttle.settings.max_waiting_bytes);
        let Some(room) = memory.room.take(self.call.bytes, calls, bytes) else { return refuse(Reason::Full) };
        let place = place(&self);
        memory.news.notify_one();
        let told = self.waited.map_or(0.0, |waited| waited.expected);
        let before = self.waited.map_or(0.0, |waited| waited.wait);
        self.waited = Some(Waited { bucket: name, wait: before, expected: told + expected });
        let deadline = SignedDuration::try_from_secs_f64(own).unwrap_or(SignedDuration::MAX);
        let timer = Timer { memory, since: now };
        Entry::Wait(Ticket { place, observed: self, timer, deadline, _room: room })
    }

    /// Adds the time since `since` to what the call has waited.
    fn waited_since(&mut self, since: Seconds) -> Seconds {
        let now = self.throttle.memory.now();
        if let Some(total) = &mut self.waited {
            total.wait += now - since;
        }
        now
    }
}

impl<'a> Ticket<'a> {
    /// Waits for the call's turn.
    ///
    /// # Errors
    /// [`Throttled`] if it does not come within `throttle.queue_timeout`, or before the end of a shutdown.
    pub async fn turn(mut self) -> Result<Pass<'a>, Throttled> {
        loop {
            let turn = self.next().await;
            let Self { mut observed, timer, .. } = self;
            let now = observed.waited_since(timer.since);
            drop(timer);
            match turn? {
                Turned::Bucket(epoch) => {
                    observed.bucket.take_more(now, observed.call.weight - 1.0);
                    observed.epoch = epoch;
                    return Ok(Pass(Some(observed)));
                }
                Turned::Gate(slot) => observed.slots.push(slot),
            }
            // It waited behind the gate, not in the bucket.
            match observed.enter(false) {
                Entry::Pass(pass) => return Ok(pass),
                Entry::Refuse(throttled) => return Err(throttled),
                Entry::Wait(ticket) => self = ticket,
            }
        }
    }

    async fn next(&mut self) -> Result<Turned, Throttled> {
        let Self { place, observed, deadline, .. } = self;
        let memory = &observed.throttle.memory;
        let mut drain = memory.drain.subscribe();
        let (turn, drained) = loop {
            let end = *drain.borrow_and_update();
            let until = end.map_or(*deadline, |end| end.min(*deadline));
            let turn = async {
                match place {
                    Waits::Turn(place) => place.turn(&memory.clock, until).await.map(Turned::Bucket),
                    Waits::End(place) => place.turn(until).await.map(Turned::Gate),
                }
            };
            tokio::select! {
                turn = turn => break (turn, end.is_some_and(|end| end < *deadline)),
                Ok(()) = drain.changed() => {}
            }
        };
        if let Some(turn) = turn {
            return Ok(turn);
        }
        let reason = if drained { Reason::Draining } else { Reason::TooLate };
        let left = match place {
            Waits::End(place) => place.expected(),
            Waits::Turn(_) => match observed.bucket.turn(memory.now(), 0.0) {
                Turn::Now(_) => 0.0,
                Turn::Later(left) => left,
            },
        };
        Err(refuse(observed.bucket.name, left, reason))
    }
}

/// What a call waited for.
enum Turned {
    /// It is sent in this epoch.
    Bucket(u32),
    Gate(super::gate::Slot),
}

fn refuse(bucket: BucketName, wait: Seconds, reason: Reason) -> Throttled {
    // More than a pause can be only behind many calls; and the estimate ends there.
    let wait = Duration::from_secs_f64(wait.clamp(0.001, law::MAX_PAUSE));
    Throttled { bucket, wait, reason }
}

/// At random, from 0 to 1.
fn dice() -> f64 {
    // Without randomness a jitter in the middle.
    getrandom::u64().map_or(0.5, |bits| (bits >> 11) as f64 / (1u64 << 53) as f64)
}
