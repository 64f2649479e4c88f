//! The tables of keys, error codes, metrics, commands and API families in the manuals, and `config/example.toml`, are
//! made from the code. After a change run `UPDATE_MANUALS=1 cargo nextest run -E 'test(manuals)'`.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use adsidecar::config::keys::{ACCOUNT, ACCOUNT_HELP, ACCOUNT_KEYS, Default, KEYS, Key, Kind};
use adsidecar::domain::account::Context;
use adsidecar::domain::api_families::{Family, families};
use adsidecar::inbound::problem::Code;
use adsidecar::telemetry::metrics::{Metrics, REFRESH_FAILURES, Settings};

const COLUMNS: usize = 120;

#[test]
fn the_generated_tables_of_the_manuals_are_those_of_the_code() {
    let config = [("families", families_table()), ("errors", errors()), ("keys", keys()), ("commands", commands())];
    check("config/README.md", |text| config.iter().fold(text, |text, (name, table)| with_table(&text, name, table)));
    check("deploy/README.md", |text| with_table(&with_table(&text, "metrics", &metrics()), "doctor", &doctor()));
}

#[test]
fn the_example_of_the_manuals_holds_every_key() {
    check("config/example.toml", |_| example());
}

#[test]
fn the_runbook_of_the_manuals_explains_every_reason_of_a_failed_refresh() {
    let runbook = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/RUNBOOK.md")).unwrap();
    let (_, section) = runbook.split_once("## AdsTokenRefreshFailing\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let items: Vec<&str> = section.split("\n- ").skip(1).filter_map(|item| Some(item.split_once(':')?.0)).collect();
    let explained: Vec<&str> = items.iter().flat_map(|names| names.split(", ")).map(|n| n.trim_matches('`')).collect();
    for reason in REFRESH_FAILURES {
        assert!(explained.contains(&reason), "deploy/RUNBOOK.md does not explain the reason {reason}: {explained:?}");
    }
}

/// Known-bad: a table that differs is stale, and only the text between its markers is replaced.
#[test]
fn a_stale_table_of_the_manuals_is_replaced_between_its_markers() {
    let page = "a\n<!-- generated: keys -->\nold\n<!-- end -->\nb\n<!-- generated: errors -->\nx\n<!-- end -->\n";
    let expected = page.replace("old\n", "new\n");
    assert_eq!(with_table(page, "keys", "new\n"), expected);
    assert_eq!(with_table(&expected, "keys", "new\n"), expected);
}

/// Compares a file with what is made from it, or writes that if `UPDATE_MANUALS` is set.
fn check(name: &str, make: impl FnOnce(String) -> String) {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let text = fs::read_to_string(&path).unwrap();
    let made = make(text.clone());
    if std::env::var_os("UPDATE_MANUALS").is_some() {
        fs::write(&path, made).unwrap();
    } else if let Some((stale, line)) = text.lines().zip(made.lines()).find(|(text, made)| text != made) {
        panic!("{name} is stale: run with UPDATE_MANUALS=1. It has\n{stale}\nand should have\n{line}");
    } else {
        assert_eq!(text.len(), made.len(), "{name} is stale: run with UPDATE_MANUALS=1");
    }
}

/// The page with `table` between the markers of `name`.
fn with_table(page: &str, name: &str, table: &str) -> String {
    let begin = format!("<!-- generated: {name} -->\n");
    let (before, rest) = page.split_once(&begin).unwrap_or_else(|| panic!("no marker {begin}"));
    let (_, after) = rest.split_once("<!-- end -->").unwrap_or_else(|| panic!("no end of {begin}"));
    assert!(!after.contains(&begin), "two markers {begin}");
    format!("{before}{begin}{table}<!-- end -->{after}")
}

fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut text = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(N));
    for row in rows {
        assert!(row.iter().all(|cell| !cell.contains(['|', '\n'])), "a cell would end early: {row:?}");
        writeln!(text, "| {} |", row.join(" | ")).unwrap();
    }
    text
}

// The keys.

fn keys() -> String {
    let account = ACCOUNT_KEYS.iter().map(|key| (format!("{ACCOUNT}.{}", key.name), key));
    let rows = KEYS.iter().map(|key| (key.name.to_owned(), key)).chain(account).map(|(name, key)| {
        let marks = [(key.is_secret(), "*Secret.* "), (key.restart, "*Restart.* ")];
        let mut what: String = marks.into_iter().filter(|(set, _)| *set).map(|(_, mark)| mark).collect();
        what += key.help;
        if let Some(variable) = key.guide_name {
            write!(what, ". Environment: `{variable}`").unwrap();
        }
        let default = match key.default {
            Default::Value("") => "`[]`".to_owned(),
            Default::Value(text) | Default::Implied(text) => format!("`{}`", text.replace(", ", "`, `")),
            Default::Described { text, .. } => text.to_owned(),
        };
        [format!("`{name}`"), key.kind.to_string(), default, what]
    });
    table(["key", "type", "default", "what it is"], rows)
}

fn example() -> String {
    let mut text = "\
# Every key of adsidecar with its default. A line that begins with \"#\" and a key shows a key without a default, or
# whose default depends on other keys. Made from src/config/keys.rs; a test fails when it is stale.
#
# Layers, each overriding the one before: the defaults, this file (--config, or ADSIDECAR_CONFIG), the environment, and
# --set section.key=value.
#   - Each `section.key` is also the environment variable ADSIDECAR_SECTION__KEY (two underscores); lists are separated
#     by commas there. The names of Amazon's guide work too and are noted at their keys, each also with _FILE.
#   - Each secret `x` can be given as `x_file` instead: the path of a file that holds it. Several values are separated
#     by commas in one text, by line ends in one file, or are a list here.
#   - Durations are written as 30s, 5m or 7d, sizes as 256KiB. Paths are relative to the working directory.
#   - Unknown keys are refused. `adsidecar check` shows what a configuration means, without its secrets.
"
    .to_owned();
    let mut section = "";
    for key in KEYS {
        let (of_key, name) = key.name.split_once('.').unwrap_or(("", key.name));
        text.push('\n');
        if of_key != section {
            section = of_key;
            writeln!(text, "[{section}]").unwrap();
        }
        text += &comment(&help(key));
        let (mark, value) = example_value(key);
        writeln!(text, "{mark}{name} = {value}").unwrap();
    }
    write!(text, "\n{}#[[{ACCOUNT}]]\n", comment(&format!("{}.", without_links(ACCOUNT_HELP)))).unwrap();
    for key in ACCOUNT_KEYS {
        writeln!(text, "{}#{} = {}", comment(&help(key)), key.name, example_value(key).1).unwrap();
    }
    text
}

/// The help text of a key for the example, which has no column for the rest.
fn help(key: &Key) -> String {
    let mut text = format!("{}.", without_links(key.help));
    match key.default {
        Default::Described { text: "none", .. } => {}
        Default::Described { text: required, .. } if required.starts_with("required") => {
            text = format!("R{}. {text}", &required[1..]);
        }
        Default::Described { text: default, .. } => write!(text, " Default: {default}.").unwrap(),
        Default::Value(_) | Default::Implied(_) => {}
    }
    match &key.kind {
        Kind::Count(..) | Kind::Duration(..) | Kind::DurationOrAuto(..) | Kind::Size(_) => {
            write!(text, " A {}.", key.kind).unwrap()
        }
        Kind::Word(words) if !words.iter().all(|word| text.contains(&format!("`{word}`"))) => {
            write!(text, " One of {}.", key.kind).unwrap();
        }
        Kind::Secret | Kind::Secrets => {
            let name = key.name.rsplit('.').next().unwrap_or_default();
            write!(text, " A secret: `{name}_file` can name a file that holds it.").unwrap();
        }
        _ => {}
    }
    if let Some(variable) = key.guide_name {
        write!(text, " Environment: {variable}.").unwrap();
    }
    text
}

/// `[text](target)` becomes `text`.
fn without_links(markdown: &str) -> String {
    let mut parts = markdown.split("](");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let open = text.rfind('[').expect("a link has a text");
        text.remove(open);
        text += part.split_once(')').expect("a link has an end").1;
    }
    text
}

/// The text as comment lines.
fn comment(text: &str) -> String {
    let (mut lines, mut line) = (String::new(), "#".to_owned());
    for word in text.split(' ') {
        if line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines += &(line + "\n");
            line = "#".to_owned();
        }
        line += &format!(" {word}");
    }
    lines + &line + "\n"
}

/// What comments the key out, if anything does, and its value as TOML.
fn example_value(key: &Key) -> (&'static str, String) {
    let (mark, text) = match key.default {
        Default::Value(text) => ("", text),
        Default::Implied(text) => ("#", text),
        Default::Described { example, .. } => ("#", example),
    };
    let quoted = |text: &str| format!("\"{text}\"");
    let list = |show: &dyn Fn(&str) -> String| {
        let parts: Vec<_> = text.split(", ").filter(|part| !part.is_empty()).map(show).collect();
        format!("[{}]", parts.join(", "))
    };
    let value = match key.kind {
        Kind::Flag | Kind::Count(..) | Kind::Headers => text.to_owned(),
        Kind::Numbers => list(&str::to_owned),
        Kind::List => list(&quoted),
        Kind::Addresses if text.contains(", ") => list(&quoted),
        _ => quoted(text),
    };
    (mark, value)
}

// The rest.

fn errors() -> String {
    let rows = Code::ALL.into_iter().map(|code| {
        let (meaning, remedy) = code.reference();
        [code.status().as_u16().to_string(), format!("`{}`", code.as_str()), meaning.to_owned(), remedy.to_owned()]
    });
    table(["status", "code", "meaning", "what to do"], rows)
}

fn metrics() -> String {
    let metrics = Metrics::new(Settings { max_user_series: 1 }, 0.0).unwrap();
    let rows = metrics.descriptions().iter().map(|metric| {
        let labels = match metric.variable_labels.join(",") {
            labels if labels.is_empty() => labels,
            labels => format!("{{{labels}}}"),
        };
        [format!("`adsidecar_{}{labels}`", metric.fq_name), metric.help.clone()]
    });
    table(["metric", "what it tells"], rows)
}

fn commands() -> String {
    let mut rows = Vec::new();
    add_commands(&adsidecar::cli::command(), "", &mut rows);
    table(["command", "what it does"], rows)
}

/// The commands of a group, by their full names.
fn add_commands(group: &clap::Command, above: &str, rows: &mut Vec<[String; 2]>) {
    let path = format!("{above}{} ", group.get_name());
    for command in group.get_subcommands() {
        if command.has_subcommands() {
            add_commands(command, &path, rows);
            continue;
        }
        let mut usage = format!("{path}{}", command.get_name());
        for argument in command.get_arguments() {
            let value = argument.get_value_names().map(|names| names.join(" ")).unwrap_or_default();
            usage += &match (argument.get_long(), argument.get_action().takes_values()) {
                (Some(long), true) => format!(" [--{long} {value}]"),
                (Some(long), false) => format!(" [--{long}]"),
                (None, _) if argument.is_required_set() => format!(" {value}"),
                (None, _) => format!(" [{value}]"),
            };
        }
        let about = command.get_long_about().or(command.get_about()).expect("each command has a help text").to_string();
        let what: Vec<_> = about.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect();
        rows.push([format!("`{usage}`"), what.join(". ")]);
    }
}

fn doctor() -> String {
    let rows = adsidecar::cli::doctor::CODES.iter().map(|row| {
        let code = format!("`{}`{}", row.code, if row.fails { "" } else { " (warns)" });
        [row.group.title().to_owned(), code, row.means.to_owned(), row.fault.to_owned(), row.cure.to_owned()]
    });
    table(["group", "code", "what it means", "whose fault", "what fixes it"], rows)
}

fn families_table() -> String {
    let rows = families().map(|family| {
        let paths: Vec<_> = family.paths.iter().map(|path| format!("`{path}`")).collect();
        let paths = if family.is_unknown() { "any other path".to_owned() } else { paths.join(", ") };
        let counted = if family.is_unknown() { ", counted by `adsidecar_unknown_family_total`" } else { "" };
        [paths, ids(family), format!("`{}`{counted}", family.name)]
    });
    table(["path begins with", "ids of the account", "API family"], rows)
}

/// The keys of the ids that a family takes. Of two that exclude each other the first one wins.
fn ids(family: &Family) -> String {
    let mut ids: Vec<String> = Vec::new();
    for context in family.context.iter().map(|header| header.context()) {
        match family.exclusive.filter(|(_, second)| *second == context) {
            Some((winner, _)) => {
                let winner = id_key(winner);
                let place = ids.iter().position(|id| *id == winner).expect("the winner stands first");
                ids[place] = format!("{winner} or {}", id_key(context));
            }
            None => ids.push(id_key(context)),
        }
    }
    if ids.is_empty() { "none".to_owned() } else { ids.join(", ") }
}

fn id_key(context: Context) -> String {
    let key = ACCOUNT_KEYS.iter().find(|key| key.kind == Kind::Id(context)).expect("each id has a key");
    format!("`{}`", key.name)
}
