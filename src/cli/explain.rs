//! `adsidecar explain`: what would be sent to Amazon, and why, without a call.

use std::fmt::Write;

use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

use super::{Exit, Failed, Output, accounts, block_on, print};
use crate::auth::accounts::Snapshot;
use crate::config::Config;
use crate::domain::account::{Region, UserId};
use crate::inbound::proxy::explain::{Explained, Explanation, Forwarded, Line, explain};

#[derive(Debug, Args)]
pub(super) struct Explain {
    /// The method, such as GET
    method: Method,
    /// The path, such as /sp/campaigns/list, or the URL of one of Amazon's Ads hosts
    path: Uri,
    /// The account that the request selects: X-Ads-Account
    #[arg(long, value_name = "NAME")]
    account: Option<String>,
    /// The user that the request names: X-Ads-User
    #[arg(long, value_name = "ID")]
    user: Option<UserId>,
    /// The region that the request names: X-Ads-Region
    #[arg(long)]
    region: Option<Region>,
    /// A header that the caller sends, such as 'Prefer: return=representation'; repeatable
    #[arg(long, value_name = "NAME: VALUE", value_parser = header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// How to print it
    #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Output,
}

/// Explains; fails if the request would be refused.
pub(super) fn run(command: Explain, config: &Config) -> Result<(), Failed> {
    let mut caller = HeaderMap::new();
    let said = [
        ("x-ads-account", command.account.as_deref()),
        ("x-ads-user", command.user.as_ref().map(UserId::as_str)),
        ("x-ads-region", command.region.map(Region::as_str)),
    ];
    for (name, value) in said.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        let value = HeaderValue::from_str(value).map_err(|_| Failed {
            exit: Exit::Usage,
            message: "--account is no value of a header: write the name of an account".to_owned(),
        })?;
        caller.insert(HeaderName::from_static(name), value);
    }
    for (name, value) in command.header {
        caller.append(name, value);
    }
    // What was found tells more about any account; without it only a name that the configuration knows is explained.
    let name = command.account.as_deref().or_else(|| command.path.path().strip_prefix("/a/")?.split('/').next());
    let is_configured = |name: &str| config.proxy.accounts.iter().any(|account| &*account.name == name);
    let found = match block_on(accounts::found(config))? {
        Ok(found) => found,
        Err(failed) if name.is_some_and(|name| !is_configured(name)) => return Err(failed),
        Err(_) => Snapshot::default(),
    };
    let what = Explained {
        settings: &config.proxy,
        origins: &config.upstream.origins,
        outgoing_proxy: config.upstream.proxy.as_ref(),
        throttle: &config.throttle,
        found: &found,
    };
    let explanation = explain(&what, &command.method, &command.path, &caller)
        .map_err(|why| Failed::because(format!("adsidecar would refuse the request: {why}")))?;
    match command.output {
        Output::Json => print(serde_json::to_string_pretty(&explanation).map_err(Failed::because)? + "\n")?,
        Output::Text => print(text(&explanation))?,
    }
    match explanation {
        Explanation::Amazon(forwarded) if !forwarded.policy.allowed => {
            Err(Failed::because("the policy denies the request: 403 policy_denied"))
        }
        _ => Ok(()),
    }
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("write NAME: VALUE")?;
    let name = name.trim().parse().map_err(|_| "this is no name of a header")?;
    let value = HeaderValue::from_str(value.trim()).map_err(|_| "this is no value of a header")?;
    Ok((name, value))
}

fn text(explanation: &Explanation) -> String {
    let forwarded = match explanation {
        Explanation::Adsidecar { why } => return format!("adsidecar itself answers: {why}\n"),
        Explanation::Amazon(forwarded) => forwarded,
    };
    let Forwarded { method, url, through, region, region_why, account, user, selected_by, family, .. } = &**forwarded;
    let account = account.as_deref().unwrap_or("none");
    let through = through.as_ref().map(|proxy| format!("  through  {proxy}\n")).unwrap_or_default();
    let mut text = format!(
        "{method} {url}\n{through}  region   {region}: {region_why}\n  account  {account}: {selected_by}\n  user     \
         {user}\n  family   {family}\n"
    );
    let verdict = if forwarded.policy.allowed { "allowed" } else { "denied" };
    let _ = writeln!(text, "  policy   {verdict}: {}", forwarded.policy.why);
    let _ = writeln!(text, "  throttle {}, mode {}", forwarded.throttle.bucket, forwarded.throttle.mode);
    text += "\nHeaders that Amazon receives\n";
    text += &columns(&forwarded.headers);
    if !forwarded.left_out.is_empty() {
        text += "\nNot sent\n";
        text += &columns(&forwarded.left_out);
    }
    for hint in &forwarded.hints {
        let _ = write!(text, "\nHint: {hint}\n");
    }
    text
}

fn columns(lines: &[Line]) -> String {
    let width = |of: fn(&Line) -> &String| lines.iter().map(|line| of(line).chars().count()).max().unwrap_or_default();
    let (names, values) = (width(|line| &line.name), width(|line| &line.value));
    lines.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "  {:names$}  {:values$}  {}", line.name, line.value, line.why);
        text
    })
}
