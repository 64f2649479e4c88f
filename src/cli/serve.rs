//! `adsidecar serve`.

use std::io::Write;

use tokio::signal::unix::{SignalKind, signal};

use super::{Failed, process};
use crate::app::App;
use crate::clock::Clock;
use crate::config::{Config, Sources};
use crate::log;

/// Serves until SIGTERM or SIGINT. SIGHUP, and a change of the configuration's files, make it read them again.
pub(super) fn run(config: Config, sources: Sources) -> Result<(), Failed> {
    let log = log::init(config.log);
    process::remark(&config);
    // One core is served best by one thread; a second worker would only move tasks to and fro.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut builder = match cores {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = builder.enable_all().build().map_err(Failed::because)?;
    runtime.block_on(async {
        let app = App::build(config, Clock::system(), Some(log)).await?.reloading(sources);
        let mut hangup = signal(SignalKind::hangup()).map_err(Failed::because)?;
        let reloader = app.reloader();
        tokio::spawn(async move {
            while hangup.recv().await.is_some() {
                // What comes of it is logged.
                let _ = reloader.reload().await;
            }
        });
        app.run(asked_to_stop()?).await?;
        Ok(())
    })
}

/// Completes at the first signal; the second ends the process at once.
pub(super) fn asked_to_stop() -> Result<impl Future<Output = ()>, Failed> {
    let mut term = signal(SignalKind::terminate()).map_err(Failed::because)?;
    let mut int = signal(SignalKind::interrupt()).map_err(Failed::because)?;
    Ok(async move {
        tokio::select! { _ = term.recv() => {} _ = int.recv() => {} }
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {} _ = int.recv() => {} }
            let _ = writeln!(std::io::stderr(), "second signal: ending now");
            std::process::exit(1);
        });
    })
}
