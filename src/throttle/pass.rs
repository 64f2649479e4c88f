//! One call's way through the throttle: the pass with which it is sent, and the ticket with which it waits.

use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use jiff::SignedDuration;

use super::bucket::{Bucket, Place, Turn};
use super::classify::{self, Kind, Verdict};
use super::law::{Refusal, Seconds};
use super::room::Held;
use super::{BucketName, Call, Entry, Reason, Throttle, Throttled, published};
use crate::domain::throttle_mode::ThrottleMode;

/// Most times that a call is sent although Amazon refused it, apart from the first. Each of them had its turn, so more
/// refusals mean that waiting does not help this call.
const MAX_AGAIN: u32 = 8;

/// The status of a duplicate: `425 Too Early`.
const TOO_EARLY: u16 = 425;

/// The right to send a call once. The response is told to it, and says whether the call may be sent again.
#[derive(Debug)]
pub struct Pass<'a>(Option<Observed<'a>>);

#[derive(Debug)]
struct Observed<'a> {
    throttle: &'a Throttle,
    bucket: &'a Arc<Bucket>,
    call: Call<'a>,
    mode: ThrottleMode,
    epoch: u32,
    arrived: Seconds,
    /// The total time in the queue, if the call waited.
    waited: Option<Waited>,
    /// The last response's status; 0 before it.
    status: u16,
    /// Whether Amazon refused the call, and certainly did not process it.
    refused: bool,
    /// How often it was sent again.
    again: u32,
}

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
    place: Place,
    observed: Observed<'a>,
    since: Seconds,
    deadline: SignedDuration,
    _room: Held,
}

impl<'a> Pass<'a> {
    /// For a call that the throttle has no business with.
    pub(super) fn unobserved() -> Self {
        Self(None)
    }

    pub(super) fn new(throttle: &'a Throttle, bucket: &'a Arc<Bucket>, call: Call<'a>, mode: ThrottleMode) -> Self {
        let (epoch, arrived) = (bucket.epoch(), throttle.memory.now());
        Self(Some(Observed {
            throttle,
            bucket,
            call,
            mode,
            epoch,
            arrived,
            waited: None,
            status: 0,
            refused: false,
            again: 0,
        }))
    }

    /// Decides about the call as the mode says; `first`: it had its turn before, and Amazon refused it.
    pub(super) fn enter(self, first: bool) -> Entry<'a> {
        let Some(observed) = self.0 else { return Entry::Pass(self) };
        if observed.mode == ThrottleMode::Queue { observed.queue(first) } else { observed.enforce() }
    }

    /// Learns from the response. It is called once for each response from Amazon, whoever gets it.
    pub fn responded(&mut self, status: StatusCode, headers: &HeaderMap) {
        let Some(observed) = &mut self.0 else { return };
        let memory = &observed.throttle.memory;
        let now = memory.now();
        (observed.refused, observed.status) = (false, status.as_u16());
        match classify::read(status, headers, observed.call.family, memory.clock.now()) {
            Verdict::Accepted => observed.bucket.accepted(now),
            Verdict::Refused { advised, unprocessed } => {
                observed.refused = unprocessed;
                let refusal = Refusal {
                    at: now,
                    epoch: observed.epoch,
                    advised,
                    default: classify::default_pause(observed.call.kind),
                    dice: dice(),
                    peak: 0.0,
                };
                observed.bucket.refused(refusal, published(observed.call.family));
            }
        }
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
        let kept = Observed { ..observed };
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
    fn enforce(self) -> Entry<'a> {
        let paused = self.bucket.paused(self.throttle.memory.now());
        if paused > 0.0 {
            return Entry::Refuse(Throttle::refuse(self.bucket.name, paused, Reason::Paused));
        }
        Entry::Pass(Pass(Some(self)))
    }

    fn queue(mut self, first: bool) -> Entry<'a> {
        let (throttle, bucket) = (self.throttle, self.bucket);
        let memory = &throttle.memory;
        let now = memory.now();
        let expected = match bucket.turn(now, self.call.weight) {
            Turn::Now(epoch) => {
                self.epoch = epoch;
                return Entry::Pass(Pass(Some(self)));
            }
            // A call that had its turn goes before the others of its account.
            Turn::Later(expected) if !first => expected,
            Turn::Later(expected) => expected.min(bucket.paused(now)),
        };
        let refuse = |reason| Entry::Refuse(Throttle::refuse(bucket.name, expected, reason));
        let own = self.arrived + throttle.settings.queue_timeout.as_secs_f64();
        let drain = (*memory.drain.borrow()).map_or(f64::INFINITY, |drain| drain.as_secs_f64());
        if now + expected > own.min(drain) {
            return refuse(if own < drain { Reason::TooLate } else { Reason::Draining });
        }
        let (calls, bytes) = (throttle.settings.max_waiting, throttle.settings.max_waiting_bytes);
        let Some(room) = memory.room.take(self.call.bytes, calls, bytes) else { return refuse(Reason::Full) };
        let place = bucket.wait(self.call.account, first, &memory.clock);
        let told = self.waited.map_or(0.0, |waited| waited.expected);
        let before = self.waited.map_or(0.0, |waited| waited.wait);
        self.waited = Some(Waited { bucket: bucket.name, wait: before, expected: told + expected });
        let deadline = SignedDuration::try_from_secs_f64(own).unwrap_or(SignedDuration::MAX);
        Entry::Wait(Ticket { place, observed: self, since: now, deadline, _room: room })
    }
}

impl<'a> Ticket<'a> {
    /// Waits for the call's turn.
    ///
    /// # Errors
    /// [`Throttled`] if it does not come within `throttle.queue_timeout`, or before the end of a shutdown.
    pub async fn turn(mut self) -> Result<Pass<'a>, Throttled> {
        let memory = &self.observed.throttle.memory;
        let mut drain = memory.drain.subscribe();
        let (epoch, drained) = loop {
            let end = *drain.borrow_and_update();
            let deadline = end.map_or(self.deadline, |end| end.min(self.deadline));
            tokio::select! {
                epoch = self.place.turn(&memory.clock, deadline) => break (epoch, end.is_some_and(|end| end < self.deadline)),
                Ok(()) = drain.changed() => {}
            }
        };
        let now = memory.now();
        let waited = now - self.since;
        memory.metrics.throttle_wait.observe(waited);
        let mut observed = self.observed;
        let Some(epoch) = epoch else {
            let reason = if drained { Reason::Draining } else { Reason::TooLate };
            let left = match observed.bucket.turn(now, 0.0) {
                Turn::Now(_) => 0.0,
                Turn::Later(left) => left,
            };
            return Err(Throttle::refuse(observed.bucket.name, left, reason));
        };
        observed.bucket.take_more(now, observed.call.weight - 1.0);
        observed.epoch = epoch;
        if let Some(total) = &mut observed.waited {
            total.wait += waited;
        }
        Ok(Pass(Some(observed)))
    }
}

/// At random, from 0 to 1.
fn dice() -> f64 {
    // Without randomness a jitter in the middle.
    getrandom::u64().map_or(0.5, |bits| (bits >> 11) as f64 / (1u64 << 53) as f64)
}
