//! The sandbox's test endpoints on the Ads listeners, `/sandbox/…`. Amazon has none of them.
//!
//! - `any /sandbox/echo`: what was received, as JSON.
//! - `GET /sandbox/bytes/{n}`: `n` pseudo-random bytes, the same each time; `?chunked=1` omits the length.
//! - `any /sandbox/status/{code}`: that status.
//! - `GET /sandbox/gzip`: gzip content as `application/octet-stream` without `Content-Encoding`, like report files;
//!   `?encoded=1`: JSON with `Content-Encoding: gzip`.
//! - `GET /sandbox/cookies`: two `Set-Cookie` headers.
//! - `GET /sandbox/events?count=n`: server-sent events, flushed one by one; with `&step=1` each waits for its release.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, SET_COOKIE};
use http::{Response, StatusCode};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use url::form_urlencoded;

use super::call::{Arrived, Passed, coded};
use super::reply::{self, Body};

/// The chunk size of generated bodies.
const PIECE: usize = 16 * 1024;

/// Permits for stepwise events, one per event.
pub(super) type Events = Arc<Semaphore>;

/// Responds to a call to a test endpoint.
pub(super) fn answer(call: &Arrived<'_>, passed: &Passed<'_>, events: &Events) -> Response<Body> {
    match passed.path {
        ["sandbox", "echo"] => echo(call),
        ["sandbox", "bytes", count] => match count.parse() {
            Ok(count) => bytes(count, flag(passed.query, "chunked")),
            Err(_) => coded(StatusCode::BAD_REQUEST, "The number of bytes is no number"),
        },
        ["sandbox", "status", code] => match StatusCode::from_bytes(code.as_bytes()) {
            Ok(code) if !code.is_informational() => reply::json(code, &json!({ "sandbox": code.as_u16() })),
            _ => coded(StatusCode::BAD_REQUEST, "The status is no final status code"),
        },
        ["sandbox", "gzip"] => gzip(flag(passed.query, "encoded")),
        ["sandbox", "cookies"] => cookies(),
        ["sandbox", "events"] => {
            let count = param(passed.query, "count").and_then(|text| text.parse().ok()).unwrap_or(3);
            let event = |number| format!("id: {number}\nevent: message\ndata: {{\"number\":{number}}}\n\n");
            stream_events(count, flag(passed.query, "step").then(|| events.clone()), event)
        }
        _ => coded(StatusCode::NOT_FOUND, "The sandbox has no such path of its own"),
    }
}

fn param(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes()).find(|(n, _)| n == name).map(|(_, value)| value.into_owned())
}

fn flag(query: &str, name: &str) -> bool {
    param(query, name).as_deref() == Some("1")
}

fn echo(call: &Arrived<'_>) -> Response<Body> {
    let headers: Vec<(&str, String)> = call
        .head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let body = json!({
        "door": call.listener,
        "method": call.head.method.as_str(),
        "target": call.target,
        "headers": headers,
        "body_len": call.body_len,
        "body_sha256": call.body_sha256,
    });
    reply::json(StatusCode::OK, &body)
}

fn bytes(count: u64, chunked: bool) -> Response<Body> {
    let body = PseudoRandom::new(count, chunked);
    let mut response = reply::answer(StatusCode::OK, "application/octet-stream", Bytes::new());
    *response.body_mut() = body.map_err(|never| match never {}).boxed_unsync();
    response
}

/// The bytes of `/sandbox/bytes/{count}`.
pub fn pseudo_random_bytes(count: usize) -> Vec<u8> {
    let mut body = PseudoRandom::new(count as u64, false);
    let mut all = Vec::with_capacity(count);
    while body.left > 0 {
        all.extend_from_slice(&body.piece());
    }
    all
}

/// A body generated while it is sent, with Marsaglia's xorshift64.
struct PseudoRandom {
    left: u64,
    state: u64,
    chunked: bool,
}

impl PseudoRandom {
    fn new(left: u64, chunked: bool) -> Self {
        // Any state except 0 works.
        Self { left, state: 0x9E37_79B9_7F4A_7C15, chunked }
    }

    fn piece(&mut self) -> Bytes {
        let size = usize::try_from(self.left).unwrap_or(PIECE).min(PIECE);
        let mut piece = BytesMut::with_capacity(PIECE);
        while piece.len() < size {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            piece.extend_from_slice(&self.state.to_le_bytes());
        }
        piece.truncate(size);
        self.left -= size as u64;
        piece.freeze()
    }
}

impl http_body::Body for PseudoRandom {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        if this.left == 0 {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(Frame::data(this.piece()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0 && !self.chunked
    }

    fn size_hint(&self) -> SizeHint {
        if self.chunked { SizeHint::default() } else { SizeHint::with_exact(self.left) }
    }
}

fn gzip(encoded: bool) -> Response<Body> {
    let report = json!([{ "campaignId": 281_474_976_710_657_u64, "impressions": 1024, "clicks": 12, "cost": 3.5 }]);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    let packed = encoder.write_all(report.to_string().as_bytes()).and_then(|()| encoder.finish());
    let Ok(packed) = packed else {
        return coded(StatusCode::INTERNAL_SERVER_ERROR, "gzip failed");
    };
    if !encoded {
        return reply::answer(StatusCode::OK, "application/octet-stream", packed);
    }
    let mut response = reply::answer(StatusCode::OK, "application/json", packed);
    reply::set(&mut response, CONTENT_ENCODING, "gzip");
    response
}

fn cookies() -> Response<Body> {
    let mut response = reply::json(StatusCode::OK, &json!({ "sandbox": "two cookies" }));
    reply::add(&mut response, SET_COOKIE, "session-id=130-1234567-1234567; Domain=.amazon.com; Path=/; Secure");
    reply::add(&mut response, SET_COOKIE, "session-id-time=2082787201l; Domain=.amazon.com; Path=/; Secure");
    response
}

/// Sends the events from a separate task, so that each is flushed before the next is created.
pub(super) fn stream_events(count: u32, steps: Option<Events>, event: fn(u32) -> String) -> Response<Body> {
    // The channel holds one event; the next waits until that one was taken.
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for number in 1..=count {
            if let Some(steps) = &steps {
                let permit = tokio::select! {
                    permit = steps.acquire() => permit,
                    () = sender.closed() => return,
                };
                let Ok(permit) = permit else { return };
                permit.forget();
            }
            if sender.send(Bytes::from(event(number))).await.is_err() {
                return;
            }
        }
    });
    let mut response = reply::answer(StatusCode::OK, "text/event-stream", Bytes::new());
    *response.body_mut() = EventBody(receiver).boxed_unsync();
    reply::set(&mut response, CACHE_CONTROL, "no-cache");
    response
}

struct EventBody(mpsc::Receiver<Bytes>);

impl http_body::Body for EventBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.get_mut().0.poll_recv(cx).map(|event| event.map(|event| Ok(Frame::data(event))))
    }
}
