//! What the fuzz targets check: each function takes any bytes, and panics if a promise is broken. `targets/` feeds them
//! to libFuzzer; the end-to-end tests compile this file too and replay the corpora (`tests/e2e/fuzz_corpora.rs`).

pub mod callback_query;
pub mod configuration;
pub mod framing_gate;
pub mod headers_and_rewrite;
pub mod known_bad;
pub mod lwa_answers;
pub mod records;
pub mod target_form;
