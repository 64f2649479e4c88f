//! The connection to PostgreSQL. Statements are pipelined on it, and it is reopened after it breaks.
//!
//! Each statement is a transaction of its own, is never a named prepared statement, and does not depend on session
//! state. So PgBouncer in transaction mode is supported.
//!
//! A statement that takes too long is ended by the server (`statement_timeout`, `lock_timeout`), so that the connection
//! and the statements behind it survive. A pooler may not pass these settings on; then, and if the server does not
//! respond, the statement is cancelled with a cancel request.

use std::error::Error;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, Row};

use super::ConnectionUrl;
use crate::store::StoreError;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Short statements that somebody waits for. No statement may delay those behind it: a locked row is given up after
    /// 100 ms, and tried again over the other connection.
    Requests,
    /// Work on many rows, and rows that another transaction has locked.
    Bulk,
}

impl Purpose {
    /// Time limit of one statement, including a new connection for it. Requests are served from memory meanwhile.
    pub(super) const fn deadline(self) -> Duration {
        match self {
            Self::Requests => Duration::from_secs(2),
            Self::Bulk => Duration::from_secs(10),
        }
    }

    /// How long a statement waits for a lock, as a setting of PostgreSQL.
    pub(super) const fn lock_timeout(self) -> &'static str {
        match self {
            Self::Requests => "100ms",
            Self::Bulk => "1500ms",
        }
    }

    /// `statement_timeout`: less than the deadline, so that the server answers before the client gives up.
    const fn statement_timeout(self) -> &'static str {
        match self {
            Self::Requests => "1800ms",
            Self::Bulk => "9500ms",
        }
    }
}

/// Time limit of connecting. Shorter than the deadline, so that a statement can report why there is no connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Pause before the next attempt to connect after the first failure; doubles up to [`RECONNECT_PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// The longest pause before the next attempt to connect.
pub const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Pause before a statement that met a locked row is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Time limit of a migration, which may create an index of a large table.
const MIGRATION_DEADLINE: Duration = Duration::from_mins(10);
/// Time limit of a cancel request.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

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
    purpose: Purpose,
    state: Mutex<State>,
    /// Number of connections opened so far.
    connects: AtomicU64,
    /// Notified of each login and logout, where the connection is a session of its own.
    changed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    client: Option<Arc<Client>>,
    failures: u32,
    /// Until when no connection is attempted, and why the last attempt failed.
    pause: Option<(Instant, String)>,
    /// Whether a pooler refused our settings of the session: then there is no session, and none is attempted.
    pooled: bool,
    closed: bool,
}

/// Why a connection was not opened.
struct Refusal {
    reason: String,
    /// Whether a pooler refused our settings of the session.
    by_pooler: bool,
}

impl PgConnection {
    pub(super) fn new(url: ConnectionUrl, purpose: Purpose) -> Self {
        Self { url, purpose, state: Mutex::default(), connects: AtomicU64::new(0), changed: Arc::default() }
    }

    /// Returns when another process has stored a login or logout. Never returns if a pooler hides the session.
    pub(super) async fn notified(&self) {
        self.changed.notified().await;
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
        let until = Instant::now() + self.purpose.deadline();
        let mut may_resend = on_disconnect == OnDisconnect::Resend;
        loop {
            let client = timeout_at(until, self.client()).await.map_err(|_| self.timed_out())??;
            match timeout_at(until, client.query_typed(statement, parameters)).await {
                Ok(Ok(rows)) => return Ok(rows),
                Ok(Err(error)) if is_broken(&error) => {
                    self.discard(&client).await;
                    if !std::mem::take(&mut may_resend) {
                        return Err(postgres_error(&error));
                    }
                }
                Ok(Err(error)) if is_locked(&error) => {
                    if self.purpose == Purpose::Requests || Instant::now() + LOCK_PAUSE >= until {
                        return Err(StoreError::RowLocked);
                    }
                    sleep(LOCK_PAUSE).await;
                }
                Ok(Err(error)) if error.code() == Some(&SqlState::QUERY_CANCELED) => return Err(self.timed_out()),
                Ok(Err(error)) => return Err(postgres_error(&error)),
                // The server did not end the statement by itself: a pooler hid our settings, or it is out of reach. The
                // next statement must not queue behind this one, and the server must not go on with it.
                Err(_) => {
                    self.cancel(&client);
                    self.discard(&client).await;
                    return Err(self.timed_out());
                }
            }
        }
    }

    /// Asks the server, over a connection of its own, to end the statement that `client` waits for.
    fn cancel(&self, client: &Client) {
        let (token, tls) = (client.cancel_token(), self.url.tls.clone());
        tokio::spawn(async move {
            // If this fails too, the server ends the statement when it notices that the connection has gone.
            let _ = timeout(CANCEL_TIMEOUT, token.cancel_query(tls)).await;
        });
    }

    fn timed_out(&self) -> StoreError {
        StoreError::Postgres { reason: format!("no answer within {:?}; {CHECK_SERVER}", self.purpose.deadline()) }
    }

    /// Runs `statements` that create or change tables, as one transaction. Returns `false` if it is to be tried again:
    /// another process created them at the same moment, which PostgreSQL reports as an error despite `IF NOT EXISTS`,
    /// or a transaction held a table for long.
    pub(super) async fn create(&self, statements: &str) -> Result<bool, StoreError> {
        let until = Instant::now() + MIGRATION_DEADLINE;
        let connected = timeout(self.purpose.deadline(), self.client()).await;
        let client = connected.map_err(|_| self.timed_out())??;
        match timeout_at(until, client.batch_execute(statements)).await.map_err(|_| self.timed_out())? {
            Ok(()) => Ok(true),
            Err(error) if error.code().is_some_and(|code| CREATED_CONCURRENTLY.contains(&code)) => Ok(false),
            Err(error) if is_locked(&error) => Ok(false),
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
        let mut connected = self.connect(state.pooled).await;
        if let Err(error) = &connected
            && error.by_pooler
            && !state.pooled
        {
            state.pooled = true;
            connected = self.connect(true).await;
        }
        match connected {
            Ok(client) => {
                self.connects.fetch_add(1, Relaxed);
                *state = State { client: Some(client.clone()), pooled: state.pooled, ..State::default() };
                Ok(client)
            }
            Err(Refusal { reason, .. }) => {
                let pause = PAUSE_FIRST.saturating_mul(1 << state.failures.min(10)).min(RECONNECT_PAUSE_MAX);
                state.failures += 1;
                state.pause = Some((Instant::now() + pause, reason.clone()));
                Err(StoreError::Postgres { reason })
            }
        }
    }

    /// Opens a connection: without a pooler a session with our time limits, which hears of logins and logouts.
    async fn connect(&self, pooled: bool) -> Result<Arc<Client>, Refusal> {
        let tls = &self.url.tls;
        let mut config = self.url.config.clone();
        if !pooled {
            let (statement, lock) = (self.purpose.statement_timeout(), self.purpose.lock_timeout());
            let ours = format!("-c statement_timeout={statement} -c lock_timeout={lock}");
            let theirs = config.get_options().map(|options| format!(" {options}")).unwrap_or_default();
            config.options(ours + &theirs);
        }
        let connected = timeout(CONNECT_TIMEOUT, config.connect(tls.clone())).await;
        let no_time = |_| Refusal {
            reason: format!("no connection within {CONNECT_TIMEOUT:?}; {CHECK_SERVER}"),
            by_pooler: false,
        };
        let refused = |error: &tokio_postgres::Error| Refusal { reason: describe(error), by_pooler: is_pooler(error) };
        let (client, mut connection) = connected.map_err(no_time)?.map_err(|error| refused(&error))?;
        let changed = self.changed.clone();
        // This task ends with the connection, or with the last handle to the client. Statements in flight then fail
        // with the reason.
        tokio::spawn(async move {
            loop {
                match poll_fn(|context| connection.poll_message(context)).await {
                    Some(Ok(AsyncMessage::Notification(_))) => changed.notify_one(),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        tracing::debug!(error = describe(&error), "the connection to PostgreSQL broke");
                        return;
                    }
                    None => return,
                }
            }
        });
        if !pooled && self.purpose == Purpose::Requests {
            // Only a hint to poll at once: who misses a notification learns of the change by the next poll.
            let listening = timeout(CONNECT_TIMEOUT, client.batch_execute("LISTEN adsidecar")).await;
            listening.map_err(no_time)?.map_err(|error| refused(&error))?;
        }
        Ok(Arc::new(client))
    }

    /// Discards a broken connection, unless it has been replaced already.
    async fn discard(&self, broken: &Arc<Client>) {
        let mut state = self.state.lock().await;
        state.client.take_if(|client| Arc::ptr_eq(client, broken));
    }
}

/// The errors of statements that create what another process creates at the same moment.
const CREATED_CONCURRENTLY: [&SqlState; 4] = [
    &SqlState::UNIQUE_VIOLATION,
    &SqlState::DUPLICATE_TABLE,
    &SqlState::DUPLICATE_OBJECT,
    &SqlState::DUPLICATE_FUNCTION,
];

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

/// Whether another transaction holds a lock that the statement needs; nothing was written.
fn is_locked(error: &tokio_postgres::Error) -> bool {
    let codes = [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED, SqlState::T_R_SERIALIZATION_FAILURE];
    error.code().is_some_and(|code| codes.contains(code))
}

/// Whether a pooler refused the settings of the session (PgBouncer: "unsupported startup parameter").
fn is_pooler(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| error.message().contains("startup parameter"))
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
