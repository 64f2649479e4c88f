//! One refresh, from the decision to the stored result: a task of its own that no caller can cancel.
//!
//! The file is a little over 400 lines: the order of its steps keeps the promises about tokens, so they stand together.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures_util::FutureExt;
use http::HeaderValue;
use tokio::time::Instant;

use super::user_state::{UserState, Writing};
use super::{GrantState, TokenManager};
use crate::auth::lwa::LwaError;
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{Failure, Grant, LiveGrant, Outcome, RefreshToken, Remedy, Tokens, Version};
use crate::store::StoreError;

/// Interval between attempts to store a grant that is newer in memory than on disk.
pub(super) const STORE_RETRY: Duration = Duration::from_secs(1);

/// Why a refresh was requested.
#[derive(Clone, Debug)]
pub(super) enum RefreshReason {
    /// The background schedule: the refresh is due.
    Due,
    /// The refresh was due, and this process has claimed it in a shared store.
    Claimed {
        /// The generation whose lease this process has.
        generation: u64,
        /// Whether another process ended during a refresh of it.
        interrupted: bool,
    },
    /// A caller needs a token, and the current one expires within the margin or has expired.
    OnDemand,
    /// Amazon rejected this token.
    Rejected(HeaderValue),
    /// A person or an app requested it at the refresh endpoint.
    Manual,
}

/// A running refresh task. Dropping it marks the task as finished and wakes all waiters.
pub(super) struct RefreshTask {
    pub(super) manager: TokenManager,
    pub(super) entry: Arc<UserState>,
}

impl Drop for RefreshTask {
    fn drop(&mut self) {
        self.entry.end_refresh();
    }
}

impl TokenManager {
    /// Spawns a refresh task, unless one is running for this user.
    pub(super) fn start_refresh(&self, entry: &Arc<UserState>, why: RefreshReason) {
        if entry.try_begin_refresh() {
            let task = RefreshTask { manager: self.clone(), entry: entry.clone() };
            self.0.tasks.spawn(task.run(why));
        }
    }

    /// As [`start_refresh`](Self::start_refresh), but waits until the refresh task has finished, including one that was
    /// already running.
    pub(super) async fn refresh_and_wait(&self, entry: &Arc<UserState>, why: RefreshReason) {
        let changed = entry.changed();
        if entry.try_begin_refresh() {
            RefreshTask { manager: self.clone(), entry: entry.clone() }.run(why).await;
        } else {
            changed.wait().await;
        }
    }

    /// Stores `grant` before it is published. If the store fails, a task retries until it succeeds, and the grant is
    /// used meanwhile, since losing it helps nobody. Returns `false` if another process stored a different grant: then
    /// this one must not be used.
    pub(super) async fn store(
        &self,
        entry: &Arc<UserState>,
        write: &Writing<'_>,
        grant: &mut Grant,
        expected: Option<u64>,
    ) -> bool {
        let user = &entry.user;
        let expected = self.0.coordination.expected(expected);
        let since = Instant::now();
        let mut saved = self.save(entry, grant, expected).await;
        if matches!(saved, Err(StoreError::Conflict)) && expected.is_some() {
            saved = match self.store_over_loss(entry, write, grant).await {
                Ok(true) => Ok(entry.stored()),
                Ok(false) => return false,
                Err(error) => Err(error),
            };
        }
        match saved {
            Ok(version) => {
                grant.generation = version.generation;
                write.note_stored(version);
                entry.set_unsaved(false);
                return true;
            }
            Err(error) => {
                tracing::error!(%user, %error, "token_not_persisted: the grant is in memory only; adsidecar keeps \
                    trying to store it");
            }
        }
        entry.set_unsaved(true);
        self.0.unsaved.fetch_add(1, Relaxed);
        self.0.tasks.spawn(keep_storing(self.clone(), entry.clone(), grant.clone(), expected, since));
        true
    }

    /// Stores `grant`, and returns its version in the store.
    pub(super) async fn save(
        &self,
        entry: &UserState,
        grant: &Grant,
        expected: Option<u64>,
    ) -> Result<Version, StoreError> {
        let user = &entry.user;
        match (self.0.store.shared(), expected) {
            (Some(shared), None) => self.timed("put", shared.consent(user, grant, Duration::ZERO)).await,
            (Some(shared), Some(generation)) => {
                let of = Version { generation, ..entry.stored() };
                // The others look for a refresh that was due, and have to be told of any other.
                let early = entry.is_unsaved() || self.overdue(entry).is_none();
                self.timed("put", shared.put_refreshed(user, grant, of, early)).await
            }
            _ => {
                let generation = self.timed("put", self.0.store.save(user, grant, expected)).await?;
                Ok(Version { generation, ..entry.stored() })
            }
        }
    }
}

impl RefreshTask {
    /// Runs the refresh. A panic is caught and recorded as a failure, so that no waiter waits forever.
    async fn run(self, why: RefreshReason) {
        if AssertUnwindSafe(self.refresh(why)).catch_unwind().await.is_err() {
            // A bug of ours. The recorded failure backs off, so that waiters do not retry at once into the same panic.
            let failure = Failure { code: "internal", remedy: Remedy::Time, detail: None };
            self.manager.0.metrics.token_refresh.with_label_values(&["failure", failure.code]).inc();
            self.fail(failure).await;
        }
    }

    async fn fail(&self, failure: Failure) {
        let write = self.entry.write().await;
        let (held, now) = (self.entry.held().clone(), self.manager.0.clock.reading());
        let next = held.next(Outcome::Failed { failure, retry_after: None }, now, jitter());
        self.log(&held, &next);
        self.manager.publish(&self.entry, &write, next);
    }

    async fn refresh(&self, why: RefreshReason) {
        let grant = match self.acquire(&why).await {
            Ok(Some(grant)) => grant,
            Ok(None) => return,
            Err(failure) => return self.fail(failure).await,
        };
        fail_point!("refresh_begun");
        let is_background = matches!(why, RefreshReason::Due | RefreshReason::Claimed { .. });
        let response = self.refresh_with_fallback(&grant, is_background).await;
        fail_point!("refresh_answered", |_| std::process::abort());
        let write = self.entry.write().await;
        let Some(held) = write.unchanged_since(grant.generation).or_else(|| self.restored(&grant)) else {
            return self.dropped();
        };
        let generation = held.grant().map_or(grant.generation, |held| held.generation);
        let outcome = match response {
            Ok((tokens, sent_at)) => match self.store_refreshed(&write, &grant, generation, tokens, sent_at).await {
                Some(refreshed) => Outcome::Refreshed(refreshed),
                None => return,
            },
            Err(outcome) => outcome,
        };
        let (refused, has_failed) =
            (matches!(outcome, Outcome::Rejected(_)), !matches!(outcome, Outcome::Refreshed(_)));
        let mut next = held.next(outcome, self.manager.0.clock.reading(), jitter());
        if has_failed {
            next = self.store_failure(generation, next, refused).await;
        }
        self.log(&held, &next);
        // Waiters are woken when this task is dropped: if woken now, a retry would join a task that has nothing left to
        // do.
        self.manager.publish(&self.entry, &write, next);
        drop(write);
        if refused {
            self.after_refusal(generation).await;
        }
    }

    /// Stores what a refresh of `grant` yielded, in place of what is stored under `generation`. `None` if the grant was
    /// replaced or logged out meanwhile.
    async fn store_refreshed(
        &self,
        write: &Writing<'_>,
        grant: &LiveGrant,
        generation: u64,
        tokens: Tokens,
        sent_at: ClockReading,
    ) -> Option<Arc<LiveGrant>> {
        // The token's lifetime began when LWA issued it, which was not before the request.
        let mut refreshed = grant.refreshed(tokens, sent_at.wall);
        refreshed.used_at = Some(sent_at.wall_at(self.entry.used()));
        refreshed.generation = write.next_generation();
        if refreshed.previous.is_some() && grant.previous.as_ref() != Some(&refreshed.refresh_token) {
            self.manager.0.metrics.token_rotations.inc();
            tracing::info!(user = %self.entry.user, "Login with Amazon issued a new refresh token");
        }
        if !self.manager.store(&self.entry, write, &mut refreshed, Some(generation)).await {
            self.dropped();
            self.manager.overtaken(&self.entry, write).await;
            return None;
        }
        fail_point!("refresh_stored", |_| std::process::abort());
        self.end_refresh_with("recovered");
        Some(Arc::new(LiveGrant::issued(refreshed, sent_at)))
    }

    /// Stores how the refresh of `generation` failed, for all processes. Returns the state that follows: `next`, or
    /// that another process was refused.
    async fn store_failure(&self, generation: u64, next: GrantState, refused: bool) -> GrantState {
        if refused {
            // Before it is stored: a process that reads the refusal in the row does not report the loss.
            self.end_refresh_with("lost");
        }
        // A refusal says itself what became of the grant.
        let may_be_lost = !refused && self.manager.0.interrupted.is_lost(&self.entry.user);
        let elsewhere = self.release(generation, Some(&next), may_be_lost).await;
        if elsewhere.is_some() {
            self.end_refresh_with("lost");
        }
        fail_point!("refresh_released");
        self.manager.0.interrupted.answered(&self.entry.user);
        self.manager.settle_journal().await;
        elsewhere.unwrap_or(next)
    }

    /// The current state, if it is the same grant under another generation: this process has stored it again since,
    /// because the database had lost it. What a refresh of it yielded is not dropped then, or it would be lost.
    fn restored(&self, grant: &LiveGrant) -> Option<Arc<GrantState>> {
        let held = self.entry.held();
        held.grant().is_some_and(|held| held.refresh_token == grant.refresh_token).then(|| held.clone())
    }

    fn dropped(&self) {
        let user = &self.entry.user;
        self.manager.0.interrupted.end(user);
        self.manager.0.metrics.refresh_dropped.inc();
        tracing::info!(%user, "refresh result dropped: the grant was replaced or logged out meanwhile");
    }

    /// Refreshes with the grant's refresh token. If LWA refuses it and it has never been used successfully, tries the
    /// previous one: a rotation may have been lost on LWA's side.
    async fn refresh_with_fallback(
        &self,
        grant: &LiveGrant,
        is_background: bool,
    ) -> Result<(Tokens, ClockReading), Outcome> {
        let response = self.token_call(grant, &grant.refresh_token, is_background).await;
        let (Err(Outcome::Rejected(_)), Some(previous)) = (&response, &grant.previous) else { return response };
        let (tokens, sent_at) = self.token_call(grant, previous, is_background).await?;
        tracing::warn!(user = %self.entry.user, "Login with Amazon refuses the refresh token it issued last, but \
            accepts the previous one");
        let refresh = tokens.refresh.or_else(|| Some(previous.clone()));
        Ok((Tokens { refresh, ..tokens }, sent_at))
    }

    /// Sends one token request to LWA, unless LWA has just refused our client. Returns the tokens and the time of the
    /// request.
    async fn token_call(
        &self,
        grant: &LiveGrant,
        refresh_token: &RefreshToken,
        is_background: bool,
    ) -> Result<(Tokens, ClockReading), Outcome> {
        let TokenManager(inner) = &self.manager;
        let permit = self.manager.call_permit(is_background).await?;
        let user = &self.entry.user;
        let lwa = inner.lwa.load_full();
        let begun = std::time::Instant::now();
        let mut sent_at = inner.clock.reading();
        let mut response = Err(LwaError::Operator { code: "invalid_client" });
        for secret in 0..lwa.secrets() {
            // Each request is made under a lease that outlives it, and for a grant that is still the stored one.
            self.prepare(grant.generation).await.map_err(|failure| Outcome::Failed { failure, retry_after: None })?;
            sent_at = inner.clock.reading();
            response = lwa.refresh_with(refresh_token, secret).await;
            if !matches!(response, Err(LwaError::Operator { code: "invalid_client" })) {
                break;
            }
        }
        inner.metrics.token_refresh_duration.observe(begun.elapsed().as_secs_f64());
        if inner.circuit.brake().update(&self.entry.user, &response, sent_at, inner.clock.reading(), jitter()) {
            self.manager.share_brake().await;
        }
        drop(permit);
        self.count(&response);
        match response {
            Ok(tokens) => {
                tokens
                    .oddities
                    .iter()
                    .for_each(|kind| inner.metrics.token_answer_oddities.with_label_values(&[kind]).inc());
                if let Some(server_time) = tokens.server_time {
                    self.manager.observe_server_time(server_time);
                }
                Ok((tokens, sent_at))
            }
            Err(error) => {
                if matches!(error, LwaError::TryLater { taken: true, .. }) {
                    inner.interrupted.lost(user, grant.generation);
                }
                Err(outcome(error))
            }
        }
    }

    /// Records that a refresh ended with a known outcome. If the response to an earlier refresh may have been lost,
    /// counts and logs what became of the grant: `end` is `recovered` or `lost`.
    fn end_refresh_with(&self, end: &str) {
        let user = &self.entry.user;
        if !self.manager.0.interrupted.end(user) {
            return;
        }
        self.manager.0.metrics.refresh_interrupted.with_label_values(&[end]).inc();
        if end == "lost" {
            tracing::error!(%user, "the response to an earlier refresh was lost, and Login with Amazon now refuses the \
                grant: if that response held a new refresh token, it is lost; the user has to log in again");
        } else {
            tracing::info!(%user, "the response to an earlier refresh was lost; the grant still works");
        }
    }

    async fn after_refusal(&self, generation: u64) {
        fail_point!("refresh_refused");
        // At startup the stored grant's validity was unknown: amazon.refresh_token may be there to replace it.
        if self.entry.user == UserId::default()
            && let Err(error) = self.manager.adopt_configured_instead(Some(generation)).await
        {
            tracing::error!(%error, "amazon.refresh_token could not be stored; adsidecar tries again at the next \
                start");
        }
    }

    /// The grant to refresh, if `why` still holds: a wake-up is only a hint, and the refresh may have happened since.
    pub(super) fn wanted(&self, why: &RefreshReason) -> Option<Arc<LiveGrant>> {
        let held = self.entry.held();
        let (now, policy) = (self.manager.0.clock.reading(), self.manager.policy());
        let wanted = match why {
            RefreshReason::Due => self.entry.due(policy, now).is_some_and(|due| due <= now.uptime),
            RefreshReason::OnDemand => held.expiring(policy, now),
            // The rejected token may have expired meanwhile.
            RefreshReason::Rejected(bearer) => held.valid_token(now).is_none_or(|access| access.bearer() == bearer),
            RefreshReason::Manual | RefreshReason::Claimed { .. } => true,
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
        self.manager.0.metrics.token_refresh.with_label_values(&[result, reason]).inc();
        if let Err(error) = answer {
            tracing::debug!(user = %self.entry.user, %error, "refresh failed");
        }
    }

    /// Logs a change of state; a repeated failure is logged once.
    fn log(&self, before: &GrantState, after: &GrantState) {
        let user = &self.entry.user;
        match (before, after) {
            (GrantState::Fresh(_), GrantState::Fresh(_)) => tracing::debug!(%user, "token refreshed"),
            (_, GrantState::Fresh(_)) => tracing::info!(%user, "token refreshed; the user has recovered"),
            (GrantState::Failing { failure: old, .. }, GrantState::Failing { failure, .. })
                if old.code == failure.code => {}
            (_, GrantState::Failing { failure, .. }) if failure.remedy == Remedy::Operator => {
                tracing::error!(%user, code = failure.code, "Login with Amazon refuses the client: check \
                    amazon.client_id and amazon.client_secret");
            }
            (_, GrantState::Failing { failure, .. }) => {
                let cause = failure.detail.as_deref();
                tracing::warn!(%user, code = failure.code, cause, "refresh failed and will be retried; the previous \
                    token is used until it expires");
            }
            (GrantState::LoginRequired { .. }, GrantState::LoginRequired { .. }) => {}
            (_, GrantState::LoginRequired { reason, .. }) => {
                tracing::warn!(%user, reason, "Login with Amazon refuses the grant: the user has to log in again");
            }
            (_, GrantState::Nothing) => {}
        }
    }
}

/// Retries until `grant` is stored or superseded.
async fn keep_storing(
    manager: TokenManager,
    entry: Arc<UserState>,
    mut grant: Grant,
    expected: Option<u64>,
    since: Instant,
) {
    loop {
        tokio::time::sleep(STORE_RETRY).await;
        let write = entry.write().await;
        if write.unchanged_since(grant.generation).is_none() {
            break;
        }
        match manager.store_again(&entry, &write, &mut grant, expected, since).await {
            Ok(()) => {
                tracing::info!(user = %entry.user, "the grant that was in memory only is now stored");
                break;
            }
            Err(StoreError::Closed) => break,
            Err(_) => {}
        }
    }
    manager.0.unsaved.fetch_sub(1, Relaxed);
}

fn outcome(error: LwaError) -> Outcome {
    match error {
        LwaError::TryLater { code, retry_after, detail, .. } => {
            let failure = Failure { code, remedy: Remedy::Time, detail: Some(detail.into()) };
            Outcome::Failed { failure, retry_after }
        }
        LwaError::Operator { code } => {
            Outcome::Failed { failure: Failure { code, remedy: Remedy::Operator, detail: None }, retry_after: None }
        }
        LwaError::Refused { code } => Outcome::Rejected(code),
    }
}

/// Random jitter in `0.0..1.0`.
pub fn jitter() -> f64 {
    // Without randomness there is no jitter; a constant is good enough.
    getrandom::u64().map_or(0.5, |bits| (bits >> 11) as f64 / (1u64 << 53) as f64)
}
