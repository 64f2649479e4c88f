//! The accounts endpoints: what was found and configured, and a new search.

use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::query::{Query, Users};
use super::responses::json;
use super::{FullResponse, LoginError, OauthEndpoints, parameter};
use crate::auth::accounts::{Filter, SyncError, UserAccounts, list};
use crate::domain::found_account::{BadType, check_country};

/// Most accounts in one response.
const PAGE: usize = 500;

impl OauthEndpoints {
    /// A page of accounts, and how the last search ended for their users.
    pub(super) fn accounts(&self, query: &Query, headers: &HeaderMap) -> Result<FullResponse, LoginError> {
        let Users { after, limit } = query.page(PAGE)?;
        let country = query.get("country").map(check_country).transpose();
        let kind = query.get("type").map(str::parse).transpose();
        let filter = Filter {
            user: query.get("user_id").map(|_| query.user()).transpose()?,
            name: query.get("name").map(str::to_owned),
            country: country.map_err(|wanted| parameter("country", wanted))?,
            kind: kind.map_err(|BadType| {
                parameter("type", "seller, vendor, agency, dsp_advertiser, manager, amc or other")
            })?,
        };
        let base_url = format!("http://{}", self.admission.own_authority(headers).unwrap_or(&self.authority));
        let snapshot = self.directory.snapshot();
        let all = list(&snapshot, &self.directory.configured(), &filter, &base_url);
        let total = all.len();
        let mut rest = all.into_iter().filter(|account| account.slug.as_str() > after.as_str());
        let page: Vec<_> = rest.by_ref().take(limit).collect();
        let next = rest.next().and(page.last()).map(|last| last.slug.clone());
        let searched = snapshot.users.values().filter(|user| match &filter.user {
            Some(wanted) => *wanted == user.user_id,
            None => page.iter().any(|account| account.user_id == user.user_id),
        });
        let sync: Vec<Value> = searched.map(|user| searched_json(user)).collect();
        Ok(json(StatusCode::OK, &json!({ "accounts": page, "total": total, "next": next, "sync": sync })))
    }

    /// Searches for the accounts of one user now.
    pub(super) async fn sync_accounts(&self, query: &Query) -> Result<FullResponse, LoginError> {
        let user = query.user()?;
        match self.directory.sync(&user).await {
            Ok(accounts) => Ok(json(StatusCode::OK, &searched_json(&accounts))),
            Err(SyncError::NoToken(error)) => Err(LoginError::NoToken(error, user)),
            Err(SyncError::Store(error)) => Err(LoginError::Store(error)),
            Err(SyncError::NoRegion(failures)) => Err(LoginError::NoRegion(failures)),
        }
    }
}

fn searched_json(user: &UserAccounts) -> Value {
    let missing = user.accounts.iter().filter(|account| account.missing_since.is_some()).count();
    json!({
        "user_id": user.user_id,
        "synced_at": user.synced_at,
        "accounts": user.accounts.len(),
        "missing": missing,
        "outcomes": user.outcomes,
    })
}
