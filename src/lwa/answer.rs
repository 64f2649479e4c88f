//! What LWA's answers mean.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::LwaError;
use crate::token::{AccessToken, RefreshToken, Tokens};

/// Assumed where the answer does not say, or says nonsense.
const LIFETIME_UNKNOWN: Duration = Duration::from_secs(300);
/// LWA's tokens live an hour; nothing that claims more than a day is believed.
const LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);

#[derive(Deserialize)]
struct Success<'a> {
    access_token: String,
    refresh_token: Option<String>,
    token_type: Option<String>,
    /// A number, a string that holds one ("3600" in one of Amazon's samples), or anything.
    #[serde(borrow)]
    expires_in: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
}

/// The tokens in the body of a 200.
pub fn tokens(body: &[u8]) -> Result<Tokens, &'static str> {
    let answer: Success<'_> =
        serde_json::from_slice(body).map_err(|_| "the answer is not the JSON of a token answer")?;
    if answer.token_type.is_some_and(|kind| !kind.eq_ignore_ascii_case("bearer")) {
        return Err("the token is no bearer token");
    }
    let refresh = answer.refresh_token.filter(|token| !token.is_empty()).map(RefreshToken::new);
    Ok(Tokens {
        access: AccessToken::new(answer.access_token).map_err(|_| "the access token cannot be sent")?,
        refresh: refresh.transpose().map_err(|_| "the refresh token cannot be sent")?,
        lifetime: answer.expires_in.map_or(LIFETIME_UNKNOWN, |raw| lifetime(raw.get())),
        server_time: None,
    })
}

fn lifetime(raw: &str) -> Duration {
    match raw.trim_matches('"').trim().parse::<f64>() {
        Ok(seconds) if seconds >= 1.0 => Duration::from_secs_f64(seconds.min(LIFETIME_MAX.as_secs_f64())),
        _ => LIFETIME_UNKNOWN,
    }
}

/// What an answer with another status means.
pub fn refusal(status: StatusCode, body: &[u8], retry_after: Option<Duration>) -> LwaError {
    let error = serde_json::from_slice::<Refusal>(body).map(|refusal| refusal.error).unwrap_or_default();
    let later = |code| LwaError::TryLater { code, detail: format!("status {}", status.as_u16()), retry_after };
    match (status.as_u16(), error.as_str()) {
        (429, _) => later("throttled"),
        (408 | 425 | 500.., _) => later("server_error"),
        (_, "invalid_grant") => LwaError::Refused { code: "invalid_grant" },
        (_, "unauthorized_client") => LwaError::Refused { code: "unauthorized_client" },
        (_, "invalid_scope") => LwaError::Refused { code: "invalid_scope" },
        (_, "invalid_client") | (401, _) => LwaError::Operator { code: "invalid_client" },
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
    fn nesting_in_a_field_nobody_reads_costs_no_stack() {
        let deep = format!(r#"{{"access_token":"x","z":{}{}}}"#, "[".repeat(30_000), "]".repeat(30_000));
        assert!(tokens(deep.as_bytes()).is_ok());
    }

    #[test]
    fn what_lwa_really_sends_is_taken() {
        let full = br#"{"access_token":"Atza|x","refresh_token":"Atzr|y","token_type":"bearer","expires_in":3600}"#;
        let tokens = super::tokens(full).unwrap();
        assert_eq!(tokens.access.secret().expose(), "Atza|x");
        assert_eq!(tokens.refresh.unwrap().secret().expose(), "Atzr|y");
        assert_eq!(tokens.lifetime, Duration::from_secs(3600));
        let bare = super::tokens(br#"{"access_token":"Atza|x","token_type":"Bearer"}"#).unwrap();
        assert!(bare.refresh.is_none());
        assert_eq!(bare.lifetime, LIFETIME_UNKNOWN);
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
            refusal(StatusCode::from_u16(status).unwrap(), body.as_bytes(), None)
        };
        assert_eq!(sort(400, "invalid_grant"), LwaError::Refused { code: "invalid_grant" });
        assert_eq!(sort(400, "unauthorized_client"), LwaError::Refused { code: "unauthorized_client" });
        assert_eq!(sort(401, "invalid_client"), LwaError::Operator { code: "invalid_client" });
        assert_eq!(sort(400, "invalid_client"), LwaError::Operator { code: "invalid_client" });
        assert_eq!(sort(400, "invalid_request"), LwaError::Operator { code: "invalid_request" });
        for (status, error) in
            [(500, "invalid_grant"), (503, ""), (429, ""), (408, ""), (425, ""), (302, ""), (404, "x")]
        {
            assert!(matches!(sort(status, error), LwaError::TryLater { .. }), "{status} {error}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(body in proptest::collection::vec(any::<u8>(), 0..300), status in 100u16..600) {
            let _ = tokens(&body);
            let _ = refusal(StatusCode::from_u16(status).unwrap(), &body, None);
        }

        #[test]
        fn no_lifetime_makes_it_panic(raw in "-?[0-9]{1,400}(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,6})?") {
            if let Ok(value) = serde_json::from_str::<&RawValue>(&raw) {
                let lifetime = lifetime(value.get());
                prop_assert!(lifetime >= Duration::from_secs(1) && lifetime <= LIFETIME_MAX);
            }
        }
    }
}
