//! Limits of the listener: time, connections, size.

use std::time::{Duration, Instant};

use world::{Fault, Listener, Rule};

use crate::harness::Harness;
use crate::raw_http::{Scripted, eventually};

const CALL: &str = "GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 24.
async fn a_slow_request_head_is_rejected() {
    let harness = Harness::set(&[("proxy.header_timeout", "150ms")]).await;
    for used in [false, true] {
        let mut wire = harness.dial().await;
        if used {
            wire.send(CALL).await;
            assert_eq!(wire.reply().await.status, 200);
        }
        let begun = Instant::now();
        wire.send("GET /x HTTP/1.1\r\nX-Slow: ").await;
        // Occasional bytes do not extend the limit.
        let answer = loop {
            match tokio::time::timeout(Duration::from_millis(20), wire.reply()).await {
                Ok(answer) => break answer,
                Err(_) => wire.send("x").await,
            }
        };
        let took = begun.elapsed();
        assert_eq!(answer.said(), (408, "request_timeout"));
        assert_eq!(answer.json()["code"], "request_timeout");
        assert_eq!(answer.header("connection"), Some("close"));
        assert!((Duration::from_millis(150)..Duration::from_secs(2)).contains(&took), "{took:?}");
        assert!(wire.closes().await);
    }
    assert_eq!(harness.ads_calls().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
    let harness = Harness::set(&[("proxy.idle_timeout", "150ms"), ("proxy.header_timeout", "50ms")]).await;
    let (mut fresh, mut used, mut busy) = (harness.dial().await, harness.dial().await, harness.dial().await);
    let gate = harness.sandbox.set_fault(Fault::Gate);
    busy.send(CALL).await;
    gate.reached(1).await;
    used.send(CALL).await;
    assert_eq!(used.reply().await.status, 200);
    let begun = Instant::now();
    assert!(fresh.closes().await && used.closes().await);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    gate.release();
    assert_eq!(busy.reply().await.status, 200);
    assert!(busy.closes().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_connection_limit_the_longest_idle_connection_is_closed() {
    let harness = Harness::set(&[("proxy.max_connections", "3")]).await;
    // The harness's own client holds a connection, which is the oldest.
    let mut wires = Vec::new();
    for _ in 0..3 {
        let mut wire = harness.dial().await;
        wire.send(CALL).await;
        assert_eq!(wire.reply().await.status, 200);
        wires.push(wire);
    }
    // All three are served: no connection is closed until its slot is needed.
    for wire in &mut wires {
        wire.send(CALL).await;
        assert_eq!(wire.reply().await.status, 200);
    }
    let mut newest = harness.dial().await;
    newest.send(CALL).await;
    assert_eq!(newest.reply().await.status, 200);
    assert!(wires[0].closes().await);
    for wire in wires[1..].iter_mut().chain([&mut newest]) {
        wire.send(CALL).await;
        assert_eq!(wire.reply().await.status, 200);
    }
    assert_eq!(harness.metric("adsidecar_connections{door=\"proxy\"}").await, 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_connection_limit_a_new_connection_waits_while_all_are_busy() {
    let harness = Harness::set(&[("proxy.max_connections", "2")]).await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).next(2));
    let mut one = harness.dial().await;
    one.send(CALL).await;
    gate.reached(1).await;
    let mut two = harness.dial().await;
    two.send(CALL).await;
    gate.reached(2).await;
    let mut three = harness.dial().await;
    three.send(CALL).await;
    gate.release();
    for wire in [&mut one, &mut two, &mut three] {
        assert_eq!(wire.reply().await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_over_the_limit_gets_a_503_and_later_ones_are_served() {
    let harness = Harness::set(&[("proxy.max_connections", "1")]).await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let mut busy = harness.dial().await;
    busy.send(CALL).await;
    gate.reached(1).await;
    for _ in 0..2 {
        let mut turned_away = harness.dial().await;
        turned_away.send(CALL).await;
        let reply = turned_away.reply().await;
        assert_eq!(reply.said(), (503, "overloaded"));
        assert_eq!(reply.header("retry-after"), Some("1"));
        assert_eq!(reply.json()["code"], "overloaded");
        assert!(turned_away.closes().await);
    }
    gate.release();
    assert_eq!(busy.reply().await.status, 200);
    let mut later = harness.dial().await;
    later.send(CALL).await;
    assert_eq!(later.reply().await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_rejected() {
    let harness = Harness::set(&[("proxy.max_body", "1KiB")]).await;
    let (fits, big) = ("x".repeat(1024), "x".repeat(1025));
    let plain = |body: &str, length: usize| {
        format!("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let chunked = |body: &str| {
        let half = body.len() / 2;
        let (one, two) = body.split_at(half);
        format!(
            "POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{half:x}\r\n{one}\r\n\
             {:x}\r\n{two}\r\n0\r\n\r\n",
            two.len()
        )
    };
    for body in ["", &big] {
        let mut wire = harness.dial().await;
        wire.send(plain(body, 1025)).await;
        assert_eq!(wire.reply().await.said(), (413, "body_too_large"));
        assert!(wire.closes().await);
    }
    assert!(harness.ads_calls().is_empty(), "a request with a too large Content-Length is not forwarded");
    let mut wire = harness.dial().await;
    wire.send(chunked(&big) + CALL).await;
    assert_eq!(wire.reply().await.said(), (413, "body_too_large"));
    assert!(wire.closes().await);
    let aborted = || !harness.ads_calls().is_empty() && harness.ads_calls().iter().all(|call| !call.complete);
    eventually("Amazon to see the request aborted", aborted).await;
    assert!(harness.ads_calls().iter().all(|call| call.method == "POST" && call.status.is_none()));
    harness.sandbox.clear_history();
    for call in [plain(&fits, 1024), chunked(&fits)] {
        assert_eq!(harness.send_raw(call).await.status, 200);
        assert_eq!(harness.seen().body_len, 1024);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_upload_gets_the_error_response() {
    let harness = Harness::set(&[("proxy.max_body", "1KiB")]).await;
    for _ in 0..20 {
        let upload = harness.request(reqwest::Method::POST, "/sandbox/echo").body(vec![b'x'; 4 << 20]);
        let answer = upload.send().await.expect("a response, not a reset connection");
        assert_eq!((answer.status().as_u16(), crate::harness::code(&answer)), (413, "body_too_large"));
        assert_eq!(crate::harness::json(answer).await["code"], "body_too_large");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 70.
async fn a_caller_that_does_not_read_its_response_is_disconnected_from_amazon_too() {
    const MIB: u64 = 1 << 20;
    let harness = Harness::set(&[("proxy.write_timeout", "200ms")]).await;
    let mut wire = harness.dial().await;
    wire.send(format!("GET /sandbox/bytes/{} HTTP/1.1\r\nHost: localhost\r\n\r\n", 256 * MIB)).await;
    assert_eq!(wire.reply_head().await.status, 200);
    // Until then, backpressure reached Amazon: data beyond the sockets' buffers was not read.
    crate::harness::eventually("the response to be aborted", async || {
        (harness.metric("adsidecar_requests_in_flight").await == 0.0).then_some(())
    })
    .await;
    let came = wire.take(256 * MIB as usize).await.len() as u64;
    assert!(came < 64 * MIB, "{came} bytes arrived of a response that was not read");
    // A slow reader that keeps reading gets the whole response.
    let mut patient = harness.dial().await;
    patient.send(format!("GET /sandbox/bytes/{} HTTP/1.1\r\nHost: localhost\r\n\r\n", 8 * MIB)).await;
    assert_eq!(patient.reply_head().await.status, 200);
    let mut read = 0;
    while read < 8 * MIB as usize {
        read += patient.take(MIB as usize).await.len();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 24.
async fn a_stalled_body_is_aborted_and_never_a_complete_request() {
    let harness = Harness::set(&[("proxy.body_timeout", "150ms")]).await;
    for framing in ["Content-Length: 100", "Transfer-Encoding: chunked"] {
        harness.sandbox.clear_history();
        let mut wire = harness.dial().await;
        let begun = Instant::now();
        wire.send(format!("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n5\r\nabcde\r\n")).await;
        assert_eq!(wire.reply().await.said(), (408, "request_timeout"), "{framing}");
        assert!(wire.closes().await);
        assert!(
            (Duration::from_millis(150)..Duration::from_secs(5)).contains(&begun.elapsed()),
            "{:?}",
            begun.elapsed()
        );
        eventually("Amazon to see the end", || {
            harness.ads_calls().iter().all(|call| call.status.is_none() && !call.complete)
        })
        .await;
        assert_eq!(harness.ads_calls().len(), 1, "the request is not retried");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 64.
async fn the_response_head_has_a_limit() {
    let head = |bytes: usize| {
        let big = "x".repeat(bytes);
        format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Big: {big}\r\n\r\n").leak()
    };
    // The read buffer is the limit, and the last read may exceed it: up to twice its 64 KiB may pass.
    for (bytes, said) in [(40 << 10, (200, "")), (200 << 10, (502, "upstream_reset"))] {
        let amazon = Scripted::saying(head(bytes)).await;
        let harness = Harness::before(&amazon, &[]).await;
        assert_eq!(harness.send_raw("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await.said(), said, "{bytes}");
    }
}
