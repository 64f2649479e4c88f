//! The commands, run from the shipped binary.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use fernet::Fernet;
use serde_json::{Value, json as object};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use world::{CLIENT_ID, CLIENT_SECRET, Fault, Listener, RETURN_URL, Rule, SCOPE};

use crate::harness::{FERNET_KEY, Harness, eventually, json, unused_address};

/// The binary under test: that of `ADSIDECAR_BIN`, as in pytest, else the one that cargo has built for the tests.
pub static BINARY: LazyLock<String> =
    LazyLock::new(|| std::env::var("ADSIDECAR_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_adsidecar").to_owned()));
pub const OTHER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
/// Exit codes (sysexits.h).
pub const DONE: i32 = 0;
pub const FAILED: i32 = 1;
pub const USAGE: i32 = 64;
pub const HELD: i32 = 75;
pub const CONFIG: i32 = 78;

/// The output of a command.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// A setup with a running clock and a stopped sidecar, so that commands can open its store.
pub async fn stopped() -> Harness {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    harness
}

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(&*BINARY);
    command.args(arguments).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a command and waits for it.
async fn bare(arguments: &[&str], input: &str) -> Ran {
    ended(command(arguments), input).await
}

/// As above, with these variables in its environment.
pub async fn bare_with(arguments: &[&str], variables: &[(&str, &str)]) -> Ran {
    bare_with_input(arguments, variables, "").await
}

/// As above, with this standard input.
pub async fn bare_with_input(arguments: &[&str], variables: &[(&str, &str)], input: &str) -> Ran {
    let mut command = command(arguments);
    command.envs(variables.iter().copied());
    ended(command, input).await
}

async fn ended(mut command: Command, input: &str) -> Ran {
    let input = input.to_owned();
    let ran = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        // A command that reads no input may have exited already.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    });
    let ran = ran.await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: ran.status.code().unwrap(), out: text(ran.stdout), err: text(ran.stderr) }
}

/// Runs a command with the configuration of the harness.
pub async fn run(harness: &Harness, arguments: &[&str], input: &str) -> Ran {
    let file = harness.config_file();
    bare(&[&["--config", file.to_str().unwrap()], arguments].concat(), input).await
}

/// As above, beside the sidecar that runs in this process.
pub async fn beside(harness: &Harness, arguments: &[&str]) -> Ran {
    beside_with(harness, arguments, "").await
}

/// As above, with this standard input.
pub async fn beside_with(harness: &Harness, arguments: &[&str], input: &str) -> Ran {
    let listeners =
        [format!("proxy.listen={}", harness.proxy_address()), format!("admin.listen={}", harness.admin_address())];
    run(harness, &[arguments, &["--set", &listeners[0], "--set", &listeners[1]]].concat(), input).await
}

/// A sidecar in a separate process.
pub struct Serving {
    pub child: Child,
    pub log: Arc<Mutex<String>>,
    pub proxy: String,
    pub admin: String,
}

impl Serving {
    /// Starts it, and returns once it serves.
    pub async fn start(harness: &Harness, arguments: &[&str]) -> Self {
        let file = harness.config_file();
        Self::spawn(command(&[&["serve", "--config", file.to_str().unwrap()], arguments].concat())).await
    }

    pub async fn spawn(mut command: Command) -> Self {
        let mut serving = Self::told(command.spawn().unwrap(), String::new(), String::new());
        let line = serving.says(" serving ").await;
        let address = |listener: &str| {
            let (_, rest) = line.split_once(&format!("{listener}=[")).unwrap();
            rest.split(']').next().unwrap().to_owned()
        };
        (serving.proxy, serving.admin) = (address("proxy"), address("admin"));
        serving
    }

    /// A process that was started with known addresses; collects its log.
    pub fn told(mut child: Child, proxy: String, admin: String) -> Self {
        let stderr = child.stderr.take().unwrap();
        Self::reading(child, stderr, proxy, admin)
    }

    /// As above, where `output` is what it says.
    pub fn reading(child: Child, output: impl Read + Send + 'static, proxy: String, admin: String) -> Self {
        let log = Arc::new(Mutex::new(String::new()));
        let (lines, kept) = (BufReader::new(output).lines(), log.clone());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                kept.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        Self { child, log, proxy, admin }
    }

    /// Waits for a line of its log.
    pub async fn says(&self, text: &str) -> String {
        eventually(text, async || {
            let log = self.log.lock().unwrap();
            log.lines().find(|line| line.contains(text)).map(str::to_owned)
        })
        .await
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// The exit code, and the time until the exit.
    pub async fn ended(&mut self) -> (Option<i32>, Duration) {
        let begun = Instant::now();
        let child = &mut self.child;
        let mut code = None;
        while code.is_none() {
            assert!(
                begun.elapsed() < Duration::from_secs(15),
                "the process does not exit: {}",
                self.log.lock().unwrap()
            );
            code = child.try_wait().unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (code.unwrap().code(), begun.elapsed())
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.proxy)
    }

    /// Starts a request and leaves the connection open.
    pub async fn call(&self, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.proxy).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every file under a directory, with its contents.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.insert(path.display().to_string(), std::fs::read(&path).unwrap());
        }
    }
    all
}

pub fn sealed(text: &str) -> String {
    Fernet::new(FERNET_KEY).unwrap().encrypt(text.as_bytes())
}

pub fn opened(token: &Value) -> String {
    String::from_utf8(Fernet::new(FERNET_KEY).unwrap().decrypt(token.as_str().unwrap()).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_command_line_exits_with_64() {
    for arguments in [
        &["frobnicate"][..],
        &["serve", "--nope"],
        &["key"],
        &["completions", "tcsh"],
        &["wait", "--timeout", "soon"],
        &["users", "import", "--user", "a b"],
        &["users", "import", "--user", "a", "--records", "x"],
        &["check", "--set", "canary"],
    ] {
        let ran = bare(arguments, "").await;
        assert_eq!((ran.code, ran.out.as_str()), (USAGE, ""), "{arguments:?}");
        assert!(!ran.err.is_empty());
        assert!(!ran.err.contains("canary"), "a possible secret is not quoted");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 104.
async fn an_invalid_configuration_exits_with_78_and_lists_every_problem_without_secrets() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("wrong.toml");
    let text = "[amazon]\nclient_secret = \"can ary\"\nredirect_uri = \"http://app.example.com/cb\"\n\
                [proxy]\nlisten = \"0.0.0.0:8001\"\nport = 8001\n[store]\nfernet_keys = \"canary-key\"\n\
                [refresh]\nmargin = \"an hour\"\n";
    std::fs::write(&file, text).unwrap();
    for arguments in [&["check"][..], &["serve"], &["users", "list"], &["store", "dump"], &[]] {
        let ran = bare(&[arguments, &["--config", file.to_str().unwrap()]].concat(), "").await;
        assert_eq!((ran.code, ran.out.as_str()), (CONFIG, ""), "{arguments:?}");
        for key in [
            "client id",
            "amazon.client_secret",
            "amazon.redirect_uri",
            "proxy.listen",
            "proxy.port",
            "store.fernet_keys",
            "refresh.margin",
        ] {
            assert!(ran.err.contains(key), "{key} in {}", ran.err);
        }
        for secret in ["can ary", "canary"] {
            assert!(!ran.err.contains(secret), "{}", ran.err);
        }
    }
    let none = bare(&["check", "--config", "/nowhere.toml"], "").await;
    assert_eq!(none.code, CONFIG);
    assert!(none.err.contains("/nowhere.toml"));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 43.
// Covers: threat 40.
async fn a_wrong_fernet_key_is_78_with_both_fingerprints_and_changes_nothing() {
    let mut harness = stopped().await;
    let before = files(harness.directory.path());
    assert!(before.len() > 3, "there is something to change: {:?}", before.keys());
    let [wanted, have] =
        [FERNET_KEY, OTHER_KEY].map(|key| Keyring::new(&[Secret::new(key)]).unwrap().first().to_string());
    let wrong = format!("store.fernet_keys={OTHER_KEY}");
    for arguments in [&["serve"][..], &["users", "list"], &["store", "dump"], &["key", "rotate"], &["users", "import"]]
    {
        let ran = run(&harness, &[arguments, &["--set", &wrong]].concat(), "Atzr|x").await;
        assert_eq!((ran.code, ran.out.as_str()), (CONFIG, ""), "{arguments:?}: {}", ran.err);
        assert!(ran.err.contains(&wanted) && ran.err.contains(&have), "{wanted} and {have} in {}", ran.err);
        assert!(ran.err.contains("add the key it was sealed with"), "the cure: {}", ran.err);
        assert!(!ran.err.contains(FERNET_KEY) && !ran.err.contains(OTHER_KEY));
        assert_eq!(files(harness.directory.path()), before, "{arguments:?}");
    }
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "with the right key all is there");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 38.
async fn a_second_process_exits_with_75() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    let import = &["users", "import"][..];
    for (arguments, input) in
        [(&["serve"][..], ""), (import, "Atzr|x"), (&["store", "dump"], ""), (&["store", "restore"], "{}")]
    {
        let ran = run(&harness, arguments, input).await;
        assert_eq!((ran.code, ran.out.as_str()), (HELD, ""), "{arguments:?}: {}", ran.err);
        assert!(ran.err.contains(harness.store_path().to_str().unwrap()), "{}", ran.err);
    }
    assert_eq!(harness.get("/v2/profiles").await.status(), 200, "the first process is not affected");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_prints_the_effective_configuration_without_secrets() {
    let harness = stopped().await;
    let ran = run(&harness, &["check", "--set", "proxy.caller_token=canary-token"], "").await;
    assert_eq!((ran.code, ran.err.as_str()), (DONE, ""));
    for shown in ["[amazon]", "client_id", "[proxy]", "margin = \"5m\"", "environment = \"development\""] {
        assert!(ran.out.contains(shown), "{shown} in {}", ran.out);
    }
    for secret in [CLIENT_SECRET, FERNET_KEY, "canary"] {
        assert!(!ran.out.contains(secret), "{}", ran.out);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn version_and_key_commands_work() {
    let version = bare(&["version"], "").await;
    assert_eq!((version.code, version.out), (DONE, format!("adsidecar {}\n", env!("CARGO_PKG_VERSION"))));
    let help = bare(&["--help"], "").await;
    assert_eq!((help.code, help.err.as_str()), (DONE, ""));
    assert!(help.out.contains("completions"));
    let bash = bare(&["completions", "bash"], "").await;
    assert_eq!(bash.code, DONE);
    assert!(bash.out.contains("complete -F _adsidecar"));
    let (one, two) = (bare(&["key", "new"], "").await, bare(&["key", "new"], "").await);
    assert_eq!(one.code, DONE);
    assert_ne!(one.out, two.out);
    assert!(Keyring::new(&[Secret::new(one.out.trim_end())]).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_users_are_listed_alone_and_beside_a_running_sidecar() {
    let mut harness = Harness::with_running_clock("").await;
    for number in 0..3 {
        harness.log_in(&format!("user-{number}")).await;
    }
    let running = beside(&harness, &["users", "list"]).await;
    assert_eq!(running.code, DONE, "{}", running.err);
    harness.stop_sidecar().await;
    let alone = run(&harness, &["users", "list"], "").await;
    assert_eq!(alone.code, DONE, "{}", alone.err);
    assert_eq!(running.out, alone.out);
    let (header, rows) = alone.out.split_once('\n').unwrap();
    assert!(header.starts_with("USER    STATE  TOKEN EXPIRES         CONSENT EXPIRES"), "{header}");
    let lines: Vec<Vec<&str>> = rows.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3);
    for (number, line) in lines.iter().enumerate() {
        assert_eq!((line[0], line[1]), (format!("user-{number}").as_str(), "fresh"));
        assert!(line[2].parse::<jiff::Timestamp>().is_ok());
        assert_eq!(line[2].len(), "2026-08-01T12:00:00Z".len(), "nothing is printed in nanoseconds");
    }
    harness.start_sidecar().await;
    for arguments in [["users", "list", "-o", "json"], ["users", "list", "--output", "json"]] {
        let listed = beside(&harness, &arguments).await;
        let users: Value = serde_json::from_str(&listed.out).unwrap();
        assert_eq!((users[2]["user_id"].as_str(), users[2]["state"].as_str()), (Some("user-2"), Some("fresh")));
        assert_eq!(users.as_array().unwrap().len(), 3);
    }
    assert!(!alone.out.contains("Atz"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_beside_a_running_sidecar_sends_the_caller_token() {
    let harness = Harness::with("[proxy]\nlisten = \"127.0.0.1:0\"\ncaller_token = \"one-token\"\n").await;
    let listed = beside(&harness, &["users", "list"]).await;
    assert_eq!((listed.code, listed.out.lines().count()), (DONE, 1), "the header alone: {}", listed.out);
    assert!(listed.err.contains("nobody is logged in"), "{}", listed.err);
    let wrong = beside(&harness, &["users", "list", "--set", "proxy.caller_token=another-token"]).await;
    assert_eq!(wrong.code, FAILED);
    assert!(wrong.err.contains("407") && !wrong.err.contains("another-token"), "{}", wrong.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_variable_names_of_amazons_guide_suffice_to_start() {
    let harness = stopped().await;
    let token = harness.sandbox.grant().refresh_token;
    let store = harness.directory.path().join("other").display().to_string();
    let ca = harness.directory.path().join("ca.pem").display().to_string();
    let variables = [
        ("AMAZON_CLIENT_ID", CLIENT_ID.to_owned()),
        ("AMAZON_CLIENT_SECRET", CLIENT_SECRET.to_owned()),
        ("AMAZON_OAUTH_REDIRECT_URI", RETURN_URL.to_owned()),
        ("AMAZON_SCOPE", SCOPE.to_owned()),
        ("AMAZON_REFRESH_TOKEN", token),
        ("FERNET_KEY", FERNET_KEY.to_owned()),
        ("FRONTEND_URL", "https://app.example.com/".to_owned()),
        ("ENVIRONMENT", "production".to_owned()),
        ("ADSIDECAR_AMAZON__TOKEN_URL", harness.sandbox.token_url()),
        ("ADSIDECAR_AMAZON__CA_FILE", ca.clone()),
        ("ADSIDECAR_UPSTREAM__NA", harness.sandbox.origin(Listener::Na)),
        ("ADSIDECAR_UPSTREAM__CA_FILE", ca),
        ("ADSIDECAR_STORE__PATH", store),
        ("ADSIDECAR_PROXY__LISTEN", "127.0.0.1:0".to_owned()),
        ("ADSIDECAR_ADMIN__LISTEN", "127.0.0.1:0".to_owned()),
        // Kubernetes injects such names for a Service called adsidecar.
        ("ADSIDECAR_PORT", "tcp://10.0.0.1:8001".to_owned()),
        ("ADSIDECAR_SERVICE_HOST", "10.0.0.1".to_owned()),
    ];
    let mut serve = command(&["serve", "--set", "log.format=text"]);
    serve.envs(variables);
    let serving = Serving::spawn(serve).await;
    let call = harness.client.get(serving.url("/v2/profiles")).send().await.unwrap();
    assert_eq!(call.status(), 200, "the refresh token was adopted");
    let ended = harness.client.get(serving.url("/api/auth/amazon/callback?code=x&state=y")).send().await.unwrap();
    assert!(ended.headers()["location"].to_str().unwrap().starts_with("https://app.example.com/?status=error"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_development_creates_one_and_production_does_not_start() {
    let harness = stopped().await;
    let text = std::fs::read_to_string(harness.config_file()).unwrap();
    let keyless: String =
        text.lines().filter(|line| !line.starts_with("fernet_keys")).map(|line| format!("{line}\n")).collect();
    let file = harness.directory.path().join("keyless.toml");
    std::fs::write(&file, keyless).unwrap();
    let store = harness.directory.path().join("fresh").display().to_string();
    let set = format!("store.path={store}");
    let arguments = ["--config", file.to_str().unwrap(), "--set", &set];
    let refused = bare(&[&["serve", "--set", "environment=production"], &arguments[..]].concat(), "").await;
    assert_eq!(refused.code, CONFIG);
    assert!(refused.err.contains("adsidecar key new"), "{}", refused.err);
    assert!(!Path::new(&format!("{store}.key")).exists());

    let token = harness.sandbox.grant().refresh_token;
    let made = bare(&[&["users", "import"], &arguments[..]].concat(), &token).await;
    assert_eq!(made.code, DONE, "{}", made.err);
    let key = std::fs::metadata(format!("{store}.key")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777, 0o600);
    let again = bare(&[&["users", "list"], &arguments[..]].concat(), "").await;
    assert!(again.out.contains("\ndefault  fresh  "), "{}{}", again.out, again.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_is_imported_after_verification() {
    let mut harness = stopped().await;
    let token = harness.sandbox.grant().refresh_token;
    for (input, user) in [("Atzr|unknown", "shop"), ("", "shop"), ("two words", "shop"), (token.as_str(), "default")] {
        let ran = run(&harness, &["users", "import", "--user", user], input).await;
        assert_eq!(ran.code, FAILED, "{input}");
        assert!(input.is_empty() || !ran.err.contains(input), "{}", ran.err);
    }
    let listed = run(&harness, &["users", "list"], "").await.out;
    assert_eq!(listed.lines().count(), 2, "{listed}");

    let taken = run(&harness, &["users", "import", "--user", "shop"], &format!("{token}\n")).await;
    assert_eq!((taken.code, taken.out.as_str()), (DONE, "1 grants imported\n"), "{}", taken.err);
    let replaced = run(&harness, &["users", "import", "--replace"], &token).await;
    assert_eq!(replaced.code, DONE, "{}", replaced.err);
    let asked = harness.sandbox.refreshes();
    let offline = run(&harness, &["users", "import", "--user", "later", "--offline"], &token).await;
    assert_eq!((offline.code, harness.sandbox.refreshes()), (DONE, asked));
    harness.start_sidecar().await;
    for user in ["shop", "default", "later"] {
        let call =
            harness.request(reqwest::Method::GET, "/v2/profiles").header("x-ads-user", user).send().await.unwrap();
        assert_eq!(call.status(), 200, "{user}");
        assert_eq!(harness.status_of(user).await["consented_at"], Value::Null, "{user}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_records_of_another_service_are_imported() {
    let mut harness = stopped().await;
    let (one, two) = (harness.sandbox.grant(), harness.sandbox.grant());
    let soon = (harness.clock.now() + jiff::SignedDuration::from_secs(3000)).to_string();
    let zoneless = soon.split('.').next().unwrap().trim_end_matches('Z').to_owned();
    let record = |issued: &world::Issued, expires_at: &str| {
        object!({
            "access_token": sealed(&issued.access_token),
            "refresh_token": sealed(&issued.refresh_token),
            "token_type": "bearer",
            "expires_at": expires_at,
            "updated_at": "2026-01-01T11:00:00.123456",
        })
    };
    let records = object!({ "living": record(&one, &zoneless), "expired": record(&two, "2026-01-01T12:00:00") });
    let file = harness.directory.path().join("records.json");
    let path = file.to_str().unwrap().to_owned();

    let foreign = Fernet::new(OTHER_KEY).unwrap().encrypt(b"Atzr|x");
    let mixed = |bad: Value| object!({ "good": record(&one, &zoneless), "bad": bad }).to_string();
    for bad in [
        "canary".to_owned(),
        "[]".into(),
        object!({ "good": record(&one, &zoneless), "a b": record(&two, &zoneless) }).to_string(),
        mixed(object!({ "refresh_token": "canary", "updated_at": "2026-01-01T11:00:00" })),
        mixed(object!({ "refresh_token": foreign, "updated_at": "2026-01-01T11:00:00" })),
        mixed(object!({ "refresh_token": sealed("Atzr|x"), "updated_at": "yesterday" })),
    ] {
        std::fs::write(&file, &bad).unwrap();
        let ran = run(&harness, &["users", "import", "--records", &path, "--offline"], "").await;
        assert_eq!(ran.code, FAILED, "{bad}");
        assert!(!ran.err.contains("canary") && !ran.err.contains("gAAAA"), "{}", ran.err);
    }
    assert_eq!(run(&harness, &["users", "list"], "").await.out.lines().count(), 2, "an import is all or nothing");

    std::fs::write(&file, records.to_string()).unwrap();
    let taken = run(&harness, &["users", "import", "--records", &path, "--offline"], "").await;
    assert_eq!((taken.code, taken.out.as_str()), (DONE, "2 grants imported\n"), "{}", taken.err);
    assert_eq!(harness.sandbox.refreshes(), 0, "not verified until first use");
    harness.start_sidecar().await;
    let call = async |user: &str| {
        let call =
            harness.request(reqwest::Method::GET, "/sandbox/echo").header("x-ads-user", user).send().await.unwrap();
        assert_eq!(call.status(), 200, "{user}");
        harness.seen().header("authorization").unwrap().to_owned()
    };
    assert_eq!(
        call("living").await,
        format!("Bearer {}", one.access_token),
        "the access token that has not expired is used"
    );
    assert_ne!(call("expired").await, format!("Bearer {}", two.access_token));

    let mut verified = stopped().await;
    let issued = verified.sandbox.grant();
    let records = object!({ "shop": record(&issued, "2026-01-01T12:00:00"), "dead": record(&two, &zoneless) });
    let ran = run(&verified, &["users", "import", "--records", "-"], &records.to_string()).await;
    assert_eq!((ran.code, ran.out.as_str()), (FAILED, "1 grants imported\n"));
    assert!(ran.err.contains("dead: ") && ran.err.contains("--offline"), "{}", ran.err);
    verified.start_sidecar().await;
    assert_eq!(verified.status_of("shop").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_is_restored_into_another_store() {
    let mut harness = stopped().await;
    let dump = run(&harness, &["store", "dump"], "").await;
    assert_eq!(dump.code, DONE, "{}", dump.err);
    assert!(!dump.out.contains("Atza|") && !dump.out.contains("Atzr|"), "tokens stay encrypted");
    let records: Value = serde_json::from_str(&dump.out).unwrap();
    let record = &records["default"];
    let refresh_token = harness.sandbox.world(|world| world.grants[0].refresh_token.clone());
    assert_eq!(opened(&record["refresh_token"]), refresh_token);
    assert!(opened(&record["access_token"]).starts_with("Atza|"));
    for field in ["token_type", "expires_at", "updated_at", "consented_at", "used_at", "scope", "generation", "seal"] {
        assert_ne!(record[field], Value::Null, "{field} in {record}");
    }

    let elsewhere = harness.directory.path().join("elsewhere").display().to_string();
    let set = format!("store.path={elsewhere}");
    let mut moved = records.clone();
    moved["thief"] = moved["default"].clone();
    let refused = run(&harness, &["store", "restore", "--set", &set], &moved.to_string()).await;
    assert_eq!(refused.code, FAILED, "a record belongs to its user");
    assert!(refused.err.contains("thief: "), "{}", refused.err);
    let restored = run(&harness, &["store", "restore", "--set", &set], &dump.out).await;
    assert_eq!((restored.code, restored.out.as_str()), (DONE, "1 grants imported\n"), "{}", restored.err);
    let again = run(&harness, &["store", "restore", "--set", &set], &dump.out).await;
    assert_eq!(again.code, FAILED, "nothing is replaced without --replace");
    assert_eq!(run(&harness, &["store", "restore", "--replace", "--set", &set], &dump.out).await.code, DONE);

    let copied: Value = serde_json::from_str(&run(&harness, &["store", "dump", "--set", &set], "").await.out).unwrap();
    for field in ["token_type", "expires_at", "updated_at", "consented_at", "scope"] {
        assert_eq!(copied["default"][field], record[field], "{field}");
    }
    for field in ["access_token", "refresh_token"] {
        assert_eq!(opened(&copied["default"][field]), opened(&record[field]), "{field}");
    }
    harness.sets.push(("store.path".into(), elsewhere));
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    assert_eq!(harness.sandbox.refreshes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_wait_use_the_admin_listener() {
    let harness = stopped().await;
    let socket = format!("admin.listen=unix:{}", harness.directory.path().join("admin.sock").display());
    for arguments in [&["health"][..], &["health", "--ready"], &["wait", "--timeout", "150ms"]] {
        let ran = run(&harness, &[arguments, &["--set", &socket]].concat(), "").await;
        assert_eq!((ran.code, ran.out.as_str()), (FAILED, ""), "{arguments:?}");
        assert!(ran.err.contains("admin.sock"), "{}", ran.err);
    }
    let at_socket = ["--set", &socket];
    let waiting = ["wait", "--timeout", "10s", "--set", &socket];
    let (waited, mut serving) = tokio::join!(run(&harness, &waiting, ""), Serving::start(&harness, &at_socket));
    assert_eq!(waited.code, DONE, "{}", waited.err);
    let alive = run(&harness, &["health", "--set", &socket], "").await;
    assert_eq!((alive.code, alive.out.as_str()), (DONE, "alive\n"), "{}", alive.err);
    let ready = run(&harness, &["health", "--ready", "--set", &socket], "").await;
    assert_eq!((ready.code, ready.out.as_str()), (DONE, "ready\n"), "{}", ready.err);

    // A draining sidecar is live but not ready.
    let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
    let _caller = serving.call("/v2/profiles").await;
    gate.reached(1).await;
    serving.signal("TERM");
    serving.says("draining").await;
    let ready = run(&harness, &["health", "--ready", "--set", &socket], "").await;
    assert_eq!((ready.code, ready.err.as_str()), (FAILED, "draining\n"));
    assert_eq!(run(&harness, &["health", "--set", &socket], "").await.code, DONE);
    gate.release();
    assert_eq!(serving.ended().await.0, Some(DONE));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_wait_need_no_credentials() {
    let harness = stopped().await;
    let socket = format!("admin.listen=unix:{}", harness.directory.path().join("admin.sock").display());
    let mut serving = Serving::start(&harness, &["--set", &socket]).await;
    for arguments in [&["health"][..], &["health", "--ready"], &["wait", "--timeout", "5s"]] {
        let ran = bare(&[arguments, &["--set", &socket]].concat(), "").await;
        assert_eq!(ran.code, DONE, "{arguments:?}: {}", ran.err);
        let unreadable = ["--set", "amazon.client_secret_file=/nowhere/secret"];
        let ran = bare(&[arguments, &["--set", &socket], &unreadable[..]].concat(), "").await;
        assert_eq!(ran.code, DONE, "{arguments:?}: {}", ran.err);
    }
    serving.signal("TERM");
    assert_eq!(serving.ended().await.0, Some(DONE));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_failed_refresh_names_the_cause_with_host_and_address() {
    let harness = stopped().await;
    let nobody = unused_address();
    let set = format!("amazon.token_url=https://localhost:{}/auth/o2/token", nobody.port());
    let serving = Serving::start(&harness, &["--set", &set]).await;
    let refreshed = harness.client.post(serving.url("/api/auth/amazon/refresh")).send().await.unwrap();
    drop(refreshed);
    let line = serving.says("refresh failed").await;
    for part in ["WARN", "unreachable", "cause", &format!("localhost:{}", nobody.port()), "127.0.0.1"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repaired_credential_is_a_warning_of_check_and_in_the_log() {
    let required = [("AMAZON_CLIENT_ID", CLIENT_ID), ("FERNET_KEY", FERNET_KEY)];
    let quoted = format!("\"{CLIENT_SECRET}\"");
    let ran = bare_with(&["check"], &[&required[..], &[("AMAZON_CLIENT_SECRET", &quoted)]].concat()).await;
    assert_eq!(ran.code, DONE, "{}", ran.err);
    assert!(ran.err.contains("warning: amazon.client_secret (from AMAZON_CLIENT_SECRET): stands in quotes"));
    assert!(!ran.err.contains(CLIENT_SECRET) && !ran.out.contains(CLIENT_SECRET));
    let harness = stopped().await;
    let serving = Serving::start(&harness, &["--set", "amazon.scope='advertising::campaign_management'"]).await;
    assert!(serving.says("needs attention").await.contains("amazon.scope"));
}

#[tokio::test(flavor = "multi_thread")]
async fn help_is_a_command_too() {
    for arguments in [&["help"][..], &["help", "users"], &["help", "users", "import"], &["users", "help", "import"]] {
        let ran = bare(arguments, "").await;
        assert_eq!(ran.code, DONE, "{arguments:?}: {}", ran.err);
        assert!(ran.out.contains("Usage: adsidecar"), "{}", ran.out);
    }
}

#[test]
// Covers: situation 33.
fn completions_into_a_closed_pipe_end_quietly() {
    let mut child = command(&["completions", "bash"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = child.stdout(writer).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(DONE), ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_file_named_by_the_flag_is_named_in_its_error() {
    let ran = bare(&["check", "--config", "adsidecar.tmol"], "").await;
    assert_eq!(ran.code, CONFIG);
    assert!(ran.err.contains("the file adsidecar.tmol does not exist"), "{}", ran.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_reported_with_its_key_and_the_cure() {
    let harness = stopped().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    for key in ["proxy.listen", "login.listen", "admin.listen"] {
        let set = format!("{key}={address}");
        let ran = run(&harness, &["serve", "--set", &set], "").await;
        assert_eq!(ran.code, FAILED, "{}", ran.err);
        for part in [key, &address.to_string(), "in use", "--set", "another port"] {
            assert!(ran.err.contains(part), "{part}: {}", ran.err);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 96.
async fn sigterm_drains_requests_in_flight_and_then_exits_immediately() {
    let harness = stopped().await;
    for signal in ["TERM", "INT"] {
        let mut serving = Serving::start(&harness, &[]).await;
        let gate = harness.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Na));
        let mut caller = serving.call("/sandbox/bytes/300000").await;
        let _idle = TcpStream::connect(&serving.proxy).await.unwrap();
        gate.reached(1).await;
        serving.signal(signal);
        serving.says("draining").await;
        eventually("the listener to close", async || TcpStream::connect(&serving.proxy).await.err()).await;
        assert!(serving.child.try_wait().unwrap().is_none(), "it waits for the request in flight");
        gate.release();
        let mut answer = Vec::new();
        caller.read_to_end(&mut answer).await.unwrap();
        let head = String::from_utf8_lossy(&answer[..400]).to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 200 ") && head.contains("connection: close"), "{head}");
        assert!(answer.len() > 300_000);
        let (code, took) = serving.ended().await;
        assert_eq!(code, Some(DONE));
        assert!(took < Duration::from_secs(3), "{took:?}: shutdown.drain is a maximum, not a minimum");
    }
    let mut idle = Serving::start(&harness, &[]).await;
    idle.signal("TERM");
    assert_eq!(idle.ended().await.0, Some(DONE));
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 97.
async fn a_second_signal_and_the_end_of_the_drain_abort_hanging_requests() {
    let harness = stopped().await;
    harness.sandbox.set_fault(Rule::from(Fault::Hang).at(Listener::Na).always());
    let mut impatient = Serving::start(&harness, &[]).await;
    let _caller = impatient.call("/v2/profiles").await;
    eventually("the call to reach Amazon", async || (!harness.sandbox.calls(Listener::Na).is_empty()).then_some(()))
        .await;
    impatient.signal("TERM");
    impatient.says("draining").await;
    // A supervisor that signals the process and its group sends two at once, and means one.
    impatient.signal("TERM");
    impatient.signal("INT");
    // The half second itself is under test: only a signal after it counts as another one.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(impatient.child.try_wait().unwrap().is_none(), "signals within half a second are one");
    impatient.signal("TERM");
    let (code, took) = impatient.ended().await;
    assert_eq!(code, Some(FAILED), "the shutdown was not graceful");
    assert!(took < Duration::from_secs(3), "{took:?}");

    let mut limited = Serving::start(&harness, &["--set", "shutdown.drain=200ms"]).await;
    let mut caller = limited.call("/v2/profiles").await;
    eventually("the call to reach Amazon", async || (harness.sandbox.calls(Listener::Na).len() == 2).then_some(()))
        .await;
    limited.signal("TERM");
    let (code, took) = limited.ended().await;
    assert_eq!(code, Some(DONE));
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert!(limited.log.lock().unwrap().contains("still in flight after shutdown.drain"));
    let mut answer = Vec::new();
    let _ = caller.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty(), "the response must not end cleanly: {answer}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 98.
async fn a_grant_survives_sigkill_and_no_log_contains_a_secret() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let log = {
        let mut serving = Serving::start(&harness, &["--set", "log.level=trace"]).await;
        let get = async |path: &str| harness.client.get(serving.url(path)).send().await.unwrap();
        let post = async |path: &str| harness.client.post(serving.url(path)).send().await.unwrap();
        let begun = json(get("/api/auth/amazon/login").await).await;
        let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
        assert_eq!(get(&callback).await.status(), 200);
        assert_eq!(get("/v2/profiles").await.status(), 200);
        harness.sandbox.set_fault(Fault::InvalidGrant);
        post("/api/auth/amazon/refresh").await;
        harness.sandbox.set_fault(Fault::BadJson);
        assert_eq!(get(&callback).await.status(), 400);
        serving.signal("KILL");
        assert_eq!(serving.ended().await.0, None);
        let log = serving.log.lock().unwrap().clone();
        let code = url::Url::parse(&format!("http://localhost{callback}")).unwrap();
        for (name, value) in code.query_pairs() {
            assert!(name == "scope" || !log.contains(&*value), "{name} is in the log");
        }
        log
    };
    assert!(log.contains("serving"));
    for secret in ["Atza|", "Atzr|", CLIENT_SECRET, FERNET_KEY, "gAAAA"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
    harness.sandbox.clear_faults();
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
}
