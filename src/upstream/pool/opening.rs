//! Opens connections to an origin, in tasks of their own.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use futures_util::stream::{self, TryStreamExt};

use super::{Connections, Idle, OriginPool};
use crate::upstream::ErrorKind;
use crate::upstream::connect::{Offer, Opened};
use crate::upstream::connection::Http1Connection;
use crate::upstream::http1_driver::Http1Driver;
use crate::upstream::windows::first_window;

/// Most HTTP/1.1 connections that are opened at a time beside the shared one: requests should not have to wait for the
/// handshakes of many.
const AT_A_TIME: usize = 8;

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
            Opened::Http1(connection) => {
                let mut connections = self.lock();
                connections.expected = 1;
                self.run_http1(&connection.driver);
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

    fn run_http1(self: &Arc<Self>, driver: &Http1Driver) {
        let (pool, run) = (Arc::downgrade(self), driver.run());
        tokio::spawn(async move {
            run.await;
            if let Some(pool) = pool.upgrade() {
                pool.http1_ended();
            }
        });
    }

    /// Starts a task that opens `count` HTTP/1.1 connections, a few at a time, and puts them into the pool. It does
    /// nothing if HTTP/1.1 is not allowed or such a task is already running.
    pub(in crate::upstream) fn add_http1(self: &Arc<Self>, count: usize) {
        if !self.connector.may_speak_http1() || self.protocol_choice.adding.swap(true, Relaxed) {
            return;
        }
        let pool = self.clone();
        tokio::spawn(async move {
            let each = stream::iter((0..count).map(Ok::<_, ErrorKind>));
            // On failure requests continue to use the shared connection.
            let _ = each
                .try_for_each_concurrent(AT_A_TIME, async |_| {
                    pool.release(pool.new_http1().await?);
                    Ok(())
                })
                .await;
            pool.protocol_choice.adding.store(false, Relaxed);
        });
    }

    pub(super) async fn new_http1(self: &Arc<Self>) -> Result<Box<Http1Connection>, ErrorKind> {
        match self.connector.connect(Offer::Http1).await? {
            Opened::Http1(connection) => {
                self.run_http1(&connection.driver);
                Ok(connection)
            }
            Opened::Http2 { .. } => unreachable!("only HTTP/1.1 was offered"),
        }
    }
}
