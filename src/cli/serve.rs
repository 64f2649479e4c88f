//! `adsidecar serve`.

use std::time::Duration;

use futures_util::FutureExt;
use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};

use super::first_words::FirstWords;
use super::{Failed, process, systemd};
use crate::app::App;
use crate::config::{Config, Sources};
use crate::domain::clock::Clock;
use crate::server::Inherited;
use crate::telemetry::log::{self, LogHandle};

/// Signals within this time of the first belong to it.
const ONE_STOP: Duration = Duration::from_millis(500);

/// Serves until SIGTERM or SIGINT. SIGHUP, and a change of the configuration's files, make it read them again.
pub(super) fn run(config: Config, sources: Sources) -> Result<(), Failed> {
    // Before any thread starts: it takes variables out of the environment.
    let sockets = Inherited::from_environment().map_err(Failed::because)?;
    let log = log::init(config.log);
    config.log_warnings();
    process::remark(&config);
    #[cfg(feature = "failpoints")]
    tracing::warn!(points = ?fail::list(), "fail points are compiled in: this build is for tests alone");
    // One core is served best by one thread; a second worker would only move tasks to and fro.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut builder = match cores {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = builder.enable_all().build().map_err(Failed::because)?;
    let ended = runtime.block_on(serve(sockets, config, sources, log.clone()));
    log.close();
    ended
}

async fn serve(sockets: Inherited, config: Config, sources: Sources, log: LogHandle) -> Result<(), Failed> {
    // Before the store is opened: process 1 of a container ignores a signal that it has not asked for.
    let stop = asked_to_stop(log.clone())?;
    let mut hangup = signal(SignalKind::hangup()).map_err(Failed::because)?;
    if std::process::id() == 1 {
        tokio::spawn(reap_children()?);
    }
    let first_words = FirstWords::for_terminal(&config);
    let app = App::build_on(sockets, config, Clock::system(), Some(log)).await?.reloading(sources);
    let (serving, users, addresses) = (app.serving(), app.first_users(), app.addresses().clone());
    tokio::spawn(async move {
        if !serving.await {
            return;
        }
        systemd::notify("READY=1");
        // Only a person reads them: nobody else's start waits for users to be read.
        if let Some(words) = first_words {
            words.write(&addresses, &users.await);
        }
    });
    let stop = async {
        stop.await;
        systemd::notify("STOPPING=1");
    };
    let reloader = app.reloader();
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            // What comes of it is logged.
            let _ = reloader.reload().await;
        }
    });
    Box::pin(app.run(stop)).await?;
    Ok(())
}

/// Reaps orphaned processes. Process 1 of a container inherits every process whose parent has ended, such as those that
/// `kubectl exec` left behind. adsidecar starts no children of its own, so it may wait for any child.
fn reap_children() -> Result<impl Future<Output = ()>, Failed> {
    let mut ended = signal(SignalKind::child()).map_err(Failed::because)?;
    Ok(async move {
        while ended.recv().await.is_some() {
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        }
    })
}

/// Completes at the first signal; another one, at least `ONE_STOP` later, ends the process at once.
pub fn asked_to_stop(log: LogHandle) -> Result<impl Future<Output = ()>, Failed> {
    let mut term = signal(SignalKind::terminate()).map_err(Failed::because)?;
    let mut int = signal(SignalKind::interrupt()).map_err(Failed::because)?;
    Ok(async move {
        tokio::select! { _ = term.recv() => {} _ = int.recv() => {} }
        tokio::spawn(async move {
            // One stop often arrives as two signals: from a supervisor to the process and to its group.
            tokio::time::sleep(ONE_STOP).await;
            let _ = (term.recv().now_or_never(), int.recv().now_or_never());
            tokio::select! { _ = term.recv() => {} _ = int.recv() => {} }
            tracing::warn!("second signal: ending now");
            log.close();
            std::process::exit(1);
        });
    })
}
