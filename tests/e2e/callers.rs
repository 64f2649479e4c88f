//! How adsidecar treats its callers' connections: hang-ups, refusals, keep-alive, request ids, and a shutdown beside
//! event streams.

use std::time::{Duration, Instant};

use world::{Fault, Listener, Rule};

use crate::harness::{Harness, eventually};
use crate::raw_http::{Reply, Wire};

const CALL: &str = "GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_hang_up_is_noticed_behind_a_stray_line_break() {
    let harness = Harness::set(&[]).await;
    for bytes in [
        "POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody\r\n",
        "POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n\
         \r\n",
        "POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody",
    ] {
        let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
        let mut wire = harness.dial().await;
        wire.send(bytes).await;
        gate.reached(1).await;
        assert_eq!(harness.metric("adsidecar_requests_in_flight").await, 1.0);
        drop(wire);
        eventually("the request to be given up", async || {
            (harness.metric("adsidecar_requests_in_flight").await == 0.0).then_some(())
        })
        .await;
        gate.release();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stray_line_break_behind_a_body_is_no_request() {
    let harness = Harness::set(&[("proxy.header_timeout", "50ms")]).await;
    let mut wire = harness.dial().await;
    for _ in 0..3 {
        wire.send("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody\r\n").await;
        assert_eq!(wire.reply().await.status, 200);
        wire.send("\r\n").await;
        tokio::time::sleep(Duration::from_millis(120)).await;
    }
    wire.send(CALL).await;
    assert_eq!(wire.reply().await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_behind_one_another_are_all_answered_in_order() {
    let harness = Harness::set(&[]).await;
    let mut wire = harness.dial().await;
    let calls: String = (200..240)
        .map(|status| {
            format!("GET /sandbox/status/{status} HTTP/1.1\r\nHost: localhost\r\nX-Pad: {status:2000}\r\n\r\n")
        })
        .collect();
    wire.send(calls).await;
    for status in 200..240 {
        if matches!(status, 204 | 205) {
            assert_eq!(wire.reply_head().await.status, status);
        } else {
            assert_eq!(wire.reply().await.status, status);
        }
    }
}

/// Whether the caller may use the connection again, and can.
async fn usable(wire: &mut Wire, reply: &Reply) -> bool {
    if reply.header("connection") == Some("close") {
        return true;
    }
    wire.send(CALL).await;
    wire.until("HTTP/1.1 200").await.is_some()
}

#[tokio::test(flavor = "multi_thread")]
// Python's http.client sends head and body in two steps.
async fn a_refusal_before_the_body_leaves_a_usable_connection_or_announces_its_end() {
    let harness = Harness::set(&[]).await;
    let head = |framing: &str| format!("POST /a/unknown/x HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n");
    for (framing, body, kept) in [
        ("Content-Length: 4", "body".to_owned(), Some(true)),
        ("Content-Length: 60000", "x".repeat(60_000), Some(true)),
        ("Content-Length: 4000000", "x".repeat(4_000_000), Some(false)),
        ("Transfer-Encoding: chunked", "4\r\nbody\r\n0\r\n\r\n".to_owned(), None),
        ("Expect: 100-continue\r\nContent-Length: 4", "body".to_owned(), Some(false)),
    ] {
        for pause in [0, 0, 0, 1, 5, 30] {
            let mut wire = harness.dial().await;
            wire.send(head(framing)).await;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            wire.send(&body).await;
            let reply = wire.reply().await;
            assert_eq!(reply.said(), (404, "unknown_account"), "{framing}");
            let closes = reply.header("connection") == Some("close");
            assert!(kept.is_none_or(|kept| kept != closes), "{framing}: {reply:?}");
            assert!(usable(&mut wire, &reply).await, "{framing}, {pause} ms: {reply:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_what_is_no_request_has_a_request_id() {
    let harness = Harness::set(&[("proxy.header_timeout", "100ms")]).await;
    let mut ids = Vec::new();
    let many = format!("GET /x HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X: y\r\n".repeat(101));
    for (bytes, status) in [
        ("GET /x y z\r\n\r\n", 400),
        ("GET /x HTTP/1.1\r\nX y: z\r\n\r\n", 400),
        (many.as_str(), 431),
        ("GET /x HTTP/1.1\r\nHo", 408),
    ] {
        for used in [false, true] {
            let mut wire = harness.dial().await;
            if used {
                wire.send(CALL).await;
                let reply = wire.reply().await;
                assert_eq!(reply.headers.iter().filter(|(name, _)| name == "x-request-id").count(), 1);
            }
            wire.send(bytes).await;
            let reply = wire.reply().await;
            assert_eq!(reply.status, status, "{bytes}");
            ids.push(reply.header("x-request-id").expect("an id").to_owned());
            assert!(reply.whole && wire.closes().await, "{bytes}");
        }
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 8, "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_says_how_long_the_connection_stays_open() {
    let harness = Harness::set(&[("proxy.idle_timeout", "75s")]).await;
    for (connection, said) in [
        ("", Some("timeout=75")),
        ("Connection: keep-alive\r\n", Some("timeout=75")),
        ("Connection: close\r\n", None),
        ("Connection: X-Any, Close\r\n", None),
    ] {
        for path in ["/sandbox/echo", "/api/auth/amazon/status", "/a/unknown/x"] {
            let reply = harness.send_raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{connection}\r\n")).await;
            assert_eq!(reply.header("keep-alive"), said, "{path} {connection}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_event_stream_does_not_hold_up_a_shutdown() {
    let mut harness = Harness::set(&[("shutdown.drain", "20s")]).await;
    let mut events = harness.dial().await;
    let call = "GET /sandbox/events?count=9&step=1 HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n";
    events.send(call).await;
    assert_eq!(events.reply_head().await.status, 200);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let mut other = harness.dial().await;
    other.send(CALL).await;
    gate.reached(1).await;
    let begun = Instant::now();
    let ended = harness.begin_stop();
    // While anything else is in flight, the event stream goes on.
    harness.sandbox.release_events(1);
    assert!(events.until("\"number\":1}").await.is_some());
    gate.release();
    assert_eq!(other.reply().await.status, 200);
    ended.await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let rest = events.everything().await;
    assert!(!rest.contains("0\r\n\r\n"), "the stream was broken off, so it must not look complete: {rest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_target_is_the_root() {
    let harness = Harness::set(&[]).await;
    let said = async |target: &str| {
        let reply = harness.send_raw(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        (reply.status, reply.said().1.to_owned())
    };
    for authority in ["http://advertising-api.amazon.com", "http://localhost"] {
        for query in ["", "?x=1", "?"] {
            let (empty, root) =
                (said(&format!("{authority}{query}")).await, said(&format!("{authority}/{query}")).await);
            assert_eq!(empty, root, "{authority}{query}");
        }
    }
}
