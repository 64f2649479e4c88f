//! What the process does to itself before it reads a secret, and what it has to say about where it runs.

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

use crate::config::{Config, Environment};

/// Descriptors beside those of callers and of their connections to Amazon: the store, the log, token calls.
const OTHER_DESCRIPTORS: u64 = 64;

/// Protects the memory of the process: no core file is written, and no process of the same user reads this one's memory
/// or environment (`/proc/PID/mem`, `/proc/PID/environ`; prctl(2), `PR_SET_DUMPABLE`). Descriptors are taken as far as
/// the system allows, as every connection needs up to two.
pub(super) fn harden() {
    // Lowering a limit needs no permission; if the system refuses it nevertheless, `remark` says so.
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // macOS calls its limit infinite and takes no such number.
    if maximum.is_some() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

/// Logs what an operator should know about this process.
pub(super) fn remark(config: &Config) {
    if getrlimit(Resource::Core).current != Some(0) {
        tracing::warn!("core files could not be switched off: a crash would write tokens and keys to the disk");
    }
    if config.environment == Environment::Production && geteuid().is_root() {
        tracing::warn!("running as root, which nothing here needs: run it as a user of its own, such as 65532");
    }
    let needed = 2 * config.limits.max_connections as u64 + OTHER_DESCRIPTORS;
    if let Some(limit) = getrlimit(Resource::Nofile).current.filter(|limit| *limit < needed) {
        tracing::warn!(
            limit,
            needed,
            "fewer descriptors than proxy.max_connections may need: raise the limit (ulimit -n), or lower the key"
        );
    }
}
