//! The bytes of a connection, through hyper as the listeners configure it, and admission: what is admitted is framed in
//! one way only, names one `Host` of ours, and nothing that follows refused framing is ever looked at.

use std::cell::Cell;
use std::convert::Infallible;
use std::net::SocketAddr;

use adsidecar::inbound::admission::{Admission, Admitted, Refusal, Settings};
use adsidecar::inbound::destination::Destination;
use adsidecar::inbound::problem::Problem;
use adsidecar::server::Peer;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub fn check(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(converse(bytes));
}

async fn converse(bytes: &[u8]) {
    let admission = Admission::new(Settings::default());
    let refused = Cell::new(false);
    let (mut ours, theirs) = tokio::io::duplex(1 << 20);
    ours.write_all(bytes).await.unwrap();
    ours.shutdown().await.unwrap();
    let service = service_fn(|request: Request<Incoming>| {
        assert!(!refused.get(), "something behind refused framing was served");
        let (parts, body) = request.into_parts();
        let admitted = admission.proxy(&parts, Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 1))));
        let codings: Vec<_> = parts.headers.get_all("transfer-encoding").iter().collect();
        let ambiguous = codings.len() > 1 || codings.iter().any(|it| !it.as_bytes().eq_ignore_ascii_case(b"chunked"));
        assert!(admitted.is_err() || !ambiguous, "{parts:?}");
        if admitted.is_ok() {
            assert_eq!(parts.headers.get_all("host").iter().count(), 1);
        }
        if let Ok(Admitted::Upstream(target)) = &admitted {
            assert!(target.path_and_query.as_str().starts_with('/'));
            assert!(parts.uri.authority().is_some() || target.of == Destination::Local);
        }
        let refused = &refused;
        async move {
            Ok::<_, Infallible>(match admitted {
                Ok(_) => {
                    let _ = body.collect().await;
                    Response::new(Full::<Bytes>::default())
                }
                Err(rejected) => {
                    refused.set(matches!(rejected.refusal, Refusal::Framing | Refusal::NoHost));
                    Problem::from(rejected.refusal).respond("fuzz")
                }
            })
        }
    });
    let mut builder = http1::Builder::new();
    builder.half_close(true).auto_date_header(false).max_header_size(32 << 10).max_buf_size(64 << 10);
    let _ = builder.serve_connection(TokioIo::new(theirs), service).await;
    let mut answers = Vec::new();
    let _ = ours.read_to_end(&mut answers).await;
}
