//! The throttle of several adsidecars on one PostgreSQL: together they keep to the limits that one would.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use adsidecar::domain::clock::Clock;
use reqwest::{Method, RequestBuilder, Response};
use tokio::task::JoinSet;
use world::{Fault, JobLimits, Listener, RateLimit, Rule, Told};

use crate::harness::{Harness, code, eventually, json};
use crate::postgres::{Pair, Replica};
use crate::postgres_server::Cluster;
use crate::throttle::PROFILE;

const LIMIT: f64 = 40.0;
const CALLERS: usize = 60;

/// A database, a sandbox and four adsidecars on both.
struct Four {
    pair: Pair,
    more: [Replica; 2],
}

impl Four {
    async fn start(mode: &str) -> Self {
        let extra = format!("[throttle]\nmode = \"{mode}\"\n[accounts]\nsync = \"off\"\n");
        let cluster = Cluster::start();
        let url = cluster.url();
        let pair = Box::pin(Pair::over(cluster, &url, &extra, Clock::system())).await;
        let more = [Replica::beside(&pair.a, &[]).await, Replica::beside(&pair.a, &[]).await];
        pair.a.log_in("default").await;
        pair.a.sandbox.clear_history();
        Self { pair, more }
    }

    fn proxies(&self) -> [SocketAddr; 4] {
        [self.pair.a.proxy_address(), self.pair.b.proxy, self.more[0].proxy, self.more[1].proxy]
    }

    fn list(&self, proxy: SocketAddr) -> RequestBuilder {
        let kind = "application/vnd.spCampaign.v3+json";
        let request = self.pair.a.client.request(Method::POST, format!("http://{proxy}/sp/campaigns/list"));
        let request = request.header("content-type", kind).header("accept", kind);
        request.header("amazon-advertising-api-scope", PROFILE).body("{}")
    }

    /// The learned rate at one of them; 0 if it knows none.
    async fn rate(&self, replica: &Replica) -> f64 {
        replica.metric("adsidecar_throttle_rate{family=\"sponsored_products\",kind=\"read\",region=\"na\"}").await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_one_replica_is_told_holds_at_the_others() {
    let four = Four::start("enforce").await;
    let [a, b, ..] = four.proxies();
    // The other one is in use, and so it asks what others know.
    assert_eq!(four.list(b).send().await.unwrap().status(), 200);
    let sandbox = &four.pair.a.sandbox;
    sandbox.set_fault(Rule::from(Fault::too_many(Some(600))).at(Listener::Na));
    assert_eq!(four.list(a).send().await.unwrap().status(), 429);
    eventually("the other replica to know", async || (four.rate(&four.pair.b).await > 0.0).then_some(())).await;
    let calls = four.pair.a.ads_calls().len();
    let ours = four.list(b).send().await.unwrap();
    assert_eq!((ours.status().as_u16(), code(&ours)), (429, "throttled"));
    assert_eq!(four.pair.a.ads_calls().len(), calls, "Amazon was spared");
    // One that starts now knows it as soon as it is used.
    let late = Replica::beside(&four.pair.a, &[]).await;
    eventually("the late one to know", async || {
        let answer = four.list(late.proxy).send().await.unwrap();
        (code(&answer) == "throttled").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_about_limits_while_amazon_refuses_nothing() {
    let four = Four::start("queue").await;
    for proxy in four.proxies() {
        assert_eq!(four.list(proxy).send().await.unwrap().status(), 200);
    }
    eventually("an exchange", async || {
        let scans = "SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables \
                     WHERE relname = 'adsidecar_throttle'";
        four.pair.sql.run("SELECT pg_stat_force_next_flush()").await;
        (four.pair.sql.one(scans).await? != "0").then_some(())
    })
    .await;
    assert_eq!(four.pair.sql.one("SELECT count(*)::text FROM adsidecar_throttle").await.unwrap(), "0");
}

const EXPORTS: &str = "/campaigns/export";

/// Two adsidecars on one database, before an Amazon that runs five exports at once, each for three seconds. The second
/// one has had an export, which has ended. The clock is frozen.
async fn two_with_exports(mode: &str) -> Pair {
    let extra = format!("[throttle]\nmode = \"{mode}\"\nqueue_timeout = \"15m\"\n[accounts]\nsync = \"off\"\n");
    let pair = Pair::with(&extra).await;
    pair.a.log_in("default").await;
    pair.a.sandbox.set_job_limits(JobLimits { exports: Some(5), seconds: 3.0, ..JobLimits::default() });
    let export = created(&pair, pair.b.proxy).await;
    pair.a.advance(4);
    assert_eq!(state(&pair, pair.b.proxy, &export).await, "COMPLETED");
    pair.a.sandbox.clear_history();
    pair
}

fn create(pair: &Pair, proxy: SocketAddr) -> RequestBuilder {
    let request = pair.a.client.post(format!("http://{proxy}{EXPORTS}"));
    request.header("amazon-advertising-api-scope", PROFILE).header("content-type", "application/json").body("{}")
}

async fn created(pair: &Pair, proxy: SocketAddr) -> String {
    let answer = create(pair, proxy).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    json(answer).await["exportId"].as_str().unwrap().to_owned()
}

async fn state(pair: &Pair, proxy: SocketAddr, export: &str) -> String {
    let request = pair.a.client.get(format!("http://{proxy}/exports/{export}"));
    let answer = request.header("amazon-advertising-api-scope", PROFILE).send().await.unwrap();
    json(answer).await["status"].as_str().unwrap().to_owned()
}

/// Waits until a status page shows this count. A replica that only reads asks every five seconds.
async fn shows(pair: &Pair, admin: SocketAddr, count: &str) {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        let page = pair.a.client.get(format!("http://{admin}/page/throttle?part=true")).send().await.unwrap();
        let page = page.text().await.unwrap();
        if page.contains(&format!("\"Running\">{count}<")) {
            return;
        }
        assert!(Instant::now() < deadline, "not {count}: {page}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_through_one_replica_counts_at_the_other() {
    let pair = two_with_exports("enforce").await;
    let (a, b) = (pair.a.proxy_address(), pair.b.proxy);
    let mut exports = Vec::new();
    for _ in 0..5 {
        exports.push(created(&pair, a).await);
    }
    let amazons = create(&pair, a).send().await.unwrap();
    assert_eq!((amazons.status().as_u16(), code(&amazons)), (429, ""));
    shows(&pair, pair.b.admin, "0 and 5 by other adsidecars").await;
    let is_ours = |answer: Response| (answer.status().as_u16(), code(&answer).to_owned());
    let calls = pair.a.ads_calls().len();
    assert_eq!(is_ours(create(&pair, b).send().await.unwrap()), (429, "throttled".to_owned()));
    assert_eq!(pair.a.ads_calls().len(), calls, "Amazon was spared");
    pair.a.advance(4);
    assert_eq!(state(&pair, a, &exports[0]).await, "COMPLETED");
    shows(&pair, pair.b.admin, "0 and 4 by other adsidecars").await;
    created(&pair, b).await;
    shows(&pair, pair.a.admin_address(), "4 and 1 by other adsidecars").await;
    assert_eq!(is_ours(create(&pair, a).send().await.unwrap()), (429, "throttled".to_owned()));
    for export in &exports[1..] {
        assert_eq!(state(&pair, a, export).await, "COMPLETED");
    }
    shows(&pair, pair.b.admin, "1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_waits_is_sent_when_one_of_another_replica_has_ended() {
    let pair = two_with_exports("queue").await;
    let (a, b) = (pair.a.proxy_address(), pair.b.proxy);
    let mut exports = Vec::new();
    for _ in 0..5 {
        exports.push(created(&pair, a).await);
    }
    let sixth = tokio::spawn(create(&pair, a).send());
    shows(&pair, pair.b.admin, "0 and 5 by other adsidecars").await;
    sixth.abort();
    let calls = pair.a.ads_calls().len();
    let waits = || async { pair.b.metric("adsidecar_throttle_waiting_bytes").await > 0.0 };
    let next = tokio::spawn(create(&pair, b).send());
    eventually("the creation to wait", async || waits().await.then_some(())).await;
    assert_eq!(pair.a.ads_calls().len(), calls);
    pair.a.advance(4);
    assert_eq!(state(&pair, a, &exports[0]).await, "COMPLETED");
    assert_eq!(next.await.unwrap().unwrap().status(), 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_of_another_replica_that_nobody_asks_for_hold_no_place_for_ever() {
    let pair = two_with_exports("queue").await;
    let (a, b) = (pair.a.proxy_address(), pair.b.proxy);
    for _ in 0..5 {
        created(&pair, a).await;
    }
    let sixth = tokio::spawn(create(&pair, a).send());
    shows(&pair, pair.b.admin, "0 and 5 by other adsidecars").await;
    sixth.abort();
    // All five end, and the first replica is not told.
    pair.a.advance(4);
    let waits = || async { pair.b.metric("adsidecar_throttle_waiting_bytes").await > 0.0 };
    let probe = tokio::spawn(create(&pair, b).send());
    eventually("the creation to wait", async || waits().await.then_some(())).await;
    pair.a.advance(6);
    let export = json(probe.await.unwrap().unwrap()).await["exportId"].as_str().unwrap().to_owned();
    shows(&pair, pair.b.admin, "1 and 4 by other adsidecars").await;
    pair.a.advance(4);
    assert_eq!(state(&pair, b, &export).await, "COMPLETED");
    created(&pair, b).await;
}

/// What came of a storm within the measured time.
struct Outcome {
    served: usize,
    failed: usize,
    refused: f64,
}

impl Four {
    /// Callers at all replicas want three times the limit; `midway` is done in the middle of the measured time.
    async fn storm(&mut self, seconds: u64, midway: impl FnOnce(&mut Self)) -> Outcome {
        let sandbox = &self.pair.a.sandbox;
        sandbox.set_limits([RateLimit::of(LIMIT).told(Told::Seconds)]);
        let begun = Instant::now();
        let (measured, end) = (begun + Duration::from_secs(8), begun + Duration::from_secs(8 + seconds));
        let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let mut callers = JoinSet::new();
        let period = Duration::from_secs_f64(CALLERS as f64 / (3.0 * LIMIT));
        for number in 0..CALLERS {
            let (request, counts) = (self.list(self.proxies()[number % 4]), counts.clone());
            callers.spawn(async move {
                let mut next = begun + period.mul_f64(number as f64 / CALLERS as f64);
                while next < end {
                    tokio::time::sleep_until(next.into()).await;
                    let status = request.try_clone().unwrap().send().await.unwrap().status();
                    let now = Instant::now();
                    if now >= measured && now < end {
                        counts[usize::from(status != 200)].fetch_add(1, Relaxed);
                    }
                    next = (next + period).max(now);
                }
            });
        }
        tokio::time::sleep_until(measured.into()).await;
        let so_far = |harness: &Harness| (harness.ads_calls().len(), harness.sandbox.limited());
        let before = so_far(&self.pair.a);
        tokio::time::sleep_until((measured + Duration::from_secs(seconds / 2)).into()).await;
        midway(self);
        tokio::time::sleep_until(end.into()).await;
        let after = so_far(&self.pair.a);
        while let Some(ended) = callers.join_next().await {
            ended.unwrap();
        }
        let [served, failed] = [&counts[0], &counts[1]].map(|count| count.load(Relaxed));
        Outcome { served, failed, refused: (after.1 - before.1) as f64 / (after.0 - before.0) as f64 }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn four_replicas_keep_to_the_limit_and_use_it() {
    let mut four = Four::start("queue").await;
    let Outcome { served, failed, refused } = four.storm(16, |_| {}).await;
    let used = served as f64 / (16.0 * LIMIT);
    let outcome = format!("{used} of the limit, {failed} failed, {refused} refused");
    assert!(failed == 0 && refused < 0.05 && used >= 0.85, "{outcome}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_each_replica_goes_on_with_its_share() {
    let mut four = Four::start("queue").await;
    let Outcome { served, failed, refused } = four.storm(20, |four| four.pair.cluster.crash()).await;
    let used = served as f64 / (20.0 * LIMIT);
    let outcome = format!("{used} of the limit, {failed} failed, {refused} refused");
    assert!(failed == 0 && refused < 0.15 && used >= 0.7, "{outcome}");
}
