//! Copies a request head out of the buffer that it was read into.
//!
//! hyper's header values and targets are slices of that buffer. They would keep its 8 KiB alive for as long as the
//! request takes, and hyper would allocate another 8 KiB for the next data on the connection.

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Uri};

/// Returns the same request, with its head in one allocation that is exactly as large as needed.
pub(super) fn detach<B>(request: Request<B>) -> Request<B> {
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
    // A copy of a valid value is valid, so no value keeps its old slice.
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

/// Returns the target if it is in origin-form, the only form that `path_and_query` reproduces byte for byte.
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
    fn a_detached_head_is_equal_and_does_not_keep_the_buffer_alive() {
        for target in ["/", "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/a/%7Bid%7D?", "/x/../y"] {
            let values: &[&[u8]] = &[b"one", b"", b"caf\xe9\tau lait", b"one"];
            let (buffer, request) = read(target, values);
            let copy = detach(request);
            assert!(buffer.is_unique(), "{target}");
            assert_eq!(copy.uri().path_and_query().unwrap().as_str(), target);
            let copied: Vec<_> = copy.headers().get_all("x-any").iter().map(HeaderValue::as_bytes).collect();
            assert_eq!(copied, values);
        }
    }

    #[test]
    fn a_target_in_another_form_is_unchanged() {
        for target in ["*", "http://advertising-api.amazon.com?x=1", "http://advertising-api.amazon.com/v2/profiles"] {
            let (_buffer, request) = read(target, &[]);
            let before = request.uri().clone();
            assert_eq!(detach(request).into_parts().0.uri, before, "{target}");
        }
    }
}
