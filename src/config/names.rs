//! The names of the keys: in the file, in `--set`, in the environment; and what a misspelled one was meant to be.

use super::keys::{ACCOUNT, ACCOUNT_KEYS, KEYS, Key};

/// The only `ADSIDECAR_*` name without a double underscore that has a meaning: the path of the file.
pub(super) const CONFIG_VARIABLE: &str = "ADSIDECAR_CONFIG";

/// Begins the environment name of every key.
pub(super) const PREFIX: &str = "ADSIDECAR_";

/// Ends the name of the key, or of the environment variable, that gives the path of a file with the value.
const FILE_SUFFIX: &str = "_file";
const FILE_SUFFIX_VARIABLE: &str = "_FILE";

/// Which of its two forms a key is given in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The value itself.
    Value,
    /// The path of a file that holds the value.
    File,
}

/// The row of the key `name`, which is one of the table's.
pub(super) fn row(name: &str) -> &'static Key {
    KEYS.iter().find(|key| key.name == name).expect("resolve reads only keys of the table")
}

/// `ADSIDECAR_SECTION__KEY`; `None` for the one key without a section, which has its name of the guide only.
fn full_variable(key: &Key) -> Option<String> {
    key.name.contains('.').then(|| format!("{PREFIX}{}", key.name.replace('.', "__").to_ascii_uppercase()))
}

/// The key that is called `name` in the file and in `--set`.
pub(super) fn by_name(name: &str) -> Option<(&'static Key, Form)> {
    KEYS.iter().find_map(|key| match name.strip_prefix(key.name)? {
        "" => Some((key, Form::Value)),
        FILE_SUFFIX if key.is_secret() => Some((key, Form::File)),
        _ => None,
    })
}

/// Whether `name` is a section. All keys but `environment` and those of an account belong to one.
pub(super) fn is_section(name: &str) -> bool {
    sections().any(|section| section == name)
}

fn sections() -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter_map(|key| Some(key.name.split_once('.')?.0))
}

/// The key that is called `variable` in the environment, by its full name.
pub(super) fn by_variable(variable: &str) -> Option<(&'static Key, Form)> {
    KEYS.iter().find_map(|key| match variable.strip_prefix(&full_variable(key)?)? {
        "" => Some((key, Form::Value)),
        FILE_SUFFIX_VARIABLE if key.is_secret() => Some((key, Form::File)),
        _ => None,
    })
}

/// The key that Amazon's guide calls `variable`. Each of these names has its `_FILE`, secret or not.
pub(super) fn by_guide_name(variable: &str) -> Option<(&'static Key, Form)> {
    KEYS.iter().find_map(|key| match variable.strip_prefix(key.guide_name?)? {
        "" => Some((key, Form::Value)),
        FILE_SUFFIX_VARIABLE => Some((key, Form::File)),
        _ => None,
    })
}

/// The key of the file that `name` was probably meant to be.
pub(super) fn likely_name(name: &str) -> Option<String> {
    let file = KEYS.iter().filter(|key| key.is_secret()).map(|key| format!("{}{FILE_SUFFIX}", key.name));
    closest(name, KEYS.iter().map(|key| key.name.to_owned()).chain(file))
}

/// The section of the file, or the key outside all sections, that `name` was probably meant to be.
pub(super) fn likely_section(name: &str) -> Option<String> {
    let likely = closest(name, sections().chain(["environment", ACCOUNT]).map(str::to_owned))?;
    Some(match likely.as_str() {
        "environment" => likely,
        ACCOUNT => format!("[[{ACCOUNT}]]"),
        section => format!("[{section}]"),
    })
}

/// The environment variable that `variable` was probably meant to be.
pub(super) fn likely_variable(variable: &str) -> Option<String> {
    let file = KEYS.iter().filter(|key| key.is_secret()).filter_map(full_variable).map(|v| v + FILE_SUFFIX_VARIABLE);
    closest(variable, KEYS.iter().filter_map(full_variable).chain(file))
}

/// The key of an account that `name` was probably meant to be.
pub(super) fn likely_account_key(name: &str) -> Option<String> {
    closest(name, ACCOUNT_KEYS.iter().map(|key| key.name.to_owned()))
}

/// `name` as it may be printed: text that does not look like a name may be a secret, and is not repeated.
pub(super) fn printable(name: &str) -> String {
    // The words of our names have at most 11 letters; a secret has longer runs of them.
    let words = name.split(['.', '_', '-']);
    let looks_like_a_name = name.len() <= 64
        && !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && words.into_iter().all(|word| word.len() <= 20);
    if looks_like_a_name { name.to_owned() } else { "a name that is not repeated here".to_owned() }
}

/// The candidate that differs from `name` in the fewest letters, if these are few.
fn closest(name: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    // A name that differs in more than a third of its letters is another name. No name of ours has 64 letters.
    let limit = if name.len() <= 64 { (name.len() / 3).min(4) } else { 0 };
    candidates
        .map(|candidate| (strsim::levenshtein(name, &candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_key_is_found_under_no_name() {
        for name in ["", "amazon", "amazon.", "amazon.client_id_file", "client_id", "proxy.listen_file", "account.name"]
        {
            assert!(by_name(name).is_none(), "{name}");
        }
        for variable in ["ADSIDECAR_ENVIRONMENT", "ADSIDECAR__ENVIRONMENT", "ADSIDECAR_PROXY__LISTEN_FILE"] {
            assert!(by_variable(variable).is_none(), "{variable}");
        }
        for variable in ["", "AMAZON_CLIENT", "AMAZON_CLIENT_ID_FILES", "FERNET_KEYS"] {
            assert!(by_guide_name(variable).is_none(), "{variable}");
        }
    }

    #[test]
    fn a_key_is_found_under_each_of_its_names() {
        let found = |hit: Option<(&'static Key, Form)>| hit.map(|(key, form)| (key.name, form));
        assert_eq!(found(by_name("store.fernet_keys")), Some(("store.fernet_keys", Form::Value)));
        assert_eq!(found(by_name("store.fernet_keys_file")), Some(("store.fernet_keys", Form::File)));
        assert_eq!(found(by_variable("ADSIDECAR_LOG__LEVEL")), Some(("log.level", Form::Value)));
        let file = by_variable("ADSIDECAR_PROXY__CALLER_TOKEN_FILE");
        assert_eq!(found(file), Some(("proxy.caller_token", Form::File)));
        assert_eq!(found(by_guide_name("FRONTEND_URL_FILE")), Some(("login.frontend_url", Form::File)));
        assert_eq!(found(by_guide_name("ENVIRONMENT")), Some(("environment", Form::Value)));
    }

    #[test]
    fn a_misspelling_finds_its_key_and_another_word_finds_none() {
        assert_eq!(likely_name("amazon.clientsecret").as_deref(), Some("amazon.client_secret"));
        assert_eq!(likely_name("amazon.client-secret-file").as_deref(), Some("amazon.client_secret_file"));
        assert_eq!(likely_name("proxy.colour"), None);
        assert_eq!(likely_variable("ADSIDECAR_PROXY__LISTENS").as_deref(), Some("ADSIDECAR_PROXY__LISTEN"));
        assert_eq!(likely_variable("ADSIDECAR_SERVICE__HOST"), None);
        assert_eq!(likely_account_key("profileid").as_deref(), Some("profile_id"));
    }
}
