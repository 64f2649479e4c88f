use super::*;

fn read(target: &str) -> Result<Target, BadTarget> {
    Target::read(&target.parse().unwrap(), |authority| authority == "localhost:8001")
}

fn forwarded(target: &str) -> String {
    read(target).unwrap().path_and_query.to_string()
}

#[test]
fn a_target_that_is_not_for_us_is_refused() {
    for foreign in [
        "http://evil.test/x",
        "http://advertising-api.amazon.com.evil.test/",
        "https://localhost:9999/",
        "http://advertising-api.amazon.com:8443/",
        "http://u@advertising-api.amazon.com/",
    ] {
        assert_eq!(read(foreign), Err(BadTarget::Foreign), "{foreign}");
    }
    for form in ["ftp://advertising-api.amazon.com/x", "*", "evil.test:80"] {
        assert!(matches!(read(form), Err(BadTarget::Form(_))), "{form}");
    }
    assert_eq!(read(&format!("/{}", "x".repeat(MAX_TARGET))), Err(BadTarget::TooLong));
}

#[test]
fn path_and_query_are_forwarded_unchanged() {
    for target in ["/", "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c", "/a", "/x?", "/x/../y?q=/a/b/", "/amc/%7Bid%7D"] {
        assert_eq!(forwarded(target), target);
    }
}

#[test]
fn an_absolute_target_names_its_region() {
    let host = |target: &str| read(target).unwrap().of;
    let (ads, mcp) = (AmazonHost::ads, AmazonHost::mcp);
    assert_eq!(host("http://advertising-api-eu.amazon.com/v2/profiles"), Destination::Amazon(ads(Region::Eu)));
    assert_eq!(host("https://ADVERTISING-API.amazon.com:443/x?y"), Destination::Amazon(ads(Region::Na)));
    assert_eq!(host("http://advertising-ai.amazon.com/mcp"), Destination::Amazon(mcp(Region::Na)));
    assert_eq!(host("http://advertising-ai-fe.amazon.com:80/mcp/lite"), Destination::Amazon(mcp(Region::Fe)));
    assert_eq!(read("http://advertising-api-fe.amazon.com:80//x").unwrap().path_and_query, "//x");
    assert_eq!(read("http://api.amazon.co.uk/auth/o2/token").unwrap().of, Destination::Lwa);
    assert_eq!(read("http://localhost:8001/v2/profiles").unwrap().of, Destination::Local);
    assert_eq!(forwarded("http://advertising-api.amazon.com"), "/");
    assert_eq!(forwarded("http://advertising-api.amazon.com?x=/y"), "/?x=/y");
    assert_eq!(forwarded("http://localhost:8001?x=1"), "/?x=1");
}

#[test]
fn only_the_account_prefix_is_removed_from_the_path() {
    let target = read("/a/acme@eu|1//sp/x?a=%20").unwrap();
    assert_eq!(target.account.as_deref(), Some("acme@eu|1"));
    assert_eq!(target.path_and_query, "//sp/x?a=%20");
    assert_eq!(read("/a/acme%7C1/x").unwrap().account.as_deref(), Some("acme|1"));
    assert_eq!(forwarded("/a/acme"), "/");
    assert_eq!(forwarded("/a/acme?x=1"), "/?x=1");
    for bad in ["/a//x", "/a/%2e%2e/x", "/a/a%2fb/x", "/a/a%00/x", "/A/b/c", "//a/b/c", "/%61/b/c", "/x/../a/b"] {
        assert!(matches!(read(bad), Err(BadTarget::Form(_))), "{bad}");
    }
    assert_eq!(read("http://advertising-api.amazon.com/a/acme/x").unwrap().account, None);
}

fn route(target: &str) -> Route {
    Route::read(&Method::GET, &target.parse().unwrap(), None, |_| false).unwrap()
}

#[test]
fn no_path_that_reads_like_ours_is_forwarded() {
    for path in [
        "//api/auth/amazon/status",
        "/API/auth/amazon/status",
        "/api//auth/amazon/logout",
        "/./api/auth/amazon/status",
        "/x/../api/auth/amazon/status",
        "/%61pi/auth/amazon/status",
        "/api%2fauth/amazon/status",
        "/api/auth;x=1/amazon/status",
        "/auth/O2/token",
        "//auth/o2/token",
        "/auth/o2/token/",
        "/%2561uth/o2/token",
        "/a/acme//auth/o2/token",
        "/a/acme/auth/O2/token",
        "/favicon.ico",
        "//",
    ] {
        assert_eq!(route(path), Route::Own(Endpoint::Unknown), "{path}");
    }
    for path in [
        "/.well-known/oauth-authorization-server",
        "/.well-known/oauth-protected-resource/mcp",
        "/.well-known/openid-configuration",
        "/mcp/.well-known/openid-configuration",
        "/mcp/%2ewell-known/oauth-protected-resource",
        "/a/acme/mcp/.well-known/openid-configuration",
        "http://advertising-ai.amazon.com/.well-known/oauth-protected-resource/mcp",
        "/register",
        "//Register/",
        "/authorize",
        "/oauth/token",
    ] {
        assert_eq!(route(path), Route::Own(Endpoint::Discovery), "{path}");
    }
    for path in ["/v2/profiles", "/api/authors", "/a/acme/api/auth/x", "/a/acme/", "/registers", "/sp/auth/o2/token"] {
        assert!(matches!(route(path), Route::Upstream(_)), "{path}");
    }
    assert_eq!(route("/"), Route::Own(Endpoint::Root));
}

#[test]
fn a_code_with_a_state_of_ours_never_leaves() {
    let state = "x".repeat(43);
    assert_eq!(route(&format!("/callback?code=c&state={state}")), Route::Own(Endpoint::StrayCallback));
    assert!(matches!(route(&format!("/callback?state={state}")), Route::Upstream(_)));
    assert!(matches!(route("/sp/x?code=c&state=enabled"), Route::Upstream(_)));
}
