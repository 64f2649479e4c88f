//! A stand-in for Amazon on loopback: Login with Amazon, and the Ads API and the MCP server of the three regions, over
//! real TLS.
//!
//! End-to-end tests start it in their own process; `adsidecar-sandbox` starts it as a program. A [`World`] of plain
//! data behind one lock holds all state; HTTP is a thin layer over it. The sandbox implements Amazon's contract from
//! Amazon's documentation and uses nothing of adsidecar except the clock, so that it does not share a misreading of
//! ours. It validates requests as strictly as Amazon does, and more strictly where a header would reveal a leak. A
//! [`Fault`] is data, the clock can be controlled, and the history records every request. Besides Amazon's own paths,
//! the Ads listeners serve test endpoints ([`test_endpoints`]), and a [`control`] port serves tests that run in another
//! process.
//!
//! It cannot be mistaken for production: it binds to loopback only, keeps nothing on disk unless it is given a
//! directory, and its consent page says what it is.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use adsidecar::domain::clock::Clock;
//! use world::{Listener, Fault, Options, Sandbox};
//!
//! let clock = Clock::frozen("2026-08-01T00:00:00Z".parse()?);
//! let sandbox = Sandbox::start(Options::calm(clock.clone())).await?;
//! sandbox.set_fault(Fault::status(503));
//! let user = sandbox.grant();
//! // … send a request through adsidecar as `user`, then:
//! assert_eq!(sandbox.refreshes(), 1);
//! assert_eq!(sandbox.calls(Listener::Eu).len(), 0);
//! # Ok(())
//! # }
//! ```

mod ads;
mod amc;
mod call;
mod catalogue;
pub mod command;
pub mod control;
mod grants_file;
mod header_requirements;
mod listeners;
mod history;
mod jobs;
mod limits;
mod lwa;
mod mcp;
mod published;
pub mod test_endpoints;
mod reply;
mod resources;
mod state;
mod tls;
mod fault;
mod world;

#[cfg(test)]
mod tests;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

pub use catalogue::{
    Advertiser, AmcAccount, Budget, Campaign, Catalogue, DspAdvertiser, Execution, ManagerAccount, Profile, Report,
    Workflow,
};
pub use fault::{Fault, FaultHandle, Rule, When};
pub use history::{Call, LwaCalls};
pub use jobs::JobLimits;
pub use limits::{RateLimit, Told};
pub use test_endpoints::pseudo_random_bytes;
pub use tls::IdentityError;
pub use world::{
    Access, CLIENT_ID, CLIENT_SECRET, Challenge, Client, Consent, Grant, Issued, RETURN_URL, SCOPE, World,
};

use adsidecar::domain::clock::Clock;
use state::SandboxState;

/// Share of LWA calls, in percent, that a rough sandbox fails with a 500.
const ROUGH_FAILURES: u8 = 1;

/// One of the Amazon hosts that the sandbox imitates, each on its own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Listener {
    /// Login with Amazon: consent page and token endpoint of every region.
    Lwa,
    /// The Ads API of North America.
    Na,
    /// The Ads API of Europe.
    Eu,
    /// The Ads API of the Far East.
    Fe,
    /// The MCP server of North America.
    #[serde(rename = "mcp_na")]
    McpNa,
    /// The MCP server of Europe.
    #[serde(rename = "mcp_eu")]
    McpEu,
    /// The MCP server of the Far East.
    #[serde(rename = "mcp_fe")]
    McpFe,
}

impl Listener {
    /// Every listener, in the order of their default ports.
    pub const ALL: [Self; 7] = [Self::Lwa, Self::Na, Self::Eu, Self::Fe, Self::McpNa, Self::McpEu, Self::McpFe];

    /// Whether it is an MCP server.
    pub fn is_mcp(self) -> bool {
        matches!(self, Self::McpNa | Self::McpEu | Self::McpFe)
    }
}

/// The addresses that the sandbox listens on. The operating system chooses a port for 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Addresses {
    /// Login with Amazon, over TLS.
    pub lwa: SocketAddr,
    /// The Ads API of North America, over TLS.
    pub na: SocketAddr,
    /// The Ads API of Europe, over TLS.
    pub eu: SocketAddr,
    /// The Ads API of the Far East, over TLS.
    pub fe: SocketAddr,
    /// The MCP server of North America, over TLS.
    pub mcp_na: SocketAddr,
    /// The MCP server of Europe, over TLS.
    pub mcp_eu: SocketAddr,
    /// The MCP server of the Far East, over TLS.
    pub mcp_fe: SocketAddr,
    /// The control port, plain HTTP.
    pub control: SocketAddr,
}

impl Default for Addresses {
    fn default() -> Self {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self::new([any; Listener::ALL.len()], any)
    }
}

impl Addresses {
    /// The addresses of the listeners in the order of [`Listener::ALL`], and that of the control port.
    pub fn new(amazon: [SocketAddr; Listener::ALL.len()], control: SocketAddr) -> Self {
        let [lwa, na, eu, fe, mcp_na, mcp_eu, mcp_fe] = amazon;
        Self { lwa, na, eu, fe, mcp_na, mcp_eu, mcp_fe, control }
    }

    /// The address of a listener.
    pub fn of(&self, listener: Listener) -> SocketAddr {
        match listener {
            Listener::Lwa => self.lwa,
            Listener::Na => self.na,
            Listener::Eu => self.eu,
            Listener::Fe => self.fe,
            Listener::McpNa => self.mcp_na,
            Listener::McpEu => self.mcp_eu,
            Listener::McpFe => self.mcp_fe,
        }
    }
}

/// How to start a sandbox.
#[derive(Debug)]
pub struct Options {
    /// The clock that decides when codes and tokens expire; the control port moves it.
    pub clock: Clock,
    /// The addresses to listen on, loopback only.
    pub listen: Addresses,
    /// Whether the Amazon listeners offer HTTP/2.
    pub http2: bool,
    /// Whether every consent is granted immediately, without showing the page.
    pub auto_consent: bool,
    /// Whether to imitate production's latency and failures: 5 to 40 ms per call, and a 500 for one LWA call in a
    /// hundred.
    pub rough: bool,
    /// The file that keeps the grants and access tokens from one start to the next; `None`: they end with the process.
    pub grants_file: Option<PathBuf>,
    /// The initial state.
    pub world: World,
}

impl Options {
    /// For tests: free ports, no consent page, no latency, no failures.
    pub fn calm(clock: Clock) -> Self {
        Self {
            clock,
            listen: Addresses::default(),
            http2: false,
            auto_consent: true,
            rough: false,
            grants_file: None,
            world: World::seeded(),
        }
    }

    /// For interactive use: shows the consent page and imitates production's latency and failures.
    pub fn rough(clock: Clock) -> Self {
        Self { auto_consent: false, rough: true, ..Self::calm(clock) }
    }
}

/// Why a sandbox did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address is not loopback.
    #[error("the sandbox listens on loopback only, not on {0}: use 127.0.0.1 or [::1]")]
    NotLoopback(SocketAddr),
    /// An address could not be bound.
    #[error("the sandbox cannot listen on {address}: {source}; end the program that holds the port, or choose another")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file with the grants cannot be read.
    #[error("{}: {source}; remove the file, or repair it", .file.display())]
    Grants {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The certificate could not be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// A running sandbox. It serves until it is stopped or dropped.
pub struct Sandbox {
    shared: Arc<SandboxState>,
    tasks: JoinSet<()>,
}

impl Sandbox {
    /// Binds every listener, then serves each in a task of its own.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let identity = tls::throw_away(options.http2)?;
        let mut sockets = Vec::new();
        let mut amazon = [options.listen.control; Listener::ALL.len()];
        for (listener, bound) in Listener::ALL.into_iter().zip(&mut amazon) {
            let (socket, address) = bind(options.listen.of(listener)).await?;
            *bound = address;
            sockets.push((socket, listener));
        }
        let control = bind(options.listen.control).await?;
        let addresses = Addresses::new(amazon, control.1);
        let mut world = options.world;
        let grants_file = match options.grants_file {
            Some(path) => match grants_file::open(&path, &mut world) {
                Ok(file) => Some((path, Mutex::new(file))),
                Err(source) => return Err(StartError::Grants { file: path, source }),
            },
            None => None,
        };
        if options.rough {
            // The first failure falls at a varying place in the first hundred calls, but never on the first call: that
            // one belongs to the login that `adsidecar-sandbox` performs at startup, which is not retried.
            let first = Timestamp::now().subsec_nanosecond().unsigned_abs() % 99;
            world
                .faults
                .add(Rule::from(Fault::status(500)).at(Listener::Lwa).on("/auth/").percent(ROUGH_FAILURES), first);
        }
        let shared = Arc::new(SandboxState {
            world: Mutex::new(world),
            clock: options.clock,
            ca_pem: identity.ca_pem,
            addresses,
            auto_consent: options.auto_consent,
            rough: options.rough,
            grants_file,
            events: Arc::new(Semaphore::new(0)),
            connections: AtomicU64::new(0),
        });
        let mut tasks = JoinSet::new();
        for (socket, listener) in sockets {
            let tls = TlsAcceptor::from(identity.server.clone());
            tasks.spawn(listeners::serve(socket, Some(listener), Some(tls), shared.clone()));
        }
        tasks.spawn(listeners::serve(control.0, None, None, shared.clone()));
        Ok(Self { shared, tasks })
    }

    /// The addresses that the sandbox listens on.
    pub fn addresses(&self) -> Addresses {
        self.shared.addresses
    }

    /// The origin of a listener, such as `https://127.0.0.1:43211`.
    pub fn origin(&self, listener: Listener) -> String {
        format!("https://{}", self.shared.addresses.of(listener))
    }

    /// The URL of the consent page.
    pub fn authorize_url(&self) -> String {
        format!("{}{}", self.origin(Listener::Lwa), lwa::CONSENT)
    }

    /// The URL of the consent page on the control port: plain HTTP, for a browser that does not trust the throw-away
    /// CA.
    pub fn authorize_url_for_browsers(&self) -> String {
        format!("{}{}", self.control_url(), lwa::CONSENT)
    }

    /// The URL of the token endpoint.
    pub fn token_url(&self) -> String {
        format!("{}{}", self.origin(Listener::Lwa), lwa::TOKEN)
    }

    /// The URL of the control port.
    pub fn control_url(&self) -> String {
        format!("http://{}", self.shared.addresses.control)
    }

    /// The certificate of the throw-away CA, which clients need as an extra trust root.
    pub fn ca_pem(&self) -> &str {
        &self.shared.ca_pem
    }

    /// Writes the certificate of the throw-away CA to a file.
    pub fn write_ca(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, &self.shared.ca_pem)
    }

    /// The sandbox's clock.
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Reads or changes the world. Calls wait meanwhile.
    pub fn world<R>(&self, look: impl FnOnce(&mut World) -> R) -> R {
        look(&mut self.shared.world())
    }

    /// A new grant of the first advertiser for the first client, as if the user had logged in.
    pub fn grant(&self) -> Issued {
        self.world(|world| world.grant(&world.usual_consent(), self.shared.clock.now()))
    }

    /// Every call received, oldest first.
    pub fn history(&self) -> Vec<Call> {
        self.shared.world().history.calls().cloned().collect()
    }

    /// The calls that one listener received, oldest first.
    pub fn calls(&self, listener: Listener) -> Vec<Call> {
        self.shared.world().history.calls().filter(|call| call.listener == listener).cloned().collect()
    }

    /// The last call received.
    pub fn last(&self) -> Option<Call> {
        self.shared.world().history.calls().next_back().cloned()
    }

    /// Deletes the calls and their counts.
    pub fn clear_history(&self) {
        self.shared.world().history.clear();
    }

    /// The number of calls to the token endpoint, by kind.
    pub fn lwa_calls(&self) -> LwaCalls {
        self.shared.world().history.lwa_calls()
    }

    /// The number of refreshes requested, successful or not.
    pub fn refreshes(&self) -> u64 {
        self.lwa_calls().refreshes
    }

    /// Adds a fault rule. A bare [`Fault`] applies to the next call only.
    pub fn set_fault(&self, rule: impl Into<Rule>) -> FaultHandle {
        self.shared.world().faults.add(rule.into(), 0)
    }

    /// Removes every rule and releases the calls that they hold.
    pub fn clear_faults(&self) {
        self.shared.world().faults.clear();
    }

    /// Replaces the rate limits of the Ads listeners. The first that matches a call applies; none by default.
    pub fn set_limits(&self, limits: impl Into<Vec<RateLimit>>) {
        self.shared.world().limits.set(limits.into());
    }

    /// Limits how many exports and AMC workflow runs there are at once, and says how long they run.
    pub fn set_job_limits(&self, limits: JobLimits) {
        self.shared.world().jobs.set(limits);
    }

    /// The number of creations of jobs that were refused so far, and the most jobs that ran at once in one place.
    pub fn job_counts(&self) -> (u64, usize) {
        self.shared.world().jobs.counts()
    }

    /// The number of calls that the rate limits refused so far.
    pub fn limited(&self) -> u64 {
        self.shared.world().limits.refusals()
    }

    /// Releases `count` events of `/sandbox/events?step=1`.
    pub fn release_events(&self, count: usize) {
        self.shared.events.add_permits(count);
    }

    /// Closes every listener and connection, and returns once that is done.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    if !address.ip().is_loopback() {
        return Err(StartError::NotLoopback(address));
    }
    let socket = TcpListener::bind(address).await.map_err(|source| StartError::Bind { address, source })?;
    let bound = socket.local_addr().map_err(|source| StartError::Bind { address, source })?;
    Ok((socket, bound))
}

/// A timestamp in the format of HTTP (RFC 9110, section 5.6.7).
fn http_date(at: Timestamp) -> String {
    at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

/// A request id in the format of Amazon's responses.
fn request_id() -> String {
    let mut random = [0; 16];
    getrandom::fill(&mut random).expect("the machine has a source of randomness, or TLS could not work either");
    let text = history::hex(&random);
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}
