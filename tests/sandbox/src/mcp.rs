//! Amazon's MCP server: `/mcp` and `/mcp/lite`, streamable HTTP without sessions ("Transports", Model Context
//! Protocol).
//!
//! It has one tool, `list_profiles`. A `GET` opens an event stream whose notifications are released one by one, as
//! those of `/sandbox/events?step=1`.

use http::header::{ACCEPT, ALLOW, WWW_AUTHENTICATE};
use http::{HeaderMap, Method, Response, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Listener;
use super::ads::{authenticate, check_client, refuse_leaks};
use super::call::{Arrived, Refused};
use super::header_requirements::MCP;
use super::reply::{self, Body};
use super::test_endpoints::{self, stream_events};
use super::world::World;

/// Where the challenge sends an OAuth client. An MCP client that follows it starts an OAuth of its own.
const METADATA: &str = "/.well-known/oauth-protected-resource";
/// More notifications than any test waits for.
const NOTIFICATIONS: u32 = 1000;

/// Responds to a call to an MCP listener.
pub(super) fn answer(
    world: &World,
    call: &Arrived<'_>,
    events: &test_endpoints::Events,
    now: Timestamp,
) -> Response<Body> {
    checked(world, call, events, now).unwrap_or_else(Refused::response)
}

fn checked(
    world: &World,
    call: &Arrived<'_>,
    events: &test_endpoints::Events,
    now: Timestamp,
) -> Result<Response<Body>, Refused> {
    let path = call.head.uri.path();
    if path.starts_with(METADATA) {
        let document = json!({ "resource": "https://advertising-ai.amazon.com/mcp",
                               "authorization_servers": ["https://lwa.amazon.com"] });
        return Ok(reply::json(StatusCode::OK, &document));
    }
    refuse_leaks(call)?;
    if !matches!(path, "/mcp" | "/mcp/lite") {
        return Err(Refused::Coded(StatusCode::NOT_FOUND, "Not Found".to_owned()));
    }
    let headers = &call.head.headers;
    let access = authenticate(world, headers, now)?;
    MCP.check(headers, None)?;
    check_client(&MCP, access, headers)?;
    Ok(match call.head.method {
        Method::POST => message(world, call, &access.advertiser),
        Method::GET if accepts_events(headers) => {
            let notification = |number| {
                event(&json!({ "jsonrpc": "2.0", "method": "notifications/message",
                                                       "params": { "level": "info", "data": number } }))
            };
            stream_events(NOTIFICATIONS, Some(events.clone()), notification)
        }
        _ => {
            let mut response = reply::empty(StatusCode::METHOD_NOT_ALLOWED);
            reply::set(&mut response, ALLOW, "GET, POST");
            response
        }
    })
}

/// Adds the challenge that Amazon's MCP server sends with a 401.
pub(super) fn challenge(response: &mut Response<Body>) {
    let text = format!("Bearer resource_metadata=\"https://advertising-ai.amazon.com{METADATA}/mcp\"");
    reply::set(response, WWW_AUTHENTICATE, &text);
}

fn accepts_events(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT).iter().any(|value| value.to_str().is_ok_and(|text| text.contains("text/event-stream")))
}

fn event(data: &Value) -> String {
    format!("event: message\ndata: {data}\n\n")
}

/// Responds to one JSON-RPC message.
fn message(world: &World, call: &Arrived<'_>, advertiser: &str) -> Response<Body> {
    let failed = |id: &Value, code: i32, text: &str| {
        let error = json!({ "code": code, "message": text });
        json!({ "jsonrpc": "2.0", "id": id, "error": error })
    };
    let Ok(message) = serde_json::from_slice::<Value>(call.body) else {
        return reply::json(StatusCode::BAD_REQUEST, &failed(&Value::Null, -32700, "Parse error"));
    };
    let (id, params) = (&message["id"], &message["params"]);
    if id.is_null() {
        return reply::empty(StatusCode::ACCEPTED);
    }
    let result = match message["method"].as_str().unwrap_or_default() {
        "initialize" => Ok(json!({
            "protocolVersion": params["protocolVersion"],
            "capabilities": { "tools": {} },
            "serverInfo": { "name": "adsidecar-sandbox", "version": env!("CARGO_PKG_VERSION") },
        })),
        "ping" => Ok(json!({})),
        "tools/list" => Ok(json!({ "tools": [{
            "name": "list_profiles",
            "description": "The profiles of this region",
            "inputSchema": { "type": "object" },
        }] })),
        "tools/call" if params["name"] == "list_profiles" => {
            let ids: Vec<u64> =
                world.catalogue.profiles_of(advertiser, region(call.listener)).map(|profile| profile.id).collect();
            Ok(json!({ "content": [{ "type": "text", "text": json!(ids).to_string() }] }))
        }
        "tools/call" => Err((-32602, "Unknown tool")),
        _ => Err((-32601, "Method not found")),
    };
    let answer = match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err((code, text)) => failed(id, code, text),
    };
    if accepts_events(&call.head.headers) {
        reply::answer(StatusCode::OK, "text/event-stream", event(&answer))
    } else {
        reply::json(StatusCode::OK, &answer)
    }
}

/// The Ads API listener of the same region.
fn region(listener: Listener) -> Listener {
    match listener {
        Listener::McpEu => Listener::Eu,
        Listener::McpFe => Listener::Fe,
        _ => Listener::Na,
    }
}
