//! A circuit breaker for Login with Amazon refusing our client, which affects all users. While it does, adsidecar
//! probes with one user's grant from time to time instead of retrying for every user, so that a wrong secret does not
//! cause a storm of calls.
//!
//! `invalid_client` is about the client (RFC 6749, section 5.2). Any other error that an operator must resolve may be
//! about one grant: it counts as the client's only once two users have met it with no success in between.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;

use crate::auth::lwa::LwaError;
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Tokens, backoff};

/// Whether LWA currently accepts our client.
#[derive(Debug, Default)]
pub(super) struct ClientCircuit {
    refused: Mutex<Option<Refused>>,
    /// The last user whose refresh failed with an error that may be about the client; `None` after a success.
    suspect: Mutex<Option<UserId>>,
    /// Held by the refresh task that probes, while LWA refuses our client.
    probe: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Refused {
    code: &'static str,
    attempts: u32,
    /// Uptime (monotonic clock) of the last rejection.
    rejected_at: SignedDuration,
    /// Uptime of the next probe.
    retry_at: SignedDuration,
}

/// Permission to call LWA: a guard while our client is refused, otherwise `None`.
pub(super) type ProbePermit<'a> = Option<tokio::sync::MutexGuard<'a, ()>>;

impl ClientCircuit {
    /// Waits for permission to probe. Returns at once unless LWA refuses our client.
    pub(super) async fn permit(&self) -> ProbePermit<'_> {
        if self.refused().is_none() {
            return None;
        }
        let permit = self.probe.lock().await;
        // If LWA accepts our client again, all waiters retry concurrently.
        let refused = self.refused().is_some();
        refused.then_some(permit)
    }

    /// The cached rejection, and how long until the next probe.
    pub(super) fn cached_rejection(&self, now: ClockReading) -> Option<(&'static str, Duration)> {
        let refused = (*self.refused())?;
        let wait = Duration::try_from(refused.retry_at.saturating_sub(now.uptime)).ok()?;
        (!wait.is_zero()).then_some((refused.code, wait))
    }

    /// Updates the state from the result of a token request for `user` sent at `sent_at`. `jitter` is random, in
    /// `0.0..1.0`.
    pub(super) fn update(
        &self,
        user: &UserId,
        response: &Result<Tokens, LwaError>,
        sent_at: ClockReading,
        now: ClockReading,
        jitter: f64,
    ) {
        if !self.is_about_client(user, response) {
            return;
        }
        let mut refused = self.refused();
        match response {
            Err(LwaError::Operator { code }) => {
                // Calls that were in flight when the rejection began count as the same attempt.
                let attempts = match *refused {
                    Some(before) if sent_at.uptime < before.rejected_at => before.attempts,
                    Some(before) => before.attempts.saturating_add(1),
                    None => 1,
                };
                // The backoff of a user without a valid token, and at least half of it: some users may have none.
                let wait = backoff(attempts, false, 0.5 + jitter / 2.0);
                let retry_at = now.uptime.saturating_add(SignedDuration::try_from(wait).unwrap_or_default());
                *refused = Some(Refused { code, attempts, rejected_at: now.uptime, retry_at });
            }
            // LWA accepted our client. Any other failure concerns one user, whose own backoff handles it.
            Ok(_) | Err(LwaError::Refused { .. } | LwaError::TryLater { .. }) => *refused = None,
        }
    }

    /// Whether `response` says something about the client, and not about this user alone.
    fn is_about_client(&self, user: &UserId, response: &Result<Tokens, LwaError>) -> bool {
        let mut suspect = self.suspect.lock().unwrap_or_else(PoisonError::into_inner);
        match response {
            Err(LwaError::Operator { code, .. }) if *code != "invalid_client" => {
                let before = suspect.replace(user.clone());
                before.is_some_and(|before| before != *user) || self.refused().is_some()
            }
            Ok(_) => {
                *suspect = None;
                true
            }
            Err(_) => true,
        }
    }

    /// Clears the cached rejection after a configuration change, so that the next refresh calls LWA.
    pub(super) fn forget(&self) {
        *self.refused() = None;
    }

    fn refused(&self) -> MutexGuard<'_, Option<Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
