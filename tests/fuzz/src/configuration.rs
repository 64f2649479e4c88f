//! A configuration file, with values in the environment and as flags: it resolves, or all problems are told, and none
//! of them holds a value.

use std::path::PathBuf;
use std::sync::OnceLock;

use adsidecar::config::{self, Sources};
use arbitrary::{Arbitrary, Unstructured};

/// In every value, and in no name.
const CANARY: &str = "Cn4ry7Kp";

pub fn check(bytes: &[u8]) {
    let Ok(input) = <(&str, Vec<(u8, &str)>)>::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    let (toml, values) = input;
    // A file that names files would read whatever lies there.
    if toml.contains(CANARY) || toml.contains("_file") {
        return;
    }
    let file = FILE.get_or_init(|| std::env::temp_dir().join(format!("adsidecar-fuzz-{}.toml", std::process::id())));
    std::fs::write(file, toml).unwrap();
    let mut sources = Sources { file: Some(file.clone()), ..Sources::default() };
    for (which, value) in values.into_iter().take(8) {
        let value = format!("{value}{CANARY}");
        match which % 10 {
            0 => sources.env.push(("AMAZON_CLIENT_SECRET".into(), value)),
            1 => sources.env.push(("AMAZON_REFRESH_TOKEN".into(), value)),
            2 => sources.env.push(("FERNET_KEY".into(), value)),
            3 => sources.env.push(("ADSIDECAR_PROXY__CALLER_TOKEN".into(), value)),
            4 => sources.env.push(("ADSIDECAR_AMAZON__CLIENT_SECRET".into(), value)),
            5 => sources.sets.push(("amazon.client_id".into(), value)),
            6 => sources.sets.push(("proxy.allowed_hosts".into(), value)),
            7 => sources.sets.push(("store.fernet_keys".into(), value)),
            8 => sources.sets.push(("refresh.margin".into(), value)),
            _ => sources.sets.push(("amazon.redirect_uri".into(), value)),
        }
    }
    match config::load(&sources) {
        Ok(config) => assert!(!format!("{:?}", config.lwa.client_secrets).contains(CANARY)),
        Err(problems) => {
            assert!(problems.iter().next().is_some());
            assert!(!problems.to_string().contains(CANARY), "{problems}");
        }
    }
}
