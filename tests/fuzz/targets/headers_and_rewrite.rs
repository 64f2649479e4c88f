#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| adsidecar_fuzz::headers_and_rewrite::check(bytes));
