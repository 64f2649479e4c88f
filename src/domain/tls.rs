//! TLS client settings for Amazon and PostgreSQL: rustls, TLS 1.2 or newer, Mozilla's root certificates and any that
//! the operator adds.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};

/// Builds a client configuration that trusts Mozilla's roots and `extra_roots`, and offers the ALPN protocols `alpn`.
/// Mozilla's roots are compiled in, so a container image needs no certificate store.
///
/// # Errors
/// Fails if a certificate of `extra_roots` cannot be used as a trust anchor.
pub fn client_config(extra_roots: &[CertificateDer<'static>], alpn: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
    let mut roots = mozillas_roots();
    for root in extra_roots {
        roots.add(root.clone())?;
    }
    client_config_of(roots, alpn)
}

/// Mozilla's root certificates, as of the `webpki-roots` release that was compiled in.
pub fn mozillas_roots() -> RootCertStore {
    RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }
}

/// Builds a client configuration that trusts only `roots`, and offers the ALPN protocols `alpn`.
///
/// # Errors
/// Fails if the crypto provider supports none of the safe default TLS versions.
pub fn client_config_of(roots: RootCertStore, alpn: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = versions.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}
