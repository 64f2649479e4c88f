//! The configuration as a whole: layers, refusals, the files that ship.

use std::path::Path;

use proptest::prelude::*;

use super::keys::{ACCOUNT_KEYS, KEYS};
use super::*;
use crate::domain::account::{Context, Region};
use crate::domain::grant::RefreshToken;

/// Stands in each place that a secret, or what was mistaken for one, can stand in.
const CANARY: &str = "canary-9f3a";

const FERNET_KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";

/// What a first start needs, by the names of Amazon's guide.
const REQUIRED: [(&str, &str); 3] =
    [("AMAZON_CLIENT_ID", "id"), ("AMAZON_CLIENT_SECRET", "secret"), ("FERNET_KEY", FERNET_KEY)];

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// Sources with this file, this environment beside the required names, and these flags.
struct Given {
    dir: tempfile::TempDir,
    sources: Sources,
}

impl Given {
    fn nothing() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), sources: Sources::default() }
    }

    fn required() -> Self {
        Self::nothing().env(&REQUIRED)
    }

    fn toml(mut self, text: &str) -> Self {
        self.sources.file = Some(self.write("adsidecar.toml", text).into());
        self
    }

    fn env(mut self, env: &[(&str, &str)]) -> Self {
        for (name, value) in pairs(env) {
            self.sources.env.retain(|(earlier, _)| *earlier != name);
            self.sources.env.push((name, value));
        }
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.sources.env.retain(|(earlier, _)| earlier != name);
        self
    }

    fn set(mut self, sets: &[(&str, &str)]) -> Self {
        self.sources.sets.extend(pairs(sets));
        self
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn load(&self) -> Result<Config, ConfigErrors> {
        load(&self.sources)
    }

    fn config(&self) -> Config {
        self.load().unwrap_or_else(|problems| panic!("{problems}"))
    }

    /// The problems as they are shown, without a canary in any form of them.
    fn refused(&self) -> String {
        let problems = self.load().expect_err("a refusal");
        let shown = problems.to_string();
        assert!(!format!("{shown}{problems:?}").contains(CANARY), "{shown}");
        shown
    }
}

/// Asserts that `given` has exactly one problem, whose text holds each of `parts`.
fn one_problem(given: &Given, parts: &[&str]) {
    let shown = given.refused();
    assert!(shown.starts_with("1 problem in the configuration:"), "{shown}");
    for part in parts {
        assert!(shown.contains(part), "{part:?} is not in: {shown}");
    }
}

// What is missing.

#[test]
fn a_first_start_is_told_all_that_it_needs() {
    assert_eq!(
        Given::nothing().refused(),
        "3 problems in the configuration:\n  \
         - missing client id: set amazon.client_id (environment: AMAZON_CLIENT_ID)\n  \
         - missing client secret: set amazon.client_secret or amazon.client_secret_file (environment: \
         AMAZON_CLIENT_SECRET)\n  \
         - missing Fernet key: set store.fernet_keys or store.fernet_keys_file (environment: FERNET_KEY); \
         `adsidecar key new` makes one"
    );
}

#[test]
fn empty_names_of_the_guide_count_as_unset() {
    let given = Given::required().env(&[("AMAZON_CLIENT_SECRET", ""), ("AMAZON_CLIENT_SECRET_FILE", " ")]);
    one_problem(&given, &["missing client secret"]);
    let empty = [("FRONTEND_URL", ""), ("ENVIRONMENT", ""), ("AMAZON_REFRESH_TOKEN", ""), ("AMAZON_SCOPE", "")];
    assert_eq!(debug(&Given::required().env(&empty)), debug(&Given::required()));
}

#[test]
fn a_file_that_cannot_be_read_hides_what_it_may_hold() {
    let given = Given::nothing().toml(&format!("[amazon]\nclient_secret = \"{CANARY}\nclient_id = \"x\""));
    one_problem(&given, &["the configuration file (from /", "is not valid TOML, line 2, column "]);
    let given = Given::nothing().toml(&format!("[amazon]\nclient_secret = {CANARY}"));
    one_problem(&given, &["is not valid TOML, line 2, column "]);
    let twice = format!("[amazon]\nclient_secret = \"{CANARY}\"\nclient_secret = \"{CANARY}\"");
    one_problem(&Given::nothing().toml(&twice), &["stands there a second time, line 3"]);

    let mut given = Given::nothing();
    given.sources.file = Some(given.dir.path().join("none.toml"));
    one_problem(&given, &["the configuration file (from --config)", "none.toml does not exist"]);
    let given = Given::nothing().env(&[("ADSIDECAR_CONFIG", "/none.toml")]);
    one_problem(&given, &["(from ADSIDECAR_CONFIG)", "/none.toml does not exist"]);
}

// The corpus: each a file, a key that the refusal names, and a part of its cure.

/// Files that hold the required keys beside these lines are refused for these keys, with this cure.
const BAD_FILES: &[(&str, &str, &str)] = &[
    ("colour = 'canary-9f3a'", "colour", "is no key"),
    ("listen = 'canary-9f3a'", "listen", "is no key"),
    ("'amazon.scope' = 'canary-9f3a'", "amazon.scope", "is no key"),
    ("environment = 'canary-9f3a'", "environment", "`production` or `development`"),
    ("environment = ['production']", "environment", "single text"),
    ("proxy = 'canary-9f3a'", "proxy", "write [proxy]"),
    ("account = 'canary-9f3a'", "account", "[[account]]"),
    ("[environment]\nx = 'canary-9f3a'", "environment", "is a table"),
    ("[prox]\nlisten = 'canary-9f3a'", "prox", "did you mean [proxy]?"),
    ("[colours]", "colours", "is no key"),
    ("[account]\nname = 'canary-9f3a'", "account", "[[account]]"),
    ("[account]\nfile = 'canary-9f3a'", "account", "[[account]]"),
    ("account = [1, 'canary-9f3a']", "account", "[[account]]"),
    ("[proxy]\nlistens = 'canary-9f3a'", "proxy.listens", "did you mean proxy.listen?"),
    ("[proxy]\nlisten_file = 'canary-9f3a'", "proxy.listen_file", "is no key"),
    ("[proxy]\nlisten = 'canary-9f3a'", "proxy.listen", "host:port"),
    ("[proxy]\nlisten = 8001", "proxy.listen", "host:port"),
    ("[proxy]\nlisten = [8001]", "proxy.listen", "in quotes"),
    ("[proxy]\nlisten = []", "proxy.listen", "is empty"),
    ("[proxy]\nlisten = '0.0.0.0:8001'", "proxy.listen", "proxy.allow_remote = true, and proxy.caller_token"),
    ("[proxy]\nlisten = '[::]:8001'\nallow_remote = true", "proxy.listen", "set proxy.caller_token or"),
    ("[proxy]\nlisten = '10.0.0.1:1'\ncaller_token = 'canary-9f3a'", "proxy.listen", "set proxy.allow_remote = true"),
    ("[proxy]\nlisten = ['127.0.0.1:1', 'localhost:1']", "proxy.listen", "choose another port"),
    ("[proxy]\nlisten = '127.0.0.1:9464'", "proxy.listen", "that admin.listen has already"),
    ("[proxy]\nallow_remote = 'canary-9f3a'", "proxy.allow_remote", "`true` or `false`"),
    ("[proxy]\nallow_remote = 1", "proxy.allow_remote", "`true` or `false`"),
    ("[proxy]\nallowed_hosts = ['canary-9f3a:80']", "proxy.allowed_hosts", "leave it away"),
    ("[proxy]\nallowed_hosts = ['*']", "proxy.allowed_hosts", "without wildcard"),
    ("[proxy]\ncaller_token = ''", "proxy.caller_token", "is empty"),
    ("[proxy]\ncaller_token = []", "proxy.caller_token", "is empty"),
    ("[proxy]\ncaller_token = ', ,'", "proxy.caller_token", "is empty"),
    ("[proxy]\ncaller_token = 'canary-9f3a with blanks'", "proxy.caller_token", "holds a blank"),
    ("[proxy]\ncaller_token = ['a', 1]", "proxy.caller_token", "in quotes"),
    ("[proxy]\ncaller_token = { file = 'canary-9f3a' }", "proxy.caller_token", "is a table"),
    ("[proxy]\ncaller_token = 'canary-9f3a'\ncaller_token_file = '/x'", "proxy.caller_token", "keep one of the two"),
    ("[proxy]\ncaller_token_file = 1", "proxy.caller_token", "in quotes"),
    ("[proxy]\ncaller_token_file = 'canary-9f3a'", "proxy.caller_token", "a path begins with / or ./"),
    ("[proxy]\ntoken_shim = 'yes'", "proxy.token_shim", "`true` or `false`"),
    ("[proxy]\nselection = 'canary-9f3a'", "proxy.selection", "`header` or `fixed`"),
    ("[proxy]\nreplay_limit = 'canary-9f3a'", "proxy.replay_limit", "256KiB"),
    ("[proxy]\nreplay_limit = '1GiB'", "proxy.replay_limit", "at most 64.0 MiB"),
    ("[proxy]\nreplay_limit = -1", "proxy.replay_limit", "is negative"),
    ("[proxy]\nmax_connections = 0", "proxy.max_connections", "from 1 to 1000000"),
    ("[proxy]\nmax_connections = 1.5", "proxy.max_connections", "not a whole number"),
    ("[proxy]\nmax_body = 'canary-9f3a'", "proxy.max_body", "256KiB"),
    ("[proxy]\nheader_timeout = '0s'", "proxy.header_timeout", "from 10ms to 1h"),
    ("[proxy]\nheader_timeout = 10", "proxy.header_timeout", "such as 30s, 5m or 7d"),
    ("[proxy]\nsocket_mode = 'canary-9f3a'", "proxy.socket_mode", "four octal digits"),
    ("[proxy]\nsocket_mode = 600", "proxy.socket_mode", "in quotes"),
    ("[proxy]\nsocket_mode = '0999'", "proxy.socket_mode", "such as \"0600\""),
    ("[proxy]\nsocket_mode = '7777'", "proxy.socket_mode", "such as \"0600\""),
    ("[proxy]\npeer_uids = ['canary-9f3a']", "proxy.peer_uids", "and no names"),
    ("[proxy]\npeer_uids = 'canary-9f3a'", "proxy.peer_uids", "and no names"),
    ("[proxy]\npeer_uids = [-1]", "proxy.peer_uids", "whole number"),
    ("[proxy]\npeer_uids = [1000, true]", "proxy.peer_uids", "whole number"),
    ("[proxy]\nbody_timeout = '0s'", "proxy.body_timeout", "from 10ms to 1h"),
    ("[proxy]\nwrite_timeout = '2h'", "proxy.write_timeout", "from 10ms to 1h"),
    ("[proxy]\nidle_timeout = '2days'", "proxy.idle_timeout", "to 1day"),
    ("[login]\nlisten = 'on'", "login.listen", "host:port"),
    ("[login]\nlisten = '127.0.0.1:8001'", "login.listen", "that proxy.listen has already"),
    ("[login]\nfrontend_url = '//canary-9f3a'", "login.frontend_url", "https://"),
    ("[login]\nfrontend_url = 'https://canary-9f3a@app.example'", "login.frontend_url", "before the @"),
    ("[login]\nfrontend_url = 'https://app.example/#canary-9f3a'", "login.frontend_url", "remove #"),
    ("[login]\nfrontend_url = 'javascript:canary-9f3a'", "login.frontend_url", "https://"),
    ("[login]\nconfirm = 'perhaps'", "login.confirm", "`true` or `false`"),
    ("[admin]\nlisten = 'unix:canary-9f3a'", "admin.listen", "absolute path"),
    ("[admin]\nlisten = '127.0.0.1:8001'", "admin.listen", "that proxy.listen has already"),
    ("[amazon]\nredirect_uri = 'http://canary-9f3a.example/cb'", "amazon.redirect_uri", "neither https nor"),
    ("[amazon]\nredirect_uri = '/api/canary-9f3a'", "amazon.redirect_uri", "absolute URL"),
    ("[amazon]\nredirect_uri = 'https://a/#canary-9f3a'", "amazon.redirect_uri", "remove #"),
    ("[amazon]\nscope = \"canary-9f3a\\nb\"", "amazon.scope", "separated by blanks"),
    ("[amazon]\nregion = 'canary-9f3a'", "amazon.region", "na, eu or fe"),
    ("[amazon]\nrefresh_token = 'canary-9f3a ü'", "amazon.refresh_token", "copy it once more"),
    ("[amazon]\nrefresh_token = true", "amazon.refresh_token", "single text"),
    ("[amazon]\nauthorize_url = 'http://canary-9f3a.example/'", "amazon.authorize_url", "write https://"),
    ("[amazon]\ntoken_url = 'http://localhost:8443/canary-9f3a'", "amazon.token_url", "secrets go there"),
    ("[amazon]\nca_file = '/nowhere/ca.pem'", "amazon.ca_file", "/nowhere/ca.pem does not exist"),
    ("[amazon]\nca_file = 'Cargo.toml'", "amazon.ca_file", "holds no certificate"),
    ("[amazon]\nclient_id_file = 'canary-9f3a'", "amazon.client_id_file", "is no key"),
    ("[store]\nkind = 'canary-9f3a'", "store.kind", "`sled` or `postgres`"),
    ("[store]\npath = ''", "store.path", "is empty"),
    ("[store]\npath = ['canary-9f3a']", "store.path", "single text"),
    ("[refresh]\nmargin = '0s'", "refresh.margin", "from 10s to 30m"),
    ("[refresh]\nmargin = '5M'", "refresh.margin", "from 10s to 30m"),
    ("[refresh]\nmargin = '20m'", "refresh.margin", "refresh.ahead at least refresh.margin"),
    ("[refresh]\nahead = '1m'", "refresh.ahead", "refresh.ahead at least refresh.margin"),
    ("[refresh]\nahead = '2h'", "refresh.ahead", "to 50m"),
    ("[refresh]\nsweep = '0s'", "refresh.sweep", "from 1s"),
    ("[refresh]\nsweep = 'canary-9f3a'", "refresh.sweep", "such as 30s, 5m or 7d"),
    ("[refresh]\nidle_after = '0s'", "refresh.idle_after", "from 1m"),
    ("[refresh]\nconcurrency = 0", "refresh.concurrency", "from 1 to 256"),
    ("[refresh]\nconcurrency = 'canary-9f3a'", "refresh.concurrency", "from 1 to 256"),
    ("[upstream]\nna = 'http://localhost:8443'", "upstream.na", "secrets go there"),
    ("[upstream]\neu = 'https://a.example/canary-9f3a'", "upstream.eu", "without path"),
    ("[upstream]\nfe = 'https://u:canary-9f3a@a.example'", "upstream.fe", "before the @"),
    ("[upstream]\nus = 'canary-9f3a'", "upstream.us", "is no key"),
    ("[upstream]\nca_file = '/nowhere/ca.pem'", "upstream.ca_file", "does not exist"),
    ("[upstream]\nhttp2 = true", "upstream.http2", "single text"),
    ("[upstream]\nhttp2 = 'canary-9f3a'", "upstream.http2", "`auto` or `never` or `always`"),
    ("[upstream]\nconnect_timeout = '1ns'", "upstream.connect_timeout", "from 10ms"),
    ("[upstream]\nresponse_timeout = '999999999999years'", "upstream.response_timeout", "such as 30s"),
    ("[upstream]\nidle_timeout = '0s'", "upstream.idle_timeout", "from 10ms"),
    ("[metrics]\nmax_user_series = -1", "metrics.max_user_series", "is negative"),
    ("[metrics]\nmax_user_series = 99999999999999999999999", "the configuration file", "line 6"),
    ("[log]\nformat = 'canary-9f3a'", "log.format", "`text` or `json`"),
    ("[log]\nlevel = 'loud'", "log.level", "`error` or `warn` or `info`"),
    ("[log]\nlevel = 1979-05-27", "log.level", "is a table"),
    ("[shutdown]\naccept = '2h'", "shutdown.accept", "to 1h"),
    ("[shutdown]\ndrain = '-5s'", "shutdown.drain", "such as 30s"),
    ("[store]\nkind = 'postgres'", "store.kind", "store.postgres_url_file"),
    ("[store]\npostgres_url = 'postgres://u:canary-9f3a@db'", "store.postgres_url", "of no use to sled"),
    ("[store]\npostgres_url_file = 'canary-9f3a'", "store.postgres_url", "of no use to sled"),
    ("[store]\nkind = 'postgres'\npostgres_url = 'canary-9f3a'", "store.postgres_url", "not a PostgreSQL URL"),
    ("[store]\nkind = 'postgres'\npostgres_url = 'postgres://u:canary-9f3a@db?a=b'", "store.postgres_url", "sslmode"),
    // What is not built yet.
    ("[policy]\nread_only = 'canary-9f3a'", "policy.read_only", "`true` or `false`"),
    ("[policy]\nallow = 'canary-9f3a'", "policy.allow", "METHOD and a path"),
    ("[policy]\nallow = ['get /canary-9f3a']", "policy.allow", "in capitals"),
    ("[policy]\nallow = ['GET canary-9f3a']", "policy.allow", "begin with /"),
    ("[policy]\nallow = ['GET /canary-9f3a?x']", "policy.allow", "without query"),
    ("[policy]\nallow = ['GET /x', 'GET //canary-9f3a']", "policy.allow", "without query, //"),
    ("[policy]\nallow = ['GET /canary-9f3a**']", "policy.allow", "whole segments"),
    ("[policy]\nallow = [1]", "policy.allow", "in quotes"),
    ("[policy]\nmode = 'canary-9f3a'", "policy.mode", "`enforce` or `observe`"),
    ("[throttle]\nmode = 'canary-9f3a'", "throttle.mode", "`off` or `observe`"),
    ("[throttle]\nqueue_timeout = '16m'", "throttle.queue_timeout", "to 15m"),
    ("[throttle]\ncoalesce_polls = 'canary-9f3a'", "throttle.coalesce_polls", "`true` or `false`"),
    ("[throttle]\nmax_waiting = 0", "throttle.max_waiting", "from 1 to"),
    ("[throttle]\nmax_waiting_bytes = '2GiB'", "throttle.max_waiting_bytes", "at most"),
    ("[throttle]\nfamilies = ['canary-9f3a']", "throttle.families", "family=mode"),
    ("[throttle]\nfamilies = ['canary-9f3a=queue']", "throttle.families", "no API family"),
    ("[throttle]\nfamilies = ['mcp=canary-9f3a']", "throttle.families", "off, observe, enforce or queue"),
    ("[throttle]\nfamilies = ['mcp=off', 'mcp=queue']", "throttle.families", "names mcp twice"),
    // Outgoing proxies.
    ("[upstream]\nproxy = 'http://u:canary-9f3a@proxy'", "upstream.proxy", "names no port"),
    ("[upstream]\nproxy = 'https://u:canary-9f3a@proxy:3128'", "upstream.proxy", "http://host:port"),
    ("[upstream]\nproxy = 'canary-9f3a'", "upstream.proxy", "http://host:port"),
    ("[amazon]\nproxy = 'socks5://canary-9f3a:x@proxy:1080/x'", "amazon.proxy", "more than a host and a port"),
    ("[amazon]\nproxy = ''", "amazon.proxy", "is empty"),
    ("[log]\naudit = 'canary-9f3a'", "log.audit", "`true` or `false`"),
    ("[admin]\npublic_url = 'canary-9f3a'", "admin.public_url", "https://"),
    ("[admin]\npublic_url = 'https://canary-9f3a@ads.example'", "admin.public_url", "before the @"),
    // Accounts.
    ("[[account]]\nuser = 'canary-9f3a'", "[[account]] number 1: name", "is missing"),
    ("[[account]]\nname = 'canary-9f3a!'", "[[account]] number 1: name", "1 to 128 of"),
    ("[[account]]\nname = '..'", "[[account]] number 1: name", "1 to 128 of"),
    ("[[account]]\nname = 'canary-9f3a'\n[[account]]\nname = 'canary-9f3a'", "[[account]] number 2: name", "its own"),
    ("[[account]]\nname = 'a'\nuser = 'canary-9f3a/b'", "[[account]] number 1: user", "1 to 128 of"),
    ("[[account]]\nname = 'a'\nregion = 'canary-9f3a'", "[[account]] number 1: region", "na, eu or fe"),
    ("[[account]]\nname = 'a'\nprofile_id = 'canary-9f3a b'", "[[account]] number 1: profile_id", "1 to 64 of"),
    ("[[account]]\nname = 'a'\nprofile_id = -1", "[[account]] number 1: profile_id", "without the sign"),
    ("[[account]]\nname = 'a'\nprofile_id = 1.5", "[[account]] number 1: profile_id", "not a whole number"),
    ("[[account]]\nname = 'a'\nprofileid = 'canary-9f3a'", "[[account]] number 1: profileid", "profile_id?"),
    ("[[account]]\nname = 'a'\nrefresh_token = 'canary-9f3a'", "number 1: refresh_token", "is no key of an account"),
    ("[[account]]\nname = 'a'\nallow = ['canary-9f3a']", "[[account]] number 1: allow", "METHOD and a path"),
    ("[[account]]\nname = 'a'\nallow = 'GET /canary-9f3a'", "[[account]] number 1: allow", "is no list"),
    ("[[account]]\nname = 'a'\nallow = [1]", "[[account]] number 1: allow", "in quotes"),
    ("[[account]]\nname = 'a'\nthrottle = 'canary-9f3a'", "[[account]] number 1: throttle", "off, observe, enforce"),
    ("[[account]]\nname = 'a'\nread_only = 'no'", "[[account]] number 1: read_only", "without quotes"),
    ("[[account]]\nname = 'a'\nheaders = 'canary-9f3a'", "[[account]] number 1: headers", "is no table"),
    ("[[account]]\nname = 'a'\nheaders = { Host = 'canary-9f3a' }", "number 1: headers.Host", "is managed by"),
    ("[[account]]\nname = 'a'\nheaders = { X-A = '', x-a = 'canary-9f3a' }", "number 1: headers.X-A", "1 to 1024"),
    ("[[account]]\nname = 'a'\nheaders = { X-A = 'a', x-a = 'canary-9f3a' }", "number 1: headers.x-a", "keep one"),
    ("[[account]]\nname = 'a'\nheaders = { X-A = \"canary-9f3a\\r\\nHost: b\" }", "number 1: headers.X-A", "one line"),
];

#[test]
// Covers: failure 104.
fn each_bad_file_is_refused_by_key_and_cure_and_without_its_values() {
    for (text, key, cure) in BAD_FILES {
        // The required keys come by the environment, so that the text may open any section of the file.
        let given = Given::required().toml(&format!("\n\n\n\n{text}"));
        one_problem(&given, &[key, cure, "adsidecar.toml"]);
    }
    assert!(BAD_FILES.len() > 100);
}

#[test]
fn the_same_single_values_are_refused_in_the_environment_and_in_flags() {
    let mut tried = 0;
    for (text, key, cure) in BAD_FILES {
        // Texts of one key, known by this name in every layer.
        let Some((section, pair)) = text.strip_prefix('[').and_then(|rest| rest.split_once("]\n")) else { continue };
        let Some((name, value)) = pair.split_once(" = '").filter(|(_, value)| !value.contains('\n')) else { continue };
        let (name, value) = (format!("{section}.{name}"), value.trim_end_matches('\''));
        if super::names::by_name(&name).is_none() || value.is_empty() {
            continue;
        }
        let variable = format!("ADSIDECAR_{}", name.replace('.', "__").to_ascii_uppercase());
        one_problem(&Given::required().env(&[(&variable, value)]), &[key, &format!("(from {variable})"), cure]);
        one_problem(&Given::required().set(&[(&name, value)]), &[key, "(from --set)", cure]);
        tried += 1;
    }
    assert!(tried > 40, "{tried}");
}

#[test]
// Covers: failure 104.
fn all_problems_are_reported_at_once() {
    let given = Given::nothing()
        .toml("[amazon]\nregion = 'x'\n[proxy]\ncolour = 1\nselection = 'x'\n[[account]]\nregion = 'x'")
        .env(&[("ADSIDECAR_REFRESH__SWEEP", "0s"), ("ADSIDECAR_PROXY__COLOUR", "x")])
        .set(&[("log.level", "x"), ("log.colour", "x")]);
    let problems = given.load().unwrap_err();
    let mut keys: Vec<_> = problems.iter().map(|problem| problem.key.as_str()).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "ADSIDECAR_PROXY__COLOUR",
            "[[account]] number 1: name",
            "[[account]] number 1: region",
            "amazon.client_id",
            "amazon.client_secret",
            "amazon.region",
            "log.colour",
            "log.level",
            "proxy.colour",
            "proxy.selection",
            "refresh.sweep",
            "store.fernet_keys",
        ]
    );
}

#[test]
fn each_key_is_read_by_its_name() {
    // An absurd value is refused with the key's name only if the key is read.
    for key in KEYS {
        let text = match key.name.split_once('.') {
            Some((section, key)) => format!("[{section}]\n{key} = [[1]]"),
            None => format!("{} = [[1]]", key.name),
        };
        let shown = Given::required().without(key.guide_name.unwrap_or_default()).toml(&text).refused();
        assert!(shown.contains(&format!("- {} (from ", key.name)), "{}: {shown}", key.name);
    }
    for key in ACCOUNT_KEYS.iter().map(|key| key.name) {
        let shown = Given::required().toml(&format!("[[account]]\n{key} = [[1]]")).refused();
        assert!(shown.contains(&format!("[[account]] number 1: {key} ")), "{key}: {shown}");
    }
}

// The environment.

#[test]
fn unknown_names_with_two_underscores_are_refused() {
    for (name, cure) in [
        ("ADSIDECAR_PROXY__LISTENS", "did you mean ADSIDECAR_PROXY__LISTEN?"),
        ("ADSIDECAR_AMAZON__CLIENT_SECRETS_FILE", "did you mean ADSIDECAR_AMAZON__CLIENT_SECRET_FILE?"),
        ("ADSIDECAR_Proxy__Listen", "is no key"),
        ("ADSIDECAR__LISTEN", "is no key"),
        ("ADSIDECAR__ENVIRONMENT", "the variable is ENVIRONMENT alone"),
        ("ADSIDECAR_ACCOUNT__0__NAME", "in the file only"),
        ("ADSIDECAR_PROXY__LISTEN_FILE", "is no key"),
    ] {
        one_problem(&Given::required().env(&[(name, CANARY)]), &[name, cure]);
    }
}

#[test]
fn names_that_are_not_ours_are_ignored() {
    let foreign = [
        ("ADSIDECAR_SERVICE_HOST", "10.0.0.1"),
        ("ADSIDECAR_PORT_8001_TCP", "tcp://10.0.0.1:8001"),
        ("ADSIDECAR_PORT", "x"),
        ("ADSIDECAR_ENVIRONMENT", "nonsense"),
        ("ADSIDECAR_CONFIG", ""),
        ("adsidecar_proxy__listen", "x"),
        ("AMAZON_MARKETPLACE", "x"),
        ("AMAZON__CLIENT__ID", "x"),
        ("HTTPS_PROXY", "http://proxy"),
        ("RUST_LOG", "trace"),
    ];
    assert_eq!(debug(&Given::required().env(&foreign)), debug(&Given::required()));
}

#[test]
fn an_empty_variable_of_ours_is_refused() {
    for name in ["ADSIDECAR_PROXY__CALLER_TOKEN", "ADSIDECAR_PROXY__ALLOWED_HOSTS", "ADSIDECAR_STORE__FERNET_KEYS_FILE"]
    {
        one_problem(&Given::required().env(&[(name, " ")]), &[name, "is empty: give it a value"]);
    }
    one_problem(&Given::required().set(&[("proxy.caller_token", "")]), &["(from --set)", "is empty"]);
}

#[test]
fn two_spellings_of_one_key_must_agree() {
    let given = Given::required().env(&[("ADSIDECAR_AMAZON__CLIENT_SECRET", CANARY)]);
    let names = "(from AMAZON_CLIENT_SECRET and ADSIDECAR_AMAZON__CLIENT_SECRET)";
    one_problem(&given, &["amazon.client_secret", names, "differs"]);
    let given = Given::required().env(&[("ADSIDECAR_AMAZON__CLIENT_SECRET_FILE", "/x")]);
    one_problem(&given, &["amazon.client_secret", "keep one of the two"]);
    let given = Given::required().env(&[("AMAZON_CLIENT_ID_FILE", "/x")]);
    one_problem(&given, &["(from AMAZON_CLIENT_ID and AMAZON_CLIENT_ID_FILE)", "keep one of the two"]);
    let given = Given::required().env(&[("ADSIDECAR_AMAZON__CLIENT_SECRET", "secret")]);
    assert_eq!(debug(&given), debug(&Given::required()));
}

#[test]
fn accounts_cannot_be_set_by_a_flag() {
    for name in ["account", "account.name", "account[0].name", "account.0.name"] {
        one_problem(&Given::required().set(&[(name, CANARY)]), &["account (from --set)", "[[account]]"]);
    }
}

#[test]
fn a_name_that_may_be_a_secret_is_not_repeated() {
    let secret = format!("Atzr{}", "aZ9".repeat(30));
    for name in [secret.as_str(), "a=b", "amazon.client secret", ""] {
        let shown = Given::required().set(&[(name, "x")]).refused();
        assert!(shown.contains("a name that is not repeated here (from --set): is no key"), "{shown}");
        assert!(!shown.contains("aZ9"), "{shown}");
    }
}

#[test]
fn each_name_of_the_guide_works_and_so_does_its_file() {
    let values = [
        ("AMAZON_CLIENT_ID", "guide-id"),
        ("AMAZON_CLIENT_SECRET", "one,two"),
        ("AMAZON_OAUTH_REDIRECT_URI", "https://app.example/api/auth/amazon/callback?a%20b&"),
        ("AMAZON_SCOPE", "a::b c::d"),
        ("AMAZON_REGION", "eu"),
        ("AMAZON_REFRESH_TOKEN", "Atzr|x,y"),
        ("FERNET_KEY", FERNET_KEY),
        ("FRONTEND_URL", "https://App.example:8443/home?x=1"),
        ("ENVIRONMENT", "development"),
    ];
    let plain = Given::nothing().env(&values);
    let config = plain.config();
    assert_eq!(config.environment, Environment::Development);
    assert_eq!((config.lwa.client_id.as_str(), config.proxy.client_id.as_str()), ("guide-id", "guide-id"));
    assert_eq!(config.lwa.client_secrets, [Secret::new("one"), Secret::new("two")]);
    assert_eq!(config.lwa.redirect_uri, "https://app.example/api/auth/amazon/callback?a%20b&");
    assert_eq!((config.lwa.scope.as_str(), config.lwa.region), ("a::b c::d", Region::Eu));
    assert_eq!(config.tokens.adopt, Some(RefreshToken::new(Secret::new("Atzr|x,y")).unwrap()));
    assert_eq!(config.fernet_keys, FernetKeys::Given(vec![Secret::new(FERNET_KEY)]));
    assert_eq!(config.login.frontend_url.as_ref().unwrap().as_str(), "https://app.example:8443/home?x=1");
    assert_eq!(config.admission.frontend_origin.as_deref(), Some("https://app.example:8443"));

    let mut files = Given::nothing();
    for (name, value) in values {
        let path = files.write(name, &format!("{value}\r\n"));
        files = files.env(&[(&format!("{name}_FILE"), &path)]);
    }
    assert_eq!(debug(&files), debug(&plain));
    assert_eq!(files.config().lwa.client_secrets, config.lwa.client_secrets);
    assert_eq!(files.config().tokens.adopt, config.tokens.adopt);
}

// Credentials.

/// Ways in which a credential is written down wrongly. `{}` is the credential; the name says what was done to it.
const WRONG_SHAPES: [(&str, &str); 32] = [
    ("double quotes", "\"{}\""),
    ("single quotes", "'{}'"),
    ("a line end", "{}\n"),
    ("a line end of Windows", "{}\r\n"),
    ("a byte order mark", "\u{feff}{}"),
    ("a byte order mark and quotes", "\u{feff}\"{}\"\n"),
    ("a line end within quotes", "\"{}\n\""),
    ("an opening quote", "\"{}"),
    ("a closing quote", "{}'"),
    ("bytes of Python", "b'{}'"),
    ("bytes of Python in double quotes", "b\"{}\""),
    ("bytes of Python in quotes", "\"b'{}'\""),
    ("a name", "AMAZON_VALUE={}"),
    ("a name and quotes", "AMAZON_VALUE=\"{}\""),
    ("an export", "export AMAZON_VALUE={}"),
    ("a key of YAML", "value: {}"),
    ("a key of TOML", "value = \"{}\""),
    ("a JSON object", "{\"value\":\"{}\"}"),
    ("a JSON object with commas", "{\"a\":\"b\",\"value\":\"{}\"}"),
    ("a JSON list", "[\"{}\"]"),
    ("a scheme", "Bearer {}"),
    ("a header", "Authorization: Bearer {}"),
    ("angle brackets", "<{}>"),
    ("a variable of a shell", "${{}}"),
    ("a template", "{{ {} }}"),
    ("a URL", "https://example.com/?code={}"),
    ("a written-out line end", "{}\\n"),
    ("percent-encoding", "%"),
    ("a file's path", "/run/secrets/{}"),
    ("backticks", "`{}`"),
    ("an ellipsis", "{}..."),
    ("a comment", "{} # from the vault"),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_credential_of_a_wrong_shape_is_sent_to_login_with_amazon(
        index in 0..WRONG_SHAPES.len(),
        random in "[A-Za-z0-9_-]{40}",
        layer in 0..4_u8,
    ) {
        let (shape, template) = WRONG_SHAPES[index];
        for (key, variable, good) in [
            ("amazon.client_id", "AMAZON_CLIENT_ID", format!("amzn1.application-oa2-client.{random}")),
            ("amazon.client_secret", "AMAZON_CLIENT_SECRET", format!("amzn1.oa2-cs.v1.{random}")),
            ("amazon.refresh_token", "AMAZON_REFRESH_TOKEN", format!("Atzr|{random}")),
            ("amazon.scope", "AMAZON_SCOPE", format!("advertising::{random}")),
        ] {
            let bad = match template {
                "%" => format!("{good}%3A"),
                _ => template.replacen("{}", &good, 1),
            };
            let given = Given::required();
            let path = given.write("value", &bad);
            let given = match layer {
                0 => given.env(&[(variable, &bad)]),
                1 => given.without(variable).env(&[(&format!("{variable}_FILE"), &path)]),
                2 => given.set(&[(key, &bad)]),
                _ => {
                    let (section, name) = key.split_once('.').unwrap();
                    let line = toml::Value::from(bad.clone());
                    given.without(variable).toml(&format!("[{section}]\n{name} = {line}"))
                }
            };
            match given.load() {
                Err(problems) => {
                    prop_assert!(!problems.to_string().contains(&random), "{}: {}", shape, problems);
                    prop_assert!(problems.to_string().contains(key), "{}: {}", shape, problems);
                }
                Ok(config) => {
                    let adopted = config.tokens.adopt.as_ref().map(|token| token.secret().expose().to_owned());
                    let sent = match key {
                        "amazon.client_id" => config.lwa.client_id.clone(),
                        "amazon.client_secret" => config.lwa.client_secrets[0].expose().to_owned(),
                        "amazon.refresh_token" => adopted.unwrap_or_default(),
                        _ => config.lwa.scope.clone(),
                    };
                    prop_assert_eq!(&sent, &good, "{} as {} would be sent", key, shape);
                    prop_assert!(layer == 1 || !config.warnings.is_empty(), "{} as {}: no warning", key, shape);
                }
            }
        }
    }
}

#[test]
fn a_repaired_credential_is_reported_with_its_source_and_without_its_value() {
    let quoted = format!("\"{CANARY}\"");
    let config = Given::required().env(&[("AMAZON_CLIENT_SECRET", &quoted)]).config();
    assert_eq!(config.lwa.client_secrets, [Secret::new(CANARY)]);
    let [warning] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
    let warning = warning.to_string();
    assert!(warning.contains("amazon.client_secret (from AMAZON_CLIENT_SECRET): stands in quotes"), "{warning}");
    assert!(!warning.contains(CANARY), "{warning}");
}

#[test]
// Covers: situation 20.
fn a_redirect_uri_that_does_not_lead_to_the_callback_is_named_and_still_taken() {
    for (uri, named) in [
        ("http://localhost:8001/callback", true),
        ("http://localhost:8001/api/auth/amazon/callback/", true),
        ("https://app.example/api/auth/amazon/callback?tenant=1", false),
        ("http://localhost:8001/api/auth/amazon/callback", false),
    ] {
        let config = Given::required().env(&[("AMAZON_OAUTH_REDIRECT_URI", uri)]).config();
        let warned = config.warnings.iter().any(|warning| warning.to_string().contains("/api/auth/amazon/callback"));
        assert_eq!((config.lwa.redirect_uri.as_str(), warned), (uri, named));
    }
}

#[test]
fn a_redirect_uri_at_whose_port_nobody_listens_is_named_and_still_taken() {
    let callback = |origin: &str| format!("{origin}/api/auth/amazon/callback");
    for (origin, listens, named) in [
        ("http://localhost:8001", &[][..], false),
        ("http://localhost:8002", &[], true),
        ("http://127.0.0.1:3000", &[("ADSIDECAR_PROXY__LISTEN", "127.0.0.1:3001")], true),
        ("http://localhost:3001", &[("ADSIDECAR_PROXY__LISTEN", "127.0.0.1:3001")], false),
        ("http://[::1]:3001", &[("ADSIDECAR_LOGIN__LISTEN", "127.0.0.1:3001")], false),
        ("http://localhost", &[], true),
        // Any port, something in between, and another machine.
        ("http://localhost:3000", &[("ADSIDECAR_PROXY__LISTEN", "127.0.0.1:0")], false),
        ("http://localhost:3000", &[("ADSIDECAR_PROXY__LISTEN", "unix:/run/ads.sock")], false),
        ("https://app.example", &[], false),
    ] {
        let uri = callback(origin);
        let config = Given::required().env(&[("AMAZON_OAUTH_REDIRECT_URI", &uri)]).env(listens).config();
        let warned = config.warnings.iter().any(|warning| warning.to_string().contains("does not listen"));
        assert_eq!((config.lwa.redirect_uri.as_str(), warned), (uri.as_str(), named), "{listens:?}");
    }
}

#[test]
fn the_json_of_a_secrets_manager_is_not_taken_for_two_secrets() {
    let blob = format!("{{\"client_id\":\"{CANARY}\",\"client_secret\":\"{CANARY}\"}}");
    let given = Given::required().env(&[("AMAZON_CLIENT_SECRET", &blob)]);
    one_problem(&given, &["amazon.client_secret (from AMAZON_CLIENT_SECRET)", "JSON"]);
}

#[test]
fn a_region_that_does_not_exist_is_refused_under_its_name_of_the_guide_too() {
    let given = Given::required().env(&[("AMAZON_REGION", "us-east-1")]);
    one_problem(&given, &["amazon.region (from AMAZON_REGION)"]);
}

#[test]
fn a_file_named_by_the_flag_is_named_in_the_error() {
    let mut given = Given::required();
    given.sources.file = Some("adsidecar.tmol".into());
    one_problem(&given, &["--config", "the file adsidecar.tmol does not exist"]);
}

#[test]
fn the_admin_listener_is_known_without_credentials() {
    let given = Given::nothing().toml("[admin]\nlisten = '127.0.0.1:1'\n[amazon]\nclient_secret_file = '/nowhere'");
    assert_eq!(admin_listen(&given.sources).unwrap(), [Listen::Tcp("127.0.0.1:1".into())]);
    assert!(admin_listen(&given.toml("[admin]\nlisten = 'x'").sources).is_err());
}

// Layers.

#[test]
fn a_higher_layer_replaces_a_lower_one() {
    let given = Given::required().toml("[log]\nlevel = 'error'\n[proxy]\nmax_connections = 1\nselection = 'fixed'");
    let given = given.env(&[("ADSIDECAR_LOG__LEVEL", "WARN"), ("ADSIDECAR_PROXY__MAX_CONNECTIONS", "2")]);
    let given = given.set(&[("log.level", "trace"), ("log.level", "debug")]);
    let config = given.config();
    assert_eq!(config.log.level, log::Level::Debug, "of two flags the later counts");
    assert_eq!(config.limits.max_connections, 2);
    assert_eq!(config.proxy.selection, proxy::Selection::Fixed);
}

#[test]
fn a_higher_layers_secret_replaces_a_lower_layers_in_either_form() {
    let secrets = |given: &Given| given.config().admission.caller_tokens;
    let given = Given::required().toml("[proxy]\ncaller_token = ['low', 'lower']");
    let path = given.write("token", "high\n");
    let file_over_value = given.env(&[("ADSIDECAR_PROXY__CALLER_TOKEN_FILE", &path)]);
    assert_eq!(secrets(&file_over_value), [Secret::new("high")]);
    let value_over_file = file_over_value.set(&[("proxy.caller_token", "highest")]);
    assert_eq!(secrets(&value_over_file), [Secret::new("highest")]);
    let other = value_over_file.write("other", "other");
    let value_over_file = value_over_file.set(&[("proxy.caller_token_file", &other)]);
    one_problem(&value_over_file, &["proxy.caller_token (from --set)", "keep one of the two"]);
    // What is replaced is not even read.
    let given = Given::required().toml("[proxy]\ncaller_token_file = '/nowhere'").set(&[("proxy.caller_token", "x")]);
    assert_eq!(secrets(&given), [Secret::new("x")]);
}

#[test]
fn the_flag_names_the_file_before_the_environment_does() {
    let given = Given::required().toml("[log]\nlevel = 'debug'").env(&[("ADSIDECAR_CONFIG", "/nowhere.toml")]);
    assert_eq!(given.config().log.level, log::Level::Debug);
    let path = given.sources.file.clone().unwrap();
    let mut given = given.env(&[("ADSIDECAR_CONFIG", path.to_str().unwrap())]);
    given.sources.file = None;
    assert_eq!(given.config().log.level, log::Level::Debug);
}

#[test]
fn secret_files_that_hold_nothing_are_refused_with_their_path() {
    let given = Given::nothing();
    for text in ["", "\n", " \n\n", "\r\n"] {
        let path = given.write("key", text);
        let given = Given::required().without("FERNET_KEY").env(&[("FERNET_KEY_FILE", &path)]);
        one_problem(&given, &["store.fernet_keys (from FERNET_KEY_FILE)", &path, "holds nothing"]);
    }
}

#[test]
fn several_secrets_come_by_comma_by_list_and_by_line() {
    let expected = [Secret::new("a"), Secret::new("b"), Secret::new("c")];
    let given = Given::required();
    let path = given.write("tokens", "a\nb\r\n\nc\n");
    for given in [
        Given::required().env(&[("ADSIDECAR_PROXY__CALLER_TOKEN", "a, b,c")]),
        Given::required().set(&[("proxy.caller_token", "a,b,c,")]),
        Given::required().toml("[proxy]\ncaller_token = ['a', 'b', 'c']"),
        Given::required().toml("[proxy]\ncaller_token = 'a,b,c'"),
        given.set(&[("proxy.caller_token_file", &path)]),
    ] {
        assert_eq!(given.config().admission.caller_tokens, expected);
    }
}

// Single keys.

#[test]
// Covers: failure 44.
fn what_is_no_fernet_key_is_refused() {
    let quoted = format!("\"{FERNET_KEY}\"");
    let half_quoted = &quoted[1..];
    let short = &FERNET_KEY[..40];
    let second = format!("{FERNET_KEY},{CANARY}");
    let long = FERNET_KEY.repeat(2);
    let standard = FERNET_KEY.replace('-', "+").replace('_', "/");
    let bytes = format!("b'{FERNET_KEY}'");
    let inner = format!("{}{}{}", &FERNET_KEY[..20], " ", &FERNET_KEY[20..]);
    let hex = "9f".repeat(32);
    for bad in [
        CANARY,
        half_quoted,
        &bytes,
        short,
        &second,
        &long,
        &hex,
        "password",
        "=",
        "0x00",
        "None",
        "{}",
        "${FERNET_KEY}",
        "<key>",
    ] {
        let given = Given::required().env(&[("FERNET_KEY", bad)]);
        one_problem(&given, &["store.fernet_keys (from FERNET_KEY)", "adsidecar key new"]);
    }
    for bad in [inner.as_str(), "ü"] {
        let given = Given::required().env(&[("FERNET_KEY", bad)]);
        one_problem(&given, &["store.fernet_keys (from FERNET_KEY)", "copy it once more"]);
    }
    let padded = format!(" {FERNET_KEY}\n");
    let two = format!("{FERNET_KEY},\n{FERNET_KEY}");
    for good in [FERNET_KEY, &padded, &two] {
        let FernetKeys::Given(keys) = Given::required().env(&[("FERNET_KEY", good)]).config().fernet_keys else {
            panic!("the key was given");
        };
        assert!(keys.iter().all(|key| key.expose() == FERNET_KEY));
    }
    for good in [&standard, &quoted] {
        let config = Given::required().env(&[("FERNET_KEY", good)]).config();
        assert_eq!(config.warnings.len(), usize::from(*good == quoted));
    }
}

#[test]
fn only_development_does_without_a_fernet_key() {
    let given = Given::required().without("FERNET_KEY");
    one_problem(&given, &["missing Fernet key"]);
    let config = given.env(&[("ENVIRONMENT", "development")]).config();
    assert_eq!(config.fernet_keys, FernetKeys::MakeBesideStore);
    assert_eq!(config.log.format, log::Format::Text);
    assert!(!config.login.secure_cookies);
}

#[test]
// Covers: threat 41.
fn development_takes_any_redirect_uri_and_production_does_not() {
    let given = Given::required().env(&[("AMAZON_OAUTH_REDIRECT_URI", "http://app.internal/cb")]);
    one_problem(&given, &["amazon.redirect_uri", "in production"]);
    assert_eq!(given.env(&[("ENVIRONMENT", "development")]).config().lwa.redirect_uri, "http://app.internal/cb");
}

#[test]
fn a_remote_proxy_listener_needs_both_the_permission_and_a_token() {
    let given = Given::required().set(&[
        ("proxy.listen", "0.0.0.0:8001"),
        ("proxy.allow_remote", "true"),
        ("proxy.caller_token", CANARY),
    ]);
    let config = given.config();
    assert_eq!(config.proxy_listen, [Listen::Tcp("0.0.0.0:8001".to_owned())]);
    assert!(!config.proxy_listen_default);
    // The other listeners are meant to be reached.
    let given = Given::required().set(&[("login.listen", "0.0.0.0:1"), ("admin.listen", "[::]:2,unix:/run/x.sock")]);
    assert_eq!(given.config().admin_listen.len(), 2);
}

#[test]
fn a_login_listener_turns_confirmation_on_by_default() {
    let listener = [("login.listen", "127.0.0.1:8002")];
    assert!(!Given::required().config().login.confirm);
    assert!(Given::required().set(&listener).config().login.confirm);
    assert!(!Given::required().set(&listener).set(&[("login.confirm", "false")]).config().login.confirm);
    assert!(Given::required().set(&[("login.confirm", "TRUE")]).config().login.confirm);
    let off = Given::required().toml("[login]\nlisten = '127.0.0.1:8002'").set(&[("login.listen", "off")]);
    assert!(off.config().login_listen.is_empty());
}

#[test]
fn ports_that_the_system_chooses_never_clash() {
    let given = Given::required().set(&[("proxy.listen", "127.0.0.1:0"), ("admin.listen", "127.0.0.1:0")]);
    assert_eq!(given.config().admin_listen, given.config().proxy_listen);
}

#[test]
fn an_account_is_read_whole() {
    let given = Given::required().toml(
        r#"
        [[account]]
        name = "brand-eu"
        user = "ann@example.com"
        region = "EU"
        profile_id = 1234567890
        marketplace_id = "A1PA6795UKMFR9"
        advertiser_id = "ENTITY1"
        entity_id = "ENTITY2"
        account_id = "amzn1.ads-account.g.x"
        dsp_advertiser_id = 987
        amc_instance_id = "amcx"
        manager_account_id = "amzn1.ads1.ma1.x"
        headers = { X-Team = "canary-9f3a", X-Number = 7 }
        read_only = true
        allow = ["GET /v2/profiles", "* /sp/**"]
        [[account]]
        name = "default"
        "#,
    );
    let config = given.config();
    let [brand, default] = config.proxy.accounts.as_slice() else { panic!("{config:?}") };
    assert_eq!((&*brand.name, brand.user.as_str(), brand.region), ("brand-eu", "ann@example.com", Some(Region::Eu)));
    let ids: Vec<_> = Context::ALL.iter().map(|&context| brand.ids.get(context).unwrap().to_str().unwrap()).collect();
    assert_eq!(
        ids,
        [
            "1234567890",
            "A1PA6795UKMFR9",
            "ENTITY1",
            "ENTITY2",
            "amzn1.ads-account.g.x",
            "987",
            "amcx",
            "amzn1.ads1.ma1.x"
        ]
    );
    let headers: Vec<_> = brand.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
    assert_eq!(headers, [("x-number", &b"7"[..]), ("x-team", CANARY.as_bytes())]);
    let allow: Vec<_> = brand.rules.allow().map(ToString::to_string).collect();
    assert_eq!((brand.rules.read_only(), allow), (true, vec!["GET /v2/profiles".to_owned(), "* /sp/**".to_owned()]));
    assert!(default.rules.is_empty());
    assert_eq!((&*default.name, default.user.as_str(), default.region), ("default", "default", None));
    assert!(Context::ALL.iter().all(|&context| default.ids.get(context).is_none()));
    assert!(!format!("{config:?}{}", config.redacted_toml()).contains(CANARY));
}

#[test]
fn values_are_read_by_their_type_in_every_layer() {
    let check = |given: Given| {
        let config = given.config();
        assert_eq!(config.admission.allowed_hosts, ["app.internal", "[fd00::1]"]);
        assert_eq!((config.socket_mode, config.admission.peer_uids.as_slice()), (0o660, &[1000, 2000][..]));
        assert_eq!(config.proxy.replay_limit, 1024);
        assert_eq!(config.proxy.max_body, Some(8 << 20));
        assert!(!config.proxy.token_shim);
        assert_eq!(config.tokens.policy.idle_after, Duration::from_secs(14 * 86_400));
        assert_eq!(config.tokens.concurrency, 3);
        assert_eq!(config.upstream.http2, upstream::Http2::Never);
        assert_eq!(config.lwa.client_id, "12345");
    };
    let values = [
        ("amazon.client_id", "12345"),
        ("proxy.allowed_hosts", "App.Internal, FD00::1"),
        ("proxy.socket_mode", "0660"),
        ("proxy.peer_uids", "1000, 2000"),
        ("proxy.replay_limit", "1KiB"),
        ("proxy.max_body", "8MiB"),
        ("proxy.token_shim", "false"),
        ("refresh.idle_after", "14d"),
        ("refresh.concurrency", "3"),
        ("upstream.http2", "never"),
    ];
    check(Given::required().set(&values));
    let env = values.map(|(key, value)| (format!("ADSIDECAR_{}", key.replace('.', "__").to_uppercase()), value));
    let env: Vec<_> = env.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    check(Given::required().without("AMAZON_CLIENT_ID").env(&env));
    check(Given::required().without("AMAZON_CLIENT_ID").toml(
        "[amazon]\nclient_id = 12345\n[proxy]\nallowed_hosts = ['App.Internal', '[FD00::1]']\nreplay_limit = 1024\n\
         socket_mode = '0660'\npeer_uids = [1000, '2000']\n\
         max_body = '8MiB'\ntoken_shim = false\n[refresh]\nidle_after = '2weeks'\nconcurrency = 3\n[upstream]\n\
         http2 = 'never'",
    ));
}

// Secrets.

#[test]
fn no_secret_is_printed() {
    let given = Given::nothing()
        .env(&[("AMAZON_CLIENT_ID", "id"), ("AMAZON_CLIENT_SECRET", CANARY), ("FERNET_KEY", FERNET_KEY)])
        .env(&[("AMAZON_REFRESH_TOKEN", CANARY), ("ADSIDECAR_PROXY__CALLER_TOKEN", &format!("{CANARY},{CANARY}2"))]);
    let config = given.config();
    for shown in [format!("{config:?}"), format!("{config:#?}"), config.redacted_toml()] {
        assert!(!shown.contains(CANARY) && !shown.contains(&FERNET_KEY[..8]), "{shown}");
        assert!(shown.contains('…'), "{shown}");
    }
}

#[test]
fn what_is_printed_means_the_same_once_its_secrets_are_back() {
    let secrets = [("amazon.client_secret", "secret"), ("store.fernet_keys", FERNET_KEY)];
    let all = [("proxy.caller_token", "t"), ("amazon.refresh_token", "Atzr|x")];
    let sets = [
        ("proxy.listen", "127.0.0.1:1,unix:/run/\"x\\.sock"),
        ("login.listen", "[::]:2"),
        ("proxy.max_body", "7MiB"),
        ("proxy.socket_mode", "0666"),
        ("proxy.peer_uids", "7,8"),
        ("proxy.body_timeout", "1s"),
        ("proxy.write_timeout", "90s"),
        ("store.path", "a \"b\"/\\c"),
        ("amazon.region", "fe"),
        ("login.frontend_url", "https://app.example/x?y=%22"),
        ("admin.public_url", "https://ads.example/status/"),
        ("upstream.eu", "https://[::1]:8443"),
        ("shutdown.accept", "1500ms"),
        ("proxy.allowed_hosts", "a,b"),
        ("policy.allow", "GET /v2/*,POST /**"),
        ("policy.mode", "observe"),
        ("log.audit", "true"),
    ];
    for given in [
        Given::required(),
        Given::required().set(&all).set(&sets),
        Given::required()
            .env(&[("ENVIRONMENT", "development")])
            .toml("[[account]]\nname = 'a'\nprofile_id = 1\nallow = ['* /x']"),
    ] {
        let printed = given.config().redacted_toml();
        let mut again = Given::nothing().toml(&printed).set(&secrets);
        if printed.contains("caller_token") {
            again = again.set(&all);
        }
        assert_eq!(again.config().redacted_toml(), printed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever stands at whatever key: nothing panics, and what is refused is not repeated (a path is, so no noise
    /// makes one of it).
    #[test]
    fn no_value_is_ever_repeated(index in 0..KEYS.len(), noise in "[^\\pC/.]{0,12}", layer in 0..3_u8) {
        let key = KEYS[index].name;
        let value = format!("{noise}{CANARY}{noise}");
        let given = Given::required();
        let variable = format!("ADSIDECAR_{}", key.replace('.', "__").to_ascii_uppercase());
        let given = match (layer, key.split_once('.')) {
            (0, Some(_)) => given.env(&[(&variable, &value)]),
            (1, Some((section, name))) => {
                given.toml(&format!("[{section}]\n{name} = {}", toml::Value::String(value)))
            }
            _ => given.set(&[(key, &value)]),
        };
        if let Err(problems) = given.load() {
            let shown = format!("{problems}{problems:?}");
            prop_assert!(!shown.contains(CANARY), "{}", shown);
            prop_assert!(problems.iter().any(|problem| problem.key == key), "{}", shown);
        }
    }
}

// The files that ship.

/// Everything about a configuration but its secrets.
fn debug(given: &Given) -> String {
    format!("{:#?}", given.config())
}

fn shipped(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)).unwrap()
}

#[test]
fn the_example_holds_the_defaults() {
    assert_eq!(debug(&Given::required().toml(&shipped("example.toml"))), debug(&Given::required()));
}

#[test]
fn each_default_of_the_table_is_a_value_of_its_key() {
    let shown = |given: Given| given.config().redacted_toml().replace(", [::1] only where the machine has IPv6", "");
    let default = shown(Given::required()).replace("# listen", "listen");
    for key in KEYS {
        if let Some(text) = key.default_text().filter(|text| !text.is_empty()) {
            let given = shown(Given::required().set(&[(key.name, text)])).replace("# listen", "listen");
            assert_eq!(given, default, "{}", key.name);
        }
    }
}

#[test]
fn a_change_of_a_value_that_needs_a_restart_is_noticed() {
    let postgres = Given::required().set(&[("store.kind", "postgres"), ("store.postgres_url", "postgres://u:a@db/d")]);
    let (sled, postgres) = (Given::required().config(), postgres.config());
    let changed = |old: &Config, sets: &[(&str, &str)]| {
        let kind = [("store.kind", "postgres")];
        let given = Given::required().without("FERNET_KEY").set(if old.store.postgres.is_some() { &kind } else { &[] });
        let new = given.set(&[("store.fernet_keys", FERNET_KEY)]).set(sets).config().restart_only();
        let pairs = old.restart_only().into_iter().zip(new);
        pairs.filter(|(old, new)| old != new).map(|(old, _)| old.0).collect::<Vec<_>>()
    };
    for (key, value) in [
        ("proxy.listen", "127.0.0.1:1"),
        ("proxy.socket_mode", "0660"),
        ("login.listen", "127.0.0.1:1"),
        ("admin.listen", "127.0.0.1:1"),
        ("store.path", "elsewhere"),
        ("store.fernet_keys", "IsKC66kDxjTi9bOkVjBqJPzSn8ThfWpVS_YQxSgvPBA="),
    ] {
        assert_eq!(changed(&sled, &[(key, value)]), [key]);
    }
    assert_eq!(changed(&postgres, &[("store.postgres_url", "postgres://u:b@db/d")]), ["store.postgres_url"]);
    assert_eq!(changed(&postgres, &[("store.postgres_url", "postgres://u:a@db/d")]), [""; 0]);
    // The default listener, given explicitly, is the same listener.
    assert_eq!(changed(&sled, &[("admin.listen", "127.0.0.1:9464,[::1]:9464")]), [""; 0]);
}

#[test]
fn the_commented_keys_of_the_example_say_the_truth() {
    let example = shipped("example.toml");
    let uncommented = example.lines().map(|line| match line.strip_prefix('#') {
        Some(key) if !key.is_empty() && !key.starts_with(' ') => key,
        _ => line,
    });
    let certificate = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap().cert.pem();
    let given = Given::nothing();
    let ca = given.write("ca.pem", &certificate);
    let given = given
        .toml(&uncommented.collect::<Vec<_>>().join("\n"))
        .set(&[("amazon.client_secret", "x"), ("store.fernet_keys", FERNET_KEY), ("proxy.caller_token", "x")])
        .set(&[("amazon.ca_file", &ca), ("upstream.ca_file", &ca), ("amazon.refresh_token", "x")]);
    let problems = given.load().unwrap_err();
    let mut keys: Vec<_> = problems.iter().map(|problem| problem.key.as_str()).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["store.postgres_url"], "{problems}");
    let given = given.set(&[("store.kind", "postgres")]);
    assert!(given.config().store.postgres.is_some());
}

#[test]
fn a_shared_store_is_told_without_its_url_and_needs_a_key_that_all_can_have() {
    let url = "postgres://adsidecar:canary-9f3a@db.internal/ads?sslmode=verify-full";
    let given = Given::required().set(&[("store.kind", "postgres"), ("store.postgres_url", url)]);
    let printed = given.config().redacted_toml();
    assert!(printed.contains("kind = \"postgres\"\npostgres_url = \"…\""), "{printed}");
    assert!(!printed.contains("canary") && !printed.contains("db.internal"), "{printed}");
    let client = [("amazon.client_id", "x"), ("amazon.client_secret", "x"), ("environment", "development")];
    let keyless = Given::nothing().set(&client).set(&[("store.kind", "postgres"), ("store.postgres_url", url)]);
    one_problem(&keyless, &["missing Fernet key"]);
}

#[test]
fn an_outgoing_proxy_is_used_only_where_a_key_says_so_and_its_password_is_not_shown() {
    let environment = [
        ("HTTPS_PROXY", "http://ann:canary-9f3a@upper:3128"),
        ("ALL_PROXY", "socks5://all:1080"),
        ("NO_PROXY", "api.amazon.com,10.0.0.0/8"),
    ];
    let urls = |given: &Given| {
        let config = given.config();
        let shown = format!("{}{config:?}", config.redacted_toml());
        assert!(!shown.contains("canary"), "{shown}");
        [config.lwa.proxy, config.upstream.proxy].map(|proxy| proxy.map(|proxy| (proxy.url(), proxy.named_by)))
    };
    let named = |url: &str, by: &str| Some((url.to_owned(), by.to_owned()));
    let given = || Given::required().env(&environment);
    assert_eq!(urls(&given()), [None, None]);
    assert_eq!(urls(&given().set(&[("upstream.proxy", "none"), ("amazon.proxy", "none")])), [None, None]);
    let own = given().set(&[("upstream.proxy", "http://bob:canary-9f3a@own:8080"), ("amazon.proxy", "environment")]);
    let expected = [named("http://upper:3128", "HTTPS_PROXY"), named("http://own:8080", "upstream.proxy")];
    assert_eq!(urls(&own), expected);
    let proxy = own.config().lwa.proxy.unwrap();
    assert!(!proxy.is_for("api.amazon.com") && !proxy.is_for("10.1.2.3") && proxy.is_for("api.amazon.co.uk"));
    let printed = own.config().redacted_toml();
    assert!(printed.contains("proxy = \"environment\"") && printed.contains("proxy = \"…\""), "{printed}");
    let asked = || given().set(&[("upstream.proxy", "environment")]);
    let lower = asked().env(&[("https_proxy", "http://lower:1")]);
    assert_eq!(urls(&lower)[1], named("http://lower:1", "https_proxy"));
    let all = asked().without("HTTPS_PROXY");
    assert_eq!(urls(&all)[1], named("socks5://all:1080", "ALL_PROXY"));
    one_problem(&asked().env(&[("HTTPS_PROXY", "canary-9f3a")]), &["upstream.proxy", "HTTPS_PROXY, which is not a"]);
    let none = Given::required().set(&[("upstream.proxy", "environment")]);
    assert_eq!(urls(&none)[1], None);
    assert!(none.config().warnings.iter().any(|warning| warning.to_string().contains("HTTPS_PROXY")));
    let file = Given::required();
    let path = file.write("proxy", "http://ann:canary-9f3a@file:3128\n");
    assert_eq!(urls(&file.set(&[("amazon.proxy_file", &path)]))[0], named("http://file:3128", "amazon.proxy"));
}

#[test]
fn the_defaults_are_those_of_the_manual() {
    let config = Given::required().config();
    let seconds = Duration::from_secs;
    assert_eq!(config.environment, Environment::Production);
    let tcp = |port: u16| [Listen::Tcp(format!("127.0.0.1:{port}")), Listen::Tcp(format!("[::1]:{port}"))];
    assert_eq!((config.proxy_listen.as_slice(), config.proxy_listen_default), (&tcp(8001)[..], true));
    assert_eq!((config.admin_listen.as_slice(), config.admin_listen_default), (&tcp(9464)[..], true));
    assert!(config.login_listen.is_empty() && !config.login.confirm && config.login.secure_cookies);
    assert_eq!(config.lwa.redirect_uri, "http://localhost:8001/api/auth/amazon/callback");
    assert_eq!(config.lwa.scope, "advertising::campaign_management");
    assert_eq!((config.lwa.region, config.proxy.region), (Region::Na, Region::Na));
    assert!(config.lwa.authorize_url.is_none() && config.lwa.token_url.is_none() && config.tokens.adopt.is_none());
    assert!(
        config.admission.allowed_hosts.is_empty() && config.admission.caller_tokens.is_empty() && !config.allow_remote
    );
    assert_eq!((config.proxy.token_shim, config.proxy.selection), (true, proxy::Selection::Header));
    assert_eq!((config.proxy.replay_limit, config.proxy.max_body), (262_144, None));
    let limits = config.limits;
    assert_eq!((config.socket_mode, config.admission.peer_uids.len()), (0o600, 0));
    assert_eq!((config.proxy.body_timeout, limits.write_timeout), (seconds(30), seconds(30)));
    assert_eq!((limits.max_connections, limits.header_timeout, limits.idle_timeout), (4096, seconds(10), seconds(600)));
    assert!(config.proxy.policy.rules.is_empty() && config.proxy.policy.mode == crate::domain::policy::Mode::Enforce);
    assert_eq!(config.store.path, Path::new("data/adsidecar.sled"));
    let policy = config.tokens.policy;
    assert_eq!((policy.margin, policy.ahead, policy.idle_after), (seconds(300), seconds(900), seconds(604_800)));
    assert_eq!((config.tokens.sweep, config.tokens.concurrency), (seconds(600), 8));
    assert_eq!(
        config.upstream.origins.each_ref().map(url::Url::as_str),
        [
            "https://advertising-api.amazon.com/",
            "https://advertising-api-eu.amazon.com/",
            "https://advertising-api-fe.amazon.com/",
            "https://advertising-ai.amazon.com/",
            "https://advertising-ai-eu.amazon.com/",
            "https://advertising-ai-fe.amazon.com/"
        ]
    );
    let upstream = config.upstream;
    assert_eq!(upstream.http2, upstream::Http2::Auto);
    let timeouts = (upstream.connect_timeout, upstream.response_timeout, upstream.idle_timeout);
    assert_eq!(timeouts, (seconds(5), seconds(120), upstream::IdleTimeout::Auto));
    assert_eq!(config.metrics.max_user_series, 1000);
    assert_eq!((config.log.format, config.log.level), (log::Format::Json, log::Level::Info));
    assert!(!config.log.audit);
    assert_eq!(config.shutdown, Shutdown { accept: Duration::ZERO, drain: seconds(25) });
}

#[test]
fn the_minimal_file_needs_its_two_secrets_and_nothing_else() {
    let given = Given::nothing().toml(&shipped("minimal.toml"));
    let shown = given.refused();
    assert!(shown.starts_with("2 problems"), "{shown}");
    for path in ["/run/secrets/amazon_client_secret", "/run/secrets/fernet_key"] {
        assert!(shown.contains(path), "{shown}");
    }
    let secret = given.write("secret", "secret\n");
    let key = given.write("key", &format!("{FERNET_KEY}\n"));
    let minimal = shipped("minimal.toml")
        .replace("/run/secrets/amazon_client_secret", &secret)
        .replace("/run/secrets/fernet_key", &key);
    let config = given.toml(&minimal).config();
    assert_eq!(config.lwa.client_secrets, [Secret::new("secret")]);
    assert_eq!(config.fernet_keys, FernetKeys::Given(vec![Secret::new(FERNET_KEY)]));
}

#[test]
fn the_sandbox_file_points_at_the_sandbox_and_nowhere_else() {
    let certificate = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap().cert.pem();
    let given = Given::nothing();
    let ca = given.write("ca.pem", &certificate);
    let given = given.toml(&shipped("sandbox.toml").replace("data/sandbox/ca.pem", &ca));
    let config = given.config();
    // The default listeners of `adsidecar-sandbox`.
    let ours = |url: &url::Url| {
        ["localhost", "127.0.0.1"].contains(&url.host_str().unwrap())
            && url.port().is_some_and(|port| (8440..=8446).contains(&port) || port == 8450)
    };
    assert!(config.upstream.origins.iter().chain(&config.lwa.authorize_url).chain(&config.lwa.token_url).all(ours));
    let ports = config.upstream.origins.each_ref().map(url::Url::port);
    let expected = [8441, 8442, 8443, 8444, 8445, 8446].map(Some);
    assert_eq!(ports, expected, "na, eu, fe, and the MCP hosts");
    let return_url = "http://localhost:8001/api/auth/amazon/callback";
    assert_eq!(config.lwa.redirect_uri, return_url, "the only one that the sandbox knows");
    // The sandbox's own adsidecar has the default listeners, and holds data/sandbox/adsidecar.sled.
    assert!(!config.proxy_listen_default && !config.admin_listen_default);
    assert_ne!(config.store.path, Path::new("data/sandbox/adsidecar.sled"));
    assert_eq!(config.lwa.authorize_url.unwrap().path(), "/ap/oa");
    assert_eq!(config.lwa.token_url.unwrap().path(), "/auth/o2/token");
    assert_eq!((config.lwa.extra_roots.len(), config.upstream.extra_roots.len()), (1, 1));
    assert_eq!(config.fernet_keys, FernetKeys::MakeBesideStore);
    assert!(config.store.path.starts_with("data/sandbox"));
}

/// A word that `resolve` forgot would mean the same as another.
#[test]
fn each_word_of_the_table_means_something_of_its_own() {
    let words = KEYS.iter().filter(|key| key.not_built.is_none()).filter_map(|key| match key.kind {
        super::keys::Kind::Word(words) => Some((key.name, words)),
        _ => None,
    });
    let mut keys = 0;
    for (key, words) in words {
        let meaning = |word: &&str| {
            let given = Given::required().set(&[(key, word)]);
            let given = match *word {
                "postgres" => given.set(&[("store.postgres_url", "postgres://a@localhost/b")]),
                _ => given,
            };
            let config = Config { effective: Default::default(), ..given.config() };
            format!("{config:?}")
        };
        let meanings: std::collections::BTreeSet<_> = words.iter().map(meaning).collect();
        assert_eq!(meanings.len(), words.len(), "{key}: two of {words:?} mean the same");
        keys += 1;
    }
    assert!(keys >= 8, "{keys} keys with words");
}
