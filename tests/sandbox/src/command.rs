//! `adsidecar-sandbox`: a stand-in for Amazon on loopback with a real adsidecar in front of it, for evaluation and for
//! users' own CI.

use std::ffi::OsString;
use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroU32;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clap::Parser;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};

use crate::{Addresses, CLIENT_ID, CLIENT_SECRET, Listener, Options, RateLimit, Sandbox};
use adsidecar::app::App;
use adsidecar::cli::{Exit, Failed, asked_to_stop, misused, print, told};
use adsidecar::config::{self, Config, FernetKeys, Sources};
use adsidecar::domain::clock::Clock;
use adsidecar::domain::tls;
use adsidecar::store::keyring::Keyring;
use adsidecar::telemetry::log;

/// A stand-in for Amazon with an adsidecar in front of it. It never contacts Amazon, and keeps data only
/// with `--data`.
#[derive(Debug, Parser)]
#[command(name = "adsidecar-sandbox", version)]
struct Arguments {
    /// Disable delays and failures: without this, each call is slow and one LWA call in a hundred fails
    #[arg(long)]
    calm: bool,
    /// Do not log in the user `default`: print the login link instead
    #[arg(long)]
    no_login: bool,
    /// Offer HTTP/1.1 alone; without this, the listeners offer HTTP/2 too, through ALPN
    #[arg(long, conflicts_with = "http2")]
    http1: bool,
    /// The default: earlier versions offered HTTP/1.1 alone
    #[arg(long, hide = true)]
    http2: bool,
    /// Requests per second that the stand-in serves, for each client, region and API family; more get 429
    #[arg(long, value_name = "NUMBER")]
    limit: Option<NonZeroU32>,
    /// Address of adsidecar's proxy listener [default: 127.0.0.1:8001 and [::1]:8001]
    #[arg(long, value_name = "ADDRESS")]
    proxy: Option<SocketAddr>,
    /// Address of adsidecar's admin listener [default: 127.0.0.1:9464 and [::1]:9464]
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Address of the stand-in for Login with Amazon; the Ads hosts na, eu and fe use the next three ports, and the
    /// hosts of the MCP server the three after them
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8440")]
    amazon: SocketAddr,
    /// Address of the control port, which sets faults and time and shows the history
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8450")]
    control: SocketAddr,
    /// Directory for the throw-away CA, the configuration, the store and the grants that Amazon knows [default: one
    /// that is removed at exit]
    #[arg(long, value_name = "DIRECTORY")]
    data: Option<PathBuf>,
    /// Print all addresses and paths as one line of JSON
    #[arg(long)]
    json: bool,
}

/// Runs the program.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    match Arguments::try_parse_from(arguments) {
        Ok(arguments) => told(serve(&arguments)),
        Err(error) => misused(&error),
    }
}

fn serve(arguments: &Arguments) -> Result<(), Failed> {
    let directory = Directory::new(arguments.data.as_deref())?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failed::because)?;
    runtime.block_on(async {
        let clock = Clock::system();
        let sandbox = start(arguments, clock.clone(), &directory.path).await?;
        let sources = configure(arguments, &sandbox, &directory.path)?;
        let config = config::load(&sources)?;
        let log = log::init(config.log);
        let account = first_account(&sandbox);
        let (redirect_uri, fernet_key) = (config.lwa.redirect_uri.clone(), key_of(&config));
        sandbox.set_limits(arguments.limit.map(|limit| RateLimit::of(limit.get().into())).as_slice());
        sandbox.world(|world| world.allow_return_url(&redirect_uri));
        let app = App::build(config, clock, Some(log.clone())).await?.reloading(sources);
        let facts = Facts {
            proxy: format!("http://localhost:{}", app.addresses().proxy[0].port()),
            admin: format!("http://localhost:{}", app.addresses().admin[0].port()),
            control: sandbox.control_url(),
            amazon: sandbox.origin(Listener::Na),
            directory: directory.path.clone(),
            fernet_key,
            profile_id: account.profile_id,
        };
        let stop = asked_to_stop(log)?;
        let running = tokio::spawn(app.run(stop));
        let logged_in = if arguments.no_login { Ok(()) } else { log_in(&facts.proxy, &sandbox).await };
        match (logged_in, arguments.json) {
            (Err(failed), _) => return Err(failed),
            (Ok(()), true) => print(format!("{}\n", facts.json()))?,
            (Ok(()), false) => print(facts.text(!arguments.no_login))?,
        }
        Ok(running.await.map_err(Failed::because)??)
    })
}

async fn start(arguments: &Arguments, clock: Clock, directory: &Path) -> Result<Sandbox, Failed> {
    let mut options = if arguments.calm { Options::calm(clock) } else { Options::rough(clock) };
    options.auto_consent = false;
    options.http2 = !arguments.http1;
    options.grants_file = arguments.data.is_some().then(|| directory.join("amazon-grants.json"));
    let listener = |offset: u16| {
        let port = arguments.amazon.port();
        SocketAddr::new(arguments.amazon.ip(), if port == 0 { 0 } else { port.saturating_add(offset) })
    };
    options.listen = Addresses::new([0, 1, 2, 3, 4, 5, 6].map(listener), arguments.control);
    Sandbox::start(options).await.map_err(Failed::because)
}

/// Writes the configuration of the adsidecar in front to a file, so that other commands can use it.
fn configure(arguments: &Arguments, sandbox: &Sandbox, directory: &Path) -> Result<Sources, Failed> {
    let ca = directory.join("ca.pem");
    sandbox.write_ca(&ca).map_err(Failed::because)?;
    let proxy = arguments.proxy.map(free_port).transpose()?;
    let account = first_account(sandbox);
    let mut text = format!(
        "# Written by adsidecar-sandbox at each start.\nenvironment = \"development\"\n\n[amazon]\nclient_id = {}\n\
         client_secret = {}\nredirect_uri = {}\nauthorize_url = {}\ntoken_url = {}\nca_file = {}\n",
        quoted(CLIENT_ID),
        quoted(CLIENT_SECRET),
        quoted(&format!("http://localhost:{}/api/auth/amazon/callback", proxy.map_or(8001, |proxy| proxy.port()))),
        quoted(&sandbox.authorize_url_for_browsers()),
        quoted(&sandbox.token_url()),
        quoted(&ca.to_string_lossy()),
    );
    if let Some(proxy) = proxy {
        text += &format!("\n[proxy]\nlisten = {}\n", quoted(&proxy.to_string()));
    }
    if let Some(admin) = arguments.admin {
        text += &format!("\n[admin]\nlisten = {}\n", quoted(&free_port(admin)?.to_string()));
    }
    text += &format!(
        "\n[store]\npath = {}\n\n[upstream]\nna = {}\neu = {}\nfe = {}\nmcp_na = {}\nmcp_eu = {}\n\
         mcp_fe = {}\nca_file = {}\n\n[[account]]\nname = \"default\"\n\
         profile_id = {}\nadvertiser_id = {}\nmarketplace_id = {}\n",
        quoted(&directory.join("adsidecar.sled").to_string_lossy()),
        quoted(&sandbox.origin(Listener::Na)),
        quoted(&sandbox.origin(Listener::Eu)),
        quoted(&sandbox.origin(Listener::Fe)),
        quoted(&sandbox.origin(Listener::McpNa)),
        quoted(&sandbox.origin(Listener::McpEu)),
        quoted(&sandbox.origin(Listener::McpFe)),
        quoted(&ca.to_string_lossy()),
        quoted(&account.profile_id),
        quoted(&account.advertiser_id),
        quoted(&account.marketplace_id),
    );
    let file = directory.join("adsidecar.toml");
    write_secret(&file, &text).map_err(|error| Failed::because(format!("{}: {error}", file.display())))?;
    let env = Sources::process_env().into_iter().filter(|(name, _)| name.starts_with("ADSIDECAR_LOG__")).collect();
    Ok(Sources { file: Some(file), env, sets: Vec::new() })
}

/// Writes a file that only its owner reads, as `adsidecar doctor` wants it, also if an open one is there.
fn write_secret(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(text.as_bytes())
}

/// A TOML basic string; TOML accepts JSON's escapes.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The redirect URI contains the port before the listener is bound, so a free port is determined first.
fn free_port(address: SocketAddr) -> Result<SocketAddr, Failed> {
    if address.port() != 0 {
        return Ok(address);
    }
    TcpListener::bind(address).and_then(|listener| listener.local_addr()).map_err(Failed::because)
}

fn key_of(config: &Config) -> String {
    match &config.fernet_keys {
        FernetKeys::Given(keys) => keys.first().map(|key| key.expose().to_owned()).unwrap_or_default(),
        FernetKeys::MakeBesideStore => {
            let made = Keyring::read_or_create(&adsidecar::app::key_file(config));
            made.map(|(key, _)| key.expose().to_owned()).unwrap_or_default()
        }
    }
}

/// The ids of the account `default`.
struct FirstAccount {
    profile_id: String,
    advertiser_id: String,
    marketplace_id: String,
}

fn first_account(sandbox: &Sandbox) -> FirstAccount {
    sandbox.world(|world| {
        let catalogue = &world.catalogue;
        let advertiser = catalogue.advertisers.first().map(|advertiser| advertiser.id.clone()).unwrap_or_default();
        let profile = catalogue.profiles_of(&advertiser, Listener::Na).next().map(|profile| profile.id.to_string());
        let amc = catalogue.amc_accounts.first();
        FirstAccount {
            profile_id: profile.unwrap_or_default(),
            advertiser_id: amc.map(|amc| amc.id.clone()).unwrap_or_default(),
            marketplace_id: amc.map(|amc| amc.marketplace.to_owned()).unwrap_or_default(),
        }
    })
}

/// Performs the whole login as a user would, and consents.
async fn log_in(proxy: &str, sandbox: &Sandbox) -> Result<(), Failed> {
    let root = CertificateDer::from_pem_slice(sandbox.ca_pem().as_bytes()).map_err(Failed::because)?;
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls::client_config(&[root], &[]).map_err(Failed::because)?)
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(Failed::because)?;
    let get =
        async |url: &str| client.get(url).send().await.map_err(|error| Failed::because(format!("{url}: {error}")));
    let begun = get(&format!("{proxy}/api/auth/amazon/login")).await?.bytes().await.map_err(Failed::because)?;
    let begun: Value = serde_json::from_slice(&begun).map_err(Failed::because)?;
    let consent = get(&format!("{}&auto=1", begun["auth_url"].as_str().unwrap_or_default())).await?;
    let callback = consent.headers().get("location").and_then(|location| location.to_str().ok());
    let callback =
        callback.ok_or_else(|| Failed::because("the consent page did not answer with a redirect"))?.to_owned();
    let ended = get(&callback).await?;
    let status = ended.status();
    if status.is_success() {
        Ok(())
    } else {
        Err(Failed::because(format!("the login of the user `default` failed: the callback returned {status}")))
    }
}

/// What a user of the sandbox needs to know.
struct Facts {
    proxy: String,
    admin: String,
    control: String,
    amazon: String,
    directory: PathBuf,
    fernet_key: String,
    profile_id: String,
}

impl Facts {
    fn json(&self) -> Value {
        json!({
            "proxy": self.proxy,
            "admin": self.admin,
            "control": self.control,
            "amazon": self.amazon,
            "ca_file": self.directory.join("ca.pem"),
            "config": self.directory.join("adsidecar.toml"),
            "store": self.directory.join("adsidecar.sled"),
            "fernet_key": self.fernet_key,
            "profile_id": self.profile_id,
        })
    }

    fn text(&self, logged_in: bool) -> String {
        let Self { proxy, admin, control, .. } = self;
        let login = if logged_in {
            "The user `default` is logged in.".to_owned()
        } else {
            format!("Log in first: open {proxy}/api/auth/amazon/login in a browser.")
        };
        format!(
            "\nThis is a stand-in for Amazon with a real adsidecar in front of it. {login}\n\n\
             Requests that an app would send:\n\
             curl {proxy}/v2/profiles\n\
             curl {proxy}/amc/instances\n\
             curl {proxy}/sp/campaigns/list -H 'Content-Type: application/vnd.spCampaign.v3+json' \
             -H 'Accept: application/vnd.spCampaign.v3+json' -d '{{}}'\n\
             curl {proxy}/api/auth/amazon/status\n\n\
             What Amazon received, and the metrics for Prometheus:\n\
             curl {control}/history\n\
             curl {admin}/metrics\n\n\
             Configuration: {}\nStop with Ctrl-C.\n",
            self.directory.join("adsidecar.toml").display()
        )
    }
}

/// The directory of the files; removed at exit, unless the user named it.
struct Directory {
    path: PathBuf,
    ours: bool,
}

impl Directory {
    fn new(wanted: Option<&Path>) -> Result<Self, Failed> {
        let ours = std::env::temp_dir().join(format!("adsidecar-sandbox-{}", std::process::id()));
        let path = wanted.map_or(ours, Path::to_owned);
        std::fs::create_dir_all(&path).map_err(|error| Failed::because(format!("{}: {error}", path.display())))?;
        let path = path.canonicalize().map_err(Failed::because)?;
        Ok(Self { path, ours: wanted.is_none() })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            let _ =
                writeln!(std::io::stderr(), "could not remove {}: {error}; delete it yourself", self.path.display());
        }
    }
}
