//! The test harness: a sandbox, an adsidecar in front of it, one clock for both (frozen by default), and clients for
//! every listener.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use adsidecar::app::App;
use adsidecar::config::{self, Sources};
use adsidecar::domain::clock::Clock;
use adsidecar::domain::tls;
use jiff::SignedDuration;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use world::{CLIENT_ID, CLIENT_SECRET, Call, Listener, Options, RETURN_URL, Sandbox};

use crate::raw_http::{Reply, Scripted, Wire};

pub const FERNET_KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";

/// A running sandbox and sidecar.
pub struct Harness {
    pub sandbox: Sandbox,
    pub clock: Clock,
    pub client: Client,
    pub directory: TempDir,
    /// Keys that override those of the file, as with `--set`; read at the next start.
    pub sets: Vec<(String, String)>,
    extra: String,
    running: Option<Running>,
}

struct Running {
    proxy: SocketAddr,
    admin: SocketAddr,
    login: Option<SocketAddr>,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

impl Harness {
    /// A setup in which no user is logged in.
    pub async fn start() -> Self {
        Self::with("").await
    }

    /// As above, with more configuration: TOML sections other than `[amazon]`, `[store]` and `[upstream]`.
    pub async fn with(extra: &str) -> Self {
        let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
        Self::over(Options::calm(clock), extra).await
    }

    /// As above, with a running clock, for tests of timers. The test can still move the clock.
    pub async fn with_running_clock(extra: &str) -> Self {
        Self::over(Options::calm(Clock::system()), extra).await
    }

    /// As above, with a sandbox that the test started.
    pub async fn over(options: Options, extra: &str) -> Self {
        Self::built(options, extra, &[]).await
    }

    /// A setup in which user `default` is logged in, with these keys set as with `--set`.
    pub async fn set(sets: &[(&str, &str)]) -> Self {
        let clock = Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
        let harness = Self::built(Options::calm(clock), "", sets).await;
        harness.log_in("default").await;
        harness.sandbox.clear_history();
        harness
    }

    /// As above, in front of a scripted Amazon (North America).
    pub async fn before(amazon: &Scripted, sets: &[(&str, &str)]) -> Self {
        let ca = amazon.ca_file();
        let own = [("upstream.na", amazon.origin.as_str()), ("upstream.ca_file", ca.to_str().unwrap())];
        Self::set(&[&own, sets].concat()).await
    }

    /// A setup with every option.
    pub async fn built(options: Options, extra: &str, sets: &[(&str, &str)]) -> Self {
        let clock = options.clock.clone();
        let sandbox = Sandbox::start(options).await.unwrap();
        let root = CertificateDer::from_pem_slice(sandbox.ca_pem().as_bytes()).unwrap();
        let client = Client::builder()
            .tls_backend_preconfigured(tls::client_config(&[root], &[]).unwrap())
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        sandbox.write_ca(&directory.path().join("ca.pem")).unwrap();
        let sets = sets.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut harness = Self { sandbox, clock, client, directory, sets, extra: extra.to_owned(), running: None };
        Box::pin(harness.start_sidecar()).await;
        harness
    }

    /// The configuration file of the sidecar, for the commands.
    pub fn config_file(&self) -> PathBuf {
        self.directory.path().join("adsidecar.toml")
    }

    /// `store.path`.
    pub fn store_path(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    /// Starts the sidecar on the existing store.
    pub async fn start_sidecar(&mut self) {
        assert!(self.running.is_none(), "the sidecar is already running");
        let config = self.write_config();
        let sources = Sources { file: Some(config), env: Vec::new(), sets: self.sets.clone() };
        let config = config::load(&sources).unwrap_or_else(|problems| panic!("{problems}"));
        let app = App::build(config, self.clock.clone(), None).await.unwrap().reloading(sources);
        let addresses = app.addresses().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = tokio::spawn(async move {
            app.run(async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
        });
        let (proxy, admin, login) = (addresses.proxy[0], addresses.admin[0], addresses.login.first().copied());
        self.running = Some(Running { proxy, admin, login, stop, ended });
        // The request is answered once the listeners are open.
        let started = self.client.get(self.admin_url("/startupz")).send().await.unwrap();
        assert!(started.status() == 200 || started.status() == 503);
    }

    /// Stops the sidecar gracefully.
    pub async fn stop_sidecar(&mut self) {
        let running = self.running.take().expect("the sidecar is running");
        running.stop.send(()).unwrap();
        running.ended.await.unwrap();
    }

    /// Waits until the sidecar stops without a request from the harness.
    pub async fn quit(&mut self) {
        self.running.take().expect("the sidecar is running").ended.await.unwrap();
    }

    /// Requests a shutdown and returns a future that completes when the sidecar has stopped.
    pub fn begin_stop(&mut self) -> JoinHandle<()> {
        let running = self.running.take().expect("the sidecar is running");
        running.stop.send(()).unwrap();
        running.ended
    }

    /// Restarts the sidecar with one more key.
    pub async fn restart_with(&mut self, key: &str, value: &str) {
        self.stop_sidecar().await;
        self.sets.retain(|(name, _)| name != key);
        self.sets.push((key.to_owned(), value.to_owned()));
        self.start_sidecar().await;
    }

    /// Adds TOML sections to the configuration of the next start.
    pub fn add_configuration(&mut self, sections: &str) {
        self.extra.push_str(sections);
    }

    /// Returns when the sidecar has stopped without a request from the harness.
    pub async fn ended(&mut self) {
        self.running.take().expect("the sidecar is running").ended.await.unwrap();
    }

    fn write_config(&self) -> PathBuf {
        let path = |path: &Path| format!("{:?}", path.to_str().unwrap());
        let (ca, store) = (path(&self.directory.path().join("ca.pem")), path(&self.store_path()));
        // Without searches of its own for accounts, so that a test sees only the calls that it makes.
        let accounts = if self.extra.contains("[accounts]") { "" } else { "[accounts]\nsync = \"off\"\n" };
        let listeners = if self.extra.contains("[proxy]") { "" } else { "[proxy]\nlisten = \"127.0.0.1:0\"\n" };
        let text = format!(
            "environment = \"development\"\n{listeners}\n{accounts}[admin]\nlisten = \"127.0.0.1:0\"\n[amazon]\n\
             client_id = \"{CLIENT_ID}\"\n\
             client_secret = \"{CLIENT_SECRET}\"\nredirect_uri = \"{RETURN_URL}\"\nauthorize_url = \"{}\"\n\
             token_url = \"{}\"\nca_file = {ca}\n[store]\npath = {store}\nfernet_keys = \"{FERNET_KEY}\"\n[upstream]\n\
             na = \"{}\"\neu = \"{}\"\nfe = \"{}\"\nmcp_na = \"{}\"\nmcp_eu = \"{}\"\nmcp_fe = \"{}\"\nca_file = {ca}\n\
             {}\n",
            self.sandbox.authorize_url(),
            self.sandbox.token_url(),
            self.sandbox.origin(Listener::Na),
            self.sandbox.origin(Listener::Eu),
            self.sandbox.origin(Listener::Fe),
            self.sandbox.origin(Listener::McpNa),
            self.sandbox.origin(Listener::McpEu),
            self.sandbox.origin(Listener::McpFe),
            self.extra,
        );
        std::fs::write(self.config_file(), text).unwrap();
        self.config_file()
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("the sidecar is running")
    }

    pub fn proxy_address(&self) -> SocketAddr {
        self.running().proxy
    }

    pub fn admin_address(&self) -> SocketAddr {
        self.running().admin
    }

    /// A connection to the proxy listener.
    pub async fn dial(&self) -> Wire {
        Wire::dial(self.running().proxy).await
    }

    /// Sends bytes to the proxy listener on a new connection and returns the first response.
    pub async fn send_raw(&self, bytes: impl AsRef<[u8]>) -> Reply {
        let mut wire = self.dial().await;
        wire.send(bytes).await;
        wire.reply().await
    }

    /// The last call that an Ads listener received.
    pub fn seen(&self) -> Call {
        let mut calls = self.ads_calls();
        calls.pop().expect("Amazon received a call")
    }

    /// Every call that the Ads listeners received.
    pub fn ads_calls(&self) -> Vec<Call> {
        self.sandbox.history().into_iter().filter(|call| call.listener != Listener::Lwa).collect()
    }

    pub fn proxy_url(&self, path: &str) -> String {
        // The name in the redirect URI: under another one a browser is sent there first.
        format!("http://localhost:{}{path}", self.running().proxy.port())
    }

    pub fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.running().admin)
    }

    pub fn login_listener_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.running().login.expect("the login listener is enabled"))
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, self.proxy_url(path))
    }

    pub async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    pub async fn post(&self, path: &str) -> Response {
        self.request(Method::POST, path).send().await.unwrap()
    }

    pub async fn status_of(&self, user: &str) -> Value {
        json(self.get(&format!("/api/auth/amazon/status?user_id={user}")).await).await
    }

    /// The value of a metric by its name and labels, as Prometheus prints them; 0 if it is absent.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.client.get(self.admin_url("/metrics")).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Performs the whole login of `user`, as an app without a browser does.
    pub async fn log_in(&self, user: &str) {
        let begun = json(self.get(&format!("/api/auth/amazon/login?user_id={user}")).await).await;
        let callback = self.consent(begun["auth_url"].as_str().unwrap()).await;
        let ended = self.get(&callback).await;
        let location = ended.headers().get("location").map_or("", |location| location.to_str().unwrap());
        let success = ended.status() == StatusCode::OK || location.contains("status=success");
        assert!(success, "{ended:?}");
    }

    /// Logs the default user in at a sidecar that needs this caller token.
    pub async fn log_in_with(&self, caller_token: &str) {
        let login = self.request(Method::GET, "/api/auth/amazon/login").header("x-ads-sidecar-token", caller_token);
        let begun = json(login.send().await.unwrap()).await;
        let callback = self.consent(begun["auth_url"].as_str().unwrap()).await;
        assert_eq!(self.get(&callback).await.status(), StatusCode::OK);
    }

    /// Consents as a user does. Returns the path and query of the callback to which Amazon redirects.
    pub async fn consent(&self, auth_url: &str) -> String {
        let answer = self.client.get(auth_url).send().await.unwrap();
        let location = answer.headers()["location"].to_str().unwrap().to_owned();
        let path = location.find("/api/auth").unwrap_or_else(|| panic!("no callback: {location}"));
        location[path..].to_owned()
    }

    /// Advances the clock of both programs.
    pub fn advance(&self, seconds: i64) {
        self.clock.advance(SignedDuration::from_secs(seconds));
    }

    /// Sends raw bytes to the proxy listener. Returns everything received until the listener closes the connection, or
    /// until `end` was received.
    pub async fn raw(&self, bytes: &[u8], end: Option<&[u8]>) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.running().proxy).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let count = stream.read(&mut buffer).await.unwrap_or(0);
            answer.extend_from_slice(&buffer[..count]);
            let found = end.is_some_and(|end| answer.windows(end.len()).any(|window| window == end));
            if count == 0 || found {
                return answer;
            }
        }
    }
}

/// An address at which nobody listens. It stays reserved until this process ends, so that no other test gets it; a
/// program that sets `SO_REUSEADDR`, as servers do, can listen at it.
pub fn unused_address() -> SocketAddr {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    std::mem::forget(socket);
    address
}

/// Polls until `look` returns a value. The limit of ten seconds allows for a busy machine.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub async fn json(response: Response) -> Value {
    let text = response.text().await.unwrap();
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}"))
}

/// The error code of adsidecar's own response; empty for a response of Amazon's.
pub fn code(response: &Response) -> &str {
    response.headers().get("x-adsidecar-error").map_or("", |code| code.to_str().unwrap())
}

/// A response header as text; empty if absent.
pub fn header<'a>(answer: &'a Response, name: &str) -> &'a str {
    answer.headers().get(name).map_or("", |value| value.to_str().unwrap())
}
