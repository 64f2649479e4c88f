//! Tells systemd that the service is ready or stops (sd_notify(3)).

use std::ffi::OsStr;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `state`, such as `READY=1`, to the socket that systemd names in `NOTIFY_SOCKET`. Does nothing without one.
pub(super) fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else { return };
    if let Err(error) =
        address(&socket).and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address))
    {
        tracing::warn!(%error, "systemd was not told {state}: check NOTIFY_SOCKET");
    }
}

/// A path, or behind `@` a name in the abstract namespace.
fn address(socket: &OsStr) -> std::io::Result<SocketAddr> {
    match socket.as_bytes() {
        #[cfg(target_os = "linux")]
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(socket),
    }
}
