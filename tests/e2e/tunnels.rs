//! `CONNECT` to port 80 of Amazon's hosts: clients that tunnel even `http://` URLs.

use world::Listener;

use crate::harness::Harness;
use crate::raw_http::{Reply, Wire};

const EU: &str = "advertising-api-eu.amazon.com";
const TOKEN: &str = "knock-knock-knock-knock";

async fn logged_in(extra: &str) -> Harness {
    let harness = Harness::with(&format!("[proxy]\nlisten = \"127.0.0.1:0\"\n{extra}")).await;
    let begun = harness.client.get(harness.proxy_url("/api/auth/amazon/login?user_id=default"));
    let begun = begun.header("x-ads-sidecar-token", TOKEN).send().await.unwrap();
    let begun = crate::harness::json(begun).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    assert!(harness.get(&callback).await.status().is_success());
    harness.sandbox.clear_history();
    harness
}

/// Opens a tunnel on `wire`.
async fn connect(wire: &mut Wire, authority: &str, headers: &str) -> Reply {
    wire.send(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{headers}\r\n")).await;
    wire.reply_head().await
}

async fn get(wire: &mut Wire, target: &str, host: &str) -> Reply {
    wire.send(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
    wire.reply().await
}

#[tokio::test(flavor = "multi_thread")]
async fn inside_a_tunnel_plain_http_is_served_as_its_absolute_form_is() {
    let harness = logged_in("").await;
    let mut wire = harness.dial().await;
    let opened = connect(&mut wire, &format!("{EU}:80"), "Proxy-Connection: keep-alive\r\n").await;
    assert_eq!(
        (opened.said(), opened.header("content-length"), opened.header("transfer-encoding")),
        ((200, ""), None, None)
    );
    // Many requests on one tunnel, with and without a body.
    for _ in 0..3 {
        assert_eq!(get(&mut wire, "/sandbox/echo?a=%2F", EU).await.said(), (200, ""));
        let seen = harness.seen();
        assert_eq!((seen.listener, seen.target.as_str()), (Listener::Eu, "/sandbox/echo?a=%2F"));
        assert!(seen.header("authorization").unwrap().starts_with("Bearer Atza|"));
    }
    wire.send(format!("POST /sandbox/echo HTTP/1.1\r\nHost: {EU}\r\nContent-Length: 2\r\n\r\n{{}}")).await;
    assert_eq!(wire.reply().await.said(), (200, ""));
    assert_eq!(harness.seen().text(), "{}");
    // adsidecar's own paths are not served under Amazon's name, and a path prefix is Amazon's.
    assert_eq!(get(&mut wire, "/api/auth/amazon/status", EU).await.said(), (404, "not_found"));
    // Other hosts stay closed.
    assert_eq!(get(&mut wire, "http://evil.test/x", "evil.test").await.said().0, 403);
    assert!(harness.ads_calls().iter().all(|call| call.listener == Listener::Eu));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_leads_to_the_host_that_it_names_and_may_be_used_before_it_is_confirmed() {
    let harness = logged_in("").await;
    for (host, listener) in [
        ("advertising-api.amazon.com", Listener::Na),
        ("ADVERTISING-API-FE.amazon.com", Listener::Fe),
        ("advertising-ai-eu.amazon.com", Listener::McpEu),
    ] {
        let mut wire = harness.dial().await;
        // Both heads in one packet.
        let both = format!(
            "CONNECT {host}:80 HTTP/1.1\r\nHost: {host}:80\r\n\r\nGET /mcp?{host} HTTP/1.1\r\nHost: {host}\r\n\r\n"
        );
        wire.send(both.replace("/mcp", if listener == Listener::McpEu { "/mcp" } else { "/sandbox/echo" })).await;
        assert_eq!(wire.reply_head().await.said(), (200, ""));
        assert_eq!(wire.reply().await.said().1, "", "{host}");
        assert_eq!(harness.seen().listener, listener);
        // A tunnel in the tunnel leads to its own host.
        assert_eq!(connect(&mut wire, &format!("{EU}:80"), "").await.said(), (200, ""));
        assert_eq!(get(&mut wire, "/sandbox/echo", EU).await.said(), (200, ""));
        assert_eq!(harness.seen().listener, Listener::Eu);
    }
    // The token endpoint of Login with Amazon is the shim, as in absolute form.
    let mut wire = harness.dial().await;
    assert_eq!(connect(&mut wire, "api.amazon.com:80", "").await.said(), (200, ""));
    wire.send("POST /auth/o2/token HTTP/1.1\r\nHost: api.amazon.com\r\nContent-Length: 0\r\n\r\n").await;
    let token = wire.reply().await;
    assert!(token.text().contains("access_token") && !token.text().contains("Atza|"), "{token:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_other_tunnel_is_opened() {
    let harness = logged_in("").await;
    for authority in [
        "advertising-api.amazon.com:443",
        "advertising-api.amazon.com:8080",
        "advertising-api.amazon.com",
        "advertising-api.amazon.com.evil.test:80",
        "evil.test:80",
        "127.0.0.1:80",
        "www.amazon.com:80",
    ] {
        for host in [authority, "localhost"] {
            let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let refused = harness.send_raw(&request).await;
            assert_eq!(refused.said(), (405, "method_not_allowed"), "{authority}");
            assert!(refused.text().contains("use http://"), "{refused:?}");
        }
    }
    // A body would be read as the first request inside.
    for framing in ["Content-Length: 5", "Transfer-Encoding: chunked"] {
        let request = format!("CONNECT {EU}:80 HTTP/1.1\r\nHost: {EU}:80\r\n{framing}\r\n\r\n");
        assert_eq!(harness.send_raw(&request).await.said(), (400, "bad_request"), "{framing}");
    }
    // A web page opens none.
    for sign in ["Origin: http://evil.test", "Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"] {
        let request = format!("CONNECT {EU}:80 HTTP/1.1\r\nHost: {EU}:80\r\n{sign}\r\n\r\n");
        assert_eq!(harness.send_raw(&request).await.said(), (403, "cross_site"), "{sign}");
    }
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_connect_says_to_adsidecar_holds_inside_the_tunnel() {
    let accounts = "caller_token = \"knock-knock-knock-knock\"\n[[account]]\nname = \"default\"\nprofile_id = \"1\"\n\
                    [[account]]\nname = \"acme\"\nprofile_id = \"2\"\n";
    let harness = logged_in(accounts).await;
    let authority = format!("{EU}:80");
    let mut wire = harness.dial().await;
    assert_eq!(connect(&mut wire, &authority, "").await.said(), (407, "caller_unauthorized"));
    let credentials = format!("Proxy-Authorization: Bearer {TOKEN}\r\n");
    let mut wire = harness.dial().await;
    let account = "X-Ads-Account: acme\r\nX-Ads-Region: na\r\n";
    assert_eq!(connect(&mut wire, &authority, &format!("{credentials}{account}")).await.said(), (200, ""));
    // The host of the tunnel decides the region, so the account's ids are left out.
    let answer = get(&mut wire, "/sandbox/echo", EU).await;
    assert_eq!((answer.said(), answer.header("x-adsidecar-hint")), ((200, ""), Some("region_mismatch")));
    let seen = harness.seen();
    assert!(seen.headers.iter().all(|(name, _)| !name.starts_with("x-ads") && !name.starts_with("proxy")), "{seen:?}");
    // A request inside may say something else, and what is not understood is refused there too.
    wire.send(format!("GET /sandbox/echo HTTP/1.1\r\nHost: {EU}\r\nX-Ads-Account: nobody\r\n\r\n")).await;
    assert_eq!(wire.reply().await.said(), (404, "unknown_account"));
    let mut wire = harness.dial().await;
    assert_eq!(connect(&mut wire, &authority, &format!("{credentials}X_Ads_Acount: acme\r\n")).await.said(), (200, ""));
    assert_eq!(get(&mut wire, "/sandbox/echo", EU).await.said(), (400, "bad_request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_whose_connect_names_two_accounts_acts_for_neither() {
    let accounts = ["default", "acme"].map(|name| format!("[[account]]\nname = {name:?}\nprofile_id = \"1\"\n"));
    let harness = logged_in(&accounts.concat()).await;
    let mut wire = harness.dial().await;
    let twice = "X-Ads-Account: acme\r\nX-Ads-Account: default\r\n";
    assert_eq!(connect(&mut wire, &format!("{EU}:80"), twice).await.said(), (200, ""));
    assert_eq!(get(&mut wire, "/sandbox/echo", EU).await.said(), (400, "bad_request"));
    assert!(harness.ads_calls().is_empty());
    // A request inside may still say which.
    wire.send(format!("GET /sandbox/echo HTTP/1.1\r\nHost: {EU}\r\nX-Ads-Account: acme\r\n\r\n")).await;
    assert_eq!(wire.reply().await.said(), (200, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_tunnel_ends_with_the_shutdown() {
    let mut harness = logged_in("").await;
    let mut wire = harness.dial().await;
    assert_eq!(connect(&mut wire, &format!("{EU}:80"), "").await.said(), (200, ""));
    assert_eq!(get(&mut wire, "/sandbox/echo", EU).await.said(), (200, ""));
    harness.stop_sidecar().await;
    assert!(wire.closes().await);
}
