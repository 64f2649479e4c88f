//! Logins that are under way when something happens: a restart, a kill, a logout, another login, a flood of them.

use std::path::PathBuf;

use adsidecar::domain::grant::{Grant, RefreshToken};
use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use adsidecar::store::{Settings, TokenStore, Waiting};
use reqwest::{Method, Response};
use serde_json::Value;
use world::{Door, Fault, Rule, SCOPE};

use crate::commands::{Serving, run};
use crate::rig::{FERNET_KEY, Rig, code, eventually, json};

const LOGIN: &str = "/api/auth/amazon/login";
const CONFIRMED: &str = "[login]\nconfirm = true\n";
const TOOLS: &str = "amzn1.account.SANDBOXTOOLS";
const BOOKS: &str = "amzn1.account.SANDBOXBOOKS";

/// Begins a login as a server does: the consent page's address.
async fn begun(rig: &Rig, query: &str) -> String {
    json(rig.get(&format!("{LOGIN}?{query}")).await).await["auth_url"].as_str().unwrap().to_owned()
}

fn refused(answer: &Response) {
    assert_eq!((answer.status().as_u16(), code(answer)), (400, "state_invalid"));
}

/// The files of the grants that wait.
fn waiting(rig: &Rig) -> Vec<PathBuf> {
    let copies = std::fs::read_dir(format!("{}.copies", rig.store_path().display())).unwrap();
    let paths = copies.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|kind| kind == "waiting")).collect()
}

async fn restart(rig: &mut Rig) {
    rig.stop_sidecar().await;
    rig.start_sidecar().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_87_a_login_goes_on_after_a_restart_and_its_state_is_good_once() {
    let mut rig = Rig::start().await;
    let callback = rig.consent(&begun(&rig, "user_id=shop").await).await;
    let late = begun(&rig, "user_id=late").await;
    restart(&mut rig).await;
    for file in std::fs::read_dir(format!("{}.copies", rig.store_path().display())).unwrap() {
        let text = String::from_utf8_lossy(&std::fs::read(file.unwrap().path()).unwrap()).into_owned();
        assert!(!text.contains("verifier") && !text.contains("shop"), "what has begun is sealed: {text}");
    }
    assert_eq!(json(rig.get(&callback).await).await["user_id"], "shop");
    restart(&mut rig).await;
    refused(&rig.get(&callback).await);
    assert_eq!(rig.sandbox.lwa_calls().exchanges, 1);

    rig.advance(600);
    restart(&mut rig).await;
    refused(&rig.get(&rig.consent(&late).await).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_87_a_login_goes_on_after_a_kill() {
    let mut rig = Rig::with_running_clock("").await;
    rig.stop_sidecar().await;
    let mut serving = Serving::start(&rig, &[]).await;
    let begun = json(rig.client.get(serving.url(LOGIN)).send().await.unwrap()).await;
    let file = PathBuf::from(format!("{}.copies/logins", rig.store_path().display()));
    eventually("the login on disk", async || std::fs::metadata(&file).ok().filter(|file| file.len() > 300)).await;
    serving.signal("KILL");
    serving.ended().await;
    let serving = Serving::start(&rig, &[]).await;
    let callback = rig.consent(begun["auth_url"].as_str().unwrap()).await;
    let ended = rig.client.get(serving.url(&callback)).send().await.unwrap();
    assert_eq!(json(ended).await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_87_a_grant_that_waits_for_its_confirmation_survives_a_restart_and_dies_after_ten_minutes() {
    let mut rig = Rig::with(CONFIRMED).await;
    let pending = async |rig: &Rig, user: &str| -> String {
        let auth_url = begun(rig, &format!("user_id={user}")).await;
        let ended = json(rig.get(&rig.consent(&auth_url).await).await).await;
        format!("/api/auth/amazon/confirm?grant={}", ended["grant"].as_str().unwrap())
    };
    let (kept, late, out) = (pending(&rig, "kept").await, pending(&rig, "late").await, pending(&rig, "out").await);
    assert_eq!(waiting(&rig).len(), 3);
    for path in waiting(&rig) {
        assert!(std::fs::read(path).unwrap().starts_with(b"gAAAA"), "it is sealed as a whole");
    }
    assert_eq!(rig.post("/api/auth/amazon/logout?user_id=out").await.status(), 204);
    assert_eq!(waiting(&rig).len(), 2, "a logout wipes what waits too");
    refused(&rig.post(&out).await);

    restart(&mut rig).await;
    assert_eq!(rig.status_of("kept").await["state"], "none", "it waits on");
    eventually("the grants of before", async || (rig.post(&kept).await.status() == 200).then_some(())).await;
    assert_eq!(rig.status_of("kept").await["state"], "fresh");
    refused(&rig.post(&kept).await);
    assert_eq!(waiting(&rig).len(), 1);

    rig.advance(600);
    refused(&rig.post(&late).await);
    pending(&rig, "next").await;
    assert_eq!(waiting(&rig).len(), 1, "the next one; the late one is off the disk");

    rig.advance(600);
    restart(&mut rig).await;
    refused(&rig.post(&late).await);
    eventually("nothing waits", async || waiting(&rig).is_empty().then_some(())).await;
    assert_eq!(rig.status_of("late").await["state"], "none");
    assert_eq!(rig.sandbox.lwa_calls().exchanges, 4);
}

/// Kills the sidecar after a code was exchanged, while the identities are compared, and starts it again.
async fn killed_while_comparing(rig: &mut Rig, advertiser: &str) -> Serving {
    rig.stop_sidecar().await;
    let mut serving = Serving::start(rig, &[]).await;
    let begun = json(rig.client.get(serving.url(LOGIN)).send().await.unwrap()).await;
    let callback = rig.consent(&format!("{}&advertiser={advertiser}", begun["auth_url"].as_str().unwrap())).await;
    let gate = rig.sandbox.set_trouble(Rule::from(Fault::Gate).at(Door::Eu));
    let lost = tokio::spawn(rig.client.get(serving.url(&callback)).send());
    gate.reached(1).await;
    assert_eq!(waiting(rig).len(), 1, "the new grant is on disk before anybody is asked about it");
    serving.signal("KILL");
    serving.ended().await;
    assert!(lost.await.unwrap().is_err());
    rig.sandbox.clear_trouble();
    let serving = Serving::start(rig, &[]).await;
    eventually("nothing waits", async || waiting(rig).is_empty().then_some(())).await;
    serving
}

async fn status(rig: &Rig, serving: &Serving) -> Value {
    json(rig.client.get(serving.url("/api/auth/amazon/status?user_id=default")).send().await.unwrap()).await
}

async fn log_in_as(rig: &Rig, advertiser: &str) {
    let auth_url = begun(rig, "").await;
    assert_eq!(rig.get(&rig.consent(&format!("{auth_url}&advertiser={advertiser}")).await).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_90_a_login_that_was_killed_after_its_exchange_is_finished_by_the_next_start() {
    let mut rig = Rig::with_running_clock("").await;
    log_in_as(&rig, TOOLS).await;
    let before = rig.status_of("default").await["consented_at"].clone();
    let serving = killed_while_comparing(&mut rig, TOOLS).await;
    let after = status(&rig, &serving).await;
    assert_eq!(after["state"], "fresh");
    assert!(after["consented_at"].as_str() > before.as_str(), "{after} after {before}");
    assert_eq!(rig.sandbox.lwa_calls().exchanges, 2);
    assert_eq!(rig.client.get(serving.url("/v2/profiles")).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_90_a_login_that_was_killed_is_finished_however_late_the_next_start_is() {
    let mut rig = Rig::start().await;
    rig.stop_sidecar().await;
    let keyring = Keyring::new(&[Secret::new(FERNET_KEY)]).unwrap();
    let (store, _) = TokenStore::open(&Settings { path: rig.store_path(), postgres: None }, keyring.into()).unwrap();
    for (user, confirm) in [("anna", false), ("bob", true)] {
        let grant = Grant {
            refresh_token: RefreshToken::new(rig.sandbox.grant().refresh_token).unwrap(),
            previous: None,
            access: None,
            updated_at: rig.clock.now(),
            consented_at: Some(rig.clock.now()),
            used_at: None,
            scope: None,
            generation: 0,
        };
        let (id, user) = (user.repeat(16), user.parse().unwrap());
        let waiting = Waiting { id, user, since: rig.clock.now(), replace: false, confirm, grant };
        store.keep_waiting(&waiting).await.unwrap();
    }
    store.close().await.unwrap();
    rig.advance(3600);
    rig.start_sidecar().await;
    eventually("the end of the login", async || waiting(&rig).is_empty().then_some(())).await;
    let call = rig.request(Method::GET, "/v2/profiles").header("x-ads-user", "anna").send().await.unwrap();
    assert_eq!(call.status(), 200, "nobody else has this grant");
    assert_eq!(rig.status_of("bob").await["state"], "none", "an app that has to confirm has ten minutes");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_90_another_identity_is_refused_after_a_kill_too() {
    let mut rig = Rig::with_running_clock("").await;
    log_in_as(&rig, TOOLS).await;
    let before = rig.get("/v2/profiles").await.text().await.unwrap();
    let consented_at = rig.status_of("default").await["consented_at"].clone();
    let serving = killed_while_comparing(&mut rig, BOOKS).await;
    assert_eq!(status(&rig, &serving).await["consented_at"], consented_at);
    let after = rig.client.get(serving.url("/v2/profiles")).send().await.unwrap().text().await.unwrap();
    assert_eq!(after, before, "the grant of before stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_90_a_grant_that_reaches_no_profile_makes_no_identity_another() {
    let rig = Rig::start().await;
    log_in_as(&rig, TOOLS).await;
    rig.sandbox.world(|world| world.catalogue.profiles.retain(|profile| profile.advertiser != BOOKS));
    log_in_as(&rig, BOOKS).await;
    log_in_as(&rig, TOOLS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_86_of_two_logins_at_once_both_are_good_and_the_one_that_ends_last_counts() {
    let rig = Rig::start().await;
    let (first, second) = (begun(&rig, "user_id=shop").await, begun(&rig, "user_id=shop").await);
    let (first, second) = (rig.consent(&first).await, rig.consent(&second).await);
    let bearer = async || {
        let call = rig.request(Method::GET, "/sandbox/echo").header("x-ads-user", "shop").send().await.unwrap();
        assert_eq!(call.status(), 200);
        rig.seen().header("authorization").unwrap().to_owned()
    };
    assert_eq!(rig.get(&second).await.status(), 200);
    let earlier = bearer().await;
    rig.advance(60);
    assert_eq!(rig.get(&first).await.status(), 200);
    let later = bearer().await;
    assert_ne!(earlier, later);
    assert_eq!(later, bearer().await, "the one of before is not used again");
    let users = json(rig.get("/api/auth/amazon/status").await).await;
    assert_eq!(users["users"].as_array().unwrap().len(), 1);
    assert_eq!(users["users"][0]["consented_at"], "2026-08-01T12:01:00Z");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_92_in_a_flood_of_logins_the_oldest_make_room() {
    let rig = Rig::start().await;
    let oldest = begun(&rig, "user_id=oldest").await;
    let mut youngest = String::new();
    for _ in 0..1000 {
        youngest = begun(&rig, "user_id=youngest").await;
    }
    refused(&rig.get(&rig.consent(&oldest).await).await);
    assert_eq!(rig.get(&rig.consent(&youngest).await).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_92_a_flood_of_logins_is_throttled_and_pushes_no_more_out() {
    let rig = Rig::start().await;
    for _ in 0..1999 {
        begun(&rig, "user_id=flood").await;
    }
    let last = begun(&rig, "user_id=last").await;
    for _ in 0..3 {
        let answer = rig.get(LOGIN).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (429, "throttled"));
        assert_eq!(answer.headers()["retry-after"], "1");
    }
    assert_eq!(rig.get(&rig.consent(&last).await).await.status(), 200);
    rig.advance(1);
    begun(&rig, "user_id=later").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_89_a_scope_that_was_granted_only_in_part_is_stored_as_it_is_and_said() {
    let mut rig = Rig::with_running_clock("").await;
    rig.stop_sidecar().await;
    let both = format!("amazon.scope={SCOPE} advertising::audiences");
    let mut serving = Serving::start(&rig, &["--set", &both]).await;
    let begun = json(rig.client.get(serving.url(LOGIN)).send().await.unwrap()).await;
    let callback = rig.consent(begun["auth_url"].as_str().unwrap()).await;
    let (before, scope) = callback.split_once("scope=").unwrap();
    let rest = scope.find('&').map_or("", |end| &scope[end..]);
    let partly = format!("{before}scope=advertising%3A%3Acampaign_management{rest}");
    assert_ne!(partly, callback, "Amazon granted both");
    let ended = rig.client.get(serving.url(&partly)).send().await.unwrap();
    assert_eq!(json(ended).await["status"], "success");
    let line = serving.says("less was consented to").await;
    assert!(line.contains("advertising::audiences") && !line.contains(SCOPE), "{line}");
    serving.signal("TERM");
    serving.ended().await;
    let dump: Value = serde_json::from_str(&run(&rig, &["store", "dump"], "").await.out).unwrap();
    assert_eq!(dump["default"]["scope"], SCOPE);
}
