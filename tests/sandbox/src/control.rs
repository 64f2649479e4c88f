//! The control port: controls the sandbox from a test in any language, or with `curl`.
//!
//! Plain HTTP on loopback, JSON in and out. The `Host` must be a loopback name and there must be no `Origin`, so that
//! no web page in a browser can reach it.
//!
//! - `GET /`: the current state: addresses, client, clock, fault rules, counts, endpoints
//! - `GET /ca.pem`: the certificate of the throw-away CA
//! - `GET /history`: `{"calls": [...], "lwa": {...}}`: every call received, unchanged; `?door=na` selects one listener
//! - `DELETE /history`: deletes them
//! - `POST /trouble`: adds a [`Rule`] (or a list of them):
//!   `{"trouble": {"status": {"code": 503}}, "door": "na", "path": "/v2", "when": {"next": 3}}`; `door`, `path` and
//!   `when` are optional
//! - `DELETE /trouble`: removes all rules, and releases the calls that they hold
//! - `POST /limits`: replaces the rate limits of the Ads listeners: a list of [`RateLimit`]s, of which the first that
//!   matches applies: `[{"per_second": 20, "burst": 20, "path": "/sp", "told": "nothing"}]`; `told` is `seconds` (the
//!   default), `date`, `nothing`, `html` or `{"text": "…"}`
//! - `POST /jobs`: [`JobLimits`]: how many exports and AMC workflow runs there are at once, and how long they run:
//!   `{"exports": 5, "runs": 10, "runs_of_account": 200, "seconds": 2}`
//! - `POST /clock`: `{"advance": "1h"}` moves the sandbox's clock, and `-1h` moves it back; returns the time
//! - `POST /consent`: records a consent. `{"want": "code"}` (the default; also `redirect_uri`, `scope`, `advertiser`,
//!   `client_id`, `code_challenge` with S256) returns `{"code"}`; `{"want": "grant"}` returns
//!   `{"refresh_token", "access_token", "expires_in"}`
//! - `POST /revoke`: `{"refresh_token": "Atzr|…"}`, or `{}` for all: revokes grants; returns `{"revoked": n}`
//! - `POST /events`: `{"count": 1}` releases `count` events of `/sandbox/events?step=1`
//! - `GET /ap/oa`: the consent page again, for a browser that does not know the throw-away CA

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode};
use jiff::SignedDuration;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::fault::Rule;
use super::history::Call;
use super::jobs::JobLimits;
use super::limits::RateLimit;
use super::reply::{self, Body};
use super::state::SandboxState;
use super::world::{Challenge, World};
use super::{Listener, lwa};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Advance {
    advance: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Revoke {
    refresh_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Let {
    count: usize,
}

/// The body of `POST /trouble`, for a caller that sent another one. With another fault in the place of `status`, or a
/// list of such objects.
fn rule_shape() -> Value {
    json!({ "trouble": { "status": { "code": 503 } }, "door": "na", "path": "/v2", "when": { "next": 3 } })
}

/// One rule, or a list of them. Not an untagged enum: its errors do not say what is wrong.
fn rules(body: &[u8]) -> serde_json::Result<Vec<Rule>> {
    if body.trim_ascii_start().first() == Some(&b'[') {
        serde_json::from_slice(body)
    } else {
        serde_json::from_slice(body).map(|rule| vec![rule])
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Want {
    #[default]
    Code,
    Grant,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Seed {
    want: Want,
    client_id: Option<String>,
    redirect_uri: Option<String>,
    scope: Option<String>,
    advertiser: Option<String>,
    code_challenge: Option<String>,
}

/// Answers a call to the control port.
pub(super) fn answer(shared: &SandboxState, head: &Parts, body: &Bytes) -> Response<Body> {
    if let Some(text) = foreign(&head.headers) {
        return reply::json(StatusCode::FORBIDDEN, &json!({ "error": text }));
    }
    if let Some(text) = not_understood(head, body) {
        return reply::json(StatusCode::BAD_REQUEST, &json!({ "error": text }));
    }
    // A HEAD is a GET whose body the server leaves out: health checks send it.
    let method = if head.method == Method::HEAD { &Method::GET } else { &head.method };
    match (method, head.uri.path()) {
        (&Method::GET, "/") => overview(shared),
        (&Method::GET, "/ca.pem") => reply::answer(StatusCode::OK, "application/x-pem-file", shared.ca_pem.clone()),
        (&Method::GET, "/history") => history(shared, head.uri.query().unwrap_or_default()),
        (&Method::DELETE, "/history") => {
            shared.world().history.clear();
            reply::empty(StatusCode::NO_CONTENT)
        }
        (&Method::POST, "/trouble") => match rules(body) {
            Ok(rules) => {
                let mut world = shared.world();
                for rule in rules {
                    world.faults.add(rule, 0);
                }
                reply::json(StatusCode::CREATED, &json!({ "rules": world.faults.rules().collect::<Vec<_>>() }))
            }
            Err(error) => {
                let body = json!({ "error": error.to_string(), "expected": rule_shape() });
                reply::json(StatusCode::BAD_REQUEST, &body)
            }
        },
        (&Method::DELETE, "/trouble") => {
            shared.world().faults.clear();
            reply::empty(StatusCode::NO_CONTENT)
        }
        (&Method::POST, "/limits") => with(body, |limits: Vec<RateLimit>| {
            let usable = |limit: &RateLimit| limit.per_second > 0.0 && limit.burst >= 1.0 && limit.burst.is_finite();
            if !limits.iter().all(usable) {
                return (StatusCode::BAD_REQUEST, json!({ "error": "per_second is above 0, and burst at least 1" }));
            }
            let mut world = shared.world();
            world.limits.set(limits);
            (StatusCode::OK, json!({ "limits": world.limits.rules(), "refused": world.limits.refusals() }))
        }),
        (&Method::POST, "/jobs") => with(body, |limits: JobLimits| {
            shared.world().jobs.set(limits);
            (StatusCode::OK, json!({ "jobs": limits }))
        }),
        (&Method::POST, "/clock") => with(body, |Advance { advance }| match advance.parse::<SignedDuration>() {
            Ok(by) => {
                shared.clock.advance(by);
                (StatusCode::OK, json!({ "now": shared.clock.now() }))
            }
            Err(error) => (StatusCode::BAD_REQUEST, json!({ "error": format!("advance: {error}") })),
        }),
        (&Method::POST, "/consent") => with(body, |seed: Seed| consent(shared, seed)),
        (&Method::POST, "/revoke") => with(body, |Revoke { refresh_token }| {
            let mut world = shared.world();
            let revoked = match refresh_token {
                Some(token) => usize::from(world.revoke(&token)),
                None => world.revoke_all(),
            };
            (StatusCode::OK, json!({ "revoked": revoked }))
        }),
        (&Method::POST, "/events") => with(body, |Let { count }| {
            shared.events.add_permits(count.min(1000));
            (StatusCode::OK, json!({ "count": count.min(1000) }))
        }),
        (&Method::GET, lwa::CONSENT) => {
            let query = head.uri.query().unwrap_or_default();
            lwa::consent(&mut shared.world(), query, shared.auto_consent, shared.clock.now())
        }
        _ => reply::json(StatusCode::NOT_FOUND, &json!({ "error": "no such endpoint: GET / lists them" })),
    }
}

/// What an endpoint does not take: a query or a body that means nothing there may name what the caller wants to change.
fn not_understood(head: &Parts, body: &Bytes) -> Option<String> {
    let path = head.uri.path();
    if let Some(query) = head.uri.query().filter(|query| !query.is_empty() && path != lwa::CONSENT) {
        match (&head.method, path) {
            (&Method::GET | &Method::HEAD, "/history") if query.starts_with("door=") => {}
            (&Method::GET, "/history") => return Some("GET /history takes one parameter: door".to_owned()),
            (&Method::POST, _) => return Some(format!("POST {path} takes no query: its parameters are in the body")),
            (method, _) => return Some(format!("{method} {path} takes no query")),
        }
    }
    let has_body = !body.is_empty() && head.method != Method::POST;
    has_body.then(|| format!("{} {path} takes no body", head.method))
}

/// Why the control port rejects a request, if it does not come from a program on this machine.
fn foreign(headers: &HeaderMap) -> Option<&'static str> {
    if headers.contains_key("origin") {
        return Some("the sandbox rejects requests with an Origin header, because they come from a web page");
    }
    let mut hosts = headers.get_all("host").iter().map(|host| host.to_str().unwrap_or_default());
    let loopback = |host: &str| {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        ["localhost", "127.0.0.1", "[::1]"].iter().any(|known| name.eq_ignore_ascii_case(known))
    };
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if loopback(host) => None,
        _ => Some("the Host must be localhost, 127.0.0.1 or [::1]"),
    }
}

/// Parses the body (an empty one as `{}`) and returns the response of `act`.
fn with<T: DeserializeOwned>(body: &Bytes, act: impl FnOnce(T) -> (StatusCode, Value)) -> Response<Body> {
    let text: &[u8] = if body.is_empty() { b"{}" } else { body };
    let (status, answer) = match serde_json::from_slice(text) {
        Ok(parsed) => act(parsed),
        Err(error) => (StatusCode::BAD_REQUEST, json!({ "error": error.to_string() })),
    };
    reply::json(status, &answer)
}

fn overview(shared: &SandboxState) -> Response<Body> {
    let world = shared.world();
    let clients = world.clients.iter();
    let clients: Vec<Value> = clients.map(|one| json!({ "id": one.id, "return_urls": one.return_urls })).collect();
    let body = json!({
        "what": "adsidecar sandbox: a stand-in for Amazon, for tests and evaluation",
        "addresses": shared.addresses,
        "now": shared.clock.now(),
        "clients": clients,
        "advertisers": world.catalogue.advertisers,
        "grants": world.grants.iter().filter(|grant| !grant.revoked).count(),
        "calls": world.history.calls().count(),
        "lwa": world.history.lwa_calls(),
        "limits": world.limits.rules(),
        "refused": world.limits.refusals(),
        "trouble": world.faults.rules().collect::<Vec<_>>(),
        "endpoints": ["GET /", "GET /ca.pem", "GET /history", "DELETE /history", "POST /trouble", "DELETE /trouble",
                      "POST /limits", "POST /jobs", "POST /clock", "POST /consent", "POST /revoke", "POST /events",
                      "GET /ap/oa"],
    });
    reply::json(StatusCode::OK, &body)
}

fn history(shared: &SandboxState, query: &str) -> Response<Body> {
    let wanted = query.strip_prefix("door=").map(|listener| serde_json::from_value::<Listener>(json!(listener)));
    let wanted = match wanted.transpose() {
        Ok(wanted) => wanted,
        Err(error) => return reply::json(StatusCode::BAD_REQUEST, &json!({ "error": error.to_string() })),
    };
    let world = shared.world();
    let calls: Vec<&Call> =
        world.history.calls().filter(|call| wanted.is_none_or(|listener| listener == call.listener)).collect();
    reply::json(StatusCode::OK, &json!({ "calls": calls, "lwa": world.history.lwa_calls() }))
}

fn consent(shared: &SandboxState, seed: Seed) -> (StatusCode, Value) {
    let mut world = shared.world();
    let world: &mut World = &mut world;
    let mut consent = world.usual_consent();
    if let Some(unknown) =
        seed.advertiser.as_ref().filter(|id| !world.catalogue.advertisers.iter().any(|a| a.id == **id))
    {
        return (StatusCode::BAD_REQUEST, json!({ "error": format!("no such advertiser: {unknown}") }));
    }
    let fields = [
        (&mut consent.client_id, seed.client_id),
        (&mut consent.redirect_uri, seed.redirect_uri),
        (&mut consent.scope, seed.scope),
        (&mut consent.advertiser, seed.advertiser),
    ];
    for (field, value) in fields {
        if let Some(value) = value {
            *field = value;
        }
    }
    consent.challenge = seed.code_challenge.map(Challenge::S256);
    let now = shared.clock.now();
    match seed.want {
        Want::Code => (StatusCode::OK, json!({ "code": world.consent(consent, now) })),
        Want::Grant => {
            let issued = world.grant(&consent, now);
            let body = json!({ "refresh_token": issued.refresh_token, "access_token": issued.access_token,
                               "expires_in": issued.expires_in });
            (StatusCode::OK, body)
        }
    }
}
