//! The sandbox's state: which clients exist, which users consented, which tokens are valid, what the Ads API contains.
//!
//! Plain data without HTTP. Tests set it up before a call and inspect it afterwards.
//!
//! The file is long because every change of this state is made in one place, so that a restart finds all of them.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::catalogue::Catalogue;
use super::fault::Faults;
use super::history::History;
use super::jobs::Jobs;
use super::limits::Limits;

/// The client id of the seeded client.
pub const CLIENT_ID: &str = "amzn1.application-oa2-client.sandbox";
/// The secret of the seeded client.
pub const CLIENT_SECRET: &str = "amzn1.oa2-cs.v1.sandbox-secret";
/// The return URL of the seeded client: adsidecar's own default.
pub const RETURN_URL: &str = "http://localhost:8001/api/auth/amazon/callback";
/// The scope that the Ads API asks for.
pub const SCOPE: &str = "advertising::campaign_management";

/// "Authorization codes are valid for 5 minutes."
const CODE_LIFE: SignedDuration = SignedDuration::from_mins(5);
/// "Access tokens are valid for 60 minutes", `expires_in: 3600`.
const ACCESS_LIFE_SECONDS: u32 = 3600;
/// Random bytes in an access token. LWA promises 350 characters or more; these make 357.
const ACCESS_BYTES: usize = 264;
/// Grants given on or after this day expire after [`CONSENT_LIFE`], even if they are refreshed.
const CONSENT_ENDS_SINCE: &str = "2026-07-30T00:00:00Z";
/// 365 days after the consent.
const CONSENT_LIFE: SignedDuration = SignedDuration::from_hours(365 * 24);

/// All state of the sandbox, behind one lock.
#[derive(Debug)]
pub struct World {
    /// The LWA clients ("security profiles").
    pub clients: Vec<Client>,
    /// Every grant that a user gave a client, including revoked ones.
    pub grants: Vec<Grant>,
    /// The advertisers, their profiles, AMC accounts, campaigns and reports.
    pub catalogue: Catalogue,
    /// Lifetime of an access token in seconds: 3600.
    pub access_life: u32,
    codes: HashMap<String, Code>,
    access: HashMap<String, Access>,
    /// Where in `grants` a refresh token is: they are never removed.
    places: HashMap<String, usize>,
    /// What has changed since it was last written to disk; none if nothing is written.
    changes: Option<Vec<Change>>,
    pub(super) history: History,
    pub(super) faults: Faults,
    pub(super) limits: Limits,
    pub(super) jobs: Jobs,
}

/// One LWA client.
#[derive(Clone, Debug)]
pub struct Client {
    /// The client id.
    pub id: String,
    /// The valid secrets; two during a rotation.
    pub secrets: Vec<String>,
    /// The Allowed Return URLs, compared byte for byte, including the query.
    pub return_urls: Vec<String>,
    /// The scopes that the client is approved for.
    pub scopes: Vec<String>,
}

/// One user's permission for one client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Grant {
    /// `Atzr|…`
    pub refresh_token: String,
    /// The client that received the grant; no other client can use it.
    pub client_id: String,
    /// The scopes, separated by spaces.
    pub scope: String,
    /// The advertiser that consented: [`Advertiser::id`](super::catalogue::Advertiser).
    pub advertiser: String,
    /// The time of the consent.
    pub consented_at: Timestamp,
    /// Whether the user has revoked it, or a rotation has replaced it.
    pub revoked: bool,
}

/// An access token that has not expired.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Access {
    /// The client that requested it.
    pub client_id: String,
    /// The advertiser that it acts for.
    pub advertiser: String,
    /// The time when it expires.
    pub expires_at: Timestamp,
    /// The time when it was issued.
    pub issued_at: Timestamp,
}

/// A consent that a user gave on the consent page.
#[derive(Clone, Debug)]
pub struct Consent {
    /// The client.
    pub client_id: String,
    /// The URI that receives the code; the exchange must name the same one.
    pub redirect_uri: String,
    /// The scopes, separated by spaces.
    pub scope: String,
    /// The advertiser that consented.
    pub advertiser: String,
    /// The PKCE challenge.
    pub challenge: Option<Challenge>,
}

/// A PKCE challenge (RFC 7636).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// The verifier itself: what LWA assumes when no method is named.
    Plain(String),
    /// The base64url SHA-256 of the verifier.
    S256(String),
}

#[derive(Debug)]
struct Code {
    consent: Consent,
    expires_at: Timestamp,
}

/// The credentials of a token request, not yet verified.
pub(super) struct Credentials<'a> {
    pub(super) client_id: &'a str,
    pub(super) client_secret: &'a str,
}

/// How a response of the token endpoint differs from the usual one.
#[derive(Default)]
pub(super) struct Twist {
    pub(super) life: Option<u32>,
    pub(super) rotate: bool,
}

/// What outlives a restart.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    grants: Vec<Grant>,
    access: HashMap<String, Access>,
}

/// One change of what outlives a restart.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Change {
    Granted(Grant),
    Revoked(String),
    AllRevoked,
    Issued(String, Access),
    Expired(String),
    AllExpired,
}

/// The tokens that the token endpoint issued.
#[derive(Clone, Debug)]
pub struct Issued {
    /// `Atza|…`
    pub access_token: String,
    /// `Atzr|…`
    pub refresh_token: String,
    /// The lifetime of the access token in seconds.
    pub expires_in: u32,
}

/// Why the token endpoint rejects a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    InvalidGrant(&'static str),
    InvalidClient,
    UnauthorizedClient,
    InvalidRequest(&'static str),
    UnsupportedGrantType,
}

impl World {
    /// One client, two advertisers with profiles in all three regions, AMC accounts and campaigns; no consent yet.
    pub fn seeded() -> Self {
        Self {
            clients: vec![Client {
                id: CLIENT_ID.into(),
                secrets: vec![CLIENT_SECRET.into()],
                return_urls: vec![RETURN_URL.into()],
                scopes: vec![SCOPE.into(), "advertising::audiences".into()],
            }],
            grants: Vec::new(),
            catalogue: Catalogue::seeded(),
            access_life: ACCESS_LIFE_SECONDS,
            codes: HashMap::new(),
            access: HashMap::new(),
            places: HashMap::new(),
            changes: None,
            history: History::default(),
            faults: Faults::default(),
            limits: Limits::default(),
            jobs: Jobs::default(),
        }
    }

    /// What outlives a restart. Changes are collected from now on.
    pub(super) fn keep(&mut self) -> Kept {
        self.changes = Some(Vec::new());
        Kept { grants: self.grants.clone(), access: self.access.clone() }
    }

    /// The changes since this was last asked for.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Adds what an earlier process kept.
    pub(super) fn restore(&mut self, kept: Kept) {
        kept.grants.into_iter().for_each(|grant| self.apply(Change::Granted(grant)));
        self.access.extend(kept.access);
    }

    /// Makes a change and notes it for the disk.
    fn change(&mut self, change: Change) {
        if let Some(changes) = &mut self.changes {
            changes.push(change.clone());
        }
        self.apply(change);
    }

    /// Makes a change, now or once more after a restart.
    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Granted(grant) => {
                self.places.insert(grant.refresh_token.clone(), self.grants.len());
                self.grants.push(grant);
            }
            Change::Revoked(token) => {
                if let Some(place) = self.places.get(&token) {
                    self.grants[*place].revoked = true;
                }
            }
            Change::AllRevoked => self.grants.iter_mut().for_each(|grant| grant.revoked = true),
            Change::Issued(token, access) => drop(self.access.insert(token, access)),
            Change::Expired(token) => drop(self.access.remove(&token)),
            Change::AllExpired => self.access.clear(),
        }
    }

    /// Adds an Allowed Return URL to every client.
    pub fn allow_return_url(&mut self, url: &str) {
        for client in &mut self.clients {
            client.return_urls.push(url.to_owned());
        }
    }

    /// A consent of the first advertiser for the first client and its first return URL, without PKCE.
    pub fn usual_consent(&self) -> Consent {
        let client = self.clients.first();
        Consent {
            client_id: client.map(|client| client.id.clone()).unwrap_or_default(),
            redirect_uri: client.and_then(|client| client.return_urls.first().cloned()).unwrap_or_default(),
            scope: SCOPE.into(),
            advertiser: self.catalogue.advertisers.first().map(|one| one.id.clone()).unwrap_or_default(),
            challenge: None,
        }
    }

    /// Records a consent and returns the code for the client.
    pub fn consent(&mut self, consent: Consent, now: Timestamp) -> String {
        self.codes.retain(|_, code| code.expires_at > now);
        let code = random_text(15);
        self.codes.insert(code.clone(), Code { consent, expires_at: after(now, CODE_LIFE) });
        code
    }

    /// Creates a grant with its first access token, without a code.
    pub fn grant(&mut self, consent: &Consent, now: Timestamp) -> Issued {
        let refresh_token = format!("Atzr|{}", random_text(ACCESS_BYTES));
        self.change(Change::Granted(Grant {
            refresh_token: refresh_token.clone(),
            client_id: consent.client_id.clone(),
            scope: consent.scope.clone(),
            advertiser: consent.advertiser.clone(),
            consented_at: now,
            revoked: false,
        }));
        self.issue(&consent.client_id, &consent.advertiser, refresh_token, &Twist::default(), now)
    }

    /// Revokes a grant. Its access tokens stay valid until they expire, as Amazon's do.
    pub fn revoke(&mut self, refresh_token: &str) -> bool {
        let living = self.find(refresh_token).is_some_and(|grant| !grant.revoked);
        if living {
            self.change(Change::Revoked(refresh_token.to_owned()));
        }
        living
    }

    /// Revokes every grant. Returns how many were not yet revoked.
    pub fn revoke_all(&mut self) -> usize {
        let living = self.grants.iter().filter(|grant| !grant.revoked).count();
        self.change(Change::AllRevoked);
        living
    }

    fn find(&self, refresh_token: &str) -> Option<&Grant> {
        self.places.get(refresh_token).map(|place| &self.grants[*place])
    }

    /// Expires every access token immediately.
    pub fn expire_access_tokens(&mut self) {
        self.change(Change::AllExpired);
    }

    /// The access token, if it has not expired.
    pub fn access(&self, token: &str, now: Timestamp) -> Option<&Access> {
        self.access.get(token).filter(|access| access.expires_at > now)
    }

    pub(super) fn client(&self, id: &str) -> Option<&Client> {
        self.clients.iter().find(|client| client.id == id)
    }

    pub(super) fn authenticate(&self, credentials: &Credentials<'_>) -> Result<(), Refusal> {
        let client = self.client(credentials.client_id).ok_or(Refusal::InvalidClient)?;
        let known = client.secrets.iter().any(|secret| secret == credentials.client_secret);
        if known { Ok(()) } else { Err(Refusal::InvalidClient) }
    }

    /// The authorization code grant. The first attempt of an authenticated client consumes the code, whether it
    /// succeeds or not.
    pub(super) fn exchange(
        &mut self,
        client_id: &str,
        code: &str,
        redirect_uri: &str,
        verifier: Option<&str>,
        twist: &Twist,
        now: Timestamp,
    ) -> Result<Issued, Refusal> {
        let Code { consent, expires_at } = self.codes.remove(code).ok_or(Refusal::InvalidGrant("code"))?;
        if expires_at <= now || consent.client_id != client_id || consent.redirect_uri != redirect_uri {
            return Err(Refusal::InvalidGrant("code"));
        }
        match (&consent.challenge, verifier) {
            (Some(_), None) => return Err(Refusal::InvalidRequest("code_verifier")),
            // RFC 9700, section 2.1.1: a verifier without a challenge indicates a downgrade attack.
            (None, Some(_)) => return Err(Refusal::InvalidGrant("code")),
            (Some(challenge), Some(verifier)) if !challenge.fits(verifier) => {
                return Err(Refusal::InvalidGrant("code"));
            }
            _ => {}
        }
        let first = self.grant(&consent, now);
        if twist.life.is_none() {
            return Ok(first);
        }
        self.change(Change::Expired(first.access_token));
        Ok(self.issue(client_id, &consent.advertiser, first.refresh_token, twist, now))
    }

    /// The refresh grant. It returns the same refresh token, as LWA does, unless told to rotate it.
    pub(super) fn refresh(
        &mut self,
        client_id: &str,
        refresh_token: &str,
        twist: &Twist,
        now: Timestamp,
    ) -> Result<Issued, Refusal> {
        let refused = Refusal::InvalidGrant("refresh_token");
        let grant = self.find(refresh_token).ok_or(refused)?;
        if grant.client_id != client_id {
            return Err(Refusal::UnauthorizedClient);
        }
        if grant.revoked || grant.ended(now) {
            return Err(refused);
        }
        let advertiser = grant.advertiser.clone();
        let mut current = refresh_token.to_owned();
        if twist.rotate {
            current = format!("Atzr|{}", random_text(ACCESS_BYTES));
            let successor = Grant { refresh_token: current.clone(), ..grant.clone() };
            self.change(Change::Revoked(refresh_token.to_owned()));
            self.change(Change::Granted(successor));
        }
        Ok(self.issue(client_id, &advertiser, current, twist, now))
    }

    fn issue(
        &mut self,
        client_id: &str,
        advertiser: &str,
        refresh_token: String,
        twist: &Twist,
        now: Timestamp,
    ) -> Issued {
        // Now and then: with each token all others would be looked at.
        if self.access.len() >= self.access.capacity() {
            self.access.retain(|_, access| access.expires_at > now);
        }
        let expires_in = twist.life.unwrap_or(self.access_life);
        let access_token = format!("Atza|{}", random_text(ACCESS_BYTES));
        let access = Access {
            client_id: client_id.to_owned(),
            advertiser: advertiser.to_owned(),
            expires_at: after(now, SignedDuration::from_secs(expires_in.into())),
            issued_at: now,
        };
        self.change(Change::Issued(access_token.clone(), access));
        Issued { access_token, refresh_token, expires_in }
    }
}

impl Grant {
    /// Whether the grant has passed the 365 days that apply to grants since 2026-07-30.
    fn ended(&self, now: Timestamp) -> bool {
        let since: Timestamp = CONSENT_ENDS_SINCE.parse().expect("the constant is a timestamp");
        self.consented_at >= since && now >= after(self.consented_at, CONSENT_LIFE)
    }
}

impl Challenge {
    fn fits(&self, verifier: &str) -> bool {
        match self {
            Self::Plain(expected) => expected == verifier,
            Self::S256(expected) => *expected == URL_SAFE_NO_PAD.encode(Sha256::digest(verifier)),
        }
    }
}

fn after(start: Timestamp, by: SignedDuration) -> Timestamp {
    start.saturating_add(by).unwrap_or(Timestamp::MAX)
}

/// Random bytes as base64url text.
pub(super) fn random_text(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random).expect("the machine has a source of randomness, or TLS could not work either");
    URL_SAFE_NO_PAD.encode(random)
}
