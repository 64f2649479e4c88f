//! What others changed, found by comparing rows with what is known of them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::Again;
use super::{PAGE, Postgres, column, first, locked};
use crate::domain::account::UserId;
use crate::store::StoreError;

/// What changed is asked for with this overlap, in seconds: a row becomes visible a moment after the time that it
/// carries.
const OVERLAP: f64 = 30.0;
/// All rows are compared this often, and after each new connection: so what was changed past us is seen too.
const COMPARE_EVERY: Duration = Duration::from_secs(60);

/// How far changes are known.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Compared {
    /// The database's clock at the last look.
    at: f64,
    /// When all rows were compared, and over which connection.
    all: Option<(Instant, u64)>,
}

impl Postgres {
    /// Users whose row is another than the one that is known here.
    pub async fn changed_users(&self) -> Result<Vec<UserId>, StoreError> {
        const SINCE: &str = "SELECT extract(epoch FROM clock_timestamp())::float8, g.user_id, g.generation, \
                             sha256(convert_to(g.record, 'UTF8')) FROM (SELECT 1) AS one LEFT JOIN adsidecar_grants AS g \
                             ON g.changed_at > to_timestamp($1)";
        let before = *locked(&self.0.compared);
        let rows = self.ask(SINCE, &[(&(before.at - OVERLAP), Type::FLOAT8)], Again::Yes).await?;
        let mut changed = BTreeSet::new();
        for row in &rows {
            changed.extend(self.changed(row, 1)?.1);
        }
        let connects = self.0.line.connects();
        let fresh = |(at, over): &(Instant, u64)| at.elapsed() < COMPARE_EVERY && *over == connects;
        let all = match before.all.filter(fresh) {
            Some(all) => all,
            None => {
                changed.extend(self.compare_all().await?);
                (Instant::now(), connects)
            }
        };
        *locked(&self.0.compared) = Compared { at: first(&rows, 0)?, all: Some(all) };
        Ok(changed.into_iter().collect())
    }

    async fn compare_all(&self) -> Result<Vec<UserId>, StoreError> {
        const ALL: &str = "SELECT user_id, generation, sha256(convert_to(record, 'UTF8')) FROM adsidecar_grants \
                           WHERE record IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT $2";
        let (mut after, mut changed) = (String::new(), Vec::new());
        let mut gone: BTreeSet<UserId> = locked(&self.0.known).keys().cloned().collect();
        loop {
            let rows = self.ask(ALL, &[(&after, Type::TEXT), (&PAGE, Type::INT8)], Again::Yes).await?;
            for row in &rows {
                let (user, differs) = self.changed(row, 0)?;
                changed.extend(differs);
                user.map(|user| gone.remove(&user));
            }
            match rows.last() {
                Some(last) => after = column(last, 0)?,
                None => break,
            }
        }
        changed.extend(gone);
        Ok(changed)
    }

    /// The user of a row of user, generation and digest, and once more where it is not what is known.
    fn changed(&self, row: &Row, at: usize) -> Result<(Option<UserId>, Option<UserId>), StoreError> {
        let user = column::<Option<String>>(row, at)?.and_then(|name| name.parse::<UserId>().ok());
        let Some(user) = user else { return Ok((None, None)) };
        let (generation, digest): (i64, Option<Vec<u8>>) = (column(row, at + 1)?, column(row, at + 2)?);
        let known = locked(&self.0.known);
        let known = known.get(&user).map(|known| (known.generation, &known.digest));
        let differs = known != digest.as_ref().map(|digest| (generation, digest));
        Ok((Some(user.clone()), differs.then_some(user)))
    }
}
