//! The problems of a configuration, reported all at once.

use std::fmt;

/// One problem, where it is and how to fix it. Never holds a configured value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The key, such as `refresh.margin`, or the unknown name that was used as one.
    pub key: String,
    /// Where the value came from: the file's path, the environment variable's name, `--set`. `None`: the
    /// key is missing.
    pub source: Option<String>,
    /// What is wrong, and how to fix it.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{} (from {source}): {}", self.key, self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// All problems of a configuration; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub(super) Vec<ConfigError>);

impl ConfigErrors {
    /// The problems, in the order in which they were found.
    pub fn iter(&self) -> std::slice::Iter<'_, ConfigError> {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a ConfigErrors {
    type Item = &'a ConfigError;
    type IntoIter = std::slice::Iter<'a, ConfigError>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0.len() == 1 { "" } else { "s" };
        write!(f, "{} problem{plural} in the configuration:", self.0.len())?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
    }
}

impl std::error::Error for ConfigErrors {}
