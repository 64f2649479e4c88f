//! Clocks that are set, wrong, or stopped, and consents close to their end: failures 29 to 32 of the catalogue.

use std::io::Write;
use std::sync::{Arc, Mutex};

use adsidecar::domain::clock::Clock;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use world::{Fault, Listener, Options, Rule};

use crate::harness::{Harness, code, eventually, json};

const REFRESH: &str = "/api/auth/amazon/refresh";
/// Users become idle so early that the background leaves refreshes to callers.
const IDLE: &str = "[refresh]\nidle_after = \"1m\"\nsweep = \"1h\"\n";

fn start() -> Timestamp {
    "2026-08-01T12:00:00Z".parse().unwrap()
}

fn secs(seconds: i64) -> SignedDuration {
    SignedDuration::from_secs(seconds)
}

/// An Amazon with its own, correct clock, and a sidecar whose wall clock differs.
struct Apart {
    harness: Harness,
    amazons: Clock,
}

impl Apart {
    async fn start(extra: &str, ahead: i64) -> Self {
        let amazons = Clock::frozen(start());
        let mut harness = Harness::over(Options::calm(amazons.clone()), extra).await;
        harness.stop_sidecar().await;
        let mut apart = Self { harness, amazons };
        apart.restart(ahead).await;
        apart
    }

    /// Starts or restarts the sidecar on a machine whose clock is ahead of Amazon's.
    async fn restart(&mut self, ahead: i64) {
        self.harness.clock = Clock::frozen(self.amazons.now() + secs(ahead));
        self.harness.start_sidecar().await;
    }

    /// Advances the time of both.
    fn pass(&self, seconds: i64) {
        self.amazons.advance(secs(seconds));
        self.harness.advance(seconds);
    }

    /// Sets the sidecar's clock.
    fn set(&self, seconds: i64) {
        self.harness.clock.step(secs(seconds));
    }

    /// The statuses with which Amazon responded to the calls.
    fn said(&self) -> Vec<u16> {
        self.harness.sandbox.calls(Listener::Na).iter().filter_map(|call| call.status).collect()
    }

    async fn get(&self, user: &str) -> u16 {
        let call = self.harness.request(reqwest::Method::GET, "/v2/profiles").header("x-ads-user", user);
        call.send().await.unwrap().status().as_u16()
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 29.
async fn a_clock_jump_forward_costs_each_user_one_refresh() {
    for hours in [2, 240] {
        let apart = Apart::start("", 0).await;
        for user in ["a", "b", "c"] {
            apart.harness.log_in(user).await;
        }
        apart.harness.sandbox.clear_history();
        apart.set(hours * 3600);
        for _ in 0..10 {
            for user in ["a", "b", "c"] {
                assert_eq!(apart.get(user).await, 200);
            }
        }
        assert_eq!(apart.harness.sandbox.refreshes(), 3, "one refresh per user, then none");
        assert!(apart.said().iter().all(|status| *status == 200));
        let jumps = "adsidecar_clock_jumps_total";
        eventually("the jump to be reported", async || (apart.harness.metric(jumps).await == 1.0).then_some(())).await;
        // The machine's clock is ahead from now on, and refreshes still happen on time.
        for _ in 0..4 {
            apart.pass(45 * 60);
            assert_eq!(apart.get("a").await, 200);
            eventually("the refresh", async || (apart.harness.status_of("a").await["state"] == "fresh").then_some(()))
                .await;
        }
        assert!(apart.said().iter().all(|status| *status == 200));
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 30.
async fn a_clock_set_back_neither_sends_an_expired_token_nor_stalls_refreshes() {
    for back in [-60, -7200, -864_000] {
        for extra in ["", IDLE] {
            let mut apart = Apart::start(extra, 0).await;
            apart.harness.log_in("default").await;
            apart.harness.sandbox.clear_history();
            apart.set(back);
            assert_eq!(apart.get("default").await, 200);
            assert_eq!(apart.harness.sandbox.refreshes(), 0, "the token has not expired");
            if extra.is_empty() {
                apart.pass(3000);
                eventually("the background refresh", async || (apart.harness.sandbox.refreshes() == 1).then_some(()))
                    .await;
            } else {
                apart.pass(3600);
                assert_eq!(apart.get("default").await, 200);
                assert_eq!(apart.harness.sandbox.refreshes(), 1, "expired, regardless of the wall clock");
            }
            assert!(apart.said().iter().all(|status| *status == 200), "no expired token was sent");
            // The record is readable, although its Fernet timestamp is in the future.
            apart.harness.stop_sidecar().await;
            apart.restart(back).await;
            assert_eq!(apart.get("default").await, 200);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_back_extends_no_backoff() {
    let apart = Apart::start(IDLE, 0).await;
    apart.harness.log_in("default").await;
    // After a failure.
    apart.harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(30))).at(Listener::Lwa));
    assert_eq!(json(apart.harness.post(REFRESH).await).await["user"]["state"], "failing");
    apart.set(-864_000);
    apart.pass(30);
    assert_eq!(json(apart.harness.post(REFRESH).await).await["state"], "fresh");
    // Between forced refreshes.
    apart.harness.sandbox.world(|world| world.expire_access_tokens());
    assert_eq!(apart.get("default").await, 200);
    apart.set(-864_000);
    apart.pass(30);
    apart.harness.sandbox.world(|world| world.expire_access_tokens());
    assert_eq!(apart.get("default").await, 200);
    // After a refresh, before the next one.
    apart.pass(3400);
    assert_eq!(apart.harness.status_of("default").await["state"], "expiring");
    apart.set(-864_000);
    apart.harness.sandbox.clear_history();
    assert_eq!(apart.get("default").await, 200);
    assert_eq!(apart.harness.sandbox.refreshes(), 1);
    // After a rejection.
    apart.harness.sandbox.set_fault(Fault::InvalidGrant);
    assert_eq!(code(&apart.harness.post(REFRESH).await), "login_required");
    apart.set(-864_000);
    apart.pass(3600);
    assert_eq!(apart.get("default").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 31.
async fn a_clock_at_or_before_1970_is_tolerated() {
    for year in ["1970-01-01T00:00:00Z", "1960-06-01T00:00:00Z"] {
        let wrong = year.parse::<Timestamp>().unwrap().duration_since(start()).as_secs();
        let mut apart = Apart::start("", wrong).await;
        apart.harness.log_in("default").await;
        assert_eq!(apart.get("default").await, 200);
        apart.pass(3600);
        assert_eq!(apart.get("default").await, 200);
        assert_eq!(apart.harness.metric("adsidecar_clock_skew_seconds").await, wrong as f64, "the skew is reported");
        apart.harness.stop_sidecar().await;
        apart.restart(wrong).await;
        assert_eq!(apart.get("default").await, 200);
        apart.harness.stop_sidecar().await;
        apart.restart(0).await;
        assert_eq!(apart.get("default").await, 200, "works again once the clock is correct");
        apart.pass(3600);
        assert_eq!(apart.get("default").await, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 32.
async fn after_a_suspend_the_first_request_refreshes() {
    let apart = Apart::start("", 0).await;
    apart.harness.log_in("default").await;
    apart.harness.sandbox.clear_history();
    // The wall clocks advance, but the monotonic clock does not.
    apart.amazons.advance(secs(3600));
    apart.set(3600);
    assert_eq!(apart.get("default").await, 200);
    assert_eq!(apart.harness.sandbox.refreshes(), 1);
    assert_eq!(apart.said(), [200], "the expired token was not sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_suspend_with_a_wrong_clock_amazons_next_response_corrects_it() {
    let mut apart = Apart::start(IDLE, 0).await;
    for user in ["a", "b"] {
        apart.harness.log_in(user).await;
    }
    apart.harness.stop_sidecar().await;
    apart.amazons.advance(secs(7200));
    // The sidecar sees no time pass, so both tokens appear valid to it.
    apart.restart(-7200).await;
    apart.harness.sandbox.clear_history();
    assert_eq!(apart.harness.status_of("b").await["state"], "fresh");
    assert_eq!(apart.get("a").await, 200);
    assert_eq!(apart.said(), [401, 200], "Amazon rejects the token, and the call is retried with another");
    assert_eq!(apart.harness.metric("adsidecar_clock_skew_seconds").await, -7200.0);
    assert_eq!(apart.get("b").await, 200);
    assert_eq!(apart.said(), [401, 200, 200], "no expired token is sent from then on");
    assert_eq!(apart.harness.sandbox.refreshes(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_found_expired_by_amazons_clock_after_a_restart_are_refreshed_at_once() {
    let mut apart = Apart::start("", 0).await;
    for user in ["a", "b", "c"] {
        apart.harness.log_in(user).await;
    }
    apart.harness.stop_sidecar().await;
    apart.amazons.advance(secs(3700));
    // By this machine's clock all three live for 58 minutes.
    apart.restart(-3600).await;
    apart.harness.sandbox.clear_history();
    assert_eq!(apart.get("a").await, 200);
    // The first refreshes after a start are spread over some seconds. Neither a sweep nor a planned refresh is due.
    apart.pass(15);
    let sandbox = &apart.harness.sandbox;
    eventually("the others are refreshed too", async || (sandbox.refreshes() == 3).then_some(())).await;
    assert_eq!((apart.get("b").await, apart.get("c").await), (200, 200));
    assert_eq!(apart.said(), [401, 200, 200, 200], "one call found it out");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_skew_is_measured_from_some_ads_api_responses() {
    let apart = Apart::start("", 0).await;
    apart.harness.log_in("default").await;
    let skew = async || apart.harness.metric("adsidecar_clock_skew_seconds").await;
    apart.pass(10);
    assert_eq!((apart.get("default").await, skew().await), (200, 0.0));
    apart.set(90);
    assert_eq!((apart.get("default").await, skew().await), (200, 0.0), "the skew is not measured on every call");
    apart.pass(10);
    assert_eq!((apart.get("default").await, skew().await), (200, 90.0));
    assert_eq!(apart.harness.sandbox.refreshes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_date_from_the_ads_api_causes_no_refresh_storm() {
    let apart = Apart::start("", 0).await;
    apart.harness.log_in("default").await;
    assert_eq!(apart.harness.post(REFRESH).await.status(), 200);
    apart.harness.sandbox.clear_history();
    for date in ["Thu, 01 Jan 2099 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 GMT", "tomorrow"] {
        let answer = Fault::Status { code: 200, headers: vec![("date".into(), date.into())], body: "{}".into() };
        apart.harness.sandbox.set_fault(Rule::from(answer).at(Listener::Na).next(5));
        for _ in 0..5 {
            apart.pass(10);
            assert_eq!(apart.get("default").await, 200);
        }
    }
    assert_eq!(apart.harness.sandbox.refreshes(), 0);
}

/// Captures the log of this process, which runs only this test.
fn logged() -> Arc<Mutex<String>> {
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<String>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().push_str(&String::from_utf8_lossy(bytes));
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let lines = Lines::default();
    let kept = lines.0.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || lines.clone()).init();
    kept
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expiring_consent_is_reported_early_and_logged_once() {
    let log = logged();
    let harness = Harness::start().await;
    harness.log_in("anna").await;
    let day = 24 * 3600;
    let told = async || {
        let consent = harness.status_of("anna").await["consent"].take();
        (consent, harness.metric("adsidecar_consent_ending{user=\"anna\"}").await)
    };
    let lines = || log.lock().unwrap().matches("the consent ends").count();
    assert_eq!((told().await, lines()), (("valid".into(), 0.0), 0));
    harness.advance(334 * day);
    assert_eq!((told().await, lines()), (("valid".into(), 0.0), 0));
    harness.advance(day);
    assert_eq!(told().await, ("ending".into(), 1.0));
    eventually("a log line", async || (lines() == 1).then_some(())).await;
    for _ in 0..5 {
        harness.advance(5 * day);
    }
    assert_eq!(told().await, ("ending".into(), 1.0));
    harness.advance(5 * day);
    assert_eq!(told().await, ("ended".into(), 1.0));
    assert_eq!(lines(), 1, "one line for each consent");
    // A new consent is valid for another year.
    harness.log_in("anna").await;
    assert_eq!(told().await, ("valid".into(), 0.0));
    harness.advance(340 * day);
    eventually("a log line for the new consent", async || (lines() == 2).then_some(())).await;

    // For a grant that was not made here, the end of the consent is unknown.
    let imported = harness.status_of("nobody").await;
    assert_eq!(imported["consent"], Value::Null);
}
