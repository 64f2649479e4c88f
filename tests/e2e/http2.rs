//! HTTP/2 to Amazon, where Amazon offers it.

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
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let options = Options { http2: true, ..Options::calm(clock) };
    let harness = Harness::built(options, "", &[("upstream.http2", http2)]).await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    harness
}

/// The connections of the calls that Amazon saw.
fn connections(harness: &Harness) -> Vec<u64> {
    let mut connections: Vec<_> = harness.ads_calls().iter().map(|call| call.connection).collect();
    connections.sort_unstable();
    connections.dedup();
    connections
}

/// So many calls that are all held by Amazon at once.
async fn at_once(harness: &Harness, count: usize) {
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).next(count as u32));
    let mut calls = JoinSet::new();
    for number in 0..count {
        calls.spawn(harness.request(reqwest::Method::POST, "/sandbox/echo").body(number.to_string()).send());
    }
    gate.reached(count).await;
    gate.release();
    while let Some(answer) = calls.join_next().await {
        assert_eq!(answer.unwrap().unwrap().status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 24.
async fn calls_that_hold_a_shared_connection_full_hold_nobody_up() {
    let harness = harness("auto").await;
    // Two hundred at once is what this server takes on one connection; the others would wait for them to end.
    at_once(&harness, 450).await;
    let connections = connections(&harness).len();
    assert!((3..=10).contains(&connections), "{connections}");
}

#[tokio::test(flavor = "multi_thread")]
async fn never_means_never() {
    let harness = harness("never").await;
    harness.get("/v2/profiles").await.bytes().await.unwrap();
    at_once(&harness, 5).await;
    assert_eq!(connections(&harness).len(), 5, "HTTP/1.1 carries one call at a time");
    assert!(harness.seen().header("host").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn always_does_without_nothing_else() {
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let harness = Harness::built(Options::calm(clock), "", &[("upstream.http2", "always")]).await;
    harness.log_in("default").await;
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), crate::harness::code(&answer)), (502, "upstream_tls"));
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_calls_share_one_connection() {
    for mode in ["auto", "always"] {
        let harness = harness(mode).await;
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        at_once(&harness, 50).await;
        assert_eq!(connections(&harness).len(), 1, "{mode}");
        assert_eq!(harness.ads_calls().len(), 51);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn few_who_go_on_calling_get_connections_of_http1() {
    for (mode, callers, most) in [("auto", 1, 2), ("auto", 3, 4), ("always", 3, 1)] {
        let harness = harness(mode).await;
        let round = async || {
            at_once(&harness, callers).await;
            connections(&harness).len()
        };
        for _ in 0..100 {
            round().await;
        }
        eventually("one for each caller, beside the shared one", async || (round().await == most).then_some(())).await;
        // The few do not take more, and many share the one that is there.
        for _ in 0..100 {
            round().await;
        }
        at_once(&harness, 50).await;
        assert_eq!(connections(&harness).len(), most, "{mode}, {callers}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_pass_as_over_http1() {
    let harness = harness("auto").await;
    for target in ["//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/sandbox/echo?", "/amc/%7Bid%7D/a|b?c|d", "/x/../y"] {
        let call = format!(
            "GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, x-a\r\nX-A: 1\r\nTE: trailers\r\n\r\n"
        );
        assert_eq!(harness.knock(call).await.header("x-adsidecar-error"), None);
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
    wire.send("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n").await;
    assert_eq!((wire.reply().await.status, harness.seen().text().as_str()), (200, "abc"));
    assert_eq!(connections(&harness).len(), 1);
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
/// `:status: 200` in HPACK.
const OK: u8 = 0x88;

/// One HTTP/2 frame (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
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

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_over_http2_is_never_ended_cleanly() {
    // Without a length, and with one: `content-length: 10` (HPACK, literal, name 28 of the static table).
    for length in [&[][..], &[0x0f, 0x0d, 2, b'1', b'0']] {
        for end in [frame(RST_STREAM, 0, 1, &[0, 0, 0, 2]), frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 2]), Vec::new()]
        {
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
// Covers: failure 67.
async fn a_server_that_floods_or_resets_costs_a_call_and_nothing_more() {
    let attacks: [(&str, Vec<u8>); 6] = [
        ("goes away at once", frame(GOAWAY, 0, 0, &[0; 8])),
        ("resets the stream", frame(RST_STREAM, 0, 1, &[0, 0, 0, 2])),
        ("goes away within", [frame(HEADERS, 4, 1, &[OK]), frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 2])].concat()),
        ("empty DATA", [frame(HEADERS, 4, 1, &[OK]), frame(DATA, 0, 1, &[]).repeat(200_000)].concat()),
        ("CONTINUATION", {
            // Headers without an end, each new; none of them may be collected for ever.
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
        // A caller whose answer has begun sees it break off, where its head is not lost with the rest. Otherwise it is
        // told.
        let begun = came.is_empty() || came.starts_with("HTTP/1.1 200 OK\r\n");
        let broken_off = began.contains(&name) && begun && !came.ends_with("0\r\n\r\n");
        assert!(told || broken_off, "{name}: told or broken off, never a clean end: {came:?}");
        assert!(amazon.connections() >= 1, "{name}: it came to Amazon");
        assert!(amazon.connections() <= 2, "{name}: {} connections", amazon.connections());
        assert_eq!(harness.metric("adsidecar_requests_in_flight").await, 0.0, "{name}");
        over.store(true, Ordering::SeqCst);
        assert_eq!(harness.get("/next").await.status(), 200, "{name}: the next call is served");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_do_not_read_their_answers_hold_up_nobody_who_shares_their_connection() {
    let harness = harness("auto").await;
    let mut slow = Vec::new();
    for _ in 0..12 {
        let mut wire = harness.dial().await;
        // More than every buffer between Amazon and this socket together.
        wire.send("GET /sandbox/bytes/33554432 HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!(wire.reply_head().await.status, 200);
        slow.push(wire);
    }
    for _ in 0..20 {
        let call = tokio::time::timeout(std::time::Duration::from_secs(10), async {
            harness.get("/sandbox/bytes/100000").await.bytes().await.unwrap().len()
        });
        assert_eq!(call.await.expect("a call beside slow ones is answered"), 100_000);
    }
}
