//! The spine: what happens to a call, from its head to its answer.
//!
//! [`Proxy::serve`] always answers; `Proxy::forward` reads as the list of steps and is a column of `?`.

mod body;
mod upstream_request;
mod error_mapping;
mod route;
mod request_telemetry;
mod auth_rejection;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use http::header::{CONTENT_LENGTH, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode, Uri};
use hyper::body::Incoming;

pub use body::Body;

use crate::auth::tokens::{TokenError, TokenManager};
use crate::domain::account::{Account, Region, UserId};
use crate::domain::headers::{self, HINT, UpstreamHeaders};
use crate::domain::policy::{self, Denied, Mode};
use crate::inbound::admission::{Admission, Refusal};
use crate::inbound::destination::{Destination, Target};
use crate::inbound::oauth::{Endpoint, LoginError, OauthEndpoints, token_problem};
use crate::inbound::problem::Problem;
use crate::inbound::request_id::RequestIds;
use crate::server::Peer;
use crate::telemetry::metrics::Metrics;
use crate::upstream::{ReplayBudget, ReplayBuffer, RequestBody, Reuse, SendError, Upstream, UpstreamBody};
use auth_rejection::{Refused, Verdict};
use request_telemetry::RequestTelemetry;
use route::{Accounts, RouteError, RoutedRequest};
use upstream_request::UpstreamRequest;

/// How callers select accounts, and what is held for a replay.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `amazon.client_id`.
    pub client_id: String,
    /// `amazon.region`.
    pub region: Region,
    /// `[[account]]`.
    pub accounts: Vec<Account>,
    /// `proxy.selection`.
    pub selection: Selection,
    /// `proxy.replay_limit`, bytes of a request body that are held for one replay after a 401.
    pub replay_limit: usize,
    /// `proxy.max_body`, bytes; `None`: bodies stream without a limit.
    pub max_body: Option<u64>,
    /// `proxy.body_timeout`: how long nothing may come of a request's body.
    pub body_timeout: Duration,
    /// `proxy.token_shim`.
    pub token_shim: bool,
    /// `[policy]`.
    pub policy: policy::Settings,
}

/// Whether callers choose their account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// By path prefix or header.
    #[default]
    Header,
    /// What callers say is ignored.
    Fixed,
}

/// Serves the proxy door.
#[derive(Debug)]
pub struct Proxy {
    accounts: Accounts,
    client_id: HeaderValue,
    replay_limit: usize,
    /// For what is held of bodies for a replay.
    room: Arc<ReplayBudget>,
    max_body: Option<u64>,
    body_timeout: Duration,
    policy_mode: Mode,
    guard: Admission,
    tokens: TokenManager,
    upstream: Arc<Upstream>,
    oauth: OauthEndpoints,
    metrics: Arc<Metrics>,
    request_ids: Arc<RequestIds>,
}

/// Why a call gets no answer of Amazon's.
#[derive(Debug)]
pub enum ProxyError {
    /// It may not come in.
    Refused(Refusal),
    /// An OAuth endpoint refuses it.
    Login(LoginError),
    /// It names no account of ours.
    Unroutable(RouteError),
    /// The policy forbids it.
    Denied(Denied),
    /// There is no token for its user.
    NoToken(TokenError, UserId),
    /// It names a body larger than `proxy.max_body`.
    TooLarge,
    /// Amazon could not be reached, or gave no answer.
    Send(SendError),
    /// A step panicked, which is a bug of ours; the process and the connection live on.
    Panicked,
}

impl Proxy {
    /// The spine, with all that it calls.
    #[allow(clippy::too_many_arguments, reason = "the one place that holds the spine together")]
    pub fn new(
        settings: Settings,
        client_id: HeaderValue,
        guard: Admission,
        tokens: TokenManager,
        upstream: Arc<Upstream>,
        oauth: OauthEndpoints,
        metrics: Arc<Metrics>,
        request_ids: Arc<RequestIds>,
    ) -> Self {
        // There from the start, so that an alert can tell "nothing was denied" from "nobody looks".
        metrics.policy_denied.with_label_values(&["", settings.policy.mode.as_str()]);
        Self {
            client_id,
            replay_limit: settings.replay_limit,
            room: Arc::default(),
            max_body: settings.max_body,
            body_timeout: settings.body_timeout,
            accounts: Accounts::new(settings.accounts, settings.region, settings.selection, settings.policy.rules),
            policy_mode: settings.policy.mode,
            guard,
            tokens,
            upstream,
            oauth,
            metrics,
            request_ids,
        }
    }

    /// One answer and one record, whatever happens.
    // Not `async`: the request would be held beside its parts by every call that waits.
    pub fn serve(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Peer,
    ) -> impl Future<Output = Response<Body>> + Send {
        let (parts, incoming) = request.into_parts();
        async move {
            let mut telemetry =
                RequestTelemetry::begin(&self.metrics, &parts.method, self.request_ids.of(&parts.headers));
            let forwarded = AssertUnwindSafe(self.forward(&parts, incoming, peer, &mut telemetry)).catch_unwind().await;
            let answer = match forwarded.unwrap_or(Err(ProxyError::Panicked)) {
                Ok(answer) => answer,
                Err(error) => {
                    telemetry.fails(&error);
                    let problem = self.problem(error, &parts);
                    telemetry.answered_by_us(problem.code());
                    problem.respond(telemetry.request_id()).map(Body::own)
                }
            };
            telemetry.end(answer)
        }
    }

    async fn forward<'a>(
        &'a self,
        parts: &Parts,
        incoming: Incoming,
        peer: Peer,
        telemetry: &mut RequestTelemetry<'a>,
    ) -> Result<Response<Body>, ProxyError> {
        self.guard.peer(peer)?;
        let target = self.guard.admit(parts, peer)?;
        if let Some(endpoint) = endpoint(&target) {
            telemetry.is_ours();
            // Boxed, as what is rare on this path must not make every call's future large.
            let answer = Box::pin(self.oauth.answer(endpoint, parts, incoming)).await;
            let mut answer =
                answer.unwrap_or_else(|error| self.problem(error.into(), parts).respond(telemetry.request_id()));
            self.oauth.add_common_headers(endpoint, &parts.headers, answer.headers_mut());
            return Ok(answer.map(Body::own));
        }
        self.guard.no_browser(&parts.headers)?;
        self.guard.caller(&parts.headers)?;
        let call = self.accounts.select(&target, &parts.headers)?;
        telemetry.is_for(&call);
        self.enforce_policy(&call, parts, &target, telemetry)?;
        if call.family.is_unknown() {
            self.metrics.unknown_family.inc();
        }
        fail_point!("spine");
        let body = self.body(parts, incoming)?;
        let bearer = self.access_token(&call.user).await?;
        let request = UpstreamRequest { call: &call, parts, target: &target, bearer: &bearer };
        let (answer, sent) = self.send(request, body, telemetry).await?;
        self.tokens.heard(answer.headers());
        let answer = match answer.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Box::pin(self.handle_rejection(answer, request, sent, telemetry)).await?
            }
            _ => answer.map(Body::amazon),
        };
        Ok(to_caller(answer, &call, telemetry))
    }

    /// Judges the call by the policy. Where that only observes, a call that it would refuse is counted and leaves.
    fn enforce_policy(
        &self,
        call: &RoutedRequest<'_>,
        parts: &Parts,
        target: &Target,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<(), ProxyError> {
        let Err(denied) = call.rules.check(&parts.method, target.path(), &parts.headers) else { return Ok(()) };
        self.metrics.policy_denied.with_label_values(&[call.account_name(), self.policy_mode.as_str()]).inc();
        match self.policy_mode {
            Mode::Enforce => Err(ProxyError::Denied(denied)),
            Mode::Observe => {
                telemetry.would_be_denied();
                Ok(())
            }
        }
    }

    /// The caller's body, to be streamed.
    fn body(&self, parts: &Parts, incoming: Incoming) -> Result<RequestBody, ProxyError> {
        let length = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        match (length, self.max_body) {
            (Some(length), Some(max)) if length > max => Err(ProxyError::TooLarge),
            _ => Ok(RequestBody::caller(incoming, self.replay_limit, &self.room, self.max_body, self.body_timeout)),
        }
    }

    async fn access_token(&self, user: &UserId) -> Result<HeaderValue, ProxyError> {
        self.tokens.bearer(user).await.map_err(|error| ProxyError::NoToken(error, user.clone()))
    }

    /// Sends the call, and once more on a fresh connection where nothing of it can have been processed: its connection
    /// never carried it, or it is idempotent and broke on a pooled connection before any byte of an answer (RFC 9110,
    /// section 9.2.2). Beside the answer comes what was held of the body; `None` where there was none to hold.
    async fn send(
        &self,
        request: UpstreamRequest<'_>,
        body: RequestBody,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<(Response<UpstreamBody>, Option<Arc<ReplayBuffer>>), ProxyError> {
        let region = request.call.region;
        let held = body.progress();
        let begun = Instant::now();
        let mut sent = self.attempt(request, body, Reuse::Allowed).await;
        let once_more = sent.as_mut().err().and_then(|error| {
            let safe = error.stale && request.is_idempotent();
            error.unsent.take().or_else(|| if safe { again(&held) } else { None })
        });
        if let Some(body) = once_more {
            // Boxed, as what is rare on this path must not make every call's future large.
            sent = Box::pin(self.attempt(request, body, Reuse::Fresh)).await;
        }
        telemetry.amazon_took(region, begun.elapsed());
        let answer = sent.map_err(ProxyError::Send)?;
        telemetry.amazon_said(region, answer.status(), answer.headers());
        Ok((answer, held))
    }

    async fn attempt(
        &self,
        request: UpstreamRequest<'_>,
        body: RequestBody,
        reuse: Reuse,
    ) -> Result<Response<UpstreamBody>, SendError> {
        match self.upstream.checkout(request.call.region, reuse).await {
            Ok(reserved) => reserved.send(self.to_amazon(request, body), request.accepts_event_stream()).await,
            Err(kind) => Err(kind.unsent(body)),
        }
    }

    fn to_amazon(&self, request: UpstreamRequest<'_>, body: RequestBody) -> Request<RequestBody> {
        let UpstreamRequest { call, parts, target, bearer } = request;
        let attach = UpstreamHeaders {
            family: call.family,
            host: Some(self.upstream.authority(call.region)),
            bearer,
            client_id: &self.client_id,
            ids: call.ids(),
            fixed: call.fixed_headers(),
        };
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = Uri::from(target.path_and_query.clone());
        *request.headers_mut() = headers::to_amazon(&parts.headers, attach);
        request
    }

    /// Reads a refusal of Amazon's: one that a fresh token may cure is tried once more with one, all others stand.
    async fn handle_rejection(
        &self,
        answer: Response<UpstreamBody>,
        request: UpstreamRequest<'_>,
        sent: Option<Arc<ReplayBuffer>>,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<Response<Body>, ProxyError> {
        let user = &request.call.user;
        if answer.status() == StatusCode::FORBIDDEN && !(is_amc(request.target) && self.tokens.near_expiry(user)) {
            return Ok(answer.map(Body::amazon));
        }
        let refused = Refused::read(answer).await;
        let verdict = refused.verdict();
        self.metrics.upstream_unauthorized.with_label_values(&[verdict.cause()]).inc();
        match verdict {
            Verdict::Scope(hint) => {
                telemetry.hint(hint);
                Ok(refused.pass_on())
            }
            Verdict::Token => {
                let other = self.tokens.invalidate(user, request.bearer).await;
                match (other, again(&sent)) {
                    (Some(other), Some(body)) => {
                        self.metrics.replays.inc();
                        let (answer, _) =
                            self.send(UpstreamRequest { bearer: &other, ..request }, body, telemetry).await?;
                        Ok(answer.map(Body::amazon))
                    }
                    _ => Ok(refused.pass_on()),
                }
            }
        }
    }

    fn problem(&self, error: ProxyError, parts: &Parts) -> Problem {
        let login_url = |user: &UserId| self.oauth.login_url(&parts.headers, user);
        match error {
            ProxyError::Refused(refusal) | ProxyError::Login(LoginError::Refused(refusal)) => {
                self.metrics.guard_denied.with_label_values(&[refusal.reason()]).inc();
                refusal.into()
            }
            ProxyError::Login(error) => error.problem(login_url),
            ProxyError::Unroutable(error) => error.into(),
            ProxyError::Denied(denied) => {
                self.metrics.guard_denied.with_label_values(&["policy"]).inc();
                denied.into()
            }
            ProxyError::NoToken(error, user) => token_problem(error, &login_url(&user)),
            ProxyError::TooLarge => error_mapping::too_large(),
            ProxyError::Panicked => error_mapping::panicked(),
            ProxyError::Send(error) => error.kind.into(),
        }
    }
}

/// The OAuth endpoint that a target names. Those paths are never forwarded, whoever's host is named: of Amazon's hosts
/// only the token endpoint is served, by the shim.
fn endpoint(target: &Target) -> Option<Endpoint> {
    let endpoint = Endpoint::of(target.path());
    match target.of {
        Destination::Local if target.account.is_some() => endpoint.filter(|endpoint| *endpoint == Endpoint::Shim),
        Destination::Local => endpoint,
        Destination::Ads(_) => endpoint.map(|_| Endpoint::Unknown),
        Destination::Lwa => Some(endpoint.filter(|endpoint| *endpoint == Endpoint::Shim).unwrap_or(Endpoint::Unknown)),
    }
}

/// The body once more: where there was none, or it passed whole and was held.
fn again(held: &Option<Arc<ReplayBuffer>>) -> Option<RequestBody> {
    match held {
        None => Some(RequestBody::empty()),
        Some(held) => held.replay(),
    }
}

/// AMC answers expired credentials with 403 ("Make your first call", Amazon Marketing Cloud).
fn is_amc(target: &Target) -> bool {
    target.path().split('/').find(|segment| !segment.is_empty()) == Some("amc")
}

fn to_caller(
    mut answer: Response<Body>,
    call: &RoutedRequest<'_>,
    telemetry: &mut RequestTelemetry<'_>,
) -> Response<Body> {
    telemetry.answered_by_amazon(answer.status());
    *answer.version_mut() = http::Version::HTTP_11;
    headers::to_caller(answer.headers_mut());
    if let Some(hint) = telemetry.take_hint().or_else(|| call.hint()) {
        answer.headers_mut().insert(HINT, HeaderValue::from_static(hint));
    }
    answer
}
