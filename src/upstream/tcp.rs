//! Opens a TCP connection to a host, whichever of its addresses accepts one first (RFC 8305).
//!
//! hyper-util's connector tries the addresses of one family one after the other, each for an equal part of the time
//! limit: one dead address of two then costs every new connection seconds.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::time::sleep;

/// Delay until the next address is tried beside those that have not answered yet (RFC 8305, section 8).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// How long a TCP connection is silent before the kernel sends a keepalive probe, and the interval of further probes.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Resolves `host` anew and opens a connection to one of its addresses.
///
/// # Errors
/// Fails if the name does not resolve, or with the error of the first address if none accepts a connection.
pub(super) async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let found = tokio::net::lookup_host((host, port)).await;
    let addresses = alternating(found.map_err(|error| named(&error, format!("cannot resolve {host}")))?);
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address")));
    }
    let stream = first_to_accept(addresses).await?;
    stream.set_nodelay(true)?;
    // Keepalive detects a peer that vanished, also while a response may stay silent for a long time.
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
    Ok(stream)
}

/// The addresses in the order of the resolver, but with the families in turn, so that one without a route costs one
/// delay.
fn alternating(addresses: impl Iterator<Item = SocketAddr>) -> VecDeque<SocketAddr> {
    let (mut first, mut second) = (VecDeque::new(), VecDeque::new());
    for address in addresses {
        let same = first.front().is_none_or(|other: &SocketAddr| other.is_ipv4() == address.is_ipv4());
        let family = if same { &mut first } else { &mut second };
        if !family.contains(&address) {
            family.push_back(address);
        }
    }
    let mut all = VecDeque::with_capacity(first.len() + second.len());
    while !first.is_empty() || !second.is_empty() {
        all.extend(first.pop_front());
        all.extend(second.pop_front());
    }
    all
}

/// Starts an attempt for each address: the next one after [`ATTEMPT_DELAY`], or as soon as another has failed.
async fn first_to_accept(mut addresses: VecDeque<SocketAddr>) -> io::Result<TcpStream> {
    let attempt = async |address: SocketAddr| TcpStream::connect(address).await.map_err(|error| named(&error, address));
    let mut attempts = FuturesUnordered::new();
    let mut failed = None;
    loop {
        attempts.extend(addresses.pop_front().map(attempt));
        if attempts.is_empty() {
            return Err(failed.unwrap_or_else(|| io::ErrorKind::NotFound.into()));
        }
        let next =
            async { if addresses.is_empty() { std::future::pending().await } else { sleep(ATTEMPT_DELAY).await } };
        tokio::select! {
            Some(result) = attempts.next() => match result {
                Ok(stream) => return Ok(stream),
                Err(error) => { failed.get_or_insert(error); }
            },
            () = next => {}
        }
    }
}

fn named(error: &io::Error, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::net::TcpListener;

    use super::*;

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn the_families_take_turns_and_no_address_is_tried_twice() {
        let resolved = addresses(&["[::1]:1", "[::2]:1", "[::1]:1", "127.0.0.1:1", "127.0.0.2:1", "127.0.0.3:1"]);
        let order = addresses(&["[::1]:1", "127.0.0.1:1", "[::2]:1", "127.0.0.2:1", "127.0.0.3:1"]);
        assert_eq!(alternating(resolved.into_iter()), order);
    }

    /// A listener whose queue is full: the kernel drops further SYNs, like those to a dead host.
    async fn deaf() -> (TcpListener, Vec<TcpStream>, SocketAddr) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(Ok(stream)) = tokio::time::timeout(ATTEMPT_DELAY, TcpStream::connect(address)).await {
            queued.push(stream);
        }
        (listener, queued, address)
    }

    #[tokio::test]
    async fn a_dead_address_delays_the_living_one_by_one_attempt_delay() {
        let (_listener, _queued, dead) = deaf().await;
        let living = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let living = living.local_addr().unwrap();
        for (list, delays) in [(vec![dead, living], 1), (vec![living, dead], 0), (vec![dead, dead, living], 2)] {
            let begun = Instant::now();
            let stream = first_to_accept(list.into()).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), living);
            assert!(begun.elapsed() >= ATTEMPT_DELAY * delays, "{:?}", begun.elapsed());
            assert!(begun.elapsed() < ATTEMPT_DELAY * (delays + 2), "{:?}", begun.elapsed());
        }
    }

    #[tokio::test]
    async fn an_address_that_refuses_costs_no_delay_and_the_first_error_is_told() {
        // Bound, so that nobody else gets the address, and not listening.
        let bound = tokio::net::TcpSocket::new_v4().unwrap();
        bound.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let refusing = bound.local_addr().unwrap();
        let living = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = living.local_addr().unwrap();
        let begun = Instant::now();
        first_to_accept([refusing, address].into()).await.unwrap();
        assert!(begun.elapsed() < ATTEMPT_DELAY, "{:?}", begun.elapsed());
        let error = first_to_accept([refusing, refusing].into()).await.unwrap_err();
        assert!(error.to_string().starts_with(&refusing.to_string()), "{error}");
    }
}
