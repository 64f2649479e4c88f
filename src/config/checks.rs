//! Checks of single values. The messages tell how to fix the value and never repeat it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use url::{Host, Url};

use crate::server::Listen;

/// Longest path of a Unix socket, in bytes: `sun_path` has 104 on macOS, the closing zero included (108 on Linux).
const MAX_SOCKET_PATH: usize = 103;

/// A listener's address: `host:port` with an IP address or `localhost`, or `unix:/path`.
pub(super) fn listen(text: &str) -> Result<Listen, &'static str> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path.len() {
            _ if !path.starts_with('/') || path.contains('\0') => {
                Err("names no socket: write unix: and an absolute path")
            }
            ..=MAX_SOCKET_PATH => Ok(Listen::Unix(PathBuf::from(path))),
            _ => Err("names a socket with more than 103 bytes, the most that all systems take: choose a shorter path"),
        };
    }
    let text = text.to_ascii_lowercase();
    let localhost = text.strip_prefix("localhost:").is_some_and(|port| port.parse::<u16>().is_ok());
    if localhost || text.parse::<SocketAddr>().is_ok() {
        Ok(Listen::Tcp(text))
    } else {
        Err("is no address: write host:port with an IP address or localhost, such as 127.0.0.1:8001, [::1]:8001 or \
             0.0.0.0:8001, or unix:/path")
    }
}

/// The socket addresses that a TCP listener can be bound to.
fn addresses(listen: &Listen) -> Vec<SocketAddr> {
    let Listen::Tcp(text) = listen else { return Vec::new() };
    match text.strip_prefix("localhost:").map(str::parse) {
        Some(Ok(port)) => vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()],
        _ => text.parse().into_iter().collect(),
    }
}

/// The mode of a socket's file, in octal digits as `chmod` takes them.
pub(super) fn socket_mode(text: &str) -> Result<u32, &'static str> {
    match u32::from_str_radix(text, 8) {
        Ok(mode @ ..=0o777) if text.len() == 4 => Ok(mode),
        _ => Err("is no file mode: write four octal digits in quotes, such as \"0600\" or \"0660\""),
    }
}

/// Whether other machines can reach the listener.
pub(super) fn is_remote(listen: &Listen) -> bool {
    addresses(listen).iter().any(|address| !is_loopback(address.ip()))
}

/// The TCP port of an address; `None` for a Unix socket.
pub(super) fn port(listen: &Listen) -> Option<u16> {
    addresses(listen).first().map(SocketAddr::port)
}

/// Whether both cannot be bound at once. Port 0 never clashes: the system chooses a free port each time.
pub(super) fn clash(a: &Listen, b: &Listen) -> bool {
    if let (Listen::Unix(a), Listen::Unix(b)) = (a, b) {
        return a == b;
    }
    let covers = |a: IpAddr, b: IpAddr| a == b || (a.is_unspecified() && (a.is_ipv6() || b.is_ipv4()));
    let same = |a: &SocketAddr, b: &SocketAddr| {
        a.port() == b.port() && a.port() != 0 && (covers(a.ip(), b.ip()) || covers(b.ip(), a.ip()))
    };
    addresses(a).iter().any(|a| addresses(b).iter().any(|b| same(a, b)))
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// An absolute `http` or `https` URL that says what it looks like: the parser forgives what a browser forgives (blanks,
/// backslashes, missing slashes), and each of these has led to an open redirect.
pub(super) fn web_url(text: &str) -> Result<Url, &'static str> {
    let scheme = ["https://", "http://"].into_iter().find(|scheme| text.starts_with(scheme));
    let authority = scheme.and_then(|scheme| text[scheme.len()..].split(['/', '?', '#']).next());
    if authority.is_none_or(str::is_empty) || !text.bytes().all(|b| b.is_ascii_graphic() && b != b'\\') {
        return Err("is no absolute URL: write it with https:// (or http://) and a host, without blanks");
    }
    if text.len() > 2048 {
        return Err("is longer than 2048 characters, the most that browsers and Amazon take: shorten it");
    }
    let url = Url::parse(text).map_err(|_| "is no URL that parses: check its host and port")?;
    if !url.username().is_empty() || url.password().is_some() || authority.is_some_and(|a| a.contains('@')) {
        return Err("holds a user or password: remove what stands before the @");
    }
    if url.fragment().is_some() {
        return Err("holds a fragment: remove # and what follows");
    }
    Ok(url)
}

/// Whether the URL's host is this machine.
pub(super) fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => is_loopback(ip.into()),
        Some(Host::Ipv6(ip)) => is_loopback(ip.into()),
        None => false,
    }
}

/// A URL that secrets are sent to.
pub(super) fn https_url(text: &str) -> Result<Url, &'static str> {
    match web_url(text)? {
        url if url.scheme() == "https" => Ok(url),
        _ => Err("is not https: secrets go there, so write https://"),
    }
}

/// A URL that only browsers are sent to; a sandbox's may be plain on this machine.
pub(super) fn https_or_local_url(text: &str) -> Result<Url, &'static str> {
    match web_url(text)? {
        url if url.scheme() == "https" || is_local(&url) => Ok(url),
        _ => Err("is neither https nor on this machine: write https://, or http:// with localhost"),
    }
}

/// An `https` URL of a host and perhaps a port, nothing more.
pub(super) fn https_origin(text: &str) -> Result<Url, &'static str> {
    let url = https_url(text)?;
    if url.path() == "/" && url.query().is_none() {
        Ok(url)
    } else {
        Err("holds more than a host: write https://host without path and query")
    }
}

/// A host of the `Host` header: a name or an address without a port, lower-cased; IPv6 addresses get their brackets.
pub(super) fn host(text: &str) -> Result<String, &'static str> {
    let text = text.to_ascii_lowercase();
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&text);
    if let Ok(ip) = bare.parse::<Ipv6Addr>() {
        return Ok(format!("[{ip}]"));
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        return Ok(text);
    }
    match text.rsplit_once(':') {
        _ if text.contains('/') => Err("holds a URL: write the host alone, such as app.internal"),
        Some((name, port)) if port.parse::<u16>().is_ok() && (name.ends_with(']') || !name.contains(':')) => {
            Err("holds a port: leave it away, any port is accepted")
        }
        _ => Err("holds what is no host name: write names in ASCII such as app.internal, without wildcard and blank"),
    }
}

/// The client id, which goes into a header. Its shape was checked with that of the other credentials.
pub(super) fn client_id(text: &str) -> Result<String, &'static str> {
    if text.len() <= 256 && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("is no client id: copy it once more from the security profile, without blanks")
    }
}

/// Scopes, separated by blanks (RFC 6749, section 3.3).
pub(super) fn scope(text: &str) -> Result<String, &'static str> {
    if text.len() <= 1024 {
        Ok(text.split(' ').filter(|scope| !scope.is_empty()).collect::<Vec<_>>().join(" "))
    } else {
        Err("is longer than 1024 characters: write scopes such as advertising::campaign_management")
    }
}

/// Whether the path of a redirect URI is adsidecar's callback.
pub(super) fn is_callback(redirect_uri: &str) -> bool {
    Url::parse(redirect_uri).is_ok_and(|url| url.path() == "/api/auth/amazon/callback")
}

/// A redirect URI for this environment, byte for byte as it is written.
pub(super) fn redirect_uri(text: &str, production: bool) -> Result<String, &'static str> {
    let url = web_url(text)?;
    if production && url.scheme() != "https" && !is_local(&url) {
        return Err(
            "is neither https nor on this machine: in production Amazon's code must not travel in the clear, so \
                    write https://, or http:// with localhost",
        );
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_cannot_be_bound_are_refused() {
        let long = format!("unix:/{}", "x".repeat(MAX_SOCKET_PATH));
        for bad in [
            "",
            ":8001",
            "8001",
            "*:8001",
            "localhost",
            "localhost:",
            "localhost:70000",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:65536",
            "::1:8001",
            "[::1]",
            "app.internal:80",
            "http://127.0.0.1:8001",
            "unix:",
            "unix:x.sock",
            "unix:@x",
            "unix:/a\0b",
            &long,
            "256.0.0.1:1",
            "0127.0.0.1:1",
        ] {
            assert!(listen(bad).is_err(), "{bad}");
        }
        for good in ["127.0.0.1:0", "[::1]:8001", "0.0.0.0:8001", "[::]:1", "localhost:8001"] {
            assert_eq!(listen(good), Ok(Listen::Tcp(good.to_owned())));
        }
        assert_eq!(listen("LOCALHOST:1"), Ok(Listen::Tcp("localhost:1".to_owned())));
        assert_eq!(listen("unix:/run/X.sock"), Ok(Listen::Unix("/run/X.sock".into())));
    }

    #[test]
    fn remote_is_what_another_machine_can_reach() {
        for remote in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[fd00::1]:1", "[::ffff:10.0.0.1]:1"] {
            assert!(is_remote(&listen(remote).unwrap()), "{remote}");
        }
        for local in ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "localhost:1", "unix:/x"] {
            assert!(!is_remote(&listen(local).unwrap()), "{local}");
        }
    }

    #[test]
    fn listeners_that_cannot_both_be_bound_clash() {
        let clash = |a, b| clash(&listen(a).unwrap(), &listen(b).unwrap());
        for (a, b) in [
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("localhost:1", "127.0.0.1:1"),
            ("[::1]:1", "localhost:1"),
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("127.0.0.1:1", "[::]:1"),
            ("[::]:1", "0.0.0.0:1"),
            ("unix:/x", "unix:/x"),
        ] {
            assert!(clash(a, b) && clash(b, a), "{a} {b}");
        }
        for (a, b) in [
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("127.0.0.1:1", "127.0.0.1:2"),
            ("127.0.0.1:1", "[::1]:1"),
            ("0.0.0.0:1", "[::1]:1"),
            ("unix:/x", "unix:/y"),
            ("unix:/x", "127.0.0.1:1"),
        ] {
            assert!(!clash(a, b) && !clash(b, a), "{a} {b}");
        }
    }

    #[test]
    // Covers: failure 91.
    fn urls_that_a_browser_would_forgive_are_refused() {
        for bad in [
            "",
            "//evil",
            "/\\evil",
            "https:evil",
            "https:/evil",
            "https:///evil",
            "https:\\\\evil",
            "http://",
            "https://?x",
            "ftp://a",
            "javascript:alert(1)",
            "data:text/html,x",
            "file:///etc/passwd",
            "a.example",
            "https://a b",
            " https://a",
            "https://a ",
            "https://a\r\nx: y",
            "https://a\t.b",
            "https://a\\@b",
            "https://user@a",
            "https://user:pw@a",
            "https://@a",
            "https://:@a",
            "https://a#f",
            "https://a#",
            "https://a:99999",
            "https://a:b",
            "https://[::1",
            "https://%00",
            "https://ä.example",
            "https://a%0d%0a.b",
            "HTTPS://a",
            "https://a/\u{202e}x",
        ] {
            assert!(web_url(bad).is_err(), "{bad:?}");
        }
        for good in
            ["https://a", "http://localhost:3000/app?x=%0d%0a", "https://a.example:8443/x//y", "http://[::1]:1/"]
        {
            assert_eq!(web_url(good).unwrap(), Url::parse(good).unwrap());
        }
    }

    #[test]
    fn secrets_are_never_sent_in_the_clear() {
        for bad in ["http://localhost:8443/x", "http://a.example"] {
            assert!(https_url(bad).is_err() && https_origin(bad).is_err(), "{bad}");
        }
        assert!(https_or_local_url("http://a.example/ap/oa").is_err());
        assert!(https_or_local_url("http://localhost.evil/ap/oa").is_err());
        assert!(https_or_local_url("http://127.0.0.1:1/ap/oa").is_ok());
        for bad in ["https://a/x", "https://a/?", "https://a?x", "https://a//"] {
            assert!(https_origin(bad).is_err(), "{bad}");
        }
        assert!(https_origin("https://a:8443/").is_ok());
    }

    #[test]
    fn a_redirect_uri_in_the_clear_is_for_this_machine_or_for_development() {
        for bad in ["http://app.example/cb", "http://10.0.0.1/cb", "http://localhost.evil/cb", "http://0.0.0.0/cb"] {
            assert!(redirect_uri(bad, true).is_err(), "{bad}");
            assert!(redirect_uri(bad, false).is_ok(), "{bad}");
        }
        for good in
            ["https://app.example/a%20b?c=d&", "http://localhost:8001/", "http://127.0.0.1", "http://[::1]:8001/cb"]
        {
            assert_eq!(redirect_uri(good, true).as_deref(), Ok(good));
        }
    }

    #[test]
    fn hosts_have_no_port_and_no_wildcard() {
        for (bad, cure) in [
            ("app:8001", "leave it away"),
            ("127.0.0.1:80", "leave it away"),
            ("[::1]:80", "leave it away"),
            ("https://app", "write the host alone"),
            ("app/x", "write the host alone"),
            ("*.app", "without wildcard"),
            ("a b", "without wildcard"),
            ("", "without wildcard"),
            ("app.", "without wildcard"),
            ("ä", "in ASCII"),
            ("[::1", "write names"),
        ] {
            let message = host(bad).unwrap_err();
            assert!(message.contains(cure), "{bad}: {message}");
        }
        for (good, kept) in [
            ("App.Internal", "app.internal"),
            ("10.0.0.1", "10.0.0.1"),
            ("FD00::1", "[fd00::1]"),
            ("[fd00:0::1]", "[fd00::1]"),
            ("my_app", "my_app"),
        ] {
            assert_eq!(host(good).as_deref(), Ok(kept));
        }
    }

    #[test]
    fn what_would_split_a_header_is_no_client_id() {
        for bad in ["a b", "a\n", "ä", &"x".repeat(257)] {
            assert!(client_id(bad).is_err(), "{bad:?}");
        }
        assert!(scope(&"x".repeat(1025)).is_err());
        assert_eq!(scope(" a::b  c::d ").as_deref(), Ok("a::b c::d"));
    }
}
