//! Notifications: the webhook, signed, retried and told once; and the event stream of the proxy listener.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, Mac};
use reqwest::{Method, Response};
use serde_json::Value;
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use world::{Fault, Listener, Rule};

use crate::commands::{CONFIG, DONE, FAILED, beside, run};
use crate::harness::{Harness, code, eventually};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// The lines of the head, in lower case, and the body.
type Request = (Vec<String>, String);

/// A receiver of notifications, which answers as it is told to.
pub struct Receiver {
    pub url: String,
    received: Arc<Mutex<Vec<Request>>>,
    status: Arc<Mutex<&'static str>>,
}

impl Receiver {
    pub async fn start() -> Self {
        Self::pausing(Duration::ZERO).await
    }

    /// One that takes this long for each answer.
    async fn pausing(pause: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook/canary-path", listener.local_addr().unwrap());
        let (received, status) = (Arc::<Mutex<Vec<_>>>::default(), Arc::new(Mutex::new("200 OK")));
        let (kept, answer) = (received.clone(), status.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
                let (head, body) = loop {
                    let count = stream.read(&mut buffer).await.unwrap_or(0);
                    bytes.extend_from_slice(&buffer[..count]);
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                    let head: Vec<String> = head.to_lowercase().lines().map(str::to_owned).collect();
                    let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                    if body.len() >= length.parse::<usize>().unwrap() || count == 0 {
                        break (head, body.to_owned());
                    }
                };
                let status = *answer.lock().unwrap();
                kept.lock().unwrap().push((head, body));
                tokio::time::sleep(pause).await;
                let text = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                let _ = stream.write_all(text.as_bytes()).await;
            }
        });
        Self { url, received, status }
    }

    fn answers(&self, status: &'static str) {
        *self.status.lock().unwrap() = status;
    }

    /// The events of this kind that arrived so far.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let received = self.received.lock().unwrap();
        let events = received.iter().map(|(_, body)| serde_json::from_str::<Value>(body).unwrap());
        events.filter(|event| event["type"] == kind).collect()
    }

    pub async fn event(&self, kind: &str) -> Value {
        eventually(kind, async || self.events(kind).pop()).await
    }
}

/// Refuses the grant of the default user.
async fn refuse(harness: &Harness) {
    harness.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa).next(1));
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_needed_login_is_posted_once_signed_and_with_the_login_url() {
    let receiver = Receiver::start().await;
    let mut harness = Harness::set(&[("notify.url", &receiver.url), ("notify.secret", SECRET)]).await;
    refuse(&harness).await;
    let event = receiver.event("login_needed").await;
    assert_eq!((&event["user_id"], &event["reason"]), (&"default".into(), &"invalid_grant".into()));
    let login = event["login_url"].as_str().unwrap();
    assert!(event["text"].as_str().unwrap().contains(login), "{event}");
    // It is at the origin of the redirect URI, which is not where this harness listens.
    let here = login.replace("http://localhost:8001", &harness.proxy_url(""));
    assert_ne!(here, login, "{event}");
    assert_eq!(harness.client.get(here).send().await.unwrap().status(), 200, "the URL starts a login");

    let (head, body) = receiver.received.lock().unwrap()[0].clone();
    let header = |name: &str| head.iter().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap().to_owned();
    assert_eq!(header("webhook-id"), event["id"].as_str().unwrap());
    let key = BASE64_STANDARD.decode(SECRET.strip_prefix("whsec_").unwrap()).unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{}.{}.{body}", header("webhook-id"), header("webhook-timestamp")).as_bytes());
    let signed = format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()));
    assert_eq!(header("webhook-signature"), signed.to_lowercase());
    assert!(!body.contains("Atz"), "{body}");

    // Neither time nor a restart tells it again.
    harness.stop_sidecar().await;
    harness.start_sidecar().await;
    refuse(&harness).await;
    harness.advance(60);
    harness.log_in("default").await;
    refuse(&harness).await;
    eventually("the next need", async || (receiver.events("login_needed").len() == 2).then_some(())).await;
    let ids: Vec<Value> = receiver.events("login_needed").iter().map(|event| event["id"].clone()).collect();
    assert_ne!(ids[0], ids[1], "the second is another one");
    assert_eq!(harness.metric("adsidecar_notifications_total{result=\"delivered\"}").await, 1.0, "since the restart");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_pause_counts_as_throttling_although_amazon_is_sent_nothing() {
    let receiver = Receiver::start().await;
    let sets = [("notify.url", receiver.url.as_str()), ("notify.throttled_after", "5m"), ("throttle.mode", "enforce")];
    let harness = Harness::set(&sets).await;
    let mut stream = harness.get("/api/auth/amazon/events").await;
    harness.sandbox.set_fault(Rule::from(Fault::too_many(Some(600))).at(Listener::Na));
    assert_eq!(harness.get("/v2/profiles").await.status(), 429);
    tokio::time::timeout(std::time::Duration::from_secs(20), async {
        while receiver.events("throttled").is_empty() {
            harness.advance(20);
            // The notifier has to look at the pause in between.
            tokio::time::sleep(std::time::Duration::from_millis(600)).await;
        }
    })
    .await
    .expect("throttled");
    let event = receiver.event("throttled").await;
    assert!(event["region"] == "na" && event["lasting_seconds"].as_i64().unwrap() >= 300, "{event}");
    assert_eq!(harness.ads_calls().len(), 1, "Amazon refused one request");
    let mut text = String::new();
    while !text.contains("throttled") {
        text += &String::from_utf8_lossy(&stream.chunk().await.unwrap().expect("the stream goes on"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_consent_failing_refreshes_and_throttling_are_posted() {
    let receiver = Receiver::start().await;
    let sets = [("notify.url", receiver.url.as_str()), ("notify.throttled_after", "0s")];
    let harness = Harness::set(&sets).await;
    let busy = Fault::Status { code: 429, headers: Vec::new(), body: "".into() };
    harness.sandbox.set_fault(Rule::from(busy).at(Listener::Na).next(1));
    assert_eq!(harness.get("/v2/profiles").await.status(), 429);
    assert_eq!(receiver.event("throttled").await["region"], "na");

    harness.sandbox.set_fault(Rule::from(Fault::status(500)).at(Listener::Lwa).always());
    harness.advance(3600);
    assert_eq!(harness.post("/api/auth/amazon/refresh").await.status(), 503);
    eventually("failing", async || (harness.status_of("default").await["state"] == "failing").then_some(())).await;
    // The notifier has to have seen the beginning.
    tokio::time::timeout(std::time::Duration::from_secs(5), async {
        while receiver.events("refresh_failing").is_empty() {
            harness.advance(60);
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    })
    .await
    .expect("refresh_failing");
    let failing = receiver.event("refresh_failing").await;
    assert_eq!(failing["reason"], "server_error");
    assert!(failing["lasting_seconds"].as_i64().unwrap() >= 900, "{failing}");

    harness.sandbox.clear_faults();
    for (days, left) in [(30, 29), (7, 6), (1, 0)] {
        let status = harness.status_of("default").await;
        let end: jiff::Timestamp = status["consent_expires_at"].as_str().unwrap().parse().unwrap();
        let away = end.duration_since(harness.clock.now()).as_secs();
        harness.advance(away - left * 86_400 - 3600);
        let event = eventually("consent_ending", async || {
            receiver.events("consent_ending").into_iter().find(|event| event["days"] == days)
        })
        .await;
        assert!(event["text"].as_str().unwrap().contains("has to log in again at http"), "{event}");
    }
    assert_eq!(receiver.events("consent_ending").len(), 3, "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_that_fails_is_sent_again_under_the_same_id() {
    let receiver = Receiver::start().await;
    receiver.answers("503 Service Unavailable");
    let harness = Harness::set(&[("notify.url", &receiver.url)]).await;
    refuse(&harness).await;
    receiver.event("login_needed").await;
    receiver.answers("204 No Content");
    let delivered = "adsidecar_notifications_total{result=\"delivered\"}";
    eventually("the delivery", async || (harness.metric(delivered).await == 1.0).then_some(())).await;
    let events = receiver.events("login_needed");
    assert!(events.len() >= 2, "{events:?}");
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]), "{events:?}");

    // A receiver that refuses it for good is not asked for ever.
    receiver.answers("404 Not Found");
    harness.advance(60);
    harness.log_in("default").await;
    refuse(&harness).await;
    let dropped = "adsidecar_notifications_total{result=\"dropped\"}";
    eventually("the drop", async || (harness.metric(dropped).await == 1.0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn notify_test_says_what_the_receiver_answers() {
    let receiver = Receiver::start().await;
    let harness = Harness::set(&[("notify.url", &receiver.url)]).await;
    let url = format!("notify.url={}", receiver.url);
    let test = async |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        run(&harness, &[&["notify", "test"][..], &sets].concat(), "").await
    };
    let sent = test(&[&url, &format!("notify.secret={SECRET}")]).await;
    assert_eq!(sent.code, DONE, "{}", sent.err);
    assert!(sent.out.contains("accepted a test event, signed"), "{}", sent.out);
    assert!(receiver.event("test").await["text"].as_str().unwrap().contains("test"));
    receiver.answers("403 Forbidden");
    let refused = test(&[&url]).await;
    assert_eq!((refused.code, refused.out.as_str()), (FAILED, ""));
    assert!(refused.err.contains("403") && !refused.err.contains("canary-path"), "{}", refused.err);
    let nobody = test(&["notify.url=http://127.0.0.1:9/canary-path"]).await;
    assert_eq!(nobody.code, FAILED);
    assert!(nobody.err.contains("cannot be reached") && !nobody.err.contains("canary-path"), "{}", nobody.err);
    for (wrong, key) in [
        (&["notify.url=hooks.example.com"][..], "notify.url"),
        (&["notify.secret=x"], "notify.secret"),
        (&["notify.url=http://127.0.0.1/", "notify.secret=whsec_???"], "notify.secret"),
    ] {
        let ran = test(wrong).await;
        assert_eq!(ran.code, CONFIG, "{wrong:?}");
        assert!(ran.err.contains(key), "{}", ran.err);
    }
    assert_eq!(test(&[]).await.code, FAILED, "nothing to test");
    let checked = beside(&harness, &["check", "--set", &url]).await;
    assert!(!checked.out.contains("canary-path"), "the URL of a chat program is a secret: {}", checked.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_receiver_keeps_no_event_from_the_stream() {
    const USERS: u32 = 20;
    let receiver = Receiver::pausing(Duration::from_millis(1200)).await;
    receiver.answers("503 Service Unavailable");
    let harness = Harness::set(&[("notify.url", &receiver.url)]).await;
    for user in 0..USERS {
        harness.log_in(&format!("user-{user}")).await;
    }
    harness.sandbox.set_fault(Rule::from(Fault::InvalidGrant).at(Listener::Lwa).next(USERS));
    for user in 0..USERS {
        let refused = harness.post(&format!("/api/auth/amazon/refresh?user_id=user-{user}")).await;
        assert_eq!(refused.status(), 401);
    }
    // By now all of them wait for their delivery, which would take twenty seconds.
    eventually("three deliveries", async || (receiver.events("login_needed").len() >= 3).then_some(())).await;
    let mut stream = harness.get("/api/auth/amazon/events?user_id=default").await;
    until(&mut stream, "retry: 2000").await;
    refuse(&harness).await;
    until(&mut stream, "event: login_needed\n").await;
}

/// Reads a stream up to the end of the event, or of the line, that has `text`.
async fn until(stream: &mut Response, text: &str) -> String {
    let mut read = String::new();
    while read.split_once(text).is_none_or(|(_, rest)| !rest.contains("\n\n")) {
        let chunk = tokio::time::timeout(std::time::Duration::from_secs(10), stream.chunk()).await;
        let chunk = chunk.unwrap_or_else(|_| panic!("no {text} in {read}")).unwrap();
        read += std::str::from_utf8(&chunk.unwrap_or_else(|| panic!("ended without {text}: {read}"))).unwrap();
    }
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn the_app_reads_events_as_they_happen_until_the_shutdown() {
    let mut harness = Harness::set(&[]).await;
    harness.log_in("other").await;
    let mut all = harness.get("/api/auth/amazon/events").await;
    assert_eq!(all.status(), 200);
    assert_eq!(all.headers()["content-type"], "text/event-stream");
    assert_eq!(all.headers()["cache-control"], "no-store");
    let mut other = harness.get("/api/auth/amazon/events?user_id=other").await;
    until(&mut all, "retry: 2000").await;
    // A look of the notifier that began before this stream may still report the login above.
    refuse(&harness).await;
    let needed = until(&mut all, "event: login_needed\n").await;
    let (_, needed) = needed.split_once("event: login_needed\n").unwrap();
    let data = needed.lines().find(|line| line.starts_with("data: ")).unwrap();
    let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!((&event["type"], &event["user_id"]), (&"login_needed".into(), &"default".into()));
    harness.advance(60);
    harness.log_in("default").await;
    until(&mut all, "event: login_done\n").await;
    harness.log_in("other").await;
    until(&mut all, "\"user_id\":\"other\"").await;

    for (path, status, refusal) in [
        ("/api/auth/amazon/events?nope=1", 400, "bad_request"),
        ("/api/auth/amazon/events?user_id=a%20b", 400, "bad_request"),
    ] {
        let answer = harness.get(path).await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (status, refusal), "{path}");
    }
    assert_eq!(harness.post("/api/auth/amazon/events").await.status(), 405);
    let page = harness.request(Method::GET, "/api/auth/amazon/events").header("origin", "https://evil.test");
    assert_eq!(code(&page.send().await.unwrap()), "cross_site");

    let begun = std::time::Instant::now();
    harness.stop_sidecar().await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(5), "an open stream does not hold a shutdown up");
    let mut seen = String::new();
    while let Ok(Some(chunk)) = other.chunk().await {
        seen += std::str::from_utf8(&chunk).unwrap();
    }
    assert!(seen.contains("\"user_id\":\"other\"") && !seen.contains("\"user_id\":\"default\""), "{seen}");
    while let Ok(Some(_)) = all.chunk().await {}
    assert!(all.chunk().await.unwrap().is_none(), "the stream ended cleanly");
}
