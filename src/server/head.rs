//! A request's head, apart from the buffer that it was read into.
//!
//! hyper's header values and targets are slices of that buffer. Each would hold its 8 KiB for as long as the call takes, and
//! hyper would take another 8 KiB for what comes next on the connection.

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Uri};

/// The same request, its head in a piece of memory that is as large as the head.
pub(super) fn copied<B>(request: Request<B>) -> Request<B> {
    let (mut parts, body) = request.into_parts();
    let target = origin_form(&parts.uri);
    let lengths = parts.headers.values().map(HeaderValue::len).sum::<usize>();
    let mut text = BytesMut::with_capacity(lengths + target.map_or(0, str::len));
    for value in parts.headers.values() {
        text.extend_from_slice(value.as_bytes());
    }
    text.extend_from_slice(target.unwrap_or_default().as_bytes());
    let has_target = target.is_some();
    let mut text = text.freeze();
    // What was valid is valid: nothing is replaced by anything else.
    for value in parts.headers.values_mut() {
        if let Ok(copy) = HeaderValue::from_maybe_shared(text.split_to(value.len())) {
            *value = copy;
        }
    }
    if has_target && let Ok(copy) = Uri::from_maybe_shared::<Bytes>(text) {
        parts.uri = copy;
    }
    Request::from_parts(parts, body)
}

/// The target as it came, in the one form whose text is that of its parts.
fn origin_form(uri: &Uri) -> Option<&str> {
    let target = uri.path_and_query()?.as_str();
    (uri.authority().is_none() && target.starts_with('/')).then_some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(target: &'static str, values: &[&[u8]]) -> (Bytes, Request<()>) {
        let buffer = Bytes::from([target.as_bytes(), &values.concat()].concat());
        let mut rest = buffer.clone();
        let mut request = Request::new(());
        *request.uri_mut() = Uri::from_maybe_shared(rest.split_to(target.len())).unwrap();
        for value in values {
            let value = HeaderValue::from_maybe_shared(rest.split_to(value.len())).unwrap();
            request.headers_mut().append("x-any", value);
        }
        (buffer, request)
    }

    #[test]
    fn a_copy_says_the_same_and_does_not_hold_the_buffer() {
        for target in ["/", "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/a/%7Bid%7D?", "/x/../y"] {
            let values: &[&[u8]] = &[b"one", b"", b"caf\xe9\tau lait", b"one"];
            let (buffer, request) = read(target, values);
            let copy = copied(request);
            assert!(buffer.is_unique(), "{target}");
            assert_eq!(copy.uri().path_and_query().unwrap().as_str(), target);
            let copied: Vec<_> = copy.headers().get_all("x-any").iter().map(HeaderValue::as_bytes).collect();
            assert_eq!(copied, values);
        }
    }

    #[test]
    fn a_target_of_another_form_stays_as_it_came() {
        for target in ["*", "http://advertising-api.amazon.com?x=1", "http://advertising-api.amazon.com/v2/profiles"] {
            let (_buffer, request) = read(target, &[]);
            let before = request.uri().clone();
            assert_eq!(copied(request).into_parts().0.uri, before, "{target}");
        }
    }
}
