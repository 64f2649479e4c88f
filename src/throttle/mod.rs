//! What Amazon's 429s teach: how fast calls may be sent, and which of them wait.
//!
//! Amazon limits each client by region and endpoint, does not publish the limits, and changes them with its load. A
//! sidecar is the one place that sees all callers of a client. Calls of one client, region, API family and [`Kind`]
//! share a bucket. A [`law`] learns each bucket's rate from Amazon's refusals alone; a queue gives waiting calls their
//! turns, round robin between accounts.
//!
//! [`Memory`] is what was learned, and lasts as long as the process. [`Throttle`] is one configuration's view of it. A
//! request asks [`Throttle::enter`] before it is sent and gets a [`Pass`], to which it tells the response.
//!
//! The number of buckets is bounded by the table of API families. Until Amazon refuses a call, a bucket costs a request
//! a few atomic operations and no lock.

mod bucket;
mod classify;
pub mod law;
mod pass;
mod queue;
mod room;

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;
use tokio::sync::watch;

pub use bucket::{BucketName, BucketStatus};
pub use classify::Kind;
pub use pass::{Pass, Ticket, Waited};

use crate::domain::account::Region;
use crate::domain::api_families::{self, Family};
use crate::domain::clock::Clock;
use crate::domain::throttle_mode::ThrottleMode;
use crate::telemetry::metrics::Metrics;
use bucket::Bucket;
use law::Seconds;
use room::Room;

/// Clients whose buckets are remembered. A reload may switch to another client and back.
const MAX_CLIENTS: usize = 4;

/// Limits that Amazon has published for a whole family, in calls per second: the learned rate never exceeds them.
const PUBLISHED: [(&str, f64); 1] = [("data_provider", 100.0)];

/// `[throttle]`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `throttle.mode`.
    pub mode: ThrottleMode,
    /// `throttle.queue_timeout`: the longest wait.
    pub queue_timeout: Duration,
    /// `throttle.max_waiting`: most calls that wait at once.
    pub max_waiting: usize,
    /// `throttle.max_waiting_bytes`: most bytes that waiting calls hold.
    pub max_waiting_bytes: usize,
    /// `throttle.coalesce_polls`.
    pub coalesce_polls: bool,
    /// `throttle.families`: the modes of single API families.
    pub families: Vec<FamilyMode>,
}

/// `family=mode`: the mode of one API family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FamilyMode {
    /// The family's name.
    pub family: &'static str,
    /// Its mode.
    pub mode: ThrottleMode,
}

/// The text is not `family=mode`. The message says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadFamilyMode(&'static str);

impl FromStr for FamilyMode {
    type Err = BadFamilyMode;

    fn from_str(text: &str) -> Result<Self, BadFamilyMode> {
        let (name, mode) =
            text.split_once('=').ok_or(BadFamilyMode("entry is not family=mode: write reporting=queue"))?;
        let family = api_families::families().find(|family| family.name == name.trim());
        let family = family.ok_or(BadFamilyMode("entry names no API family: see the table in config/README.md"))?.name;
        let mode = mode.trim().parse();
        let mode =
            mode.map_err(|_| BadFamilyMode("entry has no mode: write off, observe, enforce or queue behind the ="))?;
        Ok(Self { family, mode })
    }
}

impl fmt::Display for FamilyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.family, self.mode.as_str())
    }
}

/// What was learned, for as long as the process lives.
#[derive(Debug)]
pub struct Memory {
    clock: Clock,
    metrics: Arc<Metrics>,
    /// The buckets of each client, the latest last.
    clients: Mutex<Vec<(String, Arc<Buckets>)>>,
    room: Arc<Room>,
    /// The uptime by which nothing may wait any more, once a shutdown has begun.
    drain: watch::Sender<Option<SignedDuration>>,
}

/// The buckets of one client, by family, region and kind.
#[derive(Debug)]
struct Buckets(Box<[OnceLock<Arc<Bucket>>]>);

/// The throttle of one configuration.
#[derive(Debug)]
pub struct Throttle {
    settings: Settings,
    /// The mode of each family, by its index.
    modes: Vec<ThrottleMode>,
    buckets: Arc<Buckets>,
    memory: Arc<Memory>,
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
    /// The account, or the user of a call without an account: waiting calls of several take turns.
    pub account: &'a str,
    /// The account's own mode, if it has one.
    pub mode: Option<ThrottleMode>,
    /// The bytes that the call holds while it waits.
    pub bytes: usize,
}

impl<'a> Call<'a> {
    /// The call `method path` of `account`, with weight and kind by its path.
    pub fn new(region: Region, family: &'static Family, method: &http::Method, path: &str, account: &'a str) -> Self {
        let (kind, weight) = (Kind::of(method, path), classify::weight(path));
        Self { region, family, kind, weight, account, mode: None, bytes: 0 }
    }
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

impl Memory {
    /// Nothing is known yet.
    pub fn new(clock: Clock, metrics: Arc<Metrics>) -> Self {
        let drain = watch::Sender::new(None);
        Self { clock, metrics, clients: Mutex::default(), room: Arc::default(), drain }
    }

    /// Lets no call wait longer than `time` from now, because the process shuts down.
    pub fn drain(&self, time: Duration) {
        let time = SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX);
        self.drain.send_replace(Some(self.clock.uptime().saturating_add(time)));
    }

    /// What was learned about the current client's buckets.
    pub fn status(&self) -> Vec<BucketStatus> {
        let now = self.now();
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = clients.last().map(|(_, buckets)| buckets.clone());
        drop(clients);
        let buckets = buckets.iter().flat_map(|buckets| buckets.0.iter().filter_map(OnceLock::get));
        buckets.filter_map(|bucket| bucket.status(now)).collect()
    }

    /// Sets the metrics about the buckets and the queue.
    pub fn show(&self) {
        let buckets = self.status();
        let wall = self.clock.now().as_duration().as_secs_f64();
        let series = buckets.iter().map(|bucket| {
            let BucketName { region, family, kind } = bucket.name;
            let paused = if bucket.paused > 0.0 { wall + bucket.paused } else { 0.0 };
            let labels = [region.as_str(), family.name, kind.as_str()];
            (labels, bucket.rate, paused, bucket.waiting)
        });
        self.metrics.set_throttle(series, self.room.taken().1);
    }

    fn buckets_of(&self, client: &str) -> Arc<Buckets> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let known = clients.iter().position(|(name, _)| name == client);
        let entry = match known {
            Some(index) => clients.remove(index),
            None => {
                let count = api_families::COUNT * Region::ALL.len() * Kind::ALL.len();
                let buckets = Buckets((0..count).map(|_| OnceLock::new()).collect());
                (client.to_owned(), Arc::new(buckets))
            }
        };
        let buckets = entry.1.clone();
        if clients.len() == MAX_CLIENTS {
            clients.remove(0);
        }
        clients.push(entry);
        buckets
    }

    /// The uptime in seconds.
    fn now(&self) -> Seconds {
        self.clock.uptime().as_secs_f64()
    }
}

impl Buckets {
    fn of(&self, name: BucketName) -> &Arc<Bucket> {
        let region = Region::ALL.len() * name.family.index() + name.region as usize;
        self.0[Kind::ALL.len() * region + name.kind as usize].get_or_init(|| Arc::new(Bucket::new(name)))
    }
}

impl Throttle {
    /// A view of `memory` for the client `client_id`.
    pub fn new(settings: Settings, client_id: &str, memory: &Arc<Memory>) -> Self {
        let mode_of = |family: &Family| {
            let own = settings.families.iter().find(|own| own.family == family.name);
            own.map_or(settings.mode, |own| own.mode)
        };
        let modes = api_families::families().map(mode_of).collect();
        Self { modes, settings, buckets: memory.buckets_of(client_id), memory: memory.clone() }
    }

    /// The mode for calls of `family` by an account whose own mode is `account`.
    pub fn mode(&self, family: &Family, account: Option<ThrottleMode>) -> ThrottleMode {
        account.unwrap_or(self.modes[family.index()])
    }

    /// The clock, if `throttle.coalesce_polls` is on.
    pub fn coalesces_polls(&self) -> Option<Clock> {
        self.settings.coalesce_polls.then(|| self.memory.clock.clone())
    }

    /// Decides about a call that is about to be sent.
    pub fn enter<'a>(&'a self, call: Call<'a>) -> Entry<'a> {
        let mode = self.mode(call.family, call.mode);
        if mode == ThrottleMode::Off {
            return Entry::Pass(Pass::unobserved());
        }
        let bucket = self.buckets.of(BucketName { region: call.region, family: call.family, kind: call.kind });
        let pass = Pass::new(self, bucket, call, mode);
        if bucket.epoch() == 0 || mode == ThrottleMode::Observe {
            return Entry::Pass(pass);
        }
        pass.enter(false)
    }

    fn refuse(bucket: BucketName, wait: Seconds, reason: Reason) -> Throttled {
        // More than a pause can be only behind many calls; and the estimate ends there.
        let wait = Duration::from_secs_f64(wait.clamp(0.001, law::MAX_PAUSE));
        Throttled { bucket, wait, reason }
    }
}

/// The published limit of `family`, in calls per second.
fn published(family: &Family) -> Option<f64> {
    PUBLISHED.iter().find(|(name, _)| *name == family.name).map(|(_, limit)| *limit)
}

#[cfg(test)]
mod tests;
