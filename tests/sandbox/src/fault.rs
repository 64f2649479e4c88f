//! Fault as data: what shall go wrong, where, and how often.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::Door;

/// What goes wrong with a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// This answer instead of the real one: a 500, a 429 with or without `Retry-After`, a 503 as JSON or HTML.
    Status {
        /// The status code.
        code: u16,
        /// Headers of the answer, `Content-Type` among them.
        #[serde(default)]
        headers: Vec<(String, String)>,
        /// The body, as it is.
        #[serde(default)]
        body: String,
    },
    /// The call is read and never answered.
    Hang,
    /// The connection is reset (TCP RST) before any byte of an answer, and before the call has any effect.
    Reset,
    /// The call takes effect and is answered, but the connection breaks in the middle of the answer's body.
    CloseMidBody,
    /// `200` with JSON that ends in the middle; without any effect.
    BadJson,
    /// `200` with an HTML page where JSON was expected; without any effect.
    Html,
    /// The access token given out lives only so long, and `expires_in` says so. Token endpoint only.
    ShortLife {
        /// The life in seconds.
        seconds: u32,
    },
    /// `expires_in` is this JSON value, whatever it is; the token lives as always. Token endpoint only.
    ExpiresIn {
        /// The raw value: a string, a negative number, `null` …
        value: Value,
    },
    /// A refresh or exchange is refused as `invalid_grant`, though the grant is good. Token endpoint only.
    InvalidGrant,
    /// Refused as `invalid_client`, though the secret is good. Token endpoint only.
    InvalidClient,
    /// Refused as `unauthorized_client`. Token endpoint only.
    UnauthorizedClient,
    /// A refresh gives out a new refresh token, and the old one is dead from then on. Token endpoint only.
    RotateRefreshToken,
    /// The answer has no `refresh_token`. Token endpoint only.
    NoRefreshToken,
    /// The call is answered as always, but later.
    Delay {
        /// How much later, in milliseconds.
        ms: u64,
    },
    /// `401 {"message":"Unauthorized"}` for a good token. Ads doors only.
    TokenUnauthorized,
    /// The call is read and held until the rule is released; then it goes on as always.
    Gate,
}

impl Fault {
    /// A bare status with a small JSON body.
    pub fn status(code: u16) -> Self {
        Self::Status {
            code,
            headers: vec![("content-type".into(), "application/json".into())],
            body: r#"{"message":"trouble made by the sandbox"}"#.into(),
        }
    }

    /// `429 Too Many Requests`, with or without `Retry-After` in seconds: reports get theirs without.
    pub fn too_many(retry_after: Option<u32>) -> Self {
        let mut headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        headers.extend(retry_after.map(|seconds| ("retry-after".to_owned(), seconds.to_string())));
        Self::Status { code: 429, headers, body: r#"{"code":"429","details":"Too Many Requests"}"#.into() }
    }

    /// The name, as the control port spells it.
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

    /// Whether this trouble can happen to such a call at all. Those that cannot do not count down.
    fn fits(&self, door: Door, token_endpoint: bool) -> bool {
        match self {
            Self::ShortLife { .. }
            | Self::ExpiresIn { .. }
            | Self::InvalidGrant
            | Self::InvalidClient
            | Self::UnauthorizedClient
            | Self::RotateRefreshToken
            | Self::NoRefreshToken => token_endpoint,
            Self::TokenUnauthorized => door != Door::Lwa,
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

/// How often a rule strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// The next so many calls that match.
    Next(u32),
    /// So many of each hundred calls that match, evenly spread and without chance: 50 strikes every second one.
    Percent(u8),
    /// Every call that matches, until the rule is removed.
    Always,
}

/// A trouble, and which calls meet it. The first rule that matches strikes; others are not looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What happens.
    pub trouble: Fault,
    /// At which door; at any if nothing is said.
    #[serde(default)]
    pub door: Option<Door>,
    /// Beginning of the raw path; any path if nothing is said.
    #[serde(default)]
    pub path: Option<String>,
    /// How often; once if nothing is said.
    #[serde(default = "once")]
    pub when: When,
}

impl Rule {
    /// Only at this door.
    #[must_use]
    pub fn at(mut self, door: Door) -> Self {
        self.door = Some(door);
        self
    }

    /// Only for paths that begin so.
    #[must_use]
    pub fn on(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// For the next `calls` calls instead of one.
    #[must_use]
    pub fn next(mut self, calls: u32) -> Self {
        self.when = When::Next(calls);
        self
    }

    /// For this share of the calls.
    #[must_use]
    pub fn percent(mut self, share: u8) -> Self {
        self.when = When::Percent(share);
        self
    }

    /// For every call.
    #[must_use]
    pub fn always(mut self) -> Self {
        self.when = When::Always;
        self
    }
}

impl From<Fault> for Rule {
    fn from(trouble: Fault) -> Self {
        Self { trouble, door: None, path: None, when: once() }
    }
}

fn once() -> When {
    When::Next(1)
}

/// The hand on a rule that was set: waits for calls to meet it, and opens its gate.
#[derive(Clone, Debug)]
pub struct FaultHandle(Arc<Watch>);

#[derive(Debug)]
struct Watch {
    met: watch::Sender<usize>,
    open: watch::Sender<bool>,
}

impl FaultHandle {
    fn new() -> Self {
        Self(Arc::new(Watch { met: watch::Sender::new(0), open: watch::Sender::new(false) }))
    }

    /// How many calls met the trouble so far.
    pub fn met(&self) -> usize {
        *self.0.met.borrow()
    }

    /// Returns once at least `calls` calls met the trouble: for a gate, once so many have been held.
    pub async fn reached(&self, calls: usize) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.0.met.subscribe().wait_for(|met| *met >= calls).await;
    }

    /// Opens the gate, for those who wait and for those to come.
    pub fn release(&self) {
        self.0.open.send_replace(true);
    }

    /// Says that one more call meets the trouble.
    pub(super) fn meet(&self) {
        self.0.met.send_modify(|met| *met += 1);
    }

    /// Waits for the gate to open.
    pub(super) async fn opened(&self) {
        let _ = self.0.open.subscribe().wait_for(|open| *open).await;
    }
}

/// The rules in force, oldest first.
#[derive(Debug, Default)]
pub(super) struct Faults {
    rules: Vec<Standing>,
}

#[derive(Debug)]
struct Standing {
    rule: Rule,
    /// What [`When::Percent`] has gathered; a strike costs 100.
    gathered: u32,
    armed: FaultHandle,
}

impl Faults {
    pub(super) fn add(&mut self, rule: Rule, gathered: u32) -> FaultHandle {
        let armed = FaultHandle::new();
        self.rules.push(Standing { rule, gathered, armed: armed.clone() });
        armed
    }

    /// Removes all rules and lets go of everyone they hold.
    pub(super) fn clear(&mut self) {
        for standing in self.rules.drain(..) {
            standing.armed.release();
        }
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().map(|standing| &standing.rule)
    }

    /// The trouble that a call meets, counted down.
    pub(super) fn draw(&mut self, door: Door, path: &str, token_endpoint: bool) -> Option<(Fault, FaultHandle)> {
        for (index, standing) in self.rules.iter_mut().enumerate() {
            let rule = &mut standing.rule;
            let matches = rule.door.is_none_or(|wanted| wanted == door)
                && rule.path.as_deref().is_none_or(|prefix| path.starts_with(prefix))
                && rule.trouble.fits(door, token_endpoint);
            if !matches {
                continue;
            }
            let strikes = match &mut rule.when {
                When::Always => true,
                When::Percent(share) => {
                    standing.gathered += u32::from(*share);
                    let full = standing.gathered >= 100;
                    standing.gathered -= if full { 100 } else { 0 };
                    full
                }
                When::Next(left) => {
                    let any = *left > 0;
                    *left = left.saturating_sub(1);
                    any
                }
            };
            if !strikes {
                continue;
            }
            let drawn = (rule.trouble.clone(), standing.armed.clone());
            if rule.when == When::Next(0) {
                self.rules.remove(index);
            }
            return Some(drawn);
        }
        None
    }
}
