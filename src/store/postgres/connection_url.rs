//! `store.postgres_url`: parses the connection URL and decides about TLS.

use std::fmt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, SslNegotiation, TargetSessionAttrs};

use super::tls::Tls;
use crate::domain::tls;

/// A validated connection URL. Its `Debug` output shows the hosts only, never user, password or options.
#[derive(Clone)]
pub struct ConnectionUrl {
    pub(super) config: Config,
    pub(super) tls: Tls,
}

impl ConnectionUrl {
    /// Parses a URL of the form `postgres://user:password@host:5432/database?sslmode=verify-full`, as libpq does.
    ///
    /// With TLS, the certificate chain and the host name are always verified, whatever `sslmode` says. If `sslmode`
    /// leaves the choice open, TLS is used for every host that is not local: the password never leaves this machine
    /// unencrypted unless `sslmode` is `disable`.
    ///
    /// # Errors
    ///
    /// A description of the problem and its remedy, which never quotes the URL.
    pub fn parse(url: &str) -> Result<Self, String> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err("is not a PostgreSQL URL: write postgres://user:password@host:5432/database".into());
        }
        let (plain_url, tls_options) = split_tls_options(url)?;
        let mut config: Config = plain_url.parse().map_err(|_| {
            "cannot be parsed: write postgres://user:password@host:5432/database, with reserved characters in user and \
             password percent-encoded, and only supported options (sslmode, sslrootcert, sslnegotiation, \
             application_name, options)"
        })?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err("names no host: write postgres://user:password@host:5432/database".into());
        }
        let is_socket = |host: &Host| matches!(host, Host::Unix(_));
        let (sockets, all) =
            (config.get_hosts().iter().filter(|host| is_socket(host)).count(), config.get_hosts().len());
        let on_sockets = sockets > 0 && sockets == all;
        let encrypted = match tls_options.mode.as_deref() {
            Some("disable") => false,
            Some("require" | "verify-ca" | "verify-full") => !on_sockets,
            None | Some("allow" | "prefer") => !is_local(&config),
            Some(_) => return Err("has an unknown sslmode: use verify-full or disable".into()),
        };
        if encrypted && sockets > 0 {
            return Err("names both Unix sockets and hosts that need TLS: use only one of the two".into());
        }
        config.ssl_mode(if encrypted { SslMode::Require } else { SslMode::Disable });
        // If the URL names several servers, connect to the one that accepts writes.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        if config.get_application_name().is_none() {
            config.application_name("adsidecar");
        }
        // With direct TLS negotiation PostgreSQL requires this ALPN protocol.
        let alpn: &[&[u8]] =
            if config.get_ssl_negotiation() == SslNegotiation::Direct { &[b"postgresql"] } else { &[] };
        let tls = tls::client_config_of(tls_options.roots, alpn).map_err(|error| format!("cannot be used: {error}"))?;
        Ok(Self { config, tls: Tls::new(tls) })
    }
}

impl fmt::Debug for ConnectionUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionUrl").field("hosts", &self.config.get_hosts()).finish_non_exhaustive()
    }
}

/// The TLS options of a URL. They are removed before the URL is parsed, because tokio-postgres supports fewer of them
/// than libpq.
struct TlsOptions {
    mode: Option<String>,
    roots: RootCertStore,
}

/// Splits a URL into the URL without its TLS options, and those options.
fn split_tls_options(url: &str) -> Result<(String, TlsOptions), String> {
    let (mut mode, mut roots) = (None, None);
    let (base, query) = url.split_once('?').unwrap_or((url, ""));
    let mut others = Vec::new();
    for option in query.split('&').filter(|option| !option.is_empty()) {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let value = percent_decode_str(value).decode_utf8_lossy().into_owned();
        match name {
            "sslmode" => mode = Some(value),
            "sslrootcert" if value == "system" => roots = None,
            "sslrootcert" => roots = Some(read_roots(&PathBuf::from(value))?),
            _ => others.push(option),
        }
    }
    let url = if others.is_empty() { base.to_owned() } else { format!("{base}?{}", others.join("&")) };
    Ok((url, TlsOptions { mode, roots: roots.unwrap_or_else(tls::mozillas_roots) }))
}

/// Reads the certificates of `sslrootcert`. As in libpq, they replace the default authorities.
fn read_roots(path: &PathBuf) -> Result<RootCertStore, String> {
    let pem = std::fs::read(path).map_err(|error| {
        format!("names an sslrootcert that cannot be read ({}): check the path and its permissions", error.kind())
    })?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let added = certificate.ok().and_then(|certificate| roots.add(certificate).ok());
        added.ok_or("names an sslrootcert that is damaged: give a PEM file with the authorities' certificates")?;
    }
    if roots.is_empty() {
        return Err(
            "names an sslrootcert without a certificate: give a PEM file with the authorities' certificates".into()
        );
    }
    Ok(roots)
}

/// Whether all hosts are on this machine.
fn is_local(config: &Config) -> bool {
    let host = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
        }
    };
    match config.get_hostaddrs() {
        [] => config.get_hosts().iter().all(host),
        addresses => addresses.iter().all(std::net::IpAddr::is_loopback),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encrypted(url: &str) -> bool {
        match ConnectionUrl::parse(url).unwrap_or_else(|error| panic!("{url}: {error}")).config.get_ssl_mode() {
            SslMode::Require => true,
            SslMode::Disable => false,
            other => panic!("{url}: {other:?}"),
        }
    }

    #[test]
    fn an_unusable_url_is_refused_without_being_quoted() {
        for (url, part) in [
            ("canary", "not a PostgreSQL URL"),
            ("host=db password=canary", "not a PostgreSQL URL"),
            ("mysql://u:canary@db/d", "not a PostgreSQL URL"),
            ("postgres://", "names no host"),
            ("postgres://u:canary@db:port/d", "cannot be parsed"),
            ("postgres://u:canary@db/d?sslcert=canary.pem", "cannot be parsed"),
            ("postgres://u:canary@db/d?sslmode=canary", "unknown sslmode"),
            ("postgres://u:canary@db/d?sslrootcert=/canary/there-is-none", "sslrootcert that cannot be read"),
            ("postgres://u:canary@db/d?sslrootcert=/dev/null", "without a certificate"),
            ("postgres://u:canary@db,%2Frun%2Fcanary/d", "only one of the two"),
        ] {
            let error = ConnectionUrl::parse(url).unwrap_err();
            assert!(error.contains(part) && !error.contains("canary"), "{url}: {error}");
        }
    }

    #[test]
    fn the_password_leaves_this_machine_over_tls_only_unless_sslmode_is_disable() {
        for remote in ["db", "db.example.com:6432", "10.1.2.3", "[fd00::1]", "db,localhost", "LOCALHOST.example"] {
            for mode in ["", "?sslmode=prefer", "?sslmode=allow", "?sslmode=require", "?sslmode=verify-full"] {
                assert!(encrypted(&format!("postgres://u:p@{remote}/d{mode}")), "{remote}{mode}");
            }
            assert!(!encrypted(&format!("postgres://u:p@{remote}/d?sslmode=disable")), "{remote}");
        }
        for local in ["localhost", "127.0.0.1", "127.8.9.1:5433", "[::1]", "%2Fvar%2Frun%2Fpostgresql"] {
            for mode in ["", "?sslmode=prefer", "?sslmode=disable"] {
                assert!(!encrypted(&format!("postgresql://u:p@{local}/d{mode}")), "{local}{mode}");
            }
        }
        assert!(encrypted("postgres://u:p@localhost/d?sslmode=verify-full&application_name=x"));
        assert!(!encrypted("postgres://u:p@%2Frun/d?sslmode=verify-full"), "a Unix socket has no TLS and needs none");
        assert!(encrypted("postgres://u:p@localhost/d?hostaddr=10.0.0.1"), "the address is what counts");
    }

    #[test]
    fn debug_output_has_no_secrets() {
        let url = ConnectionUrl::parse("postgres://anna:canary@db/d").unwrap();
        let text = format!("{url:?}");
        assert!(text.contains("db") && !text.contains("canary") && !text.contains("anna"), "{text}");
    }
}
