//! Parking: what a connection becomes between two requests when many are open.
//!
//! hyper holds two buffers of 8 KiB for each connection, and other state. When more than [`MAX_ACTIVE`] connections are
//! open, hyper therefore gets one only while it is in use; an idle one is parked, that is, it consists of a socket and
//! a waker. Below that number nothing is saved, and resuming a connection costs more than the memory is worth. A
//! connection in the middle of a response is [set aside](super::set_aside) if its caller reads slowly.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Up to this number of connections stay active between two requests, which takes 1 MiB of memory.
pub(super) const MAX_ACTIVE: usize = 64;

/// Counts the connections of one listener that are not parked.
#[derive(Debug, Default)]
pub(super) struct Parking {
    active: AtomicUsize,
}

/// Counts a connection as active, that is, not parked, until it is dropped.
#[derive(Debug)]
pub(super) struct Active<'a>(&'a Parking);

impl Parking {
    /// Counts a connection as active from now on.
    pub(super) fn activate(&self) -> Active<'_> {
        self.active.fetch_add(1, Relaxed);
        Active(self)
    }

    /// Whether more than [`MAX_ACTIVE`] connections are active, so that idle ones are to be parked.
    pub(super) fn is_full(&self) -> bool {
        self.active.load(Relaxed) > MAX_ACTIVE
    }

    /// Counts as many other connections as active as may be, so that idle ones are parked.
    #[cfg(test)]
    pub(super) fn simulate_crowd(&self) {
        self.active.fetch_add(MAX_ACTIVE, Relaxed);
    }

    #[cfg(test)]
    pub(super) fn active(&self) -> usize {
        self.active.load(Relaxed)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}
