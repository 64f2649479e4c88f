//! Amazon's rate limits: a token bucket for each client, listener and API family, and how the 429 tells the wait.

use std::collections::HashMap;

use adsidecar::domain::api_families::family;
use http::header::RETRY_AFTER;
use http::{HeaderMap, Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::reply::{self, Body};
use super::{Listener, http_date};

/// The headers that name the client.
const CLIENT_IDS: [&str; 2] = ["amazon-advertising-api-clientid", "amazon-ads-clientid"];

/// A rate limit. Amazon has one for each client, endpoint and region.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Calls per second in the long run, for each client, listener and API family.
    pub per_second: f64,
    /// Calls that may come at once after a break.
    pub burst: f64,
    /// The listener that it applies to; all Ads listeners if absent.
    #[serde(default, rename = "door")]
    pub listener: Option<Listener>,
    /// Prefix of the raw path; any path if absent.
    #[serde(default)]
    pub path: Option<String>,
    /// How a refusal tells the wait.
    #[serde(default)]
    pub told: Told,
}

/// How a 429 tells how long to wait.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// `Retry-After` in whole seconds, at least 1.
    #[default]
    Seconds,
    /// `Retry-After` as an HTTP date.
    Date,
    /// Not at all, as on the creation of reports.
    Nothing,
    /// This text in `Retry-After`.
    Text(String),
    /// An HTML page without `Retry-After`, as from MCP.
    Html,
}

/// The limits in force, and how much of them is used.
#[derive(Debug, Default)]
pub(super) struct Limits {
    rules: Vec<RateLimit>,
    buckets: HashMap<(usize, String, Listener, &'static str), TokenBucket>,
    refusals: u64,
}

#[derive(Debug)]
struct TokenBucket {
    tokens: f64,
    at: Timestamp,
}

impl Limits {
    /// Replaces the limits. The first that matches a call applies. What is used of a limit in the same place is kept,
    /// so that a limit can change while calls arrive.
    pub(super) fn set(&mut self, rules: Vec<RateLimit>) {
        self.rules = rules;
        self.buckets.retain(|(rule, ..), _| *rule < self.rules.len());
    }

    pub(super) fn rules(&self) -> &[RateLimit] {
        &self.rules
    }

    /// The number of calls refused so far.
    pub(super) fn refusals(&self) -> u64 {
        self.refusals
    }

    /// Counts a call. Returns the refusal if it is one too many.
    pub(super) fn refuse(
        &mut self,
        listener: Listener,
        path: &str,
        headers: &HeaderMap,
        now: Timestamp,
    ) -> Option<Response<Body>> {
        let matches = |limit: &RateLimit| {
            limit.listener.is_none_or(|own| own == listener)
                && limit.path.as_ref().is_none_or(|prefix| path.starts_with(prefix.as_str()))
        };
        let index = self.rules.iter().position(matches)?;
        let limit = &self.rules[index];
        let client = CLIENT_IDS.iter().find_map(|name| headers.get(*name)?.to_str().ok()).unwrap_or_default();
        let key = (index, client.to_owned(), listener, family(path).name);
        let bucket = self.buckets.entry(key).or_insert(TokenBucket { tokens: limit.burst, at: now });
        let gained = now.duration_since(bucket.at).as_secs_f64().max(0.0) * limit.per_second;
        *bucket = TokenBucket { tokens: (bucket.tokens + gained).min(limit.burst), at: now };
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return None;
        }
        self.refusals += 1;
        let wait = (1.0 - bucket.tokens) / limit.per_second;
        Some(limit.refusal(wait, now))
    }
}

impl RateLimit {
    /// This many calls per second for every client, listener and family, and as many at once.
    pub fn of(per_second: f64) -> Self {
        Self { per_second, burst: per_second.max(1.0), listener: None, path: None, told: Told::default() }
    }

    /// Restricts the limit to paths with this prefix.
    #[must_use]
    pub fn on(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// Tells the wait in this way.
    #[must_use]
    pub fn told(mut self, told: Told) -> Self {
        self.told = told;
        self
    }

    fn refusal(&self, wait: f64, now: Timestamp) -> Response<Body> {
        if self.told == Told::Html {
            let page = "<!doctype html><title>429 Too Many Requests</title><h1>429 Too Many Requests</h1>";
            return reply::html(StatusCode::TOO_MANY_REQUESTS, page);
        }
        let body = json!({ "code": "429", "details": "Too Many Requests" });
        let mut response = reply::json(StatusCode::TOO_MANY_REQUESTS, &body);
        let seconds = wait.ceil().max(1.0) as i64;
        let told = match &self.told {
            Told::Seconds => seconds.to_string(),
            Told::Date => http_date(now.saturating_add(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MAX)),
            Told::Text(text) => text.clone(),
            Told::Nothing | Told::Html => return response,
        };
        reply::set(&mut response, RETRY_AFTER, &told);
        response
    }
}
