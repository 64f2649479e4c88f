//! `[throttle]`, as the configuration says it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::domain::api_families;
use crate::domain::throttle_mode::ThrottleMode;

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
