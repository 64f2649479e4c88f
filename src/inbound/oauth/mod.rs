//! The OAuth endpoints: `/api/auth/amazon/*`, and the token endpoint for SDKs (`token_endpoint`).
//!
//! The file is a little over 400 lines: each endpoint is one method, and what they share is in the other files.

mod events;
mod accounts;
mod errors;
mod responses;
mod pages;
mod query;
mod token_endpoint;

use std::sync::Arc;

use bytes::Bytes;
use cookie::{Cookie, SameSite};
use http::header::{HeaderMap, HeaderValue, LINK, SET_COOKIE};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use serde_json::json;
use url::Url;

use crate::auth::accounts::Directory;
use crate::auth::login::{
    Again, BeginError, Callback, Login, LoginEnded, LoginFailure, LoginOutcome, LoginRequest, Progress,
};
use crate::auth::tokens::{Status, TokenError, TokenManager};
use crate::domain::account::{Region, UserId};
use crate::domain::clock::to_the_millisecond;
use crate::domain::secret::Secret;
use crate::inbound::admission::{Admission, Admitted, is_loopback, without_port};
use crate::inbound::destination::{Endpoint, LOGIN};
use crate::inbound::problem::{Problem, add_private_headers};
use crate::inbound::request_id::{REQUEST_ID, RequestIds};
use crate::notify::Events;
use crate::server::{CallerBody, Peer};
use crate::telemetry::metrics::Metrics;
use errors::parameter;
pub use errors::{LoginError, token_problem};
pub use events::EventStream;
use pages::{Links, WayOn};
use query::{Query, Users};
pub(in crate::inbound) use responses::prefers_html;
use responses::{allow_origin, cookie_of, is_prefetch, json, nothing, preflight, redirect};

type FullResponse = Response<Full<Bytes>>;

/// Amazon's page where a user removes an app: LWA has no revocation endpoint.
const AMAZONS_APPS_PAGE: &str =
    "<https://www.amazon.com/ap/adam>; rel=\"related\"; title=\"Login with Amazon: remove the app\"";
const NO_PENDING_GRANT: &str =
    "No grant is pending under this id: it is in use already, or its 10 minutes have expired.";
/// How long a browser keeps a login's cookie: longer than the login is valid, so that after its end the page can lead
/// the person on.
const COOKIE_HOURS: i64 = 1;
/// Most users in one response of the status endpoint.
const PAGE: usize = 1000;

/// Serves the OAuth endpoints.
#[derive(Debug)]
pub struct OauthEndpoints {
    pub(crate) login: Login,
    pub(crate) tokens: TokenManager,
    pub(crate) directory: Directory,
    pub(crate) admission: Admission,
    pub(crate) metrics: Arc<Metrics>,
    /// The region of logins that name none.
    pub(crate) region: Region,
    pub(crate) token_shim: bool,
    /// The user of requests to Amazon that select none, and the other users whom the configuration names.
    pub(crate) users: (UserId, Vec<UserId>),
    /// Whether this listener has the other endpoints besides the callback.
    pub(crate) has_all: bool,
    /// The proxy listener's authority, for the links in responses to requests without a `Host` of ours.
    pub(crate) authority: String,
    pub(crate) request_ids: Arc<RequestIds>,
    /// For the event stream.
    pub(crate) events: Events,
    /// The URL of the status page, if the admin listener has a TCP address.
    pub(crate) status_page: Option<String>,
}

impl OauthEndpoints {
    /// Serves a request on the login listener. Always returns a response.
    pub async fn serve_callback(&self, request: Request<CallerBody>, peer: Peer) -> FullResponse {
        let (parts, body) = request.into_parts();
        let id = self.request_ids.of(&parts.headers);
        let request_id = id.to_str().unwrap_or_default();
        let mut response = match self.admission.login(&parts, peer) {
            Ok(Admitted::Own { endpoint, cors }) => {
                Box::pin(self.serve(endpoint, cors, &parts, body, request_id)).await
            }
            Ok(Admitted::Upstream(_) | Admitted::Tunnel) => {
                LoginError::NotFound(None).problem(|_| String::new()).respond(request_id)
            }
            Err(rejected) => Problem::from(rejected.refusal).respond(request_id),
        };
        add_private_headers(response.headers_mut());
        response.headers_mut().insert(REQUEST_ID, id);
        response
    }

    /// Serves an admitted request to `endpoint`. Always returns a response. If `cors` is an origin, its pages may read
    /// the response, even if it reports an error.
    pub async fn serve(
        &self,
        endpoint: Endpoint,
        cors: Option<HeaderValue>,
        parts: &Parts,
        body: CallerBody,
        request_id: &str,
    ) -> FullResponse {
        let served = match (&parts.method, &cors) {
            (&Method::OPTIONS, Some(_)) if endpoint != Endpoint::Unknown => Ok(preflight()),
            _ => self.endpoint(endpoint, parts, body).await,
        };
        let mut response = served.unwrap_or_else(|error| {
            if let LoginError::Refused(refusal) = &error {
                self.metrics.guard_denied.with_label_values(&[refusal.reason()]).inc();
            }
            let problem = error.problem(|user| self.login_step(&parts.headers, user));
            self.refuse(&parts.headers, problem, request_id)
        });
        if let Some(origin) = cors {
            allow_origin(response.headers_mut(), origin);
        }
        add_private_headers(response.headers_mut());
        response
    }

    /// The response with an error: a page for a person, a document for a program.
    pub fn refuse(&self, headers: &HeaderMap, problem: Problem, request_id: &str) -> FullResponse {
        if prefers_html(headers) {
            let is_here = self.has_all && self.admission.own_authority(headers).is_some();
            let start = is_here && !self.admission.needs_caller_token();
            let links = Links { start, logins: self.login_obstacle(headers).is_none() };
            pages::problem(&problem, request_id, links, self.status_page(headers))
        } else {
            problem.respond(request_id)
        }
    }

    async fn endpoint(&self, endpoint: Endpoint, parts: &Parts, body: CallerBody) -> Result<FullResponse, LoginError> {
        match endpoint {
            Endpoint::Shim if !self.token_shim => return Err(LoginError::NotFound(None)),
            Endpoint::Unknown => return Err(LoginError::NotFound(Endpoint::meant(parts.uri.path()))),
            Endpoint::Discovery => return Err(LoginError::Discovery(self.users.0.clone())),
            Endpoint::StrayCallback => return Err(LoginError::StrayCallback(self.login.callback_path().to_owned())),
            _ => {}
        }
        if !endpoint.accepts(&parts.method) {
            return Err(LoginError::Method(endpoint.allow()));
        }
        if endpoint == Endpoint::Shim {
            return token_endpoint::serve(&self.admission, parts, body).await;
        }
        let query = Query::read(endpoint, parts, body).await?;
        match endpoint {
            Endpoint::Login => self.begin(&query, parts).await,
            Endpoint::Callback if parts.method == Method::HEAD || is_prefetch(&parts.headers) => Ok(nothing()),
            Endpoint::Callback => self.callback(&query, &parts.headers).await,
            Endpoint::Status => self.status(&query, &parts.headers).await,
            Endpoint::Accounts => self.accounts(&query, &parts.headers).await,
            Endpoint::AccountsSync => self.sync_accounts(&query).await,
            Endpoint::Refresh => self.refresh(&query, &parts.headers).await,
            Endpoint::Logout => self.logout(&query.user()?).await,
            Endpoint::User => self.logout(&query::user_in(parts.uri.path())?).await,
            Endpoint::Confirm => self.confirm(&query, &parts.headers).await,
            Endpoint::Root => Ok(self.root(&parts.headers)),
            Endpoint::Health => Ok(Response::new(Full::default())),
            Endpoint::Events | Endpoint::Shim | Endpoint::Discovery | Endpoint::StrayCallback | Endpoint::Unknown => {
                Err(LoginError::NotFound(None))
            }
        }
    }

    async fn begin(&self, query: &Query, parts: &Parts) -> Result<FullResponse, LoginError> {
        let headers = &parts.headers;
        let region = match query.get("region") {
            Some(region) => region.parse().map_err(|_| parameter("region", "na, eu or fe"))?,
            None => self.region,
        };
        let return_to = query.get("return_to").map(str::to_owned);
        if return_to.as_deref().is_some_and(|path| self.login.return_url(path).is_none()) {
            return Err(parameter("return_to", "a path on the origin of login.frontend_url"));
        }
        let replace = query.flag("replace")?;
        let navigation = headers.get("sec-fetch-mode").is_some_and(|mode| mode == "navigate") || prefers_html(headers);
        let by_browser = navigation || headers.contains_key(http::header::ORIGIN);
        let request = LoginRequest { user: query.user()?, region, return_to, replace, by_browser };
        // Every parameter has been checked by now.
        if navigation && let Some(url) = self.at_redirect_origin(parts) {
            return Ok(redirect(&url));
        }
        let begin = self.login.begin(request).await.map_err(|error| match error {
            BeginError::Page(_) => parameter("region", "one whose consent page is a URL"),
            BeginError::TooMany(wait) => LoginError::TooMany(wait),
            BeginError::Store(error) => LoginError::Store(error),
        })?;
        let mut response = if query.flag("redirect")? || navigation {
            redirect(begin.auth_url.as_str())
        } else {
            json(StatusCode::OK, &json!({ "auth_url": begin.auth_url.as_str(), "state": begin.state.expose() }))
        };
        if let Some((name, value)) = begin.cookie {
            let cookie = Cookie::build((name, value.expose().to_owned()))
                .http_only(true)
                .same_site(SameSite::Lax)
                .secure(self.login.secure_cookies())
                .path(self.login.callback_path().to_owned())
                .max_age(cookie::time::Duration::hours(COOKIE_HOURS));
            response.headers_mut().extend(HeaderValue::from_str(&cookie.to_string()).map(|value| (SET_COOKIE, value)));
        }
        Ok(response)
    }

    /// The same URL at the origin of `amazon.redirect_uri`, for a browser that uses another name of this machine: it
    /// would not send the login's cookie back from there.
    fn at_redirect_origin(&self, parts: &Parts) -> Option<String> {
        let origin = self.login.loopback_origin()?;
        let here = without_port(self.admission.own_authority(&parts.headers)?)?;
        let elsewhere = is_loopback(here) && !origin.host_str()?.eq_ignore_ascii_case(here);
        elsewhere.then(|| origin.join(parts.uri.path_and_query()?.as_str()).ok()).flatten().map(String::from)
    }

    async fn callback(&self, query: &Query, headers: &HeaderMap) -> Result<FullResponse, LoginError> {
        let LoginEnded { outcome, return_to, again } = match callback(query)? {
            Some(callback) => self.login.finish(callback, |name| cookie_of(headers, name)).await,
            None => LoginFailure::Expired.into(),
        };
        match &outcome {
            Ok(LoginOutcome::Stored(status)) => self.directory.logged_in(&status.user_id),
            Ok(LoginOutcome::Pending(_)) => {}
            Err(failure) => {
                tracing::info!(code = failure.code(), reason = pages::say(failure), "a login ended without a grant");
            }
        }
        if self.login.frontend_url().is_some() {
            return Ok(redirect(self.back_to_frontend(&outcome, return_to.as_deref()).as_str()));
        }
        if prefers_html(headers) {
            let again = Some(again).filter(|again| *again == Again::Callback || self.login_obstacle(headers).is_none());
            let again = again.and_then(|again| self.way_on(again));
            return Ok(pages::result(&outcome, again, self.status_page(headers)));
        }
        Ok(match outcome {
            Ok(LoginOutcome::Stored(stored)) => {
                let expires_at = stored.expires_at.map(to_the_millisecond);
                let told = json!({ "status": "success", "user_id": stored.user_id, "expires_at": expires_at });
                json(StatusCode::OK, &told)
            }
            Ok(LoginOutcome::Pending(grant)) => {
                json(StatusCode::OK, &json!({ "status": "pending", "grant": grant.expose() }))
            }
            Err(failure @ (LoginFailure::Expired | LoginFailure::State | LoginFailure::Completed)) => {
                return Err(LoginError::State(pages::say(&failure)));
            }
            Err(LoginFailure::Identity) => return Err(LoginError::Identity),
            Err(failure) => pages::document(&failure),
        })
    }

    /// Where the page of a login that failed leads on.
    fn way_on(&self, again: Again) -> Option<WayOn> {
        match again {
            Again::As(user, region) => Some(WayOn::Login(user, Some(region).filter(|region| *region != self.region))),
            Again::Unknown => Some(WayOn::Start),
            Again::Callback => Some(WayOn::Reload),
            Again::Elsewhere => None,
        }
    }

    /// Why a browser that is here cannot log in by a link; `None` if it can.
    fn login_obstacle(&self, headers: &HeaderMap) -> Option<&'static str> {
        if !self.has_all {
            return Some("Start the login in your app.");
        }
        if self.admission.needs_caller_token() {
            return Some("A caller token is set, which a browser cannot send: let your app request the login URL.");
        }
        let here = self.admission.own_authority(headers).and_then(without_port).unwrap_or_default();
        let belongs = is_loopback(here) && self.login.loopback_origin().is_some()
            || self.login.redirect_host().is_some_and(|host| host.eq_ignore_ascii_case(here));
        let elsewhere = "A login belongs to the host of amazon.redirect_uri: let your app request the login URL.";
        (!belongs).then_some(elsewhere)
    }

    fn back_to_frontend(&self, outcome: &Result<LoginOutcome, LoginFailure>, return_to: Option<&str>) -> String {
        let url = return_to.and_then(|path| self.login.return_url(path));
        let Some(mut url) = url.or_else(|| self.login.frontend_url().cloned()) else { return String::new() };
        match outcome {
            Ok(LoginOutcome::Stored(status)) => {
                url.query_pairs_mut().append_pair("status", "success").append_pair("user_id", status.user_id.as_str());
            }
            Ok(LoginOutcome::Pending(grant)) => {
                url.query_pairs_mut().append_pair("status", "pending").append_pair("grant", grant.expose());
            }
            Err(failure) => {
                url.query_pairs_mut().append_pair("status", "error").append_pair("error", failure.code());
            }
        }
        url.into()
    }

    async fn status(&self, query: &Query, headers: &HeaderMap) -> Result<FullResponse, LoginError> {
        if let Some(state) = query.get("state") {
            if ["user_id", "after", "limit"].into_iter().any(|name| query.get(name).is_some()) {
                return Err(LoginError::Parameter("state stands alone: it names one login.".to_owned()));
            }
            return self.login_progress(state).await;
        }
        if query.get("user_id").is_some() {
            let user = query.user()?;
            // If the shared store fails, the response shows what this process knows.
            let _ = Box::pin(self.tokens.look(&user)).await;
            let status = self.tokens.status(&user);
            return Ok(json(StatusCode::OK, &self.with_link(status, headers)));
        }
        let Users { after, limit } = query.page(PAGE)?;
        let statuses = Box::pin(self.tokens.statuses(after.as_str(), limit)).await;
        let users: Vec<_> = statuses.into_iter().map(|status| self.with_link(status, headers)).collect();
        Ok(json(StatusCode::OK, &json!({ "users": users })))
    }

    /// How a login stands, for the program that started it and so knows its state. Neither the user nor a pending grant
    /// is named: a browser knows the state too.
    async fn login_progress(&self, state: &str) -> Result<FullResponse, LoginError> {
        let (login, error) = match self.login.progress(state).await.map_err(LoginError::Store)? {
            Progress::Waiting => ("waiting", None),
            Progress::Ended(Ok(LoginOutcome::Stored(_))) => ("success", None),
            Progress::Ended(Ok(LoginOutcome::Pending(_))) => ("pending", None),
            Progress::Ended(Err(failure)) => ("error", Some(failure.code())),
            Progress::Unknown => ("unknown", None),
        };
        Ok(json(StatusCode::OK, &json!({ "login": login, "error": error })))
    }

    async fn refresh(&self, query: &Query, headers: &HeaderMap) -> Result<FullResponse, LoginError> {
        let user = query.user()?;
        match self.tokens.refresh(&user).await {
            Ok(status) => Ok(json(StatusCode::OK, &self.with_link(status, headers))),
            Err(error @ TokenError::Unavailable { .. }) => {
                let status = self.with_link(self.tokens.status(&user), headers);
                Err(LoginError::NotRefreshed(error, status))
            }
            Err(error) => Err(LoginError::NoToken(error, user)),
        }
    }

    async fn logout(&self, user: &UserId) -> Result<FullResponse, LoginError> {
        self.login.forget(user).await.map_err(LoginError::Store)?;
        self.directory.forget(user);
        let mut response = nothing();
        response.headers_mut().insert(LINK, HeaderValue::from_static(AMAZONS_APPS_PAGE));
        Ok(response)
    }

    async fn confirm(&self, query: &Query, headers: &HeaderMap) -> Result<FullResponse, LoginError> {
        let id = query.get("grant").ok_or_else(|| parameter("grant", "the id that the frontend was sent"))?;
        let confirmed = self.login.confirm(id).await.map_err(LoginError::Store)?;
        let confirmed = confirmed.ok_or(LoginError::State(NO_PENDING_GRANT))?;
        self.directory.logged_in(&confirmed.user_id);
        Ok(json(StatusCode::OK, &self.with_link(confirmed, headers)))
    }

    /// What `GET /` says: a person or a health check looks at what listens here.
    fn root(&self, headers: &HeaderMap) -> FullResponse {
        let (default, others) = &self.users;
        if prefers_html(headers) {
            let users: Vec<_> = std::iter::once(default).chain(others).collect();
            let users = self.login_obstacle(headers).map_or(Ok(&users[..]), Err);
            return pages::root(users, self.status_page(headers));
        }
        let login_url = self.login_url(headers, default);
        json(
            StatusCode::OK,
            &json!({
                "name": "adsidecar",
                "version": env!("CARGO_PKG_VERSION"),
                "what": "Requests to this address go to the Amazon Ads API with the headers that each path needs.",
                "status": "/api/auth/amazon/status",
                "login": login_url,
                "manual": "README.md and config/README.md",
            }),
        )
    }

    /// The URL of the status page, for a browser on this machine.
    fn status_page(&self, headers: &HeaderMap) -> Option<&str> {
        let here = self.admission.own_authority(headers).and_then(without_port);
        self.status_page.as_deref().filter(|_| here.is_some_and(is_loopback))
    }

    fn with_link(&self, status: Status, headers: &HeaderMap) -> serde_json::Value {
        let login_url = self.login_url(headers, &status.user_id);
        let mut value = serde_json::to_value(status).unwrap_or_default();
        value["login_url"] = login_url.into();
        value
    }

    /// The URL that starts a login of `user`, with the authority that the caller used.
    pub fn login_url(&self, headers: &HeaderMap, user: &UserId) -> String {
        let user: String = url::form_urlencoded::byte_serialize(user.as_str().as_bytes()).collect();
        self.login_origin(headers) + LOGIN + "?user_id=" + &user
    }

    /// Under a loopback name the origin of `amazon.redirect_uri`, to which the login's cookie belongs.
    fn login_origin(&self, headers: &HeaderMap) -> String {
        let authority = self.admission.own_authority(headers).unwrap_or(&self.authority);
        let loopback = without_port(authority).is_some_and(is_loopback);
        match self.login.loopback_origin().filter(|_| loopback) {
            Some(origin) => origin.origin().ascii_serialization(),
            None => format!("http://{authority}"),
        }
    }

    /// The URL that starts a login, up to the user id.
    pub fn login_base(authority: &str) -> String {
        format!("http://{authority}{LOGIN}?user_id=")
    }

    /// As [`login_base`](Self::login_base), at the origin of a redirect URI.
    pub fn login_base_at(origin: &Url) -> String {
        format!("{}{LOGIN}?user_id=", origin.origin().ascii_serialization())
    }

    /// What a person has to do so that `user` has a grant.
    pub fn login_step(&self, headers: &HeaderMap, user: &UserId) -> String {
        let url = self.login_url(headers, user);
        if self.admission.needs_caller_token() {
            format!("Request {url} with the caller token, open the auth_url of the response in a browser, and consent.")
        } else {
            format!("Open {url} in a browser and consent.")
        }
    }
}

/// Reads the parameters of a callback's query; `None` if Amazon never sends them like this.
///
/// # Errors
/// [`LoginError::Parameter`] if a parameter occurs twice.
pub fn read_callback(query: &str) -> Result<Option<Callback>, LoginError> {
    callback(&Query::parse(query, None)?)
}

fn callback(query: &Query) -> Result<Option<Callback>, LoginError> {
    let result = match (query.get("code"), query.get("error")) {
        (Some(code), None) => Ok(Secret::new(code)),
        (None, Some(error)) => Err(error.to_owned()),
        _ => return Ok(None),
    };
    let state = query.get("state").map(Secret::new);
    Ok(state.map(|state| Callback { state, result, scope: query.get("scope").map(str::to_owned) }))
}
