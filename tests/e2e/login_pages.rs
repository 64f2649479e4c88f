//! The pages that end a login in a browser: each leads on to a login that works, and no user is guessed.

use adsidecar::domain::clock::Clock;
use reqwest::header::HeaderValue;
use reqwest::{Method, Response};

use crate::harness::{Harness, code, eventually, header, json};
use crate::postgres::Pair;
use crate::postgres_server::Cluster;

const LOGIN: &str = "/api/auth/amazon/login";
const CALLBACK: &str = "/api/auth/amazon/callback";
const TOOLS: &str = "&advertiser=amzn1.account.SANDBOXTOOLS";
const BOOKS: &str = "&advertiser=amzn1.account.SANDBOXBOOKS";

/// A login that a browser has begun.
struct Begun {
    consent_page: String,
    state: String,
    cookie: String,
}

/// Opens a URL of the proxy listener as a browser does that comes from a page of adsidecar's.
async fn open(harness: &Harness, path: &str, cookie: &str) -> Response {
    let request = harness.request(Method::GET, path).header("accept", "text/html,*/*;q=0.8");
    request.header("sec-fetch-site", "same-origin").header("cookie", cookie).send().await.unwrap()
}

async fn begin(harness: &Harness, path: &str) -> Begun {
    let begun = open(harness, path, "").await;
    assert_eq!(begun.status(), 302, "{path}: {}", begun.text().await.unwrap());
    let consent_page = header(&begun, "location").to_owned();
    let state = consent_page.split("state=").nth(1).unwrap().split('&').next().unwrap().to_owned();
    Begun { consent_page, state, cookie: header(&begun, "set-cookie").split(';').next().unwrap().to_owned() }
}

/// Comes back from the consent page with these parameters.
async fn end(harness: &Harness, begun: &Begun, parameters: &str) -> String {
    let path = format!("{CALLBACK}?{parameters}&state={}", begun.state);
    open(harness, &path, &begun.cookie).await.text().await.unwrap()
}

/// The target of the link with this text.
fn link(page: &str, text: &str) -> Option<String> {
    let before = page.split(&format!("\">{text}</a>")).next().filter(|before| *before != page)?;
    Some(before.rsplit("href=\"").next().unwrap().replace("&amp;", "&"))
}

/// Follows a link that starts a login, and consents.
async fn log_in_by(harness: &Harness, link: &str) -> String {
    let begun = begin(harness, link).await;
    let callback = harness.consent(&format!("{}{TOOLS}", begun.consent_page)).await;
    open(harness, &callback, &begun.cookie).await.text().await.unwrap()
}

async fn state_of(harness: &Harness, user: &str) -> String {
    harness.status_of(user).await["state"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_state_names_no_user_and_leads_to_a_page_that_asks_for_one() {
    let accounts = "[[account]]\nname = \"acme\"\nuser = \"anna\"\n[[account]]\nname = \"other\"\nuser = \"bob\"\n";
    let harness = Harness::with(accounts).await;
    for query in ["code=x&state=unknown", "error=access_denied&state=unknown", "state=unknown", "code=x", ""] {
        let page = open(&harness, &format!("{CALLBACK}?{query}"), "").await;
        assert_eq!((page.status().as_u16(), code(&page)), (400, "state_invalid"), "{query}");
        let page = page.text().await.unwrap();
        assert!(!page.contains("anna") && !page.contains("user_id") && !page.contains("unknown"), "{page}");
        assert_eq!(link(&page, "Try again").as_deref(), Some("/"), "{page}");
    }
    let start = open(&harness, "/", "").await.text().await.unwrap();
    let connected = log_in_by(&harness, &link(&start, "anna").expect("a link for anna")).await;
    assert!(connected.contains("Connected to Amazon Ads") && connected.contains("anna"), "{connected}");
    assert_eq!([state_of(&harness, "anna").await, state_of(&harness, "bob").await], ["fresh", "none"]);
    assert!(link(&start, "bob").is_some() && link(&start, "default").is_some(), "{start}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_login_leads_its_own_browser_to_one_of_the_same_user_and_region() {
    let harness = Harness::start().await;
    let begun = begin(&harness, &format!("{LOGIN}?user_id=shop%7C1&region=eu")).await;
    harness.advance(601);
    let stranger = Begun { cookie: String::new(), ..begin(&harness, LOGIN).await };
    let stranger = end(&harness, &Begun { state: begun.state.clone(), ..stranger }, "code=x").await;
    assert!(!stranger.contains("shop") && stranger.contains("state_invalid"), "{stranger}");
    let page = end(&harness, &begun, "code=x").await;
    assert!(page.contains("expired") && page.contains("state_invalid") && page.contains("shop|1"), "{page}");
    let again = link(&page, "Try again").expect("a link");
    assert_eq!(again, format!("{LOGIN}?user_id=shop%7C1&region=eu"));
    log_in_by(&harness, &again).await;
    assert_eq!([state_of(&harness, "shop%7C1").await, state_of(&harness, "default").await], ["fresh", "none"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cookie_that_is_not_the_logins_own_names_nobody() {
    let harness = Harness::start().await;
    let begun = begin(&harness, &format!("{LOGIN}?user_id=anna")).await;
    let name = begun.cookie.split('=').next().unwrap();
    for forged in ["x.na.mallory", "x.na", "x", "x.moon.mallory", "x.na.%3Cb%3E", "x.na.<b>"] {
        let forged = Begun { cookie: format!("{name}={forged}"), ..begin(&harness, LOGIN).await };
        let page = end(&harness, &Begun { state: begun.state.clone(), ..forged }, "error=access_denied").await;
        assert!(page.contains("another browser"), "{page}");
        assert!(!page.contains("mallory") && !page.contains("anna") && !page.contains("<b>"), "{page}");
    }
    // Nothing was consumed.
    let callback = harness.consent(&begun.consent_page).await;
    assert_eq!(open(&harness, &callback, &begun.cookie).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_of_a_callback_leads_to_a_login_that_works() {
    let harness = Harness::start().await;
    let path = format!("{LOGIN}?user_id=anna");
    for (parameters, expected) in [
        ("error=access_denied", "access_denied"),
        ("error=invalid_scope", "invalid_scope"),
        ("error=server_error", "server_error"),
        ("error=temporarily_unavailable", "temporarily_unavailable"),
        ("error=unauthorized_client", "other"),
        ("code=spoiled", "exchange_failed"),
    ] {
        let page = end(&harness, &begin(&harness, &path).await, parameters).await;
        assert!(page.contains(&format!("Code: <code>{expected}</code>")), "{page}");
        let again = link(&page, "Try again").unwrap_or_else(|| panic!("a link in {page}"));
        assert!(log_in_by(&harness, &again).await.contains("Connected to Amazon Ads"), "{expected}");
        assert_eq!(state_of(&harness, "anna").await, "fresh", "{expected}");
    }
    let begun = begin(&harness, &path).await;
    let callback = harness.consent(&format!("{}{BOOKS}", begun.consent_page)).await;
    let page = open(&harness, &callback, &begun.cookie).await.text().await.unwrap();
    assert!(page.contains("Code: <code>identity_changed</code>"), "{page}");
    assert!(log_in_by(&harness, &link(&page, "Try again").unwrap()).await.contains("Connected to Amazon Ads"));
    let replace = begin(&harness, &link(&page, "Replace").unwrap()).await;
    let callback = harness.consent(&format!("{}{BOOKS}", replace.consent_page)).await;
    assert_eq!(open(&harness, &callback, &replace.cookie).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callback_that_the_store_did_not_answer_can_be_sent_once_more() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let mut pair = Pair::over(cluster, &url, "", Clock::system()).await;
    let begun = begin(&pair.a, &format!("{LOGIN}?user_id=anna")).await;
    let callback = pair.a.consent(&begun.consent_page).await;
    pair.cluster.crash();
    let page = open(&pair.a, &callback, &begun.cookie).await;
    assert_eq!((page.status().as_u16(), code(&page)), (503, "temporarily_unavailable"));
    assert_eq!(page.headers()["retry-after"], "1");
    let page = page.text().await.unwrap();
    assert!(page.contains("store") && !page.contains("code="), "{page}");
    let told = pair.a.request(Method::GET, &callback).header("cookie", &begun.cookie).send().await.unwrap();
    assert_eq!((told.status().as_u16(), &told.headers()["retry-after"]), (503, &HeaderValue::from_static("1")));
    assert_eq!(link(&page, "Try again").as_deref(), Some(""), "this URL once more, which the page does not hold");
    pair.cluster.run();
    eventually("the login to end", async || {
        (open(&pair.a, &callback, &begun.cookie).await.status() == 200).then_some(())
    })
    .await;
    assert_eq!(state_of(&pair.a, "anna").await, "fresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_page_links_to_a_login_that_cannot_work_there() {
    let token = "[proxy]\nlisten = \"127.0.0.1:0\"\ncaller_token = \"one-token\"\n";
    let harness = Harness::with(token).await;
    let page = open(&harness, &format!("{CALLBACK}?code=x&state=unknown"), "").await.text().await.unwrap();
    assert!(!page.contains("href=\"/") && page.contains("where you started the login"), "{page}");

    let harness = Harness::with("[login]\nlisten = \"127.0.0.1:0\"\n").await;
    for query in ["code=x&state=unknown", "code=x&code=y"] {
        let request = harness.client.get(harness.login_listener_url(&format!("{CALLBACK}?{query}")));
        let page = request.header("accept", "text/html").send().await.unwrap().text().await.unwrap();
        assert!(!page.contains("href=\"/") && page.contains("<main"), "{page}");
    }

    // Amazon sends browsers to another host, where the cookie of a login begun here does not arrive.
    let mut harness = Harness::start().await;
    harness.restart_with("amazon.redirect_uri", "https://ads.example/api/auth/amazon/callback").await;
    let start = open(&harness, "/", "").await.text().await.unwrap();
    assert!(!start.contains(LOGIN) && start.contains("amazon.redirect_uri"), "{start}");

    // A program waits for its login, and whoever opens its callback may be a stranger.
    let harness = Harness::start().await;
    let begun = json(harness.get(&format!("{LOGIN}?user_id=anna")).await).await;
    let path = format!("{CALLBACK}?error=access_denied&state={}", begun["state"].as_str().unwrap());
    let page = open(&harness, &path, "").await.text().await.unwrap();
    assert!(!page.contains("anna") && page.contains("where you started the login"), "{page}");
    assert_eq!(link(&page, "Try again"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_an_endpoints_error_leads_on_where_something_can_be_done() {
    let harness = Harness::start().await;
    let wrong = open(&harness, &format!("{LOGIN}?user_id=anna&region=moon"), "").await.text().await.unwrap();
    assert_eq!((link(&wrong, "Start page").as_deref(), link(&wrong, "Try again")), (Some("/"), None), "{wrong}");
    let lost = open(&harness, "/api/auth/amazon/nothing", "").await.text().await.unwrap();
    assert_eq!(link(&lost, "Start page").as_deref(), Some("/"), "{lost}");
    let register = open(&harness, "/register", "").await.text().await.unwrap();
    assert!(register.contains(&format!("{LOGIN}?user_id=default\">http")), "a link: {register}");
    let foreign = harness.request(Method::GET, "/").header("accept", "text/html").header("host", "evil.test");
    let foreign = foreign.send().await.unwrap();
    assert_eq!(code(&foreign), "host_not_allowed");
    assert!(!foreign.text().await.unwrap().contains("href=\"/"), "it would be refused as well");
}
