//! How many of the process's file descriptors callers may use.
//!
//! A call needs two: for its caller, and for its connection to Amazon. If callers could take all of them, a call would
//! fail for want of the second, and so would the calls that keep the tokens fresh. So callers get half of what is left
//! beside a reserve, and the caller that has been idle longest is closed for a new one.

use rustix::process::{Resource, getrlimit};

/// Descriptors that stay free for everything but callers and their calls: token calls, the store, the log.
const RESERVE: u64 = 16;

/// Fewest callers, however few descriptors there are.
const FEWEST: u64 = 4;

/// The most connections that a listener may have open at once, according to the limit of the process and the number of
/// descriptors that it uses now. The share is counted once, at the start: the limit does not change, and what is opened
/// later is callers, their calls, and the reserve.
pub(super) fn share() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(share_of(limit, in_use())).unwrap_or(usize::MAX)
}

fn share_of(limit: u64, in_use: u64) -> u64 {
    (limit.saturating_sub(in_use.saturating_add(RESERVE)) / 2).max(FEWEST)
}

/// The descriptors that are in use; 0 where the system does not tell.
fn in_use() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64)
}

/// Whether `error` means that there is no descriptor left, in the process or in the system.
pub(super) fn are_used_up(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let code = error.raw_os_error();
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| code == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_and_their_calls_leave_the_reserve_alone() {
        for (limit, in_use) in [(64, 20), (1024, 25), (1 << 20, 30), (100, 0)] {
            let share = share_of(limit, in_use);
            assert!(in_use + 2 * share + RESERVE <= limit && in_use + 2 * (share + 1) + RESERVE > limit, "{limit}");
        }
        assert_eq!(share_of(20, 19), FEWEST);
        assert!(share_of(u64::MAX, 30) > 1 << 60);
        assert!(share() >= FEWEST as usize);
    }
}
