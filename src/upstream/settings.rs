//! What the configuration says about connections to Amazon.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use url::Url;

use super::IdleTimeout;
use crate::domain::account::AmazonHost;
use crate::domain::outgoing_proxy::OutgoingProxy;

/// The addresses of Amazon's hosts, and the timeouts for requests to them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `upstream.na`, …, `upstream.mcp_fe`: `https` origins without a path, in the order of [`AmazonHost::ALL`].
    // Boxed: the configuration is moved through futures, which must stay small.
    pub origins: Box<[Url; AmazonHost::ALL.len()]>,
    /// `upstream.ca_file`: additional trust roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// `upstream.http2`: which HTTP versions are offered.
    pub http2: Http2,
    /// `upstream.proxy`: the proxy through which the hosts are reached.
    pub proxy: Option<OutgoingProxy>,
    /// `upstream.connect_timeout`: limit for DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// `upstream.response_timeout`: from the end of the request to the end of the response's head.
    pub response_timeout: Duration,
    /// `upstream.idle_timeout`: how long an unused connection stays in the pool.
    pub idle_timeout: IdleTimeout,
}

/// Which HTTP versions adsidecar offers to Amazon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Http2 {
    /// HTTP/2 if the server selects it by ALPN, else HTTP/1.1.
    #[default]
    Auto,
    /// Only HTTP/1.1.
    Never,
    /// Only HTTP/2. A server without it causes an error.
    Always,
}
