//! Reads a record that another program wrote, with the marks that such programs leave: `b'…'` around a token, a line
//! end behind it, times as numbers. Names the field at fault, without its value.

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use crate::domain::account::UserId;
use crate::domain::credential::{self, Credential};
use crate::domain::grant::{AccessToken, Grant, RefreshToken};
use crate::domain::secret::Secret;
use crate::store::keyring::Keyring;
use crate::store::stored_grant::{StoredGrant, StoredGrantError, parse_time};

/// Numbers above this one are milliseconds since 1970: as seconds it would be in the year 5138.
const MAX_SECONDS: f64 = 1e11;

/// Shortest Fernet token: version, time, one block of ciphertext and the signature, in base64 ("Token Format", Fernet
/// specification).
const MIN_FERNET: usize = 98;

/// A record as read.
#[derive(Debug)]
pub struct Imported {
    /// The grant in it.
    pub grant: Grant,
    /// The fields that were repaired, and how.
    pub repairs: Vec<(&'static str, &'static str)>,
}

/// Why a record yields no grant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// A field is at fault.
    #[error("{field} {flaw}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What is wrong with it, and what to do.
        flaw: String,
    },
    /// The record is no object, or its fields do not belong together.
    #[error(transparent)]
    Record(#[from] StoredGrantError),
}

fn at(field: &'static str) -> impl Fn(&str) -> ImportError {
    move |flaw| ImportError::Field { field, flaw: flaw.to_owned() }
}

/// Reads the record of `user`. Each token in it must be sealed with a key of the keyring.
///
/// # Errors
///
/// [`ImportError`] if the record yields no grant. No message contains a value of the record.
pub fn read(record: Value, user: &UserId, keyring: &Keyring) -> Result<Imported, ImportError> {
    let Value::Object(mut record) = record else { return Ok(opened(record, user, keyring)?) };
    let mut repairs = Vec::new();
    // A seal covers the ciphertexts, so nothing is sealed anew beside one.
    let sealed = record.get("seal").is_some_and(|seal| !seal.is_null());
    for field in ["refresh_token", "access_token", "previous_refresh_token"] {
        let Some(token) = given(&record, field) else { continue };
        let (token, mut made) = token_of(field, token, keyring, sealed)?;
        repairs.extend(made.drain(..).map(|repair| (field, repair)));
        record.insert(field.to_owned(), token.into());
    }
    for field in ["expires_at", "updated_at", "consented_at", "used_at"] {
        let Some(value) = given(&record, field) else { continue };
        let flaw = "is not a time: write RFC 3339, or the seconds or milliseconds since 1970 as a number";
        let time = time_of(value).ok_or_else(|| at(field)(flaw))?;
        record.insert(field.to_owned(), time.to_string().into());
    }
    for field in ["refresh_token", "updated_at"] {
        given(&record, field).ok_or_else(|| at(field)("is missing"))?;
    }
    for field in ["token_type", "scope"] {
        let text = record.get(field).is_none_or(|value| value.is_string() || (field == "scope" && value.is_null()));
        text.then_some(()).ok_or_else(|| at(field)("is not a text"))?;
    }
    let whole = record.get("generation").is_none_or(Value::is_u64);
    whole.then_some(()).ok_or_else(|| at("generation")("is not a whole number"))?;
    let Imported { grant, .. } = opened(record.into(), user, keyring)?;
    Ok(Imported { grant, repairs })
}

/// Reads a refresh token in clear text, and how it was repaired.
///
/// # Errors
///
/// What the text looks like and what to do, as the end of a sentence about the text. No part of it is quoted.
pub fn read_token(text: &str, now: Timestamp) -> Result<(Grant, Vec<&'static str>), String> {
    // A file, and standard input, end with a line end, which is no mistake.
    let checked = credential::read(Credential::RefreshToken, text.trim())?;
    let token = RefreshToken::new(Secret::new(checked.text.as_str()));
    let grant = Grant {
        refresh_token: token.map_err(|error| format!("is no refresh token: {error}"))?,
        previous: None,
        access: None,
        updated_at: now,
        consented_at: None,
        used_at: None,
        scope: None,
        generation: 0,
    };
    Ok((grant, checked.repairs))
}

fn opened(record: Value, user: &UserId, keyring: &Keyring) -> Result<Imported, StoredGrantError> {
    StoredGrant::import(record, user, keyring).map(|grant| Imported { grant, repairs: Vec::new() })
}

fn given<'a>(record: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    record.get(field).filter(|value| !value.is_null())
}

/// The Fernet token in `value`, and what was repaired: around it, or around the token that it encrypts.
fn token_of(
    field: &'static str,
    value: &Value,
    keyring: &Keyring,
    has_seal: bool,
) -> Result<(String, Vec<&'static str>), ImportError> {
    let fault = at(field);
    let text = value.as_str().ok_or_else(|| fault("is not a text"))?;
    let (ciphertext, mut repairs) = bare(text);
    if ["Atzr", "Atza"].iter().any(|start| ciphertext.starts_with(start)) {
        return Err(fault(
            "is a token in clear text, and must be encrypted with Fernet: `adsidecar users import` \
            without --records takes a refresh token in clear text",
        ));
    }
    let in_base64 = ciphertext.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=".contains(&byte));
    if !ciphertext.starts_with("gAAAA") || ciphertext.len() < MIN_FERNET || !in_base64 {
        return Err(fault("is not a Fernet token, which is one line of base64"));
    }
    let Some(opened) = keyring.open(ciphertext) else {
        return Err(fault(
            "is a Fernet token, but no configured Fernet key opens it: it was sealed with another key, \
            which belongs into store.fernet_keys, or it was changed",
        ));
    };
    let plain = std::str::from_utf8(&opened.plain);
    let plain = plain.map_err(|_| fault("was opened, but what it encrypts is not a token"))?;
    let (token, inner) = bare(plain);
    let token = Zeroizing::new(token.to_owned());
    if field == "access_token" {
        AccessToken::new(token.to_string()).map_err(|_| fault("was opened, but what it encrypts is not a token"))?;
    } else {
        credential::read(Credential::RefreshToken, &token)
            .map_err(|flaw| fault(&format!("was opened, but what it encrypts {flaw}")))?;
    }
    if *token == plain {
        return Ok((ciphertext.to_owned(), repairs));
    }
    if has_seal {
        return Err(fault("was opened, but what it encrypts is not a token alone"));
    }
    repairs.extend(inner);
    Ok((keyring.seal(token.as_bytes()), repairs))
}

/// The text without quotes, `b'…'`, byte order mark and line end.
fn bare(text: &str) -> (&str, Vec<&'static str>) {
    let (mut text, mut repairs) = credential::unwrapped(text);
    if let Some(inside) = credential::inside_bytes_literal(text) {
        repairs.push("stood in Python's b'…', which was removed");
        text = inside;
    }
    let written = text.trim_end_matches("\\n").trim_end_matches("\\r");
    if written.len() < text.len() {
        repairs.push("had a written-out line end (\\n) behind it, which was removed");
    }
    (written.trim(), repairs)
}

/// RFC 3339 with or without an offset, RFC 2822, seconds or milliseconds since 1970, or MongoDB's `{"$date": …}`.
fn time_of(value: &Value) -> Option<Timestamp> {
    match value {
        Value::Number(number) => since_1970(number.as_f64()?),
        Value::String(text) => {
            let text = text.trim();
            let dated = || rfc2822::parse(text).map(|time| time.timestamp()).ok();
            parse_time(text).or_else(dated).or_else(|| since_1970(text.parse().ok()?))
        }
        Value::Object(object) if object.len() == 1 => match object.get("$date")? {
            // Always milliseconds there.
            Value::Number(number) => Timestamp::from_millisecond(number.as_i64()?).ok(),
            text @ Value::String(_) => time_of(text),
            _ => None,
        },
        _ => None,
    }
}

fn since_1970(number: f64) -> Option<Timestamp> {
    let seconds = if number.abs() > MAX_SECONDS { number / 1000.0 } else { number };
    // Microseconds: a `f64` holds no more of today's times.
    let microseconds = (seconds * 1e6).round();
    (microseconds.abs() < i64::MAX as f64).then(|| Timestamp::from_microsecond(microseconds as i64).ok())?
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ring() -> Keyring {
        Keyring::new(&[crate::domain::secret::Secret::new("cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=")]).unwrap()
    }

    fn record(refresh_token: &str) -> Value {
        json!({"refresh_token": refresh_token, "updated_at": "2026-01-01T00:00:00Z"})
    }

    fn imported(record: Value) -> Result<Imported, ImportError> {
        read(record, &"anna".parse().unwrap(), &ring())
    }

    #[test]
    fn what_python_leaves_around_a_token_is_removed_and_reported() {
        let good = ring().seal(b"Atzr|x");
        let within = [&b"Atzr|x\n"[..], b"b'Atzr|x'", b"\"Atzr|x\"", b"Atzr|x"].map(|plain| ring().seal(plain));
        let around = [format!("b'{good}'"), format!("{good}\n"), format!("b'{good}\\n'"), format!("\"{good}\"")];
        for (index, text) in within.into_iter().chain(around).enumerate() {
            let imported = imported(record(&text)).unwrap_or_else(|error| panic!("{index}: {error}"));
            assert_eq!(imported.grant.refresh_token.secret().expose(), "Atzr|x");
            assert_eq!(imported.repairs.is_empty(), index == 3, "{index}");
        }
    }

    #[test]
    fn the_field_at_fault_is_named_in_its_own_words() {
        let other = Keyring::new(&[Keyring::generate_key()]).unwrap().seal(b"Atzr|canary");
        let with = |field: &str, value: Value| {
            let mut record = record(&ring().seal(b"Atzr|x"));
            record[field] = value;
            record
        };
        for (bad, field, flaw) in [
            (record("Atzr|canary"), "refresh_token", "clear text"),
            (record("canary"), "refresh_token", "is not a Fernet token"),
            (record(&other), "refresh_token", "another key"),
            (record(&ring().seal(b"can ary")), "refresh_token", "was opened"),
            (record(&ring().seal(b"Atza|canary")), "refresh_token", "an access token"),
            (record(&ring().seal(b"\xff")), "refresh_token", "was opened"),
            (with("access_token", json!("canary")), "access_token", "is not a Fernet token"),
            (with("expires_at", json!("canary")), "expires_at", "is not a time"),
            (with("updated_at", Value::Null), "updated_at", "is missing"),
            (with("refresh_token", Value::Null), "refresh_token", "is missing"),
            (with("generation", json!("canary")), "generation", "whole number"),
            (with("scope", json!(["canary"])), "scope", "is not a text"),
        ] {
            let error = imported(bad).unwrap_err().to_string();
            assert!(error.starts_with(field) && error.contains(flaw), "{error}");
            assert!(!error.contains("canary") && !error.contains(&other), "{error}");
        }
        assert!(imported(json!([])).is_err());
    }

    #[test]
    fn times_are_read_as_numbers_too() {
        let expected: Timestamp = "2024-01-01T12:00:00Z".parse().unwrap();
        for time in [
            json!(1_704_110_400),
            json!(1_704_110_400.0),
            json!(1_704_110_400_000_i64),
            json!("1704110400"),
            json!("2024-01-01 12:00:00"),
            json!("Mon, 01 Jan 2024 12:00:00 GMT"),
            json!({"$date": 1_704_110_400_000_i64}),
            json!({"$date": "2024-01-01T12:00:00Z"}),
        ] {
            assert_eq!(time_of(&time), Some(expected), "{time}");
        }
        for bad in [json!(true), json!(1e300), json!(""), json!({"$date": []}), json!("soon")] {
            assert_eq!(time_of(&bad), None, "{bad}");
        }
    }
}
