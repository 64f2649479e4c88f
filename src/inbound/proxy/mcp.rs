//! Recognizes the calls of MCP clients, which show errors to a person only in the forms of their own protocol.

use http::Method;
use http::request::Parts;

use crate::domain::account::Service;
use crate::domain::api_families::family;
use crate::inbound::destination::Target;
use crate::upstream::accepts_event_stream;

/// Whether a request is a message of an MCP client to the MCP server: a `POST` that accepts an event stream, as the
/// protocol demands of every client ("Transports", Model Context Protocol).
pub(super) fn is_call(request: &Parts) -> bool {
    request.method == Method::POST
        && accepts_event_stream(&request.headers)
        && Target::read(&request.uri, |_| true).is_ok_and(|target| family(target.path()).service == Service::Mcp)
}
