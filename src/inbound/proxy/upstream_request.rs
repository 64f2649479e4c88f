//! A request that is ready to be sent to Amazon.

use http::header::ACCEPT;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method};

use super::route::RoutedRequest;
use crate::inbound::destination::Target;

/// A request that is ready to be sent to Amazon, except for its body.
#[derive(Clone, Copy)]
pub(super) struct UpstreamRequest<'a> {
    pub(super) call: &'a RoutedRequest<'a>,
    pub(super) parts: &'a Parts,
    pub(super) target: &'a Target,
    pub(super) bearer: &'a HeaderValue,
}

impl UpstreamRequest<'_> {
    /// Whether the caller accepts an event stream, possibly beside other types: MCP clients list `application/json`
    /// first.
    pub(super) fn accepts_event_stream(self) -> bool {
        accepts_event_stream(&self.parts.headers)
    }

    /// Whether the method is idempotent (RFC 9110, section 9.2.2).
    pub(super) fn is_idempotent(self) -> bool {
        matches!(self.parts.method, Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS)
    }
}

/// Whether the request accepts an event stream.
pub(super) fn accepts_event_stream(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok());
    let mut kinds = lines.flat_map(|line| line.split(',')).map(|kind| kind.split(';').next().unwrap_or_default());
    kinds.any(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
}
