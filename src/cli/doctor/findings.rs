//! What the doctor can say: groups, findings, and the table of every code with its fault and its cure.
//!
//! The file is long because it is a table: one row for each code.

use std::fmt;

use serde::Serialize;

/// The groups of checks, in the order in which they are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// What the configuration says.
    Configuration,
    /// Keys and files with secrets.
    Secrets,
    /// The clock of this machine.
    Clock,
    /// The store of the grants.
    Store,
    /// The way to Amazon's hosts.
    Network,
    /// Login with Amazon: credentials, grants, the redirect URI.
    LoginWithAmazon,
    /// The three hosts of the Ads API.
    Regions,
    /// The profiles that the grants reach.
    Profiles,
    /// The accounts of the configuration.
    Accounts,
    /// Who may call, and the running sidecar.
    Callers,
    /// What is particular to a pod.
    Kubernetes,
}

impl Group {
    /// Every group, in order.
    pub const ALL: [Self; 11] = [
        Self::Configuration,
        Self::Secrets,
        Self::Clock,
        Self::Store,
        Self::Network,
        Self::LoginWithAmazon,
        Self::Regions,
        Self::Profiles,
        Self::Accounts,
        Self::Callers,
        Self::Kubernetes,
    ];

    /// The group's title.
    pub fn title(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::Secrets => "secrets",
            Self::Clock => "clock",
            Self::Store => "store",
            Self::Network => "network",
            Self::LoginWithAmazon => "Login with Amazon",
            Self::Regions => "regions",
            Self::Profiles => "profiles",
            Self::Accounts => "accounts",
            Self::Callers => "callers",
            Self::Kubernetes => "Kubernetes",
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    Ok,
    Warn,
    Fail,
    Skipped,
}

/// The result of one check.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Finding {
    pub(super) group: Group,
    pub(super) status: Status,
    /// Stable: a row of [`CODES`], or the name of the check if nothing is wrong.
    pub(super) code: &'static str,
    /// What was found.
    pub(super) cause: String,
    /// Whose fault it is: `operator`, `person`, `network` or `amazon`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fault: Option<&'static str>,
    /// The command or key that fixes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cure: Option<String>,
}

/// One code that a check can find.
#[derive(Debug)]
pub struct Code {
    /// The code.
    pub code: &'static str,
    /// The group of its check.
    pub group: Group,
    /// Whether it fails, or only warns.
    pub fails: bool,
    /// Whose fault it is.
    pub fault: &'static str,
    /// What it means, in Markdown.
    pub means: &'static str,
    /// The command or key that fixes it, in Markdown.
    pub cure: &'static str,
}

const OPERATOR: &str = "operator";
const PERSON: &str = "person";
const NETWORK: &str = "network";
const AMAZON: &str = "amazon";

const fn row(
    group: Group,
    code: &'static str,
    fails: bool,
    fault: &'static str,
    means: &'static str,
    cure: &'static str,
) -> Code {
    Code { code, group, fails, fault, means, cure }
}

/// Every code. The manual's table is made from it.
pub const CODES: &[Code] = {
    use Group::{
        Accounts, Callers, Clock, Configuration, Kubernetes, LoginWithAmazon, Network, Profiles, Regions, Secrets,
        Store,
    };
    &[
        row(
            Configuration,
            "config_file",
            true,
            OPERATOR,
            "The file of `--config` cannot be read, or is no TOML",
            "correct the path or the file: `adsidecar check --config FILE`",
        ),
        row(
            Configuration,
            "config_unknown_key",
            true,
            OPERATOR,
            "A key does not exist",
            "remove it or take the suggested one: `adsidecar check`",
        ),
        row(
            Configuration,
            "config_value",
            true,
            OPERATOR,
            "A value is refused",
            "set the named key as described: `adsidecar check`",
        ),
        row(
            Configuration,
            "config_client_id",
            true,
            OPERATOR,
            "The client id is missing or unusable",
            "`amazon.client_id` (AMAZON_CLIENT_ID)",
        ),
        row(
            Configuration,
            "config_client_secret",
            true,
            OPERATOR,
            "The client secret is missing or unusable",
            "`amazon.client_secret` (AMAZON_CLIENT_SECRET)",
        ),
        row(
            Configuration,
            "config_redirect_uri",
            true,
            OPERATOR,
            "The redirect URI is unusable",
            "`amazon.redirect_uri`",
        ),
        row(
            Configuration,
            "config_listen",
            true,
            OPERATOR,
            "A listener's address is refused",
            "`proxy.listen`, `login.listen`, `admin.listen`",
        ),
        row(
            Configuration,
            "config_account",
            true,
            OPERATOR,
            "An `[[account]]` is refused",
            "correct that account: `adsidecar check`",
        ),
        row(
            Configuration,
            "config_doubtful",
            false,
            OPERATOR,
            "A value was repaired, or is probably not what is meant",
            "write the value as described: `adsidecar check`",
        ),
        row(
            Secrets,
            "fernet_key_missing",
            true,
            OPERATOR,
            "There is no Fernet key",
            "`export FERNET_KEY=$(adsidecar key new)`",
        ),
        row(Secrets, "fernet_key_malformed", true, OPERATOR, "A Fernet key is none", "`adsidecar key new`"),
        row(
            Secrets,
            "secret_file_unreadable",
            true,
            OPERATOR,
            "The file of a secret cannot be read",
            "correct the key that ends with `_file`, or the file's owner",
        ),
        row(
            Secrets,
            "secret_file_open",
            false,
            OPERATOR,
            "Others on this machine can read a file with secrets",
            "`chmod 600 FILE`",
        ),
        row(
            Clock,
            "clock_skew",
            false,
            OPERATOR,
            "The clock differs from Amazon's by more than a minute",
            "switch time synchronization on: `timedatectl set-ntp true`",
        ),
        row(
            Clock,
            "clock_wrong",
            true,
            OPERATOR,
            "The clock differs from Amazon's by more than five minutes",
            "switch time synchronization on: `timedatectl set-ntp true`",
        ),
        row(
            Store,
            "store_held",
            true,
            OPERATOR,
            "Another process holds the store, and no sidecar answers",
            "give `doctor` the configuration of that process, or stop it",
        ),
        row(Store, "store_unwritable", true, OPERATOR, "The directory of the store cannot be written", "`store.path`"),
        row(
            Store,
            "store_key_wrong",
            true,
            OPERATOR,
            "The store was encrypted with another Fernet key",
            "add that key to `store.fernet_keys`",
        ),
        row(
            Store,
            "store_damaged",
            false,
            OPERATOR,
            "The database is damaged; the mirror has the grants",
            "start adsidecar: it restores the store. Check the disk",
        ),
        row(
            Store,
            "store_records_unreadable",
            true,
            OPERATOR,
            "Records are stored that no configured key opens",
            "add the missing key to `store.fernet_keys`",
        ),
        row(Store, "store_unusable", true, OPERATOR, "The directory holds something else", "`store.path`"),
        row(Store, "store_postgres", true, OPERATOR, "PostgreSQL cannot be used", "`store.postgres_url`"),
        row(
            Network,
            "dns",
            true,
            NETWORK,
            "A host name does not resolve",
            "repair DNS (`getent hosts HOST`), or correct the key that names the host",
        ),
        row(
            Network,
            "unreachable",
            true,
            NETWORK,
            "A host refuses connections",
            "allow outgoing connections to port 443",
        ),
        row(
            Network,
            "connect_timeout",
            true,
            NETWORK,
            "A host does not answer",
            "allow outgoing connections to port 443",
        ),
        row(
            Network,
            "tls",
            true,
            NETWORK,
            "A certificate is not trusted: something inspects TLS in between",
            "its CA in `amazon.ca_file` and `upstream.ca_file`",
        ),
        row(
            Network,
            "outgoing_proxy",
            true,
            NETWORK,
            "The proxy of the network is not reached, or opens no tunnel",
            "`upstream.proxy`, `amazon.proxy`, or the proxy's rules for that host",
        ),
        row(
            Network,
            "mcp_unreachable",
            false,
            NETWORK,
            "An MCP host cannot be reached: `/mcp` fails, the Ads API does not",
            "as for the code in its cause",
        ),
        row(
            LoginWithAmazon,
            "invalid_client",
            true,
            OPERATOR,
            "Login with Amazon refuses the client id or the secret",
            "`amazon.client_id`, `amazon.client_secret`",
        ),
        row(
            LoginWithAmazon,
            "lwa_unavailable",
            true,
            AMAZON,
            "Login with Amazon fails",
            "wait: living tokens are served meanwhile. `adsidecar status`",
        ),
        row(
            LoginWithAmazon,
            "redirect_uri_refused",
            true,
            OPERATOR,
            "The consent page refuses the redirect URI or the client id",
            "add `amazon.redirect_uri` to the Allowed Return URLs of the security profile",
        ),
        row(LoginWithAmazon, "nobody_logged_in", false, PERSON, "No user has a grant", "`adsidecar login`"),
        row(
            LoginWithAmazon,
            "login_required",
            true,
            PERSON,
            "A user has to consent again",
            "`adsidecar login --user USER`",
        ),
        row(
            LoginWithAmazon,
            "refresh_failed",
            true,
            AMAZON,
            "A token cannot be refreshed",
            "wait, or see the cause: `adsidecar status`",
        ),
        row(
            LoginWithAmazon,
            "consent_ending",
            false,
            PERSON,
            "A consent ends within 30 days",
            "`adsidecar login --user USER --again`",
        ),
        row(
            Regions,
            "region_unauthorized",
            true,
            AMAZON,
            "A region refuses the token",
            "`adsidecar login --user USER --again`",
        ),
        row(
            Regions,
            "region_forbidden",
            true,
            OPERATOR,
            "A region refuses the client: it has no access to the Ads API there",
            "apply for access to the Amazon Ads API for this client id",
        ),
        row(Regions, "region_throttled", false, AMAZON, "A region throttles", "wait a minute, then `adsidecar doctor`"),
        row(
            Regions,
            "region_failed",
            true,
            AMAZON,
            "A region fails",
            "wait, see <https://status.ads.amazon.com>, then `adsidecar doctor`",
        ),
        row(
            Profiles,
            "profiles_none",
            false,
            PERSON,
            "The grant of a user reaches no profile in any region",
            "log in as somebody with an advertising account: `adsidecar login --user USER --replace`",
        ),
        row(
            Accounts,
            "account_profile_unknown",
            true,
            OPERATOR,
            "The profile of an account is none of its user's",
            "`profile_id` of that account: `adsidecar accounts list`",
        ),
        row(
            Accounts,
            "account_region",
            true,
            OPERATOR,
            "The profile of an account belongs to another region",
            "`region` of that account",
        ),
        row(
            Accounts,
            "account_id_kind",
            false,
            OPERATOR,
            "An id of an account is of another kind than its key says",
            "the id under the key that fits: `adsidecar accounts list`",
        ),
        row(
            Accounts,
            "account_agency",
            false,
            OPERATOR,
            "The profile of an account is an agency's, which has no campaigns",
            "the profile of an advertiser: `adsidecar accounts list`",
        ),
        row(
            Accounts,
            "account_user",
            false,
            OPERATOR,
            "The user of an account is not logged in",
            "`adsidecar login --user USER`, or `user` of that account",
        ),
        row(Callers, "not_running", false, OPERATOR, "No sidecar runs", "`adsidecar serve`"),
        row(
            Callers,
            "port_taken",
            true,
            OPERATOR,
            "Another program listens at `proxy.listen`",
            "stop it, or another port in `proxy.listen`",
        ),
        row(
            Callers,
            "not_ready",
            true,
            OPERATOR,
            "The sidecar runs and is not ready",
            "see its log: `adsidecar health --ready`",
        ),
        row(
            Callers,
            "caller_token_refused",
            true,
            OPERATOR,
            "The running sidecar has another caller token",
            "the same `proxy.caller_token` for both",
        ),
        row(
            Callers,
            "caller_token_short",
            false,
            OPERATOR,
            "A caller token can be guessed",
            "32 random characters in `proxy.caller_token`",
        ),
        row(
            Callers,
            "socket_open",
            false,
            OPERATOR,
            "Every user of this machine may connect to the Unix socket",
            "`proxy.socket_mode`",
        ),
        row(
            Kubernetes,
            "pod_store_ephemeral",
            false,
            OPERATOR,
            "The store is lost with the pod: it lies on no volume",
            "mount a volume at `store.path`, or `store.kind = \"postgres\"`",
        ),
        row(
            Kubernetes,
            "pod_root",
            false,
            OPERATOR,
            "The container runs as root",
            "`securityContext.runAsNonRoot: true`",
        ),
        row(
            Kubernetes,
            "pod_probe",
            false,
            OPERATOR,
            "The kubelet cannot reach the admin listener on loopback",
            "an exec probe (`adsidecar health`), or `admin.listen`",
        ),
    ]
};

impl Finding {
    /// Nothing is wrong; `check` names what was checked.
    pub(super) fn ok(group: Group, check: &'static str, told: impl Into<String>) -> Self {
        Self { group, status: Status::Ok, code: check, cause: told.into(), fault: None, cure: None }
    }

    /// The check could not be made.
    pub(super) fn skipped(group: Group, check: &'static str, why: impl Into<String>) -> Self {
        Self { group, status: Status::Skipped, code: check, cause: why.into(), fault: None, cure: None }
    }

    /// Something is wrong. `code` is a row of [`CODES`]; `cure` is that row's cure made definite.
    pub(super) fn wrong(code: &'static str, cause: impl fmt::Display, cure: impl Into<String>) -> Self {
        let row = CODES.iter().find(|row| row.code == code).expect("each code stands in the table");
        let status = if row.fails { Status::Fail } else { Status::Warn };
        Self {
            group: row.group,
            status,
            code,
            cause: cause.to_string(),
            fault: Some(row.fault),
            cure: Some(cure.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_stands_once_in_the_order_of_the_groups() {
        let groups: Vec<_> = CODES.iter().map(|row| row.group).collect();
        assert!(groups.is_sorted());
        let mut codes: Vec<_> = CODES.iter().map(|row| row.code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), CODES.len());
        assert!(CODES.len() >= 30);
    }
}
