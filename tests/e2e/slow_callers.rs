//! Callers that read slowly, or whose upload is still running when its answer is there: nothing is written into the
//! middle of an answer, nobody who moves is given up, and nobody keeps a connection for ever.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::TcpSocket;
use world::pseudo_random_bytes;

use crate::harness::{Harness, eventually};
use crate::http2::harness_with;
use crate::raw_http::{Scripted, Wire};

const EARLY: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly";
const CALL: &str = "GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// An Amazon that answers a POST at once, and reads its body of `length` bytes afterwards.
async fn hasty(length: usize) -> Scripted {
    Scripted::start(move |mut wire, _| async move {
        while let Some(head) = wire.head().await {
            wire.send(EARLY).await;
            if head.starts_with("POST") {
                wire.take(length).await;
            }
        }
    })
    .await
}

/// A connection whose caller takes in little at a time.
async fn narrow(address: SocketAddr) -> Wire {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    Wire::over(socket.connect(address).await.unwrap())
}

fn upload(length: usize) -> String {
    format!("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn no_408_follows_an_early_answer_while_its_upload_runs() {
    let amazon = hasty(1000).await;
    let harness = Harness::before(&amazon, &[("proxy.header_timeout", "100ms"), ("proxy.idle_timeout", "200ms")]).await;
    let mut wire = harness.dial().await;
    wire.send(upload(1000)).await;
    assert_eq!(wire.reply().await.text(), "early");
    // Longer than both limits, which count from the end of the upload.
    let begun = Instant::now();
    for _ in 0..50 {
        wire.send([b'x'; 20]).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(begun.elapsed() > Duration::from_millis(400));
    wire.send(CALL).await;
    let next = wire.reply().await;
    assert_eq!((next.said(), next.text().as_str()), ((200, ""), "early"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_into_the_body_of_a_slow_reader() {
    const SIZE: usize = 1 << 20;
    let harness = Harness::set(&[("proxy.header_timeout", "50ms"), ("proxy.idle_timeout", "50ms")]).await;
    let mut wire = narrow(harness.proxy_address()).await;
    wire.send(format!("GET /sandbox/bytes/{SIZE} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
    assert_eq!(wire.reply_head().await.status, 200);
    wire.send("GET /x HTTP/1.1\r\nX-Slow: ").await;
    let (mut body, whole) = (Vec::new(), pseudo_random_bytes(SIZE));
    while body.len() < SIZE {
        // During one of these pauses adsidecar holds only the end of the body, and the next head is late already.
        wire.send("x").await;
        tokio::time::sleep(Duration::from_millis(120)).await;
        let piece = wire.take((32 << 10).min(SIZE - body.len())).await;
        assert!(!piece.is_empty(), "the connection was closed after {} bytes", body.len());
        body.extend(piece);
        assert!(body == whole[..body.len()], "{}", String::from_utf8_lossy(&body[body.len() - 300..]));
    }
    assert_eq!(wire.reply().await.said(), (408, "request_timeout"), "that is said behind the body");
    assert!(wire.closes().await);
}

/// Then their responses are set aside, and written without hyper.
// Covers: threat 25.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_pauses_in_the_middle_of_its_responses_gets_every_byte_of_them_and_of_those_that_follow() {
    const SIZE: usize = 300_000;
    for http2 in ["never", "always"] {
        let harness = harness_with(http2, &[]).await;
        let whole = pseudo_random_bytes(SIZE);
        let mut callers = Vec::new();
        for _ in 0..100 {
            let mut wire = narrow(harness.proxy_address()).await;
            let request = format!("GET /sandbox/bytes/{SIZE} HTTP/1.1\r\nHost: localhost\r\n\r\n");
            wire.send(request.clone() + &request).await;
            callers.push(wire);
        }
        // What is tested takes a quarter of a second in which a caller reads nothing.
        tokio::time::sleep(Duration::from_secs(1)).await;
        for (number, wire) in callers.iter_mut().enumerate() {
            assert_eq!(wire.reply_head().await.status, 200);
            let mut body = wire.take(SIZE / 2).await;
            if number % 10 == 0 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            body.extend(wire.take(SIZE - SIZE / 2).await);
            assert!(body == whole, "{http2}: caller {number}");
            let next = wire.reply().await;
            assert_eq!(next.status, 200);
            assert!(next.body == whole, "{http2}: the next response of caller {number}");
        }
        let last = callers.last_mut().unwrap();
        last.send(CALL).await;
        assert_eq!(last.reply().await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_does_not_free_the_seat_of_its_upload_and_its_end_does() {
    let amazon = hasty(1000).await;
    let harness = Harness::before(&amazon, &[("proxy.max_connections", "1")]).await;
    let mut first = harness.dial().await;
    first.send(upload(1000)).await;
    assert_eq!(first.reply().await.text(), "early");
    let mut second = harness.dial().await;
    second.send(CALL).await;
    assert_eq!(second.reply().await.said(), (503, "overloaded"), "the limit of connections holds");
    // The rest of the upload never comes: the connection is closed, and there is room again.
    let begun = Instant::now();
    assert!(first.closes().await);
    assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
    let mut third = harness.dial().await;
    third.send(CALL).await;
    assert_eq!(third.reply().await.text(), "early");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_may_send_all_of_its_upload_before_it_reads_a_long_answer_that_came_early() {
    // More than the sockets on the way take.
    const LONG: usize = 24 << 20;
    let amazon = Scripted::start(|mut wire, _| async move {
        while wire.head().await.is_some() {
            wire.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {LONG}\r\n\r\n")).await;
            wire.floods(&vec![b'y'; LONG]).await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let mut wire = narrow(harness.proxy_address()).await;
    wire.send(upload(LONG)).await;
    let sent = tokio::time::timeout(Duration::from_secs(20), wire.sends(&vec![b'x'; LONG])).await;
    assert_eq!(sent, Ok(true), "the upload stood still");
    let reply = wire.reply().await;
    assert!(reply.whole && reply.body.len() == LONG, "{:?}", reply.said());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_does_not_run_for_ever_after_its_answer() {
    let amazon = hasty(usize::MAX).await;
    let harness = Harness::before(&amazon, &[]).await;
    let before = connections(&harness).await;
    let mut wire = harness.dial().await;
    wire.send("POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    assert_eq!(wire.reply().await.text(), "early");
    let chunk = [b"10000\r\n".as_slice(), &[b'x'; 64 << 10], b"\r\n"].concat();
    let begun = Instant::now();
    while wire.sends(&chunk).await {
        assert!(begun.elapsed() < Duration::from_secs(9), "the upload is still read");
    }
    eventually("its slot to be free", async || (connections(&harness).await <= before).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_does_not_wait_for_an_upload_that_has_its_answer() {
    let amazon = hasty(1000).await;
    let mut harness = Harness::before(&amazon, &[]).await;
    let mut wire = harness.dial().await;
    wire.send(upload(1000)).await;
    assert_eq!(wire.reply().await.text(), "early");
    let begun = Instant::now();
    harness.stop_sidecar().await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
// The time that a caller with a full receive buffer at this speed used to be given was 34 seconds.
async fn a_caller_that_reads_slowly_is_not_given_up() {
    const SIZE: usize = 12 << 20;
    const PER_SECOND: usize = 120 << 10;
    let harness = Harness::set(&[("proxy.write_timeout", "4s")]).await;
    let mut wire = harness.dial().await;
    wire.send(format!("GET /sandbox/bytes/{SIZE} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
    assert_eq!(wire.reply_head().await.status, 200);
    let begun = Instant::now();
    let mut body = Vec::new();
    while begun.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let piece = wire.take(PER_SECOND / 10).await;
        assert_eq!(piece.len(), PER_SECOND / 10, "given up after {:?}", begun.elapsed());
        body.extend(piece);
    }
    body.extend(wire.take(SIZE - body.len()).await);
    assert!(body == pseudo_random_bytes(SIZE), "{} bytes", body.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_of_http_1_0_sees_a_break_as_a_break() {
    // Without a length, the end of the connection is the end of the body for a caller of HTTP/1.0.
    let amazon = Scripted::start(|mut wire, _| async move {
        let head = wire.head().await.unwrap_or_default();
        wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
        if head.contains("/whole") {
            wire.send("0\r\n\r\n").await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    for (path, whole) in [("/whole", true), ("/broken", false)] {
        let mut wire = harness.dial().await;
        wire.send(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")).await;
        let (came, clean) = wire.until_it_ends().await;
        assert_eq!(clean, whole, "{path}: {came}");
        assert!(!whole || came.ends_with("\r\n\r\nhalf"), "{came}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_ends_the_body_of_a_caller_of_http_1_0_by_a_reset() {
    let mut harness = Harness::set(&[("shutdown.drain", "200ms")]).await;
    let mut wire = harness.dial().await;
    wire.send("GET /sandbox/bytes/1000000000?chunked=1 HTTP/1.0\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(wire.reply_head().await.status, 200);
    harness.stop_sidecar().await;
    drop(harness);
    let (_, clean) = wire.until_it_ends().await;
    assert!(!clean, "the truncated body looks whole");
}

/// The number of open connections to the proxy listener.
async fn connections(harness: &Harness) -> f64 {
    harness.metric("adsidecar_connections{door=\"proxy\"}").await
}
