//! The status of users, for the status endpoint and the metrics.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::TokenManager;
use super::take_over::failed_state;
use super::user_state::UserState;
use crate::domain::account::UserId;
use crate::domain::clock::{serialize_to_the_millisecond, to_the_second};
use crate::domain::clock_reading::ClockReading;
use crate::domain::grant::{ConsentAge, Grant, GrantState, LiveGrant, RefreshPolicy, State};
use crate::store::{Content, FailedRefresh, Postgres, StoreError, UserOverview};
use crate::telemetry::metrics::{REFRESH_FAILURES, UserHealth};

/// At most this many users of a shared store are read for the metrics.
const OVERVIEW_ROWS: usize = 10_000;
/// Pages of a shared store that are read for [`TokenManager::most_urgent`], however many records yield no grant.
const URGENT_PAGES: usize = 2;

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

    /// The status of the first `limit` users with a grant whose user id is after `after`, sorted by user id. A shared
    /// store that fails leaves the users that this process holds.
    pub async fn statuses(&self, after: &str, limit: usize) -> Vec<Status> {
        if let Some(shared) = self.0.store.shared()
            && let Ok(statuses) = self.stored_statuses(shared, after, limit, false, usize::MAX).await
        {
            return statuses;
        }
        let mut statuses = self.held_statuses();
        statuses.retain(|status| status.user_id.as_str() > after);
        statuses.sort_by(|a, b| a.user_id.cmp(&b.user_id));
        statuses.truncate(limit);
        statuses
    }

    /// The status of the users with a grant: of all that this process holds if no other shares the store, else of at
    /// most `limit`, those whose last refresh failed among them.
    pub async fn most_urgent(&self, limit: usize) -> Vec<Status> {
        let Some(shared) = self.0.store.shared() else { return self.held_statuses() };
        let read = async |failing| self.stored_statuses(shared, "", limit, failing, URGENT_PAGES).await;
        let (Ok(mut statuses), Ok(rest)) = (read(true).await, read(false).await) else { return self.held_statuses() };
        let known: std::collections::HashSet<_> = statuses.iter().map(|status| status.user_id.clone()).collect();
        statuses.extend(rest.into_iter().filter(|status| !known.contains(&status.user_id)));
        statuses.truncate(limit);
        statuses
    }

    /// The status of every user with a grant that this process holds.
    pub fn held_statuses(&self) -> Vec<Status> {
        let mut statuses: Vec<_> = self.entries().iter().map(|entry| self.status_of(entry)).collect();
        statuses.retain(|status| status.state != State::None);
        statuses
    }

    /// A page of the users in a shared store, from at most `pages` of its own: records that yield no grant are left
    /// out. Users that this process holds have the state that they have here.
    async fn stored_statuses(
        &self,
        shared: &Postgres,
        after: &str,
        limit: usize,
        failing: bool,
        pages: usize,
    ) -> Result<Vec<Status>, StoreError> {
        let (mut after, mut statuses) = (after.to_owned(), Vec::new());
        for _ in 0..pages {
            if statuses.len() >= limit {
                break;
            }
            let wanted = limit - statuses.len();
            let page = self.timed("list", shared.users(&after, wanted, failing)).await?;
            let is_last = page.len() < wanted;
            let Some((last, _)) = page.last() else { break };
            last.as_str().clone_into(&mut after);
            for (user, lookup) in page {
                let held = self.entry(&user).filter(|entry| entry.stored() >= lookup.version);
                let status = match (held, lookup.content) {
                    (Some(entry), _) => self.status_of(&entry),
                    (None, Content::Grant(grant)) => self.stored_status(user, *grant, lookup.failed.as_ref()),
                    // A record that yields no grant is counted, and not listed.
                    (None, _) => continue,
                };
                if status.state != State::None {
                    statuses.push(status);
                }
            }
            if is_last {
                break;
            }
        }
        Ok(statuses)
    }

    /// The status of a user that this process does not hold.
    fn stored_status(&self, user: UserId, grant: Grant, failed: Option<&FailedRefresh>) -> Status {
        let now = self.0.clock.reading();
        let used = now.uptime_at(grant.used_at.unwrap_or(grant.updated_at));
        let grant = Arc::new(LiveGrant::loaded(grant, now));
        let state = match failed {
            Some(failed) => failed_state(grant, failed, now),
            None => GrantState::Fresh(grant),
        };
        self.status_in(&user, &state, used)
    }

    /// The health of every user with a grant that this process holds, for the metrics.
    fn held_health(&self) -> Vec<UserHealth> {
        let entries = self.entries();
        entries.iter().map(|entry| health_of(&self.status_of(entry))).filter(|user| user.state != State::None).collect()
    }

    /// The health of the users with a grant, for the metrics; of the first 10,000 in a shared store. One that fails
    /// leaves the users that this process holds.
    pub async fn health(&self) -> Vec<UserHealth> {
        let Some(shared) = self.0.store.shared() else { return self.held_health() };
        let Ok(users) = self.timed("list", shared.overview(OVERVIEW_ROWS)).await else { return self.held_health() };
        let (now, policy) = (self.0.clock.now(), self.policy());
        // What is held here may be older than the row: nobody tells this process of a refresh that was due.
        let held = |user: &UserOverview| self.entry(&user.user).filter(|entry| entry.stored() >= user.version);
        let health = |user: UserOverview| match held(&user) {
            Some(entry) => health_of(&self.status_of(&entry)),
            None => overview_health(&user, policy, now),
        };
        users.into_iter().map(health).filter(|user| user.state != State::None).collect()
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
        let (policy, now) = (self.policy(), self.0.clock.reading());
        let next_refresh_at = entry.due(policy, now).map(|due| now.wall_at(due));
        Status { next_refresh_at, ..self.status_in(&entry.user, &entry.held(), entry.used()) }
    }

    /// The status of a user in the state `held`, whom a caller last used at the uptime `used`.
    fn status_in(&self, user: &UserId, held: &GrantState, used: SignedDuration) -> Status {
        let grant = held.grant();
        let (policy, now) = (self.policy(), self.0.clock.reading());
        Status {
            user_id: user.clone(),
            state: held.state(policy, used, now),
            expires_at: grant.and_then(|grant| grant.expires_at(now)),
            updated_at: grant.map(|grant| grant.updated_at),
            consented_at: grant.and_then(|grant| grant.consented_at),
            consent_expires_at: grant.and_then(|grant| grant.consent_expires_at()),
            consent: grant.and_then(|grant| grant.consent(now.wall)),
            last_error: match held {
                GrantState::Failing { failure, .. } => Some(failure.code),
                GrantState::LoginRequired { reason, .. } => Some(reason),
                GrantState::Nothing | GrantState::Fresh(_) => None,
            },
            next_refresh_at: held.due(policy, used, now, 0.0).map(|due| now.wall_at(due)),
        }
    }
}

fn seconds(at: Timestamp) -> f64 {
    at.as_duration().as_secs_f64()
}

/// A user's health, as the status says it.
fn health_of(status: &Status) -> UserHealth {
    let idle = status.state == State::Idle;
    UserHealth {
        user: status.user_id.to_string(),
        state: status.state,
        token_expiry: status.expires_at.filter(|_| !idle).map(seconds),
        last_refresh: status.expires_at.and(status.updated_at).filter(|_| !idle).map(seconds),
        consent_expiry: status.consent_expires_at.map(seconds),
        consent_ending: status.consent.map(|age| age != ConsentAge::Valid),
        login_reason: status.last_error.filter(|_| status.state == State::LoginRequired),
    }
}

/// The health of a user that this process does not hold, by what the row says.
fn overview_health(user: &UserOverview, policy: RefreshPolicy, now: Timestamp) -> UserHealth {
    let within =
        |at: Timestamp, by: Duration| now.duration_since(at) <= SignedDuration::try_from(by).unwrap_or_default();
    let state = match (&user.failed, user.expires_at) {
        (Some(failed), _) if failed.refused => State::LoginRequired,
        (Some(_), _) => State::Failing,
        (None, Some(expires_at)) if expires_at > now => {
            let left = expires_at.duration_since(now);
            if left > SignedDuration::try_from(policy.margin).unwrap_or_default() {
                State::Fresh
            } else {
                State::Expiring
            }
        }
        (None, _) if !within(user.used_at.unwrap_or(user.updated_at), policy.idle_after) => State::Idle,
        (None, _) => State::Expiring,
    };
    let idle = state == State::Idle;
    let consent_expires_at = Grant::consent_expires(user.consented_at);
    let reason = |failed: &FailedRefresh| REFRESH_FAILURES.into_iter().find(|code| *code == failed.code);
    UserHealth {
        user: user.user.to_string(),
        state,
        token_expiry: user.expires_at.filter(|_| !idle).map(seconds),
        last_refresh: user.expires_at.filter(|_| !idle).map(|_| seconds(user.updated_at)),
        consent_expiry: consent_expires_at.map(seconds),
        consent_ending: consent_expires_at.map(|at| at.duration_since(now) <= Grant::CONSENT_NOTICE),
        login_reason: user.failed.as_ref().filter(|failed| failed.refused).and_then(reason),
    }
}
