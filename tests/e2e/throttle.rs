//! The throttle: what happens to requests while Amazon refuses others like them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use adsidecar::domain::clock::Clock;
use reqwest::{Method, RequestBuilder, Response};
use tokio::task::{JoinHandle, JoinSet};
use world::{Fault, Listener, Options, RateLimit, Rule, Told};

use crate::harness::{Harness, code, eventually, header, json};

pub const PROFILE: &str = "3012345678901234561";
const LIST: &str = "/sp/campaigns/list";

/// A sidecar in this mode on a frozen clock, with user `default` logged in. It does not search for accounts by itself.
async fn harness(mode: &str) -> Harness {
    Harness::set(&[("throttle.mode", mode), ("accounts.sync", "off")]).await
}

/// As above, on a running clock, with ten accounts `a0` to `a9`.
async fn running(sets: &[(&str, &str)]) -> Harness {
    let accounts: String =
        (0..10).map(|n| format!("[[account]]\nname = \"a{n}\"\nprofile_id = \"{PROFILE}\"\n")).collect();
    // Amazon's hosts offer HTTP/2.
    let options = Options { http2: true, ..Options::calm(Clock::system()) };
    let mut harness = Harness::over(options, &accounts).await;
    harness.stop_sidecar().await;
    harness.sets.extend(sets.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    harness.start_sidecar().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    harness
}

/// Amazon refuses the next call with a 429.
fn refuse_next(harness: &Harness, retry_after: Option<u32>) {
    harness.sandbox.set_fault(Rule::from(Fault::too_many(retry_after)).at(Listener::Na));
}

/// A request that lists campaigns.
fn campaigns(harness: &Harness, path: &str, body: &str) -> RequestBuilder {
    let kind = "application/vnd.spCampaign.v3+json";
    let request = harness.request(Method::POST, path).header("content-type", kind).header("accept", kind);
    request.body(body.to_owned())
}

async fn list(harness: &Harness, body: &str) -> Response {
    campaigns(harness, LIST, body).header("amazon-advertising-api-scope", PROFILE).send().await.unwrap()
}

/// A request in a task of its own, which has reached the queue when this returns.
async fn waiting(harness: &Harness, path: &str) -> JoinHandle<Response> {
    let before = waiting_bytes(harness).await;
    let request = harness.request(Method::GET, path);
    let task = tokio::spawn(async move { request.send().await.unwrap() });
    eventually("the request waits", async || (waiting_bytes(harness).await > before).then_some(())).await;
    task
}

pub async fn waiting_bytes(harness: &Harness) -> f64 {
    harness.metric("adsidecar_throttle_waiting_bytes").await
}

async fn throttled(harness: &Harness, by: &str) -> f64 {
    harness.metric(&format!("adsidecar_throttled_total{{by=\"{by}\",region=\"na\"}}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn off_and_observe_pass_every_429_as_it_is() {
    for mode in ["off", "observe"] {
        let harness = harness(mode).await;
        for retry_after in [Some(30), None] {
            refuse_next(&harness, retry_after);
            let refused = harness.get("/v2/profiles").await;
            let expected = retry_after.map_or(String::new(), |seconds| seconds.to_string());
            assert_eq!((refused.status().as_u16(), header(&refused, "retry-after")), (429, expected.as_str()));
            assert_eq!((code(&refused), header(&refused, "x-adsidecar-throttle")), ("", ""));
            assert_eq!(refused.text().await.unwrap(), r#"{"code":"429","details":"Too Many Requests"}"#);
            let next = harness.get("/v2/profiles").await;
            assert_eq!((next.status().as_u16(), header(&next, "x-adsidecar-throttle")), (200, ""), "{mode}");
        }
        assert_eq!(harness.ads_calls().len(), 4);
        let rate = "adsidecar_throttle_rate{family=\"profiles\",kind=\"read\",region=\"na\"}";
        assert_eq!(harness.metric(rate).await > 0.0, mode == "observe", "only observe learns");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn enforce_spares_amazon_and_tells_the_true_wait() {
    let harness = harness("enforce").await;
    refuse_next(&harness, Some(30));
    let amazons = harness.get("/v2/profiles").await;
    assert_eq!((amazons.status().as_u16(), code(&amazons), header(&amazons, "retry-after")), (429, "", "30"));
    harness.advance(10);
    let ours = harness.get("/v2/profiles").await;
    assert_eq!((ours.status().as_u16(), code(&ours)), (429, "throttled"));
    assert_eq!(header(&ours, "content-type"), "application/problem+json");
    let wait: u64 = header(&ours, "retry-after").parse().unwrap();
    assert!((20..=24).contains(&wait), "the rest of the 30 seconds, and up to a tenth of them: {wait}");
    assert_eq!(header(&ours, "ratelimit"), format!("\"na/profiles/read\";r=0;t={wait}"));
    assert!(header(&ours, "x-adsidecar-throttle").ends_with(", bucket=na/profiles/read"));
    let problem = json(ours).await;
    assert_eq!((&problem["code"], &problem["retryable"]), (&"throttled".into(), &true.into()));
    // Nothing was sent, and other kinds of requests and other regions go on.
    assert_eq!(harness.ads_calls().len(), 1);
    assert_eq!(list(&harness, "{}").await.status(), 200);
    let elsewhere = harness.request(Method::GET, "/v2/profiles").header("x-ads-region", "eu").send().await.unwrap();
    assert_eq!(elsewhere.status(), 200);
    assert_eq!((throttled(&harness, "amazon").await, throttled(&harness, "sidecar").await), (1.0, 1.0));
    harness.advance(24);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_sends_a_refused_request_again_with_its_body() {
    let harness = Arc::new(harness("queue").await);
    refuse_next(&harness, Some(5));
    let body = format!("{{\"maxResults\":10,\"note\":\"{}\"}}", "x".repeat(10_000));
    let request = tokio::spawn({
        let (harness, body) = (harness.clone(), body.clone());
        async move { list(&harness, &body).await }
    });
    eventually("it waits", async || (waiting_bytes(&harness).await >= 18_000.0).then_some(())).await;
    harness.advance(4);
    assert!(!request.is_finished());
    harness.advance(2);
    let answer = request.await.unwrap();
    assert_eq!((answer.status().as_u16(), code(&answer)), (200, ""));
    let told = header(&answer, "x-adsidecar-throttle");
    assert!(told.starts_with("wait=") && told.ends_with(", bucket=na/sponsored_products/read"), "{told}");
    let calls = harness.ads_calls();
    assert_eq!(
        calls.iter().map(|call| (call.status, &*call.body)).collect::<Vec<_>>(),
        [(Some(429), body.as_bytes()), (Some(200), body.as_bytes())]
    );
    assert_eq!((throttled(&harness, "amazon").await, waiting_bytes(&harness).await), (1.0, 0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_body_is_not_held_gets_amazons_429() {
    let harness = Harness::set(&[("throttle.mode", "queue"), ("proxy.replay_limit", "10B")]).await;
    refuse_next(&harness, Some(5));
    let answer = list(&harness, "{\"maxResults\": 10}").await;
    assert_eq!((answer.status().as_u16(), code(&answer), header(&answer, "retry-after")), (429, "", "5"));
    assert_eq!(harness.ads_calls().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_beyond_the_timeout_is_refused_at_once_and_amazons_429_passes() {
    let harness = harness("queue").await;
    refuse_next(&harness, Some(600));
    let amazons = harness.get("/v2/profiles").await;
    assert_eq!((amazons.status().as_u16(), code(&amazons), header(&amazons, "retry-after")), (429, "", "600"));
    let ours = harness.get("/v2/profiles").await;
    assert_eq!((ours.status().as_u16(), code(&ours)), (429, "throttled"));
    assert!(header(&ours, "retry-after").parse::<u64>().unwrap() >= 600);
    assert_eq!((throttled(&harness, "amazon").await, throttled(&harness, "sidecar").await), (1.0, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_waiting_requests_than_allowed_are_refused_at_once() {
    let harness = Harness::set(&[("throttle.mode", "queue"), ("throttle.max_waiting", "1")]).await;
    refuse_next(&harness, Some(10));
    let first = waiting(&harness, "/v2/profiles").await;
    let second = harness.get("/v2/profiles").await;
    assert_eq!((second.status().as_u16(), code(&second)), (429, "throttled"));
    harness.advance(12);
    assert_eq!(first.await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_leaves_the_queue() {
    let harness = harness("queue").await;
    refuse_next(&harness, Some(10));
    let stays = waiting(&harness, "/v2/profiles").await;
    let one = waiting_bytes(&harness).await;
    let mut wire = harness.dial().await;
    wire.send("GET /v2/profiles HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    eventually("two wait", async || (waiting_bytes(&harness).await > one).then_some(())).await;
    drop(wire);
    eventually("one waits", async || (waiting_bytes(&harness).await == one).then_some(())).await;
    harness.advance(12);
    assert_eq!(stays.await.unwrap().status(), 200);
    assert_eq!(harness.ads_calls().len(), 2, "the request of the caller that left was never sent");
    assert_eq!(harness.metric("adsidecar_throttle_wait_seconds_count").await, 2.0, "both have waited");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_answers_every_waiting_request() {
    let mut harness = running(&[("throttle.mode", "queue"), ("shutdown.drain", "4s")]).await;
    // The turn of the first comes within the drain, that of the second does not.
    refuse_next(&harness, Some(1));
    let soon = waiting(&harness, "/v2/profiles").await;
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(20))).at(Listener::Na).on(LIST));
    let request = campaigns(&harness, LIST, "{}").header("x-ads-account", "a1");
    let late = tokio::spawn(async move { request.send().await.unwrap() });
    eventually("both wait", async || (waiting_bytes(&harness).await > 16_000.0).then_some(())).await;
    let began = Instant::now();
    let stopped = harness.begin_stop();
    assert_eq!(soon.await.unwrap().status(), 200);
    let late = late.await.unwrap();
    assert_eq!((late.status().as_u16(), code(&late)), (503, "draining"));
    assert!(late.headers().contains_key("retry-after"), "{late:?}");
    stopped.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_keeps_what_was_learned() {
    let harness = harness("enforce").await;
    refuse_next(&harness, Some(60));
    assert_eq!(harness.get("/v2/profiles").await.status(), 429);
    let reloaded = harness.client.post(harness.admin_url("/reload")).send().await.unwrap();
    assert_eq!(reloaded.status(), 200);
    assert_eq!(code(&harness.get("/v2/profiles").await), "throttled");
}

/// The response to a request that waits; the clock moves until it comes.
async fn served<T>(harness: &Harness, waiting: JoinHandle<T>) -> T {
    eventually("its turn", async || {
        harness.advance(3);
        waiting.is_finished().then_some(())
    })
    .await;
    waiting.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_answers_no_waiting_request() {
    let harness = harness("queue").await;
    refuse_next(&harness, Some(10));
    let first = waiting(&harness, "/v2/profiles").await;
    let reloaded = harness.client.post(harness.admin_url("/reload")).send().await.unwrap();
    assert_eq!(reloaded.status(), 200);
    // The new configuration's requests wait behind those of the previous one, and count against the same room.
    let one = waiting_bytes(&harness).await;
    let second = waiting(&harness, "/v2/profiles").await;
    assert!(!first.is_finished() && waiting_bytes(&harness).await > one);
    assert_eq!(served(&harness, first).await.status(), 200);
    assert_eq!(served(&harness, second).await.status(), 200);
}

/// The wait that is expected, in seconds, for a request behind a list at this path.
async fn expected_behind(path: &str) -> f64 {
    let harness = harness("queue").await;
    for _ in 0..9 {
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
    refuse_next(&harness, Some(1));
    let first = waiting(&harness, "/v2/profiles").await;
    // Seconds later the rate would have risen.
    harness.advance(2);
    assert_eq!(first.await.unwrap().status(), 200);
    harness.advance(1);
    let itself = harness.get(path).await;
    assert_eq!(header(&itself, "x-adsidecar-throttle"), "", "it does not wait itself");
    let behind = waiting(&harness, "/v2/profiles").await;
    let behind = served(&harness, behind).await;
    let told = header(&behind, "x-adsidecar-throttle").split("expected=").nth(1).unwrap().split(',').next().unwrap();
    told.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extended_list_counts_as_five_requests() {
    let (plain, extended) = (expected_behind("/v2/profiles").await, expected_behind("/v2/profiles/extended").await);
    let ratio = extended / plain;
    assert!((2.5..=6.0).contains(&ratio), "{plain} s behind a list, {extended} s behind an extended one");
}

const SYNC: &str = "/api/auth/amazon/accounts/sync";
const WAITING: &str = "adsidecar_throttle_waiting{family=\"profiles\",kind=\"read\",region=\"na\"}";

/// The calls for profiles that North America got.
fn profiles(harness: &Harness) -> usize {
    harness.sandbox.calls(Listener::Na).iter().filter(|call| call.target == "/v2/profiles").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_search_for_accounts_obeys_a_pause_that_a_caller_was_told() {
    for mode in ["observe", "queue"] {
        let harness = Arc::new(harness(mode).await);
        refuse_next(&harness, Some(20));
        let caller = harness.request(Method::GET, "/v2/profiles");
        let caller = tokio::spawn(async move { caller.send().await.unwrap() });
        let rate = "adsidecar_throttle_rate{family=\"profiles\",kind=\"read\",region=\"na\"}";
        eventually("the 429", async || (harness.metric(rate).await > 0.0).then_some(())).await;
        let search = tokio::spawn({
            let harness = harness.clone();
            async move { harness.post(SYNC).await.status() }
        });
        let expected = if mode == "queue" { 2.0 } else { 1.0 };
        eventually("it waits", async || (harness.metric(WAITING).await == expected).then_some(())).await;
        assert_eq!(profiles(&harness), 1, "{mode}: only the caller's own");
        assert_eq!(served(&harness, search).await, 200);
        assert_eq!(served(&harness, caller).await.status() == 200, mode == "queue");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_are_spared_what_the_search_for_accounts_was_refused() {
    let harness = Arc::new(harness("enforce").await);
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(20))).at(Listener::Na).on("/v2/profiles"));
    let search = tokio::spawn({
        let harness = harness.clone();
        async move { harness.post(SYNC).await.status() }
    });
    eventually("callers are refused", async || {
        let calls = profiles(&harness);
        let refused = calls == 1 && code(&harness.get("/v2/profiles").await) == "throttled";
        (refused && profiles(&harness) == calls).then_some(())
    })
    .await;
    eventually("it waits for its turn", async || {
        harness.advance(5);
        search.is_finished().then_some(())
    })
    .await;
    assert_eq!(search.await.unwrap(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn families_and_accounts_have_modes_of_their_own() {
    let accounts = format!(
        "[[account]]\nname = \"own\"\nprofile_id = \"{PROFILE}\"\nthrottle = \"off\"\n\
         [[account]]\nname = \"usual\"\nprofile_id = \"{PROFILE}\"\n\
         [throttle]\nmode = \"observe\"\nfamilies = [\"profiles=enforce\"]\n"
    );
    let harness = Harness::with(&accounts).await;
    harness.log_in("default").await;
    refuse_next(&harness, Some(60));
    assert_eq!(harness.get("/a/usual/v2/profiles").await.status(), 429);
    assert_eq!(code(&harness.get("/a/usual/v2/profiles").await), "throttled");
    assert_eq!(harness.get("/a/own/v2/profiles").await.status(), 200);
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(60))).at(Listener::Na));
    let list = || campaigns(&harness, "/a/usual/sp/campaigns/list", "{}").send();
    assert_eq!(list().await.unwrap().status(), 429);
    assert_eq!(list().await.unwrap().status(), 200, "another family is only observed");
}

#[tokio::test(flavor = "multi_thread")]
async fn refreshes_are_never_throttled() {
    let harness = harness("enforce").await;
    refuse_next(&harness, Some(900));
    assert_eq!(harness.get("/v2/profiles").await.status(), 429);
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200);
    assert_eq!(code(&harness.get("/v2/profiles").await), "throttled");
}

/// How the wait is told, and the pause that follows, in seconds.
#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_tell_the_wait_is_understood() {
    let day = Told::Text("86400".into());
    for (path, told, least, most) in [
        ("/v2/profiles", Told::Seconds, 10.0, 11.0),
        ("/v2/profiles", Told::Date, 10.0, 11.0),
        ("/v2/profiles", Told::Nothing, 1.0, 1.1),
        ("/v2/profiles", Told::Text("soon".into()), 1.0, 1.1),
        ("/v2/profiles", Told::Text("-3".into()), 1.0, 1.1),
        ("/v2/profiles", Told::Text("2.5".into()), 2.5, 2.8),
        ("/v2/profiles", day, 900.0, 900.0),
        ("/mcp", Told::Html, 1.0, 1.1),
    ] {
        let harness = harness("enforce").await;
        harness.sandbox.set_limits([RateLimit { burst: 1.0, ..RateLimit::of(0.1).told(told.clone()) }]);
        let method = if path == "/mcp" { Method::POST } else { Method::GET };
        let ask = || harness.request(method.clone(), path).send();
        assert_ne!(ask().await.unwrap().status(), 429);
        let amazons = ask().await.unwrap();
        assert_eq!((amazons.status().as_u16(), code(&amazons)), (429, ""), "{told:?}");
        let ours = ask().await.unwrap();
        assert_eq!((ours.status().as_u16(), code(&ours)), (429, "throttled"), "{told:?}");
        let wait = header(&ours, "x-adsidecar-throttle").strip_prefix("wait=").unwrap().split(',').next().unwrap();
        let wait: f64 = wait.parse().unwrap();
        assert!((least..=most).contains(&wait), "{told:?}: {wait}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_402_of_traffic_events_and_a_503_with_retry_after_are_refusals_and_a_425_is_none() {
    let status = |code: u16, retry_after: &str| Fault::Status {
        code,
        headers: vec![("retry-after".into(), retry_after.into())],
        body: "{}".into(),
    };
    for (path, fault, refusal) in [
        ("/avc/x", Fault::status(402), true),
        ("/v2/profiles", Fault::status(402), false),
        ("/v2/profiles", status(503, "9"), true),
        ("/v2/profiles", Fault::status(503), false),
        ("/v2/profiles", status(425, "9"), false),
        ("/v2/profiles", status(500, "9"), false),
    ] {
        let harness = harness("enforce").await;
        harness.sandbox.set_fault(Rule::from(fault.clone()).at(Listener::Na));
        assert!(harness.get(path).await.status().as_u16() >= 400);
        assert_eq!(code(&harness.get(path).await) == "throttled", refusal, "{path} {fault:?}");
    }
    // A 503 may come from behind the operation, so what was refused with one is never sent a second time.
    let harness = harness("queue").await;
    harness.sandbox.set_fault(Rule::from(status(503, "1")).at(Listener::Na).next(1));
    let before = harness.ads_calls().len();
    let refused = harness.post("/v2/profiles").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (503, ""), "Amazon's own, at once");
    assert_eq!(harness.ads_calls().len() - before, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_report_is_amazons_425_with_a_hint() {
    let harness = harness("queue").await;
    let body = r#"{"code":"425","detail":"The Request is a duplicate of : 7d1b"}"#;
    let fault = || Fault::Status { code: 425, headers: Vec::new(), body: body.into() };
    for (path, hint) in [("/reporting/reports", "duplicate_report"), ("/sp/campaigns", "")] {
        harness.sandbox.set_fault(Rule::from(fault()).at(Listener::Na));
        let answer = harness.request(Method::POST, path).body("{}").send().await.unwrap();
        assert_eq!((answer.status().as_u16(), header(&answer, "x-adsidecar-hint")), (425, hint), "{path}");
        assert_eq!(answer.text().await.unwrap(), body, "Amazon's own hint, with the report's id");
    }
    assert_eq!(harness.ads_calls().len(), 2, "a duplicate is not sent again");
}

const POLL: &str = "/reporting/reports/7d1b";

/// Amazon's responses to polls.
fn report(harness: &Harness, body: &str) {
    let headers = vec![("content-type".into(), "application/json".into()), ("x-amz-request-id".into(), "r1".into())];
    let fault = Fault::Status { code: 200, headers, body: body.to_owned() };
    harness.sandbox.set_fault(Rule::from(fault).at(Listener::Na).on("/reporting").next(100));
}

#[tokio::test(flavor = "multi_thread")]
async fn polls_of_the_same_report_within_a_second_are_answered_from_one() {
    for (coalesce, waiting, calls) in [("true", 1, 2), ("false", 10, 10)] {
        let harness = Harness::set(&[("throttle.coalesce_polls", coalesce)]).await;
        // The first poll is held, and then fails, as the sandbox has no such report. Another one takes over.
        let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na).on("/reporting").next(1));
        report(&harness, r#"{"status":"PENDING"}"#);
        let polls: Vec<_> = (0..10).map(|_| tokio::spawn(harness.request(Method::GET, POLL).send())).collect();
        eventually("the polls arrive", async || (harness.ads_calls().len() == waiting).then_some(())).await;
        gate.release();
        let mut answers = Vec::new();
        for poll in polls {
            answers.push(poll.await.unwrap().unwrap().status().as_u16());
        }
        assert_eq!(harness.ads_calls().len(), calls, "coalesce_polls = {coalesce}");
        assert_eq!(answers.iter().filter(|status| **status == 200).count(), 9, "{answers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_is_answered_from_another_one_only_if_it_is_the_same_and_a_second_old() {
    let accounts = format!(
        "[[account]]\nname = \"a\"\nprofile_id = \"{PROFILE}\"\n[[account]]\nname = \"b\"\nprofile_id = \"{PROFILE}\"\n\
         [throttle]\ncoalesce_polls = true\n"
    );
    let harness = Harness::with(&accounts).await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    report(&harness, r#"{"status":"PENDING"}"#);
    let poll = async |path: &str, account: &str, accept: &str| {
        let request = harness.request(Method::GET, path).header("x-ads-account", account).header("accept", accept);
        let answer = request.send().await.unwrap();
        let told = (answer.status().as_u16(), header(&answer, "x-amz-request-id").to_owned());
        (told, answer.text().await.unwrap(), harness.ads_calls().len())
    };
    let pending = |calls| ((200, "r1".to_owned()), r#"{"status":"PENDING"}"#.to_owned(), calls);
    assert_eq!(poll(POLL, "a", "*/*").await, pending(1));
    assert_eq!(poll(POLL, "a", "*/*").await, pending(1), "answered from the first");
    assert_eq!(poll(POLL, "b", "*/*").await, pending(2), "another account");
    assert_eq!(poll(POLL, "a", "application/json").await, pending(3), "another header");
    assert_eq!(poll("/reporting/reports/other", "a", "*/*").await, pending(4), "another report");
    assert_eq!(poll("/v2/profiles", "a", "*/*").await.2, 5);
    assert_eq!(poll("/v2/profiles", "a", "*/*").await.2, 6, "no poll");
    harness.advance(1);
    harness.sandbox.clear_faults();
    report(&harness, r#"{"status":"COMPLETED"}"#);
    let completed = ((200, "r1".to_owned()), r#"{"status":"COMPLETED"}"#.to_owned(), 7);
    assert_eq!(poll(POLL, "a", "*/*").await, completed, "a second later it is sent");
    // The path that leaves is the same, and so are all headers: only the prefix names the account.
    for (account, calls) in [("a", 8), ("a", 8), ("b", 9), ("b", 9), ("a", 9)] {
        assert_eq!(harness.get(&format!("/a/{account}{POLL}")).await.status(), 200);
        assert_eq!(harness.ads_calls().len(), calls, "{account}");
    }
}

/// One caller of the storm: `per_second` requests, each when its time has come and the one before is answered.
async fn caller(request: RequestBuilder, first: Duration, per_second: f64, storm: Arc<Storm>) {
    let mut next = storm.begun + first;
    while next < storm.end {
        tokio::time::sleep_until(next.into()).await;
        let answer = request.try_clone().unwrap().send().await.unwrap();
        let status = answer.status().as_u16();
        let measured = Instant::now() >= storm.measured && Instant::now() < storm.end;
        match status {
            200 if measured => storm.served.fetch_add(1, Relaxed),
            200 => 0,
            _ => storm.failed.fetch_add(1, Relaxed),
        };
        next = (next + Duration::from_secs_f64(1.0 / per_second)).max(Instant::now());
    }
}

struct Storm {
    begun: Instant,
    /// When the measurement begins.
    measured: Instant,
    end: Instant,
    served: AtomicUsize,
    failed: AtomicUsize,
}

/// What came of a storm.
struct Outcome {
    /// Responses within the measured time, of each account.
    served: Vec<f64>,
    /// Responses that were no 200.
    failed: usize,
    /// The share of all calls that Amazon refused within the measured time.
    refused: f64,
}

/// 100 callers over 10 accounts want three times the limit, for some seconds.
async fn storm(mode: &str, per_second: f64, told: Told) -> Outcome {
    let harness = running(&[("throttle.mode", mode)]).await;
    harness.sandbox.set_limits([RateLimit::of(per_second).told(told)]);
    let begun = Instant::now();
    let (measured, end) = (begun + Duration::from_secs(4), begun + Duration::from_secs(14));
    let mut callers = JoinSet::new();
    let mut storms = Vec::new();
    let each = 3.0 * per_second / 100.0;
    for account in 0..10 {
        let (served, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let storm = Arc::new(Storm { begun, measured, end, served, failed });
        for number in 0..10 {
            let request = campaigns(&harness, LIST, "{}").header("x-ads-account", format!("a{account}"));
            let first = Duration::from_secs_f64(f64::from(10 * number + account) / 100.0 / each);
            callers.spawn(caller(request, first, each, storm.clone()));
        }
        storms.push(storm);
    }
    tokio::time::sleep_until(measured.into()).await;
    let (calls, refused) = (harness.ads_calls().len(), harness.sandbox.limited());
    tokio::time::sleep_until(end.into()).await;
    let refused = (harness.sandbox.limited() - refused) as f64 / (harness.ads_calls().len() - calls) as f64;
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
    let served = storms.iter().map(|storm| storm.served.load(Relaxed) as f64).collect();
    Outcome { served, failed: storms.iter().map(|storm| storm.failed.load(Relaxed)).sum(), refused }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_reaches_the_callers_with_the_throttle_off() {
    let Outcome { failed, refused, .. } = storm("off", 40.0, Told::Seconds).await;
    assert!(failed > 500 && refused > 0.5, "{failed} failed, {refused} refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_reaches_no_caller_in_the_queue_and_uses_the_whole_limit() {
    for told in [Told::Seconds, Told::Nothing] {
        let Outcome { served, failed, refused } = storm("queue", 40.0, told.clone()).await;
        let total: f64 = served.iter().sum();
        let share = served.iter().copied().fold(f64::INFINITY, f64::min) / (total / 10.0);
        let outcome = format!("{told:?}: {total} of 400 served, {failed} failed, {refused} refused, share {share}");
        assert!(failed == 0 && refused < 0.03 && total >= 0.9 * 400.0 && share >= 0.8, "{outcome}");
    }
}
