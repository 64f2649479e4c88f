//! Log lines on standard error.
//!
//! Only adsidecar's own lines follow the level that is asked for. The libraries below it never say more than `warn`:
//! at `trace` and `debug` an HTTP, HTTP/2 or TLS library prints headers and bodies, which are tokens here.
//!
//! Whoever logs never waits: lines go through a bounded queue to a thread that writes them. Where standard error is a pipe
//! that nobody reads, the queue fills and lines are dropped and counted; so are lines of one kind that come in a flood.

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

use flood::Floods;

/// Every target of ours begins with this, in the library and in both binaries.
const OWN_TARGET: &str = "adsidecar";

/// The target of the audit log, which is on or off whatever the level is.
pub const AUDIT_TARGET: &str = "adsidecar::audit";

/// The most that the libraries below us may say, whatever is asked for.
const LIBRARIES: LevelFilter = LevelFilter::WARN;

/// Lines that wait to be written, at most: about a MiB.
const QUEUE_LINES: usize = 4096;

/// How the log looks.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `log.format`; default `json` in production, `text` in development.
    pub format: Format,
    /// `log.level`.
    pub level: Level,
    /// `log.audit`: a line for each call to Amazon.
    pub audit: bool,
}

/// One line as text or as a JSON object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

/// The least important line that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Something failed that a person must look at.
    Error,
    /// Something failed that heals by itself.
    Warn,
    /// A state changed.
    #[default]
    Info,
    /// Each step.
    Debug,
    /// Everything.
    Trace,
}

/// Changes the level of a running log. Cloning gives another handle to the same log.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: reload::Handle<Targets, Registry>,
    /// The least important level, and whether there is an audit log.
    now: Arc<Mutex<(Level, bool)>>,
    floods: Floods,
    unwritten: Option<ErrorCounter>,
    writer: Arc<Mutex<Option<WorkerGuard>>>,
}

/// How many lines were not written since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Too many of one kind came at once.
    pub flood: u64,
    /// Nobody read standard error.
    pub sink: u64,
}

/// Starts the process's log on standard error.
///
/// Where the process has a log already (a test harness, a second sidecar in one process), that one stays and the
/// handle moves nothing.
pub fn init(settings: Settings) -> LogHandle {
    let queue = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE_LINES);
    let (writer, thread) = queue.finish(std::io::stderr());
    let unwritten = writer.error_counter();
    let (subscriber, handle) = build(settings, writer, std::io::stderr().is_terminal());
    let _ = subscriber.try_init();
    LogHandle { unwritten: Some(unwritten), writer: Arc::new(Mutex::new(Some(thread))), ..handle }
}

impl LogHandle {
    /// How many lines were not written since the start.
    pub fn dropped(&self) -> Dropped {
        let sink = self.unwritten.as_ref().map_or(0, |unwritten| unwritten.dropped_lines() as u64);
        Dropped { flood: self.floods.held_back(), sink }
    }

    /// Writes what still waits, for about a second at most, and nothing any more from then on: for the end.
    pub fn close(&self) {
        drop(self.writer.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// From now on lines of `level` and above are written.
    pub fn set_level(&self, level: Level) {
        self.change(|now| now.0 = level);
    }

    /// Takes the level and the audit log of `settings` into use; the format stays.
    pub fn reconfigure(&self, settings: Settings) {
        self.change(|now| *now = (settings.level, settings.audit));
    }

    /// The least important level that is written now.
    pub fn level(&self) -> Level {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn change(&self, change: impl FnOnce(&mut (Level, bool))) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut now);
        // This fails only where the log is gone, and then there is nothing to change.
        let _ = self.filter.reload(filter(now.0, now.1));
    }
}

impl Level {
    /// All levels, from the quietest.
    pub const ALL: [Self; 5] = [Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace];

    /// The level as configured: `error`, `warn`, `info`, `debug` or `trace`.
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

/// Text that names no level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a level is error, warn, info, debug or trace")]
pub struct BadLevel;

impl FromStr for Level {
    type Err = BadLevel;

    fn from_str(text: &str) -> Result<Self, BadLevel> {
        Self::ALL.into_iter().find(|level| text.eq_ignore_ascii_case(level.as_str())).ok_or(BadLevel)
    }
}

fn build<W>(settings: Settings, writer: W, colours: bool) -> (impl Subscriber + Send + Sync, LogHandle)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // A line that cannot be written is dropped: reporting that would go to standard error too, and panic there.
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).log_internal_errors(false);
    let lines = match settings.format {
        Format::Text => lines.with_ansi(colours).boxed(),
        Format::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).with_ansi(false).boxed()
        }
    };
    let (filter, handle) = reload::Layer::new(filter(settings.level, settings.audit));
    let now = Arc::new(Mutex::new((settings.level, settings.audit)));
    let floods = Floods::default();
    let handle = LogHandle { filter: handle, now, floods: floods.clone(), unwritten: None, writer: Arc::default() };
    (Registry::default().with(filter).with(floods).with(lines), handle)
}

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
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What is written while `lines` runs.
    fn written(format: Format, level: Level, lines: impl FnOnce(&LogHandle)) -> String {
        let paper = Paper::default();
        let pen = paper.clone();
        let (subscriber, handle) = build(Settings { format, level, audit: false }, move || pen.clone(), false);
        tracing::subscriber::with_default(subscriber, || lines(&handle));
        let bytes = paper.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_library_never_says_more_than_warn() {
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
    fn a_quiet_log_quiets_the_libraries_too() {
        let text = written(Format::Text, Level::Error, |_| {
            tracing::warn!(target: "h2", "connection lost");
            tracing::warn!("renewal failed");
            tracing::error!("no store");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("no store"), "{text}");
    }

    #[test]
    fn the_level_can_be_changed_while_it_runs() {
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
    fn the_audit_log_is_on_or_off_whatever_the_level() {
        let text = written(Format::Text, Level::Trace, |handle| {
            tracing::info!(target: AUDIT_TARGET, "off");
            assert!(!tracing::event_enabled!(target: AUDIT_TARGET, tracing::Level::INFO), "so it costs nothing");
            handle.reconfigure(Settings { format: Format::Text, level: Level::Error, audit: true });
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
        let text = written(Format::Json, Level::Info, |_| tracing::info!(door = "proxy", "listening\non two lines"));
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["door"], "proxy");
        assert_eq!(line["message"], "listening\non two lines");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'), "{text}");
    }

    #[test]
    fn levels_are_read_as_they_are_written() {
        assert_eq!("loud".parse::<Level>(), Err(BadLevel));
        for level in Level::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
        }
    }
}
