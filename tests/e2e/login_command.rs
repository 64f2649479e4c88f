//! `adsidecar login`: through a running sidecar and without one, by the browser's return and by a paste.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use reqwest::Method;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use world::{Listener, Rule};

use crate::commands::{DONE, FAILED, command, run};
use crate::harness::{Harness, eventually, json, unused_address};

const OTHER: &str = "amzn1.account.SANDBOXBOOKS";
const USAGE: i32 = 64;

/// A login that runs.
struct Running {
    child: Child,
    /// What it has written: standard output and standard error, as they came.
    text: Arc<Mutex<String>>,
    auth_url: String,
}

impl Running {
    /// Starts it, and returns once it shows the URL of the consent page.
    async fn start(harness: &Harness, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let file = harness.config_file();
        let mut login = command(&[&["login", "--config", file.to_str().unwrap()], arguments].concat());
        login.envs(variables.iter().copied());
        let child = login.spawn().unwrap();
        Self::of(child).await
    }

    async fn of(mut child: Child) -> Self {
        let text = Arc::<Mutex<String>>::default();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            collect(output, text.clone());
        }
        let auth_url = shown_url(&text).await;
        Self { child, text, auth_url }
    }

    fn paste(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    async fn says(&self, wanted: &str) {
        eventually(wanted, async || self.text.lock().unwrap().contains(wanted).then_some(())).await;
    }

    /// The exit code, and all that it wrote.
    async fn ended(mut self) -> (i32, String) {
        let status = tokio::task::spawn_blocking(move || (self.child.wait().unwrap(), self.text)).await.unwrap();
        let (status, text) = status;
        // The collecting threads have the last bytes soon after the exit.
        eventually("the end of its output", async || (Arc::strong_count(&text) == 1).then_some(())).await;
        let text = text.lock().unwrap().clone();
        (status.code().unwrap(), text)
    }
}

fn collect(mut output: impl Read + Send + 'static, text: Arc<Mutex<String>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            text.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    });
}

async fn shown_url(text: &Arc<Mutex<String>>) -> String {
    eventually("the URL of the consent page", async || {
        let text = text.lock().unwrap().clone();
        let line = text.lines().find(|line| line.trim_start().starts_with("https://"))?;
        text.contains("waiting for the consent").then(|| line.trim().to_owned())
    })
    .await
}

/// Arguments with which a command reaches the sidecar of the harness.
fn beside(harness: &Harness) -> [String; 2] {
    [format!("proxy.listen={}", harness.proxy_address()), format!("admin.listen={}", harness.admin_address())]
}

/// The redirect URL as a browser shows it after the consent.
fn returned(callback: &str) -> String {
    format!("http://localhost:8001{callback}")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_browsers_return_to_a_running_sidecar_ends_a_login_that_was_proved_by_use() {
    let harness = Harness::with_running_clock("").await;
    let sets = beside(&harness);
    let arguments = ["--user", "anna", "--no-browser", "--set", &sets[0], "--set", &sets[1]];
    let login = Running::start(&harness, &arguments, &[]).await;
    let callback = harness.consent(&login.auth_url).await;
    assert_eq!(harness.get(&callback).await.status(), 200);
    let (code, text) = login.ended().await;
    assert_eq!(code, DONE, "{text}");
    for wanted in
        ["anna is logged in\n", "na  2 profiles: Meadow Tools", "eu  2 profiles", "fe  2 profiles", "365 days"]
    {
        assert!(text.contains(wanted) || wanted == "365 days" && text.contains("364 days"), "{wanted} in {text}");
    }
    assert!(!text.contains("Atz"), "{text}");
    assert_eq!(harness.status_of("anna").await["state"], "fresh");
    let used = harness.ads_calls();
    assert_eq!(used.iter().filter(|call| call.path() == "/v2/profiles").count(), 3, "the token was used: {used:?}");

    let exchanges = harness.sandbox.lwa_calls();
    let again = Running::start_without_url(&harness, &arguments).await;
    assert_eq!(again.0, DONE, "{}", again.1);
    assert!(again.1.contains("anna is logged in already; nothing was changed"), "{}", again.1);
    assert_eq!(harness.sandbox.lwa_calls().exchanges, exchanges.exchanges, "a second run is a no-op");
}

impl Running {
    /// Runs a login that asks for nothing.
    async fn start_without_url(harness: &Harness, arguments: &[&str]) -> (i32, String) {
        let ran = run(harness, &[&["login"], arguments].concat(), "").await;
        (ran.code, ran.out + &ran.err)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_sidecar_the_command_takes_the_callback_itself_and_stores_the_grant() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let port = unused_address().port();
    let redirect_uri = format!("http://localhost:{port}/api/auth/amazon/callback");
    harness.sandbox.world(|world| world.clients[0].return_urls.push(redirect_uri));
    let port_text = port.to_string();
    let arguments = ["--no-browser", "--port", &port_text, "--set", "accounts.sync=daily"];
    let login = Running::start(&harness, &arguments, &[]).await;
    let callback = harness.consent(&login.auth_url).await;
    let page = harness.client.get(format!("http://localhost:{port}{callback}")).send().await.unwrap();
    assert_eq!(page.status(), 200);
    let (code, text) = login.ended().await;
    assert_eq!(code, DONE, "{text}");
    assert!(text.contains("default is logged in\n") && text.contains("na  2 profiles"), "{text}");
    assert!(text.contains("7 accounts have names now"), "{text}");
    let named = run(&harness, &["accounts", "show", "meadow-tools-de"], "").await;
    assert_eq!(named.code, DONE, "{}", named.err);

    let listed = run(&harness, &["users", "list"], "").await;
    assert!(listed.out.contains("\ndefault ") && listed.out.contains("fresh"), "{}{}", listed.out, listed.err);
    let again = run(&harness, &["login"], "").await;
    assert_eq!(again.code, DONE, "{}", again.err);
    assert!(again.out.contains("logged in already"), "{}", again.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pasted_url_a_query_and_a_bare_code_end_a_headless_login() {
    let mut harness = Harness::with_running_clock("").await;
    harness.stop_sidecar().await;
    let redirect_uri = "https://app.example.com/api/auth/amazon/callback";
    harness.sandbox.world(|world| world.clients[0].return_urls.push(redirect_uri.to_owned()));
    let set = format!("amazon.redirect_uri={redirect_uri}");
    for (user, form) in [("url", 0), ("query", 1), ("code", 2)] {
        let mut login = Running::start(&harness, &["--user", user, "--set", &set], &[]).await;
        let callback = harness.consent(&login.auth_url).await;
        let query = callback.split_once('?').unwrap().1.to_owned();
        let code =
            url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "code").unwrap().1.into_owned();
        let paste = match form {
            0 => format!("{redirect_uri}?{query}"),
            1 => query,
            _ => code.clone(),
        };
        login.paste(&paste);
        let (status, text) = login.ended().await;
        assert_eq!(status, DONE, "{user}: {text}");
        assert!(text.contains(&format!("{user} is logged in\n")), "{text}");
        assert!(!text.contains(&code), "the code is not repeated: {text}");
    }
    assert_eq!(run(&harness, &["users", "list"], "").await.out.lines().count(), 4, "a header and three users");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_another_login_is_refused_and_the_right_one_still_accepted() {
    let harness = Harness::with_running_clock("").await;
    let sets = beside(&harness);
    let arguments = ["--set", &sets[0], "--set", &sets[1]];
    let mut login = Running::start(&harness, &arguments, &[]).await;
    let foreign = returned(&format!("/api/auth/amazon/callback?code=canary&state={}", "x".repeat(43)));
    login.paste(&foreign);
    login.says("its state differs").await;
    assert_eq!(harness.status_of("default").await["state"], "none");
    let callback = harness.consent(&login.auth_url).await;
    login.paste(&returned(&callback));
    let (code, text) = login.ended().await;
    assert_eq!(code, DONE, "{text}");
    assert!(!text.contains("canary"), "{text}");

    let mut ends = Running::start(&harness, &[&arguments[..], &["--again"]].concat(), &[]).await;
    ends.paste(&foreign);
    ends.close_stdin();
    let (code, text) = ends.ended().await;
    assert_eq!(code, FAILED, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_consent_ends_the_command_whether_the_browser_returns_or_the_url_is_pasted() {
    let harness = Harness::with_running_clock("").await;
    let sets = beside(&harness);
    for pasted in [false, true] {
        let mut login = Running::start(&harness, &["--set", &sets[0], "--set", &sets[1]], &[]).await;
        let callback = harness.consent(&format!("{}&decision=deny", login.auth_url)).await;
        match pasted {
            true => login.paste(&returned(&callback)),
            false => drop(harness.get(&callback).await),
        }
        let (code, text) = login.ended().await;
        assert_eq!(code, FAILED, "{text}");
        assert!(text.contains("the consent was refused at Amazon; nothing was changed"), "{text}");
    }
    assert_eq!(harness.status_of("default").await["state"], "none");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_identity_replaces_nothing_unless_the_command_says_so() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    let before = harness.status_of("default").await;
    let sets = beside(&harness);
    for (more, replaced) in [("--again", false), ("--replace", true)] {
        let login = Running::start(&harness, &[more, "--set", &sets[0], "--set", &sets[1]], &[]).await;
        let callback = harness.consent(&format!("{}&advertiser={OTHER}", login.auth_url)).await;
        harness.get(&callback).await;
        let (code, text) = login.ended().await;
        if replaced {
            assert_eq!(code, DONE, "{text}");
            assert!(text.contains("Harbour Books"), "{text}");
        } else {
            assert_eq!(code, FAILED, "{text}");
            assert!(text.contains("is not the Amazon identity") && text.contains("--replace"), "{text}");
            assert_eq!(harness.status_of("default").await["consented_at"], before["consented_at"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_ssh_and_in_a_pod_the_way_of_a_browser_to_the_port_is_printed() {
    let harness = Harness::with_running_clock("").await;
    let sets = beside(&harness);
    let arguments = ["--set", &sets[0], "--set", &sets[1], "--timeout", "1s"];
    let ssh = [("SSH_CONNECTION", "10.0.0.9 51000 10.0.0.5 22"), ("USER", "anna"), ("DISPLAY", ":10")];
    let (code, text) = Running::start(&harness, &arguments, &ssh).await.ended().await;
    assert_eq!(code, FAILED);
    assert!(text.contains("ssh -N -L 8001:localhost:8001 anna@10.0.0.5"), "{text}");
    assert!(text.contains("nobody consented within 1s") && text.contains("--timeout"), "{text}");
    let pod = [("KUBERNETES_SERVICE_HOST", "10.0.0.1"), ("HOSTNAME", "app-7d9")];
    let (_, text) = Running::start(&harness, &arguments, &pod).await.ended().await;
    assert!(text.contains("kubectl port-forward pod/app-7d9 8001:8001"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_desktop_the_browser_is_opened_with_the_consent_page() {
    let harness = Harness::with_running_clock("").await;
    let sets = beside(&harness);
    let (script, opened) = (harness.directory.path().join("browser"), harness.directory.path().join("opened"));
    std::fs::write(&script, format!("#!/bin/sh\necho \"$1\" > {}\n", opened.display())).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let variables = [("BROWSER", script.to_str().unwrap()), ("PATH", "/usr/bin:/bin")];
    let arguments = ["--set", &sets[0], "--set", &sets[1]];
    let login = Running::start(&harness, &arguments, &variables).await;
    let url = eventually("the browser", async || {
        std::fs::read_to_string(&opened).ok().filter(|text| text.ends_with('\n')).map(|text| text.trim().to_owned())
    })
    .await;
    assert_eq!(url, login.auth_url);
    harness.get(&harness.consent(&url).await).await;
    let (code, text) = login.ended().await;
    assert_eq!(code, DONE, "{text}");

    std::fs::remove_file(&opened).unwrap();
    let arguments = [&arguments[..], &["--again", "--no-browser", "--timeout", "1s"]].concat();
    Running::start(&harness, &arguments, &variables).await.ended().await;
    assert!(!opened.exists(), "--no-browser opens none");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_needs_confirmation_is_confirmed_by_the_paste_alone() {
    let more = "[login]\nlisten = \"127.0.0.1:0\"\nfrontend_url = \"https://app.example.com/\"\n";
    let harness = Harness::with_running_clock(more).await;
    let sets = beside(&harness);
    let arguments = ["--set", &sets[0], "--set", &sets[1], "--timeout", "2s"];
    let login = Running::start(&harness, &arguments, &[]).await;
    let callback = harness.consent(&login.auth_url).await;
    let to_frontend = harness.get(&callback).await.headers()["location"].to_str().unwrap().to_owned();
    assert!(to_frontend.contains("status=pending"), "{to_frontend}");
    let (code, text) = login.ended().await;
    assert_eq!(code, FAILED, "a browser's return alone is not enough: {text}");

    let mut login = Running::start(&harness, &arguments, &[]).await;
    let callback = harness.consent(&login.auth_url).await;
    let to_frontend = harness.get(&callback).await.headers()["location"].to_str().unwrap().to_owned();
    login.paste(&to_frontend);
    let (code, text) = login.ended().await;
    assert_eq!(code, DONE, "{text}");
    assert_eq!(harness.status_of("default").await["state"], "fresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn success_is_reported_only_if_the_token_works() {
    let harness = Harness::with_running_clock("").await;
    let sets = beside(&harness);
    for listener in [Listener::Na, Listener::Eu, Listener::Fe] {
        harness.sandbox.set_fault(Rule::from(world::Fault::status(403)).at(listener).on("/v2/profiles").always());
    }
    let login = Running::start(&harness, &["--set", &sets[0], "--set", &sets[1]], &[]).await;
    harness.get(&harness.consent(&login.auth_url).await).await;
    let (code, text) = login.ended().await;
    assert_eq!(code, FAILED, "{text}");
    assert!(text.contains("no region accepted a request with it") && text.contains("eu: 403"), "{text}");
    harness.sandbox.clear_faults();
    let (port, mut arguments) = (unused_address().port().to_string(), vec!["login", "--port"]);
    arguments.extend([port.as_str(), "--set", &sets[0], "--set", &sets[1]]);
    let refused = run(&harness, &arguments, "").await;
    assert_eq!(refused.code, USAGE, "a running sidecar has its port: {}", refused.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_the_remaining_time_is_shown_and_a_paste_is_read() {
    let harness = Harness::with_running_clock("").await;
    let sets = beside(&harness);
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let side = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let stdio = || Stdio::from(OwnedFd::from(side.try_clone().unwrap()));
    let file = harness.config_file();
    let arguments = ["login", "--config", file.to_str().unwrap(), "--set", &sets[0], "--set", &sets[1]];
    let mut child = command(&arguments).stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
    drop(side);
    let text = Arc::<Mutex<String>>::default();
    let mut keyboard = File::from(terminal);
    collect(keyboard.try_clone().unwrap(), text.clone());
    let auth_url = shown_url(&text).await;
    let callback = harness.consent(&auth_url).await;
    writeln!(keyboard, "{}", returned(&callback)).unwrap();
    eventually("the end", async || text.lock().unwrap().contains("default is logged in").then_some(())).await;
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(status.code(), Some(DONE));
    let text = text.lock().unwrap().clone();
    assert!(text.contains("\r\u{1b}[Kwaiting for the consent, 9:"), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn how_a_login_stands_is_told_to_whoever_knows_its_state() {
    let harness = Harness::start().await;
    let begun = json(harness.get("/api/auth/amazon/login").await).await;
    let state = begun["state"].as_str().unwrap();
    let stands = async |state: &str| json(harness.get(&format!("/api/auth/amazon/status?state={state}")).await).await;
    assert_eq!(stands(state).await["login"], "waiting");
    assert_eq!(stands("unknown").await["login"], "unknown");
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    harness.get(&callback).await;
    assert_eq!(stands(state).await, serde_json::json!({ "login": "success", "error": null }), "no user is named");
    let both = harness.request(Method::GET, &format!("/api/auth/amazon/status?state={state}&user_id=a"));
    assert_eq!(both.send().await.unwrap().status(), 400);
}
