//! What each statement costs: processor time of the server, and bytes on the connection. Measured on a temporary
//! PostgreSQL with a full table, through the product's own store and a relay that counts bytes.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use adsidecar::auth::tokens::brake::PROBE;
use adsidecar::domain::account::UserId;
use adsidecar::domain::grant::{Access, AccessToken, Grant, RefreshToken, Version};
use adsidecar::store::keyring::Keyring;
use adsidecar::store::{Changes, ConnectionUrl, FailedRefresh, Postgres, Settings, StoreError, TokenStore};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::postgres_server::{Cluster, PASSWORD, Sql};

/// What statements cost, as `--calibrate` wrote it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Calibration {
    /// The day of the measurement, and where it was made.
    pub measured: String,
    pub machine: String,
    /// Rows in the table.
    pub rows: usize,
    pub statements: BTreeMap<String, Cost>,
}

/// The cost of a statement: a part that each has, and one for each row that it returns or writes beyond that.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Microseconds of the server's processor time.
    pub microseconds: f64,
    pub microseconds_per_row: f64,
    /// Bytes to the server and back.
    pub sent: f64,
    pub received: f64,
    pub received_per_row: f64,
}

/// Where the last measurement is written down.
pub const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/fleet_calibration.json");

impl Calibration {
    /// The last measurement.
    pub fn stored() -> Self {
        let text = fs::read_to_string(FIXTURE).expect("`--calibrate` wrote it");
        serde_json::from_str(&text).expect("`--calibrate` wrote it")
    }
}

type Failure = Box<dyn Error + Send + Sync>;

/// Counts of what the relay has passed on, to the server and back.
#[derive(Default)]
struct Bytes {
    sent: AtomicU64,
    received: AtomicU64,
}

/// Relays connections to `port`, and counts. Returns its own port.
async fn relay(port: u16) -> std::io::Result<(u16, Arc<Bytes>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (own, bytes) = (listener.local_addr()?.port(), Arc::new(Bytes::default()));
    let counted = bytes.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let ((from, to), (back, answers)) = (client.into_split(), server.into_split());
            let (there, here) = (counted.clone(), counted.clone());
            tokio::spawn(async move { pass(from, answers, &there.sent).await });
            tokio::spawn(async move { pass(back, to, &here.received).await });
        }
    });
    Ok((own, bytes))
}

async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, count: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(size @ 1..) = from.read(&mut buffer).await {
        count.fetch_add(size as u64, Relaxed);
        if to.write_all(&buffer[..size]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// The processor time of a process in nanoseconds, as the scheduler counts it; 0 if it has ended.
fn processor_time(pid: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    text.split_whitespace().next().and_then(|time| time.parse().ok()).unwrap_or_default()
}

/// The processor time of all children of a process that have ended, in nanoseconds.
fn children_time(pid: &str) -> Result<u64, Failure> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|ticks| ticks.parse::<u64>().ok()).unwrap_or_default();
    Ok((ticks(13) + ticks(14)) * 10_000_000)
}

struct Meter {
    sql: Sql,
    bytes: Arc<Bytes>,
}

/// Microseconds, bytes sent and bytes received of each of a number of statements.
struct Sample([f64; 3]);

impl Meter {
    /// The processor time of the connections of the store.
    async fn spent(&self) -> u64 {
        let pids = "SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE application_name = 'adsidecar'";
        let pids = self.sql.one(pids).await.unwrap_or_default();
        pids.split_whitespace().map(processor_time).sum()
    }

    /// The cost of each of `count` runs of `statement`.
    async fn each(
        &self,
        count: usize,
        mut statement: impl AsyncFnMut(usize) -> Result<(), Failure>,
    ) -> Result<Sample, Failure> {
        let count_of = || [self.bytes.sent.load(Relaxed), self.bytes.received.load(Relaxed)];
        let (time, bytes) = (self.spent().await, count_of());
        for number in 0..count {
            statement(number).await?;
        }
        let (later, after) = (self.spent().await, count_of());
        let per = |from: u64, to: u64| to.saturating_sub(from) as f64 / count as f64;
        Ok(Sample([per(time, later) / 1e3, per(bytes[0], after[0]), per(bytes[1], after[1])]))
    }
}

impl Sample {
    /// A statement whose cost does not depend on rows.
    fn flat(&self) -> Cost {
        let [microseconds, sent, received] = self.0;
        Cost { microseconds, sent, received, ..Cost::default() }
    }

    /// A statement whose cost grows from this, with `few` rows, to `with_many`, with `many`.
    fn growing(&self, few: f64, with_many: &Self, many: f64) -> Cost {
        let slope = |at: usize| ((with_many.0[at] - self.0[at]) / (many - few)).max(0.0);
        let base = |at: usize| self.0[at] - few * slope(at);
        Cost {
            microseconds: base(0),
            microseconds_per_row: slope(0),
            sent: self.0[1],
            received: base(2),
            received_per_row: slope(2),
        }
    }
}

fn user(number: usize) -> UserId {
    format!("user-{number}").parse().expect("a user id")
}

/// A grant with tokens of the length that Login with Amazon issues.
fn grant(generation: u64) -> Grant {
    let now = Timestamp::now();
    let text = |kind: &str| format!("{kind}|{}", "x".repeat(360));
    Grant {
        refresh_token: RefreshToken::new(text("Atzr")).expect("a token"),
        previous: None,
        access: Some(Access {
            token: AccessToken::new(text("Atza")).expect("a token"),
            expires_at: now + SignedDuration::from_hours(1),
        }),
        updated_at: now,
        consented_at: Some(now),
        used_at: Some(now),
        scope: Some("advertising::campaign_management".into()),
        generation,
    }
}

const FILL: &str = "INSERT INTO adsidecar_grants (user_id, record, generation, epoch, changed_at, described, \
                    sealed_with, expires_at, updated_at, consented_at, used_at, due_at) \
                    SELECT 'user-' || n, t.record, 1, 1, now(), t.described, t.sealed_with, t.expires_at, \
                    t.updated_at, t.consented_at, t.used_at, now() + make_interval(secs => 2700.0 * n / ROWS) \
                    FROM generate_series(0, ROWS - 1) AS n, adsidecar_grants AS t WHERE t.user_id = 'template'";

/// Measures what statements cost beside `rows` rows.
pub async fn measure(rows: usize, machine: String) -> Result<Calibration, Failure> {
    let cluster = Cluster::start_with(&["shared_buffers=1GB", "max_wal_size=8GB", "ssl=off"]);
    let (port, bytes) = relay(cluster.port).await?;
    let url = format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/postgres?sslmode=disable");
    let settings = Settings { path: "unused".into(), postgres: Some(ConnectionUrl::parse(&url)?) };
    let keyring = Arc::new(Keyring::new(&[Keyring::generate_key()])?);
    let open = || TokenStore::open_to_serve(&settings, keyring.clone());
    let (store, _) = open().await?;
    store.save(&"template".parse()?, &grant(1), None).await?;
    let sql = cluster.connect().await;
    sql.run(&FILL.replace("ROWS", &rows.to_string())).await;
    sql.run("DELETE FROM adsidecar_grants WHERE user_id = 'template'").await;
    sql.run("VACUUM ANALYZE adsidecar_grants").await;
    sql.run("CHECKPOINT").await;
    let meter = Meter { sql, bytes };
    let shared = store.shared().ok_or("the store is PostgreSQL")?;
    let statements = measure_all(&meter, shared, rows).await?;
    let mut statements: BTreeMap<_, _> = statements.into_iter().map(|(name, cost)| (name.to_owned(), cost)).collect();
    statements.insert("start".into(), start(&meter, async || Ok(open().await?.0)).await?);
    let measured = Timestamp::now().strftime("%Y-%m-%d").to_string();
    Ok(Calibration { measured, machine, rows, statements })
}

async fn measure_all(meter: &Meter, store: &Postgres, rows: usize) -> Result<Vec<(&'static str, Cost)>, Failure> {
    let mut costs = Vec::new();
    // Each part of the measurement has users of its own.
    let range = |part: usize, number: usize| user((part * 5000 + number) % rows);
    store.poll().await?;
    store.lookup_all(&[user(0)]).await?;

    let idle = meter.each(2000, async |_| Ok(store.poll().await.map(drop)?)).await?;
    let changes = 1000;
    let (first, last) = (rows - changes, rows - 1);
    let change = format!(
        "UPDATE adsidecar_grants SET generation = 2 \
         WHERE user_id IN (SELECT 'user-' || n FROM generate_series({first}, {last}) AS n)"
    );
    meter.sql.run(&change).await;
    let busy = meter
        .each(40, async |number| match store.poll().await?.changes {
            Changes::Rows(found) if found.len() == changes => Ok(()),
            other => Err(format!("poll {number} found {other:?}").into()),
        })
        .await?;
    costs.push(("poll", idle.growing(1.0, &busy, changes as f64)));

    // Everything is due in an hour, and nothing was an hour ago.
    let (before, after) =
        (Timestamp::now() - SignedDuration::from_hours(1), Timestamp::now() + SignedDuration::from_hours(1));
    let claim = async |now, limit| {
        let claimed = store.claim_due(now, limit).await?.len();
        if claimed == limit || now < after { Ok(()) } else { Err(Failure::from(format!("claimed {claimed}"))) }
    };
    costs.push(("claim in vain", meter.each(2000, async |_| claim(before, 8).await).await?.flat()));
    let one = meter.each(1000, async |_| claim(after, 1).await).await?;
    let eight = meter.each(500, async |_| claim(after, 8).await).await?;
    costs.push(("claim", one.growing(1.0, &eight, 8.0)));

    // The claims above were for the users with the lowest numbers.
    let lease =
        meter.each(1000, async |number| Ok(store.acquire_lease(&range(4, number), 1).await.map(|_| ())?)).await?;
    costs.push(("lease", lease.flat()));
    let failed =
        FailedRefresh { refused: false, code: "unreachable".into(), attempts: 3, retry_in: Duration::from_secs(60) };
    let release = meter
        .each(1000, async |number| {
            Ok(store.release_lease(&range(4, number), 1, Some(&failed), Some(after), false).await.map(drop)?)
        })
        .await?;
    costs.push(("release", release.flat()));
    let (seen, next) = (Version { epoch: 1, generation: 1 }, grant(2));
    let write = meter
        .each(2000, async |number| Ok(store.put_refreshed(&range(5, number), &next, seen, false).await.map(|_| ())?))
        .await?;
    costs.push(("write", write.flat()));

    let look = meter.each(1000, async |number| Ok(store.lookup_all(&[range(6, number)]).await.map(drop)?)).await?;
    let many: Vec<_> = (0..500).map(|number| range(6, 7 * number)).collect();
    let look_many = meter.each(50, async |_| Ok(store.lookup_all(&many).await.map(drop)?)).await?;
    costs.push(("look", look.growing(1.0, &look_many, many.len() as f64)));

    costs.push(("note", meter.each(500, async |_| Ok(store.publish_and_follow_rotation().await?)).await?.flat()));
    let pods = 1000;
    meter
        .sql
        .run(&format!(
            "INSERT INTO adsidecar_notes SELECT 'pod:' || md5(n::text), \
             extract(epoch FROM clock_timestamp())::bigint || ' ' || repeat('x', 120) \
             FROM generate_series(2, {pods}) AS n"
        ))
        .await;
    let count = async |_| match store.count_pods().await? {
        counted if counted == pods => Ok(()),
        counted => Err(Failure::from(format!("counted {counted} processes"))),
    };
    costs.push(("count", meter.each(100, count).await?.flat()));
    store.set_brake("unreachable", Duration::from_secs(600)).await?;
    costs.push(("probe", meter.each(500, async |_| Ok(store.claim_probe(PROBE).await.map(drop)?)).await?.flat()));
    costs.push(("brake", meter.each(500, async |_| Ok(store.set_brake("unreachable", PROBE).await?)).await?.flat()));
    Ok(costs)
}

/// A start, with its connections and the first poll.
async fn start(meter: &Meter, open: impl AsyncFn() -> Result<TokenStore, StoreError>) -> Result<Cost, Failure> {
    const STARTS: usize = 100;
    const ENDED_BY: Duration = Duration::from_secs(60);
    let own = meter.sql.one("SELECT pg_backend_pid()").await.ok_or("no pid")?;
    let text = fs::read_to_string(format!("/proc/{own}/stat"))?;
    let postmaster =
        text.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)).ok_or("no parent")?.to_owned();
    let before = children_time(&postmaster)?;
    let sample = meter
        .each(STARTS, async |_| {
            let store = open().await?;
            let shared = store.shared().ok_or("the store is PostgreSQL")?;
            shared.poll().await?;
            Ok(store.close().await?)
        })
        .await?;
    // The server takes account of a connection once it has ended.
    let others = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'adsidecar'";
    let deadline = Instant::now() + ENDED_BY;
    while meter.sql.one(others).await.and_then(|count| count.parse::<u32>().ok()).unwrap_or_default() > 2 {
        if Instant::now() >= deadline {
            return Err(format!("the server still has more than two connections after {ENDED_BY:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let microseconds = (children_time(&postmaster)? - before) as f64 / 1e3 / STARTS as f64;
    Ok(Cost { microseconds, ..sample.flat() })
}
