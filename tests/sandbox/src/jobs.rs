//! Exports, and how many jobs Amazon runs at once: five exports of an endpoint, ten AMC workflow runs of an instance
//! and 200 of an account.

use http::{Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Listener;
use super::call::presigned;
use super::reply::{self, Body};

/// How many jobs run at once, and for how long. By default nothing is limited, and a job ends at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobLimits {
    /// Exports that run at once, for each endpoint.
    pub exports: Option<usize>,
    /// AMC workflow runs that run at once, for each instance.
    pub runs: Option<usize>,
    /// AMC workflow runs that run at once, for each AMC account.
    pub runs_of_account: Option<usize>,
    /// How long a job runs, in seconds.
    pub seconds: f64,
}

/// The jobs that were begun.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    limits: JobLimits,
    jobs: Vec<Job>,
    refusals: u64,
    most: usize,
}

#[derive(Debug)]
struct Job {
    listener: Listener,
    /// What shares a limit with it: the endpoint, or the instance.
    of: String,
    /// The AMC account of a workflow run; empty for an export.
    account: String,
    id: String,
    until: Timestamp,
}

impl Jobs {
    pub(super) fn set(&mut self, limits: JobLimits) {
        self.limits = limits;
    }

    /// The number of refused creations so far, and the most jobs of one kind that ran at once.
    pub(super) fn counts(&self) -> (u64, usize) {
        (self.refusals, self.most)
    }

    /// Begins the AMC workflow run `id` of an `instance` and its `account`, or returns the refusal of one too many.
    pub(super) fn run(
        &mut self,
        listener: Listener,
        [instance, account]: [&str; 2],
        id: &str,
        now: Timestamp,
    ) -> Option<Response<Body>> {
        let of_account =
            self.jobs.iter().filter(|job| job.listener == listener && job.account == account && job.until > now);
        if self.limits.runs_of_account.is_some_and(|limit| of_account.count() >= limit) {
            return Some(self.refuse());
        }
        let refusal = self.begin(listener, instance, id, self.limits.runs, now);
        if refusal.is_none()
            && let Some(begun) = self.jobs.last_mut()
        {
            account.clone_into(&mut begun.account);
        }
        refusal
    }

    /// Whether the job `id` has ended.
    pub(super) fn has_ended(&self, id: &str, now: Timestamp) -> bool {
        self.jobs.iter().find(|job| job.id == id).is_none_or(|job| job.until <= now)
    }

    /// `POST /{entity}/export`.
    pub(super) fn export(&mut self, listener: Listener, entity: &str, now: Timestamp) -> Response<Body> {
        let id = super::request_id();
        match self.begin(listener, entity, &id, self.limits.exports, now) {
            Some(refusal) => refusal,
            None => reply::json(StatusCode::ACCEPTED, &json!({ "exportId": id, "status": "PROCESSING" })),
        }
    }

    /// `GET /exports/{id}`.
    pub(super) fn export_status(&self, listener: Listener, id: &str, now: Timestamp) -> Response<Body> {
        if !self.jobs.iter().any(|job| job.id == id && job.listener == listener) {
            return reply::json(StatusCode::NOT_FOUND, &json!({ "code": "404", "details": "Export not found" }));
        }
        let ended = self.has_ended(id, now);
        let url = if ended { json!(presigned(id)) } else { Value::Null };
        let status = if ended { "COMPLETED" } else { "PROCESSING" };
        reply::json(StatusCode::OK, &json!({ "exportId": id, "status": status, "url": url }))
    }

    fn begin(
        &mut self,
        listener: Listener,
        of: &str,
        id: &str,
        limit: Option<usize>,
        now: Timestamp,
    ) -> Option<Response<Body>> {
        let runs = |job: &&Job| job.listener == listener && job.of == of && job.until > now;
        let running = self.jobs.iter().filter(runs).count();
        if limit.is_some_and(|limit| running >= limit) {
            return Some(self.refuse());
        }
        let lasts = SignedDuration::try_from_secs_f64(self.limits.seconds).unwrap_or(SignedDuration::MAX);
        let until = now.saturating_add(lasts).unwrap_or(Timestamp::MAX);
        self.jobs.push(Job { listener, of: of.to_owned(), account: String::new(), id: id.to_owned(), until });
        self.most = self.most.max(running + 1);
        None
    }

    fn refuse(&mut self) -> Response<Body> {
        self.refusals += 1;
        // Where jobs are created Amazon leaves out `Retry-After`.
        reply::json(StatusCode::TOO_MANY_REQUESTS, &json!({ "code": "429", "details": "Too Many Requests" }))
    }
}
