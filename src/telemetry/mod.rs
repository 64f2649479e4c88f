//! Observability: the log, the audit log and metrics.

pub mod metrics;
pub mod audit;
pub mod log;
