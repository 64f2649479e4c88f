//! `adsidecar doctor`: what is wrong, whose fault it is, and what fixes it.
//!
//! The offline checks come first and need nothing. The online checks run in parallel, each with its own time limit, and
//! prove by use: through the running sidecar, or one inside the command. They change nothing but the tokens that they
//! refresh.

mod findings;
mod network;
mod offline;
mod online;

use std::collections::HashMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::future::join_all;
use http::Method;
use serde_json::{Value, json};
use url::Url;

use super::sidecar::Sidecar;
use super::{Exit, Failed, Output, block_on, client, print};
use crate::config::{Config, Sources};
use crate::domain::account::{AmazonHost, Context, Region};
use crate::server::Listen;
pub use findings::{CODES, Code, Group};
use findings::{Finding, Status};
use network::Target;

/// Interval between the questions of `--wait`.
const WAIT_POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// How to print it
    #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Output,
    /// The same as -o json
    #[arg(long)]
    json: bool,
    /// Only what can be checked before a first start: no network, no sidecar
    #[arg(long)]
    pre: bool,
    /// The sidecar to ask, such as http://127.0.0.1:8001, in place of proxy.listen
    #[arg(long)]
    url: Option<Url>,
    /// Wait this long for the sidecar to be ready first
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
    /// Fail on warnings too
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t)]
    fail_on: FailOn,
    /// Replace names, ids, hosts and paths, for an issue report
    #[arg(long)]
    anonymize: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum FailOn {
    /// Failed checks alone
    #[default]
    Fail,
    /// Warnings too
    Warn,
}

/// Checks everything and prints it.
pub(super) fn run(command: &Doctor, sources: &Sources) -> Result<(), Failed> {
    let url = command.url.as_ref().map(listen_of).transpose()?;
    let Examined { mut findings, names } = block_on(examine(command, sources, url))??;
    findings.sort_by_key(|finding| finding.group);
    fill_gaps(&mut findings, command.pre);
    if command.anonymize {
        Anonymizer::new(names).anonymize(&mut findings);
    }
    let exit = exit_of(&findings, command.fail_on);
    if command.output == Output::Json || command.json {
        print(serde_json::to_string_pretty(&document(&findings, exit)).map_err(Failed::because)? + "\n")?;
    } else {
        print(text(&findings))?;
    }
    let wrong = findings.iter().filter(|finding| matches!(finding.status, Status::Fail | Status::Warn)).count();
    match exit {
        Exit::Done => Ok(()),
        exit => Err(Failed { exit, message: format!("{wrong} check(s) found something; each names its cure") }),
    }
}

/// The address in `--url`.
fn listen_of(url: &Url) -> Result<Listen, Failed> {
    let usage = |message: &str| Failed { exit: Exit::Usage, message: message.to_owned() };
    if url.scheme() != "http" {
        return Err(usage("--url takes http://HOST:PORT: the listeners of adsidecar speak no TLS"));
    }
    let host = url.host_str().ok_or_else(|| usage("--url takes http://HOST:PORT"))?;
    let more = url.path() != "/" || url.query().or(url.fragment()).is_some() || !url.username().is_empty();
    if more || url.password().is_some() {
        return Err(usage(
            "--url takes http://HOST:PORT and nothing more: the doctor knows its paths, and asks no user",
        ));
    }
    Ok(Listen::Tcp(format!("{host}:{}", url.port_or_known_default().unwrap_or(80))))
}

/// What was found, and the names that stand in it.
struct Examined {
    findings: Vec<Finding>,
    names: Vec<String>,
}

async fn examine(command: &Doctor, sources: &Sources, url: Option<Listen>) -> Result<Examined, Failed> {
    let mut findings = Vec::new();
    let Some(mut config) = offline::configuration(sources, &mut findings) else {
        return Ok(Examined { findings, names: Vec::new() });
    };
    let mut names = names_of(&config);
    if let Some(listen) = url {
        config.proxy_listen = vec![listen];
    }
    offline::secrets(sources, &config, &mut findings);
    offline::account_ids(&config, &mut findings);
    offline::callers(&config, &mut findings);
    offline::kubernetes(&config, &mut findings);
    if command.pre {
        offline::store(&config, false, &mut findings).await;
        return Ok(Examined { findings, names });
    }
    if let Some(timeout) = command.wait {
        wait_until_ready(&config, timeout).await;
    }
    let running = running(&config, &mut findings).await;
    offline::store(&config, running.is_some(), &mut findings).await;
    if running.is_some() {
        readiness(&config, &mut findings).await;
    }
    let (reached, credentials, redirect_uri) =
        tokio::join!(hosts(&config), online::credentials(&config), online::redirect_uri(&config));
    findings.extend(reached);
    findings.extend([credentials, redirect_uri]);
    let store_works = !findings.iter().any(|one| one.group == Group::Store && one.status == Status::Fail);
    let sidecar = match running {
        Some(sidecar) => Ok(sidecar),
        None if !store_works => Err("the store cannot be opened".to_owned()),
        None => Box::pin(Sidecar::own(config.clone(), Listen::Tcp("127.0.0.1:0".into())))
            .await
            .map_err(|failed| failed.to_string()),
    };
    match sidecar {
        Ok(sidecar) => {
            names.extend(online::by_use(&config, &sidecar, &mut findings).await);
            sidecar.close().await?;
        }
        Err(why) => findings.push(Finding::skipped(Group::LoginWithAmazon, "grants", why)),
    }
    Ok(Examined { findings, names })
}

/// The running sidecar, if it answers.
async fn running(config: &Config, findings: &mut Vec<Finding>) -> Option<Sidecar> {
    match Sidecar::running(config).await {
        Ok(Some(sidecar)) => {
            findings.push(Finding::ok(Group::Callers, "sidecar", "a sidecar runs and answers this caller"));
            Some(sidecar)
        }
        Ok(None) => {
            let at = config.proxy_listen.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            findings.push(Finding::wrong("not_running", format!("nothing listens at {at}"), "adsidecar serve"));
            None
        }
        Err(failed) => {
            let text = failed.to_string();
            findings.push(if text.contains("caller token") {
                Finding::wrong("caller_token_refused", text, "proxy.caller_token")
            } else {
                Finding::wrong("port_taken", text, "proxy.listen")
            });
            None
        }
    }
}

async fn readiness(config: &Config, findings: &mut Vec<Finding>) {
    if let Ok((status, body)) = client::request(&config.admin_listen, Method::GET, "/readyz", &[]).await
        && !status.is_success()
    {
        let cause = String::from_utf8_lossy(&body).trim_end().to_owned();
        findings.push(Finding::wrong("not_ready", cause, "adsidecar health --ready"));
    }
}

/// Waits until the sidecar is ready; whether it is, later checks tell.
async fn wait_until_ready(config: &Config, timeout: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < timeout {
        let ready = client::request(&config.admin_listen, Method::GET, "/readyz", &[]).await;
        let answers = client::listening(&config.proxy_listen).await.is_some();
        if answers && ready.map_or(true, |(status, _)| status.is_success()) {
            return;
        }
        tokio::time::sleep(WAIT_POLL).await;
    }
}

/// Every host of Amazon's, and the clock by what they say.
async fn hosts(config: &Config) -> Vec<Finding> {
    let token_url = config.lwa.token_url.clone().or_else(|| config.lwa.region.token_url().parse().ok());
    let lwa = token_url.iter().map(|url| Target {
        name: "Login with Amazon".to_owned(),
        url,
        roots: &config.lwa.extra_roots,
        proxy: config.lwa.proxy.as_ref(),
        key: "amazon.token_url".to_owned(),
    });
    let of_service = |service: &'static str, host: AmazonHost| Target {
        name: format!("{service} of {}", host.region),
        url: &config.upstream.origins[host.index()],
        roots: &config.upstream.extra_roots,
        proxy: config.upstream.proxy.as_ref(),
        key: host.key().to_owned(),
    };
    let ads = Region::ALL.into_iter().map(|region| of_service("the Ads API", AmazonHost::ads(region)));
    let mcp: Vec<_> = Region::ALL.map(|region| of_service("the MCP server", AmazonHost::mcp(region))).into();
    let targets: Vec<_> = lwa.chain(ads).collect();
    let (probed, mcp) =
        tokio::join!(join_all(targets.iter().map(network::probe)), join_all(mcp.iter().map(network::probe_mcp)));
    let probed: Vec<_> = probed.into_iter().chain(mcp).collect();
    let skews: Vec<_> = probed.iter().filter_map(|(_, skew)| *skew).collect();
    let mut findings: Vec<_> = probed.into_iter().map(|(finding, _)| finding).collect();
    findings.push(network::clock(&skews));
    findings
}

/// A group without findings says why it has none.
fn fill_gaps(findings: &mut Vec<Finding>, pre: bool) {
    let broken = findings.iter().any(|one| one.group <= Group::Secrets && one.status == Status::Fail);
    for group in Group::ALL {
        if findings.iter().any(|finding| finding.group == group) {
            continue;
        }
        findings.push(match group {
            Group::Callers | Group::Accounts if !broken => Finding::ok(group, "checked", "nothing is wrong"),
            _ if broken => Finding::skipped(group, "skipped", "the configuration cannot be used"),
            _ if pre => Finding::skipped(group, "skipped", "--pre checks nothing that needs the network or a sidecar"),
            _ => Finding::skipped(group, "skipped", "an earlier check failed"),
        });
    }
    findings.sort_by_key(|finding| finding.group);
}

fn exit_of(findings: &[Finding], fail_on: FailOn) -> Exit {
    let failed = |finding: &&Finding| {
        finding.status == Status::Fail || finding.status == Status::Warn && fail_on == FailOn::Warn
    };
    let of_configuration = |finding: &Finding| {
        finding.group <= Group::Secrets && finding.status == Status::Fail || finding.code == "store_key_wrong"
    };
    match findings.iter().find(failed) {
        None => Exit::Done,
        Some(_) if findings.iter().any(of_configuration) => Exit::Config,
        Some(_) => Exit::Failed,
    }
}

fn document(findings: &[Finding], exit: Exit) -> Value {
    let groups: Vec<_> = Group::ALL
        .into_iter()
        .map(|group| {
            let checks: Vec<_> = findings.iter().filter(|finding| finding.group == group).collect();
            json!({ "group": group, "checks": checks })
        })
        .collect();
    let count = |status: Status| findings.iter().filter(|finding| finding.status == status).count();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "exit_code": exit as u8,
        "failed": count(Status::Fail),
        "warnings": count(Status::Warn),
        "skipped": count(Status::Skipped),
        "groups": groups,
    })
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for group in Group::ALL {
        let _ = writeln!(text, "{}", group.title());
        for finding in findings.iter().filter(|finding| finding.group == group) {
            let mark = match finding.status {
                Status::Ok => "ok     ",
                Status::Warn => "warn   ",
                Status::Fail => "FAIL   ",
                Status::Skipped => "skipped",
            };
            let code = if finding.fault.is_some() { format!("{}: ", finding.code) } else { String::new() };
            let _ = writeln!(text, "  {mark}  {code}{}", finding.cause);
            if let (Some(fault), Some(cure)) = (finding.fault, &finding.cure) {
                let _ = writeln!(text, "           {fault}: {cure}");
            }
        }
    }
    text
}

/// Replaces what identifies somebody: each distinct name gets a number, so that a report stays readable.
#[derive(Default)]
struct Anonymizer {
    /// Names, ids, hosts and paths of this installation, the longest first.
    names: Vec<String>,
    given: HashMap<String, String>,
}

impl Anonymizer {
    fn new(mut names: Vec<String>) -> Self {
        // `default` says nothing about anybody.
        names.retain(|name| name.len() > 2 && name != "default");
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        Self { names, given: HashMap::new() }
    }

    fn anonymize(&mut self, findings: &mut [Finding]) {
        for finding in findings {
            finding.cause = self.text(&finding.cause);
            finding.cure = finding.cure.as_deref().map(|cure| self.text(cure));
        }
    }

    fn text(&mut self, text: &str) -> String {
        let mut text = text.to_owned();
        for name in self.names.clone() {
            if text.contains(&name) {
                text = text.replace(&name, &self.stand_in(&name));
            }
        }
        let words: Vec<_> = text.split(' ').map(|word| self.word(word)).collect();
        words.join(" ")
    }

    /// A word that looks like a path, a URL, an address or an id is replaced, whoever it belongs to.
    fn word(&mut self, word: &str) -> String {
        let core = word.trim_matches(|c: char| !c.is_alphanumeric() && c != '/' && c != '[');
        let digits = core.chars().filter(char::is_ascii_digit).count();
        let is_path = core.contains('/') && core.len() > 1;
        if is_path || core.contains('@') || digits >= 6 || core.parse::<std::net::IpAddr>().is_ok() {
            let stand_in = self.stand_in(core);
            return word.replacen(core, &stand_in, 1);
        }
        word.to_owned()
    }

    fn stand_in(&mut self, name: &str) -> String {
        let next = self.given.len() + 1;
        self.given.entry(name.to_owned()).or_insert_with(|| format!("<{next}>")).clone()
    }
}

/// What identifies this installation in the texts of findings.
fn names_of(config: &Config) -> Vec<String> {
    let mut names =
        vec![config.lwa.client_id.clone(), config.lwa.redirect_uri.clone(), config.store.path.display().to_string()];
    let own_hosts = config.upstream.origins.iter().chain(&config.lwa.token_url).chain(&config.lwa.authorize_url);
    names.extend(own_hosts.filter_map(Url::host_str).filter(|host| !host.ends_with(".amazon.com")).map(str::to_owned));
    for account in &config.proxy.accounts {
        names.push(account.name.to_string());
        names.push(account.user.to_string());
        let ids = Context::ALL.into_iter().filter_map(|context| account.ids.get(context)?.to_str().ok());
        names.extend(ids.map(str::to_owned));
    }
    names
}
