//! What was learned, for as long as the process lives.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;
use tokio::sync::{Notify, watch};

use super::bucket::{BucketName, BucketStatus, Buckets};
use super::gate::GateStatus;
use super::law::Seconds;
use super::published::COUNTED;
use super::room::Room;
use crate::domain::account::Region;
use crate::domain::clock::Clock;
use crate::telemetry::metrics::Metrics;

/// Clients whose buckets are remembered. A reload may switch to another client and back.
const MAX_CLIENTS: usize = 4;

/// What was learned, for as long as the process lives.
#[derive(Debug)]
pub struct Memory {
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    /// The buckets of each client, the latest last.
    clients: Mutex<Vec<(String, Arc<Buckets>)>>,
    pub(super) room: Arc<Room>,
    /// The uptime by which nothing may wait any more, once a shutdown has begun.
    pub(super) drain: watch::Sender<Option<SignedDuration>>,
    /// Notified when there is something to tell other processes: Amazon has refused a call, or a call waits.
    pub(super) news: Notify,
}

impl Memory {
    /// Nothing is known yet.
    pub fn new(clock: Clock, metrics: Arc<Metrics>) -> Self {
        let drain = watch::Sender::new(None);
        Self { clock, metrics, clients: Mutex::default(), room: Arc::default(), drain, news: Notify::new() }
    }

    /// Lets no call wait longer than `time` from now, because the process shuts down.
    pub fn drain(&self, time: Duration) {
        let time = SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX);
        self.drain.send_replace(Some(self.clock.uptime().saturating_add(time)));
    }

    /// What was learned about the current client's buckets.
    pub fn status(&self) -> Vec<BucketStatus> {
        let now = self.now();
        let buckets = self.current().map(|(_, buckets)| buckets);
        buckets.iter().flat_map(|buckets| buckets.all()).filter_map(|bucket| bucket.status(now)).collect()
    }

    /// What the current client's gates count, as far as something runs or waits.
    pub fn gates(&self) -> Vec<GateStatus> {
        self.current().map(|(_, buckets)| buckets.gates.status()).unwrap_or_default()
    }

    /// Whether calls of any bucket are paused, for each region.
    pub fn paused(&self) -> [bool; Region::ALL.len()] {
        let mut paused = [false; Region::ALL.len()];
        for bucket in self.status() {
            paused[bucket.name.region as usize] |= bucket.paused > 0.0;
        }
        paused
    }

    /// Sets the metrics about the buckets and the queue.
    pub fn show(&self) {
        let buckets = self.status();
        let wall = self.clock.now().as_duration().as_secs_f64();
        let series = buckets.iter().map(|bucket| {
            let BucketName { region, group, kind, .. } = bucket.name;
            let paused = if bucket.paused > 0.0 { wall + bucket.paused } else { 0.0 };
            let labels = [region.as_str(), group, kind.as_str()];
            (labels, bucket.rate, paused, bucket.waiting)
        });
        // Each series exists from the start.
        let families = Region::ALL.into_iter().flat_map(|region| COUNTED.map(|family| [region.as_str(), family]));
        let gates = self.gates().into_iter().filter(|gate| !gate.of_account);
        let running = gates.map(|gate| ([gate.region.as_str(), gate.family], gate.running));
        self.metrics.set_throttle(series, families.map(|labels| (labels, 0)).chain(running), self.room.taken().1);
    }

    /// The current client and its buckets.
    pub(super) fn current(&self) -> Option<(String, Arc<Buckets>)> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).last().cloned()
    }

    pub(super) fn buckets_of(&self, client: &str) -> Arc<Buckets> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let known = clients.iter().position(|(name, _)| name == client);
        let entry = match known {
            Some(index) => clients.remove(index),
            None => (client.to_owned(), Arc::new(Buckets::new(self.clock.clone()))),
        };
        let buckets = entry.1.clone();
        if clients.len() == MAX_CLIENTS {
            clients.remove(0);
        }
        clients.push(entry);
        buckets
    }

    /// The uptime in seconds.
    pub(super) fn now(&self) -> Seconds {
        self.clock.uptime().as_secs_f64()
    }
}
