//! Logins interrupted by a restart, a kill, a logout, another login, or a flood of logins.

use std::path::PathBuf;

use adsidecar::domain::grant::{Grant, RefreshToken};
use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use adsidecar::store::{PendingGrant, Settings, TokenStore};
use reqwest::{Method, Response};
use serde_json::Value;
use world::{Fault, Listener, Rule, SCOPE};

use crate::commands::{Serving, run};
use crate::harness::{FERNET_KEY, Harness, code, eventually, json};

const LOGIN: &str = "/api/auth/amazon/login";
const CONFIRMED: &str = "[login]\nconfirm = true\n";
const TOOLS: &str = "amzn1.account.SANDBOXTOOLS";
const BOOKS: &str = "amzn1.account.SANDBOXBOOKS";

/// Starts a login as a server does. Returns the URL of the consent page.
async fn begun(harness: &Harness, query: &str) -> String {
    json(harness.get(&format!("{LOGIN}?{query}")).await).await["auth_url"].as_str().unwrap().to_owned()
}

fn refused(answer: &Response) {
    assert_eq!((answer.status().as_u16(), code(answer)), (400, "state_invalid"));
}

/// The files of the pending grants.
fn waiting(harness: &Harness) -> Vec<PathBuf> {
    let copies = std::fs::read_dir(format!("{}.copies", harness.store_path().display())).unwrap();
    let paths = copies.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|kind| kind == "waiting")).collect()
}

async fn restart(harness: &mut Harness) {
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 87.
async fn a_pending_login_survives_a_restart_and_its_state_is_valid_once() {
    let mut harness = Harness::start().await;
    let callback = harness.consent(&begun(&harness, "user_id=shop").await).await;
    let late = begun(&harness, "user_id=late").await;
    restart(&mut harness).await;
    for file in std::fs::read_dir(format!("{}.copies", harness.store_path().display())).unwrap() {
        let text = String::from_utf8_lossy(&std::fs::read(file.unwrap().path()).unwrap()).into_owned();
        assert!(!text.contains("verifier") && !text.contains("shop"), "the file of pending logins is sealed: {text}");
    }
    assert_eq!(json(harness.get(&callback).await).await["user_id"], "shop");
    restart(&mut harness).await;
    refused(&harness.get(&callback).await);
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 1);

    harness.advance(600);
    restart(&mut harness).await;
    refused(&harness.get(&harness.consent(&late).await).await);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 87.
async fn a_pending_login_survives_a_kill() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let mut serving = Serving::start(&harness, &[]).await;
    let begun = json(harness.client.get(serving.url(LOGIN)).send().await.unwrap()).await;
    let file = PathBuf::from(format!("{}.copies/logins", harness.store_path().display()));
    eventually("the login to be on disk", async || std::fs::metadata(&file).ok().filter(|file| file.len() > 300)).await;
    serving.signal("KILL");
    serving.ended().await;
    let serving = Serving::start(&harness, &[]).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    let ended = harness.client.get(serving.url(&callback)).send().await.unwrap();
    assert_eq!(json(ended).await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 87.
async fn a_pending_grant_survives_a_restart_and_expires_after_ten_minutes() {
    let mut harness = Harness::with(CONFIRMED).await;
    let pending = async |harness: &Harness, user: &str| -> String {
        let auth_url = begun(harness, &format!("user_id={user}")).await;
        let ended = json(harness.get(&harness.consent(&auth_url).await).await).await;
        format!("/api/auth/amazon/confirm?grant={}", ended["grant"].as_str().unwrap())
    };
    let (kept, late, out) =
        (pending(&harness, "kept").await, pending(&harness, "late").await, pending(&harness, "out").await);
    assert_eq!(waiting(&harness).len(), 3);
    for path in waiting(&harness) {
        assert!(std::fs::read(path).unwrap().starts_with(b"gAAAA"), "the file is sealed as a whole");
    }
    assert_eq!(harness.post("/api/auth/amazon/logout?user_id=out").await.status(), 204);
    assert_eq!(waiting(&harness).len(), 2, "a logout also deletes pending grants");
    refused(&harness.post(&out).await);

    restart(&mut harness).await;
    assert_eq!(harness.status_of("kept").await["state"], "none", "it is still pending");
    eventually("the previous grants", async || (harness.post(&kept).await.status() == 200).then_some(())).await;
    assert_eq!(harness.status_of("kept").await["state"], "fresh");
    refused(&harness.post(&kept).await);
    assert_eq!(waiting(&harness).len(), 1);

    harness.advance(600);
    refused(&harness.post(&late).await);
    pending(&harness, "next").await;
    // Only the new pending grant; the expired one is deleted, perhaps in the background.
    eventually("one pending grant", async || (waiting(&harness).len() == 1).then_some(())).await;

    harness.advance(600);
    restart(&mut harness).await;
    refused(&harness.post(&late).await);
    eventually("no pending grants", async || waiting(&harness).is_empty().then_some(())).await;
    assert_eq!(harness.status_of("late").await["state"], "none");
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 4);
}

/// Kills the sidecar after the code exchange, while it compares identities, and starts it again.
async fn killed_while_comparing(harness: &mut Harness, advertiser: &str) -> Serving {
    harness.stop_sidecar().await;
    let mut serving = Serving::start(harness, &[]).await;
    let begun = json(harness.client.get(serving.url(LOGIN)).send().await.unwrap()).await;
    let callback = harness.consent(&format!("{}&advertiser={advertiser}", begun["auth_url"].as_str().unwrap())).await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Eu));
    let lost = tokio::spawn(harness.client.get(serving.url(&callback)).send());
    gate.reached(1).await;
    assert_eq!(waiting(harness).len(), 1, "the new grant is on disk before its identity is checked");
    serving.signal("KILL");
    serving.ended().await;
    assert!(lost.await.unwrap().is_err());
    harness.sandbox.clear_faults();
    let serving = Serving::start(harness, &[]).await;
    eventually("no pending grants", async || waiting(harness).is_empty().then_some(())).await;
    serving
}

async fn status(harness: &Harness, serving: &Serving) -> Value {
    json(harness.client.get(serving.url("/api/auth/amazon/status?user_id=default")).send().await.unwrap()).await
}

async fn log_in_as(harness: &Harness, advertiser: &str) {
    let auth_url = begun(harness, "").await;
    assert_eq!(harness.get(&harness.consent(&format!("{auth_url}&advertiser={advertiser}")).await).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 90.
async fn a_login_killed_after_its_exchange_is_completed_by_the_next_start() {
    let mut harness = Harness::with_running_clock("").await;
    log_in_as(&harness, TOOLS).await;
    let before = harness.status_of("default").await["consented_at"].clone();
    let serving = killed_while_comparing(&mut harness, TOOLS).await;
    let after = status(&harness, &serving).await;
    assert_eq!(after["state"], "fresh");
    assert!(after["consented_at"].as_str() > before.as_str(), "{after} after {before}");
    assert_eq!(harness.sandbox.lwa_calls().exchanges, 2);
    assert_eq!(harness.client.get(serving.url("/v2/profiles")).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 90.
async fn a_killed_login_is_completed_by_an_arbitrarily_late_start() {
    let mut harness = Harness::start().await;
    harness.stop_sidecar().await;
    let keyring = Keyring::new(&[Secret::new(FERNET_KEY)]).unwrap();
    let (store, _) =
        TokenStore::open(&Settings { path: harness.store_path(), postgres: None }, keyring.into()).unwrap();
    for (user, confirm) in [("anna", false), ("bob", true)] {
        let grant = Grant {
            refresh_token: RefreshToken::new(harness.sandbox.grant().refresh_token).unwrap(),
            previous: None,
            access: None,
            updated_at: harness.clock.now(),
            consented_at: Some(harness.clock.now()),
            used_at: None,
            scope: None,
            generation: 0,
        };
        let (id, user) = (user.repeat(16), user.parse().unwrap());
        let waiting = PendingGrant { id, user, since: harness.clock.now(), replace: false, confirm, grant };
        store.save_pending_grant(&waiting).await.unwrap();
    }
    store.close().await.unwrap();
    harness.advance(3600);
    harness.start_sidecar().await;
    eventually("the end of the login", async || waiting(&harness).is_empty().then_some(())).await;
    let call = harness.request(Method::GET, "/v2/profiles").header("x-ads-user", "anna").send().await.unwrap();
    assert_eq!(call.status(), 200, "the grant is in use");
    assert_eq!(harness.status_of("bob").await["state"], "none", "an app has ten minutes to confirm");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 90.
async fn another_identity_is_rejected_after_a_kill_too() {
    let mut harness = Harness::with_running_clock("").await;
    log_in_as(&harness, TOOLS).await;
    let before = harness.get("/v2/profiles").await.text().await.unwrap();
    let consented_at = harness.status_of("default").await["consented_at"].clone();
    let serving = killed_while_comparing(&mut harness, BOOKS).await;
    assert_eq!(status(&harness, &serving).await["consented_at"], consented_at);
    let after = harness.client.get(serving.url("/v2/profiles")).send().await.unwrap().text().await.unwrap();
    assert_eq!(after, before, "the previous grant is unchanged");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 90.
async fn a_grant_without_profiles_does_not_count_as_another_identity() {
    let harness = Harness::start().await;
    log_in_as(&harness, TOOLS).await;
    harness.sandbox.world(|world| world.catalogue.profiles.retain(|profile| profile.advertiser != BOOKS));
    log_in_as(&harness, BOOKS).await;
    log_in_as(&harness, TOOLS).await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 86.
async fn of_two_concurrent_logins_the_last_to_complete_wins() {
    let harness = Harness::start().await;
    let (first, second) = (begun(&harness, "user_id=shop").await, begun(&harness, "user_id=shop").await);
    let (first, second) = (harness.consent(&first).await, harness.consent(&second).await);
    let bearer = async || {
        let call = harness.request(Method::GET, "/sandbox/echo").header("x-ads-user", "shop").send().await.unwrap();
        assert_eq!(call.status(), 200);
        harness.seen().header("authorization").unwrap().to_owned()
    };
    assert_eq!(harness.get(&second).await.status(), 200);
    let earlier = bearer().await;
    harness.advance(60);
    assert_eq!(harness.get(&first).await.status(), 200);
    let later = bearer().await;
    assert_ne!(earlier, later);
    assert_eq!(later, bearer().await, "the earlier grant is not used again");
    let users = json(harness.get("/api/auth/amazon/status").await).await;
    assert_eq!(users["users"].as_array().unwrap().len(), 1);
    assert_eq!(users["users"][0]["consented_at"], "2026-08-01T12:01:00Z");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 92.
async fn in_a_flood_of_logins_the_oldest_pending_logins_are_dropped() {
    let harness = Harness::start().await;
    let oldest = begun(&harness, "user_id=oldest").await;
    let mut youngest = String::new();
    for _ in 0..1000 {
        youngest = begun(&harness, "user_id=youngest").await;
    }
    refused(&harness.get(&harness.consent(&oldest).await).await);
    assert_eq!(harness.get(&harness.consent(&youngest).await).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 92.
async fn a_flood_of_logins_is_throttled_and_drops_no_more_pending_logins() {
    let harness = Harness::start().await;
    for _ in 0..1999 {
        begun(&harness, "user_id=flood").await;
    }
    let last = begun(&harness, "user_id=last").await;
    for _ in 0..3 {
        let answer = harness.get(LOGIN).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (429, "throttled"));
        assert_eq!(answer.headers()["retry-after"], "1");
    }
    assert_eq!(harness.get(&harness.consent(&last).await).await.status(), 200);
    harness.advance(1);
    begun(&harness, "user_id=later").await;
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 89.
async fn a_partially_granted_scope_is_stored_and_reported() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let both = format!("amazon.scope={SCOPE} advertising::audiences");
    let mut serving = Serving::start(&harness, &["--set", &both]).await;
    let begun = json(harness.client.get(serving.url(LOGIN)).send().await.unwrap()).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    let (before, scope) = callback.split_once("scope=").unwrap();
    let rest = scope.find('&').map_or("", |end| &scope[end..]);
    let partly = format!("{before}scope=advertising%3A%3Acampaign_management{rest}");
    assert_ne!(partly, callback, "Amazon granted both scopes");
    let ended = harness.client.get(serving.url(&partly)).send().await.unwrap();
    assert_eq!(json(ended).await["status"], "success");
    let line = serving.says("less was consented to").await;
    assert!(line.contains("advertising::audiences") && !line.contains(SCOPE), "{line}");
    serving.signal("TERM");
    serving.ended().await;
    let dump: Value = serde_json::from_str(&run(&harness, &["store", "dump"], "").await.out).unwrap();
    assert_eq!(dump["default"]["scope"], SCOPE);
}
