//! Keeps Amazon's side of the grants on disk, so that a restarted sandbox still knows what it has issued.

use std::io;
use std::path::Path;

use super::world::World;

/// Adds to `world` what `file` holds, if it exists.
pub(super) fn read(file: &Path, world: &mut World) -> io::Result<()> {
    let text = match std::fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    world.restore(serde_json::from_slice(&text)?);
    Ok(())
}

/// Replaces `file` by the grants of `world`: a kill leaves either the old or the new file.
pub(super) fn write(file: &Path, world: &World) -> io::Result<()> {
    let beside = file.with_extension("new");
    std::fs::write(&beside, serde_json::to_vec(&world.kept())?)?;
    std::fs::rename(&beside, file)
}
