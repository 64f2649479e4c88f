//! What a run is counted by.

use super::calibration::Cost;
use super::database::{Kind, Micros, SECOND, Statement};

pub const MINUTE: Micros = 60 * SECOND;
/// A refresh that has been due for so long is one of a backlog.
const BACKLOG: Micros = 30 * SECOND;
/// `statement_timeout` of the connection that requests wait for (`src/store/postgres/connection.rs`).
const TIMEOUT: Micros = 1_800_000;

/// A minute, or several.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    pub statements: [u64; Kind::COUNT],
    /// Rows read or written, those that polls read, and bytes to the database and back.
    pub rows: u64,
    pub polled: u64,
    pub bytes: f64,
    /// Microseconds of the database's cores.
    pub busy: f64,
    /// Token calls that Login with Amazon answered, and those that it refused to take.
    pub calls: u64,
    pub refused: u64,
    /// Refreshes stored.
    pub stored: u64,
    /// The longest wait for the database.
    pub longest: Micros,
}

pub struct Figures {
    pub minutes: Vec<Counts>,
    pods: usize,
    /// When pods were killed, and how many are left.
    killed: Option<(Micros, usize)>,
    outage: (Micros, Micros),
    /// When the backlog of the start, and that of the outage, was gone.
    pub started: Option<Micros>,
    pub recovered: Option<Micros>,
    /// Refresh tokens sent again that had been used: without need, and because a pod was killed with the answer.
    pub duplicates: u64,
    pub repeated: u64,
    /// Leases that somebody else had, and refreshes that a login came before.
    pub denied: u64,
    pub superseded: u64,
    /// Statements that waited for longer than `statement_timeout`.
    pub timeouts: u64,
    /// Refreshes by the seconds that they came late, in calm times.
    pub lateness: Vec<u64>,
    /// Grants whose token expired in calm times.
    pub expired: u64,
    /// After how long each pod heard of each login or logout.
    heard: Vec<Micros>,
    /// When the brake was first released after the outage, and the calls in each second since then.
    released: Option<Micros>,
    pub admitted: [u64; 10],
    /// When the first call was made after the cold start, and the calls in each second since then.
    first_call: Option<Micros>,
    pub first_calls: [u64; 10],
}

impl Figures {
    pub fn new(end: Micros, pods: usize, outage: (Micros, Micros)) -> Self {
        Self {
            minutes: vec![Counts::default(); (end / MINUTE + 1) as usize],
            pods,
            killed: None,
            outage,
            started: None,
            recovered: None,
            duplicates: 0,
            repeated: 0,
            denied: 0,
            superseded: 0,
            timeouts: 0,
            lateness: vec![0; 7200],
            expired: 0,
            heard: Vec::new(),
            released: None,
            admitted: [0; 10],
            first_call: None,
            first_calls: [0; 10],
        }
    }

    fn minute(&mut self, now: Micros) -> &mut Counts {
        &mut self.minutes[(now / MINUTE) as usize]
    }

    /// A statement that takes `takes` microseconds of the server after it waited for `waited`.
    pub fn statement(&mut self, now: Micros, statement: Statement, rows: u32, cost: &Cost, takes: f64, waited: Micros) {
        let minute = self.minute(now);
        minute.statements[statement.kind() as usize] += statement.number();
        minute.rows += u64::from(rows);
        minute.polled += u64::from(rows) * u64::from(statement.kind() == Kind::Poll);
        minute.bytes += cost.sent + cost.received + cost.received_per_row * f64::from(rows);
        minute.busy += takes;
        let whole = waited + takes as Micros;
        minute.longest = minute.longest.max(whole);
        self.timeouts += u64::from(whole > TIMEOUT);
    }

    /// A poll has seen when the next refresh is due.
    pub fn seen_due(&mut self, now: Micros, due: Option<Micros>) {
        if due.is_some_and(|due| due <= now - BACKLOG) || now < BACKLOG {
            return;
        }
        self.started.get_or_insert(now);
        if now >= self.outage.1 {
            self.recovered.get_or_insert(now);
        }
    }

    /// The brake is released.
    pub fn released(&mut self, now: Micros) {
        if now >= self.outage.1 {
            self.released.get_or_insert(now);
        }
    }

    pub fn called(&mut self, now: Micros, works: bool, is_repeated: bool, interrupted: bool) {
        let first = *self.first_call.get_or_insert(now);
        if let Some(second) = usize::try_from((now - first) / SECOND).ok().and_then(|at| self.first_calls.get_mut(at)) {
            *second += 1;
        }
        let since = self.released.and_then(|released| usize::try_from((now - released) / SECOND).ok());
        if let Some(second) = since.and_then(|second| self.admitted.get_mut(second)) {
            *second += 1;
        }
        let minute = self.minute(now);
        minute.calls += u64::from(works);
        minute.refused += u64::from(!works);
        self.repeated += u64::from(is_repeated && interrupted);
        self.duplicates += u64::from(is_repeated && !interrupted);
    }

    /// A refresh that was due at `due` is stored, for a token that expires at `expires`.
    pub fn stored(&mut self, now: Micros, due: Micros, expires: Micros) {
        self.minute(now).stored += 1;
        let is_troubled = due >= self.outage.0 - MINUTE && self.recovered.is_none_or(|end| due <= end + MINUTE);
        if self.started.is_some_and(|started| due > started) && !is_troubled {
            let late = ((now - due) / SECOND).max(0) as usize;
            let last = self.lateness.len() - 1;
            self.lateness[late.min(last)] += 1;
            self.expired += u64::from(now > expires);
        }
    }

    pub fn killed(&mut self, now: Micros, left: usize) {
        self.killed = Some((now, left));
    }

    /// A pod has polled after a login or logout.
    pub fn heard(&mut self, after: Micros) {
        self.heard.push(after);
    }

    /// The sum over the minutes that begin in a span, and the seconds that these are.
    pub fn sum(&self, from: Micros, to: Micros) -> (Counts, f64) {
        let first = (from / MINUTE) as usize;
        let last = ((to + MINUTE - 1) / MINUTE).max(from / MINUTE + 1) as usize;
        let minutes = &self.minutes[first..last.min(self.minutes.len() - 1)];
        let sum = minutes.iter().fold(Counts::default(), |mut sum, minute| {
            sum.statements.iter_mut().zip(minute.statements).for_each(|(sum, number)| *sum += number);
            sum.rows += minute.rows;
            sum.polled += minute.polled;
            sum.bytes += minute.bytes;
            sum.busy += minute.busy;
            sum.calls += minute.calls;
            sum.refused += minute.refused;
            sum.stored += minute.stored;
            sum.longest = sum.longest.max(minute.longest);
            sum
        });
        (sum, 60.0 * minutes.len() as f64)
    }

    /// The pods that live at a time.
    pub fn pods_at(&self, at: Micros) -> usize {
        self.killed.filter(|(killed, _)| *killed <= at).map_or(self.pods, |(_, left)| left)
    }

    /// The refreshes in calm times.
    pub fn calm(&self) -> u64 {
        self.lateness.iter().sum()
    }

    /// The lateness in seconds of a share of the refreshes in calm times.
    pub fn late(&self, share: f64) -> usize {
        let all: u64 = self.lateness.iter().sum();
        let mut seen = 0;
        self.lateness
            .iter()
            .position(|number| {
                seen += number;
                seen as f64 >= share * all as f64
            })
            .unwrap_or_default()
    }

    /// The seconds after which a share of the pods had heard of a login or logout.
    pub fn heard_after(&self, share: f64) -> f64 {
        let mut heard = self.heard.clone();
        heard.sort_unstable();
        let at = ((heard.len() as f64 * share) as usize).min(heard.len().saturating_sub(1));
        heard.get(at).map_or(0.0, |after| *after as f64 / SECOND as f64)
    }
}

impl Counts {
    pub fn of(&self, kind: Kind) -> u64 {
        self.statements[kind as usize]
    }

    pub fn all(&self) -> u64 {
        self.statements.iter().sum()
    }

    /// Statements for each refresh that was stored.
    pub fn per_refresh(&self) -> f64 {
        Kind::OF_REFRESHES.iter().map(|kind| self.of(*kind)).sum::<u64>() as f64 / self.stored.max(1) as f64
    }
}
