//! `GET /api/auth/amazon/events`: what happens to the users' grants, as server-sent events (HTML Living Standard, 9.2).

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::request::Parts;
use http_body::{Body, Frame};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Interval;
use tokio_util::sync::CancellationToken;

use super::query::Query;
use super::responses::allow_origin;
use super::{FullResponse, LoginError, OauthEndpoints};
use crate::domain::account::UserId;
use crate::domain::event::Event;
use crate::inbound::destination::Endpoint;
use crate::inbound::problem::add_private_headers;
use crate::server::CallerBody;

/// A comment is sent this often, so that nothing in between takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// What a stream begins with: the time, in milliseconds, after which a client that lost it tries again.
const BEGINNING: &[u8] = b"retry: 2000\n\n";

/// The body of a stream. It ends with the process, and says nothing before something happens.
pub struct EventStream(Pin<Box<dyn Stream<Item = Bytes> + Send>>);

impl OauthEndpoints {
    /// Answers a request to the event stream.
    ///
    /// # Errors
    /// The response to a request that the endpoint does not understand.
    pub async fn event_stream(
        &self,
        cors: Option<HeaderValue>,
        parts: &Parts,
        body: CallerBody,
        request_id: &str,
    ) -> Result<Response<EventStream>, FullResponse> {
        let begun = self.begin_stream(parts, body).await;
        let mut answer = begun.map(Response::new).map_err(|error: LoginError| {
            let problem = error.problem(|user| self.login_step(&parts.headers, user));
            let mut refused = self.refuse(&parts.headers, problem, request_id);
            if let Some(origin) = cors.clone() {
                allow_origin(refused.headers_mut(), origin);
            }
            refused
        })?;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        if let Some(origin) = cors {
            allow_origin(headers, origin);
        }
        add_private_headers(headers);
        Ok(answer)
    }

    async fn begin_stream(&self, parts: &Parts, body: CallerBody) -> Result<EventStream, LoginError> {
        if !Endpoint::Events.accepts(&parts.method) {
            return Err(LoginError::Method(Endpoint::Events.allow()));
        }
        let query = Query::read(Endpoint::Events, parts, body).await?;
        let user = if query.get("user_id").is_some() { Some(query.user()?) } else { None };
        let (events, ended) = self.events.subscribe();
        let mut pulse = tokio::time::interval_at(tokio::time::Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
        pulse.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let reader = Reader { events, ended, pulse, user };
        let rest = stream::unfold(reader, |mut reader| async { Some((reader.next().await?, reader)) });
        let beginning = stream::iter([Bytes::from_static(BEGINNING)]);
        Ok(EventStream(Box::pin(stream::StreamExt::chain(beginning, rest))))
    }
}

struct Reader {
    events: Receiver<Arc<Event>>,
    ended: CancellationToken,
    pulse: Interval,
    /// The only user whose events are wanted; `None`: all.
    user: Option<UserId>,
}

impl Reader {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let event = tokio::select! {
                // What happened before the end is told before it.
                biased;
                event = self.events.recv() => event,
                () = self.ended.cancelled() => return None,
                _ = self.pulse.tick() => return Some(Bytes::from_static(b": \n\n")),
            };
            match event {
                Ok(event) if self.user.as_ref().is_some_and(|user| event.user().is_some_and(|of| of != user)) => {}
                Ok(event) => {
                    let (kind, id, data) = (event.kind(), event.id(), event.json());
                    return Some(format!("event: {kind}\nid: {id}\ndata: {data}\n\n").into());
                }
                Err(RecvError::Lagged(count)) => return Some(format!(": {count} events were missed\n\n").into()),
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventStream")
    }
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.as_mut().poll_next(cx).map(|next| next.map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::domain::event::Happened;
    use crate::notify::Events;

    #[tokio::test]
    async fn what_happened_before_the_end_of_the_stream_is_told_before_it() {
        // Both are there at the same moment, so that the order of the two is what is tested.
        for _ in 0..20 {
            let all = Events::default();
            let (events, ended) = all.subscribe();
            let pulse = tokio::time::interval(KEEP_ALIVE);
            let mut reader = Reader { events, ended, pulse, user: None };
            all.send(Event { at: Timestamp::UNIX_EPOCH, happened: Happened::Test, login_url: None });
            all.end();
            let told = reader.next().await.expect("the event");
            assert!(told.starts_with(b"event: "), "{told:?}");
            assert!(reader.next().await.is_none());
        }
    }
}
