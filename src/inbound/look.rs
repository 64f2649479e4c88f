//! What the pages for people share: the style, the frame of a page, and the headers that confine it.

use std::sync::LazyLock;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use sha2::{Digest, Sha256};

/// For light and dark, and from a phone to a wall.
const STYLE: &str = include_str!("style.css");
/// Drawn by the browser itself: without one it would ask for `/favicon.ico`.
const ICON: &str = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect \
                    width='16' height='16' rx='4' fill='%230550ae'/%3E%3Cpath d='M4 12 8 4l4 8M5.6 9h4.8' fill='none' \
                    stroke='white' stroke-width='1.8'/%3E%3C/svg%3E";
const FRAME_OPTIONS: HeaderName = HeaderName::from_static("x-frame-options");

/// A page that loads nothing, runs nothing, sends nothing, and may not be framed.
static STILL: LazyLock<HeaderValue> = LazyLock::new(|| policy("form-action 'none'"));
/// A page that may also run the script that adsidecar serves, and send forms and requests to adsidecar. No inline
/// script runs.
static LIVE: LazyLock<HeaderValue> =
    LazyLock::new(|| policy("script-src 'self'; connect-src 'self'; form-action 'self'"));

/// What a page may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confined {
    /// Nothing but follow links.
    Still,
    /// Run adsidecar's script, and send forms to adsidecar.
    Live,
}

fn policy(more: &str) -> HeaderValue {
    let style = BASE64_STANDARD.encode(Sha256::digest(STYLE));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{style}'; img-src data:; {more}; base-uri 'none'; frame-ancestors 'none'"
    );
    HeaderValue::from_str(&policy).expect("the policy is visible ASCII")
}

/// Adds the headers of a page. Other origins learn no referrer.
pub fn add_headers(headers: &mut HeaderMap, confined: Confined) {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    let (policy, referrer) = match confined {
        Confined::Still => (&STILL, "no-referrer"),
        // With `no-referrer` a browser would send the forms with `Origin: null`.
        Confined::Live => (&LIVE, "same-origin"),
    };
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::clone(policy));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static(referrer));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(FRAME_OPTIONS, HeaderValue::from_static("DENY"));
}

/// A whole page.
pub fn document(title: &str, more_head: &Markup, body: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                link rel="icon" href=(ICON);
                style { (PreEscaped(STYLE)) }
                (more_head)
            }
            body { (body) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_confined_by_its_policy_and_no_inline_script_runs() {
        for (confined, allows_script) in [(Confined::Still, false), (Confined::Live, true)] {
            let mut headers = HeaderMap::new();
            add_headers(&mut headers, confined);
            let policy = headers[CONTENT_SECURITY_POLICY].to_str().unwrap();
            assert!(
                policy.starts_with("default-src 'none'; ") && policy.contains("frame-ancestors 'none'"),
                "{policy}"
            );
            assert_eq!(policy.contains("script-src 'self'"), allows_script, "{policy}");
            assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
        }
    }
}
