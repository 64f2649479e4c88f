//! Tokens: the token endpoint that issues only placeholders, and the token manager that refreshes ahead of time.

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
use world::{CLIENT_SECRET, Fault, Listener, Rule, pseudo_random_bytes};

use crate::harness::{Harness, code, eventually, header, json};

const SHIM: &str = "/auth/o2/token";
const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGOUT: &str = "/api/auth/amazon/logout";
/// Users become idle so early that the background leaves refreshes to callers.
const IDLE: &str = "[refresh]\nidle_after = \"1m\"\nsweep = \"1h\"\n";

fn basic(secret: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{}:{secret}", "amzn1.application-oa2-client.x")))
}

/// The four ways in which SDKs send their client secret.
async fn call_token_endpoint(harness: &Harness, secret: &str) -> Vec<Response> {
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
async fn a_disabled_token_endpoint_is_not_found() {
    let harness = Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\ntoken_shim = false\n").await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for answer in call_token_endpoint(&harness, "x").await {
        assert_eq!((answer.status().as_u16(), code(&answer)), (404, "not_found"));
    }
    assert_eq!(harness.sandbox.history().len(), 0, "and its requests are not forwarded");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_endpoint_requires_the_caller_token_and_returns_it() {
    let harness =
        Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\ncaller_token = \"first-token,second-token\"\n").await;
    for secret in ["wrong", "first-toke", ""] {
        for answer in call_token_endpoint(&harness, secret).await {
            assert_eq!((answer.status().as_u16(), code(&answer)), (407, "caller_unauthorized"));
        }
    }
    for secret in ["first-token", "second-token"] {
        for answer in call_token_endpoint(&harness, secret).await {
            assert_eq!(answer.status(), 200);
            let tokens = json(answer).await;
            assert_eq!(tokens["access_token"], secret, "the SDK sends it as the bearer token of its next requests");
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

    // A caller that sends the caller token like any other request may keep its own client secret.
    for (name, value) in [("x-ads-sidecar-token", "first-token"), ("proxy-authorization", "Bearer second-token")] {
        let answer = harness.request(Method::POST, SHIM).header(name, value).form(&[("client_secret", "amazons")]);
        assert_eq!(answer.send().await.unwrap().status(), 200, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_endpoint_issues_a_placeholder_that_the_proxy_overwrites() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    for answer in call_token_endpoint(&harness, "amzn1.oa2-cs.v1.real-looking").await {
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
    // As a forward proxy, for Amazon's own host, and with an account prefix.
    for (target, host) in
        [("http://api.amazon.com/auth/o2/token", "api.amazon.com"), ("/a/default/auth/o2/token", "localhost")]
    {
        let request =
            format!("POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        let answer = harness.raw(request.as_bytes(), None).await;
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(harness.sandbox.refreshes(), 0, "LWA received no call");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_refreshes_fifteen_minutes_ahead_without_any_caller() {
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
    let refreshed = eventually("the refresh", async || {
        let status = harness.status_of("default").await;
        (status["expires_at"] != ends.to_string()).then_some(status)
    })
    .await;
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(refreshed["state"], "fresh");
    assert_eq!(harness.metric("adsidecar_token_refresh_total{reason=\"\",result=\"success\"}").await, 1.0);
    assert_eq!(refreshed["consent_expires_at"], status["consent_expires_at"], "a refresh does not extend the consent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_refreshes_a_token_with_under_five_minutes_left() {
    let harness = Harness::with(IDLE).await;
    harness.log_in("default").await;
    harness.advance(3299);
    assert_eq!(harness.status_of("default").await["state"], "fresh", "five minutes and a second are enough");
    harness.advance(1);
    assert_eq!(harness.status_of("default").await["state"], "expiring");
    assert_eq!(harness.sandbox.refreshes(), 0, "a status request does not count as use");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(harness.status_of("default").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 22.
async fn a_thousand_callers_at_expiry_share_one_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa).always());
    harness.advance(3600);
    let callers: Vec<_> =
        (0..1000).map(|_| tokio::spawn(harness.request(Method::GET, "/sandbox/echo").send())).collect();
    eventually("1,000 callers to wait", async || {
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
async fn a_caller_that_disconnects_cancels_no_refresh() {
    let harness = Harness::with(IDLE).await;
    harness.log_in("default").await;
    harness.advance(3600);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let mut caller = TcpStream::connect(harness.proxy_address()).await.unwrap();
    caller.write_all(b"GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    gate.reached(1).await;
    drop(caller);
    eventually("the disconnect to be counted", async || {
        let series =
            "adsidecar_requests_total{account=\"\",method=\"GET\",region=\"na\",source=\"sidecar\",status=\"499\"}";
        (harness.metric(series).await == 1.0).then_some(())
    })
    .await;
    gate.release();
    eventually("the refresh", async || (harness.status_of("default").await["state"] == "fresh").then_some(())).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_token_is_used_whatever_lwa_does() {
    for (fault, error) in [
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
        harness.sandbox.set_fault(Rule::from(fault).at(Listener::Lwa).always());
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
async fn with_a_valid_token_callers_wait_at_most_a_second() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::Hang).at(Listener::Lwa).always());
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
async fn without_a_valid_token_an_outage_of_lwa_is_a_503_and_few_token_calls() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let down = Fault::Status { code: 503, headers: vec![("retry-after".into(), "7".into())], body: String::new() };
    harness.sandbox.set_fault(Rule::from(down).at(Listener::Lwa).always());
    harness.advance(3600);
    for _ in 0..50 {
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
        assert_eq!(header(&answer, "retry-after"), "7");
        assert_eq!(json(answer).await["retryable"], true);
    }
    assert_eq!(harness.sandbox.refreshes(), 1, "LWA's Retry-After is obeyed");
    assert!(harness.sandbox.calls(Listener::Na).is_empty(), "an expired token is never sent");
    harness.sandbox.clear_faults();
    harness.advance(7);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.status_of("default").await["last_error"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_during_an_outage_get_an_early_error_and_recover() {
    for fault in [Fault::status(500), Fault::Reset, Fault::InvalidClient] {
        let operator = fault == Fault::InvalidClient;
        let harness = Harness::with_running_clock("").await;
        harness.log_in("default").await;
        let handle = harness.sandbox.set_fault(Rule::from(fault).at(Listener::Lwa).always());
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
        assert!(handle.hits() <= 12, "{} calls", handle.hits());
        let status = harness.status_of("default").await;
        assert_eq!(status["state"], "failing", "no user is told to log in");
        assert_eq!(harness.metric("adsidecar_login_required{reason=\"\",user=\"default\"}").await, 0.0);
        assert_eq!(harness.metric("adsidecar_users{state=\"failing\"}").await, 1.0);
        harness.sandbox.clear_faults();
        harness.advance(60);
        eventually("the recovery", async || (harness.get("/v2/profiles").await.status() == 200).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 3.
async fn an_unresponsive_lwa_blocks_no_caller_forever() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::Hang).at(Listener::Lwa).always());
    harness.advance(3600);
    let begun = Instant::now();
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(harness.sandbox.refreshes() <= 2);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 16.
async fn a_rejected_grant_is_kept_retried_hourly_and_recovers() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.world(|world| world.revoke_all());
    harness.advance(3600 - 60);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "the access token has not expired");
    eventually("the rejection", async || {
        (harness.status_of("default").await["state"] == "login_required").then_some(())
    })
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
    assert_eq!(harness.sandbox.refreshes(), 1, "at most once an hour");

    harness.sandbox.world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = false));
    harness.advance(1);
    eventually("the recovery", async || (harness.status_of("default").await["state"] == "fresh").then_some(())).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 2);
    assert_eq!(harness.metric(series).await, 0.0);

    // The rejection is remembered across a restart.
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
        assert_eq!(harness.post(REFRESH).await.status(), 200, "the previous token would be rejected");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 9.
async fn a_rejected_new_refresh_token_falls_back_to_the_previous_one() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Fault::RotateRefreshToken);
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.metric("adsidecar_token_rotations_total").await, 1.0);
    // LWA rolls its rotation back: the new token is invalid, the previous one valid.
    harness.sandbox.world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = !grant.revoked));
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    harness.sandbox.clear_history();
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 2, "the new token was rejected, the previous one accepted");
    assert_eq!(harness.status_of("default").await["state"], "fresh");
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 3, "from then on, the previous token is the current one");

    // Only one generation back: after a successful refresh, the previous refresh token is discarded.
    harness.sandbox.world(|world| world.grants.iter_mut().for_each(|grant| grant.revoked = true));
    harness.sandbox.clear_history();
    let refused = harness.post(REFRESH).await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_token_is_replaced_and_the_request_retried_once() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let body = pseudo_random_bytes(200_000);
    harness.sandbox.world(|world| world.expire_access_tokens());
    let answer = harness.request(Method::POST, "/sandbox/echo?x=1").body(body.clone()).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), code(&answer)), (200, ""));
    let echo = json(answer).await;
    assert_eq!(echo["body_sha256"], format!("{:x}", Sha256::digest(&body)));
    assert_eq!((&echo["method"], &echo["target"]), (&Value::from("POST"), &Value::from("/sandbox/echo?x=1")));
    let calls = harness.sandbox.calls(Listener::Na);
    assert_eq!(calls.len(), 2);
    assert_ne!(calls[0].header("authorization"), calls[1].header("authorization"));
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(harness.metric("adsidecar_replays_total").await, 1.0);
    assert_eq!(harness.metric("adsidecar_upstream_unauthorized_total{cause=\"token\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 54.
async fn a_401_that_a_new_token_does_not_fix_passes_and_never_loops() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).always());
    let passes = async |calls: usize, refreshes: u64| {
        harness.sandbox.clear_history();
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (401, ""));
        assert_eq!(answer.text().await.unwrap(), "{\"message\":\"Unauthorized\"}");
        assert_eq!((harness.sandbox.calls(Listener::Na).len(), harness.sandbox.refreshes()), (calls, refreshes));
    };
    passes(2, 1).await;
    passes(1, 0).await;
    harness.advance(29);
    passes(1, 0).await;
    harness.advance(1);
    passes(2, 1).await;

    // The minimum interval between forced refreshes does not delay an explicit request.
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    harness.sandbox.clear_faults();
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_beyond_the_replay_buffer_is_not_retried() {
    let harness = Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\nreplay_limit = \"1KiB\"\n").await;
    harness.log_in("default").await;
    for (size, calls) in [(1024, 2), (1025, 1)] {
        harness.sandbox.clear_history();
        harness.advance(31);
        harness.sandbox.world(|world| world.expire_access_tokens());
        let answer = harness.request(Method::POST, "/sandbox/echo").body(vec![b'x'; size]).send().await.unwrap();
        assert_eq!(answer.status(), if calls == 2 { 200 } else { 401 });
        assert_eq!(harness.sandbox.calls(Listener::Na).len(), calls);
        assert_eq!(harness.sandbox.refreshes(), 1, "the next request has a working token");
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_concurrent_401s_share_one_forced_refresh() {
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
        let other = world.catalogue.profiles.iter().find(|one| one.advertiser != mine && one.region == Listener::Na);
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
    assert_eq!(harness.sandbox.calls(Listener::Na).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 55.
async fn a_403_passes_except_on_an_amc_path_near_expiry_where_it_counts_as_a_401() {
    let harness = Harness::with(IDLE).await;
    harness.log_in("default").await;
    let forbidden = || {
        let body = "{\"message\":\"Forbidden\"}".into();
        Rule::from(Fault::Status { code: 403, headers: Vec::new(), body }).at(Listener::Na)
    };
    harness.sandbox.clear_history();
    for path in ["/v2/profiles", "/amc/instances", "/sp/campaigns?x=/amc/"] {
        harness.sandbox.set_fault(forbidden());
        let answer = harness.get(path).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (403, ""), "{path}: the token is far from its expiry");
    }
    assert_eq!((harness.ads_calls().len(), harness.sandbox.refreshes()), (3, 0));
    // Near its expiry, while its refresh takes longer than callers wait.
    for (path, status, calls) in [("/v2/profiles", 403, 1), ("/amc/accounts", 200, 2)] {
        harness.advance(3600 - 200);
        harness.sandbox.clear_history();
        let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
        harness.sandbox.set_fault(forbidden());
        let call = tokio::spawn(harness.request(Method::GET, path).send());
        eventually("Amazon's 403", async || {
            harness.sandbox.calls(Listener::Na).first().is_some_and(|call| call.status.is_some()).then_some(())
        })
        .await;
        gate.release();
        let answer = call.await.unwrap().unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (status, ""), "{path}");
        eventually("the refresh", async || (harness.status_of("default").await["state"] == "fresh").then_some(()))
            .await;
        assert_eq!((harness.ads_calls().len(), harness.sandbox.refreshes()), (calls, 1), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_refresh_runs_immediately_and_is_shared() {
    let harness = Harness::start().await;
    let refused = harness.post(REFRESH).await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    harness.log_in("default").await;
    harness.advance(10);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa).always());
    let asked: Vec<_> = (0..20).map(|_| tokio::spawn(harness.request(Method::POST, REFRESH).send())).collect();
    eventually("all callers to wait", async || {
        (harness.metric("adsidecar_requests_in_flight").await >= 20.0).then_some(())
    })
    .await;
    gate.release();
    for one in asked {
        let status = json(one.await.unwrap().unwrap()).await;
        assert_eq!((&status["state"], &status["expires_at"]), (&"fresh".into(), &"2026-08-01T13:00:10Z".into()));
    }
    assert_eq!(harness.sandbox.refreshes(), 1);
    harness.sandbox.clear_faults();
    for made in 2..=50 {
        assert_eq!(harness.post(REFRESH).await.status(), 200);
        assert_eq!(harness.sandbox.refreshes(), made, "the next request refreshes again, however soon");
    }
    harness.sandbox.set_fault(Fault::too_many(Some(30)));
    let failed = json(harness.post(REFRESH).await).await["user"].take();
    assert_eq!((&failed["state"], &failed["last_error"]), (&"failing".into(), &"throttled".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_refresh_waits_only_for_the_failure_backoff() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa));
    assert_eq!(json(harness.post(REFRESH).await).await["user"]["last_error"], "server_error");
    let healed = json(harness.post(REFRESH).await).await;
    assert_eq!((&healed["state"], &healed["last_error"]), (&"fresh".into(), &Value::Null));
    assert!((2..=3).contains(&harness.sandbox.refreshes()), "the background may retry at the same time");
}

#[tokio::test(flavor = "multi_thread")]
async fn during_a_refresh_backoff_callers_use_the_valid_token_without_waiting() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa).always());
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
async fn while_a_secret_is_rotated_the_old_and_the_new_are_tried_in_order() {
    let mut harness = Harness::start().await;
    harness.restart_with("amazon.client_secret", &format!("not-spread-yet,{CLIENT_SECRET}")).await;
    harness.log_in("default").await;
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.status_of("default").await["last_error"], Value::Null);
    assert_eq!(harness.sandbox.refreshes(), 2, "one rejected, one accepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_beats_a_running_refresh() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
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
    assert!(harness.sandbox.calls(Listener::Na).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_login_beats_an_old_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    for refused in [false, true] {
        let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
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
        eventually("the old refresh to end", async || (harness.metric(&ended).await > 0.0).then_some(())).await;
        // Another refresh can start once the old one has finished.
        eventually("a refresh of the new grant", async || {
            assert_eq!(harness.post(REFRESH).await.status(), 200);
            let body = harness.sandbox.calls(Listener::Lwa).last().unwrap().text();
            let mut form = url::form_urlencoded::parse(body.as_bytes());
            form.any(|(name, value)| name == "refresh_token" && value == newest).then_some(())
        })
        .await;
        let status = harness.status_of("default").await;
        assert_eq!((&status["state"], &status["consented_at"]), (&"fresh".into(), &adopted["consented_at"]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_user_is_not_refreshed_and_has_no_metric_series() {
    let harness = Harness::with("[refresh]\nidle_after = \"2h\"\n").await;
    harness.log_in("default").await;
    harness.log_in("busy").await;
    let expiry = |user: &str| format!("adsidecar_token_expiry_timestamp_seconds{{user=\"{user}\"}}");
    let refreshed = |user: &str| format!("adsidecar_token_last_refresh_timestamp_seconds{{user=\"{user}\"}}");
    assert!(harness.metric(&expiry("default")).await > 0.0 && harness.metric(&refreshed("default")).await > 0.0);
    for _ in 0..10 {
        harness.advance(45 * 60);
        let call = harness.request(Method::GET, "/v2/profiles").header("x-ads-user", "busy").send().await.unwrap();
        assert_eq!(call.status(), 200);
        eventually("user busy to be fresh", async || {
            (harness.status_of("busy").await["state"] == "fresh").then_some(())
        })
        .await;
    }
    let status = harness.status_of("default").await;
    assert_eq!((&status["state"], &status["next_refresh_at"]), (&Value::from("idle"), &Value::Null));
    assert_eq!((harness.metric(&expiry("default")).await, harness.metric(&refreshed("default")).await), (0.0, 0.0));
    assert!(harness.metric(&expiry("busy")).await > 0.0);
    assert_eq!(harness.metric("adsidecar_users{state=\"idle\"}").await, 1.0);
    assert_eq!(harness.metric("adsidecar_login_required{reason=\"\",user=\"default\"}").await, 0.0);

    harness.sandbox.clear_history();
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "a returning user is served");
    assert_eq!(harness.sandbox.refreshes(), 1);
    assert_eq!(harness.status_of("default").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn short_lifetimes_cause_no_refresh_storm() {
    let harness = Harness::start().await;
    harness.sandbox.set_fault(Rule::from(Fault::ShortLife { seconds: 120 }).always());
    harness.log_in("default").await;
    for _ in 0..60 {
        harness.advance(5);
        eventually("all due background refreshes", async || {
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
        .calls(Listener::Lwa)
        .iter()
        .filter(|call| call.grant_type.as_deref() == Some("refresh_token"))
        .map(|call| call.at)
        .collect();
    assert!(at.len() >= 5, "{at:?}");
    assert!(at.windows(2).all(|pair| pair[1].duration_since(pair[0]).as_secs() >= 30), "{at:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_is_refreshed_however_short_its_lifetime() {
    let harness = Harness::start().await;
    harness.sandbox.set_fault(Rule::from(Fault::ShortLife { seconds: 5 }).always());
    harness.log_in("default").await;
    for refreshes in 1..=5 {
        harness.advance(5);
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        assert_eq!(harness.sandbox.refreshes(), refreshes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_running_at_shutdown_is_not_lost() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.advance(10);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let mut caller = TcpStream::connect(harness.proxy_address()).await.unwrap();
    caller.write_all(b"POST /api/auth/amazon/refresh HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    gate.reached(1).await;
    drop(caller);
    let ready = harness.admin_url("/readyz");
    let stopped = harness.begin_stop();
    eventually("draining", async || {
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
    assert_eq!(harness.status_of("default").await["state"], "none", "the logout stays in effect");

    harness.restart_with("amazon.refresh_token", &second).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "a changed refresh token is adopted");

    // A working grant is not replaced.
    harness.log_in("default").await;
    let third = harness.sandbox.grant().refresh_token;
    harness.sandbox.clear_history();
    harness.restart_with("amazon.refresh_token", &third).await;
    eventually("the grant to be tried", async || (harness.sandbox.refreshes() > 0).then_some(())).await;
    assert_ne!(harness.status_of("default").await["consented_at"], Value::Null);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);

    // A grant that LWA rejects is replaced, although its last access token has not expired.
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
async fn a_wrong_clock_is_reported() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    harness.clock = Clock::frozen(harness.clock.now() + jiff::SignedDuration::from_secs(120));
    harness.start_sidecar().await;
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200);
    assert_eq!(harness.metric("adsidecar_clock_skew_seconds").await, 120.0);
}
