//! The promises, tested through the wire: a real adsidecar between real sockets and the sandbox's Amazon.

#![allow(unreachable_pub, reason = "a test binary exports nothing, and `pub(crate)` everywhere would say no more")]

mod rig;

mod floors;
mod login;
mod proxying;
mod review;
