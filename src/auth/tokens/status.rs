//! The status of users, for the status endpoint and the metrics.

use jiff::Timestamp;

use super::TokenManager;
use super::user_state::UserState;
use crate::domain::account::UserId;
use crate::domain::clock::{serialize_to_the_millisecond, to_the_second};
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{ConsentAge, GrantState, State};
use crate::telemetry::metrics::UserHealth;

/// A user's status as the status endpoint returns it; never contains a token.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Status {
    /// The user id.
    pub user_id: UserId,
    /// The state of the user's grant.
    pub state: State,
    /// When the access token expires.
    #[serde(serialize_with = "serialize_to_the_millisecond")]
    pub expires_at: Option<Timestamp>,
    /// When the tokens last changed.
    #[serde(serialize_with = "serialize_to_the_millisecond")]
    pub updated_at: Option<Timestamp>,
    /// When a person consented, if known.
    #[serde(serialize_with = "serialize_to_the_millisecond")]
    pub consented_at: Option<Timestamp>,
    /// When that consent expires.
    #[serde(serialize_with = "serialize_to_the_millisecond")]
    pub consent_expires_at: Option<Timestamp>,
    /// Whether the consent is valid, about to expire or expired; a refresh does not extend it.
    pub consent: Option<ConsentAge>,
    /// Error code of the last refresh, if it failed.
    pub last_error: Option<&'static str>,
    /// When the next background refresh is due.
    #[serde(serialize_with = "serialize_to_the_millisecond")]
    pub next_refresh_at: Option<Timestamp>,
}

impl TokenManager {
    /// The status of `user`; an unknown user has the state `none`.
    pub fn status(&self, user: &UserId) -> Status {
        match self.entry(user) {
            Some(entry) => self.status_of(&entry),
            None => self.status_of(&self.blank(user)),
        }
    }

    /// The status of every user with a grant, sorted by user id.
    pub fn statuses(&self) -> Vec<Status> {
        let mut statuses: Vec<_> = self.entries().iter().map(|entry| self.status_of(entry)).collect();
        statuses.retain(|status| status.state != State::None);
        statuses.sort_by(|a, b| a.user_id.cmp(&b.user_id));
        statuses
    }

    /// The health of every user with a grant, for the metrics.
    pub fn health(&self) -> Vec<UserHealth> {
        let seconds = |at: Timestamp| at.as_duration().as_secs_f64();
        let entries = self.entries();
        let known = entries.iter().filter_map(|entry| {
            let held = entry.held();
            let status = self.status_of(entry);
            let idle = status.state == State::Idle;
            (status.state != State::None).then(|| UserHealth {
                user: status.user_id.to_string(),
                state: status.state,
                token_expiry: status.expires_at.filter(|_| !idle).map(seconds),
                last_refresh: status.expires_at.and(status.updated_at).filter(|_| !idle).map(seconds),
                consent_expiry: status.consent_expires_at.map(seconds),
                consent_ending: status.consent.map(|age| age != ConsentAge::Valid),
                login_reason: match &**held {
                    GrantState::LoginRequired { reason, .. } => Some(reason),
                    _ => None,
                },
            })
        });
        known.collect()
    }

    /// Logs once per consent that it is about to expire or has expired.
    pub(super) fn log_consent_end(&self, entry: &UserState, now: ClockReading) {
        let held = entry.held();
        let Some(grant) = held.grant() else { return };
        let (age, expires_at) = (grant.consent(now.wall), grant.consent_expires_at());
        if let (Some(ConsentAge::Ending | ConsentAge::Ended), Some(expires_at)) = (age, expires_at)
            && entry.mark_consent_end_logged()
        {
            let expires_at = to_the_second(expires_at);
            tracing::warn!(user = %entry.user, expires_at, "the consent ends, and no refresh extends it: the user has \
                to log in again before it expires");
        }
    }

    /// Computes the status from the current state of `entry`.
    pub(super) fn status_of(&self, entry: &UserState) -> Status {
        let held = entry.held();
        let grant = held.grant();
        let (policy, used, now) = (self.policy(), entry.used(), self.0.clock.reading());
        Status {
            user_id: entry.user.clone(),
            state: held.state(policy, used, now),
            expires_at: grant.and_then(|grant| grant.expires_at(now)),
            updated_at: grant.map(|grant| grant.updated_at),
            consented_at: grant.and_then(|grant| grant.consented_at),
            consent_expires_at: grant.and_then(|grant| grant.consent_expires_at()),
            consent: grant.and_then(|grant| grant.consent(now.wall)),
            last_error: match &**held {
                GrantState::Failing { failure, .. } => Some(failure.code),
                GrantState::LoginRequired { reason, .. } => Some(reason),
                GrantState::Nothing | GrantState::Fresh(_) => None,
            },
            next_refresh_at: entry.due(policy, now).map(|due| now.wall_at(due)),
        }
    }
}
