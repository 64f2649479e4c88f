//! The throttle of several adsidecars on one PostgreSQL: together they keep to the limit that one would.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use adsidecar::domain::clock::Clock;
use reqwest::{Method, RequestBuilder};
use tokio::task::JoinSet;
use world::{Fault, Listener, RateLimit, Rule, Told};

use crate::harness::{Harness, code, eventually};
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
