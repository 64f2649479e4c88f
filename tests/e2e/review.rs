//! Regressions: a grant whose caller disconnects, a request whose token expires, a connection at the limit.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use adsidecar::app::App;
use adsidecar::config::{self, Sources};
use reqwest::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use world::{Fault, Listener, Rule};

use crate::harness::{Harness, code, eventually, json};

/// Runs a sidecar on the harness's configuration and store with additional settings. Returns its proxy address.
async fn sidecar_with(harness: &Harness, env: &[(&str, &str)], sets: &[(&str, &str)]) -> SocketAddr {
    let own = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let sources = Sources { file: Some(harness.config_file()), env: own(env), sets: own(sets) };
    let config = config::load(&sources).unwrap_or_else(|problems| panic!("{problems}"));
    let app = App::build(config, harness.clock.clone(), None).await.unwrap();
    let proxy = app.addresses().proxy[0];
    tokio::spawn(app.run(std::future::pending()));
    proxy
}

async fn ask(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut buffer).await.unwrap_or(0);
        if count == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_that_disconnects_during_the_exchange_loses_no_grant() {
    let harness = Harness::start().await;
    let begun = json(harness.get("/api/auth/amazon/login").await).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let mut browser = TcpStream::connect(harness.proxy_address()).await.unwrap();
    browser.write_all(format!("GET {callback} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.unwrap();
    gate.reached(1).await;
    drop(browser);
    // The listener has noticed once it no longer counts the connection; this request's own connection counts.
    while harness.metric("adsidecar_connections{door=\"proxy\"}").await > 1.0 {
        tokio::task::yield_now().await;
    }
    gate.release();
    eventually("the grant", async || (harness.status_of("default").await["state"] == "fresh").then_some(())).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_401_for_a_token_that_expired_in_flight_is_retried_too() {
    // Prevents the background from refreshing first.
    let harness = Harness::with("[refresh]\nidle_after = \"1m\"\n").await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let call = tokio::spawn(harness.request(Method::GET, "/v2/profiles").send());
    gate.reached(1).await;
    harness.sandbox.world(|world| world.expire_access_tokens());
    harness.advance(3601);
    gate.release();
    let answer = call.await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_401s_share_one_forced_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.world(|world| world.expire_access_tokens());
    let before = harness.sandbox.refreshes();
    let calls: Vec<_> = (0..64).map(|_| tokio::spawn(harness.request(Method::GET, "/v2/profiles").send())).collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().status(), 200);
    }
    assert_eq!(harness.sandbox.refreshes() - before, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configured_refresh_token_replaces_a_stored_grant_that_lwa_rejects() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.world(|world| {
        world.revoke_all();
        world.expire_access_tokens();
    });
    let good = harness.sandbox.grant().refresh_token;
    harness.advance(3601);
    harness.stop_sidecar().await;
    let proxy = sidecar_with(&harness, &[("AMAZON_REFRESH_TOKEN", &good)], &[]).await;
    eventually("a call with the configured token", async || {
        let response = harness.client.get(format!("http://{proxy}/v2/profiles")).send().await.unwrap();
        (response.status() == 200).then_some(())
    })
    .await;
    assert_eq!(harness.client.get(format!("http://{proxy}/v2/profiles")).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_could_not_be_stored_is_used_and_stored_later() {
    let mut harness = Harness::with("[login]\nconfirm = true\n").await;
    let begun = json(harness.get("/api/auth/amazon/login").await).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    let pending = json(harness.get(&callback).await).await;
    assert_eq!(pending["status"], "pending");
    let confirm = format!("/api/auth/amazon/confirm?grant={}", pending["grant"].as_str().unwrap());
    let mut copies = harness.store_path().into_os_string();
    copies.push(".copies");
    let away = harness.directory.path().join("away");
    std::fs::rename(&copies, &away).unwrap();
    assert_eq!(harness.post(&confirm).await.status(), 200);
    assert_eq!(
        harness.get("/v2/profiles").await.status(),
        200,
        "its code is consumed, so the grant is used from memory"
    );
    assert_eq!(harness.client.get(harness.admin_url("/readyz")).send().await.unwrap().status(), 503);
    std::fs::rename(&away, &copies).unwrap();
    let ready =
        async { while harness.client.get(harness.admin_url("/readyz")).send().await.unwrap().status() != 200 {} };
    tokio::time::timeout(Duration::from_secs(10), ready).await.expect("the store to recover");
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.post(&confirm).await.status(), 400, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_endpoint_accepts_the_caller_token_in_every_header() {
    let harness =
        Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\ncaller_token = \"knock-knock-knock-knock\"\n").await;
    let form = "grant_type=refresh_token&client_id=x&client_secret=amazons-own&refresh_token=y";
    let ask = || harness.request(Method::POST, "/auth/o2/token").body(form);
    let refused = ask().send().await.unwrap();
    assert_eq!((refused.status().as_u16(), code(&refused)), (407, "caller_unauthorized"));
    let answer = ask().header("x-ads-sidecar-token", "knock-knock-knock-knock").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    // As with HTTP_PROXY=http://ads:<token>@….
    let basic = "Basic YWRzOmtub2NrLWtub2NrLWtub2NrLWtub2Nr";
    let answer = ask().header("proxy-authorization", basic).send().await.unwrap();
    assert_eq!(json(answer).await["access_token"], "knock-knock-knock-knock");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_accepts_an_event_stream_gets_the_long_timeout() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let proxy = sidecar_beside(&harness, &[("upstream.response_timeout", "200ms")]).await;
    harness.sandbox.set_fault(Rule::from(Fault::Delay { ms: 800 }).on("/mcp").next(2));
    let url = format!("http://{proxy}/mcp");
    let late = harness.client.post(&url).header("accept", "application/json").send().await.unwrap();
    assert_eq!((late.status().as_u16(), code(&late)), (504, "upstream_timeout"));
    let mcp = harness.client.post(&url).header("accept", "application/json, text/event-stream").send().await.unwrap();
    assert_eq!(code(&mcp), "");
}

/// Like [`sidecar_with`], on its own store with a grant.
async fn sidecar_beside(harness: &Harness, sets: &[(&str, &str)]) -> SocketAddr {
    let token = harness.sandbox.grant().refresh_token;
    let store = harness.directory.path().join("beside");
    let mut all = vec![("store.path", store.to_str().unwrap())];
    all.extend_from_slice(sets);
    sidecar_with(harness, &[("AMAZON_REFRESH_TOKEN", &token)], &all).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_only_at_the_connection_limit() {
    let harness = Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\nmax_connections = 2\n").await;
    let request = "GET /api/auth/amazon/status HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut first = TcpStream::connect(harness.proxy_address()).await.unwrap();
    assert_eq!(ask(&mut first, request).await, "HTTP/1.1 200 OK");
    let mut second = TcpStream::connect(harness.proxy_address()).await.unwrap();
    assert_eq!(ask(&mut second, request).await, "HTTP/1.1 200 OK");
    assert_eq!(ask(&mut first, request).await, "HTTP/1.1 200 OK", "its slot is not needed");
    let mut third = TcpStream::connect(harness.proxy_address()).await.unwrap();
    assert_eq!(ask(&mut third, request).await, "HTTP/1.1 200 OK");
    let mut still_open = Vec::new();
    for stream in [&mut first, &mut second] {
        still_open.push(!ask(stream, request).await.is_empty());
    }
    still_open.sort_unstable();
    assert_eq!(still_open, [false, true], "one of the two was closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_head_does_not_delay_the_shutdown() {
    let mut harness = Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\nheader_timeout = \"300ms\"\n").await;
    let mut slow = TcpStream::connect(harness.proxy_address()).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nHost: loc").await.unwrap();
    while harness.metric("adsidecar_connections{door=\"proxy\"}").await < 1.0 {
        tokio::task::yield_now().await;
    }
    let ended = harness.begin_stop();
    // Far below shutdown.drain, which is 25 s.
    tokio::time::timeout(Duration::from_secs(10), ended).await.expect("nothing is in flight").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ambiguous_framing_is_rejected_under_any_host() {
    let harness = Harness::start().await;
    let address = harness.admin_url("").strip_prefix("http://").unwrap().to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = "GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(ask(&mut stream, request).await, "HTTP/1.1 400 Bad Request");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_frontend_can_read_the_error_of_an_endpoint() {
    let harness = Harness::with("[login]\nfrontend_url = \"https://app.example\"\n").await;
    for (method, path, status) in [
        (Method::POST, "/api/auth/amazon/refresh", 401),
        (Method::GET, "/api/auth/amazon/status?user_id=%20", 400),
        (Method::GET, "/api/auth/amazon/logout", 405),
        (Method::GET, "/api/auth/nothing", 404),
    ] {
        let refused = harness.request(method, path).header("origin", "https://app.example").send().await.unwrap();
        assert_eq!(refused.status(), status, "{path}");
        assert_eq!(refused.headers()["access-control-allow-origin"], "https://app.example", "{path}");
        assert_eq!(refused.headers()["referrer-policy"], "no-referrer", "{path}");
        assert_eq!(refused.headers()["x-content-type-options"], "nosniff", "{path}");
    }
    let foreign = harness.request(Method::POST, "/api/auth/amazon/refresh").header("origin", "https://evil.example");
    let foreign = foreign.send().await.unwrap();
    assert_eq!((foreign.status().as_u16(), code(&foreign)), (403, "cross_site"));
    assert!(!foreign.headers().contains_key("access-control-allow-origin"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsent_post_is_retried_on_another_connection() {
    let harness = Harness::start().await;
    let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = harness.sandbox.origin(Listener::Na);
    let (host, port) = origin.strip_prefix("https://").unwrap().rsplit_once(':').unwrap();
    let na = format!("https://{host}:{}", front.local_addr().unwrap().port());
    let amazon = format!("127.0.0.1:{port}");
    let taken = Arc::new(AtomicUsize::new(0));
    tokio::spawn({
        let taken = taken.clone();
        async move {
            while let Ok((mut near, _)) = front.accept().await {
                // The first connection is closed during the TLS handshake.
                if taken.fetch_add(1, SeqCst) > 0 {
                    let mut far = TcpStream::connect(&amazon).await.unwrap();
                    tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
                }
            }
        }
    });
    let proxy = sidecar_beside(&harness, &[("upstream.na", &na)]).await;
    let url = format!("http://{proxy}/sandbox/echo");
    let answer = harness.client.post(&url).header("content-type", "text/plain").body("a body").send().await.unwrap();
    // The sandbox rejects the port of the listener in front of it, but that is a response too.
    assert_eq!(code(&answer), "");
    assert_eq!(taken.load(SeqCst), 2);
    assert_eq!(harness.sandbox.last().unwrap().text(), "a body");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chunked_body_of_a_get_passes() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let request = b"GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\
        Connection: close\r\n\r\n6\r\na body\r\n0\r\n\r\n";
    let answer = harness.raw(request, None).await;
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(harness.sandbox.last().unwrap().text(), "a body");
}

#[tokio::test(flavor = "multi_thread")]
async fn protocols_are_not_switched() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let switched = Fault::Status { code: 101, headers: vec![("upgrade".into(), "x".into())], body: String::new() };
    harness.sandbox.set_fault(Rule::from(switched).at(Listener::Na));
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (502, "upstream_reset"));
}
