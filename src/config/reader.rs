//! Reads single keys by the type that the table gives them, and records each effective value. An invalid value is
//! recorded as a problem and replaced by the default, so that all problems are found.
//!
//! The file is long because each type of the table has a method of its own; none of them is longer than a screen.

use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use figment::value::Value;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::errors::ConfigError;
use super::files;
use super::keys::Kind;
use super::names;
use super::print::{Effective, duration, list, quoted, size};
use super::sources::{Given, Merged, WHOLE_FILE};
use crate::domain::credential::{self, Checked, Credential};
use crate::domain::outgoing_proxy::OutgoingProxy;
use crate::domain::secret::Secret;

/// Longest single text, in bytes: a URL, an id, a token. Amazon's tokens have at most 2,048.
const MAX_TEXT: usize = 4096;

/// The word for no outgoing proxy.
const NO_PROXY: &str = "none";

/// Reads keys, and collects problems and effective values.
pub(super) struct Reader<'a> {
    merged: &'a Merged,
    problems: Vec<ConfigError>,
    warnings: Vec<ConfigError>,
    effective: Effective,
}

impl<'a> Reader<'a> {
    /// Reads from `merged`, in addition to the `problems` of its sources.
    pub(super) fn new(merged: &'a Merged, problems: Vec<ConfigError>) -> Self {
        Self { merged, problems, warnings: Vec::new(), effective: Effective::default() }
    }

    /// All problems, once everything is read; none are left.
    pub(super) fn take_problems(&mut self) -> Vec<ConfigError> {
        std::mem::take(&mut self.problems)
    }

    /// What was repaired, once everything is read; none are left.
    pub(super) fn take_warnings(&mut self) -> Vec<ConfigError> {
        std::mem::take(&mut self.warnings)
    }

    /// The effective values, once everything is read; none are left.
    pub(super) fn take_effective(&mut self) -> Effective {
        let mut effective = std::mem::take(&mut self.effective);
        effective.set_sources(|key| self.merged.get(key).map(|(_, source)| source));
        effective
    }

    /// The effective values so far, for those that are derived from other keys.
    pub(super) fn effective(&mut self) -> &mut Effective {
        &mut self.effective
    }

    /// Records a problem with `key`, whose value was given or is the default.
    pub(super) fn wrong(&mut self, key: &str, message: impl Into<String>) {
        self.wrong_at(key, key, message);
    }

    /// Records a problem at `place`, within the value of `key`.
    pub(super) fn wrong_at(&mut self, key: &str, place: &str, message: impl Into<String>) {
        let source = Some(self.source(key));
        self.problems.push(ConfigError { key: place.to_owned(), source, message: message.into() });
    }

    /// As [`doubt`](Self::doubt), for one place in the value of `key`.
    pub(super) fn doubt_at(&mut self, key: &str, place: &str, message: &str) {
        let source = Some(self.source(key));
        self.warnings.push(ConfigError { key: place.to_owned(), source, message: message.to_owned() });
    }

    /// Records that the value of `key` is legal and probably not what is meant.
    pub(super) fn doubt(&mut self, key: &str, message: impl Into<String>) {
        let source = Some(self.source(key));
        self.warnings.push(ConfigError { key: key.to_owned(), source, message: message.into() });
    }

    /// Records the repairs of the value of `key`, each once.
    fn repaired<'c>(&mut self, key: &str, checked: impl IntoIterator<Item = &'c Checked>) {
        for repair in checked.into_iter().flat_map(|checked| &checked.repairs) {
            let source = Some(self.source(key));
            let warning = ConfigError { key: key.to_owned(), source, message: (*repair).to_owned() };
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
    }

    fn source(&self, key: &str) -> String {
        self.merged.get(key).map_or_else(|| "the default".to_owned(), |(_, source)| source)
    }

    /// Records that no source gives `key`. The message names it.
    pub(super) fn missing(&mut self, key: &str, message: &str) {
        // One problem is enough for a key that was given and refused, or that an unreadable file may give.
        if !self.problems.iter().any(|problem| problem.key == key || problem.key == WHOLE_FILE) {
            self.problems.push(ConfigError { key: key.to_owned(), source: None, message: message.to_owned() });
        }
    }

    /// Whether a source gives `key`.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.merged.get(key).is_some()
    }

    /// Whether `word` is the value of `key`, given or by default.
    pub(super) fn says(&self, key: &str, word: &str) -> bool {
        match self.is_given(key) {
            true => self.raw(key).and_then(Value::as_str) == Some(word),
            false => names::row(key).default_text() == Some(word),
        }
    }

    /// The given value of `key` as it stands in the file, for a value that is not a single text.
    pub(super) fn raw(&self, key: &str) -> Option<&'a Value> {
        match self.merged.get(key)? {
            (Given::Value(value), _) => Some(value),
            (Given::File(_), _) => None,
        }
    }

    /// The value of `key`, read by `parse`: given, else the default of the table. `None`: neither.
    pub(super) fn parsed<T: Display, E: Display>(
        &mut self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        self.shown(key, parse, |value| quoted(&value.to_string()))
    }

    /// The value of a key that is a plain text, or a path.
    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        self.parsed(key, |text| Ok::<_, String>(text.to_owned()))
    }

    /// What the word given for `key`, or its default, stands for. `values` has a value for each word of the table.
    ///
    /// # Panics
    /// If the table has other words, which no word given by a user can cause; or if it has no default.
    pub(super) fn choice<T: Copy, const N: usize>(&mut self, key: &str, values: [(&str, T); N]) -> T {
        self.choice_or_none(key, values).unwrap_or_else(|| unreachable!("{key} has no default in the table"))
    }

    /// [`choice`](Self::choice) for a key whose default depends on others; `None` if no word is given.
    pub(super) fn choice_or_none<T: Copy, const N: usize>(&mut self, key: &str, values: [(&str, T); N]) -> Option<T> {
        let Kind::Word(words) = names::row(key).kind else { unreachable!("{key} has another type in the table") };
        // Before a word is read, so that each start of a process with a word too many ends here.
        assert!(words.iter().eq(values.iter().map(|(word, _)| word)), "{key} has other words in the table: {words:?}");
        let word = self.word(key)?;
        values.into_iter().find(|(each, _)| *each == word).map(|(_, value)| value)
    }

    /// One of the words of the table.
    fn word(&mut self, key: &str) -> Option<&'static str> {
        let Kind::Word(words) = names::row(key).kind else { unreachable!("{key} has another type in the table") };
        self.parsed(key, |text| {
            words.iter().copied().find(|word| text.eq_ignore_ascii_case(word)).ok_or_else(|| no_word(words))
        })
    }

    /// `true` or `false`.
    pub(super) fn flag(&mut self, key: &str) -> Option<bool> {
        if let Some(Value::Bool(_, flag)) = self.raw(key) {
            self.record(key, flag.to_string());
            return Some(*flag);
        }
        let parse = |text: &str| match text.to_ascii_lowercase().as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(no_word(&["true", "false"])),
        };
        self.shown(key, parse, bool::to_string)
    }

    /// A whole number within the bounds of the table.
    pub(super) fn count(&mut self, key: &str) -> usize {
        let Kind::Count(least, most) = names::row(key).kind else {
            unreachable!("{key} has another type in the table")
        };
        let parse = |text: &str| {
            let number = text.parse::<usize>().ok().filter(|number| (least..=most).contains(number));
            number.ok_or_else(|| format!("is not a whole number from {least} to {most}: write it without unit"))
        };
        self.shown(key, parse, usize::to_string).unwrap_or_default()
    }

    /// A duration within the bounds of the table.
    pub(super) fn duration(&mut self, key: &str) -> Duration {
        self.shown(key, |text| bounded_duration(key, text), |value| duration(*value)).unwrap_or_default()
    }

    /// A duration within the bounds of the table; `None` for the word `auto`.
    pub(super) fn duration_or_auto(&mut self, key: &str) -> Option<Duration> {
        let parse = |text: &str| match text {
            "auto" => Ok(None),
            _ => bounded_duration(key, text).map(Some),
        };
        let show = |value: &Option<Duration>| value.map_or_else(|| quoted("auto"), duration);
        self.shown(key, parse, show).flatten()
    }

    /// A number of bytes, up to the bound of the table.
    pub(super) fn size(&mut self, key: &str) -> u64 {
        let Kind::Size(most) = names::row(key).kind else { unreachable!("{key} has another type in the table") };
        let most = parse_size(most, u64::MAX).expect("the bounds of the table are sizes");
        self.shown(key, |text| parse_size(text, most), |bytes| size(*bytes)).unwrap_or_default()
    }

    /// A number of bytes; `None` for the word `none`.
    pub(super) fn size_or_none(&mut self, key: &str) -> Option<u64> {
        let parse = |text: &str| match text {
            "none" => Ok(None),
            _ => parse_size(text, u64::MAX).map(Some),
        };
        let show = |bytes: &Option<u64>| bytes.map_or_else(|| quoted("none"), size);
        self.shown(key, parse, show).flatten()
    }

    /// The entries of a list, each read by `parse`. Invalid ones are left out.
    pub(super) fn entries<T: Display, E: Display>(
        &mut self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Vec<T> {
        let mut entries = Vec::new();
        let Some(texts) = self.list(key) else { return entries };
        if texts.is_empty() && names::row(key).kind == Kind::Addresses {
            self.wrong(key, "is empty: name an address, or remove it");
        }
        for text in texts {
            match parse(&text) {
                Ok(entry) => entries.push(entry),
                Err(error) => self.wrong(key, error.to_string()),
            }
        }
        self.record(key, list(entries.iter().map(|entry| quoted(&entry.to_string()))));
        entries
    }

    /// A list of whole numbers, in the file with or without quotes.
    pub(super) fn numbers(&mut self, key: &str) -> Vec<u32> {
        let texts = match self.raw(key) {
            Some(Value::Array(_, values)) => values.iter().map(scalar).collect(),
            _ => Ok(self.list(key).unwrap_or_default()),
        };
        let numbers = texts.map(|texts| texts.iter().map(|text| text.trim().parse()).collect());
        let numbers: Vec<u32> = match numbers {
            Ok(Ok(numbers)) => numbers,
            Ok(Err::<_, std::num::ParseIntError>(_)) | Err(_) => {
                self.wrong(key, "holds something that is not a whole number: write numbers such as 1000, and no names");
                Vec::new()
            }
        };
        self.record(key, list(numbers.iter().map(u32::to_string)));
        numbers
    }

    /// One secret of visible ASCII characters.
    pub(super) fn secret(&mut self, key: &str) -> Option<Secret> {
        let secret = self.value(key, |text| checked_secret(text.trim()));
        self.effective.set_secrets(names::row(key).name, secret.as_slice());
        secret
    }

    /// A credential that may be shown, read by `parse` once its shape is right; else the default of the table.
    pub(super) fn credential<T: Display, E: Display>(
        &mut self,
        key: &str,
        kind: Credential,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let given = self.checked(key, kind).map(|checked| parse(&checked.text));
        let value = match given {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                self.wrong(key, error.to_string());
                return None;
            }
            None => parse(names::row(key).default_text()?).ok()?,
        };
        self.record(key, quoted(&value.to_string()));
        Some(value)
    }

    /// One secret credential.
    pub(super) fn secret_credential(&mut self, key: &str, kind: Credential) -> Option<Secret> {
        let secret = self.checked(key, kind).map(|checked| Secret::new(checked.text.as_str()));
        self.effective.set_secrets(names::row(key).name, secret.as_slice());
        secret
    }

    /// The given credential of `key`, if its shape is right.
    fn checked(&mut self, key: &str, kind: Credential) -> Option<Checked> {
        let text = self.given_text(key)?;
        let checked = credential::read(kind, &text).map_err(|flaw| self.wrong(key, flaw)).ok()?;
        self.repaired(key, [&checked]);
        Some(checked)
    }

    /// One or more secret credentials; empty if no source gives any.
    pub(super) fn secrets(&mut self, key: &str, kind: Credential) -> Vec<Secret> {
        if !self.is_given(key) {
            return Vec::new();
        }
        let read = match self.raw(key) {
            Some(Value::Array(..)) => {
                let Some(texts) = self.list(key) else { return Vec::new() };
                texts.iter().map(|text| credential::read(kind, text)).collect()
            }
            _ => {
                let Some(text) = self.given_text(key) else { return Vec::new() };
                credential::read_list(kind, &text)
            }
        };
        let checked: Vec<Checked> = match read {
            Ok(checked) if checked.is_empty() => {
                self.wrong(key, "is empty: give it a value, or remove it");
                Vec::new()
            }
            Ok(checked) => checked,
            Err(flaw) => {
                self.wrong(key, flaw);
                Vec::new()
            }
        };
        self.repaired(key, &checked);
        let secrets: Vec<_> = checked.iter().map(|checked| Secret::new(checked.text.as_str())).collect();
        self.effective.set_secrets(names::row(key).name, &secrets);
        secrets
    }

    /// An outgoing proxy. `None` for the word `none`, and for `environment` if that names none.
    pub(super) fn proxy(&mut self, key: &str) -> Option<OutgoingProxy> {
        let name = names::row(key).name;
        let text = if self.is_given(key) { self.given_text(key)? } else { NO_PROXY.to_owned() };
        let text = text.trim();
        let parsed = match text {
            NO_PROXY => Ok(None),
            "environment" => match self.merged.environment_proxy() {
                Some((variable, url, except)) => OutgoingProxy::parse(url, variable)
                    .map(|proxy| Some(OutgoingProxy { except: except.map(str::to_owned), ..proxy }))
                    .map_err(|error| format!("refers to {variable}, which {error}")),
                None => {
                    self.doubt(key, "neither HTTPS_PROXY nor ALL_PROXY is set, so no proxy is used");
                    Ok(None)
                }
            },
            url => OutgoingProxy::parse(url, name).map(Some).map_err(str::to_owned),
        };
        match parsed {
            Ok(Some(proxy)) if proxy.credentials.is_some() && proxy.named_by == name => {
                self.effective.set_secrets(name, &[Secret::new(text)]);
                Some(proxy)
            }
            Ok(proxy) => {
                self.record(key, quoted(text));
                proxy
            }
            Err(error) => {
                self.wrong(key, error);
                None
            }
        }
    }

    /// The certificates in the PEM file that `key` names.
    pub(super) fn certificates(&mut self, key: &str) -> Vec<CertificateDer<'static>> {
        let certificates = self
            .value(key, |path| files::read(Path::new(path)).and_then(|pem| parse_certificates(&pem)))
            .unwrap_or_default();
        if !certificates.is_empty() {
            let remark = format!("ca_file: {} certificates read", certificates.len());
            self.effective.remark(names::row(key).name, remark);
        }
        certificates
    }

    /// Records `toml` as the effective value of `key`.
    pub(super) fn record(&mut self, key: &str, toml: impl Display) {
        self.effective.set(names::row(key).name, toml);
    }

    /// As `parsed`, with the effective value written by `show`.
    fn shown<T, E: Display>(
        &mut self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, E>,
        show: impl Fn(&T) -> String,
    ) -> Option<T> {
        let value = self.value(key, parse)?;
        self.record(key, show(&value));
        Some(value)
    }

    /// As `parsed`, without an effective value.
    fn value<T, E: Display>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, E>) -> Option<T> {
        if let Some(text) = self.given_text(key) {
            match parse(&text) {
                Ok(value) => return Some(value),
                Err(error) => self.wrong(key, error.to_string()),
            }
        }
        names::row(key).default_text().and_then(|text| parse(text).ok())
    }

    /// The texts of a list: a list in the file, or one text with commas; the default if no source gives any. `None`:
    /// the value is invalid, and the problem recorded.
    fn list(&mut self, key: &str) -> Option<Vec<String>> {
        match self.raw(key) {
            Some(Value::Array(_, values)) => {
                let texts: Option<Vec<_>> = values.iter().map(|value| value.as_str().map(str::to_owned)).collect();
                if texts.is_none() {
                    self.wrong(key, "its list holds something that is not a text: put each entry in quotes");
                }
                texts
            }
            _ if self.is_given(key) => self.given_text(key).map(|text| parts(&text)),
            _ => Some(parts(names::row(key).default_text().unwrap_or_default())),
        }
    }

    /// The given text of a key that has one value, from its file if it is given as one; never blank. An integer is
    /// taken as its digits.
    fn given_text(&mut self, key: &str) -> Option<String> {
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

/// Refuses a text that is none of `words`.
pub(super) fn no_word(words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
    format!("is not a known value: write {}", words.join(" or "))
}

/// The text of a text, and the digits of an integer.
///
/// # Errors
///
/// For any other value, with a message that does not repeat it.
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

/// Reads the value of `key`, a duration within the bounds of the table.
fn bounded_duration(key: &str, text: &str) -> Result<Duration, String> {
    let (Kind::Duration(least, most) | Kind::DurationOrAuto(least, most)) = names::row(key).kind else {
        unreachable!("{key} has another type in the table")
    };
    let bound = |text| humantime::parse_duration(text).expect("the bounds of the table are durations");
    let (least, most) = (bound(least), bound(most));
    match humantime::parse_duration(text) {
        Err(_) => Err("is not a duration: write a number and its unit, such as 30s, 5m or 7d".to_owned()),
        Ok(duration) if !(least..=most).contains(&duration) => {
            let (least, most) = (humantime::format_duration(least), humantime::format_duration(most));
            Err(format!("is out of bounds: write a duration from {least} to {most}"))
        }
        Ok(duration) => Ok(duration),
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
