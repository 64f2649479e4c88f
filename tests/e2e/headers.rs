//! Managed headers: whatever a caller sends, Amazon receives exactly one value, which is not the caller's.

use world::{CLIENT_ID, Listener};

use crate::harness::Harness;
use crate::raw_http::Scripted;

const NA: &str = "3012345678901234561";

/// Sends these header lines unchanged and returns the request that Amazon received.
async fn sent(harness: &Harness, path: &str, lines: &[&str]) -> world::Call {
    harness.sandbox.clear_history();
    let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let answer = harness.send_raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n")).await;
    assert_eq!(answer.header("x-adsidecar-error"), None, "{lines} {answer:?}");
    harness.seen()
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 14.
async fn no_spelling_of_a_managed_header_survives() {
    let harness = Harness::with(&format!("[[account]]\nname = \"a\"\nprofile_id = \"{NA}\"\n")).await;
    harness.log_in("default").await;
    let host = harness.sandbox.origin(Listener::Na).strip_prefix("https://").unwrap().to_owned();
    for name in ["Authorization", "Amazon-Advertising-API-ClientId", "Amazon-Ads-ClientId", "Host"] {
        for spelling in [name.to_owned(), name.to_lowercase(), name.to_uppercase(), name.replace('-', "_")] {
            if spelling.eq_ignore_ascii_case("host") {
                continue;
            }
            let line = format!("{spelling}: theirs");
            for lines in [
                &[line.as_str()][..],
                &[&line, &line],
                &[&format!("{spelling}:   theirs\t")],
                &[&line, &format!("Connection: {spelling}")],
                &[&format!("Connection: close, {}", spelling.to_lowercase()), &line, "Connection: x"],
            ] {
                for path in ["/sandbox/echo", "/v2/profiles", "/sp/campaigns/x"] {
                    let seen = sent(&harness, path, lines).await;
                    let managed = seen.headers.iter().filter(|(name, _)| {
                        let name = name.replace('_', "-");
                        name == "authorization" || name == "host" || name.ends_with("clientid")
                    });
                    let mut managed: Vec<_> = managed.map(|(_, value)| value.as_str()).collect();
                    managed.sort_unstable();
                    assert_eq!(managed.len(), 3, "{path} {lines:?} {managed:?}");
                    assert_eq!(managed[0], host);
                    assert!(managed[1].starts_with("Bearer Atza|"), "{managed:?}");
                    assert_eq!(managed[2], CLIENT_ID);
                    assert!(seen.header("connection").is_none());
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 15.
async fn no_connection_header_strips_attached_headers() {
    let harness = Harness::with(&format!(
        "[[account]]\nname = \"a\"\nprofile_id = \"{NA}\"\nheaders = {{ X-Team = \"blue\" }}\n"
    ))
    .await;
    harness.log_in("default").await;
    let every =
        "authorization, host, amazon-advertising-api-clientid, amazon-advertising-api-scope, x-team, content-length";
    let listed = format!("Connection: {every}");
    for lines in
        [&[listed.as_str()][..], &["Connection:", &listed], &["Connection: close", "connection: keep-alive", &listed]]
    {
        let seen = sent(&harness, "/sp/campaigns/x", lines).await;
        let mut names = seen.header_names();
        names.sort_unstable();
        let attached =
            ["amazon-advertising-api-clientid", "amazon-advertising-api-scope", "authorization", "host", "x-team"];
        assert_eq!(names, attached, "{lines:?}");
    }
    // A context header that the caller sent and also listed in Connection is dropped; the account's value replaces it.
    let seen =
        sent(&harness, "/sp/x", &["Amazon-Advertising-API-Scope: 7", "Connection: Amazon-Advertising-API-Scope"]).await;
    assert_eq!(seen.header_all("amazon-advertising-api-scope").collect::<Vec<_>>(), [NA]);
    let seen = sent(&harness, "/sp/x", &["X-Private: 1", "X-Kept: 2", "Connection: x-private"]).await;
    assert_eq!((seen.header("x-private"), seen.header("x-kept")), (None, Some("2")));
}

/// An account with an id for every context.
const EVERY_ID: &str = "[[account]]\nname = \"a\"\nprofile_id = \"3012345678901234561\"\nmarketplace_id = \"M\"\n\
    advertiser_id = \"ENTITYA\"\nentity_id = \"ENTITYE\"\naccount_id = \"ACC\"\ndsp_advertiser_id = \"DSP\"\n\
    amc_instance_id = \"amc1\"\nmanager_account_id = \"MGR\"\n";

/// The context headers that Amazon received, as sorted `name: value` lines.
fn context(seen: &world::Call) -> Vec<String> {
    let is_context = |name: &str| name == "advertiserid" || name.starts_with("amazon-") && !name.ends_with("clientid");
    let mut lines: Vec<_> = seen
        .headers
        .iter()
        .filter(|(name, _)| is_context(name))
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    lines.sort_unstable();
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn each_api_family_gets_the_headers_that_amazon_has_published() {
    let harness = Harness::with(EVERY_ID).await;
    harness.log_in("default").await;
    let scope = format!("amazon-advertising-api-scope: {NA}");
    let (scope, account) = (scope.as_str(), "amazon-ads-accountid: ACC");
    let (entity, marketplace) =
        ("amazon-advertising-api-advertiserid: ENTITYA", "amazon-advertising-api-marketplaceid: M");
    let partner = "amazon-advertising-api-manager-account: MGR";
    let dsp_account = "amazon-advertising-accountid: ACC";
    for (path, expected) in [
        ("/sp/campaigns/list", &[scope][..]),
        ("/sp/global/targets/keywords/recommendations/list", &[account, entity, marketplace, scope]),
        ("/sp/global/targets/bid/recommendations", &[account]),
        ("/sp/targets/keywords/recommendations", &[entity, marketplace, scope]),
        ("/sp/targets/products/recommendations", &[entity, scope]),
        ("/sd/campaigns/budgetRecommendations", &[account, scope]),
        ("/st/campaigns/list", &[scope]),
        ("/ras/v1/campaigns/list", &[scope]),
        ("/adsApi/v1/query/managerAccounts", &[]),
        ("/adsApi/v1/query/adAssociations", &[account]),
        ("/adsApi/v1/query/suppliers/dsp", &[account, "amazon-ads-manager-accountid: MGR"]),
        ("/adsApi/v1/query/brandStorePages", &[scope]),
        ("/adsApi/v1/query/campaigns", &[account, scope]),
        ("/dsp/v1/guidance/campaigns/list", &[account, scope]),
        ("/dsp/rules/bidmodifier/list", &[account, scope]),
        ("/dsp/v1/quickactions/batchGetExecutions", &[account, entity, marketplace]),
        ("/dsp/v1/campaign/insights", &[dsp_account, scope]),
        ("/dsp/audiences/edit", &["advertiserid: DSP", scope]),
        ("/accounts/1/dsp/amazonAdTag", &[account, "amazon-ads-manager-account-id: MGR", scope]),
        ("/accounts/1/dsp/conversionDefinitions/list", &[account, scope]),
        ("/accounts/1/dsp/reports", &[]),
        ("/frequencyGroups/v1/list", &[scope]),
        ("/mediaPlan/v1/reachForecasts", &[account, "amazon-ads-manager-accountid: MGR", scope]),
        ("/keywords/localize", &[account, scope]),
        ("/eligibility/programs", &[account, scope]),
        ("/bp/v2/posts/list", &[scope]),
        ("/invoices", &[]),
        ("/billing/invoices/pay", &[scope]),
        ("/billing/paymentAgreements", &[account, partner, scope]),
        ("/billingProfiles", &[account, partner]),
        ("/users/list", &[account, "amazon-ads-manageraccountid: MGR", scope]),
        ("/user-invitations/list", &[account, "amazon-ads-manageraccountid: MGR", scope]),
        ("/user-invitations/1", &[]),
        ("/brand/stores/v1/stores/list", &[dsp_account]),
        ("/amc/instances/i/advertisers/updates", &[entity, marketplace]),
        ("/amc/models/v1/trainedModels", &["amazon-ads-accountid: ENTITYA"]),
        ("/adm/datarooms", &[account, "amazon-ads-manager-account-id: MGR"]),
        ("/adm/audiences", &["amazon-ads-manager-account-id: MGR"]),
        ("/no/such/family", &[scope]),
    ] {
        let seen = sent(&harness, path, &[]).await;
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        assert_eq!(context(&seen), expected, "{path}");
        let v1 = path.starts_with("/adsApi/");
        assert_eq!(seen.header("amazon-ads-clientid").is_some(), v1, "{path}");
        assert_eq!(seen.header("amazon-advertising-api-clientid").is_some(), !v1, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 22.
async fn a_blank_context_header_is_dropped_and_the_accounts_id_attached() {
    let harness = Harness::with(EVERY_ID).await;
    harness.log_in("default").await;
    let scope = format!("amazon-advertising-api-scope: {NA}");
    for blank in ["", " ", "\t "] {
        let seen = sent(&harness, "/sp/campaigns/x", &[&format!("Amazon-Advertising-API-Scope:{blank}")]).await;
        assert_eq!(context(&seen), [scope.as_str()], "{blank:?}");
        let seen = sent(&harness, "/reporting/reports/x", &[&format!("Amazon-Ads-AccountId:{blank}")]).await;
        assert_eq!(context(&seen), [scope.as_str()], "{blank:?}");
        // The account id has no place on this path, so nothing replaces the blank one.
        let seen = sent(&harness, "/sp/campaigns/x", &[&format!("Amazon-Ads-AccountId:{blank}")]).await;
        assert_eq!(context(&seen), [scope.as_str()], "{blank:?}");
    }
    let theirs = sent(&harness, "/reporting/reports/x", &["Amazon-Ads-AccountId: theirs"]).await;
    assert_eq!(context(&theirs), ["amazon-ads-accountid: theirs"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_about_the_caller_are_not_forwarded() {
    let harness = Harness::set(&[]).await;
    let seen = sent(
        &harness,
        "/sandbox/echo",
        &[
            "Cookie: a=b",
            "Referer: http://x",
            "Sec-Fetch-Mode: cors",
            "Sec-CH-UA: x",
            "Forwarded: for=1",
            "X-Forwarded-For: 1",
            "X-Forwarded-Proto: https",
            "X_Forwarded_For: 2",
            "Proxy: http://evil",
            "Proxy-Authorization: Basic eDp5",
            "Proxy-Connection: keep-alive",
            "Keep-Alive: timeout=5",
            "TE: trailers",
            "Trailer: X",
            "Upgrade: websocket",
            "HTTP2-Settings: x",
            "Expect: 200-ok",
            "amazon_advertising_api_scope: 1",
            "AMAZON_ADVERTISING_API-SCOPE: 1",
            "X-Passes: yes",
            "X_Passes: too",
            "User-Agent: python",
            "X-Request-Id: mine",
        ],
    )
    .await;
    let mut names = seen.header_names();
    names.sort_unstable();
    let passed = ["amazon-advertising-api-clientid", "authorization", "host", "user-agent", "x-passes", "x-request-id"];
    let twin = "x_passes";
    assert_eq!(names, [&passed[..], &[twin]].concat());
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 64.
async fn response_hop_by_hop_headers_are_dropped_and_cookies_pass() {
    let amazon = Scripted::saying(
        "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Private\r\nKeep-Alive: timeout=5\r\nX-Private: 1\r\n\
         Proxy-Authenticate: Basic\r\nUpgrade: h2c\r\nTrailer: X-T\r\nX-Adsidecar-Error: forged\r\n\
         X-Adsidecar-Hint: forged\r\nX-Request-Id: theirs\r\nServer: Server\r\nVia: 1.1 x\r\n\
         Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\n\r\n",
    )
    .await;
    let harness = Harness::before(&amazon, &[]).await;
    let answer = harness.send_raw("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    let mut names = answer.names();
    names.sort_unstable();
    assert_eq!(names, ["keep-alive", "server", "transfer-encoding", "via", "x-request-id"]);
    assert_eq!((answer.text().as_str(), answer.whole), ("ok", true));
    assert_ne!(answer.header("x-request-id"), Some("theirs"));
    assert_eq!(answer.header("keep-alive"), Some("timeout=600"), "of this connection, not of Amazon's");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 31.
async fn an_invalid_request_id_is_replaced_by_the_same_new_one_for_amazon_and_the_caller() {
    let harness = Harness::set(&[]).await;
    harness.log_in("default").await;
    let long = format!("X-Request-Id: {}", "x".repeat(129));
    for bad in [long.as_str(), "X-Request-Id: a b", "X-Request-Id:", "X-Request-Id: \u{e9}", "X-Request-Id: ,"] {
        let call = format!("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n{bad}\r\n\r\n");
        let answer = harness.send_raw(call).await;
        assert_eq!(answer.said(), (200, ""), "{bad}");
        let seen = harness.seen();
        assert_eq!(seen.header("x-request-id"), answer.header("x-request-id"), "{bad}");
        assert!(seen.header("x-request-id").is_some_and(|id| !id.is_empty() && id.len() <= 128), "{bad}");
    }
    let twice = "X-Request-Id: one\r\nX-Request-Id: two";
    let call = format!("GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n{twice}\r\n\r\n");
    let answer = harness.send_raw(call).await;
    assert_eq!((answer.header("x-request-id"), harness.seen().header("x-request-id")), (Some("one"), Some("one")));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_carries_the_callers_or_a_new_request_id() {
    let harness = Harness::set(&[]).await;
    let mut made = Vec::new();
    for path in ["/sandbox/echo", "/api/auth/amazon/status", "/a//x"] {
        let own =
            harness.send_raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: r-1.2_3\r\n\r\n")).await;
        assert_eq!(own.header("x-request-id"), Some("r-1.2_3"), "{path}");
        let bare = harness.send_raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        made.push(bare.header("x-request-id").unwrap().to_owned());
        let odd = format!("X-Request-Id: {}", "x".repeat(129));
        for bad in [odd.as_str(), "X-Request-Id: a b", "X-Request-Id:"] {
            let answer = harness.send_raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{bad}\r\n\r\n")).await;
            made.push(answer.header("x-request-id").unwrap().to_owned());
        }
    }
    assert!(made.iter().all(|id| (1..=32).contains(&id.len())), "{made:?}");
    let mut different = made.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), made.len(), "{made:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_of_adsidecar_is_a_complete_problem_document() {
    let harness = Harness::set(&[("proxy.max_body", "10B")]).await;
    harness.sandbox.set_fault(world::Fault::Reset);
    for (call, status, code, retryable) in [
        ("POST /reset HTTP/1.1\r\nHost: localhost\r\n", 502, "upstream_reset", true),
        ("GET /x HTTP/1.1\r\nHost: localhost\r\nX-Ads-User: nobody\r\n", 401, "login_required", false),
        ("GET /x HTTP/1.1\r\nHost: evil.test\r\n", 403, "host_not_allowed", false),
        ("GET /x HTTP/1.1\r\n", 400, "bad_request", false),
        ("GET /x HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n", 403, "cross_site", false),
        ("GET /x HTTP/1.1\r\nHost: localhost\r\nX-Ads-Account: x\r\n", 404, "unknown_account", false),
        ("GET /api/auth/x HTTP/1.1\r\nHost: localhost\r\n", 404, "not_found", false),
        ("GET /auth/o2/token HTTP/1.1\r\nHost: localhost\r\n", 405, "method_not_allowed", false),
        ("TRACE /x HTTP/1.1\r\nHost: localhost\r\n", 405, "method_not_allowed", false),
        ("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 11\r\n", 413, "body_too_large", false),
    ] {
        let answer = harness.send_raw(format!("{call}X-Request-Id: r-7\r\n\r\n")).await;
        assert_eq!(answer.said(), (status, code), "{call}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        assert_eq!(answer.header("x-request-id"), Some("r-7"));
        let problem = answer.json();
        let mut members: Vec<_> = problem.as_object().unwrap().keys().map(String::as_str).collect();
        members.sort_unstable();
        assert_eq!(members, ["code", "detail", "next_step", "request_id", "retryable", "status", "title", "type"]);
        assert_eq!((&problem["code"], &problem["status"]), (&code.into(), &status.into()));
        assert_eq!((&problem["retryable"], &problem["request_id"]), (&retryable.into(), &"r-7".into()), "{code}");
        for text in ["type", "title", "detail", "next_step"] {
            assert!(!problem[text].as_str().unwrap().is_empty(), "{code}: {text}");
        }
    }
}
