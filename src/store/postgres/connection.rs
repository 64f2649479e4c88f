//! The one connection to PostgreSQL, on which statements follow each other without waiting for answers; opened anew
//! where it broke.
//!
//! Each statement stands for itself: it is one transaction, is never prepared under a name, and nothing of the session
//! is relied on. So a PgBouncer in transaction mode may stand in between.

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

/// How long an operation may take, a new connection for it included; memory goes on serving meanwhile.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long a new connection may take, so that it is known before an operation ends why there is none.
const CONNECT: Duration = Duration::from_millis(1500);
/// Between two tries to connect: this long after the first failure, doubling.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What a statement's parameters are.
pub(super) type Parameters<'a> = [(&'a (dyn ToSql + Sync), Type)];

/// Whether a statement may be sent again where the connection broke before its answer came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// Doing it twice is doing it once.
    Yes,
    /// What the first did would be taken for somebody else's.
    No,
}

pub(super) struct PgConnection {
    address: ConnectionUrl,
    state: Mutex<State>,
    /// Rises with each new connection.
    connects: AtomicU64,
}

#[derive(Default)]
struct State {
    client: Option<Arc<Client>>,
    failures: u32,
    /// Before this instant no new connection is tried; says why the last try failed.
    pause: Option<(Instant, String)>,
    closed: bool,
}

impl PgConnection {
    pub(super) fn new(address: ConnectionUrl) -> Self {
        Self { address, state: Mutex::default(), connects: AtomicU64::new(0) }
    }

    /// How often it was connected.
    pub(super) fn connects(&self) -> u64 {
        self.connects.load(Relaxed)
    }

    /// Sends one statement, and gives the rows that it returns.
    pub(super) async fn ask(
        &self,
        statement: &str,
        parameters: &Parameters<'_>,
        again: Again,
    ) -> Result<Vec<Row>, StoreError> {
        let until = Instant::now() + DEADLINE;
        let mut repeated = again == Again::No;
        loop {
            let client = timeout_at(until, self.client()).await.map_err(|_| late())??;
            match timeout_at(until, client.query_typed(statement, parameters)).await {
                Ok(Ok(rows)) => return Ok(rows),
                Ok(Err(error)) if is_broken(&error) => {
                    self.hang_up(&client).await;
                    if std::mem::replace(&mut repeated, true) {
                        return Err(fault(&error));
                    }
                }
                Ok(Err(error)) => return Err(fault(&error)),
                // Whatever it waits for, the next statement must not wait behind it.
                Err(_) => {
                    self.hang_up(&client).await;
                    return Err(late());
                }
            }
        }
    }

    /// Makes what `statements` make, as one transaction. `false`: somebody else made it at the same instant, which
    /// PostgreSQL tells as an error even where it was said that this is no error.
    pub(super) async fn make(&self, statements: &str) -> Result<bool, StoreError> {
        let until = Instant::now() + DEADLINE;
        let client = timeout_at(until, self.client()).await.map_err(|_| late())??;
        match timeout_at(until, client.batch_execute(statements)).await.map_err(|_| late())? {
            Ok(()) => Ok(true),
            Err(error) if error.code().is_some_and(|code| MADE_MEANWHILE.contains(&code)) => Ok(false),
            Err(error) => Err(fault(&error)),
        }
    }

    /// Ends the connection. The next statement opens another.
    pub(super) async fn rest(&self) {
        self.state.lock().await.client = None;
    }

    /// Ends the connection, and opens none any more.
    pub(super) async fn close(&self) {
        let mut state = self.state.lock().await;
        (state.client, state.closed) = (None, true);
    }

    /// The connection, opened where there is none.
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
        let ConnectionUrl { config, tls, .. } = &self.address;
        let connected = timeout(CONNECT, config.connect(tls.clone())).await;
        let connected = connected.map_err(|_| format!("no connection within {CONNECT:?}; {REACH}"))?;
        let (client, connection) = connected.map_err(|error| told(&error))?;
        // It ends with the connection, or with the last handle to the client. Whoever waits for an answer is told why.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = told(&error), "the connection to PostgreSQL ended");
            }
        });
        Ok(Arc::new(client))
    }

    /// Takes a broken connection away, unless there is another one already.
    async fn hang_up(&self, broken: &Arc<Client>) {
        let mut state = self.state.lock().await;
        state.client.take_if(|client| Arc::ptr_eq(client, broken));
    }
}

const MADE_MEANWHILE: [&SqlState; 3] =
    [&SqlState::UNIQUE_VIOLATION, &SqlState::DUPLICATE_TABLE, &SqlState::DUPLICATE_OBJECT];

/// Whether the connection is of no use any more: it broke, the server ends, or it became a standby, which takes no
/// writes.
fn is_broken(error: &tokio_postgres::Error) -> bool {
    let ended = [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::READ_ONLY_SQL_TRANSACTION,
    ];
    match error.code() {
        Some(code) => ended.contains(code) || code.code().starts_with("08"),
        None => true,
    }
}

fn late() -> StoreError {
    StoreError::Postgres { reason: format!("no answer within {DEADLINE:?}; {REACH}") }
}

fn fault(error: &tokio_postgres::Error) -> StoreError {
    StoreError::Postgres { reason: told(error) }
}

const REACH: &str = "check that PostgreSQL runs and that store.postgres_url leads to it";

/// What happened, and what cures it. Never the server's details: those quote values.
fn told(error: &tokio_postgres::Error) -> String {
    if let Some(error) = error.as_db_error() {
        let cure = match *error.code() {
            SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                "check the user and the password in store.postgres_url, and pg_hba.conf"
            }
            SqlState::INVALID_CATALOG_NAME => "make the database, or name another one in store.postgres_url",
            SqlState::INSUFFICIENT_PRIVILEGE => {
                "let the role make tables, or make them for it and grant it SELECT, INSERT, UPDATE and DELETE on them"
            }
            SqlState::UNDEFINED_COLUMN => {
                "its tables are not those of this version: give adsidecar a database of its own"
            }
            SqlState::UNDEFINED_TABLE => "start adsidecar once, which makes its tables",
            _ => REACH,
        };
        return format!("{} ({}); {cure}", error.message(), error.code().code());
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text += &format!(": {inner}");
        cause = inner.source();
    }
    let cure = if text.contains("TLS") || text.contains("certificate") {
        "check sslmode and sslrootcert in store.postgres_url: the server's certificate has to be of a trusted authority and \
         to carry the host's name"
    } else {
        REACH
    };
    format!("{text}; {cure}")
}
