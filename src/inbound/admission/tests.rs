use std::net::SocketAddr;

use http::Request;

use super::*;

fn tcp() -> Peer {
    Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 9)))
}

fn admission() -> Admission {
    Admission::new(Settings {
        allowed_hosts: vec!["ads.internal".into()],
        caller_tokens: Vec::new(),
        frontend_origin: Some("https://app.example.com".into()),
        peer_uids: vec![1000, 1001],
    })
}

fn parts(target: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::get(target);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn host(value: &str) -> Result<Route, Refusal> {
    admission().route(&parts("/x", &[("host", value)]), tcp())
}

#[test]
fn no_other_spelling_of_loopback_passes() {
    for evil in [
        "evil.test",
        "evil.test:8001",
        "localhost.",
        "localhost.:8001",
        "127.1",
        "127.0.0.2",
        "0x7f.1",
        "2130706433",
        "[::ffff:127.0.0.1]",
        "::1",
        "[::1",
        "localhost:80@evil",
        "evil#localhost",
        "localhost:",
        "localhost:x",
        "localhost:99999",
        "localhost:8001:1",
        "localhost evil",
        "http://localhost",
        "advertising-api.amazon.com",
        "ads.internal.evil.test",
        "0.0.0.0",
        "[0:0:0:0:0:0:0:1]",
        "localhost/",
        "user@localhost",
        "%6cocalhost",
    ] {
        assert_eq!(host(evil), Err(Refusal::Host), "{evil}");
    }
    for fine in [
        "localhost",
        "LOCALHOST:8001",
        "localhost:1",
        "127.0.0.1",
        "127.0.0.1:8001",
        "[::1]",
        "[::1]:8001",
        "ads.internal",
        "ADS.internal:80",
    ] {
        assert!(host(fine).is_ok(), "{fine}");
    }
}

#[test]
fn one_host_and_no_more() {
    assert_eq!(admission().route(&parts("/", &[]), tcp()), Err(Refusal::NoHost));
    assert_eq!(host(""), Err(Refusal::NoHost));
    assert_eq!(
        admission().route(&parts("/", &[("host", "localhost"), ("host", "localhost")]), tcp()),
        Err(Refusal::NoHost)
    );
    assert!(admission().route(&parts("/", &[]), Peer::Unix(None)).is_ok());
}

#[test]
fn at_a_unix_socket_another_user_is_refused() {
    for other in [Peer::Unix(Some(0)), Peer::Unix(Some(1002)), Peer::Unix(None)] {
        assert_eq!(admission().peer(other), Err(Refusal::Peer), "{other:?}");
    }
    for fine in [Peer::Unix(Some(1000)), Peer::Unix(Some(1001)), tcp()] {
        assert_eq!(admission().peer(fine), Ok(()), "{fine:?}");
    }
    assert_eq!(Admission::new(Settings::default()).peer(Peer::Unix(None)), Ok(()), "nobody limits it");
}

#[test]
fn amazons_host_passes_with_the_absolute_form_alone() {
    let amazon = [("host", "advertising-api-eu.amazon.com")];
    assert_eq!(admission().route(&parts("/v2/profiles", &amazon), tcp()), Err(Refusal::Host));
    assert!(admission().route(&parts("http://advertising-api-eu.amazon.com/v2/profiles", &amazon), tcp()).is_ok());
    let foreign = parts("http://evil.test/", &[("host", "localhost")]);
    assert_eq!(admission().route(&foreign, tcp()), Err(Refusal::Target(BadTarget::Foreign)));
}

#[test]
fn framing_that_can_be_read_in_two_ways_is_refused() {
    for codings in
        [&["gzip, chunked"][..], &[",chunked"], &["chunked, chunked"], &["chunked", "chunked"], &["identity"], &[""]]
    {
        let mut headers = vec![("host", "localhost")];
        headers.extend(codings.iter().map(|coding| ("transfer-encoding", *coding)));
        assert_eq!(admission().route(&parts("/", &headers), tcp()), Err(Refusal::Framing), "{codings:?}");
    }
    let chunked = [("host", "localhost"), ("transfer-encoding", "Chunked")];
    assert!(admission().route(&parts("/", &chunked), tcp()).is_ok());
}

#[test]
fn methods_that_tunnel_or_echo_are_refused() {
    for name in ["TRACE", "get", "PROPFIND"] {
        let mut parts = parts("/", &[("host", "localhost")]);
        parts.method = name.parse().unwrap();
        assert_eq!(admission().route(&parts, tcp()), Err(Refusal::Method), "{name}");
    }
}

#[test]
fn no_web_page_drives_the_proxy() {
    for headers in [
        &[("origin", "null")][..],
        &[("origin", "https://app.example.com")],
        &[("sec-fetch-site", "none")],
        &[("sec-fetch-site", "same-origin")],
        &[("access-control-request-method", "POST")],
    ] {
        assert_eq!(admission().no_browser(&parts("/", headers).headers), Err(Refusal::CrossSite), "{headers:?}");
    }
    // Node's fetch() sends this one alone.
    assert_eq!(admission().no_browser(&parts("/", &[("sec-fetch-mode", "cors")]).headers), Ok(()));
}

#[test]
fn only_the_frontends_origin_may_fetch_the_oauth_endpoints() {
    let browser = |headers: &[(&str, &str)], navigable| admission().browser(&parts("/", headers).headers, navigable);
    for evil in ["null", "https://evil.test", "https://app.example.com.evil.test", "http://app.example.com"] {
        assert_eq!(browser(&[("origin", evil)], Navigable::FromAnywhere), Err(Refusal::CrossSite), "{evil}");
    }
    let origin = HeaderValue::from_static("https://app.example.com");
    assert_eq!(browser(&[("origin", "https://app.example.com")], Navigable::Never), Ok(Some(origin)));
    assert_eq!(browser(&[("sec-fetch-site", "cross-site")], Navigable::FromSite), Err(Refusal::CrossSite));
    assert_eq!(browser(&[("sec-fetch-site", "same-site")], Navigable::Never), Err(Refusal::CrossSite));
    assert_eq!(browser(&[("sec-fetch-site", "same-site")], Navigable::FromSite), Ok(None));
    assert_eq!(browser(&[("sec-fetch-site", "cross-site")], Navigable::FromAnywhere), Ok(None));
    assert_eq!(browser(&[], Navigable::Never), Ok(None));
}

#[test]
fn the_caller_token_is_taken_in_four_ways_and_no_other() {
    let admission =
        Admission::new(Settings { caller_tokens: vec![Secret::new("one"), Secret::new("two")], ..Settings::default() });
    let ask = |headers: &[(&str, &str)]| admission.caller(&parts("/", headers).headers);
    let basic = format!("Basic {}", BASE64_STANDARD.encode("ads:two"));
    for bad in [
        &[][..],
        &[("x-ads-sidecar-token", "three")],
        &[("authorization", "one")],
        &[("proxy-authorization", "Bearer on")],
        &[("authorization", "Basic b25l")],
    ] {
        assert_eq!(ask(bad), Err(Refusal::Caller), "{bad:?}");
    }
    for good in [
        &[("x-ads-sidecar-token", "one")][..],
        &[("proxy-authorization", "Bearer two")],
        &[("proxy-authorization", basic.as_str())],
        &[("authorization", "bearer one")],
    ] {
        assert_eq!(ask(good), Ok(()), "{good:?}");
    }
}

#[test]
fn a_caller_token_is_known_shown_and_asked_for_only_where_it_is_one() {
    let none = Admission::new(Settings::default());
    assert!(!none.needs_caller_token() && !none.is_caller_token(b"") && !none.is_caller_token(b"one"));
    let tokens = vec![Secret::new("one"), Secret::new("two"), Secret::new("one")];
    let admission = Admission::new(Settings { caller_tokens: tokens, ..Settings::default() });
    assert!(admission.needs_caller_token() && admission.is_caller_token(b"one") && admission.is_caller_token(b"two"));
    assert!(!admission.is_caller_token(b"") && !admission.is_caller_token(b"three"));
    let shown = |headers: &[(&str, &str)]| admission.shown_token(&parts("/", headers).headers);
    let basic = format!("Basic {}", BASE64_STANDARD.encode("ads:t:wo"));
    assert_eq!(
        shown(&[("x-ads-sidecar-token", "three"), ("proxy-authorization", "Bearer two")]),
        Some(b"two".to_vec())
    );
    assert_eq!(shown(&[("proxy-authorization", basic.as_str())]), None, "the password begins behind the first colon");
    assert_eq!(shown(&[("x-ads-sidecar-token", "three")]), None);
}

#[test]
fn a_caller_on_this_machine_comes_from_loopback_and_names_loopback() {
    let local = |peer: &str, host: &str| {
        is_on_this_machine(&parts("/", &[("host", host)]).headers, Peer::Tcp(peer.parse().unwrap()))
    };
    assert!(local("127.0.0.1:9", "localhost") && local("[::1]:9", "[::1]:9464"));
    assert!(!local("127.0.0.1:9", "ads.internal"), "a name of ours that is not loopback");
    assert!(!local("127.0.0.2:9", "localhost") && !local("10.0.0.1:9", "localhost"));
}

#[test]
fn our_own_authority_is_the_one_that_the_caller_knows_us_by() {
    let own = |host: &str| admission().own_authority(&parts("/", &[("host", host)]).headers).map(str::to_owned);
    assert_eq!(own("ads.internal:80").as_deref(), Some("ads.internal:80"));
    assert_eq!(own("advertising-api.amazon.com"), None);
}

#[test]
fn a_probe_may_name_any_host_but_not_send_ambiguous_framing() {
    let any = |headers: &[(&str, &str)]| admission().admin(&parts("/livez", headers), tcp(), AdminAccess::Probe);
    assert_eq!(any(&[("host", "10.1.2.3")]), Ok(()));
    assert_eq!(any(&[("host", "localhost"), ("transfer-encoding", "gzip, chunked")]), Err(Refusal::Framing));
}

#[test]
fn a_form_comes_from_the_page_itself() {
    let form = |headers: &[(&str, &str)]| {
        let mut all = vec![("host", "localhost:9464")];
        all.extend(headers);
        Admission::new(Settings::default()).admin(&parts("/page/log", &all), tcp(), AdminAccess::Form)
    };
    for evil in [
        &[("origin", "null")][..],
        &[("origin", "http://localhost:9465")],
        &[("origin", "http://localhost")],
        &[("origin", "http://127.0.0.1:9464")],
        &[("origin", "http://localhost:9464.evil.test")],
        &[("origin", "http://evil.test"), ("sec-fetch-site", "same-origin")],
        &[("origin", "http://localhost:9464"), ("origin", "http://evil.test")],
        &[("origin", "http://localhost:9464"), ("sec-fetch-site", "same-site")],
        &[("origin", "http://localhost:9464"), ("sec-fetch-site", "cross-site")],
        &[("origin", "http://localhost:9464"), ("sec-fetch-site", "none")],
        &[("origin", "http://localhost:9464"), ("access-control-request-method", "POST")],
    ] {
        assert_eq!(form(evil), Err(Refusal::CrossSite), "{evil:?}");
    }
    assert_eq!(form(&[("origin", "http://localhost:9464"), ("sec-fetch-site", "same-origin")]), Ok(()));
    assert_eq!(form(&[]), Ok(()), "no browser");
    let rebound = [("host", "evil.test"), ("origin", "http://evil.test"), ("sec-fetch-site", "same-origin")];
    let rebound = Admission::new(Settings::default()).admin(&parts("/page/log", &rebound), tcp(), AdminAccess::Form);
    assert_eq!(rebound, Err(Refusal::Host));
}

#[test]
fn each_refusal_has_a_label_of_its_own() {
    let target = Refusal::Target(BadTarget::Foreign);
    let all = [
        Refusal::Framing,
        Refusal::NoHost,
        Refusal::Host,
        target,
        Refusal::Method,
        Refusal::CrossSite,
        Refusal::TypedAddress,
        Refusal::Caller,
    ];
    let labels = all.map(Refusal::reason);
    assert_eq!(labels, ["framing", "no_host", "host", "target", "method", "cross_site", "cross_site", "caller_token"]);
}

#[test]
fn the_known_methods_pass() {
    for name in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        let mut parts = parts("/", &[("host", "localhost")]);
        parts.method = name.parse().unwrap();
        assert!(admission().route(&parts, tcp()).is_ok(), "{name}");
    }
}
