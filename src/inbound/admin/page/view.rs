//! The paths of the status page: its views, and the actions that its forms ask for.

use http::Method;

use crate::domain::account::UserId;
use crate::inbound::admission::AdminAccess;

/// The folder of the paths of all pages but the first.
pub(super) const FOLDER: &str = "/page/";

/// What a request to the page is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::inbound::admin) enum View {
    Overview,
    Users,
    Accounts,
    Calls,
    Throttle,
    Settings,
    /// On the way to Amazon's consent page.
    Login,
    Script,
    Act(Action),
    /// A page with a method that it does not have; holds those that it has.
    OtherMethod(&'static str),
}

/// The pages in the navigation.
pub(super) const PAGES: [(View, &str); 6] = [
    (View::Overview, "Overview"),
    (View::Users, "Users"),
    (View::Accounts, "Accounts"),
    (View::Calls, "Calls"),
    (View::Throttle, "Throttle"),
    (View::Settings, "Configuration"),
];

impl View {
    /// What `method` at `path` is for, if it is for the page.
    pub(in crate::inbound::admin) fn at(path: &str, method: &Method) -> Option<Self> {
        if path == "/" {
            return Some(if method == Method::GET { Self::Overview } else { Self::OtherMethod("GET, HEAD") });
        }
        let name = path.strip_prefix(FOLDER)?;
        if let Some(action) = Action::named(name) {
            return Some(if method == Method::POST { Self::Act(action) } else { Self::OtherMethod("POST") });
        }
        let view = match name {
            "users" => Self::Users,
            "accounts" => Self::Accounts,
            "calls" => Self::Calls,
            "throttle" => Self::Throttle,
            "settings" => Self::Settings,
            "login" => Self::Login,
            "script.js" => Self::Script,
            _ => return None,
        };
        Some(if method == Method::GET { view } else { Self::OtherMethod("GET, HEAD") })
    }

    /// The path, without its first slash.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Overview | Self::Act(_) | Self::OtherMethod(_) => "",
            Self::Users => "page/users",
            Self::Accounts => "page/accounts",
            Self::Calls => "page/calls",
            Self::Throttle => "page/throttle",
            Self::Settings => "page/settings",
            Self::Login => "page/login",
            Self::Script => "page/script.js",
        }
    }

    pub(in crate::inbound::admin) fn access(self) -> AdminAccess {
        match self {
            Self::Act(_) => AdminAccess::Form,
            // Refused whoever sends it.
            Self::OtherMethod(_) => AdminAccess::Anyone,
            _ => AdminAccess::Page,
        }
    }

    /// The parameters in the query.
    pub(in crate::inbound::admin) fn parameters(self) -> &'static [&'static str] {
        match self {
            Self::Overview | Self::Throttle => &["part"],
            Self::Users => &["q", "state", "user_id", "did"],
            Self::Accounts => &["q", "country", "type", "user_id", "after", "did"],
            Self::Calls => &["only", "part"],
            Self::Settings => &["did"],
            Self::Login => &["user_id"],
            Self::Script | Self::Act(_) | Self::OtherMethod(_) => &[],
        }
    }
}

/// What a form does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::inbound::admin) enum Action {
    Refresh,
    Logout,
    Sync,
    Reload,
    Level,
}

impl Action {
    const ALL: [Self; 5] = [Self::Refresh, Self::Logout, Self::Sync, Self::Reload, Self::Level];

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.name() == name)
    }

    /// The last part of the path.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Refresh => "refresh",
            Self::Logout => "logout",
            Self::Sync => "sync",
            Self::Reload => "reload",
            Self::Level => "log",
        }
    }

    /// The page that holds the form.
    pub(super) fn page(self) -> View {
        match self {
            Self::Refresh | Self::Logout => View::Users,
            Self::Sync => View::Accounts,
            Self::Reload | Self::Level => View::Settings,
        }
    }

    /// The fields of the form besides its key.
    pub(super) fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Refresh | Self::Logout | Self::Sync => &["user_id"],
            Self::Reload => &[],
            Self::Level => &["level"],
        }
    }

    /// What is said when it ended well.
    pub(super) fn done(self, user: Option<&UserId>) -> String {
        let user = user.map(|user| format!(" of user {user}")).unwrap_or_default();
        match self {
            Self::Refresh => format!("The access token{user} was refreshed."),
            Self::Logout => format!("The tokens{user} were deleted. Amazon still lists the app: remove it there too."),
            Self::Sync => format!("Amazon was asked for the accounts{user}."),
            Self::Reload => "The configuration was read again.".to_owned(),
            Self::Level => "The log level was changed, until the next start or reload.".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_at_the_path_that_its_links_name() {
        for (view, _) in PAGES {
            assert_eq!(View::at(&format!("/{}", view.path()), &Method::GET), Some(view));
        }
        for unknown in ["/page", "/page/", "/page/users/", "/page/Users", "/users", "//", "/page/script"] {
            assert_eq!(View::at(unknown, &Method::GET), None, "{unknown}");
        }
    }
}
