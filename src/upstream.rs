//! Pooled TLS connections to the Ads hosts.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use url::Url;

/// Where the Ads hosts are and how long they are waited for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `upstream.na`, `upstream.eu`, `upstream.fe`: `https` origins without a path, by [`crate::account::Region`].
    pub origins: [Url; 3],
    /// `upstream.ca_file`: extra trust roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// `upstream.http2`.
    pub http2: Http2,
    /// `upstream.connect_timeout`: DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// `upstream.response_timeout`: from the end of the request to the first byte of the answer.
    pub response_timeout: Duration,
    /// `upstream.idle_timeout`: how long an unused connection stays in the pool. Below the server's own, or a request
    /// meets a connection that is just being closed.
    pub idle_timeout: Duration,
}

/// Whether HTTP/2 is spoken to Amazon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Http2 {
    /// Where the server offers it by ALPN.
    #[default]
    Auto,
    /// HTTP/1.1 only.
    Never,
    /// HTTP/2 or no connection.
    Always,
}
