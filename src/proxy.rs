//! The spine: what happens to a call, from its head to its answer.
//!
//! [`Proxy::serve`] always answers; [`Proxy::forward`] reads as the list of steps and is a column of `?`.

mod body;
mod select;
mod trip;
mod unauthorized;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use http::header::{ACCEPT, CONTENT_LENGTH, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Uri};
use hyper::body::Incoming;

pub use body::Body;

use crate::account::{Account, Region, UserId};
use crate::families::family;
use crate::guard::{Guard, Refusal};
use crate::keeper::{Keeper, TokenError};
use crate::login_door::{Endpoint, LoginDoor, LoginError, token_problem};
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::rewrite::{self, Attach, HINT, REQUEST_ID};
use crate::serve::Peer;
use crate::target::{Of, Target};
use crate::upstream::{Answer, BodyError, ErrorKind, Held, Outgoing, Reuse, SendError, Upstream};
use select::{Accounts, Call, Unselected};
use trip::Trip;
use unauthorized::{Refused, Verdict};

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
    /// `proxy.token_shim`.
    pub token_shim: bool,
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
    max_body: Option<u64>,
    guard: Guard,
    keeper: Keeper,
    upstream: Arc<Upstream>,
    login_door: LoginDoor,
    metrics: Arc<Metrics>,
    request_ids: RequestIds,
}

/// Why a call gets no answer of Amazon's.
#[derive(Debug)]
pub enum ProxyError {
    /// It may not come in.
    Refused(Refusal),
    /// An OAuth endpoint refuses it.
    Login(LoginError),
    /// It names no account of ours.
    Unselected(Unselected),
    /// There is no token for its user.
    NoToken(TokenError, UserId),
    /// It names a body larger than `proxy.max_body`.
    TooLarge,
    /// Amazon could not be reached, or gave no answer.
    Send(SendError),
}

impl Proxy {
    /// The spine, with all that it calls.
    pub fn new(
        settings: Settings,
        guard: Guard,
        keeper: Keeper,
        upstream: Arc<Upstream>,
        login_door: LoginDoor,
        metrics: Arc<Metrics>,
    ) -> Result<Self, http::header::InvalidHeaderValue> {
        Ok(Self {
            client_id: HeaderValue::from_str(&settings.client_id)?,
            replay_limit: settings.replay_limit,
            max_body: settings.max_body,
            accounts: Accounts::new(settings.accounts, settings.region, settings.selection),
            guard,
            keeper,
            upstream,
            login_door,
            metrics,
            request_ids: RequestIds::default(),
        })
    }

    /// One answer and one record, whatever happens.
    pub async fn serve(&self, request: Request<Incoming>, peer: Peer) -> Response<Body> {
        let (parts, incoming) = request.into_parts();
        let mut trip = Trip::begin(self.metrics.clone(), &parts.method, self.request_ids.of(&parts));
        let mut answer = match self.forward(&parts, incoming, peer, &mut trip).await {
            Ok(answer) => answer,
            Err(error) => self.problem(error, &parts).respond(trip.request_id()).map(Body::own),
        };
        answer.headers_mut().insert(REQUEST_ID, trip.request_id_header());
        trip.end(answer)
    }

    async fn forward(
        &self,
        parts: &Parts,
        incoming: Incoming,
        peer: Peer,
        trip: &mut Trip,
    ) -> Result<Response<Body>, ProxyError> {
        let target = self.guard.admit(parts, peer)?;
        if let Some(endpoint) = endpoint(&target) {
            return Ok(self.login_door.answer(endpoint, parts, incoming).await?.map(Body::own));
        }
        self.guard.no_browser(&parts.headers)?;
        self.guard.caller(&parts.headers)?;
        let call = self.accounts.select(&target, &parts.headers)?;
        trip.is_for(&call);
        let body = self.body(parts, incoming)?;
        let bearer = self.access_token(&call.user).await?;
        let (answer, sent) = self.send(&call, parts, &target, &bearer, body, trip).await?;
        let answer = match answer.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                self.understand(answer, &call, parts, &target, &bearer, sent, trip).await?
            }
            _ => answer.map(Body::amazon),
        };
        Ok(to_caller(answer, &call, trip))
    }

    /// The caller's body, to be streamed.
    fn body(&self, parts: &Parts, incoming: Incoming) -> Result<Outgoing, ProxyError> {
        let length = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        match (length, self.max_body) {
            (Some(length), Some(max)) if length > max => Err(ProxyError::TooLarge),
            _ => Ok(Outgoing::caller(incoming, self.replay_limit, self.max_body)),
        }
    }

    async fn access_token(&self, user: &UserId) -> Result<HeaderValue, ProxyError> {
        self.keeper.bearer(user).await.map_err(|error| ProxyError::NoToken(error, user.clone()))
    }

    /// Sends the call, and once more on a fresh connection where nothing of it can have been processed: its connection
    /// never carried it, or it is idempotent and broke on a pooled connection before any byte of an answer (RFC 9110,
    /// section 9.2.2). Beside the answer comes what was held of the body; `None` where there was none to hold.
    async fn send(
        &self,
        call: &Call<'_>,
        parts: &Parts,
        target: &Target,
        bearer: &HeaderValue,
        body: Outgoing,
        trip: &mut Trip,
    ) -> Result<(Response<Answer>, Option<Arc<Held>>), ProxyError> {
        let held = body.progress();
        let patient = takes_events(&parts.headers);
        let begun = Instant::now();
        let request = self.to_amazon(call, parts, target, bearer, body);
        let mut sent = self.upstream.send(call.region, request, Reuse::Allowed, patient).await;
        if let Err(error) = &sent
            && (error.unsent || (error.stale && is_idempotent(&parts.method)))
            && let Some(body) = again(&held)
        {
            let request = self.to_amazon(call, parts, target, bearer, body);
            sent = self.upstream.send(call.region, request, Reuse::Never, patient).await;
        }
        trip.amazon_took(call.region, begun.elapsed());
        Ok((sent.map_err(ProxyError::Send)?, held))
    }

    fn to_amazon(
        &self,
        call: &Call<'_>,
        parts: &Parts,
        target: &Target,
        bearer: &HeaderValue,
        body: Outgoing,
    ) -> Request<Outgoing> {
        let family = family(target.path());
        if family.is_unknown() {
            self.metrics.unknown_family.inc();
        }
        let attach = Attach {
            family,
            host: Some(self.upstream.authority(call.region)),
            bearer,
            client_id: &self.client_id,
            ids: call.ids(),
            fixed: call.fixed_headers(),
        };
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = Uri::from(target.path_and_query.clone());
        *request.headers_mut() = rewrite::to_amazon(&parts.headers, attach);
        request
    }

    /// Reads a refusal of Amazon's: one that a fresh token may cure is tried once more with one, all others stand.
    #[allow(clippy::too_many_arguments, reason = "the whole call, once more")]
    async fn understand(
        &self,
        answer: Response<Answer>,
        call: &Call<'_>,
        parts: &Parts,
        target: &Target,
        bearer: &HeaderValue,
        sent: Option<Arc<Held>>,
        trip: &mut Trip,
    ) -> Result<Response<Body>, ProxyError> {
        if answer.status() == StatusCode::FORBIDDEN && !(is_amc(target) && self.keeper.near_expiry(&call.user)) {
            return Ok(answer.map(Body::amazon));
        }
        let refused = Refused::read(answer).await;
        let verdict = refused.verdict();
        self.metrics.upstream_unauthorized.with_label_values(&[verdict.cause()]).inc();
        match verdict {
            Verdict::Scope(hint) => {
                trip.hint(hint);
                Ok(refused.pass_on())
            }
            Verdict::Token => {
                let other = self.keeper.distrust(&call.user, bearer).await;
                match (other, again(&sent)) {
                    (Some(other), Some(body)) => {
                        self.metrics.replays.inc();
                        let (answer, _) = self.send(call, parts, target, &other, body, trip).await?;
                        Ok(answer.map(Body::amazon))
                    }
                    _ => Ok(refused.pass_on()),
                }
            }
        }
    }

    fn problem(&self, error: ProxyError, parts: &Parts) -> Problem {
        let login_url = |user: &UserId| self.login_door.login_url(&parts.headers, user);
        match error {
            ProxyError::Refused(refusal) | ProxyError::Login(LoginError::Refused(refusal)) => {
                self.metrics.guard_denied.with_label_values(&[refusal.reason()]).inc();
                refusal.into()
            }
            ProxyError::Login(error) => error.problem(login_url),
            ProxyError::Unselected(unselected) => unselected.into(),
            ProxyError::NoToken(error, user) => token_problem(error, &login_url(&user)),
            ProxyError::TooLarge => too_large(),
            ProxyError::Send(error) => {
                tracing::warn!(error = %error.kind, "no answer from Amazon");
                error.kind.into()
            }
        }
    }
}

/// The OAuth endpoint that a target names. Those paths are never forwarded, whoever's host is named: of Amazon's hosts
/// only the token endpoint is served, by the shim.
fn endpoint(target: &Target) -> Option<Endpoint> {
    let endpoint = Endpoint::of(target.path());
    match target.of {
        Of::Us if target.account.is_some() => endpoint.filter(|endpoint| *endpoint == Endpoint::Shim),
        Of::Us => endpoint,
        Of::Ads(_) => endpoint.map(|_| Endpoint::Unknown),
        Of::Lwa => Some(endpoint.filter(|endpoint| *endpoint == Endpoint::Shim).unwrap_or(Endpoint::Unknown)),
    }
}

/// The body once more: where there was none, or it passed whole and was held.
fn again(held: &Option<Arc<Held>>) -> Option<Outgoing> {
    match held {
        None => Some(Outgoing::nothing()),
        Some(held) => held.again(),
    }
}

/// Whether the caller takes an event stream, alone or (as MCP clients do) beside other types.
fn takes_events(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    accepted.flat_map(|accept| accept.split(',')).any(|kind| kind.trim_start().starts_with("text/event-stream"))
}

/// RFC 9110, section 9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS)
}

/// AMC answers expired credentials with 403 ("Make your first call", Amazon Marketing Cloud).
fn is_amc(target: &Target) -> bool {
    target.path().split('/').find(|segment| !segment.is_empty()) == Some("amc")
}

fn to_caller(mut answer: Response<Body>, call: &Call<'_>, trip: &mut Trip) -> Response<Body> {
    trip.answered_by_amazon();
    *answer.version_mut() = http::Version::HTTP_11;
    rewrite::to_caller(answer.headers_mut());
    if let Some(hint) = trip.take_hint().or_else(|| call.hint()) {
        answer.headers_mut().insert(HINT, HeaderValue::from_static(hint));
    }
    answer
}

impl From<Refusal> for ProxyError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<LoginError> for ProxyError {
    fn from(error: LoginError) -> Self {
        Self::Login(error)
    }
}

impl From<Unselected> for ProxyError {
    fn from(unselected: Unselected) -> Self {
        Self::Unselected(unselected)
    }
}

impl From<Unselected> for Problem {
    fn from(unselected: Unselected) -> Self {
        match unselected {
            Unselected::Unknown => Self::new(
                Code::UnknownAccount,
                "No account of this name is configured.",
                "Check the name in X-Ads-Account or in the path, and the [[account]] sections of the configuration.",
            ),
            Unselected::Bad(detail) => {
                Self::new(Code::BadRequest, detail, "Correct the X-Ads-* header, or leave it out.")
            }
        }
    }
}

impl From<ErrorKind> for Problem {
    fn from(kind: ErrorKind) -> Self {
        let network = "Try again; if it persists, check DNS, egress rules and https://status.ads.amazon.com.";
        match kind {
            ErrorKind::Unreachable(_) => {
                Self::new(Code::UpstreamUnreachable, "Amazon's host could not be reached.", network)
            }
            ErrorKind::Tls(_) => Self::new(
                Code::UpstreamTls,
                "The TLS handshake with Amazon's host failed.",
                "If a proxy of your network breaks up TLS, add its CA as upstream.ca_file.",
            ),
            ErrorKind::Reset(_) | ErrorKind::Switched => Self::new(
                Code::UpstreamReset,
                "The connection to Amazon broke before an answer came.",
                "The call may have been processed: look before you repeat one that changes something.",
            ),
            ErrorKind::ConnectTimeout(_) => {
                Self::new(Code::UpstreamTimeout, "Amazon's host did not accept a connection in time.", network)
            }
            ErrorKind::ResponseTimeout(_) => Self::new(
                Code::UpstreamTimeout,
                "Amazon did not answer in time (upstream.response_timeout).",
                "The call may have been processed: look before you repeat one that changes something.",
            ),
            ErrorKind::Body(BodyError::TooLarge) => too_large(),
            ErrorKind::Body(BodyError::Stalled) => Self::new(
                Code::RequestTimeout,
                "Nothing came of the request's body for 30 seconds.",
                "Send it without a pause.",
            )
            .close(),
            ErrorKind::Body(BodyError::Broken) => {
                Self::new(Code::BadRequest, "The request's body broke off or was badly framed.", "Send it whole.")
                    .close()
            }
        }
    }
}

fn too_large() -> Problem {
    Problem::new(Code::BodyTooLarge, "The body is larger than proxy.max_body.", "Send less, or raise proxy.max_body.")
        .close()
}

/// Names calls that the caller did not name: a random prefix of this process, and a count.
#[derive(Debug)]
struct RequestIds {
    prefix: u32,
    next: AtomicU64,
}

impl Default for RequestIds {
    fn default() -> Self {
        // Without randomness two processes may share ids, which harms nobody.
        Self { prefix: getrandom::u32().unwrap_or_default(), next: AtomicU64::new(1) }
    }
}

impl RequestIds {
    /// The caller's own id, where it is fit for a log, or a new one.
    fn of(&self, parts: &Parts) -> HeaderValue {
        let fit = |id: &&HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
        parts.headers.get(REQUEST_ID).filter(fit).cloned().unwrap_or_else(|| {
            let id = format!("{:08x}-{:x}", self.prefix, self.next.fetch_add(1, Relaxed));
            HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("unnamed"))
        })
    }
}
