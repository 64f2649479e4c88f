//! The admin listener: access control and responses.

use reqwest::{Method, Response};
use world::{Fault, Listener, Rule};

use crate::harness::{Harness, code, eventually, header};

async fn at_admin(harness: &Harness, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = harness.client.request(method, harness.admin_url(path));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_listener_serves_this_machine_and_no_web_page() {
    let harness = Harness::start().await;
    for path in ["/livez", "/readyz", "/startupz", "/metrics", "/quitquitquit", "/log", "/"] {
        for browser in [("origin", "https://evil.test"), ("origin", "null"), ("sec-fetch-site", "cross-site")] {
            let answer = at_admin(&harness, Method::GET, path, &[browser]).await;
            assert_eq!((answer.status().as_u16(), code(&answer)), (403, "cross_site"), "{path}");
        }
    }
    for (method, path) in [
        (Method::POST, "/quitquitquit"),
        (Method::GET, "/rotate"),
        (Method::POST, "/rotate"),
        (Method::PUT, "/log"),
        (Method::GET, "/"),
        (Method::POST, "/metrics"),
    ] {
        let answer = at_admin(&harness, method, path, &[("host", "evil.test")]).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (403, "host_not_allowed"), "{path}");
    }
    for (method, path, status) in [
        (Method::GET, "/quitquitquit", 405),
        (Method::GET, "/rotate", 200),
        (Method::DELETE, "/rotate", 405),
        (Method::POST, "/rotate", 400),
        (Method::POST, "/rotate?key=00000000", 400),
        (Method::POST, "/livez", 405),
        (Method::GET, "/v2/profiles", 404),
        (Method::GET, "/api/auth/amazon/status", 404),
        (Method::GET, "/metrics/", 404),
    ] {
        assert_eq!(at_admin(&harness, method, path, &[]).await.status(), status, "{path}");
    }
    let level = harness.client.put(harness.admin_url("/log")).body("loud").send().await.unwrap();
    assert_eq!((level.status().as_u16(), code(&level)), (400, "bad_request"));
    assert_eq!(harness.client.put(harness.admin_url("/log")).body("debug").send().await.unwrap().status(), 200);
    assert_eq!(harness.metric("adsidecar_guard_denied_total{reason=\"cross_site\"}").await, 21.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_scrapers_may_use_any_host() {
    let harness = Harness::start().await;
    for path in ["/livez", "/readyz", "/startupz", "/metrics"] {
        let answer = eventually("adsidecar to start", async || {
            let answer = at_admin(&harness, Method::GET, path, &[("host", "10.0.0.7:9464")]).await;
            (answer.status() == 200).then_some(answer)
        })
        .await;
        assert_eq!(answer.headers()["cache-control"], "no-store");
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/plain"));
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 110.
async fn readiness_and_liveness_do_not_depend_on_amazon_or_logins() {
    let mut harness = Harness::start().await;
    let readyz = async |harness: &Harness| at_admin(harness, Method::GET, "/readyz", &[]).await.status().as_u16();
    assert_eq!(readyz(&harness).await, 200, "ready although no user is logged in");
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).always());
    harness.advance(3600);
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 503);
    assert_eq!(harness.status_of("default").await["state"], "failing");
    assert_eq!(readyz(&harness).await, 200, "ready although Amazon is down");

    harness.sandbox.clear_faults();
    harness.advance(60);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let caller = tokio::spawn(harness.request(Method::GET, "/v2/profiles").send());
    gate.reached(1).await;
    let (ready, live) = (harness.admin_url("/readyz"), harness.admin_url("/livez"));
    let stopped = harness.begin_stop();
    let draining = eventually("draining", async || {
        let answer = harness.client.get(&ready).send().await.unwrap();
        (answer.status() == 503).then_some(answer)
    })
    .await;
    assert_eq!((code(&draining), header(&draining, "retry-after")), ("draining", "1"));
    let reload = harness.client.post(ready.replace("/readyz", "/reload")).send().await.unwrap();
    assert_eq!((reload.status().as_u16(), code(&reload)), (503, "draining"), "not the configuration's fault");
    assert_eq!(harness.client.get(&live).send().await.unwrap().status(), 200);
    gate.release();
    assert_eq!(caller.await.unwrap().unwrap().status(), 200, "the request in flight completes");
    stopped.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quit_request_shuts_down_gracefully() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let quit = harness.client.post(harness.admin_url("/quitquitquit")).send().await.unwrap();
    assert_eq!(quit.status(), 200);
    harness.quit().await;
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_reflect_requests_and_refreshes() {
    let harness = Harness::with("[[account]]\nname = \"shop\"\nregion = \"eu\"\n").await;
    let value = async |series: &str| harness.metric(&format!("adsidecar_{series}")).await;
    let noon = "2026-08-01T12:00:00Z".parse::<jiff::Timestamp>().unwrap().as_second() as f64;
    assert_eq!(value(&format!("build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"))).await, 1.0);
    assert_eq!(value("store_up").await, 1.0);
    assert_eq!(value("config_reload_success").await, 1.0);
    assert_eq!(value("config_reload_timestamp_seconds").await, noon);
    assert_eq!(value("users{state=\"fresh\"}").await, 0.0);

    assert_eq!(code(&harness.get("/v2/profiles").await), "login_required");
    let by_us = "requests_total{account=\"shop\",method=\"GET\",region=\"eu\",source=\"sidecar\",status=\"401\"}";
    assert_eq!(value(by_us).await, 1.0);
    assert_eq!(value("upstream_duration_seconds_count{region=\"eu\"}").await, 0.0);

    harness.log_in("default").await;
    assert_eq!(value("token_expiry_timestamp_seconds{user=\"default\"}").await, noon + 3600.0);
    assert_eq!(value("token_last_refresh_timestamp_seconds{user=\"default\"}").await, noon);
    assert_eq!(value("consent_expiry_timestamp_seconds{user=\"default\"}").await, noon + 365.0 * 86400.0);
    assert_eq!(value("users{state=\"fresh\"}").await, 1.0);
    assert_eq!(value("token_refresh_total{reason=\"\",result=\"success\"}").await, 0.0);
    assert!(value("store_operation_duration_seconds_count{op=\"put\"}").await >= 1.0);

    let own = value("request_duration_seconds_count{source=\"sidecar\"}").await;
    for _ in 0..3 {
        assert_eq!(harness.get("/v2/profiles?secret=canary").await.status(), 200);
    }
    let by_amazon = "requests_total{account=\"shop\",method=\"GET\",region=\"eu\",source=\"amazon\",status=\"200\"}";
    assert_eq!(value(by_amazon).await, 3.0);
    assert_eq!(value("request_duration_seconds_count{source=\"amazon\"}").await, 3.0);
    assert_eq!(value("request_duration_seconds_count{source=\"sidecar\"}").await, own);
    assert_eq!(value("upstream_duration_seconds_count{region=\"eu\"}").await, 3.0);
    assert_eq!(value("requests_in_flight").await, 0.0);
    assert!(value("connections{door=\"proxy\"}").await >= 1.0);

    let refused = harness.request(Method::GET, "/v2/profiles").header("host", "evil.test").send().await.unwrap();
    assert_eq!(refused.status(), 403);
    assert_eq!(value("guard_denied_total{reason=\"host\"}").await, 1.0);
    assert_eq!(harness.get("/sandbox/status/207").await.status(), 207);
    assert_eq!(value("unknown_family_total").await, 1.0);

    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa));
    harness.post("/api/auth/amazon/refresh").await;
    assert_eq!(value("token_refresh_total{reason=\"server_error\",result=\"failure\"}").await, 1.0);
    assert_eq!(value("token_refresh_duration_seconds_count").await, 1.0);
    assert_eq!(value("users{state=\"failing\"}").await, 1.0);
    assert_eq!(value("login_required{reason=\"\",user=\"default\"}").await, 0.0);
    assert_eq!(
        value("token_expiry_timestamp_seconds{user=\"default\"}").await,
        noon + 3600.0,
        "the previous token is used"
    );

    let text = harness.client.get(harness.admin_url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(
        text.contains("adsidecar_login_required{reason=\"\",user=\"default\"} 0"),
        "known users have a series from the start"
    );
    for leak in ["canary", "profiles", "Atz", "evil"] {
        assert!(!text.contains(leak), "{leak} must not be a label");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn during_the_drain_each_response_closes_its_connection() {
    let mut harness = Harness::with("[shutdown]\naccept = \"3s\"\n").await;
    harness.log_in("default").await;
    let url = harness.proxy_url("/v2/profiles");
    let before = harness.client.get(&url).send().await.unwrap();
    assert!(!before.headers().contains_key("connection"));
    let ended = harness.begin_stop();
    eventually("a response with Connection: close", async || {
        let answer = harness.client.get(&url).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.headers().get("connection").is_some_and(|value| value == "close").then_some(())
    })
    .await;
    ended.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 21.
async fn head_works_wherever_get_does_and_has_no_body() {
    let harness = Harness::start().await;
    for path in ["/livez", "/readyz", "/startupz", "/metrics", "/log", "/", "/page/users", "/page/script.js"] {
        let head = at_admin(&harness, Method::HEAD, path, &[]).await;
        assert_eq!(head.status(), 200, "{path}");
        assert!(head.bytes().await.unwrap().is_empty(), "{path}");
    }
    let elsewhere = at_admin(&harness, Method::HEAD, "/readyz", &[("host", "10.0.0.7:9464")]).await;
    assert_eq!(elsewhere.status(), 200, "an uptime monitor uses the pod's address");
    assert_eq!(at_admin(&harness, Method::HEAD, "/reload", &[]).await.status(), 405);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 25.
async fn a_load_balancer_finds_the_login_listener_healthy_under_any_host_and_learns_nothing_more() {
    let harness = Harness::with("[login]\nlisten = \"127.0.0.1:0\"\n").await;
    for (method, host) in [(Method::GET, "10.0.0.7"), (Method::HEAD, "10.0.0.7"), (Method::GET, "localhost")] {
        let request = harness.client.request(method.clone(), harness.login_listener_url("/healthz"));
        let answer = request.header("host", host).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{method} {host}");
        assert!(answer.bytes().await.unwrap().is_empty());
    }
    for (method, target, header, status) in [
        (Method::GET, "/healthz?verbose", None, 400),
        (Method::HEAD, "/healthz?user_id=anna", None, 400),
        (Method::GET, "/healthz", Some(("x-ads-user", "anna")), 400),
        (Method::POST, "/healthz", None, 405),
        (Method::DELETE, "/healthz", None, 405),
    ] {
        let mut request = harness.client.request(method.clone(), harness.login_listener_url(target));
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let refused = request.header("host", "10.0.0.7").send().await.unwrap();
        assert_eq!(refused.status(), status, "{method} {target} {header:?}");
        if status == 405 {
            assert_eq!(refused.headers()["allow"], "GET, HEAD");
        }
    }
    let other = harness.client.get(harness.login_listener_url("/readyz")).header("host", "10.0.0.7");
    assert_eq!(other.send().await.unwrap().status(), 403);
    let proxy = harness.get("/healthz").await;
    assert_eq!(code(&proxy), "login_required", "on the proxy listener this path is Amazon's");
}
