//! `upstream.proxy` and `amazon.proxy`: a proxy of the network that connections to Amazon have to pass.

use std::fmt;

use hyper_util::client::proxy::matcher::Matcher;
use percent_encoding::percent_decode_str;
use url::{Host, Url};

use super::secret::Secret;

/// A proxy that opens tunnels. TLS to Amazon goes through the tunnel, so the proxy sees hosts and ports alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutgoingProxy {
    /// How it is asked for a tunnel.
    pub protocol: ProxyProtocol,
    /// Its host, as in a URL.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The user, and the password.
    pub credentials: Option<(String, Secret)>,
    /// The key or the environment variable that names it, for messages.
    pub named_by: String,
    /// `NO_PROXY`: the hosts that are reached without it.
    pub except: Option<String>,
}

/// How a proxy is asked for a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// HTTP CONNECT (RFC 9110, section 9.3.6).
    Http,
    /// SOCKS5 (RFC 1928). The proxy resolves names.
    Socks5,
}

impl OutgoingProxy {
    /// Reads `http://user:password@host:port` or `socks5://…`. `named_by` is the key or the variable that holds it.
    ///
    /// # Errors
    /// Says what is wrong with the URL, without repeating any of it.
    pub fn parse(text: &str, named_by: &str) -> Result<Self, &'static str> {
        let url = Url::parse(text.trim()).map_err(|_| "is not a proxy's URL: write http://host:port")?;
        let protocol = match url.scheme() {
            "http" => ProxyProtocol::Http,
            // `h` means that the proxy resolves names, which it always does here.
            "socks5" | "socks5h" => ProxyProtocol::Socks5,
            _ => return Err("has an unknown scheme: write http://host:port or socks5://host:port"),
        };
        let host = match url.host() {
            Some(Host::Domain(name)) if !name.is_empty() => name.to_ascii_lowercase(),
            Some(Host::Ipv4(address)) => address.to_string(),
            Some(Host::Ipv6(address)) => format!("[{address}]"),
            Some(Host::Domain(_)) | None => return Err("names no host: write http://host:port"),
        };
        let port = if protocol == ProxyProtocol::Http { url.port_or_known_default() } else { url.port() };
        // Port 80 of HTTP has to be written too: what is meant is mostly 3128 or 8080.
        let port = port.filter(|_| has_port(text)).ok_or("names no port: write http://host:port, such as :3128")?;
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err("holds more than a host and a port: write http://host:port");
        }
        let credentials = credentials(&url)?;
        Ok(Self { protocol, host, port, credentials, named_by: named_by.to_owned(), except: None })
    }

    /// Whether connections to `host` pass the proxy.
    pub fn is_for(&self, host: &str) -> bool {
        let Some(except) = &self.except else { return true };
        let any = Matcher::builder().https("http://proxy").no(except.as_str()).build();
        format!("https://{host}/").parse().is_ok_and(|uri| any.intercept(&uri).is_some())
    }

    /// The URL, without credentials.
    pub fn url(&self) -> String {
        let scheme = match self.protocol {
            ProxyProtocol::Http => "http",
            ProxyProtocol::Socks5 => "socks5",
        };
        format!("{scheme}://{}:{}", self.host, self.port)
    }
}

impl fmt::Display for OutgoingProxy {
    /// The URL without credentials, and what names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the proxy {} ({})", self.url(), self.named_by)
    }
}

/// Whether the authority of `text` ends with a port. [`Url`] drops the default port of a scheme.
fn has_port(text: &str) -> bool {
    let authority = text.split("://").nth(1).unwrap_or_default().split('/').next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    host.rsplit_once(':').is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The user and the password of `url`, percent-decoded. HTTP Basic (RFC 7617) cannot express a colon in a user, and
/// SOCKS5 (RFC 1929) has one byte for each length.
fn credentials(url: &Url) -> Result<Option<(String, Secret)>, &'static str> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(std::borrow::Cow::into_owned);
    let (Ok(user), Ok(password)) = (decoded(url.username()), decoded(url.password().unwrap_or_default())) else {
        return Err("has credentials that are not UTF-8: percent-encode them");
    };
    let legal = |text: &str| text.len() <= 255 && !text.chars().any(char::is_control);
    if !legal(&user) || !legal(&password) || user.is_empty() || user.contains(':') {
        return Err("has illegal credentials: a user without a colon, and a password, each of at most 255 bytes");
    }
    Ok(Some((user, Secret::new(password))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<OutgoingProxy, &'static str> {
        OutgoingProxy::parse(text, "upstream.proxy")
    }

    #[test]
    fn a_proxy_is_a_scheme_a_host_a_port_and_credentials() {
        for (text, url, user, password) in [
            ("http://proxy:3128", "http://proxy:3128", None, ""),
            ("http://Proxy.Example:80/", "http://proxy.example:80", None, ""),
            ("socks5://127.0.0.1:1080", "socks5://127.0.0.1:1080", None, ""),
            ("socks5h://[::1]:1080", "socks5://[::1]:1080", None, ""),
            ("http://ann:p%40ss%3A%2f@proxy:8080", "http://proxy:8080", Some("ann"), "p@ss:/"),
            ("socks5://ann@proxy:1", "socks5://proxy:1", Some("ann"), ""),
        ] {
            let proxy = parse(text).unwrap();
            assert_eq!(proxy.url(), url, "{text}");
            assert_eq!(proxy.to_string(), format!("the proxy {url} (upstream.proxy)"));
            let credentials = proxy.credentials.as_ref().map(|(user, secret)| (user.as_str(), secret.expose()));
            assert_eq!(credentials, user.map(|user| (user, password)));
            assert!(password.is_empty() || !format!("{proxy:?} {proxy}").contains(password));
        }
    }

    #[test]
    fn what_is_no_proxy_is_refused_without_being_repeated() {
        for text in [
            "",
            "proxy",
            "proxy:3128",
            "http://proxy",
            "http://canary@proxy",
            "http://proxy:",
            "http://:3128",
            "https://proxy:3128",
            "socks4://proxy:1080",
            "ftp://proxy:21",
            "http://proxy:3128/path",
            "http://proxy:3128?canary",
            "http://proxy:3128#canary",
            "http://a%00canary:b@proxy:3128",
            "http://a%3Acanary:b@proxy:3128",
            "http://:canary@proxy:3128",
            "http://%ff:canary@proxy:3128",
            "http://proxy:99999",
        ] {
            let error = parse(text).unwrap_err();
            assert!(!error.contains("canary"), "{text}: {error}");
            assert!(error.contains(": "), "{text}: the error names no cure: {error}");
        }
    }

    #[test]
    fn no_proxy_excepts_hosts_as_in_curl() {
        let proxy = |except: &str| OutgoingProxy { except: Some(except.to_owned()), ..parse("http://p:1").unwrap() };
        for except in ["*", "amazon.com", ".amazon.com", "x, api.amazon.com", "10.0.0.0/8,api.amazon.com"] {
            assert!(!proxy(except).is_for("api.amazon.com"), "{except}");
        }
        for except in ["", "amazon.co.uk", "zon.com", "127.0.0.1"] {
            assert!(proxy(except).is_for("api.amazon.com"), "{except}");
        }
        assert!(!proxy("127.0.0.0/8").is_for("127.0.0.1"));
        assert!(parse("http://p:1").unwrap().is_for("api.amazon.com"));
    }
}
