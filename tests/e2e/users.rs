//! The commands for single users, alone and beside a running sidecar; and records written by other services.

use jiff::SignedDuration;
use serde_json::{Value, json as object};
use world::{Fault, Listener, Rule};

use crate::commands::{CONFIG, DONE, FAILED, HELD, beside, opened, run, sealed, stopped};
use crate::harness::{Harness, eventually};
use crate::raw_http::Wire;

/// Output of `show` for an existing user.
fn shown(text: &str) -> Value {
    assert!(!text.contains("Atz") && !text.contains("gAAAA"), "never a token: {text}");
    serde_json::from_str(text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_shown_alone_and_beside_a_running_sidecar() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("shop-1").await;
    let nobody = beside(&harness, &["users", "show", "nobody"]).await;
    assert_eq!((nobody.code, nobody.out.as_str()), (FAILED, ""));
    assert!(nobody.err.contains("nobody") && !nobody.err.contains("shop-1"), "{}", nobody.err);
    let running = beside(&harness, &["users", "show", "shop-1"]).await;
    assert_eq!(running.code, DONE, "{}", running.err);
    let link = "http://localhost:8001/api/auth/amazon/login?user_id=shop-1";
    assert_eq!(shown(&running.out)["login_url"], link, "at the origin of the redirect URI");
    harness.restart_with("amazon.redirect_uri", "https://app.example/api/auth/amazon/callback").await;
    let elsewhere = beside(&harness, &["users", "show", "shop-1"]).await;
    let link = harness.proxy_url("/api/auth/amazon/login?user_id=shop-1");
    assert_eq!(shown(&elsewhere.out)["login_url"], link.as_str(), "at the listener's own port");
    harness.stop_sidecar().await;
    assert_eq!(run(&harness, &["users", "show", "nobody"], "").await.code, FAILED);
    let alone = run(&harness, &["users", "show", "shop-1"], "").await;
    assert_eq!(alone.code, DONE, "{}", alone.err);
    let (running, alone) = (shown(&running.out), shown(&alone.out));
    for field in ["user_id", "state", "expires_at", "updated_at", "consented_at", "consent_expires_at"] {
        assert_ne!(running[field], Value::Null, "{field}");
        assert_eq!(running[field], alone[field], "{field}");
    }
    assert_eq!((&alone["user_id"], &alone["state"]), (&"shop-1".into(), &"fresh".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_forgotten_alone_and_beside_a_running_sidecar() {
    let mut harness = Harness::with_running_clock("").await;
    for user in ["a", "b", "default"] {
        harness.log_in(user).await;
    }
    let says = |user: &str| if user == "nobody" { "there was nothing stored for" } else { "deleted the tokens of" };
    for user in ["a", "nobody"] {
        let forgotten = beside(&harness, &["users", "forget", user]).await;
        assert_eq!(forgotten.code, DONE, "{}", forgotten.err);
        assert!(forgotten.out.starts_with(&format!("{} {user}", says(user))), "{}", forgotten.out);
    }
    assert_eq!(harness.status_of("a").await["state"], "none");
    harness.stop_sidecar().await;
    for user in ["b", "nobody"] {
        let forgotten = run(&harness, &["users", "forget", user], "").await;
        assert_eq!(forgotten.code, DONE, "{}", forgotten.err);
        assert!(forgotten.out.starts_with(&format!("{} {user}", says(user))), "{}", forgotten.out);
    }
    let listed = run(&harness, &["users", "list"], "").await.out;
    assert!(listed.contains("\ndefault ") && listed.lines().count() == 2, "{listed}");
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_can_be_imported_elsewhere() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("shop").await;
    let unreachable = run(&harness, &["users", "export", "shop"], "").await;
    assert_eq!((unreachable.code, unreachable.out.as_str()), (HELD, ""));
    let running = beside(&harness, &["users", "export", "shop"]).await;
    harness.stop_sidecar().await;
    let wrong = run(&harness, &["users", "export", "shop", "--set", "store.fernet_keys=nonsense"], "").await;
    assert_eq!((wrong.code, wrong.out.as_str()), (CONFIG, ""));
    assert_eq!(run(&harness, &["users", "export", "nobody"], "").await.code, FAILED);

    let token = run(&harness, &["users", "export", "shop"], "").await;
    assert_eq!(token.code, DONE, "{}", token.err);
    let stored = harness.sandbox.world(|world| world.grants[0].refresh_token.clone());
    assert_eq!(token.out, format!("{stored}\n"));
    assert_eq!((running.code, running.out), (DONE, token.out.clone()), "the running sidecar exports the same");
    let records = run(&harness, &["users", "export", "--records", "shop"], "").await.out;
    assert!(!records.contains("Atza|") && !records.contains("Atzr|"), "{records}");
    assert_eq!(opened(&serde_json::from_str::<Value>(&records).unwrap()["shop"]["refresh_token"]), stored);

    let elsewhere = format!("store.path={}", harness.directory.path().join("elsewhere").display());
    for (words, input) in
        [(&["users", "import", "--user", "moved"][..], &token.out), (&["users", "import", "--records", "-"], &records)]
    {
        let taken = run(&harness, &[words, &["--set", &elsewhere]].concat(), input).await;
        assert_eq!((taken.code, taken.out.as_str()), (DONE, "1 grants imported\n"), "{}", taken.err);
    }
    let listed = run(&harness, &["users", "list", "--set", &elsewhere], "").await.out;
    assert_eq!(
        listed.lines().skip(1).map(|line| line.split(' ').next().unwrap()).collect::<Vec<_>>(),
        ["moved", "shop"]
    );
    assert_eq!(harness.sandbox.refreshes(), 2, "each grant was verified");
}

/// Timestamps as services in other languages write them, with and without a time zone.
#[tokio::test(flavor = "multi_thread")]
async fn timestamps_of_python_node_and_go_are_parsed() {
    let mut harness = stopped().await;
    let now = harness.clock.now();
    let (later, before) = (now + SignedDuration::from_secs(3000), now - SignedDuration::from_secs(600));
    let east = jiff::tz::TimeZone::fixed(jiff::tz::offset(2));
    let mut records = serde_json::Map::new();
    for (language, format) in [
        ("python-utcnow", "%Y-%m-%dT%H:%M:%S.123456"),
        ("python-aware", "%Y-%m-%dT%H:%M:%S.123456+00:00"),
        ("python-str", "%Y-%m-%d %H:%M:%S.123456"),
        ("python-whole", "%Y-%m-%dT%H:%M:%S"),
        ("node", "%Y-%m-%dT%H:%M:%S.123Z"),
        ("go-nano", "%Y-%m-%dT%H:%M:%S.123456789Z"),
        ("go-east", "%Y-%m-%dT%H:%M:%S.5+02:00"),
    ] {
        let written = |at: jiff::Timestamp| match language {
            "go-east" => at.to_zoned(east.clone()).strftime(format).to_string(),
            _ => at.strftime(format).to_string(),
        };
        let issued = harness.sandbox.grant();
        records.insert(
            language.into(),
            object!({
                "access_token": sealed(&issued.access_token),
                "refresh_token": sealed(&issued.refresh_token),
                "token_type": "Bearer",
                "expires_at": written(later),
                "updated_at": written(before),
            }),
        );
    }
    let taken =
        run(&harness, &["users", "import", "--offline", "--records", "-"], &Value::from(records.clone()).to_string())
            .await;
    assert_eq!((taken.code, taken.out.as_str()), (DONE, "7 grants imported\n"), "{}", taken.err);
    harness.start_sidecar().await;
    for language in records.keys() {
        let status = harness.status_of(language).await;
        let told: jiff::Timestamp = status["expires_at"].as_str().unwrap().parse().unwrap();
        assert_eq!(told.as_second(), later.as_second(), "{language}");
        assert_eq!(status["consented_at"], Value::Null, "{language}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 17.
// Covers: situation 18.
async fn records_with_pythons_bytes_line_ends_and_epoch_times_are_imported() {
    let mut harness = stopped().await;
    let later = harness.clock.now() + SignedDuration::from_secs(3000);
    let mut records = serde_json::Map::new();
    for (name, before, after, expires_at) in [
        ("seconds", "", "", object!(later.as_second())),
        ("milliseconds", "", "", object!(later.as_millisecond())),
        ("bytes", "b'", "'", object!(later.to_string())),
        ("line-end", "", "\n", object!(later.to_string())),
        ("rfc-1123", "", "", object!(later.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string())),
        ("mongodb", "", "", object!({ "$date": later.as_millisecond() })),
    ] {
        let issued = harness.sandbox.grant();
        records.insert(
            name.into(),
            object!({
                "access_token": format!("{before}{}{after}", sealed(&issued.access_token)),
                "refresh_token": format!("{before}{}{after}", sealed(&issued.refresh_token)),
                "token_type": "bearer",
                "expires_at": expires_at,
                "updated_at": harness.clock.now().as_second(),
            }),
        );
    }
    let input = Value::from(records.clone()).to_string();
    let taken = run(&harness, &["users", "import", "--offline", "--records", "-"], &input).await;
    assert_eq!((taken.code, taken.out.as_str()), (DONE, "6 grants imported\n"), "{}", taken.err);
    assert!(taken.err.contains("warning: bytes: refresh_token stood in Python's b'…'"), "{}", taken.err);
    assert!(!taken.err.contains("gAAAA"), "{}", taken.err);
    harness.start_sidecar().await;
    for name in records.keys() {
        let status = harness.status_of(name).await;
        let told: jiff::Timestamp = status["expires_at"].as_str().unwrap().parse().unwrap();
        assert_eq!(told.as_second(), later.as_second(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 17.
// Covers: situation 18.
async fn a_record_that_cannot_be_imported_is_refused_with_its_field_and_what_it_looks_like() {
    let harness = stopped().await;
    let token = harness.sandbox.grant().refresh_token;
    let other_key = fernet::Fernet::new(&fernet::Fernet::generate_key()).unwrap();
    let record = |field: &str, value: Value| {
        let mut record = object!({ "refresh_token": sealed(&token), "updated_at": "2026-08-01T12:00:00Z" });
        record[field] = value;
        object!({ "shop": record }).to_string()
    };
    for (field, value, looks_like) in [
        ("refresh_token", object!(token), "in clear text"),
        ("refresh_token", object!("gAAAA"), "not a Fernet token"),
        ("refresh_token", object!(other_key.encrypt(token.as_bytes())), "sealed with another key"),
        ("refresh_token", object!(sealed("{}")), "JSON"),
        ("expires_at", object!("soon"), "not a time"),
        ("updated_at", object!({ "$date": [] }), "not a time"),
    ] {
        let ran = run(&harness, &["users", "import", "--records", "-"], &record(field, value)).await;
        assert_eq!((ran.code, ran.out.as_str()), (FAILED, ""), "{field} {looks_like}: {}", ran.err);
        assert!(ran.err.contains(field) && ran.err.contains(looks_like), "{field} {looks_like}: {}", ran.err);
        assert!(!ran.err.contains(&token[5..]), "{}", ran.err);
    }
    assert_eq!(harness.sandbox.refreshes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_of_a_wrong_shape_is_not_sent_to_amazon_by_an_import() {
    let harness = stopped().await;
    let asked = harness.sandbox.refreshes();
    for (input, looks_like) in [
        ("Atza|canary", "an access token"),
        ("ANDMxqpCmqWHJeyzIQxj", "an authorization code"),
        ("Atzr%7Ccanary", "percent-encoded"),
        ("AMAZON_REFRESH_TOKEN=Atzr|canary", "NAME=value"),
        ("b'Atzr|canary'", "b'…'"),
        ("{\"refresh_token\":\"Atzr|canary\"}", "JSON"),
        ("replace-me", "placeholder"),
    ] {
        let ran = run(&harness, &["users", "import", "--user", "shop"], input).await;
        assert_eq!(ran.code, FAILED, "{input}");
        assert!(ran.err.contains(looks_like) && !ran.err.contains("canary"), "{}", ran.err);
    }
    assert_eq!(harness.sandbox.refreshes(), asked);
    let token = harness.sandbox.grant().refresh_token;
    let ran = run(&harness, &["users", "import", "--user", "shop"], &format!("\"{token}\"\n")).await;
    assert_eq!(ran.code, DONE, "{}", ran.err);
    assert!(ran.err.contains("warning: what was read stands in quotes"), "{}", ran.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_who_hangs_up_while_a_token_is_verified_does_not_lose_it() {
    let harness = Harness::start().await;
    let token = harness.sandbox.grant().refresh_token;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa));
    let mut wire = Wire::dial(harness.admin_address()).await;
    let line = "POST /users/import?user_id=anna HTTP/1.1\r\nHost: localhost\r\n";
    wire.send(format!("{line}Content-Length: {}\r\n\r\n{token}", token.len())).await;
    gate.reached(1).await;
    drop(wire);
    // This request's own connection counts.
    eventually("the hang-up is noticed", async || {
        (harness.metric("adsidecar_connections{door=\"admin\"}").await <= 1.0).then_some(())
    })
    .await;
    gate.release();
    // Login with Amazon may have given out another token in exchange.
    eventually("the grant", async || (harness.status_of("anna").await["state"] == "fresh").then_some(())).await;
    assert_eq!(harness.sandbox.refreshes(), 1);
}
