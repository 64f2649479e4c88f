//! The brake that all processes share: until when none of them may call Login with Amazon, by the database's clock.

use std::time::Duration;

use tokio_postgres::types::Type;

use super::connection::{OnDisconnect, Parameters};
use super::{Postgres, column};
use crate::store::StoreError;

/// What the database says of the brake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharedBrake {
    /// There is none.
    Released,
    /// It has ended: the process that probes then releases it or prolongs it.
    Ended,
    /// No process may call Login with Amazon.
    Held {
        /// The error code.
        code: String,
        /// For how long.
        wait: Duration,
    },
}

impl SharedBrake {
    /// What the note says, if there is one, at the time `now` of the database.
    pub(super) fn noted(note: Option<String>, now: f64) -> Self {
        let Some(note) = note else { return Self::Released };
        parse(&note, now).map_or(Self::Ended, |(code, wait)| Self::Held { code, wait })
    }
}

/// The content of the note: seconds of the Unix epoch by the database's clock, a space, and the error code.
fn parse(value: &str, now: f64) -> Option<(String, Duration)> {
    let (until, code) = value.split_once(' ')?;
    let left = until.parse::<f64>().ok()? - now;
    let wait = Duration::try_from_secs_f64(left).ok().filter(|wait| !wait.is_zero())?;
    Some((code.to_owned(), wait))
}

impl Postgres {
    /// Lets no process call Login with Amazon for the time `wait`, unless they are to wait longer already.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn set_brake(&self, code: &str, wait: Duration) -> Result<(), StoreError> {
        const SET: &str = "INSERT INTO adsidecar_notes AS n (name, value) \
                           VALUES ('brake', extract(epoch FROM clock_timestamp())::float8 + $1 || ' ' || $2) \
                           ON CONFLICT (name) DO UPDATE SET value = excluded.value \
                           WHERE split_part(n.value, ' ', 1)::float8 < split_part(excluded.value, ' ', 1)::float8 \
                           RETURNING name";
        let wait = wait.as_secs_f64();
        let parameters: &Parameters<'_> = &[(&wait, Type::FLOAT8), (&code, Type::TEXT)];
        self.query(SET, parameters, OnDisconnect::Resend).await.map(drop)
    }

    /// Lets all processes call Login with Amazon again.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written. The brake then ends by itself.
    pub async fn release_brake(&self) -> Result<(), StoreError> {
        const RELEASE: &str = "DELETE FROM adsidecar_notes WHERE name = 'brake' RETURNING name";
        self.query(RELEASE, &[], OnDisconnect::Resend).await.map(drop)
    }

    /// Asks to call Login with Amazon once for all processes, whose brake has ended: it holds the others for the time
    /// `probe`. Returns `None` if this process may call, or why not, and for how long.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn claim_probe(&self, probe: Duration) -> Result<Option<(String, Duration)>, StoreError> {
        const CLAIM: &str = "UPDATE adsidecar_notes SET value = extract(epoch FROM clock_timestamp())::float8 + $1 \
                             || ' ' || split_part(value, ' ', 2) WHERE name = 'brake' \
                             AND split_part(value, ' ', 1)::float8 <= extract(epoch FROM clock_timestamp()) \
                             RETURNING name";
        const LOOK: &str = "SELECT value, extract(epoch FROM clock_timestamp())::float8 FROM adsidecar_notes \
                            WHERE name = 'brake'";
        let seconds = probe.as_secs_f64();
        if !self.query(CLAIM, &[(&seconds, Type::FLOAT8)], OnDisconnect::Fail).await?.is_empty() {
            return Ok(None);
        }
        let rows = self.query(LOOK, &[], OnDisconnect::Resend).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        Ok(parse(&column::<String>(row, 0)?, column(row, 1)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_brake_that_has_ended_is_not_one_that_was_released() {
        let noted = |note: Option<&str>| SharedBrake::noted(note.map(str::to_owned), 100.0);
        assert_eq!(noted(None), SharedBrake::Released);
        assert_eq!((noted(Some("100 throttled")), noted(Some("?"))), (SharedBrake::Ended, SharedBrake::Ended));
        let held = SharedBrake::Held { code: "throttled".into(), wait: Duration::from_millis(2500) };
        assert_eq!(noted(Some("102.5 throttled")), held);
    }
}
