//! A real nginx as Amazon's load balancer, over TLS with HTTP/2.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::harness::{Harness, eventually, unused_address};

/// An nginx that answers every request with 200, and closes each connection after `keepalive_requests` requests.
struct Nginx {
    directory: TempDir,
    port: u16,
    server: Child,
}

impl Nginx {
    async fn start(keepalive_requests: u32) -> Self {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let directory = tempfile::Builder::new().prefix("nginx").tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        fs::write(directory.path().join("ca.pem"), made.cert.pem()).unwrap();
        fs::write(directory.path().join("key.pem"), made.signing_key.serialize_pem()).unwrap();
        let port = unused_address().port();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {path}/{kind};\n"))
            .concat();
        let config = format!(
            "daemon off; master_process off; pid {path}/pid; error_log {path}/error.log info;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; keepalive_requests {keepalive_requests}; {temporary}\n\
             server {{ listen 127.0.0.1:{port} ssl http2; ssl_certificate {path}/ca.pem;\n\
             ssl_certificate_key {path}/key.pem; location / {{ return 200 ok; }} }} }}\n"
        );
        let file = directory.path().join("nginx.conf");
        fs::write(&file, config).unwrap();
        // Debian keeps it where only root looks by default.
        let program = ["/usr/sbin/nginx", "/usr/bin/nginx"].map(PathBuf::from).into_iter().find(|path| path.exists());
        let server = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(program.expect("nginx is installed"))
            .args(["-e", &format!("{path}/start.log"), "-p", path, "-c"])
            .arg(file)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        eventually("nginx listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
        Self { directory, port, server }
    }

    /// A sidecar in front of it.
    async fn harness(&self, sets: &[(&str, &str)]) -> Harness {
        let ca = self.directory.path().join("ca.pem");
        let origin = format!("https://127.0.0.1:{}", self.port);
        let own = [("upstream.na", origin.as_str()), ("upstream.ca_file", ca.to_str().unwrap())];
        Harness::set(&[&own, sets].concat()).await
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: situation 3.
async fn an_http2_server_that_replaces_its_connections_fails_no_request() {
    const CALLERS: usize = 32;
    const EACH: usize = 100;
    let nginx = Nginx::start(100).await;
    for mode in ["auto", "always"] {
        let harness = nginx.harness(&[("upstream.http2", mode), ("upstream.response_timeout", "12s")]).await;
        let mut callers = JoinSet::new();
        for caller in 0..CALLERS {
            let (client, url) = (harness.client.clone(), harness.proxy_url("/x"));
            callers.spawn(async move {
                let mut failed = Vec::new();
                for number in 0..EACH {
                    let request = match (caller + number) % 3 {
                        0 => client.get(&url),
                        1 => client.post(&url),
                        _ => client.post(&url).body("x".repeat(number * 20)),
                    };
                    let status = request.send().await.unwrap().status().as_u16();
                    failed.extend((status != 200).then_some((number % 3, status)));
                }
                failed
            });
        }
        let failed = callers.join_all().await.concat();
        assert_eq!(failed, [], "{mode}: of {} requests", CALLERS * EACH);
    }
}
