//! Amazon Marketing Cloud: accounts, instances, workflows and their executions.

use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::call::{Passed, body_of, coded, malformed, presigned};
use super::catalogue::{AmcAccount, Execution, Workflow};
use super::header_requirements::ADVERTISER_ID;
use super::reply::{self, Body};
use super::world::World;

/// The AMC accounts of the user, in all regions.
pub(super) fn list_accounts(world: &World, call: &Passed<'_>) -> Response<Body> {
    let accounts = world.catalogue.amc_accounts.iter().filter(|one| one.advertiser == call.advertiser);
    let accounts: Vec<Value> = accounts
        .map(|one| json!({ "accountId": one.id, "accountName": one.name, "marketplaceId": one.marketplace }))
        .collect();
    reply::json(StatusCode::OK, &json!({ "amcAccounts": accounts }))
}

fn instance_payload(account: &AmcAccount) -> Value {
    json!({
        "instanceId": account.instance,
        "instanceName": account.name,
        "customerCanonicalName": account.name,
        "instanceType": "STANDARD",
        "creationStatus": "COMPLETED",
        "creationDatetime": "2026-01-05T09:00:00Z",
        "apiEndpoint": "https://advertising-api.amazon.com",
        "s3BucketName": format!("amc-{}", account.instance),
        "entities": ["NA"],
        "optionalDatasets": [],
    })
}

/// The instance of the account in the headers.
pub(super) fn list_instances(world: &World, call: &Passed<'_>) -> Response<Body> {
    let account = call.headers.get(ADVERTISER_ID);
    let accounts = world.catalogue.amc_accounts.iter();
    let instances: Vec<Value> = accounts
        .filter(|one| account.is_some_and(|sent| sent.as_bytes() == one.id.as_bytes()))
        .map(instance_payload)
        .collect();
    reply::json(StatusCode::OK, &json!({ "instances": instances }))
}

/// One instance.
pub(super) fn get_instance(world: &World, id: &str) -> Response<Body> {
    match world.catalogue.amc_accounts.iter().find(|one| one.instance == id) {
        Some(account) => reply::json(StatusCode::OK, &json!({ "instance": instance_payload(account) })),
        None => coded(StatusCode::NOT_FOUND, "Instance not found"),
    }
}

/// Workflows and their executions.
pub(super) fn reporting(
    world: &mut World,
    call: &Passed<'_>,
    method: &str,
    instance: &str,
    rest: &[&str],
) -> Response<Body> {
    let Some(body) = body_of(call) else { return malformed() };
    let catalogue = &mut world.catalogue;
    let workflow = |id: &str, all: &[Workflow]| {
        all.iter().find(|one| one.instance == instance && one.id == id).map(|one| one.body.clone())
    };
    match (method, rest) {
        ("GET", ["workflows"]) => {
            let here = catalogue.workflows.iter().filter(|one| one.instance == instance);
            let workflows: Vec<&Value> = here.map(|one| &one.body).collect();
            reply::json(StatusCode::OK, &json!({ "workflows": workflows }))
        }
        ("GET", ["workflows", id]) => match workflow(id, &catalogue.workflows) {
            Some(body) => reply::json(StatusCode::OK, &body),
            None => coded(StatusCode::NOT_FOUND, "Workflow not found"),
        },
        ("POST", ["workflows"]) => {
            let Some(id) = body["workflowId"].as_str().map(str::to_owned) else {
                return coded(StatusCode::BAD_REQUEST, "workflowId is required");
            };
            if workflow(&id, &catalogue.workflows).is_some() {
                return coded(StatusCode::CONFLICT, "Workflow already exists");
            }
            catalogue.workflows.push(Workflow { instance: instance.to_owned(), id, body });
            reply::json(StatusCode::OK, &json!({}))
        }
        ("POST", ["workflowExecutions"]) => {
            let mut body = body;
            let id = super::request_id();
            let account = call.headers.get(ADVERTISER_ID).and_then(|sent| sent.to_str().ok()).unwrap_or_default();
            if let Some(refusal) = world.jobs.run(call.listener, [instance, account], &id, call.now) {
                return refusal;
            }
            body["workflowExecutionId"] = json!(id);
            body["status"] = json!("PENDING");
            let answer = reply::json(StatusCode::OK, &body);
            catalogue.executions.push(Execution { instance: instance.to_owned(), id, body });
            answer
        }
        ("GET", ["workflowExecutions", id, rest @ ..]) => {
            let mut executions = catalogue.executions.iter_mut();
            let found = executions.find(|one| one.instance == instance && one.id == *id);
            found.map_or_else(
                || coded(StatusCode::NOT_FOUND, "Workflow execution not found"),
                |execution| execution_answer(execution, rest, world.jobs.has_ended(id, call.now)),
            )
        }
        (_, ["workflows" | "workflowExecutions", ..]) => coded(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"),
        _ => coded(StatusCode::NOT_FOUND, "The sandbox models workflows and their executions only"),
    }
}

/// An execution completes at the first status request after it `has_ended`; its file becomes available then.
fn execution_answer(execution: &mut Execution, rest: &[&str], has_ended: bool) -> Response<Body> {
    match rest {
        [] => {
            execution.body["status"] = if has_ended { json!("SUCCEEDED") } else { json!("RUNNING") };
            reply::json(StatusCode::OK, &execution.body)
        }
        ["downloadUrls"] if execution.body["status"] == "SUCCEEDED" => {
            reply::json(StatusCode::OK, &json!({ "downloadUrls": [presigned(&execution.id)] }))
        }
        ["downloadUrls"] => {
            let text = format!("Execution with ID {} is unavailable for download.", execution.id);
            coded(StatusCode::BAD_REQUEST, &text)
        }
        _ => coded(StatusCode::NOT_FOUND, "Not Found"),
    }
}
