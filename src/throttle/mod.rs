//! What Amazon's 429s teach: how fast calls may be sent, and which of them wait.
//!
//! Amazon limits each client by region and endpoint, publishes few of the limits, and changes them with its load.
//! A sidecar is the one place that sees all callers of a client. Calls of one client, region, API family and [`Kind`]
//! share a bucket. A [`law`] learns each bucket's rate from Amazon's refusals alone; a queue gives waiting calls their
//! turns, round robin between accounts. Where Amazon limits the number at a time, a gate counts them.
//!
//! [`Memory`] is what was learned, and lasts as long as the process; processes with a shared store [share](fleet) it.
//! [`Throttle`] is one configuration's view of it. A request asks [`Throttle::enter`] before it is sent and gets a
//! [`Pass`], to which it tells the response.
//!
//! The number of buckets is bounded by the table of API families. Until Amazon refuses a call, a bucket costs a request
//! a few atomic operations and no lock.

mod bucket;
pub mod fleet;
mod gate;
pub mod law;
mod memory;
mod pass;
mod published;
mod queue;
mod refusal;
mod room;
mod settings;

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode};

pub use bucket::{BucketName, BucketStatus};
pub use gate::{GateStatus, Job};
pub use memory::Memory;
pub use pass::{Ticket, Waited};
pub use settings::{BadFamilyMode, FamilyMode, Settings};

use crate::domain::account::Region;
use crate::domain::api_families::{self, Family};
use crate::domain::clock::Clock;
use crate::domain::throttle_mode::ThrottleMode;
use bucket::{Bucket, Buckets};
use gate::{Gate, Slot};
use law::Seconds;

/// The throttle of one configuration.
#[derive(Debug)]
pub struct Throttle {
    settings: Settings,
    /// What applies to each family, by its index.
    families: Vec<FamilyRow>,
    buckets: Arc<Buckets>,
    memory: Arc<Memory>,
}

/// What applies to the calls of one API family.
#[derive(Clone, Copy, Debug)]
struct FamilyRow {
    mode: ThrottleMode,
    /// Whether Amazon publishes a rate or a count for some of them.
    published: bool,
}

/// A call that is about to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The region whose host gets the call.
    pub region: Region,
    /// The API family of its path.
    pub family: &'static Family,
    /// Its kind.
    pub kind: Kind,
    /// What it counts, in calls.
    pub weight: f64,
    /// Its path.
    pub path: &'a str,
    /// The account, or the user of a call without an account: waiting calls of several take turns.
    pub account: &'a str,
    /// The account's own mode, if it has one.
    pub mode: Option<ThrottleMode>,
    /// The bytes that the call holds while it waits.
    pub bytes: usize,
}

/// Why a call is refused instead of sent.
#[derive(Clone, Copy, Debug)]
pub struct Throttled {
    /// The bucket.
    pub bucket: BucketName,
    /// When the call will probably be accepted.
    pub wait: Duration,
    /// Why it did not wait for that.
    pub reason: Reason,
}

/// Why a call does not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Amazon refuses calls, and the mode is `enforce`.
    Paused,
    /// As many run as Amazon allows at a time, and the mode is `enforce`.
    AtOnce,
    /// Its turn would come after `throttle.queue_timeout`.
    TooLate,
    /// As many calls or bytes wait as may.
    Full,
    /// adsidecar shuts down before its turn.
    Draining,
}

/// What the throttle says to a call.
#[derive(Debug)]
pub enum Entry<'a> {
    /// Send it now.
    Pass(Pass<'a>),
    /// Wait for its turn.
    Wait(Ticket<'a>),
    /// Refuse it.
    Refuse(Throttled),
}

/// The right to send a call once. The response is told to it, and says whether the call may be sent again.
#[derive(Debug)]
pub struct Pass<'a>(Option<Observed<'a>>);

/// A call that the throttle learns from.
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
    /// The gates that count the call, and its places behind them.
    gates: Vec<Arc<Gate>>,
    slots: Vec<Slot>,
}

impl Throttle {
    /// A view of `memory` for the client `client_id`.
    pub fn new(settings: Settings, client_id: &str, memory: &Arc<Memory>) -> Self {
        let row = |family: &Family| {
            let own = settings.families.iter().find(|own| own.family == family.name);
            FamilyRow { mode: own.map_or(settings.mode, |own| own.mode), published: published::concerns(family) }
        };
        let families = api_families::families().map(row).collect();
        Self { families, settings, buckets: memory.buckets_of(client_id), memory: memory.clone() }
    }

    /// The mode for calls of `family` by an account whose own mode is `account`.
    pub fn mode(&self, family: &Family, account: Option<ThrottleMode>) -> ThrottleMode {
        account.unwrap_or(self.families[family.index()].mode)
    }

    /// The clock, if `throttle.coalesce_polls` is on.
    pub fn coalesces_polls(&self) -> Option<Clock> {
        self.settings.coalesce_polls.then(|| self.memory.clock.clone())
    }

    /// Decides about a call of adsidecar's own: it always waits for its turn, unless the mode is `off`.
    pub fn enter_own<'a>(&'a self, call: Call<'a>) -> Entry<'a> {
        match self.mode(call.family, None) {
            ThrottleMode::Off => Entry::Pass(Pass(None)),
            _ => self.enter(Call { mode: Some(ThrottleMode::Queue), ..call }),
        }
    }

    /// Decides about a call that is about to be sent.
    pub fn enter<'a>(&'a self, call: Call<'a>) -> Entry<'a> {
        let family = self.families[call.family.index()];
        let mode = call.mode.unwrap_or(family.mode);
        if mode == ThrottleMode::Off {
            return Entry::Pass(Pass(None));
        }
        let name = if family.published { published::bucket(&call) } else { BucketName::of(&call) };
        let bucket = self.buckets.of(name);
        let pass = Pass(Some(Observed {
            throttle: self,
            bucket,
            call,
            mode,
            epoch: bucket.epoch(),
            arrived: self.memory.now(),
            waited: None,
            status: 0,
            refused: false,
            again: 0,
            gates: Vec::new(),
            slots: Vec::new(),
        }));
        if family.published {
            return pass.enter_gates();
        }
        if bucket.epoch() == 0 || mode == ThrottleMode::Observe {
            return Entry::Pass(pass);
        }
        pass.enter(false)
    }
}

impl Pass<'_> {
    /// Learns from the response. It is called once for each response from Amazon, whoever gets it.
    pub fn responded(&mut self, status: StatusCode, headers: &HeaderMap) {
        let Some(observed) = &mut self.0 else { return };
        (observed.refused, observed.status) = (false, status.as_u16());
        if may_refuse(status) && observed.is_refusal(status, headers) {
            return;
        }
        observed.bucket.accepted(observed.throttle.memory.now());
    }
}

/// Whether a response with this status may say that there were too many calls.
fn may_refuse(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::PAYMENT_REQUIRED | StatusCode::SERVICE_UNAVAILABLE)
}

impl<'a> Call<'a> {
    /// The call `method path` of `account`, with weight and kind by its path.
    pub fn new(region: Region, family: &'static Family, method: &Method, path: &'a str, account: &'a str) -> Self {
        let (kind, weight) = (Kind::of(method, path), weight(path));
        Self { region, family, kind, weight, path, account, mode: None, bytes: 0 }
    }

    /// The bucket of the call.
    pub fn bucket(&self) -> BucketName {
        published::bucket(self)
    }
}

/// The kinds of calls of one API family. Amazon limits each endpoint on its own, so calls of different kinds share no
/// bucket: a storm of polls never holds back the creation of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Reads or lists.
    Read,
    /// Changes something.
    Write,
    /// Starts an asynchronous job: a report, an export, an AMC workflow run. Amazon limits these most.
    Create,
    /// Asks for the state of such a job.
    Poll,
}

impl Kind {
    /// Every kind, in the order of the discriminants.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Create, Self::Poll];

    /// The kind as the metrics' label, and in `X-Adsidecar-Throttle`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Create => "create",
            Self::Poll => "poll",
        }
    }

    /// The kind of the call `method path`. An unexpected path gets a kind that is merely less precise: it decides which
    /// calls wait for each other, never whether one is allowed.
    pub fn of(method: &Method, path: &str) -> Self {
        let mut segments = segments(path).filter(|segment| !segment.is_empty());
        let mut first = || segments.next().unwrap_or_default();
        let (a, b, c, d) = (first(), first(), first(), first());
        let fifth = segments.next();
        let last = segments.last().or(fifth);
        let last = last.unwrap_or_else(|| [d, c, b].into_iter().find(|segment| !segment.is_empty()).unwrap_or(a));
        let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
        let job = match (a, b) {
            (b"reporting", b"reports") => job(reads, !c.is_empty()),
            (b"exports", _) => job(reads, !b.is_empty()),
            (_, b"export") if c.is_empty() => job(reads, false),
            (b"accounts", _) if c == b"dsp" && d == b"reports" => job(reads, fifth.is_some()),
            (b"amc", b"reporting") if d == b"workflowExecutions" => job(reads, fifth.is_some()),
            (b"adsApi", b"v1") if d == b"reports" => match c {
                b"create" => Some(Self::Create),
                b"retrieve" => Some(Self::Poll),
                _ => None,
            },
            (b"mmm", _) | (b"insights", b"brandMetrics") | (b"attribution", _)
                if last == b"report" || c == b"reports" =>
            {
                job(reads, !d.is_empty())
            }
            (b"v2", b"reports" | b"snapshots") => job(reads, !c.is_empty()),
            (b"v2", _) if matches!(last, b"report" | b"snapshot") => job(reads, false),
            _ => None,
        };
        let reading_post = || {
            *method == Method::POST
                && (matches!(last, b"list" | b"query" | b"search" | b"count" | b"recommendations" | b"forecasts")
                    || (a, b) == (b"adsApi", b"v1") && matches!(c, b"query" | b"retrieve"))
        };
        match job {
            Some(kind) => kind,
            None if reads || reading_post() => Self::Read,
            None => Self::Write,
        }
    }
}

/// The kind of a call to a collection of jobs, or to `one` of them. A job is not listed, and changing one is rare.
fn job(reads: bool, one: bool) -> Option<Kind> {
    match (reads, one) {
        (true, true) => Some(Kind::Poll),
        (false, false) => Some(Kind::Create),
        _ => None,
    }
}

/// What a call counts in its bucket: lists of the "extended" representation count five times (Amazon's rate-limiting
/// page).
fn weight(path: &str) -> f64 {
    if segments(path).any(|segment| segment == b"extended") { 5.0 } else { 1.0 }
}

/// The segments of a path. As bytes, because every request asks, and a search for characters costs more.
fn segments(path: &str) -> impl Iterator<Item = &[u8]> {
    path.as_bytes().split(|byte| *byte == b'/')
}

#[cfg(test)]
mod tests;
