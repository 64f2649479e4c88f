//! Faults on the connection to Amazon, and errors that Amazon itself reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use tokio::net::TcpListener;
use world::{Fault, Listener, Rule};

use crate::harness::{Harness, code, eventually, unused_address};
use crate::raw_http::{Scripted, Wire};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

async fn said(harness: &Harness, method: Method, path: &str, body: &'static str) -> (u16, String) {
    let answer = harness.request(method, path).body(body).send().await.unwrap();
    (answer.status().as_u16(), code(&answer).to_owned())
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 57.
async fn an_unreachable_host_is_reported() {
    let origin = format!("https://{}", unused_address());
    let harness = Harness::set(&[("upstream.na", &origin)]).await;
    for method in [Method::GET, Method::POST] {
        assert_eq!(said(&harness, method, "/x", "b").await, (502, "upstream_unreachable".into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untrusted_certificate_is_rejected() {
    let amazon = Scripted::saying(OK).await;
    // Its authority is not trusted.
    let harness = Harness::set(&[("upstream.na", &amazon.origin)]).await;
    assert_eq!(said(&harness, Method::GET, "/x", "").await, (502, "upstream_tls".into()));
    // The right authority, but another name.
    let other_name = amazon.origin.replace("127.0.0.1", "localhost");
    let ca = amazon.ca_file();
    let harness = Harness::set(&[("upstream.na", &other_name), ("upstream.ca_file", ca.to_str().unwrap())]).await;
    assert_eq!(said(&harness, Method::GET, "/x", "").await, (502, "upstream_tls".into()));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 61.
async fn an_unresponsive_host_times_out_and_is_not_retried() {
    let harness = Harness::set(&[("upstream.response_timeout", "100ms")]).await;
    for method in [Method::GET, Method::POST] {
        harness.sandbox.clear_history();
        harness.sandbox.set_fault(Fault::Hang);
        assert_eq!(said(&harness, method, "/sandbox/echo", "b").await, (504, "upstream_timeout".into()));
        assert_eq!(harness.ads_calls().len(), 1, "it is not retried: it may have been processed");
    }
    // A port that accepts connections but never completes a handshake.
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("https://{}", mute.local_addr().unwrap());
    let harness = Harness::set(&[("upstream.na", &origin), ("upstream.connect_timeout", "100ms")]).await;
    assert_eq!(said(&harness, Method::GET, "/x", "").await, (504, "upstream_timeout".into()));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 59.
async fn a_reset_request_is_retried_only_if_safe() {
    let harness = Harness::set(&[]).await;
    // On a new connection, no idle close can be the reason: no retry, whatever the method.
    harness.sandbox.set_fault(Fault::Reset);
    assert_eq!(said(&harness, Method::GET, "/sandbox/echo", "").await, (502, "upstream_reset".into()));
    assert_eq!(harness.ads_calls().len(), 1);
    for (method, status, times) in [
        (Method::POST, 502, 1),
        (Method::PATCH, 502, 1),
        (Method::GET, 200, 2),
        (Method::PUT, 200, 2),
        (Method::DELETE, 200, 2),
    ] {
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        harness.sandbox.clear_history();
        harness.sandbox.set_fault(Rule::from(Fault::Reset).on("/sandbox/echo"));
        let (got, code) = said(&harness, method.clone(), "/sandbox/echo", "").await;
        assert_eq!((got, code.is_empty()), (status, status == 200), "{method}");
        let calls = harness.ads_calls();
        assert_eq!(calls.len(), times, "{method}");
        if let [first, second] = &calls[..] {
            assert_ne!(first.connection, second.connection, "{method}");
        }
    }
    // And at most once.
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    harness.sandbox.clear_history();
    harness.sandbox.set_fault(Rule::from(Fault::Reset).always());
    assert_eq!(said(&harness, Method::GET, "/sandbox/echo", "").await, (502, "upstream_reset".into()));
    assert_eq!(harness.ads_calls().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 58.
async fn a_pooled_connection_closed_by_the_server_fails_no_request() {
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    // Each connection is closed right after its first response, which does not announce it.
    let amazon = Scripted::start(move |mut wire: Wire, _| {
        let count = count.clone();
        async move {
            if wire.head().await.is_some() {
                count.fetch_add(1, Ordering::SeqCst);
                wire.send(OK).await;
            }
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    for _ in 0..30 {
        assert_eq!(harness.get("/x").await.status(), 200);
    }
    assert_eq!(requests.load(Ordering::SeqCst), 30, "no request arrived twice");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 34.
async fn a_response_that_is_not_http_is_an_error() {
    for answer in [
        "",
        "SSH-2.0-x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ] {
        let amazon = Scripted::start(move |mut wire: Wire, _| async move {
            wire.head().await;
            wire.send(answer).await;
        })
        .await;
        let harness = Harness::before(&amazon, &[]).await;
        assert_eq!(
            harness.send_raw("POST /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await.said(),
            (502, "upstream_reset"),
            "{answer:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absurd_idle_limit_in_a_response_fails_no_request() {
    for limit in ["18446744073709551615", "99999999999999999999", "-1", "0", ""] {
        let answer: &'static str =
            format!("HTTP/1.1 200 OK\r\nKeep-Alive: timeout={limit}, max=5\r\nContent-Length: 2\r\n\r\nok").leak();
        let amazon = Scripted::saying(answer).await;
        let harness = Harness::before(&amazon, &[]).await;
        for method in [Method::GET, Method::POST, Method::GET] {
            assert_eq!(said(&harness, method, "/x", "").await, (200, String::new()), "{limit}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 63.
async fn informational_and_unusual_responses_yield_the_final_one() {
    for (answer, body) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n", "abcde"),
        ("HTTP/1.1 200 OK\r\n\r\nuntil the end", "until the end"),
        ("HTTP/1.0 200 OK\r\n\r\nold", "old"),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok"),
        ("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok"),
    ] {
        let amazon = Scripted::start(move |mut wire: Wire, _| async move {
            wire.head().await;
            wire.send(answer).await;
            wire.end().await;
        })
        .await;
        let harness = Harness::before(&amazon, &[]).await;
        let reply = harness.send_raw("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!((reply.status, reply.text().as_str(), reply.whole), (200, body, true), "{answer:?} {reply:?}");
        assert_eq!(reply.header("connection"), None);
    }
    // Without a close_notify, the end of the response is not certain.
    let amazon = Scripted::start(|mut wire: Wire, _| async move {
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\n\r\ncut somewhere").await;
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let came = harness.raw(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n", None).await;
    assert!(!came.ends_with(b"\r\n0\r\n\r\n"), "{}", String::from_utf8_lossy(&came));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 55.
async fn a_403_from_amazon_passes_and_refreshes_nothing() {
    passes_as_it_is(&[(403, None), (400, None), (500, None), (503, Some("1"))]).await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 56.
async fn a_429_from_amazon_passes_with_its_headers_and_is_not_retried() {
    passes_as_it_is(&[(429, Some("7")), (429, None)]).await;
}

/// Responses of Amazon's with these statuses and this `Retry-After` reach the caller after one call and without a token
/// call.
async fn passes_as_it_is(refusals: &[(u16, Option<&str>)]) {
    let harness = Harness::set(&[]).await;
    for &(status, retry_after) in refusals {
        harness.sandbox.clear_history();
        let headers =
            [("content-type", "text/html")].into_iter().chain(retry_after.map(|after| ("retry-after", after)));
        harness.sandbox.set_fault(Fault::Status {
            code: status,
            headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            body: "<p>no".into(),
        });
        let answer = harness.send_raw("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!((answer.said(), answer.text().as_str()), ((status, ""), "<p>no"));
        assert_eq!((answer.header("retry-after"), answer.header("content-type")), (retry_after, Some("text/html")));
        assert_eq!((harness.ads_calls().len(), harness.sandbox.calls(Listener::Lwa).len()), (1, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_amazon_that_idles_for_upstream_idle_timeout_is_closed() {
    const IDLE: Duration = Duration::from_millis(200);
    let (closed, mut closes) = tokio::sync::mpsc::unbounded_channel();
    let amazon = Scripted::start(move |mut wire: Wire, number| {
        let closed = closed.clone();
        async move {
            while wire.head().await.is_some() {
                wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            }
            let _ = closed.send(number);
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[("upstream.idle_timeout", "200ms")]).await;
    let begun = Instant::now();
    assert_eq!(harness.get("/x").await.status(), 200);
    let end = tokio::time::timeout(Duration::from_secs(5), async { while closes.recv().await != Some(1) {} }).await;
    end.expect("adsidecar closes it");
    assert!(begun.elapsed() >= IDLE, "and not before: {:?}", begun.elapsed());
    eventually("it is replaced", async || (amazon.connections() >= 2).then_some(())).await;
    assert_eq!(harness.get("/x").await.status(), 200);
}
