//! Lets the linker place the functions that a serving process executes side by side, in the profile that ships.
//!
//! The kernel maps a program in pieces of 64 KiB around each address that is touched. What runs between start and
//! shutdown is two fifths of the program, but spread over all of it, so that nearly all of it was resident. `serving.ld`
//! lists those functions; `tests/bench/serving-functions` writes it. Where no function has a listed name, nothing
//! happens.

use std::env::var;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=src/build.rs");
    println!("cargo::rerun-if-changed=src/serving.ld");
    // Only the profile `dist`, and `bench` with it, optimises this much.
    let ships = var("OPT_LEVEL").is_ok_and(|level| level == "3");
    let is_linux = var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux");
    if ships && is_linux {
        let list = Path::new(&var("CARGO_MANIFEST_DIR").unwrap_or_default()).join("src/serving.ld");
        println!("cargo::rustc-link-arg-bin=adsidecar=-Wl,--script={}", list.display());
    }
}
