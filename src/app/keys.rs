//! The keys that the configuration asks for.

use std::path::PathBuf;

use super::BuildError;
use crate::config::{Config, FernetKeys};
use crate::domain::secret::Secret;
use crate::store::keyring::Keyring;

/// The ring that the configuration asks for. In development a missing key is made beside the store.
pub fn keyring(config: &Config) -> Result<Keyring, BuildError> {
    let keys = match &config.fernet_keys {
        FernetKeys::Given(keys) => keys.clone(),
        FernetKeys::MakeBesideStore => vec![development_key(config)?],
    };
    Ok(Keyring::new(&keys)?)
}

/// The ring that the configuration asks for, if it exists: no key is created.
///
/// # Errors
/// [`BuildError`] if a key is unusable, or there is none.
pub fn existing_keyring(config: &Config) -> Result<Keyring, BuildError> {
    match &config.fernet_keys {
        FernetKeys::Given(keys) => Ok(Keyring::new(keys)?),
        FernetKeys::MakeBesideStore => {
            let path = key_file(config);
            let text = std::fs::read_to_string(&path).map_err(|source| BuildError::KeyFile { path, source })?;
            Ok(Keyring::new(&[Secret::new(text.trim())])?)
        }
    }
}

/// Where the key of development lies: beside the store.
pub fn key_file(config: &Config) -> PathBuf {
    let mut path = config.store.path.clone().into_os_string();
    path.push(".key");
    path.into()
}

fn development_key(config: &Config) -> Result<Secret, BuildError> {
    let path = key_file(config);
    let made = Keyring::read_or_create(&path);
    let (key, made) = made.map_err(|source| BuildError::KeyFile { path: path.clone(), source })?;
    if made {
        let path = path.display();
        tracing::warn!(%path, "no Fernet key is configured: one was made for development; keep it as long as the \
            store");
    }
    Ok(key)
}
