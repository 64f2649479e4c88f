//! Headers of a caller, one `name: value` a line: Amazon sees one of each managed header, ours, and nothing that stays.

use adsidecar::domain::account::{Context, Ids};
use adsidecar::domain::api_families::{context_of, family};
use adsidecar::domain::headers::{UpstreamHeaders, to_amazon};
use adsidecar::inbound::proxy::strip_response;
use http::{HeaderMap, HeaderName, HeaderValue};

const MANAGED: [&str; 4] = ["authorization", "amazon-ads-clientid", "amazon-advertising-api-clientid", "host"];
const STAY: [&str; 13] = [
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "cookie",
    "origin",
    "referer",
    "forwarded",
    "expect",
    "proxy",
];

pub fn check(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let path = lines.next().and_then(|line| std::str::from_utf8(line).ok()).unwrap_or("/");
    let mut caller = HeaderMap::new();
    for line in lines.take(100) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(&line[colon + 1..])) {
            caller.append(name, value);
        }
    }
    let mut ids = Ids::default();
    for context in [Context::Scope, Context::Marketplace, Context::Advertiser, Context::Entity, Context::Account] {
        ids.set(context, "7").unwrap();
    }
    let ours = HeaderValue::from_static("ours");
    let family = family(path);
    let out =
        to_amazon(&caller, UpstreamHeaders { family, bearer: &ours, client_id: &ours, ids: Some(&ids), fixed: &[] });
    let spelled = |name: &HeaderName| name.as_str().replace('_', "-");
    for managed in MANAGED {
        let values: Vec<_> = out.iter().filter(|(name, _)| spelled(name) == managed).collect();
        assert!(values.iter().all(|(name, value)| *value == ours && name.as_str() == managed), "{managed}: {out:?}");
        assert!(values.len() <= 1, "{managed}: {out:?}");
    }
    assert!(out.contains_key("authorization") && !out.contains_key("host"));
    let client_ids = ["amazon-ads-clientid", "amazon-advertising-api-clientid"].map(|name| out.contains_key(name));
    assert_eq!(client_ids.iter().filter(|there| **there).count(), 1);
    for name in out.keys() {
        let name = spelled(name);
        let stays = STAY.contains(&name.as_str())
            || ["proxy-", "sec-", "x-forwarded-", "x-ads-"].iter().any(|prefix| name.starts_with(prefix));
        assert!(!stays, "{name} left");
    }
    assert!(out.get_all("content-length").iter().count() <= caller.get_all("content-length").iter().count().min(1));
    // Of two that never go together at most one is ours.
    if let Some((one, other)) = family.exclusive {
        let added = |context| {
            let theirs = |headers: &HeaderMap| headers.keys().any(|name| context_of(name.as_str()) == Some(context));
            theirs(&out) && !theirs(&caller)
        };
        assert!(!(added(one) && added(other)), "{out:?}");
    }
    let mut back = caller;
    strip_response(&mut back);
    for name in ["connection", "transfer-encoding", "keep-alive", "te", "x-adsidecar-error", "x-adsidecar-hint"] {
        assert!(!back.contains_key(name), "{name} came back");
    }
}
