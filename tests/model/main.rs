//! Logout against refresh against a new login, in every order that a scheduler finds.
//!
//! The code that decides is the product's own: `src/keeper/user_state.rs` is compiled here a second time, over shuttle's
//! primitives in place of tokio's, and with it `GrantState` and `LiveGrant`. Around it stand, in as few lines as possible, the disk and
//! the three who change a grant, in the order in which the keeper does it: take the turn, look, write the disk, publish.
//! `SCHEDULES` says how many orders are tried (a short run without it), `SEED` with which the random ones begin;
//! `KNOWN_BAD=1` leaves the look at the generation out, which must be found.

#![allow(dead_code, unreachable_pub, reason = "the entry has more ways than the model takes")]

// The names that the entry knows them by.
use adsidecar::domain::{self, account, clock_reading, grant};

/// As in the product, but for the one point that makes it wrong.
macro_rules! fail_point {
    ("renewal_blind", $wrong:expr) => {
        if std::env::var_os("KNOWN_BAD").is_some() {
            return ($wrong)(None::<String>);
        }
    };
    ($($point:tt)*) => {};
}

#[path = "../../src/auth/tokens/user_state.rs"]
mod user_state;
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

/// What the disk holds of the user: the refresh token and its generation. As the store, it takes a change for an expected
/// generation only where that one is stored.
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
    /// What Amazon's user did last, which is what must be true in the end: logged out, or logged in with this grant.
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

/// `Flight::renew`, with an LWA that rotates: whoever's answer is dropped has a dead grant, so nothing may use it.
async fn renew(world: &World) {
    if !world.entry.try_begin_refresh() {
        return;
    }
    let base = world.entry.held().grant().cloned();
    if let Some(base) = base {
        // LWA is asked here, for as long as it likes.
        thread::yield_now();
        let write = world.entry.write().await;
        if let Some(held) = write.of(base.generation) {
            let mut renewed = grant(&format!("{}'", name(&base)));
            renewed.generation = write.next_generation();
            if !world.disk.save(&renewed, Some(base.generation)) {
                // As `keep_storing`: what the disk did not take is written over whatever is there.
                world.disk.save(&renewed, None);
            }
            let outcome = Outcome::Refreshed(Arc::new(LiveGrant::issued(renewed, now())));
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

/// One user with a grant, two renewals, a logout and a login, all at once.
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
        run(|world| block_on(renew(world))),
        run(|world| block_on(renew(world))),
        run(|world| block_on(log_out(world))),
        run(|world| block_on(log_in(world, "new"))),
    ];
    for worker in workers {
        worker.join().unwrap();
    }
    // And once more when all is quiet, as the background would.
    block_on(renew(&world));
    let wanted = world.wanted.lock().unwrap().clone();
    let held = world.entry.held().grant().map(|grant| name(grant));
    let rooted = |name: &Option<String>| name.as_ref().map(|name| name.trim_end_matches('\'').to_owned());
    assert_eq!(rooted(&held), wanted, "what is used is what the person wanted last");
    assert_eq!(world.disk.holds(), held, "and what is used is what a restart finds");
}

fn run(scheduler: impl Scheduler + 'static) {
    let mut config = Config::new();
    config.failure_persistence = FailurePersistence::Print;
    Runner::new(scheduler, config).run(race);
}

/// Half of the schedules at random, half with few but ill-placed switches (PCT), each its own seed.
#[test]
fn a_logout_and_a_login_beat_a_refresh_in_every_order() {
    let schedules = std::env::var("SCHEDULES").map_or(2_000, |count| count.parse().unwrap());
    let seed = std::env::var("SEED").map_or(1, |seed| seed.parse().unwrap());
    run(RandomScheduler::new_from_seed(seed, schedules / 2));
    run(PctScheduler::new_from_seed(seed, 3, schedules / 2));
}
