//! `adsidecar health` and `adsidecar wait`: probes without a shell or curl in the image.

use std::time::{Duration, Instant};

use http::Method;
use tokio::signal::unix::{SignalKind, signal};

use super::{Failed, block_on, client, print};
use crate::server::Listen;

/// How often `wait` asks.
const PERIOD: Duration = Duration::from_millis(100);

/// Succeeds where the running sidecar lives, or with `ready` is ready.
pub(super) fn health(doors: &[Listen], ready: bool) -> Result<(), Failed> {
    print(block_on(probe(doors, ready))??)
}

/// Succeeds once the sidecar is ready.
pub(super) fn wait(doors: &[Listen], timeout: Duration) -> Result<(), Failed> {
    block_on(async {
        // As process 1 of a container it would ignore a signal that it has not asked for.
        let mut term = signal(SignalKind::terminate()).map_err(Failed::because)?;
        tokio::select! {
            ready = until_ready(doors, timeout) => ready,
            _ = term.recv() => Err(Failed::because("told to stop before it was ready")),
        }
    })?
}

async fn until_ready(doors: &[Listen], timeout: Duration) -> Result<(), Failed> {
    let begun = Instant::now();
    loop {
        match probe(doors, true).await {
            Ok(_) => return Ok(()),
            Err(failed) if begun.elapsed() >= timeout => {
                return Err(Failed::because(format!("not ready within {timeout:?}: {}", failed.message)));
            }
            Err(_) => tokio::time::sleep(PERIOD).await,
        }
    }
}

async fn probe(doors: &[Listen], ready: bool) -> Result<String, Failed> {
    let path = if ready { "/readyz" } else { "/livez" };
    let (status, body) = client::request(doors, Method::GET, path, &[]).await?;
    let text = String::from_utf8_lossy(&body).into_owned();
    if status.is_success() { Ok(text) } else { Err(Failed::because(text.trim_end())) }
}
