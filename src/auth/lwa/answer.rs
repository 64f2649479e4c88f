//! Parses token responses from LWA, and classifies its error responses.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::LwaError;
use crate::domain::grant::{AccessToken, RefreshToken, Tokens};

/// Assumed lifetime if `expires_in` is missing or unusable.
const LIFETIME_UNKNOWN: Duration = Duration::from_secs(300);
/// Maximum lifetime accepted. LWA's tokens live an hour; a longer claim than a day is capped.
const LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Maximum nesting of arrays and objects that is parsed. A token response is a flat object.
const MAX_DEPTH: usize = 32;

#[derive(Deserialize)]
struct Success<'a> {
    access_token: String,
    refresh_token: Option<String>,
    token_type: Option<String>,
    /// A number, a string that holds a number ("3600" in one of Amazon's samples), or any other JSON value.
    #[serde(borrow)]
    expires_in: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
}

/// Parses the tokens in the body of a 200 response (RFC 6749, section 5.1).
///
/// # Errors
/// A message if the body is not a token response, the token type is not `bearer`, or a token has characters or a length
/// that cannot be sent.
pub fn tokens(body: &[u8]) -> Result<Tokens, &'static str> {
    if depth(body) > MAX_DEPTH {
        return Err("the response is nested too deeply");
    }
    let answer: Success<'_> = serde_json::from_slice(body).map_err(|_| "the response is not a JSON token response")?;
    let mut oddities = Vec::new();
    match answer.token_type {
        Some(kind) if kind.eq_ignore_ascii_case("bearer") => {}
        Some(_) => return Err("the token is not a bearer token"),
        None => oddities.push("token_type_missing"),
    }
    let (lifetime, odd) =
        answer.expires_in.map_or((LIFETIME_UNKNOWN, Some("expires_in_missing")), |raw| lifetime(raw.get()));
    oddities.extend(odd);
    let refresh = answer.refresh_token.filter(|token| !token.is_empty()).map(RefreshToken::new);
    Ok(Tokens {
        access: AccessToken::new(answer.access_token).map_err(|_| "the access token cannot be sent")?,
        refresh: refresh.transpose().map_err(|_| "the refresh token cannot be sent")?,
        lifetime,
        server_time: None,
        oddities,
    })
}

/// Parses `expires_in`. Returns the lifetime, and the deviation from the standard that was tolerated, if any.
fn lifetime(raw: &str) -> (Duration, Option<&'static str>) {
    match raw.trim_matches('"').trim().parse::<f64>() {
        Ok(seconds) if seconds > LIFETIME_MAX.as_secs_f64() => (LIFETIME_MAX, Some("expires_in_too_long")),
        Ok(seconds) if seconds >= 1.0 => (Duration::from_secs_f64(seconds), None),
        _ => (LIFETIME_UNKNOWN, Some("expires_in_unusable")),
    }
}

/// The nesting depth of arrays and objects in `body`, which may not be valid JSON.
fn depth(body: &[u8]) -> usize {
    let (mut depth, mut deepest, mut quoted, mut escaped) = (0_usize, 0, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => depth += 1,
            b']' | b'}' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// Describes a response that Login with Amazon does not send: an HTML page of a filter, a captive portal or a proxy.
/// `kind` is its content type.
pub fn interposed(status: StatusCode, kind: &str) -> String {
    let hint = match status.as_u16() {
        407 => "; it is an HTTP proxy that asks for a login",
        300..400 => "; it redirects, as the login page of a network does",
        _ => "",
    };
    format!(
        "something between adsidecar and Login with Amazon answered: status {}, {kind}{hint}; let this machine reach \
         the token endpoint directly",
        status.as_u16()
    )
}

/// Classifies a response with a status other than 200 (error codes: RFC 6749, section 5.2). `kind` is its content type.
pub fn refusal(status: StatusCode, kind: &str, body: &[u8], retry_after: Option<Duration>) -> LwaError {
    let error = serde_json::from_slice::<Refusal>(body).map(|refusal| refusal.error).unwrap_or_default();
    let detail = match status.as_u16() {
        408 | 425 | 429 | 500.. => format!("status {}, {kind}", status.as_u16()),
        _ if error.is_empty() => interposed(status, kind),
        _ => format!("status {}, with an error that OAuth does not define", status.as_u16()),
    };
    // The server that failed, or the one behind a gateway, may have rotated the grant before. A server that is
    // overloaded (503) or does not support the request (501, 505) has not begun.
    let taken = matches!(status.as_u16(), 500..) && !matches!(status.as_u16(), 501 | 503 | 505);
    let later = |code| LwaError::TryLater { code, detail: detail.clone(), retry_after, taken };
    match (status.as_u16(), error.as_str()) {
        (429, _) => later("throttled"),
        (408 | 425 | 500.., _) => later("server_error"),
        (_, "invalid_grant") => LwaError::Refused { code: "invalid_grant" },
        (_, "unauthorized_client") => LwaError::Refused { code: "unauthorized_client" },
        (_, "invalid_scope") => LwaError::Refused { code: "invalid_scope" },
        (_, "invalid_client") => LwaError::Operator { code: "invalid_client" },
        (_, "invalid_request" | "unsupported_grant_type") => LwaError::Operator { code: "invalid_request" },
        _ => later("bad_answer"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expires(raw: &str) -> Duration {
        let body = format!(r#"{{"access_token":"Atza|x","token_type":"bearer","expires_in":{raw}}}"#);
        tokens(body.as_bytes()).unwrap().lifetime
    }

    #[test]
    // Covers: threat 30.
    fn an_answer_that_cannot_be_used_is_refused() {
        for body in [
            "",
            "<html>Internal Server Error</html>",
            "{}",
            "[]",
            r#"{"access_token":""}"#,
            r#"{"access_token":"a b"}"#,
            "{\"access_token\":\"a\\r\\nb\"}",
            r#"{"access_token":"é"}"#,
            r#"{"access_token":7}"#,
            r#"{"access_token":"Atza|x","token_type":"mac"}"#,
            r#"{"access_token":"Atza|x","refresh_token":"a b"}"#,
            r#"{"access_token":"Atza|x","access_token":"Atza|y"}"#,
            r#"{"access_token":"Atza|x"#,
        ] {
            assert!(tokens(body.as_bytes()).is_err(), "{body}");
        }
        let long = format!(r#"{{"access_token":"{}"}}"#, "x".repeat(5000));
        assert!(tokens(long.as_bytes()).is_err());
    }

    #[test]
    fn what_is_nested_too_deep_is_refused_and_costs_no_stack() {
        let nested = |levels: usize| {
            format!(r#"{{"access_token":"x","z":{}{}, "t":"[[[\"["}}"#, "[".repeat(levels), "]".repeat(levels))
        };
        assert!(tokens(nested(MAX_DEPTH - 1).as_bytes()).is_ok());
        assert!(tokens(nested(MAX_DEPTH).as_bytes()).is_err());
        assert!(tokens(nested(30_000).as_bytes()).is_err());
    }

    #[test]
    fn what_lwa_really_sends_is_taken() {
        let full = br#"{"access_token":"Atza|x","refresh_token":"Atzr|y","token_type":"bearer","expires_in":3600}"#;
        let tokens = super::tokens(full).unwrap();
        assert_eq!(tokens.access.expose(), "Atza|x");
        assert_eq!(tokens.refresh.unwrap().secret().expose(), "Atzr|y");
        assert_eq!(tokens.lifetime, Duration::from_secs(3600));
        let bare = super::tokens(br#"{"access_token":"Atza|x","token_type":"Bearer"}"#).unwrap();
        assert!(bare.refresh.is_none());
        assert_eq!((bare.lifetime, bare.oddities), (LIFETIME_UNKNOWN, vec!["expires_in_missing"]));
    }

    #[test]
    fn a_lifetime_is_believed_within_reason() {
        for (raw, seconds) in [
            ("3600", 3600),
            ("\"3600\"", 3600),
            ("3600.0", 3600),
            ("0", 300),
            ("-5", 300),
            ("null", 300),
            ("true", 300),
            ("\"soon\"", 300),
            ("\"NaN\"", 300),
            ("1000000000000", 86400),
            ("1e309", 86400),
            ("{}", 300),
        ] {
            assert_eq!(expires(raw), Duration::from_secs(seconds), "{raw}");
        }
    }

    #[test]
    fn refusals_are_sorted_by_whose_turn_it_is() {
        let sort = |status: u16, error: &str| {
            let body = format!(r#"{{"error":"{error}","error_description":"…","request_id":"r"}}"#);
            refusal(StatusCode::from_u16(status).unwrap(), "application/json", body.as_bytes(), None)
        };
        assert_eq!(sort(400, "invalid_grant"), LwaError::Refused { code: "invalid_grant" });
        assert_eq!(sort(400, "unauthorized_client"), LwaError::Refused { code: "unauthorized_client" });
        assert_eq!(sort(401, "invalid_client"), LwaError::Operator { code: "invalid_client" });
        assert_eq!(sort(400, "invalid_client"), LwaError::Operator { code: "invalid_client" });
        assert_eq!(sort(400, "invalid_request"), LwaError::Operator { code: "invalid_request" });
        for (status, error) in
            [(500, "invalid_grant"), (503, ""), (429, ""), (408, ""), (425, ""), (302, ""), (404, "x"), (401, "")]
        {
            assert!(matches!(sort(status, error), LwaError::TryLater { .. }), "{status} {error}");
        }
    }

    #[test]
    fn who_answers_that_it_failed_may_have_taken_the_request() {
        let taken = |status: u16| {
            let refusal = refusal(StatusCode::from_u16(status).unwrap(), "text/html", b"", None);
            let LwaError::TryLater { taken, .. } = refusal else { panic!("{status}: {refusal}") };
            taken
        };
        let not_taken = [302, 401, 403, 407, 408, 425, 429, 501, 503, 505].into_iter().filter(|status| taken(*status));
        assert_eq!(not_taken.collect::<Vec<_>>(), [] as [u16; 0]);
        assert!([500, 502, 504, 520, 599].into_iter().all(taken));
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(body in proptest::collection::vec(any::<u8>(), 0..300), status in 100u16..600) {
            let _ = tokens(&body);
            let _ = refusal(StatusCode::from_u16(status).unwrap(), "text/html", &body, None);
        }

        #[test]
        fn no_lifetime_makes_it_panic(raw in "-?[0-9]{1,400}(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,6})?") {
            if let Ok(value) = serde_json::from_str::<&RawValue>(&raw) {
                let (lifetime, _) = lifetime(value.get());
                prop_assert!(lifetime >= Duration::from_secs(1) && lifetime <= LIFETIME_MAX);
            }
        }
    }
}
