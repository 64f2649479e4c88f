//! `adsidecar status`: who is logged in, until when, and what is wrong. From the running sidecar, or without one from
//! its store.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use http::Method;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::sidecar::Sidecar;
use super::{Failed, Output, block_on, client, print, table, users};
use crate::config::Config;

#[derive(Debug, Args)]
pub(super) struct Status {
    /// How to print it
    #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Output,
    /// Print it again and again until Ctrl-C, every 2 seconds if no interval is given
    #[arg(
        long,
        value_name = "INTERVAL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2s",
        value_parser = humantime::parse_duration
    )]
    watch: Option<Duration>,
}

/// What `status` prints.
#[derive(Debug, Serialize)]
struct Report {
    sidecar: Value,
    users: Vec<Value>,
    accounts: Value,
    throttle: Value,
    /// What Amazon's 429s have taught; empty until there was one.
    limits: Vec<Value>,
    /// What runs at Amazon, where it limits the number at a time.
    running: Vec<Value>,
    /// What needs a person, each with its cure.
    problems: Vec<String>,
}

/// Prints the status once, or until it is interrupted. Fails if something needs a person.
pub(super) fn run(command: &Status, config: &Config) -> Result<(), Failed> {
    let Some(interval) = command.watch else {
        let report = block_on(report(config))??;
        print(written(&report, command.output)?)?;
        return match report.problems.len() {
            0 => Ok(()),
            count => Err(Failed::because(format!("{count} thing(s) need a person"))),
        };
    };
    block_on(async {
        let mut interrupted = signal(SignalKind::interrupt()).map_err(Failed::because)?;
        let mut terminated = signal(SignalKind::terminate()).map_err(Failed::because)?;
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        loop {
            let text = match report(config).await {
                Ok(report) if command.output == Output::Json => {
                    serde_json::to_string(&report).map_err(Failed::because)? + "\n"
                }
                Ok(report) => written(&report, command.output)? + "\n",
                Err(failed) => format!("{}\n", failed.message),
            };
            print(format!("{clear}{text}"))?;
            tokio::select! {
                () = tokio::time::sleep(interval) => {}
                _ = interrupted.recv() => return Ok(()),
                _ = terminated.recv() => return Ok(()),
            }
        }
    })?
}

fn written(report: &Report, output: Output) -> Result<String, Failed> {
    match output {
        Output::Json => Ok(serde_json::to_string_pretty(report).map_err(Failed::because)? + "\n"),
        Output::Text => Ok(text(report)),
    }
}

async fn report(config: &Config) -> Result<Report, Failed> {
    let mut report = match Sidecar::running(config).await? {
        Some(sidecar) => of_running(config, &sidecar).await?,
        None => of_store(config).await?,
    };
    report.problems = problems(&report.sidecar, &report.users);
    Ok(report)
}

async fn of_running(config: &Config, sidecar: &Sidecar) -> Result<Report, Failed> {
    let version = sidecar.get("/").await?.json()["version"].clone();
    let users = sidecar.statuses().await?;
    let listed = sidecar.get("/api/auth/amazon/accounts?limit=1").await?.json();
    let admin = |path: &'static str| client::request(&config.admin_listen, Method::GET, path, &[]);
    let readiness = match admin("/readyz").await {
        Ok((_, body)) => String::from_utf8_lossy(&body).trim_end().to_owned(),
        Err(failed) => failed.message,
    };
    let metrics = admin("/metrics").await.map(|(_, body)| String::from_utf8_lossy(&body).into_owned());
    let throttle = metrics.as_ref().map_or(Value::Null, |metrics| throttled(metrics));
    let metrics = metrics.unwrap_or_default();
    let listens = config.proxy_listen.iter().map(ToString::to_string).collect::<Vec<_>>();
    let about = json!({ "running": true, "version": version, "readiness": readiness, "proxy": listens });
    let configured = config.proxy.accounts.len();
    let accounts = json!({ "configured": configured, "all": listed["total"] });
    let (limits, running) = (limits(&metrics), running(&metrics));
    Ok(Report { sidecar: about, users, accounts, throttle, limits, running, problems: Vec::new() })
}

async fn of_store(config: &Config) -> Result<Report, Failed> {
    let opened = users::open_unless_held(config)?;
    let Some((store, opened)) = opened else {
        return Err(Failed {
            exit: super::Exit::Held,
            message: "another process holds the store, and nothing answers at proxy.listen: give this command the \
                      configuration of that process"
                .to_owned(),
        });
    };
    store.close().await?;
    let now = Timestamp::now();
    let users = opened.users.into_iter().map(|(user, grant)| match grant {
        Ok(grant) => json!({
            "user_id": user,
            "state": grant.state(config.tokens.policy, now),
            "expires_at": grant.access.as_ref().map(|access| access.expires_at),
            "updated_at": grant.updated_at,
            "consented_at": grant.consented_at,
            "consent_expires_at": grant.consent_expires_at(),
            "consent": grant.consent(now),
        }),
        Err(error) => json!({ "user_id": user, "state": "unreadable", "last_error": error.to_string() }),
    });
    Ok(Report {
        sidecar: json!({ "running": false }),
        users: users.collect(),
        accounts: json!({ "configured": config.proxy.accounts.len() }),
        throttle: Value::Null,
        limits: Vec::new(),
        running: Vec::new(),
        problems: Vec::new(),
    })
}

/// How often requests were throttled, by region and by whom, from the metrics.
fn throttled(metrics: &str) -> Value {
    let lines = metrics.lines().filter_map(|line| line.strip_prefix("adsidecar_throttled_total{")?.split_once("} "));
    let counts = lines.filter_map(|(labels, count)| Some((labels, count.parse::<f64>().ok()?)));
    counts
        .filter(|(_, count)| *count > 0.0)
        .map(|(labels, count)| json!({ "labels": labels, "count": count }))
        .collect()
}

/// The learned limits, from the metrics: by region, API family and kind the rate, the rest of the pause in seconds, and
/// the requests that wait.
fn limits(metrics: &str) -> Vec<Value> {
    let now = Timestamp::now().as_duration().as_secs_f64();
    let paused: BTreeMap<_, _> = series(metrics, "adsidecar_throttle_paused_until_timestamp_seconds").collect();
    let waiting: BTreeMap<_, _> = series(metrics, "adsidecar_throttle_waiting").collect();
    let limits = series(metrics, "adsidecar_throttle_rate").map(|(labels, rate)| {
        let paused_for = paused.get(&labels).map_or(0.0, |until| (until - now).max(0.0)).ceil();
        let waiting = waiting.get(&labels).map_or(0, |waiting| *waiting as u64);
        let [region, family, kind] = ["region", "family", "kind"].map(|name| labels.get(name).cloned());
        json!({
            "region": region, "family": family, "kind": kind, "rate": rate, "paused_for": paused_for, "waiting": waiting
        })
    });
    limits.collect()
}

/// What runs at Amazon, from the metrics.
fn running(metrics: &str) -> Vec<Value> {
    let running = series(metrics, "adsidecar_throttle_running").filter(|(_, count)| *count > 0.0);
    let running = running.map(|(labels, count)| {
        json!({ "region": labels.get("region"), "family": labels.get("family"), "count": count as u64 })
    });
    running.collect()
}

/// The series of a metric, each by its labels. No label of the throttle's has a comma or a quote in it.
fn series<'m>(metrics: &'m str, name: &'m str) -> impl Iterator<Item = (BTreeMap<String, String>, f64)> + 'm {
    metrics.lines().filter_map(move |line| {
        let (labels, value) = line.strip_prefix(name)?.strip_prefix('{')?.split_once("} ")?;
        let labels = labels.split(',').filter_map(|label| label.split_once('='));
        let labels = labels.map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned()));
        Some((labels.collect(), value.parse().ok()?))
    })
}

fn problems(sidecar: &Value, users: &[Value]) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some(readiness) = sidecar["readiness"].as_str().filter(|readiness| *readiness != "ready") {
        problems.push(format!("the sidecar is not ready: {readiness}; adsidecar doctor names the cause"));
    }
    if users.is_empty() {
        problems.push("nobody is logged in: adsidecar login".to_owned());
    }
    for user in users {
        let name = user["user_id"].as_str().unwrap_or_default();
        let error = user["last_error"].as_str().unwrap_or("no reason was kept");
        match (user["state"].as_str(), user["consent"].as_str()) {
            (Some("login_required"), _) => {
                problems.push(format!("{name} has to log in again ({error}): adsidecar login --user {name}"));
            }
            (Some("unreadable"), _) => {
                problems.push(format!("the record of {name} cannot be read ({error}): adsidecar doctor"));
            }
            (Some("failing"), _) => {
                problems.push(format!("the token of {name} cannot be refreshed ({error}): adsidecar doctor"));
            }
            (_, Some("ending" | "ended")) => {
                problems.push(format!("the consent of {name} ends: adsidecar login --user {name} --again"));
            }
            _ => {}
        }
    }
    problems
}

// The function is long because it writes the report from top to bottom, section by section.
fn text(report: &Report) -> String {
    let now = Timestamp::now();
    let mut text = match report.sidecar["running"].as_bool() {
        Some(true) => {
            let proxies = report.sidecar["proxy"].as_array().into_iter().flatten().filter_map(Value::as_str);
            format!(
                "adsidecar {} runs at {}: {}\n",
                report.sidecar["version"].as_str().unwrap_or_default(),
                proxies.collect::<Vec<_>>().join(", "),
                report.sidecar["readiness"].as_str().unwrap_or_default(),
            )
        }
        _ => "no sidecar runs; this is what its store holds\n".to_owned(),
    };
    let cell = |user: &Value, name: &str| user[name].as_str().unwrap_or("-").to_owned();
    let when = |user: &Value, name: &str| {
        user[name].as_str().and_then(|at| at.parse().ok()).map_or("-".to_owned(), |at| relative(at, now))
    };
    let rows = report.users.iter().map(|user| {
        [
            cell(user, "user_id"),
            cell(user, "state"),
            when(user, "expires_at"),
            when(user, "next_refresh_at"),
            when(user, "consent_expires_at"),
            cell(user, "last_error"),
        ]
    });
    if !report.users.is_empty() {
        text += "\n";
        text += &table(["USER", "STATE", "TOKEN ENDS", "REFRESH", "CONSENT ENDS", "LAST ERROR"], rows);
    }
    let count = |name: &str| report.accounts[name].as_u64();
    if let Some(configured) = count("configured") {
        let _ = write!(text, "\naccounts: {configured} configured");
        if let Some(all) = count("all") {
            let _ = write!(text, ", {all} with those found at Amazon (adsidecar accounts list)");
        }
        text += "\n";
    }
    for throttled in report.throttle.as_array().into_iter().flatten() {
        let _ =
            writeln!(text, "throttled: {} times ({})", throttled["count"], throttled["labels"].as_str().unwrap_or(""));
    }
    if !report.limits.is_empty() {
        let rows = report.limits.iter().map(|limit| {
            let paused = limit["paused_for"].as_f64().filter(|paused| *paused > 0.0);
            [
                cell(limit, "region"),
                cell(limit, "family"),
                cell(limit, "kind"),
                format!("{:.1}/s", limit["rate"].as_f64().unwrap_or_default()),
                paused.map_or("-".to_owned(), |paused| format!("{paused}s")),
                limit["waiting"].to_string(),
            ]
        });
        text += "\nAmazon's limits, as its 429s have shown them:\n";
        text += &table(["REGION", "FAMILY", "KIND", "RATE", "PAUSED FOR", "WAITING"], rows);
    }
    for running in &report.running {
        let (region, family) = (cell(running, "region"), cell(running, "family"));
        let _ = writeln!(text, "running at Amazon: {} ({region}, {family})", running["count"]);
    }
    for problem in &report.problems {
        let _ = write!(text, "\n! {problem}\n");
    }
    text
}

/// A point in time as people say it: `in 42m`, `3d ago`.
pub(super) fn relative(at: Timestamp, now: Timestamp) -> String {
    let seconds = at.as_second() - now.as_second();
    let size = match seconds.unsigned_abs() {
        s @ 0..=119 => format!("{s}s"),
        s @ 120..=7199 => format!("{}m", s / 60),
        s @ 7200..=172_799 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    };
    if seconds < 0 { format!("{size} ago") } else { format!("in {size}") }
}
