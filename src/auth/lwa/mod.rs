//! The Login with Amazon (LWA) client: exchanges an authorization code, refreshes a grant.
//!
//! It tolerates what LWA really sends (a lifetime as a string, no refresh token, HTML errors), and is strict about size
//! and time. Each call opens its own connection, follows no redirects and uses no proxy but `amazon.proxy`: a token
//! call on a reused connection that is just being closed could not be repeated safely.

pub mod answer;

use std::error::Error;
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Proxy, Response, StatusCode};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;
use url::Url;
use zeroize::Zeroizing;

use crate::domain::account::Region;
use crate::domain::clock::date_of;
use crate::domain::grant::{RefreshToken, Tokens};
use crate::domain::outgoing_proxy::OutgoingProxy;
use crate::domain::secret::Secret;
use crate::domain::tls;

/// The token endpoint and our client registration with it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `amazon.client_id`.
    pub client_id: String,
    /// `amazon.client_secret`: one or more secrets, tried in order.
    pub client_secrets: Vec<Secret>,
    /// `amazon.redirect_uri`, byte for byte as configured.
    pub redirect_uri: String,
    /// `amazon.scope`: the requested scopes, separated by spaces.
    pub scope: String,
    /// `amazon.region`: selects the token host. Any would do, since codes and tokens are global.
    pub region: Region,
    /// `amazon.authorize_url`, if it replaces the region's URL.
    pub authorize_url: Option<Url>,
    /// `amazon.token_url`, if it replaces the region's URL.
    pub token_url: Option<Url>,
    /// `amazon.proxy`: the proxy through which the token endpoint is reached.
    pub proxy: Option<OutgoingProxy>,
    /// `amazon.ca_file`: extra trust roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
}

/// Timeout of a whole token call. LWA responds within a second or not at all, and callers are waiting.
const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the addresses of a host are looked up for an error message.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum response body. A token response is about 2 KiB; a longer body is not one.
const MAX_ANSWER: usize = 64 << 10;

/// Why a token call returned no tokens. `code` is one of a fixed list and safe for metrics and users; `detail` is for
/// the log and never contains more of LWA's body than its error code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LwaError {
    /// A temporary failure: the network, an LWA outage, or an unreadable response.
    #[error("{code}: {detail}")]
    TryLater {
        /// `unreachable`, `dns`, `tls`, `timeout`, `throttled`, `server_error` or `bad_answer`.
        code: &'static str,
        /// What happened.
        detail: String,
        /// How long LWA asked us to wait.
        retry_after: Option<Duration>,
        /// Whether LWA may have processed the request, and only its response was lost.
        taken: bool,
    },
    /// LWA refused this grant or code: the user has to consent again.
    #[error("Login with Amazon refused the grant: {code}")]
    Refused {
        /// `invalid_grant`, `unauthorized_client` or `invalid_scope`.
        code: &'static str,
    },
    /// LWA refused our client id, client secret or request: the operator must fix it, a new consent does not help.
    #[error("Login with Amazon refused the client: {code}; check amazon.client_id and amazon.client_secret")]
    Operator {
        /// `invalid_client` or `invalid_request`.
        code: &'static str,
    },
}

/// A client for LWA's token endpoint.
#[derive(Clone, Debug)]
pub struct Lwa {
    http: Client,
    token_url: Url,
    /// The proxy, if it is for `token_url`.
    proxy: Option<OutgoingProxy>,
    settings: Settings,
}

/// The proxy as reqwest knows it.
///
/// # Errors
/// A sentence if reqwest takes no such URL.
pub fn through(proxy: &OutgoingProxy) -> Result<Proxy, String> {
    let failed = |_| format!("{}: its URL cannot be used", proxy.named_by);
    // `h`: the proxy resolves names.
    let mut url = Url::parse(&proxy.url().replacen("socks5:", "socks5h:", 1)).map_err(failed)?;
    if let Some((user, password)) = &proxy.credentials {
        // They are percent-encoded. Only a URL without a host takes none.
        let _ = url.set_username(user).and_then(|()| url.set_password(Some(password.expose())));
    }
    Proxy::all(url).map_err(|_| format!("{}: its URL cannot be used", proxy.named_by))
}

impl Lwa {
    /// Builds the client; makes no call.
    ///
    /// # Errors
    /// A message if TLS or the HTTP client cannot be set up, or the region's token URL is invalid.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let tls = tls::client_config(&settings.extra_roots, &[b"http/1.1"]).map_err(|error| error.to_string())?;
        let token_url = match settings.token_url.clone() {
            Some(url) => url,
            None => settings.region.token_url().parse().map_err(|error: url::ParseError| error.to_string())?,
        };
        let mut http = Client::builder()
            .tls_backend_preconfigured(tls)
            .default_headers(HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .https_only(true)
            .http1_only()
            .pool_max_idle_per_host(0)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT);
        let host = token_url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let proxy = settings.proxy.clone().filter(|proxy| proxy.is_for(host));
        if let Some(proxy) = &proxy {
            http = http.proxy(through(proxy)?);
        }
        let http = http.build().map_err(|error| error.to_string())?;
        Ok(Self { http, token_url, proxy, settings })
    }

    /// `amazon.scope`: the requested scopes, separated by spaces.
    pub fn scope(&self) -> &str {
        &self.settings.scope
    }

    /// `amazon.redirect_uri`.
    pub fn redirect_uri(&self) -> &str {
        &self.settings.redirect_uri
    }

    /// The path of `amazon.redirect_uri`, without its query; `/` if it has none.
    pub fn redirect_path(&self) -> &str {
        let uri = &self.settings.redirect_uri;
        let path = uri.find("://").and_then(|at| uri[at + 3..].find('/').map(|slash| &uri[at + 3 + slash..]));
        path.map_or("/", |path| path.split('?').next().unwrap_or("/"))
    }

    /// The URL of the consent page for a login in `region`. `challenge` is the PKCE code challenge (method S256).
    ///
    /// # Errors
    /// [`url::ParseError`] if the region's URL is invalid.
    pub fn authorize_url(&self, region: Region, state: &str, challenge: &str) -> Result<Url, url::ParseError> {
        let mut url = match self.settings.authorize_url.clone() {
            Some(url) => url,
            None => region.authorize_url().parse()?,
        };
        url.query_pairs_mut()
            .append_pair("client_id", &self.settings.client_id)
            .append_pair("scope", &self.settings.scope)
            .append_pair("response_type", "code")
            .append_pair("redirect_uri", &self.settings.redirect_uri)
            .append_pair("state", state)
            .append_pair("code_challenge", challenge)
            .append_pair("code_challenge_method", "S256");
        Ok(url)
    }

    /// Exchanges an authorization code (RFC 6749, section 4.1.3; RFC 7636, section 4.5).
    ///
    /// # Errors
    /// [`LwaError`] if LWA refuses the code or our client, or returns no usable response in time.
    pub async fn exchange(&self, code: &Secret, verifier: &Secret) -> Result<Tokens, LwaError> {
        self.call(&[
            ("grant_type", "authorization_code"),
            ("code", code.expose()),
            ("redirect_uri", &self.settings.redirect_uri),
            ("code_verifier", verifier.expose()),
        ])
        .await
    }

    /// Refreshes a grant (RFC 6749, section 6).
    ///
    /// # Errors
    /// [`LwaError`] if LWA refuses the grant or our client, or returns no usable response in time.
    pub async fn refresh(&self, token: &RefreshToken) -> Result<Tokens, LwaError> {
        self.call(&[("grant_type", "refresh_token"), ("refresh_token", token.secret().expose())]).await
    }

    /// Number of client secrets, which [`refresh_with`](Self::refresh_with) takes by their index. While Amazon
    /// propagates a new secret, it may refuse either one.
    pub fn secrets(&self) -> usize {
        self.settings.client_secrets.len()
    }

    /// Refreshes a grant with one client secret: one request, which ends after 10 s at the latest.
    ///
    /// # Errors
    /// As [`refresh`](Self::refresh).
    pub async fn refresh_with(&self, token: &RefreshToken, secret: usize) -> Result<Tokens, LwaError> {
        let Some(secret) = self.settings.client_secrets.get(secret) else {
            return Err(LwaError::Operator { code: "invalid_client" });
        };
        self.call_with(&[("grant_type", "refresh_token"), ("refresh_token", token.secret().expose())], secret).await
    }

    /// Tries the client secrets in order: while Amazon propagates a new secret, it may refuse either one.
    async fn call(&self, grant: &[(&str, &str)]) -> Result<Tokens, LwaError> {
        let mut outcome = Err(LwaError::Operator { code: "invalid_client" });
        for secret in &self.settings.client_secrets {
            outcome = self.call_with(grant, secret).await;
            if !matches!(outcome, Err(LwaError::Operator { code: "invalid_client" })) {
                break;
            }
        }
        outcome
    }

    async fn call_with(&self, grant: &[(&str, &str)], secret: &Secret) -> Result<Tokens, LwaError> {
        let mut form = grant.to_vec();
        form.push(("client_id", &self.settings.client_id));
        form.push(("client_secret", secret.expose()));
        let response = match self.http.post(self.token_url.clone()).form(&form).send().await {
            Ok(response) => response,
            Err(error) if error.is_connect() || error.is_timeout() => {
                return Err(self.tried(no_answer(error)).await);
            }
            Err(error) => return Err(no_answer(error)),
        };
        let status = response.status();
        let (retry_after, server_time) = (retry_after(&response), date_of(response.headers()));
        let kind = content_type(&response);
        let body = read(response).await?;
        match status {
            StatusCode::OK => answer::tokens(&body).map(|tokens| Tokens { server_time, ..tokens }).map_err(|why| {
                // The body itself is not logged: it may hold a token.
                if kind.contains("html") || body.trim_ascii_start().starts_with(b"<") {
                    return bad_answer(answer::interposed(status, &kind));
                }
                bad_answer(format!("{why} ({} bytes, {kind})", body.len()))
            }),
            _ => Err(answer::refusal(status, &kind, &body, retry_after)),
        }
    }

    /// Adds to `error` the host and the addresses that were tried.
    async fn tried(&self, error: LwaError) -> LwaError {
        let LwaError::TryLater { code, detail, retry_after, taken } = error else { return error };
        if let Some(proxy) = &self.proxy {
            // Names are resolved there.
            let host = self.token_url.host_str().unwrap_or_default();
            return LwaError::TryLater {
                code,
                detail: format!("{host} through {proxy}: {detail}"),
                retry_after,
                taken,
            };
        }
        let host = self.token_url.host_str().unwrap_or_default();
        let port = self.token_url.port_or_known_default().unwrap_or(443);
        let bare = host.trim_matches(['[', ']']);
        let found = timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((bare, port))).await;
        let addresses = match found {
            Ok(Ok(addresses)) => addresses.map(|address| address.ip().to_string()).collect::<Vec<_>>().join(", "),
            Ok(Err(_)) | Err(_) => String::new(),
        };
        let place = match addresses.as_str() {
            "" => format!("{host}:{port}, for which no address was found"),
            addresses if addresses == bare => format!("{host}:{port}"),
            addresses => format!("{host}:{port} ({addresses})"),
        };
        LwaError::TryLater { code, detail: format!("{place}: {detail}"), retry_after, taken }
    }
}

/// The type in `Content-Type` without its parameters, and how the body is compressed, as they may be logged.
fn content_type(response: &Response) -> String {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"/+-._".contains(&byte);
    let first = |name| {
        let value = response.headers().get(name)?.to_str().ok()?;
        let first = value.split([';', ',']).next()?.trim();
        ((1..=64).contains(&first.len()) && first.bytes().all(legal)).then(|| first.to_owned())
    };
    let kind = first(CONTENT_TYPE).unwrap_or_else(|| "no content type".to_owned());
    // Nobody was asked to compress it, so something in between did.
    match first(CONTENT_ENCODING).filter(|coding| !coding.eq_ignore_ascii_case("identity")) {
        Some(coding) => format!("{kind}, compressed with {coding} although that was not asked for"),
        None => kind,
    }
}

/// Reads the response body, up to [`MAX_ANSWER`]. The buffer holds tokens, so it is zeroed on drop.
async fn read(mut response: Response) -> Result<Zeroizing<Vec<u8>>, LwaError> {
    let mut body = Zeroizing::new(Vec::with_capacity(MAX_ANSWER));
    while let Some(chunk) = response.chunk().await.map_err(no_answer)? {
        if body.len() + chunk.len() > MAX_ANSWER {
            return Err(bad_answer("the body exceeds 64 KiB"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// `Retry-After` in seconds. The date form is ignored: LWA does not send it.
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn no_answer(error: reqwest::Error) -> LwaError {
    // If connecting failed, LWA has not received the request.
    let connecting = error.is_connect();
    let code = match () {
        () if error.is_timeout() => "timeout",
        () if connecting && is_tls(&error) => "tls",
        () if connecting && is_dns(&error) => "dns",
        () if error.is_body() || error.is_decode() => "bad_answer",
        () => "unreachable",
    };
    let explained = tls_error(&error).filter(|_| code == "tls").map(|error| {
        let cause = tls::explain(error, "Login with Amazon's", "amazon.ca_file");
        format!("{cause}; ")
    });
    let explained = explained.unwrap_or_default();
    // The URL is dropped because it adds nothing; it holds no secret (the form is in the body).
    let detail = format!("{explained}{}", causes(&error.without_url()));
    LwaError::TryLater { code, detail, retry_after: None, taken: !connecting }
}

fn bad_answer(detail: impl std::fmt::Display) -> LwaError {
    LwaError::TryLater { code: "bad_answer", detail: detail.to_string(), retry_after: None, taken: true }
}

fn is_tls(error: &reqwest::Error) -> bool {
    tls_error(error).is_some()
}

fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    chain(error).find_map(|cause| {
        let mut inner = cause;
        // An I/O error hides the error it wraps: its `source()` is the source of the wrapped error.
        while let Some(hidden) = inner.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            inner = hidden;
        }
        inner.downcast_ref::<rustls::Error>()
    })
}

/// The HTTP library exports no type for DNS errors, only this message.
fn is_dns(error: &reqwest::Error) -> bool {
    chain(error).any(|cause| cause.to_string() == "dns error")
}

fn causes(error: &reqwest::Error) -> String {
    chain(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn chain(error: &reqwest::Error) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(Some(error as &(dyn Error + 'static)), |error| (*error).source())
}
