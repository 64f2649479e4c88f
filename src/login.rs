//! Begin and finish a login.

use url::Url;

/// What a login needs to know beside the LWA client.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `login.frontend_url`: where a browser is sent after the callback.
    pub frontend_url: Option<Url>,
    /// `login.confirm`: grants of logins that a server began wait for `POST …/confirm`. Default: on where the login
    /// door is on.
    pub confirm: bool,
    /// `environment = production`: cookies carry `Secure` where the redirect URI is `https`.
    pub secure_cookies: bool,
}
