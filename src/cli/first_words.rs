//! What a person at a terminal reads when adsidecar starts to serve: where to send requests, who is logged in, and
//! where to log in. A log collector never sees it.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;

use crate::app::{Addresses, local_authority};
use crate::auth::tokens::Status;
use crate::config::Config;
use crate::domain::account::UserId;
use crate::domain::grant::State;
use crate::inbound::oauth::OauthEndpoints;
use crate::server::Listen;
use crate::telemetry::log;

/// Most users that are named. The status page shows all.
const MAX_USERS: usize = 8;

/// What the greeting needs to know of the configuration.
#[derive(Debug)]
pub(super) struct FirstWords {
    /// The Unix sockets of the proxy listener.
    sockets: Vec<String>,
    needs_caller_token: bool,
    colours: bool,
}

impl FirstWords {
    /// The greeting for `config`; `None` if standard error is no terminal.
    pub(super) fn for_terminal(config: &Config) -> Option<Self> {
        let socket = |listen: &Listen| match listen {
            Listen::Unix(path) => Some(path.display().to_string()),
            Listen::Tcp(_) => None,
        };
        std::io::stderr().is_terminal().then(|| Self {
            sockets: config.proxy_listen.iter().filter_map(socket).collect(),
            needs_caller_token: !config.admission.caller_tokens.is_empty(),
            colours: log::colours(),
        })
    }

    /// Writes the greeting to standard error.
    pub(super) fn write(&self, addresses: &Addresses, users: &[Status]) {
        let _ = std::io::stderr().write_all(self.text(addresses, users).as_bytes());
    }

    fn text(&self, addresses: &Addresses, users: &[Status]) -> String {
        let base = addresses.proxy.first().map(|proxy| format!("http://{}", local_authority(*proxy)));
        let mut lines = vec![("Send requests to", self.proxy(base.as_deref()))];
        lines.push(("", "the path, query, headers and body as for https://advertising-api.amazon.com".to_owned()));
        lines.push(("Try it", self.example(base.as_deref())));
        lines.push(("Logged in", self.users(users)));
        if let Some(user) = who_logs_in(users) {
            lines.push(("Log in", login(addresses.proxy.first(), &user)));
        }
        if let Some(admin) = addresses.admin.first() {
            lines.push(("Status page", format!("http://{}/", local_authority(*admin))));
        }
        lines.push(("Stop", "Ctrl-C".to_owned()));
        let rows = lines.iter().map(|(label, text)| {
            let label = format!("{label:<18}");
            format!("  {}{text}\n", if label.trim().is_empty() { label } else { self.styled("1", &label) })
        });
        let title = self.styled("1;32", &format!("adsidecar {} serves", env!("CARGO_PKG_VERSION")));
        format!("\n{title}\n\n{}\n", rows.collect::<String>())
    }

    fn proxy(&self, base: Option<&str>) -> String {
        let sockets = self.sockets.iter().map(|path| format!("unix:{path}"));
        base.map(str::to_owned).into_iter().chain(sockets).collect::<Vec<_>>().join(", ")
    }

    fn example(&self, base: Option<&str>) -> String {
        let token = if self.needs_caller_token { "-H 'X-Ads-Sidecar-Token: …' " } else { "" };
        match (base, self.sockets.first()) {
            (Some(base), _) => format!("curl {token}{base}/v2/profiles"),
            (None, Some(socket)) => format!("curl {token}--unix-socket {socket} http://localhost/v2/profiles"),
            (None, None) => "–".to_owned(),
        }
    }

    /// The users with their states, those that a person has to look at first.
    fn users(&self, users: &[Status]) -> String {
        if users.is_empty() {
            return self.styled("33", "nobody yet");
        }
        let mut sorted: Vec<&Status> = users.iter().collect();
        sorted.sort_by_key(|user| user.state.urgency());
        let named = sorted.iter().take(MAX_USERS).map(|user| {
            let colour = match user.state {
                State::LoginRequired => "31",
                State::Failing | State::Expiring => "33",
                State::Fresh | State::Idle | State::None => "32",
            };
            format!("{} ({})", user.user_id, self.styled(colour, user.state.as_str()))
        });
        let more = users.len().saturating_sub(MAX_USERS);
        let more = (more > 0).then(|| format!("{more} more: adsidecar users list"));
        named.chain(more).collect::<Vec<_>>().join(", ")
    }

    fn styled(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The user that has to log in next; the default user if there is none at all.
fn who_logs_in(users: &[Status]) -> Option<UserId> {
    let waiting = users.iter().find(|user| user.state == State::LoginRequired).map(|user| user.user_id.clone());
    waiting.or_else(|| users.is_empty().then(UserId::default))
}

fn login(proxy: Option<&SocketAddr>, user: &UserId) -> String {
    let name: String = url::form_urlencoded::byte_serialize(user.as_str().as_bytes()).collect();
    match proxy {
        Some(proxy) => format!("{}{name}", OauthEndpoints::login_base(&local_authority(*proxy))),
        None => format!("ask for /api/auth/amazon/login?user_id={name} at the Unix socket"),
    }
}
