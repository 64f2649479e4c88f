//! Reads a JSON object of records by user id from a request body, one record at a time, so that a backup of any size
//! needs little memory.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufReader, Read};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserializer;
use serde::de::{self, MapAccess, Visitor};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::domain::account::UserId;

/// Largest record. One of ours takes 2 KiB, or 5 KiB with the longest tokens.
const MAX_RECORD: usize = 64 << 10;
/// Records and parts of the body that wait to be read.
const QUEUE: usize = 4;
/// How long the body may make no progress.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(30);

/// A record, or why there are no more.
pub(super) type Entry = Result<(UserId, Value), String>;

/// The entries of the object in `body`, in its order. After an error there are no more.
pub(super) fn entries(mut body: Incoming) -> mpsc::Receiver<Entry> {
    let (parts, received) = mpsc::channel::<Option<Bytes>>(QUEUE);
    let (entries, read) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        loop {
            let part = match tokio::time::timeout(PROGRESS_TIMEOUT, body.frame()).await {
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => Some(data),
                    Err(_trailers) => continue,
                },
                // The end of the channel without this mark is a body that broke off.
                Ok(None) => None,
                Ok(Some(Err(_))) | Err(_) => return,
            };
            let last = part.is_none();
            if parts.send(part).await.is_err() || last {
                return;
            }
        }
    });
    tokio::task::spawn_blocking(move || {
        let budget = Rc::new(Cell::new(MAX_RECORD));
        let source = Source { parts: received, current: Bytes::new(), ended: false, budget: budget.clone() };
        let mut reader = serde_json::Deserializer::from_reader(BufReader::new(source));
        let done = reader.deserialize_map(Object { entries: &entries, budget }).and_then(|()| reader.end());
        if let Err(error) = done {
            // The receiver may have lost interest.
            let _ = entries.blocking_send(Err(explain(&error)));
        }
    });
    read
}

/// What is wrong, without any part of the text: a misplaced token would be quoted.
fn explain(error: &serde_json::Error) -> String {
    match error.io_error_kind() {
        Some(io::ErrorKind::FileTooLarge) => return "a record is larger than 64 KiB".to_owned(),
        Some(_) => return "the body broke off, or made no progress for 30 seconds".to_owned(),
        None => {}
    }
    let place = format!("line {}, column {}", error.line(), error.column());
    format!("the body is no JSON object of records by user id ({place})")
}

/// The body as a synchronous reader.
struct Source {
    parts: mpsc::Receiver<Option<Bytes>>,
    current: Bytes,
    ended: bool,
    /// How many bytes may still be read before the current record ends.
    budget: Rc<Cell<usize>>,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.parts.blocking_recv() {
                Some(Some(part)) => self.current = part,
                Some(None) => self.ended = true,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let count = buffer.len().min(self.current.len());
        let left = self.budget.get().checked_sub(count).ok_or(io::ErrorKind::FileTooLarge)?;
        self.budget.set(left);
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// Sends each entry of the object on.
struct Object<'a> {
    entries: &'a mpsc::Sender<Entry>,
    budget: Rc<Cell<usize>>,
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of records by user id")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(user) = map.next_key::<UserId>()? {
            let record = map.next_value::<Value>()?;
            self.budget.set(MAX_RECORD);
            // Nobody wants the rest.
            if self.entries.blocking_send(Ok((user, record))).is_err() {
                return Err(de::Error::custom("abandoned"));
            }
        }
        Ok(())
    }
}
