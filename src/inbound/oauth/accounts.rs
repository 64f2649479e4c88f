//! The accounts endpoints: what was found and configured, and a new search.

use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::query::{Query, Users};
use super::responses::json;
use super::{FullResponse, LoginError, OauthEndpoints, parameter};
use crate::auth::accounts::{Filter, SyncError, UserAccounts};
use crate::domain::found_account::{BadType, check_country};

/// Most accounts in one response.
const PAGE: usize = 500;

impl OauthEndpoints {
    /// A page of accounts, and how the last search ended for their users.
    pub(super) async fn accounts(&self, query: &Query, headers: &HeaderMap) -> Result<FullResponse, LoginError> {
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
        let page = self.directory.list(&filter, after.as_str(), limit, &base_url).await.map_err(LoginError::Store)?;
        let sync: Vec<Value> = page.users.iter().map(|user| searched_json(user)).collect();
        Ok(json(
            StatusCode::OK,
            &json!({ "accounts": page.accounts, "total": page.total, "next": page.next, "sync": sync }),
        ))
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
