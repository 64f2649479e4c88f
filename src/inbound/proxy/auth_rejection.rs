//! What Amazon means by a 401: it rejects the access token, or the token has no access to the requested scope; and how
//! a refusal is passed on without the token that it may quote.

use std::io::Read;
use std::time::Duration;

use brotli_decompressor::Decompressor;
use bytes::{Bytes, BytesMut};
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, ETAG};
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use super::Body;
use super::inflation::Inflater;
use super::redaction::redacted;
use crate::upstream::{ResponseAborted, UpstreamBody};

/// How much of a rejection is read, in bytes; the rest is passed on unread.
const MAX_READ: usize = 64 << 10;

/// How much text is read from a compressed one, in bytes.
const MAX_TEXT: usize = 4 * MAX_READ;

/// Size of the decoder's input buffer for brotli, in bytes.
const BROTLI_BUFFER: usize = 4096;

/// How long a rejection is read, before it is judged by what has arrived.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// A rejection, with what was read of its body.
#[derive(Debug)]
pub(super) struct Rejection {
    head: Parts,
    read: Bytes,
    /// The part that was not read, or the error that ended the body.
    rest: Option<Result<UpstreamBody, ResponseAborted>>,
}

/// What a rejection means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Amazon rejects the access token.
    Token,
    /// The token has no access to the scope: refreshing it would not help. Holds the hint for the caller.
    Scope(&'static str),
}

impl Verdict {
    /// The metric's label.
    pub(super) fn cause(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Scope(hint) => hint,
        }
    }
}

/// Amazon's texts ("Common errors", Amazon Ads API, and integrators' reports), in lower case.
const SCOPE_FAILURES: [(&str, &str); 5] = [
    ("not authorized to access scope", "scope_not_authorized"),
    ("no matching advertiser found for scope", "scope_unknown"),
    ("scope header is missing", "scope_missing"),
    ("missing scope", "scope_missing"),
    ("invalid scope", "scope_unknown"),
];

impl Rejection {
    /// Reads at most 64 KiB of the body, for at most five seconds.
    pub(super) async fn read(response: Response<UpstreamBody>) -> Self {
        let (head, mut rest) = response.into_parts();
        let mut read = BytesMut::new();
        let deadline = Instant::now() + MAX_WAIT;
        while read.len() < MAX_READ {
            let Ok(frame) = timeout_at(deadline, rest.frame()).await else { break };
            match frame {
                Some(Ok(frame)) => read.extend(frame.into_data().ok()),
                // The caller's body ends with the same error.
                Some(Err(error)) => return Self { head, read: read.freeze(), rest: Some(Err(error)) },
                None => return Self { head, read: read.freeze(), rest: None },
            }
        }
        Self { head, read: read.freeze(), rest: Some(Ok(rest)) }
    }

    /// What the rejection means, according to its text.
    pub(super) fn verdict(&self) -> Verdict {
        let text = inflated(self.head.headers.get(CONTENT_ENCODING).map(|coding| coding.as_bytes()), &self.read);
        let text = String::from_utf8_lossy(&text).to_ascii_lowercase();
        let scope = SCOPE_FAILURES.iter().find(|(sign, _)| text.contains(sign));
        scope.map_or(Verdict::Token, |(_, hint)| Verdict::Scope(hint))
    }

    /// The response as Amazon sent it, but without the token of `bearer`. A compressed text that quotes it is passed on
    /// inflated, and so is one that is too long to be searched before.
    pub(super) fn pass_on(mut self, bearer: &HeaderValue) -> Response<Body> {
        if !is_encoded(&self.head.headers) {
            return Response::from_parts(self.head, Body::read(self.read, self.rest).without_token(bearer));
        }
        let coding = self.head.headers.get(CONTENT_ENCODING).map(|coding| coding.as_bytes());
        let text = inflated(coding, &self.read);
        let is_long = matches!(self.rest, Some(Ok(_))) || text.len() >= MAX_TEXT;
        if is_long && let Some(inflater) = coding.and_then(|coding| Inflater::new(coding, &self.read)) {
            for name in [CONTENT_ENCODING, CONTENT_LENGTH, ETAG] {
                self.head.headers.remove(name);
            }
            let body = Body::read(self.read, self.rest).inflated_without_token(inflater, bearer);
            return Response::from_parts(self.head, body);
        }
        let Some(clean) = redacted(bearer, &text) else {
            return Response::from_parts(self.head, Body::read(self.read, self.rest));
        };
        let headers = &mut self.head.headers;
        for name in [CONTENT_ENCODING, CONTENT_LENGTH, ETAG] {
            headers.remove(name);
        }
        let whole = self.rest.is_none() && text.len() < MAX_TEXT;
        // The part that was not read may quote the token too: the body breaks off before it.
        let end = if whole { None } else { Some(Err(ResponseAborted::Withheld)) };
        if whole {
            headers.insert(CONTENT_LENGTH, clean.len().into());
        }
        Response::from_parts(self.head, Body::read(clean, end))
    }
}

/// A refusal of Amazon's as the caller gets it: as it came, but without the token of `bearer`. Only a compressed one is
/// held until it is read.
pub(super) async fn pass_on_refusal(response: Response<UpstreamBody>, bearer: &HeaderValue) -> Response<Body> {
    if is_encoded(response.headers()) {
        return Rejection::read(response).await.pass_on(bearer);
    }
    response.map(|body| Body::amazon(body).without_token(bearer))
}

fn is_encoded(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

/// The decoded text, to be understood only: the caller gets the bytes as they came.
pub(super) fn inflated(coding: Option<&[u8]>, bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    let limit = MAX_TEXT as u64;
    // If decoding fails halfway, the text so far is used.
    let _ = match coding.map(<[u8]>::to_ascii_lowercase).as_deref() {
        Some(b"gzip" | b"x-gzip") => MultiGzDecoder::new(bytes).take(limit).read_to_end(&mut text),
        Some(b"deflate") => {
            let zlib = ZlibDecoder::new(bytes).take(limit).read_to_end(&mut text);
            if zlib.is_err() && text.is_empty() {
                DeflateDecoder::new(bytes).take(limit).read_to_end(&mut text)
            } else {
                zlib
            }
        }
        Some(b"br") => Decompressor::new(bytes, BROTLI_BUFFER).take(limit).read_to_end(&mut text),
        _ => return bytes.to_vec(),
    };
    text
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    fn verdict(coding: Option<&'static str>, body: &[u8]) -> Verdict {
        let mut response = Response::new(());
        if let Some(coding) = coding {
            response.headers_mut().insert(CONTENT_ENCODING, coding.parse().unwrap());
        }
        Rejection { head: response.into_parts().0, read: Bytes::copy_from_slice(body), rest: None }.verdict()
    }

    #[test]
    fn a_scope_failure_is_told_by_amazons_texts() {
        for (body, hint) in [
            (r#"{"code":"401","details":"Not authorized to access scope 123"}"#, "scope_not_authorized"),
            (r#"{"code":"UNAUTHORIZED","details":"No matching advertiser found for scope"}"#, "scope_unknown"),
            (r#"{"message":"Scope header is missing"}"#, "scope_missing"),
        ] {
            assert_eq!(verdict(None, body.as_bytes()), Verdict::Scope(hint));
        }
    }

    #[test]
    fn anything_else_is_a_token_failure() {
        for body in
            ["", r#"{"message":"Unauthorized"}"#, r#"{"code":"401","details":"Authentication failed"}"#, "\u{0}\u{ff}"]
        {
            assert_eq!(verdict(None, body.as_bytes()), Verdict::Token);
        }
        assert_eq!(verdict(Some("gzip"), b"no gzip at all"), Verdict::Token);
    }

    /// One stored block, as an encoder writes what it cannot compress (RFC 7932, section 9.2): window of 16 bits, not
    /// the last block, four nibbles of length, uncompressed; then the empty last block.
    fn brotli(text: &[u8]) -> Vec<u8> {
        let head = ((u32::try_from(text.len()).unwrap() - 1) << 4) | 1 << 20;
        [&head.to_le_bytes()[..3], text, &[3]].concat()
    }

    #[test]
    fn a_compressed_text_is_read_too() {
        let text = br#"{"details":"Not authorized to access scope 1"}"#;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(text).unwrap();
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(text).unwrap();
        let mut raw = DeflateEncoder::new(Vec::new(), Compression::default());
        raw.write_all(text).unwrap();
        let expected = Verdict::Scope("scope_not_authorized");
        assert_eq!(verdict(Some("br"), &brotli(text)), expected);
        assert_eq!(verdict(Some("br"), b"no brotli at all"), Verdict::Token);
        let gzip = gzip.finish().unwrap();
        assert_eq!(verdict(Some("gzip"), &gzip), expected);
        assert_eq!(verdict(Some("GZIP"), &gzip), expected, "RFC 9110, section 8.4.1: names of codings ignore case");
        assert_eq!(verdict(Some("deflate"), &zlib.finish().unwrap()), expected);
        assert_eq!(verdict(Some("deflate"), &raw.finish().unwrap()), expected);
    }
}
