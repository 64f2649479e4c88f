//! Simulates many processes with very many grants on one PostgreSQL, and prints what that costs the database:
//! `cargo run --example fleet-simulation -- [SVG]`. With a path it draws the run.
//!
//! When a refresh is due, when a process claims and how many, how long leases last, when it polls and what a poll
//! reads, the brake and every wait after a failure are decided by the functions that ship. The server is a model: what
//! a statement costs was measured on PostgreSQL by `--calibrate`. Time is simulated.
//!
//! The fleet starts cold, with all tokens expired; rests; Login with Amazon is away for 70 minutes; and a third of the
//! pods is killed. Requests of callers are not simulated: each grant is refreshed by the background alone. The run
//! fails if a promise is broken. `--known-bad` breaks some on purpose, one run for each, and fails if that is not
//! noticed.

#![allow(unreachable_pub, reason = "a program of several modules")]

#[path = "fleet_simulation/calibration.rs"]
mod calibration;
#[path = "fleet_simulation/database.rs"]
mod database;
#[path = "fleet_simulation/engine.rs"]
mod engine;
#[path = "fleet_simulation/figures.rs"]
mod figures;
#[path = "fleet_simulation/plot.rs"]
mod plot;
/// What `postgres_server` uses of the tests' harness.
mod harness {
    use std::net::{SocketAddr, TcpListener};

    pub fn unused_address() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
        listener.local_addr().expect("an address")
    }
}
#[allow(dead_code, reason = "the tests use what this program does not")]
#[path = "../e2e/postgres_server.rs"]
mod postgres_server;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use adsidecar::auth::tokens::Settings;
use adsidecar::config::{self, Sources};
use calibration::{Calibration, FIXTURE};
use clap::Parser;
use database::{Kind, LIFETIME, Micros, SECOND};
use engine::{Fleet, KnownBad, Plan};
use figures::{Figures, MINUTE};

const HOUR: Micros = 60 * MINUTE;

/// Simulates many processes with very many grants on one PostgreSQL.
#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 1000)]
    pods: usize,
    #[arg(long, default_value_t = 1_000_000)]
    grants: usize,
    /// Cores of the database, each like the one on which `--calibrate` ran.
    #[arg(long, default_value_t = 8)]
    cores: usize,
    /// Simulated hours, at least 5.
    #[arg(long, default_value_t = 24)]
    hours: i64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Break promises on purpose.
    #[arg(long)]
    known_bad: bool,
    /// Measure what statements cost beside this many rows, and write it down. Names the machine.
    #[arg(long, value_names = ["ROWS", "MACHINE"], num_args = 2)]
    calibrate: Vec<String>,
    /// Where to draw the run.
    svg: Option<PathBuf>,
}

/// A run of the given number of hours, with its disturbances.
fn plan(pods: usize, grants: usize, cores: usize, hours: i64, seed: u64) -> Plan {
    let (end, away) = (hours * HOUR, hours * HOUR / 3);
    Plan { pods, grants, cores, end, outage: (away, away + 70 * MINUTE), kill: end * 3 / 4, seed, known_bad: None }
}

/// The settings of the token manager where nothing is configured.
fn settings() -> Settings {
    let sets = [
        ("amazon.client_id", "amzn1.application-oa2-client.simulation"),
        ("amazon.client_secret", "amzn1.oa2-cs.v1.simulation"),
        ("amazon.redirect_uri", "http://localhost:8001/api/auth/amazon/callback"),
        ("store.fernet_keys", "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4="),
    ];
    let sets = sets.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let sources = Sources { file: None, env: Vec::new(), sets };
    config::load(&sources).unwrap_or_else(|problems| panic!("{problems}")).tokens
}

/// The parts of a run that are told apart.
fn parts(plan: &Plan, figures: &Figures) -> Vec<(&'static str, Micros, Micros)> {
    let recovered = figures.recovered.unwrap_or(plan.end);
    vec![
        ("cold start", 0, figures.started.unwrap_or(plan.end)),
        ("at rest", plan.end / 6, plan.outage.0),
        ("LWA away", plan.outage.0 + MINUTE, plan.outage.1),
        ("recovery", plan.outage.1, recovered),
        ("a third killed", plan.kill, plan.kill + HOUR),
        ("all", 0, plan.end - MINUTE),
    ]
}

/// A row for each part.
fn table(plan: &Plan, figures: &Figures) -> String {
    let mut text = String::from(
        "| | minutes | statements/s | rows/s | MB/s | cores busy | longest statement | refreshes/s | statements per \
         refresh | polls and notes per pod and s |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (name, from, to) in parts(plan, figures) {
        let (sum, seconds) = figures.sum(from, to);
        let pods = figures.pods_at(from) as f64;
        let at_rest = (sum.of(Kind::Poll) + sum.of(Kind::Note)) as f64 / seconds / pods;
        text += &format!(
            "| {name} | {:.1} | {:.0} | {:.0} | {:.1} | {:.2} | {:.0} ms | {:.1} | {:.2} | {at_rest:.2} |\n",
            (to - from) as f64 / MINUTE as f64,
            sum.all() as f64 / seconds,
            sum.rows as f64 / seconds,
            sum.bytes / seconds / 1e6,
            sum.busy / seconds / 1e6,
            sum.longest as f64 / 1e3,
            sum.stored as f64 / seconds,
            sum.per_refresh(),
        );
    }
    let (sum, seconds) = figures.sum(plan.end / 6, plan.outage.0);
    let kinds = Kind::NAMES.iter().zip(sum.statements);
    let kinds: Vec<_> =
        kinds.map(|(name, number)| format!("{name} {:.2}", number as f64 / seconds / plan.pods as f64)).collect();
    text += &format!("\nAt rest, per pod and second: {}.\n", kinds.join(", "));
    let (all, _) = figures.sum(0, plan.end - MINUTE);
    let (away, _) = figures.sum(plan.outage.0, plan.outage.1);
    text += &format!(
        "In the first ten seconds after the cold start {:?} calls each, and after the outage {:?}.\n\
         Token calls {} (and {} while LWA was away), \
         refreshes stored {}; sent twice without need {}, and {} times \
         because the pod with the answer was killed; overtaken by a login {}, leases denied {}, statements past \
         their time limit {}.\nRefreshes in calm times came late by at most {} s (p99 {} s), and {} tokens expired. \
         Pods heard of a login or logout within {:.2} s (p99 {:.2} s).\n",
        figures.first_calls,
        figures.admitted,
        all.calls,
        away.refused,
        all.stored,
        figures.duplicates,
        figures.repeated,
        figures.superseded,
        figures.denied,
        figures.timeouts,
        figures.late(1.0),
        figures.late(0.99),
        figures.expired,
        figures.heard_after(1.0),
        figures.heard_after(0.99),
    );
    text
}

/// What is wrong with a run.
fn broken(plan: &Plan, settings: &Settings, figures: &Figures) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expect = |holds: bool, text: String| {
        if !holds {
            wrong.push(text);
        }
    };
    expect(figures.duplicates == 0, format!("{} refresh tokens were sent twice", figures.duplicates));
    let (all, seconds) = figures.sum(0, plan.end - MINUTE);
    let limit = all.stored as f64 * 1.005 + figures.repeated as f64;
    expect(all.calls as f64 <= limit, format!("{} token calls for {} refreshes", all.calls, all.stored));
    // Each killed pod had at most as many refreshes going on.
    let killed = (plan.pods - figures.pods_at(plan.end)) * settings.concurrency;
    expect(figures.repeated <= killed as u64, format!("{} refresh tokens were sent again", figures.repeated));
    // A token is refreshed `ahead` before its end, and up to a fifth of that earlier.
    let ahead = settings.policy.ahead.as_secs_f64();
    let lifetime = (LIFETIME / SECOND) as f64;
    let most = plan.grants as f64 * (1.0 + seconds / (lifetime - 1.2 * ahead));
    expect((all.stored as f64) <= most, format!("{} refreshes, and not at most {most:.0}", all.stored));
    // Nobody can refresh while Login with Amazon is away.
    let away = (plan.outage.1 - plan.outage.0) as f64 / SECOND as f64 + lifetime;
    let least = plan.grants as f64 * ((seconds - away) / (lifetime - ahead) - 2.0).max(1.0);
    expect((all.stored as f64) >= least, format!("{} refreshes, and not at least {least:.0}", all.stored));
    expect(figures.expired == 0, format!("{} tokens expired", figures.expired));
    expect(figures.calm() > plan.grants as u64, format!("only {} refreshes in calm times", figures.calm()));
    for (name, from, to) in parts(plan, figures) {
        let (sum, seconds) = figures.sum(from, to);
        let each = sum.per_refresh();
        expect(name == "LWA away" || each <= 4.0, format!("{name}: {each:.2} statements per refresh"));
        let per_pod = (sum.of(Kind::Poll) + sum.of(Kind::Note)) as f64 / seconds / figures.pods_at(from) as f64;
        expect(per_pod <= 2.0, format!("{name}: {per_pod:.2} polls and notes per pod and second"));
        // One row even if nothing has changed.
        let polled = sum.polled as f64 / sum.of(Kind::Poll).max(1) as f64;
        expect(polled <= 2.0, format!("{name}: {polled:.1} rows per poll"));
        if name == "LWA away" {
            let calls = sum.refused as f64 / seconds * 60.0;
            expect(calls <= 60.0, format!("{name}: {calls:.0} token calls a minute"));
            // A probe needs its lease and the brake; nobody else asks for anything.
            let extra = Kind::OF_REFRESHES.iter().map(|kind| sum.of(*kind)).sum::<u64>() as f64 / seconds;
            let extra = extra / plan.pods as f64;
            expect(extra <= 1.0, format!("{name}: {extra:.2} statements for refreshes per pod and second"));
        }
    }
    expect(figures.timeouts == 0, format!("{} statements waited past their time limit", figures.timeouts));
    let minutes = |from: Micros, to: Option<Micros>| to.map_or(f64::INFINITY, |to| (to - from) as f64 / MINUTE as f64);
    let (start, recovery) = (minutes(0, figures.started), minutes(plan.outage.1, figures.recovered));
    expect(start <= 15.0, format!("the backlog of the start took {start:.1} minutes"));
    expect(recovery <= 15.0, format!("the backlog of the outage took {recovery:.1} minutes"));
    // Ten a second at first, doubled every two seconds; and processes that probed at the same moment.
    let mut calls = 0;
    for (second, admitted) in figures.admitted.iter().enumerate() {
        calls += admitted;
        let planned = 20.0 / std::f64::consts::LN_2 * (((second + 1) as f64 / 2.0).exp2() - 1.0);
        let text = format!("{calls} calls in the first {} s after the outage, and not {planned:.0}", second + 1);
        expect(calls as f64 <= 1.25 * planned + 10.0, text);
    }
    // The same rate, of which each pod takes its part among those that have started before it: the first has all of it.
    let mut calls = 0;
    for (second, first) in figures.first_calls.iter().enumerate() {
        calls += first;
        let planned = 20.0 / std::f64::consts::LN_2 * (((second + 1) as f64 / 2.0).exp2() - 1.0);
        let planned = planned * (1.0 + (plan.pods as f64).ln());
        let text = format!("{calls} calls in the first {} s of the cold start, and not {planned:.0}", second + 1);
        expect(calls as f64 <= 1.25 * planned + 10.0, text);
    }
    let heard = figures.heard_after(0.99);
    expect(heard <= 1.0, format!("1 in 100 pods heard of a login or logout only after {heard:.2} s"));
    wrong
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut out = std::io::stdout();
    if let [rows, machine] = &arguments.calibrate[..] {
        let rows = rows.parse().expect("a number of rows");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let measured = runtime.block_on(calibration::measure(rows, machine.clone())).expect("PostgreSQL measures");
        let text = serde_json::to_string_pretty(&measured).expect("figures are JSON") + "\n";
        std::fs::write(FIXTURE, &text).expect("the fixture can be written");
        let _ = write!(out, "{text}");
        return ExitCode::SUCCESS;
    }
    let (settings, measured) = (settings(), Calibration::stored());
    let Arguments { pods, grants, cores, hours, seed, .. } = arguments;
    let run = |known_bad| {
        let plan = Plan { known_bad, ..plan(pods, grants, cores, hours.max(5), seed) };
        let figures = Fleet::new(plan.clone(), settings.clone(), &measured).run();
        let wrong = broken(&plan, &settings, &figures);
        (plan, figures, wrong)
    };
    if arguments.known_bad {
        let mut unnoticed = false;
        for bad in [
            KnownBad::Unlocked,
            KnownBad::Unpaced,
            KnownBad::Unbraked,
            KnownBad::Told,
            KnownBad::Unshared,
            KnownBad::Rushed,
        ] {
            let (.., wrong) = run(Some(bad));
            unnoticed |= wrong.is_empty();
            let _ = writeln!(out, "known bad, {bad:?}: {}", if wrong.is_empty() { "NOT noticed" } else { "noticed" });
            wrong.iter().for_each(|text| drop(writeln!(out, "  {text}")));
        }
        return ExitCode::from(u8::from(unnoticed));
    }
    let (plan, figures, wrong) = run(None);
    let _ = writeln!(out, "{}", table(&plan, &figures));
    wrong.iter().for_each(|text| drop(writeln!(out, "WRONG: {text}")));
    if let Some(path) = arguments.svg {
        std::fs::write(path, plot::svg(&plan, &figures)).expect("the picture can be written");
    }
    ExitCode::from(u8::from(!wrong.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(known_bad: Option<KnownBad>, pods: usize, grants: usize) -> (Figures, Vec<String>) {
        let plan = Plan { known_bad, ..plan(pods, grants, 2, 5, 7) };
        let figures = Fleet::new(plan.clone(), settings(), &Calibration::stored()).run();
        let wrong = broken(&plan, &settings(), &figures);
        (figures, wrong)
    }

    /// The checks must notice each of these.
    #[test]
    fn a_fleet_is_noticed_without_leases_pauses_brake_or_growing_rate_or_if_polls_read_refreshes() {
        let words = [
            (KnownBad::Unlocked, 4, 500, "sent twice"),
            (KnownBad::Unpaced, 60, 6000, "statements per refresh"),
            (KnownBad::Unbraked, 4, 500, "token calls a minute"),
            (KnownBad::Told, 60, 6000, "rows per poll"),
            (KnownBad::Unshared, 20, 2000, "after the outage"),
            (KnownBad::Rushed, 60, 6000, "of the cold start"),
        ];
        for (bad, pods, grants, word) in words {
            let (_, wrong) = small(Some(bad), pods, grants);
            assert!(wrong.iter().any(|text| text.contains(word)), "{bad:?}: {wrong:?}");
        }
    }

    #[test]
    fn a_simulated_fleet_refreshes_each_grant_once_in_time_and_at_few_statements() {
        let (figures, wrong) = small(None, 40, 20_000);
        assert!(wrong.is_empty(), "{wrong:?}");
        assert!(figures.minutes.iter().map(|minute| minute.stored).sum::<u64>() > 20_000 * 4);
    }
}
