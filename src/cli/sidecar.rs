//! The sidecar that a command talks to: the running one, or one inside the command that lives as long as the command.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{Exit, Failed, client};
use crate::app::{App, BuildError};
use crate::config::Config;
use crate::domain::account::{Region, UserId};
use crate::domain::clock::Clock;
use crate::domain::secret::Secret;
use crate::server::Listen;
use crate::store::StoreError;

/// Timeout of a request that adsidecar answers itself.
const OWN: Duration = Duration::from_secs(15);
/// Timeout of a request that waits for Amazon in three regions, page by page.
pub(super) const AMAZON: Duration = Duration::from_secs(150);

/// A sidecar that answers.
pub(super) struct Sidecar {
    listen: Vec<Listen>,
    caller_token: Option<Secret>,
    own: Option<Own>,
}

/// The sidecar inside this command.
struct Own {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), StoreError>>,
}

/// A response of the sidecar.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
    /// The value of `Location`, if the response is a redirect.
    pub(super) location: Option<String>,
    /// Whether adsidecar itself answered with an error.
    pub(super) is_own_error: bool,
}

impl Sidecar {
    /// The running sidecar; `None` if nothing listens at `proxy.listen`.
    ///
    /// # Errors
    /// [`Failed`] if what listens there is no adsidecar, or refuses the caller token.
    pub(super) async fn running(config: &Config) -> Result<Option<Self>, Failed> {
        let Some(listen) = client::listening(&config.proxy_listen).await else { return Ok(None) };
        let sidecar = Self {
            caller_token: config.admission.caller_tokens.first().cloned(),
            listen: vec![listen.clone()],
            own: None,
        };
        let root = sidecar.get("/").await?;
        match (root.status, root.json()["name"].as_str()) {
            (_, Some("adsidecar")) => Ok(Some(sidecar)),
            (StatusCode::PROXY_AUTHENTICATION_REQUIRED, _) => Err(Failed::because(format!(
                "the sidecar at {listen} refuses the caller token: give this command the same proxy.caller_token"
            ))),
            _ => Err(Failed::because(format!(
                "what listens at {listen} is no adsidecar: stop that process, or set proxy.listen to the address of \
                 the sidecar"
            ))),
        }
    }

    /// The running sidecar, or one inside this command if none runs.
    ///
    /// # Errors
    /// [`Failed`] as for [`running`](Self::running); with [`Exit::Held`] if another process holds the store and cannot
    /// be reached.
    pub(super) async fn running_or_own(config: Config) -> Result<Self, Failed> {
        match Self::running(&config).await? {
            Some(running) => Ok(running),
            None => Box::pin(Self::own(config, Listen::Tcp("127.0.0.1:0".into()))).await,
        }
    }

    /// Starts a sidecar inside this command that listens at `listen`, for this machine only and without a frontend.
    ///
    /// # Errors
    /// [`Failed`] if it cannot start.
    pub(super) async fn own(mut config: Config, listen: Listen) -> Result<Self, Failed> {
        let held = format!(
            "another process holds the store, and nothing answers at proxy.listen ({}): give this command the \
             configuration of that process",
            config.proxy_listen.first().map(ToString::to_string).unwrap_or_default()
        );
        config.proxy_listen = vec![listen];
        config.proxy_listen_default = false;
        (config.login_listen, config.admin_listen, config.admin_listen_default) = (Vec::new(), Vec::new(), false);
        (config.login.frontend_url, config.login.confirm) = (None, false);
        let caller_token = config.admission.caller_tokens.first().cloned();
        let app = Box::pin(App::build(config, Clock::system(), None)).await.map_err(|error| match error {
            BuildError::Store(StoreError::Locked { .. }) => Failed { exit: Exit::Held, message: held },
            other => other.into(),
        })?;
        let listen =
            app.addresses().proxy.iter().map(|address: &SocketAddr| Listen::Tcp(address.to_string())).collect();
        let (stop, stopped) = oneshot::channel();
        let ended = tokio::spawn(Box::pin(app.run(async {
            let _ = stopped.await;
        })));
        Ok(Self { listen, caller_token, own: Some(Own { stop, ended }) })
    }

    /// Whether the sidecar runs inside this command.
    pub(super) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// The command with which a person on this machine requests `path` of it.
    pub(super) fn curl(&self, path: &str) -> String {
        curl(&self.listen, path)
    }

    /// Sends a `GET` that adsidecar answers itself.
    pub(super) async fn get(&self, path: &str) -> Result<Reply, Failed> {
        self.request(Method::GET, path, &[], OWN).await
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`Failed`] if there is no response within `timeout`.
    pub(super) async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        timeout: Duration,
    ) -> Result<Reply, Failed> {
        let token = self.caller_token.iter().map(|token| ("x-ads-sidecar-token", token.expose()));
        let headers: Vec<_> = headers.iter().copied().chain(token).collect();
        let response = client::exchange_within(&self.listen, method, path, &headers, timeout).await?;
        let (head, body) = response.into_parts();
        let location = head.headers.get(http::header::LOCATION);
        let location = location.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let is_own_error = head.headers.contains_key(crate::domain::headers::ERROR);
        Ok(Reply { status: head.status, body, location, is_own_error })
    }

    /// The status of `user`.
    pub(super) async fn status(&self, user: &UserId) -> Result<Value, Failed> {
        let reply = self.get(&format!("/api/auth/amazon/status?user_id={}", encoded(user.as_str()))).await?;
        if reply.status == StatusCode::OK { Ok(reply.json()) } else { Err(reply.refused("the status request")) }
    }

    /// The ids of all users with a grant.
    pub(super) async fn users(&self) -> Result<Vec<String>, Failed> {
        Ok(self.statuses().await?.iter().filter_map(|user| Some(user["user_id"].as_str()?.to_owned())).collect())
    }

    /// The status of every user with a grant.
    pub(super) async fn statuses(&self) -> Result<Vec<Value>, Failed> {
        let mut users: Vec<Value> = Vec::new();
        loop {
            let after = users.last().and_then(|user| user["user_id"].as_str()).unwrap_or_default();
            let reply = self.get(&format!("/api/auth/amazon/status?after={}", encoded(after))).await?;
            match reply.json()["users"].as_array() {
                Some(page) if page.is_empty() => return Ok(users),
                Some(page) => users.extend(page.iter().cloned()),
                None => return Err(reply.refused("the status request")),
            }
        }
    }

    /// Uses the grant of `user`: lists the profiles of one region.
    pub(super) async fn profiles(&self, user: &UserId, region: Region) -> Result<Reply, Failed> {
        let headers = [("x-ads-user", user.as_str()), ("x-ads-region", region.as_str())];
        self.request(Method::GET, "/v2/profiles", &headers, AMAZON).await
    }

    /// Stops the sidecar, if it runs inside this command.
    ///
    /// # Errors
    /// [`Failed`] if its store cannot be closed cleanly.
    pub(super) async fn close(self) -> Result<(), Failed> {
        let Some(Own { stop, ended }) = self.own else { return Ok(()) };
        let _ = stop.send(());
        Ok(ended.await.map_err(Failed::because)??)
    }
}

impl Reply {
    /// The body as JSON; null if it is none.
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The failure that an error response means.
    pub(super) fn refused(&self, what: &str) -> Failed {
        let document = self.json();
        let said = |member: &str| document[member].as_str().unwrap_or_default().to_owned();
        Failed::because(format!(
            "the sidecar answered {} to {what}: {} {}",
            self.status,
            said("detail"),
            said("next_step")
        ))
    }
}

/// The command with which a person on this machine requests `path` at the first of these addresses.
pub(super) fn curl(listen: &[Listen], path: &str) -> String {
    match listen.first() {
        Some(Listen::Unix(socket)) => format!("curl --unix-socket {} http://localhost{path}", socket.display()),
        Some(Listen::Tcp(address)) => {
            let port = address.rsplit(':').next().unwrap_or_default();
            format!("curl http://localhost:{port}{path}")
        }
        None => format!("curl http://localhost:8001{path}"),
    }
}

/// `text` as a value in a query.
pub(super) fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}
