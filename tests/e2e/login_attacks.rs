//! Attacks on a login, in every combination: only the one legitimate combination stores a grant, and no redirect target
//! leads away from the frontend.

use reqwest::Method;
use url::Url;
use world::Listener;

use crate::harness::{Harness, header, json};

const FRONTEND: &str = "[login]\nfrontend_url = \"https://app.example.com/connected?tab=ads\"\n";
const LOGIN: &str = "/api/auth/amazon/login";
const CALLBACK: &str = "/api/auth/amazon/callback";

/// A login that a browser started and its user consented to.
struct Begun {
    state: String,
    code: String,
    /// `name=value`
    cookie: String,
}

async fn begin(harness: &Harness, user: &str) -> Begun {
    let begun = harness.request(Method::GET, &format!("{LOGIN}?user_id={user}")).header("accept", "text/html");
    let begun = begun.send().await.unwrap();
    let cookie = header(&begun, "set-cookie").split(';').next().unwrap().to_owned();
    let callback = harness.consent(header(&begun, "location")).await;
    let callback = Url::parse("http://localhost").unwrap().join(&callback).unwrap();
    let pair = |name: &str| callback.query_pairs().find(|(key, _)| key == name).unwrap().1.into_owned();
    Begun { state: pair("state"), code: pair("code"), cookie }
}

async fn call_back(harness: &Harness, state: Option<&str>, code: &str, cookie: &str) -> reqwest::Response {
    let mut url = Url::parse(&harness.proxy_url(CALLBACK)).unwrap();
    url.query_pairs_mut().append_pair("code", code);
    if let Some(state) = state {
        url.query_pairs_mut().append_pair("state", state);
    }
    harness.client.get(url).header("cookie", cookie).send().await.unwrap()
}

async fn state_of(harness: &Harness, user: &str) -> String {
    harness.status_of(user).await["state"].as_str().unwrap().to_owned()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Own,
    AnotherLogins,
    Used,
    Expired,
    Guessed,
    Cut,
    Empty,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Cookie {
    Own,
    None,
    AnotherLogins,
    OwnNameOtherValue,
    OtherNameOwnValue,
    Empty,
}

/// The owner of a code, and so of its verifier: Amazon binds a code to the PKCE challenge of its consent.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Code {
    Own,
    AnotherLogins,
    WithoutChallenge,
    MadeUp,
}

const STATES: [State; 8] = [
    State::Own,
    State::AnotherLogins,
    State::Used,
    State::Expired,
    State::Guessed,
    State::Cut,
    State::Empty,
    State::None,
];
const COOKIES: [Cookie; 6] = [
    Cookie::Own,
    Cookie::None,
    Cookie::AnotherLogins,
    Cookie::OwnNameOtherValue,
    Cookie::OtherNameOwnValue,
    Cookie::Empty,
];
const CODES: [Code; 4] = [Code::Own, Code::AnotherLogins, Code::WithoutChallenge, Code::MadeUp];

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 6.
async fn only_the_matching_state_cookie_and_code_store_a_grant() {
    let harness = Harness::start().await;
    let mut stored = Vec::new();
    for (number, (state, cookie, code)) in cells().enumerate() {
        let (victim, attacker) = (format!("victim{number}"), format!("attacker{number}"));
        let (own, other) = (begin(&harness, &victim).await, begin(&harness, &attacker).await);
        if state == State::Used {
            // The login's own browser returned without a code, which ends the login.
            let ended = call_back(&harness, Some(&own.state), "made-up", &own.cookie).await;
            assert_ne!(ended.status(), 200);
        }
        if state == State::Expired {
            harness.advance(600);
        }
        let sent_state = match state {
            State::Own | State::Used | State::Expired => Some(own.state.clone()),
            State::AnotherLogins => Some(other.state.clone()),
            State::Guessed => Some(own.state.chars().rev().collect()),
            State::Cut => Some(own.state[..own.state.len() - 1].to_owned()),
            State::Empty => Some(String::new()),
            State::None => None,
        };
        let (name, value) = own.cookie.split_once('=').unwrap();
        let (other_name, other_value) = other.cookie.split_once('=').unwrap();
        let sent_cookie = match cookie {
            Cookie::Own => own.cookie.clone(),
            Cookie::None => "theme=dark".to_owned(),
            Cookie::AnotherLogins if state == State::AnotherLogins => "adsidecar_login_00000000=x".to_owned(),
            Cookie::AnotherLogins => other.cookie.clone(),
            Cookie::OwnNameOtherValue => format!("{name}={other_value}"),
            Cookie::OtherNameOwnValue => format!("{other_name}={value}"),
            Cookie::Empty => format!("{name}="),
        };
        let sent_code = match code {
            Code::Own => own.code,
            Code::AnotherLogins => other.code,
            // A code issued without a challenge: the attacker started that consent without adsidecar.
            Code::WithoutChallenge => harness.sandbox.world(|world| {
                let consent = world.usual_consent();
                world.consent(consent, harness.clock.now())
            }),
            Code::MadeUp => "ANmadeup".to_owned(),
        };
        call_back(&harness, sent_state.as_deref(), &sent_code, &sent_cookie).await;
        for user in [&victim, &attacker] {
            if state_of(&harness, user).await != "none" {
                stored.push((state, cookie, code, user.starts_with("victim")));
            }
        }
    }
    assert_eq!(stored, [(State::Own, Cookie::Own, Code::Own, true)]);
}

fn cells() -> impl Iterator<Item = (State, Cookie, Code)> {
    let pairs = STATES.into_iter().flat_map(|state| COOKIES.map(|cookie| (state, cookie)));
    pairs.flat_map(|(state, cookie)| CODES.map(|code| (state, cookie, code)))
}

/// Redirect targets that are not paths of the frontend, or are disguised paths.
fn targets() -> Vec<String> {
    let mut targets = Vec::new();
    let places = ["evil.test", "evil.test/", "evil.test:443", "u@evil.test", "app.example.com@evil.test", "[::1]"];
    let beginnings = [
        "//",
        "///",
        "////",
        "/\\",
        "\\/",
        "\\\\",
        "/\\/",
        "\\",
        "http://",
        "https://",
        "HTTPS://",
        "https:",
        "https:/",
        "https:///",
        "https:\\\\",
        "http:",
        "//\\",
        "/\t/",
        "/\n/",
        "/\r/",
        "\t//",
        "\n//",
        " //",
        "/ /",
        "ftp://",
        "//%5c",
        "@",
        ".",
        ":",
        ";",
        "//;@",
        "/.//",
        "/..//",
        "/./\\",
        "javascript://",
        "data://",
        "file://",
        "view-source:https://",
        "blob:https://",
        "//\u{3002}",
        "/\u{2044}/",
        "\u{ff0f}\u{ff0f}",
        "\0//",
        "/\0/",
        "https://app.example.com.",
        "https://app.example.com@",
        "https://app.example.com%40",
        "http://app.example.com#@",
        "https://app.example.com:444/",
        "//app.example.com.",
    ];
    for beginning in beginnings {
        targets.extend(places.map(|place| format!("{beginning}{place}")));
    }
    let whole =
        ["javascript:alert(1)", "data:text/html,<script>", "vbscript:x", "about:blank", "mailto:a@b", "", "?", "#"];
    targets.extend(whole.map(str::to_owned));
    targets
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 10.
async fn none_of_three_hundred_redirect_targets_leaves_the_frontends_origin() {
    let harness = Harness::with(FRONTEND).await;
    let targets = targets();
    assert!(targets.len() >= 300, "{}", targets.len());
    let mut accepted = 0;
    for (number, target) in targets.iter().enumerate() {
        let mut url = Url::parse(&harness.proxy_url(LOGIN)).unwrap();
        url.query_pairs_mut().append_pair("return_to", target).append_pair("user_id", &format!("u{number}"));
        let begun = harness.client.get(url).send().await.unwrap();
        if begun.status() == 400 {
            continue;
        }
        accepted += 1;
        let auth_url = json(begun).await["auth_url"].as_str().unwrap().to_owned();
        assert!(!auth_url.contains("evil"), "it is kept by adsidecar and never sent to Amazon: {auth_url}");
        let ended = harness.get(&harness.consent(&auth_url).await).await;
        let location = header(&ended, "location").to_owned();
        assert!(location.starts_with("https://app.example.com/"), "{target:?} leads to {location}");
        assert_eq!(Url::parse(&location).unwrap().origin().ascii_serialization(), "https://app.example.com");
    }
    assert!(accepted < targets.len() / 5, "{accepted} are unusual but legal paths");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 10.
async fn no_injected_parameter_or_header_changes_the_target_or_user_of_a_callback() {
    let harness = Harness::with(FRONTEND).await;
    for (number, injected) in [
        "redirect_uri=https://evil.test/",
        "return_to=https://evil.test/",
        "return_to=//evil.test",
        "next=https://evil.test/",
        "frontend_url=https://evil.test/",
        "FRONTEND_URL=https://evil.test/",
        "url=//evil.test",
        "redirect=true",
        "user_id=attacker",
        "user=attacker",
        "replace=true",
        "region=fe",
        "code_verifier=attacker",
        "client_id=attacker",
        "scope=%0d%0aLocation:%20https://evil.test",
        "status=success",
        "grant=x",
        "state%00=x",
        "STATE=x",
        "code[]=x",
        "%63ode_challenge=x",
        "access_token=Atza|attacker",
        "refresh_token=Atzr|attacker",
    ]
    .into_iter()
    .enumerate()
    {
        let user = format!("user{number}");
        let begun = begin(&harness, &user).await;
        let url = format!("{CALLBACK}?{injected}&code={}&state={}", begun.code, begun.state);
        let ended = harness.request(Method::GET, &url).header("cookie", &begun.cookie);
        let ended = ended.header("x-forwarded-host", "evil.test").header("x-forwarded-proto", "http");
        let ended = ended.header("forwarded", "host=evil.test").header("referer", "https://evil.test/");
        let ended = ended.send().await.unwrap();
        let expected = format!("https://app.example.com/connected?tab=ads&status=success&user_id={user}");
        assert_eq!(header(&ended, "location"), expected, "{injected}");
        assert_eq!(state_of(&harness, &user).await, "fresh", "{injected}");
    }
    // A duplicate parameter is rejected in either order, and the code is not consumed.
    let begun = begin(&harness, "twice").await;
    harness.sandbox.clear_history();
    for twice in ["code=attacker", "state=attacker", "c%6fde=attacker", "scope=a&scope=b"] {
        for url in [
            format!("{CALLBACK}?{twice}&code={}&state={}", begun.code, begun.state),
            format!("{CALLBACK}?code={}&state={}&{twice}", begun.code, begun.state),
        ] {
            let ended = harness.request(Method::GET, &url).header("cookie", &begun.cookie).send().await.unwrap();
            assert_eq!((ended.status().as_u16(), header(&ended, "location")), (400, ""), "{twice}");
        }
    }
    assert!(harness.sandbox.calls(Listener::Lwa).is_empty());
    assert_eq!(state_of(&harness, "attacker").await, "none");
    assert_eq!(state_of(&harness, "twice").await, "none");
}
