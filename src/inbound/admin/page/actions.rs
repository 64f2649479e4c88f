//! What a person can do on the page: refresh, log out, look for accounts, reload, set the log level. Each is a form.
//!
//! Another origin can send none of them: admission checks `Origin` and `Sec-Fetch-Site`, and a form holds a key that
//! only a reader of our pages knows. A form that ends well leads to a page that says so; one that fails is answered by
//! the reason.

use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use subtle::ConstantTimeEq;
use url::form_urlencoded;

use super::view::Action;
use super::{Context, parse_user};
use crate::auth::accounts::SyncError;
use crate::domain::account::UserId;
use crate::inbound::admin::AdminResponse;
use crate::inbound::oauth::{LoginError, token_problem};
use crate::inbound::problem::{Code, Problem};
use crate::server::CallerBody;
use crate::telemetry::log::Level;

/// Proves that a form comes from a page of this process: only a reader of a page knows it.
pub struct FormKey(String);

impl Default for FormKey {
    fn default() -> Self {
        let mut bits = [0u8; 32];
        // Without randomness neither logins nor TLS can work.
        getrandom::fill(&mut bits).expect("the operating system gives random bytes");
        Self(BASE64_URL_SAFE_NO_PAD.encode(bits))
    }
}

impl FormKey {
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    fn matches(&self, sent: &str) -> bool {
        self.0.as_bytes().ct_eq(sent.as_bytes()).into()
    }
}

impl fmt::Debug for FormKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FormKey(…)")
    }
}

/// Largest form: a key, a user id of 128 characters that may be escaped, and their names.
const MAX_FORM: usize = 1 << 10;
/// How long to wait for a form: it arrives with its head.
const FORM_TIMEOUT: Duration = Duration::from_secs(10);

/// The fields of a form.
pub(super) struct Form(Vec<(String, String)>);

impl Form {
    /// The name of the field with the key.
    pub(super) const KEY: &'static str = "form_key";

    /// Reads a form with `known` fields and its key; each exactly once.
    async fn read(known: &[&str], headers: &HeaderMap, body: CallerBody) -> Result<Self, Problem> {
        let bad = |detail: String| Problem::new(Code::BadRequest, detail, "Send the form of the page.");
        let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/x-www-form-urlencoded")
        {
            return Err(bad("The body is not a form (application/x-www-form-urlencoded).".to_owned()));
        }
        let body = tokio::time::timeout(FORM_TIMEOUT, Limited::new(body, MAX_FORM).collect()).await;
        let body = body.map_err(|_| bad("The form did not arrive within 10 seconds.".to_owned()))?;
        let body = body.map_err(|_| bad("The form is longer than 1 KiB, or broke off.".to_owned()))?.to_bytes();
        let pairs = form_urlencoded::parse(&body).map(|(name, value)| (name.into_owned(), value.into_owned()));
        let form = Self(pairs.collect());
        let is_known = |name: &str| known.contains(&name) || name == Self::KEY;
        if form.0.iter().any(|(name, _)| !is_known(name)) {
            return Err(bad("The form has a field that this action does not take.".to_owned()));
        }
        for name in known.iter().chain([&Self::KEY]) {
            if form.0.iter().filter(|(each, _)| each == name).count() != 1 {
                return Err(bad(format!("The form must have the field {name} once.")));
            }
        }
        Ok(form)
    }

    fn text(&self, name: &str) -> &str {
        self.0.iter().find(|(each, _)| each == name).map_or("", |(_, value)| value)
    }
}

impl Context<'_> {
    /// Does what a form asks for, and leads back to its page.
    pub(super) async fn act(&self, action: Action, body: CallerBody) -> Result<AdminResponse, Problem> {
        let form = Form::read(action.fields(), self.headers, body).await?;
        if !self.admin.page_state.key.matches(form.text(Form::KEY)) {
            self.admin.metrics.guard_denied.with_label_values(&["cross_site"]).inc();
            return Err(Problem::new(
                Code::CrossSite,
                "The form is not from a page of this process: adsidecar was restarted since, or another one answers.",
                "Go back, reload the page, and send the form again.",
            ));
        }
        let user = match action {
            Action::Refresh | Action::Logout | Action::Sync => Some(parse_user(form.text("user_id"))?),
            Action::Reload | Action::Level => None,
        };
        match (action, &user) {
            (Action::Refresh, Some(user)) => self.refresh(user).await?,
            (Action::Logout, Some(user)) => self.log_out(user).await?,
            (Action::Sync, Some(user)) => self.sync(user).await?,
            (Action::Level, _) => self.set_level(form.text("level"))?,
            (Action::Reload, _) => self.admin.reload().await?,
            _ => {}
        }
        let user = user.as_ref().map_or("", UserId::as_str);
        Ok(see_other(&self.link_with(action.page(), &[("user_id", user), ("did", action.name())])))
    }

    async fn refresh(&self, user: &UserId) -> Result<(), Problem> {
        let refreshed = Box::pin(self.admin.tokens.refresh(user)).await;
        refreshed.map(drop).map_err(|error| token_problem(error, format!("Log in user {user} on the page of users.")))
    }

    async fn log_out(&self, user: &UserId) -> Result<(), Problem> {
        let forgotten = self.admin.login.forget(user).await;
        forgotten.map_err(|error| LoginError::Store(error).problem(|_| String::new()))?;
        self.admin.directory.forget(user);
        tracing::info!(%user, "logged out on the status page");
        Ok(())
    }

    async fn sync(&self, user: &UserId) -> Result<(), Problem> {
        let login_step = |user: &UserId| format!("Log in user {user} on the page of users.");
        Box::pin(self.admin.directory.sync(user)).await.map(drop).map_err(|error| match error {
            SyncError::NoToken(error) => token_problem(error, login_step(user)),
            SyncError::Store(error) => LoginError::Store(error).problem(login_step),
            SyncError::NoRegion(failures) => LoginError::NoRegion(failures).problem(login_step),
        })
    }

    fn set_level(&self, level: &str) -> Result<(), Problem> {
        let level: Level =
            level.parse().map_err(|_| super::bad_parameter("level", "error, warn, info, debug or trace"))?;
        if let Some(log) = &self.admin.log {
            log.set_level(level);
        }
        tracing::info!(%level, "log level changed");
        Ok(())
    }
}

/// Leads a browser on to `location` with a `GET`, so that reloading that page sends no form again.
fn see_other(location: &str) -> AdminResponse {
    let mut response = Response::new(crate::inbound::admin::bytes(bytes::Bytes::new()));
    *response.status_mut() = StatusCode::SEE_OTHER;
    response.headers_mut().extend(HeaderValue::from_str(location).map(|location| (LOCATION, location)));
    response
}
