//! How TLS is spoken to Amazon, and to PostgreSQL: rustls, TLS 1.2 and newer, Mozilla's roots and those that the operator
//! adds.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};

/// A client configuration that trusts Mozilla's roots and `extra_roots`, and offers `alpn`. The roots are compiled in,
/// so that an image without a certificate store works.
pub fn client_config(extra_roots: &[CertificateDer<'static>], alpn: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
    let mut roots = mozillas_roots();
    for root in extra_roots {
        roots.add(root.clone())?;
    }
    client_config_of(roots, alpn)
}

/// Mozilla's roots.
pub fn mozillas_roots() -> RootCertStore {
    RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }
}

/// A client configuration that trusts `roots` alone, and offers `alpn`.
pub fn client_config_of(roots: RootCertStore, alpn: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = versions.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}
