//! The meaning of Amazon's 401, determined from its body in any encoding: a scope that the token does not cover passes
//! with a hint, and anything else is treated as an invalid token.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flate2::Compression;
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

use crate::harness::{Harness, eventually};
use crate::raw_http::{Reply, Scripted, Wire};
use crate::throttle::waiting_bytes;

const SCOPE: &[u8] = br#"{"code":"401","details":"Not authorized to access scope 123"}"#;
const TOKEN: &[u8] = br#"{"message":"Unauthorized"}"#;

/// The caller's response if Amazon responds to every request with a 401 with this body, and the numbers of calls to
/// Amazon and LWA.
async fn refused(coding: &str, body: Vec<u8>) -> (Reply, usize, u64) {
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = asked.clone();
    let coding = if coding.is_empty() { String::new() } else { format!("Content-Encoding: {coding}\r\n") };
    let head = format!("HTTP/1.1 401 Unauthorized\r\n{coding}Content-Length: {}\r\n\r\n", body.len());
    let amazon = Scripted::start(move |mut wire: Wire, _| {
        let (count, head, body) = (count.clone(), head.clone(), body.clone());
        async move {
            while wire.head().await.is_some() {
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                wire.send(&head).await;
                wire.send(&body).await;
            }
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let reply = harness.send_raw("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    (reply, asked.load(std::sync::atomic::Ordering::SeqCst), harness.sandbox.refreshes())
}

pub fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn zlib(text: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn deflate(text: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// One stored block (RFC 7932, section 9.2), then the empty last block.
fn brotli(text: &[u8]) -> Vec<u8> {
    let head = ((u32::try_from(text.len()).unwrap() - 1) << 4) | 1 << 20;
    [&head.to_le_bytes()[..3], text, &[3]].concat()
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 29.
async fn a_scope_failure_is_read_through_compression_and_passes_byte_for_byte() {
    for (coding, body) in [
        ("", SCOPE.to_vec()),
        ("gzip", gzip(SCOPE)),
        ("GZip", gzip(SCOPE)),
        ("x-gzip", gzip(SCOPE)),
        ("deflate", zlib(SCOPE)),
        ("deflate", deflate(SCOPE)),
        ("br", brotli(SCOPE)),
    ] {
        let (reply, calls, refreshes) = refused(coding, body.clone()).await;
        assert_eq!(
            (reply.said(), reply.header("x-adsidecar-hint")),
            ((401, ""), Some("scope_not_authorized")),
            "{coding}"
        );
        assert_eq!((reply.body == body, reply.whole), (true, true), "{coding}");
        assert_eq!(reply.header("content-encoding"), Some(coding).filter(|coding| !coding.is_empty()));
        assert_eq!((calls, refreshes), (1, 0), "{coding}: passed on immediately");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_other_401_causes_one_forced_refresh_one_retry_and_then_passes() {
    for (coding, body) in [
        ("", TOKEN.to_vec()),
        ("", Vec::new()),
        ("gzip", gzip(TOKEN)),
        ("gzip", b"no gzip at all".to_vec()),
        ("br", SCOPE.iter().rev().copied().collect()),
    ] {
        let (reply, calls, refreshes) = refused(coding, body.clone()).await;
        assert_eq!((reply.said(), reply.header("x-adsidecar-hint")), ((401, ""), None), "{coding}");
        assert!(reply.body == body && reply.whole, "{coding}");
        assert_eq!((calls, refreshes), (2, 1), "{coding}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_first_64_kib_of_a_rejection_are_inspected_and_all_of_it_passes() {
    let mut early = SCOPE.to_vec();
    early.resize(1 << 20, b' ');
    let (reply, calls, refreshes) = refused("", early.clone()).await;
    assert_eq!((reply.header("x-adsidecar-hint"), calls, refreshes), (Some("scope_not_authorized"), 1, 0));
    assert!(reply.body == early && reply.whole);
    let mut late = vec![b' '; 512 << 10];
    late.extend_from_slice(SCOPE);
    let (reply, calls, refreshes) = refused("", late.clone()).await;
    assert_eq!((reply.header("x-adsidecar-hint"), calls, refreshes), (None, 2, 1));
    assert!(reply.body == late && reply.whole);
    // A small body that inflates to a huge one is not inflated completely.
    let mut bomb = vec![b' '; 8 << 20];
    bomb.extend_from_slice(SCOPE);
    let (reply, calls, refreshes) = refused("gzip", gzip(&bomb)).await;
    assert_eq!((reply.header("x-adsidecar-hint"), calls, refreshes), (None, 2, 1));
}

/// The reply to a request that Amazon answers with this head, and with a body that quotes the access token three times,
/// in chunks of `size` bytes.
async fn quoted(head: &'static str, pack: fn(&[u8]) -> Vec<u8>, size: usize) -> Reply {
    let amazon = Scripted::start(move |mut wire: Wire, _| async move {
        while let Some(request) = wire.head().await {
            let token = request.split("Bearer Atza|").nth(1).unwrap().split("\r\n").next().unwrap().to_owned();
            let body = format!("'Atza|{token}' is not valid in 'Bearer Atza|{token}' or Atza%7C{token}.");
            let body = pack(body.as_bytes());
            wire.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
            for part in body.chunks(size) {
                wire.send(format!("{:x}\r\n", part.len())).await;
                wire.send(part).await;
                wire.send("\r\n").await;
            }
            wire.send("0\r\n\r\n").await;
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    harness.send_raw("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_refusal_of_amazons_quotes_the_access_token() {
    let plain: fn(&[u8]) -> Vec<u8> = <[u8]>::to_vec;
    for (status, coding, pack, size) in [
        ("400 Bad Request", "", plain, 7),
        ("401 Unauthorized", "", plain, 1),
        ("403 Forbidden", "", plain, 100),
        ("404 Not Found", "Content-Encoding: identity\r\n", plain, 100_000),
        ("429 Too Many Requests", "Content-Encoding: gzip\r\n", gzip, 9),
        ("401 Unauthorized", "Content-Encoding: gzip\r\n", gzip, 9),
        ("403 Forbidden", "Content-Encoding: deflate\r\n", zlib, 9),
        ("403 Forbidden", "Content-Encoding: br\r\n", brotli, 100),
    ] {
        let head: &'static str = format!("HTTP/1.1 {status}\r\n{coding}").leak();
        let reply = quoted(head, pack, size).await;
        let text = reply.text();
        let stars = text.bytes().filter(|byte| *byte == b'*').count();
        assert!(reply.whole && text.starts_with("'Atza|***") && text.ends_with("*."), "{status} {coding}: {reply:?}");
        // Everything but the token's characters is Amazon's.
        assert_eq!(text.replace('*', ""), "'Atza|' is not valid in 'Bearer Atza|' or Atza%7C.", "{status} {coding}");
        assert!(stars > 300 && stars % 3 == 0, "{stars}");
        let inflated = !coding.is_empty() && !coding.contains("identity");
        assert_eq!(reply.header("content-encoding").is_none(), inflated || coding.is_empty(), "{coding}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_a_request_that_waited_quotes_neither_its_first_token_nor_its_last() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let amazon = Scripted::start(move |mut wire: Wire, _| {
        let count = count.clone();
        async move {
            while let Some(request) = wire.head().await {
                let token = request.split("Bearer ").nth(1).unwrap().split("\r\n").next().unwrap();
                let body = format!("not a token: {token}");
                let (status, more) = match count.fetch_add(1, Ordering::SeqCst) {
                    0 => ("429 Too Many Requests", "Retry-After: 5\r\n"),
                    _ => ("400 Bad Request", ""),
                };
                let head = format!("HTTP/1.1 {status}\r\n{more}Content-Length: {}\r\n\r\n", body.len());
                wire.send(head + &body).await;
            }
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[("throttle.mode", "queue")]).await;
    let mut wire = harness.dial().await;
    wire.send("GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    eventually("it waits", async || (waiting_bytes(&harness).await > 0.0).then_some(())).await;
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200, "its next token is another one");
    harness.advance(6);
    let reply = wire.reply().await;
    let stars = reply.text().bytes().filter(|byte| *byte == b'*').count();
    assert!(reply.status == 400 && reply.text().starts_with("not a token: Atza|***") && stars > 100, "{reply:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

/// The text in blocks that are not compressed (RFC 7932, section 9.2).
fn long_brotli(text: &[u8]) -> Vec<u8> {
    let mut blocks = text.chunks(1 << 16);
    let mut packed = brotli(blocks.next().unwrap());
    assert_eq!(packed.pop(), Some(3), "the end");
    for block in blocks {
        let head = ((u32::try_from(block.len()).unwrap() - 1) << 3) | 1 << 19;
        packed.extend([&head.to_le_bytes()[..3], block].concat());
    }
    packed.push(3);
    packed
}

#[tokio::test(flavor = "multi_thread")]
async fn no_compressed_refusal_is_too_long_to_be_searched_for_the_token() {
    type Pack = fn(&[u8]) -> Vec<u8>;
    /// Text that does not become shorter, with the quote behind it.
    fn behind_noise(quote: &[u8]) -> Vec<u8> {
        let mut state = 1_u64;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            b'!' + (state >> 58) as u8
        });
        noise.take(300_000).chain(quote.iter().copied()).collect()
    }
    let packs: [(&str, Pack); 3] = [
        ("gzip", |quote| gzip(&behind_noise(quote))),
        ("deflate", |quote| zlib(&behind_noise(quote))),
        ("br", |quote| long_brotli(&behind_noise(quote))),
    ];
    for (coding, pack) in packs {
        for status in ["400 Bad Request", "401 Unauthorized"] {
            let head: &'static str = format!("HTTP/1.1 {status}\r\nContent-Encoding: {coding}\r\n").leak();
            let reply = quoted(head, pack, 10_000).await;
            let text = reply.text();
            assert!(reply.whole && text.len() > 300_000, "{status} {coding}: {}", text.len());
            let said = text[300_000..].replace('*', "");
            assert_eq!(said, "'Atza|' is not valid in 'Bearer Atza|' or Atza%7C.", "{status} {coding}");
            assert_eq!(reply.header("content-encoding"), None);
        }
    }
    // What breaks off inside the compressed text is broken off.
    let reply = quoted(
        "HTTP/1.1 400 Bad Request\r\nContent-Encoding: gzip\r\n",
        |quote| {
            let mut packed = gzip(&behind_noise(quote));
            packed.truncate(packed.len() - 100);
            packed
        },
        10_000,
    )
    .await;
    assert!(!reply.whole && reply.text().len() > 100_000, "{}", reply.text().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejection_that_does_not_end_is_judged_by_what_came_in_its_first_seconds() {
    let asked = tokio::sync::watch::Sender::new(0);
    let count = asked.clone();
    let amazon = Scripted::start(move |mut wire: Wire, _| {
        let (count, mut again) = (count.clone(), count.subscribe());
        async move {
            while wire.head().await.is_some() {
                count.send_modify(|asked| *asked += 1);
                if *count.borrow() > 1 {
                    wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
                    continue;
                }
                wire.send("HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n").await;
                // One byte at a time, until the request comes once more.
                let dripped = async {
                    while wire.sends(b"1\r\n \r\n").await {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                };
                tokio::select! {
                    () = dripped => {}
                    _ = again.wait_for(|asked| *asked > 1) => {}
                }
                return;
            }
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let answer = tokio::time::timeout(Duration::from_secs(30), harness.get("/x")).await.expect("it is judged");
    assert_eq!((answer.status().as_u16(), *asked.borrow()), (200, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_refusal_is_not_searched() {
    let plain: fn(&[u8]) -> Vec<u8> = <[u8]>::to_vec;
    for head in ["HTTP/1.1 200 OK\r\n", "HTTP/1.1 207 Multi-Status\r\n"] {
        let reply = quoted(head, plain, 50).await;
        assert!(!reply.text().contains('*'), "{reply:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_refusal_without_the_token_passes_byte_for_byte() {
    let (reply, calls, _) = refused("gzip", gzip(TOKEN)).await;
    assert_eq!((reply.body, reply.whole, calls), (gzip(TOKEN), true, 2));
}
