//! Tells people and the app what needs them: watches the users' grants, sends each event to `notify.url`, and hands it
//! to the event stream of the proxy listener.
//!
//! An event is delivered at least once, and by one of several processes that share a store: each process notices it,
//! one of them [claims](crate::store::TokenStore::claim_notice) it, and marks it as done once the receiver has it.

mod observer;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, Mac};
use jiff::SignedDuration;
use reqwest::{Client, StatusCode};
use sha2::Sha256;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use url::Url;
use zeroize::Zeroizing;

use crate::auth::tokens::{Status, TokenManager};
use crate::domain::account::Region;
use crate::domain::clock::Clock;
use crate::domain::event::{Event, Happened};
use crate::domain::secret::Secret;
use crate::domain::tls;
use crate::store::{Notice, TokenStore};
use crate::telemetry::metrics::Metrics;
use crate::throttle;
use observer::{Observer, Patience};

/// Where and when to notify.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `notify.url`: where events are posted. It may hold a secret, as those of chat programs do.
    pub url: Option<Secret>,
    /// `notify.secret`: signs each event.
    pub secret: Option<Secret>,
    /// `notify.failing_after`.
    pub failing_after: Duration,
    /// `notify.throttled_after`.
    pub throttled_after: Duration,
    /// The URL that starts a login, up to the user id.
    pub login_base: Option<String>,
}

/// Interval between two looks, and the number of users for each of which a look may take another one: a look at a
/// thousand users takes less than a millisecond.
const PERIOD: Duration = Duration::from_millis(500);
const USERS_PER_PERIOD: usize = 2000;
/// A shared store is read at one of this many looks, about once a minute, and at most this many of its users.
const LOOKS_PER_READ: u32 = 120;
const MAX_READ: usize = 1000;
/// Most events that wait to be delivered. Older ones are dropped and counted.
const MAX_QUEUE: usize = 1000;
/// Pause before an event is sent again: at first, and at most.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(300);
/// Attempts until an event is dropped: about a day.
const MAX_ATTEMPTS: u32 = 300;
/// No delivery begins after this part of a look.
const DELIVERING: Duration = Duration::from_secs(1);
/// Time limit of one delivery.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Events that a slow reader of the event stream may be behind.
const STREAM_QUEUE: usize = 256;

/// The events as they happen, for the event stream. A clone is another handle to the same events.
#[derive(Clone, Debug)]
pub struct Events {
    sender: broadcast::Sender<Arc<Event>>,
    ended: CancellationToken,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::Sender::new(STREAM_QUEUE), ended: CancellationToken::new() }
    }
}

impl Events {
    /// The events from now on, and what is cancelled when no more will come.
    pub fn subscribe(&self) -> (broadcast::Receiver<Arc<Event>>, CancellationToken) {
        (self.sender.subscribe(), self.ended.clone())
    }

    /// Hands an event to the streams. Nobody may be listening.
    pub(crate) fn send(&self, event: impl Into<Arc<Event>>) {
        let _ = self.sender.send(event.into());
    }

    /// Ends every event stream, for a shutdown.
    pub fn end(&self) {
        self.ended.cancel();
    }
}

/// Watches the grants and delivers events. Run it beside the listeners.
pub struct Notifier {
    /// Replaced by a reload.
    pub settings: Arc<ArcSwap<Settings>>,
    /// The grants to watch.
    pub tokens: TokenManager,
    /// Where it is noted which events were delivered.
    pub store: TokenStore,
    /// Counts deliveries, and knows of 429 responses.
    pub metrics: Arc<Metrics>,
    /// Knows for how long Amazon wants no requests.
    pub throttle: Arc<throttle::Memory>,
    /// The clock of the consents.
    pub clock: Clock,
    /// Where events are handed to the event stream.
    pub events: Events,
}

/// An event that waits for its delivery.
struct Waiting {
    event: Arc<Event>,
    attempts: u32,
    not_before: tokio::time::Instant,
}

/// Why an event was not delivered.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// `notify.url` is not set.
    #[error("notify.url is not set")]
    NoUrl,
    /// `notify.secret` cannot be used, or the client cannot be built.
    #[error("{0}")]
    Setting(String),
    /// The receiver cannot be reached. The message never holds the URL.
    #[error("the receiver of notify.url cannot be reached: {0}")]
    Unreachable(String),
    /// The receiver answered with this status.
    #[error("the receiver of notify.url answered {0}")]
    Refused(StatusCode),
}

impl DeliveryError {
    /// Whether the same event may be accepted later.
    fn may_pass(&self) -> bool {
        match self {
            Self::NoUrl | Self::Setting(_) => false,
            Self::Unreachable(_) => true,
            Self::Refused(status) => {
                let later = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
                status.is_server_error() || later.contains(status)
            }
        }
    }
}

impl Notifier {
    /// Runs until dropped.
    pub async fn run(self) {
        let mut observer = Observer::default();
        let mut queue = VecDeque::new();
        let mut looks = 0_u32;
        // Looks at which requests to a region were paused: Amazon throttles also if none is sent that it could refuse.
        let mut paused = [0_u64; 3];
        loop {
            let settings = self.settings.load_full();
            let statuses = self.statuses(looks).await;
            looks = looks.wrapping_add(1);
            let now_paused = self.throttle.paused();
            let throttled = Region::ALL.map(|region| {
                paused[region as usize] += u64::from(now_paused[region as usize]);
                let refused = self.metrics.throttled.with_label_values(&[region.as_str(), "amazon"]).get();
                refused + paused[region as usize]
            });
            let patience = Patience {
                failing: SignedDuration::try_from(settings.failing_after).unwrap_or(SignedDuration::MAX),
                throttled: SignedDuration::try_from(settings.throttled_after).unwrap_or(SignedDuration::MAX),
            };
            for happened in
                observer.look(&statuses, self.store.shared().is_none(), throttled, self.clock.reading(), patience)
            {
                self.take(happened, &settings, &mut queue);
            }
            self.deliver_due(&settings, &mut queue).await;
            let periods = u32::try_from(1 + statuses.len() / USERS_PER_PERIOD).unwrap_or(u32::MAX);
            tokio::time::sleep(PERIOD.saturating_mul(periods)).await;
        }
    }

    /// The users to look at: those that this process holds, and from time to time those of a shared store that need
    /// attention.
    async fn statuses(&self, looks: u32) -> Vec<Status> {
        match self.store.shared() {
            Some(_) if looks.is_multiple_of(LOOKS_PER_READ) => self.tokens.most_urgent(MAX_READ).await,
            _ => self.tokens.held_statuses(),
        }
    }

    /// Hands an event to the event stream, and queues it for its delivery.
    fn take(&self, happened: Happened, settings: &Settings, queue: &mut VecDeque<Waiting>) {
        let mut event = Event { at: self.clock.now(), happened, login_url: None };
        if let Happened::LoginNeeded { .. } | Happened::ConsentEnding { .. } = event.happened {
            let user = event.user().map_or("", |user| user.as_str());
            let name: String = url::form_urlencoded::byte_serialize(user.as_bytes()).collect();
            event.login_url = settings.login_base.as_ref().map(|base| format!("{base}{name}"));
        }
        let event = Arc::new(event);
        self.events.send(event.clone());
        if settings.url.is_none() || matches!(event.happened, Happened::LoginDone { .. }) {
            return;
        }
        if queue.len() == MAX_QUEUE {
            queue.pop_front();
            self.count("dropped");
        }
        queue.push_back(Waiting { event, attempts: 0, not_before: tokio::time::Instant::now() });
    }

    /// Delivers the queued events that are due, and keeps those whose delivery failed.
    async fn deliver_due(&self, settings: &Settings, queue: &mut VecDeque<Waiting>) {
        let now = tokio::time::Instant::now();
        for _ in 0..queue.len() {
            // The others wait for the next look: a receiver that does not answer must not keep this one from looking.
            if now.elapsed() > DELIVERING {
                return;
            }
            let Some(mut waiting) = queue.pop_front() else { return };
            if waiting.not_before > now || !self.deliver(settings, &waiting).await {
                if waiting.not_before <= now {
                    waiting.attempts += 1;
                    let pause = RETRY_FIRST.saturating_mul(1 << waiting.attempts.min(16)).min(RETRY_MOST);
                    waiting.not_before = tokio::time::Instant::now() + pause;
                }
                if waiting.attempts < MAX_ATTEMPTS {
                    queue.push_back(waiting);
                } else {
                    self.count("dropped");
                }
            }
        }
    }

    /// Returns whether there is nothing left to do about the event.
    async fn deliver(&self, settings: &Settings, waiting: &Waiting) -> bool {
        let event = &waiting.event;
        let id = event.id();
        match self.store.claim_notice(&id, self.clock.now()).await {
            Ok(Notice::Mine) => {}
            Ok(Notice::Done) => return true,
            // Another process delivers it, or dies and leaves it to this one.
            Ok(Notice::Theirs) | Err(_) => return false,
        }
        match send(settings, event).await {
            Ok(()) => {
                self.count("delivered");
                tracing::info!(kind = event.kind(), user = event.user().map(tracing::field::display), "notified");
            }
            Err(error) if error.may_pass() => {
                self.count("failed");
                if waiting.attempts == 0 {
                    tracing::warn!(kind = event.kind(), %error, "a notification was not delivered; it is sent again");
                }
                // Others need not wait for the claim to expire.
                let _ = self.store.release_notice(&id).await;
                return false;
            }
            Err(error) => {
                self.count("dropped");
                tracing::error!(kind = event.kind(), %error, "a notification was dropped: check notify.url and \
                    notify.secret with adsidecar notify test");
            }
        }
        // If this fails, the event is delivered twice: under one id.
        let _ = self.store.notice_done(&id, self.clock.now()).await;
        true
    }

    fn count(&self, result: &str) {
        self.metrics.notifications.with_label_values(&[result]).inc();
    }
}

/// Posts one event to `notify.url`, signed as [Standard Webhooks](https://www.standardwebhooks.com) say.
///
/// # Errors
/// [`DeliveryError`] if the receiver does not accept it.
pub async fn send(settings: &Settings, event: &Event) -> Result<(), DeliveryError> {
    let url = settings.url.as_ref().ok_or(DeliveryError::NoUrl)?;
    let url: Url = url.expose().parse().map_err(|_| DeliveryError::Setting("notify.url is no URL".to_owned()))?;
    let setting = |error: &dyn std::fmt::Display| DeliveryError::Setting(error.to_string());
    let tls = tls::client_config(&[], &[b"http/1.1"]).map_err(|error| setting(&error))?;
    let client = Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(TIMEOUT)
        .build()
        .map_err(|error| setting(&error))?;
    let (id, sent_at) = (event.id(), jiff::Timestamp::now().as_second().to_string());
    let body = event.json().to_string();
    let mut request = client
        .post(url)
        .header("content-type", "application/json")
        .header("user-agent", concat!("adsidecar/", env!("CARGO_PKG_VERSION")))
        .header("webhook-id", &id)
        .header("webhook-timestamp", &sent_at);
    if let Some(secret) = &settings.secret {
        request = request.header("webhook-signature", signature(secret, &id, &sent_at, &body)?);
    }
    let unreachable = |error: reqwest::Error| DeliveryError::Unreachable(root_cause(&error.without_url()));
    let response = request.body(body).send().await.map_err(unreachable)?;
    if response.status().is_success() { Ok(()) } else { Err(DeliveryError::Refused(response.status())) }
}

/// Whether `secret` can sign events.
pub fn is_secret(secret: &Secret) -> bool {
    key(secret).is_ok()
}

/// `v1,` and the HMAC-SHA256 of id, time and body. A secret that begins with `whsec_` is base64.
fn signature(secret: &Secret, id: &str, sent_at: &str, body: &str) -> Result<String, DeliveryError> {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(&key(secret)?).map_err(|error| DeliveryError::Setting(error.to_string()))?;
    mac.update(format!("{id}.{sent_at}.{body}").as_bytes());
    Ok(format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes())))
}

fn key(secret: &Secret) -> Result<Zeroizing<Vec<u8>>, DeliveryError> {
    let key = match secret.expose().strip_prefix("whsec_") {
        Some(encoded) => BASE64_STANDARD
            .decode(encoded)
            .map_err(|_| DeliveryError::Setting("notify.secret is not base64 behind whsec_".to_owned()))?,
        None => secret.expose().as_bytes().to_vec(),
    };
    Ok(Zeroizing::new(key))
}

/// The innermost error, which says what happened.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification (standard-webhooks, spec/standard-webhooks.md, "Signature scheme").
    #[test]
    fn an_event_is_signed_as_standard_webhooks_say() {
        let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let body = "{\"test\": 2432232314}";
        let signed = signature(&secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body).unwrap();
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }
}
