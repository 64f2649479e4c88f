//! The stored form of a grant: one JSON object per user.
//!
//! Each token is encrypted as its own Fernet token whose plaintext is the token and nothing else, so that any Fernet
//! implementation can decrypt it. Fernet has no associated data: with these alone, an attacker with write access to the
//! store could move one user's tokens to another user or change an expiry. The `seal`, one more Fernet token,
//! authenticates the fields together.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::domain::account::UserId;
use crate::domain::grant::{Access, AccessToken, Grant, RefreshToken};
use crate::store::keyring::{Fingerprint, Keyring};

/// One user's grant, encrypted. Unknown JSON fields are dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredGrant {
    /// The access token as a Fernet token; absent if only the refresh token is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    access_token: Option<String>,
    /// The refresh token as a Fernet token.
    refresh_token: String,
    /// The previous refresh token as a Fernet token; present only until a rotated refresh token has been used
    /// successfully.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous_refresh_token: Option<String>,
    #[serde(default = "bearer")]
    token_type: String,
    /// When the access token expires.
    #[serde(default, deserialize_with = "optional_time", skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    #[serde(deserialize_with = "time")]
    updated_at: Timestamp,
    #[serde(default, deserialize_with = "optional_time", skip_serializing_if = "Option::is_none")]
    consented_at: Option<Timestamp>,
    #[serde(default, deserialize_with = "optional_time", skip_serializing_if = "Option::is_none")]
    used_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    #[serde(default)]
    generation: u64,
    /// A Fernet token whose plaintext is a [`Binding`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seal: Option<String>,
}

/// The plaintext of the seal: the fields that it authenticates.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Binding {
    user: UserId,
    generation: u64,
    expires_at: Option<Timestamp>,
    consented_at: Option<Timestamp>,
    /// SHA-256, in hexadecimal digits, of the JSON array `[refresh_token, access_token]` of both ciphertexts, followed
    /// by the previous refresh token's if there is one.
    digest: String,
}

/// Why a record yields no grant. The record is kept: only a logout or an operator deletes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoredGrantError {
    /// No key of the keyring opens it.
    #[error("no configured Fernet key opens the record: add the key it was sealed with to store.fernet_keys")]
    Undecryptable,
    /// Its fields do not belong together, or belong to another user.
    #[error("the record's seal does not match its content: it was changed or moved outside adsidecar; log in again")]
    Tampered,
    /// It is not JSON of the documented form.
    #[error("the record is malformed: {0}")]
    Malformed(&'static str),
}

/// Describes the required form. The parser's own message would quote values, which may be tokens.
const BAD_FORM: StoredGrantError = StoredGrantError::Malformed(
    "it must be an object with at least refresh_token (Fernet) and updated_at, and usually access_token (Fernet), \
     token_type and expires_at; times are RFC 3339, in UTC if they have no offset",
);

/// A stored record as parsed, or why it does not parse.
pub(super) type ParsedRecord = Result<StoredGrant, StoredGrantError>;

/// What a record is sealed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sealed {
    /// This key of the keyring.
    By(Fingerprint),
    /// A key that is not in the keyring.
    ByUnknownKey,
    /// The record is malformed, or its seal does not match.
    Damaged,
}

impl fmt::Display for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::By(key) => key.fmt(f),
            Self::ByUnknownKey => f.write_str("unknown"),
            Self::Damaged => f.write_str("damaged"),
        }
    }
}

impl StoredGrant {
    /// Encrypts `grant` for `user` with the first key of the keyring.
    pub fn seal(grant: &Grant, user: &UserId, keyring: &Keyring) -> Self {
        let encrypt = |text: &str| keyring.seal(text.as_bytes());
        let mut record = Self {
            access_token: grant.access.as_ref().map(|access| encrypt(access.token.expose())),
            refresh_token: encrypt(grant.refresh_token.secret().expose()),
            previous_refresh_token: grant.previous.as_ref().map(|token| encrypt(token.secret().expose())),
            token_type: bearer(),
            expires_at: grant.access.as_ref().map(|access| access.expires_at),
            updated_at: grant.updated_at,
            consented_at: grant.consented_at,
            used_at: grant.used_at,
            scope: grant.scope.clone(),
            generation: grant.generation,
            seal: None,
        };
        let binding = serde_json::to_vec(&record.binding(user)).expect("names, numbers and times are JSON");
        record.seal = Some(keyring.seal(&binding));
        record
    }

    /// Checks the seal and decrypts the record.
    ///
    /// # Errors
    ///
    /// [`StoredGrantError`] if the record yields no grant. A record without a seal counts as tampered with: only
    /// [`import`](Self::import) accepts those.
    pub fn open(&self, user: &UserId, keyring: &Keyring) -> Result<Grant, StoredGrantError> {
        let seal = self.seal.as_deref().ok_or(StoredGrantError::Tampered)?;
        let Some(binding) = keyring.open(seal) else {
            // If no key opens the tokens either, the key is missing; otherwise the seal was changed.
            let readable = keyring.open(&self.refresh_token).is_some();
            return Err(if readable { StoredGrantError::Tampered } else { StoredGrantError::Undecryptable });
        };
        let binding: Binding = serde_json::from_slice(&binding.plain).map_err(|_| StoredGrantError::Tampered)?;
        if binding != self.binding(user) {
            return Err(StoredGrantError::Tampered);
        }
        self.decrypt(keyring)
    }

    /// Decrypts a record that another program or `store dump` wrote. The seal is optional, but must match if present.
    ///
    /// # Errors
    ///
    /// [`StoredGrantError`] if the record yields no grant.
    pub fn import(json: serde_json::Value, user: &UserId, keyring: &Keyring) -> Result<Grant, StoredGrantError> {
        let record: Self = serde_json::from_value(json).map_err(|_| BAD_FORM)?;
        if record.seal.is_some() { record.open(user, keyring) } else { record.decrypt(keyring) }
    }

    /// Parses stored JSON without decrypting it.
    ///
    /// # Errors
    ///
    /// [`StoredGrantError::Malformed`] if `json` does not have the documented form.
    pub fn parse(json: &[u8]) -> Result<Self, StoredGrantError> {
        serde_json::from_slice(json).map_err(|_| BAD_FORM)
    }

    /// Serializes the record as the JSON to store.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("text, numbers and times are JSON")
    }

    /// The generation of the grant, which rises with each stored change. Trustworthy only after [`open`](Self::open).
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// When the tokens last changed. Trustworthy only after [`open`](Self::open).
    pub fn updated_at(&self) -> Timestamp {
        self.updated_at
    }

    /// The index in the keyring of the key that opens the record. If its parts need several keys, the highest index: a
    /// rotation still has to replace that key. `None` if no key opens some part.
    pub fn key_index(&self, keyring: &Keyring) -> Option<usize> {
        let optional = [&self.access_token, &self.previous_refresh_token, &self.seal];
        let parts = [Some(&self.refresh_token)].into_iter().chain(optional.map(Option::as_ref));
        let indexes = parts.flatten().map(|token| Some(keyring.open(token)?.key_index));
        indexes.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    fn binding(&self, user: &UserId) -> Binding {
        let mut ciphertexts = vec![Some(&self.refresh_token), self.access_token.as_ref()];
        ciphertexts.extend(self.previous_refresh_token.as_ref().map(Some));
        let ciphertexts = serde_json::to_vec(&ciphertexts).expect("texts are JSON");
        Binding {
            user: user.clone(),
            generation: self.generation,
            expires_at: self.expires_at,
            consented_at: self.consented_at,
            digest: format!("{:x}", Sha256::digest(&ciphertexts)),
        }
    }

    fn decrypt(&self, keyring: &Keyring) -> Result<Grant, StoredGrantError> {
        let refresh_token = RefreshToken::new(plaintext(&self.refresh_token, keyring)?).map_err(|_| NO_TOKEN)?;
        // An access token without an expiry is not used: a refresh gets another.
        let access = match (&self.access_token, self.expires_at) {
            (Some(sealed), Some(expires_at)) => {
                let token = AccessToken::new(plaintext(sealed, keyring)?).map_err(|_| NO_TOKEN)?;
                Some(Access { token, expires_at })
            }
            _ => None,
        };
        let previous = self.previous_refresh_token.as_deref().map(|sealed| plaintext(sealed, keyring)).transpose()?;
        Ok(Grant {
            refresh_token,
            previous: previous.map(RefreshToken::new).transpose().map_err(|_| NO_TOKEN)?,
            access,
            updated_at: self.updated_at,
            consented_at: self.consented_at,
            used_at: self.used_at,
            scope: self.scope.clone(),
            generation: self.generation,
        })
    }
}

impl fmt::Debug for StoredGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("StoredGrant");
        debug.field("generation", &self.generation).field("updated_at", &self.updated_at).finish_non_exhaustive()
    }
}

const NO_TOKEN: StoredGrantError = StoredGrantError::Malformed("the encrypted text is not a token");

/// Decrypts a parsed record, and says what it is sealed with.
pub(super) fn open_record(
    user: &UserId,
    record: &ParsedRecord,
    keyring: &Keyring,
) -> (Result<Grant, StoredGrantError>, Sealed) {
    let record = record.as_ref().map_err(|error| *error);
    let grant = record.and_then(|record| record.open(user, keyring));
    let sealed = match grant.as_ref().and(record.as_ref()).map(|record| record.key_index(keyring)) {
        Ok(Some(index)) => Sealed::By(keyring.fingerprints()[index]),
        Ok(None) | Err(StoredGrantError::Undecryptable) => Sealed::ByUnknownKey,
        Err(StoredGrantError::Tampered | StoredGrantError::Malformed(_)) => Sealed::Damaged,
    };
    (grant, sealed)
}

/// Whether `record` already holds `grant`: then this save repeats a write that timed out but was applied.
pub(super) fn is_same_grant(record: &ParsedRecord, user: &UserId, grant: &Grant, keyring: &Keyring) -> bool {
    let access = |grant: &Grant| grant.access.as_ref().map(|access| access.token.clone());
    record.clone().and_then(|record| record.open(user, keyring)).is_ok_and(|stored| {
        stored.generation == grant.generation
            && stored.refresh_token == grant.refresh_token
            && access(&stored) == access(grant)
    })
}

fn plaintext(sealed: &str, keyring: &Keyring) -> Result<String, StoredGrantError> {
    let mut plain: Zeroizing<Vec<u8>> = keyring.open(sealed).ok_or(StoredGrantError::Undecryptable)?.plain;
    String::from_utf8(std::mem::take(&mut *plain)).map_err(|_| NO_TOKEN)
}

fn bearer() -> String {
    "bearer".into()
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
    optional_time(deserializer)?.ok_or_else(|| serde::de::Error::custom("a time is missing"))
}

fn optional_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    parse_time(&text).map(Some).ok_or_else(|| serde::de::Error::custom("not a time"))
}

/// Parses RFC 3339, or the same without an offset, as Python's `datetime.utcnow().isoformat()` writes it.
pub(super) fn parse_time(text: &str) -> Option<Timestamp> {
    let zoneless = || text.parse::<DateTime>().and_then(|time| time.to_zoned(TimeZone::UTC)).map(|at| at.timestamp());
    text.parse().or_else(|_| zoneless()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::secret::Secret;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn ring() -> Keyring {
        Keyring::new(&[Secret::new("cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=")]).unwrap()
    }

    fn user(name: &str) -> UserId {
        name.parse().unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn grant() -> Grant {
        Grant {
            refresh_token: RefreshToken::new("Atzr|canary".to_owned()).unwrap(),
            previous: None,
            access: Some(Access {
                token: AccessToken::new("Atza|canary".to_owned()).unwrap(),
                expires_at: at("2026-01-01T12:00:00Z"),
            }),
            updated_at: at("2026-01-01T11:00:00Z"),
            consented_at: Some(at("2025-12-01T00:00:00.5Z")),
            used_at: None,
            scope: Some("advertising::campaign_management".into()),
            generation: 7,
        }
    }

    /// The comparable facts of a grant, secrets included.
    fn facts(grant: &Grant) -> impl PartialEq + fmt::Debug + use<> {
        (
            grant.refresh_token.secret().expose().to_owned(),
            grant.previous.as_ref().map(|token| token.secret().expose().to_owned()),
            grant.access.as_ref().map(|access| (access.token.expose().to_owned(), access.expires_at)),
            (grant.updated_at, grant.consented_at, grant.used_at),
            grant.scope.clone(),
            grant.generation,
        )
    }

    fn value(record: &StoredGrant) -> Value {
        serde_json::from_slice(&record.to_json()).unwrap()
    }

    fn changed(record: &StoredGrant, field: &str, to: Value) -> StoredGrant {
        let mut json = value(record);
        json[field] = to;
        StoredGrant::parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    // Covers: threat 27.
    fn a_record_stored_under_another_user_is_refused() {
        let record = StoredGrant::seal(&grant(), &user("anna"), &ring());
        assert_eq!(record.open(&user("bob"), &ring()).unwrap_err(), StoredGrantError::Tampered);
    }

    #[test]
    // Covers: threat 29.
    fn a_change_to_any_sealed_field_is_refused() {
        let (ring, anna) = (ring(), user("anna"));
        let record = StoredGrant::seal(&grant(), &anna, &ring);
        let other = value(&StoredGrant::seal(&grant(), &anna, &ring));
        for (field, to) in [
            ("expires_at", json!("2036-01-01T12:00:00Z")),
            ("expires_at", Value::Null),
            ("consented_at", json!("2026-12-01T00:00:00Z")),
            ("consented_at", Value::Null),
            ("generation", json!(8)),
            ("refresh_token", other["refresh_token"].clone()),
            ("refresh_token", other["access_token"].clone()),
            ("access_token", other["access_token"].clone()),
            ("access_token", Value::Null),
            ("previous_refresh_token", other["refresh_token"].clone()),
            ("seal", Value::Null),
            ("seal", other["seal"].clone()),
            ("seal", other["refresh_token"].clone()),
            ("seal", json!("gAAAA")),
        ] {
            let error = changed(&record, field, to.clone()).open(&anna, &ring).unwrap_err();
            assert_eq!(error, StoredGrantError::Tampered, "{field} = {to}");
        }
    }

    #[test]
    fn swapping_access_and_refresh_token_is_refused() {
        let (ring, anna) = (ring(), user("anna"));
        let record = StoredGrant::seal(&grant(), &anna, &ring);
        let json = value(&record);
        let swapped = changed(&record, "access_token", json["refresh_token"].clone());
        let swapped = changed(&swapped, "refresh_token", json["access_token"].clone());
        assert_eq!(swapped.open(&anna, &ring).unwrap_err(), StoredGrantError::Tampered);
    }

    #[test]
    fn a_record_sealed_with_another_key_is_undecryptable() {
        let record = StoredGrant::seal(&grant(), &user("anna"), &ring());
        let other_ring = Keyring::new(&[Keyring::generate_key()]).unwrap();
        assert_eq!(record.open(&user("anna"), &other_ring).unwrap_err(), StoredGrantError::Undecryptable);
        assert_eq!(
            StoredGrant::import(value(&record), &user("anna"), &other_ring).unwrap_err(),
            StoredGrantError::Undecryptable
        );
    }

    #[test]
    fn a_malformed_record_is_refused_without_quoting_its_values() {
        let sealed = ring().seal(b"Atzr|x");
        for bad in [
            json!(null),
            json!([]),
            json!({}),
            json!({"refresh_token": sealed}),
            json!({"updated_at": "2026-01-01T00:00:00Z"}),
            json!({"refresh_token": sealed, "updated_at": "Atzr|canary"}),
            json!({"refresh_token": sealed, "updated_at": null}),
            json!({"refresh_token": sealed, "updated_at": "2026-01-01T00:00:00Z", "generation": "Atzr|canary"}),
            json!({"refresh_token": sealed, "updated_at": "2026-01-01T00:00:00Z", "expires_at": 1767225600}),
            json!({"refresh_token": ring().seal(b""), "updated_at": "2026-01-01T00:00:00Z"}),
            json!({"refresh_token": ring().seal(b"a\r\nb"), "updated_at": "2026-01-01T00:00:00Z"}),
            json!({"refresh_token": ring().seal(b"\xff"), "updated_at": "2026-01-01T00:00:00Z"}),
        ] {
            let error = StoredGrant::import(bad.clone(), &user("anna"), &ring()).unwrap_err();
            assert!(matches!(error, StoredGrantError::Malformed(_)), "{bad}: {error}");
            assert!(!error.to_string().contains("canary"));
        }
        assert!(matches!(StoredGrant::parse(b"{"), Err(StoredGrantError::Malformed(_))));
    }

    #[test]
    fn an_unencrypted_token_is_refused() {
        let json = json!({"refresh_token": "Atzr|canary", "updated_at": "2026-01-01T00:00:00Z"});
        let error = StoredGrant::import(json, &user("anna"), &ring()).unwrap_err();
        assert_eq!(error, StoredGrantError::Undecryptable);
    }

    #[test]
    fn neither_json_nor_debug_output_contains_a_token() {
        let record = StoredGrant::seal(&grant(), &user("anna"), &ring());
        assert!(!value(&record).to_string().contains("canary"));
        let debug = format!("{record:?}");
        assert!(!debug.contains("canary") && !debug.contains("gAAAA"), "{debug}");
    }

    #[test]
    // Covers: threat 28.
    fn a_record_has_the_documented_fields_and_each_token_is_encrypted_by_itself() {
        let json = value(&StoredGrant::seal(&grant(), &user("anna"), &ring()));
        let names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = ["access_token", "refresh_token", "token_type", "expires_at", "updated_at"].to_vec();
        expected.extend(["consented_at", "scope", "generation", "seal"]);
        expected.sort_unstable();
        assert_eq!(names, expected);
        assert_eq!(json["token_type"], "bearer");
        assert_eq!(json["expires_at"], "2026-01-01T12:00:00Z");
        let opened = ring().open(json["refresh_token"].as_str().unwrap()).unwrap();
        assert_eq!(&opened.plain[..], b"Atzr|canary");
    }

    #[test]
    fn a_five_field_record_of_another_program_is_imported_and_times_without_offset_are_utc() {
        let json = json!({
            "access_token": ring().seal(b"Atza|x"),
            "refresh_token": ring().seal(b"Atzr|x"),
            "token_type": "bearer",
            "expires_at": "2026-01-01T12:00:00.123456",
            "updated_at": "2026-01-01 11:00:00",
            "some_other_field": {"a": 1},
        });
        let grant = StoredGrant::import(json.clone(), &user("anna"), &ring()).unwrap();
        assert_eq!(grant.access.unwrap().expires_at, at("2026-01-01T12:00:00.123456Z"));
        assert_eq!(grant.updated_at, at("2026-01-01T11:00:00Z"));
        assert_eq!((grant.consented_at, grant.used_at, grant.scope, grant.generation), (None, None, None, 0));
        let unsealed = StoredGrant::parse(json.to_string().as_bytes()).unwrap();
        assert_eq!(unsealed.open(&user("anna"), &ring()).unwrap_err(), StoredGrantError::Tampered);
        assert!(!String::from_utf8(unsealed.to_json()).unwrap().contains("some_other_field"));
    }

    #[test]
    fn a_record_without_a_usable_access_token_is_imported() {
        for json in [
            json!({"refresh_token": ring().seal(b"Atzr|x"), "updated_at": "2026-01-01T13:00:00+02:00"}),
            json!({"refresh_token": ring().seal(b"Atzr|x"), "updated_at": "2026-01-01T11:00:00",
                   "access_token": ring().seal(b"Atza|x")}),
        ] {
            let grant = StoredGrant::import(json, &user("anna"), &ring()).unwrap();
            assert!(grant.access.is_none());
            assert_eq!(grant.updated_at, at("2026-01-01T11:00:00Z"));
        }
    }

    #[test]
    fn an_imported_seal_must_match() {
        let json = value(&StoredGrant::seal(&grant(), &user("anna"), &ring()));
        assert_eq!(facts(&StoredGrant::import(json.clone(), &user("anna"), &ring()).unwrap()), facts(&grant()));
        assert_eq!(StoredGrant::import(json, &user("bob"), &ring()).unwrap_err(), StoredGrantError::Tampered);
    }

    #[test]
    fn key_index_tells_whether_a_rotation_has_to_reseal_the_record() {
        let (old, new) = (Keyring::generate_key(), Keyring::generate_key());
        let before = Keyring::new(std::slice::from_ref(&old)).unwrap();
        let during = Keyring::new(&[new, old]).unwrap();
        let record = StoredGrant::seal(&grant(), &user("anna"), &before);
        assert_eq!(record.key_index(&before), Some(0));
        assert_eq!(record.key_index(&during), Some(1));
        let resealed = StoredGrant::seal(&record.open(&user("anna"), &during).unwrap(), &user("anna"), &during);
        assert_eq!(resealed.key_index(&during), Some(0));
        let half = changed(&resealed, "access_token", value(&record)["access_token"].clone());
        assert_eq!(half.key_index(&during), Some(1));
    }

    fn times() -> impl Strategy<Value = Timestamp> {
        (-62_135_596_800i64..253_402_207_200, 0i32..1_000_000_000)
            .prop_map(|(second, nano)| Timestamp::new(second, nano).unwrap())
    }

    fn grants() -> impl Strategy<Value = Grant> {
        let token = "[!-~]{1,300}";
        let parts = (
            (token, proptest::option::of(token)),
            proptest::option::of((token, times())),
            times(),
            proptest::option::of(times()),
            proptest::option::of(times()),
            proptest::option::of(".{0,40}"),
            any::<u64>(),
        );
        parts.prop_map(|((refresh, previous), access, updated_at, consented_at, used_at, scope, generation)| Grant {
            refresh_token: RefreshToken::new(refresh).unwrap(),
            previous: previous.map(|text| RefreshToken::new(text).unwrap()),
            access: access.map(|(text, expires_at)| Access { token: AccessToken::new(text).unwrap(), expires_at }),
            updated_at,
            consented_at,
            used_at,
            scope,
            generation,
        })
    }

    proptest! {
        #[test]
        fn sealing_and_opening_returns_the_same_grant(grant in grants(), name in "[A-Za-z0-9_@:|+-]{1,128}") {
            let ring = ring();
            let record = StoredGrant::seal(&grant, &user(&name), &ring);
            let again = StoredGrant::parse(&record.to_json()).unwrap();
            prop_assert_eq!(&again, &record);
            prop_assert_eq!(facts(&again.open(&user(&name), &ring).unwrap()), facts(&grant));
        }

        #[test]
        fn the_parser_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = StoredGrant::parse(&bytes).and_then(|record| record.open(&user("anna"), &ring()));
        }
    }
}
