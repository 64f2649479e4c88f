//! Random schedules between a rude Amazon and a rude caller: no byte of one response gets into another, and no
//! truncated body looks whole.

use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::task::JoinSet;

use crate::harness::Harness;
use crate::raw_http::{Scripted, Wire};

const SCHEDULES: u64 = 1200;
const AT_ONCE: u64 = 12;

/// SplitMix64: the same schedules in every run, each from its number.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// A size: often tiny, sometimes more than any buffer.
    fn size(&mut self) -> usize {
        let most = [1, 10, 2_000, 70_000, 400_000][self.below(5) as usize];
        self.below(most) as usize
    }
}

/// One request, and what Amazon does with it. Both sides derive it from its number, which is in the path.
#[derive(Debug)]
struct Call {
    number: u64,
    /// The length of Amazon's body.
    length: usize,
    chunked: bool,
    /// Amazon closes the connection after this many bytes of the body.
    broken_after: Option<usize>,
    /// Amazon answers before it reads the request's body.
    early: bool,
    /// The most bytes that Amazon writes at once.
    piece: usize,
    /// The length of the request's body; `None`: a GET.
    upload: Option<usize>,
    upload_chunked: bool,
    /// A line break follows the request.
    stray: bool,
    http10: bool,
    /// The request is written before the previous response was read.
    ahead: bool,
    /// The most bytes that the caller reads before a pause.
    gulp: usize,
}

impl Call {
    fn of(number: u64) -> Self {
        let random = &mut Random(number);
        let length = random.size();
        let upload = random.one_in(2).then(|| random.size());
        let http10 = random.one_in(8);
        Self {
            number,
            length,
            chunked: random.one_in(2),
            broken_after: random.one_in(5).then(|| random.below(length as u64 + 1) as usize),
            // Neither side of the call reads while it writes, so both cannot write a lot at once.
            early: random.one_in(3) && length.min(upload.unwrap_or_default()) < 20_000,
            piece: 1 + random.size().max(length / 20),
            upload,
            upload_chunked: random.one_in(2),
            stray: random.one_in(4),
            http10,
            // HTTP/1.0 has no pipelining.
            ahead: random.one_in(3) && !http10,
            gulp: 1 + random.size().max(length / 50),
        }
    }

    /// Whether the body ends where its framing says. Closing after the last byte of a length is no break.
    fn is_whole(&self) -> bool {
        self.broken_after.is_none_or(|bytes| !self.chunked && bytes == self.length)
    }

    /// Byte `at` of Amazon's body, which depends on the call.
    fn body(&self) -> Vec<u8> {
        let mut random = Random(self.number ^ 0x5555);
        std::iter::repeat_with(|| b'a' + random.below(26) as u8).take(self.length).collect()
    }

    fn request(&self) -> Vec<u8> {
        let version = if self.http10 { "1.0" } else { "1.1" };
        let method = if self.upload.is_some() { "POST" } else { "GET" };
        let mut bytes = format!("{method} /{} HTTP/{version}\r\nHost: localhost\r\n", self.number).into_bytes();
        let body = vec![b'u'; self.upload.unwrap_or_default()];
        match self.upload {
            Some(length) if self.upload_chunked && !self.http10 => {
                bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                for chunk in body.chunks(1 + length / 3) {
                    bytes.extend([format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat());
                }
                bytes.extend_from_slice(b"0\r\n\r\n");
            }
            Some(length) => bytes.extend([format!("Content-Length: {length}\r\n\r\n").as_bytes(), &body].concat()),
            None => bytes.extend_from_slice(b"\r\n"),
        }
        if self.stray {
            bytes.extend_from_slice(b"\r\n");
        }
        bytes
    }
}

/// Reads the body of a request. `None`: the connection ended.
async fn read_upload(wire: &mut Wire, head: &str) -> Option<()> {
    let head = head.to_ascii_lowercase();
    if let Some(length) = head.split("content-length: ").nth(1) {
        let length = length.split("\r\n").next()?.parse().ok()?;
        return (wire.take(length).await.len() == length).then_some(());
    }
    while head.contains("transfer-encoding: chunked") {
        let size = usize::from_str_radix(wire.until("\r\n").await?.trim(), 16).ok()?;
        wire.take(size).await;
        wire.until("\r\n").await?;
        if size == 0 {
            break;
        }
    }
    Some(())
}

/// The rude Amazon.
async fn amazon(mut wire: Wire, _: usize) {
    while let Some(head) = wire.head().await {
        let Some(number) = head.split(['/', ' ']).find_map(|word| word.parse().ok()) else { return };
        let call = Call::of(number);
        if !call.early && read_upload(&mut wire, &head).await.is_none() {
            return;
        }
        let framing =
            if call.chunked { "Transfer-Encoding: chunked".into() } else { format!("Content-Length: {}", call.length) };
        wire.send(format!("HTTP/1.1 200 OK\r\nX-Number: {number}\r\n{framing}\r\n\r\n")).await;
        let body = call.body();
        for piece in body[..call.broken_after.unwrap_or(call.length)].chunks(call.piece) {
            let framed = match call.chunked {
                true => [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat(),
                false => piece.to_vec(),
            };
            if !wire.sends(&framed).await {
                return;
            }
            tokio::task::yield_now().await;
        }
        if call.broken_after.is_some() {
            wire.end().await;
            return;
        }
        if call.chunked {
            wire.send("0\r\n\r\n").await;
        }
        if call.early && read_upload(&mut wire, &head).await.is_none() {
            return;
        }
    }
}

/// A body as far as it came, and whether it looks whole.
async fn read_body(wire: &mut Wire, call: &Call, head: &str) -> (Vec<u8>, bool) {
    let head = head.to_ascii_lowercase();
    let mut body = Vec::new();
    if let Some(length) = head.split("content-length: ").nth(1) {
        let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
        while body.len() < length {
            let piece = wire.take(call.gulp.min(length - body.len())).await;
            if piece.is_empty() {
                break;
            }
            body.extend(piece);
            tokio::task::yield_now().await;
        }
        let whole = body.len() == length;
        return (body, whole);
    }
    if !head.contains("transfer-encoding: chunked") {
        let (rest, clean) = wire.until_it_ends().await;
        return (rest.into_bytes(), clean);
    }
    loop {
        let Some(size) = wire.until("\r\n").await else { return (body, false) };
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
        let chunk = wire.take(size).await;
        let complete = chunk.len() == size;
        body.extend(chunk);
        if !complete || wire.until("\r\n").await.is_none() {
            return (body, false);
        }
        if size == 0 {
            return (body, true);
        }
    }
}

/// One connection with up to four calls. Returns the number of whole responses.
async fn schedule(address: std::net::SocketAddr, number: u64) -> usize {
    let mut random = Random(number ^ 0xaaaa);
    let calls: Vec<_> = (0..1 + random.below(4)).map(|index| Call::of(number * 4 + index)).collect();
    let socket = TcpSocket::new_v4().unwrap();
    if random.one_in(2) {
        socket.set_recv_buffer_size(4 << 10).unwrap();
    }
    let mut wire = Wire::over(socket.connect(address).await.unwrap());
    let (mut written, mut whole) = (0, 0);
    for (index, call) in calls.iter().enumerate() {
        // Write this request, and those that do not wait for a response.
        while written <= index || calls.get(written).is_some_and(|next| next.ahead && next.upload.is_none()) {
            wire.send(calls[written].request()).await;
            written += 1;
        }
        // The connection may end between two responses, and after one that announced it.
        let Some(head) = wire.head().await else { return whole };
        if head.contains("x-adsidecar-error: upstream_reset") {
            // Amazon closed its connection after an earlier response. What may have been processed is not repeated.
            assert!(call.upload.is_some(), "{number}: a request that may be repeated fails: {head}");
            return whole;
        }
        assert!(head.starts_with("HTTP/1.1 200") || head.starts_with("HTTP/1.0 200"), "{number}: {head}");
        let mark = format!("x-number: {}\r\n", call.number);
        assert!(head.to_ascii_lowercase().contains(&mark), "{number}: the response is of another call: {head}");
        let (body, looks_whole) = read_body(&mut wire, call, &head).await;
        let sent = call.body();
        assert!(sent.starts_with(&body), "{number}: call {}: another body, of {} bytes", call.number, body.len());
        assert!(!looks_whole || call.is_whole(), "{number}: call {}: a truncated body looks whole", call.number);
        assert!(!looks_whole || body == sent, "{number}: call {}: {} of {}", call.number, body.len(), sent.len());
        if !looks_whole {
            assert!(!call.is_whole(), "{number}: {} of {} bytes of {call:?}: {head}", body.len(), sent.len());
            return whole;
        }
        whole += 1;
    }
    whole
}

#[tokio::test(flavor = "multi_thread")]
async fn no_byte_of_a_response_is_lost_moved_or_added_in_thousands_of_random_schedules() {
    let amazon = Scripted::start(amazon).await;
    let sets = [("proxy.header_timeout", "2s"), ("upstream.http2", "never"), ("proxy.max_body", "none")];
    let harness = Harness::before(&amazon, &sets).await;
    let address = harness.proxy_address();
    let mut workers = JoinSet::new();
    for worker in 0..AT_ONCE {
        workers.spawn(async move {
            let mut whole = 0;
            for number in (worker..SCHEDULES).step_by(AT_ONCE as usize) {
                let ended = tokio::time::timeout(Duration::from_secs(30), schedule(address, 1 + number)).await;
                whole += ended.unwrap_or_else(|_| panic!("schedule {} hangs", 1 + number));
            }
            whole
        });
    }
    let whole: usize = workers.join_all().await.into_iter().sum();
    // About four of five calls are answered whole, unless an earlier one of the connection broke off.
    assert!(whole > SCHEDULES as usize / 2, "{whole} whole responses");
}
