//! The law: how fast calls may follow each other, learned from Amazon's refusals alone. Pure: time is an argument.
//!
//! Amazon publishes no limits, and they move with its load. The law therefore knows nothing before the first refusal
//! (a 429, or what counts as one), and never delays a call before it. From then on it is a generic cell rate algorithm
//! (GCRA) whose rate follows refusals in the manner of TCP: additive increase, multiplicative decrease (AIMD), with
//! the memory of CUBIC (RFC 9438) for where the limit was.
//!
//! - A refusal **pauses** all calls: for `Retry-After`, or for a default that doubles with each refusal in a row.
//! - It **halves** the rate, once per overload: calls that were under way already when the first of them was refused
//!   say nothing new.
//! - The rate returns within `RECOVERY` seconds to just below the *ceiling*, the limit as it was last seen, then
//!   **rises slowly**, and faster the longer no refusal follows.
//! - The **ceiling** is `KEPT` of the rate at which Amazon refused last. After two refusals in quick succession it is
//!   `QUICK` of that rate: the limit has fallen.
//!
//! Latency plays no part: it says nothing about a quota. `tests/bench/throttle_simulation.rs` simulates the law beside
//! others, and justifies the constants. More than 400 lines with the tests, which share the law's private constants.

/// Seconds of monotonic time since an arbitrary instant.
pub type Seconds = f64;

/// Longest pause, in seconds, whatever `Retry-After` says: a header that is wrong by a digit must not stop an app for a
/// day.
pub const MAX_PAUSE: Seconds = 15.0 * 60.0;

/// Share by which a pause is lengthened at random, so that several processes do not all return in the same instant.
pub const JITTER: f64 = 0.1;

/// Longest default pause, in seconds, for refusals in a row without `Retry-After`.
const MAX_DEFAULT_PAUSE: Seconds = 64.0;

/// Time in which the rate returns from half of the ceiling to [`CAUTIOUS`] of it, in seconds.
const RECOVERY: Seconds = 1.0;

/// Share of the ceiling from which the rate rises slowly.
const CAUTIOUS: f64 = 0.97;

/// Linear part of the rise, as a share of the ceiling per second.
const LINEAR: f64 = 0.002;

/// Seconds after which the cubic part of the rise alone has doubled the rate.
const CUBIC: Seconds = 24.0;

/// The same as long as the ceiling is a guess, half of the busiest second before the first refusal.
const CUBIC_AT_FIRST: Seconds = 5.0;

/// Linear part of the rise in calls per second, per second: it lets a bucket with a very low ceiling recover.
const FLOOR_RISE: f64 = 0.01;

/// Lowest ceiling, in calls per second.
const MIN_CEILING: f64 = 0.2;

/// Share of the refused rate that becomes the ceiling.
const KEPT: f64 = 0.9;

/// The same for a refusal that follows another one within [`QUICKLY`].
const QUICK: f64 = 0.7;

/// Time between two refusals in which the rate cannot have risen much, so that the limit has fallen, in seconds.
const QUICKLY: Seconds = 4.0;

/// How much longer than the rate allows calls are expected to wait: in a long queue a refusal often intervenes, and
/// pauses all of them. In the campaign `throttle-storm` the longest waits were a fifth longer without it.
const MARGIN: f64 = 1.1;

/// By how much two processes may tell the same instant differently, in seconds.
const CLOCK_TOLERANCE: Seconds = 0.1;

/// Seconds' worth of calls that may follow each other at once after a break; at least one call.
const BURST: Seconds = 0.1;

/// How calls to one bucket are paced since its first refusal.
#[derive(Clone, Debug, PartialEq)]
pub struct Law {
    /// What was learned.
    pub learned: Learned,
    /// The share of the rate that is this process's: 1, unless others send calls to the same bucket.
    pub share: f64,
    /// The published limit, in calls per second, if there is one: the rate never exceeds it.
    published: f64,
    /// The theoretical arrival time of the next call (ITU-T I.371).
    tat: Seconds,
}

/// What was learned about one bucket. Processes that share a limit share this.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learned {
    /// The limit as it was last seen, in calls per second.
    pub ceiling: f64,
    /// Seconds in which the cubic part of the rise doubles the rate.
    pub cubic: Seconds,
    /// The end of the last pause.
    pub resumed: Seconds,
    /// When the last refusal that halved the rate arrived.
    pub refused: Seconds,
    /// Refusals in a row, none accepted between them.
    pub streak: u32,
    /// The number of times the rate was halved.
    pub epoch: u32,
}

/// A refusal by Amazon.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// When it arrived.
    pub at: Seconds,
    /// The epoch in which the refused call was sent.
    pub epoch: u32,
    /// The pause that `Retry-After` asks for.
    pub advised: Option<Seconds>,
    /// The pause if there is no `Retry-After`.
    pub default: Seconds,
    /// At random, from 0 to 1.
    pub dice: f64,
    /// The most calls that Amazon accepted within a second, lately.
    pub peak: f64,
}

impl Law {
    /// The law after the first refusal. `published` is the published limit, in calls per second.
    pub fn begin(refusal: &Refusal, published: Option<f64>) -> Self {
        let ceiling = match published {
            // More calls than that were accepted, or about as many: the limit is the published one.
            Some(published) if refusal.peak >= KEPT * published => KEPT * published,
            _ => refusal.peak / 2.0,
        };
        let learned = Learned {
            ceiling: ceiling.max(MIN_CEILING),
            cubic: CUBIC_AT_FIRST,
            resumed: refusal.at,
            refused: refusal.at,
            streak: 0,
            epoch: 1,
        };
        let mut law = Self::knowing(learned, published, refusal.at);
        law.pause(refusal);
        law
    }

    /// Corrects the guess after the first refusal: all processes together sent `peak` calls within a second.
    pub fn guess(&mut self, peak: f64) {
        if self.learned.epoch == 1 {
            self.learned.ceiling = self.learned.ceiling.max(peak.min(self.published) / 2.0);
        }
    }

    /// The law from `now` on, by what another process has learned.
    pub fn knowing(learned: Learned, published: Option<f64>, now: Seconds) -> Self {
        Self { learned, share: 1.0, published: published.unwrap_or(f64::INFINITY), tat: now }
    }

    /// Learns from a further refusal.
    pub fn refused(&mut self, refusal: &Refusal) {
        if refusal.epoch == self.learned.epoch {
            // Calls were faster than the rate if nothing held them back, and slower if there were fewer.
            let rate = self.rate(refusal.at).min(refusal.peak.max(MIN_CEILING));
            let follows_quickly = refusal.at - self.learned.refused < QUICKLY;
            if !follows_quickly {
                self.learned.cubic = CUBIC;
            }
            self.learned.ceiling = (rate * if follows_quickly { QUICK } else { KEPT }).max(MIN_CEILING);
            self.learned.refused = refusal.at;
            self.learned.epoch = self.learned.epoch.wrapping_add(1);
        }
        self.pause(refusal);
    }

    /// Learns that Amazon accepted a call.
    pub fn accepted(&mut self) {
        self.learned.streak = 0;
    }

    fn pause(&mut self, refusal: &Refusal) {
        let pause = match refusal.advised {
            Some(advised) => advised,
            // Calls that were in flight together are refused together, which is one refusal.
            None if refusal.at < self.learned.resumed => return,
            None => {
                let doubled = refusal.default * f64::from(1u32 << self.learned.streak.min(10));
                self.learned.streak = self.learned.streak.saturating_add(1);
                doubled.min(MAX_DEFAULT_PAUSE.max(refusal.default))
            }
        };
        let jittered = pause * (1.0 + JITTER * refusal.dice.clamp(0.0, 1.0));
        self.learned.resumed = self.learned.resumed.max(refusal.at + jittered.clamp(0.0, MAX_PAUSE));
    }

    /// The current epoch: a call carries the epoch in which it was sent.
    pub fn epoch(&self) -> u32 {
        self.learned.epoch
    }

    /// The end of the current or last pause.
    pub fn paused_until(&self) -> Seconds {
        self.learned.resumed
    }

    /// The rate of all processes together, in calls per second, that applies at `now`, pauses aside.
    pub fn rate(&self, now: Seconds) -> f64 {
        let since = (now - self.learned.resumed).max(0.0);
        let risen = (since - RECOVERY).max(0.0);
        let share = CAUTIOUS - (CAUTIOUS - 0.5) * (1.0 - since / RECOVERY).max(0.0)
            + LINEAR * risen
            + (risen / self.learned.cubic).powi(3);
        (self.learned.ceiling * share + FLOOR_RISE * risen).min(self.published)
    }

    fn own_rate(&self, now: Seconds) -> f64 {
        self.rate(now) * self.share
    }

    /// How long a call of this weight has to wait at `now`; 0 if it may be sent.
    pub fn wait(&self, now: Seconds) -> Seconds {
        let tolerance = (BURST - 1.0 / self.own_rate(now)).max(0.0);
        (self.learned.resumed - now).max(self.tat - tolerance - now).max(0.0)
    }

    /// Counts a call of `weight` that is sent at `now`.
    pub fn take(&mut self, now: Seconds, weight: f64) {
        // The calls of a pause are not made up for.
        self.tat = self.tat.max(now) + weight / self.own_rate(now);
    }

    /// How long, from `now`, until `calls` further calls were sent, with a `MARGIN` for refusals meanwhile.
    pub fn expected(&self, now: Seconds, calls: f64) -> Seconds {
        let start = self.learned.resumed.max(now);
        let sent = |wait: Seconds| self.share * (self.volume(now + wait) - self.volume(start));
        let (mut least, mut most) = (start - now, start - now + 1.0);
        while sent(most) < calls && most < 4.0 * MAX_PAUSE {
            (least, most) = (most, 2.0 * most);
        }
        for _ in 0..24 {
            let middle = f64::midpoint(least, most);
            if sent(middle) < calls { least = middle } else { most = middle }
        }
        let paused = start - now;
        (paused + MARGIN * (most - paused)).max(self.wait(now))
    }

    /// The number of calls that the rate allows from the end of the pause to `now`: the integral of
    /// [`rate`](Self::rate).
    fn volume(&self, now: Seconds) -> f64 {
        let since = (now - self.learned.resumed).max(0.0);
        let (early, risen) = (since.min(RECOVERY), (since - RECOVERY).max(0.0));
        let recovering = 0.5 * early + (CAUTIOUS - 0.5) * early * early / (2.0 * RECOVERY);
        let share = recovering
            + CAUTIOUS * risen
            + LINEAR * risen * risen / 2.0
            + risen.powi(4) / (4.0 * self.learned.cubic.powi(3));
        (self.learned.ceiling * share + FLOOR_RISE * risen * risen / 2.0).min(self.published * since)
    }
}

impl Learned {
    /// Takes over what another process has learned, where that is newer: each halving counts once, whoever saw it, and
    /// nobody calls before the last pause has ended.
    pub fn hear(&mut self, other: Self) {
        let resumed = self.resumed.max(other.resumed);
        if other.epoch > self.epoch {
            *self = other;
        } else if other.epoch == self.epoch {
            // The same overload. What one process sent alone is less than what all sent.
            self.ceiling = self.ceiling.max(other.ceiling);
            self.cubic = self.cubic.max(other.cubic);
            self.streak = self.streak.max(other.streak);
        }
        // Both tell times by the database's clock, to within a few milliseconds.
        if resumed > self.resumed + CLOCK_TOLERANCE {
            self.resumed = resumed;
        }
    }

    /// Whether this says something that a process which knows `other` does not know.
    pub fn is_news_to(&self, other: Self) -> bool {
        self.epoch > other.epoch
            || self.resumed > other.resumed + CLOCK_TOLERANCE
            || self.epoch == other.epoch && self.ceiling > 1.01 * other.ceiling
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A refusal at `at` of a call that was sent in the law's epoch.
    fn refusal(law: Option<&Law>, at: Seconds, advised: Option<Seconds>, peak: f64) -> Refusal {
        Refusal { at, epoch: law.map_or(0, Law::epoch), advised, default: 1.0, dice: 0.0, peak }
    }

    fn begun(peak: f64) -> Law {
        Law::begin(&refusal(None, 0.0, Some(2.0), peak), None)
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-6 * a.abs().max(b.abs()).max(1.0)
    }

    #[test]
    fn the_first_refusal_pauses_and_halves_the_rate() {
        let mut law = begun(40.0);
        assert_eq!((law.paused_until(), law.wait(0.5)), (2.0, 1.5));
        assert!(close(law.learned.ceiling, 20.0) && close(law.rate(2.0), 10.0));
        assert!(close(law.rate(3.0), 0.97 * 20.0), "the rate is back just below the limit after a second");
        law.take(2.0, 1.0);
        assert!(law.wait(2.0) > 0.0 || law.tat <= 2.0 + BURST, "calls are paced");
    }

    #[test]
    fn calls_that_were_under_way_together_halve_the_rate_once() {
        let mut law = begun(40.0);
        let late = Refusal { epoch: 0, ..refusal(None, 0.2, Some(2.0), 40.0) };
        law.refused(&late);
        assert!(close(law.learned.ceiling, 20.0), "they were sent before the first refusal");
        assert_eq!(law.paused_until(), 2.2, "but their Retry-After counts");
        law.refused(&refusal(Some(&law), 3.0, Some(1.0), 19.0));
        assert!(law.learned.ceiling < 14.0, "another refusal soon after: the limit is lower than it seemed");
    }

    #[test]
    fn the_ceiling_remembers_where_the_limit_was() {
        let mut law = begun(40.0);
        assert!(law.rate(20.0) > 25.0);
        law.refused(&refusal(Some(&law), 20.0, Some(1.0), 25.0));
        assert!(
            close(law.learned.ceiling, KEPT * 25.0),
            "Amazon accepted no more than 25 in a second: {}",
            law.learned.ceiling
        );
        assert!(
            close(law.rate(21.0), 0.5 * law.learned.ceiling) && close(law.rate(22.0), CAUTIOUS * law.learned.ceiling)
        );
    }

    #[test]
    fn without_retry_after_each_refusal_in_a_row_doubles_the_pause() {
        let mut law = Law::begin(&refusal(None, 0.0, None, 10.0), None);
        let mut now = 0.0;
        for pause in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0] {
            assert!(close(law.paused_until(), now + pause), "{pause}: {}", law.paused_until() - now);
            now = law.paused_until() + 0.1;
            law.refused(&refusal(Some(&law), now, None, 0.0));
        }
        law.accepted();
        now = law.paused_until();
        law.refused(&refusal(Some(&law), now, None, 1.0));
        assert!(close(law.paused_until(), now + 1.0), "an accepted call ends the row");
    }

    #[test]
    fn no_retry_after_pauses_longer_than_a_quarter_of_an_hour() {
        for (advised, pause) in [(1e9, MAX_PAUSE), (901.0, MAX_PAUSE), (899.0, 899.0), (0.0, 0.0)] {
            let law = Law::begin(&refusal(None, 5.0, Some(advised), 10.0), None);
            assert!(close(law.paused_until(), 5.0 + pause));
        }
        let jittered = Law::begin(&Refusal { dice: 1.0, ..refusal(None, 0.0, Some(10.0), 1.0) }, None);
        assert!(close(jittered.paused_until(), 11.0));
    }

    #[test]
    fn a_published_limit_is_never_exceeded() {
        let law = Law::begin(&refusal(None, 0.0, Some(1.0), 1000.0), Some(100.0));
        assert!(close(law.learned.ceiling, KEPT * 100.0), "the learned limit begins at the published one");
        assert!((0..10_000).all(|second| law.rate(f64::from(second)) <= 100.0));
        let law = Law::begin(&refusal(None, 0.0, Some(1.0), 20.0), Some(100.0));
        assert!(close(law.learned.ceiling, 10.0), "Amazon allows less than it publishes");
    }

    #[test]
    fn a_bucket_that_was_quiet_for_minutes_is_hardly_limited_any_more() {
        let law = begun(2.0);
        assert!(law.rate(300.0) > 100.0 * law.learned.ceiling);
    }

    #[test]
    fn the_expected_wait_is_when_the_calls_were_sent() {
        let mut law = begun(40.0);
        let told = law.expected(0.0, 60.0);
        // Sends as the law allows, every millisecond.
        let (mut now, mut sent) = (0.0, 0);
        while sent < 60 {
            while law.wait(now) <= 0.0 && sent < 60 {
                law.take(now, 1.0);
                sent += 1;
            }
            now += 0.001;
        }
        assert!(told >= now && told <= 1.2 * now, "told {told}, was {now}");
    }

    #[test]
    fn two_processes_that_see_one_overload_halve_the_rate_once() {
        let (mut one, mut other) = (begun(40.0), begun(40.0));
        assert!(!one.learned.is_news_to(other.learned));
        one.refused(&refusal(Some(&one), 20.0, Some(5.0), 30.0));
        assert!(one.learned.is_news_to(other.learned) && !other.learned.is_news_to(one.learned));
        // The other one is refused too, before it hears of it, and sent less.
        other.refused(&refusal(Some(&other), 20.1, Some(1.0), 12.0));
        let ceiling = one.learned.ceiling;
        one.learned.hear(other.learned);
        other.learned.hear(one.learned);
        assert_eq!((one.learned.epoch, other.learned.epoch), (2, 2));
        assert!(close(one.learned.ceiling, ceiling) && close(other.learned.ceiling, ceiling), "{other:?}");
        assert!(close(other.paused_until(), 25.0), "nobody calls before the last pause has ended");
        // Who missed several refusals takes over the result.
        let mut late = begun(80.0);
        late.learned.hear(one.learned);
        assert_eq!(late.learned, one.learned);
    }

    #[test]
    fn a_share_of_the_rate_is_paced_and_told_as_such() {
        let (mut whole, mut quarter) = (begun(40.0), begun(40.0));
        quarter.share = 0.25;
        assert!(close(whole.rate(5.0), quarter.rate(5.0)), "the rate is that of all processes");
        let told = [whole.expected(2.0, 15.0), quarter.expected(2.0, 15.0)];
        assert!(told[1] > 2.5 * told[0], "{told:?}");
        for law in [&mut whole, &mut quarter] {
            (0..4).for_each(|_| law.take(5.0, 1.0));
        }
        assert!(quarter.wait(5.0) > 3.0 * whole.wait(5.0), "{} {}", quarter.wait(5.0), whole.wait(5.0));
    }

    proptest! {
        /// Whatever is refused, and whenever: pauses and rates stay within their bounds.
        #[test]
        fn pauses_and_rates_stay_within_their_bounds(
            events in prop::collection::vec(
                (0.0f64..100.0, prop::option::of(0.0f64..1e12), any::<bool>(), 0.0f64..1e6), 1..40),
        ) {
            let mut law: Option<Law> = None;
            let mut now = 0.0;
            for (after, advised, current, peak) in events {
                now += after;
                let mut event = refusal(law.as_ref(), now, advised, peak);
                if !current {
                    event.epoch = event.epoch.wrapping_sub(1);
                }
                match &mut law {
                    Some(law) => law.refused(&event),
                    None => law = Some(Law::begin(&event, None)),
                }
                let law = law.as_mut().unwrap();
                prop_assert!(law.paused_until() <= now + MAX_PAUSE + 1e-6);
                prop_assert!(law.learned.ceiling >= MIN_CEILING && law.learned.ceiling.is_finite());
                prop_assert!(law.wait(now) <= MAX_PAUSE + 1e-6);
                prop_assert!(law.rate(now) >= MIN_CEILING / 2.0);
                prop_assert!(law.expected(now, 1.0) >= law.wait(now));
            }
        }

        /// A refusal never raises the rate, and halves it at least.
        #[test]
        fn a_refusal_never_raises_the_rate(gap in 0.0f64..300.0, peak in 0.0f64..1000.0) {
            let mut law = begun(40.0);
            let now = 2.0 + gap;
            let before = law.rate(now);
            law.refused(&refusal(Some(&law), now, Some(0.0), peak));
            prop_assert!(law.rate(now) <= before.max(MIN_CEILING));
            prop_assert!(law.rate(now) <= 0.5 * before.max(2.0 * MIN_CEILING) + 1e-9);
        }

        /// Without a refusal the rate never falls once the pause is over.
        #[test]
        fn the_rate_only_rises_without_refusals(peak in 0.0f64..1000.0, from in 0.0f64..1000.0, by in 0.0f64..1000.0) {
            let law = begun(peak);
            prop_assert!(law.rate(from + by) >= law.rate(from));
        }

        /// However calls arrive, no second gets more of them than the rate and the burst allow.
        #[test]
        fn calls_never_exceed_rate_and_burst(arrivals in prop::collection::vec(0.0f64..0.2, 1..400)) {
            let mut law = begun(40.0);
            let (mut now, mut sent) = (0.0, Vec::new());
            for gap in arrivals {
                now += gap;
                if law.wait(now) <= 0.0 {
                    law.take(now, 1.0);
                    sent.push(now);
                }
            }
            for (index, start) in sent.iter().enumerate() {
                let within = sent[index..].iter().take_while(|at| **at < start + 1.0).count();
                let allowed = law.volume(start + 1.0) - law.volume(*start);
                prop_assert!(within as f64 <= allowed + BURST * law.rate(start + 1.0) + 2.0, "{within} > {allowed}");
            }
        }

        /// The integral is that of the rate.
        #[test]
        fn the_volume_is_the_integral_of_the_rate(peak in 1.0f64..1000.0, until in 0.0f64..60.0) {
            let law = begun(peak);
            let steps = 4000;
            let step = until / f64::from(steps);
            let sum: f64 = (0..steps).map(|index| law.rate(2.0 + (f64::from(index) + 0.5) * step) * step).sum();
            let volume = law.volume(2.0 + until);
            prop_assert!((volume - sum).abs() <= 1e-3 * sum.max(1.0), "{volume} and {sum}");
        }
    }
}
