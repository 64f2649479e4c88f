use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode};
use jiff::SignedDuration;
use tokio::task::JoinHandle;

use super::*;
use crate::domain::api_families::family;
use crate::telemetry::metrics::{self, Metrics};

const PATH: &str = "/sp/campaigns/list";

fn settings(mode: ThrottleMode) -> Settings {
    let queue_timeout = Duration::from_secs(30);
    let (max_waiting, max_waiting_bytes) = (100, 1 << 20);
    Settings { mode, queue_timeout, max_waiting, max_waiting_bytes, coalesce_polls: false, families: Vec::new() }
}

fn memory() -> Arc<Memory> {
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let metrics = Metrics::new(metrics::Settings { max_user_series: 1 }, 0.0).unwrap();
    Arc::new(Memory::new(clock, Arc::new(metrics)))
}

fn throttle(mode: ThrottleMode, memory: &Arc<Memory>) -> Arc<Throttle> {
    Arc::new(Throttle::new(settings(mode), "client", memory))
}

fn call(account: &str) -> Call<'_> {
    Call { bytes: 1000, ..Call::new(Region::Na, family(PATH), &Method::POST, PATH, account) }
}

fn headers(retry_after: Option<&str>) -> HeaderMap {
    retry_after.map(|wait| (http::header::RETRY_AFTER, wait.parse().unwrap())).into_iter().collect()
}

/// Sends `call`, which must not wait; Amazon responds with `status`.
fn send(throttle: &Throttle, call: Call<'_>, status: StatusCode, retry_after: Option<&str>) {
    let Entry::Pass(mut pass) = throttle.enter(call) else { panic!("the call waits") };
    pass.responded(status, &headers(retry_after));
}

/// Ten calls in this second, the last of which Amazon refuses: the learned limit is 4.5 a second.
fn refuse(throttle: &Throttle, retry_after: Option<&str>) {
    (0..9).for_each(|_| send(throttle, call("a"), StatusCode::OK, None));
    send(throttle, call("a"), StatusCode::TOO_MANY_REQUESTS, retry_after);
}

/// A call that waits in a task of its own, and is then accepted by Amazon.
async fn waiting(throttle: &Arc<Throttle>, account: &'static str) -> JoinHandle<Result<&'static str, Reason>> {
    let before = throttle.memory.room.taken().0;
    let own = throttle.clone();
    let task = tokio::spawn(async move {
        let mut pass = match own.enter(call(account)) {
            Entry::Pass(pass) => pass,
            Entry::Wait(ticket) => ticket.turn().await.map_err(|throttled| throttled.reason)?,
            Entry::Refuse(throttled) => return Err(throttled.reason),
        };
        pass.responded(StatusCode::OK, &HeaderMap::new());
        Ok(account)
    });
    while throttle.memory.room.taken().0 == before && !task.is_finished() {
        tokio::task::yield_now().await;
    }
    task
}

async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

fn advance(memory: &Memory, seconds: f64) {
    memory.clock.advance(SignedDuration::try_from_secs_f64(seconds).unwrap());
}

#[tokio::test]
async fn no_call_is_delayed_before_a_refusal_in_any_mode() {
    for mode in ThrottleMode::ALL {
        let throttle = throttle(mode, &memory());
        (0..10_000).for_each(|_| send(&throttle, call("a"), StatusCode::OK, None));
        assert!(throttle.memory.status().is_empty());
    }
}

#[tokio::test]
async fn off_learns_nothing_and_observe_learns_but_touches_nothing() {
    for (mode, learned) in [(ThrottleMode::Off, 0), (ThrottleMode::Observe, 1)] {
        let throttle = throttle(mode, &memory());
        refuse(&throttle, Some("60"));
        (0..100).for_each(|_| send(&throttle, call("a"), StatusCode::OK, None));
        let status = throttle.memory.status();
        assert_eq!(status.len(), learned, "{mode:?}");
        assert!(status.iter().all(|bucket| bucket.paused >= 60.0 && bucket.refusals == 1 && bucket.waiting == 0));
    }
}

#[tokio::test]
async fn enforce_refuses_with_the_true_wait_while_amazon_refuses() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Enforce, &memory);
    refuse(&throttle, Some("10"));
    advance(&memory, 4.0);
    let Entry::Refuse(throttled) = throttle.enter(call("a")) else { panic!("the call passes") };
    let wait = throttled.wait.as_secs_f64();
    assert!((6.0..=7.0).contains(&wait), "{wait}");
    assert_eq!(
        (throttled.reason, throttled.bucket.to_string().as_str()),
        (Reason::Paused, "na/sponsored_products/read")
    );
    // Other kinds, families and regions have limits of their own.
    let write = Call { kind: Kind::Write, ..call("a") };
    let elsewhere = Call { region: Region::Eu, ..call("a") };
    for other in [write, elsewhere, Call { family: family("/v2/profiles"), ..call("a") }] {
        assert!(matches!(throttle.enter(other), Entry::Pass(_)));
    }
    advance(&memory, 7.0);
    assert!(matches!(throttle.enter(call("a")), Entry::Pass(_)));
}

#[tokio::test]
async fn queue_sends_waiting_calls_after_the_pause_in_turns() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Queue, &memory);
    refuse(&throttle, Some("2"));
    let mut calls = Vec::new();
    for account in ["a", "a", "a", "b"] {
        calls.push(waiting(&throttle, account).await);
    }
    advance(&memory, 1.9);
    settle().await;
    assert!(calls.iter().all(|call| !call.is_finished()), "Amazon asked for two seconds");
    let mut order = Vec::new();
    for _ in 0..40 {
        advance(&memory, 0.1);
        settle().await;
        while let Some(done) = calls.iter().position(JoinHandle::is_finished) {
            order.push(calls.remove(done).await.unwrap().unwrap());
        }
    }
    assert_eq!(order, ["a", "b", "a", "a"]);
    assert_eq!(memory.room.taken(), (0, 0));
}

#[tokio::test]
async fn a_caller_that_hangs_up_leaves_the_queue() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Queue, &memory);
    refuse(&throttle, Some("10"));
    let (gone, stays) = (waiting(&throttle, "a").await, waiting(&throttle, "b").await);
    assert_eq!((memory.room.taken(), memory.status()[0].waiting), ((2, 2000), 2));
    gone.abort();
    assert!(gone.await.unwrap_err().is_cancelled());
    assert_eq!((memory.room.taken(), memory.status()[0].waiting), ((1, 1000), 1));
    advance(&memory, 12.0);
    assert_eq!(stays.await.unwrap(), Ok("b"));
}

#[tokio::test]
async fn a_turn_that_comes_too_late_is_refused_at_once() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Queue, &memory);
    refuse(&throttle, Some("31"));
    let Entry::Refuse(throttled) = throttle.enter(call("a")) else { panic!("the call waits") };
    assert_eq!(throttled.reason, Reason::TooLate);
    assert!(throttled.wait >= Duration::from_secs(31), "{:?}", throttled.wait);
    advance(&memory, 5.0);
    assert!(matches!(throttle.enter(call("a")), Entry::Wait(_)));
}

#[tokio::test]
async fn a_call_whose_pause_grows_while_it_waits_is_refused_after_the_timeout() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Queue, &memory);
    let Entry::Pass(mut late) = throttle.enter(call("a")) else { panic!("the call waits") };
    refuse(&throttle, Some("10"));
    let call = waiting(&throttle, "a").await;
    late.responded(StatusCode::TOO_MANY_REQUESTS, &headers(Some("100")));
    advance(&memory, 29.0);
    settle().await;
    assert!(!call.is_finished());
    advance(&memory, 1.5);
    assert_eq!(call.await.unwrap(), Err(Reason::TooLate));
}

#[tokio::test]
async fn calls_and_bytes_beyond_the_limits_are_refused_at_once() {
    for (max_waiting, max_waiting_bytes) in [(2, 1 << 20), (100, 2500)] {
        let memory = memory();
        let settings = Settings { max_waiting, max_waiting_bytes, ..settings(ThrottleMode::Queue) };
        let throttle = Arc::new(Throttle::new(settings, "client", &memory));
        refuse(&throttle, Some("10"));
        let waiting = [waiting(&throttle, "a").await, waiting(&throttle, "b").await];
        let Entry::Refuse(throttled) = throttle.enter(call("c")) else { panic!("the call waits") };
        assert_eq!(throttled.reason, Reason::Full);
        waiting.iter().for_each(JoinHandle::abort);
    }
}

#[tokio::test]
async fn a_shutdown_answers_calls_whose_turn_would_come_too_late() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Queue, &memory);
    refuse(&throttle, Some("10"));
    let early = waiting(&throttle, "a").await;
    memory.drain(Duration::from_secs(5));
    let Entry::Refuse(throttled) = throttle.enter(call("b")) else { panic!("the call waits") };
    assert_eq!(throttled.reason, Reason::Draining);
    advance(&memory, 5.1);
    assert_eq!(early.await.unwrap(), Err(Reason::Draining));
}

#[tokio::test]
async fn a_refused_call_gets_another_turn_before_its_accounts_others() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Queue, &memory);
    let Entry::Pass(mut pass) = throttle.enter(call("a")) else { panic!("the call waits") };
    assert!(!pass.may_go_again());
    refuse(&throttle, Some("2"));
    let other = waiting(&throttle, "a").await;
    pass.responded(StatusCode::TOO_MANY_REQUESTS, &headers(Some("2")));
    assert!(pass.may_go_again());
    let Some(Entry::Wait(ticket)) = pass.again(500) else { panic!("the call does not wait") };
    assert_eq!(memory.room.taken(), (2, 2500), "it holds its body");
    advance(&memory, 2.5);
    let pass = ticket.turn().await.unwrap();
    assert!(pass.waited().is_some_and(|waited| waited.wait >= 2.0));
    assert!(!other.is_finished());
    advance(&memory, 2.0);
    assert_eq!(other.await.unwrap(), Ok("a"));
}

#[tokio::test]
async fn a_503_or_a_mode_other_than_queue_gives_no_other_turn() {
    let refused = [(ThrottleMode::Queue, 503), (ThrottleMode::Observe, 429), (ThrottleMode::Enforce, 429)];
    for (mode, status) in refused {
        let throttle = throttle(mode, &memory());
        let Entry::Pass(mut pass) = throttle.enter(call("a")) else { panic!("the call waits") };
        pass.responded(StatusCode::from_u16(status).unwrap(), &headers(Some("2")));
        assert!(!pass.may_go_again(), "{mode:?} {status}");
        assert_eq!(throttle.memory.status()[0].refusals, 1);
    }
}

#[tokio::test]
async fn a_reload_keeps_what_was_learned_about_each_client() {
    let memory = memory();
    refuse(&throttle(ThrottleMode::Observe, &memory), Some("20"));
    let reloaded = throttle(ThrottleMode::Queue, &memory);
    assert!(matches!(reloaded.enter(call("a")), Entry::Wait(_)));
    let other = Throttle::new(settings(ThrottleMode::Queue), "another client", &memory);
    assert!(matches!(other.enter(call("a")), Entry::Pass(_)), "a limit is a client's own");
    assert!(memory.status().is_empty());
    let back = throttle(ThrottleMode::Queue, &memory);
    assert!(matches!(back.enter(call("a")), Entry::Wait(_)));
}

#[test]
fn the_mode_is_the_accounts_then_the_familys_then_the_general_one() {
    let families = vec!["mcp=off".parse().unwrap(), " reporting = queue ".parse().unwrap()];
    let throttle = Throttle::new(Settings { families, ..settings(ThrottleMode::Enforce) }, "client", &memory());
    let mode = |path: &str, account| throttle.mode(family(path), account).as_str();
    assert_eq!([mode("/mcp", None), mode("/reporting/reports", None), mode("/x", None)], ["off", "queue", "enforce"]);
    assert_eq!(mode("/mcp", Some(ThrottleMode::Observe)), "observe");
    for bad in ["", "reporting", "reporting=", "=queue", "reports=queue", "reporting=queue=1"] {
        assert!(bad.parse::<FamilyMode>().is_err(), "{bad}");
    }
}

#[tokio::test]
async fn every_family_region_and_kind_has_a_bucket_of_its_own() {
    let throttle = throttle(ThrottleMode::Observe, &memory());
    for family in api_families::families() {
        for (region, kind) in Region::ALL.into_iter().flat_map(|region| Kind::ALL.map(|kind| (region, kind))) {
            send(&throttle, Call { region, family, kind, ..call("a") }, StatusCode::TOO_MANY_REQUESTS, None);
        }
    }
    let status = throttle.memory.status();
    assert_eq!(status.len(), api_families::COUNT * 12);
    assert!(status.iter().all(|bucket| bucket.refusals == 1));
}

/// A wall clock that is set changes no pause: only the monotonic clock counts.
#[tokio::test]
async fn a_clock_that_is_set_changes_no_wait() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Enforce, &memory);
    refuse(&throttle, Some("10"));
    for hours in [48, -96] {
        memory.clock.step(SignedDuration::from_hours(hours));
        assert!(matches!(throttle.enter(call("a")), Entry::Refuse(_)));
    }
    advance(&memory, 11.5);
    assert!(matches!(throttle.enter(call("a")), Entry::Pass(_)));
}

#[test]
fn each_kind_is_told_by_method_and_path() {
    for (line, kind) in [
        ("GET /v2/profiles", Kind::Read),
        ("HEAD /v2/profiles", Kind::Read),
        ("POST /sp/campaigns/list", Kind::Read),
        ("POST /adsApi/v1/query/campaigns", Kind::Read),
        ("POST /sp/targets/bid/recommendations", Kind::Read),
        ("POST /sp/campaigns", Kind::Write),
        ("PUT /sp/campaigns", Kind::Write),
        ("DELETE /reporting/reports/r1", Kind::Write),
        ("POST /mcp", Kind::Write),
        ("POST /reporting/reports", Kind::Create),
        ("GET /reporting/reports/r1", Kind::Poll),
        ("POST /campaigns/export", Kind::Create),
        ("GET /exports/e1", Kind::Poll),
        ("POST /accounts/1/dsp/reports", Kind::Create),
        ("GET /accounts/1/dsp/reports/r1", Kind::Poll),
        ("POST /amc/reporting/amc1/workflowExecutions", Kind::Create),
        ("GET /amc/reporting/amc1/workflowExecutions/x1", Kind::Poll),
        ("GET /amc/reporting/amc1/workflowExecutions", Kind::Read),
        ("GET /amc/reporting/amc1/workflows/w1", Kind::Read),
        ("POST /adsApi/v1/create/reports", Kind::Create),
        ("POST /adsApi/v1/retrieve/reports", Kind::Poll),
        ("POST /v2/sp/campaigns/report", Kind::Create),
        ("GET /v2/reports/r1", Kind::Poll),
        ("GET /", Kind::Read),
        ("POST /", Kind::Write),
        ("GET //exports//e1/", Kind::Poll),
    ] {
        let (method, path) = line.split_once(' ').unwrap();
        assert_eq!(Kind::of(&method.parse().unwrap(), path), kind, "{line}");
    }
}

#[test]
fn extended_lists_weigh_five_calls() {
    assert_eq!([weight("/v2/sp/campaigns/extended"), weight("/v2/sp/extendedness")], [5.0, 1.0]);
}

#[tokio::test]
async fn what_other_processes_count_is_good_for_a_minute_without_news() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Enforce, &memory);
    let path = "/campaigns/export";
    let export = || Call::new(Region::Na, family(path), &Method::POST, path, "a");
    send(&throttle, export(), StatusCode::TOO_MANY_REQUESTS, None);
    memory.clock.advance(SignedDuration::from_secs(60));
    let elsewhere = (format!("at once: na/exports of {path}"), gate::Heard::new(5, false));
    throttle.buckets.gates.hear([elsewhere].into());
    let Entry::Refuse(throttled) = throttle.enter(export()) else { panic!("five run elsewhere") };
    assert_eq!(throttled.reason, Reason::AtOnce);
    memory.clock.advance(SignedDuration::from_secs(61));
    send(&throttle, export(), StatusCode::ACCEPTED, None);
}

#[tokio::test]
async fn others_are_told_once_that_what_ran_here_has_ended() {
    let memory = memory();
    let throttle = throttle(ThrottleMode::Enforce, &memory);
    let path = "/campaigns/export";
    let export = || Call::new(Region::Na, family(path), &Method::POST, path, "a");
    let told = || throttle.buckets.gates.counts().iter().map(|count| count.running).collect::<Vec<_>>();
    send(&throttle, export(), StatusCode::TOO_MANY_REQUESTS, None);
    memory.clock.advance(SignedDuration::from_secs(60));
    assert!(told().is_empty(), "nothing runs");
    let Entry::Pass(running) = throttle.enter(export()) else { panic!("the pause has ended") };
    assert_eq!(told(), [1]);
    drop(running);
    assert_eq!(told(), [0], "or they would count it for another minute");
    assert!(told().is_empty(), "and no more");
}
