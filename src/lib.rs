//! adsidecar: an app sends plain HTTP to localhost; adsidecar forwards it to Amazon Ads with valid credentials and
//! returns Amazon's response.
//!
//! # Layers
//!
//! The modules below are listed from the top layer to the bottom one, and **a module uses only modules listed below
//! it**; no two modules of a folder use each other in a circle. The test `floors` checks every `use` and names each
//! violation. The stand-in for Amazon is a package of its own, `tests/sandbox`.
//!
//! # The path of one request
//!
//! An ordinary request to Amazon (a valid token, a pooled connection, no policy, no audit log) passes through these
//! files, in this order. It passes through none of them twice, but for the throttle, which also learns from the
//! response, and two leaves that several steps call: the clock and the metrics. [`inbound::proxy`] calls each step from
//! the third on, and no step calls back into it. The test `floors` holds this list to files that exist, each named
//! once, at most twenty without those of step 1.
//!
//! 1. Once per connection: `server/mod.rs` (`accept`), `server/registry.rs` (`register`, counts it against the limits),
//!    `server/connection.rs` (`run`, `serve_http`: hyper reads each request), `server/io.rs` (the socket; `detach`
//!    copies each request head out of hyper's buffer), `server/caller_body.rs` (tells when the request's body has
//!    ended).
//! 2. `app/mod.rs` (the closure `serve_proxy`, which takes the current services), `inbound/proxy/mod.rs`, the spine:
//!    `serve` always returns a response, and `forward` is the list of the steps below.
//! 3. `inbound/request_id.rs` (`of`), `inbound/proxy/request_telemetry.rs` (`begin`: a guard around all other steps;
//!    its end records the metrics and the audit line).
//! 4. `inbound/admission/mod.rs` (`proxy`: peer, framing, method, `Host`, browsers, caller token) and, between its
//!    checks, `inbound/destination/mod.rs` (`Route::read`: is the request for Amazon or for [`inbound::oauth`]).
//! 5. `inbound/route.rs` (`select`: account, user, region), `domain/api_families.rs` (`family`).
//! 6. `upstream/request_body.rs` (`caller`: wraps the body, unread), `throttle/mod.rs` (`Kind::of`, `enter`; at step 10
//!    `responded`), `throttle/bucket.rs` (at step 10 `accepted`): it waits only if Amazon refused others like it.
//! 7. `auth/tokens/mod.rs` (`bearer`), `domain/clock.rs` (`reading`), `auth/tokens/user_state.rs` (`held`),
//!    `domain/grant/state.rs` (`valid_token`, `expiring`): the current token. One that expires soon is refreshed first.
//! 8. `domain/headers.rs` (`to_amazon`: strips hop-by-hop headers, attaches ours).
//! 9. `upstream/mod.rs` (`send`, until the head of the response; `UpstreamBody` streams the rest),
//!    `upstream/pool/mod.rs` (`connection`, and the choice of the protocol), `upstream/http2.rs` (`Slot::send`).
//! 10. `inbound/proxy/response.rs` (`to_caller`: strips Amazon's hop-by-hop headers; `Body` streams the rest).
//!
//! Not in every request: over HTTP/1.1 `upstream/http1_driver.rs` (`poll`) stands in the place of `upstream/http2.rs`,
//! `domain/policy.rs` checks it if there is a policy, `telemetry/audit.rs` writes its line if `log.audit` is on; the
//! first after ten seconds compares clocks (`auth/tokens/clock_skew.rs`); after a 401 or 403
//! `inbound/proxy/auth_rejection.rs` decides whether a new token can help; `inbound/proxy/retry.rs` decides whether a
//! request is sent again; `throttle/pass.rs` is for requests that Amazon refuses, that wait, or that a gate counts,
//! whose responses `inbound/proxy/jobs.rs` reads along; `inbound/proxy/polls.rs` answers a poll from another one
//! (`throttle.coalesce_polls`); `inbound/proxy/error_mapping.rs` turns an error into a response.
//! `inbound/proxy/redaction.rs` searches a 4xx for the access token, `inbound/proxy/mcp.rs` recognizes MCP clients when
//! an error is theirs, and `server/tunnel.rs` unwraps requests inside a tunnel that `CONNECT` opened.
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
//! # Decisions that may surprise
//!
//! - The connection pool is our own ([`upstream`]): it has to say whether a request was ever written, which decides
//!   whether it may be repeated. Over HTTP/2 it uses `h2` and not hyper's client, to know the streams that the server
//!   allows and to let windows follow the network path; HTTP/1.1 is hyper's. It tries all addresses of a host itself:
//!   hyper-util's connector spends seconds on a dead one. Its `client::pool` was looked at: a `singleton` opens one
//!   HTTP/2 connection whatever number of streams the server allows, and a `cache` knows no idle limits.
//! - Over HTTP/1.1 the task of a request drives its connection itself ([`upstream`]): a task of the connection's own
//!   would only be woken to write the request, and to wake the other one when the response is there.
//! - What ships is compiled with a profile of a serving process (`serving.profdata`), and linked by a list of its
//!   functions (`serving.ld`): a fifth fewer instructions for a request, and some 3 MiB less resident memory. Both are
//!   made by programs in `tests/bench`, and one that is out of date costs only that.
//! - One task per listener enforces the head and idle timeouts, instead of a timer per request ([`server`]).
//! - A table of keys parses the configuration, not serde, which stops at the first problem and quotes the value that it
//!   rejects ([`config`]).
//! - The store numbers its commits beside the database: sled can come back older than it was, without an error
//!   ([`store`]).
//! - A grant that the disk rejects is used from memory, and storing it is retried until it succeeds: its code is spent,
//!   so dropping it helps nobody ([`auth::tokens`]).
//! - The throttle has one bucket for each API family, region and kind of request, in an array: bounded, and read
//!   without a lock until Amazon refuses a request ([`throttle`]).
//! - A reload builds new services and swaps all of them at once; requests in flight keep the previous ones ([`app`]).
//! - TLS client settings are in [`domain::tls`]: they are pure, and `auth`, `upstream` and `store` all use them.
//! - Each folder has a `mod.rs`, so that `src/` contains one entry per layer.

/// Fail points: places where tests and campaigns pause, break or end the process. They exist only with the feature
/// `failpoints`.
///
/// - During a refresh: `refresh_begun`, `refresh_answered` (LWA has responded), `refresh_stored`; after a failure
///   `refresh_released` (other processes can read of it), after a refusal `refresh_refused`. The action `return` of the
///   second and the third ends the process.
/// - During a write to disk: `save_refused` (`return`: the write fails), `save_unsynced` and `save_synced` (`return`
///   ends the process).
/// - After the accounts that were found for a user are on the disk: `accounts_saved`.
/// - In each request to Amazon, before its token: `spine`; after Amazon has rejected its token: `rejection_seen`.
/// - Before `amazon.refresh_token` replaces what the user has: `adoption_decided`.
/// - With the action `return`, each of these breaks a promise, so that a campaign can prove that it would notice:
///   `refresh_blind` (a logout is not undone by a running refresh), `refresh_duplicated` (one refresh at a time),
///   `refresh_unjournaled` (a lost grant is reported), `clock_wall_alone` (every clock limits a token), `window_fixed`
///   (HTTP/2 windows follow the network path).
///
/// As with `fail::fail_point!`, `FAILPOINTS="<name>=<action>"` in the environment, or `fail::cfg` in a test, sets the
/// action of a fail point.
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
pub mod notify;
pub mod auth;
pub mod throttle;
pub mod upstream;
pub mod store;
pub mod server;
pub mod telemetry;
pub mod domain;
