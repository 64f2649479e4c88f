//! When Amazon or Login with Amazon cannot be used, the response and the log name the cause.

use world::{Fault, Listener, Rule};

use crate::commands::Serving;
use crate::harness::{Harness, code, eventually, json, unused_address};

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 13.
async fn what_answers_in_the_place_of_login_with_amazon_is_named() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    for (status, named) in [
        (200, "status 200"),
        (302, "redirects, as the login page of a network does"),
        (401, "status 401, text/html"),
        (403, "status 403, text/html"),
        (407, "an HTTP proxy that asks for a login"),
    ] {
        let headers = vec![("content-type".to_owned(), "text/html".to_owned())];
        let page = Fault::Status { code: status, headers, body: "<html>blocked by policy</html>".into() };
        harness.sandbox.clear_faults();
        harness.sandbox.set_fault(Rule::from(page).at(Listener::Lwa).always());
        // During the backoff the previous cause is told.
        let document = eventually(named, async || {
            let refused = harness.post("/api/auth/amazon/refresh").await;
            assert_eq!((refused.status().as_u16(), code(&refused)), (503, "token_unavailable"), "{status}");
            let document = json(refused).await;
            let told = document["detail"].as_str().unwrap().contains(named);
            told.then_some(document)
        })
        .await;
        let detail = document["detail"].as_str().unwrap();
        assert!(detail.contains("text/html"), "{status}: {detail}");
        // Nobody is sent to check the credentials, or to log in.
        let next_step = document["next_step"].as_str().unwrap();
        assert!(!next_step.contains("client_secret") && !next_step.contains("consent"), "{status}: {next_step}");
        assert_eq!(harness.status_of("default").await["state"], "failing");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 28.
async fn the_log_names_the_host_and_the_address_that_could_not_be_reached() {
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    let nobody = unused_address();
    let set = format!("upstream.na=https://localhost:{}", nobody.port());
    let serving = Serving::start(&harness, &["--set", &set]).await;
    let refused = harness.client.get(serving.url("/v2/profiles")).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), code(&refused)), (502, "upstream_unreachable"));
    let line = serving.says("cannot connect").await;
    assert!(line.contains(&format!("localhost:{}", nobody.port())) && line.contains("127.0.0.1"), "{line}");
}
