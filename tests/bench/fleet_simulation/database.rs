//! The model of PostgreSQL: the table as plain arrays, what each statement of the store does to it, and a server whose
//! cores serve statements in the order in which they arrive.
//!
//! What the statements do is what `src/store/postgres` has in SQL. When a refresh is due, how long a lease lasts and
//! what a poll reads is asked of the product.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use adsidecar::auth::tokens::brake::PROBE;
use adsidecar::domain::account::UserId;
use adsidecar::domain::grant::{Access, AccessToken, Grant, RefreshPolicy, RefreshToken};
use adsidecar::store::{DUE_AGAIN, LEASE, due_at};
use jiff::Timestamp;

use super::calibration::{Calibration, Cost};

/// Simulated time in microseconds since the start.
pub type Micros = i64;
pub const SECOND: Micros = 1_000_000;
/// The lifetime of a token of Login with Amazon.
pub const LIFETIME: Micros = 3600 * SECOND;
const EPOCH: i64 = 1_790_000_000;
const NOBODY: u32 = u32::MAX;

pub fn micros(duration: std::time::Duration) -> Micros {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// The wall clock at a simulated time.
pub fn wall(at: Micros) -> Timestamp {
    Timestamp::from_microsecond(EPOCH * SECOND + at).expect("a time within range")
}

pub fn from_wall(at: Timestamp) -> Micros {
    at.as_microsecond() - EPOCH * SECOND
}

/// A statement of a pod. `task` is the refresh that it belongs to.
#[derive(Clone, Copy, Debug)]
pub enum Statement {
    Start,
    Poll { rows: u32, head: i64 },
    Claim { limit: u32 },
    Lease { task: u32 },
    Write { task: u32 },
    Release { task: u32 },
    Look { rows: u32 },
    Probe { task: u32 },
    SetBrake { wait: Micros },
    EndBrake,
    CountPods,
    Note,
    Login { grant: u32 },
}

/// What statements are counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Start,
    Poll,
    Claim,
    Lease,
    Write,
    Release,
    Look,
    Brake,
    Note,
    Login,
}

impl Kind {
    pub const COUNT: usize = 10;
    pub const NAMES: [&'static str; Self::COUNT] =
        ["start", "poll", "claim", "lease", "write", "release", "look", "brake", "note", "login"];
    /// The statements that refreshes cost.
    pub const OF_REFRESHES: [Self; 6] = [Self::Claim, Self::Lease, Self::Write, Self::Release, Self::Look, Self::Brake];
}

impl Statement {
    pub fn kind(self) -> Kind {
        match self {
            Self::Start => Kind::Start,
            Self::Poll { .. } => Kind::Poll,
            Self::Claim { .. } => Kind::Claim,
            Self::Lease { .. } => Kind::Lease,
            Self::Write { .. } => Kind::Write,
            Self::Release { .. } => Kind::Release,
            Self::Look { .. } => Kind::Look,
            Self::Probe { .. } | Self::SetBrake { .. } | Self::EndBrake | Self::CountPods => Kind::Brake,
            Self::Note => Kind::Note,
            Self::Login { .. } => Kind::Login,
        }
    }

    /// Statements that the model counts as one: `claim_probe` asks twice if another process probes, and a start asks
    /// for tables, notes and first rows (`Postgres::prepare`).
    pub fn number(self) -> u64 {
        match self {
            Self::Probe { .. } => 2,
            Self::Start => 7,
            _ => 1,
        }
    }
}

/// The costs of the statements, by what was measured.
pub struct Costs {
    start: Cost,
    poll: Cost,
    claim: Cost,
    vain: Cost,
    lease: Cost,
    write: Cost,
    release: Cost,
    look: Cost,
    probe: Cost,
    brake: Cost,
    count: Cost,
    note: Cost,
}

impl Costs {
    pub fn new(measured: &Calibration) -> Self {
        let cost = |name: &str| *measured.statements.get(name).unwrap_or_else(|| panic!("{name} was not measured"));
        Self {
            start: cost("start"),
            poll: cost("poll"),
            claim: cost("claim"),
            vain: cost("claim in vain"),
            lease: cost("lease"),
            write: cost("write"),
            release: cost("release"),
            look: cost("look"),
            probe: cost("probe"),
            brake: cost("brake"),
            count: cost("count"),
            note: cost("note"),
        }
    }

    /// The cost of a statement that returns or writes `rows` rows.
    pub fn of(&self, statement: Statement, rows: u32) -> Cost {
        match statement {
            Statement::Start => self.start,
            Statement::Poll { .. } => self.poll,
            Statement::Claim { .. } if rows == 0 => self.vain,
            Statement::Claim { .. } => self.claim,
            Statement::Lease { .. } => self.lease,
            // A login is the same statement.
            Statement::Write { .. } | Statement::Login { .. } => self.write,
            Statement::Release { .. } => self.release,
            Statement::Look { .. } => self.look,
            Statement::Probe { .. } => self.probe,
            Statement::SetBrake { .. } | Statement::EndBrake => self.brake,
            Statement::CountPods => self.count,
            Statement::Note => self.note,
        }
    }
}

/// A claimed refresh.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    pub grant: u32,
    pub generation: u32,
    /// When it was due.
    pub due: Micros,
    /// Another process ended during it.
    pub interrupted: bool,
}

/// `adsidecar_grants` and the notes.
pub struct Table {
    policy: RefreshPolicy,
    /// Reused to ask the product when a grant is due.
    template: Grant,
    pub users: Vec<UserId>,
    pub due: Vec<Micros>,
    pub expires: Vec<Micros>,
    pub generation: Vec<u32>,
    pub attempts: Vec<u16>,
    retry_at: Vec<Micros>,
    lease_owner: Vec<u32>,
    lease_until: Vec<Micros>,
    /// The index of `due_at`. An entry whose time is no longer the row's is void.
    index: BinaryHeap<Reverse<(Micros, u32)>>,
    /// The number of the last news: of the last change that polls read.
    pub news: i64,
    /// Until when nobody may call Login with Amazon.
    pub brake: Option<Micros>,
    /// The known-bad variant: claims lock nothing, and everybody gets the lease.
    pub unlocked: bool,
    /// The known-bad variant: refreshes are news.
    pub told: bool,
}

impl Table {
    /// A table of grants whose tokens have all expired: the fleet was down.
    pub fn new(grants: usize, policy: RefreshPolicy) -> Self {
        let token = |kind: &str| format!("{kind}|x");
        let template = Grant {
            refresh_token: RefreshToken::new(token("Atzr")).expect("a token"),
            previous: None,
            access: Some(Access { token: AccessToken::new(token("Atza")).expect("a token"), expires_at: wall(0) }),
            updated_at: wall(0),
            consented_at: None,
            used_at: None,
            scope: None,
            generation: 1,
        };
        let mut table = Self {
            policy,
            template,
            users: (0..grants).map(|number| format!("user-{number}").parse().expect("a user id")).collect(),
            due: vec![0; grants],
            expires: vec![-LIFETIME; grants],
            generation: vec![1; grants],
            attempts: vec![0; grants],
            retry_at: vec![Micros::MIN; grants],
            lease_owner: vec![NOBODY; grants],
            lease_until: vec![Micros::MIN; grants],
            index: BinaryHeap::with_capacity(2 * grants),
            news: 0,
            brake: None,
            unlocked: false,
            told: false,
        };
        for grant in 0..grants as u32 {
            let due = table.due_of(grant, -2 * LIFETIME);
            table.set_due(grant, due);
        }
        table
    }

    /// When a grant is due whose token was requested at `since`, as the product says.
    fn due_of(&mut self, grant: u32, since: Micros) -> Micros {
        let at = grant as usize;
        self.template.generation = self.generation[at].into();
        self.template.updated_at = wall(since);
        if let Some(access) = &mut self.template.access {
            access.expires_at = wall(since + LIFETIME);
        }
        due_at(self.policy, &self.users[at], &self.template).map_or(Micros::MAX, from_wall)
    }

    /// When the current token of a grant is to be refreshed, as whoever holds it knows.
    pub fn due_as_held(&mut self, grant: u32) -> Micros {
        let since = self.expires[grant as usize] - LIFETIME;
        self.due_of(grant, since)
    }

    /// The grant with a token that was requested at `since`.
    pub fn grant(&mut self, grant: u32) -> Grant {
        let since = self.expires[grant as usize] - LIFETIME;
        self.due_of(grant, since);
        self.template.clone()
    }

    fn set_due(&mut self, grant: u32, due: Micros) {
        self.due[grant as usize] = due;
        if due < Micros::MAX {
            self.index.push(Reverse((due, grant)));
        }
    }

    /// When the next background refresh is due.
    pub fn next_due(&mut self) -> Option<Micros> {
        while let Some(&Reverse((due, grant))) = self.index.peek() {
            if self.due[grant as usize] == due {
                return Some(due);
            }
            self.index.pop();
        }
        None
    }

    /// `Postgres::claim_due`.
    pub fn claim(&mut self, pod: u32, limit: u32, now: Micros) -> Vec<Claim> {
        let (mut claimed, mut passed) = (Vec::new(), Vec::new());
        while claimed.len() < limit as usize && self.next_due().is_some_and(|due| due <= now) {
            let Some(Reverse(entry @ (_, grant))) = self.index.pop() else { break };
            let (at, due) = (grant as usize, entry.0);
            if self.unlocked {
                passed.push(entry);
            } else if self.lease_until[at] >= now || self.retry_at[at] > now {
                passed.push(entry);
                continue;
            } else {
                self.set_due(grant, now + micros(DUE_AGAIN));
            }
            let interrupted = self.lease_owner[at] != NOBODY && self.lease_owner[at] != pod;
            (self.lease_owner[at], self.lease_until[at]) = (pod, now + micros(LEASE));
            claimed.push(Claim { grant, generation: self.generation[at], due, interrupted });
        }
        self.index.extend(passed.into_iter().map(Reverse));
        claimed
    }

    /// `Postgres::acquire_lease`.
    pub fn lease(&mut self, pod: u32, grant: u32, generation: u32, now: Micros) -> bool {
        let at = grant as usize;
        let is_free = self.lease_until[at] < now || self.lease_owner[at] == pod || self.unlocked;
        let is_granted = self.generation[at] == generation && is_free;
        if is_granted {
            (self.lease_owner[at], self.lease_until[at]) = (pod, now + micros(LEASE));
        }
        is_granted
    }

    /// `Postgres::put_refreshed`, and a login if `generation` is `None`. Returns whether it was written.
    pub fn write(&mut self, grant: u32, generation: Option<u32>, since: Micros, now: Micros) -> bool {
        let at = grant as usize;
        if generation.is_some_and(|generation| self.generation[at] != generation) {
            return false;
        }
        self.generation[at] += 1;
        // As `adsidecar_write` has it. Each refresh here was due: the background makes it.
        self.news += i64::from(generation.is_none() || self.retry_at[at] > now || self.told);
        self.expires[at] = since + LIFETIME;
        (self.lease_owner[at], self.lease_until[at]) = (NOBODY, Micros::MIN);
        (self.attempts[at], self.retry_at[at]) = (0, Micros::MIN);
        let due = self.due_of(grant, since);
        self.set_due(grant, due);
        true
    }

    /// `Postgres::release_lease` after a failure.
    pub fn release(&mut self, pod: u32, grant: u32, generation: u32, retry: Option<(u16, Micros)>) {
        let at = grant as usize;
        if self.lease_owner[at] != pod || self.generation[at] != generation {
            return;
        }
        (self.lease_owner[at], self.lease_until[at]) = (NOBODY, Micros::MIN);
        if let Some((attempts, retry_at)) = retry {
            (self.attempts[at], self.retry_at[at]) = (attempts, retry_at);
            self.set_due(grant, retry_at);
        }
    }

    /// `Postgres::claim_probe`: how long the caller has to wait.
    pub fn probe(&mut self, now: Micros) -> Option<Micros> {
        let until = self.brake?;
        if until <= now {
            self.brake = Some(now + micros(PROBE));
            return None;
        }
        Some(until - now)
    }

    /// `Postgres::set_brake`.
    pub fn set_brake(&mut self, wait: Micros, now: Micros) {
        self.brake = Some(self.brake.map_or(now + wait, |until| until.max(now + wait)));
    }
}

/// Cores that serve statements in the order in which they arrive.
pub struct Server {
    cores: usize,
    busy: usize,
    waiting: VecDeque<Sent>,
}

/// A statement on its way, and the connection that it came over.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub pod: u32,
    /// The number of starts of the pod: answers to one that was killed reach nobody.
    pub life: u32,
    pub bulk: bool,
    /// When the pod wanted to send it.
    pub since: Micros,
    pub statement: Statement,
}

impl Server {
    pub fn new(cores: usize) -> Self {
        Self { cores, busy: 0, waiting: VecDeque::new() }
    }

    /// Takes a statement. Returns it if it begins at once.
    pub fn arrive(&mut self, sent: Sent) -> Option<Sent> {
        if self.busy < self.cores {
            self.busy += 1;
            return Some(sent);
        }
        self.waiting.push_back(sent);
        None
    }

    /// Ends a statement. Returns the one that begins.
    pub fn end(&mut self) -> Option<Sent> {
        let next = self.waiting.pop_front();
        if next.is_none() {
            self.busy -= 1;
        }
        next
    }
}
