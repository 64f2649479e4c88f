#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| adsidecar_fuzz::configuration::check(bytes));
