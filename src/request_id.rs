//! The name of a call, in and out: `X-Request-Id`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::header::{HeaderMap, HeaderName, HeaderValue};

/// Names the call.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Names calls that the caller did not name: a random prefix of this process, and a count.
#[derive(Debug)]
pub struct RequestIds {
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
    pub fn of(&self, headers: &HeaderMap) -> HeaderValue {
        let fit = |id: &&HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
        headers.get(REQUEST_ID).filter(fit).cloned().unwrap_or_else(|| {
            let id = format!("{:08x}-{:x}", self.prefix, self.next.fetch_add(1, Relaxed));
            HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("unnamed"))
        })
    }
}
