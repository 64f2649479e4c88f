//! What several adsidecars on one PostgreSQL hear of each other's changes: of logins and logouts at once, and of
//! refreshes that were due by the rows of the users that they hold, as nobody could read the refreshes of all users.

use std::time::Duration;

use adsidecar::domain::grant::Version;
use adsidecar::store::keyring::Keyring;
use adsidecar::store::{Changes, ConnectionUrl, FailedRefresh, Lease, Settings};
use jiff::Timestamp;
use world::{Fault, Listener, Rule};

use crate::fleet::{add_users, polls_pass};
use crate::harness::{code, eventually};
use crate::postgres::{Pair, Replica, call};
use crate::postgres_server::{Cluster, Sql};
use crate::stores::{grant, open, ring, user};

const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGOUT: &str = "/api/auth/amazon/logout";

/// The number of entries that polls have read from the indexes of changes.
async fn changes_read(sql: &Sql) -> i64 {
    sql.run("SELECT pg_stat_force_next_flush()").await;
    let read = "SELECT sum(idx_tup_read) FROM pg_stat_user_indexes \
                WHERE indexrelname IN ('adsidecar_grants_change', 'adsidecar_grants_news')";
    sql.one(read).await.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn polls_read_no_refreshes_that_were_due_and_hear_of_the_logout_among_them() {
    let pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    add_users(&pair.sql, 2000).await;
    // What was just inserted is news, which polls read for a while.
    for _ in 0..3 {
        polls_pass(&pair).await;
    }
    let refresh = "SELECT count(*) FROM generate_series(1, 2000) AS n, adsidecar_write('bulk-' || n, \
                   repeat(md5(n::text), 40), 2, NULL, NULL, 1, '{\"early\": false}', '1s') AS w WHERE w.written";
    assert_eq!(pair.sql.one(refresh).await.as_deref(), Some("2000"));
    let before = changes_read(&pair.sql).await;
    assert_eq!(pair.a.post(&format!("{LOGOUT}?user_id=anna")).await.status(), 204);
    for _ in 0..2 {
        polls_pass(&pair).await;
    }
    assert_eq!(code(&pair.b.call("anna").await), "login_required");
    let read = changes_read(&pair.sql).await - before;
    assert!(read < 500, "two replicas read {read} changes, for one logout beside 2,000 refreshes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_response_stays_known_until_the_grant_is_refreshed_or_refused_whoever_asks_and_how_often() {
    let cluster = Cluster::start();
    let sql = cluster.connect().await;
    let postgres = Some(ConnectionUrl::parse(&cluster.url()).unwrap());
    let (settings, ring) = (Settings { path: "unused".into(), postgres }, ring(&[&Keyring::generate_key()]));
    let (killed, _) = open(&settings, &ring).unwrap();
    let (next, _) = open(&settings, &ring).unwrap();
    let (killed, next) = (killed.shared().unwrap(), next.shared().unwrap());
    let (anna, in_doubt) = (user("anna"), Lease::Acquired { interrupted: true });
    killed.consent(&anna, &grant("anna", 1), Duration::ZERO).await.unwrap();
    sql.run("UPDATE adsidecar_grants SET due_at = now() - interval '1 minute'").await;
    let leases_expire = "UPDATE adsidecar_grants SET lease_until = clock_timestamp() - interval '1 second'";

    assert_eq!(killed.acquire_lease(&anna, 1).await.unwrap(), Lease::Acquired { interrupted: false });
    sql.run(leases_expire).await;
    // As when the response to the first one is lost with its connection, and it is sent again.
    for _ in 0..2 {
        assert_eq!(next.acquire_lease(&anna, 1).await.unwrap(), in_doubt);
    }
    sql.run(leases_expire).await;
    // As when the response to a claim is lost, and the same process claims, or is asked for a refresh, later.
    for _ in 0..2 {
        let claimed = next.claim_due(Timestamp::now(), 10).await.unwrap();
        assert!(claimed[0].interrupted, "{claimed:?}");
        sql.run(leases_expire).await;
        sql.run("UPDATE adsidecar_grants SET due_at = now() - interval '1 minute'").await;
    }
    assert_eq!(next.acquire_lease(&anna, 1).await.unwrap(), in_doubt);
    // A failure that says nothing of the grant changes nothing.
    let failed = |refused| FailedRefresh { refused, code: "x".into(), attempts: 1, retry_in: Duration::ZERO };
    assert!(next.release_lease(&anna, 1, Some(&failed(false)), None, false).await.unwrap());
    assert_eq!(killed.acquire_lease(&anna, 1).await.unwrap(), in_doubt);
    // What is refused has been reported by who was refused.
    assert!(killed.release_lease(&anna, 1, Some(&failed(true)), None, false).await.unwrap());
    assert_eq!(next.acquire_lease(&anna, 1).await.unwrap(), Lease::Acquired { interrupted: false });
    // A process says so itself, and what is stored next is another grant.
    assert!(next.release_lease(&anna, 1, Some(&failed(false)), None, true).await.unwrap());
    assert_eq!(next.acquire_lease(&anna, 1).await.unwrap(), in_doubt);
    let of = next.lookup(&anna).await.unwrap().version;
    next.put_refreshed(&anna, &grant("anna-2", 2), of, false).await.unwrap();
    assert_eq!(killed.acquire_lease(&anna, 2).await.unwrap(), Lease::Acquired { interrupted: false });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_tells_of_everything_but_refreshes_that_were_due() {
    let cluster = Cluster::start();
    let sql = cluster.connect().await;
    let postgres = Some(ConnectionUrl::parse(&cluster.url()).unwrap());
    let (settings, ring) = (Settings { path: "unused".into(), postgres }, ring(&[&Keyring::generate_key()]));
    let (writer, _) = open(&settings, &ring).unwrap();
    let (reader, _) = open(&settings, &ring).unwrap();
    let (writing, reading) = (writer.shared().unwrap(), reader.shared().unwrap());
    for name in ["due", "early", "awaited", "older", "out", "again", "psql"] {
        writer.save(&user(name), &grant(name, 1), None).await.unwrap();
    }
    assert!(matches!(reading.poll().await.unwrap().changes, Changes::Unknown), "it has just come");
    let last = sql.one("SELECT max(change) FROM adsidecar_grants").await.unwrap();
    let version = async |name: &str| writing.lookup(&user(name)).await.unwrap().version;

    let refreshed = async |name: &str, early| {
        let of = version(name).await;
        writing.put_refreshed(&user(name), &grant(&format!("{name}-2"), of.generation + 1), of, early).await.unwrap()
    };
    refreshed("due", false).await;
    refreshed("early", true).await;
    // Others wait for the time that they were told, and this refresh comes before it.
    assert_eq!(writing.acquire_lease(&user("awaited"), 1).await.unwrap(), Lease::Acquired { interrupted: false });
    let retry_in = Duration::from_secs(60);
    let failed = FailedRefresh { refused: true, code: "invalid_grant".into(), attempts: 1, retry_in };
    assert!(writing.release_lease(&user("awaited"), 1, Some(&failed), None, false).await.unwrap());
    refreshed("awaited", false).await;
    assert!(writer.erase(&user("out")).await.unwrap());
    let before = version("again").await;
    writer.save(&user("again"), &grant("again-2", 2), None).await.unwrap();
    assert!(version("again").await.epoch > before.epoch);
    // A process of the version before does not say whether its refresh was due; and a person says nothing.
    let older = "SELECT written FROM adsidecar_write('older', (SELECT record FROM adsidecar_grants \
                 WHERE user_id = 'older'), 2, NULL, NULL, 1, '{\"sealed_with\": \"unknown\"}', '1s')";
    assert_eq!(sql.one(older).await.as_deref(), Some("t"));
    sql.run("UPDATE adsidecar_grants SET generation = 2 WHERE user_id = 'psql'").await;

    let Changes::Rows(told) = reading.poll().await.unwrap().changes else { panic!("it continues") };
    let mut names: Vec<_> = told.iter().map(|(user, _)| user.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["again", "awaited", "early", "older", "out", "psql"]);
    let early = told.iter().find(|(user, _)| user.as_str() == "early").map(|(_, version)| *version);
    assert_eq!(early.unwrap(), Version { generation: 2, ..version("early").await });
    // The previous version follows all changes by their numbers.
    let since = format!("SELECT count(*) FROM adsidecar_grants WHERE change > {last}");
    assert_eq!(sql.one(&since).await.as_deref(), Some("7"));
    // A put-back is news, whatever the database has lost.
    let of = version("due").await;
    let above = Version { generation: of.generation + 1, ..of };
    assert!(writing.put_back(&user("due"), &grant("due-3", 3), above, of.generation).await.unwrap());
    let Changes::Rows(told) = reading.poll().await.unwrap().changes else { panic!("it continues") };
    assert!(told.contains(&(user("due"), above)), "{told:?}");
    for store in [writer, reader] {
        store.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_replica_takes_note_of_a_refresh_of_a_grant_that_it_holds_before_the_database_goes_away() {
    let mut pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    // For two seconds polls read again what is news: one of them would bring the refresh with it.
    for _ in 0..3 {
        polls_pass(&pair).await;
    }
    let due = "SELECT ceil(extract(epoch FROM due_at - updated_at))::bigint FROM adsidecar_grants";
    let due: i64 = pair.sql.one(due).await.unwrap().parse().unwrap();
    // Neither of the two claims it, but a third one makes the refresh when it is due: that is no news.
    pair.sql.run("UPDATE adsidecar_grants SET due_at = NULL").await;
    let third = Replica::beside(&pair.a, &[]).await;
    pair.a.advance(due + 1);
    assert_eq!(third.post(&format!("{REFRESH}?user_id=anna")).await.status(), 200);
    assert_eq!(pair.row("anna").await, (2, true));
    let told = "SELECT change > news FROM adsidecar_grants";
    assert_eq!(pair.sql.one(told).await.as_deref(), Some("t"));
    let reads = "adsidecar_store_operation_duration_seconds_count{op=\"get\"}";
    let (here, there) = (pair.a.metric(reads).await, pair.b.metric(reads).await);
    // A request would not ask for a refresh yet.
    pair.a.advance(500);
    eventually("both to read the row", async || {
        (pair.a.metric(reads).await > here && pair.b.metric(reads).await > there).then_some(())
    })
    .await;
    pair.cluster.crash();
    pair.a.advance(900);
    assert_eq!(call(&pair.a, "anna").await.status(), 200, "the first token has expired");
    assert_eq!(pair.b.call("anna").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_takes_note_that_another_one_has_mended_what_failed() {
    let mut pair = Pair::start().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.b.call("anna").await.status(), 200);
    pair.a.sandbox.set_fault(Rule::from(Fault::status(503)).at(Listener::Lwa).always());
    pair.a.advance(3600);
    assert_eq!(code(&pair.b.call("anna").await), "token_unavailable");
    let failing = "adsidecar_users{state=\"failing\"}";
    assert_eq!(pair.b.metric(failing).await, 1.0);
    // A third one makes the refresh, as if it had been its time.
    pair.a.sandbox.clear_faults();
    eventually("the end of all attempts", async || {
        let leased = "SELECT count(*) FROM adsidecar_grants WHERE lease_owner IS NOT NULL";
        (pair.sql.one(leased).await? == "0").then_some(())
    })
    .await;
    pair.sql.run("UPDATE adsidecar_grants SET retry_at = NULL, failure = NULL, attempts = NULL, due_at = NULL").await;
    let third = Replica::beside(&pair.a, &[]).await;
    assert_eq!(third.call("anna").await.status(), 200);
    assert_eq!(pair.row("anna").await, (2, true));
    assert_eq!(pair.b.metric(failing).await, 0.0, "what the row says is newer than what it holds");
    // Nobody calls the one that failed, but its events say what it holds.
    let reads = "adsidecar_store_operation_duration_seconds_count{op=\"get\"}";
    let before = pair.b.metric(reads).await;
    pair.a.advance(120);
    eventually("it to read the row", async || (pair.b.metric(reads).await > before).then_some(())).await;
    pair.cluster.crash();
    assert_eq!(pair.b.call("anna").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_the_previous_version_get_the_feed_at_the_first_start_and_miss_no_login_or_logout() {
    let mut pair = Pair::start().await;
    for user in ["anna", "bob"] {
        pair.a.log_in(user).await;
    }
    pair.a.stop_sidecar().await;
    pair.b.stop().await;
    pair.sql
        .run(
            "ALTER TABLE adsidecar_grants DROP COLUMN news; \
             UPDATE adsidecar_notes SET value = '4' WHERE name = 'migration'",
        )
        .await;
    let (first, second) = tokio::join!(Replica::beside(&pair.a, &[]), Replica::beside(&pair.a, &[]));
    for user in ["anna", "bob"] {
        assert_eq!(first.call(user).await.status(), 200);
        assert_eq!(second.call(user).await.status(), 200);
    }
    assert_eq!(first.post(&format!("{LOGOUT}?user_id=anna")).await.status(), 204);
    eventually("the logout to be obeyed", async || {
        (code(&second.call("anna").await) == "login_required").then_some(())
    })
    .await;
    assert_eq!(second.call("bob").await.status(), 200);
    let migration = "SELECT value FROM adsidecar_notes WHERE name = 'migration'";
    assert_eq!(pair.sql.one(migration).await.as_deref(), Some("7"));
}
