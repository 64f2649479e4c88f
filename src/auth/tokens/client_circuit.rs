//! Login with Amazon refuses our client: one problem of all users. One of them asks whether it is over, and the others go by
//! what it heard, so that a thousand users with a wrong secret are no storm of calls.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;

use crate::auth::lwa::LwaError;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Tokens, backoff};

/// What is known about whether LWA takes our client.
#[derive(Debug, Default)]
pub(super) struct ClientCircuit {
    refused: Mutex<Option<Refused>>,
    /// While our client is refused: held by who asks.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Refused {
    code: &'static str,
    attempts: u32,
    /// When it was last heard, and until when nobody asks again. Uptimes.
    heard: SignedDuration,
    retry_at: SignedDuration,
}

/// The right to ask.
pub(super) type Turn<'a> = Option<tokio::sync::MutexGuard<'a, ()>>;

impl ClientCircuit {
    /// Waits for the turn to ask, which nobody has to unless our client is refused.
    pub(super) async fn turn(&self) -> Turn<'_> {
        if self.refused().is_none() {
            return None;
        }
        let turn = self.turn.lock().await;
        // It may be over: then all who waited ask side by side.
        let refused = self.refused().is_some();
        refused.then_some(turn)
    }

    /// What would be heard, and for how long nobody is asked.
    pub(super) fn holds(&self, now: ClockReading) -> Option<(&'static str, Duration)> {
        let refused = (*self.refused())?;
        let wait = Duration::try_from(refused.retry_at.saturating_sub(now.uptime)).ok()?;
        (!wait.is_zero()).then_some((refused.code, wait))
    }

    /// Learns from the answer to a call that was made at `asked`. `jitter` in `0.0..1.0` is the jitter.
    pub(super) fn learn(&self, answer: &Result<Tokens, LwaError>, asked: ClockReading, now: ClockReading, jitter: f64) {
        let mut refused = self.refused();
        match answer {
            Err(LwaError::Operator { code }) => {
                // Many calls may have been under way at once when it began: they heard the same.
                let attempts = match *refused {
                    Some(before) if asked.uptime < before.heard => before.attempts,
                    Some(before) => before.attempts.saturating_add(1),
                    None => 1,
                };
                // As a user without a living token waits, and at least half of that: there may be such users among all.
                let wait = backoff(attempts, false, 0.5 + jitter / 2.0);
                let retry_at = now.uptime.saturating_add(SignedDuration::try_from(wait).unwrap_or_default());
                *refused = Some(Refused { code, attempts, heard: now.uptime, retry_at });
            }
            // Whoever LWA answers otherwise has to find out by itself how to wait.
            Ok(_) | Err(LwaError::Refused { .. } | LwaError::TryLater { .. }) => *refused = None,
        }
    }

    /// The operator changed something: whoever wants to may ask.
    pub(super) fn forget(&self) {
        *self.refused() = None;
    }

    fn refused(&self) -> MutexGuard<'_, Option<Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
