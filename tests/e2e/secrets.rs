//! No secret leaves by the log, the metrics or a page: not the known ones alone, but every one that was ever made.

use std::io::Write;
use std::sync::{Arc, Mutex};

use adsidecar::domain::secret::recorded;
use reqwest::Method;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use world::{CLIENT_SECRET, Fault, Listener, Rule};

use crate::harness::{FERNET_KEY, Harness, json};

const REFRESH: &str = "/api/auth/amazon/refresh";
const LOGIN_LISTENER: &str = "[login]\nlisten = \"127.0.0.1:0\"\nfrontend_url = \"http://localhost:3000/app\"";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// The log of this process from now on, as `log.level = "trace"` writes it.
    fn begin() -> Self {
        let log = Self::default();
        let writer = log.clone();
        let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(move || writer.clone());
        let filter = Targets::new().with_default(LevelFilter::WARN).with_target("adsidecar", LevelFilter::TRACE);
        tracing_subscriber::registry().with(filter).with(lines).init();
        log
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// The values of a field in the forms that the token endpoint received.
fn sent(harness: &Harness, field: &str) -> Vec<String> {
    let forms = harness.sandbox.calls(Listener::Lwa).into_iter().map(|call| call.text());
    let of = |form: String| -> Vec<String> {
        let pairs = url::form_urlencoded::parse(form.as_bytes());
        pairs.filter(|(name, _)| name == field).map(|(_, value)| value.into_owned()).collect()
    };
    forms.flat_map(of).collect()
}

/// A login of `user` that is confirmed, as an app that serves several users does it. Returns the one-time id.
async fn log_in_and_confirm(harness: &Harness, user: &str) -> String {
    let begun = json(harness.get(&format!("/api/auth/amazon/login?user_id={user}")).await).await;
    let callback = harness.consent(begun["auth_url"].as_str().unwrap()).await;
    let ended = harness.get(&callback).await;
    let location = ended.headers()["location"].to_str().unwrap().to_owned();
    let (_, id) = location.split_once("grant=").unwrap_or_else(|| panic!("{location}"));
    assert_eq!(harness.post(&format!("/api/auth/amazon/confirm?grant={id}")).await.status(), 200);
    id.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 35.
async fn no_secret_that_was_ever_made_is_in_the_log_at_trace_nor_in_a_metric_or_page() {
    recorded::begin();
    let log = Log::begin();
    let harness = Harness::with(LOGIN_LISTENER).await;
    let id = log_in_and_confirm(&harness, "default").await;
    log_in_and_confirm(&harness, "anna").await;
    // A browser's login, with its cookie, whose code is then not exchanged.
    let page = harness.request(Method::GET, "/api/auth/amazon/login").header("accept", "text/html").send().await;
    let page = page.unwrap();
    let cookie = page.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
    let callback = harness.consent(page.headers()["location"].to_str().unwrap()).await;
    harness.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa));
    let failed = harness.request(Method::GET, &callback).header("cookie", &cookie).send().await.unwrap();
    assert!(failed.headers()["location"].to_str().unwrap().contains("exchange_failed"), "{failed:?}");
    harness.get("/api/auth/amazon/callback?code=ANx-of-nobody&state=none").await;
    for fault in [Fault::RotateRefreshToken, Fault::BadJson, Fault::Html, Fault::InvalidClient, Fault::InvalidGrant] {
        harness.sandbox.set_fault(Rule::from(fault).at(Listener::Lwa));
        harness.post(REFRESH).await;
        harness.advance(3601);
        harness.get("/v2/profiles").await;
    }
    harness.sandbox.set_fault(Rule::from(Fault::TokenUnauthorized).at(Listener::Na));
    harness.get("/v2/profiles").await;
    let mut places = vec![("log", log.text())];
    for path in
        ["/metrics", "/", "/readyz", "/page/users", "/page/accounts", "/page/calls", "/page/settings", "/page/throttle"]
    {
        let page = harness.client.get(harness.admin_url(path)).send().await.unwrap().text().await.unwrap();
        assert!(!page.is_empty(), "{path}");
        places.push((path, page));
    }
    places.push(("status", harness.get("/api/auth/amazon/status").await.text().await.unwrap()));
    assert!(places[0].1.lines().count() > 20, "{}", places[0].1);

    // The recorded secrets include each kind, also PKCE verifiers.
    let secrets = recorded::all();
    let mut kinds = vec![id, CLIENT_SECRET.to_owned(), FERNET_KEY.to_owned()];
    kinds.push(cookie.split_once('=').unwrap().1.to_owned());
    for field in ["code_verifier", "code", "refresh_token"] {
        let sent = sent(&harness, field);
        assert!(sent.len() >= 2, "{field}: {sent:?}");
        kinds.extend(sent);
    }
    let bearers = harness.ads_calls().into_iter().map(|call| call.header("authorization").unwrap()[7..].to_owned());
    kinds.extend(bearers);
    for secret in &kinds {
        assert!(secrets.contains(secret), "{secret} is a secret, and was not made as one");
    }
    for secret in secrets.iter().filter(|secret| secret.len() >= 8) {
        for (place, text) in &places {
            assert!(!text.contains(secret.as_str()), "{place} holds {secret}:\n{text}");
        }
    }
}
