//! The request id: `X-Request-Id`, of requests and responses.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::header::{HeaderMap, HeaderName, HeaderValue};

/// The header that carries the request id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Creates ids for requests without one: a random prefix of this process, and a count.
#[derive(Debug)]
pub struct RequestIds {
    prefix: u32,
    next: AtomicU64,
}

impl Default for RequestIds {
    fn default() -> Self {
        // Without randomness two processes may create the same ids, which is harmless.
        Self { prefix: getrandom::u32().unwrap_or_default(), next: AtomicU64::new(1) }
    }
}

impl RequestIds {
    /// The caller's own id, if it is 1 to 128 visible ASCII characters, else a new one.
    pub fn of(&self, headers: &HeaderMap) -> HeaderValue {
        headers.get(REQUEST_ID).filter(|id| is_valid(id)).cloned().unwrap_or_else(|| self.new_id())
    }

    /// The id [of](Self::of) a request, which takes the place of any other id of the caller's, so that Amazon and the
    /// caller see the same one.
    pub fn settle(&self, headers: &mut HeaderMap) -> HeaderValue {
        let mut given = headers.get_all(REQUEST_ID).iter();
        // Most requests have none, and pay for one look at their headers.
        let Some(first) = given.next() else { return self.new_id() };
        if given.next().is_none() && is_valid(first) {
            return first.clone();
        }
        let id = self.of(headers);
        headers.insert(REQUEST_ID, id.clone());
        id
    }

    fn new_id(&self) -> HeaderValue {
        let id = format_id(self.prefix, self.next.fetch_add(1, Relaxed));
        HeaderValue::from_bytes(&id).unwrap_or(HeaderValue::from_static("unnamed"))
    }
}

fn is_valid(id: &HeaderValue) -> bool {
    (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// `prefix-count` in hexadecimal digits of a fixed length. Written by hand: `format!` for every request costs more.
fn format_id(prefix: u32, count: u64) -> [u8; 21] {
    let digit = |number: u64, place: usize| b"0123456789abcdef"[(number >> (4 * place)) as usize & 15];
    std::array::from_fn(|at| match at {
        0..8 => digit(prefix.into(), 7 - at),
        8 => b'-',
        _ => digit(count, 20 - at),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_the_prefix_and_the_count() {
        assert_eq!(&format_id(0x0123_abcd, 0xfe), b"0123abcd-0000000000fe");
    }

    #[test]
    fn no_two_requests_get_the_same_id() {
        let (ids, none) = (RequestIds::default(), HeaderMap::new());
        assert_ne!(ids.of(&none), ids.of(&none));
    }
}
