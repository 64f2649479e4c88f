//! The Ads API: authentication and header checks. `resources` implements the resources.

use http::header::{AUTHORIZATION, HeaderName, VARY};
use http::{HeaderMap, Method, Response, StatusCode};
use jiff::Timestamp;

use super::call::{Arrived, Passed, Refused};
use super::header_requirements::{self, ADVERTISER_ID, MARKETPLACE_ID, Requirements, SCOPE};
use super::published;
use super::reply::{self, Body};
use super::world::{Access, World};
use super::{Listener, resources, test_endpoints};

/// Responds to a call to the Ads API.
pub(super) fn answer(
    world: &mut World,
    call: &Arrived<'_>,
    events: &test_endpoints::Events,
    now: Timestamp,
) -> Response<Body> {
    let mut response = check_and_route(world, call, events, now).unwrap_or_else(Refused::response);
    let id = super::request_id();
    reply::set(&mut response, HeaderName::from_static("x-amz-request-id"), &id);
    reply::set(&mut response, HeaderName::from_static("x-amz-rid"), &super::world::random_text(15));
    reply::set(&mut response, VARY, "Accept-Encoding,X-Amzn-CDN-Cache,X-Amzn-AX-Treatment,User-Agent");
    response
}

fn check_and_route(
    world: &mut World,
    call: &Arrived<'_>,
    events: &test_endpoints::Events,
    now: Timestamp,
) -> Result<Response<Body>, Refused> {
    let (raw_path, query) = call.target.split_once('?').unwrap_or((call.target, ""));
    let path: Vec<&str> = raw_path.split('/').filter(|segment| !segment.is_empty()).collect();
    refuse_leaks(call)?;
    let demand = header_requirements::of(&path).ok_or_else(|| unknown_path(&call.head.headers))?;
    let access = authenticate(world, &call.head.headers, now)?.clone();
    // HEAD needs what GET needs.
    let method = if call.head.method == Method::HEAD { &Method::GET } else { &call.head.method };
    demand.check(&call.head.headers, published::find(method.as_str(), &path))?;
    check_client(demand, &access, &call.head.headers)?;
    let profile = check_scope(world, &path, call, &access)?;
    check_amc_account(world, &path, &call.head.headers, &access)?;
    let passed = Passed {
        listener: call.listener,
        method: &call.head.method,
        path: &path,
        query,
        headers: &call.head.headers,
        body: call.body,
        advertiser: access.advertiser,
        profile,
        now,
    };
    Ok(match path[0] {
        "sandbox" => test_endpoints::answer(call, &passed, events),
        _ => resources::answer(world, &passed, demand.name),
    })
}

pub(super) fn refuse_leaks(call: &Arrived<'_>) -> Result<(), Refused> {
    let refuse = |text: &str| Err(Refused::coded(StatusCode::BAD_REQUEST, text));
    if !call.target.starts_with('/') {
        return refuse("The request target is not in origin form");
    }
    if let Some(name) = header_requirements::leak(&call.head.headers) {
        return refuse(&format!("Header {name} must not leave the sidecar"));
    }
    if !host_is_ours(call) {
        return refuse("Header host does not name this host");
    }
    Ok(())
}

/// The authority of the request must be this listener's: loopback with this port, or the region's real name.
fn host_is_ours(call: &Arrived<'_>) -> bool {
    let header = call.head.headers.get("host").and_then(|value| value.to_str().ok());
    let Some(host) = call.head.uri.authority().map(http::uri::Authority::as_str).or(header) else { return false };
    let real = match call.listener {
        Listener::Na => "advertising-api.amazon.com",
        Listener::Eu => "advertising-api-eu.amazon.com",
        Listener::Fe => "advertising-api-fe.amazon.com",
        Listener::McpNa => "advertising-ai.amazon.com",
        Listener::McpEu => "advertising-ai-eu.amazon.com",
        Listener::McpFe => "advertising-ai-fe.amazon.com",
        Listener::Lwa => return false,
    };
    let port = format!(":{}", call.port);
    let name = host.strip_suffix(&port);
    host == real || name.is_some_and(|name| [real, "localhost", "127.0.0.1", "[::1]"].contains(&name))
}

pub(super) fn authenticate<'w>(world: &'w World, headers: &HeaderMap, now: Timestamp) -> Result<&'w Access, Refused> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or(Refused::Unauthorized)?;
    if values.next().is_some() {
        return Err(Refused::coded(StatusCode::BAD_REQUEST, "Header authorization was sent more than once"));
    }
    let token = value.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
    let token = token.filter(|token| token.starts_with("Atza|")).ok_or_else(|| malformed(headers))?;
    world.access(token, now).ok_or(Refused::Unauthorized)
}

/// The client id must be the one that the token was issued to.
pub(super) fn check_client(demand: &Requirements, access: &Access, headers: &HeaderMap) -> Result<(), Refused> {
    let sent = demand.client_id.iter().find_map(|name| headers.get(*name));
    if sent.is_some_and(|sent| sent.as_bytes() == access.client_id.as_bytes()) {
        return Ok(());
    }
    Err(Refused::coded(StatusCode::UNAUTHORIZED, "The client id does not belong to the access token"))
}

fn check_scope(world: &World, path: &[&str], call: &Arrived<'_>, access: &Access) -> Result<Option<u64>, Refused> {
    // A profile list needs none; AMC is not regional and checks its own headers; the test endpoints accept any.
    let looks = !matches!(path, ["v2", "profiles", ..] | ["amc" | "sandbox", ..]);
    let Some(sent) = call.head.headers.get(SCOPE).filter(|_| looks) else { return Ok(None) };
    let id = sent.to_str().ok().and_then(|text| text.parse::<u64>().ok());
    let here = |id: &u64| world.catalogue.profiles.iter().find(|p| p.id == *id && p.region == call.listener);
    match id.as_ref().and_then(here) {
        Some(profile) if profile.advertiser == access.advertiser => Ok(Some(profile.id)),
        Some(profile) => {
            Err(Refused::coded(StatusCode::UNAUTHORIZED, &format!("Not authorized to access scope {}", profile.id)))
        }
        None => Err(Refused::coded(StatusCode::UNAUTHORIZED, "No matching advertiser found for scope")),
    }
}

/// The AMC account and its marketplace must match and belong to the user.
fn check_amc_account(world: &World, path: &[&str], headers: &HeaderMap, access: &Access) -> Result<(), Refused> {
    let (account, marketplace) = (headers.get(ADVERTISER_ID), headers.get(MARKETPLACE_ID));
    let (["amc", "instances" | "reporting" | "advertiserData", rest @ ..], Some(account), Some(marketplace)) =
        (path, account, marketplace)
    else {
        return Ok(());
    };
    // An account may have several instances.
    let known = world.catalogue.amc_accounts.iter().any(|one| {
        one.advertiser == access.advertiser
            && account.as_bytes() == one.id.as_bytes()
            && marketplace.as_bytes() == one.marketplace.as_bytes()
            && rest.first().is_none_or(|instance| one.instance == *instance)
    });
    if known { Ok(()) } else { Err(Refused::coded(StatusCode::FORBIDDEN, "unauthorized response")) }
}

/// The gateway treats an unknown path as a request signed with AWS keys.
fn unknown_path(headers: &HeaderMap) -> Refused {
    if headers.contains_key(AUTHORIZATION) {
        malformed(headers)
    } else {
        Refused::Gateway("Missing Authentication Token".into())
    }
}

/// The message contains the header with the token, as that of the real gateway does.
fn malformed(headers: &HeaderMap) -> Refused {
    let sent = headers.get(AUTHORIZATION).map(|value| String::from_utf8_lossy(value.as_bytes())).unwrap_or_default();
    let last = sent.split(' ').next_back().unwrap_or_default();
    Refused::Gateway(format!(
        "'{last}' not a valid key=value pair (missing equal-sign) in Authorization header: '{sent}'."
    ))
}
