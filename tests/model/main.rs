//! Logout against refresh against a new login, in every order that a scheduler finds.
//!
//! The tested code is the product's own: `src/auth/tokens/user_state.rs` is compiled here a second time, with shuttle's
//! primitives instead of tokio's, and uses the product's `GrantState` and `LiveGrant`. Around it are minimal models of
//! the disk and of the three operations on a grant, in the token manager's order: lock, check, write to disk, publish.
//! `SCHEDULES` is the number of schedules (few by default), `SEED` the seed of the random ones. `KNOWN_BAD=1` skips the
//! generation check, and the test must then fail.

#![allow(dead_code, unreachable_pub, reason = "the model does not use every method of UserState")]

// The paths under which `user_state.rs` imports them.
use adsidecar::domain::{self, account, clock_reading, grant};

/// As in the product; `refresh_blind` is the deliberate error.
macro_rules! fail_point {
    ("refresh_blind", $wrong:expr) => {
        if std::env::var_os("KNOWN_BAD").is_some() {
            return ($wrong)(None::<String>);
        }
    };
    ($($point:tt)*) => {};
}

#[path = "../../src/auth/tokens/user_state.rs"]
mod user_state;
mod shared_store;
mod sync;

use std::sync::Arc;
use std::time::Duration;

use account::UserId;
use clock_reading::ClockReading;
use grant::{Access, AccessToken, Grant, GrantState, LiveGrant, Outcome, RefreshToken};
use jiff::{SignedDuration, Timestamp};
use shuttle::future::block_on;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::Mutex;
use shuttle::{Config, FailurePersistence, Runner, thread};
use user_state::UserState;

/// The user's record on disk: the refresh token and its generation. Like the store, it accepts a change only if the
/// stored generation is the expected one.
#[derive(Default)]
struct Disk(Mutex<Option<(String, u64)>>);

impl Disk {
    fn save(&self, grant: &Grant, expected: Option<u64>) -> bool {
        let mut stored = self.0.lock().unwrap();
        if expected.is_some() && expected != stored.as_ref().map(|(_, generation)| *generation) {
            return false;
        }
        *stored = Some((name(grant), grant.generation));
        true
    }

    fn erase(&self) {
        *self.0.lock().unwrap() = None;
    }

    fn holds(&self) -> Option<String> {
        self.0.lock().unwrap().as_ref().map(|(name, _)| name.clone())
    }
}

struct World {
    entry: UserState,
    disk: Disk,
    /// The user's last operation, which must determine the final state: logged out, or logged in with this grant.
    wanted: Mutex<Option<String>>,
}

fn now() -> ClockReading {
    ClockReading {
        wall: Timestamp::from_second(1_790_000_000).unwrap(),
        uptime: SignedDuration::from_secs(5000),
        amazon: None,
    }
}

fn grant(refresh: &str) -> Grant {
    Grant {
        refresh_token: RefreshToken::new(refresh.to_owned()).unwrap(),
        previous: None,
        access: Some(Access {
            token: AccessToken::new(format!("{refresh}-access")).unwrap(),
            expires_at: now().wall + SignedDuration::from_secs(3600),
        }),
        updated_at: now().wall,
        consented_at: Some(now().wall),
        used_at: None,
        scope: None,
        generation: 1,
    }
}

fn name(grant: &Grant) -> String {
    grant.refresh_token.secret().expose().to_owned()
}

/// `RefreshTask::refresh`, with an LWA that rotates: if a response is dropped, its grant is invalid and must not be
/// used.
async fn refresh(world: &World) {
    if !world.entry.try_begin_refresh() {
        return;
    }
    let base = world.entry.held().grant().cloned();
    if let Some(base) = base {
        // The token call happens here and takes any time.
        thread::yield_now();
        let write = world.entry.write().await;
        if let Some(held) = write.unchanged_since(base.generation) {
            let mut refreshed = grant(&format!("{}'", name(&base)));
            refreshed.generation = write.next_generation();
            if !world.disk.save(&refreshed, Some(base.generation)) {
                // As `keep_storing`: a failed write is repeated over the current record.
                world.disk.save(&refreshed, None);
            }
            let outcome = Outcome::Refreshed(Arc::new(LiveGrant::issued(refreshed, now())));
            write.publish(held.next(outcome, now(), 0.5));
        }
    }
    world.entry.end_refresh();
}

/// `TokenManager::forget_now`.
async fn log_out(world: &World) {
    let write = world.entry.write().await;
    world.disk.erase();
    write.publish(GrantState::Nothing);
    *world.wanted.lock().unwrap() = None;
    world.entry.wake();
}

/// `TokenManager::adopt_now`.
async fn log_in(world: &World, refresh: &str) {
    let write = world.entry.write().await;
    let mut grant = grant(refresh);
    grant.generation = write.next_generation();
    world.disk.save(&grant, None);
    write.publish(GrantState::Fresh(Arc::new(LiveGrant::loaded(grant, now()))));
    *world.wanted.lock().unwrap() = Some(refresh.to_owned());
    world.entry.wake();
}

/// One user with a grant, and two refreshes, a logout and a login, all concurrent.
fn race() {
    let user: UserId = "anna".parse().unwrap();
    let entry = UserState::new(user, Some(grant("old")), now(), Duration::ZERO);
    let disk = Disk(Mutex::new(Some(("old".to_owned(), 1))));
    let world = Arc::new(World { entry, disk, wanted: Mutex::new(Some("old".to_owned())) });
    let run = |work: fn(&World)| {
        let world = world.clone();
        thread::spawn(move || work(&world))
    };
    let workers = [
        run(|world| block_on(refresh(world))),
        run(|world| block_on(refresh(world))),
        run(|world| block_on(log_out(world))),
        run(|world| block_on(log_in(world, "new"))),
    ];
    for worker in workers {
        worker.join().unwrap();
    }
    // And once more afterwards, as the background would.
    block_on(refresh(&world));
    let wanted = world.wanted.lock().unwrap().clone();
    let held = world.entry.held().grant().map(|grant| name(grant));
    let rooted = |name: &Option<String>| name.as_ref().map(|name| name.trim_end_matches('\'').to_owned());
    assert_eq!(rooted(&held), wanted, "the used grant is that of the user's last operation");
    assert_eq!(world.disk.holds(), held, "and a restart finds the used grant");
}

fn run(scheduler: impl Scheduler + 'static) {
    let mut config = Config::new();
    config.failure_persistence = FailurePersistence::Print;
    Runner::new(scheduler, config).run(race);
}

/// Half of the schedules are random, half have few but unfavorable switches (PCT); each has its own seed.
#[test]
fn a_logout_and_a_login_beat_a_refresh_in_every_order() {
    let schedules = std::env::var("SCHEDULES").map_or(2_000, |count| count.parse().unwrap());
    let seed = std::env::var("SEED").map_or(1, |seed| seed.parse().unwrap());
    run(RandomScheduler::new_from_seed(seed, schedules / 2));
    run(PctScheduler::new_from_seed(seed, 3, schedules / 2));
}
