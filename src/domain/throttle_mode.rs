//! What the throttle does with what it learns: `throttle.mode`, and the overrides of families and accounts.

use std::str::FromStr;

/// The modes of the throttle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ThrottleMode {
    /// It does nothing, and learns nothing.
    Off,
    /// It learns, and touches nothing.
    #[default]
    Observe,
    /// While Amazon refuses calls, it refuses them itself.
    Enforce,
    /// Calls wait until Amazon will probably accept them.
    Queue,
}

/// The text is not the name of a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be one of off, observe, enforce, queue")]
pub struct BadThrottleMode;

impl ThrottleMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Off, Self::Observe, Self::Enforce, Self::Queue];

    /// Returns the mode's name in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Observe => "observe",
            Self::Enforce => "enforce",
            Self::Queue => "queue",
        }
    }
}

impl FromStr for ThrottleMode {
    type Err = BadThrottleMode;

    fn from_str(text: &str) -> Result<Self, BadThrottleMode> {
        Self::ALL.into_iter().find(|mode| text.eq_ignore_ascii_case(mode.as_str())).ok_or(BadThrottleMode)
    }
}
