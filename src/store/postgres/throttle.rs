//! What processes tell each other about Amazon's limits: one row per bucket, all buckets in one statement.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_postgres::types::Type;

use super::connection::{OnDisconnect, Parameters};
use super::{Postgres, column};
use crate::store::StoreError;

/// What a process says about one bucket. Times are relative, as each process has a clock of its own.
#[derive(Clone, Debug, Serialize)]
pub struct ThrottleReport {
    /// The name of the bucket.
    pub bucket: String,
    /// What it has learned, if others may not know it.
    #[serde(flatten)]
    pub learned: Option<SharedLimit>,
    /// The calls per second that it could send.
    pub want: f64,
    /// The calls per second that it sends.
    pub sent: f64,
    /// The most calls that it sent within a second, lately.
    pub peak: f64,
}

/// What is known about one limit. See `Learned` in `src/throttle/law.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SharedLimit {
    /// How often the rate was halved.
    pub epoch: u32,
    /// Calls per second.
    pub ceiling: f64,
    /// Seconds.
    pub cubic: f64,
    /// When the pause ends, in seconds from now; negative if it has ended.
    pub resumes_in: f64,
    /// Seconds since the refusal that halved the rate last.
    pub refused_ago: f64,
    /// Refusals in a row.
    pub streak: u32,
}

/// A bucket's row.
#[derive(Clone, Debug)]
pub struct ThrottleRow {
    /// The name of the bucket.
    pub bucket: String,
    /// What is known; `None` if no process has said anything yet.
    pub limit: Option<SharedLimit>,
    /// What each other process could send, does send, and sent within a second at most, in calls per second, if it has
    /// said so lately.
    pub others: Vec<[f64; 3]>,
}

/// After this many seconds without a word a process has no share any more.
const LIVE_SECONDS: f64 = 5.0;
/// Rows that nobody has changed for this many seconds are not read: each limit may have changed since.
const RECENT_SECONDS: f64 = 900.0;

impl Postgres {
    /// Says what this process knows about the buckets of `client`, and returns what all know. It says nothing about the
    /// health of the store: no request depends on it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Postgres`] if the database cannot be written.
    // The function is long because it is one statement with its parameters, and one row of its answer read.
    pub async fn share_throttle(
        &self,
        client: &str,
        reports: &[ThrottleReport],
    ) -> Result<Vec<ThrottleRow>, StoreError> {
        // Ordered, so that two processes lock rows in the same order. A newer epoch replaces what is known. In the same
        // epoch several processes saw one overload: the highest ceiling counts, since what one sent is less than what
        // all sent. The pause ends when the last one does.
        const SHARE: &str = "WITH now AS (SELECT extract(epoch FROM clock_timestamp())::float8 AS at), \
            mine AS (SELECT * FROM jsonb_to_recordset($2::text::jsonb) AS m (bucket text, epoch bigint, \
            ceiling float8, cubic float8, resumes_in float8, refused_ago float8, streak int, want float8, \
            sent float8, peak float8)), \
            put AS (INSERT INTO adsidecar_throttle AS t (client, bucket, epoch, ceiling, cubic, resumed, refused, \
            streak, pods, changed) \
            SELECT $1, m.bucket, coalesce(m.epoch, 0), coalesce(m.ceiling, 0), coalesce(m.cubic, 0), \
            coalesce(now.at + m.resumes_in, 0), coalesce(now.at - m.refused_ago, 0), coalesce(m.streak, 0), \
            jsonb_build_object($3::text, jsonb_build_array(m.want, m.sent, m.peak, now.at)), now.at \
            FROM mine AS m, now ORDER BY m.bucket \
            ON CONFLICT (client, bucket) DO UPDATE SET epoch = greatest(t.epoch, excluded.epoch), \
            ceiling = CASE WHEN excluded.epoch > t.epoch THEN excluded.ceiling \
            WHEN excluded.epoch = t.epoch THEN greatest(t.ceiling, excluded.ceiling) ELSE t.ceiling END, \
            cubic = CASE WHEN excluded.epoch > t.epoch THEN excluded.cubic \
            WHEN excluded.epoch = t.epoch THEN greatest(t.cubic, excluded.cubic) ELSE t.cubic END, \
            refused = CASE WHEN excluded.epoch > t.epoch THEN excluded.refused ELSE t.refused END, \
            streak = CASE WHEN excluded.epoch > 0 THEN excluded.streak ELSE t.streak END, \
            resumed = greatest(t.resumed, excluded.resumed), changed = excluded.changed, \
            pods = (SELECT coalesce(jsonb_object_agg(pod.key, pod.value), '{}') FROM jsonb_each(t.pods) AS pod \
            WHERE (pod.value->>3)::float8 > excluded.changed - $4) || excluded.pods \
            RETURNING t.*), \
            known AS (SELECT * FROM put UNION ALL SELECT t.* FROM adsidecar_throttle AS t, now WHERE t.client = $1 \
            AND t.changed > now.at - $5 AND t.bucket NOT IN (SELECT bucket FROM mine)) \
            SELECT k.bucket, k.epoch, k.ceiling, k.cubic, k.resumed - now.at, now.at - k.refused, k.streak, \
            k.pods::text, now.at FROM known AS k, now";
        let mine = serde_json::to_string(reports).expect("numbers and texts are JSON");
        let owner = &self.0.owner;
        let parameters: &Parameters<'_> = &[
            (&client, Type::TEXT),
            (&mine, Type::TEXT),
            (owner, Type::TEXT),
            (&LIVE_SECONDS, Type::FLOAT8),
            (&RECENT_SECONDS, Type::FLOAT8),
        ];
        let rows = Box::pin(self.0.connection.query(SHARE, parameters, OnDisconnect::Resend)).await?;
        let mut known = Vec::with_capacity(rows.len());
        for row in &rows {
            let (epoch, streak): (i64, i32) = (column(row, 1)?, column(row, 6)?);
            let limit = SharedLimit {
                epoch: u32::try_from(epoch).unwrap_or(u32::MAX),
                ceiling: column(row, 2)?,
                cubic: column(row, 3)?,
                resumes_in: column(row, 4)?,
                refused_ago: column(row, 5)?,
                streak: streak.unsigned_abs(),
            };
            let (pods, now): (String, f64) = (column(row, 7)?, column(row, 8)?);
            let pods: BTreeMap<String, [f64; 4]> = serde_json::from_str(&pods).unwrap_or_default();
            let lives = |(name, [.., at]): &(&String, &[f64; 4])| *name != owner && now - at < LIVE_SECONDS;
            let others = pods.iter().filter(lives).map(|(_, [want, sent, peak, _])| [*want, *sent, *peak]).collect();
            known.push(ThrottleRow { bucket: column(row, 0)?, limit: Some(limit).filter(|_| epoch > 0), others });
        }
        Ok(known)
    }
}
