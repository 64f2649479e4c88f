//! The promises, tested through the wire: a real adsidecar between real sockets and the sandbox's Amazon.

mod rig;

mod floors;
mod login;
mod proxying;
mod review;
