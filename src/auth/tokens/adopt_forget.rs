//! What a caller or an operator does to one user's grant: adopt a new one, forget it on logout, refresh it now.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::refresh_task::RefreshReason;
use super::user_state::{UserState, Writing};
use super::{Status, TokenError, TokenManager, WAIT_FOR_RETRY, WAIT_WITHOUT_TOKEN};
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, GrantState, LiveGrant, Remedy};
use crate::store::StoreError;

impl TokenManager {
    /// Runs `work` in its own task, which a shutdown waits for, and returns its result. The work continues if the
    /// caller hangs up.
    ///
    /// # Panics
    /// If `work` panics.
    pub async fn uninterrupted<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        match self.0.tasks.spawn(work).await {
            Ok(done) => done,
            // The task is never aborted, so it panicked: propagate the panic to the caller.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Replaces the grant of `user` with `grant`. Returns once it is stored or the store has failed: then it is used
    /// from memory, since its code is spent and nobody else has it, and a task retries until it is stored.
    pub async fn adopt(&self, user: &UserId, grant: Grant) -> Status {
        let (manager, user) = (self.clone(), user.clone());
        self.uninterrupted(async move { Box::pin(manager.adopt_now(&user, grant)).await }).await
    }

    async fn adopt_now(&self, user: &UserId, grant: Grant) -> Status {
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        self.replace(&entry, &write, grant).await;
        tracing::info!(%user, "new grant in use");
        self.status_of(&entry)
    }

    /// Stores `grant`, whatever the user has, and uses it.
    pub(super) async fn replace(&self, entry: &Arc<UserState>, write: &Writing<'_>, mut grant: Grant) {
        grant.generation = write.next_generation();
        grant.used_at = Some(self.0.clock.now());
        self.store(entry, write, &mut grant, None).await;
        self.use_now(entry, write, grant);
    }

    fn use_now(&self, entry: &Arc<UserState>, write: &Writing<'_>, grant: Grant) {
        let now = self.0.clock.reading();
        entry.mark_used(now);
        // What became of the grant before it does not matter any more.
        self.0.interrupted.end(&entry.user);
        self.publish(entry, write, GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now))));
        entry.wake();
    }

    /// Replaces the grant of `user` that has the generation `seen`, `None` if the user has none, with `grant`, which no
    /// person has just consented to. If there is another one now, that one is kept, and `false` returned.
    pub(super) async fn adopt_instead(
        &self,
        user: &UserId,
        mut grant: Grant,
        seen: Option<u64>,
    ) -> Result<bool, StoreError> {
        let entry = self.entry_or_new(user);
        let write = entry.write().await;
        self.catch_up(&entry, &write).await?;
        let is_seen = entry.held().grant().map(|grant| grant.generation) == seen;
        match (is_seen, self.0.store.shared()) {
            (true, None) => self.replace(&entry, &write, grant).await,
            (true, Some(shared)) => {
                grant.used_at = Some(self.0.clock.now());
                let Some(version) = self.timed("put", shared.put_new(user, &grant, entry.stored())).await? else {
                    return self.not_adopted(&entry, &write).await;
                };
                grant.generation = version.generation;
                write.note_stored(version);
                self.use_now(&entry, &write, grant);
            }
            (false, _) => return self.not_adopted(&entry, &write).await,
        }
        tracing::info!(%user, "amazon.refresh_token is in use");
        Ok(true)
    }

    async fn not_adopted(&self, entry: &Arc<UserState>, write: &Writing<'_>) -> Result<bool, StoreError> {
        tracing::info!(user = %entry.user, "amazon.refresh_token is not adopted: another login came first");
        self.catch_up(entry, write).await.map(|_| false)
    }

    /// Whether the current grant of `user` is stored.
    pub fn is_stored(&self, user: &UserId) -> bool {
        self.entry(user).is_none_or(|entry| !entry.is_unsaved())
    }

    /// Deletes the tokens of `user`. Returns once they are deleted from the store; `false` if there were none.
    ///
    /// # Errors
    /// [`StoreError`] if the store fails; then the grant stays in use.
    pub async fn forget(&self, user: &UserId) -> Result<bool, StoreError> {
        let (manager, user) = (self.clone(), user.clone());
        self.uninterrupted(async move { Box::pin(manager.forget_now(&user)).await }).await
    }

    async fn forget_now(&self, user: &UserId) -> Result<bool, StoreError> {
        let Some(entry) = self.entry(user) else {
            // A record that cannot be decrypted has no entry, but a logout must delete it too.
            return self.timed("erase", self.0.store.erase(user)).await;
        };
        let write = entry.write().await;
        let erased = match self.0.store.shared() {
            None => self.timed("erase", self.0.store.erase(user)).await?,
            Some(shared) => {
                // In a shared store a logout has its own version.
                let (was_present, version) = self.timed("erase", shared.log_out(user)).await?;
                write.note_stored(version);
                was_present
            }
        };
        entry.set_unsaved(false);
        let held = entry.held().grant().is_some();
        self.0.interrupted.end(user);
        self.publish(&entry, &write, GrantState::Nothing);
        entry.wake();
        tracing::info!(%user, "the user was logged out");
        Ok(erased || held)
    }

    /// Refreshes the token of `user` now, even if it is still valid, or joins the running refresh.
    ///
    /// # Errors
    /// [`TokenError::LoginRequired`] if the user has no usable grant; [`TokenError::Unavailable`] if the refresh
    /// failed, did not end within 12 s, or if the shared store cannot be read.
    pub async fn refresh(&self, user: &UserId) -> Result<Status, TokenError> {
        let no_grant = TokenError::LoginRequired { reason: "no_grant" };
        let entry = self.find(user).await?;
        let held = entry.held().clone();
        if let GrantState::Failing { retry_at, .. } = &*held {
            let _ = timeout(WAIT_FOR_RETRY, self.0.clock.sleep_until(*retry_at)).await;
        }
        let before = entry.held().grant().map(|grant| grant.generation);
        let is_unchanged = || matches!(&**entry.held(), GrantState::Fresh(grant) if Some(grant.generation) == before);
        let until = Instant::now() + WAIT_WITHOUT_TOKEN;
        loop {
            let changed = entry.changed();
            if entry.held().backs_off(self.0.clock.reading()) {
                break;
            }
            self.start_refresh(&entry, RefreshReason::Manual);
            // A task that was running already may have had nothing to do: then this one begins another.
            if timeout_at(until, changed.wait()).await.is_err() || !is_unchanged() {
                break;
            }
        }
        let now = self.0.clock.reading();
        match &**entry.held() {
            GrantState::Nothing => Err(no_grant),
            GrantState::LoginRequired { reason, .. } => Err(TokenError::LoginRequired { reason }),
            GrantState::Failing { failure, retry_at, .. } => Err(TokenError::Unavailable {
                code: failure.code,
                remedy: failure.remedy,
                detail: failure.detail.clone(),
                retry_after: Duration::try_from(*retry_at - now.uptime).unwrap_or_default(),
            }),
            GrantState::Fresh(grant) if Some(grant.generation) == before => Err(TokenError::Unavailable {
                code: "timeout",
                remedy: Remedy::Time,
                detail: None,
                retry_after: Duration::from_secs(1),
            }),
            GrantState::Fresh(_) => Ok(self.status_of(&entry)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::lwa::{self, Lwa};
    use crate::auth::tokens::Settings;
    use crate::domain::account::Region;
    use crate::domain::clock::Clock;
    use crate::domain::grant::{Access, AccessToken, RefreshPolicy, RefreshToken};
    use crate::domain::secret::Secret;
    use crate::store::keyring::Keyring;
    use crate::store::{self, TokenStore};
    use crate::telemetry::metrics::{self, Metrics};

    /// A manager with a store in `directory`, for which Login with Amazon is out of reach.
    fn manager(directory: &tempfile::TempDir, clock: &Clock) -> TokenManager {
        let policy = RefreshPolicy {
            margin: Duration::from_mins(5),
            ahead: Duration::from_mins(15),
            idle_after: Duration::from_hours(1),
        };
        let settings = Settings { policy, sweep: Duration::from_mins(5), concurrency: 1, cache: 10, adopt: None };
        let lwa = lwa::Settings {
            client_id: "client".into(),
            client_secrets: vec![Secret::new("secret")],
            redirect_uri: "http://localhost:8001/".into(),
            scope: "profile".into(),
            region: Region::default(),
            authorize_url: None,
            // Nobody listens at this port, which programs may not take.
            token_url: Some("https://127.0.0.1:1/".parse().unwrap()),
            proxy: None,
            extra_roots: Vec::new(),
        };
        let keyring = Arc::new(Keyring::new(&[Keyring::generate_key()]).unwrap());
        let at = store::Settings { path: directory.path().join("store"), postgres: None };
        let (store, _) = TokenStore::open(&at, keyring).unwrap();
        let metrics = Arc::new(Metrics::new(metrics::Settings { max_user_series: 1 }, 0.0).unwrap());
        TokenManager::new(settings, store, [], Lwa::new(lwa).unwrap(), clock.clone(), metrics).0
    }

    // One thread: a task that was begun runs once somebody waits for it.
    #[tokio::test]
    async fn a_manual_refresh_that_joined_a_task_with_nothing_to_do_makes_a_token_call() {
        let (directory, clock) =
            (tempfile::TempDir::new().unwrap(), Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap()));
        let (manager, user, now) = (manager(&directory, &clock), UserId::default(), clock.now());
        let grant = Grant {
            refresh_token: RefreshToken::new("Atzr|x".to_owned()).unwrap(),
            previous: None,
            access: Some(Access {
                token: AccessToken::new("Atza|x".to_owned()).unwrap(),
                expires_at: now + jiff::SignedDuration::from_hours(1),
            }),
            updated_at: now,
            consented_at: None,
            used_at: None,
            scope: None,
            generation: 0,
        };
        manager.adopt(&user, grant).await;
        // The token is fresh, and this task finds that out when it runs.
        manager.start_refresh(&manager.entry(&user).unwrap(), RefreshReason::OnDemand);
        let Err(TokenError::Unavailable { code, .. }) = manager.refresh(&user).await else {
            panic!("Login with Amazon is out of reach")
        };
        assert_eq!(code, "unreachable");
    }
}
