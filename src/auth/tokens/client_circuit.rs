//! A brake for answers of Login with Amazon that are about our client, and so affect all users: it refuses our client,
//! asks us to wait, or is down. While it does, adsidecar probes with one user's grant from time to time instead of
//! retrying for every user, so that a wrong secret or an outage does not cause a storm of calls. Afterwards the rate
//! grows slowly.
//!
//! `invalid_client` (RFC 6749, section 5.2) and 429 are about the client. Any other error may be about one grant: one
//! that an operator must resolve counts as the client's once two users have met it with no success in between, one that
//! passes by itself once [`MANY`] have.
//!
//! Processes that share a store share the brake too: see [`TokenManager::call_permit`].

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;
use tokio::time::{Instant, sleep_until};

use super::TokenManager;
use super::refresh_task::jitter;
use crate::auth::lwa::LwaError;
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Outcome, Remedy, Tokens, backoff};

/// Number of users whose refreshes failed with no success in between, from which on Login with Amazon counts as down.
const MANY: usize = 5;
/// Longest `Retry-After` that holds back all users.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// After an outage, calls begin this far apart, and twice as often after each period, until they are as close as the
/// last.
const FIRST_GAP: Duration = Duration::from_millis(100);
const GAP_PERIOD: Duration = Duration::from_secs(2);
const LAST_GAP: Duration = Duration::from_millis(3);
/// How long a process that may probe for all has for its probe.
const PROBE: Duration = Duration::from_secs(12);

/// Whether LWA currently serves our client.
#[derive(Debug, Default)]
pub(super) struct ClientCircuit {
    refused: Mutex<Option<Refused>>,
    /// The last user whose refresh failed with an error that may be about the client; `None` after a success.
    suspect: Mutex<Option<UserId>>,
    /// The users whose refreshes failed since the last answer that shows that LWA works. At most [`MANY`].
    failing: Mutex<BTreeSet<UserId>>,
    /// Held by the refresh task that probes, while LWA refuses our client.
    probe: tokio::sync::Mutex<()>,
    ramp: Mutex<Option<Ramp>>,
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

/// The rate after an outage.
#[derive(Clone, Copy, Debug)]
struct Ramp {
    since: Instant,
    /// When the next call may be made.
    next: Instant,
}

/// What the brake lets a process begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Brake {
    /// Any refresh: LWA serves our client, as far as this process knows.
    Released,
    /// One refresh, which finds out whether LWA serves our client again.
    Ended,
    /// None: it would fail without a call, or wait for the one that finds out.
    Holds,
}

/// Permission to call LWA: a guard while our client is refused, otherwise `None`.
pub(super) type ProbePermit<'a> = Option<tokio::sync::MutexGuard<'a, ()>>;

impl ClientCircuit {
    /// Waits for permission to probe. Returns at once unless LWA refuses our client.
    async fn permit(&self) -> ProbePermit<'_> {
        if self.refused().is_none() {
            self.take_slot().await;
            return None;
        }
        let permit = self.probe.lock().await;
        if self.refused().is_some() {
            return Some(permit);
        }
        // LWA serves our client again, and so the waiters, at the rate that it takes.
        drop(permit);
        self.take_slot().await;
        None
    }

    /// Waits for the next call's turn after an outage.
    async fn take_slot(&self) {
        let turn = {
            let mut ramp = self.ramp.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(Ramp { since, next }) = *ramp else { return };
            let now = Instant::now();
            let periods = now.saturating_duration_since(since).as_secs_f64() / GAP_PERIOD.as_secs_f64();
            let gap = FIRST_GAP.div_f64(periods.min(30.0).exp2());
            if gap < LAST_GAP {
                *ramp = None;
                return;
            }
            let turn = next.max(now);
            *ramp = Some(Ramp { since, next: turn + gap });
            turn
        };
        sleep_until(turn).await;
    }

    /// What the brake lets this process begin at `now`.
    pub(super) fn brake(&self, now: ClockReading) -> Brake {
        if self.refused().is_none() {
            Brake::Released
        } else if self.cached_rejection(now).is_none() && self.probe.try_lock().is_ok() {
            Brake::Ended
        } else {
            Brake::Holds
        }
    }

    /// The cached rejection, and how long until the next probe.
    fn cached_rejection(&self, now: ClockReading) -> Option<(&'static str, Duration)> {
        let refused = (*self.refused())?;
        let wait = Duration::try_from(refused.retry_at.saturating_sub(now.uptime)).ok()?;
        (!wait.is_zero()).then_some((refused.code, wait))
    }

    /// Takes over what another process has heard: nobody calls LWA for the time `wait`.
    pub(super) fn hold(&self, code: &'static str, wait: Duration, now: ClockReading) {
        let retry_at = now.uptime.saturating_add(SignedDuration::try_from(wait).unwrap_or_default());
        let mut refused = self.refused();
        let attempts = refused.map_or(1, |refused| refused.attempts);
        if refused.is_none_or(|refused| refused.retry_at < retry_at) {
            *refused = Some(Refused { code, attempts, rejected_at: now.uptime, retry_at });
        }
    }

    /// Updates the state from the result of a token request for `user` sent at `sent_at`. `jitter` is random, in
    /// `0.0..1.0`. Returns whether the state of the client has changed.
    pub(super) fn update(
        &self,
        user: &UserId,
        response: &Result<Tokens, LwaError>,
        sent_at: ClockReading,
        now: ClockReading,
        jitter: f64,
    ) -> bool {
        if !self.is_about_client(user, response) {
            return false;
        }
        let mut refused = self.refused();
        let (code, retry_after) = match response {
            Err(LwaError::Operator { code }) => (*code, None),
            Err(LwaError::TryLater { code, retry_after, .. }) => (*code, *retry_after),
            // LWA served our client.
            Ok(_) | Err(LwaError::Refused { .. }) => {
                let was_refused = refused.take().is_some();
                if was_refused {
                    let now = Instant::now();
                    *self.ramp.lock().unwrap_or_else(PoisonError::into_inner) = Some(Ramp { since: now, next: now });
                }
                return was_refused;
            }
        };
        // Calls that were in flight when the rejection began count as the same attempt.
        let attempts = match *refused {
            Some(before) if sent_at.uptime < before.rejected_at => before.attempts,
            Some(before) => before.attempts.saturating_add(1),
            None => 1,
        };
        // The backoff of a user without a valid token, and at least half of it: some users may have none.
        let own = backoff(attempts, false, 0.5 + jitter / 2.0);
        let wait = retry_after.map_or(own, |wanted| wanted.min(MAX_WAIT).max(own));
        let retry_at = now.uptime.saturating_add(SignedDuration::try_from(wait).unwrap_or_default());
        *refused = Some(Refused { code, attempts, rejected_at: now.uptime, retry_at });
        true
    }

    /// Whether `response` says something about the client, and not about this user alone.
    fn is_about_client(&self, user: &UserId, response: &Result<Tokens, LwaError>) -> bool {
        let mut suspect = self.suspect.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match response {
            Err(LwaError::Operator { code, .. }) if *code != "invalid_client" => {
                let before = suspect.replace(user.clone());
                before.is_some_and(|before| before != *user) || self.refused().is_some()
            }
            Err(LwaError::TryLater { code: "throttled", .. } | LwaError::Operator { .. }) => true,
            Err(LwaError::TryLater { .. }) => {
                if failing.len() < MANY {
                    failing.insert(user.clone());
                }
                failing.len() >= MANY
            }
            Ok(_) => {
                *suspect = None;
                failing.clear();
                true
            }
            Err(LwaError::Refused { .. }) => {
                failing.clear();
                true
            }
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

impl TokenManager {
    /// Waits for permission to call LWA. If processes share the store, one of them probes for all.
    ///
    /// # Errors
    /// The failure of the refresh while the brake holds.
    pub(super) async fn call_permit(&self) -> Result<ProbePermit<'_>, Outcome> {
        let circuit = &self.0.circuit;
        let permit = circuit.permit().await;
        if permit.is_some()
            && circuit.cached_rejection(self.0.clock.reading()).is_none()
            && let Some(shared) = self.0.store.shared()
            && let Ok(Some((code, wait))) = self.timed("brake", shared.claim_probe(PROBE)).await
        {
            circuit.hold(known_code(&code), wait, self.0.clock.reading());
        }
        match circuit.cached_rejection(self.0.clock.reading()) {
            None => Ok(permit),
            Some((code, wait)) => {
                let failure = Failure { code, remedy: remedy_of(code), detail: None };
                // During an outage each user keeps its own backoff, which spreads the users; the brake spares the
                // calls. In a shared store each attempt costs statements: it waits for the brake, and is spread behind
                // it.
                let is_outage = failure.remedy == Remedy::Time && code != "throttled";
                let retry_after = match (is_outage, self.0.store.shared()) {
                    (true, None) => None,
                    (true, Some(_)) => Some(wait.mul_f64(1.0 + jitter())),
                    (false, _) => Some(wait),
                };
                Err(Outcome::Failed { failure, retry_after })
            }
        }
    }

    /// Tells the other processes that the brake holds, or no longer does. If it fails, each of them finds out by
    /// itself.
    pub(super) async fn share_brake(&self) {
        let Some(shared) = self.0.store.shared() else { return };
        let held = self.0.circuit.cached_rejection(self.0.clock.reading());
        let _ = match held {
            Some((code, wait)) => self.timed("brake", shared.set_brake(code, wait)).await,
            None => self.timed("brake", shared.release_brake()).await,
        };
    }
}

/// The code of a failure as this process names it.
pub(super) fn known_code(code: &str) -> &'static str {
    crate::telemetry::metrics::REFRESH_FAILURES.into_iter().find(|known| *known == code).unwrap_or("server_error")
}

/// What resolves a failure with this code.
pub(super) fn remedy_of(code: &str) -> Remedy {
    if matches!(code, "invalid_client" | "invalid_request") { Remedy::Operator } else { Remedy::Time }
}
