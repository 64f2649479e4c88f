//! The commands about single users, alone and beside a running sidecar; and records that other services have written.

use jiff::SignedDuration;
use serde_json::{Value, json as object};

use crate::commands::{CONFIG, DONE, FAILED, HELD, beside, opened, run, sealed, stopped};
use crate::rig::Rig;

/// `show` of a user who is there.
fn shown(text: &str) -> Value {
    assert!(!text.contains("Atz") && !text.contains("gAAAA"), "never a token: {text}");
    serde_json::from_str(text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_shown_alone_and_beside_a_running_sidecar() {
    let mut rig = Rig::with_running_clock("").await;
    rig.log_in("shop-1").await;
    let nobody = beside(&rig, &["users", "show", "nobody"]).await;
    assert_eq!((nobody.code, nobody.out.as_str()), (FAILED, ""));
    assert!(nobody.err.contains("nobody") && !nobody.err.contains("shop-1"), "{}", nobody.err);
    let running = beside(&rig, &["users", "show", "shop-1"]).await;
    assert_eq!(running.code, DONE, "{}", running.err);
    rig.stop_sidecar().await;
    assert_eq!(run(&rig, &["users", "show", "nobody"], "").await.code, FAILED);
    let alone = run(&rig, &["users", "show", "shop-1"], "").await;
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
    let mut rig = Rig::with_running_clock("").await;
    for user in ["a", "b", "default"] {
        rig.log_in(user).await;
    }
    for user in ["a", "nobody"] {
        let forgotten = beside(&rig, &["users", "forget", user]).await;
        assert_eq!((forgotten.code, forgotten.out.as_str()), (DONE, ""), "{}", forgotten.err);
    }
    assert_eq!(rig.status_of("a").await["state"], "none");
    rig.stop_sidecar().await;
    for user in ["b", "nobody"] {
        let forgotten = run(&rig, &["users", "forget", user], "").await;
        assert_eq!((forgotten.code, forgotten.out.as_str()), (DONE, ""), "{}", forgotten.err);
    }
    let listed = run(&rig, &["users", "list"], "").await.out;
    assert!(listed.starts_with("default\t") && listed.lines().count() == 1, "{listed}");
    rig.start_sidecar().await;
    assert_eq!(rig.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_needs_the_store_to_itself_and_can_be_imported() {
    let mut rig = Rig::with_running_clock("").await;
    rig.log_in("shop").await;
    let held = beside(&rig, &["users", "export", "shop"]).await;
    assert_eq!((held.code, held.out.as_str()), (HELD, ""));
    rig.stop_sidecar().await;
    let wrong = run(&rig, &["users", "export", "shop", "--set", "store.fernet_keys=nonsense"], "").await;
    assert_eq!((wrong.code, wrong.out.as_str()), (CONFIG, ""));
    assert_eq!(run(&rig, &["users", "export", "nobody"], "").await.code, FAILED);

    let token = run(&rig, &["users", "export", "shop"], "").await;
    assert_eq!(token.code, DONE, "{}", token.err);
    let stored = rig.sandbox.world(|world| world.grants[0].refresh_token.clone());
    assert_eq!(token.out, format!("{stored}\n"));
    let records = run(&rig, &["users", "export", "--records", "shop"], "").await.out;
    assert!(!records.contains("Atz"), "{records}");
    assert_eq!(opened(&serde_json::from_str::<Value>(&records).unwrap()["shop"]["refresh_token"]), stored);

    let elsewhere = format!("store.path={}", rig.directory.path().join("elsewhere").display());
    for (words, input) in
        [(&["users", "import", "--user", "moved"][..], &token.out), (&["users", "import", "--records", "-"], &records)]
    {
        let taken = run(&rig, &[words, &["--set", &elsewhere]].concat(), input).await;
        assert_eq!((taken.code, taken.out.as_str()), (DONE, "1 grants imported\n"), "{}", taken.err);
    }
    let listed = run(&rig, &["users", "list", "--set", &elsewhere], "").await.out;
    assert_eq!(listed.lines().map(|line| line.split('\t').next().unwrap()).collect::<Vec<_>>(), ["moved", "shop"]);
    assert_eq!(rig.sandbox.refreshes(), 2, "each was verified");
}

/// As services in other languages write times, with and without a zone.
#[tokio::test(flavor = "multi_thread")]
async fn times_are_read_as_python_node_and_go_write_them() {
    let mut rig = stopped().await;
    let now = rig.clock.now();
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
        let issued = rig.sandbox.grant();
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
        run(&rig, &["users", "import", "--offline", "--records", "-"], &Value::from(records.clone()).to_string()).await;
    assert_eq!((taken.code, taken.out.as_str()), (DONE, "7 grants imported\n"), "{}", taken.err);
    rig.start_sidecar().await;
    for language in records.keys() {
        let status = rig.status_of(language).await;
        let told: jiff::Timestamp = status["expires_at"].as_str().unwrap().parse().unwrap();
        assert_eq!(told.as_second(), later.as_second(), "{language}");
        assert_eq!(status["consented_at"], Value::Null, "{language}");
    }
}
