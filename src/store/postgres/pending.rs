//! Pending logins and pending grants that any of the processes may continue.
//!
//! Each is sealed as a whole. A value that may be used once is taken with a statement that succeeds for one process
//! only.

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::{OnDisconnect, Parameters};
use super::{Postgres, column};
use crate::domain::secret::Secret;
use crate::store::keyring::Keyring;
use crate::store::{PendingGrant, StoreError};

impl Postgres {
    /// Stores a pending login under the hash of its state, sealed.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn save_pending_login(&self, state: &str, plain: &Secret) -> Result<(), StoreError> {
        const BEGIN: &str = "INSERT INTO adsidecar_logins (state, sealed, since) VALUES ($1, $2, clock_timestamp()) \
                             ON CONFLICT (state) DO UPDATE SET sealed = excluded.sealed RETURNING state";
        let sealed = self.0.keyring.load().seal(plain.expose().as_bytes());
        self.query(BEGIN, &[(&state, Type::TEXT), (&sealed, Type::TEXT)], OnDisconnect::Resend).await.map(drop)
    }

    /// Returns a pending login without removing it. `None` if there is no such login, or no key opens it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read.
    pub async fn pending_login(&self, state: &str) -> Result<Option<Secret>, StoreError> {
        const LOOK: &str = "SELECT sealed FROM adsidecar_logins WHERE state = $1";
        self.opened_login(self.query(LOOK, &[(&state, Type::TEXT)], OnDisconnect::Resend).await?)
    }

    /// Removes a pending login and returns it. Of concurrent calls, one gets it. `None` if there is no such login, or
    /// no key opens it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn take_pending_login(&self, state: &str) -> Result<Option<Secret>, StoreError> {
        const TAKE: &str = "DELETE FROM adsidecar_logins WHERE state = $1 RETURNING sealed";
        self.opened_login(self.query(TAKE, &[(&state, Type::TEXT)], OnDisconnect::Fail).await?)
    }

    fn opened_login(&self, rows: Vec<Row>) -> Result<Option<Secret>, StoreError> {
        let sealed = rows.first().map(|row| column::<String>(row, 0)).transpose()?;
        let opened = sealed.and_then(|sealed| self.0.keyring.load().open(&sealed));
        Ok(opened.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok()).map(Secret::new))
    }

    /// Deletes pending logins that started more than 15 minutes ago.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    pub async fn delete_expired_logins(&self) -> Result<(), StoreError> {
        const SWEEP: &str = "DELETE FROM adsidecar_logins WHERE since < clock_timestamp() - interval '15 minutes'";
        self.query(SWEEP, &[], OnDisconnect::Resend).await.map(drop)
    }

    /// Stores a pending grant and claims it for one minute, during which no other process claims it.
    pub(in crate::store) async fn save_pending_grant(&self, pending: &PendingGrant) -> Result<(), StoreError> {
        const KEEP: &str = "INSERT INTO adsidecar_waiting (id, user_id, sealed, claimed_until) \
                            VALUES ($1, $2, $3, clock_timestamp() + interval '1 minute') \
                            ON CONFLICT (id) DO UPDATE SET sealed = excluded.sealed RETURNING id";
        let (user, sealed) = (pending.user.as_str(), pending.seal(&self.0.keyring.load()));
        let parameters: &Parameters<'_> = &[(&pending.id, Type::TEXT), (&user, Type::TEXT), (&sealed, Type::TEXT)];
        self.query(KEEP, parameters, OnDisconnect::Resend).await.map(drop)
    }

    /// See [`TokenStore::delete_pending_grant`](crate::store::TokenStore::delete_pending_grant).
    pub(in crate::store) async fn delete_pending_grant(&self, id: &str) -> Result<(), StoreError> {
        const DROP: &str = "DELETE FROM adsidecar_waiting WHERE id = $1";
        self.query(DROP, &[(&id, Type::TEXT)], OnDisconnect::Resend).await.map(drop)
    }

    /// Claims, for one minute, the pending grants whose claim has expired because the process that held it has ended.
    pub(in crate::store) async fn claim_pending_grants(&self) -> Result<Vec<PendingGrant>, StoreError> {
        const CLAIM: &str = "UPDATE adsidecar_waiting SET claimed_until = clock_timestamp() + interval '1 minute' \
                             WHERE claimed_until < clock_timestamp() RETURNING id, sealed";
        let rows = self.query(CLAIM, &[], OnDisconnect::Fail).await?;
        let ring = self.0.keyring.load_full();
        let opened = rows.iter().map(|row| open_row(row, &ring)).collect::<Result<Vec<_>, _>>()?;
        Ok(opened.into_iter().flatten().collect())
    }

    /// Confirms a pending grant if it needs confirmation and `accept` returns true. Of concurrent calls, one gets the
    /// grant; the others get `None`. The grant stays stored as confirmed until it is in use, so that another process
    /// can continue if this one ends.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be read or written.
    pub async fn confirm_pending_grant(
        &self,
        id: &str,
        accept: impl FnOnce(&PendingGrant) -> bool,
    ) -> Result<Option<PendingGrant>, StoreError> {
        const FIND: &str = "SELECT id, sealed FROM adsidecar_waiting WHERE id = $1";
        const TAKE: &str = "UPDATE adsidecar_waiting SET sealed = $2, \
                            claimed_until = clock_timestamp() + interval '1 minute' \
                            WHERE id = $1 AND sealed = $3 RETURNING id";
        let rows = self.query(FIND, &[(&id, Type::TEXT)], OnDisconnect::Resend).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let (ring, before) = (self.0.keyring.load_full(), column::<String>(row, 1)?);
        let found = open_row(row, &ring)?.filter(|pending| pending.confirm && accept(pending));
        let Some(pending) = found.map(|pending| PendingGrant { confirm: false, ..pending }) else { return Ok(None) };
        let sealed = pending.seal(&ring);
        let parameters: &Parameters<'_> = &[(&id, Type::TEXT), (&sealed, Type::TEXT), (&before, Type::TEXT)];
        let taken = !self.query(TAKE, parameters, OnDisconnect::Fail).await?.is_empty();
        Ok(taken.then_some(pending))
    }

    /// Seals pending grants and logins again, whatever key sealed them: they are few and short-lived.
    pub(super) async fn reseal_pending(&self, ring: &Keyring) -> Result<(), StoreError> {
        const GRANTS: [&str; 2] = [
            "SELECT id, sealed FROM adsidecar_waiting",
            "UPDATE adsidecar_waiting SET sealed = $2 WHERE id = $1 AND sealed = $3",
        ];
        const LOGINS: [&str; 2] = [
            "SELECT state, sealed FROM adsidecar_logins",
            "UPDATE adsidecar_logins SET sealed = $2 WHERE state = $1 AND sealed = $3",
        ];
        let grant = |text: &str| PendingGrant::open(text, ring).map(|pending| pending.seal(ring));
        let login = |text: &str| ring.open(text).map(|opened| ring.seal(&opened.plain));
        self.reseal_table(GRANTS, grant).await?;
        self.reseal_table(LOGINS, login).await?;
        self.reseal_accounts(ring).await
    }

    /// Reseals each row that `select` returns and that `reseal` can open, unless another process has changed it.
    pub(super) async fn reseal_table(
        &self,
        [select, update]: [&str; 2],
        reseal: impl Fn(&str) -> Option<String>,
    ) -> Result<(), StoreError> {
        for row in self.query(select, &[], OnDisconnect::Resend).await? {
            let (id, before): (String, String) = (column(&row, 0)?, column(&row, 1)?);
            if let Some(sealed) = reseal(&before) {
                let parameters: &Parameters<'_> = &[(&id, Type::TEXT), (&sealed, Type::TEXT), (&before, Type::TEXT)];
                self.query(update, parameters, OnDisconnect::Resend).await?;
            }
        }
        Ok(())
    }
}

/// Opens a pending grant. One that cannot be opened is logged and kept.
fn open_row(row: &Row, ring: &Keyring) -> Result<Option<PendingGrant>, StoreError> {
    let (id, sealed): (String, String) = (column(row, 0)?, column(row, 1)?);
    let pending = PendingGrant::open(&sealed, ring).filter(|pending| pending.id == id);
    if pending.is_none() {
        tracing::error!(id, "a pending grant cannot be opened and is kept");
    }
    Ok(pending)
}
