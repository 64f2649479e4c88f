//! Generated requests: what adsidecar does not understand changes nothing, nothing that reads like its own path leaves,
//! and no credential of a wrong shape is sent to Login with Amazon.
//!
//! The cases are the same in every run; `PROPTEST_RNG_SEED` chooses others.

use adsidecar::app::App;
use adsidecar::config::{self, Sources};
use adsidecar::inbound::destination::{DISCOVERY, Endpoint, NOBODYS, PATHS, USERS};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;

use crate::commands::{bare_with, run};
use crate::harness::{Harness, eventually};
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

/// Everything that a request to an endpoint could change: the users with their states, what Login with Amazon was
/// asked, and what reached Amazon.
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

/// Every path that adsidecar serves itself, from its own tables: none can be forgotten here.
fn endpoints() -> Vec<(String, Endpoint)> {
    let mut all: Vec<_> = PATHS.iter().map(|(path, endpoint)| ((*path).to_owned(), *endpoint)).collect();
    all.push((format!("{USERS}anna"), Endpoint::User));
    all.extend(DISCOVERY.map(|document| (format!("{document}/x"), Endpoint::Discovery)));
    all.extend(NOBODYS.map(|path| (path.to_owned(), Endpoint::Discovery)));
    all.push(("/api/auth/amazon/unknown".to_owned(), Endpoint::Unknown));
    all
}

/// A value that the endpoints accept for their parameter `name`.
fn accepted_value(name: &str) -> &'static str {
    match name {
        "user_id" | "after" | "name" => "anna",
        "region" => "eu",
        "replace" | "redirect" => "true",
        "return_to" => "/done",
        "state" | "grant" => "x",
        "limit" => "7",
        "country" => "DE",
        "type" => "seller",
        _ => panic!("the parameter {name} is new: say what it accepts"),
    }
}

/// Something that no endpoint understands.
#[derive(Clone, Debug)]
enum Odd {
    Parameter(String, &'static str),
    Repeated(String),
    Header(String),
    Form(String, &'static str),
    Json(String, &'static str),
    Body(&'static str),
}

impl Odd {
    /// The name of the parameter that it adds.
    fn name(&self) -> Option<&str> {
        match self {
            Self::Parameter(name, _) | Self::Form(name, _) | Self::Json(name, _) => Some(name),
            Self::Repeated(_) | Self::Header(_) | Self::Body(_) => None,
        }
    }
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
            "X-Ads-User",
            "X-Ads-Account",
            "X-Ads-Region",
            "X-Ads-Acount",
            "X_Ads_User",
            "X-Ads_Account",
            "x-ads-profile",
            "X-ADS-USER-ID",
            "X-Ads-",
            "X_ADS_ACCOUNT",
        ]).prop_map(str::to_owned),
        1 => "X-Ads-[A-Za-z]{1,9}",
    ];
    prop_oneof![
        (odd_name(), user()).prop_map(|(name, user)| Odd::Parameter(name.replace(' ', "+"), user)),
        user().prop_map(|user| Odd::Repeated(format!("user_id={user}"))),
        (header_name, user()).prop_map(|(name, user)| Odd::Header(format!("{name}: {user}"))),
        (odd_name(), user()).prop_map(|(name, user)| Odd::Form(name.replace(' ', "+"), user)),
        (odd_name(), user()).prop_map(|(name, user)| Odd::Json(name, user)),
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

fn odd_request(method: &str, path: &str, mut query: String, odd: &Odd) -> String {
    let (mut headers, mut body) = (String::new(), String::new());
    let add = |query: &mut String, pair: &str| *query += &format!("{}{pair}", if query.is_empty() { "" } else { "&" });
    match odd {
        Odd::Parameter(name, user) => add(&mut query, &format!("{name}={user}")),
        Odd::Repeated(pair) => {
            add(&mut query, pair);
            add(&mut query, pair);
        }
        Odd::Header(line) => headers = format!("{line}\r\n"),
        Odd::Form(name, user) => {
            (headers, body) =
                ("Content-Type: application/x-www-form-urlencoded\r\n".to_owned(), format!("{name}={user}"));
        }
        Odd::Json(name, user) => {
            (headers, body) =
                ("Content-Type: application/json; charset=utf-8\r\n".to_owned(), format!("{{\"{name}\":\"{user}\"}}"));
        }
        Odd::Body(text) => (headers, body) = ("Content-Type: text/plain\r\n".to_owned(), (*text).to_owned()),
    }
    let target = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
    let length = body.len();
    format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {length}\r\n\r\n{body}")
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 1.
async fn no_request_with_something_unknown_in_it_changes_anything() {
    let harness = Harness::start().await;
    for user in ["default", "anna", "bob"] {
        harness.log_in(user).await;
    }
    harness.sandbox.clear_history();
    let before = state_of(&harness).await;
    let per_pair = 12;
    let (mut asked, mut refused) = (0, 0);
    for (path, endpoint) in endpoints() {
        let parameters = endpoint.parameters().unwrap_or_default();
        // What stands there is Amazon's or an SDK's to choose.
        let lenient = endpoint.parameters().is_none();
        // With one of the endpoint's own parameters beside the odd thing, and without.
        let known: Vec<_> = [""].iter().chain(parameters).copied().collect();
        let is_odd = move |odd: &Odd| odd.name().is_none_or(|name| !parameters.contains(&name));
        let cases = (select(known), odd().prop_filter("a parameter of this endpoint", is_odd));
        let cases = generated(METHODS.len() * per_pair, cases);
        for (method, cases) in METHODS.into_iter().zip(cases.chunks(per_pair)) {
            for (known, odd) in cases {
                let query = if known.is_empty() { String::new() } else { format!("{known}={}", accepted_value(known)) };
                let request = odd_request(method, &path, query, odd);
                let reply = ask(&harness, &request).await;
                assert!(lenient || (400..500).contains(&reply.status), "{request}\n{reply:?}");
                assert!(reply.header("set-cookie").is_none(), "{request}\n{reply:?}");
                asked += 1;
                refused += usize::from((400..500).contains(&reply.status));
            }
            assert_eq!(state_of(&harness).await, before, "{method} {path}");
        }
    }
    assert!(asked > 1800 && refused * 10 > asked * 9, "{refused} of {asked}");
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
// Covers: situation 19.
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
    let paths: Vec<_> = endpoints().into_iter().map(|(path, _)| path).filter(|path| path != "/").collect();
    let target =
        (select(paths), spellings, forms, select(METHODS.to_vec())).prop_map(|(path, spellings, form, method)| {
            let spelled = spellings.iter().fold(path.clone(), |path, (way, at)| way.apply(&path, *at));
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

/// One kind of credential: its key, the variable that sets it, and a value of the right shape.
#[derive(Clone, Copy, Debug)]
struct Kind {
    key: &'static str,
    variable: &'static str,
    good: &'static str,
}

const CLIENT_ID: Kind = Kind { key: "amazon.client_id", variable: "AMAZON_CLIENT_ID", good: world::CLIENT_ID };
/// The key takes several, between commas or line ends.
const CLIENT_SECRET: Kind = Kind {
    key: "amazon.client_secret",
    variable: "AMAZON_CLIENT_SECRET",
    good: "amzn1.oa2-cs.v1.5c0ffee5c0ffee5c0ffee5c0ffee5c0ffee",
};
const REFRESH_TOKEN: Kind = Kind {
    key: "amazon.refresh_token",
    variable: "AMAZON_REFRESH_TOKEN",
    good: "Atzr|IwEBIJ5c0ffee5c0ffee5c0ffee5c0ffee5c0ffee",
};
/// Not secret, and a list between blanks.
const SCOPE: Kind = Kind { key: "amazon.scope", variable: "AMAZON_SCOPE", good: "advertising::campaign_management" };

impl Kind {
    /// The key's name in its section.
    fn name(self) -> &'static str {
        self.key.split('.').next_back().unwrap()
    }

    /// Whether `text` quotes the value.
    fn is_quoted_in(self, text: &str) -> bool {
        self.key != SCOPE.key && text.contains(&self.good[self.good.len() - 12..])
    }

    /// The value as people have it in their hands, and other things in its place.
    fn wrong_shapes(self) -> Vec<String> {
        let Self { key, variable, good } = self;
        let name = self.name();
        let encoded: String = url::form_urlencoded::byte_serialize(good.as_bytes()).collect();
        let encoded = if encoded == good { good.replace('.', "%2E") } else { encoded };
        let (one, other) = good.split_at(20);
        let mut shapes = vec![
            format!("\"{good}"),
            format!("{good}'"),
            format!("b'{good}'"),
            format!("b\"{good}\""),
            format!("{name}={good}"),
            format!("{variable}={good}"),
            format!("export {variable}='{good}'"),
            format!("Bearer {good}"),
            format!("Authorization: Bearer {good}"),
            encoded.clone(),
            encoded.replace('%', "%25"),
            format!("{{\"{name}\":\"{good}\"}}"),
            format!("[\"{good}\"]"),
            format!("{name}: {good}"),
            format!("{good}\\n"),
            format!("\u{201c}{good}\u{201d}"),
            format!("{good}\0"),
            format!("<{good}>"),
            "replace-me".to_owned(),
            format!("${{{variable}}}"),
            format!("<{}>", name.replace('_', " ")),
            format!("/run/secrets/{name}"),
            format!("https://example.com/?{name}={encoded}"),
        ];
        let others = [CLIENT_ID, CLIENT_SECRET, REFRESH_TOKEN].into_iter().filter(|other| other.key != key);
        shapes.extend(others.map(|other| other.good.to_owned()));
        if key == SCOPE.key {
            shapes.extend([format!("{good},{good}"), format!("{good}+profile"), good.replace("::", ":")]);
            return shapes;
        }
        let bare = REFRESH_TOKEN.good.split('|').next_back().unwrap();
        let other_things = ["Atzr", "Atzr|", bare, "ANdNAVhyhqirUelHGEHA", "amzn1.application.0123456789"];
        shapes.extend(other_things.map(str::to_owned));
        shapes.extend([
            format!("{one} {other}"),
            format!("{good} {good}"),
            format!("Atza|{bare}"),
            format!("gAAAA{}", "B".repeat(120)),
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl".to_owned(),
        ]);
        if key != CLIENT_SECRET.key {
            shapes.push(format!("{one}\n{other}"));
        }
        shapes
    }

    /// The ways to give adsidecar the value `shape`.
    fn sources(self, harness: &Harness, shape: &str) -> Vec<(&'static str, Sources)> {
        let Self { key, variable, .. } = self;
        let path = |name: &str| harness.directory.path().join(name);
        let (alone, with_it) = (path("credential"), path("with-it.toml"));
        std::fs::write(&alone, shape).unwrap();
        let line = format!("{} = {}", self.name(), toml::Value::String(shape.to_owned()));
        let own = format!("{} = ", self.name());
        let config = std::fs::read_to_string(harness.config_file()).unwrap();
        let lines = config.lines().filter(|line| !line.starts_with(&own));
        let lines: Vec<_> = lines.flat_map(|it| [Some(it), (it == "[amazon]").then_some(line.as_str())]).collect();
        std::fs::write(&with_it, lines.into_iter().flatten().collect::<Vec<_>>().join("\n")).unwrap();
        let from = |file, env: &[(&str, &str)], sets: &[(&str, &str)]| {
            let owned = |pairs: &[(&str, &str)]| {
                pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>()
            };
            Sources { file: Some(file), env: owned(env), sets: [harness.sets.clone(), owned(sets)].concat() }
        };
        let in_file = format!("{variable}_FILE");
        vec![
            ("variable", from(harness.config_file(), &[(variable, shape)], &[])),
            ("file", from(harness.config_file(), &[(&in_file, alone.to_str().unwrap())], &[])),
            ("configuration file", from(with_it, &[], &[])),
            ("flag", from(harness.config_file(), &[], &[(key, shape)])),
        ]
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 10.
// Covers: situation 11.
// Covers: situation 12.
// Covers: situation 32.
async fn no_credential_of_a_wrong_shape_is_sent_to_login_with_amazon() {
    let mut harness = Harness::with_running_clock("").await;
    let token = harness.sandbox.grant().refresh_token;
    harness.stop_sidecar().await;
    harness.sandbox.clear_history();
    let (mut loads, mut commands) = (0, 0);
    for kind in [CLIENT_ID, CLIENT_SECRET, REFRESH_TOKEN, SCOPE] {
        let shapes = kind.wrong_shapes();
        assert!(shapes.len() >= 35 || kind.key == SCOPE.key, "{}: {}", kind.key, shapes.len());
        for (number, shape) in shapes.iter().enumerate() {
            for (source, sources) in kind.sources(&harness, shape) {
                let what = format!("{} by {source}: {shape:?}", kind.key);
                let refused = config::load(&sources).map(|_| ()).expect_err(&what).to_string();
                assert!(refused.contains(kind.key) && !kind.is_quoted_in(&refused), "{what}: {refused}");
                loads += 1;
            }
            // The commands that ask Login with Amazon take turns: each is a process, and takes its time. No variable
            // can hold a NUL.
            let command = [&["doctor"][..], &["login", "--user", "shop"], &["serve"], &["check"]][number % 4];
            if !shape.contains('\0') {
                let config = harness.config_file();
                let words = [&["--config", config.to_str().unwrap()], command].concat();
                let ran = bare_with(&words, &[(kind.variable, shape)]).await;
                let told = format!("{}{}", ran.out, ran.err);
                assert_ne!(ran.code, 0, "{command:?} {shape:?}: {told}");
                assert!(told.contains(kind.key) && !kind.is_quoted_in(&told), "{command:?} {shape:?}: {told}");
                commands += 1;
            }
            if kind.key == REFRESH_TOKEN.key {
                let imported = run(&harness, &["users", "import", "--user", "imported"], shape).await;
                assert_ne!(imported.code, 0, "{shape:?}: {}", imported.err);
                assert!(!kind.is_quoted_in(&imported.err), "{shape:?}: {}", imported.err);
                commands += 1;
            }
        }
    }
    assert!(loads > 500 && commands > 150, "{loads} {commands}");
    let lwa = harness.sandbox.lwa_calls();
    assert_eq!((lwa.refreshes, lwa.exchanges, lwa.others), (0, 0, 0), "nothing was sent");
    // What can be repaired without a guess is sent repaired.
    for shape in [format!("\"{token}\"\n"), format!("\u{feff}'{token}'"), format!(" {token}\r\n")] {
        let env = vec![("AMAZON_REFRESH_TOKEN".to_owned(), shape.clone())];
        let sources = Sources { file: Some(harness.config_file()), env, sets: harness.sets.clone() };
        let config = config::load(&sources).unwrap_or_else(|problems| panic!("{shape:?}: {problems}"));
        assert!(!config.warnings.is_empty() || shape.starts_with(' '), "{shape:?}");
        let app = App::build(config, harness.clock.clone(), None).await.unwrap();
        // A shutdown begins no refresh, so that it has to wait for the first one.
        let calls = || harness.sandbox.calls(world::Listener::Lwa);
        app.run(eventually("a refresh", async || (!calls().is_empty()).then_some(()))).await.unwrap();
    }
    let sent = harness.sandbox.calls(world::Listener::Lwa);
    let clean = url::form_urlencoded::byte_serialize(token.as_bytes()).collect::<String>();
    assert!(sent.iter().all(|call| call.text().contains(&format!("refresh_token={clean}"))), "{sent:?}");
}
