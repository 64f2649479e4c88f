//! Reloading the configuration without a restart.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use reqwest::Method;
use world::{CLIENT_SECRET, Fault};

use crate::commands::Serving;
use crate::harness::{Harness, code, eventually, json};

/// Appends to the sidecar's configuration file.
fn append(harness: &Harness, text: &str) {
    let file = harness.config_file();
    let before = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("{before}\n{text}\n")).unwrap();
}

async fn reload(harness: &Harness) -> reqwest::Response {
    harness.client.post(harness.admin_url("/reload")).send().await.unwrap()
}

const ACCOUNT: &str = "[[account]]\nname = \"acme\"\nprofile_id = \"7\"";

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 104.
async fn an_invalid_reload_is_rejected_and_changes_nothing() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    for (wrong, named) in [
        ("[proxy.nonsense]\nx = 1", "proxy.nonsense"),
        ("[refresh]\nmargin = \"soon\"", "refresh.margin"),
        ("[login]\nlisten = \"127.0.0.1:0\"", "login.listen"),
    ] {
        let good = fs::read_to_string(harness.config_file()).unwrap();
        append(&harness, &format!("{wrong}\n{ACCOUNT}"));
        let refused = reload(&harness).await;
        assert_eq!((refused.status().as_u16(), code(&refused)), (400, "bad_request"));
        let detail = json(refused).await["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(named), "{detail}");
        assert_eq!(harness.metric("adsidecar_config_reload_success").await, 0.0);
        assert_eq!(code(&harness.get("/a/acme/v2/profiles").await), "unknown_account");
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        fs::write(harness.config_file(), good).unwrap();
        assert_eq!(reload(&harness).await.status(), 200);
        assert_eq!(harness.metric("adsidecar_config_reload_success").await, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_configuration_file_is_reloaded_automatically() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    append(&harness, ACCOUNT);
    eventually("the new account", async || (harness.get("/a/acme/v2/profiles").await.status() == 200).then_some(()))
        .await;
}

/// As the kubelet updates a volume: `..data` is a symbolic link to a directory, and is replaced by a link to another
/// one.
fn mount(secret: &Path, revision: &str, text: &str) {
    let data = secret.join(revision);
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("client-secret"), text).unwrap();
    let new = secret.join("..data_tmp");
    symlink(revision, &new).unwrap();
    fs::rename(&new, secret.join("..data")).unwrap();
    if fs::symlink_metadata(secret.join("client-secret")).is_err() {
        symlink("..data/client-secret", secret.join("client-secret")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 105.
async fn a_rotated_client_secret_is_reloaded_from_its_file_and_no_request_fails() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let secret = harness.directory.path().join("secret");
    mount(&secret, "..1", CLIENT_SECRET);
    let file = secret.join("client-secret");
    harness.restart_with("amazon.client_secret_file", file.to_str().unwrap()).await;

    harness.sandbox.world(|world| world.clients[0].secrets = vec!["amzn1.oa2-cs.v1.next".into()]);
    mount(&secret, "..2", "amzn1.oa2-cs.v1.next\n");
    eventually("a refresh with the new secret", async || {
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        let refreshed = harness.post("/api/auth/amazon/refresh").await;
        let state = json(refreshed).await["state"].clone();
        // Past the backoff after a failed refresh.
        harness.advance(60);
        (state == "fresh").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 105.
async fn a_missing_or_empty_secret_file_leaves_the_old_secret_in_use() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let secret = harness.directory.path().join("secret");
    mount(&secret, "..1", "first-token");
    harness.restart_with("proxy.caller_token_file", secret.join("client-secret").to_str().unwrap()).await;
    let call = async |token: &str| {
        let call =
            harness.request(Method::GET, "/v2/profiles").header("x-ads-sidecar-token", token).send().await.unwrap();
        call.status().as_u16()
    };
    let reloads = async |well: f64| {
        eventually("the reload", async || {
            (harness.metric("adsidecar_config_reload_success").await == well).then_some(())
        })
        .await;
    };
    assert_eq!((call("first-token").await, call("second-token").await), (200, 407));
    mount(&secret, "..2", "");
    reloads(0.0).await;
    assert_eq!(call("first-token").await, 200);
    fs::remove_file(secret.join("..data")).unwrap();
    let gone = harness.client.post(harness.admin_url("/reload")).send().await.unwrap();
    assert_eq!(gone.status(), 400);
    assert_eq!(call("first-token").await, 200);
    mount(&secret, "..3", "second-token\n");
    reloads(1.0).await;
    assert_eq!((call("first-token").await, call("second-token").await), (407, 200));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 105.
async fn a_refresh_token_in_a_file_is_adopted_when_the_file_changes() {
    let mut harness = Harness::start().await;
    let secret = harness.directory.path().join("secret");
    mount(&secret, "..1", "Atzr|unknown-to-amazon");
    harness.restart_with("amazon.refresh_token_file", secret.join("client-secret").to_str().unwrap()).await;
    assert_eq!(code(&harness.get("/v2/profiles").await), "login_required");
    mount(&secret, "..2", &harness.sandbox.grant().refresh_token);
    eventually("the grant", async || (harness.get("/v2/profiles").await.status() == 200).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 105.
async fn sighup_reloads_the_configuration() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let mut serving = Serving::start(&harness, &[]).await;
    serving.signal("HUP");
    serving.says("the configuration was reloaded").await;
    serving.signal("TERM");
    assert_eq!(serving.ended().await.0, Some(0));
    assert!(
        !serving.log.lock().unwrap().contains("a file of the configuration changed"),
        "the signal alone caused the reload"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pending_login_survives_a_reload() {
    let harness = Harness::start().await;
    let begun = json(harness.get("/api/auth/amazon/login").await).await;
    assert_eq!(reload(&harness).await.status(), 200);
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    assert_eq!(harness.get(&callback).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_survives_a_reload() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Fault::Gate);
    let call = tokio::spawn(harness.client.get(harness.proxy_url("/v2/profiles")).send());
    gate.reached(1).await;
    assert_eq!(reload(&harness).await.status(), 200);
    gate.release();
    assert_eq!(call.await.unwrap().unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_in_the_configuration_is_adopted_on_reload() {
    let harness = Harness::start().await;
    assert_eq!(code(&harness.get("/v2/profiles").await), "login_required");
    let issued = harness.sandbox.grant();
    let text = fs::read_to_string(harness.config_file()).unwrap();
    let token = format!("[amazon]\nrefresh_token = {:?}", issued.refresh_token);
    fs::write(harness.config_file(), text.replace("[amazon]", &token)).unwrap();
    assert_eq!(reload(&harness).await.status(), 200);
    eventually("the grant", async || (harness.get("/v2/profiles").await.status() == 200).then_some(())).await;
}
