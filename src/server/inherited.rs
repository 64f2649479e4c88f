//! Sockets that the service manager has opened and passes on (socket activation, sd_listen_fds(3)).
//!
//! Each is used in place of binding the address that it has, so that the configuration alone says what listens where.
//! While the process restarts, the manager keeps the socket, and connections wait instead of being refused.

use std::io::{Error, ErrorKind, Result};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use listenfd::ListenFd;

/// The first descriptor that is passed on.
const FIRST: usize = 3;

/// Sockets that were passed on and that no listener has taken.
#[derive(Debug, Default)]
pub struct Inherited {
    tcp: Vec<(SocketAddr, TcpListener)>,
    unix: Vec<(PathBuf, UnixListener)>,
}

impl Inherited {
    /// The sockets that `LISTEN_FDS` announces to this process. Without it there are none.
    ///
    /// # Errors
    /// Fails if something else than a listening stream socket with an address was passed on.
    pub fn from_environment() -> Result<Self> {
        let mut passed = ListenFd::from_env();
        let mut inherited = Self::default();
        for index in 0..passed.len() {
            if let Ok(Some(socket)) = passed.take_tcp_listener(index) {
                socket.set_nonblocking(true)?;
                inherited.tcp.push((socket.local_addr()?, socket));
            } else if let Ok(Some(socket)) = passed.take_unix_listener(index) {
                socket.set_nonblocking(true)?;
                let path = socket.local_addr()?.as_pathname().map(std::path::Path::to_owned);
                inherited.unix.push((path.ok_or_else(|| unusable(index, "a Unix socket without a path"))?, socket));
            } else {
                return Err(unusable(index, "no listening stream socket"));
            }
        }
        Ok(inherited)
    }

    /// Takes the socket with one of these addresses.
    pub(super) fn tcp(&mut self, addresses: &[SocketAddr]) -> Option<TcpListener> {
        let place = self.tcp.iter().position(|(address, _)| addresses.contains(address))?;
        Some(self.tcp.swap_remove(place).1)
    }

    /// Takes the socket with this path.
    pub(super) fn unix(&mut self, path: &PathBuf) -> Option<UnixListener> {
        let place = self.unix.iter().position(|(at, _)| at == path)?;
        Some(self.unix.swap_remove(place).1)
    }

    /// The addresses of the sockets that nobody has taken, as they are written in the configuration.
    pub fn left(&self) -> Vec<String> {
        let tcp = self.tcp.iter().map(|(address, _)| address.to_string());
        tcp.chain(self.unix.iter().map(|(path, _)| format!("unix:{}", path.display()))).collect()
    }
}

fn unusable(index: usize, what: &str) -> Error {
    let text = format!(
        "the service manager passes {what} as descriptor {}: its socket unit takes ListenStream= with an address or a \
         path, and Accept=no",
        FIRST + index
    );
    Error::new(ErrorKind::InvalidInput, text)
}
