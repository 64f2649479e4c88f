//! Opens connections to an origin, in tasks of their own.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::{Connections, Idle, OriginPool};
use crate::upstream::ErrorKind;
use crate::upstream::connect::{Offer, Opened};
use crate::upstream::connection::Http1Connection;
use crate::upstream::windows::first_window;

impl OriginPool {
    /// Starts a task that opens a connection: for the requests that wait, or in the background for the next request.
    pub(super) fn open(self: &Arc<Self>, connections: &mut Connections, background: bool) {
        connections.opening += 1;
        let offer =
            Offer::Configured { first_window: first_window(self.protocol_choice.in_flight()), used: self.used.clone() };
        let pool = self.clone();
        tokio::spawn(async move {
            // Boxed, because connecting is rare and its future is large.
            let opened = match Box::pin(pool.connector.connect(offer)).await {
                Ok(opened) => pool.add(opened).await,
                Err(error) => Err(error),
            };
            let mut connections = pool.lock();
            connections.opening -= 1;
            if let Err(error) = opened {
                connections.fail(error, background);
            }
            pool.serve(&mut connections);
        });
    }

    /// Adds a new connection. Over HTTP/2 it carries one request until the server has said how many it allows. The
    /// others wait for that here, where another connection can take them.
    async fn add(self: &Arc<Self>, opened: Opened) -> Result<(), ErrorKind> {
        match opened {
            Opened::Http1 { sender, look, driver } => {
                let mut connections = self.lock();
                connections.expected = 1;
                self.run_http1(driver);
                let connection = Http1Connection { sender, look, reused: false, opened: Instant::now() };
                connections.idle.push_back(Idle::new(connection));
                Ok(())
            }
            Opened::Http2 { connection, mut driver } => {
                let told = driver.settled();
                {
                    let mut connections = self.lock();
                    connections.shared.push(connection.clone());
                    let (pool, connection) = (Arc::downgrade(self), connection.clone());
                    tokio::spawn(async move {
                        // The handle must not keep an unused connection open.
                        let connection = connection.downgrade();
                        driver.await;
                        if let Some(pool) = pool.upgrade() {
                            pool.http2_ended(&connection);
                        }
                    });
                    self.serve(&mut connections);
                }
                let settled = self.connector.settle(told).await;
                if settled.is_err() {
                    self.lock().shared.retain(|other| !other.is(&connection));
                }
                settled
            }
        }
    }

    fn run_http1<D>(self: &Arc<Self>, driver: D)
    where
        D: Future<Output = Result<(), hyper::Error>> + Send + 'static,
    {
        let pool = Arc::downgrade(self);
        tokio::spawn(async move {
            // A request on the connection gets its error.
            if let Err(error) = driver.await {
                tracing::trace!(%error, "connection to Amazon ended");
            }
            if let Some(pool) = pool.upgrade() {
                pool.http1_ended();
            }
        });
    }

    /// Starts a task that opens `count` HTTP/1.1 connections, one after the other, and puts them into the pool. It does
    /// nothing if HTTP/1.1 is not allowed or such a task is already running.
    pub(in crate::upstream) fn add_http1(self: &Arc<Self>, count: usize) {
        if !self.connector.may_speak_http1() || self.protocol_choice.adding.swap(true, Relaxed) {
            return;
        }
        let pool = self.clone();
        tokio::spawn(async move {
            for _ in 0..count {
                // On failure requests continue to use the shared connection.
                let Ok(connection) = pool.new_http1().await else { break };
                pool.release(connection);
            }
            pool.protocol_choice.adding.store(false, Relaxed);
        });
    }

    pub(super) async fn new_http1(self: &Arc<Self>) -> Result<Http1Connection, ErrorKind> {
        match self.connector.connect(Offer::Http1).await? {
            Opened::Http1 { sender, look, driver } => {
                self.run_http1(driver);
                Ok(Http1Connection { sender, look, reused: false, opened: Instant::now() })
            }
            Opened::Http2 { .. } => unreachable!("only HTTP/1.1 was offered"),
        }
    }
}
