//! The promises, tested through the wire: a real adsidecar between real sockets and the sandbox's Amazon.

#![allow(unreachable_pub, dead_code, reason = "the rig has more ways to knock than each file uses")]

mod rig;
mod wire;

mod admin;
mod commands;
mod floors;
mod forms;
mod framing;
mod guard;
mod headers;
mod http2;
mod limits;
mod login;
mod proxying;
mod reload;
mod review;
mod rows;
mod selection;
mod tokens;
mod trouble;
