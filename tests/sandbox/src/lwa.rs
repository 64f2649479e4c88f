//! Login with Amazon: the consent page, the token endpoint, tokeninfo.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderName, LOCATION, PRAGMA};
use http::request::Parts;
use http::{Method, Response, StatusCode};
use jiff::Timestamp;
use maud::{DOCTYPE, Markup, html};
use serde_json::{Value, json};
use url::form_urlencoded;

use super::fault::Fault;
use super::reply::{self, Body};
use super::world::{Challenge, Consent, Credentials, Issued, Refusal, Twist, World, random_text};

/// Path of the consent page.
pub(super) const CONSENT: &str = "/ap/oa";
/// Path of the token endpoint.
pub(super) const TOKEN: &str = "/auth/o2/token";

/// Maximum length of a client id in bytes on the consent page ("maximum of 100 bytes").
const LONGEST_CLIENT_ID: usize = 100;

/// Responds to a call to Login with Amazon.
pub(super) fn answer(
    world: &mut World,
    head: &Parts,
    body: &[u8],
    fault: Option<&Fault>,
    auto_consent: bool,
    now: Timestamp,
) -> Response<Body> {
    let get = head.method == Method::GET || head.method == Method::HEAD;
    match head.uri.path() {
        CONSENT if get => consent(world, head.uri.query().unwrap_or_default(), auto_consent, now),
        TOKEN if head.method == Method::POST => token(world, head, body, fault, now),
        "/auth/o2/tokeninfo" if get => token_info(world, head, now),
        CONSENT | TOKEN | "/auth/o2/tokeninfo" => error_page(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"),
        // LWA responds to an unknown path with this, in HTML.
        _ => error_page(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error"),
    }
}

/// The consent page. Its two buttons send `decision=allow` or `decision=deny` to the same path; `auto=1` consents
/// immediately.
pub(super) fn consent(world: &mut World, query: &str, auto: bool, now: Timestamp) -> Response<Body> {
    let params = Params::parse(query.as_bytes());
    let asked = match Asked::check(world, &params) {
        Ok(asked) => asked,
        Err(text) => return error_page(StatusCode::BAD_REQUEST, &text),
    };
    let challenge = match (params.get("response_type"), challenge(&params)) {
        (Some("code"), Ok(challenge)) => challenge,
        (Some("code"), Err(text)) => return asked.refused("invalid_request", text),
        _ => return asked.refused("unsupported_response_type", "Unsupported response type"),
    };
    let automatic = auto || params.get("auto") == Some("1");
    match params.get("decision") {
        Some("deny") => asked.refused("access_denied", "Access was not permitted"),
        Some("allow") => allow(world, &asked, challenge, params.get("advertiser"), now),
        _ if automatic => allow(world, &asked, challenge, params.get("advertiser"), now),
        _ => reply::html(StatusCode::OK, consent_page(world, &params, &asked)),
    }
}

/// A consent request with a valid client, return URL and scope: from here on, errors are reported to the callback.
struct Asked<'a> {
    client_id: &'a str,
    redirect_uri: &'a str,
    scope: &'a str,
    state: Option<&'a str>,
}

impl<'a> Asked<'a> {
    fn check(world: &World, params: &'a Params) -> Result<Self, String> {
        if let Some(name) = params.repeated() {
            return Err(format!("The request repeats a parameter : {name}"));
        }
        let required = |name: &str| {
            params.get(name).ok_or_else(|| format!("The request is missing a required parameter : {name}"))
        };
        let client_id = required("client_id")?;
        let client = world
            .client(client_id)
            .filter(|_| client_id.len() <= LONGEST_CLIENT_ID)
            .ok_or("An unknown client was specified : client_id")?;
        let redirect_uri = required("redirect_uri")?;
        if !client.return_urls.iter().any(|allowed| allowed == redirect_uri) {
            return Err("The redirect URI you provided has not been whitelisted for your application".to_owned());
        }
        let scope = required("scope")?;
        if !scope.split(' ').all(|one| client.scopes.iter().any(|known| known == one)) {
            return Err("An unknown scope was requested".to_owned());
        }
        Ok(Self { client_id, redirect_uri, scope, state: params.get("state") })
    }

    fn refused(&self, error: &str, description: &str) -> Response<Body> {
        self.back(&[("error", error), ("error_description", description)])
    }

    /// Redirects the browser to the return URL with these parameters and the state.
    fn back(&self, params: &[(&str, &str)]) -> Response<Body> {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(params).extend_pairs(self.state.map(|state| ("state", state)));
        let separator = if self.redirect_uri.contains('?') { '&' } else { '?' };
        let mut response = reply::empty(StatusCode::FOUND);
        reply::set(&mut response, LOCATION, &format!("{}{separator}{}", self.redirect_uri, query.finish()));
        response
    }
}

fn allow(
    world: &mut World,
    asked: &Asked<'_>,
    challenge: Option<Challenge>,
    advertiser: Option<&str>,
    now: Timestamp,
) -> Response<Body> {
    let advertisers = &world.catalogue.advertisers;
    let known = advertisers.iter().find(|one| advertiser.is_none_or(|wanted| wanted == one.id));
    let Some(advertiser) = known.map(|one| one.id.clone()) else {
        return error_page(StatusCode::BAD_REQUEST, "The sandbox knows no such advertiser");
    };
    let consent = Consent {
        client_id: asked.client_id.into(),
        redirect_uri: asked.redirect_uri.into(),
        scope: asked.scope.into(),
        advertiser,
        challenge,
    };
    let code = world.consent(consent, now);
    asked.back(&[("code", &code), ("scope", asked.scope)])
}

/// "If the method is omitted, plain is assumed."
fn challenge(params: &Params) -> Result<Option<Challenge>, &'static str> {
    let Some(challenge) = params.get("code_challenge") else {
        return if params.get("code_challenge_method").is_none() { Ok(None) } else { Err("code_challenge is missing") };
    };
    // RFC 7636, sections 4.1 and 4.2: 43 to 128 characters with either method.
    if !(43..=128).contains(&challenge.len()) {
        return Err("code_challenge has a wrong length");
    }
    match params.get("code_challenge_method") {
        Some("S256") => Ok(Some(Challenge::S256(challenge.to_owned()))),
        None | Some("plain") => Ok(Some(Challenge::Plain(challenge.to_owned()))),
        Some(_) => Err("code_challenge_method is not supported"),
    }
}

fn consent_page(world: &World, params: &Params, asked: &Asked<'_>) -> String {
    let page: Markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "adsidecar sandbox: consent" }
            }
            body style="font-family: system-ui; max-width: 36rem; margin: 4rem auto; padding: 0 1rem; line-height: 1.5;
                overflow-wrap: anywhere" {
                h1 { "This is the adsidecar sandbox, not Amazon" }
                p { "Nothing here is real: it needs no Amazon account and no password. This page replaces "
                    "Amazon's own consent page." }
                p { b { (asked.client_id) } " asks for " b { (asked.scope) } ". The response goes to "
                    code { (asked.redirect_uri) } "." }
                form method="get" action=(CONSENT) {
                    @for (name, value) in params.0.iter().filter(|(name, _)| name != "advertiser") {
                        input type="hidden" name=(name) value=(value);
                    }
                    p { label { "Sign in as " select name="advertiser" {
                        @for one in &world.catalogue.advertisers { option value=(one.id) { (one.name) } }
                    } } }
                    button name="decision" value="allow" { "Allow" } " "
                    button name="decision" value="deny" { "Deny" }
                }
            }
        }
    };
    page.into_string()
}

fn token(world: &mut World, head: &Parts, body: &[u8], fault: Option<&Fault>, now: Timestamp) -> Response<Body> {
    let params = match Params::of_token_request(head, body) {
        Ok(params) => params,
        Err(refusal) => return refuse(refusal, now),
    };
    let issued = match fault {
        Some(Fault::InvalidGrant) => {
            let refresh = params.get("grant_type") == Some("refresh_token");
            Err(Refusal::InvalidGrant(if refresh { "refresh_token" } else { "code" }))
        }
        Some(Fault::InvalidClient) => Err(Refusal::InvalidClient),
        Some(Fault::UnauthorizedClient) => Err(Refusal::UnauthorizedClient),
        _ => issue(world, &params, fault, now),
    };
    match issued {
        Ok(issued) => give_out(&issued, fault, now),
        Err(refusal) => refuse(refusal, now),
    }
}

fn issue(world: &mut World, params: &Params, fault: Option<&Fault>, now: Timestamp) -> Result<Issued, Refusal> {
    let required = |name: &'static str| params.get(name).ok_or(Refusal::InvalidRequest(name));
    let twist = Twist {
        life: if let Some(Fault::ShortLife { seconds }) = fault { Some(*seconds) } else { None },
        rotate: matches!(fault, Some(Fault::RotateRefreshToken)),
    };
    let grant_type = required("grant_type")?;
    if !["authorization_code", "refresh_token"].contains(&grant_type) {
        return Err(Refusal::UnsupportedGrantType);
    }
    let client_id = required("client_id")?;
    world.authenticate(&Credentials { client_id, client_secret: required("client_secret")? })?;
    if grant_type == "refresh_token" {
        return world.refresh(client_id, required("refresh_token")?, &twist, now);
    }
    let (code, redirect_uri) = (required("code")?, required("redirect_uri")?);
    world.exchange(client_id, code, redirect_uri, params.get("code_verifier"), &twist, now)
}

fn give_out(issued: &Issued, fault: Option<&Fault>, now: Timestamp) -> Response<Body> {
    let mut answer = json!({
        "access_token": issued.access_token,
        "refresh_token": issued.refresh_token,
        "token_type": "bearer",
        "expires_in": issued.expires_in,
    });
    match (fault, answer.as_object_mut()) {
        (Some(Fault::NoRefreshToken), Some(fields)) => drop(fields.remove("refresh_token")),
        (Some(Fault::ExpiresIn { value }), Some(fields)) => drop(fields.insert("expires_in".into(), value.clone())),
        _ => {}
    }
    token_answer(StatusCode::OK, &answer, now)
}

fn refuse(refusal: Refusal, now: Timestamp) -> Response<Body> {
    let (status, error, text) = refusal.text();
    let body = json!({
        "error": error,
        "error_description": text,
        "error_index": random_text(24),
        "request_id": super::request_id(),
    });
    token_answer(status, &body, now)
}

impl Refusal {
    /// Status, error code and description, as LWA writes them.
    fn text(self) -> (StatusCode, &'static str, String) {
        let bad = StatusCode::BAD_REQUEST;
        match self {
            Self::InvalidGrant("code") => {
                (bad, "invalid_grant", "The request has an invalid grant parameter : code".into())
            }
            Self::InvalidGrant(parameter) => {
                let text = "User may have revoked or didn't grant the permission.";
                (bad, "invalid_grant", format!("The request has an invalid grant parameter : {parameter}. {text}"))
            }
            Self::InvalidClient => (StatusCode::UNAUTHORIZED, "invalid_client", "Client authentication failed".into()),
            Self::UnauthorizedClient => (bad, "unauthorized_client", "Not authorized for requested operation".into()),
            Self::InvalidRequest(parameter) => {
                (bad, "invalid_request", format!("The request is missing a required parameter : {parameter}"))
            }
            Self::UnsupportedGrantType => {
                let text = "The authorization grant type is not supported by the authorization server";
                (bad, "unsupported_grant_type", text.into())
            }
        }
    }
}

/// JSON with the headers recorded from the real endpoint.
fn token_answer(status: StatusCode, body: &Value, now: Timestamp) -> Response<Body> {
    let mut response = reply::answer(status, "application/json;charset=UTF-8", body.to_string());
    reply::set(&mut response, CACHE_CONTROL, "no-cache, no-store, must-revalidate");
    reply::set(&mut response, PRAGMA, "no-cache");
    let id = super::request_id();
    reply::set(&mut response, HeaderName::from_static("x-amzn-requestid"), &id);
    reply::set(&mut response, HeaderName::from_static("x-amz-rid"), &random_text(15));
    reply::set(&mut response, HeaderName::from_static("x-amz-date"), &super::http_date(now));
    response
}

fn token_info(world: &World, head: &Parts, now: Timestamp) -> Response<Body> {
    let params = Params::parse(head.uri.query().unwrap_or_default().as_bytes());
    let header = head.headers.get("x-amz-access-token").and_then(|value| value.to_str().ok());
    let access = params.get("access_token").or(header).and_then(|token| world.access(token, now));
    let Some(access) = access else {
        let body = json!({
            "error": "invalid_token",
            "error_description": "The request has an invalid parameter : access_token",
            "request_id": super::request_id(),
        });
        return token_answer(StatusCode::BAD_REQUEST, &body, now);
    };
    let body = json!({
        "aud": access.client_id,
        "user_id": access.advertiser,
        "app_id": access.client_id.replace("application-oa2-client", "application"),
        "iss": "https://www.amazon.com",
        "iat": access.issued_at.as_second(),
        // The remaining seconds, not a timestamp.
        "exp": access.expires_at.duration_since(now).as_secs(),
    });
    token_answer(StatusCode::OK, &body, now)
}

/// The `grant_type` of a token request, in any of its encodings.
pub(super) fn grant_type(head: &Parts, body: &[u8]) -> Option<String> {
    Params::of_token_request(head, body).ok()?.get("grant_type").map(str::to_owned)
}

/// The parameters of a request, in order.
struct Params(Vec<(String, String)>);

impl Params {
    fn parse(form: &[u8]) -> Self {
        Self(form_urlencoded::parse(form).into_owned().collect())
    }

    /// LWA accepts a form, JSON, a query string, and client credentials as HTTP Basic.
    fn of_token_request(head: &Parts, body: &[u8]) -> Result<Self, Refusal> {
        let mut params = Self::parse(head.uri.query().unwrap_or_default().as_bytes());
        let media_type = head.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if media_type.to_ascii_lowercase().starts_with("application/json") {
            let Ok(Value::Object(fields)) = serde_json::from_slice(body) else {
                return Err(Refusal::InvalidRequest("grant_type"));
            };
            params.0.extend(fields.into_iter().filter_map(|(name, value)| Some((name, value.as_str()?.to_owned()))));
        } else {
            params.0.extend(Self::parse(body).0);
        }
        let basic = head.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Basic "));
        if let Some(pair) = basic.and_then(|text| String::from_utf8(STANDARD.decode(text).ok()?).ok())
            && let Some((id, secret)) = pair.split_once(':')
        {
            // RFC 6749, section 2.3.1: both parts are form-encoded first.
            let decode = |half: &str| Self::parse(format!("v={half}").as_bytes()).get("v").map(str::to_owned);
            params.0.retain(|(name, _)| name != "client_id");
            params.0.extend([
                ("client_id".to_owned(), decode(id).unwrap_or_default()),
                ("client_secret".to_owned(), decode(secret).unwrap_or_default()),
            ]);
        }
        match params.repeated() {
            // "Request parameters MUST NOT be included more than once" (RFC 6749, section 3.2).
            Some(_) => Err(Refusal::InvalidRequest("grant_type")),
            None => Ok(params),
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, value)| n == name && !value.is_empty()).map(|(_, value)| value.as_str())
    }

    fn repeated(&self) -> Option<&str> {
        let again = |index: usize, name: &str| self.0[..index].iter().any(|(earlier, _)| earlier == name);
        self.0.iter().enumerate().find(|(index, (name, _))| again(*index, name)).map(|(_, (name, _))| name.as_str())
    }
}

/// Amazon's own HTML error page, which never reaches the callback.
fn error_page(status: StatusCode, text: &str) -> Response<Body> {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head { meta charset="utf-8"; title { "We're sorry! (adsidecar sandbox)" } }
            body {
                h1 { "We're sorry!" }
                p { "An error occurred when we tried to process your request." }
                h2 { "Error Summary" }
                p { (status.as_u16()) " " (status.canonical_reason().unwrap_or_default()) }
                p { (text) }
                p { "(This is the adsidecar sandbox, not Amazon.)" }
            }
        }
    };
    reply::html(status, page.into_string())
}
