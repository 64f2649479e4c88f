//! The resources of the Ads API that the sandbox models, with the payloads of Amazon's documentation.

use http::header::{ACCEPT, CONTENT_TYPE, HeaderName, LOCATION, SET_COOKIE};
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::amc;
use super::call::{Passed, account_id, body_of, coded, malformed, presigned};
use super::catalogue::{Campaign, Profile, Report};
use super::reply::{self, Body};
use super::world::World;

/// The media type of Sponsored Products campaigns, version 3. The request must name it exactly: `*/*` is rejected.
const SP_CAMPAIGN: &str = "application/vnd.spCampaign.v3+json";
/// The media type of a report request.
const REPORT_REQUEST: &str = "application/vnd.createasyncreportrequest.v3+json";
/// Maximum number of campaigns on one page.
const LARGEST_PAGE: usize = 100;

/// Why one item of a batch was rejected: Amazon's error type, and a description.
type ItemError = (&'static str, &'static str);

/// Responds to a call that passed every check. An unmodelled path of a known family gets a 200 with a note.
pub(super) fn answer(world: &mut World, call: &Passed<'_>, family: &str) -> Response<Body> {
    // Handles HEAD as GET; the HTTP layer omits the body.
    let method = if call.method == Method::HEAD { &Method::GET } else { call.method };
    match (method.as_str(), call.path) {
        ("GET", ["v2", "profiles"]) => list_profiles(world, call),
        ("GET", ["v2", "profiles", id]) => get_profile(world, call, id),
        ("GET", ["managerAccounts"]) => list_managers(world, call),
        ("GET", ["dsp", "advertisers"]) => list_dsp_advertisers(world, call),
        ("POST", ["sp", "campaigns", "list"]) => list_campaigns(world, call),
        ("POST", ["sp", "campaigns"]) => write_campaigns(world, call, create_campaign),
        ("PUT", ["sp", "campaigns"]) => write_campaigns(world, call, update_campaign),
        ("POST", ["reporting", "reports"]) => request_report(world, call),
        ("GET", ["reporting", "reports", id]) => get_report(world, call, id),
        ("POST", [entity @ ("campaigns" | "adGroups" | "targets" | "ads"), "export"]) => {
            world.jobs.export(call.listener, entity, call.now)
        }
        ("GET", ["exports", id]) => world.jobs.export_status(call.listener, id, call.now),
        ("GET", ["v2", "reports", id]) => reply::json(StatusCode::OK, &old_report(call, id)),
        ("GET", ["v2", "reports", id, "download"]) => download(id),
        ("GET", ["amc", "accounts"]) => amc::list_accounts(world, call),
        ("GET", ["amc", "instances"]) => amc::list_instances(world, call),
        ("GET", ["amc", "instances", id]) => amc::get_instance(world, id),
        (_, ["amc", "reporting", instance, rest @ ..]) => amc::reporting(world, call, method.as_str(), instance, rest),
        ("POST", ["adsApi", "v1", "query", "campaigns"]) => query_campaigns(world, call),
        (_, ["v2", "profiles"] | ["sp", "campaigns", ..] | ["reporting", "reports", ..]) => {
            coded(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
        }
        _ => {
            let note = "The headers are valid; the sandbox has no data for this path";
            reply::json(StatusCode::OK, &json!({ "sandbox": note, "family": family }))
        }
    }
}

fn list_profiles(world: &World, call: &Passed<'_>) -> Response<Body> {
    let profiles = world.catalogue.profiles_of(&call.advertiser, call.listener).map(Profile::payload).collect();
    let mut response = reply::json(StatusCode::OK, &Value::Array(profiles));
    // The edge sets cookies in every response.
    reply::add(&mut response, SET_COOKIE, "session-id=130-1234567-1234567; Domain=.amazon.com; Path=/; Secure");
    reply::add(&mut response, SET_COOKIE, "session-id-time=2082787201l; Domain=.amazon.com; Path=/; Secure");
    response
}

/// The manager accounts of the user. Every region lists the same ones.
fn list_managers(world: &World, call: &Passed<'_>) -> Response<Body> {
    let managers = world.catalogue.managers.iter().filter(|manager| manager.advertiser == call.advertiser);
    let linked = |id: &u64| json!({ "profileId": id.to_string(), "accountType": "SELLER" });
    let managers: Vec<Value> = managers
        .map(|manager| {
            json!({
                "managerAccountId": manager.id,
                "managerAccountName": manager.name,
                "linkedAccounts": manager.profiles.iter().map(linked).collect::<Vec<_>>(),
            })
        })
        .collect();
    reply::json(StatusCode::OK, &json!({ "managerAccounts": managers }))
}

/// A page of the DSP advertisers of the profile in the Scope header.
fn list_dsp_advertisers(world: &World, call: &Passed<'_>) -> Response<Body> {
    let number = |name: &str| {
        let mut pairs = call.query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<usize>().ok())
    };
    let (start, count) = (number("startIndex").unwrap_or(0), number("count").unwrap_or(20).min(LARGEST_PAGE));
    let all = world.catalogue.dsp_advertisers.iter().filter(|one| Some(one.profile) == call.profile);
    let total = all.clone().count();
    let page: Vec<Value> = all
        .skip(start)
        .take(count)
        .map(|one| {
            json!({
                "advertiserId": one.id, "name": one.name, "country": one.country, "currency": one.currency,
                "timezone": "Europe/Paris", "url": "https://example.com",
            })
        })
        .collect();
    reply::json(StatusCode::OK, &json!({ "totalResults": total, "response": page }))
}

fn get_profile(world: &World, call: &Passed<'_>, id: &str) -> Response<Body> {
    let mut profiles = world.catalogue.profiles_of(&call.advertiser, call.listener);
    match profiles.find(|profile| profile.id.to_string() == id) {
        Some(profile) => reply::json(StatusCode::OK, &profile.payload()),
        None => coded(StatusCode::NOT_FOUND, "Profile not found"),
    }
}

/// The first value of a header, in lower case.
fn media_type(call: &Passed<'_>, name: &HeaderName) -> String {
    call.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().trim().to_ascii_lowercase()
}

/// Rejects a request unless both headers name the vendor's media type.
fn vendor_media_type(call: &Passed<'_>, wanted: &str) -> Option<Response<Body>> {
    let wanted = wanted.to_ascii_lowercase();
    let refuse = |status, text| Some(coded(status, text));
    if media_type(call, &CONTENT_TYPE) != wanted {
        return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Cannot consume content type");
    }
    if media_type(call, &ACCEPT) != wanted {
        return refuse(StatusCode::NOT_ACCEPTABLE, "Cannot produce an acceptable content type");
    }
    None
}

fn sp_answer(status: StatusCode, body: &Value) -> Response<Body> {
    reply::answer(status, SP_CAMPAIGN, body.to_string())
}

/// Whether a filter of the form `{"<name>": {"include": [...]}}` accepts a value.
fn included(body: &Value, filter: &str, value: &str) -> bool {
    match body[filter]["include"].as_array() {
        None => true,
        Some(wanted) => wanted.iter().any(|one| one.as_str().is_some_and(|one| one.eq_ignore_ascii_case(value))),
    }
}

fn list_campaigns(world: &World, call: &Passed<'_>) -> Response<Body> {
    if let Some(refused) = vendor_media_type(call, SP_CAMPAIGN) {
        return refused;
    }
    let Some(body) = body_of(call) else { return malformed() };
    let found: Vec<&Campaign> = world
        .catalogue
        .campaigns
        .iter()
        .filter(|one| Some(one.profile) == call.profile)
        .filter(|one| included(&body, "stateFilter", &one.state))
        .filter(|one| included(&body, "campaignIdFilter", &one.campaign_id))
        .collect();
    // The token is opaque to clients, and full of characters that a careless re-encoding corrupts.
    let start = match body["nextToken"].as_str() {
        None => 0,
        Some(token) => match token.strip_prefix("AQ+/==:").and_then(|start| start.parse::<usize>().ok()) {
            Some(start) => start,
            None => return coded(StatusCode::BAD_REQUEST, "Invalid nextToken"),
        },
    };
    let size = body["maxResults"].as_u64().and_then(|size| usize::try_from(size).ok()).unwrap_or(LARGEST_PAGE);
    let page: Vec<&Campaign> = found.iter().skip(start).take(size.clamp(1, LARGEST_PAGE)).copied().collect();
    let end = start + page.len();
    let mut answer = json!({ "campaigns": page, "totalResults": found.len() });
    if end < found.len() {
        answer["nextToken"] = json!(format!("AQ+/==:{end}"));
    }
    sp_answer(StatusCode::OK, &answer)
}

/// Writes the items of a batch in order; the 207 reports the result of each.
fn write_campaigns(
    world: &mut World,
    call: &Passed<'_>,
    write: fn(&mut World, u64, &Value) -> Result<Campaign, ItemError>,
) -> Response<Body> {
    if let Some(refused) = vendor_media_type(call, SP_CAMPAIGN) {
        return refused;
    }
    let (Some(body), Some(profile)) = (body_of(call), call.profile) else { return malformed() };
    let Some(items) = body["campaigns"].as_array() else {
        return coded(StatusCode::BAD_REQUEST, "campaigns must be a list");
    };
    let whole = call.headers.get("prefer").is_some_and(|value| value.as_bytes() == b"return=representation");
    let (mut success, mut error) = (Vec::new(), Vec::new());
    for (index, item) in items.iter().enumerate() {
        match write(world, profile, item) {
            Ok(campaign) => {
                let mut entry = json!({ "campaignId": campaign.campaign_id, "index": index });
                if whole {
                    entry["campaign"] = json!(campaign);
                }
                success.push(entry);
            }
            Err((kind, message)) => error.push(json!({
                "index": index,
                "errors": [{ "errorType": kind, "errorValue": { kind: { "message": message, "reason": message } } }],
            })),
        }
    }
    sp_answer(StatusCode::MULTI_STATUS, &json!({ "campaigns": { "success": success, "error": error } }))
}

fn create_campaign(world: &mut World, profile: u64, item: &Value) -> Result<Campaign, ItemError> {
    let mut campaign: Campaign =
        serde_json::from_value(item.clone()).map_err(|_| ("malformedValueError", "A required field is missing"))?;
    if campaign.budget.budget < 1.0 {
        return Err(("budgetError", "Budget is too low"));
    }
    let campaigns = &world.catalogue.campaigns;
    if campaigns.iter().any(|other| other.profile == profile && other.name == campaign.name) {
        return Err(("duplicateValueError", "Campaign name is already in use"));
    }
    campaign.profile = profile;
    campaign.campaign_id = world.catalogue.next_id().to_string();
    world.catalogue.campaigns.push(campaign.clone());
    Ok(campaign)
}

fn update_campaign(world: &mut World, profile: u64, item: &Value) -> Result<Campaign, ItemError> {
    let id = item["campaignId"].as_str().unwrap_or_default();
    let mut campaigns = world.catalogue.campaigns.iter_mut();
    let campaign = campaigns
        .find(|one| one.profile == profile && one.campaign_id == id)
        .ok_or(("entityNotFoundError", "Campaign not found"))?;
    if let Some(state) = item["state"].as_str() {
        state.clone_into(&mut campaign.state);
    }
    if let Some(name) = item["name"].as_str() {
        name.clone_into(&mut campaign.name);
    }
    if let Some(budget) = item["budget"]["budget"].as_f64() {
        campaign.budget.budget = budget;
    }
    Ok(campaign.clone())
}

fn request_report(world: &mut World, call: &Passed<'_>) -> Response<Body> {
    if ![REPORT_REQUEST, "application/json"].contains(&media_type(call, &CONTENT_TYPE).as_str()) {
        return coded(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Cannot consume content type");
    }
    let Some(request) = body_of(call).filter(|body| body["configuration"].is_object()) else {
        return coded(StatusCode::BAD_REQUEST, "configuration is required");
    };
    let context = call.profile.map(|id| id.to_string()).or(account_id(call).map(str::to_owned)).unwrap_or_default();
    let mut reports = world.catalogue.reports.iter();
    if let Some((id, _)) = reports.find(|(_, report)| report.request == request && report.context == context) {
        let text = format!("The Request is a duplicate of : {id}");
        return reply::json(StatusCode::TOO_EARLY, &json!({ "code": "425", "detail": text }));
    }
    let id = super::request_id();
    let report = Report { request, context, polls: 0 };
    let body = report_payload(&id, &report);
    world.catalogue.reports.insert(id, report);
    reply::json(StatusCode::OK, &body)
}

fn get_report(world: &mut World, call: &Passed<'_>, id: &str) -> Response<Body> {
    let context = call.profile.map(|id| id.to_string()).or(account_id(call).map(str::to_owned)).unwrap_or_default();
    let Some(report) = world.catalogue.reports.get_mut(id).filter(|report| report.context == context) else {
        return reply::json(StatusCode::NOT_FOUND, &json!({ "code": "404", "detail": "Report not found" }));
    };
    report.polls += 1;
    reply::json(StatusCode::OK, &report_payload(id, report))
}

fn report_payload(id: &str, report: &Report) -> Value {
    let done = report.polls > 1;
    json!({
        "reportId": id,
        "name": report.request["name"],
        "startDate": report.request["startDate"],
        "endDate": report.request["endDate"],
        "configuration": report.request["configuration"],
        "status": if done { "COMPLETED" } else { "PENDING" },
        "url": if done { json!(presigned(id)) } else { Value::Null },
        "fileSize": if done { json!(1024) } else { Value::Null },
        "failureReason": null,
    })
}

/// Version 2 returns the download as an absolute link to the API itself.
fn old_report(call: &Passed<'_>, id: &str) -> Value {
    let host = match call.listener {
        super::Listener::Eu => "advertising-api-eu",
        super::Listener::Fe => "advertising-api-fe",
        _ => "advertising-api",
    };
    let location = format!("https://{host}.amazon.com/v2/reports/{id}/download");
    json!({ "reportId": id, "status": "SUCCESS", "statusDetails": "Report has been successfully generated.",
            "location": location, "fileSize": 1024 })
}

fn download(id: &str) -> Response<Body> {
    let mut response = reply::empty(StatusCode::TEMPORARY_REDIRECT);
    reply::set(&mut response, LOCATION, &presigned(id));
    response
}

fn query_campaigns(world: &World, call: &Passed<'_>) -> Response<Body> {
    let Some(body) = body_of(call) else { return malformed() };
    if included(&body, "adProductFilter", "AMAZON_DSP") && body["adProductFilter"].is_object() {
        if account_id(call).is_none() {
            return coded(StatusCode::BAD_REQUEST, "Required header amazon-ads-accountid is missing");
        }
        return reply::json(StatusCode::OK, &json!({ "campaigns": [] }));
    }
    let own = |profile: u64| {
        let mut profiles = world.catalogue.profiles_of(&call.advertiser, call.listener);
        profiles.any(|one| one.id == profile && call.profile.is_none_or(|wanted| wanted == profile))
    };
    let campaigns: Vec<Value> = world
        .catalogue
        .campaigns
        .iter()
        .filter(|one| own(one.profile) && included(&body, "stateFilter", &one.state))
        .map(|one| {
            json!({ "campaignId": one.campaign_id, "adProduct": "SPONSORED_PRODUCTS", "name": one.name,
                    "state": one.state, "startDateTime": format!("{}T00:00:00Z", one.start_date) })
        })
        .collect();
    reply::json(StatusCode::OK, &json!({ "campaigns": campaigns }))
}
