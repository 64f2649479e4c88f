//! A query as the callback gets it: read or refused, and a refusal repeats nothing of it.

#![no_main]

use adsidecar::inbound::oauth::read_callback;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|query: &str| {
    match read_callback(query) {
        Ok(Some(callback)) => assert!(query.contains("state") || query.contains('%'), "{callback:?}"),
        Ok(None) => {}
        Err(error) => {
            let told = error.problem(|user| format!("http://localhost/?{user}")).respond("fuzz");
            let told = format!("{told:?}");
            for word in query.split(['&', '=']).filter(|word| word.len() > 40) {
                assert!(!told.contains(word), "{told}");
            }
        }
    }
});
