//! What `--help` of each command says beyond its arguments: examples, where its settings come from, and exit codes.

use clap::Command;

/// The examples of each command, by its path; a line is a command, with an optional remark behind `#`.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "adsidecar                                   # serve, as configured in the environment",
            "adsidecar --config adsidecar.toml           # serve, as configured in a file",
            "adsidecar check --config adsidecar.toml     # is that file right?",
        ],
    ),
    (
        "serve",
        &[
            "adsidecar serve --config adsidecar.toml",
            "adsidecar serve --set proxy.listen=127.0.0.1:18001 --set log.level=debug",
            "kill -HUP $(pidof adsidecar)                # read the configuration again",
        ],
    ),
    (
        "check",
        &[
            "adsidecar check --config adsidecar.toml",
            "adsidecar check | grep redirect_uri   # what the environment means",
        ],
    ),
    (
        "login",
        &[
            "adsidecar login                       # the user default, in a browser of this machine",
            "adsidecar login --user shop --region eu",
            "adsidecar login --no-browser          # over ssh: prints the URL, takes the pasted redirect URL",
        ],
    ),
    ("status", &["adsidecar status", "adsidecar status --watch=5s", "adsidecar status -o json | jq '.problems[]'"]),
    (
        "doctor",
        &[
            "adsidecar doctor",
            "adsidecar doctor --pre                # before the first start: no network, no sidecar",
            "adsidecar doctor --anonymize          # for an issue report",
            "adsidecar doctor --wait 60s --fail-on warn -o json",
        ],
    ),
    (
        "explain",
        &[
            "adsidecar explain POST /sp/campaigns/list --account acme-de",
            "adsidecar explain GET /a/acme-de/v2/profiles -o json",
            "adsidecar explain PUT /sp/campaigns --user shop --header 'Prefer: return=representation'",
        ],
    ),
    ("accounts list", &["adsidecar accounts list", "adsidecar accounts list --country DE --type vendor -o json"]),
    ("accounts show", &["adsidecar accounts show acme-de"]),
    ("accounts sync", &["adsidecar accounts sync", "adsidecar accounts sync --user shop"]),
    (
        "users list",
        &[
            "adsidecar users list",
            "adsidecar users list -o json | jq -r '.[] | select(.state != \"fresh\") | .user_id'",
        ],
    ),
    ("users show", &["adsidecar users show default"]),
    (
        "users export",
        &[
            "adsidecar users export shop > shop.token            # clear text: keep it secret",
            "adsidecar users export shop --records > shop.json   # encrypted, for users import --records",
        ],
    ),
    ("users forget", &["adsidecar users forget shop"]),
    (
        "users import",
        &[
            "adsidecar users import --user shop < shop.token",
            "adsidecar users import --records shop.json --offline",
            "adsidecar users import --records - --replace < dump.json",
        ],
    ),
    ("key new", &["adsidecar key new > fernet.key", "export FERNET_KEY=$(adsidecar key new)"]),
    (
        "key rotate",
        &["FERNET_KEY=new,old adsidecar key rotate   # then remove the old key, once all grants are re-encrypted"],
    ),
    ("store dump", &["adsidecar store dump > adsidecar-$(date +%F).json"]),
    (
        "store restore",
        &["adsidecar store restore adsidecar-2026-08-01.json", "adsidecar store restore --replace < dump.json"],
    ),
    ("health", &["adsidecar health", "adsidecar health --ready   # as a readiness probe"]),
    ("wait", &["adsidecar wait --timeout 2m && python3 report.py"]),
    ("version", &["adsidecar version"]),
    (
        "completions",
        &["adsidecar completions bash > /etc/bash_completion.d/adsidecar", "source <(adsidecar completions zsh)"],
    ),
];

/// Commands that read no configuration.
const WITHOUT_CONFIGURATION: [&str; 3] = ["key new", "version", "completions"];

const SETTINGS: &str = "\
Settings, each overriding the one before:
  defaults              shown by `adsidecar check`, and with every key in config/example.toml
  --config FILE         or ADSIDECAR_CONFIG=FILE
  environment           ADSIDECAR_SECTION__KEY, and AMAZON_CLIENT_ID, AMAZON_CLIENT_SECRET, AMAZON_REFRESH_TOKEN,
                        AMAZON_OAUTH_REDIRECT_URI, AMAZON_SCOPE, AMAZON_REGION, FERNET_KEY, FRONTEND_URL, ENVIRONMENT;
                        each secret also with _FILE
  --set SECTION.KEY=VALUE
";
const EXIT_CODES: &str = "\
Exit codes:
  0   done
  1   failed; standard error says why
  64  the command line is wrong";
const MORE_EXIT_CODES: &str = "
  75  another process holds the store
  78  the configuration is wrong, or the Fernet key is not the one that encrypted the store";

/// `command` with these texts below the help of each command.
pub(super) fn taught(command: Command) -> Command {
    with_texts(command, "")
}

fn with_texts(command: Command, path: &str) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let mut command = command.after_long_help(text(path));
    for name in names {
        let path = if path.is_empty() { name.clone() } else { format!("{path} {name}") };
        command = command.mut_subcommand(name, |sub| with_texts(sub, &path));
    }
    command
}

fn text(path: &str) -> String {
    let examples = EXAMPLES.iter().find(|(command, _)| *command == path).map_or(&[][..], |(_, examples)| examples);
    let mut text = String::new();
    if !examples.is_empty() {
        text += "Examples:\n";
        examples.iter().for_each(|example| text += &format!("  {example}\n"));
        text += "\n";
    }
    let configured = !WITHOUT_CONFIGURATION.contains(&path);
    if configured {
        text += SETTINGS;
        text += "\n";
    }
    text + EXIT_CODES + if configured { MORE_EXIT_CODES } else { "" }
}
