//! Small files, read whole.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Largest file that is read, in bytes. A bundle of all public roots has about 250 KB; a device or a log would never
/// end.
const MAX_FILE: u64 = 1024 * 1024;

/// Stands for a path that may be the secret itself.
pub(super) const NOT_REPEATED: &str =
    "the file (not repeated here, as it may be a secret and no path; a path begins with / or ./)";

/// The value that the file at `path` holds: its text without the line end. The error says what is wrong and what to do.
pub(super) fn value(path: &Path) -> Result<String, String> {
    let text = read(path)?;
    match text.trim_end_matches(['\r', '\n']) {
        value if value.trim().is_empty() => Err(format!("{} holds nothing: write the value into it", shown(path))),
        value => Ok(value.to_owned()),
    }
}

/// The text of the file at `path`; the error says what is wrong and what to do.
pub(super) fn read(path: &Path) -> Result<String, String> {
    let fail = |error: std::io::Error| {
        let reason = match error.kind() {
            std::io::ErrorKind::NotFound => "does not exist: check the path, and that it is mounted",
            std::io::ErrorKind::PermissionDenied => "may not be read: give this process's user read permission",
            std::io::ErrorKind::IsADirectory => "is a directory: name the file in it",
            std::io::ErrorKind::InvalidData => "is not text in UTF-8: check that the path names the right file",
            _ => return format!("{} cannot be read ({}): check the path", shown(path), error.kind()),
        };
        format!("{} {reason}", shown(path))
    };
    let mut text = String::new();
    File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text)).map_err(fail)?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("{} is larger than 1 MiB: check that the path names the right file", shown(path)));
    }
    Ok(text)
}

/// The path as it may be printed. If the value is the secret itself instead of its path, it is not repeated.
/// It counts as a path where it says so by its first characters, or where its first directory exists.
fn shown(path: &Path) -> String {
    let marked = path.is_absolute() || path.starts_with(".") || path.starts_with("..");
    let first = path.components().next().map(|first| Path::new(first.as_os_str()));
    if marked || path.is_file() || (path.components().count() > 1 && first.is_some_and(Path::is_dir)) {
        format!("the file {}", path.display())
    } else {
        NOT_REPEATED.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_named_with_its_cure() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("binary"), [0xff, 0xfe, 0x00]).unwrap();
        std::fs::write(path("large"), vec![b'a'; 1024 * 1024 + 1]).unwrap();
        for (name, cure) in [
            ("missing", "does not exist: check the path"),
            ("", "is a directory: name the file"),
            ("binary", "is not text in UTF-8"),
            ("large", "is larger than 1 MiB"),
        ] {
            let problem = read(&path(name)).unwrap_err();
            assert!(problem.contains(cure), "{problem}");
            assert!(problem.contains(path(name).to_str().unwrap()), "{problem}");
        }
    }

    #[test]
    fn a_secret_in_place_of_a_path_is_not_repeated() {
        for secret in ["canary-secret", "amzn1.oa2-cs.v1.canary", "Atzr|IwEBIcanary/abc+d", "canary_key=", ""] {
            let problem = read(Path::new(secret)).unwrap_err();
            assert!(!problem.contains("canary"), "{problem}");
            assert!(problem.contains("a path begins with / or ./"), "{problem}");
        }
        for path in ["/nowhere/canary", "./canary", "../canary", "src/canary"] {
            let problem = read(Path::new(path)).unwrap_err();
            assert!(problem.contains(path), "{problem}");
        }
    }
}
