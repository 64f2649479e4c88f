//! Accept loop, limits, graceful drain: used by all doors.

use std::path::PathBuf;
use std::time::Duration;

/// Where a door listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `host:port`; the host is an address or `localhost`.
    Tcp(String),
    /// `unix:/path`.
    Unix(PathBuf),
}

/// What one door allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `proxy.max_connections`; at the cap the connection that has idled longest is closed first.
    pub max_connections: usize,
    /// `proxy.header_timeout`: a request's head, from its first byte.
    pub header_timeout: Duration,
    /// `proxy.idle_timeout`: a keep-alive connection without a request.
    pub idle_timeout: Duration,
}
