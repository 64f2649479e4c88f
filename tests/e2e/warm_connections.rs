//! Where an app has called lately, a connection to Amazon is open before the next call.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::connections::{END_HEADERS, END_STREAM, serve_http2};
use crate::harness::{Harness, eventually};
use crate::http2::{HEADERS, OK, SETTINGS, frame};
use crate::raw_http::{Scripted, Wire};

/// A server that closes each connection this long after it was opened, used or not.
async fn closing_after(limit: Duration, protocol: &'static str, requests: Arc<AtomicUsize>) -> Scripted {
    Scripted::speaking(&[protocol], move |mut wire: Wire, _| {
        let requests = requests.clone();
        let serve = async move {
            if wire.is_http2() {
                let answer = |stream| {
                    requests.fetch_add(1, Ordering::SeqCst);
                    Some(frame(HEADERS, END_STREAM | END_HEADERS, stream, &[OK]))
                };
                serve_http2(&mut wire, frame(SETTINGS, 0, 0, &[]), answer).await;
            } else {
                while wire.head().await.is_some() {
                    requests.fetch_add(1, Ordering::SeqCst);
                    wire.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
                }
            }
        };
        async move { drop(tokio::time::timeout(limit, serve).await) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_given_up_is_replaced_again_and_again_while_its_region_is_in_use() {
    for protocol in ["h2", "http/1.1"] {
        let requests = Arc::<AtomicUsize>::default();
        let amazon = closing_after(Duration::from_millis(1500), protocol, requests.clone()).await;
        let harness = Harness::before(&amazon, &[]).await;
        assert_eq!(harness.get("/x").await.status(), 200);
        let seen = amazon.connections();
        // The connection that was used, two that are never used, and from then on each before the server closes it.
        for further in 1..=4 {
            let what = format!("{protocol}: connection {further} without a call");
            eventually(&what, async || (amazon.connections() >= seen + further).then_some(())).await;
        }
        assert_eq!(requests.load(Ordering::SeqCst), 1, "{protocol}");
    }
}
