//! What somebody found who looked for siblings of the faults in `whom.rs`: other endpoints, other spellings.

use reqwest::Method;

use crate::harness::{Harness, code, json};

#[tokio::test(flavor = "multi_thread")]
async fn what_the_admin_listener_does_not_understand_does_nothing_and_is_named() {
    let harness = Harness::start().await;
    let level = harness.client.get(harness.admin_url("/log")).send().await.unwrap().text().await.unwrap();
    for (method, target, header, body, named) in [
        (Method::POST, "/quitquitquit?dry_run=true", None, "", "dry_run"),
        (Method::POST, "/quitquitquit?%3Cb%3E=1", None, "", "b"),
        (Method::POST, "/quitquitquit", None, "wait=5", "body"),
        (Method::POST, "/quitquitquit", Some(("x-ads-user", "anna")), "", "x-ads-user"),
        (Method::POST, "/reload?section=proxy", None, "", "section"),
        (Method::POST, "/reload", None, "{\"path\":\"/etc/other.toml\"}", "body"),
        (Method::POST, "/reload", Some(("x_ads_account", "acme")), "", "x_ads_account"),
        (Method::PUT, "/log?level=debug", None, "debug", "level"),
        (Method::PUT, "/log?target=hyper", None, "trace", "target"),
        (Method::GET, "/log?level=debug", None, "", "level"),
        (Method::POST, "/rotate?key=00000000&key=11111111", None, "", "repeated"),
        (Method::POST, "/rotate?key=00000000&dry=1", None, "", "dry"),
        (Method::GET, "/rotate?key=00000000", None, "", "key"),
        (Method::GET, "/readyz?verbose", None, "", "verbose"),
        (Method::GET, "/metrics?name[]=adsidecar_users", None, "", "name"),
        (Method::GET, "/?user=anna", None, "", "user"),
    ] {
        let mut request = harness.client.request(method.clone(), harness.admin_url(target));
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        if !body.is_empty() {
            request = request.body(body);
        }
        let answer = request.send().await.unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (400, "bad_request"), "{method} {target} {body}");
        let detail = json(answer).await["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(named), "{method} {target}: {detail}");
    }
    let now = harness.client.get(harness.admin_url("/log")).send().await.unwrap().text().await.unwrap();
    assert_eq!(now, level);
    assert_eq!(harness.client.get(harness.admin_url("/readyz")).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 2.
async fn a_selector_or_an_account_prefix_in_another_spelling_is_refused_and_nothing_is_sent() {
    let harness = Harness::with("[[account]]\nname = \"default\"\nprofile_id = \"1\"\n").await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for line in [
        "XAdsAccount: acme",
        "X.Ads.Account: acme",
        "X-Ads--Account: acme",
        "X--Ads-Account: acme",
        "X-AdsAccount: acme",
        "X-Ad-Account: acme",
        "X-Ad-User: anna",
        "Ads-Account: acme",
        "Ads-User: anna",
        "X_AdsUser: anna",
        "X-Adss-User: anna",
    ] {
        let answer = harness.send_raw(format!("GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\n{line}\r\n\r\n")).await;
        assert_eq!(answer.said(), (400, "bad_request"), "{line}");
    }
    for path in [
        "/A/acme/v2/profiles",
        "//a/acme/v2/profiles",
        "/a//acme/v2/profiles",
        "/./a/acme/v2/profiles",
        "/x/../a/acme/v2/profiles",
        "/%61/acme/v2/profiles",
        "/%41/acme/v2/profiles",
        "/a%2Facme/v2/profiles",
        "/a;x/acme/v2/profiles",
        "/a\\acme\\v2\\profiles",
    ] {
        let answer = harness.send_raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        assert!(matches!(answer.said(), (400, "bad_request") | (404, "not_found")), "{path}: {answer:?}");
    }
    assert!(harness.ads_calls().is_empty());
    for line in ["X-AWS-Region: eu", "X-Amz-User-Agent: sdk", "X-Ad-Server: 1", "Ad-Account-Of-Caller: x"] {
        let answer = harness.send_raw(format!("GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\n{line}\r\n\r\n")).await;
        assert_eq!(answer.status, 200, "{line} is no header of ours");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 24.
async fn an_oauth_client_that_looks_for_its_endpoints_finds_none_at_amazon() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for (method, path) in [
        ("GET", "/mcp/.well-known/openid-configuration"),
        ("GET", "/mcp/.well-known/oauth-protected-resource"),
        ("GET", "/.well-known/oauth-authorization-server/mcp"),
        ("GET", "/.well-known/openid-configuration/mcp"),
        ("POST", "/token"),
        ("POST", "/oauth2/token"),
        ("POST", "/oauth/token"),
        ("POST", "/o2/token"),
        ("POST", "/auth/token"),
        ("POST", "/register"),
        ("GET", "/authorize"),
    ] {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
        let answer = harness.send_raw(request).await;
        assert!(matches!(answer.status, 404 | 405), "{path}: {answer:?}");
        assert_ne!(answer.said().1, "", "{path}: {answer:?}");
    }
    assert!(harness.ads_calls().is_empty());
}
