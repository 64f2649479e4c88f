//! Admission: which requests the proxy listener and the admin listener accept.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use world::{Listener, Options};

use crate::harness::{Harness, json};
use crate::raw_http::{Reply, Wire};

/// A request to an Ads path and one to an OAuth endpoint.
const PATHS: [&str; 2] = ["/sandbox/echo", "/api/auth/amazon/status?user_id=default"];

async fn get(harness: &Harness, path: &str, lines: &str) -> Reply {
    harness.send_raw(format!("GET {path} HTTP/1.1\r\n{lines}\r\n")).await
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 1.
async fn requests_for_other_hosts_are_rejected() {
    let harness = Harness::set(&[("proxy.allowed_hosts", "ads.internal")]).await;
    for path in PATHS {
        for host in [
            "evil.test",
            "evil.test:8001",
            "localhost.",
            "127.1",
            "127.0.0.2",
            "0x7f.1",
            "2130706433",
            "[::ffff:127.0.0.1]",
            "[0:0:0:0:0:0:0:1]",
            "::1",
            "0.0.0.0",
            "localhost:80@evil",
            "u@localhost",
            "evil#localhost",
            "localhost/",
            "localhost:",
            "localhost:x",
            "localhost:99999",
            "localhost, evil",
            "ads.internal.evil.test",
            "advertising-api.amazon.com",
            "api.amazon.com",
        ] {
            assert_eq!(
                get(&harness, path, &format!("Host: {host}\r\n")).await.said(),
                (403, "host_not_allowed"),
                "{host}"
            );
        }
    }
    assert!(harness.ads_calls().is_empty());
    for host in [
        "localhost",
        "LOCALHOST:8001",
        "localhost:1",
        "127.0.0.1",
        "127.0.0.1:65535",
        "[::1]",
        "[::1]:80",
        "ADS.internal:9",
    ] {
        for path in PATHS {
            assert_eq!(get(&harness, path, &format!("Host: {host}\r\n")).await.status, 200, "{host}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 79.
async fn a_request_needs_exactly_one_host_and_nothing_after_a_bad_one_is_served() {
    let harness = Harness::set(&[]).await;
    for path in PATHS {
        for lines in
            ["", "Host:\r\n", "Host: localhost\r\nHost: localhost\r\n", "Host: localhost\r\nhost: evil.test\r\n"]
        {
            let mut wire = harness.dial().await;
            wire.send(format!("GET {path} HTTP/1.1\r\n{lines}\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"))
                .await;
            assert_eq!(wire.reply().await.said(), (400, "bad_request"), "{lines}");
            assert!(wire.closes().await, "{lines}");
        }
    }
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 2.
async fn no_web_page_can_use_the_proxy() {
    let harness = Harness::set(&[("login.frontend_url", "https://app.example.com/")]).await;
    let own = format!("http://{}", harness.proxy_address());
    let origins = ["null", "https://evil.test", "http://localhost", "https://app.example.com", own.as_str(), ""];
    for origin in origins {
        for method in ["GET", "POST", "OPTIONS"] {
            let call = format!("{method} /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\n\r\n");
            let answer = harness.send_raw(call).await;
            assert_eq!(answer.said(), (403, "cross_site"), "{origin}");
            assert!(answer.names().iter().all(|name| !name.starts_with("access-control-")), "{answer:?}");
        }
    }
    for site in ["cross-site", "same-site", "same-origin", "none", "x", ""] {
        for mode in ["navigate", "cors", "no-cors", "same-origin", "websocket"] {
            let lines = format!("Host: localhost\r\nSec-Fetch-Site: {site}\r\nSec-Fetch-Mode: {mode}\r\n");
            assert_eq!(get(&harness, "/sandbox/echo", &lines).await.said(), (403, "cross_site"), "{site} {mode}");
        }
    }
    let preflight = "OPTIONS /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.test\r\n\
                     Access-Control-Request-Method: POST\r\nAccess-Control-Request-Private-Network: true\r\n\r\n";
    assert_eq!(harness.send_raw(preflight).await.said(), (403, "cross_site"));
    assert!(harness.ads_calls().is_empty());
    // Node's fetch() sends only Sec-Fetch-Mode.
    for mode in ["cors", "navigate"] {
        let lines = format!("Host: localhost\r\nSec-Fetch-Mode: {mode}\r\n");
        assert_eq!(get(&harness, "/sandbox/echo", &lines).await.status, 200, "{mode}");
    }
    assert_eq!(harness.metric("adsidecar_guard_denied_total{reason=\"cross_site\"}").await, 49.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_frontends_origin_can_fetch_the_oauth_endpoints() {
    let harness = Harness::set(&[("login.frontend_url", "https://app.example.com/")]).await;
    for origin in ["null", "https://evil.test", "https://app.example.com.evil.test", "http://app.example.com"] {
        let answer = get(&harness, PATHS[1], &format!("Host: localhost\r\nOrigin: {origin}\r\n")).await;
        assert_eq!(answer.said(), (403, "cross_site"), "{origin}");
    }
    let lines = "Host: localhost\r\nOrigin: https://app.example.com\r\nSec-Fetch-Site: cross-site\r\n";
    let answer = get(&harness, PATHS[1], lines).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example.com"));
    assert_eq!(answer.header("access-control-allow-private-network"), None);
}

/// A sidecar with two caller tokens, whose user is logged in with the first.
async fn guarded() -> Harness {
    let clock = adsidecar::domain::clock::Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let harness = Harness::built(Options::calm(clock), "", &[("proxy.caller_token", "token-one,token-two")]).await;
    let begun =
        harness.request(reqwest::Method::GET, "/api/auth/amazon/login").header("X-Ads-Sidecar-Token", "token-one");
    let begun = json(begun.send().await.unwrap()).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    // The callback is the only path without a caller token: a browser requests it.
    assert_eq!(harness.get(&callback).await.status(), 200);
    harness.sandbox.clear_history();
    harness
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 4.
async fn without_the_caller_token_only_the_callback_is_served() {
    let harness = guarded().await;
    let basic = BASE64_STANDARD.encode("ads:wrong");
    for line in [
        "GET /v2/profiles",
        "GET /a/x/v2/profiles",
        "GET http://advertising-api.amazon.com/v2/profiles",
        "GET /api/auth/amazon/login",
        "GET /api/auth/amazon/status",
        "POST /api/auth/amazon/refresh",
        "POST /api/auth/amazon/logout",
        "DELETE /api/auth/amazon/users/default",
        "POST /api/auth/amazon/confirm?grant=x",
        "GET /api/auth/nothing",
        "POST /auth/o2/token",
        "POST /auth/o2/token?client_secret=wrong",
    ] {
        for token in [
            String::new(),
            "X-Ads-Sidecar-Token: wrong\r\n".into(),
            "X-Ads-Sidecar-Token: token-on\r\n".into(),
            "X-Ads-Sidecar-Token: token-one,token-two\r\n".into(),
            "Proxy-Authorization: Bearer wrong\r\n".into(),
            "Authorization: token-one\r\n".into(),
            format!("Proxy-Authorization: Basic {basic}\r\n"),
        ] {
            let answer = harness.send_raw(format!("{line} HTTP/1.1\r\nHost: localhost\r\n{token}\r\n")).await;
            assert_eq!(answer.said(), (407, "caller_unauthorized"), "{line} {token}");
            assert_eq!(answer.header("proxy-authenticate"), Some("Bearer"));
        }
    }
    assert!(harness.ads_calls().is_empty());
    let callback = get(&harness, "/api/auth/amazon/callback?code=x&state=y", "Host: localhost\r\n").await;
    assert_eq!(callback.said(), (400, "state_invalid"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_caller_token_is_accepted_in_four_headers_and_never_forwarded() {
    let harness = guarded().await;
    let basic = BASE64_STANDARD.encode("ads:token-two");
    for token in [
        "X-Ads-Sidecar-Token: token-one".to_owned(),
        "Proxy-Authorization: Bearer token-two".into(),
        format!("Proxy-Authorization: Basic {basic}"),
        "Authorization: Bearer token-one".into(),
    ] {
        for path in PATHS {
            assert_eq!(get(&harness, path, &format!("Host: localhost\r\n{token}\r\n")).await.status, 200, "{token}");
        }
        let seen = harness.seen();
        assert!(seen.headers.iter().all(|(_, value)| !value.contains("token-") && !value.contains(&basic)), "{seen:?}");
    }
    let body = "grant_type=refresh_token&client_secret=token-two";
    let shim =
        format!("POST /auth/o2/token HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let answer = harness.send_raw(shim).await;
    assert_eq!((answer.status, &answer.json()["access_token"]), (200, &"token-two".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_probes_are_served_under_any_host() {
    let harness = Harness::set(&[]).await;
    let ask = async |line: &str, headers: &str| {
        let mut wire = Wire::dial(harness.admin_address()).await;
        wire.send(format!("{line} HTTP/1.1\r\n{headers}Content-Length: 0\r\n\r\n")).await;
        wire.reply().await
    };
    for path in ["/livez", "/readyz", "/startupz", "/metrics"] {
        for host in ["Host: 10.1.2.3:9464\r\n", "Host: evil.test\r\n", "Host: localhost\r\n"] {
            assert_eq!(ask(&format!("GET {path}"), host).await.status, 200, "{path} {host}");
            for page in ["Origin: http://localhost\r\n", "Sec-Fetch-Site: none\r\n"] {
                let answer = ask(&format!("GET {path}"), &format!("{host}{page}")).await;
                assert_eq!(answer.said(), (403, "cross_site"), "{path} {host} {page}");
            }
        }
        assert_eq!(ask(&format!("POST {path}"), "Host: evil.test\r\n").await.said(), (403, "host_not_allowed"));
        assert_eq!(ask(&format!("POST {path}"), "Host: localhost\r\n").await.said(), (405, "method_not_allowed"));
    }
    for line in ["PUT /log", "POST /quitquitquit", "GET /", "GET /nothing"] {
        assert_eq!(ask(line, "Host: evil.test\r\n").await.said(), (403, "host_not_allowed"), "{line}");
        let page = ask(line, "Host: localhost\r\nOrigin: http://localhost:9464\r\n").await;
        assert_eq!(page.said(), (403, "cross_site"), "{line}");
    }
    assert_eq!(ask("GET /nothing", "Host: localhost\r\n").await.said(), (404, "not_found"));
    assert_eq!(ask("PUT /log", "Host: localhost\r\n").await.said(), (400, "bad_request"), "an empty level");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "it is still running");
}

#[tokio::test(flavor = "multi_thread")]
async fn admin_operations_need_a_local_caller_or_the_token() {
    let mut harness = Harness::set(&[("proxy.allowed_hosts", "ads.internal")]).await;
    let ask = async |line: &str, headers: &str, body: &str| {
        let mut wire = Wire::dial(harness.admin_address()).await;
        wire.send(format!("{line} HTTP/1.1\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())).await;
        wire.reply().await
    };
    // An allowed Host that is not loopback does not count as local.
    for line in ["PUT /log", "POST /quitquitquit"] {
        assert_eq!(ask(line, "Host: ads.internal\r\n", "info").await.said(), (407, "caller_unauthorized"), "{line}");
    }
    assert_eq!(ask("PUT /log", "Host: localhost\r\n", "loud").await.said(), (400, "bad_request"));
    assert_eq!(ask("PUT /log", "Host: localhost\r\n", "debug").await.status, 200);
    assert_eq!(ask("POST /quitquitquit", "Host: [::1]:9464\r\n", "").await.status, 200);
    harness.ended().await;

    let harness = guarded().await;
    let mut wire = Wire::dial(harness.admin_address()).await;
    wire.send(
        "PUT /log HTTP/1.1\r\nHost: localhost\r\nX-Ads-Sidecar-Token: token-two\r\nContent-Length: 4\r\n\r\ninfo",
    )
    .await;
    assert_eq!(wire.reply().await.status, 200);
    assert_eq!(harness.sandbox.calls(Listener::Na).len(), 0);
}
