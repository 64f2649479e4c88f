//! The latest requests to Amazon, in memory: the tail of the status page.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::telemetry::audit::Fault;

/// Number of requests that are remembered.
const REMEMBERED: u64 = 256;

/// The latest requests to Amazon, in a ring of fixed size. Each has a slot of its own, so that concurrent requests do
/// not wait for one another, and remembering one takes no clock reading and no memory: texts are written over those of
/// the oldest request, since small allocations that outlive their request would keep the memory of a burst from being
/// given back. A request holds no path and no query.
#[derive(Debug, Default)]
pub struct RecentCalls {
    /// Number of the next request.
    next: AtomicU64,
    /// Allocated for the first request.
    slots: OnceLock<Box<[Mutex<Option<RecentCall>>]>>,
}

/// A request to Amazon that has ended, whether it was sent or rejected.
#[derive(Clone, Debug)]
pub struct RecentCall<Text = String> {
    /// When the head of its response was there.
    pub ended: Instant,
    /// Time from the request head to the response head.
    pub took: Duration,
    /// HTTP method, or `other`.
    pub method: &'static str,
    /// Name of the API family; empty if the request was rejected before it was known.
    pub family: &'static str,
    /// The account, as in the metrics; empty if the request names none.
    pub account: Text,
    /// HTTP status that the caller received; 499 if the caller disconnected first.
    pub status: u16,
    /// Who caused the failure; `None` if the request succeeded.
    pub fault: Option<Fault>,
    /// The id in `X-Request-Id`.
    pub request_id: Text,
}

impl RecentCalls {
    /// Remembers a request, in the place of the oldest one.
    pub fn remember(&self, call: RecentCall<&str>) {
        let slots = self.slots.get_or_init(|| (0..REMEMBERED).map(|_| Mutex::default()).collect());
        let number = self.next.fetch_add(1, Relaxed);
        // The remainder is below the number of slots.
        let slot = &slots[(number % REMEMBERED) as usize];
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let (account, request_id) = slot.take().map(|oldest| (oldest.account, oldest.request_id)).unwrap_or_default();
        let RecentCall { ended, took, method, family, status, fault, .. } = call;
        let (account, request_id) = (over(account, call.account), over(request_id, call.request_id));
        *slot = Some(RecentCall { ended, took, method, family, account, status, fault, request_id });
    }

    /// The remembered requests, the latest first.
    pub fn latest(&self) -> impl Iterator<Item = RecentCall> {
        let (next, slots) = (self.next.load(Relaxed), self.slots.get());
        let numbers = (next.saturating_sub(REMEMBERED)..next).rev();
        numbers.filter_map(move |number| {
            let slot = slots?[(number % REMEMBERED) as usize].lock();
            slot.unwrap_or_else(PoisonError::into_inner).clone()
        })
    }
}

/// Writes `text` in the place of an older one.
fn over(mut older: String, text: &str) -> String {
    older.clear();
    older.push_str(text);
    older
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_requests_are_remembered_and_older_ones_are_not() {
        let calls = RecentCalls::default();
        assert_eq!(calls.latest().count(), 0);
        for number in 0..REMEMBERED + 10 {
            calls.remember(RecentCall {
                ended: Instant::now(),
                took: Duration::ZERO,
                method: "GET",
                family: "profiles",
                account: "",
                status: 200,
                fault: None,
                request_id: &number.to_string(),
            });
        }
        let ids: Vec<u64> = calls.latest().map(|call| call.request_id.parse().unwrap()).collect();
        assert_eq!(ids, (10..REMEMBERED + 10).rev().collect::<Vec<_>>());
    }
}
