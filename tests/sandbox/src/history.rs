//! What the sandbox received: every call to an Amazon listener, unchanged.

use std::collections::VecDeque;
use std::fmt::Write as _;

use bytes::Bytes;
use http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use jiff::Timestamp;
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::Listener;

/// The maximum number of calls kept. A test makes far fewer; a sandbox that runs for weeks drops the oldest.
const REMEMBERED_CALLS: usize = 10_000;

/// The number of bytes of each body that the sandbox keeps while it handles the call. JSON calls are far smaller; for
/// an upload, the length and digest suffice.
pub(super) const KEPT_BODY_BYTES: usize = 1024 * 1024;

/// The number of bytes of a body that the history keeps after the response, which bounds its memory.
const REMEMBERED_BODY_BYTES: usize = 16 * 1024;

/// One received call.
#[derive(Clone, Debug, Serialize)]
pub struct Call {
    /// Sequence number from 1 across all listeners, in the order of arrival.
    pub id: u64,
    /// The time of arrival, by the sandbox's clock.
    pub at: Timestamp,
    /// The listener that received it: a region, or Login with Amazon.
    #[serde(rename = "door")]
    pub listener: Listener,
    /// The connection that carried it; calls with the same number shared a connection.
    pub connection: u64,
    /// The method.
    pub method: String,
    /// The request target from the request line, byte for byte. (The HTTP parser drops a fragment, which is not allowed
    /// in a request line.) Over HTTP/2 it is the `:path`.
    pub target: String,
    /// The headers with lower-case names, one entry per occurrence. Repeated headers are grouped at the position of the
    /// first one; invalid UTF-8 is replaced.
    pub headers: Vec<(String, String)>,
    /// Length of the body in bytes, without chunk framing.
    pub body_len: u64,
    /// SHA-256 of the body in lower-case hex; of the empty string if the body was not read.
    pub body_sha256: String,
    /// The first 16 KiB of the body.
    #[serde(serialize_with = "as_text")]
    pub body: Bytes,
    /// Whether the whole body was received. False while it is arriving, and if the caller disconnected.
    pub complete: bool,
    /// The status of the response; `None` while the call is held, and for a connection that was reset.
    pub status: Option<u16>,
    /// The `grant_type` of a call to the token endpoint.
    pub grant_type: Option<String>,
    /// The name of the fault that applied to this call.
    #[serde(rename = "trouble")]
    pub fault: Option<String>,
}

impl Call {
    /// The first value of a header, if present. `name` is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Every value of a header, in order. `name` is in lower case.
    pub fn header_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The names of the headers, in order, without duplicates.
    pub fn header_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.dedup();
        names
    }

    /// The part of the target before the `?`.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The kept part of the body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// The number of calls to the token endpoint by kind, answered or not. A connection that was reset before its call was
/// read does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LwaCalls {
    /// `grant_type=authorization_code`.
    pub exchanges: u64,
    /// `grant_type=refresh_token`.
    pub refreshes: u64,
    /// Any other grant type, or none.
    pub others: u64,
}

/// The calls received, oldest first.
#[derive(Debug, Default)]
pub(super) struct History {
    calls: VecDeque<Call>,
    next_id: u64,
    lwa: LwaCalls,
}

impl History {
    /// Records a call whose head was read, and returns its id.
    pub(super) fn begin(&mut self, at: Timestamp, listener: Listener, connection: u64, head: &Parts) -> u64 {
        self.next_id += 1;
        if self.calls.len() == REMEMBERED_CALLS {
            self.calls.pop_front();
        }
        let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        self.calls.push_back(Call {
            id: self.next_id,
            at,
            listener,
            connection,
            method: head.method.to_string(),
            target: raw_target(head),
            headers: head.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
            body_len: 0,
            body_sha256: hex(&Sha256::digest([])),
            body: Bytes::new(),
            complete: false,
            status: None,
            grant_type: None,
            fault: None,
        });
        self.next_id
    }

    /// Changes the record of a call, unless it was dropped meanwhile.
    pub(super) fn amend(&mut self, id: u64, change: impl FnOnce(&mut Call)) {
        // Ids are consecutive within the queue, but `clear` may have emptied it: search from the newest end.
        if let Some(call) = self.calls.iter_mut().rev().find(|call| call.id == id) {
            change(call);
        }
    }

    /// Records the body of a call.
    pub(super) fn body(&mut self, id: u64, read: &Received) {
        self.amend(id, |call| {
            call.body_len = read.len;
            call.body_sha256.clone_from(&read.sha256);
            // A slice would keep the whole buffer alive.
            call.body = Bytes::copy_from_slice(&read.kept[..read.kept.len().min(REMEMBERED_BODY_BYTES)]);
            call.complete = read.complete;
        });
    }

    /// Counts a call to the token endpoint.
    pub(super) fn token_call(&mut self, id: u64, grant_type: Option<&str>) {
        match grant_type {
            Some("authorization_code") => self.lwa.exchanges += 1,
            Some("refresh_token") => self.lwa.refreshes += 1,
            _ => self.lwa.others += 1,
        }
        self.amend(id, |call| call.grant_type = grant_type.map(str::to_owned));
    }

    pub(super) fn calls(&self) -> impl DoubleEndedIterator<Item = &Call> {
        self.calls.iter()
    }

    pub(super) fn lwa_calls(&self) -> LwaCalls {
        self.lwa
    }

    /// Deletes the calls and the counts; ids continue.
    pub(super) fn clear(&mut self) {
        self.calls.clear();
        self.lwa = LwaCalls::default();
    }
}

/// A received body.
pub(super) struct Received {
    pub(super) len: u64,
    pub(super) sha256: String,
    /// At most [`KEPT_BODY_BYTES`], from the start of the body.
    pub(super) kept: Bytes,
    pub(super) complete: bool,
}

/// Reads a body to its end, whatever its length, and keeps only its first bytes.
pub(super) async fn receive(mut body: Incoming) -> Received {
    let mut digest = Sha256::new();
    let mut kept = Vec::new();
    let mut len = 0;
    let complete = loop {
        match body.frame().await {
            None => break true,
            Some(Err(_)) => break false,
            Some(Ok(frame)) => {
                let Some(data) = frame.data_ref() else { continue };
                len += data.len() as u64;
                digest.update(data);
                let room = KEPT_BODY_BYTES - kept.len();
                kept.extend_from_slice(&data[..data.len().min(room)]);
            }
        }
    };
    Received { len, sha256: hex(&digest.finalize()), kept: kept.into(), complete }
}

/// The request target as sent, without the HTTP library's normalization.
pub(super) fn raw_target(head: &Parts) -> String {
    if head.version == http::Version::HTTP_2 {
        return head.uri.path_and_query().map_or_else(String::new, ToString::to_string);
    }
    head.uri.to_string()
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn as_text<S: Serializer>(body: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&String::from_utf8_lossy(body))
}
