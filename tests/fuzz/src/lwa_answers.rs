//! An answer of Login with Amazon, its status first: what is taken for tokens can be sent in a header and lives for a
//! believable time; a refusal is of the fixed list.

use std::time::Duration;

use adsidecar::auth::lwa::{LwaError, answer};
use arbitrary::{Arbitrary, Unstructured};
use reqwest::StatusCode;

pub fn check(bytes: &[u8]) {
    let Ok(input) = <(u16, &[u8])>::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let (status, body) = input;
    if let Ok(tokens) = answer::tokens(body) {
        let bearer = tokens.access.bearer();
        assert!(bearer.is_sensitive() && bearer.as_bytes().iter().all(|byte| (b' '..0x7f).contains(byte)));
        assert!((Duration::from_secs(1)..=Duration::from_secs(86_400)).contains(&tokens.lifetime));
        assert!(tokens.refresh.is_none_or(|refresh| !refresh.secret().expose().is_empty()));
    }
    let Ok(status) = StatusCode::from_u16(100 + status % 900) else { return };
    match answer::refusal(status, "text/html", body, None) {
        LwaError::TryLater { code, .. } => assert!(["throttled", "server_error", "bad_answer"].contains(&code)),
        LwaError::Refused { code } => {
            assert!(["invalid_grant", "unauthorized_client", "invalid_scope"].contains(&code));
        }
        LwaError::Operator { code } => assert!(["invalid_client", "invalid_request"].contains(&code)),
    }
}
