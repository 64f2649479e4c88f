//! The throttle where Amazon limits how many run at a time: exports, AMC workflow runs and traffic events.

use reqwest::{Method, Response};
use tokio::task::JoinHandle;
use world::{AmcAccount, Fault, JobLimits, Listener, Rule};

use crate::harness::{Harness, code, eventually, header, json};
use crate::throttle::{PROFILE, waiting_bytes};

const CAMPAIGNS: &str = "/campaigns/export";
const AD_GROUPS: &str = "/adGroups/export";
const RUNS: &str = "/amc/reporting/amcsandboxtools/workflowExecutions";

/// A sidecar in this mode, before an Amazon that runs five exports and ten AMC runs at once, each for `seconds`.
async fn harness(mode: &str, seconds: f64) -> Harness {
    let sets = [("throttle.mode", mode), ("throttle.queue_timeout", "15m"), ("accounts.sync", "off")];
    let harness = Harness::set(&sets).await;
    harness.sandbox.set_job_limits(JobLimits { exports: Some(5), runs: Some(10), seconds, ..JobLimits::default() });
    harness
}

fn create(harness: &Harness, path: &str) -> impl Future<Output = Response> + use<> {
    let request = harness
        .request(Method::POST, path)
        .header("amazon-advertising-api-scope", PROFILE)
        .header("amazon-advertising-api-advertiserid", "ENTITYSANDBOXTOOLS")
        .header("amazon-advertising-api-marketplaceid", "ATVPDKIKX0DER")
        .header("content-type", "application/json");
    async move { request.body("{\"workflowId\":\"w\"}").send().await.unwrap() }
}

/// Creates a job, and returns its id.
async fn created(harness: &Harness, path: &str) -> String {
    let answer = create(harness, path).await;
    assert!(answer.status().is_success(), "{path}: {}", answer.status());
    let body = json(answer).await;
    let is_run = path.ends_with("/workflowExecutions");
    let id = if is_run { &body["workflowExecutionId"] } else { &body["exportId"] };
    id.as_str().expect("the response names the job").to_owned()
}

async fn state(harness: &Harness, path: &str) -> String {
    let request = harness
        .request(Method::GET, path)
        .header("amazon-advertising-api-scope", PROFILE)
        .header("amazon-advertising-api-advertiserid", "ENTITYSANDBOXTOOLS")
        .header("amazon-advertising-api-marketplaceid", "ATVPDKIKX0DER");
    json(request.send().await.unwrap()).await["status"].as_str().unwrap_or_default().to_owned()
}

/// Creates a job in a task of its own, which waits when this returns.
async fn waiting(harness: &Harness, path: &str) -> JoinHandle<Response> {
    let before = waiting_bytes(harness).await;
    let task = tokio::spawn(create(harness, path));
    eventually("the creation waits", async || (waiting_bytes(harness).await > before).then_some(())).await;
    task
}

/// The table of the status page.
async fn at_once(harness: &Harness) -> String {
    let page = harness.client.get(harness.admin_url("/page/throttle?part=true")).send().await.unwrap();
    let page = page.text().await.unwrap();
    page[page.find("At a time").expect("the table")..].to_owned()
}

fn calls(harness: &Harness) -> usize {
    harness.ads_calls().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sixth_export_is_sent_as_long_as_amazon_has_refused_none() {
    let harness = harness("queue", 600.0).await;
    harness.sandbox.set_job_limits(JobLimits { seconds: 600.0, ..JobLimits::default() });
    assert!(at_once(&harness).await.contains("No export"));
    for _ in 0..8 {
        created(&harness, CAMPAIGNS).await;
    }
    assert_eq!(harness.sandbox.job_counts(), (0, 8));
    assert!(at_once(&harness).await.contains("Amazon has refused none"));
}

#[tokio::test(flavor = "multi_thread")]
async fn observe_passes_every_429_of_a_full_export_queue() {
    let harness = harness("observe", 600.0).await;
    for _ in 0..5 {
        created(&harness, CAMPAIGNS).await;
    }
    for refused in 1..=3 {
        let answer = create(&harness, CAMPAIGNS).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (429, ""));
        assert_eq!(answer.text().await.unwrap(), r#"{"code":"429","details":"Too Many Requests"}"#);
        assert_eq!(harness.sandbox.job_counts().0, refused);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sixth_export_waits_until_a_poll_says_that_one_has_ended() {
    let harness = harness("queue", 3.0).await;
    let mut exports = Vec::new();
    for _ in 0..5 {
        exports.push(created(&harness, CAMPAIGNS).await);
    }
    let sixth = waiting(&harness, CAMPAIGNS).await;
    let seventh = waiting(&harness, CAMPAIGNS).await;
    assert_eq!((calls(&harness), harness.sandbox.job_counts().0), (6, 1), "the seventh was not sent");
    let shown = at_once(&harness).await;
    for cell in ["exports of /campaigns/export", ">na<", ">5<", "Waiting\">2<", ">full<"] {
        assert!(shown.contains(cell), "{cell}: {shown}");
    }
    // Each endpoint has five of its own.
    created(&harness, AD_GROUPS).await;
    assert_eq!(state(&harness, &format!("/exports/{}", exports[0])).await, "PROCESSING");
    assert!(!sixth.is_finished());
    harness.advance(4);
    assert_eq!((calls(&harness), sixth.is_finished()), (8, false), "nobody has asked yet");
    assert_eq!(state(&harness, &format!("/exports/{}", exports[0])).await, "COMPLETED");
    let sixth = sixth.await.unwrap();
    assert_eq!(sixth.status(), 202);
    assert!(header(&sixth, "x-adsidecar-throttle").contains("bucket=na/exports/create"));
    // The same answer once more ends nothing else; an export that Amazon has forgotten has ended.
    assert_eq!(state(&harness, &format!("/exports/{}", exports[0])).await, "COMPLETED");
    assert!(!seventh.is_finished());
    harness.sandbox.set_fault(Rule::from(Fault::status(404)).at(Listener::Na).on("/exports"));
    state(&harness, &format!("/exports/{}", exports[1])).await;
    assert_eq!(seventh.await.unwrap().status(), 202);
    assert_eq!(harness.sandbox.job_counts().0, 1, "Amazon refused the first of them alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_poll_one_export_after_another_finds_out_whether_there_is_room() {
    let harness = harness("queue", 20.0).await;
    for _ in 0..5 {
        created(&harness, CAMPAIGNS).await;
    }
    let waits = [waiting(&harness, CAMPAIGNS).await, waiting(&harness, CAMPAIGNS).await];
    assert_eq!(calls(&harness), 6);
    let both = waiting_bytes(&harness).await;
    // The first tries five seconds later, the next attempt is ten after that, then twenty.
    for (seconds, expected) in [(4, 6), (2, 7), (8, 7), (3, 8)] {
        harness.advance(seconds);
        eventually("the attempt", async || (calls(&harness) == expected).then_some(())).await;
        // Its refusal has come back: the time until the next one counts from here.
        eventually("both wait", async || (waiting_bytes(&harness).await >= both).then_some(())).await;
    }
    assert!(waits.iter().all(|task| !task.is_finished()));
    for _ in 0..8 {
        harness.advance(6);
        tokio::task::yield_now().await;
    }
    for task in waits {
        eventually("room", async || {
            harness.advance(3);
            task.is_finished().then_some(())
        })
        .await;
        assert_eq!(task.await.unwrap().status(), 202);
    }
    assert!(harness.sandbox.job_counts().0 <= 5, "{:?}", harness.sandbox.job_counts());
}

#[tokio::test(flavor = "multi_thread")]
async fn enforce_refuses_the_export_that_amazon_would_refuse() {
    let harness = harness("enforce", 3.0).await;
    let mut exports = Vec::new();
    for _ in 0..5 {
        exports.push(created(&harness, CAMPAIGNS).await);
    }
    let amazons = create(&harness, CAMPAIGNS).await;
    assert_eq!((amazons.status().as_u16(), code(&amazons)), (429, ""));
    let ours = create(&harness, CAMPAIGNS).await;
    assert_eq!((ours.status().as_u16(), code(&ours), calls(&harness)), (429, "throttled", 6));
    assert!(json(ours).await["detail"].as_str().unwrap().contains("at a time"));
    created(&harness, AD_GROUPS).await;
    harness.advance(4);
    state(&harness, &format!("/exports/{}", exports[3])).await;
    created(&harness, CAMPAIGNS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_of_somebody_else_are_left_to_the_pauses() {
    let harness = harness("queue", 3.0).await;
    harness.sandbox.set_job_limits(JobLimits { exports: Some(1), seconds: 3.0, ..JobLimits::default() });
    created(&harness, CAMPAIGNS).await;
    let second = waiting(&harness, CAMPAIGNS).await;
    assert_eq!(calls(&harness), 2);
    harness.advance(4);
    assert_eq!((calls(&harness), second.is_finished()), (2, false), "five seconds, as Amazon tells none");
    harness.advance(2);
    assert_eq!(second.await.unwrap().status(), 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_eleventh_run_of_an_amc_instance_waits_until_one_has_ended() {
    let harness = harness("queue", 3.0).await;
    let mut runs = Vec::new();
    for _ in 0..10 {
        runs.push(created(&harness, RUNS).await);
    }
    let eleventh = waiting(&harness, RUNS).await;
    let twelfth = waiting(&harness, RUNS).await;
    assert_eq!((calls(&harness), harness.sandbox.job_counts()), (11, (1, 10)));
    harness.advance(4);
    assert_eq!(state(&harness, &format!("{RUNS}/{}", runs[4])).await, "SUCCEEDED");
    assert_eq!(eleventh.await.unwrap().status(), 200);
    assert!(!twelfth.is_finished());
    twelfth.abort();
    assert!(twelfth.await.is_err());
    eventually("the caller that left is gone", async || (waiting_bytes(&harness).await == 0.0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_two_hundred_and_first_run_of_an_amc_account_waits_whatever_its_instance() {
    let harness = harness("queue", 3.0).await;
    let limits = JobLimits { runs: Some(10), runs_of_account: Some(200), seconds: 3.0, ..JobLimits::default() };
    harness.sandbox.set_job_limits(limits);
    harness.sandbox.world(|world| {
        let accounts = &mut world.catalogue.amc_accounts;
        let account = accounts.iter().find(|account| account.instance == "amcsandboxtools").unwrap().clone();
        let of = |instance| AmcAccount { instance: format!("amcinstance{instance}"), ..account.clone() };
        accounts.extend((0..22).map(of));
    });
    let runs_of = |instance: usize| format!("/amc/reporting/amcinstance{instance}/workflowExecutions");
    let mut runs = Vec::new();
    for run in 0..200 {
        runs.push((runs_of(run / 10), created(&harness, &runs_of(run / 10)).await));
    }
    // Nine more would fit into each of these instances.
    let first = waiting(&harness, &runs_of(20)).await;
    let next = waiting(&harness, &runs_of(21)).await;
    assert_eq!((calls(&harness), harness.sandbox.job_counts()), (201, (1, 10)), "Amazon refused one, and saw no other");
    harness.advance(4);
    assert_eq!((calls(&harness), first.is_finished()), (201, false), "nobody has asked yet");
    for (path, id) in runs.iter().take(2) {
        assert_eq!(state(&harness, &format!("{path}/{id}")).await, "SUCCEEDED");
    }
    assert_eq!([first.await.unwrap().status(), next.await.unwrap().status()], [200, 200]);
    assert_eq!(harness.sandbox.job_counts().0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sixth_call_with_traffic_events_waits_for_a_response_to_another() {
    let harness = harness("queue", 0.0).await;
    let held = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na).on("/avc").next(5));
    let events = || tokio::spawn(harness.request(Method::POST, "/avc/events").body("{}").send());
    let mut five: Vec<_> = (0..5).map(|_| events()).collect();
    eventually("five under way", async || (calls(&harness) == 5).then_some(())).await;
    harness.sandbox.set_fault(Rule::from(Fault::status(402)).at(Listener::Na).on("/avc"));
    let sixth = events();
    eventually("it waits", async || (waiting_bytes(&harness).await > 0.0).then_some(())).await;
    assert_eq!(calls(&harness), 6);
    assert!(five.iter().all(|call| !call.is_finished()));
    held.release();
    let statuses = [five.remove(0).await.unwrap().unwrap().status(), sixth.await.unwrap().unwrap().status()];
    assert!(statuses.iter().all(|status| *status != 402 && *status != 429), "{statuses:?}");
    assert_eq!(calls(&harness), 7);
}
