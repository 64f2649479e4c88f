//! HTTP/2 to Amazon, if Amazon offers it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use adsidecar::domain::clock::Clock;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use world::{Fault, Options, Rule, pseudo_random_bytes};

use crate::harness::{Harness, eventually, json};
use crate::raw_http::{Scripted, Wire};

async fn harness(http2: &str) -> Harness {
    harness_with(http2, &[]).await
}

/// A sidecar in front of a sandbox that offers HTTP/2.
pub(crate) async fn harness_with(http2: &str, sets: &[(&str, &str)]) -> Harness {
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let options = Options { http2: true, ..Options::calm(clock) };
    let harness = Harness::built(options, "", &[&[("upstream.http2", http2)], sets].concat()).await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    harness
}

/// The connections of the calls that Amazon received.
fn connections(harness: &Harness) -> Vec<u64> {
    let mut connections: Vec<_> = harness.ads_calls().iter().map(|call| call.connection).collect();
    connections.sort_unstable();
    connections.dedup();
    connections
}

/// Sends `count` calls that Amazon holds at the same time.
async fn at_once(harness: &Harness, count: usize) {
    at_once_with(harness, count, reqwest::Method::POST).await;
}

async fn at_once_with(harness: &Harness, count: usize, method: reqwest::Method) {
    let call = |number: usize| harness.request(method.clone(), "/sandbox/echo").body(number.to_string());
    held_together(harness, (0..count).map(call).collect()).await;
}

/// Makes calls that Amazon holds until all have arrived, and returns the lengths of their responses.
async fn held_together(harness: &Harness, requests: Vec<reqwest::RequestBuilder>) -> Vec<usize> {
    let count = requests.len();
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).next(count as u32));
    let mut calls = JoinSet::new();
    for request in requests {
        calls.spawn(async {
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), 200);
            answer.bytes().await.unwrap().len()
        });
    }
    gate.reached(count).await;
    gate.release();
    calls.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 24.
async fn requests_that_fill_a_shared_connection_delay_no_other_caller() {
    let harness = harness("auto").await;
    // This server accepts two hundred streams per connection; further ones would wait.
    at_once(&harness, 450).await;
    let connections = connections(&harness).len();
    assert!((3..=10).contains(&connections), "{connections}");
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_never_uses_http1_only() {
    let harness = harness("never").await;
    harness.get("/v2/profiles").await.bytes().await.unwrap();
    at_once_with(&harness, 5, reqwest::Method::PUT).await;
    assert_eq!(connections(&harness).len(), 5, "HTTP/1.1 carries one request at a time");
    assert!(harness.seen().header("host").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_always_falls_back_to_http1() {
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let harness = Harness::built(Options::calm(clock), "", &[("upstream.http2", "always")]).await;
    harness.log_in("default").await;
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), crate::harness::code(&answer)), (502, "upstream_tls"));
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_requests_share_one_http2_connection() {
    for mode in ["auto", "always"] {
        let harness = harness(mode).await;
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        at_once(&harness, 50).await;
        assert_eq!(connections(&harness).len(), 1, "{mode}");
        assert_eq!(harness.ads_calls().len(), 51);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_continuous_callers_get_http1_connections() {
    for (mode, callers, most) in [("auto", 1, 2), ("auto", 3, 4), ("always", 3, 1)] {
        let harness = harness(mode).await;
        let round = async || {
            at_once_with(&harness, callers, reqwest::Method::PUT).await;
            connections(&harness).len()
        };
        for _ in 0..100 {
            round().await;
        }
        eventually("one connection for each caller, and the shared one", async || {
            (round().await == most).then_some(())
        })
        .await;
        // Few callers open no further connections, and many callers share the existing one.
        for _ in 0..100 {
            round().await;
        }
        at_once(&harness, 50).await;
        assert_eq!(connections(&harness).len(), most, "{mode}, {callers}");
        // Nor do requests that may not be repeated leave the shared connection, where the server says what it refused.
        harness.sandbox.clear_history();
        for _ in 0..70 {
            at_once(&harness, 1).await;
        }
        assert_eq!(connections(&harness).len(), 1, "{mode}, {callers}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_gets_http1_connections_while_its_responses_are_long_and_they_are_closed_after_it() {
    const CALLERS: usize = 30;
    for (length, most) in [(1000, 1), (80 << 10, CALLERS + 1)] {
        let harness = harness("auto").await;
        let path = format!("/sandbox/bytes/{length}");
        let round = async || {
            let requests = (0..CALLERS).map(|_| harness.request(reqwest::Method::GET, &path)).collect();
            assert_eq!(held_together(&harness, requests).await, [length; CALLERS]);
            connections(&harness).len()
        };
        for _ in 0..5 {
            round().await;
        }
        eventually("the connections that it should have", async || (round().await == most).then_some(())).await;
        for _ in 0..5 {
            assert_eq!(round().await, most, "a steady crowd opens no more");
        }
        eventually("none of a crowd with connections of its own uses the shared one", async || {
            harness.sandbox.clear_history();
            (round().await == most.min(CALLERS)).then_some(())
        })
        .await;
        // The shared connection stays, and as many others as a few short requests would use.
        let few = most.min(13);
        eventually("the others are closed", async || (open_connections(&harness) <= few).then_some(())).await;
        assert_eq!(open_connections(&harness), few);
    }
}

/// How many connections to Amazon are open, as the kernel says.
fn open_connections(harness: &Harness) -> usize {
    let port = format!(":{:04X}", harness.sandbox.addresses().na.port());
    // The fields are: number, local and remote address, state (1: established).
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&port) && row[3] == "01").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_may_not_be_repeated_open_no_connections_that_they_would_not_use() {
    let harness = harness("auto").await;
    for _ in 0..300 {
        assert_eq!(harness.post("/sandbox/echo").await.status(), 200);
    }
    // It would take an HTTP/1.1 connection before the shared one.
    at_once_with(&harness, 1, reqwest::Method::PUT).await;
    assert_eq!(connections(&harness).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_pass_over_http2_as_over_http1() {
    let harness = harness("auto").await;
    for target in ["//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/sandbox/echo?", "/amc/%7Bid%7D/a|b?c|d", "/x/../y"] {
        let call = format!(
            "GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, x-a\r\nX-A: 1\r\nTE: trailers\r\n\r\n"
        );
        assert_eq!(harness.send_raw(call).await.header("x-adsidecar-error"), None);
        assert_eq!(harness.seen().target, target);
        let seen = harness.seen();
        let mut names = seen.header_names();
        names.sort_unstable();
        assert!(
            names.iter().all(|name| ["amazon-advertising-api-clientid", "authorization", "host"].contains(name)),
            "{names:?}"
        );
    }
    let bytes = pseudo_random_bytes(4 << 20);
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let upload = harness.request(reqwest::Method::POST, "/sandbox/echo").body(bytes.clone()).send().await.unwrap();
    assert_eq!(json(upload).await["body_sha256"], digest);
    for query in ["", "?chunked=1"] {
        let download = harness.get(&format!("/sandbox/bytes/{}{query}", bytes.len())).await;
        assert!(download.bytes().await.unwrap() == bytes);
    }
    let mut wire = harness.dial().await;
    wire.send("HEAD /sandbox/bytes/1000 HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(wire.reply_head().await.header("content-length"), Some("1000"));
    let head = "POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    wire.send(&format!("{head}3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n")).await;
    assert_eq!((wire.reply().await.status, harness.seen().text().as_str()), (200, "abc"));
    assert_eq!(connections(&harness).len(), 1);
}

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;
/// `:status: 200` in HPACK.
pub(crate) const OK: u8 = 0x88;

/// One HTTP/2 frame (RFC 9113, section 4.1).
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Reads the preface, sends the settings, and reads up to the end of the first request's head: false where none comes.
async fn h2_request(wire: &mut Wire) -> bool {
    wire.take(24).await;
    wire.send(frame(SETTINGS, 0, 0, &[])).await;
    loop {
        let head = wire.take(9).await;
        let [_, high, low, kind, ..] = head[..] else { return false };
        wire.take(usize::from(high) << 8 | usize::from(low)).await;
        if kind == HEADERS {
            return true;
        }
    }
}

/// An HTTP/2 server whose first `bad` connections answer the first request with `fault`, and whose later ones answer
/// their first request with 200.
async fn faulty(fault: Vec<u8>, bad: usize) -> Scripted {
    Scripted::speaking(&["h2", "http/1.1"], move |mut wire: Wire, number| {
        let fault = fault.clone();
        async move {
            if !wire.is_http2() {
                while wire.head().await.is_some() {
                    wire.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
                }
            } else if h2_request(&mut wire).await {
                let answer = if number > bad { frame(HEADERS, 5, 1, &[OK]) } else { fault };
                wire.send(answer).await;
                while !wire.take(1).await.is_empty() {}
            }
        }
    })
    .await
}

/// A `GOAWAY` that says that no stream above `last` was processed.
fn goaway(last: u8, reason: u8) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[0, 0, 0, last, 0, 0, 0, reason])
}

fn reset(reason: u8) -> Vec<u8> {
    frame(RST_STREAM, 0, 1, &[0, 0, 0, reason])
}

const NO_ERROR: u8 = 0;
const INTERNAL_ERROR: u8 = 2;
const REFUSED_STREAM: u8 = 7;
const CANCEL: u8 = 8;
const HTTP_1_1_REQUIRED: u8 = 13;

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 3.
// Covers: situation 4.
// Covers: situation 35.
async fn a_request_that_the_http2_server_did_not_process_is_sent_again_whatever_its_method() {
    for (name, fault) in [
        ("GOAWAY below the stream", goaway(0, NO_ERROR)),
        ("GOAWAY with an error, below the stream", goaway(0, INTERNAL_ERROR)),
        ("REFUSED_STREAM", reset(REFUSED_STREAM)),
        ("HTTP_1_1_REQUIRED", reset(HTTP_1_1_REQUIRED)),
    ] {
        for method in [reqwest::Method::GET, reqwest::Method::POST, reqwest::Method::PATCH] {
            for body in ["", "body"] {
                let amazon = faulty(fault.clone(), 1).await;
                let harness = Harness::before(&amazon, &[]).await;
                let answer = harness.request(method.clone(), "/x").body(body).send().await.unwrap();
                assert_eq!(answer.status(), 200, "{name}, {method} {body:?}");
                assert_eq!(amazon.connections(), 2, "{name}, {method} {body:?}: once more, on another connection");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_http2_connections_keep_refusing_is_sent_three_times_at_most() {
    for (fault, bad, status) in [(goaway(0, NO_ERROR), 2, 200), (goaway(0, NO_ERROR), 9, 502)] {
        let amazon = faulty(fault, bad).await;
        let harness = Harness::before(&amazon, &[]).await;
        assert_eq!(harness.post("/x").await.status(), status);
        assert_eq!(amazon.connections(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_an_http2_server_may_have_processed_is_sent_again_only_if_it_is_idempotent() {
    for (name, fault) in [
        ("INTERNAL_ERROR", reset(INTERNAL_ERROR)),
        ("CANCEL", reset(CANCEL)),
        ("NO_ERROR", reset(NO_ERROR)),
        ("GOAWAY that includes the stream, then reset", [goaway(1, NO_ERROR), reset(INTERNAL_ERROR)].concat()),
    ] {
        for (method, status, times) in
            [(reqwest::Method::POST, 502, 1), (reqwest::Method::PATCH, 502, 1), (reqwest::Method::GET, 200, 2)]
        {
            let amazon = faulty(fault.clone(), 1).await;
            let harness = Harness::before(&amazon, &[]).await;
            let answer = harness.request(method.clone(), "/x").send().await.unwrap();
            assert_eq!((answer.status().as_u16(), amazon.connections()), (status, times), "{name}, {method}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_connection_that_closes_before_the_answer_costs_only_requests_that_are_not_idempotent() {
    for (method, status, times) in [(reqwest::Method::POST, 502, 1), (reqwest::Method::GET, 200, 2)] {
        // A graceful GOAWAY that includes the request, but then no answer.
        let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, number| async move {
            if h2_request(&mut wire).await {
                let answer = if number > 1 { frame(HEADERS, 5, 1, &[OK]) } else { goaway(1, NO_ERROR) };
                wire.send(answer).await;
                if number > 1 {
                    while !wire.take(1).await.is_empty() {}
                }
            }
        })
        .await;
        let harness = Harness::before(&amazon, &[]).await;
        let answer = harness.request(method.clone(), "/x").send().await.unwrap();
        assert_eq!((answer.status().as_u16(), amazon.connections()), (status, times), "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_body_larger_than_the_replay_buffer_is_not_sent_again() {
    for (length, status, times) in [(1000, 200, 2), (1001, 502, 1)] {
        let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, number| async move {
            if h2_request(&mut wire).await {
                // The whole body, whose last frame is DATA with END_STREAM.
                while let [_, high, low, kind, flags, ..] = wire.take(9).await[..] {
                    wire.take(usize::from(high) << 8 | usize::from(low)).await;
                    if kind == DATA && flags & 1 == 1 {
                        break;
                    }
                }
                wire.send(if number > 1 { frame(HEADERS, 5, 1, &[OK]) } else { reset(REFUSED_STREAM) }).await;
                while !wire.take(1).await.is_empty() {}
            }
        })
        .await;
        let harness = Harness::before(&amazon, &[("proxy.replay_limit", "1000B")]).await;
        let upload = harness.request(reqwest::Method::POST, "/x").body("x".repeat(length)).send().await.unwrap();
        assert_eq!((upload.status().as_u16(), amazon.connections()), (status, times), "{length} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_http2_response_stays_whole_if_the_server_then_resets_the_upload() {
    let amazon = Scripted::speaking(&["h2"], |mut wire: Wire, _| async move {
        if h2_request(&mut wire).await {
            let answer = [frame(HEADERS, 4, 1, &[OK]), frame(DATA, 1, 1, b"whole"), reset(NO_ERROR)].concat();
            wire.send(answer).await;
            while !wire.take(1).await.is_empty() {}
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let mut wire = harness.dial().await;
    wire.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf").await;
    let reply = wire.reply().await;
    assert_eq!((reply.status, reply.text().as_str(), reply.whole), (200, "whole", true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_http2_response_never_ends_cleanly() {
    // Without a length, and with one: `content-length: 10` (HPACK, literal, name 28 of the static table).
    for length in [&[][..], &[0x0f, 0x0d, 2, b'1', b'0']] {
        for end in [
            reset(INTERNAL_ERROR),
            reset(NO_ERROR),
            goaway(1, INTERNAL_ERROR),
            goaway(1, NO_ERROR),
            goaway(0, NO_ERROR),
            Vec::new(),
        ] {
            let what = format!("length {length:?}, end {end:?}");
            let passed = Arc::new(Notify::new());
            let seen = passed.clone();
            let answer = [frame(HEADERS, 4, 1, &[&[OK], length].concat()), frame(DATA, 0, 1, b"part")].concat();
            let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, _| {
                let (answer, end, seen) = (answer.clone(), end.clone(), seen.clone());
                async move {
                    if h2_request(&mut wire).await {
                        wire.send(&answer).await;
                        // The caller has what came so far; only then does it break off.
                        seen.notified().await;
                        wire.send(&end).await;
                        wire.end().await;
                    }
                }
            })
            .await;
            let harness = Harness::before(&amazon, &[]).await;
            let mut wire = harness.dial().await;
            wire.send("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
            let head = wire.reply_head().await;
            assert_eq!(head.said(), (200, ""), "{what}");
            let chunked = head.header("transfer-encoding").is_some();
            assert_eq!(chunked, length.is_empty(), "{what}: {head:?}");
            let part = if chunked { "4\r\npart\r\n" } else { "part" };
            assert_eq!(wire.take(part.len()).await, part.as_bytes(), "what came passes, {what}");
            passed.notify_one();
            assert_eq!(wire.everything().await, "", "and then it breaks off, {what}");
            assert_eq!(amazon.connections(), 1, "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrived_together_with_a_reset_reaches_the_caller_before_the_connection_breaks() {
    for (name, end) in [
        ("RST_STREAM", reset(INTERNAL_ERROR)),
        ("RST_STREAM without an error", reset(NO_ERROR)),
        ("GOAWAY", goaway(1, INTERNAL_ERROR)),
        ("the end of the connection", Vec::new()),
    ] {
        for body in [&b""[..], b"part"] {
            let answer = [frame(HEADERS, 4, 1, &[OK]), frame(DATA, 0, 1, body), end.clone()].concat();
            let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, _| {
                let answer = answer.clone();
                async move {
                    if h2_request(&mut wire).await {
                        wire.send(&answer).await;
                        wire.end().await;
                    }
                }
            })
            .await;
            let harness = Harness::before(&amazon, &[]).await;
            let answer = harness.send_raw("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
            assert_eq!((answer.said(), answer.body.as_slice(), answer.whole), ((200, ""), body, false), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 67.
async fn an_http2_server_that_floods_or_resets_affects_only_its_request() {
    let attacks: [(&str, Vec<u8>); 6] = [
        ("goes away at once", frame(GOAWAY, 0, 0, &[0; 8])),
        ("resets the stream", frame(RST_STREAM, 0, 1, &[0, 0, 0, 2])),
        ("goes away within", [frame(HEADERS, 4, 1, &[OK]), frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 2])].concat()),
        ("empty DATA", [frame(HEADERS, 4, 1, &[OK]), frame(DATA, 0, 1, &[]).repeat(200_000)].concat()),
        ("CONTINUATION", {
            // Endless headers, each new; they must not accumulate without limit.
            let junk = frame(CONTINUATION, 0, 1, &[0, 1, b'a', 1, b'b'].repeat(1000));
            [frame(HEADERS, 0, 1, &[OK]), junk.repeat(2000)].concat()
        }),
        ("PING", [frame(PING, 0, 0, &[0; 8]).repeat(100_000), frame(RST_STREAM, 0, 1, &[0, 0, 0, 2])].concat()),
    ];
    // Attacks behind the head of an answer.
    let began = ["goes away within", "empty DATA"];
    for (name, attack) in attacks {
        let (attack, calm) = (Arc::new(attack), Arc::new(AtomicBool::new(false)));
        let over = calm.clone();
        let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, _| {
            let (attack, calm) = (attack.clone(), calm.clone());
            async move {
                if !h2_request(&mut wire).await {
                    return;
                }
                if calm.load(Ordering::SeqCst) {
                    wire.send(frame(HEADERS, 5, 1, &[OK])).await;
                    while !wire.take(1).await.is_empty() {}
                    return;
                }
                wire.floods(&attack).await;
                wire.end().await;
            }
        })
        .await;
        let harness = Harness::before(&amazon, &[]).await;
        let mut wire = harness.dial().await;
        wire.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        let came = wire.everything().await;
        let told = came.starts_with("HTTP/1.1 502 ") && came.contains("x-adsidecar-error: upstream_reset");
        // A caller whose response has begun sees it break off.
        let begun = came.starts_with("HTTP/1.1 200 OK\r\n");
        let broken_off = began.contains(&name) && begun && !came.ends_with("0\r\n\r\n");
        assert!(told || broken_off, "{name}: a 502 or a broken response, never a clean end: {came:?}");
        assert!(amazon.connections() >= 1, "{name}: it reached Amazon");
        assert!(amazon.connections() <= 3, "{name}: {} connections", amazon.connections());
        assert_eq!(harness.metric("adsidecar_requests_in_flight").await, 0.0, "{name}");
        over.store(true, Ordering::SeqCst);
        assert_eq!(harness.get("/next").await.status(), 200, "{name}: the next call is served");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_do_not_read_delay_no_other_caller_on_a_shared_connection() {
    let harness = harness("auto").await;
    let mut slow = Vec::new();
    for _ in 0..12 {
        let mut wire = harness.dial().await;
        // More than all buffers between Amazon and this socket together.
        wire.send("GET /sandbox/bytes/33554432 HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!(wire.reply_head().await.status, 200);
        slow.push(wire);
    }
    for _ in 0..20 {
        let call = tokio::time::timeout(std::time::Duration::from_secs(10), async {
            harness.get("/sandbox/bytes/100000").await.bytes().await.unwrap().len()
        });
        assert_eq!(call.await.expect("a call beside slow ones completes"), 100_000);
    }
}
