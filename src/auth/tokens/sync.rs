//! The primitives that a user's [`UserState`](super::user_state::UserState) stands on. The model checker reads the same `entry.rs` with its
//! own in their place (`tests/model/`), so nothing else may be used there to share state.

pub(super) use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
pub(super) use std::sync::{Mutex, PoisonError};
pub(super) use tokio::sync::{Mutex as WriteLock, MutexGuard as WriteGuard, watch};
