//! Compares the Amazon identities of two grants. LWA does not tell whose a grant is, but the profiles it reaches do.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::HeaderValue;
use http::{HeaderMap, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;

use crate::domain::account::{AmazonHost, Region};
use crate::domain::api_families::family;
use crate::domain::headers::{UpstreamHeaders, to_amazon};
use crate::upstream::{RequestBody, Reuse, Upstream};

/// An endpoint that needs neither a scope header nor an account ("Profiles", Amazon Ads API).
const PROFILES: &str = "/v2/profiles";
/// Timeout of the whole comparison: a person is waiting in a browser.
const PATIENCE: Duration = Duration::from_secs(10);
/// Maximum response body. A profile takes half a kilobyte, and large agencies have thousands.
const MAX_BODY: usize = 16 << 20;

/// Compares grants by the profiles that each reaches, as listed by the Ads API.
#[derive(Clone, Debug)]
pub struct Identity {
    upstream: Arc<Upstream>,
    client_id: HeaderValue,
}

/// The part of a profile used here. The id is a 64-bit number.
#[derive(Deserialize)]
struct Profile {
    #[serde(rename = "profileId")]
    id: serde_json::Number,
}

impl Identity {
    /// Creates the comparison; its requests go through `upstream` with this client id.
    pub fn new(upstream: Arc<Upstream>, client_id: HeaderValue) -> Self {
        Self { upstream, client_id }
    }

    /// Whether the grants of two bearer tokens certainly belong to different identities: each reaches profiles, and
    /// they have none in common. Returns `false` if a region does not respond.
    pub async fn differs(&self, one: &HeaderValue, other: &HeaderValue) -> bool {
        let both = Box::pin(async { tokio::join!(self.profiles(one), self.profiles(other)) });
        match tokio::time::timeout(PATIENCE, both).await {
            Ok((Some(one), Some(other))) => !one.is_empty() && !other.is_empty() && one.is_disjoint(&other),
            _ => false,
        }
    }

    /// The ids of all profiles in all regions; `None` if any region fails.
    async fn profiles(&self, bearer: &HeaderValue) -> Option<HashSet<String>> {
        let [na, eu, fe] = Region::ALL.map(|region| self.profiles_in(region, bearer));
        let (na, eu, fe) = tokio::join!(na, eu, fe);
        Some(na?.into_iter().chain(eu?).chain(fe?).collect())
    }

    async fn profiles_in(&self, region: Region, bearer: &HeaderValue) -> Option<Vec<String>> {
        let attach =
            UpstreamHeaders { family: family(PROFILES), bearer, client_id: &self.client_id, ids: None, fixed: &[] };
        let mut request = Request::new(RequestBody::empty());
        *request.uri_mut() = Uri::from_static(PROFILES);
        *request.headers_mut() = to_amazon(&HeaderMap::new(), attach);
        let host = AmazonHost::ads(region);
        let response = self.upstream.send(host, Reuse::Fresh(Instant::now()), request).await.ok()?;
        if response.status() != StatusCode::OK {
            return None;
        }
        let body: Bytes = Limited::new(response.into_body(), MAX_BODY).collect().await.ok()?.to_bytes();
        let profiles: Vec<Profile> = serde_json::from_slice(&body).ok()?;
        Some(profiles.into_iter().map(|profile| profile.id.to_string()).collect())
    }
}
