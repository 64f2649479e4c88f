//! A temporary PostgreSQL server: on a Unix socket, and on a loopback port with TLS.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::harness::unused_address;

/// The user `nobody`: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65534;
pub const PASSWORD: &str = "canary-p4ss";

/// A cluster that can be stopped and started again.
pub struct Cluster {
    directory: TempDir,
    binaries: PathBuf,
    pub port: u16,
    server: Option<Child>,
    settings: &'static [&'static str],
}

impl Cluster {
    /// Creates a cluster and starts it. Its superuser is `postgres`, and all roles share one password.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// As [`start`](Self::start), with more settings of the server (`name=value`).
    pub fn start_with(settings: &'static [&'static str]) -> Self {
        let directory = tempfile::Builder::new().prefix("pg").tempdir().unwrap();
        if is_root() {
            chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let port = unused_address().port();
        let mut cluster = Self { directory, binaries: binaries(), port, server: None, settings };
        let password = cluster.directory.path().join("password");
        fs::write(&password, PASSWORD).unwrap();
        let mut initdb = cluster.program("initdb");
        initdb.arg("-D").arg(cluster.data()).args(["-U", "postgres", "-A", "scram-sha-256", "--no-sync", "-E", "UTF8"]);
        let made = initdb.args(["--locale=C", "--pwfile"]).arg(&password).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        cluster.write_certificates();
        cluster.run();
        cluster
    }

    /// Starts the server again, and returns once it accepts connections.
    pub fn run(&mut self) {
        let mut server = self.program("postgres");
        server.arg("-D").arg(self.data()).arg("-k").arg(self.directory.path()).args(["-p", &self.port.to_string()]);
        let ours = ["listen_addresses=127.0.0.1", "fsync=off", "shared_buffers=16MB", "max_connections=60", "ssl=on"];
        for setting in ours.iter().chain(self.settings) {
            server.args(["-c", setting]);
        }
        let log = fs::File::create(self.directory.path().join("log")).unwrap();
        self.server = Some(server.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        let until = Instant::now() + Duration::from_secs(20);
        while !self
            .program("pg_isready")
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string()])
            .output()
            .unwrap()
            .status
            .success()
        {
            let log = fs::read_to_string(self.directory.path().join("log")).unwrap();
            assert!(Instant::now() < until, "PostgreSQL does not start: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops it like a crash: immediately, with every connection.
    pub fn crash(&mut self) {
        if let Some(mut server) = self.server.take() {
            let quit = Command::new("kill").args(["-s", "QUIT", &server.id().to_string()]).status().unwrap();
            assert!(quit.success());
            server.wait().unwrap();
        }
    }

    /// `store.postgres_url` over loopback, as the superuser.
    pub fn url(&self) -> String {
        self.url_of("postgres", "127.0.0.1", "postgres", "")
    }

    pub fn url_of(&self, user: &str, host: &str, database: &str, query: &str) -> String {
        format!("postgres://{user}:{PASSWORD}@{host}:{}/{database}{query}", self.port)
    }

    pub fn socket_directory(&self) -> &Path {
        self.directory.path()
    }

    /// The server's log since it was last started.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// The authority of the server's certificate, which names only `localhost`.
    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// A direct connection, not through adsidecar.
    pub async fn connect(&self) -> Sql {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await.unwrap();
        tokio::spawn(connection);
        Sql(Arc::new(client))
    }

    /// A command that runs a program of PostgreSQL's as a user other than root, and that ends with this process.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "QUIT"]);
        if is_root() {
            let id = NOBODY.to_string();
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        }
        command.arg(self.binaries.join(name)).current_dir(self.directory.path()).env("PGPASSWORD", PASSWORD);
        command
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn write_certificates(&self) {
        let key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = authority.self_signed(&key).unwrap();
        fs::write(self.ca_file(), certificate.pem()).unwrap();
        let issuer = rcgen::Issuer::new(authority, key);
        let own_key = KeyPair::generate().unwrap();
        let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&own_key, &issuer).unwrap();
        for (name, text) in [("server.crt", own.pem()), ("server.key", own_key.serialize_pem())] {
            let path = self.data().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            if is_root() {
                chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.crash();
    }
}

/// A connection for inspecting and changing the database.
#[derive(Clone)]
pub struct Sql(Arc<Client>);

impl Sql {
    pub async fn run(&self, statements: &str) {
        self.0.batch_execute(statements).await.unwrap_or_else(|error| panic!("{statements}: {error:?}"));
    }

    /// The first column of the first row, as text; `None` if there is no row.
    pub async fn one(&self, query: &str) -> Option<String> {
        let rows = self.0.simple_query(query).await.unwrap_or_else(|error| panic!("{query}: {error:?}"));
        rows.into_iter().find_map(|row| match row {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
            _ => None,
        })
    }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().unwrap().stdout == b"0\n"
}

/// The directory of the programs in Debian's layout: the newest version.
fn binaries() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed (tests/run installs it)");
    let newest = versions
        .map(|version| version.unwrap().path())
        .max_by_key(|path| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()).unwrap_or(0));
    newest.unwrap().join("bin")
}

/// A PgBouncer in front of a cluster, in transaction mode: each transaction may use another connection.
pub struct Bouncer {
    pub port: u16,
    process: Child,
    _directory: TempDir,
}

impl Bouncer {
    /// Starts one with this many connections to the cluster.
    pub fn before(cluster: &Cluster, connections: usize) -> Self {
        let directory = tempfile::Builder::new().prefix("pgb").tempdir().unwrap();
        let port = unused_address().port();
        let config = directory.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\npostgres = host=127.0.0.1 port={} user=postgres password={PASSWORD}\n[pgbouncer]\n\
             listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = \
             transaction\n\
             default_pool_size = {connections}\nserver_round_robin = 1\n",
            cluster.port
        );
        fs::write(&config, text).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if is_root() {
            let id = NOBODY.to_string();
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        }
        let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"].into_iter().find(|path| Path::new(path).exists());
        command.arg(program.expect("PgBouncer is installed (tests/run installs it)")).arg("--quiet").arg(&config);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "PgBouncer does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { port, process, _directory: directory }
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres:{PASSWORD}@127.0.0.1:{}/postgres", self.port)
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
