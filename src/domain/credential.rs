//! The shape of a credential as people have it: with quotes around it, as a whole JSON document, percent-encoded.
//!
//! Every source of a credential (environment, file, flag, import) is read by [`read`], so that nothing of a wrong shape
//! is sent to Login with Amazon, whose answer would blame the user. What can be repaired without doubt is repaired and
//! reported; anything else is refused with what it looks like. No message contains any part of the value.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use zeroize::Zeroizing;

/// Longest credential, in bytes. Amazon's tokens have at most 2,048.
const MAX_LENGTH: usize = 4096;

/// Removed from the beginning of a text: U+FEFF, which some editors write there.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// What a text is meant to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// The client id of Login with Amazon.
    ClientId,
    /// The client secret of Login with Amazon.
    ClientSecret,
    /// A refresh token of Login with Amazon.
    RefreshToken,
    /// Scopes, separated by blanks.
    Scope,
    /// A Fernet key.
    FernetKey,
    /// The token that callers must send to adsidecar.
    CallerToken,
}

use Credential::{CallerToken, ClientId, ClientSecret, FernetKey, RefreshToken, Scope};

/// A credential whose shape is right.
#[derive(Debug, PartialEq, Eq)]
pub struct Checked {
    /// Its text, after the repairs.
    pub text: Zeroizing<String>,
    /// What was repaired, as the end of a sentence about the value.
    pub repairs: Vec<&'static str>,
}

/// Repairs `text` where that needs no guess, and checks that it can be what it is meant to be.
///
/// # Errors
/// What the text looks like and what to do, as the end of a sentence about the value.
pub fn read(credential: Credential, text: &str) -> Result<Checked, String> {
    let (text, repairs) = unwrapped(text);
    match flaw(credential, text) {
        Some(flaw) => Err(credential.refusal(&flaw)),
        None => Ok(Checked { text: Zeroizing::new(text.to_owned()), repairs }),
    }
}

/// Like [`read`], for a text with several credentials between commas or line ends.
///
/// # Errors
/// As for [`read`], for the first one at fault.
pub fn read_list(credential: Credential, text: &str) -> Result<Vec<Checked>, String> {
    let (whole, repairs) = unwrapped(text);
    // A document would be cut at its commas.
    if let Some(flaw) = document(whole) {
        return Err(credential.refusal(flaw));
    }
    let parts = whole.split([',', '\n']).map(str::trim).filter(|part| !part.is_empty());
    let mut list = parts.map(|part| read(credential, part)).collect::<Result<Vec<_>, _>>()?;
    if let Some(first) = list.first_mut() {
        first.repairs.splice(0..0, repairs);
    }
    Ok(list)
}

/// The text without what commonly stands around it, and what that was. Blanks around it mean nothing and are not
/// reported.
pub fn unwrapped(text: &str) -> (&str, Vec<&'static str>) {
    let mut repairs = Vec::new();
    let mut rest = text.trim_matches([' ', '\t']);
    if let Some(after) = rest.strip_prefix(BYTE_ORDER_MARK) {
        repairs.push("begins with a byte order mark, which was removed: save it as UTF-8 without one");
        rest = after;
    }
    let mut line_end = rest.trim().len() < rest.trim_matches([' ', '\t']).len();
    rest = rest.trim();
    let inside = |quote: char| {
        let inside = rest.strip_prefix(quote)?.strip_suffix(quote)?;
        (!inside.is_empty() && !inside.contains(quote)).then_some(inside)
    };
    if let Some(inside) = inside('"').or_else(|| inside('\'')) {
        repairs.push("stands in quotes, which were removed: write it without them");
        line_end |= inside.trim().len() < inside.trim_matches([' ', '\t']).len();
        rest = inside.trim();
    }
    if line_end {
        repairs.push("has a line end around it, which was removed: write it without one (`printf %s`, not `echo`)");
    }
    (rest, repairs)
}

/// The text inside Python's `str()` of a bytes object, `b'…'`.
pub fn inside_bytes_literal(text: &str) -> Option<&str> {
    let quoted = text.strip_prefix(['b', 'B'])?;
    let inside = |quote| quoted.strip_prefix(quote)?.strip_suffix(quote);
    inside('\'').or_else(|| inside('"'))
}

/// What is wrong with a text whose commas and line ends are part of it.
fn document(text: &str) -> Option<&'static str> {
    let placeholder = text.starts_with("{{") || text.starts_with("${") || text.starts_with("$(");
    if !placeholder && (text.starts_with(['{', '[']) && text.ends_with(['}', ']'])) {
        return Some(
            "looks like a JSON document, such as the whole secret of a secrets manager: give the one value alone (in \
             Amazon ECS, `valueFrom` ends with the name of the JSON key and `::`)",
        );
    }
    if inside_bytes_literal(text).is_some() {
        return Some("looks like Python's str() of bytes (b'…'): write only what stands between the quotes");
    }
    None
}

fn flaw(credential: Credential, text: &str) -> Option<String> {
    let amazons = !matches!(credential, FernetKey | CallerToken);
    let told = |flaw: &str| Some(flaw.to_owned());
    if text.is_empty() {
        return told("is empty: give it a value, or remove it");
    }
    if text.len() > MAX_LENGTH {
        return told("is longer than 4096 characters: check that it is the right value");
    }
    if let Some(flaw) = document(text) {
        return told(flaw);
    }
    if is_placeholder(text) {
        return told("looks like a placeholder, whose real value was never filled in: put that there");
    }
    if text.starts_with(['"', '\'', '`']) || text.ends_with(['"', '\'', '`']) {
        return told("looks like a text in quotes of which one is missing or too many: write the value without quotes");
    }
    if is_assignment(credential, text) {
        return told("looks like NAME=value: give the value alone, without the name");
    }
    if starts_with(text, "bearer ") || starts_with(text, "authorization:") {
        return told("looks like a header: give the token alone, without the words before it");
    }
    if text.contains("://") {
        return told("looks like a URL: give the value alone");
    }
    if credential != CallerToken && is_path(text) && !is_fernet_key(text) {
        return told("looks like the path of a file: name files in the key or variable that ends with _file or _FILE");
    }
    if text.ends_with("\\n") || (amazons && text.contains('\\')) {
        return told("looks like an escaped text, with a backslash in it (\\n): write the value itself");
    }
    if credential != CallerToken && has_percent_escape(text) {
        return told("looks percent-encoded, as in a URL (%7C is |, %3A is :): decode it");
    }
    match credential {
        Scope => return scope_flaw(text).map(str::to_owned),
        _ if !text.bytes().all(|byte| byte.is_ascii_graphic()) => {
            return told("holds a blank or a character that is not ASCII: copy it once more, without anything around");
        }
        _ => {}
    }
    let known = Known::of(text)?;
    let wrong = match credential {
        ClientId => known != Known::ClientId,
        ClientSecret => known != Known::ClientSecret,
        RefreshToken => known != Known::RefreshToken,
        FernetKey => known != Known::FernetKey,
        // Any other text can be a caller token, also one that looks like a Fernet key.
        CallerToken => known.is_amazons(),
        Scope => false,
    };
    wrong.then(|| format!("looks like {known}, {}", credential.wanted()))
}

impl Credential {
    fn refusal(self, flaw: &str) -> String {
        if self == FernetKey { format!("{flaw}; `adsidecar key new` makes one") } else { flaw.to_owned() }
    }

    fn wanted(self) -> &'static str {
        match self {
            ClientId => {
                "not a client id: that begins with amzn1.application-oa2-client.; copy it from the security profile"
            }
            ClientSecret => "not a client secret: copy that from the security profile of Login with Amazon",
            RefreshToken => "not a refresh token: that begins with Atzr| and comes with the answer to a code exchange",
            Scope => "not a scope: write scopes such as advertising::campaign_management",
            FernetKey => "not a Fernet key",
            CallerToken => "not a caller token: choose a random text of your own, such as from `openssl rand -hex 32`",
        }
    }
}

/// What a text is by its form alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    ClientId,
    AppId,
    ClientSecret,
    RefreshToken,
    BareRefreshToken,
    RefreshTokenCut,
    AccessToken,
    Code,
    FernetToken,
    FernetKey,
    Jwt,
}

impl Known {
    fn of(text: &str) -> Option<Self> {
        let alphanumeric = || text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let known = match text {
            "Atzr" | "Atzr|" => Self::RefreshTokenCut,
            _ if text.starts_with("Atzr|") => Self::RefreshToken,
            _ if text.starts_with("Atza") => Self::AccessToken,
            _ if text.starts_with("IwEBI") => Self::BareRefreshToken,
            _ if text.starts_with("amzn1.application-oa2-client.") => Self::ClientId,
            _ if text.starts_with("amzn1.application.") => Self::AppId,
            _ if text.starts_with("amzn1.oa2-cs.") => Self::ClientSecret,
            _ if text.starts_with("AN") && (18..=24).contains(&text.len()) && alphanumeric() => Self::Code,
            _ if text.starts_with("gAAAA") && text.len() >= 100 => Self::FernetToken,
            _ if text.starts_with("eyJ") && text.matches('.').count() == 2 => Self::Jwt,
            _ if text.ends_with('=') && is_fernet_key(text) => Self::FernetKey,
            _ => return None,
        };
        Some(known)
    }

    fn is_amazons(self) -> bool {
        !matches!(self, Self::Code | Self::FernetKey | Self::Jwt)
    }
}

impl std::fmt::Display for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ClientId => "a client id",
            Self::AppId => "an app id (amzn1.application.)",
            Self::ClientSecret => "a client secret",
            Self::RefreshToken => "a refresh token",
            Self::BareRefreshToken => {
                "a token without its first five characters, such as Atzr| (a shell takes | as a pipe)"
            }
            Self::RefreshTokenCut => {
                "a refresh token that was cut off at its | (a shell takes that as a pipe: quote it)"
            }
            Self::AccessToken => "an access token (Atza), which lives for an hour",
            Self::Code => "an authorization code (AN…), which is exchanged once",
            Self::FernetToken => "a text that was encrypted with Fernet (gAAAA)",
            Self::FernetKey => "a Fernet key",
            Self::Jwt => "a JSON Web Token (eyJ)",
        })
    }
}

fn scope_flaw(text: &str) -> Option<&'static str> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b" :_-./".contains(&byte);
    if text.contains([',', ';', '|']) {
        Some("looks like a list with commas: separate scopes by blanks")
    } else if text.contains('+') || text.contains('%') {
        Some("looks percent-encoded, as in a URL (+ is a blank): decode it, and separate scopes by blanks")
    } else if text.split(' ').any(|scope| scope.starts_with("advertising:") && !scope.starts_with("advertising::")) {
        Some("looks like a scope with one colon: write advertising::, with two")
    } else if Known::of(text).is_some_and(Known::is_amazons) {
        Some("looks like another credential, not a scope: write scopes such as advertising::campaign_management")
    } else if !text.bytes().all(legal) {
        Some("is no scope: write scopes such as advertising::campaign_management, separated by blanks")
    } else {
        None
    }
}

fn starts_with(text: &str, lower: &str) -> bool {
    text.get(..lower.len()).is_some_and(|start| start.eq_ignore_ascii_case(lower))
}

fn is_placeholder(text: &str) -> bool {
    let letters: Zeroizing<String> = Zeroizing::new(
        text.chars().filter(|c| !['-', '_', ' ', '.'].contains(c)).map(|c| c.to_ascii_lowercase()).collect(),
    );
    let between = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    let start = text.rfind(['|', '.']).map_or(0, |at| at + 1);
    let masked = text[start..].len() >= 3 && text[start..].chars().all(|c| "xX*#?".contains(c));
    let words = ["replaceme", "changeme", "placeholder", "insertyour", "yourclient", "yourrefresh", "yoursecret"];
    words.iter().any(|word| letters.contains(word))
        || ["none", "null", "undefined", "todo", "tbd", "redacted", "[redacted]", "dummy"].contains(&letters.as_str())
        || [("<", ">"), ("${", "}"), ("$(", ")"), ("{{", "}}"), ("%(", ")s")].iter().any(|(a, b)| between(a, b))
        || text.contains('…')
        || text.ends_with("...")
        || masked
}

/// Whether `text` is `NAME=value` or `name: value`, perhaps after `export`. A base64 text has `=` at its end only.
fn is_assignment(credential: Credential, text: &str) -> bool {
    let text = text.strip_prefix("export ").or_else(|| text.strip_prefix("set ")).unwrap_or(text);
    let named = |name: &str, value: &str| {
        let name = name.trim_end();
        let word = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        // A caller token can be any text; only what is clearly a name counts.
        let clear = credential != CallerToken
            || (name.contains(['_', '.'])
                && (name.to_ascii_lowercase().contains("token") || name.bytes().all(|b| !b.is_ascii_lowercase())));
        word && clear && !value.trim_matches(['=', ' ']).is_empty()
    };
    text.split_once('=').is_some_and(|(name, value)| named(name, value))
        || text.split_once(": ").is_some_and(|(name, value)| named(name, value))
}

fn is_path(text: &str) -> bool {
    ["/", "./", "../", "~/"].iter().any(|start| text.starts_with(start))
}

fn has_percent_escape(text: &str) -> bool {
    text.as_bytes().windows(3).any(|three| three[0] == b'%' && three[1..].iter().all(u8::is_ascii_hexdigit))
}

/// Whether `text` is 32 bytes in base64, in either alphabet.
fn is_fernet_key(text: &str) -> bool {
    let decoded = URL_SAFE.decode(text).or_else(|_| STANDARD.decode(text));
    text.len() == 44 && decoded.map(Zeroizing::new).is_ok_and(|bytes| bytes.len() == 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";

    fn refused(credential: Credential, text: &str) -> String {
        read(credential, text).expect_err(text)
    }

    #[test]
    fn quotes_a_line_end_and_a_byte_order_mark_are_removed_and_reported() {
        for (text, repairs) in [
            ("Atzr|x", 0),
            (" Atzr|x\t", 0),
            ("\"Atzr|x\"", 1),
            ("'Atzr|x'", 1),
            ("Atzr|x\r\n", 1),
            ("\u{feff}Atzr|x", 1),
            ("\u{feff}\"Atzr|x\n\"\n", 3),
        ] {
            let checked = read(RefreshToken, text).unwrap();
            assert_eq!((checked.text.as_str(), checked.repairs.len()), ("Atzr|x", repairs), "{text:?}");
        }
    }

    #[test]
    fn what_looks_like_something_else_is_refused_with_what_it_looks_like() {
        for (credential, text, looks_like) in [
            (RefreshToken, "Atza|canary", "an access token"),
            (RefreshToken, "ANDMxqpCmqWHJeyzIQxj", "an authorization code"),
            (RefreshToken, "Atzr%7Ccanary", "percent-encoded"),
            (RefreshToken, "Atzr", "cut off"),
            (RefreshToken, "AMAZON_REFRESH_TOKEN=Atzr|canary", "NAME=value"),
            (RefreshToken, "refresh_token: Atzr|canary", "NAME=value"),
            (RefreshToken, "b'Atzr|canary'", "b'…'"),
            (RefreshToken, "Bearer Atza|canary", "a header"),
            (RefreshToken, "gAAAA", ""),
            (ClientSecret, "{\"client_id\":\"canary\"}", "JSON"),
            (ClientSecret, "amzn1.application-oa2-client.canary", "a client id"),
            (ClientSecret, "/run/secrets/canary", "path"),
            (ClientSecret, "${AMAZON_CLIENT_SECRET}", "placeholder"),
            (ClientId, "amzn1.oa2-cs.v1.canary", "a client secret"),
            (ClientId, "amzn1.application.canary", "an app id"),
            (ClientId, "amzn1.application-oa2-client.replace-me", "placeholder"),
            (Scope, "advertising::a,advertising::b", "commas"),
            (Scope, "advertising%3A%3Aa", "percent-encoded"),
            (Scope, "advertising::a+advertising::b", "percent-encoded"),
            (Scope, "advertising:campaign_management", "two"),
            (FernetKey, "replace-me", "placeholder"),
            (FernetKey, "Atzr|canary", "a refresh token"),
            (CallerToken, "changeme", "placeholder"),
            (CallerToken, "PROXY_CALLER_TOKEN=canary", "NAME=value"),
            (CallerToken, "\"canary", "quotes"),
        ] {
            if looks_like.is_empty() {
                assert!(read(credential, text).is_ok(), "{text}");
                continue;
            }
            let message = refused(credential, text);
            assert!(message.contains(looks_like) && !message.contains("canary"), "{text}: {message}");
        }
    }

    #[test]
    fn good_credentials_pass_unchanged() {
        for (credential, text) in [
            (ClientId, "amzn1.application-oa2-client.0123456789abcdef0123456789abcdef"),
            (ClientSecret, "amzn1.oa2-cs.v1.0123456789abcdef"),
            (ClientSecret, "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"),
            (RefreshToken, "Atzr|IwEBIabc-_/+="),
            (Scope, "advertising::campaign_management advertising::test:create_account profile"),
            (FernetKey, KEY),
            (FernetKey, "/w/0x689RpI+jtRR7oE8h/eQsKImvJapLeSbXpwF4e4="),
            (CallerToken, KEY),
            (CallerToken, "a=b&c%41$"),
        ] {
            let checked = read(credential, text).unwrap_or_else(|flaw| panic!("{text}: {flaw}"));
            assert_eq!((checked.text.as_str(), checked.repairs), (text, vec![]));
        }
    }

    #[test]
    fn a_list_is_unwrapped_as_a_whole_and_in_its_parts() {
        let texts = |text: &str| {
            let list = read_list(ClientSecret, text).unwrap();
            list.into_iter().map(|checked| checked.text.to_string()).collect::<Vec<_>>()
        };
        for text in ["one,two", "\"one,two\"", "\"one\",'two'", " one ,\r\n two,\n"] {
            assert_eq!(texts(text), ["one", "two"], "{text}");
        }
        assert!(read_list(ClientSecret, "{\"a\":\"b\",\"c\":\"d\"}").unwrap_err().contains("JSON"));
    }
}
