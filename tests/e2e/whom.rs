//! Whatever names a user or an account, and is not understood, is refused: it is never ignored in favour of the
//! default.

use adsidecar::domain::clock::Clock;
use reqwest::Method;
use serde_json::Value;
use world::{Fault, Listener, Options, Rule};

use crate::commands::run;
use crate::harness::{Harness, code, eventually, header, json};

const LOGIN: &str = "/api/auth/amazon/login";
const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGOUT: &str = "/api/auth/amazon/logout";
const STATUS: &str = "/api/auth/amazon/status";

/// A request to one of our own endpoints with something that it does not know, which its answer must name.
struct Odd {
    method: Method,
    target: String,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
    named: &'static str,
}

fn odd_requests() -> Vec<Odd> {
    let mut all = Vec::new();
    let endpoints = [
        (Method::GET, LOGIN),
        (Method::GET, STATUS),
        (Method::POST, REFRESH),
        (Method::POST, LOGOUT),
        (Method::DELETE, "/api/auth/amazon/users/default"),
        (Method::POST, "/api/auth/amazon/confirm"),
    ];
    const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");
    const JSON: (&str, &str) = ("content-type", "application/json");
    for (method, path) in endpoints {
        for (query, named) in [
            ("user=anna", "user"),
            ("userId=anna", "userId"),
            ("USER_ID=anna", "USER_ID"),
            ("user-id=anna", "user-id"),
            ("%20user_id=anna", "user_id"),
            ("user_id[]=anna", "user_id"),
            ("account=acme", "account"),
        ] {
            let target = format!("{path}?{query}");
            all.push(Odd { method: method.clone(), target, headers: &[], body: "", named });
        }
        if path != "/api/auth/amazon/users/default" && path != "/api/auth/amazon/confirm" {
            let target = format!("{path}?user_id=anna&user_id=anna");
            all.push(Odd { method: method.clone(), target, headers: &[], body: "", named: "user_id" });
        }
        for (headers, named) in [
            (&[("x-ads-user", "anna")][..], "x-ads-user"),
            (&[("x-ads-account", "acme")], "x-ads-account"),
            (&[("x_ads_user", "anna")], "x_ads_user"),
            (&[("x-ads-userid", "anna")], "x-ads-userid"),
        ] {
            all.push(Odd { method: method.clone(), target: path.into(), headers, body: "", named });
        }
        let bodies: &[(&'static [_], &'static str, &'static str)] = match method {
            Method::POST => &[
                (&[FORM], "user=anna", "user"),
                (&[FORM], "user_id=anna&user_id=bob", ""),
                (&[FORM], "{\"user_id\":\"anna\"}", "user_idanna"),
                (&[JSON], "{\"userId\":\"anna\"}", "userId"),
                (&[JSON], "{\"user_id\":\"anna\",\"user_id\":\"bob\"}", ""),
                (&[JSON], "[\"anna\"]", "JSON"),
                (&[JSON], "{\"user_id\":7}", "JSON"),
                (&[], "user_id=anna", "form"),
                (&[("content-type", "text/plain")], "user_id=anna", "form"),
            ],
            _ => &[(&[FORM], "user_id=anna", "body"), (&[JSON], "{\"user_id\":\"anna\"}", "body")],
        };
        for (headers, body, named) in bodies {
            all.push(Odd { method: method.clone(), target: path.into(), headers, body, named });
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 1.
async fn a_request_that_an_own_endpoint_does_not_understand_changes_nothing_and_says_what_it_is() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.log_in("anna").await;
    harness.sandbox.clear_history();
    let all = odd_requests();
    assert!(all.len() > 80, "{}", all.len());
    for odd in all {
        let mut request = harness.request(odd.method.clone(), &odd.target).body(odd.body);
        for (name, value) in odd.headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        let what = format!("{} {} {:?} {}", odd.method, odd.target, odd.headers, odd.body);
        assert_eq!((answer.status().as_u16(), code(&answer)), (400, "bad_request"), "{what}");
        let detail = json(answer).await["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(odd.named), "{what}: {detail}");
    }
    for user in ["default", "anna"] {
        assert_eq!(harness.status_of(user).await["state"], "fresh", "{user}");
    }
    assert!(harness.sandbox.history().is_empty(), "and nothing was sent to Amazon");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 1.
async fn user_id_is_taken_from_a_form_or_a_json_body_and_refused_where_the_query_says_another() {
    let harness = Harness::start().await;
    for user in ["default", "anna", "bob"] {
        harness.log_in(user).await;
    }
    let form = ("content-type", "application/x-www-form-urlencoded");
    let conflict = harness.request(Method::POST, &format!("{LOGOUT}?user_id=anna")).header(form.0, form.1);
    let conflict = conflict.body("user_id=bob").send().await.unwrap();
    assert_eq!((conflict.status().as_u16(), code(&conflict)), (400, "bad_request"));
    for user in ["default", "anna", "bob"] {
        assert_eq!(harness.status_of(user).await["state"], "fresh", "{user}");
    }
    let logout = harness.request(Method::POST, LOGOUT).header(form.0, form.1).body("user_id=anna").send().await;
    assert_eq!(logout.unwrap().status(), 204);
    let json_type = "application/json; charset=utf-8";
    let logout = harness.request(Method::POST, LOGOUT).header("content-type", json_type);
    assert_eq!(logout.body("{\"user_id\":\"bob\"}").send().await.unwrap().status(), 204);
    let states = ["default", "anna", "bob"].map(|user| (user, if user == "default" { "fresh" } else { "none" }));
    for (user, state) in states {
        assert_eq!(harness.status_of(user).await["state"], state, "{user}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 2.
async fn a_misspelt_selector_is_refused_with_the_nearest_name_and_nothing_is_sent() {
    let harness = Harness::with("[[account]]\nname = \"default\"\nprofile_id = \"1\"\n").await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for (line, meant) in [
        ("X-Ads-Acount: acme", "X-Ads-Account"),
        ("X_Ads_Account: acme", "X-Ads-Account"),
        ("x-ads_account: acme", "X-Ads-Account"),
        ("X-Ads-Profile: 222", "X-Ads-"),
        ("X-Ads-Users: anna", "X-Ads-User"),
        ("X-Ads-Regoin: eu", "X-Ads-Region"),
        ("X_Ads_User: anna", "X-Ads-User"),
        ("X-Ads-Sidecar_Token: t", "X-Ads-Sidecar-Token"),
    ] {
        let answer = harness.send_raw(format!("GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\n{line}\r\n\r\n")).await;
        assert_eq!(answer.said(), (400, "bad_request"), "{line}");
        assert!(answer.json()["detail"].as_str().unwrap().contains(meant), "{line}: {answer:?}");
    }
    assert!(harness.ads_calls().is_empty());
    let good = "GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\nX-Ads-Account: default\r\nX-Ads-Region: na\r\n\r\n";
    assert_eq!(harness.send_raw(good).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_refresh_that_fails_says_so_and_is_retried_on_the_normal_backoff() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa).next(1));
    let failed = harness.post(REFRESH).await;
    assert_eq!((failed.status().as_u16(), code(&failed)), (503, "token_unavailable"));
    assert!(!header(&failed, "retry-after").is_empty());
    let body = json(failed).await;
    assert_eq!((&body["user"]["state"], &body["user"]["last_error"]), (&"failing".into(), &"server_error".into()));
    assert!(body["detail"].as_str().unwrap().contains("server_error"), "{body}");
    // 59 minutes are left, and the state must not stay until then.
    harness.advance(60);
    eventually("the retry", async || (harness.status_of("default").await["state"] == "fresh").then_some(())).await;
    assert_eq!(harness.status_of("default").await["last_error"], Value::Null);
}

/// A browser's login up to the consent: its callback and its cookie.
async fn browser_login(harness: &Harness) -> (String, String) {
    let page = harness.request(Method::GET, LOGIN).header("accept", "text/html").send().await.unwrap();
    assert_eq!(page.status(), 302);
    let cookie = header(&page, "set-cookie").split(';').next().unwrap().to_owned();
    (harness.consent(header(&page, "location")).await, cookie)
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 7.
// Covers: situation 8.
// Covers: situation 9.
async fn a_prefetch_or_a_stranger_consumes_no_login_and_a_reload_shows_the_first_outcome() {
    let harness = Harness::start().await;
    let (callback, cookie) = browser_login(&harness).await;
    harness.sandbox.clear_history();
    for (name, value) in [("sec-purpose", "prefetch;prerender"), ("purpose", "prefetch"), ("x-moz", "prefetch")] {
        let request = harness.request(Method::GET, &callback).header("cookie", &cookie).header(name, value);
        assert_eq!(request.send().await.unwrap().status(), 204, "{name}");
    }
    for stranger in [None, Some("adsidecar_login_00000000=x")] {
        let mut request = harness.request(Method::GET, &callback);
        if let Some(cookie) = stranger {
            request = request.header("cookie", cookie);
        }
        let refused = request.send().await.unwrap();
        assert_eq!((refused.status().as_u16(), code(&refused)), (400, "state_invalid"));
    }
    assert_eq!(harness.status_of("default").await["state"], "none");
    let mut texts = Vec::new();
    for _ in 0..3 {
        let page = harness.request(Method::GET, &callback).header("cookie", &cookie).header("accept", "text/html");
        let page = page.send().await.unwrap();
        assert_eq!(page.status(), 200);
        texts.push(page.text().await.unwrap());
    }
    assert!(texts.iter().all(|text| *text == texts[0] && text.contains("Connected to Amazon Ads")), "{texts:?}");
    let exchanges = harness.sandbox.calls(Listener::Lwa).len();
    assert_eq!(exchanges, 1, "the code is exchanged once");
    let stranger = harness.get(&callback).await;
    assert_eq!((stranger.status().as_u16(), code(&stranger)), (400, "state_invalid"), "the outcome is the browser's");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_deliveries_of_one_callback_at_once_exchange_the_code_once_and_say_the_same() {
    let harness = Harness::start().await;
    let (callback, cookie) = browser_login(&harness).await;
    harness.sandbox.clear_history();
    let send = || harness.request(Method::GET, &callback).header("cookie", &cookie).send();
    let (one, other) = tokio::join!(send(), send());
    assert_eq!((one.unwrap().status().as_u16(), other.unwrap().status().as_u16()), (200, 200));
    assert_eq!(harness.sandbox.calls(Listener::Lwa).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_programs_callback_that_comes_twice_is_told_to_be_completed_and_nothing_more() {
    let harness = Harness::start().await;
    let begun = json(harness.get(&format!("{LOGIN}?user_id=anna")).await).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    assert_eq!(harness.get(&callback).await.status(), 200);
    let again = harness.get(&callback).await;
    assert_eq!((again.status().as_u16(), code(&again)), (400, "state_invalid"));
    let text = again.text().await.unwrap();
    assert!(text.contains("completed already") && !text.contains("anna"), "{text}");
    assert_eq!(harness.status_of("anna").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 6.
async fn a_browser_under_another_name_of_this_machine_is_sent_to_the_redirect_uris_before_a_cookie_is_set() {
    let harness = Harness::start().await;
    let port = harness.proxy_address().port();
    for host in [format!("127.0.0.1:{port}"), format!("[::1]:{port}"), "127.0.0.1".to_owned()] {
        let request = format!("GET {LOGIN}?user_id=anna HTTP/1.1\r\nHost: {host}\r\nAccept: text/html\r\n\r\n");
        let moved = harness.send_raw(request).await;
        assert_eq!(moved.status, 302, "{moved:?}");
        assert_eq!(
            moved.header("location"),
            Some("http://localhost:8001/api/auth/amazon/login?user_id=anna"),
            "{host}"
        );
        assert_eq!(moved.header("set-cookie"), None, "the cookie would belong to {host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 6.
async fn a_program_that_calls_another_name_of_this_machine_is_told_links_at_the_redirect_uris_origin() {
    let harness = Harness::start().await;
    let port = harness.proxy_address().port();
    for host in [format!("127.0.0.1:{port}"), format!("[::1]:{port}"), "LOCALHOST".to_owned()] {
        let ask = async |path: &str| {
            let told = harness.send_raw(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await.json();
            told.to_string()
        };
        let (status, document) = (format!("{STATUS}?user_id=default"), "/.well-known/oauth-protected-resource");
        let link = "http://localhost:8001/api/auth/amazon/login?user_id=default";
        for path in ["/v2/profiles", &status, "/", document] {
            let told = ask(path).await;
            assert!(
                told.contains(link),
                "{host} {path}: \
                {told}"
            );
            assert!(!told.contains(&host), "{host} {path}: {told}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 8.
async fn a_callback_that_is_delivered_twice_leads_to_the_frontend_with_the_same_result() {
    let harness = Harness::with("[login]\nfrontend_url = \"https://app.example.com/\"\n").await;
    let (callback, cookie) = browser_login(&harness).await;
    harness.sandbox.clear_history();
    for _ in 0..2 {
        let page = harness.request(Method::GET, &callback).header("cookie", &cookie).header("accept", "text/html");
        let page = page.send().await.unwrap();
        let location = header(&page, "location");
        assert!(location.starts_with("https://app.example.com/?status=success"), "{} {location}", page.status());
    }
    assert_eq!(harness.sandbox.calls(Listener::Lwa).len(), 1, "the code is exchanged once");
}

#[tokio::test(flavor = "multi_thread")]
async fn return_to_cannot_forge_a_result() {
    let harness = Harness::with("[login]\nfrontend_url = \"https://app.example.com/\"\n").await;
    for name in ["status", "user_id", "grant", "error"] {
        let target = format!("{LOGIN}?return_to=/done%3Ftab%3Dads%26{name}%3Dx");
        let refused = harness.get(&target).await;
        assert_eq!((refused.status().as_u16(), code(&refused)), (400, "bad_request"), "{name}");
    }
    assert_eq!(harness.get(&format!("{LOGIN}?return_to=/done%3Ftab%3Dads")).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 20.
async fn a_login_that_comes_back_at_another_path_never_leaves_with_its_code() {
    let harness = Harness::with("[[account]]\nname = \"shop\"\n").await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    let begun = json(harness.get(LOGIN).await).await;
    let state = begun["state"].as_str().unwrap();
    for path in ["/callback", "/api/auth/amazon/callback/", "/oauth2/callback", "/"] {
        let stray = harness.get(&format!("{path}?code=ANcode&state={state}")).await;
        assert!((400..=404).contains(&stray.status().as_u16()), "{path}: {stray:?}");
        let text = stray.text().await.unwrap();
        assert!(!text.contains("ANcode"), "{text}");
    }
    // So does the browser that Amazon sends back, in words for its person.
    for path in ["/", "/callback", "/api/auth/amazon/callback/", "//api/auth/amazon/callback"] {
        let browser = harness
            .request(Method::GET, &format!("{path}?code=ANcode&state={state}"))
            .header("accept", "text/html")
            .header("sec-fetch-site", "cross-site")
            .header("sec-fetch-mode", "navigate");
        let page = browser.send().await.unwrap();
        assert_eq!((page.status().as_u16(), code(&page)), (404, "not_found"), "{path}");
        let text = page.text().await.unwrap();
        assert!(text.contains("amazon.redirect_uri") && !text.contains("ANcode"), "{path}: {text}");
    }
    // The same where a client names Amazon's host or an account, with HEAD, and beside another state.
    let port = harness.proxy_address().port();
    let here = format!("localhost:{port}");
    for (method, target, host) in [
        ("HEAD", format!("/callback?code=ANcode&state={state}"), here.as_str()),
        ("GET", format!("/callback?state=x&code=ANcode&state={state}"), &here),
        ("GET", format!("/callback?%63ode=ANcode&stat%65={state}"), &here),
        ("GET", format!("/a/shop/callback?code=ANcode&state={state}"), &here),
        ("HEAD", format!("/a/shop/v2/profiles?state={state}&code=ANcode"), &here),
        ("GET", format!("http://{here}/callback?code=ANcode&state={state}"), &here),
        ("GET", format!("http://advertising-api.amazon.com/?code=ANcode&state={state}"), "advertising-api.amazon.com"),
        ("GET", format!("http://advertising-api-eu.amazon.com/cb?code=ANcode&state={state}"), &here),
    ] {
        let mut wire = harness.dial().await;
        wire.send(format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        let stray = if method == "HEAD" { wire.reply_head().await } else { wire.reply().await };
        assert_eq!(stray.said(), (404, "not_found"), "{method} {target}");
        assert!(!stray.text().contains("ANcode"), "{stray:?}");
    }
    let stray = json(harness.get(&format!("/callback?code=ANcode&state={state}")).await).await;
    assert!(stray["next_step"].as_str().unwrap().contains("amazon.redirect_uri"), "{stray}");
    assert!(harness.ads_calls().is_empty());
    for uri in ["http://localhost:8001/callback", "http://localhost:8001/api/auth/amazon/callback/"] {
        let set = format!("amazon.redirect_uri={uri}");
        let checked = run(&harness, &["check", "--set", &set], "").await;
        for named in ["amazon.redirect_uri", "/api/auth/amazon/callback"] {
            assert!(checked.err.contains(named), "{uri}: {}", checked.err);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_says_what_listens_here_and_never_reaches_amazon() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    let root = json(harness.get("/").await).await;
    assert_eq!((&root["name"], &root["status"]), (&"adsidecar".into(), &STATUS.into()));
    let page = harness.request(Method::GET, "/").header("accept", "text/html").send().await.unwrap();
    assert!(header(&page, "content-type").starts_with("text/html"));
    assert!(page.text().await.unwrap().contains(LOGIN));
    let wrong = harness.post("/").await;
    assert_eq!((wrong.status().as_u16(), code(&wrong)), (405, "method_not_allowed"));
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 27.
async fn a_host_header_that_names_one_of_amazons_regions_is_served_by_that_region() {
    let harness = Harness::with(
        "[proxy]\nallowed_hosts = [\"advertising-api-eu.amazon.com\"]\n[[account]]\nname = \"acme\"\nprofile_id = \
         \"1\"\n",
    );
    let harness = harness.await;
    harness.log_in("default").await;
    for target in ["/v2/profiles", "/a/acme/v2/profiles"] {
        harness.sandbox.clear_history();
        let call = format!("GET {target} HTTP/1.1\r\nHost: advertising-api-eu.amazon.com\r\n\r\n");
        assert_eq!(harness.send_raw(call).await.status, 200, "{target}");
        let seen = harness.seen();
        assert_eq!((seen.listener, seen.target.as_str()), (Listener::Eu, "/v2/profiles"), "{target}");
    }
    // Unless it is allowed, such a Host is refused, with the form that names a region.
    harness.sandbox.clear_history();
    let refused = "GET /v2/profiles HTTP/1.1\r\nHost: advertising-api-fe.amazon.com\r\n\r\n";
    let refused = harness.send_raw(refused).await;
    assert_eq!(refused.said(), (403, "host_not_allowed"));
    assert!(refused.json()["next_step"].as_str().unwrap().contains("proxy.allowed_hosts"), "{refused:?}");
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_users_trouble_at_login_with_amazon_stays_one_users_and_that_of_two_is_the_clients() {
    let harness = Harness::start().await;
    let users = ["anna", "bob", "carl"];
    for user in users {
        harness.log_in(user).await;
    }
    let invalid = || Fault::Status { code: 400, headers: Vec::new(), body: r#"{"error":"invalid_request"}"#.into() };
    let refresh = async |user: &str| harness.post(&format!("{REFRESH}?user_id={user}")).await;
    harness.sandbox.set_fault(Rule::from(invalid()).at(Listener::Lwa).next(1));
    assert_eq!(code(&refresh("anna").await), "token_unavailable");
    assert_eq!(refresh("bob").await.status(), 200, "another user's refresh is tried, and works");
    // Two users in a row: it is the client, and the third one is spared the call.
    harness.sandbox.set_fault(Rule::from(invalid()).at(Listener::Lwa).always());
    harness.advance(61);
    for user in ["bob", "carl"] {
        assert_eq!(code(&refresh(user).await), "token_unavailable", "{user}");
    }
    harness.sandbox.clear_history();
    assert_eq!(code(&refresh("anna").await), "token_unavailable");
    assert_eq!(harness.sandbox.refreshes(), 0, "nobody is asked again so soon");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_4xx_of_the_sandbox_and_no_answer_at_the_root_shows_a_token() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.get("/v2/profiles").await;
    let bearer = harness.seen().header("authorization").unwrap().to_owned();
    let token = bearer.strip_prefix("Bearer Atza|").unwrap().to_owned();
    // The gateway quotes the header for every path that it does not know.
    for path in ["/", "/favicon.ico", "/unknown", "/v9/profiles", "/sp", "/a/b/c?x=1", "/sandbox/status/418", "/mcp/x"]
    {
        for region in ["na", "eu", "fe"] {
            let answer = harness.request(Method::GET, path);
            // The root is adsidecar's own, where no header selects a region.
            let answer = if path == "/" { answer } else { answer.header("x-ads-region", region) };
            let answer = answer.send().await.unwrap();
            let (status, head) = (answer.status(), format!("{:?}", answer.headers()));
            let text = answer.text().await.unwrap();
            assert!(path == "/" || status.is_client_error(), "{path}: {status}");
            assert!(![&head, &text].iter().any(|shown| shown.contains(&token[..20])), "{path}: {text}");
        }
    }
    let text = harness.get("/unknown").await.text().await.unwrap();
    assert!(text.contains("not a valid key=value pair") && text.contains("Bearer Atza|***"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_offers_a_login_link_that_cannot_work() {
    let token = "caller_token = \"knock-knock-knock-knock\"\n";
    let harness = Harness::with(&format!("[proxy]\nlisten = \"127.0.0.1:0\"\n{token}")).await;
    let shown = |call: reqwest::RequestBuilder| call.header("x-ads-sidecar-token", "knock-knock-knock-knock").send();
    // A browser cannot send the caller token.
    let page = shown(harness.client.get(harness.admin_url("/"))).await.unwrap().text().await.unwrap();
    let root = shown(harness.request(Method::GET, "/").header("accept", "text/html")).await.unwrap();
    let root = root.text().await.unwrap();
    for text in [page, root] {
        assert!(!text.contains("/login?") && text.contains("which a browser cannot send"), "{text}");
    }
    let refused = shown(harness.request(Method::GET, "/v2/profiles")).await.unwrap();
    assert_eq!(code(&refused), "login_required");
    let next_step = json(refused).await["next_step"].as_str().unwrap().to_owned();
    assert!(
        next_step.starts_with("Request http://localhost:8001/api/auth/amazon/login?user_id=default with"),
        "{next_step}"
    );
    // Where the redirect URI leads to another host, a browser's cookie would not come back from here.
    let harness = Harness::built(
        Options::calm(Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap())),
        "",
        &[("amazon.redirect_uri", "https://app.example/api/auth/amazon/callback")],
    )
    .await;
    let page = harness.client.get(harness.admin_url("/")).send().await.unwrap().text().await.unwrap();
    assert!(!page.contains("/login?") && page.contains("amazon.redirect_uri"), "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_401_of_amazons_for_a_grant_that_is_gone_says_that_a_login_is_needed() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    // The user has removed the app: the access token lives by the clock, and Amazon accepts neither it nor the grant.
    harness.sandbox.world(|world| {
        world.revoke_all();
        world.expire_access_tokens();
    });
    for _ in 0..3 {
        let refused = harness.get("/v2/profiles").await;
        let hint = refused.headers()["x-adsidecar-hint"].to_str().unwrap().to_owned();
        assert_eq!((refused.status().as_u16(), code(&refused), hint.as_str()), (401, "", "login_required"));
        assert_eq!(refused.text().await.unwrap(), r#"{"message":"Unauthorized"}"#);
    }
    assert_eq!(harness.sandbox.refreshes(), 1, "no refresh per call");
    assert_eq!(harness.status_of("default").await["state"], "login_required");
    // Another user's 401, whose grant is good, has none.
    harness.log_in("anna").await;
    harness.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na).next(2));
    let call = harness.request(Method::GET, "/v2/profiles").header("x-ads-user", "anna").send().await.unwrap();
    assert_eq!((call.status().as_u16(), call.headers().get("x-adsidecar-hint")), (401, None));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 23.
async fn a_program_built_on_a_browser_is_served_with_a_caller_token_and_a_person_is_told_what_was_typed() {
    let mut harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    let call =
        |headers: &str| format!("POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n{headers}\r\n{{}}");
    let none = "Sec-Fetch-Site: none\r\n";
    let typed = harness.send_raw(call(none)).await;
    assert_eq!(typed.said(), (403, "cross_site"));
    assert!(typed.json()["detail"].as_str().unwrap().contains("types it"), "{typed:?}");
    let page = harness.send_raw(call("Origin: http://evil.test\r\nSec-Fetch-Site: none\r\n")).await;
    assert!(page.json()["detail"].as_str().unwrap().contains("web page"), "{page:?}");
    assert!(harness.ads_calls().is_empty());

    harness.restart_with("proxy.caller_token", "knock-knock-knock-knock").await;
    let token = "X-Ads-Sidecar-Token: knock-knock-knock-knock\r\n";
    assert_eq!(harness.send_raw(call(&format!("{none}{token}"))).await.said().1, "", "an Electron app");
    assert_eq!(harness.ads_calls().len(), 1);
    for signs in [
        "Origin: http://localhost\r\nSec-Fetch-Site: none\r\n",
        "Origin: null\r\n",
        "Sec-Fetch-Site: same-origin\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
        "Sec-Fetch-Site: none\r\nAccess-Control-Request-Method: POST\r\n",
        "Sec-Fetch-Site: none, none\r\n",
    ] {
        assert_eq!(harness.send_raw(call(&format!("{signs}{token}"))).await.said(), (403, "cross_site"), "{signs}");
    }
    for wrong in ["", "X-Ads-Sidecar-Token: wrong\r\n"] {
        assert_eq!(harness.send_raw(call(&format!("{none}{wrong}"))).await.said(), (403, "cross_site"), "{wrong}");
    }
    assert_eq!(harness.ads_calls().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 30.
async fn a_target_with_a_character_that_no_url_can_hold_is_refused_in_words() {
    let harness = Harness::start().await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    for target in ["/v2/profiles?name=\"a\"", "/v2/profiles?a=<b>", "/sp/<x>", "/x?a=\"", "/x?\u{e9}>"] {
        for body in ["", "Content-Length: 70000\r\n"] {
            let mut wire = harness.dial().await;
            wire.send(format!("POST {target} HTTP/1.1\r\nHost: localhost\r\n{body}\r\n")).await;
            if !body.is_empty() {
                wire.send(&[b'x'; 70_000]).await;
            }
            let refused = wire.reply().await;
            assert_eq!(refused.said(), (400, "bad_request"), "{target} {body}");
            assert!(refused.json()["next_step"].as_str().unwrap().contains("%22"), "{refused:?}");
            assert!(wire.closes().await, "{target}");
        }
    }
    // Other bytes that never became a request get the parser's bare refusal, and a response of Amazon's passes.
    let bare = harness.send_raw("GET / HTTP/1.1\r\nHost : localhost\r\n\r\n").await;
    assert_eq!((bare.said(), bare.body.len()), ((400, ""), 0), "{bare:?}");
    harness.sandbox.set_fault(Fault::Status { code: 400, headers: Vec::new(), body: String::new() });
    let amazons = harness.send_raw("GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\r\n\r\n").await;
    assert_eq!((amazons.said(), amazons.header("x-request-id")), ((400, ""), Some("a")));
    assert_eq!(harness.ads_calls().len(), 1);
}
