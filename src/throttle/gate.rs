//! Gates by count: what Amazon runs at once, such as five exports of an endpoint.
//!
//! A gate counts what adsidecar knows of, and holds nothing before Amazon refused a call that it counts. When a call
//! "ends" differs. One with traffic events ends with its response. An export or an AMC workflow run goes on at Amazon
//! after its creation was answered, and adsidecar sends no polls of its own. So its end is learned from what passes by:
//!
//! - the response to a caller's poll names a final state, or says that the job does not exist;
//! - nothing ended for a while, so the gate lets one call *probe*. If Amazon accepts it, the oldest job ended unseen;
//! - Amazon refuses a call although fewer run here than it allows: others run the rest. The gate knows nothing of
//!   them, and leaves that refusal to the bucket's [law](super::law).
//!
//! The file is a little over 400 lines: places, jobs and waiting calls are one state under one lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::SignedDuration;
use serde::Deserialize;
use tokio::sync::oneshot;

use super::law::{MAX_PAUSE, Seconds};
use super::queue::Queue;
use crate::domain::account::Region;
use crate::domain::clock::Clock;

/// Most gates of one client. AMC has one for each instance; beyond this number runs are not counted.
const MAX_GATES: usize = 1000;

/// Most jobs that one gate counts. Only a gate that never held a call gets that far; it forgets the oldest.
const MAX_JOBS: usize = 1000;

/// How long a gate holds calls after Amazon's last refusal, in seconds. Amazon's counts may change.
const HOLDS: Seconds = 3600.0;

/// Age at which a job counts as ended, in seconds, if nobody asks for its state.
const MAX_AGE: Seconds = 6.0 * 3600.0;

/// Pause until a probe, at first and at most, in seconds. It doubles with each refused probe.
const PROBE_FIRST: Seconds = 5.0;
const PROBE_MOST: Seconds = 64.0;

/// States after which a job does not run any more (Exports; AMC reporting).
const ENDED: [&str; 6] = ["COMPLETED", "FAILED", "SUCCEEDED", "CANCELLED", "REJECTED", "EXPIRED"];

/// What a gate counts, and how many Amazon allows at once.
#[derive(Clone, Debug)]
pub(super) struct Counted {
    pub(super) region: Region,
    /// The API family.
    pub(super) family: &'static str,
    /// What it is, such as "exports of /campaigns/export".
    pub(super) of: String,
    /// Whether it counts once more what other gates count, for a whole account.
    pub(super) of_account: bool,
    pub(super) limit: usize,
}

/// The gates of one client.
#[derive(Debug)]
pub(super) struct Gates {
    clock: Clock,
    gates: Mutex<HashMap<(Region, String), Arc<Gate>>>,
}

/// One gate.
#[derive(Debug)]
pub(super) struct Gate {
    counted: Counted,
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What runs at Amazon, the oldest first.
    jobs: Vec<Running>,
    /// Calls under way.
    calls: usize,
    /// Until when calls are held.
    holds_until: Seconds,
    /// The end of the pause that Amazon asked for.
    resumed: Seconds,
    /// When one call may be sent although the gate is full, and how many of those Amazon refused in a row.
    probe_at: Seconds,
    refused_probes: u32,
    /// How long a job runs, from those whose end was seen; 0 if none was.
    typical: Seconds,
    queue: Queue<()>,
    waiting: usize,
}

#[derive(Debug)]
struct Running {
    id: String,
    since: Seconds,
}

/// What a gate counts now, for people.
#[derive(Clone, Debug)]
pub struct GateStatus {
    /// The region whose host runs it.
    pub region: Region,
    /// The API family.
    pub family: &'static str,
    /// What it is, such as "exports of /campaigns/export".
    pub of: String,
    /// Whether it counts once more what other gates count, for a whole account.
    pub of_account: bool,
    /// How many run, as far as adsidecar knows.
    pub running: usize,
    /// How many Amazon runs at once.
    pub limit: usize,
    /// Calls that wait for one to end.
    pub waiting: usize,
    /// Whether calls are held: Amazon has refused one within the last hour.
    pub holds: bool,
}

impl Gates {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, gates: Mutex::default() }
    }

    /// The gate for what is `counted`; `None` if there are too many.
    pub(super) fn of(&self, counted: &Counted) -> Option<Arc<Gate>> {
        let now = self.clock.uptime().as_secs_f64();
        let mut gates = self.lock();
        let key = (counted.region, counted.of.clone());
        if let Some(gate) = gates.get(&key) {
            return Some(gate.clone());
        }
        if gates.len() >= MAX_GATES {
            gates.retain(|_, gate| Arc::strong_count(gate) > 1 || gate.lock().is_in_use(now));
        }
        if gates.len() >= MAX_GATES {
            return None;
        }
        let gate = Arc::new(Gate { counted: counted.clone(), clock: self.clock.clone(), state: Mutex::default() });
        gates.insert(key, gate.clone());
        Some(gate)
    }

    /// The gates that count the job `id`.
    pub(super) fn counting(&self, region: Region, id: &str) -> Vec<Arc<Gate>> {
        let gates = self.lock();
        let counts = |gate: &&Arc<Gate>| {
            gate.counted.region == region && gate.lock().jobs.iter().any(|running| running.id == id)
        };
        gates.values().filter(counts).cloned().collect()
    }

    /// What the gates count, as far as something runs, waits or is held.
    pub(super) fn status(&self) -> Vec<GateStatus> {
        let now = self.clock.uptime().as_secs_f64();
        let gates: Vec<_> = self.lock().values().cloned().collect();
        let mut all: Vec<_> = gates.iter().filter_map(|gate| gate.status(now)).collect();
        all.sort_by(|one, other| (one.region as usize, &one.of).cmp(&(other.region as usize, &other.of)));
        all
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Region, String), Arc<Gate>>> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call's place behind a gate, from before it is sent. Dropping it gives the place to the next one.
#[derive(Debug)]
pub(super) struct Slot(Arc<Gate>);

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.calls -= 1;
        state.advance(self.0.now(), self.0.counted.limit);
    }
}

impl Gate {
    /// Takes a place. If the gate is full and `hold`s calls, returns the time until there will probably be one.
    pub(super) fn enter(self: &Arc<Self>, hold: bool) -> Result<Slot, Seconds> {
        let now = self.now();
        let mut state = self.lock();
        state.expire(now);
        let free = state.queue.is_empty() && state.used() < self.counted.limit && state.resumed <= now;
        if hold && now < state.holds_until && !free {
            return Err(state.expected(now, self.counted.limit));
        }
        state.calls += 1;
        Ok(Slot(self.clone()))
    }

    /// Puts a call of `account` into the queue; `first`: before the account's other calls.
    pub(super) fn wait(self: &Arc<Self>, account: &str, first: bool) -> GatePlace {
        let mut state = self.lock();
        if state.waiting == 0 {
            state.probe_at = state.probe_at.max(self.now() + PROBE_FIRST);
        }
        state.waiting += 1;
        GatePlace { gate: self.clone(), turn: state.queue.push(account, first) }
    }

    /// Learns that Amazon refused a call that has a place. Returns whether the count explains it: as many others run as
    /// Amazon allows.
    pub(super) fn refused(&self, advised: Option<Seconds>) -> bool {
        let now = self.now();
        let mut state = self.lock();
        state.holds_until = now + HOLDS;
        let full = state.used() > self.counted.limit;
        if full {
            let pause = PROBE_FIRST * f64::from(1u32 << state.refused_probes.min(10));
            state.refused_probes = state.refused_probes.saturating_add(1);
            state.probe_at = now + pause.min(PROBE_MOST);
            state.resumed = state.resumed.max(now + advised.unwrap_or(0.0).clamp(0.0, MAX_PAUSE));
        }
        full
    }

    /// Learns that a call that has a place began the job `id`.
    fn began(&self, id: &str) {
        let now = self.now();
        let mut state = self.lock();
        state.jobs.push(Running { id: id.to_owned(), since: now });
        // The call itself still has its place.
        let known = state.used() - 1;
        let held = now < state.holds_until;
        if held && known > self.counted.limit || state.jobs.len() > MAX_JOBS {
            // Amazon runs one more, so the oldest has ended.
            state.jobs.remove(0);
            state.refused_probes = 0;
            state.probe_at = now + PROBE_FIRST;
        }
    }

    /// Learns that the job `id` does not run any more.
    fn ended(&self, id: &str) {
        let now = self.now();
        let mut state = self.lock();
        let Some(place) = state.jobs.iter().position(|running| running.id == id) else { return };
        let ran = now - state.jobs.remove(place).since;
        state.typical = if state.typical > 0.0 { 0.8 * state.typical + 0.2 * ran } else { ran };
        state.refused_probes = 0;
        state.probe_at = now + PROBE_FIRST;
        state.advance(now, self.counted.limit);
    }

    fn status(&self, now: Seconds) -> Option<GateStatus> {
        let mut state = self.lock();
        state.expire(now);
        state.is_in_use(now).then(|| GateStatus {
            region: self.counted.region,
            family: self.counted.family,
            of: self.counted.of.clone(),
            of_account: self.counted.of_account,
            running: state.used(),
            limit: self.counted.limit,
            waiting: state.waiting,
            holds: now < state.holds_until,
        })
    }

    fn now(&self) -> Seconds {
        self.clock.uptime().as_secs_f64()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn used(&self) -> usize {
        self.jobs.len() + self.calls
    }

    fn is_in_use(&self, now: Seconds) -> bool {
        self.used() + self.waiting > 0 || now < self.holds_until
    }

    fn expire(&mut self, now: Seconds) {
        self.jobs.retain(|running| now - running.since < MAX_AGE);
    }

    /// When the next place will probably be free: when the oldest job has run as long as others did.
    fn expected(&self, now: Seconds, limit: usize) -> Seconds {
        let left = match self.jobs.first() {
            Some(oldest) if self.typical > 0.0 => (oldest.since + self.typical - now).max(1.0),
            _ => 1.0,
        };
        (left + self.typical * self.waiting as f64 / limit as f64).max(self.resumed - now)
    }

    /// Gives free places to waiting calls.
    fn advance(&mut self, now: Seconds, limit: usize) {
        while self.resumed <= now && (self.used() < limit || now >= self.holds_until) && self.send_next() {}
    }

    /// Gives the next waiting call a place, if one waits.
    fn send_next(&mut self) -> bool {
        while let Some(call) = self.queue.pop() {
            // A call that gave up takes no place.
            if call.send(()).is_ok() {
                self.calls += 1;
                return true;
            }
        }
        false
    }

    /// Does what is due: ends a pause, or lets one call probe. Returns when something will be due next.
    fn look(&mut self, now: Seconds, limit: usize) -> Seconds {
        self.expire(now);
        self.advance(now, limit);
        if self.resumed > now {
            return self.resumed;
        }
        if now >= self.probe_at && self.send_next() {
            self.probe_at = now + PROBE_MOST;
        }
        self.probe_at.max(now + 0.01)
    }
}

/// A call's place in the queue of a gate. Dropping it leaves the queue.
#[derive(Debug)]
pub(super) struct GatePlace {
    gate: Arc<Gate>,
    turn: oneshot::Receiver<()>,
}

impl GatePlace {
    /// Waits for a place, at most until the uptime `deadline`.
    pub(super) async fn turn(&mut self, deadline: SignedDuration) -> Option<Slot> {
        loop {
            let due = self.gate.lock().look(self.gate.now(), self.gate.counted.limit);
            let due = SignedDuration::try_from_secs_f64(due).unwrap_or(SignedDuration::MAX);
            tokio::select! {
                biased;
                turn = &mut self.turn => return turn.ok().map(|()| Slot(self.gate.clone())),
                () = self.gate.clock.sleep_until(due.min(deadline)) => {}
            }
            if self.gate.clock.uptime() >= deadline {
                // The turn may have come in this very moment.
                self.turn.close();
                return self.turn.try_recv().ok().map(|()| Slot(self.gate.clone()));
            }
        }
    }

    /// The time until there will probably be a place.
    pub(super) fn expected(&self) -> Seconds {
        self.gate.lock().expected(self.gate.now(), self.gate.counted.limit)
    }
}

impl Drop for GatePlace {
    fn drop(&mut self) {
        self.turn.close();
        // A turn that nobody took.
        let unused = self.turn.try_recv().is_ok().then(|| Slot(self.gate.clone()));
        let mut state = self.gate.lock();
        state.waiting -= 1;
        let waiting = state.waiting;
        state.queue.sweep(waiting);
        drop(state);
        drop(unused);
    }
}

/// A response that tells of a job: that it begins, or its state. Its body is told to it.
#[derive(Debug)]
pub struct Job(What);

#[derive(Debug)]
enum What {
    /// The call that began it still has its places.
    Begun(Vec<Slot>),
    Polled(Vec<Arc<Gate>>, String),
}

/// What is read of the body.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    #[serde(alias = "workflowExecutionId")]
    export_id: Option<String>,
    status: Option<String>,
}

impl Job {
    pub(super) fn begun(slots: Vec<Slot>) -> Self {
        Self(What::Begun(slots))
    }

    pub(super) fn polled(gates: Vec<Arc<Gate>>, id: &str) -> Self {
        Self(What::Polled(gates, id.to_owned()))
    }

    /// Learns from the body of the response. Without one that can be read, a job that began is not counted, and the
    /// state of another one is not known.
    pub fn told(self, body: &[u8]) {
        let Ok(told) = serde_json::from_slice::<Told>(body) else { return };
        let ended = told.status.is_some_and(|status| ENDED.contains(&status.as_str()));
        match self.0 {
            What::Begun(slots) if !ended => {
                let id = told.export_id.unwrap_or_default();
                if !id.is_empty() {
                    slots.iter().for_each(|slot| slot.0.began(&id));
                }
            }
            What::Polled(gates, id) if ended => gates.iter().for_each(|gate| gate.ended(&id)),
            What::Begun(_) | What::Polled(..) => {}
        }
    }

    /// Learns that Amazon does not know the job (any more).
    pub(super) fn unknown(self) {
        if let What::Polled(gates, id) = self.0 {
            gates.iter().for_each(|gate| gate.ended(&id));
        }
    }
}
