//! Reads the target of a request: the host, the account prefix and the path. Path and query are forwarded byte for
//! byte; only the account prefix is removed.

use http::Uri;
use http::uri::PathAndQuery;
use percent_encoding::percent_decode_str;

use crate::domain::account::{AmazonHost, Region, check_name};

/// Longest path and query, in bytes. Amazon's gateways accept no more either.
const MAX_TARGET: usize = 8 << 10;
/// `/a/<account>/…` selects an account, for clients that can change nothing but their base URL.
const PREFIX: &str = "/a/";

/// A target that adsidecar can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The host that the target names.
    pub of: Destination,
    /// The account in the path's prefix.
    pub account: Option<String>,
    /// Path and query as they are sent to Amazon.
    pub path_and_query: PathAndQuery,
}

/// The host that a target names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// adsidecar: the origin form, or the absolute form with our own authority.
    Local,
    /// A host of the Ads API or of Amazon's MCP server.
    Amazon(AmazonHost),
    /// A host of Login with Amazon.
    Lwa,
}

/// Why a target is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadTarget {
    /// The target cannot be read; holds the reason.
    Form(&'static str),
    /// The absolute form with a host that is neither Amazon's nor ours.
    Foreign,
    /// Longer than 8 KiB.
    TooLong,
}

impl Target {
    /// Reads a request's target. `is_ours` tells whether an authority is our own.
    ///
    /// # Errors
    /// [`BadTarget`] if the target cannot be read, names another host, or is too long.
    pub fn read(uri: &Uri, is_ours: impl Fn(&str) -> bool) -> Result<Self, BadTarget> {
        let of = match (uri.scheme_str(), uri.authority()) {
            (None, None) => Destination::Local,
            (Some("http" | "https"), Some(authority)) => host_of(authority.as_str(), is_ours)?,
            (Some(_), _) => return Err(BadTarget::Form("the scheme of an absolute target is http or https")),
            (None, Some(_)) => return Err(BadTarget::Form("only CONNECT takes an authority as its target")),
        };
        let path_and_query = uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        let text = path_and_query.as_str();
        if text.len() > MAX_TARGET {
            return Err(BadTarget::TooLong);
        }
        if !text.starts_with('/') {
            return Err(BadTarget::Form("a target begins with /"));
        }
        let Some(prefixed) = text.strip_prefix(PREFIX).filter(|_| of == Destination::Local) else {
            return Ok(Self { of, account: None, path_and_query });
        };
        let end = prefixed.find(['/', '?']).unwrap_or(prefixed.len());
        let (account, rest) = prefixed.split_at(end);
        let account = percent_decode_str(account).decode_utf8().ok().filter(|name| check_name(name).is_ok());
        let account = account.ok_or(BadTarget::Form("the account in /a/<account>/ is no legal name"))?;
        let rest = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
        let path_and_query = rest.parse().map_err(|_| BadTarget::Form("the path behind the account cannot be read"))?;
        Ok(Self { of, account: Some(account.into_owned()), path_and_query })
    }

    /// The path, without its query.
    pub fn path(&self) -> &str {
        self.path_and_query.path()
    }
}

/// The host of an absolute target. Amazon's hosts are accepted without a port or with 80 or 443.
fn host_of(authority: &str, is_ours: impl Fn(&str) -> bool) -> Result<Destination, BadTarget> {
    if is_ours(authority) {
        return Ok(Destination::Local);
    }
    let host = authority.strip_suffix(":80").or_else(|| authority.strip_suffix(":443")).unwrap_or(authority);
    amazon_host(host).ok_or(BadTarget::Foreign)
}

/// Which of Amazon's hosts `host` is, ignoring case; `None` if it is none of them.
pub fn amazon_host(host: &str) -> Option<Destination> {
    let served = AmazonHost::ALL.into_iter().find(|served| host.eq_ignore_ascii_case(served.name()));
    served.map(Destination::Amazon).or_else(|| {
        let is_token_host = |region: &Region| {
            region.token_url().split('/').nth(2).is_some_and(|token_host| host.eq_ignore_ascii_case(token_host))
        };
        Region::ALL.iter().any(is_token_host).then_some(Destination::Lwa)
    })
}

/// The headers that select an account, a user and a region.
pub const SELECTORS: [&str; 3] = ["x-ads-account", "x-ads-user", "x-ads-region"];

/// Whether a header is, or could be meant as, one that selects: any `X-Ads-*`, also spelled with `_`, but for the caller
/// token.
pub fn is_selecting(name: &str) -> bool {
    let prefix = b"x-ads-";
    let bytes = name.as_bytes();
    let reads_like = |(byte, wanted): (&u8, &u8)| byte == wanted || (*wanted == b'-' && *byte == b'_');
    bytes.len() > prefix.len() && bytes.iter().zip(prefix).all(reads_like) && name != "x-ads-sidecar-token"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(target: &str) -> Result<Target, BadTarget> {
        Target::read(&target.parse().unwrap(), |authority| authority == "localhost:8001")
    }

    fn forwarded(target: &str) -> String {
        read(target).unwrap().path_and_query.to_string()
    }

    #[test]
    fn a_target_that_is_not_for_us_is_refused() {
        for foreign in [
            "http://evil.test/x",
            "http://advertising-api.amazon.com.evil.test/",
            "https://localhost:9999/",
            "http://advertising-api.amazon.com:8443/",
            "http://u@advertising-api.amazon.com/",
        ] {
            assert_eq!(read(foreign), Err(BadTarget::Foreign), "{foreign}");
        }
        for form in ["ftp://advertising-api.amazon.com/x", "*", "evil.test:80"] {
            assert!(matches!(read(form), Err(BadTarget::Form(_))), "{form}");
        }
        assert_eq!(read(&format!("/{}", "x".repeat(MAX_TARGET))), Err(BadTarget::TooLong));
    }

    #[test]
    fn path_and_query_are_forwarded_unchanged() {
        for target in
            ["/", "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/a", "/A/b/c", "/x?", "/x/../y?q=/a/b/", "/amc/%7Bid%7D"]
        {
            assert_eq!(forwarded(target), target);
        }
    }

    #[test]
    fn an_absolute_target_names_its_region() {
        let host = |target: &str| read(target).unwrap().of;
        let (ads, mcp) = (AmazonHost::ads, AmazonHost::mcp);
        assert_eq!(host("http://advertising-api-eu.amazon.com/v2/profiles"), Destination::Amazon(ads(Region::Eu)));
        assert_eq!(host("https://ADVERTISING-API.amazon.com:443/x?y"), Destination::Amazon(ads(Region::Na)));
        assert_eq!(host("http://advertising-ai.amazon.com/mcp"), Destination::Amazon(mcp(Region::Na)));
        assert_eq!(host("http://advertising-ai-fe.amazon.com:80/mcp/lite"), Destination::Amazon(mcp(Region::Fe)));
        assert_eq!(read("http://advertising-api-fe.amazon.com:80//x").unwrap().path_and_query, "//x");
        assert_eq!(read("http://api.amazon.co.uk/auth/o2/token").unwrap().of, Destination::Lwa);
        assert_eq!(read("http://localhost:8001/v2/profiles").unwrap().of, Destination::Local);
        assert_eq!(forwarded("http://advertising-api.amazon.com"), "/");
    }

    #[test]
    fn only_the_account_prefix_is_removed_from_the_path() {
        let target = read("/a/acme@eu|1//sp/x?a=%20").unwrap();
        assert_eq!(target.account.as_deref(), Some("acme@eu|1"));
        assert_eq!(target.path_and_query, "//sp/x?a=%20");
        assert_eq!(read("/a/acme%7C1/x").unwrap().account.as_deref(), Some("acme|1"));
        assert_eq!(forwarded("/a/acme"), "/");
        assert_eq!(forwarded("/a/acme?x=1"), "/?x=1");
        for bad in ["/a//x", "/a/%2e%2e/x", "/a/a%2fb/x", "/a/a%00/x"] {
            assert!(matches!(read(bad), Err(BadTarget::Form(_))), "{bad}");
        }
        assert_eq!(read("http://advertising-api.amazon.com/a/acme/x").unwrap().account, None);
    }
}
