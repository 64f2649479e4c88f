//! The refresh journal. Login with Amazon returns the same refresh token today; if it issues a new one, a process that
//! dies between receiving and storing the response loses the grant. So each refresh is recorded before it begins, and
//! such a loss is reported, never silent. An entry is void once its refresh is stored, since the stored generation is
//! higher; so a successful refresh needs no second write.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::TokenManager;
use crate::domain::account::UserId;

/// The store note that held the journal in earlier versions: `{"<user>": <generation>}`.
const NOTE: &str = "renewals_begun";
/// The journal is written anew once it is longer than this, and than four times what is in it.
const LONG: u64 = 64 << 10;
/// Bytes of one entry, about.
const ENTRY: u64 = 40;

type Note = BTreeMap<UserId, u64>;

/// The journal of the only process that uses the store.
#[derive(Debug, Default)]
pub(super) struct RefreshJournal {
    /// What is in the journal; `None` before it was first read. Locked while it is written.
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
    /// Records that the response to a refresh of `generation` may have been lost. Returns whether that is new.
    pub(super) fn lost(&self, user: &UserId, generation: u64) -> bool {
        let before = self.begun().insert(user.clone(), Begun { generation, lost: true });
        before.is_none_or(|begun| !begun.lost || begun.generation != generation)
    }

    /// Whether the response to a refresh of `user` may have been lost.
    pub(super) fn is_lost(&self, user: &UserId) -> bool {
        self.begun().get(user).is_some_and(|begun| begun.lost)
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
        let there = written.as_ref().is_some_and(|journal| journal.get(user) == Some(&generation));
        if !there && self.0.store.health().up {
            self.write_journal(&mut written, vec![(user.clone(), Some(generation))]).await;
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
        let Some(journal) = written.as_ref() else { return };
        let current = self.0.interrupted.note();
        let ended = journal.keys().filter(|user| !current.contains_key(*user)).map(|user| (user.clone(), None));
        let begun = current.iter().filter(|(user, generation)| journal.get(*user) != Some(*generation));
        let changes: Vec<_> = ended.chain(begun.map(|(user, generation)| (user.clone(), Some(*generation)))).collect();
        if !changes.is_empty() {
            self.write_journal(&mut written, changes).await;
        }
    }

    async fn read_journal(&self, written: &mut Option<Note>) {
        if written.is_some() {
            return;
        }
        let journal = match self.timed("note", self.0.store.journal()).await {
            Ok(Some(journal)) => journal,
            Ok(None) => {
                let Ok(note) = self.timed("note", self.0.store.note(NOTE)).await else { return };
                note.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
            }
            Err(_) => return,
        };
        for (user, generation) in &journal {
            if self.entry(user).is_some_and(|entry| entry.held().is_of(*generation)) {
                tracing::warn!(%user, "the previous process ended during a refresh; adsidecar tries the stored grant");
                self.0.interrupted.lost(user, *generation);
            }
        }
        *written = Some(journal);
    }

    async fn write_journal(&self, written: &mut Option<Note>, changes: Vec<(UserId, Option<u64>)>) {
        let Ok(length) = self.timed("note", self.0.store.append_journal(changes.clone())).await else { return };
        let Some(journal) = written else { return };
        for (user, generation) in changes {
            match generation {
                Some(generation) => drop(journal.insert(user, generation)),
                None => drop(journal.remove(&user)),
            }
        }
        if length <= LONG {
            return;
        }
        let current = self.0.interrupted.note();
        if length > 4 * ENTRY * current.len() as u64
            && self.timed("note", self.0.store.replace_journal(current.clone())).await.is_ok()
        {
            *journal = current;
        }
    }
}
