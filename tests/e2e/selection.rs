//! Routing: the account, user and region of a request, and the headers that Amazon receives.

use reqwest::Response;
use world::{CLIENT_ID, Call, Listener};

use crate::harness::{Harness, code, json};

const NA: &str = "3012345678901234561";
const EU: &str = "3012345678901234563";

fn accounts() -> String {
    format!(
        "[[account]]\nname = \"us\"\nprofile_id = \"{NA}\"\n[[account]]\nname = \"uk\"\nregion = \"eu\"\n\
         profile_id = \"{EU}\"\nuser = \"europe\"\nheaders = {{ X-Team = \"blue\" }}\n\
         [[account]]\nname = \"secret-client\"\nuser = \"nobody\"\n"
    )
}

async fn harness(more: &str) -> Harness {
    let harness = Harness::with(&format!("{}{more}", accounts())).await;
    harness.log_in("default").await;
    harness.log_in("europe").await;
    harness
}

async fn call(harness: &Harness, path: &str, headers: &[(&str, &str)]) -> Response {
    let request = headers
        .iter()
        .fold(harness.request(reqwest::Method::GET, path), |request, (name, value)| request.header(*name, *value));
    request.send().await.unwrap()
}

fn scope(call: &Call) -> Option<&str> {
    call.header("amazon-advertising-api-scope")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_account_is_rejected_without_naming_others() {
    let harness = harness("").await;
    for (path, headers) in [
        ("/sandbox/echo", &[("X-Ads-Account", "acme")][..]),
        ("/sandbox/echo", &[("X-Ads-Account", "")]),
        ("/sandbox/echo", &[("X-Ads-Account", "US")]),
        ("/a/acme/sandbox/echo", &[("X-Ads-Account", "us")]),
    ] {
        let answer = call(&harness, path, headers).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (404, "unknown_account"), "{path}");
        let text = answer.text().await.unwrap();
        assert!(!text.contains("secret-client") && !text.contains("\"us\"") && !text.contains("acme"), "{text}");
    }
    for bad in [("X-Ads-User", "a b"), ("X-Ads-User", ".."), ("X-Ads-Region", "uk"), ("X-Ads-Region", "")] {
        let answer = call(&harness, "/sandbox/echo", &[bad]).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (400, "bad_request"), "{bad:?}");
    }
    let twice = call(&harness, "/sandbox/echo", &[("X-Ads-Account", "us"), ("x-ads-account", "us")]).await;
    assert_eq!(code(&twice), "bad_request");
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_grant_gets_login_required() {
    let harness = harness("").await;
    for headers in [[("X-Ads-Account", "secret-client")], [("X-Ads-User", "nobody")]] {
        let answer = call(&harness, "/sandbox/echo", &headers).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (401, "login_required"));
        assert!(answer.headers()["www-authenticate"].to_str().unwrap().starts_with("Bearer"));
        let problem = json(answer).await;
        let link = "http://localhost:8001/api/auth/amazon/login?user_id=nobody";
        assert!(problem["next_step"].as_str().unwrap().contains(link), "{problem}");
    }
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_matching_selector_chooses_the_account() {
    let harness = harness("").await;
    for (path, headers, listener, expected) in [
        ("/a/uk/sandbox/echo", &[("X-Ads-Account", "us"), ("X-Ads-User", "default")][..], Listener::Eu, Some(EU)),
        ("/sandbox/echo", &[("X-Ads-Account", "uk"), ("X-Ads-User", "default")], Listener::Eu, Some(EU)),
        ("/sandbox/echo", &[("X-Ads-Account", "us")], Listener::Na, Some(NA)),
        ("/sandbox/echo", &[("X-Ads-User", "europe")], Listener::Na, None),
        ("/sandbox/echo", &[("X-Ads-User", "europe"), ("X-Ads-Region", "fe")], Listener::Fe, None),
        ("/sandbox/echo", &[("X-Ads-Region", "EU")], Listener::Eu, None),
        ("/sandbox/echo", &[], Listener::Na, None),
    ] {
        let answer = call(&harness, path, headers).await;
        assert_eq!(answer.status(), 200, "{headers:?}");
        assert!(!answer.headers().contains_key("x-adsidecar-hint"), "{headers:?}");
        let seen = harness.seen();
        assert_eq!((seen.listener, scope(&seen)), (listener, expected), "{path} {headers:?}");
        assert!(seen.headers.iter().all(|(name, _)| !name.starts_with("x-ads")), "{seen:?}");
        assert_eq!(seen.header("x-team").is_some(), expected == Some(EU));
    }
    // Each user's requests use that user's token.
    let mut seen = Vec::new();
    for user in ["default", "europe"] {
        call(&harness, "/sandbox/echo", &[("X-Ads-User", user)]).await;
        seen.push(harness.seen().header("authorization").unwrap().to_owned());
    }
    call(&harness, "/a/uk/sandbox/echo", &[]).await;
    assert_ne!(seen[0], seen[1]);
    assert_eq!(harness.seen().header("authorization"), Some(&*seen[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_account_and_the_only_account_need_no_selector() {
    let named = Harness::with(&format!(
        "[[account]]\nname = \"a\"\nprofile_id = \"1\"\n[[account]]\nname = \"default\"\nprofile_id = \"{NA}\"\n"
    ))
    .await;
    named.log_in("default").await;
    call(&named, "/sandbox/echo", &[]).await;
    assert_eq!(scope(&named.seen()), Some(NA));
    let only =
        Harness::with(&format!("[[account]]\nname = \"a\"\nprofile_id = \"{EU}\"\nregion = \"eu\"\nuser = \"u\"\n"))
            .await;
    only.log_in("u").await;
    call(&only, "/sandbox/echo", &[]).await;
    assert_eq!((only.seen().listener, scope(&only.seen())), (Listener::Eu, Some(EU)));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_another_region_no_id_is_attached_and_a_hint_is_returned() {
    let harness = harness("").await;
    let answer = call(&harness, "/a/uk/sandbox/echo", &[("X-Ads-Region", "na")]).await;
    assert_eq!(answer.headers()["x-adsidecar-hint"], "region_mismatch");
    assert_eq!((harness.seen().listener, scope(&harness.seen())), (Listener::Na, None));
    // Headers that the caller sent itself remain.
    call(&harness, "/a/uk/sandbox/echo", &[("X-Ads-Region", "na"), ("Amazon-Advertising-API-Scope", NA)]).await;
    assert_eq!(scope(&harness.seen()), Some(NA));
    // The host of the absolute form overrides the header.
    let absolute = "GET http://advertising-api-fe.amazon.com/sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\
                    X-Ads-Account: uk\r\nX-Ads-Region: eu\r\n\r\n";
    let answer = harness.send_raw(absolute).await;
    assert_eq!((harness.seen().listener, answer.header("x-adsidecar-hint")), (Listener::Fe, Some("region_mismatch")));
}

#[tokio::test(flavor = "multi_thread")]
async fn fixed_selection_ignores_the_callers_selectors() {
    let sets = [("proxy.selection", "fixed")];
    let clock = adsidecar::domain::clock::Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let options = world::Options::calm(clock);
    let extra = format!("{}[[account]]\nname = \"default\"\nprofile_id = \"{NA}\"\n", accounts());
    let harness = Harness::built(options, &extra, &sets).await;
    harness.log_in("default").await;
    let said = [("X-Ads-Account", "uk"), ("X-Ads-User", "europe"), ("X-Ads-Region", "eu")];
    for path in ["/sandbox/echo", "/a/uk/sandbox/echo", "/a/no-such/sandbox/echo"] {
        assert_eq!(call(&harness, path, &said).await.status(), 200, "{path}");
        let seen = harness.seen();
        assert_eq!(
            (seen.listener, scope(&seen), seen.target.as_str()),
            (Listener::Na, Some(NA), "/sandbox/echo"),
            "{path}"
        );
        assert!(seen.headers.iter().all(|(name, _)| !name.starts_with("x-ads")));
    }
    harness.sandbox.clear_history();
    let misspelt = call(&harness, "/sandbox/echo", &[("X-Ads-Acount", "uk")]).await;
    assert_eq!((misspelt.status().as_u16(), code(&misspelt)), (400, "bad_request"), "understood first, then ignored");
    assert!(harness.ads_calls().is_empty());
}

/// An account with every id.
const FULL: &str = r#"
[[account]]
name = "full"
profile_id = "3012345678901234561"
marketplace_id = "ATVPDKIKX0DER"
advertiser_id = "ENTITYSANDBOXTOOLS"
entity_id = "ENTITYE"
account_id = "ACC1"
dsp_advertiser_id = "987"
amc_instance_id = "amcsandboxtools"
manager_account_id = "MGR1"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn each_family_gets_exactly_its_headers() {
    let harness = Harness::with(FULL).await;
    harness.log_in("default").await;
    const CLIENT: &str = "amazon-advertising-api-clientid";
    const V1_CLIENT: &str = "amazon-ads-clientid";
    let (scope, account) = (("amazon-advertising-api-scope", NA), ("amazon-ads-accountid", "ACC1"));
    let marketplace = ("amazon-advertising-api-marketplaceid", "ATVPDKIKX0DER");
    let advertiser = ("amazon-advertising-api-advertiserid", "ENTITYSANDBOXTOOLS");
    let stream_account = ("amazon-ads-account-id", "ACC1");
    let before = harness.metric("adsidecar_unknown_family_total").await;
    for (line, client, context) in [
        ("GET /v2/profiles", CLIENT, &[][..]),
        ("GET /amc/accounts", CLIENT, &[]),
        ("GET /amc/reporting/amcsandboxtools/workflows", CLIENT, &[advertiser, marketplace, scope]),
        ("GET /amc/instances", CLIENT, &[advertiser, marketplace, scope]),
        ("POST /sp/campaigns/list", CLIENT, &[scope]),
        ("POST //sp/campaigns/list", CLIENT, &[scope]),
        ("POST /adsApi/v1/query/campaigns", V1_CLIENT, &[scope, account]),
        ("GET /dsp/streams/subscriptions", CLIENT, &[stream_account]),
        ("GET /streams/subscriptions", CLIENT, &[scope]),
        ("POST /reporting/reports", CLIENT, &[scope]),
        ("GET /sp/global/campaigns", CLIENT, &[account]),
        ("POST /mcp", V1_CLIENT, &[]),
    ] {
        harness.send_raw(format!("{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}")).await;
        let seen = harness.seen();
        assert_eq!(format!("{} {}", seen.method, seen.target), line);
        let always = ["host", "authorization", "content-length"];
        let mut attached: Vec<_> = seen.headers.iter().filter(|(name, _)| !always.contains(&name.as_str())).collect();
        attached.sort();
        let mut expected = vec![(client.to_owned(), CLIENT_ID.to_owned())];
        expected.extend(context.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        expected.sort();
        assert_eq!(attached, expected.iter().collect::<Vec<_>>(), "{line}");
        assert!(seen.header("authorization").unwrap().starts_with("Bearer Atza|"));
    }
    assert_eq!(harness.metric("adsidecar_unknown_family_total").await, before);
    // A path of an unknown family gets the profile alone, in the header style of the client id that the caller sent.
    harness.send_raw("GET /brand/new HTTP/1.1\r\nHost: localhost\r\nAmazon-Ads-ClientId: theirs\r\n\r\n").await;
    let seen = harness.seen();
    let mut names = seen.header_names();
    names.sort_unstable();
    assert_eq!(names, [V1_CLIENT, scope.0, "authorization", "host"]);
    assert_eq!(seen.header(V1_CLIENT), Some(CLIENT_ID));
    assert_eq!(harness.metric("adsidecar_unknown_family_total").await, before + 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn context_headers_of_the_caller_take_precedence() {
    let harness = Harness::with(FULL).await;
    harness.log_in("default").await;
    let answer = call(&harness, "/reporting/reports/none", &[("Amazon-Ads-AccountId", "theirs")]).await;
    assert_eq!(code(&answer), "");
    let seen = harness.seen();
    assert_eq!((seen.header("amazon-ads-accountid"), scope(&seen)), (Some("theirs"), None));
    call(&harness, "/sp/x", &[("Amazon-Advertising-API-Scope", "7")]).await;
    assert_eq!(harness.seen().header_all("amazon-advertising-api-scope").collect::<Vec<_>>(), ["7"]);
    call(&harness, "/avc/events", &[("Amazon-Advertising-Advertiser-Id", "5")]).await;
    let seen = harness.seen();
    assert_eq!(seen.header("amazon-advertising-advertiser-id"), Some("5"));
    assert_eq!(seen.header("amazon-advertising-api-entityid"), None);
}
