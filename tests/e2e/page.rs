//! The status page through the wire: who may read it, what its forms do, what it shows and what it never shows.

use reqwest::{Method, Response};
use world::{Fault, Listener, Rule};

use crate::harness::{Harness, code, eventually, header, json};
use crate::throttle::waiting_bytes;

const PAGES: [&str; 6] = ["/", "/page/users", "/page/accounts", "/page/calls", "/page/throttle", "/page/settings"];
const ACTIONS: [&str; 5] = ["/page/refresh", "/page/logout", "/page/sync", "/page/reload", "/page/log"];

async fn page(harness: &Harness, path: &str) -> String {
    let answer = harness.client.get(harness.admin_url(path)).header("accept", "text/html").send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.text().await.unwrap()
}

/// The key that the forms of a page hold.
async fn form_key(harness: &Harness) -> String {
    let page = page(harness, "/page/settings").await;
    let rest = page.split("name=\"form_key\" value=\"").nth(1).expect("a form with a key");
    rest.split('"').next().unwrap().to_owned()
}

/// Sends a form as the page's own browser does.
async fn send(harness: &Harness, path: &str, fields: &[(&str, &str)]) -> Response {
    let key = form_key(harness).await;
    let own = harness.admin_url("");
    let form: Vec<_> = fields.iter().copied().chain([("form_key", key.as_str())]).collect();
    let request = harness.client.post(harness.admin_url(path)).form(&form);
    let request = request.header("origin", own).header("sec-fetch-site", "same-origin").header("accept", "text/html");
    request.send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_form_without_the_pages_own_origin_and_key_does_anything() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    let key = form_key(&harness).await;
    let own = harness.admin_url("");
    let port = own.rsplit(':').next().unwrap().to_owned();
    let elsewhere = format!("http://localhost:{port}");
    let refreshes = harness.sandbox.refreshes();
    for path in ACTIONS {
        let fields = if path.ends_with("log") { "level=trace" } else { "user_id=default" };
        let fields = if path.ends_with("reload") { "" } else { fields };
        let good = format!("{fields}&form_key={key}");
        let post = |body: &str, headers: &[(&str, &str)]| {
            let request = harness.client.post(harness.admin_url(path)).body(body.to_owned());
            let request = request.header("content-type", "application/x-www-form-urlencoded");
            headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send()
        };
        for headers in [
            &[("origin", "https://evil.test")][..],
            &[("origin", "null")],
            &[("origin", elsewhere.as_str())],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site")],
            &[("origin", own.as_str()), ("sec-fetch-site", "cross-site")],
        ] {
            let answer = post(&good, headers).await.unwrap();
            assert_eq!((answer.status().as_u16(), code(&answer)), (403, "cross_site"), "{path} {headers:?}");
        }
        let answer = post(&good, &[("host", "evil.test")]).await.unwrap();
        assert_eq!(code(&answer), "host_not_allowed", "{path}");
        for (body, refused) in [
            (fields.to_owned(), "bad_request"),
            (format!("{fields}&form_key={}x", &key[1..]), "cross_site"),
            (format!("{fields}&form_key="), "cross_site"),
            (format!("{good}&form_key={key}"), "bad_request"),
            (format!("{good}&user=anna"), "bad_request"),
            (format!("{good}&{}", "x".repeat(2000)), "bad_request"),
        ] {
            let answer = post(&body, &[("origin", own.as_str())]).await.unwrap();
            assert_eq!(code(&answer), refused, "{path} {body}");
        }
        let json = harness.client.post(harness.admin_url(path)).header("content-type", "application/json");
        assert_eq!(code(&json.body("{}").send().await.unwrap()), "bad_request", "{path}");
        let got = harness.client.get(harness.admin_url(path)).send().await.unwrap();
        assert_eq!((got.status().as_u16(), header(&got, "allow")), (405, "POST"), "{path}");
        let query = harness.client.post(harness.admin_url(&format!("{path}?user_id=default")));
        assert_eq!(code(&query.send().await.unwrap()), "bad_request", "{path}");
    }
    assert_eq!(harness.status_of("default").await["state"], "fresh", "nobody was logged out");
    assert_eq!(harness.sandbox.refreshes(), refreshes);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_paths_and_parameters_of_the_page_are_refused() {
    let harness = Harness::start().await;
    for path in ["/page", "/page/", "/page/users/", "/page/nothing", "/page/script.js/x", "/users", "/Page/users"] {
        let answer = harness.client.get(harness.admin_url(path)).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (404, "not_found"), "{path}");
    }
    for (path, named) in [
        ("/page/users?user=anna", "user"),
        ("/page/users?state=tired", "state"),
        ("/page/users?q=a&q=b", "repeated"),
        ("/page/accounts?type=shop", "type"),
        ("/page/calls?only=mine", "only"),
        ("/page/settings?did=nothing", "did"),
        ("/page/login?user_id=%0A", "user id"),
        ("/page/login?user_id=", "user_id"),
        ("/page/login", "user_id"),
        ("/page/script.js?v=1", "v"),
    ] {
        let answer = harness.client.get(harness.admin_url(path)).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), code(&answer)), (400, "bad_request"), "{path}");
        let detail = json(answer).await["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(named), "{path}: {detail}");
    }
    for path in PAGES {
        let posted = harness.client.post(harness.admin_url(path)).send().await.unwrap();
        assert_eq!((posted.status().as_u16(), header(&posted, "allow")), (405, "GET, HEAD"), "{path}");
        for site in ["cross-site", "same-site"] {
            let request = harness.client.get(harness.admin_url(path)).header("sec-fetch-site", site);
            assert_eq!(code(&request.send().await.unwrap()), "cross_site", "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_forms_refresh_find_accounts_reload_and_log_out() {
    let harness = Harness::start().await;
    harness.log_in("anna").await;
    let before = harness.sandbox.refreshes();
    let led = async |path: &str, fields: &[(&str, &str)], to: &str, said: &str| {
        let answer = send(&harness, path, fields).await;
        assert_eq!((answer.status().as_u16(), header(&answer, "location")), (303, to), "{path}");
        let shown = page(&harness, to).await;
        assert!(shown.contains(said), "{path}: {shown}");
    };
    let anna = &[("user_id", "anna")][..];
    led("/page/refresh", anna, "/page/users?user_id=anna&did=refresh", "The access token of user anna was refreshed")
        .await;
    assert_eq!(harness.sandbox.refreshes(), before + 1);
    led("/page/sync", anna, "/page/accounts?user_id=anna&did=sync", "X-Ads-Account: ").await;
    led("/page/reload", &[], "/page/settings?did=reload", "The configuration was read again").await;
    led("/page/log", &[("level", "debug")], "/page/settings?did=log", "The log level was changed").await;
    led("/page/logout", anna, "/page/users?user_id=anna&did=logout", "The tokens of user anna were deleted").await;
    assert_eq!(harness.status_of("anna").await["state"], "none");
    assert!(page(&harness, "/page/users").await.contains("Nobody has logged in yet"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_fails_says_why_and_what_to_do_and_leads_back() {
    let harness = Harness::start().await;
    harness.log_in("anna").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa).always());
    let answer = send(&harness, "/page/refresh", &[("user_id", "anna")]).await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (503, "token_unavailable"));
    assert!(!header(&answer, "retry-after").is_empty());
    let text = answer.text().await.unwrap();
    assert!(text.contains("could not be refreshed") && text.contains("href=\"/page/users\""), "{text}");
    let answer = send(&harness, "/page/refresh", &[("user_id", "nobody")]).await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (401, "login_required"));
    let answer = send(&harness, "/page/log", &[("level", "<b>loud")]).await;
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert!(status == 400 && text.contains("error, warn, info, debug or trace") && !text.contains("<b>"), "{text}");
    // Programs get the document.
    let key = form_key(&harness).await;
    let form = [("user_id", "nobody"), ("form_key", key.as_str())];
    let answer = harness.client.post(harness.admin_url("/page/refresh")).form(&form).send().await.unwrap();
    assert_eq!(json(answer).await["code"], "login_required");
    // Weights and letter case count here as they do at the endpoints.
    for (accept, kind) in [
        ("TEXT/HTML, */*;q=0.8", "text/html; charset=utf-8"),
        ("application/xhtml+xml, text/html", "text/html; charset=utf-8"),
        ("text/html;q=0.1, application/json", "application/problem+json"),
    ] {
        let request = harness.client.post(harness.admin_url("/page/refresh")).form(&form).header("accept", accept);
        assert_eq!(header(&request.send().await.unwrap(), "content-type"), kind, "{accept}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_a_form_asks_for_during_a_shutdown_is_refused_at_once() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let caller = tokio::spawn(harness.request(Method::GET, "/v2/profiles").send());
    gate.reached(1).await;
    let (key, ready) = (form_key(&harness).await, harness.admin_url("/readyz"));
    let (url, own) = (harness.admin_url("/page/reload"), harness.admin_url(""));
    let stopped = harness.begin_stop();
    eventually("it drains", async || (harness.client.get(&ready).send().await.unwrap().status() == 503).then_some(()))
        .await;
    let form = harness.client.post(url).form(&[("form_key", key.as_str())]).header("origin", own);
    let answer = tokio::time::timeout(std::time::Duration::from_secs(10), form.send()).await.expect("an answer");
    let answer = answer.unwrap();
    assert_eq!((answer.status().as_u16(), code(&answer), header(&answer, "retry-after")), (503, "draining", "1"));
    gate.release();
    assert_eq!(caller.await.unwrap().unwrap().status(), 200);
    stopped.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_shows_each_call_with_its_family_status_fault_and_id_and_no_path() {
    let harness = Harness::with("[[account]]\nname = \"shop\"\nregion = \"eu\"\nprofile_id = \"77\"\n").await;
    assert!(page(&harness, "/page/calls").await.contains("No call yet"));
    harness.get("/v2/profiles?canary").await;
    harness.log_in("default").await;
    let call = async |path: &str, id: &str| {
        harness.request(Method::GET, path).header("x-request-id", id).send().await.unwrap().status().as_u16()
    };
    assert_eq!(call("/v2/profiles?canary", "id-of-a-good-one").await, 200);
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Eu));
    assert_eq!(call("/v2/profiles?canary", "id-of-a-bad-one").await, 500);
    let rows = page(&harness, "/page/calls?part=true").await;
    let row =
        |id: &str| rows.split("<tr>").find(|row| row.contains(id)).unwrap_or_else(|| panic!("{id}: {rows}")).to_owned();
    let good = row("id-of-a-good-one");
    assert!(good.contains("GET") && good.contains("shop") && good.contains(">200<"), "{good}");
    assert!(row("id-of-a-bad-one").contains("<td>amazon</td>"), "{rows}");
    assert!(rows.find("id-of-a-bad-one").unwrap() < rows.find("id-of-a-good-one").unwrap(), "the newest is first");
    assert!(rows.contains(">401<") && rows.contains("<td>operator</td>"), "{rows}");
    assert_eq!(rows.matches("<tr>").count(), 3, "the login is no call to Amazon: {rows}");
    for (only, count) in [("failures", 2), ("amazon", 1), ("operator", 1), ("sidecar", 0)] {
        let rows = page(&harness, &format!("/page/calls?only={only}&part=true")).await;
        assert_eq!(rows.matches("class=\"id\"").count(), count, "{only}: {rows}");
    }
    assert!(!rows.contains("canary") && !rows.contains("/v2"), "{rows}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_charts_count_the_last_hour_minute_by_minute() {
    let harness = Harness::set(&[("throttle.mode", "queue")]).await;
    let chart = async |title: &str| {
        let text = page(&harness, "/?part=true").await;
        let begin = text.find(&format!("aria-label=\"{title} in each minute")).unwrap_or_else(|| panic!("{text}"));
        text[begin..].split("</figure>").next().unwrap().to_owned()
    };
    for _ in 0..3 {
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Na));
    assert_eq!(harness.get("/v2/profiles").await.status(), 500);
    harness.sandbox.set_fault(Rule::from(Fault::status(404)).at(Listener::Na));
    assert_eq!(harness.get("/v2/profiles").await.status(), 404);
    let now = "M295 100v-100";
    assert!(chart("Errors").await.contains("last hour: 2 together, at most 2 in a minute"));
    assert!(chart("Requests").await.contains(now), "the current minute is at the end");
    harness.advance(120);
    // The sidecar looks every two seconds whether a minute is over; whoever opens the page does not wait for that.
    chart("Errors").await;
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200);
    let errors = chart("Errors").await;
    assert!(errors.contains("M285 100v-100") && !errors.contains(now), "two minutes ago: {errors}");
    let refreshes = chart("Refreshes").await;
    assert!(refreshes.contains("1 together") && refreshes.contains(now), "{refreshes}");
    harness.advance(3600);
    assert!(chart("Errors").await.contains("0 together"), "an hour later it is forgotten");
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(10))).at(Listener::Na));
    let waits = tokio::spawn(harness.request(Method::GET, "/v2/profiles").send());
    eventually("it waits", async || (waiting_bytes(&harness).await > 0.0).then_some(())).await;
    harness.advance(12);
    assert_eq!(waits.await.unwrap().unwrap().status(), 200);
    assert!(chart("Waits").await.contains("last hour: 1 together"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_ends_although_nobody_looks_at_the_page() {
    let harness = Harness::set(&[("accounts.sync", "off")]).await;
    // The login has sent two requests of its own.
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    harness.advance(60);
    // The control loop looks whether a minute is over, and then whether the configuration has changed.
    let reloads = "adsidecar_config_reload_timestamp_seconds";
    let before = harness.metric(reloads).await;
    let file = harness.config_file();
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text + "\n# changed\n").unwrap();
    eventually("the control loop", async || (harness.metric(reloads).await > before).then_some(())).await;
    for _ in 0..5 {
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
    let text = page(&harness, "/?part=true").await;
    let charts = text.split("<figure>").find(|chart| chart.contains("Requests in each minute")).unwrap();
    assert!(charts.contains("at most 5 in a minute"), "{charts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_ends_after_a_hundred_calls() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    for number in 0..105 {
        let request = harness.request(Method::GET, "/v2/profiles").header("x-request-id", format!("call-{number}-"));
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    let rows = page(&harness, "/page/calls?part=true").await;
    let shown: Vec<_> = (0..105).filter(|number| rows.contains(&format!("call-{number}-"))).collect();
    assert_eq!(shown, (5..105).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_of_a_form_is_good_after_a_reload_and_at_no_other_process() {
    let mut harness = Harness::start().await;
    let key = form_key(&harness).await;
    let sent = async |harness: &Harness| {
        let form = [("level", "warn"), ("form_key", key.as_str())];
        let request = harness.client.post(harness.admin_url("/page/log")).form(&form);
        code(&request.header("origin", harness.admin_url("")).send().await.unwrap()).to_owned()
    };
    assert_eq!(send(&harness, "/page/reload", &[]).await.status(), 303);
    assert_eq!(sent(&harness).await, "", "a page that is open goes on working");
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    assert_eq!(sent(&harness).await, "cross_site");
    assert_ne!(form_key(&harness).await, key);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_is_shown_with_its_sources_and_without_secrets() {
    let mut harness =
        Harness::with("[[account]]\nname = \"shop\"\nregion = \"eu\"\nheaders = { X-Own = \"hush\" }\n").await;
    harness.restart_with("refresh.margin", "4m").await;
    let text = page(&harness, "/page/settings").await;
    let row =
        |key: &str| text.split("<tr>").find(|row| row.contains(&format!("<code>{key}</code>"))).unwrap().to_owned();
    assert!(row("refresh.margin").contains("&quot;4m&quot;") && row("refresh.margin").contains("--set"), "{text}");
    assert!(row("refresh.ahead").contains(">default<"), "{text}");
    assert!(row("amazon.client_id").contains("adsidecar.toml"), "{text}");
    assert!(row("amazon.client_secret").contains("…") && row("store.fernet_keys").contains("…"), "{text}");
    assert!(row("account").contains("shop") && row("store.path").contains("restart"), "{text}");
    assert!(!text.contains("hush"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_accounts_are_searched_and_filtered() {
    let harness = Harness::start().await;
    for user in ["anna", "bert", "z.anton"] {
        harness.log_in(user).await;
    }
    harness.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa));
    harness.post("/api/auth/amazon/refresh?user_id=bert").await;
    let found = async |query: &str| {
        let text = page(&harness, &format!("/page/users?{query}")).await;
        ["anna", "bert", "z.anton"].map(|user| text.contains(&format!("X-Ads-User: {user}<")))
    };
    assert_eq!(found("").await, [true; 3]);
    assert_eq!(found("q=NN").await, [true, false, false]);
    assert_eq!(found("q=n&state=").await, [true, false, true]);
    assert_eq!(found("state=login_required").await, [false, true, false]);
    assert_eq!(found("q=anna&state=login_required").await, [false; 3]);

    assert_eq!(harness.post("/api/auth/amazon/accounts/sync?user_id=anna").await.status(), 200);
    let all = json(harness.get("/api/auth/amazon/accounts?user_id=anna").await).await;
    let listed = all["accounts"].as_array().unwrap();
    let text = eventually("the accounts", async || {
        let text = page(&harness, "/page/accounts?user_id=anna").await;
        (text.contains(&format!("{} accounts.", listed.len()))).then_some(text)
    })
    .await;
    for account in listed {
        let (header, url) = (account["header"].as_str().unwrap(), account["url"].as_str().unwrap());
        assert!(text.contains(&format!("data-copy=\"{header}\"")) && text.contains(url), "{header}: {text}");
    }
    let country = listed.iter().find_map(|account| account["country"].as_str()).unwrap();
    let of_country = listed.iter().filter(|account| account["country"] == country).count();
    let text = page(&harness, &format!("/page/accounts?user_id=anna&country={country}")).await;
    assert_eq!(text.matches("X-Ads-Account: ").count(), of_country * 3, "shown, copied, and named: {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_reverse_proxy_links_forms_and_redirects_lead_to_the_public_url() {
    let mut harness = Harness::start().await;
    harness.restart_with("proxy.caller_token", "open-sesame-open-sesame").await;
    harness.restart_with("admin.public_url", "https://ads.example/status").await;
    let as_proxy = |request: reqwest::RequestBuilder| {
        request.header("host", "ads.example").header("x-ads-sidecar-token", "open-sesame-open-sesame")
    };
    let get =
        as_proxy(harness.client.get(harness.admin_url("/page/settings"))).send().await.unwrap().text().await.unwrap();
    assert!(get.contains("href=\"https://ads.example/status/page/users\""), "{get}");
    assert!(get.contains("action=\"https://ads.example/status/page/reload\""), "{get}");
    let key = get.split("name=\"form_key\" value=\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
    let post = |origin: &'static str| {
        let form = [("level", "warn"), ("form_key", key.as_str())];
        as_proxy(harness.client.post(harness.admin_url("/page/log")).form(&form)).header("origin", origin).send()
    };
    assert_eq!(code(&post("https://evil.example").await.unwrap()), "cross_site");
    let sent = post("https://ads.example").await.unwrap();
    assert_eq!(
        (sent.status().as_u16(), header(&sent, "location")),
        (303, "https://ads.example/status/page/settings?did=log")
    );
    let without = harness.client.post(harness.admin_url("/page/log")).header("host", "ads.example");
    let without = without.form(&[("level", "warn"), ("form_key", key.as_str())]).send().await.unwrap();
    assert_eq!(code(&without), "caller_unauthorized");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_failed_leads_its_own_browser_on_and_nobody_else() {
    let harness = Harness::start().await;
    let begin = async |query: &str| {
        let login = format!("/api/auth/amazon/login?user_id=anna{query}");
        let begun = harness.request(Method::GET, &login).header("accept", "text/html").send().await.unwrap();
        let state = header(&begun, "location").split("state=").nth(1).unwrap().split('&').next().unwrap().to_owned();
        (state, header(&begun, "set-cookie").split(';').next().unwrap().to_owned())
    };
    let end = async |state: &str, cookie: &str| {
        let path = format!("/api/auth/amazon/callback?error=access_denied&state={state}");
        let request = harness.request(Method::GET, &path).header("accept", "text/html").header("cookie", cookie);
        request.send().await.unwrap().text().await.unwrap()
    };
    let again = "href=\"/api/auth/amazon/login?user_id=anna\"";
    let (state, cookie) = begin("").await;
    let stranger = end(&state, "none=1").await;
    assert!(!stranger.contains("anna") && stranger.contains("Not connected"), "{stranger}");
    let own = end(&state, &cookie).await;
    assert!(own.contains(again) && own.contains("Try again") && own.contains("access_denied"), "{own}");
    assert!(!own.contains("replace=true"), "{own}");
    // A program's login: whoever opens its callback may be a stranger.
    let begun = json(harness.get("/api/auth/amazon/login?user_id=anna").await).await;
    let by_program = end(begun["state"].as_str().unwrap(), "none=1").await;
    assert!(by_program.contains("access_denied") && !by_program.contains("anna"), "{by_program}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_an_endpoint_is_a_page_for_a_browser_and_a_document_for_a_program() {
    let harness = Harness::start().await;
    let path = "/api/auth/amazon/login?user_id=anna&region=moon";
    let program = harness.get(path).await;
    assert_eq!((program.status().as_u16(), header(&program, "content-type")), (400, "application/problem+json"));
    let browser = harness.request(Method::GET, path).header("accept", "text/html,*/*;q=0.8").send().await.unwrap();
    assert_eq!((browser.status().as_u16(), code(&browser)), (400, "bad_request"));
    assert_eq!(header(&browser, "content-type"), "text/html; charset=utf-8");
    assert!(header(&browser, "content-security-policy").starts_with("default-src 'none'"), "{browser:?}");
    let text = browser.text().await.unwrap();
    assert!(
        text.contains("region must be na, eu or fe") && text.contains("bad_request") && !text.contains("moon"),
        "{text}"
    );
}
