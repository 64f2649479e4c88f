//! The cost of the steps of a request, and of a whole request through real sockets: `cargo bench --bench spine`.
//!
//! Times depend on the machine; the instruction counts of `tests/bench/instructions` do not.

use std::sync::Arc;
use std::time::Duration;

use adsidecar::app::App;
use adsidecar::config::{self, Sources};
use adsidecar::domain::account::{Context, Ids, Region};
use adsidecar::domain::api_families::family;
use adsidecar::domain::clock::Clock;
use adsidecar::domain::headers::{UpstreamHeaders, to_amazon};
use adsidecar::domain::throttle_mode::ThrottleMode;

use adsidecar::inbound::admission::{Admission, Settings};
use adsidecar::inbound::proxy::strip_response;
use adsidecar::inbound::request_id::RequestIds;
use adsidecar::server::Peer;
use adsidecar::telemetry::metrics::{self, Metrics};
use adsidecar::throttle::{self, Call, Entry, Memory, Throttle};
use divan::{Bencher, black_box};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use world::{CLIENT_ID, CLIENT_SECRET, Listener, Options, Sandbox};

fn main() {
    divan::main();
}

/// The headers of an SDK.
fn call() -> Parts {
    let call = Request::post("/sp/campaigns/list?count=100")
        .header("host", "localhost:8001")
        .header("user-agent", "python-requests/2.32")
        .header("accept", "application/vnd.spCampaign.v3+json")
        .header("accept-encoding", "gzip, deflate")
        .header("content-type", "application/vnd.spCampaign.v3+json")
        .header("content-length", "2")
        .header("connection", "keep-alive")
        .header("authorization", "Bearer placeholder");
    call.body(()).unwrap().into_parts().0
}

#[divan::bench(args = ["/v2/profiles", "/sp/campaigns/list", "/adm/x", "/of/no/family"])]
fn find_the_family(path: &str) -> &'static str {
    family(black_box(path)).name
}

#[divan::bench]
fn admit(bencher: Bencher<'_, '_>) {
    let (admission, call) = (Admission::new(Settings::default()), call());
    bencher.bench_local(|| admission.proxy(black_box(&call), Peer::Unix(None)).is_ok());
}

#[divan::bench]
fn name_the_call(bencher: Bencher<'_, '_>) {
    let (ids, call) = (RequestIds::default(), call());
    bencher.bench_local(|| ids.of(black_box(&call.headers)));
}

#[divan::bench]
fn headers_for_amazon(bencher: Bencher<'_, '_>) {
    let (call, mut ids) = (call(), Ids::default());
    ids.set(Context::Scope, "1234567890").unwrap();
    let bearer = HeaderValue::from_str(&format!("Bearer Atza|{}", "A".repeat(350))).unwrap();
    let client_id = HeaderValue::from_static("amzn1.x");
    let attach = UpstreamHeaders {
        family: family("/sp/campaigns/list"),
        bearer: &bearer,
        client_id: &client_id,
        ids: Some(&ids),
        fixed: &[],
    };
    bencher.bench_local(|| to_amazon(black_box(&call.headers), attach));
}

/// What the throttle costs a request in mode `observe`: before a refusal, and after one.
#[divan::bench(args = [false, true], threads = [1, 2])]
fn observe_the_limit(bencher: Bencher<'_, '_>, refused: bool) {
    let metrics = Metrics::new(metrics::Settings { max_user_series: 1 }, 0.0).unwrap();
    let memory = Arc::new(Memory::new(Clock::system(), Arc::new(metrics)));
    let settings = throttle::Settings {
        mode: ThrottleMode::Observe,
        queue_timeout: Duration::from_secs(30),
        max_waiting: 1000,
        max_waiting_bytes: 16 << 20,
        coalesce_polls: false,
        families: Vec::new(),
    };
    let throttle = Throttle::new(settings, "client", &memory);
    let (path, answer) = ("/sp/campaigns/list", HeaderMap::new());
    let send = |status| {
        let call = Call::new(Region::Na, family(path), &Method::POST, black_box(path), "account");
        let Entry::Pass(mut pass) = throttle.enter(call) else { unreachable!("observe delays no request") };
        pass.responded(status, &answer);
    };
    if refused {
        send(StatusCode::TOO_MANY_REQUESTS);
    }
    bencher.bench(|| send(StatusCode::OK));
}

#[divan::bench]
fn headers_for_the_caller(bencher: Bencher<'_, '_>) {
    let mut answer = HeaderMap::new();
    for (name, value) in [
        ("date", "Tue, 24 Nov 2026 12:00:00 GMT"),
        ("content-type", "application/json"),
        ("content-length", "1024"),
        ("connection", "keep-alive"),
        ("x-amzn-requestid", "0123456789"),
    ] {
        answer.insert(name, HeaderValue::from_static(value));
    }
    bencher.with_inputs(|| answer.clone()).bench_local_refs(strip_response);
}

/// A sandbox, an adsidecar in front of it, and one connection to adsidecar.
struct Setup {
    runtime: Runtime,
    connection: TcpStream,
    _sandbox: Sandbox,
    _directory: TempDir,
}

impl Setup {
    fn new(http2: &str) -> Self {
        let runtime = Runtime::new().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (sandbox, connection) = runtime.block_on(async {
            let sandbox = Sandbox::start(Options { http2: true, ..Options::calm(Clock::system()) }).await.unwrap();
            let refresh_token = sandbox.world(|world| {
                let consent = world.usual_consent();
                world.grant(&consent, Clock::system().now()).refresh_token
            });
            let ca = directory.path().join("ca.pem");
            sandbox.write_ca(&ca).unwrap();
            let file = directory.path().join("adsidecar.toml");
            let config = format!(
                "[proxy]\nlisten = \"127.0.0.1:0\"\n[admin]\nlisten = \"127.0.0.1:0\"\n[amazon]\nclient_id = \
                 \"{CLIENT_ID}\"\n\
                 client_secret = \"{CLIENT_SECRET}\"\nrefresh_token = {refresh_token:?}\ntoken_url = {:?}\nca_file = \
                 {ca:?}\n\
                 [store]\npath = {:?}\nfernet_keys = \"cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=\"\n\
                 [upstream]\nna = {:?}\nca_file = {ca:?}\nhttp2 = {http2:?}\n",
                sandbox.token_url(),
                directory.path().join("store"),
                sandbox.origin(Listener::Na),
            );
            std::fs::write(&file, config).unwrap();
            let sources = Sources { file: Some(file), env: Vec::new(), sets: Vec::new() };
            let config = config::load(&sources).unwrap_or_else(|problems| panic!("{problems}"));
            let app = App::build(config, Clock::system(), None).await.unwrap();
            let proxy = app.addresses().proxy[0];
            tokio::spawn(app.run(std::future::pending()));
            (sandbox, TcpStream::connect(proxy).await.unwrap())
        });
        connection.set_nodelay(true).unwrap();
        let mut setup = Self { runtime, connection, _sandbox: sandbox, _directory: directory };
        setup.call();
        setup
    }

    fn call(&mut self) {
        let connection = &mut self.connection;
        self.runtime.block_on(async {
            connection.write_all(b"GET /sandbox/bytes/1024 HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
            let (mut answer, mut read) = (vec![0; 4096], 0);
            loop {
                read += connection.read(&mut answer[read..]).await.unwrap();
                if let Some(end) = answer[..read].windows(4).position(|four| four == b"\r\n\r\n") {
                    assert!(answer.starts_with(b"HTTP/1.1 200"));
                    if read >= end + 4 + 1024 {
                        return;
                    }
                }
            }
        });
    }
}

/// The stand-in for Amazon runs in the same process, so the figure includes its cost.
#[divan::bench(args = ["never", "always"])]
fn a_call_of_1_kib(bencher: Bencher<'_, '_>, http2: &str) {
    let mut setup = Setup::new(http2);
    bencher.bench_local(|| setup.call());
}
