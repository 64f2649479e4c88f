//! Observability: the log, the audit log, metrics, and the last hour.

pub mod hour;
pub mod metrics;
pub mod audit;
pub mod log;
