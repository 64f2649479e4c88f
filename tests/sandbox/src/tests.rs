//! The sandbox behaves as Amazon documents, and gives tests the control that they rely on. All over real TLS.

use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use jiff::SignedDuration;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::*;

const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const SP_CAMPAIGN: &str = "application/vnd.spCampaign.v3+json";

/// A sandbox with a frozen clock.
struct Setup {
    sandbox: Sandbox,
    clock: Clock,
}

/// A response with its complete body.
#[derive(Debug)]
struct TestResponse {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl TestResponse {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the response is JSON")
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Setup {
    async fn new() -> Self {
        let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
        let sandbox = Sandbox::start(Options::calm(clock.clone())).await.unwrap();
        Self { sandbox, clock }
    }

    fn grant(&self) -> Issued {
        self.sandbox.grant()
    }

    fn code(&self, challenge: Option<Challenge>) -> String {
        self.sandbox.world(|world| {
            let consent = Consent { challenge, ..world.usual_consent() };
            world.consent(consent, self.clock.now())
        })
    }

    fn profile(&self, advertiser: usize, region: Listener) -> String {
        self.sandbox.world(|world| {
            let id = world.catalogue.advertisers[advertiser].id.clone();
            world.catalogue.profiles_of(&id, region).next().unwrap().id.to_string()
        })
    }

    /// Sends a request on a new connection.
    async fn try_send(&self, listener: Listener, request: Request<Full<Bytes>>) -> Result<TestResponse, hyper::Error> {
        let stream = self.tls(listener, b"http/1.1").await;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        drop(sender);
        let _ = connection.await;
        Ok(TestResponse { status: head.status, headers: head.headers, body })
    }

    async fn tls(&self, listener: Listener, protocol: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.sandbox.ca_pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        let stream = TcpStream::connect(self.address(listener)).await.unwrap();
        let name = ServerName::try_from("advertising-api.amazon.com").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    fn address(&self, listener: Listener) -> String {
        self.sandbox.origin(listener).replace("https://", "")
    }

    async fn send(&self, listener: Listener, request: Request<Full<Bytes>>) -> TestResponse {
        self.try_send(listener, request).await.unwrap()
    }

    /// A request with a Host header only.
    fn bare(&self, listener: Listener, method: &str, target: &str) -> http::request::Builder {
        Request::builder().method(method).uri(target).header("host", self.address(listener))
    }

    /// A request with a valid token and the client id in the older header.
    fn api(&self, listener: Listener, method: &str, target: &str) -> http::request::Builder {
        let token = self.grant().access_token;
        self.bare(listener, method, target)
            .header("authorization", format!("Bearer {token}"))
            .header("amazon-advertising-api-clientid", CLIENT_ID)
    }

    async fn get(&self, request: http::request::Builder) -> TestResponse {
        self.send(Listener::Na, request.body(Full::default()).unwrap()).await
    }

    async fn token(&self, form: &str) -> TestResponse {
        let request = self.bare(Listener::Lwa, "POST", "/auth/o2/token");
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        self.send(Listener::Lwa, request.body(Full::from(form.to_owned())).unwrap()).await
    }

    async fn refresh(&self, refresh_token: &str) -> TestResponse {
        let token = refresh_token.replace('|', "%7C");
        self.token(&format!("grant_type=refresh_token&refresh_token={token}&{}", credentials())).await
    }

    async fn exchange(&self, code: &str, verifier: Option<&str>) -> TestResponse {
        let verifier = verifier.map(|one| format!("&code_verifier={one}")).unwrap_or_default();
        let form = format!("grant_type=authorization_code&code={code}&redirect_uri={RETURN_URL}&{}", credentials());
        self.token(&(form + &verifier)).await
    }

    /// A call to the control port over plain HTTP.
    async fn control(&self, method: Method, path: &str, body: &str, headers: &[(&str, &str)]) -> TestResponse {
        let stream = TcpStream::connect(self.sandbox.addresses().control).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "localhost:1");
        }
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request: Request<Full<Bytes>> = request.body(Full::from(body.to_owned())).unwrap();
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        drop(sender);
        let _ = connection.await;
        TestResponse { status: head.status, headers: head.headers, body }
    }
}

fn credentials() -> String {
    format!("client_id={CLIENT_ID}&client_secret={CLIENT_SECRET}")
}

fn s256(verifier: &str) -> Challenge {
    Challenge::S256(URL_SAFE_NO_PAD.encode(Sha256::digest(verifier)))
}

fn assert_refused(response: &TestResponse, status: u16, error: &str, text: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    let body = response.json();
    assert_eq!(body["error"], error);
    assert_eq!(body["error_description"], text);
    assert!(body["error_index"].is_string() && body["request_id"].is_string());
}

const BAD_CODE: &str = "The request has an invalid grant parameter : code";
const BAD_GRANT: &str = "The request has an invalid grant parameter : refresh_token. \
                         User may have revoked or didn't grant the permission.";

#[tokio::test]
async fn an_address_other_than_loopback_is_refused() {
    let everywhere: SocketAddr = "0.0.0.0:0".parse().unwrap();
    let mut options = Options::calm(Clock::system());
    options.listen.control = everywhere;
    let error = Sandbox::start(options).await.err().unwrap();
    assert_eq!(error.to_string(), "the sandbox listens on loopback only, not on 0.0.0.0:0: use 127.0.0.1 or [::1]");
}

#[tokio::test]
async fn a_code_works_once_and_for_five_minutes() {
    let setup = Setup::new().await;
    let late = setup.code(None);
    setup.clock.advance(SignedDuration::from_mins(5));
    assert_refused(&setup.exchange(&late, None).await, 400, "invalid_grant", BAD_CODE);

    let code = setup.code(None);
    setup.clock.advance(SignedDuration::from_secs(299));
    let first = setup.exchange(&code, None).await;
    assert_eq!(first.status, 200);
    assert_eq!(first.headers["content-type"], "application/json;charset=UTF-8");
    assert_eq!(first.headers["cache-control"], "no-cache, no-store, must-revalidate");
    let tokens = first.json();
    assert!(tokens["access_token"].as_str().unwrap().starts_with("Atza|"));
    assert!(tokens["access_token"].as_str().unwrap().len() >= 350);
    assert!(tokens["refresh_token"].as_str().unwrap().starts_with("Atzr|"));
    assert_eq!((&tokens["token_type"], &tokens["expires_in"]), (&json!("bearer"), &json!(3600)));
    assert_refused(&setup.exchange(&code, None).await, 400, "invalid_grant", BAD_CODE);
    assert_eq!(setup.sandbox.lwa_calls(), LwaCalls { exchanges: 3, refreshes: 0, others: 0 });
}

#[tokio::test]
async fn wrong_missing_and_unexpected_verifiers_are_rejected() {
    let setup = Setup::new().await;
    let wrong = setup.exchange(&setup.code(Some(s256(VERIFIER))), Some("wrong")).await;
    assert_refused(&wrong, 400, "invalid_grant", BAD_CODE);
    let missing = setup.exchange(&setup.code(Some(s256(VERIFIER))), None).await;
    assert_refused(&missing, 400, "invalid_request", "The request is missing a required parameter : code_verifier");
    let unasked = setup.exchange(&setup.code(None), Some(VERIFIER)).await;
    assert_refused(&unasked, 400, "invalid_grant", BAD_CODE);

    assert_eq!(setup.exchange(&setup.code(Some(s256(VERIFIER))), Some(VERIFIER)).await.status, 200);
    let plain = Challenge::Plain(VERIFIER.into());
    assert_eq!(setup.exchange(&setup.code(Some(plain)), Some(VERIFIER)).await.status, 200);
}

#[tokio::test]
async fn a_refresh_fails_for_a_revoked_grant_another_client_a_wrong_secret_and_after_a_year() {
    let setup = Setup::new().await;
    let revoked = setup.grant();
    assert!(setup.sandbox.world(|world| world.revoke(&revoked.refresh_token)));
    assert_refused(&setup.refresh(&revoked.refresh_token).await, 400, "invalid_grant", BAD_GRANT);

    let grant = setup.grant();
    setup.sandbox.world(|world| {
        let client = Client { id: "other".into(), secrets: vec!["s".into()], ..world.clients[0].clone() };
        world.clients.push(client);
    });
    let token = grant.refresh_token.replace('|', "%7C");
    let form = format!("grant_type=refresh_token&refresh_token={token}");
    let foreign = setup.token(&format!("{form}&client_id=other&client_secret=s")).await;
    assert_refused(&foreign, 400, "unauthorized_client", "Not authorized for requested operation");
    let wrong = setup.token(&format!("{form}&client_id={CLIENT_ID}&client_secret=wrong")).await;
    assert_refused(&wrong, 401, "invalid_client", "Client authentication failed");
    let text = "The authorization grant type is not supported by the authorization server";
    let odd = setup.token(&format!("grant_type=password&{}", credentials())).await;
    assert_refused(&odd, 400, "unsupported_grant_type", text);

    setup.clock.advance(SignedDuration::from_hours(365 * 24 - 1));
    let again = setup.refresh(&grant.refresh_token).await;
    assert_eq!((again.status, &again.json()["refresh_token"]), (StatusCode::OK, &json!(grant.refresh_token)));
    setup.clock.advance(SignedDuration::from_hours(1));
    assert_refused(&setup.refresh(&grant.refresh_token).await, 400, "invalid_grant", BAD_GRANT);
}

#[tokio::test]
async fn the_token_endpoint_takes_json_a_query_and_basic_credentials_too() {
    let setup = Setup::new().await;
    let token = setup.grant().refresh_token;
    let body = json!({ "grant_type": "refresh_token", "refresh_token": token, "client_id": CLIENT_ID,
                       "client_secret": CLIENT_SECRET });
    let request = setup.bare(Listener::Lwa, "POST", "/auth/o2/token").header("content-type", "application/json");
    let by_json = setup.send(Listener::Lwa, request.body(Full::from(body.to_string())).unwrap()).await;
    assert_eq!(by_json.status, 200, "{}", by_json.text());

    let form = format!("grant_type=refresh_token&refresh_token={}", token.replace('|', "%7C"));
    let request = setup.bare(Listener::Lwa, "POST", &format!("/auth/o2/token?{form}&{}", credentials()));
    let by_query = setup.send(Listener::Lwa, request.body(Full::default()).unwrap()).await;
    assert_eq!(by_query.status, 200, "{}", by_query.text());

    let basic = format!("Basic {}", STANDARD.encode(format!("{CLIENT_ID}:{CLIENT_SECRET}")));
    let request = setup.bare(Listener::Lwa, "POST", "/auth/o2/token").header("authorization", basic);
    let by_basic = setup.send(Listener::Lwa, request.body(Full::from(form)).unwrap()).await;
    assert_eq!(by_basic.status, 200, "{}", by_basic.text());
    assert_eq!(setup.sandbox.refreshes(), 3);

    let target = format!("/auth/o2/tokeninfo?access_token={}", by_basic.json()["access_token"].as_str().unwrap());
    setup.clock.advance(SignedDuration::from_mins(1));
    let target = target.replace('|', "%7C");
    let info =
        setup.send(Listener::Lwa, setup.bare(Listener::Lwa, "GET", &target).body(Full::default()).unwrap()).await;
    assert_eq!((&info.json()["aud"], &info.json()["exp"]), (&json!(CLIENT_ID), &json!(3540)));
}

#[tokio::test]
async fn consent_errors_appear_on_the_page_or_at_the_callback_as_at_amazon() {
    let setup = Setup::new().await;
    let ask = |query: String| {
        let request = setup.bare(Listener::Lwa, "GET", &format!("/ap/oa?{query}"));
        setup.send(Listener::Lwa, request.body(Full::default()).unwrap())
    };
    let good =
        format!("client_id={CLIENT_ID}&scope=advertising%3A%3Acampaign_management&response_type=code&state=s%2B1");
    let uri = "http%3A%2F%2Flocalhost%3A8001%2Fapi%2Fauth%2Famazon%2Fcallback";
    let page = ask(format!("{good}&redirect_uri={uri}%3Fclose")).await;
    assert_eq!(page.status, 400);
    assert!(page.text().contains("has not been whitelisted for your application"));
    let page = ask(good.replace("campaign_management", "everything") + "&redirect_uri=" + uri).await;
    assert!(page.status == 400 && page.text().contains("An unknown scope was requested"));

    let denied = ask(format!("{good}&redirect_uri={uri}&decision=deny")).await;
    let location = denied.headers["location"].to_str().unwrap();
    assert!(location.starts_with(&format!("{RETURN_URL}?error=access_denied&")), "{location}");
    assert!(location.ends_with("&state=s%2B1"), "{location}");

    let allowed = ask(format!("{good}&redirect_uri={uri}&code_challenge={VERIFIER}")).await;
    assert_eq!(allowed.status, 302);
    let location = allowed.headers["location"].to_str().unwrap();
    assert!(location.ends_with("&scope=advertising%3A%3Acampaign_management&state=s%2B1"), "{location}");
    let code = location.strip_prefix(&format!("{RETURN_URL}?code=")).unwrap().split('&').next().unwrap();
    // Without a method, the challenge is the verifier itself.
    assert_eq!(setup.exchange(code, Some(VERIFIER)).await.status, 200);
}

#[tokio::test]
async fn the_consent_page_says_that_it_is_not_amazon() {
    let options = Options { auto_consent: false, ..Options::calm(Clock::system()) };
    let setup = Setup { clock: options.clock.clone(), sandbox: Sandbox::start(options).await.unwrap() };
    let query = format!("/ap/oa?client_id={CLIENT_ID}&scope={SCOPE}&response_type=code&redirect_uri={RETURN_URL}");
    let page = setup.control(Method::GET, &query, "", &[]).await;
    assert_eq!(page.status, 200);
    assert!(page.text().contains("This is the adsidecar sandbox, not Amazon"));
    let at_once = setup.control(Method::GET, &format!("{query}&auto=1"), "", &[]).await;
    assert_eq!(at_once.status, 302);
}

#[tokio::test]
async fn an_expired_unknown_malformed_duplicate_or_missing_token_is_rejected() {
    let setup = Setup::new().await;
    let old = setup.api(Listener::Na, "GET", "/v2/profiles");
    setup.clock.advance(SignedDuration::from_hours(1));
    let expired = setup.get(old).await;
    assert_eq!((expired.status, expired.text()), (StatusCode::UNAUTHORIZED, r#"{"message":"Unauthorized"}"#.into()));

    let with = |value: &str| {
        let request = setup.bare(Listener::Na, "GET", "/v2/profiles").header("authorization", value);
        setup.get(request.header("amazon-advertising-api-clientid", CLIENT_ID))
    };
    assert_eq!(with("Bearer Atza|unknown").await.status, 401);
    let raw = with(&setup.grant().access_token).await;
    assert!(raw.status == 403 && raw.text().contains("missing equal-sign"), "{}", raw.text());
    let twice = setup.api(Listener::Na, "GET", "/v2/profiles").header("authorization", "Bearer Atza|second");
    assert_eq!(setup.get(twice).await.status, 400);
    assert_eq!(setup.get(setup.bare(Listener::Na, "GET", "/v2/profiles")).await.status, 401);
}

#[tokio::test]
async fn each_api_family_requires_its_headers() {
    let setup = Setup::new().await;
    let scope = setup.profile(0, Listener::Na);
    let foreign = setup.profile(1, Listener::Na);
    let elsewhere = setup.profile(0, Listener::Eu);
    let v1 = |target: &str| {
        setup
            .bare(Listener::Na, "GET", target)
            .header("authorization", format!("Bearer {}", setup.grant().access_token))
    };
    let api = |target: &str| setup.api(Listener::Na, "GET", target);
    let amc = |target: &str| {
        api(target)
            .header("Amazon-Advertising-API-AdvertiserId", "ENTITYSANDBOXTOOLS")
            .header("Amazon-Advertising-API-MarketplaceId", "ATVPDKIKX0DER")
    };
    const SCOPED: &str = "amazon-advertising-api-scope";
    const ACCOUNT: &str = "amazon-ads-accountid";
    let cases = [
        (api("/sp/campaigns/extended"), 401, "Scope header is missing"),
        (api("/sb/v4/campaigns").header(SCOPED, &foreign), 401, &format!("Not authorized to access scope {foreign}")),
        (api("/sd/campaigns").header(SCOPED, &elsewhere), 401, "No matching advertiser found for scope"),
        (api("/sp/x").header(SCOPED, &scope).header(SCOPED, &scope), 400, "sent more than once"),
        (v1("/v2/profiles"), 400, "amazon-advertising-api-clientid is missing"),
        (v1("/v2/profiles").header("amazon-ads-clientid", CLIENT_ID), 400, "is not the one of profiles"),
        (api("/adsApi/v1/query/ads"), 400, "is not the one of Ads API v1"),
        (api("/adsApi/v1/query/ads").header("amazon-ads-clientid", CLIENT_ID), 400, "under two names"),
        (v1("/v2/profiles").header("amazon-advertising-api-clientid", "x"), 401, "client id does not belong"),
        (api("/reporting/reports/x").header(SCOPED, &scope).header(ACCOUNT, "1"), 400, "exclude each other"),
        (api("/amc/instances"), 403, "amazon-advertising-api-advertiserid is missing"),
        (amc("/amc/reporting/amcsandboxbooks/workflows"), 403, "unauthorized response"),
        (amc("/amc/advertiserData/amcsandboxtools/dataSets"), 403, "amazon-ads-accountid is missing"),
        (
            amc("/amc/audiences/query")
                .header("amazon-marketing-cloud-audience-instanceid", "i")
                .header("amazon-advertising-api-entityid", "E"),
            400,
            "must not be sent",
        ),
        (api("/dsp/streams/subscriptions").header(SCOPED, &scope), 403, "amazon-ads-account-id is missing"),
        (
            api("/avc/x").header("amazon-advertising-api-marketplaceid", "M"),
            403,
            "amazon-advertising-advertiser-id is missing",
        ),
        (api("/mmm/v1/x"), 403, "amazon-advertising-api-manager-account is missing"),
        (api("/adm/x"), 403, "amazon-ads-manager-account-id is missing"),
        (api("/nowhere"), 403, "missing equal-sign"),
    ];
    for (request, status, text) in cases {
        let target = format!("{:?}", request.uri_ref());
        let response = setup.get(request).await;
        assert_eq!(response.status, status, "{target}: {}", response.text());
        assert!(response.text().contains(text), "{target}: {}", response.text());
    }
    for request in [
        api("/amc/accounts"),
        amc("/amc/reporting/amcsandboxtools/workflows"),
        amc("/amc/advertiserData/amcsandboxtools/dataSets").header(ACCOUNT, "ENTITYSANDBOXTOOLS"),
        api("//sb/v4/campaigns").header(SCOPED, &scope),
        api("/streams/subscriptions").header(ACCOUNT, "1"),
        api("/dsp/measurement/x"),
        v1("/adsApi/v1/query/ads").header("amazon-ads-clientid", CLIENT_ID),
    ] {
        let target = format!("{:?}", request.uri_ref());
        let response = setup.get(request).await;
        assert_eq!(response.status, 200, "{target}: {}", response.text());
    }
}

#[tokio::test]
async fn a_leaked_header_is_rejected_by_name() {
    let setup = Setup::new().await;
    for (name, value) in [
        ("x-forwarded-for", "10.0.0.1"),
        ("via", "1.1 sidecar"),
        ("proxy-authorization", "Basic eA=="),
        ("connection", "keep-alive, x-secret"),
        ("keep-alive", "timeout=5"),
        ("amazon_advertising_api_scope", "1"),
        ("x-ads-account", "default"),
        ("x_ads_user", "default"),
        ("cookie", "a=b"),
        ("sec-fetch-site", "none"),
        ("host", "localhost:8001"),
    ] {
        let mut request = setup.api(Listener::Na, "GET", "/v2/profiles").body(Full::default()).unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
        let response = setup.send(Listener::Na, request).await;
        assert_eq!(response.status, 400, "{name}: {}", response.text());
        assert!(response.text().contains(&format!("Header {name} ")), "{name}: {}", response.text());
    }
    let real = setup.api(Listener::Na, "GET", "/v2/profiles").body(Full::default()).unwrap();
    let mut real = real;
    real.headers_mut().insert("host", "advertising-api.amazon.com".parse().unwrap());
    assert_eq!(setup.send(Listener::Na, real).await.status, 200);
}

#[tokio::test]
async fn profiles_belong_to_the_region_and_two_cookies_are_set() {
    let setup = Setup::new().await;
    for (listener, countries) in
        [(Listener::Na, ["US", "CA"]), (Listener::Eu, ["UK", "DE"]), (Listener::Fe, ["JP", "AU"])]
    {
        let request = setup.api(listener, "GET", "/v2/profiles").body(Full::default()).unwrap();
        let response = setup.send(listener, request).await;
        let profiles = response.json();
        let seen: Vec<&str> = profiles.as_array().unwrap().iter().map(|p| p["countryCode"].as_str().unwrap()).collect();
        assert_eq!(seen, countries);
        assert!(profiles[0]["profileId"].as_u64().unwrap() > 1 << 53);
        assert_eq!(response.headers.get_all("set-cookie").iter().count(), 2);
        assert_eq!(setup.sandbox.last().unwrap().listener, listener);
    }
}

#[tokio::test]
async fn campaigns_require_their_media_type_and_write_in_batches() {
    let setup = Setup::new().await;
    let scope = setup.profile(0, Listener::Na);
    let call = |method: &str, path: &str, accept: &str, content_type: &str, body: Value| {
        let request = setup.api(Listener::Na, method, path).header("amazon-advertising-api-scope", &scope);
        let request = request.header("accept", accept).header("content-type", content_type);
        setup.send(Listener::Na, request.body(Full::from(body.to_string())).unwrap())
    };
    let list = "/sp/campaigns/list";
    assert_eq!(call("POST", list, "*/*", SP_CAMPAIGN, json!({})).await.status, 406);
    assert_eq!(call("POST", list, SP_CAMPAIGN, "application/json", json!({})).await.status, 415);
    let filter = json!({ "stateFilter": { "include": ["ENABLED"] }, "maxResults": 1 });
    let first = call("POST", list, SP_CAMPAIGN, SP_CAMPAIGN, filter.clone()).await;
    assert_eq!(first.headers["content-type"], SP_CAMPAIGN);
    assert_eq!(
        (first.json()["totalResults"].clone(), first.json()["campaigns"].as_array().unwrap().len()),
        (json!(2), 1)
    );
    let mut next = filter;
    next["nextToken"] = first.json()["nextToken"].clone();
    let second = call("POST", list, SP_CAMPAIGN, SP_CAMPAIGN, next).await.json();
    assert_ne!(second["campaigns"][0], first.json()["campaigns"][0]);
    assert_eq!(second["nextToken"], Value::Null);

    let new = json!({ "name": "New", "state": "PAUSED", "targetingType": "AUTO", "startDate": "2026-08-02",
                      "budget": { "budget": 10.0, "budgetType": "DAILY" } });
    let body = json!({ "campaigns": [new, { "name": "incomplete" }] });
    let written = call("POST", "/sp/campaigns", SP_CAMPAIGN, SP_CAMPAIGN, body).await;
    assert_eq!(written.status, 207);
    assert_eq!(written.json()["campaigns"]["error"][0]["index"], 1);
    let id = written.json()["campaigns"]["success"][0]["campaignId"].clone();
    let body = json!({ "campaigns": [{ "campaignId": id, "state": "ENABLED" }, { "campaignId": "1" }] });
    let changed = call("PUT", "/sp/campaigns", SP_CAMPAIGN, SP_CAMPAIGN, body).await.json();
    assert_eq!(changed["campaigns"]["success"][0]["campaignId"], id);
    assert_eq!(changed["campaigns"]["error"][0]["errors"][0]["errorType"], "entityNotFoundError");
}

#[tokio::test]
async fn a_duplicate_report_request_is_rejected_and_an_old_download_redirects() {
    let setup = Setup::new().await;
    let scope = setup.profile(0, Listener::Na);
    let order = || {
        let request =
            setup.api(Listener::Na, "POST", "/reporting/reports").header("amazon-advertising-api-scope", &scope);
        let request = request.header("content-type", "application/vnd.createasyncreportrequest.v3+json");
        let body = json!({ "name": "r", "startDate": "2026-07-01", "endDate": "2026-07-02", "configuration": {} });
        setup.send(Listener::Na, request.body(Full::from(body.to_string())).unwrap())
    };
    let first = order().await;
    assert_eq!(first.status, 200, "{}", first.text());
    assert_eq!(order().await.status, 425);
    let id = first.json()["reportId"].as_str().unwrap().to_owned();
    let look =
        |path: String| setup.get(setup.api(Listener::Na, "GET", &path).header("amazon-advertising-api-scope", &scope));
    assert_eq!(look(format!("/reporting/reports/{id}")).await.json()["status"], "PENDING");
    assert_eq!(look(format!("/reporting/reports/{id}")).await.json()["status"], "COMPLETED");
    let download = look("/v2/reports/amzn1.clicksAPI.v1.p1/download".into()).await;
    assert_eq!((download.status.as_u16(), download.body.len()), (307, 0));
    assert!(download.headers["location"].to_str().unwrap().contains("X-Amz-Signature="));
}

#[tokio::test]
async fn a_fault_rule_counts_down_and_applies_only_to_matching_calls() {
    let setup = Setup::new().await;
    let rule = setup.sandbox.set_fault(Rule::from(Fault::too_many(None)).at(Listener::Na).on("/v2/").next(2));
    setup.sandbox.set_fault(Fault::InvalidGrant);
    let profiles = || setup.get(setup.api(Listener::Na, "GET", "/v2/profiles"));
    let struck = profiles().await;
    assert!(struck.status == 429 && !struck.headers.contains_key("retry-after"));
    assert_eq!(setup.get(setup.api(Listener::Na, "GET", "/amc/accounts")).await.status, 200);
    let eu = setup.api(Listener::Eu, "GET", "/v2/profiles").body(Full::default()).unwrap();
    assert_eq!(setup.send(Listener::Eu, eu).await.status, 200);
    assert_eq!(profiles().await.status, 429);
    assert_eq!(profiles().await.status, 200);
    assert_eq!(rule.hits(), 2);

    let grant = setup.grant();
    assert_refused(&setup.refresh(&grant.refresh_token).await, 400, "invalid_grant", BAD_GRANT);
    assert_eq!(setup.refresh(&grant.refresh_token).await.status, 200);
    assert_eq!(setup.sandbox.last().unwrap().fault, None);

    setup.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).percent(50));
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(profiles().await.status.as_u16());
    }
    assert_eq!(statuses, [200, 401, 200, 401]);
}

#[tokio::test]
async fn faults_change_token_responses() {
    let setup = Setup::new().await;
    let grant = setup.grant();
    let bent = |fault: Fault| {
        setup.sandbox.set_fault(fault);
        setup.refresh(&grant.refresh_token)
    };
    assert_eq!(bent(Fault::ExpiresIn { value: json!("3600") }).await.json()["expires_in"], "3600");
    assert_eq!(bent(Fault::NoRefreshToken).await.json().get("refresh_token"), None);
    assert_eq!(bent(Fault::Html).await.headers["content-type"], "text/html;charset=UTF-8");
    assert!(serde_json::from_slice::<Value>(&bent(Fault::BadJson).await.body).is_err());
    let short = bent(Fault::ShortLife { seconds: 60 }).await.json();
    assert_eq!(short["expires_in"], 60);
    let token = short["access_token"].as_str().unwrap();
    let lives = || setup.sandbox.world(|world| world.access(token, setup.clock.now()).is_some());
    assert!(lives());
    setup.clock.advance(SignedDuration::from_secs(60));
    assert!(!lives());
    let rotated = bent(Fault::RotateRefreshToken).await.json();
    let new = rotated["refresh_token"].as_str().unwrap();
    assert_ne!(new, grant.refresh_token);
    assert_refused(&setup.refresh(&grant.refresh_token).await, 400, "invalid_grant", BAD_GRANT);
    assert_eq!(setup.refresh(new).await.status, 200);
}

#[tokio::test]
async fn a_reset_and_a_truncated_body_are_client_errors() {
    let setup = Setup::new().await;
    let profiles = || {
        let request = setup.api(Listener::Na, "GET", "/v2/profiles").body(Full::default()).unwrap();
        setup.try_send(Listener::Na, request)
    };
    setup.sandbox.set_fault(Fault::Reset);
    let error = profiles().await.unwrap_err();
    let reset = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
    assert_eq!(reset.map(io::Error::kind), Some(io::ErrorKind::ConnectionReset), "{error:?}");
    assert_eq!(setup.sandbox.last().unwrap().status, None);

    setup.sandbox.set_fault(Fault::CloseMidBody);
    let stream = setup.tls(Listener::Na, b"http/1.1").await;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = setup.api(Listener::Na, "GET", "/v2/profiles").body(Full::<Bytes>::default()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let announced: usize = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
    let mut body = response.into_body();
    let half = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(half.len(), announced.div_ceil(2));
    assert!(body.frame().await.unwrap().is_err());
    assert_eq!(profiles().await.unwrap().status, 200);
}

#[tokio::test]
async fn a_hanging_call_is_recorded_and_gets_no_response() {
    let setup = Arc::new(Setup::new().await);
    let hang = setup.sandbox.set_fault(Fault::Hang);
    let call = tokio::spawn({
        let setup = setup.clone();
        async move { setup.get(setup.api(Listener::Na, "GET", "/v2/profiles")).await }
    });
    hang.reached(1).await;
    let seen = setup.sandbox.last().unwrap();
    assert_eq!((seen.target.as_str(), seen.status, seen.complete), ("/v2/profiles", None, true));
    assert!(!call.is_finished());
    call.abort();
}

#[tokio::test]
async fn a_gate_holds_calls_until_it_is_released() {
    let setup = Arc::new(Setup::new().await);
    let gate = setup.sandbox.set_fault(Rule::from(Fault::Gate).at(Listener::Lwa).always());
    let grant = setup.grant();
    let calls: Vec<_> = (0..2)
        .map(|_| {
            let (setup, token) = (setup.clone(), grant.refresh_token.clone());
            tokio::spawn(async move { setup.refresh(&token).await })
        })
        .collect();
    gate.reached(2).await;
    assert_eq!(setup.sandbox.refreshes(), 2);
    assert!(setup.sandbox.history().iter().all(|call| call.status.is_none()));
    gate.release();
    for call in calls {
        assert_eq!(call.await.unwrap().status, 200);
    }
    assert_eq!(setup.refresh(&grant.refresh_token).await.status, 200);
}

#[tokio::test]
async fn history_records_targets_headers_and_bodies_unchanged() {
    let setup = Setup::new().await;
    let target = "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c";
    let request = setup.bare(Listener::Eu, "POST", target).header("X-Twice", "1").header("X-Twice", "2");
    let response = setup.send(Listener::Eu, request.body(Full::from("body")).unwrap()).await;
    assert_eq!(response.status, 403);
    let call = setup.sandbox.last().unwrap();
    assert_eq!((call.listener, call.method.as_str(), call.target.as_str()), (Listener::Eu, "POST", target));
    assert_eq!((call.path(), call.status), ("//x%2Fy", Some(403)));
    assert_eq!(call.header_all("x-twice").collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!((call.text().as_str(), call.body_len, call.complete), ("body", 4, true));
    assert_eq!(call.body_sha256, "230d8358dc8e8890b4c58deeb62912ee2f20357ae92a5cc861b98e68fe31acb5");
    setup.sandbox.clear_history();
    assert!(setup.sandbox.last().is_none());
}

#[tokio::test]
async fn echo_and_bytes_support_any_size() {
    let setup = Setup::new().await;
    let upload = pseudo_random_bytes(3 * 1024 * 1024 + 7);
    let digest = history::hex(&Sha256::digest(&upload));
    let target = "/sandbox//echo?a=%2B+c";
    let request = setup.api(Listener::Na, "PUT", target).body(Full::from(upload.clone())).unwrap();
    let echoed = setup.send(Listener::Na, request).await.json();
    assert_eq!(echoed["target"], target);
    assert_eq!((&echoed["body_len"], &echoed["body_sha256"]), (&json!(upload.len()), &json!(digest)));

    let path = format!("/sandbox/bytes/{}", upload.len());
    let sized = setup.get(setup.api(Listener::Na, "GET", &path)).await;
    assert_eq!(sized.headers["content-length"], upload.len().to_string().as_str());
    let chunked = setup.get(setup.api(Listener::Na, "GET", &format!("{path}?chunked=1"))).await;
    assert_eq!(chunked.headers["transfer-encoding"], "chunked");
    assert!(sized.body == upload && chunked.body == upload);
    let packed = setup.get(setup.api(Listener::Na, "GET", "/sandbox/gzip")).await;
    assert!(packed.body.starts_with(&[0x1f, 0x8b]) && !packed.headers.contains_key("content-encoding"));
}

#[tokio::test]
async fn events_are_sent_one_by_one_as_they_are_released() {
    let setup = Setup::new().await;
    let stream = setup.tls(Listener::Na, b"http/1.1").await;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request =
        setup.api(Listener::Na, "GET", "/sandbox/events?count=2&step=1").body(Full::<Bytes>::default()).unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    for number in 1..=2 {
        setup.sandbox.release_events(1);
        let event = response.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(event.starts_with(format!("id: {number}\n").as_bytes()), "{event:?}");
    }
    assert!(response.frame().await.is_none());
}

#[tokio::test]
async fn http2_is_offered_when_enabled() {
    let options = Options { http2: true, ..Options::calm(Clock::system()) };
    let setup = Setup { clock: options.clock.clone(), sandbox: Sandbox::start(options).await.unwrap() };
    let stream = setup.tls(Listener::Na, b"h2").await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let token = setup.grant().access_token;
    let request = Request::get(format!("{}/v2/profiles?x=%2B", setup.sandbox.origin(Listener::Na)))
        .header("authorization", format!("Bearer {token}"))
        .header("amazon-advertising-api-clientid", CLIENT_ID);
    let response = sender.send_request(request.body(Full::<Bytes>::default()).unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(setup.sandbox.last().unwrap().target, "/v2/profiles?x=%2B");
}

#[tokio::test]
async fn the_control_port_refuses_foreign_hosts_and_origins() {
    let setup = Setup::new().await;
    for headers in [
        &[("host", "evil.example")][..],
        &[("host", "127.0.0.1.evil.example:80")],
        &[("host", "localhost"), ("host", "localhost")],
        &[("host", "localhost"), ("origin", "http://localhost:3000")],
    ] {
        assert_eq!(setup.control(Method::DELETE, "/history", "", headers).await.status, 403, "{headers:?}");
    }
    for host in ["LOCALHOST", "127.0.0.1:9", "[::1]:9"] {
        assert_eq!(setup.control(Method::GET, "/", "", &[("host", host)]).await.status, 200, "{host}");
    }
}

#[tokio::test]
async fn the_control_port_changes_the_world() {
    let setup = &Setup::new().await;
    let post = |path: &'static str, body: &'static str| setup.control(Method::POST, path, body, &[]);
    assert_eq!(post("/clock", r#"{"advance":"soon"}"#).await.status, 400);
    for wrong in [r#"{"trouble":"mischief"}"#, r#"{"status":503}"#, r#"[{"trouble":{"status":503}}]"#, "503", ""] {
        let send = |body: String| async move { setup.control(Method::POST, "/trouble", &body, &[]).await };
        let refused = send(wrong.to_owned()).await;
        assert_eq!(refused.status, 400, "{wrong}");
        let body = refused.json();
        assert!(body["error"].as_str().unwrap().len() > 10, "{body}");
        // What is expected is accepted.
        assert_eq!(send(body["expected"].to_string()).await.status, 201);
        assert_eq!(send(format!("[{}]", body["expected"])).await.status, 201);
    }
    setup.sandbox.clear_faults();
    assert_eq!(post("/consent", r#"{"advertiser":"nobody"}"#).await.status, 400);

    let grant = post("/consent", r#"{"want":"grant"}"#).await.json();
    let code = post("/consent", "").await.json()["code"].as_str().unwrap().to_owned();
    assert_eq!(setup.exchange(&code, None).await.status, 200);
    assert_eq!(post("/clock", r#"{"advance":"1h"}"#).await.json()["now"], "2026-08-01T13:00:00Z");
    let token = grant["access_token"].as_str().unwrap();
    assert!(setup.sandbox.world(|world| world.access(token, setup.clock.now()).is_none()));

    let rule = r#"{"trouble":{"status":{"code":503}},"door":"na","when":{"next":1}}"#;
    assert_eq!(post("/trouble", rule).await.status, 201);
    assert_eq!(setup.get(setup.api(Listener::Na, "GET", "/v2/profiles")).await.status, 503);
    let history = setup.control(Method::GET, "/history?door=na", "", &[]).await.json();
    assert_eq!(history["calls"][0]["target"], "/v2/profiles");
    assert_eq!((&history["calls"][0]["status"], &history["calls"][0]["trouble"]), (&json!(503), &json!("status")));
    assert_eq!(history["lwa"]["exchanges"], 1);

    assert!(post("/revoke", "").await.json()["revoked"].as_u64().unwrap() >= 2);
    let refused = setup.refresh(grant["refresh_token"].as_str().unwrap()).await;
    assert_refused(&refused, 400, "invalid_grant", BAD_GRANT);
    assert_eq!(setup.control(Method::DELETE, "/history", "", &[]).await.status, 204);
    assert!(setup.sandbox.history().is_empty());
    assert_eq!(setup.control(Method::GET, "/ca.pem", "", &[]).await.text(), setup.sandbox.ca_pem());
}

#[tokio::test]
async fn head_returns_what_get_returns_without_the_body() {
    let setup = Setup::new().await;
    let head = setup.get(setup.api(Listener::Na, "HEAD", "/v2/profiles")).await;
    let get = setup.get(setup.api(Listener::Na, "GET", "/v2/profiles")).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    assert_eq!(head.headers["content-length"], get.body.len().to_string().as_str());
}

#[tokio::test]
async fn amc_shows_the_users_own_account_and_runs_workflows() {
    let setup = Setup::new().await;
    let accounts = setup.get(setup.api(Listener::Na, "GET", "/amc/accounts")).await.json();
    assert_eq!(accounts["amcAccounts"].as_array().unwrap().len(), 1);
    let account = accounts["amcAccounts"][0].clone();
    let call = |method: &str, path: &str, body: &'static str| {
        let request = setup.api(Listener::Na, method, path);
        let request = request.header("amazon-advertising-api-advertiserid", account["accountId"].as_str().unwrap());
        let request =
            request.header("amazon-advertising-api-marketplaceid", account["marketplaceId"].as_str().unwrap());
        setup.send(Listener::Na, request.body(Full::from(body)).unwrap())
    };
    let instances = call("GET", "/amc/instances", "").await.json();
    let base = format!("/amc/reporting/{}", instances["instances"][0]["instanceId"].as_str().unwrap());
    let workflow = r#"{"workflowId":"reach","sqlQuery":"SELECT 1"}"#;
    assert_eq!(call("POST", &format!("{base}/workflows"), workflow).await.status, 200);
    assert_eq!(call("POST", &format!("{base}/workflows"), workflow).await.status, 409);
    let listed = call("GET", &format!("{base}/workflows"), "").await.json();
    assert_eq!(listed["workflows"][0]["workflowId"], "reach");
    let started = call("POST", &format!("{base}/workflowExecutions"), r#"{"workflowId":"reach"}"#).await.json();
    let execution = format!("{base}/workflowExecutions/{}", started["workflowExecutionId"].as_str().unwrap());
    let early = call("GET", &format!("{execution}/downloadUrls"), "").await;
    assert!(early.status == 400 && early.text().contains("is unavailable for download."), "{}", early.text());
    assert_eq!(call("GET", &execution, "").await.json()["status"], "SUCCEEDED");
    let urls = call("GET", &format!("{execution}/downloadUrls"), "").await.json();
    assert!(urls["downloadUrls"][0].as_str().unwrap().starts_with("https://"));
}

#[tokio::test]
async fn stopping_the_sandbox_closes_its_connections() {
    let setup = Setup::new().await;
    let mut stream = setup.tls(Listener::Na, b"http/1.1").await;
    setup.sandbox.stop().await;
    let mut byte = [0];
    let read = tokio::io::AsyncReadExt::read(&mut stream, &mut byte).await;
    assert!(!matches!(read, Ok(1..)), "{read:?}");
}

#[tokio::test]
async fn the_grants_outlive_a_restart_if_a_file_keeps_them() {
    let file = std::env::temp_dir().join(format!("adsidecar-grants-{}.json", super::world::random_text(9)));
    let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let start = || Sandbox::start(Options { grants_file: Some(file.clone()), ..Options::calm(clock.clone()) });
    let first = Setup { sandbox: start().await.unwrap(), clock: clock.clone() };
    let (kept, revoked) = (first.grant(), first.grant());
    first.sandbox.world(|world| world.revoke(&revoked.refresh_token));
    // Any call of a client writes the file.
    let refreshed = first.refresh(&kept.refresh_token).await;
    assert_eq!(refreshed.status, 200, "{refreshed:?}");
    let access_token = refreshed.json()["access_token"].as_str().unwrap().to_owned();
    first.sandbox.stop().await;
    let second = Setup { sandbox: start().await.unwrap(), clock: clock.clone() };
    assert_eq!(second.refresh(&kept.refresh_token).await.status, 200);
    assert_eq!(second.refresh(&revoked.refresh_token).await.status, 400);
    let now = second.clock.now();
    assert!(second.sandbox.world(|world| world.access(&access_token, now).is_some()), "living tokens too");

    let later = second.grant();
    second.sandbox.world(|world| world.revoke(&kept.refresh_token));
    assert_eq!(second.refresh(&later.refresh_token).await.status, 200);
    second.sandbox.stop().await;
    let cut_off =
        std::fs::OpenOptions::new().append(true).open(&file).map(|mut file| file.write_all(b"{\"revoked\":\"Atzr"));
    cut_off.unwrap().unwrap();
    let third = Setup { sandbox: start().await.unwrap(), clock: clock.clone() };
    assert_eq!(third.refresh(&later.refresh_token).await.status, 200, "the changes since the second start");
    assert_eq!(third.refresh(&kept.refresh_token).await.status, 400, "revoked since");
    third.sandbox.stop().await;

    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text.lines().count(), 2, "what was kept, and the one token that was issued since");
    std::fs::write(&file, format!("{text}{{}}\n{text}")).unwrap();
    start().await.map(|_| ()).unwrap_err();
    std::fs::write(&file, "{").unwrap();
    let damaged = start().await.map(|_| ()).unwrap_err().to_string();
    assert!(damaged.contains(".json: ") && damaged.contains("remove the file"), "{damaged}");
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test]
async fn a_plain_http_client_may_say_that_it_keeps_the_connection() {
    let setup = Setup::new().await;
    for word in ["keep-alive", "Keep-Alive", "close"] {
        let call = setup.api(Listener::Na, "GET", "/v2/profiles").header("connection", word);
        assert_eq!(setup.get(call).await.status, 200, "{word}");
    }
}
