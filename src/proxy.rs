//! The spine.

use crate::account::{Account, Region};

/// How callers select accounts, and what is held for a replay.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `amazon.client_id`.
    pub client_id: String,
    /// `amazon.region`.
    pub region: Region,
    /// `[[account]]`.
    pub accounts: Vec<Account>,
    /// `proxy.selection`.
    pub selection: Selection,
    /// `proxy.replay_limit`, bytes of a request body that are held for one replay after a 401.
    pub replay_limit: usize,
    /// `proxy.max_body`, bytes; `None`: bodies stream without a limit.
    pub max_body: Option<u64>,
    /// `proxy.token_shim`.
    pub token_shim: bool,
}

/// Whether callers choose their account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// By path prefix or header.
    #[default]
    Header,
    /// What callers say is ignored.
    Fixed,
}
