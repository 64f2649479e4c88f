//! What somebody found who looked for siblings of the faults in `whom.rs`: other endpoints, other spellings.

use reqwest::Method;
use world::{Fault, Listener, Rule};

use crate::commands::{USAGE, run};
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

#[tokio::test(flavor = "multi_thread")]
async fn the_endpoints_of_accounts_and_events_refuse_what_they_do_not_understand_and_search_for_nothing() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    const ACCOUNTS: &str = "/api/auth/amazon/accounts";
    const SYNC: &str = "/api/auth/amazon/accounts/sync";
    const EVENTS: &str = "/api/auth/amazon/events";
    let form = Some(("content-type", "application/x-www-form-urlencoded"));
    let json_type = Some(("content-type", "application/json"));
    for (method, target, header, body, named) in [
        (Method::GET, format!("{ACCOUNTS}?user=anna"), None, "", "user"),
        (Method::GET, format!("{ACCOUNTS}?type=Seller"), None, "", "type"),
        (Method::GET, format!("{ACCOUNTS}?type="), None, "", "type"),
        (Method::GET, format!("{ACCOUNTS}?country=Germany"), None, "", "country"),
        (Method::GET, format!("{ACCOUNTS}?country=D%C3%89"), None, "", "country"),
        (Method::GET, format!("{ACCOUNTS}?country="), None, "", "country"),
        (Method::GET, format!("{ACCOUNTS}?user_id="), None, "", "user_id"),
        (Method::GET, format!("{ACCOUNTS}?limit=0"), None, "", "limit"),
        (Method::GET, format!("{ACCOUNTS}?limit=501"), None, "", "limit"),
        (Method::GET, format!("{ACCOUNTS}?kind=seller"), None, "", "kind"),
        (Method::GET, ACCOUNTS.into(), form, "user_id=anna", "body"),
        (Method::GET, ACCOUNTS.into(), Some(("x-ads-region", "eu")), "", "x-ads-region"),
        (Method::POST, SYNC.into(), form, "user=anna", "user"),
        (Method::POST, SYNC.into(), json_type, "{\"user_id\":null}", "JSON"),
        (Method::POST, SYNC.into(), json_type, "{\"user_id\":\"a\",\"user_id\":\"default\"}", "repeated"),
        (Method::POST, SYNC.into(), Some(("content-type", "text/plain")), "anna", "form"),
        (Method::POST, SYNC.into(), Some(("content-type", "multipart/form-data; boundary=x")), "--x--", "form"),
        (Method::POST, format!("{SYNC}?region=eu"), None, "", "region"),
        (Method::POST, format!("{SYNC}?user_id=a&user_id=b"), None, "", "repeated"),
        (Method::GET, format!("{EVENTS}?user=anna"), None, "", "user"),
        (Method::GET, format!("{EVENTS}?user_id="), None, "", "user_id"),
        (Method::GET, format!("{EVENTS}?type=login_done"), None, "", "type"),
        (Method::GET, EVENTS.into(), Some(("x-ads-user", "anna")), "", "x-ads-user"),
        (Method::GET, EVENTS.into(), form, "user_id=anna", "body"),
    ] {
        let mut request = harness.request(method.clone(), &target).body(body);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let answer = request.send().await.unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (400, "bad_request"), "{method} {target} {body}");
        let detail = json(answer).await["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(named), "{method} {target} {body}: {detail}");
    }
    assert!(harness.sandbox.history().is_empty());
    for good in ["?country=de&type=seller&limit=1", ""] {
        assert_eq!(harness.get(&format!("{ACCOUNTS}{good}")).await.status(), 200, "{good}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_or_export_through_the_admin_listener_takes_nothing_that_it_does_not_understand() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    let token = harness.sandbox.grant().refresh_token;
    for (method, target, named) in [
        (Method::POST, "/users/import?user=anna", "user"),
        (Method::POST, "/users/import?user_id=a&user_id=b", "repeated"),
        (Method::POST, "/users/import?user_id=", "user_id"),
        (Method::POST, "/users/import?user_id=a&offline=maybe", "offline"),
        (Method::POST, "/users/import?user_id=a&replace=2", "replace"),
        (Method::POST, "/users/import?user_id=a&records=true&dry_run=true", "Records"),
        (Method::POST, "/users/import?records=true", "records"),
        (Method::POST, "/users/import", "grant already"),
        (Method::GET, "/users/export?user=default", "user"),
        (Method::GET, "/users/export?user_id=default&records=no", "records"),
        (Method::POST, "/restore?dryrun=true", "dryrun"),
        (Method::POST, "/restore?replace=", "replace"),
        (Method::GET, "/dump?user_id=default", "user_id"),
        (Method::POST, "/rotate?key=a;key=b", "fingerprint"),
        (Method::POST, "/rotate?key=00&", "fingerprint"),
        (Method::POST, "/rotate?", "key"),
    ] {
        let mut request = harness.client.request(method.clone(), harness.admin_url(target));
        if method == Method::POST && !target.starts_with("/rotate") {
            request = request.body(token.clone());
        }
        let answer = request.send().await.unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (400, "bad_request"), "{method} {target}");
        let text = json(answer).await.to_string();
        assert!(text.contains(named) && !text.contains(&token[5..]), "{method} {target}: {text}");
    }
    assert_eq!(harness.sandbox.refreshes(), 0, "nothing was sent to Login with Amazon");
    let users = json(harness.get("/api/auth/amazon/status").await).await;
    assert_eq!(users["users"].as_array().unwrap().len(), 1, "{users}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_refuse_what_they_do_not_understand_with_a_usage_error_and_change_nothing() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for (words, named) in [
        (&["doctor", "--pre", "--url", "http://localhost:8001/api"][..], "--url"),
        (&["doctor", "--pre", "--url", "http://localhost:8001/?x"], "--url"),
        (&["doctor", "--pre", "--url", "http://localhost:8001/#x"], "--url"),
        (&["doctor", "--pre", "--url", "http://ann@localhost:8001"], "--url"),
        (&["doctor", "--pre", "--url", "https://localhost:8001"], "--url"),
        (&["doctor", "--pre", "--wait", "5"], "--wait"),
        (&["doctor", "network"], "network"),
        (&["status", "bob"], "bob"),
        (&["status", "--user", "bob"], "--user"),
        (&["login", "bob"], "bob"),
        (&["login", "--user", ""], "--user"),
        (&["login", "--user", "default", "--region", "us"], "--region"),
        (&["accounts", "list", "--country", "Germany"], "--country"),
        (&["accounts", "list", "--type", "sellers"], "--type"),
        (&["accounts", "sync", "bob"], "bob"),
        (&["accounts", "show", "one", "other"], "other"),
        (&["users", "forget"], "<USER>"),
        (&["users", "forget", "a", "b"], "b"),
        (&["users", "import", "--user", "a", "--user", "b"], "--user"),
        (&["users", "import", "--records", "-", "--user", "b"], "--user"),
        (&["notify", "test", "--event", "x"], "--event"),
        (&["wait", "5s"], "5s"),
        (&["health", "--redy"], "--ready"),
        (&["check", "--set", "proxy.listen"], "--set"),
    ] {
        let ran = run(&harness, words, "").await;
        assert_eq!((ran.code, ran.out.as_str()), (USAGE, ""), "{words:?}: {}", ran.err);
        assert!(ran.err.contains(named), "{words:?}: {}", ran.err);
    }
    assert!(harness.sandbox.history().is_empty());
    assert_eq!(harness.status_of("default").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_explains_no_request_that_the_proxy_would_refuse_for_its_method() {
    let harness = Harness::start().await;
    for method in ["get", "TRACE", "CONNECT", "PURGE"] {
        let ran = run(&harness, &["explain", method, "/v2/profiles"], "").await;
        assert_ne!(ran.code, 0, "{method}: {}", ran.out);
        assert!(ran.err.contains("405 method_not_allowed"), "{method}: {}", ran.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sandboxs_control_port_ignores_no_filter() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(503)).at(Listener::Fe).always());
    let calls = harness.sandbox.history().len();
    let rules = async || {
        let overview = harness.client.get(format!("{}/", harness.sandbox.control_url())).send().await.unwrap();
        json(overview).await["trouble"].as_array().unwrap().len()
    };
    for (method, target, body) in [
        (Method::DELETE, "/history?door=na", ""),
        (Method::DELETE, "/history", "{\"door\":\"na\"}"),
        (Method::DELETE, "/trouble?door=na", ""),
        (Method::DELETE, "/trouble", "{\"door\":\"na\"}"),
        (Method::POST, "/trouble?door=na", "{\"trouble\":{\"status\":{\"code\":503}}}"),
        (Method::POST, "/trouble", "{\"trouble\":{\"status\":{\"code\":503}},\"dor\":\"na\"}"),
        (Method::POST, "/limits?door=na", "[{\"per_second\":1,\"burst\":1}]"),
        (Method::POST, "/limits", "[{\"per_second\":1,\"burst\":1,\"pth\":\"/sp\"}]"),
        (Method::POST, "/revoke?refresh_token=Atzr%7Cx", ""),
        (Method::POST, "/revoke", "{\"refreshToken\":\"Atzr|x\"}"),
        (Method::POST, "/consent?want=grant", ""),
        (Method::POST, "/consent", "{\"want\":\"grant\",\"user\":\"x\"}"),
        (Method::POST, "/clock?advance=1h", "{\"advance\":\"2h\"}"),
        (Method::POST, "/clock", "{\"advance\":\"1h\",\"by\":\"2h\"}"),
        (Method::POST, "/events?count=3", "{\"count\":1}"),
        (Method::GET, "/history?dor=na", ""),
        (Method::GET, "/history?door=us", ""),
        (Method::GET, "/history?door=na&door=eu", ""),
        (Method::GET, "/?x=1", ""),
        (Method::GET, "/ca.pem?x=1", ""),
    ] {
        let url = format!("{}{target}", harness.sandbox.control_url());
        let answer = harness.client.request(method.clone(), url).body(body).send().await.unwrap();
        assert_eq!(answer.status(), 400, "{method} {target} {body}");
        assert!(json(answer).await["error"].is_string(), "{method} {target}");
        assert_eq!((harness.sandbox.history().len(), rules().await), (calls, 1), "{method} {target} {body}");
    }
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200, "no grant was revoked");
}
