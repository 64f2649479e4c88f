//! A fleet of processes on one database, over simulated time: a queue of events, and for each process the steps of
//! `src/auth/tokens` (`claims`, `follower`, `client_circuit`, `lease`, `refresh_task`) between the decisions, which are
//! the product's.
//!
//! The file is long because the steps of a pod follow each other here as they do there.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adsidecar::auth::lwa::LwaError;
use adsidecar::auth::tokens::Settings;
use adsidecar::auth::tokens::brake::{Brake, held_back};
use adsidecar::auth::tokens::pace::{
    ClaimPace, is_backlog, longest_pause, look_pause, next_look, notified_pause, poll_pause,
};
use adsidecar::domain::clock_reading::ClockReading;
use adsidecar::domain::grant::{AccessToken, Failure, GrantState, LiveGrant, Outcome, Remedy, Tokens};
use adsidecar::store::{LOOKUP_ROWS, PUBLISH, Position};
use jiff::SignedDuration;

use super::calibration::Calibration;
use super::database::{Claim, Costs, LIFETIME, Micros, SECOND, Sent, Server, Statement, Table, micros, wall};
use super::figures::Figures;

/// The way to the database and back.
const ROUND_TRIP: Micros = 500;
/// All pods start within this time.
const STARTS: Micros = 10 * SECOND;
/// Each user logs in about this often, and logs out as often.
const CONSENT: Micros = 365 * 24 * 3600 * SECOND;
/// When Login with Amazon is away, it refuses connections.
const REFUSED: Micros = 20_000;

/// What is deliberately wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownBad {
    /// Claims lock nothing, and everybody gets the lease.
    Unlocked,
    /// No process learns a pause before it claims.
    Unpaced,
    /// No process brakes.
    Unbraked,
    /// Every poll reads all refreshes.
    Told,
    /// Each process has the rate of one that is alone after an outage.
    Unshared,
    /// A fleet that starts with a backlog calls as fast as it can.
    Rushed,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub pods: usize,
    pub grants: usize,
    /// Cores of the database.
    pub cores: usize,
    pub end: Micros,
    /// When Login with Amazon is away.
    pub outage: (Micros, Micros),
    /// When a third of the pods is killed.
    pub kill: Micros,
    pub seed: u64,
    pub known_bad: Option<KnownBad>,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Started {
        pod: u32,
    },
    /// The pause before a poll is over, unless `ticket` has been replaced.
    Poll {
        pod: u32,
        life: u32,
        ticket: u32,
    },
    Note {
        pod: u32,
        life: u32,
    },
    /// What was due then, or the end of the brake.
    Wake {
        pod: u32,
        life: u32,
        at: Micros,
    },
    /// The server has executed a statement that returned or wrote `rows` rows.
    Executed {
        sent: Sent,
    },
    /// The rate after an outage admits the call of this task.
    Turn {
        task: u32,
    },
    /// Login with Amazon has answered.
    Answered {
        task: u32,
        works: bool,
    },
    /// So long after its refresh was due the row of a grant is to be read, if its holder knows of no refresh since.
    Overdue {
        grant: u32,
        generation: u32,
        late: Duration,
    },
    /// A pod reads the rows that are to be read.
    Look {
        pod: u32,
        life: u32,
    },
    Login,
    Kill,
}

struct Scheduled {
    at: Micros,
    number: u64,
    event: Event,
}

/// A refresh that a pod makes.
#[derive(Clone, Copy, Debug)]
struct Task {
    pod: u32,
    life: u32,
    grant: u32,
    generation: u32,
    interrupted: bool,
    /// When the refresh was due, and when the token expires that it replaces.
    due: Micros,
    expires: Micros,
    sent_at: Micros,
    /// How the refresh failed: attempts, and when the next is made.
    retry: Option<(u16, Micros)>,
}

/// A connection serves one statement at a time.
#[derive(Default)]
struct Connection {
    is_busy: bool,
    waiting: VecDeque<(Micros, Statement)>,
}

#[derive(Default)]
struct Pod {
    life: u32,
    is_alive: bool,
    requests: Connection,
    bulk: Connection,
    position: Option<Position>,
    pace: ClaimPace,
    brake: Brake,
    free: usize,
    is_claiming: bool,
    /// What the claim that is being executed found.
    claims: Vec<Claim>,
    wake_at: Option<Micros>,
    /// The task that holds the lock to probe, and those that wait for it.
    probing: Option<u32>,
    waiting: VecDeque<u32>,
    ticket: u32,
    is_polling: bool,
    /// News of users that this pod holds.
    news: u32,
    holds: u32,
    /// Rows that it is to read to take note of refreshes, and how late those are.
    overdue: Vec<(u32, Duration)>,
    /// The last notification that it has polled after.
    heard: u64,
    has_polled: bool,
    /// Whether it counts the others because there is a backlog at its start.
    has_backlog: bool,
}

pub struct Fleet {
    plan: Plan,
    settings: Settings,
    costs: Costs,
    now: Micros,
    number: u64,
    random: u64,
    events: BinaryHeap<Scheduled>,
    server: Server,
    table: Table,
    pods: Vec<Pod>,
    tasks: Vec<Task>,
    unused: Vec<u32>,
    /// The last generation of each grant whose refresh token Login with Amazon has seen.
    consumed: Vec<u32>,
    /// What the pod that holds a grant knows of it: its generation, and when its token expires. Whether it will look.
    known: Vec<(u32, Micros)>,
    watched: Vec<bool>,
    began: Instant,
    answer: Result<Tokens, LwaError>,
    refusal: Result<Tokens, LwaError>,
    /// The last login: its number, change and time, and how many pods have yet to hear of it.
    login: (u64, i64, Micros, usize),
    figures: Figures,
}

impl Fleet {
    pub fn new(plan: Plan, settings: Settings, measured: &Calibration) -> Self {
        let mut table = Table::new(plan.grants, settings.policy);
        table.unlocked = plan.known_bad == Some(KnownBad::Unlocked);
        table.told = plan.known_bad == Some(KnownBad::Told);
        let tokens = Tokens {
            access: AccessToken::new("Atza|x".to_owned()).expect("a token"),
            refresh: None,
            lifetime: Duration::from_micros(LIFETIME.unsigned_abs()),
            server_time: None,
            oddities: Vec::new(),
        };
        let code = "unreachable";
        let refusal = LwaError::TryLater { code, detail: String::new(), retry_after: None, taken: false };
        Self {
            figures: Figures::new(plan.end, plan.pods, plan.outage),
            pods: (0..plan.pods).map(|_| Pod::default()).collect(),
            consumed: vec![0; plan.grants],
            known: vec![(0, Micros::MIN); plan.grants],
            watched: vec![false; plan.grants],
            server: Server::new(plan.cores),
            costs: Costs::new(measured),
            now: 0,
            number: 0,
            random: plan.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            events: BinaryHeap::new(),
            table,
            tasks: Vec::new(),
            unused: Vec::new(),
            began: Instant::now(),
            answer: Ok(tokens),
            refusal: Err(refusal),
            login: (0, 0, 0, 0),
            plan,
            settings,
        }
    }

    /// Runs to the end, and returns what was counted.
    pub fn run(mut self) -> Figures {
        for pod in 0..self.plan.pods as u32 {
            let at = (self.dice() * STARTS as f64) as Micros;
            self.at(at, Event::Started { pod });
        }
        self.at(self.plan.kill, Event::Kill);
        self.next_login();
        while let Some(Scheduled { at, event, .. }) = self.events.pop() {
            if at >= self.plan.end {
                break;
            }
            self.now = at;
            self.handle(event);
        }
        self.figures
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Started { pod } => self.start(pod),
            Event::Poll { pod, life, ticket } => {
                if self.is_alive(pod, life) && self.pods[pod as usize].ticket == ticket {
                    self.pods[pod as usize].is_polling = true;
                    self.send(pod, Statement::Poll { rows: 0, head: 0 });
                }
            }
            Event::Note { pod, life } => {
                if self.is_alive(pod, life) {
                    self.send(pod, Statement::Note);
                    self.at(self.now + micros(PUBLISH), event);
                }
            }
            Event::Wake { pod, life, at } => {
                if self.is_alive(pod, life) && self.pods[pod as usize].wake_at == Some(at) {
                    self.pods[pod as usize].wake_at = None;
                    self.claim(pod);
                }
            }
            Event::Executed { sent } => self.executed(sent),
            Event::Turn { task } => {
                if self.is_running(task) {
                    self.permitted(task);
                }
            }
            Event::Answered { task, works } => {
                if self.is_running(task) {
                    self.answered(task, works);
                }
            }
            Event::Login => {
                let (pod, grant) = (self.pick(self.plan.pods), self.pick(self.plan.grants));
                if self.pods[pod as usize].is_alive {
                    self.send(pod, Statement::Login { grant });
                }
                self.next_login();
            }
            Event::Overdue { grant, generation, late } => {
                let (known, expires) = self.known[grant as usize];
                if known == generation {
                    let margin = micros(self.settings.policy.margin);
                    self.watched[grant as usize] = expires - margin > self.now;
                    if self.watched[grant as usize] {
                        self.want_look(grant, late);
                    }
                }
            }
            Event::Look { pod, life } => {
                if self.is_alive(pod, life) {
                    self.look(pod);
                }
            }
            Event::Kill => self.kill(),
        }
    }

    // What a pod does.

    fn start(&mut self, pod: u32) {
        let free = self.settings.concurrency;
        let this = &mut self.pods[pod as usize];
        *this = Pod { is_alive: true, free, life: this.life + 1, ..Pod::default() };
        self.send(pod, Statement::Start);
        let life = self.pods[pod as usize].life;
        self.at(self.now + micros(PUBLISH), Event::Note { pod, life });
    }

    /// A third of them, in the middle of whatever they do.
    fn kill(&mut self) {
        for pod in self.pods.iter_mut().step_by(3) {
            pod.is_alive = false;
            (pod.requests, pod.bulk) = Default::default();
        }
        self.figures.killed(self.now, self.pods.iter().filter(|pod| pod.is_alive).count());
        // Who was killed hears of nothing.
        self.login.3 = 0;
    }

    fn plan_poll(&mut self, pod: u32, pause: Duration) {
        let this = &mut self.pods[pod as usize];
        this.ticket += 1;
        let event = Event::Poll { pod, life: this.life, ticket: this.ticket };
        self.at(self.now + micros(pause), event);
    }

    /// `TokenManager::follow`, after the poll.
    fn polled(&mut self, pod: u32, rows: u32, head: i64) {
        let (now, jitter) = (self.reading(), self.dice());
        let due = self.table.next_due();
        self.figures.seen_due(self.now, due);
        let held = self.table.brake.filter(|until| *until > self.now);
        let elapsed = self.elapsed();
        let instant = self.began + elapsed;
        let hot = u32::try_from(self.settings.cache.min(self.plan.grants / self.plan.pods)).unwrap_or(u32::MAX);
        let this = &mut self.pods[pod as usize];
        let (position, is_continued) = Position::after(this.position.take(), rows as usize, head, 1, instant);
        this.position = Some(position);
        this.is_polling = false;
        this.pace.polled(due.map(wall), now.wall, elapsed, jitter);
        if self.plan.known_bad == Some(KnownBad::Unpaced) {
            this.pace = ClaimPace::default();
            this.pace.polled(due.map(wall), now.wall, elapsed, jitter);
        }
        if let Some(until) = held {
            this.brake.hold("unreachable", Duration::from_micros((until - self.now).unsigned_abs()), now);
        }
        let is_released = self.table.brake.is_none() && this.brake.is_held_by_others();
        let is_first = !std::mem::replace(&mut this.has_polled, true);
        this.has_backlog = is_first
            && self.plan.known_bad != Some(KnownBad::Rushed)
            && is_backlog(due.map(wall), now.wall, longest_pause(self.settings.policy));
        let has_backlog = this.has_backlog;
        let news = std::mem::take(&mut this.news);
        let mut compare = if is_continued { news } else { this.holds };
        this.holds = hot;
        let (number, change, at, left) = self.login;
        if left > 0 && head >= change && this.heard < number {
            this.heard = number;
            self.login.3 -= 1;
            self.figures.heard(self.now - at);
        }
        while compare > 0 {
            let rows = compare.min(LOOKUP_ROWS as u32);
            compare -= rows;
            self.send(pod, Statement::Look { rows });
        }
        let pause = poll_pause(self.dice());
        self.plan_poll(pod, pause);
        if is_released || has_backlog {
            self.send(pod, Statement::CountPods);
        } else {
            self.claim(pod);
        }
    }

    /// `TokenManager::claim_batch`.
    fn claim(&mut self, pod: u32) {
        let (now, elapsed, concurrency) = (self.reading(), self.elapsed(), self.settings.concurrency);
        let this = &mut self.pods[pod as usize];
        if this.is_claiming {
            return;
        }
        let Some(mut wait) = this.pace.wait(now.wall, elapsed) else { return };
        if this.pace.is_due(now.wall, elapsed) {
            if this.free == 0 {
                // The end of a refresh calls this again.
                return;
            }
            let limit = match self.plan.known_bad {
                Some(KnownBad::Unbraked) => this.free,
                _ => this.brake.claimable(now, elapsed, this.free, concurrency),
            };
            if limit > 0 {
                this.is_claiming = true;
                this.free -= limit;
                return self.send(pod, Statement::Claim { limit: limit as u32 });
            }
        }
        match this.brake.holds(now) {
            Some((_, held)) => wait = wait.max(held),
            // A probe that is running ends the brake or prolongs it, and a poll comes soon.
            None if this.brake.is_refused() => return,
            None => wait = wait.max(this.brake.turn_wait(elapsed)),
        }
        let at = self.now + micros(wait) + 1;
        if this.wake_at != Some(at) {
            this.wake_at = Some(at);
            let life = this.life;
            self.at(at, Event::Wake { pod, life, at });
        }
    }

    fn claimed(&mut self, pod: u32, limit: usize) {
        let (now, elapsed) = (self.reading(), self.elapsed());
        let longest = longest_pause(self.settings.policy);
        let this = &mut self.pods[pod as usize];
        let (life, claims) = (this.life, std::mem::take(&mut this.claims));
        this.is_claiming = false;
        this.free += limit - claims.len();
        this.pace.claimed(claims.len(), limit, now.wall, elapsed, longest);
        for claim in claims {
            let expires = self.table.expires[claim.grant as usize];
            let task = Task {
                pod,
                life,
                grant: claim.grant,
                generation: claim.generation,
                interrupted: claim.interrupted,
                due: claim.due,
                expires,
                sent_at: 0,
                retry: None,
            };
            let number = match self.unused.pop() {
                Some(number) => number,
                None => {
                    self.tasks.push(task);
                    self.tasks.len() as u32 - 1
                }
            };
            self.tasks[number as usize] = task;
            self.begin(number);
        }
        self.claim(pod);
    }

    /// `ClientCircuit::permit`.
    fn begin(&mut self, number: u32) {
        let now = self.elapsed();
        let this = &mut self.pods[self.tasks[number as usize].pod as usize];
        if this.brake.is_refused() {
            match this.probing {
                Some(_) => this.waiting.push_back(number),
                None => {
                    this.probing = Some(number);
                    self.probe(number);
                }
            }
            return;
        }
        let turn = micros(this.brake.turn(now, true));
        if turn > self.now {
            self.at(turn, Event::Turn { task: number });
        } else {
            self.permitted(number);
        }
    }

    /// `TokenManager::call_permit` with the lock to probe.
    fn probe(&mut self, number: u32) {
        let (now, pod) = (self.reading(), self.tasks[number as usize].pod);
        if self.pods[pod as usize].brake.holds(now).is_none() {
            self.send(pod, Statement::Probe { task: number });
        } else {
            self.permitted(number);
        }
    }

    /// `TokenManager::share_rate`.
    fn shared(&mut self, pod: u32) {
        let (now, phase) = (self.elapsed(), self.dice());
        let alive = match self.plan.known_bad {
            Some(KnownBad::Unshared) => 1,
            _ => self.pods.iter().filter(|pod| pod.is_alive).count(),
        };
        let this = &mut self.pods[pod as usize];
        match std::mem::take(&mut this.has_backlog) {
            true => this.brake.work_off(alive, phase, now),
            false => this.brake.share(alive, phase, now),
        }
        // Refreshes that waited for the probe continue at that rate.
        while self.pods[pod as usize].probing.is_none() && !self.pods[pod as usize].brake.is_refused() {
            let Some(next) = self.pods[pod as usize].waiting.pop_front() else { break };
            self.begin(next);
        }
        self.claim(pod);
    }

    fn end_probe(&mut self, number: u32) {
        let this = &mut self.pods[self.tasks[number as usize].pod as usize];
        if this.probing == Some(number) {
            this.probing = None;
            if let Some(next) = this.waiting.pop_front() {
                self.begin(next);
            }
        }
    }

    /// `TokenManager::call_permit`, at its end.
    fn permitted(&mut self, number: u32) {
        let (now, jitter, pod) = (self.reading(), self.dice(), self.tasks[number as usize].pod);
        let held = self.pods[pod as usize].brake.holds(now);
        match held.filter(|_| self.plan.known_bad != Some(KnownBad::Unbraked)) {
            Some((code, wait)) => self.failed(number, held_back(code, wait, true, jitter)),
            None => self.send(pod, Statement::Lease { task: number }),
        }
    }

    /// `RefreshTask::token_call`, with the lease.
    fn call(&mut self, number: u32) {
        let task = &mut self.tasks[number as usize];
        task.sent_at = self.now;
        let (grant, generation, interrupted) = (task.grant as usize, task.generation, task.interrupted);
        let works = !(self.plan.outage.0..self.plan.outage.1).contains(&self.now);
        let is_repeated = works && self.consumed[grant] >= generation;
        if works {
            self.consumed[grant] = generation;
        }
        self.figures.called(self.now, works, is_repeated, interrupted);
        let dice = self.dice();
        let took = match works {
            false => REFUSED,
            true if dice < 0.01 => 2 * SECOND,
            true => 80_000 + (dice * 220_000.0) as Micros,
        };
        self.at(self.now + ROUND_TRIP + took, Event::Answered { task: number, works });
    }

    fn answered(&mut self, number: u32, works: bool) {
        let (now, jitter) = (self.reading(), self.dice());
        let task = self.tasks[number as usize];
        let (pod, user) = (task.pod, &self.table.users[task.grant as usize]);
        let response = if works { &self.answer } else { &self.refusal };
        let brake = &mut self.pods[pod as usize].brake;
        let has_changed = brake.update(user, response, reading(task.sent_at), now, jitter);
        let held = brake.holds(now);
        if has_changed {
            match held {
                Some((_, wait)) => self.send(pod, Statement::SetBrake { wait: micros(wait) }),
                None => {
                    self.send(pod, Statement::EndBrake);
                    self.send(pod, Statement::CountPods);
                }
            }
        }
        self.end_probe(number);
        if works {
            self.send(pod, Statement::Write { task: number });
        } else {
            let failure = Failure { code: "unreachable", remedy: Remedy::Time, detail: None };
            self.failed(number, Outcome::Failed { failure, retry_after: None });
        }
    }

    /// The state that follows, and `RefreshTask::release`.
    fn failed(&mut self, number: u32, outcome: Outcome) {
        let (now, jitter) = (self.reading(), self.dice());
        let Task { pod, grant, .. } = self.tasks[number as usize];
        let live = Arc::new(LiveGrant::loaded(self.table.grant(grant), now));
        let held = match u32::from(self.table.attempts[grant as usize]) {
            0 => GrantState::Fresh(live),
            attempts => {
                let failure = Failure { code: "unreachable", remedy: Remedy::Time, detail: None };
                GrantState::Failing { grant: live, failure, attempts, retry_at: SignedDuration::MIN }
            }
        };
        let next = held.next(outcome, now, jitter);
        let retry_at = next.retry_at().map_or(self.now, |at| at.as_micros() as Micros);
        self.tasks[number as usize].retry = Some((u16::try_from(next.attempts()).unwrap_or(u16::MAX), retry_at));
        self.end_probe(number);
        self.send(pod, Statement::Release { task: number });
    }

    fn finished(&mut self, number: u32) {
        let pod = self.tasks[number as usize].pod;
        self.unused.push(number);
        self.pods[pod as usize].free += 1;
        self.claim(pod);
    }

    // The database.

    fn send(&mut self, pod: u32, statement: Statement) {
        let this = &mut self.pods[pod as usize];
        let bulk = matches!(statement, Statement::Look { .. });
        let connection = if bulk { &mut this.bulk } else { &mut this.requests };
        if connection.is_busy {
            return connection.waiting.push_back((self.now, statement));
        }
        connection.is_busy = true;
        let sent = Sent { pod, life: this.life, bulk, since: self.now, statement };
        if let Some(sent) = self.server.arrive(sent) {
            self.execute(sent);
        }
    }

    fn execute(&mut self, mut sent: Sent) {
        if let Statement::Poll { rows, head } = &mut sent.statement {
            let (from, limit) = Position::range(self.pods[sent.pod as usize].position.as_ref());
            *head = self.table.news;
            *rows = (*head).saturating_sub(from).clamp(0, limit) as u32;
        }
        let rows = match sent.statement {
            Statement::Poll { rows, .. } => rows.max(1),
            Statement::Claim { limit } => {
                let claims = self.table.claim(sent.pod, limit, self.now);
                let found = claims.len() as u32;
                self.pods[sent.pod as usize].claims = claims;
                found
            }
            Statement::Look { rows } => rows,
            _ => 1,
        };
        let cost = self.costs.of(sent.statement, rows);
        let takes = cost.microseconds + cost.microseconds_per_row * f64::from(rows);
        self.figures.statement(self.now, sent.statement, rows, &cost, takes, self.now - sent.since);
        self.at(self.now + takes.ceil() as Micros, Event::Executed { sent });
    }

    fn executed(&mut self, sent: Sent) {
        if let Some(next) = self.server.end() {
            self.execute(next);
        }
        let Sent { pod, life, bulk, statement, .. } = sent;
        let is_alive = self.is_alive(pod, life);
        if is_alive {
            let this = &mut self.pods[pod as usize];
            let connection = if bulk { &mut this.bulk } else { &mut this.requests };
            connection.is_busy = false;
            if let Some((since, statement)) = connection.waiting.pop_front() {
                connection.is_busy = true;
                let sent = Sent { pod, life, bulk, since, statement };
                if let Some(sent) = self.server.arrive(sent) {
                    self.execute(sent);
                }
            }
        }
        match statement {
            Statement::Lease { task } => {
                let Task { grant, generation, .. } = self.tasks[task as usize];
                let is_granted = self.table.lease(pod, grant, generation, self.now);
                match (is_alive, is_granted) {
                    (false, _) => {}
                    (true, true) => self.call(task),
                    (true, false) => {
                        self.figures.denied += 1;
                        self.end_probe(task);
                        self.send(pod, Statement::Release { task });
                    }
                }
            }
            Statement::Write { task } => {
                let Task { grant, generation, sent_at, due, expires, .. } = self.tasks[task as usize];
                if self.table.write(grant, Some(generation), sent_at, self.now) {
                    self.refreshed(pod, grant);
                    self.figures.stored(self.now, due, expires);
                } else {
                    self.figures.superseded += 1;
                }
                if is_alive {
                    self.finished(task);
                }
            }
            Statement::Release { task } => {
                let Task { grant, generation, retry, .. } = self.tasks[task as usize];
                self.table.release(pod, grant, generation, retry);
                if is_alive {
                    self.finished(task);
                }
            }
            Statement::SetBrake { wait } => self.table.set_brake(wait, self.now),
            Statement::EndBrake => {
                self.table.brake = None;
                self.figures.released(self.now);
            }
            Statement::Login { grant } => self.logged_in(pod, grant),
            _ if !is_alive => {}
            Statement::Claim { limit } => self.claimed(pod, limit as usize),
            Statement::CountPods => self.shared(pod),
            Statement::Start => {
                let pause = poll_pause(self.dice());
                self.plan_poll(pod, pause);
            }
            Statement::Poll { rows, head } => self.polled(pod, rows, head),
            Statement::Probe { task } => {
                if let Some(wait) = self.table.probe(self.now) {
                    let (now, wait) = (self.reading(), Duration::from_micros(wait.unsigned_abs()));
                    self.pods[pod as usize].brake.hold("unreachable", wait, now);
                }
                self.permitted(task);
            }
            Statement::Look { .. } | Statement::Note => {}
        }
    }

    /// A user logs in or out: the database notifies all.
    fn logged_in(&mut self, pod: u32, grant: u32) {
        self.table.write(grant, None, self.now, self.now);
        self.consumed[grant as usize] = self.table.generation[grant as usize] - 1;
        // Its holder hears of it by its next poll.
        let holder = self.holder(grant);
        if holder != pod {
            self.pods[holder as usize].news += 1;
        }
        self.watch(grant);
        let alive = self.pods.iter().filter(|pod| pod.is_alive).count();
        if self.login.3 == 0 {
            self.login = (self.login.0 + 1, self.table.news, self.now, alive);
        }
        for pod in 0..self.pods.len() as u32 {
            let this = &self.pods[pod as usize];
            if this.is_alive && !this.is_polling && this.position.is_some() {
                let pause = notified_pause(self.dice());
                self.plan_poll(pod, pause);
            }
        }
    }

    // What the holders of grants know: `TokenManager::note_refreshes`.

    /// Each user is hot at one pod, which holds the grant.
    fn holder(&self, grant: u32) -> u32 {
        grant % self.plan.pods as u32
    }

    /// The holder of a grant knows it as it is stored, and looks again after the next refresh was due.
    fn watch(&mut self, grant: u32) {
        let (at, late) = (grant as usize, next_look(None));
        self.known[at] = (self.table.generation[at], self.table.expires[at]);
        self.watched[at] = true;
        let due = self.table.due_as_held(grant);
        let generation = self.known[at].0;
        self.at(self.now.max(due + micros(late)), Event::Overdue { grant, generation, late });
    }

    fn refreshed(&mut self, pod: u32, grant: u32) {
        if self.holder(grant) == pod {
            self.watch(grant);
        } else if !self.watched[grant as usize] {
            // The token that the holder had has ended: its callers have it read the row.
            self.want_look(grant, Duration::ZERO);
        }
    }

    fn want_look(&mut self, grant: u32, late: Duration) {
        let pod = self.holder(grant);
        if !self.pods[pod as usize].is_alive {
            return self.watched[grant as usize] = false;
        }
        let this = &mut self.pods[pod as usize];
        this.overdue.push((grant, late));
        let life = this.life;
        if this.overdue.len() == 1 {
            // The process looks again and again; this is some time between two looks.
            let pause = look_pause(self.dice()).mul_f64(self.dice());
            self.at(self.now + micros(pause), Event::Look { pod, life });
        }
    }

    /// Reads the rows. What they say is known at once here, and not when the statement ends.
    fn look(&mut self, pod: u32) {
        let overdue = std::mem::take(&mut self.pods[pod as usize].overdue);
        for rows in overdue.chunks(LOOKUP_ROWS) {
            self.send(pod, Statement::Look { rows: rows.len() as u32 });
        }
        for (grant, late) in overdue {
            let generation = self.known[grant as usize].0;
            if self.table.generation[grant as usize] != generation || late.is_zero() {
                self.watch(grant);
            } else {
                let next = next_look(Some(late));
                let due = self.table.due_as_held(grant);
                self.at(self.now.max(due + micros(next)), Event::Overdue { grant, generation, late: next });
            }
        }
    }

    fn next_login(&mut self) {
        let mean = (CONSENT / 2) as f64 / self.plan.grants as f64;
        let pause = -mean * (1.0 - self.dice()).ln();
        self.at(self.now + pause as Micros, Event::Login);
    }

    // Time and chance.

    fn at(&mut self, at: Micros, event: Event) {
        self.number += 1;
        self.events.push(Scheduled { at, number: self.number, event });
    }

    fn is_alive(&self, pod: u32, life: u32) -> bool {
        let this = &self.pods[pod as usize];
        this.is_alive && this.life == life
    }

    fn is_running(&self, task: u32) -> bool {
        let Task { pod, life, .. } = self.tasks[task as usize];
        self.is_alive(pod, life)
    }

    fn reading(&self) -> ClockReading {
        reading(self.now)
    }

    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.now.unsigned_abs())
    }

    fn dice(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    fn pick(&mut self, of: usize) -> u32 {
        (self.dice() * of as f64) as u32
    }
}

fn reading(at: Micros) -> ClockReading {
    ClockReading { wall: wall(at), uptime: SignedDuration::from_micros(at), amazon: None }
}

impl Ord for Scheduled {
    /// The earliest is the greatest, for the heap.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Scheduled {}
