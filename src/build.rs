//! Lets the linker place the functions that a serving process executes side by side, in the profile that ships.
//!
//! The kernel maps a program in pieces of 64 KiB or more around each address that is touched. What runs between start
//! and shutdown is two fifths of the program, but spread over all of it, so that nearly all of it was resident.
//! `serving.ld` lists those functions; `tests/bench/serving-functions` writes it. The names in it do not depend on the
//! directory. Some have a hash that changes with the compiler: those functions are then placed with all others of their
//! name. Where no function has a listed name, nothing happens.

use std::env::var;
use std::path::Path;

/// Where rustc links with LLD. GNU's linker needs minutes for the list.
const WITH_LLD: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=src/build.rs");
    println!("cargo::rerun-if-changed=src/serving.ld");
    // Only the profile `dist`, and `bench` with it, optimises this much.
    let ships = var("OPT_LEVEL").is_ok_and(|level| level == "3");
    if ships && var("TARGET").is_ok_and(|target| target == WITH_LLD) {
        let list = Path::new(&var("CARGO_MANIFEST_DIR").unwrap_or_default()).join("src/serving.ld");
        println!("cargo::rustc-link-arg-bin=adsidecar=-Wl,--script={}", list.display());
    }
}
