//! Outgoing proxies: a real squid (with and without credentials, and as one that intercepts TLS) and a real SOCKS5
//! server between adsidecar and Amazon.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::harness::{Harness, code, eventually, json, unused_address};

const PASSWORD: &str = "canary-pr0xy";
/// Where Debian keeps the servers and their helpers.
const SQUID: &str = "/usr/sbin/squid";
const CERTIFICATES: &str = "/usr/lib/squid/security_file_certgen";

/// A proxy server that ends with the test.
struct Server {
    directory: TempDir,
    port: u16,
    server: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Server {
    async fn start(configure: impl FnOnce(&Path, u16) -> Command) -> Self {
        let directory = tempfile::Builder::new().prefix("proxy").tempdir().unwrap();
        // squid, started by root, continues as a user of its own.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let port = unused_address().port();
        let command = configure(directory.path(), port);
        let program = command.get_program().to_owned();
        let server = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(&program)
            .args(command.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually(&format!("{program:?} listens"), async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await;
        Self { directory, port, server }
    }

    /// A squid with these lines in its configuration, in place of `{path}` and `{port}` its directory and port.
    async fn squid(lines: &str) -> Self {
        Self::start(|path, port| {
            let helper = path.join("helper.sh");
            let known = format!(
                "#!/bin/sh\nwhile read user word; do\n[ \"$user $word\" = \"ann {PASSWORD}\" ] && echo \
                OK || echo ERR\ndone\n"
            );
            fs::write(&helper, known).unwrap();
            fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
            let common = "pid_filename {path}/pid\ncache_log {path}/cache.log\naccess_log stdio:{path}/access.log\n\
                          cache deny all\ncoredump_dir {path}\nnetdb_filename none\nshutdown_lifetime 0 seconds\n";
            let config = format!("{common}{lines}\n").replace("{path}", path.to_str().unwrap());
            let file = path.join("squid.conf");
            fs::write(&file, config.replace("{port}", &port.to_string())).unwrap();
            let mut command = Command::new(SQUID);
            command.args(["-N", "-f"]).arg(file);
            command
        })
        .await
    }

    async fn socks(credentials: bool) -> Self {
        Self::start(|_, port| {
            let mut command = Command::new("/usr/bin/microsocks");
            command.args(["-i", "127.0.0.1", "-p", &port.to_string()]);
            if credentials {
                command.args(["-u", "ann", "-P", PASSWORD]);
            }
            command
        })
        .await
    }

    fn access_log(&self) -> String {
        fs::read_to_string(self.directory.path().join("access.log")).unwrap_or_default()
    }
}

const OPEN: &str = "http_port 127.0.0.1:{port}\nhttp_access allow all";
const CLOSED: &str = "http_port 127.0.0.1:{port}\nauth_param basic program {path}/helper.sh\n\
                      auth_param basic realm test\nacl known proxy_auth REQUIRED\nhttp_access allow known\n\
                      http_access deny all";

/// A sidecar without a login whose connections all go through `proxy`.
async fn behind(proxy: &str, sets: &[(&str, &str)]) -> Harness {
    let clock = adsidecar::domain::clock::Clock::frozen("2026-08-01T12:00:00Z".parse().unwrap());
    let own = [("upstream.proxy", proxy), ("amazon.proxy", proxy)];
    Harness::built(world::Options::calm(clock), "", &[&own, sets].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_and_requests_pass_an_http_proxy_with_and_without_credentials() {
    for (lines, user) in [(OPEN, ""), (CLOSED, "ann:canary-pr0xy@")] {
        let squid = Server::squid(lines).await;
        let harness = behind(&format!("http://{user}127.0.0.1:{}", squid.port), &[]).await;
        harness.log_in("default").await;
        for _ in 0..3 {
            assert_eq!(harness.get("/v2/profiles").await.status(), 200);
        }
        let body = harness.request(reqwest::Method::POST, "/sandbox/echo").body(vec![b'x'; 100_000]);
        assert_eq!(json(body.send().await.unwrap()).await["body_len"], 100_000);
        let authority = |origin: &str| origin.trim_start_matches("https://").trim_end_matches('/').to_owned();
        let ads = authority(&harness.sandbox.origin(world::Listener::Na).to_string());
        let lwa = authority(harness.sandbox.token_url().as_str().rsplit_once("/auth").unwrap().0);
        eventually("both hosts in squid's log", async || {
            let log = squid.access_log();
            // A tunnel is logged when it ends; that to the token endpoint has ended.
            log.contains(&format!("CONNECT {lwa} ")).then_some(())
        })
        .await;
        drop(harness);
        eventually("the tunnel to the Ads API in squid's log", async || {
            squid.access_log().contains(&format!("CONNECT {ads} ")).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_refuses_is_named_without_its_password() {
    let squid = Server::squid(CLOSED).await;
    let forbidding = Server::squid("http_port 127.0.0.1:{port}\nhttp_access deny all").await;
    let closed = unused_address().port();
    for (port, user, says) in [
        (squid.port, "", "check user and password"),
        (squid.port, "ann:wr0ng-canary@", "check user and password"),
        (forbidding.port, "ann:canary-pr0xy@", "check its rules"),
        (closed, "ann:canary-pr0xy@", "refused"),
    ] {
        // Straight to the token endpoint, so that there is a token for the request.
        let harness = Harness::set(&[("upstream.proxy", &format!("http://{user}127.0.0.1:{port}"))]).await;
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (502, "upstream_unreachable"));
        let text = answer.text().await.unwrap();
        assert!(text.contains(&format!("http://127.0.0.1:{port} (upstream.proxy)")) && text.contains(says), "{text}");
        assert!(!text.contains("canary") && !text.contains("ann"), "{text}");
        assert!(harness.ads_calls().is_empty());
        // And the token endpoint through the proxy: the refresh fails, and says why.
        let mut harness = Harness::set(&[]).await;
        harness.restart_with("amazon.proxy", &format!("http://{user}127.0.0.1:{port}")).await;
        let refreshed = harness.post("/api/auth/amazon/refresh").await;
        assert_eq!((refreshed.status().as_u16(), code(&refreshed)), (503, "token_unavailable"));
        let text = refreshed.text().await.unwrap();
        assert!(!text.contains("canary"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_intercepts_tls_is_trusted_only_by_its_ca_file() {
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "interceptor");
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = ca.self_signed(&key).unwrap();
    let files = tempfile::tempdir().unwrap();
    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let pem = files.path().join("interceptor.pem");
    fs::write(&pem, certificate.pem() + &key.serialize_pem()).unwrap();
    fs::set_permissions(&pem, fs::Permissions::from_mode(0o644)).unwrap();
    let ca_file = files.path().join("ca.pem");
    fs::write(&ca_file, certificate.pem()).unwrap();
    let database = files.path().join("db");
    let made = Command::new(CERTIFICATES).arg("-c").arg("-s").arg(&database).args(["-M", "4MB"]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    // squid's helper runs as squid's user.
    let given = Command::new("chmod").arg("-R").arg("a+rwX").arg(&database).status().unwrap();
    assert!(given.success());
    let lines = format!(
        "http_port 127.0.0.1:{{port}} ssl-bump tls-cert={} generate-host-certificates=on\n\
         sslcrtd_program {CERTIFICATES} -s {} -M 4MB\nsslcrtd_children 1\nacl first at_step SslBump1\n\
         ssl_bump peek first\nssl_bump bump all\nvia off\nforwarded_for delete\n\
         sslproxy_cert_error allow all\ntls_outgoing_options flags=DONT_VERIFY_PEER\nhttp_access allow all",
        pem.display(),
        database.display()
    );
    let squid = Server::squid(&lines).await;
    let proxy = format!("http://127.0.0.1:{}", squid.port);
    let mut harness = Harness::set(&[("upstream.proxy", &proxy)]).await;
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (502, "upstream_tls"));
    assert!(answer.text().await.unwrap().contains("upstream.ca_file"));
    assert!(harness.ads_calls().is_empty(), "no request is sent to a host that is not verified");
    harness.restart_with("upstream.ca_file", ca_file.to_str().unwrap()).await;
    let answer = harness.get("/v2/profiles").await;
    let (status, code) = (answer.status().as_u16(), code(&answer).to_owned());
    let text = answer.text().await.unwrap();
    assert_eq!((status, code.as_str()), (200, ""), "{text}, {:?}", harness.seen());
    assert_eq!(harness.seen().target, "/v2/profiles");
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_and_requests_pass_a_socks5_proxy_with_and_without_credentials() {
    for (credentials, user) in [(false, ""), (true, "ann:canary-pr0xy@")] {
        let socks = Server::socks(credentials).await;
        let harness = behind(&format!("socks5://{user}127.0.0.1:{}", socks.port), &[]).await;
        harness.log_in("default").await;
        assert_eq!(harness.get("/v2/profiles").await.status(), 200);
    }
    let socks = Server::socks(true).await;
    for user in ["", "ann:wr0ng-canary@"] {
        let harness = Harness::set(&[("upstream.proxy", &format!("socks5://{user}127.0.0.1:{}", socks.port))]).await;
        let answer = harness.get("/v2/profiles").await;
        assert_eq!((answer.status().as_u16(), code(&answer)), (502, "upstream_unreachable"));
        let text = answer.text().await.unwrap();
        assert!(text.contains(&format!("socks5://127.0.0.1:{} (upstream.proxy)", socks.port)), "{text}");
        assert!(!text.contains("canary"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_does_not_answer_is_named_when_the_time_is_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let proxy = format!("http://127.0.0.1:{port}");
    let harness = Harness::set(&[("upstream.proxy", &proxy), ("upstream.connect_timeout", "400ms")]).await;
    let answer = harness.get("/v2/profiles").await;
    assert_eq!((answer.status().as_u16(), code(&answer)), (502, "upstream_unreachable"));
    let text = answer.text().await.unwrap();
    assert!(text.contains("no tunnel within 360ms") && text.contains("(upstream.proxy)"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_goes_through_the_proxy_to_each_host_and_names_one_that_opens_no_tunnel() {
    let squid = Server::squid(CLOSED).await;
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    let diagnosed = async |user: &str| {
        let proxy = format!("http://{user}127.0.0.1:{}", squid.port);
        let sets = [format!("upstream.proxy={proxy}"), format!("amazon.proxy={proxy}")];
        let arguments = ["doctor", "-o", "json", "--set", &sets[0], "--set", &sets[1]];
        let ran = crate::commands::run(&harness, &arguments, "").await;
        assert!(!ran.out.contains(PASSWORD) && !ran.err.contains(PASSWORD), "{}{}", ran.out, ran.err);
        serde_json::from_str::<serde_json::Value>(&ran.out).unwrap()
    };
    let codes = |told: &serde_json::Value, status: &str| -> Vec<String> {
        let groups = told["groups"].as_array().unwrap().iter();
        let checks = groups.flat_map(|group| group["checks"].as_array().unwrap());
        let found = checks.filter(|check| check["status"] == status);
        found.map(|check| check["code"].as_str().unwrap().to_owned()).collect()
    };
    let refused = diagnosed("").await;
    assert_eq!(codes(&refused, "fail").iter().filter(|code| *code == "outgoing_proxy").count(), 4, "{refused}");
    assert_eq!(codes(&refused, "warn").iter().filter(|code| *code == "mcp_unreachable").count(), 3, "{refused}");

    let passed = diagnosed("ann:canary-pr0xy@").await;
    assert_eq!(codes(&passed, "fail"), Vec::<String>::new(), "{passed}");
    assert_eq!(codes(&passed, "ok").iter().filter(|code| *code == "network").count(), 7, "{passed}");
    let log = squid.access_log();
    for listener in [world::Listener::Na, world::Listener::Eu, world::Listener::McpNa, world::Listener::McpFe] {
        let origin = harness.sandbox.origin(listener).to_string();
        let authority = origin.trim_start_matches("https://").trim_end_matches('/').to_owned();
        assert!(log.lines().any(|line| line.contains("/200") && line.contains(&authority)), "{authority}: {log}");
    }
}
