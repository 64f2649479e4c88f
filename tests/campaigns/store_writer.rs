//! Writes grants into a store and prints attempted and acknowledged writes on standard output. The campaigns kill it,
//! cut its power, and make its disk fail.
//!
//! `store-writer PATH check` opens the store, prints its contents, saves one grant and closes it.
//! `store-writer PATH write SEED FIRST COUNT` prints its contents, then saves and erases grants numbered from
//! FIRST on, so that no token is ever written twice; COUNT times, or until it is killed if 0. With the additional
//! argument
//! `early` it acknowledges before it writes: the known-bad variant, which a campaign has to notice.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use adsidecar::domain::account::UserId;
use adsidecar::domain::grant::{Access, AccessToken, Grant, RefreshToken};
use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use adsidecar::store::{Settings, StoreError, TokenStore};
use jiff::{SignedDuration, Timestamp};

const KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";
const USERS: u64 = 8;
/// A fault applies once, so a failed write succeeds when retried. The sidecar retries without limit.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

fn main() {
    // Without an I/O driver, whose wakeups write to a file: a campaign would mistake such a write for the store's.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(run());
}

async fn run() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse::<u64>().expect("a number");
    match words[..] {
        [path, "check"] => check(open(path)).await,
        [path, "write", seed, first, count] => {
            write(&open(path), number(seed), number(first), number(count), false).await;
        }
        [path, "write", seed, first, count, "early"] => {
            write(&open(path), number(seed), number(first), number(count), true).await;
        }
        _ => panic!("store-writer PATH check | write SEED FIRST COUNT [early]"),
    }
}

/// Opens the store and prints its contents: each user with the refresh token, `null` if the record cannot be opened.
fn open(path: &str) -> TokenStore {
    let keyring = Arc::new(Keyring::new(&[Secret::new(KEY)]).expect("a key"));
    match TokenStore::open(&Settings { path: path.into(), postgres: None }, keyring) {
        Ok((store, opened)) => {
            let token = |grant: &Grant| grant.refresh_token.secret().expose().to_owned();
            let users: serde_json::Map<_, _> = opened
                .users
                .iter()
                .map(|(user, grant)| (user.to_string(), grant.as_ref().ok().map(token).into()))
                .collect();
            let recovered = opened.recovered.is_some();
            let unusable = opened.unreadable_mirror_files.len();
            let degraded = opened.degraded.is_some();
            say(&format!(
                "open {}",
                serde_json::json!({
                    "users": users, "recovered": recovered, "unusable": unusable, "degraded": degraded
                })
            ));
            store
        }
        Err(error) => {
            say(&format!("failed {error}"));
            std::process::exit(1);
        }
    }
}

async fn check(store: TokenStore) {
    let probe = "probe".parse().expect("a user id");
    if let Err(error) = store.save(&probe, &grant(&probe, 1), None).await {
        say(&format!("failed {error}"));
        std::process::exit(1);
    }
    store.close().await.expect("the store closes");
    say("closed");
}

async fn write(store: &TokenStore, seed: u64, first: u64, count: u64, early: bool) {
    let mut dice = seed | 1;
    for number in (first..).take(if count == 0 { usize::MAX } else { usize::try_from(count).expect("a count") }) {
        // xorshift64 (Marsaglia): good enough to choose users by, and repeatable.
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        let user: UserId = format!("user-{}", dice % USERS).parse().expect("a user id");
        let erases = (dice >> 32).is_multiple_of(10);
        let what = if erases { "erase".to_owned() } else { number.to_string() };
        say(&format!("try {user} {what}"));
        if early {
            say(&format!("ack {user} {what}"));
        }
        let mut tries = 0;
        while let Err(error) = operation(store, &user, number, erases).await {
            say(&format!("err {user} {what} {error}"));
            tries += 1;
            if tries == TRIES {
                std::process::exit(3);
            }
            tokio::time::sleep(PAUSE).await;
        }
        if !early {
            say(&format!("ack {user} {what}"));
        }
    }
    let closed = store.close().await;
    say(if closed.is_ok() { "closed" } else { "not closed" });
}

async fn operation(store: &TokenStore, user: &UserId, number: u64, erases: bool) -> Result<(), StoreError> {
    if erases {
        store.erase(user).await.map(drop)
    } else {
        store.save(user, &grant(user, number), None).await.map(drop)
    }
}

fn grant(user: &UserId, number: u64) -> Grant {
    let now = Timestamp::now();
    Grant {
        refresh_token: RefreshToken::new(format!("Atzr|{user}-{number}")).expect("a token"),
        previous: None,
        // The length of Amazon's tokens.
        access: Some(Access {
            token: AccessToken::new(format!("Atza|{}{number}", "x".repeat(350))).expect("a token"),
            expires_at: now + SignedDuration::from_hours(1),
        }),
        updated_at: now,
        consented_at: Some(now),
        used_at: None,
        scope: None,
        generation: number,
    }
}

/// One line, in one system call of a kind that the store never makes: a campaign gives faults to those that it makes.
fn say(line: &str) {
    let out = std::io::stdout().as_fd().try_clone_to_owned().expect("standard output");
    let _ = File::from(out).write_vectored(&[IoSlice::new(line.as_bytes()), IoSlice::new(b"\n")]);
}
