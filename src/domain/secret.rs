//! A string that holds a secret: zeroed on drop, printed as `…`, never serialized.

use std::fmt;

use http::HeaderValue;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Text that must not appear in output: a token, a client secret, a Fernet key.
///
/// [`expose`](Self::expose) is the only way to read the text, so every reader can be found by searching for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        let secret = Self(Zeroizing::new(text.into()));
        #[cfg(feature = "failpoints")]
        recorded::add(&secret);
        secret
    }

    /// Returns the text. Review every call site: from here on nothing redacts or zeroes copies.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Returns `<scheme> <secret>` as a header value marked sensitive, or `None` if the text is not legal in a header.
    pub fn header(&self, scheme: &str) -> Option<HeaderValue> {
        let line = Zeroizing::new(format!("{scheme} {}", self.expose()));
        let mut value = HeaderValue::from_str(&line).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Compares in constant time: the duration depends neither on where the texts differ nor on the secret's length.
    pub fn matches(&self, candidate: &[u8]) -> bool {
        let ours = Sha256::digest(self.expose().as_bytes());
        Sha256::digest(candidate).ct_eq(&ours).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

/// Every secret that this process made, so that a test can look for secrets whose values it cannot know. Compiled with
/// the fail points only, and off until a test calls [`begin`](recorded::begin).
#[cfg(feature = "failpoints")]
pub mod recorded {
    use std::collections::BTreeSet;
    use std::sync::{Mutex, OnceLock, PoisonError};

    use super::Secret;

    static MADE: OnceLock<Mutex<BTreeSet<String>>> = OnceLock::new();

    /// Records every secret made from now on.
    pub fn begin() {
        MADE.get_or_init(Mutex::default);
    }

    /// The text of every secret recorded so far.
    pub fn all() -> BTreeSet<String> {
        MADE.get().map(|made| made.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }

    pub(super) fn add(secret: &Secret) {
        if let Some(made) = MADE.get() {
            made.lock().unwrap_or_else(PoisonError::into_inner).insert(secret.expose().to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_never_contains_the_text() {
        assert_eq!(format!("{:?}", Secret::new("Atzr|canary")), "…");
    }

    #[test]
    fn a_header_made_from_a_secret_is_sensitive() {
        let value = Secret::new("Atza|x").header("Bearer").unwrap();
        assert!(value.is_sensitive());
        assert_eq!(value, "Bearer Atza|x");
        assert!(!format!("{value:?}").contains("Atza"));
    }

    #[test]
    fn text_that_would_split_a_header_yields_none() {
        assert!(Secret::new("a\r\nb: c").header("Bearer").is_none());
    }

    #[test]
    // Covers: threat 4.
    fn comparison_accepts_only_the_whole_text() {
        let secret = Secret::new("abc");
        assert!(secret.matches(b"abc"));
        for wrong in [&b"ab"[..], b"abcd", b"", b"ABC"] {
            assert!(!secret.matches(wrong));
        }
    }
}
