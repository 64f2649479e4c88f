//! The Prometheus metrics. No text that a caller chooses freely (a path, a query, a header) becomes a label.
//!
//! The file is long because it is a list: each metric with its help text, in the order of the manual.

mod budget;
mod recent_calls;
mod register;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus::core::{Collector, Desc};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder,
};

use crate::domain::account::Region;
use crate::domain::grant::State;
use crate::telemetry::log::Dropped;
use budget::Budget;
pub use recent_calls::{RecentCall, RecentCalls};
use register::Register;

/// Limits of the exported metrics.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `metrics.max_user_series`: most users with series of their own. Further users share the series `other`.
    pub max_user_series: usize,
}

/// Buckets of request durations, in seconds: from a very fast response to the default response timeout.
const DURATIONS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
/// Buckets of store operations, in seconds. A sled commit takes about a millisecond.
const STORE_DURATIONS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0];
/// The value of the label `user` for all users beyond `max_user_series`.
const OTHER: &str = "other";

/// Reasons for failed refreshes that are known in advance. Their series exist from the start, because Prometheus cannot
/// see the increase of a counter whose first value is not 0.
pub const REFRESH_FAILURES: [&str; 13] = [
    "bad_answer",
    "dns",
    "internal",
    "invalid_client",
    "invalid_grant",
    "invalid_request",
    "invalid_scope",
    "server_error",
    "throttled",
    "timeout",
    "tls",
    "unauthorized_client",
    "unreachable",
];

/// Reasons for which requests are refused before anything is sent.
pub const GUARD_REASONS: [&str; 9] =
    ["caller_token", "cross_site", "framing", "host", "method", "no_host", "peer_uid", "policy", "target"];

/// All metrics. Those about users are rebuilt at each scrape, so that none can be stale.
#[derive(Debug)]
#[allow(missing_docs, reason = "each field is the metric of its name in the table of metrics in README.md")]
pub struct Metrics {
    registry: Registry,
    descriptions: Vec<Desc>,
    max_user_series: AtomicUsize,
    page: Mutex<Page>,
    /// No metric: the latest requests, for the status page.
    pub recent_calls: RecentCalls,
    pub requests: IntCounterVec,
    /// By [`Source`].
    pub request_duration: [Histogram; 2],
    /// By [`Region`].
    pub upstream_duration: [Histogram; Region::ALL.len()],
    pub in_flight: IntGauge,
    pub connections: IntGaugeVec,
    pub replays: IntCounter,
    pub upstream_unauthorized: IntCounterVec,
    pub unknown_family: IntCounter,
    pub token_refresh: IntCounterVec,
    pub token_refresh_duration: Histogram,
    pub store_up: IntGauge,
    pub store_lag: Gauge,
    pub store_cached_users: IntGauge,
    pub store_operation_duration: HistogramVec,
    pub store_errors: IntCounterVec,
    store_records: IntGaugeVec,
    store_recoveries: IntCounter,
    pub guard_denied: IntCounterVec,
    pub throttled: IntCounterVec,
    pub notifications: IntCounterVec,
    throttle_rate: GaugeVec,
    throttle_paused_until: GaugeVec,
    throttle_waiting: IntGaugeVec,
    throttle_running: IntGaugeVec,
    throttle_waiting_bytes: IntGauge,
    pub throttle_wait: Histogram,
    undecryptable_records: IntGauge,
    pub policy_denied: IntCounterVec,
    pub clock_skew: Gauge,
    pub clock_jumps: IntCounter,
    pub token_answer_oddities: IntCounterVec,
    pub refresh_interrupted: IntCounterVec,
    pub refresh_dropped: IntCounter,
    pub token_rotations: IntCounter,
    log_dropped: IntCounterVec,
    reload_timestamp: Gauge,
    reload_success: IntGauge,
    token_expiry: GaugeVec,
    token_last_refresh: GaugeVec,
    consent_expiry: GaugeVec,
    consent_ending: IntGaugeVec,
    login_required: IntGaugeVec,
    users: IntGaugeVec,
}

/// Who responded to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Amazon.
    Amazon,
    /// adsidecar itself.
    Sidecar,
}

impl Source {
    /// The source as the metrics' label, and in the log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Amazon => "amazon",
            Self::Sidecar => "sidecar",
        }
    }
}

/// Counts since the start, of which differences are charted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests to the proxy listener.
    pub requests: u64,
    /// Those whose response has a status from 400.
    pub errors: u64,
    /// Refreshes of access tokens.
    pub refreshes: u64,
    /// Those that failed.
    pub failed_refreshes: u64,
    /// Requests that waited for their turn.
    pub waits: u64,
}

/// The rendered metrics of the last scrape.
#[derive(Debug)]
struct Page {
    budget: Budget,
    text: Bytes,
}

/// One user's health at the time of a scrape. Times are in seconds since 1970.
#[derive(Clone, Debug)]
pub struct UserHealth {
    /// User id.
    pub user: String,
    /// Reported state of the user.
    pub state: State,
    /// When the access token expires; `None` for idle users.
    pub token_expiry: Option<f64>,
    /// When the token was last refreshed; `None` for idle users.
    pub last_refresh: Option<f64>,
    /// When the consent expires; `None` if that is not known or it does not expire.
    pub consent_expiry: Option<f64>,
    /// Whether the consent expires within 30 days or has expired; `None` if that is not known or it does not expire.
    pub consent_ending: Option<bool>,
    /// Why the user has to log in again; `None` if no login is required.
    pub login_reason: Option<&'static str>,
}

impl Metrics {
    /// Creates and registers every metric. `started_at` is in seconds since 1970.
    ///
    /// # Errors
    /// Fails if a metric's name or labels are invalid.
    // The function is long because it is one list with an entry per metric.
    pub fn new(settings: Settings, started_at: f64) -> Result<Self, prometheus::Error> {
        let r = Register::new()?;
        let build = r.gauges("build_info", "Always 1", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let reload_timestamp = r.float("config_reload_timestamp_seconds", "When the configuration was last read")?;
        let reload_success =
            r.gauge("config_reload_success", "Whether the configuration was read successfully the last time")?;
        #[cfg(target_os = "linux")]
        let process = prometheus::process_collector::ProcessCollector::for_self();
        let metrics = Self {
            max_user_series: AtomicUsize::new(settings.max_user_series),
            reload_timestamp,
            reload_success,
            page: Mutex::new(Page { budget: Budget::new(Instant::now()), text: Bytes::new() }),
            recent_calls: RecentCalls::default(),
            requests: r.counters(
                "requests_total",
                "Requests to the proxy listener; source tells whether amazon or the sidecar responded. \
                     Status 499: the caller closed the connection",
                &["account", "region", "method", "status", "source"],
            )?,
            request_duration: {
                let help = "Time to the response head";
                let all = r.histograms("request_duration_seconds", help, &["source"], DURATIONS)?;
                [Source::Amazon, Source::Sidecar].map(|source| all.with_label_values(&[source.as_str()]))
            },
            upstream_duration: {
                let help = "Amazon's share of that time";
                let all = r.histograms("upstream_duration_seconds", help, &["region"], DURATIONS)?;
                Region::ALL.map(|region| all.with_label_values(&[region.as_str()]))
            },
            in_flight: r.gauge("requests_in_flight", "Requests whose response is not complete")?,
            connections: r.gauges("connections", "Open connections, by listener: proxy, login or admin", &["door"])?,
            replays: r.counter("replays_total", "Requests repeated with a new access token")?,
            upstream_unauthorized: r.counters(
                "upstream_unauthorized_total",
                "401 from Amazon: token, or a hint such as scope_missing",
                &["cause"],
            )?,
            unknown_family: r
                .counter("unknown_family_total", "Requests to a path that is not in the table of API families")?,
            token_refresh: r.counters(
                "token_refresh_total",
                "Refreshes, by success or failure",
                &["result", "reason"],
            )?,
            token_refresh_duration: r.histogram(
                "token_refresh_duration_seconds",
                "Duration of refreshes",
                DURATIONS,
            )?,
            store_up: r.gauge("store_up", "0: the store fails, or a change is not on disk yet")?,
            store_lag: r.float(
                "store_lag_seconds",
                "For how long changes that other processes made in a shared store may be unknown here; about 1 is \
                     ordinary, 0: no process shares the store",
            )?,
            store_cached_users: r.gauge(
                "store_cached_users",
                "Users that this process holds in memory; of a shared store at most about store.cache",
            )?,
            store_operation_duration: r.histograms(
                "store_operation_duration_seconds",
                "Duration of store operations",
                &["op"],
                STORE_DURATIONS,
            )?,
            store_errors: r.counters("store_errors_total", "Failed store operations", &["op"])?,
            store_records: r.gauges(
                "store_records",
                "Stored grants by the fingerprint of the Fernet key that encrypts them; unknown: no \
                     configured key decrypts them, damaged: changed outside adsidecar",
                &["key"],
            )?,
            store_recoveries: r
                .counter("store_recoveries_total", "How often a damaged database was restored from its mirror")?,
            clock_skew: r.float(
                "clock_skew_seconds",
                "How far this machine's clock is ahead of Amazon's, in whole seconds; measured at each \
                     refresh, and every 10 seconds from an Ads API response",
            )?,
            clock_jumps: r.counter("clock_jumps_total", "How often the clock was set or the machine was suspended")?,
            token_answer_oddities: r.counters(
                "token_answer_oddities_total",
                "Tolerated deviations in token responses, such as expires_in_missing",
                &["kind"],
            )?,
            refresh_dropped: r.counter(
                "token_refresh_dropped_total",
                "Refreshes dropped because the user logged out or logged in again meanwhile",
            )?,
            token_rotations: r.counter(
                "token_rotations_total",
                "Refreshes that returned a new refresh token. Amazon returns the same one today",
            )?,
            refresh_interrupted: r.counters(
                "token_refresh_interrupted_total",
                "Refreshes whose response may have been lost, by the fate of the grant: recovered or lost",
                &["outcome"],
            )?,
            throttled: r.counters(
                "throttled_total",
                "429 responses from Amazon (by=\"amazon\"), also those that no caller saw because the request was sent \
                     again, and of adsidecar itself (by=\"sidecar\")",
                &["region", "by"],
            )?,
            throttle_rate: r.floats(
                "throttle_rate",
                "Learned rate in requests per second; absent until Amazon has refused one",
                &["region", "family", "kind"],
            )?,
            throttle_paused_until: r.floats(
                "throttle_paused_until_timestamp_seconds",
                "When Amazon will probably accept requests again; 0: now",
                &["region", "family", "kind"],
            )?,
            throttle_waiting: r.gauges(
                "throttle_waiting",
                "Requests that wait for their turn",
                &["region", "family", "kind"],
            )?,
            throttle_running: r.gauges(
                "throttle_running",
                "Exports, AMC workflow runs and requests with traffic events that run at Amazon, as far as they passed \
                 here",
                &["region", "family"],
            )?,
            throttle_waiting_bytes: r.gauge("throttle_waiting_bytes", "Bytes that waiting requests hold")?,
            throttle_wait: r.histogram(
                "throttle_wait_seconds",
                "Time that requests waited for their turn, those that gave up included",
                DURATIONS,
            )?,
            notifications: r.counters(
                "notifications_total",
                "Events for notify.url: delivered, failed (and sent again), dropped",
                &["result"],
            )?,
            undecryptable_records: r.gauge(
                "undecryptable_records",
                "Stored grants that cannot be read, for example because their key was removed; they are \
                     kept",
            )?,
            log_dropped: r.counters(
                "log_dropped_total",
                "Log lines that were not written: flood (too many of one kind), sink (standard error was \
                     not read)",
                &["reason"],
            )?,
            policy_denied: r.counters(
                "policy_denied_total",
                "Requests that the policy refused (enforce) or would have refused (observe)",
                &["account", "mode"],
            )?,
            guard_denied: r.counters("guard_denied_total", "Requests refused by admission", &["reason"])?,
            token_expiry: r.floats(
                "token_expiry_timestamp_seconds",
                "When the access token expires; absent for idle users",
                &["user"],
            )?,
            token_last_refresh: r.floats(
                "token_last_refresh_timestamp_seconds",
                "When the tokens last changed; absent for idle users",
                &["user"],
            )?,
            consent_expiry: r.floats(
                "consent_expiry_timestamp_seconds",
                "When the consent expires, for logins made here",
                &["user"],
            )?,
            consent_ending: r.gauges("consent_ending", "1: the consent expires in less than 30 days", &["user"])?,
            login_required: r.gauges(
                "login_required",
                "1 with a reason: the user must log in again",
                &["user", "reason"],
            )?,
            users: r.gauges(
                "users",
                "Users by state. Processes that share a PostgreSQL each report all users: use max over \
                     them, not sum",
                &["state"],
            )?,
            descriptions: r.descriptions(),
            registry: r.into_registry(),
        };
        #[cfg(target_os = "linux")]
        metrics.registry.register(Box::new(process))?;
        metrics.reloaded(started_at, true);
        metrics.create_series();
        Ok(metrics)
    }

    /// The name (without `adsidecar_`), labels and help text of each metric, in the order of the manual, without those
    /// of the process itself.
    pub fn descriptions(&self) -> &[Desc] {
        &self.descriptions
    }

    /// Sets the metrics about the store's contents: the records by key fingerprint, the number of unreadable records,
    /// and the number of recoveries since the start.
    pub fn set_store_contents(
        &self,
        records: impl IntoIterator<Item = (String, usize)>,
        unreadable: usize,
        recoveries: u64,
    ) {
        self.undecryptable_records.set(i64::try_from(unreadable).unwrap_or(i64::MAX));
        self.store_records.reset();
        for (key, count) in records {
            self.store_records.with_label_values(&[&key]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.store_recoveries.inc_by(recoveries.saturating_sub(self.store_recoveries.get()));
    }

    /// Sets the metrics about the throttle: each bucket's region, family and kind, learned rate, end of the pause in
    /// seconds since 1970 (0: none) and waiting requests; what runs at Amazon, by region and family; and the bytes that
    /// waiting requests hold.
    pub fn set_throttle<'b>(
        &self,
        buckets: impl IntoIterator<Item = ([&'b str; 3], f64, f64, usize)>,
        running: impl IntoIterator<Item = ([&'b str; 2], usize)>,
        waiting_bytes: usize,
    ) {
        self.throttle_running.reset();
        for (labels, count) in running {
            self.throttle_running.with_label_values(&labels).add(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.throttle_waiting_bytes.set(i64::try_from(waiting_bytes).unwrap_or(i64::MAX));
        for (labels, rate, paused_until, waiting) in buckets {
            self.throttle_rate.with_label_values(&labels).set(rate);
            self.throttle_paused_until.with_label_values(&labels).set(paused_until);
            self.throttle_waiting.with_label_values(&labels).set(i64::try_from(waiting).unwrap_or(i64::MAX));
        }
    }

    /// Creates the series that alerts and `rate()` need to exist before their first event.
    fn create_series(&self) {
        self.refresh_interrupted.with_label_values(&["lost"]);
        self.token_refresh.with_label_values(&["success", ""]);
        for reason in REFRESH_FAILURES {
            self.token_refresh.with_label_values(&["failure", reason]);
        }
        for region in [Region::Na, Region::Eu, Region::Fe] {
            for by in ["amazon", "sidecar"] {
                self.throttled.with_label_values(&[region.as_str(), by]);
            }
        }
        for op in ["put", "erase"] {
            self.store_operation_duration.with_label_values(&[op]);
            self.store_errors.with_label_values(&[op]);
        }
        for cause in ["token", "scope_missing", "scope_not_authorized", "scope_unknown"] {
            self.upstream_unauthorized.with_label_values(&[cause]);
        }
        for reason in GUARD_REASONS {
            self.guard_denied.with_label_values(&[reason]);
        }
        for outcome in ["lost", "recovered"] {
            self.refresh_interrupted.with_label_values(&[outcome]);
        }
        for kind in ["expires_in_missing", "expires_in_too_long", "expires_in_unusable", "token_type_missing"] {
            self.token_answer_oddities.with_label_values(&[kind]);
        }
        for result in ["delivered", "failed", "dropped"] {
            self.notifications.with_label_values(&[result]);
        }
        for mode in ["enforce", "observe"] {
            self.policy_denied.with_label_values(&["", mode]);
        }
        self.log_lines(Dropped::default());
    }

    /// Returns the metrics in the Prometheus text format, with the current state of `users`. Under very frequent
    /// scrapes, rendering takes a limited share of the time, and the previous page is returned in between.
    ///
    /// # Errors
    /// Fails if a metric cannot be encoded.
    pub fn page(&self, users: impl FnOnce() -> Vec<UserHealth>) -> Result<Bytes, prometheus::Error> {
        // One scrape at a time, because rendering removes and recreates the series of users.
        let mut page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        if page.text.is_empty() || page.budget.allows(start) {
            page.text = self.render(users())?.into();
            page.budget.spend(start.elapsed());
        }
        Ok(page.text.clone())
    }

    /// Rebuilds the series about users and encodes every metric.
    fn render(&self, mut users: Vec<UserHealth>) -> Result<String, prometheus::Error> {
        for gauges in [&self.token_expiry, &self.token_last_refresh, &self.consent_expiry] {
            gauges.reset();
        }
        self.consent_ending.reset();
        self.login_required.reset();
        for state in State::KNOWN {
            let count = users.iter().filter(|user| user.state == state).count();
            self.users.with_label_values(&[state.as_str()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        users.sort_by(|a, b| a.user.cmp(&b.user));
        let shown = users.len().min(self.max_user_series.load(Relaxed));
        for user in &users[..shown] {
            self.set_user(&user.user, user);
        }
        if let Some(worst) = worst(&users[shown..]) {
            self.set_user(OTHER, &worst);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Sets the series of one user under the label `label`.
    fn set_user(&self, label: &str, user: &UserHealth) {
        let times = [
            (&self.token_expiry, user.token_expiry),
            (&self.token_last_refresh, user.last_refresh),
            (&self.consent_expiry, user.consent_expiry),
        ];
        for (gauge, time) in times {
            if let Some(time) = time {
                gauge.with_label_values(&[label]).set(time);
            }
        }
        if let Some(ending) = user.consent_ending {
            self.consent_ending.with_label_values(&[label]).set(i64::from(ending));
        }
        let required = i64::from(user.login_reason.is_some());
        self.login_required.with_label_values(&[label, user.login_reason.unwrap_or_default()]).set(required);
    }

    /// Records that the configuration was read at `now`, in seconds since 1970. If it was invalid, the timestamp
    /// remains that of the configuration in use.
    pub fn reloaded(&self, now: f64, success: bool) {
        self.reload_success.set(i64::from(success));
        if success {
            self.reload_timestamp.set(now);
        }
    }

    /// Sets the number of log lines that were not written since the start.
    pub fn log_lines(&self, dropped: Dropped) {
        for (reason, lines) in [("flood", dropped.flood), ("sink", dropped.sink)] {
            let counter = self.log_dropped.with_label_values(&[reason]);
            counter.inc_by(lines.saturating_sub(counter.get()));
        }
    }

    /// Whether the configuration was read successfully the last time.
    pub fn reload_succeeded(&self) -> bool {
        self.reload_success.get() == 1
    }

    /// The counts since the start that the status page charts.
    pub fn totals(&self) -> Totals {
        let (requests, errors) = sums(&self.requests, |label, value| label == "status" && value >= "400");
        let (refreshes, failed_refreshes) =
            sums(&self.token_refresh, |label, value| label == "result" && value == "failure");
        Totals { requests, errors, refreshes, failed_refreshes, waits: self.throttle_wait.get_sample_count() }
    }

    /// Applies new limits.
    pub fn reconfigure(&self, settings: Settings) {
        self.max_user_series.store(settings.max_user_series, Relaxed);
    }

    /// Records one store operation.
    pub fn store_operation(&self, op: &str, took: Duration, success: bool) {
        self.store_operation_duration.with_label_values(&[op]).observe(took.as_secs_f64());
        if !success {
            self.store_errors.with_label_values(&[op]).inc();
        }
    }
}

/// The sum of all series of `counters`, and of those with a label that `is_bad`.
fn sums(counters: &IntCounterVec, is_bad: impl Fn(&str, &str) -> bool) -> (u64, u64) {
    let (mut all, mut bad) = (0, 0);
    for family in counters.collect() {
        for series in family.get_metric() {
            // A count of an integer counter.
            let count = series.get_counter().get_value() as u64;
            all += count;
            if series.get_label().iter().any(|label| is_bad(label.name(), label.value())) {
                bad += count;
            }
        }
    }
    (all, bad)
}

/// Merges `users` into one record for the shared series: the earliest times, and any reason to log in. `None` if there
/// are no users.
fn worst(users: &[UserHealth]) -> Option<UserHealth> {
    let earliest = |time: fn(&UserHealth) -> Option<f64>| users.iter().filter_map(time).reduce(f64::min);
    let first = users.first()?;
    Some(UserHealth {
        user: OTHER.to_owned(),
        state: first.state,
        token_expiry: earliest(|user| user.token_expiry),
        last_refresh: earliest(|user| user.last_refresh),
        consent_expiry: earliest(|user| user.consent_expiry),
        consent_ending: users.iter().filter_map(|user| user.consent_ending).reduce(|a, b| a || b),
        login_reason: users.iter().find_map(|user| user.login_reason),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, expiry: f64, reason: Option<&'static str>) -> UserHealth {
        UserHealth {
            user: name.into(),
            state: if reason.is_some() { State::LoginRequired } else { State::Fresh },
            token_expiry: Some(expiry),
            last_refresh: Some(expiry - 3600.0),
            consent_expiry: None,
            consent_ending: None,
            login_reason: reason,
        }
    }

    #[test]
    fn users_beyond_the_limit_share_one_series_that_reports_the_worst() {
        let metrics = Metrics::new(Settings { max_user_series: 2 }, 0.0).unwrap();
        let users = vec![
            user("d", 3000.0, Some("invalid_grant")),
            user("a", 9000.0, None),
            user("c", 2000.0, None),
            user("b", 1000.0, None),
        ];
        let text = metrics.render(users).unwrap();
        assert!(text.contains("adsidecar_token_expiry_timestamp_seconds{user=\"a\"} 9000"));
        assert!(text.contains("adsidecar_token_expiry_timestamp_seconds{user=\"b\"} 1000"));
        assert!(text.contains("adsidecar_token_expiry_timestamp_seconds{user=\"other\"} 2000"));
        assert!(!text.contains("user=\"c\""));
        assert!(text.contains("adsidecar_login_required{reason=\"invalid_grant\",user=\"other\"} 1"));
        assert!(text.contains("adsidecar_login_required{reason=\"\",user=\"a\"} 0"));
        assert!(text.contains("adsidecar_users{state=\"fresh\"} 3"));
        assert!(text.contains("adsidecar_users{state=\"login_required\"} 1"));
    }

    #[test]
    fn a_removed_user_leaves_no_series() {
        let metrics = Metrics::new(Settings { max_user_series: 10 }, 0.0).unwrap();
        metrics.render(vec![user("a", 1.0, None)]).unwrap();
        let text = metrics.render(Vec::new()).unwrap();
        assert!(!text.contains("user=\"a\""));
        assert!(text.contains("adsidecar_users{state=\"fresh\"} 0"));
    }
}
