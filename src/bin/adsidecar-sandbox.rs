//! A stand-in for Amazon with an adsidecar before it: see `adsidecar::cli::sandbox`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let exit = adsidecar::cli::sandbox::run(std::env::args_os());
    ExitCode::from(exit as u8)
}
