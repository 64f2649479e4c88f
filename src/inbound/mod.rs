//! What callers reach: the proxy, the OAuth endpoints and the admin listener, with the checks before each of them.
//!
//! [`proxy`] is the spine: it takes a request to Amazon and the response back. [`admission`] decides whether a request
//! is accepted, [`destination`] whether adsidecar or Amazon serves it, [`route`] which account, user and region a
//! request to Amazon gets, and [`problem`] maps each error to its status code.

pub mod proxy;
pub mod oauth;
pub mod admin;
pub mod early_responses;
pub mod look;
pub mod problem;
pub mod admission;
pub mod destination;
pub mod route;
pub mod request_id;
