//! What operators do: look at everything, and take other keys into use.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_postgres::types::Type;

use super::connection::{Again, Parameters};
use super::{KEY, Postgres, StoredRow, digest, json, locked};
use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::store::keyring::Keyring;
use crate::store::{Reseal, Sealed, StoreError, Users};

impl Postgres {
    pub(in crate::store) async fn scan(&self) -> Result<Users, StoreError> {
        let ring = self.0.keyring.load_full();
        let mut users = Users::new();
        self.each(|held| users.push((held.user.clone(), held.open(&ring).0))).await?;
        Ok(users)
    }

    pub(in crate::store) async fn dump(&self) -> Result<BTreeMap<UserId, serde_json::Value>, StoreError> {
        let value = |held: StoredRow| {
            let value = serde_json::from_str(&held.json).unwrap_or(serde_json::Value::String(held.json));
            (held.user, value)
        };
        let mut all = BTreeMap::new();
        self.each(|held| all.extend([value(held)])).await?;
        Ok(all)
    }

    pub(in crate::store) async fn rekey(&self, keyring: Arc<Keyring>) -> Result<(), StoreError> {
        let found = self.note(KEY).await?;
        let last = found.as_deref().and_then(|key| key.parse().ok()).unwrap_or(self.0.keyring.load().first());
        if !keyring.fingerprints().contains(&last) {
            return Err(StoreError::WrongKey { expected: Some(last), have: keyring.fingerprints() });
        }
        self.set_key(found.as_deref(), &keyring).await?;
        self.0.keyring.store(keyring.clone());
        self.each(|held| {
            let (_, sealed) = held.open(&keyring);
            // What changed meanwhile is still to be looked at.
            let mut known = locked(&self.0.known);
            let known = known.get_mut(&held.user).filter(|known| known.digest == digest(&held.json));
            if let Some(known) = known {
                known.sealed = sealed;
            }
        })
        .await
    }

    pub(in crate::store) async fn reseal(&self) -> Result<Reseal, StoreError> {
        let ring = self.0.keyring.load_full();
        let mut done = Reseal::default();
        let mut after = Some(String::new());
        while let Some(last) = after {
            let (rows, next) = self.page(&last).await?;
            for held in rows {
                self.reseal_row(held, &ring, &mut done).await?;
            }
            after = next;
        }
        self.reseal_waiting(&ring).await?;
        Ok(done)
    }

    async fn reseal_row(&self, held: StoredRow, ring: &Keyring, done: &mut Reseal) -> Result<(), StoreError> {
        let mut next = Some(held);
        // Again where it was changed meanwhile.
        while let Some(held) = next {
            let (Ok(record), (Ok(grant), _)) = (held.record(), held.open(ring)) else {
                done.unreadable += 1;
                break;
            };
            if record.key_index(ring) == Some(0) {
                break;
            }
            if self.reseal_one(&held, &grant, ring).await? {
                done.resealed += 1;
                break;
            }
            next = self.row(&held.user).await?.0;
        }
        Ok(())
    }

    async fn reseal_one(&self, held: &StoredRow, grant: &Grant, ring: &Keyring) -> Result<bool, StoreError> {
        const RESEAL: &str = "UPDATE adsidecar_grants SET record = $2, changed_at = clock_timestamp() \
                              WHERE user_id = $1 AND record = $3 RETURNING generation";
        let (name, json) = (held.user.as_str(), json(grant, &held.user, ring));
        let parameters: &Parameters<'_> = &[(&name, Type::TEXT), (&json, Type::TEXT), (&held.json, Type::TEXT)];
        let done = !self.ask(RESEAL, parameters, Again::Yes).await?.is_empty();
        if done {
            self.learn(&held.user, &json, held.generation, Sealed::By(ring.first()));
        }
        Ok(done)
    }
}
