//! Tokens: the shim that hands out none, and the keeper that has one ready before anybody needs it.

use std::time::{Duration, Instant};

use adsidecar::domain::clock::Clock;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use reqwest::{Method, Response};
use serde_json::{Value, json as object};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use world::{CLIENT_SECRET, Door, Fault, Rule, pseudo_random_bytes};

use crate::harness::{Harness, code, eventually, header, json};

const SHIM: &str = "/auth/o2/token";
const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGOUT: &str = "/api/auth/amazon/logout";
/// Users fall idle so early that the background leaves the renewal to callers.
const IDLE: &str = "[refresh]\nidle_after = \"1m\"\nsweep = \"1h\"\n";

fn basic(secret: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{}:{secret}", "amzn1.application-oa2-client.x")))
}

/// The four ways in which SDKs send their client secret.
async fn ask_shim(harness: &Harness, secret: &str) -> Vec<Response> {
    let url = harness.proxy_url(SHIM);
    let form =
        [("grant_type", "refresh_token"), ("refresh_token", "Atzr|x"), ("client_id", "x"), ("client_secret", secret)];
    let query = reqwest::Url::parse_with_params(&url, form).unwrap();
    let document = object!({ "grant_type": "refresh_token", "client_secret": secret }).to_string();
    let requests = [
        harness.client.post(&url).form(&form),
        harness.client.post(&url).header("content-type", "application/json").body(document),
        harness.client.post(query),
        harness.client.post(&url).header("authorization", basic(secret)).form(&form[..2]),
    ];
    let mut answers = Vec::new();
    for request in requests {
        answers.push(request.send().await.unwrap());
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_is_switched_off_is_not_there() {
    let harness = Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\ntoken_shim = false\n").await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for answer in ask_shim(&harness, "x").await {
        assert_eq!((answer.status().as_u16(), code(&answer)), (404, "not_found"));
    }
    assert_eq!(harness.sandbox.history().len(), 0, "and what was meant for it stays here");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shim_asks_for_the_caller_token_and_gives_it_back() {
    let harness =
        Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\ncaller_token = \"first-token,second-token\"\n").await;
    for secret in ["wrong", "first-toke", ""] {
        for answer in ask_shim(&harness, secret).await {
            assert_eq!((answer.status().as_u16(), code(&answer)), (407, "caller_unauthorized"));
        }
    }
    for secret in ["first-token", "second-token"] {
        for answer in ask_shim(&harness, secret).await {
            assert_eq!(answer.status(), 200);
            let tokens = json(answer).await;
            assert_eq!(tokens["access_token"], secret, "the SDK's next calls show it as their bearer");
            assert_ne!(tokens["refresh_token"], secret);
        }
    }
    let begun =
        harness.request(Method::GET, "/api/auth/amazon/login").bearer_auth("second-token").send().await.unwrap();
    let callback = harness.consent(json(begun).await["auth_url"].as_str().unwrap()).await;
    assert_eq!(harness.get(&callback).await.status(), 200);
    let call = harness.request(Method::GET, "/v2/profiles").bearer_auth("first-token").send().await.unwrap();
    assert_eq!(call.status(), 200);
    assert!(harness.sandbox.last().unwrap().header("authorization").unwrap().starts_with("Bearer Atza|"));

    // Who shows the caller token as any other call does may keep its own client secret.
    for (name, value) in [("x-ads-sidecar-token", "first-token"), ("proxy-authorization", "Bearer second-token")] {
        let answer = harness.request(Method::POST, SHIM).header(name, value).form(&[("client_secret", "amazons")]);
        assert_eq!(answer.send().await.unwrap().status(), 200, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shim_hands_out_a_placeholder_that_the_proxy_overwrites() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    for answer in ask_shim(&harness, "amzn1.oa2-cs.v1.real-looking").await {
        assert_eq!(answer.status(), 200);
        assert_eq!(header(&answer, "cache-control"), "no-store");
        let tokens = json(answer).await;
        assert_eq!((&tokens["token_type"], &tokens["expires_in"]), (&Value::from("bearer"), &Value::from(3600)));
        let placeholder = tokens["access_token"].as_str().unwrap();
        assert!(!placeholder.starts_with("Atza|") && !placeholder.contains("oa2-cs"));
        let call = harness.request(Method::GET, "/v2/profiles").bearer_auth(placeholder).send().await.unwrap();
        assert_eq!(call.status(), 200);
        let sent = harness.sandbox.last().unwrap();
        assert!(sent.header("authorization").unwrap().starts_with("Bearer Atza|"));
        assert!(!sent.header("authorization").unwrap().contains(placeholder));
    }
    // As a forward proxy, for Amazon's own host of it, and under an account's prefix.
    for (target, host) in
        [("http://api.amazon.com/auth/o2/token", "api.amazon.com"), ("/a/default/auth/o2/token", "localhost")]
    {
        let request =
            format!("POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        let answer = harness.raw(request.as_bytes(), None).await;
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(harness.sandbox.refreshes(), 0, "LWA was not asked once");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_renews_fifteen_minutes_ahead_without_any_caller() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let status = harness.status_of("default").await;
    let due: Timestamp = status["next_refresh_at"].as_str().unwrap().parse().unwrap();
    let ends: Timestamp = status["expires_at"].as_str().unwrap().parse().unwrap();
    let ahead = ends.duration_since(due).as_secs();
    assert!((900..=1080).contains(&ahead), "15 minutes ahead, spread over three more: {ahead} s");
    let wait = due.duration_since(harness.clock.now()).as_secs();
    harness.advance(wait - 1);
    assert_eq!(harness.status_of("default").await["state"], "fresh");
    assert_eq!(harness.sandbox.refreshes(), 0);
    harness.advance(2);
    let renewed = eventually("the renewal", async || {
        let status = harness.status_of("default").await;
        (status["expires_at"] != ends.to_string()).then_some(status)
    })
    .await;
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(renewed["state"], "fresh");
    assert_eq!(harness.metric("adsidecar_token_refresh_total{reason=\"\",result=\"success\"}").await, 1.0);
    assert_eq!(renewed["consent_expires_at"], status["consent_expires_at"], "a refresh does not extend the consent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_with_under_five_minutes_left_is_renewed_by_who_asks() {
    let harness = Harness::with(IDLE).await;
    harness.log_in("default").await;
    harness.advance(3299);
    assert_eq!(harness.status_of("default").await["state"], "fresh", "five minutes and a second are enough");
    harness.advance(1);
    assert_eq!(harness.status_of("default").await["state"], "expiring");
    assert_eq!(harness.sandbox.refreshes(), 0, "to look is not to use");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(harness.status_of("default").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 22.
async fn a_thousand_callers_at_expiry_make_one_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa).always());
    harness.advance(3600);
    let callers: Vec<_> =
        (0..1000).map(|_| tokio::spawn(harness.request(Method::GET, "/sandbox/echo").send())).collect();
    eventually("1,000 callers that wait", async || {
        (harness.metric("adsidecar_requests_in_flight").await >= 1000.0).then_some(())
    })
    .await;
    gate.release();
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap().status(), 200);
    }
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 23.
async fn a_caller_that_hangs_up_takes_no_refresh_down() {
    let harness = Harness::with(IDLE).await;
    harness.log_in("default").await;
    harness.advance(3600);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa));
    let mut caller = TcpStream::connect(harness.proxy_address()).await.unwrap();
    caller.write_all(b"GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    gate.reached(1).await;
    drop(caller);
    eventually("the hang-up is counted", async || {
        let series =
            "adsidecar_requests_total{account=\"\",method=\"GET\",region=\"na\",source=\"sidecar\",status=\"499\"}";
        (harness.metric(series).await == 1.0).then_some(())
    })
    .await;
    gate.release();
    eventually("the renewal", async || (harness.status_of("default").await["state"] == "fresh").then_some(())).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_lives_is_served_whatever_lwa_does() {
    for (trouble, error) in [
        (Fault::status(500), "server_error"),
        (Fault::too_many(Some(30)), "throttled"),
        (Fault::Reset, "unreachable"),
        (Fault::CloseMidBody, "bad_answer"),
        (Fault::Html, "bad_answer"),
        (Fault::BadJson, "bad_answer"),
        (Fault::InvalidClient, "invalid_client"),
        (Fault::InvalidGrant, "invalid_grant"),
    ] {
        let harness = Harness::start().await;
        harness.log_in("default").await;
        harness.sandbox.set_fault(Rule::from(trouble).at(Door::Lwa).always());
        harness.advance(3600 - 60);
        for _ in 0..20 {
            assert_eq!(harness.get("/v2/profiles").await.status(), 200, "{error}");
        }
        let status = harness.status_of("default").await;
        assert_eq!(status["last_error"], error);
        let state = if error == "invalid_grant" { "login_required" } else { "failing" };
        assert_eq!(status["state"], state);
        assert_eq!(
            harness.metric(&format!("adsidecar_token_refresh_total{{reason=\"{error}\",result=\"failure\"}}")).await,
            1.0
        );
        assert_eq!(harness.get("/v2/profiles").await.status(), 200, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_token_lives_callers_wait_a_second_at_most() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::Hang).at(Door::Lwa).always());
    harness.advance(3600 - 60);
    let begun = Instant::now();
    let callers: Vec<_> = (0..20).map(|_| tokio::spawn(harness.request(Method::GET, "/v2/profiles").send())).collect();
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap().status(), 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!(harness.status_of("default").await["state"], "expiring");
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_refresh_backs_off_callers_go_with_the_living_token_and_do_not_wait_at_all() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Door::Lwa).always());
    harness.advance(3600 - 60);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    let failing = async || (harness.status_of("default").await["state"] == "failing").then_some(());
    eventually("the refresh fails", failing).await;
    let (begun, asked) = (Instant::now(), harness.sandbox.refreshes());
    for _ in 0..10 {
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "a second for each would be ten: {:?}", begun.elapsed());
    assert_eq!(harness.sandbox.refreshes(), asked, "the backoff is not over: the clock stands still");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_living_token_an_outage_of_lwa_is_a_503_and_few_calls() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let down = Fault::Status { code: 503, headers: vec![("retry-after".into(), "7".into())], body: String::new() };
    harness.sandbox.set_fault(Rule::from(down).at(Door::Lwa).always());
    harness.advance(3600);
    for _ in 0..50 {
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
        assert_eq!(header(&answer, "retry-after"), "7");
        assert_eq!(json(answer).await["retryable"], true);
    }
    assert_eq!(harness.sandbox.refreshes(), 1, "LWA's Retry-After is obeyed");
    assert!(harness.sandbox.calls(Door::Na).is_empty(), "an expired token is never sent");
    harness.sandbox.clear_trouble();
    harness.advance(7);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.status_of("default").await["last_error"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_of_an_outage_are_told_soon_and_recover_by_themselves() {
    for trouble in [Fault::status(500), Fault::Reset, Fault::InvalidClient] {
        let operator = trouble == Fault::InvalidClient;
        let harness = Harness::with_running_clock("").await;
        harness.log_in("default").await;
        let armed = harness.sandbox.set_fault(Rule::from(trouble).at(Door::Lwa).always());
        harness.advance(3600);
        let begun = Instant::now();
        let callers: Vec<_> =
            (0..100).map(|_| tokio::spawn(harness.request(Method::GET, "/v2/profiles").send())).collect();
        for caller in callers {
            let answer = caller.await.unwrap().unwrap();
            assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
            let wait: u64 = header(&answer, "retry-after").parse().unwrap();
            assert!((1..=5).contains(&wait), "{wait}");
            let next_step = json(answer).await["next_step"].as_str().unwrap().to_owned();
            assert_eq!(next_step.contains("amazon.client_secret"), operator, "{next_step}");
        }
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
        assert!(armed.met() <= 12, "{} calls", armed.met());
        let status = harness.status_of("default").await;
        assert_eq!(status["state"], "failing", "nobody is sent to log in");
        assert_eq!(harness.metric("adsidecar_login_required{reason=\"\",user=\"default\"}").await, 0.0);
        assert_eq!(harness.metric("adsidecar_users{state=\"failing\"}").await, 1.0);
        harness.sandbox.clear_trouble();
        harness.advance(60);
        eventually("the recovery", async || (harness.get("/v2/profiles").await.status() == 200).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 3.
async fn an_lwa_that_never_answers_keeps_nobody_waiting_for_ever() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::Hang).at(Door::Lwa).always());
    harness.advance(3600);
    let begun = Instant::now();
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(harness.sandbox.refreshes() <= 2);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 16.
async fn a_refused_grant_is_kept_tried_hourly_and_heals() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.world(|world| world.revoke_all());
    harness.advance(3600 - 60);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "the token lives");
    eventually("the refusal", async || (harness.status_of("default").await["state"] == "login_required").then_some(()))
        .await;
    assert_eq!(harness.status_of("default").await["last_error"], "invalid_grant");
    let series = "adsidecar_login_required{reason=\"invalid_grant\",user=\"default\"}";
    assert_eq!(harness.metric(series).await, 1.0);

    harness.advance(60);
    for _ in 0..20 {
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (401, "login_required"));
        assert!(json(answer).await["detail"].as_str().unwrap().contains("invalid_grant"));
    }
    let refused = harness.post(REFRESH).await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    harness.advance(3600 - 61);
    assert_eq!(code(&harness.get("/v2/profiles").await), "login_required");
    assert_eq!(harness.sandbox.refreshes(), 1, "once an hour and not more");

    harness.sandbox.world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = false));
    harness.advance(1);
    eventually("the healing", async || (harness.status_of("default").await["state"] == "fresh").then_some(())).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 2);
    assert_eq!(harness.metric(series).await, 0.0);

    // What is refused outlives a restart.
    harness.sandbox.world(|world| world.revoke_all());
    assert_eq!(code(&harness.post(REFRESH).await), "login_required");
    harness.stop_sidecar().await;
    harness.sandbox.world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = false));
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 9.
async fn a_rotated_refresh_token_is_on_disk_before_it_is_needed() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    for _ in 0..2 {
        harness.sandbox.set_fault(Fault::RotateRefreshToken);
        assert_eq!(harness.post(REFRESH).await.status(), 200);
        harness.stop_sidecar().await;
        harness.start_sidecar().await;
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        assert_eq!(harness.post(REFRESH).await.status(), 200, "the token of before would be refused");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 9.
async fn a_new_refresh_token_that_is_refused_gives_way_to_the_one_before() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Fault::RotateRefreshToken);
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.metric("adsidecar_token_rotations_total").await, 1.0);
    // LWA takes its rotation back: the new token is dead, the one before lives.
    harness.sandbox.world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = !grant.revoked));
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    harness.sandbox.clear_history();
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 2, "the new one was refused, the one before was taken");
    assert_eq!(harness.status_of("default").await["state"], "fresh");
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 3, "from then on it is the grant's own again");

    // One generation and no more: a refresh token that renewed once needs nothing before it.
    harness.sandbox.world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = true));
    harness.sandbox.clear_history();
    let refused = harness.post(REFRESH).await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_token_is_replaced_and_the_call_sent_once_more() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let body = pseudo_random_bytes(200_000);
    harness.sandbox.world(|world| world.expire_access_tokens());
    let answer = harness.request(Method::POST, "/sandbox/echo?x=1").body(body.clone()).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), code(&answer)), (200, ""));
    let echo = json(answer).await;
    assert_eq!(echo["body_sha256"], format!("{:x}", Sha256::digest(&body)));
    assert_eq!((&echo["method"], &echo["target"]), (&Value::from("POST"), &Value::from("/sandbox/echo?x=1")));
    let calls = harness.sandbox.calls(Door::Na);
    assert_eq!(calls.len(), 2);
    assert_ne!(calls[0].header("authorization"), calls[1].header("authorization"));
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(harness.metric("adsidecar_replays_total").await, 1.0);
    assert_eq!(harness.metric("adsidecar_upstream_unauthorized_total{cause=\"token\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 54.
async fn a_refusal_that_a_fresh_token_does_not_cure_passes_and_never_loops() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).always());
    let passes = async |calls: usize, refreshes: u64| {
        harness.sandbox.clear_history();
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (401, ""));
        assert_eq!(answer.text().await.unwrap(), "{\"message\":\"Unauthorized\"}");
        assert_eq!((harness.sandbox.calls(Door::Na).len(), harness.sandbox.refreshes()), (calls, refreshes));
    };
    passes(2, 1).await;
    passes(1, 0).await;
    harness.advance(29);
    passes(1, 0).await;
    harness.advance(1);
    passes(2, 1).await;

    // The limit between forced refreshes holds nobody back who asks for one.
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    harness.sandbox.clear_trouble();
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_not_held_is_not_sent_again() {
    let harness = Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\nreplay_limit = \"1KiB\"\n").await;
    harness.log_in("default").await;
    for (size, calls) in [(1024, 2), (1025, 1)] {
        harness.sandbox.clear_history();
        harness.advance(31);
        harness.sandbox.world(|world| world.expire_access_tokens());
        let answer = harness.request(Method::POST, "/sandbox/echo").body(vec![b'x'; size]).send().await.unwrap();
        assert_eq!(answer.status(), if calls == 2 { 200 } else { 401 });
        assert_eq!(harness.sandbox.calls(Door::Na).len(), calls);
        assert_eq!(harness.sandbox.refreshes(), 1, "the next call has a token that works");
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_refused_at_once_share_one_forced_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.world(|world| world.expire_access_tokens());
    let callers: Vec<_> =
        (0..100).map(|_| tokio::spawn(harness.request(Method::PUT, "/sandbox/echo").body("{}").send())).collect();
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap().status(), 200);
    }
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_failure_passes_with_a_hint_and_refreshes_nothing() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let other = harness.sandbox.world(|world| {
        let mine = world.catalogue.advertisers[0].id.clone();
        let other = world.catalogue.profiles.iter().find(|one| one.advertiser != mine && one.region == Door::Na);
        other.unwrap().id.to_string()
    });
    for (scope, hint) in [("1", "scope_unknown"), (other.as_str(), "scope_not_authorized")] {
        let call = harness.request(Method::POST, "/sp/campaigns/list").header("amazon-advertising-api-scope", scope);
        let call = call.header("content-type", "application/vnd.spcampaign.v3+json").body("{}").send().await.unwrap();
        assert_eq!((call.status().as_u16(), code(&call), header(&call, "x-adsidecar-hint")), (401, "", hint));
        assert!(call.text().await.unwrap().contains("scope"), "Amazon's own text");
        assert_eq!(harness.metric(&format!("adsidecar_upstream_unauthorized_total{{cause=\"{hint}\"}}")).await, 1.0);
    }
    assert_eq!(harness.sandbox.refreshes(), 0);
    assert_eq!(harness.sandbox.calls(Door::Na).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 55.
async fn a_403_passes_and_on_an_amc_path_alone_near_the_end_of_the_token_it_is_read_as_a_401() {
    let harness = Harness::with(IDLE).await;
    harness.log_in("default").await;
    let forbidden = || {
        let body = "{\"message\":\"Forbidden\"}".into();
        Rule::from(Fault::Status { code: 403, headers: Vec::new(), body }).at(Door::Na)
    };
    harness.sandbox.clear_history();
    for path in ["/v2/profiles", "/amc/instances", "/sp/campaigns?x=/amc/"] {
        harness.sandbox.set_fault(forbidden());
        let answer = harness.get(path).await;
        assert_eq!(
            (answer.status().as_u16(), code(&answer)),
            (403, ""),
            "{path}: the token has most of its life before it"
        );
    }
    assert_eq!((harness.ads_calls().len(), harness.sandbox.refreshes()), (3, 0));
    // Near its end, while its renewal takes longer than callers wait.
    for (path, status, calls) in [("/v2/profiles", 403, 1), ("/amc/accounts", 200, 2)] {
        harness.advance(3600 - 200);
        harness.sandbox.clear_history();
        let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa));
        harness.sandbox.set_fault(forbidden());
        let call = tokio::spawn(harness.request(Method::GET, path).send());
        eventually("Amazon's 403", async || {
            harness.sandbox.calls(Door::Na).first().is_some_and(|call| call.status.is_some()).then_some(())
        })
        .await;
        gate.release();
        let answer = call.await.unwrap().unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (status, ""), "{path}");
        eventually("the renewal", async || (harness.status_of("default").await["state"] == "fresh").then_some(()))
            .await;
        assert_eq!((harness.ads_calls().len(), harness.sandbox.refreshes()), (calls, 1), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asked_for_refresh_is_made_at_once_and_shared() {
    let harness = Harness::start().await;
    let refused = harness.post(REFRESH).await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    harness.log_in("default").await;
    harness.advance(10);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa).always());
    let asked: Vec<_> = (0..20).map(|_| tokio::spawn(harness.request(Method::POST, REFRESH).send())).collect();
    eventually("all of them wait", async || {
        (harness.metric("adsidecar_requests_in_flight").await >= 20.0).then_some(())
    })
    .await;
    gate.release();
    for one in asked {
        let status = json(one.await.unwrap().unwrap()).await;
        assert_eq!((&status["state"], &status["expires_at"]), (&"fresh".into(), &"2026-08-01T13:00:10Z".into()));
    }
    assert_eq!(harness.sandbox.refreshes(), 1);
    harness.sandbox.clear_trouble();
    for made in 2..=50 {
        assert_eq!(harness.post(REFRESH).await.status(), 200);
        assert_eq!(harness.sandbox.refreshes(), made, "the next one is made again, however soon");
    }
    harness.sandbox.set_fault(Fault::too_many(Some(30)));
    let failed = json(harness.post(REFRESH).await).await;
    assert_eq!((&failed["state"], &failed["last_error"]), (&"failing".into(), &"throttled".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asked_for_refresh_waits_for_the_failure_backoff_alone() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Door::Lwa));
    assert_eq!(json(harness.post(REFRESH).await).await["last_error"], "server_error");
    let healed = json(harness.post(REFRESH).await).await;
    assert_eq!((&healed["state"], &healed["last_error"]), (&"fresh".into(), &Value::Null));
    assert_eq!(harness.sandbox.refreshes(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_secret_is_rotated_the_old_and_the_new_are_tried_in_order() {
    let mut harness = Harness::start().await;
    harness.restart_with("amazon.client_secret", &format!("not-spread-yet,{CLIENT_SECRET}")).await;
    harness.log_in("default").await;
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.status_of("default").await["last_error"], Value::Null);
    assert_eq!(harness.sandbox.refreshes(), 2, "one refused, one granted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_beats_a_running_refresh() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa));
    let asked = tokio::spawn(harness.request(Method::POST, REFRESH).send());
    gate.reached(1).await;
    assert_eq!(harness.post(LOGOUT).await.status(), 204);
    let answer = asked.await.unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), code(&answer)), (401, "login_required"));
    gate.release();
    eventually("LWA's answer", async || {
        (harness.metric("adsidecar_token_refresh_total{reason=\"\",result=\"success\"}").await == 1.0).then_some(())
    })
    .await;
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.status_of("default").await["state"], "none");
    assert_eq!(code(&harness.get("/v2/profiles").await), "login_required");
    assert!(harness.sandbox.calls(Door::Na).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_login_beats_an_old_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    for refused in [false, true] {
        let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa));
        let asked = tokio::spawn(harness.request(Method::POST, REFRESH).send());
        gate.reached(1).await;
        if refused {
            harness.sandbox.world(|world| world.revoke_all());
        }
        harness.advance(60);
        harness.log_in("default").await;
        let newest = harness.sandbox.world(|world| world.grants.last().unwrap().refresh_token.clone());
        let adopted = harness.status_of("default").await;
        gate.release();
        assert_eq!(asked.await.unwrap().unwrap().status(), 200);
        let (reason, result) = if refused { ("invalid_grant", "failure") } else { ("", "success") };
        let ended = format!("adsidecar_token_refresh_total{{reason=\"{reason}\",result=\"{result}\"}}");
        eventually("the old refresh ended", async || (harness.metric(&ended).await > 0.0).then_some(())).await;
        // The entry is free for the next refresh once the old one has landed.
        eventually("a refresh of the new grant", async || {
            assert_eq!(harness.post(REFRESH).await.status(), 200);
            let body = harness.sandbox.calls(Door::Lwa).last().unwrap().text();
            let mut form = url::form_urlencoded::parse(body.as_bytes());
            form.any(|(name, value)| name == "refresh_token" && value == newest).then_some(())
        })
        .await;
        let status = harness.status_of("default").await;
        assert_eq!((&status["state"], &status["consented_at"]), (&"fresh".into(), &adopted["consented_at"]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_used_is_not_renewed_and_has_no_series() {
    let harness = Harness::with("[refresh]\nidle_after = \"2h\"\n").await;
    harness.log_in("default").await;
    harness.log_in("busy").await;
    let expiry = |user: &str| format!("adsidecar_token_expiry_timestamp_seconds{{user=\"{user}\"}}");
    let renewed = |user: &str| format!("adsidecar_token_last_refresh_timestamp_seconds{{user=\"{user}\"}}");
    assert!(harness.metric(&expiry("default")).await > 0.0 && harness.metric(&renewed("default")).await > 0.0);
    for _ in 0..10 {
        harness.advance(45 * 60);
        let call = harness.request(Method::GET, "/v2/profiles").header("x-ads-user", "busy").send().await.unwrap();
        assert_eq!(call.status(), 200);
        eventually("busy is fresh", async || (harness.status_of("busy").await["state"] == "fresh").then_some(())).await;
    }
    let status = harness.status_of("default").await;
    assert_eq!((&status["state"], &status["next_refresh_at"]), (&Value::from("idle"), &Value::Null));
    assert_eq!((harness.metric(&expiry("default")).await, harness.metric(&renewed("default")).await), (0.0, 0.0));
    assert!(harness.metric(&expiry("busy")).await > 0.0);
    assert_eq!(harness.metric("adsidecar_users{state=\"idle\"}").await, 1.0);
    assert_eq!(harness.metric("adsidecar_login_required{reason=\"\",user=\"default\"}").await, 0.0);

    harness.sandbox.clear_history();
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "who comes back is served");
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(harness.status_of("default").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn short_lives_make_no_storm() {
    let harness = Harness::start().await;
    harness.sandbox.set_fault(Rule::from(Fault::ShortLife { seconds: 120 }).always());
    harness.log_in("default").await;
    for _ in 0..60 {
        harness.advance(5);
        eventually("the background has done what was due", async || {
            let due: Timestamp = harness.status_of("default").await["next_refresh_at"].as_str()?.parse().unwrap();
            (due > harness.clock.now()).then_some(())
        })
        .await;
        for _ in 0..3 {
            assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        }
    }
    let at: Vec<Timestamp> = harness
        .sandbox
        .calls(Door::Lwa)
        .iter()
        .filter(|call| call.grant_type.as_deref() == Some("refresh_token"))
        .map(|call| call.at)
        .collect();
    assert!(at.len() >= 5, "{at:?}");
    assert!(at.windows(2).all(|pair| pair[1].duration_since(pair[0]).as_secs() >= 30), "{at:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_is_renewed_however_short_its_life_was() {
    let harness = Harness::start().await;
    harness.sandbox.set_fault(Rule::from(Fault::ShortLife { seconds: 5 }).always());
    harness.log_in("default").await;
    for renewals in 1..=5 {
        harness.advance(5);
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        assert_eq!(harness.sandbox.refreshes(), renewals);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_runs_at_the_end_of_the_process_is_not_lost() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.advance(10);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa));
    let mut caller = TcpStream::connect(harness.proxy_address()).await.unwrap();
    caller.write_all(b"POST /api/auth/amazon/refresh HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    gate.reached(1).await;
    drop(caller);
    let ready = harness.admin_url("/readyz");
    let stopped = harness.begin_stop();
    eventually("the drain", async || {
        let answer = harness.client.get(&ready).send().await.unwrap();
        (answer.text().await.unwrap() == "draining\n").then_some(())
    })
    .await;
    gate.release();
    stopped.await.unwrap();
    harness.start_sidecar().await;
    assert_eq!(harness.status_of("default").await["updated_at"], "2026-08-01T12:00:10Z");
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configured_refresh_token_is_adopted_once() {
    let mut harness = Harness::start().await;
    let first = harness.sandbox.grant().refresh_token;
    let second = harness.sandbox.grant().refresh_token;
    harness.restart_with("amazon.refresh_token", &first).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    let status = harness.status_of("default").await;
    assert_eq!((&status["state"], &status["consented_at"]), (&"fresh".into(), &Value::Null));
    assert_eq!(harness.metric("adsidecar_consent_expiry_timestamp_seconds{user=\"default\"}").await, 0.0);

    assert_eq!(harness.post(LOGOUT).await.status(), 204);
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.status_of("default").await["state"], "none", "the logout is meant");

    harness.restart_with("amazon.refresh_token", &second).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "a changed one is another wish");

    // A grant that works stands.
    harness.log_in("default").await;
    let third = harness.sandbox.grant().refresh_token;
    harness.sandbox.clear_history();
    harness.restart_with("amazon.refresh_token", &third).await;
    eventually("the grant is tried", async || (harness.sandbox.refreshes() > 0).then_some(())).await;
    assert_ne!(harness.status_of("default").await["consented_at"], Value::Null);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);

    // One that LWA refuses makes room, though its last token still lives.
    harness.stop_sidecar().await;
    harness
        .sandbox
        .world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = grant.refresh_token != third));
    harness.start_sidecar().await;
    eventually("the adoption", async || {
        (harness.status_of("default").await["consented_at"] == Value::Null).then_some(())
    })
    .await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_wrong_is_told() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    harness.clock = Clock::frozen(harness.clock.now() + jiff::SignedDuration::from_secs(120));
    harness.start_sidecar().await;
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200);
    assert_eq!(harness.metric("adsidecar_clock_skew_seconds").await, 120.0);
}
