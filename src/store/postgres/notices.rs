//! Claims on notifications, as notes: `claimed <until>` or `done <since>`, in seconds of the database's clock.

use tokio_postgres::types::Type;

use super::connection::OnDisconnect;
use super::{Postgres, column};
use crate::store::StoreError;
use crate::store::notices::{KEPT, Notice};

/// How long a claim holds, in seconds: a delivery takes 10 at most.
const CLAIM_SECONDS: i64 = 60;

impl Postgres {
    /// See [`TokenStore::claim_notice`](crate::store::TokenStore::claim_notice).
    pub(in crate::store) async fn claim_notice(&self, id: &str) -> Result<Notice, StoreError> {
        // One statement, so that only one of several processes gets a row.
        const CLAIM: &str = "INSERT INTO adsidecar_notes AS n (name, value) \
                             VALUES ($1, 'claimed ' || (extract(epoch FROM clock_timestamp())::bigint + $2)) \
                             ON CONFLICT (name) DO UPDATE SET value = excluded.value \
                             WHERE n.value LIKE 'claimed %' AND split_part(n.value, ' ', 2)::bigint \
                             < extract(epoch FROM clock_timestamp())::bigint RETURNING value";
        let name = name(id);
        let parameters: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] =
            &[(&name, Type::TEXT), (&CLAIM_SECONDS, Type::INT8)];
        if !self.query(CLAIM, parameters, OnDisconnect::Resend).await?.is_empty() {
            return Ok(Notice::Mine);
        }
        let value = self.note(&name).await?;
        Ok(if value.is_some_and(|value| value.starts_with("done ")) { Notice::Done } else { Notice::Theirs })
    }

    /// See [`TokenStore::release_notice`](crate::store::TokenStore::release_notice).
    pub(in crate::store) async fn release_notice(&self, id: &str) -> Result<(), StoreError> {
        const RELEASE: &str = "DELETE FROM adsidecar_notes WHERE name = $1 AND value LIKE 'claimed %' RETURNING name";
        self.query(RELEASE, &[(&name(id), Type::TEXT)], OnDisconnect::Resend).await.map(drop)
    }

    /// See [`TokenStore::notice_done`](crate::store::TokenStore::notice_done).
    pub(in crate::store) async fn notice_done(&self, id: &str) -> Result<(), StoreError> {
        const NOW: &str = "SELECT 'done ' || extract(epoch FROM clock_timestamp())::bigint";
        const FORGET: &str = "DELETE FROM adsidecar_notes WHERE name LIKE 'notice:%' AND value LIKE 'done %' \
                              AND split_part(value, ' ', 2)::bigint \
                              < extract(epoch FROM clock_timestamp())::bigint - $1 RETURNING name";
        let rows = self.query(NOW, &[], OnDisconnect::Resend).await?;
        let value: String = rows.first().map(|row| column(row, 0)).transpose()?.unwrap_or_default();
        self.set_note(&name(id), &value).await?;
        self.query(FORGET, &[(&KEPT.as_secs(), Type::INT8)], OnDisconnect::Resend).await.map(drop)
    }
}

fn name(id: &str) -> String {
    format!("notice:{id}")
}
