//! Probes and metrics.

use url::Url;

/// What the admin door needs to know.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `admin.public_url`: how the admin door is reached from outside, where a proxy stands before it.
    pub public_url: Option<Url>,
}
