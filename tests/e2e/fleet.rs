//! Several adsidecars on one PostgreSQL with many users: nothing that somebody waits for grows with the table, the
//! answer to one process counts for all, and nothing older overwrites anything newer.

use std::cell::Cell;
use std::time::{Duration, Instant};

use adsidecar::domain::clock::Clock;
use reqwest::Method;
use tokio::task::JoinHandle;
use world::{CLIENT_SECRET, Fault, Listener, Options, Rule};

use crate::commands::OTHER_KEY;
use crate::harness::{FERNET_KEY, Harness, code, eventually, json};
use crate::postgres::{Pair, Replica, call};
use crate::postgres_server::{Bouncer, Cluster, Sql};
use crate::refresh_tasks::hold;

const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGOUT: &str = "/api/auth/amazon/logout";

fn frozen() -> Clock {
    Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap())
}

/// Adds rows of the size of real ones. No process has to open them: they are described, and idle.
pub async fn add_users(sql: &Sql, count: u32) {
    sql.run(&format!(
        "INSERT INTO adsidecar_grants (user_id, record, generation, epoch, changed_at, described, sealed_with, \
         updated_at) \
         SELECT 'bulk-' || n, record, 1, 1, now(), hashtextextended(record, 0), 'damaged', now() \
         FROM (SELECT n, repeat(md5(n::text), 40) AS record FROM generate_series(1, {count}) AS n) AS rows; \
         ANALYZE adsidecar_grants"
    ))
    .await;
}

/// The number of rows that the server has read from the table of grants.
async fn rows_read(sql: &Sql) -> i64 {
    sql.run("SELECT pg_stat_force_next_flush()").await;
    let read = "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables \
                WHERE relname = 'adsidecar_grants'";
    sql.one(read).await.unwrap().parse().unwrap()
}

/// Logs users in at one replica and out again, and returns how long the other one took to obey each logout.
async fn logout_delays(pair: &Pair, rounds: usize) -> Vec<Duration> {
    let mut delays = Vec::new();
    for round in 0..rounds {
        let user = format!("user-{round}");
        pair.a.log_in(&user).await;
        assert_eq!(pair.b.call(&user).await.status(), 200, "a login is found at once");
        assert_eq!(pair.a.post(&format!("{LOGOUT}?user_id={user}")).await.status(), 204);
        let begun = Instant::now();
        eventually("the logout to be obeyed", async || {
            (code(&pair.b.call(&user).await) == "login_required").then_some(())
        })
        .await;
        delays.push(begun.elapsed());
    }
    delays.sort_unstable();
    delays
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_is_obeyed_within_a_second_beside_a_hundred_thousand_users() {
    let pair = Pair::start().await;
    add_users(&pair.sql, 100_000).await;
    // This replica starts beside the full table, and reads none of it.
    let before = rows_read(&pair.sql).await;
    let begun = Instant::now();
    let third = Replica::beside(&pair.a, &[]).await;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    let delays = logout_delays(&pair, 20).await;
    let late = delays.iter().filter(|delay| **delay > Duration::from_secs(1)).count();
    assert!(late <= 1, "on a busy machine one may be late: {delays:?}");
    assert_eq!(third.call("user-7").await.status(), 401);
    let read = rows_read(&pair.sql).await - before;
    // The two older replicas read one page each of what was added beside them.
    assert!(read < 20_000, "nobody reads the table: {read} rows");
    for replica in [&pair.b, &third] {
        assert!(replica.metric("adsidecar_store_lag_seconds").await < 2.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_pooler_a_logout_is_obeyed_by_the_next_poll() {
    let cluster = Cluster::start();
    let bouncer = Bouncer::before(&cluster, 3);
    let pair = Pair::over(cluster, &bouncer.url(), "", frozen()).await;
    add_users(&pair.sql, 1000).await;
    let delays = logout_delays(&pair, 10).await;
    let late = delays.iter().filter(|delay| **delay > Duration::from_millis(1200)).count();
    assert!(late <= 1, "on a busy machine one may be late: {delays:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_cannot_follow_says_so_and_asks_for_each_row_before_it_uses_a_token() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    // The poll fails, and nothing else does.
    pair.sql.run("ALTER TABLE adsidecar_notes RENAME TO hidden").await;
    eventually("the lag to be reported", async || {
        (pair.b.metric("adsidecar_store_lag_seconds").await > 2.0).then_some(())
    })
    .await;
    let ready = pair.b.admin("/readyz").await;
    assert_eq!(ready.0, 200);
    assert!(ready.1.contains("degraded"), "{}", ready.1);
    assert_eq!(pair.b.call("anna").await.status(), 200);
    pair.sql.run("UPDATE adsidecar_grants SET record = NULL, generation = generation + 1").await;
    eventually("the logout to be obeyed", async || {
        (code(&pair.b.call("anna").await) == "login_required").then_some(())
    })
    .await;
    pair.sql.run("ALTER TABLE hidden RENAME TO adsidecar_notes").await;
    eventually("the replica to follow again", async || (pair.b.admin("/readyz").await.1 == "ready\n").then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_row_delays_no_other_user() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    let locker = pair.cluster.connect().await;
    locker.run("BEGIN; SELECT FROM adsidecar_grants WHERE user_id = 'anna' FOR UPDATE").await;
    let logout = {
        let url = pair.a.proxy_url(&format!("{LOGOUT}?user_id=anna"));
        tokio::spawn(pair.a.client.post(url).send())
    };
    for round in 0..20 {
        let begun = Instant::now();
        let user = format!("user-{round}");
        pair.a.log_in(&user).await;
        assert_eq!(pair.b.call(&user).await.status(), 200);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    let answer = logout.await.unwrap().unwrap();
    assert_eq!(code(&answer), "store_unavailable", "the locked user is told");
    let stored = "SELECT count(*) FROM adsidecar_grants WHERE record IS NOT NULL";
    assert_eq!(pair.sql.one(stored).await.as_deref(), Some("21"));
    assert_eq!(pair.a.metric("adsidecar_store_up").await, 1.0, "the database works");
    locker.run("ROLLBACK").await;
    assert_eq!(pair.a.post(&format!("{LOGOUT}?user_id=anna")).await.status(), 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_statement_is_ended_at_the_server() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    let locker = pair.cluster.connect().await;
    locker.run("BEGIN; LOCK TABLE adsidecar_grants IN ACCESS EXCLUSIVE MODE").await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                   AND application_name = 'adsidecar' AND now() - query_start > interval '3 seconds'";
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        assert_eq!(pair.b.call("anna").await.status(), 200, "the token is served from memory");
        assert_eq!(pair.sql.one(waiting).await.as_deref(), Some("0"), "no abandoned statement goes on");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    locker.run("ROLLBACK").await;
    eventually("the store to work again", async || (pair.b.admin("/readyz").await.1 == "ready\n").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_users_that_were_used_last_are_held_in_memory_and_all_are_listed() {
    let pair = Pair::start().await;
    let small = Replica::beside(&pair.a, &[("store.cache", "10")]).await;
    let users: Vec<_> = (10..40).map(|number| format!("user-{number}")).collect();
    for user in &users {
        pair.a.log_in(user).await;
        assert_eq!(small.call(user).await.status(), 200);
    }
    eventually("the others to be forgotten", async || {
        (small.metric("adsidecar_store_cached_users").await <= 10.0).then_some(())
    })
    .await;
    for user in users.iter().rev() {
        assert_eq!(small.call(user).await.status(), 200, "each is read again when it is needed");
    }
    assert_eq!(pair.a.sandbox.refreshes(), 0);
    let mut listed = Vec::new();
    while let Some(page) = {
        let after = listed.last().cloned().unwrap_or_default();
        let path = format!("/api/auth/amazon/status?after={after}&limit=7");
        let page = json(small.get(&path).await).await;
        let names: Vec<_> =
            page["users"].as_array().unwrap().iter().map(|user| user["user_id"].as_str().unwrap().to_owned()).collect();
        (!names.is_empty()).then_some(names)
    } {
        listed.extend(page);
    }
    assert_eq!(listed, users);
    assert_eq!(small.metric("adsidecar_users{state=\"fresh\"}").await, 30.0);
    let page = small.admin("/").await.1;
    assert!(users.iter().all(|user| page.contains(user.as_str())), "the status page has all of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn due_refreshes_are_shared_among_replicas_that_hold_none_of_the_users() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let mut pair = Pair::over(cluster, &url, "", frozen()).await;
    let users: Vec<_> = (10..40).map(|number| format!("user-{number}")).collect();
    for user in &users {
        pair.a.log_in(user).await;
    }
    pair.b.stop().await;
    pair.b = Replica::beside(&pair.a, &[]).await;
    pair.a.sandbox.clear_history();
    // So that one replica alone does not make all of them before the other one polls.
    let slow = Fault::Delay { ms: 500 };
    pair.a.sandbox.set_fault(Rule::from(slow).at(Listener::Lwa).always());
    // Past `refresh.ahead` of all of them.
    pair.a.advance(3000);
    let refreshed = "SELECT count(*) FROM adsidecar_grants WHERE generation = 2 AND lease_owner IS NULL";
    eventually("all users to be refreshed", async || (pair.sql.one(refreshed).await? == "30").then_some(())).await;
    assert_eq!(pair.a.sandbox.refreshes(), 30, "each of them once");
    let success = "adsidecar_token_refresh_total{reason=\"\",result=\"success\"}";
    let (here, there) = (pair.a.metric(success).await, pair.b.metric(success).await);
    assert_eq!(here + there, 30.0);
    assert!(here > 0.0 && there > 0.0, "{here} and {there}");
}

/// How often the replicas have polled, and claimed refreshes.
async fn asked(pair: &Pair) -> [[f64; 2]; 2] {
    let count = |op| format!("adsidecar_store_operation_duration_seconds_count{{op=\"{op}\"}}");
    let (polls, claims) = (count("poll"), count("claim"));
    [
        [pair.a.metric(&polls).await, pair.b.metric(&polls).await],
        [pair.a.metric(&claims).await, pair.b.metric(&claims).await],
    ]
}

/// Waits until both replicas have polled three times more.
pub async fn polls_pass(pair: &Pair) {
    let [before, _] = asked(pair).await;
    eventually("polls", async || {
        let [now, _] = asked(pair).await;
        (now[0] >= before[0] + 3.0 && now[1] >= before[1] + 3.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_login_with_amazon_is_away_due_refreshes_cost_the_database_nothing_and_then_are_made() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let pair = Pair::over(cluster, &url, "", frozen()).await;
    let users = 60;
    for number in 10..10 + users {
        pair.a.log_in(&format!("user-{number}")).await;
    }
    pair.a.sandbox.set_fault(Rule::from(Fault::status(503)).at(Listener::Lwa).always());
    // Past `refresh.ahead` of all of them.
    pair.a.advance(3000);
    let brake = "SELECT value FROM adsidecar_notes WHERE name = 'brake'";
    eventually("the brake", async || pair.sql.one(brake).await).await;
    let failed = "SELECT count(*) FROM adsidecar_grants WHERE failure IS NOT NULL";
    // Whoever had claimed before it heard of the brake.
    polls_pass(&pair).await;
    let [_, claims] = asked(&pair).await;
    let tried: u32 = pair.sql.one(failed).await.unwrap().parse().unwrap();
    polls_pass(&pair).await;
    assert_eq!(asked(&pair).await[1], claims, "nobody claims what cannot be refreshed");
    assert!((5..users).contains(&tried), "{tried} of {users} were tried");

    pair.a.sandbox.clear_faults();
    // The clocks of the replicas pass a minute, and so does that of the database.
    pair.sql.run("UPDATE adsidecar_notes SET value = '0 ' || split_part(value, ' ', 2) WHERE name = 'brake'").await;
    pair.sql.run("UPDATE adsidecar_grants SET retry_at = clock_timestamp() WHERE retry_at IS NOT NULL").await;
    pair.a.advance(60);
    let refreshed = "SELECT count(*) FROM adsidecar_grants WHERE generation = 2";
    let (begun, called) = (Cell::new(None::<Instant>), pair.a.sandbox.refreshes());
    // The rate grows slowly, so each third has its own time.
    for wanted in [users / 3, users * 2 / 3, users] {
        let is_there = |count: &String| count.parse::<u32>().unwrap() >= wanted;
        eventually("them to be refreshed", async || {
            let calls = pair.a.sandbox.refreshes() - called;
            if calls > 0 {
                begun.set(begun.get().or_else(|| Some(Instant::now())));
                admits(calls, begun.get().map_or(Duration::ZERO, |begun| begun.elapsed()));
            }
            pair.sql.one(refreshed).await.filter(is_there)
        })
        .await;
    }
}

/// The two replicas together call Login with Amazon as often as one would after an outage: ten times a second at first,
/// and twice as often after each two seconds.
fn admits(calls: u64, since: Duration) {
    let grown = ((since.as_secs_f64() + 0.1) / 2.0).exp2();
    let planned = 20.0 / std::f64::consts::LN_2 * (grown - 1.0);
    assert!(calls as f64 <= 1.3 * planned + 6.0, "{calls} calls within {since:?}, and not {planned:.0}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_refusal_counts_for_all_replicas() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    pair.a.sandbox.clear_history();
    pair.a.sandbox.set_fault(Rule::from(Fault::too_many(Some(30))).at(Listener::Lwa).always());
    pair.a.advance(3600);
    assert_eq!(code(&call(&pair.a, "anna").await), "token_unavailable");
    let asked = pair.a.sandbox.refreshes();
    assert_eq!(asked, 1);
    let answer = pair.b.call("anna").await;
    assert_eq!(code(&answer), "token_unavailable");
    assert!(answer.headers().contains_key("retry-after"));
    assert_eq!(pair.a.sandbox.refreshes(), asked, "the other replica does not ask again");
    let third = Replica::beside(&pair.a, &[]).await;
    assert_eq!(code(&third.call("anna").await), "token_unavailable");
    assert_eq!(pair.a.sandbox.refreshes(), asked, "nor does one that starts now");
    assert_eq!(third.metric("adsidecar_users{state=\"failing\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_outage_nobody_uses_a_token_whose_successor_another_replica_could_not_store() {
    // Also one whose first poll is yet to come must not take the connection after the outage for its first.
    for has_polled in [true, false] {
        let mut pair = Pair::start().await;
        if has_polled {
            polls_pass(&pair).await;
        } else {
            pair.sql.run("ALTER TABLE adsidecar_notes RENAME TO hidden").await;
        }
        pair.a.log_in("anna").await;
        assert_eq!(pair.b.call("anna").await.status(), 200);
        pair.a.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa).always());
        let release = hold("refresh_answered");
        let refresh = {
            let url = pair.a.proxy_url(&format!("{REFRESH}?user_id=anna"));
            tokio::spawn(pair.a.client.post(url).send())
        };
        eventually("the answer", async || (pair.a.sandbox.refreshes() == 1).then_some(())).await;
        pair.cluster.crash();
        drop(release);
        refresh.await.unwrap().unwrap();
        assert_eq!(pair.a.metric("adsidecar_token_refresh_total{reason=\"\",result=\"success\"}").await, 1.0);
        pair.cluster.run();
        pair.sql = pair.cluster.connect().await;
        // As if the outage had taken longer than the lease.
        pair.sql.run("UPDATE adsidecar_grants SET lease_until = clock_timestamp()").await;
        eventually("a refresh", async || {
            // Past the pause after an attempt without the database.
            pair.a.advance(1);
            (pair.b.post(&format!("{REFRESH}?user_id=anna")).await.status() == 200).then_some(())
        })
        .await;
        let refused = "adsidecar_token_refresh_total{reason=\"invalid_grant\",result=\"failure\"}";
        let sent = (pair.a.metric(refused).await, pair.b.metric(refused).await);
        assert_eq!(sent, (0.0, 0.0), "the first token was used up by replica a; polled: {has_polled}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_whose_answer_one_replica_did_not_hear_is_reported_lost_by_the_one_that_is_refused() {
    let mut pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    let lost = "adsidecar_token_refresh_interrupted_total{outcome=\"lost\"}";
    // A refusal alone is no loss.
    pair.a.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa));
    pair.b.post(&format!("{REFRESH}?user_id=anna")).await;
    assert_eq!((pair.a.metric(lost).await, pair.b.metric(lost).await), (0.0, 0.0));
    pair.a.log_in("anna").await;
    // So that it does not take its own refusal of the grant before for that of this one.
    assert_eq!(pair.b.state_of("anna").await, "fresh");
    pair.a.sandbox.set_fault(Rule::from(Fault::CloseMidBody).at(Listener::Lwa));
    pair.a.post(&format!("{REFRESH}?user_id=anna")).await;
    assert_eq!(pair.a.status_of("anna").await["state"], "failing");
    pair.a.stop_sidecar().await;
    pair.a.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa).always());
    // Past the pause after a failure.
    pair.a.advance(60);
    // What the other one did not hear may have been a new token. That is said before others can read of the refusal:
    // they say nothing then, and this replica may be killed.
    let release = hold("refresh_released");
    let refresh = tokio::spawn(pair.b.client.post(format!("http://{}{REFRESH}?user_id=anna", pair.b.proxy)).send());
    let refused = "SELECT user_id FROM adsidecar_grants WHERE refused = 'invalid_grant'";
    eventually("the refusal", async || pair.sql.one(refused).await).await;
    assert_eq!(pair.b.metric(lost).await, 1.0);
    drop(release);
    refresh.await.unwrap().unwrap();
    assert_eq!(pair.b.state_of("anna").await, "login_required");
    assert_eq!(pair.b.metric(lost).await, 1.0, "it is said once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_grant_inherits_no_lost_answer_from_the_one_before_it() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    pair.a.sandbox.set_fault(Rule::from(Fault::CloseMidBody).at(Listener::Lwa));
    assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 503);
    let import = pair.a.client.post(pair.a.admin_url("/users/import?user_id=anna&replace=true"));
    assert_eq!(import.body(pair.a.sandbox.grant().refresh_token).send().await.unwrap().status(), 200);
    assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    let recovered = "adsidecar_token_refresh_interrupted_total{outcome=\"recovered\"}";
    assert_eq!(pair.a.metric(recovered).await, 0.0, "nothing is lost of this grant");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_replaces_nothing_is_not_shown_to_amazon_wherever_the_user_logged_in() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    pair.a.sandbox.clear_history();
    let import = pair.b.client.post(format!("http://{}/users/import?user_id=anna", pair.b.admin));
    let answer = import.body(pair.a.sandbox.grant().refresh_token).send().await.unwrap();
    assert_eq!(answer.status(), 400);
    assert!(answer.text().await.unwrap().contains("has a grant already"));
    assert_eq!(pair.a.sandbox.refreshes(), 0, "it may rotate what it is shown");
}

/// Starts a refresh whose answer replica `a` does not hear (`fault`), or does: it is held before it acts on that.
async fn held_refresh(pair: &Pair, fault: Fault) -> (std::sync::mpsc::Sender<()>, JoinHandle<()>) {
    pair.a.sandbox.set_fault(Rule::from(fault).at(Listener::Lwa).always());
    pair.a.sandbox.clear_history();
    let release = hold("refresh_answered");
    let posted = pair.a.client.post(pair.a.proxy_url(&format!("{REFRESH}?user_id=anna"))).send();
    let refresh = tokio::spawn(async move { drop(posted.await.unwrap()) });
    eventually("the answer", async || (pair.a.sandbox.refreshes() == 1).then_some(())).await;
    (release, refresh)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_loses_a_lease_hides_no_lost_answer() {
    let lost = "adsidecar_token_refresh_interrupted_total{outcome=\"lost\"}";
    let forgotten = "UPDATE adsidecar_grants SET lease_owner = NULL, lease_until = NULL";
    for is_refused in [false, true] {
        let pair = Pair::start().await;
        pair.a.log_in("anna").await;
        assert_eq!(pair.b.call("anna").await.status(), 200);
        let (release, refresh) = held_refresh(&pair, Fault::CloseMidBody).await;
        pair.sql.run(forgotten).await;
        if is_refused {
            // As another replica leaves the row that took the lease, and was refused.
            pair.sql
                .run(
                    "UPDATE adsidecar_grants SET refused = 'invalid_grant', attempts = 1, \
                     retry_at = clock_timestamp() + interval '1 hour', due_at = NULL",
                )
                .await;
        }
        drop(release);
        refresh.await.unwrap();
        if is_refused {
            assert_eq!(pair.a.status_of("anna").await["state"], "login_required");
            assert_eq!(pair.a.metric(lost).await, 1.0, "what it did not hear may have been a new token");
        } else {
            assert_eq!(pair.a.status_of("anna").await["state"], "failing");
            pair.a.sandbox.clear_faults();
            pair.a.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa).always());
            // Either of them tries again after a random pause, of which `b` hears from the database.
            eventually("the refusal", async || {
                pair.a.advance(10);
                pair.b.post(&format!("{REFRESH}?user_id=anna")).await;
                (pair.b.state_of("anna").await == "login_required").then_some(())
            })
            .await;
            let told = pair.a.metric(lost).await + pair.b.metric(lost).await;
            assert_eq!(told, 1.0, "by one of them");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_comes_while_the_grant_is_stored_again_is_not_dropped() {
    let mut pair = Pair::start().await;
    pair.b.stop().await;
    pair.a.log_in("anna").await;
    pair.sql.run("CREATE TABLE standby AS SELECT user_id, record, generation FROM adsidecar_grants").await;
    pair.a.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa).always());
    assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    let (release, refresh) = held_refresh(&pair, Fault::RotateRefreshToken).await;
    // A failover to a standby that lacks the last refresh, which the replica stores again.
    pair.sql
        .run(
            "UPDATE adsidecar_grants AS g SET record = s.record, generation = s.generation, lease_owner = NULL, \
             lease_until = NULL FROM standby AS s WHERE g.user_id = s.user_id",
        )
        .await;
    eventually("the grant to be stored again", async || (pair.row("anna").await.0 == 2).then_some(())).await;
    drop(release);
    refresh.await.unwrap();
    assert_eq!(pair.a.metric("adsidecar_token_refresh_dropped_total").await, 0.0);
    assert_eq!(pair.row("anna").await, (3, true), "under the generation after that");
    assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200, "with the newest refresh token");
}

/// What a replica stores after a failover that holds the grant and knows of no refresh since: the grant again, one
/// generation later.
const STORED_AGAIN: &str = "UPDATE adsidecar_grants AS g SET record = s.record, generation = s.generation, \
    lease_owner = NULL, lease_until = NULL FROM again AS s WHERE g.user_id = s.user_id";

/// The database has the grant as it was before `b` refreshed it. Only `a` runs, and was restarted, so that it knows
/// nothing of that. The table `again` has the grant as `b` would store it again.
async fn before_a_failover() -> Pair {
    let mut pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    pair.sql.run("ALTER TABLE adsidecar_grants DISABLE TRIGGER ALL").await;
    pair.sql.run("CREATE TABLE before AS SELECT user_id, record, generation FROM adsidecar_grants").await;
    assert_eq!(pair.b.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    pair.b.stop().await;
    pair.a.restart_with("refresh.concurrency", "8").await;
    pair.sql.run("CREATE TABLE again AS SELECT user_id, record, generation FROM adsidecar_grants").await;
    pair.sql.run(&STORED_AGAIN.replace("again AS s", "before AS s")).await;
    pair
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_outlives_a_replica_that_stores_the_used_up_grant_again() {
    let pair = before_a_failover().await;
    let (release, refresh) = held_refresh(&pair, Fault::RotateRefreshToken).await;
    // It finds that only when it stores its answer.
    pair.sql.run(STORED_AGAIN).await;
    drop(release);
    refresh.await.unwrap();
    assert_eq!(pair.a.metric("adsidecar_token_refresh_dropped_total").await, 0.0);
    assert_eq!(pair.row("anna").await, (3, true), "above what is used up");
    assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200, "with the newest refresh token");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_keeps_its_rotated_token_if_another_has_stored_the_used_up_one_again_under_its_version() {
    let pair = before_a_failover().await;
    pair.a.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa).always());
    assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    assert_eq!(pair.row("anna").await, (2, true), "the version of what the other one has stored");
    // The failover loses that, and the other one is first.
    pair.sql.run(STORED_AGAIN).await;
    pair.sql.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'adsidecar'").await;
    eventually("the grant to be stored again", async || (pair.row("anna").await.0 == 3).then_some(())).await;
    assert_eq!(pair.a.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200, "with the newest refresh token");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_generation_is_compared_before_each_client_secret() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let sets = [("store.kind", "postgres"), ("store.postgres_url", url.as_str())];
    let mut harness = Harness::built(Options::calm(frozen()), "", &sets).await;
    harness.log_in("default").await;
    harness.restart_with("amazon.client_secret", &format!("not-spread-yet,{CLIENT_SECRET}")).await;
    let sql = cluster.connect().await;
    harness.sandbox.clear_history();
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let refresh = tokio::spawn(harness.client.post(harness.proxy_url(REFRESH)).send());
    gate.reached(1).await;
    // As if this process had been suspended for longer than its lease, and another one had refreshed.
    sql.run(
        "UPDATE adsidecar_grants SET lease_owner = 'other', lease_until = clock_timestamp() + interval '15 seconds'",
    )
    .await;
    gate.release();
    refresh.await.unwrap().unwrap();
    assert_eq!(harness.sandbox.refreshes(), 1, "the second secret is not tried without the lease");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_six_replicas_one_adopts_the_configured_refresh_token_and_a_login_is_never_overwritten() {
    let pair = Pair::start().await;
    let other = "Atzr|configured-elsewhere";
    let configured = [("amazon.refresh_token", other)];
    let starts = (0..6).map(|_| Replica::beside(&pair.a, &configured));
    let replicas = futures_util::future::join_all(starts).await;
    let told = "SELECT generation || ' ' || epoch || ' ' || coalesce(refused, '-') FROM adsidecar_grants";
    assert_eq!(pair.row("default").await, (1, true), "one of them adopted it: {:?}", pair.sql.one(told).await);
    // Nobody has issued it: whoever refreshes it first says to all that it is refused.
    eventually("the refusal", async || {
        let refused = "SELECT count(*) FROM adsidecar_grants WHERE refused = 'invalid_grant' AND lease_owner IS NULL";
        (pair.sql.one(refused).await? == "1").then_some(())
    })
    .await;
    // None of them may still be there to try the second grant.
    for mut replica in replicas {
        replica.stop().await;
    }
    // A login may compare identities first: while it waits for a token of the old grant, the call at the gate times
    // out.
    let ends = ["invalid_grant", "timeout"];
    let ends = ends.map(|end| format!("adsidecar_token_refresh_total{{reason=\"{end}\",result=\"failure\"}}"));
    let failed = async || {
        let mut sum = 0.0;
        for series in &ends {
            sum += pair.a.metric(series).await + pair.b.metric(series).await;
        }
        sum
    };
    let before = failed().await;
    // The starting process or one that runs tries the grant, and while it hears that it is refused, a person logs in.
    pair.sql
        .run(
            "DELETE FROM adsidecar_notes WHERE name = 'adopted_refresh_token'; \
             UPDATE adsidecar_grants SET refused = NULL, attempts = NULL, retry_at = NULL, due_at = NULL",
        )
        .await;
    let gate = pair.a.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let configured = [("amazon.refresh_token", "Atzr|another-one")];
    let starting = Replica::beside(&pair.a, &configured);
    let (starting, ()) = tokio::join!(starting, async {
        gate.reached(1).await;
        pair.a.log_in("default").await;
        gate.release();
    });
    // A refresh changes the generation, and a login or an adoption the epoch too.
    let epoch = async || pair.sql.one("SELECT epoch FROM adsidecar_grants WHERE user_id = 'default'").await;
    let of_login = epoch().await;
    eventually("the login to be in use", async || (starting.call("default").await.status() == 200).then_some(())).await;
    eventually("the refusal", async || {
        let here = starting.metric(&ends[0]).await + starting.metric(&ends[1]).await;
        (here + failed().await > before).then_some(())
    })
    .await;
    // It waits for the refresh that was refused, and for what follows from it.
    eventually("a refresh of the login", async || (starting.post(REFRESH).await.status() == 200).then_some(())).await;
    assert_eq!(epoch().await, of_login, "the login is kept");
    assert_eq!(call(&pair.a, "default").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_rotated_by_one_recipe_while_all_replicas_serve() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys");
    std::fs::write(&keys, FERNET_KEY).unwrap();
    let file = keys.to_str().unwrap();
    let mut harness =
        Harness::built(Options::calm(Clock::system()), "", &[("store.kind", "postgres"), ("store.postgres_url", &url)])
            .await;
    harness.restart_with("store.fernet_keys_file", file).await;
    let other = Replica::beside(&harness, &[]).await;
    for user in ["anna", "bob"] {
        harness.log_in(user).await;
        assert_eq!(other.call(user).await.status(), 200);
    }
    // 1. The new key before the old one: each process takes it by itself, to open records with.
    std::fs::write(&keys, format!("{OTHER_KEY},{FERNET_KEY}")).unwrap();
    let sql = cluster.connect().await;
    let with_both = "SELECT count(*) FROM adsidecar_notes WHERE value LIKE '%\"keys\":[\"________\",\"________\"]%'";
    eventually("both processes to have both keys", async || (sql.one(with_both).await? == "2").then_some(())).await;
    // 2. The rotation.
    let sets: Vec<_> =
        harness.sets.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]).collect();
    let words: Vec<_> = ["key", "rotate"].into_iter().chain(sets.iter().map(String::as_str)).collect();
    let rotated = crate::commands::run(&harness, &words, "").await;
    assert!(rotated.out.starts_with("2 grants re-encrypted"), "{}{}", rotated.out, rotated.err);
    for user in ["anna", "bob"] {
        let url = format!("{REFRESH}?user_id={user}");
        assert_eq!(harness.post(&url).await.status(), 200);
        assert_eq!(other.post(&url).await.status(), 200);
    }
    assert_eq!(harness.metric("adsidecar_undecryptable_records").await, 0.0);
    assert_eq!(other.metric("adsidecar_undecryptable_records").await, 0.0);
    assert_eq!(
        harness.request(Method::GET, "/v2/profiles").header("x-ads-user", "anna").send().await.unwrap().status(),
        200
    );
}
