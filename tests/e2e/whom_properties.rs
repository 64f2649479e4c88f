//! Generated requests: what adsidecar does not understand changes nothing, nothing that reads like its own path leaves,
//! and no credential of a wrong shape is sent to Login with Amazon.
//!
//! The cases are the same in every run; `PROPTEST_RNG_SEED` chooses others.

use adsidecar::app::App;
use adsidecar::config::{self, Sources};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;
use world::{CLIENT_ID, CLIENT_SECRET};

use crate::commands::run;
use crate::harness::Harness;
use crate::raw_http::Reply;

/// `count` values of `strategy`.
fn generated<T>(count: usize, strategy: impl Strategy<Value = T>) -> Vec<T> {
    let seed = std::env::var("PROPTEST_RNG_SEED").ok().and_then(|seed| seed.parse::<u64>().ok()).unwrap_or(17);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    std::iter::repeat_with(|| strategy.new_tree(&mut runner).unwrap().current()).take(count).collect()
}

/// Everything that a request to an endpoint could change: the users with their states, what Login with Amazon was asked,
/// and what reached Amazon.
async fn state_of(harness: &Harness) -> (Value, u64, usize) {
    let users = harness.get("/api/auth/amazon/status").await;
    let lwa = harness.sandbox.lwa_calls();
    let calls = lwa.exchanges + lwa.refreshes + lwa.others;
    (crate::harness::json(users).await, calls, harness.ads_calls().len())
}

async fn ask(harness: &Harness, request: &str) -> Reply {
    let mut wire = harness.dial().await;
    wire.send(request).await;
    if request.starts_with("HEAD ") { wire.reply_head().await } else { wire.reply().await }
}

const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
/// Each endpoint, with a query that it understands.
const ENDPOINTS: [(&str, &str); 12] = [
    ("/", ""),
    ("/api/auth/amazon/login", "user_id=anna&region=eu"),
    ("/api/auth/amazon/callback", "code=ANabc&state=x"),
    ("/api/auth/amazon/status", "user_id=anna"),
    ("/api/auth/amazon/refresh", "user_id=anna"),
    ("/api/auth/amazon/logout", "user_id=anna"),
    ("/api/auth/amazon/users/anna", ""),
    ("/api/auth/amazon/confirm", "grant=x"),
    ("/auth/o2/token", ""),
    ("/api/auth/amazon/unknown", ""),
    ("/register", ""),
    ("/.well-known/oauth-protected-resource", ""),
];

/// Something that no endpoint understands.
#[derive(Clone, Debug)]
enum Odd {
    Parameter(String),
    Repeated(String),
    Header(String),
    Form(String),
    Json(String),
    Body(&'static str),
}

/// Names that are none, most of them close to one.
fn odd_name() -> impl Strategy<Value = String> {
    let near = [
        "user",
        "userid",
        "userId",
        "USER_ID",
        "User_Id",
        "user-id",
        "user_id ",
        "user_id[]",
        "user_ids",
        "uid",
        "usr_id",
        "account",
        "account_id",
        "profile_id",
        "name",
        "grants",
        "confirm",
        "redirect_uri",
        "regions",
        "limits",
        "all",
        "force",
        "id",
    ];
    prop_oneof![3 => select(near.to_vec()).prop_map(str::to_owned), 1 => "[a-z_.]{9,14}"]
}

fn odd() -> impl Strategy<Value = Odd> {
    let user = || select(vec!["anna", "default", "bob"]);
    let header_name = prop_oneof![
        3 => select(vec![
            "X-Ads-User", "X-Ads-Account", "X-Ads-Region", "X-Ads-Acount", "X_Ads_User", "X-Ads_Account", "x-ads-profile",
            "X-ADS-USER-ID", "X-Ads-", "X_ADS_ACCOUNT",
        ]).prop_map(str::to_owned),
        1 => "X-Ads-[A-Za-z]{1,9}",
    ];
    prop_oneof![
        (odd_name(), user()).prop_map(|(name, user)| Odd::Parameter(format!("{}={user}", name.replace(' ', "+")))),
        user().prop_map(|user| Odd::Repeated(format!("user_id={user}"))),
        (header_name, user()).prop_map(|(name, user)| Odd::Header(format!("{name}: {user}"))),
        (odd_name(), user()).prop_map(|(name, user)| Odd::Form(format!("{}={user}", name.replace(' ', "+")))),
        (odd_name(), user()).prop_map(|(name, user)| Odd::Json(format!("{{\"{name}\":\"{user}\"}}"))),
        select(vec![
            "user_id anna",
            "<user_id>anna</user_id>",
            "[\"anna\"]",
            "{\"user_id\":7}",
            "{\"user_id\":",
            "null",
            "\u{1}"
        ])
        .prop_map(Odd::Body),
    ]
}

fn odd_request((method, (path, query), known, odd): (&str, (&str, &str), bool, Odd)) -> String {
    let (mut query, mut headers, mut body) =
        (if known { query.to_owned() } else { String::new() }, String::new(), String::new());
    let add = |query: &mut String, pair: &str| *query += &format!("{}{pair}", if query.is_empty() { "" } else { "&" });
    match odd {
        Odd::Parameter(pair) => add(&mut query, &pair),
        Odd::Repeated(pair) => {
            add(&mut query, &pair);
            add(&mut query, &pair);
        }
        Odd::Header(line) => headers = format!("{line}\r\n"),
        Odd::Form(form) => (headers, body) = ("Content-Type: application/x-www-form-urlencoded\r\n".to_owned(), form),
        Odd::Json(json) => (headers, body) = ("Content-Type: application/json; charset=utf-8\r\n".to_owned(), json),
        Odd::Body(text) => (headers, body) = ("Content-Type: text/plain\r\n".to_owned(), text.to_owned()),
    }
    let target = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
    format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_with_something_unknown_in_it_changes_anything() {
    let harness = Harness::start().await;
    for user in ["default", "anna", "bob"] {
        harness.log_in(user).await;
    }
    harness.sandbox.clear_history();
    let before = state_of(&harness).await;
    let every_pair: Vec<_> =
        METHODS.into_iter().flat_map(|method| ENDPOINTS.map(|endpoint| (method, endpoint))).collect();
    let per_pair = 12;
    let mut refused = 0;
    for (method, endpoint) in every_pair {
        for request in generated(
            per_pair,
            (any::<bool>(), odd()).prop_map(|(known, odd)| odd_request((method, endpoint, known, odd))),
        ) {
            let reply = ask(&harness, &request).await;
            let lenient = ["/api/auth/amazon/callback", "/auth/o2/token"].contains(&endpoint.0);
            assert!(lenient || (400..500).contains(&reply.status), "{request}\n{reply:?}");
            assert!(reply.header("set-cookie").is_none(), "{request}\n{reply:?}");
            refused += usize::from((400..500).contains(&reply.status));
        }
        assert_eq!(state_of(&harness).await, before, "{method} {}", endpoint.0);
    }
    assert!(refused > 900, "{refused}");
}

/// One way to write a path so that a lenient server reads the same.
#[derive(Clone, Copy, Debug)]
enum Spelling {
    DoubleSlash,
    Upper,
    Encode,
    EncodeTwice,
    Dot,
    Up,
    Backslash,
    Parameter,
    FinalSlash,
    EncodedSlash,
}

use Spelling::{Backslash, Dot, DoubleSlash, Encode, EncodeTwice, EncodedSlash, FinalSlash, Parameter, Up, Upper};

impl Spelling {
    /// `path` spelled so at the `at`-th place where that is possible.
    fn apply(self, path: &str, at: usize) -> String {
        let pick = |wanted: &dyn Fn(char) -> bool| {
            let places: Vec<_> = path.char_indices().filter(|(_, c)| wanted(*c)).map(|(at, _)| at).collect();
            (!places.is_empty()).then(|| places[at % places.len()])
        };
        let put = |place: Option<usize>, new: &dyn Fn(char) -> String| match place {
            Some(place) => {
                let old = path[place..].chars().next().unwrap();
                format!("{}{}{}", &path[..place], new(old), &path[place + old.len_utf8()..])
            }
            None => path.to_owned(),
        };
        let (slash, letter) = (|c| c == '/', |c: char| c.is_ascii_lowercase());
        match self {
            DoubleSlash => put(pick(&slash), &|_| "//".into()),
            Upper => put(pick(&letter), &|c| c.to_ascii_uppercase().into()),
            Encode => put(pick(&letter), &|c| format!("%{:02x}", c as u8)),
            EncodeTwice => put(pick(&letter), &|c| format!("%25{:02X}", c as u8)),
            Dot => put(pick(&slash), &|_| "/./".into()),
            Up => put(pick(&slash), &|_| "/x/../".into()),
            // A target begins with a slash.
            Backslash => put(pick(&slash).filter(|place| *place > 0), &|_| "\\".into()),
            EncodedSlash => put(pick(&slash).filter(|place| *place > 0), &|_| "%2F".into()),
            Parameter => put(pick(&slash).filter(|place| *place > 0), &|_| ";v=1/".into()),
            FinalSlash => format!("{path}/"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_path_that_folds_to_one_of_ours_leaves() {
    let harness = Harness::with("[[account]]\nname = \"acme\"\n").await;
    for user in ["default", "anna"] {
        harness.log_in(user).await;
    }
    harness.sandbox.clear_history();
    let before = state_of(&harness).await;
    let ways = vec![DoubleSlash, Upper, Encode, EncodeTwice, Dot, Up, Backslash, Parameter, FinalSlash, EncodedSlash];
    let spellings = proptest::collection::vec((select(ways), any::<usize>()), 1..5);
    let forms = select(vec![
        "",
        "http://localhost:8001",
        "http://advertising-api-eu.amazon.com",
        "http://advertising-ai.amazon.com",
    ]);
    let paths: Vec<_> = ENDPOINTS.iter().map(|(path, _)| *path).filter(|path| *path != "/").collect();
    let target =
        (select(paths), spellings, forms, select(METHODS.to_vec())).prop_map(|(path, spellings, form, method)| {
            let spelled = spellings.iter().fold(path.to_owned(), |path, (way, at)| way.apply(&path, *at));
            (method, format!("{form}{spelled}"), path)
        });
    let mut folded = 0;
    for (method, target, path) in generated(700, target) {
        // Below an account's prefix, only the token endpoint is ours.
        let prefix = ["", "/a/acme"][usize::from(path == "/auth/o2/token" && target.starts_with('/'))];
        let host = target.split('/').nth(2).filter(|_| target.starts_with("http")).unwrap_or("localhost");
        for target in [target.clone(), format!("{prefix}{target}")] {
            let request = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n");
            let reply = ask(&harness, &request).await;
            assert!(harness.ads_calls().is_empty(), "{request}\n{reply:?}");
            folded += usize::from(reply.status == 404);
        }
    }
    // A path that is spelled exactly like an endpoint is one; of the others none acted.
    assert!(folded > 1000, "{folded}");
    assert_eq!(state_of(&harness).await, before);
    // The check sees what does leave.
    ask(&harness, "GET /api/authors HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(harness.ads_calls().len(), 1);
}

/// The value `token` as people have it in their hands, and none of it a token.
fn wrong_shapes(token: &str) -> Vec<String> {
    let bare = token.split('|').next_back().unwrap();
    let encoded = token.replace('|', "%7C");
    vec![
        format!("\"{token}"),
        format!("{token}'"),
        format!("b'{token}'"),
        format!("b\"{token}\""),
        format!("refresh_token={token}"),
        format!("AMAZON_REFRESH_TOKEN={token}"),
        format!("export AMAZON_REFRESH_TOKEN='{token}'"),
        format!("Bearer {token}"),
        format!("Authorization: Bearer {token}"),
        encoded.clone(),
        encoded.replace('%', "%25"),
        format!("{{\"refresh_token\":\"{token}\"}}"),
        format!("[\"{token}\"]"),
        format!("refresh_token: {token}"),
        format!("{} {}", &token[..20], &token[20..]),
        format!("{}\n{}", &token[..20], &token[20..]),
        format!("{token} {token}"),
        format!("{token}\\n"),
        format!("\u{201c}{token}\u{201d}"),
        format!("{token}\0"),
        format!("<{token}>"),
        format!("IwEBI{bare}"),
        "Atzr".to_owned(),
        "Atzr|".to_owned(),
        format!("Atza|{bare}"),
        "ANdNAVhyhqirUelHGEHA".to_owned(),
        "replace-me".to_owned(),
        "${AMAZON_REFRESH_TOKEN}".to_owned(),
        "<refresh token>".to_owned(),
        format!("gAAAA{}", "B".repeat(120)),
        "/run/secrets/refresh_token".to_owned(),
        format!("https://example.com/?refresh_token={encoded}"),
        CLIENT_ID.to_owned(),
        CLIENT_SECRET.to_owned(),
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl".to_owned(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_credential_of_a_wrong_shape_is_sent_to_login_with_amazon() {
    let mut harness = Harness::with_running_clock("").await;
    let token = harness.sandbox.grant().refresh_token;
    harness.stop_sidecar().await;
    harness.sandbox.clear_history();
    let shapes = wrong_shapes(&token);
    assert!(shapes.len() >= 30);
    // The environment cannot hold a NUL, and a file can.
    for shape in &shapes {
        let (file, env) = (harness.directory.path().join("credential"), |name: &str| (name.to_owned(), shape.clone()));
        std::fs::write(&file, shape).unwrap();
        let in_file = vec![("AMAZON_REFRESH_TOKEN_FILE".to_owned(), file.to_str().unwrap().to_owned())];
        for env in [vec![env("AMAZON_REFRESH_TOKEN")], in_file] {
            let sources = Sources { file: Some(harness.config_file()), env, sets: harness.sets.clone() };
            let refused = config::load(&sources).map(|_| ()).expect_err(shape).to_string();
            assert!(refused.contains("amazon.refresh_token") && !refused.contains(&token[5..]), "{shape:?}: {refused}");
        }
        let imported = run(&harness, &["users", "import", "--user", "imported"], shape).await;
        assert_ne!(imported.code, 0, "{shape:?}: {}", imported.err);
        assert!(!imported.err.contains(&token[5..]), "{shape:?}: {}", imported.err);
    }
    let lwa = harness.sandbox.lwa_calls();
    assert_eq!((lwa.refreshes, lwa.exchanges, lwa.others), (0, 0, 0), "nothing was sent");
    // What can be repaired without a guess is sent repaired.
    for shape in [format!("\"{token}\"\n"), format!("\u{feff}'{token}'"), format!(" {token}\r\n")] {
        let env = vec![("AMAZON_REFRESH_TOKEN".to_owned(), shape.clone())];
        let sources = Sources { file: Some(harness.config_file()), env, sets: harness.sets.clone() };
        let config = config::load(&sources).unwrap_or_else(|problems| panic!("{shape:?}: {problems}"));
        assert!(!config.warnings.is_empty() || shape.starts_with(' '), "{shape:?}");
        let app = App::build(config, harness.clock.clone(), None).await.unwrap();
        app.run(std::future::ready(())).await.unwrap();
    }
    let sent = harness.sandbox.calls(world::Listener::Lwa);
    assert!(!sent.is_empty());
    let clean = url::form_urlencoded::byte_serialize(token.as_bytes()).collect::<String>();
    assert!(sent.iter().all(|call| call.text().contains(&format!("refresh_token={clean}"))), "{sent:?}");
}
