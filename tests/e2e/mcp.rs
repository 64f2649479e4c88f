//! Amazon's MCP server: its hosts, its event streams, and clients that must not start an OAuth of their own.

use std::time::Duration;

use reqwest::Method;
use serde_json::json as value;
use world::{Fault, Listener, Rule};

use crate::harness::{Harness, code, header, json};

const EVENTS: &str = "application/json, text/event-stream";
const ACCOUNTS: &str = "[proxy]\nlisten = \"127.0.0.1:0\"\n[[account]]\nname = \"default\"\nprofile_id = \"1\"\n\
                        [[account]]\nname = \"eu\"\nregion = \"eu\"\nprofile_id = \"2\"\n";

/// A request of an MCP client.
const LIST_TOOLS: &str = r#"{"jsonrpc":"2.0","id":7,"method":"tools/list"}"#;

async fn logged_in(extra: &str) -> Harness {
    let harness = Harness::with(extra).await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    harness
}

#[tokio::test(flavor = "multi_thread")]
async fn mcp_calls_go_to_the_mcp_host_of_their_region_in_every_form_of_the_target() {
    let harness = logged_in(ACCOUNTS).await;
    for (target, region, listener, path) in [
        ("/mcp", "", Listener::McpNa, "/mcp"),
        ("/mcp/lite", "", Listener::McpNa, "/mcp/lite"),
        ("//mcp", "", Listener::McpNa, "//mcp"),
        ("/mcp?x=1", "X-Ads-Region: fe\r\n", Listener::McpFe, "/mcp?x=1"),
        ("/a/eu/mcp", "", Listener::McpEu, "/mcp"),
        ("/mcp/lite", "X-Ads-Account: eu\r\n", Listener::McpEu, "/mcp/lite"),
        ("http://advertising-ai.amazon.com/mcp", "", Listener::McpNa, "/mcp"),
        ("http://ADVERTISING-AI-EU.amazon.com:80/mcp/lite", "", Listener::McpEu, "/mcp/lite"),
        ("https://advertising-ai-fe.amazon.com:443/mcp", "", Listener::McpFe, "/mcp"),
        ("http://advertising-api-fe.amazon.com/mcp", "", Listener::McpFe, "/mcp"),
        // The host that the caller names decides, whatever the path.
        ("http://advertising-ai-fe.amazon.com/v2/profiles", "", Listener::McpFe, "/v2/profiles"),
        ("/v2/profiles", "", Listener::Na, "/v2/profiles"),
        ("/mcpx", "", Listener::Na, "/mcpx"),
    ] {
        harness.sandbox.clear_history();
        let host = target.split('/').nth(2).filter(|_| target.starts_with("http")).unwrap_or("localhost");
        harness.send_raw(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n{region}\r\n")).await;
        let seen = harness.seen();
        assert_eq!((seen.listener, seen.target.as_str()), (listener, path), "{target}");
        if listener != Listener::Na {
            assert!(seen.header("amazon-ads-clientid").is_some(), "{target}");
            assert!(seen.header("amazon-advertising-api-scope").is_none(), "{target}: no id is attached");
        }
    }
    let refused = harness.send_raw("GET http://advertising-ai.evil.test/mcp HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!((refused.status, refused.header("x-adsidecar-error")), (403, Some("host_not_allowed")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_fixed_mode_headers_reach_the_mcp_server_unchanged() {
    let harness = logged_in("").await;
    let fixed = [("amazon-ads-ai-account-selection-mode", "FIXED"), ("amazon-ads-accountid", "amzn1.a")];
    let call = harness.request(Method::POST, "/mcp").header("accept", EVENTS).body(LIST_TOOLS);
    let answer = fixed.iter().fold(call, |call, (name, value)| call.header(*name, *value)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.text().await.unwrap().contains("list_profiles"));
    let seen = harness.seen();
    assert!(fixed.iter().all(|(name, value)| seen.header(name) == Some(value)), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn amazons_challenge_on_an_mcp_path_does_not_reach_the_client() {
    let harness = logged_in("").await;
    for path in ["/mcp", "/mcp/lite"] {
        // Twice: the forced refresh and the replay cannot help.
        harness.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::McpNa).next(2));
        let refused = harness.request(Method::POST, path).header("accept", EVENTS).body(LIST_TOOLS).send().await;
        let refused = refused.unwrap();
        assert_eq!((refused.status().as_u16(), code(&refused)), (401, ""), "{path}");
        assert_eq!(header(&refused, "www-authenticate"), "", "{path}");
        harness.sandbox.clear_faults();
    }
    let seen = harness.sandbox.calls(Listener::McpNa);
    assert!(!seen.is_empty() && seen.iter().all(|call| call.status == Some(401)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_mcp_client_without_a_grant_is_told_the_login_link_and_no_challenge() {
    let harness = Harness::start().await;
    let link = "http://localhost:8001/api/auth/amazon/login?user_id=default";
    for path in ["/mcp", "/mcp/lite", "/a/nobody/mcp"] {
        let call = || harness.request(Method::POST, path).body(LIST_TOOLS);
        let refused = call().header("accept", EVENTS).send().await.unwrap();
        let expected = if path.starts_with("/a/") { (404, "unknown_account") } else { (401, "login_required") };
        assert_eq!((refused.status().as_u16(), code(&refused)), expected, "{path}");
        assert_eq!(header(&refused, "www-authenticate"), "");
        assert_eq!(header(&refused, "content-type"), "application/json");
        let document = json(refused).await;
        assert_eq!(
            (&document["jsonrpc"], &document["id"], &document["code"]),
            (&value!("2.0"), &value!(null), &value!(expected.1))
        );
        let message = document["error"]["message"].as_str().unwrap();
        assert!(message.ends_with(document["next_step"].as_str().unwrap()), "{message}");
        assert!(document["error"]["code"].is_i64() && (expected.0 == 404 || message.contains(link)), "{message}");
        // A caller that is no MCP client gets the usual document.
        let plain = call().send().await.unwrap();
        assert_eq!(header(&plain, "content-type"), "application/problem+json", "{path}");
        assert!(json(plain).await.get("jsonrpc").is_none());
    }
    let body = LIST_TOOLS;
    let answer = harness
        .raw(
            format!(
                "POST /mcp HTTP/1.1\r\nHost: localhost\r\nAccept: {EVENTS}\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
            None,
        )
        .await;
    let status_line = String::from_utf8_lossy(&answer).lines().next().unwrap().to_owned();
    assert!(status_line.starts_with("HTTP/1.1 401 ") && status_line.contains(link), "{status_line}");
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 24.
async fn an_oauth_client_that_looks_for_a_server_is_answered_here_with_the_login_link() {
    let harness = Harness::with("[[account]]\nname = \"only\"\nuser = \"anna\"\n").await;
    harness.log_in("anna").await;
    harness.sandbox.clear_history();
    for (method, target) in [
        (Method::GET, "/.well-known/oauth-protected-resource/mcp"),
        (Method::GET, "/.well-known/oauth-authorization-server"),
        (Method::GET, "/.well-known/openid-configuration/mcp"),
        (Method::GET, "/mcp/.well-known/openid-configuration"),
        (Method::GET, "/mcp/lite/.well-known/oauth-protected-resource"),
        (Method::GET, "/a/only/mcp/.well-known/openid-configuration"),
        (Method::POST, "/register"),
        (Method::GET, "/authorize?response_type=code"),
    ] {
        let refused = harness.request(method.clone(), target).send().await.unwrap();
        assert_eq!((refused.status().as_u16(), code(&refused)), (404, "not_found"), "{method} {target}");
        let document = json(refused).await;
        let next_step = document["next_step"].as_str().unwrap();
        assert!(next_step.contains("http://localhost:8001/api/auth/amazon/login?user_id=anna "), "{next_step}");
    }
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_stream_of_the_mcp_server_has_no_timeout() {
    let harness = Harness::set(&[("upstream.response_timeout", "200ms")]).await;
    // The head of the response comes late, and so does each event.
    harness.sandbox.set_fault(Rule::from(Fault::Delay { ms: 800 }).at(Listener::McpNa).next(2));
    let call = || harness.request(Method::POST, "/mcp").body(LIST_TOOLS);
    let late = call().header("accept", "application/json").send().await.unwrap();
    assert_eq!((late.status().as_u16(), code(&late)), (504, "upstream_timeout"));
    let mut stream = harness.request(Method::GET, "/mcp").header("accept", EVENTS).send().await.unwrap();
    assert_eq!((stream.status().as_u16(), header(&stream, "content-type")), (200, "text/event-stream"));
    let silent = tokio::time::timeout(Duration::from_millis(600), stream.chunk()).await;
    assert!(silent.is_err(), "no event was released: {silent:?}");
    harness.sandbox.release_events(2);
    let event = stream.chunk().await.unwrap().unwrap();
    assert!(event.starts_with(b"event: message\ndata: {"), "{event:?}");
}
