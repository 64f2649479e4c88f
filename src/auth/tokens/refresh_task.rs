//! One renewal, from the decision to the disk: a task of its own that no caller can cancel.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures_util::FutureExt;
use http::HeaderValue;

use super::user_state::{UserState, Writing};
use super::{GrantState, TokenManager};
use crate::auth::lwa::LwaError;
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Grant, LiveGrant, Outcome, RefreshToken, Remedy, Tokens};
use crate::store::StoreError;

/// While a grant is newer in memory than on disk, or the store has failed, it is tried again this often.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// Who wants a renewal.
#[derive(Clone, Debug)]
pub(super) enum RefreshReason {
    /// The background, because it is due.
    Due,
    /// A caller, because little or nothing is left of the token's life.
    OnDemand,
    /// Amazon refused this token.
    Distrusted(HeaderValue),
    /// Somebody asked for it.
    Manual,
}

/// Ends the flight however it ends and wakes those who wait for it.
pub(super) struct Flight {
    pub(super) keeper: TokenManager,
    pub(super) entry: Arc<UserState>,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.entry.land();
    }
}

impl TokenManager {
    /// Renews in the background, unless that is happening already.
    pub(super) fn fly(&self, entry: &Arc<UserState>, why: RefreshReason) {
        if entry.take_off() {
            let flight = Flight { keeper: self.clone(), entry: entry.clone() };
            self.0.flights.spawn(flight.run(why));
        }
    }

    /// As [`fly`](Self::fly), and returns when the flight is over, also one that was under way.
    pub(super) async fn fly_and_wait(&self, entry: &Arc<UserState>, why: RefreshReason) {
        let changed = entry.changed();
        if entry.take_off() {
            Flight { keeper: self.clone(), entry: entry.clone() }.run(why).await;
        } else {
            changed.wait().await;
        }
    }

    /// Stores `grant` before anybody sees it. Where the disk does not take it, storing it is tried until it succeeds; the
    /// grant is used meanwhile, since losing it helps nobody. `false`: it is not to be used, since another process stored
    /// another one.
    pub(super) async fn store(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
        expected: Option<u64>,
    ) -> bool {
        let user = &entry.user;
        let shared = self.0.store.shared().is_some();
        match self.timed("put", self.0.store.save(user, grant, expected)).await {
            Ok(generation) => {
                grant.generation = generation;
                write.note_stored(generation);
                entry.set_unsaved(false);
                return true;
            }
            Err(StoreError::Conflict) if shared && expected.is_some() => return false,
            Err(error) => {
                tracing::error!(%user, %error, "token_not_persisted: the grant is in memory only, storing it is tried again");
            }
        }
        entry.set_unsaved(true);
        self.0.unsaved.fetch_add(1, Relaxed);
        // Where nobody else writes this user's record, what is stored is what was stored before, or this grant.
        let expected = expected.filter(|_| shared);
        self.0.flights.spawn(keep_storing(self.clone(), entry.clone(), grant.clone(), expected));
        true
    }
}

impl Flight {
    /// Whatever happens in it, the flight lands, and nobody waits for it for ever.
    async fn run(self, why: RefreshReason) {
        if AssertUnwindSafe(self.renew(why)).catch_unwind().await.is_err() {
            // A bug of ours. Those who wait must not fly again at once, into the same panic.
            let failure = Failure { code: "internal", remedy: Remedy::Time };
            self.keeper.0.metrics.token_refresh.with_label_values(&["failure", failure.code]).inc();
            self.fail(failure).await;
        }
    }

    async fn fail(&self, failure: Failure) {
        let write = self.entry.write().await;
        let (held, now) = (self.entry.held().clone(), self.keeper.0.clock.moment());
        let next = held.next(Outcome::Failed { failure, retry_after: None }, now, jitter());
        self.log(&held, &next);
        self.keeper.publish(&self.entry, &write, next);
    }

    async fn renew(&self, why: RefreshReason) {
        let grant = match self.turn(&why).await {
            Ok(Some(grant)) => grant,
            Ok(None) => return,
            Err(failure) => return self.fail(failure).await,
        };
        fail_point!("renewal_begun");
        let answer = self.ask_twice(&grant).await;
        fail_point!("renewal_answered", |_| std::process::abort());
        if answer.is_err() {
            self.give_way().await;
        }

        let user = &self.entry.user;
        let write = self.entry.write().await;
        let Some(held) = write.of(grant.generation) else {
            return self.dropped();
        };
        let outcome = match answer {
            Ok((tokens, asked)) => {
                // The life began when LWA made the token, which was not before it was asked.
                let mut renewed = grant.renewed(tokens, asked.wall);
                renewed.used_at = Some(asked.wall_at(self.entry.used()));
                renewed.generation = write.next_generation();
                if renewed.previous.is_some() && grant.previous.as_ref() != Some(&renewed.refresh_token) {
                    self.keeper.0.metrics.token_rotations.inc();
                    tracing::info!(%user, "Login with Amazon gave out another refresh token");
                }
                if !self.keeper.store(&self.entry, &write, &mut renewed, Some(grant.generation)).await {
                    self.dropped();
                    return self.keeper.overtaken(&self.entry, &write).await;
                }
                fail_point!("renewal_stored", |_| std::process::abort());
                self.end_intent("recovered");
                Outcome::Renewed(Arc::new(LiveGrant::issued(renewed, asked)))
            }
            Err(outcome) => outcome,
        };
        let refused = matches!(outcome, Outcome::Refused(_));
        let next = held.next(outcome, self.keeper.0.clock.moment(), jitter());
        self.log(&held, &next);
        // Those who wait are woken by the landing: were it now, who then asks anew would join a flight that is over.
        self.keeper.publish(&self.entry, &write, next);
        drop(write);
        if refused {
            self.after_refusal().await;
        }
    }

    fn dropped(&self) {
        let user = &self.entry.user;
        self.keeper.0.journal.end(user);
        self.keeper.0.metrics.refresh_dropped.inc();
        tracing::info!(%user, "renewal dropped: the grant was replaced or logged out meanwhile");
    }

    /// Asks LWA with the grant's refresh token. Where that is refused and has never renewed anything, the one before is asked
    /// for: a rotation may have been lost on LWA's side.
    async fn ask_twice(&self, grant: &LiveGrant) -> Result<(Tokens, ClockReading), Outcome> {
        let answer = self.ask(grant, &grant.refresh_token).await;
        let (Err(Outcome::Refused(_)), Some(previous)) = (&answer, &grant.previous) else { return answer };
        let (tokens, asked) = self.ask(grant, previous).await?;
        tracing::warn!(user = %self.entry.user, "Login with Amazon refuses the refresh token that it gave out last, and takes the one before");
        let refresh = tokens.refresh.or_else(|| Some(previous.clone()));
        Ok((Tokens { refresh, ..tokens }, asked))
    }

    /// Asks LWA, unless it has just refused our client. What it answered, and when it was asked.
    async fn ask(&self, grant: &LiveGrant, refresh_token: &RefreshToken) -> Result<(Tokens, ClockReading), Outcome> {
        let TokenManager(inner) = &self.keeper;
        let turn = inner.circuit.turn().await;
        if let Some((code, wait)) = inner.circuit.holds(inner.clock.moment()) {
            return Err(Outcome::Failed {
                failure: Failure { code, remedy: Remedy::Operator },
                retry_after: Some(wait),
            });
        }
        let user = &self.entry.user;
        self.may_ask(grant.generation).await.map_err(|failure| Outcome::Failed { failure, retry_after: None })?;
        let asked = inner.clock.moment();
        let begun = std::time::Instant::now();
        let answer = inner.lwa.load_full().refresh(refresh_token).await;
        inner.metrics.token_refresh_duration.observe(begun.elapsed().as_secs_f64());
        inner.circuit.learn(&answer, asked, inner.clock.moment(), jitter());
        drop(turn);
        self.count(&answer);
        match answer {
            Ok(tokens) => {
                tokens
                    .oddities
                    .iter()
                    .for_each(|kind| inner.metrics.token_answer_oddities.with_label_values(&[kind]).inc());
                if let Some(server_time) = tokens.server_time {
                    self.keeper.amazon_says(server_time);
                }
                Ok((tokens, asked))
            }
            Err(error) => {
                if matches!(error, LwaError::TryLater { taken: true, .. }) {
                    inner.journal.lost(user, grant.generation);
                }
                Err(outcome(error))
            }
        }
    }

    /// A renewal came to a known end. Where the answer to an earlier one may have been lost, that is told, with what became
    /// of the grant.
    fn end_intent(&self, end: &str) {
        let user = &self.entry.user;
        if !self.keeper.0.journal.end(user) {
            return;
        }
        self.keeper.0.metrics.refresh_interrupted.with_label_values(&[end]).inc();
        if end == "lost" {
            tracing::error!(%user, "the answer to an earlier renewal was lost, and Login with Amazon refuses the grant now: if it had handed out a new refresh token, that one is lost; the user has to log in again");
        } else {
            tracing::info!(%user, "the answer to an earlier renewal was lost; the grant is well");
        }
    }

    async fn after_refusal(&self) {
        self.end_intent("lost");
        self.keeper.settle_intents().await;
        // Whether the stored grant is dead was not known at the start: amazon.refresh_token may have come to replace it.
        if self.entry.user == UserId::default()
            && let Err(error) = self.keeper.adopt_configured().await
        {
            tracing::error!(%error, "amazon.refresh_token could not be stored, and is tried again at the next start");
        }
    }

    /// The grant to renew, if renewal is still wanted: a wake-up is a hint, and what it hinted at may be done.
    pub(super) fn wanted(&self, why: &RefreshReason) -> Option<Arc<LiveGrant>> {
        let held = self.entry.held();
        let (now, policy) = (self.keeper.0.clock.moment(), self.keeper.policy());
        let wanted = match why {
            RefreshReason::Due => self.entry.due(policy, now).is_some_and(|due| due <= now.uptime),
            RefreshReason::OnDemand => held.expiring(policy, now),
            // The refused token may have ended meanwhile.
            RefreshReason::Distrusted(bearer) => held.living(now).is_none_or(|access| access.bearer() == bearer),
            RefreshReason::Manual => true,
        };
        held.grant().filter(|_| wanted && !held.backs_off(now)).cloned()
    }

    fn count(&self, answer: &Result<Tokens, LwaError>) {
        let (result, reason) = match answer {
            Ok(_) => ("success", ""),
            Err(LwaError::TryLater { code, .. } | LwaError::Refused { code } | LwaError::Operator { code }) => {
                ("failure", *code)
            }
        };
        self.keeper.0.metrics.token_refresh.with_label_values(&[result, reason]).inc();
        if let Err(error) = answer {
            tracing::debug!(user = %self.entry.user, %error, "renewal failed");
        }
    }

    /// One line per change of state.
    fn log(&self, before: &GrantState, after: &GrantState) {
        let user = &self.entry.user;
        match (before, after) {
            (GrantState::Fresh(_), GrantState::Fresh(_)) => tracing::debug!(%user, "token renewed"),
            (_, GrantState::Fresh(_)) => tracing::info!(%user, "token renewed, trouble is over"),
            (GrantState::Failing { failure: old, .. }, GrantState::Failing { failure, .. }) if old == failure => {}
            (_, GrantState::Failing { failure, .. }) if failure.remedy == Remedy::Operator => {
                tracing::error!(%user, code = failure.code, "Login with Amazon refuses the client: check amazon.client_id and amazon.client_secret");
            }
            (_, GrantState::Failing { failure, .. }) => {
                tracing::warn!(%user, code = failure.code, "renewal failed, it is tried again; the token of before is served while it lives");
            }
            (GrantState::LoginRequired { .. }, GrantState::LoginRequired { .. }) => {}
            (_, GrantState::LoginRequired { reason, .. }) => {
                tracing::warn!(%user, reason, "Login with Amazon refuses the grant: the user has to log in again");
            }
            (_, GrantState::Nothing) => {}
        }
    }
}

/// Until the store has taken `grant`, or it is not the user's grant any more.
async fn keep_storing(keeper: TokenManager, entry: Arc<UserState>, mut grant: Grant, expected: Option<u64>) {
    loop {
        tokio::time::sleep(STORE_RETRY).await;
        let write = entry.write().await;
        if write.of(grant.generation).is_none() {
            break;
        }
        match keeper.store_again(&entry, &write, &mut grant, expected).await {
            Ok(()) => {
                tracing::info!(user = %entry.user, "what is in memory is on disk now");
                break;
            }
            Err(StoreError::Closed) => break,
            Err(_) => {}
        }
    }
    keeper.0.unsaved.fetch_sub(1, Relaxed);
}

fn outcome(error: LwaError) -> Outcome {
    match error {
        LwaError::TryLater { code, retry_after, .. } => {
            Outcome::Failed { failure: Failure { code, remedy: Remedy::Time }, retry_after }
        }
        LwaError::Operator { code } => {
            Outcome::Failed { failure: Failure { code, remedy: Remedy::Operator }, retry_after: None }
        }
        LwaError::Refused { code } => Outcome::Refused(code),
    }
}

/// In `0.0..1.0`.
fn jitter() -> f64 {
    // Without randomness there is no jitter, which is no reason to fail.
    getrandom::u64().map_or(0.5, |bits| (bits >> 11) as f64 / (1u64 << 53) as f64)
}
