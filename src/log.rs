//! Log lines on standard error.

/// How the log looks.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `log.format`; default `json` in production, `text` in development.
    pub format: Format,
    /// `log.level`.
    pub level: Level,
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
