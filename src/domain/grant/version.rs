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
    /// Decides about a row with the version `stored`, which has a grant if `stored_grant`, for a process that knows of
    /// this version, and holds a grant if `held_grant`. A write that follows from it must find the generation of
    /// `stored` in the store, or it is decided anew.
    pub fn reconcile(self, held_grant: bool, stored: Self, stored_grant: bool) -> Verdict {
        if stored >= self {
            return Verdict::TakeOver;
        }
        match (held_grant, stored_grant) {
            // Above the row, and above what this process has seen of it: others then take it over.
            (true, _) => {
                Verdict::PutBack(Self { epoch: self.epoch, generation: self.generation.max(stored.generation) + 1 })
            }
            (false, true) => Verdict::RepeatLogout(Self {
                epoch: self.epoch.max(stored.epoch + 1),
                generation: self.generation.max(stored.generation + 1),
            }),
            (false, false) => Verdict::TakeOver,
        }
    }
}
