//! Threats: the shorter proofs, one test per threat. The longer ones have their own files and campaigns.

use std::collections::BTreeSet;

use adsidecar::app::{App, BuildError};
use adsidecar::config::{self, Sources};
use adsidecar::domain::clock::Clock;
use adsidecar::store::StoreError;
use reqwest::Method;
use world::{Fault, Listener, Rule};

use crate::harness::{FERNET_KEY, Harness, code, json};
use crate::raw_http::eventually;

/// Every endpoint of ours for programs, with a method that it accepts.
const ENDPOINTS: [(&str, &str); 8] = [
    ("GET", "/api/auth/amazon/login?user_id=default"),
    ("GET", "/api/auth/amazon/callback?code=x&state=y"),
    ("GET", "/api/auth/amazon/status"),
    ("GET", "/api/auth/amazon/status?user_id=default"),
    ("POST", "/api/auth/amazon/refresh"),
    ("POST", "/api/auth/amazon/confirm?grant=x"),
    ("POST", "/auth/o2/token"),
    ("POST", "/api/auth/amazon/logout?user_id=nobody"),
];

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 3.
async fn no_preflight_is_granted_and_no_response_admits_another_origin() {
    let harness = Harness::set(&[]).await;
    for question in [
        "Access-Control-Request-Method: POST\r\n",
        "Origin: https://evil.test\r\nAccess-Control-Request-Method: POST\r\n",
        "Origin: https://evil.test\r\nAccess-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: x-a\r\n\
         Access-Control-Request-Private-Network: true\r\nAccess-Control-Request-Local-Network: true\r\n",
    ] {
        for path in ["/sandbox/echo", "/sp/campaigns", "/a/x/v2/profiles"] {
            let answer =
                harness.send_raw(format!("OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\n{question}\r\n")).await;
            assert_eq!(answer.said(), (403, "cross_site"), "{path} {question}");
            assert!(answer.names().iter().all(|name| !name.starts_with("access-control-")), "{answer:?}");
        }
    }
    assert!(harness.ads_calls().is_empty());
    for (method, path) in ENDPOINTS {
        for origin in ["", "Origin: https://evil.test\r\n", "Origin: null\r\n"] {
            let call = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{origin}Content-Length: 0\r\n\r\n");
            let answer = harness.send_raw(call).await;
            assert!(answer.names().iter().all(|name| !name.starts_with("access-control-")), "{path} {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 7.
async fn a_code_from_another_login_is_rejected() {
    let harness = Harness::start().await;
    let begin = async |user: &str| {
        let begun = json(harness.get(&format!("/api/auth/amazon/login?user_id={user}")).await).await;
        begun["auth_url"].as_str().unwrap().to_owned()
    };
    // The attacker's code, bound to the attacker's challenge, is injected into the victim's login.
    let (victim, attacker) = (begin("victim").await, begin("attacker").await);
    let state_of = |callback: &str| callback.split("state=").nth(1).unwrap().split('&').next().unwrap().to_owned();
    let victims = harness.consent(&victim).await;
    let attackers = harness.consent(&attacker).await;
    let injected = attackers.replace(&state_of(&attackers), &state_of(&victims));
    assert_ne!(injected, attackers);
    let answer = harness.get(&injected).await;
    assert_eq!(code(&answer), "exchange_failed", "the sandbox checks the verifier as Amazon does");
    assert_eq!(harness.status_of("victim").await["state"], "none");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 8.
async fn a_state_is_never_taken_from_the_request_and_never_repeats() {
    let harness = Harness::start().await;
    let mut states = BTreeSet::new();
    for _ in 0..500 {
        let begun = json(harness.get("/api/auth/amazon/login").await).await;
        let state = begun["state"].as_str().unwrap().to_owned();
        assert!(state.len() >= 43 && !state.contains("chosen"), "256 bits: {state}");
        assert!(states.insert(state));
    }
    let fixed = harness.get("/api/auth/amazon/callback?code=x&state=chosen-by-the-attacker").await;
    assert_eq!((fixed.status().as_u16(), code(&fixed)), (400, "state_invalid"));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 9.
async fn a_used_state_is_rejected_without_a_token_call() {
    let harness = Harness::start().await;
    let begun = json(harness.get("/api/auth/amazon/login").await).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    assert_eq!(harness.get(&callback).await.status(), 200);
    let before = harness.sandbox.calls(Listener::Lwa).len();
    for _ in 0..3 {
        let again = harness.get(&callback).await;
        assert_eq!((again.status().as_u16(), code(&again)), (400, "state_invalid"));
    }
    assert_eq!(harness.sandbox.calls(Listener::Lwa).len(), before);
    assert_eq!(harness.status_of("default").await["state"], "fresh", "the first login is unaffected");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 11.
async fn login_responses_forbid_caching_referrers_and_framing() {
    for toml in ["", "[login]\nfrontend_url = \"https://app.example/\"\n"] {
        let harness = Harness::with(toml).await;
        harness.log_in("default").await;
        for accept in ["application/json", "text/html"] {
            for (method, path) in ENDPOINTS {
                let request = harness.request(method.parse().unwrap(), path).header("Accept", accept);
                let answer = request.send().await.unwrap();
                let header = |name: &str| answer.headers().get(name).map_or("", |value| value.to_str().unwrap());
                assert_eq!(header("cache-control"), "no-store", "{path}");
                assert_eq!(header("referrer-policy"), "no-referrer", "{path}");
                assert_eq!(header("x-content-type-options"), "nosniff", "{path}");
                if header("content-type").starts_with("text/html") {
                    let policy = header("content-security-policy");
                    assert!(
                        policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
                        "{policy}"
                    );
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 12.
async fn no_part_of_the_query_is_echoed() {
    let marks = [
        "<script>canary</script>",
        "\"><img src=canary>",
        "javascript:canary()",
        "canary'--",
        "{{canary}}",
        "\u{202e}canary",
    ];
    let keys = [
        "error",
        "error_description",
        "error_uri",
        "code",
        "state",
        "scope",
        "user_id",
        "return_to",
        "region",
        "grant",
        "limit",
        "after",
        "redirect",
        "replace",
    ];
    for toml in ["", "[login]\nfrontend_url = \"https://app.example/\"\n"] {
        let harness = Harness::with(toml).await;
        for (method, path) in ENDPOINTS {
            let path = path.split('?').next().unwrap();
            for key in keys {
                for mark in marks {
                    let query: String = url::form_urlencoded::byte_serialize(mark.as_bytes()).collect();
                    let request = harness.request(method.parse().unwrap(), &format!("{path}?{key}={query}"));
                    let answer = request.header("Accept", "text/html").send().await.unwrap();
                    let location =
                        answer.headers().get("location").map_or("", |value| value.to_str().unwrap()).to_owned();
                    assert!(!location.contains("canary"), "{path} {key} {mark}: {location}");
                    let body = answer.text().await.unwrap();
                    assert!(!body.contains("canary"), "{path} {key} {mark}: {body}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 13.
async fn no_page_of_another_origin_logs_a_user_in_or_out() {
    let harness = Harness::with("[login]\nfrontend_url = \"https://app.example/\"\n").await;
    harness.log_in("default").await;
    for (method, path) in [
        ("POST", "/api/auth/amazon/logout"),
        ("DELETE", "/api/auth/amazon/users/default"),
        ("POST", "/api/auth/amazon/refresh"),
        ("GET", "/api/auth/amazon/status"),
        ("GET", "/api/auth/amazon/login"),
    ] {
        for (site, mode) in [("cross-site", "no-cors"), ("cross-site", "navigate"), ("cross-site", "cors")] {
            let request = harness
                .request(method.parse().unwrap(), path)
                .header("Sec-Fetch-Site", site)
                .header("Sec-Fetch-Mode", mode);
            for request in [request.try_clone().unwrap(), request.header("Origin", "https://evil.test")] {
                let answer = request.send().await.unwrap();
                assert_eq!((answer.status().as_u16(), code(&answer)), (403, "cross_site"), "{method} {path} {mode}");
            }
        }
    }
    assert_eq!(harness.status_of("default").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 17.
async fn the_rest_of_a_rejected_body_is_never_a_request() {
    let harness = Harness::set(&[]).await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for (head, refusal) in [
        ("POST /x HTTP/1.1\r\nHost: evil.test\r\n", "host_not_allowed"),
        ("POST /x HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n", "cross_site"),
        ("POST /x HTTP/1.1\r\nHost: localhost\r\nX-Ads-Account: nobody\r\n", "unknown_account"),
        ("POST /x HTTP/1.1\r\nHost: localhost\r\nX-Ads-User: nobody\r\n", "login_required"),
        ("POST /api/auth/nothing HTTP/1.1\r\nHost: localhost\r\n", "not_found"),
    ] {
        // After half of the body, after all of it, and within it.
        for (length, sent) in [(1000, 500), (1000, 1000), (1 << 20, 1000)] {
            let mut wire = harness.dial().await;
            wire.send(format!("{head}Content-Length: {length}\r\n\r\n{}{smuggled}", "x".repeat(sent))).await;
            assert_eq!(wire.reply().await.said().1, refusal, "{head}");
            wire.end().await;
            let came = wire.everything().await;
            let answers = came.matches("HTTP/1.1 ").count();
            assert!(answers <= usize::from(sent == length), "{head} {length} {sent}: {came}");
            let whole = usize::from(sent == length);
            assert!(harness.ads_calls().len() <= whole, "body bytes remain body bytes");
            harness.sandbox.clear_history();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 20.
async fn four_hundred_path_spellings_reach_amazon_unchanged_or_not_at_all() {
    let harness = Harness::set(&[]).await;
    let parts = [
        "..",
        ".",
        "%2e%2e",
        "%2E.",
        "..%2f",
        "..%5c",
        "%252e%252e",
        "a",
        "",
        ";x=1",
        "%00",
        "%0d%0aX:y",
        "a\\b",
        "%ff",
        "\u{e9}",
        "api",
        "auth",
        "a%2Fb",
        "a:b",
        "|",
    ];
    let mut wire = harness.dial().await;
    let (mut tried, mut ours) = (0, 0);
    // `/x/../` and `/x/./../` lead back to the root, however they are spelled, and `/x/a/` does not.
    let is_up = |part: &str| matches!(part, ".." | "%2e%2e" | "%2E." | "..%2f" | "..%5c" | "%252e%252e");
    let is_nothing = |part: &str| matches!(part, "" | "." | ";x=1");
    let folds_to_ours = |first: &str, second: &str| {
        (is_up(first) && (is_up(second) || is_nothing(second))) || (is_nothing(first) && is_up(second))
    };
    // `/x/../a/` is the prefix of an account in another spelling.
    let folds_to_an_account = |first: &str, second: &str| is_up(first) && matches!(second, "a" | "a%2Fb" | "a\\b");
    for first in parts {
        for second in parts {
            let target = format!("/x/{first}/{second}/api/auth/amazon/status");
            wire.send(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
            let answer = wire.reply().await;
            tried += 1;
            if folds_to_ours(first, second) {
                assert_eq!(answer.said(), (404, "not_found"), "{target}");
                ours += 1;
            } else if folds_to_an_account(first, second) {
                assert_eq!(answer.said(), (400, "bad_request"), "{target}");
                ours += 1;
            } else {
                assert_eq!(answer.header("x-adsidecar-error"), None, "{target}: {answer:?}");
                assert_eq!(harness.seen().target, target);
            }
        }
    }
    assert_eq!(tried, 400);
    assert_eq!(harness.ads_calls().len(), tried - ours, "the others were not served by adsidecar itself");
    assert!(ours > 50, "{ours}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 22.
async fn no_response_contains_a_token() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let tokens = ["Atza|", "Atzr|", "Atza%7C", "Atzr%7C", "QXR6Y", "QXR6c", "gAAAA"];
    let mut answers = Vec::new();
    for (method, path) in ENDPOINTS {
        answers.push(harness.request(method.parse().unwrap(), path).send().await.unwrap());
    }
    for path in ["/metrics", "/", "/log", "/readyz", "/users", "/api/auth/amazon/status"] {
        answers.push(harness.client.get(harness.admin_url(path)).send().await.unwrap());
    }
    for method in ["TRACE", "CONNECT", "ECHO"] {
        let answer = harness.request(Method::from_bytes(method.as_bytes()).unwrap(), "/v2/profiles").send().await;
        answers.extend(answer.ok());
    }
    harness.sandbox.set_fault(Fault::Status { code: 401, headers: Vec::new(), body: "{}".into() });
    answers.push(harness.get("/v2/profiles").await);
    for answer in answers {
        let shown = format!("{:?}", answer.headers());
        let url = answer.url().clone();
        let body = answer.text().await.unwrap();
        assert!(tokens.iter().all(|token| !shown.contains(token) && !body.contains(token)), "{url}: {shown} {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 23.
async fn no_request_uses_another_users_token() {
    let harness = Harness::with("[[account]]\nname = \"acme\"\nuser = \"ann\"\n").await;
    harness.log_in("ann").await;
    harness.log_in("bob").await;
    harness.sandbox.clear_history();
    let mut bearers = BTreeSet::new();
    for (header, value, served) in [
        ("X-Ads-User", "ann", true),
        ("X-Ads-User", "bob", true),
        ("X-Ads-User", "eve", false),
        ("X-Ads-User", "Ann", false),
        ("X-Ads-User", "default", false),
        ("X-Ads-Account", "acme", true),
        ("X-Ads-Account", "Acme", false),
        ("X-Ads-Account", "bob", false),
        ("X-Ads-Account", "default", false),
    ] {
        let answer = harness.request(Method::GET, "/sandbox/echo").header(header, value).send().await.unwrap();
        let refusal = code(&answer);
        assert_eq!(refusal.is_empty(), served, "{header}: {value}");
        assert!(served || ["login_required", "unknown_account"].contains(&refusal), "{header}: {value}: {refusal}");
        if served {
            bearers.insert((value, harness.seen().header("authorization").unwrap().to_owned()));
        }
    }
    assert_eq!(harness.ads_calls().len(), 3);
    let different: BTreeSet<_> = bearers.iter().map(|(_, bearer)| bearer).collect();
    assert_eq!(different.len(), 2, "ann's token for ann and acme, bob's token for bob");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 26.
async fn the_disk_contains_ciphertext_readable_only_by_its_user() {
    use std::os::unix::fs::PermissionsExt;

    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let issued = harness.sandbox.grant();
    harness.stop_sidecar().await;
    let root = harness.directory.path().to_owned();
    let mut left = vec![root.clone()];
    let mut files = 0;
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            // Files in a directory with restricted access need no restriction of their own.
            let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert!(path.parent() != Some(&root) || mode == 0o700, "{} has mode {mode:o}", path.display());
            continue;
        }
        // The configuration of the harness contains the key itself.
        if path == harness.config_file() {
            continue;
        }
        files += 1;
        let bytes = std::fs::read(&path).unwrap();
        for secret in ["Atza|", "Atzr|", FERNET_KEY, issued.refresh_token.as_str()] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{} holds {secret}", path.display());
        }
    }
    assert!(files >= 3, "{files}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 36.
async fn no_path_and_no_caller_creates_a_metric_series() {
    let harness = Harness::set(&[]).await;
    let series = async || {
        let text = harness.client.get(harness.admin_url("/metrics")).send().await.unwrap().text().await.unwrap();
        text.lines().filter(|line| !line.starts_with('#')).count()
    };
    let ask = async |n: usize| {
        let call = harness.request(Method::GET, &format!("/sandbox/echo/{n}?q={n}"));
        call.header("X-Request-Id", n.to_string()).header("User-Agent", n.to_string()).send().await.unwrap();
        let call = harness.request(Method::GET, "/x").header("X-Ads-User", format!("user-{n}"));
        assert_eq!(call.send().await.unwrap().status(), 401);
        let call = harness.request(Method::GET, "/x").header("X-Ads-Account", format!("account-{n}"));
        assert_eq!(call.send().await.unwrap().status(), 404);
        harness.request(Method::from_bytes(format!("M{n}").as_bytes()).unwrap(), "/x").send().await.unwrap();
        harness.request(Method::GET, "/x").header("Host", format!("h{n}.test")).send().await.unwrap();
    };
    ask(0).await;
    let before = series().await;
    for n in 1..100 {
        ask(n).await;
    }
    assert_eq!(series().await, before);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 39.
async fn a_second_process_never_falls_back_to_memory() {
    let harness = Harness::set(&[]).await;
    let error = build(&harness, &[]).await.err().expect("the store is locked");
    assert!(matches!(error, BuildError::Store(StoreError::Locked { .. })), "{error}");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "the first process is not affected");
}

/// A second sidecar on the harness's configuration and store.
async fn build(harness: &Harness, sets: &[(&str, &str)]) -> Result<App, BuildError> {
    let sets = sets.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let sources = Sources { file: Some(harness.config_file()), env: Vec::new(), sets };
    let config = config::load(&sources).unwrap_or_else(|problems| panic!("{problems}"));
    App::build(config, Clock::system(), None).await
}

/// The mirror records of the grants, by file.
fn copies(harness: &Harness) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut directory = harness.store_path().into_os_string();
    directory.push(".copies");
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 42.
async fn malformed_admin_requests_change_nothing() {
    let harness = Harness::set(&[]).await;
    let methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "X"];
    let paths = [
        "/",
        "/quitquitquit",
        "/reload",
        "/log",
        "/rotate?key=x",
        "/metrics",
        "/readyz",
        "/../quitquitquit",
        "//quitquitquit",
        "/quitquitquit/",
        "/%71uitquitquit",
        "/v2/profiles",
    ];
    let strangers = [
        "Host: evil.test\r\n",
        "Host: localhost\r\nOrigin: http://evil.test\r\n",
        "Host: localhost\r\nSec-Fetch-Site: cross-site\r\n",
        "",
        "Host: a\r\nHost: localhost\r\n",
    ];
    for method in methods {
        for path in paths {
            for stranger in strangers {
                let mut wire = crate::raw_http::Wire::dial(harness.admin_address()).await;
                wire.send(format!(
                    "{method} {path} HTTP/1.1\r\n{stranger}Content-Length: 5\r\nConnection: close\r\n\r\nerror"
                ))
                .await;
                let came = wire.everything().await;
                let open = (method == "GET" || method == "HEAD")
                    && (path == "/metrics" || path == "/readyz")
                    && !stranger.contains("Origin")
                    && !stranger.contains("Sec-");
                assert!(open || came.starts_with("HTTP/1.1 4"), "{method} {path} {stranger}: {came}");
            }
        }
    }
    assert!(harness.ads_calls().is_empty());
    assert_eq!(harness.client.get(harness.admin_url("/readyz")).send().await.unwrap().status(), 200, "it still serves");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 69.
async fn a_caller_that_disconnects_while_waiting_leaves_no_request_in_flight_and_cancels_no_refresh() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let mut wire = harness.dial().await;
    wire.send("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    gate.reached(1).await;
    assert_eq!(harness.metric("adsidecar_requests_in_flight").await, 1.0);
    drop(wire);
    crate::harness::eventually("no request in flight", async || {
        (harness.metric("adsidecar_requests_in_flight").await == 0.0).then_some(())
    })
    .await;
    assert_eq!(
        harness
            .metric(
                "adsidecar_requests_total{account=\"\",method=\"GET\",region=\"na\",source=\"sidecar\",status=\"499\"}"
            )
            .await,
        1.0
    );
    gate.release();
    // The same while a token is being fetched for the caller: the refresh continues.
    harness.advance(3601);
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let before = harness.sandbox.refreshes();
    let mut wire = harness.dial().await;
    wire.send("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    gate.reached(1).await;
    drop(wire);
    gate.release();
    eventually("the end of the refresh", || harness.sandbox.refreshes() > before).await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), before + 1);
}
