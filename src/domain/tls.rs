//! TLS client settings for Amazon and PostgreSQL: rustls, TLS 1.2 or newer, Mozilla's root certificates and any that
//! the operator adds.

use std::sync::Arc;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use rustls::{CertificateError, ClientConfig, RootCertStore};

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

/// What a TLS error usually comes from, and what to do. `owner` is whose certificate was expected ("Amazon's"), and
/// `ca_key` the configuration key that names further trust roots for its hosts.
pub fn explain(error: &rustls::Error, owner: &str, ca_key: &str) -> String {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    match error {
        rustls::Error::InvalidCertificate(
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. },
        ) => {
            let now = Timestamp::now().strftime("%Y-%m-%d %H:%M UTC");
            format!("this machine's clock says {now}, and at that time the certificate is not valid: set the clock")
        }
        rustls::Error::InvalidCertificate(_) => format!(
            "the certificate is not {owner}: if a proxy in your network intercepts TLS, name its CA in {ca_key}"
        ),
        _ => "what answers there speaks no TLS that adsidecar accepts: look for a proxy or a filter in between"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_is_not_valid_now_is_blamed_on_the_clock_and_any_other_on_interception() {
        let explain = |error: rustls::Error| explain(&error, "Amazon's", "upstream.ca_file");
        for error in [CertificateError::Expired, CertificateError::NotValidYet] {
            assert!(explain(error.into()).contains("this machine's clock says"));
        }
        assert!(explain(CertificateError::UnknownIssuer.into()).contains("upstream.ca_file"));
        assert!(!explain(rustls::Error::DecryptError).contains("upstream.ca_file"));
    }
}
