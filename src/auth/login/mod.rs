//! Starts and finishes logins: the authorization code grant (RFC 6749, section 4.1) with PKCE (RFC 7636).
//!
//! A state is 256 random bits, stored as a hash, valid for ten minutes and for one callback: it is removed before the
//! code is exchanged. A cookie binds a login that a browser started to that browser (RFC 9700, section 4.7). Pending
//! logins and pending grants survive a restart: see [`PendingLogins`].
//!
//! The file is a little over 400 lines: start, callback and confirmation are one story, told in order.

mod expiring_map;
mod outcome;
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
use crate::store::{PendingGrant, StoreError};
pub use expiring_map::TEN_MINUTES;
use expiring_map::hash;
pub use outcome::{Again, BeginError, LoginEnded, LoginFailure, LoginOutcome};
pub use pending_logins::PendingLogins;
use pending_logins::{Finished, PendingLogin};

/// Login settings, apart from those of the LWA client.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `login.frontend_url`: where the callback redirects the browser.
    pub frontend_url: Option<Url>,
    /// `login.confirm`: grants of logins that a server started need `POST …/confirm`. Default: on if the login
    /// listener is on.
    pub confirm: bool,
    /// `environment = production`: cookies carry `Secure`.
    pub secure_cookies: bool,
}

/// Interval for finishing logins that other processes did not finish.
const LEFTOVERS_INTERVAL: Duration = Duration::from_secs(20);

/// Starts and finishes logins. Clones are handles to the same state.
#[derive(Clone, Debug)]
pub struct Login(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    lwa: Lwa,
    tokens: TokenManager,
    identity: Identity,
    clock: Clock,
    pending: Arc<PendingLogins>,
}

/// A request to start a login.
#[derive(Clone, Debug)]
pub struct LoginRequest {
    /// The user who will get the grant.
    pub user: UserId,
    /// The region whose consent page is shown.
    pub region: Region,
    /// Where to redirect afterwards: path and query on the frontend's origin.
    pub return_to: Option<String>,
    /// Whether a grant of a different Amazon identity may replace the user's current one.
    pub replace: bool,
    /// Whether a browser starts the login, so that a cookie binds the login to it.
    pub by_browser: bool,
}

/// A login that was started.
#[derive(Debug)]
pub struct LoginStarted {
    /// URL of the consent page, to which the user is sent.
    pub auth_url: Url,
    /// The `state` parameter in `auth_url`.
    pub state: Secret,
    /// Name and value of the binding cookie, if a browser started the login.
    pub cookie: Option<(String, Secret)>,
}

/// How a login stands.
#[derive(Clone, Debug)]
pub enum Progress {
    /// Its callback has not come yet.
    Waiting,
    /// Its callback came to this process.
    Ended(Result<LoginOutcome, LoginFailure>),
    /// It never began, has expired, or its callback came to another process.
    Unknown,
}

/// The callback parameters used here; the parser has already rejected duplicates.
#[derive(Debug)]
pub struct Callback {
    /// The `state` parameter.
    pub state: Secret,
    /// `Ok` with the `code` parameter, or `Err` with the `error` parameter.
    pub result: Result<Secret, String>,
    /// The `scope` parameter: the scopes the user consented to.
    pub scope: Option<String>,
}

impl Login {
    /// Creates the login service over the logins and grants in `pending`.
    pub fn new(
        settings: Settings,
        lwa: Lwa,
        tokens: TokenManager,
        identity: Identity,
        clock: Clock,
        pending: Arc<PendingLogins>,
    ) -> Self {
        Self(Arc::new(Inner { settings, lwa, tokens, identity, clock, pending }))
    }

    /// `login.frontend_url`: where the callback redirects the browser, if configured.
    pub fn frontend_url(&self) -> Option<&Url> {
        self.0.settings.frontend_url.as_ref()
    }

    /// The path of `amazon.redirect_uri`, to which the browser returns the binding cookie.
    pub fn callback_path(&self) -> &str {
        self.0.lwa.redirect_path()
    }

    /// The origin of `amazon.redirect_uri` if it is on this machine's loopback: browsers return there after a login,
    /// and the login's cookie belongs to that name.
    pub fn loopback_origin(&self) -> Option<Url> {
        let mut url = Url::parse(self.0.lwa.redirect_uri()).ok()?;
        let loopback = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        url.set_path("/");
        url.set_query(None);
        Some(url).filter(|_| loopback)
    }

    /// The host of `amazon.redirect_uri`.
    pub fn redirect_host(&self) -> Option<String> {
        Url::parse(self.0.lwa.redirect_uri()).ok()?.host_str().map(str::to_owned)
    }

    /// Whether cookies carry `Secure`.
    pub fn secure_cookies(&self) -> bool {
        self.0.settings.secure_cookies
    }

    /// Resolves `return_to` on the frontend's origin; `None` if it would lead to another origin, or if it holds a
    /// parameter that the callback sets: with it anybody could forge a result.
    pub fn return_url(&self, return_to: &str) -> Option<Url> {
        let frontend = self.frontend_url()?;
        // The URL standard reads a backslash as a slash, so `/\evil` would name a host.
        let plain =
            return_to.starts_with('/') && !return_to.starts_with("//") && !return_to.contains(['\\', '\t', '\n', '\r']);
        let url = frontend.join(return_to).ok()?;
        let forged = url.query_pairs().any(|(name, _)| ["status", "user_id", "grant", "error"].contains(&&*name));
        (plain && !forged && url.origin() == frontend.origin()).then_some(url)
    }

    /// Starts a login: creates its state, PKCE challenge and cookie, and records it as pending.
    ///
    /// # Errors
    /// [`BeginError`] if the consent page's URL is invalid, too many logins were started, or the shared store fails.
    pub async fn begin(&self, request: LoginRequest) -> Result<LoginStarted, BeginError> {
        let (state, verifier) = (random(), random());
        let challenge = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(verifier.as_bytes()));
        let auth_url = self.0.lwa.authorize_url(request.region, &state, &challenge)?;
        let cookie = request.by_browser.then(|| {
            // The browser keeps for whom and where the login was, so that it can begin another one after this expired.
            (cookie_name(&state), format!("{}.{}.{}", random(), request.region, request.user))
        });
        let pending = PendingLogin {
            user: request.user,
            verifier: Secret::new(verifier),
            return_to: request.return_to,
            replace: request.replace,
            cookie: cookie.as_ref().map(|(_, value)| hash(value)),
        };
        self.0.pending.begin(&state, pending, &self.0.clock).await?;
        let cookie = cookie.map(|(name, value)| (name, Secret::new(value)));
        Ok(LoginStarted { auth_url, state: Secret::new(state), cookie })
    }

    /// How the login with `state` stands. Consumes nothing.
    ///
    /// # Errors
    /// [`StoreError`] if the shared store fails.
    pub async fn progress(&self, state: &str) -> Result<Progress, StoreError> {
        let now = self.0.clock.now();
        if let Some(finished) = self.0.pending.finished(state, now) {
            return Ok(Progress::Ended(finished.outcome));
        }
        // A callback that is being processed has taken its login already.
        let waiting = self.0.pending.is_finished(state, now) || self.0.pending.login_of(state, now).await?.is_some();
        Ok(if waiting { Progress::Waiting } else { Progress::Unknown })
    }

    /// Finishes a login with the callback's parameters. `cookie` returns the value of the request's cookie with a given
    /// name. A callback that is delivered again gets the first outcome; one without the login's cookie consumes
    /// nothing.
    pub async fn finish(&self, callback: Callback, cookie: impl FnOnce(&str) -> Option<String>) -> LoginEnded {
        let cookie = cookie(&cookie_name(callback.state.expose()));
        let login = self.clone();
        // A code is valid for one exchange: a browser that disconnects during it must not lose the grant.
        self.0.tokens.uninterrupted(async move { login.finish_once(callback, cookie).await }).await
    }

    async fn finish_once(&self, callback: Callback, cookie: Option<String>) -> LoginEnded {
        let (state, now) = (callback.state.expose().to_owned(), self.0.clock.now());
        let begun = cookie.as_deref().and_then(begun_as);
        let cookie = cookie.map(|value| hash(&value));
        // The cookie is checked before anything is consumed: a virus scanner or a proxy may fetch the URL first.
        let is_new = !self.0.pending.is_finished(&state, now);
        if is_new && let Err(failure) = self.check_cookie(&state, &cookie).await {
            return LoginEnded::without_login(failure, begun);
        }
        let outcome = self.0.pending.outcome_of(&state, now);
        let mut first = false;
        let finished = outcome.get_or_try_init(async || {
            first = true;
            // An earlier delivery that consumed nothing, because the store failed, leaves the check to this one.
            if !is_new {
                self.check_cookie(&state, &cookie).await?;
            }
            self.finish_first(callback).await
        });
        let Finished { outcome, return_to, cookie: bound } = match finished.await {
            Ok(finished) => finished.clone(),
            Err(failure) => return LoginEnded::without_login(failure, begun),
        };
        match outcome {
            _ if bound.is_some() && bound != cookie => LoginFailure::State.into(),
            // Without a cookie anybody may send the callback again: it tells nothing but that the login is completed.
            Ok(_) if bound.is_none() && !first => {
                LoginEnded { outcome: Err(LoginFailure::Completed), return_to: None, again: Again::Elsewhere }
            }
            outcome => {
                let begun = begun.filter(|_| bound.is_some());
                let again = begun.map_or(Again::Elsewhere, |(user, region)| Again::As(user, region));
                LoginEnded { outcome, return_to, again }
            }
        }
    }

    /// Whether the pending login with `state` was started by the browser that sent `cookie`, or by a program.
    async fn check_cookie(&self, state: &str, cookie: &Option<String>) -> Result<(), LoginFailure> {
        let login = self.0.pending.login_of(state, self.0.clock.now()).await.map_err(LoginFailure::of_store)?;
        let login = login.ok_or(LoginFailure::Expired)?;
        if login.cookie.is_none() || login.cookie == *cookie { Ok(()) } else { Err(LoginFailure::State) }
    }

    /// Consumes the pending login and its code. An error consumed nothing, and is not remembered.
    async fn finish_first(&self, callback: Callback) -> Result<Finished, LoginFailure> {
        let login = self.0.pending.take_login(callback.state.expose(), self.0.clock.now()).await;
        let begun = login.map_err(LoginFailure::of_store)?.ok_or(LoginFailure::Expired)?;
        let (return_to, bound) = (begun.return_to.clone(), begun.cookie.clone());
        let outcome = match callback.result {
            Err(error) => Err(LoginFailure::of_amazon(&error)),
            Ok(code) => self.exchange(&code, begun, callback.scope).await,
        };
        Ok(Finished { outcome, return_to, cookie: bound })
    }

    async fn exchange(
        &self,
        code: &Secret,
        pending: PendingLogin,
        scope: Option<String>,
    ) -> Result<LoginOutcome, LoginFailure> {
        let PendingLogin { user, verifier, replace, cookie, .. } = pending;
        let requested_at = self.0.clock.now();
        let tokens = self.0.lwa.exchange(code, &verifier).await.map_err(|error| {
            tracing::warn!(%user, %error, "Login with Amazon did not exchange the authorization code");
            LoginFailure::Exchange
        })?;
        let grant = granted(tokens, scope, requested_at).ok_or_else(|| {
            tracing::warn!(%user, "the token response for the authorization code held no refresh token");
            LoginFailure::Exchange
        })?;
        self.warn_of_missing_scopes(&user, &grant);
        let (id, confirm) = (random(), cookie.is_none() && self.0.settings.confirm);
        let new = PendingGrant { id: hash(&id), user, since: self.0.clock.now(), replace, confirm, grant };
        self.0.pending.save_grant(&new).await;
        match self.conclude(new).await? {
            Some(status) => Ok(LoginOutcome::Stored(Box::new(status))),
            None => Ok(LoginOutcome::Pending(Secret::new(id))),
        }
    }

    /// Decides on a stored pending grant: rejects it (other identity), keeps it for confirmation, or takes it into use.
    async fn conclude(&self, new: PendingGrant) -> Result<Option<Status>, LoginFailure> {
        if !new.replace && self.has_other_identity(&new).await {
            self.0.pending.delete_grant(&new.id).await;
            tracing::warn!(user = %new.user, "login rejected: the grant belongs to a different Amazon identity \
                than this user's current one");
            return Err(LoginFailure::Identity);
        }
        if new.confirm {
            self.0.pending.keep_for_confirmation(new, self.0.clock.now()).await;
            return Ok(None);
        }
        Ok(Some(self.take_into_use(new).await))
    }

    async fn take_into_use(&self, new: PendingGrant) -> Status {
        let status = self.0.tokens.adopt(&new.user, new.grant).await;
        // The pending copy is kept until the user's grant is stored; `finish_leftovers` then finds that it is in use.
        if self.0.tokens.is_stored(&new.user) {
            self.0.pending.delete_grant(&new.id).await;
        }
        status
    }

    /// Whether a new grant certainly belongs to a different Amazon identity than the user's current grant.
    async fn has_other_identity(&self, new: &PendingGrant) -> bool {
        let Some(access) = &new.grant.access else { return false };
        match self.0.tokens.bearer(&new.user).await {
            Ok(current) => Box::pin(self.0.identity.differs(&current.value, access.token.bearer())).await,
            // There is no current grant, or none with a valid access token to compare.
            Err(_) => false,
        }
    }

    /// Takes the pending grant with this one-time id into use; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError`] if the shared store fails.
    pub async fn confirm(&self, id: &str) -> Result<Option<Status>, StoreError> {
        let Some(new) = self.0.pending.take_grant(id, self.0.clock.now()).await? else { return Ok(None) };
        let login = self.clone();
        Ok(Some(self.0.tokens.uninterrupted(async move { login.take_into_use(new).await }).await))
    }

    /// Finishes logins that another process did not finish: their codes are spent, and their grants are not in use yet.
    /// Grants that the app has to confirm stay pending. Returns the time until the next call; `None` if no other
    /// process shares the store, so that one call at startup is enough.
    pub async fn finish_leftovers(&self) -> Option<Duration> {
        for new in self.0.pending.leftovers(self.0.clock.now()).await {
            // If the store fails, decide by what this process knows.
            let _ = self.0.tokens.look(&new.user).await;
            let (user, in_use) = (new.user.clone(), self.0.tokens.status(&new.user).consented_at);
            if in_use >= new.grant.consented_at {
                // This grant, or one of a later login, is already in use.
                self.0.pending.delete_grant(&new.id).await;
                continue;
            }
            if new.confirm {
                // Keeps the original time, so that its ten minutes are not extended.
                let since = new.since;
                self.0.pending.keep_for_confirmation(new, since).await;
            } else if self.conclude(new).await.is_ok() {
                tracing::info!(%user, "a login interrupted by the end of a process is finished");
            }
        }
        self.0.pending.is_shared().then_some(LEFTOVERS_INTERVAL)
    }

    /// Deletes the tokens of `user`, including those of pending grants. Returns `false` if there were none.
    ///
    /// # Errors
    /// [`StoreError`] if the store fails.
    pub async fn forget(&self, user: &UserId) -> Result<bool, StoreError> {
        self.0.pending.forget(user);
        self.0.tokens.forget(user).await
    }

    fn warn_of_missing_scopes(&self, user: &UserId, grant: &Grant) {
        let Some(granted) = &grant.scope else { return };
        let missing = |requested: &&str| !granted.split(' ').any(|scope| scope == *requested);
        let missing: Vec<_> = self.0.lwa.scope().split(' ').filter(missing).collect();
        if !missing.is_empty() {
            tracing::warn!(%user, missing = missing.join(" "), "less was consented to than amazon.scope requests");
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

/// Whether `text` is a valid scope (RFC 6749, section 3.3) of at most 512 bytes, enough for all of Amazon's scopes.
fn is_scope(text: &str) -> bool {
    text.len() <= 512 && text.bytes().all(|b| b == b' ' || (b.is_ascii_graphic() && !b"\"\\".contains(&b)))
}

/// The name of the binding cookie. Each login has its own, so that concurrent logins in one browser do not interfere.
fn cookie_name(state: &str) -> String {
    format!("adsidecar_login_{}", &hash(state)[..8])
}

/// For whom and in which region the login with this cookie began. No random value has a dot in it, and a user id is a
/// legal cookie value.
fn begun_as(cookie: &str) -> Option<(UserId, Region)> {
    let mut parts = cookie.splitn(3, '.').skip(1);
    let (region, user) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some((user, region))
}

/// 256 bits from the operating system's random generator, as base64url.
fn random() -> String {
    let mut bits = [0u8; 32];
    // Without randomness neither logins nor TLS can work.
    getrandom::fill(&mut bits).expect("the operating system gives random bytes");
    BASE64_URL_SAFE_NO_PAD.encode(bits)
}
