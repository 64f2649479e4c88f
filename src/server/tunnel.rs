//! Tunnels that `CONNECT` opens: what follows on the connection is plain HTTP again, for the host that `CONNECT` named.
//!
//! Clients that tunnel even `http://` URLs send their credentials for the proxy, and the headers for it, with `CONNECT`
//! alone. A request inside the tunnel is therefore served as its absolute form would be, with these headers.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use http::uri::{Authority, Scheme};
use http::{HeaderMap, Method, Request, Uri};

use crate::domain::headers::is_for_sidecar;

/// The tunnel of one connection.
#[derive(Debug, Default)]
pub(super) struct TunnelState {
    open: Mutex<Option<Box<Tunnel>>>,
    /// Whether there is one: read for every request.
    is_open: AtomicBool,
    /// Whether one was opened by the last request.
    opened: AtomicBool,
}

/// An open tunnel, or one that a `CONNECT` asks for.
#[derive(Clone, Debug)]
pub(super) struct Tunnel {
    authority: Authority,
    headers: HeaderMap,
}

impl Tunnel {
    /// The tunnel that `request` asks for, if it is a `CONNECT`.
    pub(super) fn wanted<B>(request: &Request<B>) -> Option<Box<Self>> {
        if *request.method() != Method::CONNECT {
            return None;
        }
        let authority = request.uri().authority()?.clone();
        let kept = request.headers().iter().filter(|(name, _)| is_for_sidecar(name.as_str()));
        let headers = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
        Some(Box::new(Self { authority, headers }))
    }
}

impl TunnelState {
    /// Records that `tunnel` was opened.
    pub(super) fn open(&self, tunnel: Box<Tunnel>) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
        self.is_open.store(true, Relaxed);
        self.opened.store(true, Relaxed);
    }

    /// Whether a tunnel was opened since the last call: the HTTP before it has ended, and that inside begins.
    pub(super) fn take_opened(&self) -> bool {
        self.opened.swap(false, Relaxed)
    }

    /// Makes `request` what it would have been without the tunnel: in absolute form, with the headers that came with
    /// `CONNECT`.
    pub(super) fn unwrap<B>(&self, request: &mut Request<B>) {
        if !self.is_open.load(Relaxed) {
            return;
        }
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(tunnel) = &*open else { return };
        if request.uri().authority().is_none() {
            let mut parts = std::mem::take(request.uri_mut()).into_parts();
            parts.scheme = Some(Scheme::HTTP);
            parts.authority = Some(tunnel.authority.clone());
            // A target that is no path, such as `*`, stays as it is, and is refused.
            let path = parts.path_and_query.clone();
            *request.uri_mut() = Uri::from_parts(parts).unwrap_or_else(|_| bare(path));
        }
        // All values of a name, or none: one of several would be a guess.
        for name in tunnel.headers.keys() {
            if !request.headers().contains_key(name) {
                for value in tunnel.headers.get_all(name) {
                    request.headers_mut().append(name, value.clone());
                }
            }
        }
    }
}

fn bare(path_and_query: Option<http::uri::PathAndQuery>) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = path_and_query;
    Uri::from_parts(parts).unwrap_or_default()
}
