//! The log, written to standard error.
//!
//! The configured level applies only to adsidecar's own lines. Libraries log at most at `warn`: at `trace` and `debug`,
//! HTTP, HTTP/2 and TLS libraries print headers and bodies, which contain tokens.
//!
//! Logging never blocks: lines go through a bounded queue to a thread that writes them. If standard error is a pipe
//! that no process reads, the queue fills, and further lines are dropped and counted. Repeated lines are sampled
//! (`flood`).

mod flood;

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use flood::FloodSampler;

/// Prefix of every target of our own, in the library and in both binaries.
const OWN_TARGET: &str = "adsidecar";

/// The target of the audit log, which is switched on and off independently of the level.
pub const AUDIT_TARGET: &str = "adsidecar::audit";

/// Most verbose level of the libraries, whatever level is configured.
const LIBRARIES: LevelFilter = LevelFilter::WARN;

/// Most lines that wait to be written: about one MiB.
const QUEUE_LINES: usize = 4096;

/// Format and content of the log.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `log.format`; default `json` in production, `text` in development.
    pub format: Format,
    /// Whether the configuration names the format. If it does not, a terminal gets text.
    pub format_given: bool,
    /// `log.level`: the least important level that is written.
    pub level: Level,
    /// `log.audit`: whether to write one line for each request to Amazon.
    pub audit: bool,
}

/// The format of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Plain text, for people.
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

/// The least important line that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// A failure that needs a person's attention.
    Error,
    /// A failure that is expected to resolve without intervention.
    Warn,
    /// A change of state.
    #[default]
    Info,
    /// Each step of the processing.
    Debug,
    /// Every available detail.
    Trace,
}

/// A handle to the running log, which can change its level. A clone is another handle to the same log.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: reload::Handle<Targets, Registry>,
    /// The level, and whether the audit log is on.
    current: Arc<Mutex<(Level, bool)>>,
    sampler: FloodSampler,
    /// Counts the lines that the writer's queue dropped.
    queue_drops: Option<ErrorCounter>,
    /// Stops the writer thread when dropped.
    writer: Arc<Mutex<Option<WorkerGuard>>>,
}

/// The number of lines that were not written since the start, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Lines that were suppressed because too many of one kind occurred.
    pub flood: u64,
    /// Lines that were dropped because no process read standard error.
    pub sink: u64,
}

/// Starts the process's log on standard error.
///
/// If the process already has a log (a test harness, or a second sidecar in one process), that log stays in place and
/// the returned handle has no effect.
pub fn init(mut settings: Settings) -> LogHandle {
    if !settings.format_given && std::io::stderr().is_terminal() {
        settings.format = Format::Text;
    }
    let queue = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE_LINES);
    let (writer, thread) = queue.finish(std::io::stderr());
    let queue_drops = writer.error_counter();
    let (subscriber, handle) = build(settings, writer, colours());
    let _ = subscriber.try_init();
    LogHandle { queue_drops: Some(queue_drops), writer: Arc::new(Mutex::new(Some(thread))), ..handle }
}

/// Whether standard error is a terminal whose user wants colours (`NO_COLOR` is empty or unset, see no-color.org).
pub fn colours() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
    std::io::stderr().is_terminal() && !unwanted && !dumb
}

impl LogHandle {
    /// Returns the number of lines that were not written since the start.
    pub fn dropped(&self) -> Dropped {
        let sink = self.queue_drops.as_ref().map_or(0, |drops| drops.dropped_lines() as u64);
        Dropped { flood: self.sampler.suppressed(), sink }
    }

    /// Writes the queued lines, for about one second at most, and stops the log. Call it just before the process exits.
    pub fn close(&self) {
        drop(self.writer.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Sets the least important level that is written.
    pub fn set_level(&self, level: Level) {
        self.change(|current| current.0 = level);
    }

    /// Applies the level and the audit switch of `settings`. The format cannot change while the process runs.
    pub fn reconfigure(&self, settings: Settings) {
        self.change(|current| *current = (settings.level, settings.audit));
    }

    /// Returns the current level.
    pub fn level(&self) -> Level {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn change(&self, change: impl FnOnce(&mut (Level, bool))) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut current);
        // Fails only after the log was dropped, when there is nothing to change.
        let _ = self.filter.reload(filter(current.0, current.1));
    }
}

impl Level {
    /// Every level, from least to most verbose.
    pub const ALL: [Self; 5] = [Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace];

    /// Returns the level's name in the configuration: `error`, `warn`, `info`, `debug` or `trace`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text is not the name of a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a level is error, warn, info, debug or trace")]
pub struct BadLevel;

impl FromStr for Level {
    type Err = BadLevel;

    fn from_str(text: &str) -> Result<Self, BadLevel> {
        Self::ALL.into_iter().find(|level| text.eq_ignore_ascii_case(level.as_str())).ok_or(BadLevel)
    }
}

/// Builds the subscriber and its handle; `colours` applies to the text format.
fn build<W>(settings: Settings, writer: W, colours: bool) -> (impl Subscriber + Send + Sync, LogHandle)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // A line that cannot be written is dropped. Reporting the failure would also go to standard error, and panic there.
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).log_internal_errors(false);
    let lines = match settings.format {
        Format::Text => lines.with_ansi(colours).boxed(),
        Format::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).with_ansi(false).boxed()
        }
    };
    let (filter, handle) = reload::Layer::new(filter(settings.level, settings.audit));
    let current = Arc::new(Mutex::new((settings.level, settings.audit)));
    let sampler = FloodSampler::default();
    let handle =
        LogHandle { filter: handle, current, sampler: sampler.clone(), queue_drops: None, writer: Arc::default() };
    (Registry::default().with(filter).with(sampler).with(lines), handle)
}

/// The filter for `level`, with our own lines, library lines and the audit log treated separately.
fn filter(level: Level, audit: bool) -> Targets {
    let ours = match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    let audit = if audit { LevelFilter::INFO } else { LevelFilter::OFF };
    let all = Targets::new().with_default(LIBRARIES.min(ours)).with_target(OWN_TARGET, ours);
    all.with_target(AUDIT_TARGET, audit)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Returns what the log writes while `lines` runs.
    fn written(format: Format, level: Level, lines: impl FnOnce(&LogHandle)) -> String {
        let output = Output::default();
        let writer = output.clone();
        let (subscriber, handle) =
            build(Settings { format, format_given: true, level, audit: false }, move || writer.clone(), false);
        tracing::subscriber::with_default(subscriber, || lines(&handle));
        let bytes = output.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn libraries_log_at_most_at_warn() {
        for format in [Format::Text, Format::Json] {
            let text = written(format, Level::Trace, |_| {
                tracing::trace!(target: "hyper::proto", "canary-header");
                tracing::debug!(target: "rustls::client", "canary-key");
                tracing::info!(target: "sled", "canary-record");
                tracing::warn!(target: "h2", "connection lost");
                tracing::trace!("our step");
            });
            assert!(!text.contains("canary"), "{text}");
            assert!(text.contains("connection lost") && text.contains("our step"), "{text}");
        }
    }

    #[test]
    fn the_level_error_also_applies_to_libraries() {
        let text = written(Format::Text, Level::Error, |_| {
            tracing::warn!(target: "h2", "connection lost");
            tracing::warn!("refresh failed");
            tracing::error!("no store");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("no store"), "{text}");
    }

    #[test]
    fn the_level_can_be_changed_while_the_log_runs() {
        let text = written(Format::Text, Level::Info, |handle| {
            tracing::debug!("before");
            handle.set_level(Level::Debug);
            tracing::debug!("between");
            tracing::debug!(target: "hyper::proto", "canary-header");
            handle.set_level(Level::Warn);
            tracing::info!("after");
        });
        assert!(!text.contains("before") && !text.contains("after") && !text.contains("canary"), "{text}");
        assert!(text.contains("between"), "{text}");
    }

    #[test]
    fn the_audit_log_is_independent_of_the_level() {
        let text = written(Format::Text, Level::Trace, |handle| {
            tracing::info!(target: AUDIT_TARGET, "off");
            assert!(
                !tracing::event_enabled!(target: AUDIT_TARGET, tracing::Level::INFO),
                "a disabled audit log costs nothing"
            );
            let format = Format::Text;
            handle.reconfigure(Settings { format, format_given: true, level: Level::Error, audit: true });
            tracing::info!(target: AUDIT_TARGET, "on");
            handle.set_level(Level::Warn);
            tracing::info!(target: AUDIT_TARGET, "still");
            tracing::info!("quiet");
        });
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("on") && text.contains("still") && text.contains(AUDIT_TARGET), "{text}");
    }

    #[test]
    fn a_json_line_is_one_flat_object() {
        let text =
            written(Format::Json, Level::Info, |_| tracing::info!(listener = "proxy", "listening\non two lines"));
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["listener"], "proxy");
        assert_eq!(line["message"], "listening\non two lines");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'), "{text}");
    }

    #[test]
    fn every_level_parses_from_its_own_name() {
        assert_eq!("loud".parse::<Level>(), Err(BadLevel));
        for level in Level::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
        }
    }
}
