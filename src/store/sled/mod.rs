//! Grants on the local disk, for one process.
//!
//! The store has two parts: a sled database, and a mirror of one small file per user in `<path>.copies/`. Every
//! acknowledged write is durable in both. sled 0.34 has been seen to lose whole databases and to refuse to open them;
//! the mirror holds what cannot be obtained again, the refresh tokens.
//!
//! # Which part is authoritative
//!
//! Commits are numbered. A save commits to sled first and then writes the mirror file with the commit's number. An
//! erasure deletes the mirror file, commits to sled, and then writes the number into the mirror. So at whatever instant
//! the process dies, sled's number is at least the mirror's, and each mirror file has its record in sled: sled is
//! authoritative, and mirror files that the crash left unwritten are written at the next start.
//!
//! If sled's number is *lower*, or sled does not open, it has lost data: a flipped bit in its log ends the log at that
//! point, without an error. The database is then moved aside, never deleted, and a new one is filled from the mirror.
//! An acknowledged logout has durably deleted its mirror file, so its grant cannot return: the mirror no longer has it,
//! and an older state of sled is rejected for its low number.
//!
//! A record that is older than its mirror file was restored by something other than adsidecar; the mirror's is used.
//!
//! # Pending grants and pending logins
//!
//! Pending grants lie in the mirror's directory, one file each; pending logins lie there together in one file. Both are
//! sealed as a whole, and neither is in the database, because they expire within ten minutes.
//!
//! # The key
//!
//! `<path>.copies/key` holds the fingerprint of the key that sealed last, twice. It is compared before sled is opened,
//! because sled writes to its directory whenever it opens: with a wrong key nothing is touched. It is a fingerprint and
//! not a sealed text, so that the error can name the key that is needed.

mod accounts_index;
mod database;
mod engine;
mod journal;
mod mirror;
mod pending;
mod worker;

#[cfg(test)]
pub(super) use engine::Engine;
pub(super) use engine::ResealOutcome;
pub(super) use worker::Worker;
