//! A call that may leave.

use http::header::ACCEPT;
use http::request::Parts;
use http::{HeaderValue, Method};

use super::route::RoutedRequest;
use crate::inbound::destination::Target;

/// A call that may leave, but for its body.
#[derive(Clone, Copy)]
pub(super) struct UpstreamRequest<'a> {
    pub(super) call: &'a RoutedRequest<'a>,
    pub(super) parts: &'a Parts,
    pub(super) target: &'a Target,
    pub(super) bearer: &'a HeaderValue,
}

impl UpstreamRequest<'_> {
    /// Whether the caller takes an event stream, alone or among others: MCP clients name `application/json` first.
    pub(super) fn accepts_event_stream(self) -> bool {
        let lines = self.parts.headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok());
        let mut kinds = lines.flat_map(|line| line.split(',')).map(|kind| kind.split(';').next().unwrap_or_default());
        kinds.any(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
    }

    /// RFC 9110, section 9.2.2.
    pub(super) fn is_idempotent(self) -> bool {
        matches!(self.parts.method, Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS)
    }
}
