//! HTTP/2 to Amazon, where Amazon offers it.

use adsidecar::clock::Clock;
use adsidecar::sandbox::{Options, Rule, Trouble, pseudo_random_bytes};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::rig::{Rig, eventually, json};

async fn rig(http2: &str) -> Rig {
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let options = Options { http2: true, ..Options::calm(clock) };
    let rig = Rig::built(options, "", &[("upstream.http2", http2)]).await;
    rig.log_in("default").await;
    rig.sandbox.clear_history();
    rig
}

/// The connections of the calls that Amazon saw.
fn connections(rig: &Rig) -> Vec<u64> {
    let mut connections: Vec<_> = rig.ads_calls().iter().map(|call| call.connection).collect();
    connections.sort_unstable();
    connections.dedup();
    connections
}

/// So many calls that are all held by Amazon at once.
async fn at_once(rig: &Rig, count: usize) {
    let gate = rig.sandbox.set_trouble(Rule::from(Trouble::Gate).next(count as u32));
    let mut calls = JoinSet::new();
    for number in 0..count {
        calls.spawn(rig.request(reqwest::Method::POST, "/sandbox/echo").body(number.to_string()).send());
    }
    gate.reached(count).await;
    gate.release();
    while let Some(answer) = calls.join_next().await {
        assert_eq!(answer.unwrap().unwrap().status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn never_means_never() {
    let rig = rig("never").await;
    rig.get("/v2/profiles").await.bytes().await.unwrap();
    at_once(&rig, 5).await;
    assert_eq!(connections(&rig).len(), 5, "HTTP/1.1 carries one call at a time");
    assert!(rig.seen().header("host").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn always_does_without_nothing_else() {
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let rig = Rig::built(Options::calm(clock), "", &[("upstream.http2", "always")]).await;
    rig.log_in("default").await;
    let answer = rig.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), crate::rig::code(&answer)), (502, "upstream_tls"));
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_calls_share_one_connection() {
    for mode in ["auto", "always"] {
        let rig = rig(mode).await;
        assert_eq!(rig.get("/v2/profiles").await.status(), 200);
        at_once(&rig, 50).await;
        assert_eq!(connections(&rig).len(), 1, "{mode}");
        assert_eq!(rig.ads_calls().len(), 51);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_on_calling_alone_gets_a_connection_of_http1() {
    for (mode, lane) in [("auto", true), ("always", false)] {
        let rig = rig(mode).await;
        let call = async || {
            rig.get("/v2/profiles").await.bytes().await.unwrap();
            (connections(&rig).len() == 2).then_some(())
        };
        for _ in 0..200 {
            call().await;
        }
        if lane {
            eventually("a second connection", call).await;
            at_once(&rig, 50).await;
            assert_eq!(connections(&rig).len(), 2, "one for a lone caller, one for all others");
        } else {
            assert_eq!(call().await, None, "HTTP/2 or nothing");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_pass_as_over_http1() {
    let rig = rig("auto").await;
    for target in ["//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/sandbox/echo?", "/amc/%7Bid%7D/a|b?c|d", "/x/../y"] {
        let call = format!(
            "GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, x-a\r\nX-A: 1\r\nTE: trailers\r\n\r\n"
        );
        assert_eq!(rig.knock(call).await.header("x-adsidecar-error"), None);
        assert_eq!(rig.seen().target, target);
        let seen = rig.seen();
        let mut names = seen.header_names();
        names.sort_unstable();
        assert!(
            names.iter().all(|name| ["amazon-advertising-api-clientid", "authorization", "host"].contains(name)),
            "{names:?}"
        );
    }
    let bytes = pseudo_random_bytes(4 << 20);
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let upload = rig.request(reqwest::Method::POST, "/sandbox/echo").body(bytes.clone()).send().await.unwrap();
    assert_eq!(json(upload).await["body_sha256"], digest);
    for query in ["", "?chunked=1"] {
        let download = rig.get(&format!("/sandbox/bytes/{}{query}", bytes.len())).await;
        assert!(download.bytes().await.unwrap() == bytes);
    }
    let mut wire = rig.dial().await;
    wire.send("HEAD /sandbox/bytes/1000 HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(wire.reply_head().await.header("content-length"), Some("1000"));
    wire.send("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n").await;
    assert_eq!((wire.reply().await.status, rig.seen().text().as_str()), (200, "abc"));
    assert_eq!(connections(&rig).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_over_http2_is_never_ended_cleanly() {
    let rig = rig("auto").await;
    for query in ["", "?chunked=1"] {
        rig.sandbox.set_trouble(Trouble::CloseMidBody);
        let mut wire = rig.dial().await;
        let request =
            format!("GET /sandbox/bytes/100000{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        wire.send(request).await;
        // Where all of it came at once the head may be lost with the rest, or the reset comes first and is told as a 502.
        let came = wire.everything().await;
        assert!(came.len() < 100_000 && !came.ends_with("\r\n0\r\n\r\n"), "{query}");
    }
    assert_eq!(rig.get("/v2/profiles").await.status(), 200);
}
