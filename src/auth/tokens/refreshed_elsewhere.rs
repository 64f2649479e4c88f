//! Takes note of refreshes that other processes made, for the users that this process holds.
//!
//! No poll tells of a refresh that was due: nearly all changes are such refreshes, and every process would read all of
//! them. But each process knows when a refresh of its own users is due. Some time later it reads their rows, again and
//! again at growing distances (`pace`), until their tokens end so soon that a request reads the row itself; and longer
//! where the last refresh failed, so that no process goes on to report what others have mended. So a database that goes
//! away leaves each process with tokens that live for about `refresh.ahead`.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::sleep;

use super::TokenManager;
use super::follower::Follower;
use super::pace::{look_pause, next_look};
use super::refresh_task::jitter;
use super::user_state::UserState;
use crate::domain::account::UserId;
use crate::domain::clock_reading::ClockReading;
use crate::store::{LOOKUP_ROWS, due_at};

impl TokenManager {
    /// Reads the rows of users whose refresh was due, and takes over what others have stored. Runs until dropped.
    pub(super) async fn note_refreshes(&self, follower: &Follower) {
        // How long after its refresh was due the row of each user was read last.
        let mut read: HashMap<UserId, Duration> = HashMap::new();
        loop {
            sleep(look_pause(jitter())).await;
            let mut overdue = self.all_overdue();
            read.retain(|user, last| overdue.get(user).is_some_and(|late| late >= last));
            overdue.retain(|user, late| *late >= next_look(read.get(user).copied()));
            let wanted: Vec<UserId> = overdue.keys().take(LOOKUP_ROWS).cloned().collect();
            // A poll finds out whether a store that failed works again.
            if wanted.is_empty() || !self.0.store.health().up {
                continue;
            }
            let Ok(found) = self.timed("get", follower.store.lookup_all(&wanted)).await else { continue };
            for (user, lookup) in found {
                // If it fails, a request or the next look reads the row.
                let _ = self.take_over_row(&follower.store, &user, lookup).await;
                read.extend(overdue.remove(&user).map(|late| (user, late)));
            }
        }
    }

    /// The users whose rows may tell of a refresh, and for how long it has been due, but those that this process is
    /// refreshing or storing.
    fn all_overdue(&self) -> HashMap<UserId, Duration> {
        let now = self.0.clock.reading();
        let entries = self.entries().into_iter().filter(|entry| !entry.is_refreshing() && !entry.is_unsaved());
        entries.filter_map(|entry| Some((entry.user.clone(), self.overdue_look(&entry, now)?))).collect()
    }

    /// For how long another process may have refreshed the current grant. After a failure nobody does before its time;
    /// else a request reads the row if the token ends soon.
    fn overdue_look(&self, entry: &UserState, now: ClockReading) -> Option<Duration> {
        let held = entry.held();
        match held.retry_at() {
            Some(retry_at) => Duration::try_from(now.uptime.saturating_sub(retry_at)).ok(),
            None if held.expiring(self.policy(), now) => None,
            None => self.overdue(entry),
        }
    }

    /// For how long a background refresh of the current grant has been due, as its row says it to all processes; `None`
    /// if it is not due.
    pub(super) fn overdue(&self, entry: &UserState) -> Option<Duration> {
        let held = entry.held();
        let due = due_at(self.policy(), &entry.user, held.grant()?)?;
        Duration::try_from(self.0.clock.now().duration_since(due)).ok()
    }
}
