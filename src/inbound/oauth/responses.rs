//! The parts of responses: JSON bodies, redirects, and the headers that every response carries.

use cookie::Cookie;
use http::header::{
    ACCEPT, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, CONTENT_TYPE, COOKIE,
    HeaderMap, HeaderValue, LOCATION, VARY,
};
use http::{Response, StatusCode};
use http_body_util::Full;
use serde::Serialize;

use super::FullResponse;

/// Whether the caller prefers HTML to JSON (`Accept`, RFC 9110, section 12.5.1). Of two that it likes equally well, it
/// gets the one that it names first, and JSON if it names neither.
pub(in crate::inbound) fn prefers_html(headers: &HeaderMap) -> bool {
    let lines: Vec<_> = headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok()).collect();
    let ranges: Vec<_> = lines.iter().flat_map(|line| line.split(',')).map(media_range).collect();
    // How much it likes a type, and where it says so: the most specific range decides, not the first.
    let liked = |names: &[&str]| {
        let at = names.iter().find_map(|name| ranges.iter().position(|(range, _)| range == name));
        at.map_or((0, usize::MAX), |at| (ranges[at].1, at))
    };
    let html = liked(&["text/html", "text/*", "*/*"]);
    let json = ["application/json", "application/problem+json"].map(|name| liked(&[name, "application/*", "*/*"]));
    html.0 > 0 && json.into_iter().all(|json| html.0 > json.0 || html.0 == json.0 && html.1 < json.1)
}

/// A media range in lower case, and its weight in thousandths: 1000 if none is given that can be read.
fn media_range(text: &str) -> (String, u16) {
    let mut parts = text.split(';').map(str::trim);
    let range = parts.next().unwrap_or_default().to_ascii_lowercase();
    let weight = parts.filter_map(|part| part.split_once('=')).find(|(name, _)| name.trim().eq_ignore_ascii_case("q"));
    let weight = weight.and_then(|(_, value)| value.trim().parse::<f32>().ok()).filter(|q| (0.0..=1.0).contains(q));
    (range, weight.map_or(1000, |q| (q * 1000.0) as u16))
}

/// Whether a browser fetches a page that nobody has asked for yet.
pub(super) fn is_prefetch(headers: &HeaderMap) -> bool {
    let says = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    ["sec-purpose", "purpose", "x-purpose", "x-moz"].into_iter().any(|name| {
        let value = says(name).to_ascii_lowercase();
        ["prefetch", "prerender", "preview"].iter().any(|purpose| value.contains(purpose))
    })
}

pub(super) fn cookie_of(headers: &HeaderMap, name: &str) -> Option<String> {
    let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut cookies = lines.flat_map(Cookie::split_parse).filter_map(Result::ok);
    cookies.find(|cookie| cookie.name() == name).map(|cookie| cookie.value().to_owned())
}

pub(super) fn json(status: StatusCode, value: &impl Serialize) -> FullResponse {
    let mut response = Response::new(Full::new(serde_json::to_vec(value).unwrap_or_default().into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(super) fn redirect(location: &str) -> FullResponse {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::FOUND;
    response.headers_mut().extend(HeaderValue::from_str(location).map(|location| (LOCATION, location)));
    response
}

/// `204`.
pub(super) fn nothing() -> FullResponse {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

pub(super) fn preflight() -> FullResponse {
    let mut response = nothing();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("accept, content-type, x-request-id"));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

pub(super) fn allow_origin(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    // Without this a page sees none of them.
    let exposed = HeaderValue::from_static("x-adsidecar-error, x-request-id, retry-after, link");
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    headers.insert(VARY, HeaderValue::from_static("origin"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_of_accept_decide_between_a_page_and_json_and_at_a_tie_the_order() {
        for (accept, html) in [
            ("", false),
            ("*/*", false),
            ("application/json", false),
            ("text/html;q=0", false),
            ("text/html;q=0, */*", false),
            ("text/html;q=0.5, application/json", false),
            ("text/plain, text/html;q=0.1, application/json;q=0.5", false),
            ("application/problem+json, text/html;q=0.1", false),
            ("application/json, text/html", false),
            ("text/html;q=0.8, */*;q=0.8", true),
            ("text/html", true),
            ("TEXT/HTML; Q=0.4", true),
            ("text/*", true),
            ("text/html, application/json", true),
            ("application/json;q=0.5, text/html", true),
            ("*/*;q=0.1, text/html", true),
            ("text/html;q=nonsense", true),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", true),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            assert_eq!(prefers_html(&headers), html, "{accept}");
        }
        let mut lines = HeaderMap::new();
        for line in ["application/json;q=0.1", "text/html;q=0.2"] {
            lines.append(ACCEPT, HeaderValue::from_static(line));
        }
        assert!(prefers_html(&lines), "two lines are one list");
    }
}
