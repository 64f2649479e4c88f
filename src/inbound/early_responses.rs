//! The responses to requests whose head was not read: the server sends them itself.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};

use super::admission::Refusal;
use super::destination::BadTarget;
use super::problem::{Code, Problem};
use super::request_id::RequestIds;
use crate::server::OwnResponses;

/// The responses of all listeners.
#[derive(Debug)]
pub struct EarlyResponses(Arc<RequestIds>);

impl EarlyResponses {
    /// Responses with the ids of `request_ids`.
    pub fn new(request_ids: Arc<RequestIds>) -> Self {
        Self(request_ids)
    }
}

impl OwnResponses for EarlyResponses {
    fn head_timeout(&self) -> Bytes {
        Problem::new(Code::RequestTimeout, "The head of the request did not arrive in time.", "Send it without pauses.")
            .raw(&self.request_id())
    }

    fn overloaded(&self) -> Bytes {
        Problem::new(
            Code::Overloaded,
            "Every connection that proxy.max_connections allows is busy.",
            "Try again after the time in Retry-After, keep connections open, or raise proxy.max_connections.",
        )
        .retry_after(Duration::from_secs(1))
        .raw(&self.request_id())
    }

    fn bad_target(&self) -> Bytes {
        Problem::new(
            Code::BadRequest,
            "The target contains a character that no URL can, such as a quotation mark in the query, or is no path.",
            "Percent-encode such characters: %22 is a quotation mark, %3C and %3E are angle brackets. A path begins \
             with /.",
        )
        .raw(&self.request_id())
    }

    fn head_too_large(&self) -> Bytes {
        Problem::new(
            Code::HeadersTooLarge,
            "The head of the request is larger than 32 KiB, has more than 100 fields, or declares a body of an \
             impossible length.",
            "Send fewer and shorter headers. A browser sends its cookies of every port of localhost: clear them, or \
             use another name of this machine.",
        )
        .raw(&self.request_id())
    }

    fn target_too_long(&self) -> Bytes {
        Problem::from(Refusal::Target(BadTarget::TooLong)).raw(&self.request_id())
    }

    fn request_id(&self) -> HeaderValue {
        self.0.of(&HeaderMap::new())
    }
}
