//! Framing: ambiguous or invalid framing closes the connection, and no bytes after it are served.

use crate::harness::Harness;
use crate::raw_http::eventually;

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Sends the bytes followed by another request. Returns the status and code of the response; the connection must close
/// after it.
async fn refused(harness: &Harness, bytes: &str) -> (u16, String) {
    let mut wire = harness.dial().await;
    wire.send(format!("{bytes}{SMUGGLED}")).await;
    let answer = wire.reply().await;
    assert!(wire.closes().await, "the connection stays open, or there is a second response: {bytes:?}");
    let (status, code) = answer.said();
    (status, code.to_owned())
}

fn posted(headers: &str) -> String {
    format!("POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 16.
async fn ambiguous_transfer_codings_are_rejected() {
    let harness = Harness::set(&[]).await;
    for codings in [
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: identity, chunked",
        "Content-Length: 5\r\nTransfer-Encoding: gzip, chunked",
    ] {
        let bytes = posted(codings) + "0\r\n\r\n";
        assert_eq!(refused(&harness, &bytes).await, (400, "bad_request".into()), "{codings}");
    }
    assert!(harness.ads_calls().is_empty(), "{:?}", harness.ads_calls());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 78.
async fn malformed_requests_get_a_bare_rejection() {
    let harness = Harness::set(&[]).await;
    for headers in [
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding:",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: \x0bchunked",
        "X: y\r\n Transfer-Encoding: chunked",
        "Content-Length: 3\r\nContent-Length: 4",
        "Content-Length: +3",
        "Content-Length: 0x3",
        "Content-Length: -1",
        "Content-Length:",
        "Content-Length: 3, 3",
        "Content-Length: 3 3",
        "X: a\0b",
        "X: a\rb",
        ": empty",
        "X y: z",
    ] {
        let (status, code) = refused(&harness, &(posted(headers) + "abc")).await;
        assert_eq!((status, code.as_str()), (400, ""), "{headers:?}");
    }
    for bytes in [
        "POST /x HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /x\r\n\r\n",
        "GET /x HTTP/1.1 \r\nHost: localhost\r\n\r\n",
        "GET  /x HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /x y HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ] {
        assert_eq!(refused(&harness, bytes).await, (400, String::new()), "{bytes:?}");
    }
    assert!(harness.ads_calls().is_empty(), "{:?}", harness.ads_calls());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_length_and_chunked_is_read_as_chunked_and_closes_the_connection() {
    let harness = Harness::set(&[]).await;
    for headers in
        ["Content-Length: 3\r\nTransfer-Encoding: chunked", "Transfer-Encoding: Chunked\r\nContent-Length: 60"]
    {
        let bytes = posted(headers) + "5\r\nabcde\r\n0\r\n\r\n";
        assert_eq!(refused(&harness, &bytes).await, (200, String::new()), "{headers}");
        let seen = harness.seen();
        assert_eq!((seen.target.as_str(), seen.text().as_str()), ("/sandbox/echo", "abcde"));
        assert_eq!((seen.header("content-length"), seen.header("transfer-encoding")), (None, Some("chunked")));
    }
    // Two equal lengths are not ambiguous.
    let equal = harness.send_raw(posted("Content-Length: 3\r\nContent-Length: 3") + "abc").await;
    assert_eq!(equal.status, 200);
    assert_eq!(harness.seen().header_all("content-length").collect::<Vec<_>>(), ["3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_badly_framed_body_never_reaches_amazon_as_a_complete_request() {
    let harness = Harness::set(&[]).await;
    let extension = format!("5;{}\r\nabcde\r\n0\r\n\r\n", "x".repeat(20 << 10));
    for body in [
        "x\r\nabcde\r\n0\r\n\r\n",
        "0x5\r\nabcde\r\n0\r\n\r\n",
        "+5\r\nabcde\r\n0\r\n\r\n",
        "-1\r\nabcde\r\n0\r\n\r\n",
        "_5\r\nabcde\r\n0\r\n\r\n",
        "5 5\r\nabcde\r\n0\r\n\r\n",
        "\r\nabcde\r\n0\r\n\r\n",
        "5\nabcde\n0\n\n",
        "FFFFFFFFFFFFFFFFF\r\nabcde\r\n0\r\n\r\n",
        "3\r\nabcde\r\n0\r\n\r\n",
        "5\r\nabcde0\r\n\r\n",
        "5\r\nabcde\r\n0\r\nX Y\r\n\r\n",
        extension.as_str(),
    ] {
        for first in ["", "4\r\nwxyz\r\n"] {
            harness.sandbox.clear_history();
            let mut wire = harness.dial().await;
            wire.send(format!("{}{first}{body}{SMUGGLED}", posted("Transfer-Encoding: chunked"))).await;
            // A response, if there is one, announces the close; in any case it is the last one.
            let came = wire.everything().await;
            assert!(came.is_empty() || came.starts_with("HTTP/1.1 400 "), "{body:?} {came}");
            assert_eq!(came.matches("HTTP/1.1").count(), usize::from(!came.is_empty()), "{body:?} {came}");
            eventually("no request in flight", || harness.ads_calls().iter().all(|call| call.status.is_none())).await;
            assert!(
                harness.ads_calls().iter().all(|call| !call.complete && call.target == "/sandbox/echo"),
                "{body:?}"
            );
        }
    }
    assert_eq!(harness.get("/sandbox/echo").await.status(), 200);
    assert_eq!(harness.ads_calls().iter().filter(|call| call.complete).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 71.
async fn heads_and_targets_have_a_limit() {
    let harness = Harness::set(&[]).await;
    let head =
        |bytes: usize| format!("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nX-Big: {}\r\n\r\n", "x".repeat(bytes));
    assert_eq!(harness.send_raw(head(20 << 10)).await.status, 200);
    let too_large = (431, "headers_too_large".to_owned());
    assert_eq!(refused(&harness, &head(33 << 10)).await, too_large);
    let many = format!("GET /x HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X: y\r\n".repeat(101));
    assert_eq!(refused(&harness, &many).await, too_large);
    assert_eq!(refused(&harness, &posted("Content-Length: 18446744073709551615")).await, too_large);
    let told = harness.send_raw(head(33 << 10)).await;
    assert_eq!(told.json()["request_id"], told.header("x-request-id").unwrap());
    assert_eq!(told.header("content-type"), Some("application/problem+json"));

    let target = |bytes: usize| format!("GET /sandbox/echo?{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "x".repeat(bytes));
    let room = (8 << 10) - "/sandbox/echo?".len();
    assert_eq!(harness.send_raw(target(room)).await.status, 200);
    assert_eq!(harness.send_raw(target(room + 1)).await.said(), (414, "uri_too_long"));
    for bytes in [20 << 10, 33 << 10, 70 << 10] {
        assert_eq!(harness.send_raw(target(bytes)).await.said(), (414, "uri_too_long"), "{bytes}");
    }
    assert_eq!(harness.ads_calls().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 18.
async fn an_upgrade_request_is_served_as_plain_http() {
    let harness = Harness::set(&[]).await;
    for headers in [
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    ] {
        let answer =
            harness.send_raw(format!("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n")).await;
        assert_eq!(answer.status, 200, "{headers}");
    }
    let mut preface = harness.dial().await;
    preface.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    let came = preface.everything().await;
    assert!(came.is_empty() || came.starts_with("HTTP/1.1 4"), "{came}");
    assert_eq!(harness.ads_calls().len(), 2);
}
