//! Backup, restore, import and export of a running sidecar, through its admin listener and through the commands.

use std::collections::BTreeMap;

use reqwest::{Method, Response, StatusCode};
use serde_json::{Map, Value, json as object};
use world::{CLIENT_ID, Fault, Listener, Rule};

use crate::commands::{DONE, FAILED, bare_with_input, beside, beside_with, opened, run, sealed, stopped};
use crate::harness::{Harness, code, eventually, json};

/// More than a page of a dump.
const MANY: usize = 350;

fn record(harness: &Harness) -> Value {
    let issued = harness.sandbox.grant();
    object!({
        "access_token": sealed(&issued.access_token),
        "refresh_token": sealed(&issued.refresh_token),
        "token_type": "bearer",
        "expires_at": (harness.clock.now() + jiff::SignedDuration::from_secs(3000)).to_string(),
        "updated_at": harness.clock.now().to_string(),
    })
}

async fn at_admin(harness: &Harness, method: Method, path: &str, body: impl Into<String>) -> Response {
    harness.client.request(method, harness.admin_url(path)).body(body.into()).send().await.unwrap()
}

async fn serves(harness: &Harness, user: &str) -> StatusCode {
    harness.request(Method::GET, "/v2/profiles").header("x-ads-user", user).send().await.unwrap().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sidecar_is_backed_up_and_restored_without_a_stop() {
    let mut harness = Harness::with_running_clock("").await;
    for user in ["anna", "a|nna", "zoe"] {
        harness.log_in(user).await;
    }
    let dump = beside(&harness, &["store", "dump"]).await;
    assert_eq!(dump.code, DONE, "{}", dump.err);
    let records: BTreeMap<String, Value> = serde_json::from_str(&dump.out).unwrap();
    assert_eq!(records.keys().collect::<Vec<_>>(), ["anna", "a|nna", "zoe"]);
    assert!(!dump.out.contains("Atza|") && !dump.out.contains("Atzr|"), "the tokens stay encrypted");
    let consented = harness.status_of("zoe").await["consented_at"].clone();

    assert_eq!(harness.post("/api/auth/amazon/logout?user_id=zoe").await.status(), 204);
    assert_eq!(serves(&harness, "zoe").await, 401);
    let kept = beside_with(&harness, &["store", "restore"], &dump.out).await;
    assert_eq!((kept.code, kept.out.as_str()), (FAILED, "1 grants imported\n"), "{}", kept.err);
    assert!(kept.err.contains("anna: has a grant already") && kept.err.contains("replace"), "{}", kept.err);
    assert_eq!(serves(&harness, "zoe").await, 200, "the restored grant is in use at once");
    assert_eq!(harness.status_of("zoe").await["consented_at"], consented, "a backup keeps the date of the consent");

    let all = beside_with(&harness, &["store", "restore", "-", "--replace"], &dump.out).await;
    assert_eq!((all.code, all.out.as_str()), (DONE, "3 grants imported\n"), "{}", all.err);
    harness.stop_sidecar().await;
    let stopped = run(&harness, &["store", "dump"], "").await;
    let stored: BTreeMap<String, Value> = serde_json::from_str(&stopped.out).unwrap();
    for user in ["anna", "zoe"] {
        assert_eq!(opened(&stored[user]["refresh_token"]), opened(&records[user]["refresh_token"]), "it is on disk");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_token_that_amazon_rotates_is_used_and_stored_later_if_the_store_fails() {
    let mut harness = Harness::start().await;
    let import = async |user: &str| {
        let token = harness.sandbox.grant().refresh_token;
        let url = harness.admin_url(&format!("/users/import?user_id={user}"));
        harness.client.post(url).body(token).send().await.unwrap().status().as_u16()
    };
    fail::cfg("save_refused", "return").unwrap();
    assert_eq!(import("kept").await, 503, "it exists elsewhere");
    assert_eq!(harness.status_of("kept").await["state"], "none");
    harness.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa));
    assert_eq!(import("shop").await, 200, "nobody else has the new token");
    assert_eq!(harness.status_of("shop").await["state"], "fresh");
    fail::remove("save_refused");
    let ready = async || harness.client.get(harness.admin_url("/readyz")).send().await.unwrap().status().as_u16();
    eventually("readiness", async || (ready().await == 200).then_some(())).await;
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.post("/api/auth/amazon/refresh?user_id=shop").await.status(), 200, "with the rotated token");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_amazon_rotates_while_a_command_imports_it_is_printed_sealed_if_the_store_fails() {
    let mut harness = stopped().await;
    let fails = [("FAILPOINTS", "save_refused=return")];
    let import = async |user: &str| {
        let (config, token) = (harness.config_file(), harness.sandbox.grant().refresh_token);
        let arguments = ["--config", config.to_str().unwrap(), "users", "import", "--user", user];
        (bare_with_input(&arguments, &fails, &token).await, token)
    };
    let (kept, _) = import("kept").await;
    assert_eq!((kept.code, kept.out.as_str()), (FAILED, "0 grants imported\n"), "{}: it exists elsewhere", kept.err);
    harness.sandbox.set_fault(Rule::from(Fault::RotateRefreshToken).at(Listener::Lwa));
    let (rotated, token) = import("shop").await;
    assert_eq!(rotated.code, FAILED);
    assert!(rotated.err.contains("--offline --records"), "{}", rotated.err);
    let record: Value = serde_json::from_str(&rotated.out).unwrap();
    assert_ne!(opened(&record["shop"]["refresh_token"]), token);
    let again = run(&harness, &["users", "import", "--offline", "--records", "-"], &rotated.out).await;
    assert_eq!(again.code, DONE, "{}", again.err);
    harness.start_sidecar().await;
    assert_eq!(harness.post("/api/auth/amazon/refresh?user_id=shop").await.status(), 200, "with the rotated token");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_is_imported_and_exported_while_adsidecar_serves() {
    let harness = Harness::with_running_clock("").await;
    let token = harness.sandbox.grant().refresh_token;
    let import = &["users", "import", "--user", "shop"][..];
    let refused = beside_with(&harness, import, "Atzr|unknown").await;
    assert_eq!((refused.code, refused.out.as_str()), (FAILED, ""));
    assert!(refused.err.contains("invalid_grant") && !refused.err.contains("Atzr|unknown"), "{}", refused.err);
    let asked = harness.sandbox.refreshes();
    let taken = beside_with(&harness, import, &format!("{token}\n")).await;
    assert_eq!((taken.code, taken.out.as_str()), (DONE, "1 grants imported\n"), "{}", taken.err);
    assert_eq!(harness.sandbox.refreshes(), asked + 1, "it was verified");
    assert_eq!(serves(&harness, "shop").await, 200);
    assert_eq!(harness.sandbox.refreshes(), asked + 1, "the verified access token is used");
    let again = beside_with(&harness, import, &token).await;
    assert_eq!(again.code, FAILED);
    assert!(again.err.contains("has a grant already"), "{}", again.err);

    let shown = beside(&harness, &["users", "export", "shop"]).await;
    assert_eq!((shown.code, shown.out), (DONE, format!("{token}\n")));
    let sealed = beside(&harness, &["users", "export", "shop", "--records"]).await;
    let records: Value = serde_json::from_str(&sealed.out).unwrap();
    assert_eq!(opened(&records["shop"]["refresh_token"]), token);
    let nobody = beside(&harness, &["users", "export", "nobody"]).await;
    assert_eq!((nobody.code, nobody.out.as_str()), (FAILED, ""));

    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa).always());
    let down = beside_with(&harness, &["users", "import", "--user", "later"], &token).await;
    assert_eq!(down.code, FAILED);
    let offline = beside_with(&harness, &["users", "import", "--user", "later", "--offline"], &token).await;
    assert_eq!(offline.code, DONE, "{}", offline.err);
    harness.sandbox.clear_faults();
    assert_eq!(serves(&harness, "later").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_of_records_into_a_running_sidecar_is_all_or_nothing() {
    let harness = Harness::with_running_clock("").await;
    let import = &["users", "import", "--records", "-", "--offline"][..];
    for bad in [
        object!({ "good": record(&harness), "zzz": { "refresh_token": "canary", "updated_at": 1 } }).to_string(),
        "\"canary\"".to_owned(),
        "{\"good\": canary}".to_owned(),
        format!("{} canary", object!({ "good": record(&harness) })),
    ] {
        let ran = beside_with(&harness, import, &bad).await;
        assert_eq!((ran.code, ran.out.as_str()), (FAILED, ""), "{}", ran.err);
        assert!(ran.err.contains("nothing was imported") && !ran.err.contains("canary"), "{}", ran.err);
        assert_eq!(harness.status_of("good").await["state"], "none");
    }
    let good = object!({ "good": record(&harness) }).to_string();
    let ran = beside_with(&harness, import, &good).await;
    assert_eq!((ran.code, ran.out.as_str()), (DONE, "1 grants imported\n"), "{}", ran.err);
    assert_eq!((serves(&harness, "good").await, harness.sandbox.refreshes()), (StatusCode::OK, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_many_users_is_streamed_in_pages() {
    let harness = Harness::with_running_clock("").await;
    let records: Map<String, Value> = (0..MANY).map(|number| (format!("user-{number:04}"), record(&harness))).collect();
    let restored = at_admin(&harness, Method::POST, "/restore", Value::from(records.clone()).to_string()).await;
    assert_eq!(restored.status(), 200);
    let outcome = json(restored).await;
    assert_eq!((&outcome["imported"], &outcome["refused"]), (&Value::from(MANY), &Value::from(0)));
    let dump = harness.client.get(harness.admin_url("/dump")).send().await.unwrap();
    assert_eq!(dump.headers()["content-type"], "application/json");
    assert!(dump.content_length().is_none(), "it is streamed");
    let dumped: Map<String, Value> = serde_json::from_str(&dump.text().await.unwrap()).unwrap();
    assert_eq!(dumped.keys().collect::<Vec<_>>(), records.keys().collect::<Vec<_>>());
    let empty = Harness::start().await;
    assert_eq!(json(at_admin(&empty, Method::GET, "/dump", "").await).await, object!({}));

    // One record may not fill the memory.
    let huge = format!("{{\"huge\": \"{}\"}}", "x".repeat(200_000));
    let refused = at_admin(&empty, Method::POST, "/restore", huge).await;
    assert_eq!((refused.status(), code(&refused)), (StatusCode::BAD_REQUEST, "bad_request"));
    let refused = json(refused).await;
    assert!(refused["detail"].as_str().unwrap().contains("64 KiB"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_from_elsewhere_exports_and_backs_up_with_the_caller_token_alone() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sets.push(("admin.public_url".into(), "https://ads.example.com/".into()));
    harness.restart_with("proxy.caller_token", "one-token").await;
    for (method, path) in [
        (Method::GET, "/users/export?user_id=default"),
        (Method::GET, "/dump"),
        (Method::POST, "/restore"),
        (Method::POST, "/users/import?user_id=shop"),
    ] {
        let ask = |token: Option<&'static str>| {
            let request = harness.client.request(method.clone(), harness.admin_url(path));
            let request = request.header("host", "ads.example.com");
            let request = token.map_or(request.try_clone(), |token| Some(request.header("x-ads-sidecar-token", token)));
            async move { request.unwrap().send().await.unwrap() }
        };
        for token in [None, Some("another-token")] {
            let refused = ask(token).await;
            assert_eq!((refused.status().as_u16(), code(&refused)), (407, "caller_unauthorized"), "{path}");
            assert!(!refused.text().await.unwrap().contains("Atzr"), "{path}");
        }
        assert_ne!(ask(Some("one-token")).await.status(), 407, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_operator_backs_up_and_restores_and_nothing_is_ignored() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.restart_with("proxy.caller_token", "one-token").await;
    let endpoints = [
        (Method::GET, "/dump"),
        (Method::POST, "/restore"),
        (Method::POST, "/users/import"),
        (Method::GET, "/users/export"),
    ];
    for (method, path) in &endpoints {
        let ask = |name: &'static str, value: &'static str| {
            let request = harness.client.request(method.clone(), harness.admin_url(path)).header(name, value);
            async move { request.send().await.unwrap() }
        };
        let answer = ask("host", "evil.test").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (403, "host_not_allowed"), "{path}");
        for browser in [("origin", "http://localhost:9464"), ("sec-fetch-site", "same-origin")] {
            let answer = ask(browser.0, browser.1).await;
            assert_eq!((answer.status().as_u16(), code(&answer)), (403, "cross_site"), "{path}");
        }
        let other = if method == Method::GET { Method::DELETE } else { Method::GET };
        assert_eq!(at_admin(&harness, other, path, "").await.status(), 405, "{path}");
        let unknown = harness.client.request(method.clone(), harness.admin_url(&format!("{path}?nope=1")));
        let unknown = unknown.header("x-ads-sidecar-token", "one-token").send().await.unwrap();
        assert_eq!((unknown.status().as_u16(), code(&unknown)), (400, "bad_request"), "{path}");
    }
    // A caller on this machine is an operator, with or without the token: a loopback address and a loopback `Host`.
    for path in ["/users/export?user_id=default", "/dump"] {
        let shown = at_admin(&harness, Method::GET, path, "").await;
        assert_eq!(shown.status(), 200, "{path}");
        assert_eq!(shown.headers()["cache-control"], "no-store", "{path}");
        assert_eq!(shown.text().await.unwrap().contains("Atzr|"), path != "/dump", "the dump is encrypted");
    }
    for (path, body) in [
        ("/users/import?user_id=a%20b", "Atzr|x"),
        ("/users/import?user_id=shop&replace=maybe", "Atzr|x"),
        ("/users/import?user_id=shop&user_id=shop", "Atzr|x"),
        ("/users/import?user_id=shop&records=true", "{}"),
        ("/users/import?user_id=shop", CLIENT_ID),
        ("/restore", "[]"),
    ] {
        let answer = at_admin(&harness, Method::POST, path, body).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (400, "bad_request"), "{path}");
    }
}
