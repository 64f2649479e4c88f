//! `adsidecar login`: a person consents in a browser, here or elsewhere, and the command proves that the grant works.
//!
//! The browser's return to the callback and a pasted redirect URL race each other: whichever arrives first finishes the
//! login. All work is done by a sidecar, the running one or one inside this command.
//!
//! The file is a little over 400 lines: the command is one conversation, in the order in which a person has it.

mod browser;
mod pasted;

use std::io::{BufRead, IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use http::{Method, StatusCode};
use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::mpsc;
use url::Url;

use super::sidecar::{Reply, Sidecar, curl, encoded};
use super::{Exit, Failed, block_on, print};
use crate::auth::accounts::Automatic;
use crate::config::Config;
use crate::domain::account::{Region, UserId};
use crate::server::Listen;
use pasted::Pasted;

/// The path of the callback.
const CALLBACK: &str = "/api/auth/amazon/callback";
/// How often the sidecar is asked whether the browser has come back.
const POLL: Duration = Duration::from_millis(300);
/// How often the remaining time is told where no terminal shows it.
const REMIND: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct Login {
    /// The user who gets the grant, which you name: X-Ads-User of later requests
    #[arg(long, value_name = "ID", default_value = UserId::DEFAULT)]
    user: UserId,
    /// The region whose consent page is shown; amazon.region by default. The grant is good for all regions
    #[arg(long)]
    region: Option<Region>,
    /// Open no browser; print the URL
    #[arg(long)]
    no_browser: bool,
    /// Without a running sidecar: wait for the browser at this port of localhost, which has to be an Allowed Return URL
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Log in although the user is logged in, to begin a new consent of a year
    #[arg(long)]
    again: bool,
    /// Let the grant of another Amazon identity replace the user's grant
    #[arg(long)]
    replace: bool,
    /// Give up after this long; Amazon's consent page works for 10 minutes
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// Logs a user in.
pub(super) fn run(command: Login, config: Config) -> Result<(), Failed> {
    block_on(async {
        let sidecar = Box::pin(sidecar(&command, config.clone())).await?;
        let ended = log_in(&command, &config, &sidecar).await;
        let closed = sidecar.close().await;
        ended.and(closed)
    })?
}

/// The running sidecar, or one that listens where Amazon sends the browser.
async fn sidecar(command: &Login, mut config: Config) -> Result<Sidecar, Failed> {
    if let Some(running) = Sidecar::running(&config).await? {
        return match command.port {
            None => Ok(running),
            Some(_) => Err(Failed {
                exit: Exit::Usage,
                message: format!(
                    "a sidecar runs and takes the browser's return at {}: leave --port out, or stop it",
                    config.lwa.redirect_uri
                ),
            }),
        };
    }
    if let Some(port) = command.port {
        config.lwa.redirect_uri = format!("http://localhost:{port}{CALLBACK}");
    }
    match loopback_port(&config.lwa.redirect_uri) {
        Some(port) => {
            let own = Box::pin(Sidecar::own(config, Listen::Tcp(format!("127.0.0.1:{port}")))).await;
            own.map_err(|failed| match failed.message.contains("address is in use") {
                true => Failed::because(format!(
                    "another process has port {port} of localhost, to which Amazon sends the browser: stop it, or wait \
                     at another one with --port, whose URL http://localhost:PORT{CALLBACK} has to be an Allowed Return \
                     URL at Amazon"
                )),
                false => failed,
            })
        }
        None => Box::pin(Sidecar::own(config, Listen::Tcp("127.0.0.1:0".into()))).await,
    }
}

/// The port of a redirect URI on this machine. Only a paste can finish a login with another one.
fn loopback_port(redirect_uri: &str) -> Option<u16> {
    let url = Url::parse(redirect_uri).ok()?;
    let local = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")) && url.scheme() == "http";
    url.port_or_known_default().filter(|_| local)
}

async fn log_in(command: &Login, config: &Config, sidecar: &Sidecar) -> Result<(), Failed> {
    let user = &command.user;
    let before = sidecar.status(user).await?;
    if !command.again && !command.replace && is_logged_in(&before) {
        let proof = prove(sidecar, user).await?;
        return print(format!(
            "{user} is logged in already; nothing was changed (--again begins a new consent)\n{}",
            summary(&proof, &before, sidecar, config, user)
        ));
    }
    let region = command.region.map(|region| format!("&region={region}")).unwrap_or_default();
    let path = format!("/api/auth/amazon/login?user_id={}{region}&replace={}", encoded(user.as_str()), command.replace);
    let begun = sidecar.get(&path).await?;
    let (Some(auth_url), Some(state)) = (begun.json()["auth_url"].as_str().map(str::to_owned), state_of(&begun)) else {
        return Err(begun.refused("the login"));
    };
    let port = match command.port {
        Some(port) => Some(port),
        None => loopback_port(&config.lwa.redirect_uri),
    };
    browser::show(&auth_url, port, command.no_browser);
    let waiting = Waiting { sidecar, user, state: &state, before: &before, replace: command.replace };
    waiting.finish(command.timeout).await?;
    let status = sidecar.status(user).await?;
    let proof = prove(sidecar, user).await?;
    print(format!("{user} is logged in\n{}", summary(&proof, &status, sidecar, config, user)))?;
    if sidecar.is_own() && config.accounts_sync == Automatic::Daily {
        // A running sidecar does this by itself.
        let path = format!("/api/auth/amazon/accounts/sync?user_id={}", encoded(user.as_str()));
        let found = sidecar.request(Method::POST, &path, &[], super::sidecar::AMAZON).await?;
        if found.status == StatusCode::OK {
            let count = &found.json()["accounts"];
            return print(format!("{count} accounts have names now: adsidecar accounts list\n"));
        }
    }
    Ok(())
}

fn state_of(begun: &Reply) -> Option<String> {
    begun.json()["state"].as_str().map(str::to_owned)
}

/// Whether the user has a grant that is expected to work.
fn is_logged_in(status: &Value) -> bool {
    matches!(status["state"].as_str(), Some("fresh" | "expiring" | "idle" | "failing"))
}

/// A login that waits for its person.
struct Waiting<'a> {
    sidecar: &'a Sidecar,
    user: &'a UserId,
    state: &'a str,
    /// The user's status before.
    before: &'a Value,
    replace: bool,
}

impl Waiting<'_> {
    /// Waits for the browser's return or a paste, whichever comes first.
    async fn finish(&self, timeout: Duration) -> Result<(), Failed> {
        let begun = Instant::now();
        let mut lines = read_lines();
        let mut progress = Progress::new(begun, timeout);
        let (mut open, mut refused_paste) = (true, false);
        loop {
            progress.tell();
            if begun.elapsed() >= timeout {
                return Err(Failed::because(format!(
                    "nobody consented within {}: start adsidecar login again, or allow more time with --timeout",
                    humantime::format_duration(timeout)
                )));
            }
            let pause = POLL.min(timeout.saturating_sub(begun.elapsed()));
            tokio::select! {
                line = lines.recv(), if open => match line {
                    Some(line) if line.trim().is_empty() => {}
                    Some(line) => match pasted::read(line.trim(), self.state) {
                        Ok(paste) => return self.deliver(paste).await,
                        Err(why) => {
                            refused_paste = true;
                            progress.say(&why);
                        }
                    },
                    // Whoever piped a paste in will not send another one.
                    None if refused_paste => return Err(Failed::because("the login was not finished")),
                    None => open = false,
                },
                () = tokio::time::sleep(pause) => {
                    if self.has_ended().await? {
                        progress.end();
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Whether the browser has come back with a grant.
    async fn has_ended(&self) -> Result<bool, Failed> {
        let reply = self.sidecar.get(&format!("/api/auth/amazon/status?state={}", encoded(self.state))).await?;
        let told = reply.json();
        match told["login"].as_str() {
            Some("success") => Ok(true),
            Some("error") => Err(self.failed(told["error"].as_str().unwrap_or("other"))),
            // Another process that shares the store may have finished it.
            Some("unknown") => {
                let now = self.sidecar.status(self.user).await?;
                Ok(is_logged_in(&now) && now["consented_at"] != self.before["consented_at"])
            }
            Some(_) => Ok(false),
            None => Err(reply.refused("the question how the login stands")),
        }
    }

    /// Takes what was pasted to the callback, as the browser would.
    async fn deliver(&self, paste: Pasted) -> Result<(), Failed> {
        let query = match paste {
            Pasted::Confirm(grant) => return self.confirm(&grant).await,
            Pasted::Code(code) => format!("code={}&state={}", encoded(&code), encoded(self.state)),
            Pasted::Error(error) => format!("error={}&state={}", encoded(&error), encoded(self.state)),
        };
        let headers = [("accept", "application/json")];
        let timeout = super::sidecar::AMAZON;
        let reply = self.sidecar.request(Method::GET, &format!("{CALLBACK}?{query}"), &headers, timeout).await?;
        let (status, error, grant) = outcome(&reply);
        match status.as_deref() {
            Some("success") => Ok(()),
            Some("pending") => self.confirm(&grant.unwrap_or_default()).await,
            _ => Err(self.failed(error.as_deref().unwrap_or("other"))),
        }
    }

    async fn confirm(&self, grant: &str) -> Result<(), Failed> {
        let path = format!("/api/auth/amazon/confirm?grant={}", encoded(grant));
        let reply = self.sidecar.request(Method::POST, &path, &[], super::sidecar::AMAZON).await?;
        if reply.status == StatusCode::OK { Ok(()) } else { Err(reply.refused("the confirmation")) }
    }

    fn failed(&self, code: &str) -> Failed {
        let user = self.user;
        let what = match code {
            "access_denied" => "the consent was refused at Amazon; nothing was changed".to_owned(),
            "identity_changed" => format!(
                "the person who consented is not the Amazon identity that {user} had, so nothing was changed: sign in \
                 at Amazon as that person, or say --replace to let the new one take its place"
            ),
            "state_invalid" => "this was the end of another login, or of one that had ended: start adsidecar login \
                                again, and finish it within 10 minutes"
                .to_owned(),
            "exchange_failed" => {
                "Login with Amazon gave no grant for the code: adsidecar doctor checks the client id, \
                                  the client secret and the redirect URI"
                    .to_owned()
            }
            "invalid_scope" => {
                "Amazon refuses the scope: correct amazon.scope, or ask Amazon for access to the API for \
                                this client id"
                    .to_owned()
            }
            other => format!("Amazon ended the login with the error {other}: start it again"),
        };
        let note = if self.replace || code != "identity_changed" { String::new() } else { format!(" ({code})") };
        Failed::because(format!("{what}{note}"))
    }
}

/// Status, error and grant in a callback's answer: JSON, or the parameters of a redirect to the frontend.
fn outcome(reply: &Reply) -> (Option<String>, Option<String>, Option<String>) {
    if let Some(url) = reply.location.as_deref().and_then(|location| Url::parse(location).ok()) {
        let value = |name: &str| url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
        return (value("status"), value("error"), value("grant"));
    }
    let json = reply.json();
    let value = |name: &str| json[name].as_str().map(str::to_owned);
    (value("status"), value("error").or_else(|| value("code")), value("grant"))
}

/// The lines of standard input. The thread ends with its input, or with the process.
fn read_lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Tells how long the command still waits: a line that changes on a terminal, one a minute elsewhere.
struct Progress {
    begun: Instant,
    timeout: Duration,
    terminal: bool,
    told: Option<Duration>,
}

impl Progress {
    fn new(begun: Instant, timeout: Duration) -> Self {
        Self { begun, timeout, terminal: std::io::stderr().is_terminal(), told: None }
    }

    fn tell(&mut self) {
        let elapsed = self.begun.elapsed();
        let pause = if self.terminal { Duration::from_secs(1) } else { REMIND };
        if self.told.is_some_and(|told| elapsed < told + pause) {
            return;
        }
        self.told = Some(elapsed);
        let left = self.timeout.saturating_sub(elapsed).as_secs();
        let line = format!("waiting for the consent, {}:{:02} left", left / 60, left % 60);
        let _ = match self.terminal {
            // Short enough for a narrow terminal: a line that wraps could not be replaced.
            true => write!(std::io::stderr(), "\r\x1b[K{line} "),
            false => writeln!(std::io::stderr(), "{line}"),
        };
        let _ = std::io::stderr().flush();
    }

    fn say(&mut self, text: &str) {
        self.end();
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    fn end(&self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// What a region answered when the grant was used there.
type Proof = Vec<(Region, Result<Vec<String>, String>)>;

/// Uses the grant: lists the profiles of each region.
///
/// # Errors
/// [`Failed`] if no region accepts it.
async fn prove(sidecar: &Sidecar, user: &UserId) -> Result<Proof, Failed> {
    let [na, eu, fe] = Region::ALL.map(|region| profiles(sidecar, user, region));
    let (na, eu, fe) = tokio::join!(na, eu, fe);
    let proof: Proof = Region::ALL.into_iter().zip([na, eu, fe]).collect();
    if proof.iter().any(|(_, profiles)| profiles.is_ok()) {
        return Ok(proof);
    }
    let why: Vec<_> =
        proof.into_iter().map(|(region, result)| format!("  {region}: {}", result.err().unwrap_or_default())).collect();
    Err(Failed::because(format!(
        "the grant of {user} is stored, but no region accepted a request with it:\n{}\nadsidecar doctor names the \
         cause",
        why.join("\n")
    )))
}

/// The names of the profiles, or why there is no list.
async fn profiles(sidecar: &Sidecar, user: &UserId, region: Region) -> Result<Vec<String>, String> {
    let reply = sidecar.profiles(user, region).await.map_err(|failed| failed.message)?;
    let json = reply.json();
    let Some(profiles) = json.as_array().filter(|_| reply.status == StatusCode::OK) else {
        let detail = ["detail", "details", "message"].into_iter().find_map(|name| json[name].as_str());
        return Err(format!("{}{}", reply.status, detail.map(|text| format!(" {text}")).unwrap_or_default()));
    };
    let name = |profile: &Value| {
        let country = profile["countryCode"].as_str().unwrap_or("?");
        format!("{} ({country})", profile["accountInfo"]["name"].as_str().unwrap_or("without a name"))
    };
    Ok(profiles.iter().map(name).collect())
}

/// Which accounts and regions the grant reaches, until when, and what to do next.
fn summary(proof: &Proof, status: &Value, sidecar: &Sidecar, config: &Config, user: &UserId) -> String {
    /// Enough names to recognize the account.
    const NAMES: usize = 4;
    let mut text = String::new();
    for (region, profiles) in proof {
        text += &match profiles {
            Ok(names) if names.is_empty() => format!("  {region}  no profiles: Amazon answered with an empty list\n"),
            Ok(names) => {
                let more = if names.len() > NAMES { ", …" } else { "" };
                let some = names.iter().take(NAMES).cloned().collect::<Vec<_>>().join(", ");
                format!("  {region}  {} profiles: {some}{more}\n", names.len())
            }
            Err(why) => format!("  {region}  failed: {why}\n"),
        };
    }
    let ends = status["consent_expires_at"].as_str().and_then(|at| at.parse::<Timestamp>().ok());
    if let Some(ends) = ends {
        let days = (ends.as_second() - Timestamp::now().as_second()).max(0) / 86_400;
        text += &format!("  the consent ends in {days} days, at {ends}\n");
    }
    let (curl, start) = match sidecar.is_own() {
        true => (curl(&config.proxy_listen, "/v2/profiles"), "start it with: adsidecar\n"),
        false => (sidecar.curl("/v2/profiles"), ""),
    };
    let select = if *user == UserId::default() { String::new() } else { format!(" -H 'X-Ads-User: {user}'") };
    text + &format!("{start}try it: {curl}{select}\n")
}
