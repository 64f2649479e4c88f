//! Faults as data: what fails, where, and how often.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::Listener;

/// The failure of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// This response instead of the real one: a 500, a 429 with or without `Retry-After`, a 503 as JSON or HTML.
    Status {
        /// The status code.
        code: u16,
        /// Headers of the response, including `Content-Type`.
        #[serde(default)]
        headers: Vec<(String, String)>,
        /// The body, sent unchanged.
        #[serde(default)]
        body: String,
    },
    /// The call is received but gets no response.
    Hang,
    /// The connection is reset (TCP RST) before the call takes effect and before any byte of a response.
    Reset,
    /// The call takes effect, but the connection breaks in the middle of the response body.
    CloseMidBody,
    /// A `200` with truncated JSON. The call takes no effect.
    BadJson,
    /// A `200` with an HTML page where JSON was expected. The call takes no effect.
    Html,
    /// The issued access token has this lifetime, and `expires_in` says so. Token endpoint only.
    ShortLife {
        /// The lifetime in seconds.
        seconds: u32,
    },
    /// `expires_in` has this JSON value; the token's real lifetime is unchanged. Token endpoint only.
    ExpiresIn {
        /// The raw value: a string, a negative number, `null`, …
        value: Value,
    },
    /// A refresh or exchange fails with `invalid_grant` although the grant is good. Token endpoint only.
    InvalidGrant,
    /// The call fails with `invalid_client` although the secret is good. Token endpoint only.
    InvalidClient,
    /// The call fails with `unauthorized_client`. Token endpoint only.
    UnauthorizedClient,
    /// A refresh issues a new refresh token and invalidates the old one. Token endpoint only.
    RotateRefreshToken,
    /// The response has no `refresh_token`. Token endpoint only.
    NoRefreshToken,
    /// The usual response, but delayed.
    Delay {
        /// The delay in milliseconds.
        ms: u64,
    },
    /// `401 {"message":"Unauthorized"}` for a good token. Ads listeners only.
    TokenUnauthorized,
    /// The call is received and held until the rule is released; then it continues normally.
    Gate,
}

impl Fault {
    /// A bare status with a small JSON body.
    pub fn status(code: u16) -> Self {
        Self::Status {
            code,
            headers: vec![("content-type".into(), "application/json".into())],
            body: r#"{"message":"fault injected by the sandbox"}"#.into(),
        }
    }

    /// `429 Too Many Requests`, with or without `Retry-After` in seconds. (Amazon's reporting API omits it.)
    pub fn too_many(retry_after: Option<u32>) -> Self {
        let mut headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        headers.extend(retry_after.map(|seconds| ("retry-after".to_owned(), seconds.to_string())));
        Self::Status { code: 429, headers, body: r#"{"code":"429","details":"Too Many Requests"}"#.into() }
    }

    /// The name that the control port uses.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Status { .. } => "status",
            Self::Hang => "hang",
            Self::Reset => "reset",
            Self::CloseMidBody => "close_mid_body",
            Self::BadJson => "bad_json",
            Self::Html => "html",
            Self::ShortLife { .. } => "short_life",
            Self::ExpiresIn { .. } => "expires_in",
            Self::InvalidGrant => "invalid_grant",
            Self::InvalidClient => "invalid_client",
            Self::UnauthorizedClient => "unauthorized_client",
            Self::RotateRefreshToken => "rotate_refresh_token",
            Self::NoRefreshToken => "no_refresh_token",
            Self::Delay { .. } => "delay",
            Self::TokenUnauthorized => "token_unauthorized",
            Self::Gate => "gate",
        }
    }

    /// Whether this fault can apply to such a call. Calls to which it cannot apply do not count.
    fn fits(&self, listener: Listener, token_endpoint: bool) -> bool {
        match self {
            Self::ShortLife { .. }
            | Self::ExpiresIn { .. }
            | Self::InvalidGrant
            | Self::InvalidClient
            | Self::UnauthorizedClient
            | Self::RotateRefreshToken
            | Self::NoRefreshToken => token_endpoint,
            Self::TokenUnauthorized => listener != Listener::Lwa,
            Self::Status { .. }
            | Self::Hang
            | Self::Reset
            | Self::CloseMidBody
            | Self::BadJson
            | Self::Html
            | Self::Delay { .. }
            | Self::Gate => true,
        }
    }
}

/// How often a rule applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// The next `n` matching calls.
    Next(u32),
    /// A percentage of the matching calls, evenly spread and deterministic: 50 applies to every second one.
    Percent(u8),
    /// Every matching call, until the rule is removed.
    Always,
}

/// A fault, and the calls that it applies to. The first matching rule applies; later rules are not evaluated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The fault.
    #[serde(rename = "trouble")]
    pub fault: Fault,
    /// The listener that it applies to; all listeners if absent.
    #[serde(default, rename = "door")]
    pub listener: Option<Listener>,
    /// Prefix of the raw path; any path if absent.
    #[serde(default)]
    pub path: Option<String>,
    /// How often it applies; once if absent.
    #[serde(default = "once")]
    pub when: When,
}

impl Rule {
    /// Restricts the rule to one listener.
    #[must_use]
    pub fn at(mut self, listener: Listener) -> Self {
        self.listener = Some(listener);
        self
    }

    /// Restricts the rule to paths with this prefix.
    #[must_use]
    pub fn on(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// Applies the rule to the next `calls` calls instead of one.
    #[must_use]
    pub fn next(mut self, calls: u32) -> Self {
        self.when = When::Next(calls);
        self
    }

    /// Applies the rule to this percentage of calls.
    #[must_use]
    pub fn percent(mut self, share: u8) -> Self {
        self.when = When::Percent(share);
        self
    }

    /// Applies the rule to every call.
    #[must_use]
    pub fn always(mut self) -> Self {
        self.when = When::Always;
        self
    }
}

impl From<Fault> for Rule {
    fn from(fault: Fault) -> Self {
        Self { fault, listener: None, path: None, when: once() }
    }
}

fn once() -> When {
    When::Next(1)
}

/// Handle of an active rule: waits for calls that the rule applies to, and opens its gate.
#[derive(Clone, Debug)]
pub struct FaultHandle(Arc<Watch>);

#[derive(Debug)]
struct Watch {
    hits: watch::Sender<usize>,
    open: watch::Sender<bool>,
}

impl FaultHandle {
    fn new() -> Self {
        Self(Arc::new(Watch { hits: watch::Sender::new(0), open: watch::Sender::new(false) }))
    }

    /// The number of calls that the rule has applied to.
    pub fn hits(&self) -> usize {
        *self.0.hits.borrow()
    }

    /// Returns once the rule has applied to at least `calls` calls; for a gate, once it holds that many.
    pub async fn reached(&self, calls: usize) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.0.hits.subscribe().wait_for(|hits| *hits >= calls).await;
    }

    /// Opens the gate for waiting calls and later ones.
    pub fn release(&self) {
        self.0.open.send_replace(true);
    }

    /// Counts one more call.
    pub(super) fn count(&self) {
        self.0.hits.send_modify(|hits| *hits += 1);
    }

    /// Waits for the gate to open.
    pub(super) async fn wait_until_open(&self) {
        let _ = self.0.open.subscribe().wait_for(|open| *open).await;
    }
}

/// The active rules, oldest first.
#[derive(Debug, Default)]
pub(super) struct Faults {
    rules: Vec<ActiveRule>,
}

#[derive(Debug)]
struct ActiveRule {
    rule: Rule,
    /// The accumulated share of [`When::Percent`]; applying the rule costs 100.
    accumulated: u32,
    handle: FaultHandle,
}

impl Faults {
    pub(super) fn add(&mut self, rule: Rule, accumulated: u32) -> FaultHandle {
        let handle = FaultHandle::new();
        self.rules.push(ActiveRule { rule, accumulated, handle: handle.clone() });
        handle
    }

    /// Removes all rules and releases the calls that they hold.
    pub(super) fn clear(&mut self) {
        for active in self.rules.drain(..) {
            active.handle.release();
        }
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().map(|active| &active.rule)
    }

    /// The fault that applies to a call. Decrements the counter of its rule.
    pub(super) fn choose(
        &mut self,
        listener: Listener,
        path: &str,
        token_endpoint: bool,
    ) -> Option<(Fault, FaultHandle)> {
        for (index, active) in self.rules.iter_mut().enumerate() {
            let rule = &mut active.rule;
            let matches = rule.listener.is_none_or(|wanted| wanted == listener)
                && rule.path.as_deref().is_none_or(|prefix| path.starts_with(prefix))
                && rule.fault.fits(listener, token_endpoint);
            if !matches {
                continue;
            }
            let applies = match &mut rule.when {
                When::Always => true,
                When::Percent(share) => {
                    active.accumulated += u32::from(*share);
                    let full = active.accumulated >= 100;
                    active.accumulated -= if full { 100 } else { 0 };
                    full
                }
                When::Next(left) => {
                    let any = *left > 0;
                    *left = left.saturating_sub(1);
                    any
                }
            };
            if !applies {
                continue;
            }
            let chosen = (rule.fault.clone(), active.handle.clone());
            if rule.when == When::Next(0) {
                self.rules.remove(index);
            }
            return Some(chosen);
        }
        None
    }
}
