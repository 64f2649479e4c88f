//! A throw-away certificate authority, and one leaf certificate for every Amazon host.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// The names in the leaf: loopback, and the hosts that a test may resolve to loopback.
const NAMES: [&str; 15] = [
    "localhost",
    "127.0.0.1",
    "::1",
    "api.amazon.com",
    "api.amazon.co.uk",
    "api.amazon.co.jp",
    "www.amazon.com",
    "eu.account.amazon.com",
    "apac.account.amazon.com",
    "advertising-api.amazon.com",
    "advertising-api-eu.amazon.com",
    "advertising-api-fe.amazon.com",
    "advertising-ai.amazon.com",
    "advertising-ai-eu.amazon.com",
    "advertising-ai-fe.amazon.com",
];

/// What the listeners need, and what a client needs to trust them.
pub(super) struct Identity {
    /// The certificate of the authority, to be given to clients as an extra trust root.
    pub(super) ca_pem: String,
    /// The configuration of every TLS listener.
    pub(super) server: Arc<ServerConfig>,
}

/// Why no identity could be created.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A key or certificate could not be made.
    #[error("the sandbox could not make its certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library refused the certificate.
    #[error("the sandbox could not use its certificate: {0}")]
    Tls(#[from] rustls::Error),
}

/// Creates a new authority and a leaf. The authority's key is dropped when this returns, so it can sign nothing else.
pub(super) fn throw_away(http2: bool) -> Result<Identity, IdentityError> {
    let mut authority = CertificateParams::default();
    authority.distinguished_name = name("adsidecar sandbox (throw-away CA, not Amazon)");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key = KeyPair::generate()?;
    let ca_pem = authority.self_signed(&authority_key)?.pem();

    let mut leaf = CertificateParams::new(NAMES.map(String::from))?;
    leaf.distinguished_name = name("adsidecar sandbox");
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    // Strict verifiers (Python 3.13 and later) reject a leaf without an authority key identifier.
    leaf.use_authority_key_identifier_extension = true;
    let leaf_key = KeyPair::generate()?;
    let leaf = leaf.signed_by(&leaf_key, &Issuer::new(authority, authority_key))?;

    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(leaf_key.serialize_der()));
    let mut server = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)?;
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    if http2 {
        server.alpn_protocols.insert(0, b"h2".to_vec());
    }
    Ok(Identity { ca_pem, server: Arc::new(server) })
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}
