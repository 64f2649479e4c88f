//! A stand-in for Amazon with an adsidecar in front of it: see `world::command`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let exit = world::command::run(std::env::args_os());
    ExitCode::from(exit as u8)
}
