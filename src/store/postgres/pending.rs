//! What is under way, where any of several processes may go on with it: logins that have begun, and grants that wait.
//!
//! All of it is sealed, whole. Whatever is good once is taken by a statement that only one process succeeds with.

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::{Again, Parameters};
use super::{Postgres, column};
use crate::domain::secret::Secret;
use crate::store::keyring::Keyring;
use crate::store::{PendingGrant, StoreError};

impl Postgres {
    /// Takes in a login that has begun, by the hash of its state.
    pub async fn save_pending_login(&self, state: &str, plain: &Secret) -> Result<(), StoreError> {
        const BEGIN: &str = "INSERT INTO adsidecar_logins (state, sealed, since) VALUES ($1, $2, clock_timestamp()) \
                             ON CONFLICT (state) DO UPDATE SET sealed = excluded.sealed RETURNING state";
        let sealed = self.0.keyring.load().seal(plain.expose().as_bytes());
        self.ask(BEGIN, &[(&state, Type::TEXT), (&sealed, Type::TEXT)], Again::Yes).await.map(drop)
    }

    /// Takes a login out: of all who ask for it, one gets it.
    pub async fn take_pending_login(&self, state: &str) -> Result<Option<Secret>, StoreError> {
        const TAKE: &str = "DELETE FROM adsidecar_logins WHERE state = $1 RETURNING sealed";
        let rows = self.ask(TAKE, &[(&state, Type::TEXT)], Again::No).await?;
        let sealed = rows.first().map(|row| column::<String>(row, 0)).transpose()?;
        let opened = sealed.and_then(|sealed| self.0.keyring.load().open(&sealed));
        Ok(opened.and_then(|opened| String::from_utf8(opened.plain.to_vec()).ok()).map(Secret::new))
    }

    /// Takes out logins that began long ago and that nobody finished.
    pub async fn delete_expired_logins(&self) -> Result<(), StoreError> {
        const SWEEP: &str = "DELETE FROM adsidecar_logins WHERE since < clock_timestamp() - interval '15 minutes'";
        self.ask(SWEEP, &[], Again::Yes).await.map(drop)
    }

    /// Stores a grant that waits. Who does so works on it: for a minute nobody else claims it.
    pub(in crate::store) async fn save_pending_grant(&self, waiting: &PendingGrant) -> Result<(), StoreError> {
        const KEEP: &str = "INSERT INTO adsidecar_waiting (id, user_id, sealed, claimed_until) \
                            VALUES ($1, $2, $3, clock_timestamp() + interval '1 minute') \
                            ON CONFLICT (id) DO UPDATE SET sealed = excluded.sealed RETURNING id";
        let (user, sealed) = (waiting.user.as_str(), waiting.seal(&self.0.keyring.load()));
        let parameters: &Parameters<'_> = &[(&waiting.id, Type::TEXT), (&user, Type::TEXT), (&sealed, Type::TEXT)];
        self.ask(KEEP, parameters, Again::Yes).await.map(drop)
    }

    pub(in crate::store) async fn delete_pending_grant(&self, id: &str) -> Result<(), StoreError> {
        const DROP: &str = "DELETE FROM adsidecar_waiting WHERE id = $1";
        self.ask(DROP, &[(&id, Type::TEXT)], Again::Yes).await.map(drop)
    }

    /// The grants that wait and that nobody works on: who did has ended. Each is the caller's for a minute.
    pub(in crate::store) async fn claim_pending_grants(&self) -> Result<Vec<PendingGrant>, StoreError> {
        const CLAIM: &str = "UPDATE adsidecar_waiting SET claimed_until = clock_timestamp() + interval '1 minute' \
                             WHERE claimed_until < clock_timestamp() RETURNING id, sealed";
        let rows = self.ask(CLAIM, &[], Again::No).await?;
        let ring = self.0.keyring.load_full();
        let opened = rows.iter().map(|row| opened(row, &ring)).collect::<Result<Vec<_>, _>>()?;
        Ok(opened.into_iter().flatten().collect())
    }

    /// Takes a grant that waits for its confirmation, if it is `good` still: of all who confirm, one gets it. It stays
    /// stored, as one that needs no confirmation any more, until it is in use: should this process end, another goes
    /// on.
    pub async fn confirm_pending_grant(
        &self,
        id: &str,
        good: impl FnOnce(&PendingGrant) -> bool,
    ) -> Result<Option<PendingGrant>, StoreError> {
        const FIND: &str = "SELECT id, sealed FROM adsidecar_waiting WHERE id = $1";
        const TAKE: &str = "UPDATE adsidecar_waiting SET sealed = $2, claimed_until = clock_timestamp() + interval '1 minute' \
                            WHERE id = $1 AND sealed = $3 RETURNING id";
        let rows = self.ask(FIND, &[(&id, Type::TEXT)], Again::Yes).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let (ring, before) = (self.0.keyring.load_full(), column::<String>(row, 1)?);
        let found = opened(row, &ring)?.filter(|waiting| waiting.confirm && good(waiting));
        let Some(waiting) = found.map(|waiting| PendingGrant { confirm: false, ..waiting }) else { return Ok(None) };
        let sealed = waiting.seal(&ring);
        let parameters: &Parameters<'_> = &[(&id, Type::TEXT), (&sealed, Type::TEXT), (&before, Type::TEXT)];
        let taken = !self.ask(TAKE, parameters, Again::No).await?.is_empty();
        Ok(taken.then_some(waiting))
    }

    /// What is under way is small and short-lived: all of it is sealed anew, whatever it was sealed with.
    pub(super) async fn reseal_waiting(&self, ring: &Keyring) -> Result<(), StoreError> {
        const WAITING: [&str; 2] = [
            "SELECT id, sealed FROM adsidecar_waiting",
            "UPDATE adsidecar_waiting SET sealed = $2 WHERE id = $1 AND sealed = $3",
        ];
        const LOGINS: [&str; 2] = [
            "SELECT state, sealed FROM adsidecar_logins",
            "UPDATE adsidecar_logins SET sealed = $2 WHERE state = $1 AND sealed = $3",
        ];
        let waiting = |text: &str| PendingGrant::open(text, ring).map(|waiting| waiting.seal(ring));
        let login = |text: &str| ring.open(text).map(|opened| ring.seal(&opened.plain));
        self.reseal_table(WAITING, waiting).await?;
        self.reseal_table(LOGINS, login).await
    }

    async fn reseal_table(
        &self,
        [all, replace]: [&str; 2],
        anew: impl Fn(&str) -> Option<String>,
    ) -> Result<(), StoreError> {
        for row in self.ask(all, &[], Again::Yes).await? {
            let (id, before): (String, String) = (column(&row, 0)?, column(&row, 1)?);
            if let Some(sealed) = anew(&before) {
                let parameters: &Parameters<'_> = &[(&id, Type::TEXT), (&sealed, Type::TEXT), (&before, Type::TEXT)];
                self.ask(replace, parameters, Again::Yes).await?;
            }
        }
        Ok(())
    }
}

/// What does not open is kept, and said.
fn opened(row: &Row, ring: &Keyring) -> Result<Option<PendingGrant>, StoreError> {
    let (id, sealed): (String, String) = (column(row, 0)?, column(row, 1)?);
    let waiting = PendingGrant::open(&sealed, ring).filter(|waiting| waiting.id == id);
    if waiting.is_none() {
        tracing::error!(id, "a grant that waits does not open and is kept");
    }
    Ok(waiting)
}
