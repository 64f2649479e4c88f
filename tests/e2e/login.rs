//! The OAuth endpoints: from `login` through a proxied request to `logout`, and every rejection in between.

use std::collections::HashSet;

use reqwest::header::{HeaderMap, LOCATION};
use reqwest::{Method, Response};
use serde_json::Value;
use url::Url;
use world::{CLIENT_ID, Fault, Listener, RETURN_URL, Rule, SCOPE};

use crate::harness::{Harness, code, header, json};

const FRONTEND: &str = "[login]\nfrontend_url = \"https://app.example.com/connected?tab=ads\"\n";
const ORIGIN: &str = "https://app.example.com";
const LOGIN: &str = "/api/auth/amazon/login";
const STATUS: &str = "/api/auth/amazon/status";
/// Input that a page must never echo.
const SCRIPTS: [&str; 3] = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "javascript:alert(1)"];

fn location(answer: &Response) -> Url {
    header(answer, "location").parse().unwrap()
}

fn parameter(url: &Url, name: &str) -> Option<String> {
    url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

#[track_caller]
fn is_private(answer: &Response) {
    let url = answer.url();
    assert_eq!(header(answer, "cache-control"), "no-store", "{url}");
    assert_eq!(header(answer, "referrer-policy"), "no-referrer", "{url}");
    assert_eq!(header(answer, "x-content-type-options"), "nosniff", "{url}");
}

#[track_caller]
fn refused(answer: &Response, status: u16, name: &str) {
    assert_eq!((answer.status().as_u16(), code(answer)), (status, name), "{}", answer.url());
    is_private(answer);
}

/// Starts a login as a server does, and consents. Returns the callback's path and query.
async fn callback_of(harness: &Harness, user: &str) -> String {
    let begun = json(harness.get(&format!("{LOGIN}?user_id={user}")).await).await;
    harness.consent(begun["auth_url"].as_str().unwrap()).await
}

/// Starts a login as a browser does, and consents. Returns the callback and the cookie.
async fn browsed(harness: &Harness, user: &str) -> (String, String) {
    let begun =
        harness.request(Method::GET, &format!("{LOGIN}?user_id={user}")).header("accept", "text/html,*/*;q=0.8");
    let begun = begun.send().await.unwrap();
    assert_eq!(begun.status(), 302);
    let cookie = header(&begun, "set-cookie").split(';').next().unwrap().to_owned();
    (harness.consent(header(&begun, "location")).await, cookie)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_under_local_paths_are_never_forwarded() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for path in [
        "/api/auth",
        "/api/auth/",
        "/api/auth/amazon",
        "/api/auth/amazon/login/",
        "/api/auth/amazon/tokens?user_id=default",
        "/api/auth/google/login",
        "/auth/o2",
        "/auth/o2/tokeninfo",
        "/auth/o2/token/x",
        "/auth/o2/create/codepair",
    ] {
        for method in [Method::GET, Method::POST, Method::DELETE] {
            refused(&harness.request(method, path).send().await.unwrap(), 404, "not_found");
        }
    }
    for (path, allowed) in [
        ("login", "GET, HEAD"),
        ("callback", "GET, HEAD"),
        ("status", "GET, HEAD"),
        ("refresh", "POST"),
        ("logout", "POST"),
        ("confirm", "POST"),
        ("users/default", "DELETE"),
    ] {
        for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
            if !allowed.starts_with(method.as_str()) {
                let answer = harness.request(method, &format!("/api/auth/amazon/{path}")).send().await.unwrap();
                refused(&answer, 405, "method_not_allowed");
                assert_eq!(header(&answer, "allow"), allowed);
            }
        }
    }
    let shim = harness.get("/auth/o2/token").await;
    refused(&shim, 405, "method_not_allowed");
    assert_eq!(header(&shim, "allow"), "POST");
    for host in ["advertising-api.amazon.com", "api.amazon.com"] {
        let request =
            format!("GET http://{host}/api/auth/amazon/status HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let answer = harness.raw(request.as_bytes(), None).await;
        assert!(answer.starts_with(b"HTTP/1.1 404 "), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(harness.sandbox.history().len(), 0, "no request reached Amazon");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_parameter_is_rejected() {
    let harness = Harness::with(FRONTEND).await;
    let long = "x".repeat(129);
    for user in ["", "a b", "..", ".", "a/b", "<script>", "é", "a\0b", long.as_str()] {
        let user = encoded(user);
        for (method, path) in [
            (Method::GET, format!("{LOGIN}?user_id={user}")),
            (Method::GET, format!("{STATUS}?user_id={user}")),
            (Method::POST, format!("/api/auth/amazon/refresh?user_id={user}")),
            (Method::POST, format!("/api/auth/amazon/logout?user_id={user}")),
        ] {
            let answer = harness.request(method, &path).send().await.unwrap();
            refused(&answer, 400, "bad_request");
            assert!(!answer.text().await.unwrap().contains("script"));
        }
    }
    for query in [
        "login?user_id=a&user_id=b",
        "login?region=na&region=eu",
        "login?region=us",
        "login?redirect=maybe",
        "login?replace=2",
        "callback?code=a&code=b&state=c",
        "callback?code=a&state=b&state=c",
        "status?limit=0",
        "status?limit=x",
        "status?limit=1001",
        "status?user_id=a&user_id=a",
    ] {
        refused(&harness.get(&format!("/api/auth/amazon/{query}")).await, 400, "bad_request");
    }
    refused(&harness.post("/api/auth/amazon/confirm").await, 400, "bad_request");
    refused(&harness.request(Method::DELETE, "/api/auth/amazon/users/a%20b").send().await.unwrap(), 400, "bad_request");
    assert_eq!(harness.sandbox.history().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn return_to_leads_only_to_the_frontend() {
    let harness = Harness::with(FRONTEND).await;
    for attack in [
        "//evil.test",
        "///evil.test",
        "/\\evil.test",
        "\\\\evil.test",
        "/\t/evil.test",
        "/\n/evil.test",
        "https://evil.test/",
        "https:evil.test",
        "http://app.example.com/",
        "javascript:alert(1)",
        "data:text/html,x",
        "evil.test",
        "@evil.test/",
        ".evil.test",
        "",
        "?x",
    ] {
        let answer = harness.get(&format!("{LOGIN}?return_to={}", encoded(attack))).await;
        refused(&answer, 400, "bad_request");
    }
    let alone = Harness::start().await;
    refused(&alone.get(&format!("{LOGIN}?return_to=/done")).await, 400, "bad_request");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 83.
async fn a_malformed_callback_is_rejected_without_side_effects() {
    let harness = Harness::start().await;
    let callback = callback_of(&harness, "default").await;
    for bad in [
        "/api/auth/amazon/callback",
        "/api/auth/amazon/callback?code=x",
        "/api/auth/amazon/callback?state=x",
        "/api/auth/amazon/callback?error=access_denied",
    ] {
        refused(&harness.get(bad).await, 400, "state_invalid");
    }
    refused(&harness.get(&format!("{callback}&error=access_denied")).await, 400, "state_invalid");
    for doubled in ["code=x", "state=x", "scope=x"] {
        refused(&harness.get(&format!("{callback}&{doubled}")).await, 400, "bad_request");
    }
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 0, "no code is exchanged before its state was checked");
    assert_eq!(harness.get(&callback).await.status(), 200, "a bad callback does not affect another login");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 84.
async fn a_login_state_is_valid_once_and_for_ten_minutes() {
    let harness = Harness::start().await;
    for unknown in ["unknown", "", "a%00b"] {
        let callback = format!("/api/auth/amazon/callback?code=x&state={unknown}");
        refused(&harness.get(&callback).await, 400, "state_invalid");
    }
    let callback = callback_of(&harness, "default").await;
    assert_eq!(harness.get(&callback).await.status(), 200);
    refused(&harness.get(&callback).await, 400, "state_invalid");
    let late = callback_of(&harness, "default").await;
    harness.advance(600);
    refused(&harness.get(&late).await, 400, "state_invalid");
    let timely = callback_of(&harness, "default").await;
    harness.advance(299);
    assert_eq!(harness.get(&timely).await.status(), 200);
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 2);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 85.
async fn two_hundred_concurrent_callbacks_exchange_the_code_once() {
    let harness = Harness::start().await;
    let callback = callback_of(&harness, "default").await;
    let all = (0..200).map(|_| tokio::spawn(harness.request(Method::GET, &callback).send()));
    let mut statuses = Vec::new();
    for one in all.collect::<Vec<_>>() {
        statuses.push(one.await.unwrap().unwrap().status().as_u16());
    }
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1);
    assert_eq!(statuses.iter().filter(|status| **status == 400).count(), 199);
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 1);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_started_by_a_browser_completes_only_in_that_browser() {
    let harness = Harness::start().await;
    let (callback, _) = browsed(&harness, "default").await;
    refused(&harness.get(&callback).await, 400, "state_invalid");

    let (callback, own) = browsed(&harness, "default").await;
    let (_, other) = browsed(&harness, "default").await;
    let forged = format!("{}={}", own.split('=').next().unwrap(), other.split('=').next_back().unwrap());
    for cookies in [other, forged] {
        let answer = harness.request(Method::GET, &callback).header("cookie", cookies).send().await.unwrap();
        refused(&answer, 400, "state_invalid");
    }
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 0);

    let (first, first_cookie) = browsed(&harness, "a").await;
    let (second, second_cookie) = browsed(&harness, "b").await;
    let jar = format!("theme=dark; {first_cookie}; {second_cookie}");
    for callback in [first, second] {
        let answer = harness.request(Method::GET, &callback).header("cookie", &jar).send().await.unwrap();
        assert_eq!(answer.status(), 200, "two logins of one browser are independent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_page_of_another_origin_can_use_the_oauth_endpoints() {
    let harness = Harness::with(FRONTEND).await;
    assert_eq!(harness.get(&callback_of(&harness, "default").await).await.status(), 302);
    for (name, value) in [
        ("origin", "https://evil.test"),
        ("origin", "null"),
        ("origin", "http://app.example.com"),
        ("origin", "https://app.example.com.evil.test"),
        ("origin", "http://localhost:8001"),
        ("sec-fetch-site", "cross-site"),
    ] {
        for (method, path) in [
            (Method::GET, LOGIN.to_owned()),
            (Method::GET, STATUS.to_owned()),
            (Method::POST, "/api/auth/amazon/logout".to_owned()),
            (Method::POST, "/api/auth/amazon/refresh".to_owned()),
            (Method::DELETE, "/api/auth/amazon/users/default".to_owned()),
            (Method::OPTIONS, "/api/auth/amazon/logout".to_owned()),
        ] {
            let answer = harness.request(method, &path).header(name, value).send().await.unwrap();
            refused(&answer, 403, "cross_site");
            assert!(!answer.headers().contains_key("access-control-allow-origin"));
        }
    }
    let navigation = harness
        .request(Method::GET, LOGIN)
        .header("accept", "text/html")
        .header("sec-fetch-site", "cross-site")
        .header("sec-fetch-mode", "navigate")
        .send()
        .await
        .unwrap();
    refused(&navigation, 403, "cross_site");
    assert!(!navigation.headers().contains_key("set-cookie"));
    let same_site = harness.request(Method::POST, "/api/auth/amazon/logout").header("sec-fetch-site", "same-site");
    refused(&same_site.send().await.unwrap(), 403, "cross_site");
    assert_eq!(harness.status_of("default").await["state"], "fresh", "no user was logged out");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_frontend_can_fetch_and_read_rejections_too() {
    let harness = Harness::with(FRONTEND).await;
    let fetch = |method: Method, path: &str| harness.request(method, path).header("origin", ORIGIN).send();
    let readable = |headers: &HeaderMap| {
        assert_eq!(headers["access-control-allow-origin"], ORIGIN);
        assert_eq!(headers["access-control-allow-credentials"], "true");
        assert_eq!(headers["vary"], "origin");
        let exposed = headers["access-control-expose-headers"].to_str().unwrap();
        assert!(exposed.contains("x-adsidecar-error") && exposed.contains("x-request-id"), "{exposed}");
    };
    let preflight = harness
        .request(Method::OPTIONS, "/api/auth/amazon/logout")
        .header("origin", ORIGIN)
        .header("access-control-request-method", "POST")
        .send()
        .await
        .unwrap();
    assert_eq!(preflight.status(), 204);
    readable(preflight.headers());
    assert!(header(&preflight, "access-control-allow-methods").contains("POST"));
    is_private(&preflight);

    let refusal = fetch(Method::POST, "/api/auth/amazon/refresh").await.unwrap();
    refused(&refusal, 401, "login_required");
    readable(refusal.headers());
    let refusal = fetch(Method::GET, "/api/auth/amazon/status?user_id=a%20b").await.unwrap();
    refused(&refusal, 400, "bad_request");
    readable(refusal.headers());
    for (method, path, status) in
        [(Method::GET, "/api/auth/amazon/events?user=anna", 400), (Method::POST, "/api/auth/amazon/events", 405)]
    {
        let refusal = fetch(method, path).await.unwrap();
        assert_eq!(refusal.status(), status, "{path}");
        readable(refusal.headers());
        is_private(&refusal);
    }

    let begun = fetch(Method::GET, LOGIN).await.unwrap();
    assert_eq!(begun.status(), 200);
    readable(begun.headers());
    let cookie = header(&begun, "set-cookie").split(';').next().unwrap().to_owned();
    let callback = harness.consent(json(begun).await["auth_url"].as_str().unwrap()).await;
    let stranger = harness.get(&callback).await;
    assert_eq!(
        parameter(&location(&stranger), "error").as_deref(),
        Some("state_invalid"),
        "the login is bound to its cookie"
    );
    assert!(cookie.starts_with("adsidecar_login_"));

    // No web page can use the proxy, not even the frontend.
    assert_eq!(harness.get(&callback_of(&harness, "default").await).await.status(), 302);
    let call = fetch(Method::GET, "/v2/profiles").await.unwrap();
    assert_eq!((call.status().as_u16(), code(&call)), (403, "cross_site"));
    assert!(!call.headers().contains_key("access-control-allow-origin"));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_caller_token_only_the_callback_is_open_to_browsers() {
    let extra = format!("[proxy]\nlisten = \"127.0.0.1:0\"\ncaller_token = \"one-token\"\n{FRONTEND}");
    let harness = Harness::with(&extra).await;
    for (method, path) in [
        (Method::GET, LOGIN),
        (Method::GET, STATUS),
        (Method::POST, "/api/auth/amazon/refresh"),
        (Method::POST, "/api/auth/amazon/logout"),
        (Method::POST, "/api/auth/amazon/confirm?grant=x"),
        (Method::DELETE, "/api/auth/amazon/users/default"),
    ] {
        let answer = harness.request(method.clone(), path).send().await.unwrap();
        refused(&answer, 407, "caller_unauthorized");
        assert_eq!(header(&answer, "proxy-authenticate"), "Bearer");
        let fetched = harness.request(method, path).header("origin", ORIGIN).header("x-ads-sidecar-token", "one-token");
        let fetched = fetched.send().await.unwrap();
        refused(&fetched, 403, "cross_site");
    }
    let begun = harness.request(Method::GET, LOGIN).header("x-ads-sidecar-token", "one-token").send().await.unwrap();
    let callback = harness.consent(json(begun).await["auth_url"].as_str().unwrap()).await;
    assert_eq!(parameter(&location(&harness.get(&callback).await), "status").as_deref(), Some("success"));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 82.
async fn amazons_callback_errors_are_mapped_and_never_echoed() {
    let harness = Harness::start().await;
    for (error, told) in [
        ("access_denied", "access_denied"),
        ("invalid_scope", "invalid_scope"),
        ("server_error", "server_error"),
        ("temporarily_unavailable", "temporarily_unavailable"),
        ("unauthorized_client", "other"),
        (SCRIPTS[0], "other"),
    ] {
        let state = json(harness.get(LOGIN).await).await["state"].as_str().unwrap().to_owned();
        let query = format!("error={}&error_description={}&state={state}", encoded(error), encoded(SCRIPTS[1]));
        let answer = harness.get(&format!("/api/auth/amazon/callback?{query}")).await;
        refused(&answer, 400, told);
        let body = json(answer).await;
        assert_eq!((&body["status"], &body["error"]), (&Value::from("error"), &Value::from(told)));
        assert!(!body.to_string().contains("alert"));
    }
    for script in SCRIPTS {
        let script = encoded(script);
        let query = format!("code={script}&state={script}&scope={script}&user_id={script}&error_description={script}");
        let answer = harness.request(Method::GET, &format!("/api/auth/amazon/callback?{query}"));
        let answer = answer.header("accept", "text/html").send().await.unwrap();
        refused(&answer, 400, "state_invalid");
        let policy = header(&answer, "content-security-policy").to_owned();
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
        assert!(!policy.contains("unsafe"));
        let page = answer.text().await.unwrap();
        assert!(page.contains("Not connected") && !page.contains("alert"), "{page}");
    }
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 0);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 88.
async fn a_failed_code_exchange_stores_nothing() {
    let harness = Harness::start().await;
    for fault in [
        Fault::status(500),
        Fault::InvalidGrant,
        Fault::InvalidClient,
        Fault::BadJson,
        Fault::Html,
        Fault::NoRefreshToken,
    ] {
        let callback = callback_of(&harness, "default").await;
        let before = harness.sandbox.calls(Listener::Lwa).len();
        harness.sandbox.set_fault(fault);
        refused(&harness.get(&callback).await, 502, "exchange_failed");
        refused(&harness.get(&callback).await, 502, "exchange_failed");
        assert_eq!(harness.sandbox.calls(Listener::Lwa).len(), before + 1, "a code is exchanged once");
        assert_eq!(harness.status_of("default").await["state"], "none");
    }
    let callback = callback_of(&harness, "default").await;
    let spoiled = callback.replace("code=", "code=x");
    refused(&harness.get(&spoiled).await, 502, "exchange_failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_gets_the_login_url_as_json_with_state_and_pkce() {
    let harness = Harness::start().await;
    let mut seen = HashSet::new();
    for _ in 0..2 {
        let answer = harness.get(&format!("{LOGIN}?user_id=shop-1")).await;
        assert_eq!(answer.status(), 200);
        is_private(&answer);
        assert!(!answer.headers().contains_key("set-cookie"), "a server-started login sets no cookie");
        let begun = json(answer).await;
        assert_eq!(begun.as_object().unwrap().len(), 2);
        let url: Url = begun["auth_url"].as_str().unwrap().parse().unwrap();
        assert!(url.as_str().starts_with(&harness.sandbox.authorize_url()));
        let pairs: Vec<_> = url.query_pairs().map(|(name, _)| name.into_owned()).collect();
        let names =
            ["client_id", "scope", "response_type", "redirect_uri", "state", "code_challenge", "code_challenge_method"];
        assert_eq!(pairs, names);
        for (name, value) in [
            ("client_id", CLIENT_ID),
            ("scope", SCOPE),
            ("response_type", "code"),
            ("redirect_uri", RETURN_URL),
            ("code_challenge_method", "S256"),
        ] {
            assert_eq!(parameter(&url, name).as_deref(), Some(value));
        }
        let state = begun["state"].as_str().unwrap();
        assert_eq!(parameter(&url, "state").as_deref(), Some(state));
        let challenge = parameter(&url, "code_challenge").unwrap();
        assert_eq!((state.len(), challenge.len()), (43, 43), "256 bits in base64url");
        assert!(seen.insert(state.to_owned()) && seen.insert(challenge));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_redirect_uri_is_sent_byte_for_byte() {
    let mut harness = Harness::start().await;
    let odd = "http://LOCALHOST:8001/api/auth/amazon/callback?a=%7e&b=x+y&c=%2F";
    harness.sandbox.world(|world| world.allow_return_url(odd));
    harness.restart_with("amazon.redirect_uri", odd).await;
    let begun = json(harness.get(LOGIN).await).await;
    let url: Url = begun["auth_url"].as_str().unwrap().parse().unwrap();
    assert_eq!(parameter(&url, "redirect_uri").as_deref(), Some(odd));
    let callback = harness.consent(url.as_str()).await;
    assert_eq!(harness.get(&callback).await.status(), 200, "the exchange sends the same URI");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_is_redirected_to_the_consent_page_with_a_cookie() {
    let mut harness = Harness::start().await;
    for (name, value) in [("accept", "text/html,application/xhtml+xml,*/*;q=0.8"), ("sec-fetch-mode", "navigate")] {
        let answer = harness.request(Method::GET, LOGIN).header(name, value).send().await.unwrap();
        assert_eq!(answer.status(), 302);
        is_private(&answer);
        assert!(header(&answer, "location").starts_with(&harness.sandbox.authorize_url()));
        let cookie = header(&answer, "set-cookie");
        for part in
            ["adsidecar_login_", "; HttpOnly", "; SameSite=Lax", "; Path=/api/auth/amazon/callback", "; Max-Age=3600"]
        {
            assert!(cookie.contains(part), "{part} in {cookie}");
        }
        assert!(!cookie.contains("Secure"), "this is development");
        assert!(answer.text().await.unwrap().is_empty());
    }
    let redirected = harness.get(&format!("{LOGIN}?redirect=true")).await;
    assert_eq!(redirected.status(), 302);
    assert!(redirected.headers().contains_key(LOCATION) && !redirected.headers().contains_key("set-cookie"));
    let from_the_frontend = harness.request(Method::GET, LOGIN).header("accept", "text/html");
    let from_the_frontend = from_the_frontend.header("sec-fetch-site", "same-site").send().await.unwrap();
    assert_eq!(from_the_frontend.status(), 302, "another port of localhost is the same site");
    for accept in ["application/json", "*/*", "application/json, text/html", "*/*, text/html"] {
        let answer = harness.request(Method::GET, LOGIN).header("accept", accept).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{accept}");
    }
    harness.restart_with("environment", "production").await;
    let answer = harness.request(Method::GET, LOGIN).header("accept", "text/html").send().await.unwrap();
    assert!(header(&answer, "set-cookie").contains("; Secure"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_without_a_frontend_sees_a_page() {
    let harness = Harness::start().await;
    let (callback, cookie) = browsed(&harness, "shop-1").await;
    let answer = harness.request(Method::GET, &callback).header("accept", "text/html").header("cookie", cookie);
    let answer = answer.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    is_private(&answer);
    assert!(header(&answer, "content-type").starts_with("text/html"));
    assert!(header(&answer, "content-security-policy").starts_with("default-src 'none'"));
    let page = answer.text().await.unwrap();
    assert!(page.contains("Connected") && page.contains("shop-1"), "{page}");

    let ended = json(harness.get(&callback_of(&harness, "shop-2").await).await).await;
    assert_eq!(ended["status"], "success");
    assert_eq!(ended["user_id"], "shop-2");
    assert_eq!(ended["expires_at"], "2026-08-01T13:00:00Z");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_frontend_gets_the_result_of_the_login() {
    let harness = Harness::with(FRONTEND).await;
    let ended = harness.get(&callback_of(&harness, "shop|1").await).await;
    assert_eq!(ended.status(), 302);
    is_private(&ended);
    assert_eq!(header(&ended, "location"), "https://app.example.com/connected?tab=ads&status=success&user_id=shop%7C1");

    let begun = json(harness.get(&format!("{LOGIN}?return_to={}", encoded("/shop/7?x=1#top"))).await).await;
    let ended = harness.get(&harness.consent(begun["auth_url"].as_str().unwrap()).await).await;
    assert_eq!(header(&ended, "location"), "https://app.example.com/shop/7?x=1&status=success&user_id=default#top");

    let begun = json(harness.get(&format!("{LOGIN}?return_to=/shop/7")).await).await;
    let state = begun["state"].as_str().unwrap();
    let denied = harness.get(&format!("/api/auth/amazon/callback?error=access_denied&state={state}")).await;
    assert_eq!(header(&denied, "location"), "https://app.example.com/shop/7?status=error&error=access_denied");
    let unknown = harness.get("/api/auth/amazon/callback?code=x&state=y").await;
    assert_eq!(
        header(&unknown, "location"),
        "https://app.example.com/connected?tab=ads&status=error&error=state_invalid"
    );
    for script in SCRIPTS {
        let script = encoded(script);
        let answer =
            harness.get(&format!("/api/auth/amazon/callback?error={script}&state={script}&user_id={script}")).await;
        assert!(!header(&answer, "location").contains("alert"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_started_login_is_pending_until_confirmed() {
    let harness = Harness::with(&format!("{FRONTEND}confirm = true\n")).await;
    refused(&harness.post("/api/auth/amazon/confirm?grant=unknown").await, 400, "state_invalid");

    let ended = harness.get(&callback_of(&harness, "default").await).await;
    let url = location(&ended);
    assert_eq!(parameter(&url, "status").as_deref(), Some("pending"));
    let grant = parameter(&url, "grant").unwrap();
    assert_eq!(parameter(&url, "user_id"), None);
    assert_eq!(harness.status_of("default").await["state"], "none", "a pending grant is not used");
    refused_call(&harness).await;
    let confirmed = harness.post(&format!("/api/auth/amazon/confirm?grant={grant}")).await;
    assert_eq!(confirmed.status(), 200);
    assert_eq!(json(confirmed).await["state"], "fresh");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    refused(&harness.post(&format!("/api/auth/amazon/confirm?grant={grant}")).await, 400, "state_invalid");

    let ended = harness.get(&callback_of(&harness, "late").await).await;
    let grant = parameter(&location(&ended), "grant").unwrap();
    harness.advance(600);
    refused(&harness.post(&format!("/api/auth/amazon/confirm?grant={grant}")).await, 400, "state_invalid");
    assert_eq!(harness.status_of("late").await["state"], "none");

    // A browser's login is bound to its cookie and needs no confirmation.
    let (callback, cookie) = browsed(&harness, "browser").await;
    let ended = harness.request(Method::GET, &callback).header("cookie", cookie).send().await.unwrap();
    assert_eq!(parameter(&location(&ended), "status").as_deref(), Some("success"));
}

async fn refused_call(harness: &Harness) {
    let call = harness.get("/v2/profiles").await;
    assert_eq!((call.status().as_u16(), code(&call)), (401, "login_required"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_login_listener_serves_only_the_callback() {
    let harness = Harness::with("[login]\nlisten = \"127.0.0.1:0\"\n").await;
    let at_login_listener =
        |method: Method, path: &str| harness.client.request(method, harness.login_listener_url(path)).send();
    for (method, path) in [
        (Method::GET, LOGIN),
        (Method::GET, STATUS),
        (Method::POST, "/api/auth/amazon/refresh"),
        (Method::POST, "/api/auth/amazon/logout"),
        (Method::POST, "/api/auth/amazon/confirm?grant=x"),
        (Method::DELETE, "/api/auth/amazon/users/default"),
        (Method::POST, "/auth/o2/token"),
        (Method::GET, "/v2/profiles"),
        (Method::GET, "/a/default/api/auth/amazon/callback"),
        (Method::GET, "/metrics"),
        (Method::GET, "/"),
    ] {
        refused(&at_login_listener(method, path).await.unwrap(), 404, "not_found");
    }
    refused(&at_login_listener(Method::POST, "/api/auth/amazon/callback").await.unwrap(), 405, "method_not_allowed");
    refused(
        &at_login_listener(Method::GET, "/api/auth/amazon/callback?code=x&state=y").await.unwrap(),
        400,
        "state_invalid",
    );
    let foreign =
        harness.client.get(harness.login_listener_url("/api/auth/amazon/callback")).header("host", "evil.test");
    refused(&foreign.send().await.unwrap(), 403, "host_not_allowed");
    assert_eq!(harness.sandbox.history().len(), 0);

    let callback = callback_of(&harness, "default").await;
    let ended = json(at_login_listener(Method::GET, &callback).await.unwrap()).await;
    assert_eq!(ended["status"], "pending", "with a login listener, a server-started login needs a confirmation");
    let grant = ended["grant"].as_str().unwrap();
    assert_eq!(harness.post(&format!("/api/auth/amazon/confirm?grant={grant}")).await.status(), 200);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_always_succeeds_and_links_to_amazons_page() {
    let harness = Harness::start().await;
    for user in ["default", "shop|1", "a@b.example"] {
        harness.log_in(&encoded(user)).await;
    }
    let users = |user: &str| format!("/api/auth/amazon/users/{user}");
    for (method, path) in [
        (Method::POST, "/api/auth/amazon/logout?user_id=nobody".to_owned()),
        (Method::DELETE, users("nobody")),
        (Method::DELETE, users("shop%7C1")),
        (Method::DELETE, users("a@b.example")),
        (Method::POST, "/api/auth/amazon/logout".to_owned()),
    ] {
        let answer = harness.request(method, &path).send().await.unwrap();
        assert_eq!(answer.status(), 204, "{path}");
        is_private(&answer);
        assert!(header(&answer, "link").starts_with("<https://www.amazon.com/"));
    }
    assert_eq!(json(harness.get(STATUS).await).await["users"], Value::Array(Vec::new()));
    assert_eq!(harness.status_of("shop%7C1").await["state"], "none");
    refused_call(&harness).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_describes_each_user_page_by_page() {
    let harness = Harness::start().await;
    let none = harness.status_of("nobody").await;
    assert_eq!(none["state"], "none");
    assert_eq!(none["expires_at"], Value::Null);
    for user in ["c", "a", "e", "b", "d"] {
        harness.log_in(user).await;
    }
    let status = harness.status_of("c").await;
    let mut names: Vec<&str> = status.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "consent",
            "consent_expires_at",
            "consented_at",
            "expires_at",
            "last_error",
            "login_url",
            "next_refresh_at",
            "state",
            "updated_at",
            "user_id"
        ]
    );
    for (name, value) in [
        ("user_id", "c"),
        ("state", "fresh"),
        ("expires_at", "2026-08-01T13:00:00Z"),
        ("updated_at", "2026-08-01T12:00:00Z"),
        ("consented_at", "2026-08-01T12:00:00Z"),
        ("consent_expires_at", "2027-08-01T12:00:00Z"),
    ] {
        assert_eq!(status[name], value);
    }
    assert_eq!(status["last_error"], Value::Null);
    let login_url = "http://localhost:8001/api/auth/amazon/login?user_id=c";
    assert_eq!(status["login_url"], login_url, "at the redirect URI's origin");

    let page = async |query: &str| -> Vec<String> {
        let users = json(harness.get(&format!("{STATUS}{query}")).await).await["users"].take();
        users.as_array().unwrap().iter().map(|user| user["user_id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(page("").await, ["a", "b", "c", "d", "e"]);
    assert_eq!(page("?limit=2").await, ["a", "b"]);
    assert_eq!(page("?after=b&limit=2").await, ["c", "d"]);
    assert_eq!(page("?after=d").await, ["e"]);
    assert!(page("?after=e").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_kept_apart() {
    let harness = Harness::start().await;
    harness.log_in("one").await;
    harness.log_in("two").await;
    let bearer = async |user: &str| {
        let call = harness.request(Method::GET, "/sandbox/echo").header("x-ads-user", user).send().await.unwrap();
        assert_eq!(call.status(), 200);
        harness.sandbox.last().unwrap().header("authorization").unwrap().to_owned()
    };
    let one = bearer("one").await;
    assert_ne!(one, bearer("two").await);
    assert_eq!(one, bearer("one").await);
    harness.post("/api/auth/amazon/logout?user_id=one").await;
    let gone = harness.request(Method::GET, "/sandbox/echo").header("x-ads-user", "one").send().await.unwrap();
    assert_eq!((gone.status().as_u16(), code(&gone)), (401, "login_required"));
    assert!(header(&gone, "www-authenticate").starts_with("Bearer"));
    assert!(json(gone).await["next_step"].as_str().unwrap().contains("user_id=one"));
    bearer("two").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_oauth_response_contains_a_token() {
    let harness = Harness::start().await;
    let mut told = String::new();
    let callback = callback_of(&harness, "default").await;
    for (method, path) in [
        (Method::GET, callback.clone()),
        (Method::GET, callback),
        (Method::GET, STATUS.to_owned()),
        (Method::GET, format!("{STATUS}?user_id=default")),
        (Method::POST, "/api/auth/amazon/refresh".to_owned()),
        (Method::POST, "/auth/o2/token".to_owned()),
        (Method::POST, "/api/auth/amazon/logout".to_owned()),
        (Method::POST, "/api/auth/amazon/refresh".to_owned()),
        (Method::GET, "/v2/profiles".to_owned()),
    ] {
        let answer = harness.request(method, &path).send().await.unwrap();
        told += &format!("{:?}", answer.headers());
        told += &answer.text().await.unwrap();
    }
    told += &harness.client.get(harness.admin_url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(told.contains("\"fresh\""));
    for secret in ["Atza|", "Atzr|", "oa2-cs", "gAAAA"] {
        assert!(!told.contains(secret), "{secret} in {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_flow_from_login_to_logout() {
    let mut harness = Harness::start().await;
    let refused = harness.get("/v2/profiles").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    assert_eq!(harness.status_of("default").await["state"], "none");

    harness.log_in("default").await;
    assert_eq!(harness.status_of("default").await["state"], "fresh");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);

    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "a restart keeps the grant");

    assert_eq!(harness.post("/api/auth/amazon/logout").await.status(), 204);
    let refused = harness.get("/v2/profiles").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    let problem = json(refused).await;
    assert!(problem["next_step"].as_str().unwrap().contains("/api/auth/amazon/login?user_id=default"));

    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.status_of("default").await["state"], "none", "a restart does not restore the grant");
    assert_eq!(harness.sandbox.calls(Listener::Na).len(), 2);
}

/// Logs the default user in, with `advertiser` signing in at Amazon. Returns the response of the callback.
async fn log_in_as(harness: &Harness, advertiser: &str, more: &str) -> reqwest::Response {
    let begun = json(harness.get(&format!("/api/auth/amazon/login?{more}")).await).await;
    let auth_url = format!("{}&advertiser={advertiser}", begun["auth_url"].as_str().unwrap());
    let callback = harness.consent(&auth_url).await;
    harness.get(&callback).await
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 90.
async fn another_amazon_identity_replaces_a_grant_only_on_explicit_request() {
    let (tools, books) = ("amzn1.account.SANDBOXTOOLS", "amzn1.account.SANDBOXBOOKS");
    let harness = Harness::start().await;
    assert_eq!(log_in_as(&harness, tools, "").await.status(), 200);
    let before = harness.get("/v2/profiles").await.text().await.unwrap();

    let refused = log_in_as(&harness, books, "").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (409, "identity_changed"));
    assert_eq!(harness.get("/v2/profiles").await.text().await.unwrap(), before, "the previous grant is unchanged");

    assert_eq!(log_in_as(&harness, tools, "").await.status(), 200, "the same identity may log in again");
    assert_eq!(log_in_as(&harness, books, "replace=true").await.status(), 200);
    assert_ne!(harness.get("/v2/profiles").await.text().await.unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 90.
async fn an_unreachable_region_does_not_count_as_another_identity() {
    let harness = Harness::start().await;
    assert_eq!(log_in_as(&harness, "amzn1.account.SANDBOXTOOLS", "").await.status(), 200);
    harness.sandbox.set_fault(Rule::from(Fault::status(503)).at(Listener::Fe).always());
    assert_eq!(log_in_as(&harness, "amzn1.account.SANDBOXBOOKS", "").await.status(), 200);
}
