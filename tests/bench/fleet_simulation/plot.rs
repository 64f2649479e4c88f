//! The picture of a run.

use std::fmt::Write as _;

use super::database::Micros;
use super::engine::Plan;
use super::figures::{Counts, Figures, MINUTE};

const COLORS: [&str; 4] = ["#0b57d0", "#7d4e00", "#116329", "#b3261e"];
/// Minutes of one point.
const BIN: usize = 3;
/// The powers of ten of the axis.
const POWERS: i32 = 9;

/// A line: its name, and what it shows of a second.
type Line = (&'static str, fn(&Counts) -> f64);

const LINES: [Line; 4] = [
    ("rows", |counts| counts.rows as f64),
    ("statements", |counts| counts.all() as f64),
    ("refreshes", |counts| counts.stored as f64),
    ("calls that fail", |counts| counts.refused as f64),
];

pub fn svg(plan: &Plan, figures: &Figures) -> String {
    let (width, height) = (864.0, 300.0);
    let x = |at: Micros| 50.0 + width * at as f64 / plan.end as f64;
    let y = |rate: f64| 20.0 + height * (1.0 - (rate.max(0.01).log10() + 2.0) / f64::from(POWERS));
    let mut text = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 940 390\" font-family=\"sans-serif\" \
         font-size=\"12\">\n\
         <rect width=\"940\" height=\"390\" fill=\"#fff\"/>\n",
    );
    let (from, to) = (x(plan.outage.0), x(plan.outage.1));
    let _ = writeln!(
        text,
        "<rect x=\"{from:.1}\" y=\"20\" width=\"{:.1}\" height=\"{height}\" fill=\"#eaeef2\"/>\n\
         <text x=\"{:.0}\" y=\"34\">LWA away</text>\n\
         <path d=\"M{:.1} 20V320\" stroke=\"#57606a\"/><text x=\"{:.0}\" y=\"34\">a third killed</text>",
        to - from,
        to + 4.0,
        x(plan.kill),
        x(plan.kill) + 4.0
    );
    for power in 0..=POWERS {
        let rate = 10f64.powi(power - 2);
        let at = y(rate);
        let label = match rate {
            1e6.. => format!("{}M", rate / 1e6),
            1e3.. => format!("{}k", rate / 1e3),
            _ => format!("{rate}"),
        };
        let _ = writeln!(
            text,
            "<path d=\"M50 {at:.1}H914\" stroke=\"#d0d7de\"/><text x=\"12\" y=\"{:.0}\">{label}</text>",
            at + 4.0
        );
    }
    let hours = plan.end / (60 * MINUTE);
    for hour in (0..=hours).step_by((hours as usize / 8).max(1)) {
        let _ = writeln!(text, "<text x=\"{:.0}\" y=\"340\">{hour} h</text>", x(hour * 60 * MINUTE) - 12.0);
    }
    for (index, (name, value)) in LINES.iter().enumerate() {
        let bins = figures.minutes[..figures.minutes.len() - 1].chunks(BIN).enumerate();
        let points: Vec<_> = bins
            .map(|(bin, counts)| {
                let rate = counts.iter().map(value).sum::<f64>() / (60.0 * counts.len() as f64);
                format!("{:.1},{:.1}", x((bin * BIN) as Micros * MINUTE), y(rate))
            })
            .collect();
        let _ = writeln!(
            text,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\" points=\"{}\"/>\n\
             <text x=\"{}\" y=\"370\" fill=\"{}\">{name}</text>",
            COLORS[index],
            points.join(" "),
            50 + 150 * index,
            COLORS[index]
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"50\" y=\"14\">per second, of {} pods with {} grants on one PostgreSQL</text>",
        plan.pods, plan.grants
    );
    text + "</svg>\n"
}
