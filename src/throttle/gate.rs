//! Gates by count: what Amazon runs at once, such as five exports of an endpoint.
//!
//! A gate counts what adsidecar knows of, and holds nothing before Amazon refused a call that it counts. When a call
//! "ends" differs. One with traffic events ends with its response. An export or an AMC workflow run goes on at Amazon
//! after its creation was answered, and adsidecar sends no polls of its own. So its end is learned from what passes by:
//!
//! - the response to a caller's poll names a final state, or says that the job does not exist;
//! - nothing ended for a while, so the gate lets one call *probe*. If Amazon accepts it, the oldest job ended unseen;
//! - Amazon refuses a call although fewer run than it allows: others run the rest. The gate knows nothing of them, and
//!   leaves that refusal to the bucket's [law](super::law).
//!
//! Processes with a shared store tell each other how many run through each of them, while one of them holds calls.
//!
//! The file is over 400 lines: places, jobs, waiting calls and what others count are one state under one lock.

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

/// How long a count of other processes is good, in seconds, if no news of them arrive.
const HEARD: Seconds = 60.0;

/// What the names of counts begin with.
const AT_ONCE: &str = "at once: ";

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
    /// What other processes count, by the name of the gate, for gates that this process will have.
    heard: Mutex<HashMap<String, Heard>>,
}

/// What other processes count at a gate.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heard {
    /// How many run through them.
    pub(super) running: usize,
    /// Whether Amazon has refused a call of theirs, so that calls are held.
    pub(super) holds: bool,
    /// The uptime until which this is good.
    until: Seconds,
}

/// What this process counts at a gate, for the others.
#[derive(Clone, Debug)]
pub(super) struct Count {
    /// The name of the gate, which no bucket has.
    pub(super) name: String,
    pub(super) running: usize,
    /// Whether Amazon has refused a call of this process.
    pub(super) holds: bool,
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
    heard: Heard,
    /// What other processes were told last.
    told: usize,
    /// How many of those that run elsewhere must have ended, as Amazon has accepted a call in their place.
    ended_elsewhere: usize,
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
    /// How many more run through other processes that share the store.
    pub elsewhere: usize,
    /// How many Amazon runs at once.
    pub limit: usize,
    /// Calls that wait for one to end.
    pub waiting: usize,
    /// Whether calls are held: Amazon has refused one within the last hour.
    pub holds: bool,
}

impl Gates {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, gates: Mutex::default(), heard: Mutex::default() }
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
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let heard = heard.get(&counted.name()).copied().unwrap_or_default();
        let state = Mutex::new(State { heard, ..State::default() });
        let gate = Arc::new(Gate { counted: counted.clone(), clock: self.clock.clone(), state });
        gates.insert(key, gate.clone());
        Some(gate)
    }

    /// What the others have to know: the gates at which something runs or waits while calls are held.
    pub(super) fn counts(&self) -> Vec<Count> {
        let now = self.clock.uptime().as_secs_f64();
        let gates: Vec<_> = self.lock().values().cloned().collect();
        gates.iter().filter_map(|gate| gate.count(now)).collect()
    }

    /// Whether others hold calls at some gate.
    pub(super) fn hear_of_others(&self) -> bool {
        let now = self.clock.uptime().as_secs_f64();
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.values().any(|heard| heard.holds && now < heard.until)
    }

    /// Learns what the others count, by the names of the gates: all that is known of them now.
    pub(super) fn hear(&self, mut counts: HashMap<String, Heard>) {
        let until = self.clock.uptime().as_secs_f64() + HEARD;
        counts.values_mut().for_each(|heard| heard.until = until);
        let gates: Vec<_> = self.lock().values().cloned().collect();
        for gate in gates {
            gate.hear(counts.get(&gate.counted.name()).copied().unwrap_or_default());
        }
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = counts;
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

impl Heard {
    pub(super) fn new(running: usize, holds: bool) -> Self {
        Self { running, holds, until: 0.0 }
    }
}

impl Counted {
    /// The name under which processes tell each other of it.
    pub(super) fn name(&self) -> String {
        format!("{AT_ONCE}{}/{}", self.region.as_str(), self.of)
    }

    /// Whether `name` is the name of something that is counted, and not of a bucket.
    pub(super) fn is_name(name: &str) -> bool {
        name.starts_with(AT_ONCE)
    }
}

impl Gate {
    /// Takes a place. If the gate is full and `hold`s calls, returns the time until there will probably be one.
    pub(super) fn enter(self: &Arc<Self>, hold: bool) -> Result<Slot, Seconds> {
        let now = self.now();
        let mut state = self.lock();
        state.expire(now);
        let free = state.queue.is_empty() && state.taken(now) < self.counted.limit && state.resumed <= now;
        if hold && state.holds(now) && !free {
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
        let full = state.taken(now) > self.counted.limit;
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
        let known = state.taken(now) - 1;
        if state.holds(now) && known > self.counted.limit || state.jobs.len() > MAX_JOBS {
            // Amazon runs one more, so the oldest has ended, or one elsewhere.
            match state.jobs.len() {
                1 => state.ended_elsewhere += 1,
                _ => drop(state.jobs.remove(0)),
            }
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
            elsewhere: state.taken(now) - state.used(),
            limit: self.counted.limit,
            waiting: state.waiting,
            holds: state.holds(now),
        })
    }

    fn count(&self, now: Seconds) -> Option<Count> {
        let mut state = self.lock();
        state.expire(now);
        let tells = state.holds(now) && state.used() + state.waiting > 0;
        let tell = if tells { state.used() } else { 0 };
        let told = std::mem::replace(&mut state.told, tell);
        (tells || told > 0).then(|| Count {
            name: self.counted.name(),
            running: state.used(),
            holds: now < state.holds_until,
        })
    }

    fn hear(&self, heard: Heard) {
        let mut state = self.lock();
        // Those that have ended meanwhile are in the new count no more.
        let fewer = state.heard.running.saturating_sub(heard.running);
        state.ended_elsewhere = state.ended_elsewhere.saturating_sub(fewer);
        state.heard = heard;
        state.advance(self.now(), self.counted.limit);
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

    /// The places that are taken, those of other processes included.
    fn taken(&self, now: Seconds) -> usize {
        let elsewhere = if now < self.heard.until { self.heard.running } else { 0 };
        self.used() + elsewhere.saturating_sub(self.ended_elsewhere)
    }

    /// Whether calls are held: Amazon has refused one, here or elsewhere.
    fn holds(&self, now: Seconds) -> bool {
        now < self.holds_until || self.heard.holds && now < self.heard.until
    }

    fn is_in_use(&self, now: Seconds) -> bool {
        self.used() + self.waiting > 0 || self.holds(now)
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
        while self.resumed <= now && (self.taken(now) < limit || !self.holds(now)) && self.send_next() {}
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
