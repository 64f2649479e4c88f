//! What an HTTP/2 server says of the streams that it allows, and what becomes of the requests that came before it did.

use std::time::Duration;

use reqwest::Method;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::connections::{ACK, END_HEADERS, END_STREAM, allows, next_frame, rest_of_frame};
use crate::harness::{Harness, code, eventually};
use crate::http2::{HEADERS, OK, PING, RST_STREAM, frame};
use crate::raw_http::{Scripted, Wire};

/// When the stand-in of the next test says how many streams it allows.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    /// Before anything else, together with the end of the TLS handshake.
    First,
    /// After the first request on the connection.
    AfterARequest,
}

// On one thread, so that all requests have been given to connections before the first of those reads anything: over
// TLS 1.2 the server's settings come with the end of the handshake.
#[tokio::test]
async fn a_request_does_not_wait_for_a_stream_of_a_server_that_has_not_said_how_many_it_allows() {
    const ALLOWED: usize = 3;
    const CALLS: usize = 20;
    for says in [Says::First, Says::AfterARequest] {
        let arrived = tokio::sync::watch::Sender::new(0);
        let counted = arrived.clone();
        let script = move |mut wire: Wire, _| {
            let counted = counted.clone();
            async move {
                if says == Says::First {
                    wire.send(allows(ALLOWED as u8)).await;
                }
                wire.take(24).await;
                // No response until all have come, so each stream is occupied for as long as one request has none.
                let (mut all, mut open) = (counted.subscribe(), Vec::new());
                loop {
                    let head = tokio::select! {
                        head = wire.take(9) => head,
                        () = async { drop(all.wait_for(|arrived| *arrived == CALLS).await) }, if !open.is_empty() => {
                            for stream in open.drain(..) {
                                wire.send(frame(HEADERS, END_STREAM | END_HEADERS, stream, &[OK])).await;
                            }
                            continue;
                        }
                    };
                    match rest_of_frame(&head, &mut wire).await {
                        Some((HEADERS, _, stream)) if open.len() < ALLOWED => {
                            if says == Says::AfterARequest && open.is_empty() {
                                wire.send(allows(ALLOWED as u8)).await;
                            }
                            open.push(stream);
                            counted.send_modify(|arrived| *arrived += 1);
                        }
                        Some((HEADERS, _, stream)) => panic!("stream {stream} beside {open:?}"),
                        Some(_) => {}
                        None => return,
                    }
                }
            }
        };
        let amazon = Scripted::accepting(&[&rustls::version::TLS12], &["h2"], script).await;
        let (relay, opens) = closed_relay(&amazon).await;
        let ca = amazon.ca_file();
        let sets = [
            ("upstream.na", relay.as_str()),
            ("upstream.ca_file", ca.to_str().unwrap()),
            ("upstream.response_timeout", "3s"),
        ];
        let harness = Harness::set(&sets).await;
        let mut calls = JoinSet::new();
        for _ in 0..CALLS {
            calls.spawn(harness.request(Method::POST, "/x").send());
        }
        eventually("all wait for the first connection", async || {
            (harness.metric("adsidecar_requests_in_flight").await == CALLS as f64).then_some(())
        })
        .await;
        opens.send_replace(true);
        for answer in calls.join_all().await {
            assert_eq!(answer.unwrap().status(), 200, "{says:?}, {} arrived", *arrived.borrow());
        }
        assert_eq!(amazon.connections(), CALLS.div_ceil(ALLOWED), "{says:?}: no more connections than it takes");
    }
}

/// A relay that accepts connections, and carries nothing until it is told to open.
async fn closed_relay(server: &Scripted) -> (String, tokio::sync::watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = format!("https://{}", listener.local_addr().unwrap());
    let target = server.origin.trim_start_matches("https://").to_owned();
    let opens = tokio::sync::watch::Sender::new(false);
    let told = opens.clone();
    tokio::spawn(async move {
        loop {
            let mut from = listener.accept().await.unwrap().0;
            let (target, mut told) = (target.clone(), told.subscribe());
            tokio::spawn(async move {
                told.wait_for(|opened| *opened).await.unwrap();
                let mut to = TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    (own, opens)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_say_how_many_streams_it_allows_is_an_error_for_those_who_wait_for_it() {
    for (closes, code_of) in [(false, (504, "upstream_timeout")), (true, (502, "upstream_reset"))] {
        let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, _| async move {
            wire.take(24).await;
            if !closes {
                std::future::pending().await
            }
        })
        .await;
        let harness =
            Harness::before(&amazon, &[("upstream.connect_timeout", "1s"), ("upstream.response_timeout", "2s")]).await;
        let mut calls = JoinSet::new();
        for _ in 0..5 {
            calls.spawn(harness.request(Method::POST, "/x").send());
        }
        let mut said: Vec<_> = Vec::new();
        for answer in calls.join_all().await {
            let answer = answer.unwrap();
            said.push((answer.status().as_u16(), code(&answer).to_owned()));
        }
        assert!(said.iter().any(|(status, code)| (*status, code.as_str()) == code_of), "{said:?}");
        assert!(said.iter().all(|(status, _)| *status == code_of.0), "{said:?}");
        assert!(amazon.connections() <= 15, "{} connections for 5 calls", amazon.connections());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_a_server_leaves_unread_behind_its_response_does_not_occupy_its_stream_for_ever() {
    let stopped = tokio::sync::watch::Sender::new(false);
    let told = stopped.clone();
    let amazon = Scripted::speaking(&["h2"], move |mut wire: Wire, _| {
        let told = told.clone();
        async move {
            wire.take(24).await;
            wire.send(allows(3)).await;
            // Responds as soon as the head is there, and gives no window for the body.
            while let Some((kind, flags, stream)) = next_frame(&mut wire).await {
                match kind {
                    HEADERS => wire.send(frame(HEADERS, END_STREAM | END_HEADERS, stream, &[OK])).await,
                    PING if flags & ACK == 0 => wire.send(frame(PING, ACK, 0, &[0; 8])).await,
                    RST_STREAM => drop(told.send_replace(true)),
                    _ => {}
                }
            }
        }
    })
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let mut wire = harness.dial().await;
    wire.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n").await;
    wire.send(vec![b'x'; 200_000]).await;
    assert_eq!(wire.reply_head().await.status, 200);
    let mut told = stopped.subscribe();
    let reset = tokio::time::timeout(Duration::from_secs(30), told.wait_for(|stopped| *stopped)).await;
    assert!(reset.is_ok(), "the stream is still open");
}
