//! Reads what a person pastes: the URL to which Amazon sent the browser, its query, or the bare code.

use url::form_urlencoded;

/// What was pasted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pasted {
    /// An authorization code.
    Code(String),
    /// Amazon's error in place of a code.
    Error(String),
    /// The frontend's URL with a pending grant, which waits for its confirmation.
    Confirm(String),
}

/// Longest code. Amazon's have 20 characters.
const MAX_CODE: usize = 512;

/// Reads a paste that has to belong to the login with `state`.
///
/// # Errors
/// A sentence for the person, without what was pasted: it may hold a code.
pub(super) fn read(text: &str, state: &str) -> Result<Pasted, String> {
    let text = text.trim_matches(['"', '\'']);
    let query = match (text.split_once('?'), text.contains('=')) {
        (Some((_, query)), _) => query,
        (None, true) => text,
        (None, false) => return bare(text),
    };
    let query = query.split('#').next().unwrap_or_default();
    let value = |name: &str| {
        let mut values = form_urlencoded::parse(query.as_bytes()).filter(|(key, _)| key == name);
        match (values.next(), values.next()) {
            (Some((_, value)), None) => Some(value.into_owned()),
            _ => None,
        }
    };
    if let (Some("pending"), Some(grant)) = (value("status").as_deref(), value("grant")) {
        return Ok(Pasted::Confirm(grant));
    }
    match value("state") {
        Some(pasted) if pasted == state => {}
        Some(_) => {
            return Err("this is the end of another login (its state differs): paste the URL that the browser shows \
                        after the consent at the URL above"
                .to_owned());
        }
        None => {
            return Err(
                "there is no state in it: paste the whole URL that the browser shows after the consent, or the \
                        code alone"
                    .to_owned(),
            );
        }
    }
    match (value("code"), value("error")) {
        (Some(code), None) => Ok(Pasted::Code(code)),
        (None, Some(error)) => Ok(Pasted::Error(error)),
        _ => Err("it holds neither a code nor an error: paste the whole URL that the browser shows after the consent"
            .to_owned()),
    }
}

fn bare(text: &str) -> Result<Pasted, String> {
    let legal = (8..=MAX_CODE).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    if legal && !text.contains('/') {
        return Ok(Pasted::Code(text.to_owned()));
    }
    Err("this is neither a URL with a code nor a code: paste the whole URL that the browser shows after the consent"
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_a_query_and_a_bare_code_are_read() {
        let code = Ok(Pasted::Code("ANcode|1".into()));
        for text in [
            "http://localhost:8001/api/auth/amazon/callback?code=ANcode%7C1&scope=a&state=s",
            "https://app.example.com/cb?state=s&code=ANcode|1#_=_",
            "?code=ANcode%7C1&state=s",
            "code=ANcode%7C1&state=s",
            "\"code=ANcode%7C1&state=s\"",
            "ANcode|1",
        ] {
            assert_eq!(read(text, "s"), code, "{text}");
        }
        assert_eq!(read("x?error=access_denied&state=s", "s"), Ok(Pasted::Error("access_denied".into())));
        assert_eq!(read("https://app/?status=pending&grant=g", "s"), Ok(Pasted::Confirm("g".into())));
    }

    #[test]
    fn what_belongs_to_another_login_or_is_no_end_of_one_is_refused_and_not_quoted() {
        for (text, says) in [
            ("x?code=canary&state=other", "another login"),
            ("x?code=canary", "no state"),
            ("x?code=canary&code=canary&state=s", "neither a code nor an error"),
            ("x?state=s&canary=1", "neither a code nor an error"),
            ("http://canary/", "neither a URL with a code nor a code"),
            ("canary", "neither a URL with a code nor a code"),
        ] {
            let why = read(text, "s").unwrap_err();
            assert!(why.contains(says) && !why.contains("canary"), "{text}: {why}");
        }
    }
}
