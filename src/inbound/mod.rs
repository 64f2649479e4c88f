//! What callers reach: the proxy, the OAuth endpoints and the admin listener, with the checks before each of them.
//!
//! [`proxy`] is the spine, the way of a request to Amazon and back. [`admission`] decides who may send a request at all,
//! [`destination`] which host it is for, [`endpoint`] who serves it, [`problem`] is the one place that knows status codes.

pub mod proxy;
pub mod oauth;
pub mod admin;
pub mod problem;
pub mod admission;
pub mod destination;
pub mod endpoint;
pub mod request_id;
