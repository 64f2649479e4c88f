//! `throttle.coalesce_polls`: polls for the same job by many callers within a second are answered from one of them.
//! Nothing else is ever answered from memory.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::request::Parts;
use http::response::Parts as Head;
use http::{HeaderMap, Method, Response, StatusCode, Version};
use jiff::SignedDuration;
use tokio::sync::watch;

use super::response::Body;
use crate::domain::clock::Clock;
use crate::inbound::destination::Target;
use crate::inbound::route::RoutedRequest;
use crate::throttle::Kind;

/// How long a response answers other callers: about as often as anybody needs to know, and far more often than a report
/// changes.
const FRESH: SignedDuration = SignedDuration::from_secs(1);

/// Largest body that is shared, in bytes. The state of a job is small.
const MAX_BODY: usize = 64 << 10;

/// Most polls that are remembered at once. Further ones are sent as they are.
const MAX_POLLS: usize = 1000;

/// Headers that differ between callers and change no response.
const IGNORED: [&str; 8] = [
    "authorization",
    "connection",
    "host",
    "proxy-authorization",
    "traceparent",
    "user-agent",
    "x-ads-sidecar-token",
    "x-request-id",
];

/// The polls of the last second.
#[derive(Debug)]
pub(super) struct Polls {
    clock: Clock,
    polls: Mutex<HashMap<String, Poll>>,
}

#[derive(Debug)]
struct Poll {
    /// The uptime until which the response may answer others; `None` while it is awaited.
    until: Option<SignedDuration>,
    answer: watch::Receiver<Option<Arc<Answer>>>,
}

#[derive(Debug)]
struct Answer {
    head: Head,
    body: Bytes,
}

/// What a poll does.
pub(super) enum Join<'a> {
    /// It is sent, and its response answers the others.
    Lead(Leader<'a>),
    /// It waits for the response to another one.
    Follow(Follower),
    /// It is sent, as too many others are remembered.
    Alone,
}

/// The poll that is sent. Without a response to share, one of the followers takes over.
pub(super) struct Leader<'a> {
    polls: &'a Polls,
    key: String,
    answer: watch::Sender<Option<Arc<Answer>>>,
}

/// A poll that waits for another one's response.
pub(super) struct Follower(watch::Receiver<Option<Arc<Answer>>>);

impl Polls {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, polls: Mutex::default() }
    }

    /// Joins the poll of the same job that is under way or has just been answered.
    pub(super) fn join(&self, key: &str) -> Join<'_> {
        let now = self.clock.uptime();
        let mut polls = self.lock();
        if let Some(poll) = polls.get(key).filter(|poll| poll.until.is_none_or(|until| now < until)) {
            return Join::Follow(Follower(poll.answer.clone()));
        }
        polls.retain(|_, poll| poll.until.is_none_or(|until| now < until));
        if polls.len() >= MAX_POLLS {
            return Join::Alone;
        }
        let (answer, receiver) = watch::channel(None);
        polls.insert(key.to_owned(), Poll { until: None, answer: receiver });
        Join::Lead(Leader { polls: self, key: key.to_owned(), answer })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Poll>> {
        self.polls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leader<'_> {
    /// Shares `response` with the followers if it is a small `200`, and returns it.
    pub(super) async fn share(self, response: Response<Body>) -> Response<Body> {
        if response.status() != StatusCode::OK {
            return response;
        }
        let (head, body) = response.into_parts();
        let (read, rest) = body.read_up_to(MAX_BODY).await;
        if rest.is_some() {
            return Response::from_parts(head, Body::read_then(read, rest));
        }
        let mut shared = Response::new(()).into_parts().0;
        (shared.status, shared.version, shared.headers) = (head.status, Version::HTTP_11, head.headers.clone());
        let _ = self.answer.send(Some(Arc::new(Answer { head: shared, body: read.clone() })));
        let until = self.polls.clock.uptime().saturating_add(FRESH);
        if let Some(poll) = self.polls.lock().get_mut(&self.key) {
            poll.until = Some(until);
        }
        Response::from_parts(head, Body::read_then(read, None))
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        if self.answer.borrow().is_none() {
            self.polls.lock().remove(&self.key);
        }
    }
}

impl Follower {
    /// The response to the poll that was sent; `None` if it cannot be shared.
    pub(super) async fn answer(mut self) -> Option<Response<Body>> {
        let answer = self.0.wait_for(Option::is_some).await.ok()?.clone()?;
        Some(Response::from_parts(answer.head.clone(), Body::read_then(answer.body.clone(), None)))
    }
}

/// What makes two polls the same: whose they are, and everything that Amazon sees of them but the caller's software.
/// `None` if the request is no poll.
pub(super) fn key(route: &RoutedRequest<'_>, parts: &Parts, target: &Target) -> Option<String> {
    if parts.method != Method::GET || Kind::of(&parts.method, target.path()) != Kind::Poll || has_body(&parts.headers) {
        return None;
    }
    let mut key =
        format!("{}\n{}\n{}\n{}\n", route.region.as_str(), route.user, route.account_name(), target.path_and_query);
    let mut names: Vec<_> = parts.headers.keys().filter(|name| !IGNORED.contains(&name.as_str())).collect();
    names.sort_unstable_by_key(|name| name.as_str());
    for name in names {
        for value in parts.headers.get_all(name) {
            let _ = writeln!(key, "{name}:{}", value.as_bytes().escape_ascii());
        }
    }
    Some(key)
}

fn has_body(headers: &HeaderMap) -> bool {
    let length = headers.get(http::header::CONTENT_LENGTH);
    length.is_some_and(|length| length != "0") || headers.contains_key(http::header::TRANSFER_ENCODING)
}
