//! The sandbox keeps Amazon's promises, and its own to the tests that stand on it. All over real TLS.

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

/// A sandbox and a clock that stands still.
struct Stage {
    sandbox: Sandbox,
    clock: Clock,
}

/// An answer, read to its end.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the answer is JSON")
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Stage {
    async fn set() -> Self {
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

    fn profile(&self, advertiser: usize, region: Door) -> String {
        self.sandbox.world(|world| {
            let id = world.catalogue.advertisers[advertiser].id.clone();
            world.catalogue.profiles_of(&id, region).next().unwrap().id.to_string()
        })
    }

    /// Sends a request on a connection of its own.
    async fn try_send(&self, door: Door, request: Request<Full<Bytes>>) -> Result<Answer, hyper::Error> {
        let stream = self.tls(door, b"http/1.1").await;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        drop(sender);
        let _ = connection.await;
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    async fn tls(&self, door: Door, protocol: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.sandbox.ca_pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        let stream = TcpStream::connect(self.address(door)).await.unwrap();
        let name = ServerName::try_from("advertising-api.amazon.com").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    fn address(&self, door: Door) -> String {
        self.sandbox.origin(door).replace("https://", "")
    }

    async fn send(&self, door: Door, request: Request<Full<Bytes>>) -> Answer {
        self.try_send(door, request).await.unwrap()
    }

    /// A request with nothing but a Host.
    fn bare(&self, door: Door, method: &str, target: &str) -> http::request::Builder {
        Request::builder().method(method).uri(target).header("host", self.address(door))
    }

    /// A request with a good token and the client id under the older name.
    fn api(&self, door: Door, method: &str, target: &str) -> http::request::Builder {
        let token = self.grant().access_token;
        self.bare(door, method, target)
            .header("authorization", format!("Bearer {token}"))
            .header("amazon-advertising-api-clientid", CLIENT_ID)
    }

    async fn get(&self, request: http::request::Builder) -> Answer {
        self.send(Door::Na, request.body(Full::default()).unwrap()).await
    }

    async fn token(&self, form: &str) -> Answer {
        let request = self.bare(Door::Lwa, "POST", "/auth/o2/token");
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        self.send(Door::Lwa, request.body(Full::from(form.to_owned())).unwrap()).await
    }

    async fn refresh(&self, refresh_token: &str) -> Answer {
        let token = refresh_token.replace('|', "%7C");
        self.token(&format!("grant_type=refresh_token&refresh_token={token}&{}", credentials())).await
    }

    async fn exchange(&self, code: &str, verifier: Option<&str>) -> Answer {
        let verifier = verifier.map(|one| format!("&code_verifier={one}")).unwrap_or_default();
        let form = format!("grant_type=authorization_code&code={code}&redirect_uri={RETURN_URL}&{}", credentials());
        self.token(&(form + &verifier)).await
    }

    /// A call to the control port over plain HTTP.
    async fn control(&self, method: Method, path: &str, body: &str, headers: &[(&str, &str)]) -> Answer {
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
        Answer { status: head.status, headers: head.headers, body }
    }
}

fn credentials() -> String {
    format!("client_id={CLIENT_ID}&client_secret={CLIENT_SECRET}")
}

fn s256(verifier: &str) -> Challenge {
    Challenge::S256(URL_SAFE_NO_PAD.encode(Sha256::digest(verifier)))
}

fn assert_refused(answer: &Answer, status: u16, error: &str, text: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    let body = answer.json();
    assert_eq!(body["error"], error);
    assert_eq!(body["error_description"], text);
    assert!(body["error_index"].is_string() && body["request_id"].is_string());
}

const BAD_CODE: &str = "The request has an invalid grant parameter : code";
const BAD_GRANT: &str = "The request has an invalid grant parameter : refresh_token. \
                         User may have revoked or didn't grant the permission.";

#[tokio::test]
async fn an_address_beyond_loopback_is_refused() {
    let everywhere: SocketAddr = "0.0.0.0:0".parse().unwrap();
    let mut options = Options::calm(Clock::system());
    options.listen.control = everywhere;
    let error = Sandbox::start(options).await.err().unwrap();
    assert_eq!(error.to_string(), "the sandbox listens on loopback only, not on 0.0.0.0:0: use 127.0.0.1 or [::1]");
}

#[tokio::test]
async fn a_code_works_once_and_for_five_minutes() {
    let stage = Stage::set().await;
    let late = stage.code(None);
    stage.clock.advance(SignedDuration::from_mins(5));
    assert_refused(&stage.exchange(&late, None).await, 400, "invalid_grant", BAD_CODE);

    let code = stage.code(None);
    stage.clock.advance(SignedDuration::from_secs(299));
    let first = stage.exchange(&code, None).await;
    assert_eq!(first.status, 200);
    assert_eq!(first.headers["content-type"], "application/json;charset=UTF-8");
    assert_eq!(first.headers["cache-control"], "no-cache, no-store, must-revalidate");
    let tokens = first.json();
    assert!(tokens["access_token"].as_str().unwrap().starts_with("Atza|"));
    assert!(tokens["access_token"].as_str().unwrap().len() >= 350);
    assert!(tokens["refresh_token"].as_str().unwrap().starts_with("Atzr|"));
    assert_eq!((&tokens["token_type"], &tokens["expires_in"]), (&json!("bearer"), &json!(3600)));
    assert_refused(&stage.exchange(&code, None).await, 400, "invalid_grant", BAD_CODE);
    assert_eq!(stage.sandbox.lwa_calls(), LwaCalls { exchanges: 3, refreshes: 0, others: 0 });
}

#[tokio::test]
async fn a_wrong_verifier_a_missing_one_and_an_unasked_one_are_refused() {
    let stage = Stage::set().await;
    let wrong = stage.exchange(&stage.code(Some(s256(VERIFIER))), Some("wrong")).await;
    assert_refused(&wrong, 400, "invalid_grant", BAD_CODE);
    let missing = stage.exchange(&stage.code(Some(s256(VERIFIER))), None).await;
    assert_refused(&missing, 400, "invalid_request", "The request is missing a required parameter : code_verifier");
    let unasked = stage.exchange(&stage.code(None), Some(VERIFIER)).await;
    assert_refused(&unasked, 400, "invalid_grant", BAD_CODE);

    assert_eq!(stage.exchange(&stage.code(Some(s256(VERIFIER))), Some(VERIFIER)).await.status, 200);
    let plain = Challenge::Plain(VERIFIER.into());
    assert_eq!(stage.exchange(&stage.code(Some(plain)), Some(VERIFIER)).await.status, 200);
}

#[tokio::test]
async fn a_refresh_is_refused_for_a_revoked_grant_a_foreign_client_a_wrong_secret_and_after_a_year() {
    let stage = Stage::set().await;
    let revoked = stage.grant();
    assert!(stage.sandbox.world(|world| world.revoke(&revoked.refresh_token)));
    assert_refused(&stage.refresh(&revoked.refresh_token).await, 400, "invalid_grant", BAD_GRANT);

    let grant = stage.grant();
    stage.sandbox.world(|world| {
        let client = Client { id: "other".into(), secrets: vec!["s".into()], ..world.clients[0].clone() };
        world.clients.push(client);
    });
    let token = grant.refresh_token.replace('|', "%7C");
    let form = format!("grant_type=refresh_token&refresh_token={token}");
    let foreign = stage.token(&format!("{form}&client_id=other&client_secret=s")).await;
    assert_refused(&foreign, 400, "unauthorized_client", "Not authorized for requested operation");
    let wrong = stage.token(&format!("{form}&client_id={CLIENT_ID}&client_secret=wrong")).await;
    assert_refused(&wrong, 401, "invalid_client", "Client authentication failed");
    let text = "The authorization grant type is not supported by the authorization server";
    let odd = stage.token(&format!("grant_type=password&{}", credentials())).await;
    assert_refused(&odd, 400, "unsupported_grant_type", text);

    stage.clock.advance(SignedDuration::from_hours(365 * 24 - 1));
    let again = stage.refresh(&grant.refresh_token).await;
    assert_eq!((again.status, &again.json()["refresh_token"]), (StatusCode::OK, &json!(grant.refresh_token)));
    stage.clock.advance(SignedDuration::from_hours(1));
    assert_refused(&stage.refresh(&grant.refresh_token).await, 400, "invalid_grant", BAD_GRANT);
}

#[tokio::test]
async fn the_token_endpoint_takes_json_a_query_and_basic_credentials_too() {
    let stage = Stage::set().await;
    let token = stage.grant().refresh_token;
    let body = json!({ "grant_type": "refresh_token", "refresh_token": token, "client_id": CLIENT_ID,
                       "client_secret": CLIENT_SECRET });
    let request = stage.bare(Door::Lwa, "POST", "/auth/o2/token").header("content-type", "application/json");
    let by_json = stage.send(Door::Lwa, request.body(Full::from(body.to_string())).unwrap()).await;
    assert_eq!(by_json.status, 200, "{}", by_json.text());

    let form = format!("grant_type=refresh_token&refresh_token={}", token.replace('|', "%7C"));
    let request = stage.bare(Door::Lwa, "POST", &format!("/auth/o2/token?{form}&{}", credentials()));
    let by_query = stage.send(Door::Lwa, request.body(Full::default()).unwrap()).await;
    assert_eq!(by_query.status, 200, "{}", by_query.text());

    let basic = format!("Basic {}", STANDARD.encode(format!("{CLIENT_ID}:{CLIENT_SECRET}")));
    let request = stage.bare(Door::Lwa, "POST", "/auth/o2/token").header("authorization", basic);
    let by_basic = stage.send(Door::Lwa, request.body(Full::from(form)).unwrap()).await;
    assert_eq!(by_basic.status, 200, "{}", by_basic.text());
    assert_eq!(stage.sandbox.refreshes(), 3);

    let target = format!("/auth/o2/tokeninfo?access_token={}", by_basic.json()["access_token"].as_str().unwrap());
    stage.clock.advance(SignedDuration::from_mins(1));
    let target = target.replace('|', "%7C");
    let info = stage.send(Door::Lwa, stage.bare(Door::Lwa, "GET", &target).body(Full::default()).unwrap()).await;
    assert_eq!((&info.json()["aud"], &info.json()["exp"]), (&json!(CLIENT_ID), &json!(3540)));
}

#[tokio::test]
async fn consent_is_refused_on_the_page_or_at_the_callback_as_amazon_does() {
    let stage = Stage::set().await;
    let ask = |query: String| {
        let request = stage.bare(Door::Lwa, "GET", &format!("/ap/oa?{query}"));
        stage.send(Door::Lwa, request.body(Full::default()).unwrap())
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
    // Without a method the challenge is the verifier itself.
    assert_eq!(stage.exchange(code, Some(VERIFIER)).await.status, 200);
}

#[tokio::test]
async fn the_consent_page_says_that_it_is_not_amazon() {
    let options = Options { auto_consent: false, ..Options::calm(Clock::system()) };
    let stage = Stage { clock: options.clock.clone(), sandbox: Sandbox::start(options).await.unwrap() };
    let query = format!("/ap/oa?client_id={CLIENT_ID}&scope={SCOPE}&response_type=code&redirect_uri={RETURN_URL}");
    let page = stage.control(Method::GET, &query, "", &[]).await;
    assert_eq!(page.status, 200);
    assert!(page.text().contains("This is the adsidecar sandbox, not Amazon"));
    let at_once = stage.control(Method::GET, &format!("{query}&auto=1"), "", &[]).await;
    assert_eq!(at_once.status, 302);
}

#[tokio::test]
async fn a_token_is_refused_when_expired_unknown_malformed_doubled_or_absent() {
    let stage = Stage::set().await;
    let old = stage.api(Door::Na, "GET", "/v2/profiles");
    stage.clock.advance(SignedDuration::from_hours(1));
    let expired = stage.get(old).await;
    assert_eq!((expired.status, expired.text()), (StatusCode::UNAUTHORIZED, r#"{"message":"Unauthorized"}"#.into()));

    let with = |value: &str| {
        let request = stage.bare(Door::Na, "GET", "/v2/profiles").header("authorization", value);
        stage.get(request.header("amazon-advertising-api-clientid", CLIENT_ID))
    };
    assert_eq!(with("Bearer Atza|unknown").await.status, 401);
    let raw = with(&stage.grant().access_token).await;
    assert!(raw.status == 403 && raw.text().contains("missing equal-sign"), "{}", raw.text());
    let twice = stage.api(Door::Na, "GET", "/v2/profiles").header("authorization", "Bearer Atza|second");
    assert_eq!(stage.get(twice).await.status, 400);
    assert_eq!(stage.get(stage.bare(Door::Na, "GET", "/v2/profiles")).await.status, 401);
}

#[tokio::test]
async fn each_family_is_refused_without_its_headers() {
    let stage = Stage::set().await;
    let scope = stage.profile(0, Door::Na);
    let foreign = stage.profile(1, Door::Na);
    let elsewhere = stage.profile(0, Door::Eu);
    let v1 = |target: &str| {
        stage.bare(Door::Na, "GET", target).header("authorization", format!("Bearer {}", stage.grant().access_token))
    };
    let api = |target: &str| stage.api(Door::Na, "GET", target);
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
        (api("/amc/instances"), 400, "amazon-advertising-api-advertiserid is missing"),
        (amc("/amc/reporting/amcsandboxbooks/workflows"), 403, "unauthorized response"),
        (amc("/amc/advertiserData/amcsandboxtools/dataSets"), 400, "amazon-ads-accountid is missing"),
        (
            amc("/amc/audiences/query")
                .header("amazon-marketing-cloud-audience-instanceid", "i")
                .header("amazon-advertising-api-entityid", "E"),
            400,
            "must not be sent",
        ),
        (api("/dsp/streams/subscriptions").header(SCOPED, &scope), 400, "amazon-ads-account-id is missing"),
        (
            api("/avc/x").header("amazon-advertising-api-marketplaceid", "M"),
            400,
            "amazon-advertising-advertiser-id is missing",
        ),
        (api("/mmm/v1/reports"), 400, "amazon-advertising-api-manager-account is missing"),
        (api("/adm/x"), 400, "amazon-ads-manager-account-id is missing"),
        (api("/nowhere"), 403, "missing equal-sign"),
    ];
    for (request, status, text) in cases {
        let target = format!("{:?}", request.uri_ref());
        let answer = stage.get(request).await;
        assert_eq!(answer.status, status, "{target}: {}", answer.text());
        assert!(answer.text().contains(text), "{target}: {}", answer.text());
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
        let answer = stage.get(request).await;
        assert_eq!(answer.status, 200, "{target}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_header_that_leaked_is_refused_by_name() {
    let stage = Stage::set().await;
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
        let mut request = stage.api(Door::Na, "GET", "/v2/profiles").body(Full::default()).unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
        let answer = stage.send(Door::Na, request).await;
        assert_eq!(answer.status, 400, "{name}: {}", answer.text());
        assert!(answer.text().contains(&format!("Header {name} ")), "{name}: {}", answer.text());
    }
    let real = stage.api(Door::Na, "GET", "/v2/profiles").body(Full::default()).unwrap();
    let mut real = real;
    real.headers_mut().insert("host", "advertising-api.amazon.com".parse().unwrap());
    assert_eq!(stage.send(Door::Na, real).await.status, 200);
}

#[tokio::test]
async fn profiles_are_those_of_the_region_and_cookies_are_set_twice() {
    let stage = Stage::set().await;
    for (door, countries) in [(Door::Na, ["US", "CA"]), (Door::Eu, ["UK", "DE"]), (Door::Fe, ["JP", "AU"])] {
        let request = stage.api(door, "GET", "/v2/profiles").body(Full::default()).unwrap();
        let answer = stage.send(door, request).await;
        let profiles = answer.json();
        let seen: Vec<&str> = profiles.as_array().unwrap().iter().map(|p| p["countryCode"].as_str().unwrap()).collect();
        assert_eq!(seen, countries);
        assert!(profiles[0]["profileId"].as_u64().unwrap() > 1 << 53);
        assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
        assert_eq!(stage.sandbox.last().unwrap().door, door);
    }
}

#[tokio::test]
async fn campaigns_ask_for_their_media_type_and_write_in_batches() {
    let stage = Stage::set().await;
    let scope = stage.profile(0, Door::Na);
    let call = |method: &str, path: &str, accept: &str, content_type: &str, body: Value| {
        let request = stage.api(Door::Na, method, path).header("amazon-advertising-api-scope", &scope);
        let request = request.header("accept", accept).header("content-type", content_type);
        stage.send(Door::Na, request.body(Full::from(body.to_string())).unwrap())
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
async fn the_same_report_twice_is_too_early_and_an_old_download_redirects() {
    let stage = Stage::set().await;
    let scope = stage.profile(0, Door::Na);
    let order = || {
        let request = stage.api(Door::Na, "POST", "/reporting/reports").header("amazon-advertising-api-scope", &scope);
        let request = request.header("content-type", "application/vnd.createasyncreportrequest.v3+json");
        let body = json!({ "name": "r", "startDate": "2026-07-01", "endDate": "2026-07-02", "configuration": {} });
        stage.send(Door::Na, request.body(Full::from(body.to_string())).unwrap())
    };
    let first = order().await;
    assert_eq!(first.status, 200, "{}", first.text());
    assert_eq!(order().await.status, 425);
    let id = first.json()["reportId"].as_str().unwrap().to_owned();
    let look =
        |path: String| stage.get(stage.api(Door::Na, "GET", &path).header("amazon-advertising-api-scope", &scope));
    assert_eq!(look(format!("/reporting/reports/{id}")).await.json()["status"], "PENDING");
    assert_eq!(look(format!("/reporting/reports/{id}")).await.json()["status"], "COMPLETED");
    let download = look("/v2/reports/amzn1.clicksAPI.v1.p1/download".into()).await;
    assert_eq!((download.status.as_u16(), download.body.len()), (307, 0));
    assert!(download.headers["location"].to_str().unwrap().contains("X-Amz-Signature="));
}

#[tokio::test]
async fn trouble_counts_down_and_strikes_only_where_it_was_set() {
    let stage = Stage::set().await;
    let rule = stage.sandbox.set_fault(Rule::from(Fault::too_many(None)).at(Door::Na).on("/v2/").next(2));
    stage.sandbox.set_fault(Fault::InvalidGrant);
    let profiles = || stage.get(stage.api(Door::Na, "GET", "/v2/profiles"));
    let struck = profiles().await;
    assert!(struck.status == 429 && !struck.headers.contains_key("retry-after"));
    assert_eq!(stage.get(stage.api(Door::Na, "GET", "/amc/accounts")).await.status, 200);
    let eu = stage.api(Door::Eu, "GET", "/v2/profiles").body(Full::default()).unwrap();
    assert_eq!(stage.send(Door::Eu, eu).await.status, 200);
    assert_eq!(profiles().await.status, 429);
    assert_eq!(profiles().await.status, 200);
    assert_eq!(rule.met(), 2);

    let grant = stage.grant();
    assert_refused(&stage.refresh(&grant.refresh_token).await, 400, "invalid_grant", BAD_GRANT);
    assert_eq!(stage.refresh(&grant.refresh_token).await.status, 200);
    assert_eq!(stage.sandbox.last().unwrap().trouble, None);

    stage.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).percent(50));
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(profiles().await.status.as_u16());
    }
    assert_eq!(statuses, [200, 401, 200, 401]);
}

#[tokio::test]
async fn token_answers_can_be_bent() {
    let stage = Stage::set().await;
    let grant = stage.grant();
    let bent = |trouble: Fault| {
        stage.sandbox.set_fault(trouble);
        stage.refresh(&grant.refresh_token)
    };
    assert_eq!(bent(Fault::ExpiresIn { value: json!("3600") }).await.json()["expires_in"], "3600");
    assert_eq!(bent(Fault::NoRefreshToken).await.json().get("refresh_token"), None);
    assert_eq!(bent(Fault::Html).await.headers["content-type"], "text/html;charset=UTF-8");
    assert!(serde_json::from_slice::<Value>(&bent(Fault::BadJson).await.body).is_err());
    let short = bent(Fault::ShortLife { seconds: 60 }).await.json();
    assert_eq!(short["expires_in"], 60);
    let token = short["access_token"].as_str().unwrap();
    let lives = || stage.sandbox.world(|world| world.access(token, stage.clock.now()).is_some());
    assert!(lives());
    stage.clock.advance(SignedDuration::from_secs(60));
    assert!(!lives());
    let rotated = bent(Fault::RotateRefreshToken).await.json();
    let new = rotated["refresh_token"].as_str().unwrap();
    assert_ne!(new, grant.refresh_token);
    assert_refused(&stage.refresh(&grant.refresh_token).await, 400, "invalid_grant", BAD_GRANT);
    assert_eq!(stage.refresh(new).await.status, 200);
}

#[tokio::test]
async fn a_reset_and_a_broken_body_are_seen_as_errors() {
    let stage = Stage::set().await;
    let profiles = || {
        let request = stage.api(Door::Na, "GET", "/v2/profiles").body(Full::default()).unwrap();
        stage.try_send(Door::Na, request)
    };
    stage.sandbox.set_fault(Fault::Reset);
    let error = profiles().await.unwrap_err();
    let reset = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
    assert_eq!(reset.map(io::Error::kind), Some(io::ErrorKind::ConnectionReset), "{error:?}");
    assert_eq!(stage.sandbox.last().unwrap().status, None);

    stage.sandbox.set_fault(Fault::CloseMidBody);
    let stream = stage.tls(Door::Na, b"http/1.1").await;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = stage.api(Door::Na, "GET", "/v2/profiles").body(Full::<Bytes>::default()).unwrap();
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
async fn a_hanging_call_is_in_the_history_and_never_answered() {
    let stage = Arc::new(Stage::set().await);
    let hang = stage.sandbox.set_fault(Fault::Hang);
    let call = tokio::spawn({
        let stage = stage.clone();
        async move { stage.get(stage.api(Door::Na, "GET", "/v2/profiles")).await }
    });
    hang.reached(1).await;
    let seen = stage.sandbox.last().unwrap();
    assert_eq!((seen.target.as_str(), seen.status, seen.complete), ("/v2/profiles", None, true));
    assert!(!call.is_finished());
    call.abort();
}

#[tokio::test]
async fn a_gate_holds_calls_until_it_is_released() {
    let stage = Arc::new(Stage::set().await);
    let gate = stage.sandbox.set_fault(Rule::from(Fault::Gate).at(Door::Lwa).always());
    let grant = stage.grant();
    let calls: Vec<_> = (0..2)
        .map(|_| {
            let (stage, token) = (stage.clone(), grant.refresh_token.clone());
            tokio::spawn(async move { stage.refresh(&token).await })
        })
        .collect();
    gate.reached(2).await;
    assert_eq!(stage.sandbox.refreshes(), 2);
    assert!(stage.sandbox.history().iter().all(|call| call.status.is_none()));
    gate.release();
    for call in calls {
        assert_eq!(call.await.unwrap().status, 200);
    }
    assert_eq!(stage.refresh(&grant.refresh_token).await.status, 200);
}

#[tokio::test]
async fn history_keeps_targets_headers_and_bodies_as_they_came() {
    let stage = Stage::set().await;
    let target = "//x%2Fy?min=2023-10-01T00:00:00&b=%2B+c";
    let request = stage.bare(Door::Eu, "POST", target).header("X-Twice", "1").header("X-Twice", "2");
    let answer = stage.send(Door::Eu, request.body(Full::from("body")).unwrap()).await;
    assert_eq!(answer.status, 403);
    let call = stage.sandbox.last().unwrap();
    assert_eq!((call.door, call.method.as_str(), call.target.as_str()), (Door::Eu, "POST", target));
    assert_eq!((call.path(), call.status), ("//x%2Fy", Some(403)));
    assert_eq!(call.header_all("x-twice").collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!((call.text().as_str(), call.body_len, call.complete), ("body", 4, true));
    assert_eq!(call.body_sha256, "230d8358dc8e8890b4c58deeb62912ee2f20357ae92a5cc861b98e68fe31acb5");
    stage.sandbox.clear_history();
    assert!(stage.sandbox.last().is_none());
}

#[tokio::test]
async fn echo_and_bytes_take_and_give_any_size() {
    let stage = Stage::set().await;
    let upload = pseudo_random_bytes(3 * 1024 * 1024 + 7);
    let digest = history::hex(&Sha256::digest(&upload));
    let target = "/sandbox//echo?a=%2B+c";
    let request = stage.api(Door::Na, "PUT", target).body(Full::from(upload.clone())).unwrap();
    let echoed = stage.send(Door::Na, request).await.json();
    assert_eq!(echoed["target"], target);
    assert_eq!((&echoed["body_len"], &echoed["body_sha256"]), (&json!(upload.len()), &json!(digest)));

    let path = format!("/sandbox/bytes/{}", upload.len());
    let sized = stage.get(stage.api(Door::Na, "GET", &path)).await;
    assert_eq!(sized.headers["content-length"], upload.len().to_string().as_str());
    let chunked = stage.get(stage.api(Door::Na, "GET", &format!("{path}?chunked=1"))).await;
    assert_eq!(chunked.headers["transfer-encoding"], "chunked");
    assert!(sized.body == upload && chunked.body == upload);
    let packed = stage.get(stage.api(Door::Na, "GET", "/sandbox/gzip")).await;
    assert!(packed.body.starts_with(&[0x1f, 0x8b]) && !packed.headers.contains_key("content-encoding"));
}

#[tokio::test]
async fn events_come_one_by_one_as_they_are_let_go() {
    let stage = Stage::set().await;
    let stream = stage.tls(Door::Na, b"http/1.1").await;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = stage.api(Door::Na, "GET", "/sandbox/events?count=2&step=1").body(Full::<Bytes>::default()).unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    for number in 1..=2 {
        stage.sandbox.let_events(1);
        let event = response.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(event.starts_with(format!("id: {number}\n").as_bytes()), "{event:?}");
    }
    assert!(response.frame().await.is_none());
}

#[tokio::test]
async fn http2_is_spoken_where_it_was_asked_for() {
    let options = Options { http2: true, ..Options::calm(Clock::system()) };
    let stage = Stage { clock: options.clock.clone(), sandbox: Sandbox::start(options).await.unwrap() };
    let stream = stage.tls(Door::Na, b"h2").await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let token = stage.grant().access_token;
    let request = Request::get(format!("{}/v2/profiles?x=%2B", stage.sandbox.origin(Door::Na)))
        .header("authorization", format!("Bearer {token}"))
        .header("amazon-advertising-api-clientid", CLIENT_ID);
    let response = sender.send_request(request.body(Full::<Bytes>::default()).unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(stage.sandbox.last().unwrap().target, "/v2/profiles?x=%2B");
}

#[tokio::test]
async fn the_control_port_refuses_foreign_hosts_and_origins() {
    let stage = Stage::set().await;
    for headers in [
        &[("host", "evil.example")][..],
        &[("host", "127.0.0.1.evil.example:80")],
        &[("host", "localhost"), ("host", "localhost")],
        &[("host", "localhost"), ("origin", "http://localhost:3000")],
    ] {
        assert_eq!(stage.control(Method::DELETE, "/history", "", headers).await.status, 403, "{headers:?}");
    }
    for host in ["LOCALHOST", "127.0.0.1:9", "[::1]:9"] {
        assert_eq!(stage.control(Method::GET, "/", "", &[("host", host)]).await.status, 200, "{host}");
    }
}

#[tokio::test]
async fn the_control_port_moves_the_world() {
    let stage = Stage::set().await;
    let post = |path: &'static str, body: &'static str| stage.control(Method::POST, path, body, &[]);
    assert_eq!(post("/clock", r#"{"advance":"soon"}"#).await.status, 400);
    assert_eq!(post("/trouble", r#"{"trouble":"mischief"}"#).await.status, 400);
    assert_eq!(post("/consent", r#"{"advertiser":"nobody"}"#).await.status, 400);

    let grant = post("/consent", r#"{"want":"grant"}"#).await.json();
    let code = post("/consent", "").await.json()["code"].as_str().unwrap().to_owned();
    assert_eq!(stage.exchange(&code, None).await.status, 200);
    assert_eq!(post("/clock", r#"{"advance":"1h"}"#).await.json()["now"], "2026-08-01T13:00:00Z");
    let token = grant["access_token"].as_str().unwrap();
    assert!(stage.sandbox.world(|world| world.access(token, stage.clock.now()).is_none()));

    let rule = r#"{"trouble":{"status":{"code":503}},"door":"na","when":{"next":1}}"#;
    assert_eq!(post("/trouble", rule).await.status, 201);
    assert_eq!(stage.get(stage.api(Door::Na, "GET", "/v2/profiles")).await.status, 503);
    let history = stage.control(Method::GET, "/history?door=na", "", &[]).await.json();
    assert_eq!(history["calls"][0]["target"], "/v2/profiles");
    assert_eq!((&history["calls"][0]["status"], &history["calls"][0]["trouble"]), (&json!(503), &json!("status")));
    assert_eq!(history["lwa"]["exchanges"], 1);

    assert!(post("/revoke", "").await.json()["revoked"].as_u64().unwrap() >= 2);
    let refused = stage.refresh(grant["refresh_token"].as_str().unwrap()).await;
    assert_refused(&refused, 400, "invalid_grant", BAD_GRANT);
    assert_eq!(stage.control(Method::DELETE, "/history", "", &[]).await.status, 204);
    assert!(stage.sandbox.history().is_empty());
    assert_eq!(stage.control(Method::GET, "/ca.pem", "", &[]).await.text(), stage.sandbox.ca_pem());
}

#[tokio::test]
async fn head_is_answered_like_get_without_the_body() {
    let stage = Stage::set().await;
    let head = stage.get(stage.api(Door::Na, "HEAD", "/v2/profiles")).await;
    let get = stage.get(stage.api(Door::Na, "GET", "/v2/profiles")).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    assert_eq!(head.headers["content-length"], get.body.len().to_string().as_str());
}

#[tokio::test]
async fn amc_shows_the_users_own_account_and_runs_workflows() {
    let stage = Stage::set().await;
    let accounts = stage.get(stage.api(Door::Na, "GET", "/amc/accounts")).await.json();
    assert_eq!(accounts["amcAccounts"].as_array().unwrap().len(), 1);
    let account = accounts["amcAccounts"][0].clone();
    let call = |method: &str, path: &str, body: &'static str| {
        let request = stage.api(Door::Na, method, path);
        let request = request.header("amazon-advertising-api-advertiserid", account["accountId"].as_str().unwrap());
        let request =
            request.header("amazon-advertising-api-marketplaceid", account["marketplaceId"].as_str().unwrap());
        stage.send(Door::Na, request.body(Full::from(body)).unwrap())
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
async fn a_stopped_sandbox_closes_the_connections_it_has() {
    let stage = Stage::set().await;
    let mut stream = stage.tls(Door::Na, b"http/1.1").await;
    stage.sandbox.stop().await;
    let mut byte = [0];
    let read = tokio::io::AsyncReadExt::read(&mut stream, &mut byte).await;
    assert!(!matches!(read, Ok(1..)), "{read:?}");
}
