//! The promises, tested through the wire: a real adsidecar between real sockets and the sandbox's Amazon.

#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod rig;
mod wire;

mod floors;
mod forms;
mod framing;
mod guard;
mod headers;
mod http2;
mod limits;
mod login;
mod proxying;
mod selection;
mod trouble;
