//! The module structure: a top-level module uses only modules below it in the list of `src/lib.rs`, and inside every
//! folder, at every depth, there are no circular dependencies between modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

type Module = Vec<String>;

/// The top-level modules, from the top down.
const ROOMS: [&str; 12] = [
    "cli",
    "app",
    "config",
    "inbound",
    "notify",
    "auth",
    "throttle",
    "upstream",
    "store",
    "server",
    "telemetry",
    "domain",
];

/// The fixed list of files and folders at the top level. Names that begin with a dot are exempt.
const TOP_LEVEL: [&str; 9] =
    ["CHANGELOG.md", "Cargo.lock", "Cargo.toml", "Dockerfile", "LICENSE", "README.md", "config", "deploy", "src"];

#[test]
fn the_top_level_modules_are_the_listed_ones() {
    let library = fs::read_to_string(source().join("lib.rs")).unwrap();
    let listed: Vec<_> = library.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert_eq!(listed, ROOMS);
    let there: BTreeSet<_> = tracked("HEAD:src").into_iter().collect();
    assert_eq!(
        there,
        ROOMS
            .iter()
            .copied()
            .chain(["lib.rs", "main.rs", "build.rs", "serving.ld", "serving.profdata"])
            .map(str::to_owned)
            .collect()
    );
}

#[test]
fn the_top_level_folder_contains_the_fixed_list() {
    let names: BTreeSet<_> = tracked("HEAD").into_iter().filter(|name| !name.starts_with('.')).collect();
    assert_eq!(names, TOP_LEVEL.iter().copied().chain(["tests"]).map(str::to_owned).collect());
}

/// The names in a folder that git tracks.
fn tracked(tree: &str) -> Vec<String> {
    let mut git = std::process::Command::new("git");
    let listing = git.args(["ls-tree", "--name-only", tree]).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(listing.status.success(), "this test needs git and a checkout");
    String::from_utf8(listing.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_top_level_module_uses_only_modules_listed_below_it() {
    let modules = read(&source());
    assert!(modules.len() > 60, "found too few source files");
    let upward: Vec<_> = uses(&modules)
        .into_iter()
        .filter(|(from, to)| !from.is_empty() && !to.is_empty() && floor(&to[0]) < floor(&from[0]))
        .map(|(from, to)| format!("{} uses {}", from.join("::"), to.join("::")))
        .collect();
    assert!(upward.is_empty(), "{}", upward.join("\n"));
}

#[test]
fn modules_have_no_circular_dependencies_at_any_depth() {
    let sandbox = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sandbox/src");
    for (sources, least) in [(source(), 60), (sandbox, 10)] {
        let modules = read(&sources);
        assert!(modules.len() > least, "found too few source files");
        assert_eq!(circles(&uses(&modules)), Vec::<String>::new());
    }
}

/// Known-bad: the checks above must find these planted violations.
#[test]
fn a_planted_cycle_and_a_planted_upward_dependency_are_found() {
    let files = [
        ("a", "mod x; mod y;"),
        ("a::x", "use super::y::{self, deep::{Thing, Other}};"),
        ("a::y", "fn f() { crate::a::x::g() }"),
        ("b", "// use crate::a::x;\nuse std::fmt;"),
        ("a::y::deep", "use std::io;"),
    ];
    let files = files.map(|(name, text)| (name.split("::").map(str::to_owned).collect(), text.to_owned()));
    let uses = uses(&BTreeMap::from(files));
    assert_eq!(circles(&uses), ["a: x -> y -> x"]);
    let path = |name: &str| -> Module { name.split("::").map(str::to_owned).collect() };
    assert!(uses.contains(&(path("a::x"), path("a::y::deep"))));
    assert!(!uses.iter().any(|(from, _)| from == &path("b")), "a comment does not count as a use");
}

/// The limit of `.rustfmt.toml`, which does not break strings and comments, for everything that people read as code.
const MOST_COLUMNS: usize = 120;

/// Prose and data: a paragraph, a row of a table or a picture is one line.
const UNBROKEN: [&str; 8] = ["md", "tsv", "json", "lock", "txt", "svg", "png", "zip"];

#[test]
fn no_line_is_longer_than_120_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut git = std::process::Command::new("git");
    let listing = git.args(["ls-files"]).current_dir(root).output().unwrap();
    let (mut files, mut long) = (0, Vec::new());
    for name in String::from_utf8(listing.stdout).unwrap().lines() {
        let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        // A file that is no text, or that was just deleted, has no lines.
        let text = fs::read_to_string(root.join(name)).unwrap_or_default();
        if UNBROKEN.contains(&extension) || text.is_empty() {
            continue;
        }
        files += 1;
        let lines = (1..).zip(text.lines()).filter(|(_, line)| line.chars().count() > MOST_COLUMNS);
        long.extend(lines.map(|(number, line)| format!("{name}:{number}: {line}")));
    }
    assert!(files > 300, "{files}");
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn the_only_unsafe_code_is_the_declaration_by_which_memory_is_given_back() {
    let root = source();
    let exempt = |text: &str| {
        let words = ["unsafe_code", "unsafe(", "unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"];
        words.map(|word| text.matches(word).count()).iter().sum::<usize>()
    };
    let found = rust_files(&root).into_iter().filter_map(|file| {
        let times = exempt(&fs::read_to_string(&file).unwrap());
        (times > 0).then(|| (file.strip_prefix(&root).unwrap().to_owned(), times))
    });
    let heap = (PathBuf::from("server/heap.rs"), 2);
    assert_eq!(found.collect::<Vec<_>>(), [heap], "the exemption, and what it is for");
}

/// Lines that a file may have without a reason, its tests not counted.
const MOST_LINES: usize = 400;

#[test]
fn a_file_past_400_lines_says_why_in_its_first_comment() {
    let sandbox = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sandbox/src");
    let mut silent = Vec::new();
    for file in rust_files(&source()).into_iter().chain(rust_files(&sandbox)) {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().lines().count();
        let comment: Vec<_> = text.lines().map_while(|line| line.strip_prefix("//!")).collect();
        let says_why = ["file is ", "400 lines:"].iter().any(|words| comment.concat().contains(words));
        if code > MOST_LINES && !says_why && !file.ends_with("tests.rs") {
            silent.push(format!("{}: {code} lines", file.display()));
        }
    }
    assert!(silent.is_empty(), "{}", silent.join("\n"));
}

/// Files on the path of one ordinary request, besides those that serve its connection.
const MOST_FILES_OF_A_REQUEST: usize = 20;

#[test]
fn a_request_passes_through_at_most_twenty_files_and_through_none_twice() {
    let library = fs::read_to_string(source().join("lib.rs")).unwrap();
    let path = request_path(&library);
    let missing: Vec<_> = path.iter().flatten().filter(|file| !source().join(file).is_file()).collect();
    assert!(missing.is_empty(), "listed in src/lib.rs, but not there: {missing:?}");
    let (connection, request) = path.split_first().unwrap();
    let mut twice: Vec<_> = path.iter().flatten().collect();
    twice.sort();
    twice.dedup();
    let files = request.iter().flatten().count();
    assert_eq!(twice.len(), connection.len() + files, "a file is listed twice: {path:?}");
    assert_eq!((path.len(), connection.len()), (10, 5), "{path:?}");
    assert!((1..=MOST_FILES_OF_A_REQUEST).contains(&files), "{files} files: {request:?}");
}

/// The files of each step of "The path of one request" in `src/lib.rs`.
fn request_path(library: &str) -> Vec<Vec<String>> {
    let section = library.split("//! # The path of one request\n").nth(1).unwrap().split("//! # ").next().unwrap();
    let mut steps: Vec<Vec<String>> = Vec::new();
    for line in section.lines().map(|line| line.trim_start_matches("//!")) {
        let text = line.trim_start();
        if text.split_once(". ").is_some_and(|(number, _)| number.parse::<usize>() == Ok(steps.len() + 1)) {
            steps.push(Vec::new());
        } else if !line.starts_with("    ") {
            // A paragraph before or after the list.
            continue;
        }
        let names = text.split('`').skip(1).step_by(2).filter(|name| name.ends_with(".rs"));
        steps.last_mut().unwrap().extend(names.map(str::to_owned));
    }
    steps
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn floor(room: &str) -> usize {
    ROOMS.iter().position(|name| *name == room).unwrap_or(usize::MAX)
}

/// Every module with its text, without tests.
fn read(source: &Path) -> BTreeMap<Module, String> {
    let modules = rust_files(source).into_iter().map(|file| {
        let inside = file.strip_prefix(source).unwrap().with_extension("");
        let mut module: Module = inside.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        if module.last().is_some_and(|name| name == "mod" || name == "lib" || name == "main") {
            module.pop();
        }
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned();
        (module, code)
    });
    modules.filter(|(module, _)| module.last().is_none_or(|name| name != "tests")).collect()
}

/// The dependencies between modules, from every path that begins with `crate`, `super`, `self` or the name of a child
/// module.
fn uses(modules: &BTreeMap<Module, String>) -> BTreeSet<(Module, Module)> {
    let mut found = BTreeSet::new();
    for (module, text) in modules {
        let code: String =
            text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        for path in paths(&code) {
            let mut absolute = match path[0].as_str() {
                "crate" => Vec::new(),
                "super" => module[..module.len().saturating_sub(1)].to_vec(),
                "self" => module.clone(),
                _ => [module.as_slice(), &path[..1]].concat(),
            };
            for part in &path[1..] {
                match part.as_str() {
                    "super" => drop(absolute.pop()),
                    part => absolute.push(part.to_owned()),
                }
            }
            while !absolute.is_empty() && !modules.contains_key(&absolute) {
                absolute.pop();
            }
            if !absolute.is_empty() && absolute != *module {
                found.insert((module.clone(), absolute));
            }
        }
    }
    found
}

/// Every `a::b::{c, d::e}` of the code, expanded.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let starts = code.match_indices("::").filter_map(|(at, _)| {
        let name = code[..at].rfind(|c: char| !is_name(c)).map_or(0, |before| before + 1);
        // The middle of a longer path follows `::`.
        (name < at && !code[..name].ends_with("::")).then_some(name)
    });
    for start in starts {
        expand(&code[start..], &[], &mut found);
    }
    found
}

/// Parses one path, or each path of a list in braces, and returns the remaining text.
fn expand<'a>(text: &'a str, prefix: &[String], found: &mut Vec<Vec<String>>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut list) = text.strip_prefix('{') {
        loop {
            list = expand(list, prefix, found).trim_start();
            match list.strip_prefix(',') {
                Some(rest) => list = rest,
                None => return list.strip_prefix('}').unwrap_or_default(),
            }
        }
    }
    let end = text.find(|c: char| !is_name(c)).unwrap_or(text.len());
    let mut path = prefix.to_vec();
    if end > 0 {
        path.push(text[..end].to_owned());
    }
    match text[end..].strip_prefix("::") {
        Some(rest) if end > 0 => expand(rest, &path, found),
        _ => {
            if path.len() > 1 {
                found.push(path);
            }
            // Skip `as name` and the like, up to the end of the list's entry.
            text[end..].trim_start_matches(|c: char| c != ',' && c != '}' && c != ';')
        }
    }
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The cycles among the modules of each folder, each reported once.
fn circles(uses: &BTreeSet<(Module, Module)>) -> Vec<String> {
    let mut siblings: BTreeMap<Module, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (from, to) in uses {
        let common = from.iter().zip(to).take_while(|(from, to)| from == to).count();
        if let (Some(one), Some(other)) = (from.get(common), to.get(common)) {
            let folder = siblings.entry(from[..common].to_vec()).or_default();
            folder.entry(one.clone()).or_default().insert(other.clone());
        }
    }
    let mut found = Vec::new();
    for (folder, edges) in &siblings {
        let mut done = BTreeSet::new();
        for start in edges.keys() {
            if let Some(circle) = walk(edges, &mut vec![start.clone()], &mut done) {
                found.push(format!("{}: {}", folder.join("::"), circle.join(" -> ")));
            }
        }
    }
    found
}

/// A cycle reachable from `way`, found depth-first; visited modules are skipped.
fn walk(
    edges: &BTreeMap<String, BTreeSet<String>>,
    way: &mut Vec<String>,
    done: &mut BTreeSet<String>,
) -> Option<Vec<String>> {
    let here = way.last().unwrap().clone();
    if done.contains(&here) {
        return None;
    }
    for next in edges.get(&here).into_iter().flatten() {
        if let Some(at) = way.iter().position(|name| name == next) {
            let circle = way[at..].iter().chain([next]).cloned().collect();
            done.insert(here);
            return Some(circle);
        }
        way.push(next.clone());
        if let Some(circle) = walk(edges, way, done) {
            return Some(circle);
        }
        way.pop();
    }
    done.insert(here);
    None
}

pub fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
