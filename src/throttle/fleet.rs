//! Several processes, one limit: with a shared store each process tells the others what it has learned, how many calls
//! it has and what runs at Amazon through it, and takes its share of the rate.
//!
//! Nothing here is on a call's path. What was learned about all buckets is exchanged in one statement, twice a second
//! while Amazon's limits matter, at once after a refusal, and now and then otherwise. So it arrives late, and what two
//! processes learned apart is merged ([`Learned::hear`]). While the database fails, each process keeps its last share
//! and goes on learning from its own refusals.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::bucket::{Buckets, Others, Report};
use super::gate::{Count, Counted, Heard};
use super::law::{Learned, Seconds};
use super::memory::Memory;
use crate::store::{SharedLimit, ThrottleReport, ThrottleRow, TokenStore};

/// Interval between two exchanges while Amazon has refused calls of a bucket that is in use.
const ACTIVE: Duration = Duration::from_millis(500);

/// Interval while only jobs are counted, which last for minutes.
const COUNTING: Duration = Duration::from_secs(1);

/// Interval between two exchanges otherwise. A process that nobody calls exchanges nothing.
const QUIET: Duration = Duration::from_secs(5);

/// Pause before an exchange after a refusal, in which further refusals join it, and shortest pause after an exchange.
const BATCH: Duration = Duration::from_millis(50);
const SPACING: Duration = Duration::from_millis(200);

/// Least share of the rate, so that a process which had no calls may send its first ones.
const LEAST_SHARE: f64 = 0.02;

/// Exchanges what was learned with the other processes that use `store`. Runs until dropped; returns at once if the
/// store is not shared.
pub async fn keep(memory: Arc<Memory>, store: TokenStore) {
    let Some(database) = store.shared() else { return };
    let mut interval = QUIET;
    loop {
        if timeout(interval, memory.news.notified()).await.is_ok() {
            sleep(BATCH).await;
        }
        let Some((client, buckets)) = memory.current() else { continue };
        let now = memory.now();
        let reports: Vec<_> = buckets.all().filter_map(|bucket| bucket.report(now)).collect();
        let counts = buckets.gates.counts();
        let counting = !counts.is_empty() || buckets.gates.hear_of_others();
        if reports.is_empty() && !counting && !buckets.all().any(|bucket| bucket.is_used(now)) {
            interval = QUIET;
            continue;
        }
        interval = match (reports.is_empty(), counting) {
            (false, _) => ACTIVE,
            (true, true) => COUNTING,
            (true, false) => QUIET,
        };
        let mine: Vec<_> =
            reports.iter().map(|report| to_share(report, now)).chain(counts.iter().map(count_to_share)).collect();
        match database.share_throttle(&client, &mine).await {
            Ok(rows) => hear(&memory, &rows, &reports),
            Err(error) => tracing::debug!(%error, "what was learned about Amazon's limits could not be shared"),
        }
        sleep(SPACING).await;
    }
}

fn to_share(report: &Report, now: Seconds) -> ThrottleReport {
    let learned = report.learned.map(|learned| SharedLimit {
        epoch: learned.epoch,
        ceiling: learned.ceiling,
        cubic: learned.cubic,
        resumes_in: learned.resumed - now,
        refused_ago: now - learned.refused,
        streak: learned.streak,
    });
    ThrottleReport {
        bucket: report.bucket.to_string(),
        learned,
        want: report.want,
        sent: report.sent,
        peak: report.peak,
    }
}

/// What runs at Amazon through this process, in the row of a bucket that has no rate.
fn count_to_share(count: &Count) -> ThrottleReport {
    let holds = if count.holds { 1.0 } else { 0.0 };
    ThrottleReport { bucket: count.name.clone(), learned: None, want: count.running as f64, sent: holds, peak: 0.0 }
}

/// The counts of the others, by the names of the gates.
fn counts_of(rows: &[ThrottleRow]) -> HashMap<String, Heard> {
    let heard = |row: &ThrottleRow| {
        let running: f64 = row.others.iter().map(|[running, ..]| running).sum();
        let holds = row.others.iter().any(|[_, holds, _]| *holds > 0.0);
        (row.bucket.clone(), Heard::new(running as usize, holds))
    };
    rows.iter().filter(|row| Counted::is_name(&row.bucket) && !row.others.is_empty()).map(heard).collect()
}

/// Takes over what the others know.
fn hear(memory: &Memory, rows: &[ThrottleRow], reports: &[Report]) {
    let Some((_, buckets)) = memory.current() else { return };
    buckets.gates.hear(counts_of(rows));
    let now = memory.now();
    let own: HashMap<_, _> = reports.iter().map(|report| (report.bucket.to_string(), report)).collect();
    let names: HashMap<_, _> = Buckets::names().map(|name| (name.to_string(), name)).collect();
    for row in rows {
        // A newer version may have buckets that this one does not know.
        let (Some(name), Some(limit)) = (names.get(&row.bucket), row.limit) else { continue };
        let learned = Learned {
            epoch: limit.epoch,
            ceiling: limit.ceiling,
            cubic: limit.cubic,
            resumed: now + limit.resumes_in,
            refused: now - limit.refused_ago,
            streak: limit.streak,
        };
        let want = own.get(&row.bucket).map_or(0.0, |report| report.want);
        let wants: Vec<f64> = row.others.iter().map(|[want, ..]| *want).collect();
        let others = Others {
            sent: row.others.iter().map(|[_, sent, _]| sent).sum(),
            peak: row.others.iter().map(|[.., peak]| peak).sum(),
        };
        buckets.of(*name).hear(learned, others, |rate| share(want, &wants, rate), now);
    }
}

/// The share of `rate` of a process that could send `want` calls per second, beside others that could send `others`:
/// each gets what it wants, up to a level that is the same for all; and what nobody wants is divided evenly.
fn share(want: f64, others: &[f64], rate: f64) -> f64 {
    let mut wants: Vec<f64> = others.iter().copied().chain([want]).map(|want| want.max(0.0)).collect();
    wants.sort_by(f64::total_cmp);
    let (mut left, mut level) = (rate, f64::INFINITY);
    for (index, wanted) in wants.iter().enumerate() {
        let even = left / (wants.len() - index) as f64;
        if *wanted > even {
            level = even;
            break;
        }
        left -= wanted;
    }
    let spare = if level.is_finite() { 0.0 } else { left / wants.len() as f64 };
    ((want.max(0.0).min(level) + spare) / rate).clamp(LEAST_SHARE, 1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn who_wants_little_gets_it_and_the_others_share_the_rest_evenly() {
        for (want, others, rate, expected) in [
            (50.0, &[][..], 20.0, 1.0),
            (0.0, &[], 20.0, 1.0),
            (50.0, &[50.0, 50.0, 50.0], 20.0, 0.25),
            (50.0, &[2.0, 50.0, 2.0], 20.0, 0.4),
            (2.0, &[50.0, 50.0, 2.0], 20.0, 0.1),
            // Nobody wants all of it.
            (4.0, &[4.0], 20.0, 0.5),
            (4.0, &[0.0], 20.0, 0.6),
            (0.0, &[4.0], 20.0, 0.4),
            // A process without calls may send its first.
            (0.0, &[50.0], 20.0, LEAST_SHARE),
        ] {
            let share = share(want, others, rate);
            assert!((share - expected).abs() < 1e-9, "{want} beside {others:?}: {share}");
        }
    }

    proptest! {
        /// All shares together are the whole rate, but for the least ones.
        #[test]
        fn all_processes_together_keep_to_the_rate(
            wants in prop::collection::vec(0.0f64..100.0, 1..30), rate in 0.1f64..200.0,
        ) {
            let of = |index: usize| {
                let mut others = wants.clone();
                let want = others.remove(index);
                share(want, &others, rate)
            };
            let sum: f64 = (0..wants.len()).map(of).sum();
            let least = LEAST_SHARE * wants.len() as f64;
            prop_assert!(sum <= 1.0 + least + 1e-9 && sum >= 1.0 - 1e-9, "{}", sum);
        }
    }
}
