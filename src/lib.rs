//! adsidecar: an app sends plain HTTP to localhost; adsidecar answers with what Amazon Ads said.
//!
//! One process, three doors. The *proxy door* takes the app's calls and the OAuth endpoints, the *login door* (off
//! unless asked for) takes the callback of a consent alone, the *admin door* takes probes and metrics. Behind the
//! doors stand the *heads*, which decide over time (who may come in, who holds which token), behind those the *hands*,
//! each of which touches one outside thing (Login with Amazon, the Ads hosts, the store, the clock), and under them
//! the *words*: pure, without any I/O.
//!
//! # Reading order
//!
//! The modules below are listed top floor first, and **a module uses only modules listed below it**. The test
//! `floors` reads the `use crate::` lines and names each upward use, so this list is the table of contents and a cycle
//! cannot exist.
//!
//! # Invariants
//!
//! 1. A caller never gets an error while a valid token exists ([`keeper`]).
//! 2. Nothing that must finish runs in a request's future: a refresh is a task of its own ([`keeper`]).
//! 3. A new refresh token is on disk before the access token that came with it is used ([`keeper`], [`store`]).
//! 4. Only an operator or a logout deletes a grant. What does not parse, decrypt or refresh is kept ([`store`]).
//! 5. Every stored change carries a generation; a change computed for an older one is dropped ([`token`]).
//! 6. A token's life is bounded by every clock that says something about it, and all pacing goes by the monotonic one
//!    ([`token`], [`moment`]).
//! 7. Credentials go to the configured Amazon hosts only: the target's authority is ours, never the caller's
//!    ([`upstream`], [`rewrite`]).
//! 8. Hop-by-hop headers are stripped first, ours are attached last ([`rewrite`]).
//! 9. A secret has a type that prints `…` ([`secret`]).

//!
//! # Where the code showed a better way
//!
//! - The pool of connections to Amazon is our own ([`upstream`]): it has to say whether a request was ever carried, which
//!   decides whether it may be repeated. TCP connects by the library (happy eyeballs), HTTP is hyper's.
//! - Head and idle timeouts are watched per door and not by a timer per request ([`serve`]).
//! - A configuration is walked by a table of keys and not by serde, which stops at the first problem and quotes the
//!   value it does not like ([`config`]).
//! - The store numbers its commits beside the database: sled can come back older than it was, without a word ([`store`]).
//! - A grant that the disk does not take is used from memory, and storing it is tried until it succeeds: its code is
//!   spent, so dropping it helps nobody ([`keeper`]).
//! - A reload makes the doors' insides anew and swaps them whole; calls in flight keep the old ([`app`]).

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
