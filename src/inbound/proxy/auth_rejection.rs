//! What Amazon means by a 401: a token that it does not take, or a scope that the token does not reach.

use std::io::Read;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http::Response;
use http::header::CONTENT_ENCODING;
use http::response::Parts;
use http_body_util::BodyExt;
use tokio::time::timeout;

use super::Body;
use crate::upstream::UpstreamBody;

/// How much of a refusal is read; what is beyond it passes unread.
const MAX_READ: usize = 64 << 10;

/// How long a refusal's next bytes are waited for before what is here has to do.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// A refusal whose body was read.
#[derive(Debug)]
pub(super) struct Refused {
    head: Parts,
    read: Bytes,
    /// What was not read, or how it broke off.
    rest: Option<Result<UpstreamBody, hyper::Error>>,
}

/// What a refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The token.
    Token,
    /// The scope: refreshing would cure nothing. Holds the hint for the caller.
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

/// Amazon's texts ("Common errors", Amazon Ads API; and what integrators report), in lower case.
const SCOPE_FAILURES: [(&str, &str); 5] = [
    ("not authorized to access scope", "scope_not_authorized"),
    ("no matching advertiser found for scope", "scope_unknown"),
    ("scope header is missing", "scope_missing"),
    ("missing scope", "scope_missing"),
    ("invalid scope", "scope_unknown"),
];

impl Refused {
    /// Reads at most 64 KiB of the body.
    pub(super) async fn read(answer: Response<UpstreamBody>) -> Self {
        let (head, mut rest) = answer.into_parts();
        let mut read = BytesMut::new();
        while read.len() < MAX_READ {
            let Ok(frame) = timeout(MAX_WAIT, rest.frame()).await else { break };
            match frame {
                Some(Ok(frame)) => read.extend(frame.into_data().ok()),
                // What broke off here breaks off at the caller too.
                Some(Err(error)) => return Self { head, read: read.freeze(), rest: Some(Err(error)) },
                None => return Self { head, read: read.freeze(), rest: None },
            }
        }
        Self { head, read: read.freeze(), rest: Some(Ok(rest)) }
    }

    /// What it means, by its text.
    pub(super) fn verdict(&self) -> Verdict {
        let text = inflated(self.head.headers.get(CONTENT_ENCODING).map(|coding| coding.as_bytes()), &self.read);
        let text = String::from_utf8_lossy(&text).to_ascii_lowercase();
        let scope = SCOPE_FAILURES.iter().find(|(sign, _)| text.contains(sign));
        scope.map_or(Verdict::Token, |(_, hint)| Verdict::Scope(hint))
    }

    /// The refusal as Amazon sent it.
    pub(super) fn pass_on(self) -> Response<Body> {
        Response::from_parts(self.head, Body::read(self.read, self.rest))
    }
}

/// The text for reading only: the caller gets the bytes as they came.
fn inflated(coding: Option<&[u8]>, bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    let limit = 4 * MAX_READ as u64;
    // What does not inflate to its end is read as far as it went.
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
        let mut answer = Response::new(());
        if let Some(coding) = coding {
            answer.headers_mut().insert(CONTENT_ENCODING, coding.parse().unwrap());
        }
        Refused { head: answer.into_parts().0, read: Bytes::copy_from_slice(body), rest: None }.verdict()
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
        let gzip = gzip.finish().unwrap();
        assert_eq!(verdict(Some("gzip"), &gzip), expected);
        assert_eq!(verdict(Some("GZIP"), &gzip), expected, "RFC 9110, section 8.4.1: names of codings ignore case");
        assert_eq!(verdict(Some("deflate"), &zlib.finish().unwrap()), expected);
        assert_eq!(verdict(Some("deflate"), &raw.finish().unwrap()), expected);
    }
}
