//! What Prometheus scrapes.

/// Bounds on what is exported.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `metrics.max_user_series`: beyond it users fold into `other`.
    pub max_user_series: usize,
}
