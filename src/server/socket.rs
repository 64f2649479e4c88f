//! The sockets that accept connections, bound here or passed on by the service manager.

use std::fs::Permissions;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rustix::net::{SocketFlags, acceptfrom_with};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream};

use super::inherited::Inherited;

/// How much response data the kernel takes of a connection that cannot be sent yet, in bytes. Once a caller reads
/// slowly, data that it has not read is also data that the kernel does not take, so that a caller that reads anything
/// is told from one that reads nothing: by default the kernel takes 4 MiB, and takes no more until a third of them was
/// read. What is on the way to the caller is not limited, so a fast caller notices nothing.
#[cfg(target_os = "linux")]
const MAX_UNSENT: u32 = 128 << 10;

/// Connections that may wait to be accepted; Linux takes `net.core.somaxconn` if that is less (4,096 by default). The
/// kernel drops what comes beyond, and a caller tries again only after a second. The standard library asks for 128.
const BACKLOG: u32 = 4096;

/// A socket that accepts connections.
#[derive(Debug)]
pub(super) struct BoundSocket {
    kind: Kind,
    /// Whether the service manager keeps it for the next process, and with it the connections that wait.
    is_inherited: bool,
    /// The file of a Unix socket that was bound here; it is removed on drop.
    file: Option<PathBuf>,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// An accepted connection.
pub(super) enum Stream {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl BoundSocket {
    /// Binds a TCP address, if its socket is not in `inherited`.
    pub(super) async fn tcp(address: &str, inherited: &mut Inherited) -> Result<Self> {
        let context = |error: Error| Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
        let resolved: Vec<_> = tokio::net::lookup_host(address).await.map_err(context)?.collect();
        let passed_on = inherited.tcp(&resolved);
        let is_inherited = passed_on.is_some();
        let socket = passed_on.map_or_else(|| bind(&resolved), TcpListener::from_std).map_err(context)?;
        // Accepted connections inherit it.
        #[cfg(target_os = "linux")]
        socket2::SockRef::from(&socket).set_tcp_notsent_lowat(MAX_UNSENT).map_err(context)?;
        Ok(Self { kind: Kind::Tcp(socket), is_inherited, file: None })
    }

    /// Binds a Unix socket with the file mode `mode`, if it is not in `inherited`. A socket file that a dead process
    /// left behind is replaced; one that accepts connections belongs to a running process and is an error.
    pub(super) fn unix(path: &PathBuf, mode: u32, inherited: &mut Inherited) -> Result<Self> {
        if let Some(socket) = inherited.unix(path) {
            return Ok(Self { kind: Kind::Unix(UnixListener::from_std(socket)?), is_inherited: true, file: None });
        }
        let context =
            |error: Error| Error::new(error.kind(), format!("cannot listen on unix:{}: {error}", path.display()));
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(context(ErrorKind::AddrInUse.into()));
        }
        let left_behind = std::fs::symlink_metadata(path)
            .is_ok_and(|metadata| std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()));
        if left_behind {
            std::fs::remove_file(path).map_err(context)?;
        }
        // Set the mode before `listen`: until then no process can connect.
        let socket = UnixSocket::new_stream().map_err(context)?;
        socket.bind(path).map_err(context)?;
        std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(context)?;
        let kind = Kind::Unix(socket.listen(BACKLOG).map_err(context)?);
        Ok(Self { kind, is_inherited: false, file: Some(path.clone()) })
    }

    /// The bound address, of a TCP socket.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        match &self.kind {
            Kind::Tcp(socket) => socket.local_addr().ok(),
            Kind::Unix(_) => None,
        }
    }

    /// Waits for a connection and accepts it.
    pub(super) async fn accept(&self) -> Result<Stream> {
        match &self.kind {
            Kind::Tcp(socket) => socket.accept().await.map(|(stream, peer)| Stream::Tcp(stream, peer)),
            Kind::Unix(socket) => socket.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }

    /// Accepts a connection that waits, before the socket is closed. `None` if none waits, or if the next process gets
    /// them. The runtime may not have heard of it yet, so the kernel is asked.
    pub(super) fn accept_waiting(&self) -> Option<Stream> {
        if self.is_inherited {
            return None;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match &self.kind {
            Kind::Tcp(socket) => {
                let (stream, peer) = acceptfrom_with(socket, flags).ok()?;
                let stream = std::net::TcpStream::from(stream).try_into().ok()?;
                Some(Stream::Tcp(stream, peer?.try_into().ok()?))
            }
            Kind::Unix(socket) => {
                let (stream, _) = acceptfrom_with(socket, flags).ok()?;
                std::os::unix::net::UnixStream::from(stream).try_into().ok().map(Stream::Unix)
            }
        }
    }
}

/// Binds the first of `addresses` that can be bound.
fn bind(addresses: &[SocketAddr]) -> Result<TcpListener> {
    let mut last = Error::new(ErrorKind::InvalidInput, "no address has this name");
    for address in addresses {
        match bind_one(*address) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn bind_one(address: SocketAddr) -> Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // So that a restart does not have to wait for the connections of the process before it.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if let Some(path) = &self.file {
            let _ = std::fs::remove_file(path);
        }
    }
}
