//! The thread that owns the store, and the handle that sends operations to it.
//!
//! sled blocks, and has been seen to deadlock under concurrent use. A dedicated thread runs all operations one after
//! the other, so that sled never blocks a task that serves requests.

use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::oneshot;

use super::engine::Engine;
use crate::store::keyring::Keyring;
use crate::store::{Health, Opened, StoreError, files};

/// Time limit of one operation. A healthy one takes a millisecond; a volume that needs longer than this hangs, and
/// requests are served from memory meanwhile.
const DEADLINE: Duration = Duration::from_secs(2);

/// Capacity of the queue of operations. It fills up only if the thread hangs, and then they would time out anyway.
const QUEUE_CAPACITY: usize = 1024;

/// A handle to the store's thread.
#[derive(Clone)]
pub struct Worker {
    inner: Arc<Inner>,
    deadline: Duration,
}

struct Inner {
    jobs: SyncSender<Job>,
    health: Arc<Mutex<Health>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Job {
    Run(Box<dyn FnOnce(&mut Engine) + Send>),
    Stop(oneshot::Sender<()>),
}

impl Worker {
    /// Starts the thread and blocks until the store is open.
    pub(in crate::store) fn start(path: PathBuf, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        let (jobs, queue) = mpsc::sync_channel(QUEUE_CAPACITY);
        let (result, opening) = mpsc::sync_channel(1);
        let run = {
            let path = path.clone();
            move || match Engine::open(path, keyring) {
                Ok((engine, opened)) => {
                    let _ = result.send(Ok((opened, engine.health())));
                    run_jobs(engine, &queue);
                }
                Err(error) => drop(result.send(Err(error))),
            }
        };
        let builder = thread::Builder::new().name("store".into());
        let thread = builder.spawn(run).map_err(|error| files::io_error(&path, error))?;
        match opening.recv() {
            Ok(Ok((opened, health))) => {
                let (health, thread) = (Arc::new(Mutex::new(health)), Mutex::new(Some(thread)));
                Ok((Self { inner: Arc::new(Inner { jobs, health, thread }), deadline: DEADLINE }, opened))
            }
            Ok(Err(error)) => {
                // A caller that tries again must not find the lock still taken.
                let _ = thread.join();
                Err(error)
            }
            Err(_) => Err(StoreError::UnusableDatabase { path, reason: "sled panicked while it opened".into() }),
        }
    }

    /// Runs `op` on the thread, and waits for its result until the deadline.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] past the deadline: the thread may still run `op`. [`StoreError::Closed`] after
    /// [`close`](Self::close). Otherwise the error of `op`.
    pub(in crate::store) async fn call<T: Send + 'static>(
        &self,
        op: impl FnOnce(&mut Engine) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (sender, receiver) = oneshot::channel();
        let health = Arc::clone(&self.inner.health);
        self.send(Job::Run(Box::new(move |engine| {
            let result = engine.run(op);
            *locked(&health) = engine.health();
            let _ = sender.send(result);
        })))?;
        match tokio::time::timeout(self.deadline, receiver).await {
            Ok(received) => received.unwrap_or(Err(StoreError::Closed)),
            Err(_) => Err(self.timed_out()),
        }
    }

    /// Stops the thread after the operations that are already queued.
    pub(in crate::store) async fn close(&self) -> Result<(), StoreError> {
        let (stopped, ended) = oneshot::channel();
        match self.send(Job::Stop(stopped)) {
            Err(StoreError::Closed) => return Ok(()),
            other => other?,
        }
        if tokio::time::timeout(self.deadline, ended).await.is_err() {
            return Err(self.timed_out());
        }
        if let Some(thread) = locked(&self.inner.thread).take() {
            let _ = thread.join();
        }
        Ok(())
    }

    pub(in crate::store) fn health(&self) -> Health {
        locked(&self.inner.health).clone()
    }

    /// Another handle to the same thread, with its own deadline.
    #[cfg(test)]
    pub(in crate::store) fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    fn send(&self, job: Job) -> Result<(), StoreError> {
        self.inner.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => self.timed_out(),
            TrySendError::Disconnected(_) => StoreError::Closed,
        })
    }

    fn timed_out(&self) -> StoreError {
        let mut health = locked(&self.inner.health);
        health.up = false;
        health.last_error = Some(StoreError::Timeout.to_string());
        StoreError::Timeout
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("health", &self.health()).finish_non_exhaustive()
    }
}

/// Runs jobs until one of them is `Stop` or the last handle is dropped.
fn run_jobs(mut engine: Engine, queue: &Receiver<Job>) {
    for job in queue {
        match job {
            Job::Run(op) => op(&mut engine),
            Job::Stop(stopped) => {
                drop(engine);
                let _ = stopped.send(());
                return;
            }
        }
    }
}

/// Locks the mutex and ignores poisoning: it guards plain data, which a panic leaves valid.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
