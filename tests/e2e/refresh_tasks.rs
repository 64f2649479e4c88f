//! One refresh at a time, in a separate task, whatever happens to it or beside it: failures 22 to 28 and 93 to 95 of
//! the catalogue. (22 and 23 are in `tokens`.) Fail points apply to a whole process, so each test has its own process.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use adsidecar::domain::grant::{Grant, RefreshToken};
use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use adsidecar::store::{Settings, TokenStore};
use jiff::{SignedDuration, Timestamp};
use reqwest::Method;
use serde_json::Value;
use world::{Fault, Listener, Rule};

use crate::commands::Serving;
use crate::harness::{FERNET_KEY, Harness, code, eventually, json};

const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGOUT: &str = "/api/auth/amazon/logout";

fn interrupted(outcome: &str) -> String {
    format!("adsidecar_token_refresh_interrupted_total{{outcome=\"{outcome}\"}}")
}

/// Runs the sidecar as a separate process with the real clock, by which the stored token expired long ago, so that it
/// refreshes immediately; the process dies at `point`.
async fn dies_at(harness: &Harness, point: &str) {
    let file = harness.config_file();
    let mut command = Command::new(env!("CARGO_BIN_EXE_adsidecar"));
    command.args(["serve", "--config", file.to_str().unwrap()]).env_clear();
    command.env("FAILPOINTS", format!("{point}=return")).stdout(Stdio::null()).stderr(Stdio::null());
    let ended = tokio::task::spawn_blocking(move || command.status().unwrap()).await.unwrap();
    assert!(!ended.success() && ended.code().is_none(), "the process exited by itself: {ended}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 24.
async fn a_crash_during_a_refresh_loses_nothing_unreported() {
    for (point, stored) in
        [("refresh_answered", false), ("save_unsynced", false), ("save_synced", true), ("refresh_stored", true)]
    {
        for rotating in [false, true] {
            let mut harness = Harness::start().await;
            harness.log_in("default").await;
            harness.stop_sidecar().await;
            harness.sandbox.clear_history();
            if rotating {
                harness.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa));
            }
            dies_at(&harness, point).await;
            assert_eq!(harness.sandbox.refreshes(), 1, "{point}: one token call");
            harness.start_sidecar().await;
            let answer = harness.post(REFRESH).await;
            let lost = rotating && !stored;
            assert_eq!(code(&answer), if lost { "login_required" } else { "" }, "{point}, rotating: {rotating}");
            assert_eq!(
                harness.metric(&interrupted("lost")).await,
                f64::from(u8::from(lost)),
                "{point}: a lost refresh is reported"
            );
            let recovered = !rotating && !stored;
            assert_eq!(harness.metric(&interrupted("recovered")).await, f64::from(u8::from(recovered)), "{point}");
            // A loss is reported once, and the journal entry is deleted.
            harness.stop_sidecar().await;
            harness.start_sidecar().await;
            harness.advance(3600);
            assert_eq!(code(&harness.post(REFRESH).await), if lost { "login_required" } else { "" }, "{point}");
            assert_eq!(harness.metric(&interrupted("lost")).await, 0.0, "{point}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 25.
async fn a_refreshed_token_that_cannot_be_written_is_used_and_stored_later() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    fail::cfg("save_refused", "return").unwrap();
    harness.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa));
    harness.advance(3600);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "served from memory");
    assert_eq!(harness.status_of("default").await["state"], "fresh");
    let ready = async || harness.client.get(harness.admin_url("/readyz")).send().await.unwrap().status().as_u16();
    assert_eq!(ready().await, 503);
    assert_eq!(harness.metric("adsidecar_store_up").await, 0.0);
    assert!(harness.metric("adsidecar_store_errors_total{op=\"put\"}").await >= 1.0);
    fail::remove("save_refused");
    eventually("readiness", async || (ready().await == 200).then_some(())).await;
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.post(REFRESH).await.status(), 200, "the rotated refresh token was stored");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 26.
async fn a_panicking_refresh_is_released_and_retried() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    std::panic::set_hook(Box::new(|_| {}));
    fail::cfg("refresh_begun", "panic").unwrap();
    harness.advance(3600);
    let callers: Vec<_> = (0..50).map(|_| tokio::spawn(harness.request(Method::GET, "/v2/profiles").send())).collect();
    for caller in callers {
        let answer = caller.await.unwrap().unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
    }
    let status = harness.status_of("default").await;
    assert_eq!((&status["state"], &status["last_error"]), (&"failing".into(), &"internal".into()));
    let panics = harness.metric("adsidecar_token_refresh_total{reason=\"internal\",result=\"failure\"}").await;
    assert!((1.0..20.0).contains(&panics), "it backs off as after any failure: {panics}");
    fail::remove("refresh_begun");
    eventually("the process to keep serving", async || {
        (harness.get("/v2/profiles").await.status() == 200).then_some(())
    })
    .await;
    assert_eq!(harness.sandbox.refreshes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 27.
async fn background_and_caller_share_one_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa).always());
    // The background starts a refresh, and the access token expires meanwhile.
    harness.advance(3000);
    gate.reached(1).await;
    harness.advance(600);
    let callers: Vec<_> = (0..50).map(|_| tokio::spawn(harness.request(Method::GET, "/v2/profiles").send())).collect();
    let asked: Vec<_> = (0..10).map(|_| tokio::spawn(harness.request(Method::POST, REFRESH).send())).collect();
    eventually("60 waiting callers", async || {
        (harness.metric("adsidecar_requests_in_flight").await >= 60.0).then_some(())
    })
    .await;
    gate.release();
    for one in callers.into_iter().chain(asked) {
        // The lifetime counts from the token request: 600 s of it have passed, and the rest is enough.
        assert_eq!(one.await.unwrap().unwrap().status(), 200);
    }
    assert_eq!(harness.sandbox.refreshes(), 1);
}

/// Stores users whose grants have no access token yet.
async fn stored_users(harness: &Harness, count: usize) {
    let keyring = Keyring::new(&[Secret::new(FERNET_KEY)]).unwrap();
    let (store, _) =
        TokenStore::open(&Settings { path: harness.store_path(), postgres: None }, keyring.into()).unwrap();
    for number in 0..count {
        let grant = Grant {
            refresh_token: RefreshToken::new(harness.sandbox.grant().refresh_token).unwrap(),
            previous: None,
            access: None,
            updated_at: harness.clock.now(),
            consented_at: None,
            used_at: None,
            scope: None,
            generation: 1,
        };
        store.save(&format!("user-{number}").parse().unwrap(), &grant, None).await.unwrap();
    }
    store.close().await.unwrap();
}

/// The users that are due: those of the background schedule, and `user-999`, whose token a caller needs.
async fn due_now(harness: &Harness) -> BTreeSet<String> {
    let now = harness.clock.now();
    let all = json(harness.get("/api/auth/amazon/status").await).await;
    let due = all["users"].as_array().unwrap().iter().filter(|user| {
        let at = user["next_refresh_at"].as_str().unwrap().parse::<Timestamp>().unwrap();
        at <= now || user["user_id"] == "user-999"
    });
    due.map(|user| user["user_id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 28.
async fn a_thousand_users_at_startup_are_refreshed_over_a_minute_with_limited_concurrency() {
    let mut harness = Harness::start().await;
    harness.stop_sidecar().await;
    stored_users(&harness, 1000).await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa).always());
    harness.start_sidecar().await;
    harness.advance(6);
    gate.reached(8).await;
    // A user without waiting callers is not among those eight, and its caller does not wait for a permit.
    let caller = tokio::spawn(harness.request(Method::GET, "/v2/profiles").header("x-ads-user", "user-999").send());
    gate.reached(9).await;
    assert!(gate.hits() <= 9, "refresh.concurrency is 8: {}", gate.hits());
    // While the gate holds all token calls no user is refreshed, so the status still shows which ones are due.
    let due = due_now(&harness).await;
    gate.release();
    assert_eq!(caller.await.unwrap().unwrap().status(), 200);
    assert!((60..=150).contains(&due.len()), "a tenth of them in a tenth of the minute: {}", due.len());
    let fresh = "adsidecar_users{state=\"fresh\"}";
    eventually("all that are due", async || (harness.metric(fresh).await as usize >= due.len()).then_some(())).await;
    assert_eq!(harness.sandbox.refreshes() as usize, due.len(), "and nobody else");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_waits_for_a_refresh_that_nobody_waits_for_and_stores_its_result() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    // Login with Amazon has given out another refresh token, and the one in the store is dead.
    harness.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa));
    let release = hold("refresh_answered");
    harness.advance(3600 - 600);
    eventually("the background's token call", async || (harness.sandbox.refreshes() == 1).then_some(())).await;
    let mut ended = harness.begin_stop();
    let early = tokio::time::timeout(Duration::from_millis(700), &mut ended).await;
    assert!(early.is_err(), "it waits, though no request is in flight");
    drop(release);
    ended.await.unwrap();
    harness.start_sidecar().await;
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.status_of("default").await["state"], "fresh", "with the refresh token that was given out last");
    assert_eq!(harness.metric(&interrupted("lost")).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_begins_no_refresh_in_the_background() {
    let mut harness = Harness::start().await;
    harness.log_in("first").await;
    harness.advance(600);
    harness.log_in("second").await;
    harness.sandbox.clear_history();
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa).always());
    // The first one's token expires in 14 minutes, the second one's in 24.
    harness.advance(3600 - 840 - 600);
    gate.reached(1).await;
    let (ready, live) = (harness.admin_url("/readyz"), harness.admin_url("/livez"));
    let ended = harness.begin_stop();
    eventually("it drains", async || (harness.client.get(&ready).send().await.unwrap().status() == 503).then_some(()))
        .await;
    // Both are due now, and the shutdown waits for the first.
    harness.advance(1200);
    for _ in 0..50 {
        assert_eq!(harness.client.get(&live).send().await.unwrap().status(), 200);
    }
    gate.release();
    ended.await.unwrap();
    assert_eq!(harness.sandbox.refreshes(), 1, "a shutdown would have to wait for each further one, or lose it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_outlasts_the_drain_is_broken_off_before_the_shutdown_waits_for_token_calls() {
    let mut harness = Harness::set(&[("shutdown.drain", "100ms")]).await;
    let amazon = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let caller = tokio::spawn(harness.request(Method::GET, "/v2/profiles").send());
    amazon.reached(1).await;
    let lwa = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let refresh = tokio::spawn(harness.request(Method::POST, REFRESH).send());
    lwa.reached(1).await;
    let begun = Instant::now();
    let ended = harness.begin_stop();
    assert!(caller.await.unwrap().is_err(), "it got no response");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert!(!ended.is_finished(), "the token call is not given up with its caller");
    assert!(refresh.await.unwrap().is_err());
    lwa.release();
    ended.await.unwrap();
    harness.sandbox.clear_faults();
    harness.start_sidecar().await;
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    assert_eq!(harness.metric(&interrupted("recovered")).await, 0.0, "the response was stored");
}

/// Twenty users who logged in at the same instant, 12:00:00, with tokens for an hour.
async fn twenty_users() -> (Harness, Vec<String>) {
    let harness = Harness::start().await;
    let users: Vec<_> = (0..20).map(|number| format!("user-{number}")).collect();
    for user in &users {
        harness.log_in(user).await;
    }
    harness.sandbox.clear_history();
    (harness, users)
}

/// When the next refresh of each user is due.
async fn planned(harness: &Harness, users: &[String]) -> Vec<Timestamp> {
    let mut planned = Vec::new();
    for user in users {
        planned.push(harness.status_of(user).await["next_refresh_at"].as_str().unwrap().parse().unwrap());
    }
    planned
}

#[tokio::test(flavor = "multi_thread")]
async fn background_refreshes_of_users_who_logged_in_together_are_spread() {
    let (harness, users) = twenty_users().await;
    let planned = planned(&harness, &users).await;
    assert!(planned.iter().collect::<BTreeSet<_>>().len() > 15, "{planned:?}");
    // `refresh.ahead` is 15 minutes; the jitter is up to a fifth of that, on the early side.
    let [first, middle, last] =
        ["12:42:00", "12:43:30", "12:45:00"].map(|time| format!("2026-08-01T{time}Z").parse::<Timestamp>().unwrap());
    assert!(planned.iter().all(|at| (first..=last).contains(at)), "{planned:?}");
    // And each comes when it is planned, no sooner.
    for at in [middle, last] {
        harness.clock.advance(at.duration_since(harness.clock.now()));
        let due = planned.iter().filter(|planned| **planned <= at).count() as u64;
        eventually("all that are due", async || (harness.sandbox.refreshes() >= due).then_some(())).await;
        assert_eq!(harness.sandbox.refreshes(), due, "at {at}: {planned:?}");
        assert!(at == last || (3..=17).contains(&due), "about half of them: {due}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_after_a_failure_that_hit_all_users_at_once_are_spread() {
    let (harness, users) = twenty_users().await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa).always());
    harness.advance(3600 - 600);
    let failing = "adsidecar_users{state=\"failing\"}";
    eventually("all fail", async || (harness.metric(failing).await == 20.0).then_some(())).await;
    let (planned, now) = (planned(&harness, &users).await, harness.clock.now());
    assert!(planned.iter().collect::<BTreeSet<_>>().len() > 15, "{planned:?}");
    let first_backoff = SignedDuration::from_millis(500);
    assert!(planned.iter().all(|at| (now..=now + first_backoff).contains(at)), "full jitter: {now}, {planned:?}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 93.
async fn a_logout_beats_a_refresh_at_every_point() {
    for point in ["refresh_begun", "refresh_answered"] {
        let mut harness = Harness::start().await;
        harness.log_in("default").await;
        harness.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa));
        let release = hold(point);
        let asked = tokio::spawn(harness.request(Method::POST, REFRESH).send());
        if point == "refresh_answered" {
            eventually("LWA to respond", async || (harness.sandbox.refreshes() == 1).then_some(())).await;
        }
        assert_eq!(harness.post(LOGOUT).await.status(), 204);
        drop(release);
        let answer = asked.await.unwrap().unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (401, "login_required"));
        let dropped = "adsidecar_token_refresh_dropped_total";
        eventually("the late response", async || (harness.metric(dropped).await == 1.0).then_some(())).await;
        harness.stop_sidecar().await;
        harness.start_sidecar().await;
        assert_eq!(harness.status_of("default").await["state"], "none", "{point}");
        assert_eq!(code(&harness.get("/v2/profiles").await), "login_required");
        assert!(harness.ads_calls().is_empty());
    }
}

/// Holds every task that reaches the fail point `point` until the returned sender is dropped. Other threads take over
/// the remaining tasks of the blocked thread; the action `pause` would block those too, for example the logout under
/// test.
pub fn hold(point: &str) -> std::sync::mpsc::Sender<()> {
    let (release, released) = std::sync::mpsc::channel();
    let released = std::sync::Mutex::new(released);
    let wait = move || tokio::task::block_in_place(|| _ = released.lock().unwrap().recv());
    fail::cfg_callback(point, wait).unwrap();
    release
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 94.
async fn a_login_right_after_a_logout_stays() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let asked = tokio::spawn(harness.request(Method::POST, REFRESH).send());
    gate.reached(1).await;
    assert_eq!(harness.post(LOGOUT).await.status(), 204);
    harness.advance(60);
    harness.log_in("default").await;
    let adopted = harness.status_of("default").await;
    let newest = harness.sandbox.world(|world| world.grants.last().unwrap().refresh_token.clone());
    gate.release();
    asked.await.unwrap().unwrap();
    eventually("the late response", async || {
        (harness.metric("adsidecar_token_refresh_total{reason=\"\",result=\"success\"}").await == 1.0).then_some(())
    })
    .await;
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    let status = harness.status_of("default").await;
    assert_eq!((&status["state"], &status["consented_at"]), (&"fresh".into(), &adopted["consented_at"]));
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    let form = harness.sandbox.calls(Listener::Lwa).pop().unwrap().text();
    let mut form = url::form_urlencoded::parse(form.as_bytes());
    assert!(form.any(|(name, value)| name == "refresh_token" && value == newest), "the refresh token of the new login");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 95.
async fn a_request_in_flight_at_logout_completes_and_the_next_is_rejected() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let call = tokio::spawn(harness.request(Method::GET, "/v2/profiles").send());
    gate.reached(1).await;
    assert_eq!(harness.post(LOGOUT).await.status(), 204);
    let next = harness.get("/v2/profiles").await;
    assert_eq!((next.status().as_u16(), code(&next)), (401, "login_required"));
    gate.release();
    let first = call.await.unwrap().unwrap();
    assert_eq!((first.status().as_u16(), code(&first)), (200, ""));
    assert!(json(first).await.is_array());
    assert_eq!(harness.ads_calls().len(), 1);
    assert_eq!(harness.status_of("default").await["expires_at"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_lands_while_amazons_401_is_looked_at_serves_its_caller() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    // No other refresh is forced within 30 s of this one.
    harness.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na));
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    harness.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na));
    let release = hold("rejection_seen");
    let (url, before) = (harness.proxy_url("/v2/profiles"), harness.ads_calls().len());
    let caller = tokio::spawn(harness.client.get(url).send());
    eventually("Amazon's rejection", async || (harness.ads_calls().len() > before).then_some(())).await;
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    drop(release);
    assert_eq!(caller.await.unwrap().unwrap().status(), 200, "the new token is used");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_to_serve_and_a_kill_are_not_reported_as_a_lost_grant() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    let mut serving = Serving::start(&harness, &[]).await;
    // With a `Retry-After`, so that no other refresh is running when the process is killed.
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(60))).at(Listener::Lwa));
    let refresh = async |serving: &Serving| {
        let url = format!("http://{}{REFRESH}", serving.proxy);
        harness.client.post(url).send().await.unwrap().status().as_u16()
    };
    assert_eq!(refresh(&serving).await, 503);
    serving.signal("KILL");
    serving.ended().await;
    let serving = Serving::start(&harness, &[]).await;
    assert_eq!(refresh(&serving).await, 200);
    let metrics = harness.client.get(format!("http://{}/metrics", serving.admin)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let recovered = "adsidecar_token_refresh_interrupted_total{outcome=\"recovered\"} 0";
    assert!(metrics.lines().any(|line| line == recovered), "nothing was interrupted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_while_a_refusal_is_handled_can_be_refreshed_at_once() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.restart_with("amazon.refresh_token", "Atzr|configured-elsewhere").await;
    // The start tries the grant by itself; this request joins or follows it, so that the next one has its own refusal.
    assert_eq!(harness.post(REFRESH).await.status(), 200);
    harness.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa));
    let release = hold("refresh_refused");
    let refused = tokio::spawn(harness.client.post(harness.proxy_url(REFRESH)).send());
    eventually("the refusal", async || (harness.status_of("default").await["state"] == "login_required").then_some(()))
        .await;
    harness.log_in("default").await;
    let begun = Instant::now();
    drop(release);
    refused.await.unwrap().unwrap();
    // The first may still join the one that was refused.
    eventually("a refresh", async || (harness.post(REFRESH).await.status() == 200).then_some(())).await;
    assert!(begun.elapsed() < Duration::from_secs(8), "nothing waits for what was refused: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_while_a_configured_refresh_token_is_adopted_is_kept_and_the_token_is_adopted_when_it_is_refused() {
    let mut harness = Harness::start().await;
    let configured = harness.sandbox.grant().refresh_token;
    let text = std::fs::read_to_string(harness.config_file()).unwrap();
    let amazon = format!("[amazon]\nrefresh_token = {configured:?}");
    std::fs::write(harness.config_file(), text.replace("[amazon]", &amazon)).unwrap();
    // The reload finds that the user has no grant, and then a person logs in.
    let (reached, mut at_point) = tokio::sync::mpsc::unbounded_channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let wait = move || {
        let _ = reached.send(());
        tokio::task::block_in_place(|| _ = released.lock().unwrap().recv());
    };
    fail::cfg_callback("adoption_decided", wait).unwrap();
    assert_eq!(harness.client.post(harness.admin_url("/reload")).send().await.unwrap().status(), 200);
    at_point.recv().await.unwrap();
    harness.log_in("default").await;
    let login = harness.status_of("default").await["consented_at"].clone();
    assert_ne!(login, Value::Null);
    drop(release);
    harness.stop_sidecar().await;
    fail::remove("adoption_decided");
    harness.start_sidecar().await;
    assert_eq!(harness.status_of("default").await["consented_at"], login, "the login is kept");
    harness.stop_sidecar().await;
    let of_login = harness.sandbox.world(|world| world.grants.last().unwrap().refresh_token.clone());
    assert!(harness.sandbox.world(|world| world.revoke(&of_login)));
    harness.sets.push(("amazon.refresh_token".to_owned(), configured));
    harness.start_sidecar().await;
    // Nobody has consented to it here.
    eventually("the adoption", async || (harness.status_of("default").await["consented_at"].is_null()).then_some(()))
        .await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}
