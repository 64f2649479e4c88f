//! Invalid certificate chains, for Login with Amazon and for the Ads hosts: none is accepted. Proxies from the
//! environment: none is used.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use reqwest::Method;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use world::Listener;

use crate::harness::{Harness, code, eventually, json};
use crate::raw_http::{Reply, Wire};

type Authority = CertifiedIssuer<'static, KeyPair>;

/// A server with a given chain, which counts the clients that completed its handshake and sent data.
struct Server {
    origin: String,
    spoken_to: Arc<AtomicUsize>,
}

fn authority(change: impl FnOnce(&mut CertificateParams)) -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    change(&mut params);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate for `name`, with modifications, and its key.
fn leaf(issuer: &Authority, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Chain {
    let mut params = CertificateParams::new([name.to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    (vec![params.signed_by(&key, issuer).unwrap().der().clone()], key)
}

type Chain = (Vec<CertificateDer<'static>>, KeyPair);

async fn serve((chain, key): Chain) -> Server {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let tls = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("https://{}", listener.local_addr().unwrap());
    let spoken_to = Arc::new(AtomicUsize::new(0));
    let counted = spoken_to.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, counted) = (tls.clone(), counted.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = tls.accept(stream).await else { return };
                let mut bytes = [0; 4096];
                if stream.read(&mut bytes).await.is_ok_and(|count| count > 0) {
                    counted.fetch_add(1, Ordering::SeqCst);
                    let body = "{\"access_token\":\"Atza|x\",\"refresh_token\":\"Atzr|x\",\"expires_in\":3600}";
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                    let _ = stream.write_all((head + body).as_bytes()).await;
                }
            });
        }
    });
    Server { origin, spoken_to }
}

/// The chains by their defect. The first one is valid, which shows that the others are rejected for their defect.
fn chains(root: &Authority) -> Vec<(&'static str, Chain)> {
    let here = "127.0.0.1";
    let stranger = authority(|_| {});
    let no_authority = {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::NoCa;
        CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), root).unwrap()
    };
    let elsewhere_only = {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.name_constraints = Some(rcgen::NameConstraints {
            permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName("evil.test".into())],
            excluded_subtrees: vec![rcgen::GeneralSubtree::IpAddress(rcgen::CidrSubnet::V4(
                [127, 0, 0, 0],
                [255, 0, 0, 0],
            ))],
        });
        CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), root).unwrap()
    };
    let below = |issuer: &Authority| {
        let (mut chain, key) = leaf(issuer, here, |_| {});
        chain.push(issuer.der().clone());
        (chain, key)
    };
    let signed_itself = {
        let key = KeyPair::generate().unwrap();
        let made = CertificateParams::new([here.to_owned()]).unwrap().self_signed(&key).unwrap();
        (vec![made.der().clone()], key)
    };
    vec![
        ("good", leaf(root, here, |_| {})),
        ("of an unknown authority", leaf(&stranger, here, |_| {})),
        ("self-signed", signed_itself),
        ("for another name", leaf(root, "evil.test", |_| {})),
        ("for another address", leaf(root, "127.0.0.2", |_| {})),
        ("expired", leaf(root, here, |params| params.not_after = date_time_ymd(2020, 1, 1))),
        ("not valid yet", leaf(root, here, |params| params.not_before = date_time_ymd(2090, 1, 1))),
        (
            "for client authentication",
            leaf(root, here, |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
        ),
        ("signed by a certificate that is not an authority", below(&no_authority)),
        ("of an authority that is not permitted to sign this name", below(&elsewhere_only)),
    ]
}

fn trusted(root: &Authority) -> (TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("root.pem");
    std::fs::write(&path, root.pem()).unwrap();
    (directory, path.to_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 33.
// Covers: situation 14.
// Covers: situation 15.
async fn no_invalid_chain_of_an_ads_host_is_accepted() {
    let root = authority(|_| {});
    let (_directory, ca_file) = trusted(&root);
    for (what, chain) in chains(&root) {
        let server = serve(chain).await;
        let harness = Harness::set(&[("upstream.na", &server.origin), ("upstream.ca_file", &ca_file)]).await;
        let answer = harness.request(Method::POST, "/x").body("b").send().await.unwrap();
        let (said, spoken) = (code(&answer).to_owned(), server.spoken_to.load(Ordering::SeqCst));
        let expected = if what == "good" { ("", 1) } else { ("upstream_tls", 0) };
        assert_eq!((said.as_str(), spoken), expected, "{what}");
        if what != "good" {
            let detail = json(answer).await["detail"].as_str().unwrap().to_owned();
            let wrong_clock = ["expired", "not valid yet"].contains(&what);
            assert_eq!(detail.contains("this machine's clock says"), wrong_clock, "{what}: {detail}");
            assert_eq!(detail.contains("upstream.ca_file"), !wrong_clock, "{what}: {detail}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// Covers: failure 20.
// Covers: situation 15.
async fn no_invalid_chain_of_the_token_endpoint_is_accepted() {
    let root = authority(|_| {});
    let (_directory, ca_file) = trusted(&root);
    // In parallel: each waits a second for the retry of its failed refresh.
    join_all(chains(&root).into_iter().map(|(what, chain)| refreshes_only_behind_the_good_one(what, chain, &ca_file)))
        .await;
}

async fn refreshes_only_behind_the_good_one(what: &str, chain: Chain, ca_file: &str) {
    let server = serve(chain).await;
    let mut harness = Harness::set(&[]).await;
    // The current token expires, and only this endpoint can issue another one.
    harness.stop_sidecar().await;
    harness.advance(3600);
    harness.sets = vec![
        ("amazon.token_url".into(), format!("{}/auth/o2/token", server.origin)),
        ("amazon.ca_file".into(), ca_file.to_owned()),
    ];
    harness.start_sidecar().await;
    let refreshed = json(harness.post("/api/auth/amazon/refresh").await).await;
    let spoken = server.spoken_to.load(Ordering::SeqCst);
    let state = if what == "good" { &refreshed["state"] } else { &refreshed["user"]["state"] };
    assert_eq!(*state, if what == "good" { "fresh" } else { "failing" }, "{what}: {refreshed}");
    assert_eq!(spoken > 0, what == "good", "{what}: neither the secret nor the grant is sent");
    // The cause and its cure are in the response.
    let (detail, wrong_clock) =
        (refreshed["detail"].as_str().unwrap_or_default(), ["expired", "not valid yet"].contains(&what));
    assert_eq!(detail.contains("this machine's clock says"), wrong_clock, "{what}: {detail}");
    assert_eq!(detail.contains("amazon.ca_file"), what != "good" && !wrong_clock, "{what}: {detail}");
}

#[tokio::test(flavor = "multi_thread")]
// Covers: threat 32.
async fn no_proxy_from_the_environment_is_used() {
    let trap = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = trap.local_addr().unwrap();
    let caught = Arc::new(AtomicUsize::new(0));
    let counted = caught.clone();
    tokio::spawn(async move {
        while trap.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    // A grant whose access token has expired: both the token endpoint and an Ads host are called.
    let mut harness = Harness::with_running_clock("").await;
    harness.log_in("default").await;
    harness.stop_sidecar().await;
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        harness.sandbox.world(|world| world.expire_access_tokens());
        harness.sandbox.clear_history();
        let mut command = Command::new(env!("CARGO_BIN_EXE_adsidecar"));
        command.args(["--config", harness.config_file().to_str().unwrap(), "--set", "log.format=text"]);
        for spelled in [name.to_owned(), name.to_lowercase()] {
            command.env(spelled, format!("http://{address}"));
        }
        let socket = harness.directory.path().join(format!("{name}.sock"));
        command.arg("--set").arg(format!("proxy.listen=unix:{}", socket.display()));
        let mut running = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The socket file exists shortly before the process listens on it.
        eventually("the listener", async || tokio::net::UnixStream::connect(&socket).await.ok()).await;
        let mut wire = Wire::unix(&socket).await;
        for method in ["POST /api/auth/amazon/refresh", "GET /v2/profiles"] {
            wire.send(format!("{method} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")).await;
            let answer: Reply = wire.reply().await;
            assert_eq!(answer.status, 200, "{name} {method}: {answer:?}");
        }
        running.kill().unwrap();
        running.wait().unwrap();
        assert_eq!((harness.sandbox.refreshes(), harness.sandbox.calls(Listener::Na).len()), (1, 1), "{name}");
    }
    assert_eq!(caught.load(Ordering::SeqCst), 0);
}
