//! `adsidecar doctor`: each injected fault is named with its code and its cure, and the cure makes it go away.

use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::{CLIENT_SECRET, Fault, Listener, Profile, Rule};

use crate::commands::{CONFIG, DONE, FAILED, OTHER_KEY, Ran, bare_with, run};
use crate::harness::{FERNET_KEY, Harness};

const USAGE: i32 = 64;

/// What a run of the doctor found.
struct Diagnosis {
    code: i32,
    document: Value,
}

impl Diagnosis {
    fn checks(&self) -> impl Iterator<Item = &Value> {
        self.document["groups"].as_array().unwrap().iter().flat_map(|group| group["checks"].as_array().unwrap())
    }

    fn find(&self, code: &str) -> Option<&Value> {
        self.checks().find(|check| check["code"] == code && matches!(check["status"].as_str(), Some("warn" | "fail")))
    }

    /// The codes of everything that is wrong.
    fn wrong(&self) -> Vec<&str> {
        let wrong = self.checks().filter(|check| matches!(check["status"].as_str(), Some("warn" | "fail")));
        wrong.map(|check| check["code"].as_str().unwrap()).collect()
    }
}

async fn diagnose(harness: &Harness, arguments: &[String], variables: &[(&str, &str)]) -> Diagnosis {
    let file = harness.config_file().display().to_string();
    let mut all = vec!["doctor", "-o", "json"];
    if !arguments.iter().any(|argument| argument == "--config") {
        all.extend(["--config", &file]);
    }
    all.extend(arguments.iter().map(String::as_str));
    let Ran { code, out, err } = bare_with(&all, variables).await;
    let document = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{arguments:?}: {out}{err}"));
    for secret in [CLIENT_SECRET, FERNET_KEY, OTHER_KEY, "Atza|", "Atzr|", "canary"] {
        assert!(!out.contains(secret) && !err.contains(secret), "{arguments:?} shows {secret}: {out}{err}");
    }
    Diagnosis { code, document }
}

fn set(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]).collect()
}

/// Diagnoses with a fault and without it. `cure` stands in the finding's cure.
async fn expect(harness: &Harness, code: &str, cure: &str, broken: &[String], cured: &[String]) {
    expect_with(harness, code, cure, (broken, &[]), cured).await;
}

async fn expect_with(
    harness: &Harness,
    code: &str,
    cure: &str,
    (broken, variables): (&[String], &[(&str, &str)]),
    cured: &[String],
) {
    let found = diagnose(harness, broken, variables).await;
    assert_named(&found, code, cure);
    let after = diagnose(harness, cured, &[]).await;
    assert!(after.find(code).is_none(), "{code} is still there after the cure: {:?}", after.wrong());
}

fn assert_named(found: &Diagnosis, code: &str, cure: &str) {
    let check = found.find(code).unwrap_or_else(|| panic!("{code} was not found, but {:?}", found.wrong()));
    assert!(check["cure"].as_str().unwrap().contains(cure), "{code}: {cure} is not in the cure: {check}");
    assert!(["operator", "person", "network", "amazon"].contains(&check["fault"].as_str().unwrap()), "{check}");
    assert_ne!(check["cause"], "", "{check}");
    if check["status"] == "fail" {
        let of_configuration = ["configuration", "secrets"].contains(&check["group"].as_str().unwrap());
        let expected = if of_configuration || code == "store_key_wrong" { CONFIG } else { found.code };
        assert_eq!(found.code, expected, "{code}");
        assert_ne!(found.code, DONE, "{code}");
    }
}

/// A stopped sidecar with a logged-in user, and a configuration file that nobody else can read.
async fn stopped() -> Harness {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    std::fs::set_permissions(harness.config_file(), PermissionsExt::from_mode(0o600)).unwrap();
    harness
}

/// The configuration with a change, in a file of its own.
fn changed(harness: &Harness, name: &str, change: impl FnOnce(String) -> String) -> Vec<String> {
    let file = harness.directory.path().join(name);
    let text = std::fs::read_to_string(harness.config_file()).unwrap();
    std::fs::write(&file, change(text)).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    vec!["--config".to_owned(), file.display().to_string()]
}

fn with(one: &[String], more: &[&str]) -> Vec<String> {
    one.iter().cloned().chain(more.iter().map(|&argument| argument.to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_configuration_and_its_secrets_is_named_before_the_first_start() {
    let harness = stopped().await;
    let pre = || vec!["--pre".to_owned()];
    let healthy = diagnose(&harness, &pre(), &[]).await;
    assert_eq!((healthy.code, healthy.wrong()), (DONE, vec![]), "{}", healthy.document);
    let mut number = 0;
    let mut account = |text: &str| {
        number += 1;
        let text = text.to_owned();
        let file = format!("account-{number}.toml");
        with(&changed(&harness, &file, move |base| format!("{base}\n[[account]]\n{text}\n")), &["--pre"])
    };
    let keyless = |base: String| -> String {
        base.lines().filter(|line| !line.starts_with("fernet_keys")).map(|line| format!("{line}\n")).collect()
    };
    let production = ("environment", "production");
    let key = ("store.fernet_keys", FERNET_KEY);
    let socket = format!("unix:{}", harness.directory.path().join("proxy.sock").display());
    let cases: Vec<(&str, &str, Vec<String>)> = vec![
        ("config_unknown_key", "proxy.port", set(&[("proxy.port", "1")])),
        ("config_value", "refresh.margin", set(&[("refresh.margin", "soon")])),
        ("config_client_id", "amazon.client_id", set(&[("amazon.client_id", "a b")])),
        ("config_client_secret", "amazon.client_secret", set(&[("amazon.client_secret", "can ary")])),
        (
            "config_redirect_uri",
            "amazon.redirect_uri",
            set(&[production, key, ("amazon.redirect_uri", "http://app.example.com/cb")]),
        ),
        ("config_listen", "proxy.listen", set(&[("proxy.listen", "0.0.0.0:8001")])),
        ("config_doubtful", "amazon.redirect_uri", set(&[("amazon.redirect_uri", "http://localhost:8001/elsewhere")])),
        ("config_file", "adsidecar check", vec!["--config".into(), "/nowhere.toml".into()]),
        ("config_file", "adsidecar check", changed(&harness, "broken.toml", |_| "[amazon\n".into())),
        ("config_account", "name", account("name = \"a b\"")),
        (
            "fernet_key_missing",
            "adsidecar key new",
            with(&changed(&harness, "keyless.toml", keyless), &["--set", "environment=production"]),
        ),
        ("fernet_key_malformed", "adsidecar key new", set(&[("store.fernet_keys", "canary-key")])),
        ("secret_file_unreadable", "amazon.client_secret", set(&[("amazon.client_secret_file", "/nowhere/secret")])),
        ("store_unwritable", "store.path", set(&[("store.path", "/proc/adsidecar/store")])),
        ("store_key_wrong", "store.fernet_keys", set(&[("store.fernet_keys", OTHER_KEY)])),
        (
            "store_postgres",
            "store.postgres_url",
            set(&[("store.kind", "postgres"), ("store.postgres_url", "postgres://u:canary@127.0.0.1:1/x")]),
        ),
        ("account_id_kind", "profile_id", account("name = \"shop\"\nprofile_id = \"ENTITY1\"")),
        ("account_id_kind", "marketplace_id", account("name = \"shop\"\nmarketplace_id = \"12345\"")),
        (
            "account_region",
            "region = \"eu\"",
            account("name = \"shop\"\nregion = \"fe\"\nmarketplace_id = \"A1PA6795UKMFR9\""),
        ),
        ("caller_token_short", "proxy.caller_token", set(&[("proxy.caller_token", "short")])),
        ("socket_open", "proxy.socket_mode", set(&[("proxy.listen", &socket), ("proxy.socket_mode", "0666")])),
    ];
    for (code, cure, broken) in &cases {
        expect(&harness, code, cure, &dedup(with(broken, &["--pre"])), &pre()).await;
    }
    // The cure of this one is a command, which is run.
    let file = harness.config_file();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    let open = diagnose(&harness, &pre(), &[]).await;
    assert_named(&open, "secret_file_open", "chmod 600");
    let cure = open.find("secret_file_open").unwrap()["cure"].as_str().unwrap().to_owned();
    assert!(std::process::Command::new("sh").args(["-c", &cure]).status().unwrap().success());
    assert!(diagnose(&harness, &pre(), &[]).await.find("secret_file_open").is_none());
    let secrets = [("amazon.client_secret", CLIENT_SECRET), ("store.fernet_keys", FERNET_KEY)];
    for (section, line, is_open) in [
        ("[log]", "level = \"info\"", false),
        ("[upstream]", "proxy = \"http://proxy.example.com:3128\"", false),
        ("[upstream]", "proxy = \"http://someone:canary@proxy.example.com:3128\"", true),
        ("[notify]", "url = \"https://hooks.example.com/canary\"", true),
    ] {
        let shared = |base: String| {
            let is_public = |text: &&str| !["client_secret", "fernet_keys"].iter().any(|name| text.starts_with(name));
            let text: String = base.lines().filter(is_public).map(|text| format!("{text}\n")).collect();
            let text = if text.contains(section) { text } else { format!("{text}{section}\n") };
            text.replace(section, &format!("{section}\n{line}"))
        };
        let arguments = changed(&harness, "shared.toml", shared);
        std::fs::set_permissions(&arguments[1], PermissionsExt::from_mode(0o644)).unwrap();
        let found = diagnose(&harness, &[arguments, pre(), set(&secrets)].concat(), &[]).await;
        assert_eq!(found.find("secret_file_open").is_some(), is_open, "{line}: {:?}", found.wrong());
    }

    let pod = [("KUBERNETES_SERVICE_HOST", "10.0.0.1")];
    let store = set(&[("store.path", "/adsidecar-doctor-test")]);
    for (code, cure) in [("pod_store_ephemeral", "volume"), ("pod_probe", "adsidecar, health")] {
        expect_with(&harness, code, cure, (&with(&store, &["--pre"]), &pod), &pre()).await;
    }
    assert!(!std::path::Path::new("/adsidecar-doctor-test").exists(), "nothing is created");
}

/// `--pre` once, whether or not a case said it already.
fn dedup(arguments: Vec<String>) -> Vec<String> {
    let mut seen = false;
    arguments.into_iter().filter(|argument| argument != "--pre" || !std::mem::replace(&mut seen, true)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_store_is_named_and_the_store_is_not_touched() {
    let mut harness = stopped().await;
    let pre = ["--pre".to_owned()];
    let db = harness.store_path().join("db");
    let whole = std::fs::read(&db).unwrap();
    std::fs::write(&db, vec![0xff; whole.len()]).unwrap();
    let damaged = diagnose(&harness, &pre, &[]).await;
    assert_named(&damaged, "store_damaged", "adsidecar serve");
    assert_eq!(std::fs::read(&db).unwrap(), vec![0xff; whole.len()], "the doctor changes nothing");
    // The cure: a start restores it.
    harness.start_sidecar().await;
    assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    harness.stop_sidecar().await;
    assert_eq!(diagnose(&harness, &pre, &[]).await.find("store_damaged"), None);

    let elsewhere = harness.directory.path().join("elsewhere");
    drop(sled::Config::new().path(&elsewhere).segment_size(64 << 10).open().unwrap());
    let before = std::fs::read(elsewhere.join("db")).unwrap();
    let elsewhere_text = elsewhere.display().to_string();
    let broken = with(&set(&[("store.path", &elsewhere_text)]), &["--pre"]);
    expect(&harness, "store_unusable", "store.path", &broken, &pre).await;
    assert_eq!(std::fs::read(elsewhere.join("db")).unwrap(), before, "the doctor changes nothing");

    let token = harness.sandbox.grant().refresh_token;
    let both = format!("store.fernet_keys={OTHER_KEY},{FERNET_KEY}");
    let imported = run(&harness, &["users", "import", "--user", "two", "--offline", "--set", &both], &token).await;
    assert_eq!(imported.code, DONE, "{}", imported.err);
    let pre_with = |keys: &str| with(&set(&[("store.fernet_keys", keys)]), &["--pre"]);
    let cured = pre_with(&format!("{OTHER_KEY},{FERNET_KEY}"));
    expect(&harness, "store_records_unreadable", "store.fernet_keys", &pre_with(OTHER_KEY), &cured).await;

    let mut held = Harness::with_running_clock("").await;
    held.log_in("default").await;
    let elsewhere = set(&[("proxy.listen", "127.0.0.1:1")]);
    let found = diagnose(&held, &elsewhere, &[]).await;
    assert_named(&found, "store_held", "doctor --config");
    held.stop_sidecar().await;
    assert!(diagnose(&held, &elsewhere, &[]).await.find("store_held").is_none());
}

/// A listener that accepts connections and sends `answer` to each.
async fn stub(answer: &'static str) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            if answer.is_empty() {
                open.push(stream);
                continue;
            }
            tokio::spawn(async move {
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_on_the_way_to_amazon_is_named() {
    let harness = stopped().await;
    let none: &[String] = &[];
    let healthy = diagnose(&harness, none, &[]).await;
    assert_eq!((healthy.code, healthy.wrong()), (DONE, vec!["not_running"]), "{}", healthy.document);
    let silent = format!("https://{}", stub("").await);
    let untrusted = changed(&harness, "untrusted.toml", |text| {
        let (before, upstream) = text.split_once("[upstream]").unwrap();
        let upstream: String =
            upstream.lines().filter(|line| !line.starts_with("ca_file")).map(|line| format!("{line}\n")).collect();
        format!("{before}[upstream]{upstream}")
    });
    let fresh = harness.directory.path().join("fresh").display().to_string();
    for (code, cure, broken) in [
        (
            "dns",
            "getent hosts no-such-host.invalid",
            set(&[("amazon.token_url", "https://no-such-host.invalid/auth/o2/token")]),
        ),
        ("unreachable", "upstream.eu", set(&[("upstream.eu", "https://127.0.0.1:1")])),
        ("connect_timeout", "upstream.fe", set(&[("upstream.fe", &silent)])),
        ("tls", "upstream.ca_file", untrusted),
        ("mcp_unreachable", "upstream.mcp_eu", set(&[("upstream.mcp_eu", "https://127.0.0.1:1")])),
        ("outgoing_proxy", "upstream.proxy", set(&[("upstream.proxy", "http://127.0.0.1:1")])),
        ("outgoing_proxy", "amazon.proxy", set(&[("amazon.proxy", "socks5://127.0.0.1:1")])),
        ("invalid_client", "amazon.client_secret", set(&[("amazon.client_secret", "amzn1.oa2-cs.v1.wrong")])),
        (
            "redirect_uri_refused",
            "Allowed Return URLs",
            set(&[("amazon.redirect_uri", "http://localhost:9/api/auth/amazon/callback")]),
        ),
        ("nobody_logged_in", "adsidecar login", set(&[("store.path", &fresh)])),
    ] {
        expect(&harness, code, cure, &broken, none).await;
    }
    harness.advance(120);
    assert_named(&diagnose(&harness, none, &[]).await, "clock_skew", "timedatectl");
    harness.advance(600);
    assert_named(&diagnose(&harness, none, &[]).await, "clock_wrong", "timedatectl");
    harness.advance(-720);
    let cured = diagnose(&harness, none, &[]).await;
    assert!(cured.find("clock_skew").is_none() && cured.find("clock_wrong").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_amazon_answers_to_the_grants_is_named() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    std::fs::set_permissions(harness.config_file(), PermissionsExt::from_mode(0o600)).unwrap();
    let (proxy, admin) = (harness.proxy_address().to_string(), harness.admin_address().to_string());
    let beside = set(&[("proxy.listen", &proxy), ("admin.listen", &admin)]);
    let healthy = diagnose(&harness, &beside, &[]).await;
    // The redirect URI names a port of the sandbox's, not the harness's.
    assert_eq!((healthy.code, healthy.wrong()), (DONE, vec!["config_doubtful"]), "{}", healthy.document);
    let at =
        |listener: Listener, status: u16| Rule::from(Fault::status(status)).at(listener).on("/v2/profiles").always();
    for (code, cure, fault) in [
        ("region_unauthorized", "--again", at(Listener::Eu, 401)),
        ("region_forbidden", "apply for access", at(Listener::Fe, 403)),
        ("region_throttled", "adsidecar doctor", at(Listener::Na, 429)),
        ("region_failed", "adsidecar doctor", at(Listener::Na, 500)),
        ("lwa_unavailable", "adsidecar status", Rule::from(Fault::status(503)).at(Listener::Lwa).on("/auth/").always()),
        ("refresh_failed", "adsidecar status", Rule::from(Fault::status(503)).at(Listener::Lwa).on("/auth/").always()),
    ] {
        harness.sandbox.set_fault(fault);
        assert_named(&diagnose(&harness, &beside, &[]).await, code, cure);
        harness.sandbox.clear_faults();
        // After a failure the sidecar backs off for a moment.
        crate::harness::eventually(code, async || {
            let refreshed = harness.post("/api/auth/amazon/refresh?user_id=default").await;
            refreshed.status().is_success().then_some(())
        })
        .await;
        let cured = diagnose(&harness, &beside, &[]).await;
        assert!(cured.find(code).is_none(), "{code}: {:?}", cured.wrong());
    }
    let profiles = harness.sandbox.world(|world| std::mem::take(&mut world.catalogue.profiles));
    assert_named(&diagnose(&harness, &beside, &[]).await, "profiles_none", "adsidecar login --user default --replace");
    harness.sandbox.world(|world| world.catalogue.profiles = profiles);
    assert!(diagnose(&harness, &beside, &[]).await.find("profiles_none").is_none());

    harness.sandbox.world(|world| world.revoke_all());
    assert_named(&diagnose(&harness, &beside, &[]).await, "login_required", "adsidecar login --user default");
    harness.log_in("default").await;
    assert_eq!(diagnose(&harness, &beside, &[]).await.wrong(), ["config_doubtful"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_that_do_not_fit_their_profiles_are_named() {
    let harness = stopped().await;
    let (eu, agency) = harness.sandbox.world(|world| {
        let eu = world.catalogue.profiles.iter().find(|one| one.region == Listener::Eu).unwrap().id;
        let template = world.catalogue.profiles[0].clone();
        world.catalogue.profiles.push(Profile { id: 4_711, kind: "agency", ..template });
        (eu.to_string(), "4711".to_owned())
    });
    let account = |text: String| {
        changed(&harness, "account.toml", move |base| format!("{base}\n[[account]]\nname = \"shop\"\n{text}\n"))
    };
    for (code, cure, broken, cured) in [
        (
            "account_profile_unknown",
            "adsidecar accounts list",
            "profile_id = \"1\"".to_owned(),
            format!("region = \"eu\"\nprofile_id = \"{eu}\""),
        ),
        (
            "account_region",
            "region = \"eu\"",
            format!("region = \"na\"\nprofile_id = \"{eu}\""),
            format!("region = \"eu\"\nprofile_id = \"{eu}\""),
        ),
        (
            "account_agency",
            "adsidecar accounts list",
            format!("profile_id = \"{agency}\""),
            format!("region = \"eu\"\nprofile_id = \"{eu}\""),
        ),
        (
            "account_user",
            "adsidecar login --user anna",
            "user = \"anna\"\nprofile_id = \"1\"".to_owned(),
            format!("region = \"eu\"\nprofile_id = \"{eu}\""),
        ),
    ] {
        let broken = account(broken);
        let found = diagnose(&harness, &broken, &[]).await;
        assert_named(&found, code, cure);
        let cured = diagnose(&harness, &account(cured), &[]).await;
        assert!(cured.find(code).is_none(), "{code}: {:?}", cured.wrong());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_of_a_user_whose_grant_was_not_tried_is_not_blamed_on_the_user() {
    let mut harness = Harness::with_running_clock("").await;
    for number in 10..31 {
        harness.log_in(&format!("user-{number}")).await;
    }
    harness.stop_sidecar().await;
    let account = |base| format!("{base}\n[[account]]\nname = \"shop\"\nuser = \"user-30\"\nprofile_id = \"1\"\n");
    let found = diagnose(&harness, &changed(&harness, "account.toml", account), &[]).await;
    assert!(found.find("account_user").is_none(), "{:?}", found.wrong());
    let accounts = found.checks().find(|check| check["group"] == "accounts" || check["code"] == "accounts").unwrap();
    assert!(accounts["cause"].as_str().unwrap().contains("1 of them not compared"), "{accounts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_callers_and_the_running_sidecar_is_named() {
    let token = "one-token-of-enough-length";
    let harness =
        Harness::with_running_clock(&format!("[proxy]\nlisten = \"127.0.0.1:0\"\ncaller_token = \"{token}\"\n")).await;
    harness.log_in_with(token).await;
    std::fs::set_permissions(harness.config_file(), PermissionsExt::from_mode(0o600)).unwrap();
    let (proxy, admin) = (harness.proxy_address().to_string(), harness.admin_address().to_string());
    let beside = set(&[("proxy.listen", &proxy), ("admin.listen", &admin)]);
    let with_set = |pairs: &[(&str, &str)]| [beside.clone(), set(pairs)].concat();
    expect(
        &harness,
        "caller_token_refused",
        "proxy.caller_token",
        &with_set(&[("proxy.caller_token", "another-token-of-enough-length")]),
        &beside,
    )
    .await;
    let other = stub("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi").await;
    expect(
        &harness,
        "port_taken",
        "proxy.listen",
        &set(&[("proxy.listen", &other), ("admin.listen", &admin)]),
        &beside,
    )
    .await;
    let unready =
        stub("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 9\r\nConnection: close\r\n\r\nstarting\n").await;
    expect(
        &harness,
        "not_ready",
        "adsidecar health --ready",
        &set(&[("proxy.listen", &proxy), ("admin.listen", &unready)]),
        &beside,
    )
    .await;
    let nobody = set(&[("proxy.listen", "127.0.0.1:1"), ("admin.listen", &admin)]);
    expect(&harness, "not_running", "adsidecar serve", &nobody, &beside).await;

    let at = format!("http://{proxy}");
    let by_url =
        diagnose(&harness, &with(&set(&[("admin.listen", &admin)]), &["--url", &at, "--wait", "5s"]), &[]).await;
    assert_eq!((by_url.code, by_url.wrong()), (DONE, vec![]), "{}", by_url.document);
    assert_eq!(bare_with(&["doctor", "--url", "https://x"], &[]).await.code, USAGE);
    assert_eq!(bare_with(&["doctor", "--fail-on", "sometimes"], &[]).await.code, USAGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn text_and_json_agree_warnings_can_fail_and_a_report_can_be_anonymous() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("anna@example.com").await;
    harness.stop_sidecar().await;
    std::fs::set_permissions(harness.config_file(), PermissionsExt::from_mode(0o600)).unwrap();
    let text = run(&harness, &["doctor"], "").await;
    assert_eq!(text.code, DONE, "{}{}", text.out, text.err);
    let titles = [
        "configuration",
        "secrets",
        "clock",
        "store",
        "network",
        "Login with Amazon",
        "regions",
        "profiles",
        "accounts",
        "callers",
        "Kubernetes",
    ];
    let printed: Vec<_> = text.out.lines().filter(|line| !line.starts_with(' ')).collect();
    assert_eq!(printed, titles, "the order of the groups is fixed");
    assert!(text.out.contains("anna@example.com: a new token came"), "proved by use: {}", text.out);
    let strict = run(&harness, &["doctor", "--fail-on", "warn", "--json"], "").await;
    assert_eq!(strict.code, FAILED, "not_running is a warning: {}", strict.out);
    assert_eq!(serde_json::from_str::<Value>(&strict.out).unwrap()["exit_code"], FAILED);

    let report = run(&harness, &["doctor", "--anonymize", "--set", "upstream.eu=https://127.0.0.1:1"], "").await;
    assert_eq!(report.code, FAILED, "{}", report.out);
    let path = harness.directory.path().display().to_string();
    for name in ["anna", "example.com", &path, "127.0.0.1"] {
        assert!(!report.out.contains(name), "{name} in {}", report.out);
    }
    assert!(report.out.contains("unreachable: the Ads API of eu"), "{}", report.out);
    let broken = ["doctor", "--set", "refresh.margin=soon"];
    let (text, json) =
        (run(&harness, &broken, "").await, run(&harness, &[&broken[..], &["--json"]].concat(), "").await);
    assert_eq!((text.code, json.code), (CONFIG, CONFIG));
    assert!(text.out.contains("skipped  the configuration cannot be used"), "{}", text.out);
}
