//! The policy: which requests may reach Amazon, and that no byte of any other request does.

use world::Listener;

use crate::harness::Harness;
use crate::raw_http::Reply;

async fn logged_in(toml: &str) -> Harness {
    let harness = Harness::with(toml).await;
    harness.log_in("default").await;
    harness.sandbox.clear_history();
    harness
}

async fn ask(harness: &Harness, line: &str, headers: &str) -> Reply {
    harness.send_raw(format!("{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 2\r\n\r\n{{}}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_forwards_no_request_that_changes_data() {
    let harness = logged_in("[policy]\nread_only = true\n").await;
    let changing = [
        "POST /sp/campaigns",
        "PUT /sp/campaigns",
        "DELETE /sb/keywords/1",
        "PATCH /x",
        "POST /sp/campaigns/delete",
        "POST /mcp",
        "POST /no/such/family",
        "POST /assets/upload",
        "POST /advertisingAccounts/1/propertyNamespaces/n/properties/list",
        "PUT http://advertising-api-eu.amazon.com/sp/campaigns",
        "POST http://localhost:8001/sp/campaigns?x=/list",
    ];
    for line in changing {
        let answer = ask(&harness, line, "").await;
        assert_eq!(answer.said(), (403, "policy_denied"), "{line}");
        assert!(answer.json()["detail"].as_str().unwrap().contains("read-only"), "{answer:?}");
    }
    assert!(harness.sandbox.history().is_empty(), "no byte may reach any host: {:?}", harness.sandbox.history());
    let denied = changing.len() as f64;
    assert_eq!(harness.metric("adsidecar_policy_denied_total{account=\"\",mode=\"enforce\"}").await, denied);
    assert_eq!(harness.metric("adsidecar_guard_denied_total{reason=\"policy\"}").await, denied);
    let reading = [
        "GET /v2/profiles",
        "HEAD /v2/profiles",
        "POST /sp/campaigns/list",
        "POST /reporting/reports",
        "POST /history",
        "POST /keywords/localize",
        "POST /adsApi/v1/create/recommendations/sb",
    ];
    for line in reading {
        let mut wire = harness.dial().await;
        wire.send(format!("{line} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        assert_eq!(wire.reply_head().await.header("x-adsidecar-error"), None, "{line}");
    }
    assert_eq!(harness.ads_calls().len(), reading.len());
    // The OAuth endpoints belong to adsidecar: a logout changes nothing at Amazon.
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 200);
    assert_eq!(harness.post("/auth/o2/token").await.status(), 200);
    assert_eq!(harness.post("/api/auth/amazon/logout").await.status(), 204);
}

const ACCOUNTS: &str = "[[account]]\nname = \"reader\"\nread_only = true\n\
    [[account]]\nname = \"narrow\"\nuser = \"other\"\nallow = [\"GET /v2/**\", \"POST /sp/campaigns/list\"]\n\
    [[account]]\nname = \"free\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn each_account_has_its_own_policy() {
    let harness = logged_in(ACCOUNTS).await;
    harness.log_in("other").await;
    harness.sandbox.clear_history();
    for (line, headers) in [
        ("POST /a/reader/sp/campaigns", ""),
        ("POST /sp/campaigns", "X-Ads-Account: reader\r\n"),
        ("POST /a/narrow/sp/campaigns", ""),
        ("GET /a/narrow/sp/campaigns", ""),
        ("HEAD /a/narrow/v2/profiles", ""),
        // The policy applies to the path that is forwarded, not to the path of the request.
        ("POST /a/narrow/a/reader/sp/campaigns/list", ""),
        ("POST /a/narrow/api/auth/amazon/logout", ""),
        // Nor can a caller bypass the account by naming a user.
        ("POST /sp/campaigns", "X-Ads-User: default\r\n"),
        ("GET /sp/campaigns", "X-Ads-User: other\r\n"),
    ] {
        let mut wire = harness.dial().await;
        wire.send(format!("{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 0\r\n\r\n")).await;
        assert_eq!(wire.reply_head().await.said(), (403, "policy_denied"), "{line} {headers}");
    }
    assert!(harness.ads_calls().is_empty());
    assert_eq!(harness.metric("adsidecar_policy_denied_total{account=\"reader\",mode=\"enforce\"}").await, 2.0);
    for (line, headers) in [
        ("GET /a/reader/v2/profiles", ""),
        ("POST /a/reader/sp/campaigns/list", ""),
        ("GET /a/narrow/v2/profiles", ""),
        ("POST /a/narrow/sp/campaigns/list", ""),
        ("POST /a/free/sp/campaigns", ""),
        ("POST /sp/campaigns", "X-Ads-User: nobody-s-accounts\r\n"),
    ] {
        let code = ask(&harness, line, headers).await.header("x-adsidecar-error").map(str::to_owned);
        assert!(code.is_none() || code.as_deref() == Some("login_required"), "{line} {code:?}");
    }
    assert_eq!(harness.ads_calls().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 81.
async fn an_ambiguous_path_is_denied_by_any_policy_and_unchanged_without_one() {
    let harness = logged_in(
        "[[account]]\nname = \"bound\"\nread_only = true\n[[account]]\nname = \"free\"\nuser = \"default\"\n",
    )
    .await;
    let tricks = [
        "/sp/campaigns/../list",
        "/sp/./campaigns/list",
        "/sp/campaigns/%2e%2e/list",
        "/sp/campaigns/%252e%252e/list",
        "/sp/campaigns%2flist",
        "/sp/campaigns%2Flist",
        "/sp/campaigns%5c/list",
        "/sp/campaigns\\/list",
        "/sp/campaigns;x/list",
        "/sp/..;/list",
        "/sp/campaigns%00/list",
    ];
    for trick in tricks {
        for method in ["GET", "POST"] {
            let answer = ask(&harness, &format!("{method} /a/bound{trick}"), "").await;
            assert_eq!(answer.said(), (403, "policy_denied"), "{method} {trick}");
            assert!(answer.json()["detail"].as_str().unwrap().contains("ambiguous"), "{answer:?}");
        }
    }
    let sample = ask(&harness, "POST /a/bound//sp/campaigns/list", "").await;
    assert_eq!(sample.header("x-adsidecar-error"), None, "as in Amazon's own samples");
    assert_eq!(harness.seen().target, "//sp/campaigns/list", "and it is forwarded byte for byte");
    harness.sandbox.clear_history();
    let overridden = ask(&harness, "GET /a/bound/sp/campaigns", "X-HTTP-Method-Override: DELETE\r\n").await;
    assert_eq!(overridden.said(), (403, "policy_denied"));
    assert!(harness.ads_calls().is_empty());
    for trick in tricks {
        let answer = ask(&harness, &format!("POST /a/free{trick}"), "").await;
        assert_eq!((answer.header("x-adsidecar-error"), harness.seen().target.as_str()), (None, trick));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn observe_mode_counts_denials_and_forwards_the_requests() {
    let harness = logged_in("[policy]\nread_only = true\nallow = [\"GET /v2/*\"]\nmode = \"observe\"\n").await;
    for line in ["POST /sp/campaigns", "GET /sp/x", "GET /v2/x/..", "GET /v2/profiles"] {
        assert_eq!(ask(&harness, line, "").await.header("x-adsidecar-error"), None, "{line}");
    }
    assert_eq!(harness.sandbox.calls(Listener::Na).len(), 4);
    assert_eq!(harness.metric("adsidecar_policy_denied_total{account=\"\",mode=\"observe\"}").await, 3.0);
    assert_eq!(harness.metric("adsidecar_guard_denied_total{reason=\"policy\"}").await, 0.0, "no request was rejected");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_applies_a_new_policy() {
    let harness = logged_in("").await;
    assert_eq!(ask(&harness, "POST /sp/campaigns", "").await.header("x-adsidecar-error"), None);
    let text = std::fs::read_to_string(harness.config_file()).unwrap();
    std::fs::write(harness.config_file(), text + "\n[policy]\nread_only = true\n").unwrap();
    assert_eq!(harness.client.post(harness.admin_url("/reload")).send().await.unwrap().status(), 200);
    assert_eq!(ask(&harness, "POST /sp/campaigns", "").await.said(), (403, "policy_denied"));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_policy_holds_nothing_overrides_the_method_or_the_path() {
    let harness = logged_in(
        "[[account]]\nname = \"reader\"\nread_only = true\n[[account]]\nname = \"free\"\n\
         [[account]]\nname = \"uploader\"\nallow = [\"POST /stores/assets\"]\n",
    )
    .await;
    let overriding = [
        ("", "X-Original-URL: /sp/campaigns\r\n"),
        ("", "X_Rewrite_URL: /sp/campaigns\r\n"),
        ("", "x-http-method-override: DELETE\r\n"),
        ("?_method=DELETE", ""),
        ("?a=b&_METHOD=delete", ""),
        ("?a=b;%5fmethod=delete", ""),
        ("?a&%255Fmethod[]=delete", ""),
        ("?x-http-method-override=PUT", ""),
    ];
    for (query, headers) in overriding {
        for line in ["GET", "POST"].map(|method| format!("{method} /a/reader/sp/campaigns/list{query}")) {
            let answer = ask(&harness, &line, headers).await;
            assert_eq!(answer.said(), (403, "policy_denied"), "{line} {headers}");
            assert!(answer.json()["detail"].as_str().unwrap().contains("ambiguous"), "{answer:?}");
        }
    }
    assert!(harness.ads_calls().is_empty(), "{:?}", harness.ads_calls());
    // A form is refused unread: one of its fields may be `_method`.
    for kind in ["application/x-www-form-urlencoded", "Multipart/Form-Data; boundary=x", "text/x, multipart/mixed"] {
        let headers = format!("Content-Type: {kind}\r\n");
        let answer = ask(&harness, "POST /a/reader/sp/campaigns/list", &headers).await;
        assert_eq!(answer.said(), (403, "policy_denied"), "{kind}");
        assert!(answer.json()["next_step"].as_str().unwrap().contains("application/json"), "{answer:?}");
        assert_eq!(
            ask(&harness, "POST /a/reader/sp/campaigns/list", "Content-Type: application/json\r\n").await.said().1,
            ""
        );
        assert_eq!(ask(&harness, "POST /a/free/sandbox/echo", &headers).await.said().1, "", "{kind}");
        harness.sandbox.clear_history();
    }
    // The one upload that Amazon takes as a form passes where it is allowed.
    let upload = "POST /a/uploader/stores/assets";
    assert_eq!(ask(&harness, upload, "Content-Type: multipart/form-data; boundary=x\r\n").await.said().1, "");
    assert_eq!(
        ask(&harness, upload, "Content-Type: application/x-www-form-urlencoded\r\n").await.said().1,
        "policy_denied"
    );
    // Without a policy there is nothing to get round, and a value is not a name.
    for (query, headers) in overriding {
        let answer = ask(&harness, &format!("GET /a/free/sandbox/echo{query}"), headers).await;
        assert_eq!(answer.said().1, "", "it reached Amazon: {query} {headers}");
    }
    assert_eq!(ask(&harness, "GET /a/reader/sandbox/echo?method=_method&a_method=x", "").await.said(), (200, ""));
}
