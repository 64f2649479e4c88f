//! Bounds what waits: the number of calls, and the bytes that they hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Counts the waiting calls of all buckets.
#[derive(Debug, Default)]
pub(super) struct Room {
    calls: AtomicUsize,
    bytes: AtomicUsize,
}

/// Room for one waiting call. Dropping it releases the room.
#[derive(Debug)]
pub(super) struct Held {
    room: Arc<Room>,
    bytes: usize,
}

impl Room {
    /// Takes room for a call that holds `bytes`, or returns `None` if the limits leave none.
    pub(super) fn take(self: &Arc<Self>, bytes: usize, max_calls: usize, max_bytes: usize) -> Option<Held> {
        let take = |count: &AtomicUsize, amount: usize, max: usize| {
            let sum = |taken: usize| taken.checked_add(amount).filter(|sum| *sum <= max);
            count.fetch_update(Relaxed, Relaxed, sum).is_ok()
        };
        if !take(&self.calls, 1, max_calls) {
            return None;
        }
        if !take(&self.bytes, bytes, max_bytes) {
            self.calls.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Held { room: self.clone(), bytes })
    }

    /// The waiting calls, and the bytes that they hold.
    pub(super) fn taken(&self) -> (usize, usize) {
        (self.calls.load(Relaxed), self.bytes.load(Relaxed))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.room.calls.fetch_sub(1, Relaxed);
        self.room.bytes.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_bytes_are_both_bounded_and_released() {
        let room = Arc::new(Room::default());
        let first = room.take(60, 2, 100).unwrap();
        assert!(room.take(41, 2, 100).is_none(), "too many bytes");
        let second = room.take(40, 2, 100).unwrap();
        assert!(room.take(0, 2, 100).is_none(), "too many calls");
        assert_eq!(room.taken(), (2, 100));
        drop((first, second));
        assert_eq!(room.taken(), (0, 0));
        assert!(room.take(usize::MAX, 2, usize::MAX).is_some() && room.taken() == (0, 0));
    }
}
