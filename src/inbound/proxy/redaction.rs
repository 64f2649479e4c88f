//! Keeps the access token out of refusals: some of Amazon's gateways quote the `Authorization` header in their errors,
//! and an app would log it.
//!
//! The token's characters are replaced one for one, so that the length of the body stays. Responses that are no
//! refusals are not searched.

use bytes::{Bytes, BytesMut};
use http::HeaderValue;

/// What a character of the token becomes.
const MASK: u8 = b'*';
/// Shortest part of the token, from its start, that is replaced where a quote breaks off: a shorter one gives nothing
/// away.
const MIN_PART: usize = 16;

/// Searches a stream of chunks for one access token (Knuth, Morris and Pratt), holding back only what may be the
/// beginning of it.
#[derive(Debug)]
pub(super) struct Redactor {
    /// The token behind its `Atza|`, which some quotes encode.
    needle: Needle,
    /// For each number of matched bytes, how many stay matched after a mismatch.
    fallback: Vec<usize>,
    /// How many bytes of the needle the last bytes match; they are held back.
    matched: usize,
    /// How many of them are certainly part of a quote.
    owed: usize,
}

/// Bytes that are not printed.
struct Needle(Vec<u8>);

impl std::fmt::Debug for Needle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

impl Redactor {
    /// Searches for the token of `bearer`, a value of `Authorization`.
    pub(super) fn new(bearer: &HeaderValue) -> Self {
        let token = bearer.as_bytes();
        let token = token.iter().rposition(|byte| *byte == b' ').map_or(token, |space| &token[space + 1..]);
        let secret = token.iter().position(|byte| *byte == b'|').map_or(token, |bar| &token[bar + 1..]);
        let needle = if secret.len() >= MIN_PART { secret } else { token }.to_vec();
        let mut fallback = vec![0; needle.len() + 1];
        let mut matched = 0;
        for end in 1..needle.len() {
            while matched > 0 && needle[end] != needle[matched] {
                matched = fallback[matched];
            }
            matched += usize::from(needle[end] == needle[matched]);
            fallback[end + 1] = matched;
        }
        Self { needle: Needle(needle), fallback, matched: 0, owed: 0 }
    }

    /// The part of `chunk`, and of what was held back before, that can be passed on.
    pub(super) fn chunk(&mut self, chunk: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(self.matched + chunk.len());
        for byte in chunk {
            while self.matched > 0 && self.needle.0.get(self.matched) != Some(byte) {
                self.shrink(self.fallback[self.matched], &mut out);
            }
            if self.needle.0.get(self.matched) == Some(byte) {
                self.matched += 1;
            } else {
                out.extend_from_slice(&[*byte]);
            }
            if self.matched == self.needle.0.len() {
                self.shrink(self.fallback[self.matched], &mut out);
            }
        }
        out.freeze()
    }

    /// What was held back when the body ends.
    pub(super) fn end(&mut self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.matched);
        self.shrink(0, &mut out);
        out.freeze()
    }

    /// How many bytes are held back.
    pub(super) fn held(&self) -> usize {
        self.matched
    }

    /// Passes on all but the last `rest` of the bytes held back.
    fn shrink(&mut self, rest: usize, out: &mut BytesMut) {
        if self.matched >= MIN_PART.min(self.needle.0.len()) {
            self.owed = self.matched;
        }
        let leaving = self.matched - rest;
        let masked = self.owed.min(leaving);
        out.resize(out.len() + masked, MASK);
        out.extend_from_slice(&self.needle.0[masked..leaving]);
        self.owed -= masked;
        self.matched = rest;
    }
}

/// `text` without the token of `bearer`; `None` if it does not quote it.
pub(super) fn redacted(bearer: &HeaderValue, text: &[u8]) -> Option<Bytes> {
    let mut redactor = Redactor::new(bearer);
    let clean = [redactor.chunk(text), redactor.end()].concat();
    (clean != text).then(|| clean.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOKEN: &str = "IwEBIabc-DEF_0123456789abcdefABCDEF";

    fn bearer(token: &str) -> HeaderValue {
        format!("Bearer Atza|{token}").parse().unwrap()
    }

    /// The text after the search, in chunks of `size` bytes.
    fn searched(token: &str, text: &str, size: usize) -> String {
        let mut redactor = Redactor::new(&bearer(token));
        let mut out: Vec<u8> = text.as_bytes().chunks(size).flat_map(|chunk| redactor.chunk(chunk)).collect();
        out.extend(redactor.end());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_token_is_replaced_in_chunks_of_any_size_and_nothing_else() {
        let mask = "*".repeat(TOKEN.len());
        for text in [
            "'Atza|{}' not a valid key=value pair in Authorization header: 'Bearer Atza|{}'.",
            "Atza%7C{}",
            r"Atza\u007c{}",
            "{}{}",
            "IwEBI {} IwEBIabc-DEF_0",
            "nothing",
        ] {
            let (quoted, clean) = (text.replace("{}", TOKEN), text.replace("{}", &mask));
            for size in 1..quoted.len() + 1 {
                assert_eq!(searched(TOKEN, &quoted, size), clean, "{size}");
            }
        }
    }

    #[test]
    fn a_quote_that_breaks_off_is_replaced_too() {
        let part = &TOKEN[..20];
        for (text, clean) in [(part.to_owned(), "*".repeat(20)), (format!("{part}…"), format!("{}…", "*".repeat(20)))]
        {
            assert_eq!(searched(TOKEN, &text, 3), clean);
        }
    }

    proptest! {
        /// Also for tokens that repeat themselves, whose matches overlap.
        #[test]
        fn no_token_survives_and_the_length_stays(
            token in "[ab]{16,24}", parts in proptest::collection::vec("[ab]{0,30}", 1..6), size in 1usize..9
        ) {
            let text = parts.join(&token);
            let clean = searched(&token, &text, size);
            prop_assert_eq!(clean.len(), text.len());
            prop_assert!(!clean.contains(&token));
            prop_assert_eq!(clean.contains('*'), text.contains(&token[..16]));
            prop_assert!(clean.bytes().zip(text.bytes()).all(|(now, then)| now == then || now == b'*'));
        }
    }
}
