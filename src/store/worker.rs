//! The thread that owns the store, and how it is asked.
//!
//! sled blocks, and has been seen to dead-lock under concurrent use: one thread of its own does all of it, so that
//! neither ever stops the tasks that serve requests.

use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::oneshot;

use super::engine::Engine;
use super::{Health, Opened, StoreError, files};
use crate::store::keyring::Keyring;

/// How long an operation may take. A healthy one takes a millisecond; a volume that takes longer than this hangs, and
/// memory goes on serving meanwhile.
const DEADLINE: Duration = Duration::from_secs(2);

/// Operations that wait for the thread. More wait only when it hangs, and those would time out anyway.
const QUEUE: usize = 1024;

/// A handle to the store's thread.
#[derive(Clone)]
pub struct Worker {
    shared: Arc<Shared>,
    deadline: Duration,
}

struct Shared {
    jobs: SyncSender<Job>,
    health: Arc<Mutex<Health>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Job {
    Run(Box<dyn FnOnce(&mut Engine) + Send>),
    Stop(oneshot::Sender<()>),
}

impl Worker {
    /// Starts the thread and waits until the store is open.
    pub(super) fn start(path: PathBuf, keyring: Arc<Keyring>) -> Result<(Self, Opened), StoreError> {
        let (jobs, queue) = mpsc::sync_channel(QUEUE);
        let (answer, answered) = mpsc::sync_channel(1);
        let run = {
            let path = path.clone();
            move || match Engine::open(path, keyring) {
                Ok((engine, opened)) => {
                    let _ = answer.send(Ok((opened, engine.health())));
                    serve(engine, &queue);
                }
                Err(error) => drop(answer.send(Err(error))),
            }
        };
        let builder = thread::Builder::new().name("store".into());
        let thread = builder.spawn(run).map_err(|error| files::io_error(&path, error))?;
        match answered.recv() {
            Ok(Ok((opened, health))) => {
                let (health, thread) = (Arc::new(Mutex::new(health)), Mutex::new(Some(thread)));
                Ok((Self { shared: Arc::new(Shared { jobs, health, thread }), deadline: DEADLINE }, opened))
            }
            Ok(Err(error)) => {
                // So that who tries again does not find the lock still held.
                let _ = thread.join();
                Err(error)
            }
            Err(_) => Err(StoreError::Engine { path, reason: "it panicked while it opened".into() }),
        }
    }

    /// Has the thread do `op`, and waits for it until the deadline.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        op: impl FnOnce(&mut Engine) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let health = Arc::clone(&self.shared.health);
        self.send(Job::Run(Box::new(move |engine| {
            let result = engine.run(op);
            *locked(&health) = engine.health();
            let _ = answer.send(result);
        })))?;
        match tokio::time::timeout(self.deadline, answered).await {
            Ok(answer) => answer.unwrap_or(Err(StoreError::Closed)),
            Err(_) => Err(self.timed_out()),
        }
    }

    /// Stops the thread once it has done what was asked before.
    pub(super) async fn close(&self) -> Result<(), StoreError> {
        let (stopped, ended) = oneshot::channel();
        match self.send(Job::Stop(stopped)) {
            Err(StoreError::Closed) => return Ok(()),
            other => other?,
        }
        if tokio::time::timeout(self.deadline, ended).await.is_err() {
            return Err(self.timed_out());
        }
        if let Some(thread) = locked(&self.shared.thread).take() {
            let _ = thread.join();
        }
        Ok(())
    }

    pub(super) fn health(&self) -> Health {
        locked(&self.shared.health).clone()
    }

    /// The same worker for a caller in more of a hurry.
    #[cfg(test)]
    pub(super) fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    fn send(&self, job: Job) -> Result<(), StoreError> {
        self.shared.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => self.timed_out(),
            TrySendError::Disconnected(_) => StoreError::Closed,
        })
    }

    fn timed_out(&self) -> StoreError {
        let mut health = locked(&self.shared.health);
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

/// Does jobs until it is told to stop, or until the last handle is gone.
fn serve(mut engine: Engine, queue: &Receiver<Job>) {
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

/// A panic while it was held left plain data, so a poisoned lock is as good as any.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
