//! Raw HTTP/1.1: a client that sends exactly the bytes of a test, and a scripted Amazon that does the same.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// The limit for every wait.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `holds` returns true, and fails after the limit.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// One end of a connection.
pub struct Wire {
    stream: Box<dyn Stream>,
    came: Vec<u8>,
    http2: bool,
    resumed: bool,
}

/// A response.
#[derive(Debug)]
pub struct Reply {
    pub version: String,
    pub status: u16,
    /// The names in lower case, in order.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body was complete according to its framing.
    pub whole: bool,
}

impl Wire {
    pub async fn dial(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).await.unwrap())
    }

    pub async fn unix(path: &Path) -> Self {
        Self::over(UnixStream::connect(path).await.unwrap())
    }

    /// A client on a connection that the test opened.
    pub fn over(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self { stream: Box::new(stream), came: Vec::new(), http2: false, resumed: false }
    }

    /// Whether ALPN selected HTTP/2 on this connection to a scripted Amazon.
    pub fn is_http2(&self) -> bool {
        self.http2
    }

    /// Whether this connection to a scripted Amazon resumed a TLS session.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Writes. If the peer has closed the connection, the next read shows it.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref()).await;
        let _ = self.stream.flush().await;
    }

    /// Writes, and returns whether the peer still accepts data.
    pub async fn sends(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).await.is_ok() && self.stream.flush().await.is_ok()
    }

    /// Writes, and discards incoming data meanwhile: two ends that both write without reading would deadlock.
    pub async fn floods(&mut self, bytes: &[u8]) {
        let (mut reader, mut writer) = tokio::io::split(&mut self.stream);
        let flood = async {
            let _ = writer.write_all(bytes).await;
            let _ = writer.flush().await;
        };
        let mut sink = tokio::io::sink();
        tokio::select! {
            () = flood => {}
            _ = tokio::io::copy(&mut reader, &mut sink) => {}
        }
    }

    /// Closes gracefully: over TLS, with a close_notify.
    pub async fn end(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    /// Reads more; returns false at the end of the stream, graceful or not.
    async fn more(&mut self) -> bool {
        let mut buffer = vec![0; 16 << 10];
        let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut buffer)).await;
        let count = read.expect("the peer neither sent data nor closed the connection").unwrap_or(0);
        self.came.extend_from_slice(&buffer[..count]);
        count > 0
    }

    /// Everything up to and including `mark`; `None` if the stream ends before.
    pub async fn until(&mut self, mark: &str) -> Option<String> {
        loop {
            if let Some(at) = self.came.windows(mark.len()).position(|window| window == mark.as_bytes()) {
                let text = self.came.drain(..at + mark.len()).collect();
                return Some(String::from_utf8(text).unwrap());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    /// The head of a request, for a scripted Amazon.
    pub async fn head(&mut self) -> Option<String> {
        self.until("\r\n\r\n").await
    }

    /// Exactly `count` bytes, or fewer if the stream ends.
    pub async fn take(&mut self, count: usize) -> Vec<u8> {
        while self.came.len() < count && self.more().await {}
        let there = self.came.len().min(count);
        self.came.drain(..there).collect()
    }

    /// The next response.
    pub async fn reply(&mut self) -> Reply {
        let mut reply = self.reply_head().await;
        let chunked = reply.header("transfer-encoding").is_some();
        let length = reply.header("content-length").map(|length| length.parse::<usize>().unwrap());
        match length {
            _ if matches!(reply.status, 100..=199 | 204 | 304) => {}
            _ if chunked => (reply.body, reply.whole) = self.chunks().await,
            Some(length) => {
                reply.body = self.take(length).await;
                reply.whole = reply.body.len() == length;
            }
            None => {
                while self.more().await {}
                reply.body = std::mem::take(&mut self.came);
            }
        }
        reply
    }

    /// The head of the next response only: for a response to `HEAD`, or one whose body the test reads itself.
    pub async fn reply_head(&mut self) -> Reply {
        let head = self.head().await.expect("a response arrived before the connection closed");
        let mut lines = head.trim_end().split("\r\n");
        let (version, rest) = lines.next().unwrap().split_once(' ').unwrap();
        let headers = lines.map(|line| line.split_once(':').unwrap());
        Reply {
            version: version.to_owned(),
            status: rest[..3].parse().unwrap(),
            headers: headers.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).collect(),
            body: Vec::new(),
            whole: true,
        }
    }

    async fn chunks(&mut self) -> (Vec<u8>, bool) {
        let mut body = Vec::new();
        loop {
            let Some(size) = self.until("\r\n").await else { return (body, false) };
            let size = usize::from_str_radix(size.trim(), 16).unwrap();
            body.extend(self.take(size).await);
            if self.until("\r\n").await.is_none() {
                return (body, false);
            }
            if size == 0 {
                return (body, true);
            }
        }
    }

    /// Everything until the peer closes the connection.
    pub async fn everything(&mut self) -> String {
        while self.more().await {}
        String::from_utf8_lossy(&std::mem::take(&mut self.came)).into_owned()
    }

    /// Everything until the connection ends, and whether it ended cleanly instead of by a reset.
    pub async fn until_it_ends(&mut self) -> (String, bool) {
        let mut buffer = vec![0; 64 << 10];
        let clean = loop {
            let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut buffer)).await;
            match read.expect("the peer neither sent data nor closed the connection") {
                Ok(0) => break true,
                Ok(count) => self.came.extend_from_slice(&buffer[..count]),
                Err(_) => break false,
            }
        };
        (String::from_utf8_lossy(&std::mem::take(&mut self.came)).into_owned(), clean)
    }

    /// Whether the peer closes the connection without sending another byte.
    pub async fn closes(&mut self) -> bool {
        self.came.is_empty() && !self.more().await
    }
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn names(&self) -> Vec<&str> {
        self.headers.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The status, and the error code if adsidecar itself responded.
    pub fn said(&self) -> (u16, &str) {
        (self.status, self.header("x-adsidecar-error").unwrap_or_default())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

/// A scripted Amazon, on TLS with its own certificate.
pub struct Scripted {
    pub origin: String,
    directory: TempDir,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Scripted {
    /// Runs `script` on each connection, with the connection's number, starting at 1.
    pub async fn start<F, Fut>(script: F) -> Self
    where
        F: Fn(Wire, usize) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        Self::speaking(&[], script).await
    }

    /// As above, with the protocols to offer through ALPN, such as `h2`.
    pub async fn speaking<F, Fut>(protocols: &[&str], script: F) -> Self
    where
        F: Fn(Wire, usize) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        Self::accepting(rustls::DEFAULT_VERSIONS, protocols, script).await
    }

    /// As above, over these versions of TLS.
    pub async fn accepting<F, Fut>(
        versions: &[&'static rustls::SupportedProtocolVersion],
        protocols: &[&str],
        script: F,
    ) -> Self
    where
        F: Fn(Wire, usize) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), made.cert.pem()).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let tls = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("https://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = connections.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let number = counted.fetch_add(1, Ordering::SeqCst) + 1;
                let Ok(stream) = tls.accept(stream).await else { continue };
                let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
                tokio::spawn(script(Wire { http2, resumed, ..Wire::over(stream) }, number));
            }
        });
        Self { origin, directory, connections, task }
    }

    /// Responds to every request without a body with these bytes.
    pub async fn saying(answer: &'static str) -> Self {
        Self::start(move |mut wire, _| async move {
            while wire.head().await.is_some() {
                wire.send(answer).await;
            }
        })
        .await
    }

    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// The number of connections accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}
