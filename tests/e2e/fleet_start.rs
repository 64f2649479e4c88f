//! Starts on a PostgreSQL that many use: what is done before a process is ready grows neither with the table nor with
//! the number of processes that start at once.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use adsidecar::store::keyring::Keyring;
use adsidecar::store::{ConnectionUrl, Settings, TokenStore};

use crate::commands::{Serving, command, run};
use crate::fleet::add_users;
use crate::harness::{Harness, eventually};
use crate::postgres_server::Cluster;
use crate::stores::{open, ring};

/// The process of the server that ran a statement, as its log says.
fn ran_by(log: &str, statement: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains(statement))?;
    Some(line.split_once('[')?.1.split_once(']')?.0.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_ready_before_it_reads_users_and_polls_over_the_connection_that_it_opened() {
    let cluster = Cluster::start_with(&["log_statement=all"]);
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let url = format!("store.postgres_url={}", cluster.url());
    let store = ["--set", "store.kind=postgres", "--set", &url];
    // Creates the tables.
    assert_eq!(run(&harness, &[&["users", "list"], &store[..]].concat(), "").await.code, 0);
    let sql = cluster.connect().await;
    add_users(&sql, 2500).await;
    let third_page = "SELECT user_id FROM adsidecar_grants ORDER BY user_id OFFSET 1999 LIMIT 1";
    let third_page = format!("$1 = '{}'", sql.one(third_page).await.unwrap());

    let path = harness.directory.path().join("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let before = cluster.log().len();
    let file = harness.config_file();
    let mut serve = command(&[&["serve", "--config", file.to_str().unwrap()], &store[..]].concat());
    serve.env("NOTIFY_SOCKET", &path);
    let serving = Serving::spawn(serve).await;
    let mut buffer = [0; 64];
    let told = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..told], b"READY=1");
    assert!(!cluster.log()[before..].contains(&third_page), "no process reads a table of which nobody asks anything");
    let log =
        eventually("a poll", async || Some(cluster.log()[before..].to_owned()).filter(|log| log.contains("head.news")))
            .await;
    let (published, polled) = (ran_by(&log, "INSERT INTO adsidecar_notes"), ran_by(&log, "head.news"));
    assert!(published.is_some() && published == polled, "the connection of the start is the one that serves: {log}");
    drop(serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_beside_others_costs_one_connection_and_five_statements() {
    let cluster = Cluster::start_with(&["log_statement=all", "log_connections=on"]);
    let postgres = Some(ConnectionUrl::parse(&cluster.url()).unwrap());
    let (settings, ring) = (Settings { path: "unused".into(), postgres }, ring(&[&Keyring::generate_key()]));
    // Creates the tables, and notes the key.
    open(&settings, &ring).unwrap().0.close().await.unwrap();
    let before = cluster.log().len();
    let (store, _) = TokenStore::open_to_serve(&settings, ring).await.unwrap();
    let log = cluster.log()[before..].to_owned();
    let count = |text: &str| log.matches(text).count();
    // Which server takes writes, LISTEN, the tables, the notes, and that this process is alive.
    assert_eq!(
        (count("connection authorized"), count("LOG:  statement: "), count("LOG:  execute ")),
        (1, 2, 3),
        "{log}"
    );
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_migrates_the_tables_of_each_earlier_version() {
    let cluster = Cluster::start();
    let postgres = Some(ConnectionUrl::parse(&cluster.url()).unwrap());
    let (settings, ring) = (Settings { path: "unused".into(), postgres }, ring(&[&Keyring::generate_key()]));
    open(&settings, &ring).unwrap().0.close().await.unwrap();
    let sql = cluster.connect().await;
    let note = "SELECT value FROM adsidecar_notes WHERE name = 'migration'";
    let last: u32 = sql.one(note).await.unwrap().parse().unwrap();
    for earlier in 1..last {
        sql.run(&format!("UPDATE adsidecar_notes SET value = '{earlier}' WHERE name = 'migration'")).await;
        let (store, _) = TokenStore::open_to_serve(&settings, ring.clone()).await.unwrap();
        assert_eq!(sql.one(note).await, Some(last.to_string()), "from {earlier}");
        store.close().await.unwrap();
    }
}
