//! One regional host and its connections.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::header::HOST;
use http::{HeaderValue, Request, Uri};
use hyper::client::conn::http1;
use url::Url;

use super::connect::{Alpn, Connector};
use super::connection::{Connection, H2Connection, MAX_SHARED};
use super::protocol_choice::Sharing;
use super::{ErrorKind, Http2, RequestBody, Reuse, Settings, lock};

#[derive(Debug)]
pub(super) struct OriginPool {
    connector: Connector,
    /// The value of the `Host` header: the origin's authority.
    pub(super) authority: HeaderValue,
    /// What HTTP/2 sends as `:scheme` and `:authority`.
    origin: http::uri::Parts,
    idle: Mutex<VecDeque<Idle>>,
    /// The connection that calls share, and the one for those that it has no place for.
    shared: Mutex<[Option<H2Connection>; 2]>,
    pub(super) sharing: Sharing,
    /// Whether the last connection spoke HTTP/1.1, so that each call needs one of its own.
    one_call_each: AtomicBool,
    /// Locked by the caller that connects while the new connection may come to be shared, so that a burst opens one.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<RequestBody>,
    since: Instant,
}

/// More idle connections than this are closed: a burst of callers must not hold descriptors for long.
const MAX_IDLE: usize = 1024;
/// A pooled connection whose server answered before it had read the whole request is not ready until it has, which may
/// be never. A ready one says so within microseconds.
const READY: Duration = Duration::from_millis(100);

impl OriginPool {
    pub(super) fn new(origin: &Url, settings: &Settings, tls: &rustls::ClientConfig) -> Result<Self, rustls::Error> {
        let connector = Connector::new(origin, settings, tls)?;
        let text = match origin.port() {
            Some(port) => format!("{}:{port}", origin.host_str().unwrap_or_default()),
            None => origin.host_str().unwrap_or_default().to_owned(),
        };
        let bad = |_| rustls::Error::General(format!("{origin} is no origin"));
        let authority = HeaderValue::from_str(&text).map_err(|error| bad(error.to_string()))?;
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(http::uri::Scheme::HTTPS);
        parts.authority = Some(text.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?);
        Ok(Self {
            connector,
            authority,
            origin: parts,
            idle: Mutex::default(),
            shared: Mutex::default(),
            sharing: Sharing::default(),
            one_call_each: AtomicBool::new(settings.http2 == Http2::Never),
            connecting: tokio::sync::Mutex::default(),
        })
    }

    pub(super) async fn connection(
        &self,
        reuse: Reuse,
        few: bool,
        idle_timeout: Duration,
    ) -> Result<Connection, ErrorKind> {
        if reuse == Reuse::Allowed {
            if let Some(connection) = self.pooled(few, idle_timeout).await {
                return Ok(connection);
            }
            if !self.one_call_each.load(Relaxed) {
                // Waits no longer than a connection may take: behind one that fails, the next connects by itself.
                let _one = tokio::time::timeout(self.connector.timeout(), self.connecting.lock()).await;
                return match self.pooled(few, idle_timeout).await {
                    Some(connection) => Ok(connection),
                    None => self.connect().await,
                };
            }
        }
        self.connect().await
    }

    async fn pooled(&self, few: bool, idle_timeout: Duration) -> Option<Connection> {
        if !few && let Some(shared) = self.shared().await {
            return Some(shared);
        }
        while let Some(Idle { mut sender, since }) = self.pop() {
            // Most often it is ready at once, which needs no timer.
            if since.elapsed() < idle_timeout
                && (sender.is_ready() || matches!(tokio::time::timeout(READY, sender.ready()).await, Ok(Ok(()))))
            {
                return Some(Connection::Http1 { sender, reused: true });
            }
        }
        self.shared().await
    }

    async fn shared(&self) -> Option<Connection> {
        let both = lock(&self.shared).clone();
        for mut shared in both.into_iter().flatten().filter(|shared| !shared.is_full()) {
            if shared.sender.ready().await.is_ok() {
                return Some(Connection::Http2(shared));
            }
        }
        None
    }

    async fn connect(&self) -> Result<Connection, ErrorKind> {
        let crowd = lock(&self.shared)[0].as_ref().is_some_and(|shared| shared.is_full() && !shared.sender.is_closed());
        let hundreds = self.sharing.at_once() / MAX_SHARED;
        let offer = if crowd { Alpn::Crowd { hundreds } } else { Alpn::Configured };
        // Boxed: connecting is rare, and its future is large.
        let connection = Box::pin(self.connector.connect(offer)).await?;
        self.one_call_each.store(matches!(connection, Connection::Http1 { .. }), Relaxed);
        if let Connection::Http2(shared) = &connection {
            // One that is full ends with its last call.
            lock(&self.shared)[usize::from(crowd)] = Some(shared.clone());
        }
        Ok(connection)
    }

    /// Puts `count` HTTP/1.1 connections into the pool, one after the other, beside the shared one.
    pub(super) fn add_http1(self: &Arc<Self>, count: usize) {
        if !self.connector.may_speak_http1() || self.sharing.adding.swap(true, Relaxed) {
            return;
        }
        let host = self.clone();
        tokio::spawn(async move {
            for _ in 0..count {
                // Without it all goes on as before.
                let Ok(Connection::Http1 { sender, .. }) = host.connector.connect(Alpn::Http1).await else { break };
                host.release(sender);
            }
            host.sharing.adding.store(false, Relaxed);
        });
    }

    fn pop(&self) -> Option<Idle> {
        lock(&self.idle).pop_back()
    }

    pub(super) fn release(&self, sender: http1::SendRequest<RequestBody>) {
        let mut idle = lock(&self.idle);
        if idle.len() < MAX_IDLE && !sender.is_closed() {
            idle.push_back(Idle { sender, since: Instant::now() });
        }
    }

    /// The oldest stand in front.
    pub(super) fn prune(&self, idle_timeout: Duration) {
        let mut idle = lock(&self.idle);
        let old = idle.iter().take_while(|idle| idle.since.elapsed() >= idle_timeout).count();
        idle.drain(..old);
        idle.retain(|idle| !idle.sender.is_closed());
    }

    /// HTTP/2 wants the authority in the target and not in `Host` (RFC 9113, section 8.3.1).
    pub(super) fn with_authority(&self, mut request: Request<RequestBody>) -> Request<RequestBody> {
        request.headers_mut().remove(HOST);
        let mut parts = http::uri::Parts::default();
        parts.scheme.clone_from(&self.origin.scheme);
        parts.authority.clone_from(&self.origin.authority);
        parts.path_and_query = request.uri().path_and_query().cloned();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
        *request.version_mut() = http::Version::HTTP_2;
        request
    }
}

#[cfg(test)]
mod tests {
    use hyper_util::rt::TokioIo;

    use super::*;
    use crate::domain::tls;

    #[tokio::test]
    async fn a_connection_that_has_idled_for_idle_timeout_is_never_taken_from_the_pool() {
        let origin: Url = "https://localhost".parse().unwrap();
        let long = Duration::from_secs(60);
        let settings = Settings {
            origins: [origin.clone(), origin.clone(), origin.clone()],
            extra_roots: Vec::new(),
            http2: Http2::Never,
            connect_timeout: long,
            response_timeout: long,
            idle_timeout: long,
        };
        let pool = OriginPool::new(&origin, &settings, &tls::client_config(&[], &[]).unwrap()).unwrap();
        for (idle_timeout, taken) in [(long, true), (Duration::ZERO, false)] {
            let (ours, _theirs) = tokio::io::duplex(1024);
            let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
            tokio::spawn(connection);
            pool.release(sender);
            assert_eq!(pool.pooled(true, idle_timeout).await.is_some(), taken, "{idle_timeout:?}");
            assert!(pool.pop().is_none(), "it is used, or closed");
        }
    }
}
