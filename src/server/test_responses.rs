//! A listener's own responses, for tests of the server: only that to a late head says something.

use bytes::Bytes;
use http::HeaderValue;

use super::OwnResponses;

#[derive(Debug)]
pub(super) struct Own;

impl OwnResponses for Own {
    fn head_timeout(&self) -> Bytes {
        Bytes::from_static(b"late")
    }

    fn overloaded(&self) -> Bytes {
        Bytes::new()
    }

    fn bad_target(&self) -> Bytes {
        Bytes::new()
    }

    fn head_too_large(&self) -> Bytes {
        Bytes::new()
    }

    fn target_too_long(&self) -> Bytes {
        Bytes::new()
    }

    fn request_id(&self) -> HeaderValue {
        HeaderValue::from_static("id")
    }
}
