//! Backup, restore, import and export while the process serves: for an operator, who then need not stop a pod.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Limited, StreamBody};
use serde::Serialize;
use tokio::sync::mpsc;

use super::records::entries;
use super::{Admin, AdminResponse, BODY_TIMEOUT, bytes};
use crate::auth::lwa::LwaError;
use crate::auth::tokens::ImportError;
use crate::domain::account::UserId;
use crate::domain::grant::{Grant, State};
use crate::domain::secret::Secret;
use crate::inbound::problem::{Code, Problem};
use crate::server::CallerBody;
use crate::store::imported_record::{Imported, read_token};
use crate::store::{StoreError, TokenStore};

/// Largest body with a refresh token in clear text.
const MAX_TOKEN: usize = 8 << 10;
/// Pages of a dump that wait for the caller to read them.
const PAGES: usize = 1;
/// Most problems, and most repairs, that an import lists. It counts all.
const MAX_LISTED: usize = 50;

/// What an import did.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    /// Grants that are stored and in use; with `dry_run`, grants that could be.
    imported: usize,
    /// Records that were not imported.
    refused: usize,
    /// Why, for the first 50.
    problems: Vec<String>,
    /// What was repaired, for the first 50.
    repairs: Vec<String>,
}

impl Outcome {
    fn refuse(&mut self, problem: String) {
        self.refused += 1;
        if self.problems.len() < MAX_LISTED {
            self.problems.push(problem);
        }
    }
}

/// The parameters of an endpoint, which has checked that it knows each of them.
pub(super) struct Parameters(BTreeMap<String, String>);

impl Parameters {
    pub(super) fn read(query: Option<&str>) -> Self {
        Self(url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect())
    }

    fn flag(&self, name: &str) -> Result<bool, Problem> {
        match self.0.get(name).map(String::as_str) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(bad(format!("The parameter {name} is wrong."), "It is true or false.".into())),
        }
    }

    fn user(&self) -> Result<UserId, Problem> {
        match self.0.get("user_id") {
            None => Ok(UserId::default()),
            Some(user) => user
                .parse()
                .map_err(|_| bad("The parameter user_id is wrong.".into(), format!("It is {}.", UserId::LEGAL))),
        }
    }
}

impl Admin {
    /// `GET /dump`: every record, encrypted, as `store restore` and `users import --records` take them. It breaks off
    /// if the store fails, and never ends cleanly then.
    pub(super) fn dump(&self) -> AdminResponse {
        let (sender, receiver) = mpsc::channel(PAGES);
        tokio::spawn(write_dump(self.store.clone(), sender));
        let frames = futures_util::stream::unfold(receiver, async |mut receiver| {
            Some((receiver.recv().await?.map(Frame::data), receiver))
        });
        let mut response = Response::new(StreamBody::new(Box::pin(frames)).boxed_unsync());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CONTENT_DISPOSITION, HeaderValue::from_static("attachment; filename=\"adsidecar-grants.json\""));
        response
    }

    /// `POST /restore`: takes a dump.
    pub(super) async fn restore(&self, parameters: &Parameters, body: CallerBody) -> Result<AdminResponse, Problem> {
        self.take_records(parameters, false, body).await
    }

    /// `POST /users/import`: a refresh token in clear text, or with `records=true` records as another service that
    /// follows Amazon's guide has stored them.
    pub(super) async fn import(&self, parameters: &Parameters, body: CallerBody) -> Result<AdminResponse, Problem> {
        let verify = !parameters.flag("offline")?;
        if parameters.flag("records")? {
            if parameters.0.contains_key("user_id") {
                return Err(bad("Records name their users themselves.".into(), "Leave user_id out.".into()));
            }
            return self.take_records(parameters, verify, body).await;
        }
        let (user, replace) = (parameters.user()?, parameters.flag("replace")?);
        if parameters.flag("dry_run")? {
            return Err(bad("A single token has no dry run.".into(), "Leave dry_run out.".into()));
        }
        let body = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_TOKEN).collect()).await;
        let body = body.ok().and_then(Result::ok).map(|body| Secret::new(String::from_utf8_lossy(&body.to_bytes())));
        let late = || bad("The body did not arrive, or is longer than 8 KiB.".into(), "Send one refresh token.".into());
        let (grant, repairs) = read_token(body.ok_or_else(late)?.expose(), self.clock.now())
            .map_err(|flaw| bad(format!("The body {flaw}."), "Send one refresh token, as text.".into()))?;
        let has_grant = || {
            let next = "Send replace=true (on the command line, --replace) to replace it.".into();
            bad(format!("The user {user} has a grant already."), next)
        };
        if !replace && self.has_grant(&user) {
            return Err(has_grant());
        }
        let imported = self.tokens.import(&user, grant, replace, verify).await.map_err(|error| match error {
            ImportError::Refused(error) => not_verified(error),
            ImportError::Store(error) => store_failed(error),
        });
        if !imported? {
            return Err(has_grant());
        }
        self.directory.warm([&user]);
        let repairs = repairs.iter().map(|repair| format!("the token {repair}")).collect();
        Ok(json(&Outcome { imported: 1, repairs, ..Outcome::default() }))
    }

    /// `GET /users/export`: the refresh token of a user in clear text, or with `records=true` the encrypted record.
    pub(super) async fn export(&self, parameters: &Parameters) -> Result<AdminResponse, Problem> {
        let user = parameters.user()?;
        let unknown = || {
            Problem::new(Code::NotFound, "The user has no grant.", "See adsidecar users list, or the status endpoint.")
        };
        if parameters.flag("records")? {
            let record = self.store.record(&user).await.map_err(store_failed)?.ok_or_else(unknown)?;
            return Ok(json(&BTreeMap::from([(user, record)])));
        }
        let grant = match self.store.load(&user).await {
            Err(StoreError::Unreadable(error)) => {
                return Err(Problem::new(
                    Code::NotFound,
                    format!("The user's record yields no grant: {error}."),
                    "Export it with records=true, and keep it.",
                ));
            }
            loaded => loaded.map_err(store_failed)?.ok_or_else(unknown)?,
        };
        tracing::warn!(%user, "an operator exported the refresh token in clear text");
        let mut response = Response::new(bytes(format!("{}\n", grant.refresh_token.secret().expose())));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        Ok(response)
    }

    async fn take_records(
        &self,
        parameters: &Parameters,
        verify: bool,
        body: CallerBody,
    ) -> Result<AdminResponse, Problem> {
        let (replace, dry_run) = (parameters.flag("replace")?, parameters.flag("dry_run")?);
        let mut outcome = Outcome::default();
        let mut entries = entries(body);
        while let Some(entry) = entries.recv().await {
            let (user, record) = match entry {
                Ok(entry) => entry,
                Err(problem) => {
                    outcome.refuse(problem);
                    break;
                }
            };
            match self.store.open_foreign(&user, record).await.map_err(store_failed)? {
                Ok(Imported { grant, repairs }) => {
                    let repairs = repairs.iter().map(|(field, repair)| format!("{user}: {field} {repair}"));
                    let room = MAX_LISTED.saturating_sub(outcome.repairs.len());
                    outcome.repairs.extend(repairs.take(room));
                    let taken = if dry_run { Ok(()) } else { self.take(&user, grant, verify, replace).await? };
                    match taken {
                        Ok(()) => outcome.imported += 1,
                        Err(problem) => outcome.refuse(problem),
                    }
                }
                Err(error) => outcome.refuse(format!("{user}: {error}")),
            }
        }
        if !dry_run {
            tracing::info!(imported = outcome.imported, refused = outcome.refused, "an operator imported records");
        }
        if outcome.refused == 0 {
            return Ok(json(&outcome));
        }
        let detail = format!("{} records were refused: {}", outcome.refused, outcome.problems.join("; "));
        let next = "Correct these records or take them out, and send them again.".into();
        let outcome = serde_json::to_value(&outcome).unwrap_or_default();
        Err(bad(detail, next).member("outcome", outcome))
    }

    /// Takes one grant. The inner error is the problem of this record alone.
    async fn take(
        &self,
        user: &UserId,
        grant: Grant,
        verify: bool,
        replace: bool,
    ) -> Result<Result<(), String>, Problem> {
        let has_grant = || format!("{user}: has a grant already; replace=true (--replace) replaces it");
        if !replace && self.has_grant(user) {
            return Ok(Err(has_grant()));
        }
        match self.tokens.import(user, grant, replace, verify).await {
            Ok(true) => {
                self.directory.warm([user]);
                Ok(Ok(()))
            }
            Ok(false) => Ok(Err(has_grant())),
            Err(ImportError::Refused(error)) => Ok(Err(format!("{user}: {error}; offline=true keeps it unverified"))),
            Err(ImportError::Store(error)) => Err(store_failed(error)),
        }
    }

    /// Whether this process knows that `user` has a grant. Then a token that would not replace it is not verified:
    /// Login with Amazon may rotate what it is shown.
    fn has_grant(&self, user: &UserId) -> bool {
        self.tokens.status(user).state != State::None
    }
}

/// Writes all records as one JSON object, page by page, at the speed at which the caller reads it.
async fn write_dump(store: TokenStore, pages: mpsc::Sender<io::Result<Bytes>>) {
    let mut after = None;
    let mut separator = "{\n";
    loop {
        let page = match store.records_after(after).await {
            Ok(page) => page,
            Err(error) => {
                tracing::error!(%error, "a dump broke off");
                // An error breaks the response off, so that nobody takes it for whole.
                let _ = pages.send(Err(io::Error::other(error.to_string()))).await;
                return;
            }
        };
        let mut text = String::new();
        for (user, record) in &page {
            // A user id needs no escapes.
            text += &format!("{separator}\"{user}\": {record}");
            separator = ",\n";
        }
        let Some((last, _)) = page.last() else {
            let end = if separator == "{\n" { "{}\n" } else { "\n}\n" };
            let _ = pages.send(Ok(Bytes::from_static(end.as_bytes()))).await;
            return;
        };
        after = Some(last.clone());
        if pages.send(Ok(text.into())).await.is_err() {
            return;
        }
    }
}

fn json(value: &impl Serialize) -> AdminResponse {
    let text = serde_json::to_string(value).unwrap_or_default() + "\n";
    let mut response = Response::new(bytes(text));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn bad(detail: String, next_step: String) -> Problem {
    Problem::new(Code::BadRequest, detail, next_step)
}

fn store_failed(error: StoreError) -> Problem {
    Problem::new(Code::StoreUnavailable, error.to_string(), "Check the log and the store, then try again.")
        .retry_after(Duration::from_secs(1))
}

fn not_verified(error: LwaError) -> Problem {
    match error {
        LwaError::Refused { .. } => {
            bad(error.to_string(), "Send offline=true (on the command line, --offline) to keep it unverified.".into())
        }
        LwaError::TryLater { .. } | LwaError::Operator { .. } => Problem::new(
            Code::TokenUnavailable,
            error.to_string(),
            "Try again later, or send offline=true to keep it unverified.",
        )
        .retry_after(Duration::from_secs(1)),
    }
}

/// Nothing that is in memory fails.
pub(super) fn never(error: Infallible) -> io::Error {
    match error {}
}
