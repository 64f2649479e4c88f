//! Charts of the last hour, as inline SVG. Each says in words what it shows.

use maud::{Markup, html};

use crate::telemetry::hour::MINUTES;
use crate::telemetry::metrics::Totals;

/// Height of the drawing, and width of a minute with the gap behind its bar.
const HEIGHT: u64 = 100;
const STEP: usize = 5;
const BAR: usize = 4;

/// What one chart shows: its title, its unit in words, the bars, and what of each bar is a failure.
struct Chart {
    title: &'static str,
    part: Option<&'static str>,
    bars: [u64; MINUTES],
    parts: [u64; MINUTES],
}

/// The charts of these minutes, the current one last.
pub(super) fn charts(minutes: &[Totals; MINUTES]) -> Markup {
    let all = [
        Chart { title: "Requests", part: None, bars: minutes.map(|minute| minute.requests), parts: [0; MINUTES] },
        Chart {
            title: "Errors",
            part: None,
            bars: minutes.map(|minute| minute.errors),
            parts: minutes.map(|minute| minute.errors),
        },
        Chart {
            title: "Refreshes",
            part: Some("failed"),
            bars: minutes.map(|minute| minute.refreshes),
            parts: minutes.map(|minute| minute.failed_refreshes),
        },
        Chart { title: "Waits", part: None, bars: minutes.map(|minute| minute.waits), parts: [0; MINUTES] },
    ];
    html! { div class="charts" { @for chart in &all { (chart.draw()) } } }
}

impl Chart {
    fn draw(&self) -> Markup {
        let (sum, most) = (self.bars.iter().sum::<u64>(), self.bars.iter().copied().max().unwrap_or_default());
        let failed = self.parts.iter().sum::<u64>();
        let of_which = self.part.filter(|_| failed > 0).map(|part| format!(", {failed} {part}")).unwrap_or_default();
        let most_in = format!("at most {most} in a minute");
        let label = format!("{} in each minute of the last hour: {sum} together{of_which}, {most_in}", self.title);
        let width = MINUTES * STEP;
        html! {
            figure {
                figcaption {
                    (self.title) " " strong { (sum) } small { "in the last hour" (of_which) }
                }
                svg viewBox={ "0 0 " (width) " " (HEIGHT + 2) } preserveAspectRatio="none" role="img"
                    aria-label=(label) {
                    path class="base" d={ "M0 " (HEIGHT) "h" (width) "v1H0z" } {}
                    path class="bar" d=(bars(&self.bars, most)) {}
                    path class="part" d=(bars(&self.parts, most)) {}
                }
                small class="span" { span { "60 min ago" } span { (most_in) } span { "now" } }
            }
        }
    }
}

/// One path with a bar for each minute that is not 0. A bar is at least two units high, so that one in a thousand
/// shows.
fn bars(values: &[u64; MINUTES], most: u64) -> String {
    let bar = |(minute, value): (usize, &u64)| {
        let height = (HEIGHT * value).checked_div(most)?.max(2);
        (*value > 0).then(|| format!("M{} {HEIGHT}v-{height}h{BAR}v{height}z", minute * STEP))
    };
    values.iter().enumerate().filter_map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_bar_fills_the_chart_and_the_lowest_one_can_be_seen() {
        let mut values = [0; MINUTES];
        assert_eq!(bars(&values, 0), "");
        (values[0], values[59]) = (1, 1000);
        assert_eq!(bars(&values, 1000), "M0 100v-2h4v2zM295 100v-100h4v100z");
    }
}
