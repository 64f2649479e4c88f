//! The commands: one file each, or two lines here.

mod accounts;
mod client;
pub mod doctor;
mod explain;
mod first_words;
mod health;
mod help;
mod login;
mod key;
mod notify;
mod process;
mod serve;
mod sidecar;
mod status;
mod store;
mod systemd;
mod users;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use serve::asked_to_stop;

use crate::app::BuildError;
use crate::config::{self, ConfigErrors, Sources};
use crate::store::StoreError;

/// Amazon Ads authentication as a sidecar: plain HTTP to localhost in, an authenticated request out.
#[derive(Debug, Parser)]
#[command(name = "adsidecar", version, disable_help_subcommand = false)]
struct Arguments {
    /// The configuration file (TOML); without it, ADSIDECAR_CONFIG names the file
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one configuration key, overriding the file and the environment; repeatable
    #[arg(long, global = true, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM (the default command)
    ///
    /// SIGHUP reloads the configuration
    Serve,
    /// Print the configuration without its secrets, or every problem in it
    Check,
    /// Log a user in at Amazon, with a browser here or anywhere, and prove that it works
    ///
    /// Through the running sidecar if there is one, else into its store
    Login(login::Login),
    /// Show who is logged in, until when, and what needs a person
    ///
    /// Exits with 1 if something does
    Status(status::Status),
    /// Find out what is wrong, whose fault it is, and what fixes it
    ///
    /// Exits with 78 if it is the configuration, else with 1
    Doctor(doctor::Doctor),
    /// Show what would be sent to Amazon for a request, and why, without a call
    Explain(explain::Explain),
    /// List, show and look for the accounts that requests can select
    #[command(subcommand)]
    Accounts(accounts::Accounts),
    /// List, show, import, export and delete users
    #[command(subcommand)]
    Users(users::Users),
    /// Create and rotate Fernet keys
    #[command(subcommand)]
    Key(key::Key),
    /// Back up and restore the store
    #[command(subcommand)]
    Store(store::Store),
    /// Try notifications
    #[command(subcommand)]
    Notify(notify::Notify),
    /// Check that the running sidecar is alive: an exec probe that needs no shell
    Health {
        /// Check that it is ready instead
        #[arg(long)]
        ready: bool,
    },
    /// Wait until the sidecar is ready, 60 seconds by default
    Wait {
        /// Give up after this long
        #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
        timeout: Duration,
    },
    /// Print the version
    Version,
    /// Write the man pages into a directory, for packages
    #[command(hide = true)]
    Manual {
        /// An existing directory
        directory: PathBuf,
    },
    /// Print completions for a shell
    Completions {
        /// bash, elvish, fish, powershell or zsh
        shell: clap_complete::Shell,
    },
}

/// How a command prints its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

/// How a command ends (sysexits.h, where that has a number).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 64,
    /// The store is held by another process.
    Held = 75,
    /// The configuration is wrong, a Fernet key among it.
    Config = 78,
}

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub struct Failed {
    exit: Exit,
    message: String,
}

/// Runs the command that `arguments` name. Says on standard error why it failed, if so.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    process::harden();
    // For as long as the process runs.
    #[cfg(feature = "failpoints")]
    let _points = fail::FailScenario::setup();
    let parsed = command().try_get_matches_from(arguments).and_then(|matches| Arguments::from_arg_matches(&matches));
    match parsed {
        Ok(arguments) => told(dispatch(arguments)),
        Err(error) => misused(&error),
    }
}

/// Says why a command failed, if it did.
pub fn told(result: Result<(), Failed>) -> Exit {
    match result {
        Ok(()) => Exit::Done,
        Err(Failed { exit, message }) => {
            let _ = writeln!(std::io::stderr(), "{message}");
            exit
        }
    }
}

/// Help and version succeed; anything else is an invalid command line.
pub fn misused(error: &clap::Error) -> Exit {
    // Nothing is left to say where the output is closed.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage } else { Exit::Done }
}

/// The commands with their arguments and help texts.
pub fn command() -> clap::Command {
    help::taught(Arguments::command())
}

fn dispatch(arguments: Arguments) -> Result<(), Failed> {
    let load = || {
        let config = config::load(&sources(arguments.config.clone(), &arguments.set)?)?;
        for warning in &config.warnings {
            warn(warning);
        }
        Ok(config)
    };
    let admin_listen = || Ok::<_, Failed>(config::admin_listen(&sources(arguments.config.clone(), &arguments.set)?)?);
    match arguments.command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let sources = sources(arguments.config, &arguments.set)?;
            serve::run(config::load(&sources)?, sources)
        }
        Command::Check => print(load()?.redacted_toml()),
        Command::Login(command) => login::run(command, load()?),
        Command::Status(command) => status::run(&command, &load()?),
        Command::Doctor(command) => doctor::run(&command, &sources(arguments.config, &arguments.set)?),
        Command::Explain(command) => explain::run(command, &load()?),
        Command::Accounts(command) => accounts::run(command, load()?),
        Command::Users(command) => users::run(command, load()?),
        Command::Key(command) => key::run(&command, load),
        Command::Store(command) => store::run(command, load()?),
        Command::Notify(command) => notify::run(&command, load()?),
        Command::Health { ready } => health::health(&admin_listen()?, ready),
        Command::Wait { timeout } => health::wait(&admin_listen()?, timeout),
        Command::Version => print(concat!("adsidecar ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::Manual { directory } => clap_mangen::generate_to(command(), &directory)
            .map_err(|error| Failed::because(format!("{}: {error}", directory.display()))),
        Command::Completions { shell } => {
            // Not written to standard output directly, because clap panics where its reader has closed it.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command(), "adsidecar", &mut script);
            print(String::from_utf8_lossy(&script))
        }
    }
}

fn sources(file: Option<PathBuf>, sets: &[String]) -> Result<Sources, Failed> {
    let pairs = sets.iter().map(|set| set.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned())));
    // The value may be a secret, so the argument is not quoted.
    let sets = pairs.collect::<Option<Vec<_>>>().ok_or(Failed {
        exit: Exit::Usage,
        message: "--set takes section.key=value, such as --set proxy.listen=127.0.0.1:8001".into(),
    })?;
    Ok(Sources { file, env: Sources::process_env(), sets })
}

/// A runtime for a command that does one thing.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(Failed::because)?.block_on(future))
}

/// Writes the output of a command. A closed standard output is no error: its reader needs no more.
pub fn print(text: impl AsRef<str>) -> Result<(), Failed> {
    print_bytes(text.as_ref().as_bytes())
}

fn print_bytes(bytes: &[u8]) -> Result<(), Failed> {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failed::because(error)),
        _ => Ok(()),
    }
}

/// Rows in aligned columns below a header.
fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect::<Vec<_>>();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// Says on standard error what was repaired.
fn warn(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "warning: {message}");
}

/// Says on standard error what to do next.
fn hint(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "hint: {message}");
}

/// What is in `file`, or on standard input for `-` and for nothing.
fn read(file: Option<&std::path::Path>, what: &str) -> Result<String, Failed> {
    match file.filter(|file| file.as_os_str() != "-") {
        Some(file) => {
            std::fs::read_to_string(file).map_err(|error| Failed::because(format!("{}: {error}", file.display())))
        }
        None => {
            if std::io::stdin().is_terminal() {
                let _ = writeln!(std::io::stderr(), "reading {what} from standard input, end with Ctrl-D:");
            }
            std::io::read_to_string(std::io::stdin()).map_err(Failed::because)
        }
    }
}

impl Failed {
    /// Failed, exit code 1.
    pub fn because(message: impl Display) -> Self {
        Self { exit: Exit::Failed, message: message.to_string() }
    }
}

impl Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ConfigErrors> for Failed {
    fn from(problems: ConfigErrors) -> Self {
        Self { exit: Exit::Config, message: problems.to_string() }
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        let exit = match error {
            StoreError::Locked { .. } => Exit::Held,
            StoreError::WrongKey { .. } | StoreError::KeyMissing { .. } | StoreError::UnsupportedSchema { .. } => {
                Exit::Config
            }
            _ => Exit::Failed,
        };
        Self { exit, message: error.to_string() }
    }
}

impl From<BuildError> for Failed {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Store(error) => error.into(),
            BuildError::Key(_) | BuildError::Setting(_) => Self { exit: Exit::Config, message: error.to_string() },
            BuildError::KeyFile { .. } | BuildError::Bind { .. } => Self::because(error),
        }
    }
}
