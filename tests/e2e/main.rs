//! The promises, tested through the wire: a real adsidecar between real sockets and the sandbox's Amazon.

#![allow(unreachable_pub, dead_code, reason = "the rig has more ways to knock than each file uses")]

mod cluster;
mod rig;
mod wire;

mod admin;
mod chains;
mod clocks;
mod commands;
mod flights;
mod floors;
mod forms;
mod framing;
mod guard;
mod headers;
mod http2;
mod keys;
mod limits;
mod login;
mod login_attacks;
mod operation;
mod policy;
mod process;
mod proxying;
mod reload;
mod review;
mod rows;
mod selection;
mod shared;
mod stores;
mod threats;
mod token_endpoint;
mod tokens;
mod trouble;
mod unauthorized;
mod unfinished;
mod users;
