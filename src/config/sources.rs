//! The layers: file, environment, flags. Each says which keys it holds; figment lays one over the other and remembers
//! where each value came from.

use std::path::{Path, PathBuf};

use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Tag, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::errors::ConfigError;
use super::files;
use super::keys::{ACCOUNT, KEYS, Key, Kind};
use super::names::{self, Form};

/// Under this name the path of a file that holds a value is kept, in the place of the value. So a higher layer's value
/// replaces a lower layer's file, and the other way around. In no layer can a user write that.
const FILE: &str = "file";

/// What a problem with the file as a whole is filed under.
pub(super) const WHOLE_FILE: &str = "the configuration file";

/// Where a configuration is read from. Defaults lie below them all.
#[derive(Clone, Default)]
pub struct Sources {
    /// The TOML file of `--config`. Where it is absent, `ADSIDECAR_CONFIG` of `env` names the file, if anything does.
    pub file: Option<PathBuf>,
    /// The environment, as name and value. Other programs' names are ignored, but for those of outgoing proxies where a
    /// key refers to them.
    pub env: Vec<(String, String)>,
    /// The values of `--set`, split at the first `=`, in their order: of two for one key the later one applies.
    pub sets: Vec<(String, String)>,
}

impl Sources {
    /// The variables of this process's environment that are ours, and no other program's secrets. A value that is not
    /// UTF-8 has its foreign bytes replaced; where they matter, the value is refused for that.
    pub fn process_env() -> Vec<(String, String)> {
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| is_ours(name))
            .map(|(name, value)| (name, value.to_string_lossy().into_owned()))
            .collect()
    }
}

/// Whether a variable is meant for adsidecar, even if it is misspelled.
fn is_ours(name: &str) -> bool {
    name == names::CONFIG_VARIABLE
        || names::by_guide_name(name).is_some()
        || is_prefixed(name)
        || PROXIES.contains(&name)
        || EXCEPTIONS.contains(&name)
}

fn is_prefixed(name: &str) -> bool {
    name.starts_with(names::PREFIX) && name.contains("__")
}

/// The variables that name an outgoing proxy for HTTPS, as curl reads them: the first that is set applies.
const PROXIES: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
/// The variables that list the hosts to reach without it.
const EXCEPTIONS: [&str; 2] = ["no_proxy", "NO_PROXY"];

/// All layers in one, with the origin of each value.
pub(super) struct Merged {
    figment: Figment,
    root: Value,
    /// Those of [`PROXIES`] and [`EXCEPTIONS`] that are set.
    proxies: Vec<(String, String)>,
}

/// A value as it was given.
pub(super) enum Given<'a> {
    /// The value itself.
    Value(&'a Value),
    /// The path of a file that holds it.
    File(&'a str),
}

impl Merged {
    /// The given value of `key`, and its source.
    pub(super) fn get(&self, key: &str) -> Option<(Given<'_>, String)> {
        let value = self.root.find_ref(key)?;
        let given = match value.find_ref(FILE).and_then(Value::as_str) {
            Some(path) => Given::File(path),
            None => Given::Value(value),
        };
        Some((given, self.source(key)))
    }

    /// The outgoing proxy of the environment: the variable that names it, its URL, and the hosts to reach without it.
    pub(super) fn environment_proxy(&self) -> Option<(&str, &str, Option<&str>)> {
        let first = |names: &[&str]| {
            let set = |wanted: &&str| self.proxies.iter().find(|(name, _)| name == wanted);
            names.iter().find_map(set).map(|(name, value)| (name.as_str(), value.as_str()))
        };
        let (name, url) = first(&PROXIES)?;
        Some((name, url, first(&EXCEPTIONS).map(|(_, hosts)| hosts)))
    }

    /// Each file that a key names, whether it can be read or not.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let named = KEYS.iter().filter_map(|key| match self.get(key.name)?.0 {
            Given::File(path) => Some(PathBuf::from(path)),
            Given::Value(value) if key.kind == Kind::Certificates => value.as_str().map(PathBuf::from),
            Given::Value(_) => None,
        });
        named.collect()
    }

    /// The source of the value of `key`.
    fn source(&self, key: &str) -> String {
        self.figment.find_metadata(key).map(|metadata| metadata.name.to_string()).unwrap_or_default()
    }
}

/// The path of the TOML file, and the option or variable that names it.
fn asked_for(sources: &Sources) -> Option<(&Path, &str)> {
    let variable = sources.env.iter().find(|(name, value)| name == names::CONFIG_VARIABLE && !value.is_empty());
    match (&sources.file, variable) {
        (Some(path), _) => Some((path, "--config")),
        (None, Some((name, path))) => Some((Path::new(path), name)),
        (None, None) => None,
    }
}

/// The path of the TOML file.
pub(super) fn toml_file(sources: &Sources) -> Option<PathBuf> {
    asked_for(sources).map(|(path, _)| path.to_owned())
}

/// Reads all layers. Invalid entries are left out and recorded in `problems`.
pub(super) fn merge(sources: &Sources, problems: &mut Vec<ConfigError>) -> Merged {
    let mut figment = Figment::new();
    for layer in [file_layer(sources, problems), env_layer(&sources.env, problems), set_layer(&sources.sets, problems)]
    {
        for entry in settle(layer, problems) {
            figment = figment.merge(entry);
        }
    }
    let root = figment.find_value("").unwrap_or_else(|_| Value::from(Dict::new()));
    let listed = |name: &str| PROXIES.contains(&name) || EXCEPTIONS.contains(&name);
    let set = sources.env.iter().filter(|(name, value)| listed(name) && !value.trim().is_empty());
    Merged { figment, root, proxies: set.cloned().collect() }
}

/// One key in one layer.
struct Entry {
    name: &'static str,
    form: Form,
    value: Value,
    source: String,
}

impl Entry {
    fn new(key: &'static Key, form: Form, value: Value, source: impl Into<String>) -> Self {
        Self { name: key.name, form, value, source: source.into() }
    }
}

impl Provider for Entry {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.source.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let leaf = match self.form {
            Form::Value => self.value.clone(),
            Form::File => figment::util::nest(FILE, self.value.clone()),
        };
        let dict = figment::util::nest(self.name, leaf).into_dict().unwrap_or_default();
        Ok(Profile::Default.collect(dict))
    }
}

/// Within one layer a key has one form and one value.
fn settle(layer: Vec<Entry>, problems: &mut Vec<ConfigError>) -> Vec<Entry> {
    let mut settled: Vec<Entry> = Vec::new();
    for entry in layer {
        let Some(first) = settled.iter().find(|first| first.name == entry.name) else {
            settled.push(entry);
            continue;
        };
        let both = if first.source == entry.source {
            first.source.clone()
        } else {
            format!("{} and {}", first.source, entry.source)
        };
        if first.form != entry.form {
            problem(problems, entry.name, &both, "is given both as a value and as a file: keep one of the two");
        } else if first.value != entry.value {
            problem(problems, entry.name, &both, "is given twice and differs: make both the same, or keep one");
        }
    }
    settled
}

fn problem(problems: &mut Vec<ConfigError>, key: &str, source: &str, message: impl Into<String>) {
    problems.push(ConfigError { key: key.to_owned(), source: Some(source.to_owned()), message: message.into() });
}

// The file.

fn file_layer(sources: &Sources, problems: &mut Vec<ConfigError>) -> Vec<Entry> {
    let Some((path, asked_by)) = asked_for(sources) else { return Vec::new() };
    let text = match files::read(path) {
        Ok(text) => text,
        Err(message) => {
            let message = match sources.file {
                // A path on the command line is no secret: it stands in the list of processes.
                Some(_) => message.replacen(files::NOT_REPEATED, &format!("the file {}", path.display()), 1),
                None => message,
            };
            problem(problems, WHOLE_FILE, asked_by, message);
            return Vec::new();
        }
    };
    let source = path.display().to_string();
    match Toml::from_str::<Dict>(&text) {
        Ok(dict) => file_entries(dict, &source, problems),
        Err(error) => {
            let place = error.span().map(|span| position(&text, span.start)).unwrap_or_default();
            // The parser's own message quotes the line, and the line may hold a secret.
            let message = if error.message().starts_with("duplicate key") {
                format!("a key or section stands there a second time{place}: keep one of the two")
            } else {
                format!("is not valid TOML{place}: check the quotes and brackets there")
            };
            problem(problems, WHOLE_FILE, &source, message);
            Vec::new()
        }
    }
}

/// `, line 3, column 7`, counted as editors do.
fn position(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
    format!(", line {line}, column {column}")
}

fn file_entries(dict: Dict, source: &str, problems: &mut Vec<ConfigError>) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (section, value) in dict {
        match value {
            value @ Value::Array(..) if section == ACCOUNT => {
                entries.push(Entry { name: ACCOUNT, form: Form::Value, value, source: source.to_owned() });
            }
            _ if section == ACCOUNT => {
                problem(problems, ACCOUNT, source, "is no list: begin each account with [[account]]");
            }
            Value::Dict(_, dict) if names::is_section(&section) => {
                for (key, value) in dict {
                    file_entry(format!("{section}.{key}"), value, source, &mut entries, problems);
                }
            }
            _ if names::is_section(&section) => {
                problem(problems, &section, source, format!("is a section: write [{section}], its keys below"));
            }
            // A key in quotes may hold a dot, and is then no key of a section.
            value if !section.contains('.') && names::by_name(&section).is_some() => {
                file_entry(section, value, source, &mut entries, problems);
            }
            _ => unknown(problems, &section, source, names::likely_section(&section)),
        }
    }
    entries
}

fn file_entry(name: String, value: Value, source: &str, entries: &mut Vec<Entry>, problems: &mut Vec<ConfigError>) {
    match names::by_name(&name) {
        None => unknown(problems, &name, source, names::likely_name(&name)),
        Some((key, _)) if matches!(value, Value::Dict(..)) => {
            problem(problems, key.name, source, "is a table: give a value, and a secret's file as <key>_file");
        }
        Some((key, Form::File)) if value.as_str().is_none() => {
            problem(problems, key.name, source, "its file is not a text: write the path in quotes");
        }
        Some((key, form)) => entries.push(Entry::new(key, form, value, source)),
    }
}

fn unknown(problems: &mut Vec<ConfigError>, name: &str, source: &str, likely: Option<String>) {
    let cure = match likely {
        Some(likely) => format!("is no key: did you mean {likely}?"),
        None => "is no key: remove it, or see config/example.toml for all there are".to_owned(),
    };
    problem(problems, &names::printable(name), source, cure);
}

// The environment and the flags: text, parsed later by the key's type.

fn env_layer(env: &[(String, String)], problems: &mut Vec<ConfigError>) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (name, value) in env {
        if let Some((key, form)) = names::by_guide_name(name) {
            // Compose files and manifests pass unset variables with an empty value.
            if !value.trim().is_empty() {
                entries.push(Entry::new(key, form, text(value), name));
            }
        } else if is_prefixed(name) {
            env_entry(name, value, &mut entries, problems);
        }
    }
    entries
}

fn env_entry(name: &str, value: &str, entries: &mut Vec<Entry>, problems: &mut Vec<ConfigError>) {
    match names::by_variable(name) {
        Some((key, _)) if value.trim().is_empty() => {
            // Not ignored: an empty caller token that counts as none would accept every caller, although a token was
            // meant to be set.
            problem(problems, key.name, name, "is empty: give it a value, or remove the variable");
        }
        Some((key, form)) => entries.push(Entry::new(key, form, text(value), name)),
        None if name.starts_with("ADSIDECAR_ACCOUNT__") => {
            problem(problems, ACCOUNT, &names::printable(name), ACCOUNTS_IN_FILE);
        }
        None if name == "ADSIDECAR__ENVIRONMENT" => {
            problem(problems, "environment", name, "is no key: the variable is ENVIRONMENT alone");
        }
        None => unknown(problems, name, "the environment", names::likely_variable(name)),
    }
}

const ACCOUNTS_IN_FILE: &str = "accounts are set in the file only: write them there as [[account]]";

fn set_layer(sets: &[(String, String)], problems: &mut Vec<ConfigError>) -> Vec<Entry> {
    const SOURCE: &str = "--set";
    let mut entries: Vec<Entry> = Vec::new();
    for (name, value) in sets {
        match names::by_name(name) {
            Some((key, _)) if value.trim().is_empty() => {
                problem(problems, key.name, SOURCE, "is empty: give it a value, or leave the flag away");
            }
            Some((key, form)) => {
                entries.retain(|earlier| (earlier.name, earlier.form) != (key.name, form));
                entries.push(Entry::new(key, form, text(value), SOURCE));
            }
            None if name == ACCOUNT || name.starts_with("account.") || name.starts_with("account[") => {
                problem(problems, ACCOUNT, SOURCE, ACCOUNTS_IN_FILE);
            }
            None => unknown(problems, name, SOURCE, names::likely_name(name)),
        }
    }
    entries
}

fn text(value: &str) -> Value {
    Value::String(Tag::Default, value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_others_are_not_ours() {
        for foreign in ["PATH", "AMAZON_MARKETPLACE", "ADSIDECAR_PORT", "ADSIDECAR_ENVIRONMENT", "MY_FERNET_KEY", ""] {
            assert!(!is_ours(foreign), "{foreign}");
        }
        for ours in ["ADSIDECAR_CONFIG", "ADSIDECAR_LOG__LEVEL", "ADSIDECAR_NO__KEY", "FERNET_KEY", "ENVIRONMENT_FILE"]
        {
            assert!(is_ours(ours), "{ours}");
        }
    }

    #[test]
    fn positions_are_counted_as_editors_do() {
        let text = "a = 1\nä = é\n";
        assert_eq!(position(text, 0), ", line 1, column 1");
        assert_eq!(position(text, text.find('é').unwrap()), ", line 2, column 5");
        assert_eq!(position(text, text.len() + 9), ", line 3, column 1");
    }
}
