//! The fuzz targets' checks, compiled as ordinary code and run on every input that fuzzing has kept. So a change that
//! breaks a target, or brings back what one of them found, fails here and not in the next campaign.

use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "../fuzz/src/lib.rs"]
mod checks;

type Check = fn(&[u8]);

const CHECKS: [(&str, Check); 7] = [
    ("callback_query", checks::callback_query::check),
    ("configuration", checks::configuration::check),
    ("framing_gate", checks::framing_gate::check),
    ("headers_and_rewrite", checks::headers_and_rewrite::check),
    ("lwa_answers", checks::lwa_answers::check),
    ("records", checks::records::check),
    ("target_form", checks::target_form::check),
];

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz")
}

/// The names of the files in a folder of tests/fuzz, without their extension.
fn names_in(folder: &str) -> BTreeSet<String> {
    let files = fs::read_dir(fuzz().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    files.map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn each_fuzz_target_has_its_check_here_and_a_corpus() {
    let checked: BTreeSet<_> = CHECKS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names_in("corpus"), checked);
    let with_known_bad = checked.into_iter().chain(["known_bad".to_owned()]).collect::<BTreeSet<_>>();
    assert_eq!(names_in("targets"), with_known_bad);
    for target in with_known_bad {
        let text = fs::read_to_string(fuzz().join(format!("targets/{target}.rs"))).unwrap();
        assert!(text.contains(&format!("adsidecar_fuzz::{target}::check(bytes)")), "{text}");
    }
}

#[test]
fn no_input_that_fuzzing_has_kept_breaks_a_promise() {
    let directory = tempfile::tempdir().unwrap();
    for (name, check) in CHECKS {
        let inputs = directory.path().join(name);
        let archive = fuzz().join(format!("corpus/{name}.zip"));
        let python = std::env::var("ADSIDECAR_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let unpacked = Command::new(python).args(["-m", "zipfile", "-e"]).arg(archive).arg(&inputs).status().unwrap();
        assert!(unpacked.success(), "{name}");
        let mut count = 0;
        for input in fs::read_dir(&inputs).unwrap() {
            let bytes = fs::read(input.unwrap().path()).unwrap();
            let shown = bytes.escape_ascii().to_string();
            catch_unwind(|| check(&bytes)).unwrap_or_else(|_| panic!("{name}: {shown}"));
            count += 1;
        }
        assert!(count > 20, "{name}: {count}");
    }
    // Known-bad: a check that fails is noticed.
    assert!(catch_unwind(|| checks::known_bad::check(b"/a/b/c")).is_err());
}
