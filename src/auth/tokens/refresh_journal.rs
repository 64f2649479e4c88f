//! The refresh journal. Login with Amazon returns the same refresh token today; if it issues a new one, a process that
//! dies between receiving and storing the response loses the grant. So each refresh is recorded before it begins, and
//! such a loss is reported, never silent.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::TokenManager;
use crate::domain::account::UserId;

/// The store note that holds the journal: `{"<user>": <generation>}`. An entry is void once its refresh is stored,
/// since the stored generation is higher; so a successful refresh needs no second write.
const NOTE: &str = "renewals_begun";

type Note = BTreeMap<UserId, u64>;

/// The journal of the only process that uses the store.
#[derive(Debug, Default)]
pub(super) struct RefreshJournal {
    /// The note as last read or written; `None` before the first read. Locked while the note is written.
    written: tokio::sync::Mutex<Option<Note>>,
}

/// The refreshes of this process that have begun and have no known outcome, and those whose response may be lost.
#[derive(Debug, Default)]
pub(super) struct Interrupted {
    begun: Mutex<BTreeMap<UserId, Begun>>,
}

#[derive(Clone, Copy, Debug)]
struct Begun {
    generation: u64,
    /// Whether a response to this refresh may have been lost.
    lost: bool,
}

impl Interrupted {
    /// Records that the response to a refresh of `generation` may have been lost.
    pub(super) fn lost(&self, user: &UserId, generation: u64) {
        self.begun().insert(user.clone(), Begun { generation, lost: true });
    }

    /// Records that the refresh ended with a known outcome. Returns whether the response to an earlier one may have
    /// been lost.
    pub(super) fn end(&self, user: &UserId) -> bool {
        self.begun().remove(user).is_some_and(|begun| begun.lost)
    }

    /// Records that LWA answered the refresh without a token, or was not reached: nothing can be lost by it. An earlier
    /// response that may have been lost stays recorded.
    pub(super) fn answered(&self, user: &UserId) {
        let mut begun = self.begun();
        if begun.get(user).is_some_and(|begun| !begun.lost) {
            begun.remove(user);
        }
    }

    fn begin(&self, user: &UserId, generation: u64) {
        let mut begun = self.begun();
        if begun.get(user).is_none_or(|begun| begun.generation != generation) {
            begun.insert(user.clone(), Begun { generation, lost: false });
        }
    }

    fn begun(&self) -> MutexGuard<'_, BTreeMap<UserId, Begun>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) -> Note {
        self.begun().iter().map(|(user, begun)| (user.clone(), begun.generation)).collect()
    }
}

impl TokenManager {
    /// Records in the journal that a refresh of `generation` begins. The refresh continues even if the store fails.
    pub(super) async fn record_refresh(&self, journal: &RefreshJournal, user: &UserId, generation: u64) {
        fail_point!("refresh_unjournaled", |_| ());
        let mut written = journal.written.lock().await;
        self.read_journal(&mut written).await;
        self.0.interrupted.begin(user, generation);
        let there = written.as_ref().is_some_and(|note| note.get(user) == Some(&generation));
        if !there && self.0.store.health().up {
            self.write_journal(&mut written).await;
        }
    }

    /// At startup, looks for refreshes that the end of the previous process interrupted.
    pub(super) async fn report_interrupted(&self, journal: &RefreshJournal) {
        self.read_journal(&mut *journal.written.lock().await).await;
    }

    /// Removes finished refreshes from the stored journal, so that the next process does not report them as
    /// interrupted.
    pub(super) async fn clear_finished(&self, journal: &RefreshJournal) {
        let mut written = journal.written.lock().await;
        if written.as_ref().is_some_and(|written| *written != self.0.interrupted.note()) {
            self.write_journal(&mut written).await;
        }
    }

    async fn read_journal(&self, written: &mut Option<Note>) {
        if written.is_some() {
            return;
        }
        let Ok(note) = self.timed("note", self.0.store.note(NOTE)).await else { return };
        let note: Note = note.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        for (user, generation) in &note {
            if self.entry(user).is_some_and(|entry| entry.held().is_of(*generation)) {
                tracing::warn!(%user, "the previous process ended during a refresh; adsidecar tries the stored grant");
                self.0.interrupted.lost(user, *generation);
            }
        }
        *written = Some(note);
    }

    async fn write_journal(&self, written: &mut Option<Note>) {
        let note = self.0.interrupted.note();
        let text = serde_json::to_string(&note).expect("names and numbers are JSON");
        if self.timed("note", self.0.store.set_note(NOTE, text)).await.is_ok() {
            *written = Some(note);
        }
    }
}
