//! The entry's dependencies on shuttle's primitives: at each use the scheduler may switch.

pub(super) use shuttle::sync::Mutex;
pub(super) use shuttle::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
pub(super) use std::sync::PoisonError;

pub(super) type WriteGuard<'a, T> = shuttle::sync::MutexGuard<'a, T>;

/// Replaces tokio's lock; waiting blocks a thread of the model.
#[derive(Debug)]
pub(super) struct WriteLock<T>(Mutex<T>);

impl<T> WriteLock<T> {
    pub(super) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    pub(super) async fn lock(&self) -> WriteGuard<'_, T> {
        self.0.lock().unwrap()
    }
}

/// Replaces tokio's `watch`; the model does not need its waiting.
pub(super) mod watch {
    use std::sync::Arc;

    use super::Mutex;

    #[derive(Debug)]
    pub(crate) struct Sender<T>(Arc<Mutex<T>>);

    #[derive(Debug)]
    pub(crate) struct Receiver<T>(Arc<Mutex<T>>);

    impl<T> Sender<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(Arc::new(Mutex::new(value)))
        }

        pub(crate) fn send_modify(&self, modify: impl FnOnce(&mut T)) {
            modify(&mut self.0.lock().unwrap());
        }

        pub(crate) fn subscribe(&self) -> Receiver<T> {
            Receiver(self.0.clone())
        }
    }

    impl<T> Receiver<T> {
        pub(crate) async fn changed(&mut self) -> Result<(), ()> {
            unreachable!("the model never waits")
        }
    }
}
