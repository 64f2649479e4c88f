//! Keeps Amazon's side of the grants on disk, so that a restarted sandbox still knows what it has issued.
//!
//! The first line of the file is what the process before had kept, each further line one change since: what a call
//! costs does not grow with the number of tokens. A kill cuts off the last line at most, whose call has had no
//! response.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use super::world::{Change, World};

/// Adds to `world` what `file` holds, if it exists; writes it anew in one line, and returns it open for changes.
pub(super) fn open(file: &Path, world: &mut World) -> io::Result<File> {
    match std::fs::read(file) {
        Ok(text) => read(&text, world)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let beside = file.with_extension("new");
    let mut kept = serde_json::to_vec(&world.keep())?;
    kept.push(b'\n');
    let mut open = File::options().create(true).write(true).truncate(true).open(&beside)?;
    open.write_all(&kept)?;
    std::fs::rename(&beside, file)?;
    Ok(open)
}

fn read(text: &[u8], world: &mut World) -> io::Result<()> {
    let mut lines = text.split_inclusive(|byte| *byte == b'\n');
    world.restore(serde_json::from_slice(lines.next().unwrap_or_default())?);
    for line in lines.filter(|line| line.ends_with(b"\n")) {
        world.apply(serde_json::from_slice(line)?);
    }
    Ok(())
}

/// Adds `changes` to the file, all of them with one write.
pub(super) fn append(mut file: &File, changes: &[Change]) -> io::Result<()> {
    let mut lines = Vec::new();
    for change in changes {
        serde_json::to_writer(&mut lines, change)?;
        lines.push(b'\n');
    }
    file.write_all(&lines)
}
