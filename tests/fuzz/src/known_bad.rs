//! Fails on a target that no seed holds: shows that a run of these targets finds what there is to find.

use adsidecar::inbound::destination::Target;
use http::Uri;

pub fn check(bytes: &[u8]) {
    let Ok(uri) = Uri::try_from(bytes) else { return };
    let target = Target::read(&uri, |_| false);
    assert!(target.is_ok_and(|target| target.account.is_none()) || !bytes.starts_with(b"/a/b"), "an account");
}
