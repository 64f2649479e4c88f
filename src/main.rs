//! adsidecar.
fn main() {}
