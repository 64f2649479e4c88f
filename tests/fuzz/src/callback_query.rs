//! A query as the callback gets it: read or refused, and a refusal repeats nothing of it.

use adsidecar::inbound::oauth::read_callback;

pub fn check(bytes: &[u8]) {
    let Ok(query) = std::str::from_utf8(bytes) else { return };
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
}
