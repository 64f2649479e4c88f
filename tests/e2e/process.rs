//! The process itself: what other processes can read of it, its user, its addresses, and its log of requests.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use world::{CLIENT_SECRET, Fault, Rule};

use crate::commands::{BINARY, Serving, command, stopped};
use crate::harness::{FERNET_KEY, Harness, code, eventually, unused_address};

/// An unprivileged user, `nobody` on most systems.
const NOBODY: u32 = 65534;

/// Whether this process may switch to another user: true as root in a container, false on a laptop.
fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout == b"0\n"
}

/// A sidecar that runs as an unprivileged user (as our own user if we are not root), with its secrets in the
/// environment.
async fn unprivileged(harness: &Harness) -> Serving {
    let place = harness.directory.path();
    let binary = place.join("adsidecar");
    std::fs::copy(&*BINARY, &binary).unwrap();
    let store = place.join("own");
    std::fs::create_dir(&store).unwrap();
    for open in [place, &binary, &store] {
        std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    if is_root() {
        std::os::unix::fs::chown(&store, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let mut serving = as_nobody(&binary);
    serving.args(["--set", &format!("store.path={}", store.join("store").display())]);
    serving.args(["--set", "proxy.listen=127.0.0.1:0", "--set", "admin.listen=127.0.0.1:0"]);
    serving.env("AMAZON_CLIENT_ID", "id").env("AMAZON_CLIENT_SECRET", CLIENT_SECRET).env("FERNET_KEY", FERNET_KEY);
    serving.env("ENVIRONMENT", "development").stdin(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    Serving::spawn(serving).await
}

fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().current_dir("/");
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
// Covers: threat 37.
async fn another_process_of_the_same_user_reads_neither_memory_nor_environment() {
    let harness = stopped().await;
    let serving = unprivileged(&harness).await;
    // The same check on a process that does not protect itself must succeed.
    let mut unprotected = as_nobody(Path::new("/bin/sleep")).arg("60").env("FERNET_KEY", FERNET_KEY).spawn().unwrap();
    for (process, readable) in [(unprotected.id(), true), (serving.child.id(), false)] {
        // Reading the list of mappings needs the same permission as reading the memory.
        for file in ["environ", "maps"] {
            let cat = as_nobody(Path::new("/bin/cat")).arg(format!("/proc/{process}/{file}")).output().unwrap();
            assert_eq!(cat.status.success(), readable, "{file}: {cat:?}");
            if file == "environ" {
                assert_eq!(String::from_utf8_lossy(&cat.stdout).contains(FERNET_KEY), readable);
            }
        }
    }
    unprotected.kill().unwrap();
    unprotected.wait().unwrap();
    let metrics =
        harness.client.get(format!("http://{}/metrics", serving.admin)).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("adsidecar_process_open_fds"), "the process can still read its own statistics");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
// Covers: failure 108.
async fn a_crash_leaves_no_core() {
    let harness = stopped().await;
    let mut serving = unprivileged(&harness).await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", serving.child.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "soft and hard: {core}");
    // Like a crash of the process itself; the first SIGSEGV from outside only removes Rust's own handler.
    serving.signal("ABRT");
    let mut ended = None;
    for _ in 0..2000 {
        ended = serving.child.try_wait().unwrap();
        if ended.is_some() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let ended = ended.expect("an unhandled signal ends the process");
    assert_eq!((ended.signal(), ended.core_dumped()), (Some(6), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn root_in_production_is_told_that_nothing_needs_it_and_nobody_else_is() {
    let harness = stopped().await;
    for (environment, warned) in [("production", is_root()), ("development", false)] {
        let serving =
            Serving::start(&harness, &["--set", &format!("environment={environment}"), "--set", "log.format=text"])
                .await;
        let log = serving.log.lock().unwrap().clone();
        assert_eq!(log.contains("running as root"), warned, "{log}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
// Covers: threat 5.
async fn without_a_token_no_listener_is_reachable_from_other_machines() {
    let harness = stopped().await;
    let file = harness.config_file();
    for (address, more) in [
        ("0.0.0.0:0", ""),
        ("[::]:0", ""),
        ("0.0.0.0:0", "proxy.allow_remote=true"),
        ("0.0.0.0:0", "proxy.caller_token=t"),
    ] {
        let mut refused = command(&["--config", file.to_str().unwrap(), "--set", &format!("proxy.listen={address}")]);
        if !more.is_empty() {
            refused.args(["--set", more]);
        }
        let output = refused.output().unwrap();
        assert_eq!(output.status.code(), Some(78), "{address} {more}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("can be reached by other machines"),
            "{address} {more}"
        );
    }
    let serving = Serving::start(&harness, &["--set", "proxy.listen=127.0.0.1:0,[::1]:0"]).await;
    let listening = listening(serving.child.id());
    assert!(listening.len() >= 2, "{listening:?}");
    assert!(
        listening.iter().all(|address| address == "0100007F" || address == "00000000000000000000000001000000"),
        "{listening:?}"
    );
}

/// The local addresses on which a process listens, in the kernel's notation.
fn listening(process: u32) -> Vec<String> {
    let inodes: Vec<_> = std::fs::read_dir(format!("/proc/{process}/fd"))
        .unwrap()
        .filter_map(|entry| {
            std::fs::read_link(entry.unwrap().path())
                .ok()?
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')
                .map(str::to_owned)
        })
        .collect();
    let tables = ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap());
    let rows = tables.iter().flat_map(|table| table.lines().skip(1));
    let columns = rows.map(|row| row.split_whitespace().collect::<Vec<_>>());
    let listens = columns.filter(|row| row[3] == "0A" && inodes.iter().any(|inode| inode == row[9]));
    listens.map(|row| row[1].split(':').next().unwrap().to_owned()).collect()
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
// Covers: failure 99.
async fn without_file_descriptors_it_keeps_running_and_recovers() {
    let harness = stopped().await;
    let mut starved = Command::new("/bin/sh");
    let file = harness.config_file();
    starved.args(["-c", "ulimit -n 64; exec \"$@\"", "sh", &BINARY, "serve", "--config", file.to_str().unwrap()]);
    starved.env_clear().stdin(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let mut serving = Serving::spawn(starved).await;
    serving.says("fewer descriptors than proxy.max_connections may need").await;
    // A connection from before the flood, with its own connection to Amazon.
    let mut good = TcpStream::connect(&serving.proxy).await.unwrap();
    assert_eq!(ask(&mut good).await, "HTTP/1.1 200 OK");
    let mut flood = Vec::new();
    // More connections than the process has file descriptors, but fewer than the kernel's accept queue holds.
    for _ in 0..100 {
        flood.push(TcpStream::connect(&serving.proxy).await.unwrap());
    }
    // Idle callers make room for those that have something to ask, and for their connections to Amazon.
    let mut callers = Vec::new();
    for number in 0..20 {
        let mut caller = TcpStream::connect(&serving.proxy).await.unwrap();
        assert_eq!(ask(&mut caller).await, "HTTP/1.1 200 OK", "caller {number}");
        callers.push(caller);
    }
    // A token call has a descriptor too.
    let refresh = format!("http://{}/api/auth/amazon/refresh", serving.proxy);
    for _ in 0..3 {
        let refreshed = harness.client.post(&refresh).header("host", "localhost").send().await.unwrap();
        assert_eq!(refreshed.status(), 200, "{}", refreshed.text().await.unwrap_or_default());
    }
    drop(flood);
    eventually("a new caller to be served", async || {
        let mut late = TcpStream::connect(&serving.proxy).await.ok()?;
        (ask(&mut late).await == "HTTP/1.1 200 OK").then_some(())
    })
    .await;
    assert_eq!(serving.child.try_wait().unwrap(), None, "the process is running");
}

/// A value of `/proc/PID/status`, in KiB.
#[cfg(target_os = "linux")]
fn kibibytes(serving: &Serving, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", serving.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
// Covers: failure 100.
async fn four_hundred_idle_connections_cost_little_each_and_their_number_is_bounded() {
    // What ten thousand cost is measured by hand, by `tests/bench/footprint`.
    const CONNECTIONS: u64 = 400;
    let harness = stopped().await;
    let serving = Serving::start(&harness, &["--set", "proxy.max_connections=500"]).await;
    let mut warm = TcpStream::connect(&serving.proxy).await.unwrap();
    assert_eq!(ask(&mut warm).await, "HTTP/1.1 200 OK");
    let before = kibibytes(&serving, "VmRSS");
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(&serving.proxy).await.unwrap();
        assert_eq!(ask(&mut stream).await, "HTTP/1.1 200 OK");
        idle.push(stream);
    }
    let each = kibibytes(&serving, "VmRSS").saturating_sub(before) / CONNECTIONS;
    assert!(each <= 24, "{each} KiB for each idle connection of an unoptimised build");
    for _ in 0..200 {
        let mut stream = TcpStream::connect(&serving.proxy).await.unwrap();
        assert_eq!(ask(&mut stream).await, "HTTP/1.1 200 OK", "there is always room for one more connection");
        idle.push(stream);
    }
    let metrics =
        harness.client.get(format!("http://{}/metrics", serving.admin)).send().await.unwrap().text().await.unwrap();
    let open = metrics.lines().find_map(|line| line.strip_prefix("adsidecar_connections{door=\"proxy\"} ")).unwrap();
    assert_eq!(open, "500", "600 and more came, and the cap is full");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
// Covers: threat 25.
async fn streamed_bodies_are_not_buffered() {
    let harness = stopped().await;
    let serving = Serving::start(&harness, &[]).await;
    assert_eq!(harness.client.get(serving.url("/v2/profiles")).send().await.unwrap().status(), 200);
    let before = kibibytes(&serving, "VmHWM");
    let mut download = harness.client.get(serving.url("/sandbox/bytes/67108864")).send().await.unwrap();
    let mut came = 0;
    while let Some(chunk) = download.chunk().await.unwrap() {
        came += chunk.len();
    }
    let upload = harness.client.post(serving.url("/sandbox/echo")).body(vec![b'x'; 64 << 20]).send().await.unwrap();
    assert_eq!((came, upload.status().as_u16()), (64 << 20, 200));
    let grown = kibibytes(&serving, "VmHWM") - before;
    assert!(grown < 16 << 10, "{grown} KiB more at most, for 64 MiB each way");
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[tokio::test(flavor = "multi_thread")]
async fn the_memory_of_a_burst_is_given_back_once_nothing_is_in_progress() {
    const MIB: u64 = 1 << 10;
    let harness = stopped().await;
    let serving = Serving::start(&harness, &["--set", "log.level=debug"]).await;
    let given_back = || serving.log.lock().unwrap().matches("gave free memory back").count();
    let mut idle = TcpStream::connect(&serving.proxy).await.unwrap();
    assert_eq!(ask(&mut idle).await, "HTTP/1.1 200 OK");
    // With a caller that stays connected, and once more without any.
    for round in 0..2 {
        let (before, given) = (kibibytes(&serving, "RssAnon"), given_back());
        let mut callers = Vec::new();
        for _ in 0..100 {
            let mut caller = TcpStream::connect(&serving.proxy).await.unwrap();
            caller.write_all(b"GET /sandbox/bytes/16777216 HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
            callers.push(caller);
        }
        // They read nothing, so what Amazon has sent waits here.
        let burst = eventually("a burst", async || {
            Some(kibibytes(&serving, "RssAnon")).filter(|burst| *burst > before + 12 * MIB)
        })
        .await;
        drop(callers);
        if round == 1 {
            idle.shutdown().await.unwrap();
        }
        eventually("most of it to be given back", async || {
            let left = kibibytes(&serving, "RssAnon");
            (given_back() > given && left < before + (burst - before) / 2).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 102.
async fn a_process_without_cpu_time_loses_no_request_and_resumes() {
    let harness = stopped().await;
    let serving =
        Serving::start(&harness, &["--set", "proxy.header_timeout=500ms", "--set", "upstream.response_timeout=2s"])
            .await;
    for _ in 0..3 {
        let gate = harness.sandbox.set_fault(Fault::Gate);
        let mut stream = TcpStream::connect(&serving.proxy).await.unwrap();
        stream.write_all(b"GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        gate.reached(1).await;
        serving.signal("STOP");
        // The response arrives while the process is stopped, and so does a new caller.
        gate.release();
        let late = TcpStream::connect(&serving.proxy).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        serving.signal("CONT");
        let health = harness.client.get(format!("http://{}/livez", serving.admin)).send().await.unwrap();
        assert_eq!(health.status(), 200);
        let mut first = [0; 15];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200 OK");
        let mut late = late;
        assert_eq!(ask(&mut late).await, "HTTP/1.1 200 OK");
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 103.
async fn a_panic_affects_only_its_request() {
    let harness = stopped().await;
    let file = harness.config_file();
    let mut command = command(&["serve", "--config", file.to_str().unwrap()]);
    command.env("FAILPOINTS", "spine=2*panic(canary-panic)");
    let mut serving = Serving::spawn(command).await;
    for _ in 0..2 {
        let failed = harness.client.get(serving.url("/v2/profiles")).send().await.unwrap();
        assert_eq!((failed.status().as_u16(), crate::harness::code(&failed)), (500, "internal"));
        let body = failed.text().await.unwrap();
        assert!(!body.contains("canary"), "internals are not shown to callers: {body}");
    }
    assert_eq!(harness.client.get(serving.url("/v2/profiles")).send().await.unwrap().status(), 200);
    let metrics =
        harness.client.get(format!("http://{}/metrics", serving.admin)).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("status=\"500\"} 2"), "{metrics}");
    assert_eq!(serving.child.try_wait().unwrap(), None, "the process is running");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 35.
async fn no_log_line_contains_a_secret_even_at_trace_level_and_after_a_panic() {
    let harness = stopped().await;
    let file = harness.config_file();
    let mut command = command(&[
        "serve",
        "--config",
        file.to_str().unwrap(),
        "--set",
        "log.level=trace",
        "--set",
        "log.audit=true",
        "--set",
        "proxy.caller_token=canary-caller-token",
    ]);
    command.env("FAILPOINTS", "spine=1*panic(x)").env("RUST_BACKTRACE", "full").env("RUST_LOG", "trace");
    let serving = Serving::spawn(command).await;
    let call = |path: &str| {
        let request = harness.client.post(serving.url(path)).header("X-Ads-Sidecar-Token", "canary-caller-token");
        request.header("Cookie", "canary-cookie").body("canary-body")
    };
    for path in [
        "/v2/profiles?canary=canary-query",
        "/v2/profiles",
        "/sandbox/status/401",
        "/sandbox/status/403",
        "/api/auth/amazon/refresh",
        "/auth/o2/token",
    ] {
        call(path).send().await.unwrap();
    }
    for fault in [Fault::Reset, Fault::BadJson, Fault::Html, Fault::CloseMidBody] {
        harness.sandbox.set_fault(Rule::from(fault).always());
        let _ = call("/sandbox/bytes/1000").send().await.map(|answer| answer.text());
        call("/api/auth/amazon/refresh").send().await.unwrap();
        harness.sandbox.clear_faults();
    }
    let wrong = harness
        .client
        .get(serving.url("/v2/profiles"))
        .header("Authorization", "Bearer canary-guess")
        .send()
        .await
        .unwrap();
    assert_eq!(wrong.status(), 407);
    serving.says("a step panicked").await;
    let log = serving.log.lock().unwrap().clone();
    assert!(log.lines().count() > 20, "{log}");
    for secret in ["canary", "Atza|", "Atzr|", "Bearer", CLIENT_SECRET, FERNET_KEY, "gAAAA"] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

/// The status line of one request on this connection.
async fn ask(stream: &mut TcpStream) -> String {
    stream.write_all(b"GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.ends_with(b"}") {
        match stream.read(&mut buffer).await {
            Ok(count @ 1..) => answer.extend_from_slice(&buffer[..count]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_has_one_line_for_each_request_and_no_secrets() {
    let harness = stopped().await;
    let sets = ["--set", "log.audit=true", "--set", "log.level=error", "--set", "log.format=json"];
    let mut config = std::fs::read_to_string(harness.config_file()).unwrap();
    config.push_str("\n[[account]]\nname = \"brand\"\nread_only = true\nprofile_id = \"3012345678901234561\"\n");
    std::fs::write(harness.config_file(), config).unwrap();
    let serving = audited(&harness, &sets).await;
    let get = |path: &str| harness.client.get(serving.url(path)).header("X-Request-Id", "r-1");
    assert_eq!(get("/a/brand/v2/profiles?canary=canary-query").send().await.unwrap().status(), 200);
    assert_eq!(get("/api/auth/amazon/status").send().await.unwrap().status(), 200, "which is not a proxied request");
    let denied =
        harness.client.post(serving.url("/sp/campaigns/canary-path")).body("canary-body").send().await.unwrap();
    assert_eq!(denied.status(), 403);
    harness.sandbox.set_fault(Fault::Reset);
    assert_eq!(harness.client.post(serving.url("/a/brand/sp/x/list")).send().await.unwrap().status(), 502);
    let refused = get("/v2/profiles").header("Origin", "https://canary-origin.example").send().await.unwrap();
    assert_eq!(refused.status(), 403);
    eventually("four lines", async || {
        (serving.log.lock().unwrap().matches("adsidecar::audit").count() >= 4).then_some(())
    })
    .await;
    let log = serving.log.lock().unwrap().clone();
    for secret in ["canary", "Atza|", "Bearer", CLIENT_SECRET, FERNET_KEY, "3012345678901234561"] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
    let lines: Vec<Value> = log
        .lines()
        .filter(|line| line.contains("adsidecar::audit"))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 4, "{log}");
    let told = |line: usize, field: &str| lines[line][field].as_str().unwrap_or_default().to_owned();
    let said = |line: usize| {
        ["account", "user", "region", "method", "family", "source", "code", "fault"]
            .map(|field| told(line, field))
            .join(" ")
    };
    assert_eq!(said(0), "brand default na GET profiles amazon  ");
    assert_eq!((told(0, "request_id"), lines[0]["status"].as_u64()), ("r-1".into(), Some(200)));
    assert!(!told(0, "amazon_request_id").is_empty(), "{log}");
    assert!(lines[0]["took_ms"].as_f64().unwrap() >= lines[0]["amazon_ms"].as_f64().unwrap());
    assert!(lines[0]["amazon_ms"].as_f64().unwrap() > 0.0 && !told(0, "timestamp").is_empty());
    assert_eq!(said(1), "brand default na POST sponsored_products sidecar policy_denied caller");
    assert_eq!(said(2), "brand default na POST sponsored_products sidecar upstream_reset amazon");
    assert_eq!(said(3), "   GET  sidecar cross_site caller");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_client_and_a_missing_login_are_audited_as_operator_errors() {
    let harness = stopped().await;
    let store = format!("store.path={}", harness.directory.path().join("other").display());
    let sets = ["log.audit=true", "log.level=error", "log.format=json", "amazon.client_secret=not-the-secret"];
    let sets = sets.into_iter().chain(["amazon.refresh_token=Atzr|a-refresh-token", &store]);
    let sets: Vec<_> = sets.flat_map(|set| ["--set", set]).collect();
    let serving = audited(&harness, &sets).await;
    let get = || harness.client.get(serving.url("/v2/profiles"));
    assert_eq!(code(&get().send().await.unwrap()), "token_unavailable");
    assert_eq!(code(&get().header("X-Ads-User", "nobody").send().await.unwrap()), "login_required");
    eventually("two lines", async || {
        (serving.log.lock().unwrap().matches("adsidecar::audit").count() >= 2).then_some(())
    })
    .await;
    let log = serving.log.lock().unwrap().clone();
    let lines = log.lines().filter(|line| line.contains("adsidecar::audit"));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    let said: Vec<_> = lines.iter().map(|line| (line["code"].as_str(), line["fault"].as_str())).collect();
    assert_eq!(said, [(Some("token_unavailable"), Some("operator")), (Some("login_required"), Some("operator"))]);
}

/// At level `error` it does not log its addresses, so they are chosen in advance.
async fn audited(harness: &Harness, sets: &[&str]) -> Serving {
    let proxy = unused_address().to_string();
    let file = harness.config_file();
    let listen = format!("proxy.listen={proxy}");
    let mut command = command(&[&["serve", "--config", file.to_str().unwrap(), "--set", &listen], sets].concat());
    let serving = Serving::told(command.spawn().unwrap(), proxy.clone(), String::new());
    eventually("the listener", async || TcpStream::connect(&proxy).await.ok().map(drop)).await;
    serving
}

/// What systemd gives a service of `Type=notify`: a datagram socket for its state.
#[tokio::test(flavor = "multi_thread")]
// Covers: situation 26.
async fn systemd_is_told_when_it_serves_and_when_it_stops() {
    let harness = stopped().await;
    let path = harness.directory.path().join("notify.sock");
    let abstract_name = format!("@adsidecar-test-{}", std::process::id());
    for name in [path.to_str().unwrap(), &abstract_name] {
        let socket = match name.strip_prefix('@') {
            Some(name) => {
                let address =
                    <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name);
                std::os::unix::net::UnixDatagram::bind_addr(&address.unwrap()).unwrap()
            }
            None => std::os::unix::net::UnixDatagram::bind(name).unwrap(),
        };
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut serve = command(&["serve", "--config", harness.config_file().to_str().unwrap()]);
        serve.env("NOTIFY_SOCKET", name);
        let mut serving = Serving::spawn(serve).await;
        let mut buffer = [0; 64];
        let mut told = || {
            let count = socket.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..count].to_vec()).unwrap()
        };
        assert_eq!(told(), "READY=1");
        let ready = harness.client.get(format!("http://{}/readyz", serving.admin)).send().await.unwrap();
        assert_eq!(ready.status(), 200, "it is ready when it says so");
        serving.signal("TERM");
        assert_eq!(told(), "STOPPING=1");
        assert_eq!(serving.ended().await.0, Some(0));
    }
    // A socket that is gone stops nothing.
    let mut serve = command(&["serve", "--config", harness.config_file().to_str().unwrap()]);
    serve.env("NOTIFY_SOCKET", "/nowhere/notify.sock");
    let serving = Serving::spawn(serve).await;
    serving.says("systemd was not told READY=1").await;
}
