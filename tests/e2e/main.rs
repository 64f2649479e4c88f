//! The promises, tested through the wire: a real adsidecar between real sockets and the sandbox's Amazon.

#![allow(unreachable_pub, dead_code, reason = "the harness has more ways to knock than each file uses")]

mod postgres_server;
mod harness;
mod raw_http;

mod admin;
mod tls;
mod clocks;
mod commands;
mod refresh_tasks;
mod floors;
mod request_target;
mod framing;
mod guard;
mod headers;
mod http2;
mod keys;
mod limits;
mod login;
mod login_attacks;
mod observability;
mod policy;
mod process;
mod proxying;
mod reload;
mod secrets;
mod review;
mod catalogue;
mod selection;
mod postgres;
mod stores;
mod threats;
mod token_endpoint;
mod tokens;
mod upstream_faults;
mod unauthorized;
mod login_recovery;
mod users;
