//! Several adsidecars on one PostgreSQL: each token is refreshed once, all replicas see each other's logins and
//! logouts, and they survive a database outage.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adsidecar::app::App;
use adsidecar::config::{self, Sources};
use adsidecar::domain::clock::Clock;
use reqwest::{Method, Response};
use serde_json::{Value, json as object};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use world::{Fault, Listener, Options, Rule};

use crate::commands::{CONFIG, DONE, FAILED, OTHER_KEY, Serving, run};
use crate::harness::{FERNET_KEY, Harness, code, eventually, json};
use crate::postgres_server::{Bouncer, Cluster, PASSWORD, Sql};
use crate::refresh_tasks::hold;

const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGOUT: &str = "/api/auth/amazon/logout";

/// A database, a sandbox, and two adsidecars that use both.
pub struct Pair {
    pub a: Harness,
    pub b: Replica,
    pub cluster: Cluster,
    pub sql: Sql,
}

impl Pair {
    /// No user is logged in, and the clock is frozen.
    pub async fn start() -> Self {
        Self::with("").await
    }

    pub async fn with(extra: &str) -> Self {
        let cluster = Cluster::start();
        let url = cluster.url();
        Self::over(cluster, &url, extra, Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap())).await
    }

    pub async fn over(cluster: Cluster, url: &str, extra: &str, clock: Clock) -> Self {
        let sets = [("store.kind", "postgres"), ("store.postgres_url", url)];
        let a = Box::pin(Harness::built(Options::calm(clock), extra, &sets)).await;
        let b = Box::pin(Replica::beside(&a, &[])).await;
        let sql = cluster.connect().await;
        Self { a, b, cluster, sql }
    }

    /// The generation, and whether there is a record.
    pub async fn row(&self, user: &str) -> (i64, bool) {
        let row =
            format!("SELECT generation || ' ' || (record IS NOT NULL) FROM adsidecar_grants WHERE user_id = '{user}'");
        let text = self.sql.one(&row).await.expect("the user has a row");
        let (generation, there) = text.split_once(' ').unwrap();
        (generation.parse().unwrap(), there == "true")
    }

    async fn records(&self) -> String {
        let all = "SELECT string_agg(user_id || generation || coalesce(record, ''), ',' ORDER BY user_id) \
                   FROM adsidecar_grants";
        self.sql.one(all).await.unwrap()
    }
}

/// Another adsidecar in this process, with the same configuration and clock.
pub struct Replica {
    pub client: reqwest::Client,
    pub proxy: SocketAddr,
    pub admin: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: Option<JoinHandle<()>>,
}

impl Replica {
    pub async fn beside(harness: &Harness, sets: &[(&str, &str)]) -> Self {
        Self::with_clock(harness, sets, harness.clock.clone()).await
    }

    pub async fn with_clock(harness: &Harness, sets: &[(&str, &str)], clock: Clock) -> Self {
        let more = sets.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let sets = harness.sets.iter().cloned().chain(more).collect();
        let sources = Sources { file: Some(harness.config_file()), env: Vec::new(), sets };
        let config = config::load(&sources).unwrap_or_else(|problems| panic!("{problems}"));
        let app = Box::pin(App::build(config, clock, None)).await.unwrap().reloading(sources);
        let (proxy, admin) = (app.addresses().proxy[0], app.addresses().admin[0]);
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = tokio::spawn(async move { app.run(async { drop(stopped.await) }).await.unwrap() });
        let replica = Self { client: harness.client.clone(), proxy, admin, stop: Some(stop), ended: Some(ended) };
        eventually("the replica to be ready", async || (replica.admin("/readyz").await.0 == 200).then_some(())).await;
        replica
    }

    pub async fn send(&self, method: Method, path: &str) -> Response {
        self.client.request(method, format!("http://{}{path}", self.proxy)).send().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Response {
        self.send(Method::GET, path).await
    }

    pub async fn post(&self, path: &str) -> Response {
        self.send(Method::POST, path).await
    }

    pub async fn call(&self, user: &str) -> Response {
        let url = format!("http://{}/v2/profiles", self.proxy);
        self.client.get(url).header("x-ads-user", user).send().await.unwrap()
    }

    pub async fn state_of(&self, user: &str) -> String {
        let status = json(self.get(&format!("/api/auth/amazon/status?user_id={user}")).await).await;
        status["state"].as_str().unwrap().to_owned()
    }

    pub async fn admin(&self, path: &str) -> (u16, String) {
        let answer = self.client.get(format!("http://{}{path}", self.admin)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.admin("/metrics").await.1;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    pub async fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.ended.take().unwrap().await.unwrap();
    }
}

pub async fn call(harness: &Harness, user: &str) -> Response {
    harness.request(Method::GET, "/v2/profiles").header("x-ads-user", user).send().await.unwrap()
}

fn bearer(harness: &Harness) -> String {
    harness.seen().header("authorization").unwrap().to_owned()
}

// Rejections.

#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_database_fails_the_start_immediately_with_the_remedy() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let mut cluster = Cluster::start();
    cluster.connect().await.run("CREATE ROLE weak LOGIN PASSWORD 'canary-p4ss'").await;
    let ca = format!("sslrootcert={}", cluster.ca_file().display());
    let wrong_password = cluster.url().replace(PASSWORD, "canary-wrong");
    let of = |host: &str, query: &str| cluster.url_of("postgres", host, "postgres", query);
    let refused = [
        (wrong_password, "28P01", "check the user and the password"),
        (cluster.url_of("postgres", "127.0.0.1", "nowhere", ""), "3D000", "create the database"),
        (cluster.url_of("weak", "127.0.0.1", "postgres", ""), "42501", "let the role create tables"),
        // The certificate names only `localhost` and has an unknown authority.
        (of("127.0.0.1", &format!("?sslmode=verify-full&{ca}")), "certificate", "valid for the host's name"),
        (of("127.0.0.1", &format!("?sslmode=require&{ca}")), "certificate", "valid for the host's name"),
        (of("localhost", "?sslmode=require"), "certificate", "check sslmode and sslrootcert"),
        (of("localhost", "?sslmode=verify-ca&sslrootcert=system"), "certificate", "check sslmode and sslrootcert"),
    ];
    let list = async |url: &str| {
        let url = format!("store.postgres_url={url}");
        run(&harness, &["users", "list", "--set", "store.kind=postgres", "--set", &url], "").await
    };
    for (url, what, cure) in refused {
        let ran = list(&url).await;
        assert_eq!(ran.code, FAILED, "{url}: {}", ran.err);
        assert!(ran.err.contains(what) && ran.err.contains(cure), "{url}: {}", ran.err);
        assert!(!ran.err.contains("canary"), "{}", ran.err);
    }
    for url in [of("localhost", &format!("?sslmode=verify-full&{ca}")), of("localhost", "?sslmode=prefer"), {
        let socket = cluster.socket_directory().to_str().unwrap().replace('/', "%2F");
        cluster.url_of("postgres", &socket, "postgres", "")
    }] {
        let ran = list(&url).await;
        assert_eq!((ran.code, ran.out.lines().count()), (DONE, 1), "the heading alone: {url}: {}{}", ran.out, ran.err);
    }
    let down = of("localhost", "");
    cluster.crash();
    let begun = Instant::now();
    let serving =
        run(&harness, &["serve", "--set", "store.kind=postgres", "--set", &format!("store.postgres_url={}", down)], "")
            .await;
    assert_eq!(serving.code, FAILED);
    assert!(serving.err.contains("check that PostgreSQL runs") && !serving.err.contains("canary"), "{}", serving.err);
    assert!(begun.elapsed() < Duration::from_secs(5), "the process exits immediately");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 43.
async fn a_wrong_key_exits_with_78_and_the_fingerprint_and_leaves_a_shared_store_unchanged() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    let before = pair.records().await;
    let note = pair.sql.one("SELECT value FROM adsidecar_notes WHERE name = 'key'").await.unwrap();
    let sets = pair.a.sets.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]);
    let mut arguments: Vec<_> = sets.collect();
    arguments.extend(["--set".to_owned(), format!("store.fernet_keys={OTHER_KEY}")]);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let ran = run(&pair.a, &[&["serve"], &arguments[..]].concat(), "").await;
    assert_eq!(ran.code, CONFIG, "{}", ran.err);
    assert!(ran.err.contains(&note) && ran.err.contains("add the key it was sealed with"), "{}", ran.err);
    assert_eq!(pair.records().await, before);
    assert_eq!(pair.sql.one("SELECT value FROM adsidecar_notes WHERE name = 'key'").await.unwrap(), note);
    assert_eq!(call(&pair.a, "anna").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 52.
async fn tables_of_another_version_exit_with_78_and_stay_unchanged() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    let before = pair.records().await;
    let sets: Vec<_> = pair.a.sets.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let list = async || run(&pair.a, &["users", "list", "--set", &sets[0], "--set", &sets[1]], "").await;
    assert_eq!(list().await.code, DONE);
    pair.sql.run("UPDATE adsidecar_notes SET value = '2' WHERE name = 'schema'").await;
    let ran = list().await;
    assert_eq!(ran.code, CONFIG, "{}", ran.err);
    assert!(ran.err.contains("schema version 2") && ran.err.contains("a newer one"), "{}", ran.err);
    assert_eq!(pair.records().await, before);
    // Also tables of these names that belong to another program.
    pair.sql.run("UPDATE adsidecar_notes SET value = '1' WHERE name = 'schema'").await;
    pair.sql.run("ALTER TABLE adsidecar_grants RENAME COLUMN generation TO number").await;
    let ran = list().await;
    assert_eq!(ran.code, FAILED, "{}", ran.err);
    assert!(ran.err.contains("42703"), "{}", ran.err);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 47.
async fn replicas_with_different_keys_report_unreadable_records_and_overwrite_nothing() {
    let mut pair = Pair::start().await;
    for user in ["anna", "bob"] {
        pair.a.log_in(user).await;
        assert_eq!(pair.b.call(user).await.status(), 200);
    }
    pair.b.stop().await;
    // As in the middle of a roll-out in the wrong order: this replica seals with a key that the other does not have.
    let keys = format!("{OTHER_KEY},{FERNET_KEY}");
    let newer = Replica::beside(&pair.a, &[("store.fernet_keys", &keys)]).await;
    assert_eq!(newer.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    let sealed_anew = pair.records().await;
    let unknown = "adsidecar_undecryptable_records";
    eventually("the unreadable record to be reported", async || (pair.a.metric(unknown).await == 1.0).then_some(()))
        .await;
    assert_eq!(pair.a.metric("adsidecar_store_records{key=\"unknown\"}").await, 1.0);
    assert_eq!(newer.metric(unknown).await, 0.0);
    // The replica's own access token has not expired; it does not refresh or overwrite a record that it cannot read.
    assert_eq!(call(&pair.a, "anna").await.status(), 200);
    pair.a.sandbox.clear_history();
    pair.a.post(&format!("{REFRESH}?user_id=anna")).await;
    assert_eq!(pair.a.status_of("anna").await["last_error"], "record_unreadable");
    assert_eq!(pair.a.sandbox.refreshes(), 0);
    assert_eq!(pair.records().await, sealed_anew);
    assert_eq!(call(&pair.a, "bob").await.status(), 200);
    // A replica with only the old key is told about the missing key and does not start.
    let older = Sources { file: Some(pair.a.config_file()), env: Vec::new(), sets: pair.a.sets.clone() };
    let refused = App::build(config::load(&older).unwrap(), pair.a.clock.clone(), None).await.err().unwrap();
    assert!(refused.to_string().contains("add the key it was sealed with"), "{refused}");
    // With both keys it works normally again.
    pair.a.restart_with("store.fernet_keys", &keys).await;
    assert_eq!((pair.a.metric(unknown).await, call(&pair.a, "anna").await.status().as_u16()), (0.0, 200));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 29.
async fn a_forged_row_is_counted_and_kept_but_not_used() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let mut pair = Pair::over(cluster, &url, "", Clock::system()).await;
    for user in ["anna", "bob", "carol", "dave"] {
        pair.a.log_in(user).await;
        assert_eq!(pair.b.call(user).await.status(), 200);
    }
    let record = async |user: &str| {
        let query = format!("SELECT record FROM adsidecar_grants WHERE user_id = '{user}'");
        serde_json::from_str::<Value>(&pair.sql.one(&query).await.unwrap()).unwrap()
    };
    // A later expiry, another user's record, a raised generation, and an invalid record.
    let mut later = record("anna").await;
    later["expires_at"] = object!("2036-01-01T00:00:00Z");
    let write = async |user: &str, json: &str, more: &str| {
        let statement = format!("UPDATE adsidecar_grants SET record = '{json}'{more} WHERE user_id = '{user}'");
        pair.sql.run(&statement).await;
    };
    let swapped = record("anna").await.to_string();
    write("anna", &later.to_string(), "").await;
    write("bob", &swapped, ", generation = generation + 1, changed_at = now()").await;
    let carols = record("carol").await.to_string();
    write("carol", &carols, ", generation = generation + 7, changed_at = now()").await;
    write("dave", "Atza|x", "").await;
    let forged = pair.records().await;
    // A running replica notices within a second, because the row's generation changed; it keeps serving its own token.
    eventually("the forged records to be reported", async || {
        (pair.a.metric("adsidecar_undecryptable_records").await >= 2.0).then_some(())
    })
    .await;
    pair.a.restart_with("refresh.concurrency", "8").await;
    assert_eq!(pair.a.metric("adsidecar_undecryptable_records").await, 4.0);
    assert_eq!(pair.a.metric("adsidecar_store_records{key=\"damaged\"}").await, 4.0);
    pair.a.sandbox.clear_history();
    for user in ["anna", "bob", "carol", "dave"] {
        let refused = call(&pair.a, user).await;
        assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"), "{user}");
        pair.a.post(&format!("{REFRESH}?user_id={user}")).await;
    }
    assert!(pair.a.sandbox.history().is_empty(), "no forged grant is used");
    assert_eq!(pair.records().await, forged, "the row is kept");
    // The other replica has valid tokens in memory; when they expire, it does not overwrite a row that it cannot
    // verify.
    pair.a.advance(3600);
    let refused = pair.b.call("anna").await;
    assert_eq!(code(&refused), "token_unavailable");
    assert_eq!((pair.a.sandbox.refreshes(), pair.records().await), (0, forged));
    // A login creates a new grant.
    pair.a.log_in("anna").await;
    assert_eq!(call(&pair.a, "anna").await.status(), 200);
}

// One refresh per token.

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 22.
async fn fifty_callers_of_two_replicas_at_expiry_cause_one_token_call() {
    let cluster = Cluster::start();
    let bouncer = Bouncer::before(&cluster, 3);
    let frozen = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let pair = Pair::over(cluster, &bouncer.url(), "", frozen).await;
    pair.a.log_in("default").await;
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    for round in 1..=3 {
        pair.a.sandbox.clear_history();
        let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
        // The background tasks of both replicas want to refresh it too.
        pair.a.advance(3600);
        let (here, there) = (pair.a.proxy_url("/v2/profiles"), format!("http://{}/v2/profiles", pair.b.proxy));
        let callers: Vec<_> = (0..50)
            .map(|at| tokio::spawn(pair.a.client.get(if at % 2 == 0 { &here } else { &there }).send()))
            .collect();
        gate.reached(1).await;
        gate.release();
        for caller in callers {
            assert_eq!(caller.await.unwrap().unwrap().status(), 200);
        }
        assert_eq!(pair.a.sandbox.refreshes(), 1, "round {round}");
        let bearers: std::collections::BTreeSet<_> =
            pair.a.ads_calls().iter().map(|call| call.header("authorization").unwrap().to_owned()).collect();
        assert_eq!(bearers.len(), 1, "all callers get the same token");
        assert_eq!(pair.row("default").await, (round + 1, true));
    }
    assert_eq!(pair.b.metric("adsidecar_users{state=\"fresh\"}").await, 1.0);
    assert_eq!(pair.a.metric("adsidecar_users{state=\"fresh\"}").await, 1.0);
    assert_eq!(pair.a.metric("adsidecar_store_errors_total{op=\"put\"}").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_token_already_replaced_by_another_replica_costs_no_token_call() {
    let pair = Pair::start().await;
    pair.a.log_in("default").await;
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    // The other replica refreshes; Amazon revokes the old token; this replica has not polled since.
    let polls = async || pair.b.metric("adsidecar_store_operation_duration_seconds_count{op=\"poll\"}").await;
    let before = polls().await;
    eventually("the next poll", async || (polls().await > before).then_some(())).await;
    let old = bearer(&pair.a);
    assert_eq!(pair.a.post(REFRESH).await.status(), 200);
    pair.a.sandbox.world(|world| {
        let token = old.strip_prefix("Bearer ").unwrap();
        assert!(world.access(token, pair.a.clock.now()).is_some());
    });
    pair.a.sandbox.clear_history();
    pair.a.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na));
    let answer = pair.b.get("/v2/profiles").await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert_eq!(pair.a.sandbox.refreshes(), 0);
    assert_ne!(bearer(&pair.a), old);
    // If Amazon rejected the new token too, no replica would force another refresh this soon.
    pair.a.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na).always());
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 401);
    assert_eq!(pair.a.sandbox.refreshes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_refresh_at_one_replica_holds_back_those_of_the_others_for_thirty_seconds() {
    let pair = Pair::start().await;
    pair.a.log_in("default").await;
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    // A grant that is so new is not forced either.
    pair.a.advance(60);
    // One replica forces a refresh, and the other one takes its token over without having forced any.
    pair.a.sandbox.clear_history();
    pair.a.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na));
    assert_eq!(pair.a.get("/v2/profiles").await.status(), 200);
    assert_eq!(pair.a.sandbox.refreshes(), 1);
    let forced = bearer(&pair.a);
    eventually("the other one has it", async || {
        (pair.b.get("/v2/profiles").await.status() == 200 && bearer(&pair.a) == forced).then_some(())
    })
    .await;
    pair.a.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na).always());
    pair.a.advance(29);
    let refused = pair.b.get("/v2/profiles").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, ""), "Amazon's own answer");
    assert_eq!(pair.a.sandbox.refreshes(), 1, "so soon none forces another one");
    // Its own try counts as well: the limit is for 30 s from whichever came last.
    pair.a.advance(31);
    pair.a.sandbox.clear_faults();
    pair.a.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na));
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    assert_eq!(pair.a.sandbox.refreshes(), 2, "after that it may");
}

/// How much longer the lease of `default` runs, in whole seconds by the database's clock; `None` where there is none.
async fn lease_left(pair: &Pair) -> Option<i64> {
    let left = "SELECT round(extract(epoch FROM lease_until - clock_timestamp()))::bigint FROM adsidecar_grants";
    pair.sql.one(left).await.unwrap().parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_released_after_a_failed_token_call_so_that_the_next_replica_may_ask_at_once() {
    let pair = Pair::start().await;
    pair.a.log_in("default").await;
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    pair.a.sandbox.clear_history();
    // After a 500 it would end, and say that a response may be lost.
    pair.a.sandbox.set_fault(Rule::from(Fault::status(503)).at(Listener::Lwa).next(1));
    let release = hold("refresh_answered");
    let failed = tokio::spawn(pair.a.client.post(pair.a.proxy_url(REFRESH)).send());
    eventually("the token call", async || (pair.a.sandbox.refreshes() == 1).then_some(())).await;
    assert!(lease_left(&pair).await.is_some_and(|left| left > 10), "it is held during the token call");
    drop(release);
    failed.await.unwrap().unwrap();
    assert_eq!(pair.a.status_of("default").await["last_error"], "server_error");
    assert_eq!(lease_left(&pair).await, None, "and released after it");
    let begun = Instant::now();
    // It may have heard of the failure by now, and then backs off as A does.
    eventually("B's refresh", async || {
        pair.a.advance(1);
        (pair.b.post(REFRESH).await.status() == 200).then_some(())
    })
    .await;
    assert!(begun.elapsed() < Duration::from_secs(5), "before A's lease would have ended: {:?}", begun.elapsed());
    let (generation, is_there) = pair.row("default").await;
    assert!(is_there && generation >= 2, "A may have refreshed it before B: {generation}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_prolonged_before_a_token_call_and_none_is_made_without_it() {
    let pair = Pair::start().await;
    pair.a.log_in("default").await;
    pair.a.sandbox.clear_history();
    // Between the lease and the token call time may pass: here most of the lease, and then all of it.
    let release = hold("refresh_begun");
    let refresh = tokio::spawn(pair.a.client.post(pair.a.proxy_url(REFRESH)).send());
    eventually("the lease", async || lease_left(&pair).await.map(drop)).await;
    pair.sql.run("UPDATE adsidecar_grants SET lease_until = clock_timestamp() + interval '2 seconds'").await;
    let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    drop(release);
    gate.reached(1).await;
    let left = lease_left(&pair).await;
    assert!(left.is_some_and(|left| left > 10), "a token call may take 10 s: {left:?}");
    gate.release();
    assert_eq!(refresh.await.unwrap().unwrap().status(), 200);
    assert_eq!(pair.a.sandbox.refreshes(), 1);

    pair.a.sandbox.clear_history();
    let release = hold("refresh_begun");
    let refresh = tokio::spawn(pair.a.client.post(pair.a.proxy_url(REFRESH)).send());
    eventually("the lease", async || lease_left(&pair).await.map(drop)).await;
    let other = "lease_owner = 'other', lease_until = clock_timestamp() + interval '15 seconds'";
    pair.sql.run(&format!("UPDATE adsidecar_grants SET {other}")).await;
    drop(release);
    refresh.await.unwrap().unwrap();
    assert_eq!(pair.a.sandbox.refreshes(), 0, "another replica has the lease");
    assert_eq!(pair.a.status_of("default").await["last_error"], "renewed_elsewhere");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 98.
async fn a_replica_killed_with_the_lease_delays_others_only_until_the_lease_expires() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let pair = Pair::over(cluster, &url, "", Clock::system()).await;
    pair.a.log_in("default").await;
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    pair.a.sandbox.clear_history();
    let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let set = format!("store.postgres_url={url}");
    let mut doomed =
        Serving::start(&pair.a, &["--set", "store.kind=postgres", "--set", &set, "--set", "proxy.listen=127.0.0.1:0"])
            .await;
    let asked = pair.a.client.post(format!("http://{}{REFRESH}", doomed.proxy)).send();
    let asked = tokio::spawn(asked);
    gate.reached(1).await;
    doomed.signal("KILL");
    doomed.ended().await;
    assert!(asked.await.unwrap().is_err());
    let killed = Instant::now();
    // The others have a valid access token; their refresh waits for the end of the lease.
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    let interrupted = "adsidecar_token_refresh_interrupted_total{outcome=\"recovered\"}";
    let mut refreshed = false;
    while killed.elapsed() < Duration::from_secs(25) && !refreshed {
        pair.b.post(REFRESH).await;
        refreshed = pair.sql.one("SELECT generation FROM adsidecar_grants").await.unwrap() == "2";
    }
    assert!(refreshed, "the token is refreshed after the lease");
    assert!(killed.elapsed() > Duration::from_secs(10), "and not before: {:?}", killed.elapsed());
    assert_eq!(pair.a.sandbox.lwa_calls().refreshes, 2, "the lost refresh and this one");
    assert_eq!(pair.b.metric(interrupted).await, 1.0, "the lost refresh is reported");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 33.
async fn replicas_with_clocks_ten_minutes_apart_make_one_token_call() {
    let mut pair = Pair::start().await;
    pair.a.log_in("default").await;
    pair.b.stop().await;
    let ahead = Clock::frozen(pair.a.clock.now() + jiff::SignedDuration::from_mins(10));
    pair.b = Replica::with_clock(&pair.a, &[], ahead.clone()).await;
    for _ in 0..3 {
        pair.a.sandbox.clear_history();
        let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
        pair.a.advance(3600);
        ahead.advance(jiff::SignedDuration::from_secs(3600));
        let urls = [pair.a.proxy_url("/v2/profiles"), format!("http://{}/v2/profiles", pair.b.proxy)];
        let callers: Vec<_> = (0..20).map(|at| tokio::spawn(pair.a.client.get(&urls[at % 2]).send())).collect();
        gate.reached(1).await;
        gate.release();
        for caller in callers {
            assert_eq!(caller.await.unwrap().unwrap().status(), 200);
        }
        assert_eq!(pair.a.sandbox.refreshes(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 51.
async fn a_hundred_refreshes_through_a_pool_of_one_connection_all_complete() {
    let cluster = Cluster::start();
    let bouncer = Bouncer::before(&cluster, 1);
    let pair = Pair::over(cluster, &bouncer.url(), "", Clock::system()).await;
    let users: Vec<_> = (0..100).map(|at| format!("user-{at}")).collect();
    for user in &users {
        pair.a.log_in(user).await;
    }
    pair.a.sandbox.clear_history();
    let urls = [pair.a.proxy_url(REFRESH), format!("http://{}{REFRESH}", pair.b.proxy)];
    let refreshes: Vec<_> = (users.iter().enumerate())
        .map(|(at, user)| tokio::spawn(pair.a.client.post(format!("{}?user_id={user}", urls[at % 2])).send()))
        .collect();
    for refresh in refreshes {
        assert_eq!(refresh.await.unwrap().unwrap().status(), 200);
    }
    assert_eq!(pair.a.sandbox.refreshes(), 100);
    let stored = "SELECT count(*) FROM adsidecar_grants WHERE generation = 2 AND lease_owner IS NULL";
    // A write that gets no connection within its two seconds is retried, and its caller has the token meanwhile. Once,
    // only 99 records were stored at the time of the last response; this is the likely reason, but it was not
    // confirmed.
    eventually("all refreshed grants to be stored", async || (pair.sql.one(stored).await? == "100").then_some(()))
        .await;
}

// Logins and logouts.

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 93.
async fn a_logout_at_one_replica_beats_a_running_refresh_at_another() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let refresh = {
        let url = format!("http://{}{REFRESH}?user_id=anna", pair.b.proxy);
        tokio::spawn(pair.a.client.post(url).send())
    };
    gate.reached(1).await;
    assert_eq!(pair.a.post(&format!("{LOGOUT}?user_id=anna")).await.status(), 204);
    let logged_out = pair.row("anna").await;
    assert!(!logged_out.1);
    gate.release();
    let answer = refresh.await.unwrap().unwrap();
    assert_eq!(code(&answer), "login_required");
    assert_eq!(pair.row("anna").await, logged_out, "the grant does not return");
    for state in [pair.a.status_of("anna").await["state"].as_str().unwrap(), &pair.b.state_of("anna").await] {
        assert_eq!(state, "none");
    }
    assert_eq!(code(&pair.b.call("anna").await), "login_required");
    assert_eq!(pair.b.metric("adsidecar_token_refresh_dropped_total").await, 1.0);
    // A new login supersedes everything before.
    pair.a.log_in("anna").await;
    assert_eq!(pair.row("anna").await, (logged_out.0 + 1, true));
    assert_eq!(pair.b.call("anna").await.status(), 200, "immediately, although this replica had seen the logout");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_replicas_see_logins_and_logouts_within_two_seconds() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    pair.a.log_in("bob").await;
    let users = async || {
        let all = json(pair.b.get("/api/auth/amazon/status").await).await;
        all["users"].as_array().unwrap().iter().map(|user| user["user_id"].to_string()).collect::<Vec<_>>().join(",")
    };
    let within = Instant::now();
    eventually("both users", async || (users().await == "\"anna\",\"bob\"").then_some(())).await;
    assert_eq!(pair.a.post(&format!("{LOGOUT}?user_id=anna")).await.status(), 204);
    eventually("one user", async || (users().await == "\"bob\"").then_some(())).await;
    assert!(within.elapsed() < Duration::from_secs(4), "{:?}", within.elapsed());
    assert_eq!(code(&pair.b.call("anna").await), "login_required");
    assert_eq!(pair.b.metric("adsidecar_users{state=\"fresh\"}").await, 1.0);
    // A logout of a user who is unknown to this replica.
    pair.a.log_in("carol").await;
    assert_eq!(pair.b.post(&format!("{LOGOUT}?user_id=carol")).await.status(), 204);
    eventually("the logout to be seen", async || {
        (code(&call(&pair.a, "carol").await) == "login_required").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 84.
async fn a_login_started_at_one_replica_completes_at_another_and_is_confirmed_once() {
    let pair = Pair::with("[login]\nlisten = \"127.0.0.1:0\"\nfrontend_url = \"http://localhost:3000/app\"").await;
    let begun = json(pair.a.get("/api/auth/amazon/login?user_id=anna").await).await;
    let callback = pair.a.consent(begun["auth_url"].as_str().unwrap()).await;
    // Two replicas get the same callback concurrently, as from a browser that reloads behind a load balancer: one of
    // them accepts it.
    let (here, there) = tokio::join!(pair.a.get(&callback), pair.b.get(&callback));
    let ends: Vec<_> = [here, there].iter().map(|end| end.headers()["location"].to_str().unwrap().to_owned()).collect();
    let (good, bad): (Vec<_>, Vec<_>) = ends.iter().partition(|end| end.contains("status=pending"));
    assert_eq!((good.len(), bad.len()), (1, 1), "{ends:?}");
    assert!(bad[0].contains("error=state_invalid"), "{bad:?}");
    let (_, grant) = good[0].split_once("grant=").unwrap();
    assert_eq!(pair.b.state_of("anna").await, "none", "it is pending");
    let confirm = format!("/api/auth/amazon/confirm?grant={grant}");
    let (here, there) = tokio::join!(pair.a.post(&confirm), pair.b.post(&confirm));
    let mut codes = [code(&here).to_owned(), code(&there).to_owned()];
    codes.sort();
    assert_eq!(codes, ["", "state_invalid"], "the confirmation is accepted once");
    assert_eq!(
        (call(&pair.a, "anna").await.status().as_u16(), pair.b.call("anna").await.status().as_u16()),
        (200, 200)
    );
    assert_eq!(pair.sql.one("SELECT count(*) FROM adsidecar_waiting").await.as_deref(), Some("0"));
    assert_eq!(pair.sql.one("SELECT count(*) FROM adsidecar_logins").await.as_deref(), Some("0"));

    // They expire after ten minutes, and a row moved to another state or id is rejected.
    let begun = json(pair.b.get("/api/auth/amazon/login?user_id=bob").await).await;
    let other = json(pair.b.get("/api/auth/amazon/login?user_id=carol").await).await;
    let callback = pair.a.consent(begun["auth_url"].as_str().unwrap()).await;
    let swapped = pair.a.consent(other["auth_url"].as_str().unwrap()).await;
    pair.sql.run("UPDATE adsidecar_logins SET sealed = (SELECT max(sealed) FROM adsidecar_logins)").await;
    let ends = [pair.a.get(&callback).await, pair.a.get(&swapped).await];
    let good = ends.iter().filter(|end| end.headers()["location"].to_str().unwrap().contains("status=pending")).count();
    assert_eq!(good, 1, "each login is valid only under its own state");
    let begun = json(pair.b.get("/api/auth/amazon/login?user_id=dave").await).await;
    let callback = pair.a.consent(begun["auth_url"].as_str().unwrap()).await;
    pair.a.advance(601);
    let late = pair.a.get(&callback).await;
    assert!(late.headers()["location"].to_str().unwrap().contains("state_invalid"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_confirmed_grant_of_a_killed_replica_is_stored_by_another() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let listener = "[login]\nlisten = \"127.0.0.1:0\"\nfrontend_url = \"http://localhost:3000/app\"";
    let mut pair = Pair::over(cluster, &url, listener, Clock::system()).await;
    let begun = json(pair.a.get("/api/auth/amazon/login?user_id=anna").await).await;
    let callback = pair.a.consent(begun["auth_url"].as_str().unwrap()).await;
    let end = pair.a.get(&callback).await.headers()["location"].to_str().unwrap().to_owned();
    let (_, grant) = end.split_once("grant=").unwrap();
    pair.b.stop().await;
    let set = format!("store.postgres_url={url}");
    let mut doomed = Serving::start(&pair.a, &["--set", "store.kind=postgres", "--set", &set]).await;
    // It confirms the grant but cannot store it as the user's grant.
    pair.sql.run("ALTER TABLE adsidecar_grants RENAME TO away").await;
    let confirm = format!("http://{}/api/auth/amazon/confirm?grant={grant}", doomed.proxy);
    assert_eq!(pair.a.client.post(confirm).send().await.unwrap().status(), 200);
    doomed.signal("KILL");
    doomed.ended().await;
    pair.sql.run("ALTER TABLE away RENAME TO adsidecar_grants").await;
    assert_eq!(code(&pair.a.post(&format!("/api/auth/amazon/confirm?grant={grant}")).await), "state_invalid", "once");
    let count = async |table: &str| pair.sql.one(&format!("SELECT count(*) FROM {table}")).await.unwrap();
    assert_eq!((count("adsidecar_grants").await, count("adsidecar_waiting").await), ("0".to_owned(), "1".to_owned()));
    let third = Replica::beside(&pair.a, &[]).await;
    assert_eq!(
        code(&third.call("anna").await),
        "login_required",
        "the replica that confirmed it may still be storing it"
    );
    pair.sql.run("UPDATE adsidecar_waiting SET claimed_until = now()").await;
    let fourth = Replica::beside(&pair.a, &[]).await;
    eventually("the grant to be in use", async || (fourth.call("anna").await.status() == 200).then_some(())).await;
    assert_eq!(call(&pair.a, "anna").await.status(), 200);
    eventually("the pending grant to be deleted", async || (count("adsidecar_waiting").await == "0").then_some(()))
        .await;
}

// Database failures.

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 49.
async fn during_a_database_outage_valid_tokens_are_used_and_nothing_is_refreshed() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let mut pair = Pair::over(cluster, &url, "", Clock::system()).await;
    pair.a.log_in("default").await;
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    assert_eq!((pair.b.admin("/readyz").await.0, pair.b.metric("adsidecar_store_up").await), (200, 1.0));
    pair.cluster.crash();
    eventually("the outage to be noticed", async || (pair.b.metric("adsidecar_store_up").await == 0.0).then_some(()))
        .await;
    let ready = pair.b.admin("/readyz").await;
    assert_eq!(ready.0, 200, "it still serves from memory: {}", ready.1);
    assert!(ready.1.contains("degraded"), "{}", ready.1);
    assert_eq!(pair.b.admin("/livez").await.0, 200);
    pair.a.sandbox.clear_history();
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200, "the access token has not expired");
    pair.a.advance(3500);
    let begun = Instant::now();
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200, "until its last second");
    assert!(begun.elapsed() < Duration::from_secs(2), "callers wait a second at most: {:?}", begun.elapsed());
    pair.a.advance(100);
    let refused = pair.b.get("/v2/profiles").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (503, "store_unavailable"));
    assert!(refused.headers().contains_key("retry-after"));
    for (path, wanted) in [("/api/auth/amazon/login?user_id=new", "store_unavailable")] {
        assert_eq!(code(&pair.b.get(path).await), wanted, "{path}");
    }
    assert_eq!(code(&pair.b.post(&format!("{LOGOUT}?user_id=default")).await), "store_unavailable");
    assert_eq!(code(&pair.b.call("stranger").await), "store_unavailable", "it is unknown whether there is a grant");
    assert_eq!(pair.a.sandbox.refreshes(), 0, "without the database, replicas cannot coordinate refreshes");
    assert!(pair.b.metric("adsidecar_store_errors_total{op=\"get\"}").await > 0.0);
    pair.cluster.run();
    eventually("recovery without intervention", async || {
        (pair.b.get("/v2/profiles").await.status() == 200).then_some(())
    })
    .await;
    eventually("recovery of both replicas", async || (pair.a.get("/v2/profiles").await.status() == 200).then_some(()))
        .await;
    eventually("readiness", async || (pair.b.admin("/readyz").await.1 == "ready\n").then_some(())).await;
    assert_eq!(pair.b.metric("adsidecar_store_up").await, 1.0);
    assert_eq!(pair.a.sandbox.refreshes(), 1, "one of the two refreshed");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 50.
async fn a_connection_lost_during_a_refresh_costs_neither_the_token_nor_a_second_call() {
    let mut pair = Pair::start().await;
    pair.a.log_in("default").await;
    assert_eq!(pair.b.get("/v2/profiles").await.status(), 200);
    pair.a.sandbox.clear_history();
    // Between acquiring the lease and saving.
    let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let refresh = tokio::spawn(pair.a.client.post(pair.a.proxy_url(REFRESH)).send());
    gate.reached(1).await;
    pair.sql.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'adsidecar'").await;
    gate.release();
    assert_eq!(refresh.await.unwrap().unwrap().status(), 200);
    assert_eq!(pair.row("default").await, (2, true));
    assert_eq!(pair.a.sandbox.refreshes(), 1);

    // The whole database goes down in between and is back within the lease: the refreshed token is used, and stored
    // later.
    pair.a.sandbox.clear_history();
    let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let refresh = tokio::spawn(pair.a.client.post(pair.a.proxy_url(REFRESH)).send());
    gate.reached(1).await;
    pair.cluster.crash();
    gate.release();
    assert_eq!(refresh.await.unwrap().unwrap().status(), 200, "the token is used from memory");
    assert_eq!(pair.a.metric("adsidecar_store_up").await, 0.0);
    assert_eq!(pair.a.get("/v2/profiles").await.status(), 200);
    let refreshed = bearer(&pair.a);
    pair.cluster.run();
    pair.sql = pair.cluster.connect().await;
    eventually("the token to be stored", async || (pair.row("default").await == (3, true)).then_some(())).await;
    eventually("the other replica to have it", async || {
        (pair.b.get("/v2/profiles").await.status() == 200 && bearer(&pair.a) == refreshed).then_some(())
    })
    .await;
    assert_eq!(pair.a.sandbox.refreshes(), 1, "one token call for the generation");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_during_a_database_outage_is_used_and_stored_unless_superseded() {
    let mut pair = Pair::start().await;
    pair.a.log_in("anna").await;
    let begun = json(pair.a.get("/api/auth/amazon/login?user_id=anna").await).await;
    let callback = pair.a.consent(begun["auth_url"].as_str().unwrap()).await;
    let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let login = tokio::spawn(pair.a.client.get(pair.a.proxy_url(&callback)).send());
    gate.reached(1).await;
    pair.cluster.crash();
    pair.a.advance(60);
    gate.release();
    assert_eq!(login.await.unwrap().unwrap().status(), 200, "its code is consumed, so the grant must not be discarded");
    pair.cluster.run();
    pair.sql = pair.cluster.connect().await;
    eventually("the grant to be stored", async || (pair.row("anna").await == (2, true)).then_some(())).await;
    let (here, there) =
        (pair.a.status_of("anna").await, json(pair.b.get("/api/auth/amazon/status?user_id=anna").await).await);
    assert_eq!(here["consented_at"], there["consented_at"]);
    eventually("the store to be up", async || (pair.a.metric("adsidecar_store_up").await == 1.0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_restored_to_an_older_state_gets_the_known_grants_again() {
    let pair = Pair::start().await;
    for user in ["anna", "bob"] {
        pair.a.log_in(user).await;
    }
    pair.sql.run("CREATE TABLE backup AS SELECT * FROM adsidecar_grants").await;
    for _ in 0..2 {
        assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    }
    assert_eq!(pair.a.post(&format!("{LOGOUT}?user_id=bob")).await.status(), 204);
    let known = (pair.row("anna").await, pair.row("bob").await);
    // As after a failover to a lagging standby: the same rows, and new connections.
    pair.sql.run("DELETE FROM adsidecar_grants; INSERT INTO adsidecar_grants SELECT * FROM backup").await;
    pair.sql.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'adsidecar'").await;
    assert_ne!((pair.row("anna").await, pair.row("bob").await), known);
    eventually("the lost rows to be written again", async || {
        let (anna, bob) = (pair.row("anna").await, pair.row("bob").await);
        (anna.0 >= known.0.0 && anna.1 && !bob.1).then_some(())
    })
    .await;
    assert_eq!(code(&call(&pair.a, "bob").await), "login_required");
    assert_eq!(call(&pair.a, "anna").await.status(), 200);
}

// The operator.

#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_row_access_only_suffices_for_existing_tables() {
    let cluster = Cluster::start();
    let sql = cluster.connect().await;
    let schema = concat!(
        include_str!("../../src/store/postgres/schema.sql"),
        include_str!("../../src/store/postgres/throttle.sql")
    );
    // As the manual says it.
    let manual = include_str!("../../deploy/README.md");
    let block = manual.split("<!-- postgres -->").nth(1).and_then(|rest| rest.split("```").nth(1)).unwrap();
    let role = block.strip_prefix("sql").unwrap().replace('…', PASSWORD);
    assert!(role.contains("CREATE ROLE adsidecar") && role.contains(PASSWORD), "{role}");
    sql.run(&format!("{schema} {role}")).await;
    let url = cluster.url_of("adsidecar", "127.0.0.1", "postgres", "");
    let pair = Pair::over(cluster, &url, "", Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap())).await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    assert_eq!(pair.b.post(&format!("{LOGOUT}?user_id=anna")).await.status(), 204);
    assert_eq!(pair.a.metric("adsidecar_store_up").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_work_on_a_shared_store_beside_running_replicas() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let pair = Pair::over(cluster, &url, "", Clock::system()).await;
    for user in ["anna", "bob"] {
        pair.a.log_in(user).await;
    }
    let sets: Vec<_> =
        pair.a.sets.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]).collect();
    let command = async |arguments: &[&str], input: &str| {
        let sets: Vec<_> = sets.iter().map(String::as_str).collect();
        let ran = run(&pair.a, &[arguments, &sets].concat(), input).await;
        assert_eq!(ran.code, DONE, "{arguments:?}: {}", ran.err);
        assert!(!ran.out.contains("canary") && !ran.err.contains("canary"), "{arguments:?}");
        ran.out
    };
    assert!(command(&["check"], "").await.contains("postgres_url = \"…\""));
    let listed = command(&["users", "list"], "").await;
    assert!(listed.contains("\nanna") && listed.contains(" fresh ") && listed.lines().count() == 3, "{listed}");
    assert!(command(&["users", "show", "anna"], "").await.contains("\"state\": \"fresh\""));
    let dump = command(&["store", "dump"], "").await;
    let records: BTreeMap<String, Value> = serde_json::from_str(&dump).unwrap();
    assert_eq!(records.keys().collect::<Vec<_>>(), ["anna", "bob"]);
    let token = command(&["users", "export", "bob"], "").await;
    command(&["users", "forget", "bob"], "").await;
    eventually("all replicas to forget the user", async || {
        (code(&pair.b.call("bob").await) == "login_required").then_some(())
    })
    .await;
    command(&["store", "restore", "--replace"], &dump).await;
    eventually("all replicas to have the user again", async || {
        (pair.b.call("bob").await.status() == 200).then_some(())
    })
    .await;
    command(&["users", "import", "--user", "carol"], &token).await;
    assert_eq!(call(&pair.a, "carol").await.status(), 200, "an unknown user is looked up in the database");

    // Keys: a rotation is refused while a running replica lacks the new key, and seals all records with it once all
    // have both.
    let both = format!("{FERNET_KEY},{OTHER_KEY}");
    let third = Replica::beside(&pair.a, &[("store.fernet_keys", &both)]).await;
    let rotate = format!("store.fernet_keys={OTHER_KEY},{FERNET_KEY}");
    let words: Vec<_> =
        ["key", "rotate", "--set", &rotate].into_iter().chain(sets.iter().map(String::as_str)).collect();
    let records = pair.records().await;
    let refused = run(&pair.a, &words, "").await;
    assert_eq!(refused.code, CONFIG, "{}", refused.err);
    assert!(refused.err.contains("do not have the key") && refused.err.contains("seen"), "{}", refused.err);
    assert_eq!(pair.records().await, records, "nothing was changed");
    let mut pair = pair;
    pair.b.stop().await;
    pair.b = Replica::beside(&pair.a, &[("store.fernet_keys", &both)]).await;
    pair.a.stop_sidecar().await;
    let told = run(&pair.a, &words, "").await;
    assert!(told.out.starts_with("3 grants re-encrypted"), "{}{}", told.out, told.err);
    for user in ["anna", "bob", "carol"] {
        assert_eq!(third.post(&format!("{REFRESH}?user_id={user}")).await.status(), 200, "{user}");
    }
    for replica in [&third, &pair.b] {
        assert_eq!(replica.metric("adsidecar_undecryptable_records").await, 0.0);
        assert_eq!(replica.call("anna").await.status(), 200);
    }
}
