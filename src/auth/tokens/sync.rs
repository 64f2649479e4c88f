//! The synchronization primitives of [`UserState`](super::user_state::UserState). The model checker (`tests/model/`)
//! compiles `user_state.rs` with its own primitives, so `user_state.rs` may share state only through these.

pub(super) use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
pub(super) use std::sync::{Mutex, PoisonError};
pub(super) use tokio::sync::{Mutex as WriteLock, MutexGuard as WriteGuard, watch};
