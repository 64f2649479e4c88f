//! Reads single keys by their type. What does not fit is written down, and the default stands in until all are read.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use figment::value::Value;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::errors::ConfigError;
use super::files;
use super::sources::{Given, Merged, WHOLE_FILE};
use crate::domain::secret::Secret;

/// Longest single text, in bytes: a URL, an id, a token. Amazon's tokens have at most 2,048.
const MAX_TEXT: usize = 4096;

/// Reads keys and collects problems.
pub(super) struct Reader<'a> {
    merged: &'a Merged,
    problems: Vec<ConfigError>,
}

impl<'a> Reader<'a> {
    /// Reads from `merged`, on top of the problems that its sources had.
    pub(super) fn new(merged: &'a Merged, problems: Vec<ConfigError>) -> Self {
        Self { merged, problems }
    }

    /// All problems, once everything is read; none are left.
    pub(super) fn take_problems(&mut self) -> Vec<ConfigError> {
        std::mem::take(&mut self.problems)
    }

    /// Writes down what is wrong with `key`, which was given somewhere or is a default.
    pub(super) fn wrong(&mut self, key: &str, message: impl Into<String>) {
        self.wrong_at(key, key, message);
    }

    /// Writes down what is wrong within the value of `key`, at what is called `place`.
    pub(super) fn wrong_at(&mut self, key: &str, place: &str, message: impl Into<String>) {
        let source = self.merged.get(key).map_or_else(|| "the default".to_owned(), |(_, source)| source);
        self.problems.push(ConfigError { key: place.to_owned(), source: Some(source), message: message.into() });
    }

    /// Writes down that nobody gave `key`. The message names it.
    pub(super) fn missing(&mut self, key: &str, message: &str) {
        // Somebody gave it and had that refused already, or gave it in a file that cannot be read: once is enough.
        if !self.problems.iter().any(|problem| problem.key == key || problem.key == WHOLE_FILE) {
            self.problems.push(ConfigError { key: key.to_owned(), source: None, message: message.to_owned() });
        }
    }

    /// Whether somebody gave `key`.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.merged.get(key).is_some()
    }

    /// The value of `key` as it stands in the file, for what is not a single value.
    pub(super) fn raw(&self, key: &str) -> Option<&'a Value> {
        match self.merged.get(key)? {
            (Given::Value(value), _) => Some(value),
            (Given::File(_), _) => None,
        }
    }

    /// The text of `key`, read by `parse`.
    pub(super) fn parsed<T, E: Display>(&mut self, key: &str, parse: impl FnOnce(&str) -> Result<T, E>) -> Option<T> {
        let text = self.text(key)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(error) => {
                self.wrong(key, error.to_string());
                None
            }
        }
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, default: T, words: &[(&str, T)]) -> T {
        self.parsed(key, |text| {
            let found = words.iter().find(|(word, _)| text.eq_ignore_ascii_case(word));
            found.map(|(_, value)| *value).ok_or_else(|| {
                let words: Vec<_> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
                format!("is none of its words: write {}", words.join(" or "))
            })
        })
        .unwrap_or(default)
    }

    /// `true` or `false`.
    pub(super) fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.raw(key) {
            Some(Value::Bool(_, flag)) => *flag,
            _ => self.choice(key, default, &[("true", true), ("false", false)]),
        }
    }

    /// A whole number within `range`.
    pub(super) fn count(&mut self, key: &str, default: usize, range: RangeInclusive<usize>) -> usize {
        let (least, most) = (range.start(), range.end());
        self.parsed(key, |text| {
            let number = text.parse::<usize>().ok().filter(|number| range.contains(number));
            number.ok_or_else(|| format!("is not a whole number from {least} to {most}: write it without unit"))
        })
        .unwrap_or(default)
    }

    /// A duration within `range`.
    pub(super) fn duration(&mut self, key: &str, default: Duration, range: RangeInclusive<Duration>) -> Duration {
        let (least, most) = (*range.start(), *range.end());
        self.parsed(key, |text| match humantime::parse_duration(text) {
            Err(_) => Err("is not a duration: write a number and its unit, such as 30s, 5m or 7d".to_owned()),
            Ok(duration) if !range.contains(&duration) => {
                let (least, most) = (humantime::format_duration(least), humantime::format_duration(most));
                Err(format!("is out of bounds: write a duration from {least} to {most}"))
            }
            Ok(duration) => Ok(duration),
        })
        .unwrap_or(default)
    }

    /// A number of bytes, at most `most`.
    pub(super) fn size(&mut self, key: &str, default: u64, most: u64) -> u64 {
        self.parsed(key, |text| parse_size(text, most)).unwrap_or(default)
    }

    /// A list of texts: a list in the file, or one text with commas. `None` where nobody gave it.
    pub(super) fn list(&mut self, key: &str) -> Option<Vec<String>> {
        match self.raw(key) {
            Some(Value::Array(_, values)) => {
                let texts: Option<Vec<_>> = values.iter().map(|value| value.as_str().map(str::to_owned)).collect();
                if texts.is_none() {
                    self.wrong(key, "its list holds something that is not a text: put each entry in quotes");
                }
                texts
            }
            _ => Some(parts(&self.text(key)?)),
        }
    }

    /// A list of whole numbers, in the file with or without quotes; none where nobody gave any.
    pub(super) fn numbers(&mut self, key: &str) -> Vec<u32> {
        let texts = match self.raw(key) {
            Some(Value::Array(_, values)) => values.iter().map(scalar).collect(),
            _ => Ok(self.list(key).unwrap_or_default()),
        };
        let texts = texts.map(|texts| texts.iter().map(|text| text.trim().parse()).collect());
        match texts {
            Ok(Ok(numbers)) => numbers,
            Ok(Err::<_, std::num::ParseIntError>(_)) | Err(_) => {
                self.wrong(key, "holds something that is no whole number: write numbers such as 1000, and no names");
                Vec::new()
            }
        }
    }

    /// One secret of visible ASCII characters.
    pub(super) fn secret(&mut self, key: &str) -> Option<Secret> {
        self.parsed(key, |text| checked_secret(text.trim()))
    }

    /// One or more secrets; none where nobody gave any.
    pub(super) fn secrets(&mut self, key: &str) -> Vec<Secret> {
        let Some(texts) = self.list(key) else { return Vec::new() };
        match texts.iter().map(|text| checked_secret(text)).collect::<Result<Vec<_>, _>>() {
            Ok(secrets) if secrets.is_empty() => {
                self.wrong(key, "is empty: give it a value, or remove it");
                Vec::new()
            }
            Ok(secrets) => secrets,
            Err(message) => {
                self.wrong(key, message);
                Vec::new()
            }
        }
    }

    /// The certificates in the PEM file that `key` names.
    pub(super) fn certificates(&mut self, key: &str) -> Vec<CertificateDer<'static>> {
        self.parsed(key, |path| files::read(Path::new(path)).and_then(|pem| parse_certificates(&pem)))
            .unwrap_or_default()
    }

    /// The text of a key that has one value, wherever that stands; never blank. A bare integer is taken as its digits.
    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        let text = match self.merged.get(key)?.0 {
            Given::File(path) => files::value(Path::new(path)),
            Given::Value(value) => scalar(value).and_then(|text| match text.trim() {
                "" => Err("is empty: give it a value, or remove it".to_owned()),
                _ => Ok(text),
            }),
        };
        text.map_err(|message| self.wrong(key, message)).ok()
    }
}

/// The text of a text, and the digits of an integer.
pub(super) fn scalar(value: &Value) -> Result<String, String> {
    match value {
        Value::String(_, text) => Ok(text.clone()),
        // figment has one accessor for signed and one for unsigned integers.
        Value::Num(_, number) => match number.to_i128().or_else(|| number.to_u128()?.try_into().ok()) {
            Some(number @ 0..) => Ok(number.to_string()),
            Some(_) => Err("is negative: write it without the sign".to_owned()),
            None => Err("is not a whole number: put it in quotes if it is a text".to_owned()),
        },
        _ => Err("is not a single text or number: put one value in quotes".to_owned()),
    }
}

/// The parts of a text between commas and line ends, without the blank ones.
fn parts(text: &str) -> Vec<String> {
    text.split([',', '\n']).map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

fn checked_secret(text: &str) -> Result<Secret, &'static str> {
    match text.len() {
        0 => Err("is empty: give it a value, or remove it"),
        1..=MAX_TEXT if text.bytes().all(|b| b.is_ascii_graphic()) => Ok(Secret::new(text)),
        1..=MAX_TEXT => {
            Err("holds a blank or a character that is not ASCII: copy it once more, without anything around")
        }
        _ => Err("is longer than 4096 characters: check that it is the right value"),
    }
}

fn parse_size(text: &str, most: u64) -> Result<u64, String> {
    // `bytesize` saturates instead of refusing, so the bound also catches what does not fit into 64 bits.
    match text.parse::<bytesize::ByteSize>() {
        Err(_) => Err("is not a size: write a number and its unit, such as 256KiB or 8MiB".to_owned()),
        Ok(size) if size.as_u64() > most => {
            Err(format!("is too large: write at most {}", bytesize::ByteSize::b(most).display().iec()))
        }
        Ok(size) => Ok(size.as_u64()),
    }
}

fn parse_certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    const CURE: &str = "give a PEM file with the certificates (-----BEGIN CERTIFICATE-----) of the authorities";
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| format!("its file is damaged PEM: {CURE}"))?;
    if certificates.is_empty() {
        return Err(format!("its file holds no certificate: {CURE}"));
    }
    let mut roots = RootCertStore::empty();
    if certificates.iter().any(|certificate| roots.add(certificate.clone()).is_err()) {
        return Err(format!("its file holds a certificate that does not parse: {CURE}"));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        for bad in ["", "-1", "many", "256 parrots", "1TiB", "99999999999999999999GiB", "KiB"] {
            assert!(parse_size(bad, 64 << 20).is_err(), "{bad}");
        }
        for (good, bytes) in [("0", 0), ("256KiB", 262_144), ("256 KB", 256_000), ("64MiB", 64 << 20), ("1000", 1000)] {
            assert_eq!(parse_size(good, 64 << 20), Ok(bytes), "{good}");
        }
    }

    #[test]
    fn secrets_with_blanks_around_are_trimmed_and_those_with_blanks_inside_are_refused() {
        for bad in ["", "a b", "a\tb", "ä", "a\r\nb: c", &"x".repeat(MAX_TEXT + 1)] {
            assert!(checked_secret(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parts(" a ,b\r\n,\n c,"), ["a", "b", "c"]);
    }

    #[test]
    fn a_file_without_a_usable_certificate_is_refused() {
        let garbage = "-----BEGIN CERTIFICATE-----\nYWJj\n-----END CERTIFICATE-----\n";
        let cut = "-----BEGIN CERTIFICATE-----\nYWJj\n";
        for bad in ["", "hello", garbage, cut, "-----BEGIN PRIVATE KEY-----\nYWJj\n-----END PRIVATE KEY-----\n"] {
            let message = parse_certificates(bad).unwrap_err();
            assert!(message.contains("PEM file"), "{message}");
        }
    }
}
