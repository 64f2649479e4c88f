//! `adsidecar explain` and `adsidecar status`.

use reqwest::Method;
use serde_json::Value;
use world::{Fault, Listener, Rule};

use crate::commands::{DONE, FAILED, Ran, beside, command, run};
use crate::harness::Harness;

const ACCOUNTS: &str = "[[account]]\nname = \"acme\"\nuser = \"anna\"\nregion = \"eu\"\nprofile_id = \"77\"\n\
                        account_id = \"DSP1\"\nheaders = { X-Team = \"canary\" }\n\
                        [[account]]\nname = \"bound\"\nread_only = true\nprofile_id = \"88\"\n";

async fn explained(harness: &Harness, arguments: &[&str]) -> Value {
    let ran = run(harness, &[&["explain"], arguments, &["-o", "json"]].concat(), "").await;
    assert_eq!(ran.code, DONE, "{}{}", ran.out, ran.err);
    serde_json::from_str(&ran.out).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_names_the_host_and_headers_that_amazon_then_receives() {
    let harness = Harness::with_running_clock(ACCOUNTS).await;
    harness.log_in("anna").await;
    for (path, more) in [
        ("/sp/campaigns/list", None),
        ("/reporting/reports", Some(("Amazon-Ads-AccountId", "mine"))),
        ("/adsApi/v1/query/campaigns", Some(("Prefer", "x"))),
        ("/dsp/streams/subscriptions", None),
        ("/v2/profiles", Some(("Cookie", "a=b"))),
        ("/unknown/path", None),
    ] {
        let mut arguments = vec!["POST", path, "--account", "acme"];
        let header = more.map(|(name, value)| format!("{name}: {value}"));
        arguments.extend(header.iter().flat_map(|header| ["--header", header.as_str()]));
        let told = explained(&harness, &arguments).await;

        harness.sandbox.clear_history();
        let mut request = harness.request(reqwest::Method::POST, path).header("x-ads-account", "acme");
        if let Some((name, value)) = more {
            request = request.header(name, value);
        }
        request.send().await.unwrap();
        let seen = harness.seen();
        assert_eq!(told["region"], "eu");
        assert_eq!(told["user"], "anna");
        assert_eq!(told["url"], format!("{}{path}", harness.sandbox.origin(world::Listener::Eu)));
        for line in told["headers"].as_array().unwrap() {
            let (name, value) = (line["name"].as_str().unwrap(), line["value"].as_str().unwrap());
            let received = seen.header(name).unwrap_or_else(|| panic!("{path}: Amazon did not receive {name}"));
            assert!(value.ends_with('…') || received == value, "{path}: {name} is {received}, not {value}");
            assert_ne!(line["why"], "", "{name}");
        }
        let named = |name: &str| told["headers"].as_array().unwrap().iter().any(|line| line["name"] == name);
        let about_the_request =
            ["content-length", "content-type", "accept", "user-agent", "transfer-encoding", "x-request-id"];
        for (name, _) in &seen.headers {
            let name = name.to_ascii_lowercase();
            assert!(named(&name) || about_the_request.contains(&name.as_str()), "{path}: {name} is not explained");
        }
        assert!(!told.to_string().contains("canary") && !told.to_string().contains("Atz"), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_knows_the_mcp_hosts_and_the_outgoing_proxy() {
    let harness = Harness::with_running_clock(ACCOUNTS).await;
    for (path, listener) in [("/mcp", Listener::McpEu), ("/mcp/lite", Listener::McpEu), ("/v2/profiles", Listener::Eu)]
    {
        let told = explained(&harness, &["POST", path, "--account", "acme"]).await;
        assert_eq!(told["url"], format!("{}{path}", harness.sandbox.origin(listener)));
        assert_eq!(told["through"], Value::Null);
    }
    let told = explained(&harness, &["GET", "http://advertising-ai-fe.amazon.com/mcp"]).await;
    assert_eq!(told["url"], format!("{}/mcp", harness.sandbox.origin(Listener::McpFe)));

    let proxy = ["--set", "upstream.proxy=http://ann:canary@proxy.example:3128"];
    let told = explained(&harness, &[&["GET", "/sd/campaigns"], &proxy[..]].concat()).await;
    assert_eq!(told["through"], "the proxy http://proxy.example:3128 (upstream.proxy)");
    let ran = run(&harness, &[&["explain", "GET", "/sd/campaigns"], &proxy[..]].concat(), "").await;
    assert!(ran.out.contains("\n  through  the proxy http://proxy.example:3128 (upstream.proxy)\n"), "{}", ran.out);
    assert!(!ran.out.contains("canary"), "{}", ran.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_says_why_and_what_is_left_out() {
    let harness = Harness::with_running_clock(ACCOUNTS).await;
    let reasons = |lines: &Value| lines.as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>().join("\n");

    let told = explained(&harness, &["GET", "/sp/campaigns/list", "--account", "acme"]).await;
    assert_eq!(
        (told["family"].as_str(), told["selected_by"].as_str()),
        (Some("sponsored_products"), Some("the header X-Ads-Account"))
    );
    assert!(reasons(&told["headers"]).contains("profile_id of the account acme"), "{told}");
    assert_eq!(told["throttle"]["bucket"], "eu/sponsored_products/read");
    let slowed = ["POST", "/reporting/reports", "--account", "acme", "--set", "throttle.mode=enforce"];
    let told = explained(&harness, &slowed).await;
    assert_eq!(
        (told["throttle"]["bucket"].as_str(), told["throttle"]["mode"].as_str()),
        (Some("eu/reporting/create"), Some("enforce"))
    );
    let told = explained(&harness, &["GET", "/a/acme/v2/profiles", "--header", "Authorization: Bearer canary"]).await;
    assert_eq!(told["selected_by"], "the prefix of the path");
    assert!(reasons(&told["left_out"]).contains("the access token is always adsidecar's"), "{told}");
    assert!(reasons(&told["left_out"]).contains("profiles takes no such id"), "{told}");
    let told = explained(&harness, &["GET", "/sp/campaigns/list", "--account", "acme", "--region", "fe"]).await;
    assert_eq!((told["region"].as_str(), told["region_why"].as_str()), (Some("fe"), Some("the header X-Ads-Region")));
    assert!(reasons(&told["hints"]).contains("region_mismatch"), "{told}");
    let told = explained(&harness, &["GET", "http://advertising-api-fe.amazon.com/v2/profiles"]).await;
    assert_eq!((told["region"].as_str(), told["user"].as_str()), (Some("fe"), Some("default")));
    let told = explained(&harness, &["GET", "/api/auth/amazon/status"]).await;
    assert_eq!(told["served_by"], "adsidecar");

    for (arguments, says) in [
        (&["GET", "/x", "--account", "nobody"][..], "unknown_account"),
        (&["GET", "http://evil.example/x"], "host_not_allowed"),
        (&["GET", "/x", "--header", "X-Ads-Acount: a"], "bad_request"),
        (&["PUT", "/sp/campaigns", "--account", "bound"], "policy_denied"),
    ] {
        let ran = beside(&harness, &[&["explain"], arguments].concat()).await;
        assert_eq!(ran.code, FAILED, "{arguments:?}");
        assert!(ran.err.contains(says), "{says} in {}", ran.err);
    }
    let text = run(&harness, &["explain", "PUT", "/sp/campaigns", "--account", "bound"], "").await.out;
    assert!(text.contains("policy   denied: it may change something"), "{text}");
    assert!(text.contains("amazon-advertising-api-scope") && text.contains("88"), "{text}");
    assert!(harness.ads_calls().is_empty(), "nothing was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_of_the_wrong_kind_another_region_and_an_agency_are_hints_and_block_nothing() {
    let extra = "[[account]]\nname = \"kind\"\nprofile_id = \"ENTITY1\"\n\
                 [[account]]\nname = \"region\"\nregion = \"fe\"\nprofile_id = \"71\"\n\
                 [[account]]\nname = \"agency\"\nregion = \"eu\"\nprofile_id = \"72\"\n";
    let mut harness = Harness::with_running_clock(extra).await;
    harness.sandbox.world(|world| {
        let profiles = &mut world.catalogue.profiles;
        let template = profiles.iter().find(|one| one.region == world::Listener::Eu).unwrap().clone();
        profiles.push(world::Profile { id: 71, ..template.clone() });
        profiles.push(world::Profile { id: 72, kind: "agency", ..template });
    });
    harness.log_in("default").await;
    assert_eq!(harness.post("/api/auth/amazon/accounts/sync").await.status(), 200);
    let call = harness.request(reqwest::Method::GET, "/sd/campaigns").header("x-ads-account", "kind");
    call.send().await.unwrap();
    assert_eq!(harness.seen().header("amazon-advertising-api-scope"), Some("ENTITY1"), "a hint, never a block");
    harness.stop_sidecar().await;
    for (account, says) in [
        ("kind", "profile_id of the account kind is probably another kind of id"),
        ("region", "belongs to the region eu"),
        ("agency", "is an agency's, which has no campaigns"),
    ] {
        let told = explained(&harness, &["GET", "/sd/campaigns", "--account", account]).await;
        assert!(told["hints"].to_string().contains(says), "{told}");
    }
    let profiles = explained(&harness, &["GET", "/v2/profiles", "--account", "agency"]).await;
    assert!(!profiles["hints"].to_string().contains("agency's"), "{profiles}");
    let checked = run(&harness, &["check"], "").await;
    assert_eq!(checked.code, DONE);
    assert!(
        checked.err.contains("[[account]] number 1: profile_id") && checked.err.contains("a number"),
        "{}",
        checked.err
    );
}

/// Runs `status` beside the sidecar of the harness.
async fn status(harness: &Harness, more: &[&str]) -> Ran {
    let sets =
        [format!("proxy.listen={}", harness.proxy_address()), format!("admin.listen={}", harness.admin_address())];
    run(harness, &[&["status", "--set", &sets[0], "--set", &sets[1]], more].concat(), "").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_is_told_beside_a_running_sidecar_and_without_one() {
    let mut harness = Harness::with_running_clock("").await;
    let nobody = status(&harness, &[]).await;
    assert_eq!(nobody.code, FAILED, "somebody has to log in");
    assert!(nobody.out.contains("nobody is logged in: adsidecar login"), "{}", nobody.out);
    harness.log_in("anna").await;
    let running = status(&harness, &[]).await;
    assert_eq!(running.code, DONE, "{}{}", running.out, running.err);
    assert!(running.out.contains("runs at") && running.out.contains(": ready"), "{}", running.out);
    let line = running.out.lines().find(|line| line.starts_with("anna")).unwrap();
    assert!(line.contains("fresh") && (line.contains("in 59m") || line.contains("in 60m")), "{line}");
    assert!(line.contains("in 364d") || line.contains("in 365d"), "the end of the consent: {line}");
    let told: Value = serde_json::from_str(&status(&harness, &["-o", "json"]).await.out).unwrap();
    assert_eq!(told["sidecar"]["readiness"], "ready");
    assert_eq!(told["users"][0]["user_id"], "anna");

    harness.stop_sidecar().await;
    let alone = run(&harness, &["status"], "").await;
    assert_eq!(alone.code, DONE, "{}{}", alone.out, alone.err);
    assert!(alone.out.contains("no sidecar runs") && alone.out.contains("\nanna  fresh"), "{}", alone.out);

    harness.start_sidecar().await;
    harness.sandbox.world(|world| world.revoke_all());
    harness.post("/api/auth/amazon/refresh?user_id=anna").await;
    let revoked = status(&harness, &[]).await;
    assert_eq!(revoked.code, FAILED);
    assert!(
        revoked.out.contains("anna has to log in again (invalid_grant): adsidecar login --user anna"),
        "{}",
        revoked.out
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_shows_the_limits_that_amazon_was_seen_to_have() {
    let harness = Harness::with_running_clock("[throttle]\nmode = \"enforce\"\n").await;
    harness.log_in("anna").await;
    let call = async |path: &str| {
        let request = harness.request(Method::POST, path).header("x-ads-user", "anna");
        request.header("amazon-advertising-api-scope", "3012345678901234561").body("{}").send().await.unwrap()
    };
    let json = async || -> Value { serde_json::from_str(&status(&harness, &["-o", "json"]).await.out).unwrap() };
    let before = status(&harness, &[]).await;
    assert!(!before.out.contains("limits"), "nothing is known before a 429: {}", before.out);
    assert_eq!((&json().await["limits"], &json().await["running"]), (&Value::Array(vec![]), &Value::Array(vec![])));

    assert!(call("/campaigns/export").await.status().is_success());
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(300))).at(Listener::Na).on("/sp"));
    assert_eq!(call("/sp/campaigns").await.status(), 429);
    let told = json().await;
    let [limit] = told["limits"].as_array().unwrap().as_slice() else { panic!("{told}") };
    assert_eq!(
        (&limit["region"], &limit["family"], &limit["kind"], &limit["waiting"]),
        (&"na".into(), &"sponsored_products".into(), &"write".into(), &0.into())
    );
    let paused = limit["paused_for"].as_f64().unwrap();
    assert!(paused > 290.0 && paused <= 330.0 && limit["rate"].as_f64().unwrap() > 0.0, "{limit}");
    assert_eq!(told["running"], serde_json::json!([{ "region": "na", "family": "exports", "count": 1 }]));

    let text = status(&harness, &[]).await.out;
    let line = text.lines().find(|line| line.starts_with("na ")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("sponsored_products") && line.contains("write") && line.contains("/s"), "{line}");
    assert!(text.contains("running at Amazon: 1 (na, exports)"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_status_is_printed_until_it_is_interrupted() {
    let harness = Harness::with_running_clock("").await;
    harness.log_in("anna").await;
    let sets =
        [format!("proxy.listen={}", harness.proxy_address()), format!("admin.listen={}", harness.admin_address())];
    let file = harness.config_file();
    let arguments = [
        "status",
        "--config",
        file.to_str().unwrap(),
        "--set",
        &sets[0],
        "--set",
        &sets[1],
        "--watch=50ms",
        "-o",
        "json",
    ];
    let mut child = command(&arguments).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let (three, status) = tokio::task::spawn_blocking(move || {
        let three: Vec<_> = lines.by_ref().take(3).map(Result::unwrap).collect();
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
        (three, child.wait().unwrap())
    })
    .await
    .unwrap();
    assert_eq!(status.code(), Some(DONE));
    for line in three {
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["users"][0]["user_id"], "anna");
    }
}
