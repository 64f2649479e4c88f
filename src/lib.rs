//! adsidecar: an app sends plain HTTP to localhost; adsidecar sends the call to Amazon Ads with valid credentials and
//! returns Amazon's response.
//!
//! # The house
//!
//! The modules below are listed top floor first, and **a module uses only modules listed below it**; inside every folder
//! no two modules use each other in a circle. The test `floors` reads every `use` at every depth and names what breaks
//! the rule. The stand-in for Amazon is a package of its own, `tests/sandbox`.
//!
//! # Where to start reading
//!
//! The way of one request, in the order in which it happens:
//!
//! 1. `server/mod.rs` accepts the connection, `server/registry.rs` counts it against the limits, `server/connection.rs`
//!    reads requests from it.
//! 2. [`inbound::proxy`] is the spine. `serve` always returns a response; `forward` is the list of steps.
//! 3. [`inbound::admission`] checks framing, `Host`, browsers and the caller token; [`inbound::destination`] reads the
//!    target. An OAuth endpoint is served by [`inbound::oauth`]; every other path goes on.
//! 4. `inbound/proxy/route.rs` selects account, user, region and [API family](domain::api_families), then
//!    [`domain::policy`] is enforced.
//! 5. [`auth::tokens`] returns a valid access token, and refreshes it first where it has to.
//! 6. [`domain::headers`] builds what is sent: hop-by-hop headers are stripped, ours are attached.
//! 7. [`upstream`] checks a connection out, sends the request and returns the response's head; the bodies stream.
//! 8. `inbound/proxy/auth_rejection.rs` reads a 401 and decides whether a new token can help.
//! 9. `inbound/proxy/request_telemetry.rs` counts the request, however it ends, and writes the [audit line](telemetry::audit).
//!
//! # Invariants
//!
//! 1. A caller never gets an error while a valid token exists ([`auth::tokens`]).
//! 2. Nothing that must finish runs in a request's future: a refresh is a task of its own ([`auth::tokens`]).
//! 3. A new refresh token is on disk before the access token that came with it is used ([`auth::tokens`], [`store`]).
//! 4. Only an operator or a logout deletes a grant. What does not parse, decrypt or refresh is kept ([`store`]).
//! 5. Every stored change carries a generation; a change computed for an older one is dropped ([`domain::grant`]).
//! 6. Every clock that says something about a token bounds its life, and all pacing uses the monotonic clock
//!    ([`domain::grant`], [`domain::clock_reading`]).
//! 7. Credentials go to the configured Amazon hosts only: the authority is ours, never the caller's ([`upstream`],
//!    [`domain::headers`]).
//! 8. Hop-by-hop headers are stripped first, ours are attached last ([`domain::headers`]).
//! 9. A secret has a type that prints `…` ([`domain::secret`]).
//!
//! # Where the code showed a better way
//!
//! - The connection pool is our own ([`upstream`]): it has to say whether a request was ever written, which decides
//!   whether it may be repeated. Connecting (RFC 8305) is hyper-util's, HTTP is hyper's.
//! - Head and idle timeouts are watched per listener, not by a timer per request ([`server`]).
//! - A table of keys parses the configuration, not serde, which stops at the first problem and quotes the value that it
//!   rejects ([`config`]).
//! - The store numbers its commits beside the database: sled can come back older than it was, without an error
//!   ([`store`]).
//! - A grant that the disk rejects is used from memory, and storing it is retried until it succeeds: its code is spent,
//!   so dropping it helps nobody ([`auth::tokens`]).
//! - A reload builds the services anew and swaps them whole; requests in flight keep the previous ones ([`app`]).
//! - TLS client settings stand in [`domain::tls`]: pure, and used by `auth`, `upstream` and `store` alike.
//! - Folders have a `mod.rs`, so that `src/` shows the rooms and nothing else.

/// Points at which tests and campaigns stop, break or end the process. A plain build has none of them.
///
/// `renewal_begun`, `renewal_answered` and `renewal_stored` lie around a refresh, `save_refused`, `save_unsynced` and
/// `save_synced` around the write to disk; those that end the process take the action `return`. `renewal_blind`,
/// `flights_many`, `intents_none` and `clock_wall_alone` each break a promise (a logout beats a refresh, one refresh at a
/// time, a lost grant is reported, every clock counts), so that a campaign can show that it would notice.
///
/// Works as `fail::fail_point!`: `FAILPOINTS="<name>=<action>"` in the environment, or `fail::cfg` in a test, sets the
/// action of a point.
#[cfg(feature = "failpoints")]
macro_rules! fail_point {
    ($($point:tt)*) => { fail::fail_point!($($point)*) };
}

#[cfg(not(feature = "failpoints"))]
macro_rules! fail_point {
    ($($point:tt)*) => {};
}

pub mod cli;
pub mod app;
pub mod config;
pub mod inbound;
pub mod auth;
pub mod upstream;
pub mod store;
pub mod server;
pub mod telemetry;
pub mod domain;
