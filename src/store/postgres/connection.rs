//! The connection to PostgreSQL. Statements are pipelined on it, and it is reopened after it breaks.
//!
//! Each statement is a transaction of its own, is never a named prepared statement, and does not depend on session
//! state. So PgBouncer in transaction mode is supported.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::ConnectionUrl;
use crate::store::StoreError;

/// Time limit of one statement, including a new connection for it. Requests are served from memory meanwhile.
const DEADLINE: Duration = Duration::from_secs(2);
/// Time limit of connecting. Shorter than [`DEADLINE`], so that a statement can report why there is no connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Pause before the next attempt to connect after the first failure; doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The parameters of a statement, with their PostgreSQL types.
pub(super) type Parameters<'a> = [(&'a (dyn ToSql + Sync), Type)];

/// Whether a statement may be sent again if the connection breaks before its result arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnDisconnect {
    /// Resend: the statement is idempotent.
    Resend,
    /// Fail: a second execution would mistake the effect of the first for another process's.
    Fail,
}

/// The connection to PostgreSQL, which is opened when a statement needs it.
pub(super) struct PgConnection {
    url: ConnectionUrl,
    state: Mutex<State>,
    /// Number of connections opened so far.
    connects: AtomicU64,
}

#[derive(Default)]
struct State {
    client: Option<Arc<Client>>,
    failures: u32,
    /// Until when no connection is attempted, and why the last attempt failed.
    pause: Option<(Instant, String)>,
    closed: bool,
}

impl PgConnection {
    pub(super) fn new(url: ConnectionUrl) -> Self {
        Self { url, state: Mutex::default(), connects: AtomicU64::new(0) }
    }

    /// Returns the number of connections opened so far, which identifies the current one.
    pub(super) fn connects(&self) -> u64 {
        self.connects.load(Relaxed)
    }

    /// Runs one statement and returns its rows.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if there is no connection, the statement fails, or the deadline passes;
    /// [`StoreError::Closed`] after [`close`](Self::close).
    pub(super) async fn query(
        &self,
        statement: &str,
        parameters: &Parameters<'_>,
        on_disconnect: OnDisconnect,
    ) -> Result<Vec<Row>, StoreError> {
        let until = Instant::now() + DEADLINE;
        let mut may_resend = on_disconnect == OnDisconnect::Resend;
        loop {
            let client = timeout_at(until, self.client()).await.map_err(|_| timed_out())??;
            match timeout_at(until, client.query_typed(statement, parameters)).await {
                Ok(Ok(rows)) => return Ok(rows),
                Ok(Err(error)) if is_broken(&error) => {
                    self.discard(&client).await;
                    if !std::mem::take(&mut may_resend) {
                        return Err(postgres_error(&error));
                    }
                }
                Ok(Err(error)) => return Err(postgres_error(&error)),
                // The next statement must not queue behind this one, whatever it is blocked on.
                Err(_) => {
                    self.discard(&client).await;
                    return Err(timed_out());
                }
            }
        }
    }

    /// Runs `statements` that create tables, as one transaction. Returns `false` if another process created them at the
    /// same moment, which PostgreSQL reports as an error despite `IF NOT EXISTS`.
    pub(super) async fn create(&self, statements: &str) -> Result<bool, StoreError> {
        let until = Instant::now() + DEADLINE;
        let client = timeout_at(until, self.client()).await.map_err(|_| timed_out())??;
        match timeout_at(until, client.batch_execute(statements)).await.map_err(|_| timed_out())? {
            Ok(()) => Ok(true),
            Err(error) if error.code().is_some_and(|code| CREATED_CONCURRENTLY.contains(&code)) => Ok(false),
            Err(error) => Err(postgres_error(&error)),
        }
    }

    /// Drops the connection. The next statement opens another.
    pub(super) async fn disconnect(&self) {
        self.state.lock().await.client = None;
    }

    /// Drops the connection for good: every later statement fails with [`StoreError::Closed`].
    pub(super) async fn close(&self) {
        let mut state = self.state.lock().await;
        (state.client, state.closed) = (None, true);
    }

    /// Returns the connection, and opens one if there is none.
    async fn client(&self) -> Result<Arc<Client>, StoreError> {
        let mut state = self.state.lock().await;
        if state.closed {
            return Err(StoreError::Closed);
        }
        if let Some(client) = state.client.as_ref().filter(|client| !client.is_closed()) {
            return Ok(client.clone());
        }
        if let Some((_, reason)) = state.pause.as_ref().filter(|(until, _)| Instant::now() < *until) {
            return Err(StoreError::Postgres { reason: reason.clone() });
        }
        match self.connect().await {
            Ok(client) => {
                self.connects.fetch_add(1, Relaxed);
                *state = State { client: Some(client.clone()), ..State::default() };
                Ok(client)
            }
            Err(error) => {
                let pause = PAUSE_FIRST.saturating_mul(1 << state.failures.min(10)).min(PAUSE_MAX);
                state.failures += 1;
                state.pause = Some((Instant::now() + pause, error.clone()));
                Err(StoreError::Postgres { reason: error })
            }
        }
    }

    async fn connect(&self) -> Result<Arc<Client>, String> {
        let ConnectionUrl { config, tls, .. } = &self.url;
        let connected = timeout(CONNECT_TIMEOUT, config.connect(tls.clone())).await;
        let connected = connected.map_err(|_| format!("no connection within {CONNECT_TIMEOUT:?}; {CHECK_SERVER}"))?;
        let (client, connection) = connected.map_err(|error| describe(&error))?;
        // This task ends with the connection, or with the last handle to the client. Statements in flight then fail
        // with the reason.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = describe(&error), "the connection to PostgreSQL broke");
            }
        });
        Ok(Arc::new(client))
    }

    /// Discards a broken connection, unless it has been replaced already.
    async fn discard(&self, broken: &Arc<Client>) {
        let mut state = self.state.lock().await;
        state.client.take_if(|client| Arc::ptr_eq(client, broken));
    }
}

/// The errors of statements that create what another process creates at the same moment.
const CREATED_CONCURRENTLY: [&SqlState; 3] =
    [&SqlState::UNIQUE_VIOLATION, &SqlState::DUPLICATE_TABLE, &SqlState::DUPLICATE_OBJECT];

/// Whether the connection is no longer usable: it broke, the server shuts down, or the server became a read-only
/// standby.
fn is_broken(error: &tokio_postgres::Error) -> bool {
    let fatal = [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::READ_ONLY_SQL_TRANSACTION,
    ];
    match error.code() {
        Some(code) => fatal.contains(code) || code.code().starts_with("08"),
        None => true,
    }
}

fn timed_out() -> StoreError {
    StoreError::Postgres { reason: format!("no answer within {DEADLINE:?}; {CHECK_SERVER}") }
}

fn postgres_error(error: &tokio_postgres::Error) -> StoreError {
    StoreError::Postgres { reason: describe(error) }
}

/// The remedy for errors that have none of their own.
const CHECK_SERVER: &str = "check that PostgreSQL runs and that store.postgres_url is right";

/// Describes an error together with its remedy. Omits the server's `DETAIL`, which quotes values.
fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(error) = error.as_db_error() {
        let remedy = match *error.code() {
            SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                "check the user and the password in store.postgres_url, and pg_hba.conf"
            }
            SqlState::INVALID_CATALOG_NAME => "create the database, or name another one in store.postgres_url",
            SqlState::INSUFFICIENT_PRIVILEGE => {
                "let the role create tables, or create them for it and grant it SELECT, INSERT, UPDATE and DELETE on \
                 them"
            }
            SqlState::UNDEFINED_COLUMN => {
                "the tables do not have the schema of this version: give adsidecar a database of its own"
            }
            SqlState::UNDEFINED_TABLE => "start adsidecar once, which creates its tables",
            _ => CHECK_SERVER,
        };
        return format!("{} ({}); {remedy}", error.message(), error.code().code());
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text += &format!(": {inner}");
        cause = inner.source();
    }
    let remedy = if text.contains("TLS") || text.contains("certificate") {
        "check sslmode and sslrootcert in store.postgres_url: a trusted authority must have issued the server's \
         certificate, and it must be valid for the host's name"
    } else {
        CHECK_SERVER
    };
    format!("{text}; {remedy}")
}
