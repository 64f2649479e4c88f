//! Which connections carry the requests to Amazon, and what a server that is unlike others does to them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use adsidecar::domain::clock::Clock;
use reqwest::Method;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use world::Options;

use crate::harness::{Harness, code, eventually};
use crate::http2::{CONTINUATION, DATA, HEADERS, OK, PING, RST_STREAM, SETTINGS, frame};
use crate::raw_http::{Scripted, Wire};

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const ACK: u8 = 1;

/// `SETTINGS_MAX_CONCURRENT_STREAMS`.
pub(crate) fn allows(streams: u8) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, streams])
}

/// The next frame: its kind, flags and stream.
pub(crate) async fn next_frame(wire: &mut Wire) -> Option<(u8, u8, u32)> {
    let head = wire.take(9).await;
    rest_of_frame(&head, wire).await
}

pub(crate) async fn rest_of_frame(head: &[u8], wire: &mut Wire) -> Option<(u8, u8, u32)> {
    let &[_, high, low, kind, flags, a, b, c, d] = head else { return None };
    wire.take(usize::from(high) << 8 | usize::from(low)).await;
    Some((kind, flags, u32::from_be_bytes([a, b, c, d])))
}

/// Reads the preface and sends `settings`. Then answers the frames of the client: with what `answer` returns for the
/// stream of a request, and pings as they should be.
pub(crate) async fn serve_http2(wire: &mut Wire, settings: Vec<u8>, mut answer: impl FnMut(u32) -> Option<Vec<u8>>) {
    wire.take(24).await;
    wire.send(settings).await;
    while let Some((kind, flags, stream)) = next_frame(wire).await {
        match kind {
            HEADERS => {
                let Some(answer) = answer(stream) else { return };
                wire.send(answer).await;
            }
            PING if flags & ACK == 0 => wire.send(frame(PING, ACK, 0, &[0; 8])).await,
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 5.
async fn a_request_does_not_wait_on_an_http2_connection_that_has_gone_silent() {
    // The first connection answers one request and then nothing any more, not even a ping.
    let amazon = Scripted::speaking(&["h2"], |mut wire: Wire, number| async move {
        let mut requests = 0;
        serve_http2(&mut wire, frame(SETTINGS, 0, 0, &[]), |stream| {
            requests += 1;
            (number > 1 || requests == 1).then(|| frame(HEADERS, END_STREAM | END_HEADERS, stream, &[OK]))
        })
        .await;
        std::future::pending().await
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    assert_eq!(harness.get("/x").await.status(), 200);
    let waiting = tokio::spawn(harness.request(Method::GET, "/waits").send());
    let begun = Instant::now();
    eventually("new requests use another connection", async || {
        let other = harness.request(Method::POST, "/x").timeout(Duration::from_millis(500)).send().await.ok()?;
        (other.status() == 200).then_some(())
    })
    .await;
    assert_eq!(amazon.connections(), 2);
    assert!(begun.elapsed() > Duration::from_secs(5), "it was given time to answer a ping: {:?}", begun.elapsed());
    // The connection is given up, and what waited on it is sent again.
    assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    assert_eq!(amazon.connections(), 3, "on a new one");
}

/// How many streams the stand-ins of the next tests allow, in the end.
const ALLOWED: u8 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_streams_that_a_server_allows_is_obeyed_and_delays_no_request() {
    obeys_the_limit(ALLOWED).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lower_number_of_streams_that_a_server_allows_later_is_obeyed_too() {
    obeys_the_limit(100).await;
}

/// Opens [`ALLOWED`] event streams and then calls, on a server that allows `first` streams, and [`ALLOWED`] from the
/// last event stream on.
async fn obeys_the_limit(first: u8) {
    let exceeded = Arc::new(AtomicUsize::new(0));
    let counted = exceeded.clone();
    // The first three requests are event streams, which stay open.
    let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, number| {
        let counted = counted.clone();
        async move {
            let mut open = HashSet::new();
            serve_http2(&mut wire, allows(first), |stream| {
                if open.len() >= usize::from(ALLOWED) {
                    counted.fetch_add(1, Ordering::SeqCst);
                    return Some(frame(RST_STREAM, 0, stream, &[0, 0, 0, 7]));
                }
                if number > 1 {
                    return Some(frame(HEADERS, END_STREAM | END_HEADERS, stream, &[OK]));
                }
                open.insert(stream);
                let lower = if open.len() == usize::from(ALLOWED) { allows(ALLOWED) } else { Vec::new() };
                Some([lower, frame(HEADERS, END_HEADERS, stream, &[OK]), frame(DATA, 0, stream, b"event")].concat())
            })
            .await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[("upstream.response_timeout", "5s")]).await;
    let mut streams = Vec::new();
    for _ in 0..ALLOWED {
        let mut wire = harness.dial().await;
        wire.send("GET /events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n").await;
        assert_eq!(wire.reply_head().await.status, 200);
        streams.push(wire);
    }
    for _ in 0..5 {
        assert_eq!(harness.post("/x").await.status(), 200);
    }
    assert_eq!((amazon.connections(), exceeded.load(Ordering::SeqCst)), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_beyond_the_streams_that_a_server_allows_opens_more_connections() {
    const ENOUGH: usize = 5;
    // Refuses what exceeds the limit, and answers the rest once enough connections are open and nothing more comes.
    let opened = Arc::new(AtomicUsize::new(0));
    let counted = opened.clone();
    let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, number| {
        let opened = counted.clone();
        async move {
            opened.fetch_max(number, Ordering::SeqCst);
            wire.take(24).await;
            wire.send(allows(ALLOWED)).await;
            let mut open = Vec::new();
            loop {
                // Between frames only, as a frame that is given up would be lost.
                let Ok(head) = tokio::time::timeout(Duration::from_millis(30), wire.take(9)).await else {
                    if opened.load(Ordering::SeqCst) >= ENOUGH {
                        for stream in open.drain(..) {
                            wire.send(frame(HEADERS, END_STREAM | END_HEADERS, stream, &[OK])).await;
                        }
                    }
                    continue;
                };
                match rest_of_frame(&head, &mut wire).await {
                    Some((HEADERS, _, stream)) if open.len() < usize::from(ALLOWED) => open.push(stream),
                    Some((HEADERS, _, stream)) => wire.send(frame(RST_STREAM, 0, stream, &[0, 0, 0, 7])).await,
                    Some(_) => {}
                    None => return,
                }
            }
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[("upstream.response_timeout", "8s")]).await;
    let mut calls = JoinSet::new();
    for _ in 0..40 {
        calls.spawn(harness.request(Method::POST, "/x").send());
    }
    for answer in calls.join_all().await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert!(opened.load(Ordering::SeqCst) >= ENOUGH);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_head_of_60_kib_passes_over_http2() {
    let value = vec![b'v'; 60_000];
    // A literal header without indexing: `x-large`, and the length as an HPACK integer with a prefix of 7 bits.
    let length = 60_000 - 127;
    let integer = [0x7f, (length & 0x7f) as u8 | 0x80, (length >> 7 & 0x7f) as u8 | 0x80, (length >> 14) as u8];
    let head = [&[OK, 0, 7], &b"x-large"[..], &integer, &value].concat();
    let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, _| {
        let head = head.clone();
        async move {
            serve_http2(&mut wire, frame(SETTINGS, 0, 0, &[]), |stream| {
                let mut parts: Vec<_> = head.chunks(16_384).map(|part| (CONTINUATION, 0, part)).collect();
                (parts[0].0, parts[0].1) = (HEADERS, END_STREAM);
                parts.last_mut().unwrap().1 |= END_HEADERS;
                Some(parts.iter().flat_map(|(kind, flags, part)| frame(*kind, *flags, stream, part)).collect())
            })
            .await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let answer = harness.get("/x").await;
    assert_eq!((answer.status().as_u16(), answer.headers()["x-large"].len()), (200, 60_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_coding_that_was_not_asked_for_is_an_error() {
    for coding in ["gzip", "gzip, chunked", "chunked, gzip", "identity"] {
        let amazon = Scripted::start(move |mut wire: Wire, _| async move {
            while wire.head().await.is_some() {
                wire.send(format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n3\r\nabc\r\n0\r\n\r\n")).await;
                wire.end().await;
            }
        })
        .await;
        let harness = Harness::before(&amazon, &[]).await;
        let answer = harness.get("/x").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (502, "upstream_reset"), "{coding}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_options_in_a_response_do_not_change_its_framing() {
    for (options, framing, body) in [
        ("transfer-encoding", "Transfer-Encoding: chunked", "3\r\nabc\r\n0\r\n\r\n"),
        ("content-length", "Content-Length: 3", "abc"),
        ("keep-alive, Transfer-Encoding, content-length", "Transfer-Encoding: chunked", "3\r\nabc\r\n0\r\n\r\n"),
    ] {
        let amazon = Scripted::start(move |mut wire: Wire, _| async move {
            while wire.head().await.is_some() {
                wire.send(format!("HTTP/1.1 200 OK\r\nConnection: {options}\r\n{framing}\r\n\r\n{body}")).await;
            }
        })
        .await;
        let harness = Harness::before(&amazon, &[]).await;
        let mut wire = harness.dial().await;
        for _ in 0..2 {
            wire.send("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
            let reply = wire.reply().await;
            assert_eq!((reply.status, reply.text().as_str(), reply.whole), (200, "abc", true), "{options}");
        }
    }
}

/// A relay in front of a server that forwards nothing of the connections after the first until `count` of them have
/// come.
async fn gathering_relay(server: &Scripted, count: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = format!("https://{}", listener.local_addr().unwrap());
    let target = server.origin.trim_start_matches("https://").to_owned();
    tokio::spawn(async move {
        let mut gathered = Vec::new();
        let forward = |mut from: TcpStream| {
            let target = target.clone();
            tokio::spawn(async move {
                let mut to = TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
            })
        };
        forward(listener.accept().await.unwrap().0);
        loop {
            gathered.push(listener.accept().await.unwrap().0);
            if gathered.len() >= count {
                gathered.drain(..).for_each(|from| drop(forward(from)));
            }
        }
    });
    own
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_against_an_http1_host_opens_its_connections_at_the_same_time() {
    const CALLS: usize = 20;
    let amazon = Scripted::saying("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let relay = gathering_relay(&amazon, CALLS - 1).await;
    let ca = amazon.ca_file();
    let harness = Harness::set(&[("upstream.na", &relay), ("upstream.ca_file", ca.to_str().unwrap())]).await;
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        calls.spawn(harness.request(Method::POST, "/x").send());
    }
    let begun = Instant::now();
    for answer in calls.join_all().await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(4), "none ran into connect_timeout: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_the_server_closes_is_replaced_before_the_next_call() {
    // A server that closes a connection 300 ms after a response, and waits as long as it likes for the first request.
    let amazon = Scripted::start(|mut wire: Wire, _| async move {
        let mut head = wire.head().await;
        while head.is_some() {
            wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            head = tokio::time::timeout(Duration::from_millis(300), wire.head()).await.unwrap_or_default();
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    for call in 1..=3 {
        assert_eq!(harness.post("/x").await.status(), 200);
        assert_eq!(amazon.connections(), call, "the connection was there before the call");
        eventually("it is replaced", async || (amazon.connections() > call).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http1_a_request_that_may_not_be_repeated_gets_an_unused_connection_that_is_open_already() {
    let carried = Arc::new(Mutex::new(Vec::new()));
    let seen = carried.clone();
    let amazon = Scripted::start(move |mut wire: Wire, number| {
        let seen = seen.clone();
        async move {
            while let Some(head) = wire.head().await {
                seen.lock().unwrap().push((head[..3].to_owned(), number));
                wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            }
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    for call in 1..=5 {
        eventually("a connection in advance", async || (amazon.connections() == call).then_some(())).await;
        assert_eq!(harness.post("/x").await.status(), 200);
        assert_eq!(harness.get("/x").await.status(), 200);
    }
    let carried = std::mem::take(&mut *carried.lock().unwrap());
    let posts: HashSet<_> = carried.iter().filter(|(method, _)| method == "POS").map(|(_, number)| number).collect();
    assert_eq!(posts.len(), 5, "none carried two, nor was used before: {carried:?}");
    let first = |number| carried.iter().find(|(_, other)| other == number).unwrap().0 == "POS";
    assert!(posts.iter().all(|number| first(*number)), "{carried:?}");
    // Other requests use those that are left.
    assert!(carried.iter().all(|(_, number)| posts.contains(number)), "{carried:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_further_connection_resumes_the_tls_session_of_the_first() {
    for protocols in [&["h2", "http/1.1"][..], &["http/1.1"]] {
        let resumed = Arc::new(Mutex::new(Vec::new()));
        let seen = resumed.clone();
        // Closes each connection after one response, and says so over HTTP/1.1.
        let amazon = Scripted::speaking(protocols, move |mut wire: Wire, _| {
            seen.lock().unwrap().push(wire.is_resumed());
            async move {
                if wire.is_http2() {
                    let mut answered = false;
                    serve_http2(&mut wire, frame(SETTINGS, 0, 0, &[]), |stream| {
                        (!std::mem::replace(&mut answered, true))
                            .then(|| frame(HEADERS, END_STREAM | END_HEADERS, stream, &[OK]))
                    })
                    .await;
                } else if wire.head().await.is_some() {
                    wire.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
                }
                wire.end().await;
            }
        })
        .await;
        let harness = Harness::before(&amazon, &[]).await;
        for _ in 0..4 {
            assert_eq!(harness.get("/x").await.status(), 200);
        }
        let resumed = resumed.lock().unwrap().clone();
        assert!(resumed.len() >= 4 && resumed[1..].iter().all(|resumed| *resumed), "{protocols:?}: {resumed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_and_an_import_and_a_login_open_the_connection_before_the_first_request() {
    let amazon = Scripted::saying("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let elsewhere = Scripted::saying("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let mut harness = Harness::before(&amazon, &[("upstream.eu", &elsewhere.origin)]).await;
    eventually("a connection after the login", async || (amazon.connections() == 1).then_some(())).await;
    harness.restart_with("accounts.sync", "off").await;
    eventually("a connection after the start", async || (amazon.connections() == 2).then_some(())).await;
    assert_eq!(harness.post("/x").await.status(), 200);
    assert_eq!((amazon.connections(), elsewhere.connections()), (2, 0), "the request used it, and no other region");
    // An account says in which region its user's data is.
    let account = "[[account]]\nname = \"shop\"\nuser = \"shop\"\nregion = \"eu\"\n";
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let (near, far) = (amazon.origin.as_str(), elsewhere.origin.as_str());
    let sets = [("upstream.na", near), ("upstream.eu", far)];
    let harness = Harness::built(Options::calm(clock), account, &sets).await;
    let import = harness.client.post(harness.admin_url("/users/import?user_id=shop&offline=true")).body("Atzr|x");
    assert_eq!(import.send().await.unwrap().status(), 200);
    eventually("a connection after the import", async || (elsewhere.connections() == 1).then_some(())).await;
    assert_eq!(amazon.connections(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_may_not_be_repeated_gets_no_connection_that_the_server_may_be_closing() {
    // A server that closes each connection a millisecond after a response, and does not read what arrives then.
    let amazon = Scripted::start(|mut wire: Wire, _| async move {
        if wire.head().await.is_some() {
            wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    // It is learned from the first calls.
    for _ in 0..20 {
        assert_eq!(harness.get("/x").await.status(), 200);
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    let mut failed = Vec::new();
    for pause in 0..60_u64 {
        tokio::time::sleep(Duration::from_micros(pause * 50)).await;
        if harness.post("/x").await.status() != 200 {
            failed.push(pause);
        }
    }
    // Without what was learned, each one within the first millisecond fails.
    assert!(failed.is_empty(), "after {failed:?}");
}
