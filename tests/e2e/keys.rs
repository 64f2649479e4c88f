//! Fernet keys: wrong keys, unusual encodings, rotation, and other requirements for opening a store.

use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use reqwest::Method;
use serde_json::{Value, json as object};
use world::{CLIENT_ID, CLIENT_SECRET};

use crate::commands::{CONFIG, DONE, FAILED, OTHER_KEY, Serving, bare_with, beside, run, sealed, stopped};
use crate::harness::{FERNET_KEY, Harness, code, eventually, json};

#[tokio::test(flavor = "multi_thread")]
async fn a_key_rotation_reseals_all_records_with_the_first_key() {
    let mut harness = stopped().await;
    let both = format!("store.fernet_keys={OTHER_KEY},{FERNET_KEY}");
    let rotated = run(&harness, &["key", "rotate", "--set", &both], "").await;
    assert_eq!(rotated.code, DONE, "{}", rotated.err);
    assert!(rotated.out.starts_with("1 grants re-encrypted"), "{}", rotated.out);
    let again = run(&harness, &["key", "rotate", "--set", &both], "").await;
    assert!(again.out.starts_with("0 grants"), "{}", again.out);
    assert_eq!(run(&harness, &["users", "list"], "").await.code, CONFIG, "the old key alone opens nothing");
    harness.sets.push(("store.fernet_keys".into(), OTHER_KEY.into()));
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

fn fingerprint(key: &str) -> String {
    Keyring::new(&[Secret::new(key)]).unwrap().first().to_string()
}

/// The number of records sealed with `key`, from the metrics.
async fn sealed_with(harness: &Harness, key: &str) -> f64 {
    harness.metric(&format!("adsidecar_store_records{{key=\"{key}\"}}")).await
}

/// A setup whose keys are in a file that contains `keys`.
async fn with_key_file(keys: &str) -> (Harness, String) {
    let mut harness = Harness::with_running_clock("").await;
    let file = harness.directory.path().join("keys").display().to_string();
    std::fs::write(&file, keys).unwrap();
    harness.restart_with("store.fernet_keys_file", &file).await;
    harness.log_in("default").await;
    (harness, format!("store.fernet_keys_file={file}"))
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 45.
async fn a_running_sidecar_adopts_new_keys_only_through_a_rotation() {
    let (mut harness, set) = with_key_file(FERNET_KEY).await;
    let keys = set.split('=').nth(1).unwrap().to_owned();
    let reload = async || harness.client.post(harness.admin_url("/reload")).send().await.unwrap();
    let (old, new) = (fingerprint(FERNET_KEY), fingerprint(OTHER_KEY));
    assert_eq!((sealed_with(&harness, &old).await, sealed_with(&harness, &new).await), (1.0, 0.0));

    // Keys that cannot open the stored records are rejected, and so is a command with other keys than the sidecar's.
    std::fs::write(&keys, OTHER_KEY).unwrap();
    let refused = beside(&harness, &["key", "rotate", "--set", &set]).await;
    assert_eq!((refused.code, refused.out.as_str()), (CONFIG, ""), "{}", refused.err);
    std::fs::write(&keys, format!("{OTHER_KEY},{FERNET_KEY}")).unwrap();
    let other = beside(&harness, &["key", "rotate"]).await;
    assert_eq!((other.code, other.out.as_str()), (CONFIG, ""));
    assert!(other.err.contains(&old) && other.err.contains(&new) && !other.err.contains(FERNET_KEY), "{}", other.err);

    let answer = reload().await;
    assert_eq!(answer.status(), 400, "a reload does not change keys");
    let detail = json(answer).await["detail"].to_string();
    assert!(detail.contains("store.fernet_keys") && detail.contains("adsidecar key rotate"), "{detail}");
    assert_eq!(sealed_with(&harness, &old).await, 1.0, "the new key was not adopted");

    let rotated = beside(&harness, &["key", "rotate", "--set", &set]).await;
    assert_eq!(rotated.code, DONE, "{}", rotated.err);
    assert!(rotated.out.starts_with("1 grants re-encrypted"), "{}", rotated.out);
    assert_eq!((sealed_with(&harness, &old).await, sealed_with(&harness, &new).await), (0.0, 1.0));
    assert_eq!(harness.metric("adsidecar_config_reload_success").await, 1.0);
    assert_eq!(reload().await.status(), 200);
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);

    std::fs::write(&keys, OTHER_KEY).unwrap();
    let dropped = beside(&harness, &["key", "rotate", "--set", &set]).await;
    assert_eq!(dropped.code, DONE, "the old key is removed in the same way: {}", dropped.err);
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_the_store_could_not_take_is_added_by_the_next_reload() {
    let (harness, set) = with_key_file(FERNET_KEY).await;
    let keys = set.split('=').nth(1).unwrap().to_owned();
    let reload = async || harness.client.post(harness.admin_url("/reload")).send().await.unwrap().status().as_u16();
    let mut copies = harness.store_path().into_os_string();
    copies.push(".copies");
    let away = harness.directory.path().join("away");
    std::fs::rename(&copies, &away).unwrap();
    std::fs::write(&keys, format!("{FERNET_KEY},{OTHER_KEY}")).unwrap();
    assert_eq!(reload().await, 400);
    std::fs::rename(&away, &copies).unwrap();
    assert_eq!(reload().await, 200);
    let (ring, issued) = (Keyring::new(&[Secret::new(OTHER_KEY)]).unwrap(), harness.sandbox.grant());
    let record = object!({ "anna": {
        "access_token": ring.seal(issued.access_token.as_bytes()),
        "refresh_token": ring.seal(issued.refresh_token.as_bytes()),
        "token_type": "bearer",
        "expires_at": "2026-08-01T13:00:00Z",
        "updated_at": "2026-08-01T12:00:00Z",
    } });
    let import = harness.client.post(harness.admin_url("/users/import?records=true")).body(record.to_string());
    let imported = import.send().await.unwrap();
    assert_eq!(imported.status(), 200, "{}", imported.text().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 45.
async fn a_killed_rotation_resumes_after_the_restart() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let record = |name: u32| {
        let (at, token) = ("2026-01-01T11:00:00", sealed(&format!("Atzr|{name}")));
        object!({ "refresh_token": token, "updated_at": at })
    };
    let many: serde_json::Map<_, _> = (0..100).map(|name| (format!("user-{name}"), record(name))).collect();
    let taken =
        run(&harness, &["users", "import", "--offline", "--records", "-"], &Value::from(many).to_string()).await;
    assert_eq!(taken.code, DONE, "{}", taken.err);

    let keys = harness.directory.path().join("keys").display().to_string();
    std::fs::write(&keys, format!("{OTHER_KEY},{FERNET_KEY}")).unwrap();
    let set = format!("store.fernet_keys_file={keys}");
    let (old, new) = (fingerprint(FERNET_KEY), fingerprint(OTHER_KEY));
    let counts = async |serving: &Serving| {
        let text =
            harness.client.get(format!("http://{}/metrics", serving.admin)).send().await.unwrap().text().await.unwrap();
        let count = |key: &str| {
            let series = format!("adsidecar_store_records{{key=\"{key}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&series)?.parse::<u32>().ok()).unwrap_or(0)
        };
        (count(&old), count(&new))
    };
    // The users have been idle for long, so that nothing but the rotation writes.
    let arguments = ["--set", &set];
    let mut serving = Serving::start(&harness, &arguments).await;
    assert_eq!(counts(&serving).await, (100, 0), "new keys alone do not start a rotation");
    let asked = harness.client.post(format!("http://{}/rotate?key={new}", serving.admin)).send().await.unwrap();
    assert_eq!(json(asked).await["running"], true);
    let (left, _) = eventually("the rotation to be half done", async || {
        let (left, done) = counts(&serving).await;
        (done > 0).then_some((left, done))
    })
    .await;
    assert!(left > 0, "the process was killed in the middle of the rotation");
    serving.signal("KILL");
    serving.ended().await;

    let serving = Serving::start(&harness, &arguments).await;
    eventually("the end of the rotation", async || (counts(&serving).await == (0, 100)).then_some(())).await;
    let told = harness.client.get(format!("http://{}/rotate", serving.admin)).send().await.unwrap();
    let told = json(told).await;
    assert_eq!((&told["left"], &told["unreadable"], &told["error"]), (&0.into(), &0.into(), &Value::Null));
    drop(serving);
    std::fs::write(&keys, OTHER_KEY).unwrap();
    let listed = run(&harness, &["users", "list", "--set", &set], "").await;
    assert_eq!((listed.code, listed.out.lines().count()), (DONE, 101), "{}", listed.err);
    assert!(!listed.out.contains("unreadable"));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 46.
async fn a_key_removed_too_early_requires_logins_until_it_is_restored() {
    let (mut harness, set) = with_key_file(FERNET_KEY).await;
    let keys = set.split('=').nth(1).unwrap().to_owned();
    harness.log_in("anna").await;
    harness.log_in("bob").await;
    harness.stop_sidecar().await;
    std::fs::write(&keys, format!("{OTHER_KEY},{FERNET_KEY}")).unwrap();
    harness.start_sidecar().await;
    harness.log_in("anna").await;
    harness.stop_sidecar().await;
    std::fs::write(&keys, OTHER_KEY).unwrap();
    harness.start_sidecar().await;
    let call = async |harness: &Harness, user: &str| {
        let call = harness.request(Method::GET, "/v2/profiles").header("x-ads-user", user).send().await.unwrap();
        (call.status().as_u16(), code(&call).to_owned())
    };
    assert_eq!(call(&harness, "anna").await, (200, String::new()));
    assert_eq!(call(&harness, "bob").await, (401, "login_required".to_owned()));
    assert_eq!(sealed_with(&harness, "unknown").await, 2.0, "the records of bob and the default user");
    assert_eq!(harness.metric("adsidecar_undecryptable_records").await, 2.0);
    let rotated = beside(&harness, &["key", "rotate", "--set", &set]).await;
    assert_eq!(rotated.code, FAILED, "an incomplete rotation fails");
    assert!(rotated.err.contains("keep the old keys"), "{}", rotated.err);

    harness.stop_sidecar().await;
    let dump: Value = serde_json::from_str(&run(&harness, &["store", "dump", "--set", &set], "").await.out).unwrap();
    assert_eq!(dump.as_object().unwrap().len(), 3, "nothing is deleted");
    std::fs::write(&keys, format!("{OTHER_KEY},{FERNET_KEY}")).unwrap();
    harness.start_sidecar().await;
    assert_eq!(call(&harness, "bob").await, (200, String::new()));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 44.
// Covers: situation 16.
async fn a_key_is_accepted_with_file_whitespace_and_anything_else_exits_with_78() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    let required = [("AMAZON_CLIENT_ID", CLIENT_ID), ("AMAZON_CLIENT_SECRET", CLIENT_SECRET)];
    let check = async |key: (&str, &str)| bare_with(&["check"], &[&required[..], &[key]].concat()).await;
    let doubled = format!("{FERNET_KEY}{FERNET_KEY}");
    let (quoted, single) = (format!("\"{FERNET_KEY}\""), format!("'{FERNET_KEY}'"));
    let standard = FERNET_KEY.replace('-', "+").replace('_', "/");
    let broken = format!("{}\n{}", &FERNET_KEY[..20], &FERNET_KEY[20..]);
    let hex = "a5".repeat(32);
    let named = format!("FERNET_KEY={FERNET_KEY}");
    let bad = [
        "changeme",
        &FERNET_KEY[..43 - 4],
        &FERNET_KEY[4..],
        &doubled,
        &quoted[1..],
        &single[..45],
        &broken,
        &hex,
        &named,
        "=",
        "ééééééééééééééééééééééééééééééééééééééééééé=",
    ];
    for key in bad {
        std::fs::write(&file, key).unwrap();
        for given in [("FERNET_KEY", key), ("FERNET_KEY_FILE", file.to_str().unwrap())] {
            let ran = check(given).await;
            assert_eq!((ran.code, ran.out.as_str()), (CONFIG, ""), "{key:?} by {}", given.0);
            let remedy = ran.err.contains("adsidecar key new") || ran.err.contains("copy it once more");
            assert!(ran.err.contains("store.fernet_keys") && remedy, "{}", ran.err);
            assert!(key == "=" || !ran.err.contains(key), "{}", ran.err);
        }
    }
    for empty in ["", " ", "\n"] {
        assert_eq!(check(("FERNET_KEY", empty)).await.code, CONFIG, "{empty:?}");
        std::fs::write(&file, empty).unwrap();
        assert_eq!(check(("FERNET_KEY_FILE", file.to_str().unwrap())).await.code, CONFIG, "{empty:?} in a file");
    }
    for good in [
        FERNET_KEY.to_owned(),
        standard,
        quoted,
        single,
        format!("{FERNET_KEY}\n"),
        format!("{FERNET_KEY}\r\n"),
        format!("  {FERNET_KEY}  \n\n"),
        format!("{FERNET_KEY},{OTHER_KEY}\n"),
        format!("{FERNET_KEY}\n{OTHER_KEY}\n"),
    ] {
        std::fs::write(&file, &good).unwrap();
        let ran = check(("FERNET_KEY_FILE", file.to_str().unwrap())).await;
        assert_eq!(ran.code, DONE, "{good:?}: {}", ran.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 53.
async fn a_read_only_volume_is_reported_with_its_path_and_the_user() {
    let harness = stopped().await;
    // No user, not even root, can create directories there.
    let ran = run(&harness, &["serve", "--set", "store.path=/sys/adsidecar/store"], "").await;
    assert_eq!((ran.code, ran.out.as_str()), (FAILED, ""));
    assert!(ran.err.contains("/sys/adsidecar") && ran.err.contains("uid "), "{}", ran.err);
    assert!(ran.err.contains("store.path"), "the message names the setting: {}", ran.err);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 39.
async fn a_damaged_database_is_rebuilt_and_reported_and_no_request_fails() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    assert_eq!(harness.metric("adsidecar_store_recoveries_total").await, 0.0);
    harness.stop_sidecar().await;
    std::fs::write(harness.store_path().join("db"), [0xAA; 4096]).unwrap();
    harness.start_sidecar().await;
    assert_eq!(harness.metric("adsidecar_store_recoveries_total").await, 1.0);
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    eventually("readiness", async || {
        let ready = harness.client.get(harness.admin_url("/readyz")).send().await.unwrap();
        (ready.status() == 200).then_some(())
    })
    .await;
}
