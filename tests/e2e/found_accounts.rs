//! Accounts that adsidecar finds at Amazon: after a login, on request, selected by their slugs.

use std::collections::BTreeSet;
use std::sync::Arc;

use adsidecar::domain::account::Service;
use adsidecar::domain::api_families::families;
use reqwest::Method;
use serde_json::Value;
use world::{AmcAccount, Call, DspAdvertiser, Fault, Listener, ManagerAccount, Options, Profile, Rule};

use crate::commands::{DONE, FAILED, Serving, beside, run};
use crate::harness::{Harness, code, eventually, json};
use crate::postgres_server::Cluster;

const OWNER: &str = "amzn1.account.SANDBOXTOOLS";
const ACCOUNTS: &str = "/api/auth/amazon/accounts";
const SYNC: &str = "/api/auth/amazon/accounts/sync";

/// A profile of the first advertiser.
fn profile(id: u64, name: &str, place: (Listener, &'static str, &'static str), kind: &'static str) -> Profile {
    let (region, country, marketplace) = place;
    Profile {
        id,
        region,
        advertiser: OWNER.into(),
        country,
        currency: "EUR",
        timezone: "Europe/Paris",
        marketplace,
        account: format!("ENTITY{id}"),
        kind,
        name: Some(name.into()),
    }
}

const US: (Listener, &str, &str) = (Listener::Na, "US", "ATVPDKIKX0DER");
const DE: (Listener, &str, &str) = (Listener::Eu, "DE", "A1PA6795UKMFR9");
const UK: (Listener, &str, &str) = (Listener::Eu, "UK", "A1F83G8C2ARO7P");
const JP: (Listener, &str, &str) = (Listener::Fe, "JP", "A1VC38T7YXB528");

/// 300 profiles in three regions, 40 of them with names that others have in the same country; Acme's German profile
/// with a manager account and an AMC account; an agency with DSP advertisers.
fn many(harness: &Harness) {
    harness.sandbox.world(|world| {
        let catalogue = &mut world.catalogue;
        catalogue.profiles.clear();
        catalogue.amc_accounts.clear();
        let mut id = 3_012_345_678_901_234_000;
        let mut next = || {
            id += 1;
            id
        };
        for number in 0..20 {
            for kind in ["seller", "vendor"] {
                catalogue.profiles.push(profile(next(), &format!("Twin {number}"), DE, kind));
            }
        }
        catalogue.profiles.push(profile(7_700, "Acme", DE, "vendor"));
        catalogue.profiles.push(profile(7_800, "Agency", UK, "agency"));
        for number in 0..258 {
            let place = [US, DE, UK, JP][number % 4];
            catalogue.profiles.push(profile(next(), &format!("Shop {number}"), place, "seller"));
        }
        assert_eq!(catalogue.profiles.len(), 300);
        catalogue.managers.push(ManagerAccount {
            id: "MANAGER1".into(),
            name: "Acme Holding".into(),
            profiles: vec![7_700],
            advertiser: OWNER.into(),
        });
        catalogue.dsp_advertisers = (0..250)
            .map(|number| DspAdvertiser {
                id: format!("58000{number}"),
                name: format!("Brand {number}"),
                country: "UK",
                currency: "GBP",
                profile: 7_800,
            })
            .collect();
        catalogue.amc_accounts.push(AmcAccount {
            id: "ENTITYAMC".into(),
            name: "Acme AMC".into(),
            marketplace: "A1PA6795UKMFR9",
            instance: "amcacme".into(),
            advertiser: OWNER.into(),
        });
    });
}

async fn accounts(harness: &Harness, query: &str) -> Value {
    let answer = harness.get(&format!("{ACCOUNTS}?{query}")).await;
    assert_eq!(answer.status(), 200);
    json(answer).await
}

async fn synced(harness: &Harness) -> Value {
    let answer = harness.post(SYNC).await;
    assert_eq!(answer.status(), 200);
    json(answer).await
}

/// Calls a path with an account, and returns what Amazon received.
async fn call(harness: &Harness, method: Method, path: &str, account: &str) -> Call {
    harness.sandbox.clear_history();
    let answer = harness.request(method, path).header("x-ads-account", account).send().await.unwrap();
    assert_eq!(code(&answer), "", "{path}: {answer:?}");
    assert!(answer.status().is_success(), "{path}: {answer:?}");
    harness.seen()
}

fn slugs(page: &Value) -> Vec<String> {
    let accounts = page["accounts"].as_array().unwrap().iter();
    accounts.map(|account| account["slug"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_300_profiles_one_is_called_by_its_name_alone_in_every_api_family() {
    let harness = Harness::with_running_clock("").await;
    many(&harness);
    harness.log_in("default").await;
    let told = synced(&harness).await;
    assert_eq!(told["accounts"], 300 + 250 + 1 + 1, "{told}");

    let acme = &accounts(&harness, "name=acme&country=de&type=vendor").await["accounts"][0];
    assert_eq!(acme["slug"], "acme-de");
    assert_eq!(acme["header"], "X-Ads-Account: acme-de");
    assert_eq!(acme["url"], harness.proxy_url("/a/acme-de"));
    assert_eq!((acme["region"].as_str(), acme["currency"].as_str()), (Some("eu"), Some("EUR")));
    for (method, path, headers) in [
        (Method::GET, "/v2/profiles", &[][..]),
        (Method::POST, "/adsApi/v1/query/campaigns", &[("amazon-advertising-api-scope", "7700")]),
        (Method::GET, "/sb/v4/campaigns", &[("amazon-advertising-api-scope", "7700")]),
        (Method::GET, "/sd/campaigns", &[("amazon-advertising-api-scope", "7700")]),
        (Method::GET, "/portfolios", &[("amazon-advertising-api-scope", "7700")]),
        (Method::GET, "/streams/subscriptions", &[("amazon-advertising-api-scope", "7700")]),
        (Method::GET, "/reporting/reports/x", &[("amazon-advertising-api-scope", "7700")]),
        (Method::GET, "/attribution/publishers", &[("amazon-advertising-api-scope", "7700")]),
        (Method::GET, "/mmm/v1/reports/x", &[("amazon-advertising-api-manager-account", "MANAGER1")]),
        (
            Method::GET,
            "/amc/instances",
            &[
                ("amazon-advertising-api-advertiserid", "ENTITYAMC"),
                ("amazon-advertising-api-marketplaceid", "A1PA6795UKMFR9"),
            ],
        ),
        (
            Method::GET,
            "/amc/reporting/amcacme/workflows",
            &[
                ("amazon-advertising-api-advertiserid", "ENTITYAMC"),
                ("amazon-advertising-api-marketplaceid", "A1PA6795UKMFR9"),
            ],
        ),
        (
            Method::GET,
            "/amc/audiences/query/x",
            &[
                ("amazon-marketing-cloud-audience-instanceid", "amcacme"),
                ("amazon-advertising-api-entityid", "ENTITYAMC"),
            ],
        ),
    ] {
        harness.sandbox.clear_history();
        let answer = harness.request(method, path).header("x-ads-account", "acme-de").send().await.unwrap();
        assert_eq!(code(&answer), "", "{path}: {answer:?}");
        let seen = harness.seen();
        assert_eq!(seen.listener, Listener::Eu, "{path}");
        for (name, value) in headers {
            assert_eq!(seen.header(name), Some(*value), "{path}: {name}");
        }
        if path == "/v2/profiles" {
            assert_eq!(seen.header("amazon-advertising-api-scope"), None);
        }
    }
    let by_prefix = harness.get("/a/acme-de/sd/campaigns").await;
    assert_eq!(code(&by_prefix), "");
    assert_eq!(harness.seen().header("amazon-advertising-api-scope"), Some("7700"));
    let brand = call(&harness, Method::GET, "/dsp/streams/subscriptions", "brand-7-uk").await;
    assert_eq!((brand.listener, brand.header("amazon-ads-account-id")), (Listener::Eu, Some("580007")));
    let shop = call(&harness, Method::GET, "/sd/campaigns", "shop-3-jp").await;
    assert_eq!(shop.listener, Listener::Fe);
}

/// One call for each row of the table of API families; the expected ids are those that the account itself tells.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_knows_only_a_name_reaches_every_api_family_with_the_right_host_and_headers() {
    let harness = Harness::with_running_clock("").await;
    many(&harness);
    harness.log_in("default").await;
    synced(&harness).await;
    let acme = accounts(&harness, "name=acme&country=de&type=vendor").await["accounts"][0].clone();
    let (mut called, mut attached) = (0, 0);
    for family in families() {
        let path = if family.is_unknown() {
            "/nothing/that/is/known".to_owned()
        } else {
            family.paths[0].replace('*', "x").replace("/amc/instances/x", "/amc/instances/amcacme")
        };
        harness.sandbox.clear_history();
        let answer = harness.request(Method::GET, &path).header("x-ads-account", "acme-de").send().await.unwrap();
        assert_eq!(code(&answer), "", "{}: {path}: {answer:?}", family.name);
        let seen = harness.seen();
        let listener = if family.service == Service::Mcp { Listener::McpEu } else { Listener::Eu };
        assert_eq!((seen.listener, seen.target.as_str()), (listener, path.as_str()), "{}", family.name);
        assert!(seen.header("authorization").is_some_and(|token| token.starts_with("Bearer Atza|")), "{path}");
        assert!(seen.header(family.client_id.name().as_str()).is_some(), "{path}");
        assert_eq!(seen.header("x-ads-account"), None, "{path}");
        for header in family.context {
            let context = header.context();
            let excluded = family
                .exclusive
                .is_some_and(|(first, second)| second == context && acme["ids"][first.key()].is_string());
            let own = acme["ids"][context.key()].as_str().filter(|_| !excluded);
            let sent = seen.header(header.name().as_str());
            assert_eq!(sent, own, "{}: {path}: {}", family.name, header.name());
            attached += usize::from(sent.is_some());
        }
        called += 1;
    }
    assert!(called > 50 && attached > 40, "{called} families, {attached} headers");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_clash_get_longer_slugs_and_the_short_one_selects_nobody() {
    let harness = Harness::with_running_clock("").await;
    many(&harness);
    harness.log_in("default").await;
    synced(&harness).await;
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let page = accounts(&harness, &format!("limit=70&after={after}")).await;
        assert_eq!(page["total"], 552);
        all.extend(page["accounts"].as_array().unwrap().clone());
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut after),
            None => break,
        }
    }
    let unique: BTreeSet<_> = all.iter().map(|account| account["slug"].as_str().unwrap()).collect();
    assert_eq!((all.len(), unique.len()), (552, 552));
    let clashing: Vec<_> = all.iter().filter(|account| account["clash"].is_string()).collect();
    assert_eq!(clashing.len(), 40);
    assert!(unique.contains("twin-4-de-seller") && unique.contains("twin-4-de-vendor"), "{unique:?}");
    let short =
        harness.request(Method::GET, "/sd/campaigns").header("x-ads-account", "twin-4-de").send().await.unwrap();
    assert_eq!((short.status().as_u16(), code(&short)), (404, "unknown_account"));

    let sets = beside(&harness, &["accounts", "show", "twin-4-de"]).await;
    assert_eq!(sets.code, FAILED);
    assert!(sets.err.contains("use twin-4-de-seller or twin-4-de-vendor"), "{}", sets.err);
    let shown = beside(&harness, &["accounts", "show", "acme-de"]).await;
    assert!(shown.out.contains("X-Ads-Account: acme-de") && shown.out.contains("7700"), "{}", shown.out);

    // One of the twins goes, and a new one comes: the slugs that are known stay.
    harness.sandbox.world(|world| {
        world.catalogue.profiles.retain(|one| !(one.kind == "seller" && one.name.as_deref() == Some("Twin 4")));
        world.catalogue.profiles.push(profile(9_000_111, "Acme", DE, "seller"));
    });
    synced(&harness).await;
    let after = slugs(&accounts(&harness, "name=twin 4").await);
    assert!(after.contains(&"twin-4-de-vendor".to_owned()), "{after:?}");
    assert_eq!(slugs(&accounts(&harness, "name=acme&type=seller").await), ["acme-de-seller"]);
    assert_eq!(
        call(&harness, Method::GET, "/sd/campaigns", "acme-de").await.header("amazon-advertising-api-scope"),
        Some("7700")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_the_configuration_wins_and_unknown_parameters_are_refused() {
    let extra = "[[account]]\nname = \"acme-de\"\nprofile_id = \"1\"\nregion = \"na\"\nread_only = true\n\
                 [[account]]\nname = \"flagship\"\nprofile_id = \"7700\"\nregion = \"eu\"\n";
    let harness = Harness::with_running_clock(extra).await;
    many(&harness);
    harness.log_in("default").await;
    synced(&harness).await;
    let page = accounts(&harness, "name=acme").await;
    let named: Vec<_> = page["accounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["slug"].as_str().unwrap(), one["source"].as_str().unwrap()))
        .collect();
    assert!(named.contains(&("acme-de", "configuration")) && named.contains(&("flagship", "configuration")), "{page}");
    assert!(!named.contains(&("acme-de", "amazon")), "{page}");
    let flagship = page["accounts"].as_array().unwrap().iter().find(|one| one["slug"] == "flagship").unwrap();
    assert_eq!(
        (flagship["name"].as_str(), flagship["type"].as_str()),
        (Some("Acme"), Some("vendor")),
        "what was found is told"
    );
    harness.sandbox.clear_history();
    harness.request(Method::GET, "/sd/campaigns").header("x-ads-account", "acme-de").send().await.unwrap();
    let seen = harness.seen();
    assert_eq!((seen.listener, seen.header("amazon-advertising-api-scope")), (Listener::Na, Some("1")));
    // A found account is no way round the rules of its user's accounts.
    let change =
        harness.request(Method::PUT, "/sp/campaigns").header("x-ads-account", "shop-3-jp").send().await.unwrap();
    assert_eq!(code(&change), "policy_denied");

    for query in ["page=2", "type=brand", "limit=0", "limit=501", "user_id=a b", "name=a&name=b"] {
        let refused = harness.get(&format!("{ACCOUNTS}?{query}")).await;
        assert_eq!((refused.status().as_u16(), code(&refused)), (400, "bad_request"), "{query}");
    }
    assert_eq!(harness.post(&format!("{SYNC}?region=eu")).await.status(), 400);
    assert_eq!(harness.get(SYNC).await.status(), 405);
    let nobody = harness.post(&format!("{SYNC}?user_id=nobody")).await;
    assert_eq!((nobody.status().as_u16(), code(&nobody)), (401, "login_required"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_that_fails_or_is_revoked_deletes_nothing_and_is_told_apart_from_an_empty_one() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.sandbox.world(|world| world.catalogue.profiles.retain(|one| one.region != Listener::Fe));
    let outcome = |told: &Value, region: &str| {
        let outcomes = told["outcomes"].as_array().unwrap().clone();
        outcomes.into_iter().find(|one| one["source"] == "profiles" && one["region"] == region).unwrap()
    };
    let first = synced(&harness).await;
    assert_eq!(
        (outcome(&first, "na")["status"].as_str(), outcome(&first, "na")["count"].as_u64()),
        (Some("found"), Some(2))
    );
    assert_eq!(outcome(&first, "fe")["status"], "empty");

    let fault = harness.sandbox.set_fault(Rule::from(Fault::status(403)).at(Listener::Eu).on("/v2/profiles").always());
    let second = synced(&harness).await;
    assert_eq!(
        (outcome(&second, "eu")["status"].as_str(), outcome(&second, "eu")["code"].as_str()),
        (Some("failed"), Some("forbidden"))
    );
    assert_eq!(slugs(&accounts(&harness, "country=DE").await), ["meadow-tools-de"], "a failure deletes nothing");
    drop(fault);
    harness.sandbox.clear_faults();

    harness.sandbox.world(|world| world.catalogue.profiles.retain(|one| one.region == Listener::Na));
    let third = synced(&harness).await;
    assert_eq!(outcome(&third, "eu")["status"], "empty");
    assert_eq!(third["missing"], 2);
    let kept = accounts(&harness, "country=DE").await;
    assert_eq!(slugs(&kept), ["meadow-tools-de"], "nor does an empty answer");
    assert!(kept["accounts"][0]["missing_since"].is_string());

    for listener in [Listener::Na, Listener::Eu, Listener::Fe] {
        harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(listener).on("/v2/profiles").always());
    }
    let none = harness.post(SYNC).await;
    assert_eq!((none.status().as_u16(), code(&none)), (502, "upstream_unreachable"));
    assert_eq!(accounts(&harness, "country=US").await["total"], 2, "a profile and the AMC instance");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_is_followed_by_a_search_and_a_logout_forgets_what_was_found() {
    let mut harness = Harness::with_running_clock("[accounts]\nsync = \"daily\"\n").await;
    assert_eq!(accounts(&harness, "").await["total"], 0);
    harness.log_in("anna").await;
    let count = eventually("the search after the login", async || {
        accounts(&harness, "user_id=anna").await["total"].as_u64().filter(|total| *total > 0)
    })
    .await;
    assert_eq!(count, 7, "six profiles and an AMC instance");
    let used = call(&harness, Method::GET, "/sd/campaigns", "meadow-tools-us").await;
    assert!(used.header("amazon-advertising-api-scope").is_some());

    harness.stop_sidecar().await;
    let alone = run(&harness, &["accounts", "list", "--country", "de"], "").await;
    assert_eq!(alone.code, DONE, "{}", alone.err);
    assert!(alone.out.contains("meadow-tools-de"), "{}", alone.out);
    harness.start_sidecar().await;
    assert_eq!(accounts(&harness, "").await["total"], 7, "they are stored");

    harness.post("/api/auth/amazon/logout?user_id=anna").await;
    assert_eq!(accounts(&harness, "").await["total"], 0);
    let gone =
        harness.request(Method::GET, "/sd/campaigns").header("x-ads-account", "meadow-tools-us").send().await.unwrap();
    assert_eq!(code(&gone), "unknown_account");
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(accounts(&harness, "").await["total"], 0, "from the store too");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_after_a_login_that_the_end_of_the_process_cuts_off_is_made_by_the_next_one() {
    let mut harness = Harness::with_running_clock("[accounts]\nsync = \"daily\"\n").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na).always());
    harness.log_in("anna").await;
    gate.reached(1).await;
    assert_eq!(accounts(&harness, "user_id=anna").await["total"], 0);
    harness.stop_sidecar().await;
    harness.sandbox.clear_faults();
    gate.release();
    harness.start_sidecar().await;
    eventually("the search", async || (accounts(&harness, "user_id=anna").await["total"] == 7).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_while_accounts_are_stored_leaves_nobody_with_what_was_known_before() {
    let harness = Harness::with_running_clock("").await;
    many(&harness);
    harness.log_in("default").await;
    synced(&harness).await;
    let sent = async || {
        harness.sandbox.clear_history();
        let call = harness.request(Method::GET, "/amc/instances/amcacme").header("x-ads-account", "acme-de");
        call.send().await.unwrap();
        harness.seen().header("amazon-advertising-api-advertiserid").unwrap().to_owned()
    };
    assert_eq!(sent().await, "ENTITYAMC", "which is in memory from now on");
    harness.sandbox.world(|world| world.catalogue.amc_accounts[0].id = "ENTITYNEW".into());
    let stored = Arc::new(tokio::sync::Notify::new());
    let (release, released) = std::sync::mpsc::channel::<()>();
    let (reached, released) = (stored.clone(), std::sync::Mutex::new(released));
    let wait = move || {
        reached.notify_one();
        // Fails once the test has let go.
        let _ = released.lock().unwrap().recv();
    };
    fail::cfg_callback("accounts_saved", wait).unwrap();
    let open = async || harness.metric("adsidecar_connections{door=\"proxy\"}").await;
    let others = open().await;
    let mut caller = tokio::net::TcpStream::connect(harness.proxy_address()).await.unwrap();
    let head = format!("POST {SYNC} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut caller, head.as_bytes()).await.unwrap();
    stored.notified().await;
    drop(caller);
    eventually("the end of its connection", async || (open().await <= others).then_some(())).await;
    drop(release);
    eventually("the new id", async || (sent().await == "ENTITYNEW").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_opens_no_connection_for_each_request_and_repeats_one_that_breaks() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    assert_eq!(harness.post(SYNC).await.status(), 200);
    harness.sandbox.clear_history();
    for _ in 0..5 {
        assert_eq!(harness.post(SYNC).await.status(), 200);
    }
    let calls = harness.ads_calls();
    let connections: BTreeSet<_> = calls.iter().map(|call| call.connection).collect();
    assert!(calls.len() >= 35, "{}", calls.len());
    assert!(connections.len() <= 12, "{} connections for {} requests", connections.len(), calls.len());
    harness.sandbox.set_fault(Rule::from(Fault::Reset).at(Listener::Eu));
    let found = harness.post(SYNC).await.text().await.unwrap();
    assert!(!found.contains("\"failed\""), "a `GET` may be repeated: {found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_searched_for_once_a_day() {
    let harness =
        Harness::over(Options::calm(adsidecar::domain::clock::Clock::system()), "[accounts]\nsync = \"daily\"\n").await;
    harness.log_in("default").await;
    eventually("the search after the login", async || (accounts(&harness, "").await["total"] != 0).then_some(())).await;
    harness.sandbox.world(|world| world.catalogue.profiles.push(profile(42, "Newcomer", DE, "seller")));
    harness.advance(25 * 3600);
    // The next check comes within 15 s of real time.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(40);
    while accounts(&harness, "name=newcomer").await["total"] == 0 {
        assert!(std::time::Instant::now() < until, "the daily search did not come");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_searches_with_and_without_a_running_sidecar() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.log_in("anna").await;
    let running = beside(&harness, &["accounts", "sync"]).await;
    assert_eq!(running.code, DONE, "{}", running.err);
    assert!(running.out.contains("anna: 7 accounts") && running.out.contains("default: 7 accounts"), "{}", running.out);
    assert!(running.out.contains("eu  profiles         2 found"), "{}", running.out);
    let listed = beside(&harness, &["accounts", "list", "-o", "json"]).await;
    let listed: Vec<Value> = serde_json::from_str(&listed.out).unwrap();
    let unique: BTreeSet<_> = listed.iter().map(|account| account["slug"].as_str().unwrap()).collect();
    assert_eq!((listed.len(), unique.len()), (14, 14), "two users reach the same accounts: {unique:?}");
    let explained = beside(&harness, &["explain", "GET", "/sd/campaigns", "--account", "meadow-tools-de"]).await;
    assert_eq!(explained.code, DONE, "{}", explained.err);
    assert!(explained.out.contains("profile_id of the account meadow-tools-de"), "{}", explained.out);

    harness.stop_sidecar().await;
    harness.sandbox.world(|world| world.catalogue.profiles.push(profile(42, "Newcomer", DE, "seller")));
    let alone = run(&harness, &["accounts", "sync", "--user", "anna"], "").await;
    assert_eq!(alone.code, DONE, "{}", alone.err);
    assert!(alone.out.contains("anna: 8 accounts"), "{}", alone.out);
    let explained = run(&harness, &["explain", "GET", "/a/newcomer-de/sd/campaigns"], "").await;
    assert!(explained.out.contains("user     anna"), "{}{}", explained.out, explained.err);
    let none = run(&harness, &["accounts", "sync", "--user", "nobody"], "").await;
    assert_eq!(none.code, FAILED);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_profiles_are_taken_in_bounded_memory() {
    let mut harness = Harness::with_running_clock("").await;
    harness.sandbox.world(|world| {
        let profiles = &mut world.catalogue.profiles;
        profiles.clear();
        profiles.extend(
            (0..2_000).map(|id| {
                profile(1_000_000 + id, &format!("Client {id}"), [US, DE, UK, JP][id as usize % 4], "seller")
            }),
        );
    });
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    let serving = Serving::start(&harness, &["--set", "log.format=text"]).await;
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", serving.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().to_owned();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let before = resident();
    let told = json(harness.client.post(serving.url(SYNC)).send().await.unwrap()).await;
    assert_eq!(told["accounts"], 2_001, "{told}");
    for _ in 0..4 {
        harness.client.post(serving.url(SYNC)).send().await.unwrap();
    }
    let grown = resident() - before;
    assert!(grown < 48 << 10, "the peak grew by {grown} KiB");
    let one =
        json(harness.client.get(serving.url("/api/auth/amazon/accounts?name=client 1999")).send().await.unwrap()).await;
    assert_eq!(one["accounts"][0]["slug"], "client-1999-jp");
    let page = json(harness.client.get(serving.url(ACCOUNTS)).send().await.unwrap()).await;
    assert_eq!(page["accounts"].as_array().unwrap().len(), 500, "one response is bounded too");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_profile_of_the_environment_is_that_of_requests_that_select_nothing() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    harness.sets.push(("amazon.profile_id".into(), "1234567890".into()));
    harness.start_sidecar().await;
    harness.get("/sd/campaigns").await;
    assert_eq!(harness.seen().header("amazon-advertising-api-scope"), Some("1234567890"));
    harness.stop_sidecar().await;
    let file = harness.config_file();
    let arguments = ["explain", "GET", "/sd/campaigns", "--config", file.to_str().unwrap()];
    let told = crate::commands::bare_with(&arguments, &[("AMAZON_PROFILE_ID", "77")]).await;
    assert!(told.out.contains("77") && told.out.contains("account  default"), "{}{}", told.out, told.err);
    let wrong = crate::commands::bare_with(&arguments, &[("AMAZON_PROFILE_ID", "ENTITY1")]).await;
    assert_eq!(wrong.code, 78);
    assert!(wrong.err.contains("amazon.profile_id") && wrong.err.contains("profileId"), "{}", wrong.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_in_postgresql_are_seen_by_every_process() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let sets = [("store.kind", "postgres"), ("store.postgres_url", url.as_str())];
    let harness = Harness::built(Options::calm(adsidecar::domain::clock::Clock::system()), "", &sets).await;
    harness.log_in("default").await;
    let kind = ["--set", "store.kind=postgres", "--set"];
    let url = format!("store.postgres_url={url}");
    let other = Serving::start(&harness, &[&kind[..], &[&url, "--set", "log.format=text"]].concat()).await;
    synced(&harness).await;
    eventually("the other process", async || {
        let page = json(harness.client.get(other.url(ACCOUNTS)).send().await.unwrap()).await;
        (page["total"] == 7).then_some(())
    })
    .await;
}
