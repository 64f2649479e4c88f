//! LoginStarted and finish a login: the authorization code grant (RFC 6749, section 4.1) with PKCE (RFC 7636).
//!
//! A state is 256 random bits, kept as its hash, good for ten minutes and for one callback: it is taken out before the
//! code is exchanged. A login that a browser began is bound to that browser by a cookie (RFC 9700, section 4.7). Both what
//! has begun and what waits survive a restart: see [`PendingLogins`].

mod pending_logins;
pub mod same_identity;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use url::Url;

use crate::auth::login::same_identity::Identity;
use crate::auth::lwa::Lwa;
use crate::auth::tokens::{Status, TokenManager};
use crate::domain::account::{Region, UserId};
use crate::domain::clock::Clock;
use crate::domain::grant::{Access, Grant, Tokens};
use crate::domain::secret::Secret;
use crate::store::{StoreError, Waiting};
use pending_logins::{Begun, hash};
pub use pending_logins::{PendingLogins, TEN_MINUTES};

/// What a login needs to know beside the LWA client.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `login.frontend_url`: where a browser is sent after the callback.
    pub frontend_url: Option<Url>,
    /// `login.confirm`: grants of logins that a server began wait for `POST …/confirm`. Default: on where the login
    /// door is on.
    pub confirm: bool,
    /// `environment = production`: cookies carry `Secure`.
    pub secure_cookies: bool,
}

/// Interval for finishing logins that other processes left.
const LEFTOVERS_INTERVAL: Duration = Duration::from_secs(20);

/// All logins that have begun and not ended. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Login(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    lwa: Lwa,
    tokens: TokenManager,
    identity: Identity,
    clock: Clock,
    desk: Arc<PendingLogins>,
}

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct LoginRequest {
    /// For whom.
    pub user: UserId,
    /// Whose consent page.
    pub region: Region,
    /// Where on the frontend's origin to go afterwards: path and query.
    pub return_to: Option<String>,
    /// Whether another Amazon identity may take the user's place.
    pub replace: bool,
    /// Whether a browser asks, so that the login is bound to it by a cookie.
    pub by_browser: bool,
}

/// A login that has begun.
#[derive(Debug)]
pub struct LoginStarted {
    /// Where to send the user.
    pub auth_url: Url,
    /// The state in it.
    pub state: Secret,
    /// The binding cookie's name and value, for a browser.
    pub cookie: Option<(String, Secret)>,
}

/// Why a login does not begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The consent page has no URL.
    #[error(transparent)]
    Page(#[from] url::ParseError),
    /// Too many began just now; says after what time there is room.
    #[error("too many logins began just now")]
    TooMany(Duration),
    /// The store that several processes share does not take it.
    #[error(transparent)]
    Store(StoreError),
}

/// How a login ended well.
#[derive(Debug)]
pub enum LoginOutcome {
    /// The grant is in use.
    Stored(Box<Status>),
    /// The grant waits for the app's confirmation under this one-time id.
    Pending(Secret),
}

/// How a login ended badly; [`LoginFailure::code`] is the callback's `error`.
#[derive(Debug)]
pub enum LoginFailure {
    /// Amazon's own error, mapped to the fixed list.
    Amazon(&'static str),
    /// No such state, or no longer, or not this browser's.
    State,
    /// LWA gave no grant for the code.
    Exchange,
    /// Another Amazon identity than the user's.
    Identity,
}

impl LoginFailure {
    /// One of the contract's list.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Amazon(code) => code,
            Self::State => "state_invalid",
            Self::Exchange => "exchange_failed",
            Self::Identity => "identity_changed",
        }
    }
}

/// A callback's parameters that matter, already checked to be there once at most.
#[derive(Debug)]
pub struct Callback {
    /// `state`.
    pub state: Secret,
    /// `code`, or `error`.
    pub answer: Result<Secret, String>,
    /// `scope`.
    pub scope: Option<String>,
}

impl Login {
    /// Logins at `desk`.
    pub fn new(
        settings: Settings,
        lwa: Lwa,
        tokens: TokenManager,
        identity: Identity,
        clock: Clock,
        desk: Arc<PendingLogins>,
    ) -> Self {
        Self(Arc::new(Inner { settings, lwa, tokens, identity, clock, desk }))
    }

    /// Where browsers go afterwards.
    pub fn frontend_url(&self) -> Option<&Url> {
        self.0.settings.frontend_url.as_ref()
    }

    /// The path of `amazon.redirect_uri`: where a login's cookie has to come back.
    pub fn callback_path(&self) -> &str {
        self.0.lwa.redirect_path()
    }

    /// Whether cookies carry `Secure`.
    pub fn secure_cookies(&self) -> bool {
        self.0.settings.secure_cookies
    }

    /// `return_to` on the frontend's origin; `None` where it would lead elsewhere.
    pub fn return_url(&self, return_to: &str) -> Option<Url> {
        let frontend = self.frontend_url()?;
        // The URL standard reads a backslash as a slash, so `/\evil` would be a host.
        let plain =
            return_to.starts_with('/') && !return_to.starts_with("//") && !return_to.contains(['\\', '\t', '\n', '\r']);
        let url = frontend.join(return_to).ok()?;
        (plain && url.origin() == frontend.origin()).then_some(url)
    }

    /// Begins a login.
    pub async fn begin(&self, wish: LoginRequest) -> Result<LoginStarted, BeginError> {
        let (state, verifier) = (random(), random());
        let challenge = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(verifier.as_bytes()));
        let auth_url = self.0.lwa.authorize_url(wish.region, &state, &challenge)?;
        let cookie = wish.by_browser.then(|| (cookie_name(&state), random()));
        let begun = Begun {
            user: wish.user,
            verifier: Secret::new(verifier),
            return_to: wish.return_to,
            replace: wish.replace,
            cookie: cookie.as_ref().map(|(_, value)| hash(value)),
        };
        self.0.desk.begin(&state, begun, &self.0.clock).await?;
        let cookie = cookie.map(|(name, value)| (name, Secret::new(value)));
        Ok(LoginStarted { auth_url, state: Secret::new(state), cookie })
    }

    /// Finishes a login with what Amazon sent back. `cookie` gives the request's cookie of a name. Beside the end comes
    /// the login's `return_to`, where the state was good.
    pub async fn finish(
        &self,
        callback: Callback,
        cookie: impl FnOnce(&str) -> Option<String>,
    ) -> (Result<LoginOutcome, LoginFailure>, Option<String>) {
        let now = self.0.clock.now();
        let begun = match self.0.desk.take_begun(callback.state.expose(), now).await {
            Ok(Some(begun)) => begun,
            Ok(None) => return (Err(LoginFailure::State), None),
            Err(error) => {
                tracing::error!(%error, "the store does not answer: the login has to begin again");
                return (Err(LoginFailure::Amazon("temporarily_unavailable")), None);
            }
        };
        let bound = begun.cookie.as_deref().is_none_or(|wanted| {
            cookie(&cookie_name(callback.state.expose())).is_some_and(|value| hash(&value) == wanted)
        });
        if !bound {
            return (Err(LoginFailure::State), None);
        }
        let return_to = begun.return_to.clone();
        let ended = match callback.answer {
            Err(error) => Err(LoginFailure::Amazon(known_error(&error))),
            // A code is good for one exchange: a browser that goes away in the middle of it must not lose the grant.
            Ok(code) => {
                let login = self.clone();
                let exchange = async move { login.exchange(&code, begun, callback.scope).await };
                self.0.tokens.uninterrupted(exchange).await
            }
        };
        (ended, return_to)
    }

    async fn exchange(&self, code: &Secret, begun: Begun, scope: Option<String>) -> Result<LoginOutcome, LoginFailure> {
        let Begun { user, verifier, replace, cookie, .. } = begun;
        let asked_at = self.0.clock.now();
        let tokens = self.0.lwa.exchange(code, &verifier).await.map_err(|error| {
            tracing::warn!(%user, %error, "the code was not exchanged");
            LoginFailure::Exchange
        })?;
        let grant = granted(tokens, scope, asked_at).ok_or_else(|| {
            tracing::warn!(%user, "the code was exchanged, but the answer held no refresh token");
            LoginFailure::Exchange
        })?;
        self.warn_of_missing_scopes(&user, &grant);
        let (id, confirm) = (random(), cookie.is_none() && self.0.settings.confirm);
        let waiting = Waiting { id: hash(&id), user, since: self.0.clock.now(), replace, confirm, grant };
        self.0.desk.put_down(&waiting).await;
        match self.conclude(waiting).await? {
            Some(status) => Ok(LoginOutcome::Stored(Box::new(status))),
            None => Ok(LoginOutcome::Pending(Secret::new(id))),
        }
    }

    /// What becomes of a grant that was put down: it is refused, taken into use, or waits for its confirmation.
    async fn conclude(&self, waiting: Waiting) -> Result<Option<Status>, LoginFailure> {
        if !waiting.replace && self.is_of_another(&waiting).await {
            self.0.desk.clear(&waiting.id).await;
            tracing::warn!(user = %waiting.user, "another Amazon identity logged in for this user and was refused");
            return Err(LoginFailure::Identity);
        }
        if waiting.confirm {
            self.0.desk.wait(waiting, self.0.clock.now()).await;
            return Ok(None);
        }
        Ok(Some(self.take_into_use(waiting).await))
    }

    async fn take_into_use(&self, waiting: Waiting) -> Status {
        let status = self.0.tokens.adopt(&waiting.user, waiting.grant).await;
        // Until it is stored as the user's own it stays as one that waits; who looks for those finds it in use.
        if self.0.tokens.is_stored(&waiting.user) {
            self.0.desk.clear(&waiting.id).await;
        }
        status
    }

    /// Whether a new grant is surely of another Amazon identity than the grant that its user has now.
    async fn is_of_another(&self, new: &Waiting) -> bool {
        let Some(access) = &new.grant.access else { return false };
        match self.0.tokens.bearer(&new.user).await {
            Ok(current) => Box::pin(self.0.identity.differs(&current, access.token.bearer())).await,
            // There is no grant to compare with, or none that still says anything.
            Err(_) => false,
        }
    }

    /// Takes a pending grant into use; `None` where there is none under `id`.
    pub async fn confirm(&self, id: &str) -> Result<Option<Status>, StoreError> {
        let Some(waiting) = self.0.desk.take_waiting(id, self.0.clock.now()).await? else { return Ok(None) };
        let login = self.clone();
        Ok(Some(self.0.tokens.uninterrupted(async move { login.take_into_use(waiting).await }).await))
    }

    /// Finishes logins that another process left unfinished: their codes are spent, and their grants are not in use yet.
    /// Grants that the app has to confirm keep waiting. Returns when to look again; `None` where no other process shares
    /// the store, so that nothing can be left later.
    pub async fn finish_leftovers(&self) -> Option<Duration> {
        for waiting in self.0.desk.left(self.0.clock.now()).await {
            // Where the store does not answer, what is known here decides.
            let _ = self.0.tokens.look(&waiting.user).await;
            let (user, in_use) = (waiting.user.clone(), self.0.tokens.status(&waiting.user).consented_at);
            if in_use >= waiting.grant.consented_at {
                // It, or a later login, was taken into use before the end.
                self.0.desk.clear(&waiting.id).await;
                continue;
            }
            if waiting.confirm {
                // When it began to wait, and not now: its ten minutes are not prolonged.
                let since = waiting.since;
                self.0.desk.wait(waiting, since).await;
            } else if self.conclude(waiting).await.is_ok() {
                tracing::info!(%user, "a login that was under way at the last end is finished");
            }
        }
        self.0.desk.is_shared().then_some(LEFTOVERS_INTERVAL)
    }

    /// Wipes the tokens of `user`, those of a grant that waits among them.
    pub async fn forget(&self, user: &UserId) -> Result<bool, StoreError> {
        self.0.desk.forget(user);
        self.0.tokens.forget(user).await
    }

    fn warn_of_missing_scopes(&self, user: &UserId, grant: &Grant) {
        let Some(granted) = &grant.scope else { return };
        let missing = |asked: &&str| !granted.split(' ').any(|scope| scope == *asked);
        let missing: Vec<_> = self.0.lwa.scope().split(' ').filter(missing).collect();
        if !missing.is_empty() {
            tracing::warn!(%user, missing = missing.join(" "), "less was consented to than amazon.scope asks for");
        }
    }
}

fn granted(tokens: Tokens, scope: Option<String>, now: Timestamp) -> Option<Grant> {
    let expires_at = now.checked_add(tokens.lifetime).ok()?;
    Some(Grant {
        refresh_token: tokens.refresh?,
        previous: None,
        access: Some(Access { token: tokens.access, expires_at }),
        updated_at: now,
        consented_at: Some(now),
        used_at: None,
        scope: scope.filter(|scope| is_scope(scope)),
        generation: 0,
    })
}

/// What RFC 6749, section 3.3 allows in a scope, and no more than Amazon has names for.
fn is_scope(text: &str) -> bool {
    text.len() <= 512 && text.bytes().all(|b| b == b' ' || (b.is_ascii_graphic() && !b"\"\\".contains(&b)))
}

/// Amazon's `error`, if it is one that we pass on.
fn known_error(error: &str) -> &'static str {
    let known = ["access_denied", "invalid_scope", "server_error", "temporarily_unavailable"];
    known.into_iter().find(|known| *known == error).unwrap_or("other")
}

/// One cookie per login, so that two logins of one browser do not undo each other.
fn cookie_name(state: &str) -> String {
    format!("adsidecar_login_{}", &hash(state)[..8])
}

/// 256 bits of the system's randomness.
fn random() -> String {
    let mut bits = [0u8; 32];
    // A system without randomness cannot log anybody in, nor speak TLS.
    getrandom::fill(&mut bits).expect("the operating system gives random bytes");
    BASE64_URL_SAFE_NO_PAD.encode(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_outside_the_list_are_other() {
        assert_eq!(known_error("<script>"), "other");
        assert_eq!(known_error("unauthorized_client"), "other");
        assert_eq!(known_error("access_denied"), "access_denied");
    }
}
