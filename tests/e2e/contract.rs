//! What somebody found who held the running product to the contract, line by line: HEAD, Accept, hints, defaults.

use reqwest::Method;

use crate::commands::{beside, run};
use crate::harness::{Harness, code, header, json};
use crate::raw_http::Wire;

const LOGIN: &str = "/api/auth/amazon/login";

/// The head of the response to a HEAD; the connection must serve another request after it, so there was no body.
async fn head_of(wire: &mut Wire, path: &str) -> (u16, Option<String>) {
    wire.send(format!("HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
    let head = wire.reply_head().await;
    wire.send("GET /api/auth/amazon/status?user_id=default HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(wire.reply().await.json()["user_id"], "default", "{path}: nothing follows the head");
    (head.status, head.header("content-type").map(str::to_owned))
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 21.
async fn head_changes_nothing_and_works_on_every_own_endpoint_that_has_get() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    let mut wire = harness.dial().await;
    for path in ["/api/auth/amazon/refresh", "/api/auth/amazon/logout", "/api/auth/amazon/users/default"] {
        assert_eq!(head_of(&mut wire, path).await.0, 405, "{path}");
    }
    let unknown = format!("{LOGIN}?user=anna");
    assert_eq!(head_of(&mut wire, &unknown).await.0, 400, "what GET does not understand, HEAD does not");
    let json_type = Some("application/json".to_owned());
    for path in ["/", "/api/auth/amazon/status", "/api/auth/amazon/accounts?limit=1", LOGIN] {
        assert_eq!(head_of(&mut wire, path).await, (200, json_type.clone()), "{path}");
    }
    let events = head_of(&mut wire, "/api/auth/amazon/events").await;
    assert_eq!(events, (200, Some("text/event-stream".to_owned())));
    let put = harness.request(Method::PUT, "/api/auth/amazon/status").send().await.unwrap();
    assert_eq!((put.status().as_u16(), header(&put, "allow")), (405, "GET, HEAD"));
    assert_eq!(harness.status_of("default").await["state"], "fresh");
    assert!(harness.sandbox.history().is_empty(), "and nothing was sent to Amazon");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 9.
async fn a_scanner_that_asks_for_the_callback_with_head_consumes_no_login() {
    let harness = Harness::with("[login]\nlisten = \"127.0.0.1:0\"\nconfirm = false\n").await;
    let begun = json(harness.get(&format!("{LOGIN}?user_id=anna")).await).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    harness.sandbox.clear_history();
    for url in [harness.proxy_url(&callback), harness.login_listener_url(&callback)] {
        let scanned = harness.client.head(url).header("host", "localhost").send().await.unwrap();
        assert_eq!(scanned.status(), 204);
    }
    assert!(harness.sandbox.history().is_empty(), "the code was not exchanged");
    assert_eq!(harness.get(&callback).await.status(), 200);
    assert_eq!(harness.status_of("anna").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 21.
async fn a_health_check_of_the_sandbox_may_send_head() {
    let harness = Harness::start().await;
    for (path, status) in [("/?x=1", 400), ("/nothing", 404), ("/", 200), ("/ca.pem", 200), ("/history?door=na", 200)] {
        let answer = harness.client.head(format!("{}{path}", harness.sandbox.control_url())).send().await.unwrap();
        assert_eq!(answer.status(), status, "{path}");
        assert!(answer.bytes().await.unwrap().is_empty(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_likes_json_better_gets_json_whatever_it_names_first() {
    let harness = Harness::start().await;
    for (accept, status) in [
        ("text/html;q=0.5, application/json", 200),
        ("text/html;q=0, */*", 200),
        ("application/json, text/html", 200),
        ("application/json;q=0.5, text/html", 302),
        ("*/*;q=0.1, Text/HTML", 302),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", 302),
    ] {
        let answer = harness.request(Method::GET, LOGIN).header("accept", accept).send().await.unwrap();
        assert_eq!(answer.status(), status, "{accept}");
        assert_eq!(answer.headers().contains_key("set-cookie"), status == 302, "{accept}: a cookie is a browser's");
        let refused = harness.request(Method::GET, &format!("{LOGIN}?region=us")).header("accept", accept);
        let kind = refused.send().await.unwrap();
        let page = if status == 302 { "text/html" } else { "application/problem+json" };
        assert!(header(&kind, "content-type").starts_with(page), "{accept}: {kind:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_that_is_missing_because_of_the_region_is_reported_as_that() {
    let account = "[[account]]\nname = \"default\"\nprofile_id = \"1\"\n[[account]]\nname = \"none\"\n";
    let harness = Harness::with(account).await;
    harness.log_in("default").await;
    let hint = async |headers: &[(&str, &str)]| {
        let mut request = harness.request(Method::GET, "/sp/x");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (401, ""), "Amazon's own");
        header(&answer, "x-adsidecar-hint").to_owned()
    };
    assert_eq!(hint(&[("x-ads-region", "eu")]).await, "region_mismatch");
    assert_eq!(hint(&[("x-ads-account", "none")]).await, "scope_missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_names_no_region_is_listed_with_the_one_that_it_gets() {
    let mut harness = Harness::with("[[account]]\nname = \"shop\"\nprofile_id = \"1\"\n").await;
    for region in ["na", "fe"] {
        harness.restart_with("amazon.region", region).await;
        let accounts = json(harness.get("/api/auth/amazon/accounts").await).await;
        assert_eq!(accounts["accounts"][0]["region"], region, "{accounts}");
        let beside = beside(&harness, &["accounts", "list"]).await;
        harness.stop_sidecar().await;
        let alone = run(&harness, &["accounts", "list", "--set", &format!("amazon.region={region}")], "").await;
        for ran in [beside, alone] {
            let line = ran.out.lines().find(|line| line.starts_with("shop")).unwrap_or_default();
            assert!(line.contains(region), "{} {}", ran.out, ran.err);
        }
        harness.start_sidecar().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn check_prints_sizes_and_durations_as_the_manual_writes_them() {
    let harness = Harness::start().await;
    let words = ["check", "--set", "proxy.max_body=1500", "--set", "upstream.connect_timeout=1500ms"];
    let checked = run(&harness, &words, "").await;
    assert_eq!(checked.code, 0, "{}", checked.err);
    for line in [
        "replay_limit = \"256KiB\"",
        "max_waiting_bytes = \"16MiB\"",
        "idle_after = \"7d\"",
        "sweep = \"10m\"",
        "drain = \"25s\"",
        "accept = \"0s\"",
        "max_body = \"1500B\"",
        "connect_timeout = \"1s 500ms\"",
    ] {
        assert!(checked.out.lines().any(|printed| printed == line), "{line} in {}", checked.out);
    }
    // What is printed can be read.
    let read = run(&harness, &["check", "--set", "refresh.idle_after=7d", "--set", "proxy.max_body=1500B"], "").await;
    assert_eq!(read.code, 0, "{}", read.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_reason_for_a_refusal_has_its_series_from_the_start() {
    let harness = Harness::start().await;
    let text = harness.client.get(harness.admin_url("/metrics")).send().await.unwrap().text().await.unwrap();
    for reason in ["caller_token", "cross_site", "framing", "host", "method", "no_host", "peer_uid", "policy", "target"]
    {
        let series = format!("adsidecar_guard_denied_total{{reason=\"{reason}\"}} 0");
        assert!(text.lines().any(|line| line == series), "{series}");
    }
    for cause in ["token", "scope_missing", "scope_not_authorized", "scope_unknown"] {
        let series = format!("adsidecar_upstream_unauthorized_total{{cause=\"{cause}\"}} 0");
        assert!(text.lines().any(|line| line == series), "{series}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_of_our_own_may_be_stored_or_sniffed_however_early_it_comes() {
    let harness = Harness::start().await;
    // Beside it one that is impatient: the others' heads may take their time on a busy machine.
    let impatient = "[proxy]\nlisten = \"127.0.0.1:0\"\nheader_timeout = \"300ms\"\n";
    let impatient = Harness::with(impatient).await;
    let status = "/api/auth/amazon/status";
    for (request, expected) in [
        (format!("GET {status} HTTP/1.1\r\nHost: evil.example\r\n\r\n"), (403, "host_not_allowed")),
        (format!("GET {status} HTTP/1.1\r\n\r\n"), (400, "bad_request")),
        (format!("TRACE {status} HTTP/1.1\r\nHost: localhost\r\n\r\n"), (405, "method_not_allowed")),
        (format!("GET {status} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://x\r\n\r\n"), (403, "cross_site")),
        (format!("GET {status}?x={} HTTP/1.1\r\nHost: localhost\r\n\r\n", "y".repeat(9000)), (414, "uri_too_long")),
        (format!("GET {status}?\" HTTP/1.1\r\nHost: localhost\r\n\r\n"), (400, "bad_request")),
        (format!("GET {status} HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(40_000)), (431, "headers_too_large")),
        (format!("GET {status} HTTP/1.1\r\nHost: local"), (408, "request_timeout")),
    ] {
        let asked = if expected.0 == 408 { &impatient } else { &harness };
        let told = asked.send_raw(&request).await;
        let what = request.get(..60).unwrap_or(&request);
        assert_eq!(told.said(), expected, "{what}");
        for (name, value) in
            [("cache-control", "no-store"), ("referrer-policy", "no-referrer"), ("x-content-type-options", "nosniff")]
        {
            assert_eq!(told.header(name), Some(value), "{what}: {told:?}");
        }
        assert_eq!(told.json()["request_id"], told.header("x-request-id").unwrap(), "{what}");
        assert!(told.header("date").is_some_and(|date| date.ends_with(" GMT")), "{what}: {told:?}");
    }
    let own = harness.get(status).await;
    let admin = harness.client.get(harness.admin_url("/livez")).send().await.unwrap();
    for answer in [own, admin] {
        assert!(header(&answer, "date").ends_with(" GMT") && header(&answer, "x-content-type-options") == "nosniff");
    }
}
