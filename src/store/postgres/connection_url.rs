//! `store.postgres_url`: where the database is, and how it is spoken to.

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

/// A checked connection URL. Prints without the user, the password and the options.
#[derive(Clone)]
pub struct Address {
    pub(super) config: Config,
    pub(super) tls: Tls,
}

impl Address {
    /// Reads a URL of the form `postgres://user:password@host:5432/database?sslmode=verify-full`, as libpq does. What is
    /// wrong with it is told without quoting it.
    ///
    /// Where TLS is used, chain and name are checked, whatever `sslmode` says. Without an `sslmode` that decides, TLS is
    /// used to any host that is not this machine: the password never leaves it in the clear unless `disable` was said.
    pub fn parse(url: &str) -> Result<Self, String> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err("is no PostgreSQL URL: write postgres://user:password@host:5432/database".into());
        }
        let (url_alone, ssl) = without_ssl(url)?;
        let mut config: Config = url_alone.parse().map_err(|_| {
            "cannot be read: write postgres://user:password@host:5432/database, with reserved characters of the user and \
             the password percent-encoded, and options that are known here (sslmode, sslrootcert, sslnegotiation, \
             application_name, options)"
        })?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err("names no host: write postgres://user:password@host:5432/database".into());
        }
        let is_socket = |host: &Host| matches!(host, Host::Unix(_));
        let (sockets, all) =
            (config.get_hosts().iter().filter(|host| is_socket(host)).count(), config.get_hosts().len());
        let on_sockets = sockets > 0 && sockets == all;
        let encrypted = match ssl.mode.as_deref() {
            Some("disable") => false,
            Some("require" | "verify-ca" | "verify-full") => !on_sockets,
            None | Some("allow" | "prefer") => !is_local(&config),
            Some(_) => return Err("has an sslmode that there is not: write verify-full, or disable".into()),
        };
        if encrypted && sockets > 0 {
            return Err("names Unix sockets and hosts that need TLS: name one kind of them".into());
        }
        config.ssl_mode(if encrypted { SslMode::Require } else { SslMode::Disable });
        // Behind a name that leads to several servers only the one that takes writes is of use.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        if config.get_application_name().is_none() {
            config.application_name("adsidecar");
        }
        // What a server is asked for that is to speak TLS from the first byte on.
        let alpn: &[&[u8]] =
            if config.get_ssl_negotiation() == SslNegotiation::Direct { &[b"postgresql"] } else { &[] };
        let tls = tls::client_config_of(ssl.roots, alpn).map_err(|error| format!("cannot be used: {error}"))?;
        Ok(Self { config, tls: Tls::new(tls) })
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Address").field("hosts", &self.config.get_hosts()).finish_non_exhaustive()
    }
}

/// What a URL says about TLS. The library knows fewer words for it than libpq, so it is taken out.
struct Ssl {
    mode: Option<String>,
    roots: RootCertStore,
}

fn without_ssl(url: &str) -> Result<(String, Ssl), String> {
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
    Ok((url, Ssl { mode, roots: roots.unwrap_or_else(tls::mozillas_roots) }))
}

/// As in libpq, these are all that is trusted then.
fn read_roots(path: &PathBuf) -> Result<RootCertStore, String> {
    let pem = std::fs::read(path).map_err(|error| {
        format!("names an sslrootcert that cannot be read ({}): check the path and its rights", error.kind())
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

/// Whether all of it is on this machine.
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
        match Address::parse(url).unwrap_or_else(|error| panic!("{url}: {error}")).config.get_ssl_mode() {
            SslMode::Require => true,
            SslMode::Disable => false,
            other => panic!("{url}: {other:?}"),
        }
    }

    #[test]
    fn what_is_no_usable_url_is_refused_without_being_quoted() {
        for (url, part) in [
            ("canary", "no PostgreSQL URL"),
            ("host=db password=canary", "no PostgreSQL URL"),
            ("mysql://u:canary@db/d", "no PostgreSQL URL"),
            ("postgres://", "names no host"),
            ("postgres://u:canary@db:port/d", "cannot be read"),
            ("postgres://u:canary@db/d?sslcert=canary.pem", "cannot be read"),
            ("postgres://u:canary@db/d?sslmode=canary", "sslmode that there is not"),
            ("postgres://u:canary@db/d?sslrootcert=/canary/there-is-none", "sslrootcert that cannot be read"),
            ("postgres://u:canary@db/d?sslrootcert=/dev/null", "without a certificate"),
            ("postgres://u:canary@db,%2Frun%2Fcanary/d", "name one kind"),
        ] {
            let error = Address::parse(url).unwrap_err();
            assert!(error.contains(part) && !error.contains("canary"), "{url}: {error}");
        }
    }

    #[test]
    fn the_password_leaves_this_machine_by_tls_unless_disable_was_said() {
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
    fn it_is_printed_without_its_user_and_password() {
        let one = Address::parse("postgres://anna:canary@db/d").unwrap();
        let text = format!("{one:?}");
        assert!(text.contains("db") && !text.contains("canary") && !text.contains("anna"), "{text}");
    }
}
