//! Faults of Login with Amazon during a refresh: failures 1 to 21 of the catalogue.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;
use tokio::net::TcpListener;
use world::{CLIENT_SECRET, Fault, Listener, Rule};

use crate::harness::{Harness, code, eventually, header, json, unused_address};
use crate::raw_http::{Scripted, Wire};

const REFRESH: &str = "/api/auth/amazon/refresh";
/// Users become idle so early that the background leaves refreshes to callers.
const IDLE: &str = "[refresh]\nidle_after = \"1m\"\nsweep = \"1h\"\n";

/// A Login with Amazon that responds to each token call with exactly these bytes, then closes the connection.
struct Lwa {
    scripted: Scripted,
    answer: Arc<Mutex<Vec<u8>>>,
    /// The heads received.
    heads: Arc<Mutex<Vec<String>>>,
    /// The forms received.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Lwa {
    async fn start() -> Self {
        let (answer, asked) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (say, note, note_head) = (answer.clone(), asked.clone(), heads.clone());
        let scripted = Scripted::start(move |mut wire: Wire, _| {
            let (say, note, note_head) = (say.clone(), note.clone(), note_head.clone());
            async move {
                let Some(head) = wire.head().await else { return };
                note_head.lock().unwrap().push(head.clone());
                let length = head
                    .to_lowercase()
                    .split("content-length: ")
                    .nth(1)
                    .unwrap()
                    .split('\r')
                    .next()
                    .unwrap()
                    .to_owned();
                let form = wire.take(length.parse().unwrap()).await;
                note.lock().unwrap().push(String::from_utf8(form).unwrap());
                let bytes: Vec<u8> = say.lock().unwrap().clone();
                wire.send(bytes).await;
                wire.end().await;
            }
        })
        .await;
        Self { scripted, answer, heads, asked }
    }

    fn will_send(&self, bytes: impl Into<Vec<u8>>) {
        *self.answer.lock().unwrap() = bytes.into();
    }

    fn will_say(&self, body: &str) {
        self.will_send(ok(body));
    }

    fn calls(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    /// A setup whose user `default` is logged in, and whose sidecar uses this token endpoint from now on.
    async fn harness(&self) -> Harness {
        let ca = self.scripted.ca_file();
        asking(&self.scripted.origin, Some(ca.to_str().unwrap()), IDLE).await
    }
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// A setup whose user `default` is logged in, and whose sidecar requests tokens at `origin` from now on.
async fn asking(origin: &str, ca: Option<&str>, extra: &str) -> Harness {
    let mut harness = Harness::with(extra).await;
    harness.log_in("default").await;
    harness.sets.extend(ca.map(|ca| ("amazon.ca_file".to_owned(), ca.to_owned())));
    harness.restart_with("amazon.token_url", &format!("{origin}/auth/o2/token")).await;
    harness.sandbox.clear_history();
    harness
}

/// An origin on which nothing listens.
fn nobody() -> String {
    format!("https://{}", unused_address())
}

/// Requests a refresh, which fails with `error`.
async fn fails(harness: &Harness, error: &str) {
    // Past any backoff; with a frozen clock it would never end.
    harness.advance(61);
    let answer = harness.post(REFRESH).await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
    let status = json(answer).await["user"].take();
    assert_eq!((&status["state"], &status["last_error"]), (&"failing".into(), &error.into()));
}

/// While the access token is valid, it is used even if its refresh fails; afterwards callers get an error immediately.
async fn is_survived(harness: &Harness, error: &str) {
    fails(harness, error).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "the access token has not expired");
    harness.advance(3600);
    for _ in 0..2 {
        fails(harness, error).await;
    }
    let begun = Instant::now();
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
    assert!((1..=60).contains(&header(&answer, "retry-after").parse::<u64>().unwrap()));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(harness.ads_calls().len(), 1, "an expired token is never sent");
    let series = format!("adsidecar_token_refresh_total{{reason=\"{error}\",result=\"failure\"}}");
    assert!(harness.metric(&series).await >= 3.0);
}

/// A refresh, and the lifetime that the sidecar assumes.
async fn lives(harness: &Harness, lwa: &Lwa, fields: &str, seconds: i64, oddity: &str) {
    harness.advance(1);
    let body = format!(r#"{{"access_token":"Atza|{}","refresh_token":"Atzr|s"{fields}}}"#, lwa.calls());
    lwa.will_say(&body);
    let series = format!("adsidecar_token_answer_oddities_total{{kind=\"{oddity}\"}}");
    let odd = harness.metric(&series).await;
    let status = json(harness.post(REFRESH).await).await;
    assert_eq!(status["state"], if seconds > 300 { "fresh" } else { "expiring" }, "{fields}");
    let ends: jiff::Timestamp = status["expires_at"].as_str().unwrap().parse().unwrap();
    assert_eq!(ends.duration_since(harness.clock.now()).as_secs(), seconds, "{fields}");
    assert_eq!(harness.metric(&series).await - odd, if oddity.is_empty() { 0.0 } else { 1.0 }, "{fields}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 1.
async fn while_lwa_refuses_connections_the_valid_token_is_used() {
    let mut harness = asking(&nobody(), None, "").await;
    harness.advance(3600 - 60);
    for _ in 0..20 {
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
    let status = harness.status_of("default").await;
    assert_eq!((&status["state"], &status["last_error"]), (&"failing".into(), &"unreachable".into()));
    let failures = harness.metric("adsidecar_token_refresh_total{reason=\"unreachable\",result=\"failure\"}").await;
    assert_eq!(failures, 1.0, "the backoff holds for any number of callers");
    // The background keeps retrying until LWA returns.
    let lwa = harness.sandbox.token_url();
    harness.restart_with("amazon.token_url", &lwa).await;
    eventually("the refresh", async || (harness.status_of("default").await["state"] == "fresh").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 2.
async fn with_lwa_down_and_the_token_expired_all_callers_get_an_early_error() {
    let harness = asking(&nobody(), None, IDLE).await;
    is_survived(&harness, "unreachable").await;
    let begun = Instant::now();
    let callers: Vec<_> = (0..200).map(|_| tokio::spawn(harness.request(Method::GET, "/v2/profiles").send())).collect();
    for caller in callers {
        let answer = caller.await.unwrap().unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
        assert!(answer.headers().contains_key("retry-after"));
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "callers do not queue: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 4.
async fn a_server_error_of_lwa_becomes_a_503_and_is_retried() {
    let harness = Harness::with(IDLE).await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for status in [500, 502, 503, 504, 408, 425] {
        harness.sandbox.set_fault(Rule::from(Fault::status(status)).at(Listener::Lwa));
        fails(&harness, "server_error").await;
    }
    harness.sandbox.set_fault(Rule::from(Fault::status(503)).at(Listener::Lwa).always());
    is_survived(&harness, "server_error").await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 5.
async fn a_429_of_lwa_allows_one_call_per_retry_after() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let handle = harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(20))).at(Listener::Lwa).always());
    harness.advance(3600);
    for windows in 1..=5 {
        for _ in 0..20 {
            let answer = harness.get("/v2/profiles").await;
            assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
            assert_eq!(header(&answer, "retry-after"), "20");
        }
        assert_eq!(handle.hits(), windows);
        assert_eq!(harness.status_of("default").await["last_error"], "throttled");
        harness.advance(20);
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 6.
async fn a_200_without_a_token_response_changes_nothing() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    for body in ["", "<!doctype html><title>Sorry</title>", "\u{0}\u{1}", "[]", "null", "{}", r#"{"access_token":7}"#] {
        lwa.will_say(body);
        fails(&harness, "bad_answer").await;
    }
    is_survived(&harness, "bad_answer").await;
    lwa.will_say(r#"{"access_token":"Atza|x","expires_in":3600}"#);
    harness.advance(61);
    assert_eq!(json(harness.post(REFRESH).await).await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 7.
async fn a_response_truncated_at_any_byte_keeps_the_refresh_token_and_is_retried() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    let whole = ok(r#"{"access_token":"Atza|x","refresh_token":"Atzr|y","token_type":"bearer","expires_in":3600}"#);
    for cut in 0..whole.len() {
        lwa.will_send(&whole.as_bytes()[..cut]);
        harness.advance(61);
        let status = json(harness.post(REFRESH).await).await["user"].take();
        let error = status["last_error"].as_str().unwrap_or_default();
        assert!(["bad_answer", "unreachable"].contains(&error), "{cut}: {status}");
    }
    lwa.will_send(whole);
    harness.advance(61);
    assert_eq!(json(harness.post(REFRESH).await).await["state"], "fresh");
    let asked = lwa.asked.lock().unwrap().clone();
    assert!(asked.iter().all(|form| *form == asked[0]), "every request sends the same refresh token");
    // Any of those responses may have contained a new refresh token; in fact LWA had issued none.
    assert_eq!(harness.metric("adsidecar_token_refresh_interrupted_total{outcome=\"recovered\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_response_followed_by_a_rejected_grant_is_reported_as_a_loss() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let lost = "adsidecar_token_refresh_interrupted_total{outcome=\"lost\"}";
    harness.sandbox.world(|world| world.revoke_all());
    assert_eq!(code(&harness.post(REFRESH).await), "login_required");
    assert_eq!(harness.metric(lost).await, 0.0, "a revoked grant is not lost");

    harness.log_in("default").await;
    harness.sandbox.set_fault(Fault::CloseMidBody);
    fails(&harness, "bad_answer").await;
    harness.sandbox.world(|world| world.revoke_all());
    harness.advance(61);
    assert_eq!(code(&harness.post(REFRESH).await), "login_required");
    assert_eq!(harness.metric(lost).await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_grant_is_reported_as_a_loss_after_a_gateways_error_and_not_after_an_overload() {
    for (status, losses) in [(503, 0.0), (429, 0.0), (504, 1.0), (500, 1.0)] {
        let harness = Harness::start().await;
        harness.log_in("default").await;
        harness.sandbox.set_fault(Rule::from(Fault::status(status)).at(Listener::Lwa));
        assert_eq!(code(&harness.post(REFRESH).await), "token_unavailable", "{status}");
        // What the gateway's server had made of it: a new refresh token, in a response that nobody got.
        harness.sandbox.world(|world| world.revoke_all());
        harness.advance(61);
        assert_eq!(code(&harness.post(REFRESH).await), "login_required", "{status}");
        let lost = "adsidecar_token_refresh_interrupted_total{outcome=\"lost\"}";
        assert_eq!(harness.metric(lost).await, losses, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 8.
async fn a_response_without_a_refresh_token_keeps_the_old_one() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    for _ in 0..2 {
        harness.sandbox.set_fault(Fault::NoRefreshToken);
        assert_eq!(harness.post(REFRESH).await.status(), 200);
        harness.stop_sidecar().await;
        harness.start_sidecar().await;
        assert_eq!(json(harness.post(REFRESH).await).await["state"], "fresh");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 10.
async fn a_missing_lifetime_defaults_to_five_minutes() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    lives(&harness, &lwa, r#","token_type":"bearer""#, 300, "expires_in_missing").await;
    lives(&harness, &lwa, r#","token_type":"bearer","expires_in":null"#, 300, "expires_in_missing").await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 11.
async fn a_lifetime_of_zero_or_less_defaults_to_five_minutes_without_a_storm() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    for value in ["0", "-1", "-3600", "\"0\"", "0.5"] {
        let fields = format!(r#","token_type":"bearer","expires_in":{value}"#);
        lives(&harness, &lwa, &fields, 300, "expires_in_unusable").await;
    }
    // Its margin is five minutes too, so the background would refresh immediately without a minimum interval.
    let before = lwa.calls();
    for _ in 0..60 {
        harness.advance(1);
        assert_eq!(harness.status_of("default").await["last_error"], Value::Null);
    }
    assert!(lwa.calls() - before <= 2, "at least 30 s apart");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 12.
async fn a_lifetime_is_clamped_to_a_day_and_parsed_from_any_number_format() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    for (value, seconds, oddity) in [
        ("\"3600\"", 3600, ""),
        ("1800.9", 1800, ""),
        ("1000000000000", 86400, "expires_in_too_long"),
        ("1e309", 86400, "expires_in_too_long"),
        ("99999999999999999999999999", 86400, "expires_in_too_long"),
        ("\"soon\"", 300, "expires_in_unusable"),
        ("[3600]", 300, "expires_in_unusable"),
        ("true", 300, "expires_in_unusable"),
    ] {
        let fields = format!(r#","token_type":"bearer","expires_in":{value}"#);
        lives(&harness, &lwa, &fields, seconds, oddity).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 13.
async fn a_non_bearer_token_is_rejected_and_a_missing_type_tolerated() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    lives(&harness, &lwa, r#","expires_in":3600"#, 3600, "token_type_missing").await;
    lives(&harness, &lwa, r#","expires_in":3600,"token_type":"BEARER""#, 3600, "").await;
    for kind in ["\"mac\"", "\"\"", "7"] {
        lwa.will_say(&format!(r#"{{"access_token":"Atza|m","expires_in":3600,"token_type":{kind}}}"#));
        fails(&harness, "bad_answer").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 14.
async fn a_token_that_is_no_valid_header_value_is_rejected() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    let long = "x".repeat(5000);
    for token in ["", "a b", "a\\r\\nX-Evil: 1", "a\\u0000", "\\u00e9", long.as_str()] {
        lwa.will_say(&format!(r#"{{"access_token":"{token}","token_type":"bearer","expires_in":3600}}"#));
        fails(&harness, "bad_answer").await;
        if !token.is_empty() {
            lwa.will_say(&format!(r#"{{"access_token":"Atza|x","refresh_token":"{token}","expires_in":3600}}"#));
            fails(&harness, "bad_answer").await;
        }
    }
    let asked = lwa.asked.lock().unwrap().clone();
    assert!(asked.iter().all(|form| *form == asked[0]), "nothing of the response was kept");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 15.
async fn a_response_too_large_too_deep_or_with_duplicate_keys_is_rejected() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    let (open, close) = ("[".repeat(20_000), "]".repeat(20_000));
    for body in [
        r#"{"access_token":"Atza|x","access_token":"Atza|y","expires_in":3600}"#.to_owned(),
        format!(r#"{{"access_token":"Atza|x","z":{open}{close}}}"#),
        format!(r#"{{"access_token":"Atza|x","z":"{}"}}"#, "x".repeat(65 << 10)),
    ] {
        lwa.will_say(&body);
        fails(&harness, "bad_answer").await;
    }
    // 64 MB, of which almost nothing may be read.
    let sent = Arc::new(Mutex::new(0_usize));
    let count = sent.clone();
    let endless = Scripted::start(move |mut wire: Wire, _| {
        let count = count.clone();
        async move {
            wire.head().await;
            wire.send("HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n").await;
            let piece = vec![b'x'; 64 << 10];
            while wire.sends(&piece).await {
                *count.lock().unwrap() += piece.len();
            }
        }
    })
    .await;
    let harness = asking(&endless.origin, Some(endless.ca_file().to_str().unwrap()), IDLE).await;
    fails(&harness, "bad_answer").await;
    eventually("the connection to be closed", async || (endless.connections() == 1).then_some(())).await;
    assert!(*sent.lock().unwrap() < 32 << 20, "{} bytes were read", sent.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 17.
async fn a_rejected_client_is_one_failure_for_all_users_without_a_storm() {
    let harness = Harness::start().await;
    let users: Vec<String> = (0..40).map(|number| format!("user-{number}")).collect();
    for user in &users {
        harness.log_in(user).await;
    }
    // Every due user has been refreshed or rescheduled: any other was due at least a second ago. A retry that is
    // planned less than a millisecond ahead reads as now, since times are told to the millisecond. The jitter makes one
    // in about a hundred runs, and the clock stands still.
    let all_are = async |wanted: &str, error: Value| {
        eventually(wanted, async || {
            let told = json(harness.get("/api/auth/amazon/status?limit=100").await).await;
            let ahead = |user: &Value| {
                let due: jiff::Timestamp = user["next_refresh_at"].as_str().unwrap().parse().unwrap();
                due >= harness.clock.now() && user["state"] == wanted && user["last_error"] == error
            };
            let told = told["users"].as_array().unwrap();
            (told.len() == users.len() && told.iter().all(ahead)).then_some(())
        })
        .await;
    };
    let handle = harness.sandbox.set_fault(Rule::from(Fault::InvalidClient).at(Listener::Lwa).always());
    harness.advance(3600);
    all_are("failing", "invalid_client".into()).await;
    assert!(handle.hits() <= 10, "concurrent refreshes before the first rejection: {}", handle.hits());
    for _ in 0..10 {
        let before = handle.hits();
        harness.advance(6);
        all_are("failing", "invalid_client".into()).await;
        assert_eq!(handle.hits() - before, 1, "one probe for all users, at most every few seconds");
    }
    assert_eq!(harness.metric("adsidecar_users{state=\"failing\"}").await, 40.0);
    assert_eq!(harness.metric("adsidecar_users{state=\"login_required\"}").await, 0.0, "no user is told to log in");
    let ready = harness.client.get(harness.admin_url("/readyz")).send().await.unwrap();
    assert_eq!(ready.status(), 200, "readiness does not depend on Amazon");
    harness.sandbox.clear_faults();
    harness.advance(6);
    all_are("fresh", Value::Null).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_secret_corrected_by_a_reload_is_used_immediately() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let secret = harness.directory.path().join("secret");
    std::fs::write(&secret, "wrong").unwrap();
    harness.restart_with("amazon.client_secret_file", secret.to_str().unwrap()).await;
    for _ in 0..3 {
        fails(&harness, "invalid_client").await;
    }
    std::fs::write(&secret, CLIENT_SECRET).unwrap();
    let reloaded = harness.client.post(harness.admin_url("/reload")).send().await.unwrap();
    assert_eq!(reloaded.status(), 200);
    assert_eq!(json(harness.post(REFRESH).await).await["state"], "fresh", "no backoff delays it: the clock is frozen");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 18.
async fn a_grant_of_another_client_or_scope_requires_a_login_with_the_reason() {
    let scope = Fault::Status { code: 400, headers: Vec::new(), body: r#"{"error":"invalid_scope"}"#.into() };
    for (fault, reason) in [(Fault::UnauthorizedClient, "unauthorized_client"), (scope, "invalid_scope")] {
        let harness = Harness::start().await;
        harness.log_in("default").await;
        harness.sandbox.set_fault(Rule::from(fault).at(Listener::Lwa).always());
        harness.advance(3600);
        for _ in 0..10 {
            let answer = harness.get("/v2/profiles").await;
            assert_eq!((answer.status().as_u16(), code(&answer)), (401, "login_required"));
            assert!(json(answer).await["detail"].as_str().unwrap().contains(reason));
        }
        assert_eq!(harness.sandbox.refreshes(), 1, "kept, and retried once an hour");
        assert_eq!(harness.status_of("default").await["last_error"], reason);
        let series = format!("adsidecar_login_required{{reason=\"{reason}\",user=\"default\"}}");
        assert_eq!(harness.metric(&series).await, 1.0);
        harness.sandbox.clear_faults();
        harness.advance(3600);
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 19.
async fn redirects_of_lwa_are_not_followed() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    let trap = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let there = trap.local_addr().unwrap();
    for status in [301, 302, 303, 307, 308] {
        for scheme in ["http", "https"] {
            lwa.will_send(format!(
                "HTTP/1.1 {status} Moved\r\nLocation: {scheme}://{there}/\r\nContent-Length: 0\r\n\r\n"
            ));
            fails(&harness, "bad_answer").await;
        }
    }
    let came = tokio::time::timeout(Duration::from_millis(50), trap.accept()).await;
    assert!(came.is_err(), "the refresh token was sent to another host");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 20.
async fn an_invalid_certificate_ends_the_call_before_a_token_is_sent() {
    let lwa = Lwa::start().await;
    let ca = lwa.scripted.ca_file();
    let ca = ca.to_str().unwrap();
    let other_name = lwa.scripted.origin.replace("127.0.0.1", "localhost");
    // An unknown authority, and a name other than the one requested.
    for (origin, ca) in [(&lwa.scripted.origin, None), (&other_name, Some(ca))] {
        let harness = asking(origin, ca, IDLE).await;
        is_survived(&harness, "tls").await;
    }
    // A server that does not speak TLS: no fallback to plain HTTP.
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("https://{}", plain.local_addr().unwrap());
    let heard = Arc::new(Mutex::new(Vec::new()));
    let note = heard.clone();
    let listening = tokio::spawn(async move {
        loop {
            let (mut stream, _) = plain.accept().await.unwrap();
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut buffer = vec![0; 16 << 10];
            let count = stream.read(&mut buffer).await.unwrap_or(0);
            note.lock().unwrap().extend_from_slice(&buffer[..count]);
            let _ = stream.write_all(ok("{}").as_bytes()).await;
        }
    });
    let harness = asking(&origin, Some(ca), IDLE).await;
    fails(&harness, "tls").await;
    listening.abort();
    assert!(!heard.lock().unwrap().windows(5).any(|window| window == b"Atzr|" || window == b"Atzr%"));
    assert_eq!(lwa.calls(), 0, "no server received a token call");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 21.
async fn an_unresolvable_host_name_is_reported_as_such() {
    let harness = asking("https://lwa.adsidecar.invalid", None, IDLE).await;
    harness.advance(61);
    let status = json(harness.post(REFRESH).await).await["user"].take();
    assert_eq!(status["state"], "failing");
    // A resolver that does not respond may take longer than the connection timeout.
    let error = status["last_error"].as_str().unwrap();
    assert!(["dns", "timeout"].contains(&error), "{error}");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "the access token has not expired");
}

/// The detail that a caller is told once the access token has expired, after a refresh that failed with `error`.
async fn detail(harness: &Harness, error: &str) -> String {
    harness.advance(3600);
    fails(harness, error).await;
    fails(harness, error).await;
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
    json(answer).await["detail"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_html_page_from_a_filter_in_front_of_lwa_is_reported_as_such() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    for status in ["401 Unauthorized", "403 Forbidden", "407 Proxy Authentication Required", "302 Found", "200 OK"] {
        let page = "<html>canary: log in to the network</html>";
        let length = page.len();
        lwa.will_send(format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {length}\r\n\r\n{page}"
        ));
        let detail = detail(&harness, "bad_answer").await;
        let expected = format!(
            "something between adsidecar and Login with Amazon answered: status {}, text/html",
            status.split(' ').next().unwrap()
        );
        assert!(detail.contains(&expected) && !detail.contains("canary"), "{detail}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 14.
async fn tls_interception_in_front_of_lwa_is_reported_with_its_remedy() {
    let lwa = Lwa::start().await;
    let harness = asking(&lwa.scripted.origin, None, IDLE).await;
    let detail = detail(&harness, "tls").await;
    assert!(detail.contains("amazon.ca_file") && detail.contains("127.0.0.1:"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 34.
async fn a_compressed_response_of_lwa_is_not_asked_for_and_reported_as_such() {
    let lwa = Lwa::start().await;
    let harness = lwa.harness().await;
    let page = crate::unauthorized::gzip(br#"{"access_token":"Atza|canary","token_type":"bearer","expires_in":3600}"#);
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n",
        page.len()
    );
    lwa.will_send([head.as_bytes(), &page].concat());
    let detail = detail(&harness, "bad_answer").await;
    assert!(detail.contains("compressed with gzip"), "{detail}");
    let heads = lwa.heads.lock().unwrap();
    let asked = |head: &String| head.to_lowercase().contains("\r\naccept-encoding: identity\r\n");
    assert!(!heads.is_empty() && heads.iter().all(asked), "{heads:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_to_lwa_is_reported_with_host_and_address() {
    let origin = nobody().replace("127.0.0.1", "localhost");
    let harness = asking(&origin, None, IDLE).await;
    let detail = detail(&harness, "unreachable").await;
    assert!(detail.contains("localhost:") && detail.contains("127.0.0.1"), "{detail}");
}
