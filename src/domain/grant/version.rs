//! Which of two states of a user is the newer one, and what a process does about a store that is older than it.

/// The version of a user's row in a store that several processes share.
///
/// The epoch decides, then the generation. The epoch is when the user last logged in or out; the generation rises with
/// every change. After a failover that lost commits, generations may repeat, and a refresh of an old grant may have a
/// higher generation than the logout that the database has lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// When the user last logged in or out, in microseconds by the database's clock; 0 if unknown.
    pub epoch: u64,
    /// Number of changes; 0 if there is no row.
    pub generation: u64,
}

/// What a row holds, as seen by a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// No grant.
    Nothing,
    /// A grant.
    Grant,
    /// The grant whose refresh token Login with Amazon has replaced by the one that the process holds: another process,
    /// which has not heard of that, has stored it again.
    UsedUp,
}

/// What a process does with a row that it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The row is at least as new as what this process knows: take it over.
    TakeOver,
    /// The store has lost a change: write this process's grant again, under this version.
    PutBack(Version),
    /// The store has lost a logout: log out again, under this version.
    RepeatLogout(Version),
}

impl Version {
    /// Decides about a row with the version `stored`, which has this `content`, for a process that knows of this
    /// version, and holds a grant if `held_grant`. A write that follows from it must find the generation of `stored` in
    /// the store, or it is decided anew.
    pub fn reconcile(self, held_grant: bool, stored: Self, content: Stored) -> Verdict {
        let is_used_up = content == Stored::UsedUp && stored.epoch <= self.epoch;
        if stored >= self && !(held_grant && is_used_up) {
            return Verdict::TakeOver;
        }
        match (held_grant, content != Stored::Nothing) {
            // The same state under the same generation: a process that knows a later one stores it over this.
            (true, _) => {
                let generation = self.generation.max(stored.generation + 1);
                Verdict::PutBack(Self { epoch: self.epoch, generation })
            }
            (false, true) => Verdict::RepeatLogout(Self {
                epoch: self.epoch.max(stored.epoch + 1),
                generation: self.generation.max(stored.generation + 1),
            }),
            (false, false) => Verdict::TakeOver,
        }
    }
}
