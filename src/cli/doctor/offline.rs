//! The checks that need neither network nor a running sidecar: configuration, secrets, store, callers, Kubernetes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::findings::{Finding, Group};
use crate::app;
use crate::config::{self, Config, ConfigError, Sources};
use crate::domain::account::Context;
use crate::domain::found_account::marketplace;
use crate::server::Listen;
use crate::store::{self, StoreError, TokenStore};

/// Shortest caller token that does not invite guessing.
const SHORT_TOKEN: usize = 16;

/// Loads the configuration. Problems become findings.
pub(super) fn configuration(sources: &Sources, findings: &mut Vec<Finding>) -> Option<Config> {
    let config = match config::load(sources) {
        Ok(config) => config,
        Err(problems) => {
            findings.extend(problems.iter().map(problem));
            return None;
        }
    };
    // Ids of accounts have a check of their own.
    let doubts: Vec<_> = config.warnings.iter().filter(|doubt| !doubt.key.starts_with("[[account]]")).collect();
    if doubts.is_empty() {
        findings.push(Finding::ok(Group::Configuration, "configuration", "every value is understood"));
    }
    for doubt in doubts {
        findings.push(Finding::wrong("config_doubtful", doubt, doubt.key.clone()));
    }
    Some(config)
}

fn problem(problem: &ConfigError) -> Finding {
    let (key, text) = (problem.key.as_str(), problem.to_string());
    let base = key.strip_suffix("_file").unwrap_or(key);
    let is_secret = config::keys::KEYS.iter().any(|row| row.name == base && row.is_secret());
    let is_file = ["does not exist", "may not be read", "is a directory", "cannot be read", "holds nothing"];
    let code = match base {
        "store.fernet_keys" if text.contains("missing") => "fernet_key_missing",
        _ if is_secret && is_file.iter().any(|sign| text.contains(sign)) => "secret_file_unreadable",
        "store.fernet_keys" => "fernet_key_malformed",
        "amazon.client_id" => "config_client_id",
        "amazon.client_secret" => "config_client_secret",
        "amazon.redirect_uri" => "config_redirect_uri",
        "proxy.listen" | "login.listen" | "admin.listen" => "config_listen",
        _ if key.starts_with("[[account]]") => "config_account",
        _ if text.contains("is no key") => "config_unknown_key",
        "the configuration file" => "config_file",
        _ => "config_value",
    };
    let cure = match code {
        "fernet_key_missing" | "fernet_key_malformed" => "export FERNET_KEY=$(adsidecar key new)".to_owned(),
        "config_file" => "adsidecar check --config FILE".to_owned(),
        _ => key.to_owned(),
    };
    Finding::wrong(code, text, cure)
}

/// The files with secrets: who can read them.
pub(super) fn secrets(sources: &Sources, config: &Config, findings: &mut Vec<Finding>) {
    let before = findings.len();
    for file in config::files(sources).into_iter().chain([app::key_file(config)]) {
        let Ok(meta) = fs::metadata(&file) else { continue };
        let is_certificate = file.extension().is_some_and(|kind| kind == "pem" || kind == "crt");
        if meta.permissions().mode() & 0o077 != 0 && !is_certificate && holds_secrets(&file) {
            let shown = file.display();
            let cause = format!("{shown} holds secrets, and its mode is {:04o}", meta.permissions().mode() & 0o7777);
            findings.push(Finding::wrong("secret_file_open", cause, format!("chmod 600 {shown}")));
        }
    }
    if findings.len() == before {
        findings.push(Finding::ok(
            Group::Secrets,
            "secrets",
            "the Fernet keys are well-formed, and no file is open to others",
        ));
    }
}

/// Whether a file of the configuration holds a secret: the TOML file only if it sets one.
fn holds_secrets(file: &Path) -> bool {
    let Ok(text) = fs::read_to_string(file) else { return true };
    let is_toml = file.extension().is_some_and(|kind| kind == "toml");
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().trim().to_owned();
    let names: Vec<_> = config::keys::KEYS.iter().filter(|row| row.is_secret()).map(|row| last(row.name)).collect();
    let sets = |line: &str| {
        let Some((key, value)) = line.split_once('=') else { return false };
        // The URL of a proxy is one only if it holds a password.
        names.contains(&last(key)) && (last(key) != "proxy" || value.contains('@'))
    };
    !is_toml || text.lines().any(sets)
}

/// The store, opened as a copy: the original is not touched.
pub(super) async fn store(config: &Config, sidecar_runs: bool, findings: &mut Vec<Finding>) {
    let settings = &config.store;
    if sidecar_runs && settings.postgres.is_none() {
        findings.push(Finding::skipped(Group::Store, "store", "the running sidecar holds it; its readiness tells"));
        return;
    }
    let Ok(keyring) = app::existing_keyring(config) else {
        findings.push(Finding::skipped(
            Group::Store,
            "store",
            "there is no Fernet key yet: the first start creates one",
        ));
        return;
    };
    if settings.postgres.is_some() {
        findings.push(match TokenStore::open(settings, Arc::new(keyring)) {
            Ok((store, opened)) => {
                let _ = store.close().await;
                records(&opened)
            }
            Err(error) => opening(&error, "store.postgres_url"),
        });
        return;
    }
    let mirror = with_suffix(&settings.path, ".copies");
    if is_locked(&mirror.join("lock")) {
        let cause = format!("{} is in use by a process that does not answer at proxy.listen", settings.path.display());
        findings.push(Finding::wrong("store_held", cause, "adsidecar doctor --config FILE of that process"));
        return;
    }
    if let Err(error) = writable(&settings.path) {
        let cause = format!("{}: {error}", settings.path.display());
        findings.push(Finding::wrong("store_unwritable", cause, "store.path"));
        return;
    }
    if !settings.path.exists() && !mirror.exists() {
        findings.push(Finding::ok(Group::Store, "store", "there is none yet: the first start creates it"));
        return;
    }
    findings.push(match Copy::of(&settings.path, &mirror) {
        Ok(copy) => {
            let copied = store::Settings { path: copy.path(), postgres: None };
            match TokenStore::open(&copied, Arc::new(keyring)) {
                Ok((store, opened)) => {
                    let _ = store.close().await;
                    records(&opened)
                }
                Err(error) => opening(&error, "store.path"),
            }
        }
        Err(error) => Finding::wrong("store_unwritable", format!("{}: {error}", settings.path.display()), "store.path"),
    });
}

fn records(opened: &store::Opened) -> Finding {
    let unreadable: Vec<_> =
        opened.users.iter().filter(|(_, grant)| grant.is_err()).map(|(user, _)| user.as_str()).collect();
    if !unreadable.is_empty() {
        let cause = format!("no configured key opens the records of {}", unreadable.join(", "));
        return Finding::wrong("store_records_unreadable", cause, "store.fernet_keys");
    }
    if opened.recovered.is_some() || opened.restored > 0 || !opened.unreadable_mirror_files.is_empty() {
        let cause = format!("the database is damaged; {} grants are restored from the mirror", opened.restored);
        return Finding::wrong("store_damaged", cause, "adsidecar serve");
    }
    Finding::ok(Group::Store, "store", format!("{} grants, all readable", opened.users.len()))
}

fn opening(error: &StoreError, key: &'static str) -> Finding {
    match error {
        StoreError::WrongKey { .. } => Finding::wrong("store_key_wrong", error, "store.fernet_keys"),
        StoreError::Postgres { .. } | StoreError::UnsupportedSchema { .. } => {
            Finding::wrong("store_postgres", error, "store.postgres_url")
        }
        StoreError::Locked { .. } => Finding::wrong("store_held", error, "adsidecar doctor --config FILE"),
        StoreError::UnusableDatabase { .. } => Finding::wrong("store_unusable", error, key),
        _ => Finding::wrong("store_unwritable", error, key),
    }
}

/// Whether a process holds the lock. A lock that is taken for this question is released at once.
fn is_locked(lock: &Path) -> bool {
    fs::File::open(lock).is_ok_and(|file| matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
}

/// Whether the store can be created or written, by the nearest directory that exists.
fn writable(path: &Path) -> std::io::Result<()> {
    let absolute = std::path::absolute(path)?;
    let nearest = absolute.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
    let probe = nearest.join(format!(".adsidecar-doctor-{}", std::process::id()));
    if !nearest.is_dir() {
        return Err(std::io::Error::other(format!("{} is no directory", nearest.display())));
    }
    fs::File::create_new(&probe)?;
    fs::remove_file(&probe)
}

/// A private copy of a store, deleted when it is dropped.
struct Copy(PathBuf);

impl Copy {
    fn of(store: &Path, mirror: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let random = getrandom::u64().map_err(|error| std::io::Error::other(error.to_string()))?;
        let root = std::env::temp_dir().join(format!("adsidecar-doctor-{random:016x}"));
        fs::DirBuilder::new().mode(0o700).create(&root)?;
        let copy = Self(root);
        for (from, to) in [(store.to_owned(), copy.path()), (mirror.to_owned(), with_suffix(&copy.path(), ".copies"))] {
            if from.exists() {
                copy_tree(&from, &to)?;
            }
        }
        Ok(copy)
    }

    fn path(&self) -> PathBuf {
        self.0.join("store")
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What is left is encrypted, and readable for this user only.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (source, target) =
            (entry.as_ref().map(fs::DirEntry::path), entry.as_ref().map(|entry| to.join(entry.file_name())));
        let (Ok(source), Ok(target)) = (source, target) else { continue };
        if source.is_dir() { copy_tree(&source, &target)? } else { fs::copy(&source, &target).map(drop)? }
    }
    Ok(())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The ids of the accounts: each under the key that fits its form.
pub(super) fn account_ids(config: &Config, findings: &mut Vec<Finding>) {
    for account in &config.proxy.accounts {
        for context in Context::ALL {
            let Some(id) = account.ids.get(context).and_then(|id| id.to_str().ok()) else { continue };
            if let Some(doubt) = crate::domain::found_account::doubtful_id(context, id) {
                let cause = format!("account {}: {} = {id}: {doubt}", account.name, context.key());
                findings.push(Finding::wrong(
                    "account_id_kind",
                    cause,
                    format!("{} of the account {}", context.key(), account.name),
                ));
            }
        }
        let place = account.ids.get(Context::Marketplace).and_then(|id| marketplace(id.to_str().ok()?));
        let region = account.region.unwrap_or(config.proxy.region);
        if let Some((country, home)) = place.filter(|(_, home)| *home != region) {
            let cause = format!(
                "account {}: its marketplace is that of {country}, in the region {home}, and its region is {region}",
                account.name
            );
            findings.push(Finding::wrong(
                "account_region",
                cause,
                format!("region = \"{home}\" of the account {}", account.name),
            ));
        }
    }
}

/// What callers need, as far as the configuration tells.
pub(super) fn callers(config: &Config, findings: &mut Vec<Finding>) {
    if config.admission.caller_tokens.iter().any(|token| token.expose().len() < SHORT_TOKEN) {
        let cause = format!("a caller token has fewer than {SHORT_TOKEN} characters");
        findings.push(Finding::wrong("caller_token_short", cause, "proxy.caller_token (openssl rand -hex 32)"));
    }
    let has_socket = config.proxy_listen.iter().any(|listen| matches!(listen, Listen::Unix(_)));
    let open = config.admission.caller_tokens.is_empty() && config.admission.peer_uids.is_empty();
    if has_socket && open && config.socket_mode & 0o006 != 0 {
        let cause =
            format!("the socket's mode is {:04o}, with neither proxy.peer_uids nor a caller token", config.socket_mode);
        findings.push(Finding::wrong("socket_open", cause, "proxy.socket_mode = \"0660\""));
    }
}

/// What is particular to a pod.
pub(super) fn kubernetes(config: &Config, findings: &mut Vec<Finding>) {
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
        findings.push(Finding::skipped(Group::Kubernetes, "pod", "this is no pod"));
        return;
    }
    let before = findings.len();
    let nearest = std::path::absolute(&config.store.path)
        .ok()
        .and_then(|path| path.ancestors().find_map(|place| fs::metadata(place).ok()));
    let root = fs::metadata("/").ok();
    let on_volume = nearest.zip(root).is_some_and(|(place, root)| place.dev() != root.dev());
    if config.store.postgres.is_none() && !on_volume {
        let cause = format!("{} lies on the container's own file system", config.store.path.display());
        findings.push(Finding::wrong("pod_store_ephemeral", cause, "store.path on a mounted volume"));
    }
    if rustix::process::geteuid().is_root() {
        findings.push(Finding::wrong(
            "pod_root",
            "the process runs as root, which nothing here needs",
            "securityContext.runAsNonRoot: true",
        ));
    }
    let loopback = |listen: &Listen| match listen {
        Listen::Tcp(address) => ["127.", "localhost", "[::1]"].iter().any(|start| address.starts_with(start)),
        Listen::Unix(_) => true,
    };
    if !config.admin_listen.is_empty() && config.admin_listen.iter().all(loopback) {
        let cause = "the admin listener is on loopback: httpGet probes of the kubelet do not reach it, exec probes do";
        findings.push(Finding::wrong(
            "pod_probe",
            cause,
            "exec: [adsidecar, health], or admin.listen = \"0.0.0.0:9464\"",
        ));
    }
    if findings.len() == before {
        findings.push(Finding::ok(Group::Kubernetes, "pod", "store, user and probes suit a pod"));
    }
}
