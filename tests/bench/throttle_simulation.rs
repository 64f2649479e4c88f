//! Simulates laws for the throttle against a token bucket like Amazon's, and prints what each achieves:
//! `cargo run --example throttle-simulation [SVG]`. With a path it draws the run with a moving limit.
//!
//! 100 callers over 10 accounts want three times the limit for 2,000 simulated seconds. The laws:
//!
//! - `retry`: no throttle. Each caller retries on its own, as the SDKs do by default: three attempts, after a random
//!   time below 1 s and below 2 s (`Retry-After` is the least of it).
//! - `pause`: after a 429 all calls wait for its `Retry-After`, or a second, and then go on as before.
//! - `aimd`: a shared rate that a 429 halves, and that rises by a twentieth of the last refused rate per second.
//! - `adsidecar`: [`Law`], as it ships.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Write as _;

use adsidecar::throttle::law::{Law, Refusal};

const CALLERS: usize = 100;
const LIMIT: f64 = 20.0;
const SECONDS: f64 = 2000.0;
/// The step of the simulation, in seconds.
const STEP: f64 = 0.001;
/// The time from sending a call to its response, in seconds.
const ROUND_TRIP: f64 = 0.06;
const LAWS: [&str; 4] = ["retry", "pause", "aimd", "adsidecar"];

/// How Amazon's limit behaves.
#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    /// The limit halves and doubles every minute.
    moving: bool,
    retry_after: Option<f64>,
    /// The size of Amazon's bucket, in seconds of the limit.
    burst: f64,
}

const SCENARIOS: [Scenario; 6] = [
    Scenario { name: "fixed, Retry-After 1", moving: false, retry_after: Some(1.0), burst: 1.0 },
    Scenario { name: "fixed, no Retry-After", moving: false, retry_after: None, burst: 1.0 },
    Scenario { name: "fixed, Retry-After 5", moving: false, retry_after: Some(5.0), burst: 1.0 },
    Scenario { name: "fixed, bucket of 3 s", moving: false, retry_after: None, burst: 3.0 },
    Scenario { name: "moving, Retry-After 1", moving: true, retry_after: Some(1.0), burst: 1.0 },
    Scenario { name: "moving, no Retry-After", moving: true, retry_after: None, burst: 1.0 },
];

impl Scenario {
    fn limit(self, now: f64) -> f64 {
        let factors = [1.0, 0.5, 1.0, 2.0];
        if self.moving { LIMIT * factors[(now / 60.0) as usize % factors.len()] } else { LIMIT }
    }
}

/// One of the laws that share a rate between all callers.
enum Shared {
    Pause { resumed: f64 },
    Aimd { rate: f64, refused_rate: f64, tat: f64, resumed: f64, epoch: u32 },
    Learned(Option<Law>),
}

impl Shared {
    fn wait(&self, now: f64) -> f64 {
        match self {
            Self::Pause { resumed } => (resumed - now).max(0.0),
            Self::Aimd { tat, resumed, .. } => (tat - now).max(resumed - now).max(0.0),
            Self::Learned(law) => law.as_ref().map_or(0.0, |law| law.wait(now)),
        }
    }

    /// Counts a call, and returns the epoch in which it is sent.
    fn take(&mut self, now: f64) -> u32 {
        match self {
            Self::Aimd { rate, tat, epoch, .. } => {
                *tat = tat.max(now) + 1.0 / *rate;
                *epoch
            }
            Self::Pause { .. } => 0,
            Self::Learned(law) => law.as_mut().map_or(0, |law| {
                law.take(now, 1.0);
                law.epoch()
            }),
        }
    }

    fn tick(&mut self) {
        if let Self::Aimd { rate, refused_rate, .. } = self {
            *rate += *refused_rate / 20.0 * STEP;
        }
    }

    fn accepted(&mut self) {
        if let Self::Learned(Some(law)) = self {
            law.accepted();
        }
    }

    fn refused(&mut self, refusal: Refusal) {
        match self {
            Self::Aimd { rate, refused_rate, resumed, epoch, .. } => {
                if refusal.epoch == *epoch {
                    *refused_rate = rate.min(refusal.peak.max(1.0));
                    *rate = *refused_rate / 2.0;
                    *epoch += 1;
                }
                *resumed = resumed.max(refusal.at + refusal.advised.unwrap_or(refusal.default));
            }
            Self::Pause { resumed } => {
                *resumed = resumed.max(refusal.at + refusal.advised.unwrap_or(refusal.default));
            }
            Self::Learned(law @ None) => *law = Some(Law::begin(&refusal, None)),
            Self::Learned(Some(law)) => law.refused(&refusal),
        }
    }
}

/// What came of a run.
#[derive(Default)]
struct Outcome {
    served: u64,
    refused: u64,
    failed: u64,
    capacity: f64,
    waits: Vec<f64>,
    /// Calls served in each second.
    series: Vec<f64>,
}

struct Call {
    caller: usize,
    began: f64,
    attempts: u32,
}

fn run(law: &str, scenario: Scenario) -> Outcome {
    let mut shared = match law {
        "retry" => None,
        "aimd" => Some(Shared::Aimd { rate: f64::INFINITY, refused_rate: 0.0, tat: 0.0, resumed: 0.0, epoch: 0 }),
        "pause" => Some(Shared::Pause { resumed: 0.0 }),
        _ => Some(Shared::Learned(None)),
    };
    let period = CALLERS as f64 / (3.0 * LIMIT);
    let mut outcome = Outcome { series: vec![0.0; SECONDS as usize], ..Outcome::default() };
    let mut random = 88_172_645_463_325_252_u64;
    let mut dice = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut due: Vec<Option<f64>> = (0..CALLERS).map(|_| Some(dice() * period)).collect();
    let mut retries: Vec<(f64, Call)> = Vec::new();
    let mut queue = VecDeque::<Call>::new();
    let mut in_flight = VecDeque::<(f64, bool, u32, Call)>::new();
    let mut tokens = scenario.burst * LIMIT;
    let mut halves = vec![0.0; 2 * SECONDS as usize + 2];
    let mut step = 0u32;
    while f64::from(step) * STEP < SECONDS {
        let now = f64::from(step) * STEP;
        step += 1;
        let limit = scenario.limit(now);
        outcome.capacity += limit * STEP;
        tokens = (tokens + limit * STEP).min(scenario.burst * limit);
        for (caller, due) in due.iter_mut().enumerate() {
            if due.is_some_and(|due| due <= now) {
                *due = None;
                queue.push_back(Call { caller, began: now, attempts: 0 });
            }
        }
        while let Some(index) = retries.iter().position(|(at, _)| *at <= now) {
            queue.push_back(retries.swap_remove(index).1);
        }
        while in_flight.front().is_some_and(|(at, ..)| *at <= now) {
            let Some((_, accepted, epoch, call)) = in_flight.pop_front() else { break };
            if accepted {
                outcome.served += 1;
                outcome.series[now as usize] += 1.0;
                halves[(2.0 * now) as usize] += 1.0;
                outcome.waits.push(now - call.began);
                due[call.caller] = Some((call.began + period).max(now));
                shared.iter_mut().for_each(Shared::accepted);
                continue;
            }
            outcome.refused += 1;
            if let Some(shared) = &mut shared {
                let half = (2.0 * now) as usize;
                let recent = &halves[half.saturating_sub(15)..=half];
                let peak = recent.windows(2).map(|pair| pair[0] + pair[1]).fold(recent[0], f64::max);
                let advised = scenario.retry_after;
                shared.refused(Refusal { at: now, epoch, advised, default: 1.0, dice: dice(), peak });
                queue.push_front(call);
            } else if call.attempts == 3 {
                outcome.failed += 1;
                due[call.caller] = Some((call.began + period).max(now));
            } else {
                let backoff = dice() * f64::from(1u32 << (call.attempts - 1));
                retries.push((now + backoff.max(scenario.retry_after.unwrap_or_default()), call));
            }
        }
        shared.iter_mut().for_each(Shared::tick);
        while !queue.is_empty() && shared.as_ref().is_none_or(|shared| shared.wait(now) <= 0.0) {
            let Some(call) = queue.pop_front() else { break };
            let epoch = shared.as_mut().map_or(0, |shared| shared.take(now));
            let accepted = tokens >= 1.0;
            tokens -= f64::from(u8::from(accepted));
            in_flight.push_back((now + ROUND_TRIP, accepted, epoch, Call { attempts: call.attempts + 1, ..call }));
        }
    }
    outcome.waits.sort_by(f64::total_cmp);
    outcome
}

/// The calls served per second in the first minutes of the run with a moving limit, and the limit.
fn svg(runs: &[(&str, Vec<f64>)], limit: impl Fn(f64) -> f64) -> String {
    const COLORS: [&str; 4] = ["#b3261e", "#7d4e00", "#0b57d0", "#116329"];
    const BIN: usize = 5;
    let (seconds, height) = (480, 300.0);
    let x = |second: f64| 50.0 + second * 1.8;
    let y = |rate: f64| 20.0 + height * (1.0 - rate / 45.0);
    let mut text = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 940 390\" font-family=\"sans-serif\" \
         font-size=\"12\">\n\
         <rect width=\"940\" height=\"390\" fill=\"#fff\"/>\n",
    );
    let line = |points: &[(f64, f64)], color: &str, dash: &str| {
        let points: Vec<_> = points.iter().map(|(at, rate)| format!("{:.1},{:.1}", x(*at), y(*rate))).collect();
        format!(
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\"{dash} points=\"{}\"/>\n",
            points.join(" ")
        )
    };
    for rate in [0, 10, 20, 30, 40] {
        let at = y(f64::from(rate));
        let _ = writeln!(
            text,
            "<path d=\"M50 {at:.1}H914\" stroke=\"#d0d7de\"/><text x=\"20\" y=\"{:.0}\">{rate}</text>",
            at + 4.0
        );
    }
    for minute in 0..=8 {
        let at = x(f64::from(60 * minute));
        let _ = writeln!(text, "<text x=\"{:.0}\" y=\"340\">{minute} min</text>", at - 12.0);
    }
    let limits: Vec<_> = (0..seconds).map(|second| (f64::from(second), limit(f64::from(second)))).collect();
    text += &line(&limits, "#57606a", " stroke-dasharray=\"4 3\"");
    text += "<text x=\"50\" y=\"14\">calls served per second; dashed: Amazon's limit (no Retry-After)</text>\n";
    for (index, (law, series)) in runs.iter().enumerate() {
        let bins = series[..seconds as usize].chunks(BIN).enumerate();
        let points: Vec<_> =
            bins.map(|(bin, rates)| ((bin * BIN) as f64, rates.iter().sum::<f64>() / rates.len() as f64)).collect();
        text += &line(&points, COLORS[index], "");
        let at = 50 + 150 * index;
        let _ = writeln!(text, "<text x=\"{at}\" y=\"370\" fill=\"{}\">{law}</text>", COLORS[index]);
    }
    text + "</svg>\n"
}

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(
        out,
        "| limit | law | of the limit used | refused by Amazon | failed | p99 wait |\n|---|---|---|---|---|---|"
    )?;
    let mut moving = Vec::new();
    for scenario in SCENARIOS {
        for law in LAWS {
            let run = run(law, scenario);
            let (served, refused) = (run.served as f64, run.refused as f64);
            writeln!(
                out,
                "| {} | {law} | {:.1} % | {:.2} % | {:.1} % | {:.1} s |",
                scenario.name,
                100.0 * served / run.capacity,
                100.0 * refused / (served + refused),
                100.0 * run.failed as f64 / (served + run.failed as f64),
                run.waits[run.waits.len() * 99 / 100],
            )?;
            if scenario.moving && scenario.retry_after.is_none() {
                moving.push((law, run.series));
            }
        }
    }
    match std::env::args().nth(1) {
        Some(path) => std::fs::write(path, svg(&moving, |now| SCENARIOS[5].limit(now))),
        None => Ok(()),
    }
}
