//! Who holds which token.

use std::time::Duration;

/// When tokens are renewed (contract, section 5).
#[derive(Clone, Debug)]
pub struct Settings {
    /// `refresh.margin`, `refresh.ahead`, `refresh.idle_after`.
    pub policy: crate::token::Policy,
    /// `refresh.sweep`: how often all users are looked at, so that none is missed.
    pub sweep: Duration,
    /// `refresh.concurrency`: background renewals at once.
    pub concurrency: usize,
    /// `amazon.refresh_token`: adopted as user `default`.
    pub adopt: Option<crate::token::RefreshToken>,
}
