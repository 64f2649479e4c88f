//! adsidecar: see the library's documentation, and the README.

use std::process::ExitCode;

fn main() -> ExitCode {
    let exit = adsidecar::cli::run(std::env::args_os());
    ExitCode::from(exit as u8)
}
