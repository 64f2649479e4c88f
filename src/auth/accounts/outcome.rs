//! How a search for accounts ended, source by source, and what is stored of it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::account::{Region, UserId};
use crate::domain::found_account::FoundAccount;

/// The accounts of one user, as they are stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UserAccounts {
    /// Whose grant reaches them.
    pub user_id: UserId,
    /// When Amazon was asked last.
    pub synced_at: Timestamp,
    /// How each source answered then.
    pub outcomes: Vec<Outcome>,
    /// The accounts, those included that are missing now.
    pub accounts: Vec<FoundAccount>,
}

/// How one source answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// What was asked for.
    pub source: Source,
    /// The region that was asked; absent for AMC, which has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
    /// Whether it answered.
    pub status: Status,
    /// Number of accounts in the answer.
    pub count: usize,
    /// Why there is no answer: `unauthorized`, `forbidden`, `throttled`, `server_error`, `refused`, `unreachable`,
    /// `timeout`, `too_large` or `bad_answer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The same in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Where accounts are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// `GET /v2/profiles` of a region.
    Profiles,
    /// `GET /managerAccounts` of a region.
    ManagerAccounts,
    /// `GET /dsp/advertisers` for each agency profile of a region.
    DspAdvertisers,
    /// `GET /amc/accounts` and `GET /amc/instances`.
    Amc,
}

/// Whether a source answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It lists accounts.
    Found,
    /// It answered with an empty list.
    Empty,
    /// The grant does not reach it, which is normal for all but profiles.
    NoAccess,
    /// It did not answer. The accounts that it listed before are kept.
    Failed,
}

impl UserAccounts {
    /// No accounts of `user`.
    pub(super) fn none(user: &UserId, now: Timestamp) -> Self {
        Self { user_id: user.clone(), synced_at: now, outcomes: Vec::new(), accounts: Vec::new() }
    }

    /// Whether this only says that a search is to come.
    pub(super) fn was_only_wanted(&self) -> bool {
        self.outcomes.is_empty() && self.accounts.is_empty()
    }

    /// Whether at least one region listed its profiles.
    pub fn any_region_answered(&self) -> bool {
        let answered = |outcome: &Outcome| matches!(outcome.status, Status::Found | Status::Empty);
        self.outcomes.iter().any(|outcome| outcome.source == Source::Profiles && answered(outcome))
    }

    /// Why no region answered, for an error.
    pub fn failures(&self) -> String {
        let profiles = self.outcomes.iter().filter(|outcome| outcome.source == Source::Profiles);
        let failed = profiles.filter_map(|outcome| Some((outcome.region?, outcome.detail.as_deref()?)));
        failed.map(|(region, detail)| format!("{region}: {detail}")).collect::<Vec<_>>().join("; ")
    }
}
