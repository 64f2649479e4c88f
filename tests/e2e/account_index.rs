//! Found accounts beside many others: nothing reads those that nobody asks for, two processes give no slug to two users,
//! and an index that is lost or that the previous version did not write is made again.

use std::collections::BTreeSet;

use adsidecar::domain::clock::Clock;
use serde_json::Value;
use world::Listener;

use crate::harness::{Harness, code, eventually, json};
use crate::postgres::{Pair, Replica};
use crate::postgres_server::{Cluster, Sql};

const ACCOUNTS: &str = "/api/auth/amazon/accounts";
const SYNC: &str = "/api/auth/amazon/accounts/sync";

async fn pair() -> Pair {
    let cluster = Cluster::start();
    let url = cluster.url();
    Pair::over(cluster, &url, "", Clock::system()).await
}

async fn page(replica: &Replica, query: &str) -> Value {
    let answer = replica.get(&format!("{ACCOUNTS}?{query}")).await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    json(answer).await
}

/// Calls a replica with an account, and returns our own error code; empty if Amazon was called.
async fn call(replica: &Replica, slug: &str) -> String {
    let url = format!("http://{}/sd/campaigns", replica.proxy);
    code(&replica.client.get(url).header("x-ads-account", slug).send().await.unwrap()).to_owned()
}

fn slugs(page: &Value) -> Vec<String> {
    let accounts = page["accounts"].as_array().unwrap().iter();
    accounts.map(|account| account["slug"].as_str().unwrap().to_owned()).collect()
}

/// Accounts of as many users, that no process has to open.
async fn add_accounts(sql: &Sql, count: u32) {
    sql.run(&format!(
        "INSERT INTO adsidecar_accounts (user_id, sealed, changed_at, indexed_at, search_at) \
         SELECT 'bulk-' || n, repeat(md5(n::text), 40), now(), now(), now() + interval '1 day' \
         FROM generate_series(1, {count}) AS n; \
         INSERT INTO adsidecar_slugs (slug, user_id, name, country, kind) \
         SELECT 'zz-bulk-' || n || '-de', 'bulk-' || n, 'bulk ' || n, 'DE', 'seller' FROM generate_series(1, {count}) AS n; \
         ANALYZE"
    ))
    .await;
}

/// The number of rows that the server has read from the tables of accounts.
async fn rows_read(sql: &Sql) -> i64 {
    sql.run("SELECT pg_stat_force_next_flush()").await;
    let read = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_user_tables \
                WHERE relname IN ('adsidecar_accounts', 'adsidecar_slugs')";
    sql.one(read).await.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_is_found_by_its_slug_beside_twenty_thousand_that_nobody_reads() {
    let pair = pair().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.a.post(&format!("{SYNC}?user_id=anna")).await.status(), 200);
    add_accounts(&pair.sql, 20_000).await;
    let before = rows_read(&pair.sql).await;
    let third = Replica::beside(&pair.a, &[]).await;
    for _ in 0..20 {
        assert_eq!(call(&third, "meadow-tools-de").await, "");
        assert_eq!(call(&third, "no-such-shop").await, "unknown_account");
    }
    let listed = page(&third, "user_id=anna").await;
    assert_eq!(listed["total"], 7);
    let read = rows_read(&pair.sql).await - before;
    // A page of 20 users whose search may be due, and 201 slugs to see that there are too many for the metrics.
    assert!(read < 2_000, "{read} rows");
    let first = page(&third, "limit=3").await;
    assert_eq!(first["total"], 20_007);
    let next = page(&third, &format!("limit=3&after={}", first["next"].as_str().unwrap())).await;
    assert!(slugs(&next)[0] > slugs(&first)[2], "{first} {next}");
    // One more that can be read, and two that cannot, which end the page but not the list.
    let third_page = page(&third, &format!("limit=3&after={}", next["next"].as_str().unwrap())).await;
    assert_eq!(slugs(&third_page).len(), 1);
    assert_eq!(third_page["next"], "zz-bulk-10-de");
    assert_eq!(page(&third, "name=MEADOW&country=de&type=seller").await["total"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_give_no_slug_to_two_users_and_a_logout_at_one_is_heard_at_the_other() {
    let pair = pair().await;
    for user in ["anna", "bob", "carl", "dora"] {
        pair.a.log_in(user).await;
    }
    // The same accounts at Amazon, searched for at the same moment.
    let sync = |user: &str| format!("{SYNC}?user_id={user}");
    let (anna, bob, carl, dora) = (sync("anna"), sync("bob"), sync("carl"), sync("dora"));
    let answers = tokio::join!(pair.a.post(&anna), pair.b.post(&bob), pair.a.post(&carl), pair.b.post(&dora));
    for answer in [answers.0, answers.1, answers.2, answers.3] {
        assert_eq!(answer.status(), 200, "{answer:?}");
    }
    let all = page(&pair.b, "limit=500").await;
    let unique: BTreeSet<_> = slugs(&all).into_iter().collect();
    assert_eq!((unique.len(), &all["total"]), (28, &Value::from(28)), "{unique:?}");
    let of_bob = slugs(&page(&pair.b, "user_id=bob").await).remove(0);
    assert_eq!(call(&pair.b, &of_bob).await, "");
    assert_eq!(pair.a.post("/api/auth/amazon/logout?user_id=bob").await.status(), 204);
    eventually("the logout to be heard", async || (call(&pair.b, &of_bob).await == "unknown_account").then_some(()))
        .await;
    assert_eq!(page(&pair.b, "").await["total"], 21);
    assert_eq!(pair.sql.one("SELECT count(*) FROM adsidecar_slugs WHERE user_id = 'bob'").await.as_deref(), Some("0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_process_finds_later_replaces_what_is_in_memory() {
    let pair = pair().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.a.post(&format!("{SYNC}?user_id=anna")).await.status(), 200);
    assert_eq!(call(&pair.b, "meadow-tools-de").await, "");
    pair.a.sandbox.world(|world| world.catalogue.profiles.retain(|one| one.region != Listener::Eu));
    assert_eq!(pair.a.post(&format!("{SYNC}?user_id=anna")).await.status(), 200);
    eventually("the account to be missing", async || {
        let listed = page(&pair.b, "user_id=anna&country=DE").await;
        listed["accounts"][0]["missing_since"].is_string().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_that_the_previous_version_stored_are_listed_in_the_index() {
    let pair = pair().await;
    pair.a.log_in("anna").await;
    assert_eq!(pair.a.post(&format!("{SYNC}?user_id=anna")).await.status(), 200);
    // What the previous version's statement leaves.
    pair.sql
        .run("DELETE FROM adsidecar_slugs; UPDATE adsidecar_accounts SET sealed = sealed, changed_at = clock_timestamp()")
        .await;
    let third = Replica::beside(&pair.a, &[]).await;
    eventually("the slug to be known", async || call(&third, "meadow-tools-de").await.is_empty().then_some(())).await;
    let stored = "SELECT count(*) FROM adsidecar_accounts WHERE indexed_at = changed_at";
    assert_eq!(pair.sql.one(stored).await.as_deref(), Some("1"));
    // A list that no key opens is left to the next search, and blocks nothing.
    pair.sql
        .run("UPDATE adsidecar_accounts SET sealed = 'nothing', changed_at = clock_timestamp(); DELETE FROM adsidecar_slugs")
        .await;
    let fourth = Replica::beside(&pair.a, &[]).await;
    eventually("the list to be given up", async || (pair.sql.one(stored).await? == "1").then_some(())).await;
    assert_eq!(call(&fourth, "meadow-tools-de").await, "unknown_account");
    assert_eq!(fourth.post(&format!("{SYNC}?user_id=anna")).await.status(), 200);
    assert_eq!(call(&fourth, "meadow-tools-de").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_whose_user_was_given_in_the_database_are_not_used() {
    let pair = pair().await;
    for user in ["anna", "bob"] {
        pair.a.log_in(user).await;
        assert_eq!(pair.a.post(&format!("{SYNC}?user_id={user}")).await.status(), 200);
    }
    let of_bob = slugs(&page(&pair.b, "user_id=bob").await).remove(0);
    // Somebody who can write to the database gives anna's accounts to bob.
    pair.sql
        .run(
            "UPDATE adsidecar_accounts SET changed_at = clock_timestamp(), indexed_at = NULL, \
             sealed = (SELECT sealed FROM adsidecar_accounts WHERE user_id = 'anna') WHERE user_id = 'bob'",
        )
        .await;
    eventually("the change to be heard", async || (call(&pair.b, &of_bob).await == "unknown_account").then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_lost_is_made_from_the_stored_accounts() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("anna").await;
    assert_eq!(harness.post(&format!("{SYNC}?user_id=anna")).await.status(), 200);
    harness.stop_sidecar().await;
    std::fs::remove_dir_all(harness.store_path()).unwrap();
    harness.start_sidecar().await;
    let call = async |slug: &str| {
        let request = harness.request(reqwest::Method::GET, "/sd/campaigns").header("x-ads-account", slug);
        code(&request.send().await.unwrap()).to_owned()
    };
    eventually("the slug to be known", async || call("meadow-tools-de").await.is_empty().then_some(())).await;
    assert_eq!(json(harness.get(ACCOUNTS).await).await["total"], 7);
    assert_eq!(call("no-such-shop").await, "unknown_account");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slug_that_the_configuration_takes_as_a_name_gives_way() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    assert_eq!(harness.post(SYNC).await.status(), 200);
    harness.stop_sidecar().await;
    harness.add_configuration("[[account]]\nname = \"meadow-tools-de\"\nprofile_id = \"1\"\nregion = \"na\"\n");
    harness.start_sidecar().await;
    let found = eventually("another slug", async || {
        let page = json(harness.get(&format!("{ACCOUNTS}?country=DE")).await).await;
        let found = page["accounts"].as_array()?.iter().find(|one| one["source"] == "amazon")?.clone();
        (found["slug"] != "meadow-tools-de").then_some(found)
    })
    .await;
    let slug = found["slug"].as_str().unwrap();
    let request = harness.request(reqwest::Method::GET, "/sd/campaigns").header("x-ads-account", slug);
    assert_eq!(code(&request.send().await.unwrap()), "");
    assert_eq!(harness.seen().listener, Listener::Eu);
}
