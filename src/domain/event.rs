//! Events that a person or the app is told about: a login is needed, a consent ends, refreshes fail, Amazon throttles.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::account::{Region, UserId};
use super::clock::to_the_millisecond;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    /// The user has to consent again.
    LoginNeeded {
        /// The user.
        user: UserId,
        /// LWA's error code.
        reason: &'static str,
        /// When the tokens last changed, which tells one need from the next.
        since: Option<Timestamp>,
    },
    /// The user's grant is usable again, or for the first time.
    LoginDone {
        /// The user.
        user: UserId,
        /// When the person consented, if known.
        consented_at: Option<Timestamp>,
        /// When the tokens last changed.
        since: Option<Timestamp>,
    },
    /// The consent ends within this many days.
    ConsentEnding {
        /// The user.
        user: UserId,
        /// 30, 7 or 1.
        days: i64,
        /// When it ends.
        expires_at: Timestamp,
    },
    /// Refreshes have failed for this long.
    RefreshFailing {
        /// The user.
        user: UserId,
        /// Why the last one failed.
        reason: &'static str,
        /// How long.
        lasting: SignedDuration,
        /// When the tokens last changed.
        since: Option<Timestamp>,
    },
    /// Amazon has throttled for this long.
    Throttled {
        /// Whose host.
        region: Region,
        /// How long.
        lasting: SignedDuration,
        /// When it began.
        since: Timestamp,
    },
    /// `adsidecar notify test`.
    Test,
}

/// An event with its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When adsidecar noticed it.
    pub at: Timestamp,
    /// What happened.
    pub happened: Happened,
    /// The URL that starts the user's login, where that helps.
    pub login_url: Option<String>,
}

impl Event {
    /// The name of the kind of event.
    pub fn kind(&self) -> &'static str {
        match self.happened {
            Happened::LoginNeeded { .. } => "login_needed",
            Happened::LoginDone { .. } => "login_done",
            Happened::ConsentEnding { .. } => "consent_ending",
            Happened::RefreshFailing { .. } => "refresh_failing",
            Happened::Throttled { .. } => "throttled",
            Happened::Test => "test",
        }
    }

    /// The user that it is about, if it is about one.
    pub fn user(&self) -> Option<&UserId> {
        match &self.happened {
            Happened::LoginNeeded { user, .. }
            | Happened::LoginDone { user, .. }
            | Happened::ConsentEnding { user, .. }
            | Happened::RefreshFailing { user, .. } => Some(user),
            Happened::Throttled { .. } | Happened::Test => None,
        }
    }

    /// The same for all processes and all times at which the same event is noticed: 32 hexadecimal digits.
    pub fn id(&self) -> String {
        let told = match &self.happened {
            Happened::LoginNeeded { since, .. } | Happened::RefreshFailing { since, .. } => format!("{since:?}"),
            Happened::LoginDone { consented_at, since, .. } => format!("{consented_at:?} {since:?}"),
            Happened::ConsentEnding { days, expires_at, .. } => format!("{days} {expires_at}"),
            // Two processes notice it a little apart.
            Happened::Throttled { region, since, .. } => format!("{region} {}", since.as_second() / 3600),
            Happened::Test => format!("{}", self.at),
        };
        let identity = format!("{} {} {told}", self.kind(), self.user().map_or("", UserId::as_str));
        Sha256::digest(identity).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The event as receivers get it. It holds no token.
    pub fn json(&self) -> Value {
        let time = |at: &Option<Timestamp>| at.map(to_the_millisecond);
        let mut document = json!({
            "id": self.id(),
            "type": self.kind(),
            "at": to_the_millisecond(self.at),
            "text": self.text(),
        });
        let more = match &self.happened {
            Happened::LoginNeeded { user, reason, .. } => json!({ "user_id": user, "reason": reason }),
            Happened::LoginDone { user, consented_at, .. } => {
                json!({ "user_id": user, "consented_at": time(consented_at) })
            }
            Happened::ConsentEnding { user, days, expires_at } => {
                json!({ "user_id": user, "days": days, "consent_expires_at": to_the_millisecond(*expires_at) })
            }
            Happened::RefreshFailing { user, reason, lasting, .. } => {
                json!({ "user_id": user, "reason": reason, "lasting_seconds": lasting.as_secs() })
            }
            Happened::Throttled { region, lasting, .. } => {
                json!({ "region": region.as_str(), "lasting_seconds": lasting.as_secs() })
            }
            Happened::Test => json!({}),
        };
        if let (Value::Object(document), Value::Object(more)) = (&mut document, more) {
            document.extend(more);
            if let Some(url) = &self.login_url {
                document.insert("login_url".to_owned(), url.as_str().into());
            }
        }
        document
    }

    /// The event in a sentence, which chat programs show.
    pub fn text(&self) -> String {
        let login = self.login_url.as_ref().map(|url| format!(" at {url}")).unwrap_or_default();
        let minutes = |lasting: &SignedDuration| (lasting.as_secs() / 60).max(1);
        match &self.happened {
            Happened::LoginNeeded { user, reason, .. } => {
                format!("adsidecar: Amazon refuses the grant of user {user} ({reason}). The user has to log in{login}.")
            }
            Happened::LoginDone { user, .. } => format!("adsidecar: user {user} is logged in."),
            Happened::ConsentEnding { user, days, .. } => format!(
                "adsidecar: the consent of user {user} ends within {days} {}. The user has to log in again{login}.",
                if *days == 1 { "day" } else { "days" }
            ),
            Happened::RefreshFailing { user, reason, lasting, .. } => format!(
                "adsidecar: refreshing the token of user {user} has failed for {} min ({reason}). The runbook explains \
                 the reason.",
                minutes(lasting)
            ),
            Happened::Throttled { region, lasting, .. } => format!(
                "adsidecar: Amazon has throttled requests to the region {region} for {} min. Send fewer.",
                minutes(lasting)
            ),
            Happened::Test => "adsidecar: this is a test. Notifications arrive here.".to_owned(),
        }
    }
}
