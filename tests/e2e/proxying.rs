//! What passes byte for byte, in both directions.

use std::io::Read;

use flate2::read::GzDecoder;
use reqwest::Method;
use sha2::{Digest, Sha256};
use world::{Fault, Listener, Rule, pseudo_random_bytes};

use crate::harness::{Harness, json};
use crate::http2;
use crate::raw_http::{Scripted, Wire, eventually};

/// The seeded profile of North America.
const PROFILE: &str = "3012345678901234561";
const MIB: usize = 1 << 20;

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_targets_reach_amazon_unchanged() {
    let harness = Harness::set(&[]).await;
    let long = format!("/sandbox/echo?ids={}", "1234567890,".repeat(700));
    for target in [
        "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c",
        "/sandbox/echo?a=%20",
        "/sandbox/echo?",
        "/sandbox/echo",
        "/amc/reporting/%7Binstance%7D/workflows",
        "/x/{y}?filter={a:[1]}&b=`^\\",
        "/x|y?a|b",
        "/x/../y/./z//",
        "/x;v=1/y:z@w?a=b?c/d&&=",
        "/x/%00%5c%2e%2e%2f",
        "/caf\u{e9}?caf\u{e9}",
        long.as_str(),
    ] {
        let answer = harness.send_raw(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        assert_eq!(harness.seen().target, target);
        assert_eq!(answer.header("x-adsidecar-error"), None, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 31.
async fn a_redirect_is_passed_on_and_never_followed() {
    let harness = Harness::set(&[]).await;
    let call = harness.request(Method::GET, "/v2/reports/r1/download").header("Amazon-Advertising-API-Scope", PROFILE);
    let answer = call.send().await.unwrap();
    assert_eq!(answer.status(), 307);
    let location = answer.headers()["location"].to_str().unwrap();
    assert!(location.starts_with("https://offline-report-storage-us-east-1-prod.s3.amazonaws.com/r1/"), "{location}");
    assert!(location.contains("X-Amz-Credential=SANDBOX%2F20261122%2Fus-east-1"), "{location}");
    assert_eq!(harness.ads_calls().len(), 1);
    for code in [301, 302, 303, 308] {
        let elsewhere = format!("{}/sandbox/echo", harness.sandbox.origin(Listener::Eu));
        harness.sandbox.set_fault(Fault::Status {
            code,
            headers: vec![("location".into(), elsewhere.clone())],
            body: String::new(),
        });
        let answer = harness.get("/sandbox/echo").await;
        assert_eq!((answer.status().as_u16(), answer.headers()["location"].to_str().unwrap()), (code, &*elsewhere));
    }
    assert!(harness.sandbox.calls(Listener::Eu).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_with_its_vendor_media_types_passes() {
    let harness = Harness::set(&[]).await;
    let sent = r#"{"campaigns":[{"campaignId":"1","state":"PAUSED"},{"campaignId":"x"}]}"#;
    let answer = harness
        .request(Method::PUT, "/sp/campaigns")
        .header("Amazon-Advertising-API-Scope", PROFILE)
        .header("Content-Type", "application/vnd.spCampaign.v3+json")
        .header("Accept", "application/vnd.spCampaign.v3+json")
        .header("Prefer", "return=representation")
        .body(sent)
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 207);
    assert_eq!(answer.headers()["content-type"], "application/vnd.spCampaign.v3+json");
    assert_eq!(json(answer).await["campaigns"]["error"].as_array().unwrap().len(), 2);
    let seen = harness.seen();
    assert_eq!(seen.header("content-type"), Some("application/vnd.spCampaign.v3+json"));
    assert_eq!(seen.header("accept"), Some("application/vnd.spCampaign.v3+json"));
    assert_eq!(seen.header("prefer"), Some("return=representation"));
    assert_eq!((seen.text().as_str(), seen.header("content-length")), (sent, Some(&*sent.len().to_string())));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 65.
async fn compressed_responses_stay_compressed() {
    let harness = Harness::set(&[]).await;
    let report = harness.get("/sandbox/gzip").await;
    assert!(!report.headers().contains_key("content-encoding"));
    assert_eq!(report.headers()["content-type"], "application/octet-stream");
    let report = report.bytes().await.unwrap();
    let encoded = harness.get("/sandbox/gzip?encoded=1").await;
    assert_eq!(encoded.headers()["content-encoding"], "gzip");
    assert_eq!(encoded.bytes().await.unwrap(), report);
    let mut text = String::new();
    GzDecoder::new(&report[..]).read_to_string(&mut text).unwrap();
    assert!(text.contains("281474976710657"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_one_by_one() {
    let harness = Harness::set(&[("upstream.response_timeout", "100ms")]).await;
    let mut wire = harness.dial().await;
    wire.send("GET /sandbox/events?count=3&step=1 HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
        .await;
    let head = wire.reply_head().await;
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    for number in 1..=3 {
        harness.sandbox.release_events(1);
        let event = wire.until("\n\n").await.unwrap();
        assert!(
            event.ends_with(&format!("id: {number}\nevent: message\ndata: {{\"number\":{number}}}\n\n")),
            "{event}"
        );
    }
    assert_eq!(wire.until("0\r\n\r\n").await.unwrap(), "\r\n0\r\n\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_stream_may_be_silent_before_its_head() {
    let harness = Harness::set(&[("upstream.response_timeout", "50ms")]).await;
    for accept in ["text/event-stream", "application/json, text/event-stream"] {
        harness.sandbox.set_fault(Fault::Delay { ms: 300 });
        let call = harness.request(Method::GET, "/sandbox/echo").header("Accept", accept);
        assert_eq!(call.send().await.unwrap().status(), 200, "{accept}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_headers_stay_repeated() {
    let harness = Harness::set(&[]).await;
    let answer = harness
        .send_raw("GET /sandbox/cookies HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\nX-B: 2\r\nX-A: 3\r\n\r\n")
        .await;
    let cookies: Vec<_> = answer.headers.iter().filter(|(name, _)| name == "set-cookie").collect();
    assert_eq!(cookies.len(), 2);
    assert!(cookies[0].1.starts_with("session-id=130-1234567-1234567; Domain=.amazon.com;"), "{cookies:?}");
    assert!(cookies[1].1.starts_with("session-id-time=2082787201l;"), "{cookies:?}");
    assert_eq!(harness.seen().header_all("x-a").collect::<Vec<_>>(), ["1", "3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_added_to_a_minimal_request() {
    let harness = Harness::set(&[]).await;
    let answer = harness.send_raw("GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(answer.status, 200);
    let mut names = harness.seen().header_names().into_iter().map(str::to_owned).collect::<Vec<_>>();
    names.sort();
    assert_eq!(names, ["amazon-advertising-api-clientid", "authorization", "host"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_added_to_a_minimal_response() {
    let amazon =
        Scripted::saying("HTTP/1.1 299 Odd\r\nX-Amz: 1\r\nX-Odd_Name: \"a\"\r\nContent-Length: 2\r\n\r\nok").await;
    let harness = Harness::before(&amazon, &[]).await;
    let answer = harness.send_raw("GET /x HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: r-1\r\n\r\n").await;
    let headers: Vec<_> = answer.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let amazons = [("x-amz", "1"), ("x-odd_name", "\"a\""), ("content-length", "2")];
    let expected = [&amazons[..], &[("x-request-id", "r-1"), ("keep-alive", "timeout=600")]].concat();
    assert_eq!((answer.status, headers, answer.text().as_str()), (299, expected, "ok"));
}

#[tokio::test(flavor = "multi_thread")]
async fn head_keeps_the_length_and_the_connection() {
    let harness = Harness::set(&[]).await;
    let mut wire = harness.dial().await;
    for _ in 0..2 {
        wire.send("HEAD /sandbox/bytes/1000 HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        let head = wire.reply_head().await;
        assert_eq!((head.status, head.header("content-length")), (200, Some("1000")));
        wire.send("GET /sandbox/bytes/10 HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!(wire.reply().await.body, pseudo_random_bytes(10));
    }
    let connections: Vec<_> = harness.ads_calls().iter().map(|call| call.connection).collect();
    assert!(connections.iter().all(|connection| *connection == connections[0]), "{connections:?}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 66.
async fn bodiless_responses_keep_both_connections_in_sync() {
    let amazon = Scripted::start(|mut wire, _| async move {
        while let Some(head) = wire.head().await {
            let answer = match head.split(' ').nth(1).unwrap() {
                "/204" => "HTTP/1.1 204 No Content\r\nX-N: 1\r\n\r\n",
                "/304" => "HTTP/1.1 304 Not Modified\r\nETag: \"e\"\r\nContent-Length: 77\r\n\r\n",
                "/zero" => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
                _ => "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            };
            wire.send(answer).await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let mut wire = harness.dial().await;
    for (path, status, body) in [("/204", 204, ""), ("/304", 304, ""), ("/zero", 200, ""), ("/ok", 200, "ok")] {
        wire.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        let answer = wire.reply().await;
        assert_eq!((answer.status, answer.text().as_str(), answer.whole), (status, body, true), "{path}");
        match path {
            "/204" => assert_eq!(answer.names(), ["x-n", "x-request-id", "keep-alive"]),
            // Its Content-Length, which says nothing about this connection, is dropped by hyper.
            "/304" => assert_eq!(answer.header("etag"), Some("\"e\"")),
            _ => {}
        }
    }
    assert_eq!(amazon.connections(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_pass_both_ways() {
    let harness = Harness::set(&[]).await;
    let bytes = pseudo_random_bytes(24 * MIB);
    for query in ["", "?chunked=1"] {
        let download = harness.get(&format!("/sandbox/bytes/{}{query}", bytes.len())).await;
        assert_eq!(download.headers().contains_key("content-length"), query.is_empty());
        assert!(download.bytes().await.unwrap() == bytes, "the download differs");
    }
    let digest = sha256(&bytes);
    let answer = harness.request(Method::POST, "/sandbox/echo").body(bytes.clone()).send().await.unwrap();
    assert_eq!(json(answer).await["body_sha256"], digest);
    assert_eq!(harness.seen().header("content-length"), Some(&*bytes.len().to_string()));

    let mut wire = harness.dial().await;
    wire.send("PUT /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    for piece in bytes.chunks(100_001) {
        wire.send(format!("{:x};ext=1\r\n", piece.len())).await;
        wire.send(piece).await;
        wire.send("\r\n").await;
    }
    wire.send("0\r\n\r\n").await;
    assert_eq!(wire.reply().await.json()["body_sha256"], digest);
    assert_eq!(harness.seen().header("transfer-encoding"), Some("chunked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_but_legal_framing_passes() {
    let harness = Harness::set(&[]).await;
    let empty = harness.send_raw("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!((empty.status, harness.seen().header("content-length")), (200, Some("0")));
    let get = harness.send_raw("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc").await;
    assert_eq!((get.status, harness.seen().text().as_str()), (200, "abc"));
    let delete =
        "DELETE /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    assert_eq!((harness.send_raw(delete).await.status, harness.seen().text().as_str()), (200, "abc"));
    let bare = harness.send_raw("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!((bare.status, harness.seen().body_len), (200, 0));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 72.
async fn trailers_are_dropped() {
    let harness = Harness::set(&[]).await;
    let answer = harness
        .send_raw(
            "POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nTrailer: \
             Authorization\r\n\r\n\
             3\r\nabc\r\n0\r\nAuthorization: Bearer theirs\r\nContent-Length: 7\r\nX-T: 1\r\n\r\n",
        )
        .await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let seen = harness.seen();
    assert_eq!((seen.text().as_str(), seen.complete), ("abc", true));
    assert_eq!((seen.header("trailer"), seen.header("x-t")), (None, None));
    assert_eq!(seen.header_all("authorization").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_end_a_request_and_its_connection_serves_the_next() {
    for protocol in ["always", "never"] {
        let harness = http2::harness_with(protocol, &[]).await;
        let mut wire = harness.dial().await;
        for (target, status) in [("/sandbox/echo", 200), ("/sandbox/echo", 200), ("/sandbox/status/404", 404)] {
            wire.send(format!(
                "POST {target} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n\
                 3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"
            ))
            .await;
            let answer = wire.reply().await;
            assert_eq!((answer.status, answer.header("connection")), (status, None), "{protocol} {target}");
            assert_eq!(harness.seen().text(), "abc", "{protocol} {target}");
        }
        wire.send("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!(wire.reply().await.status, 200, "{protocol}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 73.
async fn a_100_continue_is_sent_only_after_the_checks() {
    let harness = Harness::set(&[]).await;
    let expecting = |host: &str| {
        format!("POST /sandbox/echo HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    };
    assert_eq!(harness.send_raw(expecting("evil.test")).await.status, 403, "with no 100 before it");
    let mut wire = harness.dial().await;
    wire.send(expecting("localhost")).await;
    assert_eq!(wire.reply().await.status, 100);
    wire.send("abc").await;
    assert_eq!(wire.reply().await.status, 200);
    let seen = harness.seen();
    assert_eq!((seen.text().as_str(), seen.header("expect")), ("abc", None));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 75.
async fn http_1_0_clients_are_served_with_and_without_keep_alive() {
    let harness = Harness::set(&[]).await;
    let mut wire = harness.dial().await;
    wire.send("GET /sandbox/bytes/5?chunked=1 HTTP/1.0\r\nHost: localhost\r\n\r\n").await;
    let answer = wire.reply().await;
    assert_eq!((answer.version.as_str(), answer.status, answer.body.len()), ("HTTP/1.0", 200, 5));
    assert_eq!(answer.header("transfer-encoding"), None);
    assert!(wire.closes().await);
    let mut wire = harness.dial().await;
    for _ in 0..2 {
        wire.send("GET /sandbox/bytes/5 HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n").await;
        let answer = wire.reply().await;
        assert_eq!((answer.status, answer.body.len()), (200, 5));
        assert!(answer.header("connection").unwrap().eq_ignore_ascii_case("keep-alive"));
    }
    assert!(harness.ads_calls().iter().all(|call| call.header("connection").is_none()));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 76.
async fn a_hundred_pipelined_requests_are_answered_in_order() {
    let harness = Harness::set(&[]).await;
    let mut wire = harness.dial().await;
    let calls: String = (1..=100)
        .map(|n| format!("POST /sandbox/bytes/{n} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc"))
        .collect();
    wire.send(calls).await;
    for n in 1..=100 {
        assert_eq!(wire.reply().await.body.len(), n);
    }
    let targets: Vec<_> = harness.ads_calls().into_iter().map(|call| call.target).collect();
    assert_eq!(targets, (1..=100).map(|n| format!("/sandbox/bytes/{n}")).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn sequential_requests_share_one_connection_to_amazon() {
    let harness = Harness::set(&[]).await;
    for _ in 0..25 {
        assert!(harness.get("/v2/profiles").await.text().await.unwrap().contains(PROFILE));
        assert_eq!(harness.request(Method::PUT, "/sandbox/echo").body("x").send().await.unwrap().status(), 200);
    }
    let calls = harness.ads_calls();
    assert_eq!(calls.len(), 50);
    assert!(calls.iter().all(|call| call.connection == calls[0].connection));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 60.
async fn a_truncated_response_never_ends_cleanly() {
    for protocol in ["always", "never"] {
        let harness = http2::harness_with(protocol, &[("proxy.replay_limit", "1B")]).await;
        // The sandbox sends 4096 bytes of the body before it breaks off.
        let expected = pseudo_random_bytes(100_000);
        for query in ["", "?chunked=1"].repeat(10) {
            harness.sandbox.set_fault(Fault::CloseMidBody);
            let mut wire = harness.dial().await;
            wire.send(format!("GET /sandbox/bytes/100000{query} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
            let answer = wire.reply().await;
            assert_eq!((answer.status, answer.whole), (200, false), "{protocol} {query}");
            assert!(answer.body == expected[..4096], "{protocol} {query}: {} bytes", answer.body.len());
            assert!(wire.closes().await);
        }
        // A refusal, which is read before it passes, breaks off as well. (What was sent was too large for a replay.)
        let call =
            "POST /sandbox/status/401 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc";
        let whole = harness.send_raw(call).await;
        assert_eq!((whole.status, whole.whole), (401, true), "{whole:?}");
        harness.sandbox.clear_history();
        harness.sandbox.set_fault(Rule::from(Fault::CloseMidBody).on("/sandbox/status/401"));
        let answer = harness.send_raw(call).await;
        assert_eq!((harness.ads_calls().len(), harness.seen().status), (1, Some(401)), "Amazon answered, once");
        assert_eq!((answer.status, answer.whole), (401, false), "{protocol}: {answer:?}");
        assert_eq!(answer.body, whole.body[..whole.body.len().div_ceil(2)], "{protocol}: the part that arrived");
        // Nothing of that harms the next call.
        assert_eq!(harness.get("/sandbox/echo").await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 60.
async fn a_refusal_in_chunks_that_breaks_off_is_never_ended_cleanly() {
    for (end, whole) in [("0\r\n\r\n", true), ("", false)] {
        let refusal = format!("HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n{end}");
        let amazon = Scripted::start(move |mut wire: Wire, _| {
            let refusal = refusal.clone();
            async move {
                wire.head().await;
                wire.take(3).await;
                wire.send(refusal).await;
                wire.end().await;
            }
        })
        .await;
        let harness = Harness::before(&amazon, &[("proxy.replay_limit", "1B")]).await;
        let call = "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc";
        let came = String::from_utf8(harness.raw(call.as_bytes(), None).await).unwrap();
        assert_eq!(amazon.connections(), 1, "it was too large for a replay");
        assert!(came.starts_with("HTTP/1.1 401 ") && came.contains("part"), "{came}");
        // One that was read to its end passes with its length.
        let ended = came.ends_with("\r\n0\r\n\r\n") || came.contains("content-length: 4") && came.ends_with("part");
        assert_eq!(ended, whole, "{came}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 68.
async fn an_upload_aborted_by_the_caller_reaches_amazon_as_incomplete() {
    let harness = Harness::set(&[]).await;
    for framing in ["Content-Length: 100000", "Transfer-Encoding: chunked"] {
        harness.sandbox.clear_history();
        let mut wire = harness.dial().await;
        wire.send(format!("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n5\r\nabcde\r\n")).await;
        eventually("the call to reach Amazon", || !harness.ads_calls().is_empty()).await;
        drop(wire);
        // The sandbox records the body once it has ended, complete or not.
        eventually("Amazon to see the end", || harness.seen().body_len > 0).await;
        assert!(!harness.seen().complete, "{framing}");
        assert_eq!(harness.seen().status, None);
    }
    assert_eq!(harness.get("/sandbox/echo").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 62.
async fn a_response_before_the_end_of_the_body_passes_immediately() {
    let amazon = Scripted::start(|mut wire: Wire, _| async move {
        while let Some(head) = wire.head().await {
            if head.starts_with("POST") {
                wire.send("HTTP/1.1 413 Payload Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig").await;
                // Read on, as a server with a lingering close does.
                while !wire.take(64 << 10).await.is_empty() {}
                return;
            }
            wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let mut wire = harness.dial().await;
    wire.send("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\nabc").await;
    let answer = wire.reply().await;
    assert_eq!((answer.said(), answer.text().as_str()), ((413, ""), "big"));
    // The rest of the body never becomes a request.
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";
    wire.send(smuggled).await;
    let next = harness.get("/next").await;
    assert_eq!((next.status().as_u16(), next.text().await.unwrap().as_str()), (200, "ok"));
}
