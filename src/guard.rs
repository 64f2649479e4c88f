//! Who may come in.

use crate::secret::Secret;

/// What the doors accept.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `proxy.allowed_hosts`: beside the loopback names; lower case, without a port.
    pub allowed_hosts: Vec<String>,
    /// `proxy.caller_token`: where not empty, each caller has to know one of them.
    pub caller_tokens: Vec<Secret>,
    /// The origin of `login.frontend_url`, such as `https://app.example.com`: the one web origin that may `fetch` the
    /// OAuth endpoints.
    pub frontend_origin: Option<String>,
}
