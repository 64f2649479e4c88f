//! Begin and finish a login: the authorization code grant (RFC 6749, section 4.1) with PKCE (RFC 7636).
//!
//! A state is 256 random bits, kept as its hash, good for ten minutes and for one callback: it is taken out before the
//! code is exchanged. A login that a browser began is bound to that browser by a cookie (RFC 9700, section 4.7). States
//! and pending grants live in memory: a restart in between asks the user to begin again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::HeaderValue;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use url::Url;

use crate::account::{Region, UserId};
use crate::clock::Clock;
use crate::identity::Identity;
use crate::keeper::{Keeper, Status};
use crate::lwa::Lwa;
use crate::secret::Secret;
use crate::token::{Access, Grant, Tokens};

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

/// How long a state and a pending grant live.
pub const TEN_MINUTES: Duration = Duration::from_secs(600);
/// Outstanding logins, and pending grants; the oldest makes room for the newest.
const MAX_OUTSTANDING: usize = 1000;

/// All logins that have begun and not ended. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Login(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    lwa: Lwa,
    keeper: Keeper,
    identity: Identity,
    clock: Clock,
    desk: Arc<Desk>,
}

/// Logins that have begun, and grants that wait to be confirmed. It outlives the settings.
#[derive(Debug, Default)]
pub struct Desk {
    begun: Mutex<Outstanding<Begun>>,
    pending: Mutex<Outstanding<Pending>>,
}

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct Wish {
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
pub struct Begin {
    /// Where to send the user.
    pub auth_url: Url,
    /// The state in it.
    pub state: Secret,
    /// The binding cookie's name and value, for a browser.
    pub cookie: Option<(String, Secret)>,
}

/// How a login ended well.
#[derive(Debug)]
pub enum Ended {
    /// The grant is in use.
    Stored(Box<Status>),
    /// The grant waits for the app's confirmation under this one-time id.
    Pending(Secret),
}

/// How a login ended badly; [`Trouble::code`] is the callback's `error`.
#[derive(Debug)]
pub enum Trouble {
    /// Amazon's own error, mapped to the fixed list.
    Amazon(&'static str),
    /// No such state, or no longer, or not this browser's.
    State,
    /// LWA gave no grant for the code.
    Exchange,
    /// Another Amazon identity than the user's.
    Identity,
}

impl Trouble {
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

#[derive(Debug)]
struct Begun {
    user: UserId,
    verifier: Secret,
    return_to: Option<String>,
    replace: bool,
    cookie: Option<[u8; 32]>,
}

#[derive(Debug)]
struct Pending {
    user: UserId,
    grant: Grant,
}

impl Login {
    /// Logins at `desk`.
    pub fn new(
        settings: Settings,
        lwa: Lwa,
        keeper: Keeper,
        identity: Identity,
        clock: Clock,
        desk: Arc<Desk>,
    ) -> Self {
        Self(Arc::new(Inner { settings, lwa, keeper, identity, clock, desk }))
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
    pub fn begin(&self, wish: Wish) -> Result<Begin, url::ParseError> {
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
        lock(&self.0.desk.begun).insert(hash(&state), begun, self.0.clock.now());
        let cookie = cookie.map(|(name, value)| (name, Secret::new(value)));
        Ok(Begin { auth_url, state: Secret::new(state), cookie })
    }

    /// Finishes a login with what Amazon sent back. `cookie` gives the request's cookie of a name. Beside the end comes
    /// the login's `return_to`, where the state was good.
    pub async fn finish(
        &self,
        callback: Callback,
        cookie: impl FnOnce(&str) -> Option<String>,
    ) -> (Result<Ended, Trouble>, Option<String>) {
        let now = self.0.clock.now();
        let Some(begun) = lock(&self.0.desk.begun).take(&hash(callback.state.expose()), now) else {
            return (Err(Trouble::State), None);
        };
        let bound = begun.cookie.is_none_or(|wanted| {
            cookie(&cookie_name(callback.state.expose())).is_some_and(|value| hash(&value) == wanted)
        });
        if !bound {
            return (Err(Trouble::State), None);
        }
        let return_to = begun.return_to.clone();
        let ended = match callback.answer {
            Err(error) => Err(Trouble::Amazon(known_error(&error))),
            // A code is good for one exchange: a browser that goes away in the middle of it must not lose the grant.
            Ok(code) => {
                let login = self.clone();
                let exchange = async move { login.exchange(&code, begun, callback.scope).await };
                self.0.keeper.uninterrupted(exchange).await
            }
        };
        (ended, return_to)
    }

    async fn exchange(&self, code: &Secret, begun: Begun, scope: Option<String>) -> Result<Ended, Trouble> {
        let Begun { user, verifier, replace, cookie, .. } = begun;
        let asked_at = self.0.clock.now();
        let tokens = self.0.lwa.exchange(code, &verifier).await.map_err(|error| {
            tracing::warn!(%user, %error, "the code was not exchanged");
            Trouble::Exchange
        })?;
        let bearer = tokens.access.bearer().clone();
        let grant = granted(tokens, scope, asked_at).ok_or_else(|| {
            tracing::warn!(%user, "the code was exchanged, but the answer held no refresh token");
            Trouble::Exchange
        })?;
        if !replace && self.is_of_another(&user, &bearer).await {
            tracing::warn!(%user, "another Amazon identity logged in for this user and was refused");
            return Err(Trouble::Identity);
        }
        let by_server = cookie.is_none();
        if by_server && self.0.settings.confirm {
            let id = random();
            let pending = Pending { user, grant };
            lock(&self.0.desk.pending).insert(hash(&id), pending, self.0.clock.now());
            return Ok(Ended::Pending(Secret::new(id)));
        }
        Ok(Ended::Stored(Box::new(self.0.keeper.adopt(&user, grant).await)))
    }

    /// Whether `bearer` is surely of another Amazon identity than the grant that `user` has now.
    async fn is_of_another(&self, user: &UserId, bearer: &HeaderValue) -> bool {
        match self.0.keeper.bearer(user).await {
            Ok(current) => Box::pin(self.0.identity.differs(&current, bearer)).await,
            // There is no grant to compare with, or none that still says anything.
            Err(_) => false,
        }
    }

    /// Takes a pending grant into use; `None` where there is none under `id`.
    pub async fn confirm(&self, id: &str) -> Option<Status> {
        let pending = lock(&self.0.desk.pending).take(&hash(id), self.0.clock.now())?;
        Some(self.0.keeper.adopt(&pending.user, pending.grant).await)
    }
}

fn granted(tokens: Tokens, scope: Option<String>, now: Timestamp) -> Option<Grant> {
    let expires_at = now.checked_add(tokens.lifetime).ok()?;
    Some(Grant {
        refresh_token: tokens.refresh?,
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
    let hash = hash(state);
    format!("adsidecar_login_{:02x}{:02x}{:02x}{:02x}", hash[0], hash[1], hash[2], hash[3])
}

/// 256 bits of the system's randomness.
fn random() -> String {
    let mut bits = [0u8; 32];
    // A system without randomness cannot log anybody in, nor speak TLS.
    getrandom::fill(&mut bits).expect("the operating system gives random bytes");
    BASE64_URL_SAFE_NO_PAD.encode(bits)
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

/// Things that can be taken out once, within ten minutes.
#[derive(Debug)]
struct Outstanding<T> {
    taken_in: u64,
    by_hash: HashMap<[u8; 32], (u64, Timestamp, T)>,
}

impl<T> Default for Outstanding<T> {
    fn default() -> Self {
        Self { taken_in: 0, by_hash: HashMap::new() }
    }
}

impl<T> Outstanding<T> {
    fn insert(&mut self, hash: [u8; 32], thing: T, now: Timestamp) {
        if self.by_hash.len() >= MAX_OUTSTANDING
            && let Some(oldest) = self.by_hash.iter().min_by_key(|(_, (order, ..))| *order).map(|(hash, _)| *hash)
        {
            self.by_hash.remove(&oldest);
        }
        self.taken_in += 1;
        self.by_hash.insert(hash, (self.taken_in, now, thing));
    }

    fn take(&mut self, hash: &[u8; 32], now: Timestamp) -> Option<T> {
        let (_, since, thing) = self.by_hash.remove(hash)?;
        let age = Duration::try_from(now.duration_since(since)).unwrap_or_default();
        (age < TEN_MINUTES).then_some(thing)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_out_or_is_too_old_is_gone() {
        let now = Timestamp::UNIX_EPOCH;
        let mut outstanding = Outstanding::default();
        outstanding.insert([1; 32], "a", now);
        assert_eq!(outstanding.take(&[2; 32], now), None);
        assert_eq!(outstanding.take(&[1; 32], now), Some("a"));
        assert_eq!(outstanding.take(&[1; 32], now), None);
        outstanding.insert([1; 32], "a", now);
        assert_eq!(outstanding.take(&[1; 32], now + TEN_MINUTES), None);
    }

    #[test]
    fn the_oldest_makes_room_for_the_newest() {
        let now = Timestamp::UNIX_EPOCH;
        let mut outstanding = Outstanding::default();
        for number in 0..=MAX_OUTSTANDING {
            outstanding.insert(hash(&number.to_string()), number, now);
        }
        assert_eq!(outstanding.take(&hash("0"), now), None);
        assert_eq!(outstanding.take(&hash("1"), now), Some(1));
        assert_eq!(outstanding.take(&hash("1000"), now), Some(1000));
    }

    #[test]
    fn errors_outside_the_list_are_other() {
        assert_eq!(known_error("<script>"), "other");
        assert_eq!(known_error("unauthorized_client"), "other");
        assert_eq!(known_error("access_denied"), "access_denied");
    }
}
