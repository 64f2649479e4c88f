//! Observability and operation: the log, the metrics, the status page, and running as process 1.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use reqwest::{Response, StatusCode};
use world::{Fault, Listener, Rule};

use crate::commands::{BINARY, Serving, command, stopped};
use crate::harness::{FERNET_KEY, Harness, code, eventually, header, json, unused_address};
use crate::raw_http::Wire;

// The log.

/// The number of rejected requests, each of which logs a line at `debug`: more lines than the pipe and the log queue
/// can hold.
const UNREAD_LINES: usize = 6000;

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 106.
async fn an_unread_log_loses_lines_but_no_request() {
    let harness = stopped().await;
    let file = harness.config_file();
    let [proxy, admin] = [unused_address(), unused_address()];
    let listen = [format!("proxy.listen={proxy}"), format!("admin.listen={admin}")];
    let arguments = ["--config", file.to_str().unwrap(), "--set", &listen[0], "--set", &listen[1]];
    // Standard error is a pipe; this test holds its read end without reading.
    let mut child = command(&[&arguments[..], &["--set", "log.level=debug"]].concat()).spawn().unwrap();
    let metrics = format!("http://{admin}/metrics");
    eventually("adsidecar to start", async || harness.client.get(&metrics).send().await.ok()).await;

    let mut wire = Wire::dial(proxy).await;
    for _ in 0..UNREAD_LINES / 50 {
        wire.send("GET /a/nobody/x HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(50)).await;
        for _ in 0..50 {
            assert_eq!(wire.reply().await.said(), (404, "unknown_account"));
        }
    }
    let called = harness.client.get(format!("http://{proxy}/v2/profiles")).send().await.unwrap();
    assert_eq!(called.status(), 200, "requests are still served");
    let text = harness.client.get(&metrics).send().await.unwrap().text().await.unwrap();
    let lost = text.lines().find_map(|line| line.strip_prefix("adsidecar_log_dropped_total{reason=\"sink\"} "));
    assert!(lost.is_some_and(|lost| lost.parse::<f64>().unwrap() > 0.0), "{lost:?}");

    // The shutdown does not wait long for a reader either.
    let sent = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(sent.success());
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
    let ended = tokio::time::timeout(Duration::from_secs(10), ended).await.expect("the process exits");
    assert_eq!(ended.unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_failures_is_sampled_and_the_log_reports_the_omission() {
    let harness = stopped().await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Na).always());
    let serving = Serving::start(&harness, &[]).await;
    for _ in 0..60 {
        assert_eq!(harness.client.get(serving.url("/v2/profiles")).send().await.unwrap().status(), 500);
    }
    let told = serving.says("log lines were dropped").await;
    assert!(told.contains("flood=40"), "{told}");
    let log = serving.log.lock().unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("request failed")).count(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_of_every_listener_carries_the_callers_request_id_or_a_new_one() {
    let login_listener = "[login]\nlisten = \"127.0.0.1:0\"\nfrontend_url = \"http://localhost:3000/app\"";
    let harness = Harness::with(login_listener).await;
    harness.sandbox.set_fault(Rule::from(Fault::status(503)).at(Listener::Na).always());
    let callback = "/api/auth/amazon/callback?error=access_denied&state=x";
    let mut made = std::collections::BTreeSet::new();
    for (url, status) in [
        (harness.proxy_url("/api/auth/amazon/status"), 200),
        (harness.proxy_url("/api/auth/amazon/nothing"), 404),
        (harness.proxy_url("/a/nobody/x"), 404),
        (harness.proxy_url("/v2/profiles"), 401),
        (harness.login_listener_url(callback), 302),
        (harness.login_listener_url("/v2/profiles"), 404),
        (harness.admin_url("/livez"), 200),
        (harness.admin_url("/nothing"), 404),
    ] {
        let named = harness.client.get(&url).header("x-request-id", "mine-7").send().await.unwrap();
        assert_eq!((named.status().as_u16(), header(&named, "x-request-id")), (status, "mine-7"), "{url}");
        let unnamed = harness.client.get(&url).send().await.unwrap();
        let id = header(&unnamed, "x-request-id");
        assert!(!id.is_empty(), "{url}");
        assert!(made.insert(id.to_owned()), "{url}: {id} named another call");
    }
    let begun = json(harness.get("/api/auth/amazon/login").await).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    let ended = harness.client.get(harness.login_listener_url(&callback)).send().await.unwrap();
    let (_, grant) = header(&ended, "location").split_once("grant=").unwrap();
    assert_eq!(harness.post(&format!("/api/auth/amazon/confirm?grant={grant}")).await.status(), 200);
    let amazons = harness.request(reqwest::Method::GET, "/v2/profiles").header("x-request-id", "mine-7").send().await;
    let amazons = amazons.unwrap();
    assert_eq!((amazons.status().as_u16(), code(&amazons), header(&amazons, "x-request-id")), (503, "", "mine-7"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_one_line_with_our_request_id_and_amazons() {
    let harness = stopped().await;
    let serving = Serving::start(&harness, &[]).await;
    let busy =
        Fault::Status { code: 503, headers: vec![("x-amzn-requestid".into(), "amzn-9".into())], body: "".into() };
    harness.sandbox.set_fault(Rule::from(busy).at(Listener::Na).next(1));
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let call = harness.client.get(serving.url("/v2/profiles?secret=canary"));
    let answer = call.header("x-request-id", "mine-7").header("traceparent", trace).send().await.unwrap();
    assert_eq!(header(&answer, "x-request-id"), "mine-7");
    let line = serving.says("request failed").await;
    for field in ["request_id=\"mine-7\"", "amazon_request_id=\"amzn-9\"", "status=503", "source=\"amazon\""] {
        assert!(line.contains(field), "{field} is missing from {line}");
    }
    let seen = harness.seen();
    let sent = |name: &str| seen.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    assert_eq!(sent("traceparent"), Some(trace));
    assert_eq!(sent("x-request-id"), Some("mine-7"));

    harness.sandbox.set_fault(Rule::from(Fault::Reset).at(Listener::Na).always());
    let broken = harness.client.get(serving.url("/v2/profiles")).send().await.unwrap();
    assert_eq!(code(&broken), "upstream_reset");
    let line = serving.says("status=502").await;
    let ours = format!("request_id=\"{}\"", header(&broken, "x-request-id"));
    assert!(line.contains(&ours) && line.contains("source=\"sidecar\" error=\""), "{line}");
    assert!(!serving.log.lock().unwrap().contains("canary"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_level_follows_the_configuration_without_a_restart() {
    let harness = stopped().await;
    let serving = Serving::start(&harness, &[]).await;
    let level = format!("http://{}/log", serving.admin);
    let text = fs::read_to_string(harness.config_file()).unwrap();
    fs::write(harness.config_file(), format!("{text}\n[log]\nlevel = \"debug\"\n")).unwrap();
    serving.signal("HUP");
    eventually("the new log level", async || {
        (harness.client.get(&level).send().await.unwrap().text().await.unwrap() == "debug").then_some(())
    })
    .await;
    fs::write(harness.config_file(), format!("{text}\n[log]\nlevel = \"loud\"\n")).unwrap();
    serving.signal("HUP");
    serving.says("the reload was refused").await;
    serving.says("log.level").await;
    assert_eq!(harness.client.get(&level).send().await.unwrap().text().await.unwrap(), "debug");
}

// The metrics.

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 109.
async fn a_flood_of_scrapes_is_served_without_slowing_requests() {
    let harness = Harness::set(&[]).await;
    let (metrics, call) = (harness.admin_url("/metrics"), harness.proxy_url("/v2/profiles"));
    let mut storm = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (client, metrics) = (harness.client.clone(), metrics.clone());
        storm.spawn(async move {
            for _ in 0..20 {
                let scraped = client.get(&metrics).send().await.unwrap();
                assert_eq!(scraped.status(), 200);
                assert!(scraped.text().await.unwrap().contains("adsidecar_store_up 1"));
            }
        });
    }
    for _ in 0..50 {
        assert_eq!(harness.client.get(&call).send().await.unwrap().status(), 200);
    }
    while let Some(scraper) = storm.join_next().await {
        scraper.unwrap();
    }
    eventually("a page rendered after the flood", async || {
        let calls = harness.metric(
            "adsidecar_requests_total{account=\"\",method=\"GET\",region=\"na\",source=\"amazon\",status=\"200\"}",
        );
        (calls.await == 50.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 110.
async fn a_broken_store_makes_it_unready_but_still_live() {
    let harness = Harness::set(&[]).await;
    let probe = async |path: &str| harness.client.get(harness.admin_url(path)).send().await.unwrap().status();
    // A directory occupies the path of the user's mirror record, so no record of this user can be written.
    let copies = fs::read_dir(harness.directory.path().join("store.copies")).unwrap();
    let copy = copies.map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some_and(|e| e == "json"));
    let copy = copy.unwrap();
    fs::remove_file(&copy).unwrap();
    fs::create_dir(&copy).unwrap();
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200, "the new token is used from memory");
    assert_eq!((probe("/readyz").await, probe("/livez").await), (StatusCode::SERVICE_UNAVAILABLE, StatusCode::OK));
    assert_eq!(harness.metric("adsidecar_store_up").await, 0.0);
    assert!(harness.metric("adsidecar_store_errors_total{op=\"put\"}").await >= 1.0);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    fs::remove_dir(&copy).unwrap();
    eventually("readiness without intervention", async || (probe("/readyz").await == 200).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_429_from_amazon_is_counted_as_amazons() {
    let harness = Harness::set(&[]).await;
    let series = |region: &str| format!("adsidecar_throttled_total{{by=\"amazon\",region=\"{region}\"}}");
    let text = harness.client.get(harness.admin_url("/metrics")).send().await.unwrap().text().await.unwrap();
    for region in ["na", "eu", "fe"] {
        assert!(
            text.contains(&format!("{} 0", series(region))),
            "present from the start, so that an increase is visible: {region}"
        );
    }
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(3))).at(Listener::Na).next(2));
    for _ in 0..2 {
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), header(&answer, "retry-after"), code(&answer)), (429, "3", ""));
    }
    assert_eq!(harness.metric(&series("na")).await, 2.0);
    assert_eq!(harness.metric(&series("eu")).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undecryptable_grant_is_counted_until_it_is_replaced() {
    let mut harness = Harness::start().await;
    for user in ["anna", "bert"] {
        harness.log_in(user).await;
    }
    harness.stop_sidecar().await;
    // Sealed by the second of two keys, which is then removed.
    let keys = format!("{},{FERNET_KEY}", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
    harness.sets.push(("store.fernet_keys".into(), keys));
    harness.start_sidecar().await;
    harness.log_in("carl").await;
    harness.stop_sidecar().await;
    harness.sets[0].1 = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".into();
    harness.start_sidecar().await;
    let undecryptable = async |harness: &Harness| harness.metric("adsidecar_undecryptable_records").await;
    assert_eq!(undecryptable(&harness).await, 2.0);
    harness.log_in("anna").await;
    assert_eq!(undecryptable(&harness).await, 1.0, "a new login has replaced it");
    assert_eq!(harness.post("/api/auth/amazon/logout?user_id=bert").await.status(), 204);
    assert_eq!(undecryptable(&harness).await, 0.0, "an operator has deleted it");
}

// The status page.

async fn page(harness: &Harness, headers: &[(&str, &str)]) -> Response {
    let request = harness.client.get(harness.admin_url("/"));
    headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_is_served_to_local_browsers_only() {
    let harness = Harness::start().await;
    for (headers, refused) in [
        (&[("host", "evil.test")][..], (403, "host_not_allowed")),
        (&[("origin", "http://localhost:9464")], (403, "cross_site")),
        (&[("sec-fetch-site", "cross-site")], (403, "cross_site")),
        (&[("sec-fetch-site", "same-site")], (403, "cross_site")),
    ] {
        let answer = page(&harness, headers).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), refused, "{headers:?}");
    }
    let posted = harness.client.post(harness.admin_url("/")).send().await.unwrap();
    assert_eq!((posted.status().as_u16(), header(&posted, "allow")), (405, "GET, HEAD"));
    // A browser whose user typed the address, and one that reloads.
    for site in ["none", "same-origin"] {
        assert_eq!(page(&harness, &[("sec-fetch-site", site), ("accept", "text/html")]).await.status(), 200, "{site}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_status_page_needs_the_caller_token_and_accepts_its_public_host() {
    let sets = [("proxy.caller_token", "open-sesame"), ("admin.public_url", "https://ads.example/status/")];
    let mut harness = Harness::start().await;
    let host = ("host", "ads.example");
    assert_eq!(code(&page(&harness, &[host]).await), "host_not_allowed");
    for (key, value) in sets {
        harness.restart_with(key, value).await;
    }
    assert_eq!(
        code(&page(&harness, &[host]).await),
        "caller_unauthorized",
        "behind a proxy, every client has the proxy's address"
    );
    assert_eq!(
        code(&page(&harness, &[("host", "other.example"), ("x-ads-sidecar-token", "open-sesame")]).await),
        "host_not_allowed"
    );
    let shown = page(&harness, &[host, ("x-ads-sidecar-token", "open-sesame")]).await;
    assert_eq!(shown.status(), 200);
    let text = shown.text().await.unwrap();
    assert!(text.contains("href=\"https://ads.example/status/\""), "{text}");
    assert!(text.contains("which a browser cannot send") && !text.contains("/login?"), "{text}");
    assert!(!text.contains("open-sesame"));
    assert_eq!(page(&harness, &[]).await.status(), 200, "on this machine no token is needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_shows_users_and_login_links_and_runs_no_inline_script() {
    let harness = Harness::start().await;
    let empty = page(&harness, &[]).await.text().await.unwrap();
    // At the origin of the redirect URI, to which a login's cookie belongs.
    let link = |user: &str| format!("href=\"http://localhost:8001/api/auth/amazon/login?user_id={user}\"");
    assert!(empty.contains("Nobody has logged in yet") && empty.contains(&link("default")), "{empty}");

    harness.log_in("a|nna").await;
    harness.log_in("zoe").await;
    harness.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa));
    harness.post("/api/auth/amazon/refresh?user_id=zoe").await;
    let answer = page(&harness, &[]).await;
    assert_eq!(header(&answer, "content-type"), "text/html; charset=utf-8");
    assert_eq!(header(&answer, "cache-control"), "no-store");
    // With `no-referrer` browsers would send the forms of the page with `Origin: null`.
    assert_eq!(header(&answer, "referrer-policy"), "same-origin");
    assert_eq!(header(&answer, "x-content-type-options"), "nosniff");
    let policy = header(&answer, "content-security-policy").to_owned();
    assert!(policy.starts_with("default-src 'none'; ") && policy.contains("frame-ancestors 'none'"), "{policy}");
    let text = answer.text().await.unwrap();
    assert!(
        text.find("One user has to log in again.").unwrap() < text.find("a|nna").unwrap(),
        "what needs a person is first"
    );
    assert!(
        text.contains("prefers-color-scheme:dark") && text.contains("width=device-width, initial-scale=1"),
        "{text}"
    );
    for shown in
        ["a|nna", "fresh", "in 60 min", "2026-08-01 13:00:00 UTC", "in 365 d", "login_required", "invalid_grant"]
    {
        assert!(text.contains(shown), "{shown} is missing from {text}");
    }
    assert!(text.contains(&link("a%7Cnna")) && text.contains(&link("zoe")), "{text}");
    assert!(text.find("zoe").unwrap() < text.find("a|nna").unwrap(), "users that need a login are listed first");
    assert!(policy.contains("script-src 'self'; ") && !policy.contains("unsafe"), "{policy}");
    for never in ["Atza|", "Atzr|", "<script>", "javascript:", " style=", " onclick="] {
        assert!(!text.contains(never), "{never}");
    }
    assert_eq!(text.matches("<script").count(), 1, "{text}");
    assert!(text.contains("<script src=\"/page/script.js\" defer></script>"), "{text}");
}

// Process 1 of a container.

/// The program as the first process of a PID namespace, like a container's entry point.
fn as_process_1(harness: &Harness) -> Command {
    let arguments = ["--pid", "--fork", "--kill-child", &BINARY, "--config"];
    let mut unshare = Command::new("unshare");
    unshare.args(arguments).arg(harness.config_file());
    unshare.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    unshare
}

async fn serving_as_process_1(harness: &Harness) -> (Serving, u32) {
    let serving = Serving::spawn(as_process_1(harness)).await;
    let child = children(serving.child.id()).first().copied().expect("unshare has one child");
    (serving, child)
}

fn children(process: u32) -> Vec<u32> {
    let mut text = String::new();
    let path = format!("/proc/{process}/task");
    for task in fs::read_dir(path).unwrap() {
        let mut file = fs::File::open(task.unwrap().path().join("children")).unwrap();
        file.read_to_string(&mut text).unwrap();
    }
    text.split_whitespace().map(|process| process.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn as_process_1_it_handles_signals_and_reaps_zombies() {
    let harness = stopped().await;
    let (mut serving, process) = serving_as_process_1(&harness).await;
    // Its parent exits immediately, so process 1 inherits it.
    let mut orphan = Command::new("nsenter");
    orphan.args(["--target", &process.to_string(), "--pid", "sh", "-c", "(sleep 0.2; exit 3) & exit 0"]);
    assert!(orphan.status().unwrap().success());
    assert_eq!(children(process).len(), 1, "process 1 has inherited a child");
    eventually("the child to be reaped", async || children(process).is_empty().then_some(())).await;
    assert_eq!(harness.client.get(serving.url("/v2/profiles")).send().await.unwrap().status(), 200);

    assert!(Command::new("kill").arg(process.to_string()).status().unwrap().success());
    let (code, took) = serving.ended().await;
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wait_command_as_process_1_stops_on_a_signal() {
    let harness = stopped().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    // Nothing responds at this address.
    let admin = format!("admin.listen={}", listener.local_addr().unwrap());
    let mut waiting = as_process_1(&harness).args(["--set", &admin, "wait", "--timeout", "1h"]).spawn().unwrap();
    let outer = waiting.id();
    let asked = tokio::task::spawn_blocking(move || listener.accept().unwrap());
    let _connection = tokio::time::timeout(Duration::from_secs(10), asked).await.expect("it connects").unwrap();
    let process = children(outer).first().copied().expect("unshare has one child");
    assert!(Command::new("kill").arg(process.to_string()).status().unwrap().success());
    let ended = tokio::task::spawn_blocking(move || waiting.wait().unwrap());
    let ended = tokio::time::timeout(Duration::from_secs(10), ended).await.expect("the process exits").unwrap();
    assert_eq!(ended.code(), Some(1));
}
