//! Gives memory back to the system after a burst of requests.
//!
//! glibc alone gives memory back only from the end of its heap. One small block that was allocated during the burst and
//! lives as long as its connection keeps all free memory below it: of 15 MiB after a burst of uploads, 14 were free.

use std::fs;

/// The heap is walked if the process has grown by this much since the last call, in KiB.
const GROWTH: u64 = 2 << 10;
/// Once this many connections have ended, what they held may be free, although the process has not grown.
const ENDED: usize = 64;

/// The memory of the process while no request is in progress.
#[derive(Debug)]
pub(super) struct Heap {
    /// Its size at the last call, in KiB; `None` if the kernel did not tell.
    at_rest: Option<u64>,
    /// The most open connections at a call since memory was last given back.
    open: usize,
    /// Whether the last call gave much back. The buffers of a caller that hung up are freed step by step, so the next
    /// call may find more.
    gave_much: bool,
}

impl Heap {
    /// Nothing is in progress now.
    pub(super) fn at_rest() -> Self {
        Self { at_rest: anonymous_kib(), open: 0, gave_much: false }
    }

    /// Called while nothing is in progress on `open` connections: gives free memory back to the system if much
    /// may be free. Returns whether it did. It takes some milliseconds, during which allocations may wait.
    pub(super) fn give_back(&mut self, open: usize) -> bool {
        let Some(taken) = anonymous_kib() else { return false };
        let at_rest = *self.at_rest.get_or_insert(taken);
        if taken < at_rest + GROWTH && self.open < open + ENDED && !self.gave_much {
            *self = Self { at_rest: Some(at_rest.min(taken)), open: self.open.max(open), gave_much: false };
            return false;
        }
        trim();
        let left = anonymous_kib().unwrap_or(taken);
        *self = Self { at_rest: Some(left), open, gave_much: taken >= left + GROWTH };
        tracing::debug!(before_kib = taken, after_kib = left, "gave free memory back to the system");
        true
    }
}

/// The memory of the process that is no part of a file, in KiB. `None` where the kernel does not tell.
pub(super) fn anonymous_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn trim() {
    mod glibc {
        use std::ffi::c_int;

        // The only unsafe code, and only a declaration: there is no safe one.
        #[expect(unsafe_code, reason = "malloc_trim(3) takes a number and has no precondition")]
        unsafe extern "C" {
            pub(super) safe fn malloc_trim(pad: usize) -> c_int;
        }
    }
    glibc::malloc_trim(0);
}

/// Other allocators give memory back by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn trim() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn what_lies_free_below_a_block_in_use_is_given_back() {
        let mut heap = Heap::at_rest();
        let before = anonymous_kib().unwrap();
        let mut burst: Vec<_> = (0..4096).map(|_| vec![1_u8; 16 << 10]).collect();
        let last = burst.pop();
        drop(burst);
        assert!(anonymous_kib().unwrap() > before + (48 << 10), "glibc keeps what is below the last block");
        assert!(heap.give_back(0));
        let after = anonymous_kib().unwrap();
        assert!(after < before + (8 << 10), "{before} KiB before, {after} after");
        drop(last);
        assert!(heap.give_back(0), "once more, because the last call gave much back");
    }

    #[test]
    fn the_heap_is_walked_only_if_it_may_have_become_larger() {
        let mut heap = Heap { at_rest: None, open: 0, gave_much: false };
        assert!(!heap.give_back(100), "nothing is known yet");
        assert!(!heap.give_back(100 - ENDED + 1), "few have ended");
        assert!(heap.give_back(100 - ENDED), "what many connections held is free");
        assert!(!heap.give_back(0), "few of the rest have ended");
    }
}
