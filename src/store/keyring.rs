//! The Fernet keys: the first key encrypts, and each of them decrypts.
//!
//! The timestamp in a Fernet token is ignored. It is the time of encryption, and if it counted, a clock that is stepped
//! back would make every stored grant undecryptable. The record around a token states its expiry.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::str::FromStr;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use fernet::Fernet;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::domain::secret::Secret;

/// Length of a Fernet key in bytes ("Key Format", Fernet specification): 16 to sign, 16 to encrypt.
const KEY_BYTES: usize = 32;

/// The time that is passed to the library as the current time: the latest that its arithmetic allows (it adds 60 s of
/// clock skew), so that no timestamp is "in the future".
const END_OF_TIME: u64 = u64::MAX - 60;

/// Accepts what Python's `urlsafe_b64decode` accepts: handwritten keys may have trailing bits.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// One or more Fernet keys in order of precedence: the first one seals.
pub struct Keyring(Vec<Key>);

#[derive(Clone)]
struct Key {
    fernet: Fernet,
    fingerprint: Fingerprint,
}

/// The content of a Fernet token, and the key that opened it.
pub struct Unsealed {
    /// The plaintext, zeroed when dropped.
    pub plain: Zeroizing<Vec<u8>>,
    /// The index of the key in the keyring; 0 is the key that seals.
    pub key_index: usize,
}

/// Why a keyring cannot be built. The messages never contain a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No key is given.
    #[error("no Fernet key: set store.fernet_keys or FERNET_KEY; `adsidecar key new` creates one")]
    Missing,
    /// One of the keys is not a Fernet key.
    #[error(
        "Fernet key {position} is invalid: {flaw}. A Fernet key is 32 random bytes in URL-safe base64, 44 characters \
         that end in `=`; `adsidecar key new` creates one"
    )]
    Invalid {
        /// The position of the key, counted from 1.
        position: usize,
        /// What is wrong with it.
        flaw: &'static str,
    },
}

impl Keyring {
    /// Builds a keyring whose first key seals. White space around a key is ignored, because files end in a newline.
    ///
    /// # Errors
    ///
    /// [`KeyError`] if there is no key, or one of them is not a Fernet key.
    pub fn new(keys: &[Secret]) -> Result<Self, KeyError> {
        if keys.is_empty() {
            return Err(KeyError::Missing);
        }
        let read = |(index, key): (usize, &Secret)| {
            Key::read(key).map_err(|flaw| KeyError::Invalid { position: index + 1, flaw })
        };
        keys.iter().enumerate().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Generates a random key.
    pub fn generate_key() -> Secret {
        Secret::new(Fernet::generate_key())
    }

    /// Reads the key in the file at `path`. If the file does not exist, creates it with a new key, readable by its
    /// owner alone. Also returns whether it was created.
    ///
    /// # Errors
    ///
    /// [`io::Error`] if the file can be neither read nor created.
    pub fn read_or_create(path: &Path) -> io::Result<(Secret, bool)> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                let key = Self::generate_key();
                file.write_all(key.expose().as_bytes())?;
                file.sync_all()?;
                Ok((key, true))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok((Secret::new(fs::read_to_string(path)?), false))
            }
            Err(error) => Err(error),
        }
    }

    /// Encrypts with the first key, and returns a Fernet token.
    pub fn seal(&self, plain: &[u8]) -> String {
        // The library's `encrypt` panics if the clock is before 1970.
        let now = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
        self.0[0].fernet.encrypt_at_time(plain, now)
    }

    /// Decrypts a Fernet token with the first key that opens it; `None` if none does.
    pub fn open(&self, token: &str) -> Option<Unsealed> {
        self.0.iter().enumerate().find_map(|(key_index, key)| {
            let plain = key.fernet.decrypt_at_time(token, None, END_OF_TIME).ok()?;
            Some(Unsealed { plain: Zeroizing::new(plain), key_index })
        })
    }

    /// The same keys, of which the one with the fingerprint `first` seals, if it is among them.
    #[must_use]
    pub fn sealing_with(&self, first: Fingerprint) -> Self {
        let mut keys: Vec<Key> = self.0.iter().map(Key::clone).collect();
        if let Some(at) = keys.iter().position(|key| key.fingerprint == first) {
            keys[..=at].rotate_right(1);
        }
        Self(keys)
    }

    /// The fingerprint of the key that seals.
    pub fn first(&self) -> Fingerprint {
        self.0[0].fingerprint
    }

    /// The fingerprints of all keys, in order of precedence.
    pub fn fingerprints(&self) -> Vec<Fingerprint> {
        self.0.iter().map(|key| key.fingerprint).collect()
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyring").field(&self.fingerprints()).finish()
    }
}

impl Key {
    fn read(text: &Secret) -> Result<Self, &'static str> {
        let text = text.expose().trim();
        if text.is_empty() {
            return Err("it is empty");
        }
        if text.starts_with(['"', '\'']) || text.ends_with(['"', '\'']) {
            return Err("it is in quotes; remove them");
        }
        // `openssl rand -base64 32` uses the standard alphabet, and Python accepts both.
        let text = Zeroizing::new(text.replace('+', "-").replace('/', "_"));
        let bytes = Zeroizing::new(BASE64.decode(text.as_bytes()).map_err(|_| "it is not base64")?);
        if bytes.len() != KEY_BYTES {
            return Err("it is too short or too long");
        }
        let canonical = Zeroizing::new(BASE64.encode(&*bytes));
        let fernet = Fernet::new(&canonical).ok_or("it is not base64")?;
        Ok(Self { fernet, fingerprint: Fingerprint::of(&bytes) })
    }
}

/// Identifies a key without revealing it: the first 8 hexadecimal digits of the SHA-256 of its 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 4]);

impl Fingerprint {
    fn of(key: &[u8]) -> Self {
        let digest = Sha256::digest(key);
        Self([digest[0], digest[1], digest[2], digest[3]])
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", u32::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not a fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is 8 hexadecimal digits")]
pub struct BadFingerprint;

impl FromStr for Fingerprint {
    type Err = BadFingerprint;

    fn from_str(text: &str) -> Result<Self, BadFingerprint> {
        let legal = text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = legal.then(|| u32::from_str_radix(text, 16).ok()).flatten();
        number.map(|number| Self(number.to_be_bytes())).ok_or(BadFingerprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::engine::general_purpose::URL_SAFE;
    use serde::Deserialize;

    const KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";

    fn ring(keys: &[&str]) -> Keyring {
        let keys: Vec<_> = keys.iter().map(|key| Secret::new(*key)).collect();
        Keyring::new(&keys).unwrap()
    }

    fn text(opened: Unsealed) -> String {
        String::from_utf8(opened.plain.to_vec()).unwrap()
    }

    #[test]
    // Covers: failure 44.
    fn an_invalid_key_is_refused_with_the_remedy_and_without_quoting_it() {
        let (quoted, single) = (format!("\"{KEY}\""), format!("'{KEY}'"));
        let (long, pair) = (format!("{}AAAA=", &KEY[..43]), format!("{KEY},{KEY}"));
        let garbage = format!("{}$", &KEY[..43]);
        let spaced = format!("{} {}", &KEY[..20], &KEY[20..]);
        let doubly = format!("{KEY}=");
        for bad in [
            "",
            " \n",
            "changeme",
            &KEY[..40],
            &KEY[1..],
            &quoted,
            &single,
            &long,
            &pair,
            &garbage,
            &spaced,
            &doubly,
            "\u{feff}cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=",
        ] {
            let error = Keyring::new(&[Secret::new(KEY), Secret::new(bad)]).unwrap_err();
            let KeyError::Invalid { position: 2, .. } = error else { panic!("{bad:?}: {error}") };
            let message = error.to_string();
            assert!(message.contains("44 characters") && message.contains("adsidecar key new"), "{message}");
            assert!(bad.trim().is_empty() || !message.contains(bad.trim()), "{message}");
        }
        let none = Keyring::new(&[]).unwrap_err();
        assert!(none.to_string().contains("adsidecar key new"));
    }

    #[test]
    fn a_token_of_another_key_and_a_malformed_token_do_not_open() {
        let other = Keyring::new(&[Keyring::generate_key()]).unwrap();
        let token = ring(&[KEY]).seal(b"Atzr|x");
        assert!(other.open(&token).is_none());
        for bad in ["", "gAAA", "ü", &token[..token.len() - 4], &format!("{token}\n")] {
            assert!(ring(&[KEY]).open(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    // Covers: failure 44.
    fn a_key_is_accepted_as_files_and_other_tools_write_it() {
        let token = ring(&[KEY]).seal(b"x");
        let newline = format!(" {KEY}\r\n");
        let other_alphabet = KEY.replace('-', "+").replace('_', "/");
        let stray_bits = format!("{}5=", &KEY[..42]);
        for good in [KEY, &newline, &KEY[..43], &other_alphabet, &stray_bits] {
            assert!(ring(&[good]).open(&token).is_some(), "{good:?}");
        }
    }

    #[test]
    fn the_first_key_seals_and_any_opens() {
        let old = Keyring::generate_key();
        let new = Keyring::generate_key();
        let before = Keyring::new(std::slice::from_ref(&old)).unwrap();
        let during = Keyring::new(&[new.clone(), old]).unwrap();
        let after = Keyring::new(&[new]).unwrap();
        let token = before.seal(b"Atzr|x");
        assert_eq!(during.open(&token).unwrap().key_index, 1);
        assert!(after.open(&token).is_none());
        let resealed = during.seal(&during.open(&token).unwrap().plain);
        assert_eq!(during.open(&resealed).unwrap().key_index, 0);
        assert_eq!(text(after.open(&resealed).unwrap()), "Atzr|x");
        assert!(before.open(&resealed).is_none());
    }

    #[test]
    fn debug_output_contains_fingerprints_only() {
        let ring = ring(&[KEY]);
        // echo cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4= | tr _- /+ | base64 -d | sha256sum | cut -c1-8
        assert_eq!(format!("{ring:?}"), "Keyring([cbeb362f])");
        assert_eq!(ring.first().to_string().parse(), Ok(ring.first()));
        for bad in ["", "abc", "+1234567", "xyzxyzxy", "123456789"] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(BadFingerprint), "{bad}");
        }
    }

    #[derive(Deserialize)]
    struct Vector {
        #[serde(default)]
        desc: String,
        token: String,
        #[serde(default)]
        src: String,
        secret: String,
        now: Timestamp,
        #[serde(default)]
        ttl_sec: i64,
    }

    fn vectors(json: &str) -> Vec<Vector> {
        serde_json::from_str(json).unwrap()
    }

    const GENERATE: &str = include_str!("../../tests/fixtures/fernet/generate.json");
    const VERIFY: &str = include_str!("../../tests/fixtures/fernet/verify.json");
    const INVALID: &str = include_str!("../../tests/fixtures/fernet/invalid.json");

    /// The timestamp in the token.
    fn sealed_at(token: &str) -> i64 {
        let bytes = URL_SAFE.decode(token).unwrap();
        i64::from_be_bytes(bytes[1..9].try_into().unwrap())
    }

    #[test]
    fn the_six_malformed_vectors_of_the_specification_are_refused() {
        let invalid = vectors(INVALID);
        let refused: Vec<_> = invalid
            .iter()
            .filter(|vector| ring(&[&vector.secret]).open(&vector.token).is_none())
            .map(|vector| vector.desc.as_str())
            .collect();
        assert_eq!(
            refused,
            [
                "incorrect mac",
                "too short",
                "invalid base64",
                "payload size not multiple of block size",
                "payload padding error",
                "incorrect IV (causes padding error)",
            ]
        );
        assert_eq!(invalid.len(), 8);
    }

    #[test]
    fn the_vectors_to_generate_and_to_verify_behave_as_specified() {
        for vector in vectors(GENERATE).into_iter().chain(vectors(VERIFY)) {
            let ring = ring(&[&vector.secret]);
            assert_eq!(text(ring.open(&vector.token).unwrap()), vector.src);
            // We choose the IV, so our token has only its form in common with the vector's.
            let ours = ring.seal(vector.src.as_bytes());
            assert_eq!(ours.len(), vector.token.len());
            assert_eq!(URL_SAFE.decode(&ours).unwrap()[0], 0x80);
            let age = Timestamp::now().as_second() - sealed_at(&ours);
            assert!((0..60).contains(&age), "{age}");
        }
    }

    /// The specification lets a token expire by its timestamp. Ours are kept for a year and are opened on machines
    /// whose clocks are stepped: a grant must not become undecryptable because the clock went back by two minutes after
    /// it was sealed ("far-future TS"), nor because time passed ("expired TTL"). The record states the access token's
    /// expiry, under its seal.
    #[test]
    fn tokens_open_whatever_their_timestamp() {
        let invalid = vectors(INVALID);
        let about_time: Vec<_> = invalid
            .iter()
            .filter(|vector| {
                let age = vector.now.as_second() - sealed_at_or_zero(vector);
                vector.desc.starts_with("far-future") && age < -60
                    || vector.desc == "expired TTL" && age > vector.ttl_sec
            })
            .collect();
        assert_eq!(about_time.len(), 2);
        for vector in about_time {
            // These vectors give no plaintext; it is empty.
            assert_eq!(text(ring(&[&vector.secret]).open(&vector.token).unwrap()), "", "{}", vector.desc);
        }
    }

    fn sealed_at_or_zero(vector: &Vector) -> i64 {
        if URL_SAFE.decode(&vector.token).is_ok() { sealed_at(&vector.token) } else { 0 }
    }
}
