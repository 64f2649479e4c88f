//! Gives the memory that a burst of requests took back to the system once it is over.
//!
//! glibc gives memory back only from the end of its heap, so one small block that was allocated during the burst and
//! lives as long as its connection keeps all that is free below it: of 15 MiB after a burst of uploads, 14 were free.

use std::fs;

/// What the process may take beyond what it took when it was last looked at, in KiB, before its heap is walked.
const GROWTH: u64 = 2 << 10;

/// How much memory the process took when nothing was in progress.
#[derive(Debug)]
pub(super) struct Heap {
    /// In KiB; `None` if the kernel does not tell.
    at_rest: Option<u64>,
}

impl Heap {
    /// Nothing is in progress now.
    pub(super) fn at_rest() -> Self {
        Self { at_rest: anonymous_kib() }
    }

    /// Called while nothing is in progress: gives free memory back to the system if the process has grown. That takes
    /// some milliseconds, during which nobody can allocate.
    pub(super) fn give_back(&mut self) {
        let (Some(taken), Some(at_rest)) = (anonymous_kib(), self.at_rest) else { return };
        if taken < at_rest + GROWTH {
            self.at_rest = Some(at_rest.min(taken));
            return;
        }
        trim();
        self.at_rest = anonymous_kib();
        tracing::debug!(before_kib = taken, after_kib = self.at_rest, "gave free memory back to the system");
    }
}

/// The memory of the process that is no part of a file, in KiB. `None` where the kernel does not tell.
fn anonymous_kib() -> Option<u64> {
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
        heap.give_back();
        let after = anonymous_kib().unwrap();
        assert!(after < before + (8 << 10), "{before} KiB before, {after} after");
        drop(last);
    }
}
