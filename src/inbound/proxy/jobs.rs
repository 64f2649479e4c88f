//! Reads along when a response tells of an export or an AMC workflow run, so that the throttle can count what runs at
//! Amazon. The bytes pass as they come; nothing is held back.

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_ENCODING;
use http::{HeaderMap, HeaderValue};

use super::auth_rejection::inflated;
use crate::throttle::{Job, Pass};

/// Largest body that is understood, in bytes. The state of a job is small.
const MAX_BODY: usize = 64 << 10;

/// Collects what passes of a body, and tells it when the body ends.
#[derive(Debug)]
pub(super) struct JobListener {
    /// `None` if the body turned out too large.
    job: Option<Job>,
    coding: Option<HeaderValue>,
    read: BytesMut,
}

impl JobListener {
    /// A listener to a response with these headers; `None` if it tells of no job that the throttle counts.
    pub(super) fn of(pass: &mut Pass<'_>, headers: &HeaderMap) -> Option<Self> {
        let job = pass.job()?;
        Some(Self { job: Some(job), coding: headers.get(CONTENT_ENCODING).cloned(), read: BytesMut::new() })
    }

    pub(super) fn hear(&mut self, data: &Bytes) {
        if self.read.len() + data.len() > MAX_BODY {
            self.job = None;
        }
        if self.job.is_some() {
            self.read.extend_from_slice(data);
        }
    }
}

impl Drop for JobListener {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            job.told(&inflated(self.coding.as_ref().map(HeaderValue::as_bytes), &self.read));
        }
    }
}
