//! What a person reads first: the greeting at a terminal, `--help`, and log lines that say what to do.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;
use world::{Fault, Listener, Rule};

use crate::commands::{BINARY, Ran, Serving, bare_with, command, stopped};
use crate::harness::Harness;

/// Starts the sidecar at a terminal, as `script` (bsdutils) makes one. Its output has the addresses of the listeners.
fn at_a_terminal(harness: &Harness, arguments: &str, no_color: &str) -> Serving {
    let file = harness.config_file().display().to_string();
    let mut script = Command::new("script");
    script.args([
        "-q",
        "-f",
        "-e",
        "-c",
        &format!("exec timeout --foreground 60 {} serve --config {file} {arguments}", *BINARY),
        "/dev/null",
    ]);
    script.env_clear().env("PATH", "/usr/bin:/bin").env("NO_COLOR", no_color).env("TERM", "xterm");
    // What is written to the terminal arrives at the standard output of `script`.
    let (reader, writer) = std::io::pipe().unwrap();
    script.stdin(Stdio::piped()).stdout(writer.try_clone().unwrap()).stderr(writer);
    let child = script.spawn().expect("script is installed: apt-get install bsdutils");
    Serving::reading(child, reader, String::new(), String::new())
}

async fn stopped_by_control_c(mut serving: Serving) -> Option<i32> {
    serving.child.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    serving.ended().await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_told_where_to_send_requests_who_is_logged_in_and_where_to_log_in() {
    let harness = stopped().await;
    // Production logs JSON, but not to a person.
    let plain = at_a_terminal(&harness, "--set environment=production", "1");
    let address = plain.says("Send requests to").await;
    let base = address.trim().strip_prefix("Send requests to").unwrap().trim().to_owned();
    plain.says("Logged in         default (fresh)").await;
    plain.says(&format!("curl {base}/v2/profiles")).await;
    let page = plain.says("Status page").await;
    let page = page.trim().strip_prefix("Status page").unwrap().trim().to_owned();
    plain.says("Stop ").await;
    let said = plain.log.lock().unwrap().clone();
    assert!(!said.contains('\u{1b}'), "NO_COLOR: {said}");
    assert!(!said.contains("{\"timestamp\""), "the log is text: {said}");
    assert!(!said.contains("Log in  "), "nobody has to log in: {said}");
    // What it says works.
    let call = harness.client.get(format!("{base}/v2/profiles")).send().await.unwrap();
    assert_eq!(call.status(), 200);
    assert!(harness.client.get(page).send().await.unwrap().text().await.unwrap().contains("adsidecar"));
    assert_eq!(stopped_by_control_c(plain).await, Some(0), "it stops as it says");

    let empty = harness.directory.path().join("empty").display().to_string();
    let coloured = at_a_terminal(&harness, &format!("--set store.path={empty}"), "");
    coloured.says("nobody yet").await;
    let login = coloured.says("Log in").await;
    let url = login.trim_end().rsplit(' ').next().unwrap().replace("\u{1b}[0m", "");
    assert!(url.ends_with("/api/auth/amazon/login?user_id=default"), "{login}");
    assert!(coloured.says("serves").await.contains("\u{1b}[1;32m"), "a terminal gets colours");
    assert_eq!(harness.client.get(url).send().await.unwrap().status(), 200, "the login URL works");
    assert_eq!(stopped_by_control_c(coloured).await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_collector_gets_json_with_numbers_and_hints_and_no_greeting() {
    let harness = stopped().await;
    harness.sandbox.set_fault(Rule::from(Fault::Reset).at(Listener::Na).always());
    let file = harness.config_file();
    let arguments =
        ["serve", "--config", file.to_str().unwrap(), "--set", "log.format=json", "--set", "log.level=debug"];
    let serving = Serving::told(command(&arguments).spawn().unwrap(), String::new(), String::new());
    let line: Value = serde_json::from_str(&serving.says("\"serving\"").await).unwrap();
    let proxy = line["proxy"].as_str().unwrap().trim_matches(['[', ']']).to_owned();
    let call = async || harness.client.get(format!("http://{proxy}/v2/profiles")).send().await.unwrap().status();
    assert_eq!(call().await, 502);
    let failed: Value = serde_json::from_str(&serving.says("request failed").await).unwrap();
    assert_eq!(failed["status"], 502);
    assert!(failed["took_ms"].is_f64(), "{failed}");
    assert!(failed["hint"].as_str().unwrap().contains("check before you repeat"), "{failed}");

    harness.sandbox.clear_faults();
    let busy = Fault::Status { code: 429, headers: Vec::new(), body: "".into() };
    harness.sandbox.set_fault(Rule::from(busy).at(Listener::Na).next(1));
    assert_eq!(call().await, 429);
    let throttled: Value = serde_json::from_str(&serving.says("\"status\":429").await).unwrap();
    assert!(throttled["hint"].as_str().unwrap().contains("Retry-After"), "{throttled}");

    assert_eq!(call().await, 200);
    let served: Value = serde_json::from_str(&serving.says("\"status\":200").await).unwrap();
    assert!(served["took_ms"].is_f64(), "{served}");
    let log = serving.log.lock().unwrap();
    assert!(!log.contains("Send requests to") && !log.contains('\u{1b}'), "{log}");
}

/// Every path of a command that does something, such as `users list`.
fn leaves(group: &clap::Command, above: &[String], found: &mut Vec<Vec<String>>) {
    for command in group.get_subcommands() {
        let path = [above, &[command.get_name().to_owned()]].concat();
        if command.has_subcommands() { leaves(command, &path, found) } else { found.push(path) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_help_of_every_command_teaches_by_example() {
    let mut commands = vec![Vec::new()];
    leaves(&adsidecar::cli::command(), &[], &mut commands);
    assert!(commands.len() > 10, "{commands:?}");
    for path in commands {
        let arguments: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let Ran { code, out, .. } = bare_with(&arguments, &[]).await;
        assert_eq!(code, 0);
        for part in ["Examples:\n  ", "Exit codes:", "  64  the command line is wrong"] {
            assert!(out.contains(part), "{path:?} --help has no {part:?}: {out}");
        }
        assert!(out.lines().any(|line| line.contains(&format!("adsidecar {}", path.join(" ")))), "{path:?}: {out}");
        let configured = !["key new", "version", "completions"].contains(&path.join(" ").as_str());
        assert_eq!(out.contains("ADSIDECAR_SECTION__KEY") && out.contains("FERNET_KEY"), configured, "{out}");
    }
}
