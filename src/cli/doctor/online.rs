//! The checks that use what is configured: a token call, a refresh of each grant, the profiles of three regions.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::Value;

use super::findings::{Finding, Group};
use crate::auth::lwa::{self, Lwa, LwaError};
use crate::cli::sidecar::{AMAZON, Sidecar, encoded};
use crate::config::Config;
use crate::domain::account::{Context, Region, UserId};
use crate::domain::grant::RefreshToken;
use crate::domain::secret::Secret;

/// Most users whose grants are tried.
const MAX_USERS: usize = 20;
/// Timeout of the consent page.
const PAGE: Duration = Duration::from_secs(8);

/// Whether Login with Amazon accepts the client id and the secret. It is shown a refresh token that nobody has: it
/// checks the client first, and says which of the two it refuses.
pub(super) async fn credentials(config: &Config) -> Finding {
    let lwa = match Lwa::new(config.lwa.clone()) {
        Ok(lwa) => lwa,
        Err(error) => return Finding::skipped(Group::LoginWithAmazon, "credentials", error),
    };
    let Ok(nobody) = RefreshToken::new(Secret::new("Atzr|adsidecar-doctor-asks-whether-the-client-is-known")) else {
        return Finding::skipped(Group::LoginWithAmazon, "credentials", "there is no token to ask with");
    };
    match lwa.refresh(&nobody).await {
        Ok(_) | Err(LwaError::Refused { .. }) => {
            Finding::ok(Group::LoginWithAmazon, "credentials", "Login with Amazon accepts the client id and the secret")
        }
        Err(error @ LwaError::Operator { .. }) => {
            Finding::wrong("invalid_client", error, "amazon.client_id, amazon.client_secret")
        }
        Err(LwaError::TryLater { code: code @ ("unreachable" | "dns" | "tls" | "timeout"), .. }) => Finding::skipped(
            Group::LoginWithAmazon,
            "credentials",
            format!("it cannot be reached ({code}): see network"),
        ),
        Err(error) => Finding::wrong("lwa_unavailable", error, "adsidecar status"),
    }
}

/// Whether the consent page accepts the client id and the redirect URI.
pub(super) async fn redirect_uri(config: &Config) -> Finding {
    let skipped = |why: String| Finding::skipped(Group::LoginWithAmazon, "redirect_uri", why);
    let url = Lwa::new(config.lwa.clone()).and_then(|lwa| {
        lwa.authorize_url(config.lwa.region, "adsidecar-doctor", "adsidecar-doctor").map_err(|error| error.to_string())
    });
    // Without a challenge: the page only has to say whether it knows the client and its URL.
    let url = match url {
        Ok(url) => url,
        Err(error) => return skipped(error),
    };
    let client = crate::domain::tls::client_config(&config.lwa.extra_roots, &[b"http/1.1"]).map_err(|e| e.to_string());
    let client = client.and_then(|tls| {
        let mut builder = reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().timeout(PAGE);
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        if let Some(proxy) = config.lwa.proxy.as_ref().filter(|proxy| proxy.is_for(host)) {
            builder = builder.proxy(lwa::through(proxy)?);
        }
        builder.redirect(reqwest::redirect::Policy::none()).build().map_err(|error| error.to_string())
    });
    let client = match client {
        Ok(client) => client,
        Err(error) => return skipped(error),
    };
    match client.get(url).send().await {
        Ok(answer) if answer.status() == StatusCode::BAD_REQUEST => {
            let cause = format!("the consent page refuses {} or the client id", config.lwa.redirect_uri);
            let cure = format!("add {} to the Allowed Return URLs of the security profile", config.lwa.redirect_uri);
            Finding::wrong("redirect_uri_refused", cause, cure)
        }
        Ok(answer) if answer.status().is_server_error() => {
            skipped(format!("the consent page answered {}", answer.status()))
        }
        Ok(_) => {
            Finding::ok(Group::LoginWithAmazon, "redirect_uri", "the consent page does not refuse the redirect URI")
        }
        Err(_) => skipped("the consent page cannot be reached: see network".to_owned()),
    }
}

/// What the sidecar knows, and what Amazon answers for its users. Returns the ids of the users.
pub(super) async fn by_use(config: &Config, sidecar: &Sidecar, findings: &mut Vec<Finding>) -> Vec<String> {
    let statuses = match sidecar.statuses().await {
        Ok(statuses) => statuses,
        Err(failed) => {
            findings.push(Finding::skipped(Group::LoginWithAmazon, "grants", failed.to_string()));
            return Vec::new();
        }
    };
    if statuses.is_empty() {
        findings.push(Finding::wrong("nobody_logged_in", "no user has a grant", "adsidecar login"));
        for (group, check) in [(Group::Regions, "regions"), (Group::Profiles, "profiles")] {
            findings.push(Finding::skipped(group, check, "nobody is logged in"));
        }
    }
    let users: Vec<UserId> =
        statuses.iter().filter_map(|status| status["user_id"].as_str()?.parse().ok()).take(MAX_USERS).collect();
    let mut reached = HashMap::new();
    let tried = futures_util::future::join_all(users.iter().map(|user| one_user(sidecar, user))).await;
    for (user, (of_user, profiles)) in users.iter().zip(tried) {
        findings.extend(of_user);
        reached.insert(user.clone(), profiles);
    }
    let answered: Vec<_> = reached.values().flatten().flatten().map(|(region, _)| *region).collect();
    for region in Region::ALL.into_iter().filter(|region| answered.contains(region)) {
        findings.push(Finding::ok(Group::Regions, "regions", format!("{region} answers with a token")));
    }
    consents(&statuses, findings);
    let known = statuses.iter().filter_map(|status| status["user_id"].as_str()).collect();
    accounts(config, &known, &reached, findings);
    users.iter().map(UserId::to_string).collect()
}

type Profiles = BTreeMap<Region, Vec<Value>>;

/// Refreshes one user's token, and lists the profiles of each region with it. `None` without a token.
// The function is long because it lists the findings about a user, in the order in which they exclude each other.
async fn one_user(sidecar: &Sidecar, user: &UserId) -> (Vec<Finding>, Option<Profiles>) {
    let mut findings = Vec::new();
    let path = format!("/api/auth/amazon/refresh?user_id={}", encoded(user.as_str()));
    let refreshed = match sidecar.request(Method::POST, &path, &[], AMAZON).await {
        Ok(reply) => reply,
        Err(failed) => return (vec![Finding::wrong("refresh_failed", failed, "adsidecar status")], None),
    };
    let detail = refreshed.json()["detail"].as_str().unwrap_or_default().to_owned();
    match refreshed.status {
        StatusCode::OK => {
            findings.push(Finding::ok(Group::LoginWithAmazon, "refresh", format!("{user}: a new token came")))
        }
        StatusCode::UNAUTHORIZED => {
            let cause = format!("{user}: {detail}");
            return (vec![Finding::wrong("login_required", cause, format!("adsidecar login --user {user}"))], None);
        }
        status => {
            let cause = format!("{user}: {status} {detail}");
            findings.push(Finding::wrong("refresh_failed", cause, "adsidecar status"));
        }
    }
    let [na, eu, fe] = Region::ALL.map(|region| sidecar.profiles(user, region));
    let answers: [_; 3] = tokio::join!(na, eu, fe).into();
    let mut profiles = Profiles::new();
    for (region, answer) in Region::ALL.into_iter().zip(answers) {
        let reply = match answer {
            Ok(reply) => reply,
            Err(failed) => {
                findings.push(Finding::wrong(
                    "region_failed",
                    format!("{region}, {user}: {failed}"),
                    "adsidecar doctor",
                ));
                continue;
            }
        };
        let document = reply.json();
        let cause = || {
            let said = ["details", "detail", "message"].into_iter().find_map(|name| document[name].as_str());
            format!("{region}, {user}: {} {}", reply.status, said.unwrap_or_default()).trim_end().to_owned()
        };
        match (reply.status, document.as_array()) {
            (StatusCode::OK, Some(list)) => drop(profiles.insert(region, list.clone())),
            (StatusCode::UNAUTHORIZED, _) => {
                let cure = format!("adsidecar login --user {user} --again");
                findings.push(Finding::wrong("region_unauthorized", cause(), cure));
            }
            (StatusCode::FORBIDDEN, _) => {
                let cure = "apply for access to the Amazon Ads API for this client id";
                findings.push(Finding::wrong("region_forbidden", cause(), cure));
            }
            (StatusCode::TOO_MANY_REQUESTS, _) => {
                findings.push(Finding::wrong("region_throttled", cause(), "adsidecar doctor, in a minute"));
            }
            // The network group says more about a host that is not reached.
            (StatusCode::BAD_GATEWAY, _) if reply.is_own_error => {
                findings.push(Finding::skipped(Group::Regions, "regions", cause() + ": see network"));
            }
            _ => findings.push(Finding::wrong("region_failed", cause(), "adsidecar doctor, later")),
        }
    }
    let count: usize = profiles.values().map(Vec::len).sum();
    if count == 0 && profiles.len() == Region::ALL.len() {
        let cause = format!("{user}: every region answered with an empty list");
        findings.push(Finding::wrong("profiles_none", cause, format!("adsidecar login --user {user} --replace")));
    } else if count > 0 {
        let by_region: Vec<_> = profiles.iter().map(|(region, list)| format!("{region} {}", list.len())).collect();
        findings.push(Finding::ok(Group::Profiles, "profiles", format!("{user}: {}", by_region.join(", "))));
    }
    (findings, Some(profiles))
}

fn consents(statuses: &[Value], findings: &mut Vec<Finding>) {
    for status in statuses.iter().filter(|status| matches!(status["consent"].as_str(), Some("ending" | "ended"))) {
        let (user, ends) = (status["user_id"].as_str(), status["consent_expires_at"].as_str());
        let user = user.unwrap_or_default();
        let cause = format!("{user}: the consent ends at {}", ends.unwrap_or_default());
        findings.push(Finding::wrong("consent_ending", cause, format!("adsidecar login --user {user} --again")));
    }
}

/// The accounts of the configuration, against the profiles of their users: all `known` ones have a grant, and some were
/// `reached`.
fn accounts(
    config: &Config,
    known: &HashSet<&str>,
    reached: &HashMap<UserId, Option<Profiles>>,
    findings: &mut Vec<Finding>,
) {
    let (before, mut untried) = (findings.len(), 0);
    for account in &config.proxy.accounts {
        let name = &account.name;
        let Some(profiles) = reached.get(&account.user) else {
            if known.contains(account.user.as_str()) {
                untried += 1;
                continue;
            }
            let cause = format!("account {name}: its user {} is not logged in", account.user);
            findings.push(Finding::wrong("account_user", cause, format!("adsidecar login --user {}", account.user)));
            continue;
        };
        let (Some(profiles), Some(id)) = (profiles, account.ids.get(Context::Scope).and_then(|id| id.to_str().ok()))
        else {
            continue;
        };
        let is_it = |profile: &&Value| profile["profileId"].to_string().trim_matches('"') == id;
        let place = profiles.iter().find_map(|(region, list)| Some((*region, list.iter().find(is_it)?)));
        let own = account.region.unwrap_or(config.proxy.region);
        match place {
            Some((region, _)) if region != own => {
                let cause = format!("account {name}: its profile {id} belongs to {region}, and its region is {own}");
                findings.push(Finding::wrong(
                    "account_region",
                    cause,
                    format!("region = \"{region}\" of the account {name}"),
                ));
            }
            Some((_, profile)) if profile["accountInfo"]["type"] == "agency" => {
                let cause =
                    format!("account {name}: its profile {id} is an agency's, which has no campaigns of its own");
                findings.push(Finding::wrong(
                    "account_agency",
                    cause,
                    format!("profile_id of the account {name}: adsidecar accounts list"),
                ));
            }
            Some(_) => {}
            None if profiles.len() == Region::ALL.len() => {
                let cause = format!("account {name}: {} reaches no profile {id}", account.user);
                findings.push(Finding::wrong(
                    "account_profile_unknown",
                    cause,
                    format!("profile_id of the account {name}: adsidecar accounts list"),
                ));
            }
            None => {}
        }
    }
    if findings.len() == before && !findings.iter().any(|finding| finding.group == Group::Accounts) {
        let told = match config.proxy.accounts.len() {
            0 => "none is configured".to_owned(),
            count if untried > 0 => {
                format!("{count} configured, {untried} of them not compared: only {MAX_USERS} users were tried")
            }
            count => format!("{count} configured, their profiles are there"),
        };
        findings.push(Finding::ok(Group::Accounts, "accounts", told));
    }
}
