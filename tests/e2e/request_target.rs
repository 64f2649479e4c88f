//! The forms of the request target: which hosts a caller can address, and that adsidecar is not an open proxy.

use world::{CLIENT_ID, Listener};

use crate::harness::Harness;

fn get(target: &str, host: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 19.
async fn no_host_other_than_amazons_is_reachable() {
    let harness = Harness::set(&[]).await;
    for (target, host) in [
        ("http://evil.test/x", "evil.test"),
        ("http://evil.test/x", "localhost"),
        ("https://advertising-api.amazon.com.evil.test/x", "localhost"),
        ("http://advertising-api.amazon.com@evil.test/x", "localhost"),
        ("http://u:p@advertising-api.amazon.com/x", "localhost"),
        ("http://advertising-api.amazon.com:8443/x", "advertising-api.amazon.com:8443"),
        ("http://advertising-api-test.amazon.com/x", "localhost"),
        ("http://www.amazon.com/x", "www.amazon.com"),
        ("http://127.0.0.2:8001/x", "localhost"),
        ("http://advertising-api.amazon.com/x", "evil.test"),
        ("/x", "advertising-api.amazon.com"),
    ] {
        let answer = harness.send_raw(get(target, host)).await;
        assert_eq!(answer.said(), (403, "host_not_allowed"), "{target} {host}");
    }
    for (target, host) in
        [("ftp://advertising-api.amazon.com/x", "localhost"), ("*", "localhost"), ("evil.test:80", "localhost")]
    {
        let answer = harness.send_raw(get(target, host)).await;
        assert_eq!(answer.said(), (400, "bad_request"), "{target}");
    }
    let star = harness.send_raw("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(star.said(), (400, "bad_request"));
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 74.
async fn tunnels_are_rejected_with_a_hint() {
    let harness = Harness::set(&[]).await;
    for line in [
        "CONNECT advertising-api.amazon.com:443",
        "CONNECT evil.test:443",
        "CONNECT localhost:8001",
        "TRACE /v2/profiles",
        "TRACE http://advertising-api.amazon.com/",
        "PROPFIND /v2/profiles",
        "get /v2/profiles",
    ] {
        let mut wire = harness.dial().await;
        wire.send(format!(
            "{line} HTTP/1.1\r\nHost: advertising-api.amazon.com:443\r\n\r\n{}",
            get("/smuggled", "localhost")
        ))
        .await;
        let answer = wire.reply().await;
        assert_eq!(answer.said(), (405, "method_not_allowed"), "{line}");
        assert!(answer.json()["next_step"].as_str().unwrap().contains("http://advertising-api.amazon.com/"));
        assert_eq!(answer.header("allow"), Some("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
        assert!(wire.closes().await, "{line}");
    }
    assert!(harness.ads_calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 77.
async fn the_absolute_form_selects_a_region() {
    let harness = Harness::set(&[]).await;
    for (authority, listener) in [
        ("advertising-api.amazon.com", Listener::Na),
        ("advertising-api-eu.amazon.com", Listener::Eu),
        ("ADVERTISING-API-FE.Amazon.Com", Listener::Fe),
    ] {
        for scheme in ["http", "https"] {
            for port in ["", ":80", ":443"] {
                harness.sandbox.clear_history();
                let target = format!("{scheme}://{authority}{port}/sandbox/echo?x=%2F");
                // Some HTTP clients send the target's host in the Host header, others the proxy's.
                for host in [format!("{authority}{port}"), "localhost:8001".to_owned()] {
                    assert_eq!(harness.send_raw(get(&target, &host)).await.status, 200, "{target} {host}");
                    let seen = harness.seen();
                    assert_eq!((seen.listener, seen.target.as_str()), (listener, "/sandbox/echo?x=%2F"));
                    assert_eq!(seen.header("host"), harness.sandbox.origin(listener).strip_prefix("https://"));
                }
            }
        }
    }
    let root = harness.send_raw(get("http://advertising-api.amazon.com", "advertising-api.amazon.com")).await;
    assert_eq!(root.said(), (404, "not_found"), "Amazon has nothing there");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_authority_counts_as_the_origin_form() {
    let harness = Harness::set(&[("proxy.allowed_hosts", "ads.internal")]).await;
    for authority in ["localhost:8001", "127.0.0.1", "[::1]:9", "LocalHost", "ads.internal:80"] {
        let target = format!("http://{authority}/sandbox/echo?a");
        assert_eq!(harness.send_raw(get(&target, authority)).await.status, 200, "{authority}");
        assert_eq!(harness.seen().target, "/sandbox/echo?a");
        let status = harness
            .send_raw(get(&format!("http://{authority}/api/auth/amazon/status?user_id=default"), authority))
            .await;
        assert_eq!(status.json()["state"], "fresh", "{authority}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_lwas_hosts_only_the_token_endpoint_is_served_locally() {
    let harness = Harness::set(&[]).await;
    harness.sandbox.clear_history();
    for host in ["api.amazon.com", "api.amazon.co.uk", "api.amazon.co.jp"] {
        for target in [format!("http://{host}/auth/o2/token"), format!("https://{host}:443/auth/o2/token")] {
            let form = "grant_type=refresh_token&refresh_token=x&client_id=y&client_secret=z";
            let call = format!(
                "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-www-form-urlencoded\r\n\
                 Content-Length: {}\r\n\r\n{form}",
                form.len()
            );
            let answer = harness.send_raw(call).await;
            assert_eq!(answer.status, 200, "{target}: {answer:?}");
            assert!(!answer.json()["access_token"].as_str().unwrap().starts_with("Atza|"));
        }
        let other = harness.send_raw(get(&format!("http://{host}/user/profile"), host)).await;
        assert_eq!(other.said(), (404, "not_found"), "{host}");
    }
    assert!(harness.sandbox.history().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_paths_are_never_forwarded() {
    let harness = Harness::set(&[]).await;
    for target in [
        "/api/auth/amazon/nothing",
        "/api/auth",
        "/auth/o2/",
        "/auth/o2/tokeninfo?access_token=x",
        "http://advertising-api.amazon.com/api/auth/amazon/status",
        "http://advertising-api.amazon.com/auth/o2/token",
    ] {
        assert_eq!(harness.send_raw(get(target, "localhost")).await.said(), (404, "not_found"), "{target}");
    }
    let wrong = harness.send_raw(get("/auth/o2/token", "localhost")).await;
    assert_eq!((wrong.said(), wrong.header("allow")), ((405, "method_not_allowed"), Some("POST")));
    assert!(harness.ads_calls().is_empty());
    // A base URL with a final slash, another letter case: the right path is named.
    for target in ["/API/auth/amazon/status", "//api/auth/amazon/status", "/x/../api/auth/amazon/status"] {
        let near = harness.send_raw(get(target, "localhost")).await;
        assert_eq!(near.said(), (404, "not_found"), "{target}");
        assert!(near.json()["next_step"].as_str().unwrap().contains("/api/auth/amazon/status"), "{near:?}");
    }
    for target in ["/auth/O2/token", "//auth/o2/token", "/.well-known/oauth-authorization-server", "/register"] {
        assert_eq!(harness.send_raw(get(target, "localhost")).await.said(), (404, "not_found"), "{target}");
    }
    assert!(harness.ads_calls().is_empty());
    // Paths that only begin like ours are Amazon's.
    for target in ["/api/authx", "/auth/o3"] {
        assert_eq!(harness.send_raw(get(target, "localhost")).await.header("x-adsidecar-error"), None, "{target}");
        assert_eq!(harness.seen().target, target);
    }
}

const ACCOUNTS: &str = "[[account]]\nname = \"acme:1\"\nprofile_id = \"1\"\n[[account]]\nname = \"other\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn under_an_account_prefix_all_but_the_token_endpoint_goes_to_amazon() {
    let harness = Harness::with(ACCOUNTS).await;
    harness.log_in("default").await;
    for (target, leaves) in [
        ("/a/acme:1/sandbox/echo?x=/a/other/", "/sandbox/echo?x=/a/other/"),
        ("/a/acme%3A1//sandbox/echo", "//sandbox/echo"),
        ("/a/acme:1/api/auth/amazon/status", "/api/auth/amazon/status"),
        ("/a/acme:1/a/other/x", "/a/other/x"),
        ("/a/acme:1", "/"),
        ("/a/acme:1?x", "/?x"),
        ("http://localhost:8001/a/acme:1/sandbox/echo", "/sandbox/echo"),
    ] {
        let answer = harness.send_raw(get(target, "localhost")).await;
        assert_eq!((answer.header("x-adsidecar-error"), harness.seen().target.as_str()), (None, leaves), "{target}");
        assert_eq!(
            harness.seen().header("amazon-advertising-api-scope").is_some(),
            !leaves.contains("/amc/"),
            "{target}"
        );
    }
    let shim =
        harness.send_raw("POST /a/acme:1/auth/o2/token HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!((shim.status, &shim.json()["token_type"]), (200, &"bearer".into()));
    for bad in ["/a//x", "/a/%2e%2e/x", "/a/a%2fb/x", "/a/"] {
        assert_eq!(harness.send_raw(get(bad, "localhost")).await.said(), (400, "bad_request"), "{bad}");
    }
    assert_eq!(harness.seen().header("amazon-advertising-api-clientid"), Some(CLIENT_ID));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_serves_under_any_host() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ads.sock");
    let listen = format!("127.0.0.1:0,unix:{}", path.display());
    let mut harness = Harness::set(&[("proxy.listen", &listen)]).await;
    for host in ["Host: evil.test\r\n", "Host: localhost\r\n", "Host: a\r\n"] {
        let mut wire = crate::raw_http::Wire::unix(&path).await;
        wire.send(format!("GET /v2/profiles HTTP/1.1\r\n{host}\r\n")).await;
        assert_eq!(wire.reply().await.status, 200, "{host}");
    }
    let mut page = crate::raw_http::Wire::unix(&path).await;
    page.send("GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.test\r\n\r\n").await;
    assert_eq!(page.reply().await.said(), (403, "cross_site"));
    harness.stop_sidecar().await;
    assert!(!path.exists(), "the socket file is removed with the listener");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_admits_callers_by_file_mode_and_user_list() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ads.sock");
    let listen = format!("127.0.0.1:0,unix:{}", path.display());
    let mut harness = Harness::set(&[("proxy.listen", &listen)]).await;
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(), 0o600, "accessible to its own user only, by default");
    harness.restart_with("proxy.socket_mode", "0660").await;
    assert_eq!(mode(), 0o660);

    let ask = async |path: &std::path::Path, target: &str| {
        let mut wire = crate::raw_http::Wire::unix(path).await;
        wire.send(get(target, "localhost")).await;
        wire.reply().await
    };
    let own = std::fs::metadata(&path).unwrap().uid();
    harness.restart_with("proxy.peer_uids", &format!("{}", own + 1)).await;
    for target in ["/v2/profiles", "/api/auth/amazon/status", "/api/auth/amazon/callback?code=x&state=y"] {
        let refused = ask(&path, target).await;
        assert_eq!(refused.said(), (407, "caller_unauthorized"), "{target}");
        assert!(refused.json()["detail"].as_str().unwrap().contains("proxy.peer_uids"), "{refused:?}");
    }
    assert!(harness.ads_calls().is_empty());
    assert_eq!(harness.metric("adsidecar_guard_denied_total{reason=\"peer_uid\"}").await, 3.0);
    assert_eq!(
        harness.get("/v2/profiles").await.status(),
        200,
        "TCP callers are not subject to the list of socket users"
    );
    harness.restart_with("proxy.peer_uids", &format!("{},{own}", own + 1)).await;
    assert_eq!(ask(&path, "/v2/profiles").await.status, 200);
}
