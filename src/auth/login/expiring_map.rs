//! A bounded map of things that are valid for ten minutes, by the hash of the secret that names each.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Lifetime of a state and of a grant that needs confirmation.
pub const TEN_MINUTES: Duration = Duration::from_secs(600);
/// Maximum number of entries; the newest evicts the oldest.
const MAX_PENDING: usize = 1000;

/// The SHA-256 of `text` in hexadecimal, stored in place of a secret that only has to be recognized.
pub(super) fn hash(text: &str) -> String {
    format!("{:x}", Sha256::digest(text.as_bytes()))
}

/// A map whose entries can be taken once, within ten minutes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ExpiringMap<T> {
    taken_in: u64,
    by_hash: HashMap<String, (u64, Timestamp, T)>,
}

impl<T> Default for ExpiringMap<T> {
    fn default() -> Self {
        Self { taken_in: 0, by_hash: HashMap::new() }
    }
}

impl<T> ExpiringMap<T> {
    /// Inserts `value` and returns the evicted oldest entry if the map was full.
    pub(super) fn insert(&mut self, hash: String, value: T, now: Timestamp) -> Option<T> {
        let full = self.by_hash.len() >= MAX_PENDING;
        let oldest = || self.by_hash.iter().min_by_key(|(_, (order, ..))| *order).map(|(hash, _)| hash.clone());
        let evicted = full.then(oldest).flatten().and_then(|oldest| self.by_hash.remove(&oldest));
        self.taken_in += 1;
        self.by_hash.insert(hash, (self.taken_in, now, value));
        evicted.map(|(.., value)| value)
    }

    /// The value of an entry that has not expired.
    pub(super) fn get(&self, hash: &str, now: Timestamp) -> Option<&T> {
        self.by_hash.get(hash).filter(|(_, since, _)| is_valid(*since, now)).map(|(.., value)| value)
    }

    /// Removes and returns an entry. An expired one yields `None` and stays until the next sweep.
    pub(super) fn take(&mut self, hash: &str, now: Timestamp) -> Option<T> {
        self.by_hash.get(hash).filter(|(_, since, _)| is_valid(*since, now))?;
        self.by_hash.remove(hash).map(|(.., value)| value)
    }

    /// Removes the entries whose value meets `condition`.
    pub(super) fn remove_if(&mut self, condition: impl Fn(&T) -> bool) {
        self.by_hash.retain(|_, (.., value)| !condition(value));
    }

    /// Removes and returns all expired entries.
    pub(super) fn sweep(&mut self, now: Timestamp) -> Vec<T> {
        let expired = self.by_hash.extract_if(|_, (_, since, _)| !is_valid(*since, now));
        expired.map(|(_, (.., value))| value).collect()
    }
}

/// Whether an entry created at `since` has not expired. If the clock is set back, it lives at most ten minutes longer.
pub(super) fn is_valid(since: Timestamp, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(since)).unwrap_or_default() < TEN_MINUTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_returned_once_and_only_before_it_expires() {
        let now = Timestamp::UNIX_EPOCH;
        let mut map = ExpiringMap::default();
        map.insert(hash("1"), "a", now);
        assert_eq!(map.take(&hash("2"), now), None);
        assert_eq!(map.take(&hash("1"), now), Some("a"));
        assert_eq!(map.take(&hash("1"), now), None);
        map.insert(hash("1"), "a", now);
        assert_eq!(map.take(&hash("1"), now + TEN_MINUTES), None);
        map.insert(hash("1"), "a", now);
        map.insert(hash("2"), "b", now + TEN_MINUTES);
        assert_eq!(map.sweep(now + TEN_MINUTES), ["a"]);
        assert_eq!(map.take(&hash("2"), now + TEN_MINUTES), Some("b"));
    }

    #[test]
    fn the_newest_entry_evicts_the_oldest() {
        let now = Timestamp::UNIX_EPOCH;
        let mut map = ExpiringMap::default();
        for number in 0..=MAX_PENDING {
            let evicted = map.insert(hash(&number.to_string()), number, now);
            assert_eq!(evicted, (number == MAX_PENDING).then_some(0));
        }
        assert_eq!(map.take(&hash("0"), now), None);
        assert_eq!(map.take(&hash("1"), now), Some(1));
        assert_eq!(map.take(&hash("1000"), now), Some(1000));
    }
}
