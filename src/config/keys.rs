//! The configuration keys, as data: one row for each, and one for each key of an `[[account]]`.
//!
//! Everything that lists keys is made from these rows: parsing with its bounds and its errors, the names in the
//! environment, what `adsidecar check` prints, which keys need a restart, `config/example.toml`, and the table in
//! `config/README.md`. To add a key, add its row here and read it in `resolve.rs` into the field that uses it; then run
//! `UPDATE_MANUALS=1 cargo nextest run -E 'test(manuals)'`.
//!
//! The file is long because it is a table: one row per key, and no logic.

use std::fmt;

use self::Default::{Described, Implied, Value};
use self::Kind::{
    Addresses, Certificates, Count, Duration, DurationOrAuto, Flag, Headers, Id, List, Numbers, Path, Secret, Secrets,
    Size, SizeOrNone, Text, Url, Word,
};
use crate::domain::account::Context;

/// One configuration key.
#[derive(Debug)]
pub struct Key {
    /// `section.key`; only `environment` and the keys of an account stand outside a section.
    pub name: &'static str,
    /// What its value can be.
    pub kind: Kind,
    /// What applies if nobody gives a value.
    pub default: Default,
    /// Its name in the environment in Amazon's guide, in addition to `ADSIDECAR_SECTION__KEY`.
    pub guide_name: Option<&'static str>,
    /// A reload that changes it is refused, because only a restart can.
    pub restart: bool,
    /// Why any value but the default is refused: the feature does not exist yet.
    pub not_built: Option<&'static str>,
    /// What it does, in Markdown.
    pub help: &'static str,
}

/// The type of a value, with its bounds. Bounds are written as a user would write them.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// The path of a file or directory.
    Path,
    /// An absolute URL.
    Url,
    /// `true` or `false`.
    Flag,
    /// One of these words, in any letter case.
    Word(&'static [&'static str]),
    /// A whole number, at least and at most.
    Count(usize, usize),
    /// A duration, at least and at most.
    Duration(&'static str, &'static str),
    /// A duration, at least and at most, or `auto`.
    DurationOrAuto(&'static str, &'static str),
    /// A number of bytes, at most.
    Size(&'static str),
    /// A number of bytes, or `none`.
    SizeOrNone,
    /// Texts.
    List,
    /// Whole numbers.
    Numbers,
    /// Addresses to listen at.
    Addresses,
    /// The path of a PEM file with certificates.
    Certificates,
    /// A text that is never shown, and can be given as a file.
    Secret,
    /// One or more of these.
    Secrets,
    /// An id of an account, for the header of this context.
    Id(Context),
    /// Header names with their values.
    Headers,
}

/// What applies if nobody gives a value.
#[derive(Debug, PartialEq, Eq)]
pub enum Default {
    /// This value, written as in the environment. To give it explicitly changes nothing.
    Value(&'static str),
    /// This value, but to give it explicitly has a meaning of its own, which the help text tells.
    Implied(&'static str),
    /// No fixed value.
    Described {
        /// What the manual says in its place, in Markdown.
        text: &'static str,
        /// A value for `config/example.toml`, written as in the environment; for a table, as TOML.
        example: &'static str,
    },
}

const KEY: Key =
    Key { name: "", kind: Text, default: Value(""), guide_name: None, restart: false, not_built: None, help: "" };

/// All keys but those of an account, in the order of the manual.
pub const KEYS: &[Key] = &[
    Key {
        name: "environment",
        kind: Word(&["production", "development"]),
        default: Value("production"),
        guide_name: Some("ENVIRONMENT"),
        help: "`production`: the log is JSON, the redirect URI must be `https` or loopback, cookies are Secure. \
                `development`: the log is text, and a Fernet key is created beside the store (`<path>.key`) if none \
                is configured",
        ..KEY
    },
    Key {
        name: "amazon.client_id",
        kind: Text,
        default: Described {
            text: "required",
            example: "amzn1.application-oa2-client.0123456789abcdef0123456789abcdef",
        },
        guide_name: Some("AMAZON_CLIENT_ID"),
        help: "The app's client id at Login with Amazon (LWA), from its security profile",
        ..KEY
    },
    Key {
        name: "amazon.client_secret",
        kind: Secrets,
        default: Described { text: "required", example: "amzn1.oa2-cs.v1.…" },
        guide_name: Some("AMAZON_CLIENT_SECRET"),
        help: "From the security profile. Several are tried in order, for use while the secret is rotated",
        ..KEY
    },
    Key {
        name: "amazon.redirect_uri",
        kind: Url,
        default: Value("http://localhost:8001/api/auth/amazon/callback"),
        guide_name: Some("AMAZON_OAUTH_REDIRECT_URI"),
        help: "Where Amazon sends the browser after consent: byte for byte one of the Allowed Return URLs of the \
                security profile",
        ..KEY
    },
    Key {
        name: "amazon.scope",
        kind: Text,
        default: Value("advertising::campaign_management"),
        guide_name: Some("AMAZON_SCOPE"),
        help: "The requested scopes, separated by spaces",
        ..KEY
    },
    Key {
        name: "amazon.region",
        kind: Word(&["na", "eu", "fe"]),
        default: Value("na"),
        guide_name: Some("AMAZON_REGION"),
        help: "The region of requests that name none and have no account with one. Also selects the hosts of Login \
                with Amazon",
        ..KEY
    },
    Key {
        name: "amazon.profile_id",
        kind: Text,
        default: Described { text: "none", example: "1234567890" },
        guide_name: Some("AMAZON_PROFILE_ID"),
        help: "The profile of requests that select no account, in `amazon.region` and with the grant of user \
                `default`: short for an account named `default` with this `profile_id`",
        ..KEY
    },
    Key {
        name: "amazon.refresh_token",
        kind: Secret,
        default: Described { text: "none", example: "Atzr|…" },
        guide_name: Some("AMAZON_REFRESH_TOKEN"),
        help: "A refresh token issued elsewhere: adopted as user `default` at start and at each reload, unless it \
                was the last one adopted or that user has a usable grant",
        ..KEY
    },
    Key {
        name: "amazon.authorize_url",
        kind: Url,
        default: Described { text: "by region", example: "https://www.amazon.com/ap/oa" },
        help: "The consent page, `https://www.amazon.com/ap/oa` in region `na`: `https`, or `http` on loopback",
        ..KEY
    },
    Key {
        name: "amazon.token_url",
        kind: Url,
        default: Described { text: "by region", example: "https://api.amazon.com/auth/o2/token" },
        help: "The token endpoint of Login with Amazon, `https://api.amazon.com/auth/o2/token` in region `na`: only \
               `https`",
        ..KEY
    },
    Key {
        name: "amazon.ca_file",
        kind: Certificates,
        default: Described { text: "none", example: "/etc/ssl/private-ca.pem" },
        help: "PEM file with additional CAs to trust for Login with Amazon",
        ..KEY
    },
    Key {
        name: "amazon.proxy",
        kind: Secret,
        default: Value("none"),
        help: "A proxy to Login with Amazon's token endpoint, as `upstream.proxy`",
        ..KEY
    },
    Key {
        name: "proxy.listen",
        kind: Addresses,
        default: Implied("127.0.0.1:8001, [::1]:8001"),
        restart: true,
        help: "The proxy listener: one address or a list, each `host:port` (an IP address or `localhost`) or \
                `unix:/path`. By default `[::1]` is used only where the machine has IPv6; an explicit value binds \
                exactly what it says. An address that other machines reach is refused without `allow_remote = true` \
                and a `caller_token`",
        ..KEY
    },
    Key {
        name: "proxy.allow_remote",
        kind: Flag,
        default: Value("false"),
        help: "Must be `true`, with a caller token set, before a non-loopback address is accepted",
        ..KEY
    },
    Key {
        name: "proxy.socket_mode",
        kind: Text,
        default: Value("0600"),
        restart: true,
        help: "The file mode of a Unix socket, four octal digits: who may connect. `0660` admits the directory's \
                group, which another container of a pod with an `fsGroup` needs",
        ..KEY
    },
    Key {
        name: "proxy.peer_uids",
        kind: Numbers,
        default: Value(""),
        help: "If not empty, the caller of a Unix socket must run as one of these numeric user ids",
        ..KEY
    },
    Key {
        name: "proxy.allowed_hosts",
        kind: List,
        default: Value(""),
        help: "Values of `Host` accepted in addition to `localhost`, `127.0.0.1` and `[::1]`; names without a port",
        ..KEY
    },
    Key {
        name: "proxy.caller_token",
        kind: Secrets,
        default: Described { text: "none", example: "…" },
        help: "The token that every caller must send; several are accepted",
        ..KEY
    },
    Key {
        name: "proxy.token_shim",
        kind: Flag,
        default: Value("true"),
        help: "Whether `POST /auth/o2/token` serves a placeholder to SDKs that insist on fetching a token",
        ..KEY
    },
    Key {
        name: "proxy.selection",
        kind: Word(&["header", "fixed"]),
        default: Value("header"),
        help: "`header`: callers select account, user and region. `fixed`: their headers and prefixes for that are \
                ignored",
        ..KEY
    },
    Key {
        name: "proxy.replay_limit",
        kind: Size("64MiB"),
        default: Value("256KiB"),
        help: "Request bodies up to this size are buffered until the response begins, for one replay after Amazon \
                rejected the token; all buffers together use at most 16 MiB",
        ..KEY
    },
    Key {
        name: "proxy.max_body",
        kind: SizeOrNone,
        default: Value("none"),
        help: "Largest request body. `none`: bodies stream without a limit",
        ..KEY
    },
    Key {
        name: "proxy.max_connections",
        kind: Count(1, 1_000_000),
        default: Value("4096"),
        help: "At the limit, the connection that has been idle longest is closed",
        ..KEY
    },
    Key {
        name: "proxy.header_timeout",
        kind: Duration("10ms", "1h"),
        default: Value("10s"),
        help: "Time limit for the request head, from its first byte",
        ..KEY
    },
    Key {
        name: "proxy.idle_timeout",
        kind: Duration("10ms", "1d"),
        default: Value("10m"),
        help: "Time limit for a connection without a request",
        ..KEY
    },
    Key {
        name: "proxy.body_timeout",
        kind: Duration("10ms", "1h"),
        default: Value("30s"),
        help: "The request fails when its body makes no progress for this long",
        ..KEY
    },
    Key {
        name: "proxy.write_timeout",
        kind: Duration("10ms", "1h"),
        default: Value("30s"),
        help: "The connection is reset when the caller reads nothing of the response for this long",
        ..KEY
    },
    Key {
        name: "login.listen",
        kind: Addresses,
        default: Value("off"),
        restart: true,
        help: "A listener that serves only the OAuth callback, for an Ingress: addresses as for `proxy.listen`, or \
                `off`",
        ..KEY
    },
    Key {
        name: "login.frontend_url",
        kind: Url,
        default: Described { text: "none", example: "https://app.example.com/" },
        guide_name: Some("FRONTEND_URL"),
        help: "Where browsers are sent after a login. Pages of its origin may call the OAuth endpoints with `fetch`, \
                if no caller token is set",
        ..KEY
    },
    Key {
        name: "login.confirm",
        kind: Flag,
        default: Described { text: "`true` if the login listener is on", example: "false" },
        help: "A grant from a login that a program started is used only after `POST /api/auth/amazon/confirm`, so \
                that your app can compare the user with its own session first",
        ..KEY
    },
    Key {
        name: "admin.listen",
        kind: Addresses,
        default: Implied("127.0.0.1:9464, [::1]:9464"),
        restart: true,
        help: "The admin listener, for probes, metrics and the status page: addresses as for `proxy.listen`",
        ..KEY
    },
    Key {
        name: "admin.public_url",
        kind: Url,
        default: Described { text: "none", example: "https://ads.internal/" },
        help: "The external URL of the status page, if a reverse proxy stands in front of the admin listener. Its \
                host is accepted in `Host`, and links are built from it. The page then requires the caller token",
        ..KEY
    },
    Key {
        name: "accounts.sync",
        kind: Word(&["daily", "off"]),
        default: Value("daily"),
        help: "`daily`: Amazon is asked which accounts a grant reaches after each login and once a day, so that \
                callers can select them by their slugs. `off`: only on request (`adsidecar accounts sync`)",
        ..KEY
    },
    Key {
        name: "store.kind",
        kind: Word(&["sled", "postgres"]),
        default: Value("sled"),
        restart: true,
        help: "`sled` is for one process; `postgres` for [several that share their \
                grants](../deploy/README.md#several-adsidecars-on-one-postgresql)",
        ..KEY
    },
    Key {
        name: "store.path",
        kind: Path,
        default: Value("data/adsidecar.sled"),
        restart: true,
        help: "The directory of the sled store. The Fernet key does not belong on the same volume",
        ..KEY
    },
    Key {
        name: "store.postgres_url",
        kind: Secret,
        default: Described {
            text: "required with `postgres`",
            example: "postgres://adsidecar:password@db.internal:5432/adsidecar?sslmode=verify-full",
        },
        restart: true,
        help: "The database of the `postgres` store. Without an `sslmode` TLS is used to every host that is not this \
                machine; certificate and name are checked wherever TLS is used",
        ..KEY
    },
    Key {
        name: "store.fernet_keys",
        kind: Secrets,
        default: Described { text: "required in production, and with `postgres`", example: "…" },
        guide_name: Some("FERNET_KEY"),
        restart: true,
        help: "The first key encrypts, every key decrypts. `adsidecar key new` makes one, `adsidecar key rotate` \
                puts a new one into use without a restart",
        ..KEY
    },
    Key {
        name: "store.cache",
        kind: Count(10, 1_000_000),
        default: Value("1000"),
        restart: true,
        help: "The users that are held in memory, those used last: with `postgres` their grants, and with either store \
                the accounts that were found for them. Others are read when a request needs them",
        ..KEY
    },
    Key {
        name: "refresh.margin",
        kind: Duration("10s", "30m"),
        default: Value("5m"),
        help: "An access token with less time left is refreshed at once when a request needs it",
        ..KEY
    },
    Key {
        name: "refresh.ahead",
        kind: Duration("10s", "50m"),
        default: Value("15m"),
        help: "In the background an access token is refreshed this long before it expires; at least the margin",
        ..KEY
    },
    Key {
        name: "refresh.sweep",
        kind: Duration("1s", "1h"),
        default: Value("10m"),
        help: "Interval for checking all users, so that none is missed",
        ..KEY
    },
    Key {
        name: "refresh.idle_after",
        kind: Duration("1m", "365d"),
        default: Value("7d"),
        help: "Users not used for this long are refreshed on demand only",
        ..KEY
    },
    Key {
        name: "refresh.concurrency",
        kind: Count(1, 256),
        default: Value("8"),
        help: "Concurrent background refreshes of this process; several on one PostgreSQL have as many each",
        ..KEY
    },
    Key {
        name: "upstream.na",
        kind: Url,
        default: Value("https://advertising-api.amazon.com"),
        help: "The Ads API in region `na`: an `https` origin, without a path",
        ..KEY
    },
    Key {
        name: "upstream.eu",
        kind: Url,
        default: Value("https://advertising-api-eu.amazon.com"),
        help: "The Ads API in region `eu`: an `https` origin, without a path",
        ..KEY
    },
    Key {
        name: "upstream.fe",
        kind: Url,
        default: Value("https://advertising-api-fe.amazon.com"),
        help: "The Ads API in region `fe`: an `https` origin, without a path",
        ..KEY
    },
    Key {
        name: "upstream.mcp_na",
        kind: Url,
        default: Value("https://advertising-ai.amazon.com"),
        help: "Amazon's MCP server in region `na`: an `https` origin, without a path",
        ..KEY
    },
    Key {
        name: "upstream.mcp_eu",
        kind: Url,
        default: Value("https://advertising-ai-eu.amazon.com"),
        help: "Amazon's MCP server in region `eu`: an `https` origin, without a path",
        ..KEY
    },
    Key {
        name: "upstream.mcp_fe",
        kind: Url,
        default: Value("https://advertising-ai-fe.amazon.com"),
        help: "Amazon's MCP server in region `fe`: an `https` origin, without a path",
        ..KEY
    },
    Key {
        name: "upstream.ca_file",
        kind: Certificates,
        default: Described { text: "none", example: "/etc/ssl/private-ca.pem" },
        help: "PEM file with additional CAs to trust for these hosts",
        ..KEY
    },
    Key {
        name: "upstream.http2",
        kind: Word(&["auto", "never", "always"]),
        default: Value("auto"),
        help: "`auto`: HTTP/2 where the host offers it, and HTTP/1.1 for callers that keep sending where that costs \
                less CPU: for up to twelve concurrent requests, or a hundred while responses are long (64 KiB)",
        ..KEY
    },
    Key {
        name: "upstream.connect_timeout",
        kind: Duration("10ms", "1h"),
        default: Value("5s"),
        help: "Time limit for DNS, TCP and TLS together",
        ..KEY
    },
    Key {
        name: "upstream.response_timeout",
        kind: Duration("10ms", "1h"),
        default: Value("120s"),
        help: "Time limit from the end of the request to the first byte of the response; none for `Accept: \
                text/event-stream`",
        ..KEY
    },
    Key {
        name: "upstream.idle_timeout",
        kind: DurationOrAuto("10ms", "1h"),
        default: Value("auto"),
        help: "How long an idle connection to Amazon is kept. `auto`: as long as the server is seen to allow, 55s at \
                first. A duration bounds that. While a region is in use (the last five minutes), a connection that is \
                given up is replaced in the background",
        ..KEY
    },
    Key {
        name: "upstream.proxy",
        kind: Secret,
        default: Value("none"),
        help: "A proxy to the Ads hosts: `http://user:password@host:port` (HTTP CONNECT), `socks5://…`, or \
                `environment` for `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, which are ignored otherwise. TLS is \
                verified through it",
        ..KEY
    },
    Key {
        name: "policy.read_only",
        kind: Flag,
        default: Value("false"),
        help: "Only reading requests are sent to Amazon: `GET`, `HEAD`, `OPTIONS`, and the `POST` paths that list, \
                query or report. See [Policy](#policy)",
        ..KEY
    },
    Key {
        name: "policy.allow",
        kind: List,
        default: Value(""),
        help: "If not empty, only these requests are sent: each `METHOD /path/glob`, with `*` for a part of one \
                segment and `**` for any number of segments, such as `GET /v2/profiles` or `POST /sp/*/list`",
        ..KEY
    },
    Key {
        name: "policy.mode",
        kind: Word(&["enforce", "observe"]),
        default: Value("enforce"),
        help: "`enforce`: requests that the policy forbids are refused. `observe`: they are counted, and sent",
        ..KEY
    },
    Key {
        name: "throttle.mode",
        kind: Word(&["off", "observe", "enforce", "queue"]),
        default: Value("observe"),
        help: "What happens while Amazon refuses requests with 429. `off`: nothing. `observe`: adsidecar learns the \
                limits and shows them, and touches no request. `enforce`: requests get `429 throttled` at once, and \
                Amazon is spared. `queue`: they wait for their turn. See [Throttle](#throttle)",
        ..KEY
    },
    Key {
        name: "throttle.queue_timeout",
        kind: Duration("100ms", "15m"),
        default: Value("30s"),
        help: "In mode `queue`, the longest wait. A request whose turn would come later gets `429 throttled` at once",
        ..KEY
    },
    Key {
        name: "throttle.coalesce_polls",
        kind: Flag,
        default: Value("false"),
        help: "Whether polls for the same report, export or AMC run by several callers within a second are answered \
                from one of them",
        ..KEY
    },
    Key {
        name: "throttle.max_waiting",
        kind: Count(1, 1_000_000),
        default: Value("1000"),
        help: "Most requests that wait at once. Further ones get `429 throttled`",
        ..KEY
    },
    Key {
        name: "throttle.max_waiting_bytes",
        kind: Size("1GiB"),
        default: Value("16MiB"),
        help: "Most bytes that waiting requests hold together",
        ..KEY
    },
    Key {
        name: "throttle.families",
        kind: List,
        default: Value(""),
        help: "Other modes for single [API families](#which-headers-are-attached): each `family=mode`, such as \
                `reporting=queue` or `mcp=off`",
        ..KEY
    },
    Key {
        name: "metrics.max_user_series",
        kind: Count(0, 1_000_000),
        default: Value("1000"),
        help: "Users beyond this number share one series, `other`",
        ..KEY
    },
    Key {
        name: "log.format",
        kind: Word(&["text", "json"]),
        default: Described { text: "`json`; in development, and on a terminal, `text`", example: "json" },
        help: "The format of the log on standard error. A reload does not change it",
        ..KEY
    },
    Key {
        name: "log.level",
        kind: Word(&["error", "warn", "info", "debug", "trace"]),
        default: Value("info"),
        help: "For adsidecar's own lines; dependencies log only `warn` and `error`",
        ..KEY
    },
    Key {
        name: "log.audit",
        kind: Flag,
        default: Value("false"),
        help: "One line for each request to Amazon, at any level: user, API family, outcome; no path, no query, no \
                secret. See [Logs](../deploy/README.md#logs)",
        ..KEY
    },
    Key {
        name: "notify.url",
        kind: Secret,
        default: Described { text: "none", example: "https://hooks.example.com/services/T0/B0/x" },
        help: "Where events are posted that need a person, such as a login that is needed: see \
               [Notifications](../deploy/README.md#notifications). Treated as a secret, because those of chat programs \
               are",
        ..KEY
    },
    Key {
        name: "notify.secret",
        kind: Secret,
        default: Described { text: "none", example: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw" },
        help: "Signs each event, as [Standard Webhooks](https://www.standardwebhooks.com) say. Behind `whsec_` it is \
               base64",
        ..KEY
    },
    Key {
        name: "notify.failing_after",
        kind: Duration("0s", "7d"),
        default: Value("15m"),
        help: "How long refreshes must fail until `refresh_failing` is told",
        ..KEY
    },
    Key {
        name: "notify.throttled_after",
        kind: Duration("0s", "7d"),
        default: Value("5m"),
        help: "How long Amazon must throttle until `throttled` is told",
        ..KEY
    },
    Key {
        name: "shutdown.accept",
        kind: Duration("0s", "1h"),
        default: Value("0s"),
        help: "After SIGTERM: how long new connections are still accepted",
        ..KEY
    },
    Key {
        name: "shutdown.drain",
        kind: Duration("0s", "1h"),
        default: Value("25s"),
        help: "Maximum wait for responses in flight",
        ..KEY
    },
];

/// The name of the list of accounts, which only the file can give.
pub const ACCOUNT: &str = "account";

/// What an account is, in Markdown.
pub const ACCOUNT_HELP: &str = "Accounts are names for \"this user, this region, these ids\", selected by the path \
                                prefix `/a/<name>/` or the header `X-Ads-Account`. Only this file can define them. \
                                Only `name` is required. Each id is sent in the header that its comment names";

/// The keys of one `[[account]]`, in the order of the manual.
pub const ACCOUNT_KEYS: &[Key] = &[
    Key {
        name: "name",
        kind: Text,
        default: Described { text: "required", example: "brand-eu" },
        help: "The name by which callers select it",
        ..KEY
    },
    Key {
        name: "user",
        kind: Text,
        default: Value("default"),
        help: "The user whose grant authorizes the requests",
        ..KEY
    },
    Key {
        name: "region",
        kind: Word(&["na", "eu", "fe"]),
        default: Described { text: "`amazon.region`", example: "eu" },
        help: "Where the account's data lives",
        ..KEY
    },
    Key {
        name: "profile_id",
        kind: Id(Context::Scope),
        default: Described { text: "none", example: "1234567890" },
        help: "`Amazon-Advertising-API-Scope`",
        ..KEY
    },
    Key {
        name: "marketplace_id",
        kind: Id(Context::Marketplace),
        default: Described { text: "none", example: "A1PA6795UKMFR9" },
        help: "`Amazon-Advertising-API-MarketplaceId`",
        ..KEY
    },
    Key {
        name: "advertiser_id",
        kind: Id(Context::Advertiser),
        default: Described { text: "none", example: "ENTITY1EXAMPLE" },
        help: "`Amazon-Advertising-API-AdvertiserId` (`ENTITY…`); on `/amc/models/v1` `Amazon-Ads-AccountId`",
        ..KEY
    },
    Key {
        name: "entity_id",
        kind: Id(Context::Entity),
        default: Described { text: "none", example: "ENTITY2EXAMPLE" },
        help: "`Amazon-Advertising-API-EntityId`",
        ..KEY
    },
    Key {
        name: "account_id",
        kind: Id(Context::Account),
        default: Described { text: "none", example: "amzn1.ads-account.g.example" },
        help: "`Amazon-Ads-AccountId`; on `/dsp/streams` spelled `Amazon-Ads-Account-ID`, on `/brand/stores/v1`, \
                `/targetableEntities` and the DSP insights `Amazon-Advertising-AccountId`",
        ..KEY
    },
    Key {
        name: "dsp_advertiser_id",
        kind: Id(Context::DspAdvertiser),
        default: Described { text: "none", example: "9876543210" },
        help: "`Amazon-Advertising-Advertiser-Id`; on `/dsp/audiences/edit` and `/dsp/audiences/delete` \
                `AdvertiserId`",
        ..KEY
    },
    Key {
        name: "amc_instance_id",
        kind: Id(Context::AmcInstance),
        default: Described { text: "none", example: "amcexample1" },
        help: "`Amazon-Marketing-Cloud-Audience-InstanceId`",
        ..KEY
    },
    Key {
        name: "manager_account_id",
        kind: Id(Context::Manager),
        default: Described { text: "none", example: "amzn1.ads1.ma1.example" },
        help: "`Amazon-Ads-Manager-AccountId`; on `/adm` and for ad tags `Amazon-Ads-Manager-Account-Id`, on the \
                partner and billing paths `Amazon-Advertising-API-Manager-Account`, for users and invitations \
                `Amazon-Ads-ManagerAccountId`",
        ..KEY
    },
    Key {
        name: "headers",
        kind: Headers,
        default: Described { text: "none", example: r#"{ X-Team = "brand" }"# },
        help: "Headers that are sent with every request, whatever the path. Those that adsidecar manages are refused",
        ..KEY
    },
    Key {
        name: "read_only",
        kind: Flag,
        default: Value("false"),
        help: "Like `policy.read_only`, for requests of this account; what either forbids is forbidden",
        ..KEY
    },
    Key {
        name: "allow",
        kind: List,
        default: Value(""),
        help: "Like `policy.allow`, for requests of this account",
        ..KEY
    },
    Key {
        name: "throttle",
        kind: Word(&["off", "observe", "enforce", "queue"]),
        default: Described { text: "`throttle.mode`, or that of the family", example: "queue" },
        help: "Like `throttle.mode`, for requests of this account; it precedes `throttle.families`",
        ..KEY
    },
];

impl Key {
    /// Whether its value is never shown. It can also be given as `<name>_file`, the path of a file that holds it.
    pub fn is_secret(&self) -> bool {
        matches!(self.kind, Secret | Secrets)
    }

    /// The value that applies if nobody gives one, written as in the environment.
    pub fn default_text(&self) -> Option<&'static str> {
        match self.default {
            Value(text) | Implied(text) => Some(text),
            Described { .. } => None,
        }
    }
}

/// The type, in Markdown.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Text => f.write_str("text"),
            Path => f.write_str("path"),
            Url => f.write_str("URL"),
            Flag => f.write_str("`true`, `false`"),
            Word(words) => write!(f, "`{}`", words.join("`, `")),
            Count(least, most) => write!(f, "number, {least} to {most}"),
            Duration(least, most) => write!(f, "duration, {least} to {most}"),
            DurationOrAuto(least, most) => write!(f, "`auto`, or a duration, {least} to {most}"),
            Size(most) => write!(f, "size, at most {most}"),
            SizeOrNone => f.write_str("size or `none`"),
            List => f.write_str("list of texts"),
            Numbers => f.write_str("list of numbers"),
            Addresses => f.write_str("address or list"),
            Certificates => f.write_str("path"),
            Secret => f.write_str("secret"),
            Secrets => f.write_str("secret or list"),
            Id(_) => f.write_str("id"),
            Headers => f.write_str("table"),
        }
    }
}
