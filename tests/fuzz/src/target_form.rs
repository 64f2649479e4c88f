//! A request target: whatever it is, it leads to Amazon or to us, and its path leaves as it came.

use adsidecar::inbound::destination::{Destination, Target};
use http::Uri;

pub fn check(bytes: &[u8]) {
    let Ok(uri) = Uri::try_from(bytes) else { return };
    let Ok(target) = Target::read(&uri, |authority| authority == "localhost:8001") else { return };
    let leaves = target.path_and_query.as_str();
    assert!(leaves.starts_with('/') && leaves.len() <= 8 << 10, "{leaves}");
    assert!(leaves.bytes().all(|byte| byte > b' ' && byte != 0x7f), "{leaves:?}");
    match uri.authority().map(|authority| authority.as_str().to_ascii_lowercase()) {
        None => assert_eq!(target.of, Destination::Local),
        Some(ours) if ours == "localhost:8001" => assert_eq!(target.of, Destination::Local),
        Some(amazons) => {
            assert_ne!(target.of, Destination::Local);
            let host = amazons.trim_end_matches(":80").trim_end_matches(":443");
            assert!(host.contains(".amazon."), "{amazons}");
            assert!(host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte)), "{amazons}");
        }
    }
    match &target.account {
        None => assert_eq!(leaves, uri.path_and_query().map_or("/", |it| it.as_str())),
        Some(_) => assert!(uri.path().starts_with("/a/") && uri.to_string().ends_with(leaves.trim_start_matches('/'))),
    }
}
