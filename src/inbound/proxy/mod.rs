//! The spine: what happens to a request, from its head to the response.
//!
//! [`Proxy::serve`] always responds. `Proxy::dispatch` decides who serves the request, and `Proxy::forward` lists the
//! steps of a request to Amazon, each one call that may fail.
//!
//! The file is long because it is the whole way of a request: to follow one, read this file alone.

mod auth_rejection;
mod error_mapping;
mod inflation;
mod jobs;
mod polls;
pub mod explain;
mod mcp;
mod redaction;
mod request_telemetry;
mod response;
mod retry;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use http::header::{CONTENT_LENGTH, HeaderValue, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::Full;

pub use error_mapping::ProxyError;
pub use response::{Body, strip_response};

use crate::auth::accounts::{Directory, Entry as FoundEntry};
use crate::auth::tokens::{Bearer, TokenError, TokenManager};
use crate::domain::account::{Account, Region, Service, UserId};
use crate::domain::grant::{Remedy, STORE_UNAVAILABLE, State};
use crate::domain::headers::{self, UpstreamHeaders};
use crate::domain::policy::{self, Mode};
use crate::inbound::admission::{Admission, Admitted};
use crate::inbound::destination::{Endpoint, Target};
use crate::inbound::oauth::OauthEndpoints;
use crate::inbound::problem::Problem;
use crate::inbound::request_id::RequestIds;
pub use crate::inbound::route::Selection;
use crate::inbound::route::{Accounts, Found, RoutedRequest, fallback};
use crate::server::{CallerBody, Peer};
use crate::telemetry::metrics::Metrics;
use crate::throttle::{Call, Entry, Pass, Reason, Throttle};
use crate::upstream::{ReplayBudget, ReplayBuffer, RequestBody, Reuse, SendError, Upstream, UpstreamBody};
use auth_rejection::{Rejection, Verdict, pass_on_refusal};
use jobs::JobListener;
use polls::{Join, Polls};
use request_telemetry::RequestTelemetry;
use retry::Retry;

/// What a waiting request holds besides its path and a body that Amazon refused, in bytes: its head in parsed form, the
/// buffers of its connection, and its future.
const WAITING_BYTES: usize = 8 << 10;

/// When a request may find the store working again that could not look up its account.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// How callers select accounts, and how much of a request body is kept for a retry.
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
    /// `proxy.replay_limit`, bytes of a request body that are kept for one retry.
    pub replay_limit: usize,
    /// `proxy.max_body`, bytes; `None`: no limit.
    pub max_body: Option<u64>,
    /// `proxy.body_timeout`: the longest pause in a request body.
    pub body_timeout: Duration,
    /// `proxy.token_shim`.
    pub token_shim: bool,
    /// `[policy]`.
    pub policy: policy::Settings,
}

impl Settings {
    /// The user of requests that select none, and the other users of the accounts.
    pub fn users(&self) -> (UserId, Vec<UserId>) {
        let default = fallback(&self.accounts).map_or_else(UserId::default, |account| account.user.clone());
        let mut others: Vec<_> = self.accounts.iter().map(|account| account.user.clone()).collect();
        others.sort_unstable();
        others.dedup();
        others.retain(|user| *user != default);
        (default, others)
    }
}

/// Serves the proxy listener.
#[derive(Debug)]
pub struct Proxy {
    accounts: Accounts,
    directory: Directory,
    client_id: HeaderValue,
    replay_limit: usize,
    /// Shared by the replay buffers of all requests.
    replay_budget: Arc<ReplayBudget>,
    max_body: Option<u64>,
    body_timeout: Duration,
    /// `policy.mode`; `None` if neither `[policy]` nor an account has rules.
    policy: Option<Mode>,
    admission: Admission,
    tokens: TokenManager,
    throttle: Arc<Throttle>,
    /// `None` unless `throttle.coalesce_polls` is on.
    polls: Option<Polls>,
    upstream: Arc<Upstream>,
    oauth: OauthEndpoints,
    metrics: Arc<Metrics>,
    request_ids: Arc<RequestIds>,
}

/// A request that is ready to be sent to Amazon, except for its body.
#[derive(Clone, Copy)]
struct UpstreamRequest<'a> {
    route: &'a RoutedRequest<'a>,
    parts: &'a Parts,
    target: &'a Target,
    bearer: &'a HeaderValue,
}

impl Proxy {
    /// The handler of the proxy listener.
    #[allow(clippy::too_many_arguments, reason = "the one place that holds the spine together")]
    pub fn new(
        settings: Settings,
        client_id: HeaderValue,
        admission: Admission,
        tokens: TokenManager,
        upstream: Arc<Upstream>,
        throttle: Arc<Throttle>,
        oauth: OauthEndpoints,
        directory: Directory,
        metrics: Arc<Metrics>,
        request_ids: Arc<RequestIds>,
    ) -> Self {
        // The series exists from the start, so that an alert can tell "nothing was denied" from "no data".
        metrics.policy_denied.with_label_values(&["", settings.policy.mode.as_str()]);
        let account_has_rules = settings.accounts.iter().any(|account| !account.rules.is_empty());
        let policy = (account_has_rules || !settings.policy.rules.is_empty()).then_some(settings.policy.mode);
        Self {
            client_id,
            replay_limit: settings.replay_limit,
            replay_budget: Arc::default(),
            max_body: settings.max_body,
            body_timeout: settings.body_timeout,
            accounts: Accounts::new(settings.accounts, settings.region, settings.selection, settings.policy.rules),
            policy,
            directory,
            admission,
            tokens,
            polls: throttle.coalesces_polls().map(Polls::new),
            throttle,
            upstream,
            oauth,
            metrics,
            request_ids,
        }
    }

    /// Serves a request on the proxy listener. Always returns a response, and counts the request exactly once.
    // Not an `async fn`: its future would hold the whole request in addition to its parts, for as long as it waits.
    pub fn serve(
        self: Arc<Self>,
        request: Request<CallerBody>,
        peer: Peer,
    ) -> impl Future<Output = Response<Body>> + Send {
        let (mut parts, incoming) = request.into_parts();
        async move {
            let id = self.request_ids.settle(&mut parts.headers);
            let mut telemetry = RequestTelemetry::begin(&self.metrics, &parts.method, id);
            let served = AssertUnwindSafe(self.dispatch(&parts, incoming, peer, &mut telemetry)).catch_unwind().await;
            let response = match served.unwrap_or(Err(ProxyError::Panicked)) {
                Ok(response) => response,
                Err(error) => {
                    telemetry.set_error(&error);
                    let problem = self.problem(error, &parts);
                    telemetry.set_own_error(&problem);
                    let problem = if mcp::is_call(&parts) { problem.for_mcp() } else { problem };
                    problem.respond(telemetry.request_id()).map(Body::own)
                }
            };
            telemetry.end(response)
        }
    }

    /// Decides who serves the request: adsidecar's own endpoints, or Amazon.
    async fn dispatch<'a>(
        &'a self,
        parts: &Parts,
        incoming: CallerBody,
        peer: Peer,
        telemetry: &mut RequestTelemetry<'a>,
    ) -> Result<Response<Body>, ProxyError> {
        match self.admission.proxy(parts, peer) {
            Ok(Admitted::Upstream(target)) => self.forward(parts, incoming, &target, telemetry).await,
            Ok(Admitted::Tunnel) => {
                telemetry.set_own_endpoint();
                Ok(Response::new(Body::own(Full::default())))
            }
            Ok(Admitted::Own { endpoint, cors }) => {
                telemetry.set_own_endpoint();
                let id = telemetry.request_id();
                if endpoint == Endpoint::Events && parts.method != Method::OPTIONS {
                    let stream = Box::pin(self.oauth.event_stream(cors, parts, incoming, id)).await;
                    return Ok(match stream {
                        Ok(response) => response.map(Body::events),
                        Err(refused) => refused.map(Body::own),
                    });
                }
                // Boxed: rare requests must not make the future of every request large.
                Ok(Box::pin(self.oauth.serve(endpoint, cors, parts, incoming, id)).await.map(Body::own))
            }
            Err(rejected) if rejected.endpoint.is_some() => {
                telemetry.set_own_endpoint();
                let problem = self.problem(rejected.refusal.into(), parts);
                Ok(self.oauth.refuse(&parts.headers, problem, telemetry.request_id()).map(Body::own))
            }
            Err(rejected) => Err(rejected.refusal.into()),
        }
    }

    /// The steps of a request to Amazon.
    async fn forward<'a>(
        &'a self,
        parts: &Parts,
        incoming: CallerBody,
        target: &Target,
        telemetry: &mut RequestTelemetry<'a>,
    ) -> Result<Response<Body>, ProxyError> {
        let found = match self.accounts.other_name(target, &parts.headers) {
            Some(slug) => self.found_account(slug).await?,
            None => None,
        };
        let found =
            found.as_deref().map(|entry| Found { account: &entry.account, is_named: !self.directory.is_large() });
        let route = self.accounts.select(target, &parts.headers, found)?;
        telemetry.set_route(&route);
        if let Some(mode) = self.policy {
            self.enforce_policy(mode, &route, parts, target, telemetry)?;
        }
        if route.family.is_unknown() {
            self.metrics.unknown_family.inc();
        }
        fail_point!("spine");
        let body = self.body(parts, incoming)?;
        match self.polls.as_ref().and_then(|polls| Some((polls, polls::key(&route, parts, target)?))) {
            // Boxed: rare requests must not make the future of every request large.
            Some((polls, key)) => Box::pin(self.poll(polls, &key, &route, parts, body, target, telemetry)).await,
            None => self.exchange(&route, parts, body, target, telemetry).await,
        }
    }

    /// The found account with this slug.
    async fn found_account(&self, slug: &str) -> Result<Option<Arc<FoundEntry>>, ProxyError> {
        if let Some(known) = self.directory.account_in_memory(slug) {
            return Ok(known);
        }
        // Boxed: rare requests must not make the future of every request large.
        Box::pin(self.directory.account(slug)).await.map_err(|_| {
            let (code, remedy) = (STORE_UNAVAILABLE, Remedy::Time);
            let error = TokenError::Unavailable { code, remedy, detail: None, retry_after: STORE_RETRY };
            ProxyError::NoToken(error, UserId::default())
        })
    }

    /// A poll under `throttle.coalesce_polls`: answered by another one of the last second, or sent.
    #[allow(clippy::too_many_arguments, reason = "those of `exchange`, and what the polls share")]
    async fn poll(
        &self,
        polls: &Polls,
        key: &str,
        route: &RoutedRequest<'_>,
        parts: &Parts,
        body: RequestBody,
        target: &Target,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<Response<Body>, ProxyError> {
        let leader = loop {
            match polls.join(key) {
                Join::Lead(leader) => break Some(leader),
                Join::Alone => break None,
                Join::Follow(other) => {
                    if let Some(response) = other.answer().await {
                        telemetry.set_response_from_amazon();
                        return Ok(response);
                    }
                }
            }
        };
        let response = self.exchange(route, parts, body, target, telemetry).await?;
        Ok(match leader {
            Some(leader) => leader.share(response).await,
            None => response,
        })
    }

    /// The exchange with Amazon, once it is decided that the request is sent.
    async fn exchange(
        &self,
        route: &RoutedRequest<'_>,
        parts: &Parts,
        body: RequestBody,
        target: &Target,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<Response<Body>, ProxyError> {
        let mut pass = self.throttle(route, parts, target).await?;
        let Bearer { value: bearer, check_clock } = self.access_token(&route.user).await?;
        let request = UpstreamRequest { route, parts, target, bearer: &bearer };
        let sent = body.progress();
        let mut response = self.send(request, body, &sent, &mut pass, telemetry).await?;
        let mut later = None;
        if pass.may_go_again() {
            // Boxed: rare requests must not make the future of every request large.
            (response, later) =
                Box::pin(self.wait_and_send_again(response, request, &sent, &mut pass, telemetry)).await?;
        }
        // The token that Amazon has answered to is the one that it may quote, or reject.
        let request = UpstreamRequest { bearer: later.as_ref().unwrap_or(&bearer), ..request };
        if check_clock {
            self.tokens.observe_amazons_clock(response.headers());
        }
        let listener = JobListener::of(&mut pass, response.headers());
        let mut response = match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Box::pin(self.handle_rejection(response, request, &sent, &mut pass, telemetry)).await?
            }
            status if status.is_client_error() => Box::pin(pass_on_refusal(response, request.bearer)).await,
            _ => response.map(|body| Body::amazon(body).heard_by(listener)),
        };
        if route.family.service == Service::Mcp {
            // Amazon's challenge names an authorization server, and MCP clients would start an OAuth of their own
            // there.
            response.headers_mut().remove(WWW_AUTHENTICATE);
        }
        telemetry.set_response_from_amazon();
        let hint = telemetry.take_hint().or_else(|| pass.hint()).or_else(|| route.hint());
        Ok(response::to_caller(response, hint, pass.waited()))
    }

    /// Refuses what the policy forbids. In observe mode, counts such a request and lets it pass.
    fn enforce_policy(
        &self,
        mode: Mode,
        route: &RoutedRequest<'_>,
        parts: &Parts,
        target: &Target,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<(), ProxyError> {
        let query = target.path_and_query.query();
        let checked = route.rules.check(&parts.method, target.path(), query, &parts.headers);
        let Err(denied) = checked else { return Ok(()) };
        self.metrics.policy_denied.with_label_values(&[route.account_label(), mode.as_str()]).inc();
        match mode {
            Mode::Enforce => Err(ProxyError::Denied(denied)),
            Mode::Observe => {
                telemetry.set_would_be_denied();
                Ok(())
            }
        }
    }

    /// The caller's body, as a stream.
    fn body(&self, parts: &Parts, incoming: CallerBody) -> Result<RequestBody, ProxyError> {
        let length = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        match (length, self.max_body) {
            (Some(length), Some(max)) if length > max => Err(ProxyError::TooLarge),
            _ => Ok(RequestBody::caller(
                incoming,
                self.replay_limit,
                &self.replay_budget,
                self.max_body,
                self.body_timeout,
            )),
        }
    }

    /// The request's turn: at once, unless Amazon refuses requests like this one and the mode is `enforce` or `queue`.
    async fn throttle<'a>(
        &'a self,
        route: &'a RoutedRequest<'a>,
        parts: &Parts,
        target: &'a Target,
    ) -> Result<Pass<'a>, ProxyError> {
        let path = target.path();
        let request = Call {
            mode: route.throttle(),
            bytes: WAITING_BYTES + path.len(),
            ..Call::new(route.region, route.family, &parts.method, path, route.fair_share())
        };
        match self.throttle.enter(request) {
            Entry::Pass(pass) => Ok(pass),
            // Boxed: rare requests must not make the future of every request large.
            Entry::Wait(ticket) => Box::pin(ticket.turn()).await.map_err(ProxyError::Throttled),
            Entry::Refuse(throttled) => Err(ProxyError::Throttled(throttled)),
        }
    }

    /// After Amazon refused the request because there were too many: waits for another turn and sends it again, as long
    /// as [`Retry`] says so. Returns Amazon's refusal if there is no turn in time; and the token that was sent last, if
    /// the request was sent again.
    async fn wait_and_send_again<'a>(
        &'a self,
        mut response: Response<UpstreamBody>,
        request: UpstreamRequest<'_>,
        sent: &Option<Arc<ReplayBuffer>>,
        pass: &mut Pass<'a>,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<(Response<UpstreamBody>, Option<HeaderValue>), ProxyError> {
        let mut later = None;
        while pass.may_go_again()
            && let Some((Retry::Throttled, body)) = Retry::after_refusal(sent)
            && let Some(entry) = pass.again(sent.as_ref().map_or(0, |sent| sent.held()))
        {
            // The connection is free while the request waits.
            drop(response);
            *pass = match entry {
                Entry::Pass(pass) => pass,
                Entry::Wait(ticket) => ticket.turn().await.map_err(ProxyError::Throttled)?,
                Entry::Refuse(throttled) => return Err(ProxyError::Throttled(throttled)),
            };
            // The access token may have expired meanwhile.
            let bearer = &*later.insert(self.access_token(&request.route.user).await?.value);
            response = self.send(UpstreamRequest { bearer, ..request }, body, sent, pass, telemetry).await?;
        }
        Ok((response, later))
    }

    async fn access_token(&self, user: &UserId) -> Result<Bearer, ProxyError> {
        self.tokens.bearer(user).await.map_err(|error| ProxyError::NoToken(error, user.clone()))
    }

    /// Sends the request, and again as long as [`Retry`] says so. `buffer` is the replay buffer of the body; `None` if
    /// the body is empty.
    async fn send(
        &self,
        request: UpstreamRequest<'_>,
        body: RequestBody,
        buffer: &Option<Arc<ReplayBuffer>>,
        pass: &mut Pass<'_>,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<Response<UpstreamBody>, ProxyError> {
        let region = request.route.region;
        let begun = Instant::now();
        let mut sent = self.attempt(request, body, retry::first_reuse(&request.parts.method)).await;
        let mut attempts = 1;
        while let Err(error) = sent {
            match Box::pin(Retry::after_error(error, &request.parts.method, buffer, attempts)).await {
                // Boxed: rare requests must not make the future of every request large.
                Ok((retry, body)) => sent = Box::pin(self.attempt(request, body, retry.reuse())).await,
                Err(error) => {
                    telemetry.record_upstream_time(region, begun.elapsed());
                    return Err(ProxyError::Send(error));
                }
            }
            attempts += 1;
        }
        telemetry.record_upstream_time(region, begun.elapsed());
        let response = sent.map_err(ProxyError::Send)?;
        if let Some(buffer) = buffer {
            buffer.responded();
        }
        pass.responded(response.status(), response.headers());
        telemetry.record_upstream_response(region, response.status(), response.headers());
        Ok(response)
    }

    fn attempt(
        &self,
        request: UpstreamRequest<'_>,
        body: RequestBody,
        reuse: Reuse,
    ) -> impl Future<Output = Result<Response<UpstreamBody>, SendError>> + Send {
        self.upstream.send(request.route.host(), reuse, self.to_amazon(request, body))
    }

    fn to_amazon(&self, request: UpstreamRequest<'_>, body: RequestBody) -> Request<RequestBody> {
        let UpstreamRequest { route, parts, target, bearer } = request;
        let attach = UpstreamHeaders {
            family: route.family,
            bearer,
            client_id: &self.client_id,
            ids: route.ids(),
            fixed: route.fixed_headers(),
        };
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = Uri::from(target.path_and_query.clone());
        *request.headers_mut() = headers::to_amazon(&parts.headers, attach);
        request
    }

    /// Reads a 401 or 403 of Amazon's. Retries with a new access token if the token was rejected, and passes on any
    /// other rejection.
    async fn handle_rejection(
        &self,
        response: Response<UpstreamBody>,
        request: UpstreamRequest<'_>,
        sent: &Option<Arc<ReplayBuffer>>,
        pass: &mut Pass<'_>,
        telemetry: &mut RequestTelemetry<'_>,
    ) -> Result<Response<Body>, ProxyError> {
        let user = &request.route.user;
        if response.status() == StatusCode::FORBIDDEN && !(is_amc(request.target) && self.tokens.near_expiry(user)) {
            return Ok(pass_on_refusal(response, request.bearer).await);
        }
        let rejection = Rejection::read(response).await;
        let verdict = rejection.verdict();
        self.metrics.upstream_unauthorized.with_label_values(&[verdict.cause()]).inc();
        if let Verdict::Scope(hint) = verdict {
            // Where no id was attached because of the region, that is why.
            telemetry.set_hint(request.route.hint().unwrap_or(hint));
            return Ok(rejection.pass_on(request.bearer));
        }
        let new_token = self.tokens.invalidate(user, request.bearer).await;
        let Some((Retry::NewToken(bearer), body)) = Retry::after_rejection(new_token, sent) else {
            // The token lives by the clock, but its grant is gone: Amazon's text says nothing of that.
            if self.tokens.status(user).state == State::LoginRequired {
                telemetry.set_hint("login_required");
            }
            return Ok(rejection.pass_on(request.bearer));
        };
        self.metrics.replays.inc();
        let response = self.send(UpstreamRequest { bearer: &bearer, ..request }, body, sent, pass, telemetry).await?;
        Ok(match response.status() {
            status if status.is_client_error() => pass_on_refusal(response, &bearer).await,
            _ => response.map(Body::amazon),
        })
    }

    fn problem(&self, error: ProxyError, parts: &Parts) -> Problem {
        if let Some(reason) = error.guard_reason() {
            self.metrics.guard_denied.with_label_values(&[reason]).inc();
        }
        if let ProxyError::Throttled(throttled) = &error
            && throttled.reason != Reason::Draining
        {
            self.metrics.throttled.with_label_values(&[throttled.bucket.region.as_str(), "sidecar"]).inc();
        }
        error.into_problem(|user| self.oauth.login_step(&parts.headers, user))
    }
}

/// AMC responds to expired credentials with 403 ("Make your first call", Amazon Marketing Cloud).
fn is_amc(target: &Target) -> bool {
    target.path().split('/').find(|segment| !segment.is_empty()) == Some("amc")
}
