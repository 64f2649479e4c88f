//! What passes, byte for byte.

use crate::rig::Rig;

#[tokio::test(flavor = "multi_thread")]
async fn raw_targets_reach_amazon_unchanged() {
    let rig = Rig::start().await;
    rig.log_in("default").await;
    for target in ["//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/sandbox/echo?a=%20", "/sandbox/echo?"] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let answer = rig.raw(request.as_bytes(), None).await;
        assert!(answer.starts_with(b"HTTP/1.1 "), "{}", String::from_utf8_lossy(&answer));
        assert_eq!(rig.sandbox.last().unwrap().target, target);
    }
}
